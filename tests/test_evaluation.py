"""The metrics against the official ActionFormer evaluation's numbers and against a slow brute force."""

import json
import warnings
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_convtransformer.evaluation import (
    FATES,
    KINDS,
    evaluate_detections,
    evaluate_moments,
    precision_recall,
    profile_errors,
    remove_duplicates,
)

GOLDEN = json.loads((Path(__file__).parent / "fixtures" / "v1_map.json").read_text())
UNKNOWN_VIDEO = "ignore:.*videos that the ground truth lacks"

# Same algorithm in float64, other order of summation: a few rounding errors of 1e-16 each.
EXACT = {"rtol": 0, "atol": 1e-12}


def only_classes(predictions, classes):
    """The predictions whose class is one of `classes`."""
    kept = {}
    for video, entry in predictions.items():
        rows = [row for row, label in enumerate(entry["labels"]) if label in classes]
        kept[video] = {key: [values[row] for row in rows] for key, values in entry.items()}
    return kept


# --- The official evaluation's numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("golden", "classes", "tious"),
    [
        ("main", {0, 2, 3, 5}, (0.3, 0.4, 0.5, 0.6, 0.7)),
        ("main_default_tiou", {0, 2, 3, 5}, np.linspace(0.1, 0.5, 5)),
        ("missing", {0, 2, 3}, (0.3, 0.4, 0.5, 0.6, 0.7)),
        # The official code counts predictions of class 1, which the ground truth lacks, for class 2. Here they are
        # ignored, so that all predictions together give the numbers of "main".
        ("main", {0, 1, 2, 3, 4, 5}, (0.3, 0.4, 0.5, 0.6, 0.7)),
    ],
    ids=["main", "default_tiou", "missing_class", "stray_classes"],
)
@pytest.mark.filterwarnings(UNKNOWN_VIDEO)
def test_equals_official_numbers(golden, classes, tious):
    expected = GOLDEN[golden]
    metrics = evaluate_detections(only_classes(GOLDEN["predictions"], classes), GOLDEN["ground_truth"], tious)

    assert metrics.classes.tolist() == [0, 2, 3, 5]
    # 1e-9: both sides are float64; anything above a few 1e-16 would be another match, which moves AP by 1e-3 or more.
    np.testing.assert_allclose(metrics.ap, expected["ap_per_class"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(metrics.map, expected["mAP"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(metrics.average_map, expected["average_mAP"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(metrics.recall, expected["recall"], rtol=0, atol=1e-9)


@pytest.mark.filterwarnings(UNKNOWN_VIDEO)
def test_stray_classes_do_not_lower_average_precision():
    metrics = evaluate_detections(GOLDEN["predictions"], GOLDEN["ground_truth"])
    # The official code's number for the same predictions is lower by 0.019.
    assert metrics.average_map - GOLDEN["stray"]["average_mAP"] == pytest.approx(0.0191429, abs=1e-6)
    assert metrics.num_unknown_classes == 25


@pytest.mark.filterwarnings(UNKNOWN_VIDEO)
def test_counts():
    metrics = evaluate_detections(GOLDEN["predictions"], GOLDEN["ground_truth"])
    assert metrics.num_predictions == 180
    assert metrics.num_unknown_videos == len(GOLDEN["predictions"]["v5"]["labels"])
    # 5 videos of 8 truths; each has one that is too short and one duplicate.
    assert metrics.num_ground_truth == 30
    raw = evaluate_detections(GOLDEN["predictions"], GOLDEN["ground_truth"], deduplicate=False)
    assert raw.num_ground_truth == 40
    assert raw.average_map < metrics.average_map


# --- Brute force ----------------------------------------------------------------------------------------------------


def slow_tiou(a, b):
    overlap = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = (b[1] - b[0]) + (a[1] - a[0]) - overlap
    return overlap / union if union > 0 else 0.0


def slow_remove_duplicates(segments, labels, tolerance=1e-3):
    kept = []
    for (start, end), label in zip(segments, labels, strict=True):
        repeats = any(
            label == other and abs(start - s) <= tolerance and abs(end - e) <= tolerance for (s, e), other in kept
        )
        if end - start >= tolerance and not repeats:
            kept.append(((start, end), label))
    return [segment for segment, _ in kept], [label for _, label in kept]


def slow_evaluation(predictions, ground_truth, tious, top_k):
    """AP (T, C) and recall (T, K, C), one prediction at a time, straight from the protocol's words."""
    truths = {}
    for video, entry in ground_truth.items():
        for segment, label in zip(*slow_remove_duplicates(entry["segments"], entry["labels"]), strict=True):
            truths.setdefault((video, label), []).append(segment)
    classes = sorted({label for _, label in truths})

    ap = np.zeros((len(tious), len(classes)))
    recall = np.zeros((len(tious), len(top_k), len(classes)))
    for column, wanted in enumerate(classes):
        num_truths = sum(len(segments) for (_, label), segments in truths.items() if label == wanted)
        ranked = [
            (score, video, segment)
            for video, entry in predictions.items()
            for segment, label, score in zip(entry["segments"], entry["labels"], entry["scores"], strict=True)
            if label == wanted
        ]
        ranked.sort(key=lambda row: -row[0])  # stable: equal scores stay in the order given

        for level, tiou in enumerate(tious):
            taken, correct = set(), []
            for _, video, segment in ranked:
                candidates = [
                    (slow_tiou(segment, truth), -index)
                    for index, truth in enumerate(truths.get((video, wanted), []))
                    if (video, index) not in taken and slow_tiou(segment, truth) >= tiou
                ]
                if candidates:
                    taken.add((video, -max(candidates)[1]))
                correct.append(bool(candidates))
            found = np.cumsum(correct)
            for step in range(1, num_truths + 1):  # the recall step from (step - 1) / num_truths to step / num_truths
                precisions = [found[i] / (i + 1) for i in range(len(correct)) if found[i] >= step]
                ap[level, column] += max(precisions, default=0.0) / num_truths

            for row, k in enumerate(top_k):
                met = 0
                for (video, label), segments in truths.items():
                    if label == wanted:
                        best = [s for _, v, s in ranked if v == video][: k * len(segments)]
                        met += sum(any(slow_tiou(s, truth) >= tiou for s in best) for truth in segments)
                recall[level, row, column] = met / num_truths
    return np.array(classes), ap, recall


def videos(names, num_classes, max_segments, min_size, with_scores):
    """Hypothesis: a dictionary of videos on a coarse grid of times and scores, so that ties and exact hits occur."""
    time = st.integers(0, 12).map(lambda step: step / 2)
    segment = st.tuples(time, time).map(sorted)
    row = st.tuples(segment, st.integers(0, num_classes - 1), st.integers(0, 9).map(lambda step: step / 10))

    def to_entry(rows):
        entry = {"segments": [r[0] for r in rows], "labels": [r[1] for r in rows]}
        return entry | {"scores": [r[2] for r in rows]} if with_scores else entry

    entry = st.lists(row, max_size=max_segments).map(to_entry)
    return st.dictionaries(st.sampled_from(names), entry, min_size=min_size)


def has_truth(ground_truth):
    return any(end > start for entry in ground_truth.values() for start, end in entry["segments"])


some_predictions = videos("abcde", num_classes=4, max_segments=8, min_size=0, with_scores=True)
some_truth = videos("abcd", num_classes=3, max_segments=9, min_size=1, with_scores=False).filter(has_truth)
some_tious = st.lists(st.sampled_from([0.1, 0.25, 0.3, 1 / 3, 0.5, 0.7, 1.0]), min_size=1, max_size=4, unique=True)


@given(some_predictions, some_truth, some_tious, st.lists(st.integers(1, 5), min_size=1, max_size=3, unique=True))
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_equals_brute_force(predictions, ground_truth, tious, top_k):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*videos that the ground truth lacks")
        metrics = evaluate_detections(predictions, ground_truth, tious, top_k)
    classes, ap, recall = slow_evaluation(predictions, ground_truth, tious, top_k)

    np.testing.assert_array_equal(metrics.classes, classes)
    np.testing.assert_allclose(metrics.ap, ap, **EXACT)
    np.testing.assert_allclose(metrics.map, ap.mean(axis=1), **EXACT)
    np.testing.assert_allclose(metrics.average_map, ap.mean(), **EXACT)
    np.testing.assert_allclose(metrics.recall_per_class, recall, **EXACT)
    np.testing.assert_allclose(metrics.recall, recall.mean(axis=2), **EXACT)


def random_detections(num_videos=12, max_truths=40, max_predictions=60, num_classes=3, seed=0):
    """Noisy copies of random truths with distinct scores; the sizes of the videos differ widely."""
    rng = np.random.default_rng(seed)
    predictions, ground_truth = {}, {}
    for index in range(num_videos):
        n, m = rng.integers(1, max_predictions), rng.integers(1, max_truths)
        starts = rng.uniform(0, 100, m)
        segments = np.stack([starts, starts + rng.uniform(1, 15, m)], axis=1)
        labels = rng.integers(0, num_classes, m)
        source = rng.integers(0, m, n)
        ground_truth[f"video{index}"] = {"segments": segments, "labels": labels}
        predictions[f"video{index}"] = {
            "segments": np.sort(segments[source] + rng.normal(0, 1.5, (n, 2)), axis=1),
            "labels": np.where(rng.random(n) < 0.8, labels[source], rng.integers(0, num_classes, n)),
            "scores": rng.random(n),
        }
    return predictions, ground_truth


def test_equals_brute_force_with_cells_of_many_sizes():
    predictions, ground_truth = random_detections()
    tious, top_k = (0.3, 0.5, 0.7), (1, 2, 5)
    metrics = evaluate_detections(predictions, ground_truth, tious, top_k)
    _, ap, recall = slow_evaluation(predictions, ground_truth, tious, top_k)
    assert 0.05 < metrics.average_map < 0.95  # the case is neither trivial nor hopeless
    np.testing.assert_allclose(metrics.ap, ap, **EXACT)
    np.testing.assert_allclose(metrics.recall_per_class, recall, **EXACT)


# --- Properties -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 0.5, 7.0]))
@settings(deadline=None, max_examples=30)
def test_invariances(seed, factor):
    predictions, ground_truth = random_detections(num_videos=4, max_truths=8, max_predictions=20, seed=seed)
    expected = evaluate_detections(predictions, ground_truth)
    rng = np.random.default_rng(seed)

    scaled = {video: entry | {"scores": entry["scores"] * factor} for video, entry in predictions.items()}
    reversed_videos = dict(reversed(predictions.items()))
    reversed_truth = dict(reversed(ground_truth.items()))
    shuffled = {}
    for video, entry in predictions.items():
        order = rng.permutation(len(entry["scores"]))
        shuffled[video] = {key: values[order] for key, values in entry.items()}

    for case in [(scaled, ground_truth), (reversed_videos, ground_truth), (predictions, reversed_truth)]:
        metrics = evaluate_detections(*case)
        np.testing.assert_array_equal(metrics.ap, expected.ap)
        np.testing.assert_array_equal(metrics.recall_per_class, expected.recall_per_class)
    metrics = evaluate_detections(shuffled, ground_truth)
    np.testing.assert_array_equal(metrics.ap, expected.ap)
    np.testing.assert_array_equal(metrics.recall_per_class, expected.recall_per_class)


def test_perfect_predictions_give_one():
    _, ground_truth = random_detections()
    perfect = {video: entry | {"scores": np.ones(len(entry["labels"]))} for video, entry in ground_truth.items()}
    metrics = evaluate_detections(perfect, ground_truth, (0.1, 0.5, 1.0))
    np.testing.assert_allclose(metrics.ap, 1.0, **EXACT)
    np.testing.assert_array_equal(metrics.recall, np.ones((3, 2)))


@pytest.mark.parametrize(
    "predictions",
    [
        {},
        {"a": {"segments": [], "labels": [], "scores": []}},
        {"a": {"segments": [[0, 1]], "labels": [9], "scores": [1]}},
    ],
    ids=["no_video", "no_segment", "other_class"],
)
def test_empty_predictions_give_zero(predictions):
    truth = {"a": {"segments": [[0, 1]], "labels": [0]}, "b": {"segments": [[0, 1]], "labels": [3]}}
    metrics = evaluate_detections(predictions, truth)
    assert metrics.average_map == 0.0
    np.testing.assert_array_equal(metrics.ap, np.zeros((5, 2)))
    np.testing.assert_array_equal(metrics.recall, np.zeros((5, 2)))


def test_worked_example():
    """By hand: truths [0, 10] and [20, 30]; a hit, a repeat of it (false), and a hit on the second one."""
    truth = {"a": {"segments": [[0, 10], [20, 30]], "labels": [0, 0]}}
    predictions = {"a": {"segments": [[0, 8], [0, 10], [20, 25]], "labels": [0, 0, 0], "scores": [0.9, 0.8, 0.7]}}
    metrics = evaluate_detections(predictions, truth, (0.5, 0.6), top_k=(1, 2))
    # tIoU 0.5: hit, miss, hit: 1/2 * 1 + 1/2 * 2/3. tIoU 0.6: hit, miss, miss: 1/2 * 1.
    np.testing.assert_allclose(metrics.map, [5 / 6, 1 / 2], **EXACT)
    # 1x keeps the two best, which both lie on the first truth; 2x keeps all.
    np.testing.assert_array_equal(metrics.recall, [[0.5, 1.0], [0.5, 0.5]])


def test_falls_back_on_the_next_best_truth():
    """Both predictions like the first truth best; the second one still meets the threshold with the other truth."""
    truth = {"a": {"segments": [[0, 10], [2, 12]], "labels": [0, 0]}}
    predictions = {"a": {"segments": [[0, 10], [0, 10]], "labels": [0, 0], "scores": [0.9, 0.8]}}
    metrics = evaluate_detections(predictions, truth, (0.6, 0.7))  # tIoU with the other truth: 8 / 12
    np.testing.assert_allclose(metrics.map, [1.0, 0.5], **EXACT)


def test_equal_scores_count_in_the_order_given():
    truth = {"a": {"segments": [[0, 10]], "labels": [0]}, "b": {"segments": [], "labels": []}}
    hit = {"segments": [[0, 10]], "labels": [0], "scores": [0.5]}
    assert evaluate_detections({"a": hit, "b": hit}, truth).average_map == 1.0
    assert evaluate_detections({"b": hit, "a": hit}, truth).average_map == 0.5


def test_of_equal_tious_the_first_truth_is_taken():
    """The best prediction fits both truths alike; taking the first leaves the second to the other prediction."""
    predictions = {"a": {"segments": [[5, 15], [12, 20]], "labels": [0, 0], "scores": [0.9, 0.8]}}
    first_low = {"a": {"segments": [[0, 10], [10, 20]], "labels": [0, 0]}}
    first_high = {"a": {"segments": [[10, 20], [0, 10]], "labels": [0, 0]}}
    np.testing.assert_allclose(evaluate_detections(predictions, first_low, 0.3).map, [1.0], **EXACT)
    np.testing.assert_allclose(evaluate_detections(predictions, first_high, 0.3).map, [0.5], **EXACT)


def test_segments_without_length():
    """A point has tIoU 0 with everything, itself included; nothing is divided by zero."""
    truth = {"a": {"segments": [[5, 5], [6, 8]], "labels": [0, 0]}}
    predictions = {"a": {"segments": [[5, 5], [6, 8]], "labels": [0, 0], "scores": [0.9, 0.8]}}
    metrics = evaluate_detections(predictions, truth, 0.5, deduplicate=False)
    np.testing.assert_allclose(metrics.map, [0.25], **EXACT)  # one of two truths, at precision 1 / 2
    np.testing.assert_allclose(evaluate_detections(predictions, truth, 0.5).map, [0.5], **EXACT)


def test_accepts_tensors_and_lists():
    torch = pytest.importorskip("torch")
    predictions, ground_truth = random_detections(num_videos=3)
    expected = evaluate_detections(predictions, ground_truth)
    for convert in (torch.from_numpy, np.ndarray.tolist):
        converted = [
            {video: {key: convert(values) for key, values in entry.items()} for video, entry in given.items()}
            for given in (predictions, ground_truth)
        ]
        np.testing.assert_array_equal(evaluate_detections(*converted).ap, expected.ap)


# --- Unknown and empty videos ---------------------------------------------------------------------------------------


def one_hit(label=0, score=0.5):
    return {"segments": [[0, 10]], "labels": [label], "scores": [score]}


def test_unknown_videos_warn_and_are_false_positives():
    truth = {"a": {"segments": [[0, 10]], "labels": [0]}}
    predictions = {"a": one_hit(), "w": one_hit(score=0.9), "x": one_hit(score=0.8), "y": one_hit(score=0.7)}
    with pytest.warns(UserWarning, match=r"3 predictions fell on 3 videos .*\('w', 'x', 'y'\)"):
        metrics = evaluate_detections(predictions, truth)
    assert metrics.num_unknown_videos == 3
    np.testing.assert_allclose(metrics.map, 1 / 4, **EXACT)  # the hit comes fourth

    predictions["z"] = {key: values * 2 for key, values in one_hit(score=0.1).items()}
    with pytest.warns(UserWarning, match=r"5 predictions fell on 4 videos .*\('w', 'x', 'y', \.\.\.\)"):
        assert evaluate_detections(predictions, truth).num_unknown_videos == 5


def test_video_without_truth_is_known():
    truth = {"a": {"segments": [[0, 10]], "labels": [0]}, "b": {"segments": np.empty((0, 2)), "labels": []}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = evaluate_detections({"a": one_hit(), "b": one_hit(score=0.9)}, truth)
        # An unknown video on which nothing was predicted does not matter.
        evaluate_detections({"a": one_hit(), "c": {"segments": [], "labels": [], "scores": []}}, truth)
    assert metrics.num_unknown_videos == 0
    np.testing.assert_allclose(metrics.map, 1 / 2, **EXACT)


# --- The result -----------------------------------------------------------------------------------------------------


def test_to_dict_is_flat_and_json_ready():
    truth = {"a": {"segments": [[0, 10], [20, 30]], "labels": [0, 0]}}
    metrics = evaluate_detections({"a": one_hit()}, truth, (0.3, 0.55), top_k=(1, 5))
    expected = {
        "map": 0.5,
        "map_30": 0.5,
        "map_55": 0.5,
        "recall_1x_30": 0.5,
        "recall_1x_55": 0.5,
        "recall_5x_30": 0.5,
        "recall_5x_55": 0.5,
    }
    assert json.loads(json.dumps(metrics.to_dict())) == expected


def test_prints_a_table():
    truth = {"a": {"segments": [[0, 10], [20, 30]], "labels": [0, 0]}}
    metrics = evaluate_detections({"a": one_hit()}, truth, 0.5, top_k=1)
    assert str(metrics).splitlines() == [
        "     tIoU        mAP  recall@1x",
        "      0.5     50.00%     50.00%",
        "     mean     50.00%     50.00%",
        "1 classes, 2 truths, 1 predictions (0 on unknown videos, 0 of unknown classes)",
    ]


def test_is_frozen():
    metrics = evaluate_detections({"a": one_hit()}, {"a": {"segments": [[0, 10]], "labels": [0]}})
    with pytest.raises(FrozenInstanceError):
        metrics.average_map = 1.0


# --- remove_duplicates ----------------------------------------------------------------------------------------------


def test_remove_duplicates():
    segments = np.array([[5.0, 9.0], [0.0, 4.0], [5.0005, 9.0], [5.0, 9.0], [5.0, 9.1], [2.0, 2.0005], [0.0, 4.0]])
    labels = np.array([1, 1, 1, 2, 1, 1, 1])
    kept_segments, kept_labels = remove_duplicates(segments, labels)
    np.testing.assert_array_equal(kept_segments, segments[[0, 1, 3, 4]])
    np.testing.assert_array_equal(kept_labels, [1, 1, 2, 1])


def test_remove_duplicates_compares_with_kept_truths_only():
    """The second repeats the first; the third repeats only the second, which is gone."""
    segments, labels = remove_duplicates([[0.0, 4.0], [0.5, 4.5], [1.0, 5.0]], [0, 0, 0], tolerance=0.6)
    np.testing.assert_array_equal(segments, [[0.0, 4.0], [1.0, 5.0]])
    np.testing.assert_array_equal(labels, [0, 0])


@given(
    st.lists(
        st.tuples(st.tuples(st.integers(0, 6), st.integers(0, 6)).map(sorted), st.integers(0, 1)),
        min_size=1,
        max_size=12,
    )
)
@settings(deadline=None)
def test_remove_duplicates_equals_brute_force(rows):
    segments, labels = [row[0] for row in rows], [row[1] for row in rows]
    expected_segments, expected_labels = slow_remove_duplicates(segments, labels, tolerance=1)
    kept_segments, kept_labels = remove_duplicates(segments, labels, tolerance=1)
    assert kept_segments.tolist() == [list(segment) for segment in expected_segments]
    assert kept_labels.tolist() == expected_labels


def test_remove_duplicates_of_nothing():
    segments, labels = remove_duplicates([], [])
    assert segments.shape == (0, 2)
    assert labels.shape == (0,)


def test_remove_duplicates_refuses_wrong_shapes():
    with pytest.raises(ValueError, match=r"segments \(M, 2\) and labels \(M,\), but found \(1, 2\) and \(2,\)"):
        remove_duplicates([[0, 1]], [0, 1])


# --- Errors ---------------------------------------------------------------------------------------------------------

TRUTH = {"v": {"segments": [[0.0, 1.0]], "labels": [0]}}


def predicted(**changes):
    return {"ok": one_hit(), "v": {"segments": [[0, 1], [2, 3]], "labels": [0, 0], "scores": [0.5, 0.4]} | changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segments": [[0, 1, 2], [2, 3, 4]]}, r"predictions\['v'\] has the shapes segments \(2, 3\)"),
        ({"segments": [[0, 1]]}, r"predictions\['v'\].*segments \(1, 2\), labels \(2,\)"),
        ({"labels": [0]}, r"predictions\['v'\].*labels \(1,\)"),
        ({"labels": [[0], [0]]}, r"predictions\['v'\].*labels \(2, 1\)"),
        ({"scores": [0.5]}, r"predictions\['v'\].*scores \(1,\)"),
        ({"segments": [], "labels": []}, r"predictions\['v'\].*scores \(2,\)"),
        ({"segments": [[0, 1], [2]]}, r"predictions\['v'\] does not hold arrays of numbers"),
        ({"scores": ["high", "low"]}, r"predictions\['v'\] does not hold arrays of numbers"),
        ({"segments": [[0, 1], [2, np.nan]]}, r"predictions\['v'\], index 1: .*finite.* found \[2.0, nan\]"),
        ({"segments": [[0, 1], [2, np.inf]]}, r"predictions\['v'\], index 1: .*finite.* found \[2.0, inf\]"),
        ({"segments": [[0, 1], [3, 2]]}, r"predictions\['v'\], index 1: .*end >= start, but found \[3.0, 2.0\]"),
        ({"scores": [0.5, np.nan]}, r"predictions\['v'\], index 1: scores.* found nan"),
        ({"labels": [0, -1]}, r"predictions\['v'\], index 1: labels.* found -1"),
        ({"labels": [0.0, 1.5]}, r"predictions\['v'\] has labels of type float64"),
        ({"labels": ["run", "walk"]}, r"predictions\['v'\] has labels of type <U4"),
    ],
)
def test_refuses_bad_predictions(changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate_detections(predicted(**changes), TRUTH)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"segments": [[0, 1]], "labels": [0, 1]}, r"ground_truth\['v'\] has the shapes segments \(1, 2\)"),
        ({"segments": [[np.nan, 1]], "labels": [0]}, r"ground_truth\['v'\], index 0: segments"),
        ({"segments": [[1, 0]], "labels": [0]}, r"ground_truth\['v'\], index 0: .*end >= start"),
        ({"segments": [[0, 1]], "labels": [-3]}, r"ground_truth\['v'\], index 0: labels"),
        ({"segments": [[0, 1]], "labels": [0.5]}, r"ground_truth\['v'\] has labels of type float64"),
        ({"segments": [[0, 1]]}, r"ground_truth\['v'\] must be .* keys \['segments', 'labels'\].*\['segments'\]"),
        ([[0, 1]], r"ground_truth\['v'\] must be .* has a list"),
    ],
)
def test_refuses_bad_ground_truth(entry, message):
    with pytest.raises(ValueError, match=message):
        evaluate_detections({}, {"v": entry})


def test_missing_scores_are_named():
    with pytest.raises(ValueError, match=r"predictions\['v'\] must be .* has \['labels', 'segments'\]"):
        evaluate_detections(TRUTH, TRUTH)


def test_refuses_a_list_of_videos():
    with pytest.raises(
        ValueError, match="predictions must be a dictionary with one entry per video id, but is a list"
    ):
        evaluate_detections([one_hit()], TRUTH)


@pytest.mark.parametrize(
    "ground_truth",
    [{}, {"v": {"segments": [], "labels": []}}, {"v": {"segments": [[2, 2.0001]], "labels": [0]}}],
    ids=["no_video", "no_segment", "too_short"],
)
def test_refuses_no_ground_truth(ground_truth):
    with pytest.raises(ValueError, match=f"ground_truth has {len(ground_truth)} videos and no segment of at least"):
        evaluate_detections({"v": one_hit()}, ground_truth)


@pytest.mark.parametrize("tious", [0.0, -0.1, 1.01, np.nan, (0.5, 1.5), (), 50])
def test_refuses_bad_thresholds(tious):
    with pytest.raises(ValueError, match=r"tiou_thresholds must be one or more numbers in \(0, 1\]"):
        evaluate_detections({"v": one_hit()}, TRUTH, tious)


@pytest.mark.parametrize("top_k", [0, -1, 1.5, (), (1, 0), True])
def test_refuses_bad_top_k(top_k):
    with pytest.raises(ValueError, match="top_k must be one or more whole numbers >= 1"):
        evaluate_detections({"v": one_hit()}, TRUTH, top_k=top_k)


def test_infinite_scores_are_legal():
    """Logarithms of probabilities may be -inf; only the order counts."""
    entry = {"segments": [[0, 1], [5, 6]], "labels": [0, 0], "scores": [0.0, -np.inf]}
    assert evaluate_detections({"v": entry}, TRUTH).average_map == 1.0


# --- Curves and errors ----------------------------------------------------------------------------------------------


@given(some_predictions, some_truth, st.sampled_from([0.1, 0.3, 1 / 3, 0.5, 1.0]))
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.filterwarnings(UNKNOWN_VIDEO)
def test_area_under_the_curves_is_average_precision(predictions, ground_truth, tiou):
    curves = precision_recall(predictions, ground_truth, tiou)
    metrics = evaluate_detections(predictions, ground_truth, tiou)
    assert list(curves) == metrics.classes.tolist()
    for curve, expected in zip(curves.values(), metrics.ap[0], strict=True):
        steps = np.diff(curve.recall, prepend=0.0)
        np.testing.assert_allclose((steps * curve.interpolated).sum(), expected, **EXACT)
        np.testing.assert_allclose(curve.ap, expected, **EXACT)
        found = curve.recall * curve.num_truths
        np.testing.assert_allclose(found, curve.precision * np.arange(1, len(found) + 1), **EXACT)
        assert (np.diff(curve.scores) <= 0).all()
        assert (curve.interpolated >= curve.precision).all()


def slow_match(predictions, truths, tiou):
    """{(video, row): (video, label, index) of the truth that it takes}, and the rank of each prediction in its class."""
    rows = [(video, row) for video, entry in predictions.items() for row in range(len(entry["labels"]))]
    rows.sort(key=lambda key: -predictions[key[0]]["scores"][key[1]])
    taken, ranks, num = {}, {}, {}
    for video, row in rows:
        label = predictions[video]["labels"][row]
        ranks[video, row] = num[label] = num.get(label, -1) + 1
        best = (0.0, None)
        for index, truth in enumerate(truths.get((video, label), [])):
            overlap = slow_tiou(predictions[video]["segments"][row], truth)
            if overlap >= tiou and overlap > best[0] and (video, label, index) not in taken.values():
                best = (overlap, (video, label, index))
        if best[1] is not None:
            taken[video, row] = best[1]
    return taken, ranks, rows


def slow_kind(overlap, same, tiou, background):
    if overlap >= tiou:
        return 1 if same else 2
    return 5 if overlap < background else 3 if same else 4


def slow_truths(ground_truth):
    truths = {}
    for video, entry in ground_truth.items():
        for segment, label in zip(*slow_remove_duplicates(entry["segments"], entry["labels"]), strict=True):
            truths.setdefault((video, label), []).append(segment)
    return truths


def slow_kinds(predictions, ground_truth, tiou, background):
    """{(video, row): (kind, nearest truth or None)} of predictions of known classes, and what `slow_match` gives."""
    truths = slow_truths(ground_truth)
    taken, ranks, rows = slow_match(predictions, truths, tiou)
    known = {label for _, label in truths}
    kinds = {}
    for video, row in rows:
        label, segment = predictions[video]["labels"][row], predictions[video]["segments"][row]
        if label not in known:
            continue
        nearest = (0.0, False, None)
        for (where, other), segments in sorted(truths.items(), key=lambda item: item[0][1]):
            for index, truth in enumerate(segments if where == video else []):
                candidate = (slow_tiou(segment, truth), other == label)
                if candidate > nearest[:2]:
                    nearest = (*candidate, (video, other, index))
        kind = 0 if (video, row) in taken else slow_kind(*nearest[:2], tiou, background)
        kinds[video, row] = (kind, nearest[2])
    return kinds, taken, ranks, truths


def slow_profile(predictions, ground_truth, tiou, background, top_k, inner_edges):
    """counts, fates and confusion as `profile_errors` gives them, straight from its words."""
    kinds, taken, ranks, truths = slow_kinds(predictions, ground_truth, tiou, background)
    classes = sorted({label for _, label in truths})
    size = {wanted: sum(len(s) for (_, label), s in truths.items() if label == wanted) for wanted in classes}
    counts = np.zeros((top_k, len(classes), 6), int)
    fates = np.zeros((len(classes), len(inner_edges) + 1, 6), int)
    confusion = np.zeros((len(classes), len(classes) + 1), int)
    kept = []
    for (video, row), (kind, _) in kinds.items():
        label = predictions[video]["labels"][row]
        multiple = ranks[video, row] // size[label]
        if multiple < top_k:
            counts[multiple, classes.index(label), kind] += 1
        if multiple == 0:
            kept.append((video, row))
    for (video, label), segments in truths.items():
        for index, (start, end) in enumerate(segments):
            near = (0.0, False)
            for where, row in kept:
                if where == video:
                    entry = predictions[video]
                    overlap = slow_tiou(entry["segments"][row], (start, end))
                    near = max(near, (overlap, entry["labels"][row] == label))
            is_found = any(taken.get(key) == (video, label, index) for key in kept)
            fate = 0 if is_found else slow_kind(*near, tiou, background)
            length_range = sum(end - start >= edge for edge in inner_edges)
            fates[classes.index(label), length_range, fate] += 1
            best = None
            for where, row in kinds:  # by falling score
                entry = predictions[where]
                if where == video and best is None and slow_tiou(entry["segments"][row], (start, end)) >= tiou:
                    best = classes.index(entry["labels"][row])
            confusion[classes.index(label), len(classes) if best is None else best] += 1
    return counts, fates, confusion


def slow_gains(predictions, ground_truth, tiou, background):
    """Average mAP and its gains at one threshold, by evaluating dictionaries that were changed row by row."""
    kinds, taken, _, truths = slow_kinds(predictions, ground_truth, tiou, background)
    found = set(taken.values())
    missed = {(video, label, i) for (video, label), segments in truths.items() for i in range(len(segments))} - found
    not_missed = set()

    def score(changes, removed, truth=ground_truth):
        changed = {}
        for video, entry in predictions.items():
            rows = [row for row in range(len(entry["labels"])) if (video, row) not in removed]
            of = lambda name, row: changes.get((video, row), {}).get(name, entry[name + "s"][row])  # noqa: B023, E731
            changed[video] = {name + "s": [of(name, row) for row in rows] for name in ("segment", "label", "score")}
        return evaluate_detections(changed, truth, tiou).average_map

    now, removed_gains, right_gains = score({}, set()), [], []
    for kind in range(1, 6):
        wrong = [key for key, (own, _) in kinds.items() if own == kind]  # by falling score
        removed_gains.append(score({}, set(wrong)) - now)
        changes = {}
        for key in wrong if kind in (2, 3, 4) else []:
            video, label, index = truth = kinds[key][1]
            if truth not in found:
                not_missed.add(truth)
                if truth not in [change["truth"] for change in changes.values()]:
                    changes[key] = {"truth": truth, "label": label}
                    if kind > 2:
                        changes[key]["segment"] = truths[video, label][index]
        right_gains.append(score(changes, set(wrong) - set(changes)) - now)
    missed -= not_missed
    asked = {video: {"segments": [], "labels": []} for video in ground_truth}
    for (video, label), segments in truths.items():
        for index, segment in enumerate(segments):
            if (video, label, index) not in missed:
                asked[video]["segments"].append(segment)
                asked[video]["labels"].append(label)
    is_left = any(entry["labels"] for entry in asked.values())
    right_gains.append((score({}, set(), asked) if is_left else 1.0) - now)
    return now, removed_gains, right_gains


@given(
    some_predictions,
    some_truth,
    st.sampled_from([(0.5, 0.1), (0.3, 0.3), (1 / 3, 0.2), (1.0, 0.25)]),
    st.integers(1, 4),
    st.sampled_from([[], [2.0], [1.0, 3.0, 4.5]]),
)
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.filterwarnings(UNKNOWN_VIDEO)
def test_profile_equals_brute_force(predictions, ground_truth, tious, top_k, edges):
    tiou, background = tious
    lengths = edges or 1
    profile = profile_errors(
        predictions, ground_truth, tiou, background, top_k, lengths=lengths, impact_thresholds=(tiou, 1.0)
    )
    counts, fates, confusion = slow_profile(predictions, ground_truth, tiou, background, top_k, edges)
    np.testing.assert_array_equal(profile.counts, counts)
    np.testing.assert_array_equal(profile.fates, fates)
    np.testing.assert_array_equal(profile.confusion, confusion)
    kinds, *_ = slow_kinds(predictions, ground_truth, tiou, background)
    for video, own in profile.kinds.items():
        assert len(own) == len(predictions[video]["labels"])
    given = sorted(kind for (kind, _) in kinds.values())
    if profile.counts.sum() == len(given):  # all are counted
        assert sorted(kind for own in profile.kinds.values() for kind in own if kind >= 0) == given
        for (video, row), (kind, _) in kinds.items():
            assert profile.kinds[video][row] == kind

    rows = [slow_gains(predictions, ground_truth, own, background) for own in (tiou, 1.0)]
    average_map, removed, right = (np.mean([row[place] for row in rows], axis=0) for place in range(3))
    np.testing.assert_allclose(profile.average_map, average_map, **EXACT)
    np.testing.assert_allclose(profile.gain_if_removed, removed, **EXACT)
    np.testing.assert_allclose(profile.gain_if_right, right, **EXACT)
    # Nothing that is mended may cost: -1e-15 is a difference of equal sums.
    assert min(*profile.gain_if_removed, *profile.gain_if_right) > -1e-15


@pytest.mark.filterwarnings(UNKNOWN_VIDEO)
def test_profile_counts_the_true_positives_of_the_evaluation():
    predictions, ground_truth = GOLDEN["predictions"], GOLDEN["ground_truth"]
    profile = profile_errors(predictions, ground_truth, 0.4, top_k=1000)
    curves = precision_recall(predictions, ground_truth, 0.4)
    expected = [curve.recall[-1] * curve.num_truths for curve in curves.values()]
    np.testing.assert_allclose(profile.counts[..., 0].sum(axis=0), expected, **EXACT)
    np.testing.assert_array_equal(profile.fates[..., 0].sum(axis=1), profile.counts[0, :, 0])
    metrics = evaluate_detections(predictions, ground_truth)
    assert profile.average_map == pytest.approx(metrics.average_map, abs=1e-12)
    assert profile.counts.sum() == metrics.num_predictions - metrics.num_unknown_classes
    assert profile.fates.sum() == profile.confusion.sum() == metrics.num_ground_truth
    assert (profile.fates.sum(axis=(0, 2)) > 0).all()  # ranges of length by quantiles are never empty


def test_kinds_and_gains_equal_those_of_detad():
    golden = json.loads((Path(__file__).parent / "fixtures" / "detad.json").read_text())
    profile = profile_errors(golden["predictions"], golden["ground_truth"], top_k=1000, impact_thresholds=0.5)
    assert np.concatenate(list(profile.kinds.values())).tolist() == golden["kinds"]
    assert set(golden["kinds"]) == set(range(6))
    np.testing.assert_allclose(profile.average_map, golden["map"], **EXACT)
    np.testing.assert_allclose(profile.gain_if_removed, golden["gain_if_removed"], **EXACT)


def one_of_each():
    """A video with one error of each kind, in the order of KINDS, and one where four truths are found by nobody."""
    truth = {"segments": [[0, 10], [20, 30], [40, 50], [60, 70], [80, 90]], "labels": [0, 1, 0, 1, 1]}
    others = {"segments": [[0, 1], [2, 3], [4, 5], [6, 7]], "labels": [0, 0, 0, 0]}
    found = {
        "segments": [[0, 10], [0, 9], [20, 30], [40, 44], [60, 64], [100, 110]],
        "labels": [0, 0, 0, 0, 0, 0],
        "scores": [0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
    }
    return {"a": found}, {"a": truth, "b": others}


def test_one_error_of_each_kind():
    profile = profile_errors(*one_of_each(), lengths=[5, 20], impact_thresholds=0.5)
    assert profile.kinds["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert profile.counts[:, 0].sum(axis=0).tolist() == [1] * 6
    assert profile.counts[0, 0].tolist() == [1] * 6  # class 0 has six truths, so its six best predictions are all
    assert profile.video_errors == {"a": (5, 4), "b": (0, 4)}
    assert profile.fates.sum(axis=1).tolist() == [[1, 0, 0, 1, 0, 4], [0, 0, 1, 0, 1, 1]]
    assert profile.fates.sum(axis=(0, 2)).tolist() == [4, 5, 0]
    assert profile.confusion.tolist() == [[1, 0, 5], [1, 0, 2]]
    # Class 0 has AP 1/6, class 1 has 0. Right labels find the first of class 1's three truths, which is AP 1/3.
    assert profile.average_map == pytest.approx(1 / 12)
    assert profile.gain_if_right[1] == pytest.approx(1 / 6)
    # The right ends make the fourth of class 0's predictions correct: a sixth of AP, at precision 2/4.
    assert profile.gain_if_right[2] == pytest.approx(1 / 6 * 2 / 4 / 2)
    assert profile.gain_if_right[3] == pytest.approx(1 / 6)
    # Two truths of class 0 are left, and AP is 1/2; class 1 has one truth less, but still finds none.
    assert profile.gain_if_right[5] == pytest.approx((1 / 2 - 1 / 6) / 2)


def test_the_nearest_truth_decides_and_of_equal_ones_that_of_the_class():
    truth = {"a": {"segments": [[0, 10], [0, 10], [1, 11]], "labels": [0, 1, 2]}}
    found = {"a": {"segments": [[0, 10], [0, 10], [1, 11]], "labels": [1, 1, 1], "scores": [0.9, 0.8, 0.7]}}
    assert profile_errors(found, truth).kinds["a"].tolist() == [0, 1, 2]


def test_a_prediction_between_two_truths_is_shared():
    truth = {"a": {"segments": [[0, 10], [2, 12]], "labels": [0, 0]}}
    found = {"a": {"segments": [[1, 11]], "labels": [0], "scores": [0.9]}}
    fates = profile_errors(found, truth).fates.sum(axis=(0, 1))
    assert dict(zip(FATES, fates.tolist(), strict=True)) == dict.fromkeys(FATES, 0) | {"found": 1, "shared": 1}


@pytest.mark.parametrize("predictions", [{}, {"a": {"segments": [], "labels": [], "scores": []}}])
def test_profile_of_nothing(predictions):
    profile = profile_errors(predictions, {"a": {"segments": [[0, 1], [2, 4]], "labels": [3, 7]}})
    assert profile.counts.sum() == 0
    assert profile.fates.sum(axis=(0, 1)).tolist() == [0, 0, 0, 0, 0, 2]
    assert profile.confusion.tolist() == [[0, 0, 1], [0, 0, 1]]
    assert profile.gain_if_right.tolist() == [0, 0, 0, 0, 0, 1]
    assert {video: own.tolist() for video, own in profile.kinds.items()} == {video: [] for video in predictions}
    assert "missed" in str(profile)


def test_pairs_of_a_large_video_come_in_parts():
    """2200 x 1000 pairs are more than are looked at at once."""
    rng = np.random.default_rng(0)
    starts = np.sort(rng.uniform(0, 5000, 1000))
    truth = np.stack([starts, starts + 3], axis=1)
    found = truth[rng.integers(0, 1000, 2200)] + rng.normal(0, 0.5, (2200, 1))
    predictions = {"a": {"segments": found, "labels": np.zeros(2200, int), "scores": rng.random(2200)}}
    ground_truth = {"a": {"segments": truth, "labels": np.zeros(1000, int)}}
    profile = profile_errors(predictions, ground_truth, top_k=3, impact_thresholds=0.5)
    overlap = np.minimum(found[:, None, 1], truth[:, 1]) - np.maximum(found[:, None, 0], truth[:, 0])
    highest = (overlap.clip(0) / (6 - overlap.clip(0))).max(axis=1)
    assert (profile.kinds["a"] == 5).sum() == (highest < 0.1).sum()
    assert (profile.kinds["a"] == 3).sum() == ((highest >= 0.1) & (highest < 0.5)).sum()


def test_profile_prints_a_table_and_is_json_ready():
    profile = profile_errors(*one_of_each(), lengths=[5, 20], impact_thresholds=(0.3, 0.5))
    text = str(profile)
    for kind in (*KINDS, *FATES):
        assert kind in text
    assert "from 20 s" in text
    assert "1G" in text
    assert "tIoU 0.3 to 0.5" in text
    assert not any(line != line.rstrip() or len(line) > 119 for line in text.splitlines())
    values = json.loads(json.dumps(profile.to_dict(), allow_nan=False))
    assert values["predictions"]["wrong label"] == [1, *[0] * 9]
    assert values["truths"]["missed"] == [4, 1, 0]
    assert values["lengths"] == ["0 to 5 s", "5 to 20 s", "from 20 s"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background_tiou": 0.0}, "background_tiou must be above 0 and at most the lowest threshold, 0.3"),
        ({"background_tiou": 0.4}, "at most the lowest threshold, 0.3"),
        ({"tiou_threshold": (0.5, 0.6)}, "tiou_threshold must be one number"),
        ({"tiou_threshold": 1.5}, "numbers in"),
        ({"top_k": 0}, "top_k must be"),
        ({"top_k": [1, 5]}, "top_k must be one number"),
        ({"lengths": 0}, "whole numbers >= 1"),
        ({"lengths": [3, 2]}, "lengths must be rising numbers"),
        ({"lengths": [0, 2]}, "lengths must be rising numbers"),
        ({"impact_thresholds": []}, "numbers in"),
    ],
)
def test_profile_refuses_bad_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        profile_errors(*one_of_each(), **options)


# --- Moments ------------------------------------------------------------------------------------------------------------


def slow_recall(predictions, ground_truth, k, threshold):
    """As the definition reads: queries with an answer, their k best moments, any answer."""
    hits = []
    for query, truth in ground_truth.items():
        if len(truth):
            own = predictions.get(query, {"segments": [], "scores": []})
            ranked = sorted(
                zip(own["scores"], range(len(own["scores"])), own["segments"], strict=True),
                key=lambda r: (-r[0], r[1]),
            )
            hits.append(any(slow_tiou(one, other) >= threshold for _, _, one in ranked[:k] for other in truth))
    return np.mean(hits)


def random_moments(seed):
    rng = np.random.default_rng(seed)

    def segments(count):
        starts = rng.integers(0, 12, count)
        return np.stack((starts, starts + rng.integers(0, 6, count)), axis=1).astype(float)

    truth = {("video", query): segments(rng.integers(0, 3)) for query in range(12)}
    truth["always"] = segments(1) + np.array([0, 1])
    found = {}
    for query in truth:
        count = int(rng.integers(0, 7))
        if rng.random() < 0.8:
            found[query] = {"segments": segments(count), "scores": rng.integers(0, 4, count) / 4}  # with ties
    return found, truth


@pytest.mark.parametrize("seed", range(20))
def test_recall_of_moments_equals_brute_force(seed):
    found, truth = random_moments(seed)
    metrics = evaluate_moments(found, truth, top_k=(1, 2, 5), tiou_thresholds=(0.1, 0.5, 1.0))
    expected = [[slow_recall(found, truth, k, threshold) for threshold in (0.1, 0.5, 1.0)] for k in (1, 2, 5)]
    np.testing.assert_allclose(metrics.recall, expected, rtol=1e-12)
    assert metrics.num_queries == sum(len(one) > 0 for one in truth.values())
    assert metrics.num_queries + metrics.num_unanswerable == len(truth)
    best = []
    for query, answers in truth.items():
        if len(answers):
            own = found.get(query, {"segments": [], "scores": []})
            first = [own["segments"][int(np.argmax(own["scores"]))]] if len(own["scores"]) else []
            best.append(max((slow_tiou(one, other) for one in first for other in answers), default=0.0))
    assert metrics.mean_tiou == pytest.approx(np.mean(best))


def test_a_worked_example_of_moments():
    truth = {"a": [[0.0, 10.0]], "b": {"segments": [[5.0, 9.0], [20.0, 30.0]]}, "c": []}
    found = {
        "a": {"segments": [[40.0, 50.0], [0.0, 8.0]], "scores": [0.9, 0.8]},
        "b": {"segments": torch.tensor([[20.0, 26.0]]), "scores": torch.tensor([0.1])},
    }
    rows = [{"query": "a", "start": 40.0, "end": 50.0, "score": 0.9}, {"start": 0.0, "end": 8.0, "score": 0.8}]
    assert evaluate_moments({**found, "a": rows}, truth).to_dict() == evaluate_moments(found, truth).to_dict()
    metrics = evaluate_moments(found, truth)
    assert metrics.recall.tolist() == [[0.5, 0.5, 0.0], [1.0, 1.0, 0.5]]
    assert metrics.mean_tiou == pytest.approx(0.3)
    assert metrics.to_dict() == pytest.approx(
        {
            "recall_1_30": 0.5,
            "recall_1_50": 0.5,
            "recall_1_70": 0,
            "recall_5_30": 1,
            "recall_5_50": 1,
            "recall_5_70": 0.5,
        }
        | {"mean_tiou": 0.3}
    )
    lines = str(metrics).splitlines()
    assert lines[1].split() == ["R@1", "50.00%", "50.00%", "0.00%"]
    assert lines[-1] == "2 queries (1 more without an answer), mean tIoU 30.00%"


@pytest.mark.parametrize(
    ("found", "truth", "options", "message"),
    [
        ({}, {"a": []}, {}, "None of the 1 queries"),
        ({"b": {"segments": [], "scores": []}}, {"a": [[0, 1]]}, {}, "lacks, such as 'b'"),
        ({"a": {"segments": [[0, 1]], "scores": []}}, {"a": [[0, 1]]}, {}, "'a'.*do not fit"),
        ({"a": {"segments": [[0, 1]]}}, {"a": [[0, 1]]}, {}, r"predictions\['a'\] must be .*'scores'"),
        ({"a": [{"start": 1}]}, {"a": [[0, 1]]}, {}, "start, end and score"),
        ({"a": 3}, {"a": [[0, 1]]}, {}, r"predictions\['a'\] must be"),
        ({"a": {"segments": [[3, 1]], "scores": [1]}}, {"a": [[0, 1]]}, {}, "'a'.*end >= start"),
        ({}, {"a": [[0, np.nan]]}, {}, r"ground_truth\['a'\].*finite"),
        ({}, {"a": [[0, 1]]}, {"top_k": 0}, "top_k"),
        ({}, {"a": [[0, 1]]}, {"tiou_thresholds": 1.5}, "tiou_thresholds"),
    ],
)
def test_refuses_bad_moments(found, truth, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_moments(found, truth, **options)
