"""Fine-tune a saved detector by adapters (LoRA, DoRA or IA3): a few per cent of its parameters, in a file of their own.

    python examples/train_peft.py configuration/sbhar.yaml --checkpoint outputs/train --folder data/sbhar
    python examples/train_peft.py configuration/sbhar.yaml --checkpoint outputs/train --folder data/sbhar --rank 2 --convs
    python examples/train_peft.py RECIPE --checkpoint outputs/train --annotations other_classes.json --train_heads --merge

The YAML file is a recipe as examples/train.py takes it, without its model: that is --checkpoint's. Everything goes to
--output_dir: checkpoints, adapter_model.safetensors and adapter_config.json, metrics.json and run.json, with --merge the
folder merged, a model that needs no PEFT. The same command again goes on where a killed run stopped (but the moving number
of positives in the loss, which is no part of an adapter, starts again from the base's). What was trained is loaded with
the model that it was trained on:

    base = ConvTransformerForTemporalActionLocalization.from_pretrained(checkpoint)
    model = PeftModel.from_pretrained(base, output_dir)

If the data has other classes than the checkpoint, that model is OUTPUT_DIR/base: the checkpoint with rows of the
classification head matched by class name. New classes need --train_heads.
"""

import copy
import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, ModulesToSaveWrapper
from train import (
    MENDABLE,
    DataArguments,
    Training,
    Usage,
    evaluate,
    load_datasets,
    make_feature_extractor,
    make_trainer,
    one_line,
    parse,
    start,
)
from transformers import set_seed
from transformers.utils import logging

from modeling_convtransformer import ConvTransformerForTemporalActionLocalization
from modeling_convtransformer.modeling_convtransformer import BatchNorm, MaskedConv1d
from modeling_convtransformer.training import adapt_convolutions, load_for_classes

HEADS = ["class_head", "segment_head"]


@dataclass
class AdapterArguments:
    checkpoint: str = field(metadata={"help": "the base: a folder or Hub model"})
    method: Literal["lora", "dora", "ia3"] = field(default="lora", metadata={"help": "kind of the adapters"})
    rank: int = field(default=8, metadata={"help": "of LoRA and DoRA"})
    alpha: int | None = field(
        default=None, metadata={"help": "LoRA and DoRA are scaled by alpha / rank (twice the rank)"}
    )
    targets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "ends of the names of layers to adapt (linear layers of attention and MLPs; ia3: three of them)"
        },
    )
    convs: bool = field(
        default=False,
        metadata={"help": "dense convolutions too; loading needs training.adapt_convolutions, or --merge"},
    )
    train_heads: bool = field(default=False, metadata={"help": "train the two heads whole: for new classes"})
    merge: bool = field(default=False, metadata={"help": "write the model with the adapters merged into it too"})


@dataclass
class AdapterTraining(Training):
    """The same, but never into the folder of a model by default."""

    output_dir: str = field(default="outputs/peft", metadata={"help": "where everything is written"})


def load_base(options: AdapterArguments, names: list[str], output: Path, is_writer: bool = True):
    """The model to adapt, for the classes `names`; `name_or_path` says where it can be loaded from.

    Raises:
        Usage: there are new classes, and the heads are not trained.
        OSError: there is no such checkpoint.
    """
    model = ConvTransformerForTemporalActionLocalization.from_pretrained(options.checkpoint)
    if model.config.id2label == dict(enumerate(names)):
        if Path(options.checkpoint).exists():
            model.name_or_path = str(Path(options.checkpoint).resolve())  # also from another working directory
        return model
    new = [name for name in names if name not in model.config.label2id]
    if new and not options.train_heads:
        raise Usage(f"{options.checkpoint} does not know the classes {', '.join(new)}: say --train_heads")
    model, _ = load_for_classes(options.checkpoint, names)
    folder = (output / "base").resolve()
    model.name_or_path = str(folder)
    if is_writer:
        model.save_pretrained(folder)
        print(f"other classes than those of {options.checkpoint} ({len(new)} new): the base is {folder}")
    return model


def adapter_config(options: AdapterArguments, model) -> PeftConfig:
    """
    Raises:
        Usage: options that do not go together.
    """
    layers = dict(model.named_modules())
    saved = list(HEADS) if options.train_heads else []
    # Training moves their statistics, and an adapter has only the tensors that it is told of.
    saved += [
        name
        for name, layer in layers.items()
        if isinstance(layer, BatchNorm) and not (options.train_heads and name.startswith(tuple(HEADS)))
    ]
    targets = list(options.targets)
    if options.convs:
        if options.method == "ia3":
            raise Usage("--convs needs --method lora or dora: PEFT's IA3 has no one-dimensional convolution")
        linears = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model.config.model_type]
        targets = targets or [name for name in linears if any(layer.endswith(f".{name}") for layer in layers)]
        targets += [
            name
            for name, layer in layers.items()
            if isinstance(layer, MaskedConv1d) and layer.groups == 1
            if not (options.train_heads and name.startswith(tuple(HEADS)))
        ]
    if options.method == "ia3":
        inner = [name for name in targets if name.endswith("down_proj")] if targets else None
        return IA3Config(target_modules=targets or None, feedforward_modules=inner, modules_to_save=saved or None)
    return adapt_convolutions(
        LoraConfig(
            r=options.rank,
            lora_alpha=2 * options.rank if options.alpha is None else options.alpha,
            use_dora=options.method == "dora",
            target_modules=targets or None,
            modules_to_save=saved or None,
        )
    )


def merge(model: PeftModel) -> ConvTransformerForTemporalActionLocalization:
    """A copy of the model with the adapters merged into its weights. (`merge_and_unload` of IA3 alone stumbles over whole
    heads in modules_to_save, because they have no `weight`: they take their places first.)"""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save[module.active_adapter])
    return model.merge_and_unload()


def main():
    parser, recipe, options, data_options, training = parse(__doc__, AdapterArguments, DataArguments, AdapterTraining)
    logging.disable_progress_bar()  # of loading and saving, which take no time; Trainer's stays
    folder = Path(training.output_dir)
    try:
        if folder.resolve() == Path(options.checkpoint).resolve():
            raise Usage("--output_dir is the folder of --checkpoint; adapters need one of their own")
        set_seed(training.seed)
        feature_extractor = make_feature_extractor(recipe, options.checkpoint)
        train_set, val_set, names = load_datasets(data_options, feature_extractor, training.seed)
        base = load_base(options, names, folder, training.should_save)
        size = base.num_parameters()
        model = get_peft_model(base, adapter_config(options, base))
    except MENDABLE as error:
        parser.error(one_line(error))
    checkpoint = start(training)
    trainable = model.get_nb_trainable_parameters()[0]
    trainer, average = make_trainer(model, feature_extractor, train_set, val_set, training)
    if training.should_save:
        print(
            f"{trainable:,} trainable parameters, {trainable / size:.2%} of the base's {size:,}; {len(names)} classes; "
            f"{len(train_set)} recordings train, {len(val_set)} evaluate"
        )
    before = evaluate(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)

    # Trainer has put the best weights back; the average follows it.
    keeps_average = average is not None and training.weights == "average"
    with average.weights(model) if keeps_average else nullcontext():
        after = evaluate(trainer)
        trainer.save_model(folder)
        if options.merge and training.should_save:
            merge(model).save_pretrained(folder / "merged")
            feature_extractor.save_pretrained(folder / "merged")
    if training.should_save:
        print(f"\nbefore:\n{before}\n\nafter ({'average' if keeps_average else 'own'} weights):\n{after}")
        written = {
            "before": before.to_dict(),
            "after": after.to_dict(),
            "trainable": trainable,
            "share": trainable / size,
            "best_step": trainer.state.best_global_step,
            "history": trainer.state.log_history,
        }
        (folder / "metrics.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        print(
            f"\nmAP {100 * before.average_map:.2f} % before, {100 * after.average_map:.2f} % after\nadapter: {folder}"
        )
        if options.merge:
            print(f"merged model: {folder / 'merged'}")


if __name__ == "__main__":
    main()
