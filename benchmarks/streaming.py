"""Latency of a push into a stream, and the memory that it holds: python benchmarks/streaming.py --threads 1

A causal detector (--variant, "balanced" by default) has had so many steps; then 1, 8 and 32 steps more are pushed again and
again, into the streams of all settings in turn. One step makes a point on every second, fourth, ... level only, so that
pushes differ: the median is over four periods of the coarsest level, the 95th percentile is nearly the most that a push takes.
Beside it what there is without a stream, in turn too: one forward over everything so far, or, where attention has windows,
over as much as the new points look back to. The error is the largest difference of the logits between both, of the newest
point of the finest level. Weights are random, but such that every part shows in the outputs; there is no post-processing.
"""

import argparse
import functools
import math
import statistics
import time

import cases
import harness
import torch
from harness import BenchmarkError, Column
from tqdm import tqdm

from modeling_convtransformer import ConvTransformerForTemporalActionLocalization
from modeling_convtransformer.streaming import IncrementalDetector

SIZES = (1, 8, 32)
COLUMNS = [
    Column("window", "window"),
    Column("key heads", "kv_heads"),
    Column("after steps", "position", ","),
    *(
        column
        for size in SIZES
        for column in (Column(f"{size}: median ms", f"{size}_ms", ".1f"), Column(f"{size}: p95", f"{size}_p95", ".1f"))
    ),
    Column("rerun: steps", "rerun_steps", ","),
    Column("rerun: median ms", "rerun_ms", ".0f"),
    Column("rerun / push of 1", "ratio", ".0f"),
    Column("keys, values MB", "keys_values_mb", ".2f"),
    Column("tails MB", "tails_mb", ".2f"),
    Column("max error", "error", ".1e"),
]


def time_pushes(streams: dict[str, IncrementalDetector], size: int, count: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of `count` pushes of `size` steps into each stream, in turn; features are on the device before."""
    times = {name: [] for name in streams}
    for _ in range(count):
        for name, stream in streams.items():
            features = torch.randn(size, sum(stream.model.config.stream_widths), device=device)
            harness.synchronise(device)
            start = time.perf_counter()
            stream.push(features)
            harness.synchronise(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def rerun(model, features: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(features[None]).logits


def measure(streams: dict[str, IncrementalDetector], position: int, args: argparse.Namespace) -> dict[str, dict]:
    """For each stream what its row says after `position` steps."""
    rows, parts = {}, {}
    coarsest = max(stream.model.config.detector_strides[-1] for stream in streams.values())
    for name, stream in streams.items():
        config = stream.model.config
        generator = torch.Generator().manual_seed(position)
        features = torch.randn(position, sum(config.stream_widths), generator=generator).to(args.device)
        stream.reset()
        for piece in tqdm(features.split(32), desc=f"{name}, {position} steps", leave=False, disable=None):
            last = stream.push(piece)
        held = {f"{key}_mb": size / 2**20 for key, size in stream.cache_bytes.items()}
        rows[name] = {"position": position, **held, "last": last.logits[0, last.point_levels[0] == 0][-1]}
        # Points of the part are points of the whole if it begins at a multiple of the coarsest stride.
        reach = config.receptive_field[0]
        first = 0 if math.isinf(reach) else max(0, position - math.ceil(reach) - 1) // coarsest * coarsest
        parts[name] = features[first:]

    for size in SIZES:
        # Over 4 periods, and 16 pushes at least; the first ones, which warm up, do not count.
        count = max(16, 4 * coarsest // size)
        for name, times in time_pushes(streams, size, count + 4, args.device).items():
            rows[name][f"{size}_ms"] = statistics.median(times[4:])
            rows[name][f"{size}_p95"] = statistics.quantiles(times[4:], n=20, method="inclusive")[-1]

    outputs = {}

    def run_again(name):
        outputs[name] = rerun(streams[name].model, parts[name])

    functions = {name: functools.partial(run_again, name) for name in streams}
    for name, timing in harness.time_alternating(functions, args.repeats, 0, args.device).items():
        row = rows[name]
        row.update(rerun_steps=len(parts[name]), rerun_ms=timing.median_ms, ratio=timing.median_ms / row["1_ms"])
        row["error"] = (outputs[name][0, len(parts[name]) - 1] - row.pop("last")).abs().max().item()
    return rows


def run(args: argparse.Namespace):
    if min(args.positions) < 1:
        raise BenchmarkError(f"--positions has {min(args.positions)}; expected 1 step or more.")
    machine = harness.describe_machine(args.device)
    print(harness.machine_line(machine), flush=True)
    streams, about = {}, {}
    for window, heads in [(0, heads) for heads in (None, *args.kv_heads)] + [
        (window, None) for window in args.windows
    ]:
        fields = {"is_causal": True, "n_kv_head": heads, "mha_win_size": window or -1, "n_in": args.n_in}
        config = cases.find_config(args.variant, fields)
        torch.manual_seed(0)
        model = ConvTransformerForTemporalActionLocalization(config)
        cases.stir(model)
        name = f"window {window}" if window else f"global, {heads or config.n_head} key heads"
        about[name] = {"window": window or "global", "kv_heads": heads or config.n_head}
        streams[name] = IncrementalDetector(model.eval().to(args.device, getattr(torch, args.dtype)))
    measured = [measure(streams, position, args) for position in args.positions]
    rows = [{**about[name], **one[name]} for name in streams for one in measured]
    print(f"Pushes of 1, 8 and 32 steps into a stream of {args.variant}, {args.dtype}\n")
    harness.print_table(rows, COLUMNS)
    harness.write_json(args.json, machine, args, rows)
    worst = max(row["error"] for row in rows)
    if args.dtype == "float32" and worst > 1e-3:
        raise BenchmarkError(f"the stream differs from one forward by {worst:.1e}; expected at most 1e-3.")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="balanced", help="settings, as of latency.py (default: balanced)")
    parser.add_argument("--n-in", type=int, default=2048, help="width of a feature (default: 2048)")
    parser.add_argument("--positions", type=int, nargs="+", default=[1000, 4000, 16000], metavar="STEPS")
    parser.add_argument("--kv-heads", type=int, nargs="*", default=[2, 1], help="beside all heads (default: 2 1)")
    parser.add_argument("--windows", type=int, nargs="*", default=[19], help="beside global attention (default: 19)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu")
    harness.add_arguments(parser, repeats=3)
    harness.run_command(run, parser, argv)


if __name__ == "__main__":
    main()
