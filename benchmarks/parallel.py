"""Training on several processes beside training on one: how far they drift apart, and what data parallelism gains.

    python benchmarks/parallel.py
    python benchmarks/parallel.py --ways ddp pp --processes 4 --steps 20
    python benchmarks/parallel.py --speed --n-embd 256 --length 2304

Each way trains the same checkpoint on the same batches, with plain gradient descent (momentum 0.9; Adam would blow rounding
errors of tiny gradients up to whole steps), and its own checkpoint is loaded again in one process. `ddp` and `fsdp2` share a
batch out, `tp` and `pp` share the model. All processes are on this machine, on its CPU, with one thread each (gloo).

--speed measures DDP: in turn, one process takes a step while the others wait, and all take one, each on a batch of its own.
The ratio is samples a second of all over those of one, the median over rounds; on a busy machine it says little.
"""

import argparse
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import harness
import torch
from harness import BenchmarkError, Column
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from modeling_convtransformer import ConvTransformerConfig, ConvTransformerForTemporalActionLocalization
from modeling_convtransformer.parallel import Pipeline

COLUMNS = [
    Column("way", "way"),
    Column("processes", "processes"),
    Column("steps", "steps"),
    Column("losses", "losses", ".1e"),
    Column("first gradients", "gradients", ".1e"),
    Column("weights at the end", "weights", ".1e"),
    Column("outputs (relative)", "outputs", ".1e"),
]
SPEED_COLUMNS = [
    Column("processes", "processes"),
    Column("ms a step", "all_ms", ".0f"),
    Column("ms, one process alone", "one_ms", ".0f"),
    Column("samples/s over one process", "ratio", ".2f"),
    Column("min", "min_ratio", ".2f"),
    Column("max", "max_ratio", ".2f"),
]

# Learning rate. Where steps are large, a rounding error can carry some ReLU over its kink, and runs that are the same in
# exact arithmetic part: at 0.05, one in ten do within five steps, by 1e-5 to 1e-4.
RATE = 0.003

Batch = dict[str, torch.Tensor | list]


# ---------------------------------------------------------------------------------------------------------------------
# Model and batches


def make_detector(seed: int = 0, **settings) -> ConvTransformerForTemporalActionLocalization:
    """A detector whose weights are moved away from where they start, so that every part of it shows."""
    torch.manual_seed(seed)
    model = ConvTransformerForTemporalActionLocalization(ConvTransformerConfig(**{"path_pdrop": 0.0, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def make_batch(seed: int, size: int, length: int, width: int, num_labels: int) -> Batch:
    """Noise with segments: samples of other lengths and numbers of segments, one without any."""
    generator = torch.Generator().manual_seed(seed)
    mask, labels = torch.ones(size, length, dtype=torch.bool), []
    for index in range(size):
        mask[index, length - index * length // (2 * size) :] = False
        count = index % 3
        starts = torch.rand(count, generator=generator) * length / 4
        spans = 2 + torch.rand(count, generator=generator) * length / 4
        classes = torch.randint(num_labels, (count,), generator=generator)
        labels.append({"segments": torch.stack((starts, starts + spans), dim=-1), "class_labels": classes})
    features = torch.randn(size, length, width, generator=generator)
    return {"input_features": features, "attention_mask": mask, "labels": labels}


# ---------------------------------------------------------------------------------------------------------------------
# The ways


def train(parameters: Iterable[tuple[str, nn.Parameter]], step: Callable[[Batch], torch.Tensor], batches: list[Batch]):
    """The loss of every step, and the gradients of the first one."""
    parameters = dict(parameters)
    optimizer = torch.optim.SGD(parameters.values(), lr=RATE, momentum=0.9)
    losses, gradients = [], {}
    for batch in batches:
        losses.append(step(batch))
        gradients = gradients or {name: whole(parameter.grad) for name, parameter in parameters.items()}
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": torch.stack(losses), "gradients": gradients}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, put together if it is spread over processes."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def forward_backward(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss = model(**batch).loss
    loss.backward()
    return loss.detach().clone()


def own_share(model: nn.Module, batch: Batch) -> torch.Tensor:
    """One step on this process's samples; the mean loss of all processes, which is that of the whole batch."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    count = len(batch["labels"]) // size
    loss = forward_backward(model, {name: value[rank * count :][:count] for name, value in batch.items()})
    distributed.all_reduce(loss)
    return loss / size


def load(checkpoint: Path, **kwargs) -> ConvTransformerForTemporalActionLocalization:
    return ConvTransformerForTemporalActionLocalization.from_pretrained(checkpoint, **kwargs).train()


def train_one(checkpoint: Path, batches: list[Batch], folder: Path):
    model = load(checkpoint)
    result = train(model.named_parameters(), lambda batch: forward_backward(model, batch), batches)
    model.save_pretrained(folder)
    return result


def train_ddp(checkpoint: Path, batches: list[Batch], folder: Path):
    model = load(checkpoint)
    wrapped = DistributedDataParallel(model)
    result = train(model.named_parameters(), lambda batch: own_share(wrapped, batch), batches)
    model.save_pretrained(folder, is_main_process=distributed.get_rank() == 0)
    return result


def train_fsdp2(checkpoint: Path, batches: list[Batch], folder: Path):
    model = load(checkpoint, distributed_config=DistributedConfig(fsdp_size=distributed.get_world_size()))
    result = train(model.named_parameters(), lambda batch: own_share(model, batch), batches)
    model.save_pretrained(folder)
    return result


def train_tp(checkpoint: Path, batches: list[Batch], folder: Path):
    model = load(checkpoint, distributed_config=DistributedConfig(tp_size=distributed.get_world_size()))
    result = train(model.named_parameters(), lambda batch: forward_backward(model, batch), batches)
    model.save_pretrained(folder)
    return result


def train_pp(checkpoint: Path, batches: list[Batch], folder: Path):
    pipeline = Pipeline(load(checkpoint), torch.device("cpu"), microbatches=len(batches[0]["labels"]) // 2)
    result = train(pipeline.stage.detector.named_parameters(), pipeline.step, batches)
    parts = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, result["gradients"])
    result["gradients"] = {name: gradient for part in parts for name, gradient in part.items()}
    pipeline.save_pretrained(folder)
    return result


WAYS = {"ddp": train_ddp, "fsdp2": train_fsdp2, "tp": train_tp, "pp": train_pp}


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def start_processes(function: Callable, processes: int, *args):
    """Runs `function(rank, *args)` in so many fresh processes, which form a gloo group."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    torch.multiprocessing.spawn(_start, (processes, port, function, args), nprocs=processes)


def _start(rank: int, processes: int, port: int, function: Callable, args: tuple):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    distributed.init_process_group("gloo")
    function(rank, *args)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def train_ways(rank: int, folder: Path, ways: list[str], batches: list[Batch]):
    """Trains `folder`/start in each of the ways; the checkpoint of a way goes to `folder`/way."""
    for way in ways:
        result = WAYS[way](folder / "start", batches, folder / way)
        if rank == 0:
            torch.save(result, folder / f"{way}.pt")
        distributed.barrier()


def compare(folder: Path, ways: list[str], batches: list[Batch]) -> dict[str, dict[str, float]]:
    """For each way, the largest differences from one process: of losses, first gradients, weights at the end, and what
    the checkpoint puts out (that one over the largest value). Trains in one process first; `train_ways` has trained the others."""
    wanted = train_one(folder / "start", batches, folder / "one")
    one, features = load(folder / "one").eval(), batches[0]["input_features"]
    rows = {}
    for way in ways:
        own, model = torch.load(folder / f"{way}.pt", weights_only=True), load(folder / way).eval()
        if {*own["gradients"]} != {*wanted["gradients"]}:
            raise RuntimeError(f"{way} has gradients of other parameters than one process has.")
        state = model.state_dict()
        with torch.no_grad():
            outputs, expected = model(features), one(features)
        rows[way] = {
            "losses": (own["losses"] - wanted["losses"]).abs().max().item(),
            "gradients": max(
                (own["gradients"][name] - gradient).abs().max().item()
                for name, gradient in wanted["gradients"].items()
            ),
            "weights": max((state[name] - tensor).abs().max().item() for name, tensor in one.state_dict().items()),
            "outputs": max(
                ((outputs[name] - expected[name]).abs().max() / expected[name].abs().max()).item()
                for name in ("logits", "pred_segments")
            ),
        }
    return rows


def time_ddp(rank: int, path: Path, settings: dict, batch: Batch, repeats: int):
    """Seconds of a step of one process while the others wait, and of all together, in turn."""
    model = make_detector(**settings)
    wrapped = DistributedDataParallel(model)
    # Counting positives over all processes is no part of a step of one: both get the same number.
    batch = {**batch, "num_items_in_batch": 100.0}

    def step(model: nn.Module):
        start = time.perf_counter()
        forward_backward(model, batch)
        return time.perf_counter() - start

    alone, together = [], []
    for _ in range(repeats + 1):
        distributed.barrier()
        if rank == 0:
            alone.append(step(model))
        distributed.barrier()
        together.append(step(wrapped))
        distributed.barrier()
    if rank == 0:
        torch.save({"one": alone[1:], "all": together[1:]}, path)


# ---------------------------------------------------------------------------------------------------------------------
# Command


def run(args: argparse.Namespace):
    if min(args.processes, args.steps, args.batch_size, args.length, args.repeats) < 1:
        raise BenchmarkError(
            "--processes, --steps, --batch-size, --length and --repeats expect integers of at least 1."
        )
    logging.disable_progress_bar()
    machine = harness.describe_machine()
    print(harness.machine_line(machine), flush=True)
    # (losses of about 1, so that they move and their differences mean something)
    shape = {"n_in": 64, "n_embd": args.n_embd, "num_labels": 20, "init_loss_norm": 20}
    size = args.batch_size * args.processes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.speed:
            print(
                f"A step (forward and backward) of DDP, {args.batch_size} samples of {args.length} steps a process\n"
            )
            batch = make_batch(0, args.batch_size, args.length, 64, 20)
            start_processes(time_ddp, args.processes, folder / "times.pt", shape, batch, args.repeats)
            times = torch.load(folder / "times.pt", weights_only=True)
            ratios = [args.processes * one / every for one, every in zip(times["one"], times["all"], strict=True)]
            row = {
                "processes": args.processes,
                "all_ms": 1e3 * statistics.median(times["all"]),
                "one_ms": 1e3 * statistics.median(times["one"]),
                "ratio": statistics.median(ratios),
                "min_ratio": min(ratios),
                "max_ratio": max(ratios),
            }
            rows, columns = [row], SPEED_COLUMNS
        else:
            print(f"Largest differences from one process, float32, batches of {size} samples of {args.length} steps\n")
            batches = [make_batch(seed, size, args.length, 64, 20) for seed in range(args.steps)]
            make_detector(**shape, n_head=2 * args.processes, n_kv_head=args.processes).save_pretrained(
                folder / "start"
            )
            start_processes(train_ways, args.processes, folder, args.ways, batches)
            found = compare(folder, args.ways, batches)
            head = {"processes": args.processes, "steps": args.steps}
            rows, columns = [{"way": way, **head, **row} for way, row in found.items()], COLUMNS
    harness.print_table(rows, columns)
    harness.write_json(args.json, machine, args, rows)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="(default: all)")
    parser.add_argument("--processes", type=int, default=2, help="(default: 2)")
    parser.add_argument("--steps", type=int, default=5, help="of the optimizer (default: 5)")
    parser.add_argument("--batch-size", type=int, default=2, help="samples of a process (default: 2)")
    parser.add_argument("--length", type=int, default=256, help="steps of a sample (default: 256)")
    parser.add_argument("--n-embd", type=int, default=64, help="width of the model (default: 64)")
    parser.add_argument("--speed", action="store_true", help="measure the throughput of DDP instead")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of --speed (default: 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, arguments and every row here")
    parser.set_defaults(threads=1)
    return parser


def main(argv: list[str] | None = None):
    harness.run_command(run, make_parser(), argv)


if __name__ == "__main__":
    main()
