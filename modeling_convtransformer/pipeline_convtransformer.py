"""The pipelines "temporal-action-localization" and "moment-retrieval": recordings in, segments in seconds out."""

import importlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.pipelines.base import ChunkPipeline
from transformers.utils import logging

from .feature_extraction_convtransformer import (
    _GEOMETRY,
    _POST_PROCESSING,
    ARRAY_SUFFIXES,
    ConvTransformerFeatureExtractor,
    check_encoder,
)
from .processing_convtransformer import ConvTransformerProcessor, check_queries

logger = logging.get_logger(__name__)

# Files of sensor values. What is given as a path and is neither such a table nor an array is video or sound.
_TABLES = (".csv", ".tsv", ".parquet")
_OPENING = ("encoder", "columns", *_GEOMETRY)
_OUTPUTS = ("logits", "pred_segments", "point_mask", "point_levels")


class ConvTransformerPipeline(ChunkPipeline):
    """What the pipelines share: a model of the right class with trained weights, and a feature extractor that fits."""

    _model_class: str
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_tokenizer = False
    _load_feature_extractor = None  # `__init__` says more than transformers would where it is missing

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._encoder = (None, None)
        self._check_model()
        if self.feature_extractor is None:
            self.feature_extractor = self._load_feature_extractor_of_model()
        self._check_feature_extractor()
        self.model.eval()

    def __call__(self, inputs, **kwargs):
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, **kwargs)

    def open(
        self,
        recording,
        encoder: str | dict | None = None,
        columns: Sequence[str] | None = None,
        **geometry,
    ) -> dict[str, Any]:
        """
        A recording as the model takes it, so that it is read once and used often.

        Args:
            recording, encoder, columns, geometry: as in `__call__`.

        Returns:
            `{"features": (time, channels) float32 array, "fps", "feature_stride", "num_frames", "duration"}`, which `__call__`
            takes in place of the recording.

        Raises:
            ValueError, ImportError: as `__call__`.
        """
        geometry = {key: value for key, value in geometry.items() if value is not None}
        path = recording
        if isinstance(recording, Mapping):
            path = next((recording[key] for key in ("signal", "features") if key in recording), None)
        name = str(path) if isinstance(path, str | os.PathLike) else None
        sample = self._read_file(recording, encoder, columns, geometry)
        features, geometry = self.feature_extractor.load(sample, name, geometry)
        return {"features": features, **geometry}

    def _read_file(self, recording, encoder, columns, geometry: dict):
        """What the feature extractor loads: the recording itself, or what is in it if it is a file of another kind."""
        kind, path, beside = "features", recording, {}
        if isinstance(recording, Mapping):
            kind = "signal" if "signal" in recording else "features"
            path = recording.get(kind)
            beside = {key: value for key, value in recording.items() if key != kind}
        if not isinstance(path, str | os.PathLike) or Path(path).suffix.lower() in ARRAY_SUFFIXES:
            return recording
        if Path(path).suffix.lower() in _TABLES:
            wanted = {"fps": self.feature_extractor.fps, **geometry, **beside}
            signal, fps = _import("recordings").read_signal(path, wanted["fps"], columns)
            return {"signal": signal, **beside, "fps": fps}
        if kind == "signal":
            raise ValueError(
                f"{path}: no file of sensor values; expected one of {', '.join((*ARRAY_SUFFIXES, *_TABLES))}."
            )
        # Before hours of video are encoded: is what was asked for a geometry?
        _, _, wanted = self.feature_extractor._split({"features": path, **beside}, geometry, str(path))
        encoder = self._load_encoder(encoder, path)
        if encoder.width not in (None, self.feature_extractor.feature_size):
            raise ValueError(
                f"{path}: {encoder.name} gives features of width {encoder.width}, but the model takes "
                f"{self.feature_extractor.feature_size}. Choose the encoder whose features the model was trained on."
            )
        sample = _import("features").extract_features(
            path,
            encoder,
            **{key: wanted[key] for key in _GEOMETRY[:3]},
            progress=logging.is_progress_bar_enabled(),
        )
        return {**sample, **beside}

    def _load_encoder(self, encoder, path):
        """The encoder that is given, or else named in preprocessor_config.json; the last one is kept."""
        if hasattr(encoder, "describe"):
            return encoder
        settings = check_encoder(encoder) or self.feature_extractor.encoder
        if settings is None:
            raise ValueError(
                f"{path}: no file of features ({', '.join(ARRAY_SUFFIXES)}), so it takes an encoder to make them, and "
                "preprocessor_config.json names none. Give as encoder the one that the model's training features came from, "
                "such as MCG-NJU/videomae-base."
            )
        if self._encoder[0] != settings:
            loaded = _import("features").load_encoder(**settings, device=self.device)
            self._encoder = (settings, loaded)
        return self._encoder[1]

    @staticmethod
    def _sort_parameters(before: tuple[str, ...], given: dict) -> tuple[dict, dict, dict]:
        """Arguments of a call: those of `preprocess` (`before`), none of the model, those of `postprocess`."""
        after = ("threshold", "top_k", *_POST_PROCESSING)
        if unknown := sorted(set(given) - {*before, *after}):
            raise TypeError(f"Unknown arguments: {', '.join(unknown)}. Known: {', '.join((*before, *after))}.")
        pick = lambda names: {name: given[name] for name in names if name in given}  # noqa: E731
        return pick(before), {}, pick(after)

    def _check_model(self):
        name = self.model.name_or_path or type(self.model).__name__
        if type(self.model).__name__ != self._model_class:  # (remote code has classes of its own)
            raise ValueError(
                f"{name} is a {type(self.model).__name__} (model type {self.model.config.model_type!r}); the pipeline "
                f"{self.task!r} takes a {self._model_class}. Choose a checkpoint of that class."
            )
        if missing := self.model.untrained_weights:
            raise ValueError(
                f"{name}: the weights lack {len(missing)} tensors of this model, such as {sorted(missing)[0]!r}, which are "
                "random now: code and weights do not belong together, or the model was never trained for this task. Load the "
                "revision that code and weights share (revision=...), install the version of modeling_convtransformer that "
                "wrote the weights, or train the model and save it."
            )

    def _load_feature_extractor_of_model(self) -> ConvTransformerFeatureExtractor:
        name = self.model.name_or_path
        try:
            return ConvTransformerFeatureExtractor.from_pretrained(name)
        except Exception as error:
            raise ValueError(
                f"{name or 'The model'} has no usable preprocessor_config.json ({type(error).__name__}: "
                f"{str(error).splitlines()[0]}). It says how features and seconds belong together: pass feature_extractor=, or "
                "write one into the folder: ConvTransformerFeatureExtractor(feature_size=..., fps=..., feature_stride=..., "
                "num_frames=...).save_pretrained(folder)."
            ) from error

    def _check_feature_extractor(self):
        extractor, width = self.feature_extractor, sum(self.model.config.stream_widths)
        if not hasattr(extractor, "post_process_temporal_action_localization"):
            raise ValueError(
                f"The feature extractor is a {type(extractor).__name__}; expected a ConvTransformerFeatureExtractor. Check "
                "preprocessor_config.json, or pass feature_extractor=."
            )
        if extractor.feature_size != width:
            raise ValueError(
                f"The feature extractor has feature_size {extractor.feature_size}, but the model takes features of width "
                f"{width} (n_in). They are of different checkpoints: load both from one, or correct preprocessor_config.json."
            )


class TemporalActionLocalizationPipeline(ConvTransformerPipeline):
    """
    Temporal action localization with a `ConvTransformerForTemporalActionLocalization`:

    ```python
    >>> from transformers import pipeline

    >>> localize = pipeline("temporal-action-localization", model="someone/their-model", trust_remote_code=True)
    >>> localize("features.npy", threshold=0.3)
    [{'label': 'abduction', 'score': 0.87, 'start': 3.8, 'end': 34.7}, ...]
    ```

    (`trust_remote_code` where `modeling_convtransformer` is not imported.)

    Raises:
        ValueError: the model is not a detector of this kind, lacks trained weights, or does not fit the feature extractor,
            or there is none.
    """

    _model_class = "ConvTransformerForTemporalActionLocalization"

    def __call__(self, inputs, **kwargs) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """
        Args:
            inputs: one recording, or a list, dataset or generator of recordings. A recording is an array (time, channels) of
                features, the path of a .npy, .npz or .safetensors file of one, of a video or sound (with an `encoder`), or of a
                .csv or .parquet table of sensor values (for models of raw windows), or a dict: `features` (one of all these) or
                `signal` (array or path of raw sensor values (samples, channels)), and any of `fps`, `feature_stride`,
                `num_frames`, `duration` (seconds) where they differ from the feature extractor's.
            encoder (`str` or `dict`, *optional*): what makes features of a video or of sound, a model of transformers; default:
                the one that preprocessor_config.json names. It sees the recording at the feature extractor's `fps`,
                `feature_stride` and `num_frames`. Needs the package `modeling-convtransformer[video]`.
            columns (`list[str]`, *optional*): the channels in a table of sensor values, in the model's order; default: all
                but that of times. Values are put on a clock of the feature extractor's `fps` where the table has times.
            threshold (`float`, *optional*): only segments with a score above this; default: all that post-processing keeps.
            top_k (`int`, *optional*): at most this many segments of each recording.
            window (`int`, *optional*): for recordings longer than memory allows: run on windows of this many features,
                whose outputs are put together before NMS. The result is the full pass's where the model's
                receptive field (`model.config.receptive_field`, both sides added) fits in the overlap.
            overlap (`int`, *optional*): features that neighbouring windows share. Default: the receptive field, or a
                quarter of the window where it is larger than half of the window.
            batch_size (`int`, defaults to 1): recordings or windows in one forward pass.
            fps, feature_stride, num_frames, duration: for all recordings of the call.
            settings: post-processing's, such as `nms_method` or `iou_threshold`; see
                `ConvTransformerFeatureExtractor.post_process_temporal_action_localization`.

        Returns:
            for one recording a list of `{"label": str, "score": float, "start": float, "end": float}` (seconds, best score
            first), ready for JSON; for a list of recordings a list of such lists; for a dataset or generator an iterator.

        Raises:
            ValueError: a recording that the model cannot use; the message names it and what to do.
        """
        return super().__call__(_as_inputs(inputs), **kwargs)

    def _sanitize_parameters(self, **kwargs) -> tuple[dict, dict, dict]:
        return self._sort_parameters(("window", "overlap", *_OPENING), kwargs)

    def preprocess(
        self, recording, window: int | None = None, overlap: int | None = None, **opening
    ) -> Iterator[dict]:
        geometry = self.open(recording, **opening)
        features = geometry.pop("features")
        if window is None:
            if overlap is not None:
                raise ValueError(f"overlap is {overlap!r}, but window is not given; give both, or window alone.")
            windows = [(0, len(features), 0, len(features))]
        else:
            windows = self._plan_windows(len(features), window, overlap)
        progress = logging.tqdm(total=len(windows), desc="windows", disable=len(windows) == 1)
        for start, end, own_start, own_end in windows:
            progress.update()
            if end == len(features):  # what follows the last window is not waited for
                progress.close()
            yield {
                "is_last": end == len(features),
                "geometry": geometry,
                "place": (start, own_start, own_end),
                **self.feature_extractor(features[start:end]),
            }

    def _plan_windows(self, length: int, window: int, overlap: int | None) -> list[tuple[int, int, int, int]]:
        """
        Start and end of each window, and of the part of the recording that is taken from it. All but the last end are
        multiples of the coarsest stride, so that the points of a window are points of the whole.
        """
        config = self.model.config
        stride = config.detector_strides[-1]
        before, after = config.receptive_field
        for name, value in (("window", window), ("overlap", overlap)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0):
                raise ValueError(f"{name} is {value!r}; expected a number of features.")
        size = window // stride * stride
        if overlap is None:
            overlap = before + after if before + after <= size / 2 else size // 4
        elif overlap < before + after < math.inf:
            logger.warning_once(
                f"The overlap of {overlap} features is less than the receptive field of this model "
                f"({before + after:.0f}): near the borders of windows the result is not the full pass's."
            )
        # What is before a border belongs to the earlier window; a model that looks back only needs all of it there.
        left = overlap if after == 0 else overlap / 2
        left, right = (math.ceil(side / stride) * stride for side in (left, overlap - left))
        if size <= left + right:
            raise ValueError(
                f"window is {window} and overlap {overlap}, which this model's strides of up to {stride} features round to "
                f"{size} and {left + right}; expected a window that is larger than the overlap, such as "
                f"window={4 * (left + right) or stride}."
            )
        windows, start = [], 0
        while True:
            is_last = start + size >= length
            own_end = length if is_last else start + size - right
            windows.append((start, length if is_last else start + size, start + left if start else 0, own_end))
            if is_last:
                return windows
            start = own_end - left

    def _forward(self, model_inputs: dict) -> dict:
        passed_on = {name: model_inputs.pop(name) for name in ("is_last", "geometry", "place")}
        outputs = self.model(**model_inputs)
        return {**passed_on, **{name: outputs[name] for name in _OUTPUTS}}

    def postprocess(self, model_outputs: list[dict], **settings) -> list[dict[str, Any]]:
        geometry = model_outputs[0]["geometry"]
        outputs = model_outputs[0] if len(model_outputs) == 1 else self._join_windows(model_outputs)
        outputs = {name: outputs[name] for name in _OUTPUTS}
        found = self.feature_extractor.post_process_temporal_action_localization(outputs, geometry, **settings)[0]
        rows = zip(found["segments"].tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True)
        id2label = self.model.config.id2label
        return [
            {"label": id2label[label], "score": score, "start": start, "end": end}
            for (start, end), label, score in rows
        ]

    def _join_windows(self, windows: list[dict]) -> dict:
        """The outputs that one pass over the whole recording would have: each point from the window that owns it."""
        parts = []
        for level, stride in enumerate(self.model.config.detector_strides):
            for one in windows:
                start, own_start, own_end = one["place"]
                of_level = one["point_levels"][0] == level
                position = start + stride * (torch.cumsum(of_level, dim=0) - 1)
                own = of_level & (one["point_mask"][0] > 0) & (position >= own_start) & (position < own_end)
                part = {name: one[name][:, own] for name in _OUTPUTS}
                part["pred_segments"] = part["pred_segments"] + start
                parts.append(part)
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in _OUTPUTS}


class MomentRetrievalPipeline(ConvTransformerPipeline):
    """
    Moments that a text describes, with a `ConvTransformerForMomentRetrieval`:

    ```python
    >>> from transformers import pipeline

    >>> find = pipeline("moment-retrieval", model="someone/their-model", trust_remote_code=True)
    >>> find("features.npy", ["turn the arm outward", "lean on the table"], top_k=1)
    [[{'query': 'turn the arm outward', 'score': 0.74, 'start': 259.3, 'end': 294.7}],
     [{'query': 'lean on the table', 'score': 0.02, 'start': 3.8, 'end': 34.7}]]
    ```

    (`trust_remote_code` where `modeling_convtransformer` is not imported.)

    Raises:
        ValueError: the model is not of this kind, lacks trained weights or a text encoder, or does not fit the feature
            extractor, or there is no tokenizer.
    """

    _model_class = "ConvTransformerForMomentRetrieval"
    _load_tokenizer = None  # `__init__` says more than transformers would where it is missing

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        name = self.model.name_or_path or "The model"
        if self.model.config.text_config is None:
            raise ValueError(
                f"{name} has no text encoder (text_config), so the pipeline cannot read queries. Call the model with "
                "query_embeds of the encoder that it was trained with."
            )
        processor, self.processor = self.processor, None  # a pipeline that has one takes it for everything
        if self.tokenizer is None and processor is not None:
            self.tokenizer = processor.tokenizer
        if self.tokenizer is None:
            raise ValueError(
                f"{name} has no usable tokenizer to read queries with. Pass tokenizer=, or save the one of its text encoder "
                "beside it: ConvTransformerProcessor(feature_extractor, tokenizer).save_pretrained(folder)."
            )
        self._join = ConvTransformerProcessor(self.feature_extractor, self.tokenizer)

    def __call__(self, inputs, queries=None, **kwargs) -> list:
        """
        Args:
            inputs: one recording, or a list, dataset or generator of recordings, as in `TemporalActionLocalizationPipeline`; a
                dict may hold its own `queries`.
            queries: a text, or a list of texts, which are asked of every recording. The recording is encoded once for all.
            threshold (`float`, *optional*): only moments with a score above this; default: all that post-processing keeps.
            top_k (`int`, *optional*): at most this many moments of each query.
            batch_size (`int`, defaults to 1): recordings in one forward pass.
            fps, feature_stride, num_frames, duration: for all recordings of the call.
            settings: post-processing's, such as `nms_method` or `iou_threshold`.

        Returns:
            for one recording and a list of queries a list with, for each query, a list of `{"query": str, "score": float,
            "start": float, "end": float}` (seconds, best score first), ready for JSON; for a single text that one list; for a
            list of recordings a list of such results; for a dataset or generator an iterator.

        Raises:
            ValueError: no or empty queries, one that is longer than the text encoder allows, or a recording that the model cannot
                use; the message names it and what to do.
        """
        if queries is not None:
            kwargs["queries"] = queries if isinstance(queries, str) else _as_texts(queries)
        return super().__call__(_as_inputs(inputs), **kwargs)

    def _sanitize_parameters(self, **kwargs) -> tuple[dict, dict, dict]:
        return self._sort_parameters(("queries", *_OPENING), kwargs)

    def preprocess(self, recording, queries=None, **opening) -> Iterator[dict]:
        if isinstance(recording, Mapping) and "queries" in recording:
            recording = dict(recording)
            queries = recording.pop("queries")
            queries = queries if isinstance(queries, str) else _as_texts(queries)
        if queries is None:
            raise ValueError(
                'No queries given: pass a text or a list of texts, find(recording, ["turn the arm outward"]), or a dict with '
                "`queries` beside its features."
            )
        (texts,) = check_queries(queries, ["the recording"])
        geometry = self.open(recording, **opening)
        features = geometry.pop("features")
        (ids,) = self._join.tokenize_each([texts], ["the recording"])
        # Queries of several recordings are of different numbers and lengths: they are put together in `_forward`.
        asked = {"texts": texts, "ids": ids, "is_one": isinstance(queries, str)}
        yield {"is_last": True, "geometry": geometry, "queries": asked, **self.feature_extractor(features)}

    def _forward(self, model_inputs: dict) -> dict:
        passed_on = {name: model_inputs.pop(name) for name in ("is_last", "geometry", "queries")}
        asked = passed_on["queries"]
        words = self._join.pad_tokens([one["ids"] for one in ([asked] if isinstance(asked, dict) else asked)])
        words = {name: torch.from_numpy(value).to(self.model.device) for name, value in words.items()}
        outputs = self.model(**model_inputs, **words)
        return {**passed_on, **{name: outputs[name] for name in (*_OUTPUTS, "query_mask")}}

    def postprocess(self, model_outputs: list[dict], **settings) -> list:
        (outputs,) = model_outputs
        asked = outputs["queries"]
        outputs, geometry = {name: outputs[name] for name in (*_OUTPUTS, "query_mask")}, outputs["geometry"]
        found = self.feature_extractor.post_process_moment_retrieval(outputs, geometry, **settings)[0]
        moments = [
            [
                {"query": query, "score": score, "start": start, "end": end}
                for (start, end), score in zip(one["segments"].tolist(), one["scores"].tolist(), strict=True)
            ]
            for query, one in zip(asked["texts"], found, strict=True)
        ]
        return moments[0] if asked["is_one"] else moments


def _import(name: str):
    """A module that reads files and does not travel with checkpoints."""
    try:
        return importlib.import_module(f"modeling_convtransformer.{name}")
    except ModuleNotFoundError as error:
        if error.name != "modeling_convtransformer":
            raise
        raise ImportError(
            "Videos, sound and tables of sensor values are read by the package itself: pip install "
            '"modeling-convtransformer[video]". (Arrays of features need no package.)'
        ) from error


def _as_texts(queries) -> list[str]:
    """
    Raises:
        ValueError: none, empty ones, or something else.
    """
    queries = list(queries) if isinstance(queries, Iterable) else queries
    (texts,) = check_queries(queries, ["the recording"])
    if not isinstance(queries[0], str):
        raise ValueError(
            "queries is a list of lists; expected a text, or a list of texts, which are asked of every recording. To ask "
            'each its own, pass dicts: {"features": ..., "queries": [...]}.'
        )
    return texts


def _as_inputs(inputs):
    """A list where several recordings are given at once."""
    if isinstance(inputs, np.ndarray | torch.Tensor) and inputs.ndim == 3:
        return list(inputs)
    return list(inputs) if isinstance(inputs, tuple) else inputs


__all__ = ["MomentRetrievalPipeline", "TemporalActionLocalizationPipeline"]
