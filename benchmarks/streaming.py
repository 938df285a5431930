"""Latency of a push into a stream, and the memory that it holds: python benchmarks/streaming.py --threads 1

A causal detector (--variant, "balanced" by default) has had so many steps; then 1, 8 and 32 steps more are pushed again and
again, into the streams of all rows in turn. One step makes a point on every second, fourth, ... level only, so that
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


def time_pushes(streams: list[IncrementalDetector], size: int, count: int, device: str) -> list[list[float]]:
    """Milliseconds of `count` pushes of `size` steps into each stream, in turn; features are on the device before."""
    times = [[] for _ in streams]
    for _ in tqdm(range(count), desc=f"pushes of {size}", leave=False, disable=None):
        for stream, own in zip(streams, times, strict=True):
            features = torch.randn(size, sum(stream.model.config.stream_widths), device=device)
            harness.synchronise(device)
            start = time.perf_counter()
            stream.push(features)
            harness.synchronise(device)
            own.append(1e3 * (time.perf_counter() - start))
    return times


def fill(model, position: int, device: str) -> tuple[IncrementalDetector, torch.Tensor, torch.Tensor, dict]:
    """
    A stream that has had `position` steps; the logits of its newest point; of the steps, those that a forward needs for
    that point; and what its row says so far.
    """
    config, stream = model.config, IncrementalDetector(model)
    features = torch.randn(position, sum(config.stream_widths), generator=torch.Generator().manual_seed(position))
    for piece in tqdm(features.to(device).split(32), desc=f"{position} steps", leave=False, disable=None):
        last = stream.push(piece)
    # Points of the part are points of the whole if it begins at a multiple of the coarsest stride.
    reach, coarsest = config.receptive_field[0], config.detector_strides[-1]
    first = 0 if math.isinf(reach) else max(0, position - math.ceil(reach) - 1) // coarsest * coarsest
    window = config.window_sizes[0]
    row = {
        "window": window if window > 1 else "global",
        "kv_heads": config.n_kv_head or config.n_head,
        "position": position,
        "rerun_steps": position - first,
        **{f"{name}_mb": size / 2**20 for name, size in stream.cache_bytes.items()},
    }
    return stream, last.logits[0, last.point_levels[0] == 0][-1], features[first:].to(device), row


def measure(models: list, args: argparse.Namespace) -> list[dict]:
    """A row for each model and position."""
    filled = [fill(model, position, args.device) for model in models for position in args.positions]
    streams, newest, parts, rows = (list(one) for one in zip(*filled, strict=True))
    for size in SIZES:
        # Over 4 periods, and 16 pushes at least; the first ones, which warm up, do not count.
        count = max(16, 4 * max(model.config.detector_strides[-1] for model in models) // size)
        for row, times in zip(rows, time_pushes(streams, size, count + 4, args.device), strict=True):
            row[f"{size}_ms"] = statistics.median(times[4:])
            row[f"{size}_p95"] = statistics.quantiles(times[4:], n=20, method="inclusive")[-1]

    def rerun(index: int):
        with torch.no_grad():
            rows[index]["error"] = (
                (streams[index].model(parts[index][None]).logits[0, len(parts[index]) - 1] - newest[index]).abs().max()
            ).item()

    functions = {index: functools.partial(rerun, index) for index in range(len(rows))}
    for index, timing in harness.time_alternating(functions, args.repeats, 0, args.device).items():
        rows[index].update(rerun_ms=timing.median_ms, ratio=timing.median_ms / rows[index]["1_ms"])
    return rows


def run(args: argparse.Namespace):
    if min(args.positions) < 1:
        raise BenchmarkError(f"--positions has {min(args.positions)}; expected 1 step or more.")
    machine = harness.describe_machine(args.device)
    print(harness.machine_line(machine), flush=True)
    models = []
    for window, heads in [(-1, heads) for heads in (None, *args.kv_heads)] + [
        (window, None) for window in args.windows
    ]:
        fields = {"is_causal": True, "n_kv_head": heads, "mha_win_size": window, "n_in": args.n_in}
        torch.manual_seed(0)
        model = ConvTransformerForTemporalActionLocalization(cases.find_config(args.variant, fields))
        cases.stir(model)
        models.append(model.eval().to(args.device, getattr(torch, args.dtype)))
    rows = measure(models, args)
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
