"""Attention under every backend against a dense softmax in float64 that is written out here.

Flash kernels need a GPU. Here transformers' own `flash_attention_forward` turns our arguments into the kernels', and
stand-ins compute what flash-attn documents for those. flex_attention runs as PyTorch's definition of it, which has no
gradient on a CPU, and looks at the rule of a `BlockMask` only: its lists of blocks are tested by themselves. What the
kernels make of all that is tested in test_cuda.py.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, PreTrainedModel, modeling_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerForMomentRetrieval,
    ConvTransformerForTemporalActionLocalization,
    ConvTransformerModel,
    attention_convtransformer,
    modeling_convtransformer,
)
from modeling_convtransformer.attention_convtransformer import (
    WindowFold,
    attend,
    check_attention_backend,
    eager_attention_forward,
    make_attention_mask,
    make_block_mask,
    make_text_mask,
)

CPU = torch.device("cpu")
KERNEL = "kernels-community/flash-attn2"  # a kernel of the Hub, which transformers calls in the same way
FLASH = ["flash_attention_2", "flash_attention_3", KERNEL]
INTERFACES = {
    "eager": eager_attention_forward,
    "sdpa": ALL_ATTENTION_FUNCTIONS["sdpa"],
    "of_a_user": ALL_ATTENTION_FUNCTIONS["sdpa"],  # whatever it is called, it gets what sdpa gets
    "flex_attention": ALL_ATTENTION_FUNCTIONS["flex_attention"],
    "flash_attention_2": ALL_ATTENTION_FUNCTIONS["flash_attention_2"],
    "flash_attention_3": ALL_ATTENTION_FUNCTIONS["flash_attention_3"],
    KERNEL: ALL_ATTENTION_FUNCTIONS["flash_attention_2"],
}
BACKENDS = list(INTERFACES)

# float32 against float64: sums of up to 300 products of values around 1, each off by 6e-8, in scores and outputs.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


# --- Stand-ins for flash kernels ------------------------------------------------------------------------------------------


def flash_sequence(query, key, value, scale, causal, window_size):
    """
    One sequence, (time, heads, channels), as flash-attn documents its arguments: query i sees the keys from
    i + keys - queries - left to i + keys - queries + right, -1 is no limit, causal is right = 0; heads of queries share
    the heads of keys in order; a query that sees nothing gets zeros.
    """
    left, right = window_size
    right = 0 if causal else right
    queries, keys = len(query), len(key)
    offset = torch.arange(keys)[None, :] - torch.arange(queries)[:, None] - (keys - queries)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if left >= 0:
        seen &= offset >= -left
    if right >= 0:
        seen &= offset <= right
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhc,khc->hqk", query, key) * scale
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~seen, 0)
    return torch.einsum("hqk,khc->qhc", weights, value)


def flash_batch(q, k, v, softmax_scale, causal, window_size):
    assert q.dim() == k.dim() == v.dim() == 4
    assert q.shape[2] % k.shape[2] == 0
    assert q.shape[3] == k.shape[3] == v.shape[3] <= 256
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return torch.stack([flash_sequence(*sample, scale, causal, window_size) for sample in zip(q, k, v, strict=True)])


def flash_ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size):
    assert q.dim() == k.dim() == v.dim() == 3
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    parts = []
    for places, longest, tensors in ((cu_seqlens_q, max_seqlen_q, [q]), (cu_seqlens_k, max_seqlen_k, [k, v])):
        assert places.dtype == torch.int32
        counts = places.diff().tolist()
        assert places[0] == 0
        assert sum(counts) == len(tensors[0])
        assert max(counts) == longest
        parts.extend(tensor.split(counts) for tensor in tensors)
    outputs = [flash_sequence(*sample, scale, causal, window_size) for sample in zip(*parts, strict=True)]
    return torch.cat(outputs)


# The arguments of flash-attn 2 and 3 in their order; transformers passes what it finds in a signature.
def flash_2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
            alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
    assert dropout_p == softcap == 0
    return flash_batch(q, k, v, softmax_scale, causal, window_size)


def flash_2_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                   causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                   return_attn_probs=False, block_table=None):  # fmt: skip
    assert dropout_p == softcap == 0
    return flash_ragged(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size
    )


def flash_3(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
            window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
            sm_margin=0):  # fmt: skip
    assert softcap == 0
    return flash_batch(q, k, v, softmax_scale, causal, window_size), None  # and the logarithms of the sums


def flash_3_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
                   softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                   window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
                   deterministic=False, sm_margin=0):  # fmt: skip
    assert softcap == 0
    return flash_ragged(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size
    ), None


STAND_INS = {
    "flash_attention_2": (flash_2, flash_2_varlen),
    "flash_attention_3": (flash_3, flash_3_varlen),
    KERNEL: (flash_2, flash_2_varlen),
}


@pytest.fixture(scope="module", autouse=True)
def _stand_ins():
    """Flash kernels are stand-ins; flex_attention runs without torch.compile around it, which takes a second a shape."""
    loaded = ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn",
              "_unpad_fn", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn")  # fmt: skip

    def load(implementation, *args, **kwargs):
        return *STAND_INS[implementation], None, flash._pad_input, flash._unpad_input

    with pytest.MonkeyPatch.context() as patch:
        for name in loaded:  # put back afterwards
            patch.setattr(flash, name, None, raising=False)
        patch.setattr(flash, "_lazy_imports", load)
        patch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
        yield


@pytest.fixture
def flash_installed(monkeypatch):
    """transformers' checks at load find the flash package and a GPU."""
    for version in (2, 3):
        found = {**flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX[version], "general_availability_check": lambda: True}
        monkeypatch.setitem(flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX, version, found)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)


# --- Against the definition -----------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """What `attend` and the backends want to know of an attention module."""

    def __init__(self, implementation, window, is_causal, groups=1):
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation=implementation)
        self.window, self.is_causal, self.num_key_value_groups = window, is_causal, groups
        self.projection = nn.Linear(1, 1)  # flash casts float32 to the type of the module's weights


def allowed(valid, length, window, is_causal):
    """(batch, 1, time, time) bool, written as the definition reads."""
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    in_window = (query - key).abs() <= window // 2 if window > 1 else torch.ones(length, length, dtype=torch.bool)
    not_later = key <= query if is_causal else torch.ones(length, length, dtype=torch.bool)
    return (in_window & not_later & valid[:, None, :])[:, None]


def dense(query, key, value, may_see, bias=None):
    """Softmax attention in float64. A query that may see nothing gets 0 (the caller leaves it out)."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    length = query.shape[2]
    heads = []
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // groups].transpose(1, 2) / math.sqrt(query.shape[-1])
        if bias is not None:
            half = bias.shape[1] // 2
            offsets = torch.arange(length)[None, :] - torch.arange(length)[:, None]
            scores = scores + bias[head].double()[offsets.clamp(-half, half) + half]  # windows end there anyway
        scores = scores.exp() * may_see[:, 0]  # float64 holds e to the 700: no maximum to subtract
        weights = scores / scores.sum(-1, keepdim=True).clamp(min=1e-300)
        heads.append(weights @ value[:, head // groups])
    return torch.stack(heads, dim=2)  # (batch, time, heads, channels)


def attend_here(implementation, query, key, value, valid, window, is_causal, bias=None):
    groups = query.shape[1] // key.shape[1]
    holder = Holder(implementation, window, is_causal, groups)
    length = query.shape[2]
    mask = make_attention_mask(implementation, valid, length, window, is_causal, query.dtype, query.device)
    return attend(
        holder,
        INTERFACES[implementation],
        query,
        key,
        value,
        mask,
        relative_bias=bias,
        dropout=0.0,
        scaling=query.shape[-1] ** -0.5,
    )


def random_case(seed, batch, length, heads, kv_heads, padding, window, with_bias):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, length, 4, generator=generator)
    key, value = (torch.randn(batch, kv_heads, length, 4, generator=generator) for _ in range(2))
    counts = torch.randint(0, length + 1, (batch, 1), generator=generator)
    steps = torch.arange(length)[None]
    valid = {
        "none": None,
        "right": steps < counts,
        "left": steps >= length - counts,
        "holes": torch.rand(batch, length, generator=generator) < 0.6,
    }[padding]
    # beyond 7 steps, global attention has the bias of 7
    bias = torch.randn(heads, window if window > 1 else 15, generator=generator) if with_bias else None
    return query, key, value, valid, bias


def has_kernel_for(implementation, window, padding, with_bias):
    """Flash kernels know no bias, and close up what is padded before they count the steps of a window."""
    return implementation not in FLASH or not (with_bias or (window > 1 and padding == "holes"))


def compared(implementation, may_see, valid):
    """
    (batch, time) bool: the queries whose outputs are defined. Padded ones too if they see something, but for flash
    kernels, which leave them out, and flex_attention, where they see themselves.
    """
    return may_see.any(-1)[:, 0] & (valid if implementation in ("flex_attention", *FLASH) else True)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    # blocks of a folded window have 32 queries, those of flex_attention 128
    length=st.one_of(st.integers(1, 100), st.sampled_from([31, 32, 33, 63, 64, 65, 127, 128, 129, 256, 257, 300])),
    window=st.sampled_from([-1, 1, 3, 5, 9, 19, 63, 65, "all"]),
    padding=st.sampled_from(["none", "right", "left", "holes"]),
    is_causal=st.booleans(),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (4, 1), (3, 1)]),
    with_bias=st.booleans(),
    implementation=st.sampled_from(BACKENDS),
)
def test_equals_a_dense_softmax(seed, length, window, padding, is_causal, heads, with_bias, implementation):
    window = 2 * length + 1 if window == "all" else window
    with_bias = with_bias and implementation not in FLASH
    padding = padding if has_kernel_for(implementation, window, padding, with_bias) else "left"
    query, key, value, valid, bias = random_case(seed, 2, length, *heads, padding, window, with_bias)
    output, weights = attend_here(implementation, query, key, value, valid, window, is_causal, bias)
    all_valid = torch.ones(2, length, dtype=torch.bool) if valid is None else valid
    may_see = allowed(all_valid, length, window, is_causal)
    expected = dense(query, key, value, may_see, bias)
    rows = compared(implementation, may_see, all_valid)
    assert output.shape == (2, length, heads[0], 4)
    assert output.isfinite().all()  # also where a query may see nothing
    torch.testing.assert_close(output[rows].double(), expected[rows], **CLOSE)
    if implementation == "eager":
        assert weights.shape == (2, heads[0], length, length)
        assert (weights.masked_fill(may_see, 0).transpose(0, 1)[:, rows] == 0).all()
    else:
        assert weights is None


# One case of each kind at every window, so that none depends on what hypothesis draws.
@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize(
    ("length", "window"), [(70, -1), (70, 3), (70, 9), (70, 63), (70, 141), (129, 19), (257, -1), (257, 129)]
)
def test_outputs_and_gradients_equal_a_dense_softmax(length, window, padding, is_causal):
    for with_bias in (False, True):
        query, key, value, valid, bias = random_case(window, 2, length, 4, 2, padding, window, with_bias)
        inputs = [query, key, value] + ([bias] if bias is not None else [])
        inputs = [tensor.requires_grad_() for tensor in inputs]
        all_valid = torch.ones(2, length, dtype=torch.bool) if valid is None else valid
        may_see = allowed(all_valid, length, window, is_causal)
        expected = dense(query, key, value, may_see, bias)
        noise = torch.randn(2, length, 4, 4, generator=torch.Generator().manual_seed(1))
        for implementation in BACKENDS:
            if not has_kernel_for(implementation, window, padding, with_bias):
                continue
            direction = noise * compared(implementation, may_see, all_valid)[..., None, None]
            if implementation == "flex_attention":  # no gradients on a CPU
                with torch.no_grad():
                    detached = [tensor.detach() for tensor in inputs]
                    output, _ = attend_here(implementation, *detached[:3], valid, window, is_causal, *detached[3:])
                torch.testing.assert_close(output.double() * direction, expected * direction, **CLOSE)
                continue
            output, _ = attend_here(implementation, query, key, value, valid, window, is_causal, bias)
            torch.testing.assert_close(output.double() * direction, expected * direction, **CLOSE)
            gradients = torch.autograd.grad((output * direction).sum(), inputs)
            expected_gradients = torch.autograd.grad((expected * direction).sum(), inputs, retain_graph=True)
            for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
                assert gradient.isfinite().all()
                # a gradient of a bias sums over 2 * 257 queries: ten times the tolerance of one value
                torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("window", [-1, 9, 101])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_a_sample_without_a_valid_step_is_finite_and_leaves_its_neighbours_alone(implementation, window, is_causal):
    length, is_flex = 50, implementation == "flex_attention"
    with_bias = implementation not in FLASH
    query, key, value, _, bias = random_case(0, 3, length, 2, 2, "none", window, with_bias)
    valid = torch.ones(3, length, dtype=torch.bool)
    valid[1] = False
    valid[2, 31:] = False
    inputs = [tensor.requires_grad_(not is_flex) for tensor in (query, key, value)]
    output, _ = attend_here(implementation, *inputs, valid, window, is_causal, bias)
    if not is_flex:
        output.sum().backward()
    assert output.isfinite().all()
    for sample in (0, 2):
        alone = [tensor.detach()[[sample]].requires_grad_(not is_flex) for tensor in (query, key, value)]
        expected, _ = attend_here(implementation, *alone, valid[[sample]], window, is_causal, bias)
        # the same sums, in batches of another size
        torch.testing.assert_close(output[[sample]], expected, rtol=1e-6, atol=1e-6)
        if not is_flex:
            expected.sum().backward()
            for tensor, one in zip(inputs, alone, strict=True):
                torch.testing.assert_close(tensor.grad[[sample]], one.grad, rtol=1e-5, atol=1e-5)
    assert is_flex or all(tensor.grad.isfinite().all() for tensor in inputs)


@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("window", [-1, 9])
def test_no_query_is_masked_from_everything(window, is_causal):
    """Older kernels answer a row that sees nothing with NaN."""
    valid = torch.zeros(2, 50, dtype=torch.bool)
    valid[1, 40:] = True
    for implementation in ("eager", "sdpa"):
        mask = make_attention_mask(implementation, valid, 50, window, is_causal, torch.float32, CPU)
        seen = mask if mask.dtype == torch.bool else mask == 0
        assert seen.any(-1).all()
    steps = torch.arange(50)
    rule = make_attention_mask("flex_attention", valid, 50, window, is_causal, torch.float32, CPU).mask_mod
    for sample in (0, 1):
        assert rule(torch.tensor(sample), torch.tensor(0), steps[:, None], steps[None, :]).any(-1).all()


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("window", [-1, 9])
def test_scores_in_the_hundreds(window, padding, implementation):
    """Padding is a finite score for sdpa's causal kernel: the loudest padded key must stay below the faintest other."""
    query, key, value, _, _ = random_case(3, 2, 70, 4, 4, "none", window, False)
    query, key = 10 * query, 10 * key
    steps = torch.arange(70)[None]
    valid = {"none": None, "right": steps < torch.tensor([[40], [9]]), "left": steps > torch.tensor([[40], [9]])}[
        padding
    ]
    all_valid = torch.ones(2, 70, dtype=torch.bool) if valid is None else valid
    may_see = allowed(all_valid, 70, window, True)
    expected = dense(query, key, value, may_see)
    assert 300 < (query @ key.transpose(2, 3) / 2).abs().max() < 700
    output, _ = attend_here(implementation, query, key, value, valid, window, True)
    rows = compared(implementation, may_see, all_valid) & all_valid  # a padded query may see faint keys only
    # a score of 500 is off by 3e-5 in float32, and so is the logarithm of a weight
    torch.testing.assert_close(output[rows].double(), expected[rows], rtol=2e-4, atol=2e-4)


# --- Masks ----------------------------------------------------------------------------------------------------------------


def test_nothing_masked_is_no_mask():
    def make(implementation, valid, length, window, is_causal):
        return make_attention_mask(implementation, valid, length, window, is_causal, torch.float32, CPU)

    padded = torch.ones(2, 50).bool()
    assert make("sdpa", None, 100, -1, False) is None
    assert make("sdpa", None, 100, -1, True) is None  # the kernel's own
    assert make("eager", None, 100, -1, False) is None
    assert make("eager", None, 100, -1, True) is not None
    assert make("flex_attention", None, 100, -1, False) is None
    assert make("flex_attention", None, 100, -1, True) is not None
    # a window over everything is none
    assert make("sdpa", None, 50, 99, False) is None
    assert make("sdpa", None, 50, 97, False) is not None
    assert make("flex_attention", None, 50, 99, False) is None
    assert make("flex_attention", None, 50, 97, False) is not None
    assert make("sdpa", padded, 50, 101, False).shape == (2, 1, 1, 50)
    assert make("sdpa", padded, 50, -1, True).shape == (2, 1, 1, 50)
    for implementation in FLASH:  # windows and causality are arguments of the kernels
        assert make(implementation, None, 50, 9, True) is None
        assert make(implementation, padded, 50, 9, True) is padded


@pytest.mark.parametrize(
    ("length", "window"), [(1, 3), (31, 3), (32, 3), (33, 3), (64, 19), (100, 63), (125, 63), (128, 65), (129, 129)]
)
def test_a_fold_holds_every_query_once_and_its_neighbourhood(length, window):
    fold = WindowFold(length, window)
    steps = torch.arange(1, length + 1, dtype=torch.float32)[None]
    queries = fold.fold_queries(steps)[0]  # (blocks, size)
    keys = fold.fold_keys(steps)[0]  # (blocks, size + window - 1)
    assert queries.flatten().tolist() == steps[0].tolist() + [0.0] * (queries.numel() - length)
    # heads and channels come along
    wide = torch.stack((steps, -steps), dim=-1)[:, :, None].expand(-1, -1, 3, -1)
    assert torch.equal(
        fold.fold_queries(wide)[0], torch.stack((queries, -queries), -1)[:, :, None].expand(-1, -1, 3, -1)
    )
    assert torch.equal(fold.fold_keys(wide)[0], torch.stack((keys, -keys), -1)[:, :, None].expand(-1, -1, 3, -1))
    for is_causal in (False, True):
        band = fold.band(is_causal, CPU)[0, 0, 0]
        for block in range(len(queries)):
            for row in range(queries.shape[1]):
                step = int(queries[block, row])
                if step:
                    seen = keys[block][band[row]].tolist()
                    near = range(step - window // 2, step + 1 + (0 if is_causal else window // 2))
                    assert seen == [float(j) if 1 <= j <= length else 0.0 for j in near]


def elements_of(block_mask, length, numbers, indices, full_numbers, full_indices, transposed=False):
    """
    (batch, time, time) bool: what a kernel makes of a BlockMask. It skips blocks that are in no list, asks the rule about
    every element of a partial block, and takes full blocks as they are.
    """
    steps = torch.arange(length)
    seen = torch.zeros(len(numbers), length, length, dtype=torch.bool)
    for sample in range(len(numbers)):
        rule = block_mask.mask_mod(torch.tensor(sample), torch.tensor(0), steps[:, None], steps[None, :])
        for row in range(numbers.shape[2]):
            partial = indices[sample, 0, row, : numbers[sample, 0, row]].tolist()
            full = full_indices[sample, 0, row, : full_numbers[sample, 0, row]].tolist()
            assert len({*partial, *full}) == len(partial) + len(full)  # a block is listed once
            for column in partial + full:
                query, key = (column, row) if transposed else (row, column)
                place = (slice(query * 128, query * 128 + 128), slice(key * 128, key * 128 + 128))
                seen[(sample, *place)] = rule.expand(length, length)[place] if column in partial else True
    return seen


@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes", "blocks"])
@pytest.mark.parametrize(
    ("length", "half"),
    # widths at which a block of 128 becomes full, and one less
    [(1, 3), (127, 4), (257, 126), (128, 127), (129, 1), (257, 63), (640, 1), (640, 128), (640, 254), (700, 255)],
)
def test_block_masks_list_what_the_rule_says(length, half, padding, is_causal):
    _, _, _, valid, _ = random_case(length, 3, length, 1, 1, "none" if padding == "blocks" else padding, half, False)
    if padding == "blocks":  # whole blocks without, and with nothing but, valid steps
        valid = torch.rand(3, length // 128 + 1, generator=torch.Generator().manual_seed(length)) < 0.6
        valid = valid.repeat_interleave(128, dim=1)[:, :length]
    right = 0 if is_causal else half
    block_mask = make_block_mask(valid, length, half, right, CPU)

    steps = torch.arange(length)
    offset = steps[None, :] - steps[:, None]
    expected = ((offset >= -half) & (offset <= right))[None]
    if valid is not None:
        expected = expected & valid[:, None, :] | (offset == 0)  # padded steps see themselves
    forward = (
        block_mask.kv_num_blocks,
        block_mask.kv_indices,
        block_mask.full_kv_num_blocks,
        block_mask.full_kv_indices,
    )
    assert torch.equal(elements_of(block_mask, length, *forward), expected)
    # the backward kernels go through the queries of each key
    backward = (block_mask.q_num_blocks, block_mask.q_indices, block_mask.full_q_num_blocks, block_mask.full_q_indices)
    assert torch.equal(elements_of(block_mask, length, *backward, transposed=True), expected)

    # No block is visited for nothing, unless padding has holes: PyTorch's own way looks at every element.
    reference = flex.create_block_mask(
        block_mask.mask_mod, len(expected), None, length, length, device="cpu", BLOCK_SIZE=128
    )
    assert block_mask.seq_lengths == reference.seq_lengths
    ours, theirs = block_mask.to_dense()[:, 0].bool(), reference.to_dense()[:, 0].bool()
    assert (ours | ~theirs).all()
    if padding in ("none", "blocks"):
        assert torch.equal(ours, theirs)


# --- Memory ---------------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned (of those that own memory: a view costs nothing)."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return output


def test_a_window_never_builds_time_by_time():
    length, window = 5000, 9
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, length, 4) for _ in range(3))
    valid = torch.arange(length)[None] < 4000
    bias = torch.randn(2, window)
    mask = make_attention_mask("sdpa", valid, length, window, False, torch.float32, query.device)
    # 157 blocks of 32 queries with 32 + 8 keys, against 25,000,000
    assert mask.numel() == 157 * 32 * 40
    with LargestTensor() as memory:
        attend_here("sdpa", query, key, value, valid, window, False, bias)
    assert memory.largest <= 2 * mask.numel()  # scores or biases of two heads
    with LargestTensor() as memory:
        attend_here("eager", query, key, value, valid, window, False, bias)
    assert memory.largest >= length**2  # the measurement sees what it should


@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_global_bias_never_builds_time_by_time(padded, is_causal):
    """Nor does what its gradients need."""
    length = 3000
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, length, 4, requires_grad=True) for _ in range(3)]
    bias = torch.randn(2, 41, requires_grad=True)
    valid = torch.arange(length)[None] < 2500 if padded else None
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with LargestTensor() as memory, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, _ = attend_here("sdpa", *inputs, valid, -1, is_causal, bias)
    assert sum(kept.values()) < 10 * length * 8  # it grows with the length, not with its square
    with memory:
        output.sum().backward()
    assert memory.largest <= 2 * 128 * (length + 128)  # biases of two heads and 128 queries
    assert bias.grad[:, :20].abs().min() > 0  # of what lies behind


def test_causal_padding_never_builds_time_by_time():
    length = 5000
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, length, 4) for _ in range(3))
    valid = torch.arange(length)[None] < 4000
    with LargestTensor() as memory:
        attend_here("sdpa", query, key, value, valid, -1, True)
    assert memory.largest <= 3 * query.numel()  # heads of 4 channels become 12


@pytest.mark.parametrize("left", [9, 4096], ids=["window", "causal"])
def test_block_masks_never_build_time_by_time(left):
    length, right = 4096, 9 if left == 9 else 0
    valid = torch.arange(length)[None] < torch.tensor([[3000], [4096]])
    with LargestTensor() as memory:
        block_mask = make_block_mask(valid, length, left, right, CPU)
    assert memory.largest <= valid.numel()  # and (32 + 1) * 32 blocks for each sample, against 16,777,216
    with LargestTensor() as memory:
        flex.create_block_mask(block_mask.mask_mod, 2, None, length, length, device="cpu")
    assert memory.largest >= length**2


@pytest.mark.parametrize(
    ("settings", "padded"),
    [
        ({}, False),
        ({}, True),
        ({"is_causal": True}, False),
        ({"is_causal": True}, True),
        ({"mha_win_size": 9}, True),
        ({"mha_win_size": 9, "is_causal": True}, True),
        ({"mha_win_size": 9, "is_causal": True, "use_rel_pe": True, "use_rope": False}, True),
        ({"use_rel_pe": True}, False),
        ({"use_rel_pe": True, "is_causal": True}, True),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}, "max_len": 100}, True),
    ],
    ids=str,
)
def test_no_model_under_sdpa_builds_time_by_time(settings, padded):
    torch.manual_seed(0)
    length = 3000
    config = ConvTransformerConfig(n_in=4, n_embd=8, n_head=2, arch=(1, 1, 2), attn_implementation="sdpa", **settings)
    model = ConvTransformerModel(config).eval()
    mask = torch.arange(length)[None] < 2500 if padded else None
    with torch.no_grad(), LargestTensor() as memory:
        model(torch.randn(1, length, 4), mask)
    # the MLP's 64 channels are the widest honest tensor: 192,000 elements, against 9,000,000
    assert memory.largest < length**2 // 10


# --- Whole models ---------------------------------------------------------------------------------------------------------

SMALL = {"n_in": 6, "n_embd": 24, "n_head": 6, "arch": (1, 1, 3), "path_pdrop": 0, "num_labels": 3}
V1 = {"use_rope": False, "use_swiglu": False, "use_rms_norm": False, "mask_conv_inputs": False}
SETTINGS = {
    "default": {},
    "v1": {**V1, "mha_win_size": 9, "use_abs_pe": True},
    "window": {"mha_win_size": 9},
    "windows": {"mha_win_size": [9, -1, 3, 65]},
    "groups_of_2": {"n_kv_head": 3},
    "groups_of_3_window": {"n_kv_head": 2, "mha_win_size": 5},
    "one_key_head": {"n_kv_head": 1},
    "causal": {"is_causal": True},
    "causal_window": {"is_causal": True, "mha_win_size": 9, "n_kv_head": 3},
    "bias": {"mha_win_size": 9, "use_rel_pe": True},
    "bias_causal_windows": {"is_causal": True, "mha_win_size": [9, 3, -1, 129], "use_rel_pe": True, "n_kv_head": 2},
    "bias_global": {"use_rel_pe": True, "rel_pe_max_distance": 20},
    "bias_global_causal": {"is_causal": True, "use_rel_pe": True, "rel_pe_max_distance": 3, "n_kv_head": 2},
}
OTHERS = ["sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"]
CASES = [
    pytest.param(name, implementation, id=f"{name}-{implementation}")
    for name in SETTINGS
    for implementation in ("eager", *OTHERS)
    if not (implementation in FLASH and SETTINGS[name].get("use_rel_pe"))  # flash kernels take no bias
]


def make_model(settings, kind=ConvTransformerModel, implementation="eager"):
    """A model whose norms and biases are not the identity, which would hide what padding holds."""
    torch.manual_seed(0)
    model = kind(ConvTransformerConfig(**{**SMALL, **settings}, attn_implementation=implementation)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize(("name", "implementation"), [case for case in CASES if "eager" not in case.values])
@torch.no_grad()
def test_every_backend_gives_the_same_pyramid(name, implementation, flash_installed):
    model = make_model(SETTINGS[name])
    generator = torch.Generator().manual_seed(0)
    for length in (2, 33, 257):  # 257, 129, 65, 33 and 2, 1, 1, 1 steps
        features = torch.randn(3, length, 6, generator=generator)
        counts = torch.tensor([[length], [length // 2 + 1], [1]])
        steps = torch.arange(length)
        holes = torch.rand(3, length, generator=generator) < 0.6
        masks = [None, steps < counts, steps >= length - counts]
        if implementation not in FLASH or not any(window > 1 for window in model.config.window_sizes):
            masks.append(holes)
        for mask in masks:
            model.set_attn_implementation("eager")
            expected = model(features, mask)
            model.set_attn_implementation(implementation)
            output = model(features, mask)
            for level, valid in enumerate(expected.feature_masks):
                one, other = output.feature_maps[level][valid == 1], expected.feature_maps[level][valid == 1]
                # float32, the same sums in another order, through four blocks; values are around 1 to 10
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
                assert (output.feature_maps[level][valid == 0] == 0).all()


# v1 lets padding into its convolutions
@pytest.mark.parametrize(("name", "implementation"), [case for case in CASES if "v1" not in case.values])
@torch.no_grad()
def test_a_sample_alone_equals_the_same_sample_padded(name, implementation, flash_installed):
    model = make_model(SETTINGS[name])
    model.set_attn_implementation(implementation)
    lengths = [33, 140, 1, 129]
    features = torch.randn(4, 140, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(140) < torch.tensor(lengths)[:, None]
    padded = model(features.masked_fill(~mask[..., None], math.nan), mask)
    for sample, length in enumerate(lengths):
        alone = model(features[[sample], :length])
        for one, other in zip(padded.feature_maps, alone.feature_maps, strict=True):
            steps = other.shape[1]
            # float32, the same sums in another order, through four blocks; values are around 1 to 10
            torch.testing.assert_close(one[[sample], :steps], other, rtol=1e-5, atol=1e-5)


# --- From time to words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [1, 4, 33])
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_words_equal_a_dense_softmax(implementation, padding, words):
    for seed, (length, heads, kv_heads) in enumerate([(33, 4, 2), (5, 3, 1), (1, 2, 2)]):
        query, *_ = random_case(seed, 3, length, heads, kv_heads, "none", 1, False)
        _, key, value, valid, _ = random_case(seed + 9, 3, words, heads, kv_heads, padding, 1, False)
        holder = Holder(implementation, -1, False, heads // kv_heads)
        holder.is_cross = True
        mask = make_text_mask(implementation, valid, query.dtype)
        output, _ = attend(holder, INTERFACES[implementation], query, key, value, mask, dropout=0.0, scaling=0.5)
        assert output.shape == (3, length, heads, 4)
        seen = torch.ones(3, words, dtype=torch.bool) if valid is None else valid
        expected = dense(query, key, value, seen[:, None, None].expand(-1, 1, length, -1))
        some = seen.any(-1)
        torch.testing.assert_close(output[some].double(), expected[some], **CLOSE)
        assert output.isfinite().all()


MOMENTS = {"text_dim": 5, "decoder_layers": 2, "decoder_dim": 12}


def ask(model, features, mask=None, words=None, known=None):
    with torch.no_grad():
        return model(features, mask, query_embeds=words, query_attention_mask=known)


@pytest.mark.parametrize(("name", "implementation"), [case for case in CASES if "eager" not in case.values])
def test_every_backend_finds_the_same_moments(name, implementation, flash_installed):
    model = make_model({**SETTINGS[name], **MOMENTS}, ConvTransformerForMomentRetrieval)
    generator = torch.Generator().manual_seed(0)
    for length in (2, 67):
        features, words = torch.randn(2, length, 6, generator=generator), torch.randn(2, 3, 4, 5, generator=generator)
        mask = torch.arange(length) < torch.tensor([[length], [length // 2 + 1]])
        known = torch.arange(4) < torch.tensor([[[4], [2], [1]], [[3], [4], [0]]])  # the last is no query
        for own_mask, own_known in ((None, None), (mask, known)):
            model.set_attn_implementation("eager")
            expected = ask(model, features, own_mask, words, own_known)
            model.set_attn_implementation(implementation)
            output = ask(model, features, own_mask, words, own_known)
            valid = (expected.point_mask[:, None] * expected.query_mask[..., None]) == 1
            # float32, the same sums in another order, through eight blocks and the heads; values are around 1 to 10
            torch.testing.assert_close(output.logits[valid], expected.logits[valid], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                output.pred_segments[valid], expected.pred_segments[valid], rtol=1e-5, atol=5e-5
            )
            assert output.logits.isfinite().all()


@pytest.mark.parametrize(("name", "implementation"), [case for case in CASES if "v1" not in case.values])
def test_a_query_alone_equals_the_same_query_padded(name, implementation, flash_installed):
    model = make_model({**SETTINGS[name], **MOMENTS}, ConvTransformerForMomentRetrieval)
    model.set_attn_implementation(implementation)
    generator = torch.Generator().manual_seed(1)
    features, words = torch.randn(3, 70, 6, generator=generator), torch.randn(3, 2, 6, 5, generator=generator)
    lengths, counts = [70, 33, 1], [[6, 1], [2, 0], [4, 0]]
    mask, known = torch.arange(70) < torch.tensor(lengths)[:, None], torch.arange(6) < torch.tensor(counts)[..., None]
    filled = features.masked_fill(~mask[..., None], math.nan), words.masked_fill(~known[..., None], math.nan)
    padded = ask(model, filled[0], mask, filled[1], known)
    assert padded.query_mask.tolist() == [[1, 1], [1, 0], [1, 0]]
    for sample, length in enumerate(lengths):
        valid = padded.point_mask[sample] == 1
        for query, count in enumerate(counts[sample]):
            if count:
                alone = ask(model, features[[sample], :length], None, words[[sample], query][:, None, :count])
                # float32, the same sums in another order, through eight blocks and the heads; values are around 1 to 10
                torch.testing.assert_close(
                    padded.logits[sample, query, valid], alone.logits[0, 0], rtol=1e-5, atol=1e-5
                )
                one, other = padded.pred_segments[sample, query, valid], alone.pred_segments[0, 0]
                torch.testing.assert_close(one, other, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("implementation", OTHERS)
@torch.no_grad()
def test_a_saved_model_loads_with_any_backend(implementation, flash_installed, tmp_path):
    saved = make_model(SETTINGS["causal_window"], ConvTransformerForTemporalActionLocalization)
    saved.save_pretrained(tmp_path)
    loaded = type(saved).from_pretrained(tmp_path, attn_implementation=implementation).eval()
    assert loaded.config._attn_implementation == loaded.model.config._attn_implementation == implementation
    features, mask = torch.randn(2, 70, 6), torch.arange(70) < torch.tensor([[70], [40]])
    expected, output = saved(features, mask), loaded(features, mask)
    valid = expected.point_mask == 1
    # float32, the same sums in another order, through four blocks and the heads
    torch.testing.assert_close(output.logits[valid], expected.logits[valid], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_on_a_cpu_as_users_call_it(monkeypatch):
    """The other tests here leave out the tracing that PyTorch does on each call."""
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False, raising=False)
    torch._dynamo.reset()
    model = make_model({**SETTINGS["bias"], "arch": (1, 1, 1)})
    features, mask = torch.randn(2, 140, 6), torch.arange(140) < torch.tensor([[140], [40]])
    for one in (None, mask):
        model.set_attn_implementation("eager")
        expected = model(features, one)
        model.set_attn_implementation("flex_attention")
        output = model(features, one)
        for level, valid in enumerate(expected.feature_masks):
            torch.testing.assert_close(
                output.feature_maps[level][valid == 1], expected.feature_maps[level][valid == 1], **CLOSE
            )


# --- What a backend cannot do ---------------------------------------------------------------------------------------------

BIAS = {"mha_win_size": [9, -1, 3, 1], "use_rel_pe": True}
WIDE = {"n_embd": 516, "n_head": 2}  # heads of 258 channels
REFUSED = {
    "bias": (BIAS, "use_rel_pe"),
    "bias_global": ({"use_rel_pe": True}, "use_rel_pe"),
    "wide": (WIDE, "256 channels"),
}


@pytest.mark.parametrize("implementation", [*FLASH, "flash_attention_4"])
@pytest.mark.parametrize("name", REFUSED)
def test_flash_kernels_refuse_what_they_cannot_do(name, implementation):
    fields, words = REFUSED[name]
    config = ConvTransformerConfig(**{**SMALL, **fields})
    with pytest.raises(ValueError, match=words) as caught:
        check_attention_backend(implementation, config)
    assert implementation in str(caught.value)
    assert 'attn_implementation="sdpa"' in str(caught.value)
    for other in ("eager", "sdpa", "flex_attention", "of_a_user"):
        check_attention_backend(other, config)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mha_win_size": 9},
        {"n_embd": 512, "n_head": 2},
        {"arch": (1, 0, 3), "mha_win_size": [9, -1, -1, -1], "use_rel_pe": False},
    ],
    ids=str,
)
def test_flash_kernels_take_what_they_can_do(fields):
    check_attention_backend("flash_attention_2", ConvTransformerConfig(**{**SMALL, **fields}))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", [ConvTransformerModel, ConvTransformerForTemporalActionLocalization])
def test_flash_kernels_refuse_at_load(kind, name, flash_installed, tmp_path):
    fields, words = REFUSED[name]
    model = make_model({**fields, "arch": (1, 1, 0 if name == "wide" else 3)}, kind, "sdpa")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        kind.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match=words):
        AutoModel.from_config(model.config, attn_implementation="flash_attention_2")
    model.config._attn_implementation = "sdpa"  # from_config wrote into it
    with pytest.raises(ValueError, match=words):
        model.set_attn_implementation("flash_attention_2")
    assert model.config._attn_implementation == "sdpa"
    assert kind.from_pretrained(tmp_path, attn_implementation="sdpa").config._attn_implementation == "sdpa"


def test_without_the_flash_package_transformers_says_so(monkeypatch, tmp_path):
    """No other backend takes its place in silence."""
    missing = {"general_availability_check": lambda: False, "pkg_availability_check": lambda: False}
    missing["custom_supported_devices"] = ()
    matrix = flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX
    monkeypatch.setitem(matrix, 2, {**matrix[2], **missing})
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda *args, **kwargs: False)
    model = make_model({}, implementation="sdpa")
    model.save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="FlashAttention2"):
        ConvTransformerModel.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    with pytest.raises(ImportError, match="FlashAttention2"):
        model.set_attn_implementation("flash_attention_2")
    assert model.config._attn_implementation == "sdpa"


def test_flex_attention_has_no_dropout():
    model = make_model({"attn_pdrop": 0.1})
    model.set_attn_implementation("flex_attention")
    features = torch.randn(1, 40, 6)
    with torch.no_grad():
        assert model(features).last_hidden_state.isfinite().all()
    model.train()
    with pytest.raises(ValueError, match=r"attn_pdrop=0\.1") as caught:
        model(features)
    assert 'attn_implementation="sdpa"' in str(caught.value)


# --- Compilation ----------------------------------------------------------------------------------------------------------


def count_graphs(settings, padded, lengths):
    """Of a model compiled without graph breaks and for any length; its outputs are compared, too."""
    torch._dynamo.reset()
    model = make_model(settings, implementation="sdpa")
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        # two samples, because a batch of one has no stride that a graph could depend on
        features = torch.randn(2, length, sum(model.config.stream_widths), generator=generator)
        mask = torch.arange(length) < torch.tensor([[length], [length // 2]]) if padded else None
        for one, other in zip(compiled(features, mask).feature_maps, model(features, mask).feature_maps, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)  # the same operations, traced
    return len(graphs)


@pytest.mark.parametrize(
    ("settings", "padded", "most"),
    [
        ({}, True, 1),
        ({"is_causal": True}, True, 1),
        ({"mha_win_size": 9, "use_rel_pe": True, "is_causal": True}, True, 2),
        ({"use_rel_pe": True}, True, 1),
        ({"use_rope": True, "max_len": 150, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, True, 1),
    ],
    ids=["global", "causal", "window", "bias", "dynamic_rope"],
)
@torch.no_grad()
def test_one_graph_serves_many_lengths(settings, padded, most):
    """A window has two: of lengths that fill their blocks of 32 queries, and of others."""
    settings = {"n_in": 24, "arch": (0, 1, 0), "use_rope": False, "use_swiglu": False, **settings}
    assert count_graphs(settings, padded, (100, 128, 130, 200, 256, 300, 333, 320, 352)) <= most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "padded", "most"),
    [({}, False, 1), ({**V1, "mha_win_size": 9}, True, 2)],
    ids=["default", "v1_padded"],
)
@torch.no_grad()
def test_few_graphs_of_a_pyramid_serve_many_lengths(settings, padded, most):
    """A window has two as above, here of lengths that fill the blocks of both levels, or of neither."""
    assert count_graphs({**settings, "arch": (1, 1, 1)}, padded, (100, 128, 130, 200, 256, 300, 333)) <= most


@pytest.mark.parametrize(
    "fields",
    [
        {"mha_win_size": 9},
        {"mha_win_size": [19, 63, -1, 301]},
        {"mha_win_size": 9, "is_causal": True, "n_kv_head": 2},
        {"mha_win_size": 9, "use_rel_pe": True},
        {"use_rms_norm": False, "use_batch_norm": True},
    ],
    ids=str,
)
def test_long_recordings_in_chunks_are_those_in_one_piece(fields, monkeypatch):
    """Chunks of 128 steps, of which some windows leave none: those stay whole."""
    torch.manual_seed(0)
    small = {"n_in": 6, "n_embd": 32, "n_head": 4, "arch": (1, 1, 3), "path_pdrop": 0}
    model = ConvTransformerModel(ConvTransformerConfig(**small, **fields)).eval()
    features, mask = torch.randn(2, 1000, 6), torch.arange(1000) < torch.tensor([[1000], [701]])
    with torch.no_grad():
        for padding in (None, mask):
            expected = model(features, padding).feature_maps
            with monkeypatch.context() as patch:
                for module in (attention_convtransformer, modeling_convtransformer):
                    patch.setattr(module, "CHUNK", 128)
                assert attention_convtransformer.runs_in_chunks(model, 1000)
                assert not attention_convtransformer.runs_in_chunks(torch.nn.Linear(1, 1).train(), 1000)
                output = model(features, padding).feature_maps
            for one, other in zip(output, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
