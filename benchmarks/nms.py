"""Time suppression and post-processing on made-up candidates: python benchmarks/nms.py --repeats 7 --threads 1

Candidates are segments of 1 to 50 steps anywhere on a grid of 2304, with uniform scores and classes; everything is on the
CPU, where post-processing runs. The last row is a whole call for one recording as long as THUMOS14's training length. With
--v1, v1's compiled NMS gets the same candidates in turn with ours, and the 200 best segments of both are compared (v1 drops
the others; ours gives 200 of each class here).
"""

import argparse

import harness
import official
import torch
from harness import BenchmarkError, Column

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


COLUMNS = [
    Column("what", "name"),
    Column("code", "code"),
    Column("kept", "kept"),
    Column("median", "median_ms", "{:.1f} ms".format),
    Column("fastest", "min_ms", "{:.1f} ms".format),
    Column("slowest", "max_ms", "{:.1f} ms".format),
    Column("time / v1", "ratio", ".2f"),
    Column("score difference", "score_error", ".1e"),
    Column("segment difference", "segment_error", ".1e"),
]
BEST = 200


def make_cases() -> dict[str, dict]:
    """Arguments of `suppress` by name."""
    cases = {}
    for method in ("soft", "hard"):
        for count, classes in ((2000, CLASSES), (10000, CLASSES), (10000, 1)):
            generator = torch.Generator().manual_seed(0)
            groups = "class-agnostic" if classes == 1 else f"{classes} classes"
            cases[f"{method} NMS, {count} candidates, {groups}"] = {
                "segments": make_segments(count, generator),
                "scores": torch.rand(count, generator=generator),
                "groups": torch.randint(0, classes, (count,), generator=generator),
                "method": method,
                "iou_threshold": 0.1,
                "sigma": 0.5,
                "min_score": 0.001,
                "max_segments": BEST,
                "recordings": torch.zeros(count, dtype=torch.long),
            }
    return cases


def run_v1(batched_nms, case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The best segments and their scores by v1's code, without its voting."""
    segments, scores, _ = batched_nms(
        case["segments"],
        case["scores"],
        case["groups"],
        case["iou_threshold"],
        case["min_score"],
        case["max_segments"],
        use_soft_nms=case["method"] == "soft",
        multiclass=True,
        sigma=case["sigma"],
        voting_thresh=0,
    )
    return segments, scores


def compare_best(case: dict, batched_nms) -> dict[str, float]:
    """
    How far our best segments and scores are from v1's.

    Raises:
        RuntimeError: they are not as many.
    """
    kept, scores = suppress(**case)
    order = scores.argsort(descending=True, stable=True)[:BEST]
    segments, scores = case["segments"][kept[order]], scores[order]
    v1_segments, v1_scores = run_v1(batched_nms, case)
    if len(scores) != len(v1_scores):
        raise RuntimeError(f"we keep {len(scores)} of the best {BEST}, v1 {len(v1_scores)}")
    return {
        "score_error": (scores - v1_scores).abs().max().item(),
        "segment_error": (segments - v1_segments).abs().max().item(),
    }


def run(args: argparse.Namespace):
    batched_nms = None if args.v1 is None else official.import_nms(args.v1)
    rows = []
    for name, case in make_cases().items():
        functions = {"ours": lambda case=case: suppress(**case)}
        if batched_nms is not None:
            functions = {"v1": lambda case=case: run_v1(batched_nms, case), **functions}
        for code, timing in harness.time_alternating(functions, args.repeats).items():
            row = {"name": name, "code": code, "kept": len(functions[code]()[1]), **timing._asdict()}
            rows.append(row)
        if batched_nms is None:
            del row["ratio"]
        else:
            row.update(compare_best(case, batched_nms))

    extractor = ConvTransformerFeatureExtractor(
        feature_size=2048, fps=30, feature_stride=4, num_frames=16, pre_nms_topk=2000, max_seg_num=200, min_score=0.001
    )
    outputs = make_outputs(torch.Generator().manual_seed(0))
    name = f"whole call, {outputs['logits'].shape[1]} points on {LEVELS} levels, {CLASSES} classes"
    timing = harness.time_alternating(
        {name: lambda: extractor.post_process_temporal_action_localization(outputs)}, args.repeats
    )[name]
    kept = len(extractor.post_process_temporal_action_localization(outputs)[0]["scores"])
    rows.append({"name": name, "code": "ours", "kept": kept, **timing._asdict(), "ratio": None})

    machine = harness.describe_machine()
    print(f"{harness.machine_line(machine)}; at most {BEST} segments kept in each group\n")
    harness.print_table(rows, [column for column in COLUMNS if args.v1 is not None or column.key != "code"])
    harness.write_json(args.json, machine, args, rows)
    worst = max((row.get("score_error", 0.0) for row in rows), default=0.0)
    if worst > 1e-4:
        raise BenchmarkError(f"scores differ from v1's by {worst:.1e}; expected at most 1e-4.")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--v1", metavar="PATH", help=f"{official.HELP}; with its NMS extension built")
    harness.add_arguments(parser, repeats=7)
    parser.set_defaults(threads=1)
    harness.run_command(run, parser, argv)


if __name__ == "__main__":
    main()
