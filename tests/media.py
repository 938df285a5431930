"""Recordings and encoders made on the spot for tests: real files, written by PyAV, and real classes with random weights."""

import json
import shutil
import struct
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

BITS = 8


def code(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """A picture that says its number in bars, one a bit (white is 1), the highest on the left; the lower quarter is grey."""
    bars = [(number >> bit) & 1 for bit in reversed(range(BITS))]
    picture = np.repeat(np.array(bars, dtype=np.uint8) * 255, width // BITS)
    picture = np.repeat(np.tile(picture, (height, 1))[..., None], 3, axis=2)
    picture[3 * height // 4 :] = 128
    return picture


def decode(frame: torch.Tensor, rotation: int = 0) -> int:
    """The number of a frame (3, height, width), which survives compression."""
    upright = torch.rot90(frame, -rotation // 90, dims=(1, 2)).float().mean(dim=0)
    bars = upright[: upright.shape[0] // 2].reshape(-1, BITS, upright.shape[1] // BITS).mean(dim=(0, 2))
    return int("".join("1" if bar > 128 else "0" for bar in bars), 2)


def write_video(
    path: Path,
    frames: int = 40,
    rate: Fraction | int = 25,
    codec: str = "libx264",
    times: list[float] | None = None,
    rotation: int = 0,
    sound: bool = False,
    size: tuple[int, int] = (64, 48),
    draw: Callable[[int], np.ndarray] | None = None,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Frames that say their numbers (or those that `draw` gives), at `rate`, or at `times` (seconds)."""
    av = pytest.importorskip("av", reason='video tests need PyAV: pip install "modeling-convtransformer[video]"')
    path.parent.mkdir(parents=True, exist_ok=True)
    base = Fraction(1, 90000) if times is not None else 1 / Fraction(rate)
    with av.open(str(path), "w", options=container_options or {}) as container:
        own = {"g": "12", **({"bf": "2"} if "264" in codec else {}), **(options or {})}
        stream = container.add_stream(codec, rate=Fraction(rate), options=own)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.time_base = base
        audio = container.add_stream("libopus" if path.suffix == ".webm" else "aac", rate=48000) if sound else None
        for number in range(frames):
            picture = code(number % 2**BITS, *size) if draw is None else draw(number)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number if times is None else round(times[number] / base)
            frame.time_base = base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio is not None:
            duration = frames / float(rate) if times is None else times[-1] + 1 / float(rate)
            _write_tone(av, container, audio, duration, 48000)
    if rotation:
        _rotate(path, rotation)
    return path


def write_sound(
    path: Path, seconds: float = 3.0, rate: int = 16000, hertz: float = 440.0, codec: str | None = None
) -> Path:
    """A tone, by default in PCM (.wav) or FLAC: what is read is what was written."""
    av = pytest.importorskip("av", reason='sound tests need PyAV: pip install "modeling-convtransformer[video]"')
    with av.open(str(path), "w") as container:
        codec = codec or {".wav": "pcm_s16le", ".flac": "flac"}[path.suffix]
        _write_tone(av, container, container.add_stream(codec, rate=rate, layout="mono"), seconds, rate, hertz)
    return path


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def _write_tone(av, container, stream, seconds: float, rate: int, hertz: float = 440.0):
    samples = np.round(32768 * tone(seconds, rate, hertz)).astype(np.int16)
    for start in range(0, len(samples), 960):
        frame = av.AudioFrame.from_ndarray(samples[None, start : start + 960], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _rotate(path: Path, degrees: int):
    """Writes the matrix that phones write when they are held upright into the track header of an MP4."""
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    one = 1 << 16
    # Counterclockwise by `degrees`, as FFmpeg counts; the file's matrix turns clockwise.
    matrix = (cosine * one, -sine * one, 0, sine * one, cosine * one, 0, 0, 0, 1 << 30)
    content[start : start + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(content)


def ffprobe(path: Path, *entries: str) -> dict:
    """What FFmpeg's own tool says of the video of a file."""
    if shutil.which("ffprobe") is None:
        pytest.skip("ffprobe is not installed (apt install ffmpeg): frame times are not compared with it")
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries", ":".join(entries), "-of", "json"]
    return json.loads(subprocess.run([*command, str(path)], capture_output=True, text=True, check=True).stdout)


def save_encoder(folder: Path, kind: str = "videomae") -> Path:
    """A small encoder of transformers with random weights, and its processor's settings, as a repository has them."""
    import transformers

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    picture = {"image_size": 32, "patch_size": 16}
    make = {
        "videomae": lambda: transformers.VideoMAEModel(
            transformers.VideoMAEConfig(**small, **picture, num_frames=4, tubelet_size=2)
        ),
        "timesformer": lambda: transformers.TimesformerModel(
            transformers.TimesformerConfig(**small, **picture, num_frames=4)
        ),
        "vivit": lambda: transformers.VivitModel(
            transformers.VivitConfig(**small, image_size=32, num_frames=4, tubelet_size=[2, 16, 16])
        ),
        "vjepa2": lambda: transformers.VJEPA2Model(
            transformers.VJEPA2Config(
                **{key: value for key, value in small.items() if key != "intermediate_size"},
                crop_size=32,
                patch_size=16,
                frames_per_clip=4,
                mlp_ratio=1,
                pred_hidden_size=12,
                pred_num_attention_heads=2,
                pred_num_hidden_layers=1,
            )
        ),
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**small, **picture, mlp_ratio=1)),
        "convnext": lambda: transformers.ConvNextModel(
            transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1])
        ),
        "wav2vec2": lambda: transformers.Wav2Vec2Model(
            transformers.Wav2Vec2Config(
                **small,
                conv_dim=(8, 8, 8),
                conv_stride=(5, 8, 8),
                conv_kernel=(10, 8, 8),
                num_feat_extract_layers=3,
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=2,
            )
        ),
        "ast": lambda: transformers.ASTModel(
            transformers.ASTConfig(**small, num_mel_bins=32, max_length=256, patch_size=16, time_stride=8)
        ),
        "whisper": lambda: transformers.WhisperModel(
            transformers.WhisperConfig(
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
                vocab_size=8,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
                suppress_tokens=[],
                begin_suppress_tokens=[],
            )
        ),
    }[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    model.save_pretrained(folder)
    if kind == "wav2vec2":
        transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    elif kind == "ast":
        transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=256).save_pretrained(folder)
    elif kind == "whisper":
        transformers.WhisperFeatureExtractor().save_pretrained(folder)
    else:
        settings = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "resample": 2}
        settings |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
