"""What all benchmarks share: the machine, times, peak memory, limits of the hardware, tables, JSON files and plots.

Times of several variants are taken in turn (A B C A B C ...), so that what else the machine does meets all of them alike;
the ratio of two variants is the median of the ratios of their rounds.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import math
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent

try:
    import modeling_convtransformer
except ModuleNotFoundError:
    sys.path.insert(0, str(ROOT))
    import modeling_convtransformer

# Installed, `modeling_convtransformer.convert` is the folder convert. In a bare clone it lies beside the package.
if str(ROOT) not in modeling_convtransformer.__path__:
    modeling_convtransformer.__path__.append(str(ROOT))

import torch
import transformers

# glibc reads these at start. Tuned, large tensors stay in the heap instead of being mapped, and zeroed, anew each time.
ALLOCATOR_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")
TUNED_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}

NOT_AVAILABLE = "not available"


class BenchmarkError(Exception):
    """Bad input, said in one sentence for the person who gave it."""


class OutOfTime(BaseException):
    """The process was asked to end (SIGTERM, of `timeout` say): what is done is still worth a table."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's message, which in transformers may be followed by much advice."""
    return first_line(error).split(". ")[0].rstrip(".")


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Everything about the machine and the versions that a time depends on."""
    machine = {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": None,
        "allocator": {name: os.environ.get(name) or "default" for name in ALLOCATOR_VARIABLES},
    }
    if torch.device(device).type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["tf32"] = {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "matrix products": torch.backends.cuda.matmul.allow_tf32,
        }
    return machine


def machine_line(machine: dict[str, Any]) -> str:
    """`describe_machine` in one line."""
    allocator = ", ".join(f"{name} {value}" for name, value in machine["allocator"].items())
    parts = [
        machine["platform"],
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads",
        f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}",
        *([f"GPU {machine['gpu']}"] if machine["gpu"] else []),
        *([f"TF32: {', '.join(f'{k} {v}' for k, v in machine['tf32'].items())}"] if "tf32" in machine else []),
        f"allocator: {allocator}",
    ]
    return "; ".join(parts)


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def synchronise(device: str):
    """Waits until the GPU is done, if there is one: its calls return before their work is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------------------------------
# Time


class Timing(NamedTuple):
    """Milliseconds of a variant, and the median over rounds of its time divided by the first variant's."""

    median_ms: float
    min_ms: float
    max_ms: float
    ratio: float


def time_alternating(
    functions: dict[str, Callable], repeats: int, warmup: int = 1, device: str = "cpu"
) -> dict[str, Timing]:
    """Times functions in turn: one call of each in every round, `warmup` rounds before the `repeats` that count."""
    seconds = {name: [] for name in functions}
    for index in range(warmup + repeats):
        for name, function in functions.items():
            synchronise(device)
            start = time.perf_counter()
            result = function()
            synchronise(device)
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
            del result  # before the next variant runs
    first = next(iter(seconds.values()), [])
    return {
        name: Timing(
            1e3 * statistics.median(values),
            1e3 * min(values),
            1e3 * max(values),
            statistics.median(a / b for a, b in zip(values, first, strict=True)),
        )
        for name, values in seconds.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def peak_memory(function: Callable, device: str) -> dict[str, float] | None:
    """
    Peak of one call of `function`, in MB: `peak` beyond what was held before, and `total`.

    GPU: what torch's allocator hands out (`total`: what it reserves). CPU: resident memory of this process, which is
    honest only in a fresh process (`in_child`), where no earlier variant left freed memory behind.

    Returns:
        `None` where this system has no such counter.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        synchronise(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        synchronise(device)
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        del result
        return {"peak": (peak - before) / 2**20, "total": total / 2**20}
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what libraries freed while they were loaded would hide part of the peak
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
    except OSError:
        return None
    before = resident("VmRSS")
    result = function()
    peak = resident("VmHWM")
    del result
    return {"peak": (peak - before) / 2**10, "total": peak / 2**10}


def reserved_memory(device: str) -> float:
    """MB that torch's allocator on the GPU cannot give back: tensors, and the pools of CUDA graphs."""
    gc.collect()
    synchronise(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device) / 2**20


def resident(field: str) -> int:
    """A field of /proc/self/status, in KB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def in_child(function: Callable, *args) -> Any:
    """
    The result of `function(*args)` in a fresh process.

    Raises:
        RuntimeError: what the child raised, or that it was killed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        error, result = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        if code == -signal.SIGKILL:
            raise RuntimeError("killed by the system: out of memory") from None
        raise RuntimeError(f"the process ended with {code}") from None
    finally:
        process.join()
    if error is not None:
        raise RuntimeError(error)
    return result


def _work(sender, function: Callable, args: tuple):
    with contextlib.suppress(OSError):
        # Where memory runs out, this process is the one to end, not another of the user's.
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    try:
        sender.send((None, function(*args)))
    except Exception as error:
        sender.send((f"{'out of memory: ' * is_out_of_memory(error)}{first_line(error)}", None))


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


# ---------------------------------------------------------------------------------------------------------------------
# Limits of the hardware


def measure_limits(dtypes: list[str], device: str) -> dict[str, float]:
    """What this machine can do, now: FLOP/s of matrix products in each dtype, and bytes/s of a copy (read and written)."""
    is_gpu = torch.device(device).type == "cuda"
    size = 8192 if is_gpu else 2048
    shapes = [(size, size, size), (2 * size, size, size // 2), (size, 2 * size, size // 4)]
    limits = {}
    for name in dtypes:
        dtype = getattr(torch, name)
        rates = []
        for rows, inner, columns in shapes:
            a = torch.randn(rows, inner, device=device).to(dtype)
            b = torch.randn(inner, columns, device=device).to(dtype)
            timing = time_alternating({"matmul": lambda a=a, b=b: a @ b}, 5 if is_gpu else 3, 1, device)["matmul"]
            rates.append(2 * rows * inner * columns / (1e-3 * timing.median_ms))
        limits[f"{name} FLOP/s"] = statistics.median(rates)
    source = torch.ones(2**28 if is_gpu else 2**26, device=device)
    target = torch.empty_like(source)
    timing = time_alternating({"copy": lambda: target.copy_(source)}, 5, 1, device)["copy"]
    limits["copy bytes/s"] = 2 * source.numel() * source.element_size() / (1e-3 * timing.median_ms)
    return limits


def limits_line(limits: dict[str, float]) -> str:
    """`measure_limits` in one line."""
    rates = [
        f"{1e-9 * rate:.0f} GFLOP/s in {name.split()[0]} matrix products"
        for name, rate in limits.items()
        if "FLOP" in name
    ]
    return f"This machine, measured just now: {', '.join(rates)}, copies {1e-9 * limits['copy bytes/s']:.1f} GB/s"


# ---------------------------------------------------------------------------------------------------------------------
# Tables, files, plots


class Column(NamedTuple):
    """A column of a table: its head, the key of a row, and how a value is written (a format, or a function)."""

    head: str
    key: str
    form: str | Callable[[Any], str] = ""


def print_table(rows: list[dict], columns: list[Column]):
    """Rows as Markdown, numbers to the right; columns that no row has are left out. A row's `problem` is a remark."""
    columns = [*columns, Column("remark", "problem")]
    columns = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    cells = [[_cell(row.get(column.key), column.form) for column in columns] for row in rows]
    has_numbers = [
        any(isinstance(row.get(column.key), int | float) for row in rows if row.get(column.key) is not None)
        for column in columns
    ]
    print("| " + " | ".join(column.head for column in columns) + " |")
    print("|" + "|".join("--:" if number else ":--" for number in has_numbers) + "|")
    for texts in cells:
        print("| " + " | ".join(texts) + " |")
    sys.stdout.flush()


def _cell(value: Any, form: str | Callable) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return form(value) if callable(form) else format(value, form)


def write_json(path: Path | None, machine: dict, args: argparse.Namespace, rows: list[dict], **more: Any):
    """Writes all of a run to `path`, if there is one, all at once: a reader never sees half a file."""
    if path is None:
        return
    content = {"command": " ".join(sys.argv), "machine": machine, "arguments": vars(args), **more, "rows": rows}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(_plain(content), file, indent=1, allow_nan=False)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _plain(value: Any) -> Any:
    """The same as JSON types: paths and whatever else become text, numbers that JSON lacks become text too."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def import_pyplot():
    """
    matplotlib's pyplot, drawing into files.

    Raises:
        BenchmarkError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise BenchmarkError('--plot needs matplotlib: pip install -e ".[demo]" brings it.') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_bars(path: Path | None, rows: list[dict], key: str, label: str, title: str):
    """One horizontal bar for each row that has `key`, the first on top."""
    rows = [row for row in rows if row.get(key) is not None]
    if path is None or not rows:
        return
    pyplot = import_pyplot()
    widest = max(len(str(row["name"])) for row in rows)
    figure, axes = pyplot.subplots(figsize=(6 + 0.09 * widest, 1.2 + 0.35 * len(rows)), layout="constrained")
    bars = axes.barh([str(row["name"]) for row in rows], [row[key] for row in rows])
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel=label, title=title)
    axes.margins(x=0.12)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# Command lines


def add_arguments(parser: argparse.ArgumentParser, repeats: int):
    """The options that all commands have."""
    parser.add_argument("--repeats", type=int, default=repeats, help=f"rounds that are timed (default: {repeats})")
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's own choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, arguments and every row here")


def add_allocator_argument(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--allocator",
        choices=["default", "tuned", "both"],
        default="default",
        help="tuned: start again with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ set high, so that glibc keeps "
        "large blocks; both: one run of each; default: as the environment says (CPU only; default: default)",
    )


def run_command(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, argv=None):
    """Parses, and runs `main` under each allocator asked for; bad input ends in one line and exit status 2."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(arguments)
    try:
        if args.repeats < 1:
            raise BenchmarkError(f"--repeats is {args.repeats}; expected at least 1.")
        if args.threads is not None and args.threads < 1:
            raise BenchmarkError(f"--threads is {args.threads}; expected at least 1.")
        check_outputs(args)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        allocator = getattr(args, "allocator", "default")
        if allocator == "default":
            _run_until_stopped(main, args)
            return
        for name in ("default", "tuned") if allocator == "both" else ("tuned",):
            _start_again(arguments, args, name, {} if name == "default" else TUNED_ALLOCATOR)
    except BenchmarkError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except OutOfTime:
        parser.exit(2, f"{parser.prog}: stopped before there was a result.\n")


def _run_until_stopped(main: Callable[[argparse.Namespace], None], args: argparse.Namespace):
    """Runs `main`, in which the first SIGTERM raises `OutOfTime`; others are ignored, as `timeout` sends two at once."""

    def stop(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise OutOfTime

    before = signal.signal(signal.SIGTERM, stop)
    try:
        main(args)
    finally:
        signal.signal(signal.SIGTERM, before)


def check_outputs(args: argparse.Namespace):
    """Refuses, before the work instead of after it, files that could not be written."""
    for option in ("json", "plot"):
        path = getattr(args, option, None)
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BenchmarkError(f"--{option} {path}: its folder cannot be made ({error.strerror}).") from None
        if path.is_dir():
            raise BenchmarkError(f"--{option} {path} is a folder; expected the name of a file.")
    if getattr(args, "plot", None):
        import_pyplot()


def _start_again(arguments: list[str], args: argparse.Namespace, name: str, variables: dict[str, str]):
    """The same command in a process with other allocator settings; of two runs each writes files of its own."""
    arguments = [*arguments, "--allocator", "default"]  # the last one counts
    if args.allocator == "both":
        for option in ("json", "plot"):
            if path := getattr(args, option, None):
                arguments += [f"--{option}", str(path.with_stem(f"{path.stem}_{name}"))]
    print(f"Allocator: {name}", flush=True)
    process = subprocess.run([sys.executable, sys.argv[0], *arguments], env={**os.environ, **variables}, check=False)
    if process.returncode:
        sys.exit(process.returncode)
