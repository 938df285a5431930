import copy
import json
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from test_hub import PREAMBLE, clean_python, publish  # noqa: F401 - a fixture
from test_modeling_convtransformer import SMALL, make_detector, randomize
from torch import nn

from modeling_convtransformer import (
    ConvTransformerBackbone,
    ConvTransformerConfig,
    ConvTransformerForTemporalActionLocalization,
)
from modeling_convtransformer import quantization as quantization_module
from modeling_convtransformer.modeling_convtransformer import MaskedConv1d, dequantized
from modeling_convtransformer.quantization import (
    CONVOLUTION,
    LINEAR,
    METHODS,
    STORES,
    convert_qat,
    prepare_qat,
    quantization_config,
    quantize,
    quantize_static,
)

pytest.importorskip("torchao", reason="quantization needs torchao")

CONFIGURATION = Path(__file__).parent.parent / "configuration"
ON_CPU = [method for method in METHODS if method != "float8_dynamic"]
# What a method may change a random detector's logits by, relative: some times what was measured (0.01, 0.02, 0.02, 0.07,
# 0.5). Ternary weights are near nothing of a model that was not trained for them.
CHANGES = {"int8": 0.03, "int8_dynamic": 0.06, "float8": 0.08, "int4": 0.25, "ternary": 1.2}


def make_features(batch=2, time=45, width=SMALL["n_in"], seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, time, width, generator=generator)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def logits_of(model, *inputs):
    return model(*inputs).logits


# --- What is stored in fewer bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted(path.name for path in CONFIGURATION.glob("*.yaml")))
def test_the_names_for_transformers_are_those_of_linear_layers_and_dense_convolutions(recipe):
    config = ConvTransformerConfig.from_yaml(CONFIGURATION / recipe)
    with torch.device("meta"):
        model = ConvTransformerForTemporalActionLocalization(config)
    for name, _ in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        is_weight = name.endswith(".weight")
        expected = {
            LINEAR: is_weight and isinstance(module, nn.Linear),
            CONVOLUTION: is_weight and isinstance(module, MaskedConv1d) and module.groups == 1,
        }
        for pattern, is_named in expected.items():
            assert bool(re.fullmatch(pattern.removeprefix("re:"), name)) == is_named, name


@pytest.mark.parametrize("method", ON_CPU)
def test_every_weight_of_linear_layers_and_convolutions_and_nothing_else(method):
    model = quantize(make_detector(fpn_type="fpn", backbone_type="convTransformer"), method)
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        is_stored = isinstance(module, nn.Linear | MaskedConv1d) and name.endswith(".weight")
        assert hasattr(parameter, "qdata") == is_stored, name
        assert parameter.dtype == torch.float32
    assert model.dtype == torch.float32


# --- How a weight is stored, against brute force --------------------------------------------------------------------


def draw_weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 12), (4, 6, 3), (7, 1, 3), (3, 5, 3)])
def test_int8_is_off_by_half_a_step_of_each_row(shape):
    weight = draw_weight(*shape)
    weight[0] = 0  # a row of nothing stays nothing
    stored = dequantized(STORES["int8"][0](weight))
    step = weight.flatten(1).abs().amax(1) / 127
    # The scale is rounded to bfloat16 (8 bits): the largest values may lie half a step more beyond the last integer.
    off = (stored - weight).flatten(1).abs().amax(1)
    assert (off <= 1.01 * step).all()
    small = weight.flatten(1).abs() < 100 * step[:, None]
    assert ((stored - weight).flatten(1).abs() <= 0.505 * step[:, None])[small].all()
    assert stored.shape == weight.shape
    assert (stored[0] == 0).all()


@pytest.mark.parametrize("shape", [(5, 12), (4, 6, 3), (2, 300), (3, 100, 3), (2, 256)])
def test_int4_is_what_two_values_a_byte_say(shape):
    weight = draw_weight(*shape)
    stored = STORES["int4"][0](weight)
    rows, width = shape[0], weight[0].numel()
    group = stored.block_size[1]
    assert stored.qdata.numel() == weight.numel() // 2
    assert width % group == 0
    assert group <= 128
    expected = torch.zeros(rows, width)
    for row in range(rows):  # byte by byte, in whole numbers of Python
        for byte, value in enumerate(stored.qdata[row].tolist()):
            for half, number in enumerate((value & 0xF, (value >> 4) & 0xF)):
                column = 2 * byte + half
                number = number - 16 if number > 7 else number
                scale = stored.scale[column // group, row].item()
                expected[row, column] = number * scale + stored.zero_point[column // group, row].item()
    torch.testing.assert_close(dequantized(stored).flatten(1), expected, rtol=1e-6, atol=1e-6)  # float32 sums
    groups = weight.reshape(rows, -1, group)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    off = (expected - weight.flatten(1)).reshape(rows, -1, group).abs().amax(-1)
    assert (off <= 0.501 * step).all()


def test_an_odd_number_of_inputs_is_stored_in_eight_bits():
    for method in ("int4", "ternary"):
        stored = STORES[method][0](draw_weight(4, 7))
        assert stored.qdata.numel() == 28
        assert relative(dequantized(stored), draw_weight(4, 7)) < 0.01


def test_ternary_is_three_values_a_row():
    weight = draw_weight(5, 64)
    stored = dequantized(STORES["ternary"][0](weight))
    for row, own in zip(weight, stored, strict=True):
        scale = row.abs().mean()
        torch.testing.assert_close(own, scale * (row / scale).round().clamp(-1, 1), rtol=1e-6, atol=1e-7)
        assert len(own.unique()) == 3


# --- Whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ON_CPU)
def test_saved_and_loaded_it_is_the_same(method, tmp_path):
    model, features = make_detector(), make_features()
    full = logits_of(model, features)
    model = quantize(model, method)
    expected = logits_of(model, features)
    assert 0 < relative(expected, full) < CHANGES[method]
    model.save_pretrained(tmp_path)
    loaded = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path)
    assert loaded.is_quantized
    assert not loaded.untrained_weights
    assert loaded.dtype == torch.float32
    assert torch.equal(logits_of(loaded, features), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(again, features), expected)
    assert os.path.getsize(tmp_path / "again" / "model.safetensors") == os.path.getsize(tmp_path / "model.safetensors")
    backbone = ConvTransformerBackbone.from_pretrained(tmp_path)
    with torch.no_grad():
        maps = model.model(features).feature_maps
        assert torch.equal(backbone(features).feature_maps[-1], maps[-1])


@pytest.mark.parametrize(("method", "share"), [("int8", 0.265), ("int4", 0.155), ("float8", 0.265)])
def test_size_on_disk(method, share, tmp_path):
    # A quarter and an eighth of float32, scales (one for 128 weights and more) and what stays float32 (1 %).
    model = make_detector(n_in=256, n_embd=256, n_head=4, arch=(2, 1, 3), num_labels=20)
    model.save_pretrained(tmp_path / "full")
    quantize(model, method).save_pretrained(tmp_path / "few")
    sizes = [os.path.getsize(tmp_path / name / "model.safetensors") for name in ("full", "few")]
    assert sizes[1] < share * sizes[0]


@pytest.mark.parametrize("method", ["int8", "int8_dynamic", "float8"])
def test_quantized_while_loading(method, tmp_path):
    model, features = make_detector(), make_features()
    model.save_pretrained(tmp_path)
    loaded = ConvTransformerForTemporalActionLocalization.from_pretrained(
        tmp_path, quantization_config=quantization_config(method)
    )
    # Scales are float32 instead of bfloat16, and depthwise convolutions are not rounded.
    assert relative(logits_of(loaded, features), logits_of(model, features)) < CHANGES[method]
    assert hasattr(loaded.class_head.output.weight, "qdata")
    assert hasattr(loaded.model.stem[0].mlp.up_proj.weight, "qdata")
    loaded.save_pretrained(tmp_path / "saved")
    again = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(again, features), logits_of(loaded, features))


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("variant", [{}, {"is_causal": True}, {"backbone_type": "conv"}, {"fpn_type": "fpn"}])
def test_alone_as_padded(method, variant):
    model = quantize(make_detector(**variant), method)
    features = make_features(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 23:] = 0
    with torch.no_grad():
        both = model(features, mask)
        alone = model(features[1:, :23])
    own = both.logits[1][both.point_mask[1] == 1]
    torch.testing.assert_close(own, alone.logits[0][alone.point_mask[0] == 1], rtol=1e-4, atol=1e-4)  # sums' order


@pytest.mark.parametrize("taps", [1, 3, 5])
@pytest.mark.parametrize("is_causal", [False, True])
def test_convolutions_with_rounded_inputs(taps, is_causal):
    config = ConvTransformerConfig(**SMALL, is_causal=is_causal)
    conv = MaskedConv1d(config, 16, 8, taps)
    nn.init.normal_(conv.bias)
    x, padding = make_features(2, 21, 16), torch.zeros(2, 21, 1, dtype=torch.bool)
    padding[1, 13:] = True
    expected = copy.deepcopy(conv).double()
    stored = STORES["int8_dynamic"][1](conv.weight.detach())
    expected.weight = nn.Parameter(dequantized(stored).double())
    rounded = quantization_module._round_steps(x).double()  # torchao's own rounding
    conv.weight = nn.Parameter(stored, requires_grad=False)
    with torch.no_grad():
        # Whole numbers are added exactly; then float32 against float64.
        torch.testing.assert_close(conv(x, padding).double(), expected(rounded, padding), rtol=1e-5, atol=1e-5)


def test_parts_that_keep_their_precision():
    model = quantize(make_detector(), "int8", keep=["class_head", "branch.0"])
    stored = {name for name, parameter in model.named_parameters() if hasattr(parameter, "qdata")}
    assert "segment_head.output.weight" in stored
    assert "model.branch.1.mlp.up_proj.weight" in stored
    assert not any("class_head" in name or "branch.0." in name for name in stored)


def test_nothing_left_to_round(tmp_path):
    quantize(make_detector(), "int8", keep=["model", "class_head", "segment_head"]).save_pretrained(tmp_path)
    loaded = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path)
    assert not any(hasattr(parameter, "qdata") for parameter in loaded.parameters())


def test_parts_that_keep_their_precision_while_loading(tmp_path):
    make_detector().save_pretrained(tmp_path)
    loaded = ConvTransformerForTemporalActionLocalization.from_pretrained(
        tmp_path, quantization_config=quantization_config("int8", keep=["class_head"])
    )
    stored = {name for name, parameter in loaded.named_parameters() if hasattr(parameter, "qdata")}
    assert "segment_head.output.weight" in stored
    assert not any("class_head" in name for name in stored)


def test_the_description_can_be_read(tmp_path):
    quantize(make_detector(), "int4").save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert described["quant_method"] == "torchao"
    assert "Int4WeightOnlyConfig" in json.dumps(described)


@pytest.mark.slow
def test_a_published_quantized_model_works_without_this_package(clean_python, tmp_path):  # noqa: F811
    folder = publish(tmp_path / "my-model")
    model = quantize(ConvTransformerForTemporalActionLocalization.from_pretrained(folder), "int4")
    model.save_pretrained(folder)
    features = make_features(1, 30)
    script = PREAMBLE + (
        "model = AutoModelForObjectDetection.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "features = torch.tensor(json.loads(sys.argv[2]))\n"
        "with torch.no_grad():\n"
        "    print(json.dumps(model(features).logits.tolist()))\n"
    )
    done = subprocess.run(
        [clean_python, "-c", script, folder, json.dumps(features.tolist())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, logits_of(model, features), rtol=0, atol=1e-6)  # the same sums; printed in full


# --- Training for it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ON_CPU)
def test_a_prepared_model_computes_as_the_quantized_one(method):
    model, features = make_detector(), make_features()
    names = [*model.state_dict()]
    expected = logits_of(quantize(copy.deepcopy(model), method), features)
    prepared = prepare_qat(model, method).eval()
    assert [*prepared.state_dict()] == names  # checkpoints are ordinary ones
    if method == "int8_dynamic":
        # torchao puts the largest value of a time step at 127.5 steps: the sums' order decides whether it becomes 127 or 128.
        assert relative(logits_of(prepared, features), expected) < CHANGES[method]
    else:
        torch.testing.assert_close(logits_of(prepared, features), expected, rtol=1e-4, atol=1e-4)  # sums' order
    converted = convert_qat(prepared)
    assert torch.equal(logits_of(converted, features), expected)


@pytest.mark.parametrize("fields", [{"fpn_type": "fpn"}, {"backbone_type": "conv"}])
@pytest.mark.parametrize("method", ON_CPU)
def test_each_layer_rounds_what_the_quantized_one_rounds(method, fields):
    model = make_detector(**fields)
    quantized, prepared = quantize(copy.deepcopy(model), method), prepare_qat(copy.deepcopy(model), method)
    for name, module in prepared.named_modules():
        if isinstance(module, nn.Linear | MaskedConv1d):
            width = module.in_features if isinstance(module, nn.Linear) else module.in_channels
            inputs = (make_features(2, 20, width),) + (() if isinstance(module, nn.Linear) else (None,))
            with torch.no_grad():  # the sums' order
                torch.testing.assert_close(
                    module(*inputs), quantized.get_submodule(name)(*inputs), rtol=1e-4, atol=1e-5
                )


@pytest.mark.parametrize("method", ["int4", "int8_dynamic", "ternary"])
def test_a_prepared_model_learns(method):
    torch.manual_seed(0)
    model = ConvTransformerForTemporalActionLocalization(ConvTransformerConfig(**SMALL))
    prepare_qat(model, method).train()
    features = make_features(2, 40)
    labels = [
        {"segments": torch.tensor([[5.0, 15.0], [22.0, 30.0]]), "class_labels": torch.tensor([0, 2])},
        {"segments": torch.tensor([[8.0, 30.0]]), "class_labels": torch.tensor([1])},
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(features, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    gradients = [p.grad.abs().sum().item() for name, p in model.named_parameters() if name.endswith("proj.weight")]
    assert all(math.isfinite(one) and one > 0 for one in gradients)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    with torch.no_grad():
        before = model.eval()(features, labels=labels).loss
        after = convert_qat(model)(features, labels=labels).loss
    assert abs(after - before) < 0.05 * before  # the loss's count of positives does not move in evaluation mode


def test_the_gradient_passes_the_rounding_as_if_it_were_not_there():
    linear = nn.Linear(6, 4)
    model = nn.ModuleDict({"only": linear})
    for module, store in [*quantization_module._targets(model, "int4", ())]:
        module.__class__ = quantization_module.RoundedLinear
        module.store, module.rounds_inputs = store, False
    x, upstream = make_features(1, 5)[0], torch.randn(5, 4)
    (linear(x) * upstream).sum().backward()
    torch.testing.assert_close(linear.weight.grad, upstream.T @ x)


# --- Ranges measured on recordings -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_static_program_serves_other_lengths_and_stays_near(tmp_path):
    model = make_detector(arch=(1, 1, 1), mha_win_size=5)
    recordings = [make_features(1, time, seed=time) for time in (12, 33, 40)]
    torch.export.save(quantize_static(model, recordings), tmp_path / "detector.pt2")
    program = torch.export.load(tmp_path / "detector.pt2").module()
    with torch.no_grad():
        for time in (9, 24, 61):
            features = make_features(1, time, seed=100 + time)
            outputs, expected = program(features), model(features)
            assert torch.equal(outputs["point_mask"], expected.point_mask)
            assert torch.equal(outputs["point_levels"], expected.point_levels)
            # Measured: 0.02. Ranges were measured on other features of the same kind.
            assert 0 < relative(outputs["logits"], expected.logits) < 0.06
    weights = torch.export.load(tmp_path / "detector.pt2").state_dict
    large = [tensor for tensor in weights.values() if tensor.dim() > 1]
    assert large
    assert all(tensor.dtype == torch.int8 for tensor in large)


@pytest.mark.parametrize(
    ("recordings", "message"),
    [
        ([], "There are no recordings"),
        ([torch.zeros(1, 40, 6), torch.zeros(2, 40, 6)], r"recordings\[1\] has shape \(2, 40, 6\); expected \(1,"),
        ([torch.zeros(1, 40, 5)], r"recordings\[0\].*expected \(1, time > 1, 6\)"),
    ],
)
def test_recordings_that_cannot_be_measured_on(recordings, message):
    with pytest.raises(ValueError, match=message):
        quantize_static(make_detector(), recordings)


# --- bitsandbytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="this row of the table needs bitsandbytes")
    from transformers import BitsAndBytesConfig

    model, features = make_detector(n_in=64, n_embd=64), make_features(1, 40, 64)
    model.save_pretrained(tmp_path)
    settings = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True}
    loaded = ConvTransformerForTemporalActionLocalization.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**settings), device_map={"": "cpu"}
    )
    assert 0 < relative(logits_of(loaded, features), logits_of(model, features)) < 0.3


# --- Wrong use -------------------------------------------------------------------------------------------------------


def test_wrong_use():
    with pytest.raises(ValueError, match="no method 'int3'; expected one of int8, int8_dynamic"):
        quantize(make_detector(), "int3")
    with pytest.raises(ValueError, match=r"keep names \['head'\], but the model has no such part"):
        quantize(make_detector(), "int8", keep=["head"])
    with pytest.raises(ValueError, match="not made while loading"):
        quantization_config("int4")
    model = quantize(make_detector(), "int8")
    with pytest.raises(ValueError, match="quantized already"):
        quantize(model, "int4")
    with pytest.raises(ValueError, match="quantized already"):
        prepare_qat(model, "int4")
    with pytest.raises(ValueError, match="prepared for it"):
        prepare_qat(prepare_qat(make_detector(), "int4"), "int4")
    with pytest.raises(ValueError, match="not prepared"):
        convert_qat(make_detector())
    with pytest.raises(ValueError, match='no training for "float8_dynamic"'):
        prepare_qat(make_detector(), "float8_dynamic")


@pytest.mark.parametrize("method", ON_CPU)
def test_another_dtype_than_it_was_quantized_in(method, tmp_path):
    quantize(make_detector(), method).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"quantized for torch.float32 and was to be loaded as torch.bfloat16. Leave dtype"
    ):
        ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path, dtype=torch.bfloat16)


def test_quantized_in_half_precision(tmp_path):
    model, features = make_detector(), make_features()
    full = logits_of(model, features)
    model = quantize(model.to(torch.bfloat16), "int4")
    model.save_pretrained(tmp_path)
    loaded = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits_of(loaded, features), logits_of(model, features))
    assert relative(logits_of(loaded, features).float(), full) < CHANGES["int4"]


def test_fine_tuning_starts_from_full_precision(tmp_path):
    from modeling_convtransformer.training import load_for_classes

    quantize(make_detector(), "int8").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is quantized, so that its weights cannot learn"):
        load_for_classes(tmp_path, ["a", "b", "c"])


def test_keep_is_checked_before_anything_is_rounded():
    model = make_detector()
    with pytest.raises(ValueError, match="no such part"):
        quantize(model, "int8", keep=["head"])
    assert not any(hasattr(parameter, "qdata") for parameter in model.parameters())


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9), reason="this GPU has float8"
)
def test_float8_products_need_a_gpu_that_has_them():
    with pytest.raises(RuntimeError, match='"float8" runs everywhere'):
        quantize(make_detector(), "float8_dynamic")


def test_adapters_are_merged_first():
    peft = pytest.importorskip("peft")
    import modeling_convtransformer.training  # noqa: F401 - tells PEFT the layers

    model = randomize(make_detector())
    peft.get_peft_model(model, peft.LoraConfig(r=2))
    with pytest.raises(ValueError, match="Merge them first"):
        quantize(model, "int8")


def test_without_torchao(monkeypatch):
    monkeypatch.setattr(quantization_module, "is_torchao_available", lambda: False)
    with pytest.raises(ImportError, match="Quantization needs torchao: pip install"):
        quantize(make_detector(), "int8")
