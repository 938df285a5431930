"""ConvTransformerFeatureExtractor: arrays or files in, padded batches out; model outputs in, segments in seconds out.

Seconds exist only here. The model works on the feature grid:
`grid = (seconds * fps - 0.5 * num_frames) / feature_stride`.
"""

import inspect
import math
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature

from .configuration_convtransformer import read_recipe

# Post-processing settings and v1's defaults. "soft" is Gaussian soft-NMS.
_POST_PROCESSING = {
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
# What v1 takes where a file's `dataset` does not say; it has no default rate.
_V1_DATASET = {"input_dim": 2304, "feat_stride": 16, "num_frames": 32}
_NMS_METHODS = ("soft", "linear", "hard", "none")
_GEOMETRY = ("fps", "feature_stride", "num_frames", "duration")

# Up to this many pairs, all decays of soft-NMS are computed at once, if about all will be needed; else one row for each
# segment that is kept.
_MAX_PAIRS = 2**22


class ConvTransformerFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Prepares features for a ConvTransformer and turns its outputs into segments in seconds.

    Args:
        feature_size (`int`): width of a feature; with several streams, the sum of their widths.
        fps (`float`): frames (or samples) per second of the recordings that the features were computed from.
        feature_stride (`float`): frames from one feature to the next.
        num_frames (`float`, *optional*, defaults to `feature_stride`): frames that one feature covers.
        padding_value (`float`, defaults to 0.0): what padded steps hold.
        min_length (`int`, *optional*), pad_to_multiple_of (`int`, *optional*): pad batches to this length at least, and
            beyond it to a multiple. A model does not need it; it is how v1 pads, whose results depend on it.
        length_tolerance (`float`, defaults to 0.1): share by which the number of features may differ from what the
            duration says.
        pre_nms_thresh (`float`, defaults to 0.001): scores must be above this.
        pre_nms_topk (`int`, defaults to 5000): best candidates kept on each level of the pyramid.
        duration_thresh (`float`, defaults to 0.05): segments must be longer than this, in features.
        nms_method (`str`, defaults to `"soft"`): `"soft"` (Gaussian soft-NMS, https://arxiv.org/abs/1704.04503),
            `"linear"` (linear soft-NMS), `"hard"` or `"none"`.
        multiclass_nms (`bool`, defaults to `True`): suppress each class by itself, else all together.
        iou_threshold (`float`, defaults to 0.1): overlap from which `"hard"` suppresses and `"linear"` decays.
        nms_sigma (`float`, defaults to 0.5): width of the Gaussian.
        min_score (`float`, defaults to 0.01): soft-NMS drops segments that it takes below this, hard NMS those that
            are not above it.
        max_seg_num (`int`, defaults to 1000): segments kept for each recording.
        voting_thresh (`float`, defaults to 0.75): with class-agnostic NMS, a kept segment becomes the weighted mean of
            the candidates that overlap it by at least this; 0 or less turns this off.
        external_topk (`int`, defaults to 2): classes taken from `external_scores`.

    Raises:
        ValueError: settings that make no sense; the message names the setting and a value that would work.
    """

    model_input_names = ["input_features", "attention_mask"]

    def __init__(
        self,
        feature_size: int,
        fps: float,
        feature_stride: float,
        num_frames: float | None = None,
        padding_value: float = 0.0,
        min_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        length_tolerance: float = 0.1,
        **kwargs,
    ):
        settings = {name: kwargs.pop(name, default) for name, default in _POST_PROCESSING.items()}
        # The base class wants a rate: it is the recordings'.
        kwargs["sampling_rate"] = fps.item() if isinstance(fps, np.generic) else fps
        super().__init__(feature_size=feature_size, padding_value=padding_value, **kwargs)
        if isinstance(feature_size, bool) or not isinstance(feature_size, int) or feature_size < 1:
            raise ValueError(f"feature_size is {feature_size!r}; expected the width of a feature, a positive integer.")
        if self.padding_side != "right":
            raise ValueError(
                f"padding_side is {self.padding_side!r}; expected 'right': positions on the grid count from the first step."
            )
        for name, value in (("min_length", min_length), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; expected a positive integer, or None.")
        if not 0 <= length_tolerance < math.inf or not math.isfinite(padding_value):
            raise ValueError(
                f"length_tolerance is {length_tolerance!r} and padding_value {padding_value!r}; expected a share of 0 or "
                "more and a finite number."
            )
        num_frames = feature_stride if num_frames is None else num_frames
        # (numbers of numpy cannot be saved as JSON)
        numbers = [x.item() if isinstance(x, np.generic) else x for x in (fps, feature_stride, num_frames)]
        self.fps, self.feature_stride, self.num_frames = numbers
        self.min_length = min_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.length_tolerance = length_tolerance
        _check_geometry(self._geometry(None), "the feature extractor")
        for name, value in _check_settings(settings).items():
            setattr(self, name, value)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "ConvTransformerFeatureExtractor":
        """
        Reads the `feature_extractor` section of one of our YAML files (`configuration/*.yaml`), or `dataset` and
        `test_cfg` of a v1 file, with v1's defaults. `overrides` replace what the file says, such as `fps=25`.

        Raises:
            ValueError: the file has neither, or lacks fps, or one of ours the feature stride or size, or has a setting
                that does not exist.
        """
        content = read_recipe(path)
        if "feature_extractor" in content:
            fields = dict(content["feature_extractor"] or {})
            known = {*inspect.signature(cls.__init__).parameters, *_POST_PROCESSING} - {"self", "kwargs"}
            if unknown := sorted(set(fields) - known):
                raise ValueError(
                    f"{path}: unknown settings in `feature_extractor`: {', '.join(unknown)}. Known: {', '.join(sorted(known))}."
                )
        elif "dataset" in content:
            dataset = {**_V1_DATASET, **(content["dataset"] or {})}
            names = {"input_dim": "feature_size", "default_fps": "fps", "feat_stride": "feature_stride"}
            names["num_frames"] = "num_frames"
            fields = {ours: dataset[theirs] for theirs, ours in names.items() if dataset.get(theirs) is not None}
            if isinstance(fields.get("feature_size"), list):
                fields["feature_size"] = sum(fields["feature_size"])
            fields["feature_stride"] = fields.get("feature_stride", 0) * (dataset.get("downsample_rate") or 1)
            test_cfg = content.get("test_cfg") or {}
            fields.update({name: value for name, value in test_cfg.items() if name in _POST_PROCESSING})
        else:
            raise ValueError(f"{path}: expected a section `feature_extractor`, or v1's `dataset` and `test_cfg`.")
        fields.update(overrides)
        missing = [name for name in ("feature_size", "fps", "feature_stride") if not fields.get(name)]
        if missing:
            raise ValueError(f"{path} does not say {', '.join(missing)}; pass it: from_yaml(path, {missing[0]}=...).")
        return cls(**fields)

    # -----------------------------------------------------------------------------------------------------------------
    # In: arrays or paths to padded batches

    def __call__(
        self,
        features,
        annotations=None,
        geometry: dict | Sequence[dict] | None = None,
        label2id: dict[str, int] | None = None,
        names: Sequence[str] | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            features: one sample or a list of samples, each an array (time, channels) or the path of a .npy file (or of a
                .npz file with one array, or one named `features` or `feats`).
            annotations: for each sample its segments in seconds, as `{"segments": (N, 2), "labels": (N,)}` or as a list
                of `{"segment": [start, end], "label": name or "label_id": id}` (ActivityNet's format). N may be 0.
            geometry: for each sample (or one for all) a dict with any of `fps`, `feature_stride`, `num_frames`,
                `duration` (seconds), where they differ from the feature extractor's.
            label2id: class names to ids, where annotations hold names; ids are then checked too.
            names: names of the samples for error messages; default: the paths, or "sample 0", ...
            padding, max_length, truncation, pad_to_multiple_of, return_attention_mask, return_tensors: as in
                `SequenceFeatureExtractor.pad`.

        Returns:
            `input_features` (batch, time, channels) float32, `attention_mask` (batch, time), and with annotations `labels`,
            a list of `{"segments": (N, 2) float32 on the feature grid, "class_labels": (N,) long}`.

        Raises:
            ValueError: a sample that a model cannot use; the message names the sample and what to do.
        """
        if kwargs:
            raise TypeError(f"Unknown arguments: {', '.join(kwargs)}.")
        samples = _as_samples(features)
        names = _name_samples(samples, names)
        arrays = [self._read(sample, name) for sample, name in zip(samples, names, strict=True)]
        geometries = self._geometries(geometry, names)
        for array, one, name in zip(arrays, geometries, names, strict=True):
            self._check_length(len(array), one, name)

        labels = None
        if annotations is not None:
            if truncation:
                raise ValueError("truncation would cut annotated segments; crop with data.truncate_features instead.")
            if len(samples) == 1 and (isinstance(annotations, dict) or _is_activitynet_list(annotations)):
                annotations = [annotations]
            if len(annotations) != len(samples):
                raise ValueError(
                    f"annotations has {len(annotations)} entries for {len(samples)} samples; give one each."
                )
            labels = [
                _to_labels(annotation, len(array), one, label2id, name)
                for annotation, array, one, name in zip(annotations, arrays, geometries, names, strict=True)
            ]

        pad_to_multiple_of = pad_to_multiple_of or self.pad_to_multiple_of
        if self.min_length is not None and padding in (True, "longest") and max_length is None:
            longest = max(len(array) for array in arrays)
            if longest <= self.min_length:  # v1 pads to its training length, or beyond it to a multiple
                padding, max_length, pad_to_multiple_of = "max_length", self.min_length, None
        batch = self.pad(
            {"input_features": arrays},
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )
        if labels is not None:
            batch["labels"] = labels
        return batch

    def _read(self, sample, name: str) -> np.ndarray:
        """One sample as a checked float32 array (time, channels)."""
        array = _load(sample, name) if isinstance(sample, str | os.PathLike) else sample
        array = array.detach().cpu().float().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
        if (
            array.dtype == object
            or array.dtype.kind == "c"
            or not (np.issubdtype(array.dtype, np.number) or array.dtype == bool)
        ):
            raise ValueError(
                f"{name}: the features have dtype {array.dtype}; expected numbers in an array (time, channels)."
            )
        if array.ndim != 2:
            raise ValueError(f"{name}: the features have shape {array.shape}; expected (time, {self.feature_size}).")
        if array.shape[0] == 0:
            raise ValueError(f"{name}: the features have no time steps (shape {array.shape}); leave this sample out.")
        if array.shape[1] != self.feature_size:
            advice = (
                "Use the feature extractor of the features that you have, or set feature_size and the model's n_in."
            )
            if array.shape[0] == self.feature_size:
                advice = "They look like (channels, time): transpose them, features.T."
            raise ValueError(
                f"{name}: the features have shape {array.shape}; expected (time, {self.feature_size}). {advice}"
            )
        array = np.ascontiguousarray(array, dtype=np.float32)
        finite = np.isfinite(array)
        if not finite.all():
            step, channel = np.argwhere(~finite)[0].tolist()
            count = int(array.size - finite.sum())
            raise ValueError(
                f"{name}: the features hold {count} values that are NaN or infinite, the first at time step {step}, "
                f"channel {channel} ({array[step, channel]}). Repair the file, or np.nan_to_num(features) if zeros are right."
            )
        return array

    def _geometry(self, given: dict | None) -> dict:
        geometry = {
            "fps": self.fps,
            "feature_stride": self.feature_stride,
            "num_frames": self.num_frames,
            "duration": None,
        }
        geometry.update({key: value for key, value in (given or {}).items() if value is not None})
        return geometry

    def _geometries(self, geometry: dict | Sequence[dict] | None, names: Sequence[str]) -> list[dict]:
        if geometry is None or isinstance(geometry, dict):
            geometry = [geometry] * len(names)
        if len(geometry) != len(names):
            raise ValueError(
                f"geometry has {len(geometry)} entries for {len(names)} samples; give one each, or one for all."
            )
        geometries = [self._geometry(one) for one in geometry]
        for one, name in zip(geometries, names, strict=True):
            _check_geometry(one, name)
        return geometries

    def _check_length(self, length: int, geometry: dict, name: str):
        """A feature file of another rate than the settings say puts every segment in the wrong place."""
        if geometry["duration"] is None:
            return
        frames = geometry["duration"] * geometry["fps"]
        expected = (frames - geometry["num_frames"]) / geometry["feature_stride"] + 1
        # Extractors differ in how they treat the ends: a window and two steps are always granted.
        granted = max(self.length_tolerance * expected, geometry["num_frames"] / geometry["feature_stride"] + 2)
        if abs(length - expected) > granted:
            raise ValueError(
                f"{name}: {length} features contradict the duration: {geometry['duration']} s at {geometry['fps']} fps with "
                f"a feature_stride of {geometry['feature_stride']} frames give about {max(expected, 1):.0f}. Check fps and "
                "feature_stride, or raise length_tolerance if features are missing on purpose."
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Out: model outputs to segments in seconds

    def post_process_temporal_action_localization(
        self,
        outputs,
        geometry: dict | Sequence[dict] | None = None,
        threshold: float | None = None,
        top_k: int | None = None,
        external_scores=None,
        **settings,
    ) -> list[dict[str, torch.Tensor]]:
        """
        Args:
            outputs: of `ConvTransformerForTemporalActionLocalization`: `logits` (batch, points, classes), `pred_segments`
                (batch, points, 2) on the grid, `point_mask` and `point_levels` (batch, points).
            geometry: as in `__call__`; with `duration`, segments are clipped to the recording.
            threshold: keep final scores above this.
            top_k: keep at most this many segments of each recording.
            external_scores: (batch, classes) scores of another, recording-level classifier for outputs that hold proposals:
                each segment gets the best `external_topk` of these classes, with score sqrt(its score * the class's).
            settings: replace the feature extractor's own settings for this call.

        Returns:
            for each sample `{"scores": (N,), "labels": (N,), "segments": (N, 2)}`, segments in seconds, best first
            (with `nms_method="none"` in the order of levels, as in v1).

        Raises:
            ValueError: unknown settings, settings out of range, or `external_scores` of another number of samples.
        """
        if unknown := sorted(set(settings) - set(_POST_PROCESSING)):
            raise ValueError(f"Unknown settings: {', '.join(unknown)}. Known: {', '.join(_POST_PROCESSING)}.")
        chosen = _check_settings({name: settings.get(name, getattr(self, name)) for name in _POST_PROCESSING})
        names = ("logits", "pred_segments", "point_mask", "point_levels")
        get = outputs.get if isinstance(outputs, dict) else lambda name: getattr(outputs, name, None)
        outputs = {name: get(name) for name in names}
        if missing := [name for name in names[:2] if outputs[name] is None]:
            raise ValueError(
                f"The outputs have no {' and no '.join(missing)}; expected those of "
                "ConvTransformerForTemporalActionLocalization."
            )
        logits = torch.as_tensor(outputs["logits"])
        device, batch = logits.device, logits.shape[0]
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0):
            raise ValueError(f"top_k is {top_k!r}; expected an integer, 0 or more, or None.")
        if external_scores is not None:
            external_scores = torch.as_tensor(external_scores)
            if external_scores.ndim != 2 or len(external_scores) != batch:
                raise ValueError(
                    f"external_scores has shape {tuple(external_scores.shape)}; expected ({batch}, classes)."
                )
        geometries = self._geometries(geometry, [f"sample {index}" for index in range(batch)])

        sample, segments, scores, labels = self._candidates(outputs, chosen)
        if chosen["nms_method"] != "none":
            groups = sample * logits.shape[2] + labels if chosen["multiclass_nms"] else sample
            kept, kept_scores = suppress(
                segments,
                scores,
                groups,
                method=chosen["nms_method"],
                iou_threshold=chosen["iou_threshold"],
                sigma=chosen["nms_sigma"],
                min_score=chosen["min_score"],
                max_segments=chosen["max_seg_num"],
                recordings=sample,
            )
            kept_segments = segments[kept]
            if chosen["voting_thresh"] > 0 and not chosen["multiclass_nms"]:
                kept_segments = torch.cat(
                    [
                        vote(
                            segments[kept[sample[kept] == index]],
                            segments[sample == index],
                            scores[sample == index],
                            chosen,
                        )
                        for index in range(batch)
                    ]
                )  # `kept` is in order of groups, which here are the samples
            sample, segments, scores, labels = sample[kept], kept_segments, kept_scores, labels[kept]

        results = []
        for index, one in enumerate(geometries):
            own = sample == index
            result = {"scores": scores[own], "labels": labels[own], "segments": segments[own]}
            if chosen["nms_method"] != "none":
                result = _best(result, chosen["max_seg_num"])
            if external_scores is not None:
                result = _fuse(result, external_scores[index], chosen["external_topk"])
            if threshold is not None:
                result = {key: value[result["scores"] > threshold] for key, value in result.items()}
            if top_k is not None:
                result = _best(result, top_k)
            result["segments"] = _to_seconds(result["segments"], one).clamp(min=0.0, max=one["duration"])
            results.append({key: value.to(device) for key, value in result.items()})
        return results

    def to_seconds(
        self, segments: Sequence[torch.Tensor], geometry: dict | Sequence[dict] | None = None
    ) -> list[torch.Tensor]:
        """
        Positions on the feature grid, such as a dataset's segments, in seconds.

        Args:
            segments: for each sample a tensor of any shape.
            geometry: as in `__call__`. Nothing is clipped to `duration`.
        """
        geometries = self._geometries(geometry, [f"sample {index}" for index in range(len(segments))])
        return [_to_seconds(torch.as_tensor(own), one) for own, one in zip(segments, geometries, strict=True)]

    @staticmethod
    def _candidates(outputs, settings: dict) -> tuple[torch.Tensor, ...]:
        """Best scored segments of each level: sample (N,), segments (N, 2) on the grid, scores (N,), labels (N,), on CPU."""
        logits, pred_segments = torch.as_tensor(outputs["logits"]), torch.as_tensor(outputs["pred_segments"])
        point_mask, levels = outputs["point_mask"], outputs["point_levels"]
        batch, points, classes = logits.shape
        scores = logits.detach().float().sigmoid()
        if point_mask is not None:
            scores = scores * (torch.as_tensor(point_mask) > 0).to(scores.device)[..., None]
        counts = [points]
        if levels is not None:  # Trainer and accelerate fill up gathered outputs with negative numbers
            levels = torch.as_tensor(levels)
            longest = levels[(levels >= 0).sum(dim=1).argmax()]
            counts = torch.bincount(longest[longest >= 0]).tolist()
        best_scores, best_points, best_labels, first = [], [], [], 0
        for count in counts:
            flat = scores[:, first : first + count].flatten(1)
            # Equal scores (saturated ones are common) stay in order of time and class, as in v1; topk leaves it open.
            index = (
                flat.topk(min(settings["pre_nms_topk"], flat.shape[1]), dim=1, sorted=False).indices.sort(dim=1).values
            )
            top, order = flat.gather(1, index).sort(dim=1, descending=True, stable=True)
            index = index.gather(1, order)
            best_scores.append(top)
            best_points.append(index.div(classes, rounding_mode="floor") + first)
            best_labels.append(index % classes)
            first += count
        scores, index, labels = torch.cat(best_scores, 1), torch.cat(best_points, 1), torch.cat(best_labels, 1)
        segments = pred_segments.detach().float().take_along_dim(index[..., None], dim=1)
        keep = (scores > settings["pre_nms_thresh"]) & (
            segments[..., 1] - segments[..., 0] > settings["duration_thresh"]
        )
        sample = torch.arange(batch, device=keep.device)[:, None].expand_as(keep)
        return tuple(x[keep].cpu() for x in (sample, segments, scores, labels))


# ---------------------------------------------------------------------------------------------------------------------
# Suppression


def overlap(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor], eps: float = 1e-6):
    """IoU of segments (start, end), broadcast; `eps` is added to lengths, as in v1, so that empty ones divide."""
    intersection = torch.minimum(first[1], second[1]).sub_(torch.maximum(first[0], second[0])).clamp_(min=0)
    union = ((first[1] - first[0]) + (second[1] - second[0]) + 2 * eps).sub_(intersection)
    return intersection.div_(union)


def suppress(
    segments: torch.Tensor,
    scores: torch.Tensor,
    groups: torch.Tensor,
    method: str,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    max_segments: int,
    recordings: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Non-maximum suppression inside each group (a class of a recording, or a recording), all groups at once: again and
    again, every group keeps its best segment and weighs down the others by their overlap with it.

    Args:
        segments: (N, 2); scores: (N,); groups: (N,) integers; all on CPU.
        method: "soft" (weight exp(-IoU ** 2 / sigma)), "linear" (1 - IoU from `iou_threshold` on) or "hard" (0 from
            `iou_threshold` on). Soft methods drop a segment whose score falls below `min_score`; hard NMS begins
            with the scores above `min_score`.
        max_segments: kept in each group.
        recordings: (N,) integers. Where only the best `max_segments` of a whole recording are wanted, naming the
            recording of each segment spares the work on others: groups end once no later choice can be among these.

    Returns:
        indices (M,) of the segments kept, by group and then from best to worst, and their new scores (M,).
    """
    if method == "hard" and min_score > 0:
        candidates = (scores > min_score).nonzero()[:, 0]
    else:
        candidates = torch.arange(len(scores))
    if len(candidates) == 0:
        return candidates, scores[candidates]

    candidates = candidates[groups[candidates].argsort(stable=True)]
    _, sizes = groups[candidates].unique_consecutive(return_counts=True)
    parts = candidates.split(sizes.tolist())
    if method == "hard":  # v1 sorts first; the order of equal scores is the sort's
        parts = [part[scores[part].sort(descending=True).indices] for part in parts]

    def decay(iou: torch.Tensor) -> torch.Tensor:
        if method == "soft":
            return iou.square_().div_(-sigma).exp_()
        return torch.where(iou >= iou_threshold, 1 - iou if method == "linear" else 0.0, 1.0)

    # Groups of like size together: filling up all to the largest would cost more than suppression.
    floor = min_score if method != "hard" else torch.finfo(torch.float32).tiny
    by_size: dict[int, list[torch.Tensor]] = {}
    for part in parts:
        by_size.setdefault(len(part).bit_length(), []).append(part)
    kept, kept_scores = zip(
        *(_suppress_rows(segments, scores, rows, decay, floor, max_segments, recordings) for rows in by_size.values()),
        strict=True,
    )
    kept, kept_scores = torch.cat(kept), torch.cat(kept_scores)
    order = groups[kept].argsort(stable=True)
    return kept[order], kept_scores[order]


def _suppress_rows(segments, scores, rows: list[torch.Tensor], decay, floor: float, max_segments: int, recordings):
    """`suppress` for groups given as indices, side by side in the rows of a matrix, filled up with scores of -1."""
    index = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    current = nn.utils.rnn.pad_sequence([scores[row].float() for row in rows], batch_first=True, padding_value=-1.0)
    starts, ends = segments[:, 0].float()[index], segments[:, 1].float()[index]
    turns = likely_turns = min(max_segments, index.shape[1])
    owners = None
    if recordings is not None:
        _, owners = recordings[index[:, 0]].unique(return_inverse=True)
        likely_turns = min(turns, 2 * max_segments * (int(owners.max()) + 1) // len(rows))
    decays = None
    if index.shape[1] <= 2 * likely_turns and index.shape[0] * index.shape[1] ** 2 <= _MAX_PAIRS:
        pairs = overlap((starts[:, :, None], ends[:, :, None]), (starts[:, None], ends[:, None]))
        decays = decay(pairs).flatten(0, 1)
    first = torch.arange(len(rows)) * index.shape[1]
    taken = current < 0
    picks, pick_scores = [], []
    for turn in range(turns):
        best_scores, best = current.max(dim=1)
        # A score falls below the floor only by a decay: the first choice of a group always stands.
        if turn > 0 and bool((best_scores < floor).all()):
            break
        # (looking costs about as much as a turn)
        if owners is not None and turn % 4 == 3 and _is_settled(pick_scores, best_scores, owners, floor, max_segments):
            break
        picks.append(best)
        pick_scores.append(best_scores)
        chosen = best[:, None]
        if decays is not None:
            current *= decays.index_select(0, first + best)
        else:
            current *= decay(overlap((starts.gather(1, chosen), ends.gather(1, chosen)), (starts, ends)))
        current.scatter_(1, chosen, -1.0)
        if floor <= 0:  # decays take -1 to -0, which would pass
            current.masked_fill_(taken.scatter_(1, chosen, True), -1.0)
    picks, pick_scores = torch.stack(picks, 1), torch.stack(pick_scores, 1)
    keep = pick_scores >= floor
    keep[:, 0] = True
    keep &= pick_scores >= 0
    return index.gather(1, picks)[keep], pick_scores[keep]


def _is_settled(pick_scores: list, best_scores: torch.Tensor, owners: torch.Tensor, floor: float, count: int) -> bool:
    """
    Whether nothing that is still to be chosen can be among the best `count` of its recording: the scores of a group's
    choices only fall, so none of them passes the best one left.
    """
    left = torch.full((int(owners.max()) + 1,), -1.0).scatter_reduce(0, owners, best_scores, "amax")
    better = (torch.stack(pick_scores, dim=1) > left[owners, None]).sum(dim=1)
    better = torch.zeros(len(left), dtype=torch.long).index_add(0, owners, better)
    return bool(((better >= count) | (left < floor)).all())


def vote(kept: torch.Tensor, candidates: torch.Tensor, scores: torch.Tensor, settings: dict) -> torch.Tensor:
    """Segment voting: each kept segment (M, 2) becomes the mean of the candidates (N, 2) near it, by score and IoU."""
    if len(kept) == 0:
        return kept
    iou = overlap((kept[:, None, 0], kept[:, None, 1]), (candidates[None, :, 0], candidates[None, :, 1]), eps=0.0)
    # (two empty segments have no IoU: not a number, which is not above any threshold)
    weights = torch.where(iou >= settings["voting_thresh"], scores[None] * iou, 0.0)
    total = weights.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weights @ candidates / total.clamp(min=torch.finfo(total.dtype).tiny), kept)


def _best(result: dict, count: int) -> dict:
    # torch's own order of equal scores, as in v1
    order = result["scores"].sort(descending=True).indices[:count]
    return {key: value[order] for key, value in result.items()}


def _fuse(result: dict, class_scores: torch.Tensor, top_k: int) -> dict:
    """Every segment once for each of the best classes, with the geometric mean of both scores."""
    best, labels = class_scores.float().cpu().topk(min(top_k, len(class_scores)))
    count = len(result["scores"])
    fused = {
        "scores": (best[:, None] * result["scores"][None]).sqrt().flatten(),
        "labels": labels[:, None].expand(-1, count).flatten(),
        "segments": result["segments"].repeat(len(labels), 1),
    }
    return _best(fused, len(fused["scores"]))


def _to_seconds(segments: torch.Tensor, geometry: dict) -> torch.Tensor:
    return (segments * geometry["feature_stride"] + 0.5 * geometry["num_frames"]) / geometry["fps"]


# ---------------------------------------------------------------------------------------------------------------------
# Reading and checking


def _as_samples(features) -> list:
    """One sample or many, as a list of samples."""
    if isinstance(features, Mapping):  # what `pad` takes: {"input_features": [...]}
        if "input_features" not in features:
            raise ValueError(f"The features are a mapping with the keys {list(features)}; expected 'input_features'.")
        features = features["input_features"]
    if isinstance(features, str | os.PathLike):
        return [features]
    if isinstance(features, torch.Tensor | np.ndarray) and features.ndim < 3:
        return [features]
    if len(features) == 0:
        raise ValueError("No features given: there is no sample.")
    if isinstance(features, torch.Tensor | np.ndarray):
        return list(features)
    first = features[0]
    if isinstance(first, str | os.PathLike) or (hasattr(first, "ndim") and first.ndim != 1):
        return list(features)
    if hasattr(first, "ndim") or np.isscalar(first) or np.isscalar(first[0] if len(first) else 0.0):
        return [np.asarray(features)]  # one sample as a list of steps
    return [np.asarray(sample) for sample in features]


def _name_samples(samples: list, names: Sequence[str] | None) -> list[str]:
    if names is not None:
        if len(names) != len(samples):
            raise ValueError(f"names has {len(names)} entries for {len(samples)} samples; give one each.")
        return [str(name) for name in names]
    return [
        str(sample) if isinstance(sample, str | os.PathLike) else f"sample {index}"
        for index, sample in enumerate(samples)
    ]


def _load(path: str | os.PathLike, name: str) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            return loaded
        with loaded:
            arrays = loaded.files
            keys = [key for key in ("features", "feats") if key in arrays] or arrays
            if len(keys) == 1:
                return loaded[keys[0]]
    except FileNotFoundError as error:
        raise ValueError(f"{name}: there is no file {path}.") from error
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{name}: {path} is no readable .npy or .npz file of numbers ({error}). Object arrays are refused, because "
            "loading them runs code: save with np.save(path, array.astype(np.float32))."
        ) from error
    raise ValueError(f"{name}: {path} holds the arrays {arrays}; expected one, or one named 'features'.")


def _is_number(value) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _check_geometry(geometry: dict, name: str):
    if unknown := sorted(set(geometry) - set(_GEOMETRY)):
        raise ValueError(f"{name}: geometry has the keys {', '.join(unknown)}; expected {', '.join(_GEOMETRY)}.")
    for key, value in geometry.items():
        if key == "duration" and value is None:
            continue
        if not _is_number(value) or not 0 < value < math.inf:
            unit = {"fps": "frames per second", "duration": "seconds"}.get(key, "frames")
            raise ValueError(f"{name}: {key} is {value!r}; expected a positive number of {unit}.")


def _check_settings(settings: dict) -> dict:
    if settings["nms_method"] not in _NMS_METHODS:
        raise ValueError(f"nms_method is {settings['nms_method']!r}; expected one of {', '.join(_NMS_METHODS)}.")
    for name in ("pre_nms_topk", "max_seg_num", "external_topk"):
        if isinstance(settings[name], bool) or not isinstance(settings[name], int) or settings[name] < 1:
            raise ValueError(f"{name} is {settings[name]!r}; expected a positive integer.")
    for name in ("pre_nms_thresh", "min_score", "iou_threshold", "duration_thresh"):
        if not _is_number(settings[name]) or not settings[name] >= 0:
            raise ValueError(f"{name} is {settings[name]!r}; expected a number, 0 or more.")
    if not _is_number(settings["nms_sigma"]) or not settings["nms_sigma"] > 0:
        raise ValueError(f"nms_sigma is {settings['nms_sigma']!r}; expected a positive number, such as 0.5.")
    if not _is_number(settings["voting_thresh"]) or math.isnan(settings["voting_thresh"]):
        raise ValueError(f"voting_thresh is {settings['voting_thresh']!r}; expected a number; 0 turns voting off.")
    if not isinstance(settings["multiclass_nms"], bool):
        raise ValueError(f"multiclass_nms is {settings['multiclass_nms']!r}; expected True or False.")
    return settings


def _is_activitynet_list(annotations) -> bool:
    """[{"segment": ...}, ...] is one sample's segments, not one entry for each sample."""
    return all(isinstance(entry, dict) and "segment" in entry for entry in annotations)


def _to_labels(annotation, length: int, geometry: dict, label2id: dict[str, int] | None, name: str) -> dict:
    """Annotated segments in seconds as model labels on the feature grid."""
    try:
        if isinstance(annotation, dict):
            seconds = annotation["segments"]
            classes = annotation["labels"] if "labels" in annotation else annotation["class_labels"]
        else:
            seconds = [entry["segment"] for entry in annotation]
            by_name = label2id is not None or any("label_id" not in entry for entry in annotation)
            classes = [entry["label" if by_name and "label" in entry else "label_id"] for entry in annotation]
        seconds = np.asarray(seconds, dtype=np.float64)
        seconds = seconds if seconds.size else np.zeros((0, 2))
        if seconds.ndim != 2 or seconds.shape[1] != 2:
            raise ValueError(f"the segments have shape {seconds.shape}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: no annotations in a known form ({type(error).__name__}: {error}); expected a dict with segments (N, 2) "
            "and labels (N,), or a list of dicts with segment, [start, end], and label or label_id."
        ) from error
    if len(seconds) != len(classes):
        raise ValueError(
            f"{name}: {len(seconds)} segments and {len(classes)} labels; give one label for each segment."
        )
    ids = [_to_id(label, label2id, name, index) for index, label in enumerate(classes)]

    # Annotations may end within the last feature's window, which a duration in whole frames can miss.
    end = geometry["duration"]
    if end is None:
        end = ((length - 1) * geometry["feature_stride"] + geometry["num_frames"]) / geometry["fps"]
    slack = max(geometry["num_frames"], geometry["feature_stride"]) / geometry["fps"]
    for index, (start, stop) in enumerate(seconds.tolist()):
        problem = None
        if not (math.isfinite(start) and math.isfinite(stop)):
            problem = "is not finite"
        elif start < 0:
            problem = "starts before 0"
        elif start >= stop:
            problem = "does not start before it ends"
        elif stop > end + slack:
            problem = f"ends after the recording, at {end:.2f} s"
        if problem:
            raise ValueError(
                f"{name}: segment {index} [{start}, {stop}] {problem}; expected 0 <= start < end <= duration, in seconds."
            )
    grid = (seconds * geometry["fps"] - 0.5 * geometry["num_frames"]) / geometry["feature_stride"]
    return {
        "segments": torch.from_numpy(grid).float(),
        "class_labels": torch.tensor(ids, dtype=torch.long),
    }


def _to_id(label, label2id: dict[str, int] | None, name: str, index: int) -> int:
    if isinstance(label, str):
        if label2id is None:
            raise ValueError(f"{name}: segment {index} has the label {label!r}; pass label2id=model.config.label2id.")
        if label not in label2id:
            raise ValueError(f"{name}: segment {index} has the label {label!r}; known: {', '.join(label2id)}.")
        return int(label2id[label])
    try:
        is_id = float(label).is_integer() and label >= 0
    except (TypeError, ValueError):
        is_id = False
    if not is_id or (label2id is not None and int(label) not in label2id.values()):
        known = "a class id of id2label" if label2id is None else f"one of {sorted(label2id.values())}"
        raise ValueError(f"{name}: segment {index} has the label {label!r}; expected {known}.")
    return int(label)


__all__ = ["ConvTransformerFeatureExtractor"]
