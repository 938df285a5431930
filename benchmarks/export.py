"""Latency of an exported detector: ONNX Runtime beside torch, and torch.compile, on the CPU.

    python benchmarks/export.py
    python benchmarks/export.py --lengths 512 --thread-counts 1 --config mha_win_size=19 --no-compile

One recording without padding, the default configuration with random weights, without NMS. All rows of a length run in one
process, in turn; `time / torch` is the median over rounds of the time divided by torch's with as many threads. torch runs
the model itself: no mask, so that attention's fused kernel is eligible; exported graphs always have a mask. The error is
the largest difference of logits from torch. ONNX Runtime's threads stop spinning when it is done, or they would slow torch.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

import harness
import torch
import yaml
from harness import BenchmarkError, Column

from modeling_convtransformer import ConvTransformerConfig, ConvTransformerForTemporalActionLocalization

COLUMNS = [
    Column("steps", "steps", ","),
    Column("threads", "threads"),
    Column("runtime", "name"),
    Column("median ms", "median_ms", ".1f"),
    Column("min", "min_ms", ".1f"),
    Column("max", "max_ms", ".1f"),
    Column("time / torch", "ratio", ".2f"),
    Column("max error", "error", ".1e"),
]


def load_exporter():
    """examples/export.py, which is no package."""
    spec = importlib.util.spec_from_file_location("examples_export", harness.ROOT / "examples" / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_detector(fields: list[str]):
    try:
        changes = {name: yaml.safe_load(value) for name, _, value in (field.partition("=") for field in fields)}
        config = ConvTransformerConfig(**changes)
    except Exception as error:  # of huggingface_hub's checks too
        raise BenchmarkError(f"--config {' '.join(fields)}: {harness.first_line(error)}") from None
    torch.manual_seed(0)
    return ConvTransformerForTemporalActionLocalization(config).eval()


def open_session(path: Path, threads: int):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_session(session, features: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(features.shape[:2], dtype=torch.long)
    return torch.from_numpy(
        session.run(["logits"], {"input_features": features.numpy(), "attention_mask": mask.numpy()})[0]
    )


def make_runners(model, path: Path, threads: list[int], compiles: bool) -> dict[tuple[str, int], tuple]:
    """By runtime and threads: a function of features, which returns logits."""
    runners = {}
    compiled = torch.compile(model, fullgraph=True, dynamic=False)  # anew for each length and number of threads
    for count in threads:
        session = open_session(path, count)
        runners["torch", count] = lambda features: model(features).logits
        if compiles:
            runners["torch.compile", count] = lambda features: compiled(features).logits
        runners["ONNX Runtime", count] = lambda features, session=session: run_session(session, features)
    return runners


def measure(runners: dict, features: torch.Tensor, repeats: int) -> list[dict]:
    """A row for each runner; rounds in turn, two before those that count (the first one compiles)."""
    seconds = {key: [] for key in runners}
    errors = {}
    for index in range(2 + repeats):
        for key, runner in runners.items():
            torch.set_num_threads(key[1])
            start = time.perf_counter()
            logits = runner(features)
            if index >= 2:
                seconds[key].append(time.perf_counter() - start)
            if key[0] == "torch":  # first in every round
                expected = logits
            elif index == 1:
                errors[key] = (logits - expected).abs().max().item()
    rows = []
    for (name, threads), values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["torch", threads], strict=True)]
        rows.append(
            {
                "steps": features.shape[1],
                "threads": threads,
                "name": name,
                "median_ms": 1e3 * statistics.median(values),
                "min_ms": 1e3 * min(values),
                "max_ms": 1e3 * max(values),
                "ratio": statistics.median(ratios),
                "error": errors.get((name, threads)),
            }
        )
    return rows


def run(args: argparse.Namespace):
    if min(*args.lengths, *args.thread_counts) < 1:
        raise BenchmarkError("--lengths and --thread-counts expect integers of at least 1.")
    exporter = load_exporter()
    missing = [name for name in exporter.PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise BenchmarkError(f'{", ".join(missing)} missing: pip install -e ".[export]" brings what this needs.')
    import onnxruntime

    model = make_detector(args.config)
    machine = {**harness.describe_machine(), "onnxruntime": onnxruntime.__version__}
    machine["threads"] = " and ".join(map(str, args.thread_counts))
    print(f"{harness.machine_line(machine)}; onnxruntime {onnxruntime.__version__}", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model.onnx"
        exporter.write_onnx(exporter.trace(model), path)
        runners = make_runners(model, path, args.thread_counts, args.compile)
        for length in args.lengths:
            generator = torch.Generator().manual_seed(length)
            features = torch.randn(1, length, sum(model.config.stream_widths), generator=generator)
            rows += measure(runners, features, args.repeats)
    print(f"One forward of the detector, batch 1; median of {args.repeats} rounds\n")
    harness.print_table(rows, COLUMNS)
    harness.write_json(args.json, machine, args, rows)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2304], help="steps (default: 512 2304)")
    parser.add_argument("--thread-counts", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--config", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of the configuration")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that are timed (default: 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, arguments and every row here")
    parser.set_defaults(threads=None)  # harness would set them once; here they change
    return parser


def main(argv: list[str] | None = None):
    harness.run_command(run, make_parser(), argv)


if __name__ == "__main__":
    main()
