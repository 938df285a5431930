"""A detector in fewer bits, by torchao: a smaller file, less memory, on some machines less time.

    model = ConvTransformerForTemporalActionLocalization.from_pretrained("my_detector")
    quantize(model, "int8").save_pretrained("my_detector_int8")
    model = ConvTransformerForTemporalActionLocalization.from_pretrained("my_detector_int8")  # like any other

What is stored in fewer bits are the weights of linear layers and convolutions, depthwise ones included: more than 99 % of
a model. Norms, biases, scales and position tables keep their precision.

`prepare_qat` and `convert_qat` train a model for the rounding first; `quantize_static` makes a program in which activations
are rounded with ranges that were measured on recordings. docs/quantization.md says what each costs and is worth.
"""

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TorchAoConfig
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import is_torchao_available

from .modeling_convtransformer import MaskedConv1d, compute_with_packed_weights, dequantized

__all__ = ["METHODS", "convert_qat", "prepare_qat", "quantization_config", "quantize", "quantize_static"]

METHODS = {
    "int8": "weights of 8 bits, a scale for each output channel",
    "int8_dynamic": "the same, and inputs of the layers are rounded to 8 bits too, each time step with a scale of its own",
    "int4": "weights of 4 bits, a scale and a zero point for each group of at most 128",
    "float8": "linear layers in 8-bit floating point (e4m3), a scale for each output channel; convolutions as int8",
    "float8_dynamic": "the same, and their inputs too, for GPUs that multiply such numbers (Ada, Hopper and later)",
    "ternary": "linear layers in -1, 0 and 1 times a scale for each output channel, stored in 4 bits; convolutions as int8. "
    "An experiment: only for models that were trained for it",
}

# Linear layers and dense convolutions by name, for transformers, which goes by names.
LINEAR = r"re:(.*\.)?([a-z]+_proj|streams\.\d+|laterals\.\d+)\.weight"
CONVOLUTION = r"re:(.*\.)?((embedding|class_head|segment_head)\.(convs\.\d+|output)|(conv1|conv2|downsample))\.weight"

GROUP = 128


def quantization_config(method: str, keep: Sequence[str] = ()) -> TorchAoConfig:
    """
    For `from_pretrained(folder, quantization_config=...)`: the weights are stored in fewer bits as they are loaded. The
    same as `quantize` afterwards, except that scales are float32 and depthwise convolutions stay as they are: 1 % of the
    full size more.

    Args:
        method: "int8", "int8_dynamic", "float8" or "float8_dynamic"; see `METHODS`.
        keep: parts of the model that keep their precision, by name or the beginning of it, such as "class_head".

    Raises:
        ImportError: torchao is not installed.
        ValueError: there is no such method, or not at load.
    """
    if method in ("int4", "ternary"):
        raise ValueError(
            f"{method!r} is not made while loading: load the model as it is, then quantize(model, {method!r})."
        )
    return _describe(method, keep)


def quantize(model: PreTrainedModel, method: str, keep: Sequence[str] = ()) -> PreTrainedModel:
    """
    Stores the weights of `model` in fewer bits, in place. `save_pretrained` and `from_pretrained` know such a model.

    Args:
        model: a loaded (or trained) model of this package.
        method: one of `METHODS`.
        keep: parts of the model that keep their precision, by name or the beginning of it, such as "class_head".

    Returns:
        the same model, in evaluation mode.

    Raises:
        ImportError: torchao is not installed.
        ValueError: there is no such method, nothing to keep by such a name, or the model is quantized already.
        RuntimeError: float8_dynamic without a GPU that can.
    """
    _check_unquantized(model)
    config = _describe(method, keep)
    if method == "float8_dynamic" and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)):
        raise RuntimeError(
            '"float8_dynamic" needs a GPU of compute capability 8.9 or later; "float8" runs everywhere.'
        )
    for module, store in [*_targets(model, method, keep)]:
        module.weight = nn.Parameter(store(module.weight.detach()), requires_grad=False)
    compute_with_packed_weights(model)
    # What from_pretrained says of a model that it quantized, which save_pretrained asks for.
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, config.quant_method
    return model.eval()


def _need_torchao():
    if not is_torchao_available():
        raise ImportError('Quantization needs torchao: pip install "modeling-convtransformer[quantization]"')


def _check_unquantized(model: PreTrainedModel):
    if getattr(model, "hf_quantizer", None) is not None or hasattr(model, "qat"):
        raise ValueError(
            "The model is quantized already, or prepared for it. Load the checkpoint in full precision and take that: "
            "rounding twice is worse than rounding once. (A prepared model becomes quantized by convert_qat.)"
        )
    if getattr(model, "_hf_peft_config_loaded", False) or any("lora_" in name for name, _ in model.named_modules()):
        raise ValueError("The model has adapters. Merge them first: PeftModel.merge_and_unload(), then quantize that.")


def _describe(method: str, keep: Sequence[str]) -> TorchAoConfig:
    """What config.json says of it, in torchao's terms."""
    _need_torchao()
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        FqnToConfig,
        Int4WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
    )

    if method not in METHODS:
        raise ValueError(f"There is no method {method!r}; expected one of {', '.join(METHODS)}.")
    plain = {"set_inductor_config": False}  # it would change settings of torch.compile for the whole process
    int4 = Int4WeightOnlyConfig(group_size=GROUP, **plain)
    linear = {
        "int8": Int8WeightOnlyConfig(**plain),
        "int8_dynamic": Int8DynamicActivationInt8WeightConfig(**plain),
        "int4": int4,
        "float8": Float8WeightOnlyConfig(**plain),
        "float8_dynamic": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), **plain),
        "ternary": int4,
    }[method]
    convolution = {
        "int8_dynamic": Int8DynamicActivationInt8WeightConfig(granularity=[PerRow(), PerRow(dim=1)], **plain),
        "int4": int4,
    }.get(method, Int8WeightOnlyConfig(granularity=PerRow(dim=1), **plain))
    kept = [(rf"re:(.*\.)?{re.escape(name)}\..*", None) for name in keep]
    return TorchAoConfig(FqnToConfig(OrderedDict([*kept, (LINEAR, linear), (CONVOLUTION, convolution)])))


def _targets(model: nn.Module, method: str, keep: Sequence[str]) -> Iterator[tuple[nn.Module, Callable]]:
    """Each layer that `method` stores in fewer bits, and the function that does so with its weight."""
    kept = {name: re.compile(rf"(.*\.)?{re.escape(name)}(\..*)?") for name in keep}
    unused = set(kept)
    for name, module in model.named_modules():
        keeping = {part for part, pattern in kept.items() if pattern.fullmatch(name)}
        unused -= keeping
        if not keeping and type(module) in (nn.Linear, MaskedConv1d):
            of_linear, of_convolution = STORES[method]
            yield module, of_linear if isinstance(module, nn.Linear) else of_convolution
    if unused:
        raise ValueError(f"keep names {sorted(unused)}, but the model has no such part.")


# --- How a weight is stored: (out, in) of a linear layer or (out, in, taps) of a convolution -------------------------


def _int8(weight: torch.Tensor, activations: Any = None) -> torch.Tensor:
    from torchao.quantization import Int8Tensor

    row = [*range(1, weight.dim())]
    scale = weight.abs().amax(dim=row, keepdim=True).clamp(min=torch.finfo(torch.float32).eps) / 127
    scale = scale.to(torch.bfloat16)  # before rounding by it, so that nothing is lost but file size
    values = (weight / scale.to(weight.dtype)).round().clamp(-127, 127).to(torch.int8)
    return Int8Tensor(values, scale, [1, *weight.shape[1:]], weight.dtype, act_quant_kwargs=activations)


def _int8_dynamic(weight: torch.Tensor) -> torch.Tensor:
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    is_depthwise = weight.dim() == 3 and weight.shape[1] == 1  # never a matrix product
    return _int8(weight, None if is_depthwise else QuantizeTensorToInt8Kwargs(granularity=PerRow()))


def _int4(weight: torch.Tensor) -> torch.Tensor:
    rows, width = weight.shape[0], weight[0].numel()
    group = next((size for size in range(min(GROUP, width), 1, -1) if size % 2 == width % size == 0), None)
    if group is None:  # two values share a byte
        return _int8(weight)
    groups = weight.reshape(rows, -1, group).float()
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    scale = (high - low).clamp(min=1e-6) / 15
    zero_point = low + 8 * scale
    return _pack(((groups - zero_point) / scale).round().clamp(-8, 7), scale, zero_point, weight)


def _ternary(weight: torch.Tensor) -> torch.Tensor:
    """As in BitNet b1.58 (https://arxiv.org/abs/2402.17764), with a scale for each output channel."""
    if weight.shape[1] % 2:
        return _int8(weight)
    rows = weight.float()[:, None]
    scale = rows.abs().mean(dim=-1, keepdim=True).clamp(min=1e-6)
    return _pack((rows / scale).round().clamp(-1, 1), scale, torch.zeros_like(scale), weight)


def _pack(values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Integers from -8 to 7 of shape (rows, groups, group) in torchao's plain format of 4 bits, which it makes itself only
    on GPUs; scale and zero point are (rows, groups, 1)."""
    from torchao.quantization import Int4Tensor

    values = values.to(torch.int8).flatten(1)
    packed = values[:, 1::2] << 4 | values[:, ::2] & 0xF
    scale, zero_point = (x.squeeze(-1).t().contiguous().to(weight.dtype) for x in (scale, zero_point))
    return Int4Tensor(packed, scale, zero_point, [1, len(values[0]) // len(scale)], weight.shape)


def _float8(weight: torch.Tensor, activations: Any = None) -> torch.Tensor:
    from torchao.quantization import Float8Tensor, PerRow

    return Float8Tensor.from_hp(weight, torch.float8_e4m3fn, PerRow(), act_quant_kwargs=activations)


def _float8_dynamic(weight: torch.Tensor) -> torch.Tensor:
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    return _float8(weight, QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, PerRow()))


# By method: of linear layers, of dense convolutions.
STORES = {
    "int8": (_int8, _int8),
    "int8_dynamic": (_int8_dynamic, _int8_dynamic),
    "int4": (_int4, _int4),
    "float8": (_float8, _int8),
    "float8_dynamic": (_float8_dynamic, _int8),
    "ternary": (_ternary, _int8),
}


# --- Training for it -------------------------------------------------------------------------------------------------


class _Rounded:
    """A layer that computes with its weight as `store` would store it, and learns as if it had not been rounded
    (straight-through, https://arxiv.org/abs/1308.3432)."""

    def kernel(self) -> torch.Tensor:
        return _straight_through(self.weight, dequantized(self.store(self.weight.detach())))

    def round_inputs(self, x: torch.Tensor) -> torch.Tensor:
        return _straight_through(x, _round_steps(x.detach())) if self.rounds_inputs else x


class RoundedLinear(_Rounded, nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.round_inputs(x), self.kernel(), self.bias)


class RoundedConv1d(_Rounded, MaskedConv1d):
    def forward(self, x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        return super().forward(self.round_inputs(x), padding)


def _straight_through(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    return x + (rounded - x).detach()


def _round_steps(x: torch.Tensor) -> torch.Tensor:
    """Each time step in 8 bits with a scale of its own, as torchao rounds the inputs of int8_dynamic."""
    from torchao.quantization import Int8Tensor, PerRow

    return Int8Tensor.from_hp(x, PerRow()).dequantize()


def prepare_qat(model: PreTrainedModel, method: str, keep: Sequence[str] = ()) -> PreTrainedModel:
    """
    Makes `model` compute, in place, as if it had been quantized by `method`, while its weights stay what they are and go
    on learning: quantization-aware training. A few epochs at a low learning rate, then `convert_qat`. Checkpoints saved
    meanwhile are ordinary ones in full precision.

    Args:
        model, keep: as for `quantize`.
        method: "int8", "int8_dynamic", "int4", "float8" or "ternary".

    Returns:
        the same model.

    Raises:
        ImportError: torchao is not installed.
        ValueError: as for `quantize`.
    """
    if method == "float8_dynamic":
        raise ValueError('There is no training for "float8_dynamic"; "float8" rounds the same weights.')
    _check_unquantized(model)
    _describe(method, keep)
    for module, store in [*_targets(model, method, keep)]:
        # Parameters, their names and an optimizer's hold of them stay.
        module.__class__ = RoundedLinear if isinstance(module, nn.Linear) else RoundedConv1d
        module.store = store
        # Of convolutions, only those that become matrix products: see MaskedConv1d.
        is_product = isinstance(module, nn.Linear) or module.groups == module.stride[0] == 1
        module.rounds_inputs = method == "int8_dynamic" and is_product
    model.qat = (method, tuple(keep))
    return model


def convert_qat(model: PreTrainedModel) -> PreTrainedModel:
    """
    Quantizes, in place, a model that `prepare_qat` prepared: its outputs stay what they were in training's last step
    (in evaluation mode).

    Raises:
        ValueError: it was not prepared.
    """
    if not hasattr(model, "qat"):
        raise ValueError("The model was not prepared by prepare_qat; quantize(model, method) needs no preparation.")
    for module in model.modules():
        if isinstance(module, _Rounded):
            module.__class__ = nn.Linear if isinstance(module, nn.Linear) else MaskedConv1d
            del module.store, module.rounds_inputs
    method, keep = model.__dict__.pop("qat")
    return quantize(model, method, keep)


# --- With ranges measured on recordings ------------------------------------------------------------------------------

OUTPUTS = ("logits", "pred_segments", "point_mask", "point_levels")


class _OneRecording(nn.Module):
    """The detector as a program: a recording in, what post-processing needs out."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_features: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.model(input_features)
        return {name: outputs[name] for name in OUTPUTS}


@torch.no_grad()
def quantize_static(model: PreTrainedModel, recordings: Iterable[torch.Tensor]) -> torch.export.ExportedProgram:
    """
    Static quantization after training, by torchao's PT2E: weights and the inputs of linear layers and convolutions in 8
    bits, with one range for each layer's inputs, which is measured while the recordings pass. For CPUs:

        torch.export.save(quantize_static(detector, recordings), "detector_int8.pt2")

        import torchao.quantization.pt2e  # the program's operators
        torch._inductor.config.freezing = True  # weights are constants, which the kernels ask for
        detector = torch.compile(torch.export.load("detector_int8.pt2").module())  # without compiling, slower than float32
        outputs = detector(input_features)  # (1, time, n_in), any time above the coarsest stride
        feature_extractor.post_process_temporal_action_localization(outputs)

    A program needs torchao, but neither this package nor transformers, and is not what `from_pretrained` loads: checkpoints of
    transformers have no place for ranges of activations.

    Args:
        model: a detector in float32 on the CPU; it stays as it is, but in evaluation mode.
        recordings: some dozens that are like those to come, each (1, time, n_in), prepared as for the model.

    Raises:
        ImportError: torchao is not installed.
        ValueError: no recordings, or one of another shape; the message names it.
    """
    _need_torchao()
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    recordings, width = [*recordings], sum(model.config.stream_widths)
    for index, one in enumerate(recordings):
        if one.dim() != 3 or one.shape[0] != 1 or one.shape[2] != width or one.shape[1] < 2:
            raise ValueError(f"recordings[{index}] has shape {tuple(one.shape)}; expected (1, time > 1, {width}).")
    if not recordings:
        raise ValueError("There are no recordings to measure ranges on; some dozens like those to come are enough.")
    dynamic = {1: torch.export.Dim.DYNAMIC}
    # What the program is traced with becomes part of the file: little, but long enough for a graph of all lengths.
    example = (torch.zeros(1, 2 * max(model.config.strides) + 2, width),)
    # Sizes of 1 are sizes like others.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # max pooling is not rounded, and says so in a screenful
        graph = torch.export.export(_OneRecording(model.eval()), example, dynamic_shapes=(dynamic,)).module()
        # The quantizer finds layers by the function that they were written with, which this way of tracing leaves out.
        functions = {torch.ops.aten.conv2d.default: F.conv2d, torch.ops.aten.linear.default: F.linear}
        for node in graph.graph.nodes:
            if node.target in functions:
                node.meta["source_fn_stack"] = [(node.name, functions[node.target])]
        quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
        graph = prepare_pt2e(graph, quantizer)
        for one in recordings:
            graph(one)
        graph = convert_pt2e(graph)
        for node in graph.graph.nodes:  # where in this package a node comes from, which would be most of the file
            for name in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):
                node.meta.pop(name, None)
        _share(graph)
        return torch.export.export(graph, example, dynamic_shapes=(dynamic,))


def _share(graph: torch.fx.GraphModule):
    """One tensor for equal weights, of which convert_pt2e makes one for each use (heads serve every level), and none that is
    not used (those before rounding). Each use keeps a name of its own: compiling looks for weights of a single use."""
    tensors, first = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}, {}
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name, tensor in tensors.items():
        parent, _, own = name.rpartition(".")
        if name not in used:
            delattr(graph.get_submodule(parent), own)
            continue
        key = (tensor.dtype, tensor.shape, tensor.detach().contiguous().numpy().tobytes())
        setattr(graph.get_submodule(parent), own, first.setdefault(key, tensor))
