"""How a detector is trained: parameter groups, schedule, moving average, Trainer, checkpoints; in one process and in two.

What a whole run of examples/train.py does, killed and run again, is in test_examples.py.
"""

import copy
import json
import math
import os
import shutil
import socket
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

pytest.importorskip("accelerate", reason="Trainer needs accelerate (the train and demo extras)")

from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
)
from modeling_convtransformer.data import DataCollator
from modeling_convtransformer.evaluation import evaluate_detections
from modeling_convtransformer.training import (
    EMACallback,
    TemporalActionTrainer,
    compute_detection_metrics,
    decay_parameter_names,
    detections_of,
    find_detector,
    find_last_checkpoint,
    load_ema,
    load_for_classes,
    parameter_groups,
)

# (length, fps, segments in seconds with their class): other lengths, rates and numbers of segments; the third has none.
RECORDINGS = [
    (20, 10.0, [(1.0, 4.0, 0), (6.0, 9.0, 1)]),
    (31, 25.0, [(0.5, 2.0, 2)]),
    (26, 10.0, []),
    (40, 5.0, [(3.0, 9.0, 1), (12.0, 20.0, 0), (25.0, 31.0, 2)]),
    (23, 50.0, [(0.2, 1.5, 0)]),
]
STRIDE, FRAMES = 5, 8


class Recordings(Dataset):
    """Noise as features, but with segments, lengths and rates of `RECORDINGS`."""

    def __init__(self, indices=(0, 1, 2, 3, 4), seed=0):
        self.indices, self.seed = list(indices), seed

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, place):
        index = self.indices[place]
        length, fps, annotations = RECORDINGS[index]
        rows = np.array(annotations, dtype=np.float64).reshape(-1, 3)
        features = np.random.default_rng([self.seed, index]).normal(size=(length, 6))
        return {
            "video_id": f"v{index}",
            "features": features.astype(np.float32),
            "segments": ((rows[:, :2] * fps - 0.5 * FRAMES) / STRIDE).astype(np.float32),
            "class_labels": rows[:, 2].astype(np.int64),
            "geometry": {
                "fps": fps,
                "feature_stride": STRIDE,
                "num_frames": FRAMES,
                "duration": ((length - 1) * STRIDE + FRAMES) / fps,
            },
        }

    def ground_truth(self):
        truth = {}
        for index in self.indices:
            rows = np.array(RECORDINGS[index][2], dtype=np.float64).reshape(-1, 3)
            truth[f"v{index}"] = {"segments": rows[:, :2], "labels": rows[:, 2].astype(np.int64)}
        return truth


def extractor():
    return ConvTransformerFeatureExtractor(6, 10, STRIDE, num_frames=FRAMES, max_seg_num=30)


def collate(items):
    batch = DataCollator(extractor())(items)
    return {name: batch[name] for name in ("input_features", "attention_mask", "labels")}


def detector(seed=0, **changes):
    """A small model whose weights are moved away from where they start, so that every part of it shows."""
    torch.manual_seed(seed)
    settings = {"n_in": 6, "n_embd": 16, "n_head": 2, "arch": (1, 1, 2), "head_dim": 16, "num_labels": 3}
    settings |= {"max_len": 64, "init_loss_norm": 10, "path_pdrop": 0.0}
    model = ConvTransformerForTemporalActionLocalization(ConvTransformerConfig(**{**settings, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def arguments(folder, **changes):
    """One step of plain gradient descent with learning rate 1: what the weights lose is the gradient."""
    settings = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    return TrainingArguments(output_dir=str(folder), **{**settings, **changes})


def make_trainer(folder, model=None, train=None, evaluate=None, callbacks=None, **changes):
    return TemporalActionTrainer(
        model=detector() if model is None else model,
        args=arguments(folder, **changes),
        train_dataset=Recordings() if train is None else train,
        eval_dataset=Recordings() if evaluate is None else evaluate,
        feature_extractor=extractor(),
        compute_metrics=compute_detection_metrics,
        callbacks=callbacks,
    )


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(model, wanted, atol=0.0):
    found = weights_of(model) if isinstance(model, nn.Module) else model
    assert {*found} == {*wanted}
    for name, parameter in found.items():
        torch.testing.assert_close(
            parameter,
            wanted[name].to(parameter.dtype),
            atol=atol,
            rtol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# --- Parameter groups -----------------------------------------------------------------------------------------------

# What ActionFormer's release decays (weights of linear and convolution layers) and what it leaves alone (biases, norms,
# scales, relative positions), for two small models with one stem block and one branch block, written out by hand.
ATTENTION = [
    f"attn.{part}" for part in ("query_conv", "key_conv", "value_conv", "q_proj", "k_proj", "v_proj", "o_proj")
]
ATTENTION_BIASES = [f"attn.{part}.bias" for part in ("q_proj", "k_proj", "v_proj", "o_proj")]
NORMS = ["ln1", "ln2", "attn.query_norm", "attn.key_norm", "attn.value_norm"]
HEADS = [f"{head}.{layer}" for head in ("class_head", "segment_head") for layer in ("convs.0", "convs.1", "output")]
HEAD_NORMS = [f"{head}.norms.{layer}" for head in ("class_head", "segment_head") for layer in (0, 1)]


def in_blocks(*names):
    return [f"model.{block}.0.{name}" for block in ("stem", "branch") for name in names]


def weight_and_bias(*names):
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


V1_SETTINGS = {
    "arch": (1, 1, 1),
    "use_rope": False,
    "use_swiglu": False,
    "use_rms_norm": False,
    "use_abs_pe": True,
    "use_rel_pe": True,
    "mha_win_size": 5,
    "mask_conv_inputs": False,
    "path_pdrop": 0.1,
}
V1_DECAY = [
    "model.embedding.convs.0.weight",
    *in_blocks(*(f"{name}.weight" for name in [*ATTENTION, "mlp.up_proj", "mlp.down_proj"])),
    *(f"{name}.weight" for name in HEADS),
]
V1_NO_DECAY = [
    *weight_and_bias("model.embedding.norms.0"),
    *in_blocks(*weight_and_bias(*NORMS), *ATTENTION_BIASES, "mlp.up_proj.bias", "mlp.down_proj.bias"),
    *in_blocks("attn.relative_bias", "drop_path_attn.scale", "drop_path_mlp.scale"),
    *weight_and_bias("neck.norms.0", "neck.norms.1", *HEAD_NORMS),
    *("class_head.output.bias", "segment_head.output.bias", "segment_head.scale"),
]

V2_SETTINGS = {
    "arch": (1, 1, 1),
    "n_in": [4, 2],
    "use_learned_pe": True,
    "use_rms_norm": False,
    "use_batch_norm": True,
    "n_kv_head": 1,
    "fpn_type": "fpn",
    "path_pdrop": 0.1,
}
V2_DECAY = [
    *("model.embedding.streams.0.weight", "model.embedding.streams.1.weight", "model.embedding.convs.0.weight"),
    *in_blocks(*(f"{name}.weight" for name in [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"])),
    *(f"neck.{name}.{level}.weight" for name in ("laterals", "convs") for level in (0, 1)),
    *(f"{name}.weight" for name in HEADS),
]
V2_NO_DECAY = [
    *("model.embedding.streams.0.bias", "model.embedding.streams.1.bias", "model.embedding.positions.table"),
    *weight_and_bias("model.embedding.norms.0"),
    *in_blocks(*weight_and_bias(*NORMS), *ATTENTION_BIASES),
    *in_blocks("mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"),
    *in_blocks("drop_path_attn.scale", "drop_path_mlp.scale"),
    *weight_and_bias("neck.norms.0", "neck.norms.1", *HEAD_NORMS),
    *("class_head.output.bias", "segment_head.output.bias", "segment_head.scale"),
]


@pytest.mark.parametrize(
    ("settings", "decay", "no_decay"), [(V1_SETTINGS, V1_DECAY, V1_NO_DECAY), (V2_SETTINGS, V2_DECAY, V2_NO_DECAY)]
)
def test_weight_decay_is_for_linear_and_convolution_weights(settings, decay, no_decay, tmp_path):
    model = detector(**settings)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted([*decay, *no_decay]) == sorted(name_of.values())  # the lists above are complete
    assert sorted(decay_parameter_names(model)) == sorted(decay)

    groups = parameter_groups(model, 0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert [sorted(name_of[id(one)] for one in group["params"]) for group in groups] == [
        sorted(decay),
        sorted(no_decay),
    ]

    optimizer = make_trainer(tmp_path, model, weight_decay=0.05, optim="adamw_torch").create_optimizer()
    found = {
        group["weight_decay"]: sorted(name_of[id(one)] for one in group["params"]) for group in optimizer.param_groups
    }
    assert found == {0.05: sorted(decay), 0.0: sorted(no_decay)}


def test_frozen_parameters_are_in_no_group():
    model = detector()
    model.model.requires_grad_(False)
    grouped = {id(one) for group in parameter_groups(model, 0.05) for one in group["params"]}
    assert grouped == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(parameter_groups(nn.Linear(2, 3), 0.1)[0]["params"]) == 1  # a layer by itself has no prefix


def test_learning_rate_rises_linearly_and_falls_as_a_cosine(tmp_path):
    total, warmup, rate = 10, 3, 0.02
    trainer = make_trainer(
        tmp_path,
        max_steps=total,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=warmup,
        logging_strategy="steps",
        logging_steps=1,
        optim="adamw_torch",
    )
    trainer.train()
    found = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    wanted = [
        rate * step / warmup
        if step < warmup
        else rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        for step in range(total)
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=0)  # the same formula in double precision


# --- Moving average -------------------------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    """The weights before training and after each optimizer step, in double precision."""

    def __init__(self):
        self.weights = []

    def keep(self, model):
        self.weights.append({name: parameter.detach().double() for name, parameter in model.named_parameters()})

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.keep(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.keep(model)


def averaged(snapshots, decay):
    """The rule in double precision: d rises as (1 + step) / (10 + step) up to the decay."""
    average = dict(snapshots[0])
    for step, weights in enumerate(snapshots[1:], start=1):
        share = min(decay, (1 + step) / (10 + step))
        average = {name: share * average[name] + (1 - share) * weights[name] for name in average}
    return average


# 0.3 is reached at step 3 (4 / 13), 0.9 never within 8 steps.
@pytest.mark.parametrize(("decay", "accumulated"), [(0.9, 1), (0.3, 1), (0.9, 2)])
def test_average_of_weights_against_double_precision(tmp_path, decay, accumulated):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        detector(path_pdrop=0.1),
        callbacks=[recorder],
        max_steps=8,
        learning_rate=0.1,
        gradient_accumulation_steps=accumulated,
    )
    ema = EMACallback(trainer, decay)
    trainer.add_callback(ema)
    trainer.train()
    assert len(recorder.weights) == 1 + 8  # once an optimizer step, however many batches that takes
    wanted = averaged(recorder.weights, decay)
    # Weights of up to 2: each of 8 steps rounds to float32 (2**-24 of the value).
    assert_same_weights(ema.average, wanted, atol=1e-6)
    moved = max((wanted[name] - recorder.weights[-1][name]).abs().max() for name in wanted)
    assert moved > 1e-3  # the average is not simply the last weights


def test_only_weights_that_learn_are_averaged(tmp_path):
    model = detector()
    model.model.requires_grad_(False)
    trainer = make_trainer(tmp_path, model)
    ema = EMACallback(trainer, 0.9)
    trainer.add_callback(ema)
    trainer.train()
    assert {*ema.average} == {name for name in weights_of(model) if not name.startswith("model.")}


def test_half_precision_weights_have_an_average_that_moves():
    """In bfloat16 itself, 1 + 0.001 * (2 - 1) is 1, and so for ever."""
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    trainer = SimpleNamespace()
    ema, state = EMACallback(trainer, 0.999), SimpleNamespace(global_step=0)
    control, args = SimpleNamespace(should_save=False), SimpleNamespace()
    nn.init.ones_(layer.weight)
    ema.on_train_begin(args, state, control, model=layer)
    nn.init.constant_(layer.weight, 2.0)
    for step in range(10_000, 10_100):  # past the warm-up
        state.global_step = step
        ema.on_step_end(args, state, control, model=layer)
    # float32 sums of 100 small steps
    torch.testing.assert_close(ema.average["weight"], torch.full((2, 3), 2 - 0.999**100), rtol=0, atol=1e-5)
    with ema.weights(layer):
        assert layer.weight[0, 0] == torch.tensor(2 - 0.999**100).bfloat16()
    assert (layer.weight == 2).all()
    assert ema.average["weight"].dtype == torch.float32


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="expected a number in"):
        EMACallback(SimpleNamespace(), decay)


class Modes(TrainerCallback):
    """Whether the model is in training mode in each forward with gradients, and in each one without."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen = {True: set(), False: set()}
        model.register_forward_pre_hook(lambda module, _: self.seen[torch.is_grad_enabled()].add(module.training))


def run_with_average(folder, patience=None, train=None, **changes):
    """Five steps with evaluation and a checkpoint at each, and what was seen on the way."""
    recorder, modes = Recorder(), Modes()
    settings = {
        "max_steps": 5,
        "learning_rate": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_ema_map",
        "logging_strategy": "steps",
        "logging_steps": 1,
    }
    model = detector(6, path_pdrop=0.1, proj_pdrop=0.1)  # whose average is best in the middle of the run
    trainer = make_trainer(folder, model, train, callbacks=[recorder, modes], **{**settings, **changes})
    ema = EMACallback(trainer, 0.5)
    trainer.add_callback(ema)
    if patience is not None:
        trainer.add_callback(EarlyStoppingCallback(patience))
    return trainer, ema, recorder, modes


def test_both_weights_are_evaluated_and_the_best_average_wins(tmp_path):
    trainer, ema, recorder, modes = run_with_average(tmp_path)
    trainer.train()
    assert modes.seen == {True: {True}, False: {False}}  # dropout on in training, also after an evaluation
    own = {row["step"]: row for row in trainer.state.log_history if "eval_map" in row}
    average = {row["step"]: row for row in trainer.state.log_history if "eval_ema_map" in row}
    assert [*own] == [*average] == [1, 2, 3, 4, 5]
    assert {"eval_loss", "eval_map_30", "eval_map_70"} <= {*own[1]}
    assert {"eval_ema_loss", "eval_ema_map_30", "eval_ema_map_70"} <= {*average[1]}

    for step in own:
        folder = tmp_path / f"checkpoint-{step}"
        model = ConvTransformerForTemporalActionLocalization.from_pretrained(folder)
        # Evaluating the average left the model's own weights as they were: the checkpoint has those after the step.
        assert_same_weights(model, recorder.weights[step])
        for prefix, row in (("eval", own[step]), ("eval_ema", average[step])):
            if prefix == "eval_ema":
                load_ema(model, folder)
                assert_same_weights(model, averaged(recorder.weights[: step + 1], 0.5), atol=1e-6)
            # A new process, so to speak: the folder gives what was reported. The loss is a float32 sum.
            again = make_trainer(tmp_path / "again", model).evaluate()
            assert again["eval_map"] == row[f"{prefix}_map"]
            assert again["eval_loss"] == pytest.approx(row[f"{prefix}_loss"], rel=1e-5)

    scores = [row["eval_ema_map"] for row in average.values()]
    best = 1 + int(np.argmax(scores))
    assert 0 < scores[best - 1] < 1
    assert len({*scores}) > 1
    assert trainer.state.best_global_step == best
    assert trainer.state.best_metric == scores[best - 1]
    # Both weights are those of the best checkpoint at the end.
    assert_same_weights(trainer.model, recorder.weights[best])
    assert_same_weights(ema.average, averaged(recorder.weights[: best + 1], 0.5), atol=1e-6)
    before = weights_of(trainer.model)
    with ema.weights(trainer.model) as model:
        assert_same_weights(model, ema.average)
        with pytest.raises(RuntimeError, match="within"), ema.weights(model):
            raise RuntimeError("within")
    assert_same_weights(trainer.model, before)


def test_early_stopping_counts_each_evaluation_once(tmp_path):
    # Nothing is learned: the second and the third evaluation are no better than the first.
    trainer, *_ = run_with_average(tmp_path, patience=2, learning_rate=0.0, max_steps=6)
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize(
    "settings",
    [{"save_strategy": "best"}, {"save_strategy": "epoch", "max_steps": 2, "load_best_model_at_end": False}],
    ids=["best", "epoch"],
)
def test_each_checkpoint_has_its_average(tmp_path, settings):
    """(With "steps", see above.) A file that a former run left is replaced, though nothing else says that it is old."""
    stale = tmp_path / "checkpoint-1" / "ema.safetensors"
    stale.parent.mkdir()
    stale.write_bytes(b"of another run")
    trainer, _, recorder, _ = run_with_average(tmp_path, train=Recordings([0]), **settings)  # one step an epoch
    trainer.train()
    folders = sorted(tmp_path.glob("checkpoint-*"))
    assert folders
    for folder in folders:
        step = int(folder.name.rpartition("-")[2])
        model = load_ema(ConvTransformerForTemporalActionLocalization.from_pretrained(folder), folder)
        assert_same_weights(model, averaged(recorder.weights[: step + 1], 0.5), atol=1e-6)
        assert not [*folder.glob("*.part")]
    assert tmp_path / f"checkpoint-{trainer.state.best_global_step}" in folders


@pytest.mark.parametrize("moved", [False, True])
def test_resumed_average_goes_on_bit_for_bit(tmp_path, moved):
    settings = {"max_steps": 7, "save_steps": 3, "eval_strategy": "no", "load_best_model_at_end": False}
    settings["optim"] = "adamw_torch"
    trainer, whole, *_ = run_with_average(tmp_path / "whole", **settings)
    trainer.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    if moved:
        shutil.move(checkpoint, tmp_path / "checkpoint-3")
        checkpoint = tmp_path / "checkpoint-3"
    resumed, again, *_ = run_with_average(tmp_path / ("other" if moved else "whole"), **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no ema.safetensors.*")
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 7
    assert_same_weights(resumed.model, weights_of(trainer.model))
    assert_same_weights(again.average, whole.average)


def test_resuming_without_an_average_says_so(tmp_path):
    settings = {"save_steps": 1, "save_strategy": "steps", "max_steps": 2}
    make_trainer(tmp_path, **settings).train()
    trainer = make_trainer(tmp_path, **settings)
    ema = EMACallback(trainer, 0.9)
    trainer.add_callback(ema)
    with pytest.warns(UserWarning, match=r"checkpoint-1 has no ema\.safetensors: the moving average starts anew"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_several_evaluation_sets_have_their_own_scores(tmp_path):
    """One name begins with the other: the scores are still those of each set."""
    sets = {"a": Recordings([0, 1]), "a_b": Recordings([2, 3, 4])}
    trainer = make_trainer(tmp_path, evaluate=sets, max_steps=3, learning_rate=0.02)
    ema = EMACallback(trainer, 0.5)
    trainer.add_callback(ema)
    trainer.train()
    metrics = trainer.evaluate()
    for name, dataset in sets.items():
        own = trainer.predict(dataset).metrics
        with ema.weights(trainer.model):
            average = trainer.predict(dataset).metrics
        assert metrics[f"eval_{name}_map"] == own["test_map"]
        assert metrics[f"eval_{name}_ema_map"] == average["test_map"]
        assert metrics[f"eval_{name}_ema_loss"] == pytest.approx(average["test_loss"], rel=1e-6)
        assert average["test_loss"] != own["test_loss"]
    other = trainer.evaluate(Recordings([4]), metric_key_prefix="test")
    with ema.weights(trainer.model):
        assert other["test_ema_loss"] == pytest.approx(trainer.predict(Recordings([4])).metrics["test_loss"], rel=1e-6)


def test_load_ema_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="was EMACallback at work"):
        load_ema(detector(), tmp_path)
    trainer, *_ = run_with_average(tmp_path, max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match=r"is of another model: it has .*, \d+ tensors in all that do not fit"):
        load_ema(detector(n_embd=32), tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="is of another model"):
        load_ema(detector(arch=(1, 1, 1)), tmp_path / "checkpoint-1")


# --- Evaluation -----------------------------------------------------------------------------------------------------


def plain_evaluation(model, dataset):
    """Each recording alone, post-processed, against the dataset's own truth."""
    model.eval()
    found = {}
    for item in dataset:
        batch = collate([item])
        with torch.no_grad():
            outputs = model(batch["input_features"], batch["attention_mask"])
        (segments,) = extractor().post_process_temporal_action_localization(outputs, geometry=[item["geometry"]])
        found[item["video_id"]] = {name: value.numpy() for name, value in segments.items()}
    return found, evaluate_detections(found, dataset.ground_truth())


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_evaluation_is_that_of_a_plain_loop(tmp_path, batch_size):
    """Five recordings: the last batch is incomplete for 2, 3 and 4."""
    seen = {}

    def compute_metrics(prediction):
        seen["prediction"] = prediction
        return compute_detection_metrics(prediction)

    model, dataset = detector(), Recordings()
    trainer = make_trainer(tmp_path, model, per_device_eval_batch_size=batch_size)
    trainer.compute_metrics = compute_metrics
    metrics = trainer.evaluate()
    wanted, wanted_metrics = plain_evaluation(model, dataset)

    prediction = seen["prediction"]
    longest = max(len(one["scores"]) for one in wanted.values())
    # No logits, one for each point and class: segments and no more of them than post-processing leaves.
    assert prediction.predictions.shape == (5, longest, 4)
    assert longest <= 30
    assert prediction.label_ids.shape == (5, 3, 3)

    found, truth = detections_of(prediction)
    for index, (video_id, own) in enumerate(wanted.items()):
        assert len(found[index]["scores"]) == len(own["scores"]) > 0
        np.testing.assert_array_equal(found[index]["labels"], own["labels"])
        # float32; another batch size sums in another order
        np.testing.assert_allclose(found[index]["scores"], own["scores"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found[index]["segments"], own["segments"], rtol=0, atol=1e-4)
        own = dataset.ground_truth()[video_id]
        np.testing.assert_array_equal(truth[index]["labels"], own["labels"])
        np.testing.assert_allclose(truth[index]["segments"], own["segments"], rtol=0, atol=1e-5)
    assert len(truth[2]["labels"]) == 0
    assert 0 < wanted_metrics.average_map < 1
    for name, value in wanted_metrics.to_dict().items():
        if name.startswith("map"):
            assert metrics[f"eval_{name}"] == pytest.approx(value, abs=1e-9)
    assert not any(name.startswith("eval_recall") for name in metrics)


def test_evaluation_without_segments_or_labels(tmp_path):
    trainer = make_trainer(tmp_path, evaluate=Recordings([2]))
    output = trainer.predict(Recordings([2, 0]))
    assert (output.label_ids[0] == -100).all()
    trainer.compute_metrics = None
    assert trainer.evaluate()["eval_loss"] > 0  # the loss alone
    assert trainer.predict(Recordings([2])).label_ids.shape == (1, 1, 3)


def test_detector_is_found_inside_wrappers():
    model = detector()
    assert find_detector(nn.Sequential(nn.Identity(), nn.Sequential(model))) is model
    with pytest.raises(ValueError, match="no ConvTransformerForTemporalActionLocalization in this Linear"):
        find_detector(nn.Linear(1, 1))


# --- Gradients of batches in parts ----------------------------------------------------------------------------------


def plain_steps(model, batches, rate=1.0):
    """Gradient descent, one whole batch a step."""
    for items in batches:
        model.train()
        model.zero_grad()
        model(**collate(items)).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
    return model


# Gradients up to 1 as float32 sums in another order.
CLOSE = 1e-6


@pytest.mark.parametrize("loaded", [False, True])
def test_accumulated_gradients_are_those_of_one_batch(tmp_path, loaded):
    """The recording without segments and those with three count as they would in one batch: not as a mean of means."""
    model = detector()
    wanted = plain_steps(copy.deepcopy(model), [list(Recordings())])
    if loaded:  # such a model comes in evaluation mode
        model.eval()
    trainer = make_trainer(tmp_path, model, gradient_accumulation_steps=5)
    trainer.train()
    assert_same_weights(model, weights_of(wanted), atol=CLOSE)
    normalizer = wanted.criterion.loss_normalizer.item()
    assert model.criterion.loss_normalizer.item() == pytest.approx(normalizer, rel=1e-6)
    assert normalizer != 10

    # It matters: the mean of the gradients of each recording by itself is something else.
    mean = copy.deepcopy(model)
    gradients = [weights_of(plain_steps(detector(), [[item]])) for item in Recordings()]
    mean = {name: torch.stack([one[name] for one in gradients]).mean(dim=0) for name in gradients[0]}
    assert max((mean[name] - parameter).abs().max() for name, parameter in wanted.named_parameters()) > 1e-3


def test_accumulation_after_evaluation_and_in_the_rest_of_an_epoch(tmp_path):
    """Five recordings, three a step: the second step has two. An evaluation lies before the second step and on."""
    data = list(Recordings())
    model = detector()
    wanted = plain_steps(copy.deepcopy(model), [data[:3], data[3:], data[:3], data[3:]], rate=0.05)
    trainer = make_trainer(
        tmp_path,
        model,
        gradient_accumulation_steps=3,
        max_steps=4,
        learning_rate=0.05,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    assert model.criterion.loss_normalizer.item() == pytest.approx(wanted.criterion.loss_normalizer.item(), rel=1e-6)
    assert_same_weights(model, weights_of(wanted), atol=CLOSE)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # transformers 5.23 has a new name
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("changes", [{}, {"use_rope": False, "use_rel_pe": True, "mha_win_size": 5, "n_kv_head": 1}])
def test_checkpointed_gradients_are_the_same(use_reentrant, changes):
    """With dropout and drop path on: the second forward of a block draws what the first one drew. (Batch norm is left
    out: it would count each batch twice in its running statistics, here as in every model.)"""
    model = detector(path_pdrop=0.3, proj_pdrop=0.3, attn_pdrop=0.3, **changes)
    batch, gradients = collate(list(Recordings([0, 1, 2]))), []
    for checkpointing in (False, True):
        own = copy.deepcopy(model).train()
        if checkpointing:
            own.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            assert own.is_gradient_checkpointing
        torch.manual_seed(7)
        own(**batch).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in own.named_parameters()})
    assert max(gradient.abs().max() for gradient in gradients[0].values()) > 0.1
    for name, gradient in gradients[0].items():
        # float32; the reentrant way adds up the parts of a gradient in another order
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)


# Recordings, batch size of a process and accumulated batches, for two processes. In the first, one has no segment.
PARALLEL = {"one_is_empty": ([0, 2], 1, 1), "batches": ([0, 1, 2, 3], 2, 1), "accumulated": ([0, 1, 2, 3], 1, 2)}


def train_in_parallel(rank, folder, port):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    results = {}
    for name, (indices, batch_size, accumulated) in PARALLEL.items():
        trainer = make_trainer(
            f"{folder}/{name}",
            detector(),
            Recordings(indices),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulated,
            max_steps=2,
            learning_rate=0.05,
            save_strategy="steps",
            save_steps=1,
            ddp_backend="gloo",
        )
        ema = EMACallback(trainer, 0.5)
        trainer.add_callback(ema)
        trainer.train()
        metrics = trainer.evaluate()
        results[name] = {
            "weights": weights_of(trainer.model),
            "average": ema.average,
            "normalizer": trainer.model.criterion.loss_normalizer,
            "metrics": metrics,
            "shape": trainer.predict(Recordings()).predictions.shape,
        }
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_train_and_evaluate_as_one(tmp_path):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    torch.multiprocessing.spawn(train_in_parallel, (str(tmp_path), port), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, (indices, _, _) in PARALLEL.items():
        data = list(Recordings(indices))
        model = plain_steps(detector(), [data, data], rate=0.05)
        snapshots = [weights_of(plain_steps(detector(), [data] * steps, rate=0.05)) for steps in range(3)]
        # Five recordings for two processes, two at a time: what is evaluated twice to fill up counts once.
        _, metrics = plain_evaluation(model, Recordings())
        with_average = detector()
        with torch.no_grad():
            for key, value in averaged(snapshots, 0.5).items():
                with_average.get_parameter(key).copy_(value)
        _, average_metrics = plain_evaluation(with_average, Recordings())
        for rank in ranks:
            own = rank[name]
            assert_same_weights(own["weights"], weights_of(model), atol=CLOSE)
            assert_same_weights(own["average"], averaged(snapshots, 0.5), atol=CLOSE)
            assert own["normalizer"].item() == pytest.approx(model.criterion.loss_normalizer.item(), rel=1e-6)
            assert own["shape"][0] == 5
            assert own["metrics"]["eval_map"] == pytest.approx(metrics.average_map, abs=1e-9)
            assert own["metrics"]["eval_ema_map"] == pytest.approx(average_metrics.average_map, abs=1e-9)
        assert 0 < metrics.average_map < 1
        assert find_last_checkpoint(tmp_path / name) == str(tmp_path / name / "checkpoint-2")
        assert (tmp_path / name / "checkpoint-2" / "ema.safetensors").exists()


# --- Checkpoints and other classes ----------------------------------------------------------------------------------


def test_incomplete_checkpoints_are_passed_over(tmp_path):
    assert find_last_checkpoint(tmp_path / "nowhere") is None
    assert find_last_checkpoint(tmp_path) is None
    for step in (9, 10, 11, 12, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(
            json.dumps({"global_step": step}, indent=2)
        )
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-13").write_text("no folder")
    # Cut off while it was written; and killed before it was.
    whole = json.dumps({"epoch": 1.0, "global_step": 12, "log_history": []}, indent=2)
    with pytest.warns(UserWarning, match="is incomplete, as if the run had been killed"):
        assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-11")
    for length in range(0, len(whole), 7):
        (tmp_path / "checkpoint-12" / "trainer_state.json").write_text(whole[:length])
        with pytest.warns(UserWarning, match="checkpoint-12 is incomplete"):
            assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-11")
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text(whole)
    with pytest.warns(UserWarning, match="checkpoint-100 is incomplete"):
        assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")  # by number, not by alphabet
    (tmp_path / "checkpoint-100" / "trainer_state.json").write_text(
        json.dumps({"global_step": 99})
    )  # a renamed folder
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")


def test_rows_of_shared_classes_are_carried_over(tmp_path):
    names = ["run", "walk", "sit"]
    old = detector(id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)})
    old.config.empty_labels = (1,)
    old.save_pretrained(tmp_path)
    new, report = load_for_classes(tmp_path, ["sit", "fly", "run", "jump"], path_pdrop=0.2)
    assert new.config.id2label == {0: "sit", 1: "fly", 2: "run", 3: "jump"}
    assert new.config.label2id == {"sit": 0, "fly": 1, "run": 2, "jump": 3}
    assert new.config.path_pdrop == 0.2
    assert [*new.config.empty_labels] == []
    for kind in ("weight", "bias"):
        theirs, ours = (getattr(model.class_head.output, kind) for model in (old, new))
        assert len(ours) == 4
        torch.testing.assert_close(ours[[0, 2]], theirs[[2, 0]], rtol=0, atol=0)
        assert not any(torch.equal(ours[row], theirs[other]) for row in (1, 3) for other in range(3))
    # New classes start from the prior score: log((1 - 0.01) / 0.01).
    assert new.class_head.output.bias[[1, 3]].tolist() == pytest.approx([-math.log(99)] * 2, rel=1e-6)
    rest = {
        name: value
        for name, value in weights_of(new).items()
        if not name.startswith("class_head.output") and "drop_path" not in name
    }
    for name, value in rest.items():
        assert torch.equal(value, old.get_parameter(name)), name
    states = {name: entry["state"] for name, entry in report.items()}
    assert states["class_head.output.weight"] == "adapted"
    assert states["model.embedding.convs.0.weight"] == "copied"

    same, report = load_for_classes(tmp_path, names)
    assert_same_weights(same, weights_of(old))
    assert {entry["state"] for entry in report.values()} == {"copied"}
    assert [*same.config.empty_labels] == [1]
    with pytest.raises(OSError, match="nowhere"):
        load_for_classes(tmp_path / "nowhere", names)


# --- transformers' own Trainer --------------------------------------------------------------------------------------


def test_accumulated_batches_are_averaged(tmp_path):
    """Two batches accumulated move the weights by the mean of their gradients, not by the sum."""
    model = detector()
    data = [Recordings()[0]] * 2
    expected = copy.deepcopy(model).train()
    for item in data:
        (expected(**collate([item])).loss / 2).backward()
    wanted = {
        name: parameter - parameter.grad
        for name, parameter in expected.named_parameters()
        if parameter.grad is not None
    }
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=data,
        data_collator=DataCollator(extractor()),
    )
    trainer.train()
    assert len(wanted) > 30
    for name, parameter in model.named_parameters():
        # float32; the same sums
        torch.testing.assert_close(parameter, wanted[name], atol=1e-6, rtol=1e-5)


def test_evaluation_keeps_every_sample(tmp_path):
    model = detector()
    seen = {}

    def compute_metrics(prediction):
        seen["batches"] = len(prediction.label_ids)
        seen["samples"] = sum(len(batch) for batch in prediction.label_ids)
        seen["names"] = len(prediction.predictions[0])
        return {"nothing": 0.0}

    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, eval_do_concat_batches=False),
        eval_dataset=Recordings(),
        data_collator=DataCollator(extractor()),
        compute_metrics=compute_metrics,
    )
    metrics = trainer.evaluate()
    # logits, pred_segments, point_mask, point_levels: no loss_dict, which cannot be gathered
    assert seen == {"batches": 3, "samples": 5, "names": 4}
    assert metrics["eval_loss"] > 0


def test_items_that_lost_their_columns_are_explained(tmp_path):
    model = detector()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, remove_unused_columns=True),
        train_dataset=Recordings(),
        data_collator=DataCollator(extractor()),
    )
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        trainer.train()
