"""examples/extract_features.py as a user starts it: a folder of recordings, some of them bad, killed and started again."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from filelock import FileLock
from media import save_encoder, write_sound, write_video
from scripts import load_script
from transformers import pipeline

from modeling_convtransformer import ConvTransformerFeatureExtractor
from modeling_convtransformer.evaluation import evaluate_detections
from modeling_convtransformer.feature_extraction_convtransformer import stored_geometry
from modeling_convtransformer.features import extract_features, load_encoder, read_features
from modeling_convtransformer.segments import to_arrays

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
def test_a_folder_of_videos(folder, tmp_path, monkeypatch, capsys):
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
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit):
        load_example("extract_features", monkeypatch, "videos", tmp_path / "features", "--like", tmp_path / "model")
    assert "0 extracted, 4 were there already, 1 failed" in capsys.readouterr().out
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


@pytest.mark.slow
def test_workers_end_with_the_run_that_started_them(tmp_path):
    psutil = pytest.importorskip("psutil")
    (tmp_path / "sessions").mkdir()
    for number in range(2):
        np.save(tmp_path / "sessions" / f"{number}.npy", np.ones((40, 3), dtype=np.float32))
    settings = ["--num_frames", "10", "--feature_stride", "5", "--fps", "10", "--workers", "2"]
    output = tmp_path / "features"
    (output / ".locks").mkdir(parents=True)
    with FileLock(output / ".locks" / "0.safetensors.lock"):  # so that it waits
        process = subprocess.Popen([*COMMAND, "sessions", "features", *settings], cwd=tmp_path, env=ENVIRONMENT)
        deadline = time.monotonic() + 120
        while not (output / "1.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


def test_a_folder_of_sensor_files(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pyarrow", reason="tables of sensor values need pyarrow: pip install pyarrow")
    (tmp_path / "sessions").mkdir()
    for name in ("a", "b"):
        rows = "\n".join(f"{i / 50:g},{i},{-i}" for i in range(100))
        (tmp_path / "sessions" / f"{name}.csv").write_text(f"time,x,y\n{rows}\n")
    (tmp_path / "sessions" / "c.csv").write_text("time,x,y\n0,1,walk\n0.02,1,walk\n")
    np.savez(tmp_path / "sessions" / "d.npz", signal=np.zeros((100, 2)), fps=50)
    (tmp_path / "sessions" / "e.npz").write_bytes((tmp_path / "sessions" / "d.npz").read_bytes()[:500])
    monkeypatch.chdir(tmp_path)
    arguments = ["sessions", "features", "--num_frames", "20", "--feature_stride", "10"]
    with pytest.raises(SystemExit) as stopped:
        load_example("extract_features", monkeypatch, *arguments)
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert "3 extracted, 0 were there already, 2 failed" in printed.out
    assert "column 'y' holds 'walk'" in printed.err
    assert "sessions/e.npz: not readable as an array" in printed.err
    assert stored_geometry(tmp_path / "features" / "a.safetensors")["fps"] == 50


def test_wrong_calls(folder, tmp_path, monkeypatch, capsys):
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
        with pytest.raises(SystemExit) as stopped:
            load_example("extract_features", monkeypatch, *arguments)
        assert stopped.value.code == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


RECIPE = {
    "model": {"n_in": 16, "n_embd": 64, "arch": [1, 1, 4], "head_dim": 64, "fpn_dim": 64, "max_len": 256},
    "feature_extractor": {"feature_size": 16, "fps": 25, "feature_stride": 4, "num_frames": 4},
    "data": {"train_split": ["training"], "val_split": ["validation"], "max_seq_len": 256},
    "training": {"num_train_epochs": 20, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "seed": 0},
}


def write_match(path: Path, rng: np.random.Generator, frames: int = 300) -> dict:
    """A video in which something moves up and down, or left and right, or not at all, and when."""
    kinds, annotations, start = np.zeros(frames, dtype=int), [], int(rng.integers(20, 50))
    while start < frames - 80:
        end, kind = start + int(rng.integers(30, 70)), int(rng.integers(1, 3))
        kinds[start:end] = kind
        annotations.append({"label": ("wave", "jump")[kind - 1], "segment": [start / 25, end / 25]})
        start = end + int(rng.integers(30, 60))

    def draw(number: int) -> np.ndarray:
        picture = np.full((48, 64, 3), 90, np.uint8) + rng.integers(0, 20, (48, 64, 3), dtype=np.uint8)
        left, top = 20 + int(20 * np.sin(number / 3)), 15 + int(12 * np.sin(number / 2))
        if kinds[number] == 1:
            picture[10:40, left : left + 12] = 240
        elif kinds[number] == 2:
            picture[top : top + 12, 10:54] = 10
        return picture

    write_video(path, frames=frames, rate=25, draw=draw)
    return {"duration": frames / 25, "fps": 25, "annotations": annotations}


@pytest.mark.slow
def test_from_videos_to_segments(tmp_path, monkeypatch):
    """The user's way: videos and annotations, features, a trained model, and the pipeline on a video that it never saw."""
    pytest.importorskip("accelerate", reason='training needs pip install "modeling-convtransformer[train]"')
    rng = np.random.default_rng(0)
    names = [f"match{number}" for number in range(8)]
    database = {name: write_match(tmp_path / "videos" / f"{name}.mp4", rng) for name in names}
    for name in names:
        database[name]["subset"] = "validation" if name in names[-2:] else "training"
    save_encoder(tmp_path / "encoder")
    (tmp_path / "annotations.json").write_text(json.dumps({"database": database}))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))

    monkeypatch.chdir(tmp_path)
    load_example(
        "extract_features", monkeypatch, "videos", "features", "--encoder", "encoder", "--like", "recipe.yaml"
    )
    arguments = ["--annotations", "annotations.json", "--features", "features", "--output_dir", "out"]
    load_example("train", monkeypatch, "recipe.yaml", *arguments)

    localize = pipeline("temporal-action-localization", model="out")
    assert localize.feature_extractor.encoder["name"] == "encoder"
    assert "Features were made by `encoder`" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    label2id = localize.model.config.label2id
    found = {name: to_arrays(localize(f"videos/{name}.mp4"), label2id) for name in names[-2:]}
    truth = {
        name: {
            "segments": [one["segment"] for one in database[name]["annotations"]],
            "labels": [label2id[one["label"]] for one in database[name]["annotations"]],
        }
        for name in found
    }
    assert evaluate_detections(found, truth, tiou_thresholds=0.5).average_map > 0.9


def load_example(name: str, monkeypatch, *arguments):
    """The command, in this process."""
    example = load_script(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    example.main()
