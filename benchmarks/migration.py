"""What a v2 start from v1 weights is worth: the same few epochs from v1's weights and from scratch, feature by feature.

    python benchmarks/migration.py SBHAR_FOLDER

A model with v1's settings is trained on SBHAR (people 1 to 14; accelerometer and gyroscope, windows of 1 s every 0.5 s).
Each variant (RMSNorm, RoPE, SwiGLU, GQA, all of them) then starts once from those weights, by `convert.adapt`, and once
from random ones, trains for the same few epochs, and is evaluated on people 15 to 20. The folder holds signals.npz
(recordings (time, 6) at 50 Hz) and annotations.json.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup, set_seed

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
)
from modeling_convtransformer.convert.adapt import adapt
from modeling_convtransformer.data import DataCollator, TemporalActionDataset, window_features
from modeling_convtransformer.evaluation import evaluate_detections

V1 = {
    "n_in": 300,
    "n_embd": 128,
    "mha_win_size": 9,
    "max_len": 2304,
    "num_labels": 12,
    "regression_range": [[0, 4], [2, 8], [4, 16], [8, 32], [16, 64], [32, 10000]],
    "label_smoothing": 0.1,
    "init_loss_norm": 100,
    "use_rope": False,
    "use_swiglu": False,
    "use_rms_norm": False,
    "mask_conv_inputs": False,
}
VARIANTS = {
    "v1 settings": {},
    "masked convolutions": {"mask_conv_inputs": True},
    "RMSNorm": {"use_rms_norm": True},
    "RoPE": {"use_rope": True},
    "SwiGLU": {"use_swiglu": True},
    "GQA (2 of 4 heads)": {"n_kv_head": 2},
    "all of them": {
        "mask_conv_inputs": True,
        "use_rms_norm": True,
        "use_rope": True,
        "use_swiglu": True,
        "n_kv_head": 2,
    },
}

# The SwiGLU row again, with its MLPs initialised instead of made from v1's: what that mapping is worth.
NO_MAPPING = "SwiGLU, MLPs initialised"


def train(model, dataset, collate, epochs: int, learning_rate: float, seed: int, name: str):
    set_seed(seed)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    steps = epochs * len(loader)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(len(loader), steps // 4), steps)
    model.train()
    with tqdm(total=steps, desc=name, leave=False, disable=None) as progress:
        for _ in range(epochs):
            for batch in loader:
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                progress.update()


@torch.no_grad()
def average_map(model, dataset, collate, feature_extractor) -> float:
    """Average mAP (tIoU 0.3 to 0.7) in percent."""
    model.eval()
    predictions = {}
    for item in dataset:
        batch = collate([item])
        outputs = model(batch["input_features"], attention_mask=batch["attention_mask"])
        result = feature_extractor.post_process_temporal_action_localization(outputs, geometry=[item["geometry"]])[0]
        predictions[item["video_id"]] = {key: value.numpy() for key, value in result.items()}
    return 100 * evaluate_detections(predictions, dataset.ground_truth()).average_map


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with signals.npz and annotations.json")
    parser.add_argument("--source-epochs", type=int, default=30, help="epochs of the v1 model (default: 30)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each variant (default: 5)")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()

    feature_extractor = ConvTransformerFeatureExtractor(
        300, 50, 25, 50, nms_sigma=0.4, min_score=0.001, max_seg_num=200
    )
    collate = DataCollator(feature_extractor)
    with tempfile.TemporaryDirectory() as folder:
        with np.load(options.data / "signals.npz", allow_pickle=False) as signals:
            for name in signals.files:
                np.save(Path(folder) / f"{name}.npy", window_features(signals[name], 50, 25))
        sets = {
            split: TemporalActionDataset(
                options.data / "annotations.json", folder, split=split, feature_stride=25, num_frames=50
            )
            for split in ("training", "validation")
        }
        rows = {name: {"at once": [], "from v1": [], "from scratch": []} for name in [*VARIANTS, NO_MAPPING]}
        source_maps, began = [], time.perf_counter()
        for seed in range(options.seeds):
            set_seed(seed)
            source = ConvTransformerForTemporalActionLocalization(ConvTransformerConfig(**V1))
            train(source, sets["training"], collate, options.source_epochs, options.learning_rate, seed, "v1 source")
            source_maps.append(average_map(source, sets["validation"], collate, feature_extractor))
            print(f"seed {seed}: v1 source {source_maps[-1]:.1f} %", flush=True)
            for name in rows:
                config = ConvTransformerConfig(**{**V1, **VARIANTS.get(name, VARIANTS["SwiGLU"])})
                set_seed(seed)
                fresh = ConvTransformerForTemporalActionLocalization(config)
                started = adapt(source, config)[0]
                if name == NO_MAPPING:
                    own = started.state_dict()
                    own.update({key: value for key, value in fresh.state_dict().items() if ".mlp." in key})
                    started.load_state_dict(own)
                    fresh = None  # the same as in the row above
                rows[name]["at once"].append(average_map(started, sets["validation"], collate, feature_extractor))
                for start, model in {"from v1": started, "from scratch": fresh}.items():
                    if model is not None:
                        what = f"{name}, {start}"
                        train(model, sets["training"], collate, options.epochs, options.learning_rate, seed, what)
                        rows[name][start].append(average_map(model, sets["validation"], collate, feature_extractor))
                shown = "  ".join(f"{start} {values[-1]:.1f} %" for start, values in rows[name].items() if values)
                print(f"seed {seed}: {name}: {shown}", flush=True)

    print(
        f"\n{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{time.perf_counter() - began:.0f} s; average mAP (tIoU 0.3 to 0.7) on people 15 to 20, mean of {options.seeds} "
        f"seeds (lowest to highest)\nv1 source, {options.source_epochs} epochs: {np.mean(source_maps):.1f}\n"
    )
    epochs = f"{options.epochs} epochs"
    print(
        f"| | from v1's weights, untrained | from v1's weights, {epochs} | from scratch, {epochs} |\n|---|---|---|---|"
    )
    for name, values in rows.items():
        cells = [f"{np.mean(v):.1f} ({min(v):.1f} to {max(v):.1f})" if v else "" for v in values.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    if options.json:
        options.json.write_text(
            json.dumps({"source": source_maps, "variants": rows}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
