"""Adapters of PEFT (LoRA, DoRA, IA3) on the detector: trained, saved, loaded, merged, with heads and convolutions."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

peft = pytest.importorskip("peft", reason="adapters need PEFT (the train extra)")
pytest.importorskip("accelerate", reason="Trainer needs accelerate (the train and demo extras)")

from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from scripts import load_script
from torch import nn
from transformers import TrainingArguments

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
)
from modeling_convtransformer.modeling_convtransformer import MaskedConv1d
from modeling_convtransformer.training import (
    EMACallback,
    TemporalActionTrainer,
    adapt_convolutions,
    compute_detection_metrics,
    decay_parameter_names,
    find_detector,
    find_last_checkpoint,
    load_ema,
    load_for_classes,
    parameter_groups,
    register_peft_defaults,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import train_peft

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HEADS = ["class_head", "segment_head"]
METHODS = {
    "lora": lambda **settings: LoraConfig(r=4, **settings),
    "dora": lambda **settings: LoraConfig(r=4, use_dora=True, **settings),
    "ia3": lambda **settings: IA3Config(**settings),
}
methods = pytest.mark.parametrize("method", METHODS)

# Loading copies numbers and runs the same kernels on them: nothing may differ.
SAME = {"atol": 0.0, "rtol": 0.0}
# Merging rounds W + BA once in float32 before the product, where the adapter adds two products: sums of some ten terms
# through a dozen layers.
MERGED = {"atol": 1e-5, "rtol": 0.0}


def make_model(**changes):
    """Without drop path: its scales of 1e-4 would hide what adapters do to attention and MLPs."""
    settings = {"n_in": 6, "n_embd": 16, "n_head": 2, "arch": (1, 1, 1), "path_pdrop": 0.0, "init_loss_norm": 10}
    torch.manual_seed(0)
    names = {0: "walk", 1: "sit", 2: "lie"}
    config = ConvTransformerConfig(**{**settings, "id2label": names, **changes})
    return ConvTransformerForTemporalActionLocalization(config).eval()


def make_batch():
    torch.manual_seed(1)
    features = torch.randn(2, 21, 6)
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[1, 13:] = 0
    labels = [
        {"segments": torch.tensor([[2.0, 9.0]]), "class_labels": torch.tensor([0])},
        {"segments": torch.tensor([[4.0, 11.0]]), "class_labels": torch.tensor([2])},
    ]
    return {"input_features": features, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def outputs_of(model, **changes):
    """Logits and segments, (batch, points, classes) and (batch, points, 2), of a model that is not training."""
    outputs = model.eval()(**{**make_batch(), **changes})
    return torch.cat((outputs.logits, outputs.pred_segments), dim=-1)


def train(model, steps=8, learning_rate=0.02):
    """The loss before each step."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=learning_rate)
    losses = []
    model.train()
    # The loss's own average would change its scale from step to step.
    settings = {**make_batch(), "num_items_in_batch": 10.0}
    for _ in range(steps):
        loss = model(**settings).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def make_trained(config, **changes):
    """The base, and a model with a trained adapter."""
    base = make_model(**changes)
    model = get_peft_model(copy.deepcopy(base), config)
    train(model)
    return base, model


def dense_layers(model):
    """Names of all linear layers and convolutions but the depthwise ones."""
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, MaskedConv1d) and layer.groups == 1)
    ]


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, **tolerance)


def load_with_transformers(base, folder, **settings):
    """`base` with the adapter in `folder`, by transformers' own loading; skips where transformers cannot.

    transformers 5.17 looks for a head of modules_to_save under its name in the base (`class_head.convs.0.weight`), where
    PEFT saved it, not where PEFT put it (`class_head.modules_to_save.default.convs.0.weight`); 5.23 renames it. And up to
    5.23 at least, DoRA's `lora_magnitude_vector` is not renamed to `lora_magnitude_vector.default.weight`. Such tensors
    are reported as unexpected and missing, and the model keeps what it had. `PeftModel.from_pretrained` loads them.
    """
    info = base.load_adapter(str(folder), **settings)
    known = [name for name in info.missing_keys if ".modules_to_save." in name or "lora_magnitude_vector" in name]
    assert sorted(info.missing_keys) == sorted(known)
    if known:
        pytest.skip(
            f"this transformers' load_adapter loses {len(known)} tensors, such as {known[0]}; PeftModel does not"
        )
    return base


# --- Train, save, load, merge ----------------------------------------------------------------------------------------


@methods
def test_adapters_learn_and_the_base_stays(method):
    base = make_model()
    model = get_peft_model(copy.deepcopy(base), METHODS[method]())
    close(outputs_of(model), outputs_of(base), SAME)  # adapters start as nothing
    losses = train(model, steps=20, learning_rate=0.2 if method == "ia3" else 0.02)  # IA3 multiplies by 1 + its steps
    assert losses[-1] < 0.95 * losses[0]
    with model.disable_adapter():
        close(outputs_of(model), outputs_of(base), SAME)
    assert (outputs_of(model) - outputs_of(base)).abs().max() > 0.01
    kept = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }
    assert kept.keys() == dict(base.named_parameters()).keys()
    for name, parameter in base.named_parameters():
        close(kept[name], parameter, SAME)


@methods
def test_default_targets_are_the_linears_of_attention_and_mlps(method):
    for changes in ({}, {"use_swiglu": False}):
        base = make_model(**changes)
        model = get_peft_model(base, METHODS[method]())
        wanted = LINEARS if method != "ia3" else ["k_proj", "v_proj", "down_proj"]
        found = {name.rpartition(".")[2] for name in model.base_model.targeted_module_names}
        assert found == {name for name in wanted if name != "gate_proj" or base.config.use_swiglu}
        assert len(model.base_model.targeted_module_names) == len(found) * 2  # two blocks
        adapted = {
            name
            for name, layer in model.base_model.model.named_modules()
            if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)
        }
        assert adapted == set(model.base_model.targeted_module_names)
    if method == "ia3":
        assert model.peft_config["default"].feedforward_modules == {"down_proj"}
        mlp = find_detector(model).model.stem[0].mlp
        assert mlp.down_proj.ia3_l["default"].shape == (1, mlp.down_proj.in_features)


def test_the_core_package_does_not_import_peft():
    code = (
        "import sys, modeling_convtransformer as package; "
        "package.ConvTransformerForTemporalActionLocalization(package.ConvTransformerConfig(n_embd=16, n_head=2)); "
        "assert 'peft' not in sys.modules, 'peft is imported'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr


def test_without_peft_nothing_is_registered(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.utils", None)
    register_peft_defaults()


@methods
@pytest.mark.parametrize("heads", [False, True], ids=["", "heads"])
def test_saved_adapters_load_by_peft(method, heads, tmp_path):
    base, model = make_trained(METHODS[method](modules_to_save=HEADS if heads else None))
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    fresh = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    close(outputs_of(loaded), outputs_of(model), SAME)


@methods
@pytest.mark.parametrize("heads", [False, True], ids=["", "heads"])
def test_saved_adapters_load_by_transformers(method, heads, tmp_path):
    base, model = make_trained(METHODS[method](modules_to_save=HEADS if heads else None))
    base.save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_with_transformers(copy.deepcopy(base), tmp_path / "adapter")
    close(outputs_of(loaded), outputs_of(model), SAME)
    # The folder of an adapter loads alone: adapter_config.json names the base.
    alone = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path / "adapter")
    close(outputs_of(alone), outputs_of(model), SAME)


@methods
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_head": 4, "n_kv_head": 2},
        {"n_kv_head": 1, "use_swiglu": False, "use_rms_norm": False},
        {"is_causal": True, "mha_win_size": 5},
        {"fpn_type": "fpn", "path_pdrop": 0.1},
    ],
    ids=["default", "grouped queries", "one key, gelu, layer norm", "causal windows", "pyramid, drop path"],
)
def test_merged_adapters_give_the_same(method, changes):
    base, model = make_trained(METHODS[method](), **changes)
    expected = outputs_of(model)
    merged = model.merge_and_unload()
    assert type(merged) is ConvTransformerForTemporalActionLocalization
    assert merged.state_dict().keys() == base.state_dict().keys()
    close(outputs_of(merged), expected, MERGED)
    if not changes.get("path_pdrop"):
        assert (expected - outputs_of(base)).abs().max() > 0.01  # it was not a merge of nothing


@methods
def test_padding_stays_out(method):
    _, model = make_trained(METHODS[method]())
    batch = make_batch()
    with torch.no_grad():
        beside = model(**batch).logits[1:, :13]
        alone = model(input_features=batch["input_features"][1:, :13]).logits[:, :13]
    torch.testing.assert_close(alone, beside, atol=1e-6, rtol=1e-5)  # float32; the same sums in another order


# --- Heads -----------------------------------------------------------------------------------------------------------


@methods
def test_heads_for_new_classes(method, tmp_path):
    """Rows of known classes are carried over by name; the adapter holds the trained heads, the base the started ones."""
    source = make_model()
    source.save_pretrained(tmp_path / "source")
    base, _ = load_for_classes(tmp_path / "source", ["jump", "lie", "walk"])
    close(base.class_head.output.weight[1:], source.class_head.output.weight[[2, 0]], SAME)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, METHODS[method](modules_to_save=HEADS))
    started = copy.deepcopy(model)
    train(model)
    learned = find_detector(model).class_head.modules_to_save["default"].output.weight
    assert (learned - find_detector(started).class_head.original_module.output.weight).abs().max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    fresh = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    close(outputs_of(loaded), outputs_of(model), SAME)
    merged = train_peft.merge(loaded)
    assert type(merged) is ConvTransformerForTemporalActionLocalization
    assert merged.state_dict().keys() == source.state_dict().keys()
    assert merged.config.id2label == {0: "jump", 1: "lie", 2: "walk"}
    close(merged.class_head.output.weight, learned, SAME)
    close(outputs_of(merged), outputs_of(model), MERGED)


# --- Convolutions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"is_causal": True}, {"mask_conv_inputs": False}, {"backbone_type": "conv"}],
    ids=["default", "causal", "padding leaks as in v1", "no attention"],
)
def test_dense_convolutions(method, changes, tmp_path):
    """An adapted convolution is its own kernel plus the adapter's, with its own padding, stride and causality: what the
    merged one computes, training and not."""
    config = adapt_convolutions(METHODS[method](target_modules=dense_layers(make_model(**changes))))
    base, model = make_trained(config, **changes)
    expected = outputs_of(model)
    assert (expected - outputs_of(base)).abs().max() > 0.01
    with model.disable_adapter():
        close(outputs_of(model), outputs_of(base), SAME)
    close(outputs_of(copy.deepcopy(model).merge_and_unload()), expected, MERGED)
    with torch.enable_grad():  # another way to compute a convolution, see MaskedConv1d
        outputs = model(**make_batch())
        close(torch.cat((outputs.logits, outputs.pred_segments), dim=-1), expected, MERGED)

    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    saved = LoraConfig.from_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter", config=adapt_convolutions(saved))
    close(outputs_of(loaded), expected, SAME)
    if method == "lora":  # DoRA: see load_with_transformers
        again = adapt_convolutions(LoraConfig.from_pretrained(tmp_path / "adapter"))
        loaded = load_with_transformers(copy.deepcopy(base), tmp_path / "adapter", peft_config=again)
        close(outputs_of(loaded), expected, SAME)


def test_two_adapters_of_convolutions_in_half_precision():
    """The kernels of all active adapters add up, in the dtype of the base."""
    base = make_model()
    config = adapt_convolutions(LoraConfig(target_modules=["model.embedding.convs.0"], init_lora_weights=False))
    model = get_peft_model(copy.deepcopy(base), config)
    model.add_adapter("other", copy.copy(config))
    layer = find_detector(model).model.embedding.convs[0]
    changes = {name: layer.kernel_change(name) for name in ("default", "other")}
    x = torch.randn(2, 9, 6)
    for active in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(active)
        plain = copy.deepcopy(base.model.embedding.convs[0])
        plain.weight.data += sum(changes[name] for name in active)
        close(layer(x, None), plain(x, None), MERGED)
    layer.base_layer.bfloat16()
    assert layer(x.bfloat16(), None).dtype == torch.bfloat16


def test_adapted_convolutions_leave_padding_out():
    _, model = make_trained(adapt_convolutions(LoraConfig(target_modules=dense_layers(make_model()))))
    batch = make_batch()
    filled = batch["input_features"].clone()
    filled[1, 13:] = torch.nan
    with torch.no_grad():
        beside = model(input_features=filled, attention_mask=batch["attention_mask"]).logits[1:, :13]
        alone = model(input_features=filled[1:, :13]).logits[:, :13]
    torch.testing.assert_close(alone, beside, atol=1e-6, rtol=1e-5)  # float32; the same sums in another order


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapted_convolution_has_pefts_gradients(method):
    """Where PEFT's own layer is right, on a plain convolution without padding, ours learns the same."""
    torch.manual_seed(0)
    layer = MaskedConv1d(ConvTransformerConfig(), 5, 7, 3)
    plain = nn.Conv1d(5, 7, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    ours, theirs = nn.ModuleDict({"conv": layer}), nn.ModuleDict({"conv": plain})
    config = METHODS[method](target_modules=["conv"])
    theirs = get_peft_model(theirs, config).base_model.model.conv
    ours = get_peft_model(ours, adapt_convolutions(METHODS[method](target_modules=["conv"]))).base_model.model.conv
    factors = {name: torch.randn_like(parameter) for name, parameter in theirs.named_parameters() if "lora" in name}
    for one in (ours, theirs):
        one.load_state_dict({**one.state_dict(), **factors})
    x = torch.randn(2, 9, 5)
    close(ours(x, None), theirs(x.transpose(1, 2)).transpose(1, 2), MERGED)
    ours(x, None).square().mean().backward()
    theirs(x.transpose(1, 2)).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert len(gradients) == (3 if method == "dora" else 2)
    for name, parameter in ours.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-5)  # float32 sums


def test_convolutions_that_cannot_be_adapted_say_so():
    with pytest.raises(ValueError, match="depthwise"):
        get_peft_model(make_model(), adapt_convolutions(LoraConfig(target_modules=["query_conv"])))
    config = adapt_convolutions(LoraConfig(target_modules=["model.embedding.convs.0"], lora_dropout=0.1))
    with pytest.raises(ValueError, match="lora_dropout"):
        get_peft_model(make_model(), config)
    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(make_model(), IA3Config(target_modules=["query_conv"], feedforward_modules=[]))
    # Depthwise convolutions have few parameters; they can be trained whole.
    _, model = make_trained(LoraConfig(modules_to_save=["query_conv"]))
    expected = outputs_of(model)
    close(outputs_of(model.merge_and_unload()), expected, MERGED)


# --- Training --------------------------------------------------------------------------------------------------------


def items(count=6):
    rng = np.random.default_rng(0)
    return [
        {
            "video_id": f"v{index}",
            "features": rng.normal(size=(20 + index, 6)).astype(np.float32),
            "segments": np.array([[2.0, 9.0]], dtype=np.float32),
            "class_labels": np.array([index % 2]),
            "geometry": {"fps": 10, "feature_stride": 5, "num_frames": 5, "duration": 10.0},
        }
        for index in range(count)
    ]


def make_trainer(model, folder, **changes):
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 0.02,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 2,
        "eval_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    trainer = TemporalActionTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**settings, **changes}),
        train_dataset=items(),
        eval_dataset=items(3),
        feature_extractor=ConvTransformerFeatureExtractor(6, 10, 5),
        compute_metrics=compute_detection_metrics,
    )
    average = EMACallback(trainer, decay=0.9)
    trainer.add_callback(average)
    return trainer, average


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@methods
def test_weight_decay_is_for_factors_and_heads(method):
    model = get_peft_model(make_model(), METHODS[method](modules_to_save=HEADS))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = ([names[id(one)] for one in group["params"]] for group in parameter_groups(model, 0.05))
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {*decayed, *others} == learns
    assert all(".lora_A." in name or ".lora_B." in name or ".modules_to_save." in name for name in decayed)
    assert all(name.endswith((".bias", ".scale")) or ".norms." in name for name in others if "_head." in name)
    adapters = {name.rpartition(".default")[0].rpartition(".")[2] for name in others if "_head." not in name}
    assert adapters == {"lora": set(), "dora": {"lora_magnitude_vector"}, "ia3": {"ia3_l"}}[method]
    assert {*decayed} <= {*decay_parameter_names(model)}


@methods
def test_trainer_averages_saves_and_resumes(method, tmp_path):
    base = make_model(init_loss_norm=50)
    model = get_peft_model(copy.deepcopy(base), METHODS[method](modules_to_save=HEADS))
    assert isinstance(find_detector(model), ConvTransformerForTemporalActionLocalization)
    trainer, average = make_trainer(
        model, tmp_path, load_best_model_at_end=True, metric_for_best_model="ema_map", gradient_accumulation_steps=2
    )
    trainer.train()
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert average.average.keys() == learns
    metrics = {key for entry in trainer.state.log_history for key in entry}
    assert {"eval_map", "eval_ema_map", "eval_loss"} <= metrics
    checkpoint = Path(find_last_checkpoint(tmp_path))
    assert {"adapter_model.safetensors", "adapter_config.json", "ema.safetensors", "preprocessor_config.json"} <= {
        path.name for path in checkpoint.iterdir()
    }
    assert not (checkpoint / "model.safetensors").exists()  # adapters only

    # The averaged adapter of a checkpoint, on the base.
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), checkpoint, is_trainable=True)
    plain = outputs_of(loaded)
    averaged = outputs_of(load_ema(loaded, checkpoint))
    assert (averaged - plain).abs().max() > 1e-4

    # A run that was killed after two of four steps goes on as if it had not been, if the adapter has the criterion's
    # moving number of positives too.
    saved = [*HEADS, "criterion"]
    runs = []
    for folder, killed in ((tmp_path / "whole", False), (tmp_path / "killed", True)):
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(base), METHODS[method](modules_to_save=saved))
        trainer, average = make_trainer(model, folder)
        trainer.train()
        if killed:
            checkpoint = folder / "checkpoint-2"
            torch.manual_seed(0)
            model = get_peft_model(copy.deepcopy(base), METHODS[method](modules_to_save=saved))
            trainer, average = make_trainer(model, folder)
            trainer.train(resume_from_checkpoint=str(checkpoint))
        runs.append((weights_of(model), average.average))
    for name, expected in runs[0][0].items():
        torch.testing.assert_close(runs[1][0][name], expected, atol=1e-6, rtol=1e-5, msg=name)


def test_the_count_of_positives_belongs_to_the_model_and_not_to_the_adapter(tmp_path):
    """It scales the loss, never a prediction: an adapter does not carry it, a merged model does."""
    base = make_model(init_loss_norm=50)
    model = get_peft_model(copy.deepcopy(base), LoraConfig())
    model.train()
    model(**make_batch())
    moved = find_detector(model).criterion.loss_normalizer.clone()
    assert moved != base.criterion.loss_normalizer
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "normalizer" in name]  # noqa: SIM118 - it has no iterator
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert find_detector(loaded).criterion.loss_normalizer == base.criterion.loss_normalizer
    assert model.merge_and_unload().criterion.loss_normalizer == moved


@methods
def test_statistics_of_batch_norm_are_saved(method, tmp_path):
    base = make_model(use_rms_norm=False, use_batch_norm=True)
    options = train_peft.AdapterArguments("base", method=method, train_heads=True)
    model = get_peft_model(copy.deepcopy(base), train_peft.adapter_config(options, base))
    train(model)
    moved = find_detector(model).model.embedding.norms[0].modules_to_save["default"].running_mean
    assert (moved - base.model.embedding.norms[0].running_mean).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    close(outputs_of(loaded), outputs_of(model), SAME)
    close(outputs_of(train_peft.merge(model)), outputs_of(model), MERGED)


# --- The example -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A base, signals and annotations, as files."""
    folder = tmp_path_factory.mktemp("setting")
    make_model(n_in=60, path_pdrop=0.1).save_pretrained(folder / "base")
    extractor = ConvTransformerFeatureExtractor(60, fps=10, feature_stride=5, num_frames=10)
    extractor.save_pretrained(folder / "base")
    rng = np.random.default_rng(0)
    np.savez(folder / "signals.npz", **{f"r{index}": rng.normal(size=(300, 6)) for index in range(4)})
    for name, labels in (("same", ["walk", "sit", "lie"]), ("other", ["jump", "lie", "walk"])):
        database = {
            f"r{index}": {
                "subset": "training" if index < 3 else "validation",
                "fps": 10,
                "duration": 30.0,
                "annotations": [
                    {"label": label, "label_id": label_id, "segment": [2.0 + 9 * label_id, 8.0 + 9 * label_id]}
                    for label_id, label in enumerate(labels)
                ],
            }
            for index in range(4)
        }
        content = {"version": "1", "labels": labels, "database": database}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def make_command(setting, annotations, output, *arguments) -> list[str]:
    command = [ROOT / "examples" / "train_peft.py", "--checkpoint", setting / "base"]
    command += ["--dataset", "sensors", "--signals", setting / "signals.npz", "--annotations", setting / annotations]
    command += ["--output_dir", output, "--num_train_epochs", 1, "--use_cpu", "true", *arguments]
    return list(map(str, command))


@pytest.fixture
def adapt(setting, monkeypatch):
    """examples/train_peft.py as a function of its command line, in this process."""
    monkeypatch.chdir(setting)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as Python does for a script
    script = load_script("train_peft")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", make_command(setting, *arguments))
        script.main()

    return call


@pytest.mark.slow
def test_example_adapts_saves_and_merges(setting, adapt, tmp_path, capsys):
    adapt("same.json", tmp_path, "--method", "dora", "--convs", "--merge", "--ema_decay", 0.9)
    printed = capsys.readouterr().out
    assert "trainable parameters" in printed
    assert "% before" in printed
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert 0 < metrics["share"] < 1
    assert {"before", "after", "trainable"} <= metrics.keys()
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 42
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "preprocessor_config.json", "merged"} <= names
    assert "base" not in names
    config = adapt_convolutions(LoraConfig.from_pretrained(tmp_path))
    assert Path(config.base_model_name_or_path) == (setting / "base").resolve()
    base = ConvTransformerForTemporalActionLocalization.from_pretrained(config.base_model_name_or_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, config=config)
    merged = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path / "merged")
    ConvTransformerFeatureExtractor.from_pretrained(tmp_path / "merged")
    features = torch.randn(2, 21, 60)
    close(outputs_of(merged, input_features=features), outputs_of(loaded, input_features=features), MERGED)
    adapt("same.json", tmp_path, "--method", "dora", "--convs", "--num_train_epochs", 2)
    assert "going on from" in capsys.readouterr().out


@pytest.mark.slow
def test_example_starts_heads_for_other_classes(adapt, tmp_path, capsys):
    adapt("other.json", tmp_path, "--train_heads", "--merge")
    assert f"the base is {tmp_path.resolve() / 'base'}" in capsys.readouterr().out
    config = LoraConfig.from_pretrained(tmp_path)
    assert Path(config.base_model_name_or_path) == tmp_path.resolve() / "base"
    base = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path / "base")
    assert base.config.id2label == {0: "jump", 1: "lie", 2: "walk"}
    loaded = PeftModel.from_pretrained(base, tmp_path)
    merged = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path / "merged")
    features = torch.randn(2, 21, 60)
    close(outputs_of(merged, input_features=features), outputs_of(loaded, input_features=features), MERGED)


@pytest.mark.slow
def test_example_names_what_cannot_be(setting, adapt, tmp_path, capsys):
    for arguments, words in [
        (("other.json", tmp_path), "does not know the classes jump"),
        (("same.json", tmp_path, "--method", "ia3", "--convs"), "--convs needs"),
        (("same.json", setting / "base"), "one of their own"),
        (("same.json", tmp_path, "--targets", "query_conv"), "depthwise"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            adapt(*arguments)
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
