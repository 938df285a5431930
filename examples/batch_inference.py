"""Localize actions in many recordings: a folder or parquet of features in, a folder of parquet out, each recording once.

    python examples/batch_inference.py outputs/watch/model features/ found/
    python examples/batch_inference.py outputs/watch/model recordings.parquet found/ --engine ray --num_actors 8
    python examples/batch_inference.py me/my-model signals/ found/ --kind signal --engine ray --address auto --gpus_per_actor 1

INPUT is a folder of .npy, .npz and .safetensors files (the id of a recording is its path in the folder without suffix), or
parquet, a file or a folder, with a column `id` and either the values (`features`, or `signal` with --kind signal: nested
lists, or flat ones in order of time) or `path`; any of fps, feature_stride, num_frames, duration, steps may stand beside.

OUTPUT gets part-*.parquet with a row for each recording: id, segments [{label, score, start, end}] (seconds, best first),
error (null, or why there are no segments), seconds, steps, model. `pandas.read_parquet(OUTPUT)` reads it all.

A killed job goes on with the same command, and so does one whose INPUT has grown. docs/scaling.md says what is guaranteed.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging as python_logging
import math
import os
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from tqdm import tqdm
from transformers import logging, pipeline

SUFFIXES = (".npy", ".npz", ".safetensors")
GEOMETRY = ("fps", "feature_stride", "num_frames", "duration")

SEGMENT = pa.struct([("label", pa.string()), *((name, pa.float32()) for name in ("score", "start", "end"))])
OUTPUT = pa.schema(
    [
        ("id", pa.string()),
        ("segments", pa.list_(SEGMENT)),  # null where there is an error: not the same as nothing found
        ("error", pa.string()),
        ("seconds", pa.float64()),
        ("steps", pa.int64()),
        ("model", pa.string()),
    ]
)
# A recording as the plan holds it: in a file of its own, or in a row of a row group of a parquet file.
PLAN = pa.schema(
    [
        ("part", pa.string()),
        ("id", pa.string()),
        ("file", pa.string()),
        ("row_group", pa.int64()),
        ("row", pa.int64()),
        ("steps", pa.int64()),  # features, 0 where that could not be read
        *((name, pa.float64()) for name in GEOMETRY),
    ]
)
METADATA = b"batch_inference"  # where a part's own times stand

# After this many attempts that never ended, the recordings of a part run alone; and one that then takes the process down
# as often is a failed recording. Else one recording that is too large for memory would be tried for ever.
ATTEMPTS = 2

# Errors of a device that is broken from then on, whatever recording comes next. (Its being out of memory is not one.)
FATAL = getattr(torch, "AcceleratorError", ())


# ---------------------------------------------------------------------------------------------------------------------
# What there is to do


def count_steps(path: Path) -> int:
    """Length of the first axis of a file's array, from its header alone. Raises whatever its reader raises."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            return file.get_slice(_pick(file.keys())).get_shape()[0]
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy"): name for name in archive.namelist()}
            with archive.open(names[_pick(names)]) as file:
                version = np.lib.format.read_magic(file)
                read = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                return read(file)[0][0]
    return np.load(path, mmap_mode="r", allow_pickle=False).shape[0]


def _pick(keys: Iterable[str]) -> str:
    """The array that the feature extractor takes."""
    keys = list(keys)
    return next((key for key in ("features", "feats") if key in keys), keys[0])


def scan(source: Path, kind: str, id_column: str, known: set[str]) -> Iterator[list[dict]]:
    """
    All recordings of INPUT in lists of what is best read together: one file, or a row group of parquet.

    Args:
        known: ids whose length is not looked up, because the plan has it.

    Raises:
        ValueError: nothing that can be read, or columns that are missing; the message names the file.
    """
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if _is_visible(path, source))
    tables = [path for path in files if path.suffix == ".parquet"]
    arrays = [path for path in files if path.suffix in SUFFIXES]
    if bool(tables) == bool(arrays):
        found = f"{len(tables)} .parquet files and {len(arrays)} of {', '.join(SUFFIXES)}"
        raise ValueError(f"{source} holds {found}; expected one of both kinds: parquet, or files of arrays.")
    for path in arrays:
        name = path.relative_to(source).with_suffix("").as_posix() if path != source else path.stem
        yield [{"id": name, "file": str(path), "steps": 0 if name in known else _try_count(path)}]
    for path in tables:
        yield from _scan_parquet(path, kind, id_column, known)


def _is_visible(path: Path, folder: Path) -> bool:
    """Not one of those that readers of parquet folders pass over too, such as Spark's _SUCCESS."""
    return path.is_file() and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)


def _try_count(path: Path) -> int:
    try:
        return count_steps(path)
    except Exception:  # whatever is wrong with it, reading it in earnest will say so in its row of the output
        return 0


def _scan_parquet(path: Path, kind: str, id_column: str, known: set[str]) -> Iterator[list[dict]]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is no readable parquet file ({error}); repair it or take it out of INPUT."
        ) from error
    with file:
        names = file.schema_arrow.names
        sources = [name for name in (kind, "path") if name in names]
        if id_column not in names or len(sources) != 1:
            raise ValueError(
                f"{path} has the columns {', '.join(names)}; expected {id_column!r} (--id_column) and either {kind!r} "
                "(--kind) or 'path'."
            )
        inline = sources == [kind]
        columns = [name for name in (id_column, "steps", "path", "geometry", *GEOMETRY) if name in names]
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=columns).to_pylist()
            if None in (ids := [row[id_column] for row in rows]):
                raise ValueError(
                    f"{path}: row {ids.index(None)} of row group {group} has no {id_column}; give each one."
                )
            lengths = [row.get("steps") for row in rows]
            if inline and None in lengths and not known.issuperset(map(str, ids)):
                # (the only way to a list's length; a column `steps` spares it)
                lengths = [_count_row(value) for value in _column(file, group, kind)]
            unit = []
            for row, (values, length) in enumerate(zip(rows, lengths, strict=True)):
                one = {"id": str(values[id_column]), "file": str(path)}
                if inline:
                    one |= {"row_group": group, "row": row}
                else:
                    one["file"] = str(path.parent / (values["path"] or ""))  # (an absolute path stays as it is)
                    length = length or (0 if one["id"] in known else _try_count(Path(one["file"])))
                geometry = {**(values.get("geometry") or {}), **values}
                one |= {name: geometry[name] for name in GEOMETRY if geometry.get(name) is not None}
                unit.append({**one, "steps": length or 0})
            yield from [unit] if inline else ([one] for one in unit)


def _column(file: pq.ParquetFile, group: int, name: str) -> pa.Array:
    column = file.read_row_group(group, columns=[name]).column(0).combine_chunks()
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column.storage if isinstance(column, pa.ExtensionArray) else column  # datasets' Array2D


def _count_row(value: pa.Scalar) -> float:
    """Steps of a nested list; values of a flat one, as a negative number: `plan` knows how wide a step is."""
    if not value.is_valid:
        return 0
    return len(value.values) if _is_list(value.values.type) else -len(value.values)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def to_array(value: pa.Scalar, width: int) -> np.ndarray:
    """
    A row's list as (time, `width`); a flat list is filled in order of time.

    Raises:
        ValueError: an empty row, steps of different widths, or a flat list that holds no whole number of steps.
    """
    if not value.is_valid:
        raise ValueError("the row is null; expected a list of numbers.")
    values, steps = value.values, None
    if _is_list(values.type):
        steps = len(values)
        widths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(widths) > 1:
            raise ValueError(f"steps of different widths ({widths[:5]}); expected {width} numbers each.")
        values = values.flatten()
    numbers = values.to_numpy(zero_copy_only=False)  # nulls become NaN, which the feature extractor refuses
    if steps is None:
        if len(numbers) % width:
            raise ValueError(f"a flat list of {len(numbers)} numbers; expected a multiple of the width, {width}.")
        steps = len(numbers) // width
    return numbers.reshape(steps, -1) if steps else np.zeros((0, width))


def make_parts(units: Iterable[list[dict]], part_steps: int) -> Iterator[list[dict]]:
    """Units one after the other, until a part has `part_steps` steps."""
    part, size = [], 0
    for unit in units:
        part.extend(unit)
        size += sum(max(1, one["steps"]) for one in unit)
        if size >= part_steps:
            yield part
            part, size = [], 0
    if part:
        yield part


def plan(options: argparse.Namespace, folder: Path, feature_extractor) -> dict[str, list[dict]]:
    """
    Which recordings belong to which part, longest first. It is written down once and only ever added to: were it made
    anew for what is left after a crash, a worker of the killed job that ends a moment later could still deliver a part of
    the old plan, and its recordings would be there twice.

    Raises:
        ValueError: no recordings, or two with one id.
    """
    path = folder / "plan.parquet"
    rows = pq.read_table(path).to_pylist() if path.exists() else []
    known = {row["id"] for row in rows}
    units = list(scan(options.input.resolve(), options.kind, options.id_column, known))
    ids = Counter(one["id"] for unit in units for one in unit)
    if twice := [name for name, count in ids.items() if count > 1]:
        raise ValueError(
            f"{options.input}: {len(twice)} ids stand for several recordings, such as {', '.join(map(repr, twice[:5]))}; "
            "expected each once (for files, the path without its suffix is the id)."
        )
    if not ids:
        raise ValueError(f"{options.input} holds no recordings.")
    new = [[one for one in unit if one["id"] not in known] for unit in units]
    new = [unit for unit in new if unit]
    for one in (one for unit in new for one in unit):
        one["steps"] = _to_steps(one, options.kind, feature_extractor)
    # A file can be read alone, so files of like length share a part; row groups are read in the order of their files.
    new.sort(key=lambda unit: -unit[0]["steps"] if len(unit) == 1 and "row" not in unit[0] else 0)
    for part in make_parts(new, options.part_steps):
        # Named by what is in it: done again, a part takes its own place, wherever and whenever that happens.
        name = f"part-{hashlib.sha256(chr(10).join(one['id'] for one in part).encode()).hexdigest()[:16]}.parquet"
        rows += [{**one, "part": name} for one in part]
    table = pa.Table.from_pylist(rows, schema=PLAN)
    if new:
        write_parquet(table, path)
    parts: dict[str, list[dict]] = {}
    for row in table.to_pylist():
        parts.setdefault(row["part"], []).append(row)
    return parts


def _to_steps(recording: dict, kind: str, feature_extractor) -> int:
    """Features of a recording, from the length of its array."""
    geometry = {name: recording.get(name) or getattr(feature_extractor, name) for name in GEOMETRY[1:3]}
    length, width = recording["steps"], value_width(feature_extractor, kind, geometry["num_frames"])
    if length < 0:
        length = -length // max(1, width)
    if kind == "signal":
        length = math.floor((length - geometry["num_frames"]) / geometry["feature_stride"]) + 1
    return max(0, length)


def value_width(feature_extractor, kind: str, num_frames: float) -> int:
    """Numbers in one step of what a recording holds."""
    return feature_extractor.feature_size // (1 if kind == "features" else int(num_frames))


# ---------------------------------------------------------------------------------------------------------------------
# Doing it: the same for both engines


class Localizer:
    """
    A warm model that does one part after the other: reads its recordings, finds their segments, writes its file.

    Args:
        job: `model`, `revision`, `fingerprint`, `device`, `dtype`, `threads`, `output`, `kind`, `batch_steps`, `window`,
            `settings` (of post-processing), `id_column`.
        localize: the pipeline, if it is there already.

    Raises:
        ValueError: the model is not the one of `fingerprint`.
    """

    def __init__(self, job: dict, localize=None):
        if job["threads"]:
            torch.set_num_threads(job["threads"])
        logging.disable_progress_bar()
        self.job, self.output = job, Path(job["output"])
        self.localize = localize or load_pipeline(job)
        if fingerprint(self.localize) != job["fingerprint"]:
            raise ValueError(
                f"The model {job['model']} is another one here than where the job was started; put the same folder on all "
                "machines, or give a --revision."
            )
        self.seconds = Counter()
        self.localize.model.register_forward_pre_hook(lambda *_: self._begin_forward())
        self.localize.model.register_forward_hook(lambda *_: self._end_forward())

    def __call__(self, part: dict) -> dict:
        """
        Args:
            part: its `name`, and its `recordings` as rows of the plan.

        Returns:
            the `name`, and how many `recordings` it has and how many of them `failed`.
        """
        path = self.output / part["name"]
        if (known := read_summary(path)) is None:
            self.seconds, started, cpu = Counter(), time.perf_counter(), time.process_time()
            log = Attempts(self.output / "_job" / "attempts" / part["name"])
            try:
                results = (
                    self._run_alone(part["recordings"], log) if log.count > ATTEMPTS else self._run(part["recordings"])
                )
            except KeyboardInterrupt:
                log.withdraw()
                raise
            self.seconds |= {"total": time.perf_counter() - started, "cpu": time.process_time() - cpu}
            failed = sum("error" in row for row in results)
            known = {"recordings": len(results), "failed": failed, "ended": time.time(), "stages": self.seconds}
            table = pa.Table.from_pylist(sorted(results, key=lambda row: row["id"]), schema=OUTPUT)
            write_parquet(table.replace_schema_metadata({METADATA: json.dumps(known)}), path)
            log.close()
        return {"name": part["name"], "recordings": known["recordings"], "failed": known["failed"]}

    def _run(self, recordings: list[dict]) -> list[dict]:
        """Batch after batch; the next one is read while the model works."""
        batches, rows, tables = make_batches(recordings, self.job["batch_steps"], self._width, self._is_exact), [], {}
        with ThreadPoolExecutor(max_workers=1) as reader:
            following = reader.submit(self._read, batches[0], tables)
            for index in range(len(batches)):
                loaded = following.result()
                if index + 1 < len(batches):
                    following = reader.submit(self._read, batches[index + 1], tables)
                found = iter(self._localize([sample for _, sample in loaded if not isinstance(sample, str)]))
                rows += [self._row(one, s, s if isinstance(s, str) else next(found)) for one, s in loaded]
        return rows

    def _run_alone(self, recordings: list[dict], log: "Attempts") -> list[dict]:
        """One after the other, so that it is known which one was at work when the process died."""
        rows = []
        for one in recordings:
            if log.deaths(one["id"]) >= ATTEMPTS:
                error = (
                    f"The process died {ATTEMPTS} times while it worked on this recording alone, likely out of memory. Give "
                    "--window, or a machine with more memory, and --retry_failed."
                )
                rows.append(self._row(one, error, error))
                continue
            log.begin(one["id"])
            try:
                rows += self._run([one])
            finally:  # whoever gets here did not die
                log.end(one["id"])
        return rows

    def _read(self, batch: list[dict], tables: dict) -> list[tuple[dict, dict | str]]:
        """Each recording as a sample, checked, or what is wrong with it."""
        started, loaded = time.perf_counter(), []
        for one in batch:
            try:
                geometry = {name: one[name] for name in GEOMETRY if one[name] is not None}
                values = one["file"] if one["row"] is None else self._read_row(one, geometry, tables)
                name = one["file"] if one["row"] is None else one["id"]
                sample = {self.job["kind"]: values, **geometry}
                features, geometry = self.localize.feature_extractor.load(sample, name)
                loaded.append((one, {"features": features, **geometry}))
            except Exception as error:  # one bad recording costs itself, not its batch and not the job
                loaded.append((one, describe(error)))
        self.seconds["read"] += time.perf_counter() - started
        return loaded

    def _read_row(self, recording: dict, geometry: dict, tables: dict) -> np.ndarray:
        """From a row group, which is read once: all of its recordings belong to one part."""
        key, row = (recording["file"], recording["row_group"]), recording["row"]
        if key not in tables:
            with pq.ParquetFile(key[0]) as file:
                tables[key] = [_column(file, key[1], name) for name in (self.job["id_column"], self.job["kind"])]
        ids, column = tables[key]
        if row >= len(ids) or str(ids[row].as_py()) != recording["id"]:
            raise ValueError(
                f"{key[0]} has changed since the job was planned: row {row} of row group {key[1]} is another one. Give a new "
                "OUTPUT."
            )
        extractor = self.localize.feature_extractor
        width = value_width(extractor, self.job["kind"], geometry.get("num_frames", extractor.num_frames))
        return to_array(column[row], max(1, width))

    def _localize(self, samples: list[dict]) -> list[list[dict] | str]:
        """Segments of each sample; if their batch fails, one by one, and then what went wrong."""
        if not samples:
            return []
        started, window, batch_size = time.perf_counter(), self.job["window"], len(samples)
        if window:  # batches of windows, which may be of different lengths
            batch_size = max(1, self.job["batch_steps"] // window) if self._is_exact else 1
        try:
            return self.localize(samples, batch_size=batch_size, **call_arguments(self.job))
        except FATAL:
            raise
        except Exception as error:
            failure = describe(error)  # only its words: an exception holds the tensors of its batch in memory
        finally:
            self.seconds["pipeline"] += time.perf_counter() - started
        return [failure] if len(samples) == 1 else [self._localize([one])[0] for one in samples]

    def _row(self, recording: dict, sample: dict | str, found: list[dict] | str) -> dict:
        row = {"id": recording["id"], "model": self.job["fingerprint"]}
        if not isinstance(sample, str):
            steps, end = len(sample["features"]), sample["duration"]
            if end is None:
                end = ((steps - 1) * sample["feature_stride"] + sample["num_frames"]) / sample["fps"]
            row |= {"steps": steps, "seconds": end}
        return {**row, "error": found} if isinstance(found, str) else {**row, "segments": found}

    def _begin_forward(self):
        self.forward_began = time.perf_counter()

    def _end_forward(self):
        if self.localize.device.type == "cuda":  # whose calls return before their work is done
            torch.cuda.synchronize(self.localize.device)
        self.seconds["forward"] += time.perf_counter() - self.forward_began

    @property
    def _is_exact(self) -> bool:
        """Whether a sample's result does not depend on what it is padded to. (v1's padding leaks.)"""
        return self.localize.model.config.mask_conv_inputs

    def _width(self, steps: int) -> int:
        """What the feature extractor makes of a length."""
        extractor = self.localize.feature_extractor
        if extractor.min_length is not None and steps <= extractor.min_length:
            return extractor.min_length
        multiple = extractor.pad_to_multiple_of or 1
        return math.ceil(steps / multiple) * multiple


def make_batches(
    recordings: list[dict], batch_steps: int, width: Callable[[int], int], mixed: bool = True
) -> list[list[dict]]:
    """
    Recordings by length, in batches whose count times the longest is at most `batch_steps` (or that hold one recording).

    Args:
        width: from steps to padded steps.
        mixed: whether recordings of different widths may share a batch.
    """
    batches, last = [], None
    for one in sorted(recordings, key=lambda one: (one["steps"], one["id"])):
        own = width(one["steps"])
        if batches and (len(batches[-1]) + 1) * own <= batch_steps and (mixed or own == last):
            batches[-1].append(one)
        else:
            batches.append([one])
        last = own
    return batches


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class Attempts:
    """What was begun and not ended of a part, in a file that outlives the process: opening it counts an attempt."""

    def __init__(self, path: Path):
        self.path = path
        self._write(f"attempt {os.uname().nodename} {os.getpid()}")
        self.lines = Counter(path.read_text(encoding="utf-8").splitlines())
        attempts = sum(count for line, count in self.lines.items() if line.startswith("attempt "))
        self.count = attempts - self.lines["withdrawn"]

    def withdraw(self):
        """Somebody stopped the process: nothing that the part did."""
        self._write("withdrawn")

    def begin(self, name: str):
        self._write("begin " + json.dumps(name))

    def end(self, name: str):
        self._write("end " + json.dumps(name))

    def deaths(self, name: str) -> int:
        return self.lines["begin " + json.dumps(name)] - self.lines["end " + json.dumps(name)]

    def close(self):
        self.path.unlink(missing_ok=True)

    def _write(self, line: str):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def write_parquet(table: pa.Table, path: Path):
    """All or nothing: a reader never sees half a file, whenever the process or the machine stops."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    with temporary.open("wb") as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_summary(path: Path) -> dict | None:
    """What a finished part says of itself, or None where there is no such (whole) part."""
    try:
        return json.loads(pq.read_metadata(path).metadata[METADATA])
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowInvalid):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# The model


def load_pipeline(job: dict):
    """The pipeline of a job, in whatever process: Ray's workers import nothing at the top of this file."""
    import modeling_convtransformer  # noqa: F401 - registers the pipeline

    logging.disable_progress_bar()
    return pipeline(
        "temporal-action-localization",
        model=job["model"],
        revision=job["revision"],
        device=job["device"],
        dtype=job["dtype"],
    )


def call_arguments(job: dict) -> dict:
    """What the pipeline is told in each call."""
    return {**job["settings"], **({"window": job["window"]} if job["window"] else {})}


def fingerprint(localize) -> str:
    """Changes with any weight, any field of the config and any setting of the feature extractor."""
    config = {**localize.model.config.to_dict(), "_name_or_path": None, "transformers_version": None, "dtype": None}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(json.dumps(localize.feature_extractor.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(localize.model.state_dict().items()):
        digest.update(name.encode())
        # Quantized weights consist of several tensors.
        parts = (
            [getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]]
            if hasattr(tensor, "qdata")
            else [tensor]
        )
        for part in parts:
            digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Engines


def run_local(job: dict, parts: list[dict], localize, options: argparse.Namespace) -> Iterator[dict]:
    """In this process."""
    worker = Localizer(job, localize)
    for part in parts:
        yield worker(part)


def run_ray(job: dict, parts: list[dict], localize, options: argparse.Namespace) -> Iterator[dict]:
    """
    As a Ray Data job with a pool of actors. Ray starts an actor that died again, and gives its part to another one.

    Ray Data's own checkpoints (`DataContext.checkpoint_config`) are not used: they remember rows in files of their own
    beside what is written, for plans that begin with a reader and end with a writer of Ray. Here a part's file is its own
    checkpoint, so that there are no two things to agree after a crash, and a job that was begun with one engine goes on
    with the other.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError(
            f'--engine ray needs Ray: pip install "modeling-convtransformer[batch]" ({error}).'
        ) from error

    own = options.address is None and "RAY_ADDRESS" not in os.environ
    cpus = max(1, options.threads or 1)
    start = {"num_cpus": (options.num_actors or max(1, os.cpu_count() // cpus)) * cpus, "include_dashboard": False}
    start |= {"object_store_memory": 200 * 2**20}  # results do not pass through it
    ray.init(address=options.address, log_to_driver=False, logging_level="ERROR", **(start if own else {}))
    try:
        there = ray.cluster_resources()
        per = {"CPU": cpus, **({"GPU": options.gpus_per_actor} if options.gpus_per_actor else {})}
        fits = math.floor(min(there.get(name, 0) / need for name, need in per.items()) + 1e-6)  # 1 // 0.2 is 4
        actors = options.num_actors or fits
        if not 1 <= actors <= fits:
            raise ValueError(
                f"{actors} actors of {cpus} CPUs and {options.gpus_per_actor or 0} GPUs each do not fit in a cluster of "
                f"{there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs; set --num_actors, --threads, --gpus_per_actor."
            )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_consecutive_actor_init_deaths = 10  # killed while it loads the model is killed, too
        python_logging.getLogger("ray.data._internal.execution").setLevel("ERROR")
        # A block is what is retried; beyond some thousands, blocks cost more than doing a part's neighbours twice, which
        # are skipped where they are done.
        items = ray.data.from_items(parts, override_num_blocks=min(len(parts), 4096))
        done = items.map(
            Localizer,
            fn_constructor_args=(job,),
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
            num_cpus=cpus,
            num_gpus=options.gpus_per_actor or None,
        )
        yield from done.iter_rows()
    except ray.exceptions.RayError as error:
        raise ValueError(
            f"Ray stopped the job: {str(error).strip().splitlines()[-1]}. What is done stays; the same command goes on."
        ) from error
    finally:
        ray.shutdown()


ENGINES = {"local": run_local, "ray": run_ray}


# ---------------------------------------------------------------------------------------------------------------------
# The job


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds the output folder while the job runs. The system lets go of it when the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{folder.parent}: another run is writing here; wait for it, stop it, or give another OUTPUT."
            ) from error
        except OSError as error:
            raise ValueError(
                f"{folder.parent}: its file system has no locks ({error.strerror}), without which two runs could write the "
                "same output; give an OUTPUT on another one."
            ) from error
        yield


def check_manifest(folder: Path, manifest: dict):
    """
    Raises:
        ValueError: the folder holds the output of other settings; the message says which.
    """
    path = folder / "job.json"
    if not (folder / "plan.parquet").exists():  # nothing has been done yet
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return
    theirs = json.loads(path.read_text(encoding="utf-8"))
    differ = [name for name in {**theirs, **manifest} if theirs.get(name) != manifest.get(name)]
    if differ:
        changes = "; ".join(f"{name} was {theirs.get(name)!r}, now {manifest.get(name)!r}" for name in differ)
        raise ValueError(
            f"{folder.parent} holds the output of another job: {changes}. Give another OUTPUT, or the same settings to go on."
        )


def verify(output: Path, parts: dict[str, list[dict]]) -> tuple[dict[str, str], list[str]]:
    """
    Reads what was written: each id of the plan must be there once, and no other.

    Returns:
        errors of the recordings that failed, by id; and what is wrong with the output, one line each.
    """
    problems, errors, seen = [], {}, Counter()
    for path in sorted(output.glob("*.parquet")):
        if path.name not in parts:
            problems.append(f"{path.name} is no part of this job; remove it")
        try:
            table = pq.read_table(path, columns=["id", "error"])
        except (OSError, pa.ArrowInvalid) as error:
            problems.append(f"{path.name} cannot be read ({error}); remove it and run again")
            continue
        seen.update(table["id"].to_pylist())
        failed = table.filter(pc.is_valid(table["error"]))
        errors |= dict(zip(failed["id"].to_pylist(), failed["error"].to_pylist(), strict=True))
    planned = Counter(one["id"] for recordings in parts.values() for one in recordings)
    for word, names in (
        ("missing", planned - seen),
        ("there twice", [name for name, count in seen.items() if count > 1]),
        ("not in INPUT", [name for name in seen if name not in planned]),
    ):
        if names:
            problems.append(f"{len(names)} recordings are {word}, such as {', '.join(map(repr, list(names)[:5]))}")
    return errors, problems


def report_times(output: Path, parts: Iterable[str]) -> str:
    """Where the workers' time went, over all runs of this job."""
    stages = Counter()
    for name in parts:
        stages.update((read_summary(output / name) or {}).get("stages", {}))
    names = {"read": stages["read"], "forward": stages["forward"], "NMS": stages["pipeline"] - stages["forward"]}
    shares = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in names.items())
    return f"{stages['total']:.1f} s of workers' time: {shares} (files are read while the model works)"


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder written by save_pretrained, or a model on the Hub")
    parser.add_argument("input", type=Path, metavar="INPUT", help="folder of arrays, or parquet (file or folder)")
    parser.add_argument(
        "output", type=Path, metavar="OUTPUT", help="folder of the parquet parts, new or of the same job"
    )
    parser.add_argument("--engine", choices=ENGINES, default="local", help="local: this process (default: local)")
    parser.add_argument("--kind", choices=["features", "signal"], default="features", help="what recordings hold")
    parser.add_argument("--id_column", default="id", help="of parquet (default: id)")
    parser.add_argument("--revision", help="of a model on the Hub")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cpu, or cuda with --gpus_per_actor)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's")
    parser.add_argument("--threads", type=int, help="of torch, and CPUs, for each process (default: 1 with ray)")
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--batch_steps", type=int, default=16384, help="features in a batch (default: 16384)")
    sizes.add_argument(
        "--part_steps", type=int, default=65536, help="features in a part, what a killed worker loses (default: 65536)"
    )
    sizes.add_argument("--window", type=int, help="run longer recordings in windows of this many features")
    cluster = parser.add_argument_group("ray")
    cluster.add_argument("--num_actors", type=int, help="workers with a model each (default: as many as fit)")
    cluster.add_argument("--gpus_per_actor", type=float, default=0, help="1, or a share such as 0.25 (default: 0)")
    cluster.add_argument("--address", help="of a cluster, such as auto (default: RAY_ADDRESS, or a Ray of its own)")
    found = parser.add_argument_group("what is kept (default: as the checkpoint says)")
    found.add_argument("--threshold", type=float, help="only segments with a score above this")
    found.add_argument("--top_k", type=int, help="at most this many segments of each recording")
    found.add_argument(
        "--settings", type=json_object, default={}, help='more of post-processing\'s: {"nms_method": "hard"}'
    )
    again = parser.add_argument_group("failures")
    again.add_argument("--retry_failed", action="store_true", help="do parts with failed recordings again")
    again.add_argument("--strict", action="store_true", help="exit status 1 if any recording failed")
    options = parser.parse_args(argv)
    for name in ("threads", "batch_steps", "part_steps", "window", "num_actors"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} is {value}; expected a positive number.")
    if options.gpus_per_actor < 0:
        parser.error(f"--gpus_per_actor is {options.gpus_per_actor}; expected 0 or more.")
    for path in (options.input, options.output):
        if "://" in str(path) or ":/" in str(path):
            parser.error(f"{path} is no folder: give a mounted one (see docs/scaling.md).")
    if not options.input.exists():
        parser.error(f"there is no {options.input}")
    if options.output.resolve().is_relative_to(options.input.resolve()):
        parser.error(
            f"OUTPUT {options.output} lies in INPUT {options.input}: the next run would read it. Choose another."
        )
    given = {name: getattr(options, name) for name in ("threshold", "top_k") if getattr(options, name) is not None}
    options.settings = {**options.settings, **given}
    return parser, options


def run(options: argparse.Namespace) -> int:
    """
    Runs or goes on with the job.

    Returns:
        exit status: 0, or 1 if the output is not what it should be (or recordings failed, with --strict).

    Raises:
        ValueError: input, settings or an output folder that cannot be used.
    """
    taken = ("model", "revision", "dtype", "threads", "kind", "id_column", "window", "batch_steps", "settings")
    job = {name: getattr(options, name) for name in taken}
    job["device"] = options.device or ("cuda" if options.gpus_per_actor else "cpu")
    job["output"] = str(options.output.resolve())
    if Path(job["model"]).exists():
        job["model"] = str(Path(job["model"]).resolve())
    if options.engine == "ray" and job["threads"] is None:
        job["threads"] = 1
    # With Ray, this process needs the model only to know which one it is.
    localize = load_pipeline(job if options.engine == "local" else {**job, "device": "cpu"})
    try:  # a setting that is wrong for all of them is no error of each recording
        localize({"features": np.zeros((1, localize.feature_extractor.feature_size))}, **call_arguments(job))
    except TypeError as error:
        raise ValueError(f"--settings: {error}") from error
    job["fingerprint"] = fingerprint(localize)
    manifest = {name: job[name] for name in ("fingerprint", "dtype", "kind", "id_column", "window", "settings")}
    folder = options.output / "_job"  # readers of parquet folders pass over names with an underscore
    if not folder.exists() and options.output.exists() and (others := sorted(options.output.iterdir())):
        raise ValueError(
            f"{options.output} holds {len(others)} other things ({others[0].name}, ...) and no job of this script; give a new "
            "folder as OUTPUT."
        )
    with lock(folder):
        check_manifest(folder, {"input": str(options.input.resolve()), **manifest})
        parts = plan(options, folder, localize.feature_extractor)
        remove_leftovers(options.output)
        summaries = {name: read_summary(options.output / name) for name in parts}
        if options.retry_failed:
            for name in [name for name, summary in summaries.items() if summary and summary["failed"]]:
                (options.output / name).unlink()
                summaries[name] = None
        open_parts = [{"name": name, "recordings": parts[name]} for name in parts if summaries[name] is None]
        total, left = (sum(map(len, some)) for some in (parts.values(), (one["recordings"] for one in open_parts)))
        print(f"{total} recordings in {len(parts)} parts; {total - left} are done, {left} to do", flush=True)
        if open_parts:
            if options.engine == "ray":
                localize = None
            progress = tqdm(total=left, unit="recording", disable=None)
            failed = 0
            for summary in ENGINES[options.engine](job, open_parts, localize, options):
                failed += summary["failed"]
                progress.set_postfix(failed=failed, refresh=False)
                progress.update(summary["recordings"])
            progress.close()
            print(report_times(options.output, parts))
        remove_leftovers(options.output)
        errors, problems = verify(options.output, parts)
    for problem in problems:
        print(f"WRONG: {problem}", file=sys.stderr)
    if not problems:
        print(f"Verified: each of {total} recordings is in {options.output} exactly once.")
    if errors:
        print(f"{len(errors)} failed (column `error`; --retry_failed tries them again):")
        for name, error in sorted(errors.items())[:20]:
            print(f"  {name}: {error}")
        if len(errors) > 20:
            print(f"  and {len(errors) - 20} more")
    return int(bool(problems or (errors and options.strict)))


def remove_leftovers(output: Path):
    """Half-written parts of workers that were killed."""
    for path in output.glob(".part-*"):
        path.unlink(missing_ok=True)


def json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a JSON object.")
    return value


def main():
    parser, options = parse_arguments()
    try:
        status = run(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "\nStopped. What is done stays; the same command goes on.\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
