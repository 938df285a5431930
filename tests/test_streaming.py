"""Streaming: whatever the chunking, what one forward over everything gives; segments as post-processing gives them.

The model's part is compared with the model's own forward, under every setting. What becomes of its outputs is compared
with post-processing of a whole recording, on made-up outputs, where late candidates can be had or left out.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_attention_convtransformer import _stand_ins, flash_installed  # noqa: F401
from test_modeling_convtransformer import VARIANTS, make_config, make_detector, run, width_of

from modeling_convtransformer import ConvTransformerFeatureExtractor, ConvTransformerModel
from modeling_convtransformer.feature_extraction_convtransformer import decay, overlap
from modeling_convtransformer.streaming import ConvTransformerStream, IncrementalDetector, StreamedConv, StreamOutput

# float32: the same sums in another order, through up to six blocks; logits are around 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# float64: the same, but segments, which are float32 in every dtype, are distances of up to 10 strides around points.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
SEGMENTS = {"rtol": 1e-6, "atol": 1e-5}

# Frequencies that go by the length of the whole recording, which a stream does not know.
BY_LENGTH = ("rope_dynamic", "rope_longrope")
CAUSAL = {
    **{name: {**fields, "is_causal": True} for name, fields in VARIANTS.items() if name not in BY_LENGTH},
    "streams_gqa_fpn": {"n_in": [2, 4], "n_kv_head": 2, "fpn_type": "fpn", "is_causal": True},
    "gqa_rel_pe": {"n_kv_head": 2, "use_rel_pe": True, "mha_win_size": [5, 3, -1, 31], "is_causal": True},
    "no_stem_conv": {"backbone_type": "conv", "arch": (1, 0, 3), "scale_factor": 4, "is_causal": True},
    "fpn_no_branch": {"fpn_type": "fpn", "arch": (1, 1, 0), "is_causal": True},
}


def push_all(detector, features, sizes):
    """The outputs of all pushes, in the order of the model's points; `features` (1, time, channels)."""
    parts = [detector.push(piece) for piece in features[0].split(sizes)]
    joined = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    order = joined["point_levels"][0].argsort(stable=True)
    return StreamOutput(**{name: value[:, order] for name, value in joined.items()})


def assert_equal_outputs(output, expected, config, tolerance=CLOSE):
    torch.testing.assert_close(output.logits, expected.logits, **tolerance)
    torch.testing.assert_close(output.pred_segments, expected.pred_segments, **SEGMENTS)
    assert torch.equal(output.point_levels, expected.point_levels)
    assert torch.equal(output.point_mask, expected.point_mask)
    counts = torch.bincount(expected.point_levels[0]).tolist()
    positions = [
        step * stride for count, stride in zip(counts, config.detector_strides, strict=False) for step in range(count)
    ]
    assert output.point_positions[0].tolist() == positions


# --- The model ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", CAUSAL)
def test_equals_the_forward_over_everything(variant):
    """In float64, where other orders of sums show in the 16th digit: nothing is nearly right."""
    model = make_detector(**CAUSAL[variant]).double()
    features = torch.randn(1, 30, width_of(model.config), generator=torch.Generator().manual_seed(0)).double()
    expected = run(model, features)
    detector = IncrementalDetector(model)
    for sizes in ([1] * 30, [0, 3, 0, 5, 1, 1, 20], [30]):
        assert_equal_outputs(push_all(detector, features, sizes), expected, model.config, EXACT)
        assert detector.position == 30
        detector.reset()


@settings(max_examples=60, deadline=None)
@given(
    variant=st.sampled_from(sorted(CAUSAL)),
    sizes=st.lists(st.integers(0, 9) | st.just(1), min_size=1, max_size=16),
    seed=st.integers(0, 99),
    kv_heads=st.sampled_from([None, 2, 1]),
    window=st.sampled_from([None, -1, 3, 7, 301]),
)
@example("causal", [0], 0, None, None)
@example("causal_scale_4", [3, 1, 4, 1, 5], 1, 1, 3)
def test_equals_the_forward_whatever_the_chunking(variant, sizes, seed, kv_heads, window):
    fields = dict(CAUSAL[variant], n_kv_head=kv_heads)
    if window is not None:
        fields.update(mha_win_size=window)
        if window < 1 and fields.get("rel_pe_max_distance") == 0:
            fields.update(use_rel_pe=False)
    sizes = sizes if sum(sizes) <= 32 or not (fields.get("use_abs_pe") or fields.get("use_learned_pe")) else [1] * 32
    model = make_detector(seed=seed, **fields)
    features = torch.randn(1, sum(sizes), width_of(model.config), generator=torch.Generator().manual_seed(seed))
    output = push_all(IncrementalDetector(model), features, sizes)
    if sum(sizes) == 0:
        assert output.logits.shape == (1, 0, 3)
        assert output.pred_segments.shape == (1, 0, 2)
    else:
        assert_equal_outputs(output, run(model, features), model.config)


@pytest.mark.parametrize("window", [-1, 19], ids=["global", "window"])
def test_pushes_that_are_cut_into_pieces_and_caches_that_grow(window):
    model = make_detector(is_causal=True, mha_win_size=window, n_kv_head=2, fpn_type="fpn", arch=(1, 2, 3))
    features = torch.randn(1, 1500, 6, generator=torch.Generator().manual_seed(0))
    expected = run(model, features)
    for sizes in ([1500], [1, 700, 1, 797, 1]):
        assert_equal_outputs(push_all(IncrementalDetector(model), features, sizes), expected, model.config)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention", "flash_attention_2"])
def test_models_of_every_backend(implementation, flash_installed):  # noqa: F811
    model = make_detector("sdpa", is_causal=True, mha_win_size=5, n_kv_head=2)
    features = torch.randn(1, 40, 6, generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation(implementation)
    assert_equal_outputs(
        push_all(IncrementalDetector(model), features, [7, 1, 32]), run(model, features), model.config
    )


def test_half_precision():
    """bfloat16 has 8 bits: sums in another order differ by some of the last ones, 0.4 % of values around 1 each."""
    model = make_detector(is_causal=True, mha_win_size=9).bfloat16()
    features = torch.randn(1, 40, 6, generator=torch.Generator().manual_seed(0))
    output = push_all(IncrementalDetector(model), features, [1] * 8 + [32])
    assert output.logits.dtype == torch.bfloat16
    assert output.pred_segments.dtype == torch.float32
    in_float32 = run(make_detector(is_causal=True, mha_win_size=9), features)
    whole = run(model, features)
    error = (output.logits.float() - in_float32.logits).abs().mean()
    assert error < 1.5 * (whole.logits.float() - in_float32.logits).abs().mean()  # no worse than one forward


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_quantized_weights(method):
    pytest.importorskip("torchao", reason="needs the quantization extra")
    from modeling_convtransformer.quantization import quantize

    for fields in ({"fpn_type": "fpn"}, {"backbone_type": "conv"}):
        model = make_detector(is_causal=True, n_embd=32, **fields)
        features = torch.randn(1, 30, 6, generator=torch.Generator().manual_seed(0))
        full = run(model, features)
        quantize(model, method)
        expected = run(model, features)
        assert (expected.logits - full.logits).abs().max() > 1e-3  # something is rounded
        assert_equal_outputs(push_all(IncrementalDetector(model), features, [1] * 9 + [21]), expected, model.config)


def test_quantized_inputs():
    """Rounding is no continuous function: layer by layer, where both get the same, they give the same."""
    pytest.importorskip("torchao", reason="needs the quantization extra")
    from modeling_convtransformer.quantization import quantize

    model = quantize(make_detector(is_causal=True, n_embd=32), "int8_dynamic")
    for conv in (model.model.embedding.convs[0], model.class_head.convs[0], model.model.branch[0].attn.key_conv):
        x = torch.randn(1, 30, conv.in_channels, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            streamed, expected = StreamedConv(conv), conv(x, None)
            parts = [streamed(piece) for piece in x.split([1] * 9 + [21], dim=1)]
        torch.testing.assert_close(torch.cat([part for part in parts if part is not None], dim=1), expected, **CLOSE)
    outputs = push_all(IncrementalDetector(model), torch.randn(1, 9, 6), [1] * 9)
    assert outputs.logits.isfinite().all()


def test_streams_of_one_model_do_not_meet():
    model = make_detector(is_causal=True)
    one, other = torch.randn(2, 1, 20, 6, generator=torch.Generator().manual_seed(0)).unbind()
    streams = [IncrementalDetector(model), IncrementalDetector(model)]
    parts = [[], []]
    for step in range(20):
        for stream, features, kept in zip(streams, (one, other), parts, strict=True):
            kept.append(stream.push(features[0, step]))
    for features, kept in zip((one, other), parts, strict=True):
        finest = torch.cat([part.logits[:, :1] for part in kept], dim=1)
        torch.testing.assert_close(finest, run(model, features).logits[:, :20], **CLOSE)


# --- What is kept ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [-1, 9], ids=["global", "window"])
def test_fewer_key_heads_make_the_cache_smaller(window):
    sizes, tails = [], []
    for kv_heads in (None, 2, 1):
        stream = IncrementalDetector(make_detector(is_causal=True, n_kv_head=kv_heads, mha_win_size=window))
        stream.push(torch.randn(200, 6))
        sizes.append(stream.cache_bytes["keys_values"])
        tails.append(stream.cache_bytes["tails"])
    assert sizes[0] == 2 * sizes[1] == 4 * sizes[2] > 0
    assert tails[0] == tails[1] == tails[2] > 0


def test_global_caches_hold_every_key_and_value_once():
    model = make_detector(is_causal=True)  # 2 blocks at 200 and 100 steps, then 50, 25; 16 channels of 4 bytes
    stream = IncrementalDetector(model)
    for step in torch.randn(200, 6):
        stream.push(step)
    needed = 2 * 16 * 4 * (200 + 100 + 50 + 25)
    room = 2 * 16 * 4 * 4 * 8
    assert needed <= stream.cache_bytes["keys_values"] <= 1.125 * needed + room


@pytest.mark.parametrize("fields", [{"mha_win_size": 9}, {"backbone_type": "conv", "fpn_type": "fpn"}], ids=str)
def test_with_windows_memory_is_bounded(fields):
    stream = IncrementalDetector(make_detector(is_causal=True, arch=(1, 1, 2), **fields))
    held = []
    for step in torch.randn(600, 6):
        stream.push(step)
        held.append(sum(stream.cache_bytes.values()))
    assert max(held[300:]) <= max(held[:300])
    for piece in torch.randn(3000, 6).split(100):
        stream.push(piece)
        # 3 blocks, each the last 4 steps, the 100 of one push and room for an eighth, of 2 x 16 channels of 4 bytes
        assert stream.cache_bytes["keys_values"] <= 3 * (4 + 100 + 13) * 2 * 16 * 4
    # and nothing is a view of something larger
    for block in [*stream.stem, *stream.branch]:
        for tail in block.tails:
            assert tail.inputs.untyped_storage().nbytes() == tail.bytes


# --- Segments ----------------------------------------------------------------------------------------------------------------


EXTRACTOR = ConvTransformerFeatureExtractor(feature_size=6, fps=10, feature_stride=5, num_frames=10)
SECOND = 2  # steps


def make_outputs(seed, length, reach, classes=3, strides=(1, 2, 4), ties=False):
    """A recording's outputs, whose segments stand up to `reach` steps to either side of their points."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.cat([torch.arange(0, length, stride) for stride in strides])
    levels = torch.cat([torch.full((-(-length // stride),), level) for level, stride in enumerate(strides)])
    logits = 3 * torch.randn(1, len(positions), classes, generator=generator) - 2
    if ties:
        logits = logits.round()
    sides = torch.rand(1, len(positions), 2, generator=generator) ** 2 * reach
    segments = torch.stack((positions - sides[..., 0], positions + sides[..., 1]), dim=-1)
    return StreamOutput(
        logits=logits,
        pred_segments=segments,
        point_mask=torch.ones(1, len(positions), dtype=torch.long),
        point_levels=levels[None],
        point_positions=positions[None],
    )


class Script:
    """In the place of the detector: gives outputs that are there already, as their steps are pushed."""

    def __init__(self, model, outputs):
        self.model, self.outputs, self.position = model, outputs, 0

    def push(self, features):
        stop = self.position + len(features)
        place = self.outputs.point_positions[0]
        new = (place >= self.position) & (place < stop)
        self.position = stop
        return StreamOutput(**{name: value[:, new] for name, value in self.outputs.items()})


@pytest.fixture(scope="module")
def model():
    return make_detector(is_causal=True, mha_win_size=9, id2label={0: "walk", 1: "run", 2: "rest"})


def stream_of(model, outputs, **options):
    stream = ConvTransformerStream(model, EXTRACTOR, **options)
    stream.detector = Script(model, outputs)
    return stream


def push_segments(stream, length, sizes, duration=None):
    """What each push returned, and then `finish`."""
    pieces = torch.zeros(length, 6).split(sizes)
    return [*(stream.push(piece) for piece in pieces), stream.finish(duration)]


def rows_of(segments):
    return sorted((one["label"], one["start"], one["end"], one["score"]) for one in segments)


def whole(model, outputs, duration=None, **options):
    found = EXTRACTOR.post_process_temporal_action_localization(outputs, {"duration": duration}, **options)[0]
    rows = zip(found["labels"].tolist(), found["segments"].tolist(), found["scores"].tolist(), strict=True)
    return sorted((model.config.id2label[label], *segment, score) for label, segment, score in rows)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    length=st.integers(1, 80),
    reach=st.sampled_from([0.5, 2.0, 7.0]),
    delay=st.sampled_from(["reach", "more", "never"]),
    step=st.sampled_from([1, 7, 80]),
    method=st.sampled_from(["soft", "linear", "hard", "none"]),
    multiclass=st.booleans(),
    threshold=st.sampled_from([0.01, 0.2, 0.6]),
    ties=st.booleans(),
)
def test_segments_are_those_of_the_whole_recording(
    model, seed, length, reach, delay, step, method, multiclass, threshold, ties
):
    """To the last bit: clusters that do not overlap have decays of exactly 1 for one another."""
    outputs = make_outputs(seed, length, reach, ties=ties)
    options = {"nms_method": method, "multiclass_nms": multiclass, "voting_thresh": 0.0, "threshold": threshold}
    # (in the whole recording, the best segment of a class stays even below min_score; not above the threshold)
    options["min_score"] = threshold
    # No candidate reaches back farther than `reach`, so none is late.
    seconds = {"reach": reach / SECOND, "more": 3 * reach / SECOND, "never": math.inf}[delay]
    stream = stream_of(model, outputs, delay=seconds, **options)
    duration = None if method == "none" else (length + 1) / SECOND  # "none" gives segments before their end is known
    pushes = push_segments(stream, length, step, duration)
    found = [segment for one in pushes for segment in one]
    assert rows_of(found) == whole(model, outputs, duration, **options)
    if delay == "never" and method != "none":
        assert not any(pushes[:-1])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    length=st.integers(1, 60),
    delay=st.sampled_from([0.0, 0.3, 2.0]),
    max_wait=st.sampled_from([None, 0.0, 3.0]),
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=10),
    method=st.sampled_from(["soft", "linear", "hard", "none"]),
)
def test_segments_do_not_depend_on_the_chunking(model, seed, length, delay, max_wait, sizes, method):
    """Late candidates or not."""
    outputs = make_outputs(seed, length, 9.0)
    sizes = [*sizes, max(0, length - sum(sizes))]
    length = sum(sizes)
    options = {"delay": delay, "max_wait": max_wait, "threshold": 0.2, "nms_method": method}
    by_steps, by_pieces = (
        push_segments(stream_of(model, outputs, **options), length, cut) for cut in ([1] * length, sizes)
    )
    at, found = 0, [segment for one in by_steps for segment in one]
    for size, returned in zip(sizes, by_pieces[:-1], strict=True):
        assert returned == [segment for one in by_steps[at : at + size] for segment in one]
        at += size
    assert [segment for one in by_pieces for segment in one] == found


def test_when_segments_are_final(model):
    """One step is half a second; step t stands at t / 2 + 0.5 seconds."""
    outputs = make_outputs(0, 20, 1.0)
    outputs.logits[:] = -9
    high = outputs.point_positions[0].tolist().index(6)
    outputs.logits[0, high, 1], outputs.pred_segments[0, high] = (
        2.0,
        torch.tensor([2.0, 9.5]),
    )  # ends ahead of its point
    score = outputs.logits[0, high, 1].sigmoid().item()
    for delay, step in [(0.0, 10), (0.2, 10), (0.25, 10), (0.3, 11), (2.0, 14), (math.inf, 20)]:
        returned = push_segments(stream_of(model, outputs, delay=delay), 20, 1)
        assert [bool(one) for one in returned].index(True) == step
        assert returned[step] == [{"label": "run", "score": pytest.approx(score), "start": 1.5, "end": 5.25}]
        assert sum(map(len, returned)) == 1
    for max_wait, step in [(0.0, 6), (1.0, 8), (9.0, 14)]:
        returned = push_segments(stream_of(model, outputs, delay=2.0, max_wait=max_wait), 20, 1)
        assert [bool(one) for one in returned].index(True) == step


@pytest.mark.parametrize("method", ["soft", "linear", "hard"])
def test_a_late_candidate_is_weighed_down_by_what_was_returned(model, method):
    """Even if it is the better one, as what was returned stands; other classes do not mind."""
    outputs = make_outputs(0, 20, 1.0)
    outputs.logits[:] = -9
    for position, label, logit, segment in [
        (4, 0, 0.5, [2.0, 6.0]),
        (15, 0, 3.0, [3.0, 16.0]),  # overlaps the first
        (16, 0, 2.0, [10.0, 17.0]),  # does not, but overlaps the second
        (17, 1, 3.0, [2.0, 18.0]),
    ]:
        point = outputs.point_positions[0].tolist().index(position)
        outputs.logits[0, point, label], outputs.pred_segments[0, point] = logit, torch.tensor(segment)
    options = {"nms_method": method, "iou_threshold": 0.2, "threshold": 0.05}
    returned = push_segments(stream_of(model, outputs, delay=1.0, **options), 20, 1)
    weigh = {"method": method, "iou_threshold": 0.2, "sigma": EXTRACTOR.nms_sigma}

    def iou(one, other):
        return overlap(tuple(np.float32(one)[:, None]), tuple(np.float32(other)[:, None]))

    first, second, third = (1 / (1 + math.exp(-logit)) for logit in (0.5, 3.0, 2.0))
    second *= float(decay(iou([2, 6], [3, 16]), **weigh)[0])
    third *= float(decay(iou([3, 16], [10, 17]), **weigh)[0]) if second > third else 1
    assert returned[8] == [{"label": "walk", "score": pytest.approx(first), "start": 1.5, "end": 3.5}]
    later = {
        segment["start"]: segment["score"] for one in returned[9:] for segment in one if segment["label"] == "walk"
    }
    if second > third:
        expected = {2.0: second, 5.5: third}
    else:
        second *= float(decay(iou([10, 17], [3, 16]), **weigh)[0])
        expected = {5.5: third, 2.0: second}
    expected = {start: pytest.approx(score, rel=1e-5) for start, score in expected.items() if score > 0.05}
    assert later == expected
    others = [segment for one in returned for segment in one if segment["label"] == "run"]
    assert [segment["score"] for segment in others] == [pytest.approx(1 / (1 + math.exp(-3)))]


def test_what_was_returned_is_forgotten_when_nothing_reaches_back_to_it(model):
    outputs = make_outputs(0, 2000, 1.0)
    stream = stream_of(model, outputs, threshold=0.3)
    stream._reach = 20
    most = 0
    for piece in torch.zeros(2000, 6).split(10):
        stream.push(piece)
        most = max(most, len(stream._returned) + len(stream._open))
    assert 0 < most < 300


def segments_of_pipeline(model, extractor, sample, **options):
    features, geometry = extractor.load(sample)
    outputs = run(model, torch.from_numpy(features)[None])
    found = extractor.post_process_temporal_action_localization(outputs, geometry, **options)[0]
    rows = zip(found["labels"].tolist(), found["segments"].tolist(), found["scores"].tolist(), strict=True)
    return sorted((model.config.id2label[label], *segment, score) for label, segment, score in rows)


def assert_close_rows(found, expected):
    assert [one[0] for one in found] == [one[0] for one in expected]
    np.testing.assert_allclose([one[1:] for one in found], [one[1:] for one in expected], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("variant", ["causal", "causal_window", "fpn", "mqa_window"])
def test_features_in_segments_out(variant):
    """The whole way, with the model's own outputs; float32, segments of up to 30 s."""
    model = make_detector(**CAUSAL[variant])
    features = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    options = {"threshold": 0.3, "min_score": 0.3}
    expected = segments_of_pipeline(model, EXTRACTOR, {"features": features}, **options)
    assert len(expected) > 3
    stream = ConvTransformerStream(model, EXTRACTOR, delay=math.inf, **options)
    assert stream.now is None
    for piece in np.split(features, [1, 1, 9, 30]):
        assert stream.push(piece) == []
    assert stream.now == 30.0  # of step 59, whose window of 10 frames begins at frame 295
    found = stream.finish()
    assert_close_rows(rows_of(found), expected)
    stream.reset()
    assert stream.push(features) == []
    assert_close_rows(rows_of(stream.finish()), expected)


@pytest.mark.parametrize(("window", "stride"), [(50, 25), (50, 50), (20, 45)])
def test_a_sensor_in_pieces_of_half_a_second(window, stride):
    """A 50 Hz accelerometer whose windows overlap, follow one another, or leave gaps."""
    model = make_detector(n_in=3 * window, is_causal=True, mha_win_size=9)
    extractor = ConvTransformerFeatureExtractor(
        feature_size=3 * window, fps=50, feature_stride=stride, num_frames=window
    )
    signal = np.random.default_rng(1).normal(size=(1510, 3)).astype(np.float32)
    options = {"threshold": 0.3, "min_score": 0.3}
    expected = segments_of_pipeline(model, extractor, {"signal": signal}, **options)
    assert len(expected) > 3
    assert max(end for _, _, end, _ in expected) <= np.float32(30.2)  # clipped to the recording
    for cuts in (range(25, 1510, 25), [1, 2, 1500]):
        stream = ConvTransformerStream(model, extractor, delay=math.inf, **options)
        for piece in np.split(signal, cuts):
            assert stream.push(signal=piece) == []
        assert stream.detector.position == (1510 - window) // stride + 1
        assert_close_rows(rows_of(stream.finish()), expected)
    # With a delay, segments arrive while the recording goes on, when their end is that long ago.
    stream = ConvTransformerStream(model, extractor, delay=2.0, **options)
    early = []
    for piece in np.split(signal, range(25, 1510, 25)):
        for segment in stream.push(signal=piece):
            early.append(segment)
            assert segment["end"] <= stream.now - 2 + 1e-4
    assert early


# --- Errors ------------------------------------------------------------------------------------------------------------------


def test_models_that_cannot_be_streamed(model):
    with pytest.raises(ValueError, match="is_causal=True in its configuration, and weights that were trained so"):
        IncrementalDetector(make_detector())
    with pytest.raises(ValueError, match=r"training mode; call model.eval\(\)"):
        IncrementalDetector(make_detector(is_causal=True).train())
    with pytest.raises(ValueError, match="is a ConvTransformerModel; expected a ConvTransformerForTemporalAction"):
        IncrementalDetector(ConvTransformerModel(make_config(is_causal=True)).eval())
    for variant in BY_LENGTH:
        with pytest.raises(ValueError, match=r"rope_type '.*go by the length of the whole recording"):
            IncrementalDetector(make_detector(is_causal=True, **VARIANTS[variant]))
    partly = make_detector(is_causal=True)
    partly.untrained_weights = frozenset({"class_head.output.weight"})
    with pytest.raises(ValueError, match=r"lacked 1 tensors of this model, such as 'class_head.output.weight'"):
        IncrementalDetector(partly)
    with pytest.raises(ValueError, match="feature_size 7, but the model takes features of width 6"):
        ConvTransformerStream(model, ConvTransformerFeatureExtractor(7, 10, 5))


def test_a_model_that_is_put_into_training_mode(model):
    other = make_detector(is_causal=True)
    stream = ConvTransformerStream(other, EXTRACTOR)
    stream.push(torch.zeros(3, 6))
    other.train()
    with pytest.raises(ValueError, match=r"put into training mode; call model.eval\(\)"):
        stream.push(torch.zeros(3, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multiclass_nms": False}, "Pass voting_thresh=0, or multiclass_nms=True"),
        ({"nms_method": "hard", "iou_threshold": 0}, "Pass an iou_threshold above 0"),
        ({"delay": -1}, "delay is -1; expected a number, 0 or more"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"max_wait": -2.0}, "max_wait is -2.0"),
        ({"nms": "soft"}, "Unknown settings: nms. Known: pre_nms_thresh"),
        ({"nms_sigma": 0}, "nms_sigma is 0"),
        ({"geometry": {"fps": 0}}, "fps is 0"),
    ],
)
def test_settings_that_a_stream_cannot_follow(model, options, message):
    with pytest.raises(ValueError, match=message):
        ConvTransformerStream(model, EXTRACTOR, **options)


@pytest.mark.filterwarnings("error")
def test_every_kind_of_array(model):
    features = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
    fixed, backwards = features.copy(), features[::-1].copy()[::-1]
    fixed.flags.writeable = False
    expected = IncrementalDetector(model).push(features).logits
    for kind in (
        fixed,
        backwards,
        features.astype(np.float64),
        features.tolist(),
        torch.from_numpy(features.copy()).double(),
    ):
        output = IncrementalDetector(model).push(kind).logits
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, expected, **CLOSE)
    whole = (10 * features).astype(np.int16)
    expected = IncrementalDetector(model).push(whole.astype(np.float32)).logits
    for kind in (whole, torch.from_numpy(whole)):
        assert torch.equal(IncrementalDetector(model).push(kind).logits, expected)


def test_bad_pushes_change_nothing(model):
    """The next good one goes on as if they had not been."""
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    expected = run(model, features[None])
    stream = IncrementalDetector(model)
    parts = [stream.push(features[:17])]
    holed = features[17:].clone()
    holed[3, 2] = math.nan
    holed[5, 1] = math.inf
    for bad, message in [
        (
            holed,
            r"2 values that are NaN or infinite, the first at step 20 of the stream \(3 of this push\), channel 2 \(nan\)",
        ),
        (features[:, :5], r"shape \(40, 5\).*expected numbers \(time, 6\), or \(6,\) for one step"),
        (features[:8].T, r"transpose it: features.T"),
        (features[None], r"make one stream for each"),
        (features[0, :4], r"shape \(4,\)"),
        (features.to(torch.complex64), "complex64"),
        ([[1.0] * 6, [1.0] * 5], "features: no array"),
        (np.array([["a"] * 6]), r"shape \(1, 6\) and dtype <U1; expected numbers"),
        (np.ones((2, 6), dtype=complex), "complex128; expected numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream.push(bad)
    parts.append(stream.push(features[17:].double().numpy()))
    finest = torch.cat([part.logits[:, part.point_levels[0] == 0] for part in parts], dim=1)
    torch.testing.assert_close(finest, expected.logits[:, :40], **CLOSE)


def test_a_push_that_ended_halfway_is_not_gone_on_from(monkeypatch):
    model = make_detector(is_causal=True)
    stream = IncrementalDetector(model)
    stream.push(torch.zeros(3, 6))

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.model.branch[0].mlp, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stream.push(torch.zeros(3, 6))
    with pytest.raises(ValueError, match=r"ended halfway.*call reset\(\)"):
        stream.push(torch.zeros(3, 6))
    stream.reset()
    stream.push(torch.zeros(3, 6))


@pytest.mark.parametrize("kind", ["use_abs_pe", "use_learned_pe"])
def test_a_stream_ends_with_the_table_of_positions(kind):
    model = make_detector(is_causal=True, **{kind: True})
    stream = ConvTransformerStream(model, EXTRACTOR)
    stream.push(torch.zeros(30, 6))
    with pytest.raises(ValueError, match=r"33 steps long.*max_len=32"):
        stream.push(torch.zeros(3, 6))
    stream.push(torch.zeros(2, 6))
    with pytest.raises(ValueError, match="33 steps long"):
        stream.push(torch.zeros(6))


def test_pushes_in_the_wrong_place(model):
    stream = ConvTransformerStream(model, EXTRACTOR)
    with pytest.raises(ValueError, match="either features or signal"):
        stream.push()
    with pytest.raises(ValueError, match="either features or signal"):
        stream.push(torch.zeros(1, 6), signal=torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"feature_size .6. that num_frames divides"):
        stream.push(signal=torch.zeros(30, 1))
    stream.push(torch.zeros(1, 6))
    stream.finish()
    for call in (lambda: stream.push(torch.zeros(1, 6)), stream.finish):
        with pytest.raises(ValueError, match=r"finished.*call reset\(\)"):
            call()
    stream.reset()
    assert stream.push(torch.zeros(0, 6)) == stream.finish() == []

    raw = ConvTransformerStream(model, ConvTransformerFeatureExtractor(6, fps=50, feature_stride=2, num_frames=2))
    raw.push(signal=np.zeros((5, 3)))
    raw.push(signal=np.zeros(3))
    assert raw.detector.position == 3
    with pytest.raises(ValueError, match="features after signal"):
        raw.push(np.zeros((5, 6)))
    with pytest.raises(ValueError, match=r"first at sample 7 of the stream \(1 of this push\), channel 0"):
        raw.push(signal=np.array([[0, 0, 0], [np.nan, 0, 0]]))
    with pytest.raises(ValueError, match=r"signal of shape \(5, 2\).*expected numbers \(samples, 3\)"):
        raw.push(signal=np.zeros((5, 2)))
    raw.push(signal=np.zeros((2, 3)))
    assert raw.detector.position == 4
    raw.reset()
    raw.push(np.zeros((1, 6)))
    with pytest.raises(ValueError, match="signal after features"):
        raw.push(signal=np.zeros((5, 3)))


def test_adapted_convolutions_are_to_be_merged():
    peft = pytest.importorskip("peft", reason="needs the train extra")
    from modeling_convtransformer.training import adapt_convolutions

    model = make_detector(is_causal=True)
    expected = torch.randn(1, 20, 6, generator=torch.Generator().manual_seed(0))
    config = adapt_convolutions(
        peft.LoraConfig(target_modules=["model.embedding.convs.0", "q_proj"], init_lora_weights=False)
    )
    adapted = peft.get_peft_model(model, config).eval()
    with pytest.raises(ValueError, match=r"is a PeftModel; expected .*merge_and_unload"):
        IncrementalDetector(adapted)
    with pytest.raises(ValueError, match=r"AdaptedConv1d in the place of a convolution.*merge_and_unload\(\)"):
        IncrementalDetector(adapted.base_model.model)
    merged = adapted.merge_and_unload()
    output = push_all(IncrementalDetector(merged), expected, [1] * 20)
    assert_equal_outputs(output, run(merged, expected), merged.config)


# --- Causality under every backend -------------------------------------------------------------------------------------------


# Settings that attention has no part in need no backend but one.
BACKENDS = ["eager", "flex_attention", "flash_attention_2", "flash_attention_3"]
OF_ATTENTION = {"n_kv_head", "mha_win_size", "use_rel_pe"}
CASES = [(name, "sdpa") for name in CAUSAL]
CASES += [
    (name, implementation)
    for name, fields in CAUSAL.items()
    if name == "default" or OF_ATTENTION & set(fields)
    for implementation in BACKENDS
    if not (implementation.startswith("flash") and fields.get("use_rel_pe"))  # flash kernels take no bias
]


@pytest.mark.parametrize(("variant", "implementation"), CASES)
def test_the_future_changes_no_output_before_it(variant, implementation, flash_installed):  # noqa: F811
    """One batch: a recording, and copies of it with another future each; then padded, with other lengths."""
    model = make_detector(**CAUSAL[variant])
    model.set_attn_implementation(implementation)
    nows, length = [31, 0, 1, 7, 16, 30], 32
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, length, width_of(model.config), generator=generator).repeat(len(nows), 1, 1)
    mask = torch.ones(len(nows), length, dtype=torch.long)
    for row, now in enumerate(nows):
        features[row, now + 1 :] = 10 * torch.randn(features[row, now + 1 :].shape, generator=generator)
        mask[row, now + 1 + (length - now) // 2 :] = 0  # some of the future is there
    positions = torch.cat([torch.arange(0, length, stride) for stride in model.config.detector_strides])
    for output in (run(model, features), run(model, features.masked_fill(mask[..., None] == 0, math.nan), mask)):
        for row, now in enumerate(nows):
            past = positions <= now
            torch.testing.assert_close(output.logits[row, past], output.logits[0, past], **CLOSE)
            torch.testing.assert_close(output.pred_segments[row, past], output.pred_segments[0, past], **SEGMENTS)
            later = (positions > now) & (output.point_mask[row] == 1)
            if later.any():  # what comes later shows the change, so that the test can fail
                assert (output.logits[row, later] - output.logits[0, later]).abs().max() > 1e-3
