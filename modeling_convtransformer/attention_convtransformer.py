"""Attention over time: global or inside a window, with or without padding, under `eager` and `sdpa`.

A window is its full, odd width: step i sees the steps j with |i - j| <= window // 2 (as in ActionFormer's release,
v1), or, where attention is causal, those with i - window // 2 <= j <= i. A width of 1 or less is global attention.

Masks are made once for each level of the pyramid by `make_attention_mask` and shared by all blocks of that level.
`eager` builds the (time, time) scores: it is the plain definition that tests compare with, and the only backend that
returns attention weights. `sdpa` never does: global attention needs at most a mask over keys, and windows are folded
into blocks with their neighbourhood (`WindowFold`), which costs O(time * window) in time and memory.
"""

import torch
from torch import nn
from torch.nn import functional as F

# Queries in one block of folded attention, at the least. A block of `size` queries reads `size + window - 1` keys:
# larger blocks waste more products outside the band, smaller ones copy each key more often.
_MIN_BLOCK = 32


def make_attention_mask(
    implementation: str,
    valid: torch.Tensor | None,
    length: int,
    window: int,
    is_causal: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor | None:
    """
    The mask of one pyramid level, in the form that `attend` needs under this backend; `None` where nothing is masked.

    Args:
        implementation: `"eager"` or `"sdpa"`.
        valid: (batch, time) bool, True = valid; `None` = no padding.
        length: number of steps of the level.
        window: full width of the window in steps; 1 or less = global.
        is_causal: steps see no later steps.
        dtype: of the queries; an eager mask is additive and has it.
        device: of the mask.

    Returns:
        eager: (batch or 1, 1, time, time), 0 or the dtype's lowest value. sdpa: bool, True = may be seen; global
        (batch, 1, 1, time), or (batch, 1, time, time) if causal and padded; windowed (batch or 1, blocks, 1, size,
        size + window - 1). A query that may see nothing sees everything, so that its (unused) output stays finite.
    """
    window = window if 1 < window < 2 * length - 1 else 0
    if valid is None and not window and (not is_causal or implementation == "sdpa"):
        return None  # sdpa has a causal kernel of its own
    if implementation == "sdpa" and window:
        fold = WindowFold(length, window)
        mask = fold.band(is_causal, device)
        inside = (
            fold.fold_keys(valid) if valid is not None else fold.fold_keys(torch.ones(1, length, device=device).bool())
        )
        mask = mask & inside[:, :, None, None, :]
    elif implementation == "sdpa" and not is_causal:
        mask = valid[:, None, None, :]
    else:
        steps = torch.arange(length, device=device)
        offsets = steps[None, :] - steps[:, None]  # key minus query
        mask = torch.ones(length, length, dtype=torch.bool, device=device)
        if window:
            mask = offsets.abs() <= window // 2
        if is_causal:
            mask = mask & (offsets <= 0)
        mask = mask[None, None]
        if valid is not None:
            mask = mask & valid[:, None, None, :]
    mask = mask | ~mask.any(dim=-1, keepdim=True)
    if implementation == "eager":
        return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, torch.finfo(dtype).min)
    return mask


def attend(
    module: nn.Module,
    interface,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    relative_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Calls a function of transformers' attention interface, folding windows for a backend that has none of its own.

    Args:
        module: the attention module; its `window` and `is_causal` say what the mask was made for.
        interface: the attention function.
        query: (batch, heads, time, channels of a head); key and value alike, with as many or fewer heads.
        attention_mask: from `make_attention_mask`.
        relative_bias: (heads, window), added to the scores of the offsets -(window // 2) ... window // 2.

    Returns:
        (batch, time, heads, channels of a head), and the weights (batch, heads, time, time) under eager, else `None`.
    """
    length = query.shape[2]
    fold = None
    if attention_mask is not None and attention_mask.dim() == 5:
        fold = WindowFold(length, module.window)
        query, key, value = (
            fold.fold_queries(query),
            fold.fold_keys(key.transpose(1, 2)),
            fold.fold_keys(value.transpose(1, 2)),
        )
        batch, blocks = query.shape[:2]
        attention_mask = attention_mask.expand(batch, -1, -1, -1, -1).flatten(0, 1)
        query, key, value = (x.flatten(0, 1).transpose(1, 2) for x in (query, key, value))
    if relative_bias is not None:
        if attention_mask is None and module.is_causal:
            # A mask takes the place of the backend's own causal kernel.
            attention_mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
        attention_mask = add_relative_bias(attention_mask, relative_bias, query, key, folded=fold is not None)
    output, weights = interface(module, query, key, value, attention_mask, **kwargs)
    if fold is not None:
        output = output.reshape(batch, blocks * fold.size, *output.shape[2:])[:, :length]
    return output, weights


def add_relative_bias(
    mask: torch.Tensor | None, table: torch.Tensor, query: torch.Tensor, key: torch.Tensor, folded: bool
) -> torch.Tensor:
    """An additive mask with a learned bias (`table`, (heads, window)) for each head and offset inside the window."""
    half = table.shape[-1] // 2
    rows = torch.arange(query.shape[2], device=query.device)
    columns = torch.arange(key.shape[2], device=query.device)
    # In a fold, the first key of a block stands half a window before its first query.
    offsets = columns[None, :] - rows[:, None] - (half if folded else 0)
    bias = table[:, (offsets + half).clamp(0, 2 * half)].to(query.dtype)[None]
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(query.dtype).min)
    return mask + bias


class WindowFold:
    """
    Cuts a sequence into blocks of queries, each beside the keys that its windows reach: block b holds the queries
    b * size ... (b + 1) * size - 1 and the keys from half a window before the first to half a window after the last.
    The last block is filled up with zeros, and so are keys beyond either end.
    """

    def __init__(self, length: int, window: int):
        self.length = length
        self.half = window // 2
        self.size = max(_MIN_BLOCK, 2 * self.half)
        self.blocks = -(-length // self.size)
        self.filled = self.blocks * self.size - length

    def fold_queries(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, heads, time, channels) to (batch, blocks, size, heads, channels)."""
        x = F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, self.filled))
        return x.unflatten(1, (self.blocks, self.size))

    def fold_keys(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, ...) to (batch, blocks, size + 2 * half, ...), with what each block's windows reach."""
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (self.half, self.half + self.filled))
        return x.unfold(1, self.size + 2 * self.half, self.size).movedim(-1, 2)

    def band(self, is_causal: bool, device: torch.device) -> torch.Tensor:
        """(1, 1, 1, size, size + 2 * half) bool: the keys of a block that lie inside each query's window."""
        rows = torch.arange(self.size, device=device)[:, None]
        columns = torch.arange(self.size + 2 * self.half, device=device)[None, :]
        last = 0 if is_causal else self.half
        return ((columns >= rows) & (columns <= rows + self.half + last))[None, None, None]


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as it is written: softmax of scaled scores in float32. Shapes as in `attend`."""
    groups = module.num_key_value_groups
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights, value).transpose(1, 2).contiguous()
    return output, weights
