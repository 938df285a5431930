"""The feature extractor against hand-computed numbers, v1's suppression and a slow greedy loop in plain Python."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors
from transformers import AutoFeatureExtractor
from transformers.dynamic_module_utils import get_imports

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerTemporalActionLocalizationOutput,
)
from modeling_convtransformer import feature_extraction_convtransformer as module
from modeling_convtransformer.feature_extraction_convtransformer import overlap, suppress, vote, window_features

FIXTURES = Path(__file__).parent / "fixtures"
RECIPES = sorted((Path(__file__).parent.parent / "configuration").glob("*.yaml"))

# Scores and segments are float32, which rounds to 6e-8 of a value: 1e-6 grants a few roundings in a row.
FLOAT32 = {"rel": 1e-6, "abs": 1e-6}

# The settings of post-processing, each unlike its default.
UNUSUAL = {
    "pre_nms_thresh": 0.02,
    "pre_nms_topk": 77,
    "iou_threshold": 0.33,
    "min_score": 0.04,
    "max_seg_num": 55,
    "nms_method": "linear",
    "nms_sigma": 0.66,
    "duration_thresh": 0.25,
    "multiclass_nms": False,
    "voting_thresh": 0.88,
    "external_topk": 3,
}
# Post-processing that leaves all candidates as they are.
OFF = {"nms_method": "none", "pre_nms_thresh": 0.0, "duration_thresh": 0.0}


def make(**settings):
    """Features of 4 numbers; 1 feature covers 16 frames, the next starts 4 frames later, at 8 frames a second."""
    return ConvTransformerFeatureExtractor(
        **{"feature_size": 4, "fps": 8.0, "feature_stride": 4, "num_frames": 16, **settings}
    )


def plain(**settings):
    """Grid = seconds, but for a shift of 0.5: results are easy to read."""
    return ConvTransformerFeatureExtractor(
        **{"feature_size": 4, "fps": 1.0, "feature_stride": 1, "num_frames": 1, **settings}
    )


def sensor(**settings):
    """Windows of 3 samples of 2 channels, one each 2 samples, at 8 samples a second."""
    return make(**{"feature_size": 6, "num_frames": 3, "feature_stride": 2, **settings})


def features(length, seed=0, width=4):
    return np.random.default_rng(seed).normal(size=(length, width)).astype(np.float32)


def outputs(scores, segments, **more):
    """Model outputs whose sigmoid gives `scores` (batch, points, classes)."""
    scores = torch.as_tensor(scores, dtype=torch.float64)
    return {"logits": scores.logit().float(), "pred_segments": torch.as_tensor(segments, dtype=torch.float32), **more}


def process(extractor, *args, **kwargs):
    return extractor.post_process_temporal_action_localization(*args, **kwargs)


# --- In: batches ----------------------------------------------------------------------------------------------------


def test_pads_a_batch_with_the_padding_value():
    long, short = features(5), features(3, seed=1)
    batch = make(padding_value=-7.0)([long, short])

    assert batch["input_features"].dtype == torch.float32
    assert batch["input_features"].shape == (2, 5, 4)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    np.testing.assert_array_equal(batch["input_features"][0].numpy(), long)
    np.testing.assert_array_equal(batch["input_features"][1, :3].numpy(), short)
    assert batch["input_features"][1, 3:].tolist() == [[-7.0] * 4] * 2
    assert "labels" not in batch


@pytest.mark.parametrize(
    "convert",
    [
        np.asarray,
        lambda x: x.astype(np.float64),
        lambda x: np.asfortranarray(x),
        torch.from_numpy,
        lambda x: torch.from_numpy(x).requires_grad_(),
        lambda x: x.tolist(),
        list,
        lambda x: [torch.from_numpy(step) for step in x],
        lambda x: x[None],
        lambda x: torch.from_numpy(x)[None],
        lambda x: [x],
        lambda x: (x,),
        lambda x: [torch.from_numpy(x)],
        lambda x: [x.tolist()],
    ],
    ids=[
        "array",
        "float64",
        "fortran",
        "tensor",
        "tensor_grad",
        "lists",
        "list_of_steps",
        "list_of_step_tensors",
        "array_3d",
        "tensor_3d",
        "list_of_one",
        "tuple_of_one",
        "list_of_one_tensor",
        "nested_lists",
    ],
)
def test_one_sample_in_any_form(convert):
    sample = features(6)
    batch = make()(convert(sample))
    np.testing.assert_array_equal(batch["input_features"].numpy(), sample[None])
    assert batch["attention_mask"].tolist() == [[1] * 6]


@pytest.mark.parametrize(
    "convert", [np.stack, lambda x: torch.from_numpy(np.stack(x)), list, lambda x: np.stack(x).tolist()]
)
def test_several_samples_in_any_form(convert):
    samples = [features(6, seed) for seed in range(3)]
    batch = make()(convert(samples))
    np.testing.assert_array_equal(batch["input_features"].numpy(), np.stack(samples))


def test_other_numbers_become_float32():
    steps = np.arange(12).reshape(3, 4)
    for sample in (steps, steps.astype(np.int8), steps.astype(np.float16), torch.from_numpy(steps).bfloat16()):
        batch = make()(sample)
        assert batch["input_features"].dtype == torch.float32
        assert batch["input_features"][0].tolist() == steps.tolist()
    assert make()(np.eye(4, dtype=bool))["input_features"][0].tolist() == np.eye(4).tolist()


def test_reads_files(tmp_path):
    samples = [features(length, seed=length) for length in range(3, 11)]
    np.save(tmp_path / "plain.npy", samples[0])
    np.save(tmp_path / "double.npy", samples[1].astype(np.float64))
    np.savez(tmp_path / "one.npz", whatever=samples[2])
    np.savez_compressed(tmp_path / "named.npz", features=samples[3], times=np.arange(6))
    np.savez(tmp_path / "feats.npz", feats=samples[4], fps=np.float64(25))
    save_file({"whatever": samples[5]}, tmp_path / "one.safetensors")
    save_file({"features": samples[6], "times": np.arange(9)}, tmp_path / "NAMED.SAFETENSORS")
    save_file({"feats": samples[7].astype(np.float64), "fps": np.array([25.0])}, tmp_path / "feats.safetensors")
    names = ["plain.npy", "double.npy", "one.npz", "named.npz", "feats.npz"]
    names += ["one.safetensors", "NAMED.SAFETENSORS", "feats.safetensors"]
    paths = [tmp_path / name for name in names]

    batch = make()([*paths[:3], *map(str, paths[3:])])
    assert batch["attention_mask"].sum(1).tolist() == list(range(3, 11))
    for row, sample in zip(batch["input_features"], samples, strict=True):
        np.testing.assert_array_equal(row[: len(sample)].numpy(), sample)
        assert row[len(sample) :].abs().sum() == 0

    for path, sample in zip(paths, samples, strict=True):
        for one in (path, str(path), [path]):
            np.testing.assert_array_equal(make()(one)["input_features"][0].numpy(), sample)
    mixed = make()([samples[2], paths[2], torch.from_numpy(samples[2])])
    np.testing.assert_array_equal(mixed["input_features"].numpy(), np.stack([samples[2]] * 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e5m2, torch.int32])
def test_reads_safetensors_of_any_numbers(tmp_path, dtype):
    """numpy has neither bfloat16 nor float8."""
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    save_tensors({"features": tensor}, tmp_path / "some.safetensors")
    assert make()(tmp_path / "some.safetensors")["input_features"][0].tolist() == tensor.float().tolist()


def test_bfloat16_needs_torch(tmp_path, monkeypatch):
    path = tmp_path / "half.safetensors"
    save_tensors({"features": torch.zeros(3, 4).bfloat16()}, path)
    monkeypatch.setattr(module, "is_torch_available", lambda: False)
    with pytest.raises(ValueError, match=rf"^{path}: .*numbers of type BF16 need torch.*astype\(np.float32\)"):
        make()(path)


def test_padding_arguments():
    samples = [features(5), features(3)]

    def length(batch):
        assert batch["attention_mask"].sum(1).tolist() == [min(5, batch["attention_mask"].shape[1]), 3]
        return batch["input_features"].shape[1]

    assert length(make()(samples)) == 5
    assert length(make()(samples, pad_to_multiple_of=4)) == 8
    assert length(make()(samples, padding="max_length", max_length=11)) == 11
    assert length(make(pad_to_multiple_of=6)(samples)) == 6
    assert length(make(pad_to_multiple_of=6)(samples, pad_to_multiple_of=7)) == 7
    assert length(make()(samples, padding="max_length", max_length=4, truncation=True)) == 4
    assert "attention_mask" not in make()(samples, return_attention_mask=False)
    arrays = make()(samples, padding=False, return_tensors=None)["input_features"]
    assert [array.shape for array in arrays] == [(5, 4), (3, 4)]
    assert isinstance(make()(samples, return_tensors="np")["input_features"], np.ndarray)
    with pytest.raises(TypeError, match="paddding"):
        make()(samples, paddding=True)
    with pytest.raises(ValueError, match="annotated segments"):
        make()(samples, annotations=[[], []], truncation=True, max_length=4, padding="max_length")


def test_the_geometry_is_given_whole_or_not_at_all(tmp_path):
    """Common tests of transformers make one without arguments; a half-known geometry would shift every segment."""
    default = ConvTransformerFeatureExtractor()
    assert (default.feature_size, default.fps, default.feature_stride, default.num_frames) == (2048, 30, 4, 16)
    assert default.feature_size == ConvTransformerConfig().n_in
    for settings_given, missing in (
        ({"feature_size": 6}, "fps, feature_stride"),
        ({"feature_size": 6, "fps": 10}, "feature_stride"),
        ({"fps": 10, "feature_stride": 5}, "feature_size"),
        ({"num_frames": 16}, "feature_size, fps, feature_stride"),
    ):
        with pytest.raises(ValueError, match=f"settings lack {missing}: "):
            ConvTransformerFeatureExtractor(**settings_given)
    for text in ("{}", '{"feature_size": 6, "feature_stride": 5}'):
        (tmp_path / "preprocessor_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"settings lack .*fps"):
            ConvTransformerFeatureExtractor.from_pretrained(tmp_path)


@pytest.mark.parametrize(("longest", "expected"), [(5, 8), (8, 8), (9, 12), (12, 12), (13, 18)])
def test_pads_as_v1_does(longest, expected):
    """To the training length (8), or beyond it to a multiple (6), of which 8 is none."""
    batch = make(min_length=8, pad_to_multiple_of=6)([features(longest), features(2)])
    assert batch["input_features"].shape == (2, expected, 4)
    assert batch["attention_mask"].sum(1).tolist() == [longest, 2]


def test_inherited_pad():
    extractor = make(padding_value=2.0)
    samples = [features(4), features(2, seed=1)]
    expected = extractor(samples)
    padded = extractor.pad([{"input_features": sample} for sample in samples], return_tensors="pt")
    assert torch.equal(padded["input_features"], expected["input_features"])
    assert torch.equal(padded["attention_mask"], expected["attention_mask"])
    assert padded["input_features"][1, 2:].tolist() == [[2.0] * 4] * 2
    padded = extractor.pad({"input_features": samples}, padding="max_length", max_length=6, return_tensors="np")
    assert padded["input_features"].shape == (2, 6, 4)
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("return_tensors", ["pt", "np"])
def test_features_of_width_one_are_padded_in_time_only(return_tensors):
    """transformers takes a feature_size of 1 for sequences without an axis of channels."""
    samples = [features(3, width=1), features(2, seed=1, width=1)]
    batch = make(feature_size=1, padding_value=2.0)(samples, pad_to_multiple_of=4, return_tensors=return_tensors)
    assert batch["input_features"].shape == (2, 4, 1)
    assert batch["input_features"][0, :3].tolist() == samples[0].tolist()
    assert batch["input_features"][1, 2:].tolist() == [[2.0], [2.0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    without_axis = make(feature_size=1).pad({"input_features": [[1.0, 2.0], [3.0]]}, return_tensors=return_tensors)
    assert without_axis["input_features"].tolist() == [[1.0, 2.0], [3.0, 0.0]]


# --- In: annotations ------------------------------------------------------------------------------------------------


def test_annotations_in_seconds_become_labels_on_the_grid():
    # 8 frames a second: 2 s = 16 frames; minus half of 16, divided by 4: 2. Likewise 3.5 s -> 5, 0 s -> -2, 0.25 s -> -1.5.
    seconds, grid = [[2.0, 3.5], [0.0, 0.25]], [[2.0, 5.0], [-2.0, -1.5]]
    forms = [
        {"segments": seconds, "labels": [1, 0]},
        {"segments": np.array(seconds), "class_labels": np.array([1, 0])},
        {"segments": torch.tensor(seconds), "labels": torch.tensor([1, 0])},
        [{"segment": segment, "label_id": label} for segment, label in zip(seconds, [1, 0], strict=True)],
    ]
    for form in forms:
        for given_as in (form, [form]):
            (label,) = make()(features(20), annotations=given_as)["labels"]
            assert label["segments"].dtype == torch.float32
            assert label["class_labels"].dtype == torch.long
            assert label["segments"].tolist() == grid  # exact: all are multiples of 1/2
            assert label["class_labels"].tolist() == [1, 0]


def test_annotations_with_names():
    label2id = {"run": 3, "jump": 1}
    named = [{"segment": [2.0, 3.5], "label": "jump"}, {"segment": [0.0, 0.25], "label": "run", "label_id": 1}]
    (label,) = make()(features(20), annotations=named, label2id=label2id)["labels"]
    assert label["class_labels"].tolist() == [1, 3]  # the name counts
    (label,) = make()(features(20), annotations={"segments": [[1, 2]], "labels": ["run"]}, label2id=label2id)["labels"]
    assert label["class_labels"].tolist() == [3]
    (label,) = make()(features(20), annotations={"segments": [[1, 2]], "labels": [3]}, label2id=label2id)["labels"]
    assert label["class_labels"].tolist() == [3]


@pytest.mark.parametrize("empty", [[], {"segments": [], "labels": []}, {"segments": np.zeros((0, 2)), "labels": []}])
def test_empty_annotations(empty):
    batch = make()([features(5), features(20)], annotations=[empty, {"segments": [[1.0, 2.0]], "labels": [0]}])
    first, second = batch["labels"]
    assert first["segments"].shape == (0, 2)
    assert first["segments"].dtype == torch.float32
    assert first["class_labels"].shape == (0,)
    assert first["class_labels"].dtype == torch.long
    assert second["segments"].tolist() == [[0.0, 2.0]]
    (label,) = make()(features(5), annotations=[empty])["labels"]
    assert label["segments"].shape == (0, 2)


def test_no_annotations_for_one_sample():
    (label,) = make()(features(5), annotations=[])["labels"]
    assert label["segments"].shape == (0, 2)


def test_labels_are_of_the_kind_that_is_returned():
    annotation = {"segments": torch.tensor([[2.0, 3.5]]), "labels": torch.tensor([1])}
    for return_tensors in ("np", None):
        (label,) = make()(features(20), annotations=annotation, return_tensors=return_tensors)["labels"]
        assert isinstance(label["segments"], np.ndarray)
        assert label["segments"].dtype == np.float32
        assert label["segments"].tolist() == [[2.0, 5.0]]
        assert label["class_labels"].dtype == np.int64
        assert label["class_labels"].tolist() == [1]
        (label,) = make()(features(20), annotations=[], return_tensors=return_tensors)["labels"]
        assert (label["segments"].shape, label["class_labels"].shape) == ((0, 2), (0,))


def test_geometry_of_each_sample_sets_its_labels():
    annotation = {"segments": [[1.0, 2.0]], "labels": [0]}
    geometry = [{"fps": 16.0}, {"feature_stride": 2, "num_frames": 4}, {}]
    batch = make()([features(20)] * 3, annotations=[annotation] * 3, geometry=geometry)
    # (16 - 8) / 4 = 2, (32 - 8) / 4 = 6; (8 - 2) / 2 = 3, (16 - 2) / 2 = 7; (8 - 8) / 4 = 0, (16 - 8) / 4 = 2
    assert [label["segments"].tolist() for label in batch["labels"]] == [[[2, 6]], [[3, 7]], [[0, 2]]]
    batch = make()([features(20)] * 2, annotations=[annotation] * 2, geometry={"fps": 16.0})
    assert [label["segments"].tolist() for label in batch["labels"]] == [[[2, 6]], [[2, 6]]]


def test_segments_may_end_in_the_last_window():
    # 20 features: (19 * 4 + 16) / 8 = 11.5 s, and a window of 2 s is granted beyond.
    for end in (11.5, 13.5):
        (label,) = make()(features(20), annotations={"segments": [[1.0, end]], "labels": [0]})["labels"]
        assert label["segments"].tolist() == [[0.0, (end * 8 - 8) / 4]]
    with pytest.raises(ValueError, match=r"11\.50 s"):
        make()(features(20), annotations={"segments": [[1.0, 13.6]], "labels": [0]})
    with pytest.raises(ValueError, match=r"10\.00 s"):
        make()(features(20), annotations={"segments": [[1.0, 12.1]], "labels": [0]}, geometry={"duration": 10.0})


@settings(deadline=None, max_examples=50)
@given(
    fps=st.floats(0.5, 240),
    stride=st.floats(0.5, 64),
    num_frames=st.floats(0.5, 64),
    start=st.floats(0, 50),
    length=st.floats(0.1, 50),
)
def test_seconds_to_grid_and_back(fps, stride, num_frames, start, length):
    extractor = make(fps=fps, feature_stride=stride, num_frames=num_frames)
    steps = math.ceil(((start + length) * fps - num_frames) / stride) + 1
    assume(steps <= 20000)
    annotation = {"segments": [[start, start + length]], "labels": [0]}
    (label,) = extractor(features(max(steps, 1)), annotations=annotation)["labels"]
    (result,) = process(extractor, outputs([[[0.5]]], label["segments"][None]), **OFF)
    # Decoding has four steps in float32, with three constants: each of the seven rounds to 6e-8 of the largest number.
    tolerance = 5e-7 * (start + length + num_frames / fps)
    assert result["segments"][0].tolist() == pytest.approx([start, start + length], abs=tolerance)


# --- In: signals and samples with their own geometry ----------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(
    samples=st.integers(1, 60),
    channels=st.integers(1, 4),
    window=st.integers(1, 9),
    stride=st.integers(1, 12),
    whole=st.sampled_from([int, float]),
)
def test_a_signal_is_cut_into_windows(samples, channels, window, stride, whole):
    assume(samples >= window)
    signal = features(samples, width=channels)
    extractor = make(feature_size=window * channels, num_frames=whole(window), feature_stride=whole(stride))
    batch = extractor({"signal": signal})
    # A loop over all places where a window fits.
    expected = [signal[start : start + window].ravel() for start in range(0, samples - window + 1, stride)]
    np.testing.assert_array_equal(batch["input_features"].numpy(), np.stack(expected)[None])
    assert extractor.geometry_of({"signal": signal}) == [
        {"fps": 8.0, "feature_stride": stride, "num_frames": window, "duration": samples / 8.0}
    ]


def test_samples_as_dicts(tmp_path):
    signal, array = features(9, width=2), features(4, seed=1, width=6)
    np.save(tmp_path / "signal.npy", signal)
    np.save(tmp_path / "features.npy", array)
    windows = window_features(signal, 3, 2)
    assert len(windows) == len(array) == 4
    for sample in (
        {"signal": signal},
        {"signal": torch.from_numpy(signal)},
        {"signal": signal.tolist()},
        {"signal": tmp_path / "signal.npy"},
        {"signal": str(tmp_path / "signal.npy"), "fps": 50, "duration": None},
    ):
        for given_as in (sample, [sample]):
            np.testing.assert_array_equal(sensor()(given_as)["input_features"][0].numpy(), windows)
    for sample in (
        {"features": array},
        {"features": torch.from_numpy(array), "duration": 1.25},
        {"features": list(array)},
        {"features": str(tmp_path / "features.npy"), "fps": None},
    ):
        for given_as in (sample, [sample]):
            np.testing.assert_array_equal(sensor()(given_as)["input_features"][0].numpy(), array)
    for mixed in ([{"signal": signal}, array, tmp_path / "features.npy"], [array, {"signal": signal}, array]):
        batch = sensor()(mixed)["input_features"].numpy()
        for row, sample in zip(batch, mixed, strict=True):
            np.testing.assert_array_equal(row, windows if isinstance(sample, dict) else array)


def test_geometry_beside_the_values_counts_as_geometry():
    annotation = {"segments": [[1.0, 2.0]], "labels": [0]}
    array = features(20)
    own = [{"fps": 16.0}, {"feature_stride": 2, "num_frames": 4}, {"duration": 11.0}]
    batch = make()([{"features": array, **one} for one in own], annotations=[annotation] * 3)
    expected = make()([array] * 3, annotations=[annotation] * 3, geometry=own)
    assert [label["segments"].tolist() for label in batch["labels"]] == [
        label["segments"].tolist() for label in expected["labels"]
    ]
    assert make().geometry_of([{"features": array, **one} for one in own]) == make().geometry_of([array] * 3, own)
    # Both may say the same, and each something else.
    (whole,) = make().geometry_of(
        {"features": array, "fps": np.float32(16)}, {"fps": 16, "duration": 5, "num_frames": None}
    )
    assert whole == {"fps": 16.0, "feature_stride": 4, "num_frames": 16, "duration": 5}
    assert isinstance(whole["fps"], float)
    # The windows of a signal are those of its own geometry.
    windows = make(feature_size=6)([{"signal": features(9, width=2), "num_frames": 3, "feature_stride": 2}])
    np.testing.assert_array_equal(windows["input_features"][0], window_features(features(9, width=2), 3, 2))
    windows = make(feature_size=6)({"signal": features(9, width=2)}, geometry={"num_frames": 3, "feature_stride": 2})
    np.testing.assert_array_equal(windows["input_features"][0], window_features(features(9, width=2), 3, 2))


def test_the_duration_of_a_signal_is_known():
    signal = features(9, width=2)
    sensor()({"signal": signal}, annotations={"segments": [[0.5, 1.0]], "labels": [0]})
    with pytest.raises(ValueError, match=r"ends after the recording, at 1\.12 s"):
        sensor()({"signal": signal}, annotations={"segments": [[0.5, 1.6]], "labels": [0]})
    assert sensor().geometry_of(
        [{"signal": signal, "fps": 4.5}, {"signal": signal, "duration": 1.1}, features(3)]
    ) == [
        {"fps": 4.5, "feature_stride": 2, "num_frames": 3, "duration": 2.0},
        {"fps": 8.0, "feature_stride": 2, "num_frames": 3, "duration": 1.1},
        {"fps": 8.0, "feature_stride": 2, "num_frames": 3, "duration": None},
    ]
    # so results are clipped to it
    extractor = sensor()
    found = outputs([[[0.9]]], [[[0, 40]]])
    (result,) = process(extractor, found, geometry=extractor.geometry_of({"signal": signal}))
    assert result["segments"].tolist() == [[0.1875, 1.125]]


@pytest.mark.parametrize("key", ["fps", "sampling_rate"])
def test_a_signal_of_another_rate_is_not_taken_for_the_models(tmp_path, key):
    extractor = sensor()
    path = tmp_path / "session.npz"
    np.savez(path, signal=features(9, width=2), **{key: 2 * extractor.fps})
    for sample in ({"signal": path}, {"signal": path, "duration": 9.0}):
        with pytest.raises(
            ValueError, match=rf"session.npz: says that it has 16 samples a second; expected {extractor.fps:g}"
        ):
            extractor(sample)
    # Whoever says so knows.
    for fps in (extractor.fps, 2 * extractor.fps):
        assert extractor.geometry_of({"signal": path, "fps": fps})[0]["fps"] == fps
        assert extractor.geometry_of({"signal": path}, geometry={"fps": fps})[0]["fps"] == fps
    np.savez(path, signal=features(9, width=2), **{key: np.float64([extractor.fps])})
    extractor({"signal": path})
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut.npz: it is no readable"):
        extractor({"signal": tmp_path / "cut.npz"})


@pytest.mark.parametrize("kind", ["features", "signal"])
def test_load_reads_once_for_values_and_geometry(tmp_path, monkeypatch, kind):
    path = tmp_path / "one.npy"
    np.save(path, features(9, width=2 if kind == "signal" else 6))
    reads = []
    read = np.load
    monkeypatch.setattr(np, "load", lambda *args, **kwargs: reads.append(args) or read(*args, **kwargs))

    extractor = sensor()
    sample = {kind: path, "fps": 4.0}
    array, geometry = extractor.load(sample)
    assert len(reads) == 1
    assert array.dtype == np.float32
    assert array.shape == ((4, 6) if kind == "signal" else (9, 6))
    assert geometry["fps"] == 4.0
    assert geometry["duration"] == (9 / 4.0 if kind == "signal" else None)
    loaded = {"features": array, **geometry}
    assert extractor.geometry_of(loaded) == [geometry]
    batch = extractor(loaded)
    assert len(reads) == 1
    extractor.geometry_of({kind: path, "duration": 2.0})
    extractor.geometry_of(path)
    assert len(reads) == 1
    assert torch.equal(batch["input_features"], extractor(sample)["input_features"])
    assert extractor.geometry_of(sample) == [geometry]


def test_load_takes_one_sample_in_any_form(tmp_path):
    array = features(9)
    np.save(tmp_path / "one.npy", array)
    for sample in (array, torch.from_numpy(array).bfloat16().double(), array.tolist(), tmp_path / "one.npy"):
        found, geometry = make().load(sample, geometry={"fps": 30})
        np.testing.assert_allclose(found, array, rtol=2**-8)
        assert geometry == {"fps": 30, "feature_stride": 4, "num_frames": 16, "duration": None}
    with pytest.raises(ValueError, match=r"^sample 0: features of shape \(2, 9, 4\)"):
        make().load(np.stack([array, array]))
    with pytest.raises(ValueError, match=r"^my video: features of shape"):
        make().load(array[:, :3], "my video")
    with pytest.raises(ValueError, match=r"^my video: 9 features contradict the duration"):
        make().load({"features": array, "duration": 90.0}, name="my video")


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            {"features": features(9), "rate": 8},
            "with the keys features, rate; expected .* fps, feature_stride, num_frames",
        ),
        (
            {"signal": features(9), "features": features(9)},
            "keys signal, features; expected either features or signal",
        ),
        ({"values": features(9)}, "keys values; expected either features or signal"),
        ({"fps": 8}, "keys fps; expected either features or signal"),
        ({}, "keys ; expected either features or signal"),
        ({"input_features": features(9)}, "keys input_features; .*input_features is a whole batch"),
        ({"features": features(9), 3: 4}, "keys features, 3; expected"),
        ({"features": None}, "dtype object; expected numbers"),
        ({"features": [[1.0, 2.0], [3.0]]}, "features that are no array"),
        ({"features": features(9)[None]}, r"features of shape \(1, 9, 4\); expected .* \(time, channels\)"),
        ({"features": features(9, width=6), "fps": -1}, "fps is -1; expected a positive number"),
        ({"features": features(9, width=6), "duration": "3 s"}, "duration is '3 s'; expected a positive number"),
        ({"signal": features(9)}, r"signal of shape \(9, 4\); expected \(samples, 2\).*num_frames \* channels"),
        (
            {"signal": features(2, width=9)},
            r"signal of shape \(2, 9\); expected \(samples, 2\).*transpose it, signal\.T",
        ),
        ({"signal": features(9)[:, 0]}, r"signal of shape \(9,\); expected .* \(samples, channels\)"),
        ({"signal": features(0, width=2)}, "signal with no time steps"),
        ({"signal": features(2, width=2)}, "signal has 2 samples; expected at least the 3 of one window"),
        ({"signal": features(9, width=2) * np.inf}, "signal with 18 values that are NaN or infinite, .* time step 0"),
        ({"signal": features(9, width=2), "num_frames": 2.5}, "num_frames is 2.5; expected a whole number of samples"),
        ({"signal": features(9, width=2), "feature_stride": 0.5}, "feature_stride is 0.5; expected a whole number"),
        ({"signal": features(9, width=2), "num_frames": 4}, "feature_size is 6, no multiple of num_frames, 4"),
        ({"signal": features(9, width=2), "num_frames": 12}, "feature_size is 6, no multiple of num_frames, 12"),
        ({"signal": features(9, width=2), "duration": 60.0}, "4 features contradict the duration: 60.0 s"),
        ({"signal": np.array([["1", "2"]] * 9)}, "signal of dtype <U1; expected numbers"),
    ],
)
def test_bad_dicts_name_the_sample(sample, message):
    good = {"signal": features(9, width=2)}
    with pytest.raises(ValueError, match=f"^sample 1: .*{message}"):
        sensor()([good, sample])
    with pytest.raises(ValueError, match=f"^my walk: .*{message}"):
        sensor().load(sample, "my walk")


def test_bad_files_in_dicts_are_named(tmp_path):
    for kind in ("features", "signal"):
        with pytest.raises(ValueError, match=f"^{tmp_path}/none.npy: there is no file"):
            sensor()([features(9, width=6), {kind: tmp_path / "none.npy"}])
        with pytest.raises(ValueError, match=r"^my walk: there is no file"):
            sensor()({kind: str(tmp_path / "none.npy")}, names=["my walk"])


def test_geometry_given_twice_must_agree():
    sample = {"features": features(9), "fps": 25.0}
    with pytest.raises(ValueError, match=r"^sample 1: fps is 25.0 beside its features, but 30 in `geometry`"):
        make()([features(9), sample], geometry={"fps": 30})
    with pytest.raises(ValueError, match=r"^sample 1: fps is 25.0 beside its features, but 30 in `geometry`"):
        make().geometry_of([features(9), sample], geometry=[None, {"fps": 30}])
    with pytest.raises(ValueError, match=r"^sample 0: geometry has the keys rate"):
        make()(sample, geometry={"rate": 25})
    make()(sample, geometry={"fps": 25, "duration": None})


def test_raw_values_are_told_how_to_be_windowed():
    with pytest.raises(
        ValueError, match=r'^sample 0: features of shape \(90, 2\).* pass \{"signal": array\}.*windows of 3'
    ):
        sensor()(features(90, width=2))
    with pytest.raises(ValueError, match="set feature_size") as error:
        sensor()(features(90, width=3))
    assert "signal" not in str(error.value)


# --- In: bad samples ------------------------------------------------------------------------------------------------


def with_value(value, step, channel):
    sample = features(9)
    sample[step, channel] = value
    return sample


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (with_value(np.nan, 6, 2), r"1 values that are NaN or infinite, the first at time step 6, channel 2 \(nan\)"),
        (with_value(-np.inf, 3, 1), r"first at time step 3, channel 1 \(-inf\)"),
        (np.where(features(9) > 99, 0, [1, 1, np.inf, np.nan]), "18 values .* first at time step 0, channel 2"),
        (np.full((9, 4), 1e300), "36 values"),  # infinite in float32
        (torch.tensor([[0.0, 0.0, 0.0, math.nan]]), "time step 0, channel 3"),
        (np.zeros((0, 4)), "no time steps"),
        (features(4, width=9), "transpose"),
        (features(9, width=5), r"shape \(9, 5\); expected \(time, 4\)"),
        (np.zeros((9, 4), dtype=object), "dtype object"),
        (np.zeros((9, 4), dtype="U3"), "dtype <U3"),
        (np.zeros((2, 9, 4)), r"shape \(2, 9, 4\)"),
        (np.float32(3), r"shape \(\)"),
    ],
    ids=["nan", "inf", "both", "overflow", "tensor", "empty", "transposed", "width", "object", "text", "3d", "scalar"],
)
def test_bad_features_name_the_sample(sample, message):
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=f"^sample 1: .*{message}"):
        make()([features(9), sample])
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=f"^my video: .*{message}"):
        make()([features(9), sample], names=["other", "my video"])


def test_only_the_transposed_are_told_to_transpose():
    with pytest.raises(ValueError, match="set feature_size") as error:
        make()(features(9, width=5))
    assert "transpose" not in str(error.value)


@pytest.mark.parametrize("nothing", [[], np.zeros((0, 9, 4)), torch.zeros(0, 9, 4)])
def test_no_sample_at_all(nothing):
    with pytest.raises(ValueError, match="No features"):
        make()(nothing)


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_object_npy(path, trap):
    np.save(path, np.array([[trap] * 4], dtype=object), allow_pickle=True)


def write_object_npz(path, trap):
    with open(path, "wb") as file:
        np.savez(file, features=np.array([[trap] * 4], dtype=object))


def write_pickle(path, trap):
    import pickle

    path.write_bytes(pickle.dumps(trap))


def write_truncated(save):
    def write(path, trap):
        with open(path, "wb") as file:
            save(file, features(50))
        path.write_bytes(path.read_bytes()[:400])

    return write


def write_damaged_npz(path, trap):
    with open(path, "wb") as file:
        np.savez(file, features(50))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def write_zip_of_text(path, trap):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("features", "1, 2, 3, 4")


BAD_FILES = {
    "object.npy": write_object_npy,
    "object.npz": write_object_npz,
    "pickle.npy": write_pickle,
    "pickle.npz": write_pickle,
    "truncated.npy": write_truncated(np.save),
    "truncated.npz": write_truncated(np.savez),
    "damaged.npz": write_damaged_npz,
    "text.npy": lambda path, trap: path.write_text("1.0, 2.0\n3.0, 4.0\n"),
    "zip_of_text.npz": write_zip_of_text,
    "nothing.npy": lambda path, trap: path.write_bytes(b""),
    "folder.npy": lambda path, trap: path.mkdir(),
    "missing.npy": lambda path, trap: None,
    "missing.npz": lambda path, trap: None,
    "pickle.safetensors": write_pickle,
    "truncated.safetensors": lambda path, trap: (
        save_file({"features": features(50)}, path),
        path.write_bytes(path.read_bytes()[:400]),
    ),
    "nothing.safetensors": lambda path, trap: path.write_bytes(b""),
    "folder.safetensors": lambda path, trap: path.mkdir(),
    "missing.safetensors": lambda path, trap: None,
    "two.safetensors": lambda path, trap: save_file({"a": features(9), "b": features(9)}, path),
    "none.safetensors": lambda path, trap: save_file({}, path),
    "complex.safetensors": lambda path, trap: save_file({"features": features(9).astype(np.complex64)}, path),
    "two.npz": lambda path, trap: np.savez(path, a=features(9), b=features(9)),
    "none.npz": lambda path, trap: np.savez(path),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_name_the_sample_and_run_nothing(tmp_path, name):
    path, trap = tmp_path / name, tmp_path / "trapped"
    BAD_FILES[name](path, Malicious(trap))
    good = tmp_path / "good.npy"
    np.save(good, features(9))

    with pytest.raises(ValueError, match=f"{name}: ") as error:
        make()([good, path])
    assert str(error.value).startswith(str(path))
    assert name.startswith("missing") == ("there is no file" in str(error.value))
    with pytest.raises(ValueError, match=r"^my video: "):
        make()(str(path), names=["my video"])
    assert not trap.exists()


def test_the_trap_works(tmp_path):
    """Else the test above would show nothing."""
    path, trap = tmp_path / "object.npy", tmp_path / "trapped"
    write_object_npy(path, Malicious(trap))
    np.load(path, allow_pickle=True)
    assert trap.exists()


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ([2.0, 2.0], "does not start before it ends"),
        ([3.0, 2.0], "does not start before it ends"),
        ([-0.5, 2.0], "starts before 0"),
        ([math.nan, 2.0], "not finite"),
        ([1.0, math.nan], "not finite"),
        ([1.0, math.inf], "not finite"),
        ([1.0, 99.0], r"ends after the recording, at 11.50 s"),
        ([90.0, 99.0], r"ends after the recording"),
    ],
)
def test_bad_segments_name_the_sample(segment, message):
    good = {"segments": [[1.0, 2.0]], "labels": [0]}
    bad = {"segments": [[1.0, 2.0], segment], "labels": [0, 0]}
    with pytest.raises(ValueError, match=f"^sample 1: segment 1 .*{message}"):
        make()([features(20)] * 2, annotations=[good, bad])
    with pytest.raises(ValueError, match=f"^my video: segment 0 .*{message}"):
        make()(features(20), annotations=[{"segment": segment, "label_id": 0}], names=["my video"])


@pytest.mark.parametrize("label", [2, -1, 0.5, "walk", math.nan, math.inf, None, [1]])
def test_bad_labels_name_the_sample(label):
    annotations = [[], {"segments": [[1.0, 2.0]], "labels": [label]}]
    with pytest.raises(ValueError, match=r"^sample 1: segment 0 has the label"):
        make()([features(20)] * 2, annotations=annotations, label2id={"run": 0, "jump": 3})
    if label != 2:
        with pytest.raises(ValueError, match=r"^sample 1: segment 0 has the label"):
            make()([features(20)] * 2, annotations=annotations)


@pytest.mark.parametrize(
    "annotation",
    [
        {"labels": [0]},
        {"segments": [[1.0, 2.0]]},
        {"segments": [[1.0, 2.0]], "labels": [0, 1]},
        {"segments": [[1.0, 2.0], [3.0, 4.0]], "labels": [0]},
        {"segments": [1.0, 2.0], "labels": [0]},
        {"segments": [[0.0, 1.0, 2.0], [0.5, 2.0, 3.0]], "labels": [0, 1, 2]},  # (2, N)
        {"segments": [["a", "b"]], "labels": [0]},
        [{"segment": [1.0, 2.0]}],
        [{"label_id": 0}],
        [{"segment": [1.0], "label_id": 0}],
        None,
        3,
    ],
)
def test_malformed_annotations_name_the_sample(annotation):
    with pytest.raises(ValueError, match=r"^sample 1: "):
        make()([features(20)] * 2, annotations=[[], annotation])


def test_lists_of_another_length_than_the_samples():
    samples = [features(20)] * 2
    for argument, value in (("annotations", [[]]), ("geometry", [{}]), ("names", ["a"]), ("annotations", [[]] * 3)):
        with pytest.raises(ValueError, match=f"^{argument} has {len(value)} entries for 2 samples"):
            make()(samples, **{argument: value})
    with pytest.raises(ValueError, match=r"^geometry has 3 entries for 1 samples"):
        process(make(), outputs([[[0.5]]], [[[0, 1]]]), geometry=[{}] * 3)


BAD_NUMBERS = [0, 0.0, -1, math.nan, math.inf, True, "30", [30]]


@pytest.mark.parametrize("value", [*BAD_NUMBERS, None])
@pytest.mark.parametrize("name", ["fps", "feature_stride", "num_frames"])
def test_bad_geometry_of_the_extractor(name, value):
    if (name, value) == ("num_frames", None):
        assert make(num_frames=None).num_frames == 4  # that of feature_stride
        return
    with pytest.raises(ValueError, match=f"{name} is |lack {name}:"):
        make(**{name: value})


@pytest.mark.parametrize("value", BAD_NUMBERS)
@pytest.mark.parametrize("name", ["fps", "feature_stride", "num_frames", "duration"])
def test_bad_geometry_of_a_call(name, value):
    with pytest.raises(ValueError, match=f"^sample 1: {name} is "):
        make()([features(9)] * 2, geometry=[{}, {name: value}])
    with pytest.raises(ValueError, match=f"^sample 0: {name} is "):
        make()([features(9)] * 2, geometry={name: value})
    with pytest.raises(ValueError, match=f"^sample 1: {name} is "):
        process(make(), outputs([[[0.5]]] * 2, [[[0, 1]]] * 2), geometry=[{}, {name: value}])


def test_unknown_geometry():
    with pytest.raises(ValueError, match=r"^sample 0: geometry has the keys rate, stride"):
        make()(features(9), geometry={"stride": 4, "rate": 30})
    assert make()(features(9), geometry={"fps": None})["input_features"].shape == (1, 9, 4)  # None: the extractor's


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "4", None])
def test_bad_feature_size(value):
    with pytest.raises(ValueError, match=r"feature_size is |lack feature_size:"):
        make(feature_size=value)


def test_duration_that_contradicts_the_length():
    # 20 features end at 11.5 s. Granted: a tenth, or a window and two steps if that is more; here (16 / 4 + 2) = 6 steps of
    # 0.5 s each, so durations from 8.5 to 14.5.
    for duration in (8.5, 11.5, 14.5):
        make()(features(20), geometry={"duration": duration})
    for duration in (8.4, 14.6, 23.0):
        with pytest.raises(
            ValueError, match=f"^sample 0: 20 features contradict the duration: {duration} s at 8.0 fps"
        ):
            make()(features(20), geometry={"duration": duration})
    # A tenth of 201 features is 20.1 steps: 220 and 181 are granted, 223 and 180 not.
    duration = (200 * 4 + 16) / 8
    for length, tolerance in ((221, 0.1), (181, 0.1), (280, 0.4)):
        make(length_tolerance=tolerance)(features(length), geometry={"duration": duration})
    for length, tolerance in ((223, 0.1), (180, 0.1), (284, 0.4)):
        with pytest.raises(ValueError, match=f"{length} features contradict"):
            make(length_tolerance=tolerance)(features(length), geometry={"duration": duration})
    with pytest.raises(ValueError, match=r"^my video: "):
        make()([features(20)] * 2, geometry=[{}, {"duration": 90.0}], names=["other", "my video"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nms_method", "hardest"),
        ("nms_method", None),
        ("pre_nms_topk", 0),
        ("pre_nms_topk", 1.5),
        ("pre_nms_topk", True),
        ("max_seg_num", -1),
        ("max_seg_num", "9"),
        ("external_topk", 0),
        ("pre_nms_thresh", -0.1),
        ("pre_nms_thresh", math.nan),
        ("pre_nms_thresh", "0.1"),
        ("min_score", -1),
        ("min_score", None),
        ("iou_threshold", math.nan),
        ("duration_thresh", -0.01),
        ("nms_sigma", 0),
        ("nms_sigma", -0.5),
        ("nms_sigma", math.nan),
        ("nms_sigma", "0.5"),
        ("voting_thresh", math.nan),
        ("voting_thresh", None),
        ("multiclass_nms", "false"),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name} is "):
        make(**{name: value})
    with pytest.raises(ValueError, match=f"^{name} is "):
        process(make(), outputs([[[0.5]]], [[[0, 1]]]), **{name: value})


def test_unknown_settings_and_bad_arguments():
    one = outputs([[[0.5]]], [[[0, 1]]])
    with pytest.raises(ValueError, match=r"^Unknown settings: iou, sigma\. Known: .*nms_sigma"):
        process(make(), one, sigma=0.5, iou=0.5)
    for top_k in (-1, 1.5, True):
        with pytest.raises(ValueError, match=r"^top_k is "):
            process(make(), one, top_k=top_k)
    for scores in ([0.5, 0.6], [[0.5], [0.6]], 0.5):
        with pytest.raises(ValueError, match=r"^external_scores has shape"):
            process(make(), one, external_scores=scores)


# --- Saved settings -------------------------------------------------------------------------------------------------


def settings_of(extractor):
    """Without auto_map, which saving adds: where the code is."""
    return {name: value for name, value in extractor.to_dict().items() if name != "auto_map"}


def test_every_setting_comes_back_from_a_folder(tmp_path):
    fields = {
        "feature_size": 12,
        "fps": 29.97,
        "feature_stride": 3.5,
        "num_frames": 24,
        "padding_value": -1.5,
        "min_length": 64,
        "pad_to_multiple_of": 16,
        "length_tolerance": 0.3,
        **UNUSUAL,
    }
    defaults = make()
    assert all(getattr(defaults, name) != value for name, value in fields.items())
    ConvTransformerFeatureExtractor(**fields).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["feature_extractor_type"] == "ConvTransformerFeatureExtractor"
    loaded = ConvTransformerFeatureExtractor.from_pretrained(tmp_path)
    for name, value in fields.items():
        assert saved[name] == value, name
        assert getattr(loaded, name) == value, name
        assert type(getattr(loaded, name)) is type(value), name
    assert settings_of(loaded) == settings_of(ConvTransformerFeatureExtractor(**fields))

    changed = ConvTransformerFeatureExtractor.from_pretrained(tmp_path, fps=25, max_seg_num=7)
    assert (changed.fps, changed.max_seg_num, changed.feature_stride) == (25, 7, 3.5)
    with pytest.raises(ValueError, match="fps is -1"):
        ConvTransformerFeatureExtractor.from_pretrained(tmp_path, fps=-1)


def test_numpy_numbers_can_be_saved(tmp_path):
    extractor = make(fps=np.float32(12.5), feature_stride=np.int64(8), num_frames=None, iou_threshold=np.float64(0.25))
    extractor.save_pretrained(tmp_path)
    loaded = ConvTransformerFeatureExtractor.from_pretrained(tmp_path)
    assert (loaded.fps, loaded.feature_stride, loaded.num_frames) == (12.5, 8, 8)
    assert (loaded.iou_threshold, loaded.sampling_rate) == (0.25, 12.5)


def test_auto_feature_extractor(tmp_path):
    ConvTransformerConfig(n_in=4, num_labels=2).save_pretrained(tmp_path)
    make(**UNUSUAL).save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(loaded) is ConvTransformerFeatureExtractor
    assert settings_of(loaded) == settings_of(make(**UNUSUAL))


def recipes_with_a_section():
    return [path for path in RECIPES if "feature_extractor" in yaml.safe_load(path.read_text())]


def test_there_are_recipes():
    assert len(recipes_with_a_section()) >= 10


@pytest.mark.parametrize("path", recipes_with_a_section(), ids=lambda path: path.stem)
def test_from_yaml_reads_our_recipes(path, tmp_path):
    section = yaml.safe_load(path.read_text())["feature_extractor"]
    extractor = ConvTransformerFeatureExtractor.from_yaml(path)
    assert {name: getattr(extractor, name) for name in section} == section
    # Every name is a setting, none is a typing error that would be kept but never read.
    assert set(section) <= set(make().to_dict())
    assert ConvTransformerFeatureExtractor.from_yaml(str(path), fps=12, nms_method="hard").fps == 12
    extractor.save_pretrained(tmp_path)
    assert settings_of(ConvTransformerFeatureExtractor.from_pretrained(tmp_path)) == settings_of(extractor)


V1_YAML = """
dataset: {json_file: a.json, num_classes: 3, input_dim: 16, feat_stride: 4, num_frames: 24, max_seq_len: 64,
          downsample_rate: 2, default_fps: 25}
model: {fpn_type: identity, n_head: 2}
test_cfg: {voting_thresh: 0.6, pre_nms_topk: 2000, max_seg_num: 200, min_score: 0.002, multiclass_nms: false,
           nms_method: hard, nms_sigma: 0.75, duration_thresh: 0.001, pre_nms_thresh: 0.003, iou_threshold: 0.4,
           ext_score_file: ~}
"""


def test_from_yaml_reads_v1s_files(tmp_path):
    path = tmp_path / "v1.yaml"
    path.write_text(V1_YAML)
    extractor = ConvTransformerFeatureExtractor.from_yaml(path)
    expected = {
        "feature_size": 16,
        "fps": 25,
        "feature_stride": 8,  # 4 frames, every second feature
        "num_frames": 24,
        "pre_nms_thresh": 0.003,
        "pre_nms_topk": 2000,
        "iou_threshold": 0.4,
        "min_score": 0.002,
        "max_seg_num": 200,
        "nms_method": "hard",
        "nms_sigma": 0.75,
        "duration_thresh": 0.001,
        "multiclass_nms": False,
        "voting_thresh": 0.6,
        "external_topk": 2,
    }
    assert {name: getattr(extractor, name) for name in expected} == expected
    assert not hasattr(extractor, "ext_score_file")

    path.write_text("dataset: {input_dim: [16, 8], default_fps: ~}\n")
    with pytest.raises(ValueError, match=r"does not say fps; pass it: .*fps="):
        ConvTransformerFeatureExtractor.from_yaml(path)
    extractor = ConvTransformerFeatureExtractor.from_yaml(path, fps=30)
    # Two streams of 24 channels in all; v1's defaults are a stride of 16 and windows of 32 frames, and those of test_cfg.
    assert (extractor.feature_size, extractor.feature_stride, extractor.num_frames) == (24, 16, 32)
    assert {name: getattr(extractor, name) for name in UNUSUAL} == {
        "pre_nms_thresh": 0.001,
        "pre_nms_topk": 5000,
        "iou_threshold": 0.1,
        "min_score": 0.01,
        "max_seg_num": 1000,
        "nms_method": "soft",
        "nms_sigma": 0.5,
        "duration_thresh": 0.05,
        "multiclass_nms": True,
        "voting_thresh": 0.75,
        "external_topk": 2,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {n_in: 4}\n", "expected a section `feature_extractor`"),
        ("- 1\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("feature_extractor: {feature_size: 4, fps: 30}\n", "does not say feature_stride"),
        ("feature_extractor:\n", "does not say feature_size, fps, feature_stride"),
        ("feature_extractor: {feature_size: 4, fps: -3, feature_stride: 4}\n", "fps is -3"),
    ],
)
def test_from_yaml_refuses(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        ConvTransformerFeatureExtractor.from_yaml(path)


# --- Out: suppression against a slow greedy loop --------------------------------------------------------------------


def slow_iou(a, b, eps=1e-6):
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return shared / ((a[1] - a[0] + eps) + (b[1] - b[0] + eps) - shared)


def apart(a, b):
    """Relative difference of two numbers, none of them negative."""
    return abs(a - b) / max(a, b, 1e-30)


def slow_suppress(segments, scores, method, iou_threshold, sigma, min_score, max_segments):
    """
    Textbook greedy suppression of one group: [(index, score)] from best to worst, and the margin by which the closest
    decision (which is best, what is below a threshold) was made.
    """
    left = dict(enumerate(scores))
    margin = math.inf
    if method == "hard":
        margin = min([margin, *(apart(score, min_score) for score in scores)])
        left = {index: score for index, score in left.items() if score > min_score}
    kept = []
    while left and len(kept) < max_segments:
        best = max(left, key=left.get)
        score = left.pop(best)
        margin = min([margin, *(apart(score, other) for other in left.values())])
        kept.append((best, score))
        for other in list(left):
            iou = slow_iou(segments[best], segments[other])
            if method != "soft":
                margin = min(margin, abs(iou - iou_threshold))
            if method == "soft":
                left[other] *= math.exp(-(iou**2) / sigma)
            elif iou >= iou_threshold:
                left[other] *= 1 - iou if method == "linear" else 0.0
            if method == "hard" and left[other] == 0.0:
                del left[other]
            elif method != "hard":
                margin = min(margin, apart(left[other], min_score))
                if left[other] < min_score:
                    del left[other]
    return kept, margin


def slow_vote(kept, segments, scores, voting_thresh):
    """Mean of the segments that overlap `kept` by at least `voting_thresh`, weighted by score * IoU."""
    near = [(slow_iou(kept, one, eps=0.0), one, score) for one, score in zip(segments, scores, strict=True)]
    margin = min(abs(iou - voting_thresh) for iou, _, _ in near)
    near = [(iou * score, one) for iou, one, score in near if iou >= voting_thresh]
    total = sum(weight for weight, _ in near)
    return [sum(weight * one[side] for weight, one in near) / total for side in (0, 1)], margin


# Decisions closer than this could fall either way in float32, where up to a dozen decays each add a few 1e-7: no test.
CLEAR = 2e-5
# exp(-IoU ** 2 / sigma) turns the 1e-7 of an IoU into up to 3e-7 / sigma, and a dozen decays multiply; all scores are
# below 1, and the smallest that stays is 1e-3.
DECAYED = {"rel": 1e-6, "abs": 1e-6}

METHODS = st.sampled_from(["soft", "linear", "hard"])
SETTINGS = st.fixed_dictionaries(
    {
        "method": METHODS,
        "iou_threshold": st.sampled_from([0.0517, 0.1234, 0.3456, 0.7123]),
        "sigma": st.sampled_from([0.3, 0.5, 0.9]),
        "min_score": st.sampled_from([0.0012345, 0.01012345, 0.2012345]),
        "max_segments": st.sampled_from([1, 2, 3, 100]),
    }
)
# Half steps: exact in float32.
SEGMENTS = st.tuples(st.integers(0, 40), st.integers(1, 30)).map(lambda x: (x[0] / 2, (x[0] + x[1]) / 2))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(
    candidates=st.lists(
        st.tuples(st.integers(1, 999), SEGMENTS, st.sampled_from([0, 3, 4, 11])),
        min_size=1,
        max_size=14,
        unique_by=lambda x: x[0],
    ),
    chosen=SETTINGS,
    pairs=st.sampled_from([0, 2**22]),
)
def test_suppress_is_the_greedy_loop(candidates, chosen, pairs):
    scores, segments, groups = ([one[i] for one in candidates] for i in range(3))
    scores = [score / 1000 for score in scores]
    expected = []
    for group in sorted(set(groups)):
        own = [index for index, one in enumerate(groups) if one == group]
        kept, margin = slow_suppress([segments[i] for i in own], [scores[i] for i in own], **chosen)
        assume(margin > CLEAR)
        expected += [(own[index], score) for index, score in kept]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MAX_PAIRS", pairs)  # 0: one row at a time
        kept, kept_scores = suppress(torch.tensor(segments), torch.tensor(scores), torch.tensor(groups), **chosen)
    assert kept.tolist() == [index for index, _ in expected]
    assert kept_scores.tolist() == pytest.approx([score for _, score in expected], **DECAYED)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 300),
    classes=st.integers(1, 12),
    limit=st.integers(1, 40),
    method=st.sampled_from(["soft", "linear", "hard"]),
    min_score=st.sampled_from([0.0, 0.001, 0.3]),
)
def test_groups_that_end_early_lose_none_of_the_best(seed, count, classes, limit, method, min_score):
    """With `recordings`, the best of each recording are those of the whole loop over all groups, exactly."""
    generator = torch.Generator().manual_seed(seed)
    starts = 60 * torch.rand(count, generator=generator)
    segments = torch.stack([starts, starts + 20 * torch.rand(count, generator=generator)], dim=1)
    scores = torch.rand(count, generator=generator)
    recordings = torch.randint(0, 3, (count,), generator=generator) * 5
    groups = recordings * classes + torch.randint(0, classes, (count,), generator=generator)
    chosen = {"method": method, "iou_threshold": 0.3, "sigma": 0.5, "min_score": min_score, "max_segments": limit}
    all_kept, all_scores = suppress(segments, scores, groups, **chosen)
    kept, kept_scores = suppress(segments, scores, groups, **chosen, recordings=recordings)
    assert len(kept) <= len(all_kept)
    for recording in recordings.unique():
        expected, found = (
            sorted(
                (
                    (score, index)
                    for score, index in zip(some_scores.tolist(), some.tolist(), strict=True)
                    if recordings[index] == recording
                ),
                reverse=True,
            )[:limit]
            for some_scores, some in ((all_scores, all_kept), (kept_scores, kept))
        )
        # Decays come one by one or from a table of all pairs, whichever is less work: the same to a few units of 1e-7.
        assert [index for _, index in found] == [index for _, index in expected]
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-5, abs=1e-7)


def test_groups_end_early():
    """Thirty groups of twenty segments that do not overlap: the best thirty of all are the first or second of a group."""
    starts = torch.arange(600.0) * 10
    segments, scores = torch.stack([starts, starts + 5], dim=1), torch.linspace(1, 0.1, 600)
    options = {"method": "soft", "iou_threshold": 0.5, "sigma": 0.5, "min_score": 0.001, "max_segments": 30}
    assert len(suppress(segments, scores, torch.arange(600) % 30, **options)[0]) == 600
    kept, _ = suppress(segments, scores, torch.arange(600) % 30, **options, recordings=torch.zeros(600))
    assert set(range(30)) <= set(kept.tolist())
    assert len(kept) <= 5 * 30


def test_suppress_by_hand():
    segments = torch.tensor([[0.0, 10.0], [5.0, 15.0], [20.0, 30.0], [0.0, 10.0]])
    scores = torch.tensor([0.8, 0.6, 0.5, 0.9])
    one_group, two_groups = torch.zeros(4, dtype=torch.long), torch.tensor([1, 1, 0, 0])
    options = {"iou_threshold": 0.3, "sigma": 0.5, "min_score": 0.01, "max_segments": 100}

    # IoU of 0 and 1, and of 3 and 1, is 5 / 15, of 0 and 3 it is 1 (the 1e-6 added to lengths changes less than 1e-6).
    kept, kept_scores = suppress(segments, scores, one_group, "hard", **options)
    assert kept.tolist() == [3, 2]
    assert kept_scores.tolist() == pytest.approx([0.9, 0.5], **FLOAT32)
    kept, kept_scores = suppress(segments, scores, one_group, "hard", **{**options, "iou_threshold": 0.4})
    assert kept.tolist() == [3, 1, 2]
    # 1 decays by exp(-2 / 9), 0 by exp(-2); then both again by each other.
    first = 0.6 * math.exp(-2 / 9)
    second = 0.8 * math.exp(-2) * math.exp(-2 / 9)
    kept, kept_scores = suppress(segments, scores, one_group, "soft", **options)
    assert kept.tolist() == [3, 2, 1, 0]
    assert kept_scores.tolist() == pytest.approx([0.9, 0.5, first, second], **FLOAT32)
    # 0 and 3 are the same: weight 0. 1 loses a third.
    kept, kept_scores = suppress(segments, scores, one_group, "linear", **options)
    assert kept.tolist() == [3, 2, 1]
    assert kept_scores.tolist() == pytest.approx([0.9, 0.5, 0.4], **FLOAT32)
    # Groups leave each other alone; the lower comes first.
    kept, kept_scores = suppress(segments, scores, two_groups, "soft", **options)
    assert kept.tolist() == [3, 2, 0, 1]
    assert kept_scores.tolist() == pytest.approx([0.9, 0.5, 0.8, first], **FLOAT32)
    kept, _ = suppress(segments, scores, two_groups, "soft", **{**options, "max_segments": 1})
    assert kept.tolist() == [3, 0]


def test_hard_suppression_begins_at_the_threshold():
    # IoU of 1 / 2 up to 1e-7 below: 0.4999 suppresses, 0.5001 does not.
    segments = torch.tensor([[0.0, 10.0], [0.0, 5.0]])
    scores, groups = torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.long)
    options = {"sigma": 0.5, "min_score": 0.0, "max_segments": 10}
    for method, weaker in (("hard", []), ("linear", [0.4])):
        _, low = suppress(segments, scores, groups, method, iou_threshold=0.4999, **options)
        _, high = suppress(segments, scores, groups, method, iou_threshold=0.5001, **options)
        assert low.tolist() == pytest.approx([0.9, *weaker], **FLOAT32)
        assert high.tolist() == pytest.approx([0.9, 0.8], **FLOAT32)
    # The threshold itself suppresses: an IoU of exactly 0 with a threshold of 0.
    apart = torch.tensor([[0.0, 10.0], [20.0, 30.0]])
    kept, _ = suppress(apart, scores, groups, "hard", iou_threshold=0.0, **options)
    assert kept.tolist() == [0]


def test_a_lone_weak_segment_survives_soft_suppression():
    segments, groups = torch.tensor([[0.0, 10.0]]), torch.tensor([5])
    options = {"iou_threshold": 0.1, "sigma": 0.5, "min_score": 0.2, "max_segments": 10}
    for method in ("soft", "linear"):
        kept, scores = suppress(segments, torch.tensor([0.05]), groups, method, **options)
        assert kept.tolist() == [0]
        assert scores.tolist() == pytest.approx([0.05], **FLOAT32)
        # So does the best of each group, while weaker ones go after the first turn, whether they overlap or not.
        several = torch.tensor([[0.0, 10.0], [50.0, 60.0], [0.0, 10.0]])
        kept, _ = suppress(several, torch.tensor([0.05, 0.04, 0.03]), torch.tensor([0, 0, 1]), method, **options)
        assert kept.tolist() == [0, 2]
    kept, scores = suppress(segments, torch.tensor([0.05]), groups, "hard", **options)
    assert kept.tolist() == []
    assert scores.tolist() == []
    # Hard NMS wants more than min_score, not as much.
    kept, _ = suppress(segments, torch.tensor([0.25]), groups, "hard", **{**options, "min_score": 0.25})
    assert kept.tolist() == []


@pytest.mark.parametrize("pairs", [0, 2**22], ids=["rows", "matrix"])
@pytest.mark.parametrize("method", ["soft", "linear"])
def test_nothing_is_kept_twice_when_scores_vanish(monkeypatch, method, pairs):
    """Without min_score, segments stay however small their scores get, 0 included, each of them once."""
    monkeypatch.setattr(module, "_MAX_PAIRS", pairs)
    segments = torch.tensor([[0.0, 5.0]] * 30 + [[10.0, 12.0]])
    scores = torch.linspace(0.9, 0.1, 31)
    groups = torch.tensor([0] * 27 + [4, 4, 4, 4])
    kept, kept_scores = suppress(
        segments, scores, groups, method, iou_threshold=0.1, sigma=0.05, min_score=0.0, max_segments=1000
    )
    assert sorted(kept.tolist()) == list(range(31))
    assert kept[:27].sort().values.tolist() == list(range(27))
    assert kept_scores.min() == 0.0
    assert dict(zip(kept.tolist(), kept_scores.tolist(), strict=True))[0] == pytest.approx(0.9, **FLOAT32)


def test_suppress_nothing():
    kept, scores = suppress(
        torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, dtype=torch.long), "soft", 0.1, 0.5, 0.01, 10
    )
    assert kept.shape == (0,)
    assert kept.dtype == torch.long
    assert scores.shape == (0,)


def test_overlap_by_hand():
    first = np.array([[0.0, 10.0], [0.0, 10.0], [0.0, 10.0], [3.0, 3.0]], dtype=np.float32).T
    second = np.array([[5.0, 15.0], [10.0, 20.0], [2.0, 4.0], [3.0, 3.0]], dtype=np.float32).T
    # float32 sums near 20 round to 1e-6: 1e-7 of the union
    assert overlap(tuple(first), tuple(second)).tolist() == pytest.approx([1 / 3, 0, 0.2, 0], **FLOAT32)
    with np.errstate(invalid="ignore"):
        ious = overlap(tuple(first), tuple(second), eps=0.0)
    assert ious.dtype == np.float32
    assert ious[:3].tolist() == pytest.approx([1 / 3, 0, 0.2], **FLOAT32)
    assert np.isnan(ious[3])


# --- Out: v1's suppression ------------------------------------------------------------------------------------------

GOLDEN = load_file(FIXTURES / "v1_nms.safetensors")
CASES = json.loads((FIXTURES / "v1_nms.json").read_text())["cases"]


def golden_results(data, case):
    """Ours on v1's candidates: scores, labels, segments, best first."""
    given, options = {key: GOLDEN[f"{data}/{key}"] for key in ("segs", "scores", "labels")}, CASES[case]
    groups = given["labels"] if options["multiclass"] else torch.zeros_like(given["labels"])
    kept, scores = suppress(
        given["segs"],
        given["scores"],
        groups,
        method="soft" if options["use_soft_nms"] else "hard",
        iou_threshold=options["iou_threshold"],
        sigma=options.get("sigma", 0.5),
        min_score=options["min_score"],
        max_segments=options["max_seg_num"],
    )
    segments = given["segs"][kept]
    if options.get("voting_thresh", 0) > 0:
        segments = torch.from_numpy(vote(segments.numpy(), given["segs"].numpy(), given["scores"].numpy(), options))
    order = scores.argsort(descending=True)[: options["max_seg_num"]]
    return scores[order], given["labels"][kept][order], segments[order]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("data", ["one", "rand"])
def test_suppress_equals_v1(data, case):
    scores, labels, segments = golden_results(data, case)
    assert labels.tolist() == GOLDEN[f"{data}/{case}/labels"].tolist()
    # Up to 100 decays in float32, in the order of v1: a few 1e-7 of scores below 1. Segments go up to 130, of which float32
    # rounds to 1e-5; only voting computes with them.
    assert scores.tolist() == pytest.approx(GOLDEN[f"{data}/{case}/scores"].tolist(), rel=1e-6, abs=1e-6)
    torch.testing.assert_close(segments, GOLDEN[f"{data}/{case}/segs"], rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("data", ["one", "rand"])
def test_post_processing_equals_v1(data, case):
    options = CASES[case]
    scores, labels = GOLDEN[f"{data}/scores"], GOLDEN[f"{data}/labels"]
    per_class = torch.zeros(1, len(scores), 5, dtype=torch.float64)
    per_class[0, torch.arange(len(scores)), labels] = scores.double()
    (result,) = process(
        plain(),
        outputs(per_class, GOLDEN[f"{data}/segs"][None]),
        pre_nms_thresh=0.0,
        duration_thresh=0.0,
        nms_method="soft" if options["use_soft_nms"] else "hard",
        iou_threshold=options["iou_threshold"],
        nms_sigma=options.get("sigma", 0.5),
        min_score=options["min_score"],
        max_seg_num=options["max_seg_num"],
        multiclass_nms=options["multiclass"],
        voting_thresh=options.get("voting_thresh", 0.75),
    )
    assert result["labels"].tolist() == GOLDEN[f"{data}/{case}/labels"].tolist()
    # 2e-6: as above, and scores go through a logit and back. 2e-5: as above; seconds are half a step later, and not below 0.
    assert result["scores"].tolist() == pytest.approx(GOLDEN[f"{data}/{case}/scores"].tolist(), rel=2e-6, abs=2e-6)
    expected = (GOLDEN[f"{data}/{case}/segs"] + 0.5).clamp(min=0)
    torch.testing.assert_close(result["segments"], expected, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_suppression_of_equal_scores(case):
    """Which of equal scores wins is open. Whichever it was: each choice was the best at its turn, and nothing is left."""
    given, options = {key: GOLDEN[f"tie/{key}"] for key in ("segs", "scores", "labels")}, CASES[case]
    groups = given["labels"] if options["multiclass"] else torch.zeros_like(given["labels"])
    method = "soft" if options["use_soft_nms"] else "hard"
    sigma, min_score, count = options.get("sigma", 0.5), options["min_score"], options["max_seg_num"]
    kept, kept_scores = suppress(
        given["segs"], given["scores"], groups, method, options["iou_threshold"], sigma, min_score, count
    )
    assert len(kept.unique()) == len(kept)
    for group in groups.unique().tolist():
        left = {
            index: given["scores"][index].item()
            for index in (groups == group).nonzero()[:, 0].tolist()
            if method == "soft" or given["scores"][index] > min_score
        }
        own = groups[kept] == group
        for index, score in zip(kept[own].tolist(), kept_scores[own].tolist(), strict=True):
            # 1e-6: float32, as above
            assert score == pytest.approx(left[index], rel=1e-6, abs=1e-6)
            assert score >= max(left.values()) - 1e-6
            del left[index]
            for other in left:
                iou = slow_iou(given["segs"][index].tolist(), given["segs"][other].tolist())
                left[other] *= math.exp(-(iou**2) / sigma) if method == "soft" else iou < options["iou_threshold"]
        floor = min_score if method == "soft" else 0
        assert own.sum() == count or all(score <= floor + 1e-6 for score in left.values())


# In soft_multi v1's swaps take another of two equal scores first, after which other scores remain.
@pytest.mark.parametrize("case", [case for case in CASES if case != "soft_multi"])
def test_suppress_equals_v1_with_equal_scores(case):
    """The order of equal scores is arbitrary: only the scores are compared."""
    scores, _, segments = golden_results("tie", case)
    expected = GOLDEN[f"tie/{case}/scores"].sort(descending=True).values
    assert scores.tolist() == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-6)
    assert segments.isfinite().all()  # v1 gives NaN where it votes with segments of length zero
    assert (segments[:, 1] >= segments[:, 0]).all()


# --- Out: whole calls against the slow loop -------------------------------------------------------------------------


def slow_post_process(logits, segments, mask, levels, geometry, chosen):
    """[(score, label, start, end)] in seconds of one sample, and the margin of the closest decision."""
    candidates = []
    for level in sorted(set(levels)):
        found = []
        for point, own in enumerate(levels):
            for label, logit in enumerate(logits[point]):
                score = mask[point] / (1 + math.exp(-logit))
                if own == level and score > chosen["pre_nms_thresh"]:
                    found.append((score, label, segments[point]))
        found = sorted(found, key=lambda one: -one[0])[: chosen["pre_nms_topk"]]
        candidates += [one for one in found if one[2][1] - one[2][0] > chosen["duration_thresh"]]

    margin, results = math.inf, []
    if chosen["nms_method"] == "none":
        results = candidates
    else:
        for group in range(len(logits[0])) if chosen["multiclass_nms"] else [None]:
            own = [one for one in candidates if group is None or one[1] == group]
            kept, closest = slow_suppress(
                [one[2] for one in own],
                [one[0] for one in own],
                chosen["nms_method"],
                chosen["iou_threshold"],
                chosen["nms_sigma"],
                chosen["min_score"],
                chosen["max_seg_num"],
            )
            margin = min(margin, closest)
            for index, score in kept:
                segment = own[index][2]
                if group is None and chosen["voting_thresh"] > 0:
                    segment, closest = slow_vote(
                        segment, [one[2] for one in own], [one[0] for one in own], chosen["voting_thresh"]
                    )
                    margin = min(margin, closest)
                results.append((score, own[index][1], segment))
        results.sort(key=lambda one: -one[0])
        margin = min([margin, *(apart(a[0], b[0]) for a, b in itertools.pairwise(results))])
        results = results[: chosen["max_seg_num"]]

    def to_seconds(grid):
        seconds = (grid * geometry["feature_stride"] + 0.5 * geometry["num_frames"]) / geometry["fps"]
        return min(max(seconds, 0.0), geometry.get("duration", math.inf))

    return [(score, label, *map(to_seconds, segment)) for score, label, segment in results], margin


POINTS, CLASSES = 7, 3


@st.composite
def model_outputs(draw):
    batch = draw(st.integers(1, 3))
    size = batch * POINTS * CLASSES
    logits = draw(st.lists(st.integers(-500, 500), min_size=size, max_size=size, unique=True))
    segments = draw(st.lists(SEGMENTS, min_size=batch * POINTS, max_size=batch * POINTS))
    mask = draw(st.lists(st.sampled_from([1, 1, 1, 0]), min_size=batch * POINTS, max_size=batch * POINTS))
    sizes = draw(st.sampled_from([(7,), (4, 3), (4, 2, 1), (5, 0, 2)]))
    levels = [level for level, count in enumerate(sizes) for _ in range(count)]
    return {
        "logits": (np.array(logits) / 100).reshape(batch, POINTS, CLASSES).astype(np.float32),
        "pred_segments": np.array(segments, dtype=np.float32).reshape(batch, POINTS, 2) - 2,
        "point_mask": np.array(mask).reshape(batch, POINTS),
        "point_levels": np.array([levels] * batch),
    }


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(
    model_outputs(),
    st.fixed_dictionaries(
        {
            "pre_nms_thresh": st.sampled_from([0.0, 0.012345, 0.3]),
            "pre_nms_topk": st.sampled_from([1, 3, 1000]),
            "iou_threshold": st.sampled_from([0.1234, 0.5432]),
            "min_score": st.sampled_from([0.0012345, 0.1012345]),
            "max_seg_num": st.sampled_from([1, 4, 1000]),
            "nms_method": st.sampled_from(["soft", "linear", "hard", "none"]),
            "nms_sigma": st.sampled_from([0.3, 0.75]),
            "duration_thresh": st.sampled_from([0.05, 3.25]),
            "multiclass_nms": st.booleans(),
            "voting_thresh": st.sampled_from([0.0, 0.4321, 0.8765]),
        }
    ),
    st.lists(
        st.sampled_from([{}, {"fps": 12.5}, {"duration": 6.0}, {"feature_stride": 2.5, "num_frames": 3, "fps": 30}]),
        min_size=3,
        max_size=3,
    ),
)
def test_post_processing_is_the_slow_loop(found, chosen, geometry):
    batch = len(found["logits"])
    geometry = geometry[:batch]
    defaults = {"fps": 8.0, "feature_stride": 4, "num_frames": 16}
    arguments = (found["logits"], found["pred_segments"], found["point_mask"], found["point_levels"])
    expected = []
    for *sample, one in zip(*(x.tolist() for x in arguments), geometry, strict=True):
        wanted, margin = slow_post_process(*sample, {**defaults, **one}, chosen)
        assume(margin > CLEAR)
        expected.append(wanted)

    results = process(make(), found, geometry=geometry, **chosen)
    assert len(results) == batch
    for index, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        assert result["labels"].tolist() == [label for _, label, _, _ in wanted]
        assert result["scores"].tolist() == pytest.approx([score for score, *_ in wanted], **DECAYED)
        # up to 20 s, of which float32 rounds to 1e-6 at each of a few steps; voting adds a mean
        assert result["segments"].flatten().tolist() == pytest.approx(
            [second for _, _, *segment in wanted for second in segment], rel=1e-6, abs=1e-5
        )
        alone = {key: value[index : index + 1] for key, value in found.items()}
        (single,) = process(make(), alone, geometry=geometry[index], **chosen)
        assert single["labels"].tolist() == result["labels"].tolist()
        assert single["scores"].tolist() == pytest.approx(result["scores"].tolist(), **FLOAT32)
        torch.testing.assert_close(single["segments"], result["segments"], rtol=1e-6, atol=1e-6)


# --- Out: decoding by hand ------------------------------------------------------------------------------------------


def test_decoding_to_seconds_and_clipping():
    found = outputs([[[0.9], [0.8], [0.7]]], [[[2, 5], [-4, 1], [10, 40]]])
    # (2 * 4 + 8) / 8 = 2, (5 * 4 + 8) / 8 = 3.5; (-4 * 4 + 8) / 8 = -1 is before the recording; 20.5 + 1 = 21
    (result,) = process(make(), found, **OFF)
    assert result["segments"].tolist() == [[2.0, 3.5], [0.0, 1.5], [6.0, 21.0]]
    (result,) = process(make(), found, geometry={"duration": 6.5}, **OFF)
    assert result["segments"].tolist() == [[2.0, 3.5], [0.0, 1.5], [6.0, 6.5]]
    assert result["segments"].dtype == torch.float32
    assert result["scores"].tolist() == pytest.approx([0.9, 0.8, 0.7], **FLOAT32)


def test_suppression_is_on_the_grid():
    """Both segments are [0, 0] s after clipping, but do not overlap on the grid."""
    found = outputs([[[0.9], [0.8]]], [[[-30, -20], [-15, -10]]])
    (result,) = process(make(), found, nms_method="hard")
    assert result["segments"].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_geometry_of_each_sample():
    found = outputs([[[0.9]]] * 3, [[[2, 5]]] * 3)
    geometry = [{"fps": 16.0}, {"feature_stride": 2, "num_frames": 4}, {"duration": 3.0}]
    # (8 + 8) / 16 = 1, (20 + 8) / 16 = 1.75; (4 + 2) / 8 = 0.75, (10 + 2) / 8 = 1.5; 2 and 3.5, clipped
    results = process(make(), found, geometry=geometry)
    assert [result["segments"].tolist() for result in results] == [[[1, 1.75]], [[0.75, 1.5]], [[2, 3]]]
    results = process(make(), found, geometry={"fps": np.float32(16), "duration": np.float64(1.5)})
    assert [result["segments"].tolist() for result in results] == [[[1, 1.5]]] * 3
    results = process(make(), found, geometry=[{}, {}, None])
    assert [result["segments"].tolist() for result in results] == [[[2, 3.5]]] * 3


def test_each_level_keeps_its_best():
    scores = [[[0.9, 0.8], [0.7, 0.6], [0.4, 0.5], [0.2, 0.3]]]
    segments = [[[0, 5], [10, 15], [20, 25], [30, 35]]]
    levels = torch.tensor([[0, 0, 1, 1]])
    options = {"nms_method": "none", "pre_nms_topk": 3}

    (result,) = process(plain(), outputs(scores, segments, point_levels=levels), **options)
    # In order of levels, each from best to worst, over points and classes.
    assert result["scores"].tolist() == pytest.approx([0.9, 0.8, 0.7, 0.5, 0.4, 0.3], **FLOAT32)
    assert result["labels"].tolist() == [0, 1, 0, 1, 0, 1]
    assert result["segments"][:, 0].tolist() == [0.5, 0.5, 10.5, 20.5, 20.5, 30.5]
    # Without levels there is one.
    (result,) = process(plain(), outputs(scores, segments), **options)
    assert result["scores"].tolist() == pytest.approx([0.9, 0.8, 0.7], **FLOAT32)
    # One level smaller than pre_nms_topk, one without any point.
    levels = torch.tensor([[0, 2, 2, 2]])
    (result,) = process(plain(), outputs(scores, segments, point_levels=levels), **options)
    assert result["scores"].tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5], **FLOAT32)


def test_masked_points_give_nothing():
    scores = [[[0.9], [0.8], [0.7]], [[0.6], [0.5], [0.4]]]
    segments = [[[0, 5], [10, 15], [20, 25]]] * 2
    for dtype in (torch.long, torch.bool, torch.float32):
        mask = torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=dtype)
        first, second = process(plain(), outputs(scores, segments, point_mask=mask), pre_nms_topk=1)
        assert first["scores"].tolist() == pytest.approx([0.8], **FLOAT32)
        assert first["segments"].tolist() == [[10.5, 15.5]]
        assert second["scores"].tolist() == pytest.approx([0.6], **FLOAT32)
        assert second["segments"].tolist() == [[0.5, 5.5]]
    # nor do they where everything counts
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]])
    first, second = process(plain(), outputs(scores, segments, point_mask=mask), **OFF)
    assert [len(first["scores"]), len(second["scores"])] == [2, 1]


def test_thresholds_are_strict():
    found = outputs([[[0.5], [0.5], [0.25]]], [[[0, 2], [10, 13], [20, 23]]])
    assert found["logits"][0, 0] == 0  # a score of exactly 0.5
    (result,) = process(plain(), found, nms_method="none", pre_nms_thresh=0.5)
    assert len(result["scores"]) == 0
    (result,) = process(plain(), found, nms_method="none", pre_nms_thresh=0.25, duration_thresh=2.0)
    assert result["segments"].tolist() == [[10.5, 13.5]]
    (result,) = process(plain(), found, nms_method="none", threshold=0.5)
    assert len(result["scores"]) == 0
    (result,) = process(plain(), found, nms_method="none", threshold=0.4999)
    assert result["segments"].tolist() == [[0.5, 2.5], [10.5, 13.5]]


def test_short_segments_still_count_among_the_best():
    """As in v1: the best are chosen before segments of no duration go."""
    found = outputs([[[0.9], [0.8]]], [[[3, 3], [10, 15]]])
    (result,) = process(plain(), found, pre_nms_topk=1)
    assert len(result["scores"]) == 0
    (result,) = process(plain(), found, pre_nms_topk=2)
    assert result["segments"].tolist() == [[10.5, 15.5]]


def test_threshold_and_top_k():
    found = outputs([[[0.6], [0.9], [0.7]], [[0.3], [0.2], [0.1]]], [[[0, 5], [10, 15], [20, 25]]] * 2)
    first, second = process(plain(), found, threshold=0.25)
    assert first["scores"].tolist() == pytest.approx([0.9, 0.7, 0.6], **FLOAT32)
    assert second["scores"].tolist() == pytest.approx([0.3], **FLOAT32)
    first, second = process(plain(), found, top_k=2)
    assert first["scores"].tolist() == pytest.approx([0.9, 0.7], **FLOAT32)
    assert first["segments"].tolist() == [[10.5, 15.5], [20.5, 25.5]]
    assert second["scores"].tolist() == pytest.approx([0.3, 0.2], **FLOAT32)
    first, second = process(plain(), found, top_k=2, threshold=0.65)
    assert [len(first["scores"]), len(second["scores"])] == [2, 0]
    first, _ = process(plain(), found, top_k=0)
    assert first["segments"].shape == (0, 2)
    first, _ = process(plain(), found, top_k=2, nms_method="none")
    assert first["scores"].tolist() == pytest.approx([0.9, 0.7], **FLOAT32)
    # After suppression, not before: [0, 5] falls to 0.9 * exp(-2) there.
    found = outputs([[[0.9], [0.95]]], [[[0, 5], [0, 5]]])
    (result,) = process(plain(), found, threshold=0.2)
    assert result["scores"].tolist() == pytest.approx([0.95], **FLOAT32)


def test_none_neither_sorts_nor_cuts():
    found = outputs([[[0.6], [0.9], [0.7]]], [[[0, 5], [0, 5], [0, 5]]], point_levels=torch.tensor([[0, 1, 2]]))
    (result,) = process(plain(), found, nms_method="none", max_seg_num=1, min_score=0.95)
    assert result["scores"].tolist() == pytest.approx([0.6, 0.9, 0.7], **FLOAT32)


def test_max_seg_num_counts_over_all_classes():
    found = outputs([[[0.6, 0.5], [0.9, 0.1], [0.2, 0.7]]], [[[0, 5], [10, 15], [20, 25]]])
    (result,) = process(plain(), found, max_seg_num=3)
    assert result["scores"].tolist() == pytest.approx([0.9, 0.7, 0.6], **FLOAT32)
    assert result["labels"].tolist() == [0, 1, 0]
    assert result["segments"][:, 0].tolist() == [10.5, 20.5, 0.5]


def test_classes_are_suppressed_apart_or_together():
    found = outputs([[[0.9, 0.8]]], [[[0, 5]]])
    (result,) = process(plain(), found, nms_method="hard")
    assert result["labels"].tolist() == [0, 1]
    (result,) = process(plain(), found, nms_method="hard", multiclass_nms=False)
    assert result["labels"].tolist() == [0]


def test_voting_by_hand():
    # IoU of the first two: 9 / 11. The first becomes (0.8 * 1 * [0, 10] + 0.4 * 9 / 11 * [1, 11]) / (0.8 + 0.4 * 9 / 11).
    found = outputs([[[0.8], [0.4], [0.6]]], [[[0, 10], [1, 11], [30, 40]]])
    shift = (0.4 * 9 / 11) / (0.8 + 0.4 * 9 / 11)
    options = {"nms_method": "hard", "multiclass_nms": False}
    (result,) = process(plain(), found, voting_thresh=0.8, **options)
    assert result["scores"].tolist() == pytest.approx([0.8, 0.6], **FLOAT32)  # as they were
    expected = [shift + 0.5, shift + 10.5, 30.5, 40.5]
    # 40.5 in float32 is rounded to 4e-6
    assert result["segments"].flatten().tolist() == pytest.approx(expected, rel=1e-6, abs=1e-5)
    for other in ({"voting_thresh": 0.0}, {"voting_thresh": -1}, {"voting_thresh": 0.82}, {"multiclass_nms": True}):
        (result,) = process(plain(), found, **{**options, "voting_thresh": 0.8, **other})
        assert result["segments"].flatten().tolist() == pytest.approx([0.5, 10.5, 30.5, 40.5], **FLOAT32)
    # Soft-NMS lowers scores, and votes count with those before; both segments become means.
    (result,) = process(plain(), found, nms_method="soft", multiclass_nms=False, voting_thresh=0.8)
    back = (0.8 * 9 / 11) / (0.8 * 9 / 11 + 0.4)
    assert result["scores"].tolist() == pytest.approx([0.8, 0.6, 0.4 * math.exp(-2 * (9 / 11) ** 2)], **FLOAT32)
    expected = [shift + 0.5, shift + 10.5, 30.5, 40.5, 1.5 - back, 11.5 - back]
    assert result["segments"].flatten().tolist() == pytest.approx(expected, rel=1e-6, abs=1e-5)
    # Votes of one sample do not reach the other.
    apart = outputs([[[0.8], [0.1]], [[0.1], [0.4]]], [[[0, 10], [90, 99]], [[90, 99], [1, 11]]])
    first, second = process(plain(), apart, voting_thresh=0.8, **options)
    assert first["segments"].flatten().tolist() == pytest.approx([0.5, 10.5, 90.5, 99.5], **FLOAT32)
    assert second["segments"].flatten().tolist() == pytest.approx([1.5, 11.5, 90.5, 99.5], **FLOAT32)


def test_voting_with_segments_of_length_zero_is_finite():
    kept = np.array([[3, 3], [0, 4]], dtype=np.float32)
    candidates = np.array([[3, 3], [0, 4], [3, 3]], dtype=np.float32)
    scores = np.array([0.9, 0.8, 0.7], dtype=np.float32)
    voted = vote(kept, candidates, scores, {"voting_thresh": 0.5})
    assert voted.tolist() == [[3.0, 3.0], [0.0, 4.0]]
    assert voted.dtype == np.float32
    assert vote(kept[:0], candidates, scores, {"voting_thresh": 0.5}).shape == (0, 2)


def test_external_scores():
    found = outputs([[[0.64], [0.25]], [[0.49], [0.09]]], [[[0, 5], [10, 15]]] * 2)
    external = [[0.01, 0.36, 0.81], [0.04, 0.16, 0.0025]]
    # sqrt of products: 0.8 * 0.9, 0.8 * 0.6, 0.5 * 0.9, 0.5 * 0.6; 0.7 * 0.4, 0.7 * 0.2, 0.3 * 0.4, 0.3 * 0.2
    for scores in (external, np.array(external), torch.tensor(external)):
        first, second = process(plain(), found, external_scores=scores)
        assert first["scores"].tolist() == pytest.approx([0.72, 0.48, 0.45, 0.3], **FLOAT32)
        assert first["labels"].tolist() == [2, 1, 2, 1]
        assert first["segments"][:, 0].tolist() == [0.5, 0.5, 10.5, 10.5]
        assert second["scores"].tolist() == pytest.approx([0.28, 0.14, 0.12, 0.06], **FLOAT32)
        assert second["labels"].tolist() == [1, 0, 1, 0]
    first, second = process(plain(), found, external_scores=external, external_topk=1)
    assert first["labels"].tolist() == [2, 2]
    assert second["scores"].tolist() == pytest.approx([0.28, 0.12], **FLOAT32)
    first, second = process(plain(), found, external_scores=external, external_topk=99, threshold=0.1, top_k=3)
    # sqrt(0.64 * 0.01) = 0.08 goes
    assert first["scores"].tolist() == pytest.approx([0.72, 0.48, 0.45], **FLOAT32)
    assert second["scores"].tolist() == pytest.approx([0.28, 0.14, 0.12], **FLOAT32)
    # without suppression too
    first, _ = process(plain(), found, external_scores=external, nms_method="none")
    assert first["scores"].tolist() == pytest.approx([0.72, 0.48, 0.45, 0.3], **FLOAT32)
    assert len(process(plain(), found, external_scores=external, pre_nms_thresh=0.99)[0]["labels"]) == 0


@pytest.mark.parametrize("nms_method", ["soft", "linear", "hard", "none"])
@pytest.mark.parametrize("multiclass_nms", [True, False])
def test_empty_results(nms_method, multiclass_nms):
    options = {"nms_method": nms_method, "multiclass_nms": multiclass_nms, "pre_nms_thresh": 0.5}
    found = outputs([[[0.1, 0.2]], [[0.3, 0.9]], [[0.1, 0.1]]], [[[0, 5]]] * 3)
    results = process(plain(), found, **options)
    for index in (0, 2):
        assert results[index]["scores"].shape == (0,)
        assert results[index]["scores"].dtype == torch.float32
        assert results[index]["labels"].shape == (0,)
        assert results[index]["labels"].dtype == torch.long
        assert results[index]["segments"].shape == (0, 2)
        assert results[index]["segments"].dtype == torch.float32
    assert results[1]["labels"].tolist() == [1]
    assert results[1]["labels"].dtype == torch.long
    nothing = {"logits": found["logits"][:1], "pred_segments": found["pred_segments"][:1]}
    (result,) = process(plain(), nothing, geometry={"duration": 5.0}, threshold=0.1, top_k=3, **options)
    assert (result["scores"].shape, result["labels"].shape, result["segments"].shape) == ((0,), (0,), (0, 2))


def test_forms_of_outputs():
    tensors = outputs(
        [[[0.9, 0.2], [0.4, 0.8]]],
        [[[0, 5], [10, 15]]],
        point_mask=torch.tensor([[1, 1]]),
        point_levels=torch.tensor([[0, 1]]),
    )
    (expected,) = process(plain(), tensors)
    assert expected["scores"].tolist() == pytest.approx([0.9, 0.8, 0.4, 0.2], **FLOAT32)
    forms = [
        ConvTransformerTemporalActionLocalizationOutput(**tensors),
        {key: value.numpy() for key, value in tensors.items()},
        {key: value.tolist() for key, value in tensors.items()},
        {**tensors, "point_mask": None, "point_levels": None},
        {key: value.requires_grad_() if value.is_floating_point() else value for key, value in tensors.items()},
    ]
    for form in forms:
        (result,) = process(plain(), form)
        assert {key: value.tolist() for key, value in result.items()} == {
            key: value.tolist() for key, value in expected.items()
        }
        is_tensor = isinstance(form["logits"], torch.Tensor)
        assert all(isinstance(value, torch.Tensor if is_tensor else np.ndarray) for value in result.values())
        assert not (is_tensor and any(value.requires_grad for value in result.values()))
    # Half precision: a logit of 2.2 is rounded to 2 ** -8 of it, a score near 0.9 by a tenth of that.
    (result,) = process(plain(), {**tensors, "logits": tensors["logits"].detach().bfloat16()})
    assert result["scores"].dtype == torch.float32
    assert result["scores"].tolist() == pytest.approx([0.9, 0.8, 0.4, 0.2], abs=2e-3)


@settings(deadline=None, max_examples=80)
@given(
    found=model_outputs(),
    nms_method=st.sampled_from(["soft", "linear", "hard", "none"]),
    multiclass_nms=st.booleans(),
    voting_thresh=st.sampled_from([0.0, 0.4]),
    pre_nms_topk=st.sampled_from([3, 1000]),
    more=st.sampled_from([{}, {"top_k": 3}, {"threshold": 0.3}, {"external_scores": True}]),
    geometry=st.sampled_from([None, {"fps": np.float64(12.5), "duration": np.float64(6)}]),
)
def test_arrays_give_what_tensors_give(found, more, **options):
    if more == {"external_scores": True}:
        more = {"external_scores": np.linspace(0.1, 0.9, 5 * len(found["logits"])).reshape(-1, 5)}
    of_arrays = process(make(), found, **options, **more)
    tensors = {key: torch.from_numpy(value) for key, value in found.items()}
    of_tensors = process(make(), tensors, **options, **more)
    assert len(of_arrays) == len(of_tensors) == len(found["logits"])
    for ours, theirs in zip(of_arrays, of_tensors, strict=True):
        assert set(ours) == {"scores", "labels", "segments"}
        for key, dtype in (("scores", torch.float32), ("labels", torch.int64), ("segments", torch.float32)):
            assert isinstance(ours[key], np.ndarray)
            assert theirs[key].dtype == torch.from_numpy(ours[key]).dtype == dtype
            assert theirs[key].device == tensors["logits"].device
            np.testing.assert_array_equal(ours[key], theirs[key].numpy())


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_outputs_of_other_numbers_count_as_float32(dtype):
    torch.manual_seed(0)
    tensors = outputs(torch.rand(1, 30, 2), torch.rand(1, 30, 2) * 9 + torch.tensor([0.0, 9.0]))
    tensors = {key: value.to(getattr(torch, dtype)) for key, value in tensors.items()}
    (expected,) = process(plain(), {key: value.float() for key, value in tensors.items()})
    assert len(expected["scores"]) > 10
    (result,) = process(plain(), tensors)
    assert all(torch.equal(result[key], expected[key]) for key in expected)
    assert result["scores"].dtype == result["segments"].dtype == torch.float32
    if dtype != "bfloat16":
        (result,) = process(plain(), {key: value.numpy() for key, value in tensors.items()})
        assert all(np.array_equal(result[key], expected[key].numpy()) for key in expected)
        assert result["scores"].dtype == result["segments"].dtype == np.float32


def test_suppress_takes_tensors_and_arrays():
    segments, scores, groups = np.array([[0, 9], [1, 9], [20, 30]]), np.array([0.5, 0.9, 0.4]), np.array([0, 0, 1])
    options = {"method": "soft", "iou_threshold": 0.1, "sigma": 0.5, "min_score": 0.001, "max_segments": 9}
    kept, kept_scores = suppress(segments, scores, groups, **options, recordings=np.zeros(3))
    assert isinstance(kept, np.ndarray)
    assert kept.tolist() == [1, 0, 2]
    assert kept_scores.dtype == np.float32
    of_tensors = suppress(*map(torch.from_numpy, (segments, scores, groups)), **options, recordings=torch.zeros(3))
    assert all(isinstance(found, torch.Tensor) for found in of_tensors)
    assert [found.tolist() for found in of_tensors] == [kept.tolist(), kept_scores.tolist()]


def test_seconds_of_arrays_and_tensors():
    grid = np.array([[2, 5], [-4, 1]], dtype=np.float32)
    for geometry, seconds in (({}, [[2, 3.5], [-1, 1.5]]), ({"fps": np.float64(4)}, [[4, 7], [-2, 3]])):
        array, tensor, numbers = make().to_seconds([grid, torch.from_numpy(grid), grid.tolist()], geometry)
        assert (array.dtype, tensor.dtype) == (np.float32, torch.float32)
        assert array.tolist() == tensor.tolist() == numbers.tolist() == seconds


def test_outputs_are_left_as_they_were():
    found = outputs([[[0.9], [0.8]]], [[[0, 5], [1, 6]]])
    before = {key: value.clone() for key, value in found.items()}
    for nms_method in ("soft", "linear", "hard", "none"):
        process(plain(), found, nms_method=nms_method, multiclass_nms=False, geometry={"duration": 2.0})
    assert all(torch.equal(found[key], before[key]) for key in before)


def test_settings_of_the_extractor_count_unless_the_call_says_otherwise():
    found = outputs([[[0.9], [0.8]]], [[[0, 10], [0, 6]]])  # IoU 0.6
    extractor = plain(nms_method="hard", iou_threshold=0.5)
    assert len(process(extractor, found)[0]["scores"]) == 1
    assert len(process(extractor, found, iou_threshold=0.7)[0]["scores"]) == 2
    assert len(process(extractor, found)[0]["scores"]) == 1  # the call changed nothing


def test_equal_scores_stay_in_order_of_time_and_class():
    """Saturated scores are common."""
    logits = torch.full((1, 40, 3), 50.0)
    segments = torch.stack([torch.arange(40.0) * 10, torch.arange(40.0) * 10 + 5], dim=1)[None]
    (result,) = process(plain(), {"logits": logits, "pred_segments": segments}, nms_method="none", pre_nms_topk=120)
    assert result["labels"].tolist() == [0, 1, 2] * 40
    assert result["segments"][:, 0].tolist() == [10.0 * (index // 3) + 0.5 for index in range(120)]
    # So the first stay where not all can.
    for options in ({"pre_nms_topk": 50}, {"top_k": 50}):
        (result,) = process(plain(), {"logits": logits, "pred_segments": segments}, nms_method="none", **options)
        assert result["labels"].tolist() == ([0, 1, 2] * 17)[:50]
    for nms_method in ("soft", "linear", "hard"):
        for multiclass_nms, labels in ((False, [0] * 40), (True, [0] * 40 + [1] * 10)):
            options = {"nms_method": nms_method, "multiclass_nms": multiclass_nms, "min_score": 0.5}
            (result,) = process(plain(), {"logits": logits, "pred_segments": segments}, max_seg_num=50, **options)
            assert result["labels"].tolist() == labels
            assert result["segments"][:40, 0].tolist() == [10.0 * index + 0.5 for index in range(40)]


def test_outputs_may_be_any_object_with_the_right_names():
    extractor = ConvTransformerFeatureExtractor(4, 10, 5, 5)
    fields = {"logits": torch.tensor([[[4.0], [-9.0]]]), "pred_segments": torch.tensor([[[1.0, 3.0], [0.0, 9.0]]])}
    (found,) = extractor.post_process_temporal_action_localization(SimpleNamespace(**fields))
    # (grid * 5 + 2.5) / 10
    assert found["segments"].tolist() == [[0.75, 1.75]]
    assert found["scores"].tolist() == pytest.approx([1 / (1 + math.exp(-4))], rel=1e-6)
    with pytest.raises(ValueError, match="no pred_segments"):
        extractor.post_process_temporal_action_localization({"logits": fields["logits"]})


@pytest.mark.parametrize(
    "settings",
    [
        {"padding_side": "left"},
        {"min_length": 0},
        {"pad_to_multiple_of": "8"},
        {"length_tolerance": -0.1},
        {"padding_value": float("nan")},
    ],
)
def test_settings_of_padding_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ConvTransformerFeatureExtractor(4, 10, 5, 5, **settings)


def test_gathered_outputs_that_were_filled_up_give_the_same_segments():
    extractor = ConvTransformerFeatureExtractor(4, 10, 5, 5, min_score=0.0)
    torch.manual_seed(0)
    outputs = {
        "logits": torch.randn(1, 6, 2),
        "pred_segments": torch.tensor([[[0.0, 2.0], [1.0, 4.0], [2.0, 5.0], [3.0, 9.0], [0.0, 8.0], [4.0, 8.0]]]),
        "point_mask": torch.ones(1, 6, dtype=torch.long),
        "point_levels": torch.tensor([[0, 0, 0, 0, 1, 1]]),
    }
    filled = {name: torch.cat([value, torch.full_like(value[:, :3], -100)], dim=1) for name, value in outputs.items()}
    (wanted,) = extractor.post_process_temporal_action_localization(outputs)
    (found,) = extractor.post_process_temporal_action_localization(filled)
    assert len(wanted["scores"]) == 12
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_what_pad_takes_is_taken():
    extractor = ConvTransformerFeatureExtractor(2, 10, 5, 5)
    sample = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert torch.equal(extractor({"input_features": [sample]}).input_features, torch.from_numpy(sample)[None])
    with pytest.raises(ValueError, match="input_features"):
        extractor({"inputs": [sample]})


def test_misspelt_settings_of_a_recipe_are_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("feature_extractor: {feature_size: 4, fps: 10, feature_stride: 2, max_segs: 5}")
    with pytest.raises(
        ValueError, match=r"recipe.yaml: unknown settings in `feature_extractor`: max_segs\. Known: .*max_seg_num"
    ):
        ConvTransformerFeatureExtractor.from_yaml(path)


# --- Without torch --------------------------------------------------------------------------------------------------

SETTINGS_WITHOUT_TORCH = [
    {"nms_method": nms_method, "multiclass_nms": multiclass_nms, "voting_thresh": 0.5, "pre_nms_topk": 50, **more}
    for nms_method in ("soft", "linear", "hard", "none")
    for multiclass_nms, more in ((True, {"top_k": 9}), (False, {}))
]

# Runs where torch is not installed, in a package of the two files that it needs.
SCRIPT = """
import importlib.util, json, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
folder = Path(sys.argv[2])
sys.path.insert(1, str(folder))
assert importlib.util.find_spec("torch") is None

import numpy as np
from package.feature_extraction_convtransformer import ConvTransformerFeatureExtractor

extractor = ConvTransformerFeatureExtractor(feature_size=6, fps=8.0, feature_stride=2, num_frames=3)
extractor.save_pretrained(folder)
extractor = ConvTransformerFeatureExtractor.from_pretrained(folder)

signal = np.load(folder / "signal.npy")
samples = [{"signal": signal}, folder / "features.npy", folder / "features.safetensors"]
annotations = [{"segments": [[0.25, 1.0]], "labels": [1]}, [], []]
batch = extractor(samples, annotations)
assert type(batch["input_features"]) is type(batch["attention_mask"]) is np.ndarray
assert type(batch["labels"][0]["segments"]) is type(batch["labels"][0]["class_labels"]) is np.ndarray
try:
    extractor(folder / "half.safetensors")
except ValueError as error:
    assert "BF16 need torch" in str(error), error
else:
    raise AssertionError("numpy has no bfloat16")

outputs = dict(np.load(folder / "outputs.npz"))
external = outputs.pop("external")
geometry = extractor.geometry_of(samples)
arrays = {"input_features": batch["input_features"], "label": batch["labels"][0]["segments"]}
for number, settings in enumerate(json.loads(sys.argv[3])):
    for scores in (None, external):
        found = extractor.post_process_temporal_action_localization(
            outputs, geometry=geometry, external_scores=scores, **settings
        )
        for sample, result in enumerate(found):
            for key, value in result.items():
                assert type(value) is np.ndarray
                arrays[f"{number}/{scores is not None}/{sample}/{key}"] = value
np.savez(folder / "found.npz", **arrays)
assert not [name for name in sys.modules if name.split(".")[0] == "torch"]
"""


def test_runs_where_torch_is_not_installed(tmp_path):
    packages, package = tmp_path / "site-packages", tmp_path / "package"
    packages.mkdir()
    package.mkdir()
    hidden = ("torch", "functorch", "__editable__", "modeling_convtransformer")
    # (several folders may hold packages, and of two versions the first counts)
    for folder in [Path(folder) for folder in sys.path if any(Path(folder).glob("*.dist-info"))]:
        for entry in folder.iterdir():
            if not entry.name.startswith(hidden) and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    (package / "__init__.py").write_text("")
    for name in ("feature_extraction_convtransformer.py", "configuration_convtransformer.py"):
        shutil.copy(Path(module.__file__).with_name(name), package)

    random = np.random.default_rng(0)
    levels = np.repeat(np.arange(3), (32, 16, 8))
    starts = random.uniform(-5, 60, (3, len(levels), 1))
    found = {
        "logits": random.normal(-1, 3, (3, len(levels), 4)).astype(np.float32),
        "pred_segments": np.concatenate([starts, starts + random.uniform(0, 30, starts.shape)], 2).astype(np.float32),
        "point_mask": random.integers(0, 5, (3, len(levels))),
        "point_levels": np.stack([levels] * 3),
    }
    external = random.uniform(size=(3, 7))
    signal, array = features(30, width=2), features(20, width=6)
    np.savez(tmp_path / "outputs.npz", **found, external=external)
    np.save(tmp_path / "signal.npy", signal)
    np.save(tmp_path / "features.npy", array)
    save_file({"features": array}, tmp_path / "features.safetensors")
    save_tensors({"features": torch.from_numpy(array).bfloat16()}, tmp_path / "half.safetensors")

    # -S: without the packages of this environment
    command = [sys.executable, "-I", "-S", "-c", SCRIPT, packages, tmp_path, json.dumps(SETTINGS_WITHOUT_TORCH)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    without_torch = np.load(tmp_path / "found.npz", allow_pickle=False)

    batch = sensor()([{"signal": signal}, array, array], [{"segments": [[0.25, 1.0]], "labels": [1]}, [], []])
    np.testing.assert_array_equal(without_torch["input_features"], batch["input_features"].numpy())
    np.testing.assert_array_equal(without_torch["label"], batch["labels"][0]["segments"].numpy())
    tensors = {key: torch.from_numpy(value) for key, value in found.items()}
    geometry, count = sensor().geometry_of([{"signal": signal}, array, array]), 0
    for number, options in enumerate(SETTINGS_WITHOUT_TORCH):
        for scores in (None, external):
            results = process(sensor(), tensors, geometry=geometry, external_scores=scores, **options)
            for sample, result in enumerate(results):
                count += len(result["scores"])
                for key, value in result.items():
                    array = without_torch[f"{number}/{scores is not None}/{sample}/{key}"]
                    assert array.shape == value.shape
                    assert torch.from_numpy(array).dtype == value.dtype
                    np.testing.assert_allclose(array, value.numpy(), rtol=1e-6, atol=1e-6)
    assert count > 1000


def test_transformers_does_not_ask_for_torch_to_load_the_file():
    """It reads the imports of code on the Hub, and refuses to load what lacks one."""
    assert set(get_imports(module.__file__)) <= {*sys.stdlib_module_names, "numpy", "transformers", "safetensors"}
