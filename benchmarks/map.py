"""Time `evaluate_detections` on made-up detections: python benchmarks/map.py --videos 200 --predictions 200 --classes 20

Prediction and truth counts are per video, over all classes. One process; nothing here uses more than one core. With --v1,
v1's evaluation scores the same detections, once (it takes about a minute) and in one process too, and must find the same.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import official
from harness import BenchmarkError, Column

from modeling_convtransformer.evaluation import evaluate_detections

COLUMNS = [
    Column("code", "code"),
    Column("videos", "videos"),
    Column("predictions", "predictions"),
    Column("truths", "truths"),
    Column("classes", "classes"),
    Column("tIoUs", "tious"),
    Column("median", "median_ms", "{:.1f} ms".format),
    Column("fastest", "min_ms", "{:.1f} ms".format),
    Column("slowest", "max_ms", "{:.1f} ms".format),
    Column("time / v1", "ratio", ".4f"),
    Column("average mAP", "average_map", ".4%"),
    Column("difference", "error", ".1e"),
]


def make_detections(num_videos: int, num_predictions: int, num_truths: int, num_classes: int):
    """Random truths and noisy copies of them, 70 % with the right class: ({video: predictions}, {video: truths})."""
    rng = np.random.default_rng(0)
    predictions, ground_truth = {}, {}
    for index in range(num_videos):
        starts = rng.uniform(0, 200, num_truths)
        segments = np.stack([starts, starts + rng.uniform(1, 20, num_truths)], axis=1)
        labels = rng.integers(0, num_classes, num_truths)
        source = rng.integers(0, num_truths, num_predictions)
        is_right = rng.random(num_predictions) < 0.7
        ground_truth[f"video{index}"] = {"segments": segments, "labels": labels}
        predictions[f"video{index}"] = {
            "segments": np.sort(segments[source] + rng.normal(0, 2, (num_predictions, 2)), axis=1),
            "labels": np.where(is_right, labels[source], rng.integers(0, num_classes, num_predictions)),
            "scores": rng.random(num_predictions),
        }
    return predictions, ground_truth


def run_v1(
    path: str, predictions: dict, ground_truth: dict, tious: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Seconds that v1's evaluation takes, its mAP at each tIoU, and its recall (tIoUs, top k)."""
    evaluation = official.import_evaluation(path)
    database = {
        video: {
            "subset": "test",
            "annotations": [
                {"segment": segment.tolist(), "label_id": int(label)}
                for segment, label in zip(truth["segments"], truth["labels"], strict=True)
            ],
        }
        for video, truth in ground_truth.items()
    }
    segments, labels, scores = (
        np.concatenate([one[key] for one in predictions.values()]) for key in ("segments", "labels", "scores")
    )
    found = {
        "video-id": [video for video, one in predictions.items() for _ in one["labels"]],
        "t-start": segments[:, 0],
        "t-end": segments[:, 1],
        "label": labels,
        "score": scores,
    }
    with tempfile.TemporaryDirectory() as folder:
        truths = Path(folder) / "truths.json"
        truths.write_text(json.dumps({"database": database}), encoding="utf-8")
        start = time.perf_counter()
        mean, _, recall = evaluation(str(truths), split="test", tiou_thresholds=tious, num_workers=1).evaluate(
            found, verbose=False
        )
        return time.perf_counter() - start, mean, recall


def run(args: argparse.Namespace):
    predictions, ground_truth = make_detections(args.videos, args.predictions, args.truths, args.classes)
    metrics = evaluate_detections(predictions, ground_truth)
    sizes = {
        "videos": args.videos,
        "predictions": metrics.num_predictions,
        "truths": metrics.num_ground_truth,
        "classes": args.classes,
        "tious": len(metrics.tiou_thresholds),
    }
    timing = harness.time_alternating({"": lambda: evaluate_detections(predictions, ground_truth)}, args.repeats)[""]
    rows = [{"code": "ours", **sizes, **timing._asdict(), "ratio": None, "average_map": metrics.average_map}]
    if args.v1 is not None:
        seconds, mean, recall = run_v1(args.v1, predictions, ground_truth, metrics.tiou_thresholds)
        milliseconds = dict.fromkeys(("median_ms", "min_ms", "max_ms"), 1e3 * seconds)
        rows.insert(0, {"code": "v1", **sizes, **milliseconds, "ratio": 1.0, "average_map": float(mean.mean())})
        rows[1]["ratio"] = timing.median_ms / (1e3 * seconds)
        rows[1]["error"] = float(max(np.abs(metrics.map - mean).max(), np.abs(metrics.recall - recall).max()))

    machine = harness.describe_machine()
    print(f"{harness.machine_line(machine)}; numpy {np.__version__}\n")
    harness.print_table(rows, [column for column in COLUMNS if args.v1 is not None or column.key != "code"])
    harness.write_json(args.json, machine, args, rows)
    if rows[-1].get("error", 0.0) > 1e-9:
        raise BenchmarkError(f"mAP or recall differ from v1's by {rows[-1]['error']:.1e}; expected the same.")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--predictions", type=int, default=200, help="per video")
    parser.add_argument("--truths", type=int, default=15, help="per video")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--v1", metavar="PATH", help=f"{official.HELP}; needs pandas and joblib")
    harness.add_arguments(parser, repeats=7)
    harness.run_command(run, parser, argv)


if __name__ == "__main__":
    main()
