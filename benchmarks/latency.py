"""Time, memory and error of one forward without gradients.

    python benchmarks/latency.py --variants balanced v1_compatible --batch 4 --length 2048
    python benchmarks/latency.py --model detector --variants thumos14 --batch 1 --length 2304 --v1 PATH
    python benchmarks/latency.py --ablation --v1 PATH

Inputs are on the device before the clock starts; none is padded. The detector is backbone, neck, points and both heads,
without NMS. All rows run in one process, in turn; `time / v1` is the median over rounds. The weights are random, but such
that every part shows in the outputs; with --v1, settings that v1 has get v1's weights through our converter, and their
error is the largest difference to v1's own outputs. The error of all others is against the same model in float32 with eager
attention: the largest absolute difference over all outputs, and beside it the largest one relative to the largest value of
its kind of output. GFLOP are what the settings need (matrix products and convolutions; of attention what lies inside
windows), whatever code runs them. Peak memory is what one forward takes beyond weights and inputs; on the CPU each row is
measured in a process of its own.
"""

import argparse

import cases
import harness
import torch
from harness import BenchmarkError

ABLATION = {
    "v1 settings": ({}, "eager"),
    "all v2 features on": (
        {"use_rope": True, "use_swiglu": True, "use_rms_norm": True, "mask_conv_inputs": True},
        "sdpa",
    ),
    "flash only": ({}, "sdpa"),
    "RMSNorm only": ({"use_rms_norm": True}, "eager"),
    "SwiGLU only": ({"use_swiglu": True}, "eager"),
}


def choose_variants(args: argparse.Namespace, fields: dict) -> list[tuple]:
    """(name, config), or (name, config, backend) of each part of the ablation."""
    if not args.ablation:
        return cases.find_variants(args, fields)
    return [
        (name, cases.find_config("v1_compatible", {**fields, **changes}), backend)
        for name, (changes, backend) in ABLATION.items()
    ]


def run(args: argparse.Namespace):
    cases.check_arguments(args)
    machine = harness.describe_machine(args.device)
    fields = cases.parse_fields(args)
    todo = cases.make_cases(args, choose_variants(args, fields), fields, args.length)
    print(harness.machine_line(machine), flush=True)
    rows, limits = cases.measure(todo, args)
    if limits:
        print(harness.limits_line(limits))
    print(f"One forward, {args.model}, batch {args.batch}, {args.length} steps; median of {args.repeats} rounds\n")
    harness.print_table(rows, cases.columns(cases.ERROR_COLUMNS, args.v1 is not None))
    harness.write_json(args.json, machine, args, rows, limits=limits, settings=cases.settings_of(todo))
    harness.plot_bars(
        args.plot, rows, "median_ms", "ms", f"One forward, {args.model}, batch {args.batch}, {args.length} steps"
    )
    if args.profile:
        profile([case for case, row in zip(todo, rows, strict=True) if "median_ms" in row])
    if not any("median_ms" in row for row in rows):
        raise BenchmarkError("none of the rows could run.")


def profile(todo: list[cases.Case]):
    """Prints which operators take the time of one forward of each case."""
    for case in todo:
        runner = cases.Runner(case)
        cases.warm_up(runner)
        runner()
        with torch.profiler.profile() as profiler:
            runner()
        time = "self_cpu_time_total" if torch.device(case.device).type == "cpu" else "self_device_time_total"
        print(f"\n{case.name}\n{profiler.key_averages().table(sort_by=time, row_limit=15, max_name_column_width=50)}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_arguments(parser, ["balanced", "v1_compatible"], batch=4, length=2048, model="backbone")
    parser.add_argument(
        "--ablation",
        action="store_true",
        help="instead of --variants and --backends: v1's settings, all of v2, and attention, norm and MLP one by one",
    )
    parser.add_argument(
        "--profile", action="store_true", help="then print the operators that take most of each row's time"
    )
    parser.add_argument("--plot", type=cases.Path, metavar="FILE.png", help="draw the times")
    harness.add_arguments(parser, repeats=7)
    harness.add_allocator_argument(parser)
    return parser


def main(argv: list[str] | None = None):
    harness.run_command(run, make_parser(), argv)


if __name__ == "__main__":
    main()
