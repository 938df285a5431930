"""ConvTransformer: the temporal action localization family of ActionFormer, for transformers.

    features (batch, time, n_in) - embedding convs - stem blocks - branch blocks (stride 2 each)
                                                         |              |   |   |
                                                         +-- pyramid: (batch, time / stride, channels) a level
                                                                | neck | classification and regression heads
                                                                +-- points: logits, [start, end] on the feature grid

Read from top to bottom: masked convolution, norms, positions, MLPs, attention, block, model, neck, heads, detector, and
moment retrieval, where the pyramid attends to the words of a query.
All tensors are `(batch, time, channels)`. `padding` is `(batch, time, 1)` bool, True = padded, or None = no padding.

ActionFormer's release ("v1": Zhang et al., "ActionFormer: Localizing Moments of Actions with Transformers", ECCV 2022,
https://arxiv.org/abs/2202.07925) is one setting of these classes; what it shares with the default is written once.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import distributed, nn
from torch.nn import functional as F
from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel, AutoModelForTextEncoding
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_convtransformer import (
    CHUNK,
    attend,
    check_attention_backend,
    eager_attention_forward,
    make_attention_mask,
    make_text_mask,
    runs_in_chunks,
)
from .configuration_convtransformer import ConvTransformerConfig
from .loss_convtransformer import ConvTransformerLoss, KeepsDtype
from .model_card_convtransformer import ModelCardMixin


@dataclass
class ConvTransformerModelOutput(ModelOutput):
    """
    Output of `ConvTransformerModel`.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, time / coarsest stride, n_embd)`):
            The coarsest level of the pyramid.
        feature_maps (`tuple(torch.FloatTensor)`, one `(batch, ceil(time / stride), n_embd)` for each level):
            The pyramid, finest level first.
        feature_masks (`tuple(torch.LongTensor)`, one `(batch, ceil(time / stride))` for each level):
            1 where a step is valid, 0 where it is padded.
        hidden_states (`tuple(torch.FloatTensor)`, with `output_hidden_states=True`):
            The embedding, then the output of every block, each `(batch, time / stride, n_embd)`.
        attentions (`tuple(torch.FloatTensor)`, with `output_attentions=True` and `attn_implementation="eager"`):
            For every block, `(batch, n_head, time / stride, time / stride)`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    feature_maps: tuple[torch.FloatTensor, ...] | None = None
    feature_masks: tuple[torch.LongTensor, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class ConvTransformerBackboneOutput(BackboneOutput):
    """
    Output of `ConvTransformerBackbone`.

    Args:
        feature_maps (`tuple(torch.FloatTensor)`, one `(batch, ceil(time / stride), n_embd)` for each of `out_features`):
            The chosen levels, finest first.
        hidden_states, attentions: see `ConvTransformerModelOutput`.
        feature_masks (`tuple(torch.LongTensor)`, one `(batch, ceil(time / stride))` for each of `out_features`):
            1 where a step is valid, 0 where it is padded.
    """

    feature_masks: tuple[torch.LongTensor, ...] | None = None


@dataclass
class ConvTransformerTemporalActionLocalizationOutput(ModelOutput):
    """
    Output of `ConvTransformerForTemporalActionLocalization`. Points are the steps of all levels of the pyramid, finest
    level first, each level in order of time.

    Args:
        loss (`torch.FloatTensor` of shape `()`, with `labels`):
            `cls_loss + loss_weight * reg_loss`, float32.
        loss_dict (`dict[str, torch.Tensor]`, with `labels`):
            `cls_loss` (focal), `reg_loss` (distance IoU), `num_positives` and `num_unassigned_segments` (counts).
        logits (`torch.FloatTensor` of shape `(batch, points, num_labels)`):
            Classification logits; a sigmoid, not a softmax, makes them scores.
        pred_segments (`torch.FloatTensor` of shape `(batch, points, 2)`):
            Start and end of the segment that each point predicts, float32, on the feature grid.
        point_mask (`torch.LongTensor` of shape `(batch, points)`):
            1 where a point is valid, 0 where it is padded.
        point_levels (`torch.LongTensor` of shape `(batch, points)`):
            The level that a point belongs to; 0 is the finest.
        hidden_states, attentions: see `ConvTransformerModelOutput`.
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict | None = None
    logits: torch.FloatTensor | None = None
    pred_segments: torch.FloatTensor | None = None
    point_mask: torch.LongTensor | None = None
    point_levels: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class ConvTransformerMomentRetrievalOutput(ModelOutput):
    """
    Output of `ConvTransformerForMomentRetrieval`. Points are those of `ConvTransformerTemporalActionLocalizationOutput`.

    Args:
        loss (`torch.FloatTensor` of shape `()`, with `labels`):
            `cls_loss + loss_weight * reg_loss`, and `contrastive_loss` where there is a `projection_dim`; float32.
        loss_dict (`dict[str, torch.Tensor]`, with `labels`):
            `cls_loss` (focal), `reg_loss` (distance IoU), `contrastive_loss`, `num_positives` and
            `num_unassigned_segments` (counts).
        logits (`torch.FloatTensor` of shape `(batch, queries, points)`):
            Whether a point answers a query; a sigmoid makes them scores.
        pred_segments (`torch.FloatTensor` of shape `(batch, queries, points, 2)`):
            Start and end of the segment that each point predicts, float32, on the feature grid.
        point_mask (`torch.LongTensor` of shape `(batch, points)`):
            1 where a point is valid, 0 where it is padded.
        point_levels (`torch.LongTensor` of shape `(batch, points)`):
            The level that a point belongs to; 0 is the finest.
        query_mask (`torch.LongTensor` of shape `(batch, queries)`):
            1 where there is a query, 0 where a recording has fewer than others of the batch.
        hidden_states, attentions: of the recordings, see `ConvTransformerModelOutput`.
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict | None = None
    logits: torch.FloatTensor | None = None
    pred_segments: torch.FloatTensor | None = None
    point_mask: torch.LongTensor | None = None
    point_levels: torch.LongTensor | None = None
    query_mask: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class ConvTransformerSegmentFeaturesOutput(ModelOutput):
    """
    What is kept of a recording to search many, from `ConvTransformerForMomentRetrieval.get_segment_features`.

    Args:
        embeds (`torch.FloatTensor` of shape `(batch, points, projection_dim)`):
            Of every point, of length 1.
        point_mask, point_levels (`torch.LongTensor` of shape `(batch, points)`):
            As in `ConvTransformerMomentRetrievalOutput`.
    """

    embeds: torch.FloatTensor | None = None
    point_mask: torch.LongTensor | None = None
    point_levels: torch.LongTensor | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Smallest parts


def zero_padding(x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """Zeros at padded steps, whatever they held (NaN too, which a product with 0 would keep)."""
    return x if padding is None else x.masked_fill(padding, 0)


def subsample(mask: torch.Tensor | None, stride: int) -> torch.Tensor | None:
    """The mask of the next level: every stride-th step, so that n valid steps become ceil(n / stride)."""
    return mask if mask is None or stride == 1 else mask[:, ::stride]


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    """A weight that torchao stores in 8 or 4 bits, in floating point; any other as it is."""
    if not hasattr(weight, "qdata"):
        return weight
    if not is_packed(weight):
        return weight.dequantize()
    # Two values a byte, the earlier one in the lower half; scale and zero point are (groups of a row, rows).
    low, high = weight.qdata << 4 >> 4, weight.qdata >> 4
    scale, zero_point = (x.t()[..., None] for x in (weight.scale, weight.zero_point))
    values = torch.stack((low, high), dim=-1).reshape(*scale.shape[:2], -1)
    return torch.addcmul(zero_point, values.to(scale.dtype), scale).reshape(weight.shape)


def is_packed(weight: torch.Tensor) -> bool:
    """Whether torchao stores two values of the weight in a byte (`Int4Tensor`)."""
    return hasattr(weight, "qdata") and weight.qdata.numel() < weight.numel()


class PackedLinear(nn.Linear):
    """What `from_pretrained` makes of a linear layer with such a weight, for which torchao has kernels on some GPUs only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, dequantized(self.weight), self.bias)


def compute_with_packed_weights(model: nn.Module):
    """Lets the linear layers of `model` whose weights are packed compute with them wherever they are."""
    for module in model.modules():
        if type(module) is nn.Linear and is_packed(module.weight):
            module.__class__ = PackedLinear


class MaskedConv1d(nn.Conv1d):
    """
    Convolution over time whose padded steps are zero in the output, and in the input too if `mask_conv_inputs`. The
    output has `ceil(time / stride)` steps, step i centred on input step `i * stride` (causal: ending there).

    `bias_init` is what the bias starts from: a number, or a list with one for each channel.
    """

    def __init__(self, config, in_channels, out_channels, kernel_size, stride=1, groups=1, bias=True, bias_init=0.0):
        reach = 0 if config.is_causal else kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, stride, reach, groups=groups, bias=bias)
        self.look_back = kernel_size - 1 if config.is_causal else 0
        self.mask_input = config.mask_conv_inputs
        self.bias_init = bias_init

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        if self.mask_input:
            x = zero_padding(x, padding)
        if self.look_back:
            x = F.pad(x, (0, 0, self.look_back, 0))
        is_plain = self.groups == self.stride[0] == 1
        if is_plain and getattr(self.weight, "act_quant_kwargs", None) is not None:
            x = self._sum_rounded_taps(x)
        elif is_plain and torch.is_grad_enabled() and x.device.type == "cpu":
            x = self._sum_taps(x, self.kernel())
        else:
            x = self._convolve(x, self.kernel())
        return zero_padding(x, subsample(padding, self.stride[0]))

    def kernel(self) -> torch.Tensor:
        """The weight to compute with."""
        return dequantized(self.weight)

    def _convolve(self, x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        # (batch, time, channels) in memory is a two-dimensional convolution's channels-last layout for images of
        # height 1: nothing is copied, whereas a one-dimensional convolution turns its input and output around.
        image = x.transpose(1, 2).unsqueeze(2)
        image = F.conv2d(
            image, kernel.unsqueeze(2), self.bias, (1, self.stride[0]), (0, self.padding[0]), groups=self.groups
        )
        return image.squeeze(2).transpose(1, 2)

    def _sum_taps(self, x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        """The same as a sum of matrix products, whose gradients take half the time of a convolution's on the CPU."""
        if self.padding[0]:
            x = F.pad(x, (0, 0, self.padding[0], self.padding[0]))
        batch, steps = x.shape[0], x.shape[1] - self.kernel_size[0] + 1
        taps = [tap.expand(batch, -1, -1) for tap in kernel.permute(2, 1, 0).contiguous()]
        output = torch.bmm(x[:, :steps], taps[0])
        for place, tap in enumerate(taps[1:], start=1):  # in place, which autocast does not look after
            output.baddbmm_(x[:, place : place + steps].to(output.dtype), tap.to(output.dtype))
        return output if self.bias is None else output + self.bias

    def _sum_rounded_taps(self, x: torch.Tensor) -> torch.Tensor:
        """The same as a sum of linear layers, for which torchao rounds inputs to 8 bits and multiplies integers."""
        weight, x = self.weight, F.pad(x, (0, 0, self.padding[0], self.padding[0]))
        steps = x.shape[1] - self.kernel_size[0] + 1
        output = 0.0 if self.bias is None else self.bias
        for place in range(self.kernel_size[0]):
            values = weight.qdata[..., place].contiguous()
            scale = weight.scale.expand(-1, -1, self.kernel_size[0])[..., place]
            tap = type(weight)(
                values, scale, weight.block_size[:2], weight.dtype, act_quant_kwargs=weight.act_quant_kwargs
            )
            output = output + F.linear(x[:, place : place + steps], tap)
        return output


class MaskedMaxPool1d(nn.Module):
    """
    The skip path of a branch block: max pooling of kernel `stride + 1`, padded steps zero in the output. What lies
    beyond the ends of the array never wins; padded steps neither, if `mask_conv_inputs` (in v1 they count as zeros).
    """

    def __init__(self, config, stride):
        super().__init__()
        self.stride = stride
        self.look_back = stride if config.is_causal else 0
        self.reach = 0 if config.is_causal else stride // 2
        self.mask_input = config.mask_conv_inputs

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        if self.mask_input and padding is not None:
            x = x.masked_fill(padding, -torch.inf)
        if self.look_back:
            x = F.pad(x, (0, 0, self.look_back, 0), value=-torch.inf)
        # An image of height 1 in channels-last layout, as in MaskedConv1d. (The one-dimensional kernel would also make
        # torch.compile specialise on the length.)
        image = x.transpose(1, 2).unsqueeze(2)
        image = F.max_pool2d(image, (1, self.stride + 1), (1, self.stride), (0, self.reach))
        return zero_padding(image.squeeze(2).transpose(1, 2), subsample(padding, self.stride))


class LayerNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        return super().forward(x)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        # Under autocast the weight is float32 and x may be half precision; fused kernels want one dtype.
        x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        # PyTorch's own is one kernel on a GPU, but on the CPU four, with two temporaries of the size of x.
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        return (x * torch.rsqrt(mean_square + self.eps)).mul_(self.weight)


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs, because each used the whole sum."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return SumOverProcesses.apply(gradient)


def sum_over_processes(x: torch.Tensor) -> torch.Tensor:
    """Of `torch.distributed`, if it runs; differentiable. All processes have to call it."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return SumOverProcesses.apply(x)
    return x


class BatchNorm(nn.BatchNorm1d):
    """
    Batch norm whose statistics count valid steps only, of the batches of all processes together, in float32 at least.
    (Processes of tensor parallelism hold one batch: counting it once for each changes neither mean nor variance.)
    """

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, var = self.running_mean.to(dtype), self.running_var.to(dtype)
        if self.training:
            filled = zero_padding(x.to(dtype), padding)
            valid = x.new_ones(*x.shape[:2], 1) if padding is None else ~padding
            sums = sum_over_processes(torch.cat((filled.sum((0, 1)), valid.to(dtype).sum()[None])))
            count = sums[-1].clamp(min=1)
            mean = sums[:-1] / count
            var = sum_over_processes(zero_padding((filled - mean).square(), padding).sum((0, 1))) / count
            with torch.no_grad():
                unbiased = var * count / (count - 1).clamp(min=1)
                # A step that overflows (mixed precision) is skipped by the scaler: it must not stay in the statistics.
                share = self.momentum * (mean.isfinite() & unbiased.isfinite()).all()
                for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
                    running.lerp_(batch.nan_to_num(0, 0, 0).to(running.dtype), share.to(running.dtype))
                self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        return torch.addcmul(self.bias, x - mean, scale).to(torch.result_type(x, self.weight))


class Identity(nn.Identity):
    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        return x


NORMS = {"layer": LayerNorm, "rms": RMSNorm, "batch": BatchNorm}


def make_norm(config, width: int) -> nn.Module:
    kind = "rms" if config.use_rms_norm else "batch" if config.use_batch_norm else "layer"
    return NORMS[kind](width, eps=config.norm_eps)


class AffineDropPath(nn.Module):
    """
    Drops the whole residual branch of a sample at random in training (stochastic depth), behind a learned scale for each
    channel that starts near zero (LayerScale, https://arxiv.org/abs/2103.17239) and stays at inference.
    """

    def __init__(self, width: int, rate: float):
        super().__init__()
        self.rate = rate
        self.scale = nn.Parameter(torch.full((width,), 1e-4))

    def forward(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The skip path `residual` plus the branch `x`, both (batch, time, channels)."""
        scale = self.scale
        if self.training:
            keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - self.rate)
            scale = scale * keep / (1 - self.rate)
        return torch.addcmul(residual, x, scale)


class Add(nn.Module):
    """A residual sum without drop path."""

    def forward(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return residual + x


def make_drop_path(config, width: int) -> nn.Module:
    return AffineDropPath(width, config.path_pdrop) if config.path_pdrop > 0 else Add()


# ---------------------------------------------------------------------------------------------------------------------
# Positions


class ConvTransformerRotaryEmbedding(KeepsDtype):
    """
    Rotary positions (RoFormer, https://arxiv.org/abs/2104.09864), counted in steps of each level: step 3 of any level has
    the same rotation, as every level has the same window and shares the heads.

    Types "dynamic" (NTK) and "longrope" have other frequencies for recordings longer than `max_len`. Here they follow
    from each sample's own length, so that neither padding nor an earlier call changes them; and at every level from that
    of the finest, because r times as many features are r times as many steps at every level.

    `head_dim` is the width of an attention head, by default that of the backbone's.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: ConvTransformerConfig, head_dim: int | None = None, device=None):
        super().__init__()
        # transformers looks for an attention head's width in `head_dim`, which here is the width of the detection heads.
        width = head_dim or config.n_embd // config.n_head
        self.config = type(config).from_dict({**config.to_dict(), "head_dim": width})
        self.rope_type = self.config.rope_parameters["rope_type"]
        rope_init = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init(self.config, device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, device=None, seq_len=None, **kwargs) -> tuple[torch.Tensor, float]:
        channels = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
        return 1.0 / (config.rope_parameters["rope_theta"] ** (channels / config.head_dim)), 1.0

    def slowed(self, lengths: torch.Tensor) -> torch.Tensor | float:
        """By how much frequencies are divided for recordings of so many features: (batch, 1, channels of a head / 2)."""
        parameters, lengths = self.config.rope_parameters, lengths[:, None, None].float()
        if self.rope_type == "dynamic":
            growth = parameters["factor"] * (lengths / self.config.max_len).clamp(min=1) - (parameters["factor"] - 1)
            # theta grows by growth ** (width / (width - 2)): the first pair of channels stays, the last slows the most.
            width = self.config.head_dim
            return growth ** (torch.arange(0, width, 2, device=lengths.device) / (width - 2))
        if self.rope_type == "longrope":
            short, long = (lengths.new_tensor(parameters[name]) for name in ("short_factor", "long_factor"))
            is_long = lengths > parameters["original_max_position_embeddings"]
            return torch.where(is_long, long / short, 1.0)
        return 1.0

    @torch.no_grad()
    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: a tensor with the device and dtype of the results.
            position_ids: (1, time).
            lengths: (batch,), the number of features of each sample; `None`: as many as positions.

        Returns:
            cosine and sine, each (1, time, channels of a head), or (batch, ...) where frequencies go by `lengths`; angles
            are float32.
        """
        if lengths is None:
            lengths = torch.full((1,), position_ids.shape[-1], device=x.device)
        device_type = x.device.type if x.device.type != "mps" else "cpu"
        with maybe_autocast(device_type=device_type, enabled=False):
            frequencies = self.inv_freq.float().to(x.device) / self.slowed(lengths)
            angles = position_ids[..., None].float() * frequencies
            angles = torch.cat((angles, angles), dim=-1)
            cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Turns (batch, heads, time, channels) by the angles whose cosines and sines are (1 or batch, time, channels): channels
    i and i + half of a head are one pair of coordinates.
    """
    half = x.shape[-1] // 2
    sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)  # small: one for all heads
    return (x * cos[:, None]).addcmul_(x.roll(half, dims=-1), sin[:, None])


def sinusoidal_positions(length: int, width: int, device: torch.device) -> torch.Tensor:
    """The table of "Attention is all you need" over sqrt(width), as in v1: (length, width), float32."""
    # float64 because float32 angles of some thousand radians are off by 1e-4; Apple's GPUs have none.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    channels = torch.arange(width, device=device)
    frequencies = 10000.0 ** (-2.0 * (channels // 2).to(dtype) / width)
    angles = torch.arange(length, device=device, dtype=dtype)[:, None] * frequencies
    table = torch.where(channels % 2 == 0, angles.sin(), angles.cos())
    return (table / math.sqrt(width)).float()


class PositionTable(nn.Module):
    """
    Positions that are added once after the embedding: sinusoids, or a learned table. A recording longer than the table
    stretches it linearly over its length: its valid length, or the padded one in v1 (`mask_conv_inputs=False`).
    """

    def __init__(self, config):
        super().__init__()
        self.length, self.width = config.max_len, config.n_embd
        self.by_valid_length = config.mask_conv_inputs
        self.table = nn.Parameter(torch.zeros(self.length, self.width)) if config.use_learned_pe else None

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        steps = x.shape[1]
        # Under torch.export the length is a symbol, and one graph serves all: stretching leaves short recordings alone.
        stretches = isinstance(steps, torch.SymInt) or steps > self.length
        rows = self.length if stretches else steps
        table = sinusoidal_positions(rows, self.width, x.device) if self.table is None else self.table
        if not stretches:
            positions = table[None, :steps]
        else:
            count = torch.full((1, 1), steps, device=x.device)
            if padding is not None and self.by_valid_length:
                count = (~padding).sum(dim=1)
            # As F.interpolate does (align_corners=False), but with a length of its own for each sample.
            place = (torch.arange(steps, device=x.device) + 0.5) * (self.length / count).clamp(max=1) - 0.5
            place = place.clamp(0, self.length - 1)
            below = place.floor().long()
            above = (below + 1).clamp(max=self.length - 1)
            positions = torch.lerp(table[below], table[above], (place - below)[..., None].to(table.dtype))
        return x + zero_padding(positions.to(x.dtype).expand_as(x), padding)


# ---------------------------------------------------------------------------------------------------------------------
# MLPs


class GeluMLP(nn.Module):
    def __init__(self, config, width: int):
        super().__init__()
        self.up_proj = nn.Linear(width, config.mlp_width(width))
        self.down_proj = nn.Linear(config.mlp_width(width), width)
        self.dropout = nn.Dropout(config.proj_pdrop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(F.gelu(self.up_proj(x)))
        return self.dropout(self.down_proj(x))


class SwigluMLP(nn.Module):
    """Gated MLP (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, config.mlp_width(width))
        self.up_proj = nn.Linear(width, config.mlp_width(width))
        self.down_proj = nn.Linear(config.mlp_width(width), width)
        self.dropout = nn.Dropout(config.proj_pdrop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(F.silu(self.gate_proj(x)).mul_(self.up_proj(x)))
        return self.dropout(self.down_proj(x))


MLPS = {True: SwigluMLP, False: GeluMLP}  # by use_swiglu


# ---------------------------------------------------------------------------------------------------------------------
# Attention and blocks


class ConvTransformerAttention(nn.Module):
    r"""
    Multi-head attention over time whose queries, keys and values each pass a depthwise convolution (which brings local
    order, and the stride of a branch block) and a norm of their own before the projection. With `is_cross`, keys and
    values are words, which pass no convolution and have no rotary positions: their encoder has given them an order.

        n_head 4, n_kv_head 4 (MHA)     n_kv_head 2 (GQA)     n_kv_head 1 (MQA)
        q q q q                         q q q q               q q q q
        | | | |                         \ /  \ /              \  | | /
        k k k k                          k    k                   k
    """

    def __init__(
        self,
        config: ConvTransformerConfig,
        level: int,
        stride: int,
        layer_idx: int,
        width: int | None = None,
        is_cross: bool = False,
    ):
        super().__init__()
        width = config.n_embd if width is None else width
        self.config = config
        self.layer_idx = layer_idx
        self.is_cross = is_cross
        self.is_causal = config.is_causal and not is_cross
        self.window = -1 if is_cross else config.window_sizes[level]
        self.head_dim = width // config.n_head
        self.scaling = self.head_dim**-0.5
        kv_heads = config.n_kv_head or config.n_head
        self.num_key_value_groups = config.n_head // kv_heads
        self.attention_dropout = config.attn_pdrop

        kernel_size = stride + 1 if stride > 1 else 3
        for name in ("query", "key", "value"):
            conv = Identity()
            if not is_cross or name == "query":
                conv = MaskedConv1d(config, width, width, kernel_size, stride, groups=width, bias=False)
            self.add_module(f"{name}_conv", conv)
            self.add_module(f"{name}_norm", make_norm(config, width))
        self.q_proj = nn.Linear(width, config.n_head * self.head_dim)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim)
        self.o_proj = nn.Linear(config.n_head * self.head_dim, width)
        self.dropout = nn.Dropout(config.proj_pdrop)
        self.relative_bias = None
        if config.relative_bias_widths[level] and not is_cross:
            self.relative_bias = nn.Parameter(torch.zeros(config.n_head, config.relative_bias_widths[level]))

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding: torch.Tensor | None,
        out_padding: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        text: torch.Tensor | None = None,
        text_padding: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self._heads(self.q_proj(self.query_norm(self.query_conv(hidden_states, padding), out_padding)), rotary)
        source, key_padding = hidden_states, out_padding
        if self.is_cross:
            source, padding, key_padding = text, text_padding, text_padding
            query = repeat_for_queries(query, text)
            out_padding = repeat_for_queries(out_padding, text)
        key = self._heads(self.k_proj(self.key_norm(self.key_conv(source, padding), key_padding)), rotary)
        value = self._heads(self.v_proj(self.value_norm(self.value_conv(source, padding), key_padding)))

        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            attention_interface,
            query,
            key,
            value,
            attention_mask,
            relative_bias=self.relative_bias,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        del query, key, value  # of a long recording, most of what is held
        # Windows return a slice. A linear layer would copy it anyway; one spread over devices fails.
        output = self.dropout(self.o_proj(output.reshape(*output.shape[:2], -1).contiguous()))
        return zero_padding(output, out_padding), weights

    def _heads(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """(batch, time, channels) to (batch, heads, time, channels of a head), turned by the angles of `rotary`."""
        x = x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        # Under autocast cosines are float32 and projections are not; kernels want all of them in one dtype.
        return x if rotary is None else rotate(x, *rotary).to(x.dtype)


def repeat_for_queries(x: torch.Tensor | None, text: torch.Tensor) -> torch.Tensor | None:
    """(recordings, ...) once for each query of a recording; `text` is (recordings * queries, ...)."""
    if x is None or x.shape[0] == text.shape[0]:
        return x
    # (of a single recording nothing is copied)
    return x[:, None].expand(-1, text.shape[0] // x.shape[0], *(-1,) * (x.dim() - 1)).flatten(0, 1)


class ConvTransformerBlock(GradientCheckpointingLayer):
    """
    Pre-norm transformer block; in a branch, attention and skip path shorten the sequence by `stride`; with `is_cross`, time
    attends to the words of a query. `width` is the config's `n_embd`, if it is not given.
    """

    def __init__(
        self,
        config: ConvTransformerConfig,
        level: int,
        stride: int,
        layer_idx: int,
        width: int | None = None,
        is_cross: bool = False,
    ):
        super().__init__()
        width = config.n_embd if width is None else width
        self.ln1 = make_norm(config, width)
        self.attn = ConvTransformerAttention(config, level, stride, layer_idx, width, is_cross)
        self.pool_skip = MaskedMaxPool1d(config, stride) if stride > 1 else Identity()
        self.drop_path_attn = make_drop_path(config, width)
        self.ln2 = make_norm(config, width)
        self.mlp = MLPS[config.use_swiglu](config, width)
        self.drop_path_mlp = make_drop_path(config, width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding: torch.Tensor | None = None,
        out_padding: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        text: torch.Tensor | None = None,
        text_padding: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: (batch, time, width).
            padding, out_padding: (batch, time, 1) and (batch, ceil(time / stride), 1) bool, True = padded.
            attention_mask: of the level that this block writes, from `make_attention_mask`; of the words, from
                `make_text_mask`.
            rotary: cosine and sine for the steps of that level.
            text, text_padding: with `is_cross`, (batch * queries, words, width) and (batch * queries, words, 1).

        Returns:
            (batch, ceil(time / stride), width), zero at padded steps; (batch * queries, time, width) with `is_cross`.
        """
        attended, _ = self.attn(
            self.ln1(hidden_states, padding),
            padding,
            out_padding,
            attention_mask,
            rotary,
            text,
            text_padding,
            **kwargs,
        )
        skipped = zero_padding(self.pool_skip(hidden_states, padding), out_padding)
        if text is not None:
            skipped = repeat_for_queries(skipped, text)
            out_padding = self.padding_of_queries(out_padding, skipped, text, text_padding)
        hidden_states = self.drop_path_attn(skipped, attended)
        update = zero_padding(self._run_mlp(hidden_states, out_padding), out_padding)
        return self.drop_path_mlp(hidden_states, update)

    def padding_of_queries(
        self, padding: torch.Tensor | None, x: torch.Tensor, text: torch.Tensor, text_padding: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The padding of a recording for each of its queries, (recordings * queries, time, 1); in training, a query without a
        word is padding throughout, for batch norm counts what is valid."""
        padding = repeat_for_queries(padding, text)
        if text_padding is None or not self.training:
            return padding
        is_none = text_padding.all(dim=1, keepdim=True).expand(-1, x.shape[1], -1)
        return is_none if padding is None else padding | is_none

    def _run_mlp(self, x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        if not runs_in_chunks(self, x.shape[1]):
            return self.mlp(self.ln2(x, padding))
        update = torch.empty_like(x)
        paddings = repeat(None) if padding is None else padding.split(CHUNK, dim=1)
        for into, piece, one in zip(update.split(CHUNK, dim=1), x.split(CHUNK, dim=1), paddings, strict=False):
            into.copy_(self.mlp(self.ln2(piece, one)))
        return update


class ConvBlock(GradientCheckpointingLayer):
    """Residual block of two convolutions: v1's backbone without attention (`backbone_type="conv"`)."""

    def __init__(self, config: ConvTransformerConfig, level: int, stride: int, layer_idx: int):
        super().__init__()
        width = config.n_embd
        self.conv1 = MaskedConv1d(config, width, 2 * width, 3, stride)
        self.conv2 = MaskedConv1d(config, 2 * width, width, 3)
        self.downsample = MaskedConv1d(config, width, width, 1, stride) if stride > 1 else Identity()

    def forward(self, hidden_states: torch.Tensor, padding=None, out_padding=None, *args, **kwargs) -> torch.Tensor:
        """Shapes as in `ConvTransformerBlock`; attention's arguments are not used."""
        output = F.relu(self.conv1(hidden_states, padding))
        output = self.conv2(output, out_padding)
        return F.relu(output + self.downsample(hidden_states, padding))


BLOCKS = {"convTransformer": ConvTransformerBlock, "conv": ConvBlock}


class ConvTransformerEmbedding(nn.Module):
    """One projection for each stream, side by side, then convolutions with norm and ReLU, then positions."""

    def __init__(self, config: ConvTransformerConfig):
        super().__init__()
        self.stream_widths = config.stream_widths
        projected = config.projected_stream_widths
        self.streams = None
        if projected is not None:
            self.streams = nn.ModuleList(nn.Linear(a, b) for a, b in zip(self.stream_widths, projected, strict=True))
        width = sum(projected or self.stream_widths)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for index in range(config.arch[0]):
            in_width = width if index == 0 else config.n_embd
            # A norm takes any constant away again: no bias before it.
            conv = MaskedConv1d(config, in_width, config.n_embd, config.n_embd_ks, bias=not config.with_ln)
            self.convs.append(conv)
            self.norms.append(make_norm(config, config.n_embd) if config.with_ln else Identity())
        has_positions = config.use_abs_pe or config.use_learned_pe
        self.positions = PositionTable(config) if has_positions else Identity()

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """(batch, time, sum of n_in) to (batch, time, n_embd)."""
        if self.streams is not None:
            parts = x.split(self.stream_widths, dim=-1)
            parts = [zero_padding(project(part), padding) for project, part in zip(self.streams, parts, strict=True)]
            x = torch.cat(parts, dim=-1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x, padding), padding))
        return self.positions(x, padding)


# ---------------------------------------------------------------------------------------------------------------------
# Models


class ConvTransformerPreTrainedModel(ModelCardMixin, PreTrainedModel):
    config: ConvTransformerConfig
    config_class = ConvTransformerConfig
    base_model_prefix = "model"
    main_input_name = "input_features"
    input_modalities = ("time",)
    _input_embed_layer = "embedding"
    supports_gradient_checkpointing = True
    # What a device_map must leave whole: inside of these, results of several parts meet.
    _no_split_modules = [
        "ConvTransformerEmbedding",
        "ConvTransformerBlock",
        "ConvBlock",
        "FeaturePyramidNeck",
        "ClassificationHead",
        "RegressionHead",
        "ConvTransformerDecoder",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": GradientCheckpointingLayer,  # the base of both kinds of block
        "attentions": ConvTransformerAttention,
    }
    # What a loaded checkpoint lacked, and is random: fine for training, but the pipeline refuses it.
    untrained_weights: frozenset[str] = frozenset()
    # Trainer's loss is already an average over the batch's positives: divide it under gradient accumulation.
    accepts_loss_kwargs = False

    def __init__(self, config: ConvTransformerConfig, *args, **kwargs):
        # Fields that `from_pretrained(folder, field=...)` replaced were not looked at together yet.
        config.validate_architecture()
        super().__init__(config, *args, **kwargs)

    def post_init(self):
        super().post_init()
        # FSDP looks in the model for every class that is named.
        self._no_split_modules = {type(module).__name__ for module in self.modules()} & set(self._no_split_modules)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """
        As in transformers; the model remembers which weights the checkpoint lacked, until it is trained.

        Raises:
            ValueError: the checkpoint is quantized, and `dtype` is another than it was quantized in.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model.untrained_weights = frozenset(info["missing_keys"])
        compute_with_packed_weights(model)
        if getattr(model, "quantization_method", None) == "torchao":
            # transformers 5.23 wants to undo how it read torchao's tensors when they are saved again, and cannot.
            model._weight_conversions = None
            stored = {parameter.dtype for parameter in model.parameters() if hasattr(parameter, "qdata")}
            others = {parameter.dtype for parameter in model.parameters() if not hasattr(parameter, "qdata")}
            if not stored <= others:
                raise ValueError(
                    f"The checkpoint is quantized for {', '.join(map(str, stored))} and was to be loaded as "
                    f"{', '.join(map(str, others))}. Leave dtype out; or load the full-precision checkpoint in that dtype, and "
                    "quantize it."
                )
        return (model, info) if output_loading_info else model

    def train(self, mode: bool = True):
        if mode:
            self.untrained_weights = frozenset()
        return super().train(mode)

    def _check_and_adjust_attn_implementation(self, *args, **kwargs) -> str:
        """transformers asks this at load and in `set_attn_implementation`; see `check_attention_backend`."""
        implementation = super()._check_and_adjust_attn_implementation(*args, **kwargs)
        check_attention_backend(implementation, self.config)
        return implementation

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear | nn.Conv1d):
            # PyTorch's own initialisation with zero bias, which v1 trains from.
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bias = torch.as_tensor(getattr(module, "bias_init", 0.0), dtype=module.bias.dtype)
                init.copy_(module.bias, bias.to(module.bias.device).expand_as(module.bias))
            return
        super()._init_weights(module)
        if isinstance(module, AffineDropPath):
            init.constant_(module.scale, 1e-4)
        elif isinstance(module, PositionTable) and module.table is not None:
            init.trunc_normal_(module.table, std=0.02)
        elif isinstance(module, ConvTransformerAttention) and module.relative_bias is not None:
            init.trunc_normal_(module.relative_bias, std=math.sqrt(2.0 / self.config.n_embd))
        elif isinstance(module, RegressionHead):
            init.ones_(module.scale)
        elif isinstance(module, MatchScale):
            init.constant_(module.scale, module.scale_init)
            init.constant_(module.bias, module.bias_init)
        elif isinstance(module, ConvTransformerLoss):
            init.constant_(module.loss_normalizer, module.initial_normalizer)


class ConvTransformerModel(ConvTransformerPreTrainedModel):
    """The backbone: features of a recording in, a pyramid of features and masks out."""

    def __init__(self, config: ConvTransformerConfig):
        super().__init__(config)
        make_block = BLOCKS[config.backbone_type]
        self.embedding = ConvTransformerEmbedding(config)
        self.stem = nn.ModuleList(make_block(config, 0, 1, index) for index in range(config.arch[1]))
        self.branch = nn.ModuleList(
            make_block(config, level, config.scale_factor, config.arch[1] + level - 1)
            for level in range(1, config.num_levels)
        )
        has_attention = config.backbone_type == "convTransformer"
        self.rotary_emb = ConvTransformerRotaryEmbedding(config) if config.use_rope and has_attention else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ConvTransformerModelOutput:
        r"""
        Args:
            input_features (`torch.Tensor` of shape `(batch, time, n_in)`):
                Features; several streams lie side by side in the last dimension. Any `time >= 1`.
            attention_mask (`torch.Tensor` of shape `(batch, time)`, *optional*):
                1 or True where a step is valid, 0 where it is padded. Without padding, leave it out.

        Raises:
            ValueError: shapes that do not fit.
        """
        valid = self.check_inputs(input_features, attention_mask)
        padding = None if valid is None else ~valid[..., None]
        # Features come as float32, models may be half precision. No name for the embedding: the blocks let go of it.
        feature_maps = [self.embedding(input_features.to(self.dtype), padding)]
        feature_maps, valids = self.run_blocks(feature_maps, valid, **kwargs)
        feature_masks = [
            torch.ones(x.shape[:2], dtype=torch.long, device=x.device) if one is None else one.long()
            for x, one in zip(feature_maps, valids, strict=True)
        ]
        return ConvTransformerModelOutput(
            last_hidden_state=feature_maps[-1], feature_maps=tuple(feature_maps), feature_masks=tuple(feature_masks)
        )

    def run_blocks(
        self,
        feature_maps: list[torch.Tensor],
        valid: torch.Tensor | None,
        start: int = 0,
        stop: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """
        The blocks number `start` to `stop` (without it), which are those of the stem, then those of the branch. All of
        them, unless the model is cut into stages of a pipeline.

        Args:
            feature_maps: the levels so far, finest first, each (batch, time / stride, n_embd); the next block reads the
                last one. Before the first block, this is the embedding. The list is changed.
            valid: (batch, time) bool, True = valid; `None` = no padding.

        Returns:
            the levels after these blocks, and the masks of all levels, `valid` at their strides.
        """
        config, x = self.config, feature_maps[0]

        # Masks once for each level; no padding is no mask at all.
        lengths, valids = [x.shape[1]], [valid]
        for _ in self.branch:
            # (not -(-a // b), which ONNX divides towards 0)
            lengths.append((lengths[-1] + config.scale_factor - 1) // config.scale_factor)
            valids.append(subsample(valids[-1], config.scale_factor))
        paddings = [None if one is None else ~one[..., None] for one in valids]

        rotary = [None] * len(lengths)
        if self.rotary_emb is not None:
            counts = None if valid is None else valid.sum(dim=1)
            cos, sin = self.rotary_emb(x, torch.arange(lengths[0], device=x.device)[None], counts)
            rotary = [(cos[:, :length], sin[:, :length]) for length in lengths]
        masks = [
            make_attention_mask(config._attn_implementation, one, length, window, config.is_causal, x.dtype, x.device)
            for one, length, window in zip(valids, lengths, config.window_sizes, strict=True)
        ]

        blocks = [*self.stem, *self.branch]
        for index, block in list(enumerate(blocks))[start:stop]:
            level = max(index + 1 - len(self.stem), 0)
            read = max(level - 1, 0)
            x = block(feature_maps[-1], paddings[read], paddings[level], masks[level], rotary[level], **kwargs)
            feature_maps[level:] = [x]
        return feature_maps, valids

    def check_inputs(self, input_features: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """
        The mask as (batch, time) bool, or None if nothing is padded.

        Raises:
            ValueError: the shapes are not (batch, time, n_in) and (batch, time), or there are no time steps.
        """
        width = sum(self.config.stream_widths)
        shape = tuple(input_features.shape)
        if input_features.dim() != 3 or shape[2] != width:
            advice = ""
            if input_features.dim() == 3 and shape[1] == width:
                advice = " They look like (batch, channels, time): pass input_features.transpose(1, 2)."
            elif input_features.dim() == 2:
                advice = " Add the batch dimension: input_features[None]."
            raise ValueError(f"input_features has shape {shape}; expected (batch, time, {width}).{advice}")
        if shape[1] == 0:
            raise ValueError(f"input_features has shape {shape}: no time steps; expected at least one.")
        if attention_mask is None:
            return None
        if tuple(attention_mask.shape) != shape[:2]:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; expected (batch, time) = {shape[:2]}."
            )
        valid = attention_mask.to(device=input_features.device, dtype=torch.bool)
        # A full mask is no mask. Looking costs a synchronisation, and tracing cannot look.
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing() and valid.all():
            return None
        return valid


class ConvTransformerBackbone(BackboneMixin, ConvTransformerPreTrainedModel):
    """
    Chosen levels of the pyramid, for a detector of your own: `from_pretrained(folder, out_indices=[0, 2, 4])`, of the
    checkpoint of any class. `channels` are their widths, `strides` their steps in features.
    """

    def __init__(self, config: ConvTransformerConfig):
        super().__init__(config)
        self.model = ConvTransformerModel(config)
        self.num_features = [config.n_embd] * config.num_levels
        self.has_attentions = config.backbone_type == "convTransformer"
        self.post_init()

    @property
    def strides(self) -> list[int]:
        """Stride of each of `out_features`, in features."""
        return [self.config.strides[index] for index in self.out_indices]

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ConvTransformerBackboneOutput:
        r"""
        Args:
            input_features (`torch.Tensor` of shape `(batch, time, n_in)`):
                Features; several streams lie side by side in the last dimension. Any `time >= 1`.
            attention_mask (`torch.Tensor` of shape `(batch, time)`, *optional*):
                1 or True where a step is valid, 0 where it is padded. Without padding, leave it out.

        Raises:
            ValueError: shapes that do not fit.
        """
        outputs = self.model(input_features, attention_mask, return_dict=True, **kwargs)
        return ConvTransformerBackboneOutput(
            feature_maps=tuple(outputs.feature_maps[index] for index in self.out_indices),
            feature_masks=tuple(outputs.feature_masks[index] for index in self.out_indices),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Neck and heads


class IdentityNeck(nn.Module):
    """A norm for each level."""

    def __init__(self, config: ConvTransformerConfig):
        super().__init__()
        self.norms = nn.ModuleList(
            make_norm(config, config.neck_width) if config.fpn_with_ln else Identity() for _ in config.detector_strides
        )

    def forward(self, features: list[torch.Tensor], paddings: list[torch.Tensor | None]) -> list[torch.Tensor]:
        return [norm(x, padding) for norm, x, padding in zip(self.norms, features, paddings, strict=True)]


class FeaturePyramidNeck(nn.Module):
    """
    Top-down feature pyramid (Lin et al., 2017, https://arxiv.org/abs/1612.03144): each level's projection plus the next
    coarser level repeated in time, then a depthwise convolution and a norm.
    """

    def __init__(self, config: ConvTransformerConfig):
        super().__init__()
        width, bias = config.neck_width, not config.fpn_with_ln
        self.scale_factor = config.scale_factor
        self.laterals, self.convs, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for _ in config.detector_strides:
            self.laterals.append(nn.Linear(config.n_embd, width, bias=bias))
            self.convs.append(MaskedConv1d(config, width, width, 3, groups=width, bias=bias))
            self.norms.append(make_norm(config, width) if config.fpn_with_ln else Identity())

    def forward(self, features: list[torch.Tensor], paddings: list[torch.Tensor | None]) -> list[torch.Tensor]:
        merged = [zero_padding(lateral(x), p) for lateral, x, p in zip(self.laterals, features, paddings, strict=True)]
        for level in range(len(merged) - 1, 0, -1):
            finer = merged[level - 1]
            coarser = merged[level].repeat_interleave(self.scale_factor, dim=1)[:, : finer.shape[1]]
            merged[level - 1] = finer + coarser
        return [
            norm(conv(x, padding), padding)
            for norm, conv, x, padding in zip(self.norms, self.convs, merged, paddings, strict=True)
        ]


NECKS = {"identity": IdentityNeck, "fpn": FeaturePyramidNeck}


class ConvHead(nn.Module):
    """A tower of convolutions with norm and ReLU and a last convolution, shared by all levels."""

    def __init__(
        self,
        config: ConvTransformerConfig,
        in_width: int,
        width: int,
        out_channels: int,
        bias_init: float | list[float] = 0.0,
    ):
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for _ in range(config.head_num_layers - 1):
            conv = MaskedConv1d(config, in_width, width, config.head_kernel_size, bias=not config.head_with_ln)
            self.convs.append(conv)
            self.norms.append(make_norm(config, width) if config.head_with_ln else Identity())
            in_width = width
        self.output = MaskedConv1d(config, in_width, out_channels, config.head_kernel_size, bias_init=bias_init)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """(batch, time, in_width) to (batch, time, out_channels)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x, padding), padding))
        return self.output(x, padding)


class ClassificationHead(ConvHead):
    """Logits that start from the scores `cls_prior_prob`, and 1e-6 for classes without data (`empty_labels`)."""

    def __init__(self, config, in_width: int, width: int, num_labels: int, empty_labels: Sequence[int] = ()):
        scores = [1e-6 if label in empty_labels else config.cls_prior_prob for label in range(num_labels)]
        super().__init__(config, in_width, width, num_labels, [-math.log((1 - score) / score) for score in scores])


class RegressionHead(ConvHead):
    """Distances from a point to start and end, in strides, 0 or more, float32; with a learned scale for each level."""

    def __init__(self, config: ConvTransformerConfig, in_width: int, width: int, bias_init: float = 0.0):
        super().__init__(config, in_width, width, 2, bias_init)
        self.scale = nn.Parameter(torch.ones(len(config.detector_strides)))

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None, level: int) -> torch.Tensor:
        return F.relu(super().forward(x, padding).float() * self.scale[level].float())


class PointsMixin:
    """The points of the pyramid that a detector's heads see."""

    def _mask_points(self, features: Sequence[torch.Tensor], valids: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """(batch, points) long, 1 = valid, of levels and their masks."""
        masks = [
            torch.ones(x.shape[:2], dtype=torch.long, device=x.device) if valid is None else valid.long()
            for x, valid in zip(features, valids, strict=True)
        ]
        return torch.cat(masks, dim=1)

    def _make_ranges(self, levels: torch.Tensor) -> torch.Tensor:
        """The regression range of every point, (points, 2), float32, on the feature grid."""
        return torch.tensor(self.config.detector_ranges, dtype=torch.float32, device=levels.device)[levels]

    def _make_points(self, lengths: list[int], device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Position on the feature grid, stride (both float32) and level of every point, each (points,)."""
        strides = self.config.detector_strides
        steps = zip(lengths, strides, strict=True)
        points = torch.cat([torch.arange(length, device=device) * stride for length, stride in steps])
        levels = torch.cat([torch.full((length,), level, device=device) for level, length in enumerate(lengths)])
        return points.float(), torch.tensor(strides, dtype=torch.float32, device=device)[levels], levels


def segments_of(points: torch.Tensor, strides: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Start and end on the feature grid, (..., points, 2), of distances in strides."""
    return torch.stack((points - offsets[..., 0] * strides, points + offsets[..., 1] * strides), dim=-1)


class ConvTransformerForTemporalActionLocalization(PointsMixin, ConvTransformerPreTrainedModel):
    """The detector: for every point of the pyramid a score for each class and a segment around it."""

    def __init__(self, config: ConvTransformerConfig):
        super().__init__(config)
        self.model = ConvTransformerModel(config)
        self.neck = NECKS[config.fpn_type](config)
        widths = (config.neck_width, config.head_width)
        self.class_head = ClassificationHead(config, *widths, config.num_labels, config.empty_labels)
        self.segment_head = RegressionHead(config, *widths)
        self.criterion = ConvTransformerLoss(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: list[dict] | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ConvTransformerTemporalActionLocalizationOutput:
        r"""
        Args:
            input_features (`torch.Tensor` of shape `(batch, time, n_in)`):
                Features; several streams lie side by side in the last dimension. Any `time >= 1`.
            attention_mask (`torch.Tensor` of shape `(batch, time)`, *optional*):
                1 or True where a step is valid, 0 where it is padded. Without padding, leave it out.
            labels (list of `dict`, *optional*):
                For each sample `segments` (`(N, 2)`, start and end on the feature grid) and `class_labels` (`(N,)`).
                N may be 0.
            num_items_in_batch (`torch.Tensor` or `float`, *optional*):
                Divide the losses by this, not by the moving number of positives: for gradients accumulated over batches;
                see `ConvTransformerLoss`.

        Raises:
            ValueError: shapes that do not fit, or labels that the model cannot learn; the message names the sample.
        """
        attention_mask = self.model.check_inputs(input_features, attention_mask)
        outputs = self.model(input_features, attention_mask, return_dict=True, **kwargs)
        valids = [None if attention_mask is None else mask.bool() for mask in outputs.feature_masks]
        detected = self.detect(outputs.feature_maps, valids, labels, num_items_in_batch)
        detected.hidden_states, detected.attentions = outputs.hidden_states, outputs.attentions
        return detected

    def detect(
        self,
        feature_maps: Sequence[torch.Tensor],
        valids: Sequence[torch.Tensor | None],
        labels: list[dict] | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
    ) -> ConvTransformerTemporalActionLocalizationOutput:
        """
        Neck, heads and loss: what comes after the pyramid.

        Args:
            feature_maps: the levels, finest first, each (batch, time / stride, n_embd).
            valids: their masks, each (batch, time / stride) bool, True = valid, or `None` = no padding.
            labels, num_items_in_batch: as in `forward`.
        """
        start = self.config.fpn_start_level
        features, valids = feature_maps[start:], valids[start:]
        paddings = [None if valid is None else ~valid[..., None] for valid in valids]
        features = self.neck(features, paddings)

        logits = torch.cat([self.class_head(x, padding) for x, padding in zip(features, paddings, strict=True)], dim=1)
        offsets = torch.cat(
            [self.segment_head(x, p, level) for level, (x, p) in enumerate(zip(features, paddings, strict=True))],
            dim=1,
        )
        point_mask = self._mask_points(features, valids)
        points, strides, levels = self._make_points([x.shape[1] for x in features], offsets.device)
        pred_segments = segments_of(points, strides, offsets)

        loss = loss_dict = None
        if labels is not None:
            ranges = self._make_ranges(levels)
            loss, loss_dict = self.criterion(
                logits, offsets, point_mask.bool(), points, strides, ranges, labels, num_items_in_batch
            )

        return ConvTransformerTemporalActionLocalizationOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits,
            pred_segments=pred_segments,
            point_mask=point_mask,
            point_levels=levels.expand(logits.shape[0], -1),
        )

    @torch.no_grad()
    def count_positives(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None, labels: list[dict]
    ) -> torch.Tensor:
        """How many points of the batch learn a segment, without running the model; arguments as in `forward`."""
        mask = attention_mask
        if mask is None:
            mask = torch.ones(input_features.shape[:2], device=input_features.device)
        masks = [mask.to(input_features.device).bool()[:, ::stride] for stride in self.config.detector_strides]
        points, strides, levels = self._make_points([one.shape[1] for one in masks], input_features.device)
        return self.criterion.count_positives(
            torch.cat(masks, dim=1), points, strides, self._make_ranges(levels), labels
        )


# ---------------------------------------------------------------------------------------------------------------------
# Moment retrieval

# Steps of all queries that an inference decodes together: enough for kernels, few enough for a processor's cache.
_STEPS_AT_ONCE = 16384


class MatchProjection(nn.Module):
    """
    Points or queries in the space in which they are compared, of length 1. The hidden layer is for the words: encoders put
    "turn it in" and "turn it out" side by side, and sentences that were not taught follow better than through one layer.
    """

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.up_proj = nn.Linear(in_width, in_width)
        self.down_proj = nn.Linear(in_width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.down_proj(F.gelu(self.up_proj(x))), dim=-1)


class MatchScale(nn.Module):
    """The logit of a cosine: learned scale and bias, as in SigLIP (Zhai et al., 2023, https://arxiv.org/abs/2303.15343)."""

    def __init__(self, config: ConvTransformerConfig):
        super().__init__()
        self.scale_init = 10.0
        self.bias_init = -math.log((1 - config.cls_prior_prob) / config.cls_prior_prob)
        # (of one dimension: FSDP shards no scalars)
        self.scale = nn.Parameter(torch.full((1,), self.scale_init))
        self.bias = nn.Parameter(torch.full((1,), self.bias_init))

    def forward(
        self, text_embeds: torch.Tensor, segment_embeds: torch.Tensor, logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(..., queries, width) and (..., points, width) to (..., queries, points), float32; or `logits` plus this, in their
        dtype. (In here, because the model may be spread over devices.)"""
        cosine = text_embeds.float() @ segment_embeds.float().transpose(-1, -2)
        matches = cosine * self.scale.float() + self.bias.float()
        return matches if logits is None else logits + matches.to(logits.dtype)


class ConvTransformerDecoder(nn.Module):
    """
    Reads a pyramid with a query in mind. Every layer is two blocks, which all levels share: one over time, as in the
    encoder, and one from time to the words of the query. What comes before the first word is the same for all queries and is
    computed once for a recording; beside this, a query costs what `decoder_dim` says. (That the recording is
    encoded once for all its queries, and that fusion comes late and is narrow, is what makes many queries affordable: Mu et
    al., "SnAG: Scalable and Accurate Video Grounding", CVPR 2024, https://arxiv.org/abs/2404.02257.)
    """

    def __init__(self, config: ConvTransformerConfig):
        super().__init__()
        self.config = config
        width, level = config.decoder_width, config.fpn_start_level
        self.time_proj = nn.Linear(config.neck_width, width)
        self.text_proj = nn.Linear(config.text_width, width)
        self.time_blocks, self.text_blocks = nn.ModuleList(), nn.ModuleList()
        for index in range(config.decoder_layers):
            self.time_blocks.append(ConvTransformerBlock(config, level, 1, 2 * index, width))
            self.text_blocks.append(ConvTransformerBlock(config, level, 1, 2 * index + 1, width, is_cross=True))
        self.rotary_emb = ConvTransformerRotaryEmbedding(config, width // config.n_head) if config.use_rope else None
        self.norm = make_norm(config, width)
        self.class_head = ConvHead(config, width, width, 1)
        # So narrow a head may begin with starts or ends below zero everywhere, where its ReLU lets nothing learn.
        self.segment_head = RegressionHead(config, width, width, bias_init=1.0)

    def forward(
        self,
        features: Sequence[torch.Tensor],
        valids: Sequence[torch.Tensor | None],
        text: torch.Tensor,
        text_valid: torch.Tensor | None,
        lengths: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            features, valids: the levels after the neck, finest first, each (batch, time / stride, channels), and their masks,
                each (batch, time / stride) bool, True = valid, or `None` = no padding.
            text: (batch, queries, words, text width); text_valid: (batch, queries, words) bool or `None`.
            lengths: (batch or 1,), the number of features of each recording.

        Returns:
            logits (batch, queries, points) and offsets (batch, queries, points, 2) in strides, 0 or more, float32.
        """
        batch, queries = text.shape[:2]
        text = self.text_proj(text)
        rotary = None
        if self.rotary_emb is not None:
            steps = torch.arange(features[0].shape[1], device=text.device)[None]
            rotary = self.rotary_emb(features[0], steps, lengths)
        levels = [self._read_time(x, valid, rotary) for x, valid in zip(features, valids, strict=True)]
        parts = [slice(None)]
        if not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()):
            count = max(_STEPS_AT_ONCE // (batch * features[0].shape[1]), 1)
            parts = [slice(first, first + count) for first in range(0, queries, count)]
        logits, offsets = [], []
        for part in parts:
            of_text = None if text_valid is None else text_valid[:, part].flatten(0, 1)
            decoded = [
                self._read_text(level, *one, rotary, text[:, part].flatten(0, 1), of_text)
                for level, one in enumerate(levels)
            ]
            for results, one in zip((logits, offsets), zip(*decoded, strict=True), strict=True):
                results.append(torch.cat(one, dim=1).unflatten(0, (batch, -1)))
        return torch.cat(logits, dim=1).squeeze(-1), torch.cat(offsets, dim=1)

    def _read_time(self, x: torch.Tensor, valid: torch.Tensor | None, rotary) -> tuple:
        """A level before it has seen a word, and its mask."""
        padding = None if valid is None else ~valid[..., None]
        return self._look_around(
            self.time_blocks[0], zero_padding(self.time_proj(x), padding), padding, rotary
        ), padding

    def _look_around(self, block: nn.Module, x: torch.Tensor, padding: torch.Tensor | None, rotary) -> torch.Tensor:
        length = x.shape[1]
        if rotary is not None:
            rotary = tuple(one[:, :length] for one in rotary)
            if rotary[0].shape[0] > 1:  # angles of each recording
                rotary = tuple(repeat_for_queries(one, x) for one in rotary)
        implementation, attn = self.config._attn_implementation, block.attn
        valid = None if padding is None else ~padding[..., 0]
        mask = make_attention_mask(implementation, valid, length, attn.window, attn.is_causal, x.dtype, x.device)
        return block(x, padding, padding, mask, rotary)

    def _read_text(
        self, level: int, x: torch.Tensor, padding: torch.Tensor | None, rotary, text: torch.Tensor, text_valid
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (batch * queries, time, 1) and offsets (batch * queries, time, 2) of a level."""
        mask = make_text_mask(self.config._attn_implementation, text_valid, x.dtype)
        text_padding = None if text_valid is None else ~text_valid[..., None]
        for index, block in enumerate(self.text_blocks):
            if index:
                x = self._look_around(self.time_blocks[index], x, padding, rotary)
            x = block(x, padding, padding, mask, None, text, text_padding)
            padding = block.padding_of_queries(padding, x, text, text_padding)
        x = self.norm(x, padding)
        return self.class_head(x, padding), self.segment_head(x, padding, level)


def text_model_class(text_config) -> type:
    """The automatic class of a text encoder; of encoder-decoder models (T5), of their encoder."""
    return AutoModelForTextEncoding if type(text_config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def make_text_encoder(text_config) -> PreTrainedModel:
    """A new text model, with the attention backend of its config if it has that one."""
    try:
        return text_model_class(text_config).from_config(text_config)
    except ValueError:
        if text_config._attn_implementation in (None, "eager"):
            raise
        text_config._attn_implementation = "eager"  # a backend that was asked of both models, and that this one lacks
        return text_model_class(text_config).from_config(text_config)


class ConvTransformerForMomentRetrieval(PointsMixin, ConvTransformerPreTrainedModel):
    """
    Moments in a recording that a text describes: for every query and every point of the pyramid a score and a segment.

    Queries are token ids, for a text encoder inside the model (`config.text_config`; frozen unless `freeze_text_encoder` is
    False), or embeddings of their words from any other encoder (`config.text_dim` wide). With `config.projection_dim`,
    points and queries also have embeddings in one space, for search over many recordings.

    Raises:
        ValueError: the config says neither `text_config` nor `text_dim`.
    """

    def __init__(self, config: ConvTransformerConfig):
        super().__init__(config)
        if config.text_width is None:
            raise ValueError(
                "Moment retrieval needs a text encoder, text_config=AutoConfig.from_pretrained(...), or the width of the "
                "embeddings that queries are given as: text_dim=384, say."
            )
        if (
            config.use_rope
            and config.rope_parameters["rope_type"] == "dynamic"
            and config.decoder_width == 2 * config.n_head
        ):
            raise ValueError(
                f"rope_parameters has rope_type 'dynamic', which needs heads of more than 2 channels, but the decoder's have "
                f"{config.decoder_width} / {config.n_head} (decoder_dim / n_head); decoder_dim={4 * config.n_head} would work."
            )
        self.model = ConvTransformerModel(config)
        self.neck = NECKS[config.fpn_type](config)
        self.decoder = ConvTransformerDecoder(config)
        self.text_encoder = None
        if config.text_config is not None:
            self.text_encoder = make_text_encoder(config.text_config)
        # Without a contrastive head it is only what the decoder's logits start from.
        match_width = config.projection_dim or config.decoder_width
        self.segment_projection = MatchProjection(config.neck_width, match_width)
        self.text_projection = MatchProjection(config.text_width, match_width)
        self.match = MatchScale(config)
        self.criterion = ConvTransformerLoss(config, num_labels=1)
        self.post_init()
        self._freeze_text_encoder()

    def _freeze_text_encoder(self):
        if self.text_encoder is None:
            return
        self.text_encoder.requires_grad_(not self.config.freeze_text_encoder)
        if getattr(self.text_encoder, "pooler", None) is not None:
            self.text_encoder.pooler.requires_grad_(False)  # which nothing reads: DDP would wait for it

    @property
    def _text_encoder_learns(self) -> bool:
        """Asks the parameters, which may be thawed, or have adapters."""
        return self.text_encoder is not None and any(one.requires_grad for one in self.text_encoder.parameters())

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers."""
        result = super().from_pretrained(*args, **kwargs)
        # What is loaded takes the place of the frozen parameters that `__init__` has made.
        (result[0] if isinstance(result, tuple) else result)._freeze_text_encoder()
        return result

    @classmethod
    def from_text_pretrained(
        cls, text_model: str | os.PathLike, config: ConvTransformerConfig, **kwargs
    ) -> "ConvTransformerForMomentRetrieval":
        """
        A new model with a trained text encoder, which is saved with it.

        Args:
            text_model: name or folder of a text model of transformers, such as "sentence-transformers/all-MiniLM-L6-v2".
            config: of the model; its `text_config` is replaced.
            kwargs: for `AutoModelForTextEncoding.from_pretrained` (or `AutoModel`'s), such as `revision`; the default `dtype` is
                the model's.

        To start from a trained detector too: `model.model.load_state_dict(detector.model.state_dict())`.
        """
        hub = {
            name: kwargs[name] for name in ("revision", "token", "cache_dir", "trust_remote_code") if name in kwargs
        }
        text_config = AutoConfig.from_pretrained(text_model, **hub).get_text_config()
        kwargs = {"dtype": torch.get_default_dtype(), **kwargs}
        encoder = text_model_class(text_config).from_pretrained(text_model, config=text_config, **kwargs)
        fields = {**config.to_dict(), "text_config": encoder.config.to_dict(), "text_dim": None}
        config = type(config).from_dict(fields, attn_implementation=config._attn_implementation)
        if config._attn_implementation is not None:
            config._attn_implementation = config._attn_implementation  # its setter hands it on to text_config
        model = cls(config)
        missing, unexpected = model.text_encoder.load_state_dict(encoder.state_dict(), strict=False)
        if lost := [name for name in [*missing, *unexpected] if not name.startswith("pooler.")]:  # which is not read
            raise ValueError(f"{text_model}: its weights are not those of its config, such as {lost[0]!r}.")
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def train(self, mode: bool = True):
        super().train(mode)
        if self.text_encoder is not None:
            self.text_encoder.train(mode and self._text_encoder_learns)  # no dropout in what does not learn
        return self

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_embeds: torch.Tensor | None = None,
        query_input_ids: torch.Tensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
        labels: list[list[dict]] | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ConvTransformerMomentRetrievalOutput:
        r"""
        Args:
            input_features (`torch.Tensor` of shape `(batch, time, n_in)`):
                Features; several streams lie side by side in the last dimension. Any `time >= 1`.
            attention_mask (`torch.Tensor` of shape `(batch, time)`, *optional*):
                1 or True where a step is valid, 0 where it is padded. Without padding, leave it out.
            query_embeds (`torch.Tensor` of shape `(batch, queries, words, text_dim)`):
                Embeddings of the words of each recording's queries. Either these, or
            query_input_ids (`torch.LongTensor` of shape `(batch, queries, words)`):
                their token ids, for the model's text encoder.
            query_attention_mask (`torch.Tensor` of shape `(batch, queries, words)`, *optional*):
                1 or True where a word is valid. A recording with fewer queries than others has some without a valid word.
            labels (list of lists of `dict`, *optional*):
                For each sample and each of its queries `segments` (`(N, 2)`, start and end on the feature grid). N is 0 where
                a query has no answer.
            num_items_in_batch (`torch.Tensor` or `float`, *optional*):
                Divide the losses by this, not by the moving number of positives.

        Raises:
            ValueError: shapes that do not fit, no query, or labels that the model cannot learn; the message names the sample.
        """
        attention_mask = self.model.check_inputs(input_features, attention_mask)
        text, text_valid = self.encode_queries(query_embeds, query_input_ids, query_attention_mask)
        if text.shape[0] != input_features.shape[0]:
            raise ValueError(
                f"There are queries for {text.shape[0]} recordings, but {input_features.shape[0]} recordings; give each its "
                "own: the first axis of queries is the batch."
            )
        outputs = self.model(input_features, attention_mask, return_dict=True, **kwargs)
        features, valids = self._apply_neck(outputs, attention_mask)
        lengths = torch.full((1,), input_features.shape[1], device=text.device)
        if attention_mask is not None:
            lengths = attention_mask.sum(dim=1)
        logits, offsets = self.decoder(features, valids, text.to(features[0].dtype), text_valid, lengths)
        # The decoder adds to how alike point and query are. Alone, it learns where something happens long before it learns to
        # read: what a query says enters it through branches that start near zero, and multiplies nothing.
        embeds = self._embed_text(text, text_valid), self._embed_points(features)
        logits = self.match(*embeds, logits)

        point_mask = self._mask_points(features, valids)
        points, strides, levels = self._make_points([x.shape[1] for x in features], offsets.device)
        query_mask = torch.ones(logits.shape[:2], dtype=torch.long, device=logits.device)
        if text_valid is not None:
            query_mask = text_valid.any(dim=-1).long()

        loss = loss_dict = None
        if labels is not None:
            matches = None if self.config.projection_dim is None else self.match(*embeds).flatten(0, 1)[..., None]
            loss, loss_dict = self.criterion(
                logits.flatten(0, 1)[..., None],
                offsets.flatten(0, 1),
                (point_mask[:, None] * query_mask[..., None]).bool().flatten(0, 1),
                points,
                strides,
                self._make_ranges(levels),
                _labels_of_queries(labels, query_mask),
                num_items_in_batch,
                matches,
            )
        return ConvTransformerMomentRetrievalOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits,
            pred_segments=segments_of(points, strides, offsets),
            point_mask=point_mask,
            point_levels=levels.expand(point_mask.shape[0], -1),
            query_mask=query_mask,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def encode_queries(
        self,
        query_embeds: torch.Tensor | None = None,
        query_input_ids: torch.Tensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Embeddings of the queries' words, (batch, queries, words, text width), and their mask, (batch, queries, words) bool, or
        `None` if nothing is padded; arguments as in `forward`. For queries that are asked of many recordings: give the
        embeddings back as `query_embeds`.

        Raises:
            ValueError: neither ids nor embeddings, or both; shapes that do not fit; more words than the text encoder takes.
        """
        if (query_embeds is None) == (query_input_ids is None):
            raise ValueError(
                f"{'Neither' if query_embeds is None else 'Both'} query_embeds {'nor' if query_embeds is None else 'and'} "
                "query_input_ids given; expected one of them."
            )
        name, given = (
            ("query_embeds", query_embeds) if query_embeds is not None else ("query_input_ids", query_input_ids)
        )
        axes = ["batch", "queries", "words"] + (["text width"] if query_embeds is not None else [])
        if given.dim() != len(axes) or 0 in given.shape:
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}; expected ({', '.join(axes)}), none of them 0: at least one query of "
                "at least one word for each recording."
            )
        if query_attention_mask is not None and query_attention_mask.shape != given.shape[:3]:
            raise ValueError(
                f"query_attention_mask has shape {tuple(query_attention_mask.shape)}; expected {tuple(given.shape[:3])}, "
                "(batch, queries, words)."
            )
        valid = None if query_attention_mask is None else query_attention_mask.to(given.device).bool()
        if valid is not None and not torch.compiler.is_compiling() and not torch.jit.is_tracing() and valid.all():
            valid = None
        if query_embeds is not None:
            if given.shape[-1] != self.config.text_width:
                raise ValueError(
                    f"query_embeds is {given.shape[-1]} wide (shape {tuple(given.shape)}), but this model reads text of width "
                    f"{self.config.text_width} (text_config or text_dim). Use the text encoder that it was trained with."
                )
            return zero_padding(query_embeds, None if valid is None else ~valid[..., None]), valid
        if self.text_encoder is None:
            raise ValueError(
                "This model has no text encoder (text_config) for query_input_ids; give query_embeds, (batch, queries, words, "
                f"{self.config.text_width})."
            )
        most = getattr(self.config.text_config, "max_position_embeddings", None)
        table = getattr(getattr(self.text_encoder, "embeddings", None), "position_embeddings", None)
        if most is not None and getattr(table, "padding_idx", None) is not None:
            most -= table.padding_idx + 1  # RoBERTa counts from there
        if most is not None and given.shape[-1] > most:
            raise ValueError(
                f"query_input_ids has {given.shape[-1]} tokens, but the text encoder takes at most {most}; shorten the query."
            )
        if given.is_floating_point():
            raise ValueError(f"query_input_ids are of type {given.dtype}; expected token ids, whole numbers.")
        tokens_valid = torch.ones_like(given, dtype=torch.bool) if valid is None else valid
        # A query that is padding throughout has no word to attend to, which some encoders answer with NaN.
        visible = (tokens_valid | ~tokens_valid.any(dim=-1, keepdim=True)).flatten(0, 1).long()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._text_encoder_learns):
            hidden = self.text_encoder(given.flatten(0, 1), attention_mask=visible, return_dict=True).last_hidden_state
        hidden = hidden.unflatten(0, given.shape[:2])
        return zero_padding(hidden, None if valid is None else ~valid[..., None]), valid

    def get_segment_features(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> ConvTransformerSegmentFeaturesOutput:
        """
        Embeddings of a recording's points, to be compared with those of queries (`match_scores`): no query is needed.

        Args:
            input_features, attention_mask: as in `forward`.

        Raises:
            ValueError: the model has no contrastive head (`projection_dim`), or shapes do not fit.
        """
        self._check_match()
        attention_mask = self.model.check_inputs(input_features, attention_mask)
        outputs = self.model(input_features, attention_mask, return_dict=True)
        features, valids = self._apply_neck(outputs, attention_mask)
        _, _, levels = self._make_points([x.shape[1] for x in features], input_features.device)
        return ConvTransformerSegmentFeaturesOutput(
            embeds=self._embed_points(features),
            point_mask=self._mask_points(features, valids),
            point_levels=levels.expand(input_features.shape[0], -1),
        )

    def get_text_features(
        self,
        query_embeds: torch.Tensor | None = None,
        query_input_ids: torch.Tensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Embeddings of queries, (batch, queries, projection_dim), of length 1; arguments as in `forward`.

        Raises:
            ValueError: the model has no contrastive head (`projection_dim`), or as in `encode_queries`.
        """
        self._check_match()
        return self._embed_text(*self.encode_queries(query_embeds, query_input_ids, query_attention_mask))

    def match_scores(self, text_embeds: torch.Tensor, segment_embeds: torch.Tensor) -> torch.Tensor:
        """
        How well points fit queries, as logits, float32.

        Args:
            text_embeds: (..., queries, projection_dim); segment_embeds: (..., points, projection_dim), both of length 1.

        Returns:
            (..., queries, points).
        """
        return self.match(text_embeds, segment_embeds)

    def _check_match(self):
        if self.config.projection_dim is None:
            raise ValueError(
                "This model has no contrastive head, and so no embeddings to search with; train one with projection_dim=128, "
                "say, in its config."
            )

    def _apply_neck(self, outputs, attention_mask) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """The levels that the heads see, and their masks."""
        start = self.config.fpn_start_level
        valids = [None if attention_mask is None else mask.bool() for mask in outputs.feature_masks[start:]]
        paddings = [None if valid is None else ~valid[..., None] for valid in valids]
        return self.neck(outputs.feature_maps[start:], paddings), valids

    def _embed_points(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([self.segment_projection(x) for x in features], dim=1)

    def _embed_text(self, text: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        text = text.to(self.text_projection.up_proj.weight.dtype)
        count = text.shape[-2] if valid is None else valid.sum(dim=-1, keepdim=True).clamp(min=1)
        return self.text_projection(text.sum(dim=-2) / count)


def _labels_of_queries(labels: list[list[dict]], query_mask: torch.Tensor) -> list[dict]:
    """Labels of one class for each query of each recording, with none for those that are padding."""
    if len(labels) != len(query_mask):
        raise ValueError(
            f"labels has {len(labels)} entries for a batch of {len(query_mask)} samples; give one a sample."
        )
    flat = []
    for index, (own, mask) in enumerate(zip(labels, query_mask.tolist(), strict=True)):
        if isinstance(own, Mapping) or len(own) not in (sum(mask), len(mask)):
            found = "one dict" if isinstance(own, Mapping) else f"{len(own)} entries"
            raise ValueError(
                f"labels[{index}] is {found} for {sum(mask)} queries; expected a list with one "
                "{'segments': (N, 2)} for each query, N = 0 where it has no answer."
            )
        for which, one in enumerate(own):
            if not isinstance(one, Mapping) or one.get("segments") is None:
                raise ValueError(f"labels[{index}][{which}] is {one!r}; expected a dict with 'segments' (N, 2).")
        given, nothing = iter(own), {"segments": []}
        for is_query in mask:  # those that are padding may have an entry, or none
            one = next(given) if is_query or len(own) == len(mask) else nothing
            segments = one["segments"] if is_query else []
            flat.append({"segments": segments, "class_labels": torch.zeros(len(segments), dtype=torch.long)})
    return flat


__all__ = [
    "ConvTransformerBackbone",
    "ConvTransformerBackboneOutput",
    "ConvTransformerForMomentRetrieval",
    "ConvTransformerForTemporalActionLocalization",
    "ConvTransformerModel",
    "ConvTransformerModelOutput",
    "ConvTransformerMomentRetrievalOutput",
    "ConvTransformerPreTrainedModel",
    "ConvTransformerSegmentFeaturesOutput",
    "ConvTransformerTemporalActionLocalizationOutput",
]
