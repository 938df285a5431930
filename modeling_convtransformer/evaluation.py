"""Mean average precision and recall of detected segments, by the ActivityNet detection protocol; recall of moments that
queries describe; which errors a detector makes, and what they cost.

    metrics = evaluate_detections(predictions, ground_truth)
    print(metrics)                # a table, one row per tIoU threshold
    metrics.average_map           # the number that papers report as "avg. mAP"
    metrics.to_dict()             # flat and JSON-ready, e.g. for a Trainer's compute_metrics
    print(profile_errors(predictions, ground_truth))

The protocol is that of Caba Heilbron et al., "ActivityNet: A Large-Scale Video Benchmark for Human Activity
Understanding" (CVPR 2015), in the form that ActionFormer (Zhang et al., ECCV 2022) reports. tIoU, the temporal
intersection over union of two segments, is the length of their overlap divided by the length that they cover together.
"""

import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "DetectionMetrics",
    "ErrorProfile",
    "MomentMetrics",
    "PrecisionRecall",
    "evaluate_detections",
    "evaluate_moments",
    "precision_recall",
    "profile_errors",
    "remove_duplicates",
]


@dataclass(frozen=True, eq=False)
class DetectionMetrics:
    """What `evaluate_detections` found, for T tIoU thresholds, K values of `top_k` and C classes. All values are
    fractions in [0, 1]; `print` shows them as percentages.

    Attributes:
        tiou_thresholds: (T,) the thresholds, as given.
        top_k: (K,) the k of "recall@kx", as given.
        classes: (C,) the class ids of the ground truth, rising. The class axis of `ap` and `recall_per_class`.
        map: (T,) mean average precision, the mean of `ap` over the classes.
        average_map: the mean of `map` over the thresholds.
        ap: (T, C) average precision; 0 for a class without predictions.
        recall: (T, K) the mean of `recall_per_class` over the classes.
        recall_per_class: (T, K, C) the share of a class's truths that some prediction of the class meets (tIoU at or
            above the threshold) when each video keeps its k * n best predictions of the class, n being the number of
            truths of the class in that video. One prediction may meet several truths.
        num_ground_truth: truths that were counted, without the ones removed as duplicates.
        num_predictions: predictions that were given, the ones counted below included.
        num_unknown_videos: predictions (not videos) on videos that the ground truth lacks: false positives.
        num_unknown_classes: predictions of classes that the ground truth lacks: ignored.
    """

    tiou_thresholds: np.ndarray
    top_k: np.ndarray
    classes: np.ndarray
    map: np.ndarray
    average_map: float
    ap: np.ndarray
    recall: np.ndarray
    recall_per_class: np.ndarray
    num_ground_truth: int
    num_predictions: int
    num_unknown_videos: int
    num_unknown_classes: int

    def to_dict(self) -> dict[str, float]:
        """Plain floats under flat names: "map" (the average), "map_30" (at tIoU 0.30), "recall_1x_30" and so on."""
        percents = [f"{100 * threshold:g}" for threshold in self.tiou_thresholds]
        values = {"map": self.average_map}
        values |= {f"map_{percent}": float(value) for percent, value in zip(percents, self.map, strict=True)}
        for k, column in zip(self.top_k, self.recall.T, strict=True):
            values |= {f"recall_{k}x_{percent}": float(value) for percent, value in zip(percents, column, strict=True)}
        return values

    def __str__(self) -> str:
        header = ["tIoU", "mAP", *(f"recall@{k}x" for k in self.top_k)]
        table = np.column_stack([self.map, self.recall])
        names = [*(f"{threshold:.4g}" for threshold in self.tiou_thresholds), "mean"]
        rows = [
            [name, *(f"{100 * value:.2f}%" for value in row)]
            for name, row in zip(names, [*table, table.mean(axis=0)], strict=True)
        ]
        lines = ["  ".join(f"{cell:>9}" for cell in row) for row in [header, *rows]]
        lines.append(
            f"{len(self.classes)} classes, {self.num_ground_truth} truths, {self.num_predictions} predictions "
            f"({self.num_unknown_videos} on unknown videos, {self.num_unknown_classes} of unknown classes)"
        )
        return "\n".join(lines)


def evaluate_detections(
    predictions: Mapping[Hashable, Mapping[str, ArrayLike]],
    ground_truth: Mapping[Hashable, Mapping[str, ArrayLike]],
    tiou_thresholds: float | Sequence[float] = (0.3, 0.4, 0.5, 0.6, 0.7),
    top_k: int | Sequence[int] = (1, 5),
    *,
    deduplicate: bool = True,
) -> DetectionMetrics:
    """Average precision and recall of predicted segments, by the ActivityNet detection protocol.

    For each class the predictions of all videos are taken by falling score. Each one takes, among the truths of its
    class in its video that are still free, the one of highest tIoU, if that tIoU is at or above the threshold; then it
    is a true positive, otherwise a false positive. Average precision is the sum over the recall steps of the
    interpolated precision: the best precision at that recall or a higher one.

    Ties: predictions of equal score count in the order in which they are given (videos in the order of `predictions`);
    of truths of equal tIoU the one given first is taken. The protocol leaves both open.

    Args:
        predictions: {video id: {"segments": (N, 2) start and end in seconds, "labels": (N,) class ids,
            "scores": (N,)}}: arrays, lists or CPU tensors. Other keys are ignored, and N may be 0. Predictions of
            classes that the ground truth lacks are ignored; predictions on videos that it lacks are false positives.
        ground_truth: {video id: {"segments": (M, 2) seconds, "labels": (M,) class ids}}. A video without any segment
            (M = 0) is known: what is predicted there is a false positive, without a warning.
        tiou_thresholds: one or several numbers in (0, 1].
        top_k: one or several whole numbers >= 1, the k of "recall@kx"; see `DetectionMetrics`.
        deduplicate: apply `remove_duplicates` to the truths of each video first, as ActionFormer's evaluation does.

    Warns:
        UserWarning: predictions fell on videos that the ground truth lacks (often the wrong split or a file suffix).

    Raises:
        ValueError: there is no truth at all; a missing key; shapes that do not fit; a value that is not a finite number
            (scores may be infinite, not NaN); an end before its start; labels that are negative or not integers;
            thresholds or top_k out of range. Messages name the video id and, where one value is wrong, its index.
    """
    tiou_thresholds, top_k = _thresholds(tiou_thresholds), _whole_numbers(top_k)

    found = _sort(predictions, ground_truth, deduplicate)
    taken, is_recalled = _match(
        found.segments, found.cell, found.truth_segments, found.truth_cell, tiou_thresholds, top_k
    )

    truths_of_class = found.truths_of_class
    first_truth = np.cumsum(truths_of_class) - truths_of_class
    recall_per_class = np.add.reduceat(is_recalled, first_truth, axis=-1, dtype=np.int64) / truths_of_class
    ap = np.zeros((len(tiou_thresholds), len(found.classes)))
    for index, falling_score in enumerate(found.by_class()):
        ap[:, index] = _average_precision(taken[:, falling_score] >= 0, truths_of_class[index])

    return DetectionMetrics(
        tiou_thresholds=tiou_thresholds,
        top_k=top_k,
        classes=found.classes,
        map=ap.mean(axis=1),
        average_map=float(ap.mean(axis=1).mean()),
        ap=ap,
        recall=recall_per_class.mean(axis=2),
        recall_per_class=recall_per_class,
        num_ground_truth=len(found.truth_cell),
        num_predictions=found.num_predictions,
        num_unknown_videos=found.num_unknown_videos,
        num_unknown_classes=found.num_predictions - len(found.cell),
    )


def remove_duplicates(
    segments: ArrayLike, labels: ArrayLike, tolerance: float = 1e-3
) -> tuple[np.ndarray, np.ndarray]:
    """Remove the truths of one video that are shorter than `tolerance` or repeat an earlier one.

    A truth repeats an earlier one if that one was kept, has the same class, and both their starts and both their ends
    differ by at most `tolerance`. This is the cleaning that ActionFormer's evaluation does when it loads the truth.

    Args:
        segments: (M, 2) start and end in seconds.
        labels: (M,) class ids.
        tolerance: seconds.

    Returns:
        The segments (m, 2) and labels (m,) that remain, in the order given.

    Raises:
        ValueError: the shapes are not (M, 2) and (M,).
    """
    segments, labels = np.asarray(segments), np.asarray(labels)
    if segments.size == 0 and labels.size == 0:  # an empty list has no second axis
        segments = segments.reshape(0, 2)
    if segments.ndim != 2 or segments.shape[1] != 2 or labels.shape != segments.shape[:1]:
        raise ValueError(f"Expected segments (M, 2) and labels (M,), but found {segments.shape} and {labels.shape}.")
    keep = _keep_first(segments, labels, tolerance)
    return segments[keep], labels[keep]


def _keep_first(segments: np.ndarray, groups: np.ndarray, tolerance: float) -> np.ndarray:
    """The rule of `remove_duplicates` as a mask (M,), for truths that are compared within their group (M,) only."""
    keep = segments[:, 1] - segments[:, 0] >= tolerance

    # Sorted by group and start, duplicates lie in one run of starts less than the tolerance apart. Most runs are a
    # single truth; the exact rule, which depends on the order given, is needed only inside the others.
    order = np.lexsort((segments[:, 0], groups))
    order = order[keep[order]]
    breaks = (np.diff(groups[order]) != 0) | (np.diff(segments[order, 0]) > tolerance)
    edges = np.concatenate([[0], np.flatnonzero(breaks) + 1, [len(order)]])
    for run in np.flatnonzero(np.diff(edges) > 1):
        rows = np.sort(order[edges[run] : edges[run + 1]])
        for position, row in enumerate(rows):
            earlier = rows[:position][keep[rows[:position]]]
            keep[row] = not (np.abs(segments[earlier] - segments[row]) <= tolerance).all(axis=1).any()
    return keep


class _Flat(NamedTuple):
    """The segments of all videos, one after the other."""

    videos: np.ndarray  # (N,) position of the video in its dictionary
    segments: np.ndarray  # (N, 2) float64, seconds
    labels: np.ndarray  # (N,) int64
    scores: np.ndarray  # (N,) float64; zeros for truths


def _flatten(videos: Mapping[Hashable, Mapping[str, ArrayLike]], name: str, with_scores: bool) -> _Flat:
    """Join the videos' arrays and check them. `name` is the argument that messages blame."""
    if not isinstance(videos, Mapping):
        raise ValueError(f"{name} must be a dictionary with one entry per video id, but is a {type(videos).__name__}.")
    keys = ("segments", "labels", "scores") if with_scores else ("segments", "labels")
    columns = {"segments": [np.empty((0, 2))], "labels": [np.empty(0, np.int64)], "scores": [np.empty(0)]}
    for video, entry in videos.items():
        if not isinstance(entry, Mapping) or any(key not in entry for key in keys):
            found = sorted(map(str, entry)) if isinstance(entry, Mapping) else f"a {type(entry).__name__}"
            raise ValueError(f"{name}[{video!r}] must be a dictionary with the keys {list(keys)}, but has {found}.")
        try:
            segments, labels = np.asarray(entry["segments"], dtype=np.float64), np.asarray(entry["labels"])
            scores = np.asarray(entry["scores"], dtype=np.float64) if with_scores else np.zeros(labels.shape)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}[{video!r}] does not hold arrays of numbers: {error}") from error
        if segments.size == 0 and labels.size == 0:  # an empty list has no second axis and no integer type
            segments, labels = segments.reshape(0, 2), labels.reshape(0).astype(np.int64)
        if segments.shape != (labels.size, 2) or labels.ndim != 1 or scores.shape != labels.shape:
            shapes = ", ".join(f"{key} {np.shape(entry[key])}" for key in keys)
            raise ValueError(
                f"{name}[{video!r}] has the shapes {shapes}, which do not fit: expected segments (N, 2) and "
                f"{' and '.join(f'{key} (N,)' for key in keys[1:])} with the same N."
            )
        if labels.dtype.kind not in "iu":
            raise ValueError(
                f"{name}[{video!r}] has labels of type {labels.dtype}: class ids must be integers; map names to ids, "
                "and convert ids stored as real numbers with .astype(int)."
            )
        columns["segments"].append(segments)
        columns["labels"].append(labels.astype(np.int64))
        columns["scores"].append(scores)

    counts = np.array([len(labels) for labels in columns["labels"][1:]], dtype=np.int64)
    row = np.repeat(np.arange(len(counts)), counts)
    segments, labels, scores = (np.concatenate(column) for column in columns.values())

    def refuse(bad: np.ndarray, values: np.ndarray, message: str) -> None:
        """Raise with the first of the `bad` (N,) rows, if there is one."""
        if bad.any():
            worst = int(bad.argmax())
            index = worst - int(counts[: row[worst]].sum())
            where = f"{name}[{list(videos)[row[worst]]!r}], index {index}"
            raise ValueError(f"{where}: {message}, but found {values[worst].tolist()}.")

    refuse(~np.isfinite(segments).all(axis=1), segments, "segments must be finite numbers (seconds)")
    refuse(segments[:, 1] < segments[:, 0], segments, "a segment must be (start, end) with end >= start")
    refuse(labels < 0, labels, "labels must be class ids >= 0; leave background segments out")
    refuse(np.isnan(scores), scores, "scores must be numbers")
    return _Flat(row, segments, labels, scores)


def _warn_of_unknown_videos(predictions: Mapping, known: Mapping) -> int:
    """Count the predictions on videos that are not `known`, and warn if there are any."""
    counts = {video: len(entry["labels"]) for video, entry in predictions.items() if video not in known}
    unknown = [video for video, count in counts.items() if count]
    if unknown:
        names = ", ".join(repr(video) for video in unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        warnings.warn(
            f"{sum(counts.values())} predictions fell on {len(unknown)} videos that the ground truth lacks ({names}) "
            "and count as false positives. Leave these videos out if they belong to another split, or give them an "
            "entry without segments if nothing happens in them."
        )
    return sum(counts.values())


class _Sorted(NamedTuple):
    """Predictions (P) of known classes and truths (M), sorted for `_match`.

    A cell is one class in one video: all that can match. Cells are numbered class by class, so that sorting by cell also
    groups by class, and each class has one more cell for the videos that the ground truth lacks.
    """

    classes: np.ndarray  # (C,) class ids of the truths, rising
    num_videos: int  # of the ground truth
    truth_segments: np.ndarray  # (M, 2)
    truth_cell: np.ndarray  # (M,), rising
    segments: np.ndarray  # (P, 2)
    cell: np.ndarray  # (P,), rising; in a cell by falling score
    scores: np.ndarray  # (P,)
    rank: np.ndarray  # (P,) place among all predictions by falling score
    row: np.ndarray  # (P,) place in the predictions as they were given, one video after the other
    num_predictions: int  # given, those of unknown classes included
    num_unknown_videos: int

    @property
    def truths_of_class(self) -> np.ndarray:
        """(C,) numbers of truths."""
        return np.bincount(self.truth_cell // (self.num_videos + 1), minlength=len(self.classes))

    def by_class(self) -> Iterator[np.ndarray]:
        """For each class the indices of its predictions by falling score."""
        edges = np.searchsorted(self.cell, np.arange(len(self.classes) + 1) * (self.num_videos + 1))
        for start, stop in pairwise(edges):
            yield start + np.argsort(self.rank[start:stop])


def _sort(predictions: Mapping, ground_truth: Mapping, deduplicate: bool) -> _Sorted:
    """Check what `evaluate_detections` is given, and bring it into the order in which it is matched."""
    truth = _flatten(ground_truth, "ground_truth", with_scores=False)
    if deduplicate:
        # Two truths are compared only if they share the video and the class: one number stands for both.
        _, same_class = np.unique(truth.labels, return_inverse=True)
        keep = _keep_first(truth.segments, same_class * len(ground_truth) + truth.videos, tolerance=1e-3)
        truth = _Flat(*(column[keep] for column in truth))
    if len(truth.labels) == 0:
        raise ValueError(
            f"There is nothing to detect: ground_truth has {len(ground_truth)} videos and no segment"
            f"{' of at least 1e-3 seconds' if deduplicate else ''}. Check the split and the unit (seconds)."
        )
    classes = np.unique(truth.labels)

    given = _flatten(predictions, "predictions", with_scores=True)
    row_of_video = {video: row for row, video in enumerate(ground_truth)}
    unknown_video = len(ground_truth)
    rows = np.array([row_of_video.get(video, unknown_video) for video in predictions], dtype=np.int64)
    given = given._replace(videos=rows[given.videos])
    known_class = np.isin(given.labels, classes)
    num_unknown_videos = _warn_of_unknown_videos(predictions, row_of_video)

    cells_per_class = len(ground_truth) + 1
    truth_cell = np.searchsorted(classes, truth.labels) * cells_per_class + truth.videos
    order = np.argsort(truth_cell, kind="stable")

    by_score = np.argsort(-given.scores, kind="stable")
    by_score = by_score[known_class[by_score]]
    cell = np.searchsorted(classes, given.labels[by_score]) * cells_per_class + given.videos[by_score]
    rank = np.argsort(cell, kind="stable")  # by cell, and in each cell by falling score; the value is the overall rank
    row = by_score[rank]
    return _Sorted(
        classes=classes,
        num_videos=len(ground_truth),
        truth_segments=truth.segments[order],
        truth_cell=truth_cell[order],
        segments=given.segments[row],
        cell=cell[rank],
        scores=given.scores[row],
        rank=rank,
        row=row,
        num_predictions=len(given.labels),
        num_unknown_videos=num_unknown_videos,
    )


def _match(
    segments: np.ndarray,
    cell: np.ndarray,
    truth_segments: np.ndarray,
    truth_cell: np.ndarray,
    tiou_thresholds: np.ndarray,
    top_k: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Match predictions (P, 2) with the truths (M, 2) of their cell, in all cells at once.

    `cell` (P,) and `truth_cell` (M,) rise, and the predictions of a cell come by falling score. Step r handles the r-th
    best prediction of every cell, so the number of steps is the largest number of predictions in one cell. The truths
    of the cells are padded to a common number; cells are grouped by the power of two of that number, so at most half
    of an array is padding and memory grows with T * M, never with P * M.

    Returns:
        taken (T, P): the truth that makes the prediction a true positive at the threshold; -1: a false positive.
        is_recalled (T, K, M): the truth is met by one of the k * n best predictions of its cell, n truths in the cell.
    """
    taken = np.full((len(tiou_thresholds), len(segments)), -1)
    is_recalled = np.zeros((len(tiou_thresholds), len(top_k), len(truth_segments)), dtype=bool)

    cells, first_truth, num_truths = np.unique(truth_cell, return_index=True, return_counts=True)
    first = np.searchsorted(cell, cells, side="left")
    num = np.searchsorted(cell, cells, side="right") - first
    # Cells with the most predictions first: those that still have an r-th prediction are then always the first ones.
    busiest = np.argsort(-num, kind="stable")
    busiest = busiest[num[busiest] > 0]
    bit_length = np.frexp(num_truths)[1]

    for bits in np.unique(bit_length[busiest]):
        group = busiest[bit_length[busiest] == bits]
        slot = np.arange(num_truths[group].max())
        is_truth = slot < num_truths[group, None]  # (cells, slots)
        truth = np.where(is_truth, first_truth[group, None] + slot, 0)
        # An empty slot is a segment of length 0, which has tIoU 0 with everything and so meets no threshold.
        starts = np.where(is_truth, truth_segments[truth, 0], 0.0)
        ends = np.where(is_truth, truth_segments[truth, 1], 0.0)
        is_free = np.ones((len(tiou_thresholds), *truth.shape), dtype=bool)
        best_tiou = np.zeros((len(top_k), *truth.shape))
        level = np.arange(len(tiou_thresholds))[:, None]

        for step in range(num[group[0]]):
            active = np.count_nonzero(num[group] > step)
            prediction = first[group[:active]] + step
            tiou = _tiou(segments[prediction, 0, None], segments[prediction, 1, None], starts[:active], ends[:active])

            free_tiou = np.where(is_free[:, :active], tiou, 0.0)
            choice = free_tiou.argmax(axis=2)
            row = np.arange(active)
            hit = free_tiou[level, row, choice] >= tiou_thresholds[:, None]
            is_free[level, row, choice] &= ~hit
            taken[:, prediction] = np.where(hit, truth[row, choice], -1)

            is_kept = step < top_k[:, None] * num_truths[group[:active]]
            np.maximum(best_tiou[:, :active], tiou, out=best_tiou[:, :active], where=is_kept[:, :, None])

        is_recalled[:, :, truth[is_truth]] = best_tiou[:, is_truth] >= tiou_thresholds[:, None, None]
    return taken, is_recalled


def _tiou(start_a: np.ndarray, end_a: np.ndarray, start_b: np.ndarray, end_b: np.ndarray) -> np.ndarray:
    """Temporal intersection over union of segments a and b (any shapes that broadcast); 0 if both have length 0."""
    intersection = np.maximum(np.minimum(end_a, end_b) - np.maximum(start_a, start_b), 0.0)
    union = (end_b - start_b) + (end_a - start_a) - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def _average_precision(is_correct: np.ndarray, num_truths: int) -> np.ndarray:
    """Interpolated average precision (T,) of predictions by falling score, given which ones are correct (T, N)."""
    # Recall rises by 1 / num_truths at each correct prediction and nowhere else.
    return (_interpolate(_precision(is_correct)) * is_correct).sum(axis=1) / num_truths


def _precision(is_correct: np.ndarray) -> np.ndarray:
    return np.cumsum(is_correct, axis=-1) / np.arange(1, is_correct.shape[-1] + 1)


def _interpolate(precision: np.ndarray) -> np.ndarray:
    """The best precision at that recall or a higher one."""
    return np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]


# --- Errors ---------------------------------------------------------------------------------------------------------

# What a prediction is, and what becomes of a truth: the same rule seen from either side.
KINDS = ("true positive", "double detection", "wrong label", "localization", "confusion", "background")
FATES = ("found", "shared", "wrong label", "localization", "confusion", "missed")


class PrecisionRecall(NamedTuple):
    """The curve of one class: one value for each of its N predictions, by falling score.

    Attributes:
        recall: (N,) the share of the truths that the predictions up to this one find.
        precision: (N,) the share of the predictions up to this one that are true positives.
        interpolated: (N,) the best precision at that recall or a higher one: what average precision sums.
        scores: (N,)
        num_truths: of the class.
        ap: average precision, the area under `interpolated`.
    """

    recall: np.ndarray
    precision: np.ndarray
    interpolated: np.ndarray
    scores: np.ndarray
    num_truths: int
    ap: float


def precision_recall(
    predictions: Mapping[Hashable, Mapping[str, ArrayLike]],
    ground_truth: Mapping[Hashable, Mapping[str, ArrayLike]],
    tiou_threshold: float = 0.5,
    *,
    deduplicate: bool = True,
) -> dict[int, PrecisionRecall]:
    """The precision-recall curve of each class of the ground truth, by class id, at one tIoU threshold.

    Arguments, matching, warnings and errors are those of `evaluate_detections`, whose `ap` is the area under the curves.
    """
    thresholds = _thresholds(_one(tiou_threshold, "tiou_threshold"))
    found = _sort(predictions, ground_truth, deduplicate)
    taken, _ = _match(found.segments, found.cell, found.truth_segments, found.truth_cell, thresholds, np.array([1]))
    curves = {}
    for label, own, num_truths in zip(found.classes, found.by_class(), found.truths_of_class, strict=True):
        is_correct = taken[0, own] >= 0
        precision = _precision(is_correct)
        curves[int(label)] = PrecisionRecall(
            recall=np.cumsum(is_correct) / num_truths,
            precision=precision,
            interpolated=_interpolate(precision),
            scores=found.scores[own],
            num_truths=int(num_truths),
            ap=float(_average_precision(is_correct[None], num_truths)[0]),
        )
    return curves


@dataclass(frozen=True, eq=False)
class ErrorProfile:
    """What `profile_errors` found, for C classes, K multiples of the number of truths and B ranges of length.

    Attributes:
        tiou_threshold, background_tiou, impact_thresholds: as given.
        classes: (C,) the class ids of the ground truth, rising.
        counts: (K, C, 6) predictions by kind (`KINDS`). A class with G truths puts its G best predictions into the first
            row, the next G into the second, and so on; what comes after K * G is not counted.
        length_edges: (B + 1,) seconds; a length that equals an edge lies in the upper range.
        fates: (C, B, 6) truths by what becomes of them (`FATES`), if only each class's G best predictions count.
        confusion: (C, C + 1) truths of a class (row) by the class of the best-scored prediction that meets them (tIoU at
            or above the threshold); the last column: no prediction does.
        average_map: as `evaluate_detections` finds it at `impact_thresholds`.
        gain_if_removed: (5,) what average mAP would gain without the errors of a kind, `KINDS[1:]` (DETAD's impact).
        gain_if_right: (6,) what it would gain if they were right, as far as there is a truth to be right about, and, last,
            if the missed truths had not been asked for (the idea of TIDE).
        kinds: {video: (N,)} the kind of each prediction, an index into `KINDS`, in the order given; -1: not counted.
        video_errors: {video: (false positives, truths not found)}, if only each class's G best predictions count.
    """

    tiou_threshold: float
    background_tiou: float
    impact_thresholds: np.ndarray
    classes: np.ndarray
    counts: np.ndarray
    length_edges: np.ndarray
    fates: np.ndarray
    confusion: np.ndarray
    average_map: float
    gain_if_removed: np.ndarray
    gain_if_right: np.ndarray
    kinds: dict[Hashable, np.ndarray]
    video_errors: dict[Hashable, tuple[int, int]]

    @property
    def length_names(self) -> list[str]:
        """The B ranges of length in words, such as "2.5 to 4 s"."""
        names = [f"{low:.3g} to {high:.3g} s" for low, high in pairwise(self.length_edges)]
        if np.isinf(self.length_edges[-1]):
            names[-1] = f"from {self.length_edges[-2]:.3g} s"
        return names

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries, JSON-ready, without what belongs to single predictions or videos."""
        by_multiple, by_length = self.counts.sum(axis=1), self.fates.sum(axis=0)
        return {
            "tiou_threshold": self.tiou_threshold,
            "background_tiou": self.background_tiou,
            "impact_thresholds": self.impact_thresholds.tolist(),
            "average_map": self.average_map,
            "classes": self.classes.tolist(),
            "predictions": dict(zip(KINDS, by_multiple.T.tolist(), strict=True)),
            "gain_if_removed": dict(zip(KINDS[1:], self.gain_if_removed.tolist(), strict=True)),
            "gain_if_right": dict(zip((*KINDS[1:], "missed"), self.gain_if_right.tolist(), strict=True)),
            "lengths": self.length_names,
            "truths": dict(zip(FATES, by_length.T.tolist(), strict=True)),
            "confusion": self.confusion.tolist(),
        }

    def __str__(self) -> str:
        def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
            width = max(map(len, (*KINDS, *self.length_names)))
            cells = ["  ".join([f"{name:<{width}}", *(f"{cell:>12}" for cell in row)]) for name, *row in rows]
            return ["  ".join([f"{header[0]:<{width}}", *(f"{cell:>12}" for cell in header[1:])]), *cells]

        by_multiple, by_length = self.counts.sum(axis=1), self.fates.sum(axis=0)
        # One column for each power of two, so that ten multiples fit a terminal.
        filled = int(np.flatnonzero(by_multiple.any(axis=1)).max(initial=0)) + 1
        columns, names = [], []
        for start, stop in pairwise([0, *(1 << bit for bit in range(filled) if 1 << bit < filled), filled]):
            columns.append(by_multiple[start:stop].sum(axis=0))
            names.append(f"{stop}G" if stop == start + 1 else f"{start + 1}G to {stop}G")
        totals = [max(1, column.sum()) for column in columns]
        lines = [f"Predictions at tIoU {self.tiou_threshold:g}, by multiples of a class's number of truths, G:"]
        shares = [
            [kind, *(f"{100 * column[row] / total:.1f}%" for column, total in zip(columns, totals, strict=True))]
            for row, kind in enumerate(KINDS)
        ]
        lines += table(["", *names], [*shares, ["predictions", *(str(column.sum()) for column in columns)]])
        low, high = self.impact_thresholds[[0, -1]]
        tious = f"tIoU {low:g}" + (f" to {high:g}" if len(self.impact_thresholds) > 1 else "")
        lines += ["", f"Average mAP ({tious}) is {100 * self.average_map:.2f}%, and would gain, in points:"]
        gains = [
            [kind, f"{100 * removed:+.2f}", f"{100 * right:+.2f}"]
            for kind, removed, right in zip(KINDS[1:], self.gain_if_removed, self.gain_if_right[:-1], strict=True)
        ]
        lines += table(
            ["", "if removed", "if right"], [*gains, ["missed", "", f"{100 * self.gain_if_right[-1]:+.2f}"]]
        )
        lines += ["", "Truths by length, if only the G best predictions of each class count:"]
        lines += table(
            ["", "truths", *FATES],
            [
                [name, str(row.sum()), *(f"{100 * count / max(1, row.sum()):.1f}%" for count in row)]
                for name, row in zip(["all", *self.length_names], [by_length.sum(axis=0), *by_length], strict=True)
            ],
        )
        return "\n".join(line.rstrip() for line in lines)


def profile_errors(
    predictions: Mapping[Hashable, Mapping[str, ArrayLike]],
    ground_truth: Mapping[Hashable, Mapping[str, ArrayLike]],
    tiou_threshold: float = 0.5,
    background_tiou: float = 0.1,
    top_k: int = 10,
    *,
    lengths: int | Sequence[float] = 4,
    impact_thresholds: float | Sequence[float] = (0.3, 0.4, 0.5, 0.6, 0.7),
    deduplicate: bool = True,
) -> ErrorProfile:
    """Which errors a detector makes, after Alwassel et al., "Diagnosing Error in Temporal Action Detectors" (DETAD, ECCV
    2018, https://arxiv.org/abs/1807.10706), and what they cost.

    Predictions are matched as `evaluate_detections` does. For a false positive, the truth of its video with the highest
    tIoU decides, whatever its class (of equal ones, a truth of the prediction's class):

        highest tIoU              the truth has the prediction's class    it has another class
        at least tiou_threshold   double detection (it is taken)          wrong label
        at least background_tiou  localization                            confusion
        less, or there is none    background                              background

    The other way round, what becomes of a truth that none of the G best predictions of a class with G truths takes is decided
    by the one of these, of all classes, that has the highest tIoU with it: "shared" (of its class, but it took another truth), wrong label, localization, confusion, or missed.

    For the gains in average mAP, kinds are decided at each of the `impact_thresholds`, and all predictions are evaluated
    again without those of one kind, or with them put right: of those nearest to a truth that is not found, the best gets
    that truth's class and segment; the others are removed. Truths that are not found and that no such error is nearest to
    are missed; for their gain they are not asked for. (All this as in Bolya et al., "TIDE: A General Toolbox for Identifying
    Object Detection Errors", ECCV 2020, https://arxiv.org/abs/2008.08115.) No gain is below 0, and gains of several kinds
    do not add up.

    Args:
        predictions, ground_truth, deduplicate: as `evaluate_detections` takes them. Predictions of classes that the ground
            truth lacks are ignored here too.
        tiou_threshold: a number in (0, 1].
        background_tiou: a number in (0, 1], not above any threshold.
        top_k: count the top_k * G best predictions of a class with G truths, over all videos.
        lengths: the number of ranges of length, with about equally many truths each; or the edges between them in seconds,
            such as (30, 60, 120, 180), DETAD's for ActivityNet.
        impact_thresholds: one or several numbers in (0, 1].

    Raises:
        ValueError: numbers out of range, and what `evaluate_detections` raises.
    """
    threshold, top_k = (
        _thresholds(_one(tiou_threshold, "tiou_threshold")),
        int(_whole_numbers(_one(top_k, "top_k"))[0]),
    )
    impact_thresholds = _thresholds(impact_thresholds)
    thresholds = np.concatenate([threshold, impact_thresholds])
    if not 0 < background_tiou <= thresholds.min():
        raise ValueError(
            f"background_tiou must be above 0 and at most the lowest threshold, {thresholds.min():g}, but is "
            f"{background_tiou!r}."
        )
    found = _sort(predictions, ground_truth, deduplicate)
    num_classes, num_videos = len(found.classes), found.num_videos
    label, video = np.divmod(found.cell, num_videos + 1)
    truth_label, truth_video = np.divmod(found.truth_cell, num_videos + 1)
    edges = _length_edges(found.truth_segments, lengths)

    taken, _ = _match(found.segments, found.cell, found.truth_segments, found.truth_cell, thresholds, np.array([1]))
    near, tiou = _nearest((found.segments, video, label), (found.truth_segments, truth_video, truth_label))
    is_same = truth_label[near] == label
    kinds = [
        _kind(own >= 0, tiou, is_same, limit, background_tiou) for own, limit in zip(taken, thresholds, strict=True)
    ]

    multiple = np.empty(len(found.cell), np.int64)
    for own, num_truths in zip(found.by_class(), found.truths_of_class, strict=True):
        multiple[own] = np.arange(len(own)) // num_truths
    is_kept = multiple < top_k
    counts = np.zeros((top_k, num_classes, len(KINDS)), np.int64)
    np.add.at(counts, (multiple[is_kept], label[is_kept], kinds[0][is_kept]), 1)

    first = multiple == 0
    is_found = np.zeros(len(truth_label), bool)
    is_found[taken[0, first & (taken[0] >= 0)]] = True
    best = (found.segments[first], video[first], label[first])
    nearest, nearest_tiou = _nearest((found.truth_segments, truth_video, truth_label), best)
    is_own = best[2][nearest] == truth_label if len(best[2]) else np.zeros(len(truth_label), bool)
    fate = _kind(is_found, nearest_tiou, is_own, threshold[0], background_tiou)
    length_range = np.searchsorted(edges[1:-1], np.diff(found.truth_segments)[:, 0], side="right")
    fates = np.zeros((num_classes, len(edges) - 1, len(FATES)), np.int64)
    np.add.at(fates, (truth_label, length_range, fate), 1)

    confusion = np.zeros((num_classes, num_classes + 1), np.int64)
    met_by = _first_met(found, video, truth_video, threshold[0])
    np.add.at(confusion, (truth_label, np.where(met_by < 0, num_classes, label[met_by] if len(label) else 0)), 1)

    gains = np.stack(
        [
            _gains(found, own, kind, near, limit)
            for own, kind, limit in zip(taken[1:], kinds[1:], impact_thresholds, strict=True)
        ]
    ).mean(axis=0)

    flat = np.full(found.num_predictions, -1)
    flat[found.row[is_kept]] = kinds[0][is_kept]
    ends = np.cumsum([len(entry["labels"]) for entry in predictions.values()], dtype=np.int64)
    wrong = np.bincount(video[first & (taken[0] < 0)], minlength=num_videos + 1)
    right = np.bincount(video[first & (taken[0] >= 0)], minlength=num_videos + 1)
    truths = np.bincount(truth_video, minlength=num_videos + 1)
    return ErrorProfile(
        tiou_threshold=float(threshold[0]),
        background_tiou=float(background_tiou),
        impact_thresholds=impact_thresholds,
        classes=found.classes,
        counts=counts,
        length_edges=edges,
        fates=fates,
        confusion=confusion,
        average_map=float(gains[0]),
        gain_if_removed=gains[1:6],
        gain_if_right=gains[6:],
        kinds=dict(zip(predictions, np.split(flat, ends[:-1]), strict=True)) if len(ends) else {},
        video_errors={
            name: (int(wrong[index]), int(truths[index] - right[index])) for index, name in enumerate(ground_truth)
        },
    )


def _one(value: Any, name: str) -> Any:
    if np.ndim(value) != 0:
        raise ValueError(f"{name} must be one number, but is {value!r}.")
    return value


def _length_edges(truths: np.ndarray, lengths: int | Sequence[float]) -> np.ndarray:
    """The edges (B + 1,) of the ranges of length."""
    given = np.atleast_1d(np.asarray(lengths, dtype=np.float64))
    if np.ndim(lengths):
        if given.ndim != 1 or not (np.isfinite(given).all() and (np.diff([0.0, *given]) > 0).all()):
            raise ValueError(f"lengths must be rising numbers of seconds above 0, but is {lengths!r}.")
        return np.concatenate([[0.0], given, [np.inf]])
    shares = np.linspace(0, 1, int(_whole_numbers(lengths)[0]) + 1)
    # Edges that are lengths themselves: no range is empty.
    edges = np.unique(np.quantile(np.diff(truths)[:, 0], shares, method="inverted_cdf"))
    return edges if len(edges) > 1 else np.repeat(edges, 2)


def _pairs(videos: np.ndarray, others: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of `videos` (N,) and all rows of `others` (M,) with the same number; not too many pairs at once."""
    order, other_order = np.argsort(videos, kind="stable"), np.argsort(others, kind="stable")
    for video in np.intersect1d(videos, others):
        own, other = (
            rows[slice(*np.searchsorted(values[rows], [video, video + 1]))]
            for rows, values in ((order, videos), (other_order, others))
        )
        step = max(1, 2_000_000 // len(other))
        for start in range(0, len(own), step):
            yield own[start : start + step], other


def _pair_tiou(segments: np.ndarray, others: np.ndarray) -> np.ndarray:
    """tIoU (N, M) of each of the segments (N, 2) with each of the others (M, 2)."""
    return _tiou(segments[:, 0, None], segments[:, 1, None], *others.T)


def _nearest(rows: tuple[np.ndarray, ...], others: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """For each of the rows the other row of its video with the highest tIoU, (N,), and that tIoU, (N,).

    Of equal ones it is one with the same class, then the first. Where there is none, it is row 0 with tIoU 0. Both
    arguments are segments (N, 2), videos (N,) and labels (N,).
    """
    segments, videos, labels = rows
    near, highest = np.zeros(len(videos), np.int64), np.zeros(len(videos))
    for own, other in _pairs(videos, others[1]):
        tiou = _pair_tiou(segments[own], others[0][other])
        best = tiou.max(axis=1)
        # True > False: among the highest, the first with the same class, else the first.
        choice = ((tiou == best[:, None]) * (1 + (others[2][other] == labels[own, None]))).argmax(axis=1)
        near[own], highest[own] = other[choice], best
    return near, highest


def _first_met(found: _Sorted, video: np.ndarray, truth_video: np.ndarray, threshold: float) -> np.ndarray:
    """For each truth (M,) the best-scored prediction of its video, of any class, with that tIoU; -1: there is none."""
    by_rank = np.argsort(found.rank)
    met_by = np.full(len(truth_video), -1)
    for own, other in _pairs(truth_video, video[by_rank]):
        other = by_rank[other]
        meets = _pair_tiou(found.truth_segments[own], found.segments[other]) >= threshold
        met_by[own] = np.where(meets.any(axis=1), other[meets.argmax(axis=1)], -1)
    return met_by


def _kind(is_taken: np.ndarray, tiou: np.ndarray, is_same: np.ndarray, threshold: float, background: float):
    """The table of `profile_errors`, as an index into `KINDS` or `FATES` for each row."""
    is_near, is_close = tiou >= background, tiou >= threshold
    cases = [is_taken, is_close & is_same, is_close, is_near & is_same, is_near]
    return np.select(cases, range(len(cases)), default=len(cases))


def _gains(found: _Sorted, taken: np.ndarray, kind: np.ndarray, near: np.ndarray, threshold: float) -> np.ndarray:
    """mAP (1,), its gains without each kind of error (5,), and its gains with each put right, missed truths last (6,)."""
    is_free = np.ones(len(found.truth_cell), bool)
    is_free[taken[taken >= 0]] = False
    is_missed = is_free.copy()
    now = _mean_ap(found, threshold)
    removed, right = [], []
    for error, name in enumerate(KINDS[1:], start=1):
        without = kind != error
        removed.append(_mean_ap(_take(found, np.flatnonzero(without)), threshold))
        if name in ("double detection", "background"):  # there is no truth to be right about
            right.append(removed[-1])
            continue
        wrong = np.flatnonzero(~without & is_free[near])
        is_missed[near[wrong]] = False
        wrong = wrong[np.argsort(found.rank[wrong])]
        wrong = wrong[np.unique(near[wrong], return_index=True)[1]]  # the best for each truth
        cell, segments = found.cell.copy(), found.segments.copy()
        cell[wrong] = found.truth_cell[near[wrong]]
        segments[wrong] = found.truth_segments[near[wrong]]
        without[wrong] = True
        mended = _take(found._replace(cell=cell, segments=segments), np.flatnonzero(without))
        right.append(_mean_ap(mended, threshold))
    asked = found._replace(truth_segments=found.truth_segments[~is_missed], truth_cell=found.truth_cell[~is_missed])
    right.append(1.0 if is_missed.all() else _mean_ap(asked, threshold))
    return np.array([now, *(np.array([*removed, *right]) - now)])


def _take(found: _Sorted, rows: np.ndarray) -> _Sorted:
    """These predictions only, sorted again. Of what belongs to predictions, only what `_mean_ap` needs."""
    rows = rows[np.lexsort((found.rank[rows], found.cell[rows]))]
    return found._replace(segments=found.segments[rows], cell=found.cell[rows], rank=found.rank[rows])


def _mean_ap(found: _Sorted, threshold: float) -> float:
    thresholds = np.array([threshold])
    taken, _ = _match(found.segments, found.cell, found.truth_segments, found.truth_cell, thresholds, np.array([1]))
    precisions = [
        _average_precision(taken[:, own] >= 0, num_truths)
        for own, num_truths in zip(found.by_class(), found.truths_of_class, strict=True)
        if num_truths
    ]
    return float(np.mean(precisions))


# --- Moments --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MomentMetrics:
    """What `evaluate_moments` found, for K values of `top_k` and T tIoU thresholds. All values are fractions in [0, 1].

    Attributes:
        top_k: (K,) and tiou_thresholds: (T,), as given.
        recall: (K, T) "R@k, tIoU = t": the share of the queries for which one of the k best moments has at least this tIoU with
            one of the answers.
        mean_tiou: the mean tIoU of the best scored moment with the answer that it overlaps most; 0 where there is no moment.
        num_queries: queries with an answer, which are those that count.
        num_unanswerable: queries without one, which do not.
    """

    top_k: np.ndarray
    tiou_thresholds: np.ndarray
    recall: np.ndarray
    mean_tiou: float
    num_queries: int
    num_unanswerable: int

    def to_dict(self) -> dict[str, float]:
        """Plain floats under flat names: "recall_1_50" (R@1 at tIoU 0.50) and so on, and "mean_tiou"."""
        values = {}
        for k, row in zip(self.top_k, self.recall, strict=True):
            for threshold, value in zip(self.tiou_thresholds, row, strict=True):
                values[f"recall_{k}_{100 * threshold:g}"] = float(value)
        return {**values, "mean_tiou": self.mean_tiou}

    def __str__(self) -> str:
        rows = [["", *(f"tIoU {threshold:g}" for threshold in self.tiou_thresholds)]]
        for k, values in zip(self.top_k, self.recall, strict=True):
            rows.append([f"R@{k}", *(f"{100 * value:.2f}%" for value in values)])
        lines = ["  ".join(f"{cell:>9}" for cell in row) for row in rows]
        lines.append(
            f"{self.num_queries} queries ({self.num_unanswerable} more without an answer), mean tIoU {100 * self.mean_tiou:.2f}%"
        )
        return "\n".join(lines)


def evaluate_moments(
    predictions: Mapping[Hashable, Mapping[str, ArrayLike]],
    ground_truth: Mapping[Hashable, ArrayLike],
    top_k: int | Sequence[int] = (1, 5),
    tiou_thresholds: float | Sequence[float] = (0.3, 0.5, 0.7),
) -> MomentMetrics:
    """Recall of retrieved moments, as temporal grounding reports it (Gao et al., "TALL: Temporal Activity Localization via
    Language Query", ICCV 2017, https://arxiv.org/abs/1705.02101).

    Moments of equal score count in the order given.

    Args:
        predictions: {query id: {"segments": (N, 2) start and end in seconds, "scores": (N,)}}, or the rows of
            `pipeline("moment-retrieval")` for it, [{"start", "end", "score"}, ...]; an id is what tells queries apart, such as (recording, number of the query). N may be 0, and a query that is missing has found nothing.
        ground_truth: {query id: (M, 2) seconds}, or {query id: {"segments": (M, 2)}}. M is 0 where a query has no answer.
        top_k: one or several whole numbers >= 1.
        tiou_thresholds: one or several numbers in (0, 1].

    Raises:
        ValueError: no query has an answer; predictions of queries that the ground truth lacks; shapes that do not fit; values
            that are not finite; an end before its start; thresholds or top_k out of range. Messages name the query.
    """
    tiou_thresholds = _thresholds(tiou_thresholds)
    top_k = _whole_numbers(top_k)
    truth = {query: one["segments"] if isinstance(one, Mapping) else one for query, one in ground_truth.items()}
    truth = _flatten({query: _as_detections(one) for query, one in truth.items()}, "ground_truth", with_scores=False)
    if len(truth.segments) == 0:
        raise ValueError(
            f"None of the {len(ground_truth)} queries of ground_truth has an answer: there is nothing to find."
        )
    if unknown := [query for query in predictions if query not in ground_truth]:
        raise ValueError(
            f"predictions has {len(unknown)} queries that ground_truth lacks, such as {unknown[0]!r}; give the ids of the same "
            "queries."
        )
    given = {query: _as_moments(one, query) for query, one in predictions.items()}
    given = _flatten(given, "predictions", with_scores=True)

    number = {query: row for row, query in enumerate(ground_truth)}
    queries = np.array([number[query] for query in predictions], dtype=np.int64)[given.videos]
    order = np.lexsort((-given.scores, queries))  # stable: of equal scores the one given first
    segments, edges = given.segments[order], np.searchsorted(queries[order], np.arange(len(ground_truth) + 1))
    truth_edges = np.searchsorted(truth.videos, np.arange(len(ground_truth) + 1))
    first = np.zeros(len(ground_truth))
    best = np.zeros((len(top_k), len(ground_truth)))
    for row in np.unique(truth.videos):
        own = segments[edges[row] : edges[row + 1]][: top_k.max()]
        if len(own) == 0:
            continue
        starts, ends = truth.segments[truth_edges[row] : truth_edges[row + 1]].T
        tiou = _tiou(own[:, 0, None], own[:, 1, None], starts, ends).max(axis=1)
        first[row] = tiou[0]
        best[:, row] = [tiou[:k].max() for k in top_k]
    answerable = np.unique(truth.videos)
    return MomentMetrics(
        top_k=top_k,
        tiou_thresholds=tiou_thresholds,
        recall=(best[:, None, answerable] >= tiou_thresholds[:, None]).mean(axis=-1),
        mean_tiou=float(first[answerable].mean()),
        num_queries=len(answerable),
        num_unanswerable=len(ground_truth) - len(answerable),
    )


def _as_moments(found: Any, query: Hashable) -> dict[str, ArrayLike]:
    if isinstance(found, Mapping) and {"segments", "scores"} <= {*found}:
        return {**found, "labels": np.zeros(len(found["scores"]), np.int64)}
    rows = [] if isinstance(found, Mapping) or not isinstance(found, Sequence) else found
    if not isinstance(found, Sequence) or not all(
        isinstance(r, Mapping) and {"start", "end", "score"} <= {*r} for r in rows
    ):
        raise ValueError(
            f"predictions[{query!r}] must be a dictionary with the keys ['segments', 'scores'], or a list of dictionaries with "
            "start, end and score."
        )
    segments, scores = [(row["start"], row["end"]) for row in rows], [row["score"] for row in rows]
    return {"segments": segments, "scores": scores, "labels": np.zeros(len(rows), np.int64)}


def _as_detections(segments: ArrayLike) -> dict[str, ArrayLike]:
    return {"segments": segments, "labels": np.zeros(len(segments), np.int64)}


def _thresholds(values: float | Sequence[float]) -> np.ndarray:
    values = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if values.size == 0 or not ((values > 0) & (values <= 1)).all():
        raise ValueError(f"tiou_thresholds must be one or more numbers in (0, 1], but are {values.tolist()}.")
    return values


def _whole_numbers(values: int | Sequence[int]) -> np.ndarray:
    values = np.atleast_1d(np.asarray(values))
    if values.size == 0 or values.dtype.kind not in "iu" or (values < 1).any():
        raise ValueError(f"top_k must be one or more whole numbers >= 1, but is {values.tolist()}.")
    return values
