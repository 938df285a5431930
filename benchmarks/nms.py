"""Time suppression and post-processing on made-up candidates: python benchmarks/nms.py --repeats 7 --threads 1

Candidates are segments of 1 to 50 steps anywhere on a grid of 2304, with uniform scores and classes; everything is on the
CPU, where post-processing runs. The last row is a whole call for one recording as long as THUMOS14's training length.
"""

import argparse
import os
import platform
import statistics
import time

import torch

from modeling_convtransformer import ConvTransformerFeatureExtractor
from modeling_convtransformer.feature_extraction_convtransformer import suppress

LENGTH, LEVELS, CLASSES = 2304, 6, 20


def make_segments(count: int, generator: torch.Generator, centres: torch.Tensor | None = None) -> torch.Tensor:
    """Segments (count, 2) of 1 to 50 steps around the centres, random by default."""
    if centres is None:
        centres = torch.rand(count, generator=generator) * LENGTH
    halves = (1 + 49 * torch.rand(count, generator=generator)) / 2
    return torch.stack([centres - halves, centres + halves], dim=1)


def make_outputs(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """What a model gives for one recording: most scores low, about 1 in 20 above 0.1."""
    sizes = [LENGTH // 2**level for level in range(LEVELS)]
    levels = torch.repeat_interleave(torch.arange(LEVELS), torch.tensor(sizes))
    points = torch.cat([torch.arange(size) * 2.0**level for level, size in enumerate(sizes)])
    return {
        "logits": torch.randn(1, len(levels), CLASSES, generator=generator) * 1.5 - 4.6,
        "pred_segments": make_segments(len(levels), generator, points)[None],
        "point_mask": torch.ones(1, len(levels), dtype=torch.long),
        "point_levels": levels[None],
    }


def measure(function, repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` calls, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    cases = {}
    for method in ("soft", "hard"):
        for count, classes in ((2000, CLASSES), (10000, CLASSES), (10000, 1)):
            generator = torch.Generator().manual_seed(0)
            options = {
                "segments": make_segments(count, generator),
                "scores": torch.rand(count, generator=generator),
                "groups": torch.randint(0, classes, (count,), generator=generator),
                "method": method,
                "iou_threshold": 0.1,
                "sigma": 0.5,
                "min_score": 0.001,
                "max_segments": 200,
            }
            groups = "class-agnostic" if classes == 1 else f"{classes} classes"
            cases[f"{method} NMS, {count} candidates, {groups}"] = lambda options=options: len(suppress(**options)[0])

    extractor = ConvTransformerFeatureExtractor(
        feature_size=2048, fps=30, feature_stride=4, num_frames=16, pre_nms_topk=2000, max_seg_num=200, min_score=0.001
    )
    outputs = make_outputs(torch.Generator().manual_seed(0))
    points = outputs["logits"].shape[1]
    cases[f"whole call, {points} points on {LEVELS} levels, {CLASSES} classes"] = lambda: len(
        extractor.post_process_temporal_action_localization(outputs)[0]["scores"]
    )

    print(
        f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; at most 200 segments kept in each group"
    )
    print("| what | kept | median | fastest | slowest |")
    print("|:--|--:|--:|--:|--:|")
    for name, function in cases.items():
        times = measure(function, args.repeats)
        print(
            f"| {name} | {function()} | {statistics.median(times):.1f} ms | {min(times):.1f} ms | {max(times):.1f} ms |"
        )


if __name__ == "__main__":
    main()
