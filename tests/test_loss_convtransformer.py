"""Targets and losses: v1's numbers, a brute force in plain Python, hand-computed numbers, two processes."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from modeling_convtransformer import ConvTransformerConfig, ConvTransformerForTemporalActionLocalization
from modeling_convtransformer.loss_convtransformer import (
    ConvTransformerLoss,
    assign_targets,
    center_diou_loss,
    pad_labels,
    sigmoid_focal_loss,
)

FIXTURES = Path(__file__).parent / "fixtures"
LOSSES = load_file(FIXTURES / "v1_losses.safetensors")
TARGETS = load_file(FIXTURES / "v1_targets.safetensors")
TARGETS_INFO = json.loads((FIXTURES / "v1_targets.json").read_text())

# The same formula in float32 with another order of operations: a few roundings of 6e-8 of values around 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

RANGES = [(0, 4), (4, 8), (8, 16), (16, 10000)]


def make_grid(length, num_levels=4):
    """Points, strides and ranges of a pyramid with strides 1, 2, 4, ..., as float32."""
    points, strides, ranges = [], [], []
    for level in range(num_levels):
        for position in range(0, length, 2**level):
            points.append(position)
            strides.append(2**level)
            ranges.append(RANGES[level])
    return (torch.tensor(values, dtype=torch.float32) for values in (points, strides, ranges))


def make_loss(**fields):
    config = ConvTransformerConfig(n_embd=16, arch=(1, 1, 3), **{"num_labels": 3, "init_loss_norm": 100, **fields})
    return ConvTransformerLoss(config)


def label(segments, classes):
    return {"segments": torch.tensor(segments).reshape(-1, 2), "class_labels": torch.tensor(classes, dtype=torch.long)}


def random_inputs(length=40, batch=2, num_labels=3, seed=0):
    torch.manual_seed(seed)
    points, strides, ranges = make_grid(length)
    logits = torch.randn(batch, len(points), num_labels, requires_grad=True)
    offsets = (torch.rand(batch, len(points), 2) * 4).requires_grad_()
    mask = torch.ones(batch, len(points), dtype=torch.bool)
    return [logits, offsets, mask, points, strides, ranges]


# Segments of different lengths, so that no two compete as equals.
LABELS = [
    label([[2.0, 5.5], [10.0, 30.0], [11.0, 18.25]], [0, 2, 1]),
    label([[0.5, 39.0]], [1]),
]


# --- The two losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["targets", "targets_smooth"])
def test_focal_loss_equals_v1(name):
    loss = sigmoid_focal_loss(LOSSES["focal/logits"], LOSSES[f"focal/{name}"])
    torch.testing.assert_close(loss, LOSSES[f"focal/{name}_none"], **CLOSE)
    torch.testing.assert_close(loss.sum()[None], LOSSES[f"focal/{name}_sum"], rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.mean()[None], LOSSES[f"focal/{name}_mean"], rtol=1e-5, atol=0)


def test_focal_loss_by_hand():
    # score 0.8: positive 0.25 * 0.2^2 * -ln 0.8, negative 0.75 * 0.8^2 * -ln 0.2
    logit = math.log(0.8 / 0.2)
    loss = sigmoid_focal_loss(torch.tensor([logit, logit]), torch.tensor([1.0, 0.0]))
    expected = [0.25 * 0.04 * -math.log(0.8), 0.75 * 0.64 * -math.log(0.2)]
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-5)
    loss = sigmoid_focal_loss(torch.tensor([logit]), torch.tensor([1.0]), alpha=-1, gamma=0)
    np.testing.assert_allclose(loss.numpy(), [-math.log(0.8)], rtol=1e-5)


def test_gradient_of_focal_loss_by_finite_differences():
    logits, targets = LOSSES["focal/logits"].double(), LOSSES["focal/targets_smooth"].double()

    def focal(x):  # the definition in float64
        p = 1 / (1 + torch.exp(-x))
        entropy = -(targets * p.log() + (1 - targets) * (1 - p).log())
        same = p * targets + (1 - p) * (1 - targets)
        return (0.25 * targets + 0.75 * (1 - targets)) * (1 - same) ** 2 * entropy

    step = 1e-5
    expected = (focal(logits + step) - focal(logits - step)) / (2 * step)
    leaf = LOSSES["focal/logits"].clone().requires_grad_()
    sigmoid_focal_loss(leaf, LOSSES["focal/targets_smooth"]).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_focal_loss_of_extreme_logits_is_finite(value):
    logits = torch.full((2,), value, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([0.0, 1.0]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


def test_distance_iou_loss_equals_v1_values_and_gradients():
    predicted = LOSSES["reg/pred"].clone().requires_grad_()
    loss = center_diou_loss(predicted, LOSSES["reg/target"])
    torch.testing.assert_close(loss, LOSSES["reg/diou_none"], **CLOSE)
    torch.testing.assert_close(loss.sum()[None], LOSSES["reg/diou_sum"], rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.mean()[None], LOSSES["reg/diou_mean"], rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss[2:].sum(), predicted)
    torch.testing.assert_close(gradient[2:], LOSSES["reg/diou_grad_from_row2"], **CLOSE)


def test_distance_iou_loss_by_hand():
    # [-1, 3] against [-2, 2] around a point at 0: intersection 3, union 5, hull 5, centres 1 and 0
    loss = center_diou_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 2.0]]))
    assert loss.item() == pytest.approx(1 - 3 / 5 + (1 / 5) ** 2, abs=1e-6)
    assert center_diou_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0])).item() == pytest.approx(0, abs=1e-6)


def test_losses_are_float32_in_half_precision():
    logits = LOSSES["focal/logits"].bfloat16()
    loss = sigmoid_focal_loss(logits, LOSSES["focal/targets"])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, sigmoid_focal_loss(logits.float(), LOSSES["focal/targets"]), rtol=0, atol=0)
    assert center_diou_loss(LOSSES["reg/pred"].half(), LOSSES["reg/target"]).dtype == torch.float32


# --- Targets ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "center_sample"), [("", "radius"), ("_nocenter", "none")])
def test_targets_equal_v1(suffix, center_sample):
    labels = [{"segments": TARGETS[f"segments{i}"], "class_labels": TARGETS[f"labels{i}"]} for i in range(2)]
    points = TARGETS["points"]
    segments, classes, is_segment = pad_labels(labels, 5, points.device)
    assert is_segment.sum(1).tolist() == [8, 3]
    class_targets, offsets, _ = assign_targets(
        points[:, 0],
        points[:, 3],
        points[:, 1:3],
        segments,
        classes,
        is_segment,
        5,
        center_sample,
        TARGETS_INFO["center_sample_radius"],
    )
    expected = TARGETS[f"gt_cls{suffix}"]
    assert expected.sum() > 20
    torch.testing.assert_close(class_targets, expected, rtol=0, atol=0)
    positive = expected.sum(-1) > 0
    torch.testing.assert_close(offsets[positive], TARGETS[f"gt_offsets{suffix}"][positive], **CLOSE)


def assign_by_loops(points, strides, ranges, segments, classes, center_sample, radius):
    """For each point: the set of its classes, and the offsets that it may learn (several if lengths are equal)."""
    targets = []
    for position, stride, (low, high) in zip(points, strides, ranges, strict=True):
        candidates = []
        for (start, end), label in zip(segments, classes, strict=True):
            region_start, region_end = start, end
            if center_sample == "radius":
                middle = (start + end) / 2
                region_start, region_end = max(start, middle - radius * stride), min(end, middle + radius * stride)
            farther = max(position - start, end - position)
            if region_start < position < region_end and low <= farther <= high:
                offsets = ((position - start) / stride, (end - position) / stride)
                candidates.append((end - start, label, offsets))
        shortest = min((length for length, _, _ in candidates), default=0)
        targets.append(
            (
                {label for length, label, _ in candidates if length <= shortest + 1e-3},
                [offsets for length, _, offsets in candidates if length == shortest],
                len(candidates),
            )
        )
    return targets


# Quarters are exact in float32, so that a point on an edge is on it in both computations.
QUARTERS = st.integers(-8, 200).map(lambda n: n / 4)
SEGMENTS = st.lists(st.tuples(QUARTERS, st.integers(1, 160).map(lambda n: n / 4), st.integers(0, 3)), max_size=6).map(
    lambda rows: ([(start, start + length) for start, length, _ in rows], [label for _, _, label in rows])
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    samples=st.lists(SEGMENTS, min_size=1, max_size=3),
    center_sample=st.sampled_from(["radius", "none"]),
    radius=st.sampled_from([0.5, 1.5, 3.0]),
    length=st.integers(1, 45),
)
def test_targets_equal_loops(samples, center_sample, radius, length):
    points, strides, ranges = make_grid(length)
    labels = [label([list(pair) for pair in segments], classes) for segments, classes in samples]
    padded = pad_labels(labels, 4, points.device)
    got_classes, got_offsets, candidates = assign_targets(points, strides, ranges, *padded, 4, center_sample, radius)
    for sample, (segments, classes) in enumerate(samples):
        expected = assign_by_loops(
            points.tolist(), strides.tolist(), ranges.tolist(), segments, classes, center_sample, radius
        )
        for point, (want_classes, want_offsets, count) in enumerate(expected):
            row = got_classes[sample, point].tolist()
            assert row == [float(one in want_classes) for one in range(4)]
            assert int(candidates[sample, point].sum()) == count
            if want_classes:
                assert tuple(got_offsets[sample, point].tolist()) in want_offsets  # quarters over powers of 2: exact


def test_segments_of_like_length_all_give_their_class():
    points, strides, ranges = make_grid(16)
    # 1e-3 counts as the same length, 2e-3 does not
    for difference, expected in ((0.0009, [1.0, 1.0, 0.0]), (0.002, [1.0, 0.0, 0.0])):
        padded = pad_labels([label([[4.0, 7.0], [4.0, 7.0 + difference]], [0, 1])], 3, points.device)
        classes, _, _ = assign_targets(points, strides, ranges, *padded, 3)
        assert classes[0, 5].tolist() == expected
    # the same segment twice under one class is one target, not two
    padded = pad_labels([label([[4.0, 7.0], [4.0, 7.0]], [2, 2])], 3, points.device)
    assert assign_targets(points, strides, ranges, *padded, 3)[0].max() == 1


# --- The whole loss -------------------------------------------------------------------------------------------------------------


def loss_by_loops(logits, offsets, mask, points, strides, ranges, labels, normalizer, smoothing=0.0):
    """Classification and regression loss in float64, point by point."""
    cls_loss = reg_loss = positives = 0.0
    for sample, entry in enumerate(labels):
        targets = assign_by_loops(
            points.tolist(),
            strides.tolist(),
            ranges.tolist(),
            entry["segments"].tolist(),
            entry["class_labels"].tolist(),
            "radius",
            1.5,
        )
        for point, (classes, wanted, _) in enumerate(targets):
            if not mask[sample, point]:
                continue
            for one in range(logits.shape[-1]):
                target = float(one in classes) * (1 - smoothing) + smoothing / (logits.shape[-1] + 1)
                p = 1 / (1 + math.exp(-logits[sample, point, one].item()))
                entropy = -(target * math.log(p) + (1 - target) * math.log(1 - p))
                same = p * target + (1 - p) * (1 - target)
                cls_loss += (0.25 * target + 0.75 * (1 - target)) * (1 - same) ** 2 * entropy
            if classes:
                positives += 1
                (a, b), (c, d) = offsets[sample, point].tolist(), wanted[0]
                both, hull = min(a, c) + min(b, d), max(a, c) + max(b, d)
                union = a + b + c + d - both
                reg_loss += 1 - both / union + (((b - a) - (d - c)) / 2 / hull) ** 2
    return cls_loss / normalizer, reg_loss / normalizer, positives


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_loops(smoothing):
    criterion = make_loss(label_smoothing=smoothing, loss_weight=0.5).eval()
    inputs = random_inputs()
    inputs[2][1, 30:40] = False
    inputs[2][1, 72:] = False  # one point of the coarsest level is left
    loss, parts = criterion(*inputs, LABELS)
    cls_loss, reg_loss, positives = loss_by_loops(*inputs, LABELS, normalizer=100, smoothing=smoothing)
    assert positives == 11  # enough to compare
    assert parts["num_positives"].item() == positives
    # float32 sums of 71 * 2 * 3 terms
    assert parts["cls_loss"].item() == pytest.approx(cls_loss, rel=1e-5)
    assert parts["reg_loss"].item() == pytest.approx(reg_loss, rel=1e-5)
    assert loss.item() == pytest.approx(cls_loss + 0.5 * reg_loss, rel=1e-5)
    assert loss.dtype == parts["cls_loss"].dtype == parts["reg_loss"].dtype == torch.float32


def test_label_smoothing_by_hand():
    # no segment: every target is 0.1 / (3 + 1) = 0.025; logits 0: score 0.5
    criterion = make_loss(label_smoothing=0.1, init_loss_norm=1).eval()
    points, strides, ranges = make_grid(1)
    zeros = torch.zeros(1, len(points), 3), torch.zeros(1, len(points), 2), torch.ones(1, len(points)).bool()
    loss, _ = criterion(*zeros, points, strides, ranges, [label([], [])])
    one = (0.25 * 0.025 + 0.75 * 0.975) * 0.5**2 * math.log(2)
    assert loss.item() == pytest.approx(4 * 3 * one, rel=1e-5)


def test_normalizer_moves_in_training_before_it_is_used():
    criterion = make_loss()
    inputs = random_inputs()
    raw_cls, raw_reg, positives = loss_by_loops(*inputs, LABELS, normalizer=1)

    criterion.eval()
    _, parts = criterion(*inputs, LABELS)
    assert criterion.loss_normalizer.item() == 100
    assert parts["cls_loss"].item() == pytest.approx(raw_cls / 100, rel=1e-5)

    criterion.train()
    normalizer = 100.0
    for labels, count in ((LABELS, positives), (LABELS, positives), ([label([], [])] * 2, 0)):
        _, parts = criterion(*inputs, labels)
        normalizer = 0.9 * normalizer + 0.1 * max(count, 1)
        assert criterion.loss_normalizer.item() == pytest.approx(normalizer, rel=1e-6)
        if count:
            assert parts["cls_loss"].item() == pytest.approx(raw_cls / normalizer, rel=1e-5)
            assert parts["reg_loss"].item() == pytest.approx(raw_reg / normalizer, rel=1e-5)


def test_normalizer_may_move_again_before_the_backward_pass():
    criterion = make_loss()
    inputs = random_inputs()
    (first,) = torch.autograd.grad(make_loss()(*inputs, LABELS)[0], inputs[0])
    loss, _ = criterion(*inputs, LABELS)
    criterion(*inputs, [label([], [])] * 2)
    (again,) = torch.autograd.grad(loss, inputs[0])
    torch.testing.assert_close(again, first, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalizer_keeps_float32(dtype):
    criterion = make_loss(init_loss_norm=1234.567).to(dtype)
    assert criterion.loss_normalizer.dtype == torch.float32
    assert criterion.loss_normalizer.item() == pytest.approx(1234.567, rel=1e-7)


@pytest.mark.parametrize("weight", [0, -1])
def test_no_loss_weight_balances(weight):
    inputs = random_inputs()
    _, plain = make_loss().eval()(*inputs, LABELS)
    loss, parts = make_loss(loss_weight=weight).eval()(*inputs, LABELS)
    assert parts["reg_loss"].item() == pytest.approx(plain["reg_loss"].item())
    assert parts["reg_loss"].item() > 0.01
    assert loss.item() == pytest.approx(2 * plain["cls_loss"].item(), rel=1e-5)  # both weigh the same
    # a small regression loss counts as 0.01: without positives, cls + cls / 0.01 * 0
    loss, parts = make_loss(loss_weight=weight).eval()(*inputs, [label([], [])] * 2)
    assert loss.item() == pytest.approx(parts["cls_loss"].item(), rel=1e-6)
    assert parts["reg_loss"].item() == 0


def test_weight_of_the_regression_loss():
    inputs = random_inputs()
    loss, parts = make_loss(loss_weight=3.5).eval()(*inputs, LABELS)
    assert loss.item() == pytest.approx((parts["cls_loss"] + 3.5 * parts["reg_loss"]).item(), rel=1e-6)


def test_padded_points_do_not_count():
    criterion = make_loss().eval()
    logits, offsets, mask, *grid = random_inputs()
    mask[1, 20:40] = False
    loss, parts = criterion(logits, offsets, mask, *grid, LABELS)
    gradients = torch.autograd.grad(loss, (logits, offsets))
    assert all((gradient[~mask] == 0).all() for gradient in gradients)
    assert all((gradient[mask] != 0).any() for gradient in gradients)
    other_logits, other_offsets = logits.detach().clone(), offsets.detach().clone()
    other_logits[~mask] = 1e4
    other_offsets[~mask] = 1e4
    again, other_parts = criterion(other_logits, other_offsets, mask, *grid, LABELS)
    assert again.item() == loss.item()
    assert other_parts["num_positives"] == parts["num_positives"]
    mask[:] = False
    loss, parts = criterion(logits, offsets, mask, *grid, [label([], [])] * 2)
    assert loss.item() == 0
    assert parts["num_positives"].item() == 0


def test_order_of_samples_and_segments_does_not_matter():
    criterion = make_loss().eval()
    logits, offsets, mask, *grid = random_inputs()
    mask[1, 30:40] = False
    loss, parts = criterion(logits, offsets, mask, *grid, LABELS)
    swapped = [tensor.flip(0) for tensor in (logits, offsets, mask)]
    again, again_parts = criterion(*swapped, *grid, LABELS[::-1])
    shuffled = [{key: value.flip(0) for key, value in entry.items()} for entry in LABELS]
    third, third_parts = criterion(logits, offsets, mask, *grid, shuffled)
    # sums in another order: 1e-6 of the value
    for other, other_parts in ((again, again_parts), (third, third_parts)):
        assert other.item() == pytest.approx(loss.item(), rel=1e-6)
        assert other_parts["num_positives"] == parts["num_positives"]


# --- Labels -------------------------------------------------------------------------------------------------------------------------


def test_labels_may_be_lists_or_numpy():
    tensors = pad_labels(LABELS, 3, torch.device("cpu"))
    lists = [{key: value.tolist() for key, value in entry.items()} for entry in LABELS]
    arrays = [{key: value.numpy() for key, value in entry.items()} for entry in LABELS]
    for other in (lists, arrays):
        for a, b in zip(pad_labels(other, 3, torch.device("cpu")), tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    segments, classes, is_segment = tensors
    assert segments.shape == (2, 3, 2)
    assert is_segment.tolist() == [[True, True, True], [True, False, False]]
    assert classes[0].tolist() == [0, 2, 1]


GOOD = label([[1.0, 4.0]], [0])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (label([[1.0, 4.0]], [3]), ["class 3", "0 to 2", "id2label"]),
        (label([[1.0, 4.0], [2.0, 3.0]], [0, -1]), ["class -1", "segment 1"]),
        (label([[4.0, 1.0]], [0]), ["[4.0, 1.0]", "start < end"]),
        (label([[4.0, 4.0]], [0]), ["[4.0, 4.0]", "start < end"]),
        (label([[float("nan"), 4.0]], [0]), ["start < end"]),
        ({"segments": torch.zeros(2, 3), "class_labels": torch.zeros(2).long()}, ["(2, 3)", "(N, 2)"]),
        ({"segments": torch.tensor([1.0, 4.0]), "class_labels": torch.zeros(1).long()}, ["(2,)", "(N, 2)"]),
        ({"segments": torch.tensor([[1.0, 4.0]]), "class_labels": torch.zeros(2).long()}, ["(2,)", "(N,)"]),
        ({"segments": torch.zeros(0, 2), "class_labels": torch.zeros(2).long()}, ["(0, 2)", "(2,)"]),
        ({"boxes": torch.zeros(0, 2), "class_labels": torch.zeros(2).long()}, ["boxes", "segments"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_labels_name_the_sample(bad, words):
    inputs = random_inputs()
    with pytest.raises(ValueError, match=r"labels\[1\]") as error:
        make_loss()(*inputs, [GOOD, bad])
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("count", [0, 1, 3])
def test_one_entry_for_each_sample(count):
    with pytest.raises(ValueError, match=f"labels has {count} entries for a batch of 2"):
        make_loss()(*random_inputs(), [GOOD] * count)


def test_a_segment_too_short_for_any_point_is_counted_and_warned_about_once():
    criterion = make_loss().eval()
    inputs = random_inputs()
    # strictly between two points
    labels = [label([[2.0, 9.0], [3.25, 3.75]], [0, 1]), label([[7.1, 7.2]], [1])]
    with pytest.warns(UserWarning, match=r"2 segments .*\[3\.25, 3\.75\].*sample 0"):
        _, parts = criterion(*inputs, labels)
    assert parts["num_unassigned_segments"].item() == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, parts = criterion(*inputs, labels)
        assert parts["num_unassigned_segments"].item() == 2
        _, parts = make_loss().eval()(*inputs, LABELS)
        assert parts["num_unassigned_segments"].item() == 0


def test_a_segment_in_the_padding_is_unassigned():
    logits, offsets, mask, points, strides, ranges = random_inputs()
    mask[:] = points < 20
    with pytest.warns(UserWarning, match="1 segments"):
        _, parts = make_loss().eval()(logits, offsets, mask, points, strides, ranges, [GOOD, label([[25, 28]], [0])])
    assert parts["num_unassigned_segments"].item() == 1


def test_no_segments_teach_the_classification_head_only():
    torch.manual_seed(0)
    config = ConvTransformerConfig(n_in=4, n_embd=16, arch=(1, 1, 3), num_labels=3, init_loss_norm=100)
    for labels in ([label([], [])] * 2, [GOOD, label([], [])]):
        model = ConvTransformerForTemporalActionLocalization(config).train()
        output = model(torch.randn(2, 20, 4), labels=labels)
        assert output.loss.isfinite()
        output.loss.backward()
        heads = {name: p.grad for name, p in model.named_parameters() if "head" in name}
        assert all(gradient is not None and gradient.isfinite().all() for gradient in heads.values())
        assert all(p.grad is not None for p in model.parameters())
        assert all((heads[name] != 0).any() for name in heads if "class_head" in name and "output" in name)
        empty = labels[0] is not GOOD
        for name, gradient in heads.items():
            if name.startswith("segment_head") and empty:
                assert (gradient == 0).all()
    assert (heads["segment_head.output.weight"] != 0).any()


# --- Several processes --------------------------------------------------------------------------------------------------------------


def two_samples():
    torch.manual_seed(3)
    features = torch.randn(2, 24, 4)
    both = [label([[2.0, 5.5], [10.0, 20.0]], [0, 2]), label([[6.5, 22.0]], [1])]
    return features, {"both": both, "one_empty": [both[0], label([], [])], "all_empty": [label([], [])] * 2}


def detector():
    torch.manual_seed(5)
    config = ConvTransformerConfig(n_in=4, n_embd=16, arch=(1, 1, 3), num_labels=3, init_loss_norm=20, path_pdrop=0.0)
    model = ConvTransformerForTemporalActionLocalization(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def train_one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    features, cases = two_samples()
    results = {}
    for name, labels in cases.items():
        model = detector()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second step has a moved normaliser
            model.zero_grad()
            wrapped(features[rank : rank + 1], labels=labels[rank : rank + 1]).loss.backward()
        results[name] = (
            {key: parameter.grad.clone() for key, parameter in model.named_parameters()},
            model.criterion.loss_normalizer.clone(),
        )
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_train_as_one(tmp_path):
    torch.multiprocessing.spawn(train_one_of_two, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    features, cases = two_samples()
    for name, labels in cases.items():
        model = detector()
        for _ in range(2):
            model.zero_grad()
            model(features, labels=labels).loss.backward()
        for gradients, normalizer in (rank[name] for rank in ranks):
            assert normalizer.item() == pytest.approx(model.criterion.loss_normalizer.item(), rel=1e-6)
            for key, parameter in model.named_parameters():
                # the same sums in another order
                torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-5, atol=1e-6, msg=f"{name} {key}")
        if name != "all_empty":
            assert max(parameter.grad.abs().max() for parameter in model.parameters()) > 1e-3


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([{"segments": [[1.0, float("inf")]], "class_labels": [0]}], "start < end"),
        ([{"segments": [[1.0, 2.0]], "class_labels": [0.7]}], "whole numbers"),
        ({"segments": [[1.0, 2.0]], "class_labels": [0]}, "a list with one for each sample"),
    ],
)
def test_labels_that_look_nearly_right(labels, words):
    with pytest.raises(ValueError, match=words):
        pad_labels(labels, 3, torch.device("cpu"))
