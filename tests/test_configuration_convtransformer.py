"""The config: both spellings, saving, three dialects of YAML, contradictions and absurd sizes."""

import dataclasses
import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, PreTrainedConfig

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerForTemporalActionLocalization,
    ConvTransformerModel,
)

CONFIGURATION = Path(__file__).parent.parent / "configuration"

# For every field of the class a value that is not its default, with what else must change for it to be legal.
CHANGED = {
    "n_in": {"n_in": [5, 7]},
    "stream_dims": {"stream_dims": [100, 156], "n_in": [5, 7]},
    "n_embd": {"n_embd": 128},
    "n_head": {"n_head": 8},
    "n_kv_head": {"n_kv_head": 2},
    "n_embd_ks": {"n_embd_ks": 5},
    "max_len": {"max_len": 100},
    "arch": {"arch": [1, 1, 3]},
    "mha_win_size": {"mha_win_size": [9, 9, 9, 9, 9, -1]},
    "scale_factor": {"scale_factor": 4},
    "with_ln": {"with_ln": False},
    "backbone_type": {"backbone_type": "conv"},
    "attn_pdrop": {"attn_pdrop": 0.25},
    "proj_pdrop": {"proj_pdrop": 0.25},
    "path_pdrop": {"path_pdrop": 0.0},
    "use_rope": {"use_rope": False},
    "rope_parameters": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    "use_abs_pe": {"use_abs_pe": True},
    "use_learned_pe": {"use_learned_pe": True},
    "use_rel_pe": {"use_rel_pe": True},
    "rel_pe_max_distance": {"rel_pe_max_distance": 16},
    "use_swiglu": {"use_swiglu": False},
    "use_rms_norm": {"use_rms_norm": False},
    "use_batch_norm": {"use_batch_norm": True, "use_rms_norm": False},
    "norm_eps": {"norm_eps": 1e-6},
    "mask_conv_inputs": {"mask_conv_inputs": False},
    "is_causal": {"is_causal": True},
    "fpn_type": {"fpn_type": "fpn"},
    "fpn_dim": {"fpn_dim": 48, "fpn_type": "fpn"},
    "fpn_with_ln": {"fpn_with_ln": False},
    "fpn_start_level": {"fpn_start_level": 1},
    "head_dim": {"head_dim": 48},
    "head_num_layers": {"head_num_layers": 2},
    "head_kernel_size": {"head_kernel_size": 5},
    "head_with_ln": {"head_with_ln": False},
    "regression_range": {"regression_range": [[0, 3], [2, 8], [4, 16], [16, 32], [32, 64], [64, 1000.5]]},
    "center_sample": {"center_sample": "none"},
    "center_sample_radius": {"center_sample_radius": 2},
    "loss_weight": {"loss_weight": -1},
    "cls_prior_prob": {"cls_prior_prob": 0.02},
    "init_loss_norm": {"init_loss_norm": 100},
    "label_smoothing": {"label_smoothing": 0.1},
    "empty_labels": {"empty_labels": [1]},
    "text_config": {"text_config": {"model_type": "bert", "hidden_size": 24, "num_attention_heads": 2}},
    "freeze_text_encoder": {"freeze_text_encoder": False},
    "text_dim": {"text_dim": 24},
    "decoder_dim": {"decoder_dim": 64},
    "decoder_layers": {"decoder_layers": 2},
    "projection_dim": {"projection_dim": 24},
}


def as_lists(value):
    """Tuples as lists, because JSON and YAML have no tuples."""
    return [as_lists(entry) for entry in value] if isinstance(value, list | tuple) else value


def fields_of(config):
    """The content of a config, without where it came from."""
    return {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}


# --- Fields, spellings, saving ----------------------------------------------------------------------------------------


def test_every_field_is_covered_here():
    own = {field.name for field in dataclasses.fields(ConvTransformerConfig)}
    own -= {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own -= {"_out_features", "_out_indices"}  # what lies behind out_features and out_indices; tested with the backbone
    assert set(CHANGED) == own


def test_defaults():
    config = ConvTransformerConfig()
    expected = {
        "n_in": 2048,
        "n_embd": 256,
        "n_head": 4,
        "n_kv_head": None,
        "n_embd_ks": 3,
        "max_len": 2304,
        "arch": [2, 2, 5],
        "mha_win_size": -1,
        "scale_factor": 2,
        "path_pdrop": 0.1,
        "use_rope": True,
        "use_swiglu": True,
        "use_rms_norm": True,
        "mask_conv_inputs": True,
        "is_causal": False,
        "center_sample_radius": 1.5,
        "init_loss_norm": 2000,
        "cls_prior_prob": 0.01,
        "num_labels": 2,
    }
    assert {field: as_lists(getattr(config, field)) for field in expected} == expected
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


SPELLINGS = [
    ("n_in", "input_dim", 12),
    ("n_embd", "hidden_size", 64),
    ("n_head", "num_attention_heads", 8),
    ("n_kv_head", "num_key_value_heads", 2),
    ("max_len", "max_position_embeddings", 99),
]


@pytest.mark.parametrize(("ours", "theirs", "value"), SPELLINGS)
def test_both_spellings(ours, theirs, value, tmp_path):
    for spelling in (ours, theirs):
        config = ConvTransformerConfig(**{spelling: value})
        assert getattr(config, ours) == getattr(config, theirs) == value
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "convtransformer", spelling: value}))
        config = ConvTransformerConfig.from_pretrained(tmp_path)
        assert getattr(config, ours) == getattr(config, theirs) == value
        saved = json.loads(config.to_json_string())
        assert saved[ours] == value
        assert theirs not in saved  # one of two spellings, or they could contradict each other
    setattr(config, theirs, 2 * value)
    assert getattr(config, ours) == 2 * value


@pytest.mark.parametrize("field", [*CHANGED, "num_labels", "id2label"])
def test_save_and_load_keeps_every_field(field, tmp_path):
    values = CHANGED.get(field) or {
        "num_labels": {"num_labels": 7},
        "id2label": {"id2label": {0: "walk", 1: "run", 2: "eat"}},
    }.get(field)
    config = ConvTransformerConfig(**values)
    default = getattr(ConvTransformerConfig(), field)
    assert as_lists(getattr(config, field)) != as_lists(default)  # else the round trip shows nothing
    config.save_pretrained(tmp_path)
    loaded = ConvTransformerConfig.from_pretrained(tmp_path)
    assert fields_of(loaded) == fields_of(config)
    for name, value in values.items():
        found = getattr(loaded, name)
        if isinstance(found, PreTrainedConfig):
            found = {key: getattr(found, key) for key in value}
        assert as_lists(found) == as_lists(value)
    automatic = AutoConfig.from_pretrained(tmp_path)
    assert type(automatic) is ConvTransformerConfig
    assert fields_of(automatic) == fields_of(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_embd", "256"),
        ("n_embd", 256.0),
        ("n_head", True),
        ("n_in", True),
        ("n_in", [3, "4"]),
        ("arch", "225"),
        ("arch", (2, 2, 5.0)),
        ("use_rope", 1),
        ("use_rope", "yes"),
        ("path_pdrop", "0.1"),
        ("center_sample", "centre"),
        ("backbone_type", "convtransformer"),
        ("fpn_type", None),
        ("rope_parameters", [1]),
        ("empty_labels", [0.0]),
    ],
)
def test_a_wrong_type_names_its_field(field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{field}'"):
        ConvTransformerConfig(**{field: value})
    config = ConvTransformerConfig()
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{field}'"):
        setattr(config, field, value)


@pytest.mark.parametrize("value", ["7", 7.0, True])
def test_the_number_of_labels_is_an_int(value):
    with pytest.raises(ValueError, match="num_labels"):
        ConvTransformerConfig(num_labels=value)


@pytest.mark.parametrize(("flag", "implementation"), [(True, "sdpa"), (False, "eager")])
def test_use_flash_attn_is_not_stored(flag, implementation, tmp_path):
    config = ConvTransformerConfig(n_in=4, n_embd=16, arch=(1, 1, 1), use_flash_attn=flag)
    assert config._attn_implementation == implementation
    assert config.use_flash_attn is flag
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not [key for key in saved if "flash" in key or "implementation" in key]
    assert ConvTransformerModel(config).config._attn_implementation == implementation
    config.use_flash_attn = not flag
    assert config._attn_implementation == {"sdpa": "eager", "eager": "sdpa"}[implementation]
    with pytest.raises(ValueError, match="use_flash_attn"):
        ConvTransformerConfig(use_flash_attn="no")


def test_rope_parameters_of_the_caller_stay_as_they_are():
    given = {"rope_theta": 123.0}
    ConvTransformerConfig(rope_parameters=given)
    assert given == {"rope_theta": 123.0}


# --- Derived properties -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_embd", "width"),
    # 2/3 of 4 times n_embd, up to a multiple of 64: 682.67 -> 704, 1365.3 -> 1408, 42.7 -> 64, 256 -> 256, 512 -> 512
    [(256, 704), (512, 1408), (16, 64), (96, 256), (192, 512)],
)
def test_width_of_the_mlp(n_embd, width):
    assert ConvTransformerConfig(n_embd=n_embd).intermediate_size == width
    assert ConvTransformerConfig(n_embd=n_embd, use_swiglu=False).intermediate_size == 4 * n_embd


def test_strides_and_ranges():
    config = ConvTransformerConfig()
    assert config.num_levels == 6
    assert config.num_hidden_layers == 7
    assert config.strides == config.detector_strides == [1, 2, 4, 8, 16, 32]
    assert config.detector_ranges == [(0, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 10000)]
    config = ConvTransformerConfig(scale_factor=4, arch=(1, 1, 3), fpn_start_level=1, mha_win_size=[9, 7, 5, 0])
    assert config.strides == [1, 4, 16, 64]
    assert config.detector_strides == [4, 16, 64]
    assert config.detector_ranges == [(0, 16), (16, 64), (64, 10000)]
    assert config.window_sizes == [9, 7, 5, 0]
    assert ConvTransformerConfig(arch=(1, 1, 0)).detector_ranges == [(0, 10000)]
    assert ConvTransformerConfig(mha_win_size=19).window_sizes == [19] * 6


def test_streams():
    assert ConvTransformerConfig(n_in=7).stream_widths == [7]
    assert ConvTransformerConfig(n_in=7).projected_stream_widths is None
    config = ConvTransformerConfig(n_in=[7, 8, 9], n_embd=32)
    assert config.stream_widths == [7, 8, 9]
    assert config.projected_stream_widths == [11, 11, 10]
    assert ConvTransformerConfig(n_in=[7, 8], stream_dims=[1, 50]).projected_stream_widths == [1, 50]


def test_widths_of_neck_and_heads():
    config = ConvTransformerConfig(n_embd=32)
    assert (config.neck_width, config.head_width) == (32, 32)
    config = ConvTransformerConfig(n_embd=32, fpn_type="fpn", fpn_dim=24, head_dim=20)
    assert (config.neck_width, config.head_width) == (24, 20)


# --- Contradictions -------------------------------------------------------------------------------------------------------

# Settings, the names that the message must have, and one of its words or a change that works.
CONFLICTS = [
    ({"n_head": 3}, ["n_embd", "n_head=2"], {"n_head": 2}),
    ({"n_kv_head": 3}, ["n_head", "n_kv_head=2"], {"n_kv_head": 2}),
    ({"n_kv_head": 0}, ["n_head", "n_kv_head=1"], {"n_kv_head": 1}),
    ({"n_head": 256}, ["n_embd", "n_head", "use_rope=False"], {"use_rope": False}),
    ({"mha_win_size": 8}, ["mha_win_size", "9 would"], {"mha_win_size": 9}),
    ({"mha_win_size": [9] * 5 + [4]}, ["mha_win_size", "5 would"], {"mha_win_size": [9] * 5 + [5]}),
    ({"mha_win_size": [9]}, ["mha_win_size", "arch", "6 windows"], {"mha_win_size": [9] * 6}),
    (
        {"use_rel_pe": True, "rel_pe_max_distance": 0},
        ["use_rel_pe", "mha_win_size=9", "rel_pe_max_distance=64"],
        {"mha_win_size": 9},
    ),
    ({"use_abs_pe": True, "use_learned_pe": True}, ["use_abs_pe", "use_learned_pe=False"], {"use_learned_pe": False}),
    ({"use_batch_norm": True}, ["use_batch_norm", "use_rms_norm=False"], {"use_rms_norm": False}),
    ({"scale_factor": 3}, ["scale_factor", "2 would"], {"scale_factor": 2}),
    ({"n_embd_ks": 4}, ["n_embd_ks", "5 would"], {"n_embd_ks": 5}),
    ({"head_kernel_size": 2}, ["head_kernel_size", "3 would"], {"head_kernel_size": 3}),
    ({"arch": (0, 1, 1)}, ["arch", "n_embd 256", "2048", "(1, ...)"], {"arch": (1, 1, 1)}),
    ({"arch": (2, 2)}, ["arch", "(2, 2, 5)"], {"arch": (2, 2, 5)}),
    ({"fpn_start_level": 6}, ["fpn_start_level", "0 to 5"], {"fpn_start_level": 5}),
    ({"fpn_dim": 64}, ["fpn_type", "fpn_dim=256", "fpn_type='fpn'"], {"fpn_type": "fpn"}),
    ({"regression_range": [[0, 4]]}, ["regression_range", "6 pairs", "None"], {"regression_range": None}),
    ({"regression_range": [[4, 0]] * 6}, ["regression_range", "[0, 4]"], {"regression_range": [[0, 4]] * 6}),
    ({"regression_range": [0, 4]}, ["regression_range", "[0, 4]"], {"regression_range": [[0, 4]] * 6}),
    ({"regression_range": [[0, "4"]] * 6}, ["regression_range", "[0, 4]"], {"regression_range": [[0, 4]] * 6}),
    ({"stream_dims": [3]}, ["stream_dims", "n_in=[2048]"], {"n_in": [2048]}),
    ({"n_in": [3, 4], "stream_dims": [3]}, ["stream_dims", "n_in"], {"stream_dims": [3, 3]}),
    ({"n_in": []}, ["n_in"], {"n_in": [1]}),
    ({"n_in": [2] * 300}, ["n_in", "n_embd=304"], {"n_embd": 304}),
    ({"empty_labels": [1, 2]}, ["empty_labels", "2 classes"], {"empty_labels": [1]}),
    ({"id2label": {0: "a", 2: "b"}}, ["id2label", "0, 1, 2"], {"id2label": {0: "a", 1: "b"}}),
    ({"cls_prior_prob": 0.0}, ["cls_prior_prob", "0.01"], {"cls_prior_prob": 0.01}),
    ({"label_smoothing": 1.0}, ["label_smoothing"], {"label_smoothing": 0.1}),
    ({"path_pdrop": float("nan")}, ["path_pdrop"], {"path_pdrop": 0}),
    ({"loss_weight": float("nan")}, ["loss_weight"], {"loss_weight": 1}),
    ({"init_loss_norm": 0}, ["init_loss_norm"], {"init_loss_norm": 1}),
    ({"norm_eps": -1e-5}, ["norm_eps"], {"norm_eps": 1e-5}),
    ({"rope_parameters": {"rope_type": "spiral"}}, ["rope_parameters", "linear"], {"rope_parameters": None}),
    ({"rope_parameters": {"rope_type": "linear"}}, ["rope_parameters", "factor"], {"rope_parameters": None}),
    (
        {"n_head": 128, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        ["rope_parameters", "n_head 128", "'linear' would"],
        {"n_head": 64},
    ),
    ({"rope_parameters": {"rope_theta": -1.0}}, ["rope_parameters", "rope_theta"], {"rope_parameters": None}),
    ({"num_labels": 0}, ["num_labels"], {"num_labels": 1}),
]


@pytest.mark.parametrize(("settings", "words", "change"), CONFLICTS, ids=lambda value: str(value)[:40])
def test_a_conflict_names_the_fields_and_a_way_out(settings, words, change):
    with pytest.raises(ValueError, match=r".") as error:  # the words are looked for below
        ConvTransformerConfig(**settings)
    assert [word for word in words if word not in str(error.value)] == []
    ConvTransformerConfig(**{**settings, **change})


def test_overrides_of_from_pretrained_are_validated_too(tmp_path):
    config = ConvTransformerConfig(n_in=4, n_embd=16, arch=(1, 1, 1))
    ConvTransformerForTemporalActionLocalization(config).save_pretrained(tmp_path)
    for load in (ConvTransformerConfig, ConvTransformerModel, ConvTransformerForTemporalActionLocalization):
        with pytest.raises(ValueError, match="n_head=2"):
            load.from_pretrained(tmp_path, n_head=3)
    assert ConvTransformerConfig.from_pretrained(tmp_path, n_head=2).n_head == 2
    assert ConvTransformerConfig.from_pretrained(tmp_path, num_attention_heads=8).n_head == 8
    assert ConvTransformerConfig.from_pretrained(tmp_path, num_labels=9).num_labels == 9
    config, unused = ConvTransformerConfig.from_pretrained(tmp_path, n_head=2, other=1, return_unused_kwargs=True)
    assert config.n_head == 2
    assert unused == {"other": 1}


def test_a_model_of_a_config_that_was_changed_into_a_contradiction():
    config = ConvTransformerConfig(n_in=4, n_embd=16, arch=(1, 1, 1))
    config.n_head = 3
    with pytest.raises(ValueError, match="n_head=2"):
        ConvTransformerModel(config)


# --- Absurd sizes ---------------------------------------------------------------------------------------------------------

ABSURD = [
    {"n_embd": 2**40},
    {"hidden_size": 2**40},
    {"num_labels": 10**12},
    {"arch": [2, 2, 10**6]},
    {"arch": [10**12, 2, 5]},
    {"arch": [2, -1, 5]},
    {"arch": [1, 1, 30]},
    {"n_in": 2**40},
    {"n_in": [2**40, 3]},
    {"n_in": [1] * 100_000},
    {"n_in": 0},
    {"stream_dims": [2**40], "n_in": [3]},
    {"n_head": 2**40},
    {"n_head": 0},
    {"n_embd": -256},
    {"n_embd_ks": 2**40 + 1},
    {"max_len": 2**40},
    {"max_len": 2**24, "use_learned_pe": True, "n_embd": 2**15},
    {"scale_factor": 2**40},
    {"head_dim": 2**40},
    {"head_num_layers": 10**9},
    {"head_kernel_size": 2**40 + 1},
    {"fpn_dim": 2**40, "fpn_type": "fpn"},
    {"mha_win_size": 2**40 + 1},
    {"mha_win_size": 2**23 + 1, "use_rel_pe": True, "n_embd": 2048, "n_head": 1024},
    {"rel_pe_max_distance": 2**40},
    {"rel_pe_max_distance": -1},
    {"rel_pe_max_distance": 2**22, "use_rel_pe": True, "n_embd": 2048, "n_head": 1024},
    {"n_embd": 65536, "n_head": 64, "arch": [2, 200, 5]},
]


@pytest.mark.parametrize("settings", ABSURD, ids=lambda value: str(value)[:40])
def test_absurd_sizes_are_refused_at_once(settings, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "convtransformer", **settings}))
    attempts = [lambda: ConvTransformerConfig(**settings)]
    for load in (AutoConfig, ConvTransformerModel, ConvTransformerForTemporalActionLocalization):
        attempts.append(partial(load.from_pretrained, tmp_path))
    for attempt in attempts:
        start = time.process_time()  # of this process alone: other work on the machine does not count
        with pytest.raises(ValueError, match=r"expected|more than"):
            attempt()
        assert time.process_time() - start < 1  # nothing was allocated or counted to


# --- YAML: our dialect ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGURATION.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file(path):
    content = yaml.safe_load(path.read_text())["model"]
    config = ConvTransformerConfig.from_yaml(path)
    for field, value in content.items():
        if field == "attn_implementation":
            assert config._attn_implementation == value
        else:
            assert as_lists(getattr(config, field)) == value, field
    default = ConvTransformerConfig().to_dict()
    for field, value in config.to_dict().items():
        derived = ("id2label", "label2id", "rope_parameters", "out_features", "out_indices")
        if field not in content and field not in derived:
            assert value == default[field], field
    with torch.device("meta"):
        model = ConvTransformerForTemporalActionLocalization(config)
    assert model.class_head.output.weight.shape == (config.num_labels, config.head_width, config.head_kernel_size)
    assert config._estimate_parameters() == pytest.approx(model.num_parameters(), rel=0.1)


def test_our_dialect(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("model: {n_in: 5, hidden_size: 16, num_labels: 3, use_flash_attn: false}\ntraining: {epochs: 3}\n")
    config = ConvTransformerConfig.from_yaml(path)
    assert (config.n_in, config.n_embd, config.num_labels) == (5, 16, 3)
    assert config._attn_implementation == "eager"
    assert ConvTransformerConfig.from_yaml(str(path), n_in=9, use_rope=False).n_in == 9
    with pytest.raises(ValueError, match="n_head=2"):
        ConvTransformerConfig.from_yaml(path, n_head=3)


BROKEN = [
    ("model: {n_embedding: 3}", "n_embedding"),
    ("model: {n_embd: 16, 5: 3}", "5"),
    ("modle: {n_embd: 16}", "modle"),
    ("model: [1, 2]", "model"),
    ("model:", "model"),
    ("just a string", "mapping"),
    ("", "mapping"),
    ("{a: [", "not a YAML file"),
    ("model: {backbone_type: convTransformerv2, backbone: {n_embd: 16, use_rop: true}}", "use_rop"),
    ("model: {backbone_type: convTransformerv2, fpn_tpye: fpn, backbone: {n_embd: 16}}", "fpn_tpye"),
    ("dataset: {input_dim: 8, num_clases: 3}", "num_clases"),
    ("dataset: {input_dim: 8}\nmodel: {embd_dims: 16}", "embd_dims"),
    ("dataset: {input_dim: 8}\ntrain_cfg: {drop_path: 0.2}", "drop_path"),
    ("dataset: {input_dim: 8}\ntrain_cfg: 3", "train_cfg"),
]


@pytest.mark.parametrize(("text", "word"), BROKEN, ids=[text[:40] for text, _ in BROKEN])
def test_a_broken_file_is_an_error_that_names_the_key(text, word, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=word) as error:
        ConvTransformerConfig.from_yaml(path)
    assert "broken.yaml" in str(error.value)


def test_yaml_does_not_run_code(tmp_path):
    path = tmp_path / "hostile.yaml"
    path.write_text(f"model: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'owned'}]")
    with pytest.raises(ValueError, match=r"hostile\.yaml"):
        ConvTransformerConfig.from_yaml(path)
    assert not (tmp_path / "owned").exists()


# --- YAML: the earlier v2's dialect ---------------------------------------------------------------------------------------


def test_dialect_of_the_earlier_v2(tmp_path):
    path = tmp_path / "earlier.yaml"
    path.write_text(
        """
        dataset: {num_classes: 4, max_seq_len: 128}
        model:
          backbone_type: convTransformerv2
          fpn_type: fpn
          fpn_dim: 24
          head_dim: 20
          backbone: {n_in: 12, n_embd: 32, n_head: 8, n_kv_head: 2, arch: [1, 1, 3], use_rope: true,
                     use_swiglu: false, use_flash_attn: false, mha_win_size: 9}
        train_cfg: {init_loss_norm: 50, dropout: 0.2}
        """
    )
    config = ConvTransformerConfig.from_yaml(path)
    expected = {
        "num_labels": 4,
        "max_len": 128,
        "fpn_type": "fpn",
        "fpn_dim": 24,
        "head_dim": 20,
        "n_in": 12,
        "n_embd": 32,
        "n_head": 8,
        "n_kv_head": 2,
        "arch": [1, 1, 3],
        "use_rope": True,
        "use_swiglu": False,
        "mha_win_size": 9,
        "init_loss_norm": 50,
        "proj_pdrop": 0.2,
        # silent keys: our defaults
        "use_rms_norm": True,
        "mask_conv_inputs": True,
        "path_pdrop": 0.1,
        "backbone_type": "convTransformer",
    }
    assert {field: as_lists(getattr(config, field)) for field in expected} == expected
    assert config._attn_implementation == "eager"
    ConvTransformerForTemporalActionLocalization(config)


@pytest.mark.parametrize(("flag", "implementation"), [("true", "sdpa"), ("false", "eager")])
def test_flash_flag_of_the_earlier_v2(flag, implementation, tmp_path):
    path = tmp_path / "earlier.yaml"
    path.write_text(f"model: {{backbone_type: convTransformerv2, backbone: {{n_in: 8, use_flash_attn: {flag}}}}}")
    assert ConvTransformerConfig.from_yaml(path)._attn_implementation == implementation


# --- YAML: v1's dialect -----------------------------------------------------------------------------------------------------


def test_dialect_of_v1(tmp_path):
    path = tmp_path / "v1.yaml"
    path.write_text(
        """
        dataset_name: sports
        train_split: ['training']
        val_split: ['validation']
        dataset: {json_file: ./a.json, feat_folder: ./f, file_prefix: ~, file_ext: .npy, num_classes: 6,
                  input_dim: [12, 20], feat_stride: 8, num_frames: 16, default_fps: 30, trunc_thresh: 0.5,
                  crop_ratio: [0.9, 1.0], max_seq_len: 256}
        model: {backbone_arch: [2, 1, 3], fpn_type: identity, max_buffer_len_factor: 4.0, n_mha_win_size: [7, 7, 7, -1],
                regression_range: [[0, 4], [4, 8], [8, 16], [16, 10000]], n_head: 2, embd_dim: [16, 24],
                fpn_dim: 40, head_dim: 40, embd_kernel_size: 5, embd_with_ln: False, use_abs_pe: True}
        opt: {learning_rate: 0.001, epochs: 10}
        loader: {batch_size: 4}
        train_cfg: {init_loss_norm: 150, clip_grad_l2norm: 1.0, cls_prior_prob: 0.02, center_sample: none,
                    center_sample_radius: 2, head_empty_cls: [1, 5], label_smoothing: 0.1, droppath: 0.2, dropout: 0.3,
                    loss_weight: 2.0}
        test_cfg: {voting_thresh: 0.9}
        output_folder: ./ckpt/
        """
    )
    config = ConvTransformerConfig.from_yaml(path)
    expected = {
        "n_in": [12, 20],
        "stream_dims": [16, 24],
        "n_embd": 40,
        "num_labels": 6,
        "max_len": 256,
        "arch": [2, 1, 3],
        "mha_win_size": [7, 7, 7, -1],
        "regression_range": [[0, 4], [4, 8], [8, 16], [16, 10000]],
        "n_head": 2,
        "n_embd_ks": 5,
        "with_ln": False,
        "use_abs_pe": True,
        "fpn_dim": 40,
        "head_dim": 40,
        "init_loss_norm": 150,
        "cls_prior_prob": 0.02,
        "center_sample": "none",
        "center_sample_radius": 2,
        "empty_labels": [1, 5],
        "label_smoothing": 0.1,
        "path_pdrop": 0.2,
        "proj_pdrop": 0.3,
        "loss_weight": 2.0,
        # what makes it v1
        "use_rope": False,
        "use_swiglu": False,
        "use_rms_norm": False,
        "mask_conv_inputs": False,
        "use_rel_pe": False,
    }
    assert {field: as_lists(getattr(config, field)) for field in expected} == expected
    ConvTransformerForTemporalActionLocalization(config)


def test_silent_keys_of_v1_have_its_defaults(tmp_path):
    path = tmp_path / "v1.yaml"
    path.write_text("dataset: {input_dim: 64}\n")
    config = ConvTransformerConfig.from_yaml(path)
    # the defaults of v1's libs/core/config.py
    expected = {
        "n_in": 64,
        "num_labels": 97,
        "max_len": 2304,
        "n_embd": 512,
        "n_head": 4,
        "fpn_dim": 512,
        "head_dim": 512,
        "arch": [2, 2, 5],
        "mha_win_size": -1,
        "regression_range": [[0, 4], [4, 8], [8, 16], [16, 32], [32, 64], [64, 10000]],
        "init_loss_norm": 2000,
        "path_pdrop": 0.1,
        "proj_pdrop": 0.0,
        "center_sample": "radius",
        "center_sample_radius": 1.5,
    }
    assert {field: as_lists(getattr(config, field)) for field in expected} == expected


def test_relative_positions_of_v1_without_windows_are_ignored_as_there(tmp_path):
    path = tmp_path / "v1.yaml"
    path.write_text("dataset: {input_dim: 64}\nmodel: {use_rel_pe: true}\n")
    assert ConvTransformerConfig.from_yaml(path).use_rel_pe is False
    path.write_text("dataset: {input_dim: 64}\nmodel: {use_rel_pe: true, n_mha_win_size: 9}\n")
    assert ConvTransformerConfig.from_yaml(path).use_rel_pe is True


def test_label2id_follows_id2label(tmp_path):
    config = ConvTransformerConfig(id2label={0: "run", 1: "walk"})
    assert config.label2id == {"run": 0, "walk": 1}
    config.save_pretrained(tmp_path)
    assert ConvTransformerConfig.from_pretrained(tmp_path).label2id == {"run": 0, "walk": 1}
    other = ConvTransformerConfig.from_pretrained(tmp_path, id2label={0: "sit", 1: "lie", 2: "run"})
    assert other.label2id == {"sit": 0, "lie": 1, "run": 2}
    assert ConvTransformerConfig.from_pretrained(tmp_path, num_labels=3).label2id["LABEL_2"] == 2
    named = ConvTransformerConfig.from_yaml(CONFIGURATION / "balanced.yaml", id2label={0: "run", 1: "walk"})
    assert (named.num_labels, named.id2label) == (2, {0: "run", 1: "walk"})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"id2label": {0: "a", 1: "b"}, "label2id": {"a": 1, "b": 0}}, "label2id .* contradicts id2label"),
        ({"id2label": {0: "a", 1: "b"}, "num_labels": 3}, "num_labels is 3, but id2label names 2"),
        ({"hidden_size": 128, "n_embd": 64}, "hidden_size is 128 and n_embd 64"),
    ],
)
def test_one_thing_said_twice_differently(fields, words):
    with pytest.raises(ValueError, match=words):
        ConvTransformerConfig(**fields)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("{n_mha_win_size: 8}", {"mha_win_size": 9}),
        ("{n_mha_win_size: [6, 6, 6, 5, -1, -1]}", {"mha_win_size": [7, 7, 7, 5, -1, -1]}),
        ("{n_mha_win_size: [-1, -1, -1, -1, -1, -1], use_rel_pe: true}", {"use_rel_pe": False}),
        (
            "{n_mha_win_size: [9, 9, 9, 9, -1, -1], use_rel_pe: true}",
            {"use_rel_pe": True, "relative_bias_widths": [9, 9, 9, 9, 0, 0]},
        ),
        ("{backbone_type: conv, use_abs_pe: true}", {"use_abs_pe": False, "backbone_type": "conv"}),
    ],
)
def test_what_v1_does_with_odd_settings(tmp_path, model, expected):
    path = tmp_path / "v1.yaml"
    path.write_text(f"dataset: {{num_classes: 3, input_dim: 8}}\nmodel: {model}\n")
    config = ConvTransformerConfig.from_yaml(path)
    assert {name: getattr(config, name) for name in expected} == expected
