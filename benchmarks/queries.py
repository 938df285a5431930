"""What many queries on one recording cost: the recording is encoded once, and a query costs the width of the decoder.

    python benchmarks/queries.py
    python benchmarks/queries.py --queries 1 16 256 --decoder-dim 32 256 --device cuda

Moment retrieval with the default configuration (n_in 2048, n_embd 256), random features and random word embeddings of a
sentence encoder's width (384), 10 words a query. Times of one width are taken in turn, and a ratio is to one query.
"""

import argparse

import harness
import torch
from harness import BenchmarkError, Column

from modeling_convtransformer import ConvTransformerConfig, ConvTransformerForMomentRetrieval

COLUMNS = [
    Column("attention", "attention"),
    Column("decoder_dim", "decoder_dim", "d"),
    Column("queries", "queries", "d"),
    Column("median ms", "median_ms", ".0f"),
    Column("min", "min_ms", ".0f"),
    Column("max", "max_ms", ".0f"),
    Column("time / one query", "ratio", ".2f"),
    Column("ms a query more", "marginal_ms", ".1f"),
]
TEXT, WORDS = 384, 10


@torch.no_grad()
def measure(window: int, decoder_dim: int | None, args: argparse.Namespace) -> list[dict]:
    torch.manual_seed(0)
    config = ConvTransformerConfig(text_dim=TEXT, mha_win_size=window, decoder_dim=decoder_dim)
    model = ConvTransformerForMomentRetrieval(config).eval().to(args.device)
    features = torch.randn(1, args.length, config.n_in, device=args.device)
    queries = torch.randn(1, max(args.queries), WORDS, TEXT, device=args.device)
    counts = sorted({1, *args.queries})
    functions = {count: lambda count=count: model(features, query_embeds=queries[:, :count]) for count in counts}
    timings = harness.time_alternating(functions, args.repeats, device=args.device)
    attention = "global" if window <= 1 else f"window {window}"
    rows = []
    for count, timing in timings.items():
        row = {"attention": attention, "decoder_dim": config.decoder_width, "queries": count, **timing._asdict()}
        if count > 1:
            row["marginal_ms"] = (timing.median_ms - timings[1].median_ms) / (count - 1)
        rows.append(row)
    return rows


def run(args: argparse.Namespace):
    if min(args.queries) < 1 or args.length < 1:
        raise BenchmarkError(f"--queries {args.queries} and --length {args.length} must be 1 or more.")
    machine = harness.describe_machine(args.device)
    print(f"{harness.machine_line(machine)}; one recording of {args.length} steps\n", flush=True)
    rows = []
    for window in args.windows:
        for decoder_dim in args.decoder_dim or [None]:
            try:
                rows += measure(window, decoder_dim, args)
            except ValueError as error:  # of the config
                raise BenchmarkError(harness.first_line(error)) from error
    harness.print_table(rows, COLUMNS)
    harness.write_json(args.json, machine, args, rows)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--queries", type=int, nargs="+", default=[1, 8, 64], help="on one recording (default: 1 8 64)"
    )
    parser.add_argument("--length", type=int, default=2304, help="of the recording, in features (default: 2304)")
    parser.add_argument(
        "--windows", type=int, nargs="+", default=[-1, 19], help="of attention; -1: global (default: -1 19)"
    )
    parser.add_argument("--decoder-dim", type=int, nargs="+", help="widths (default: the config's)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    harness.add_arguments(parser, repeats=5)
    harness.run_command(run, parser, argv)


if __name__ == "__main__":
    main()
