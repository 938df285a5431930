"""The longest recording whose forward stays within so much memory: v1's code and ours, global attention and windows.

    python benchmarks/longest_input.py --v1 PATH
    python benchmarks/longest_input.py --v1 PATH --variants thumos14 balanced --n-embd 512 --windows 19
    python benchmarks/longest_input.py --device cuda --dtype bfloat16 --memory-gb 16

One forward without gradients, of one recording by default. Every length that is tried is run, in a process of its own. What
counts is all that the process holds at its peak: interpreter and torch, weights, features, and whatever the forward needs (on
a GPU: what torch reserved). The search ends when a length fits and one that is at most --tolerance longer does not; a row
with ">=" was not searched beyond --max-length or --global-max-length, because its attention takes time * time operations.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable

import cases
import harness
from harness import BenchmarkError, Column
from tqdm import tqdm

# Tried lengths are multiples of this, so that they read well and no block is cut.
STEP = 64

COLUMNS = [
    Column("variant", "variant"),
    Column("window", "window"),
    Column("dtype", "dtype"),
    Column("attention", "backend"),
    Column("longest", "longest"),
    Column("total MB", "total_mb", ".0f"),
    Column("of that features", "features_mb", ".0f"),
    Column("s", "seconds", ".1f"),
    Column("too long", "too_long", ",d"),
    Column("/ v1 global", "times_global", ".1f"),
    Column("/ v1 window", "times_window", ".1f"),
]


def measure_alone(case: cases.Case) -> tuple[float, float]:
    """MB that this (fresh) process has at the peak of one forward, and the seconds that it took."""
    cases.prepare_torch(case.threads, case.tf32)
    runner = cases.Runner(case)
    cases.warm_up(runner)
    start = time.perf_counter()
    memory = cases.peak_of(runner)
    if memory is None:
        raise RuntimeError("this system does not say how much memory a process had at its peak")
    return memory["total"], time.perf_counter() - start


def search(
    measure: Callable[[int], float], limit: float, start: int, longest: int, tolerance: float
) -> tuple[dict[int, float], int]:
    """
    Measures lengths, each where the line through the two that are nearest to the limit meets it, until one fits within
    `limit` and one that is at most `tolerance` longer does not, or until `longest` fits.

    Returns:
        what `measure` said of each length that was tried, and the longest that fits (0: none).
    """
    done, low, high = {}, 0, longest // STEP * STEP + STEP  # low fits, high does not (or must not be tried)
    guess = min(start // STEP * STEP, high - STEP)
    while True:
        done[guess] = measure(guess)
        low, high = (max(low, guess), high) if done[guess] <= limit else (low, min(high, guess))
        if high <= max(low + STEP, (1 + tolerance) * low):
            return done, low
        if low == 0:
            guess = high // 4
        elif len(done) == 1 or not math.isfinite(done.get(high, 0)):
            guess = 2 * low
        else:
            a, b = (low, high) if high in done else sorted(done)[-2:]
            # A little less than all of it, so that noise does not make the good guess one that is too long.
            guess = a + ((1 - tolerance / 3) * limit - done[a]) * (b - a) / max(done[b] - done[a], 1e-9)
        # Beyond what is known to fit, but not far beyond, where memory may grow with the square.
        guess = min(max(guess, (1 + 0.8 * tolerance) * low), 4 * low or guess)
        guess = min(max(round(guess / STEP) * STEP, low + STEP), high - STEP)


def make_cases(args: argparse.Namespace) -> list[tuple[int, cases.Case]]:
    """(window, case) of every row, v1's first; their length is that of the first try."""
    todo = []
    for window in dict.fromkeys(args.windows):
        fields = {**cases.parse_fields(args), "mha_win_size": window if window > 1 else -1}
        rows = cases.make_cases(args, cases.find_variants(args, fields), fields, args.start, may_pad=True)
        # The weights need not be v1's: nothing is compared but memory.
        todo += [(window, case if case.is_v1 else dataclasses.replace(case, v1=None)) for case in rows]
    return todo


def measure_row(case: cases.Case, longest: int, args: argparse.Namespace) -> dict:
    """What a row says of one case."""
    seconds = {}

    def measure(length: int) -> float:
        try:
            memory, seconds[length] = harness.in_child(measure_alone, dataclasses.replace(case, length=length))
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            memory = math.inf
        tqdm.write(f"{case.name}, {length:,} steps: {memory:,.0f} MB", file=sys.stderr)
        return memory

    limit = 1024 * args.memory_gb
    done, low = search(measure, limit, args.start, longest, args.tolerance)
    row = {"tried": {length: {"total_mb": done[length], "s": seconds.get(length)} for length in sorted(done)}}
    if low == 0:
        return {**row, "problem": f"{min(done)} steps are too long"}
    exceeds = min((length for length in done if done[length] > limit), default=None)
    width = sum(case.config.stream_widths) * (2 if case.dtype in ("bfloat16", "float16") else 4)
    return {
        **row,
        "length": low,
        "is_bound": exceeds is None,
        "longest": f"{'>= ' if exceeds is None else ''}{low:,}",
        "total_mb": done[low],
        "features_mb": case.batch * low * width / 2**20,
        "seconds": seconds[low],
        "too_long": exceeds,
    }


def add_ratios(rows: list[dict]):
    """How many times as long as v1's code with global attention, and with windows."""
    for row in rows:
        for key, is_global in (("times_global", True), ("times_window", False)):
            v1 = next((r for r in rows if r["is_v1"] and (r["window"] == "global") == is_global), {})
            if "length" in row and "length" in v1:
                row[key] = row["length"] / v1["length"]


def run(args: argparse.Namespace):
    cases.check_arguments(args)
    if not 0 < args.tolerance < 1 or args.memory_gb <= 0 or min(args.windows) < 0:
        raise BenchmarkError("--tolerance is between 0 and 1, --memory-gb more than 0, --windows are at least 0.")
    if min(args.start, args.max_length, args.global_max_length) < STEP:
        raise BenchmarkError(f"--start, --max-length and --global-max-length are at least {STEP}.")
    machine = harness.describe_machine(args.device)
    todo = make_cases(args)
    print(harness.machine_line(machine), flush=True)
    rows = []
    for window, case in tqdm(todo, desc="rows", disable=None):
        row = {**case.row(), "window": "global" if window <= 1 else str(window), "is_v1": case.is_v1}
        rows.append(row)
        longest = args.max_length if window > 1 else min(args.max_length, args.global_max_length)
        try:
            row.update(measure_row(case, longest, args))
        except RuntimeError as error:
            row["problem"] = str(error)
        except harness.OutOfTime:
            row["problem"] = "left out, and all after it: no time left"
        add_ratios(rows)
        harness.write_json(args.json, machine, args, rows)  # what is done is not lost
        if row.get("problem", "").startswith("left out"):
            break
    print(f"Longest input of one forward in {args.memory_gb:g} GB, {args.model}, batch {args.batch}\n")
    harness.print_table(rows, COLUMNS)
    if not any("length" in row for row in rows):
        raise BenchmarkError("none of the rows could run.")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_arguments(parser, ["v1_compatible", "balanced"], batch=1, length=None, model="detector")
    parser.add_argument("--memory-gb", type=float, default=4.0, metavar="GB", help="of 2**30 bytes (default: 4)")
    parser.add_argument(
        "--windows", nargs="+", type=int, default=[0, 19], metavar="W", help="full widths; 0: global (default: 0 19)"
    )
    parser.add_argument("--start", type=int, default=4096, metavar="N", help="the first length (default: 4096)")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, metavar="SHARE", help="of the answer (default: 0.05 = 5 %%)"
    )
    parser.add_argument("--max-length", type=int, default=2**20, metavar="N", help=f"default: {2**20}")
    parser.add_argument(
        "--global-max-length", type=int, default=65536, metavar="N", help="with global attention (default: 65536)"
    )
    harness.add_arguments(parser, repeats=1)
    harness.add_allocator_argument(parser)
    return parser


def main(argv: list[str] | None = None):
    harness.run_command(run, make_parser(), argv)


if __name__ == "__main__":
    main()
