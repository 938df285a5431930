"""The pipeline: every kind of input, batches, windows that give the full pass, and errors that say what to do."""

import json
import logging as python_logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media import save_encoder, write_video
from safetensors.numpy import save_file
from test_modeling_convtransformer import VARIANTS, make_config, randomize
from test_processing_convtransformer import make_processor, make_retrieval
from transformers import DetrConfig, DetrForObjectDetection, Wav2Vec2FeatureExtractor, pipeline
from transformers.utils import logging

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
    ConvTransformerModel,
    MomentRetrievalPipeline,
    TemporalActionLocalizationPipeline,
)
from modeling_convtransformer.data import window_features

TASK = "temporal-action-localization"
# float32: the same sums over arrays of other lengths, whose kernels add in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def make_pipeline(batch_size=None, **fields) -> TemporalActionLocalizationPipeline:
    config = make_config(id2label={0: "walk", 1: "run", 2: "rest"}, **fields)
    model = randomize(ConvTransformerForTemporalActionLocalization(config))
    model.class_head.output.weight.data /= 5  # scores of 1.0 are all equal
    width = sum(config.stream_widths)
    feature_extractor = ConvTransformerFeatureExtractor(feature_size=width, fps=10, feature_stride=5, num_frames=10)
    return pipeline(TASK, model=model, feature_extractor=feature_extractor, batch_size=batch_size, device="cpu")


def make_features(length: int, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(length, width)).astype(np.float32)


def expected_segments(localize, features, geometry=None, **settings) -> list[dict]:
    with torch.no_grad():
        outputs = localize.model(torch.from_numpy(features)[None])
    found = localize.feature_extractor.post_process_temporal_action_localization(outputs, geometry, **settings)[0]
    rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["segments"].tolist(), strict=True)
    names = localize.model.config.id2label
    return [{"label": names[label], "score": score, "start": a, "end": b} for label, score, (a, b) in rows]


def assert_same_segments(found: list[dict], expected: list[dict]):
    """One to one the same, within rounding; segments with equal scores to rounding may stand in another order."""
    assert len(found) == len(expected) > 0
    labels = {segment["label"] for segment in expected}
    numbers = [
        {
            label: np.array([[s["score"], s["start"], s["end"]] for s in some if s["label"] == label])
            for label in labels
        }
        for some in (found, expected)
    ]
    for label in labels:
        one, other = (side[label] for side in numbers)
        assert one.shape == other.shape
        nearest = np.abs(one[:, None] - other[None]).sum(-1).argmin(axis=1)
        assert sorted(nearest) == list(range(len(one)))
        np.testing.assert_allclose(one, other[nearest], **CLOSE)


# --- Inputs ------------------------------------------------------------------------------------------------------------------------


def test_all_kinds_of_inputs_give_the_same(tmp_path):
    localize = make_pipeline()
    features = make_features(50)
    np.save(tmp_path / "a.npy", features)
    np.savez(tmp_path / "a.npz", features=features)
    save_file({"features": features}, tmp_path / "a.safetensors")
    expected = expected_segments(localize, features, threshold=0.2, top_k=7)
    assert len(expected) == 7
    one = localize(features, threshold=0.2, top_k=7)
    assert_same_segments(one, expected)
    assert [sorted(segment) for segment in one] == [["end", "label", "score", "start"]] * 7
    assert json.loads(json.dumps(one)) == one
    assert [segment["score"] for segment in one] == sorted((segment["score"] for segment in one), reverse=True)
    kinds = [
        torch.from_numpy(features),
        tmp_path / "a.npy",
        str(tmp_path / "a.npz"),
        str(tmp_path / "a.safetensors"),
        {"features": features},
        {"features": tmp_path / "a.npy", "fps": 10},
    ]
    for kind in kinds:
        assert localize(kind, threshold=0.2, top_k=7) == one
    assert localize(kinds, threshold=0.2, top_k=7) == [one] * len(kinds)
    assert list(localize((kind for kind in kinds), threshold=0.2, top_k=7)) == [one] * len(kinds)
    assert localize(tuple(kinds[:2]), threshold=0.2, top_k=7) == [one] * 2
    assert localize(np.stack([features, features]), threshold=0.2, top_k=7) == [one] * 2
    assert localize([]) == []


def test_settings_may_be_given_once(tmp_path):
    localize = make_pipeline()
    features = make_features(50)
    expected = localize(features, threshold=0.2, top_k=3, nms_method="hard", iou_threshold=0.3)
    assert expected != localize(features, threshold=0.2, top_k=3)
    given = pipeline(
        TASK,
        model=localize.model,
        feature_extractor=localize.feature_extractor,
        threshold=0.2,
        top_k=3,
        nms_method="hard",
        iou_threshold=0.3,
    )
    assert given(features) == expected
    assert len(given(features, top_k=1)) == 1
    assert given(features, top_k=None, threshold=None) == localize(features, nms_method="hard", iou_threshold=0.3)


def test_geometry_belongs_to_the_recording():
    localize = make_pipeline()
    features = make_features(50)
    slow = {"fps": 5.0, "feature_stride": 4, "num_frames": 8}
    expected = expected_segments(localize, features, slow, top_k=5)
    assert_same_segments(localize({"features": features, **slow}, top_k=5), expected)
    assert_same_segments(localize(features, top_k=5, **slow), expected)
    both = localize([{"features": features, **slow}, features], top_k=5, batch_size=2)
    assert_same_segments(both[0], expected)
    assert_same_segments(both[1], expected_segments(localize, features, top_k=5))
    clipped = localize({"features": features, "duration": 24.6})
    assert (
        max(segment["end"] for segment in clipped)
        <= 24.6 + 1e-5
        < max(segment["end"] for segment in localize(features))
    )


def test_raw_signals_are_cut_into_windows():
    """Windows of 10 samples of 3 channels, one each 5 samples, are features of width 30."""
    localize = make_pipeline(n_in=30)
    signal = make_features(203, width=3)
    found = localize({"signal": signal}, top_k=5)
    expected = expected_segments(localize, window_features(signal, 10, 5), {"duration": 20.3}, top_k=5)
    assert_same_segments(found, expected)
    with pytest.raises(ValueError, match="signal"):
        localize(signal)


def test_batches_of_different_lengths_equal_one_by_one():
    localize = make_pipeline()
    recordings = [make_features(length, seed=length) for length in (50, 7, 33, 1, 64)]
    one_by_one = [localize(recording) for recording in recordings]
    for batch_size in (2, 3, 8):
        for found, expected in zip(localize(recordings, batch_size=batch_size), one_by_one, strict=True):
            assert_same_segments(found, expected)


def test_dtype_and_device_arguments(tmp_path):
    localize = make_pipeline()
    localize.save_pretrained(tmp_path)
    features = make_features(50)
    loaded = pipeline(TASK, model=str(tmp_path), device="cpu")
    assert loaded(features) == localize(features)
    half = pipeline(TASK, model=str(tmp_path), device="cpu", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    best, other = half(features, top_k=1)[0], localize(features, top_k=1)[0]
    assert best["label"] == other["label"]
    assert best["score"] == pytest.approx(other["score"], abs=0.05)  # bfloat16 has 8 bits
    assert not half.model.training


def test_a_model_in_training_mode_is_evaluated():
    localize = make_pipeline(path_pdrop=0.5)
    model = localize.model.train()
    again = pipeline(TASK, model=model, feature_extractor=localize.feature_extractor)
    features = make_features(50)
    assert again(features) == again(features)


# --- Windows -----------------------------------------------------------------------------------------------------------------------

# Attention in windows or none: what a point sees is finite.
LOCAL = {
    "window": {"mha_win_size": 3},
    "window_gqa_fpn": {"mha_win_size": 3, "n_kv_head": 2, "fpn_type": "fpn"},
    "mixed": {"mha_win_size": [5, 3, 3, 3], "arch": (2, 2, 3)},
    "conv": VARIANTS["conv_backbone"],
    "conv_fpn": {"backbone_type": "conv", "fpn_type": "fpn", "fpn_start_level": 1},
    "scale_4": {"scale_factor": 4, "arch": (1, 1, 2), "mha_win_size": 3},
    "causal": {"is_causal": True, "mha_win_size": 3},
    "causal_conv_fpn": {"is_causal": True, "backbone_type": "conv", "fpn_type": "fpn"},
    "kernels_5": {"mha_win_size": 3, "n_embd_ks": 5, "head_kernel_size": 5, "head_num_layers": 2},
    "no_stem": {"mha_win_size": [-1, 3, 3], "arch": (1, 0, 2)},  # nothing attends on the finest level
}


@pytest.mark.parametrize("variant", LOCAL)
def test_the_receptive_field_is_what_changes_an_output(variant):
    """
    By gradients in float64, which are exactly 0 outside: none of a point's outputs depends on a feature beyond the
    receptive field, and some depend on features far enough to show that it is no loose bound.
    """
    localize = make_pipeline(**LOCAL[variant])
    model = localize.model.double()
    before, after = model.config.receptive_field
    length = int(2 * max(before, after)) + 2 * model.config.strides[-1]
    features = torch.from_numpy(make_features(length)).double()[None].requires_grad_()
    outputs = model(features)
    seen_before = seen_after = 0
    positions = torch.cat([torch.arange(0, length, stride) for stride in model.config.detector_strides])
    for point in range(0, len(positions), 3):
        (gradient,) = torch.autograd.grad(outputs.logits[0, point].sum(), features, retain_graph=True)
        seen = gradient[0].abs().sum(-1).nonzero()[:, 0] - positions[point]
        assert -before <= seen.min()
        assert seen.max() <= after
        seen_before, seen_after = max(seen_before, -seen.min().item()), max(seen_after, seen.max().item())
    slack = 2 * model.config.strides[-1]  # points stand on a grid, and a pool or pyramid step looks to one side
    assert seen_before >= before - slack
    assert seen_after >= after - slack or after == 0


@pytest.mark.parametrize("variant", LOCAL)
def test_windows_give_the_full_pass(variant):
    """Where the receptive field fits in the overlap: every output of every point, and so every segment."""
    localize = make_pipeline(**LOCAL[variant])
    field, stride = sum(localize.model.config.receptive_field), localize.model.config.strides[-1]
    size = int(2 * field) // stride * stride + 2 * stride
    for length in (3 * size + 5, 2 * size, size + 1, size, size - 3):
        features = make_features(length)
        full = localize(features, threshold=0.1)
        for options in ({}, {"batch_size": 3}, {"overlap": int(field)}):
            assert_same_segments(localize(features, window=size, threshold=0.1, **options), full)


def test_windows_of_global_attention_cover_the_recording_too():
    localize = make_pipeline()
    assert localize.model.config.receptive_field == (float("inf"), float("inf"))
    features = make_features(400)
    plan = localize._plan_windows(400, 96, None)
    found = localize(features, window=96, threshold=0.1)
    assert {"label", "score", "start", "end"} == set(found[0])
    assert max(segment["end"] for segment in found) > 150
    assert min(segment["start"] for segment in found) < 50
    assert len(plan) > 4


@settings(deadline=None, max_examples=200)
@given(length=st.integers(1, 3000), window=st.integers(1, 700), overlap=st.one_of(st.none(), st.integers(0, 700)))
def test_windows_share_out_every_feature_once(length, window, overlap):
    localize = PLANNER
    stride = localize.model.config.strides[-1]
    try:
        plan = localize._plan_windows(length, window, overlap)
    except ValueError:
        assert window < stride or overlap is None or window - overlap < 4 * stride
        return
    assert plan[0][2] == 0
    assert plan[-1][1] == plan[-1][3] == length
    half = 0 if overlap is None else overlap / 2
    for index, (start, end, own_start, own_end) in enumerate(plan):
        assert start % stride == 0
        assert own_start % stride == 0
        assert end - start <= window
        assert start <= own_start < own_end <= end
        assert index == 0 or own_start - start >= half
        assert index == len(plan) - 1 or (end - own_end >= half and plan[index + 1][2] == own_end)


PLANNER = make_pipeline(mha_win_size=3)


def test_an_overlap_that_is_too_small_warns(caplog):
    localize = make_pipeline(mha_win_size=7)  # (no other test has its receptive field: warned once)
    logger = python_logging.getLogger("transformers")
    logger.propagate, before = True, logger.propagate
    try:
        localize(make_features(400), window=128, overlap=8)
    finally:
        logger.propagate = before
    assert "receptive field" in caplog.text


def test_long_recordings_show_progress(capfd):
    logging.enable_progress_bar()  # other tests turn it off
    localize = make_pipeline(mha_win_size=3)
    localize(make_features(100))
    assert "windows" not in capfd.readouterr().err
    localize(make_features(800), window=160)
    assert "windows: 100%" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, ["window is 0"]),
        ({"window": 7}, ["window is 7", "strides of up to 8", "window=8"]),
        ({"window": 64, "overlap": 64}, ["overlap 64", "larger than the overlap", "window=256"]),
        ({"window": 64.5}, ["window is 64.5", "number of features"]),
        ({"window": 64, "overlap": -1}, ["overlap is -1"]),
        ({"overlap": 8}, ["window is not given"]),
    ],
    ids=str,
)
def test_windows_that_do_not_work_say_so(options, words):
    localize = make_pipeline(mha_win_size=3)
    with pytest.raises(ValueError, match=r"window|overlap") as error:
        localize(make_features(400), **options)
    assert [word for word in words if word not in str(error.value)] == []


# --- Bad input ---------------------------------------------------------------------------------------------------------------------


def test_unknown_arguments_are_errors():
    localize = make_pipeline()
    with pytest.raises(TypeError, match=r"treshold.*threshold"):
        localize(make_features(50), treshold=0.5)


def test_a_bad_recording_is_named(tmp_path):
    localize = make_pipeline()
    with pytest.raises(ValueError, match=r"missing\.npy: there is no file"):
        localize(str(tmp_path / "missing.npy"))
    broken = make_features(50)
    broken[3, 2] = np.nan
    np.save(tmp_path / "broken.npy", broken)
    with pytest.raises(ValueError, match=r"broken\.npy.*NaN.*time step 3"):
        localize([make_features(20), str(tmp_path / "broken.npy")])


def save(folder, model=None, feature_extractor=True, **fields):
    model = model or ConvTransformerForTemporalActionLocalization(make_config(**fields))
    model.save_pretrained(folder)
    if feature_extractor:
        ConvTransformerFeatureExtractor(feature_size=6, fps=10, feature_stride=5).save_pretrained(folder)
    return str(folder)


def test_a_missing_preprocessor_config_says_how_to_write_one(tmp_path):
    with pytest.raises(ValueError, match=r"preprocessor_config.json") as error:
        pipeline(TASK, model=save(tmp_path, feature_extractor=False))
    for word in (
        str(tmp_path),
        "feature_extractor=",
        "ConvTransformerFeatureExtractor(feature_size=",
        "save_pretrained",
    ):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["preprocessor_config.json"]),
        ('{"feature_size": 6, "fps": -1, "feature_stride": 5}', ["fps is -1"]),
        ('{"feature_size": 6, "fps": 10}', ["preprocessor_config.json", "feature_stride"]),
        ('{"feature_size": 7, "fps": 10, "feature_stride": 5}', ["feature_size 7", "width 6"]),
    ],
    ids=["broken", "contradiction", "incomplete", "other_width"],
)
def test_a_wrong_preprocessor_config_says_what_is_wrong(text, words, tmp_path):
    folder = save(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        pipeline(TASK, model=folder)
    assert [word for word in words if word not in str(error.value)] == []


def test_a_feature_extractor_of_another_kind_is_refused(tmp_path):
    folder = save(tmp_path)
    with pytest.raises(ValueError, match=r"Wav2Vec2FeatureExtractor.*expected a ConvTransformerFeatureExtractor"):
        pipeline(TASK, model=folder, feature_extractor=Wav2Vec2FeatureExtractor())


def test_a_model_of_another_kind_is_refused(tmp_path):
    config = DetrConfig(
        use_timm_backbone=False,
        backbone_config={
            "model_type": "resnet",
            "embedding_size": 4,
            "hidden_sizes": [4, 4],
            "depths": [1, 1],
            "out_features": ["stage2"],
        },
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=2,
    )
    with pytest.raises(
        ValueError, match=r"DetrForObjectDetection.*'detr'.*ConvTransformerForTemporalActionLocalization"
    ):
        pipeline(TASK, model=DetrForObjectDetection(config), feature_extractor=make_pipeline().feature_extractor)
    with pytest.raises(ValueError, match="is a ConvTransformerModel"):
        pipeline(TASK, model=ConvTransformerModel(make_config()), feature_extractor=make_pipeline().feature_extractor)


@pytest.mark.parametrize("kind", ["backbone_only", "other_names"])
def test_weights_that_are_not_this_models_are_refused(kind, tmp_path):
    detector = ConvTransformerForTemporalActionLocalization(make_config())
    if kind == "backbone_only":
        save(tmp_path, model=detector.model)
    else:  # the weights of a version of the code that called things otherwise
        state = {name.replace("q_proj", "query_proj"): tensor for name, tensor in detector.state_dict().items()}
        detector.save_pretrained(tmp_path, state_dict=state)
        ConvTransformerFeatureExtractor(feature_size=6, fps=10, feature_stride=5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the weights lack") as error:
        pipeline(TASK, model=str(tmp_path))
    for word in (str(tmp_path), "q_proj" if kind == "other_names" else "class_head", "revision"):
        assert word in str(error.value)
    # training is the way out
    model = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path)
    localize = pipeline(TASK, model=model.train())
    assert localize.feature_extractor.fps == 10


def test_the_config_is_one_of_the_task(tmp_path):
    """What transformers itself says where a folder is no model of ours at all: it names the type and the folder's file."""
    ConvTransformerConfig(n_in=6).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text.replace('"convtransformer"', '"no_such_type"'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no_such_type|trust_remote_code=True"):
        pipeline(TASK, model=str(tmp_path), trust_remote_code=False)


# --- Moment retrieval --------------------------------------------------------------------------------------------------------------

QUERIES = ["turn the arm outward", "lift"]


def make_finder(batch_size=None, **fields) -> MomentRetrievalPipeline:
    processor = make_processor()
    parts = {"feature_extractor": processor.feature_extractor, "tokenizer": processor.tokenizer}
    return pipeline("moment-retrieval", model=make_retrieval(**fields), batch_size=batch_size, device="cpu", **parts)


def test_moments_of_all_kinds_of_inputs(tmp_path):
    find, features = make_finder(), make_features(50)
    np.save(tmp_path / "a.npy", features)
    expected = []
    with torch.no_grad():
        outputs = find.model(**make_processor()(features, QUERIES))
    (found,) = find.feature_extractor.post_process_moment_retrieval(outputs, threshold=0.1, top_k=4)
    for query, moments in zip(QUERIES, found, strict=True):
        rows = zip(moments["scores"].tolist(), moments["segments"].tolist(), strict=True)
        expected.append([{"query": query, "score": score, "start": a, "end": b} for score, (a, b) in rows])
    assert [len(moments) for moments in expected] == [4, 4]
    settings = {"threshold": 0.1, "top_k": 4}
    assert find(features, QUERIES, **settings) == expected
    assert json.loads(json.dumps(expected)) == expected
    single = find(features, "lift", **settings)
    for one, other in zip(single, expected[1], strict=True):  # other sums: a batch of one
        assert one.pop("query") == "lift"
        assert one == pytest.approx({key: value for key, value in other.items() if key != "query"}, rel=1e-5)
    assert find(tmp_path / "a.npy", queries=QUERIES, **settings) == expected
    assert find({"features": features, "queries": QUERIES}, **settings) == expected
    assert find([features, str(tmp_path / "a.npy")], QUERIES, **settings) == [expected, expected]
    assert list(find((one for one in [features, features]), QUERIES, **settings)) == [expected, expected]
    other = find({"features": features, "fps": 20}, "lift", **settings)
    assert [one["start"] for one in other] == pytest.approx([one["start"] / 2 for one in single], rel=1e-5)
    assert find([], QUERIES) == []


def test_moments_of_batches_equal_one_by_one():
    find = make_finder()
    recordings = [make_features(length, seed=length) for length in (50, 23, 37)]
    alone = [find(one, QUERIES, threshold=0.1, top_k=4) for one in recordings]
    batched = find(recordings, QUERIES, threshold=0.1, top_k=4, batch_size=2)
    for found, expected in zip(batched, alone, strict=True):
        for one, other in zip(found, expected, strict=True):
            assert [moment["query"] for moment in one] == [moment["query"] for moment in other]
            numbers = [[[m["score"], m["start"], m["end"]] for m in side] for side in (one, other)]
            np.testing.assert_allclose(*numbers, **CLOSE)


def test_recordings_with_queries_of_their_own():
    """Of different numbers, with different numbers of words."""
    find = make_finder()
    recordings = [
        {"features": make_features(50), "queries": ["lift"]},
        {"features": make_features(40, seed=1), "queries": ["turn the arm outward", "lean"]},
        {"features": make_features(30, seed=2), "queries": "the arm"},
    ]
    alone = [find(one, top_k=3) for one in recordings]
    assert [[moment["query"] for moment in own] for own in alone[1]] == [["turn the arm outward"] * 3, ["lean"] * 3]
    for batch_size in (2, 3):
        batched = find(recordings, top_k=3, batch_size=batch_size)
        for found, expected in zip(batched, alone, strict=True):
            flat = [
                [moment for own in side for moment in (own if isinstance(own, list) else [own])]
                for side in (found, expected)
            ]
            assert [moment["query"] for moment in flat[0]] == [moment["query"] for moment in flat[1]]
            numbers = [[[m["score"], m["start"], m["end"]] for m in side] for side in flat]
            np.testing.assert_allclose(*numbers, **CLOSE)
    assert find(recordings[0]["features"], (query for query in QUERIES), top_k=1)[1][0]["query"] == QUERIES[1]


def test_a_saved_finder(tmp_path):
    find, features = make_finder(), make_features(50)
    find.model.save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    loaded = pipeline("moment-retrieval", model=str(tmp_path))
    assert type(loaded) is MomentRetrievalPipeline
    assert loaded(features, QUERIES, top_k=3) == find(features, QUERIES, top_k=3)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([], "No queries given"),
        (None, "No queries given: pass a text"),
        ("", "query 0 is ''"),
        (["lift", " "], "query 1 is ' '"),
        ([["lift", "lean"]], "is a list of lists; .*pass dicts"),
        (5, "queries is 5; expected a text"),
        (["lift " * 20], "20 tokens, but the text encoder takes at most 12"),
    ],
)
def test_queries_that_cannot_be_asked(queries, message):
    with pytest.raises(ValueError, match=message):
        make_finder()(make_features(20), queries)


def test_a_finder_that_lacks_something(tmp_path):
    processor = make_processor()
    parts = {"feature_extractor": processor.feature_extractor, "tokenizer": processor.tokenizer}
    with pytest.raises(ValueError, match="has no text encoder"):
        pipeline("moment-retrieval", model=make_retrieval(text_config=None, text_dim=5), **parts)
    with pytest.raises(ValueError, match="takes a ConvTransformerForMomentRetrieval"):
        pipeline("moment-retrieval", model=make_pipeline().model, **parts)
    make_retrieval().save_pretrained(tmp_path)
    processor.feature_extractor.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"no usable tokenizer.*ConvTransformerProcessor\(feature_extractor, tokenizer\)"
    ):
        pipeline("moment-retrieval", model=str(tmp_path))
    with pytest.raises(TypeError, match="Unknown arguments: window"):
        make_finder()(make_features(20), "lift", window=9)


# --- Recordings in files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def media_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    save_encoder(folder / "videomae")
    write_video(folder / "match.mp4", frames=60, rate=25, sound=True)
    return folder


def make_video_pipeline(**settings) -> TemporalActionLocalizationPipeline:
    config = make_config(n_in=16, id2label={0: "walk", 1: "run", 2: "rest"})
    model = randomize(ConvTransformerForTemporalActionLocalization(config))
    model.class_head.output.weight.data /= 5
    geometry = {"feature_size": 16, "fps": 12.5, "feature_stride": 2, "num_frames": 6}
    feature_extractor = ConvTransformerFeatureExtractor(**geometry, **settings.pop("feature_extractor", {}))
    return pipeline(TASK, model=model, feature_extractor=feature_extractor, device="cpu", **settings)


def test_a_video_is_localized_in_one_call(media_files, tmp_path):
    from modeling_convtransformer.features import extract_features, load_encoder

    video, name = media_files / "match.mp4", str(media_files / "videomae")
    clock = {"fps": 12.5, "feature_stride": 2, "num_frames": 6}  # the model's, not the video's
    sample = extract_features(video, load_encoder(name), **clock, progress=False)
    assert sample["features"].shape == (13, 16)
    expected = make_video_pipeline()(sample)
    assert expected

    named = make_video_pipeline(feature_extractor={"encoder": name})
    named.save_pretrained(tmp_path / "model")
    saved = pipeline(TASK, model=str(tmp_path / "model"))
    assert saved.feature_extractor.encoder == {"name": name}
    assert_same_segments(saved(str(video)), expected)
    assert_same_segments(make_video_pipeline(encoder=name)(video), expected)
    assert_same_segments(
        make_video_pipeline()(str(video), encoder={"name": name, "pooling": "mean", "revision": None}), expected
    )
    assert_same_segments(make_video_pipeline()(video, encoder=load_encoder(name)), expected)
    slower = {"fps": 6.25, "feature_stride": 1, "num_frames": 6}
    expected_slower = make_video_pipeline()(extract_features(video, load_encoder(name), **slower, progress=False))
    assert_same_segments(saved({"features": video, **slower}), expected_slower)
    for found in saved([str(video), sample["features"]], batch_size=2):
        assert len(found) == len(expected)
    opened = saved.open(video)
    np.testing.assert_allclose(opened.pop("features"), sample.pop("features"), rtol=0, atol=1e-5)  # float32
    assert opened == sample
    first = saved._encoder[1]
    saved(video)
    assert saved._encoder[1] is first  # loaded once


def test_files_of_features_bring_their_geometry(media_files, tmp_path):
    from modeling_convtransformer.features import extract_features, load_encoder

    localize, cache = make_video_pipeline(), tmp_path / "match.safetensors"
    encoder = load_encoder(media_files / "videomae")
    sample = extract_features(media_files / "match.mp4", encoder, feature_stride=3, cache=cache, progress=False)
    assert sample["fps"] == 25
    assert_same_segments(localize(str(cache)), localize(sample))
    assert localize.feature_extractor.geometry_of([cache])[0] == {k: v for k, v in sample.items() if k != "features"}
    faster = {**sample, "fps": 50.0, "duration": sample["duration"] / 2}
    assert_same_segments(localize({"features": cache, "fps": 50.0, "duration": 1.2}), localize(faster))


def test_tables_of_sensor_values_are_recordings(tmp_path):
    pytest.importorskip("pyarrow", reason="tables of sensor values need pyarrow: pip install pyarrow")
    localize = make_pipeline()  # windows of 10 samples at 10 Hz
    localize.feature_extractor = ConvTransformerFeatureExtractor(
        feature_size=6, fps=10, feature_stride=1, num_frames=2
    )
    values = np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32)
    rows = [",".join([f"{i / 10:g}", *map(repr, map(float, row))]) for i, row in enumerate(values)]
    path = tmp_path / "session.csv"
    path.write_text("\n".join(["time,x,y,z", *rows]))
    expected = localize({"signal": values})
    assert_same_segments(localize(str(path)), expected)
    assert_same_segments(localize({"signal": path}), expected)
    swapped = localize(path, columns=["z", "y", "x"])
    assert_same_segments(swapped, localize({"signal": np.ascontiguousarray(values[:, ::-1])}))
    path.write_text(path.read_text().replace("0.5,", "0.5,oops"))
    with pytest.raises(ValueError, match=r"session\.csv: column 'x' holds 'oops"):
        localize(path)


def test_recordings_that_cannot_be_read_say_why(media_files, tmp_path):
    localize = make_video_pipeline()
    with pytest.raises(ValueError, match=r"match\.mp4: no file of features .* so it takes an encoder"):
        localize(media_files / "match.mp4")
    narrow = make_pipeline()
    with pytest.raises(ValueError, match=r"gives features of width 16, but the model takes 6"):
        narrow(media_files / "match.mp4", encoder=str(media_files / "videomae"))
    with pytest.raises(ValueError, match=r"nothing\.mp4: there is no such file"):
        localize("nothing.mp4", encoder=str(media_files / "videomae"))
    with pytest.raises(ValueError, match=r"match\.mp4: fps is 5 beside its features, but 10 in `geometry`"):
        localize({"features": media_files / "match.mp4", "fps": 5}, encoder="not even loaded", fps=10)
    with pytest.raises(ValueError, match=r"match\.mp4: a sample with the keys features, rate"):
        localize({"features": media_files / "match.mp4", "rate": 5}, encoder="not even loaded")
    with pytest.raises(ValueError, match=r"match\.mp4: no file of sensor values; expected one of \.npy"):
        localize({"signal": media_files / "match.mp4"})
    for encoder in ({"revision": "main"}, {"name": "a", "size": 3}, 5):
        with pytest.raises(ValueError, match="expected the name of a model of transformers"):
            localize(media_files / "match.mp4", encoder=encoder)
    with pytest.raises(ValueError, match="encoder is"):
        ConvTransformerFeatureExtractor(encoder=["a"])
