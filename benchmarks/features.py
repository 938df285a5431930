"""Features of videos: time, and memory of the whole process, by length: python benchmarks/features.py --threads 2

An H.264 video is made on the spot (one minute is encoded and repeated without encoding again) and goes through a VideoMAE of
VideoMAE's usual input (16 frames of 224 x 224), but so small that decoding and resizing are most of the time: what an encoder of
yours takes comes on top. Or give yours: --encoder. Each length is a process of its own, whose peak is that of all it did,
imports included.
"""

import argparse
import json
import os
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import harness
import numpy as np
import torch
from harness import BenchmarkError, Column
from tqdm import tqdm
from transformers import VideoMAEConfig, VideoMAEModel
from transformers.utils import logging

from modeling_convtransformer.features import extract_features, load_encoder
from modeling_convtransformer.recordings import VideoFile

COLUMNS = [
    Column("minutes", "minutes", "g"),
    Column("MB", "megabytes", ".0f"),
    Column("features", "features", ","),
    Column("seconds", "seconds", ".1f"),
    Column("times real time", "speed", ".1f"),
    Column("peak memory MB", "peak_mb", ",.0f"),
]


def write_video(path: Path, minutes: float, width: int, height: int, fps: int = 25):
    """A picture that moves, with noise, so that it takes about the bits that real ones take."""
    import av

    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (height // 16 + 64, width // 16 + 64, 3)).repeat(16, 0).repeat(16, 1)
    noise = rng.integers(-6, 7, (height + 64, width + 64, 1))
    minute = path.with_suffix(".minute.mp4")
    with av.open(str(minute), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "veryfast", "g": "250", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in tqdm(range(60 * fps), desc="encoding a minute", leave=False, disable=None):
            top, left = 3 * number % 400, 5 * number % 700
            frame = (
                picture[top : top + height, left : left + width] + noise[number % 64 :, number % 48 :][:height, :width]
            )
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(frame.clip(0, 255).astype(np.uint8), format="rgb24"))
            )
        container.mux(stream.encode(None))
    with av.open(str(path), "w") as target:
        copy = None
        for repeat in range(max(1, round(minutes))):
            with av.open(str(minute)) as source:
                stream = source.streams.video[0]
                copy = copy or target.add_stream_from_template(stream)
                shift = round(repeat * 60 / stream.time_base)
                for packet in source.demux(stream):
                    if packet.dts is None or packet.pts * stream.time_base >= Fraction(60) * Fraction(min(minutes, 1)):
                        continue
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, copy
                    target.mux(packet)
    minute.unlink()


def save_small_encoder(folder: Path):
    torch.manual_seed(0)
    config = VideoMAEConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    VideoMAEModel(config).save_pretrained(folder)
    settings = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")


def extract(path: str, encoder: str, stride: int, device: str, threads: int) -> dict:
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    loaded = load_encoder(encoder, device=device)
    start = time.perf_counter()
    sample = extract_features(path, loaded, feature_stride=stride)
    seconds = time.perf_counter() - start
    return {
        "features": len(sample["features"]),
        "seconds": seconds,
        "speed": sample["duration"] / seconds,
        "peak_mb": harness.resident("VmHWM") / 2**10,
    }


def decode(path: str, decoder: str) -> float:
    """Frames per second of decoding and conversion to bytes of red, green and blue."""
    video = VideoFile(path, decoder)
    frames = min(750, len(video.frame_times))
    start = time.perf_counter()
    for first in range(0, frames, 16):
        video.frames_at((np.arange(first, min(first + 16, frames)) + 0.5) / video.fps)
    return frames / (time.perf_counter() - start)


def run(args: argparse.Namespace):
    if min(args.minutes) <= 0 or args.stride < 1:
        raise BenchmarkError("--minutes are above 0, --stride is at least 1.")
    if args.width < 32 or args.width % 32:
        raise BenchmarkError(f"--width is {args.width}; expected a multiple of 32, so that the height is even.")
    machine = harness.describe_machine(args.device)
    print(harness.machine_line(machine), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        encoder = args.encoder or str(folder / "encoder")
        if args.encoder is None:
            save_small_encoder(folder / "encoder")
        rows = []
        for minutes in args.minutes:
            path = folder / f"{minutes:g}.mp4"
            write_video(path, minutes, args.width, args.width * 9 // 16)
            row = {"minutes": minutes, "megabytes": os.path.getsize(path) / 2**20}
            measure = (extract, str(path), encoder, args.stride, args.device, torch.get_num_threads())
            try:
                rows.append(row | harness.in_child(*measure))
            except RuntimeError as error:
                raise BenchmarkError(f"{minutes:g} minutes: {error}") from None
        print(f"Features of {args.width} x {args.width * 9 // 16} at 25 fps, one each {args.stride} frames\n")
        harness.print_table(rows, COLUMNS)
        rates, missing = {}, {}
        for decoder in ("torchcodec", "pyav") * args.repeats:
            if decoder in missing:
                continue
            try:
                rate = decode(str(path), decoder)
            except (ImportError, OSError, RuntimeError) as error:
                missing[decoder] = f"{harness.NOT_AVAILABLE} ({harness.first_sentence(error)})"
            else:
                rates.setdefault(decoder, []).append(rate)
        medians = {decoder: float(np.median(own)) for decoder, own in rates.items()}
        said = {decoder: f"{rate:.0f} frames/s" for decoder, rate in medians.items()} | missing
        print("\nDecoded: " + ", ".join(f"{decoder} {words}" for decoder, words in said.items()))
    harness.write_json(args.json, machine, args, rows, decoded=medians)
    if max(row["peak_mb"] for row in rows) > 2048:
        raise BenchmarkError("more than 2 GB of memory were used.")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 10, 60], help="default: 1 10 60")
    parser.add_argument("--width", type=int, default=1280, help="of the video, 16:9 (default: 1280)")
    parser.add_argument("--stride", type=int, default=16, help="frames from one feature to the next (default: 16)")
    parser.add_argument("--encoder", help="a model of transformers (default: a small one, made on the spot)")
    parser.add_argument("--device", default="cpu")
    harness.add_arguments(parser, repeats=3)
    harness.run_command(run, parser, argv)


if __name__ == "__main__":
    main()
