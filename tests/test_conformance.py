"""Every model class is what transformers asks of a model: saving and loading in all its ways, offloading, attention
backends, recorded outputs, gradient checkpointing, compiling and exporting, precision, configuration files.

The classes' own behaviour (padding, causality, losses, positions) is tested in the files named after the modules.
"""

import copy
import inspect
import json
import math
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_modeling_convtransformer import PLAIN, VARIANTS, WINDOWS, check_start, labels_of, make_config, randomize
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from modeling_convtransformer import (
    ConvTransformerBackbone,
    ConvTransformerConfig,
    ConvTransformerForMomentRetrieval,
    ConvTransformerForTemporalActionLocalization,
    ConvTransformerModel,
    modeling_convtransformer,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:.*radient_checkpointing.*:FutureWarning"),  # transformers 5.23 has a new name
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules"),
]

Detector = ConvTransformerForTemporalActionLocalization
Retrieval = ConvTransformerForMomentRetrieval
CLASSES = {
    "model": ConvTransformerModel,
    "backbone": ConvTransformerBackbone,
    "detector": Detector,
    "retrieval": Retrieval,
}

# Between them they build every kind of module (a test below holds this).
SETTINGS = {
    name: VARIANTS[name]
    for name in (
        "default",
        "plain",
        "all",
        "only_batch_norm",
        "only_learned_pe",
        "streams_of_given_width",
        "conv_backbone_fpn",
        "causal_rel_pe",
    )
}
SETTINGS["causal_rel_pe"] = {**SETTINGS["causal_rel_pe"], "projection_dim": 4}
SETTINGS["v1"] = {**PLAIN, **WINDOWS, "path_pdrop": 0.1, "use_abs_pe": True, "mask_conv_inputs": False}
FEW = ["default", "all", "conv_backbone_fpn"]

every_class = pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)
every_setting = pytest.mark.parametrize("setting", SETTINGS)
few_settings = pytest.mark.parametrize("setting", FEW)

LABELS = labels_of(([[1.0, 4.5], [3.0, 19.0]], [0, 2]), ([[2.5, 8.0]], [1]))
ANSWERS = [[{"segments": [[1.0, 4.5], [3.0, 19.0]]}, {"segments": []}], [{"segments": []}, {"segments": [[2.5, 8.0]]}]]
RANDOM = {"attn_pdrop": 0.0, "proj_pdrop": 0.2, "path_pdrop": 0.2}

# Another kernel or another order of the same sums, in float32; values are around 1 to 10.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EXACT = {"rtol": 0, "atol": 0}


def config_of(setting, implementation="sdpa", **fields):
    # the prior that `check_start` expects
    start = {"cls_prior_prob": 0.02, "out_features": ["stem", "stage2"], "text_dim": 5, "decoder_layers": 2}
    return make_config(implementation, **{**start, **SETTINGS[setting], **fields})


def make(kind, setting="default", implementation="sdpa", **fields):
    torch.manual_seed(0)
    return randomize(kind(config_of(setting, implementation, **fields))).eval()


def batch_of(model, batch=2, length=21, padded=True):
    """Features, and a mask that pads the last sample on the right; two queries each, of three words and of four."""
    torch.manual_seed(length)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length // 2 + 2 :] = 0
    features = torch.randn(batch, length, sum(model.config.stream_widths))
    inputs = {"input_features": features, "attention_mask": mask} if padded else {"input_features": features}
    if isinstance(model, Retrieval):
        inputs["query_embeds"] = torch.randn(batch, 2, 4, 5)
        inputs["query_attention_mask"] = torch.ones(batch, 2, 4, dtype=torch.long)
        inputs["query_attention_mask"][:, 0, 3] = 0
    return inputs


def run(model, **inputs):
    with torch.no_grad():
        return model(**inputs)


def leaves(output, prefix=""):
    """Every tensor of an output under its name; `feature_maps.0`, `loss_dict.cls_loss`."""
    if isinstance(output, torch.Tensor):
        return {prefix: output}
    items = output.items() if isinstance(output, dict) else enumerate(output or ())
    found = {}
    for key, value in items:
        found.update(leaves(value, f"{prefix}.{key}" if prefix else str(key)))
    return found


def assert_same(output, expected, rtol=0.0, atol=0.0):
    output, expected = leaves(output), leaves(expected)
    assert output.keys() == expected.keys()
    assert output
    for name, tensor in expected.items():
        torch.testing.assert_close(
            output[name], tensor, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_state(model, expected):
    """All parameters and buffers, those that are not saved too, with their dtypes."""
    for kind in ("named_parameters", "named_buffers"):
        tensors, wanted = dict(getattr(model, kind)()), dict(getattr(expected, kind)())
        assert tensors.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert tensors[name].dtype == tensor.dtype, name
            assert torch.equal(tensors[name], tensor), name


def objective(output):
    """A number that every floating output moves."""
    return sum((tensor.float() ** 2).mean() for tensor in leaves(output).values() if tensor.is_floating_point())


def test_the_settings_build_every_kind_of_module():
    models = [make(kind, setting) for setting in SETTINGS for kind in CLASSES.values()]
    built = {type(module).__name__ for model in models for module in model.modules()}
    defined = {
        name
        for name, value in vars(modeling_convtransformer).items()
        if inspect.isclass(value)
        and issubclass(value, nn.Module)
        and value.__module__ == modeling_convtransformer.__name__
    }
    # Bases of others, and what quantized weights make of linear layers.
    assert defined - built == {"ConvTransformerPreTrainedModel", "PackedLinear"}


# --- Saving and loading ----------------------------------------------------------------------------------------------------------


@every_class
@every_setting
def test_shards_and_back(kind, setting, tmp_path):
    model = make(kind, setting)
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["weight_map"].keys() == model.state_dict().keys()
    inputs = batch_of(model)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True, **options)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        assert not loaded.training
        assert_same_state(loaded, model)
        assert_same(run(loaded, **inputs), run(model, **inputs))
    assert loaded.config.architectures == [kind.__name__]


@every_class
@every_setting
def test_to_meta_and_back(kind, setting):
    model = make(kind, setting)
    with torch.device("meta"):
        other = kind(config_of(setting)).eval()
    assert {tensor.device.type for tensor in [*other.parameters(), *other.buffers()]} == {"meta"}
    other.to_empty(device="cpu")
    for tensor in [*other.parameters(), *other.buffers()]:  # what empty memory may hold
        tensor.data.fill_(1000)
    other.init_weights()
    torch.manual_seed(0)
    fresh = kind(config_of(setting))
    for (name, buffer), (_, expected) in zip(other.named_buffers(), fresh.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    other.load_state_dict(model.state_dict(), assign=True)
    assert_same_state(other, model)
    inputs = batch_of(model)
    assert_same(run(other, **inputs), run(model, **inputs))


@every_class
@few_settings
def test_without_a_file(kind, setting):
    model = make(kind, setting)
    state = model.state_dict()
    loaded = kind.from_pretrained(None, config=copy.deepcopy(model.config), state_dict=state)
    assert_same_state(loaded, model)


def some_fresh(kind, setting):
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(kind(config_of(setting)))
    return models


@every_class
@every_setting
def test_missing_weights_start_as_in_a_fresh_model(kind, setting, tmp_path):
    model = make(kind, setting)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    names = sorted(state)
    one, other = (fresh.state_dict() for fresh in some_fresh(kind, setting))
    for dropped in (set(names[::2]), set(names[1::2])):
        kept = {name: tensor for name, tensor in state.items() if name not in dropped}
        save_file({**kept, "model.lost": torch.ones(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["missing_keys"]) == dropped
        assert [name.rpartition(".")[2] for name in info["unexpected_keys"]] == ["lost"]
        for name, tensor in loaded.state_dict().items():
            if name in kept:
                assert torch.equal(tensor, state[name]), name
            elif torch.equal(one[name], other[name]):  # a constant
                assert torch.equal(tensor, one[name]), name
            else:  # drawn from the same distribution: of 50 values or more the deviation is known to 20 percent or so
                assert not torch.equal(tensor, state[name]), name
                assert tensor.abs().max() <= 2 * one[name].abs().max(), name
                if tensor.numel() > 50:
                    assert 0.6 < tensor.std() / one[name].std() < 1.6, name


@every_class
@every_setting
def test_a_fresh_model_starts_in_range_and_from_its_seed(kind, setting):
    one, other = some_fresh(kind, setting)
    check_start(one.model if kind is ConvTransformerBackbone else one, one.config)
    for name, parameter in one.named_parameters():
        assert parameter.isfinite().all(), name
        # kaiming uniform is within 1 / sqrt(fan in) <= 1; constants are 0, 1, 1e-4 and the prior's logit
        most = 10 if name == "match.scale" else 5 if name.endswith(("class_head.output.bias", "match.bias")) else 1
        assert parameter.abs().max() <= most, name
        assert parameter.requires_grad, name
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    again, _ = some_fresh(kind, setting)
    assert_same_state(again, one)
    drawn = []
    for _ in range(2):  # once more, in place
        torch.manual_seed(3)
        for module in other.modules():
            other._init_weights(module)
        drawn.append(copy.deepcopy(other))
    assert_same_state(*drawn)
    assert not torch.equal(*(each.get_input_embeddings().convs[0].weight for each in (one, other)))


@every_class
@every_setting
def test_no_weights_are_tied(kind, setting, tmp_path):
    for tie in (False, True):
        config = config_of(setting)
        config.tie_word_embeddings = tie
        model = kind(config)
        assert model.all_tied_weights_keys == {}
        places = [tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()]
        assert len(set(places)) == len(places)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


@pytest.mark.parametrize("source", CLASSES.values(), ids=[f"from_{name}" for name in CLASSES])
@every_class
def test_a_checkpoint_of_one_class_is_read_by_all(kind, source, tmp_path):
    model = make(source, "all")
    model.save_pretrained(tmp_path)
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    pyramid = loaded if kind is ConvTransformerModel else loaded.model
    assert_same_state(pyramid, model if source is ConvTransformerModel else model.model)
    heads = {
        name for name in loaded.state_dict() if kind is not ConvTransformerModel and not name.startswith("model.")
    }
    # (the neck and the count of positives are the same thing in both)
    assert set(info["missing_keys"]) == heads - set(model.state_dict())
    assert loaded.untrained_weights == frozenset(info["missing_keys"])
    assert loaded.base_model is pyramid


@every_class
def test_another_number_of_classes(kind, tmp_path):
    model = make(kind, "all")
    model.save_pretrained(tmp_path)
    if kind is Detector:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            kind.from_pretrained(tmp_path, num_labels=7)
    loaded, info = kind.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True)
    assert loaded.config.num_labels == len(loaded.config.id2label) == len(loaded.config.label2id) == 7
    resized = {"class_head.output.weight", "class_head.output.bias"} if kind is Detector else set()
    assert {entry[0] for entry in info["mismatched_keys"]} == resized
    for name, tensor in model.state_dict().items():
        if name not in resized:
            assert torch.equal(loaded.state_dict()[name], tensor), name
    output = run(loaded, **batch_of(loaded))
    if kind is Detector:
        assert output.logits.shape[-1] == 7
        assert torch.allclose(loaded.class_head.output.bias, torch.tensor(-math.log(0.98 / 0.02)))
        loaded.save_pretrained(tmp_path)
        assert kind.from_pretrained(tmp_path).config.num_labels == 7


@every_class
@few_settings
def test_deepcopy_and_state_dict(kind, setting, tmp_path):
    model = make(kind, setting)
    inputs = batch_of(model)
    expected = run(model, **inputs, output_hidden_states=True)  # with the hooks that record it
    copied = copy.deepcopy(model)
    assert_same(run(copied, **inputs, output_hidden_states=True), expected)
    torch.save(model.state_dict(), tmp_path / "state.bin")
    other = kind(config_of(setting)).eval()
    other.load_state_dict(torch.load(tmp_path / "state.bin", weights_only=True))
    assert_same(run(other, **inputs, output_hidden_states=True), expected)


# --- Several devices, and the disk -----------------------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("setting", [*FEW, "only_learned_pe"])
def test_weights_on_the_disk(kind, setting, tmp_path):
    pytest.importorskip("accelerate", reason="offloading needs its extra")
    model = make(kind, setting)
    model.save_pretrained(tmp_path / "saved")
    size = sum(tensor.nbytes for tensor in model.parameters())
    inputs = batch_of(model)
    expected = run(model, **inputs, output_hidden_states=True)
    assert_same_state(kind.from_pretrained(tmp_path / "saved", device_map="auto"), model)
    loaded = kind.from_pretrained(
        tmp_path / "saved",
        device_map="auto",
        max_memory={"cpu": int(0.7 * size)},
        offload_folder=tmp_path / "offloaded",
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    for path, place in loaded.hf_device_map.items():
        for parameter in loaded.get_submodule(path).parameters():
            assert parameter.device.type == ("meta" if place == "disk" else "cpu"), path
    assert_same(run(loaded, **inputs, output_hidden_states=True), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_state(kind.from_pretrained(tmp_path / "again"), model)


def movable_parts(module, whole, path=""):
    """The smallest parts with weights that a device map may place, in the order of their use."""
    for name, child in module.named_children():
        place = f"{path}.{name}" if path else name
        if type(child).__name__ not in whole and list(child.children()):
            yield from movable_parts(child, whole, place)
        elif list(child.parameters()):
            yield place


@every_class
@pytest.mark.parametrize("setting", [*FEW, "streams_of_given_width"])
def test_a_device_map_may_cut_anywhere(kind, setting):
    """A second device that is always there: "meta", which refuses to be mixed with another, as any device does."""
    hooks = pytest.importorskip("accelerate.hooks", reason="device maps need its extra")
    elsewhere = torch.device("meta")
    model = make(kind, setting)
    parts = list(movable_parts(model, model._no_split_modules))
    assert len(parts) > 3
    for cut in range(1, len(parts)):
        model = make(kind, setting)
        for part in map(model.get_submodule, parts[cut:]):
            hooks.add_hook_to_module(part, hooks.AlignDevicesHook(elsewhere, place_submodules=True))
        output = leaves(run(model, **batch_of(model), output_hidden_states=True))
        assert {tensor.device.type for tensor in output.values()} == {"cpu", "meta"}


@every_class
@every_setting
def test_parts_that_stay_whole_are_in_the_model(kind, setting):
    """FSDP wraps every class that is named and stops at one that it does not find."""
    model = make(kind, setting)
    names = {type(module).__name__ for module in model.modules()}
    assert "ConvTransformerEmbedding" in model._no_split_modules
    assert model._no_split_modules <= names


# --- Precision -------------------------------------------------------------------------------------------------------------------


def dtypes_of(model):
    return {parameter.dtype for parameter in model.parameters()}


def assert_float32_inside(model):
    """What is float32 whatever the model's dtype: angles of positions, the count of positives."""
    for name, buffer in model.named_buffers():
        if "inv_freq" in name or "loss_normalizer" in name:
            assert buffer.dtype == torch.float32, name


@every_class
@few_settings
def test_dtype_at_load(kind, setting, tmp_path):
    model = make(kind, setting)
    model.save_pretrained(tmp_path / "float32")
    kind.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"
    for folder, options, dtype in (
        ("float32", {}, torch.float32),
        ("float32", {"dtype": torch.float16}, torch.float16),
        ("float32", {"dtype": "bfloat16"}, torch.bfloat16),
        ("float32", {"torch_dtype": torch.bfloat16}, torch.bfloat16),
        ("bfloat16", {}, torch.bfloat16),
        ("bfloat16", {"dtype": "auto"}, torch.bfloat16),
        ("bfloat16", {"dtype": torch.float32}, torch.float32),
    ):
        loaded = kind.from_pretrained(tmp_path / folder, **options)
        assert dtypes_of(loaded) == {dtype}, (folder, options)
        assert loaded.dtype == loaded.config.dtype == dtype
        assert_float32_inside(loaded)
        for name, parameter in model.named_parameters():
            once = parameter if folder == "float32" else parameter.bfloat16()
            assert torch.equal(loaded.get_parameter(name), once.to(dtype)), name
        output = leaves(run(loaded, **batch_of(loaded)))
        assert all(tensor.isfinite().all() for tensor in output.values())


@every_class
@few_settings
def test_half_and_back(kind, setting):
    model = make(kind, setting)
    inputs = batch_of(model)
    expected = leaves(run(model, **inputs))
    for dtype, change in ((torch.float16, "half"), (torch.bfloat16, "bfloat16")):
        changed = getattr(copy.deepcopy(model), change)()
        assert dtypes_of(changed) == {dtype}
        assert_float32_inside(changed)
        output = leaves(run(changed, **inputs))
        for name, tensor in output.items():
            if name == "pred_segments":
                assert tensor.dtype == torch.float32
            elif tensor.is_floating_point():
                assert tensor.dtype == dtype, name
                # bfloat16 has 8 bits, through some ten layers
                error = (tensor.float() - expected[name]).abs().mean()
                assert error < 0.05 * expected[name].std(), name
        back = changed.float()
        assert dtypes_of(back) == {torch.float32}
        # the weights were rounded once, to 8 bits
        for name, tensor in leaves(run(back, **inputs)).items():
            if name != "pred_segments" and tensor.is_floating_point():
                assert tensor.dtype == torch.float32
                assert (tensor - expected[name]).abs().mean() < 0.05 * expected[name].std(), name


# --- Attention backends ----------------------------------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("setting", ["default", "all", "causal_rel_pe"])
def test_backends_at_load_and_at_run_time(kind, setting, tmp_path):
    model = make(kind, setting, "eager")
    model.save_pretrained(tmp_path)
    inputs = batch_of(model, length=41)
    plain = batch_of(model, length=41, padded=False)
    expected = [run(model, **one) for one in (inputs, plain)]
    assert kind.from_pretrained(tmp_path).config._attn_implementation == "sdpa"  # how it ran is not what it is
    for implementation in ("sdpa", "flex_attention", "eager"):
        loaded = kind.from_pretrained(tmp_path, attn_implementation=implementation)
        model.set_attn_implementation(implementation)
        for one in (loaded, model):
            assert one.config._attn_implementation == one.base_model.config._attn_implementation == implementation
            assert_same(run(one, **inputs), expected[0], **CLOSE)
        assert_same(run(model, **plain), expected[1], **CLOSE)


@every_class
def test_a_backend_that_does_not_exist(kind, tmp_path):
    model = make(kind)
    with pytest.raises(ValueError, match="foo"):
        model.set_attn_implementation("foo")
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="foo"):
        kind(config_of("default", "foo"))


# --- One sample and many ---------------------------------------------------------------------------------------------------------


@every_class
@every_setting
def test_a_batch_is_its_samples(kind, setting):
    model = make(kind, setting)
    inputs = batch_of(model, batch=3, padded=False)
    batched = leaves(run(model, **inputs, output_hidden_states=True))
    for row in range(3):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        alone = run(model, **one, output_hidden_states=True)
        for name, tensor in leaves(alone).items():
            torch.testing.assert_close(
                batched[name][row], tensor[0], **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
            )


@every_class
@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "v1"])  # whose padding leaks
def test_padding_changes_nothing(kind, setting):
    model = make(kind, setting)
    inputs = batch_of(model)
    inputs["input_features"][inputs["attention_mask"] == 0] = 100.0
    padded = run(model, **inputs)
    length = int(inputs["attention_mask"][-1].sum())
    one = {name: tensor[-1:] for name, tensor in inputs.items() if name != "attention_mask"}
    alone = run(model, **{**one, "input_features": one["input_features"][:, :length]})
    if kind in (Detector, Retrieval):
        valid = padded.point_mask[-1] == 1
        assert valid.sum() == alone.point_mask.shape[1]
        if kind is Retrieval:
            valid = (slice(None), valid)
            torch.testing.assert_close(padded.logits[-1][valid], alone.logits[0], **CLOSE)
            torch.testing.assert_close(padded.pred_segments[-1][valid], alone.pred_segments[0], **CLOSE)
            return
        torch.testing.assert_close(padded.logits[-1, valid], alone.logits[0], **CLOSE)
        torch.testing.assert_close(padded.pred_segments[-1, valid], alone.pred_segments[0], **CLOSE)
        return
    for one, mask, other in zip(padded.feature_maps, padded.feature_masks, alone.feature_maps, strict=True):
        torch.testing.assert_close(one[-1, mask[-1] == 1], other[0], **CLOSE)


@every_class
@every_setting
def test_the_same_again(kind, setting):
    model = make(kind, setting, **RANDOM)
    inputs = batch_of(model)
    assert_same(run(model, **inputs), run(model, **inputs))
    model.train()
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(run(copy.deepcopy(model), **inputs))
    assert_same(outputs[1], outputs[0])
    one, other = (leaves(output) for output in outputs[1:])
    if setting != "conv_backbone_fpn":  # it has no dropout
        assert any(not torch.equal(one[name], other[name]) for name in one)


# --- What is recorded ------------------------------------------------------------------------------------------------------------


@every_class
@every_setting
def test_outputs_as_the_config_says(kind, setting):
    model = make(kind, setting, "eager")
    inputs = batch_of(model)
    config, layers = model.config, model.config.num_hidden_layers
    base = run(model, **inputs)
    assert isinstance(base, ModelOutput)
    assert base.hidden_states is None
    assert base.attentions is None
    asked = run(model, **inputs, output_hidden_states=True, output_attentions=True)
    config.output_hidden_states = config.output_attentions = True
    output = run(model, **inputs)
    assert_same(output, asked)
    assert_same(run(model, **inputs, output_hidden_states=False, output_attentions=False), base)
    assert len(output.hidden_states) == 1 + layers
    assert output.hidden_states[0].shape == output.hidden_states[config.arch[1]].shape == (2, 21, config.n_embd)
    assert len(output.attentions) == (0 if config.backbone_type == "conv" else layers)
    for weights, state in zip(output.attentions, output.hidden_states[1:], strict=False):
        assert weights.shape == (2, config.n_head, state.shape[1], state.shape[1])
    assert {"hidden_states", "attentions"} <= set(output)
    config.return_dict = False
    values = run(model, **inputs)
    assert isinstance(values, tuple)
    assert_same(list(values), list(output.to_tuple()))
    assert_same(run(model, **inputs, return_dict=True), output)


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23), reason="before 5.23 a list means other layers"
)
@every_class
@few_settings
def test_chosen_hidden_states(kind, setting):
    model = make(kind, setting)
    inputs = batch_of(model)
    states = run(model, **inputs, output_hidden_states=True).hidden_states
    chosen = run(model, **inputs, output_hidden_states=[0, 2, -1]).hidden_states
    assert len(chosen) == len(states)
    for index, (one, state) in enumerate(zip(chosen, states, strict=True)):
        if index in (0, 2, len(states) - 1):
            assert torch.equal(one, state)
        else:
            assert one is None


@every_class
@every_setting
def test_gradients_of_what_is_recorded(kind, setting):
    model = make(kind, setting, "eager", out_features=None)  # the coarsest level, which every other leads to
    output = model(**batch_of(model), output_hidden_states=True, output_attentions=True)
    recorded = [*output.hidden_states, *output.attentions]
    for tensor in recorded:
        tensor.retain_grad()
    output.hidden_states = output.attentions = None
    objective(output).backward()
    for tensor in recorded:
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0


# --- Gradient checkpointing ------------------------------------------------------------------------------------------------------


def gradients_of(model, **inputs):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    output = model(**inputs)
    (objective(output) if getattr(output, "loss", None) is None else output.loss).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@every_class
@few_settings
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not_reentrant", "reentrant"])
def test_gradient_checkpointing(kind, setting, use_reentrant):
    model = make(kind, setting, **RANDOM, out_features=None).train()
    inputs = batch_of(model)
    if kind in (Detector, Retrieval):
        inputs["labels"] = LABELS if kind is Detector else ANSWERS
    expected = gradients_of(copy.deepcopy(model), **inputs)
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(blocks) == model.config.num_hidden_layers + (4 if kind is Retrieval else 0)
    runs = []
    for block in blocks:
        first = next(block.children())
        first.register_forward_hook(lambda module, args, output: runs.append(module))

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    assert all(block.gradient_checkpointing for block in blocks)
    other = gradients_of(model, **inputs)
    # Forward, and again on the way back; the decoder's blocks for each of the levels.
    extra = 4 * (len(model.config.detector_strides) - 1) if kind is Retrieval else 0
    assert len(runs) == 2 * (len(blocks) + extra)
    for name, gradient in expected.items():  # with the same random numbers
        if gradient is None:
            assert other[name] is None, name
        else:  # a reentrant block runs first without gradients, where convolutions sum in another order
            torch.testing.assert_close(other[name], gradient, **(CLOSE if use_reentrant else EXACT), msg=name)

    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert not any(block.gradient_checkpointing for block in blocks)


@every_class
def test_checkpoints_behind_a_frozen_embedding(kind):
    """Reentrant checkpoints pass no gradient to a block whose input wants none; transformers has a hook for that."""
    model = make(kind, out_features=None, path_pdrop=0).train()
    model.get_input_embeddings().requires_grad_(False)
    inputs = batch_of(model)
    expected = gradients_of(model, **inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    for name, gradient in gradients_of(model, **inputs).items():
        assert (gradient is None) == (expected[name] is None) == ("embedding" in name), name
        if gradient is not None:
            torch.testing.assert_close(gradient, expected[name], **CLOSE, msg=name)
    model.disable_input_require_grads()


@every_class
def test_the_embedding_can_be_exchanged(kind):
    model = make(kind)
    embedding = model.get_input_embeddings()
    assert embedding is model.base_model.embedding
    other = copy.deepcopy(embedding)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other
    assert model.get_output_embeddings() is None
    assert not model.can_generate()


# --- Graphs ----------------------------------------------------------------------------------------------------------------------


# Tracing takes seconds for each level.
TINY = {"arch": (1, 1, 1), "head_num_layers": 1, "out_features": None, "decoder_layers": 1}


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (ConvTransformerModel, "default"),
        (ConvTransformerBackbone, "all"),
        (Detector, "conv_backbone_fpn"),
        (Retrieval, "default"),
    ],
)
def test_compiled_in_one_graph(kind, setting):
    torch._dynamo.reset()
    model = make(kind, setting, **TINY, path_pdrop=0).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = {**batch_of(model), "output_hidden_states": True}
    expected = model(**inputs)  # puts the hooks in place that record; a graph cannot
    output = compiled(**inputs)
    assert_same(output, expected, **CLOSE)
    wanted = torch.autograd.grad(objective(expected), list(model.parameters()), allow_unused=True)
    gradients = torch.autograd.grad(objective(output), list(model.parameters()), allow_unused=True)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert gradient is other is None or torch.allclose(gradient, other, **CLOSE)
    model.eval()
    inputs = batch_of(model, padded=False)
    assert_same(run(compiled, **inputs), run(model, **inputs), **CLOSE)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (ConvTransformerModel, "default"),
        (ConvTransformerBackbone, "conv_backbone_fpn"),
        (Detector, "default"),
    ],
)
def test_exported_for_any_batch_and_length(kind, setting):
    """Odd lengths and windows, for which the tracer's conditions must go: test_export.py."""
    model = make(kind, setting, **TINY)
    dims = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    inputs = batch_of(model, length=40)
    program = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, dims), strict=False)
    exported = program.module()
    for batch, length in ((2, 40), (3, 58), (5, 24)):
        inputs = batch_of(model, batch, length)
        assert_same(exported(**inputs), run(model, **inputs), **CLOSE)


# --- Configuration ---------------------------------------------------------------------------------------------------------------


def ways_round(config, folder):
    """The config after every way of writing and reading it."""
    config.save_pretrained(folder / "sub")
    config.to_json_file(folder / "one.json", use_diff=False)
    yield ConvTransformerConfig.from_pretrained(folder / "sub")
    yield ConvTransformerConfig.from_pretrained(folder, subfolder="sub")
    yield ConvTransformerConfig.from_json_file(folder / "one.json")
    yield ConvTransformerConfig.from_dict(config.to_dict())
    yield ConvTransformerConfig(**config.to_diff_dict())
    yield copy.deepcopy(config)
    yield pickle.loads(pickle.dumps(config))


def comparable(config):
    """As JSON, which has no tuples, without what says who wrote it."""
    written = {"transformers_version", "auto_map", "custom_pipelines"}
    values = {key: value for key, value in config.to_dict().items() if key not in written}
    return json.loads(json.dumps(values))


@every_setting
def test_configs_go_round(setting, tmp_path):
    config = config_of(setting, id2label={0: "walk", 1: "run", 2: "rest"}, num_labels=3)
    for other in ways_round(config, tmp_path):
        assert comparable(other) == comparable(config)
        assert type(other) is ConvTransformerConfig
        assert other.id2label == {0: "walk", 1: "run", 2: "rest"}
        assert other.out_features == ["stem", "stage2"]
        assert other.out_indices == [0, 2]


def test_unknown_keys_are_kept(tmp_path):
    config = config_of("default", a_note={"from": ["somewhere", 3]}, chunk_size_feed_forward=2)
    for other in ways_round(config, tmp_path):
        assert other.a_note == {"from": ["somewhere", 3]}
        assert other.chunk_size_feed_forward == 2
    config.a_note["from"].append(4)
    assert copy.deepcopy(config).a_note is not config.a_note
    make(Detector).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, "a_later_field": 5}))
    assert Detector.from_pretrained(tmp_path).config.a_later_field == 5


@every_class
def test_the_key_of_chunked_mlps_changes_nothing(kind):
    """transformers asks of a model that does not cut its MLPs into chunks only that it gives the same."""
    model, other = make(kind), make(kind, chunk_size_feed_forward=1)
    inputs = batch_of(model)
    assert_same(run(other, **inputs), run(model, **inputs))


LEGACY = {
    "theta": ({"rope_theta": 500.0}, {"rope_type": "default", "rope_theta": 500.0}),
    "scaling": (
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    ),
}


@pytest.mark.parametrize("name", LEGACY)
def test_keys_of_older_rotary_positions(name, tmp_path):
    given, expected = LEGACY[name]
    make_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**saved, **given}))
    for config in (make_config(**copy.deepcopy(given)), ConvTransformerConfig.from_pretrained(tmp_path)):
        assert {key: value for key, value in config.rope_parameters.items() if key != "type"} == expected
        model = Detector(config)
        assert model.model.rotary_emb.rope_type == expected["rope_type"]
        assert model.model.rotary_emb.inv_freq[-1].item() == pytest.approx(
            500**-0.5 / expected.get("factor", 1), rel=1e-6
        )


def test_the_older_name_of_dtype(tmp_path):
    assert make_config(torch_dtype="bfloat16").dtype == torch.bfloat16
    make_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps({**saved, "torch_dtype": "float16"}))
    config = ConvTransformerConfig.from_pretrained(tmp_path)
    assert config.dtype == torch.float16
    assert config.to_dict()["dtype"] == "float16"
    assert "torch_dtype" not in config.to_dict()


def test_levels_of_a_backbone(tmp_path):
    config = make_config()
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3"]
    assert (config.out_features, config.out_indices) == (["stage3"], [3])
    for fields, features, indices in (
        ({"out_features": ["stage1", "stage3"]}, ["stage1", "stage3"], [1, 3]),
        ({"out_indices": [0, 2]}, ["stem", "stage2"], [0, 2]),
        ({"out_indices": (0, -1)}, ["stem", "stage3"], [0, -1]),
        ({"out_features": ["stem"], "out_indices": [0]}, ["stem"], [0]),
    ):
        config = make_config(**fields)
        backbone = ConvTransformerBackbone(config)
        backbone.save_pretrained(tmp_path)
        for one in (config, ConvTransformerBackbone.from_pretrained(tmp_path).config):
            assert (one.out_features, one.out_indices) == (features, indices)
        assert backbone.channels == [16] * len(features)
        assert backbone.strides == [config.strides[index] for index in indices]
        assert len(run(backbone, **batch_of(backbone)).feature_maps) == len(features)
    loaded = ConvTransformerBackbone.from_pretrained(tmp_path, out_indices=[1, 2])
    assert (loaded.out_features, loaded.out_indices) == (["stage1", "stage2"], [1, 2])
    for wrong in (
        {"out_features": ["stage4"]},
        {"out_features": ["stage2", "stage1"]},
        {"out_indices": [0, 0]},
        {"out_features": ["stem"], "out_indices": [1]},
    ):
        with pytest.raises(ValueError, match="out_"):
            make_config(**wrong)


@pytest.mark.parametrize("kind", [ConvTransformerBackbone, Detector, Retrieval])
@every_setting
def test_all_classes_hold_the_same_pyramid(kind, setting):
    model, pyramid = make(kind, setting), make(ConvTransformerModel, setting)
    model.model.load_state_dict(pyramid.state_dict())
    inputs = batch_of(model)
    expected = run(pyramid, **inputs, output_hidden_states=True)
    output = run(model, **inputs, output_hidden_states=True)
    assert_same(output.hidden_states, expected.hidden_states)
    if kind is ConvTransformerBackbone:
        assert_same(output.feature_maps, [expected.feature_maps[index] for index in (0, 2)])
        assert_same(output.feature_masks, [expected.feature_masks[index] for index in (0, 2)])


@every_class
def test_the_main_input_comes_first(kind):
    assert list(inspect.signature(kind.forward).parameters)[1:3] == [kind.main_input_name, "attention_mask"]
    model = make(kind)
    inputs = batch_of(model)
    features, mask = inputs.pop("input_features"), inputs.pop("attention_mask")
    with torch.no_grad():
        expected = model(input_features=features, attention_mask=mask, **inputs)
        assert_same(model(features, mask, **inputs), expected)
