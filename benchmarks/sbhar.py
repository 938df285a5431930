"""Quality on SBHAR: the recipe of configuration/sbhar.yaml beside v1's settings trained the same way, over several seeds.

    python benchmarks/sbhar.py SBHAR_FOLDER

Each run is `examples/train.py configuration/sbhar.yaml` with one seed; runs that are finished are not repeated. Trains on
the annotations' "training" subset (people 1 to 14) and evaluates on "validation" (people 15 to 20) after the last epoch:
no checkpoint is chosen by the people whom it is evaluated on. Further options go to examples/train.py, for example
`--val_split testing`.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "configuration" / "sbhar.yaml"

# What makes of the recipe's model v1 (ActionFormer's release) with Bock et al.'s settings for this data.
V1 = ["use_rope=false", "use_swiglu=false", "use_rms_norm=false", "mask_conv_inputs=false", "mha_win_size=9"]
VARIANTS = {"v2": [], "v1 settings": V1}


def run_once(script: str, output: Path, arguments: list) -> dict:
    """metrics.json of one run of an example with this benchmark's recipe, which is not repeated if it is there.

    Raises:
        SystemExit: what is there comes from another command.
    """
    command = [*map(str, [sys.executable, ROOT / "examples" / script, RECIPE, "--output_dir", output, *arguments])]
    if (output / "metrics.json").exists():
        theirs = json.loads((output / "run.json").read_text(encoding="utf-8"))["command"]
        if theirs != shlex.join(command):
            sys.exit(f"{output} holds the run of another command:\n{theirs}\nGive another --output, or remove it.")
    else:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        subprocess.run(command, check=True, env=environment)
    return json.loads((output / "metrics.json").read_text(encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of SBHAR, as data.load_sbhar reads it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=Path("outputs/sbhar"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options, rest = parser.parse_known_args()

    rows = []
    for seed in range(options.seeds):
        for variant in options.variants:
            output = options.output / f"{variant.replace(' ', '_')}_{seed}"
            arguments = ["--folder", options.data, "--seed", seed, "--load_best_model_at_end", "false", *rest]
            arguments += ["--set", *VARIANTS[variant]] if VARIANTS[variant] else []
            metrics = run_once("train.py", output, arguments)
            seconds = next(entry["train_runtime"] for entry in metrics["history"] if "train_runtime" in entry)
            maps = {name: 100 * metrics[name]["map"] for name in ("own", "average") if name in metrics}
            rows.append({"variant": variant, "seed": seed, "seconds": seconds, **maps})
            print(rows[-1], flush=True)

    print("\n| | average weights | own weights | seconds of training |\n|---|---|---|---|")
    for variant in options.variants:
        own = [row for row in rows if row["variant"] == variant]
        cells = []
        for name in ("average", "own"):
            values = [row[name] for row in own]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            cells.append(f"{np.mean(values):.1f} ± {spread:.1f} ({', '.join(f'{value:.1f}' for value in values)})")
        print(f"| {variant} | {' | '.join(cells)} | {np.median([row['seconds'] for row in own]):.0f} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
