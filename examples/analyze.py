"""Look at what a detector finds and where it errs: one HTML page that needs nothing else, to open, send or print.

    python examples/analyze.py report.html --predictions found.json --annotations thumos14.json --subset test
    python examples/analyze.py report.html --model outputs/thumos --annotations thumos14.json --subset test --features i3d
    python examples/analyze.py report.html --model outputs/sbhar --annotations annotations.json --subset validation \\
        --signals signals.npz
    python examples/analyze.py report.html --model outputs/watch/model --watch 8 9 10

Either there are predictions, or a model finds them (--save keeps them). Files are annotations and results in ActivityNet's
format, CSV, or JSON: {recording: [{"label", "start", "end", "score"}, ...]} as the pipeline gives rows (docs/segments.md), or
{recording: {"segments", "labels", "scores"}} as modeling_convtransformer.evaluation takes them.

docs/looking.md says how to read the page.
"""

import argparse
import base64
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging

from modeling_convtransformer import ConvTransformerFeatureExtractor, ConvTransformerForTemporalActionLocalization
from modeling_convtransformer.data import (
    DataCollator,
    SensorDataset,
    TemporalActionDataset,
    WatchDataset,
    label_names,
    load_annotations,
)
from modeling_convtransformer.evaluation import (
    FATES,
    KINDS,
    DetectionMetrics,
    ErrorProfile,
    PrecisionRecall,
    evaluate_detections,
    precision_recall,
    profile_errors,
)
from modeling_convtransformer.segments import read_segments, to_arrays, to_rows, write_segments
from modeling_convtransformer.visualization import (
    class_colour,
    plot_error_profile,
    plot_precision_recall,
    plot_scores,
    plot_timeline,
    save_figure,
)

# A table of more classes than this is too wide for any screen.
WIDEST_TABLE = 24


class Usage(Exception):
    """What the user can mend."""


@dataclass
class Detections:
    """What there is to look at. Segments are in seconds, `{recording: {"segments", "labels", "scores"}}`."""

    predictions: dict[str, dict[str, np.ndarray]]
    ground_truth: dict[str, dict[str, np.ndarray]]
    id2label: dict[int, str]
    durations: dict[str, float | None]
    source: str
    # What the model says of a recording before anything is suppressed: (outputs, geometry, strides).
    run: Callable[[str], tuple[Any, dict, list[int]]] | None = None


# --- Files ----------------------------------------------------------------------------------------------------------


def read_recordings(path: Path) -> dict[str, list[dict]]:
    """{recording: rows} of a file that segments.py reads, or of arrays as evaluation.py takes them."""
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise Usage(f"{path} cannot be read as JSON: {error}") from error
        entries = list(content.values()) if isinstance(content, dict) else []
        if entries and all(isinstance(entry, dict) and "labels" in entry for entry in entries):
            ids = {label for entry in entries for label in entry["labels"]}
            try:
                return to_rows(content, {label: str(label) for label in ids})
            except ValueError as error:
                raise Usage(f"{path}: {error}") from error
    rows = read_segments(path)
    if not isinstance(rows, dict):
        raise Usage(f"{path} holds segments without the name of their recording; expected {{name: segments}}")
    return rows


def read_detections(predictions: Path, annotations: Path, subset: list[str] | None) -> Detections:
    found, truth = read_recordings(predictions), read_recordings(annotations)
    if without := [name for name, rows in found.items() for row in rows if "score" not in row]:
        raise Usage(f"{predictions}: predictions need a score, but some of {without[0]} have none")
    names, durations = None, {}
    if annotations.suffix == ".json" and "database" in json.loads(annotations.read_text(encoding="utf-8")):
        content = load_annotations(annotations)
        names = label_names(content)
        database = content["database"]
        if subset is not None:
            wanted = {name.lower() for name in subset}
            known = sorted({str(entry.get("subset")) for entry in database.values()})
            truth = {name: own for name, own in truth.items() if str(database[name].get("subset")).lower() in wanted}
            if not truth:
                raise Usage(
                    f"{annotations} has no recording of --subset {' '.join(subset)}; it has {', '.join(known)}"
                )
        durations = {name: database[name].get("duration") for name in truth}
    elif subset is not None:
        raise Usage(f"--subset needs annotations of ActivityNet's format; {annotations} names no subsets")
    in_truth, in_found = ({row["label"] for rows in one.values() for row in rows} for one in (truth, found))
    names = names or sorted(in_truth, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
    names += sorted(in_found - {*names})
    label2id = {name: label for label, name in enumerate(names)}
    num_others = len({*found} - {*truth})
    if num_others == len(found):
        raise Usage(f"{predictions} and {annotations} have no recording in common: is --subset right?")
    own = to_arrays({name: rows for name, rows in found.items() if name in truth}, label2id)
    return Detections(
        {name: {"scores": np.empty(0), **arrays} for name, arrays in own.items()},  # without rows there is no key
        to_arrays(truth, label2id),
        dict(enumerate(names)),
        durations,
        f"{predictions.name} and {annotations.name}"
        + (f", {', '.join(subset)}" if subset else "")
        + (f"; {num_others} predicted recordings that the annotations lack are left out" if num_others else ""),
    )


# --- A model --------------------------------------------------------------------------------------------------------


def load_dataset(options: argparse.Namespace, config, feature_extractor):
    """The recordings that the options name, as `examples/train.py` evaluates on them."""
    if options.watch:
        return WatchDataset(
            options.watch, 2, window=feature_extractor.num_frames, stride=feature_extractor.feature_stride
        )
    settings = {"split": options.subset, "label2id": config.label2id}
    if options.signals is None:
        return TemporalActionDataset(
            options.annotations,
            options.features,
            feature_stride=feature_extractor.feature_stride,
            num_frames=feature_extractor.num_frames,
            feature_size=feature_extractor.feature_size,
            file_prefix=options.file_prefix,
            file_ext=options.file_ext,
            resize_to=options.resize_to,
            downsample_rate=options.downsample_rate,
            skip_missing=options.skip_missing,
            **settings,
        )
    try:
        with np.load(options.signals, allow_pickle=False) as file:
            signals = dict(file)
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise Usage(f"--signals {options.signals} is no .npz file of arrays: {error}") from error
    return SensorDataset(
        signals,
        options.annotations,
        window=feature_extractor.num_frames,
        stride=feature_extractor.feature_stride,
        **settings,
    )


def run_model(options: argparse.Namespace) -> Detections:
    """What the model finds in all recordings."""
    model = ConvTransformerForTemporalActionLocalization.from_pretrained(options.model).eval().to(options.device)
    feature_extractor = ConvTransformerFeatureExtractor.from_pretrained(options.model)
    dataset = load_dataset(options, model.config, feature_extractor)
    collate = DataCollator(feature_extractor, return_metadata=True)

    @torch.no_grad()
    def run(index: int):
        batch = collate([dataset[index]])
        outputs = model(batch["input_features"].to(model.device), batch["attention_mask"].to(model.device))
        return outputs, batch["geometry"][0]

    predictions, durations = {}, {}
    for index, name in enumerate(tqdm(dataset.video_ids, desc="localize", unit="recording")):
        outputs, geometry = run(index)
        (found,) = feature_extractor.post_process_temporal_action_localization(outputs, geometry=[geometry])
        predictions[name] = {key: value.cpu().numpy() for key, value in found.items()}
        durations[name] = geometry["duration"]
    source = (
        f"people {', '.join(map(str, options.watch))} of the watch data" if options.watch else options.annotations.name
    )
    row = {name: index for index, name in enumerate(dataset.video_ids)}
    return Detections(
        predictions,
        dataset.ground_truth(),
        {int(label): name for label, name in model.config.id2label.items()},
        durations,
        f"the model {'/'.join(options.model.resolve().parts[-2:])} and {source}"
        + (f", {', '.join(options.subset)}" if options.subset else ""),
        lambda name: (*run(row[name]), model.config.detector_strides),
    )


def write(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# --- Words ----------------------------------------------------------------------------------------------------------

IN_WORDS = {
    "double detection": ("a second detection of what is already found", "if these were left out"),
    "wrong label": ("wrong labels at the right time", "if they were right"),
    "localization": ("the right label with a start or end that is too far off", "if these were right"),
    "confusion": ("wrong labels with starts or ends that are off, too", "if both were right"),
    "background": ("detections where nothing of the kind happens", "if these were left out"),
    "missed": ("segments that no detection comes near", "if these had not been asked for"),
}


def in_words(profile: ErrorProfile, id2label: Mapping[int, str]) -> list[str]:
    """What the profile says, the most expensive first."""
    lines = []
    gains = dict(zip((*KINDS[1:], "missed"), 100 * profile.gain_if_right, strict=True))
    for kind in sorted(gains, key=lambda kind: -gains[kind]):
        if gains[kind] >= 0.05:
            words, mended = IN_WORDS[kind]
            start = "Most mAP is lost to" if not lines else "Next:"
            lines.append(f"{start} {words} ({kind}): +{gains[kind]:.1f} points {mended}.")
    if not lines:
        lines.append("No kind of error costs as much as 0.05 points of mAP.")
    fates = profile.fates.sum(axis=0)
    found = fates[:, 0] / np.maximum(1, fates.sum(axis=1))
    filled = np.flatnonzero(fates.sum(axis=1))
    worst, best = filled[found[filled].argmin()], filled[found[filled].argmax()]
    if found[worst] < found[best]:
        names = profile.length_names
        lines.append(
            f"Segments of {names[worst]} are found least ({100 * found[worst]:.0f} % of {fates[worst].sum()}), those of "
            f"{names[best]} most ({100 * found[best]:.0f} % of {fates[best].sum()})."
        )
    for truth, other, count, total in confusions(profile)[:1]:
        lines.append(
            f'The most frequent confusion: "{id2label[truth]}" is taken for "{id2label[other]}" in {count} of {total} cases.'
        )
    return lines


def confusions(profile: ErrorProfile) -> list[tuple[int, int, int, int]]:
    """(true class, predicted class, times, truths of the true class), the most frequent first."""
    matrix = profile.confusion
    rows = [
        (int(profile.classes[truth]), int(profile.classes[other]), int(matrix[truth, other]), int(matrix[truth].sum()))
        for truth, other in zip(*np.nonzero(matrix[:, :-1]), strict=True)
        if truth != other
    ]
    return sorted(rows, key=lambda row: (-row[2], -row[2] / row[3], row[:2]))


def best_threshold(curves: Mapping[int, PrecisionRecall]) -> tuple[float, float, float, float] | None:
    """The score at which F1 over all classes is best, and there F1, precision and recall."""
    num_truths = sum(curve.num_truths for curve in curves.values())
    scores = np.concatenate([curve.scores for curve in curves.values()])
    is_correct = np.concatenate([np.diff(curve.recall, prepend=0.0) > 0 for curve in curves.values()])
    if not is_correct.any():
        return None
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(is_correct[order])
    is_last = np.append(scores[1:] != scores[:-1], True)  # a threshold takes all predictions of equal score
    f1 = np.where(is_last, 2 * hits / (np.arange(1, len(hits) + 1) + num_truths), 0.0)
    best = int(f1.argmax())
    return float(scores[best]), float(f1[best]), float(hits[best] / (best + 1)), float(hits[best] / num_truths)


# --- The page -------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 68rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; border-top: 1px solid #ccc; padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
p.note, figcaption { color: #555; font-size: .875rem; margin: .3rem 0; max-width: 46rem; }
.wide { overflow-x: auto; }
.wide img { width: 100%; min-width: 44rem; display: block; }
figure { margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
@media (max-width: 40rem) { th, td { padding: .25rem .4rem; } th:first-child, td:first-child { min-width: 5rem; } }
thead th { border-bottom: 2px solid #999; vertical-align: bottom; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .5em; border-radius: 2px; }
.confusion th.up { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; font-weight: normal;
  max-height: 12rem; padding: .6rem .2rem; }
.confusion td { text-align: center; border: 1px solid #eee; }
.confusion td:first-child { text-align: left; }
.pairs th, .pairs td { text-align: left; white-space: normal; }
@media print { h2 { break-after: avoid; } figure, tr { break-inside: avoid; } .wide { overflow: visible; }
  .wide img { min-width: 0; } }
"""


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


class Pictures:
    """Puts figures into the page and, if wanted, beside it.

    Args:
        folder: where each picture is written as a .png file too, or None.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def __call__(self, figure, name: str, text: str, caption: str = "") -> str:
        """A figure inside the page: an SVG with letters as outlines, which needs no font."""
        import matplotlib as mpl

        if self.folder is not None:
            save_figure(figure, self.folder / (re.sub(r"[^-.\w]", "_", name) + ".png"), dpi=110)
        file = io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": "report", "svg.fonttype": "path"}):  # the same input gives the same file
            figure.savefig(file, format="svg", metadata={"Date": None})
        data = base64.b64encode(file.getvalue()).decode("ascii")
        words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        return (
            f'<figure><div class="wide" tabindex="0"><img alt="{escape(text)}" '
            f'src="data:image/svg+xml;base64,{data}"></div>{words}</figure>'
        )


def table(header: list[str], rows: list[list[str]], kind: str = "") -> str:
    """Cells are HTML."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return (
        f'<div class="wide" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def class_cell(label: int, id2label: Mapping[int, str]) -> str:
    return f'<span class="swatch" style="background:{class_colour(label)}"></span>{escape(id2label[label])}'


def summary(metrics: DetectionMetrics, threshold, tiou: float) -> str:
    header = ["tIoU", "mAP", *(f"recall@{k}x" for k in metrics.top_k)]
    values = np.column_stack([metrics.map, metrics.recall])
    rows = [
        [name, *map(percent, row)]
        for name, row in zip(
            [*(f"{value:g}" for value in metrics.tiou_thresholds), "<b>mean</b>"],
            [*values, values.mean(axis=0)],
            strict=True,
        )
    ]
    text = (
        f"<p>Average mAP: <b>{percent(metrics.average_map)} %</b>. {len(metrics.classes)} classes, "
        f"{metrics.num_ground_truth} true segments, {metrics.num_predictions} predictions.</p>"
    )
    if threshold is not None:
        score, f1, precision, recall = threshold
        text += (
            f"<p>If only predictions with a score of at least {score:.2f} are kept, {percent(precision)} % of them are "
            f"right and {percent(recall)} % of the segments are found (F1 {percent(f1)} %, the best there is; tIoU {tiou:g})."
            "</p>"
        )
    note = "In percent. recall@kx: each recording keeps its k * n best predictions of a class with n segments there."
    return text + table(header, rows) + f'<p class="note">{note}</p>'


def class_table(
    metrics: DetectionMetrics,
    curves: Mapping[int, PrecisionRecall],
    profile: ErrorProfile,
    id2label: Mapping[int, str],
) -> str:
    fates = profile.fates.sum(axis=1)
    header = ["class", "segments", "mean AP", f"AP@{profile.tiou_threshold:g}", *FATES]
    order = np.argsort(metrics.ap.mean(axis=0), kind="stable")
    rows = [
        [
            class_cell(int(metrics.classes[index]), id2label),
            str(fates[index].sum()),
            f"<b>{percent(metrics.ap[:, index].mean())}</b>",
            percent(curves[int(metrics.classes[index])].ap),
            *(str(count) if count else "" for count in fates[index]),
        ]
        for index in order
    ]
    return table(header, rows)


def confusion_table(profile: ErrorProfile, id2label: Mapping[int, str]) -> str:
    listed = confusions(profile)
    if not listed:
        return "<p>No class is taken for another.</p>"
    if len(profile.classes) > WIDEST_TABLE:
        rows = [
            [class_cell(truth, id2label), class_cell(other, id2label), f"{count} of {total}"]
            for truth, other, count, total in listed[:WIDEST_TABLE]
        ]
        return table(["class", "taken for", "times"], rows, "pairs")
    names = [escape(id2label[int(label)]) for label in profile.classes]
    head = "".join(f'<th scope="col" class="up">{name}</th>' for name in [*names, "<i>not found</i>"])
    body = ""
    for label, row, place in zip(profile.classes, profile.confusion, range(len(names)), strict=True):
        cells = ""
        for column, count in enumerate(row):
            share = count / row.sum()
            colour = "0,114,178" if column == place else "213,94,0"
            ink = "#fff" if share > 0.6 else "#1a1a1a"
            cells += f'<td style="background:rgba({colour},{share:.2f});color:{ink}">{count or ""}</td>'
        body += f"<tr><td>{class_cell(int(label), id2label)}</td>{cells}</tr>\n"
    return (
        f'<div class="wide" tabindex="0"><table class="confusion"><thead><tr><th scope="col">true class</th>{head}'
        f"</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def recordings(
    detections: Detections,
    profile: ErrorProfile,
    picture: Pictures,
    worst: int,
    best: int,
    min_score: float,
    with_scores: bool,
) -> str:
    """Timelines of the recordings with the most and the fewest errors."""
    errors = profile.video_errors
    order = sorted(errors, key=lambda name: -sum(errors[name]))
    chosen = [(name, "most") for name in order[:worst]]
    chosen += [(name, "fewest") for name in order[::-1][:best] if name not in order[:worst]]
    parts = []
    for name, which in tqdm(chosen, desc="draw", unit="recording"):
        empty = {"segments": np.empty((0, 2)), "labels": np.empty(0, np.int64), "scores": np.empty(0)}
        found, truth = detections.predictions.get(name, empty), detections.ground_truth[name]
        wrong, missed = errors[name]
        parts.append(
            f"<h3>{escape(str(name))}</h3><p>{'One with the fewest errors: ' if which == 'fewest' else ''}"
            f"{len(truth['labels'])} segments, {missed} not found; {wrong} false positives.</p>"
        )
        figure = plot_timeline(found, detections.id2label, truth, detections.durations.get(name), min_score=min_score)
        parts.append(picture(figure, f"timeline_{name}", f"Timeline of {name}: truth and predictions by class"))
        if with_scores:
            outputs, geometry, strides = detections.run(name)
            figure = plot_scores(outputs, geometry, strides, detections.id2label, truth)
            parts.append(
                picture(
                    figure,
                    f"scores_{name}",
                    f"Scores of {name} over time, by level",
                    "Scores before suppression, by level.",
                )
            )
    return "\n".join(parts)


def make_page(detections: Detections, options: argparse.Namespace) -> str:
    """The whole page."""
    predictions, truth, id2label = detections.predictions, detections.ground_truth, detections.id2label
    tiou = options.tiou
    metrics = evaluate_detections(predictions, truth, options.tious)
    profile = profile_errors(predictions, truth, tiou, lengths=options.lengths or 4, impact_thresholds=options.tious)
    curves = precision_recall(predictions, truth, tiou)
    threshold = best_threshold(curves)
    min_score = options.min_score if options.min_score is not None else threshold[0] / 2 if threshold else 0.0
    picture = Pictures(options.pictures)
    title = options.title or "What the detector finds, and where it errs"
    words = "".join(f"<li>{escape(line)}</li>" for line in in_words(profile, id2label))
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{len(truth)} recordings, from {escape(detections.source)}.</p>',
        "<h2>Summary</h2>",
        summary(metrics, threshold, tiou),
        "<h2>Errors</h2>",
        f"<ul>{words}</ul>",
        picture(
            plot_error_profile(profile),
            "errors",
            "Error profile: kinds of predictions, gains in mAP, truths by length",
            f"Left: what each class's best predictions are at tIoU {tiou:g}, G at a time, G being its number of segments. "
            "Middle: what average mAP would gain; gains do not add up. Right: what becomes of segments of different lengths, if "
            "each class keeps its G best predictions.",
        ),
        "<h2>Classes</h2>",
        class_table(metrics, curves, profile, id2label),
        f'<p class="note">The lowest average precision first, in percent. The last columns count what becomes of the '
        f"segments of the class at tIoU {tiou:g}, if each class keeps as many predictions as it has segments.</p>",
        f"<h2>Precision and recall at tIoU {tiou:g}</h2>",
        picture(plot_precision_recall(curves, id2label), "precision_recall", "Precision over recall for each class"),
        "<h2>Confusion between classes</h2>",
        f'<p class="note">For each true segment, the class of the best-scored prediction that meets it at tIoU {tiou:g}.</p>',
        confusion_table(profile, id2label),
        "<h2>Recordings with the most errors</h2>",
        f'<p class="note">By false positives and segments not found, if each class keeps its G best predictions. A row is a '
        f"class: the truth is the dark line, below it are predictions with a score of at least {min_score:.2f}, the paler "
        "the lower.</p>",
        recordings(
            detections,
            profile,
            picture,
            options.recordings,
            options.best,
            min_score,
            with_scores=options.scores and detections.run is not None,
        ),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


# --- The command ----------------------------------------------------------------------------------------------------


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number in (0, 1]")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="page to write: .html")
    given = parser.add_argument_group("what there is to look at")
    given.add_argument("--predictions", type=Path, help="file of predicted segments")
    given.add_argument("--annotations", type=Path, help="file of true segments")
    given.add_argument("--subset", nargs="+", help="of the annotations, such as validation (default: all)")
    model = parser.add_argument_group("a model, instead of predictions")
    model.add_argument("--model", type=Path, help="folder written by save_pretrained")
    model.add_argument("--features", nargs="+", type=Path, help="folders of feature files, one a stream")
    model.add_argument("--signals", type=Path, help=".npz with one array (samples, channels) a recording")
    model.add_argument("--watch", nargs="+", type=int, help="people of the watch data instead, such as 8 9 10")
    model.add_argument("--file_prefix", default="", help="of feature files")
    model.add_argument("--file_ext", help="of feature files (default: .npy, .npz or .safetensors)")
    model.add_argument("--resize_to", type=int, help="interpolate all videos to this length")
    model.add_argument("--downsample_rate", type=int, default=1, help="take each n-th feature")
    model.add_argument("--skip_missing", action="store_true", help="leave out videos without features")
    model.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where it runs")
    model.add_argument("--save", type=Path, help="write what the model finds to this JSON file (ActivityNet's format)")
    model.add_argument("--no-scores", dest="scores", action="store_false", help="leave out curves of scores over time")
    page = parser.add_argument_group("the page")
    page.add_argument("--tiou", type=share, default=0.5, help="at which errors are looked at (default: 0.5)")
    page.add_argument("--tious", nargs="+", type=share, default=[0.3, 0.4, 0.5, 0.6, 0.7], help="of average mAP")
    page.add_argument("--lengths", nargs="+", type=float, help="edges between ranges of length, in seconds")
    page.add_argument(
        "--recordings", type=count, default=5, help="timelines of those with the most errors (default: 5)"
    )
    page.add_argument("--best", type=count, default=1, help="and of those with the fewest (default: 1)")
    page.add_argument("--min_score", type=share, help="least score in timelines (default: half of where F1 is best)")
    page.add_argument("--pictures", type=Path, help="folder to write the page's pictures to, as .png files")
    page.add_argument("--title", help="of the page")
    options = parser.parse_args()

    if (options.predictions is None) == (options.model is None):
        parser.error("give either --predictions or --model")
    if options.predictions is not None:
        if options.annotations is None:
            parser.error("--predictions needs --annotations")
        if options.features or options.signals or options.watch or options.save:
            parser.error("--features, --signals, --watch and --save go with --model")
    else:
        if sum(map(bool, (options.features, options.signals, options.watch))) != 1:
            parser.error("--model needs one of --features, --signals and --watch")
        if options.watch and (options.annotations or options.subset):
            parser.error("--watch has annotations of its own: leave out --annotations and --subset")
        if not options.watch and options.annotations is None:
            parser.error("--features and --signals need --annotations")
    for file in (options.predictions, options.annotations, options.model, options.signals, *(options.features or [])):
        if file is not None and not file.exists():
            parser.error(f"there is no {file}")
    return parser, options


def main():
    parser, options = parse()
    logging.disable_progress_bar()  # of loading, which takes no time
    try:
        if options.model is not None:
            detections = run_model(options)
            if options.save is not None:
                write_segments(options.save, to_rows(detections.predictions, detections.id2label), "activitynet")
        else:
            detections = read_detections(options.predictions, options.annotations, options.subset)
        page = make_page(detections, options)
    except (Usage, ImportError, OSError, KeyError, ValueError) as error:
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        parser.error(" ".join(text.split()))
    write(options.report, page)
    print(f"report: {options.report} ({options.report.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
