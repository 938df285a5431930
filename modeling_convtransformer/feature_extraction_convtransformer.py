"""ConvTransformerFeatureExtractor: arrays or files in, padded batches out; model outputs in, segments in seconds out.

Seconds exist only here. The model works on the feature grid:
`grid = (seconds * fps - 0.5 * num_frames) / feature_stride`.

Everything is computed with numpy on the CPU, so that a model exported to ONNX needs no torch. Tensors go in, and come out
where tensors went in.
"""

import functools
import inspect
import math
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import is_torch_available, is_torch_tensor

from .configuration_convtransformer import read_recipe

if is_torch_available():
    import torch

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
_ENCODER = ("name", "revision", "pooling", "dtype")
# Files of arrays.
ARRAY_SUFFIXES = (".npy", ".npz", ".safetensors")
# What numpy raises for files that are no arrays, or are damaged (RuntimeError: encrypted, or packed in an unknown way).
UNREADABLE = (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
# What a sample may be, and what its first axis counts.
_AXES = {"features": "time", "signal": "samples"}

# The geometry of v1's features of THUMOS14 (two-stream I3D), for a feature extractor that is told nothing.
_DEFAULT_GEOMETRY = {"feature_size": 2048, "fps": 30, "feature_stride": 4, "num_frames": 16}
_REQUIRED = ("feature_size", "fps", "feature_stride")

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
            (With none of these four: 2048, 30, 4 and 16, v1's features of THUMOS14, as `ConvTransformerConfig()` takes.)
        padding_value (`float`, defaults to 0.0): what padded steps hold.
        min_length (`int`, *optional*), pad_to_multiple_of (`int`, *optional*): pad batches to this length at least, and
            beyond it to a multiple. A model does not need it; it is how v1 pads, whose results depend on it.
        length_tolerance (`float`, defaults to 0.1): share by which the number of features may differ from what the
            duration says.
        encoder (`str` or `dict`, *optional*): what makes features of recordings, for pipelines that are given a video or sound:
            the name of a model of transformers (or `"log-mel"`), or a dict with `name` and any of `revision`, `pooling` and
            `dtype` (the arguments of `modeling_convtransformer.features.load_encoder`).
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
        feature_size: int | None = None,
        fps: float | None = None,
        feature_stride: float | None = None,
        num_frames: float | None = None,
        padding_value: float = 0.0,
        min_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        length_tolerance: float = 0.1,
        encoder: str | dict[str, str] | None = None,
        **kwargs,
    ):
        if all(value is None for value in (feature_size, fps, feature_stride, num_frames)):
            feature_size, fps, feature_stride, num_frames = _DEFAULT_GEOMETRY.values()
        given = dict(zip(_REQUIRED, (feature_size, fps, feature_stride), strict=True))
        _check_required([name for name, value in given.items() if value is None])
        settings = {name: kwargs.pop(name, default) for name, default in _POST_PROCESSING.items()}
        # The base class wants a rate: it is the recordings'.
        kwargs["sampling_rate"] = _plain(fps)
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
        self.fps, self.feature_stride, self.num_frames = map(_plain, (fps, feature_stride, num_frames))
        self.min_length = min_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.length_tolerance = length_tolerance
        self.encoder = check_encoder(encoder)
        self._geometry(None, "the feature extractor")
        for name, value in _check_settings(settings).items():
            setattr(self, name, value)

    @classmethod
    def from_dict(cls, feature_extractor_dict: dict[str, Any], **kwargs):
        """As in transformers; saved settings without a geometry are refused, because no default would be theirs."""
        _check_required([name for name in _REQUIRED if name not in {**feature_extractor_dict, **kwargs}])
        return super().from_dict(feature_extractor_dict, **kwargs)

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
        return_tensors: str | None = "pt" if is_torch_available() else "np",
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            features: one sample or a list of samples, each an array (time, channels), or the path of a .npy file (or of a
                .npz or .safetensors file with one array, or one named `features` or `feats`; the geometry that a .safetensors
                file has in its metadata is taken with it), or a dict:
                `{"features": array or path}`, or `{"signal": array or path}` with raw values (samples, channels), which
                are cut into windows of `num_frames` samples, one each `feature_stride`. In it, any of `fps`,
                `feature_stride`, `num_frames`, `duration` may stand beside, as in `geometry`.
            annotations: for each sample its segments in seconds, as `{"segments": (N, 2), "labels": (N,)}` or as a list
                of `{"segment": [start, end], "label": name or "label_id": id}` (ActivityNet's format). N may be 0.
            geometry: for each sample (or one for all) a dict with any of `fps`, `feature_stride`, `num_frames`,
                `duration` (seconds), where they differ from the feature extractor's. The duration of a signal is known
                without it.
            label2id: class names to ids, where annotations hold names; ids are then checked too.
            names: names of the samples for error messages; default: the paths, or "sample 0", ...
            padding, max_length, truncation, pad_to_multiple_of, return_attention_mask: as in `SequenceFeatureExtractor.pad`.
            return_tensors: `"pt"`, or `"np"`, which is the default where torch is not installed. Labels are of the same kind.

        Returns:
            `input_features` (batch, time, channels) float32, `attention_mask` (batch, time), and with annotations `labels`,
            a list of `{"segments": (N, 2) float32 on the feature grid, "class_labels": (N,) int64}`.

        Raises:
            ValueError: a sample that a model cannot use; the message names the sample and what to do.
        """
        if kwargs:
            raise TypeError(f"Unknown arguments: {', '.join(kwargs)}.")
        samples = _as_samples(features)
        names = _name_samples(samples, names)
        loaded = [
            self.load(sample, name, given)
            for sample, name, given in zip(samples, names, _one_each(geometry, len(samples)), strict=True)
        ]
        arrays, geometries = zip(*loaded, strict=True)

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
            {"input_features": list(arrays)},
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )
        if labels is not None:
            if return_tensors == "pt":
                labels = [{key: torch.from_numpy(value) for key, value in label.items()} for label in labels]
            batch["labels"] = labels
        return batch

    def _pad(self, processed_features, *args, **kwargs) -> dict:
        # The base class takes a feature_size of 1 for sequences without a channel axis, and would pad that axis too.
        name = self.model_input_names[0]
        has_axis = self.feature_size == 1 and processed_features[name].ndim == 2
        if has_axis:
            processed_features[name] = processed_features[name][:, 0]
        padded = super()._pad(processed_features, *args, **kwargs)
        if has_axis:
            padded[name] = padded[name][:, None]
        return padded

    def load(self, sample, name: str | None = None, geometry: dict | None = None) -> tuple[np.ndarray, dict]:
        """
        One sample as a batch takes it: read, cut into windows if it is a signal, and checked.

        Args:
            sample, geometry: as in `__call__`.
            name: for error messages; default: the path, or "sample 0".

        Returns:
            features (time, channels) float32, and their whole geometry: `fps`, `feature_stride`, `num_frames` and `duration`,
            which is None where it is not known. `{"features": features, **geometry}` is the sample again, without a file.

        Raises:
            ValueError: as in `__call__`.
        """
        name = _name_samples([sample], None if name is None else [name])[0]
        kind, values, geometry = self._split(sample, geometry, name)
        array = _read(values, kind, name)
        if kind == "features":
            self._check_values(array, self.feature_size, kind, name)
        else:
            array = self._to_windows(array, geometry, name)
        self._check_length(len(array), geometry, name)
        return array, geometry

    @property
    def num_channels(self) -> int | None:
        """Channels of the raw values whose windows are features; None where they cannot be such windows."""
        channels, rest = divmod(self.feature_size, self.num_frames)
        return None if rest or not channels else int(channels)

    def as_sample(self, path: str | os.PathLike) -> dict[str, Any]:
        """
        The sample in a .npy, .npz or .safetensors file: `{"features": path}`, or `{"signal": path}` where the array is as wide
        as raw values are.

        Raises:
            ValueError: it is neither, or not readable.
        """
        shape = _read(path, "features", str(path)).shape
        if shape[1] == self.feature_size:
            return {"features": path}
        if shape[1] == self.num_channels:
            return {"signal": path}
        expected = f"features of shape (time, {self.feature_size})"
        expected += f" or a signal of shape (samples, {self.num_channels})" if self.num_channels else ""
        advice = "Choose the model that was trained on such arrays."
        if shape[0] in (self.feature_size, self.num_channels):
            advice = "The axes seem to be exchanged: save it transposed."
        raise ValueError(f"{path}: an array of shape {shape}; expected {expected}. {advice}")

    def geometry_of(self, samples, geometry: dict | Sequence[dict] | None = None) -> list[dict]:
        """
        The whole geometry of each sample, as in `load`, for `post_process_temporal_action_localization`. Reads no files but
        those of signals without `duration`, and the metadata of .safetensors files.

        Args:
            samples, geometry: one sample or a list, and what `__call__` takes.
        """
        samples = _as_samples(samples)
        names = _name_samples(samples, None)
        given = _one_each(geometry, len(samples))
        return [self._split(*one)[2] for one in zip(samples, given, names, strict=True)]

    def _split(self, sample, given: dict | None, name: str) -> tuple[str, Any, dict]:
        """What a sample is ("features" or "signal"), its values (an array, or a path) and its geometry."""
        if not isinstance(sample, Mapping):
            sample = {"features": sample}
        kinds = [kind for kind in _AXES if kind in sample]
        if len(kinds) != 1 or set(sample) - {*kinds, *_GEOMETRY}:
            raise ValueError(
                f"{name}: a sample with the keys {', '.join(map(str, sample))}; expected either features or signal, and "
                f"beside it any of {', '.join(_GEOMETRY)}. (A dict with input_features is a whole batch.)"
            )
        kind = kinds[0]
        given = _without_none(given)
        _check_geometry(given, name)
        own = _without_none({key: sample[key] for key in _GEOMETRY if key in sample})
        stored = stored_geometry(sample[kind]) if kind == "features" else {}
        geometry = self._geometry({**stored, **given, **own}, name)
        for key in given:
            if geometry[key] != given[key]:
                raise ValueError(
                    f"{name}: {key} is {own[key]} beside its {kind}, but {given[key]} in `geometry`; give only one of them."
                )
        values = sample[kind]
        if kind == "signal" and "fps" not in {**given, **own}:
            _check_rate(values, geometry["fps"], name)
        if kind == "signal" and geometry["duration"] is None:
            values = _read(values, kind, name)
            geometry["duration"] = len(values) / geometry["fps"]
        return kind, values, geometry

    def _to_windows(self, signal: np.ndarray, geometry: dict, name: str) -> np.ndarray:
        """Raw values (samples, channels) as features."""
        for key in ("num_frames", "feature_stride"):
            if geometry[key] != int(geometry[key]):
                raise ValueError(
                    f"{name}: {key} is {geometry[key]}; expected a whole number of samples, in which a signal can be cut into "
                    'windows. Set it, or pass {"features": ...}.'
                )
        window, stride = int(geometry["num_frames"]), int(geometry["feature_stride"])
        channels, rest = divmod(self.feature_size, window)
        if rest or not channels:
            raise ValueError(
                f"{name}: feature_size is {self.feature_size}, no multiple of num_frames, {window}; windows of a signal are "
                'num_frames * channels wide. Set num_frames, or pass {"features": ...}.'
            )
        self._check_values(signal, channels, "signal", name)
        if len(signal) < window:
            raise ValueError(
                f"{name}: the signal has {len(signal)} samples; expected at least the {window} of one window (num_frames). "
                "Leave this sample out."
            )
        return window_features(signal, window, stride)

    def _check_values(self, array: np.ndarray, width: int, kind: str, name: str):
        if len(array) == 0:
            raise ValueError(f"{name}: {kind} with no time steps (shape {array.shape}); leave this sample out.")
        if array.shape[1] != width:
            advice = []
            if len(array) == width:
                advice.append(f"If this is (channels, {_AXES[kind]}), transpose it, {kind}.T.")
            if kind == "features" and array.shape[1] * self.num_frames == width:
                advice.append(
                    f'If these are raw values, pass {{"signal": array}} to have windows of {self.num_frames} cut.'
                )
            if not advice:
                size = "feature_size" if kind == "features" else "feature_size (num_frames * channels)"
                advice = [
                    f"Use the feature extractor of the {kind} that you have, or set {size} and the model's n_in."
                ]
            raise ValueError(
                f"{name}: {kind} of shape {array.shape}; expected ({_AXES[kind]}, {width}). {' '.join(advice)}"
            )
        finite = np.isfinite(array)
        if not finite.all():
            step, channel = np.argwhere(~finite)[0].tolist()
            count = int(array.size - finite.sum())
            raise ValueError(
                f"{name}: {kind} with {count} values that are NaN or infinite, the first at time step {step}, "
                f"channel {channel} ({array[step, channel]}). Repair the file, or np.nan_to_num({kind}) if zeros are right."
            )

    def _geometry(self, given: dict | None, name: str) -> dict:
        """What is given, else the feature extractor's."""
        geometry = {
            "fps": self.fps,
            "feature_stride": self.feature_stride,
            "num_frames": self.num_frames,
            "duration": None,
            **_without_none(given),
        }
        _check_geometry(geometry, name)
        return geometry

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
    ) -> list[dict[str, Any]]:
        """
        Args:
            outputs: of `ConvTransformerForTemporalActionLocalization`, or the same as arrays, from ONNX Runtime: `logits`
                (batch, points, classes), `pred_segments` (batch, points, 2) on the grid, `point_mask` and `point_levels`
                (batch, points).
            geometry: as in `__call__`; with `duration`, segments are clipped to the recording.
            threshold: keep final scores above this.
            top_k: keep at most this many segments of each recording.
            external_scores: (batch, classes) scores of another, recording-level classifier for outputs that hold proposals:
                each segment gets the best `external_topk` of these classes, with score sqrt(its score * the class's).
            settings: replace the feature extractor's own settings for this call.

        Returns:
            for each sample `{"scores": (N,), "labels": (N,), "segments": (N, 2)}`, segments in seconds, best first
            (with `nms_method="none"` in the order of levels, as in v1); float32 and int64, as tensors on the device of the
            logits if these are a tensor, else as arrays.

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
        given = outputs["logits"]
        outputs = {name: None if value is None else _to_array(value) for name, value in outputs.items()}
        batch, _, classes = outputs["logits"].shape
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0):
            raise ValueError(f"top_k is {top_k!r}; expected an integer, 0 or more, or None.")
        if external_scores is not None:
            external_scores = _to_array(external_scores).astype(np.float32)
            if external_scores.ndim != 2 or len(external_scores) != batch:
                raise ValueError(f"external_scores has shape {external_scores.shape}; expected ({batch}, classes).")
        geometries = self._geometries(geometry, batch)

        sample, segments, scores, labels = self._candidates(outputs, chosen)
        if chosen["nms_method"] != "none":
            groups = sample * classes + labels if chosen["multiclass_nms"] else sample
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
                kept_segments = np.concatenate(
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
            result["segments"] = np.clip(_to_seconds(result["segments"], one), 0.0, one["duration"])
            results.append({key: _as_given(value, given) for key, value in result.items()})
        return results

    def post_process_moment_retrieval(
        self,
        outputs,
        geometry: dict | Sequence[dict] | None = None,
        threshold: float | None = None,
        top_k: int | None = None,
        **settings,
    ) -> list[list[dict[str, Any]]]:
        """
        Args:
            outputs: of `ConvTransformerForMomentRetrieval`, or the same as arrays: `logits` (batch, queries, points),
                `pred_segments` (batch, queries, points, 2) on the grid, `point_mask` and `point_levels` (batch, points), and
                `query_mask` (batch, queries).
            geometry: for each recording; with the other arguments as in `post_process_temporal_action_localization`.

        Returns:
            for each recording and each of its queries `{"scores": (N,), "segments": (N, 2)}`, segments in seconds, best first.

        Raises:
            ValueError: other outputs, unknown settings, or settings out of range.
        """
        get = outputs.get if isinstance(outputs, dict) else lambda name: getattr(outputs, name, None)
        logits, segments = get("logits"), get("pred_segments")
        if logits is None or segments is None or len(segments.shape) != 4:
            raise ValueError(
                "The outputs have no logits (batch, queries, points) with pred_segments (batch, queries, points, 2); expected "
                "those of ConvTransformerForMomentRetrieval."
            )
        batch, queries, points = logits.shape
        masks = {name: get(name) for name in ("point_mask", "point_levels", "query_mask")}
        masks = {name: None if value is None else _to_array(value) for name, value in masks.items()}
        flat = {"logits": logits.reshape(batch * queries, points, 1)}
        flat["pred_segments"] = segments.reshape(batch * queries, points, 2)
        for name in ("point_mask", "point_levels"):
            flat[name] = None if masks[name] is None else np.repeat(masks[name], queries, axis=0)
        geometries = [one for one in _one_each(geometry, batch) for _ in range(queries)]
        found = self.post_process_temporal_action_localization(flat, geometries, threshold, top_k, **settings)
        found = [{"scores": one["scores"], "segments": one["segments"]} for one in found]
        is_query = np.ones((batch, queries)) if masks["query_mask"] is None else masks["query_mask"]
        return [
            [
                one
                for one, own in zip(found[row * queries : (row + 1) * queries], is_query[row], strict=True)
                if own > 0
            ]
            for row in range(batch)
        ]

    def to_seconds(self, segments: Sequence, geometry: dict | Sequence[dict] | None = None) -> list:
        """
        Positions on the feature grid, such as a dataset's segments, in seconds.

        Args:
            segments: for each sample a tensor or an array of any shape.
            geometry: as in `__call__`. Nothing is clipped to `duration`.
        """
        geometries = self._geometries(geometry, len(segments))
        return [
            _to_seconds(own if is_torch_tensor(own) else np.asarray(own), one)
            for own, one in zip(segments, geometries, strict=True)
        ]

    def _geometries(self, geometry: dict | Sequence[dict] | None, count: int) -> list[dict]:
        return [self._geometry(one, f"sample {index}") for index, one in enumerate(_one_each(geometry, count))]

    @staticmethod
    def _candidates(outputs: dict, settings: dict) -> tuple[np.ndarray, ...]:
        """Best scored segments of each level: sample (N,), segments (N, 2) on the grid, scores (N,), labels (N,)."""
        scores = _sigmoid(outputs["logits"].astype(np.float32, copy=False))
        if outputs["point_mask"] is not None:
            scores *= (outputs["point_mask"] > 0)[..., None]
        batch, points, classes = scores.shape
        counts, levels = [points], outputs["point_levels"]
        if levels is not None:  # Trainer and accelerate fill up gathered outputs with negative numbers
            longest = levels[(levels >= 0).sum(axis=1).argmax()]
            counts = np.bincount(longest[longest >= 0]).tolist()
        best, top_k = [np.zeros(0, dtype=np.int64)], settings["pre_nms_topk"]
        for sample in range(batch):
            first = 0
            for count in counts:
                own = scores[sample, first : first + count].reshape(-1)
                found = own > settings["pre_nms_thresh"]
                if len(own) > top_k:  # most are not worth sorting
                    found &= own >= np.partition(own, -top_k)[-top_k]
                index = np.flatnonzero(found)
                # Equal scores (saturated ones are common) stay in order of time and class.
                index = index[_best_first(own[index])[:top_k]]
                best.append(index + (sample * points + first) * classes)
                first += count
        best = np.concatenate(best)
        sample, point, labels = np.unravel_index(best, scores.shape)
        segments = outputs["pred_segments"][sample, point].astype(np.float32, copy=False)
        # (too short segments have counted among the best, as in v1)
        keep = segments[:, 1] - segments[:, 0] > settings["duration_thresh"]
        return sample[keep], segments[keep], scores.reshape(-1)[best[keep]], labels[keep]


# ---------------------------------------------------------------------------------------------------------------------
# Suppression


def overlap(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], eps: float = 1e-6):
    """IoU of segments (start, end), broadcast; `eps` is added to lengths, as in v1, so that empty ones divide."""
    intersection = np.minimum(first[1], second[1])
    intersection -= np.maximum(first[0], second[0])
    np.maximum(intersection, 0.0, out=intersection)
    union = (first[1] - first[0]) + (second[1] - second[0] + 2 * eps)
    union -= intersection
    intersection /= union
    return intersection


def decay(iou: np.ndarray, method: str, iou_threshold: float, sigma: float) -> np.ndarray:
    """What a segment that is kept leaves of the score of another that overlaps it by `iou` (overwritten); see `suppress`."""
    if method == "soft":
        np.square(iou, out=iou)
        iou /= -sigma
        return np.exp(iou, out=iou)
    return np.where(iou >= iou_threshold, 1 - iou if method == "linear" else np.float32(0), np.float32(1))


def suppress(
    segments,
    scores,
    groups,
    method: str,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    max_segments: int,
    recordings=None,
) -> tuple:
    """
    Non-maximum suppression inside each group (a class of a recording, or a recording), all groups at once: again and
    again, every group keeps its best segment (of equal ones the first) and weighs down the others by their overlap with it.

    Args:
        segments: (N, 2); scores: (N,); groups: (N,) integers; arrays or tensors.
        method: "soft" (weight exp(-IoU ** 2 / sigma)), "linear" (1 - IoU from `iou_threshold` on) or "hard" (0 from
            `iou_threshold` on). Soft methods drop a segment whose score falls below `min_score`; hard NMS begins
            with the scores above `min_score`.
        max_segments: kept in each group.
        recordings: (N,) integers. Where only the best `max_segments` of a whole recording are wanted, naming the
            recording of each segment spares the work on others: groups end once no later choice can be among these.

    Returns:
        indices (M,) of the segments kept, by group and then from best to worst, and their new scores (M,).
    """
    given = scores
    segments, scores = (_to_array(one).astype(np.float32, copy=False) for one in (segments, scores))
    groups, recordings = _to_array(groups), None if recordings is None else _to_array(recordings)
    candidates = np.arange(len(scores))
    if method == "hard" and min_score > 0:
        candidates = candidates[scores > min_score]
    if len(candidates) == 0:
        return _as_given(candidates, given), _as_given(scores[candidates], given)

    candidates = candidates[groups[candidates].argsort(kind="stable")]
    parts = np.split(candidates, np.flatnonzero(np.diff(groups[candidates])) + 1)

    weigh = functools.partial(decay, method=method, iou_threshold=iou_threshold, sigma=sigma)
    # Groups of like size together: filling up all to the largest would cost more than suppression.
    floor = min_score if method != "hard" else np.finfo(np.float32).tiny
    by_size: dict[int, list[np.ndarray]] = {}
    for part in parts:
        by_size.setdefault(len(part).bit_length(), []).append(part)
    kept, kept_scores = zip(
        *(_suppress_rows(segments, scores, rows, weigh, floor, max_segments, recordings) for rows in by_size.values()),
        strict=True,
    )
    kept, kept_scores = np.concatenate(kept), np.concatenate(kept_scores)
    order = groups[kept].argsort(kind="stable")
    return _as_given(kept[order], given), _as_given(kept_scores[order], given)


def _suppress_rows(segments, scores, rows: list[np.ndarray], weigh, floor: float, max_segments: int, recordings):
    """`suppress` for groups given as indices, side by side in the rows of a matrix, filled up with scores of -1."""
    lengths = np.array([len(row) for row in rows])
    filled = np.arange(lengths.max()) < lengths[:, None]
    index = np.zeros(filled.shape, dtype=np.int64)
    index[filled] = np.concatenate(rows)
    current = np.where(filled, scores[index], np.float32(-1))
    starts, ends = segments[index, 0], segments[index, 1]
    turns = likely_turns = min(max_segments, index.shape[1])
    owners = None
    if recordings is not None:
        _, owners = np.unique(recordings[index[:, 0]], return_inverse=True)
        likely_turns = min(turns, 2 * max_segments * (int(owners.max()) + 1) // len(rows))
    decays = None
    if index.shape[1] <= 2 * likely_turns and index.shape[0] * index.shape[1] ** 2 <= _MAX_PAIRS:
        decays = weigh(overlap((starts[:, :, None], ends[:, :, None]), (starts[:, None], ends[:, None])))
    each = np.arange(len(rows))
    taken = ~filled
    picks, pick_scores = np.empty((len(rows), turns), dtype=np.int64), np.empty((len(rows), turns), dtype=np.float32)
    done = 0
    for turn in range(turns):
        best = current.argmax(axis=1)
        best_scores = current[each, best]
        # A score falls below the floor only by a decay: the first choice of a group always stands.
        if turn > 0 and (best_scores < floor).all():
            break
        # (looking costs about as much as a turn)
        if (
            owners is not None
            and turn % 4 == 3
            and _is_settled(pick_scores[:, :turn], best_scores, owners, floor, max_segments)
        ):
            break
        picks[:, turn], pick_scores[:, turn] = best, best_scores
        done = turn + 1
        if decays is not None:
            current *= decays[each, best]
        else:
            chosen = (starts[each, best][:, None], ends[each, best][:, None])
            current *= weigh(overlap(chosen, (starts, ends)))
        current[each, best] = -1.0
        if floor <= 0:  # decays take -1 to -0, which would pass
            taken[each, best] = True
            current[taken] = -1.0
    picks, pick_scores = picks[:, :done], pick_scores[:, :done]
    keep = pick_scores >= floor
    keep[:, 0] = True
    keep &= pick_scores >= 0
    return np.take_along_axis(index, picks, axis=1)[keep], pick_scores[keep]


def _is_settled(
    pick_scores: np.ndarray, best_scores: np.ndarray, owners: np.ndarray, floor: float, count: int
) -> bool:
    """
    Whether nothing that is still to be chosen can be among the best `count` of its recording: the scores of a group's
    choices only fall, so none of them passes the best one left.
    """
    left = np.full(owners.max() + 1, -1.0, dtype=np.float32)
    np.maximum.at(left, owners, best_scores)
    better = np.bincount(owners, weights=(pick_scores > left[owners, None]).sum(axis=1))
    return bool(((better >= count) | (left < floor)).all())


def vote(kept: np.ndarray, candidates: np.ndarray, scores: np.ndarray, settings: dict) -> np.ndarray:
    """Segment voting: each kept segment (M, 2) becomes the mean of the candidates (N, 2) near it, by score and IoU."""
    if len(kept) == 0:
        return kept
    # Two empty segments have no IoU: 0 / 0 is not a number, which is not above any threshold.
    with np.errstate(invalid="ignore"):
        iou = overlap((kept[:, None, 0], kept[:, None, 1]), (candidates[None, :, 0], candidates[None, :, 1]), eps=0.0)
        weights = np.where(iou >= settings["voting_thresh"], scores * iou, np.float32(0))
    total = weights.sum(axis=1, keepdims=True)
    return np.where(total > 0, weights @ candidates / np.maximum(total, np.finfo(np.float32).tiny), kept)


def _best_first(scores: np.ndarray) -> np.ndarray:
    """Indices from best to worst; equal scores stay in their order, which v1 leaves to the sort."""
    return np.argsort(-scores, kind="stable")


def _best(result: dict, count: int) -> dict:
    order = _best_first(result["scores"])[:count]
    return {key: value[order] for key, value in result.items()}


def _fuse(result: dict, class_scores: np.ndarray, top_k: int) -> dict:
    """Every segment once for each of the best classes, with the geometric mean of both scores."""
    labels = _best_first(class_scores)[:top_k]
    count = len(result["scores"])
    fused = {
        "scores": np.sqrt(class_scores[labels][:, None] * result["scores"]).reshape(-1),
        "labels": np.repeat(labels, count),
        "segments": np.tile(result["segments"], (len(labels), 1)),
    }
    return _best(fused, len(fused["scores"]))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(logits))  # which cannot overflow
    return np.where(logits >= 0, np.float32(1), small) / (1 + small)


def _to_seconds(segments, geometry: dict):
    return (segments * geometry["feature_stride"] + 0.5 * geometry["num_frames"]) / geometry["fps"]


# ---------------------------------------------------------------------------------------------------------------------
# Tensors and arrays


def _to_array(values) -> np.ndarray:
    """Tensors on any device, and anything that numpy takes. numpy has no bfloat16: floating tensors become float32."""
    if is_torch_tensor(values):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _as_given(array: np.ndarray, given):
    """An array as a tensor beside `given`, if that is one."""
    return torch.from_numpy(array).to(given.device) if is_torch_tensor(given) else array


def _plain(number):
    """Numbers of numpy cannot be saved as JSON, and would make float64 of float32."""
    return number.item() if isinstance(number, np.generic) else number


# ---------------------------------------------------------------------------------------------------------------------
# Reading and checking


def window_features(signal: np.ndarray, window: int, stride: int) -> np.ndarray:
    """Raw windows as features: (n, channels) to (T, window * channels) float32, T = (n - window) // stride + 1.

    Feature t is samples t * stride to t * stride + window, sample after sample, so that fps is the sampling rate,
    feature_stride the stride and num_frames the window. This is how Bock et al. (2024,
    https://arxiv.org/abs/2311.15831) bring temporal action localization to wearable sensors.

    Raises:
        ValueError: the signal is not (n, channels), is shorter than a window, or window or stride is below 1.
    """
    signal = np.asarray(signal, dtype=np.float32)
    if signal.ndim != 2 or window < 1 or stride < 1 or len(signal) < window:
        raise ValueError(
            f"Windows of {window} samples, one each {stride}, need a signal (samples, channels) of at least one window, "
            f"but its shape is {signal.shape}. Use a longer recording or a smaller window."
        )
    windows = np.lib.stride_tricks.sliding_window_view(signal, window, axis=0)[::stride]
    # A copy, because windows share their samples with one another and with the signal.
    return np.array(windows.transpose(0, 2, 1), order="C").reshape(len(windows), -1)


def _as_samples(features) -> list:
    """One sample or many, as a list of samples."""
    if isinstance(features, Mapping) and "input_features" in features:  # what `pad` takes
        features = features["input_features"]
    if isinstance(features, str | os.PathLike | Mapping):
        return [features]
    is_array = isinstance(features, np.ndarray) or is_torch_tensor(features)
    if is_array and features.ndim < 3:
        return [features]
    if len(features) == 0:
        raise ValueError("No features given: there is no sample.")
    if is_array:
        return list(features)
    first = features[0]
    if isinstance(first, str | os.PathLike | Mapping) or getattr(first, "ndim", 1) != 1:
        return list(features)
    is_step = hasattr(first, "ndim") or np.isscalar(first) or np.isscalar(first[0] if len(first) else 0.0)
    return [features] if is_step else list(features)


def _name_samples(samples: list, names: Sequence[str] | None) -> list[str]:
    if names is not None:
        if len(names) != len(samples):
            raise ValueError(f"names has {len(names)} entries for {len(samples)} samples; give one each.")
        return [str(name) for name in names]
    names = []
    for index, sample in enumerate(samples):
        if isinstance(sample, Mapping):
            sample = sample.get("signal", sample.get("features"))
        names.append(str(sample) if isinstance(sample, str | os.PathLike) else f"sample {index}")
    return names


def _read(values, kind: str, name: str) -> np.ndarray:
    """An array of two axes, or the path of one, as float32."""
    expected = f"expected numbers in an array ({_AXES[kind]}, channels)."
    values = _load(values, name) if isinstance(values, str | os.PathLike) else values
    try:
        array = _to_array(values)
    except ValueError as error:  # steps of different widths
        raise ValueError(f"{name}: {kind} that are no array ({error}); {expected}") from error
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool) or array.dtype.kind == "c":
        raise ValueError(f"{name}: {kind} of dtype {array.dtype}; {expected}")
    if array.ndim != 2:
        raise ValueError(f"{name}: {kind} of shape {array.shape}; {expected}")
    return np.ascontiguousarray(array, dtype=np.float32)


def _load(path: str | os.PathLike, name: str) -> np.ndarray:
    load = _load_safetensors if Path(path).suffix.lower() == ".safetensors" else _load_numpy
    try:
        keys, array = load(path)
    except FileNotFoundError as error:
        raise ValueError(f"{name}: there is no file {path}.") from error
    except UNREADABLE as error:
        # (numpy's own words advise to unpickle whatever it does not know)
        if Path(path).suffix.lower() not in ARRAY_SUFFIXES:
            raise ValueError(
                f"{name}: no file of features ({', '.join(ARRAY_SUFFIXES)}). Recordings (video, sound, CSV or Parquet of sensors) are "
                "for the pipelines, or for modeling_convtransformer.features.extract_features."
            ) from error
        reason = "not in this format, or Python objects" if "pickle" in str(error) else error
        raise ValueError(
            f"{name}: {'it' if name == str(path) else path} is no readable .npy, .npz or .safetensors file of numbers "
            f"({reason}). Objects are refused, because loading them runs code: save with "
            "np.save(path, array.astype(np.float32))."
        ) from error
    if array is None:
        raise ValueError(f"{name}: {path} holds the arrays {keys}; expected one, or one named 'features' or 'signal'.")
    return array


def _load_numpy(path: str | os.PathLike) -> tuple[list[str], np.ndarray | None]:
    """What arrays a file holds, and the one to take, if that is clear."""
    loaded = np.load(path, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        return [], loaded
    with loaded:
        key = _find_key(loaded.files)
        return loaded.files, None if key is None else loaded[key]


def _check_rate(values, fps: float, name: str):
    """An .npz may say how many samples a second it has: taken at another rate, every time would be wrong."""
    if not isinstance(values, str | os.PathLike) or Path(values).suffix.lower() != ".npz":
        return
    try:
        with np.load(values, allow_pickle=False) as file:
            rates = [file[key] for key in ("fps", "sampling_rate") if key in file.files]
    except UNREADABLE:
        return  # `_load` says what is wrong with it
    for rate in rates[:1]:
        if rate.size == 1 and rate.dtype.kind in "iuf" and abs(rate.item() - fps) > 1e-6 * fps:
            raise ValueError(
                f"{name}: says that it has {rate.item():g} samples a second; expected {fps:g}, as the model was "
                f"trained on. Resample it: modeling_convtransformer.recordings.read_signal(path, fps={fps:g}) does; or give its "
                "rate as fps beside it, if the model takes windows of so many samples at any rate."
            )


def _load_safetensors(path: str | os.PathLike) -> tuple[list[str], np.ndarray | None]:
    """As `_load_numpy`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            keys = list(file.keys())
            key = _find_key(keys)
            dtype = None if key is None else file.get_slice(key).get_dtype()
            if dtype is None or not dtype.startswith(("BF", "F8")):
                return keys, None if key is None else file.get_tensor(key)
        if not is_torch_available():
            raise ValueError(f"numbers of type {dtype} need torch, which is not installed")
        with safe_open(path, framework="pt") as file:
            return keys, _to_array(file.get_tensor(key))
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def stored_geometry(values) -> dict[str, float]:
    """
    The geometry that a .safetensors file of features has in its metadata (`features.extract_features` writes it); empty for other
    files and for arrays.

    Raises:
        ValueError: the metadata is no geometry.
    """
    stored = _metadata(values)
    try:
        geometry = {key: float(stored[key]) for key in _GEOMETRY if key in stored}
    except ValueError as error:
        raise ValueError(f"{values}: its metadata is no geometry ({error}); expected numbers.") from error
    return {key: int(value) if value.is_integer() else value for key, value in geometry.items()}


def stored_encoder(values) -> dict[str, str] | None:
    """The encoder that made a .safetensors file of features, as in the feature extractor's `encoder`, if its metadata says."""
    stored = _metadata(values)
    names = {"encoder": "name", "encoder_revision": "revision", "pooling": "pooling", "dtype": "dtype"}
    # A folder has no revision.
    settings = {ours: stored[theirs] for theirs, ours in names.items() if stored.get(theirs)}
    return settings if "name" in settings else None


def _metadata(values) -> dict[str, str]:
    if not isinstance(values, str | os.PathLike) or Path(values).suffix.lower() != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(values, framework="np") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):  # `_load` says more
        return {}


def check_encoder(encoder) -> dict[str, str] | None:
    """The settings of an encoder, from its name or from a dict.

    Raises:
        ValueError: neither of them.
    """
    if encoder is None:
        return None
    settings = {"name": encoder} if isinstance(encoder, str | os.PathLike) else encoder
    if isinstance(settings, Mapping):
        settings = {key: value for key, value in settings.items() if value is not None}
    texts = isinstance(settings, Mapping) and all(isinstance(value, str | os.PathLike) for value in settings.values())
    if not texts or "name" not in settings or set(settings) - set(_ENCODER):
        raise ValueError(
            f"encoder is {encoder!r}; expected the name of a model of transformers, such as 'MCG-NJU/videomae-base', or a dict of "
            f"texts with name and any of {', '.join(_ENCODER[1:])}."
        )
    return {key: os.fspath(value) for key, value in settings.items()}


def _find_key(keys: list[str]) -> str | None:
    """Of several arrays the one with a name of ours; what `recordings.read_signal` reads has `signal`, and its rate beside."""
    keys = [key for key in ("features", "feats", "signal") if key in keys] or keys
    return keys[0] if len(keys) == 1 else None


def _one_each(geometry: dict | Sequence[dict] | None, count: int) -> list[dict | None]:
    if geometry is None or isinstance(geometry, dict):
        geometry = [geometry] * count
    if len(geometry) != count:
        raise ValueError(f"geometry has {len(geometry)} entries for {count} samples; give one each, or one for all.")
    return list(geometry)


def _without_none(geometry: dict | None) -> dict:
    return {key: _plain(value) for key, value in (geometry or {}).items() if value is not None}


def _is_number(value) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _check_required(missing: list[str]):
    if missing:
        raise ValueError(
            f"The feature extractor's settings lack {', '.join(missing)}: where a segment lies in seconds depends on them. Give "
            "feature_size, fps, feature_stride and num_frames as the features were computed."
        )


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
    settings = {name: _plain(value) for name, value in settings.items()}
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
    return {"segments": grid.astype(np.float32), "class_labels": np.array(ids, dtype=np.int64)}


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


__all__ = ["ConvTransformerFeatureExtractor", "window_features"]
