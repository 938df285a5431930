"""From a recording file to features: video and sound through an encoder of transformers, sensors in windows.

    encoder = load_encoder("MCG-NJU/videomae-base", device="cuda")
    sample = extract_features("match.mp4", encoder, feature_stride=8, cache="features/match.safetensors")
    sample["features"]                        # (time, channels) float32
    pipeline("temporal-action-localization", model=...)(sample)

A feature covers `num_frames` ticks of a regular clock of `fps` ticks a second (frames, or samples of sound), and there is one
each `feature_stride` ticks, as everywhere in this package: feature t covers the seconds from `t * feature_stride / fps` to
`(t * feature_stride + num_frames) / fps`. The clock is the recording's own rate, or one that you give; at each tick the frame is
taken that a player would show then. Memory does not grow with the recording but for the features themselves.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch.nn.functional import interpolate
from transformers import AutoFeatureExtractor, AutoModel
from transformers.audio_utils import mel_filter_bank
from transformers.utils import cached_file, logging

from .feature_extraction_convtransformer import window_features
from .recordings import SIGNAL_SUFFIXES, AudioFile, VideoFile, check_file, check_rate, read_signal

logger = logging.get_logger(__name__)

__all__ = ["AudioEncoder", "LogMel", "VideoEncoder", "extract_features", "load_encoder", "read_features"]

POOLINGS = ("mean", "cls", "pooler")
LOG_MEL = "log-mel"
# Frames that are decoded and resized at once: what bounds the memory of full-size frames.
_FRAMES_AT_ONCE = 16
# What processors of transformers do with pictures, and what some do that is not known here.
_SETTINGS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "offset"),
    *("do_normalize", "image_mean", "image_std"),
)
_OWN_WAYS = ("crop_pct", "do_flip_channel_order", "keep_aspect_ratio", "rescale_offset")
# Sizes as they give them, and their numbers for ways to resize.
_SIZES = ({"height", "width"}, {"shortest_edge"})
_RESAMPLING = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}


# ---------------------------------------------------------------------------------------------------------------------
# Encoders: windows of a recording in, one feature each out


def load_encoder(
    name: str | os.PathLike,
    revision: str | None = None,
    pooling: str = "mean",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
) -> "VideoEncoder | AudioEncoder | LogMel":
    """
    A frozen encoder of transformers, by the name of its repository or its folder.

    Args:
        name: a video encoder (VideoMAE, V-JEPA 2, TimeSformer, ViViT, ...), an image encoder (DINOv2, CLIP's vision model,
            ...), which sees the middle frame of each window, an audio encoder (wav2vec 2.0, HuBERT, AST, Whisper, ...), or
            `"log-mel"`, which needs no weights.
        revision: of the repository: a branch, a tag, or a commit.
        pooling: `"mean"` of all tokens of a window, `"cls"`, the first one, or `"pooler"`, the model's `pooler_output`.
        device, dtype: of the encoder; features are float32.

    Raises:
        ValueError: not an encoder of video, images or sound, no processor settings, weights that do not fit, unknown pooling.
        OSError: there is no such model (of transformers; its message says what to do).
    """
    name = os.fspath(name)
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(POOLINGS)}.")
    if name == LOG_MEL:
        return LogMel()
    number = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(number, torch.dtype):
        raise ValueError(f"dtype is {dtype!r}; expected such as 'float32' or 'bfloat16'.")
    model, info = AutoModel.from_pretrained(name, revision=revision, dtype=number, output_loading_info=True)
    # Of models that also read or write, the part that sees or hears.
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    for part in ("video_model", "vision_model", "audio_model"):
        model = getattr(model, part, model)
    missing = [key for key in info["missing_keys"] if pooling == "pooler" or "pooler" not in key]
    if missing:
        raise ValueError(
            f"{name}: its weights lack {len(missing)} tensors of {type(model).__name__}, such as {missing[0]!r}, so that features "
            "would be random. Choose a checkpoint of this model."
        )
    kinds = {"pixel_values": VideoEncoder, "pixel_values_videos": VideoEncoder}
    kinds |= {"input_values": AudioEncoder, "input_features": AudioEncoder}
    if model.main_input_name not in kinds:
        raise ValueError(
            f"{name} is a {type(model).__name__}, which takes {model.main_input_name}; expected an encoder of video, images or "
            "sound."
        )
    encoder = kinds[model.main_input_name](model.to(device).eval().requires_grad_(False), name, revision, pooling)
    try:
        encoder.width = encoder.try_out().shape[1]
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{name}: {type(model).__name__} cannot be used as it is: a window of zeros gave {type(error).__name__}: {error}"
        ) from error
    return encoder


class _Encoder:
    """
    What encoders share.

    Attributes:
        num_frames, feature_stride: ticks of the clock that a feature covers, and from one to the next, by default.
        fps: ticks a second that the encoder needs; None: any.
        width: of a feature.
        batch_size: windows at once, by default.
    """

    fps: float | None = None
    batch_size = 8

    def __init__(self, model, name: str, revision: str | None, pooling: str):
        self.model, self.name, self.pooling = model, name, pooling
        self.revision = getattr(model.config, "_commit_hash", None) or revision
        self.fingerprint = _fingerprint_weights(model)

    def describe(self) -> dict[str, str]:
        """What features depend on, beside the recording and its windows."""
        return {
            "encoder": self.name,
            "encoder_revision": self.revision or "",
            "encoder_weights": self.fingerprint,
            "pooling": self.pooling,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def _pool(self, outputs) -> torch.Tensor:
        """(windows, channels) of a model's outputs."""
        if self.pooling == "pooler":
            pooled = getattr(outputs, "pooler_output", None)
            if pooled is None:
                raise ValueError("no pooler_output; expected pooling 'mean' or 'cls'")
            return pooled.flatten(1)
        tokens = outputs.last_hidden_state
        if tokens.ndim > 3:  # of convolutions: (windows, channels, height, width)
            tokens = tokens.flatten(2).mT
            if self.pooling == "cls":
                raise ValueError("a convolutional encoder has no first token; expected pooling 'mean' or 'pooler'")
        return tokens[:, 0] if self.pooling == "cls" else tokens.mean(dim=1)


class VideoEncoder(_Encoder):
    """
    A video or image encoder of transformers (`load_encoder` makes one). Frames are resized, cropped and normalised as the
    checkpoint's processor settings say, each once, however many windows it is in.
    """

    kind = "video"

    def __init__(self, model, name: str, revision: str | None = None, pooling: str = "mean"):
        super().__init__(model, name, revision, pooling)
        config = model.config
        self.is_image_encoder = not (hasattr(config, "num_frames") or hasattr(config, "frames_per_clip"))
        #: frames that the model takes
        self.frames_per_clip = (
            1 if self.is_image_encoder else int(getattr(config, "num_frames", None) or config.frames_per_clip)
        )
        self.num_frames = self.frames_per_clip
        self.feature_stride = 8 if self.is_image_encoder else max(self.num_frames // 2, 1)
        self._settings = _read_processor(name, revision)
        # V-JEPA 2 would also predict what it cannot see.
        self._arguments = {"skip_predictor": True} if config.model_type == "vjepa2" else {}

    def ticks(self, num_frames: int) -> np.ndarray:
        """Which of a window's ticks the model sees: in the middle of equal parts."""
        return ((np.arange(self.frames_per_clip) + 0.5) * num_frames / self.frames_per_clip).astype(np.int64)

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames (n, 3, height, width) uint8 as the model takes them, (n, 3, h, w) in its dtype and on its device."""
        settings, frames = self._settings, frames.to(self.model.device)
        if settings["do_resize"]:
            size, mode = _resized(frames.shape[-2:], settings["size"]), settings["resample"]
            antialias = {"antialias": True} if mode != "nearest-exact" else {}
            if frames.device.type != "cpu":  # only there bytes can be interpolated, as Pillow does it
                frames = frames.float()
            frames = interpolate(frames, size=size, mode=mode, **antialias)
            if frames.is_floating_point():
                frames = frames.round().clamp(0, 255)
        if settings["do_center_crop"]:
            frames = _crop(frames, settings["crop_size"])
        frames = frames.float()
        if settings["do_rescale"]:
            frames = frames * settings["rescale_factor"] - settings["offset"]
        if settings["do_normalize"]:
            mean, std = (
                torch.tensor(settings[key], device=frames.device)[:, None, None] for key in ("image_mean", "image_std")
            )
            frames = (frames - mean) / std
        return frames.to(self.model.dtype)

    @torch.inference_mode()
    def encode(self, windows: torch.Tensor) -> torch.Tensor:
        """Windows of prepared frames (windows, frames, 3, h, w) to features (windows, channels) float32."""
        if self.is_image_encoder:
            windows = windows[:, 0]
        return self._pool(self.model(**{self.model.main_input_name: windows}, **self._arguments)).float()

    def try_out(self) -> torch.Tensor:
        """The feature of a black window, (1, channels); not a square one, as videos are not."""
        frames = torch.zeros(self.frames_per_clip, 3, 64, 96, dtype=torch.uint8)
        return self.encode(self.prepare(frames)[None])

    def open(self, path: str | os.PathLike, fps: float | None) -> "_VideoTicks":
        return _VideoTicks(path, fps, self)


class AudioEncoder(_Encoder):
    """An audio encoder of transformers (`load_encoder` makes one): windows of a second, one each half second, by default."""

    kind = "audio"

    def __init__(self, model, name: str, revision: str | None = None, pooling: str = "mean"):
        super().__init__(model, name, revision, pooling)
        self._processor = AutoFeatureExtractor.from_pretrained(name, revision=revision)
        self.fps = self._processor.sampling_rate
        self.num_frames, self.feature_stride = self.fps, self.fps // 2
        # Samples that it hears whatever it is given, the rest silence: Whisper 30 s; AST 1,024 steps of 10 ms.
        self._whole = getattr(self._processor, "n_samples", None)
        self._is_ast = model.config.model_type == "audio-spectrogram-transformer"
        if self._is_ast:
            self._whole = self._processor.max_length * self.fps // 100

    def ticks(self, num_frames: int) -> np.ndarray:
        return np.arange(num_frames)

    @torch.inference_mode()
    def encode(self, windows: torch.Tensor) -> torch.Tensor:
        """Windows of sound (windows, samples) to features (windows, channels) float32."""
        if self._whole and windows.shape[1] > self._whole:
            raise ValueError(f"it hears {self._whole} samples at once")
        inputs = self._processor([one.numpy() for one in windows], sampling_rate=self.fps, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)  # (the dtype of numbers with a point)
        outputs = self.model(**inputs)
        if self._whole and self.pooling == "mean":
            tokens = outputs.last_hidden_state
            if self._is_ast:  # two tokens of no time, then rows of time, one for each stretch of frequencies
                config = self.model.config
                rows = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
                tokens = tokens[:, 2:].unflatten(1, (rows, -1)).mean(dim=1)
            heard = math.ceil(tokens.shape[1] * windows.shape[1] / self._whole)
            return tokens[:, :heard].mean(dim=1).float()
        return self._pool(outputs).float()

    def try_out(self) -> torch.Tensor:
        """The feature of a silent window, (1, channels)."""
        return self.encode(torch.zeros(1, self.num_frames))

    def open(self, path: str | os.PathLike, fps: float | None) -> "_AudioTicks":
        return _AudioTicks(path, fps, self)


class LogMel:
    """
    Logarithms of mel energies, without weights: windows of 25 ms, one each 10 ms, of sound at 16 kHz, in 64 bands from 125 to
    7,500 Hz (VGGish's, Hershey et al., "CNN Architectures for Large-Scale Audio Classification", ICASSP 2017,
    https://arxiv.org/abs/1609.09430).
    """

    kind, name, fps = "audio", LOG_MEL, 16000
    num_frames, feature_stride, batch_size = 400, 160, 4096

    def __init__(self, bands: int = 64, lowest: float = 125.0, highest: float = 7500.0):
        self._bands, self.width = (bands, lowest, highest), bands

    def describe(self) -> dict[str, str]:
        return {"encoder": self.name, "bands": "{} {:g} {:g}".format(*self._bands)}

    def ticks(self, num_frames: int) -> np.ndarray:
        return np.arange(num_frames)

    def encode(self, windows: torch.Tensor) -> torch.Tensor:
        """Windows of sound (windows, samples) to (windows, bands) float32."""
        length = 2 ** math.ceil(math.log2(windows.shape[1]))
        spectrum = torch.fft.rfft(windows * torch.hann_window(windows.shape[1]), n=length).abs()
        bands, lowest, highest = self._bands
        filters = mel_filter_bank(length // 2 + 1, bands, lowest, highest, self.fps, mel_scale="htk")
        return torch.log(spectrum @ torch.from_numpy(filters).float() + 0.01)

    def open(self, path: str | os.PathLike, fps: float | None) -> "_AudioTicks":
        return _AudioTicks(path, fps, self)


class _VideoTicks:
    """A video at the ticks of a clock, prepared for an encoder."""

    def __init__(self, path: str | os.PathLike, fps: float | None, encoder: VideoEncoder):
        self._file, self._encoder = VideoFile(path), encoder
        self.fps, self.duration = fps or self._file.fps, self._file.duration

    def read(self, ticks: np.ndarray) -> torch.Tensor:
        # The middle of a tick, so that rounded timestamps do not matter.
        seconds = (ticks + 0.5) / self.fps
        parts = np.split(seconds, np.arange(_FRAMES_AT_ONCE, len(seconds), _FRAMES_AT_ONCE))
        return torch.cat([self._encoder.prepare(self._file.frames_at(part)) for part in parts])


class _AudioTicks:
    """As `_VideoTicks`: here a tick is a sample."""

    def __init__(self, path: str | os.PathLike, fps: float | None, encoder: AudioEncoder | LogMel):
        if fps is not None and fps != encoder.fps:
            raise ValueError(
                f"{path}: fps is {fps}, but {encoder.name} takes sound at {encoder.fps} samples a second."
            )
        self._file = AudioFile(path, encoder.fps)
        self.fps, self.duration = encoder.fps, self._file.duration

    def read(self, ticks: np.ndarray) -> torch.Tensor:
        first, last = int(ticks[0]), int(ticks[-1])
        return self._file.read(first, last + 1)[torch.from_numpy(ticks - first)]


# ---------------------------------------------------------------------------------------------------------------------
# Extraction


def extract_features(
    path: str | os.PathLike,
    encoder: VideoEncoder | AudioEncoder | LogMel | None = None,
    fps: float | None = None,
    feature_stride: int | None = None,
    num_frames: int | None = None,
    columns: Sequence[str] | None = None,
    batch_size: int | None = None,
    cache: str | os.PathLike | None = None,
    save_every: float = 30.0,
    progress: bool = True,
) -> dict[str, Any]:
    """
    The features of one recording, with their geometry.

    Args:
        path: a video or audio file, or without an encoder a sensor file (.csv, .tsv, .parquet, .npy, .npz), whose windows of raw
            values are the features.
        encoder: from `load_encoder`.
        fps: ticks of the clock a second. Default: the recording's own rate (of video the mean, if it varies), or the encoder's.
        feature_stride, num_frames: ticks from one feature to the next, and ticks that one covers. Default: the encoder's; must
            be given for sensors. Of a longer window the encoder sees evenly spaced frames.
        columns: of a sensor table, see `recordings.read_signal`.
        batch_size: windows that are encoded at once; features do not depend on it.
        cache: a .safetensors file to write. If it exists and was made of this recording in this way, it is read instead. What a
            killed run has done lies beside it (`.part`), and the same call goes on from there.
        save_every: seconds between savings of what is done (0: after each batch).
        progress: show a progress bar.

    Returns:
        `{"features": (time, channels) float32, "fps", "feature_stride", "num_frames", "duration" (seconds)}`: a sample for the
        feature extractor and the pipelines. A recording that is shorter than a window gives one feature, the last frame held
        (sound: silence).

    Raises:
        ValueError: as `recordings.VideoFile`, `AudioFile` and `read_signal`; a cache of something else.
    """
    check_rate(fps)
    for name, value in (("feature_stride", feature_stride), ("num_frames", num_frames), ("batch_size", batch_size)):
        is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if value is not None and not (is_number and value >= 1 and value == int(value)):
            raise ValueError(f"{name} is {value!r}; expected a whole number, 1 or more.")
    check_file(path)
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if encoder is None:
        if suffix not in SIGNAL_SUFFIXES:
            raise ValueError(
                f"{path}: a recording of this kind needs an encoder, such as load_encoder('MCG-NJU/videomae-base'), or "
                f"load_encoder('log-mel') for sound. Without one: {', '.join(SIGNAL_SUFFIXES)}."
            )
        return _extract_windows(path, fps, feature_stride, num_frames, columns, cache)
    if suffix in SIGNAL_SUFFIXES or columns is not None:
        raise ValueError(f"{path}: sensor values in columns are cut into windows as they are; leave the encoder out.")

    feature_stride, num_frames = int(feature_stride or encoder.feature_stride), int(num_frames or encoder.num_frames)
    batch_size = int(batch_size or encoder.batch_size)
    known = {**_describe(path, fps, feature_stride, num_frames), **encoder.describe()}
    file = _Cache(cache, known, save_every)
    if file.is_whole:
        return file.sample()
    recording = encoder.open(path, fps)
    file.description |= {"fps": repr(float(recording.fps)), "duration": repr(recording.duration)}

    offsets = encoder.ticks(num_frames)
    total = max(0, round(recording.duration * recording.fps) - num_frames) // feature_stride + 1
    ticks = np.zeros(0, dtype=np.int64)
    values = None
    bar = logging.tqdm(
        total=total, initial=file.done, desc=os.path.basename(os.fspath(path)), unit="feature", disable=not progress
    )
    with bar:
        for first in range(file.done, total, batch_size):
            starts = np.arange(first, min(first + batch_size, total)) * feature_stride
            wanted = starts[:, None] + offsets
            # Windows share ticks: those of the last batch are kept as long as this one needs them.
            new = np.setdiff1d(wanted, ticks)
            needed = ticks >= wanted.min()
            parts = [] if values is None else [values[torch.from_numpy(needed)]]
            values = torch.cat([*parts, recording.read(new)] if len(new) else parts)
            ticks = np.concatenate([ticks[needed], new])
            windows = values[torch.from_numpy(np.searchsorted(ticks, wanted))]
            try:
                rows = encoder.encode(windows).cpu().numpy()
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    f"{path}: {encoder.name} cannot encode windows of {num_frames} ticks ({error}); its own have {encoder.num_frames}."
                ) from error
            file.append(rows, total)
            bar.update(len(starts))
    return file.finish()


def read_features(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """
    A file that `extract_features` wrote: the sample that it returned, and all that the file says of itself.

    Raises:
        ValueError: not such a file.
    """
    try:
        with safe_open(path, framework="np") as file:
            description, features = file.metadata() or {}, file.get_tensor("features")
        return _as_sample(features, description), description
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a file of features as extract_features writes ({error}).") from error


def _extract_windows(path, fps, feature_stride, num_frames, columns, cache) -> dict[str, Any]:
    """Windows of raw values, the features of models such as `configuration/sbhar.yaml`."""
    if feature_stride is None or num_frames is None:
        raise ValueError(
            f"{path}: feature_stride and num_frames are missing: how many samples from one window to the next, and how many in "
            "one."
        )
    known = _describe(path, fps, int(feature_stride), int(num_frames))
    known |= {"columns": json.dumps(list(columns))} if columns else {}
    file = _Cache(cache, known)
    if file.is_whole:
        return file.sample()
    signal, fps = read_signal(path, fps, columns)
    if len(signal) < num_frames:
        raise ValueError(
            f"{path}: {len(signal)} samples ({len(signal) / fps:.2f} s); expected at least the {num_frames} of one window."
        )
    file.description |= {"fps": repr(float(fps)), "duration": repr(len(signal) / fps)}
    windows = window_features(signal, int(num_frames), int(feature_stride))
    file.append(windows, len(windows))
    return file.finish()


def _describe(path, fps: float | None, feature_stride: int, num_frames: int) -> dict[str, str]:
    """What is known of features before the recording is opened. (safetensors holds texts; repr gives a float back exactly.)"""
    described = {"feature_stride": repr(feature_stride), "num_frames": repr(num_frames)}
    described |= {} if fps is None else {"fps": repr(float(fps))}
    return {**described, "recording": os.path.basename(os.fspath(path)), "recording_sum": _fingerprint_file(path)}


def _as_sample(features: np.ndarray, description: dict[str, str]) -> dict[str, Any]:
    numbers = {"fps": float, "feature_stride": int, "num_frames": int, "duration": float}
    return {"features": features, **{key: read(description[key]) for key, read in numbers.items()}}


class _Cache:
    """
    Rows of features on their way into a file; without a path, into memory.

    What is done is saved under `.NAME.part` each `save_every` seconds, or more seldom where saving takes long.
    """

    def __init__(self, path: str | os.PathLike | None, known: dict[str, str], save_every: float = 30.0):
        self._path = None if path is None else Path(path)
        self._save_every, self._saved = save_every, time.monotonic()
        self._rows = np.zeros((0, 0), dtype=np.float32)
        self.done = 0
        self.is_whole = False
        self.description = dict(known)
        if self._path is None:
            return
        if self._path.suffix != ".safetensors":
            raise ValueError(f"{path}: the cache must be a .safetensors file.")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._part = self._path.with_name(f".{self._path.name}.part")
        if self._path.exists():
            sample, found = read_features(self._path)
            if different := self._differences(found):
                raise ValueError(
                    f"{self._path}: was made in another way ({'; '.join(different)}). Give another name, or remove it."
                )
            self._rows, self.done, self.is_whole = sample["features"], len(sample["features"]), True
            self.description = found
        elif self._part.exists():
            try:
                sample, found = read_features(self._part)
            except ValueError:
                return  # cut off with the machine's power
            if not self._differences(found):
                self._rows, self.done = sample["features"], len(sample["features"])

    def _differences(self, found: dict[str, str]) -> list[str]:
        own = self.description
        # The same weights are the same encoder, whatever it is called; rate and duration are the recording's own, if not given.
        if found.get("recording_sum") != own["recording_sum"]:
            return [f"of {found.get('recording', 'another recording')}, not of this {own['recording']}"]
        same = {"recording"} | ({"fps", "duration"} - {*own})
        same |= {"encoder", "encoder_revision"} if "encoder_weights" in own else set()
        return [
            f"{key} is {found.get(key, 'missing')}, now {own.get(key, 'missing')}"
            for key in sorted({*found, *own} - same)
            if found.get(key) != own.get(key)
        ]

    def append(self, rows: np.ndarray, total: int):
        """The next of `total` rows."""
        if len(self._rows) < total:
            # In one array from the start: thousands of small ones would keep the heap from giving memory back.
            whole = np.zeros((total, rows.shape[1]), dtype=np.float32)
            if self.done:
                whole[: self.done] = self._rows[: self.done]
            self._rows = whole
        self._rows[self.done : self.done + len(rows)] = rows
        self.done += len(rows)
        began = time.monotonic()
        if self._path is not None and began - self._saved >= self._save_every:
            self._write(self._part)
            self._saved = time.monotonic()
            self._save_every = self._save_every and max(self._save_every, 20 * (self._saved - began))

    def finish(self) -> dict[str, Any]:
        if self._path is not None:
            self._write(self._path)
            self._part.unlink(missing_ok=True)
        return self.sample()

    def sample(self) -> dict[str, Any]:
        return _as_sample(self._rows[: self.done], self.description)

    def _write(self, path: Path):
        temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
        try:
            rows = np.ascontiguousarray(self._rows[: self.done])
            save_file({"features": rows}, temporary, metadata=self.description)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _fingerprint_file(path: str | os.PathLike) -> str:
    """Tells recordings apart by their size and both ends, without reading hours of video."""
    path = os.fspath(path)
    if "://" in path:
        return hashlib.sha256(path.encode()).hexdigest()[:16]
    end = 2**20
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(end)
        file.seek(max(size - end, 0))
        return hashlib.sha256(b"%d" % size + head + file.read(end)).hexdigest()[:16]


def _fingerprint_weights(model) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Processor settings of transformers, applied to whole batches of frames on any device, without torchvision


def _read_processor(name: str, revision: str | None) -> dict[str, Any]:
    """
    Raises:
        ValueError: the checkpoint has no settings, or some that are not known here.
    """
    for file in ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json"):
        path = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if path is None:
            continue
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        content = content.get("video_processor") or content.get("image_processor") or content
        if "size" in content or "image_mean" in content:
            break
    else:
        raise ValueError(
            f"{name}: has no settings of a video or image processor (preprocessor_config.json), which say how large frames are and "
            "how they are normalised. Save the processor of the model into its folder: processor.save_pretrained(folder)."
        )
    kind = content.get("image_processor_type") or content.get("feature_extractor_type") or ""
    processor = _find_processor(kind)
    # What a checkpoint leaves out, or has as null, is as the class of its processor has it.
    settings = {key: getattr(processor, key, None) for key in (*_SETTINGS, *_OWN_WAYS)}
    settings |= {key: value for key, value in content.items() if value is not None}
    content = {key: value for key, value in settings.items() if value is not None}
    if kind.startswith("ConvNext") and content.get("do_resize", True):
        content = _convnext_settings(content)
    own = [key for key in _OWN_WAYS if content.get(key)]
    own += ["another size than its settings say"] if kind.startswith("Levit") else []
    if own:
        raise ValueError(
            f"{name}: its processor {kind} prepares pictures in a way of its own ({own[0]}), which is not known here. Choose "
            "another encoder."
        )
    size = content.get("size", content.get("crop_size", 224))
    crop = content.get("crop_size", size)
    for key, value in (("size", size), ("crop_size", crop)):
        is_known = isinstance(value, int) or (isinstance(value, dict) and {*value} in _SIZES)
        if not is_known:
            raise ValueError(
                f"{name}: {key} is {value} in its processor's settings; expected height and width, or shortest_edge."
            )
    do_crop = content.get("do_center_crop", "crop_size" in content)
    # A size of one number, as older checkpoints have it, is that of both sides or of the shorter one.
    if isinstance(size, int) and (processor.default_to_square if processor else not do_crop):
        size = {"height": size, "width": size}
    resample = content.get("resample", 2)
    if content.get("do_resize", True) and resample not in _RESAMPLING:
        resample = 3  # Lanczos, which torch lacks; transformers' own processors take bicubic too
    return {
        "do_resize": content.get("do_resize", True),
        "size": size,
        "resample": _RESAMPLING[resample],
        "do_center_crop": do_crop,
        "crop_size": crop,
        "do_rescale": content.get("do_rescale", True),
        "rescale_factor": content.get("rescale_factor", 1 / 255),
        "offset": 1.0 if content.get("offset") else 0.0,
        "do_normalize": content.get("do_normalize", True),
        "image_mean": content.get("image_mean", [0.5] * 3),
        "image_std": content.get("image_std", [0.5] * 3),
    }


def _convnext_settings(content: dict[str, Any]) -> dict[str, Any]:
    """ConvNeXT cuts 12 % off small pictures, and none off large ones, which it squeezes."""
    size = content.get("size", 384)
    edge = size["shortest_edge"] if isinstance(size, dict) else size
    square = {"height": edge, "width": edge}
    shortest = {"shortest_edge": int(edge / content.get("crop_pct", 224 / 256))}
    own = {"size": square, "do_center_crop": False} if edge >= 384 else {"size": shortest, "do_center_crop": True}
    return {**content, **own, "crop_size": square, "crop_pct": None}


def _find_processor(kind: str):
    """transformers' class of an image processor; None: there is none of this name, or it cannot be loaded here."""
    name = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    for suffix in ("Pil", "", "Fast"):  # one of them can be loaded, if Pillow or torchvision is installed
        try:
            found = getattr(transformers, name + suffix)
            found.default_to_square  # noqa: B018 - of one that cannot be loaded, this raises
        except (AttributeError, ImportError):
            continue
        return found
    return None


def _resized(shape: Sequence[int], size: int | dict[str, int]) -> tuple[int, int]:
    """Height and width after resizing."""
    height, width = shape
    if isinstance(size, dict) and "height" in size:
        return size["height"], size["width"]
    shortest = size["shortest_edge"] if isinstance(size, dict) else size
    if height <= width:
        return shortest, int(shortest * width / height)
    return int(shortest * height / width), shortest


def _crop(frames: torch.Tensor, size: int | dict[str, int]) -> torch.Tensor:
    """The middle of frames (n, 3, height, width); black around frames that are smaller."""
    if isinstance(size, dict):
        height, width = size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))
    else:
        height = width = size
    missing = [max(0, want - have) for want, have in zip((height, width), frames.shape[-2:], strict=True)]
    if any(missing):
        padding = (missing[1] // 2, missing[1] - missing[1] // 2, missing[0] // 2, missing[0] - missing[0] // 2)
        frames = torch.nn.functional.pad(frames, padding)
    top, left = (frames.shape[-2] - height) // 2, (frames.shape[-1] - width) // 2
    return frames[..., top : top + height, left : left + width]
