"""Recordings as they lie on disk: video, audio and sensor files, read at the ticks of a regular clock.

    video = VideoFile("match.mp4")                  # pip install "modeling-convtransformer[video]"
    video.frames_at([0.02, 0.06, 0.10])             # what a player shows at these seconds, (3, 3, height, width) uint8
    audio = AudioFile("match.mp4", 16000)
    audio.read(0, 16000)                            # the first second as mono samples, (16000,) float32
    signal, fps = read_signal("session.csv")        # (samples, channels) float32 and the samples per second

Times are seconds from the start of the file, as a player shows them. Frames are found by their timestamps, so that a variable
frame rate, dropped frames and a late first frame come out right; a rotation in the file's metadata is applied.
"""

import csv
import importlib
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from .feature_extraction_convtransformer import UNREADABLE

logger = logging.get_logger(__name__)

__all__ = [
    "AUDIO_SUFFIXES",
    "SIGNAL_SUFFIXES",
    "TABLE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "AudioFile",
    "VideoFile",
    "read_signal",
]

# What to look for in a folder. (FFmpeg tells by what is in a file; of sensors these are all that can be read.)
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".flv", ".wmv"),
    *(".3gp", ".ogv"),
)
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus", ".wma")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
SIGNAL_SUFFIXES = (*TABLE_SUFFIXES, ".npy", ".npz")

# Containers whose header says how long the recording is, so that a file that ends before can be told where its bytes do not.
_WITH_DURATION = {"mov", "mp4", "matroska", "webm", "avi", "wav", "flac", "flv"}
_SAME_TIME = 1e-6  # seconds; far below a frame, far above what float64 loses
_EBML = b"\x1a\x45\xdf\xa3"
_CLOCK_STEP = 0.5  # seconds; times of decoding rise, but for the jitter of damaged files


def check_file(path: str | os.PathLike):
    """
    Raises:
        ValueError: it is neither a file with something in it nor an address (https://...).
    """
    if "://" in os.fspath(path):
        return
    if not os.path.isfile(path):
        raise ValueError(f"{path}: {'a folder; expected a file' if os.path.isdir(path) else 'there is no such file'}.")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes).")


# ---------------------------------------------------------------------------------------------------------------------
# Video and audio


def _check_whole(path: str):
    """
    FFmpeg reads a file that was cut off up to there, without a word. AVI and WAV, Matroska and WebM, MP4 and MOV say how many
    bytes they have.

    Raises:
        ValueError: there are fewer.
    """
    if "://" in path:
        return
    with open(path, "rb") as file:
        size, head = os.path.getsize(path), file.read(4096)
        if head.startswith(b"RIFF"):
            promised = _size_of_riff(file)
        elif head.startswith(_EBML):
            promised = _size_of_matroska(head)
        else:
            promised = _size_of_mp4(file, size)
    if promised > size + 8:  # (some programs count the head of a RIFF chunk twice)
        raise ValueError(
            f"{path}: truncated: its header says {promised:,} bytes, but it has {size:,}. Copy it again, or keep what is there "
            "with ffmpeg -i INPUT -c copy OUTPUT.mkv."
        )


def _size_of_riff(file) -> int:
    """Of AVI and WAV: RIFF chunks, of which large AVI files have several. 0: it does not say."""
    end = start = 0
    while file.seek(start) == start and (head := file.read(8)).startswith(b"RIFF"):
        length = int.from_bytes(head[4:], "little")
        if length >= 0x7FFFF000:  # how programs that write into a pipe say that they do not know
            return 0
        end = start + 8 + length
        start = end + length % 2
    return end


def _size_of_matroska(head: bytes) -> int:
    """Matroska, WebM: a short header, then one segment with all the rest (RFC 8794). 0: it does not say."""

    def number(at: int) -> tuple[int, int]:
        """A number, whose first byte says how long it is, and where the next element begins."""
        length = 9 - head[at].bit_length()
        value = int.from_bytes(head[at : at + length], "big") & (1 << 7 * length) - 1
        return (0 if value == (1 << 7 * length) - 1 else value), at + length  # (all ones: unknown)

    length, start = number(len(_EBML))
    segment = start + length
    if head[segment : segment + 4] != b"\x18\x53\x80\x67" or len(head) < segment + 12:
        return 0
    length, start = number(segment + 4)
    return start + length if length else 0


def _size_of_mp4(file, size: int) -> int:
    """MP4, MOV: boxes one behind the other, to the end of the one that holds the last samples. 0: something else."""
    start = end = 0
    while start < size:
        file.seek(start)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        length = int.from_bytes(head[8:], "big") if length == 1 else length
        if length < 8 or not kind.isalnum():  # (0: to the end of the file)
            break
        start += length
        end = start if kind in (b"mdat", b"moof", b"moov") else end
    return end


class _MediaFile:
    """A file that FFmpeg reads: which stream to take, and when each of its packets is shown."""

    _kind: str

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        # (FFmpeg would take the name cut:final.mp4 for a protocol.)
        self._address = self.path if "://" in self.path else os.path.abspath(self.path)
        self._av = _import("av", "video")
        with self._open() as container:
            _check_whole(self.path)
            stream = self._choose_stream(container)
            self.stream_index, self.codec = stream.index, stream.codec_context.name
            # What a player counts from: the first time of the earliest stream.
            self.start_time = (container.start_time or 0) / self._av.time_base
            self._declared_rate = float(getattr(stream, "average_rate", None) or 0)
            # AVI has no times of showing: its frames come in order, one each period.
            self._is_in_order = container.format.name == "avi"
            self._times, self._key_times, self.duration = self._scan(container)

    def _open(self):
        check_file(self.path)
        try:
            return self._av.open(self._address)
        except (self._av.error.FFmpegError, OSError) as error:
            raise ValueError(
                f"{self.path}: not readable as a recording ({error.strerror or error}). Either it is no video or audio file, or "
                "it is truncated (an MP4 that was cut off lacks the index at its end): copy or record it again."
            ) from error

    def _choose_stream(self, container):
        pictures = self._av.stream.Disposition.attached_pic  # the cover of a music file is a video of one frame
        streams = [one for one in container.streams if one.type == self._kind and not one.disposition & pictures]
        if not streams:
            found = ", ".join(sorted({one.type for one in container.streams})) or "none"
            advice = " (For its sound, give an audio encoder.)" if "audio" in found else ""
            raise ValueError(f"{self.path}: no {self._kind} stream; the streams it has: {found}.{advice}")
        if streams[0].codec_context is None:
            raise ValueError(
                f"{self.path}: its {self._kind} is in a codec that this build of FFmpeg does not know. Convert it with a program "
                "that does, to H.264 for example."
            )
        return streams[0]

    def _scan(self, container) -> tuple[np.ndarray, np.ndarray, float]:
        """
        Reads all packets and decodes none: the seconds at which each packet of the stream is shown (sorted), those of its
        key frames, and seconds from the file's start to the stream's end.
        """
        shown, keys, ends, is_timed, decoded = [], [], [], True, -math.inf
        try:
            for packet in container.demux():
                if packet.size == 0:  # how PyAV ends a stream
                    continue
                if packet.pts is None:
                    is_timed &= packet.stream_index != self.stream_index
                    continue
                time, length = (value * float(packet.time_base) for value in (packet.pts, packet.duration or 0))
                ends.append(time + length)
                if packet.stream_index == self.stream_index and packet.dts is not None:
                    before, decoded = decoded, packet.dts * float(packet.time_base)
                    if decoded < before - _CLOCK_STEP:
                        raise ValueError(
                            f"{self.path}: its clock jumps back from {before:.2f} s to {decoded:.2f} s, as where recordings were put "
                            "one behind the other. Let FFmpeg write one clock: ffmpeg -i INPUT -c copy OUTPUT.mp4."
                        )
                # Edit lists hide packets that are there only to decode others.
                if packet.stream_index == self.stream_index and not packet.is_discard:
                    shown.append((time, length))
                    keys += [time] if packet.is_keyframe else []
        except (self._av.error.FFmpegError, IndexError) as error:  # (a stream that turns up late)
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{self.path}: damaged or truncated ({reason}) after {len(shown)} packets.") from error
        if not is_timed:  # only decoding tells
            shown, keys = [(frame.time, 0.0) for frame in self._decode() if frame.time is not None], []
            ends += [time for time, _ in shown]
        if not shown:
            advice = "." if is_timed else " with a time. Put it into a container: ffmpeg -i INPUT -c copy OUTPUT.mp4."
            raise ValueError(f"{self.path}: its {self._kind} stream ({self.codec}) has no frames{advice}")
        shown.sort()
        times = np.array([time for time, _ in shown])
        last_length = shown[-1][1] or (float(np.median(np.diff(times))) if len(times) > 1 else 0.0)
        # (Matroska says when it ends, others how long it is.)
        declared, end = (container.duration or 0) / self._av.time_base, max(ends) - min(self.start_time, 0.0)
        if declared - end > max(1.0, 0.02 * declared) and _WITH_DURATION & {*container.format.name.split(",")}:
            raise ValueError(
                f"{self.path}: truncated: its header says {declared:.1f} s, but it ends after {end:.1f} s. Copy it again, or keep "
                "what is there with ffmpeg -i INPUT -c copy OUTPUT.mkv."
            )
        return times, np.sort(keys), float(times[-1]) + last_length - self.start_time

    def _decode(self, start: float | None = None) -> Iterator:
        """The stream's frames from the start, or from a key frame at `start` (seconds in the file) or before."""
        with self._open() as container:
            stream = container.streams[self.stream_index]
            stream.thread_type = "AUTO"
            if start is not None:
                container.seek(int(start / stream.time_base), stream=stream, backward=True)
            for packet in container.demux(stream):
                try:
                    yield from packet.decode()
                except self._av.error.FFmpegError:
                    logger.warning_once(f"{self.path}: damaged data is left out; a player shows the frame before it.")


class VideoFile(_MediaFile):
    """
    The video of a file, by its timestamps.

    Args:
        path: of a file that FFmpeg reads, or its address (https://...).
        decoder: `"torchcodec"`, `"pyav"`, or `"auto"`: torchcodec where it can be loaded (faster; it needs FFmpeg's libraries on
            the machine) and finds the frames of this file, else PyAV, which brings FFmpeg along.

    Attributes:
        frame_times: (frames,) seconds, rising, as they stand in the file (ffprobe's `pts_time`).
        start_time: seconds in the file at which a player begins to count.
        duration: seconds from there to the end of the video.
        fps: frames per second; the mean where they vary.
        width, height, rotation: of a frame, after it was turned by `rotation` degrees counterclockwise.

    Raises:
        ValueError: no such file, no recording, no video in it, no frames, an unknown codec, or a file that ends before its
            header says; the message names the file.
        ImportError: PyAV is not installed.
    """

    _kind = "video"

    def __init__(self, path: str | os.PathLike, decoder: str = "auto"):
        super().__init__(path)
        if decoder not in ("auto", "torchcodec", "pyav"):
            raise ValueError(f"decoder is {decoder!r}; expected 'auto', 'torchcodec' or 'pyav'.")
        self.frame_times = self._times
        measured = len(self._times) / (self.duration - (self._times[0] - self.start_time) or 1.0)
        # The rate in the header is exact where timestamps are rounded (30000/1001 in milliseconds).
        is_near = abs(self._declared_rate - measured) < 0.005 * measured
        self.fps = self._declared_rate if is_near else measured
        self._frames = _PyAVFrames(self)
        first = self._frames.first
        self.rotation = round(first.rotation / 90) * 90 % 360
        self.width, self.height = first.width, first.height
        if self.rotation % 180:
            self.width, self.height = first.height, first.width
        self._is_auto = decoder == "auto"
        if decoder != "pyav" and not self._is_in_order:
            try:
                self._frames = _TorchCodecFrames(self)
            except (ImportError, OSError, RuntimeError):
                if decoder == "torchcodec":
                    raise

    def frames_at(self, seconds: Sequence[float] | np.ndarray) -> torch.Tensor:
        """
        What a player shows at these times, (n, 3, height, width) uint8; before the first frame that one, after the last that.

        Args:
            seconds: (n,) rising, from the start of the file.
        """
        seconds = np.asarray(seconds, dtype=np.float64)
        numbers = np.searchsorted(self._times, seconds + self.start_time + _SAME_TIME, side="right") - 1
        numbers, repeats = np.unique(np.maximum(numbers, 0), return_inverse=True)
        try:
            frames = self._frames.read(numbers)
        except (RuntimeError, IndexError) as error:
            if not self._is_auto or isinstance(self._frames, _PyAVFrames):
                raise
            logger.warning(f"{self.path}: torchcodec gives up or finds other frames ({error}); going on with PyAV.")
            self._frames = _PyAVFrames(self)
            frames = self._frames.read(numbers)
        return frames[torch.from_numpy(repeats)]


class _PyAVFrames:
    """Frames by their numbers, rising; decoding goes on where it was, unless a key frame lies on the way."""

    def __init__(self, video: VideoFile):
        self._video = video
        self._keys = np.zeros(0) if video._is_in_order else video._key_times
        self._seek(None)
        if self._coming is None:
            raise ValueError(
                f"{video.path}: none of the {len(video._times)} frames of its video ({video.codec}) can be decoded; the file is "
                "damaged."
            )
        self.first = self._coming[1]
        self._graph_of = None

    def read(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.stack([self._to_tensor(self._frame_at(time)) for time in self._video._times[numbers]])

    def _frame_at(self, time: float):
        """The last frame that is not after `time`: the one of this time, but where its data is damaged."""
        place = np.searchsorted(self._keys, time + _SAME_TIME) - 1
        key = self._keys[max(place, 0)] if len(self._keys) else -math.inf
        is_behind = self._shown is not None and time < self._shown[0] - _SAME_TIME
        if is_behind or (self._coming is not None and key > self._coming[0] + _SAME_TIME):
            # Some containers seek by the times of decoding and land too late: then from earlier, in the end from the start.
            for start in (key, key - 10.0, None):
                self._seek(start if start is not None and start > self._video._times[0] else None)
                if self._coming is not None and self._coming[0] <= time + _SAME_TIME:
                    break
        while self._coming is not None and self._coming[0] <= time + _SAME_TIME:
            self._shown, self._coming = self._coming, next(self._decoded, None)
        return (self._shown or self._coming)[1]

    def _seek(self, start: float | None):
        frames = self._video._decode(start)
        if self._video._is_in_order:
            self._decoded = zip(self._video._times, frames, strict=False)
        else:
            self._decoded = ((frame.time, frame) for frame in frames if frame.time is not None)
        try:
            self._shown, self._coming = None, next(self._decoded, None)
        except self._video._av.error.FFmpegError:  # cannot seek
            self._seek(None)

    def _to_tensor(self, frame) -> torch.Tensor:
        kind = (frame.width, frame.height, frame.format.name)
        if self._graph_of != kind:  # a stream may change on the way
            self._graph_of, self._graph = kind, self._make_graph(frame)
        self._graph.push(frame)
        turned = np.rot90(self._graph.pull().to_ndarray(), self._video.rotation // 90)
        return torch.from_numpy(np.ascontiguousarray(turned.transpose(2, 0, 1)))

    def _make_graph(self, frame):
        """To red, green and blue of the first frame's size. (`to_ndarray` alone is far off for 10 bits and interlaced video.)"""
        graph = self._video._av.filter.Graph()
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
        )
        scale = graph.add("scale", f"{self.first.width}:{self.first.height}:flags=bicubic")
        rgb, sink = graph.add("format", "pix_fmts=rgb24"), graph.add("buffersink")
        source.link_to(scale)
        scale.link_to(rgb)
        rgb.link_to(sink)
        graph.configure()
        return graph


class _TorchCodecFrames:
    """As `_PyAVFrames`. Checks the time of each frame: in MPEG transport streams torchcodec 0.13 finds others than asked for."""

    def __init__(self, video: VideoFile):
        from torchcodec.decoders import VideoDecoder

        self._decoder = VideoDecoder(video._address, stream_index=video.stream_index, num_ffmpeg_threads=0)
        self._times = video._times

    def read(self, numbers: np.ndarray) -> torch.Tensor:
        frames = self._decoder.get_frames_at(numbers.tolist())
        times, found = self._times[numbers], frames.pts_seconds.numpy()
        if (np.abs(found - times) > _SAME_TIME).any():
            wrong = int(np.abs(found - times).argmax())
            raise RuntimeError(f"the frame of {found[wrong]:.3f} s for that of {times[wrong]:.3f} s")
        return frames.data


class AudioFile(_MediaFile):
    """
    The sound of a file as mono samples at a rate of one's own.

    Args:
        path: of a file that FFmpeg reads (a video's sound too), or its address.
        fps: samples per second to convert to.

    Attributes:
        duration: seconds from the start of the file to the end of the sound. codec.

    Raises:
        ValueError, ImportError: as `VideoFile`.
    """

    _kind = "audio"

    def __init__(self, path: str | os.PathLike, fps: int):
        super().__init__(path)
        self.fps = fps
        self._restart()

    def read(self, start: int, stop: int) -> torch.Tensor:
        """
        Samples `start` to `stop`, counted at `fps` from the start of the file: (stop - start,) float32, silence where there is
        no sound. Decodes forward; going back starts over, because a codec needs what came before.
        """
        if start < self._position:
            self._restart()
        pieces, begin, end = [self._buffer], self._position, self._position + len(self._buffer)
        while end < stop:
            samples = next(self._samples, None)
            if samples is None:
                samples = np.zeros(stop - end, dtype=np.float32)
            if end <= start:  # nothing of what came before is wanted
                pieces, begin = [], end
            pieces.append(samples)
            end += len(samples)
        self._position, self._buffer = start, np.concatenate(pieces)[start - begin :]
        return torch.from_numpy(self._buffer[: stop - start].copy())

    def _restart(self):
        self._samples, self._position, self._buffer = self._resampled(), 0, np.zeros(0, dtype=np.float32)

    def _resampled(self) -> Iterator[np.ndarray]:
        resampler = self._av.AudioResampler(format="flt", layout="mono", rate=self.fps)
        count = 0
        for frame in itertools.chain(self._decode(), [None]):  # None: what the resampler holds back
            if frame is not None:
                # Sound that starts late or has a hole: silence up to its time. (Some codecs give not each frame a time.)
                time = self.start_time + count / self.fps if frame.time is None else frame.time
                missing = round((time - self.start_time) * self.fps) - count
                frame.pts = None  # the resampler would look at it too
                if missing > 0.1 * self.fps or (count == 0 and missing > 0):
                    count += missing
                    yield np.zeros(missing, dtype=np.float32)
            for one in resampler.resample(frame):
                samples = one.to_ndarray()[0]
                count += len(samples)
                yield samples


# ---------------------------------------------------------------------------------------------------------------------
# Sensors

# A column holds times if its name has one of these words, and beside it only those, or a unit (in seconds).
_TIME_WORDS = {"time", "timestamp", "timestamps", "datetime", "elapsed", "epoch", "epoc", "t", "seconds", "sec"}
_BESIDE_TIME = {"unix", "utc", "system", "date", "local", "sensor", "since", "start", "of", "sample"}
_UNITS = {
    "s": 1.0,
    "sec": 1.0,
    "seconds": 1.0,
    "ms": 1e-3,
    "millis": 1e-3,
    "milliseconds": 1e-3,
    "us": 1e-6,
    "ns": 1e-9,
}
# Numbers since 1970: from 1973 on, which unit they count is clear from their size.
_EPOCHS = ((1e17, 1e-9), (1e14, 1e-6), (1e11, 1e-3), (1e8, 1.0))


def read_signal(
    path: str | os.PathLike, fps: float | None = None, columns: Sequence[str] | None = None
) -> tuple[np.ndarray, float]:
    """
    Raw values of sensors from a CSV (any of , ; and tab, with or without a header), Parquet, .npy or .npz file.

    A column of times (`time`, `timestamp`, `time_ms`, ISO dates, ...) puts the samples on a regular clock by linear
    interpolation; without one they are taken to be regular.

    Args:
        path: the file. In an .npz the values are its one array of two axes, or `signal`; `fps` or `sampling_rate` may stand
            beside.
        fps: samples per second to have. Default: the file's own, from its times.
        columns: names of the channels to take, in this order. Default: all columns but that of times.

    Returns:
        signal: (samples, channels) float32.
        fps: samples per second.

    Raises:
        ValueError: text or gaps in the columns, times that do not rise or pause, no rate, unknown columns; the message names the
            file and the line.
        ImportError: pyarrow is not installed (CSV and Parquet).
    """
    check_file(path)
    path = Path(path)
    if path.suffix.lower() not in SIGNAL_SUFFIXES:
        raise ValueError(f"{path}: not a sensor file; expected one of {', '.join(SIGNAL_SUFFIXES)}.")
    check_rate(fps)
    if path.suffix.lower() in (".npy", ".npz"):
        signal, own = _read_numpy(path, columns)
        if own is not None and fps is not None and abs(own - fps) > 1e-6 * fps:
            return _on_clock(np.arange(len(signal)) / own, signal, fps), fps
        fps = fps or own
    else:
        table, first_line = _read_table(path)
        times, signal = _split_times(table, columns, fps, path, first_line)
        if times is not None:
            rate = _rate(times, path, first_line)
            return _on_clock(times, signal, fps or rate), fps or rate
    if fps is None:
        raise ValueError(
            f"{path}: its sampling rate is missing: there is no column of times, such as `time` in seconds, `time_ms` or "
            "`timestamp`. Give it as fps=."
        )
    return signal, fps


def check_rate(fps: float | None):
    """
    Raises:
        ValueError: it is not None, nor a positive number.
    """
    is_number = isinstance(fps, int | float | np.number) and not isinstance(fps, bool)
    if fps is not None and not (is_number and math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps is {fps!r}; expected a positive number: frames, or samples, per second.")


def _read_numpy(path: Path, columns: Sequence[str] | None) -> tuple[np.ndarray, float | None]:
    if columns is not None:
        raise ValueError(f"{path}: columns are {list(columns)}, but an array has no names of columns; leave them out.")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            arrays = {"signal": loaded}
        else:
            with loaded:
                arrays = {key: loaded[key] for key in loaded.files}
    except UNREADABLE as error:
        reason = (
            "Python objects, which are refused because loading them runs code" if "pickle" in str(error) else error
        )
        raise ValueError(f"{path}: not readable as an array of numbers ({reason}).") from error
    rates = [arrays[key].reshape(-1)[0] for key in ("fps", "sampling_rate") if key in arrays and arrays[key].size == 1]
    try:
        for rate in rates:
            check_rate(rate)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    values = {key: array for key, array in arrays.items() if array.ndim == 2}
    if "signal" not in values and len(values) != 1:
        shapes = ", ".join(f"{key} {array.shape}" for key, array in arrays.items()) or "nothing"
        raise ValueError(f"{path}: holds {shapes}; expected one array (samples, channels), or one named `signal`.")
    signal = values.get("signal", next(iter(values.values())))
    if not np.issubdtype(signal.dtype, np.number) or np.iscomplexobj(signal):
        raise ValueError(f"{path}: values of type {signal.dtype}; expected real numbers.")
    if signal.size == 0:
        raise ValueError(f"{path}: an array of shape {signal.shape} has no samples.")
    _check_finite(signal, [f"channel {channel}" for channel in range(signal.shape[1])], path, 0)
    return signal.astype(np.float32), float(rates[0]) if rates else None


def _read_table(path: Path):
    """The table of a file, and the line of its first row (0 for files without lines)."""
    arrow = _import("pyarrow", "sensors")
    try:
        if path.suffix.lower() == ".parquet":
            from pyarrow import parquet

            table, first_line = parquet.read_table(path), 0
        else:
            table, first_line = _read_csv(path)
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: not UTF-8 ({error}). Save it as UTF-8 (in Excel: "CSV UTF-8").') from error
    except arrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not readable as a table ({str(error).splitlines()[0]}).") from error
    if table.num_rows == 0:
        raise ValueError(f"{path}: has no samples ({table.num_columns} columns and no rows).")
    return table, first_line


def _read_csv(path: Path):
    from pyarrow import csv as arrow_csv

    with open(path, encoding="utf-8-sig", newline="") as file:
        head = list(itertools.islice(file, 100))
    # Lines before the table: remarks, and Excel's word on what separates cells.
    skipped = next((number for number, line in enumerate(head) if not line.startswith(("#", "sep="))), len(head))
    head = head[skipped:]
    if not head:
        raise ValueError(f"{path}: the file has no rows ({path.stat().st_size} bytes).")
    delimiter = max(",;\t", key=head[0].count)
    marks = "".join(head[1:])
    decimal_point = "," if delimiter != "," and marks.count(",") > marks.count(".") else "."
    cells = [cell.replace(decimal_point, ".") for cell in next(csv.reader(head[:1], delimiter=delimiter))]
    # 0, 1, 2, ... are the names that pandas gives to columns without one.
    has_header = not all(map(_is_value, cells)) or cells == [str(number) for number in range(len(cells))]
    table = arrow_csv.read_csv(
        path,
        # Types are told from the first block: all of the file is one, up to the largest that there may be.
        read_options=arrow_csv.ReadOptions(
            block_size=min(max(path.stat().st_size, 1), 2**31 - 1),
            skip_rows=skipped,
            autogenerate_column_names=not has_header,
        ),
        parse_options=arrow_csv.ParseOptions(delimiter=delimiter),
        convert_options=arrow_csv.ConvertOptions(decimal_point=decimal_point),
    )
    return table, skipped + (2 if has_header else 1)


def _is_value(cell: str) -> bool:
    """A number or a date, not a name."""
    try:
        datetime.fromisoformat(cell.strip())
    except ValueError:
        return _is_float(cell)
    return True


def _split_times(table, columns: Sequence[str] | None, fps: float | None, path: Path, first_line: int):
    """The column of times as seconds from the first (samples,), or None, and the values (samples, channels)."""
    import pyarrow as arrow

    names = [name.strip() for name in table.column_names]
    in_column = dict(zip(names, table.columns, strict=True))
    if len(in_column) < len(names):
        raise ValueError(f"{path}: names of columns are there twice ({', '.join(names)}); rename them.")
    timed = [name for name in names if _is_time(name) or arrow.types.is_timestamp(in_column[name].type)]
    times = _to_seconds(in_column[timed[0]], timed[0], fps, path, first_line) if timed else None
    if columns is None:
        # (pandas writes an index under these names)
        chosen = [
            name for name in names if name not in (*timed, "", "Unnamed: 0") and not name.startswith("__index_level_")
        ]
        if len(timed) > 1:
            logger.warning(f"{path}: of the columns of times, {', '.join(timed)}, the first is taken.")
    elif unknown := [name for name in columns if name not in names]:
        raise ValueError(f"{path}: has no columns {', '.join(unknown)}; those it has: {', '.join(names)}.")
    else:
        chosen = list(columns)
    if not chosen:
        raise ValueError(f"{path}: no column of sensor values; those it has: {', '.join(names)}.")
    channels = [_to_numbers(in_column[name], name, chosen, path, first_line) for name in chosen]
    signal = np.stack(channels, axis=1)
    _check_finite(signal, [f"column {name!r}" for name in chosen], path, first_line)
    return times, signal.astype(np.float32)


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def _is_time(name: str) -> bool:
    words = {*_words(name)}
    return bool(words & _TIME_WORDS) and words <= _TIME_WORDS | _BESIDE_TIME | {*_UNITS}


def _to_seconds(column, name: str, fps: float | None, path: Path, first_line: int) -> np.ndarray | None:
    """Seconds from the first time; None where they are not understood, but `fps` is given."""
    import pyarrow as arrow

    if arrow.types.is_timestamp(column.type):
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise ValueError(f"{path}: a gap in column {name!r}, {_place(row, first_line)}; expected a time.")
        times = column.cast(arrow.timestamp("ns")).to_numpy().astype(np.int64)
        return (times - times[0]) / 1e9
    if not (arrow.types.is_integer(column.type) or arrow.types.is_floating(column.type)):
        values = column.to_pylist()
        row = next((row for row, value in enumerate(values) if not _is_float(value)), 0)
        found = f"the times in column {name!r} are not understood ({values[row]!r} in {_place(row, first_line)})"
        if fps is not None:
            logger.warning(f"{path}: {found}; taken to be {fps} samples a second without pauses.")
            return None
        raise ValueError(
            f"{path}: {found}; expected seconds, ISO dates or numbers since 1970. Convert them, or give fps= if the samples are "
            "regular."
        )
    times = _to_numbers(column, name, [name], path, first_line)
    _check_finite(times[:, None], [f"column {name!r}"], path, first_line)
    # The difference in whole numbers: nanoseconds since 1970 have too many digits for a float.
    first, times = times[0], times - times[0]
    unit = next((_UNITS[word] for word in reversed(_words(name)) if word in _UNITS), None)
    if unit is None:
        unit = next((unit for least, unit in _EPOCHS if first >= least), None)
    if unit is None:
        step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        if step >= 0.5:  # sensors give more than two samples a second: milliseconds, or mere numbers of samples
            raise ValueError(
                f"{path}: the unit of column {name!r} is unclear (it rises by {step:g} from sample to sample). Name the column "
                "time_s, time_ms, time_us or time_ns; if it only counts the samples, rename it and give fps=."
            )
        unit = 1.0
    return times * unit


def _to_numbers(column, name: str, chosen: list[str], path: Path, first_line: int) -> np.ndarray:
    import pyarrow as arrow

    kind = column.type
    if arrow.types.is_boolean(kind):
        column = column.cast(arrow.int8())
    elif arrow.types.is_null(kind):
        raise ValueError(f"{path}: column {name!r} is empty; give the names of the channels: columns=[...].")
    elif not (arrow.types.is_integer(kind) or arrow.types.is_floating(kind) or arrow.types.is_decimal(kind)):
        values = column.to_pylist()
        row = next((row for row, value in enumerate(values) if not _is_float(value)), 0)
        rest = [other for other in chosen if other != name]
        raise ValueError(
            f"{path}: column {name!r} holds {values[row]!r} ({_place(row, first_line)}); expected numbers. Correct it, or give the "
            f"names of the channels, such as columns={rest[:3] or ['x', 'y', 'z']}."
        )
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise ValueError(
            f"{path}: column {name!r} has {column.null_count} gaps, the first in {_place(row, first_line)}; expected a number in "
            "each. Fill them, or cut the recording there."
        )
    return column.to_numpy() if arrow.types.is_integer(kind) else column.cast(arrow.float64()).to_numpy()


def _check_finite(values: np.ndarray, names: list[str], path: Path, first_line: int):
    finite = np.isfinite(values)
    if not finite.all():
        row, channel = np.argwhere(~finite)[0].tolist()
        raise ValueError(
            f"{path}: {names[channel]} holds {values[row, channel]} in {_place(row, first_line)}; expected finite numbers. Fill "
            "these gaps, or cut the recording there."
        )


def _rate(times: np.ndarray, path: Path, first_line: int) -> float:
    """Samples per second of rising times without pauses."""
    steps = np.diff(times)
    if len(steps) == 0:
        raise ValueError(f"{path}: has one sample; its sampling rate cannot be told. Give it as fps=.")
    if (steps <= 0).any():
        row = int(np.argmax(steps <= 0)) + 1
        raise ValueError(
            f"{path}: time does not rise in {_place(row, first_line)} ({times[row - 1]} s, then {times[row]} s); sort the rows and "
            "remove those that are there twice."
        )
    usual = float(np.median(steps))
    if steps.max() > max(10 * usual, 0.25):
        row = int(steps.argmax()) + 1
        raise ValueError(
            f"{path}: a gap of {steps[row - 1]:.2f} s before {_place(row, first_line)}, where samples are {usual:.4g} s apart. Cut "
            "the recording there, or fill it."
        )
    rate = len(steps) / float(times[-1] - times[0])
    return float(round(rate)) if abs(rate - round(rate)) < 0.005 * rate else rate


def _on_clock(times: np.ndarray, signal: np.ndarray, fps: float) -> np.ndarray:
    """Values at 0, 1 / fps, 2 / fps, ... by linear interpolation; the samples themselves where they are there already."""
    count = math.floor((times[-1] - times[0]) * fps + 0.5) + 1
    clock = np.arange(count) / fps
    if count == len(times) and np.abs(times - times[0] - clock).max() < 0.02 / fps:
        return signal
    return np.stack([np.interp(clock, times - times[0], channel) for channel in signal.T], axis=1).astype(np.float32)


def _place(row: int, first_line: int) -> str:
    return f"line {row + first_line}" if first_line else f"row {row}"


def _is_float(value) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _import(module: str, extra: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'Reading this kind of file needs {module}: pip install "modeling-convtransformer[{extra}]".'
        ) from error
