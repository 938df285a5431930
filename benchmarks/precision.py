"""Mixed precision on SBHAR: the recipe of configuration/sbhar.yaml trained in float32, bfloat16 and float16 with one seed.

    python benchmarks/precision.py SBHAR_FOLDER
    python benchmarks/precision.py SBHAR_FOLDER --num_train_epochs 10 --plot docs/images/loss_curves.png

Prints the training loss of each epoch side by side, mAP and seconds of each run, and mAP of the weights that were trained
in float32 when the whole model is in half precision at inference. Each run is `examples/train.py` (as in sbhar.py: finished
ones are not repeated), with `--bf16 true` or `--fp16 true`; weights are float32 in all of them, and so is the loss. float16
needs a GPU: on a CPU accelerate trains in float32 without a word. Further options go to examples/train.py.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import harness
import sbhar
import torch
from harness import BenchmarkError, Column
from transformers import HfArgumentParser

from modeling_convtransformer import ConvTransformerFeatureExtractor, ConvTransformerForTemporalActionLocalization
from modeling_convtransformer.data import DataCollator

sys.path.insert(0, str(harness.ROOT / "examples"))
import train
import train_accelerate

PRECISIONS = {"float32": [], "bfloat16": ["--bf16", "true"], "float16": ["--fp16", "true"]}


def evaluate_in(dtype: str, folder: Path, options: train.DataArguments, device: str) -> float:
    """mAP in percent of the model in `folder`, all of it in one dtype, by the recipe's evaluation set."""
    model = ConvTransformerForTemporalActionLocalization.from_pretrained(folder, dtype=getattr(torch, dtype))
    feature_extractor = ConvTransformerFeatureExtractor.from_pretrained(folder)
    _, val_set, _ = train.load_datasets(options, feature_extractor, seed=0)
    collate = DataCollator(feature_extractor, return_metadata=True)
    return 100 * train_accelerate.evaluate(model.to(device), val_set, collate, feature_extractor).to_dict()["map"]


def train_rows(args: argparse.Namespace, rest: list[str]) -> list[dict]:
    """A row for each precision: losses by epoch, mAP of both kinds of weights, and seconds of training."""
    rows = []
    for name in args.precisions:
        options = ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
        options += ["--use_cpu", str(args.device == "cpu").lower()]  # which Trainer wants to be told, for bfloat16
        options += ["--folder", args.data, "--seed", args.seed, *PRECISIONS[name], *rest]
        metrics = sbhar.run_once("train.py", args.output / name, options)
        seconds = next(entry["train_runtime"] for entry in metrics["history"] if "train_runtime" in entry)
        losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
        maps = {f"{kind}_map": 100 * metrics[kind]["map"] for kind in ("own", "average") if kind in metrics}
        rows.append({"name": f"trained in {name}", "precision": name, "seconds": seconds, "losses": losses, **maps})
    return rows


def plot(path: Path | None, rows: list[dict]):
    """Loss over epochs above, and below how far each run is from the first, in percent."""
    if path is None:
        return
    pyplot = harness.import_pyplot()
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(7, 5.5), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    for index, row in enumerate(rows):
        epochs = range(1, 1 + len(row["losses"]))
        above.plot(epochs, row["losses"], label=row["precision"], linestyle=["-", "--", ":"][index], linewidth=2)
        difference = [100 * (loss / first - 1) for loss, first in zip(row["losses"], rows[0]["losses"], strict=True)]
        below.plot(epochs, difference, linestyle=["-", "--", ":"][index], linewidth=2)
    above.set(ylabel="training loss", yscale="log", title="SBHAR: one seed, one recipe")
    below.set(ylabel=f"% from {rows[0]['precision']}", xlabel="epoch")
    above.legend()
    for axis in (above, below):
        axis.grid(alpha=0.3)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)
    pyplot.close(figure)


def run(args: argparse.Namespace, rest: list[str]):
    machine = harness.describe_machine(args.device)
    print(harness.machine_line(machine), flush=True)
    rows = train_rows(args, rest)
    known = HfArgumentParser(train.DataArguments)
    parsed = ["--dataset", "sbhar", "--folder", str(args.data), *rest]
    options = known.parse_args_into_dataclasses(parsed, return_remaining_strings=True, look_for_args_file=False)[0]
    for dtype in args.inference:
        share = evaluate_in(dtype, args.output / args.precisions[0], options, args.device)
        kept = json.loads((args.output / args.precisions[0] / "metrics.json").read_text(encoding="utf-8"))["kept"]
        rows.append({"name": f"{args.precisions[0]}'s weights, all in {dtype}", f"{kept}_map": share})

    trained = [row for row in rows if "losses" in row]
    print("\nTraining loss by epoch\n")
    epochs = [
        {"epoch": epoch + 1, **{row["precision"]: row["losses"][epoch] for row in trained}}
        for epoch in range(min(len(row["losses"]) for row in trained))
    ]
    harness.print_table(
        epochs,
        [Column("epoch", "epoch", "d"), *(Column(row["precision"], row["precision"], ".4f") for row in trained)],
    )
    for row in trained[1:]:
        pairs = zip(row["losses"], trained[0]["losses"], strict=True)
        row["difference"] = statistics.median(abs(loss / first - 1) for loss, first in pairs)
    print()
    columns = [
        Column("what", "name"),
        Column("mAP, average weights", "average_map", ".1f"),
        Column("mAP, own weights", "own_map", ".1f"),
        Column("loss off by (median epoch)", "difference", ".2%"),
        Column("s of training", "seconds", ".0f"),
    ]
    harness.print_table(rows, columns)
    plot(args.plot, trained)
    harness.write_json(args.json, machine, args, rows)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of SBHAR, as data.load_sbhar reads it")
    is_gpu = torch.cuda.is_available()
    chosen = list(PRECISIONS) if is_gpu else ["float32", "bfloat16"]
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=chosen, help="the first is compared with"
    )
    parser.add_argument(
        "--inference", nargs="*", choices=PRECISIONS, default=["bfloat16", "float16"], help="dtypes of whole models"
    )
    parser.add_argument("--device", default="cuda" if is_gpu else "cpu", help="of those inferences")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/precision"), help="folder of the runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, arguments and every row here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the losses")
    args, rest = parser.parse_known_args(argv)
    try:
        harness.check_outputs(args)
        if not args.data.is_dir():
            raise BenchmarkError(f"{args.data} is no folder; expected that of SBHAR, as data.load_sbhar reads it.")
        if args.device == "cpu" and "float16" in args.precisions:
            raise BenchmarkError("float16 trains on a GPU only: on a CPU accelerate leaves it out without a word.")
        run(args, rest)
    except BenchmarkError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
