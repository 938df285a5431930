"""Export a detector for places without its code: an ONNX model, which needs no torch, and a torch.export program.

    python examples/export.py outputs/watch/model outputs/watch/exported
    python examples/export.py outputs/watch/model outputs/watch/exported --format onnx
    python examples/export.py outputs/watch/model outputs/watch/exported --check
    python examples/run_onnx.py outputs/watch/exported features.npy

OUTPUT_FOLDER becomes all that a deployment needs: model.onnx and model.pt2, config.json (the names of the classes) and
preprocessor_config.json (the rate of the features, post-processing). Both models are float32 and take

    input_features (batch, time, n_in) float32, attention_mask (batch, time) int64, 1 = valid; any batch, any time >= 1

and give logits, pred_segments, point_mask and point_levels: what post_process_temporal_action_localization needs. Both are
compared with the model, at lengths that were not traced, before they get their names. Neither needs this package to run:

    session = onnxruntime.InferenceSession("model.onnx")
    logits, segments, *_ = session.run(None, {"input_features": features, "attention_mask": mask})
    outputs = torch.export.load("model.pt2").module()(features, mask)
"""

import argparse
import importlib.util
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.utils import logging as transformers_logging

from modeling_convtransformer import ConvTransformerForTemporalActionLocalization
from modeling_convtransformer.modeling_convtransformer import MaskedConv1d

FILES = {"onnx": "model.onnx", "pt2": "model.pt2"}
CONFIGS = ("config.json", "preprocessor_config.json")
INPUTS = ("input_features", "attention_mask")
OUTPUTS = ("logits", "pred_segments", "point_mask", "point_levels")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# What is traced: neither size is 1, which tracing would take for "always 1", and neither is one that is checked.
TRACED = (5, 37)
# float32 sums in another order: some 1e-6 of values around 1 to 10.
TOLERANCE = 1e-4


class Usage(Exception):
    """What the user can mend."""


# ---------------------------------------------------------------------------------------------------------------------
# The model


def load_detector(folder: Path) -> ConvTransformerForTemporalActionLocalization:
    """
    Raises:
        Usage: the folder holds no detector, no feature extractor, or one whose graph would depend on the length.
    """
    for name in CONFIGS:
        if not (folder / name).is_file():
            raise Usage(f"there is no {folder / name}; write it with save_pretrained of model and feature extractor")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (ValueError, AttributeError):
        raise Usage(f"{folder / 'config.json'} is not the configuration of a model") from None
    if kind != "convtransformer":
        raise Usage(f"{folder} holds a model of type {kind!r}; this exports 'convtransformer'")
    try:
        model = ConvTransformerForTemporalActionLocalization.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise Usage(f"{folder}: {' '.join(str(error).split())}") from None
    if model.untrained_weights:
        missing = sorted(model.untrained_weights)
        raise Usage(f"{folder} holds no whole detector: {len(missing)} weights are missing, such as {missing[0]}")
    return model


def make_inputs(model, batch: int, time: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random features; every sample but the last is padded, if there is more than one step."""
    generator = torch.Generator().manual_seed(time)
    features = torch.randn(batch, time, sum(model.config.stream_widths), generator=generator)
    valid = torch.arange(1, batch + 1)[:, None] * time // batch
    return features, (torch.arange(time)[None, :] < valid.clamp(min=1)).long()


# ---------------------------------------------------------------------------------------------------------------------
# Tracing


class Traced(torch.nn.Module):
    """The detector with the inputs and outputs of a deployment."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_features: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.model(input_features, attention_mask)
        return {name: outputs[name] for name in OUTPUTS}


def attention(module, query, key, value, attention_mask, scaling: float, **kwargs):
    """
    transformers' sdpa without its question whether there is more than one query, which would be answered for good; and
    with masks that are added, because for bool ones ONNX looks for queries that see nothing, which ours never have.
    """
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        nothing = torch.zeros_like(attention_mask, dtype=query.dtype)
        attention_mask = nothing.masked_fill(~attention_mask, torch.finfo(query.dtype).min)
    is_causal = module.is_causal and attention_mask is None
    output = F.scaled_dot_product_attention(query, key, value, attention_mask, is_causal=is_causal, scale=scaling)
    return output.transpose(1, 2), None


def convolve(conv: MaskedConv1d, x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """One-dimensional: images of height 1 make the tracer ask whether batch or time are 1 too."""
    return F.conv1d(x.transpose(1, 2), kernel, conv.bias, conv.stride, conv.padding, groups=conv.groups).transpose(
        1, 2
    )


AttentionInterface.register("exported_sdpa", attention)


@contextmanager
def ready_to_trace(model):
    """The same model by other calls, for as long as it is traced."""
    convs = [module for module in model.modules() if isinstance(module, MaskedConv1d)]
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("exported_sdpa")
        for conv in convs:
            conv._convolve = partial(convolve, conv)
        # Sizes of 1 are sizes like others.
        with torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=True), quiet():
            yield
    finally:
        model.set_attn_implementation(before)
        for conv in convs:
            vars(conv).pop("_convolve", None)


@contextmanager
def quiet():
    """Without what torch.onnx and torch.export say of their own deprecated parts."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def trace(model) -> torch.export.ExportedProgram:
    """The detector as a graph for any batch and any time."""
    dynamic = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    with ready_to_trace(model):
        program = torch.export.export(
            Traced(model).eval(),
            make_inputs(model, *TRACED),
            dynamic_shapes=dict.fromkeys(INPUTS, dynamic),
            strict=False,
        )
    # What the tracer asked while it chose memory layouts (such as "is the coarsest level one step long?") became a condition
    # on the length, though no step of the graph depends on the answer: the lengths checked below are such lengths.
    program._guards_code = []
    return program


def write_onnx(program: torch.export.ExportedProgram, path: Path):
    import onnx_ir  # onnxscript brings it

    with torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=True), quiet():
        exported = torch.onnx.export(
            program, dynamo=True, input_names=INPUTS, output_names=OUTPUTS, opset_version=18, verbose=False
        )
    graph = exported.model.graph
    for values, second in ((graph.inputs, "time"), (graph.outputs, "points")):
        for value in values:  # "s37 + (((s37 + 1)//2))" says less
            value.shape = onnx_ir.Shape(["batch", second, *list(value.shape)[2:]])
    exported.save(path, external_data=False)


def write_pt2(program: torch.export.ExportedProgram, path: Path):
    with quiet():
        torch.export.save(program, path)


WRITERS = {"onnx": write_onnx, "pt2": write_pt2}


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def open_onnx(path: Path) -> Callable:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(features: torch.Tensor, mask: torch.Tensor) -> dict[str, np.ndarray]:
        outputs = session.run(OUTPUTS, {INPUTS[0]: features.numpy(), INPUTS[1]: mask.numpy()})
        return dict(zip(OUTPUTS, outputs, strict=True))

    return run


def open_pt2(path: Path) -> Callable:
    with quiet():
        program = torch.export.load(path).module()

    def run(features: torch.Tensor, mask: torch.Tensor) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {name: output.numpy() for name, output in program(features, mask).items()}

    return run


OPENERS = {"onnx": open_onnx, "pt2": open_pt2}


def shapes_to_check(config) -> list[tuple[int, int]]:
    """(batch, time), none of them traced: shorter than every window and table of positions, and longer."""
    longest = max(200, 2 * max(config.window_sizes) + 2)
    if config.use_abs_pe or config.use_learned_pe:
        longest = max(longest, min(config.max_len, 4096) + 50)
    return [(1, 1), (3, 17), (2, longest)]


def compare(model, run: Callable, batch: int, time: int) -> dict[str, float]:
    """
    The largest difference between `run` and the model: of logits, and of starts and ends in strides of their level,
    which is what the model predicts. Infinite where masks or levels are not equal.
    """
    features, mask = make_inputs(model, batch, time)
    with torch.no_grad():
        expected = {name: model(features, mask)[name].numpy() for name in OUTPUTS}
    found = run(features, mask)
    for name in OUTPUTS:
        if found[name].shape != expected[name].shape:
            return {"logits": np.inf, "segments": np.inf}
    if any((found[name] != expected[name]).any() for name in OUTPUTS[2:]):
        return {"logits": np.inf, "segments": np.inf}
    strides = np.array(model.config.detector_strides)[expected["point_levels"]][..., None]
    differences = {
        "logits": np.abs(found["logits"] - expected["logits"]),
        "segments": np.abs(found["pred_segments"] - expected["pred_segments"]) / strides,
    }
    # (a value that is not a number is not within any tolerance)
    return {name: float(np.nan_to_num(values, nan=np.inf).max()) for name, values in differences.items()}


def check(model, path: Path, kind: str, name: str):
    """
    Prints how far the file is from the model.

    Raises:
        Usage: further than rounding explains.
    """
    try:
        run = OPENERS[kind](path)
    except Exception as error:  # each runtime has errors of its own
        raise Usage(f"{name} cannot be loaded: {' '.join(str(error).split())}") from None
    worst = 0.0
    print(f"{name}, {path.stat().st_size / 1e6:.1f} MB; largest difference from the model:")
    for batch, time in shapes_to_check(model.config):
        differences = compare(model, run, batch, time)
        worst = max(worst, *differences.values())
        print(
            f"    batch {batch}, {time:>4} steps: logits {differences['logits']:.1e}, "
            f"segments {differences['segments']:.1e} strides"
        )
    if not worst <= TOLERANCE:
        raise Usage(f"{name} differs from the model by {worst:.1e}, more than {TOLERANCE}")


# ---------------------------------------------------------------------------------------------------------------------
# The command


def export(model, source: Path, target: Path, kinds: list[str]):
    """
    Writes and checks the files of `target`; a file has its name only once it is right.

    Raises:
        Usage: a file that is not right.
    """
    target.mkdir(parents=True, exist_ok=True)
    program = trace(model)
    for kind in kinds:
        path = target / FILES[kind]
        temporary = target / f".new_{FILES[kind]}"  # torch.export.load wants the ending
        try:
            WRITERS[kind](program, temporary)
            check(model, temporary, kind, str(path))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    for name in CONFIGS:
        if source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER", help="written by save_pretrained")
    parser.add_argument("output", type=Path, metavar="OUTPUT_FOLDER", help="made if it is not there")
    parser.add_argument("--format", nargs="+", choices=list(FILES), default=list(FILES), help="(default: both)")
    parser.add_argument(
        "--check", action="store_true", help="compare the files that OUTPUT_FOLDER holds, write nothing"
    )
    options = parser.parse_args()
    kinds = list(dict.fromkeys(options.format))
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if "onnx" in kinds and missing:
        parser.error(f'--format onnx needs {", ".join(missing)}: pip install -e ".[export]"')
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        model = load_detector(options.model)
        if options.output.exists() and not options.output.is_dir():
            raise Usage(f"{options.output} is a file; expected a folder")
        if options.check:
            for kind in kinds:
                path = options.output / FILES[kind]
                if not path.is_file():
                    raise Usage(f"there is no {path}")
    except Usage as error:
        parser.error(str(error))
    try:
        if options.check:
            for kind in kinds:
                check(model, options.output / FILES[kind], kind, str(options.output / FILES[kind]))
        else:
            export(model, options.model, options.output, kinds)
    except (Usage, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    if not options.check:
        print(f"deployment: {options.output}")


if __name__ == "__main__":
    main()
