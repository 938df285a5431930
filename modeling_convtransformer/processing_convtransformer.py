"""ConvTransformerProcessor: recordings and questions in, what `ConvTransformerForMomentRetrieval` takes out, and back."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torch_available

from .feature_extraction_convtransformer import _name_samples, _to_labels

if is_torch_available():
    import torch

# Tokenizers without a limit say a number like 1e30.
_NO_LIMIT = 1_000_000


class ConvTransformerProcessor(ProcessorMixin):
    r"""
    A feature extractor for recordings and a tokenizer for queries.

    Args:
        feature_extractor (`ConvTransformerFeatureExtractor`): of the recordings.
        tokenizer (`PreTrainedTokenizerBase`): of the text encoder that the model has (`config.text_config`).
    """

    def __init__(self, feature_extractor, tokenizer):
        super().__init__(feature_extractor, tokenizer)
        if not hasattr(feature_extractor, "post_process_moment_retrieval"):
            raise ValueError(
                f"The feature extractor is a {type(feature_extractor).__name__}; expected a ConvTransformerFeatureExtractor."
            )

    @property
    def model_input_names(self) -> list[str]:
        return [*self.feature_extractor.model_input_names, "query_input_ids", "query_attention_mask"]

    def __call__(
        self,
        features,
        queries: str | Sequence[str] | Sequence[Sequence[str]],
        annotations: Sequence | None = None,
        geometry: dict | Sequence[dict] | None = None,
        names: Sequence[str] | None = None,
        truncation: bool = False,
        return_tensors: str = "pt" if is_torch_available() else "np",
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            features, geometry, names, kwargs: one recording or a list; see `ConvTransformerFeatureExtractor.__call__`.
            queries: one text, or a list of texts, which are asked of every recording; or for each recording a list of its own.
            annotations: for each recording the answers of each query, `(N, 2)` in seconds (or a dict with these `segments`);
                N is 0 where a query has no answer.
            truncation: cut queries that are longer than the text encoder allows, which is an error otherwise.
            return_tensors: `"pt"` or `"np"`.

        Returns:
            `input_features` (batch, time, channels), `attention_mask` (batch, time), `query_input_ids` and
            `query_attention_mask` (batch, queries, words), where recordings with fewer queries have some without a word; with
            annotations `labels`, for each recording a list of `{"segments": (N, 2) float32 on the feature grid}`.

        Raises:
            ValueError: no query, an empty or a too long one, or a recording that a model cannot use; the message names it.
        """
        batch = self.feature_extractor(
            features, geometry=geometry, names=names, return_tensors=return_tensors, **kwargs
        )
        count = len(batch["input_features"])
        geometries = self.feature_extractor.geometry_of(features, geometry)
        names = _name_samples([None] * count, names)
        queries = check_queries(queries, names)
        words = self.pad_tokens(self.tokenize_each(queries, names, truncation))
        for key, value in words.items():
            batch[key] = torch.from_numpy(value) if return_tensors == "pt" else value
        if annotations is not None:
            lengths = batch["attention_mask"].sum(-1).tolist()
            if len(annotations) != count:
                raise ValueError(f"annotations has {len(annotations)} entries for {count} recordings; give one each.")
            batch["labels"] = [
                self._label(*one, return_tensors)
                for one in zip(annotations, queries, lengths, geometries, names, strict=True)
            ]
        return batch

    def tokenize(self, queries: str | Sequence[str], return_tensors: str = "pt", truncation: bool = False) -> dict:
        """
        Queries alone, of one recording: `query_input_ids` and `query_attention_mask`, (1, queries, words).

        Raises:
            ValueError: as in `__call__`.
        """
        names = ["the recording"]
        words = self.pad_tokens(self.tokenize_each(check_queries(queries, names), names, truncation))
        return {key: torch.from_numpy(value) if return_tensors == "pt" else value for key, value in words.items()}

    def tokenize_each(
        self, queries: list[list[str]], names: Sequence[str], truncation: bool = False
    ) -> list[list[list[int]]]:
        """The token ids of each query of each recording; `names` are those of the recordings, for errors as in `__call__`."""
        limit = min(self.tokenizer.model_max_length, _NO_LIMIT)
        encoded = []
        for own, name in zip(queries, names, strict=True):
            options = {"truncation": truncation, "return_attention_mask": False, "verbose": False}
            encoded.append(self.tokenizer(own, **options)["input_ids"])
            for index, ids in enumerate(encoded[-1]):
                if len(ids) > limit:
                    raise ValueError(
                        f"{name}: query {index} ({own[index][:60]!r}...) has {len(ids)} tokens, but the text encoder takes at "
                        f"most {limit}. Shorten it, or pass truncation=True."
                    )
        return encoded

    def pad_tokens(self, encoded: list[list[list[int]]]) -> dict[str, np.ndarray]:
        """`query_input_ids` and `query_attention_mask`, each (batch, queries, words) int64, of token ids of different numbers."""
        longest = max(len(ids) for own in encoded for ids in own)
        shape = (len(encoded), max(map(len, encoded)), longest)
        filler = self.tokenizer.pad_token_id
        ids, mask = np.full(shape, 0 if filler is None else filler, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for sample, own in enumerate(encoded):
            for query, one in enumerate(own):
                ids[sample, query, : len(one)], mask[sample, query, : len(one)] = one, 1
        return {"query_input_ids": ids, "query_attention_mask": mask}

    def _label(
        self, annotation, queries: list[str], length: int, geometry: dict, name: str, return_tensors: str
    ) -> list:
        if len(annotation) != len(queries):
            raise ValueError(
                f"{name}: annotations of {len(annotation)} queries, but there are {len(queries)}; give one (N, 2) array each, "
                "N = 0 where a query has no answer."
            )
        labels = []
        for index, one in enumerate(annotation):
            segments = one["segments"] if isinstance(one, dict) else one
            one = {"segments": segments, "labels": [0] * len(segments)}
            grid = _to_labels(one, length, geometry, None, f"{name}, query {index}")["segments"]
            labels.append({"segments": torch.from_numpy(grid) if return_tensors == "pt" else grid})
        return labels

    def post_process_moment_retrieval(self, *args, **kwargs) -> list[list[dict[str, Any]]]:
        """See `ConvTransformerFeatureExtractor.post_process_moment_retrieval`."""
        return self.feature_extractor.post_process_moment_retrieval(*args, **kwargs)


def check_queries(queries, names: Sequence[str]) -> list[list[str]]:
    """
    The queries of each recording.

    Args:
        queries: as in `ConvTransformerProcessor.__call__`.
        names: of the recordings.

    Raises:
        ValueError: none, an empty one, or something that is no text; the message names the recording.
    """
    if isinstance(queries, str):
        queries = [queries]
    if not isinstance(queries, Iterable):
        raise ValueError(f"queries is {queries!r}; expected a text, or a list of texts.")
    queries = list(queries)
    if not queries:
        raise ValueError("No queries given: pass at least one text, such as ['a person lifts the arm'].")
    if any(isinstance(one, str) for one in queries):
        queries = [queries] * len(names)
    elif len(queries) != len(names):
        raise ValueError(
            f"queries has {len(queries)} lists for {len(names)} recordings; give one each, or one list of texts for all."
        )
    for own, name in zip(queries, names, strict=True):
        if not isinstance(own, Sequence):
            raise ValueError(f"{name}: {own!r} in place of queries; expected a list of texts.")
        if len(own) == 0:
            raise ValueError(f"{name}: no queries; give at least one text, or leave this recording out.")
        for index, query in enumerate(own):
            if not isinstance(query, str) or not query.strip():
                raise ValueError(f"{name}: query {index} is {query!r}; expected a text that says what to look for.")
    return [list(own) for own in queries]


__all__ = ["ConvTransformerProcessor"]
