"""Mean average precision and recall of detected segments, by the ActivityNet detection protocol; recall of moments that
queries describe.

    metrics = evaluate_detections(predictions, ground_truth)
    print(metrics)                # a table, one row per tIoU threshold
    metrics.average_map           # the number that papers report as "avg. mAP"
    metrics.to_dict()             # flat and JSON-ready, e.g. for a Trainer's compute_metrics

The protocol is that of Caba Heilbron et al., "ActivityNet: A Large-Scale Video Benchmark for Human Activity
Understanding" (CVPR 2015), in the form that ActionFormer (Zhang et al., ECCV 2022) reports. tIoU, the temporal
intersection over union of two segments, is the length of their overlap divided by the length that they cover together.
"""

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["DetectionMetrics", "MomentMetrics", "evaluate_detections", "evaluate_moments", "remove_duplicates"]


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

    # A cell is one class in one video: all that can match. Cells are numbered class by class, so that sorting by cell
    # also groups by class, and each class has one more cell for the videos that the ground truth lacks.
    cells_per_class = len(ground_truth) + 1
    truth_cell = np.searchsorted(classes, truth.labels) * cells_per_class + truth.videos
    order = np.argsort(truth_cell, kind="stable")
    truth_cell, truth_segments = truth_cell[order], truth.segments[order]

    by_score = np.argsort(-given.scores, kind="stable")
    by_score = by_score[known_class[by_score]]
    cell = np.searchsorted(classes, given.labels[by_score]) * cells_per_class + given.videos[by_score]
    rank = np.argsort(cell, kind="stable")  # by cell, and in each cell by falling score; the value is the overall rank
    cell, segments = cell[rank], given.segments[by_score][rank]

    is_correct, is_recalled = _match(segments, cell, truth_segments, truth_cell, tiou_thresholds, top_k)

    class_edges = np.arange(len(classes) + 1) * cells_per_class
    first_truth = np.searchsorted(truth_cell, class_edges)
    first_prediction = np.searchsorted(cell, class_edges)
    truths_of_class = np.diff(first_truth)
    recall_per_class = np.add.reduceat(is_recalled, first_truth[:-1], axis=-1, dtype=np.int64) / truths_of_class
    ap = np.zeros((len(tiou_thresholds), len(classes)))
    for index, (start, stop) in enumerate(pairwise(first_prediction)):
        falling_score = start + np.argsort(rank[start:stop])
        ap[:, index] = _average_precision(is_correct[:, falling_score], truths_of_class[index])

    return DetectionMetrics(
        tiou_thresholds=tiou_thresholds,
        top_k=top_k,
        classes=classes,
        map=ap.mean(axis=1),
        average_map=float(ap.mean(axis=1).mean()),
        ap=ap,
        recall=recall_per_class.mean(axis=2),
        recall_per_class=recall_per_class,
        num_ground_truth=len(truth_cell),
        num_predictions=len(given.labels),
        num_unknown_videos=num_unknown_videos,
        num_unknown_classes=int((~known_class).sum()),
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
        is_correct (T, P): the prediction is a true positive at the threshold.
        is_recalled (T, K, M): the truth is met by one of the k * n best predictions of its cell, n truths in the cell.
    """
    is_correct = np.zeros((len(tiou_thresholds), len(segments)), dtype=bool)
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
            is_correct[:, prediction] = hit

            is_kept = step < top_k[:, None] * num_truths[group[:active]]
            np.maximum(best_tiou[:, :active], tiou, out=best_tiou[:, :active], where=is_kept[:, :, None])

        is_recalled[:, :, truth[is_truth]] = best_tiou[:, is_truth] >= tiou_thresholds[:, None, None]
    return is_correct, is_recalled


def _tiou(start_a: np.ndarray, end_a: np.ndarray, start_b: np.ndarray, end_b: np.ndarray) -> np.ndarray:
    """Temporal intersection over union of segments a and b (any shapes that broadcast); 0 if both have length 0."""
    intersection = np.maximum(np.minimum(end_a, end_b) - np.maximum(start_a, start_b), 0.0)
    union = (end_b - start_b) + (end_a - start_a) - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def _average_precision(is_correct: np.ndarray, num_truths: int) -> np.ndarray:
    """Interpolated average precision (T,) of predictions by falling score, given which ones are correct (T, N)."""
    precision = np.cumsum(is_correct, axis=1) / np.arange(1, is_correct.shape[1] + 1)
    interpolated = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    # Recall rises by 1 / num_truths at each correct prediction and nowhere else.
    return (interpolated * is_correct).sum(axis=1) / num_truths


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
