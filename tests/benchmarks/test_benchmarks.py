"""Every benchmark runs, on tiny shapes, lists what it was asked for, and its errors are small. Times are never judged.

The environment variable ACTIONFORMER, the path of a clone of v1's official code, adds the comparisons with it.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cases
import harness
import latency
import longest_input
import official
import precision
import quantization
import training_step

COMMANDS = {
    name: importlib.import_module(name).main
    for name in ("latency", "training_step", "scaling", "nms", "map", "queries", "retrieval", "features")
}

V1 = os.environ.get("ACTIONFORMER")
with_v1 = pytest.mark.skipif(not V1, reason="ACTIONFORMER does not say where a clone of v1 is")

TINY = ["--n-in", "16", "--n-embd", "32", "--threads", "1", "--repeats", "1", "--no-limits"]
# Two streams of rounding errors in float32, relative to the largest value.
CLOSE = 1e-5


def run(script, *arguments, cwd):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def read(path):
    content = json.loads(path.read_text())
    assert {"machine", "arguments", "rows"} <= content.keys()
    assert content["machine"]["torch"] == torch.__version__
    return content["rows"]


def rows_of(table):
    """Cells of a printed Markdown table, as dictionaries by its head."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


# --- Commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["backbone", "detector"])
def test_latency_compares_every_variant_with_eager(model, tmp_path, capsys):
    variants = ["balanced", "balanced,n_kv_head=1", "v1_compatible", "thumos14"]
    arguments = ["--model", model, "--batch", "2", "--length", "50", "--no-memory", "--json", str(tmp_path / "a.json")]
    latency.main([*TINY, *arguments, "--variants", *variants, "--backends", "eager", "sdpa"])
    rows = read(tmp_path / "a.json")
    assert [(row["variant"], row["backend"]) for row in rows] == [(v, b) for v in variants for b in ("eager", "sdpa")]
    for row in rows:
        assert row["relative_error"] < CLOSE, row["name"]
        assert row["against"] == "eager"
        assert row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert row["gflop"] > 0
    assert rows[0]["ratio"] == 1
    printed = rows_of(capsys.readouterr().out)
    assert [row["variant"] for row in printed] == [row["variant"] for row in rows]
    assert "time / first" in printed[0]


@pytest.mark.slow
def test_latency_measures_memory_in_fresh_processes_and_limits(tmp_path, capsys):
    arguments = ["--variants", "balanced", "--length", "600", "--batch", "1", "--backends", "sdpa", "eager"]
    latency.main([*TINY[:-1], *arguments, "--dtype", "float32", "--json", str(tmp_path / "a.json")])
    assert "float32 matrix products" in capsys.readouterr().out
    sdpa, eager = read(tmp_path / "a.json")
    assert sdpa["matmul_share"] > 0
    if Path("/proc/self/clear_refs").exists():
        # Scores of 600 by 600 steps for each of 4 heads are 5.5 MB in float32.
        assert eager["peak_mb"] > sdpa["peak_mb"] > 0
        assert eager["peak_mb"] > 5.5
    else:
        assert sdpa["peak_mb"] == harness.NOT_AVAILABLE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json"]  # no temporary file is left


def test_latency_lists_the_parts_of_the_ablation(tmp_path, capsys):
    latency.main([*TINY, "--ablation", "--length", "40", "--no-memory", "--json", str(tmp_path / "a.json")])
    rows = read(tmp_path / "a.json")
    assert {row["variant"]: row["backend"] for row in rows} == {
        "v1 settings": "eager",
        "all v2 features on": "sdpa",
        "flash only": "sdpa",
        "RMSNorm only": "eager",
        "SwiGLU only": "eager",
    }
    assert all(row["relative_error"] < CLOSE for row in rows)
    settings = json.loads((tmp_path / "a.json").read_text())["settings"]
    assert settings["RMSNorm only"]["use_rms_norm"]
    assert not settings["RMSNorm only"]["use_swiglu"]
    balanced = cases.find_config("balanced", {"n_in": 16, "n_embd": 32}).to_dict()
    same = {field: value for field, value in settings["all v2 features on"].items() if field in balanced}
    assert same == json.loads(json.dumps(balanced))


def test_latency_reports_lower_precision_and_what_is_not_available(tmp_path, capsys):
    arguments = ["--length", "40", "--no-memory", "--json", str(tmp_path / "a.json"), "--variants", "balanced"]
    latency.main([*TINY, *arguments, "--dtype", "bfloat16", "autocast", "--backends", "sdpa", "no_such_backend"])
    rows = read(tmp_path / "a.json")
    by_name = {(row["dtype"], row["backend"]): row for row in rows}
    for dtype in ("bfloat16", "autocast"):
        assert 1e-4 < by_name[dtype, "sdpa"]["relative_error"] < 0.1
        assert by_name[dtype, "no_such_backend"]["problem"].startswith("not available: ")
    printed = rows_of(capsys.readouterr().out)
    assert [bool(row["remark"]) for row in printed] == [False, True, False, True]


@pytest.mark.parametrize(("longest", "limit"), [(50_000, 1000), (3000, 1000), (4096, 10_000)])
def test_search_ends_within_the_tolerance(longest, limit):
    """Memory is 100 MB and what grows with the square of the length, in all as much as the limit at `longest`."""

    def measure(length):
        return 100 + (limit - 100) * (length / longest) ** 2

    done, found = longest_input.search(measure, limit, 4096, 2**20, 0.05)
    assert longest / 1.05 - longest_input.STEP < found <= longest
    assert any(measure(length) > limit for length in done if length <= 1.05 * found + longest_input.STEP)
    assert len(done) < 12


def test_search_does_not_go_beyond_the_longest_that_is_asked_for():
    assert longest_input.search(lambda length: 1.0, 10, 4096, 10_000, 0.05)[1] == 9984
    assert longest_input.search(lambda length: math.inf, 10, 4096, 10_000, 0.05)[1] == 0


@pytest.mark.slow
def test_longest_input(tmp_path, capsys):
    arguments = ["--variants", "balanced", "--windows", "0", "19", "--start", "512", "--max-length", "512"]
    longest_input.main([*TINY[:-1], *arguments, "--json", str(tmp_path / "a.json")])
    rows = read(tmp_path / "a.json")
    assert [row["window"] for row in rows] == ["global", "19"]
    assert [row["longest"] for row in rows_of(capsys.readouterr().out)] == [">= 512", ">= 512"]
    assert all(row["length"] == 512 and row["is_bound"] for row in rows)
    assert all(100 < row["total_mb"] < 4096 for row in rows)


def test_precision_needs_data_and_a_device_for_float16(tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path / "missing")], "is no folder"),
        ([str(tmp_path), "--precisions", "float16", "--device", "cpu"], "float16 trains on a GPU only"),
    ):
        with pytest.raises(SystemExit) as end:
            precision.main(arguments)
        assert end.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_quantization_saves_loads_and_times_every_row(tmp_path, capsys):
    pytest.importorskip("torchao", reason="quantization needs torchao")
    (tmp_path / "tiny.yaml").write_text("model: {n_in: 6, n_embd: 128, n_head: 2, arch: [1, 1, 1], num_labels: 3}\n")
    rows = ["int8", "int8_dynamic", "float8", "int4", "ternary", "bfloat16"]
    arguments = ["no_data", "--tasks", "--timed", str(tmp_path / "tiny.yaml"), "--length", "64", "--repeats", "1"]
    quantization.main([*arguments, "--threads", "1", "--json", str(tmp_path / "a.json"), "--rows", *rows])
    shares = {row["method"]: row["THUMOS14 share"] for row in read(tmp_path / "a.json")}
    assert [*shares] == ["float32", *rows]
    assert shares["int4"] < shares["int8"] < shares["bfloat16"] < shares["float32"] == 1
    assert all("ms" in row for row in read(tmp_path / "a.json"))
    assert len(rows_of(capsys.readouterr().out)) == 7


@pytest.mark.slow
def test_latency_starts_again_under_another_allocator(tmp_path):
    arguments = [*TINY, "--variants", "balanced", "--length", 40, "--no-memory", "--allocator", "both"]
    result = run("latency.py", *arguments, "--json", "a.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    names = ["a_default.json", "a_tuned.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    default, tuned = (json.loads((tmp_path / name).read_text())["machine"]["allocator"] for name in names)
    assert tuned == {**default, **harness.TUNED_ALLOCATOR}
    assert result.stdout.count("| variant |") == 2


@pytest.mark.slow
def test_latency_compiles_and_draws(tmp_path):
    pytest.importorskip("matplotlib", reason="comes with the demo's extra")
    arguments = ["--set", "arch=[1,1,1]", "--variants", "v1_compatible", "--length", "16", "--no-memory"]
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    latency.main([*TINY, *arguments, "--compile", "off", "default", *files])
    off, compiled = read(tmp_path / "a.json")
    assert "compile_s" not in off
    assert compiled["compile_s"] > 0
    assert compiled["relative_error"] < CLOSE
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_training_step_compares_loss_and_gradient(tmp_path, capsys):
    arguments = ["--length", "96", "--no-memory", "--json", str(tmp_path / "a.json"), "--backends", "eager", "sdpa"]
    training_step.main([*TINY, *arguments, "--variants", "thumos14", "balanced"])
    rows = read(tmp_path / "a.json")
    assert [(row["variant"], row["backend"]) for row in rows] == [
        (variant, backend) for variant in ("thumos14", "balanced") for backend in ("eager", "sdpa")
    ]
    for row in rows:
        assert row["loss"] > 0
        assert row["loss_error"] < CLOSE
        assert row["gradient_error"] < CLOSE
        assert row["median_ms"] > 0


@pytest.mark.slow
def test_scaling_measures_each_length_by_itself(tmp_path):
    arguments = ["--lengths", "64", "640", "--windows", "0", "9", "--global-max-length", "100"]
    arguments += ["--check-length", "320", "--set", "arch=[2,2,2]"]
    COMMANDS["scaling"]([*TINY, *arguments, "--json", str(tmp_path / "a.json")])
    rows = read(tmp_path / "a.json")
    assert [(row["window"], row["length"]) for row in rows] == [("global", 64), (9, 64), (9, 640)]
    for row in rows:
        assert row["relative_error"] < CLOSE, row
    assert rows[2]["growth"] == pytest.approx(rows[2]["median_ms"] / rows[1]["median_ms"])
    if Path("/proc/self/clear_refs").exists():
        assert all(row["total_mb"] > row["peak_mb"] > 0 for row in rows[1:])


def test_nms_runs(tmp_path, capsys):
    COMMANDS["nms"](["--repeats", "1", "--json", str(tmp_path / "a.json")])
    rows = read(tmp_path / "a.json")
    assert len(rows) == 7
    assert {row["kept"] for row in rows if "class-agnostic" in row["name"]} == {200}
    assert [row["what"] for row in rows_of(capsys.readouterr().out)] == [row["name"] for row in rows]


def test_queries_are_compared_with_one(tmp_path, capsys):
    arguments = ["--length", "40", "--queries", "2", "--windows", "-1", "9", "--repeats", "1"]
    COMMANDS["queries"]([*arguments, "--decoder-dim", "8", "16", "--json", str(tmp_path / "a.json")])
    rows = read(tmp_path / "a.json")
    assert [(row["attention"], row["decoder_dim"], row["queries"]) for row in rows] == [
        (attention, width, count) for attention in ("global", "window 9") for width in (8, 16) for count in (1, 2)
    ]
    for row in rows:
        assert row["ratio"] == 1 if row["queries"] == 1 else row["ratio"] > 0
    assert len(rows_of(capsys.readouterr().out)) == len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--queries", "0"], "--queries [0] and --length 2304 must be 1 or more"),
        (["--decoder-dim", "7"], "decoder_dim is 7; expected a multiple of 8"),
    ],
)
def test_queries_that_cannot_be_measured(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        COMMANDS["queries"](arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_search_is_timed_with_every_backend_that_is_there(tmp_path, capsys):
    COMMANDS["retrieval"](["--recordings", "3", "6", "--repeats", "1", "--json", str(tmp_path / "a.json")])
    rows = read(tmp_path / "a.json")
    backends = ["torch", "faiss"] if importlib.util.find_spec("faiss") else ["torch"]
    assert [(row["vectors"], row["dtype"], row["backend"]) for row in rows] == [
        (vectors, dtype, one) for vectors in (300, 600) for dtype in ("float32", "int8") for one in backends
    ]
    assert {row["dtype"]: row["megabytes"] for row in rows if row["vectors"] == 600} == {
        "float32": 0.1536,
        "int8": 0.0384,
    }
    assert len(rows_of(capsys.readouterr().out)) == len(rows)


def test_map_runs(tmp_path, capsys):
    arguments = ["--repeats", "1", "--videos", "5", "--predictions", "20", "--json", str(tmp_path / "a.json")]
    COMMANDS["map"](arguments)
    (row,) = read(tmp_path / "a.json")
    assert row["predictions"] == 100
    assert 0 < row["average_map"] < 1


def test_features_of_a_video_are_timed(tmp_path, capsys):
    pytest.importorskip("av", reason='needs PyAV: pip install -e ".[video]"')
    arguments = ["--minutes", "0.05", "--width", "160", "--threads", "1", "--repeats", "1"]
    COMMANDS["features"]([*arguments, "--json", str(tmp_path / "a.json")])
    (row,) = read(tmp_path / "a.json")
    assert row["features"] == 4  # windows of 16 of 75 frames
    assert row["peak_mb"] > 100
    printed = capsys.readouterr().out
    assert len(rows_of(printed)) == 1
    assert "pyav" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "1", "0"], "--minutes are above 0"),
        (["--width", "90"], "--width is 90; expected a multiple of 32"),
    ],
)
def test_features_that_cannot_be_timed(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        COMMANDS["features"](arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (
            "latency",
            ["--v1", "nowhere"],
            "nowhere has no libs/modeling/meta_archs.py; expected a clone of ActionFormer",
        ),
        ("latency", ["--variants", "no_such"], "There is no configuration no_such"),
        ("latency", ["--set", "n_embed=3"], "n_embed=3: expected FIELD=VALUE"),
        ("latency", ["--set", "n_head=3"], "n_embd 32 is not divisible by n_head 3"),
        ("latency", ["--length", "0"], "--length is 0; expected at least 1"),
        ("latency", ["--repeats", "0"], "--repeats is 0; expected at least 1"),
        ("latency", ["--device", "cuda:77"], "--device cuda:77 is not there"),
        ("latency", ["--backends", "no_such_backend", "--length", "8"], "none of the rows could run"),
        ("scaling", ["--lengths", "99999"], "nothing to run"),
    ],
)
def test_bad_input_ends_in_one_line(script, arguments, message, capsys):
    if script == "scaling":
        arguments = [*arguments, "--windows", "0"]
    with pytest.raises(SystemExit) as stopped:
        COMMANDS[script]([*TINY, *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        COMMANDS[name](["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "python benchmarks/" in printed
    assert "--json" in printed


def test_the_script_for_cards_is_valid_bash():
    assert subprocess.run(["bash", "-n", BENCHMARKS / "gpu.sh"], check=False).returncode == 0


# --- What they share ---------------------------------------------------------------------------------------------------


def make_case(length=48, **fields):
    config = cases.find_config("balanced", {"n_in": 16, "n_embd": 32, "arch": [2, 2, 2], **fields})
    return cases.Case("balanced", config, length, threads=1)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("length", "window"), [(1, -1), (7, -1), (7, 3), (7, 5), (3, 9), (40, 19)])
def test_count_pairs(length, window, is_causal):
    reach = window // 2 if window > 1 else length
    pairs = sum(
        abs(i - j) <= reach and (j <= i or not is_causal) for i in range(length) for j in range(length)
    )  # fmt: skip
    assert cases.count_pairs(length, window, is_causal) == pairs


def test_bytes_by_hand():
    x, y = torch.ones(10, 4), torch.ones(4)
    with cases.ByteCounter() as counter:
        z = x.transpose(0, 1).contiguous() + 1.0  # a view, a copy (read and write 160 bytes) and a sum (the same)
        z.add_(y.expand(10, 4).t())  # reads 160 and the 16 of y, writes 160
    assert counter.total == 4 * 160 + 160 + 16 + 160


def test_count_flops_is_what_eager_attention_computes():
    case = dataclasses.replace(make_case(), model="detector", batch=2)
    runner = cases.Runner(case)
    with FlopCounterMode(display=False) as counter:
        runner()
    assert cases.count_flops(case) == counter.get_total_flops()
    # Two gradients of each product, but for that of the features: the first convolution is 3 x 16 x 32.
    training = cases.count_flops(dataclasses.replace(case, is_training=True))
    assert training == 3 * cases.count_flops(case) - 2 * 2 * 48 * 3 * 16 * 32


def test_count_flops_does_not_depend_on_the_backend_and_counts_windows():
    counts = {}
    for backend in ("eager", "sdpa"):
        for window in (-1, 9):
            case = dataclasses.replace(make_case(200, mha_win_size=window), backend=backend)
            counts[backend, window] = cases.count_flops(case)
    assert counts["eager", -1] == counts["sdpa", -1]
    assert counts["eager", 9] == counts["sdpa", 9]
    # Of 2 * 2 * 32 FLOPs for each pair of steps: two stem blocks at 200 steps, then 100 and 50.
    beyond = sum(n**2 - cases.count_pairs(n, 9, False) for n in (200, 200, 100, 50))
    assert counts["eager", -1] - counts["eager", 9] == 128 * beyond


def test_reach_is_how_far_a_step_depends_on_later_ones():
    case = make_case(96, mha_win_size=5)
    features = cases.make_features(case)
    runner = cases.Runner(case, features)
    before = runner.check()["features"]
    for stride, reach, level in zip(case.config.strides, cases.reach_of_levels(case.config), range(3), strict=True):
        changed = features.clone()
        changed[:, 60] += 1
        runner.features = changed
        differs = (runner.check()["features"][level] != before[level]).any(-1)[0]
        first = int(differs.nonzero()[0]) * stride
        assert 60 - reach <= first < 60 - reach + stride


def test_an_error_shows_in_the_error_column():
    case = make_case()
    reference = cases.Runner(case).check()
    runner = cases.Runner(case)
    with torch.no_grad():
        runner.detector.model.stem[1].attn.k_proj.weight[0, 0] += 0.1  # one weight of one attention
    assert cases.compare(runner.check(), reference)["features"]["relative"] > 10 * CLOSE
    with pytest.raises(RuntimeError, match="shape"):
        cases.compare({"features": [torch.zeros(2)]}, {"features": [torch.zeros(3)]})


def test_variants_by_name_start_and_path():
    assert not cases.find_config("v1_compatible", {}).use_rope
    assert cases.find_config("thumos14", {}).mha_win_size == 19
    path = ROOT / "configuration" / "maximum_speed.yaml"
    assert cases.find_config(str(path), {}).n_kv_head == cases.find_config("maximum_speed", {}).n_kv_head == 1
    assert cases.find_config("balanced,n_kv_head=2,use_rope=false", {"n_kv_head": 4}).n_kv_head == 2


def test_time_alternates_and_skips_warmup():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = harness.time_alternating(functions, repeats=2, warmup=1)
    assert calls == list("abcabcabc")
    assert list(timings) == list("abc")
    assert timings["a"].ratio == 1


@pytest.mark.slow
def test_a_child_that_fails_or_is_killed_says_so():
    with pytest.raises(RuntimeError, match="invalid literal"):
        harness.in_child(int, "three")
    if hasattr(signal, "SIGKILL"):
        with pytest.raises(RuntimeError, match="out of memory"):
            harness.in_child(signal.raise_signal, signal.SIGKILL)


def test_what_is_done_when_time_is_over_is_still_timed(tmp_path, capsys, monkeypatch):
    prepare = cases._prepare

    def prepare_until_stopped(case, *arguments):
        if case.backend == "eager":
            signal.raise_signal(signal.SIGTERM)
        return prepare(case, *arguments)

    monkeypatch.setattr(cases, "_prepare", prepare_until_stopped)
    arguments = ["--length", "20", "--variants", "balanced", "--no-memory", "--json", str(tmp_path / "a.json")]
    before = signal.getsignal(signal.SIGTERM)
    latency.main([*TINY, *arguments, "--backends", "sdpa", "eager", "other"])
    assert signal.getsignal(signal.SIGTERM) is before
    rows = read(tmp_path / "a.json")
    assert [("median_ms" in row, "problem" in row) for row in rows] == [(True, False), (False, True), (False, True)]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path, args = tmp_path / "a.json", argparse.Namespace(json=tmp_path)
    harness.write_json(path, {}, args, [{"x": float("inf"), "y": (1, 2)}])
    assert json.loads(path.read_text())["rows"] == [{"x": "inf", "y": [1, 2]}]
    before = path.read_text()

    class Unprintable:
        def __str__(self):
            raise ValueError("unprintable")

    with pytest.raises(ValueError, match="unprintable"):
        harness.write_json(path, {}, args, [{"x": Unprintable()}])
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


# --- v1's own code -----------------------------------------------------------------------------------------------------


def test_nms_of_v1_says_how_to_build_it(tmp_path):
    for part in ("libs/modeling/meta_archs.py", "libs/utils/nms.py", "libs/utils/metrics.py"):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / part).write_text("import nms_1d_cpu")
    with pytest.raises(harness.BenchmarkError, match="build_ext --inplace"):
        official.import_nms(tmp_path)


@with_v1
@pytest.mark.parametrize("model", ["backbone", "detector"])
def test_v1_has_the_same_outputs(model, tmp_path, capsys):
    arguments = ["--model", model, "--length", "576", "--batch", "2", "--set", "mha_win_size=[19,9,9,5,5,-1]"]
    files = ["--no-memory", "--json", str(tmp_path / "a.json"), "--v1", V1]
    variants = ["--variants", "v1_compatible,max_len=1152", "balanced"]
    latency.main([*TINY, *arguments, *files, *variants, "--backends", "eager", "sdpa"])
    rows = read(tmp_path / "a.json")
    assert [row["variant"] for row in rows] == ["v1's code", *["v1_compatible,max_len=1152"] * 2, *["balanced"] * 2]
    assert [row["against"] for row in rows] == ["is the reference", "v1", "v1", "eager", "eager"]
    assert all(row["relative_error"] < CLOSE for row in rows[1:])
    assert "time / v1" in rows_of(capsys.readouterr().out)[0]


@with_v1
def test_v1_has_the_same_loss_and_gradient(tmp_path, capsys):
    arguments = ["--length", "576", "--no-memory", "--json", str(tmp_path / "a.json"), "--v1", V1]
    training_step.main([*TINY, *arguments])
    official_row, ours = read(tmp_path / "a.json")
    assert ours["against"] == "v1"
    assert ours["loss_error"] < CLOSE
    assert ours["gradient_error"] < CLOSE
    assert official_row["loss"] == pytest.approx(ours["loss"])


@with_v1
def test_v1_must_not_pad(capsys):
    with pytest.raises(SystemExit):
        latency.main([*TINY, "--length", "50", "--v1", V1])
    assert "--length 64 would work" in capsys.readouterr().err


@with_v1
@pytest.mark.slow
def test_v1_scales_beside_ours(tmp_path):
    arguments = [*TINY, "--lengths", 320, 640, "--windows", 0, 9, "--v1-max-length", 400, "--check-length", 400]
    result = run("scaling.py", *arguments, "--v1", V1, "--json", "a.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = read(tmp_path / "a.json")
    official_rows = [(row["window"], row["length"]) for row in rows if row["is_v1"]]
    assert official_rows == [("global", 320), (9, 320), (9, 640)]
    checked = [row for row in rows if row["against"] == "eager"]
    assert len(checked) == 6  # all but global attention at 640
    assert all(row["relative_error"] < CLOSE for row in checked)


@with_v1
def test_v1_finds_the_same_map(tmp_path, capsys):
    arguments = ["--repeats", "1", "--videos", "10", "--predictions", "20", "--v1", V1]
    COMMANDS["map"]([*arguments, "--json", str(tmp_path / "a.json")])
    assert read(tmp_path / "a.json")[1]["error"] < 1e-9


@with_v1
def test_v1_keeps_the_same_segments(tmp_path, capsys):
    try:
        COMMANDS["nms"](["--repeats", "1", "--v1", V1, "--json", str(tmp_path / "a.json")])
    except SystemExit:
        if "build_ext" in (message := capsys.readouterr().err):
            pytest.skip("v1's NMS extension is not built")
        raise AssertionError(message) from None
    ours = [row for row in read(tmp_path / "a.json") if "score_error" in row]
    assert len(ours) == 6
    assert all(row["score_error"] < 1e-5 and row["segment_error"] < 1e-5 for row in ours)
