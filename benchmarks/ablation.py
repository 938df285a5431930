"""Ablation: position encodings at the trained length, two and four times as long; norms; MLPs; and what each costs.

    python benchmarks/ablation.py SBHAR_FOLDER
    python benchmarks/ablation.py SBHAR_FOLDER --tasks --repeats 30 --threads 1    (only what they cost)

Models of configuration/watch.yaml and configuration/sbhar.yaml, smaller and trained for fewer steps, with global
attention where a row names no window, train on random pieces of --length features, which is their `max_len`. The recordings of people whom they never saw are put one after
another and cut into pieces of one, two and four times that length: the same material at every length. Each run (a task, a
row, a seed) is a JSON file in --output; what is there is not repeated. Average mAP (tIoU 0.3 to 0.7) in percent, mean and
standard deviation over seeds.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import torch
import yaml
from harness import BenchmarkError, Column
from tqdm import tqdm
from transformers import set_seed
from transformers.utils import logging

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
    ConvTransformerModel,
)
from modeling_convtransformer.data import CroppedDataset, SensorAugmentation, SensorDataset, WatchDataset, load_sbhar
from modeling_convtransformer.evaluation import evaluate_detections
from modeling_convtransformer.modeling_convtransformer import LayerNorm, RMSNorm

sys.path.insert(0, str(harness.ROOT / "examples"))
import watch_demo

# Each row: fields that differ from the recipe with global attention. "RoPE" is also RMSNorm and SwiGLU of the other tables.
NO_POSITIONS = {"use_rope": False}
ROWS = {
    "none": NO_POSITIONS,
    "RoPE": {},
    "sinusoids": {**NO_POSITIONS, "use_abs_pe": True},
    "learned": {**NO_POSITIONS, "use_learned_pe": True},
    "relative": {**NO_POSITIONS, "use_rel_pe": True},
    "RoPE, window 19": {"mha_win_size": 19},
    "LayerNorm": {"use_rms_norm": False},
    "batch norm": {"use_rms_norm": False, "use_batch_norm": True},
    "GELU MLP": {"use_swiglu": False},
}
CHOICES = ["LayerNorm", "batch norm", "GELU MLP"]

# The trained RoPE model with other frequencies. Linear and YaRN get the factor that fits the length; dynamic with a factor of
# 1 slows the last pair of channels by exactly the ratio of the length to max_len.
SCALINGS = {
    "RoPE, linear": lambda ratio: {"rope_type": "linear", "factor": float(ratio)},
    "RoPE, dynamic NTK": lambda ratio: {"rope_type": "dynamic", "factor": 1.0},
    "RoPE, YaRN": lambda ratio: {"rope_type": "yarn", "factor": float(ratio)},
}
RATIOS = (1, 2, 4)

TASKS = ["watch", "sbhar"]

# Instead of the recipes': half as wide, and 200 steps. Drop path's learned scale, which starts near zero, would let little
# of the attention in before the end of so short a schedule.
MODEL = {"n_embd": 64, "path_pdrop": 0.0, "mha_win_size": -1}
SCHEDULES = {"watch": {"epochs": 28, "warmup": 3, "batch": 4}, "sbhar": {"epochs": 25, "warmup": 3, "batch": 4}}


# ---------------------------------------------------------------------------------------------------------------------
# Data


def schedule_of(task: str, args: argparse.Namespace) -> dict:
    schedule = SCHEDULES[task]
    return {**schedule, "epochs": args.epochs or schedule["epochs"]}


class Task:
    """Pieces to train on, and streams of recordings of other people to evaluate on."""

    def __init__(self, name: str, args: argparse.Namespace, seed: int):
        self.name, self.path = name, harness.ROOT / "configuration" / f"{name}.yaml"
        recipe = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        data = recipe["data"]
        self.feature_extractor = ConvTransformerFeatureExtractor.from_yaml(self.path)
        windows = {"window": self.feature_extractor.num_frames, "stride": self.feature_extractor.feature_stride}
        if name == "watch":
            train_set = WatchDataset(
                data["train_people"],
                sessions_per_side=data["sessions_per_side"],
                bout=data["bout"],
                pause=data["pause"],
                seed=seed,
                training=True,
                **windows,
            )
            # Two sessions of an arm are about as long as a piece of four times the trained length.
            test_set = WatchDataset(data["test_people"], sessions_per_side=4, **windows)
        else:
            signals, annotations = load_sbhar(args.data)
            augmentation = SensorAugmentation(
                **{name[8:]: value for name, value in data.items() if name.startswith("augment_")}
            )
            train_set = SensorDataset(
                signals,
                annotations,
                data["train_split"],
                training=True,
                augmentation=augmentation,
                seed=seed,
                **windows,
            )
            test_set = SensorDataset(signals, annotations, data["val_split"], **windows)
        self.id2label = train_set.id2label
        self.train_set = CroppedDataset(train_set, args.length, seed=seed)
        schedule = schedule_of(name, args)
        self.recipe = {
            **recipe["training"],
            "num_train_epochs": schedule["epochs"],
            "warmup_epochs": schedule["warmup"],
            "per_device_train_batch_size": schedule["batch"],
            "seed": seed,
        }
        self.stream = join(test_set)
        if len(self.stream[0]) < RATIOS[-1] * args.length:
            raise BenchmarkError(
                f"{name} has {len(self.stream[0])} features to evaluate on; --length {args.length} needs "
                f"{RATIOS[-1] * args.length} at least."
            )

    def pieces(self, length: int, longest: int):
        """The features of every piece, and its segments (grid) and labels; as much as fills pieces of `longest`."""
        features, segments, labels = self.stream
        for start in range(0, len(features) // longest * longest, length):
            inside = np.clip(segments - start, 0, length - 1)
            kept = inside[:, 1] - inside[:, 0] > 0.5 * (segments[:, 1] - segments[:, 0])
            yield features[start : start + length], inside[kept], labels[kept]


def join(dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All recordings one after another: features (time, n_in), segments on their grid (N, 2), labels (N,)."""
    features, segments, labels, start = [], [], [], 0
    for index in range(len(dataset)):
        item = dataset[index]
        features.append(item["features"])
        segments.append(item["segments"] + start)
        labels.append(item["class_labels"])
        start += len(item["features"])
    return np.concatenate(features), np.concatenate(segments), np.concatenate(labels)


# ---------------------------------------------------------------------------------------------------------------------
# One run


@torch.no_grad()
def average_map(model, task: Task, length: int, longest: int) -> float:
    """Average mAP in percent over pieces of so many features."""
    model.eval()
    found, truth = {}, {}
    settings = task.feature_extractor
    unit = {"fps": settings.fps, "feature_stride": settings.feature_stride, "num_frames": settings.num_frames}
    for index, (features, segments, labels) in enumerate(task.pieces(length, longest)):
        outputs = model(torch.as_tensor(features)[None])
        duration = ((length - 1) * settings.feature_stride + settings.num_frames) / settings.fps
        # as many detections a second at every length
        most = round(settings.max_seg_num * length / longest * RATIOS[-1])
        result = settings.post_process_temporal_action_localization(
            outputs, geometry=[{**unit, "duration": duration}], max_seg_num=most
        )[0]
        found[index] = {key: value.numpy() for key, value in result.items()}
        seconds = (segments * settings.feature_stride + 0.5 * settings.num_frames) / settings.fps
        truth[index] = {"segments": seconds, "labels": labels}
    return 100 * evaluate_detections(found, truth).average_map


def run_once(task: Task, row: str, args: argparse.Namespace, folder: Path) -> dict:
    """Trains one model and evaluates it at every length, the RoPE model also with other frequencies."""
    fields = {**MODEL, "max_len": args.length, "id2label": task.id2label, **ROWS[row]}
    set_seed(task.recipe["seed"])
    model = ConvTransformerForTemporalActionLocalization(ConvTransformerConfig.from_yaml(task.path, **fields))
    start = time.perf_counter()
    watch_demo.train(model, task.train_set, task.feature_extractor, task.recipe, folder)
    seconds = time.perf_counter() - start
    longest = RATIOS[-1] * args.length
    maps = {row: {ratio: average_map(model, task, ratio * args.length, longest) for ratio in RATIOS}}
    if row == "RoPE":
        model.save_pretrained(folder)
        for name, parameters in SCALINGS.items():
            maps[name] = {}
            for ratio in RATIOS[1:]:
                scaled = type(model).from_pretrained(folder, rope_parameters=parameters(ratio))
                maps[name][ratio] = average_map(scaled, task, ratio * args.length, longest)
    return {"seconds": seconds, "maps": maps}


def result_of(task: str, row: str, seed: int, args: argparse.Namespace) -> dict:
    """The result of one run, read if it is there.

    Raises:
        BenchmarkError: what is there comes from other settings.
    """
    path = args.output / f"{task}_{row.replace(' ', '_').replace(',', '')}_{seed}.json"
    settings = {"length": args.length, **schedule_of(task, args), "fields": {**MODEL, **ROWS[row]}}
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["settings"] != settings:
            raise BenchmarkError(
                f"{path} is of {result['settings']}, not of {settings}. Give another --output, or remove it."
            )
        return result
    with tempfile.TemporaryDirectory() as folder:
        result = {"settings": settings, **run_once(Task(task, args, seed), row, args, Path(folder))}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return json.loads(json.dumps(result))  # keys as they are read


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def summary(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {spread:.1f}"


def print_tables(results: dict[tuple[str, str, int], dict]):
    """A table of positions and one of the other choices, for every task of which there is a result."""
    columns = [Column("", "name"), *(Column(f"{ratio} x", str(ratio)) for ratio in RATIOS)]
    for task in dict.fromkeys(task for task, _, _ in results):
        rows = {}
        for result in [result for key, result in results.items() if key[0] == task]:
            for name, maps in result["maps"].items():
                own = rows.setdefault(name, {"name": name, "all": {}})
                for ratio, value in maps.items():
                    own["all"].setdefault(ratio, []).append(value)
        for own in rows.values():
            own |= {ratio: summary(values) for ratio, values in own["all"].items()}
        base = {**rows["RoPE"], "name": "RMSNorm, SwiGLU"} if "RoPE" in rows else None
        positions = [own for name, own in rows.items() if name not in CHOICES]
        choices = [*([base] if base else []), *(rows[name] for name in CHOICES if name in rows)]
        for title, table in (("positions", positions), ("norms and MLPs (RoPE)", choices)):
            if len(table) > 1:
                print(f"\n{task}, {title}\n")
                harness.print_table(table, columns)


# ---------------------------------------------------------------------------------------------------------------------
# What they cost


def time_parts(args: argparse.Namespace) -> list[dict]:
    """Milliseconds of norms alone, and of the balanced backbone's forward pass with each row's settings, in turn."""
    torch.manual_seed(0)
    x, features = torch.randn(4, 2304, 256), torch.randn(1, 2304, 2048)
    alone = {
        "RMSNorm": functools.partial(RMSNorm(256, eps=1e-5), x, None),
        "LayerNorm": functools.partial(LayerNorm(256, eps=1e-5), x, None),
        "torch's RMSNorm": functools.partial(torch.nn.RMSNorm(256, eps=1e-5), x),
    }
    names = ["RoPE", *(name for name in ROWS if name != "RoPE")]
    models = {name: ConvTransformerModel(ConvTransformerConfig(**ROWS[name])).eval() for name in names}
    backbones = {name: functools.partial(model, features) for name, model in models.items()}
    rows = []
    with torch.no_grad():
        for what, functions, repeats in (
            ("norm alone, (4, 2304, 256)", alone, 10 * args.repeats),
            ("balanced backbone, (1, 2304, 2048)", backbones, args.repeats),
        ):
            for name, timing in harness.time_alternating(functions, repeats, warmup=2).items():
                row = {"what": what, "name": name, "threads": torch.get_num_threads()}
                rows.append({**row, "ms": timing.median_ms, "ratio": timing.ratio})
    return rows


TIME_COLUMNS = [
    Column("what", "what"),
    Column("with", "name"),
    Column("threads", "threads"),
    Column("ms", "ms", ".2f"),
    Column("over the first", "ratio", ".2f"),
]


# ---------------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace):
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if args.length < 16 or args.seeds < 1 or (args.epochs is not None and args.epochs < 1):
        raise BenchmarkError("--length is at least 16; --seeds and --epochs are at least 1.")
    args.output.mkdir(parents=True, exist_ok=True)
    machine = harness.describe_machine()
    print(harness.machine_line(machine), flush=True)
    times = time_parts(args) if args.times else []
    if times:
        harness.print_table(times, TIME_COLUMNS)
    runs = [(task, row, seed) for task in args.tasks for seed in range(args.seeds) for row in args.rows]
    results = {}
    for key in tqdm(runs, desc="runs", disable=None):
        results[key] = result_of(*key, args)
        print(", ".join(map(str, key)), results[key]["maps"], f"{results[key]['seconds']:.0f} s", flush=True)
    if results:
        print_tables(results)
    rows = [{"task": task, "row": row, "seed": seed, **result} for (task, row, seed), result in results.items()]
    harness.write_json(args.json, machine, args, rows, times=times)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of SBHAR, as data.load_sbhar reads it")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=TASKS, help="(default: both)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="(default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--length", type=int, default=256, help="features of a piece in training (default: 256)")
    parser.add_argument("--epochs", type=int, help="in place of SCHEDULES")
    parser.add_argument("--no-times", dest="times", action="store_false", help="train only")
    parser.add_argument("--output", type=Path, default=Path("outputs/ablation"), help="folder of the results")
    harness.add_arguments(parser, repeats=20)
    harness.add_allocator_argument(parser)
    return parser


def main(argv: list[str] | None = None):
    harness.run_command(run, make_parser(), argv)


if __name__ == "__main__":
    main()
