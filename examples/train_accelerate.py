"""Training without Trainer: a plain loop with accelerate, on one device or many.

    python examples/train_accelerate.py configuration/sbhar.yaml --folder data/sbhar
    accelerate launch --num_processes 2 examples/train_accelerate.py configuration/sbhar.yaml --folder data/sbhar

Takes the recipes and options of examples/train.py, as far as the loop below reads them. Mixed precision is --bf16 true
or --fp16 true (float16 on a GPU only), or `accelerate launch --mixed_precision bf16`. Writes a checkpoint after each
epoch, from which the same command goes on, and at the end the averaged weights and metrics.json.
"""

import json
import math
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm
from train import (
    MENDABLE,
    DataArguments,
    ModelArguments,
    Training,
    load_datasets,
    make_feature_extractor,
    make_model,
    one_line,
    parse,
)
from transformers import get_cosine_schedule_with_warmup

from modeling_convtransformer.data import DataCollator
from modeling_convtransformer.evaluation import evaluate_detections
from modeling_convtransformer.training import parameter_groups


def update_average(decay: float):
    """Moving average whose decay warms up; decay 0 is the weights themselves."""

    def update(averages, parameters, count):
        count = int(count)
        torch._foreach_lerp_(averages, parameters, 1 - min(decay, (1 + count) / (10 + count)))

    return update


@torch.no_grad()
def evaluate(model, dataset, collate, feature_extractor):
    model.eval()
    found, truth = {}, {}
    for batch in DataLoader(dataset, batch_size=4, collate_fn=collate):
        features, mask = (batch[name].to(model.device) for name in ("input_features", "attention_mask"))
        outputs = model(features, attention_mask=mask)
        geometry = batch["geometry"]
        seconds = feature_extractor.to_seconds([one["segments"] for one in batch["labels"]], geometry)
        results = feature_extractor.post_process_temporal_action_localization(outputs, geometry=geometry)
        for video_id, result, own, label in zip(batch["video_ids"], results, seconds, batch["labels"], strict=True):
            found[video_id] = {name: values.cpu() for name, values in result.items()}
            truth[video_id] = {"segments": own, "labels": label["class_labels"]}
    return evaluate_detections(found, truth)


def main():
    parser, recipe, model_options, data_options, options = parse(__doc__, ModelArguments, DataArguments, Training)
    try:
        set_seed(options.seed)
        feature_extractor = make_feature_extractor(recipe, model_options.checkpoint)
        train_set, val_set, names = load_datasets(data_options, feature_extractor, options.seed)
        model = make_model(recipe, model_options, names)
    except MENDABLE as error:
        parser.error(one_line(error))
    folder, epochs = Path(options.output_dir), math.ceil(options.num_train_epochs)

    # None leaves the choice to `accelerate launch` and its config.
    precision = "bf16" if options.bf16 else "fp16" if options.fp16 else None
    accelerator = Accelerator(
        gradient_accumulation_steps=options.gradient_accumulation_steps, mixed_precision=precision, cpu=options.use_cpu
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        parser.error("this loop averages and saves whole weights; under FSDP2 and DeepSpeed use examples/train.py")
    collate = DataCollator(feature_extractor)
    loader = DataLoader(train_set, options.per_device_train_batch_size, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate)
    average = AveragedModel(model, accelerator.device, multi_avg_fn=update_average(options.ema_decay))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = math.ceil(len(loader) / accelerator.gradient_accumulation_steps)  # of this process's share of the batches
    schedule = get_cosine_schedule_with_warmup(optimizer, round(options.warmup_epochs * steps), epochs * steps)
    accelerator.register_for_checkpointing(average, schedule)

    first = 0
    for checkpoint in sorted(folder.glob("epoch-*[0-9]"), reverse=True)[:1]:
        accelerator.load_state(checkpoint)
        first = int(checkpoint.name.rpartition("-")[2])
        accelerator.print(f"going on from {checkpoint}")

    for epoch in range(first, epochs):
        model.train()
        loader.set_epoch(epoch)  # shuffling and augmentations that differ from epoch to epoch, the same when resumed
        if hasattr(train_set, "set_epoch"):  # the loader tells only one of its sampler and its dataset
            train_set.set_epoch(epoch)
        progress = tqdm(loader, desc=f"epoch {epoch + 1}/{epochs}", disable=not accelerator.is_local_main_process)
        for batch in progress:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            # A step whose gradients overflowed in float16 was none.
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                schedule.step()
                average.update_parameters(accelerator.unwrap_model(model))
                progress.set_postfix(loss=f"{loss.item():.3f}")
        # Under a temporary name, so that a killed run leaves no half of a checkpoint; then the older one goes.
        checkpoint = folder / f"epoch-{epoch + 1:05d}"
        accelerator.save_state(checkpoint.with_suffix(".part"))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            checkpoint.with_suffix(".part").replace(checkpoint)
            shutil.rmtree(folder / f"epoch-{epoch:05d}", ignore_errors=True)
        accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        # The buffers (the loss's moving number of positives, batch norm's statistics) are the model's own.
        final = average.module
        final.load_state_dict(dict(accelerator.unwrap_model(model).named_buffers()), strict=False)
        collate.return_metadata = True
        metrics = evaluate(final, val_set, collate, feature_extractor)
        final.save_pretrained(folder)
        feature_extractor.save_pretrained(folder)
        (folder / "metrics.json").write_text(json.dumps(metrics.to_dict(), indent=2) + "\n", encoding="utf-8")
        print(f"\n{metrics}\n\nmodel: {folder}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
