"""examples/extract_features.py as a user starts it: a folder of recordings, some of them bad, killed and started again."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from media import save_encoder, write_sound, write_video

from modeling_convtransformer import ConvTransformerFeatureExtractor
from modeling_convtransformer.feature_extraction_convtransformer import stored_geometry
from modeling_convtransformer.features import extract_features, load_encoder, read_features

pytest.importorskip("av", reason='these tests need PyAV: pip install "modeling-convtransformer[video]"')

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, str(ROOT / "examples" / "extract_features.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(*arguments, cwd):
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    save_encoder(folder / "encoder")
    for number in range(4):
        write_video(folder / "videos" / f"day{number % 2}" / f"{number}.mp4", frames=30 + number, rate=25)
    (folder / "videos" / "bad.mp4").write_text("no video")
    write_sound(folder / "videos" / "silent.wav", seconds=0.5)  # no video: not looked at
    return folder


@pytest.mark.slow
def test_a_folder_of_videos(folder, tmp_path):
    arguments = ["videos", tmp_path / "features", "--encoder", "encoder", "--feature_stride", "3"]
    first = run(*arguments, "--workers", "2", cwd=folder)
    assert first.returncode == 1
    assert "4 extracted, 0 were there already, 1 failed" in first.stdout
    assert "videos/bad.mp4: not readable as a recording" in first.stderr.split("Failed:")[1]
    encoder = load_encoder(folder / "encoder")
    for number in range(4):
        sample, description = read_features(tmp_path / "features" / f"day{number % 2}" / f"{number}.safetensors")
        video = folder / "videos" / f"day{number % 2}" / f"{number}.mp4"
        expected = extract_features(video, encoder, feature_stride=3, progress=False)
        np.testing.assert_allclose(sample["features"], expected["features"], rtol=0, atol=1e-5)  # other threads
        assert description["encoder"] == "encoder"
    # A model that was trained on these names what it takes; and what is done is not done again.
    like = ConvTransformerFeatureExtractor(
        feature_size=16, fps=25, feature_stride=3, num_frames=4, encoder=str(folder / "encoder")
    )
    like.save_pretrained(tmp_path / "model")
    changed = (tmp_path / "features" / "day0" / "0.safetensors").stat().st_mtime_ns
    again = run("videos", tmp_path / "features", "--like", tmp_path / "model", cwd=folder)
    assert "0 extracted, 4 were there already, 1 failed" in again.stdout, again.stderr
    assert (tmp_path / "features" / "day0" / "0.safetensors").stat().st_mtime_ns == changed


@pytest.mark.slow
def test_what_another_run_has_is_waited_for(folder, tmp_path):
    output = tmp_path / "features"
    (output / ".locks").mkdir(parents=True)
    others = FileLock(output / ".locks" / "0.safetensors.lock")
    with others:  # as another run does, on this machine or on one that shares the folder
        command = [*COMMAND, "videos/day0", str(output), "--encoder", "encoder"]
        process = subprocess.Popen(
            command, cwd=folder, env=ENVIRONMENT, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )
        deadline = time.monotonic() + 120
        while not (output / "2.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
        assert process.poll() is None
        assert not (output / "0.safetensors").exists()
    # It ended without having done it: the system frees the lock of a process that is killed.
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "1 are in the hands of another run, such as videos/day0/0.mp4" in printed + errors
    assert "2 extracted, 0 were there already, 0 failed" in printed
    assert read_features(output / "0.safetensors")[0]["features"].shape == (14, 16)


def test_a_folder_of_sensor_files(tmp_path):
    pytest.importorskip("pyarrow", reason="tables of sensor values need pyarrow: pip install pyarrow")
    (tmp_path / "sessions").mkdir()
    for name in ("a", "b"):
        rows = "\n".join(f"{i / 50:g},{i},{-i}" for i in range(100))
        (tmp_path / "sessions" / f"{name}.csv").write_text(f"time,x,y\n{rows}\n")
    (tmp_path / "sessions" / "c.csv").write_text("time,x,y\n0,1,walk\n0.02,1,walk\n")
    command = ["sessions", "features", "--num_frames", "20", "--feature_stride", "10"]
    result = run(*command, cwd=tmp_path)
    assert "2 extracted, 0 were there already, 1 failed" in result.stdout, result.stderr
    assert "column 'y' holds 'walk'" in result.stderr
    assert stored_geometry(tmp_path / "features" / "a.safetensors")["fps"] == 50


def test_wrong_calls(folder, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("extract_features_example", COMMAND[1])
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "twice" / "a.mp4", frames=3)
    write_video(tmp_path / "twice" / "a.mkv", frames=3)
    for arguments, words in [
        (["nothing", "out"], "there is no folder nothing"),
        ([folder / "videos", "out"], "give --encoder for videos"),
        ([folder / "videos", "out", "--pooling", "cls"], "--pooling is of an encoder; give --encoder"),
        (
            [folder / "videos", "out", "--encoder", folder / "encoder", "--workers", "0"],
            "--workers must be at least 1",
        ),
        (["twice", "out", "--encoder", folder / "encoder"], "would both be out/a.safetensors"),
        ([folder / "encoder", "out", "--encoder", folder / "encoder"], "holds no recording; looked for .mp4"),
        (["twice", "out", "--like", folder / "encoder"], "lack feature_size"),
    ]:
        monkeypatch.setattr(sys, "argv", ["extract_features.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            example.main()
        assert stopped.value.code == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
