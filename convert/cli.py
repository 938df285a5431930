"""convtransformer-convert: checkpoints of other implementations to folders that transformers loads, and back."""

import argparse
import sys
import warnings
from pathlib import Path

from transformers import logging

from . import actionformer
from .checkpoint import ConversionError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="convtransformer-convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{actionformer}")

    v1 = commands.add_parser(
        "actionformer",
        help="checkpoints of ActionFormer's release (.pth.tar), exactly; --reverse writes them",
        description="Converts a checkpoint of ActionFormer's release to a folder with config.json, model.safetensors, "
        "preprocessor_config.json and a model card. Nothing in the checkpoint is executed.",
        epilog="example: convtransformer-convert actionformer epoch_034.pth.tar my_thumos --config configs/thumos_i3d.yaml "
        "--annotations thumos14.json",
    )
    v1.add_argument("source", type=Path, help="the .pth.tar file (with --reverse: our folder)")
    v1.add_argument("out", type=Path, help="the folder to write (with --reverse: the .pth.tar file)")
    v1.add_argument(
        "--config", type=Path, help="v1's YAML file of this checkpoint, or its recorded config.txt (required)"
    )
    v1.add_argument("--annotations", type=Path, help="v1's annotation JSON: class names, and the frame rate")
    v1.add_argument("--fps", type=float, help="frame rate of the recordings, where the config leaves it open")
    v1.add_argument("--weights", choices=("ema", "raw"), default="ema", help="moving average (default) or raw weights")
    v1.add_argument("--allow-unused", action="store_true", help="leave out tensors that v1 does not have")
    v1.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    v1.add_argument("--reverse", action="store_true", help="write one of our folders as a v1 checkpoint")
    v1.add_argument("--push-to-hub", metavar="REPO", help="then upload to this repository of the Hugging Face Hub")

    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    try:
        if options.reverse:
            actionformer.reverse(options.source, options.out)
            print(f"{options.out} is a checkpoint for v1's eval.py.")
            return 0
        if options.config is None:
            raise ConversionError("--config is needed: v1's YAML file of this checkpoint, or its config.txt.")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = actionformer.convert(
                options.source,
                options.out,
                options.config,
                weights=options.weights,
                annotations=options.annotations,
                fps=options.fps,
                allow_unused=options.allow_unused,
                overwrite=options.overwrite,
            )
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                print(f"note: {warning.message}", file=sys.stderr)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.push_to_hub:
        from huggingface_hub import HfApi

        repository = HfApi().create_repo(options.push_to_hub, exist_ok=True).repo_id
        HfApi().upload_folder(repo_id=repository, folder_path=options.out)
    print(
        f"{model.num_parameters():,} parameters in {options.out}. Load them with\n"
        f'    ConvTransformerForTemporalActionLocalization.from_pretrained("{options.out}")'
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
