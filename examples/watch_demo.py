"""Train on smartwatch recordings of seven people, evaluate on three whom the model never saw, localize one session.

    python examples/watch_demo.py            (`make demo` also installs what it needs)

The recordings come with the package seglearn, so nothing is downloaded at run time. Everything is written to
outputs/watch: the trained model, the raw sensor values of one session of an unseen person, and a picture of what the
model finds in it, made by examples/localize.py in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from tqdm import tqdm
from transformers import Trainer, TrainingArguments, set_seed

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
)
from modeling_convtransformer.data import DataCollator, WatchDataset
from modeling_convtransformer.evaluation import evaluate_detections
from modeling_convtransformer.segments import to_rows, write_segments

ROOT = Path(__file__).resolve().parent.parent


def train(model, dataset, feature_extractor, recipe: dict, folder: Path):
    """v1's recipe in short: AdamW, linear warm-up, cosine decay, gradient clipping."""
    steps_per_epoch = -(-len(dataset) // recipe["per_device_train_batch_size"])
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=recipe["num_train_epochs"],
        per_device_train_batch_size=recipe["per_device_train_batch_size"],
        learning_rate=recipe["learning_rate"],
        weight_decay=recipe["weight_decay"],
        warmup_steps=recipe["warmup_epochs"] * steps_per_epoch,
        lr_scheduler_type="cosine",
        max_grad_norm=recipe["max_grad_norm"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        seed=recipe["seed"],
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=dataset, data_collator=DataCollator(feature_extractor)
    )
    trainer.train()


@torch.no_grad()
def localize_all(model, dataset, feature_extractor) -> dict[str, dict]:
    """Predicted segments in seconds of every session, by video id."""
    model.eval()
    collate = DataCollator(feature_extractor, return_metadata=True)
    predictions = {}
    for item in tqdm(dataset, desc="localize", total=len(dataset)):
        batch = collate([item])
        outputs = model(
            batch["input_features"].to(model.device), attention_mask=batch["attention_mask"].to(model.device)
        )
        result = feature_extractor.post_process_temporal_action_localization(outputs, geometry=batch["geometry"])[0]
        predictions[item["video_id"]] = {key: value.cpu().numpy() for key, value in result.items()}
    return predictions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configuration" / "watch.yaml", help="model and recipe")
    parser.add_argument("--output", type=Path, default=Path("outputs/watch"), help="folder to write to")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--seed", type=int, help="instead of the recipe's")
    options = parser.parse_args()

    settings = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    data, recipe = settings["data"], settings["training"]
    recipe["num_train_epochs"] = options.epochs or recipe["num_train_epochs"]
    recipe["seed"] = recipe["seed"] if options.seed is None else options.seed
    set_seed(recipe["seed"])
    began = time.perf_counter()

    feature_extractor = ConvTransformerFeatureExtractor.from_yaml(options.config)
    windows = {"window": feature_extractor.num_frames, "stride": feature_extractor.feature_stride}
    train_set = WatchDataset(
        data["train_people"],
        sessions_per_side=data["sessions_per_side"],
        bout=data["bout"],
        pause=data["pause"],
        seed=recipe["seed"],
        training=True,
        **windows,
    )
    test_set = WatchDataset(data["test_people"], sessions_per_side=data["sessions_per_side"], **windows)
    config = ConvTransformerConfig.from_yaml(options.config, id2label=train_set.id2label, label2id=train_set.label2id)
    model = ConvTransformerForTemporalActionLocalization(config)
    print(
        f"{model.num_parameters() / 1e6:.1f} million parameters; people {data['train_people']} train "
        f"({len(train_set)} sessions an epoch), people {data['test_people']} test ({len(test_set)} sessions)"
    )
    train(model, train_set, feature_extractor, recipe, options.output)
    print(f"trained in {time.perf_counter() - began:.0f} s on {model.device}")

    predictions = localize_all(model, test_set, feature_extractor)
    metrics = evaluate_detections(predictions, test_set.ground_truth())
    print(f"\nPeople whom the model never saw:\n{metrics}\n")

    folder = options.output / "model"
    model.save_pretrained(folder)
    feature_extractor.save_pretrained(folder)
    (folder / "metrics.json").write_text(json.dumps(metrics.to_dict(), indent=2) + "\n", encoding="utf-8")

    # One unseen session as a user has it: raw sensor values in a file, and the truth to look at beside.
    video_id = test_set.video_ids[0]
    signal, truth = options.output / f"{video_id}.npy", options.output / f"{video_id}.json"
    np.save(signal, test_set.signal(0))
    write_segments(truth, to_rows(test_set.ground_truth()[video_id], config.id2label))
    picture = options.output / f"{video_id}.png"
    localize = [Path(__file__).with_name("localize.py"), folder, signal, "--truth", truth, "--picture", picture]
    subprocess.run([sys.executable, *map(str, localize)], check=True)
    print(f"\nAll done in {time.perf_counter() - began:.0f} s. Average mAP {100 * metrics.average_map:.1f} %.")


if __name__ == "__main__":
    main()
