"""transformers' Trainer with our dataset items, collator and model."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="Trainer needs accelerate (the train and demo extras)")

from transformers import Trainer, TrainingArguments

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
)
from modeling_convtransformer.data import DataCollator


def items(count=4):
    rng = np.random.default_rng(0)
    return [
        {
            "video_id": f"v{index}",
            "features": rng.normal(size=(20 + index, 6)).astype(np.float32),
            "segments": np.array([[2.0, 9.0]], dtype=np.float32),
            "class_labels": np.array([index % 2]),
            "geometry": {"fps": 10, "feature_stride": 5, "num_frames": 5, "duration": 10.0},
        }
        for index in range(count)
    ]


def make():
    torch.manual_seed(0)
    config = ConvTransformerConfig(n_in=6, n_embd=16, n_head=2, arch=(1, 1, 1), path_pdrop=0.0, init_loss_norm=10)
    return ConvTransformerForTemporalActionLocalization(config), DataCollator(
        ConvTransformerFeatureExtractor(6, 10, 5)
    )


def arguments(folder, **changes):
    settings = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    return TrainingArguments(output_dir=str(folder), **{**settings, **changes})


def test_accumulated_batches_are_averaged(tmp_path):
    """Two batches accumulated move the weights by the mean of their gradients, not by the sum."""
    model, collate = make()
    data = [items()[0]] * 2
    expected = copy.deepcopy(model).train()
    for item in data:
        (expected(**collate([item])).loss / 2).backward()
    wanted = {
        name: parameter - parameter.grad
        for name, parameter in expected.named_parameters()
        if parameter.grad is not None
    }
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=data,
        data_collator=collate,
    )
    trainer.train()
    assert len(wanted) > 30
    for name, parameter in model.named_parameters():
        # float32; the same sums
        torch.testing.assert_close(parameter, wanted[name], atol=1e-6, rtol=1e-5)


def test_evaluation_keeps_every_sample(tmp_path):
    model, collate = make()
    seen = {}

    def compute_metrics(prediction):
        seen["batches"] = len(prediction.label_ids)
        seen["samples"] = sum(len(batch) for batch in prediction.label_ids)
        seen["names"] = len(prediction.predictions[0])
        return {"nothing": 0.0}

    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, eval_do_concat_batches=False),
        eval_dataset=items(5),
        data_collator=collate,
        compute_metrics=compute_metrics,
    )
    metrics = trainer.evaluate()
    # logits, pred_segments, point_mask, point_levels: no loss_dict, which cannot be gathered
    assert seen == {"batches": 3, "samples": 5, "names": 4}
    assert metrics["eval_loss"] > 0


def test_items_that_lost_their_columns_are_explained(tmp_path):
    model, collate = make()
    trainer = Trainer(
        model=model, args=arguments(tmp_path, remove_unused_columns=True), train_dataset=items(), data_collator=collate
    )
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        trainer.train()
