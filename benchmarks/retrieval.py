"""Search over many recordings: what an index takes, how fast it answers, and which levels of the pyramid belong in it.

    python benchmarks/retrieval.py --threads 1
    python benchmarks/retrieval.py --model outputs/search/model     (written by `python examples/search.py demo`)

Times are of made-up unit vectors, 100 for each recording, and of 8 questions at once that look for 5 recordings. With a model,
the recall of examples/search.py (the right one among sessions of two exercises, of people whom the model never saw) is
measured again with coarser levels only.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import harness
import numpy as np
import yaml
from harness import Column
from transformers import AutoProcessor

from modeling_convtransformer import ConvTransformerForMomentRetrieval
from modeling_convtransformer.retrieval import SegmentIndex, embed_recordings

sys.path.insert(0, str(harness.ROOT / "examples"))

DIM, QUERIES, TOP, SEGMENTS = 64, 8, 5, 100

TIMES = [
    Column("vectors", "vectors", "{:,}".format),
    Column("embeddings", "dtype"),
    Column("backend", "backend"),
    Column("MB", "megabytes", "{:.1f}".format),
    Column("median", "median_ms", "{:.1f} ms".format),
    Column("slowest", "max_ms", "{:.1f} ms".format),
]
LEVELS = [
    Column("levels", "levels"),
    Column("vectors a recording", "vectors", "{:.0f}".format),
    Column("embeddings", "dtype"),
    Column("kB a recording", "kilobytes", "{:.1f}".format),
    Column("trained", "training", "{:.1%}".format),
    Column("paraphrases", "paraphrases", "{:.1%}".format),
    Column("images", "images", "{:.1%}".format),
]


def time_search(recordings: int, repeats: int) -> list[dict]:
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(QUERIES, DIM)).astype(np.float32)
    backends = ["torch", *(["faiss"] if importlib.util.find_spec("faiss") else [])]
    indexes = {(dtype, one): SegmentIndex(DIM, dtype, one) for dtype in ("float32", "int8") for one in backends}
    for number in range(recordings):
        embeds, segments = rng.normal(size=(SEGMENTS, DIM)), np.tile([[0.0, 1.0]], (SEGMENTS, 1))
        for index in indexes.values():
            index.add(str(number), embeds, segments)
    functions = {key: lambda index=index: index.search(queries, TOP) for key, index in indexes.items()}
    timings = harness.time_alternating(functions, repeats)
    return [
        {
            "vectors": index.num_segments,
            "dtype": key[0],
            "backend": key[1],
            "megabytes": index.nbytes / 1e6,
            **timings[key]._asdict(),
        }
        for key, index in indexes.items()
    ]


def measure_levels(folder: Path) -> list[dict]:
    import search

    model, processor = (
        ConvTransformerForMomentRetrieval.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    settings = yaml.safe_load((harness.ROOT / "configuration" / "watch_moments.yaml").read_text(encoding="utf-8"))
    extractor = processor.feature_extractor
    windows = {"window": extractor.num_frames, "stride": extractor.feature_stride}
    recordings, holds = search.make_gallery(settings["data"]["test_people"], windows)
    texts = {name: search.embed_phrasings(model, processor, own) for name, own in settings["queries"].items()}
    count, rows = len(model.config.detector_strides), []
    for first in range(count):
        levels = [*range(first, count)]
        embedded = [*embed_recordings(model, processor, recordings, levels, show_progress=False)]
        for dtype in ("float32", "int8"):
            index = SegmentIndex(model.config.projection_dim, dtype)
            for one in embedded:
                index.add(**one)
            row = {"levels": f"{first} to {count - 1}", "dtype": dtype, "vectors": index.num_segments / len(index)}
            row["kilobytes"] = index.nbytes / len(index) / 1e3
            for name, text in texts.items():
                row[name] = search.recall_of_recordings(index, *text, holds, TOP)
            rows.append(row)
    return rows


def run(args: argparse.Namespace):
    machine = harness.describe_machine()
    print(f"{harness.machine_line(machine)}; {QUERIES} questions, the best {TOP} recordings\n")
    rows = [row for recordings in args.recordings for row in time_search(recordings, args.repeats)]
    harness.print_table(rows, TIMES)
    levels = []
    if args.model is not None:
        levels = measure_levels(args.model)
        print(f"\nrecall@{TOP} of recordings\n")
        harness.print_table(levels, LEVELS)
    harness.write_json(args.json, machine, args, rows, levels=levels)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model that examples/search.py trained")
    parser.add_argument("--recordings", type=int, nargs="+", default=[1000, 10000], help="of 100 vectors each")
    harness.add_arguments(parser, repeats=5)
    parser.set_defaults(threads=1)
    harness.run_command(run, parser, argv)


if __name__ == "__main__":
    main()
