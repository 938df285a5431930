"""Attention under both backends against a dense softmax in float64 that is written out here."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_convtransformer import ConvTransformerConfig, ConvTransformerModel
from modeling_convtransformer.attention_convtransformer import (
    WindowFold,
    attend,
    eager_attention_forward,
    make_attention_mask,
)

INTERFACES = {"eager": eager_attention_forward, "sdpa": ALL_ATTENTION_FUNCTIONS["sdpa"]}

# float32 against float64: sums of up to 100 products of values around 1, each off by 6e-8, in scores and outputs.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Holder(nn.Module):
    """What `attend` and the backends want to know of an attention module."""

    def __init__(self, window, is_causal, groups=1):
        super().__init__()
        self.window, self.is_causal, self.num_key_value_groups = window, is_causal, groups


def allowed(valid, length, window, is_causal):
    """(batch, 1, time, time) bool, written as the definition reads."""
    rows = []
    for sample in valid.tolist():
        rows.append(
            [
                [
                    sample[j] and (window <= 1 or abs(i - j) <= window // 2) and (not is_causal or j <= i)
                    for j in range(length)
                ]
                for i in range(length)
            ]
        )
    return torch.tensor(rows)[:, None]


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
            offsets = torch.arange(length)[None, :] - torch.arange(length)[:, None] + half
            inside = (offsets >= 0) & (offsets <= 2 * half)
            scores = scores + torch.where(inside, bias[head].double()[offsets.clamp(0, 2 * half)], 0.0)
        scores = scores.exp() * may_see[:, 0]  # scores are small: no maximum to subtract
        weights = scores / scores.sum(-1, keepdim=True).clamp(min=1e-300)
        heads.append(weights @ value[:, head // groups])
    return torch.stack(heads, dim=2)  # (batch, time, heads, channels)


def attend_here(implementation, query, key, value, valid, window, is_causal, bias=None):
    groups = query.shape[1] // key.shape[1]
    holder = Holder(window, is_causal, groups)
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
    bias = torch.randn(heads, window, generator=generator) if with_bias else None
    return query, key, value, valid, bias


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 100),
    window=st.sampled_from([-1, 1, 3, 5, 9, 19, 63, "all"]),
    padding=st.sampled_from(["none", "right", "left", "holes"]),
    is_causal=st.booleans(),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1)]),
    with_bias=st.booleans(),
    implementation=st.sampled_from(["eager", "sdpa"]),
)
def test_equals_a_dense_softmax(seed, length, window, padding, is_causal, heads, with_bias, implementation):
    window = 2 * length + 1 if window == "all" else window
    query, key, value, valid, bias = random_case(seed, 2, length, *heads, padding, window, with_bias and window > 1)
    output, weights = attend_here(implementation, query, key, value, valid, window, is_causal, bias)
    all_valid = torch.ones(2, length, dtype=torch.bool) if valid is None else valid
    may_see = allowed(all_valid, length, window, is_causal)
    expected = dense(query, key, value, may_see, bias)
    sees = may_see.any(-1)[:, 0]  # (batch, time)
    assert output.shape == (2, length, heads[0], 4)
    assert output.isfinite().all()  # also where a query may see nothing
    torch.testing.assert_close(output[sees].double(), expected[sees], **CLOSE)
    if implementation == "eager":
        assert weights.shape == (2, heads[0], length, length)
        assert (weights.masked_fill(may_see, 0).transpose(0, 1)[:, sees] == 0).all()
    else:
        assert weights is None


# One case of each kind at every window, so that none depends on what hypothesis draws.
@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("window", [-1, 3, 9, 63, 141])
def test_outputs_and_gradients_equal_a_dense_softmax(window, padding, is_causal):
    length = 70
    query, key, value, valid, bias = random_case(window, 2, length, 4, 2, padding, window, window > 1)
    inputs = [query, key, value] + ([bias] if bias is not None else [])
    inputs = [tensor.requires_grad_() for tensor in inputs]
    may_see = allowed(torch.ones(2, length, dtype=torch.bool) if valid is None else valid, length, window, is_causal)
    direction = torch.randn(2, length, 4, 4, generator=torch.Generator().manual_seed(1))
    direction = direction * may_see.any(-1)[:, 0, :, None, None]
    expected = dense(query, key, value, may_see, bias)
    expected_gradients = torch.autograd.grad((expected * direction).sum(), inputs)
    for implementation in ("eager", "sdpa"):
        output, _ = attend_here(implementation, query, key, value, valid, window, is_causal, bias)
        gradients = torch.autograd.grad((output * direction).sum(), inputs)
        torch.testing.assert_close(output.double() * direction, expected * direction, **CLOSE)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert gradient.isfinite().all()
            # a gradient of a bias sums over 2 * 70 queries: ten times the tolerance of one value
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [-1, 9])
def test_a_sample_without_a_valid_step_is_finite(window, implementation):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 50, 4, requires_grad=True) for _ in range(3))
    valid = torch.ones(2, 50, dtype=torch.bool)
    valid[0] = False
    mask = make_attention_mask(implementation, valid, 50, window, False, torch.float32, query.device)
    seen = mask if mask.dtype == torch.bool else mask == 0
    assert seen.any(-1).all()  # older kernels answer a row that sees nothing with NaN
    output, _ = attend_here(implementation, query, key, value, valid, window, False)
    output.sum().backward()
    assert all(tensor.isfinite().all() for tensor in (output, query.grad, key.grad, value.grad))


def test_nothing_masked_is_no_mask():
    def make(implementation, valid, length, window, is_causal):
        return make_attention_mask(
            implementation, valid, length, window, is_causal, torch.float32, torch.device("cpu")
        )

    assert make("sdpa", None, 100, -1, False) is None
    assert make("sdpa", None, 100, -1, True) is None  # the kernel's own
    assert make("eager", None, 100, -1, False) is None
    assert make("eager", None, 100, -1, True) is not None
    # a window over everything is none
    assert make("sdpa", None, 50, 99, False) is None
    assert make("sdpa", None, 50, 97, False) is not None
    assert make("sdpa", torch.ones(2, 50).bool(), 50, 101, False).shape == (2, 1, 1, 50)


@pytest.mark.parametrize(("length", "window"), [(1, 3), (31, 3), (32, 3), (33, 3), (64, 19), (100, 63), (125, 63)])
def test_a_fold_holds_every_query_once_and_its_neighbourhood(length, window):
    fold = WindowFold(length, window)
    steps = torch.arange(1, length + 1, dtype=torch.float32)[None]
    queries = fold.fold_queries(steps[:, None, :, None])[0, :, :, 0, 0]  # (blocks, size)
    keys = fold.fold_keys(steps)[0]  # (blocks, size + window - 1)
    assert queries.flatten().tolist() == steps[0].tolist() + [0.0] * (queries.numel() - length)
    band = fold.band(False, torch.device("cpu"))[0, 0, 0]
    for block in range(len(queries)):
        for row in range(queries.shape[1]):
            step = int(queries[block, row])
            if step:
                seen = keys[block][band[row]].tolist()
                near = range(step - window // 2, step + window // 2 + 1)
                assert seen == [float(j) if 1 <= j <= length else 0.0 for j in near]


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


@pytest.mark.parametrize(
    ("settings", "padded"),
    [
        ({}, False),
        ({}, True),
        ({"is_causal": True}, False),
        ({"mha_win_size": 9}, True),
        ({"mha_win_size": 9, "is_causal": True, "use_rel_pe": True, "use_rope": False}, True),
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
