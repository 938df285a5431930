"""The model card: a README.md that says what was measured, how to use the model and how it was trained.

    card = make_model_card(model.config, model_id="me/exercises", results={"validation": metrics.to_dict()}, dataset="SBHAR")
    write_model_card(card, folder)

Whoever publishes gets one: `TemporalActionTrainer` and examples/train.py write it into their folder, and `push_to_hub` of a
model takes it along (`ModelCardMixin`). What is not known is left out, never made up. What people wrote stays: a card is
written anew only while nobody has changed it, which a check sum in its last line tells.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import logging

logger = logging.get_logger(__name__)

TASK = "temporal-action-localization"
DETECTOR = "ConvTransformerForTemporalActionLocalization"
RETRIEVAL = "ConvTransformerForMomentRetrieval"
# What a card cannot know before it is uploaded. The first is filled in by `push_to_hub`, the second by the reader.
UNKNOWN_ID, UNKNOWN_REVISION = "<repository>", "<commit>"

_FILE = "README.md"
_MAX_CLASSES = 60  # names listed
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PICTURE = re.compile(r"!\[[^\]]*\]\(([^()\s]+\.(?:png|jpe?g|gif|svg|webp))\)", flags=re.IGNORECASE)
_CHECK = re.compile(r"\n*<!-- Written by modeling_convtransformer[^\n]* Check: ([0-9a-f]{16}) -->\s*$")
# What `transformers.utils.hub.create_and_tag_model_card` puts into the Hub's template where there is no card.
_GENERIC = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)

_SNIPPETS = (
    """
from transformers import pipeline

localize = pipeline(
    "temporal-action-localization",
    model={where},  # or a folder with its files
    revision={pinned},
    trust_remote_code=True,
)
segments = localize("features.npy", threshold=0.3)  # or an array (time, channels), or a list of them
# [{{"label": {label}, "score": ..., "start": seconds, "end": seconds}}, ...], best first
""",
    """
import {package}  # tells transformers about the model
from transformers import pipeline

localize = pipeline("temporal-action-localization", model={where}, revision={pinned})
""",
)
_RETRIEVAL_SNIPPETS = (
    """
from transformers import pipeline

find = pipeline(
    "moment-retrieval",
    model={where},  # or a folder with its files
    revision={pinned},
    trust_remote_code=True,
)
moments = find("features.npy", ["what to look for", "and what else"], top_k=1)
# for each query [{{"query": ..., "score": ..., "start": seconds, "end": seconds}}, ...], best first
""",
    """
import {package}  # tells transformers about the model
from transformers import pipeline

find = pipeline("moment-retrieval", model={where}, revision={pinned})
""",
)
_BACKBONE_SNIPPETS = (
    """
from transformers import AutoModel

model = AutoModel.from_pretrained(
    {where},  # or a folder with its files
    revision={pinned},
    trust_remote_code=True,
)
""",
    """
import {package}  # tells transformers about the model
from transformers import AutoModel

model = AutoModel.from_pretrained({where}, revision={pinned})
""",
)


# --- Content --------------------------------------------------------------------------------------------------------


def make_model_card(
    config,
    *,
    model_id: str | None = None,
    model_name: str | None = None,
    revision: str | None = None,
    num_parameters: int | None = None,
    geometry: Mapping[str, float] | None = None,
    features: str | None = None,
    results: Mapping[str, Mapping[str, float]] | None = None,
    dataset: str | None = None,
    dataset_ids: Sequence[str] = (),
    picture: str | None = None,
    caption: str = "One recording: truth above, predictions below; the paler, the lower the score.",
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    command: str | None = None,
    training: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> ModelCard:
    """
    A card with metadata that the Hub accepts. Arguments that are left out leave out what they would say.

    Args:
        config: the model's `ConvTransformerConfig`.
        model_id: repository on the Hub, such as "me/exercises". Unknown: the card says `<repository>`, which
            `push_to_hub` fills in.
        model_name: title; default: the end of `model_id`.
        revision: commit that the snippets pin; default: `<commit>`, for the reader to choose.
        num_parameters: of the model.
        geometry: fps (frames or samples a second), feature_stride and num_frames (frames), as the feature extractor has
            them.
        features: sentences (Markdown) on what the features are and where they come from.
        results: for each set that was evaluated, by its name ("validation"), the figures of
            `DetectionMetrics.to_dict()`: fractions, "map" the average, "map_30" at tIoU 0.3. Other figures are ignored.
        dataset: name of the data.
        dataset_ids: data sets on the Hub that the model was trained on.
        picture: file beside the card, such as "timeline.png". `caption`: what it shows (Markdown).
        base_model: what the weights started from: a Hub id, which goes into the metadata, or a folder, whose name is
            mentioned.
        license: an identifier from https://huggingface.co/docs/hub/repositories-licenses.
        tags: further ones, such as "video".
        command: that trained the model.
        training: what else to know about the training, by name.
        notes: further limits (Markdown sentences).
    """
    model_name = _one_line(model_name or (model_id or "").rpartition("/")[2] or "ConvTransformer")
    rows = {name: figures for name, values in (results or {}).items() if (figures := _figures(values))}
    base_id = base_model if base_model and is_hub_id(base_model) else None
    architectures = getattr(config, "architectures", None) or [DETECTOR]
    kind = next((name for name in (DETECTOR, RETRIEVAL) if name in architectures), None)
    metadata = ModelCardData(
        library_name="transformers",
        license=license.strip().lower() if license else None,
        base_model=base_id,
        datasets=[str(name) for name in dataset_ids] or None,
        # No pipeline_tag: the Hub accepts its own tasks only, and this is none of them.
        tags=["moment-retrieval" if kind == RETRIEVAL else TASK, "convtransformer", *tags],
        model_name=model_name if rows else None,
        eval_results=_eval_results(rows, dataset, dataset_ids) or None,
    )
    parts = [
        f"# {_plain(model_name)}",
        _introduction(config, num_parameters, kind),
        f"![Timeline of one recording]({picture})\n\n*{caption}*" if picture else "",
        _results(rows, dataset),
        _usage(config, model_id or UNKNOWN_ID, revision or UNKNOWN_REVISION, kind),
        _features(config, geometry, features),
        _training(base_model, base_id, dataset, dataset_ids, command, training),
        _limits(config, rows, notes, kind),
    ]
    text = "\n\n".join(part for part in parts if part)
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}\n")


def _figures(values: Mapping[str, float]) -> dict[float | None, float]:
    """{tIoU: mAP in percent}, rising, and the average under None last."""
    found = {}
    for name, value in values.items():
        match = re.fullmatch(r"map(?:_(\d+(?:\.\d+)?))?", name)
        if match and math.isfinite(value):
            threshold = round(float(match[1]) / 100, 6) if match[1] else None
            found[threshold] = round(100 * float(value), 2)
    return dict(sorted(found.items(), key=lambda item: math.inf if item[0] is None else item[0]))


def _eval_results(rows, dataset: str | None, dataset_ids: Sequence[str]) -> list[EvalResult]:
    name = _one_line(dataset) if dataset else "unknown"
    kind = dataset_ids[0] if dataset_ids else re.sub(r"\W+", "-", name.lower()).strip("-") or "unknown"
    results = []
    for split, figures in rows.items():
        thresholds = [threshold for threshold in figures if threshold is not None]
        for threshold, value in figures.items():
            results.append(
                EvalResult(
                    task_type=TASK,
                    task_name="Temporal action localization",
                    dataset_type=str(kind),
                    dataset_name=name,
                    dataset_split=_one_line(split),
                    metric_type="map",
                    metric_name="Average mAP (%)" if threshold is None else f"mAP at tIoU {threshold:g} (%)",
                    metric_value=value,
                    # the argument of `evaluation.evaluate_detections`
                    metric_args={"tiou_thresholds": thresholds if threshold is None else [threshold]},
                )
            )
    return results


def _introduction(config, num_parameters: int | None, kind: str | None) -> str:
    strides = config.detector_strides
    if kind == DETECTOR:
        what = "Temporal action localization: features of a long recording go in, scored segments in seconds come out."
    elif kind == RETRIEVAL:
        what = (
            "Moment retrieval: features of a long recording and sentences go in, scored segments in seconds come out."
        )
    else:
        what = "A backbone for temporal action localization: features of a long recording go in, a pyramid of them comes out."
        strides = config.strides
    size = f"{num_parameters:,} parameters, " if num_parameters else ""
    levels = f"{len(strides)} levels (one step in {', '.join(map(str, strides))} features)"
    what += (
        " The architecture is a ConvTransformer, that of [ActionFormer](https://arxiv.org/abs/2202.07925) (Zhang, Wu and Li, "
        f"ECCV 2022): {size}width {config.n_embd}, {levels}."
    )
    if kind == RETRIEVAL and config.text_config is not None:
        what += f" Sentences are read by a text encoder inside the model (model type {_code(config.text_config.model_type)})."
    elif kind == RETRIEVAL:
        what += f" Sentences go in as embeddings of their words, {config.text_width} wide, of another model."
    if kind != DETECTOR:
        return what
    names = [str(name) for _, name in sorted(config.id2label.items(), key=lambda item: int(item[0]))]
    if names == [f"LABEL_{index}" for index in range(len(names))]:
        return f"{what} It knows {_count(len(names), 'class', 'classes')}, whose names were not recorded."
    listed = ", ".join(_code(name) for name in names[:_MAX_CLASSES])
    more = f" and {len(names) - _MAX_CLASSES} more (`id2label` in config.json)" if len(names) > _MAX_CLASSES else ""
    return f"{what} It knows {_count(len(names), 'class', 'classes')}: {listed}{more}."


def _results(rows, dataset: str | None) -> str:
    if not rows:
        return "## Results\n\nNo evaluation of these weights is recorded."
    thresholds = sorted({threshold for figures in rows.values() for threshold in figures if threshold is not None})
    columns = [*thresholds, *([None] if any(None in figures for figures in rows.values()) else [])]
    header = ["evaluated on", *("average" if column is None else f"tIoU {column:g}" for column in columns)]
    lines = [header, ["---"] * len(header)]
    for split, figures in rows.items():
        name = f"{_plain(dataset)}, {_plain(split)}" if dataset else _plain(split)
        lines.append([name, *(f"{figures[column]:.2f}" if column in figures else "" for column in columns)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        "## Results\n\nMean average precision (mAP) in percent, by the ActivityNet protocol. The tIoU of a found and a true segment "
        "is the time in both, divided by the time in either; from the given value on, the segment counts as "
        f"found.\n\n{table}"
    )


def _usage(config, model_id: str, revision: str, kind: str | None) -> str:
    first, second = {DETECTOR: _SNIPPETS, RETRIEVAL: _RETRIEVAL_SNIPPETS}.get(kind, _BACKBONE_SNIPPETS)
    names = {"where": model_id, "pinned": revision, "label": str(config.id2label[0])}
    names = {key: json.dumps(name, ensure_ascii=False) for key, name in names.items()}
    names["package"] = "modeling_convtransformer"  # (a line of this file that imported it would not travel)
    chosen = (
        f" Replace `{UNKNOWN_REVISION}` by the commit that you have looked at (History, under Files and versions)."
        if revision == UNKNOWN_REVISION
        else ""
    )
    return (
        f"## Use\n\nWith torch and transformers (5.10.1 or later):\n\n{_fence(first.format(**names), 'python')}\n\n"
        "`trust_remote_code=True` runs Python code of this repository; `revision` pins it together with the weights: what you "
        f"have looked at is what runs, also when the repository changes.{chosen} With the package `modeling-convtransformer` "
        f"installed, no code of the repository runs:\n\n{_fence(second.format(**names), 'python')}"
    )


def _features(config, geometry: Mapping[str, float] | None, features: str | None) -> str:
    widths = list(config.stream_widths)
    streams = f" ({' + '.join(map(str, widths))}: several streams side by side)" if len(widths) > 1 else ""
    text = f"## What goes in\n\nFeatures of shape (time, {sum(widths)}){streams}, any number of steps."
    if geometry is None:
        text += " Which times they stand for is not recorded in this card, but in preprocessor_config.json if there is one."
    else:
        fps, stride, frames = (float(geometry[name]) for name in ("fps", "feature_stride", "num_frames"))
        text += (
            f" The recordings have {fps:g} frames (or samples) a second; feature t covers {_count(frames, 'frame')} from frame "
            f"{stride:g} · t on: {_count(round(frames / fps, 4), 'second')}, every {_count(round(stride / fps, 4), 'second')}."
        )
    if features:
        text += f" {features}"
    return f"{text} Features that were computed in another way give segments too, but wrong ones."


def _training(base_model, base_id, dataset, dataset_ids, command, training) -> str:
    sentences, blocks = [], []
    ids = ", ".join(f"[{_plain(name)}](https://huggingface.co/datasets/{name})" for name in dataset_ids)
    if dataset and training:
        same = [str(dataset)] == [str(name) for name in dataset_ids]
        sentences.append(f"Trained on {ids if same else _plain(dataset) + (f' ({ids})' if ids else '')}.")
    if base_id:
        sentences.append(f"It started from the weights of [{base_id}](https://huggingface.co/{base_id}).")
    elif base_model:
        name = Path(os.path.abspath(base_model)).name
        sentences.append(f"It started from the weights of a model that is not on the Hub (the folder {_code(name)}).")
    if sentences:
        blocks.append(" ".join(sentences))
    if command:
        blocks.append(_fence(command, "bash"))
    if training:
        blocks.append("\n".join(f"- {_plain(name)}: {_plain(value)}" for name, value in training.items()))
    return "\n\n".join(["## Training", *blocks]) if blocks else ""


def _limits(config, rows, notes: Sequence[str], kind: str | None) -> str:
    limits = []
    if kind == DETECTOR:
        limits.append("It knows the classes above and no other: other actions are missed, or taken for one of them.")
    elif kind == RETRIEVAL:
        limits.append("It gives moments for any sentence: a low score, not their absence, says that nothing fits.")
    if rows:
        limits.append(
            "The figures are of the recordings named above. With recordings of another origin (people, places, cameras, sensors) "
            "nothing has been measured."
        )
    elif kind is not None:
        limits.append("How well it does has not been measured, as far as this card knows.")
    limits += notes
    return "\n".join(["## Limits\n", *(f"- {limit}" for limit in limits)]) if limits else ""


def is_hub_id(name: str) -> bool:
    """Whether `name` is the id of a repository ("someone/something") and no local path."""
    return bool(_HUB_ID.fullmatch(name)) and not os.path.exists(name)


def _count(number: float, one: str, many: str | None = None) -> str:
    return f"{number:g} {one if number == 1 else many or one + 's'}"


def _one_line(text: Any) -> str:
    """Without line breaks and control characters, which neither a table nor a title bears."""
    return "".join(letter for letter in " ".join(str(text).split()) if letter.isprintable())


def _plain(text: Any) -> str:
    """One line in which Markdown, HTML and tables find nothing to interpret."""
    return re.sub(r"([\\`*\[\]<>|~$&#]|(?<!\w)_|_(?!\w))", r"\\\1", _one_line(text))


def _code(text: Any) -> str:
    """A code span: the name as it is, whatever is in it."""
    text = _one_line(text)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _fence(text: str, language: str) -> str:
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.strip()}\n{ticks}"


# --- Files ----------------------------------------------------------------------------------------------------------


def write_model_card(card: ModelCard, folder: str | os.PathLike) -> bool:
    """Writes README.md, under a temporary name first. A README.md that people wrote or changed stays, with a warning.

    Returns:
        whether it was written.
    """
    path = Path(folder) / _FILE
    present = _read(path)
    if present is not None and not (_is_ours(present) or _is_generic(present)):
        logger.warning(f"{path} was written or changed by hand: it stays, and no model card is written.")
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, _sign(str(card)))
    return True


def _sign(content: str) -> str:
    content = _CHECK.sub("", content).strip()
    return (
        f"{content}\n\n<!-- Written by modeling_convtransformer, and anew while nobody changes it. "
        f"Check: {_check_sum(content)} -->\n"
    )


def _check_sum(content: str) -> str:
    return hashlib.sha256("\n".join(content.strip().splitlines()).encode()).hexdigest()[:16]


def _is_ours(content: str) -> bool:
    """Whether we wrote it and nobody has changed it since."""
    match = _CHECK.search(content)
    return match is not None and match[1] == _check_sum(content[: match.start()])


def _is_generic(content: str) -> bool:
    """Whether it is the card that transformers makes of nothing, and nobody has changed it since."""
    if _GENERIC not in content:
        return False
    try:
        card = ModelCard(content)
    except Exception:  # a front matter that is none: someone's work
        return False
    generic = ModelCard.from_template(ModelCardData(library_name="transformers"), model_description=_GENERIC)
    return card.text.split() == generic.text.split() and {*card.data.to_dict()} <= {"library_name", "tags"}


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _write(path: Path, content: str):
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(content, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


# --- Upload ---------------------------------------------------------------------------------------------------------


class ModelCardMixin:
    """What a model is uploaded with: the card of the folder that holds its weights, or one made of its config.

    transformers writes its own README.md into what is uploaded, the Hub's card or, where there is none, one that says
    nothing. Only that one gives way, and a card of ours on the Hub that nobody has changed.
    """

    def _get_files_timestamps(self, working_dir):
        # Called before anything is saved into a folder of the user's, whose card transformers will overwrite.
        return _Timestamps(super()._get_files_timestamps(working_dir), Path(working_dir))

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, *args, **kwargs):
        changed = _put_card(self, Path(working_dir), repo_id, files_timestamps)
        files_timestamps = {name: time for name, time in files_timestamps.items() if name not in changed}
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, **kwargs)


class _Timestamps(dict):
    """When each file of a folder was changed, and the card that lay there beside which weights."""

    def __init__(self, timestamps: Mapping[str, float], folder: Path):
        super().__init__(timestamps)
        self.card = _read(folder / _FILE)
        self.weights = None if self.card is None else _weights(folder)


def _put_card(model, folder: Path, repo_id: str, before: Mapping[str, float]) -> set[str]:
    """Puts the right README.md, and the pictures in it, into `folder`, which is about to be uploaded.

    Returns:
        names in the folder that have to be uploaded though they may be older than the upload.
    """
    present = _read(folder / _FILE)  # transformers has just written it
    is_from_hub = present is not None and not _is_generic(present)
    if is_from_hub and not _is_ours(present):
        return set()
    source = Path(model.name_or_path or "") if os.path.isdir(model.name_or_path or "") else None
    card, home = _card_of(folder, source, getattr(before, "card", None), getattr(before, "weights", None))
    if card is None and is_from_hub:
        return set()
    if card is None:
        base = model.name_or_path or None
        made = make_model_card(
            model.config,
            model_id=repo_id,
            num_parameters=model.num_parameters(),
            geometry=_geometry(folder),
            base_model=base if base and base != repo_id and is_hub_id(base) else None,
        )
        card = _sign(str(made))
    pictures = _take_pictures(card, home, folder) if home else set()
    is_ours = _is_ours(card)
    card = card.replace(UNKNOWN_ID, repo_id)
    if tags := None if present is None or is_from_hub else ModelCard(present).data.tags:  # push_to_hub(tags=...)
        tagged = ModelCard(card)
        tagged.data.tags = list(dict.fromkeys([*(tagged.data.tags or []), *tags]))
        card = str(tagged)
    _write(folder / _FILE, _sign(card) if is_ours else card)
    return {_FILE, *pictures}


def _card_of(folder: Path, source: Path | None, before: str | None, weights: str | None):
    """
    The card that speaks of the weights in `folder`, and where it lay; (None, None) if there is none.

    Args:
        folder: about to be uploaded, the weights are saved there.
        source: the folder that the model was loaded from.
        before: the card that `folder` had before the model was saved. `weights`: check sum of what it had then.
    """
    now = None
    if before is not None and not _is_generic(before):
        now = _weights(folder)
        if weights == now or not _is_ours(before):  # what people wrote stays in their folder
            return before, folder
    card = None if source is None else _read(source / _FILE)
    if card is None or _is_generic(card) or source.resolve() == folder.resolve():
        return None, None
    if _weights(source) == (now or _weights(folder)):
        return card, source
    logger.warning(
        f"The model card of {source} is not uploaded: its weights are other ones than those that are. Save the model, and "
        "write a README.md beside it."
    )
    return None, None


def _weights(folder: Path) -> str:
    """A check sum of a model's weights in a folder."""
    check = hashlib.sha256()
    for path in sorted(folder.glob("model*.safetensors")):
        with path.open("rb") as file:
            check.update(hashlib.file_digest(file, "sha256").digest())
    return check.hexdigest()


def _geometry(folder: Path) -> dict[str, float] | None:
    try:
        saved = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        return {name: float(saved[name]) for name in ("fps", "feature_stride", "num_frames")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _take_pictures(card: str, home: Path, folder: Path) -> set[str]:
    """Copies the pictures that the card shows, from its folder `home`; the names in `folder` that have to be uploaded."""
    taken, moves = set(), home.resolve() != folder.resolve()
    for name in _PICTURE.findall(card):
        picture, depth = home / name, len(Path(name).parts)
        # A link out of the folder is not followed: who knows what would be published. For the same reason no subfolder of
        # the user's is named, which transformers would upload whole. (Deeper ones it cannot upload.)
        inside = picture.is_file() and picture.resolve().is_relative_to(home.resolve())
        if not inside or depth > (2 if moves else 1):
            continue
        if moves:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, folder / name)
        taken.add(Path(name).parts[0])
    return taken
