"""convtransformer-convert: checkpoints of other implementations to folders that transformers loads, and back."""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import yaml
from transformers import logging

from . import actionformer, adapt, opentad, transformer_v2
from .checkpoint import ConversionError, check_free, first_line


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="convtransformer-convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{actionformer,transformer-v2,opentad}")

    v1 = commands.add_parser(
        "actionformer",
        help="checkpoints of ActionFormer's release (.pth.tar), exactly; --reverse writes them",
        description="Converts a checkpoint of ActionFormer's release to a folder with config.json, model.safetensors,\n"
        "preprocessor_config.json and a model card, whose outputs are those of the release. Nothing in the\n"
        "checkpoint is executed, and nothing is written unless all of it fits.",
        epilog="examples:\n"
        "  convtransformer-convert actionformer epoch_034.pth.tar my_thumos \\\n"
        "      --config configs/thumos_i3d.yaml --annotations thumos14.json\n"
        "  convtransformer-convert actionformer my_thumos back.pth.tar --reverse",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_shared(
        v1,
        source="the checkpoint, a .pth.tar file (with --reverse: a converted folder)",
        out="the folder to write (with --reverse: the .pth.tar file to write)",
        whose="ActionFormer does",
    )
    _add_recipe(
        v1,
        "the YAML file that it was trained with, or the config.txt that training wrote beside it (needed, but for --reverse)",
    )
    v1.add_argument("--reverse", action="store_true", help="write a converted folder as a checkpoint of the release")

    _add_transformer_v2(commands)
    _add_opentad(commands)

    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what goes wrong is said once, below
    try:
        if options.set and options.target is None:
            raise ConversionError(
                "--set changes a target configuration; it needs --target, such as --target balanced."
            )
        if options.command == "actionformer" and options.reverse:
            actionformer.reverse(options.source, options.out, options.overwrite)
            print(f"{options.out} is a checkpoint for eval.py of ActionFormer's release.")
            return 0
        if options.command != "opentad" and options.config is None:
            raise ConversionError(
                "--config is needed: the YAML file that the checkpoint was trained with, or the config.txt beside it."
            )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = _convert(options) if options.target is None else _start(options)
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                print(f"note: {warning.message}", file=sys.stderr)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written.", file=sys.stderr)
        return 130
    if options.push_to_hub:
        from huggingface_hub import HfApi

        try:
            repository = HfApi().create_repo(options.push_to_hub, exist_ok=True).repo_id
            HfApi().upload_folder(repo_id=repository, folder_path=options.out)
        except Exception as error:  # no network, no token, no such name, ...
            print(f"error: {options.out} is written, but was not uploaded ({first_line(error)}).", file=sys.stderr)
            return 1
    print(
        f"{model.num_parameters():,} parameters in {options.out}. Load them with\n"
        f'    {type(model).__name__}.from_pretrained("{options.out}")'
    )
    return 0


def _start(options: argparse.Namespace):
    """Converts into a temporary folder, and starts a model of the target configuration from it."""
    overrides = {}
    for assignment in options.set:
        field, equals, value = assignment.partition("=")
        if not equals:
            raise ConversionError(f"--set {assignment}: expected FIELD=VALUE, such as n_embd=512.")
        overrides[field] = yaml.safe_load(value)
    adapt.find_configuration(options.target)
    check_free(options.out, options.overwrite)
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "exact"
        _convert(argparse.Namespace(**{**vars(options), "out": exact}))
        model, report = adapt.retarget(
            exact, options.out, options.target, options.source.name, options.overwrite, **overrides
        )
    print(report)
    return model


def _convert(options: argparse.Namespace):
    """Calls the converter of the command and returns the model."""
    given = {"weights": options.weights, "allow_unused": options.allow_unused, "overwrite": options.overwrite}
    if options.command == "opentad":
        window = options.window if options.window is None or len(options.window) > 1 else options.window[0]
        return opentad.convert(
            options.source,
            options.out,
            options.config,
            class_map=options.class_map,
            geometry={name: getattr(options, name) for name in ("fps", "feature_stride", "num_frames")},
            n_head=options.n_head,
            mha_win_size=window,
            max_len=options.max_len,
            regression_range=options.regression_range,
            use_abs_pe=options.abs_pe,
            **given,
        )
    given |= {"annotations": options.annotations, "fps": options.fps}
    if options.command == "actionformer":
        return actionformer.convert(options.source, options.out, options.config, **given)
    model, report = transformer_v2.convert(options.source, options.out, options.config, **given)
    print(report)
    return model


def _add_transformer_v2(commands):
    v2 = commands.add_parser(
        "transformer-v2",
        help="checkpoints of the earlier v2 (backbone_type: convTransformerv2), exactly where our model can hold them",
        description="Converts a checkpoint of the earlier v2, a whole detector or its backbone alone (with or without the "
        "prefix `backbone.`), and reports what was copied, adapted and initialised, in a table and in "
        "conversion_report.json. Without RoPE and RMSNorm the outputs are the source's; with RoPE, which the source has in "
        "its stem only, or RMSNorm, beside which it has LayerNorm in its branch, they are near. A backbone alone becomes "
        "a ConvTransformerModel. Nothing in the checkpoint is executed.",
        epilog="example: convtransformer-convert transformer-v2 epoch_034.pth.tar my_model --config thumos_v2.yaml",
    )
    _add_shared(v2, "the checkpoint, or the state dict of a backbone", "the earlier v2 does")
    _add_recipe(v2, "the YAML file that it was trained with (needed)")


def _add_opentad(commands):
    tad = commands.add_parser(
        "opentad",
        help="ActionFormer checkpoints of OpenTAD (.pth)",
        description="Converts an ActionFormer checkpoint of OpenTAD. Sizes are read from the tensors; what no\n"
        "tensor shows (heads, windows, geometry, suppression) from the config, or from the options,\n"
        "which go first. The config is the Python file that it was trained with, in its place in\n"
        "OpenTAD's configs folder, because it names others that it is based on; or what mmengine's\n"
        "Config.dump wrote as .json or .yaml. It is read as text: neither it nor the checkpoint is\n"
        "executed, so what a config computes must be given as an option. Only the FPNIdentity neck\n"
        "converts. Inputs that OpenTAD does not pad give its outputs; near the end of padded ones they\n"
        "differ slightly.",
        epilog="examples:\n"
        "  convtransformer-convert opentad best.pth my_thumos --config configs/actionformer/thumos_i3d.py \\\n"
        "      --class-map category_idx.txt --fps 30\n"
        "  convtransformer-convert opentad best.pth my_thumos --n-head 4 --window 19 --feature-stride 4 \\\n"
        "      --num-frames 16 --fps 30",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_shared(tad, "the .pth file of OpenTAD's training, or a bare state dict", "OpenTAD's ActionFormer does")
    tad.add_argument("--config", type=Path, metavar="FILE", help="OpenTAD's config: .py, or dumped as .json or .yaml")
    tad.add_argument("--class-map", type=Path, metavar="FILE", help="OpenTAD's class map, one name a line")
    tad.add_argument("--n-head", type=int, metavar="N", help="attention heads (attn_cfg.n_head)")
    tad.add_argument(
        "--window",
        type=int,
        nargs="+",
        metavar="N",
        help="attention window (attn_cfg.n_mha_win_size): one for all levels or one for each; -1 is global",
    )
    tad.add_argument(
        "--max-len", type=int, metavar="N", help="length of training sequences, in features (max_seq_len)"
    )
    tad.add_argument("--abs-pe", action="store_true", default=None, help="it has absolute positions (use_abs_pe)")
    tad.add_argument(
        "--regression-range",
        type=_pair,
        nargs="+",
        metavar="LOW,HIGH",
        help="regression range of each level, for training: 0,4 4,8 8,16 ... (default)",
    )
    tad.add_argument("--fps", type=float, help="frames per second of the recordings")
    tad.add_argument("--feature-stride", type=float, metavar="N", help="frames from one feature to the next")
    tad.add_argument(
        "--num-frames", type=float, metavar="N", help="frames of a feature: twice OpenTAD's offset_frames"
    )


def _add_recipe(parser: argparse.ArgumentParser, config: str):
    """What v1 and the earlier v2 record beside their weights."""
    parser.add_argument("--config", type=Path, metavar="FILE", help=config)
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="the dataset's annotation JSON: it gives the class names, and the frame rate if the config has none",
    )
    parser.add_argument("--fps", type=float, help="frames per second of the recordings, instead of the config's")


def _add_shared(parser: argparse.ArgumentParser, source: str, whose: str, out: str = "the folder to write"):
    parser.add_argument("source", type=Path, metavar="SOURCE", help=source)
    parser.add_argument("out", type=Path, metavar="OUT", help=out)
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        default="ema",
        help="the moving average of training (default) or the raw weights",
    )
    parser.add_argument("--allow-unused", action="store_true", help=f"leave out tensors that {whose} not have")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if an earlier conversion wrote it")
    parser.add_argument("--push-to-hub", metavar="REPO", help="then upload to this repository of the Hugging Face Hub")
    _add_target(parser)


def _add_target(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--target",
        metavar="CONFIGURATION",
        help="do not convert exactly, but start a model of this configuration (a YAML file, or a name: balanced, "
        "maximum_speed, ...) from the checkpoint: what fits is copied or adapted, the rest initialised, with a report",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the target configuration, such as n_embd=512 to keep the checkpoint's width; may be repeated",
    )


def _pair(text: str) -> list[float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}; expected two numbers, such as 0,4") from error
    return [low, high]


if __name__ == "__main__":
    sys.exit(main())
