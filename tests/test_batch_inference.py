"""examples/batch_inference.py: every recording once, whatever is killed, and failures in their own rows."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from scripts import load_script
from transformers import pipeline

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
)

pa = pytest.importorskip("pyarrow", reason="batch inference needs its extra: pip install -e '.[batch]'")
pq = pytest.importorskip("pyarrow.parquet")

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "batch_inference.py"
CHANNELS, WINDOW, STRIDE, FPS = 3, 4, 2, 20.0
WIDTH = CHANNELS * WINDOW
# Small batches and parts: many of both.
SIZES = ["--batch_steps", "600", "--part_steps", "800", "--threads", "1"]

batch_inference = load_script("batch_inference")


def save_model(folder: Path, **fields) -> Path:
    torch.manual_seed(0)
    small = {"n_embd": 32, "n_head": 2, "arch": (1, 1, 2), "head_dim": 32, "mha_win_size": 9}
    config = ConvTransformerConfig(n_in=WIDTH, num_labels=4, **{**small, **fields})
    model = ConvTransformerForTemporalActionLocalization(config)
    with torch.no_grad():  # scores that differ, some of them high
        for name, value in model.named_parameters():
            if name.startswith("class_head"):
                value.add_(0.3 * torch.randn_like(value))
    model.save_pretrained(folder)
    extractor = ConvTransformerFeatureExtractor(feature_size=WIDTH, fps=FPS, feature_stride=STRIDE, num_frames=WINDOW)
    extractor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """120 recordings of log-normal lengths, in all kinds of files, and four that fail."""
    folder, rng = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    (folder / "more").mkdir()
    for index in range(120):
        array = rng.normal(size=(int(rng.lognormal(4, 1)) + 1, WIDTH)).astype(np.float32)
        if index % 10 == 1:
            np.savez_compressed(folder / f"zipped{index}.npz", feats=array, other=np.zeros(3))
        elif index % 10 == 2:
            save_file({"features": array}, folder / f"safe{index}.safetensors")
        else:
            np.save(folder / "more" / f"recording{index}.npy", array)
    broken = rng.normal(size=(50, WIDTH)).astype(np.float32)
    broken[7, 3] = np.nan
    np.save(folder / "holes.npy", broken)
    np.save(folder / "wide.npy", np.zeros((50, WIDTH + 1), dtype=np.float32))
    np.save(folder / "empty.npy", np.zeros((0, WIDTH), dtype=np.float32))
    (folder / "words.npy").write_text("no features")
    np.save(folder / "objects.npy", np.array([{"run": "code"}]), allow_pickle=True)
    return folder


BAD = {
    "holes": "first at time step 7, channel 3",
    "wide": f"expected (time, {WIDTH})",
    "empty": "no time steps",
    "words": "no readable",
    "objects": "Objects are refused",
}


def run_here(*arguments) -> int:
    _, options = batch_inference.parse_arguments([*map(str, arguments)])
    return batch_inference.run(options)


def take(features: Path, folder: Path, count: int) -> Path:
    """A folder with the first `count` recordings of an evenly named kind, and those that fail."""
    (folder / "more").mkdir(parents=True)
    for path in [*sorted((features / "more").glob("*.npy"))[:count], *features.glob("*.npy")]:
        os.link(path, folder / path.relative_to(features))
    return folder


def start(*arguments) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read(output: Path) -> dict[str, dict]:
    """All rows by id; each id must be there once."""
    rows = pq.read_table(output).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def assert_same(found: dict[str, dict], expected: dict[str, dict]):
    """Up to rounding: sums in another order, as in a batch of another size, differ in the last bits."""
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        assert found[name]["error"] == row["error"]
        assert_same_segments(found[name]["segments"] or [], row["segments"] or [])


def assert_same_segments(found: list[dict], expected: list[dict]):
    assert [one["label"] for one in found] == [one["label"] for one in expected]
    for key, tolerance in (("score", 1e-5), ("start", 1e-4), ("end", 1e-4)):
        np.testing.assert_allclose([one[key] for one in found], [one[key] for one in expected], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def reference(model, features, tmp_path_factory):
    output = tmp_path_factory.mktemp("reference")
    assert run_here(model, features, output, *SIZES) == 0
    return read(output)


def test_each_recording_is_what_the_pipeline_says_of_it_alone(model, features, reference):
    assert len(reference) == 125
    localize = pipeline("temporal-action-localization", model=str(model))
    files = {p.relative_to(features).with_suffix("").as_posix(): p for p in features.rglob("*") if p.is_file()}
    for name in sorted(reference.keys() - BAD.keys())[::5]:
        expected = localize(files[name])
        assert expected
        assert_same_segments(reference[name]["segments"], expected)
        steps = batch_inference.count_steps(files[name])
        assert reference[name]["steps"] == steps
        assert reference[name]["seconds"] == pytest.approx(((steps - 1) * STRIDE + WINDOW) / FPS)


def test_recordings_that_fail_are_rows_with_their_error(reference):
    assert {name for name, row in reference.items() if row["error"] is not None} == BAD.keys()
    for name, words in BAD.items():
        assert reference[name]["segments"] is None
        assert words in reference[name]["error"]


def test_a_failing_batch_is_done_one_by_one(model, features, tmp_path, monkeypatch):
    features = take(features, tmp_path / "in", 30)
    forward = ConvTransformerForTemporalActionLocalization.forward

    def fail(self, input_features, **kwargs):
        if len(input_features) > 1 or input_features.shape[1] > 200:
            raise torch.OutOfMemoryError("too much at once")
        return forward(self, input_features, **kwargs)

    monkeypatch.setattr(ConvTransformerForTemporalActionLocalization, "forward", fail)
    assert run_here(model, features, tmp_path / "out", *SIZES, "--strict") == 1
    rows = read(tmp_path / "out").values()
    for row in rows:
        assert (row["error"] is None) == (0 < (row["steps"] or 0) <= 200 and row["id"] not in BAD)
    assert any("OutOfMemoryError: too much at once" in (row["error"] or "") for row in rows)

    monkeypatch.undo()
    assert run_here(model, features, tmp_path / "out", *SIZES, "--retry_failed") == 0
    assert {row["id"] for row in read(tmp_path / "out").values() if row["error"]} == BAD.keys() & {
        path.stem for path in features.iterdir()
    }


def test_batches_hold_like_lengths_within_their_budget():
    recordings = [{"id": str(i), "steps": steps} for i, steps in enumerate([5, 300, 7, 90, 100, 2000, 6, 95])]
    batches = batch_inference.make_batches(recordings, 300, lambda steps: steps)
    assert [[one["steps"] for one in batch] for batch in batches] == [[5, 6, 7], [90, 95, 100], [300], [2000]]
    of_equal_width = batch_inference.make_batches(recordings, 300, lambda steps: -(-steps // 50) * 50, mixed=False)
    assert [[one["steps"] for one in b] for b in of_equal_width] == [[5, 6, 7], [90, 95, 100], [300], [2000]]
    assert len(batch_inference.make_batches(recordings, 300, lambda steps: steps, mixed=False)) == len(recordings)


def test_models_whose_padding_leaks_batch_equal_lengths_only(features, tmp_path):
    """v1's settings: a recording in a batch of others is what it is alone."""
    folder = save_model(tmp_path / "v1", mask_conv_inputs=False, use_rope=False)
    features = take(features, tmp_path / "in", 40)
    assert run_here(folder, features, tmp_path / "out", *SIZES) == 0
    localize, rows = pipeline("temporal-action-localization", model=str(folder)), read(tmp_path / "out")
    for name in ("more/recording0", "more/recording10", "more/recording100"):
        assert_same_segments(rows[name]["segments"], localize(features / f"{name}.npy"))


@pytest.mark.slow
def test_a_killed_process_goes_on_with_the_same_command(model, features, reference, tmp_path):
    output = tmp_path / "out"
    process = start(model, features, output, *SIZES)
    wait_for(lambda: len(list(output.glob("part-*.parquet"))) >= 3, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = {path: path.stat().st_mtime_ns for path in output.glob("part-*.parquet")}
    planned = {row["part"] for row in pq.read_table(output / "_job" / "plan.parquet").to_pylist()}
    assert 3 <= len(done) < len(planned)
    (output / ".part-half.parquet.host.1").write_bytes(b"PAR1")  # what a worker leaves that is killed while it writes

    assert run_here(model, features, output, *SIZES) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done  # nothing is done twice
    assert {path.name for path in output.iterdir()} == {*planned, "_job"}
    assert_same(read(output), reference)


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"it ended before it could be killed:\n{process.communicate()[0]}")
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.002)


@pytest.mark.slow
def test_ray_with_a_killed_worker(model, features, reference, tmp_path):
    """Two actors, one of which dies in the middle of a part; the same rows as without Ray, each once. (Two that die:
    benchmarks/batch_inference.py. Starting one takes longer than the whole job.)"""
    pytest.importorskip("ray", reason="the Ray engine needs its extra: pip install -e '.[batch]'")
    output, killed = tmp_path / "out", set()
    process = start(model, features, output, *SIZES, "--engine", "ray", "--num_actors", 2)

    def kill_one() -> bool:
        """A worker that is at work on a part right now, as its own log says."""
        for log in (output / "_job" / "attempts").glob("*"):
            with contextlib.suppress(FileNotFoundError, IndexError, ProcessLookupError):
                pid = int(log.read_text().splitlines()[-1].split()[-1])
                if pid not in killed and pid != process.pid:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
                    return True
        return False

    try:
        wait_for(lambda: len(list(output.glob("part-*.parquet"))) >= 2 and kill_one(), process)
        text = process.communicate(timeout=180)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, text
    assert len(killed) == 1
    assert "each of 125 recordings" in text
    assert "5 failed" in text
    assert_same(read(output), reference)


def test_a_recording_that_kills_its_process_is_given_up(model, features, tmp_path):
    """Out of memory again and again: after some attempts its part runs one by one, and the culprit is named."""
    output, features = tmp_path / "out", take(features, tmp_path / "in", 30)
    assert run_here(model, features, output, *SIZES) == 0
    part = max(output.glob("part-*.parquet"), key=lambda path: pq.read_metadata(path).num_rows)
    first, *others = sorted(row["id"] for row in pq.read_table(part).to_pylist() if row["error"] is None)
    part.unlink()
    log = output / "_job" / "attempts" / part.name
    lines = ["attempt host 1", f"begin {json.dumps(others[0])}", f"end {json.dumps(others[0])}"]
    log.write_text("\n".join([*2 * lines, *2 * [f"begin {json.dumps(first)}"]]) + "\n")
    assert run_here(model, features, output, *SIZES) == 0
    rows = read(output)
    assert len(rows) == 35
    assert "The process died 2 times" in rows[first]["error"]
    assert all(rows[name]["segments"] for name in others)
    assert not log.exists()


def test_parquet_in_gives_what_files_give(model, features, reference, tmp_path):
    """Values in the table, nested and flat, in several row groups; paths in a column; a row of its own rate."""
    paths = sorted((features / "more").glob("*.npy"))[:20]
    arrays = [np.load(path, allow_pickle=False) for path in paths]
    ids = [f"more/{path.stem}" for path in paths]
    columns = {
        "nested": pa.array([array.tolist() for array in arrays]),
        "flat": pa.array([array.reshape(-1) for array in arrays]),
        "fixed": pa.array([list(array) for array in arrays], pa.list_(pa.list_(pa.float32(), WIDTH))),
    }
    for name, column in columns.items():
        table = pa.table({"id": ids, "features": column, "fps": [2 * FPS, *[None] * 19]})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=7)
        assert run_here(model, tmp_path / f"{name}.parquet", tmp_path / name, *SIZES) == 0
        rows = read(tmp_path / name)
        assert [rows[one]["steps"] for one in ids] == [len(array) for array in arrays]
        assert rows[ids[0]]["seconds"] == pytest.approx(reference[ids[0]]["seconds"] / 2)
        plan = pq.read_table(tmp_path / name / "_job" / "plan.parquet").to_pylist()
        assert {row["id"]: row["steps"] for row in plan} == {one: rows[one]["steps"] for one in ids}
        for one in ids[1:]:
            assert_same_segments(rows[one]["segments"], reference[one]["segments"])

    table = pa.table({"video_id": ids, "path": [*map(str, paths[:19]), "missing.npy"]})
    pq.write_table(table, tmp_path / "paths.parquet")
    arguments = [model, tmp_path / "paths.parquet", tmp_path / "paths", *SIZES, "--id_column", "video_id"]
    assert run_here(*arguments) == 0
    rows = read(tmp_path / "paths")
    assert "there is no file" in rows[ids[19]]["error"]
    for one in ids[:19]:
        assert_same_segments(rows[one]["segments"], reference[one]["segments"])


def test_a_table_that_changes_under_a_job_is_noticed(model, tmp_path):
    """Rows are found by their number: those of another table would be given to the wrong recordings."""
    rng, source, output = np.random.default_rng(0), tmp_path / "table.parquet", tmp_path / "out"
    values = [rng.normal(size=30 * WIDTH).astype(np.float32) for _ in range(4)]
    pq.write_table(pa.table({"id": list("abcd"), "features": values}), source, row_group_size=2)
    assert run_here(model, source, output, "--part_steps", 60) == 0
    next(path for path in output.glob("part-*") if "a" in pq.read_table(path)["id"].to_pylist()).unlink()
    pq.write_table(pa.table({"id": list("bacd"), "features": values}), source, row_group_size=2)
    assert run_here(model, source, output, "--part_steps", 60) == 0
    assert {name for name, row in read(output).items() if "has changed" in (row["error"] or "")} == {"a", "b"}


def test_signals_and_rows_that_fail_in_parquet(model, tmp_path):
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(101, CHANNELS)).astype(np.float32)
    holes = [[1.0] * CHANNELS] * 20 + [[None] * CHANNELS]
    ragged = [[1.0, 2.0], [3.0]]
    table = pa.table({"id": ["good", "holes", "ragged", "null"], "signal": [signal.tolist(), holes, ragged, None]})
    pq.write_table(table, tmp_path / "signals.parquet")
    assert run_here(model, tmp_path / "signals.parquet", tmp_path / "out", "--kind", "signal") == 0
    rows = read(tmp_path / "out")
    expected = pipeline("temporal-action-localization", model=str(model))({"signal": signal})
    assert_same_segments(rows["good"]["segments"], expected)
    assert (rows["good"]["steps"], rows["good"]["seconds"]) == ((101 - WINDOW) // STRIDE + 1, 101 / FPS)
    for name, words in {"holes": "NaN or infinite", "ragged": "different widths", "null": "is null"}.items():
        assert words in rows[name]["error"]


def test_recordings_that_come_later_are_added(model, features, reference, tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    (source / "more").mkdir(parents=True)
    files = sorted((features / "more").glob("*.npy"))[:20]
    for path in files[:15]:
        os.link(path, source / "more" / path.name)
    assert run_here(model, source, output, *SIZES) == 0
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}
    for path in files[15:]:
        os.link(path, source / "more" / path.name)
    assert run_here(model, source, output, *SIZES) == 0
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}.items()
    assert_same(read(output), {f"more/{path.stem}": reference[f"more/{path.stem}"] for path in files})


def test_windows_and_settings_reach_the_pipeline(model, features, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    np.save(source / "long.npy", np.random.default_rng(0).normal(size=(900, WIDTH)).astype(np.float32))
    settings = ["--window", 400, "--top_k", 7, "--settings", '{"nms_method": "hard"}']
    assert run_here(model, source, tmp_path / "out", *SIZES, *settings) == 0
    localize = pipeline("temporal-action-localization", model=str(model))
    expected = localize(source / "long.npy", window=400, top_k=7, nms_method="hard")
    assert len(expected) == 7
    assert_same_segments(read(tmp_path / "out")["long"]["segments"], expected)


def test_other_jobs_in_the_same_folder_are_refused(model, features, tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    os.link(features / "more" / "recording0.npy", source / "one.npy")
    assert run_here(model, source, output) == 0
    other = save_model(tmp_path / "other", n_embd=16)
    with pytest.raises(ValueError, match="another job: fingerprint was"):
        run_here(other, source, output)
    with pytest.raises(ValueError, match=r"settings was \{\}, now \{'top_k': 3\}"):
        run_here(model, source, output, "--top_k", 3)
    with pytest.raises(ValueError, match=r"input was .*in', now .*more'"):
        run_here(model, features / "more", output)
    with (output / "_job" / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is writing here"):
            run_here(model, source, output)
    with pytest.raises(ValueError, match="no job of this script"):
        run_here(model, features, source)
    assert [path.name for path in source.iterdir()] == ["one.npy"]


def test_what_is_wrong_with_the_output_is_said(model, features, tmp_path, capsys):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    os.link(features / "more" / "recording0.npy", source / "one.npy")
    assert run_here(model, source, output) == 0
    (part,) = output.glob("part-*.parquet")
    (output / "part-copy.parquet").write_bytes(part.read_bytes())
    assert run_here(model, source, output) == 1
    error = capsys.readouterr().err
    assert "part-copy.parquet is no part of this job" in error
    assert "1 recordings are there twice, such as 'one'" in error
    (output / "part-copy.parquet").unlink()
    part.write_bytes(part.read_bytes()[:100])  # a part that was cut off is done again
    assert run_here(model, source, output) == 0


def test_bad_input_is_named(model, features, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"nothing holds 0 \.parquet files and 0 of"):
        run_here(model, tmp_path / "nothing", tmp_path / "out")
    source = take(features, tmp_path / "in", 1)  # nothing was done there: another INPUT is welcome
    assert run_here(model, source, tmp_path / "out") == 0
    twins = tmp_path / "twins"
    twins.mkdir()
    os.link(features / "more" / "recording0.npy", twins / "a.npy")
    np.savez(twins / "a.npz", np.zeros((3, WIDTH)))
    with pytest.raises(ValueError, match="1 ids stand for several recordings, such as 'a'"):
        run_here(model, twins, tmp_path / "out2")
    pq.write_table(pa.table({"name": ["a"], "values": [[1.0]]}), tmp_path / "columns.parquet")
    with pytest.raises(ValueError, match=r"columns name, values; expected 'id' .* either 'features' .* or 'path'"):
        run_here(model, tmp_path / "columns.parquet", tmp_path / "out3")
    pq.write_table(pa.table({"id": ["a", None], "path": ["a", "b"]}), tmp_path / "null.parquet")
    with pytest.raises(ValueError, match="row 1 of row group 0 has no id"):
        run_here(model, tmp_path / "null.parquet", tmp_path / "out4")
    (tmp_path / "broken.parquet").write_text("PAR1")
    with pytest.raises(ValueError, match="no readable parquet"):
        run_here(model, tmp_path / "broken.parquet", tmp_path / "out5")
    with pytest.raises(ValueError, match="Unknown arguments: nms_metod"):
        run_here(model, features, tmp_path / "out6", "--settings", '{"nms_metod": "hard"}')
    with pytest.raises(ValueError, match="nms_method is 'hrad'"):
        run_here(model, features, tmp_path / "out7", "--settings", '{"nms_method": "hrad"}')
    for arguments, words in {
        (model, tmp_path / "no", tmp_path / "o"): "there is no",
        (model, features, features / "out"): "lies in INPUT",
        (model, features, "s3://bucket/found"): "give a mounted one",
        (model, features, tmp_path / "o", "--batch_steps", 0): "expected a positive number",
        (model, features, tmp_path / "o", "--settings", "[1]"): "expected a JSON object",
    }.items():
        with pytest.raises(SystemExit) as exit_:
            batch_inference.parse_arguments([*map(str, arguments)])
        assert exit_.value.code == 2
        assert words in capsys.readouterr().err


def test_ray_that_is_not_installed_is_named(model, features, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"--engine ray needs Ray: pip install .*\[batch\]"):
        run_here(model, features, tmp_path / "out", "--engine", "ray")


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit) as exit_:
        batch_inference.parse_arguments(["--help"])
    assert exit_.value.code == 0
    assert "python examples/batch_inference.py" in capsys.readouterr().out


def test_a_quantized_model_has_a_fingerprint_of_its_own(model, tmp_path):
    pytest.importorskip("torchao", reason="quantization needs torchao")
    from modeling_convtransformer.quantization import quantize

    found = [batch_inference.fingerprint(pipeline("temporal-action-localization", model=str(model)))]
    for method in ("int8", "int4"):
        detector = quantize(ConvTransformerForTemporalActionLocalization.from_pretrained(model), method)
        detector.save_pretrained(tmp_path / method)
        ConvTransformerFeatureExtractor.from_pretrained(model).save_pretrained(tmp_path / method)
        found.append(
            batch_inference.fingerprint(pipeline("temporal-action-localization", model=str(tmp_path / method)))
        )
        again = batch_inference.fingerprint(pipeline("temporal-action-localization", model=str(tmp_path / method)))
        assert again == found[-1]
    assert len(set(found)) == 3
