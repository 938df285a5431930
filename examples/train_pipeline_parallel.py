"""Train a detector whose layers are spread over processes, by torch.distributed.pipelining: for models too deep for one GPU.

    torchrun --nproc_per_node 2 examples/train_pipeline_parallel.py configuration/sbhar.yaml --folder data/sbhar
    torchrun --nproc_per_node 4 examples/train_pipeline_parallel.py configuration/thumos14_i3d.yaml \\
        --annotations thumos14.json --features i3d_features --max_seq_len 2304 --microbatches 8

Takes the recipes and options of examples/train.py, as far as the loop below reads them, and --microbatches, into which the
recipe's batch is cut. With two processes, one has about the embedding and the stem, the other the branch, neck and heads.
Losses and gradients are those of the whole batch in one process. Recordings are padded to a multiple of --pad_to features,
because what travels between processes has fixed shapes. After the last epoch, --output_dir gets a checkpoint as any other
(weights without an average), metrics.json, and the first process evaluates it.

Where the model fits into one GPU, data parallelism (examples/accelerate) is faster: here, each process waits for others for
a share (processes - 1) / (microbatches + processes - 1) of the time.
"""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import distributed
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm
from train import (
    MENDABLE,
    DataArguments,
    ModelArguments,
    Training,
    Usage,
    load_datasets,
    make_feature_extractor,
    make_model,
    one_line,
    parse,
)
from train_accelerate import evaluate
from transformers import get_cosine_schedule_with_warmup, set_seed

from modeling_convtransformer import ConvTransformerForTemporalActionLocalization
from modeling_convtransformer.data import DataCollator
from modeling_convtransformer.parallel import Pipeline
from modeling_convtransformer.training import parameter_groups


@dataclass
class PipelineArguments:
    microbatches: int = field(
        default=2, metadata={"help": "into which each batch is cut; it must divide the batch size"}
    )
    pad_to: int = field(default=256, metadata={"help": "pad recordings to a multiple of so many features"})
    cuts: list[int] | None = field(
        default=None, metadata={"help": "first block of each process but the first, such as 2 (default: equal work)"}
    )


def pad(batch: dict, multiple: int) -> dict:
    """The batch with its recordings padded to the next multiple of so many steps."""
    missing = -batch["input_features"].shape[1] % multiple
    features = torch.nn.functional.pad(batch["input_features"], (0, 0, 0, missing))
    return {
        **batch,
        "input_features": features,
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, missing)),
    }


def check(pipeline: PipelineArguments, options: Training, recordings: int):
    if "RANK" not in os.environ:
        raise Usage("start with torchrun: torchrun --nproc_per_node 2 examples/train_pipeline_parallel.py ...")
    batch = options.per_device_train_batch_size
    if pipeline.microbatches < 1 or pipeline.pad_to < 1:
        raise Usage("--microbatches and --pad_to expect integers of at least 1")
    if batch % pipeline.microbatches:
        raise Usage(f"--per_device_train_batch_size {batch} cannot be cut into {pipeline.microbatches} --microbatches")
    if recordings < batch:
        raise Usage(f"{recordings} recordings train, fewer than --per_device_train_batch_size {batch}")


def main():
    kinds = (ModelArguments, DataArguments, Training, PipelineArguments)
    parser, recipe, model_options, data_options, options, pipeline_options = parse(__doc__, *kinds)
    try:
        set_seed(options.seed)  # the same weights and batches on every process
        feature_extractor = make_feature_extractor(recipe, model_options.checkpoint)
        train_set, val_set, names = load_datasets(data_options, feature_extractor, options.seed)
        model = make_model(recipe, model_options, names)
        check(pipeline_options, options, len(train_set))
    except MENDABLE as error:
        parser.error(one_line(error))
    folder, epochs, device = Path(options.output_dir), math.ceil(options.num_train_epochs), options.device
    if not distributed.is_initialized():
        distributed.init_process_group()
    is_first = distributed.get_rank() == 0
    try:
        pipeline = Pipeline(model, device, pipeline_options.microbatches, pipeline_options.cuts)
    except MENDABLE as error:
        parser.error(one_line(error))

    # One sequence of batches for all: a generator of its own, which no layer draws from.
    order = RandomSampler(train_set, generator=torch.Generator().manual_seed(options.seed))
    collate = DataCollator(feature_extractor)
    # The last batch of an epoch, if it is smaller, could not be cut: it is left out, other recordings in each epoch.
    loader = DataLoader(
        train_set, options.per_device_train_batch_size, sampler=order, collate_fn=collate, drop_last=True
    )
    optimizer = torch.optim.AdamW(parameter_groups(pipeline.stage, options.weight_decay), lr=options.learning_rate)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, round(options.warmup_epochs * len(loader)), epochs * len(loader)
    )
    stage = pipeline.stage
    print(
        f"process {pipeline.rank}: {'embedding, ' if stage.is_first else ''}blocks {stage.start} to {stage.stop - 1}"
        f"{', neck and heads' if stage.is_last else ''}; {sum(p.numel() for p in stage.parameters()) / 1e6:.2f} million "
        "parameters",
        flush=True,
    )

    for epoch in range(epochs):
        if hasattr(train_set, "set_epoch"):
            train_set.set_epoch(epoch)
        progress = tqdm(loader, desc=f"epoch {epoch + 1}/{epochs}", disable=not is_first)
        for batch in progress:
            loss = pipeline.step(pad(batch, pipeline_options.pad_to))
            pipeline.clip_grad_norm_(options.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}")

    pipeline.save_pretrained(folder)
    if is_first:
        feature_extractor.save_pretrained(folder)
        collate.return_metadata = True
        final = ConvTransformerForTemporalActionLocalization.from_pretrained(folder).to(device)
        metrics = evaluate(final, val_set, collate, feature_extractor)
        (folder / "metrics.json").write_text(json.dumps(metrics.to_dict(), indent=2) + "\n", encoding="utf-8")
        print(f"\n{metrics}\n\nmodel: {folder}")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
