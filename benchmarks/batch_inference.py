"""examples/batch_inference.py on 1,000 recordings: how fast, whether killed workers cost anything, what a million hours cost.

    python benchmarks/batch_inference.py SBHAR_FOLDER

Recordings are real signals of SBHAR, cut and put one after the other to log-normal lengths. Four jobs do all of them: without
Ray, with one actor, with two, and with two of which one is killed (SIGKILL), twice, at random moments. Each must deliver
every recording once, and the rows of the first, which must be what the pipeline says of a recording alone. A fifth job, at THUMOS14's shape (configuration/thumos14_i3d.yaml, features of
width 2,048), shows where time goes in a larger model on wider features; there are no such features here, so they are random
and so is the model, in which everything is as likely: its NMS has as much to do as it ever can.

Costs are processor time measured without Ray (one thread), which other work on the machine does not lengthen much. Features are
given: computing them from video is not in here, and costs far more. The price is yours to say.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from harness import ROOT, BenchmarkError, Column
from sbhar import run_once
from transformers import pipeline

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
)
from modeling_convtransformer.data import SBHAR_FPS, load_sbhar

JOBS = [
    Column("engine", "name"),
    Column("recordings", "recordings", ",.0f"),
    Column("hours", "hours", ".1f"),
    Column("parts", "parts"),
    Column("killed", "killed"),
    Column("seconds", "wall", ".0f"),
    Column("at work", "working", ".0f"),
    Column("recordings/s", "rate", ".1f"),
    Column("hours/s", "hours_rate", ".2f"),
    Column("hours/s and core", "core_rate", ".2f"),
    Column("read", "read", ".0%"),
    Column("forward", "forward", ".0%"),
    Column("NMS", "nms", ".0%"),
    Column("write, rest", "rest", ".0%"),
    Column("delivered once", "once"),
    Column("score difference", "score_error", ".0e"),
    Column("seconds difference", "time_error", ".0e"),
]
COSTS = [
    Column("per hour of recording", "name"),
    Column("core-seconds", "core_seconds", ".2f"),
    Column("MB read", "megabytes", ".1f"),
    Column("MB/s of one core", "core_bandwidth", ".1f"),
    Column("a million hours: core-hours", "core_hours", ",.0f"),
    Column("price", "price", ",.2f"),
    Column("TB read", "terabytes", ",.1f"),
    Column("cores that 1 GB/s feeds", "cores_per_gigabyte", ",.0f"),
    Column("if forward were free", "without_forward", ".1f"),
]


def make_recordings(
    signals: dict[str, np.ndarray], folder: Path, count: int, median: float, seed: int
) -> dict[str, int]:
    """
    Writes .npy files of signals (samples, 6).

    Args:
        median: minutes; lengths are log-normal around it, with a sigma of 0.8.

    Returns:
        samples of each recording, by id.
    """
    rng, folder = np.random.default_rng(seed), folder / "signals"
    folder.mkdir(exist_ok=True)
    sources, lengths = list(signals.values()), {}
    for index in range(count):
        length, pieces = max(SBHAR_FPS, int(60 * median * SBHAR_FPS * rng.lognormal(0, 0.8))), []
        while (missing := length - sum(map(len, pieces))) > 0:
            source = sources[rng.integers(len(sources))]
            start = rng.integers(len(source) // 2)
            pieces.append(source[start : start + missing])
        name = f"recording{index:04d}"
        np.save(folder / f"{name}.npy", np.concatenate(pieces))
        lengths[name] = length
    return lengths


def run_job(arguments: list, output: Path, kills: list[int], budget: float) -> dict:
    """
    Starts the example and kills a worker each time that as many parts as `kills` says are done.

    Returns:
        `wall` and `working` seconds (from the first part's start to the last one's end), `killed` processes and sums over
        parts.

    Raises:
        BenchmarkError: it failed, or there was nothing left to kill.
    """
    command = [sys.executable, str(ROOT / "examples" / "batch_inference.py"), *map(str, [*arguments, "--threads", 1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    started, killed, waiting = time.perf_counter(), set(), list(kills)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                if time.perf_counter() - started > budget:
                    raise BenchmarkError(f"{output.name} took more than {budget:.0f} s.")
                if waiting and len(list(output.glob("part-*.parquet"))) >= waiting[0]:
                    pid = next((pid for pid in find_workers(output) if pid not in killed | {process.pid}), None)
                    if pid is not None:
                        os.kill(pid, signal.SIGKILL)
                        killed.add(pid)
                        waiting.pop(0)
                time.sleep(0.02)
        finally:
            process.terminate()
            process.wait()
        wall = time.perf_counter() - started
        log.seek(0)
        if process.returncode or waiting:
            reason = (
                f"exit status {process.returncode}" if process.returncode else f"{len(waiting)} workers not killed"
            )
            raise BenchmarkError(f"{output.name}: {reason}:\n{log.read()[-3000:]}")
    parts = [json.loads(pq.read_metadata(path).metadata[b"batch_inference"]) for path in output.glob("part-*.parquet")]
    begun, ended = (pick(p["ended"] - k * p["stages"]["total"] for p in parts) for pick, k in ((min, 1), (max, 0)))
    stages = {name: sum(part["stages"].get(name, 0.0) for part in parts) for name in parts[0]["stages"]}
    return {"wall": wall, "working": ended - begun, "killed": len(killed), "parts": len(parts), "stages": stages}


def find_workers(output: Path) -> list[int]:
    """Processes that are at work on a part, as their own logs say."""
    found = []
    for path in sorted((output / "_job" / "attempts").glob("*")):
        with contextlib.suppress(FileNotFoundError, IndexError):
            found.append(int(path.read_text(encoding="utf-8").splitlines()[-1].split()[-1]))
    return found


def deliver(output: Path, lengths: dict[str, int]) -> dict[str, dict]:
    """
    The rows of a job by id.

    Raises:
        BenchmarkError: they are not those of all recordings, each once and without an error.
    """
    rows = pq.read_table(output).to_pylist()
    found = {row["id"]: row for row in rows}
    if len(rows) != len(lengths) or found.keys() != lengths.keys():
        raise BenchmarkError(f"{output.name}: {len(rows)} rows, {len(found)} ids; expected {len(lengths)}, each once.")
    if failed := [row for row in rows if row["error"] is not None]:
        raise BenchmarkError(f"{output.name}: {len(failed)} recordings failed: {failed[0]['error']}")
    return found


def compare(name: str, found: dict[str, dict], reference: dict[str, list[dict]]) -> dict[str, float]:
    """
    The largest differences from the segments of `reference`, in score and in seconds.

    Raises:
        BenchmarkError: there are other segments, or they are in another order.
    """
    errors = {"score_error": 0.0, "time_error": 0.0}
    for one, segments in reference.items():
        own = found[one]["segments"]
        if [segment["label"] for segment in own] != [segment["label"] for segment in segments]:
            raise BenchmarkError(f"{name}: other segments of {one}.")
        for key, error in (("score", "score_error"), ("start", "time_error"), ("end", "time_error")):
            differences = [abs(a[key] - b[key]) for a, b in zip(own, segments, strict=True)]
            errors[error] = max([errors[error], *differences])
    return errors


def localize_alone(model: Path, folder: Path, lengths: dict[str, int], count: int) -> dict[str, list[dict]]:
    """What the pipeline says of single recordings, the longest among them."""
    localize = pipeline("temporal-action-localization", model=str(model))
    names = sorted(lengths, key=lengths.get)[:: -max(1, len(lengths) // count)]
    return {name: localize({"signal": folder / f"{name}.npy"}) for name in names}


def describe(name: str, job: dict, hours: float, recordings: int, cores: int) -> dict:
    """A row of the first table. Shares are of the workers' time; reading goes on beside the forward pass."""
    stages, busy = job["stages"], cores * job["working"]
    return {
        "name": name,
        **job,
        "recordings": recordings,
        "hours": hours,
        "rate": recordings / job["working"],
        "hours_rate": hours / job["working"],
        "core_rate": hours / stages["cpu"],
        "read": stages["read"] / busy,
        "forward": stages["forward"] / busy,
        "nms": (stages["pipeline"] - stages["forward"]) / busy,
        "rest": 1 - stages["total"] / busy,
    }


def estimate(name: str, job: dict, hours: float, size: int, price: float) -> dict:
    """A row of the second table, from processor time and bytes of a job without Ray."""
    stages = job["stages"]
    seconds, megabytes = stages["cpu"] / hours, 1e-6 * size / hours
    # Processor time is not told apart by stage; elapsed time is, on a thread of its own for reading.
    share = stages["forward"] / (stages["pipeline"] + stages["read"])
    return {
        "name": name,
        "core_seconds": seconds,
        "megabytes": megabytes,
        "core_bandwidth": megabytes / seconds,
        "core_hours": 1e6 * seconds / 3600,
        "price": 1e6 * seconds / 3600 * price,
        "terabytes": megabytes,  # a million hours of MB
        "cores_per_gigabyte": 1000 * seconds / megabytes,
        "without_forward": seconds * (1 - share),
    }


def measure_reading(folder: Path) -> dict[str, float]:
    """MB/s of one thread reading .npy files, from the disk and from memory (where the last reading left them)."""
    files = sorted(folder.glob("*.npy"))
    size, rates = sum(path.stat().st_size for path in files), {}
    for name in ("disk", "memory"):
        if name == "disk":
            for path in files:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        for path in files:
            np.load(path, allow_pickle=False)
        rates[name] = 1e-6 * size / (time.perf_counter() - started)
    return rates


def make_wide(folder: Path, count: int, seed: int) -> tuple[Path, dict[str, int]]:
    """A model of random weights at THUMOS14's shape in `folder`/model, and features for it: a folder, and steps by id."""
    torch.manual_seed(seed)
    recipe = ROOT / "configuration" / "thumos14_i3d.yaml"
    ConvTransformerForTemporalActionLocalization(ConvTransformerConfig.from_yaml(recipe)).save_pretrained(
        folder / "model"
    )
    extractor = ConvTransformerFeatureExtractor.from_yaml(recipe)
    extractor.save_pretrained(folder / "model")
    rng, lengths = np.random.default_rng(seed), {}
    (folder / "features").mkdir()
    for index in range(count):
        steps = max(16, int(1200 * rng.lognormal(0, 0.8)))
        lengths[f"video{index:03d}"] = steps
        values = rng.normal(size=(steps, extractor.feature_size)).astype(np.float32)
        np.save(folder / "features" / f"video{index:03d}.npy", values)
    return folder / "features", lengths


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.npy"))


def run(options: argparse.Namespace):
    try:
        signals, _ = load_sbhar(options.data)
    except (OSError, ValueError) as error:
        raise BenchmarkError(str(error)) from error
    machine = harness.describe_machine()
    print(f"{harness.machine_line(machine)}; pyarrow {pa.__version__}", flush=True)
    model = options.model
    if model is None:  # enough training for scores that are sure of most things, as NMS meets them in earnest
        model = Path("outputs/batch_inference/model")
        arguments = [
            "--folder",
            options.data,
            "--seed",
            0,
            "--num_train_epochs",
            8,
            "--load_best_model_at_end",
            "false",
        ]
        run_once("train.py", model, arguments)
    rng = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        folder = Path(temporary)
        lengths = make_recordings(signals, folder, options.recordings, options.median, options.seed)
        hours, source = sum(lengths.values()) / SBHAR_FPS / 3600, folder / "signals"
        reading = measure_reading(source)
        print(f"{len(lengths)} recordings, {hours:.1f} h, {1e-6 * size_of(source):.0f} MB", flush=True)
        print("reading, one thread: " + ", ".join(f"{rate:.0f} MB/s from {name}" for name, rate in reading.items()))
        rows, costs, reference, parts = [], [], None, 0
        for name, arguments, cores, kills in (
            ("without Ray", [], 1, 0),
            ("Ray, 1 actor", ["--engine", "ray", "--num_actors", 1], 1, 0),
            ("Ray, 2 actors", ["--engine", "ray", "--num_actors", 2], 2, 0),
            ("Ray, 2 actors, killed twice", ["--engine", "ray", "--num_actors", 2], 2, 2),
        ):
            output = folder / name.replace(" ", "_").replace(",", "")
            arguments = [model, source, output, "--kind", "signal", "--part_steps", options.part_steps, *arguments]
            # The second one dies at least one tenth of the job after the first.
            moments = sorted((rng.choice(np.arange(1, 9), size=kills, replace=False) * parts // 10).tolist())
            job = run_job(arguments, output, moments, options.budget)
            found, same = deliver(output, lengths), {"once": "yes"}
            if reference is None:
                alone = localize_alone(model, source, lengths, 20)
                away, longest = compare(name, found, alone), max(lengths.values()) / SBHAR_FPS
                print(
                    f"{len(alone)} of them alone in the pipeline (the longest: {longest:.0f} s): the same segments up to "
                    f"{away['score_error']:.0e} in score and {away['time_error']:.0e} s",
                    flush=True,
                )
                reference, parts = {one: row["segments"] for one, row in found.items()}, job["parts"]
                costs.append(estimate("SBHAR, 1.9 M parameters", job, hours, size_of(source), options.price))
            else:
                same |= compare(name, found, reference)
            rows.append({**describe(name, job, hours, len(lengths), cores), **same})
            deaths = ", killed when {} of {} parts were done".format(" and ".join(map(str, moments)), parts) * bool(
                moments
            )
            print(f"{name}: {job['wall']:.0f} s{deaths}", flush=True)
        if options.wide:
            source, lengths = make_wide(folder, options.wide, options.seed)
            extractor = ConvTransformerFeatureExtractor.from_pretrained(folder / "model")
            hours = sum(lengths.values()) * extractor.feature_stride / extractor.fps / 3600
            job = run_job([folder / "model", source, folder / "wide"], folder / "wide", [], options.budget)
            deliver(folder / "wide", lengths)
            rows.append({**describe("without Ray, THUMOS14's shape", job, hours, len(lengths), 1), "once": "yes"})
            costs.append(estimate("THUMOS14's shape, I3D features", job, hours, size_of(source), options.price))
    print()
    harness.print_table(rows, JOBS)
    print(f"\nAt {options.price} for a core-hour:\n")
    harness.print_table(costs, COSTS)
    harness.write_json(options.json, machine, options, rows, costs=costs, reading=reading)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of SBHAR, as data.load_sbhar reads it")
    parser.add_argument(
        "--model", type=Path, help="trained with configuration/sbhar.yaml (default: trains one, 1 minute)"
    )
    parser.add_argument("--recordings", type=int, default=1000)
    parser.add_argument("--median", type=float, default=4.0, help="minutes of a recording (default: 4)")
    parser.add_argument("--wide", type=int, default=24, help="recordings at THUMOS14's shape, 0: none (default: 24)")
    parser.add_argument("--part_steps", type=int, default=16384, help="of the example (default: 16384)")
    parser.add_argument(
        "--price", type=float, default=0.05, help="of a core-hour; an example, not an offer (default: 0.05)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of lengths, signals and the moments of killing")
    parser.add_argument("--budget", type=float, default=1800, help="seconds that one job may take (default: 1800)")
    parser.add_argument("--work", type=Path, help="folder for temporary files, about 0.5 GB (default: the system's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, arguments and every row here")
    options = parser.parse_args()
    try:
        harness.check_outputs(options)
        if options.recordings < 1 or options.median <= 0 or options.wide < 0:
            raise BenchmarkError("--recordings, --median and --wide must be positive (--wide may be 0).")
        run(options)
    except BenchmarkError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
