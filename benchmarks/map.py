"""Time `evaluate_detections` on made-up detections: python benchmarks/map.py --videos 200 --predictions 200 --classes 20

Prediction and truth counts are per video, over all classes. One process; nothing here uses more than one core.
"""

import argparse
import os
import platform
import statistics
import time

import numpy as np

from modeling_convtransformer.evaluation import evaluate_detections


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--predictions", type=int, default=200, help="per video")
    parser.add_argument("--truths", type=int, default=15, help="per video")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    predictions, ground_truth = make_detections(args.videos, args.predictions, args.truths, args.classes)
    metrics = evaluate_detections(predictions, ground_truth)  # also warms up
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        evaluate_detections(predictions, ground_truth)
        seconds.append(time.perf_counter() - start)

    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}")
    print("| videos | predictions | truths | classes | tIoUs | median | fastest | slowest |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    print(
        f"| {args.videos} | {metrics.num_predictions} | {metrics.num_ground_truth} | {args.classes} "
        f"| {len(metrics.tiou_thresholds)} | {1e3 * statistics.median(seconds):.1f} ms "
        f"| {1e3 * min(seconds):.1f} ms | {1e3 * max(seconds):.1f} ms |"
    )


if __name__ == "__main__":
    main()
