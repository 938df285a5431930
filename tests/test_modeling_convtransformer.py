"""The models: padding, causality, backends, positions, initialisation, saving, precision, errors.

At the start drop-path scales are 1e-4 and norms are the identity, which would hide a leak: `randomize` draws every
parameter (and every running statistic) before outputs are compared.
"""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForObjectDetection
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerForTemporalActionLocalization,
    ConvTransformerModel,
    attention_convtransformer,
)
from modeling_convtransformer.modeling_convtransformer import (
    AffineDropPath,
    BatchNorm,
    ConvTransformerRotaryEmbedding,
    MaskedConv1d,
    MaskedMaxPool1d,
    PositionTable,
    RegressionHead,
    rotate,
    sinusoidal_positions,
)

# float32: the same sums in another order (other lengths choose other kernels); values are around 1 to 10.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

SMALL = {"n_in": 6, "n_embd": 16, "n_head": 4, "arch": (1, 1, 3), "max_len": 32, "num_labels": 3, "init_loss_norm": 50}

WINDOWS = {"mha_win_size": 5}
PLAIN = {"use_rope": False, "use_swiglu": False, "use_rms_norm": False, "path_pdrop": 0}  # every switch off

# Every switch alone, and together. Each is tested for what must hold under every setting.
VARIANTS = {
    "default": {},
    "plain": PLAIN,
    "only_rope": {**PLAIN, "use_rope": True},
    "only_swiglu": {**PLAIN, "use_swiglu": True},
    "only_rms_norm": {**PLAIN, "use_rms_norm": True},
    "only_batch_norm": {**PLAIN, "use_batch_norm": True},
    "only_abs_pe": {**PLAIN, "use_abs_pe": True},
    "only_learned_pe": {**PLAIN, "use_learned_pe": True},
    "only_rel_pe": {**PLAIN, **WINDOWS, "use_rel_pe": True},
    "only_rel_pe_global": {**PLAIN, "use_rel_pe": True, "rel_pe_max_distance": 5},
    "rope_linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "rope_dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
    "rope_yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "rope_longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": [1.0, 1.0],
            "long_factor": [1.5, 4.0],
        }
    },
    "only_drop_path": {**PLAIN, "path_pdrop": 0.1},
    "window": WINDOWS,
    "window_plain": {**PLAIN, **WINDOWS},
    "mixed_windows": {"mha_win_size": [9, -1, 3, 1]},
    "mixed_windows_rel_pe": {"mha_win_size": [9, -1, 3, 1], "use_rel_pe": True},
    "mixed_windows_rel_pe_v1": {"mha_win_size": [9, -1, 3, 1], "use_rel_pe": True, "rel_pe_max_distance": 0},
    "window_over_all": {"mha_win_size": 101, "use_rel_pe": True},
    "all": {**WINDOWS, "use_abs_pe": True, "use_rel_pe": True, "n_kv_head": 2, "fpn_type": "fpn"},
    "no_drop_path": {"path_pdrop": 0},
    "embedding_without_norm": {"with_ln": False},
    "no_embedding": {"n_in": 16, "arch": (0, 1, 3)},
    "no_stem": {"arch": (2, 0, 2)},
    "no_branch": {"arch": (1, 2, 0)},
    "kernel_5": {"n_embd_ks": 5, "head_kernel_size": 5},
    "gqa": {"n_kv_head": 2},
    "mqa": {"n_kv_head": 1},
    "mqa_window": {"n_kv_head": 1, **WINDOWS},
    "streams": {"n_in": [2, 4]},
    "streams_of_given_width": {"n_in": [2, 4], "stream_dims": [5, 9]},
    "scale_4": {"scale_factor": 4, "arch": (1, 1, 2)},
    "fpn": {"fpn_type": "fpn", "fpn_dim": 20, "head_dim": 12},
    "fpn_start_1": {"fpn_type": "fpn", "fpn_start_level": 1},
    "fpn_scale_4": {"fpn_type": "fpn", "scale_factor": 4, "arch": (1, 1, 2)},
    "start_2": {"fpn_start_level": 2},
    "neck_and_heads_without_norm": {"fpn_type": "fpn", "fpn_with_ln": False, "head_with_ln": False},
    "identity_without_norm": {"fpn_with_ln": False, "head_num_layers": 1},
    "conv_backbone": {"backbone_type": "conv", "path_pdrop": 0},
    "conv_backbone_fpn": {"backbone_type": "conv", "fpn_type": "fpn", "with_ln": False},
    "causal": {"is_causal": True},
    "causal_window": {"is_causal": True, **WINDOWS},
    "causal_plain": {**PLAIN, "is_causal": True, "use_learned_pe": True},
    "causal_rel_pe": {"is_causal": True, "use_rel_pe": True, "mha_win_size": 9},
    "causal_rel_pe_global": {"is_causal": True, "use_rel_pe": True, "rel_pe_max_distance": 5},
    "causal_rel_pe_over_all": {"is_causal": True, "use_rel_pe": True, "mha_win_size": 101, "use_rope": False},
    "causal_conv": {"is_causal": True, "backbone_type": "conv", "fpn_type": "fpn"},
    "causal_scale_4": {"is_causal": True, "scale_factor": 4, "arch": (1, 1, 2), "fpn_type": "fpn"},
}
CAUSAL = [name for name in VARIANTS if name.startswith("causal")]


def randomize(model, seed=0):
    """Draws every parameter and running statistic: norm weights around 1, all else normal with deviation 0.1 to 0.5."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, std):
        return torch.randn(tensor.shape, generator=generator) * std

    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if (name == "weight" and parameter.dim() == 1) or name == "scale":  # norms, drop path, levels
                    parameter.copy_(1 + normal(parameter, 0.2))
                elif name == "table":
                    parameter.copy_(normal(parameter, 0.5))
                elif parameter.dim() > 1:  # keeps the scale of what passes
                    fan_in = parameter[0].numel()
                    parameter.copy_(normal(parameter, min(1 / math.sqrt(fan_in), 0.5)))
                else:
                    parameter.copy_(normal(parameter, 0.3))
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.copy_(normal(module.running_mean, 0.3))
                module.running_var.copy_(1 + normal(module.running_var, 0.2).abs())
    return model


def make_config(implementation="sdpa", **fields):
    return ConvTransformerConfig(**{**SMALL, **fields}, attn_implementation=implementation)


def make_detector(implementation="sdpa", seed=0, **fields):
    torch.manual_seed(seed)
    model = ConvTransformerForTemporalActionLocalization(make_config(implementation, **fields))
    return randomize(model, seed).eval()


def width_of(config):
    return sum(config.stream_widths)


def count_of_points(config, length):
    return sum(math.ceil(length / stride) for stride in config.detector_strides)


def run(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


def labels_of(*samples):
    return [{"segments": torch.tensor(s).reshape(-1, 2), "class_labels": torch.tensor(c).long()} for s, c in samples]


LABELS = labels_of(([[1.0, 4.5], [3.0, 19.0]], [0, 2]), ([[5.5, 8.0]], [1]))


# --- Forward ---------------------------------------------------------------------------------------------------------------------


def test_default_config_at_many_lengths():
    torch.manual_seed(0)
    config = ConvTransformerConfig()
    model = ConvTransformerForTemporalActionLocalization(config).eval()
    for batch, length in [(1, 1), (1, 7), (3, 777), (2, 2304)]:
        output = run(model, torch.randn(batch, length, 2048))
        points = sum(math.ceil(length / stride) for stride in (1, 2, 4, 8, 16, 32))
        assert output.logits.shape == (batch, points, 2)
        assert output.pred_segments.shape == (batch, points, 2)
        assert output.point_mask.shape == output.point_levels.shape == (batch, points)
        assert output.point_mask.dtype == output.point_levels.dtype == torch.long
        assert (output.point_mask == 1).all()
        assert output.logits.isfinite().all()
        assert output.pred_segments.isfinite().all()
        # a fresh model: the prior, and segments that hold their point
        assert output.logits.mean().item() == pytest.approx(-math.log(99), abs=0.5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_points_of_every_length(variant):
    model = make_detector(**VARIANTS[variant])
    config = model.config
    for length in (1, 2, 3, 7, 33, 40):
        torch.manual_seed(length)
        mask = torch.ones(2, length)
        mask[1, length // 2 + 1 :] = 0
        output = run(model, torch.randn(2, length, width_of(config)), mask)
        assert output.logits.shape == (2, count_of_points(config, length), 3)
        assert output.logits.isfinite().all()
        positions, levels, valid = [], [], []
        for level, stride in enumerate(config.detector_strides):
            for position in range(0, length, stride):
                positions.append(float(position))
                levels.append(level)
                valid.append([1, int(mask[1, position])])
        assert output.point_levels.tolist() == [levels, levels]
        assert output.point_mask.T.tolist() == valid
        starts, ends = output.pred_segments.unbind(-1)
        assert (starts <= torch.tensor(positions)).all()
        assert (ends >= torch.tensor(positions)).all()
        padded = output.point_mask[1] == 0
        assert starts[1, padded].tolist() == torch.tensor(positions)[padded].tolist()  # nothing is predicted there


def test_segments_are_points_plus_offsets_in_strides():
    model = make_detector()
    features = torch.randn(1, 13, 6, generator=torch.Generator().manual_seed(0))
    collected = []
    model.segment_head.register_forward_hook(lambda module, args, output: collected.append(output))
    output = run(model, features)
    offsets = torch.cat(collected, dim=1)
    assert (offsets > 0).float().mean() > 0.2  # not all cut off by the ReLU
    expected, row = [], 0
    for stride in (1, 2, 4, 8):
        for position in range(0, 13, stride):
            before, after = offsets[0, row].tolist()
            expected.append([position - before * stride, position + after * stride])
            row += 1
    np.testing.assert_allclose(output.pred_segments[0].numpy(), expected, rtol=1e-6, atol=1e-5)


# --- Padding ---------------------------------------------------------------------------------------------------------------------


def run_both(model, features, mask=None):
    """The detector's output and its backbone's, of one forward pass."""
    pyramids = []
    hook = model.model.register_forward_hook(lambda module, args, output: pyramids.append(output))
    output = run(model, features, mask)
    hook.remove()
    return output, pyramids[0]


def make_samples(config, lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, length, width_of(config), generator=generator) for length in lengths]


def pad(samples, garbage, length):
    features = torch.full((len(samples), length, samples[0].shape[2]), garbage)
    mask = torch.zeros(len(samples), length, dtype=torch.long)
    for row, sample in enumerate(samples):
        features[row, : sample.shape[1]] = sample
        mask[row, : sample.shape[1]] = 1
    return features, mask


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_padded_sample_equals_the_same_sample_alone(variant, implementation):
    model = make_detector(implementation, **VARIANTS[variant])
    longest = 45  # beyond max_len (32)
    samples = make_samples(model.config, [19, longest, 1, longest - 3, 8])
    alone = [run_both(model, sample) for sample in samples]
    for garbage, order in [(0.0, [0, 1, 2]), (1e6, [1, 2, 3]), (math.nan, [2, 4, 0, 3]), (math.inf, [3, 0, 1, 4])]:
        output, pyramid = run_both(model, *pad([samples[index] for index in order], garbage, longest))
        for row, index in enumerate(order):
            expected, expected_pyramid = alone[index]
            valid = output.point_mask[row] == 1
            assert valid.sum() == expected.logits.shape[1]
            torch.testing.assert_close(output.logits[row, valid], expected.logits[0], **CLOSE)
            torch.testing.assert_close(output.pred_segments[row, valid], expected.pred_segments[0], **CLOSE)
            for level, feature_map in enumerate(expected_pyramid.feature_maps):
                steps = feature_map.shape[1]
                padded = pyramid.feature_maps[level][row]
                assert pyramid.feature_masks[level][row].tolist() == [1] * steps + [0] * (len(padded) - steps)
                torch.testing.assert_close(padded[:steps], feature_map[0], **CLOSE)
                if model.config.backbone_type == "convTransformer" and level + model.config.arch[1] > 0:
                    assert (padded[steps:] == 0).all()  # what a transformer block writes


@pytest.mark.parametrize("variant", ["default", "window", "fpn", "causal_window"])
def test_padding_on_the_left_and_holes_do_not_leak(variant):
    """Whatever padded steps hold, wherever they are, the valid ones are the same."""
    model = make_detector(**VARIANTS[variant])
    torch.manual_seed(0)
    features, mask = torch.randn(2, 30, 6), torch.rand(2, 30) < 0.6
    mask[0, :11] = False
    expected = run(model, features, mask)
    for garbage in (0.0, 1e6, float("nan")):
        output = run(model, features.masked_fill(~mask[..., None], garbage), mask)
        valid = expected.point_mask == 1
        assert torch.equal(output.logits[valid], expected.logits[valid])
        assert torch.equal(output.pred_segments[valid], expected.pred_segments[valid])


def test_without_masked_inputs_padding_leaks_as_in_v1():
    for mask_conv_inputs in (True, False):
        model = make_detector(**PLAIN, mask_conv_inputs=mask_conv_inputs)
        samples = make_samples(model.config, [19, 40])
        output = run(model, *pad(samples, 0.0, 40))  # the padding holds zeros: what leaks is the norms' biases
        difference = []
        for row, sample in enumerate(samples):
            valid = output.point_mask[row] == 1
            difference.append((output.logits[row, valid] - run(model, sample).logits[0]).abs().max().item())
        assert difference[1] < 1e-5  # a sample that fills the batch is the same in either case
        assert difference[0] < 1e-5 if mask_conv_inputs else difference[0] > 0.01


@pytest.mark.parametrize("garbage", [1e6, math.nan])
def test_streams_are_masked_before_they_are_joined_as_in_v1(garbage):
    model = make_detector(**PLAIN, mask_conv_inputs=False, n_in=[2, 4])
    samples = make_samples(model.config, [19, 40])
    zeros, other = (run(model, *pad(samples, filler, 40)) for filler in (0.0, garbage))
    assert torch.equal(zeros.logits, other.logits)


def test_padding_invariance_in_training_mode_with_batch_norm():
    """Statistics count valid steps only, so that they too are the same."""
    fields = {"use_rms_norm": False, "use_batch_norm": True, "path_pdrop": 0}
    torch.manual_seed(0)
    features = torch.randn(2, 20, 6)
    model, padded = make_detector(**fields).train(), make_detector(**fields).train()
    expected = run(model, features)
    wide = torch.cat((features, torch.full((2, 12, 6), float("nan"))), dim=1)
    output = run(padded, wide, torch.arange(32).expand(2, -1) < 20)
    torch.testing.assert_close(output.logits[output.point_mask == 1], expected.logits.flatten(0, 1), **CLOSE)
    for (name, one), (_, other) in zip(model.named_buffers(), padded.named_buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name, **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_full_mask_is_no_mask(variant):
    model = make_detector(**VARIANTS[variant])
    features = torch.randn(2, 21, width_of(model.config), generator=torch.Generator().manual_seed(0))
    expected = run(model, features)
    for mask in (torch.ones(2, 21), torch.ones(2, 21).bool(), torch.ones(2, 21).long()):
        output = run(model, features, mask)
        for key in ("logits", "pred_segments", "point_mask", "point_levels"):
            assert torch.equal(output[key], expected[key])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "variant", ["default", "plain", "window", "all", "causal", "conv_backbone", "only_batch_norm"]
)
def test_a_sample_without_a_valid_step_stays_finite(variant, implementation):
    for dtype in (torch.float32, torch.bfloat16):
        model = make_detector(implementation, **VARIANTS[variant]).train().to(dtype)
        mask = torch.ones(2, 20)
        mask[0] = 0
        features = torch.full((2, 20, 6), float("nan"))
        features[1] = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
        output = model(features, mask, labels=labels_of(([], []), ([[2.0, 9.0]], [1])))
        output.loss.backward()
        assert output.logits.isfinite().all()
        assert (output.point_mask[0] == 0).all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        output = model(features[:1], mask[:1], labels=labels_of(([], [])))
        assert output.loss.item() == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_eager_equals_sdpa(variant):
    eager, sdpa = (make_detector(implementation, **VARIANTS[variant]) for implementation in ("eager", "sdpa"))
    torch.manual_seed(0)
    features = torch.randn(2, 41, width_of(eager.config))
    mask = torch.ones(2, 41)
    mask[1, 23:] = 0
    for one in (None, mask):
        expected, output = run(eager, features, one), run(sdpa, features, one)
        valid = expected.point_mask == 1
        torch.testing.assert_close(output.logits[valid], expected.logits[valid], **CLOSE)
        torch.testing.assert_close(output.pred_segments[valid], expected.pred_segments[valid], **CLOSE)


# --- Causality -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", CAUSAL)
def test_the_future_changes_nothing(variant, implementation):
    model = make_detector(implementation, **VARIANTS[variant])
    torch.manual_seed(0)
    features = torch.randn(1, 32, 6)
    before, before_pyramid = run_both(model, features)
    for now in (0, 1, 7, 16, 30):
        changed = features.clone()
        changed[:, now + 1 :] = torch.randn(1, 31 - now, 6) * 10
        after, after_pyramid = run_both(model, changed)
        row = 0
        for level, stride in enumerate(model.config.strides):
            seen = now // stride + 1  # step j of a level sees inputs up to j * stride
            one, other = before_pyramid.feature_maps[level], after_pyramid.feature_maps[level]
            torch.testing.assert_close(other[:, :seen], one[:, :seen], **CLOSE)
            if seen < one.shape[1]:  # what comes later shows the change, so that the test can fail
                assert (one[:, seen:] - other[:, seen:]).abs().max() > 1e-2
            rows = slice(row, row + seen)  # the neck and the heads look back only, too
            torch.testing.assert_close(after.logits[:, rows], before.logits[:, rows], **CLOSE)
            torch.testing.assert_close(after.pred_segments[:, rows], before.pred_segments[:, rows], **CLOSE)
            row += one.shape[1]


@pytest.mark.parametrize("variant", ["causal", "causal_window", "causal_conv"])
def test_a_causal_model_sees_the_past(variant):
    model = make_detector(**VARIANTS[variant])
    torch.manual_seed(0)
    features = torch.randn(1, 32, 6)
    changed = features.clone()
    changed[:, 14] += 5
    one, other = run(model.model, features), run(model.model, changed)
    assert (one.feature_maps[0][:, 15] - other.feature_maps[0][:, 15]).abs().max() > 1e-3


def test_a_model_that_is_not_causal_sees_the_future():
    model = make_detector()
    torch.manual_seed(0)
    features = torch.randn(1, 32, 6)
    changed = features.clone()
    changed[:, 31] += 5
    assert (run(model, features).logits[:, 0] - run(model, changed).logits[:, 0]).abs().max() > 1e-4


# --- Smallest parts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("is_causal", [False, True])
def test_masked_convolution_by_loops(is_causal, stride):
    torch.manual_seed(0)
    config, kernel = make_config(is_causal=is_causal), 5
    conv = MaskedConv1d(config, 3, 2, kernel, stride)
    x, padding = torch.randn(1, 11, 3), torch.zeros(1, 11, 1, dtype=torch.bool)
    padding[:, 8:] = True
    output = conv(x.masked_fill(padding, float("nan")), padding)
    expected = torch.zeros(1, -(-11 // stride), 2)
    for step in range(expected.shape[1]):
        center = step * stride
        if center >= 8:
            continue
        total = conv.bias.detach().clone()
        for tap in range(kernel):
            source = center + tap - (kernel - 1 if is_causal else kernel // 2)
            if 0 <= source < 8:
                total += conv.weight[:, :, tap].detach() @ x[0, source]
        expected[0, step] = total
    torch.testing.assert_close(output, expected, **CLOSE)


@pytest.mark.parametrize("mask_input", [True, False])
@pytest.mark.parametrize("stride", [2, 4])
def test_masked_pooling_by_loops(stride, mask_input):
    torch.manual_seed(0)
    pool = MaskedMaxPool1d(make_config(mask_conv_inputs=mask_input), stride)
    padding = torch.zeros(1, 11, 1, dtype=torch.bool)
    padding[:, 7:] = True
    x = (torch.randn(1, 11, 3) - 3).masked_fill(padding, 0)  # negative: a zero of the padding would win
    output = pool(x, padding)
    for step in range(-(-11 // stride)):
        center = step * stride
        near = range(max(center - stride // 2, 0), min(center + stride // 2, 10) + 1)
        near = [source for source in near if source < 7 or not mask_input]
        expected = x[0, near].amax(0) if center < 7 else torch.zeros(3)
        torch.testing.assert_close(output[0, step], expected, rtol=0, atol=0)


def test_batch_norm_counts_valid_steps_only():
    torch.manual_seed(0)
    norm = randomize(BatchNorm(4))
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    x = torch.randn(3, 10, 4) * 2 + 1
    valid = torch.arange(10)[None] < torch.tensor([10, 4, 1])[:, None]
    filled = x.masked_fill(~valid[..., None], float("nan"))
    output = norm.train()(filled, ~valid[..., None])
    # torch's own on the rows that count; the momentum is torch's default
    expected = F.batch_norm(x[valid], mean, var, norm.weight, norm.bias, training=True, momentum=0.1, eps=norm.eps)
    torch.testing.assert_close(output[valid], expected, **CLOSE)
    torch.testing.assert_close(norm.running_mean, mean, **CLOSE)
    torch.testing.assert_close(norm.running_var, var, **CLOSE)
    assert norm.num_batches_tracked == 1
    output = norm.eval()(x, None)
    expected = F.batch_norm(x.flatten(0, 1), mean, var, norm.weight, norm.bias, eps=norm.eps)
    torch.testing.assert_close(output.flatten(0, 1), expected, **CLOSE)
    whole = norm.train()(x, None)
    expected = F.batch_norm(x.flatten(0, 1), None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
    torch.testing.assert_close(whole.flatten(0, 1), expected, **CLOSE)


def test_gradient_of_batch_norm():
    torch.manual_seed(0)
    norm = randomize(BatchNorm(4)).train()
    valid = torch.arange(8)[None] < torch.tensor([8, 3])[:, None]
    x, direction = torch.randn(2, 8, 4, requires_grad=True), torch.randn(11, 4)
    (gradient,) = torch.autograd.grad((norm(x, ~valid[..., None])[valid] * direction).sum(), x)
    output = F.batch_norm(x[valid], None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
    (expected,) = torch.autograd.grad((output * direction).sum(), x)
    torch.testing.assert_close(gradient, expected, **CLOSE)


def test_drop_path():
    torch.manual_seed(0)
    drop = AffineDropPath(5, 0.25)
    assert torch.equal(drop.scale, torch.full((5,), 1e-4))
    with torch.no_grad():
        drop.scale.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0]))
    skipped, x = torch.randn(20_000, 2, 5), torch.randn(20_000, 2, 5)
    torch.testing.assert_close(drop.eval()(skipped, x), skipped + x * drop.scale)  # no scale of the rate at inference
    output = drop.train()(torch.zeros(20_000, 2, 5), torch.ones(20_000, 2, 5)).detach()
    kept = output[:, 0, 0] != 0
    # whole samples, scaled such that the mean stays: 0.75 +- 4 standard errors of 0.003
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.0125)
    torch.testing.assert_close(output[kept], (drop.scale.detach() / 0.75).expand(int(kept.sum()), 2, 5))
    assert (output[~kept] == 0).all()


def test_drop_path_is_off_in_evaluation():
    model = make_detector(path_pdrop=0.5)
    features = torch.randn(8, 20, 6, generator=torch.Generator().manual_seed(0))
    expected = run(model, features).logits
    assert torch.equal(run(model, features).logits, expected)
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(run(model, features).logits, expected)
    assert not [name for name, _ in make_detector(path_pdrop=0).named_parameters() if "drop_path" in name]


# --- Positions -------------------------------------------------------------------------------------------------------------------


def test_sinusoids_equal_numpy():
    length, width = 3000, 48
    step, channel = np.arange(length, dtype=np.float64)[:, None], np.arange(width)
    angle = step / 10000.0 ** (2.0 * (channel // 2) / width)
    expected = np.where(channel % 2 == 0, np.sin(angle), np.cos(angle)) / np.sqrt(width)
    got = sinusoidal_positions(length, width, torch.device("cpu"))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-7)  # one rounding to float32


@pytest.mark.parametrize("variant", ["only_abs_pe", "only_learned_pe", "causal_plain"])
def test_tables_stretch_over_each_samples_own_length(variant):
    """Beyond max_len (32) too, a sample gives the same alone and padded, and gradients reach every row."""
    model = make_detector(**VARIANTS[variant])
    samples = make_samples(model.config, [100, 33, 32, 7])
    output = run(model, *pad(samples, math.nan, 100))
    for row, sample in enumerate(samples):
        expected, valid = run(model, sample), output.point_mask[row] == 1
        torch.testing.assert_close(output.logits[row, valid], expected.logits[0], **CLOSE)
        torch.testing.assert_close(output.pred_segments[row, valid], expected.pred_segments[0], **CLOSE)
    if model.config.use_learned_pe:
        model(samples[0]).logits.sum().backward()
        assert model.model.embedding.positions.table.grad.abs().sum(-1).min() > 0


@pytest.mark.parametrize("learned", [False, True])
def test_positions_are_added_once_and_stretch_beyond_the_table(learned):
    torch.manual_seed(0)
    config = make_config(use_abs_pe=not learned, use_learned_pe=learned, max_len=8)
    positions = randomize(PositionTable(config))
    table = positions.table.detach() if learned else sinusoidal_positions(8, 16, torch.device("cpu"))
    zeros = torch.zeros(1, 5, 16)
    torch.testing.assert_close(positions(zeros, None)[0], table[:5], rtol=0, atol=0)
    torch.testing.assert_close(positions(torch.zeros(1, 8, 16), None)[0], table, rtol=0, atol=0)
    padding = torch.tensor([False, False, True, True, True])[None, :, None]
    assert (positions(zeros, padding)[0, 2:] == 0).all()
    # 20 steps: the middle of step i lies at (i + 0.5) * 8 / 20 - 0.5 of the table, and the ends hold
    got = positions(torch.zeros(1, 20, 16), None)[0]
    for step in range(20):
        place = min(max((step + 0.5) * 8 / 20 - 0.5, 0), 7)
        below, share = int(place), place - int(place)
        expected = table[below] * (1 - share) + table[min(below + 1, 7)] * share
        torch.testing.assert_close(got[step], expected, rtol=0, atol=1e-6)


def test_rotary_scores_depend_on_differences_only():
    torch.manual_seed(0)
    rotary = ConvTransformerRotaryEmbedding(make_config(n_embd=32))
    query, key = torch.randn(2, 1, 4, 1, 8)
    scores = {}
    for start in (0, 5, 1000):
        positions = torch.arange(start, start + 30)[None]
        cos, sin = rotary(query, positions)
        # float32 angles of 1000 radians are known to 6e-5
        rotated = rotate(query.expand(-1, -1, 30, -1), cos, sin), rotate(key.expand(-1, -1, 30, -1), cos, sin)
        scores[start] = rotated[0] @ rotated[1].transpose(2, 3)
    torch.testing.assert_close(scores[5], scores[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores[1000], scores[0], rtol=1e-3, atol=2e-3)
    for difference in range(-29, 30):
        diagonal = scores[0].diagonal(difference, 2, 3)
        assert (diagonal - diagonal[..., :1]).abs().max() < 1e-4
    assert scores[0].std() > 0.1  # differences do matter


def test_rotary_angles_by_hand():
    rotary = ConvTransformerRotaryEmbedding(make_config(rope_parameters={"rope_theta": 100.0}))
    cos, sin = rotary(torch.zeros(1), torch.arange(7)[None])
    # 4 channels a head: frequencies 1 and 100 ** -0.5 = 0.1, each for one channel of both halves
    angles = np.arange(7)[:, None] * np.array([1.0, 0.1, 1.0, 0.1])
    np.testing.assert_allclose(cos[0].numpy(), np.cos(angles), rtol=0, atol=1e-6)
    np.testing.assert_allclose(sin[0].numpy(), np.sin(angles), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_angles_are_float32_in_half_precision(dtype):
    config = make_config(n_embd=64)
    exact = ConvTransformerRotaryEmbedding(config)
    half = ConvTransformerRotaryEmbedding(config).to(dtype)
    assert half.inv_freq.dtype == torch.float32
    positions = torch.arange(2000, 2100)[None]
    expected, _ = exact(torch.zeros(1), positions)
    cos, _ = half(torch.zeros(1, dtype=dtype), positions)
    assert cos.dtype == dtype
    assert torch.equal(cos, expected.to(dtype))  # only the last step is rounded


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0},
        {**VARIANTS["rope_longrope"]["rope_parameters"], "rope_theta": 10000.0},
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_other_kinds_of_rotary_positions(parameters, tmp_path):
    model = make_detector(rope_parameters=parameters)
    other = make_detector()
    features = torch.randn(1, 50, 6, generator=torch.Generator().manual_seed(0))
    output = run(model, features)
    assert (output.logits - run(other, features).logits).abs().max() > 1e-4  # it does something
    model.save_pretrained(tmp_path)
    loaded = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path)
    assert torch.equal(run(loaded, features).logits, output.logits)
    if parameters["rope_type"] == "linear":
        torch.testing.assert_close(model.model.rotary_emb.inv_freq, other.model.rotary_emb.inv_freq / 4)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize("head_dim", [None, 8, 24])
def test_rotary_angles_are_those_of_transformers_for_each_length(rope_type, head_dim):
    """Below max_len and above, of several samples at once, whatever was asked before."""
    parameters = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 500.0}
    config = make_config(n_embd=64, rope_parameters=parameters)  # heads of 16 channels; max_len 32
    rotary, width = ConvTransformerRotaryEmbedding(config, head_dim), head_dim or 16
    plain = ConvTransformerConfig(
        n_embd=2 * width, n_head=2, head_dim=width, max_len=32, rope_parameters=dict(parameters)
    )
    positions = torch.arange(200)[None]
    for lengths in ([200, 33, 32, 1], [7], [64]):
        cos, sin = rotary(torch.zeros(1), positions, torch.tensor(lengths))
        for row, length in enumerate(lengths):
            frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](plain, seq_len=length)
            angles = (positions[0, :, None] * frequencies).repeat(1, 2)
            one = row if rope_type == "dynamic" else 0
            assert len(cos) == (len(lengths) if rope_type == "dynamic" else 1)
            # frequencies are off by two roundings to float32, 2e-7 of up to 200 radians
            torch.testing.assert_close(cos[one], angles.cos() * scaling, rtol=0, atol=1e-4)
            torch.testing.assert_close(sin[one], angles.sin() * scaling, rtol=0, atol=1e-4)


def test_dynamic_rotary_positions_keep_nothing_of_earlier_recordings():
    model = make_detector(**VARIANTS["rope_dynamic"])
    short, long = make_samples(model.config, [20, 90])
    expected = run(model, short).logits
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    run(model, long)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert torch.equal(run(model, short).logits, expected)
    assert torch.equal(expected, run(make_detector(), short).logits)  # within max_len: as trained


def test_trained_weights_load_with_other_rotary_positions(tmp_path):
    """Scaling needs no training, and keeps the theta that the weights were trained with."""
    make_detector(rope_parameters={"rope_theta": 500.0}).save_pretrained(tmp_path)
    for rope_type in ("linear", "dynamic", "yarn"):
        parameters = {"rope_type": rope_type, "factor": 4.0}
        loaded = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path, rope_parameters=parameters)
        assert parameters == {"rope_type": rope_type, "factor": 4.0}
        assert loaded.config.rope_parameters["rope_theta"] == 500.0
        expected = make_detector(rope_parameters={**parameters, "rope_theta": 500.0})
        features = torch.randn(1, 50, 6, generator=torch.Generator().manual_seed(0))
        assert torch.equal(run(loaded.eval(), features).logits, run(expected, features).logits)
    other = {"rope_type": "default", "rope_theta": 7.0}
    loaded = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path, rope_parameters=other)
    assert loaded.config.rope_parameters["rope_theta"] == 7.0


@pytest.mark.parametrize(
    "fields",
    [{}, VARIANTS["rope_linear"], VARIANTS["rope_dynamic"], VARIANTS["rope_yarn"], VARIANTS["only_rel_pe_global"]],
    ids=str,
)
def test_lengths_beyond_max_len_need_no_table(fields):
    """Nothing that is stored depends on max_len, and only "dynamic" and "yarn" ask for it."""
    model, longer = make_detector(**fields), make_detector(**fields, max_len=1000)
    state = longer.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    (features,) = make_samples(model.config, [300])
    output, expected = run(model, features), run(longer, features)
    assert output.logits.isfinite().all()
    is_same = fields.get("rope_parameters", {}).get("rope_type") in (None, "linear")
    assert torch.equal(output.logits, expected.logits) == is_same


# --- Initialisation --------------------------------------------------------------------------------------------------------------


def check_start(model, config, loaded=None):
    """What a fresh model starts from, but for the part that was loaded."""
    for name, module in model.named_modules():
        if loaded and name.startswith(loaded):
            continue
        if isinstance(module, nn.Linear | nn.Conv1d):
            # kaiming uniform with a = sqrt(5) is uniform within 1 / sqrt(fan in)
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert module.weight.abs().max() <= bound, name
            if module.weight.numel() > 200:
                assert module.weight.abs().max() > 0.9 * bound, name
                # standard deviation of a uniform distribution
                assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2), name
            if module.bias is not None and name != "class_head.output":
                assert (module.bias == float(name == "decoder.segment_head.output")).all(), name
        elif isinstance(module, AffineDropPath):
            assert (module.scale == 1e-4).all(), name
        elif isinstance(module, RegressionHead):
            assert (module.scale == 1).all()
        elif isinstance(module, PositionTable) and module.table is not None:
            assert 0.015 < module.table.std() < 0.025
            assert module.table.abs().max() <= 2.0
        elif type(module).__name__ in ("RMSNorm", "LayerNorm", "BatchNorm"):
            assert (module.weight == 1).all(), name
            if getattr(module, "bias", None) is not None:
                assert (module.bias == 0).all(), name
        if getattr(module, "relative_bias", None) is not None:
            assert module.relative_bias.std().item() == pytest.approx(math.sqrt(2 / config.n_embd), rel=0.4)
    if hasattr(model, "decoder"):
        bias = model.match.bias  # to which the decoder adds
        assert bias.item() == pytest.approx(-math.log(0.98 / 0.02), rel=1e-6)
    if hasattr(model, "class_head"):
        expected = [-math.log(0.98 / 0.02)] * config.num_labels
        for one in config.empty_labels:
            expected[one] = -math.log((1 - 1e-6) / 1e-6)
        np.testing.assert_allclose(model.class_head.output.bias.detach().numpy(), expected, rtol=1e-6)
        assert model.criterion.loss_normalizer.item() == config.init_loss_norm
        assert model.criterion.loss_normalizer.dtype == torch.float32


START = {"cls_prior_prob": 0.02, "empty_labels": [1], "num_labels": 4, "init_loss_norm": 123, "n_embd": 32}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rms_norm": False, "with_ln": False, "fpn_type": "fpn", "fpn_with_ln": False, "use_learned_pe": True},
        {"use_rms_norm": False, "use_batch_norm": True, "use_rel_pe": True, **WINDOWS},
        {"backbone_type": "conv", "n_in": [3, 3]},
    ],
    ids=["default", "layer_norm", "batch_norm", "conv"],
)
def test_start(fields):
    torch.manual_seed(0)
    config = make_config(**START, **fields)
    check_start(ConvTransformerForTemporalActionLocalization(config), config)
    check_start(ConvTransformerModel(config), config)


@pytest.mark.parametrize("use_init_context", [False, True], ids=["whole", "sharded"])
def test_a_backbone_checkpoint_starts_a_detector(use_init_context, tmp_path):
    torch.manual_seed(0)
    fields = {**START, "use_learned_pe": True, "fpn_type": "fpn"}
    backbone = randomize(ConvTransformerModel(make_config(**fields)))
    backbone.save_pretrained(tmp_path, max_shard_size="20KB" if use_init_context else "5GB")
    model, info = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not [key for key in info["missing_keys"] if key.startswith("model.")]
    for name, parameter in backbone.named_parameters():
        assert torch.equal(model.model.get_parameter(name), parameter), name
    check_start(model, model.config, loaded="model.")
    assert model.criterion.loss_normalizer.item() == 123
    output = run(model, torch.randn(1, 9, 6))
    assert output.logits.isfinite().all()


def test_a_detector_checkpoint_starts_a_backbone_and_other_classes(tmp_path):
    detector = make_detector()
    detector.save_pretrained(tmp_path)
    backbone = ConvTransformerModel.from_pretrained(tmp_path)
    for name, parameter in detector.model.named_parameters():
        assert torch.equal(backbone.get_parameter(name), parameter), name
    model = ConvTransformerForTemporalActionLocalization.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True
    )
    np.testing.assert_allclose(model.class_head.output.bias.detach().numpy(), [-math.log(99)] * 5, rtol=1e-6)
    assert torch.equal(model.segment_head.output.weight, detector.segment_head.output.weight)


# --- Saving ----------------------------------------------------------------------------------------------------------------------


def assert_same_state(model, other):
    state, other_state = model.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other_state[name].dtype, name
        assert torch.equal(tensor, other_state[name]), name
    for (name, tensor), (_, other_tensor) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(tensor, other_tensor), name  # those that are not saved, too


@pytest.mark.parametrize(
    "variant", ["default", "all", "only_batch_norm", "only_learned_pe", "streams", "conv_backbone"]
)
def test_save_and_load(variant, tmp_path):
    model = make_detector(**VARIANTS[variant])
    model.criterion.loss_normalizer.fill_(77.7)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    features, mask = torch.randn(2, 21, 6), torch.ones(2, 21)
    mask[1, 12:] = 0
    expected = run(model, features, mask)
    for load in (ConvTransformerForTemporalActionLocalization, AutoModelForObjectDetection):
        loaded = load.from_pretrained(tmp_path)
        assert type(loaded) is ConvTransformerForTemporalActionLocalization
        assert not loaded.training
        assert_same_state(model, loaded)
        assert loaded.criterion.loss_normalizer.item() == pytest.approx(77.7)
        output = run(loaded, features, mask)
        for key in ("logits", "pred_segments", "point_mask", "point_levels"):
            assert torch.equal(output[key], expected[key])
    assert type(AutoConfig.from_pretrained(tmp_path)) is ConvTransformerConfig
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is ConvTransformerModel
    expected, output = run(model.model, features, mask), run(backbone, features, mask)
    for one, other in zip(expected.feature_maps, output.feature_maps, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["default", "only_batch_norm"])
def test_load_in_half_precision(variant, dtype, tmp_path):
    model = make_detector(**VARIANTS[variant])
    model.criterion.loss_normalizer.fill_(1234.567)
    model.save_pretrained(tmp_path)
    loaded = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path, dtype=dtype)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.to(dtype)), name
    assert loaded.criterion.loss_normalizer.dtype == torch.float32
    assert loaded.criterion.loss_normalizer.item() == pytest.approx(1234.567, rel=1e-7)
    assert_same_state(model.to(dtype), loaded)
    features = torch.randn(2, 21, 6, generator=torch.Generator().manual_seed(0))
    expected, output = run(model, features, labels=LABELS), run(loaded, features, labels=LABELS)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.pred_segments, expected.pred_segments)
    assert torch.equal(output.loss, expected.loss)


def test_overrides_of_a_saved_config(tmp_path):
    make_detector().save_pretrained(tmp_path)
    model = ConvTransformerForTemporalActionLocalization.from_pretrained(
        tmp_path, attn_implementation="eager", path_pdrop=0.5, loss_weight=3.0
    )
    assert model.config._attn_implementation == "eager"
    assert model.criterion.loss_weight == 3.0
    assert {module.rate for module in model.modules() if isinstance(module, AffineDropPath)} == {0.5}
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["path_pdrop"] == 0.1


# --- Precision -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["default", "plain", "all", "only_batch_norm", "causal_window", "conv_backbone"])
def test_half_precision(variant, dtype, implementation):
    model = make_detector(implementation, **VARIANTS[variant])
    torch.manual_seed(0)
    features, mask = torch.randn(2, 21, 6), torch.ones(2, 21)
    mask[1, 12:] = 0
    expected = run(model, features, mask)
    output = run(model.to(dtype), features, mask)
    valid = output.point_mask == 1
    # near the float32 result: bfloat16 has 8 bits, through some ten layers
    assert (output.logits.float() - expected.logits)[valid].abs().mean() < 0.05 * expected.logits[valid].std()
    model.train()
    output = model(features, mask, labels=LABELS)  # features stay float32: the model casts them
    output.loss.backward()
    assert output.logits.dtype == dtype
    assert output.pred_segments.dtype == output.loss.dtype == torch.float32
    assert output.loss_dict["cls_loss"].dtype == output.loss_dict["reg_loss"].dtype == torch.float32
    assert output.logits.isfinite().all()
    assert output.pred_segments.isfinite().all()
    assert output.loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_autocast():
    model = make_detector().train()
    features = torch.randn(2, 21, 6, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(features, labels=LABELS)
    output.loss.backward()
    assert output.loss.dtype == output.pred_segments.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- What else a model of transformers offers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["default", "window", "conv_backbone", "scale_4"])
def test_hidden_states(variant):
    model = make_detector(**VARIANTS[variant])
    config = model.config
    features = torch.randn(2, 21, 6, generator=torch.Generator().manual_seed(0))
    output = run(model.model, features, output_hidden_states=True)
    states = output.hidden_states
    assert len(states) == 1 + config.num_hidden_layers
    assert torch.equal(states[0], run(model.model.embedding, features, None))
    lengths = [21, *(-(-21 // stride) for stride in config.strides)]
    assert [state.shape[1] for state in states] == lengths  # embedding, one stem block, the branch
    for state, feature_map in zip(states[config.arch[1] :], output.feature_maps, strict=True):
        assert torch.equal(state, feature_map)
    assert torch.equal(output.last_hidden_state, output.feature_maps[-1])
    detected = run(model, features, output_hidden_states=True).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(detected, states, strict=True))
    assert run(model, features).hidden_states is None


@pytest.mark.parametrize("variant", ["default", "window", "causal"])
def test_attentions(variant):
    model = make_detector("eager", **VARIANTS[variant])
    torch.manual_seed(0)
    features, mask = torch.randn(2, 21, 6), torch.ones(2, 21).bool()
    mask[1, 12:] = False
    output = run(model, features, mask, output_attentions=True)
    assert len(output.attentions) == model.config.num_hidden_layers
    for weights, stride in zip(output.attentions, (1, 2, 4, 8), strict=True):
        steps = -(-21 // stride)
        assert weights.shape == (2, 4, steps, steps)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, steps), **CLOSE)
        valid = mask[:, ::stride]
        assert (weights[1][:, valid[1]][..., ~valid[1]] == 0).all()  # nobody looks at padding
        if variant == "window":
            offsets = (torch.arange(steps)[None] - torch.arange(steps)[:, None]).abs()
            assert (weights[0][:, offsets > 2] == 0).all()
            assert (weights[0][:, offsets <= 2] > 0).all()
        if variant == "causal":
            assert (weights[0].triu(1) == 0).all()


def test_tuples():
    model = make_detector()
    features = torch.randn(2, 21, 6, generator=torch.Generator().manual_seed(0))
    expected = run(model, features, labels=LABELS)
    output = run(model, features, labels=LABELS, return_dict=False)
    assert isinstance(output, tuple)
    assert torch.equal(output[0], expected.loss)
    assert torch.equal(output[2], expected.logits)
    assert torch.equal(output[3], expected.pred_segments)
    pyramid = run(model.model, features, return_dict=False)
    assert isinstance(pyramid, tuple)
    assert torch.equal(pyramid[0], pyramid[1][-1])


@pytest.mark.parametrize(
    "variant", ["default", "all", "conv_backbone", "rope_dynamic", "only_rel_pe_global", "only_batch_norm"]
)
def test_gradient_checkpointing(variant, monkeypatch):
    monkeypatch.setattr(attention_convtransformer, "_BIAS_BLOCK", 8)  # which is checkpointed itself
    torch.manual_seed(0)
    features, mask = torch.randn(2, 21, 6), torch.ones(2, 21)
    mask[1, 12:] = 0
    gradients = []
    for checkpointing in (False, True):
        model = make_detector(**{**VARIANTS[variant], "path_pdrop": 0}).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(features, mask, labels=LABELS).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0, msg=name)


def test_loss_is_the_same_whatever_the_padding():
    model = make_detector()
    torch.manual_seed(0)
    features = torch.randn(2, 21, 6)
    expected = run(model, features, labels=LABELS)
    wide = torch.cat((features, torch.full((2, 9, 6), float("nan"))), dim=1)
    output = run(model, wide, torch.arange(30).expand(2, -1) < 21, labels=LABELS)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert output.loss_dict["num_positives"] == expected.loss_dict["num_positives"] > 0


@pytest.mark.parametrize(
    ("features", "mask", "words"),
    [
        ((1, 6, 20), None, ["(1, 6, 20)", "(batch, time, 6)", "transpose(1, 2)"]),
        ((1, 20, 7), None, ["(1, 20, 7)", "(batch, time, 6)"]),
        ((20, 6), None, ["(20, 6)", "input_features[None]"]),
        ((6,), None, ["(6,)"]),
        ((1, 0, 6), None, ["no time steps"]),
        ((2, 20, 6), (2, 19), ["attention_mask", "(2, 19)", "(2, 20)"]),
        ((2, 20, 6), (1, 20), ["attention_mask", "(1, 20)"]),
        ((2, 20, 6), (2, 20, 1), ["attention_mask", "(2, 20, 1)"]),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_say_so(features, mask, words):
    model = make_detector()
    for one in (model, model.model):
        with pytest.raises(ValueError, match="expected") as error:
            one(torch.zeros(features), None if mask is None else torch.ones(mask))
        assert [word for word in words if word not in str(error.value)] == []


def test_labels_that_do_not_fit_say_so():
    model = make_detector()
    with pytest.raises(ValueError, match=r"labels\[1\] has the class 3"):
        model(torch.zeros(2, 20, 6), labels=labels_of(([[1.0, 2.0]], [0]), ([[1.0, 2.0]], [3])))
    with pytest.raises(ValueError, match="1 entries for a batch of 2"):
        model(torch.zeros(2, 20, 6), labels=LABELS[:1])


def test_every_parameter_learns():
    for variant in ("default", "all", "streams", "conv_backbone", "fpn_start_1"):
        model = make_detector(**VARIANTS[variant]).train()
        torch.manual_seed(0)
        model(torch.randn(2, 32, 6), labels=LABELS).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, (variant, name)
            # a constant on all keys changes no softmax; a head that predicts 0 everywhere may get none
            if "k_proj.bias" not in name:
                assert (parameter.grad != 0).any(), (variant, name)


def test_a_small_model_learns_one_batch():
    torch.manual_seed(0)
    model = ConvTransformerForTemporalActionLocalization(make_config(path_pdrop=0, init_loss_norm=10)).train()
    features = torch.randn(2, 24, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(features, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", ["use_abs_pe", "use_learned_pe"])
@pytest.mark.parametrize("mask_conv_inputs", [True, False])
def test_positions_stretch_over_what_is_valid(kind, mask_conv_inputs):
    config = ConvTransformerConfig(
        n_in=4, n_embd=8, n_head=2, max_len=16, mask_conv_inputs=mask_conv_inputs, **{kind: True}
    )
    positions = PositionTable(config)
    if positions.table is not None:
        nn.init.normal_(positions.table)
    x = torch.zeros(2, 50, 8)
    padding = torch.zeros(2, 50, 1, dtype=torch.bool)
    padding[1, 30:] = True
    with torch.no_grad():
        table = positions(x[:1, :16], None)[0]
        whole, part = positions(x, padding)
    # What v1 does, by torch's own interpolation; float32, positions computed in another order.
    stretched = F.interpolate(table.T[None], 50, mode="linear", align_corners=False)[0].T
    torch.testing.assert_close(whole, stretched, atol=2e-5, rtol=0)
    valid = F.interpolate(table.T[None], 30, mode="linear", align_corners=False)[0].T
    torch.testing.assert_close(part[:30], valid if mask_conv_inputs else stretched[:30], atol=2e-5, rtol=0)
    assert part[30:].abs().max() == 0


@pytest.mark.parametrize("window", [-1, 5])
def test_compiled_forward_serves_all_lengths(window):
    """No graph break, and lengths are dynamic: once short and long recordings are compiled, no length is compiled anew."""
    torch._dynamo.reset()
    model = make_detector(arch=(1, 1, 1), mha_win_size=window)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)

    def check(length):
        features = torch.randn(1, length, 6)
        with torch.no_grad():
            # the same operations, traced
            torch.testing.assert_close(compiled(features).logits, model(features).logits, atol=1e-5, rtol=1e-5)

    for length in (16, 33, 150):  # windows: one block, several, several on each level
        check(length)
    known = len(graphs)
    for length in (200, 131, 301, 256):
        check(length)
    assert len(graphs) == known
