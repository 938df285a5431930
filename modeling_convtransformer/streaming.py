"""Streaming inference with causal models: features in as they arrive, final segments out.

    stream = ConvTransformerStream(model, feature_extractor, threshold=0.3, delay=1.0)
    for features in source:                      # (time, channels), any number of steps
        for segment in stream.push(features):    # {"label", "score", "start", "end"}, in seconds; never taken back
            ...
    rest = stream.finish()

A causal model looks back only, so that what it computed stays right when more arrives. `IncrementalDetector` keeps what
later steps look back to: the last inputs of every convolution and pooling, and the keys and values of every attention (all
of them where attention is global, those of the last half window where it is not). Its outputs are those of one forward over
everything pushed so far, up to rounding, whatever the chunking. `ConvTransformerStream` makes segments of them.

Read from top to bottom: what is kept, layers, blocks, neck, heads, the detector, the stream of segments. All tensors are
`(1, time, channels)`: the steps that are new. A layer to which nothing new came out of the one before is not called.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .feature_extraction_convtransformer import (
    _POST_PROCESSING,
    ConvTransformerFeatureExtractor,
    _best,
    _check_settings,
    _sigmoid,
    _to_seconds,
    decay,
    overlap,
    suppress,
    window_features,
)
from .modeling_convtransformer import (
    ConvBlock,
    ConvHead,
    ConvTransformerBlock,
    ConvTransformerEmbedding,
    ConvTransformerForTemporalActionLocalization,
    ConvTransformerTemporalActionLocalizationOutput,
    FeaturePyramidNeck,
    IdentityNeck,
    MaskedConv1d,
    sinusoidal_positions,
)

# Steps that are computed together: a longer push is cut, so that the mask between new queries and keys stays small.
_PIECE = 128


# ---------------------------------------------------------------------------------------------------------------------
# What is kept


class Tail:
    """The last inputs of a layer whose output i reads the inputs i * stride - look_back to i * stride."""

    def __init__(self, look_back: int, stride: int = 1, before: float = 0.0):
        self.look_back, self.stride = look_back, stride
        self.before = before  # what a layer reads before the first input
        self.inputs: torch.Tensor | None = None
        self.skip = 0  # coming inputs that no output reads (a kernel that is shorter than the stride)

    def extend(self, x: torch.Tensor) -> torch.Tensor | None:
        """All that the next outputs read, (1, look_back + (outputs - 1) * stride + 1, channels); None: none is due."""
        if self.inputs is None:
            self.inputs = x.new_full((1, self.look_back, x.shape[2]), self.before)
        skipped = min(self.skip, x.shape[1])
        inputs = torch.cat((self.inputs, x[:, skipped:]), dim=1)
        outputs = max(0, (inputs.shape[1] - self.look_back - 1) // self.stride + 1)
        self.skip += max(0, outputs * self.stride - inputs.shape[1]) - skipped
        self.inputs = inputs[:, outputs * self.stride :].clone()  # a view would hold on to all of it
        return inputs[:, : self.look_back + (outputs - 1) * self.stride + 1] if outputs else None

    @property
    def bytes(self) -> int:
        return 0 if self.inputs is None else self.inputs.nbytes


class KeyValueCache:
    """
    The keys and values of one attention that later queries see: the last `keep`, or all (`None`). There are as many heads
    as key heads. Room for some more is kept, so that most pushes copy nothing but what is new.
    """

    def __init__(self, keep: int | None):
        self.keep = keep
        self.store: torch.Tensor | None = None  # (2, key heads, room, channels of a head)
        self.stop = 0  # places of the store that are filled

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds (1, key heads, new, channels of a head); returns what is seen by the new queries together, views."""
        new = torch.cat((key, value))
        start = 0 if self.keep is None else max(0, self.stop - self.keep)
        stop = self.stop + new.shape[2]
        if self.store is None or stop > self.store.shape[2]:
            seen = stop - start
            store = new.new_empty(2, new.shape[1], seen + max(8, seen // 8), new.shape[3])
            if self.store is not None:
                store[:, :, : self.stop - start] = self.store[:, :, start : self.stop]
            self.store, start, stop = store, 0, seen
        self.store[:, :, stop - new.shape[2] : stop] = new
        self.stop = stop
        keys, values = self.store[:, :, start:stop].split(1)
        return keys, values

    @property
    def bytes(self) -> int:
        return 0 if self.store is None else self.store.nbytes


# ---------------------------------------------------------------------------------------------------------------------
# Layers


class StreamedConv:
    """
    A convolution of the model and its tail. It is computed as a matrix product of windows and kernel, which for a few
    steps is several times as fast as a convolution's own kernel on the CPU.

    Raises:
        ValueError: the layer is another than the model's own, such as an adapter around it.
    """

    def __init__(self, conv: MaskedConv1d):
        if type(conv).__name__ != "MaskedConv1d":  # (by name: remote code has classes of its own)
            raise ValueError(
                f"The model has a {type(conv).__name__} in the place of a convolution. Merge adapters of convolutions before "
                "streaming, model = model.merge_and_unload(), and convert a model that was prepared for quantization."
            )
        self.conv = conv
        self.tail = Tail(conv.look_back, conv.stride[0])
        self.compute = self._depthwise if conv.groups > 1 else self._dense
        # A kernel of 8 bits whose inputs are rounded too: only the layer itself knows how.
        if conv.groups == conv.stride[0] == 1 and getattr(conv.weight, "act_quant_kwargs", None) is not None:
            self.compute = conv._sum_rounded_taps

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        inputs = self.tail.extend(x)
        return None if inputs is None else self.compute(inputs)

    def _dense(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(self._windows(inputs).flatten(2), self.conv.kernel().flatten(1), self.conv.bias)

    def _depthwise(self, inputs: torch.Tensor) -> torch.Tensor:
        output = (self._windows(inputs) * self.conv.kernel()[:, 0]).sum(dim=-1)
        return output if self.conv.bias is None else output + self.conv.bias

    def _windows(self, inputs: torch.Tensor) -> torch.Tensor:
        """(1, outputs, channels, kernel size), a view."""
        return inputs.unfold(1, self.conv.kernel_size[0], self.conv.stride[0])


class Tower:
    """Convolutions, each with norm and ReLU: those of the embedding, or of a head at one level."""

    def __init__(self, convs: nn.ModuleList, norms: nn.ModuleList):
        self.layers = [(StreamedConv(conv), norm) for conv, norm in zip(convs, norms, strict=True)]
        self.tails = [conv.tail for conv, _ in self.layers]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm in self.layers:
            x = F.relu(norm(conv(x), None))
        return x


class StreamedEmbedding:
    """
    Raises:
        ValueError: (when called) steps beyond the position table.
    """

    def __init__(self, embedding: ConvTransformerEmbedding, config, device: torch.device):
        self.embedding = embedding
        self.tower = Tower(embedding.convs, embedding.norms)
        self.tails = self.tower.tails
        self.positions = getattr(embedding.positions, "table", None)
        if config.use_abs_pe:
            self.positions = sinusoidal_positions(config.max_len, config.n_embd, device)

    def check(self, stop: int):
        if self.positions is not None and stop > len(self.positions):
            raise ValueError(
                f"The stream would be {stop} steps long, but the model's table of positions (use_abs_pe or use_learned_pe) "
                f"has max_len={len(self.positions)}, and a whole-sequence forward stretches it over a length that a stream "
                "cannot know. finish() and reset() before, or train a model with use_rope."
            )

    def __call__(self, x: torch.Tensor, first: int) -> torch.Tensor:
        if self.embedding.streams is not None:
            parts = x.split(self.embedding.stream_widths, dim=-1)
            x = torch.cat([project(part) for project, part in zip(self.embedding.streams, parts, strict=True)], dim=-1)
        x = self.tower(x)
        return x if self.positions is None else x + self.positions[first : first + x.shape[1]].to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


class StreamedPooling:
    """The skip path of a branch block."""

    def __init__(self, stride: int):
        self.tail = Tail(stride, stride, before=-math.inf)

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        inputs = self.tail.extend(x)
        return None if inputs is None else inputs.unfold(1, self.tail.stride + 1, self.tail.stride).amax(dim=-1)


class StreamedTransformerBlock:
    """
    Calls scaled_dot_product_attention whatever the model's `attn_implementation`: all backends compute the same, but a mask
    of new queries against old keys has another form in each, and flash kernels take no relative bias. Queries that share a
    key head are laid side by side, as more queries of that head, so that no key is repeated or read twice.
    """

    def __init__(self, block: ConvTransformerBlock, stride: int):
        attn = block.attn
        self.block, self.attn = block, attn
        self.convs = [StreamedConv(conv) for conv in (attn.query_conv, attn.key_conv, attn.value_conv)]
        self.half = attn.window // 2 if attn.window > 1 else None
        self.cache = KeyValueCache(self.half)
        self.tails = [conv.tail for conv in self.convs]
        self.pool = block.pool_skip
        if stride > 1:
            self.pool = StreamedPooling(stride)
            self.tails.append(self.pool.tail)

    def __call__(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor | None:
        block, attn = self.block, self.attn
        skipped, normed = self.pool(x), block.ln1(x, None)
        query, key, value = (conv(normed) for conv in self.convs)
        if skipped is None:
            return None
        query = attn._heads(attn.q_proj(attn.query_norm(query, None)), rotary)
        key = attn._heads(attn.k_proj(attn.key_norm(key, None)), rotary)
        value = attn._heads(attn.v_proj(attn.value_norm(value, None)))
        attended = attn.o_proj(self._attend(query, *self.cache.extend(key, value)))
        x = block.drop_path_attn(skipped, attended)
        return block.drop_path_mlp(x, block.mlp(block.ln2(x, None)))

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(1, heads, new, channels of a head) to (1, new, channels); the last keys are those of the new steps."""
        groups, steps = query.shape[1] // key.shape[1], query.shape[2]
        mask = self._mask(steps, key.shape[2], query)
        query = query.unflatten(1, (-1, groups)).flatten(2, 3)
        output = F.scaled_dot_product_attention(query, key, value, mask, scale=self.attn.scaling)
        return output.unflatten(2, (groups, steps)).flatten(1, 2).transpose(1, 2).flatten(2)

    def _mask(self, steps: int, seen: int, query: torch.Tensor) -> torch.Tensor | None:
        """What queries see, or what is added to scores, for the queries of each key head: (..., groups * steps, seen)."""
        bias, groups = self.attn.relative_bias, self.attn.num_key_value_groups
        if steps == 1 and bias is None:
            return None  # the cache holds what one query sees, and nothing else
        places = torch.arange(seen, device=query.device)
        offsets = places[None, :] - places[seen - steps :, None]  # key minus query
        mask = offsets <= 0
        if self.half is not None:
            mask &= offsets >= -self.half
        if bias is None:
            return mask.repeat(groups, 1)
        reach = bias.shape[-1] // 2  # where attention is global, what lies beyond has the bias of the outermost
        scores = bias[:, (offsets + reach).clamp(0, 2 * reach)].to(query.dtype)
        return torch.where(mask, scores, -math.inf).unflatten(0, (-1, groups)).flatten(1, 2)[None]


class StreamedConvBlock:
    """v1's block without attention."""

    def __init__(self, block: ConvBlock, stride: int):
        self.conv1, self.conv2 = StreamedConv(block.conv1), StreamedConv(block.conv2)
        self.tails = [self.conv1.tail, self.conv2.tail]
        self.downsample = block.downsample
        if stride > 1:
            self.downsample = StreamedConv(block.downsample)
            self.tails.append(self.downsample.tail)

    def __call__(self, x: torch.Tensor, rotary: None) -> torch.Tensor | None:
        skipped, output = self.downsample(x), self.conv1(x)
        return None if output is None else F.relu(self.conv2(F.relu(output)) + skipped)


BLOCKS = {"convTransformer": StreamedTransformerBlock, "conv": StreamedConvBlock}


# ---------------------------------------------------------------------------------------------------------------------
# Neck and heads


class StreamedIdentityNeck:
    def __init__(self, neck: IdentityNeck):
        self.norms, self.tails = neck.norms, []

    def __call__(self, levels: list[torch.Tensor | None], firsts: list[int]) -> list[torch.Tensor | None]:
        return [None if x is None else norm(x, None) for norm, x in zip(self.norms, levels, strict=True)]


class StreamedPyramidNeck:
    """Step t of a level adds step t // scale of the coarser one, which is there: it stands at or before t, in features."""

    def __init__(self, neck: FeaturePyramidNeck):
        self.neck = neck
        self.convs = [StreamedConv(conv) for conv in neck.convs]
        # The last step of each coarser level, which finer steps to come still add.
        self.coarser = [Tail(1) for _ in neck.convs[1:]]
        self.tails = [*(conv.tail for conv in self.convs), *self.coarser]

    def __call__(self, levels: list[torch.Tensor | None], firsts: list[int]) -> list[torch.Tensor | None]:
        scale, merged = self.neck.scale_factor, list(levels)
        for level in reversed(range(len(levels))):
            if levels[level] is None:
                continue
            merged[level] = self.neck.laterals[level](levels[level])
            if level + 1 < len(levels):
                steps = torch.arange(
                    firsts[level], firsts[level] + merged[level].shape[1], device=merged[level].device
                )
                known = self._known(level, merged[level + 1])
                merged[level] = merged[level] + known[:, steps // scale - (firsts[level + 1] - 1)]
        return [
            None if x is None else norm(conv(x), None)
            for norm, conv, x in zip(self.neck.norms, self.convs, merged, strict=True)
        ]

    def _known(self, level: int, coarser: torch.Tensor | None) -> torch.Tensor:
        """The coarser level's last step before this push, and its new ones."""
        return self.coarser[level].inputs if coarser is None else self.coarser[level].extend(coarser)


NECKS = {"identity": StreamedIdentityNeck, "fpn": StreamedPyramidNeck}


class StreamedHead:
    """A head at one level."""

    def __init__(self, head: ConvHead):
        self.tower, self.output = Tower(head.convs, head.norms), StreamedConv(head.output)
        self.tails = [*self.tower.tails, self.output.tail]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.tower(x))


# ---------------------------------------------------------------------------------------------------------------------
# The detector


@dataclass
class StreamOutput(ConvTransformerTemporalActionLocalizationOutput):
    """
    What one push has computed: the points at the steps that were pushed, finest level first, each level in order of time.

    Args:
        point_positions (`torch.LongTensor` of shape `(1, points)`):
            Where each point stands on the feature grid, counted from the first step of the stream.
        logits, pred_segments, point_mask, point_levels: as of the model, for the new points.
    """

    point_positions: torch.LongTensor | None = None


class IncrementalDetector:
    """
    A causal detector whose forward goes on where the last one ended. Over a stream, the outputs are those of one forward
    over all of it: `logits` and `pred_segments` of each point once, in the push whose step the point stands at.

    Args:
        model: a `ConvTransformerForTemporalActionLocalization` with `is_causal=True`, in evaluation mode. It is not changed,
            and many streams may share it.

    Raises:
        ValueError: a model that cannot be streamed; the message says why.
    """

    def __init__(self, model: ConvTransformerForTemporalActionLocalization):
        check_model(model)
        self.model = model
        self.reset()

    def reset(self):
        """Forgets all that was pushed."""
        model, config = self.model, self.model.config
        self.position = 0  # steps pushed so far
        self.is_whole = True  # no push was interrupted halfway
        self.embedding = StreamedEmbedding(model.model.embedding, config, model.device)
        make_block = BLOCKS[config.backbone_type]
        self.stem = [make_block(block, 1) for block in model.model.stem]
        self.branch = [make_block(block, config.scale_factor) for block in model.model.branch]
        self.neck = NECKS[config.fpn_type](model.neck)
        levels = range(len(config.detector_strides))
        self.class_heads = [StreamedHead(model.class_head) for _ in levels]
        self.segment_heads = [StreamedHead(model.segment_head) for _ in levels]

    @torch.no_grad()
    def push(self, features: torch.Tensor) -> StreamOutput:
        """
        Args:
            features: (time, n_in), any number of steps; one step may be (n_in,).

        Returns:
            the new points; none if no step was pushed, or if a detector without the finest levels
            (`fpn_start_level`) has no point there.

        Raises:
            ValueError: features of another shape or width, with values that are not finite, beyond the position table of the
                model, or a model in training mode (nothing has changed then); or an earlier push ended halfway.
        """
        if self.model.training:
            raise ValueError("The model was put into training mode; call model.eval() before streaming.")
        if not self.is_whole:
            raise ValueError(
                "An earlier push ended halfway, in an error or an interrupt; call reset() to begin again."
            )
        width = sum(self.model.config.stream_widths)
        features = check_values(features, width, "features", self.position)
        self.embedding.check(self.position + len(features))
        # (at least one piece, so that a push of nothing has outputs of the right shapes)
        self.is_whole = False
        pieces = [self._forward(piece[None]) for piece in features.split(_PIECE)]
        self.is_whole = True
        if len(pieces) == 1:
            return StreamOutput(**pieces[0])
        joined = {name: torch.cat([piece[name] for piece in pieces], dim=1) for name in pieces[0]}
        order = joined["point_levels"][0].argsort(stable=True)
        return StreamOutput(**{name: value[:, order] for name, value in joined.items()})

    def _forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        model, config = self.model.model, self.model.config
        before, self.position = self.position, self.position + x.shape[1]
        # The steps of each level that are new: from `firsts` to before `stops`.
        firsts = [-(-before // stride) for stride in config.strides]
        stops = [-(-self.position // stride) for stride in config.strides]
        x = x.to(device=self.model.device, dtype=self.model.dtype)
        rotary: list[tuple | None] = [None] * config.num_levels
        if model.rotary_emb is not None:
            for level, (first, stop) in enumerate(zip(firsts, stops, strict=True)):
                if first < stop:
                    rotary[level] = model.rotary_emb(x, torch.arange(first, stop, device=x.device)[None])

        levels: list[torch.Tensor | None] = [None] * config.num_levels
        if x.shape[1]:
            levels[0] = self.embedding(x, before)
        for index, block in enumerate([*self.stem, *self.branch]):
            level = max(index + 1 - len(self.stem), 0)
            x = levels[max(level - 1, 0)]
            if x is None:
                break
            levels[level] = block(x, rotary[level])

        start = config.fpn_start_level
        features = self.neck(levels[start:], firsts[start:])
        return self._points(features, firsts[start:])

    def _points(self, features: list[torch.Tensor | None], firsts: list[int]) -> dict[str, torch.Tensor]:
        model, device = self.model, self.model.device
        parts = []
        for level, (x, stride) in enumerate(zip(features, model.config.detector_strides, strict=True)):
            if x is None:
                continue
            logits, offsets = self.class_heads[level](x), self.segment_heads[level](x)
            offsets = F.relu(offsets.float() * model.segment_head.scale[level].float())
            positions = torch.arange(firsts[level], firsts[level] + x.shape[1], device=device)[None] * stride
            points = positions.float()
            segments = (points - offsets[..., 0] * stride, points + offsets[..., 1] * stride)
            parts.append((logits, torch.stack(segments, dim=-1), torch.full_like(positions, level), positions))
        if not parts:
            logits = torch.zeros(1, 0, model.config.num_labels, dtype=model.dtype, device=device)
            positions = torch.zeros(1, 0, dtype=torch.long, device=device)
            parts = [(logits, torch.zeros(1, 0, 2, device=device), positions, positions)]
        logits, segments, levels, positions = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return {
            "logits": logits,
            "pred_segments": segments,
            "point_mask": torch.ones_like(levels),
            "point_levels": levels,
            "point_positions": positions,
        }

    @property
    def cache_bytes(self) -> dict[str, int]:
        """Memory that the stream holds: `keys_values`, and `tails` of convolutions and pooling."""
        blocks = [*self.stem, *self.branch]
        owners = [self.embedding, *blocks, self.neck, *self.class_heads, *self.segment_heads]
        return {
            "keys_values": sum(block.cache.bytes for block in blocks if hasattr(block, "cache")),
            "tails": sum(tail.bytes for owner in owners for tail in owner.tails),
        }


def check_model(model):
    """
    Raises:
        ValueError: the model cannot be streamed.
    """
    if type(model).__name__ != "ConvTransformerForTemporalActionLocalization":  # (remote code has classes of its own)
        raise ValueError(
            f"The model is a {type(model).__name__}; expected a ConvTransformerForTemporalActionLocalization. (Moment retrieval "
            "cannot be streamed. Of a PEFT model, pass model.merge_and_unload().)"
        )
    config = model.config
    if not config.is_causal:
        raise ValueError(
            "The model is not causal: its outputs change when more features arrive. Streaming needs a model with is_causal=True "
            "in its configuration, and weights that were trained so; setting it on other weights makes them wrong."
        )
    if model.training:
        raise ValueError("The model is in training mode; call model.eval() before streaming.")
    if missing := model.untrained_weights:
        raise ValueError(
            f"The checkpoint lacked {len(missing)} tensors of this model, such as {sorted(missing)[0]!r}, which are random "
            "now; load one of a trained detector."
        )
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if model.model.rotary_emb is not None and rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"rope_parameters has rope_type {rope_type!r}, whose frequencies go by the length of the whole recording, which is not "
            "known before its end: the keys that a stream has kept would be turned by others. 'default', 'linear', 'yarn' and "
            "'llama3' can be streamed."
        )


def check_values(values, width: int, kind: str, before: int) -> torch.Tensor:
    """
    An array or a tensor (time, width), or (width,) for one step, as a tensor (time, width) of floating point.

    Args:
        kind: "features" or "signal".
        before: how many steps (samples) the stream has had, so that a message can say where.

    Raises:
        ValueError: another shape, no numbers, or values that are not finite.
    """
    axis, one = {"features": ("time", "step"), "signal": ("samples", "sample")}[kind]
    expected = f"expected numbers ({axis}, {width}), or ({width},) for one {one}"
    if isinstance(values, torch.Tensor):
        array = values.detach()
    else:
        try:
            array = np.asarray(values)
        except ValueError as error:  # steps of different widths
            raise ValueError(f"{kind}: no array ({error}); {expected}.") from error
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{kind} of shape {array.shape} and dtype {array.dtype}; {expected}.")
        # (a copy, because torch does not take every array that numpy can make)
        array = torch.from_numpy(array.astype(np.float64 if array.dtype == np.float64 else np.float32))
    if array.ndim == 1 and len(array) == width:
        array = array[None]
    if array.is_complex() or array.ndim != 2 or array.shape[1] != width:
        advice = ""
        if array.ndim == 2 and array.shape[0] == width:
            advice = f" If this is (channels, {axis}), transpose it: {kind}.T."
        elif array.ndim == 3:
            advice = " A stream is one recording: make one stream for each, and push without the batch dimension."
        raise ValueError(f"{kind} of shape {tuple(array.shape)} and dtype {array.dtype}; {expected}.{advice}")
    array = array if array.is_floating_point() else array.float()
    finite = array.isfinite()
    if not finite.all():
        row, channel = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{kind} with {int((~finite).sum())} values that are NaN or infinite, the first at {one} {before + row} of the "
            f"stream ({row} of this push), channel {channel} ({array[row, channel].item()}). Nothing of this push was used: "
            "push it again with these values filled in (torch.nan_to_num, if zeros are right)."
        )
    return array


# ---------------------------------------------------------------------------------------------------------------------
# Segments


@dataclass(eq=False)  # compared by identity
class Cluster:
    """
    Candidates of one class that are connected by overlaps, to be suppressed together. `start` and `end` of all of them on
    the grid; `first` is the step at which the first one arrived.
    """

    group: int
    start: float
    end: float
    first: int
    candidates: list[tuple] = field(default_factory=list)  # (level, -score, position, label, start, end)

    def take(self, other: "Cluster"):
        self.start, self.end = min(self.start, other.start), max(self.end, other.end)
        self.first = min(self.first, other.first)
        self.candidates += other.candidates


class ConvTransformerStream:
    """
    Segments of a recording that is still going on, each as soon as it is final.

    Suppression acts between overlapping candidates of one class only, so that candidates fall into clusters, connected in
    time, that have nothing to do with one another. When the last step pushed is `delay` seconds past the end of a cluster,
    it is closed: suppression runs on it alone, and what is left is returned and never taken back. (A candidate may end in
    the future, as the model predicts ends: then its cluster waits for that.)

    If no later candidate reaches back into a closed cluster, all segments together are those of the pipeline over the whole
    recording. A candidate contains its own point, so one that reaches back has a distance to its start of more than
    `delay`: a `delay` of the longest action rules it out, `math.inf` always. Where one does reach back, what was returned
    stands: its score is first weighed down by the segments returned before, exactly as if suppression had chosen them
    first. The segments do not depend on how the stream is cut into pushes.

    What is counted over a whole recording cannot be done while it goes on: `pre_nms_topk` is not applied, `max_seg_num` is
    of one cluster, and no segment below `min_score` is returned (in the pipeline the best one of each class is).

    Args:
        model: as in `IncrementalDetector`.
        feature_extractor: the model's; its geometry gives seconds, its settings are those of post-processing.
        threshold: only segments with a score above this. Candidates below it cannot change those above, and are
            dropped at once: the higher it is, the earlier clusters end.
        delay: seconds past the end of a cluster after which it is closed.
        max_wait: seconds after which a cluster is closed whatever its end, counted from its first candidate. Without
            it, candidates that overlap one another without end are kept until `finish`.
        geometry: any of `fps`, `feature_stride`, `num_frames` where they differ from the feature extractor's.
        settings: replace the feature extractor's post-processing settings.

    Raises:
        ValueError: a model that cannot be streamed, a feature extractor of another model, or settings that a stream
            cannot follow; the message says what to do.
    """

    def __init__(
        self,
        model: ConvTransformerForTemporalActionLocalization,
        feature_extractor: ConvTransformerFeatureExtractor,
        threshold: float = 0.0,
        delay: float = 0.0,
        max_wait: float | None = None,
        geometry: dict | None = None,
        **settings,
    ):
        self.detector = IncrementalDetector(model)
        width = sum(model.config.stream_widths)
        if getattr(feature_extractor, "feature_size", None) != width:
            raise ValueError(
                f"The feature extractor has feature_size {getattr(feature_extractor, 'feature_size', None)}, but the model takes "
                f"features of width {width} (n_in). Load both from one checkpoint."
            )
        for name, value in (("threshold", threshold), ("delay", delay), ("max_wait", max_wait)):
            if value is not None and not value >= 0:
                raise ValueError(f"{name} is {value!r}; expected a number, 0 or more.")
        if unknown := sorted(set(settings) - set(_POST_PROCESSING)):
            raise ValueError(f"Unknown settings: {', '.join(unknown)}. Known: {', '.join(_POST_PROCESSING)}.")
        own = {name: getattr(feature_extractor, name) for name in _POST_PROCESSING}
        self.settings = _check_settings({**own, **settings})
        if not self.settings["multiclass_nms"] and self.settings["voting_thresh"] > 0:
            raise ValueError(
                "Class-agnostic suppression with voting moves segments by candidates of any score, which a stream would have to "
                "keep. Pass voting_thresh=0, or multiclass_nms=True."
            )
        if self.settings["nms_method"] == "hard" and self.settings["iou_threshold"] == 0:
            raise ValueError(
                "nms_method 'hard' with iou_threshold 0 lets the best segment of a class remove all others, wherever they are: "
                "none is final before the end. Pass an iou_threshold above 0."
            )
        self.feature_extractor = feature_extractor
        self.geometry = feature_extractor._geometry(geometry, "geometry")
        self.threshold, self.delay, self.max_wait = threshold, delay, max_wait
        steps_per_second = self.geometry["fps"] / self.geometry["feature_stride"]
        self._delay = delay * steps_per_second
        self._max_wait = math.inf if max_wait is None else max_wait * steps_per_second
        # How far back a segment can reach at most, by what the model was trained on.
        self._reach = max(high for _, high in model.config.detector_ranges)
        self.reset()

    def reset(self):
        """Begins a new recording."""
        self.detector.reset()
        self.is_finished = False
        self._open: list[Cluster] = []
        self._returned: list[tuple[int, float, float]] = []  # group, start and end on the grid
        self._samples: torch.Tensor | None = None  # of a signal: those that later windows read
        self._skip = self._sample_count = 0

    @property
    def now(self) -> float | None:
        """Where the last step that was pushed stands, in seconds; None before the first."""
        position = self.detector.position
        return _to_seconds(position - 1, self.geometry) if position else None

    @property
    def cache_bytes(self) -> dict[str, int]:
        """Memory that the model's state takes: `keys_values`, and `tails` of convolutions and pooling."""
        return self.detector.cache_bytes

    def push(self, features=None, signal=None) -> list[dict]:
        """
        Args:
            features: array or tensor (time, channels) of any number of steps, 0 too; one step may be (channels,).
            signal: instead, for models of raw windows, raw values (samples, channels); windows are cut of them as soon as
                they are full (`num_frames` samples, one each `feature_stride`).

        Returns:
            the segments that became final, `{"label": str, "score": float, "start": float, "end": float}` in seconds; those
            whose cluster closed first come first, of one cluster the best.

        Raises:
            ValueError: as `IncrementalDetector.push`; neither or both of the arguments, or now features and then a signal;
                or the stream is finished. Nothing has changed then.
        """
        if self.is_finished:
            raise ValueError("The stream is finished; call reset() to begin another recording.")
        if (features is None) == (signal is None):
            raise ValueError("push takes either features or signal; give one of them.")
        if signal is not None:
            if self._samples is None and self.detector.position:
                raise ValueError("signal after features: a stream takes one kind. Call reset() for another recording.")
            features = self._cut(signal)
        elif self._samples is not None:
            raise ValueError("features after signal: a stream takes one kind. Call reset() for another recording.")
        return self._collect(self.detector.push(features))

    def finish(self, duration: float | None = None) -> list[dict]:
        """
        Ends the recording.

        Args:
            duration: of the recording in seconds, to which the segments that come now are clipped, as in the pipeline; that of
                a signal is known. (Earlier ones ended before, unless `max_wait` or `nms_method="none"` did not wait for it.)

        Returns:
            the segments that were not final yet, in the order of `push`.
        """
        if self.is_finished:
            raise ValueError("The stream is finished already; call reset() to begin another recording.")
        if duration is None and self._samples is not None:
            duration = self._sample_count / self.geometry["fps"]
        geometry = self.feature_extractor._geometry({**self.geometry, "duration": duration}, "finish")
        self.is_finished = True
        return self._close(math.inf, geometry)

    def _cut(self, signal) -> torch.Tensor:
        """The windows that are full, as features."""
        geometry, width = self.geometry, self.feature_extractor.feature_size
        sizes = (geometry["num_frames"], geometry["feature_stride"])
        if any(size != int(size) for size in sizes) or width % int(sizes[0]):
            raise ValueError(
                f"A signal is cut into windows of num_frames={sizes[0]} samples, one each feature_stride={sizes[1]}, each "
                f"num_frames * channels wide: expected whole numbers, and a feature_size ({width}) that num_frames divides. "
                "Push features, if the model does not take raw windows."
            )
        window, stride = map(int, sizes)
        channels = width // window
        new = check_values(signal, channels, "signal", self._sample_count).cpu()
        if self.detector.model.training:  # before anything changes
            raise ValueError("The model was put into training mode; call model.eval() before streaming.")
        kept = new[:0] if self._samples is None else self._samples
        samples = torch.cat((kept, new[self._skip :]))
        count = max(0, (len(samples) - window) // stride + 1)
        self.detector.embedding.check(self.detector.position + count)
        self._sample_count += len(new)
        self._skip = max(0, self._skip - len(new)) + max(0, count * stride - len(samples))
        self._samples = samples[count * stride :].clone()
        if not count:
            return torch.zeros(0, width)
        return torch.from_numpy(window_features(samples.numpy(), window, stride))

    def _collect(self, outputs: StreamOutput) -> list[dict]:
        """Takes in new candidates step by step, however many steps this push has, and closes clusters between them."""
        found, now = [], self.detector.position - 1
        for candidate in self._candidates(outputs):
            _, _, position, label, start, end = candidate
            found += self._close(position - 1, self.geometry)
            group = label if self.settings["multiclass_nms"] else 0
            cluster = Cluster(group, start, end, position, [candidate])
            touched = [other for other in self._open if self._touches(cluster, other)]
            for other in touched:
                cluster.take(other)
            self._open = [*(other for other in self._open if other not in touched), cluster]
        found += self._close(now, self.geometry)
        # What a candidate that is open or to come can reach back to.
        earliest = min([now, *(cluster.first for cluster in self._open)])
        self._returned = [one for one in self._returned if earliest - one[2] <= self._reach]
        return found

    def _candidates(self, outputs: StreamOutput) -> list[tuple]:
        """Those that may be returned, as a `Cluster` holds them, in order of time."""
        scores = _sigmoid(outputs.logits[0].float().cpu().numpy())
        segments = outputs.pred_segments[0].cpu().numpy()
        levels, positions = outputs.point_levels[0].tolist(), outputs.point_positions[0].tolist()
        long_enough = segments[:, 1] - segments[:, 0] > self.settings["duration_thresh"]
        chosen = (scores > self.settings["pre_nms_thresh"]) & self._is_high(scores) & long_enough[:, None]
        candidates = [
            (levels[point], -scores[point, label].item(), positions[point], label, *segments[point].tolist())
            for point, label in np.argwhere(chosen).tolist()
        ]
        return sorted(candidates, key=lambda candidate: candidate[2])

    def _is_high(self, scores: np.ndarray) -> np.ndarray:
        """Which scores can be returned. A lower one would be chosen after all of these, and weigh down none of them."""
        high = scores > self.threshold
        if self.settings["nms_method"] == "hard":
            high &= scores > self.settings["min_score"]
        elif self.settings["nms_method"] != "none":
            high &= scores >= self.settings["min_score"]
        return high

    def _touches(self, one: Cluster, other: Cluster) -> bool:
        if self.settings["nms_method"] == "none":  # each candidate is final by itself
            return False
        return one.group == other.group and one.start < other.end and other.start < one.end

    def _closing(self, cluster: Cluster) -> float:
        """The step from which a cluster is closed."""
        if self.settings["nms_method"] == "none":
            return cluster.first
        return min(cluster.end + self._delay, cluster.first + self._max_wait)

    def _close(self, step: float, geometry: dict) -> list[dict]:
        closed = [cluster for cluster in self._open if self._closing(cluster) <= step]
        if not closed:
            return []
        self._open = [cluster for cluster in self._open if self._closing(cluster) > step]
        return [
            segment for cluster in sorted(closed, key=self._closing) for segment in self._suppress(cluster, geometry)
        ]

    def _suppress(self, cluster: Cluster, geometry: dict) -> list[dict]:
        """The segments of a cluster that is closed."""
        settings = self.settings
        # In the order of post-processing, on which it depends who comes first of equal scores: levels, then scores, then time.
        _, scores, _, labels, starts, ends = zip(*sorted(cluster.candidates), strict=True)
        segments, scores = np.array([starts, ends], dtype=np.float32).T, -np.array(scores, dtype=np.float32)
        found = {"scores": scores, "labels": np.array(labels), "segments": segments}
        if settings["nms_method"] != "none":
            method = {"method": settings["nms_method"], "iou_threshold": settings["iou_threshold"]}
            method["sigma"] = settings["nms_sigma"]
            for group, start, end in self._returned:
                if group == cluster.group and cluster.first - end <= self._reach:
                    earlier = (np.float32(start), np.float32(end))
                    scores = scores * decay(overlap((segments[:, 0], segments[:, 1]), earlier), **method)
            high = np.flatnonzero(self._is_high(scores))
            kept, found["scores"] = suppress(
                segments[high],
                scores[high],
                np.zeros_like(high),
                **method,
                min_score=settings["min_score"],
                max_segments=settings["max_seg_num"],
            )
            found["labels"], found["segments"] = found["labels"][high[kept]], segments[high[kept]]
            above = found["scores"] > self.threshold
            found = _best({name: values[above] for name, values in found.items()}, settings["max_seg_num"])
            self._returned += [(cluster.group, start, end) for start, end in found["segments"].tolist()]
        seconds = np.clip(_to_seconds(found["segments"], geometry), 0.0, geometry["duration"]).tolist()
        names = self.detector.model.config.id2label
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), seconds, strict=True)
        return [
            {"label": names[label], "score": score, "start": start, "end": end} for label, score, (start, end) in rows
        ]


__all__ = ["ConvTransformerStream", "IncrementalDetector", "StreamOutput"]
