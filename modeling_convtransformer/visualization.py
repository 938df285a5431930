"""Pictures of what a detector finds, of its scores and of its errors. Needs matplotlib:
`pip install "modeling-convtransformer[demo]"`.

    figure = plot_timeline(predictions, model.config.id2label, ground_truth)
    save_figure(figure, "timeline.png")

All functions return a `matplotlib.figure.Figure` that belongs to nobody: no pyplot, no window, no global setting. A class
has the same colour in every picture. docs/looking.md shows how to read them.
"""

import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .evaluation import FATES, KINDS, ErrorProfile, PrecisionRecall
from .feature_extraction_convtransformer import _sigmoid, _to_array, _to_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "class_colour",
    "plot_error_profile",
    "plot_precision_recall",
    "plot_scores",
    "plot_timeline",
    "save_figure",
]

# Okabe and Ito's colours ("Color Universal Design", 2008) and four of Tol's ("Colour Schemes", 2021) that stay apart from
# them, and from one another, for readers who do not see red or green.
_COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"),
    *("#332288", "#DDCC77", "#882255", "#661100"),
)
_LINES = ("-", "--", ":")
_TRUTH = "#404040"

# One colour for each of KINDS, and for each of FATES, which are the same seen from the side of the truths.
_KIND_COLOURS = ("#009E73", "#56B4E9", "#D55E00", "#F0E442", "#AA4499", "#B0B0B0")

# Letters of a line; wider names are wrapped.
_NAME_WIDTH = 24


def class_colour(label: int) -> str:
    """The colour of a class id in all pictures, "#rrggbb". Ten classes differ in hue, the next ten are darker, and the next
    ten lighter; then it begins again."""
    value = np.array([int(_COLOURS[label % len(_COLOURS)][place : place + 2], 16) for place in (1, 3, 5)])
    shade = label // len(_COLOURS) % 3
    value = (value, 0.6 * value, 0.5 * value + 127.5)[shade]
    return "#" + "".join(f"{round(channel):02X}" for channel in value)


def save_figure(figure: "Figure", path: str | os.PathLike, dpi: int = 150) -> Path:
    """Writes a figure in the format that the path's ending names (.png, .svg, .pdf), under a temporary name first.

    Returns:
        the path.

    Raises:
        ValueError: matplotlib does not know the format.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        figure.savefig(temporary, dpi=dpi)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


# --- Segments over time ---------------------------------------------------------------------------------------------


def plot_timeline(
    predictions: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    id2label: Mapping[int, str],
    ground_truth: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    duration: float | None = None,
    title: str = "",
    min_score: float | None = None,
) -> "Figure":
    """
    The segments of one recording on a time axis: one row for each class that is present, in it the truth as a dark line and
    below it the predictions, the paler the lower their score. Predictions that overlap share the row's height.

    Args:
        predictions: `{"segments": (N, 2) seconds, "labels": (N,) class ids, "scores": (N,)}`, as the feature extractor's
            `post_process_temporal_action_localization` returns it; or the pipeline's `[{"label", "score", "start",
            "end"}, ...]`.
        id2label: names of the classes.
        ground_truth: `{"segments": (M, 2) seconds, "labels": (M,)}`, or rows like the pipeline's without a score, if known.
        duration: seconds of the recording; default: up to the last end.
        min_score: leave out predictions with a score below this.

    Raises:
        ValueError: a key is missing, a class is not in `id2label`, or a score lies outside [0, 1].
    """
    found = _as_arrays(predictions, id2label, "predictions", with_scores=True)
    truth = None if ground_truth is None else _as_arrays(ground_truth, id2label, "ground_truth", with_scores=False)
    if min_score is not None:
        found = {name: values[found["scores"] >= min_score] for name, values in found.items()}
    if ((found["scores"] < 0) | (found["scores"] > 1)).any():
        raise ValueError("predictions: scores must lie in [0, 1]: they are drawn as opacity.")
    sides = [found] if truth is None else [found, truth]
    present = sorted({int(label) for side in sides for label in side["labels"]})
    last = max([duration or 0.0, *(float(side["segments"].max(initial=0.0)) for side in sides)])

    # Rows of 0.42 inches are easy to tell apart; many classes get lower ones, so that the picture fits a screen.
    row = 0.42 if len(present) <= 24 else max(0.2, 10 / len(present))
    figure, (axes,) = _figure(width=10, height=max(1, len(present)) * row + 0.85 + 0.25 * bool(title))
    split = 0.0 if truth is None else 0.3  # of a row's height, for the truth
    for place, label in enumerate(present):
        if place % 2:
            axes.axhspan(place - 0.5, place + 0.5, color="#F4F4F4", linewidth=0, zorder=0)
        if truth is not None:
            own = truth["segments"][truth["labels"] == label]
            _bars(axes, own, place - 0.42 + split / 2, 0.6 * split, _TRUTH, np.ones(len(own)))
        own, scores = (found[name][found["labels"] == label] for name in ("segments", "scores"))
        lanes = _lanes(own[:, 0].tolist(), own[:, 1].tolist(), scores.tolist())
        height = (0.84 - split) / (max(lanes, default=0) + 1)
        places = place - 0.42 + split + height * (np.array(lanes) + 0.5)
        _bars(axes, own, places, 0.9 * height, class_colour(label), 0.2 + 0.8 * scores)
    shape = (_NAME_WIDTH, 2) if row > 0.4 else (38, 1)
    axes.set_yticks(range(len(present)), [_name(id2label[label], *shape) for label in present])
    axes.tick_params(axis="y", length=0, labelsize=9 if row > 0.3 else 7)
    axes.set_ylim(max(1, len(present)) - 0.5, -0.5)
    if not present:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no segments", transform=axes.transAxes, ha="center", va="center", color="#666666")
    axes.spines["left"].set_visible(False)
    _time_axis(axes, last)
    if title:
        axes.set_title(_name(title, width=60, lines=1), loc="left", fontsize=11)
    if truth is not None and present:
        _timeline_legend(axes)
    return figure


def _bars(axes: "Axes", segments: np.ndarray, places, height: float, colour: str, opacities: np.ndarray):
    from matplotlib.colors import to_rgba

    # A thin edge in the same colour: a segment of 2 s in an hour is narrower than a pixel, and must be seen.
    colours = [to_rgba(colour, float(np.clip(opacity, 0, 1))) for opacity in opacities]
    axes.barh(
        np.broadcast_to(places, len(segments)),
        segments[:, 1] - segments[:, 0],
        left=segments[:, 0],
        height=height,
        color=colours,
        edgecolor=colours,
        linewidth=0.6,
        zorder=2,
    )


def _timeline_legend(axes: "Axes"):
    from matplotlib.patches import Patch

    handles = [
        Patch(color=_TRUTH, label="truth"),
        Patch(color=_COLOURS[0], label="predicted"),
        Patch(color=_COLOURS[0], alpha=0.35, label="with a low score"),
    ]
    axes.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=3,
        fontsize=8,
        frameon=False,
        handlelength=1.2,
        borderaxespad=0.2,
        columnspacing=1.2,
    )


def _as_arrays(given: Any, id2label: Mapping[int, str], name: str, with_scores: bool) -> dict[str, np.ndarray]:
    """Segments (N, 2), labels (N,) and, if wanted, scores (N,) of arrays or of the pipeline's rows."""
    keys = ("segments", "labels", "scores") if with_scores else ("segments", "labels")
    if not isinstance(given, Mapping):
        wanted = ("label", "start", "end", "score") if with_scores else ("label", "start", "end")
        if not isinstance(given, Sequence) or not all(
            isinstance(row, Mapping) and {*wanted} <= {*row} for row in given
        ):
            raise ValueError(f"{name} must be a dictionary with {list(keys)}, or rows with {list(wanted)}.")
        label2id = {text: label for label, text in id2label.items()}
        if unknown := sorted({str(row["label"]) for row in given if row["label"] not in label2id}):
            raise ValueError(f"{name} has classes that id2label lacks: {', '.join(unknown)}.")
        given = {
            "segments": [(row["start"], row["end"]) for row in given],
            "labels": [label2id[row["label"]] for row in given],
            "scores": [row.get("score", 1.0) for row in given],
        }
    if missing := [key for key in keys if key not in given]:
        raise ValueError(f"{name} lacks {', '.join(missing)}; expected a dictionary with {list(keys)}.")
    arrays = {key: _to_array(given[key]) for key in keys}
    arrays["segments"] = arrays["segments"].reshape(-1, 2).astype(np.float64)
    arrays["labels"] = arrays["labels"].reshape(-1).astype(np.int64)
    if with_scores:
        arrays["scores"] = arrays["scores"].reshape(-1).astype(np.float64)
    if len({len(values) for values in arrays.values()}) > 1:
        raise ValueError(f"{name}: {', '.join(f'{len(values)} {key}' for key, values in arrays.items())} do not fit.")
    if unknown := sorted({*arrays["labels"].tolist()} - {*id2label}):
        raise ValueError(f"{name} has class ids that id2label lacks: {unknown}.")
    return arrays


def _lanes(starts: list[float], ends: list[float], scores: list[float]) -> list[int]:
    """The first free lane for each segment, so that none covers another; the best segments get the first lanes."""
    lanes = [0] * len(starts)
    placed: list[int] = []
    for index in sorted(range(len(starts)), key=lambda index: -scores[index]):
        taken = {lanes[other] for other in placed if starts[index] < ends[other] and starts[other] < ends[index]}
        lanes[index] = next(lane for lane in range(len(starts)) if lane not in taken)
        placed.append(index)
    return lanes


# --- Scores over time -----------------------------------------------------------------------------------------------


def plot_scores(
    outputs: Any,
    geometry: Mapping[str, float],
    strides: Sequence[int],
    id2label: Mapping[int, str],
    ground_truth: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    title: str = "",
    min_score: float = 0.1,
) -> "Figure":
    """
    What the detector says before anything is suppressed: the score of each class at each point of time, one picture for
    each level of the pyramid, finest first. Long segments show on coarse levels, short ones on fine levels.

    Args:
        outputs: of `ConvTransformerForTemporalActionLocalization` for one recording, or the same as arrays: `logits`
            (1, points, classes), `point_levels` (1, points) and, if points may be padding, `point_mask` (1, points).
        geometry: `{"fps", "feature_stride", "num_frames", "duration"}` of the recording, as the feature extractor returns
            it. Point `i` of a level with stride `s` lies at `(i * s * feature_stride + 0.5 * num_frames) / fps` seconds.
        strides: of the levels, in features: `model.config.detector_strides`.
        id2label: names of the classes.
        ground_truth: as in `plot_timeline`; shaded in the colours of the classes.
        min_score: classes that reach this score nowhere are left out.

    Raises:
        ValueError: outputs of several recordings, or with levels that `strides` lacks; a geometry without one of its
            numbers.
    """
    get = outputs.get if isinstance(outputs, Mapping) else lambda name: getattr(outputs, name, None)
    logits, levels, mask = (get(name) for name in ("logits", "point_levels", "point_mask"))
    if logits is None or levels is None:
        raise ValueError(
            "The outputs need logits and point_levels, as ConvTransformerForTemporalActionLocalization has."
        )
    logits, levels = _to_array(logits).astype(np.float32), _to_array(levels)
    mask = np.ones(levels.shape, bool) if mask is None else _to_array(mask) > 0
    if logits.ndim != 3 or len(logits) != 1 or levels.shape != logits.shape[:2] or mask.shape != levels.shape:
        raise ValueError(
            f"Expected logits (1, points, classes) and point_levels and point_mask (1, points) of one recording, but found "
            f"{logits.shape}, {levels.shape} and {mask.shape}."
        )
    if levels.max(initial=0) >= len(strides):
        raise ValueError(
            f"The outputs have {levels.max() + 1} levels, but there are {len(strides)} strides: give config.detector_strides."
        )
    if missing := [name for name in ("fps", "feature_stride", "num_frames") if geometry.get(name) is None]:
        raise ValueError(f"geometry lacks {', '.join(missing)}.")
    scores, levels, mask = _sigmoid(logits[0]), levels[0], mask[0]
    truth = None if ground_truth is None else _as_arrays(ground_truth, id2label, "ground_truth", with_scores=False)
    present = [label for label in range(scores.shape[1]) if scores[mask, label].max(initial=0) >= min_score]
    shown = sorted({*present, *(truth["labels"].tolist() if truth else [])})

    curves = []
    for level, stride in enumerate(strides):
        own = levels == level  # points of a level stand in order of time, padding last
        seconds = _to_seconds(np.arange(own.sum()) * stride, geometry)
        curves.append((seconds[mask[own]], scores[own][mask[own]]))
    last = max([geometry.get("duration") or 0.0, *(float(seconds.max(initial=0)) for seconds, _ in curves)])
    figure, rows = _figure(width=10, height=0.95 * len(strides) + 1.1, rows=len(strides))
    for axes, stride, (seconds, values) in zip(rows, strides, curves, strict=True):
        for start, end, label in zip(*truth["segments"].T, truth["labels"], strict=True) if truth else ():
            axes.axvspan(start, end, color=class_colour(label), alpha=0.18, linewidth=0)
        for label in present:
            axes.plot(
                seconds,
                values[:, label],
                color=class_colour(label),
                linestyle=_line(label),
                linewidth=1.1,
                marker="o" if len(seconds) < 40 else None,
                markersize=2.5,
                label=id2label[label],
            )
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.5, 1])
        every = stride * geometry["feature_stride"] / geometry["fps"]
        axes.set_ylabel(f"every {every:.3g} s", fontsize=8, rotation=0, ha="right", va="center")
        axes.tick_params(labelsize=8)
        _time_axis(axes, last, is_labelled=axes is rows[-1])
    if title:
        rows[0].set_title(_name(title, width=90, lines=1), loc="left", fontsize=11)
    _class_legend(figure, shown, id2label)
    return figure


# --- Curves and errors ----------------------------------------------------------------------------------------------


def plot_precision_recall(
    curves: Mapping[int, PrecisionRecall], id2label: Mapping[int, str], title: str = "", columns: int = 5
) -> "Figure":
    """
    Precision over recall, one small picture for each class, the lowest average precision first: the line is the precision
    itself, the area below the interpolated one is average precision.

    Args:
        curves: what `evaluation.precision_recall` returns.
        id2label: names of the classes.
        columns: pictures side by side.
    """
    order = sorted(curves, key=lambda label: (curves[label].ap, label))
    columns = max(1, min(columns, len(order)))
    count = max(1, -(-len(order) // columns))
    figure, grid = _figure(width=2.0 * columns + 0.5, height=1.95 * count + 0.35, rows=count, columns=columns)
    for axes, label in zip(grid, order, strict=False):
        curve, colour = curves[label], class_colour(label)
        # Precision before the first prediction is that at recall 0.
        recall = np.concatenate([[0.0], curve.recall])
        axes.fill_between(
            recall, np.append(curve.interpolated, 0.0), step="post", color=colour, alpha=0.2, linewidth=0
        )
        axes.plot(curve.recall, curve.precision, color=colour, linewidth=1.2)
        axes.set_title(
            f"{_name(id2label[label])}\nAP {100 * curve.ap:.1f} %, {curve.num_truths} truths", fontsize=7.5, loc="left"
        )
    for place, axes in enumerate(grid):
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.tick_params(labelsize=7)
        axes.set_visible(place < len(order))
        if place % columns == 0:
            axes.set_ylabel("precision", fontsize=7.5)
        if place + columns >= len(order):
            axes.set_xlabel("recall", fontsize=7.5)
    if title:
        figure.suptitle(_name(title, width=20 * columns), fontsize=11)
    return figure


def plot_error_profile(profile: ErrorProfile, title: str = "") -> "Figure":
    """
    Three pictures of `evaluation.profile_errors`: kinds of predictions by multiples of the number of truths G; what average
    mAP would gain without each kind of error, and if it were put right; what becomes of truths, by their length.
    """
    from matplotlib.patches import Patch

    figure, (left, middle, right) = _figure(width=11, height=4.2 + 0.25 * bool(title), columns=3, ratios=(5, 4, 4))
    counts = profile.counts.sum(axis=1)
    counts = counts[: int(np.flatnonzero(counts.any(axis=1)).max(initial=0)) + 1]
    _stack(left, counts, [f"{multiple}G" for multiple in range(1, len(counts) + 1)], KINDS)
    left.set_title("predictions, best first", loc="left", fontsize=10)
    left.set_xlabel("G predictions at a time (G: a class's truths)", fontsize=9)
    left.set_ylabel("share of predictions, %", fontsize=9)

    names = [*KINDS[1:], "missed"]
    places = np.arange(len(names))
    gains = 100 * profile.gain_if_right
    middle.barh(places - 0.19, gains, height=0.36, color=[*_KIND_COLOURS[1:], _TRUTH])
    middle.barh(places[:-1] + 0.19, 100 * profile.gain_if_removed, height=0.36, color=_KIND_COLOURS[1:], alpha=0.45)
    for place, value in [*zip(places - 0.19, gains, strict=True), *zip(places + 0.19, 100 * profile.gain_if_removed)]:  # noqa: B905
        middle.text(value, place, f" {value:.1f}", va="center", fontsize=7.5)
    middle.set_yticks(places, names, fontsize=8.5)
    middle.invert_yaxis()
    middle.set_xlim(0, max(1.0, 1.2 * gains.max()))  # putting right gains at least as much as removing
    middle.set_title(f"lost of average mAP ({100 * profile.average_map:.1f} %)", loc="left", fontsize=10)
    middle.set_xlabel("points of average mAP won\nif put right (full) or removed (pale)", fontsize=9)

    fates = profile.fates.sum(axis=0)
    names = [
        f"{name.replace('to ', 'to' + chr(10)).replace('from ', 'from' + chr(10))}\n({row.sum()})"
        for name, row in zip(profile.length_names, fates, strict=True)
    ]
    _stack(right, fates, names, FATES, colours=(*_KIND_COLOURS[:-1], _TRUTH))
    right.set_title("truths, by length", loc="left", fontsize=10)
    right.set_xlabel("length (number of truths)", fontsize=9)
    right.set_ylabel("share of truths, %", fontsize=9)

    texts = [kind if kind == fate else f"{kind} / {fate}" for kind, fate in zip(KINDS[:-1], FATES, strict=False)]
    handles = [
        Patch(color=colour, label=text) for colour, text in zip(_KIND_COLOURS, [*texts, KINDS[-1]], strict=True)
    ]
    handles.append(Patch(color=_TRUTH, label=FATES[-1]))
    figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize=8, frameon=False, handlelength=1.2)
    if title:
        figure.suptitle(_name(title, width=90), fontsize=11)
    return figure


def _stack(axes: "Axes", counts: np.ndarray, names: Sequence[str], kinds: Sequence[str], colours=_KIND_COLOURS):
    """Bars of 100 % for the rows of counts (bars, kinds); a row of zeros has no bar."""
    shares = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    below = np.zeros(len(shares))
    for kind, colour, values in zip(kinds, colours, shares.T, strict=True):
        axes.bar(range(len(shares)), values, bottom=below, color=colour, width=0.8, label=kind)
        below = below + values
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(0, 100)


# --- What the pictures share ----------------------------------------------------------------------------------------


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, ratios: Sequence[float] | None = None):
    """A figure and the list of its axes, row by row; rows share their time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, width_ratios=ratios)
    for axes in grid.flat:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, list(grid.flat)


def _line(label: int) -> str:
    return _LINES[label // len(_COLOURS) % len(_LINES)]


def _name(text: str, width: int = _NAME_WIDTH, lines: int = 2) -> str:
    """A name that fits: wrapped, and without its middle if it is long, because names often differ at the end."""
    text = " ".join(str(text).split())
    if len(textwrap.wrap(text, width)) > lines:
        half = (width * lines - 6 * lines) // 2
        head, tail = text[:half].rpartition(" ")[0] or text[:half], text[-half:].partition(" ")[2] or text[-half:]
        text = f"{head} ... {tail}"
    # A "$" would begin a formula.
    return "\n".join(textwrap.wrap(text, width)[:lines]).replace("$", r"\$")


def _time_axis(axes: "Axes", last: float, is_labelled: bool = True):
    """From 0 to `last` seconds; minutes and hours where these are easier to read."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    last = last or 1.0
    axes.set_xlim(0, last)
    if last < 120:
        axes.set_xlabel("seconds" if is_labelled else "", fontsize=9)
    else:
        steps: Iterable[int] = (
            15,
            30,
            60,
            120,
            300,
            600,
            900,
            1800,
            3600,
            7200,
            14400,
            6 * 3600,
            12 * 3600,
            24 * 3600,
        )
        step = next((step for step in steps if last / step <= 12), 24 * 3600 * -(-last // (12 * 24 * 3600)))
        axes.xaxis.set_major_locator(MultipleLocator(step))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _clock(value, with_hours=last >= 3600)))
        unit = "hours:minutes:seconds" if last >= 3600 else "minutes:seconds"
        axes.set_xlabel(unit if is_labelled else "", fontsize=9)
    axes.tick_params(axis="x", labelsize=8, labelbottom=is_labelled)


def _clock(seconds: float, with_hours: bool) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if with_hours else f"{minutes}:{seconds:02d}"


def _class_legend(figure: "Figure", labels: Sequence[int], id2label: Mapping[int, str]):
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=class_colour(label), linestyle=_line(label), linewidth=2, label=_name(id2label[label]))
        for label in labels
    ]
    if handles:
        longest = max(min(_NAME_WIDTH, len(str(id2label[label]))) for label in labels)
        columns = max(1, min(len(handles), 150 // (longest + 9)))  # the picture is some 150 small letters wide
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
