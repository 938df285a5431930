"""What each way of storing a detector in fewer bits costs and is worth: size on disk, mAP, time of a forward.

    python benchmarks/quantization.py SBHAR_FOLDER
    python benchmarks/quantization.py SBHAR_FOLDER --compile --sbhar-model outputs/sbhar/v2_0 --watch-model outputs/watch/model

Two detectors in full precision are the start: that of configuration/sbhar.yaml (people 1 to 14, evaluated on 15 to 20) and
that of `make demo` (smartwatch, three unseen people); they are trained first, unless folders are given. Every row is saved
and loaded again before it is evaluated. "trained for it": --epochs more of quantization-aware training at a constant fifth
of the recipe's learning rate; "float32, trained on" has the same epochs without rounding. "static" has ranges measured on
--calibration recordings of the training set. Times are one forward of configuration/thumos14_i3d.yaml's detector (29 million
parameters, random weights, batch 1, --length steps), all rows in turn. bitsandbytes' rows appear where it is installed.
"""

import argparse
import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from logging import ERROR, getLogger
from pathlib import Path

import harness
import sbhar
import torch
import torch._inductor.config
import yaml
from harness import BenchmarkError, Column
from tqdm import tqdm
from transformers import set_seed
from transformers.utils import logging

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
)
from modeling_convtransformer.data import DataCollator, SensorAugmentation, SensorDataset, WatchDataset, load_sbhar
from modeling_convtransformer.evaluation import evaluate_detections
from modeling_convtransformer.quantization import convert_qat, prepare_qat, quantize, quantize_static

sys.path.insert(0, str(harness.ROOT / "examples"))
import watch_demo

load = ConvTransformerForTemporalActionLocalization.from_pretrained

# Each row: how it is made of the full-precision folder. METHODS of the package, or what stands in `make`.
ROWS = [
    "float32",
    "bfloat16",
    "int8",
    "int8, heads in float32",
    "int8_dynamic",
    "static",
    "float8",
    "int4",
    "ternary",
    "bitsandbytes 8 bits",
    "bitsandbytes 4 bits",
    "float32, trained on",
    "int8_dynamic, trained for it",
    "int4, trained for it",
    "ternary, trained for it",
]
TRAINED = ", trained for it"

# Rows that take more than this many times float32's time are timed once.
SLOW = 5


def size_of(path: Path) -> int:
    """Bytes of the weights on disk."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size


# ---------------------------------------------------------------------------------------------------------------------
# Data and full-precision models


class Task:
    """A detector in full precision, and the recordings that it was trained and is evaluated on."""

    def __init__(self, name: str, model: Path, recipe: dict, train_set, test_set):
        self.name, self.model, self.recipe = name, model, recipe["training"]
        self.train_set, self.test_set = train_set, test_set
        self.feature_extractor = ConvTransformerFeatureExtractor.from_pretrained(model)

    @torch.no_grad()
    def average_map(self, detector: Callable, dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
        """Average mAP (tIoU 0.3 to 0.7) in percent; `detector` takes (1, time, n_in)."""
        collate, found = DataCollator(self.feature_extractor, return_metadata=True), {}
        for item in self.test_set:
            batch = collate([item])
            outputs = detector(batch["input_features"].to(device, dtype))
            result = self.feature_extractor.post_process_temporal_action_localization(outputs, batch["geometry"])[0]
            found[item["video_id"]] = {key: value.cpu().numpy() for key, value in result.items()}
        return 100 * evaluate_detections(found, self.test_set.ground_truth()).average_map

    def train_on(self, model, epochs: int, folder: Path):
        recipe = {**self.recipe, "num_train_epochs": epochs, "warmup_epochs": 0}
        recipe["learning_rate"] = self.recipe["learning_rate"] / 5
        set_seed(0)
        watch_demo.train(model.train(), self.train_set, self.feature_extractor, recipe, folder)
        return model.eval()


def make_tasks(args: argparse.Namespace) -> list[Task]:
    tasks = []
    if "sbhar" in args.tasks:
        recipe = yaml.safe_load(sbhar.RECIPE.read_text(encoding="utf-8"))
        model = args.sbhar_model or args.output / "sbhar"
        if args.sbhar_model is None:
            options = ["--folder", args.data, "--seed", 0, "--load_best_model_at_end", "false"]
            sbhar.run_once("train.py", model, options)
        data, window = recipe["data"], recipe["feature_extractor"]
        augmentation = {name[8:]: value for name, value in data.items() if name.startswith("augment_")}
        windows = {"window": window["num_frames"], "stride": window["feature_stride"]}
        signals, annotations = load_sbhar(args.data)
        augmentation = SensorAugmentation(**augmentation)
        train = SensorDataset(
            signals, annotations, data["train_split"], training=True, augmentation=augmentation, **windows
        )
        tasks.append(
            Task("SBHAR", model, recipe, train, SensorDataset(signals, annotations, data["val_split"], **windows))
        )
    if "watch" in args.tasks:
        path = harness.ROOT / "configuration" / "watch.yaml"
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        model = args.watch_model or args.output / "watch" / "model"
        if not (model / "model.safetensors").exists():
            command = [sys.executable, harness.ROOT / "examples" / "watch_demo.py", "--output", args.output / "watch"]
            subprocess.run([*map(str, command)], check=True)
        data, window = recipe["data"], recipe["feature_extractor"]
        windows = {"window": window["num_frames"], "stride": window["feature_stride"]}
        sessions = {"sessions_per_side": data["sessions_per_side"], **windows}
        train = WatchDataset(
            data["train_people"], bout=data["bout"], pause=data["pause"], seed=0, training=True, **sessions
        )
        tasks.append(Task("watch", model, recipe, train, WatchDataset(data["test_people"], **sessions)))
    return tasks


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def save_and_load(model, folder: Path):
    model.save_pretrained(folder)
    return load(folder).eval()


def make(row: str, source: Path, folder: Path, calibration: list[torch.Tensor], train: Callable | None = None):
    """
    The detector of a row, made of the full-precision folder `source`, saved and loaded again.

    Returns:
        what takes (1, time, n_in), and the path of its weights; None for what cannot be had here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if row.startswith("bitsandbytes"):
        from transformers import BitsAndBytesConfig

        bits = {"load_in_8bit": True} if "8" in row else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load(source, quantization_config=BitsAndBytesConfig(**bits), device_map={"": device})
        model.save_pretrained(folder)
        return load(folder, device_map={"": device}).eval(), folder
    if row == "static":
        path = folder / "model.pt2"
        torch.export.save(quantize_static(load(source).eval(), calibration), path)
        return torch.export.load(path).module(), path
    model = load(source, dtype=torch.bfloat16 if row == "bfloat16" else torch.float32).eval()
    if row.endswith(TRAINED):
        model = convert_qat(train(prepare_qat(model, row.removesuffix(TRAINED))))
    elif row == "float32, trained on":
        model = train(model)
    elif not row.startswith(("float32", "bfloat16")):
        method, _, heads = row.partition(", heads")
        model = quantize(model, method, keep=["class_head", "segment_head"] if heads else [])
    return save_and_load(model, folder), folder


def measure_quality(task: Task, row: str, args: argparse.Namespace, folder: Path) -> dict:
    collate = DataCollator(task.feature_extractor)
    calibration = []
    if row == "static":
        longest = sorted((collate([item])["input_features"] for item in task.train_set), key=lambda x: x.shape[1])
        calibration = longest[-args.calibration :]
    train = functools.partial(task.train_on, epochs=args.epochs, folder=folder / "trainer")
    detector, path = make(row, task.model, folder / "model", calibration, train)
    dtype = torch.bfloat16 if row == "bfloat16" else torch.float32
    device = str(getattr(detector, "device", "cpu"))
    return {f"{task.name} MB": size_of(path) / 1e6, f"{task.name} mAP": task.average_map(detector, dtype, device)}


def measure_times(rows: list[str], args: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """Milliseconds of one forward of each row, in turn, uncompiled and compiled; sizes too."""
    set_seed(0)
    config = ConvTransformerConfig.from_yaml(args.timed)
    source = folder / "float32_source"
    ConvTransformerForTemporalActionLocalization(config).save_pretrained(source)
    features = torch.randn(1, args.length, config.n_in)
    detectors, measured = {}, {}
    for row in tqdm(rows, desc="detectors at THUMOS14's shape", disable=None):
        try:
            detector, path = make(row, source, folder / row, [features[:, : args.length // 2], features])
        except (ImportError, ValueError, RuntimeError) as error:
            print(f"{row}: {harness.first_line(error)}", file=sys.stderr)
            continue
        detectors[row], measured[row] = detector, {"THUMOS14 MB": size_of(path) / 1e6}
    with torch.no_grad():
        for suffix in ("", " compiled") if args.compile else ("",):
            if suffix:
                torch._inductor.config.freezing = True  # weights are constants, which PT2E's kernels ask for
                detectors = {row: torch.compile(detector) for row, detector in detectors.items()}
            calls = {
                row: functools.partial(
                    detector,
                    features.to(
                        getattr(detector, "device", "cpu"), torch.bfloat16 if row == "bfloat16" else torch.float32
                    ),
                )
                for row, detector in detectors.items()
            }
            device = "cuda" if torch.cuda.is_available() else "cpu"
            first = {
                row: harness.time_alternating({row: call}, 1, 1, device)[row].median_ms for row, call in calls.items()
            }
            # What a machine has no instructions for may take a hundred times as long: once is enough.
            slow = [row for row in calls if first[row] > SLOW * first["float32"]]
            for row in slow:
                measured[row] |= {f"ms{suffix}": first[row], f"time{suffix}": first[row] / first["float32"]}
                del calls[row]
            if args.profile:
                for row, call in calls.items():
                    with torch.profiler.profile() as profiler:
                        call()
                    operators = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=10)
                    print(f"\n{row}{suffix}\n{operators}")
            for row, timing in harness.time_alternating(calls, args.repeats, 1, device).items():
                measured[row] |= {f"ms{suffix}": timing.median_ms, f"time{suffix}": timing.ratio}
    return measured


# ---------------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace):
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for noisy in ("bitsandbytes", "torch.export", "torchao"):
        getLogger(noisy).setLevel(ERROR)
    if args.length < 64 or args.repeats < 1 or args.epochs < 1 or args.calibration < 1:
        raise BenchmarkError("--length is at least 64; --repeats, --epochs and --calibration are at least 1.")
    rows = list(dict.fromkeys(["float32", *args.rows]))
    machine = harness.describe_machine()
    print(harness.machine_line(machine), flush=True)
    table = {row: {"method": row} for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        timed = [row for row in rows if "trained" not in row] if args.times else []
        for row, measured in measure_times(timed, args, Path(scratch)).items() if timed else ():
            table[row] |= measured
        harness.write_json(args.json, machine, args, [*table.values()])
        for task in make_tasks(args):
            for row in tqdm(rows, desc=task.name, disable=None):
                try:
                    table[row] |= measure_quality(task, row, args, Path(scratch) / task.name / row)
                except (ImportError, ValueError, RuntimeError) as error:
                    table[row]["problem"] = f"{row}: {harness.first_line(error)}"
                    continue
                harness.write_json(args.json, machine, args, [*table.values()])  # what is done is not lost
    names = ["THUMOS14", *(["SBHAR"] if "sbhar" in args.tasks else []), *(["watch"] if "watch" in args.tasks else [])]
    columns = [Column("method", "method")]
    for name in names:
        for row in table.values():
            if f"{name} MB" in row:
                row[f"{name} share"] = row[f"{name} MB"] / table["float32"][f"{name} MB"]
            if f"{name} mAP" in row:
                row[f"{name} change"] = row[f"{name} mAP"] - table["float32"][f"{name} mAP"]
        columns += [Column(f"{name}: MB", f"{name} MB", ".2f"), Column("of float32", f"{name} share", ".1%")]
        if name != "THUMOS14":
            columns += [Column("mAP", f"{name} mAP", ".1f"), Column("change", f"{name} change", "+.1f")]
    for suffix in ("", " compiled") if args.compile else ("",):
        columns += [Column(f"ms{suffix}", f"ms{suffix}", ".0f"), Column("of float32", f"time{suffix}", ".2f")]
    print()
    harness.print_table([*table.values()], columns)
    harness.write_json(args.json, machine, args, [*table.values()])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of SBHAR, as data.load_sbhar reads it")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="(default: all)", metavar="ROW")
    parser.add_argument("--tasks", nargs="*", choices=["sbhar", "watch"], default=["sbhar", "watch"])
    parser.add_argument("--no-times", dest="times", action="store_false", help="sizes and mAP only")
    parser.add_argument("--compile", action="store_true", help="time compiled models too (minutes of compiling)")
    parser.add_argument("--profile", action="store_true", help="print the operators that take most of each row's time")
    parser.add_argument("--epochs", type=int, default=5, help="of the rows that are trained (default: 5)")
    parser.add_argument("--calibration", type=int, default=16, help="recordings that ranges are measured on (16)")
    timed = harness.ROOT / "configuration" / "thumos14_i3d.yaml"
    parser.add_argument("--timed", type=Path, default=timed, metavar="FILE", help="YAML of the detector that is timed")
    parser.add_argument("--length", type=int, default=2304, help="steps of the recording that is timed (2304)")
    parser.add_argument("--sbhar-model", type=Path, metavar="FOLDER", help="in full precision, of this recipe")
    parser.add_argument("--watch-model", type=Path, metavar="FOLDER", help="the same")
    parser.add_argument("--output", type=Path, default=Path("outputs/quantization"), help="of what is trained first")
    harness.add_arguments(parser, repeats=10)
    return parser


def main(argv: list[str] | None = None):
    harness.run_command(run, make_parser(), argv)


if __name__ == "__main__":
    main()
