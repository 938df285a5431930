"""How time and memory of the backbone grow with the length of a recording, global and in windows.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --lengths 16384 --windows 0 --n-in 2048 --v1 PATH --v1-max-length 16384

One forward without gradients. Each row has a process of its own: its memory is its own, and one that needs more than there
is says so in its row. Peak memory is what one forward takes beyond weights and inputs, `total` is all that the process has
resident then (on a GPU: what torch reserved). Unlike in latency.py, rows do not run in turn: `time / v1` compares the
medians of two processes. The error is the largest difference to float32 eager attention: of all outputs up to
--check-length steps; beyond it, in windows, of the outputs that only depend on that many first steps, computed from these
alone; global attention is not checked there.
"""

import argparse
from pathlib import Path

import cases
import harness
from harness import BenchmarkError, Column
from tqdm import tqdm

COLUMNS = [
    Column("variant", "variant"),
    Column("window", "window"),
    Column("dtype", "dtype"),
    Column("attention", "backend"),
    Column("compile", "compile"),
    Column("steps", "length", ","),
    Column("median ms", "median_ms", ".1f"),
    Column("min", "min_ms", ".1f"),
    Column("max", "max_ms", ".1f"),
    Column("time / previous", "growth", ".2f"),
    Column("time / v1", "ratio", ".2f"),
    Column("peak MB", "peak_mb", ".0f"),
    Column("% of v1", "memory_share", ".0%"),
    Column("total MB", "total_mb", ".0f"),
    Column("GFLOP", "gflop", ".1f"),
    Column("% of matmul rate", "matmul_share", ".0%"),
    *cases.ERROR_COLUMNS,
    Column("compile s", "compile_s", ".1f"),
]


def measure_alone(case: cases.Case, repeats: int, check_length: int, with_memory: bool) -> dict:
    """What a row says of one case, measured in this (fresh) process."""
    cases.prepare_torch(case.threads, case.tf32)
    runner = cases.Runner(case)
    row = {}
    if case.compile != "off":
        row["compile_s"] = 1e-3 * harness.time_alternating({"": runner}, 1, 0, case.device)[""].median_ms
    cases.warm_up(runner)
    if with_memory:
        memory = cases.peak_of(runner)
        row["peak_mb"], row["total_mb"] = memory.values() if memory else [harness.NOT_AVAILABLE] * 2
    timing = harness.time_alternating({"": runner}, repeats, 0 if with_memory else 1, case.device)[""]
    row.update(timing._asdict(), against="eager")
    del row["ratio"]
    try:
        errors = cases.compare_start(runner, check_length)
    except Exception as error:
        errors, row["problem"] = None, f"check {cases.describe_problem(error)}"
    return {**row, **(cases.error_fields(errors) if errors else {"against": "not checked"})}


def make_cases(args: argparse.Namespace) -> list[tuple[int, cases.Case]]:
    """(window, case) of every row, the shortest first, v1's before ours."""
    todo = []
    for length in sorted(set(args.lengths)):
        for window in dict.fromkeys(args.windows):
            is_global = window <= 1
            if is_global and length > args.global_max_length:
                continue
            fields = {**cases.parse_fields(args), "mha_win_size": -1 if is_global else window}
            variants = cases.find_variants(args, fields)
            too_long_for_v1 = is_global and length > args.v1_max_length
            todo += [
                (window, case)
                for case in cases.make_cases(args, variants, fields, length, may_pad=True)
                if not (case.is_v1 and too_long_for_v1)
            ]
    return todo


def add_ratios(rows: list[dict]):
    """Time relative to the previous length of the same row, and to v1 at the same length and window."""
    done = {}
    for row in rows:
        if "median_ms" not in row:
            continue
        kind = tuple(row[key] for key in ("variant", "window", "dtype", "backend", "compile"))
        if kind in done:
            row["growth"] = row["median_ms"] / done[kind]["median_ms"]
        done[kind] = row
        v1 = next(
            (r for r in rows if r["is_v1"] and r["length"] == row["length"] and r["window"] == row["window"]), {}
        )
        if "median_ms" in v1:
            row["ratio"] = row["median_ms"] / v1["median_ms"]
            if isinstance(row.get("peak_mb"), float) and isinstance(v1.get("peak_mb"), float):
                row["memory_share"] = row["peak_mb"] / v1["peak_mb"]


def run(args: argparse.Namespace):
    cases.check_arguments(args)
    if min(args.lengths) < 1 or min(args.windows) < 0:
        raise BenchmarkError("--lengths are at least 1, --windows at least 0.")
    machine = harness.describe_machine(args.device)
    todo = make_cases(args)
    if not todo:
        raise BenchmarkError("nothing to run: all --lengths lie beyond --global-max-length.")
    print(harness.machine_line(machine), flush=True)
    limits = cases.measure_used_limits([case for _, case in todo], args)
    rows = []
    for window, case in tqdm(todo, desc="rows", disable=None):
        row = {**case.row(), "window": window if window > 1 else "global", "length": case.length, "is_v1": case.is_v1}
        rows.append(row)
        try:
            row.update(harness.in_child(measure_alone, case, args.repeats, args.check_length, args.memory))
            cases.add_work(row, case, limits)
        except RuntimeError as error:
            row["problem"] = str(error)
        except harness.OutOfTime:
            row["problem"] = "left out, and all after it: no time left"
        add_ratios(rows)
        harness.write_json(args.json, machine, args, rows, limits=limits)  # what is done is not lost
        if row.get("problem", "").startswith("left out"):
            break
    if limits:
        print(harness.limits_line(limits))
    print(f"One forward, backbone, batch {args.batch}; median of {args.repeats}\n")
    order = {}  # the lengths of each variant below one another
    for row in rows:
        order.setdefault((row["window"], row["name"]), []).append(row)
    harness.print_table([row for group in order.values() for row in group], COLUMNS)
    plot(args.plot, order)
    if not any("median_ms" in row for row in rows):
        raise BenchmarkError("none of the rows could run.")


def plot(path: Path | None, groups: dict[tuple, list[dict]]):
    """Time and peak memory over length, a line for each variant."""
    if path is None:
        return
    pyplot = harness.import_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axis, key, label in zip(axes, ("median_ms", "peak_mb"), ("ms", "peak memory, MB"), strict=True):
        for (window, name), rows in groups.items():
            points = [(row["length"], row[key]) for row in rows if isinstance(row.get(key), float)]
            if points:  # memory may not be measured
                label_of_line = f"{name}, {'global' if window == 'global' else f'window {window}'}"
                axis.plot(*zip(*points, strict=True), marker="o", label=label_of_line)
        axis.set(xscale="log", yscale="log", xlabel="time steps", ylabel=label)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_arguments(parser, ["balanced"], batch=1, length=None)
    parser.set_defaults(n_in=256, n_embd=256)
    lengths = [1024 * 4**power for power in range(5)]
    parser.add_argument("--lengths", nargs="+", type=int, default=lengths, metavar="N", help=f"default: {lengths}")
    parser.add_argument(
        "--windows", nargs="+", type=int, default=[0, 19], metavar="W", help="full widths; 0: global (default: 0 19)"
    )
    parser.add_argument(
        "--global-max-length", type=int, default=16384, metavar="N", help="longest with global attention (16384)"
    )
    parser.add_argument(
        "--v1-max-length",
        type=int,
        default=4096,
        metavar="N",
        help="longest of v1's code with global attention, which takes gigabytes beyond (4096)",
    )
    parser.add_argument(
        "--check-length", type=int, default=4096, metavar="N", help="steps that eager attention checks (4096)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw time and memory over length")
    harness.add_arguments(parser, repeats=5)
    harness.add_allocator_argument(parser)
    return parser


def main(argv: list[str] | None = None):
    harness.run_command(run, make_parser(), argv)


if __name__ == "__main__":
    main()
