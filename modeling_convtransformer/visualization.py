"""Pictures of segments over time. Needs matplotlib: `pip install "modeling-convtransformer[demo]"`."""

import os
from pathlib import Path


def plot_timeline(
    predictions: dict,
    path: str | Path,
    id2label: dict[int, str],
    ground_truth: dict | None = None,
    duration: float | None = None,
    title: str = "",
) -> Path:
    """
    Draws the segments of one recording on a time axis: ground truth above, predictions below, one colour a class, the
    paler the lower the score.

    Args:
        predictions: `{"segments": (N, 2) seconds, "labels": (N,), "scores": (N,)}`.
        path: picture to write (.png, .svg, .pdf); written under a temporary name and renamed.
        id2label: names of the classes.
        ground_truth: `{"segments": (M, 2) seconds, "labels": (M,)}`, if known.
        duration: seconds of the recording; default: up to the last end.

    Returns:
        the path.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    rows = (
        [("predicted", predictions)] if ground_truth is None else [("truth", ground_truth), ("predicted", predictions)]
    )
    present = sorted({int(label) for _, row in rows for label in row["labels"]})
    colours = {label: plt.get_cmap("tab10" if len(id2label) <= 10 else "tab20")(label % 20) for label in present}

    figure, axes = plt.subplots(figsize=(12, 0.75 * len(rows) + 1.3), layout="constrained")
    last = duration or 0.0
    for height, (_, row) in enumerate(reversed(rows)):
        starts, ends = ([float(pair[end]) for pair in row["segments"]] for end in (0, 1))
        scores = [float(score) for score in row["scores"]] if "scores" in row else [1.0] * len(starts)
        lanes = _lanes(starts, ends, scores)
        thickness = 0.8 / (max(lanes, default=0) + 1)
        for start, end, label, score, lane in zip(starts, ends, row["labels"], scores, lanes, strict=True):
            axes.barh(
                height + 0.4 - thickness * (lane + 0.5),
                end - start,
                left=start,
                height=0.94 * thickness,
                color=colours[int(label)],
                alpha=0.2 + 0.8 * score,
            )
            last = max(last, end)
    axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
    axes.set_xlim(0, last)
    axes.set_xlabel("seconds")
    axes.set_title(title, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    handles = [Patch(color=colours[label], label=id2label[label]) for label in present]
    longest = max((len(id2label[label]) for label in present), default=0)
    columns = max(1, min(len(handles), 130 // (longest + 9)))  # the picture is some 130 letters wide
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    figure.savefig(temporary, dpi=150)
    plt.close(figure)
    os.replace(temporary, path)
    return path


def _lanes(starts: list[float], ends: list[float], scores: list[float]) -> list[int]:
    """The first free lane for each segment, so that none covers another; the best segments get the first lanes."""
    lanes = [0] * len(starts)
    placed: list[int] = []
    for index in sorted(range(len(starts)), key=lambda index: -scores[index]):
        taken = {lanes[other] for other in placed if starts[index] < ends[other] and starts[other] < ends[index]}
        lanes[index] = next(lane for lane in range(len(starts)) if lane not in taken)
        placed.append(index)
    return lanes
