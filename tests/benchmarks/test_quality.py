"""The benchmarks that train run from end to end on made recordings, and do not train twice what is there."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scripts import load_script

from modeling_convtransformer.data import SBHAR_FPS, SBHAR_LABELS

pytest.importorskip("accelerate", reason="training needs its extra")

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture
def sbhar(tmp_path):
    """One recording each of three people, of noise; as `data.load_sbhar` reads them."""
    rng, signals, database = np.random.default_rng(0), {}, {}
    for index, (person, subset) in enumerate({1: "training", 11: "training", 15: "validation"}.items()):
        name = f"exp{index:02d}_user{person:02d}"
        signals[name] = rng.normal(size=(40 * SBHAR_FPS, 6)).astype(np.float32)
        annotations = [
            {"label": SBHAR_LABELS[place], "segment": [5.0 + 10 * place, 12.0 + 10 * place]} for place in (0, 1)
        ]
        database[name] = {
            "subset": subset,
            "person": person,
            "duration": 40.0,
            "fps": 50.0,
            "annotations": annotations,
        }
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez(folder / "signals.npz", **signals)
    (folder / "annotations.json").write_text(json.dumps({"labels": SBHAR_LABELS, "database": database}))
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run("ablation", "--seeds", 1)`: what the benchmark prints, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # as Python does for a script
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))  # for the runs that they start

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        load_script(name, "benchmarks").main()
        return capsys.readouterr().out

    return call


@pytest.mark.slow
def test_sbhar_trains_both_variants_once(sbhar, run, tmp_path):
    arguments = ["sbhar", sbhar, "--seeds", 1, "--json", "a.json", "--num_train_epochs", 1]
    first = run(*arguments)
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row["variant"] for row in rows] == ["v2", "v1 settings"]
    for row in rows:
        folder = tmp_path / "outputs" / "sbhar" / f"{row['variant'].replace(' ', '_')}_0"
        config, metrics = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "metrics"))
        assert config["use_rope"] == (row["variant"] == "v2")
        assert config["mha_win_size"] == (19 if row["variant"] == "v2" else 9)
        assert row["average"] == 100 * metrics["average"]["map"]
    assert "| v2 | " in first
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("outputs/**/*.safetensors")}
    run(*arguments)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("outputs/**/*.safetensors")}
    # What another command left is not taken for this one's.
    with pytest.raises(SystemExit, match="v2_0 holds the run of another command"):
        run("sbhar", sbhar, "--seeds", 1, "--num_train_epochs", 2)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="adapters need peft")
def test_adapters_learn_few_parameters(sbhar, run, tmp_path):
    arguments = ["--seeds", 1, "--base-epochs", 1, "--epochs", 1, "--methods", "LoRA, convolutions too", "--turn", 45]
    run("adapters", sbhar, *arguments, "--json", "a.json")
    (row,) = json.loads((tmp_path / "a.json").read_text())
    assert row["method"] == "LoRA, convolutions too"
    assert 0.005 < row["share"] < 0.03
    turned = np.load(tmp_path / "outputs" / "adapters" / "turn_45" / "data" / "signals.npz", allow_pickle=False)
    original = np.load(sbhar / "signals.npz", allow_pickle=False)
    assert np.array_equal(turned["exp00_user01"], original["exp00_user01"])  # the base's people wear it as they did
    x, y = original["exp02_user15"][0, :2]
    assert turned["exp02_user15"][0, :2] == pytest.approx(np.array([x - y, x + y]) / np.sqrt(2), abs=1e-6)


@pytest.mark.slow
def test_ablation_trains_each_row_once_and_evaluates_at_every_length(sbhar, run, tmp_path):
    arguments = ["ablation", sbhar, "--tasks", "sbhar", "--rows", "RoPE", "relative", "--seeds", 1, "--epochs", 1]
    arguments += ["--length", 16, "--no-times", "--json", "a.json"]
    first = run(*arguments)
    written = json.loads((tmp_path / "a.json").read_text())
    lengths = [set(maps) for row in written["rows"] for maps in row["maps"].values()]
    assert lengths == [{"1", "2", "4"}, {"2", "4"}, {"2", "4"}, {"2", "4"}, {"1", "2", "4"}]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs" / "ablation").iterdir()}
    assert len(files) == 2
    again = run(*arguments)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert again[again.index("sbhar, positions") :] == first[first.index("sbhar, positions") :]
