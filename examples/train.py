"""Train a detector, or fine-tune one for other classes, with transformers' Trainer.

    python examples/train.py configuration/sbhar.yaml --folder data/sbhar
    python examples/train.py configuration/sbhar.yaml --folder data/sbhar --set n_embd=256 --learning_rate 3e-4 --seed 1
    python examples/train.py configuration/sbhar.yaml --folder data/sbhar --checkpoint outputs/another_model
    python examples/train.py configuration/thumos14_i3d.yaml --annotations thumos14.json --features i3d_features

The YAML file is a recipe: `model` (fields of ConvTransformerConfig), `feature_extractor` (its arguments), `data` and
`training` (the options below, by name). What the command line says replaces what the recipe says. Everything goes to
--output_dir: checkpoints, the best model by mAP, README.md (its model card, with a picture if matplotlib is installed),
metrics.json, and run.json with the command and the versions. --push_to_hub true publishes it all as --hub_model_id. The
same command again goes on where a killed run stopped.
"""

import json
import platform
import sys
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
import yaml
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, HfArgumentParser, TrainingArguments, set_seed
from transformers.utils import logging

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
    __version__,
)
from modeling_convtransformer.convert.checkpoint import ConversionError
from modeling_convtransformer.data import (
    CroppedDataset,
    SensorAugmentation,
    SensorDataset,
    TemporalActionDataset,
    load_annotations,
    load_sbhar,
)
from modeling_convtransformer.evaluation import DetectionMetrics, evaluate_detections
from modeling_convtransformer.quantization import prepare_qat, quantize
from modeling_convtransformer.training import (
    EMACallback,
    TemporalActionTrainer,
    compute_detection_metrics,
    detections_of,
    find_last_checkpoint,
    load_for_classes,
    shareable_command,
)
from modeling_convtransformer.visualization import plot_timeline, save_figure


@dataclass
class ModelArguments:
    checkpoint: str | None = field(
        default=None, metadata={"help": "start from this folder or Hub model, whatever its classes"}
    )
    set: list[str] = field(
        default_factory=list, metadata={"help": "fields of the model's config, such as n_embd=256 arch=[2,2,4]"}
    )
    license: str | None = field(
        default=None, metadata={"help": "of the model, for its card: an identifier of the Hub's, such as apache-2.0"}
    )


@dataclass
class QuantizationArguments:
    qat: Literal["int8", "int8_dynamic", "int4", "float8", "ternary"] | None = field(
        default=None,
        metadata={
            "help": "quantization-aware training: train as if quantized so (a few epochs from --checkpoint at a low learning "
            "rate); the quantized model goes to a folder of this name in --output_dir"
        },
    )


@dataclass
class DataArguments:
    dataset: Literal["files", "sensors", "sbhar", "arrow"] = field(
        default="files",
        metadata={
            "help": "files: --annotations and --features; sensors: --annotations and --signals (raw values, windows are "
            "cut while training); sbhar: --folder; arrow: --folder, as data.to_hf_dataset writes, or a Hub name"
        },
    )
    folder: str | None = field(default=None, metadata={"help": "of the data set, for sbhar and arrow"})
    dataset_name: str | None = field(default=None, metadata={"help": "what the model card calls the data"})
    download: bool = field(default=False, metadata={"help": "fetch SBHAR from the UCI archive into --folder"})
    annotations: str | None = field(default=None, metadata={"help": "JSON file of ActivityNet's format"})
    features: list[str] = field(default_factory=list, metadata={"help": "folders of feature files, one a stream"})
    signals: str | None = field(default=None, metadata={"help": ".npz with one array (samples, channels) a recording"})
    train_split: list[str] = field(default_factory=lambda: ["training"], metadata={"help": "subsets to train on"})
    val_split: list[str] = field(default_factory=lambda: ["validation"], metadata={"help": "subsets to evaluate on"})
    max_seq_len: int | None = field(default=None, metadata={"help": "cut longer videos in training (features)"})
    trunc_thresh: float = field(default=0.5, metadata={"help": "share of a segment that must be left by a cut"})
    crop_ratio: list[float] | None = field(default=None, metadata={"help": "two shares: crop short videos too"})
    resize_to: int | None = field(default=None, metadata={"help": "interpolate all videos to this length"})
    downsample_rate: int = field(default=1, metadata={"help": "take each n-th feature"})
    file_prefix: str = field(default="", metadata={"help": "of feature files"})
    file_ext: str | None = field(
        default=None, metadata={"help": "of feature files (default: .npy, .npz or .safetensors)"}
    )
    deduplicate: bool = field(default=False, metadata={"help": "leave out repeated annotations"})
    skip_missing: bool = field(default=False, metadata={"help": "leave out videos without features"})
    augment_speed: float = field(default=0.0, metadata={"help": "sensors: see data.SensorAugmentation"})
    augment_rotation: float = field(default=0.0, metadata={"help": "the same"})
    augment_gain: float = field(default=0.0, metadata={"help": "the same"})
    augment_noise: float = field(default=0.0, metadata={"help": "the same"})
    augment_shift: bool = field(default=False, metadata={"help": "the same"})


@dataclass
class Training(TrainingArguments):
    """TrainingArguments with other defaults, and what transformers does not have."""

    output_dir: str = field(default="outputs/train", metadata={"help": "where everything is written"})
    eval_strategy: str = field(default="epoch", metadata={"help": "no, steps or epoch"})
    save_strategy: str = field(default="epoch", metadata={"help": "no, steps, epoch or best"})
    save_total_limit: int | None = field(default=2, metadata={"help": "the best and the last checkpoint"})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "keep the best, not the last"})
    logging_strategy: str = field(default="epoch", metadata={"help": "no, steps or epoch"})
    report_to: str = field(default="none", metadata={"help": "trackio, tensorboard, wandb, all or none"})
    warmup_epochs: float = field(default=0.0, metadata={"help": "replaces warmup_steps"})
    ema_decay: float = field(default=0.0, metadata={"help": "moving average of the weights, such as 0.999; 0: none"})
    weights: Literal["average", "own"] = field(
        default="average", metadata={"help": "which weights --output_dir gets; the others go to a folder in it"}
    )
    early_stopping_patience: int = field(default=0, metadata={"help": "evaluations without a better mAP; 0: never"})
    fresh: bool = field(default=False, metadata={"help": "start anew though --output_dir holds checkpoints"})

    def __post_init__(self):
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay is {self.ema_decay}; expected 0, or a number below 1 such as 0.999")
        # A resumed run goes on counting the evaluations without a better mAP.
        self.restore_callback_states_from_checkpoint |= self.early_stopping_patience > 0
        average = self.ema_decay > 0 and self.weights == "average"
        self.metric_for_best_model = self.metric_for_best_model or ("eval_ema_map" if average else "eval_map")
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()


class Usage(Exception):
    """What the user can mend."""


# And what the package, transformers and the YAML reader raise for the same reason.
MENDABLE = (
    Usage,
    ImportError,
    OSError,
    KeyError,
    TypeError,
    ValueError,
    ConversionError,
    StrictDataclassError,
    yaml.YAMLError,
)


def one_line(error: Exception) -> str:
    """Of several lines, users look at the last one."""
    return " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())


def parse(description: str, *kinds: type) -> tuple[Any, ...]:
    """The parser (for its error), the recipe's path, and an instance of each dataclass: what the recipe's sections say, and
    in its place what the command line says."""
    parser = HfArgumentParser(kinds, description=description, formatter_class=HelpFormatter)
    parser.usage = f"{Path(sys.argv[0]).name} RECIPE [options]    (--help lists them)"
    parser.add_argument("recipe", nargs="?", help="YAML file, such as configuration/sbhar.yaml")
    argv = sys.argv[1:]
    recipe = argv[0] if argv and not argv[0].startswith("-") else None
    if recipe is not None:
        try:
            content = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
            defaults = {**(content.get("data") or {}), **(content.get("training") or {})}
        except (*MENDABLE, AttributeError) as error:
            parser.error(f"{recipe} is not a recipe: {one_line(error)}")
        known = {action.dest: action for action in parser._actions}
        if unknown := sorted(map(str, set(defaults) - set(known))):
            parser.error(f"{recipe}: data or training has unknown options: {', '.join(unknown)}")
        for name, value in defaults.items():  # argparse looks at the command line only
            if known[name].choices and value not in known[name].choices:
                parser.error(f"{recipe}: {name} is {value!r}; expected one of {', '.join(known[name].choices)}")
        parser.set_defaults(**defaults)
    try:
        *instances, rest = parser.parse_args_into_dataclasses(look_for_args_file=False)
    except MENDABLE as error:
        parser.error(one_line(error))
    if rest.recipe != recipe:
        parser.error(f"the recipe, {rest.recipe}, must stand before all options")
    return parser, recipe, *instances


class HelpFormatter(transformers.hf_argparser.ArgumentDefaultsHelpFormatter):
    """Shows the text above as it is written."""

    def _fill_text(self, text, width, indent):
        return "".join(indent + line for line in text.splitlines(keepends=True))


def load_datasets(options: DataArguments, feature_extractor, seed: int) -> tuple[Dataset, Dataset, list[str]]:
    """Training and evaluation set, and the names of the classes."""
    if options.dataset == "arrow":
        import datasets

        if options.folder is None:
            raise Usage("--dataset arrow needs --folder, a folder or the name of a data set on the Hub")
        local = Path(options.folder).exists()
        both = datasets.load_from_disk(options.folder) if local else datasets.load_dataset(options.folder)
        if not isinstance(both, datasets.DatasetDict):
            raise Usage(
                f"{options.folder} is one split; expected a DatasetDict with one each to train and to evaluate"
            )
        if missing := sorted({*options.train_split, *options.val_split} - {*both}):
            raise Usage(f"{options.folder} has no split {', '.join(missing)}; it has {', '.join(both)}")
        both = both.with_format("numpy")
        names = both[options.train_split[0]].features["class_labels"].feature.names
        train_set, val_set = (
            datasets.concatenate_datasets([both[split] for split in splits])
            for splits in (options.train_split, options.val_split)
        )
        cuts = (options.max_seq_len, options.trunc_thresh, options.crop_ratio)
        return CroppedDataset(train_set, *cuts, seed=seed), val_set, names
    make = file_dataset if options.dataset == "files" else sensor_dataset
    train_set, val_set = make(options, feature_extractor, seed)
    return train_set, val_set, [train_set.id2label[index] for index in range(len(train_set.id2label))]


def file_dataset(options: DataArguments, feature_extractor, seed: int) -> list[Dataset]:
    if options.annotations is None or not options.features:
        raise Usage("--dataset files needs --annotations and --features")
    names = ["max_seq_len", "trunc_thresh", "crop_ratio", "resize_to", "downsample_rate", "file_prefix", "file_ext"]
    settings = {name: getattr(options, name) for name in [*names, "deduplicate", "skip_missing"]}
    return [
        TemporalActionDataset(
            options.annotations,
            options.features,
            split=split,
            feature_stride=feature_extractor.feature_stride,
            num_frames=feature_extractor.num_frames,
            feature_size=feature_extractor.feature_size,
            training=training,
            seed=seed,
            **settings,
        )
        for split, training in ((options.train_split, True), (options.val_split, False))
    ]


def sensor_dataset(options: DataArguments, feature_extractor, seed: int) -> list[Dataset]:
    signals, annotations = load_signals(options)
    augmentation = SensorAugmentation(
        speed=options.augment_speed,
        rotation=options.augment_rotation,
        gain=options.augment_gain,
        noise=options.augment_noise,
        shift=options.augment_shift,
    )
    return [
        SensorDataset(
            signals,
            annotations,
            split,
            window=feature_extractor.num_frames,
            stride=feature_extractor.feature_stride,
            training=training,
            augmentation=augmentation,
            seed=seed,
        )
        for split, training in ((options.train_split, True), (options.val_split, False))
    ]


def load_signals(options: DataArguments) -> tuple[Mapping, Mapping]:
    if options.dataset == "sbhar":
        if options.folder is None:
            raise Usage("--dataset sbhar needs --folder, where SBHAR lies or is to be put by --download true")
        return load_sbhar(options.folder, download=options.download)
    if options.signals is None or options.annotations is None:
        raise Usage("--dataset sensors needs --annotations and --signals")
    try:
        with np.load(options.signals, allow_pickle=False) as file:
            signals = {name: file[name] for name in file.files}
    except (TypeError, ValueError, zipfile.BadZipFile) as error:
        raise Usage(f"--signals {options.signals} is no .npz file of arrays: {error}") from error
    return signals, load_annotations(options.annotations)


def make_model(recipe: str | None, options: ModelArguments, names: list[str]):
    """A new model of the recipe's settings, or one that starts from a checkpoint."""
    changes = {}
    for text in options.set:
        name, is_there, value = text.partition("=")
        known = {*ConvTransformerConfig.__dataclass_fields__, *ConvTransformerConfig.attribute_map}
        if not is_there or name not in known:
            raise Usage(f"--set {text}: expected NAME=VALUE with a field of ConvTransformerConfig")
        changes[ConvTransformerConfig.attribute_map.get(name, name)] = yaml.safe_load(value)
    if options.checkpoint is not None:
        try:
            model, report = load_for_classes(options.checkpoint, names, **changes)
        except OSError as error:
            raise Usage(f"--checkpoint {options.checkpoint}: {error}") from error
        shares = ", ".join(f"{100 * row['share']:.1f} % {state}" for state, row in report.shares().items())
        print(f"parameters from {options.checkpoint}: {shares}")
        return model
    if recipe is None:
        raise Usage("give a recipe, such as configuration/sbhar.yaml, or --checkpoint")
    config = ConvTransformerConfig.from_yaml(recipe).to_dict()
    config.update(changes, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    return ConvTransformerForTemporalActionLocalization(ConvTransformerConfig.from_dict(config))


def make_feature_extractor(recipe: str | None, checkpoint: str | None) -> ConvTransformerFeatureExtractor:
    if recipe is not None:
        return ConvTransformerFeatureExtractor.from_yaml(recipe)
    if checkpoint is None:
        raise Usage("give a recipe, such as configuration/sbhar.yaml, or --checkpoint")
    return ConvTransformerFeatureExtractor.from_pretrained(checkpoint)


def make_trainer(model, feature_extractor, train_set, val_set, training: Training):
    """The trainer, and the callback that averages the weights or None."""
    if training.warmup_epochs:
        batch = training.train_batch_size * training.world_size * training.gradient_accumulation_steps
        training.warmup_steps = round(training.warmup_epochs * -(-len(train_set) // batch))
    trainer = TemporalActionTrainer(
        model=model,
        args=training,
        train_dataset=train_set,
        eval_dataset=val_set,
        feature_extractor=feature_extractor,
        compute_metrics=compute_detection_metrics,
    )
    average = EMACallback(trainer, training.ema_decay) if training.ema_decay else None
    if average is not None:
        trainer.add_callback(average)
    if training.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(training.early_stopping_patience))
    return trainer, average


# Scores above this are in the model card's picture.
SHOWN = 0.3

# Fields of a saved config that say nothing about the weights.
NOT_THE_MODEL = {"transformers_version", "architectures", "dtype", "id2label", "label2id"}


def json_like(value: Any) -> Any:
    """Lists in place of tuples, as they come back from a file."""
    return json.loads(json.dumps(value))


def start(training: Training, config: ConvTransformerConfig | None = None) -> str | None:
    """Writes down what is run, and returns the checkpoint to go on from, which must be of the same model."""
    folder = Path(training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = training.resume_from_checkpoint
    if checkpoint is None and not training.fresh:
        checkpoint = find_last_checkpoint(folder)
    if checkpoint is not None and config is not None:
        theirs, ours = ConvTransformerConfig.from_pretrained(checkpoint).to_dict(), config.to_dict()
        fields = [name for name in ConvTransformerConfig.__dataclass_fields__ if name in ours]
        fields = [name for name in fields if name not in NOT_THE_MODEL]
        if changed := [name for name in fields if json_like(ours[name]) != json_like(theirs.get(name))]:
            raise Usage(
                f"{checkpoint} is of another model: {', '.join(f'{name} is {theirs.get(name)!r}' for name in changed)} "
                "there. Give another --output_dir, or --fresh true to start anew in this one"
            )
    run = {
        "command": shareable_command([sys.executable, *sys.argv]),
        "seed": training.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "modeling-convtransformer": __version__,
        },
    }
    if training.should_save:
        print(run["command"])
        (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        if checkpoint is not None:
            print(f"going on from {checkpoint} (--fresh true starts anew)")
    return checkpoint


def localize(trainer: TemporalActionTrainer) -> tuple[dict, dict]:
    """What the model finds in the evaluation set, and the truth, by number of the recording."""
    return detections_of(trainer.predict(trainer.eval_dataset))


def evaluate(trainer: TemporalActionTrainer) -> DetectionMetrics:
    return evaluate_detections(*localize(trainer))


def draw(found: dict, truth: dict, dataset: Dataset, id2label: dict[int, str], path: Path) -> dict[str, str]:
    """The timeline of the first recording with segments, as `create_model_card` takes it; nothing without matplotlib."""
    index = next(index for index in truth if len(truth[index]["labels"]))
    item = dataset[index]
    duration = item["geometry"]["duration"]
    try:
        figure = plot_timeline(found[index], id2label, truth[index], duration and float(duration), min_score=SHOWN)
        save_figure(figure, path)
    except ImportError:
        return {}
    return {
        "picture": path.name,
        "caption": f"The evaluation recording `{item['video_id']}`: of each class, the truth as a dark line, and below it what is "
        f"predicted with a score of at least {SHOWN}, the paler the lower.",
    }


def describe_data(options: DataArguments, feature_extractor) -> dict[str, Any]:
    """What the model card says of the data, as `create_model_card` takes it."""
    if options.dataset == "arrow":
        is_on_hub = not Path(options.folder).exists()
        name = options.folder if is_on_hub else Path(options.folder).resolve().name
        return {
            "dataset": options.dataset_name or name,
            "dataset_tags": [options.folder] if is_on_hub else None,
        }
    name = options.dataset_name or ("SBHAR" if options.dataset == "sbhar" else Path(options.annotations).name)
    if options.dataset == "files":
        if feature_extractor.encoder is None:
            return {"dataset": name}
        encoder = feature_extractor.encoder["name"]
        encoder = Path(encoder).name if Path(encoder).exists() else encoder  # where a folder lies is nobody's business
        return {
            "dataset": name,
            "features": f"Features were made by `{encoder}`. With the package `modeling-convtransformer[video]` the pipeline makes "
            'them of a recording: `localize("match.mp4")`.',
        }
    samples = int(feature_extractor.num_frames)
    return {
        "dataset": name,
        "tags": ["sensor"],
        "features": f"A feature is a window of raw sensor values, {samples} samples of "
        f"{feature_extractor.feature_size // samples} channels in a row. The pipeline cuts a whole recording into them: "
        '`localize({"signal": "recording.npy"})`, of shape (samples, channels).',
    }


def main():
    kinds = (ModelArguments, DataArguments, Training, QuantizationArguments)
    parser, recipe, model_options, data_options, training, quantization = parse(__doc__, *kinds)
    logging.disable_progress_bar()  # of saving, which takes no time; Trainer's stays
    try:
        set_seed(training.seed)
        feature_extractor = make_feature_extractor(recipe, model_options.checkpoint)
        train_set, val_set, names = load_datasets(data_options, feature_extractor, training.seed)
        # So that the pipeline of the trained model takes the recordings themselves.
        feature_extractor.encoder = feature_extractor.encoder or getattr(train_set, "encoder", None)
        model = make_model(recipe, model_options, names)
        if quantization.qat is not None:
            prepare_qat(model, quantization.qat)
        given, taken = feature_extractor.feature_size, sum(model.config.stream_widths)
        if given != taken:
            raise Usage(f"features have {given} channels (feature_size), but the model takes {taken} (n_in)")
        checkpoint = start(training, model.config)
    except MENDABLE as error:
        parser.error(one_line(error))
    if training.should_save:
        print(
            f"{model.num_parameters() / 1e6:.1f} million parameters, {len(names)} classes; "
            f"{len(train_set)} recordings train, {len(val_set)} evaluate"
        )
    trainer, average = make_trainer(model, feature_extractor, train_set, val_set, training)
    trainer.train(resume_from_checkpoint=checkpoint)

    # Trainer has put the best weights back; the average follows it. (An internal call uploads nothing yet.)
    folder, kept = Path(training.output_dir), "own" if average is None else training.weights
    found, results = {}, {}
    for name in ("own",) if average is None else ("own", "average"):
        with average.weights(trainer.model) if name == "average" else nullcontext():
            found[name], truth = localize(trainer)
            results[name] = evaluate_detections(found[name], truth)
            trainer.save_model(folder if name == kept else folder / f"{name}_weights", _internal_call=True)
    card = {
        **describe_data(data_options, feature_extractor),
        "results": {"+".join(data_options.val_split): results[kept].to_dict()},
        "license": model_options.license,
        "finetuned_from": model_options.checkpoint,
        "command": shareable_command(["python", *sys.argv]),
    }
    if training.should_save:
        for name, metrics in results.items():
            print(f"\n{name} weights{' (kept)' if name == kept else ''}:\n{metrics}")
        written = {name: metrics.to_dict() for name, metrics in results.items()}
        written |= {
            "kept": kept,
            "best_step": trainer.state.best_global_step,
            "history": trainer.state.log_history,
        }
        (folder / "metrics.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        card |= draw(found[kept], truth, val_set, model.config.id2label, folder / "timeline.png")
    with average.weights(trainer.model) if kept == "average" else nullcontext():
        trainer.push_to_hub(**card) if training.push_to_hub else trainer.create_model_card(**card)
    if training.should_save:
        print(f"\nmodel: {folder}")
        if quantization.qat is not None:
            # What was saved is in full precision, and evaluated as if it were not.
            model = ConvTransformerForTemporalActionLocalization.from_pretrained(folder)
            quantize(model, quantization.qat).save_pretrained(folder / quantization.qat)
            feature_extractor.save_pretrained(folder / quantization.qat)
            print(f"quantized: {folder / quantization.qat}")


if __name__ == "__main__":
    main()
