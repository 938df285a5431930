"""README's Python blocks run, in order, in one process, as a reader would type them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
)
from modeling_convtransformer.data import WATCH_LABELS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path, monkeypatch):
    for package in ("accelerate", "peft"):
        pytest.importorskip(package, reason="the README's block on adapters needs the train extra")
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    # What `make demo` leaves behind, with an untrained model in the place of the trained one.
    folder = tmp_path / "outputs" / "watch"
    watch = ROOT / "configuration" / "watch.yaml"
    id2label = dict(enumerate(WATCH_LABELS))
    config = ConvTransformerConfig.from_yaml(watch, id2label=id2label)
    ConvTransformerForTemporalActionLocalization(config).save_pretrained(folder / "model")
    ConvTransformerFeatureExtractor.from_yaml(watch).save_pretrained(folder / "model")
    signal = np.random.default_rng(0).normal(size=(3000, 6)).astype(np.float32)
    np.save(folder / "person08_left_0.npy", signal)
    monkeypatch.chdir(tmp_path)

    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)

    segments = names["segments"]
    assert segments["segments"].shape == (len(segments["scores"]), 2)
    assert (segments["scores"] > 0.3).all()
    assert (segments["segments"] >= 0).all()
    assert float(names["loss"]) > 0


@pytest.mark.slow
def test_your_data_leads_to_a_model(tmp_path, monkeypatch, capsys):
    """The page's blocks in its order: Python, the recipe, the commands for one epoch."""
    for package in ("seglearn", "accelerate"):
        pytest.importorskip(package, reason="the page needs the demo and train extras")
    page = (ROOT / "docs" / "your_data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks] == ["python", "python", "yaml", "bash", "python", "python", "bash", "py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    monkeypatch.chdir(tmp_path)
    for kind, text in blocks:
        if kind == "yaml":
            Path("my_recipe.yaml").write_text(text, encoding="utf-8")
        elif kind == "python":
            capsys.readouterr()
            exec(compile(text, "your_data.md", "exec"), {"json": json, "Path": Path})
            printed = capsys.readouterr().out.strip()
            assert printed in page or "suggest_config" not in text
        elif kind == "bash":  # (what is left, "py", needs an account on the Hub)
            words = text.replace("examples/", f"{ROOT}/examples/").split()
            command = [sys.executable, *words[1:], "--num_train_epochs", "1"]
            result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert result.returncode == 0, f"{text}\n{result.stderr}"
    assert {"model.safetensors", "preprocessor_config.json", "metrics.json"} <= {
        path.name for path in (tmp_path / "outputs" / "rehab").iterdir()
    }


@pytest.mark.parametrize("path", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_links_lead_to_files(path):
    assert (ROOT / path).exists(), f"README links to {path}"


def test_tree_names_existing_files():
    tree = README.split("## What is where", 1)[1].split("```", 2)[1]
    names = re.findall(r"^\s*([\w./-]+\.(?:py|yaml|md|cfg|toml|txt))\s", tree, flags=re.MULTILINE)
    known = {path.name for path in ROOT.rglob("*") if ".venv" not in path.parts}
    assert len(names) >= 8
    assert [name for name in names if name not in known] == []


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_no_placeholder_is_left(path):
    """Words like TO_DO are left from drafts, unless a command reads them: its arguments and environment variables."""
    sources = [ROOT / "benchmarks" / "gpu.sh", ROOT / "benchmarks" / "harness.py"]
    known = {"SBHAR_FOLDER"}.union(*(re.findall(r"\w+", source.read_text(encoding="utf-8")) for source in sources))
    words = re.findall(r"\b[A-Z]+_[A-Z_]+\b(?!\.cff)", path.read_text(encoding="utf-8"))
    assert [word for word in words if word not in known] == []
