"""The demo and its second half, as a user starts them: small, but the real scripts in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    for package in ("seglearn", "accelerate", "matplotlib"):
        pytest.importorskip(package, reason="the demo needs its extra")
    folder = tmp_path_factory.mktemp("demo")
    result = run(ROOT / "examples" / "watch_demo.py", "--epochs", 1, "--output", folder / "watch", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "watch", result.stdout


@pytest.mark.slow
def test_demo_trains_evaluates_saves_localizes_and_draws(demo):
    folder, output = demo
    assert "people [8, 9, 10] test (12 sessions)" in output
    assert "84 truths" in output  # 3 people x 2 sides x 2 sessions x 7 exercises
    metrics = json.loads((folder / "model" / "metrics.json").read_text())
    assert 0 <= metrics["map"] <= 1
    assert {"config.json", "preprocessor_config.json", "model.safetensors"} <= {
        p.name for p in (folder / "model").iterdir()
    }
    assert (folder / "person08_left_0.png").stat().st_size > 10_000
    truth = json.loads((folder / "person08_left_0.json").read_text())
    assert len(truth) == 7
    signal = np.load(folder / "person08_left_0.npy", allow_pickle=False)
    assert 0 < truth[0]["segment"][0] < truth[-1]["segment"][1] < len(signal) / 50


@pytest.mark.slow
def test_localize_prints_a_table_and_names_bad_input(demo, tmp_path):
    folder, _ = demo
    script, signal = ROOT / "examples" / "localize.py", folder / "person08_left_0.npy"
    result = run(script, folder / "model", signal, "--threshold", 0.01, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = result.stdout.splitlines()[3:]
    assert rows
    for row in rows:
        start, end, score = map(float, row.split()[-3:])
        assert 0 <= start < end
        assert 0.01 <= score <= 1

    broken = np.load(signal, allow_pickle=False)
    broken[1234, 2] = np.nan
    np.save(tmp_path / "broken.npy", broken)
    result = run(script, folder / "model", "broken.npy", cwd=tmp_path)
    assert result.returncode == 2
    assert "broken.npy" in result.stderr
    assert "NaN" in result.stderr
    assert "Traceback" not in result.stderr

    (tmp_path / "words.npy").write_text("not a signal")
    result = run(script, folder / "model", "words.npy", cwd=tmp_path)
    assert result.returncode == 2
    assert "words.npy is no .npy file of numbers" in result.stderr
    assert "pickle" not in result.stderr

    result = run(script, folder / "model", "missing.npy", cwd=tmp_path)
    assert result.returncode == 2
    assert "there is no missing.npy" in result.stderr


@pytest.mark.parametrize("script", ["watch_demo.py", "localize.py"])
def test_help_explains_itself(script, tmp_path):
    result = run(ROOT / "examples" / script, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "python examples/" in result.stdout
