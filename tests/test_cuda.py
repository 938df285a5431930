"""Attention and models on an NVIDIA GPU, under every backend that is there, against the definition on the CPU.

The kernels run here that the other tests only describe: flex_attention compiled, with its lists of blocks and its
gradients; sdpa's choice of kernels; flash-attn where it is installed; CUDA graphs. Heads have 16 channels or more,
because flex_attention's kernels want that.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerForMomentRetrieval,
    ConvTransformerForTemporalActionLocalization,
    ConvTransformerModel,
)
from modeling_convtransformer.attention_convtransformer import attend, eager_attention_forward, make_attention_mask

try:  # without accelerate there is no Trainer
    from test_training import detector, make_trainer

    from modeling_convtransformer.training import EMACallback
except pytest.skip.Exception:
    pass

DEVICE = "cuda"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch.cuda.is_available() is False"
    ),
]

FLASH = pytest.param(
    "flash_attention_2",
    marks=pytest.mark.skipif(
        not is_flash_attn_2_available(), reason="flash-attn is not installed (pip install flash-attn)"
    ),
)
BACKENDS = ["eager", "sdpa", "flex_attention", FLASH]
DTYPES = [torch.float32, torch.bfloat16]

# Largest error, as a part of the largest value. float32: sums of 300 products in another order are off by 1e-6, and
# kernels may split factors into parts of 11 bits. bfloat16 has 8 bits: scores of up to 8, weights, outputs and what
# gradients are made of are each off by 1/512; inputs are rounded before both ways, so they add nothing.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@pytest.fixture(autouse=True)
def _float32_is_float32():
    """No TF32, which has 11 bits, in convolutions and products."""
    places = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    yield
    for place, allowed in zip(places, before, strict=True):
        place.allow_tf32 = allowed


@pytest.fixture
def forgotten():
    """Compiled functions of this test alone: PyTorch keeps 8 of each, and would go on without compiling."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def remembered():
    """Compiled functions of all tests, which share many of them."""
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: 100}):
        yield


def skip_without_kernel(implementation, dtype, with_bias=False, holes=False):
    if implementation != "flash_attention_2":
        return
    if dtype == torch.float32:
        pytest.skip("flash kernels are half precision")
    if with_bias:
        pytest.skip("flash kernels take no bias")
    if holes:
        pytest.skip("flash kernels close up what is padded before they count the steps of a window")


def assert_near(output, expected, dtype, name="output"):
    """Every value within the type's tolerance, which is a part of the largest (or of 1: a gradient may be all zero)."""
    output, expected = output.detach().double().cpu(), expected.detach().double().cpu()
    assert output.isfinite().all(), name
    error, largest = (output - expected).abs().max().item(), max(expected.abs().max().item(), 1.0)
    assert error <= TOLERANCE[dtype] * largest, f"{name}: off by {error:.2e} of {largest:.2e}"


# --- Attention ------------------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """What `attend` and the backends want to know of an attention module."""

    def __init__(self, implementation, window, is_causal, groups):
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation=implementation)
        self.window, self.is_causal, self.num_key_value_groups = window, is_causal, groups
        self.projection = nn.Linear(1, 1)


def attend_there(implementation, query, key, value, valid, window, is_causal, bias=None):
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    holder = Holder(implementation, window, is_causal, query.shape[1] // key.shape[1])
    mask = make_attention_mask(implementation, valid, query.shape[2], window, is_causal, query.dtype, query.device)
    scaling = query.shape[-1] ** -0.5
    return attend(holder, interface, query, key, value, mask, relative_bias=bias, dropout=0.0, scaling=scaling)[0]


def dense(query, key, value, valid, window, is_causal, bias=None, rows=None):
    """
    Softmax attention as its definition reads, of all queries or those in `rows`; padded queries are left at 0.
    (batch, heads, time, channels) to (batch, rows, heads, channels).
    """
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    rows = torch.arange(length) if rows is None else rows
    offset = torch.arange(length)[None, :] - rows[:, None]
    seen = torch.ones_like(offset, dtype=torch.bool)
    if window > 1:
        seen &= offset.abs() <= window // 2
    if is_causal:
        seen &= offset <= 0
    seen = seen[None, None] if valid is None else seen & valid[:, None, None, :]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query[:, :, rows] @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    if bias is not None:
        half = bias.shape[1] // 2
        scores = scores + bias[:, (offset + half).clamp(0, 2 * half)]
    weights = scores.masked_fill(~seen, -1e300).softmax(-1)
    output = (weights @ value).transpose(1, 2)
    return output if valid is None else output * valid[:, rows, None, None]


def make_inputs(length, heads, kv_heads, window, with_bias, dtype, batch=3, width=16):
    """In float64 on the CPU, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, count, length, width) for count in (heads, kv_heads, kv_heads)]
    shapes += [(heads, window)] if with_bias else []
    return [torch.randn(shape, generator=generator).to(dtype).double().requires_grad_() for shape in shapes]


def make_padding(kind, length):
    """Three samples: one whole, one in part, one with a single valid step."""
    steps, counts = torch.arange(length), torch.tensor([[length], [length // 2 + 1], [1]])
    generator = torch.Generator().manual_seed(0)
    return {
        "none": None,
        "right": steps < counts,
        "left": steps >= length - counts,
        "holes": torch.rand(3, length, generator=generator) < 0.6,
    }[kind]


def compare_attention(device, implementation, dtype, length, heads, window, padding, is_causal, with_bias):
    """Outputs of valid queries and all gradients against float64."""
    inputs = make_inputs(length, *heads, window, with_bias, dtype)
    valid = make_padding(padding, length)
    expected = dense(*inputs[:3], valid, window, is_causal, *inputs[3:])
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype).double()
    direction = direction if valid is None else direction * valid[..., None, None]
    expected_gradients = torch.autograd.grad((expected * direction).sum(), inputs)

    there = [tensor.detach().to(device, dtype).requires_grad_() for tensor in inputs]
    valid_there = None if valid is None else valid.to(device)
    output = attend_there(implementation, *there[:3], valid_there, window, is_causal, *there[3:])
    gradients = torch.autograd.grad(output, there, direction.to(device, dtype))
    assert output.isfinite().all()
    assert_near(output if valid is None else output * valid_there[..., None, None], expected, dtype)
    names = ("query", "key", "value", "bias")
    for name, gradient, expected_gradient in zip(names, gradients, expected_gradients, strict=False):
        assert_near(gradient, expected_gradient, dtype, f"gradient of {name}")


# window, padding, causal, bias, (heads, key heads), length; lengths around the kernels' blocks of 128
KINDS = {
    "global": (-1, "none", False, False, (2, 2), 130),
    "global_padded": (-1, "right", False, False, (2, 2), 257),
    "global_holes": (-1, "holes", False, False, (2, 2), 130),
    "causal": (-1, "none", True, False, (2, 2), 257),
    "causal_padded": (-1, "right", True, False, (2, 2), 257),
    "causal_left": (-1, "left", True, False, (2, 2), 130),
    "window": (9, "none", False, False, (2, 2), 300),
    "window_padded": (9, "right", False, False, (2, 2), 257),
    "window_left": (63, "left", False, False, (2, 2), 300),
    "window_holes": (19, "holes", False, False, (2, 2), 128),
    "window_over_all": (301, "right", False, False, (2, 2), 130),
    "causal_window": (19, "right", True, False, (2, 2), 300),
    "groups_of_2": (-1, "right", False, False, (4, 2), 130),
    "groups_of_3_window": (9, "right", False, False, (6, 2), 130),
    "one_key_head": (-1, "none", False, False, (4, 1), 129),
    "bias": (9, "right", False, True, (2, 2), 257),
    "bias_causal": (19, "left", True, True, (4, 2), 130),
    "one_step": (9, "right", False, False, (2, 2), 1),
    "one_block": (9, "right", False, False, (2, 2), 31),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_a_dense_softmax(kind, implementation, dtype, remembered):
    window, padding, is_causal, with_bias, heads, length = KINDS[kind]
    skip_without_kernel(implementation, dtype, with_bias, window > 1 and padding == "holes")
    compare_attention(DEVICE, implementation, dtype, length, heads, window, padding, is_causal, with_bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(("window", "is_causal"), [(-1, False), (-1, True), (9, False), (9, True)])
def test_a_sample_without_a_valid_step_is_finite_and_leaves_its_neighbours_alone(
    window, is_causal, implementation, dtype, remembered
):
    skip_without_kernel(implementation, dtype)
    length = 150
    there = [tensor.detach().to(DEVICE, dtype) for tensor in make_inputs(length, 2, 2, window, False, dtype)]
    valid = torch.ones(3, length, dtype=torch.bool, device=DEVICE)
    valid[1] = False
    valid[2, 97:] = False

    def outputs_and_gradients(samples):
        inputs = [tensor[samples].requires_grad_() for tensor in there]
        output = attend_there(implementation, *inputs, valid[samples], window, is_causal)
        return output, *torch.autograd.grad(output.sum(), inputs)

    together = outputs_and_gradients([0, 1, 2])
    assert all(tensor.isfinite().all() for tensor in together)
    for sample in (0, 2):
        for one, alone in zip(together, outputs_and_gradients([sample]), strict=True):
            assert_near(one[[sample]], alone, dtype)


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", FLASH])
@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
def test_a_window_over_65536_steps(is_causal, implementation, forgotten):
    length, window = 65536, 19
    inputs = make_inputs(length, 4, 2, window, False, torch.bfloat16, batch=1)
    valid = torch.arange(length)[None] < 60000
    there = [tensor.detach().to(DEVICE, torch.bfloat16) for tensor in inputs]
    with torch.no_grad():
        output = attend_there(implementation, *there, valid.to(DEVICE), window, is_causal)
        # the ends, blocks of 32 and of 128, the last valid steps
        rows = torch.tensor([0, 1, 17, 18, 31, 32, 127, 128, 4095, 4096, 40000, 59990, 59999])
        expected = dense(*inputs, valid, window, is_causal, rows=rows)
    assert_near(output[:, rows], expected, torch.bfloat16)
    assert output.isfinite().all()


# --- Models ---------------------------------------------------------------------------------------------------------------

# Heads of 16 channels. No drop path: its scales start near zero and would hide what attention does.
SMALL = {
    "n_in": 8,
    "n_embd": 96,
    "n_head": 6,
    "arch": (1, 1, 2),
    "path_pdrop": 0,
    "num_labels": 3,
    "init_loss_norm": 50,
}
V1 = {"use_rope": False, "use_swiglu": False, "use_rms_norm": False, "use_abs_pe": True, "mask_conv_inputs": False}
SETTINGS = {
    "default": {},
    "v1": {**V1, "mha_win_size": 9},
    "windows": {"mha_win_size": [19, -1, 5]},
    "groups_of_3": {"n_kv_head": 2},
    "groups_of_2_window": {"n_kv_head": 3, "mha_win_size": 9},
    "causal": {"is_causal": True},
    "causal_window": {"is_causal": True, "mha_win_size": 9},
    "bias": {"mha_win_size": [9, 5, -1], "use_rel_pe": True},
    "bias_causal": {"mha_win_size": 9, "use_rel_pe": True, "is_causal": True, "n_kv_head": 2},
}


def make_model(settings, kind=ConvTransformerModel):
    """A model whose norms and biases are not the identity, which would hide what padding holds."""
    torch.manual_seed(0)
    model = kind(ConvTransformerConfig(**{**SMALL, **settings}, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def make_features(length):
    features = torch.randn(3, length, 8, generator=torch.Generator().manual_seed(length))
    return features, make_padding("right", length)


def compare_pyramids(output, expected, dtype):
    for level, valid in enumerate(expected.feature_masks):
        one = output.feature_maps[level].cpu()
        assert (one[valid == 0] == 0).all()
        one, other = one[valid == 1].double(), expected.feature_maps[level][valid == 1].double()
        if dtype == torch.float32:
            assert_near(one, other, dtype, f"level {level}")
        else:  # 8 bits through three blocks and their convolutions: single values may be far off, not their average
            assert one.isfinite().all()
            assert (one - other).abs().mean() < 0.05 * other.std()


def compare_models(device, implementation, settings, dtype):
    """A backend on the device against the definition in float32 on the CPU; a full batch, then one with padding."""
    model = make_model(settings)
    cases = [(features, one) for features, mask in map(make_features, (150, 257)) for one in (None, mask)]
    with torch.no_grad():
        expected = [model(features, mask) for features, mask in cases]
        model.to(device, dtype).set_attn_implementation(implementation)
        for (features, mask), one in zip(cases, expected, strict=True):
            output = model(features.to(device), None if mask is None else mask.to(device))
            compare_pyramids(output, one, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("error:flex_attention called without torch.compile")
def test_models_equal_eager_on_the_cpu(name, implementation, dtype, forgotten):
    skip_without_kernel(implementation, dtype, "use_rel_pe" in SETTINGS[name])
    compare_models(DEVICE, implementation, SETTINGS[name], dtype)


def compare_moments(device, implementation, settings, dtype):
    """The same for moment retrieval: two decoder layers, queries of four words and fewer."""
    model = make_model({**settings, "text_dim": 6, "decoder_layers": 2}, ConvTransformerForMomentRetrieval)
    generator = torch.Generator().manual_seed(0)
    words, known = torch.randn(3, 2, 4, 6, generator=generator), torch.ones(3, 2, 4)
    known[1, 0, 1:] = known[2, 1, 3:] = 0
    features, mask = make_features(150)
    with torch.no_grad():
        expected = model(features, mask, query_embeds=words, query_attention_mask=known)
        model.to(device, dtype).set_attn_implementation(implementation)
        inputs = {"query_embeds": words, "query_attention_mask": known}
        inputs = {name: value.to(device) for name, value in inputs.items()}
        output = model(features.to(device), mask.to(device), **inputs)
    valid = (expected.point_mask[:, None] * expected.query_mask[..., None]) == 1
    one, other = output.logits.cpu()[valid].double(), expected.logits[valid].double()
    if dtype == torch.float32:
        assert_near(one, other, dtype, "logits")
    else:  # 8 bits through seven blocks and the heads: single values may be far off, not their average
        assert one.isfinite().all()
        assert (one - other).abs().mean() < 0.1 * other.std()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("name", ["default", "windows", "groups_of_3", "causal", "bias"])
@pytest.mark.filterwarnings("error:flex_attention called without torch.compile")
def test_moments_equal_eager_on_the_cpu(name, implementation, dtype, forgotten):
    skip_without_kernel(implementation, dtype, "use_rel_pe" in SETTINGS[name])
    compare_moments(DEVICE, implementation, SETTINGS[name], dtype)


def compare_compiled(device, implementation, settings, padded, dtype=torch.float32, **options):
    model = make_model({**settings, "arch": (1, 1, 1)}).to(device, dtype)
    model.set_attn_implementation(implementation)
    compiled = torch.compile(model, fullgraph=True, **options)
    with torch.no_grad():
        for length in (150, 257):
            features, mask = make_features(length)
            features, mask = features.to(device), mask.to(device) if padded else None
            expected = model(features, mask)
            for _ in range(3):  # CUDA graphs are recorded in the second call and replayed from the third on
                output = compiled(features, mask)
                for level, valid in enumerate(expected.feature_masks):
                    one, other = output.feature_maps[level], expected.feature_maps[level]
                    assert_near(one[valid == 1], other[valid == 1], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@pytest.mark.parametrize(
    ("settings", "padded"),
    [
        ({}, False),
        ({"mha_win_size": 9, "n_kv_head": 3}, True),
        ({"is_causal": True}, True),
        ({"mha_win_size": [9, 5], "use_rel_pe": True}, True),
    ],
    ids=str,
)
def test_compiled_models_equal_themselves(settings, padded, implementation, mode, forgotten):
    compare_compiled(DEVICE, implementation, settings, padded, mode=mode)


@pytest.mark.slow
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed (pip install flash-attn)")
@pytest.mark.parametrize("settings", [{}, {"mha_win_size": 9, "n_kv_head": 3}], ids=str)
def test_compiled_models_with_flash_kernels(settings, forgotten):
    """Without padding, which transformers takes out with sizes that a graph cannot know."""
    compare_compiled(DEVICE, "flash_attention_2", settings, False, torch.bfloat16)


def train_one_step(device, implementation, settings, dtype):
    """Loss and gradients by name, under autocast to `dtype`; in float32 on the CPU if that is None."""
    model = make_model(settings, ConvTransformerForTemporalActionLocalization).to(device).train()
    model.set_attn_implementation(implementation)
    features, mask = make_features(150)
    mask[2] = False  # a sample without a valid step
    labels = [([[3.0, 20.0], [40.0, 120.0]], [0, 2]), ([[10.0, 30.0]], [1]), ([], [])]
    labels = [
        {
            "segments": torch.tensor(s, device=device).reshape(-1, 2),
            "class_labels": torch.tensor(c, device=device).long(),
        }
        for s, c in labels
    ]
    with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None):
        output = model(features.to(device), mask.to(device), labels=labels)
    output.loss.backward()
    return output.loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("name", ["default", "v1", "windows", "groups_of_3", "causal", "bias_causal"])
def test_a_training_step_under_autocast(name, implementation, forgotten):
    skip_without_kernel(implementation, torch.bfloat16, "use_rel_pe" in SETTINGS[name])
    expected, expected_gradients = train_one_step("cpu", "eager", SETTINGS[name], None)
    loss, gradients = train_one_step(DEVICE, implementation, SETTINGS[name], torch.bfloat16)
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)  # 8 bits through three blocks and the heads
    for parameter, expected_gradient in expected_gradients.items():
        gradient = gradients[parameter].float().cpu()
        assert gradient.isfinite().all(), parameter
        # In the same direction: single values are small differences of large sums, and may be off in bfloat16.
        if expected_gradient.norm() > 1e-4 * max(other.norm() for other in expected_gradients.values()):
            similarity = torch.cosine_similarity(gradient.flatten(), expected_gradient.flatten(), dim=0)
            assert similarity > 0.9, f"{parameter}: {similarity:.3f}"


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", FLASH])
def test_gradients_in_half_precision_are_finite(implementation, forgotten):
    """Weights themselves in bfloat16, a learned bias too."""
    settings = {"mha_win_size": 9, "use_rel_pe": implementation != "flash_attention_2"}
    model = make_model(settings, ConvTransformerForTemporalActionLocalization).to(DEVICE, torch.bfloat16).train()
    model.set_attn_implementation(implementation)
    features, mask = make_features(150)
    labels = [{"segments": torch.tensor([[3.0, 20.0]]), "class_labels": torch.tensor([0])}] * 3
    labels = [{name: tensor.to(DEVICE) for name, tensor in label.items()} for label in labels]
    model(features.to(DEVICE), mask.to(DEVICE), labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


class Overflow(TrainerCallback):
    """Before the step `at`, sets the scale so high that every gradient overflows; writes down what each step left."""

    def __init__(self, trainer, at):
        self.trainer, self.at = trainer, at
        self.states, self.scales = [], []

    def _write_down(self, model):
        optimizer = self.trainer.optimizer.state_dict()["state"]
        moments = [value for one in optimizer.values() for value in one.values() if torch.is_tensor(value)]
        self.states.append([tensor.detach().clone() for tensor in [*model.parameters(), *moments]])

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        scaler = self.trainer.accelerator.scaler
        if len(self.scales) == self.at:
            scaler.update(new_scale=2.0**60)
        self._write_down(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        scaler = self.trainer.accelerator.scaler
        self.scales.append(scaler.get_scale())
        self._write_down(model)
        if len(self.scales) == self.at + 1:
            scaler.update(new_scale=2.0**10)  # not one halving a step


@pytest.mark.parametrize(
    "settings", [{}, {"use_rms_norm": False, "use_batch_norm": True}], ids=["rms_norm", "batch_norm"]
)
def test_trainer_skips_a_step_that_overflows_in_float16(settings, tmp_path):
    """test_precision.py has the same on the CPU, where Trainer has no float16."""
    pytest.importorskip("accelerate", reason="Trainer needs accelerate (the train and demo extras)")
    trainer = make_trainer(
        tmp_path,
        model=detector(**settings),
        use_cpu=False,
        fp16=True,
        max_steps=20,
        optim="adamw_torch",
        learning_rate=3e-3,
        max_grad_norm=1.0,
        per_device_train_batch_size=5,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
    )
    average, overflow = EMACallback(trainer, 0.9), Overflow(trainer, at=3)
    trainer.add_callback(average)
    trainer.add_callback(overflow)
    trainer.train()
    before, after = overflow.states[6:8]  # two a step; optimizers have no state before the first
    assert overflow.scales[3] == 2.0**59
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    for place in (4, 19):  # and those that follow learn again
        before, after = overflow.states[2 * place : 2 * place + 2]
        assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    for tensors in (dict(trainer.model.named_parameters()), dict(trainer.model.named_buffers()), average.average):
        for name, tensor in tensors.items():
            assert tensor.isfinite().all(), name
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", FLASH])
@pytest.mark.parametrize("settings", [{"mha_win_size": 19}, {"mha_win_size": 19, "is_causal": True}], ids=str)
def test_a_model_over_65536_steps(settings, implementation, forgotten):
    """In memory that grows with the length: a mask of 65,536 by 65,536 steps alone would be 4.3 GB."""
    model = make_model(settings).to(DEVICE, torch.bfloat16)
    model.set_attn_implementation(implementation)
    features = torch.randn(1, 65536, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mask = torch.arange(65536, device=DEVICE)[None] < 60000
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        output = model(features, mask)
    assert torch.cuda.max_memory_allocated() < 2**31
    for level, feature_map in enumerate(output.feature_maps):
        assert feature_map.isfinite().all()
        assert (feature_map[:, -(-60000 // 2**level) :] == 0).all()
        assert feature_map[:, : 60000 // 2**level].float().abs().mean() > 0.01
