"""Mixed and half precision: what stays float32, what is near float64, and that an overflow costs one step and no more."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_examples import write_data
from test_training import detector, make_trainer, weights_of

from modeling_convtransformer.modeling_convtransformer import BatchNorm, ClassificationHead
from modeling_convtransformer.training import EMACallback

ROOT = Path(__file__).resolve().parent.parent

FEATURES = torch.randn(2, 60, 6, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 60).masked_fill(torch.arange(60) >= torch.tensor([[60], [41]]), 0)
LABELS = [
    {"segments": torch.tensor([[3.0, 12.0], [20.0, 50.0]]), "class_labels": torch.tensor([0, 2])},
    {"segments": torch.tensor([[10.0, 30.0]]), "class_labels": torch.tensor([1])},
]
HALVES = [torch.bfloat16, torch.float16]
BATCH_NORM = {"use_rms_norm": False, "use_batch_norm": True}
SETTINGS = {
    "default": {},
    "v1": {"use_rope": False, "use_swiglu": False, "use_rms_norm": False, "mask_conv_inputs": False},
    "window": {"mha_win_size": 9, "use_rel_pe": True},
    "batch_norm": BATCH_NORM,
    "pyramid": {"fpn_type": "fpn", "fpn_dim": 16, "is_causal": True},
    "short_table": {"use_learned_pe": True, "max_len": 16},
}


def relative(values, expected):
    return ((values.double() - expected).norm() / expected.norm()).item()


# --- Near float64 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_autocast_and_half_weights_are_near_float64(name, dtype):
    """
    Errors relative to the norm of all values. A rounding to `eps` is off by a quarter of it on average; through ten layers
    that adds up to less than 2 `eps`. The loss is float32, and its errors cancel: labels, too, must not be rounded.
    """
    model = detector(label_smoothing=0.1, **SETTINGS[name]).train()
    exact = copy.deepcopy(model).double()(FEATURES, MASK, labels=LABELS)
    eps = torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype):
        mixed = copy.deepcopy(model)(FEATURES, MASK, labels=LABELS)
    half = copy.deepcopy(model).to(dtype)(FEATURES, MASK, labels=LABELS)
    valid = exact.point_mask == 1
    for output in (mixed, half):
        assert output.loss.dtype == output.pred_segments.dtype == torch.float32
        assert relative(output.logits[valid], exact.logits[valid]) < 2 * eps
        assert relative(output.pred_segments[valid], exact.pred_segments[valid]) < 2 * eps
        assert output.loss.item() == pytest.approx(exact.loss.item(), rel=eps / 2)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_targets_are_not_rounded_under_autocast(dtype):
    """Smoothed labels such as 0.9 + 0.1 / 4 do not exist in half precision."""
    model = detector(label_smoothing=0.1).eval()
    with torch.no_grad():
        output = model(FEATURES, MASK)
        points, strides, levels = model._make_points([60, 30, 15], "cpu")
        offsets = torch.rand(2, 105, 2, generator=torch.Generator().manual_seed(1))
        arguments = (output.logits, offsets, output.point_mask.bool(), points, strides, model._make_ranges(levels))
        expected, _ = model.criterion(*arguments, LABELS)
        with torch.autocast("cpu", dtype):
            loss, _ = model.criterion(*arguments, LABELS)
    assert torch.equal(loss, expected)


def test_positions_beyond_2048_are_exact_in_bfloat16():
    """bfloat16 has 8 bits: 2049 would be 2048, and a segment there would start in the wrong place."""
    model = detector().to(torch.bfloat16).eval()
    with torch.no_grad():
        model.segment_head.output.weight.zero_()
        model.segment_head.output.bias.fill_(1.0)
        model.segment_head.scale.fill_(1.0)
        output = model(torch.zeros(1, 3001, 6))
    steps = torch.arange(3001.0)
    torch.testing.assert_close(output.pred_segments[0, :3001], torch.stack((steps - 1, steps + 1), -1), rtol=0, atol=0)


# --- Overflow -------------------------------------------------------------------------------------------------------


def step(model, optimizer, scaler, features):
    """One step of mixed precision, as accelerate and Trainer take it; whether the optimizer's was taken."""
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = model(features, MASK, labels=LABELS).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return loss.item(), scaler.get_scale() >= before


@pytest.mark.parametrize("where", ["gradients", "features"])
@pytest.mark.parametrize("settings", [{}, BATCH_NORM], ids=["rms_norm", "batch_norm"])
def test_an_overflow_in_float16_costs_one_step(settings, where):
    """Gradients overflow when the scale is too large, activations when features are: 65,504 is the largest number."""
    model = detector(**settings).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    first, was_taken = step(model, optimizer, scaler, FEATURES)
    assert was_taken

    if where == "gradients":
        scaler.update(new_scale=2.0**40)
    weights, state = weights_of(model), copy.deepcopy(optimizer.state_dict()["state"])
    scale = scaler.get_scale()
    _, was_taken = step(model, optimizer, scaler, FEATURES if where == "gradients" else 1e6 * FEATURES)
    assert not was_taken
    assert scaler.get_scale() == scale / 2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    for index, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[index][key]) for key, value in values.items()), index
    for name, buffer in model.named_buffers():  # statistics of batch norm, the loss's number of positives
        assert buffer.isfinite().all(), name

    if where == "gradients":
        scaler.update(new_scale=2.0**10)
    losses = [step(model, optimizer, scaler, FEATURES) for _ in range(15)]
    assert all(was_taken for _, was_taken in losses)
    assert losses[-1][0] < 0.9 * first
    assert model.eval()(FEATURES, MASK).logits.isfinite().all()


def test_batch_norm_forgets_a_batch_that_is_not_finite():
    norm, expected = BatchNorm(3).train(), BatchNorm(3).train()
    batch = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))
    expected(batch, None)
    norm(batch, None)
    norm(batch.index_fill(2, torch.tensor([1]), torch.inf), None)
    norm(torch.full_like(batch, torch.nan), None)
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(norm, name), getattr(expected, name)), name


# --- Trainer and accelerate -----------------------------------------------------------------------------------------


def test_trainer_in_bfloat16(tmp_path):
    """Weights, their average and the loss stay float32; the first loss is that of float32 within bfloat16's 8 bits."""
    losses = {}
    for name, is_half in (("float32", False), ("bfloat16", True)):
        options = {
            "bf16": is_half,
            "max_steps": 6,
            "optim": "adamw_torch",
            "learning_rate": 3e-3,
            "eval_strategy": "no",
        }
        trainer = make_trainer(tmp_path / name, logging_strategy="steps", logging_steps=1, **options)
        average = EMACallback(trainer, 0.9)
        trainer.add_callback(average)
        trainer.train()
        losses[name] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        for weights in (weights_of(trainer.model), average.average):
            assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights.values())
        metrics = trainer.evaluate()
        assert 0 <= metrics["eval_ema_map"] <= 1
        assert metrics["eval_loss"] == pytest.approx(metrics["eval_ema_loss"], rel=0.5)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02, abs=0.01)
    assert losses["bfloat16"] != losses["float32"]


def test_evaluation_with_half_weights(tmp_path):
    """`bf16_full_eval`: segments and scores that become metrics are float32 again."""
    expected = make_trainer(tmp_path / "whole").evaluate()
    metrics = make_trainer(tmp_path / "half", bf16_full_eval=True).evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=0.02)


def test_float16_on_the_cpu_is_float32(tmp_path):
    """What docs/performance.md warns of: accelerate leaves --fp16 out on a CPU, without a word."""
    weights = []
    for is_half in (False, True):
        trainer = make_trainer(tmp_path, fp16=is_half)
        trainer.train()
        weights.append(weights_of(trainer.model))
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


@pytest.mark.parametrize("chosen_by", ["option", "launcher"])
def test_accelerate_in_bfloat16(chosen_by, tmp_path, monkeypatch):
    """The plain loop takes --bf16, and what `accelerate launch --mixed_precision bf16` says."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    import train_accelerate

    seen = []
    forward = ClassificationHead.forward

    def spy(self, x, padding):
        if self.training:
            seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return forward(self, x, padding)

    monkeypatch.setattr(ClassificationHead, "forward", spy)
    if chosen_by == "launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    options = ["--bf16", "true"] if chosen_by == "option" else []
    options += ["--use_cpu", "true", "--num_train_epochs", "1", "--output_dir", "out"]
    monkeypatch.setattr(sys, "argv", ["train_accelerate.py", "recipe.yaml", *options])
    train_accelerate.main()
    assert {*seen} == {torch.bfloat16}
    assert all(weight.dtype == torch.float32 for weight in load_file("out/model.safetensors").values())
    assert 0 <= json.loads(Path("out/metrics.json").read_text())["map"] <= 1
