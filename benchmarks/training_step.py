"""Time, memory and error of one training step of the detector: forward, loss and backward, without the optimizer's step.

    python benchmarks/training_step.py --variants thumos14 --v1 PATH
    python benchmarks/training_step.py --variants thumos14 balanced --dtype float32 autocast --device cuda

Features are random and without padding; each sample has ten segments of random classes. Dropout and drop path are as the
settings say while the clock runs, and off where loss and norm of the gradient are compared: with v1's (--v1, settings that
v1 has; both from the same weights), else with float32 and eager attention; relative differences. Inputs, rows, memory (it
includes the gradients) and GFLOP (with those of the backward pass) are as in latency.py.
"""

import argparse
from pathlib import Path

import cases
import harness
from harness import BenchmarkError, Column

ERROR_COLUMNS = [
    Column("loss", "loss", ".5f"),
    Column("loss error", "loss_error", ".1e"),
    Column("gradient error", "gradient_error", ".1e"),
    Column("against", "against"),
]


def run(args: argparse.Namespace):
    cases.check_arguments(args)
    machine = harness.describe_machine(args.device)
    fields = cases.parse_fields(args)
    variants = cases.find_variants(args, fields)
    todo = cases.make_cases(args, variants, fields, args.length, is_training=True)
    print(harness.machine_line(machine), flush=True)
    rows, limits = cases.measure(todo, args)
    for row in rows:
        for kind, error in row.get("errors", {}).items():
            row[f"{kind}_error"] = error["relative"]
    if limits:
        print(harness.limits_line(limits))
    title = f"Forward, loss and backward, detector, batch {args.batch}, {args.length} steps"
    print(f"{title}; median of {args.repeats} rounds\n")
    harness.print_table(rows, cases.columns(ERROR_COLUMNS, args.v1 is not None))
    harness.write_json(args.json, machine, args, rows, limits=limits, settings=cases.settings_of(todo))
    harness.plot_bars(args.plot, rows, "median_ms", "ms", title)
    if not any("median_ms" in row for row in rows):
        raise BenchmarkError("none of the rows could run.")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_arguments(parser, ["thumos14"], batch=2, length=2304)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the times")
    harness.add_arguments(parser, repeats=5)
    harness.add_allocator_argument(parser)
    return parser


def main(argv: list[str] | None = None):
    harness.run_command(run, make_parser(), argv)


if __name__ == "__main__":
    main()
