"""What adapters are worth: a detector of some people's activities meets other people, and learns them whole or by adapters.

    python benchmarks/adapters.py SBHAR_FOLDER
    python benchmarks/adapters.py SBHAR_FOLDER --turn 45

The recipe configuration/sbhar.yaml trains a base on people 1 to 10. It is then adapted to people 11 to 14, once with all
its parameters and once by each kind of adapter, and evaluated on people 15 to 20 before and after. These are runs of
examples/train.py and examples/train_peft.py; runs that are finished are not repeated. No checkpoint is chosen by the
people whom it is evaluated on: the last one counts. Learning rates are each method's usual ones and were not searched.
With --turn, people 11 to 20 wear the smartphone turned by that angle: something that the base has never seen.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from sbhar import run_once

from modeling_convtransformer.data import load_sbhar

LAST = ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]

# Ranks keep each under 3 % of the parameters.
METHODS = {
    "all parameters": ["--learning_rate", 2e-4],
    "LoRA": ["--method", "lora", "--rank", 3, "--learning_rate", 2e-3],
    "LoRA, convolutions too": ["--method", "lora", "--rank", 2, "--convs", "--learning_rate", 2e-3],
    "DoRA": ["--method", "dora", "--rank", 2, "--learning_rate", 2e-3],
    "IA3": ["--method", "ia3", "--learning_rate", 1e-2],
}


def subset(person: int) -> str | None:
    return "base" if person <= 10 else "adaptation" if person <= 14 else "evaluation" if person <= 20 else None


def split(source: Path, folder: Path, degrees: float):
    """Writes the recordings of people 1 to 20, by the subsets above, as `data.load_sbhar` reads them; those of people 11
    to 20 turned about the third axis."""
    signals, annotations = load_sbhar(source)
    entries = {name: {**entry, "subset": subset(entry["person"])} for name, entry in annotations["database"].items()}
    entries = {name: entry for name, entry in entries.items() if entry["subset"] is not None}
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], dtype=np.float32)
    for name, entry in entries.items():
        if degrees and entry["subset"] != "base":
            axes = signals[name].reshape(-1, 2, 3)  # of the accelerometer and of the gyroscope
            signals[name] = (axes @ rotation.T).reshape(-1, 6)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "signals.npz", **{name: signals[name] for name in entries})
    (folder / "annotations.json").write_text(json.dumps({**annotations, "database": entries}) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of SBHAR, as data.load_sbhar reads it")
    parser.add_argument("--base-epochs", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=30, help="of each adaptation (8 recordings, 4 steps each)")
    parser.add_argument("--turn", type=float, default=0.0, help="degrees (default: 0)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=Path, default=Path("outputs/adapters"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()

    folder = options.output / f"turn_{options.turn:g}"
    data = folder / "data"
    split(options.data, data, options.turn)
    common = ["--folder", data, "--val_split", "evaluation"]
    rows = []
    for seed in range(options.seeds):
        base = folder / f"base_{options.base_epochs}_{seed}"
        arguments = [*common, "--seed", seed, "--train_split", "base", "--num_train_epochs", options.base_epochs]
        before = run_once("train.py", base, [*LAST, *arguments])["average"]["map"]
        arguments = [*common, "--seed", seed, "--train_split", "adaptation", "--num_train_epochs", options.epochs]
        for method in options.methods:
            script = "train.py" if method == "all parameters" else "train_peft.py"
            output = folder / f"{method.replace(', ', '_').replace(' ', '_')}_{options.epochs}_{seed}"
            settings = ["--checkpoint", base, "--warmup_epochs", 1, *METHODS[method]]
            metrics = run_once(script, output, [*LAST, *arguments, *settings])
            seconds = next(entry["train_runtime"] for entry in metrics["history"] if "train_runtime" in entry)
            row = {"method": method, "seed": seed, "share": metrics.get("share", 1.0), "seconds": seconds}
            rows.append(
                {**row, "before": 100 * before, "after": 100 * metrics.get("after", metrics.get("average"))["map"]}
            )
            print(rows[-1], flush=True)

    print(
        f"\nAverage mAP (tIoU 0.3 to 0.7) on people 15 to 20, mean of {options.seeds} seeds (lowest to highest); "
        f"{options.base_epochs} epochs of people 1 to 10, then {options.epochs} of people 11 to 14\n\n"
        "| | parameters that learn | before | after | seconds of training |\n|---|---|---|---|---|"
    )
    for method in options.methods:
        own = [row for row in rows if row["method"] == method]
        cells = [f"{100 * own[0]['share']:.1f} %"]
        for name in ("before", "after"):
            values = [row[name] for row in own]
            cells.append(f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        print(f"| {method} | {' | '.join(cells)} | {np.median([row['seconds'] for row in own]):.0f} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
