"""examples/export.py and examples/run_onnx.py: the same outputs as the model at lengths that were not traced, a deployment
that runs without torch, and bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import load_script
from test_modeling_convtransformer import PLAIN, make_detector

from modeling_convtransformer import (
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
    ConvTransformerModel,
)

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason='export needs its extra: pip install -e ".[export]"')

ROOT = Path(__file__).resolve().parent.parent


export = load_script("export")
run_onnx = load_script("run_onnx")


def run(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


# --- The same outputs ------------------------------------------------------------------------------------------------

# Two levels, one block and short heads, because tracing takes seconds for each. The three lengths are shorter and longer than
# the window, than its blocks of 32 steps, and than the table of 32 positions. The detector of the command below has three
# levels.
TINY = {"arch": (1, 0, 1), "head_num_layers": 1}
SHAPES = [(1, 1), (3, 17), (3, 200)]

SETTINGS = {
    "window_gqa_rel_pe": {"mha_win_size": 5, "n_kv_head": 2, "use_rel_pe": True},
    "causal_window_sinusoids_streams": {"is_causal": True, "mha_win_size": 5, "use_abs_pe": True, "n_in": [2, 4]},
    "conv_backbone_fpn_learned_positions": {
        "backbone_type": "conv",
        "path_pdrop": 0,
        "fpn_type": "fpn",
        "use_learned_pe": True,
    },
    "v1": {**PLAIN, "mask_conv_inputs": False, "use_abs_pe": True},
    "causal_rel_pe_dynamic_rope": {
        "is_causal": True,
        "use_rel_pe": True,
        "rel_pe_max_distance": 7,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_both_formats_equal_the_model_at_other_lengths(name, tmp_path):
    model = make_detector(**{**TINY, **SETTINGS[name]})
    program = export.trace(model)
    assert model.config._attn_implementation == "sdpa"  # as it was
    for kind, write in export.WRITERS.items():
        path = tmp_path / export.FILES[kind]
        write(program, path)
        runner = export.OPENERS[kind](path)
        for batch, time in SHAPES:
            assert (batch, time) != export.TRACED
            differences = export.compare(model, runner, batch, time)
            assert max(differences.values()) <= 1e-4, (kind, batch, time, differences)


def test_compare_sees_what_differs():
    model = make_detector(**TINY)

    def run_with(name, change):
        def runner(features, mask):
            with torch.no_grad():
                outputs = {key: model(features, mask)[key].numpy().copy() for key in export.OUTPUTS}
            outputs[name] = change(outputs[name])
            return outputs

        return export.compare(model, runner, 2, 5)

    assert run_with("logits", lambda x: x) == {"logits": 0, "segments": 0}
    assert run_with("logits", lambda x: x + 0.5)["logits"] == pytest.approx(0.5, abs=1e-5)
    strides = np.array([1] * 5 + [2] * 3)[None, :, None]
    assert run_with("pred_segments", lambda x: x + strides)["segments"] == pytest.approx(1, abs=1e-5)
    assert run_with("pred_segments", lambda x: x * np.nan)["segments"] == np.inf
    assert run_with("point_mask", lambda x: 1 - x)["logits"] == np.inf
    assert run_with("point_levels", lambda x: x + 1)["logits"] == np.inf
    assert run_with("logits", lambda x: x[:, :-1])["logits"] == np.inf


def test_inputs_of_the_check_are_padded():
    model = make_detector(**TINY)
    features, mask = export.make_inputs(model, 3, 17)
    assert features.shape == (3, 17, 6)
    assert mask.sum(dim=1).tolist() == [5, 11, 17]
    assert export.make_inputs(model, 3, 1)[1].tolist() == [[1], [1], [1]]


def test_checked_lengths_are_shorter_and_longer_than_windows_and_tables():
    def longest(**fields):
        shapes = export.shapes_to_check(make_detector(**TINY, **fields).config)
        assert shapes[0] == (1, 1)
        assert export.TRACED[0] not in [batch for batch, _ in shapes]
        return shapes[-1][1]

    assert longest() == 200
    assert longest(mha_win_size=301) > 2 * 301 - 1
    assert longest(use_abs_pe=True, max_len=500) > 500


# --- A deployment ----------------------------------------------------------------------------------------------------


DEFAULT = {"arch": (1, 0, 2), "head_num_layers": 2}


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A saved detector and a recording for it."""
    folder = tmp_path_factory.mktemp("detector")
    id2label = {0: "reach", 1: "grasp", 2: "pour"}
    model = make_detector(**DEFAULT, id2label=id2label, label2id={name: key for key, name in id2label.items()})
    model.save_pretrained(folder)
    ConvTransformerFeatureExtractor(feature_size=6, fps=30.0, feature_stride=8, num_frames=16).save_pretrained(folder)
    features = np.random.default_rng(0).standard_normal((150, 6)).astype(np.float32)
    np.save(folder / "features.npy", features)
    return folder


@pytest.fixture(scope="module")
def deployment(detector, tmp_path_factory):
    """What the command writes of it, and what it says."""
    folder = tmp_path_factory.mktemp("deployment")
    result = run(ROOT / "examples" / "export.py", detector, folder / "exported", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "exported", result


@pytest.mark.slow
def test_command_writes_a_whole_deployment_and_checks_it(detector, deployment):
    folder, result = deployment
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.onnx", "model.pt2", "config.json", "preprocessor_config.json"}
    assert json.loads((folder / "config.json").read_text())["id2label"]["1"] == "grasp"
    lines = result.stdout.splitlines()
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["batch", "1,", "1", "steps:"],
        ["batch", "3,", "17", "steps:"],
        ["batch", "2,", "200", "steps:"],
    ]
    for line in (*lines[1:4], *lines[5:8]):
        assert max(float(word.strip(",")) for word in line.split() if "e-" in word or "e+" in word) <= 1e-4
    assert "Warning" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_files_of_the_command_equal_the_model_at_every_length(detector, deployment, kind):
    """The default settings, with three levels: lengths around each stride, where a level begins to have two steps."""
    model = ConvTransformerForTemporalActionLocalization.from_pretrained(detector).eval()
    runner = export.OPENERS[kind](deployment[0] / export.FILES[kind])
    for batch, time in [(1, 1), (3, 1), (1, 2), (2, 3), (1, 4), (1, 5), (3, 8), (1, 9), (3, 17), (1, 200), (3, 200)]:
        differences = export.compare(model, runner, batch, time)
        assert max(differences.values()) <= 1e-4, (batch, time, differences)


@pytest.mark.slow
def test_onnx_model_names_its_sizes(deployment):
    import onnx

    graph = onnx.load(deployment[0] / "model.onnx").graph

    def shape(value):
        return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]

    assert {value.name: shape(value) for value in (*graph.input, *graph.output)} == {
        "input_features": ["batch", "time", 6],
        "attention_mask": ["batch", "time"],
        "logits": ["batch", "points", 3],
        "pred_segments": ["batch", "points", 2],
        "point_mask": ["batch", "points"],
        "point_levels": ["batch", "points"],
    }


WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_run_onnx_prints_what_torch_finds_without_torch(detector, deployment, tmp_path):
    folder, _ = deployment
    model = ConvTransformerForTemporalActionLocalization.from_pretrained(detector).eval()
    feature_extractor = ConvTransformerFeatureExtractor.from_pretrained(detector)
    with torch.no_grad():
        outputs = model(**feature_extractor(str(detector / "features.npy")))
    expected = feature_extractor.post_process_temporal_action_localization(outputs, threshold=0.2)[0]
    assert len(expected["scores"]) > 3

    found = run_onnx.localize(folder, detector / "features.npy", 0.2)
    assert [one["label"] for one in found] == [model.config.id2label[label] for label in expected["labels"].tolist()]
    np.testing.assert_allclose([one["score"] for one in found], expected["scores"].tolist(), atol=1e-4)
    segments = [[one["start"], one["end"]] for one in found]
    np.testing.assert_allclose(segments, expected["segments"].tolist(), atol=1e-3)

    script = ROOT / "examples" / "run_onnx.py"
    arguments = (folder, detector / "features.npy", "--threshold", 0.2)
    result = run("-c", WITHOUT_TORCH, script, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()[3:]]
    found = sorted(found, key=lambda one: one["start"])
    assert [row[0] for row in rows] == [one["label"] for one in found]
    np.testing.assert_allclose([float(row[3]) for row in rows], [one["score"] for one in found], atol=0.0051)
    np.testing.assert_allclose([float(row[1]) for row in rows], [one["start"] for one in found], atol=0.051)
    np.testing.assert_allclose([float(row[2]) for row in rows], [one["end"] for one in found], atol=0.051)


@pytest.mark.slow
def test_check_finds_a_file_of_another_model(detector, deployment, tmp_path, monkeypatch, capsys):
    folder, _ = deployment
    assert call(monkeypatch, detector, folder, "--check", "--format", "onnx") is None
    other = make_detector(seed=1, **DEFAULT)
    other.save_pretrained(tmp_path)
    shutil.copy(detector / "preprocessor_config.json", tmp_path)
    message = call(monkeypatch, tmp_path, folder, "--check", "--format", "onnx")
    assert "model.onnx differs from the model by" in message
    (tmp_path / "model.onnx").write_text("no model")
    message = call(monkeypatch, tmp_path, tmp_path, "--check", "--format", "onnx")
    assert "model.onnx cannot be loaded" in message


def test_a_file_that_is_not_right_gets_no_name(detector, tmp_path, monkeypatch):
    (tmp_path / "model.pt2").write_text("of an earlier run")
    monkeypatch.setattr(export, "trace", lambda model: None)
    monkeypatch.setitem(export.WRITERS, "pt2", lambda program, path: path.write_text("wrong"))
    monkeypatch.setitem(export.OPENERS, "pt2", lambda path: lambda features, mask: {"logits": np.zeros(1)})
    monkeypatch.setattr(export, "compare", lambda *arguments: {"logits": 0.5, "segments": 0.0})
    message = call(monkeypatch, detector, tmp_path, "--format", "pt2")
    assert "model.pt2 differs from the model by 5.0e-01, more than 0.0001" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "of an earlier run"


# --- Bad input -------------------------------------------------------------------------------------------------------


def call(monkeypatch, *arguments, script=export):
    """Runs the command in this process; what it ends with."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    try:
        script.main()
    except SystemExit as end:
        return end.code
    return None


def error_of(capsys, monkeypatch, *arguments, script=export):
    assert call(monkeypatch, *arguments, script=script) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_folders_that_hold_no_detector(detector, tmp_path, monkeypatch, capsys):
    def error(folder):
        return error_of(capsys, monkeypatch, folder, tmp_path / "out")

    assert "there is no" in error(tmp_path / "missing")
    assert "config.json" in error(tmp_path)

    shutil.copy(detector / "config.json", tmp_path)
    assert "preprocessor_config.json" in error(tmp_path)
    shutil.copy(detector / "preprocessor_config.json", tmp_path)
    assert "model.safetensors" in error(tmp_path)

    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "type 'bert'" in error(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not the configuration of a model" in error(tmp_path)

    backbone = tmp_path / "backbone"
    ConvTransformerModel.from_pretrained(detector).save_pretrained(backbone)
    shutil.copy(detector / "preprocessor_config.json", backbone)
    message = error(backbone)
    assert "no whole detector" in message
    assert "_head" in message
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(detector, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = error_of(capsys, monkeypatch, detector, tmp_path)
    assert 'needs onnxscript, onnxruntime: pip install -e ".[export]"' in message

    for name in ("model.onnx", "config.json", "preprocessor_config.json"):
        shutil.copy(detector / "config.json", tmp_path / name)
    message = error_of(capsys, monkeypatch, tmp_path, detector / "features.npy", script=run_onnx)
    assert 'onnxruntime is not installed: pip install -e ".[export]"' in message


def test_output_that_is_a_file_and_files_that_are_not_there(detector, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert "is a file; expected a folder" in error_of(capsys, monkeypatch, detector, tmp_path / "file")
    assert "there is no" in error_of(capsys, monkeypatch, detector, tmp_path, "--check")
    assert "there is no" in error_of(capsys, monkeypatch, tmp_path, "features.npy", script=run_onnx)


@pytest.mark.slow
def test_run_onnx_names_features_that_do_not_fit(deployment, tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "wide.npy", np.zeros((10, 7), np.float32))
    message = error_of(capsys, monkeypatch, deployment[0], tmp_path / "wide.npy", script=run_onnx)
    assert "wide.npy" in message
    assert "expected (time, 6)" in message


# --- The benchmark ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_benchmark_prints_a_row_for_each_runtime(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = load_script("export", folder="benchmarks")
    fields = ["n_in=16", "n_embd=16", "arch=[0,1,0]", "head_num_layers=1"]
    arguments = ["--lengths", "20", "--thread-counts", "1", "--repeats", "1", "--no-compile", "--config", *fields]
    threads = torch.get_num_threads()
    try:
        benchmark.main([*arguments, "--json", str(tmp_path / "rows.json")])
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["steps"], row["threads"], row["name"]) for row in rows] == [(20, 1, "torch"), (20, 1, "ONNX Runtime")]
    assert rows[0]["ratio"] == 1
    assert rows[1]["error"] <= 1e-4
    assert "| 20 | 1 | ONNX Runtime |" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        benchmark.main(["--config", "n_embd=15"])
    assert end.value.code == 2
    assert "n_embd" in capsys.readouterr().err
