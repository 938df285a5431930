"""What latency, training and scaling measure: models of named settings, ours and v1's, with their inputs and outputs.

All weights are random, but such that every part matters to the outputs (`stir`): an initialised model hides its
attention behind learned scales near zero, and no error in it would show.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import official
import torch
import yaml
from harness import BenchmarkError, Column, first_line, first_sentence
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from modeling_convtransformer import ConvTransformerConfig, ConvTransformerForTemporalActionLocalization
from modeling_convtransformer.convert.actionformer import padding_multiple
from modeling_convtransformer.convert.adapt import find_configuration
from modeling_convtransformer.convert.checkpoint import ConversionError

VARIANTS = {
    "balanced": {},
    "v1_compatible": {"use_rope": False, "use_swiglu": False, "use_rms_norm": False, "mask_conv_inputs": False},
}
DTYPES = ("float32", "bfloat16", "float16", "autocast")
COMPILE_MODES = ("off", "default", "reduce-overhead", "max-autotune")


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def find_config(name: str, fields: dict[str, Any]) -> ConvTransformerConfig:
    """
    The settings `name`, with `fields` replaced: "balanced" (every default), "v1_compatible" (v1's own defaults), a YAML
    file, or one of ours (configuration/*.yaml) by its name or the unique start of it ("thumos14"). Fields of its own may
    follow, and a label go before it: "GQA:balanced,n_kv_head=2".

    Raises:
        BenchmarkError: there are no such settings, or they contradict one another.
    """
    name, *own = name.rpartition(":")[2].split(",")
    fields = {**fields, **parse_assignments(own)}
    try:
        if name in VARIANTS:
            return ConvTransformerConfig(**{**VARIANTS[name], **fields})
        starts = [path for path in (harness.ROOT / "configuration").glob("*.yaml") if path.stem.startswith(name)]
        if len(starts) == 1 and not Path(name).is_file():
            name = starts[0].stem
        return ConvTransformerConfig.from_yaml(find_configuration(name), **fields)
    except ConversionError as error:
        raise BenchmarkError(str(error)) from None
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise BenchmarkError(f"{name}: {first_line(error)}") from None


def find_variants(args: argparse.Namespace, fields: dict[str, Any]) -> list[tuple[str, ConvTransformerConfig]]:
    """Label and config of each of --variants."""
    variants = {}
    for name in dict.fromkeys(args.variants):
        label = name.partition(":")[0]
        if label in variants:
            raise BenchmarkError(f"--variants has {label} twice; expected different labels.")
        variants[label] = find_config(name, fields)
    return list(variants.items())


def parse_assignments(texts: list[str]) -> dict[str, Any]:
    """Fields of the config from "FIELD=VALUE", values as in YAML."""
    known = {field for field in ConvTransformerConfig.__dataclass_fields__ if not field.startswith("_")}
    known |= set(ConvTransformerConfig.attribute_map) | {"num_labels"}
    fields = {}
    for text in texts:
        field, is_there, value = text.partition("=")
        if not is_there or field not in known:
            raise BenchmarkError(f"{text}: expected FIELD=VALUE with a field of ConvTransformerConfig.")
        fields[field] = yaml.safe_load(value)
    return fields


def parse_fields(args: argparse.Namespace) -> dict[str, Any]:
    """What --set, --n-in and --n-embd say."""
    given = {"n_in": args.n_in, "n_embd": args.n_embd}
    return {**parse_assignments(args.set), **{field: value for field, value in given.items() if value is not None}}


def add_arguments(
    parser: argparse.ArgumentParser, variants: list[str], batch: int, length: int | None, model: str | None = None
):
    """The options that choose what is measured. Without `length` or `model`, the command has its own."""
    if model is not None:
        parser.add_argument("--model", choices=["backbone", "detector"], default=model, help=f"default: {model}")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=variants,
        metavar="NAME",
        help="settings: balanced (every default), v1_compatible (v1's own defaults), a file of configuration/ by name "
        "or start of it, or the path of a YAML file; with fields of its own and a label, GQA:balanced,n_kv_head=2 "
        f"(default: {' '.join(variants)})",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the config, for all variants"
    )
    parser.add_argument("--n-in", type=int, help="width of the features (default: the variant's)")
    parser.add_argument("--n-embd", type=int, help="width of the model (default: the variant's)")
    parser.add_argument("--batch", type=int, default=batch, help=f"default: {batch}")
    if length is not None:
        parser.add_argument("--length", type=int, default=length, help=f"time steps (default: {length})")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        default=["float32"],
        help="of weights and activations; autocast: float32 weights, bfloat16 where torch.autocast does so",
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["sdpa"],
        metavar="NAME",
        help="attn_implementation: sdpa, eager, flex_attention, flash_attention_2, ... (default: sdpa)",
    )
    parser.add_argument("--compile", nargs="+", choices=COMPILE_MODES, default=["off"], help="modes of torch.compile")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--tf32", choices=["default", "on", "off"], default="default", help="of float32 on a GPU (default: torch's)"
    )
    parser.add_argument("--v1", metavar="PATH", help=official.HELP)
    parser.add_argument(
        "--v1-dtype", nargs="+", choices=DTYPES, default=["float32"], help="of v1's rows; the first is the reference"
    )
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory (default: yes)"
    )
    parser.add_argument(
        "--limits",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure what the machine can do, and give times as a share of it (default: yes)",
    )


def check_arguments(args: argparse.Namespace):
    """Refuses what no case can be made of, before anything runs."""
    for option in ("batch", "length"):
        if getattr(args, option, 1) < 1:
            raise BenchmarkError(f"--{option} is {getattr(args, option)}; expected at least 1.")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise BenchmarkError(f"--device {args.device} is not there: {first_line(error)}") from None
    if args.v1:
        args.v1 = str(official.check_clone(args.v1))
    prepare_torch(args.threads, args.tf32)


def prepare_torch(threads: int | None, tf32: str):
    """torch's settings of this process."""
    if threads is not None:
        torch.set_num_threads(threads)
    if tf32 != "default":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32 == "on"
    # Every row compiles the same functions anew; past the usual limit torch would silently run them uncompiled.
    torch._dynamo.config.cache_size_limit = 256


# ---------------------------------------------------------------------------------------------------------------------
# Cases


@dataclasses.dataclass
class Case:
    """One row: a model and how it runs. Everything in it is plain, so that a fresh process can build the same."""

    variant: str
    config: ConvTransformerConfig
    length: int
    batch: int = 1
    model: str = "backbone"
    dtype: str = "float32"
    backend: str = "eager"
    compile: str = "off"
    device: str = "cpu"
    threads: int | None = None
    tf32: str = "default"
    v1: str | None = None  # the clone; where the settings are v1's, all weights come from its code
    is_v1: bool = False  # v1's own code
    is_training: bool = False

    @property
    def name(self) -> str:
        compiled = "" if self.compile == "off" else f", compile {self.compile}"
        return f"{self.variant}, {self.dtype}, {self.backend}{compiled}"

    @property
    def has_v1_weights(self) -> bool:
        return self.v1 is not None and not official.beyond_v1(self.config)

    @property
    def settings(self) -> str:
        """The same text for the same model and weights."""
        fields = {key: value for key, value in self.config.to_dict().items() if "attn_implementation" not in key}
        return json.dumps([fields, self.has_v1_weights], sort_keys=True, default=str)

    def row(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "variant": self.variant,
            "dtype": self.dtype,
            "backend": self.backend,
            "compile": self.compile,
        }


def make_cases(
    args: argparse.Namespace,
    variants: list[tuple],
    fields: dict[str, Any],
    length: int,
    is_training: bool = False,
    may_pad: bool = False,
) -> list[Case]:
    """
    One case for each variant in each dtype, backend and compile mode; with --v1, v1's own code first, in the settings of
    the first variant that v1 has, or v1's own defaults.

    Args:
        variants: (name, config), or (name, config, backend) for one that is not run in all of `args.backends`.
        fields: of the config, that all variants share.
        may_pad: v1's code may pad the input to a length that it can run on.
    """
    shared = {
        "length": length,
        "batch": args.batch,
        "model": getattr(args, "model", "detector" if is_training else "backbone"),
        "device": args.device,
        "threads": args.threads,
        "tf32": args.tf32,
        "v1": args.v1,
        "is_training": is_training,
    }
    cases = [
        Case(name, config, dtype=dtype, backend=backend, compile=mode, **shared)
        for name, config, *only in variants
        for dtype in dict.fromkeys(args.dtype)
        for backend in only or dict.fromkeys(args.backends)
        for mode in dict.fromkeys(args.compile)
    ]
    if args.v1 is None:
        return cases
    like_v1 = next((config for _, config, *_ in variants if not official.beyond_v1(config)), None)
    if like_v1 is None:
        like_v1 = find_config("v1_compatible", fields)
    multiple = padding_multiple(like_v1)
    if length % multiple and not may_pad:
        raise BenchmarkError(
            f"v1 pads {length} steps to a multiple of {multiple} here, so its times and outputs would be those of another "
            f"length; --length {-(-length // multiple) * multiple} would work."
        )
    official_cases = [
        Case("v1's code", like_v1, dtype=dtype, is_v1=True, **shared) for dtype in dict.fromkeys(args.v1_dtype)
    ]
    return [*official_cases, *cases]


def make_features(case: Case) -> torch.Tensor:
    """Random features (batch, time, n_in), the same for every case of these sizes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(case.batch, case.length, sum(case.config.stream_widths), generator=generator)


def make_labels(case: Case) -> list[dict[str, torch.Tensor]]:
    """Ten segments a sample of random classes, from 8 steps (at most a sixteenth of the length) to an eighth of it."""
    generator = torch.Generator().manual_seed(2)
    shortest, longest = min(8.0, case.length / 16), case.length / 8
    labels = []
    for _ in range(case.batch):
        uniform = torch.rand(10, 2, generator=generator)
        lengths = shortest * (longest / shortest) ** uniform[:, 0]
        starts = uniform[:, 1] * (case.length - 1 - lengths).clamp(min=0)
        classes = torch.randint(0, case.config.num_labels, (10,), generator=generator)
        segments = torch.stack([starts, starts + lengths], dim=1)
        labels.append({"segments": segments.to(case.device), "class_labels": classes.to(case.device)})
    return labels


@torch.no_grad()
def stir(model: nn.Module):
    """
    Changes an initialised model so that each of its parts shows in the outputs: scales of residual branches near 1
    instead of 1e-4, norms and biases off 1 and 0, and attention that prefers some steps to others. Ours and v1's alike.
    """
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "drop_path" in name:
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
        elif parameter.numel() == max(parameter.shape, default=1):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        elif any(f"attn.{part}.weight" in name for part in ("q_proj", "k_proj", "query", "key")):
            parameter.mul_(3)


class Runner:
    """
    A case, built: call it, and what is measured happens once.

    `check` gives what the error columns compare, by name, from the same model.
    """

    def __init__(self, case: Case, features: torch.Tensor | None = None):
        """
        Args:
            features: (batch, time, n_in), instead of random ones of `case.length` steps.

        Raises:
            Exception: whatever torch or transformers has against it; the attention backend is not installed, say.
        """
        self.case, config = case, copy.deepcopy(case.config)
        torch.manual_seed(0)
        theirs = None
        if case.is_v1 or case.has_v1_weights:
            theirs = official.build_model(case.v1, config, case.length)
            stir(theirs)
        if case.is_v1:
            detector = theirs
        else:
            config._attn_implementation = case.backend
            detector = ConvTransformerForTemporalActionLocalization(config)
            if theirs is None:
                stir(detector)
            else:
                state = official.convert_state(theirs.state_dict())
                missing, unexpected = detector.load_state_dict(state, strict=False)
                assert not unexpected, unexpected
                assert set(missing) <= {"criterion.loss_normalizer"}, missing
        dtype = torch.float32 if case.dtype == "autocast" else getattr(torch, case.dtype)
        detector.train(case.is_training).to(case.device)
        for name, module in detector.named_children():
            if name != "point_generator":  # v1's positions stay whole numbers
                module.to(dtype)
        features = (make_features(case) if features is None else features).to(case.device, dtype)
        if case.is_v1:
            # As its preprocessing does: it runs on multiples of stride times window only.
            padded = -features.shape[1] % padding_multiple(config)
            self.mask = torch.arange(features.shape[1] + padded, device=case.device) < features.shape[1]
            self.mask = self.mask.expand(case.batch, 1, -1)
            features = nn.functional.pad(features.transpose(1, 2), (0, padded)).contiguous()
        self.features = features
        self.labels = make_labels(case) if case.is_training else None
        self.detector = detector
        self.function = self._make_function()
        if case.compile != "off":
            self.function = torch.compile(
                self.function, mode=None if case.compile == "default" else case.compile, dynamic=False
            )
        # CUDA graphs keep the memory of their calls in pools of their own.
        has_graphs = torch.device(case.device).type == "cuda" and case.compile in ("reduce-overhead", "max-autotune")
        self.held = harness.reserved_memory(case.device) if has_graphs else None

    def _make_function(self) -> Callable:
        detector = self.detector
        if self.case.is_training and self.case.is_v1:
            return lambda x: official.training_loss(detector, x, self.mask, self.labels)
        if self.case.is_training:
            return lambda x: detector(x, labels=self.labels).loss
        if self.case.is_v1:
            if self.case.model == "backbone":
                return lambda x: detector.backbone(x, self.mask)
            return lambda x: official.run_detector(detector, x, self.mask)
        # The module itself rather than a lambda around it: what users compile.
        return detector.model if self.case.model == "backbone" else detector

    def __call__(self) -> Any:
        if self.case.compile != "off":
            torch.compiler.cudagraph_mark_step_begin()
        mixed = contextlib.nullcontext()
        if self.case.dtype == "autocast":
            mixed = torch.autocast(torch.device(self.case.device).type, torch.bfloat16)
        if not self.case.is_training:
            with torch.no_grad(), mixed:
                return self.function(self.features)
        self.detector.zero_grad(set_to_none=True)
        with mixed:
            loss = self.function(self.features)
        loss.backward()
        return loss.detach()

    def check(self) -> dict[str, list[torch.Tensor]]:
        """
        What the error columns compare, on the CPU in float64: the features of every level (backbone), logits and
        segments (detector), or loss and norm of the gradient without any dropout (training).
        """
        if self.case.is_training:
            # Both count the positives of earlier steps in the moving average that divides the loss.
            if self.case.is_v1:
                self.detector.loss_normalizer = self.case.config.init_loss_norm
            else:
                self.detector.criterion.loss_normalizer.fill_(self.case.config.init_loss_norm)
            with without_dropout(self.detector):
                loss = self()
            norms = [parameter.grad.double().norm().cpu() for parameter in self.detector.parameters()]
            result = {"loss": [loss], "gradient": [torch.stack(norms).norm()]}
        else:
            outputs = self()
            if self.case.model == "backbone" and self.case.is_v1:
                result = {"features": [x.transpose(1, 2) for x in outputs[0]]}
            elif self.case.model == "backbone":
                result = {"features": outputs.feature_maps}
            elif self.case.is_v1:
                result = official.detector_outputs(*outputs[:3])
            else:
                result = {"logits": [outputs.logits], "segments": [outputs.pred_segments]}
        return {name: [tensor.detach().cpu().double() for tensor in tensors] for name, tensors in result.items()}

    def check_exactly(self) -> dict[str, list[torch.Tensor]]:
        """`check` in float32 proper: no TF32."""
        settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
        saved = [setting.allow_tf32 for setting in settings]
        for setting in settings:
            setting.allow_tf32 = False
        try:
            return self.check()
        finally:
            for setting, value in zip(settings, saved, strict=True):
                setting.allow_tf32 = value


@contextlib.contextmanager
def without_dropout(model: nn.Module):
    """All rates of dropout and drop path at 0 for a while, in ours and in v1's modules; the modules stay in training."""
    fields = [
        (module, field)
        for module in model.modules()
        for field in ("rate", "drop_prob", "attention_dropout", "p")
        if isinstance(getattr(module, field, None), float)
    ]
    rates = [getattr(module, field) for module, field in fields]
    for module, field in fields:
        setattr(module, field, 0.0)
    try:
        yield
    finally:
        for (module, field), rate in zip(fields, rates, strict=True):
            setattr(module, field, rate)


def settings_of(cases: list[Case]) -> dict[str, dict]:
    """The fields of each variant's config, for the record."""
    return {case.variant: case.config.to_dict() for case in cases}


# ---------------------------------------------------------------------------------------------------------------------
# Errors, FLOPs, memory


def compare(outputs: dict[str, list[torch.Tensor]], reference: dict[str, list[torch.Tensor]]) -> dict[str, dict]:
    """For each kind of output the largest absolute difference, and that over the reference's largest value."""
    errors = {}
    for name, tensors in reference.items():
        pairs = list(zip(outputs[name], tensors, strict=True))
        for ours, theirs in pairs:
            if ours.shape != theirs.shape:
                raise RuntimeError(f"{name}: shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}")
        absolute = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
        largest = max(theirs.abs().max().item() for theirs in tensors)
        errors[name] = {"absolute": absolute, "relative": absolute / largest if largest else math.inf}
    return errors


class References:
    """What each case is compared with: v1's own output where it has v1's settings and weights, else float32 eager."""

    def __init__(self, cases: list[Case]):
        self.v1_case = next((case for case in cases if case.is_v1), None)
        self.outputs: dict[str, dict | None] = {}

    def find(self, case: Case) -> tuple[str, dict | None]:
        """What it is compared with, in words, and its outputs; `None` where eager attention does not fit in memory."""
        kind = "v1" if self.v1_case is not None and case.settings == self.v1_case.settings else "eager"
        key = f"{kind} {case.settings}"
        if key not in self.outputs:
            changes = {"dtype": "float32", "backend": "eager", "compile": "off", "is_v1": kind == "v1"}
            reference = dataclasses.replace(case, **changes)
            self.outputs[key] = None
            if eager_fits(reference):
                with contextlib.suppress(torch.OutOfMemoryError):
                    self.outputs[key] = Runner(reference).check_exactly()
        return kind, self.outputs[key]


def compare_start(runner: Runner, length: int) -> dict[str, dict] | None:
    """
    `compare` of a backbone with float32 eager attention on the first `length` steps alone, wherever these decide the
    outcome: everywhere if they are all steps, else where neither windows nor convolutions reach beyond them.

    Returns:
        `None` where nothing can be compared: attention is global, or positions depend on the length.
    """
    case, config = runner.case, runner.case.config
    length = min(length, case.length)
    is_whole = length == case.length and not (case.is_v1 and case.length % padding_multiple(config))
    is_local = config.backbone_type == "convTransformer" and min(config.window_sizes) > 1
    is_stretched = (config.use_abs_pe or config.use_learned_pe) and case.length > config.max_len
    if not is_whole and (is_stretched or not is_local):
        return None
    changes = {"length": length, "dtype": "float32", "backend": "eager", "compile": "off", "is_v1": False}
    features = make_features(case)[:, :length]
    reference = Runner(dataclasses.replace(case, **changes), features).check_exactly()["features"]
    outputs = runner.check()["features"]
    steps = [level.shape[1] for level in reference]
    if not is_whole:
        steps = [
            max(0, -(-(length - reach) // stride))
            for reach, stride in zip(reach_of_levels(config), config.strides, strict=True)
        ]
    pairs = [(a[:, :n], b[:, :n]) for a, b, n in zip(outputs, reference, steps, strict=True) if n > 0]
    return compare({"features": [a for a, _ in pairs]}, {"features": [b for _, b in pairs]}) if pairs else None


def reach_of_levels(config: ConvTransformerConfig) -> list[int]:
    """How many features after its own a step of each level depends on, where all attention is in windows."""
    halves = [window // 2 for window in config.window_sizes]
    reach = config.arch[0] * (config.n_embd_ks // 2) + config.arch[1] * (1 + halves[0])
    reaches = [reach]
    for stride, half in zip(config.strides[1:], halves[1:], strict=True):
        finer = stride // config.scale_factor
        reach += finer * (config.scale_factor // 2) + stride * half
        reaches.append(reach)
    return reaches


def eager_fits(case: Case) -> bool:
    """Whether scores of all steps with all steps leave half of the memory free (in training, those of all blocks)."""
    if case.config.backbone_type == "conv":
        return True
    blocks = case.config.num_hidden_layers if case.is_training else 1
    needed = 3 * 4 * blocks * case.batch * case.config.n_head * case.length**2
    if torch.device(case.device).type == "cuda":
        return needed < torch.cuda.mem_get_info(case.device)[0] / 2
    try:
        return needed < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    except (ValueError, OSError):  # macOS does not say
        return case.length <= 4096


def count_flops(case: Case) -> float:
    """
    Floating point operations of matrix products and convolutions that these settings need, whatever code runs them: two
    for a multiplication with its addition, and of attention only what lies inside windows. In training three times as
    many, because a product has two gradients, but for that of the features (and without the loss).
    """
    config = copy.deepcopy(case.config)
    config._attn_implementation = "eager"  # plain products, which the counter knows on every device
    config.use_rope = False  # no product, and torch.autocast in it knows no meta device
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        detector = ConvTransformerForTemporalActionLocalization(config)
        features = torch.empty(case.batch, case.length, sum(config.stream_widths))
        (detector.model if case.model == "backbone" else detector)(features)
    flops = float(counter.get_total_flops())
    if config.backbone_type == "convTransformer":
        lengths = [-(-case.length // stride) for stride in config.strides]
        blocks = [config.arch[1]] + [1] * config.arch[2]
        unseen = sum(
            count * (length**2 - count_pairs(length, window, config.is_causal))
            for count, length, window in zip(blocks, lengths, config.window_sizes, strict=True)
        )
        flops -= 2 * 2 * case.batch * config.n_embd * unseen  # two products for each pair of steps
    if not case.is_training:
        return flops
    # torch counts the gradient of a depthwise convolution as that of a dense one: not asked.
    if config.projected_stream_widths is not None:
        first = sum(a * b for a, b in zip(config.stream_widths, config.projected_stream_widths, strict=True))
    else:
        first = sum(config.stream_widths) * config.n_embd * config.n_embd_ks if config.arch[0] else 0
    return 3 * flops - 2 * case.batch * case.length * first


def count_pairs(length: int, window: int, is_causal: bool) -> int:
    """Pairs of query and key that see one another."""
    reach = min(window // 2, length - 1) if window > 1 else length - 1
    one_side = reach * length - reach * (reach + 1) // 2
    return length + one_side * (1 if is_causal else 2)


class ByteCounter(TorchDispatchMode):
    """Counts what the operators of a call read and write, each tensor once an operator; views move nothing."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        aliases = [result.alias_info for result in function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and "empty" not in function.__name__:
            tensors = [x for x in tree_leaves((args, kwargs, output)) if isinstance(x, torch.Tensor)]
            # An expanded tensor is no larger than what it is expanded from.
            sizes = [min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors]
            self.total += sum(sizes)
        return output


def count_bytes(runner: Runner) -> int | None:
    """What uncompiled operators read and write in one call: `ByteCounter`'s total. `None` for a compiled one."""
    if runner.case.compile != "off":
        return None
    with ByteCounter() as counter:
        runner()
    return counter.total


def warm_up(runner: Runner):
    """What the first calls in a process do once: loading libraries, compiling."""
    case = runner.case
    if case.compile != "off":
        for _ in range(3):  # CUDA graphs are recorded in the second call
            runner()
        return
    tiny = padding_multiple(case.config) * -(-32 // padding_multiple(case.config))
    Runner(dataclasses.replace(case, length=min(tiny, case.length)))()


def peak_of(runner: Runner) -> dict[str, float] | None:
    """Peak memory of one call, see `harness.peak_memory`; of CUDA graphs what their pools hold."""
    if runner.held is None:
        return harness.peak_memory(runner, runner.case.device)
    total = harness.reserved_memory(runner.case.device)
    return {"peak": total - runner.held, "total": total}


def memory_of(case: Case) -> dict[str, float] | None:
    """`peak_of` a case; for a process of its own."""
    prepare_torch(case.threads, case.tf32)
    runner = Runner(case)
    warm_up(runner)
    return peak_of(runner)


# ---------------------------------------------------------------------------------------------------------------------
# A run


COLUMNS = [
    Column("variant", "variant"),
    Column("dtype", "dtype"),
    Column("attention", "backend"),
    Column("compile", "compile"),
    Column("median ms", "median_ms", ".1f"),
    Column("min", "min_ms", ".1f"),
    Column("max", "max_ms", ".1f"),
    Column("time / first", "ratio", ".2f"),
    Column("peak MB", "peak_mb", ".0f"),
    Column("% of first", "memory_share", ".0%"),
    Column("GFLOP", "gflop", ".1f"),
    Column("% of matmul rate", "matmul_share", ".0%"),
    Column("GB moved", "gbyte", ".1f"),
    Column("% of copy rate", "copy_share", ".0%"),
]
ERROR_COLUMNS = [
    Column("max error", "error", ".1e"),
    Column("relative", "relative_error", ".1e"),
    Column("against", "against"),
]
LAST_COLUMNS = [Column("compile s", "compile_s", ".1f")]


def columns(error_columns: list[Column], has_v1: bool) -> list[Column]:
    names = {"time / first": "time / v1", "% of first": "% of v1"} if has_v1 else {}
    return [
        column._replace(head=names.get(column.head, column.head))
        for column in [*COLUMNS, *error_columns, *LAST_COLUMNS]
    ]


def measure(cases: list[Case], args: argparse.Namespace) -> tuple[list[dict], dict[str, float]]:
    """
    A row for each case, and the machine's limits. Each case is built, called (and compiled) and checked first; those
    that can run are then timed in turn.
    """
    limits = measure_used_limits(cases, args)
    references = References(cases)
    rows, runners = [], {}
    is_late = False
    for case in cases:
        row = case.row()
        rows.append(row)
        try:
            if not is_late:
                runners[case.name] = _prepare(case, row, references, args.memory)
        except Exception as error:
            row["problem"] = describe_problem(error)
        except harness.OutOfTime:
            is_late = True
        if is_late:
            row["problem"] = "left out: no time left"
    timings = harness.time_alternating(runners, args.repeats, 1, args.device) if runners else {}
    first = next((row for row in rows if row["name"] in timings), {})
    for case, row in zip(cases, rows, strict=True):
        if row["name"] not in timings:
            continue
        row.update(timings[row["name"]]._asdict())
        add_work(row, case, limits)
        if isinstance(row.get("peak_mb"), float) and isinstance(first.get("peak_mb"), float):
            row["memory_share"] = row["peak_mb"] / first["peak_mb"]
    return rows, limits


def measure_used_limits(cases: list[Case], args: argparse.Namespace) -> dict[str, float]:
    """`harness.measure_limits` of the dtypes that these cases compute in; nothing under --no-limits."""
    used = {computing_dtype(case) for case in cases}
    return harness.measure_limits([dtype for dtype in DTYPES if dtype in used], args.device) if args.limits else {}


def computing_dtype(case: Case) -> str:
    return "bfloat16" if case.dtype == "autocast" else case.dtype


def add_work(row: dict, case: Case, limits: dict[str, float]):
    """The FLOPs of a timed row, and its shares of what the machine can do: of matrix products and of copies."""
    row["gflop"] = 1e-9 * count_flops(case)
    if rate := limits.get(f"{computing_dtype(case)} FLOP/s"):
        row["matmul_share"] = 1e9 * row["gflop"] / (1e-3 * row["median_ms"] * rate)
    if row.get("gbyte") is not None and (rate := limits.get("copy bytes/s")):
        row["copy_share"] = 1e9 * row["gbyte"] / (1e-3 * row["median_ms"] * rate)


def _prepare(case: Case, row: dict, references: References, with_memory: bool) -> Runner:
    """Builds a case, and fills in what is known of it before it is timed."""
    is_gpu = torch.device(case.device).type == "cuda"
    runner = Runner(case)
    start = time.perf_counter()
    runner()
    harness.synchronise(case.device)
    if case.compile != "off":
        row["compile_s"] = time.perf_counter() - start
        warm_up(runner)
    if with_memory:
        memory = peak_of(runner) if is_gpu else harness.in_child(memory_of, case)
        row["peak_mb"] = harness.NOT_AVAILABLE if memory is None else memory["peak"]
    if (moved := count_bytes(runner)) is not None:
        row["gbyte"] = 1e-9 * moved
    row["against"], reference = references.find(case)
    if reference is None:
        row["against"] = "not checked"
    elif case.is_v1 and case.dtype == "float32":
        row["against"] = "is the reference"
        outputs = reference
    else:
        outputs = runner.check()
        row.update(error_fields(compare(outputs, reference)))
    if case.is_training and reference is not None:
        row["loss"] = outputs["loss"][0].item()
    return runner


def error_fields(errors: dict[str, dict]) -> dict[str, Any]:
    """What a row says of its errors: all of them, and the largest."""
    return {
        "errors": errors,
        "error": max(error["absolute"] for error in errors.values()),
        "relative_error": max(error["relative"] for error in errors.values()),
    }


def describe_problem(error: Exception) -> str:
    if harness.is_out_of_memory(error):
        return "out of memory"
    what = harness.NOT_AVAILABLE if isinstance(error, ImportError | ValueError | BenchmarkError) else "failed"
    return f"{what}: {first_sentence(error)}"
