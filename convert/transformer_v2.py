"""Checkpoints of the earlier v2 (`backbone_type: convTransformerv2`) to ours: exact where our model can hold them.

What its blocks compute otherwise than ours, and how ours is made to compute it:

    theirs                                            ours                                                  exact
    stem without depthwise convolutions, q(ln1(x))    convolution [0, 1, 0]; ln1 bare, its gain and bias in
                                                      the norms of q, k, v: norm(norm(x)) is norm(x)        to eps
    stem with grouped key/value heads, branch without each stem head repeated for its queries (MHA)         yes
    a window where RoPE is asked for: relative bias   relative bias, no RoPE                                yes
    RMSNorm, but LayerNorm for q, k, v in the branch  RMSNorm; centring, gain and bias go into the
                                                      projection that follows, the ratio of rms to standard
                                                      deviation is lost                                     nearly
    RMSNorm, but LayerNorm in the heads               RMSNorm; centring goes into the convolution before,
                                                      the bias is lost                                      no
    RMSNorm, but LayerNorm in the neck                RMSNorm; only the gain is kept                        no
    RoPE in the stem only                             RoPE everywhere: the stem's level is exact, q and k
                                                      of the branch are turned                              no
"""

import json
import warnings
from pathlib import Path

import torch

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerForTemporalActionLocalization,
    ConvTransformerModel,
)
from modeling_convtransformer.configuration_convtransformer import read_recipe

from . import actionformer
from .adapt import Report
from .checkpoint import ConversionError, Rule, check_free, map_known_names, read_state, write_folder

# Outside the attention of the stem it is v1.
RULES = [
    *actionformer.RULES,
    Rule("backbone.{stem|branch}.{i}.mlp.w1.{weight|bias}", "model.{stem|branch}.{i}.mlp.up_proj.{weight|bias}", "squeeze"),
    Rule("backbone.{stem|branch}.{i}.mlp.w2.{weight|bias}", "model.{stem|branch}.{i}.mlp.down_proj.{weight|bias}", "squeeze"),
    Rule("backbone.{stem|branch}.{i}.mlp.w3.{weight|bias}", "model.{stem|branch}.{i}.mlp.gate_proj.{weight|bias}", "squeeze"),
    Rule("backbone.{stem|branch}.{i}.attn.rope.inv_freq", None),  # computed; same layout (halves of a head) as ours
]  # fmt: skip

# name of the convolution and the norm in a block's attention: name of the projection
_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}

_CARD = """---
library_name: transformers
tags:
- temporal-action-localization
- convtransformer
---

# {name}

Converted from `{source}`, a checkpoint of the earlier v2 (`convTransformerv2`), by `convtransformer-convert transformer-v2`.
{exactness} `conversion_report.json` says for every tensor where it comes from:

```
{report}
```

```python
from modeling_convtransformer import {classes}

model = {model_class}.from_pretrained({path}).eval()
```
"""


def convert(
    source: Path,
    out: Path,
    config: Path,
    weights: str = "ema",
    annotations: Path | None = None,
    fps: float | None = None,
    allow_unused: bool = False,
    overwrite: bool = False,
) -> tuple[torch.nn.Module, Report]:
    """
    Writes a checkpoint of the earlier v2 as a folder that `from_pretrained` loads.

    A checkpoint of the backbone alone, with or without the prefix `backbone.`, becomes a folder of `ConvTransformerModel`:
    it holds what the checkpoint holds, and transformers says what is new when a detector is made of it.

    Args:
        source, out, weights, annotations, fps, allow_unused, overwrite: as for ActionFormer's checkpoints.
        config: the YAML file of its training. What the weights show (norms, MLP, positions) is taken from them.

    Returns:
        the model, and for each of its tensors whether it was copied, adapted (how) or initialised.

    Raises:
        ConversionError: the checkpoint cannot be converted; the message says why.
    """
    check_free(out, overwrite)
    foreign = read_state(source, weights)
    if not any(name.startswith("backbone.") for name in foreign):
        foreign = {f"backbone.{name}": tensor for name, tensor in foreign.items()}
    state = map_known_names(foreign, RULES, source, "the earlier v2", allow_unused)
    if "model.stem.0.ln1.weight" not in state:
        raise ConversionError(f"{source} holds no stem of a convTransformerv2, only {', '.join(foreign)[:80]} ...")
    names, rates = actionformer.read_annotations(annotations)
    is_detector = any(not name.startswith("model.") for name in state)
    feature_extractor = None
    try:
        model_config = ConvTransformerConfig.from_yaml(config, **_what_the_weights_show(foreign, state, names))
        if is_detector or read_recipe(config).get("dataset"):
            feature_extractor = actionformer.make_feature_extractor(config, model_config, fps, rates)
    except Exception as error:  # whatever is wrong in the file
        raise ConversionError(actionformer.say(config, error)) from error

    how: dict[str, list[str]] = {}
    try:
        _fill_in_stem(state, model_config, how)
        if model_config.use_rms_norm:
            _replace_layer_norms(state, how)
    except (KeyError, RuntimeError) as error:  # a tensor that is missing, or of another shape
        raise ConversionError(f"{source} does not fit {config}, which may be another model's: {error}.") from error
    for name in state if model_config.use_rope else ():
        if name.startswith("model.branch.") and (".q_proj." in name or ".k_proj." in name):
            _note(how, name, "turned by RoPE, which the source's branch does not have")

    model_class = ConvTransformerForTemporalActionLocalization
    if not is_detector:
        model_class = ConvTransformerModel
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        how = {name.removeprefix("model."): ways for name, ways in how.items()}
    with torch.device("meta"):  # a config of another model could ask for much memory
        actionformer.check_fit(model_class(model_config), state, source, config)
    model = model_class(model_config).eval()
    actionformer.fill(model, state, source, config)
    report = Report()
    for name, tensor in model.state_dict().items():
        kind = "initialised" if name not in state else "adapted" if name in how else "copied"
        report.add(name, kind, "; ".join(how.get(name, ())), tensor.numel())
    inexact = dict.fromkeys(way for ways in how.values() for way in ways if "(exact" not in way)
    if inexact:
        warnings.warn(f"the outputs differ from the source's, train further before use: {'; '.join(inexact)}")

    def write(folder: Path):
        model.save_pretrained(folder)
        report.write(folder / "conversion_report.json")
        classes = [type(model).__name__]
        if feature_extractor is not None:
            feature_extractor.save_pretrained(folder)
            classes.insert(0, type(feature_extractor).__name__)
        name = out.absolute().name
        card = _CARD.format(
            name=name,
            path=json.dumps(name),
            source=source.name,
            exactness=f"It {'does not give' if inexact else 'gives'} the source's outputs.",
            report=report,
            classes=", ".join(classes),
            model_class=type(model).__name__,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    write_folder(out, write, overwrite)
    return model, report


def _what_the_weights_show(foreign: dict, state: dict, names: list[str] | None) -> dict:
    """Fields that a state dict decides, whatever its YAML says: there, RoPE with a window means a relative bias."""
    fields = {
        "use_rope": any(name.endswith("rope.inv_freq") for name in foreign),
        "use_rel_pe": any(name.endswith("relative_bias") for name in state),
        "use_swiglu": "model.stem.0.mlp.gate_proj.weight" in state,
        "use_rms_norm": "model.stem.0.ln1.bias" not in state,
        "n_kv_head": None,
        "mask_conv_inputs": False,
    }
    if fields["use_rel_pe"]:
        fields["rel_pe_max_distance"] = 0  # inside windows only
    if not any(".drop_path_" in name for name in state):
        fields["path_pdrop"] = 0.0
    frequencies = foreign.get("backbone.stem.0.attn.rope.inv_freq")
    if frequencies is not None and len(frequencies) > 1:
        theta = float(frequencies[1].double()) ** -len(frequencies)  # inv_freq[i] is theta ** (-i / len)
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": float(f"{theta:.5g}")}
    if names is not None:
        fields |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    elif "class_head.output.bias" in state:
        fields["num_labels"] = len(state["class_head.output.bias"])
    return fields


def _fill_in_stem(state: dict[str, torch.Tensor], config: ConvTransformerConfig, how: dict[str, list[str]]):
    """Gives stem attention without convolutions what ours has, so that it computes the same."""
    head_dim = config.n_embd // config.n_head
    for block in [f"model.stem.{index}" for index in range(config.arch[1])]:
        if f"{block}.attn.query_conv.weight" in state:
            continue  # a window: v1's attention
        gain, bias = state[f"{block}.ln1.weight"], state.get(f"{block}.ln1.bias")
        identity = gain.new_zeros(len(gain), 1, 3)
        identity[:, :, 1] = 1
        for name, projection in _PROJECTIONS.items():
            state[f"{block}.attn.{name}_conv.weight"] = identity.clone()
            _note(how, f"{block}.attn.{name}_conv.weight", "identity convolution (exact)")
            _move_norm(state, f"{block}.attn.{name}_norm", gain, bias, how)
            for kind in ("weight", "bias"):
                full = f"{block}.attn.{projection}.{kind}"
                heads = state[full].unflatten(0, (-1, head_dim))
                if 0 < len(heads) < config.n_head and config.n_head % len(heads) == 0:
                    state[full] = heads.repeat_interleave(config.n_head // len(heads), dim=0).flatten(0, 1)
                    _note(how, full, "key/value heads repeated for their queries (exact)")
        _move_norm(state, f"{block}.ln1", torch.ones_like(gain), None if bias is None else torch.zeros_like(bias), how)


def _move_norm(state: dict[str, torch.Tensor], norm: str, gain: torch.Tensor, bias: torch.Tensor | None, how):
    for kind, value in (("weight", gain), ("bias", bias)):
        if value is not None:
            state[f"{norm}.{kind}"] = value.clone()
            _note(how, f"{norm}.{kind}", "ln1 moved behind the convolution (exact to eps)")


def _replace_layer_norms(state: dict[str, torch.Tensor], how: dict[str, list[str]]):
    """
    RMSNorm in the place of the LayerNorms of a checkpoint that has both.

    LayerNorm is `gain * centre(x) / std(x) + bias`, and `centre` is linear. Before a projection, gain, centring and
    bias become the projection's, and what is left to the norm is x / rms(x) instead of x / std(x).
    """
    for norm in [name.removesuffix(".bias") for name in state if _is_norm_bias(name)]:
        gain, bias = state[f"{norm}.weight"], state.pop(f"{norm}.bias")
        parent, _, name = norm.rpartition(".")
        if parent.endswith(".attn"):
            projection = f"{parent}.{_PROJECTIONS[name.removesuffix('_norm')]}"
            weight = state[f"{projection}.weight"]
            state[f"{norm}.weight"] = torch.ones_like(gain)
            state[f"{projection}.weight"] = weight * gain - (weight * gain).mean(dim=1, keepdim=True)
            state[f"{projection}.bias"] = state[f"{projection}.bias"] + weight @ bias
            for changed in (f"{norm}.weight", f"{projection}.weight", f"{projection}.bias"):
                _note(how, changed, "LayerNorm as an RMSNorm and the projection after it")
        elif parent.endswith("_head.norms"):
            conv = f"{norm.replace('.norms.', '.convs.')}.weight"
            state[conv] = state[conv] - state[conv].mean(dim=0)
            for changed in (f"{norm}.weight", conv):
                _note(how, changed, "LayerNorm as an RMSNorm and the convolution before it, without bias")
        else:
            _note(how, f"{norm}.weight", "LayerNorm's gain into RMSNorm, without bias")


def _is_norm_bias(name: str) -> bool:
    return name.endswith("_norm.bias") or (name.endswith(".bias") and ".norms." in name)


def _note(how: dict[str, list[str]], name: str, way: str):
    how.setdefault(name, []).append(way)


__all__ = ["RULES", "convert"]
