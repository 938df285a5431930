"""Attention over time under every backend of transformers' attention interface: global or inside a window, with or
without padding, causal or not, with fewer key heads than query heads, with a learned relative bias; and over the words of a query.

A window is its full, odd width: step i sees the steps j with |i - j| <= window // 2 (as in ActionFormer's release,
v1), or, where attention is causal, those with i - window // 2 <= j <= i. A width of 1 or less is global attention.

Masks are made once for each level of the pyramid by `make_attention_mask` and shared by all blocks of that level; no
padding and no window is no mask at all, so that the fastest kernels stay eligible.

    backend                     mask                                  window                          cost of a window
    eager                       additive, (time, time)                in the mask                     time * time
    sdpa (and functions that    bool, over keys; or inside blocks     folded into blocks with their   time * window
      users register)                                                 neighbourhood (`WindowFold`)
    flex_attention              BlockMask                             in the mask, block by block     time * window
    flash_attention_2, _3, ...  (batch, time), 1 = valid              the kernel's own                time * window

Global attention with a relative bias is computed in blocks of queries by functions that take a bias as a mask only: a
block holds (heads, block, time) biases, and in training its backward pass makes them again. (A graph of torch.compile or
torch.export makes all at once, (heads, time, time); `flex_attention` makes none.)

`eager` is the plain definition that tests compare with, and the only backend that returns attention weights. Flash
kernels add nothing to the scores, so they cannot have a relative bias: `check_attention_backend` says so at load.
They also close up padded steps before they count those of a window, so with them padding belongs at the ends of a
recording, where every feature extractor puts it, and not in its middle.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils import is_torch_flex_attn_available
from transformers.utils.generic import is_flash_attention_requested

if is_torch_flex_attn_available():
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    from transformers.integrations.flex_attention import compile_friendly_flex_attention

# Queries in one block of folded attention, at the least. A block of `size` queries reads `size + window - 1` keys:
# larger blocks waste more products outside the band, smaller ones copy each key more often.
_MIN_BLOCK = 32

# Steps that an inference looks at together, in windows and MLPs: what these hold beside the sequence is as long as this,
# however long the sequence is. Enough to keep any device busy.
CHUNK = 8192

# Queries whose biases to all keys are held at once, where attention is global and has a relative bias.
_BIAS_BLOCK = 128

# The size of flex_attention's blocks; its kernels want this one.
_FLEX_BLOCK = 128

# Added to the scores of padded keys where a kernel's own causal mask leaves no place for another: exp(-1e3) is 0, and float16 can hold it.
_PADDED_SCORE = -1e3


def check_attention_backend(implementation: str, config) -> None:
    """
    Raises:
        ValueError: the backend cannot compute the attention that this config describes; the message names one that can.
    """
    if not is_flash_attention_requested(requested_attention_implementation=implementation):
        return
    advice = 'Load it with attn_implementation="sdpa" (or "flex_attention", "eager").'
    if any(config.relative_bias_widths):
        raise ValueError(
            f"attn_implementation={implementation!r} cannot add the learned relative bias of this model (use_rel_pe=True "
            f"with mha_win_size={config.mha_win_size!r}): flash kernels take no bias. {advice}"
        )
    if config.n_embd // config.n_head > 256:
        raise ValueError(
            f"attn_implementation={implementation!r} takes heads of at most 256 channels; this model has n_embd / n_head = "
            f"{config.n_embd} / {config.n_head} = {config.n_embd // config.n_head}. {advice}"
        )


def make_attention_mask(
    implementation: str,
    valid: torch.Tensor | None,
    length: int,
    window: int,
    is_causal: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> "torch.Tensor | BlockMask | None":
    """
    The mask of one pyramid level, in the form that `attend` needs under this backend; `None` where nothing is masked.

    Args:
        implementation: name of the backend, as in `attn_implementation`.
        valid: (batch, time) bool, True = valid; `None` = no padding.
        length: number of steps of the level.
        window: full width of the window in steps; 1 or less = global.
        is_causal: steps see no later steps.
        dtype: of the queries; an eager mask is additive and has it.
        device: of the mask.

    Returns:
        eager: (batch or 1, 1, time, time), 0 or the dtype's lowest value. sdpa: bool, True = may be seen; global (batch,
        1, 1, time), windowed (batch or 1, blocks, 1, size, size + window - 1). flex: a `BlockMask`. flash: `valid`. A
        query that may see nothing sees itself or everything, so that its (unused) output stays finite.
    """
    if is_flash_attention_requested(requested_attention_implementation=implementation):
        return valid
    # Under torch.export the length is a symbol; a graph that looked at it would serve long sequences or short ones, not both.
    has_window = window > 1 and (isinstance(length, torch.SymInt) or window < 2 * length - 1)
    half = window // 2 if has_window else length
    if implementation == "flex_attention":
        if valid is None and not has_window and not is_causal:
            return None
        return make_block_mask(valid, length, half, 0 if is_causal else half, device)
    if implementation != "eager":
        if has_window:
            fold = WindowFold(length, window)
            inside = torch.ones(1, length, dtype=torch.bool, device=device) if valid is None else valid
            mask = fold.band(is_causal, device) & fold.fold_keys(inside)[:, :, None, None, :]
            return mask | ~mask.any(dim=-1, keepdim=True)
        if valid is None:
            return None  # it has a causal kernel of its own
        return (valid | ~valid.any(dim=-1, keepdim=True))[:, None, None, :]
    if valid is None and not has_window and not is_causal:
        return None

    offsets = torch.arange(length, device=device)
    offsets = offsets[None, :] - offsets[:, None]  # key minus query
    mask = ((offsets >= -half) & (offsets <= (0 if is_causal else half)))[None, None]
    if valid is not None:
        mask = mask & valid[:, None, None, :]
    mask = mask | ~mask.any(dim=-1, keepdim=True)
    return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, torch.finfo(dtype).min)


def make_block_mask(
    valid: torch.Tensor | None, length: int, left: int, right: int, device: torch.device
) -> "BlockMask":
    """
    flex_attention's mask of the keys from `left` before to `right` after each query, without the (time, time) matrix that
    `create_block_mask` would look at: which blocks are empty or full follows from their places.
    """
    blocks = -(-length // _FLEX_BLOCK)
    index = torch.arange(blocks, device=device)
    offset = (index[None, :] - index[:, None])[None] * _FLEX_BLOCK  # of a block of keys from a block of queries
    reach = _FLEX_BLOCK - 1
    some = (offset - reach <= right) & (offset + reach >= -left)
    every = (offset + reach <= right) & (offset - reach >= -left)
    inside = torch.ones(1, length, dtype=torch.bool, device=device) if valid is None else valid
    inside = F.pad(inside, (0, blocks * _FLEX_BLOCK - length)).unflatten(1, (blocks, _FLEX_BLOCK))
    some = some & (inside.any(-1)[:, None, :] | (offset == 0))
    every = every & inside.all(-1)[:, None, :]
    partial = some & ~every

    def within(batch, head, query, key):
        seen = (key - query <= right) & (query - key <= left)
        if valid is not None:
            seen = seen & valid[batch, key]
        return seen | (query == key)  # a padded query sees itself

    def listed(chosen):
        # Chosen blocks first, in order; (batch, 1, blocks of queries, blocks of keys).
        order = chosen.int().argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]

    return BlockMask.from_kv_blocks(
        *listed(partial), *listed(every), BLOCK_SIZE=_FLEX_BLOCK, mask_mod=within, seq_lengths=(length, length)
    )


def make_text_mask(implementation: str, valid: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """
    The mask of attention from time to text, in the form that `attend` needs under this backend.

    Args:
        valid: (queries, words) bool, True = valid; `None` = no padding. A query without a word sees all of its padding: its
            (unused) output stays finite.

    Returns:
        (queries, 1, 1, words): additive in `dtype` for eager, else bool, True = may be seen.
    """
    if valid is None:
        return None
    mask = (valid | ~valid.any(dim=-1, keepdim=True))[:, None, None, :]
    if implementation == "eager":
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return mask


def attend(
    module: nn.Module,
    interface,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: "torch.Tensor | BlockMask | None",
    relative_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Calls a function of transformers' attention interface, with what it lacks around it: windows and causal padding
    under sdpa, a relative bias.

    Args:
        module: the attention module; its `config`, `window` and `is_causal` say what the mask was made for, and `is_cross`
            that the keys are words.
        interface: the attention function.
        query: (batch, heads, time, channels of a head); key and value alike, with as many or fewer heads.
        attention_mask: from `make_attention_mask`, or from `make_text_mask`.
        relative_bias: (heads, width), added to the scores of the offsets -(width // 2) ... width // 2: of the window, or,
            where attention is global, of these and all beyond, which have the bias of the outermost.

    Returns:
        (batch, time, heads, channels of a head), and the weights (batch, heads, time, time) under eager, else `None`.
    """
    implementation = module.config._attn_implementation
    has_own_masks = implementation == "flex_attention" or is_flash_attention_requested(
        requested_attention_implementation=implementation
    )
    if getattr(module, "is_cross", False) and has_own_masks and attention_mask is not None:
        # flex would want a BlockMask, flash takes masks only for queries and keys of one length.
        width = value.shape[-1]
        query, key, value = hide_keys(query, key, value, attention_mask, kwargs["scaling"])
        output, weights = attend(module, interface, query, key, value, None, **kwargs)
        return output[..., :width], weights
    if implementation == "flex_attention":
        return flex_attend(module, query, key, value, attention_mask, relative_bias, **kwargs), None
    if has_own_masks:
        # Flash counts the steps on one side, with the query itself.
        window = module.window // 2 + 1 if module.window > 1 else None
        return interface(module, query, key, value, attention_mask, sliding_window=window, **kwargs)

    if attention_mask is not None and attention_mask.dim() == 5:
        return attend_in_blocks(module, interface, query, key, value, attention_mask, relative_bias, **kwargs)
    if relative_bias is not None and implementation != "eager":
        return attend_with_bias(module, interface, query, key, value, attention_mask, relative_bias, **kwargs)
    if relative_bias is not None:
        attention_mask = add_relative_bias(attention_mask, relative_bias, query, key)
    elif implementation != "eager" and module.is_causal and attention_mask is not None:
        # A mask over keys would need a row for each query to be causal too.
        width = value.shape[-1]
        query, key, value = hide_keys(query, key, value, attention_mask, kwargs["scaling"])
        output, weights = interface(module, query, key, value, None, **kwargs)
        return output[..., :width], weights
    return interface(module, query, key, value, attention_mask, **kwargs)


def hide_keys(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    What a mask over keys does, for kernels that leave no place for one: one more channel, 1 in every query and the score of
    padding in its key.

    Args:
        query, key, value: as in `attend`.
        mask: (batch, 1, 1, time of the keys) bool, True = may be seen.
    """
    extra = 8  # kernels like widths that are multiples of 8
    score = torch.where(mask, 0.0, _PADDED_SCORE / scaling).to(key.dtype).transpose(2, 3)
    query = torch.cat((query, query.new_ones(1).expand(*query.shape[:3], 1)), dim=-1)
    key = torch.cat((key, score.expand(*key.shape[:3], 1)), dim=-1)
    return F.pad(query, (0, extra - 1)), F.pad(key, (0, extra - 1)), F.pad(value, (0, extra))


def runs_in_chunks(module, length: int) -> bool:
    """Whether a sequence is long enough, and this is inference: nothing learns (in training, without gradients too:
    checkpointing repeats dropout, batch norm counts), and neither gradients nor a graph are recorded."""
    if module.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return length > CHUNK


def attend_in_blocks(module, interface, query, key, value, attention_mask, relative_bias, **kwargs):
    """Windows for a backend that has none: blocks of queries, each with the keys around it, are one large batch."""
    batch, _, length, _ = query.shape
    fold = WindowFold(length, module.window)
    if runs_in_chunks(module, length) and CHUNK // fold.size > 2:
        output = query.new_empty(batch, length, query.shape[1], value.shape[-1])
        count = CHUNK // fold.size - 2
        for first in range(0, fold.blocks, count):
            # One more block on either side has all keys that the windows reach; what its own queries see is thrown away.
            left, right = max(first - 1, 0), min(first + count + 1, fold.blocks)
            steps = slice(left * fold.size, right * fold.size)
            pieces = (x[:, :, steps] for x in (query, key, value))
            mask = attention_mask[:, left:right]
            piece, _ = attend_in_blocks(module, interface, *pieces, mask, relative_bias, **kwargs)
            into = output[:, first * fold.size : (first + count) * fold.size]
            into.copy_(piece[:, (first - left) * fold.size :][:, : into.shape[1]])
        return output, None
    query = fold.fold_queries(query.transpose(1, 2))
    key, value = fold.fold_keys(key.transpose(1, 2)), fold.fold_keys(value.transpose(1, 2))
    query, key, value = (x.flatten(0, 1).transpose(1, 2) for x in (query, key, value))
    attention_mask = attention_mask.expand(batch, -1, -1, -1, -1).flatten(0, 1)
    if relative_bias is not None:
        # The first key of a block stands half a window before its first query.
        attention_mask = add_relative_bias(attention_mask, relative_bias, query, key, first_key=-fold.half)
    output, weights = interface(module, query, key, value, attention_mask, **kwargs)
    return output.reshape(batch, fold.blocks * fold.size, *output.shape[2:])[:, :length], weights


def attend_with_bias(module, interface, query, key, value, attention_mask, table, **kwargs):
    """
    Global attention with a relative bias, for a backend that takes it as a mask only: in blocks of queries, or nothing
    would be left of a kernel that never holds (time, time) scores. A compiled or exported graph, which would have
    another number of blocks for each length, has one: there the bias is (heads, time, time).
    """
    length, is_causal = query.shape[2], module.is_causal

    def attend_block(query, key, value, table, first):
        keys = None if attention_mask is None else attention_mask[..., : key.shape[2]]
        mask = add_relative_bias(keys, table, query, key, first_key=-first, is_causal=is_causal)
        return interface(module, query, key, value, mask, **kwargs)[0]

    if torch.compiler.is_compiling() or torch.jit.is_tracing() or length <= _BIAS_BLOCK:
        return attend_block(query, key, value, table, 0), None
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, table))
    blocks = []
    for first in range(0, length, _BIAS_BLOCK):
        seen = min(first + _BIAS_BLOCK, length) if is_causal else length
        one = query[:, :, first : first + _BIAS_BLOCK], key[:, :, :seen], value[:, :, :seen], table, first
        # Without this, autograd would keep the biases of all blocks.
        blocks.append(checkpoint(attend_block, *one, use_reentrant=False) if learns else attend_block(*one))
    return torch.cat(blocks, dim=1), None


def add_relative_bias(
    mask: torch.Tensor | None,
    table: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    first_key: int = 0,
    is_causal: bool = False,
) -> torch.Tensor:
    """
    An additive mask with a learned bias (`table`, (heads, width)) for each head and offset of a key from a query;
    `first_key` is that of the first key from the first query. `is_causal` masks later keys, because a mask takes the
    place of a backend's own causal kernel.
    """
    half, rows, columns = table.shape[-1] // 2, query.shape[2], key.shape[2]
    # The bias of each offset once: first those of the first query, then those that only later queries have, farthest
    # last. Side by side for all rows and cut one shorter, each row begins one offset before the row above it.
    places = torch.arange(rows + columns, device=query.device)
    offsets = torch.where(places < columns, places, places - rows - columns) + first_key
    bias = table[:, (offsets + half).clamp(0, 2 * half)].to(query.dtype)
    bias = bias[:, None].expand(-1, rows, -1).flatten(1)[:, : rows * (rows + columns - 1)]
    bias = bias.unflatten(1, (rows, rows + columns - 1))[None, :, :, :columns]
    if is_causal:
        is_earlier = places[:columns] + first_key <= places[:rows, None]
        mask = is_earlier if mask is None else mask & is_earlier
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(query.dtype).min)
    return mask + bias


def flex_attend(module, query, key, value, block_mask, relative_bias, scaling: float, dropout: float = 0.0, **kwargs):
    """
    torch's flex_attention, which transformers' function of that name calls too, but for the relative bias. On a GPU it
    is compiled. On the CPU it runs as its definition, with the (time, time) scores: the compiler's CPU kernels fail on
    some lengths (PyTorch 2.13), and sdpa is faster there.

    Raises:
        ValueError: there is dropout on the attention weights, which flex_attention does not have.
    """
    if dropout > 0:
        raise ValueError(
            f"flex_attention has no dropout on attention weights, and this model trains with attn_pdrop={dropout}. "
            f'Set attn_pdrop=0 (proj_pdrop and path_pdrop stay), or load it with attn_implementation="sdpa".'
        )
    groups = module.num_key_value_groups
    if groups & (groups - 1):  # grouped kernels want a power of two
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)

    score_mod = None
    if relative_bias is not None:
        half = relative_bias.shape[-1] // 2

        def score_mod(score, batch, head, query, key):
            return score + relative_bias[head, (key - query + half).clamp(0, 2 * half)]

    options = {"score_mod": score_mod, "block_mask": block_mask, "scale": scaling}
    options["enable_gqa"] = key.shape[1] < query.shape[1]
    if query.device.type == "cpu":
        output = flex_attention(query, key, value, **options)
    else:
        output = compile_friendly_flex_attention(query, key, value, training=module.training, **options)
    return output.transpose(1, 2)


class WindowFold:
    """
    Cuts a sequence into blocks of queries, each beside the keys that its windows reach: block b holds the queries
    b * size ... (b + 1) * size - 1 and the keys from half a window before the first to half a window after the last.
    The last block is filled up with zeros, and so are keys beyond either end.
    """

    def __init__(self, length: int, window: int):
        self.half = window // 2
        self.size = max(_MIN_BLOCK, 2 * self.half)
        self.blocks = (length + self.size - 1) // self.size  # not -(-a // b), which ONNX divides towards 0
        self.filled = self.blocks * self.size - length

    def fold_queries(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, ...) to (batch, blocks, size, ...)."""
        # Padding by nothing would copy; but a compiled graph that looked would serve either kind of length, not both.
        if torch.compiler.is_compiling() or self.filled:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, self.filled))
        return x.unflatten(1, (self.blocks, self.size))

    def fold_keys(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, ...) to (batch, blocks, half + size + half, ...), with what each block's windows reach."""
        x = self.fold_queries(x)
        beyond = x.new_zeros(x.shape[0], 1, self.half, *x.shape[3:])
        before = torch.cat((beyond, x[:, :-1, self.size - self.half :]), dim=1)
        after = torch.cat((x[:, 1:, : self.half], beyond), dim=1)
        return torch.cat((before, x, after), dim=2)

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
