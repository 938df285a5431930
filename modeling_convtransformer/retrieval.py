"""Search over many recordings: embed each once; then a sentence leads to recordings, and to the moments inside them.

    index = SegmentIndex(model.config.projection_dim, dtype="int8", model=fingerprint(model))
    for recording in embed_recordings(model, processor, {"monday": "monday.npy", "tuesday": "tuesday.npy"}):
        index.add(**recording)
    index.save("index")

    moments = search_moments(["turn the arm outward"], SegmentIndex.load("index"), model, processor, recordings)
    json.dumps(moments)  # [{"query", "recording", "start", "end" (seconds), "score", "recording_score", ...}, ...]

Two stages, as in retrieval of documents: the index compares one vector of the sentence with the vectors of all recordings,
which costs a dot product each; only the recordings that it ranks first are read again, and the decoder, which sees every
word and every step, says where in them the moment is.

The search is exact. faiss (Johnson et al., "Billion-scale similarity search with GPUs", https://arxiv.org/abs/1702.08734)
does it where it is installed, PyTorch elsewhere, with the same results.
"""

import hashlib
import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

__all__ = ["SegmentIndex", "embed_recordings", "embed_sentences", "fingerprint", "search_moments"]

# An int8 embedding is round(127 * x) of a unit vector x, for all vectors alike, so that adding more never changes the ones
# that are there. Rounding moves a cosine by 1 / (127 * sqrt(12)) = 0.0023 (standard deviation), however wide the vectors.
_INT8_SCALE = 127

# The torch backend turns this many int8 vectors at a time into floating point.
_BLOCK = 2**16

_FORMAT = 1
_TABLE = "index.json"


class SegmentIndex:
    """Embeddings of the segments of many recordings, to find the recordings that are nearest to a text embedding.

    A recording's score is the cosine between the text and the nearest one of its segments. Vectors are normalised here.

    Args:
        dim: width of the embeddings (`projection_dim` of the model).
        dtype: "float32", or "int8", a quarter of the memory (see docs/retrieval.md for what it costs).
        backend: "faiss", "torch", or None: faiss where it is installed. Both find the same; a saved index opens with either.
        model: what tells the model that makes the embeddings from others (`fingerprint`): `search_moments` then refuses others.

    Attributes:
        recordings: the ids, in the order in which they were added.
        num_segments, nbytes: vectors of all recordings, and the bytes that they take.

    Raises:
        ImportError: backend "faiss" without faiss.
        ValueError: a dim that is no positive integer, an unknown dtype or backend.
    """

    def __init__(self, dim: int, dtype: str = "float32", backend: str | None = None, model: str | None = None) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(
                f"dim is {dim!r}; expected the width of the embeddings, a positive integer. A model has them if its config "
                "has a projection_dim."
            )
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected {' or '.join(map(repr, _DTYPES))}.")
        if backend is None:
            backend = "faiss" if importlib.util.find_spec("faiss") else "torch"
        if backend not in _BACKENDS:
            raise ValueError(f"backend is {backend!r}; expected {' or '.join(map(repr, _BACKENDS))}, or None.")
        self.dim, self.dtype, self.backend, self.model = dim, dtype, backend, model
        self._vectors = _BACKENDS[backend](dim, dtype)
        self._metadata: dict[str, dict] = {}  # by recording, in the order of the rows
        self._segments: dict[str, np.ndarray] = {}
        self._ends: np.ndarray | None = None  # the row after each recording's last one; None: to be counted

    def __len__(self) -> int:
        return len(self._segments)

    def __contains__(self, recording: str) -> bool:
        return recording in self._segments

    def __repr__(self) -> str:
        return (
            f"SegmentIndex({len(self)} recordings, {self.num_segments} segments of {self.dim} {self.dtype} values, "
            f"{self.backend})"
        )

    @property
    def recordings(self) -> list[str]:
        return [*self._segments]

    @property
    def num_segments(self) -> int:
        return sum(map(len, self._segments.values()))

    @property
    def nbytes(self) -> int:
        return self.num_segments * self.dim * np.dtype(self.dtype).itemsize

    def metadata(self, recording: str) -> dict:
        """What was given with the recording when it was added."""
        self._check_known(recording)
        return dict(self._metadata[recording])

    def add(
        self,
        recording: str,
        embeds: torch.Tensor | np.ndarray,
        segments: torch.Tensor | np.ndarray,
        metadata: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> None:
        """
        Args:
            recording: its id, a string.
            embeds: (segments, dim), of any length but 0.
            segments: (segments, 2), start and end in seconds.
            metadata: what a search shall say about the recording too: JSON values under keys other than its own.
            replace: take the place of a recording with this id, if there is one.

        Raises:
            ValueError: the id is there already, or no string; shapes that do not fit, values that are not finite, a vector
                of length 0, or metadata that JSON cannot hold. The message names the recording; the index is unchanged.
        """
        if not isinstance(recording, str) or not recording:
            raise ValueError(f"The id of a recording is {recording!r}; expected a string that is not empty.")
        if recording in self and not replace:
            raise ValueError(f"{recording}: is in the index already; give replace=True to take its place.")
        codes = self._encode(embeds, recording)
        segments = _as_numpy(segments)
        if segments.shape != (len(codes), 2) or len(codes) == 0:
            raise ValueError(
                f"{recording}: embeds have shape {codes.shape} and segments {segments.shape}; expected (N, {self.dim}) and "
                "(N, 2) with N of at least 1."
            )
        if not np.isfinite(segments).all() or (segments[:, 0] > segments[:, 1]).any():
            raise ValueError(f"{recording}: segments must be finite seconds, start before end.")
        try:
            metadata = json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{recording}: metadata must be what JSON can hold ({error}).") from error
        if reserved := sorted({*metadata} & _RESERVED):
            raise ValueError(f"{recording}: metadata has the keys {reserved}, which a result itself has; rename them.")
        if recording in self:
            self.remove(recording)
        self._vectors.add(codes)
        self._segments[recording], self._metadata[recording] = segments, metadata
        self._ends = None

    def remove(self, recording: str) -> None:
        """
        Raises:
            KeyError: there is no such recording.
        """
        self._check_known(recording)
        first = 0
        for other, segments in self._segments.items():
            if other == recording:
                break
            first += len(segments)
        self._vectors.remove(first, first + len(self._segments.pop(recording)))
        del self._metadata[recording]
        self._ends = None

    def search(self, text_embeds: torch.Tensor | np.ndarray, top_recordings: int = 5) -> list[list[dict]]:
        """
        Args:
            text_embeds: (queries, dim).
            top_recordings: the most to find for a query.

        Returns:
            for each query its nearest recordings, best first: {"recording", "recording_score" (cosine), "segment": [start,
            end] (seconds; the nearest segment), **metadata}.

        Raises:
            ValueError: shapes that do not fit, values that are not finite, a vector of length 0.
        """
        if isinstance(top_recordings, bool) or not isinstance(top_recordings, int) or top_recordings < 1:
            raise ValueError(f"top_recordings is {top_recordings!r}; expected a whole number of at least 1.")
        queries = _unit_vectors(text_embeds, self.dim, "text_embeds")
        if not len(self) or not len(queries):
            return [[] for _ in queries]
        if self.dtype == "int8":
            queries = queries / np.float32(_INT8_SCALE)
        if self._ends is None:
            self._ends = np.cumsum([len(segments) for segments in self._segments.values()])
        recordings, ends = self.recordings, self._ends
        found = self._vectors.search(queries, ends, min(top_recordings, len(self)))
        results = []
        for scores, rows in found:
            results.append([])
            for score, row in zip(scores.tolist(), rows.tolist(), strict=True):
                place = int(np.searchsorted(ends, row, side="right"))
                recording = recordings[place]
                segment = self._segments[recording][row - (ends[place - 1] if place else 0)]
                results[-1].append(
                    {
                        "recording": recording,
                        "recording_score": score,
                        "segment": segment.tolist(),
                        **self._metadata[recording],
                    }
                )
        return results

    # --- On disk ----------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike) -> None:
        """
        Writes index.json and the vectors (safetensors) into `folder`. An index that is there is replaced at once: whenever
        the process ends, the folder holds either the old one or the new one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        vectors = folder / f"vectors-{uuid.uuid4().hex}.safetensors"
        table = {
            "format": _FORMAT,
            "dim": self.dim,
            "dtype": self.dtype,
            "model": self.model,
            "vectors": vectors.name,
            "recordings": [
                {"id": recording, "segments": len(self._segments[recording]), "metadata": self._metadata[recording]}
                for recording in self._segments
            ],
        }
        segments = [*self._segments.values(), np.empty((0, 2), np.float32)]
        temporary = folder / f".{uuid.uuid4().hex}.json"
        try:
            save_file({"vectors": self._vectors.codes(), "segments": np.concatenate(segments)}, vectors)
            temporary.write_text(json.dumps(table) + "\n", encoding="utf-8")
            temporary.replace(folder / _TABLE)  # from here on the new vectors are the index's
        except BaseException:
            temporary.unlink(missing_ok=True)
            vectors.unlink(missing_ok=True)
            raise
        for other in folder.glob("vectors-*.safetensors"):
            if other != vectors:
                other.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | os.PathLike, backend: str | None = None) -> "SegmentIndex":
        """
        Raises:
            FileNotFoundError: there is no index in `folder`.
            ValueError: its files are not those of an index, or do not belong together.
        """
        folder = Path(folder)
        if not (folder / _TABLE).is_file():
            raise FileNotFoundError(f"{folder} holds no index: there is no {_TABLE}. SegmentIndex.save writes one.")
        try:
            table = json.loads((folder / _TABLE).read_text(encoding="utf-8"))
            if table["format"] != _FORMAT:
                raise ValueError(f"format {table['format']!r}, this version reads {_FORMAT}; build the index again")
            index = cls(table["dim"], table["dtype"], backend, table.get("model"))
            arrays = load_file(folder / Path(table["vectors"]).name)
            codes, segments = arrays["vectors"], arrays["segments"]
            counts = [entry["segments"] for entry in table["recordings"]]
            rows = sum(counts)
            if codes.shape != (rows, index.dim) or codes.dtype != index.dtype or segments.shape != (rows, 2):
                raise ValueError(
                    f"{rows} segments of {index.dim} {index.dtype} values are listed, but the vectors are {codes.shape} "
                    f"{codes.dtype} and the segments {segments.shape}"
                )
            parts = np.split(segments, np.cumsum(counts)[:-1]) if counts else []
            for entry, part in zip(table["recordings"], parts, strict=True):
                index._segments[entry["id"]], index._metadata[entry["id"]] = part, entry["metadata"]
            if len(index) != len(counts):
                raise ValueError("the same id is listed twice")
        except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
            raise ValueError(f"{folder} holds no index that can be read: {type(error).__name__}: {error}.") from error
        if rows:
            index._vectors.add(codes)
        return index

    # --- Parts ------------------------------------------------------------------------------------------------------

    def _encode(self, embeds: torch.Tensor | np.ndarray, name: str) -> np.ndarray:
        units = _unit_vectors(embeds, self.dim, f"{name}: embeds")
        return np.rint(units * _INT8_SCALE).astype(np.int8) if self.dtype == "int8" else units

    def _check_known(self, recording: str) -> None:
        if recording not in self:
            raise KeyError(f"There is no recording {recording!r} in the index of {len(self)}.")


_DTYPES = ("float32", "int8")
_RESERVED = {"query", "recording", "recording_score", "segment", "start", "end", "score"}


class _TorchVectors:
    """The rows of an index in one tensor. `search` returns (scores, rows) for each query: the best row of each of its
    best recordings, where recording r has the rows ends[r - 1] to ends[r]."""

    def __init__(self, dim: int, dtype: str) -> None:
        self._parts = [torch.empty(0, dim, dtype=getattr(torch, dtype))]

    def add(self, codes: np.ndarray) -> None:
        self._parts.append(torch.from_numpy(np.ascontiguousarray(codes)))

    def remove(self, first: int, last: int) -> None:
        rows = self._whole()
        self._parts = [torch.cat((rows[:first], rows[last:]))]

    def codes(self) -> np.ndarray:
        return self._whole().numpy()

    def _whole(self) -> torch.Tensor:
        # A copy after each change is cheap beside a search, which reads all of it too.
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0]

    def search(self, queries: np.ndarray, ends: np.ndarray, top: int) -> list[tuple[np.ndarray, np.ndarray]]:
        rows, queries = self._whole(), torch.from_numpy(queries)
        starts = np.concatenate(([0], ends[:-1]))
        owner = torch.from_numpy(np.repeat(np.arange(len(ends)), ends - starts))
        best = torch.full((len(queries), len(ends)), -torch.inf)
        for first in range(0, len(rows), _BLOCK):
            scores = queries @ rows[first : first + _BLOCK].float().T
            best.scatter_reduce_(1, owner[first : first + _BLOCK].expand_as(scores), scores, "amax")
        scores, chosen = (x[:, :top].numpy() for x in best.sort(dim=1, descending=True, stable=True))
        results = []
        for query, one_scores, one_chosen in zip(queries, scores, chosen, strict=True):
            best_rows = [starts[r] + int((rows[starts[r] : ends[r]].float() @ query).argmax()) for r in one_chosen]
            results.append((one_scores, np.array(best_rows)))
        return results


class _FaissVectors:
    """The same with faiss, which then holds the only copy of the rows: `IndexFlatIP`, or an `IndexScalarQuantizer` with the
    same int8 values in its bytes."""

    def __init__(self, dim: int, dtype: str) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ImportError(
                f'backend "faiss" needs faiss ({error}): pip install "modeling-convtransformer[search]", or take "torch".'
            ) from error
        self._faiss, self._dim, self._dtype = faiss, dim, dtype
        if dtype == "int8":
            # The quantizer that keeps integers as they are (QT_8bit_direct_signed) also rounds queries to integers where
            # the width is a multiple of 64. This one does not, and is told to read byte c as the number c - 128.
            kind = faiss.ScalarQuantizer.QT_8bit_uniform
            self._index = faiss.IndexScalarQuantizer(dim, kind, faiss.METRIC_INNER_PRODUCT)
            faiss.copy_array_to_vector(np.float32([-128.5, 255]), self._index.sq.trained)  # least value, range
            self._index.is_trained = True
        else:
            self._index = faiss.IndexFlatIP(dim)

    def add(self, codes: np.ndarray) -> None:
        for first in range(0, len(codes), _BLOCK):  # (as floating point, whatever it keeps)
            self._index.add(np.ascontiguousarray(codes[first : first + _BLOCK], dtype=np.float32))

    def remove(self, first: int, last: int) -> None:
        self._index.remove_ids(self._faiss.IDSelectorRange(first, last))

    def codes(self) -> np.ndarray:
        flat = self._faiss.vector_to_array(self._index.codes)
        if self._dtype == "int8":
            return (flat ^ np.uint8(128)).view(np.int8).reshape(-1, self._dim)
        return flat.view(np.float32).reshape(-1, self._dim)

    def search(self, queries: np.ndarray, ends: np.ndarray, top: int) -> list[tuple[np.ndarray, np.ndarray]]:
        results: list = [None] * len(queries)
        left, count, total = np.arange(len(queries)), min(16 * top, int(ends[-1])), int(ends[-1])
        while len(left):
            scores, rows = self._index.search(np.ascontiguousarray(queries[left]), count)
            owners = np.searchsorted(ends, rows, side="right")
            unfinished = []
            for place, one_scores, one_rows, one_owners in zip(left, scores, rows, owners, strict=True):
                firsts = np.sort(np.unique(one_owners, return_index=True)[1])[:top]  # of each recording, best first
                if len(firsts) < top and count < total:
                    unfinished.append(place)
                results[place] = (one_scores[firsts], one_rows[firsts])
            left, count = np.array(unfinished, dtype=np.int64), min(4 * count, total)
        return results


_BACKENDS = {"faiss": _FaissVectors, "torch": _TorchVectors}


def _as_numpy(array: torch.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        array = array.detach().float().cpu().numpy()
    return np.array(array, dtype=np.float32)


def _unit_vectors(embeds: torch.Tensor | np.ndarray, dim: int, name: str) -> np.ndarray:
    """(N, dim) float32, each of length 1."""
    embeds = _as_numpy(embeds)
    if embeds.ndim != 2 or embeds.shape[1] != dim:
        raise ValueError(f"{name} have shape {embeds.shape}; expected (N, {dim}).")
    if not np.isfinite(embeds).all():
        raise ValueError(f"{name} hold values that are NaN or infinite; look at the features or the model.")
    lengths = np.linalg.norm(embeds, axis=1, keepdims=True)
    if (lengths == 0).any():
        raise ValueError(f"{name}: vector {int(np.argmin(lengths))} has length 0, so it points nowhere.")
    return embeds / lengths


# --- With a model -----------------------------------------------------------------------------------------------------


def fingerprint(model) -> str:
    """A check sum of the weights that embed points and queries: two models with the same one have the same embeddings, if what
    comes before these weights is the same."""
    parts = (model.segment_projection, model.text_projection)
    weights = [tensor.detach().float().cpu().numpy() for part in parts for tensor in part.state_dict().values()]
    return hashlib.sha256(b"".join(one.tobytes() for one in weights)).hexdigest()[:16]


@contextmanager
def _evaluating(model):
    """In evaluation mode, and afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def embed_sentences(model, processor, sentences: Sequence[str], batch_size: int = 32) -> dict[str, torch.Tensor]:
    """
    What the model's text encoder makes of each sentence, {sentence: (words, text width)}: for `data.MomentCollator`, because
    a frozen encoder says the same at each step of training.

    Raises:
        ValueError: no sentence, an empty one, or one longer than the text encoder takes; a text encoder that learns, so that
            what it says now is not what it says later.
    """
    if any(parameter.requires_grad for parameter in model.text_encoder.parameters()):
        raise ValueError(
            "The text encoder of this model learns (freeze_text_encoder=False, or an adapter): give it the sentences at each "
            "step, which is what MomentCollator does without text_embeds."
        )
    sentences, embeds = [*dict.fromkeys(sentences)], {}
    tokens = processor.tokenize(sentences)
    with _evaluating(model):
        for first in range(0, len(sentences), batch_size):
            some = {key: value[:, first : first + batch_size].to(model.device) for key, value in tokens.items()}
            words, _ = model.encode_queries(**some)
            counts = some["query_attention_mask"][0].sum(-1).tolist()
            for sentence, one, count in zip(sentences[first:], words[0].cpu(), counts, strict=False):
                embeds[sentence] = one[:count].clone()
    return embeds


def embed_recordings(
    model,
    processor,
    recordings: Mapping[str, Any],
    levels: Sequence[int] | None = None,
    show_progress: bool = True,
) -> Iterator[dict[str, Any]]:
    """
    The embeddings of each recording, as `SegmentIndex.add` takes them: {"recording", "embeds" (N, projection_dim), "segments"
    (N, 2) seconds}, one recording at a time. To go on after an interruption, leave out what the index has.

    Args:
        model: a `ConvTransformerForMomentRetrieval` with a `projection_dim`.
        processor: its `ConvTransformerProcessor`.
        recordings: {id: array, path or dict}, as the feature extractor takes them.
        levels: of the pyramid, 0 the finest; None: all. Each level has half as many points as the one before, so without the
            finest ones an index is a fraction of the size, which is enough where what is asked for is long.

    Raises:
        ValueError: the model has no contrastive head or fewer levels, or a recording cannot be used; the message names it.
    """
    count = len(model.config.detector_strides)
    levels = [*range(count)] if levels is None else [*levels]
    if not levels or not {*levels} <= {*range(count)}:
        raise ValueError(f"levels are {levels}; expected some of {[*range(count)]}, 0 the finest.")
    extractor, strides = processor.feature_extractor, torch.tensor(model.config.detector_strides)
    for recording, sample in _progress(recordings.items(), "embed recordings", show_progress):
        features, geometry = extractor.load(sample, name=recording)
        with torch.inference_mode(), _evaluating(model):
            outputs = model.get_segment_features(torch.from_numpy(features)[None].to(model.device))
        level = outputs.point_levels[0].cpu()
        stride = strides[level]
        place = torch.cat([torch.arange(int((level == one).sum())) for one in range(count)]) * stride
        # A point stands for the stretch that is nearer to it than to its neighbours.
        stretch = torch.stack((place - stride / 2, place + stride / 2), dim=-1)
        seconds = extractor.to_seconds([stretch], geometry)[0].clamp(min=0, max=geometry.get("duration"))
        chosen = torch.isin(level, torch.tensor(levels))
        yield {
            "recording": recording,
            "embeds": outputs.embeds[0][chosen.to(outputs.embeds.device)],
            "segments": seconds[chosen],
        }


def search_moments(
    queries: str | Sequence[str],
    index: SegmentIndex,
    model,
    processor,
    recordings: Mapping[str, Any] | Callable[[str], Any],
    top_recordings: int = 5,
    top_moments: int = 5,
    threshold: float | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """
    The moments in many recordings that sentences describe.

    Args:
        queries: one sentence or several.
        index: of embeddings from this model.
        model, processor: a `ConvTransformerForMomentRetrieval` with a text encoder, and its `ConvTransformerProcessor`.
        recordings: {id: array, path or dict}, as the feature extractor takes them, or a function from id to such a sample. Only
            those that the index ranks first are read.
        top_recordings: to look into, for each query.
        top_moments: to return of each recording, for each query.
        threshold: only moments with a score above this.
        settings: of post-processing, such as `nms_sigma`.

    Returns:
        [{"query", "recording", "start", "end" (seconds), "score" (0 to 1: that the moment is what the query says),
        "recording_score" (cosine), **metadata of the recording}], ready for JSON: query by query, best score first.

    Raises:
        KeyError: recordings lack one that is in the index.
        ValueError: no query, an empty or too long one; an index of another model; a recording that cannot be used.
    """
    queries = [queries] if isinstance(queries, str) else list(queries)
    if index.dim != model.config.projection_dim or index.model not in (None, fingerprint(model)):
        raise ValueError(
            f"The index ({index.dim} wide) is not of this model (projection_dim {model.config.projection_dim}, or other "
            "weights). Search with the model that made it, or embed the recordings anew."
        )
    tokens = {key: value.to(model.device) for key, value in processor.tokenize(queries).items()}
    with torch.inference_mode(), _evaluating(model):
        words, _ = model.encode_queries(**tokens)
        text = {"query_embeds": words, "query_attention_mask": tokens["query_attention_mask"]}
        hits = index.search(model.get_text_features(**text)[0], top_recordings)

    asked: dict[str, list[int]] = {}  # each recording is encoded once, for all queries that lead to it
    for number, found in enumerate(hits):
        for hit in found:
            asked.setdefault(hit["recording"], []).append(number)
    moments: list[list[dict]] = [[] for _ in queries]
    for recording, numbers in asked.items():
        if not callable(recordings) and recording not in recordings:
            raise KeyError(f"The index has the recording {recording!r}, but recordings do not; give what was indexed.")
        sample = recordings(recording) if callable(recordings) else recordings[recording]
        features, geometry = processor.feature_extractor.load(sample, name=recording)
        with torch.inference_mode(), _evaluating(model):
            own = {key: value[:, numbers] for key, value in text.items()}
            outputs = model(torch.from_numpy(features)[None].to(model.device), **own)
        found = processor.post_process_moment_retrieval(outputs, geometry, threshold, top_moments, **settings)[0]
        for number, one in zip(numbers, found, strict=True):
            hit = next(hit for hit in hits[number] if hit["recording"] == recording)
            for (start, end), score in zip(one["segments"].tolist(), one["scores"].tolist(), strict=True):
                moment = {"query": queries[number], "recording": recording, "start": start, "end": end, "score": score}
                moments[number].append(moment | {key: value for key, value in hit.items() if key != "segment"})
    return [moment for found in moments for moment in sorted(found, key=lambda one: -one["score"])]


def _progress(items, description: str, show: bool):
    if not show:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=description)
