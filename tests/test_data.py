"""Annotations, feature files, augmentation against v1's numbers, the collator and the spliced watch sessions."""

import copy
import io
import json
import math
import random
import re
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.utils.data import DataLoader

from modeling_convtransformer import ConvTransformerConfig, ConvTransformerForTemporalActionLocalization
from modeling_convtransformer import data as data_module
from modeling_convtransformer.data import (
    SBHAR_LABELS,
    WATCH_LABELS,
    CroppedDataset,
    DataCollator,
    MomentCollator,
    MomentDataset,
    SensorAugmentation,
    SensorDataset,
    TemporalActionDataset,
    WatchDataset,
    label_names,
    load_annotations,
    load_sbhar,
    load_watch_recordings,
    resize_features,
    splice_watch_session,
    suggest_config,
    to_hf_dataset,
    truncate_features,
    validate_annotations,
    window_features,
)
from modeling_convtransformer.evaluation import evaluate_detections

GEOMETRY = {"feature_stride": 4, "num_frames": 16}

# 103 features of 16 frames, one each 4 frames, at 30 fps: (102 * 4 + 16) / 30 seconds.
LENGTH, DURATION = 103, 424 / 30


def annotation(label, start, end, label_id=None):
    return {"label": label, "segment": [start, end]} | ({} if label_id is None else {"label_id": label_id})


def good_annotations():
    """As THUMOS14's: ids that are not alphabetical, one segment under two classes, a video without any."""
    return {
        "version": "Thumos14-30fps",
        "database": {
            "video_1": {
                "subset": "Validation",
                "duration": DURATION,
                "fps": 30.0,
                "annotations": [
                    annotation("Diving", 2.0, 4.0, 1),
                    annotation("CliffDiving", 2.0, 4.0, 0),
                    annotation("Billiards", 10.0, 14.0, 2),
                ],
            },
            "video_2": {"subset": "Validation", "duration": DURATION, "fps": 30.0, "annotations": []},
            "video_3": {
                "subset": "Test",
                "duration": DURATION,
                "fps": 25,
                "annotations": [annotation("Diving", 0, 1.5, 1)],
            },
        },
    }


def features_of(number, length=LENGTH, channels=6):
    return np.random.default_rng(number).normal(size=(length, channels)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    for number in (1, 2, 3):
        np.save(tmp_path / f"video_{number}.npy", features_of(number))
    return tmp_path


# --- Annotations ----------------------------------------------------------------------------------------------------


def test_load_annotations(tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(good_annotations()))
    assert load_annotations(path) == good_annotations()

    path.write_text("{")
    with pytest.raises(ValueError, match=r"annotations\.json is not a JSON file"):
        load_annotations(path)
    path.write_text('{"videos": {}}')
    with pytest.raises(ValueError, match=r"must hold .*database.*but holds \['videos'\]"):
        load_annotations(path)
    with pytest.raises(FileNotFoundError):
        load_annotations(tmp_path / "nowhere.json")


def test_label_names_by_id_by_list_and_by_alphabet():
    assert label_names(good_annotations()) == ["CliffDiving", "Diving", "Billiards"]

    listed = good_annotations() | {"labels": ["CliffDiving", "Diving", "Billiards", "Unused"]}
    assert label_names(listed) == ["CliffDiving", "Diving", "Billiards", "Unused"]

    def without_ids(entry):
        return {**entry, "annotations": [annotation(a["label"], *a["segment"]) for a in entry["annotations"]]}

    plain = {"database": {key: without_ids(entry) for key, entry in good_annotations()["database"].items()}}
    assert label_names(plain) == ["Billiards", "CliffDiving", "Diving"]

    gap = good_annotations()
    gap["database"]["video_1"]["annotations"][2]["label_id"] = 4
    assert label_names(gap) == ["CliffDiving", "Diving", "LABEL_2", "LABEL_3", "Billiards"]
    assert label_names({"database": {}}) == []


@pytest.mark.parametrize(
    ("label", "label_id", "message"),
    [
        ("Diving", 3, r"video_3: label 'Diving' has the ids 1 and 3"),
        ("Golf", 1, r"video_3: label_id 1 stands for 'Diving' and 'Golf'"),
        ("Golf", None, r"video_3: label 'Golf' has no label_id"),
        ("Golf", 3.5, r"video_3: label_id of 'Golf' is 3.5"),
        ("Golf", 10**12, r"video_3: label_id of 'Golf' is 1000000000000"),
    ],
)
def test_label_names_of_conflicting_ids(label, label_id, message):
    annotations = good_annotations()
    annotations["database"]["video_3"]["annotations"] = [annotation(label, 0, 1, label_id)]
    with pytest.raises(ValueError, match=message):
        label_names(annotations)


# --- Validation -----------------------------------------------------------------------------------------------------


def test_good_annotations_have_no_problem(folder):
    assert validate_annotations(good_annotations()) == []
    # video_3 has 25 fps: 103 features are 16.96 s there, 20 % more than its duration.
    annotations = good_annotations()
    annotations["database"]["video_3"]["duration"] = 424 / 25
    assert validate_annotations(annotations, folder, feature_size=6, **GEOMETRY) == []


# For each fault: the video's entry, changed, and what the message must say.
FAULTS = {
    "no_subset": (lambda e: e.pop("subset"), "there is no 'subset'"),
    "odd_subset": (lambda e: e.update(subset=3), "subset is 3"),
    "no_duration": (lambda e: e.pop("duration"), "there is no 'duration'"),
    "zero_duration": (lambda e: e.update(duration=0), "duration is 0"),
    "text_duration": (lambda e: e.update(duration="12"), "duration is '12'"),
    "nan_fps": (lambda e: e.update(fps=float("nan")), "fps is nan"),
    "no_annotations": (lambda e: e.pop("annotations"), "there is no 'annotations'"),
    "annotations_no_list": (lambda e: e.update(annotations={}), "annotations is a dict"),
    "annotation_no_dict": (lambda e: e["annotations"].append("x"), "annotation 3: is a str"),
    "misspelt_segment": (
        lambda e: e["annotations"].append({"label": "Diving", "label_id": 1, "segments": [0, 1]}),
        "annotation 3: there is no 'segment' (found ['label', 'label_id', 'segments'])",
    ),
    "no_label": (lambda e: e["annotations"].append({"segment": [0, 1]}), "annotation 3: there is no 'label'"),
    "odd_label": (lambda e: e["annotations"].append(annotation(7, 0, 1)), "annotation 3: label is 7"),
    "nan_segment": (
        lambda e: e["annotations"].append(annotation("Diving", float("nan"), 1, 1)),
        "annotation 3: segment is [nan, 1]",
    ),
    "three_ends": (
        lambda e: e["annotations"].append({"label": "Diving", "label_id": 1, "segment": [0, 1, 2]}),
        "annotation 3: segment is [0, 1, 2]",
    ),
    "negative": (lambda e: e["annotations"].append(annotation("Diving", -1, 1, 1)), "[-1, 1] starts before 0 s"),
    "backwards": (
        lambda e: e["annotations"].append(annotation("Diving", 3, 2, 1)),
        "[3, 2] has its start at or after",
    ),
    "empty": (lambda e: e["annotations"].append(annotation("Diving", 3, 3, 1)), "[3, 3] has its start at or after"),
    "past_end": (lambda e: e["annotations"].append(annotation("Diving", 3, 15, 1)), "[3, 15] ends past the duration"),
    "repeated": (
        lambda e: e["annotations"].append(annotation("Diving", 2, 4.0, 1)),
        "annotation 3: repeats annotation 0",
    ),
    "two_ids": (lambda e: e["annotations"].append(annotation("Diving", 5, 6, 9)), "'Diving' has the ids 1 and 9"),
    "two_labels": (
        lambda e: e["annotations"].append(annotation("Golf", 5, 6, 2)),
        "label_id 2 stands for 'Billiards' and 'Golf'",
    ),
    "text_id": (lambda e: e["annotations"].append(annotation("Golf", 5, 6, "4")), "label_id of 'Golf' is '4'"),
    "true_id": (lambda e: e["annotations"].append(annotation("Tennis", 5, 6, True)), "label_id of 'Tennis' is True"),
    "missing_id": (lambda e: e["annotations"].append(annotation("Curling", 5, 6)), "'Curling' has no label_id"),
}


def test_every_fault_is_reported_with_its_video(tmp_path):
    template = good_annotations()["database"]["video_1"]
    annotations = good_annotations()
    for name, (spoil, _) in FAULTS.items():
        entry = copy.deepcopy(template)
        spoil(entry)
        annotations["database"][name] = entry
    annotations["database"]["no_entry"] = []
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(annotations))

    problems = validate_annotations(path)
    for name, (_, expected) in FAULTS.items():
        own = [problem for problem in problems if problem.startswith(f"{name}: ")]
        assert len(own) == 1, (name, own)
        assert expected in own[0]
    assert [problem for problem in problems if problem.startswith("no_entry: the entry is a list")]
    assert len(problems) == len(FAULTS) + 1
    assert list(annotations["database"])[3:] == [problem.split(":")[0] for problem in problems]


def test_validator_knows_the_list_of_labels():
    annotations = good_annotations() | {"labels": ["CliffDiving", "Diving"]}
    (problem,) = validate_annotations(annotations)
    assert problem.startswith("video_1: label 'Billiards' is not among the 2")
    annotations["labels"] = ["Diving", "CliffDiving", "Billiards"]
    assert [problem.split(",")[0] for problem in validate_annotations(annotations)] == [
        "video_1: label 'Diving' has the ids 0 and 1",
        "video_1: label 'CliffDiving' has the ids 1 and 0",
    ]
    annotations["labels"] = ["Diving", "Diving"]
    (problem,) = validate_annotations(annotations)
    assert problem.startswith("annotations: 'labels' must be a list of different class names")


def test_validator_of_what_is_no_annotation_file(tmp_path):
    (tmp_path / "annotations.json").write_text("[]")
    (problem,) = validate_annotations(tmp_path / "annotations.json")
    assert "but holds a list" in problem
    assert len(validate_annotations(tmp_path / "nowhere.json")) == 1
    assert validate_annotations({"database": {}}) == ["annotations: there is no video under 'database'"]


def test_every_faulty_feature_file_is_reported(tmp_path):
    entry = {"subset": "training", "duration": DURATION, "fps": 30, "annotations": []}
    with_nan = features_of(0)
    with_nan[5, 3], with_nan[7, 0] = np.nan, np.inf
    files = {
        "fine": features_of(0),
        "fine_integers": np.ones((LENGTH, 6), np.int16),
        "transposed": features_of(0).T,
        "narrow": features_of(0)[:, :4],
        "flat": features_of(0)[:, 0],
        "empty": features_of(0)[:0],
        "nan": with_nan,
        "words": np.full((LENGTH, 6), "x"),
        "objects": np.full((LENGTH, 6), None),
        "short": features_of(0)[:80],
        "slightly_short": features_of(0)[:98],
        "other_rate": features_of(0),
    }
    for name, array in files.items():
        np.save(tmp_path / f"v_{name}.npy", array, allow_pickle=True)
    (tmp_path / "v_rubbish.npy").write_bytes(b"no array")
    (tmp_path / "v_cut_off.npy").write_bytes((tmp_path / "v_fine.npy").read_bytes()[:500])
    (tmp_path / "v_bad_zip.npz").write_bytes(b"PK\x03\x04 rubbish")
    np.savez(tmp_path / "v_two_arrays.npz", a=files["fine"], b=files["fine"])

    names = [*files, "rubbish", "cut_off", "bad_zip", "two_arrays", "absent"]
    annotations = {"database": {name: dict(entry) for name in names}}
    annotations["database"]["other_rate"]["fps"] = 60
    problems = dict(
        problem.split(": ", 1)
        for problem in validate_annotations(annotations, tmp_path, feature_size=6, file_prefix="v_", **GEOMETRY)
    )
    expected = {
        "transposed": r"has shape (6, 103), expected (time, channels) with 6 channels; the channels seem to come first: "
        "transpose",
        "narrow": "has shape (103, 4), expected (time, channels) with 6 channels",
        "flat": "has shape (103,), expected (time, channels)",
        "empty": "holds no features",
        "nan": "2 of 618 feature values are NaN or infinite, the first one (nan) at time 5, channel 3",
        "words": "expected numbers",
        "objects": "holds Python objects (dtype object)",
        "short": "there are 80 features, but",
        "other_rate": "there are 103 features, but",
        "rubbish": "cannot be read",
        "cut_off": "cannot be read",
        "bad_zip": "cannot be read",
        "two_arrays": "it holds the arrays ['a', 'b']",
        "absent": "there is no v_absent.npy or v_absent.npz or v_absent.safetensors in",
    }
    assert {*problems} == {*expected}
    for name, text in expected.items():
        assert text in problems[name]

    del annotations["database"]["fine"]["fps"]
    kept = {"database": {"fine": annotations["database"]["fine"]}}
    (problem,) = validate_annotations(kept, tmp_path, file_prefix="v_", **GEOMETRY)
    assert problem.startswith("fine: there is no fps")
    assert validate_annotations(kept, tmp_path, fps=30, file_prefix="v_", **GEOMETRY) == []


# --- Reading --------------------------------------------------------------------------------------------------------


def test_item_on_the_grid(folder):
    dataset = TemporalActionDataset(good_annotations(), folder, split="validation", **GEOMETRY)
    assert dataset.video_ids == ["video_1", "video_2"]
    assert dataset.label2id == {"CliffDiving": 0, "Diving": 1, "Billiards": 2}
    assert dataset.id2label == {0: "CliffDiving", 1: "Diving", 2: "Billiards"}
    assert dataset.feature_size == 6

    item = dataset[0]
    assert {*item} == {"video_id", "features", "segments", "class_labels", "geometry"}
    np.testing.assert_array_equal(item["features"], features_of(1))
    # (2 s * 30 - 8) / 4 = 13, (4 * 30 - 8) / 4 = 28, (10 * 30 - 8) / 4 = 73, (14 * 30 - 8) / 4 = 103
    assert item["segments"].tolist() == [[13, 28], [13, 28], [73, 103]]
    assert item["class_labels"].tolist() == [1, 0, 2]
    assert (item["segments"].dtype, item["class_labels"].dtype) == (np.float32, np.int64)
    assert item["geometry"] == {"fps": 30.0, "feature_stride": 4, "num_frames": 16, "duration": DURATION}

    empty = dataset[-1]
    assert (empty["video_id"], empty["segments"].shape, empty["class_labels"].shape) == ("video_2", (0, 2), (0,))
    with pytest.raises(IndexError):
        dataset[2]


def test_split_fps_and_ground_truth(folder):
    assert len(TemporalActionDataset(good_annotations(), folder, **GEOMETRY)) == 3
    both = TemporalActionDataset(good_annotations(), folder, split=["TEST", "Validation"], **GEOMETRY)
    assert both.video_ids == ["video_1", "video_2", "video_3"]
    test = TemporalActionDataset(good_annotations(), folder, split="test", **GEOMETRY)
    assert test[0]["segments"].tolist() == [[-2.0, (1.5 * 25 - 8) / 4]]  # its own 25 fps
    fast = TemporalActionDataset(good_annotations(), folder, split="test", fps=50, **GEOMETRY)
    assert fast[0]["segments"].tolist() == [[-2.0, (1.5 * 50 - 8) / 4]]

    truth = both.ground_truth()
    assert truth["video_1"]["segments"].tolist() == [[2, 4], [2, 4], [10, 14]]
    assert truth["video_1"]["labels"].tolist() == [1, 0, 2]
    predictions = {key: {**value, "scores": np.ones(len(value["labels"]))} for key, value in truth.items()}
    assert evaluate_detections(predictions, truth).average_map == 1.0

    with pytest.raises(
        ValueError, match=r"no subset \['training'\]; the annotations have \{'validation': 2, 'test': 1\}"
    ):
        TemporalActionDataset(good_annotations(), folder, split="training", **GEOMETRY)


def test_npy_stays_on_disk_and_npz_is_read(folder):
    dataset = TemporalActionDataset(good_annotations(), folder, **GEOMETRY)
    stored = dataset.open_features(0)
    assert isinstance(stored, np.memmap)
    assert not isinstance(dataset[0]["features"], np.memmap)
    assert dataset[0]["features"].flags.writeable

    (folder / "video_1.npy").unlink()
    (folder / "video_2.npy").unlink()
    np.savez(folder / "video_1.npz", anything=features_of(1).astype(np.float64))
    np.savez(folder / "video_2.npz", feats=features_of(2), other=np.zeros(3))
    dataset = TemporalActionDataset(good_annotations(), folder, **GEOMETRY)
    for index in range(3):
        np.testing.assert_array_equal(dataset[index]["features"], features_of(index + 1))
        assert dataset[index]["features"].dtype == np.float32


def test_training_reads_only_the_stretch(folder):
    """The stretch is cut out of the memory map; what is copied is the stretch."""
    dataset = TemporalActionDataset(good_annotations(), folder, max_seq_len=10, training=True, seed=1, **GEOMETRY)
    stored = dataset.open_features(0)
    cut, _, _ = truncate_features(stored, np.zeros((0, 2), np.float32), np.zeros(0, np.int64), 10, 0.5, 2.0)
    assert isinstance(cut, np.memmap)
    assert np.shares_memory(cut, stored)
    assert dataset[0]["features"].shape == (10, 6)


def test_several_folders_are_streams(tmp_path):
    annotations = {"database": {"a": {"subset": "training", "fps": 30, "annotations": []}}}
    folders = [tmp_path / "slow", tmp_path / "fast"]
    for number, channels in enumerate((4, 2)):
        folders[number].mkdir()
        np.save(folders[number] / "a.npy", features_of(number, channels=channels))
    dataset = TemporalActionDataset(annotations, folders, **GEOMETRY)
    item = dataset[0]
    assert (dataset.feature_size, item["geometry"]["duration"]) == (6, None)
    np.testing.assert_array_equal(
        item["features"], np.hstack([features_of(0, channels=4), features_of(1, channels=2)])
    )

    np.save(folders[1] / "a.npy", features_of(1, length=50, channels=2))
    with pytest.raises(ValueError, match=r"a: the streams differ in length"):
        dataset[0]


def test_missing_files_are_all_listed_or_skipped(folder):
    (folder / "video_1.npy").unlink()
    (folder / "video_3.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"(?s)2 of 3 videos .*video_1: there is no video_1\.npy or.*video_3:"):
        TemporalActionDataset(good_annotations(), folder, **GEOMETRY)
    with pytest.warns(UserWarning, match="2 of 3 videos left out"):
        dataset = TemporalActionDataset(good_annotations(), folder, skip_missing=True, **GEOMETRY)
    assert dataset.video_ids == ["video_2"]
    with (
        pytest.warns(UserWarning, match="3 of 3"),
        pytest.raises(ValueError, match="no video to read"),
    ):
        TemporalActionDataset(good_annotations(), folder, file_ext=".npz", skip_missing=True, **GEOMETRY)


def test_unusable_feature_files_are_named(folder):
    np.save(folder / "video_2.npy", features_of(2).T)
    np.save(folder / "video_3.npy", np.full((LENGTH, 6), None), allow_pickle=True)
    dataset = TemporalActionDataset(good_annotations(), folder, **GEOMETRY)
    with pytest.raises(ValueError, match=r"video_2: video_2\.npy has shape \(6, 103\).*transpose"):
        dataset[1]
    with pytest.raises(ValueError, match=r"video_3: video_3\.npy holds Python objects"):
        dataset[2]
    with pytest.raises(ValueError, match=r"video_1: .*with 8 channels"):
        TemporalActionDataset(good_annotations(), folder, feature_size=8, **GEOMETRY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("fps"), r"video_1: its entry says fps None"),
        (lambda e: e.update(duration=-1), r"video_1: its duration is -1"),
        (lambda e: e["annotations"].append({"label": "Diving", "label_id": 1}), r"video_1: each annotation must have"),
        (lambda e: e["annotations"][0].update(segment=[3, 1]), r"video_1: the segment \[3\.0, 1\.0\] is not"),
        (lambda e: e["annotations"][0].update(segment=[float("nan"), 1]), r"video_1: the segment \[nan, 1\.0\]"),
    ],
)
def test_unusable_annotations_are_named(folder, change, message):
    annotations = good_annotations()
    change(annotations["database"]["video_1"])
    with pytest.raises(ValueError, match=message):
        TemporalActionDataset(annotations, folder, **GEOMETRY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_stride": 0}, "feature_stride must be a number > 0"),
        ({"max_seq_len": 0}, "max_seq_len must be a whole number >= 1"),
        ({"downsample_rate": 1.5}, "downsample_rate must be"),
        ({"trunc_thresh": 0}, "trunc_thresh must be"),
        ({"crop_ratio": (1.0, 0.9)}, "crop_ratio must be"),
        ({"resize_to": 10, "downsample_rate": 2}, "Choose one"),
        ({"label2id": {"Diving": 0}}, r"video_1: label2id has no \['Billiards', 'CliffDiving'\]"),
    ],
)
def test_settings_out_of_range(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        TemporalActionDataset(good_annotations(), folder, **(GEOMETRY | settings))


def test_downsampling_grows_the_stride(folder):
    item = TemporalActionDataset(good_annotations(), folder, downsample_rate=2, **GEOMETRY)[0]
    np.testing.assert_array_equal(item["features"], features_of(1)[::2])
    assert item["geometry"]["feature_stride"] == 8
    assert item["segments"].tolist() == [[6.5, 14], [6.5, 14], [36.5, 51.5]]


def test_labels_can_be_merged_and_deduplicated(folder):
    annotations = good_annotations()
    annotations["database"]["video_1"]["annotations"] += [
        annotation("Diving", 2.0005, 4.0005, 1),  # within 1 ms of the first
        annotation("Diving", 5.0, 5.0005, 1),  # shorter than 1 ms
        annotation("Diving", 6.0, 7.0, 1),
    ]
    names = dict.fromkeys(label_names(annotations), 0)
    dataset = TemporalActionDataset(annotations, folder, label2id=names, deduplicate=True, **GEOMETRY)
    # CliffDiving at the place of Diving stays: duplicates are told by name, before names are merged.
    assert dataset.ground_truth()["video_1"]["segments"].tolist() == [[2, 4], [2, 4], [10, 14], [6, 7]]
    assert dataset.ground_truth()["video_1"]["labels"].tolist() == [0, 0, 0, 0]
    assert dataset.id2label == {0: "LABEL_0"}


# --- Resizing, as v1 does for ActivityNet ----------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "size"), [(103, 192), (300, 192), (192, 192), (1, 5)])
def test_resize_is_linear_between_middles(length, size):
    features = features_of(0, length, channels=3)
    resized = resize_features(features, size)
    # Independent of torch: middle of new feature j in units of old features, held constant beyond the outer middles.
    middles = (np.arange(size) + 0.5) * length / size - 0.5
    expected = np.stack([np.interp(middles, np.arange(length), column) for column in features.T.astype(float)], axis=1)
    assert (resized.shape, resized.dtype) == ((size, 3), np.float32)
    np.testing.assert_allclose(resized, expected, rtol=0, atol=1e-4)  # float32 positions up to 300, steps of a few
    expected = torch.nn.functional.interpolate(torch.from_numpy(features).T[None], size=size, mode="linear")[0].T
    np.testing.assert_array_equal(resized, expected.numpy())


def test_resized_videos_have_their_own_stride(folder):
    item = TemporalActionDataset(good_annotations(), folder, resize_to=192, **GEOMETRY)[0]
    stride = 424 / 192  # all frames that the 103 features cover, shared out
    assert item["features"].shape == (192, 6)
    np.testing.assert_array_equal(item["features"], resize_features(features_of(1), 192))
    assert item["geometry"] == {"fps": 30.0, "feature_stride": stride, "num_frames": stride, "duration": DURATION}
    np.testing.assert_allclose(item["segments"][0], [60 / stride - 0.5, 120 / stride - 0.5], rtol=1e-6)
    # The whole video in seconds is the whole grid, half a feature around the outer middles.
    assert (DURATION * 30 - 0.5 * stride) / stride == pytest.approx(191.5)


def test_training_segments_outside_resized_features_go(folder):
    annotations = good_annotations()
    annotations["database"]["video_1"]["annotations"] = [
        annotation("Diving", 1.0, 2.0, 1),  # inside
        annotation("Diving", 14.0, 16.0, 1),  # all but 0.1 s outside
        annotation("Diving", 12.0, 16.0, 1),  # 53 % inside
        annotation("Diving", 20.0, 22.0, 1),  # outside
    ]
    settings = {"resize_to": 192, "max_seq_len": 192, **GEOMETRY}
    assert len(TemporalActionDataset(annotations, folder, **settings)[0]["segments"]) == 4
    item = TemporalActionDataset(annotations, folder, training=True, **settings)[0]
    stride = 424 / 192
    assert len(item["features"]) == 192
    np.testing.assert_allclose(
        item["segments"], [[30 / stride - 0.5, 60 / stride - 0.5], [360 / stride - 0.5, 192.5]], rtol=1e-6
    )
    strict = TemporalActionDataset(annotations, folder, training=True, trunc_thresh=0.6, **settings)[0]
    assert len(strict["segments"]) == 1


# --- Truncation -----------------------------------------------------------------------------------------------------


def golden_truncations():
    with safe_open(Path(__file__).parent / "fixtures" / "data_truncate.safetensors", framework="numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
        cases = json.loads(file.metadata()["cases"])
    for number, case in enumerate(cases):
        prefix = f"{number}/"
        yield case, {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


@pytest.mark.parametrize("number", range(4))
def test_truncation_equals_v1(number):
    case, tensors = list(golden_truncations())[number]
    features, segments, labels = truncate_features(
        tensors["feats"],
        tensors["segments"],
        tensors["labels"],
        case["max_seq_len"],
        case["trunc_thresh"],
        case["offset"],
        case["crop_ratio"],
        rng=random.Random(case["python_random_seed"]),
    )
    assert len(features) == case["out_len"]
    np.testing.assert_array_equal(features, tensors["out_feats"])
    np.testing.assert_array_equal(segments, tensors["out_segments"])
    np.testing.assert_array_equal(labels, tensors["out_labels"])


def test_truncation_draws_from_the_random_module():
    case, tensors = next(golden_truncations())
    arguments = [tensors["feats"], tensors["segments"], tensors["labels"]]
    arguments += [case[key] for key in ("max_seq_len", "trunc_thresh", "offset", "crop_ratio")]
    state = random.getstate()
    try:
        random.seed(case["python_random_seed"])
        np.testing.assert_array_equal(truncate_features(*arguments)[0], tensors["out_feats"])
    finally:
        random.setstate(state)


class Script:
    """A source of random integers that follows a script."""

    def __init__(self, *numbers):
        self.numbers, self.bounds = list(numbers), []

    def randint(self, low, high):
        self.bounds.append((low, high))
        return self.numbers.pop(0) if len(self.numbers) > 1 else self.numbers[0]


def test_truncation_by_hand():
    features = np.arange(100, dtype=np.float32)[:, None]
    segments = np.array([[10, 20], [38, 48], [30, 50], [44, 64], [69, 79], [80, 90]], np.float32)
    labels = np.arange(6)
    # Stretch 40 to 70, reaching 2 further each way: 38 to 72. The third segment is inside by 12/20, the fifth by 3/10.
    script = Script(40)
    cut, kept, kept_labels = truncate_features(features, segments, labels, 30, 0.5, 2.0, rng=script)
    assert script.bounds == [(0, 70)]
    assert cut[:, 0].tolist() == list(range(40, 70))
    assert kept.tolist() == [[-2, 8], [-2, 10], [4, 24]]
    assert kept_labels.tolist() == [1, 2, 3]

    _, kept, kept_labels = truncate_features(features, segments, labels, 30, 0.3, 2.0, rng=Script(40))
    assert kept_labels.tolist() == [1, 2, 3, 4]
    assert kept[-1].tolist() == [29, 32]

    # A video that is short enough is cropped: the length is drawn first, then the place; or left whole.
    script = Script(95, 3)
    cut, kept, _ = truncate_features(features, segments, labels, 200, 0.5, 2.0, crop_ratio=(0.9, 1.0), rng=script)
    assert script.bounds == [(90, 100), (0, 5)]
    assert (len(cut), cut[0, 0], kept[0].tolist()) == (95, 3, [7, 17])
    assert truncate_features(features, segments, labels, 200, 0.5, 2.0, rng=script)[0] is features
    assert truncate_features(features, segments, labels, 200, 0.5, 2.0, (0.9, 1.0), rng=Script(100))[0] is features


def test_truncation_without_a_segment():
    features = np.arange(100, dtype=np.float32)[:, None]
    # Five stretches that miss the segment; the sixth holds it.
    segments, labels = np.array([[90, 95]], np.float32), np.array([7])
    cut, kept, kept_labels = truncate_features(features, segments, labels, 10, 0.5, 2.0, rng=Script(0, 1, 2, 3, 4, 88))
    assert (cut[0, 0], kept.tolist(), kept_labels.tolist()) == (88, [[2, 7]], [7])
    # None of 5 holds it: the last one, without segments.
    script = Script(0, 1, 2, 3, 4, 88)
    cut, kept, kept_labels = truncate_features(features, segments, labels, 10, 0.5, 2.0, max_num_trials=5, rng=script)
    assert (len(script.bounds), cut[0, 0], kept.shape, kept_labels.shape) == (5, 4, (0, 2), (0,))
    # There is none to find: one trial.
    script = Script(6)
    cut, kept, _ = truncate_features(features, segments[:0], labels[:0], 10, 0.5, 2.0, rng=script)
    assert (len(script.bounds), cut[0, 0], kept.shape) == (1, 6, (0, 2))
    # A segment without length is never kept, and its 0 / 0 is not computed.
    with np.errstate(all="raise"):
        _, kept, _ = truncate_features(
            features, np.float32([[5, 5], [4, 6]]), np.arange(2), 10, 0.5, 2.0, rng=Script(0)
        )
    assert kept.tolist() == [[4, 6]]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 120), limit=st.integers(1, 120))
def test_truncation_keeps_time_and_labels_together(seed, length, limit):
    rng = np.random.default_rng(seed)
    features = np.arange(length, dtype=np.float32)[:, None]
    starts = rng.uniform(0, length, 8)
    segments = np.stack([starts, starts + rng.uniform(0.1, length, 8)], axis=1).astype(np.float32)
    cut, kept, labels = truncate_features(
        features, segments, np.arange(8), limit, 0.5, 1.0, (0.5, 1.0), rng=random.Random(seed)
    )
    assert 1 <= len(cut) <= min(length, limit)
    assert np.diff(cut[:, 0]).tolist() == [1] * (len(cut) - 1)
    original = segments[labels] - cut[0, 0]
    # Uncut videos keep segments that reach past the end; cut ones clip to the stretch and half a feature's window.
    if len(cut) < length:
        assert (kept >= -1).all()
        assert (kept <= len(cut) + 1).all()
        # Shifting by up to 120 costs a few units in the last place of float32.
        np.testing.assert_allclose(kept, original.clip(-1, len(cut) + 1), atol=1e-4)
        assert ((kept[:, 1] - kept[:, 0]) >= 0.5 * (original[:, 1] - original[:, 0]) - 1e-4).all()


def test_training_draws_by_seed_epoch_and_access(folder):
    def make(seed):
        return TemporalActionDataset(
            good_annotations(), folder, max_seq_len=40, crop_ratio=(0.9, 1.0), training=True, seed=seed, **GEOMETRY
        )

    def first_values(dataset, count=8):
        return [float(dataset[0]["features"][0, 0]) for _ in range(count)]

    first, again, other = make(0), make(0), make(1)
    values = first_values(first)
    assert len({*values}) > 1  # a new stretch at each access
    assert first_values(again) == values
    assert first_values(other) != values
    first.set_epoch(1)
    assert first_values(first) != values
    first.set_epoch(0)
    assert first_values(first) == values
    for index in range(3):
        item = first[index]
        assert len(item["features"]) == 40
        assert len(item["segments"]) == len(item["class_labels"])

    unseeded = TemporalActionDataset(good_annotations(), folder, max_seq_len=40, training=True, **GEOMETRY)
    state = random.getstate()
    try:
        random.seed(3)
        values = first_values(unseeded)
        random.seed(3)
        assert first_values(unseeded) == values
    finally:
        random.setstate(state)


# --- Collator and model ----------------------------------------------------------------------------------------------


def feature_extractor(feature_size, **geometry):
    from modeling_convtransformer.feature_extraction_convtransformer import ConvTransformerFeatureExtractor

    return ConvTransformerFeatureExtractor(feature_size=feature_size, **geometry)


def test_collator_pads_and_keeps_labels(folder):
    np.save(folder / "video_2.npy", features_of(2, length=60))
    dataset = TemporalActionDataset(good_annotations(), folder, split="validation", **GEOMETRY)
    items = [dataset[0], dataset[1]]
    extractor = feature_extractor(6, fps=30, **GEOMETRY)
    batch = DataCollator(extractor)(items)
    assert {*batch} == {"input_features", "attention_mask", "labels"}
    assert batch["input_features"].shape == (2, 103, 6)
    assert batch["attention_mask"].sum(dim=1).tolist() == [103, 60]
    np.testing.assert_array_equal(batch["input_features"][1, :60].numpy(), features_of(2, length=60))
    assert batch["input_features"][1, 60:].abs().max() == 0
    assert batch["labels"][0]["segments"].tolist() == [[13, 28], [13, 28], [73, 103]]
    assert batch["labels"][0]["class_labels"].tolist() == [1, 0, 2]
    assert batch["labels"][1]["segments"].shape == (0, 2)
    assert batch["labels"][1]["class_labels"].dtype == torch.long

    batch = DataCollator(extractor, max_length=128, return_metadata=True)(items)
    assert batch["input_features"].shape == (2, 128, 6)
    assert batch["video_ids"] == ["video_1", "video_2"]
    assert batch["geometry"] == [items[0]["geometry"], items[1]["geometry"]]

    with pytest.raises(ValueError, match=r"video_1: 103 features do not fit into max_length 64"):
        DataCollator(extractor, max_length=64)(items)
    items[1]["features"][3, 4] = np.nan
    with pytest.raises(ValueError, match=r"video_2.*NaN"):
        DataCollator(extractor)(items)


def test_batches_train_the_model(folder):
    dataset = TemporalActionDataset(
        good_annotations(), folder, max_seq_len=64, crop_ratio=(0.9, 1.0), training=True, seed=0, **GEOMETRY
    )
    collator = DataCollator(feature_extractor(6, fps=30, **GEOMETRY))
    loader = DataLoader(dataset, batch_size=3, collate_fn=collator, num_workers=1)
    config = ConvTransformerConfig(n_in=6, n_embd=16, n_head=2, fpn_dim=16, head_dim=16, num_labels=3, max_len=64)
    torch.manual_seed(0)
    model = ConvTransformerForTemporalActionLocalization(config)
    (batch,) = loader
    assert batch["input_features"].shape == (3, 64, 6)
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# --- The watch -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recordings():
    pytest.importorskip("seglearn", reason="the watch recordings come with seglearn (the demo extra)")
    return load_watch_recordings()


def arm(recordings, person=3, side="left"):
    return [recording for recording in recordings if (recording["person"], recording["side"]) == (person, side)]


def test_watch_recordings(recordings):
    assert len(recordings) == 140
    assert {r["person"] for r in recordings} == {*range(1, 11)}
    for person in range(1, 11):
        for side in ("left", "right"):
            assert sorted(r["label"] for r in arm(recordings, person, side)) == sorted(WATCH_LABELS)
    assert {r["signal"].shape[1] for r in recordings} == {6}
    assert {r["signal"].dtype for r in recordings} == {np.dtype(np.float32)}
    lengths = [len(r["signal"]) for r in recordings]
    assert (min(lengths), max(lengths)) == (947, 2618)
    # Gravity: acceleration is in g.
    assert 0.9 < np.median(np.linalg.norm(np.concatenate([r["signal"][:, :3] for r in recordings]), axis=1)) < 1.2


def test_watch_labels_are_in_the_order_of_seglearn(recordings):
    from seglearn.datasets import load_watch

    data = load_watch()
    assert list(data["y_labels"]) == ["PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW"]
    assert [WATCH_LABELS.index(r["label"]) for r in recordings] == data["y"].tolist()
    assert [r["side"] == "right" for r in recordings] == (data["side"] == 1).tolist()
    np.testing.assert_array_equal(recordings[17]["signal"], np.float32(data["X"][17]))


def test_seglearn_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "seglearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "modeling-convtransformer\[demo\]"'):
        load_watch_recordings()


@pytest.mark.parametrize("pause", [(3.0, 8.0), (0.5, 0.5), (0.0, 0.0)])
def test_session_holds_the_recordings_untouched(recordings, pause):
    own = arm(recordings)
    by_label = {recording["label"]: recording["signal"] for recording in own}
    session = splice_watch_session(own, np.random.default_rng(0), pause)
    signal, samples = session["signal"], np.rint(session["segments"] * 50).astype(int)
    assert signal.dtype == np.float32
    assert np.isfinite(signal).all()
    assert sorted(session["labels"].tolist()) == list(range(7))
    for (start, end), label in zip(samples, session["labels"], strict=True):
        np.testing.assert_array_equal(signal[start:end], by_label[WATCH_LABELS[label]])
    # What is left are eight pauses of the right length: labels cover the recordings and nothing else.
    pauses = np.append(samples[:, 0], len(signal)) - np.append(0, samples[:, 1])
    assert len(pauses) == 8
    assert ((pauses >= round(pause[0] * 50)) & (pauses <= round(pause[1] * 50))).all()
    assert len(signal) == pauses.sum() + sum(len(r["signal"]) for r in own)


def test_pauses_are_still_and_join_smoothly(recordings):
    session = splice_watch_session(arm(recordings), np.random.default_rng(0))
    signal, samples = session["signal"].astype(float), np.rint(session["segments"] * 50).astype(int)
    for (_, end), (start, _) in pairwise(samples):
        still = signal[end + 50 : start - 50]  # between the glides
        assert np.abs(np.linalg.norm(still[:, :3], axis=1) - 1).max() < 0.15  # 1 g, sway of 0.03 and noise of 0.01
        assert still[:, 3:].std() == pytest.approx(0.05, rel=0.25)
        assert np.abs(still[:, 3:].mean()) < 0.02
        # No jump where the made part begins and ends: a few times the noise, where recordings move by far more.
        assert np.abs(signal[end] - signal[end - 1]).max() < 0.05
        assert np.abs(signal[start] - signal[start - 1]).max() < 0.05


def test_bouts_are_cuts_of_the_recordings(recordings):
    own = arm(recordings)
    by_label = {recording["label"]: recording["signal"] for recording in own}
    session = splice_watch_session(own, np.random.default_rng(0), bout=(2.0, 5.0))
    for (start, end), label in zip(np.rint(session["segments"] * 50).astype(int), session["labels"], strict=True):
        assert 100 <= end - start <= 250
        whole = by_label[WATCH_LABELS[label]]
        cut = session["signal"][start:end]
        places = np.flatnonzero((whole == cut[0]).all(axis=1))
        assert any(np.array_equal(whole[place : place + len(cut)], cut) for place in places)
    long = splice_watch_session(own, np.random.default_rng(0), bout=(60.0, 90.0))
    assert np.diff(long["segments"]).sum() * 50 == pytest.approx(sum(len(signal) for signal in by_label.values()))


def test_sessions_of_several_arms_are_refused(recordings):
    with pytest.raises(ValueError, match=r"one arm's, but the 14 recordings are of \[\(3, 'left'\), \(3, 'right'\)\]"):
        splice_watch_session(arm(recordings) + arm(recordings, side="right"), np.random.default_rng(0))
    with pytest.raises(ValueError, match="0 recordings"):
        splice_watch_session([], np.random.default_rng(0))
    with pytest.raises(ValueError, match="pause must be"):
        splice_watch_session(arm(recordings), np.random.default_rng(0), pause=(8, 3))
    with pytest.raises(ValueError, match="bout must be at least one sample"):
        splice_watch_session(arm(recordings), np.random.default_rng(0), bout=(0, 3))


@pytest.mark.parametrize(("samples", "window", "stride"), [(100, 50, 25), (101, 50, 25), (50, 50, 25), (23, 5, 7)])
def test_window_features_against_a_loop(samples, window, stride):
    signal = np.random.default_rng(0).normal(size=(samples, 3)).astype(np.float32)
    features = window_features(signal, window, stride)
    expected = [signal[start : start + window].ravel() for start in range(0, samples - window + 1, stride)]
    assert features.shape == ((samples - window) // stride + 1, window * 3)
    assert features.flags.c_contiguous
    assert features.flags.writeable
    assert not np.shares_memory(features, signal)
    np.testing.assert_array_equal(features, np.stack(expected))


@pytest.mark.parametrize(("shape", "window", "stride"), [((49, 3), 50, 25), ((50,), 5, 5), ((50, 3), 0, 5)])
def test_window_features_refuses(shape, window, stride):
    with pytest.raises(ValueError, match="at least one window"):
        window_features(np.zeros(shape), window, stride)


def test_watch_dataset_items(recordings):
    dataset = WatchDataset([3, 5], sessions_per_side=2)
    assert dataset.video_ids[:3] == ["person03_left_0", "person03_left_1", "person03_right_0"]
    assert (len(dataset), dataset.feature_size) == (8, 300)
    assert dataset.id2label[5] == "lower trapezius row"
    item, signal, truth = dataset[0], dataset.signal(0), dataset.ground_truth()
    assert {*truth} == {*dataset.video_ids}
    assert item["video_id"] == "person03_left_0"
    assert item["geometry"] == {
        "fps": 50.0,
        "feature_stride": 25,
        "num_frames": 50,
        "duration": len(signal) / 50,
    }
    np.testing.assert_array_equal(item["features"], window_features(signal, 50, 25))
    # Grid to seconds: feature t is centred on (t * stride + window / 2) / fps.
    np.testing.assert_allclose(
        (item["segments"] * 25 + 25) / 50, truth["person03_left_0"]["segments"], rtol=0, atol=1e-3
    )
    np.testing.assert_array_equal(item["class_labels"], truth["person03_left_0"]["labels"])
    assert item["features"].dtype == item["segments"].dtype == np.float32
    # A window whose middle is in a segment shows that recording.
    start, end = truth["person03_left_0"]["segments"][0]
    inside = int(np.ceil(item["segments"][0, 0])) + 2
    assert start < (inside * 25) / 50 < (inside * 25 + 50) / 50 < end
    whole = next(r["signal"] for r in arm(recordings) if r["label"] == WATCH_LABELS[item["class_labels"][0]])
    offset = inside * 25 - round(start * 50)
    np.testing.assert_array_equal(item["features"][inside].reshape(50, 6), whole[offset : offset + 50])


def test_watch_dataset_is_fixed_by_its_seed(recordings):
    first, again, other = WatchDataset([1, 2]), WatchDataset([1, 2]), WatchDataset([1, 2], seed=1)
    for index in range(4):
        for _ in range(2):
            np.testing.assert_array_equal(first[index]["features"], again[index]["features"])
    orders = [[dataset[index]["class_labels"].tolist() for index in range(4)] for dataset in (first, other)]
    assert orders[0] != orders[1]
    assert len({tuple(order) for order in orders[0]}) == 4  # each arm has an order of its own
    # A session depends on its own person only, and all of it on that person's recordings.
    np.testing.assert_array_equal(WatchDataset([2])[0]["features"], first[2]["features"])
    assert {*WatchDataset([1, 2]).video_ids} & {*WatchDataset([3]).video_ids} == set()
    # The order that numpy's generator draws, pinned: the same on all platforms.
    assert orders[0][0] == [2, 5, 3, 6, 1, 0, 4]


def test_watch_training_draws_anew(recordings):
    def lengths(dataset, count=3):
        return [dataset[0]["geometry"]["duration"] for _ in range(count)]

    first, again = (WatchDataset([1], bout=(5, 20), training=True) for _ in range(2))
    values = lengths(first)
    assert len({*values}) == 3
    assert lengths(again) == values
    first.set_epoch(1)
    later = lengths(first)
    assert not {*later} & {*values}
    first.set_epoch(0)
    assert lengths(first) == values
    assert len(first.signal(0)) / 50 == first[0]["geometry"]["duration"]  # the signal of the next item
    with pytest.raises(ValueError, match="training=False"):
        first.ground_truth()


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_as_one_process_does(recordings, persistent):
    """Workers are copies of the dataset, and new ones come with each epoch: the counts must outlive them."""

    def durations(loader):
        return [item["geometry"]["duration"] for item in loader]

    alone, shared, kept = (WatchDataset([1], bout=(5, 20), training=True) for _ in range(3))
    expected = [durations(alone) for _ in range(3)]
    assert len({duration for epoch in expected for duration in epoch}) > 4
    loader = DataLoader(shared, batch_size=None, num_workers=2, persistent_workers=persistent)
    assert [durations(loader) for _ in range(2)] == expected[:2]
    shared.set_epoch(0)
    assert durations(loader) == expected[0]
    assert durations(kept) == expected[0]


@pytest.mark.parametrize("people", [[], [0], [1, 11], [1, 1]])
def test_watch_dataset_refuses_unknown_people(recordings, people):
    with pytest.raises(ValueError, match="people must be different ones of"):
        WatchDataset(people)


def test_watch_batches_train_the_model(recordings):
    dataset = WatchDataset([1], bout=(5, 8), training=True)
    extractor = feature_extractor(dataset.feature_size, fps=50, feature_stride=25, num_frames=50)
    batch = DataCollator(extractor, return_metadata=True)([dataset[0], dataset[1]])
    batch.pop("video_ids"), batch.pop("geometry")
    config = ConvTransformerConfig(
        n_in=300, n_embd=16, n_head=2, fpn_dim=16, head_dim=16, num_labels=len(WATCH_LABELS), max_len=256
    )
    torch.manual_seed(0)
    loss = ConvTransformerForTemporalActionLocalization(config)(**batch).loss
    assert torch.isfinite(loss)
    assert len(batch["labels"][0]["segments"]) == 7


def test_watch_sessions_of_few_exercises(recordings):
    whole, few = WatchDataset([1], sessions_per_side=4), WatchDataset([1], sessions_per_side=4, exercises=(2, 3))
    counts = [len(item["class_labels"]) for item in few]
    assert {*counts} == {2, 3}
    assert all(len({*item["class_labels"].tolist()}) == len(item["class_labels"]) for item in few)
    assert len({label for item in few for label in item["class_labels"].tolist()}) > 4  # not the same ones each time
    assert {len(item["class_labels"]) for item in whole} == {7}
    for exercises in ((0, 3), (3, 2), (1, 8), (2,)):
        with pytest.raises(ValueError, match="exercises must be the fewest and the most"):
            WatchDataset([1], exercises=exercises)


# --- Moments --------------------------------------------------------------------------------------------------------


class Labelled:
    """Three recordings of two steps' features, with segments of the classes a, b and c."""

    id2label = {0: "a", 1: "b", 2: "c"}
    found = ([(0, 1, 2), (0, 5, 9), (2, 3, 4)], [(1, 0, 3)], [])

    def __len__(self):
        return 3

    def __getitem__(self, index):
        found = self.found[range(3)[index]]
        return {
            "video_id": f"v{index}",
            "features": np.full((12, 2), index, np.float32),
            "segments": np.array([one[1:] for one in found], np.float32).reshape(-1, 2),
            "class_labels": np.array([one[0] for one in found], np.int64),
            "geometry": {"fps": 10.0, "feature_stride": 5, "num_frames": 5, "duration": 6.0},
        }


PHRASINGS = {"a": ["one a", "another a"], "b": ["some b"], "c": ["c", "the third"]}


def test_every_sentence_is_asked_of_every_recording():
    items = [*map(MomentDataset(Labelled(), PHRASINGS).__getitem__, range(3))]
    for item in items:
        assert item["queries"] == ["one a", "another a", "some b", "c", "the third"]
        assert item["query_labels"] == [0, 0, 1, 2, 2]
    answers = [[one.tolist() for one in item["segments"]] for item in items]
    assert answers[0] == [[[1, 2], [5, 9]], [[1, 2], [5, 9]], [], [[3, 4]], [[3, 4]]]
    assert answers[1] == [[], [], [[0, 3]], [], []]
    assert answers[2] == [[], [], [], [], []]
    assert items[2]["segments"][0].shape == (0, 2)
    assert items[0]["geometry"] == Labelled()[0]["geometry"]
    # Without sentences, the names of the classes are asked for.
    assert MomentDataset(Labelled())[1]["queries"] == ["a", "b", "c"]
    assert MomentDataset(Labelled(), PHRASINGS).sentences == ["one a", "another a", "some b", "c", "the third"]


def test_training_draws_sentences_and_absent_classes():
    first, again = (MomentDataset(Labelled(), PHRASINGS, training=True, absent=1, seed=3) for _ in range(2))
    drawn = [first[1]["queries"] for _ in range(40)]
    assert drawn == [again[1]["queries"] for _ in range(40)]
    assert all(len(queries) == 2 and "some b" in queries for queries in drawn)
    assert {query for queries in drawn for query in queries} == {*first.sentences}
    first.set_epoch(0)
    assert [first[1]["queries"] for _ in range(40)] == drawn
    assert {len(first[0]["queries"]), len(first[2]["queries"])} == {3, 1}  # a, c and one more; one of three
    # An evaluation asks the same each time, and every recording something.
    fixed = MomentDataset(Labelled(), PHRASINGS, absent=1)
    assert fixed[1]["queries"] == fixed[1]["queries"]
    assert [{*item["query_labels"]} for item in MomentDataset(Labelled(), absent=0)][:2] == [{0, 2}, {1}]
    assert len(MomentDataset(Labelled(), absent=0)[2]["queries"]) == 1


@pytest.mark.parametrize(
    ("phrasings", "message"),
    [
        ({"a": ["x"], "b": ["y"]}, r"only one of them has \['c'\]"),
        ({**PHRASINGS, "d": ["z"]}, r"only one of them has \['d'\]"),
        ({**PHRASINGS, "b": []}, "phrasings of 'b' are \\[\\]"),
        ({**PHRASINGS, "b": "a text"}, "expected a list"),
        ({**PHRASINGS, "b": [" "]}, "phrasings of 'b' hold ' '"),
        ({**PHRASINGS, "b": ["one a"]}, "'one a' stands for 'a' and 'b'"),
    ],
)
def test_sentences_that_cannot_be_taught_are_named(phrasings, message):
    with pytest.raises(ValueError, match=message):
        MomentDataset(Labelled(), phrasings)


def test_moment_collator_looks_up_what_the_text_encoder_said():
    extractor = feature_extractor(2, fps=10, feature_stride=5, num_frames=5)
    processor = type("Processor", (), {"feature_extractor": extractor})()
    dataset = MomentDataset(Labelled(), PHRASINGS, absent=0)
    lengths = {"one a": 2, "another a": 3, "some b": 1, "c": 4, "the third": 5}
    text_embeds = {sentence: torch.randn(count, 6) for sentence, count in lengths.items()}
    batch = MomentCollator(processor, text_embeds, return_metadata=True)([dataset[0], dataset[1]])
    assert batch["input_features"].shape == (2, 12, 2)
    assert batch["query_embeds"].shape == (
        2,
        4,
        5,
        6,
    )  # two recordings, the first one's four queries, the longest one's words
    assert batch["queries"] == [["one a", "another a", "c", "the third"], ["some b"]]
    assert batch["query_attention_mask"].sum(-1).tolist() == [[2, 3, 4, 5], [1, 0, 0, 0]]
    for row, own in enumerate(batch["queries"]):
        for column, sentence in enumerate(own):
            kept = batch["query_attention_mask"][row, column].bool()
            torch.testing.assert_close(batch["query_embeds"][row, column][kept], text_embeds[sentence], rtol=0, atol=0)
            assert not batch["query_embeds"][row, column][~kept].any()
    assert [len(own) for own in batch["labels"]] == [4, 1]
    assert batch["labels"][1][0]["segments"].tolist() == [[0, 3]]
    assert batch["query_labels"] == [[0, 0, 2, 2], [1]]

    with pytest.raises(ValueError, match="v1: text_embeds lacks 'some b'"):
        MomentCollator(processor, {"one a": text_embeds["one a"]})([dataset[1]])
    with pytest.raises(ValueError, match="expected those of MomentDataset"):
        MomentCollator(processor, text_embeds)([Labelled()[0]])


def test_held_out_sentences_share_few_words_with_those_that_are_taught():
    """What configuration/watch_moments.yaml says of them."""
    path = Path(__file__).parent.parent / "configuration" / "watch_moments.yaml"
    queries = yaml.safe_load(path.read_text(encoding="utf-8"))["queries"]
    small = {
        *[
            "a",
            "an",
            "and",
            "as",
            "at",
            "by",
            "do",
            "does",
            "for",
            "from",
            "in",
            "into",
            "is",
            "it",
            "its",
            "my",
            "of",
            "on",
            "one",
            "or",
            "over",
            "that",
            "the",
            "to",
            "until",
            "when",
        ]
    }
    small |= {*["while", "who", "with", "you", "your"]}

    def words(sentence):
        return {*re.findall("[a-z]+", sentence.lower())} - small

    assert {*queries} == {"training", "paraphrases", "images"}
    taught = {sentence for sentences in queries["training"].values() for sentence in sentences}
    assert len(taught) == 84
    for name in ("paraphrases", "images"):
        assert [*queries[name]] == WATCH_LABELS == [*queries["training"]]
        for label, sentences in queries[name].items():
            known = set().union(*map(words, queries["training"][label]))
            for sentence in sentences:
                assert sentence not in taught
                assert 2 * len(words(sentence) & known) <= len(words(sentence)), (label, sentence)


# --- Arrow datasets -------------------------------------------------------------------------------------------------


def as_plain(item):
    """An item with NumPy arrays and plain numbers, whatever it was made of."""
    plain = {name: np.asarray(item[name]) for name in ("features", "segments", "class_labels")}
    geometry = {name: None if value is None else float(value) for name, value in item["geometry"].items()}
    return {**plain, "video_id": str(item["video_id"]), "geometry": geometry}


def assert_same_item(found, wanted):
    found, wanted = as_plain(found), as_plain(wanted)
    assert found["video_id"] == wanted["video_id"]
    assert found["geometry"] == wanted["geometry"]
    for name in ("features", "segments", "class_labels"):
        assert (found[name].dtype, found[name].shape) == (wanted[name].dtype, wanted[name].shape)
        np.testing.assert_array_equal(found[name], wanted[name])


@pytest.fixture
def stored(folder):
    """The dataset, whose second video has no segment and whose third has no duration, and the same as an Arrow dataset."""
    pytest.importorskip("datasets", reason="Arrow datasets need the package datasets")
    annotations = good_annotations()
    del annotations["database"]["video_3"]["duration"]
    np.save(folder / "video_2.npy", features_of(2, length=60))
    dataset = TemporalActionDataset(annotations, folder, **GEOMETRY)
    return dataset, to_hf_dataset(dataset)


def test_arrow_items_are_the_items(stored, tmp_path):
    import datasets

    dataset, arrow = stored
    assert arrow.features["class_labels"].feature.names == ["CliffDiving", "Diving", "Billiards"]
    arrow.save_to_disk(tmp_path / "arrow")
    kept = datasets.load_from_disk(tmp_path / "arrow")
    assert kept.features["class_labels"].feature.names == ["CliffDiving", "Diving", "Billiards"]
    arrow.to_parquet(tmp_path / "part.parquet")
    streamed = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "part.parquet"), split="train", streaming=True, features=arrow.features
    )
    ways = {
        "made": list(arrow.with_format("numpy")),
        "from disk": list(kept.with_format("numpy")),
        "iterable": list(kept.to_iterable_dataset().with_format("numpy")),
        "streamed": list(streamed.with_format("numpy")),
    }
    collate = DataCollator(feature_extractor(6, fps=30, **GEOMETRY), return_metadata=True)
    wanted = collate([dataset[index] for index in range(3)])
    assert wanted["geometry"][2]["duration"] is None
    for items in ways.values():
        assert len(items) == 3
        for found, index in zip(items, range(3), strict=True):
            assert_same_item(found, dataset[index])
        batch = collate(items)
        assert batch["geometry"] == wanted["geometry"]
        assert batch["video_ids"] == wanted["video_ids"]
        assert torch.equal(batch["input_features"], wanted["input_features"])
        for own, other in zip(batch["labels"], wanted["labels"], strict=True):
            assert torch.equal(own["segments"], other["segments"])
            assert torch.equal(own["class_labels"], other["class_labels"])
            assert own["class_labels"].dtype == torch.long
        # What the model gives for such a batch is turned into seconds, by geometries that were NumPy's.
        outputs = {"logits": torch.zeros(3, 5, 3), "pred_segments": torch.tensor([1.0, 3.0]).expand(3, 5, 2)}
        results = collate.feature_extractor.post_process_temporal_action_localization(outputs, batch["geometry"])
        # ((1, 3) * 4 + 8) / fps
        for result, fps in zip(results, (30, 30, 25), strict=True):
            np.testing.assert_allclose(result["segments"][0], [12 / fps, 20 / fps], rtol=1e-6)


def test_arrow_dataset_is_not_taken_from_an_old_cache(stored, folder):
    """datasets keeps what equal arguments gave: but a file of features may have been extracted anew."""
    dataset, _ = stored
    np.save(folder / "video_1.npy", features_of(7))
    again = to_hf_dataset(dataset).with_format("numpy")
    np.testing.assert_array_equal(again[0]["features"], features_of(7))


def test_arrow_dataset_needs_all_class_names(folder):
    pytest.importorskip("datasets", reason="Arrow datasets need the package datasets")
    names = {"CliffDiving": 0, "Diving": 1, "Billiards": 5}
    with pytest.raises(ValueError, match="The class id 2 has no name"):
        to_hf_dataset(TemporalActionDataset(good_annotations(), folder, label2id=names, **GEOMETRY))


def test_datasets_missing(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "modeling-convtransformer\[train\]"'):
        to_hf_dataset(TemporalActionDataset(good_annotations(), folder, **GEOMETRY))


def test_cropped_items_are_those_of_the_dataset_itself(stored, folder):
    """An Arrow dataset, cut afterwards, gives what TemporalActionDataset gives when it trains, draw for draw."""
    dataset, arrow = stored
    for cuts in ({"max_seq_len": 20, "trunc_thresh": 0.3}, {"max_seq_len": 500, "crop_ratio": (0.4, 0.9)}):
        direct = TemporalActionDataset(
            good_annotations(),
            folder,
            training=True,
            seed=3,
            **cuts,
            **GEOMETRY,
        )
        cropped = CroppedDataset(arrow.with_format("numpy"), **cuts, seed=3)
        assert len(cropped) == 3
        lengths = set()
        for epoch in (0, 1, 1):
            direct.set_epoch(epoch), cropped.set_epoch(epoch)
            for index in (0, 2, 1, 0, -1):
                found, wanted = cropped[index], direct[index]
                wanted["geometry"]["duration"] = found["geometry"]["duration"]  # that of the third is missing here
                assert_same_item(found, wanted)
                lengths.add(len(found["features"]))
        assert (len(lengths) > 3) == ("crop_ratio" in cuts)
    whole = CroppedDataset(arrow.with_format("numpy"))
    assert_same_item(whole[0], dataset[0])


# --- Recordings of sensors ------------------------------------------------------------------------------------------

SENSOR = {"window": 10, "stride": 4, "fps": 20.0}


def draw(augmentation, signal, segments=((2.0, 3.0),), seed=0):
    rng = np.random.default_rng(seed)
    return augmentation(signal, np.array(segments), SENSOR["window"], SENSOR["stride"], SENSOR["fps"], rng)


def test_no_augmentation_changes_nothing():
    signal = features_of(0, length=100)
    found, segments = draw(SensorAugmentation(shift=False), signal)
    np.testing.assert_array_equal(found, signal)
    np.testing.assert_array_equal(segments, [[2.0, 3.0]])


def test_shift_moves_windows_and_segments_together():
    signal, starts = features_of(0, length=100), []
    for seed in range(60):
        found, segments = draw(SensorAugmentation(), signal, seed=seed)
        start = len(signal) - len(found)
        np.testing.assert_array_equal(found, signal[start:])
        np.testing.assert_allclose(segments, [[2.0 - start / 20, 3.0 - start / 20]], rtol=1e-12)
        starts.append(start)
    assert {*starts} == {0, 1, 2, 3}  # all of the stride, and no more
    # Short recordings keep a window.
    assert {len(draw(SensorAugmentation(), signal[:12], seed=seed)[0]) for seed in range(20)} == {11, 12}
    assert len(draw(SensorAugmentation(), signal[:10])[0]) == 10


def test_speed_stretches_signal_and_segments_together():
    time = np.arange(400, dtype=np.float32)
    signal = np.stack([time, np.sin(time / 20)], axis=1)
    factors = []
    for seed in range(40):
        found, segments = draw(SensorAugmentation(speed=0.2, shift=False), signal, seed=seed)
        factor = float(found[1, 0])  # the ramp says which sample each one was
        factors.append(factor)
        places = np.arange(len(found)) * factor
        assert places[-1] <= 399 < places[-1] + 2 * factor  # all of the recording is played
        np.testing.assert_allclose(found[:, 0], places, rtol=1e-6, atol=0)
        # Linear interpolation is off by an eighth of the second derivative.
        np.testing.assert_allclose(found[:, 1], np.sin(places / 20), rtol=0, atol=1 / 8 / 400 + 1e-6)
        np.testing.assert_allclose(segments, [[2.0 / factor, 3.0 / factor]], rtol=1e-6)
        assert found.dtype == np.float32
    assert math.exp(-0.2) <= min(factors) < 0.87
    assert 1.15 < max(factors) <= math.exp(0.2)


@pytest.mark.parametrize("samples", [10, 11, 12, 14])
def test_speed_leaves_a_window(samples):
    signal = np.arange(samples, dtype=np.float32)[:, None]
    for seed in range(50):
        found, segments = draw(SensorAugmentation(speed=0.5), signal, segments=[[0.1, 0.3]], seed=seed)
        assert len(found) >= SENSOR["window"]
        assert found.min() >= 0
        assert found.max() <= samples - 1
        assert np.diff(segments)[0] > 0


class Exactly:
    """A generator that draws what it is told."""

    def __init__(self, value):
        self.value = value

    def uniform(self, low, high):
        return self.value


def test_speed_does_not_step_past_the_end():
    """10 samples in 12 steps of 10 / 12: rounding puts a thirteenth step onto the last sample, which has no next one."""
    for samples in range(11, 100):
        signal = np.arange(samples, dtype=np.float32)[:, None]
        for count in range(samples - 1, samples + 20):
            speed = Exactly(math.log((samples - 1) / count))
            found, _ = SensorAugmentation(speed=0.9, shift=False)(signal, np.zeros((0, 2)), 10, 4, 20.0, speed)
            assert len(found) in (count, count + 1)
            np.testing.assert_allclose(found[:, 0], np.arange(len(found)) * (samples - 1) / count, rtol=1e-5)


def test_rotation_is_the_same_for_all_sensors():
    signal = features_of(0, length=200).astype(np.float64)
    angles = []
    for seed in range(400):
        found, _ = draw(SensorAugmentation(rotation=0.3, shift=False), signal, seed=seed)
        first, second = found[:, :3], found[:, 3:]
        # The rotation that the first sensor shows, by least squares, turns the second one too.
        matrix = np.linalg.lstsq(signal[:, :3], first, rcond=None)[0].T
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), rtol=0, atol=1e-6)  # the matrix is float32
        assert np.linalg.det(matrix) == pytest.approx(1, abs=1e-6)  # no mirror
        np.testing.assert_allclose(second, signal[:, 3:] @ matrix.T, rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(first, axis=1), np.linalg.norm(signal[:, :3], axis=1), rtol=1e-6)
        angles.append(math.acos(min(1.0, (np.trace(matrix) - 1) / 2)))
    # The squared angle is a sum of three squares of normal numbers: 3 * 0.09 on average, give or take 2 * 0.011.
    assert np.mean(np.square(angles)) == pytest.approx(0.27, abs=0.035)
    with pytest.raises(ValueError, match="three axes of each sensor, but the signal has 4 channels"):
        draw(SensorAugmentation(rotation=0.3, shift=False), signal[:, :4])


def test_gain_is_one_factor_a_channel():
    signal = features_of(0, length=100)
    gains = []
    for seed in range(50):
        found, segments = draw(SensorAugmentation(gain=0.2, shift=False), signal, seed=seed)
        ratio = found / signal
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape), rtol=1e-5)
        gains.append(ratio[0])
        np.testing.assert_array_equal(segments, [[2.0, 3.0]])
    assert 0.8 <= np.min(gains) < 0.82
    assert 1.18 < np.max(gains) <= 1.2
    assert np.abs(np.corrcoef(np.array(gains).T) - np.eye(6)).max() < 0.6  # each channel its own


def test_noise_has_its_deviation():
    signal = np.full((20_000, 3), 5.0, np.float32)
    found, _ = draw(SensorAugmentation(noise=0.1, shift=False), signal)
    noise = (found - signal).astype(np.float64)
    # Of 20,000 numbers the mean is off by 0.0007 and the deviation by 0.0005: four times that.
    assert np.abs(noise.mean(axis=0)).max() < 0.003
    np.testing.assert_allclose(noise.std(axis=0), 0.1, rtol=0, atol=0.002)
    assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.03
    assert abs(np.corrcoef(noise[1:, 0], noise[:-1, 0])[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"speed": 1.0}, "speed"),
        ({"gain": -0.1}, "gain"),
        ({"noise": float("nan")}, "noise"),
        ({"rotation": "a"}, "rotation"),
    ],
)
def test_augmentation_out_of_range(settings, name):
    with pytest.raises(ValueError, match=f"{name} is .*; expected a number"):
        SensorAugmentation(**settings)


CODE = (
    10.0  # the length of the vector of each sensor is 10 in class 0, 20 in class 1 and so on, and 0 between segments
)


@st.composite
def coded_recordings(draw_value):
    """A signal that says at each sample which class it is, and its segments (seconds, on whole samples)."""
    rng = np.random.default_rng(draw_value(st.integers(0, 2**32 - 1)))
    lengths = draw_value(st.lists(st.integers(1, 40), min_size=1, max_size=9))
    samples = max(sum(lengths), SENSOR["window"])
    directions = rng.normal(size=(samples, 2, 3))
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    directions = np.repeat(directions[:1], samples, axis=0)  # so that values between two samples are theirs
    strength, segments, labels, start = np.zeros(samples), [], [], 0
    for number, length in enumerate(lengths):
        if number % 2:
            label = int(rng.integers(3))
            strength[start : start + length] = CODE * (label + 1)
            segments.append([start / SENSOR["fps"], (start + length) / SENSOR["fps"]])
            labels.append("abc"[label])
        start += length
    return (directions * strength[:, None, None]).reshape(samples, 6).astype(np.float32), segments, labels


@settings(max_examples=100, deadline=None)
@given(
    recording=coded_recordings(),
    seed=st.integers(0, 1000),
    speed=st.sampled_from([0.0, 0.1, 0.4]),
    shift=st.booleans(),
)
def test_segments_stay_where_their_signal_is(recording, seed, speed, shift):
    signal, segments, labels = recording
    annotations = {
        "labels": ["a", "b", "c"],
        "database": {
            "r": {
                "subset": "training",
                "annotations": [annotation(name, *one) for name, one in zip(labels, segments, strict=True)],
            }
        },
    }
    dataset = SensorDataset(
        {"r": signal},
        annotations,
        **SENSOR,
        training=True,
        augmentation=SensorAugmentation(speed=speed, rotation=0.3, gain=0.03, noise=0.01, shift=shift),
        seed=seed,
    )
    item = dataset[0]
    window, stride, fps = SENSOR["window"], SENSOR["stride"], SENSOR["fps"]
    windows = item["features"].reshape(len(item["features"]), window, 2, 3)
    strength = np.linalg.norm(windows, axis=3).mean(axis=(1, 2))
    assert item["geometry"]["duration"] * fps == pytest.approx(len(windows) * stride + window, abs=stride)
    first = np.arange(len(windows)) * stride  # samples that each window begins and ends with
    outside = np.ones(len(windows), dtype=bool)
    for (start, end), label in zip(item["segments"].astype(float), item["class_labels"], strict=True):
        # From the grid to samples, and one sample less: between two samples, speed mixes them.
        begin, stop = start * stride + window / 2, end * stride + window / 2
        assert -1e-3 <= begin < stop <= item["geometry"]["duration"] * fps + 1e-3
        inside = (first >= begin + 1) & (first + window <= stop - 1)
        # Gain changes a length by 3 % at most, noise by less than 0.1.
        np.testing.assert_allclose(strength[inside], CODE * (label + 1), rtol=0.03, atol=0.1)
        outside &= (first >= stop + 2) | (first + window <= begin - 2)
    # Between segments there is nothing but noise; one that was cut off may leave its rest at either end.
    if len(item["segments"]) == len(segments):
        assert (strength[outside] < 0.1).all()
    else:
        assert shift or speed
        assert len(segments) - len(item["segments"]) <= 2


def sensor_recordings():
    signals = {name: features_of(number, length=100 + 7 * number) for number, name in enumerate("pqr")}
    database = {
        "p": {
            "subset": "training",
            "fps": 20,
            "duration": 5.0,
            "annotations": [annotation("walk", 1.0, 2.0), annotation("run", 3.0, 4.5)],
        },
        "q": {"subset": "training", "fps": 20, "duration": 5.35, "annotations": []},
        "r": {"subset": "validation", "fps": 10, "duration": 11.4, "annotations": [annotation("run", 2.0, 9.0)]},
    }
    return signals | {"unused": np.zeros((3, 2))}, {"labels": ["walk", "run"], "database": database}


def test_sensor_items_by_hand():
    signals, annotations = sensor_recordings()
    dataset = SensorDataset(signals, annotations, window=10, stride=4)
    assert dataset.video_ids == ["p", "q", "r"]
    assert (len(dataset), dataset.feature_size, dataset.id2label) == (3, 60, {0: "walk", 1: "run"})
    item = dataset[0]
    np.testing.assert_array_equal(item["features"], window_features(signals["p"], 10, 4))
    # (1 s * 20 - 5) / 4 = 3.75 and so on
    assert item["segments"].tolist() == [[3.75, 8.75], [13.75, 21.25]]
    assert item["class_labels"].tolist() == [0, 1]
    assert (item["segments"].dtype, item["class_labels"].dtype, item["features"].dtype) == (
        np.float32,
        np.int64,
        np.float32,
    )
    assert item["geometry"] == {"fps": 20.0, "feature_stride": 4, "num_frames": 10, "duration": 5.0}
    assert dataset[1]["segments"].shape == (0, 2)
    assert dataset[-1]["segments"].tolist() == [[3.75, 21.25]]  # 10 samples a second here
    assert SensorDataset(signals, annotations, "validation", window=10, stride=4).video_ids == ["r"]
    assert dataset.ground_truth()["r"]["segments"].tolist() == [[2.0, 9.0]]
    with pytest.raises(IndexError):
        dataset[3]
    # Training without augmentation, or one that does nothing, changes nothing.
    for augmentation in (None, SensorAugmentation(shift=False)):
        training = SensorDataset(signals, annotations, window=10, stride=4, training=True, augmentation=augmentation)
        for index in range(3):
            assert_same_item(training[index] | {"geometry": dataset[index]["geometry"]}, dataset[index])


def test_segments_that_a_shift_cuts_off():
    """At least half of a segment must be left; what is left is clipped to the recording."""
    signal = features_of(0, length=100)
    annotations = {
        "database": {"p": {"subset": "a", "annotations": [annotation("x", 0.0, 0.1), annotation("x", 0.0, 0.2)]}}
    }
    dataset = SensorDataset(
        {"p": signal}, annotations, window=10, stride=4, fps=20.0, training=True, augmentation=SensorAugmentation()
    )
    seen = {}
    for _ in range(40):
        item = dataset[0]
        start = next(at for at in range(4) if np.array_equal(item["features"], window_features(signal[at:], 10, 4)))
        seen[start] = ((item["segments"] * 4 + 5).tolist(), item["geometry"]["duration"])  # in samples
    # Samples 0 to 2, and 0 to 4, after the first 0 to 3 samples are gone.
    assert seen == {
        0: ([[0, 2], [0, 4]], 5.0),
        1: ([[0, 1], [0, 3]], 4.95),
        2: ([[0, 2]], 4.9),
        3: ([], 4.85),
    }


def augmented_sensors(seed=0):
    signals, annotations = sensor_recordings()
    augmentation = SensorAugmentation(speed=0.1, rotation=0.1, gain=0.1, noise=0.1)
    return SensorDataset(
        signals, annotations, window=10, stride=4, training=True, augmentation=augmentation, seed=seed
    )


def test_sensor_training_draws_by_seed_epoch_and_access():
    def values(dataset, count=3):
        return [float(dataset[index]["features"][0, 0]) for _ in range(count) for index in range(3)]

    first, again, other = augmented_sensors(), augmented_sensors(), augmented_sensors(seed=1)
    drawn = values(first)
    assert len({*drawn}) == 9
    assert values(again) == drawn
    assert not {*values(other)} & {*drawn}
    first.set_epoch(1)
    later = values(first)
    assert not {*later} & {*drawn}
    first.set_epoch(0)
    assert values(first) == drawn
    # One recording by itself: what others drew does not matter.
    again.set_epoch(1)
    assert float(again[2]["features"][0, 0]) == later[2]


def test_sensor_workers_draw_as_one_process_does():
    def values(loader):
        return [float(item["features"][0, 0]) for item in loader]

    alone, shared = augmented_sensors(), augmented_sensors()
    expected = [values(alone) for _ in range(2)]
    loader = DataLoader(shared, batch_size=None, num_workers=2)
    assert [values(loader) for _ in range(2)] == expected
    shared.set_epoch(0)
    assert values(loader) == expected[0]


def test_sensor_errors_name_the_recording():
    def make(change=None, **settings):
        signals, annotations = sensor_recordings()
        if change is not None:
            change(signals, annotations["database"])
        return SensorDataset(signals, annotations, **{"window": 10, "stride": 4, **settings})

    def narrow(signals, database):
        signals["q"] = signals["q"][:, :5]

    def flat(signals, database):
        signals["q"] = signals["q"][:, 0]

    def short(signals, database):
        signals["r"] = signals["r"][:9]

    def backwards(signals, database):
        database["p"]["annotations"][1]["segment"] = [3, 2]

    for change, message in (
        (narrow, r"q: the signal has shape \(107, 5\); expected \(samples, 6\)"),
        (flat, r"q: the signal has shape \(107,\)"),
        (short, r"r: the signal has shape \(9, 6\).* one window of 10 samples"),
        (backwards, r"p: the segment \[3\.0, 2\.0\] is not"),
        (lambda signals, database: database["r"].pop("fps"), r"r: its entry says fps None"),
        (lambda signals, database: database["r"].update(annotations=[annotation("fly", 1, 2)]), r"r: .*'fly'"),
    ):
        with pytest.raises(ValueError, match=message):
            make(change)
    with pytest.raises(KeyError, match=r"1 of 3 annotated recordings have no signal: \['q'\]"):
        make(lambda signals, database: signals.pop("q"))
    with pytest.raises(ValueError, match=r"There is no subset \['testing'\]"):
        make(split="testing")
    with pytest.raises(ValueError, match="no recording to read"):
        make(lambda signals, database: database.clear())
    with pytest.raises(ValueError, match=r"r: label2id has no \['run'\]"):
        make(split="validation", label2id={"walk": 0})


# --- SBHAR ----------------------------------------------------------------------------------------------------------


def write_raw_sbhar(folder):
    """Two recordings in the archive's layout: person 3's (training) and person 16's (validation)."""
    raw = folder / "RawData"
    raw.mkdir(parents=True)
    signals = {}
    for number, name in enumerate(("exp05_user03", "exp31_user16")):
        signals[name] = features_of(number, length=300 + number).round(6)
        for kind, columns in (("acc", slice(0, 3)), ("gyro", slice(3, 6))):
            np.savetxt(raw / f"{kind}_{name}.txt", signals[name][:, columns], fmt="%.8f")
    (raw / "labels.txt").write_text("5 3 5 1 100\n5 3 7 101 150\n31 16 12 251 300\n31 16 1 51 250 \n")
    return signals


# Samples count from 1, both ends included: 1 to 100 is 0 s to 2 s at 50 Hz.
SBHAR_SEGMENTS = {
    "exp05_user03": [("STANDING", 4, [0.0, 2.0]), ("STAND_TO_SIT", 6, [2.0, 3.0])],
    "exp31_user16": [("LIE_TO_STAND", 11, [5.0, 6.0]), ("WALKING", 0, [1.0, 5.0])],
}


def assert_is_sbhar(found, signals):
    arrays, annotations = found
    assert {*arrays} == {*annotations["database"]} == {*signals}
    assert annotations["labels"] == SBHAR_LABELS
    for name, signal in signals.items():
        assert arrays[name].dtype == np.float32
        np.testing.assert_array_equal(arrays[name], signal)
        entry = annotations["database"][name]
        rows = [(one["label"], one["label_id"], one["segment"]) for one in entry["annotations"]]
        assert rows == SBHAR_SEGMENTS[name]
        assert (entry["fps"], entry["duration"]) == (50.0, len(signal) / 50)
    entries = annotations["database"]
    assert [(entries[name]["subset"], entries[name]["person"]) for name in signals] == [
        ("training", 3),
        ("validation", 16),
    ]
    assert validate_annotations(annotations) == []


def zip_of(folder, names=None):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for path in sorted(folder.rglob("*.txt")):
            file.write(path, path.relative_to(folder))
        for name, inner in (names or {}).items():
            file.writestr(name, inner)
    return content.getvalue()


def test_sbhar_from_its_text_files_and_from_arrays(tmp_path):
    signals = write_raw_sbhar(tmp_path / "deep" / "down")
    found = load_sbhar(tmp_path)
    assert_is_sbhar(found, signals)
    np.savez(tmp_path / "signals.npz", **found[0])
    (tmp_path / "annotations.json").write_text(json.dumps(found[1]))
    (tmp_path / "deep" / "down" / "RawData" / "labels.txt").unlink()
    assert_is_sbhar(load_sbhar(tmp_path), signals)
    dataset = SensorDataset(*load_sbhar(tmp_path), "training", window=50, stride=25)
    assert (dataset.video_ids, dataset.feature_size, len(dataset.id2label)) == (["exp05_user03"], 300, 12)


def test_sbhar_files_that_are_not_its_own(tmp_path):
    write_raw_sbhar(tmp_path)
    raw = tmp_path / "RawData"
    for rows, message in (
        ("5 3 5 1", "must have rows of five"),
        ("5 3 13 1 9", "activity 1 to 12"),
        ("5 31 1 1 9", r"people \[31\]"),
    ):
        (raw / "labels.txt").write_text(rows)
        with pytest.raises(ValueError, match=message):
            load_sbhar(tmp_path)
    (raw / "labels.txt").write_text("5 3 5 1 100")
    np.savetxt(raw / "gyro_exp05_user03.txt", np.zeros((299, 3)))
    with pytest.raises(ValueError, match="exp05_user03: expected two files of three columns"):
        load_sbhar(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no SBHAR recordings.*download=True"):
        load_sbhar(tmp_path / "nowhere")


@pytest.mark.parametrize("wrapped", [False, True])
def test_sbhar_download(tmp_path, monkeypatch, wrapped):
    signals = write_raw_sbhar(tmp_path / "source")
    content = zip_of(tmp_path / "source")
    if wrapped:  # as the archive does with some of its files
        (tmp_path / "empty").mkdir()
        content = zip_of(tmp_path / "empty", {"data.zip": content})
    (tmp_path / "archive.zip").write_bytes(content)
    monkeypatch.setattr(data_module, "SBHAR_URL", (tmp_path / "archive.zip").as_uri())
    assert_is_sbhar(load_sbhar(tmp_path / "new" / "folder", download=True), signals)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["annotations.json", "signals.npz"]
    (tmp_path / "archive.zip").unlink()  # the next time it is not needed
    assert_is_sbhar(load_sbhar(tmp_path / "new" / "folder", download=True), signals)


class Broken(io.BytesIO):
    """An answer of a server that sends half of what it promised, and hangs up or fails."""

    def __init__(self, content, fails):
        super().__init__(content[: len(content) // 2])
        self.headers, self.fails = {"Content-Length": str(len(content))}, fails

    def read(self, *size):
        chunk = super().read(*size)
        if not chunk and self.fails:
            raise ConnectionResetError("reset by peer")
        return chunk


def test_sbhar_download_that_breaks_leaves_nothing(tmp_path, monkeypatch):
    write_raw_sbhar(tmp_path / "source")
    content, target = zip_of(tmp_path / "source"), tmp_path / "target"
    for answer, error, message in (
        (lambda url: Broken(content, fails=True), OSError, "reset by peer"),
        (lambda url: Broken(content, fails=False), OSError, "broke off after"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(data_module.urllib.request, "urlopen", answer)
            with pytest.raises(error, match=message):
                load_sbhar(target, download=True)
        assert not [*target.iterdir()]
    other = tmp_path / "other"
    other.mkdir()
    for archive, message in (
        (b"<html>moved</html>", "is no zip archive"),
        (zip_of(other, {"readme.md": "moved"}), r"holds no RawData/labels\.txt"),
    ):
        (tmp_path / "archive.zip").write_bytes(archive)
        monkeypatch.setattr(data_module, "SBHAR_URL", (tmp_path / "archive.zip").as_uri())
        with pytest.raises(ValueError, match=message):
            load_sbhar(target, download=True)
        assert not [*target.iterdir()]
    monkeypatch.setattr(data_module, "SBHAR_URL", (tmp_path / "nowhere.zip").as_uri())
    with pytest.raises(OSError, match="nowhere"):
        load_sbhar(target, download=True)
    assert not [*target.iterdir()]


# --- Choosing a pyramid ---------------------------------------------------------------------------------------------


def made_annotations(lengths, fps=30.0, duration=None, seed=0):
    """Segments of these lengths (seconds), one after the other with pauses, ten a video."""
    rng, database = np.random.default_rng(seed), {}
    for first in range(0, len(lengths), 10):
        start, own = 0.0, []
        for length in lengths[first : first + 10]:
            start += rng.uniform(0.1, 3.0)
            own.append(annotation(f"class{int(rng.integers(4))}", start, start + length))
            start += length
        database[f"v{first}"] = {"subset": "training", "fps": fps, "annotations": own}
        if duration is None:
            database[f"v{first}"]["duration"] = start + 5.0
    labels = [f"class{number}" for number in range(4)]
    return {"labels": labels, "database": database}


def brute_force(annotations, fields, stride, num_frames):
    """For each segment and level the number of points that may learn it, point by point."""
    levels = len(fields["regression_range"])
    rows = []
    for entry in annotations["database"].values():
        grid = [
            [(value * entry["fps"] - num_frames / 2) / stride for value in one["segment"]]
            for one in entry["annotations"]
        ]
        end = entry["duration"] * entry["fps"] / stride if "duration" in entry else max(one[1] for one in grid)
        for start, stop in grid:
            row = [0] * levels
            for level, (shortest, longest) in enumerate(fields["regression_range"]):
                for point in range(0, math.ceil(end), 2**level):
                    near = abs(point - (start + stop) / 2) < 1.5 * 2**level
                    farther = max(point - start, stop - point)
                    row[level] += start < point < stop and near and shortest <= farther <= longest
            rows.append(row)
    return np.array(rows)


THUMOS = {"stride": 4, "num_frames": 16}


@pytest.mark.parametrize(
    ("lengths", "geometry", "duration", "levels"),
    [
        # 4 s of 7.5 features a second: 99 of 100 segments reach less than 4 * 2**3 features.
        (np.random.default_rng(1).gamma(2.0, 2.0, 60).clip(0.4, 8.0), THUMOS, None, 4),
        (np.random.default_rng(2).uniform(60, 240, 30), THUMOS, None, 9),  # minutes: 900 features of reach
        (np.random.default_rng(3).uniform(0.02, 0.3, 30), THUMOS, None, 2),  # some shorter than a feature
        (np.random.default_rng(4).uniform(1, 10, 20), {"stride": 25}, "none", 2),
    ],
    ids=["thumos", "long", "short", "no_duration"],
)
def test_suggested_pyramid_against_brute_force(lengths, geometry, duration, levels, capsys):
    annotations = made_annotations(list(lengths), duration=duration)
    fields = suggest_config(annotations, **geometry)
    printed = capsys.readouterr().out
    stride, num_frames = geometry["stride"], geometry.get("num_frames", geometry["stride"])
    reach = np.quantile(lengths, 0.99) * 30 / stride / 2
    assert reach <= 4 * 2 ** (levels - 1)
    assert levels == 2 or reach > 4 * 2 ** (levels - 2)
    assert fields["arch"] == [2, 2, levels - 1]
    assert fields["num_labels"] == 4
    bounds = [0, *(4 * 2**level for level in range(levels - 1)), 10000]
    assert fields["regression_range"] == [list(pair) for pair in pairwise(bounds)]

    wanted = brute_force(annotations, fields, stride, num_frames)
    table = [line for line in printed.splitlines() if "%" in line and "[" in line]
    assert len(table) == levels
    for level, line in enumerate(table):
        own = wanted[:, level]
        share, each = (own > 0).mean(), own[own > 0].mean() if (own > 0).any() else 0.0
        assert line.split()[:2] == [str(level), str(2**level)]
        assert line.split()[-2:] == [f"{share:.1%}", f"{each:.1f}"]
    nothing, short = int((wanted.sum(axis=1) == 0).sum()), int((lengths * 30 / stride < 1).sum())
    assert f"{nothing} of {len(lengths)} segments teach nothing" in printed
    assert (f"{short} are shorter than one feature" in printed) == (short > 0)
    assert f"{len(lengths)} segments of 4 classes in {len(annotations['database'])} recordings" in printed

    # The model that these fields make counts the same points. (Segments do not overlap.)
    config = ConvTransformerConfig(**fields, n_in=3, n_embd=8, n_head=2, head_dim=8)
    model = ConvTransformerForTemporalActionLocalization(config)
    count = 0
    for entry in annotations["database"].values():
        grid = np.array([one["segment"] for one in entry["annotations"]]) * 30 / stride - num_frames / stride / 2
        end = entry["duration"] * 30 / stride if "duration" in entry else grid.max()
        labels = [{"segments": grid.tolist(), "class_labels": [0] * len(grid)}]
        count += int(model.count_positives(torch.zeros(1, math.ceil(end), 3), None, labels))
    assert count == wanted.sum()


def test_suggestions_by_split_and_length(capsys):
    annotations = made_annotations([5.0] * 20)
    annotations["database"]["v10"]["subset"] = "testing"
    for one in annotations["database"]["v10"]["annotations"]:
        one["segment"][1] = one["segment"][0] + 0.05
    short = suggest_config(annotations, stride=4, split="testing")
    long = suggest_config(annotations, stride=4, split=["training"], embedding_and_stem=(1, 3))
    assert short["arch"] == [2, 2, 1]
    assert long["arch"] == [1, 3, 3]  # 18.75 features of reach: 4 * 2**3 and no less
    of_short, of_long = capsys.readouterr().out.split("model:")[:2]
    assert "10 are shorter than one feature" in of_short
    assert "0 of 10 segments teach nothing." in of_long
    for seconds, wanted in ((5, 64), (60, 512), (10_000, 2304)):  # at 7.5 features a second
        annotations["database"]["v0"]["duration"] = annotations["database"]["v10"]["duration"] = float(seconds)
        assert suggest_config(annotations, stride=4)["max_len"] == wanted


def test_suggestions_from_a_file_and_errors(tmp_path, capsys):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(made_annotations([5.0] * 5)))
    fields = suggest_config(path, fps=60, stride=4)
    printed = capsys.readouterr().out
    assert "15 features a second" in printed
    assert f"regression_range: {fields['regression_range']}" in printed
    mixed = made_annotations([5.0] * 20)
    mixed["database"]["v0"]["fps"] = 25.0
    suggest_config(mixed, stride=4)
    assert "several rates" in capsys.readouterr().out

    annotations = made_annotations([5.0] * 5)
    for change, options, message in (
        (lambda e: e.update(annotations=[]), {}, "no annotated segment to look at"),
        (lambda e: None, {"split": "testing"}, r"There is no subset \['testing'\]"),
        (lambda e: None, {"stride": 0}, "stride must be a number of frames > 0"),
        (lambda e: e.pop("fps"), {}, "v0: its entry says fps None"),
        (lambda e: e["annotations"][0].update(segment=[3, 2]), {}, "v0: the segment"),
    ):
        changed = copy.deepcopy(annotations)
        change(changed["database"]["v0"])
        with pytest.raises(ValueError, match=message):
            suggest_config(changed, **options)
    with pytest.raises(ValueError, match="must hold"):
        suggest_config({})
