"""Annotations and features on disk in, batches for the model out; and a small real recording to try it all on.

    problems = validate_annotations("annotations.json", "features", feature_size=2048, feature_stride=4, num_frames=16)
    dataset = TemporalActionDataset(
        "annotations.json", "features", split="training", feature_stride=4, num_frames=16,
        max_seq_len=2304, crop_ratio=(0.9, 1.0), training=True,
    )
    loader = DataLoader(dataset, batch_size=2, shuffle=True, collate_fn=DataCollator(feature_extractor))

    watch = WatchDataset(people=range(1, 8), bout=(8.0, 30.0), training=True)  # no files needed: seglearn brings them

Annotations have ActivityNet's format: {"database": {video id: {"subset", "duration" (seconds), "fps" (optional),
"annotations": [{"label", "label_id" (optional), "segment": [start, end] (seconds)}]}}, "labels": [names] (optional)}.

A position on the feature grid is (seconds * fps - 0.5 * num_frames) / feature_stride: feature t, which covers the
num_frames frames from frame t * feature_stride on, stands at the middle of what it covers.

What is done to features and segments before training follows the release of ActionFormer (Zhang et al., ECCV 2022,
https://arxiv.org/abs/2202.07925), called v1 below.
"""

import json
import math
import os
import random
import tempfile
import urllib.request
import uuid
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from .evaluation import remove_duplicates
from .feature_extraction_convtransformer import _load_safetensors, stored_encoder, stored_geometry, window_features

__all__ = [
    "SBHAR_FPS",
    "SBHAR_LABELS",
    "WATCH_FPS",
    "WATCH_LABELS",
    "CroppedDataset",
    "DataCollator",
    "MomentCollator",
    "MomentDataset",
    "SensorAugmentation",
    "SensorDataset",
    "TemporalActionDataset",
    "WatchDataset",
    "label_names",
    "load_annotations",
    "load_sbhar",
    "load_watch_recordings",
    "resize_features",
    "splice_watch_session",
    "suggest_config",
    "to_hf_dataset",
    "truncate_features",
    "validate_annotations",
    "window_features",
]

# An end may lie this far (seconds) past the duration before the validator says so: annotators round to 0.1 s.
_END_TOLERANCE = 0.1

# The most classes that a model may have: a larger id is a mistake, and names for all ids below it would fill the memory.
_MAX_LABELS = 1_000_000

# Features may be a window and this many steps fewer or more than the duration says, whatever the relative tolerance:
# extractors differ in how they treat the ends. (The feature extractor grants as much.)
_LENGTH_SLACK = 2


# --- Annotations ----------------------------------------------------------------------------------------------------


def load_annotations(path: str | os.PathLike) -> dict:
    """Read an annotation file of ActivityNet's format (see the top of this module).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or has no "database" of videos.
    """
    try:
        annotations = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    _check_database(annotations, str(path))
    return annotations


def _check_database(annotations: Any, source: str) -> None:
    if not isinstance(annotations, Mapping) or not isinstance(annotations.get("database"), Mapping):
        found = sorted(annotations) if isinstance(annotations, Mapping) else f"a {type(annotations).__name__}"
        raise ValueError(
            f'{source} must hold {{"database": {{video id: {{"subset", "duration", "annotations"}}}}}}, but holds {found}.'
        )


def label_names(annotations: Mapping) -> list[str]:
    """The class names, such that the position of a name is its class id.

    The order is that of the file's own "labels" if it has them, else that of the label ids, else alphabetical. Ids
    without any annotation (EPIC-KITCHENS has some) get the name that transformers gives to unnamed classes, "LABEL_3".

    Raises:
        ValueError: the ids contradict one another, or only some labels have one; all contradictions are listed.
    """
    _check_database(annotations, "annotations")
    if annotations.get("labels") is not None and not _is_list_of_names(annotations["labels"]):
        raise ValueError(f'"labels" must be a list of different class names, but is {annotations["labels"]!r}.')
    conflicts = [f"{video_id}: {problem}" for video_id, problem in _label_conflicts(annotations)]
    if conflicts:
        raise ValueError("The labels are ambiguous:\n" + "\n".join(conflicts))
    if annotations.get("labels") is not None:
        return list(annotations["labels"])
    id_of = {label: label_id for _, label, label_id in _labels(annotations)}
    if None in id_of.values():
        return sorted(id_of)
    name_of = {label_id: label for label, label_id in id_of.items()}
    return [name_of.get(label_id, f"LABEL_{label_id}") for label_id in range(max(name_of, default=-1) + 1)]


def _labels(annotations: Mapping) -> Iterator[tuple[str, str, Any]]:
    """(video id, label, label_id or None) of every annotation that has a label; malformed entries are passed over."""
    for video_id, entry in annotations["database"].items():
        found = entry.get("annotations") if isinstance(entry, Mapping) else None
        for annotation in found if isinstance(found, list) else []:
            if isinstance(annotation, Mapping) and isinstance(annotation.get("label"), str):
                yield video_id, annotation["label"], annotation.get("label_id")


def _label_conflicts(annotations: Mapping) -> Iterator[tuple[str, str]]:
    """(video id, problem) where labels and ids contradict one another. Each pair of label and id is blamed once."""
    listed = annotations.get("labels")
    id_of = {name: label_id for label_id, name in enumerate(listed or [])}
    name_of = {label_id: name for name, label_id in id_of.items()}
    seen, without_id = set(), {}
    for video_id, label, label_id in _labels(annotations):
        if (label, repr(label_id)) in seen:
            continue
        seen.add((label, repr(label_id)))
        if listed is not None and label not in listed:
            yield video_id, f'label {label!r} is not among the {len(listed)} "labels" of the file; add or correct it'
        elif label_id is None:
            without_id[label] = video_id
        elif not isinstance(label_id, Integral) or isinstance(label_id, bool) or not 0 <= label_id < _MAX_LABELS:
            yield video_id, f"label_id of {label!r} is {label_id!r}, expected an integer from 0 to {_MAX_LABELS - 1}"
        elif id_of.setdefault(label, label_id) != label_id:
            yield video_id, f"label {label!r} has the ids {id_of[label]} and {label_id}, expected one"
        elif name_of.setdefault(label_id, label) != label:
            yield video_id, f"label_id {label_id} stands for {name_of[label_id]!r} and {label!r}, expected one label"
    if listed is None and id_of:
        for label, video_id in without_id.items():
            yield video_id, f"label {label!r} has no label_id here, but there are ids elsewhere; give all or none"


# --- Validation -----------------------------------------------------------------------------------------------------


def validate_annotations(
    annotations: Mapping | str | os.PathLike,
    feature_folder: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    feature_size: int | None = None,
    fps: float | None = None,
    feature_stride: float | None = None,
    num_frames: float | None = None,
    file_prefix: str = "",
    file_ext: str | None = None,
    length_tolerance: float = 0.1,
) -> list[str]:
    """Everything that is wrong with annotations, and with the features that belong to them, in one go.

    Args:
        annotations: the content of an annotation file, or its path.
        feature_folder: also check the feature file of each video: that it is there, can be read, and holds finite
            numbers of shape (time, channels). All of it is read. Several folders as in `TemporalActionDataset`.
        feature_size: the number of channels to expect; None: not checked.
        fps: frames per second, for videos whose entry has none.
        feature_stride, num_frames: frames from one feature to the next, and frames that one feature covers
            (None: the stride). With a stride given, lengths are compared with the durations.
        file_prefix, file_ext: as in `TemporalActionDataset`.
        length_tolerance: relative difference between the length of the features and the duration that is still fine
            (a window and two steps always are).

    Returns:
        One message per problem, each beginning with the video id, in the order of the file; [] if all is well. A file
        that cannot be read, or has no videos, gives the one message that says so.
    """
    try:
        if not isinstance(annotations, Mapping):
            annotations = load_annotations(annotations)
        _check_database(annotations, "annotations")
    except (OSError, ValueError) as error:
        return [str(error)]
    if not annotations["database"]:
        return ["annotations: there is no video under 'database'"]

    listed, problems = annotations.get("labels"), []
    if listed is not None and not _is_list_of_names(listed):
        problems.append("annotations: 'labels' must be a list of different class names; ids are checked without it")
        annotations = {**annotations, "labels": None}
    conflicts = defaultdict(list)
    for video_id, problem in _label_conflicts(annotations):
        conflicts[video_id].append(problem)

    for video_id, entry in annotations["database"].items():
        found = [*_entry_problems(entry), *conflicts[video_id]]
        if feature_folder is not None:
            entry = entry if isinstance(entry, Mapping) else {}
            try:
                paths = _feature_paths(feature_folder, video_id, file_prefix, file_ext)
                features = _open_features(paths, feature_size)
                found += _value_problems(features)
                if feature_stride is not None:
                    fps_here = stored_geometry(paths[0]).get("fps") or entry.get("fps", fps)
                    found += _length_problems(
                        len(features), entry.get("duration"), fps_here, feature_stride, num_frames, length_tolerance
                    )
            except (OSError, ValueError) as error:
                found.append(str(error))
        problems += [f"{video_id}: {problem}" for problem in found]
    return problems


def _is_list_of_names(labels: Any) -> bool:
    return isinstance(labels, list) and all(isinstance(name, str) for name in labels) and len({*labels}) == len(labels)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _entry_problems(entry: Any) -> Iterator[str]:
    """What is wrong with one video's entry by itself."""
    if not isinstance(entry, Mapping):
        yield f"the entry is a {type(entry).__name__}, expected a dictionary with 'subset', 'duration', 'annotations'"
        return
    for key in ("subset", "duration", "annotations"):
        if key not in entry:
            yield f"there is no {key!r} (found {sorted(map(str, entry))})"
    subset, duration, annotations = (
        entry.get("subset", "any"),
        entry.get("duration", 1.0),
        entry.get("annotations", []),
    )
    if not isinstance(subset, str) or not subset:
        yield f"subset is {subset!r}, expected a name such as 'training'"
    if not _is_number(duration) or duration <= 0:
        yield f"duration is {duration!r}, expected a number of seconds > 0"
    if "fps" in entry and (not _is_number(entry["fps"]) or entry["fps"] <= 0):
        yield f"fps is {entry['fps']!r}, expected a number of frames per second > 0"
    if not isinstance(annotations, list):
        yield f"annotations is a {type(annotations).__name__}, expected a list"
        return

    limit = entry["duration"] if "duration" in entry and _is_number(duration) and duration > 0 else math.inf
    first = {}
    for index, annotation in enumerate(annotations):
        yield from (f"annotation {index}: {problem}" for problem in _annotation_problems(annotation, limit))
        if isinstance(annotation, Mapping):
            key = repr([annotation.get("label"), _as_floats(annotation.get("segment"))])
            if first.setdefault(key, index) != index:
                yield f"annotation {index}: repeats annotation {first[key]} (same label, same segment); remove one"


def _as_floats(segment: Any) -> Any:
    """1 and 1.0 are the same time, whatever the file says."""
    is_sequence = isinstance(segment, Sequence) and not isinstance(segment, str)
    return [float(value) if _is_number(value) else value for value in segment] if is_sequence else segment


def _annotation_problems(annotation: Any, duration: float) -> Iterator[str]:
    if not isinstance(annotation, Mapping):
        yield f"is a {type(annotation).__name__}, expected a dictionary with 'label' and 'segment'"
        return
    for key in ("label", "segment"):
        if key not in annotation:
            yield f"there is no {key!r} (found {sorted(map(str, annotation))})"
    label, segment = annotation.get("label", "any"), annotation.get("segment", [0.0, 0.0])
    if not isinstance(label, str) or not label:
        yield f"label is {label!r}, expected a class name"
    if "segment" not in annotation:
        return
    if not isinstance(segment, Sequence) or len(segment) != 2 or not all(_is_number(value) for value in segment):
        yield f"segment is {segment!r}, expected two finite numbers, start and end in seconds"
        return
    start, end = segment
    if start < 0:
        yield f"the segment {list(segment)} starts before 0 s"
    if start >= end:
        yield f"the segment {list(segment)} has its start at or after its end"
    if end > duration + _END_TOLERANCE:
        yield f"the segment {list(segment)} ends past the duration, {duration} s; are both in seconds?"


def _value_problems(features: np.ndarray) -> Iterator[str]:
    finite = np.isfinite(features)
    if not finite.all():
        time, channel = np.argwhere(~finite)[0]
        yield (
            f"{(~finite).sum()} of {finite.size} feature values are NaN or infinite, the first one "
            f"({features[time, channel]}) at time {time}, channel {channel}; extract them again"
        )


def _length_problems(
    length: int, duration: Any, fps: Any, feature_stride: float, num_frames: float | None, tolerance: float
) -> Iterator[str]:
    if fps is None:
        yield "there is no fps, so the length of the features cannot be checked; add it to the entry or pass fps"
    if not (_is_number(duration) and _is_number(fps) and duration > 0 and fps > 0):
        return  # _entry_problems has said so
    num_frames = feature_stride if num_frames is None else num_frames
    expected = (duration * fps - num_frames) / feature_stride + 1
    if abs(length - expected) > max(tolerance * expected, num_frames / feature_stride + _LENGTH_SLACK):
        yield (
            f"there are {length} features, but {duration} s at {fps} fps with stride {feature_stride} make "
            f"{expected:.0f}; check fps, feature_stride and whether the file is complete"
        )


# --- Feature files --------------------------------------------------------------------------------------------------


def _feature_paths(
    folders: str | os.PathLike | Sequence[str | os.PathLike], video_id: str, prefix: str, ext: str | None
) -> list[Path]:
    """The feature file of a video in each folder. Raises FileNotFoundError, naming what was looked for."""
    paths = []
    for folder in [folders] if isinstance(folders, str | os.PathLike) else folders:
        suffixes = [ext] if ext else [".npy", ".npz", ".safetensors"]
        candidates = [Path(folder) / f"{prefix}{video_id}{suffix}" for suffix in suffixes]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            names = " or ".join(path.name for path in candidates)
            raise FileNotFoundError(f"there is no {names} in {folder}; check file_prefix, file_ext and the folder")
        paths.append(found)
    return paths


def _open_features(paths: Sequence[Path], feature_size: int | None = None) -> np.ndarray:
    """(time, channels) as stored: one .npy file stays on disk (memory-mapped); the streams of several files are
    joined along the channels. Raises ValueError if they are not numbers of that shape."""
    streams = [_open_array(path) for path in paths]
    if len({len(stream) for stream in streams}) > 1:
        shapes = {str(path): stream.shape for path, stream in zip(paths, streams, strict=True)}
        raise ValueError(f"the streams differ in length: {shapes}; extract them with the same stride")
    features = streams[0] if len(streams) == 1 else np.concatenate(streams, axis=1)
    if feature_size is not None and features.shape[1] != feature_size:
        hint = "the channels seem to come first: transpose it" if len(features) == feature_size else "check the folder"
        raise ValueError(
            f"{paths[0].name} has shape {features.shape}, expected (time, channels) with {feature_size} channels; {hint}"
        )
    if len(features) == 0:
        raise ValueError(f"{paths[0].name} holds no features: its shape is {features.shape}; extract them again")
    return features


def _open_array(path: Path) -> np.ndarray:
    try:
        # Features are numbers: a file that needs allow_pickle is not opened, because unpickling can run any code.
        if path.suffix == ".safetensors":
            names, array = _load_safetensors(path)
            if array is None:
                raise ValueError(f"it holds the arrays {names}, expected one, or one named 'feats' or 'features'")
        else:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(array, np.lib.npyio.NpzFile):
            with array as archive:
                names = [name for name in ("feats", "features") if name in archive.files] or archive.files
                if len(names) != 1 and not {"feats", "features"} & {*names}:
                    raise ValueError(f"it holds the arrays {names}, expected one, or one named 'feats' or 'features'")
                array = archive[names[0]]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        hint = "save it as numbers, numpy.save(path, features.astype(numpy.float32))"
        if "Object arrays" in str(error) or "Python objects" in str(error):  # numpy's words for .npz and .npy
            raise ValueError(f"{path.name} holds Python objects (dtype object), expected numbers; {hint}") from error
        raise ValueError(f"{path.name} cannot be read ({error or type(error).__name__}); {hint}") from error
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{path.name} holds values of dtype {array.dtype}, expected numbers")
    if array.ndim != 2:
        raise ValueError(f"{path.name} has shape {array.shape}, expected (time, channels)")
    return array


# --- Geometry and augmentation --------------------------------------------------------------------------------------


def resize_features(features: np.ndarray, length: int) -> np.ndarray:
    """Linear interpolation in time from (T, channels) to (length, channels), float32; ends of the time axis are
    aligned as ends of the first and last feature (not as their middles), as v1 does for ActivityNet."""
    channels_first = torch.from_numpy(np.array(features, dtype=np.float32)).T[None]
    return F.interpolate(channels_first, size=length, mode="linear", align_corners=False)[0].T.contiguous().numpy()


def truncate_features(
    features: np.ndarray,
    segments: np.ndarray,
    class_labels: np.ndarray,
    max_seq_len: int,
    trunc_thresh: float,
    offset: float,
    crop_ratio: tuple[float, float] | None = None,
    max_num_trials: int = 200,
    rng: random.Random | ModuleType | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut a random stretch out of a long video, or crop a short one a little: v1's augmentation, draw for draw.

    Args:
        features: (T, channels).
        segments: (N, 2) start and end on the feature grid.
        class_labels: (N,).
        max_seq_len: features to keep. A video that is not longer stays whole, or is cropped if `crop_ratio` is given.
        trunc_thresh: a segment stays if at least this share of it, in (0, 1], lies in the stretch; it is then
            clipped to it.
        offset: how far, in features, the stretch reaches past the middles of its first and last feature:
            0.5 * num_frames / feature_stride.
        crop_ratio: the shortest and longest share of a short video to keep.
        max_num_trials: stretches to draw until one holds a segment. If none does, the last one is taken, without any.
        rng: draws with `randint`; None: Python's `random` module, which torch seeds in each worker of a DataLoader.

    Returns:
        The stretch of the features (a view), its segments (n, 2) float32, counted from its own start, and their
        class labels (n,).
    """
    rng = random if rng is None else rng
    length = len(features)
    if length <= max_seq_len:
        if crop_ratio is None:
            return features, segments, class_labels
        shortest, longest = (max(round(ratio * length), 1) for ratio in crop_ratio)
        max_seq_len = rng.randint(max(shortest, 1), min(longest, length))
        if max_seq_len == length:
            return features, segments, class_labels

    segments = np.asarray(segments, dtype=np.float32)
    for _ in range(max_num_trials):
        start = rng.randint(0, length - max_seq_len)
        clipped, keep = _clip_segments(segments, start - offset, start + max_seq_len + offset, trunc_thresh)
        if keep.any() or len(segments) == 0:
            break
    return features[start : start + max_seq_len], clipped[keep] - np.float32(start), class_labels[keep]


def _clip_segments(segments: np.ndarray, left: float, right: float, min_share: float) -> tuple[np.ndarray, np.ndarray]:
    """The segments (N, 2) clipped to [left, right], and whether at least `min_share` of each one lies there (N,)."""
    clipped = segments.clip(np.float32(left), np.float32(right))
    length = segments[:, 1] - segments[:, 0]
    share = np.divide(clipped[:, 1] - clipped[:, 0], length, out=np.zeros_like(length), where=length > 0)
    return clipped, share >= np.float32(min_share)


# --- Datasets -------------------------------------------------------------------------------------------------------


class _DrawsAnew:
    """Counts what a seeded dataset needs to draw something new at each access, and the same in each run. The counts lie
    in shared memory: the workers of a DataLoader, which may end with the epoch, add to the same ones."""

    def __init__(self, length: int) -> None:
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self._accesses = torch.zeros(length, dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Count from here on: the draws of this epoch differ from those of other epochs, and are the same whenever the
        same epoch is set. Needed only where several processes train, because each one counts its own accesses."""
        self._epoch.fill_(epoch)
        self._accesses.zero_()

    def _next_draw(self, index: int) -> tuple[int, int]:
        """The epoch and the number of accesses so far, for a random generator's seed."""
        return int(self._epoch), int(self._accesses[index])


@dataclass(frozen=True)
class _Video:
    video_id: str
    paths: list[Path]
    fps: float
    duration: float | None  # seconds
    segments: np.ndarray  # (N, 2) float64, seconds
    class_labels: np.ndarray  # (N,) int64


class TemporalActionDataset(_DrawsAnew, Dataset):
    """Videos as features on disk, with their annotated segments.

    An item is {"video_id": str, "features": (T, channels) float32, "segments": (N, 2) float32 on the feature grid,
    "class_labels": (N,) int64, "geometry": {"fps", "feature_stride", "num_frames", "duration" (seconds or None)}}.
    N may be 0. When training, a cut video counts its segments from the start of the stretch that was kept. Values are
    not checked for NaN here; the feature extractor does that.

    Args:
        annotations: the content of an annotation file, or its path; see `load_annotations`, `validate_annotations`.
        feature_folder: holds one file per video, of shape (time, channels): `.npy` (read through a memory map: only the
            stretch that is used is read), or `.npz` or `.safetensors` (its only array, or the one named "feats" or "features";
            with the geometry that `features.extract_features` writes, its fps is taken and the rest compared). Several
            folders hold several streams, which are joined along the channels in the order given (v1's Ego4D).
        split: name or names of the subsets to take, in any case; None: all videos.
        fps: frames per second of all videos; None: each feature file's or entry's own.
        feature_stride: frames from one feature to the next.
        num_frames: frames that one feature covers.
        label2id: class name to id; None: the position in `label_names`. Several names may share an id:
            `dict.fromkeys(label_names(annotations), 0)` makes class-agnostic proposals, as v1 on ActivityNet.
        max_seq_len, trunc_thresh, crop_ratio: see `truncate_features`; they act only when training. No max_seq_len: no
            video is too long.
        resize_to: interpolate all videos to this number of features, as v1 does for ActivityNet. Then each video has
            its own stride, in frames, and num_frames equals it. When training, segments of which less than
            `trunc_thresh` lies inside the features are left out: some of ActivityNet's videos lack their last frames.
        downsample_rate: take each n-th feature; the stride grows accordingly.
        training: augment.
        file_prefix, file_ext: a feature file is called prefix + video id + extension; extension None: ".npy",
            ".npz" or ".safetensors", whichever is there.
        deduplicate: leave out annotations that repeat another one or are shorter than 1 ms
            (`evaluation.remove_duplicates`), as v1 does for ActivityNet.
        skip_missing: leave out videos without a feature file, with a warning, instead of raising. (v1 leaves them out
            silently.)
        feature_size: number of channels; None: that of the first video. A file with another number raises when it is
            read, and the message says if it is transposed.
        seed: augment by (seed, epoch, index, number of accesses); None: by Python's `random`, which torch seeds in
            each worker of a DataLoader.

    Attributes:
        video_ids: in the order of the items.
        label2id, id2label: class name to id and back.
        feature_size: number of channels.
        encoder: what made the features, as in the feature extractor's `encoder`, where their files say it; else None.

    Raises:
        FileNotFoundError: videos without a feature file; all are listed.
        ValueError: settings out of range; an unknown split; no videos; no fps; labels that are ambiguous or not in
            label2id; malformed segments. At access: a feature file that cannot be used.
    """

    def __init__(
        self,
        annotations: Mapping | str | os.PathLike,
        feature_folder: str | os.PathLike | Sequence[str | os.PathLike],
        split: str | Sequence[str] | None = None,
        fps: float | None = None,
        *,
        feature_stride: float,
        num_frames: float,
        label2id: Mapping[str, int] | None = None,
        max_seq_len: int | None = None,
        trunc_thresh: float = 0.5,
        crop_ratio: tuple[float, float] | None = None,
        resize_to: int | None = None,
        downsample_rate: int = 1,
        training: bool = False,
        file_prefix: str = "",
        file_ext: str | None = None,
        deduplicate: bool = False,
        skip_missing: bool = False,
        feature_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        for name, value in {"feature_stride": feature_stride, "num_frames": num_frames, "fps": fps}.items():
            if value is not None and not (_is_number(value) and value > 0):
                raise ValueError(f"{name} must be a number > 0, but is {value!r}.")
        for name, value in {
            "max_seq_len": max_seq_len,
            "resize_to": resize_to,
            "downsample_rate": downsample_rate,
        }.items():
            if value is not None and not (isinstance(value, Integral) and value >= 1):
                raise ValueError(f"{name} must be a whole number >= 1, but is {value!r}.")
        if not 0 < trunc_thresh <= 1:
            raise ValueError(f"trunc_thresh must be a share in (0, 1], but is {trunc_thresh!r}.")
        if crop_ratio is not None and not (len(crop_ratio) == 2 and 0 < crop_ratio[0] <= crop_ratio[1] <= 1):
            raise ValueError(f"crop_ratio must be two rising shares in (0, 1], but is {crop_ratio!r}.")
        if resize_to is not None and downsample_rate != 1:
            raise ValueError(f"Choose one: resize_to is {resize_to} and downsample_rate is {downsample_rate}.")
        self.feature_stride, self.num_frames = feature_stride, num_frames
        self.max_seq_len, self.trunc_thresh, self.crop_ratio = max_seq_len, trunc_thresh, crop_ratio
        self.resize_to, self.downsample_rate = resize_to, downsample_rate
        self.training, self.seed = training, seed

        if not isinstance(annotations, Mapping):
            annotations = load_annotations(annotations)
        _check_database(annotations, "annotations")
        if label2id is None:
            label2id = {name: label_id for label_id, name in enumerate(label_names(annotations))}
        self.label2id, self.id2label = dict(label2id), {}
        for name, label_id in label2id.items():
            self.id2label[label_id] = name if label_id not in self.id2label else f"LABEL_{label_id}"

        self._videos, missing = [], []
        for video_id, entry in _select_split(annotations["database"], split).items():
            try:
                paths = _feature_paths(feature_folder, video_id, file_prefix, file_ext)
            except FileNotFoundError as error:
                missing.append(f"{video_id}: {error}")
                continue
            stored = self._check_stored(paths[0], video_id, is_first=not self._videos)
            rate = fps or stored.get("fps")
            self._videos.append(_read_entry(video_id, entry, paths, rate, self.label2id, deduplicate))
        if missing and not skip_missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(missing) + len(self._videos)} videos have no feature file "
                "(skip_missing=True leaves them out):\n" + "\n".join(missing)
            )
        if missing:
            warnings.warn(f"{len(missing)} of {len(missing) + len(self._videos)} videos left out: no feature file.")
        if not self._videos:
            raise ValueError(f"There is no video to read: all are missing in {feature_folder}, or the split is empty.")
        self.video_ids = [video.video_id for video in self._videos]
        self.feature_size = feature_size
        self.feature_size = self.open_features(0).shape[1]
        super().__init__(len(self._videos))

    def _check_stored(self, path: Path, video_id: str, is_first: bool) -> dict[str, float]:
        """The geometry that a feature file says it has, which must be the data set's. (Its fps is the clock's on which the
        features were made, and may be another than the video's.)"""
        stored = stored_geometry(path)
        for name in ("feature_stride", "num_frames"):
            if name in stored and stored[name] != getattr(self, name):
                raise ValueError(
                    f"{video_id}: {path} was made with {name} {stored[name]}, but the data set has {getattr(self, name)}. Set "
                    "feature_stride and num_frames as the features were made (the recipe's section feature_extractor)."
                )
        encoder = stored_encoder(path)
        if is_first:
            self.encoder = encoder
        elif encoder != self.encoder:
            raise ValueError(
                f"{video_id}: {path} was made by the encoder {encoder}, but those before it by {self.encoder}. Features of "
                "different encoders have nothing in common: extract them again with one."
            )
        return stored

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        video = self._videos[index]
        features = self.open_features(index)[:: self.downsample_rate]
        feature_stride, num_frames = self.feature_stride * self.downsample_rate, self.num_frames
        if self.resize_to is not None:
            # The new features share out the frames from the first to the last that the old ones cover.
            feature_stride = num_frames = ((len(features) - 1) * feature_stride + num_frames) / self.resize_to
            features = resize_features(features, self.resize_to)

        segments, class_labels = video.segments * video.fps - 0.5 * num_frames, video.class_labels
        segments = (segments / feature_stride).astype(np.float32)
        if self.training:
            features, segments, class_labels = self._augment(
                index, features, segments, class_labels, offset=0.5 * num_frames / feature_stride
            )
        return {
            "video_id": video.video_id,
            "features": np.array(
                features, dtype=np.float32
            ),  # a copy: memory maps are read-only, and here reading ends
            "segments": segments,
            "class_labels": class_labels,
            "geometry": {
                "fps": video.fps,
                "feature_stride": feature_stride,
                "num_frames": num_frames,
                "duration": video.duration,
            },
        }

    def _augment(
        self, index: int, features: np.ndarray, segments: np.ndarray, class_labels: np.ndarray, offset: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.resize_to is not None:
            segments, keep = _clip_segments(segments, -np.inf, len(features) + offset, self.trunc_thresh)
            segments, class_labels = segments[keep], class_labels[keep]
        rng = None if self.seed is None else random.Random(str((self.seed, index, *self._next_draw(index))))
        self._accesses[index] += 1
        return truncate_features(
            features,
            segments,
            class_labels,
            self.max_seq_len or len(features),
            self.trunc_thresh,
            offset,
            self.crop_ratio,
            rng=rng,
        )

    def open_features(self, index: int) -> np.ndarray:
        """(time, channels) as stored, before anything is done to them; a `.npy` file comes as a read-only memory map.

        Raises:
            ValueError: unreadable, not numbers, or not of that shape; the message names the video.
        """
        video = self._videos[index]
        try:
            return _open_features(video.paths, self.feature_size)
        except ValueError as error:
            raise ValueError(f"{video.video_id}: {error}") from error

    def ground_truth(self) -> dict[str, dict[str, np.ndarray]]:
        """{video id: {"segments": (N, 2) seconds, "labels": (N,)}} of all videos, uncut: what
        `evaluation.evaluate_detections` compares with."""
        return {video.video_id: {"segments": video.segments, "labels": video.class_labels} for video in self._videos}


def _select_split(database: Mapping, split: str | Sequence[str] | None) -> dict:
    for video_id, entry in database.items():
        if not isinstance(entry, Mapping):
            raise ValueError(f"{video_id}: its entry is a {type(entry).__name__}, expected a dictionary.")
    if split is None:
        return dict(database)
    wanted = {name.lower() for name in ([split] if isinstance(split, str) else split)}
    subset_of = {video_id: str(entry.get("subset", "")).lower() for video_id, entry in database.items()}
    if wanted - {*subset_of.values()}:
        raise ValueError(
            f"There is no subset {sorted(wanted - {*subset_of.values()})}; the annotations have "
            f"{dict(Counter(subset_of.values()))} (subset and number of videos)."
        )
    return {video_id: entry for video_id, entry in database.items() if subset_of[video_id] in wanted}


def _read_entry(
    video_id: str, entry: Mapping, paths: list[Path], fps: float | None, label2id: Mapping[str, int], deduplicate: bool
) -> _Video:
    fps, duration = (entry.get("fps") if fps is None else fps), entry.get("duration")
    if not _is_number(fps) or fps <= 0:
        raise ValueError(f"{video_id}: its entry says fps {fps!r}, expected a number > 0; correct it or pass fps=.")
    if duration is not None and (not _is_number(duration) or duration <= 0):
        raise ValueError(
            f"{video_id}: its duration is {duration!r}, expected seconds > 0; validate_annotations helps."
        )
    annotations = entry.get("annotations") or []
    try:
        labels = np.array([annotation["label"] for annotation in annotations], dtype=str)
        segments = np.array([annotation["segment"] for annotation in annotations], dtype=np.float64)
        segments = segments.reshape(len(annotations), 2)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{video_id}: each annotation must have a "label" and a "segment" of two numbers ({error!r}); '
            "validate_annotations lists all that is wrong."
        ) from error
    unknown = sorted({*labels.tolist()} - {*label2id})
    if unknown:
        raise ValueError(f"{video_id}: label2id has no {unknown}; it has {len(label2id)} names: add or correct them.")
    if deduplicate:  # by name, also where several names share an id
        names, name_of = np.unique(labels, return_inverse=True)
        segments, name_of = remove_duplicates(segments, name_of)
        labels = names[name_of]
    # (an end past the duration is no error: THUMOS14 has thirty; validate_annotations tells)
    bad = ~(segments[:, 0] < segments[:, 1]) | ~np.isfinite(segments).all(axis=1) | (segments[:, 0] < 0)
    if bad.any():
        raise ValueError(
            f"{video_id}: the segment {segments[bad][0].tolist()} is not 0 <= start < end in seconds; "
            "validate_annotations lists all that is wrong."
        )
    class_labels = np.array([label2id[label] for label in labels.tolist()], dtype=np.int64)
    return _Video(video_id, paths, float(fps), duration, segments, class_labels)


@dataclass
class DataCollator:
    """Items of a dataset to what the model takes: {"input_features" (batch, T, channels), "attention_mask" (batch, T),
    "labels" [{"segments" (N, 2), "class_labels" (N,)}, ...]}.

    With transformers' Trainer, say `TrainingArguments(remove_unused_columns=False, eval_do_concat_batches=False)`: items
    are not yet what the model takes, and lists of labels cannot be concatenated.

    Args:
        feature_extractor: a `ConvTransformerFeatureExtractor`: checks and pads the features.
        max_length: pad to this length; None: to the longest of the batch.
        return_metadata: also "video_ids" and "geometry", lists with one entry per item, for turning the model's output
            into seconds. The model itself does not take them.
    """

    feature_extractor: Any
    max_length: int | None = None
    return_metadata: bool = False

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if any("video_id" not in item for item in items):
            raise ValueError(
                f"The collator got items with the keys {sorted(items[0])}; expected those of TemporalActionDataset. Trainer "
                "takes away what forward does not name, unless TrainingArguments(remove_unused_columns=False)."
            )
        video_ids, padding = [item["video_id"] for item in items], {}
        if self.max_length is not None:
            padding = {"max_length": self.max_length, "padding": "max_length"}
            for item in items:
                if len(item["features"]) > self.max_length:
                    raise ValueError(
                        f"{item['video_id']}: {len(item['features'])} features do not fit into max_length "
                        f"{self.max_length}; raise it, or set max_seq_len and training=True in the dataset."
                    )
        batch = dict(
            self.feature_extractor(
                [item["features"] for item in items], names=video_ids, return_tensors="pt", **padding
            )
        )
        # Copies, because an Arrow dataset's arrays are read-only.
        batch["labels"] = [
            {
                "segments": torch.tensor(np.asarray(item["segments"]), dtype=torch.float32),
                "class_labels": torch.tensor(np.asarray(item["class_labels"]), dtype=torch.long),
            }
            for item in items
        ]
        if self.return_metadata:
            # Plain numbers: an Arrow dataset in NumPy's format has arrays without axes here.
            geometry = [
                {name: None if value is None else float(value) for name, value in item["geometry"].items()}
                for item in items
            ]
            batch |= {"video_ids": video_ids, "geometry": geometry}
        return batch


# --- Arrow datasets -------------------------------------------------------------------------------------------------


def to_hf_dataset(dataset: Dataset):
    """A `datasets.Dataset` (Arrow) with the items of one of the datasets here: to save, share (`push_to_hub`) and stream.

        to_hf_dataset(train_set).push_to_hub("me/my-recordings", split="train")
        streamed = load_dataset("me/my-recordings", split="train", streaming=True).with_format("numpy")
        names = streamed.features["class_labels"].feature.names

    Its items, `with_format("numpy")`, are again what `DataCollator` takes. Class names travel in its schema. Store items
    without augmentation (`training=False`).

    Args:
        dataset: has `id2label` and `feature_size`; items as those of `TemporalActionDataset`.

    Raises:
        ImportError: the package datasets is not installed.
        ValueError: class ids without a name between others.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f'to_hf_dataset needs datasets: pip install "modeling-convtransformer[train]" ({error})'
        ) from error
    names = [dataset.id2label.get(index) for index in range(max(dataset.id2label, default=-1) + 1)]
    if None in names:
        raise ValueError(
            f"The class id {names.index(None)} has no name in id2label; an Arrow schema needs all of them."
        )
    schema = datasets.Features(
        {
            "video_id": datasets.Value("string"),
            "features": datasets.Array2D((None, dataset.feature_size), "float32"),
            "segments": datasets.Array2D((None, 2), "float32"),
            "class_labels": datasets.List(datasets.ClassLabel(names=names)),
            "geometry": {
                name: datasets.Value("float64") for name in ("fps", "feature_stride", "num_frames", "duration")
            },
        }
    )
    # datasets takes a generator with equal arguments from its cache, though files of features may have changed since.
    arguments = {"dataset": dataset, "call": uuid.uuid4().hex}
    return datasets.Dataset.from_generator(_iterate, features=schema, gen_kwargs=arguments)


class CroppedDataset(_DrawsAnew, Dataset):
    """The items of another dataset, such as an Arrow one, cut at random as `TemporalActionDataset` does for training.

    Args:
        dataset: items as those of `TemporalActionDataset`, without augmentation; an Arrow dataset `with_format("numpy")`.
        max_seq_len, trunc_thresh, crop_ratio: see `truncate_features`; no max_seq_len: no video is too long.
        seed: draw by (seed, epoch, index, number of accesses).
    """

    def __init__(
        self,
        dataset: Dataset,
        max_seq_len: int | None = None,
        trunc_thresh: float = 0.5,
        crop_ratio: tuple[float, float] | None = None,
        seed: int = 0,
    ) -> None:
        self.dataset, self.seed = dataset, seed
        self.max_seq_len, self.trunc_thresh, self.crop_ratio = max_seq_len, trunc_thresh, crop_ratio
        super().__init__(len(dataset))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        item = dict(self.dataset[index])
        rng = random.Random(str((self.seed, index, *self._next_draw(index))))
        self._accesses[index] += 1
        item["features"], item["segments"], item["class_labels"] = truncate_features(
            item["features"],
            np.asarray(item["segments"], dtype=np.float32).reshape(-1, 2),
            np.asarray(item["class_labels"], dtype=np.int64),
            self.max_seq_len or len(item["features"]),
            self.trunc_thresh,
            float(0.5 * item["geometry"]["num_frames"] / item["geometry"]["feature_stride"]),
            self.crop_ratio,
            rng=rng,
        )
        return item


def _iterate(dataset: Dataset, call: str) -> Iterator[dict[str, Any]]:
    for index in range(len(dataset)):
        yield dataset[index]


# --- Moments: segments that are described in words -------------------------------------------------------------------


class MomentDataset(_DrawsAnew, Dataset):
    """The items of another dataset, asked for in words: what `ConvTransformerForMomentRetrieval` learns.

    An item is {"video_id", "features" (T, channels), "queries": list of str, "segments": for each query its (N, 2) float32
    on the feature grid, "query_labels": for each query the class id it stands for, "geometry"}. A class that a recording
    lacks is a query without an answer, N = 0; models learn from those to say no.

    Args:
        dataset: items as those of `TemporalActionDataset`, and `id2label`.
        phrasings: {class name: sentences that describe it}; None: each name is its own sentence.
        training: each class with one of its sentences, drawn at random at each access; else all sentences of each class.
        absent: classes that the recording lacks to draw at random as queries; None: all of them. A recording without any
            segment is asked for one at least. With training=False the same are drawn at each access.
        seed: draw by (seed, epoch, index, number of accesses).

    Raises:
        ValueError: sentences for a class that the dataset lacks, a class without one, one that is no text, or one sentence
            for two classes.
    """

    def __init__(
        self,
        dataset: Dataset,
        phrasings: Mapping[str, Sequence[str]] | None = None,
        training: bool = False,
        absent: int | None = None,
        seed: int = 0,
    ) -> None:
        self.dataset, self.training, self.absent, self.seed = dataset, training, absent, seed
        names = [name for _, name in sorted(dataset.id2label.items())]
        self.phrasings = {name: [name] for name in names} if phrasings is None else phrasings
        if missing := sorted({*names} ^ {*self.phrasings}):
            raise ValueError(
                f"phrasings and the classes of the dataset must be the same, but only one of them has {missing}."
            )
        meaning: dict[str, str] = {}
        for name, sentences in self.phrasings.items():
            if isinstance(sentences, str) or not sentences:
                raise ValueError(
                    f"phrasings of {name!r} are {sentences!r}; expected a list with at least one sentence."
                )
            for sentence in sentences:
                if not isinstance(sentence, str) or not sentence.strip():
                    raise ValueError(f"phrasings of {name!r} hold {sentence!r}; expected text.")
                if meaning.setdefault(sentence, name) != name:
                    raise ValueError(
                        f"{sentence!r} stands for {meaning[sentence]!r} and {name!r}; expected one of them."
                    )
        super().__init__(len(dataset))

    @property
    def sentences(self) -> list[str]:
        """All of them, each once: to embed before training."""
        return [*dict.fromkeys(sentence for sentences in self.phrasings.values() for sentence in sentences)]

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        item = self.dataset[index]
        segments = np.asarray(item["segments"], dtype=np.float32).reshape(-1, 2)
        class_labels = np.asarray(item["class_labels"], dtype=np.int64)
        rng = random.Random(str((self.seed, index, *(self._next_draw(index) if self.training else (0, 0)))))
        self._accesses[index] += 1
        absent = [label for label in sorted(self.dataset.id2label) if label not in class_labels]
        if self.absent is not None:
            count = max(self.absent, 0 if len(class_labels) else 1)
            absent = rng.sample(absent, min(count, len(absent)))
        asked = []
        for label in sorted({*class_labels.tolist(), *absent}):
            sentences = self.phrasings[self.dataset.id2label[label]]
            asked += [(sentence, label) for sentence in ([rng.choice(sentences)] if self.training else sentences)]
        return {
            "video_id": item["video_id"],
            "features": item["features"],
            "queries": [sentence for sentence, _ in asked],
            "segments": [segments[class_labels == label] for _, label in asked],
            "query_labels": [label for _, label in asked],
            "geometry": item["geometry"],
        }


@dataclass
class MomentCollator:
    """Items of a `MomentDataset` to what `ConvTransformerForMomentRetrieval` takes: "input_features", "attention_mask",
    "query_attention_mask" and "query_input_ids" or "query_embeds" (see `ConvTransformerProcessor`), and "labels", for each
    item and each of its queries {"segments" (N, 2) on the grid}.

    With transformers' Trainer, say `TrainingArguments(remove_unused_columns=False, eval_do_concat_batches=False)`.

    Args:
        processor: a `ConvTransformerProcessor`.
        text_embeds: {sentence: (words, text width)} from `retrieval.embed_sentences`: a frozen text encoder need not read
            the same sentences again at each step. None: the model's text encoder reads them.
        return_metadata: also "video_ids", "geometry", "queries" and "query_labels", lists with one entry per item. The model
            itself does not take them.
    """

    processor: Any
    text_embeds: Mapping[str, torch.Tensor] | None = None
    return_metadata: bool = False

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if any("queries" not in item for item in items):
            raise ValueError(
                f"The collator got items with the keys {sorted(items[0])}; expected those of MomentDataset. Trainer takes away "
                "what forward does not name, unless TrainingArguments(remove_unused_columns=False)."
            )
        features, names = [item["features"] for item in items], [item["video_id"] for item in items]
        queries = [item["queries"] for item in items]
        if self.text_embeds is None:
            batch = dict(self.processor(features, queries, names=names, return_tensors="pt"))
        else:
            batch = dict(self.processor.feature_extractor(features, names=names, return_tensors="pt"))
            batch |= self._look_up(queries, names)
        batch["labels"] = [
            [{"segments": torch.tensor(np.asarray(segments), dtype=torch.float32)} for segments in item["segments"]]
            for item in items
        ]
        if self.return_metadata:
            batch |= {"video_ids": names, "geometry": [item["geometry"] for item in items]}
            batch |= {"queries": queries, "query_labels": [item["query_labels"] for item in items]}
        return batch

    def _look_up(self, queries: list[list[str]], names: list[str]) -> dict[str, torch.Tensor]:
        for own, name in zip(queries, names, strict=True):
            if unknown := [query for query in own if query not in self.text_embeds]:
                raise ValueError(
                    f"{name}: text_embeds lacks {unknown[0]!r}; embed all of MomentDataset.sentences, or give no text_embeds."
                )
        words = [[self.text_embeds[query] for query in own] for own in queries]
        longest = max(len(one) for own in words for one in own)
        shape = (len(words), max(map(len, words)), longest)
        embeds = words[0][0].new_zeros(*shape, words[0][0].shape[1])
        mask = torch.zeros(shape, dtype=torch.long)
        for row, own in enumerate(words):
            for column, one in enumerate(own):
                embeds[row, column, : len(one)], mask[row, column, : len(one)] = one, 1
        return {"query_embeds": embeds, "query_attention_mask": mask}


# --- Choosing a pyramid ---------------------------------------------------------------------------------------------

# A level should regress distances of no more than this many of its strides (the default ranges double from 4 on).
_STRIDES_PER_LEVEL = 4


def suggest_config(
    annotations: Mapping | str | os.PathLike,
    fps: float | None = None,
    stride: float = 1,
    *,
    num_frames: float | None = None,
    split: str | Sequence[str] | None = None,
    embedding_and_stem: tuple[int, int] = (2, 2),
) -> dict[str, Any]:
    """Fields of a `ConvTransformerConfig` whose pyramid fits the lengths of the annotated segments, and a printed table of
    which level learns how many of them.

    There are as many levels as it takes for the longest segments (99 of 100) to reach no farther than four strides of the
    coarsest level from their centre. Which point learns which segment is what `loss_convtransformer.assign_targets` says, at
    the segments' true positions.

    Args:
        annotations: the content of an annotation file, or its path; see `load_annotations`.
        fps: frames (or samples) per second; None: each entry's own.
        stride: frames from one feature to the next.
        num_frames: frames that one feature covers; None: the stride.
        split: name or names of the subsets to look at; None: all.
        embedding_and_stem: the first two numbers of `arch`.

    Returns:
        `{"arch", "regression_range", "max_len", "num_labels"}`, for `ConvTransformerConfig(**fields, n_in=...)`.

    Raises:
        ValueError: no segment to look at, or annotations that cannot be read; see `TemporalActionDataset`.
    """
    from .loss_convtransformer import assign_targets

    if not isinstance(annotations, Mapping):
        annotations = load_annotations(annotations)
    _check_database(annotations, "annotations")
    if not (_is_number(stride) and stride > 0):
        raise ValueError(f"stride must be a number of frames > 0, but is {stride!r}.")
    names = label_names(annotations)
    label2id = {name: index for index, name in enumerate(names)}
    num_frames = stride if num_frames is None else num_frames
    videos = [
        _read_entry(name, entry, [], fps, label2id, deduplicate=False)
        for name, entry in _select_split(annotations["database"], split).items()
    ]
    grids = [(video.segments * video.fps - 0.5 * num_frames) / stride for video in videos]
    lengths = np.concatenate([grid[:, 1] - grid[:, 0] for grid in grids]) if grids else np.zeros(0)
    if not len(lengths):
        raise ValueError("There is no annotated segment to look at: the split is empty, or the wrong one.")
    reach = float(np.quantile(lengths, 0.99)) / 2
    levels = 1 + max(1, math.ceil(math.log2(max(reach / _STRIDES_PER_LEVEL, 1))))
    bounds = [0] + [_STRIDES_PER_LEVEL * 2**level for level in range(levels - 1)] + [10000]
    ranges = [[bounds[level], bounds[level + 1]] for level in range(levels)]

    learned = np.zeros((len(lengths), levels), dtype=np.int64)
    first = 0
    for video, grid in zip(videos, grids, strict=True):
        if not len(grid):
            continue
        end = max(grid[:, 1].max(), 0.0)
        if video.duration is not None:
            end = max(video.duration * video.fps / stride, 1.0)
        for level in range(levels):
            points = torch.arange(0, math.ceil(end), 2**level, dtype=torch.float32)
            candidates = assign_targets(
                points,
                torch.full_like(points, 2**level),
                torch.tensor(ranges[level], dtype=torch.float32).expand(len(points), 2),
                torch.as_tensor(grid, dtype=torch.float32)[None],
                torch.zeros(1, len(grid), dtype=torch.long),
                torch.ones(1, len(grid), dtype=torch.bool),
                1,
            )[2]
            learned[first : first + len(grid), level] = candidates[0].sum(dim=0).numpy()
        first += len(grid)

    rates = {video.fps for video in videos}
    second = f"{min(rates) / stride:.4g} features a second" if len(rates) == 1 else "several rates"
    print(
        f"{len(lengths)} segments of {len(names)} classes in {len(videos)} recordings, {second}\n"
        f"length in features: shortest {lengths.min():.1f}, median {np.median(lengths):.1f}, "
        f"99 of 100 below {2 * reach:.1f}, longest {lengths.max():.1f}\n\n"
        f"{'level':>5}  {'stride':>6}  {'regression range':>16}  {'segments':>9}  {'points each':>11}"
    )
    for level in range(levels):
        count = learned[:, level]
        each = count[count > 0].mean() if (count > 0).any() else 0.0
        share = (count > 0).mean()
        print(f"{level:>5}  {2**level:>6}  {ranges[level]!s:>16}  {share:>9.1%}  {each:>11.1f}")
    nothing = int((learned.sum(axis=1) == 0).sum())
    print(f"\n{nothing} of {len(lengths)} segments teach nothing", end="")
    short = int((lengths < 1).sum())
    print(f"; {short} are shorter than one feature: use a smaller feature stride." if short else ".")

    longest = max((video.duration or 0) * video.fps / stride for video in videos)
    fields = {
        "arch": [*embedding_and_stem, levels - 1],
        "regression_range": ranges,
        "max_len": int(min(max(64, 2 ** math.ceil(math.log2(max(longest, 1)))), 2304)),
        "num_labels": len(names),
    }
    print("\nmodel:\n" + "".join(f"  {name}: {value}\n" for name, value in fields.items()))
    return fields


# --- Recordings of sensors ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SensorAugmentation:
    """What `SensorDataset` does to a recording each time it is read for training, in this order; 0 or False: nothing.

    Attributes:
        speed: play it faster or slower by a factor of exp(-speed) to exp(speed).
        rotation: turn every three channels (the axes of one sensor) by the same random rotation, whose vector has normal
            components of this standard deviation, in radians: a device that is worn a little differently.
        gain: multiply each channel by 1 - gain to 1 + gain.
        noise: add normal noise of this standard deviation, in the channels' own units.
        shift: start at a random sample within the first stride, so that windows are never cut at the same places.
    """

    speed: float = 0.0
    rotation: float = 0.0
    gain: float = 0.0
    noise: float = 0.0
    shift: bool = True

    def __post_init__(self) -> None:
        for name in ("speed", "rotation", "gain", "noise"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < math.inf or (name in ("speed", "gain") and value >= 1):
                raise ValueError(
                    f"{name} is {value!r}; expected a number, 0 or more{', below 1' * (name != 'noise')}."
                )

    def __call__(
        self,
        signal: np.ndarray,
        segments: np.ndarray,
        window: int,
        stride: int,
        fps: float,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The signal (n, channels) and its segments (N, 2, seconds) as training sees them this time."""
        if self.speed:
            factor = math.exp(rng.uniform(-self.speed, self.speed))
            factor = min(factor, max(len(signal) - 1, 1) / window)  # a window must be left of a short recording
            place = np.arange(0, len(signal) - 1, factor)
            before = place.astype(np.int64).clip(max=len(signal) - 2)  # rounding may step onto the last sample
            share = (place - before).astype(np.float32)[:, None]
            signal, segments = signal[before] * (1 - share) + signal[before + 1] * share, segments / factor
        if self.rotation:
            if signal.shape[1] % 3:
                raise ValueError(
                    f"rotation turns the three axes of each sensor, but the signal has {signal.shape[1]} channels; set it to 0."
                )
            turned = signal.reshape(len(signal), -1, 3) @ _random_rotation(self.rotation, rng).T
            signal = turned.reshape(signal.shape)
        if self.gain:
            signal = signal * rng.uniform(1 - self.gain, 1 + self.gain, signal.shape[1]).astype(np.float32)
        if self.noise:
            signal = signal + rng.normal(0, self.noise, signal.shape).astype(np.float32)
        if self.shift:
            start = int(rng.integers(max(1, min(stride, len(signal) - window))))
            signal, segments = signal[start:], segments - start / fps
        return signal, segments


def _random_rotation(spread: float, rng: np.random.Generator) -> np.ndarray:
    """(3, 3) float32, by the formula of Rodrigues: a rotation vector of three normal components (radians)."""
    vector = rng.normal(0, spread, 3)
    angle = np.linalg.norm(vector)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return (np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross).astype(np.float32)


class SensorDataset(_DrawsAnew, Dataset):
    """Raw recordings of a sensor, cut into overlapping windows when they are read, with their annotated segments.

    Items are those of `TemporalActionDataset`, with raw windows as features (`window_features`): fps is the sampling
    rate, feature_stride the stride and num_frames the window. In training, recordings are augmented before they are
    cut; a segment of which less than half is left at the ends is left out.

    Args:
        signals: {recording: (n, channels)}, all of the same number of channels; others than the annotated ones too.
        annotations: the content of an annotation file, or its path; see `load_annotations`.
        split: name or names of the subsets to take, in any case; None: all recordings.
        window, stride: in samples.
        fps: samples per second; None: each entry's own.
        label2id: class name to id; None: the position in `label_names`.
        training: augment.
        augmentation: how; None: not at all.
        seed: augment by (seed, epoch, index, number of accesses).

    Attributes:
        video_ids: in the order of the items.
        label2id, id2label: class name to id and back.
        feature_size: window * channels.

    Raises:
        KeyError: an annotated recording has no signal.
        ValueError: an unknown split, no recordings, no fps, labels or segments that cannot be used, or signals that are
            not (n, channels) or shorter than a window; the message names the recording.
    """

    def __init__(
        self,
        signals: Mapping[str, np.ndarray],
        annotations: Mapping | str | os.PathLike,
        split: str | Sequence[str] | None = None,
        *,
        window: int,
        stride: int,
        fps: float | None = None,
        label2id: Mapping[str, int] | None = None,
        training: bool = False,
        augmentation: SensorAugmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.window, self.stride, self.seed = window, stride, seed
        self.training, self.augmentation = training, augmentation
        if not isinstance(annotations, Mapping):
            annotations = load_annotations(annotations)
        _check_database(annotations, "annotations")
        if label2id is None:
            label2id = {name: label_id for label_id, name in enumerate(label_names(annotations))}
        self.label2id = dict(label2id)
        self.id2label = {label_id: name for name, label_id in self.label2id.items()}
        entries = _select_split(annotations["database"], split)
        if not entries:
            raise ValueError("There is no recording to read: the split is empty.")
        if missing := [name for name in entries if name not in signals]:
            raise KeyError(f"{len(missing)} of {len(entries)} annotated recordings have no signal: {missing[:5]} ...")
        self._signals, self._videos = [], []
        for name, entry in entries.items():
            self._videos.append(_read_entry(name, entry, [], fps, self.label2id, deduplicate=False))
            signal = np.asarray(signals[name], dtype=np.float32)
            channels = (self._signals[0] if self._signals else signal).shape[-1]
            if signal.ndim != 2 or signal.shape[1] != channels or len(signal) < window:
                raise ValueError(
                    f"{name}: the signal has shape {signal.shape}; expected (samples, {channels}) with at least one window "
                    f"of {window} samples."
                )
            self._signals.append(signal)
        self.video_ids = [video.video_id for video in self._videos]
        self.feature_size = window * self._signals[0].shape[1]
        super().__init__(len(self._videos))

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        video, signal = self._videos[index], self._signals[index]
        segments, class_labels, duration = video.segments, video.class_labels, video.duration
        if self.training and self.augmentation is not None:
            rng = np.random.default_rng([self.seed, index, *self._next_draw(index)])
            self._accesses[index] += 1
            signal, segments = self.augmentation(signal, segments, self.window, self.stride, video.fps, rng)
            duration = len(signal) / video.fps
            segments, keep = _clip_segments(segments, 0.0, duration, 0.5)
            segments, class_labels = segments[keep], class_labels[keep]
        grid = (segments * video.fps - 0.5 * self.window) / self.stride
        return {
            "video_id": video.video_id,
            "features": window_features(signal, self.window, self.stride),
            "segments": grid.astype(np.float32),
            "class_labels": class_labels,
            "geometry": {
                "fps": video.fps,
                "feature_stride": self.stride,
                "num_frames": self.window,
                "duration": duration,
            },
        }

    def ground_truth(self) -> dict[str, dict[str, np.ndarray]]:
        """{recording: {"segments": (N, 2) seconds, "labels": (N,)}} of all recordings, not augmented."""
        return {video.video_id: {"segments": video.segments, "labels": video.class_labels} for video in self._videos}


# "Smartphone-Based Recognition of Human Activities and Postural Transitions" (Reyes-Ortiz et al., 2016).
SBHAR_URL = (
    "https://archive.ics.uci.edu/static/public/341/"
    "smartphone+based+recognition+of+human+activities+and+postural+transitions.zip"
)

SBHAR_LABELS = [
    "WALKING",
    "WALKING_UPSTAIRS",
    "WALKING_DOWNSTAIRS",
    "SITTING",
    "STANDING",
    "LAYING",
    "STAND_TO_SIT",
    "SIT_TO_STAND",
    "SIT_TO_LIE",
    "LIE_TO_SIT",
    "STAND_TO_LIE",
    "LIE_TO_STAND",
]

SBHAR_FPS = 50  # samples per second

# Who is in which subset.
_SBHAR_SUBSETS = {"training": range(1, 15), "validation": range(15, 21), "testing": range(21, 31)}


def load_sbhar(folder: str | os.PathLike, download: bool = False) -> tuple[dict[str, np.ndarray], dict]:
    """SBHAR: people with a smartphone at the waist, 12 activities with true start and end, six of them short transitions
    between postures.

    Reyes-Ortiz et al., "Transition-Aware Human Activity Recognition Using Smartphones" (2016), the raw recordings of the
    UCI archive (https://archive.ics.uci.edu/dataset/341): 61 untrimmed recordings of 30 people, about seven minutes each.
    For research, not for commercial use; cite the paper.

    Args:
        folder: holds signals.npz and annotations.json as this function writes them, or the unpacked RawData folder of the
            archive, or is where `download` puts it all.
        download: fetch the archive (about 80 MB) if the folder has neither. What was read is written to signals.npz and
            annotations.json, which are found the next time.

    Returns:
        {recording: (n, 6) float32 at 50 Hz, acceleration x, y, z in g and angular velocity x, y, z in rad/s} and the
        annotations, as `SensorDataset` takes them. Subsets: "training" people 1 to 14, "validation" 15 to 20,
        "testing" 21 to 30; each entry names its "person".

    Raises:
        FileNotFoundError: the folder has no recordings, and `download` is False.
        OSError: the download failed.
        ValueError: files that are not those of SBHAR.
    """
    folder = Path(folder)
    arrays, table = folder / "signals.npz", folder / "annotations.json"
    if arrays.exists() and table.exists():
        annotations = load_annotations(table)
        with np.load(arrays, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}, annotations
    raw = next((path.parent for path in sorted(folder.glob("**/RawData/labels.txt"))), None)
    if raw is not None:
        return _read_sbhar(raw)
    if not download:
        raise FileNotFoundError(
            f"{folder} holds no SBHAR recordings: neither signals.npz and annotations.json nor RawData/labels.txt. Give "
            "their folder, or download=True to fetch them from the UCI archive (about 80 MB)."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        archive = Path(temporary) / "sbhar.zip"
        _download(SBHAR_URL, archive)
        try:
            _unpack(archive, Path(temporary))
        except zipfile.BadZipFile as error:
            raise ValueError(f"What {SBHAR_URL} gives is no zip archive ({error}): has it changed?") from error
        raw = next((path.parent for path in sorted(Path(temporary).glob("**/RawData/labels.txt"))), None)
        if raw is None:
            raise ValueError(f"The archive of {SBHAR_URL} holds no RawData/labels.txt: has it changed?")
        signals, annotations = _read_sbhar(raw)
        np.savez(Path(temporary) / arrays.name, **signals)
        (Path(temporary) / table.name).write_text(json.dumps(annotations) + "\n", encoding="utf-8")
        for path in (arrays, table):
            (Path(temporary) / path.name).replace(path)
    return signals, annotations


def _read_sbhar(raw: Path) -> tuple[dict[str, np.ndarray], dict]:
    """From the archive's text files: labels.txt has rows (experiment, person, activity 1 to 12, first and last sample,
    counted from 1), and each experiment a file with three columns for either sensor."""
    rows = np.loadtxt(raw / "labels.txt", dtype=np.int64, ndmin=2)
    if rows.shape[1] != 5 or not ((rows[:, 2] >= 1) & (rows[:, 2] <= len(SBHAR_LABELS))).all():
        raise ValueError(
            f"{raw / 'labels.txt'} must have rows of five: experiment, person, activity 1 to 12, start, end."
        )
    subset_of = {person: subset for subset, people in _SBHAR_SUBSETS.items() for person in people}
    if unknown := sorted({*rows[:, 1].tolist()} - {*subset_of}):
        raise ValueError(f"{raw / 'labels.txt'} has the people {unknown}; SBHAR's are 1 to {max(subset_of)}.")
    signals, database = {}, {}
    for experiment, person in np.unique(rows[:, :2], axis=0).tolist():
        name = f"exp{experiment:02d}_user{person:02d}"
        sensors = [np.loadtxt(raw / f"{kind}_{name}.txt", dtype=np.float32, ndmin=2) for kind in ("acc", "gyro")]
        if sensors[0].shape != sensors[1].shape or sensors[0].shape[1] != 3:
            raise ValueError(f"{name}: expected two files of three columns and as many rows as one another.")
        signals[name] = np.concatenate(sensors, axis=1)
        database[name] = {
            "subset": subset_of[person],
            "person": person,
            "duration": len(signals[name]) / SBHAR_FPS,
            "fps": float(SBHAR_FPS),
            "annotations": [
                {
                    "label": SBHAR_LABELS[activity - 1],
                    "label_id": activity - 1,
                    "segment": [(start - 1) / SBHAR_FPS, end / SBHAR_FPS],
                }
                for activity, start, end in rows[(rows[:, :2] == (experiment, person)).all(axis=1), 2:].tolist()
            ],
        }
    return signals, {"labels": SBHAR_LABELS, "database": database}


def _download(url: str, path: Path) -> None:
    from tqdm import tqdm

    with urllib.request.urlopen(url) as response, open(path, "wb") as file:
        size = int(response.headers.get("Content-Length") or 0) or None
        with tqdm(total=size, unit="B", unit_scale=True, desc="download SBHAR") as progress:
            while chunk := response.read(2**20):
                file.write(chunk)
                progress.update(len(chunk))
    if size is not None and path.stat().st_size != size:
        raise OSError(f"The download of {url} broke off after {path.stat().st_size} of {size} bytes; try again.")


def _unpack(archive: Path, folder: Path) -> None:
    """The archive, and an archive inside it: the UCI archive wraps some of its files twice."""
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    for inner in sorted(folder.glob("*.zip")):
        if inner != archive:
            with zipfile.ZipFile(inner) as file:
                file.extractall(folder)


# --- Shoulder exercises, recorded by a watch ------------------------------------------------------------------------

# The exercises of Burns et al. (2018), in the order of seglearn's class ids. seglearn calls them PEN, ABD, FEL, IR, ER,
# TRAP and ROW; the names are those of the authors' data set, https://github.com/dmbee/SPAR-dataset.
WATCH_LABELS = [
    "pendulum",
    "abduction",
    "forward elevation",
    "internal rotation",
    "external rotation",
    "lower trapezius row",
    "bent over row",
]

WATCH_FPS = 50  # samples per second

_WATCH_SIDES = ("left", "right")  # seglearn's 0 and 1

# The made pauses: a wrist that hangs and sways a little, as watches see it.
_GLIDE = 1.0  # seconds from a recording to the still pose and back
_POSE_SPREAD = 0.15  # g, each axis: how much the pose differs from pause to pause
_SWAY = 0.03  # g
_SWAY_PERIOD = (3.0, 6.0)  # seconds
_NOISE = (0.01, 0.01, 0.01, 0.05, 0.05, 0.05)  # g, g, g, rad/s, rad/s, rad/s


def load_watch_recordings() -> list[dict[str, Any]]:
    """140 recordings of shoulder exercises by a watch: ten people, both arms, seven exercises each.

    Burns et al., "Shoulder physiotherapy exercise recognition: machine learning the inertial signals from a
    smartwatch" (2018), https://arxiv.org/abs/1802.01489, in the part that the package seglearn (BSD licence) brings
    along. Each recording is one set of 20 repetitions, 19 to 53 seconds, without rest.

    Returns:
        [{"person": 1 to 10, "side": "left" or "right", "label": one of `WATCH_LABELS`, "signal": (n, 6) float32 at
        50 Hz: acceleration x, y, z in g and angular velocity x, y, z in rad/s}, ...] in seglearn's order.

    Raises:
        ImportError: seglearn is not installed.
    """
    try:
        from seglearn.datasets import load_watch
    except ImportError as error:
        raise ImportError(
            f"The watch recordings come with the package seglearn, which cannot be imported ({error}): "
            'pip install "modeling-convtransformer[demo]"'
        ) from error
    # load_watch unpickles a file. It ships inside seglearn's own wheel, so it is trusted like that package's code,
    # which was just imported; no other file is ever unpickled here.
    data = load_watch()
    return [
        {
            "person": int(person),
            "side": _WATCH_SIDES[int(side)],
            "label": WATCH_LABELS[int(label)],
            "signal": np.ascontiguousarray(signal, dtype=np.float32),
        }
        for person, side, label, signal in zip(data["subject"], data["side"], data["y"], data["X"], strict=True)
    ]


def splice_watch_session(
    recordings: Sequence[Mapping[str, Any]],
    rng: np.random.Generator,
    pause: tuple[float, float] = (3.0, 8.0),
    bout: tuple[float, float] | None = None,
) -> dict[str, np.ndarray]:
    """One long session out of the recordings of one arm: in random order, with unlabelled pauses around them.

    The exercises are real, untouched; the pauses are SYNTHETIC, because the recordings hold no rest. In a pause all six
    channels glide (raised cosine, up to 1 s at each end) from the last sample of one recording to a still pose, and on
    to the first sample of the next. The pose is gravity, 1 g, about where it points at the recordings' ends, turned a
    little at random; slow sway and sensor noise come on top. Real rest is less even (people scratch, drink and walk
    about), so scores on such sessions say more about telling exercises apart than about telling them from daily life.

    Args:
        recordings: of one person and side, from `load_watch_recordings`.
        rng: draws the order, the pauses and the bouts.
        pause: shortest and longest pause, in seconds.
        bout: shortest and longest piece, in seconds, to cut at random out of each recording (augmentation for
            training; a shorter recording is taken whole); None: all of each recording.

    Returns:
        {"signal": (n, 6) float32 at 50 Hz, "segments": (N, 2) float64 seconds, "labels": (N,) int64, the positions in
        `WATCH_LABELS`}, in order of time; n / 50 is the duration. Samples segment * 50 are those of the recording.

    Raises:
        ValueError: no recordings, several people or sides, or bounds that do not rise from 0.
    """
    arms = {(recording["person"], recording["side"]) for recording in recordings}
    if len(arms) != 1:
        raise ValueError(f"A session is one arm's, but the {len(recordings)} recordings are of {sorted(arms)}.")
    for name, bounds in {"pause": pause, "bout": bout}.items():
        if bounds is not None and not (len(bounds) == 2 and 0 <= bounds[0] <= bounds[1] < math.inf):
            raise ValueError(f"{name} must be a shortest and a longest time in seconds, but is {bounds!r}.")
    if bout is not None and round(bout[0] * WATCH_FPS) < 1:
        raise ValueError(f"bout must be at least one sample, {1 / WATCH_FPS} s, but is {bout!r}.")

    ordered = [recordings[index] for index in rng.permutation(len(recordings))]
    signals = [recording["signal"] if bout is None else _cut(recording["signal"], rng, bout) for recording in ordered]
    ends = np.concatenate([recording["signal"][[0, -1], :3] for recording in ordered])
    gravity = np.median(ends, axis=0)

    pieces = []
    for before, after in zip([None, *signals], [*signals, None], strict=True):
        length = round(rng.uniform(*pause) * WATCH_FPS)
        pieces += [
            _make_pause(
                None if before is None else before[-1], None if after is None else after[0], length, gravity, rng
            )
        ]
        pieces += [] if after is None else [after]
    edges = np.cumsum([len(piece) for piece in pieces])[:-1]  # pauses and recordings alternate
    return {
        "signal": np.concatenate(pieces),
        "segments": edges.reshape(-1, 2) / WATCH_FPS,
        "labels": np.array([WATCH_LABELS.index(recording["label"]) for recording in ordered], dtype=np.int64),
    }


def _cut(signal: np.ndarray, rng: np.random.Generator, bout: tuple[float, float]) -> np.ndarray:
    length = min(round(rng.uniform(*bout) * WATCH_FPS), len(signal))
    start = rng.integers(len(signal) - length, endpoint=True)
    return signal[start : start + length]


def _make_pause(
    before: np.ndarray | None, after: np.ndarray | None, length: int, gravity: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(length, 6) float32: rest, gliding from the sample `before` (6,) and to the sample `after` (6,) where given."""
    direction = gravity + rng.normal(0, _POSE_SPREAD, 3)
    pose = np.concatenate([direction / np.linalg.norm(direction), np.zeros(3)])
    period, phase = rng.uniform(*_SWAY_PERIOD, 3), rng.uniform(0, 2 * np.pi, 3)
    rest = pose + rng.normal(0, _NOISE, (length, 6))
    rest[:, :3] += _SWAY * np.sin(2 * np.pi * np.arange(length)[:, None] / (WATCH_FPS * period) + phase)

    steps = min(round(_GLIDE * WATCH_FPS), length // 2)
    fade = (0.5 + 0.5 * np.cos(np.pi * (np.arange(steps) + 0.5) / max(steps, 1)))[:, None]  # 1 to 0
    if before is not None:
        rest[:steps] += fade * (before - rest[:steps])
    if after is not None:
        rest[length - steps :] += fade[::-1] * (after - rest[length - steps :])
    return rest.astype(np.float32)


class WatchDataset(_DrawsAnew, Dataset):
    """Sessions of shoulder exercises, spliced from the recordings of a watch: real data that needs no download.

    Items are those of `TemporalActionDataset`, with raw windows as features (`window_features`); fps is 50,
    feature_stride the stride and num_frames the window. The first session of person 3's left arm is the video
    "person03_left_0". See `load_watch_recordings` for the data and `splice_watch_session` for what is made up in it.

    Args:
        people: 1 to 10. Train and evaluate on different ones.
        sessions_per_side: sessions of each arm, each in its own order and with its own pauses.
        bout, pause: see `splice_watch_session`, in seconds.
        exercises: fewest and most of an arm's seven recordings in a session, drawn at random; None: all of them.
        window, stride: samples, at 50 Hz.
        seed: a whole number >= 0. The same seed gives the same data; a session does not depend on which other people
            are in the dataset.
        training: draw a new session at each access, by (seed, person, side, session, epoch, number of accesses).

    Attributes:
        video_ids: in the order of the items.
        label2id, id2label: class name to id and back.
        feature_size: window * 6.

    Raises:
        ImportError: seglearn is not installed.
        ValueError: people who are not in the data, no session, or an impossible number of exercises.
    """

    def __init__(
        self,
        people: Iterable[int],
        sessions_per_side: int = 1,
        bout: tuple[float, float] | None = None,
        pause: tuple[float, float] = (3.0, 8.0),
        window: int = 50,
        stride: int = 25,
        seed: int = 0,
        training: bool = False,
        exercises: tuple[int, int] | None = None,
    ) -> None:
        if exercises is not None and not (
            len(exercises) == 2 and 1 <= exercises[0] <= exercises[1] <= len(WATCH_LABELS)
        ):
            raise ValueError(
                f"exercises must be the fewest and the most of a session, from 1 to {len(WATCH_LABELS)}, but is "
                f"{exercises!r}."
            )
        self.bout, self.pause, self.exercises, self.window, self.stride = bout, pause, exercises, window, stride
        self.seed, self.training = seed, training
        self._recordings = defaultdict(list)
        for recording in load_watch_recordings():
            self._recordings[recording["person"], recording["side"]].append(recording)
        people = list(people)
        known = sorted({person for person, _ in self._recordings})
        if not people or not {*people} <= {*known} or len({*people}) < len(people) or sessions_per_side < 1:
            raise ValueError(
                f"people must be different ones of {known} and sessions_per_side at least 1, "
                f"but they are {people} and {sessions_per_side}."
            )
        self._sessions = [
            (person, side, session)
            for person in people
            for side in _WATCH_SIDES
            for session in range(sessions_per_side)
        ]
        self.video_ids = [f"person{person:02d}_{side}_{session}" for person, side, session in self._sessions]
        self.id2label = dict(enumerate(WATCH_LABELS))
        self.label2id = {name: label_id for label_id, name in self.id2label.items()}
        self.feature_size = window * 6
        super().__init__(len(self._sessions))

    def __len__(self) -> int:
        return len(self._sessions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        session = self._splice(index)
        self._accesses[index] += 1
        grid = (session["segments"] * WATCH_FPS - 0.5 * self.window) / self.stride
        return {
            "video_id": self.video_ids[index],
            "features": window_features(session["signal"], self.window, self.stride),
            "segments": grid.astype(np.float32),
            "class_labels": session["labels"],
            "geometry": {
                "fps": float(WATCH_FPS),
                "feature_stride": self.stride,
                "num_frames": self.window,
                "duration": len(session["signal"]) / WATCH_FPS,
            },
        }

    def _splice(self, index: int) -> dict[str, np.ndarray]:
        person, side, session = self._sessions[index]
        draw = self._next_draw(index) if self.training else (0, 0)
        rng = np.random.default_rng([self.seed, person, _WATCH_SIDES.index(side), session, *draw])
        recordings = self._recordings[person, side]
        if self.exercises is not None:
            count = rng.integers(*self.exercises, endpoint=True)
            recordings = [recordings[place] for place in rng.permutation(len(recordings))[:count]]
        return splice_watch_session(recordings, rng, self.pause, self.bout)

    def signal(self, index: int) -> np.ndarray:
        """(n, 6) float32, the raw session at 50 Hz of which item `index` is made (when training: the next such item)."""
        return self._splice(range(len(self))[index])["signal"]

    def ground_truth(self) -> dict[str, dict[str, np.ndarray]]:
        """{video id: {"segments": (N, 2) seconds, "labels": (N,)}}, for `evaluation.evaluate_detections`.

        Raises:
            ValueError: when training, where sessions change from access to access.
        """
        if self.training:
            raise ValueError("Training sessions change at each access and have no fixed truth: use training=False.")
        sessions = {video_id: self._splice(index) for index, video_id in enumerate(self.video_ids)}
        return {key: {"segments": value["segments"], "labels": value["labels"]} for key, value in sessions.items()}
