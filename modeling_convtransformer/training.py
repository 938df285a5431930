"""How a ConvTransformer is trained, with transformers' Trainer or without.

    trainer = TemporalActionTrainer(
        model=model, args=arguments, train_dataset=train_set, eval_dataset=test_set,
        data_collator=DataCollator(feature_extractor, return_metadata=True), feature_extractor=feature_extractor,
        compute_metrics=compute_detection_metrics,
    )
    trainer.add_callback(EMACallback(trainer, decay=0.999))
    trainer.train(resume_from_checkpoint=find_last_checkpoint(arguments.output_dir))

The recipe is that of ActionFormer's release (Zhang et al., ECCV 2022, https://arxiv.org/abs/2202.07925): AdamW without
weight decay on norms, biases, scales and position tables, a linear warm-up and a cosine decay of the learning rate
(`lr_scheduler_type="cosine"`, `warmup_steps`), gradients clipped to a norm of 1 (`max_grad_norm`), and a moving average
of the weights. Label smoothing is a field of the model's config; Trainer's own is for other losses.
"""

import functools
import json
import os
import platform
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .configuration_convtransformer import ConvTransformerConfig
from .convert.adapt import Report, adapt
from .data import DataCollator
from .evaluation import evaluate_detections
from .model_card_convtransformer import make_model_card, write_model_card
from .modeling_convtransformer import ConvTransformerForTemporalActionLocalization, MaskedConv1d

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = [
    "EMACallback",
    "TemporalActionTrainer",
    "adapt_convolutions",
    "compute_detection_metrics",
    "decay_parameter_names",
    "find_last_checkpoint",
    "load_ema",
    "load_for_classes",
    "parameter_groups",
    "register_peft_defaults",
    "shareable_command",
]

EMA_NAME = "ema.safetensors"

# What fills up arrays of different lengths, here and in Trainer's own padding.
_FILLER = -100


# --- Parameters and weights -----------------------------------------------------------------------------------------


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay is for: the weights of linear and convolution layers (a LoRA adapter's
    are such layers too). Norms, biases, the scales of drop path and of the regression head, position tables and relative
    biases are left alone, as in ActionFormer's release."""
    return [
        f"{prefix}.weight" if prefix else "weight"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d)
    ]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that learn, in two groups for an optimizer: with `weight_decay`, and without."""
    decays = {*decay_parameter_names(model)}
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in decays].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def load_for_classes(
    checkpoint: str | os.PathLike, labels: Sequence[str], **overrides: Any
) -> tuple[ConvTransformerForTemporalActionLocalization, Report]:
    """A detector for the classes `labels` that starts from `checkpoint`, whatever classes that one has: what fits is
    carried over, rows of the classification head by class name. `overrides` are fields of the config.

    Returns:
        the model, and a `convert.adapt.Report` that names for each tensor whether it was copied, adapted or initialised.

    Raises:
        ConversionError: nothing fits.
        OSError: there is no such checkpoint.
    """
    source = ConvTransformerForTemporalActionLocalization.from_pretrained(checkpoint)
    if getattr(source, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{checkpoint} is quantized, so that its weights cannot learn; give the full-precision checkpoint."
        )
    names = dict(enumerate(labels))
    fields = source.config.to_dict()
    if names != source.config.id2label:
        fields["empty_labels"] = ()  # ids of the old classes
    fields.update(overrides, id2label=names, label2id={name: index for index, name in names.items()})
    return adapt(source, ConvTransformerConfig.from_dict(fields))


class EMACallback(TrainerCallback):
    """
    A moving average of the weights that learn, kept beside them, evaluated and saved with them.

    After each optimizer step, average = d * average + (1 - d) * weights, where d rises as (1 + step) / (10 + step) up to
    `decay`: without that warm-up the initial weights would weigh on the average for the first 1 / (1 - decay) steps and
    more. Buffers (of batch norm, and the loss's number of positives) are not averaged: the model's own count.

    Each evaluation is repeated with the averaged weights; its metrics, `eval_ema_map` and so on, join the others, so that
    `metric_for_best_model="eval_ema_map"` chooses the best checkpoint by them. Every checkpoint folder gets an
    `ema.safetensors`, from which training resumes and `load_ema` reads. When training ends with
    `load_best_model_at_end`, the average is that of the best checkpoint too. Add this callback before `EarlyStoppingCallback`.

    Args:
        trainer: the Trainer that it is added to.
        decay: 0.999 averages about the last 1000 steps.

    Raises:
        ValueError: the decay is not in [0, 1).
    """

    def __init__(self, trainer: Trainer, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay!r}; expected a number in [0, 1), such as 0.999.")
        self.trainer, self.decay = trainer, decay
        self.average: dict[str, torch.Tensor] = {}
        self.in_use = False  # whether the model has the averaged weights just now
        self.saved_step: int | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.saved_step = None
        parameters = _parameters(model)
        if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
            raise ValueError(
                "EMACallback cannot read the weights that DeepSpeed's ZeRO-3 spreads over processes. Leave it out "
                "(examples/train.py: --ema_decay 0), or use FSDP2, which spreads them too: examples/accelerate/fsdp2.yaml."
            )
        self.average = {  # float32 at least: in half precision, steps of 1 - decay would be rounded away
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in parameters.items()
            if parameter.requires_grad
        }
        if state.global_step > 0:
            resumed_from = getattr(self.trainer, "resumed_from", None)
            named = isinstance(resumed_from, str | os.PathLike)
            checkpoint = Path(resumed_from) if named else _checkpoint_folder(args.output_dir, state.global_step)
            if (checkpoint / EMA_NAME).exists():
                self._read(checkpoint)
            else:
                warnings.warn(
                    f"{checkpoint} has no {EMA_NAME}: the moving average starts anew from the checkpoint's own weights."
                )

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        parameters = _parameters(model)
        for name, average in self.average.items():
            average.lerp_(parameters[name].detach().to(average.dtype), 1 - decay)
        self._save_if_due(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._save_if_due(args, state, control)

    def on_evaluate(self, args, state, control, metrics=None, eval_dataloader=None, **kwargs):
        if not self.average:
            return
        # With several datasets, each has an evaluation of its own: "eval_night_runtime".
        prefix = next(name for name in reversed(metrics) if name.endswith("_runtime")).removesuffix("_runtime")
        with self.weights(self.trainer.model):
            # Not `evaluate`, which would call this and other callbacks again.
            output = self.trainer.predict(eval_dataloader.dataset, metric_key_prefix=f"{prefix}_ema")
        metrics.update(output.metrics)
        self.trainer.log(output.metrics)

    def on_save(self, args, state, control, **kwargs):
        # Usually it is there already; a checkpoint that is saved for its score is known only now.
        if self.saved_step != state.global_step:
            self._save(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and (Path(best) / EMA_NAME).exists():
            self._read(Path(best))

    @contextmanager
    def weights(self, model: nn.Module) -> Iterator[nn.Module]:
        """`with ema.weights(model):` the model has the averaged weights; afterwards its own again."""
        parameters = {name: parameter for name, parameter in _parameters(model).items() if name in self.average}
        own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        _copy(self.average, parameters)
        self.in_use = True
        try:
            yield model
        finally:
            self.in_use = False
            _parameters(model)
            _copy(own, parameters)

    def _save_if_due(self, args, state, control):
        # Before Trainer writes the checkpoint, whose last file then says that it is complete (`find_last_checkpoint`).
        if control.should_save:
            self._save(args, state)

    def _save(self, args, state):
        # All processes: a tensor that is spread over them is put together by all.
        average = {}
        for name, tensor in self.average.items():
            whole = _whole(tensor)
            if state.is_world_process_zero:  # the others, and devices, let go of each one at once
                average[name] = whole.cpu()
        self.saved_step = state.global_step
        if not state.is_world_process_zero:
            return
        folder = _checkpoint_folder(args.output_dir, state.global_step)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{EMA_NAME}.{os.getpid()}.part"
        save_file({name: tensor.contiguous() for name, tensor in average.items()}, path)
        path.replace(folder / EMA_NAME)

    def _read(self, checkpoint: Path):
        _copy(_read_ema(checkpoint, self.average), self.average)


def load_ema(model: PreTrainedModel, checkpoint: str | os.PathLike) -> PreTrainedModel:
    """Gives `model`, which was loaded from a checkpoint folder of a Trainer with `EMACallback`, that folder's averaged
    weights in place of its own.

    Raises:
        FileNotFoundError: the folder has no `ema.safetensors`.
        ValueError: the file is not of this model.
    """
    parameters = _parameters(model)
    _copy(_read_ema(Path(checkpoint), parameters), parameters)
    return model


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name, as the optimizer has them. FSDP2 puts whole ones in their place while they are used, and
    those of the outermost module stay there after an evaluation."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return dict(model.named_parameters())


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor that FSDP2 or tensor parallelism spreads over processes, all of it; to be called on all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def _copy(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]):
    for name, tensor in source.items():
        own = target[name]
        if hasattr(own, "placements") and not hasattr(tensor, "placements"):
            # Every process has read the same file, and keeps its part.
            from torch.distributed.tensor import distribute_tensor  # not in every build of PyTorch

            tensor = distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
        own.copy_(tensor)


def _read_ema(checkpoint: Path, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    path = checkpoint / EMA_NAME
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}; was EMACallback at work when this checkpoint was saved?")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it has no iterator
    wrong = [name for name, tensor in tensors.items() if name not in expected or expected[name].shape != tensor.shape]
    if wrong:
        raise ValueError(
            f"{path} is of another model: it has {wrong[0]}, {len(wrong)} tensors in all that do not fit."
        )
    return tensors


# --- Checkpoints ----------------------------------------------------------------------------------------------------


def _checkpoint_folder(output_dir: str | os.PathLike, step: int) -> Path:
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def find_last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint of a Trainer that was written to its end, or None: what `resume_from_checkpoint` takes after
    a run was killed, perhaps while it was saving. (Trainer's own search returns the newest folder, complete or not.)

    Trainer writes trainer_state.json after model, optimizer, scheduler and random state: a checkpoint is complete if that
    file can be read.
    """
    folders = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.rpartition("-")[2]
        if step.isdigit():
            folders.append((int(step), folder))
    for step, folder in sorted(folders, reverse=True):
        try:
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            warnings.warn(f"{folder} is incomplete, as if the run had been killed while saving it; passed over.")
            continue
        if state.get("global_step") == step:
            return str(folder)
    return None


# --- Trainer --------------------------------------------------------------------------------------------------------


class _SetEpoch(TrainerCallback):
    """Tells the training dataset which epoch begins: accelerate does so only where the sampler does not want to know. With
    it, a resumed run draws the augmentations that the first run would have drawn."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        dataset = getattr(train_dataloader, "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch + 1e-6))


class TemporalActionTrainer(Trainer):
    """
    transformers' Trainer for detectors of segments. It differs from Trainer in five things:

    - Evaluation turns the output of each batch into segments in seconds at once. `compute_metrics` gets
      `EvalPrediction(predictions, label_ids)` with predictions `(samples, N, 4)` (start, end, score, class) and label_ids
      `(samples, M, 3)` (start, end, class), rows of -100 as filler: no logit is kept, and samples of different lengths,
      also of different processes, are gathered whole. `compute_detection_metrics` takes them.
    - Weight decay is for `decay_parameter_names`.
    - With gradient accumulation, the positives of all accumulated batches are counted before the first of them, so that
      the gradients are those of one large batch.
    - A dataset that draws (crops, augmentations) draws by epoch: a resumed run repeats what the killed run drew.
    - The model card says what was measured; see `create_model_card`.

    Args:
        feature_extractor: turns outputs into segments, with its own post-processing settings.
        data_collator: `DataCollator(feature_extractor, return_metadata=True)` if left out.
        others: see `transformers.Trainer`.
    """

    def __init__(self, *args, feature_extractor, data_collator=None, **kwargs):
        data_collator = data_collator or DataCollator(feature_extractor, return_metadata=True)
        kwargs.setdefault("processing_class", feature_extractor)  # saved with each checkpoint
        super().__init__(*args, data_collator=data_collator, **kwargs)
        self.feature_extractor = feature_extractor
        self.args.remove_unused_columns = False  # items are not yet what the model takes
        self.model_accepts_loss_kwargs = self.args.gradient_accumulation_steps > 1
        self.add_callback(_SetEpoch())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decay_parameter_names(model)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self.resumed_from = resume_from_checkpoint  # `EMACallback` reads its average there
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        self.model.train()  # an evaluation, or loading, has left it in evaluation mode, where nothing is counted
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {name: value for name, value in inputs.items() if name not in ("video_ids", "geometry")}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _get_num_items_in_batch(self, batch_samples, device):
        """What the losses of all accumulated batches are divided by; see `ConvTransformerLoss`."""
        if not (self.model_accepts_loss_kwargs and self.model.training and batch_samples):
            return None
        detector = find_detector(self.model)
        positives = sum(
            detector.count_positives(batch["input_features"].to(device), batch["attention_mask"], batch["labels"])
            for batch in batch_samples
        )
        normalizer, world_size = detector.criterion.update_normalizer(positives)
        # Trainer multiplies the loss by the number of processes if it may, because it averages gradients over them.
        return normalizer if self.args.average_tokens_across_devices else normalizer / world_size

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, outputs, _ = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if outputs is None:
            return loss, None, None
        outputs = dict(zip(("logits", "pred_segments", "point_mask", "point_levels"), outputs, strict=True))
        geometry = inputs.get("geometry")
        found = self.feature_extractor.post_process_temporal_action_localization(outputs, geometry=geometry)
        device = outputs["logits"].device
        detections = [
            torch.cat((one["segments"], one["scores"][:, None], one["labels"][:, None].float()), dim=1).to(device)
            for one in found
        ]
        truths = None
        if "labels" in inputs:
            truths = [
                torch.cat((segments.to(device), label["class_labels"][:, None].float().to(device)), dim=1)
                for segments, label in zip(
                    self.feature_extractor.to_seconds([one["segments"] for one in inputs["labels"]], geometry),
                    inputs["labels"],
                    strict=True,
                )
            ]
        return loss, _pad(detections), None if truths is None else _pad(truths)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        *,
        results: Mapping[str, Mapping[str, float]] | None = None,
        command: str | None = None,
        **more: Any,
    ) -> None:
        """
        Writes README.md into `output_dir`: figures, use, and how the model was trained. `push_to_hub`, and `save_model` with
        `args.push_to_hub`, call it. A README.md that people wrote or changed stays. (Of adapters, PEFT writes the card.)

        Args:
            language, license, tags, model_name: for the metadata; the license is never guessed.
            finetuned_from: Hub id or folder that the weights started from; default: what the model was loaded from.
            tasks, dataset_args: not used; the task is temporal action localization.
            dataset_tags, dataset: ids of data sets on the Hub, and names of the data for readers.
            results: figures by evaluated set, see `make_model_card`; default: those in the log of the weights that the model
                has now, the moving average's within `EMACallback.weights`.
            command: that trained the model; default: this process's, if it is a script's.
            more: other arguments of `make_model_card`: picture, caption, features, notes, revision.
        """
        if not self.is_world_process_zero():
            return
        if not isinstance(self.model, ConvTransformerForTemporalActionLocalization):
            super().create_model_card(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
            return
        dataset_ids, names = _listed(dataset_tags), _listed(dataset) or _listed(dataset_tags)
        model_id = self.hub_model_id or self.args.hub_model_id or ""
        model_id = model_id if "/" in model_id else None
        was_trained = self.state.global_step > 0
        card = make_model_card(
            self.model.config,
            model_id=model_id,
            model_name=model_name or (None if model_id else Path(os.path.abspath(self.args.output_dir)).name),
            num_parameters=self.model.num_parameters(),
            geometry={name: getattr(self.feature_extractor, name) for name in ("fps", "feature_stride", "num_frames")},
            results=self._measured() if results is None else results,
            dataset=" and ".join(names) or None,
            dataset_ids=dataset_ids,
            base_model=finetuned_from or (self.model.name_or_path if was_trained else None) or None,
            license=license,
            tags=_listed(tags),
            command=(command or _command_of_process()) if was_trained else None,
            training=self._recipe() if was_trained else None,
            **{**more, "notes": [*more.get("notes", ()), *self._notes()]},
        )
        card.data.language = language
        write_model_card(card, self.args.output_dir)

    def _measured(self) -> dict[str, dict[str, float]]:
        """What the log says about the weights that the model has now, by evaluated set."""
        rows = self.state.log_history
        end = max((place for place, row in enumerate(rows) if "train_runtime" in row), default=len(rows))
        after = _evaluations(rows[end + 1 :], self._uses_average())
        if after:
            return after
        is_best = end < len(rows) and self._has_best_weights()
        step = self.state.best_global_step if is_best else self.state.global_step
        return _evaluations([row for row in rows if row.get("step") == step], self._uses_average())

    def _uses_average(self) -> bool:
        return any(getattr(callback, "in_use", False) for callback in self.callback_handler.callbacks)

    def _has_best_weights(self) -> bool:
        return self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None

    def _recipe(self) -> dict[str, str]:
        from . import __version__

        args, state = self.args, self.state
        warmup = args.get_warmup_steps(state.max_steps)
        schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)).replace("_", " ")
        recipe = {
            "learning rate": f"{args.learning_rate:g}, {schedule} schedule"
            + (f" after {warmup} steps of warm-up" if warmup else ""),
            "optimizer": f"{getattr(args.optim, 'value', args.optim)}, weight decay {args.weight_decay:g}"
            + (f", gradients clipped to a norm of {args.max_grad_norm:g}" if args.max_grad_norm else ""),
            "batch size": str(args.train_batch_size * args.world_size * args.gradient_accumulation_steps),
            "epochs": f"{round(state.epoch or 0, 2):g} ({state.global_step} steps)",
        }
        if hasattr(self.train_dataset, "__len__"):
            recipe["recordings"] = f"{len(self.train_dataset)} to train on"
            if hasattr(self.eval_dataset, "__len__") and not isinstance(self.eval_dataset, dict):
                recipe["recordings"] += f", {len(self.eval_dataset)} to evaluate on"
        average = [callback for callback in self.callback_handler.callbacks if isinstance(callback, EMACallback)]
        if average:
            kept = "their moving average" if self._uses_average() else "the last ones, not their moving average"
            recipe["weights"] = f"{kept} (decay {average[0].decay:g})"
        if args.bf16 or args.fp16:
            recipe["precision"] = f"mixed, {'bfloat16' if args.bf16 else 'float16'}"
        recipe["seed"] = str(args.seed)
        recipe["versions"] = (
            f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
            f"modeling-convtransformer {__version__}"
        )
        return recipe

    def _notes(self) -> list[str]:
        if not self._has_best_weights():
            return []
        name = self.args.metric_for_best_model
        name = name if name.startswith("eval_") else f"eval_{name}"
        tried = sum(name in row for row in self.state.log_history)
        return [
            f"The weights are the best of {tried} evaluations during training (step {self.state.best_global_step}, by "
            f"`{name}`), chosen on the recordings that they are evaluated on: the figures flatter them a little."
        ]


def find_detector(model: nn.Module) -> ConvTransformerForTemporalActionLocalization:
    """The detector inside what PEFT, accelerate or torch.compile made of it.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, ConvTransformerForTemporalActionLocalization):
            return module
    raise ValueError(f"There is no ConvTransformerForTemporalActionLocalization in this {type(model).__name__}.")


def _pad(rows: list[torch.Tensor]) -> torch.Tensor:
    """(samples, longest or 1, columns): one row of filler at least, so that a batch of nothing keeps its shape."""
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_FILLER)
    return padded if padded.shape[1] else padded.new_full((len(rows), 1, padded.shape[2]), _FILLER)


def shareable_command(words: Sequence[str]) -> str:
    """A command line that a reader can copy, without the passwords and tokens in it."""
    shown, hide = [], False
    for word in words:
        option, is_given, _ = word.partition("=")
        is_secret = re.fullmatch(r"--?[\w-]*(?:token|password|secret|api[_-]?key)", option)
        if hide and not word.startswith("--"):
            word = "***"
        elif is_secret and is_given:
            word = f"{option}=***"
        hide = bool(is_secret and not is_given)
        shown.append(re.sub(r"hf_[A-Za-z0-9]{16,}", "***", word))
    return shlex.join(shown)


def _command_of_process() -> str | None:
    """How this process was started, if it is a script's: not a notebook's, nor an interpreter's."""
    main = sys.modules.get("__main__")
    if not getattr(main, "__file__", None) or not sys.argv or "ipykernel" in sys.argv[0]:
        return None
    if getattr(main, "__spec__", None) is not None:  # python -m
        return shareable_command(["python", "-m", main.__spec__.name.removesuffix(".__main__"), *sys.argv[1:]])
    return shareable_command(["python", *sys.argv]) if sys.argv[0].endswith(".py") else None


def _evaluations(rows: Sequence[Mapping[str, Any]], is_average: bool) -> dict[str, dict[str, float]]:
    """The mAPs in rows of a log, by evaluated set; of later rows, the later figures. Trainer's name for the only set is
    "eval"; of several it is "eval_night"."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        for name, value in row.items():
            match = re.fullmatch(r"eval_(?:(.+?)_)?(map(?:_[\d.]+)?)", name)
            if match is None:
                continue
            which = match[1] or ""
            if (which == "ema" or which.endswith("_ema")) == is_average:
                which = which.removesuffix("ema").removesuffix("_") if is_average else which
                found.setdefault(which or "evaluation", {})[match[2]] = value
    return found


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def compute_detection_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` for `TemporalActionTrainer`: `map` (the mean over tIoU 0.3 to 0.7), `map_30`, `map_40` and so on.
    For recall or other thresholds, write the same with `detections_of` and `evaluation.evaluate_detections`."""
    metrics = evaluate_detections(*detections_of(prediction), top_k=1).to_dict()
    return {name: value for name, value in metrics.items() if name.startswith("map")}


def detections_of(prediction: EvalPrediction) -> tuple[dict, dict]:
    """The predictions and the ground truth of an `EvalPrediction` of `TemporalActionTrainer` as `evaluate_detections`
    takes them, by number of the sample."""
    found, truth = {}, {}
    for index, (rows, own) in enumerate(zip(prediction.predictions, prediction.label_ids, strict=True)):
        rows, own = rows[rows[:, 3] >= 0], own[own[:, 2] >= 0]
        found[index] = {"segments": rows[:, :2], "scores": rows[:, 2], "labels": rows[:, 3].astype(np.int64)}
        truth[index] = {"segments": own[:, :2], "labels": own[:, 2].astype(np.int64)}
    return found, truth


# --- Adapters -------------------------------------------------------------------------------------------------------


def register_peft_defaults():
    """Tells PEFT which layers LoRA, DoRA and IA3 adapt where a config names none: the projections of attention and MLPs
    (IA3: keys, values and what enters `down_proj`). Done when this module is imported; without PEFT, nothing happens."""
    try:
        from peft.utils import constants
    except ImportError:
        return
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    kind = ConvTransformerConfig.model_type
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[kind] = projections
    constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[kind] = ["k_proj", "v_proj", "down_proj"]
    constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[kind] = ["down_proj"]


register_peft_defaults()


def adapt_convolutions(config: "LoraConfig") -> "LoraConfig":
    """
    Lets LoRA and DoRA adapt dense convolutions too, if `config.target_modules` names some. PEFT's own layer knows plain
    convolutions of (batch, channels, time) only; ours get (batch, time, channels) and a padding mask, and may be causal.

    A config cannot be saved with this. To load such an adapter, say it again, or merge the adapter before saving:

        config = adapt_convolutions(LoraConfig.from_pretrained(adapter))
        model = PeftModel.from_pretrained(base, adapter, config=config)

    Returns:
        the same config.

    Raises:
        ValueError: when a model gets the adapter: a target is a depthwise convolution, or `lora_dropout` is not 0.
    """
    config._register_custom_module({MaskedConv1d: _convolution_adapter()})
    return config


@functools.cache
def _convolution_adapter() -> type:
    from peft.tuners.lora.layer import Conv1d

    class AdaptedConv1d(Conv1d):
        """The convolution with an adapted kernel (which is small), so that padding, stride and causality are its own."""

        def __init__(self, base_layer, *args, **kwargs):
            if base_layer.groups > 1:
                raise ValueError(
                    f"target_modules names a depthwise convolution ({base_layer.groups} channels, each with a kernel of "
                    "its own), which has no low rank to adapt. Name dense ones, or put it into modules_to_save."
                )
            super().__init__(base_layer, *args, **kwargs)

        def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs):
            layer = self.get_base_layer()
            if config.lora_dropout:
                raise ValueError(
                    "lora_dropout must be 0 where convolutions are adapted: their kernels are, not inputs."
                )
            kind = layer.__class__
            layer.__class__ = nn.Conv1d  # PEFT makes both factors of the layer's class, with the arguments of this one
            try:
                super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
            finally:
                layer.__class__ = kind

        def forward(self, x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
            if self.disable_adapters and self.merged:
                self.unmerge()
            layer = self.get_base_layer()
            weight = layer.weight
            if not self.disable_adapters and not self.merged:
                changes = [self.kernel_change(name) for name in self.active_adapters if name in self.lora_A]
                weight = weight + sum(changes).to(weight.dtype) if changes else weight
            return torch.func.functional_call(layer, {"weight": weight}, (x, padding))

        def kernel_change(self, adapter_name: str) -> torch.Tensor:
            """What the adapter adds to the kernel, (out channels, in channels, kernel size)."""
            weight, change = self.get_base_layer().weight, self.get_delta_weight(adapter_name)
            if adapter_name not in self.lora_magnitude_vector:
                return change
            # DoRA: the direction of each output channel's kernel, times a learned length. Gradients do not pass the norm
            # (section 4.3 of https://arxiv.org/abs/2402.09353).
            adapted = weight + change
            norm = adapted.detach().flatten(1).norm(dim=1)[:, None, None]
            return self.lora_magnitude_vector[adapter_name].weight.view_as(norm) / norm * adapted - weight

    return AdaptedConv1d
