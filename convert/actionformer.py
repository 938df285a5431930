"""Checkpoints of ActionFormer's release (v1) to ours, and back: exact, tensor by tensor."""

import json
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
)
from modeling_convtransformer.configuration_convtransformer import read_recipe
from modeling_convtransformer.data import label_names, load_annotations

from .checkpoint import (
    ConversionError,
    Rule,
    check_free,
    first_line,
    map_names,
    read_state,
    unmap_names,
    write_file,
    write_folder,
)

RULES = [
    # embedding
    Rule("backbone.proj.{i}.conv.{weight|bias}", "model.embedding.streams.{i}.{weight|bias}", "squeeze"),
    Rule("backbone.embd.{i}.conv.{weight|bias}", "model.embedding.convs.{i}.{weight|bias}"),
    Rule("backbone.embd_norm.{i}.{weight|bias}", "model.embedding.norms.{i}.{weight|bias}", "flatten"),
    Rule("backbone.pos_embd", None),  # sinusoids, computed
    # transformer blocks
    Rule("backbone.{stem|branch}.{i}.{ln1|ln2}.{weight|bias}", "model.{stem|branch}.{i}.{ln1|ln2}.{weight|bias}", "flatten"),
    *(
        rule
        for name, projection in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
        for rule in (
            Rule(f"backbone.{{stem|branch}}.{{i}}.attn.{name}_conv.conv.weight", f"model.{{stem|branch}}.{{i}}.attn.{name}_conv.weight"),
            Rule(f"backbone.{{stem|branch}}.{{i}}.attn.{name}_norm.{{weight|bias}}", f"model.{{stem|branch}}.{{i}}.attn.{name}_norm.{{weight|bias}}", "flatten"),
            Rule(f"backbone.{{stem|branch}}.{{i}}.attn.{name}.{{weight|bias}}", f"model.{{stem|branch}}.{{i}}.attn.{projection}.{{weight|bias}}", "squeeze"),
        )
    ),
    Rule("backbone.{stem|branch}.{i}.attn.proj.{weight|bias}", "model.{stem|branch}.{i}.attn.o_proj.{weight|bias}", "squeeze"),
    Rule("backbone.{stem|branch}.{i}.attn.rel_pe", "model.{stem|branch}.{i}.attn.relative_bias", "heads"),
    Rule("backbone.{stem|branch}.{i}.mlp.0.{weight|bias}", "model.{stem|branch}.{i}.mlp.up_proj.{weight|bias}", "squeeze"),
    Rule("backbone.{stem|branch}.{i}.mlp.3.{weight|bias}", "model.{stem|branch}.{i}.mlp.down_proj.{weight|bias}", "squeeze"),
    Rule("backbone.{stem|branch}.{i}.drop_path_{attn|mlp}.scale", "model.{stem|branch}.{i}.drop_path_{attn|mlp}.scale", "flatten"),
    # convolution blocks
    Rule("backbone.{stem|branch}.{i}.{conv1|conv2|downsample}.conv.{weight|bias}", "model.{stem|branch}.{i}.{conv1|conv2|downsample}.{weight|bias}"),
    # neck
    Rule("neck.lateral_convs.{i}.conv.{weight|bias}", "neck.laterals.{i}.{weight|bias}", "squeeze"),
    Rule("neck.fpn_convs.{i}.conv.{weight|bias}", "neck.convs.{i}.{weight|bias}"),
    Rule("neck.fpn_norms.{i}.{weight|bias}", "neck.norms.{i}.{weight|bias}", "flatten"),
    # heads
    Rule("cls_head.head.{i}.conv.{weight|bias}", "class_head.convs.{i}.{weight|bias}"),
    Rule("cls_head.norm.{i}.{weight|bias}", "class_head.norms.{i}.{weight|bias}", "flatten"),
    Rule("cls_head.cls_head.conv.{weight|bias}", "class_head.output.{weight|bias}"),
    Rule("reg_head.head.{i}.conv.{weight|bias}", "segment_head.convs.{i}.{weight|bias}"),
    Rule("reg_head.norm.{i}.{weight|bias}", "segment_head.norms.{i}.{weight|bias}", "flatten"),
    Rule("reg_head.scale.{i}.scale", "segment_head.scale", "stack"),
    Rule("reg_head.offset_head.conv.{weight|bias}", "segment_head.output.{weight|bias}"),
    Rule("point_generator.buffer_points.{i}", None),  # positions, computed
]  # fmt: skip

_CARD = """---
library_name: transformers
tags:
- temporal-action-localization
- convtransformer
- actionformer
---

# {name}

Converted from `{source}`, a checkpoint of the
[ActionFormer release](https://github.com/happyharrycn/actionformer_release) (Zhang, Wu and Li, ECCV 2022,
https://arxiv.org/abs/2202.07925; code MIT), by `convtransformer-convert actionformer`.
Every tensor of its {weights} was carried over as it is;
the model gives v1's outputs.
The licence of the weights is that of the source.

```python
from modeling_convtransformer import ConvTransformerFeatureExtractor, ConvTransformerForTemporalActionLocalization

model = ConvTransformerForTemporalActionLocalization.from_pretrained({path}).eval()
feature_extractor = ConvTransformerFeatureExtractor.from_pretrained({path})
outputs = model(**feature_extractor(features))  # an array (time, {width}), or the path of a .npy file
segments = feature_extractor.post_process_temporal_action_localization(outputs, geometry={{"duration": seconds}})[0]
```

v1's results depend on how far an input is padded (`mask_conv_inputs` is off, as v1 has it), so the feature extractor pads
as v1 does: to {min_length} features, and beyond that to a multiple of {multiple}.
"""


def read_annotations(path: Path | None) -> tuple[list[str] | None, set[float]]:
    """Class names by id, and all frame rates, of an annotation file."""
    if path is None:
        return None, set()
    try:
        annotations = load_annotations(path)
        names = label_names(annotations)
        return names, {float(entry["fps"]) for entry in annotations["database"].values() if entry.get("fps")}
    except Exception as error:
        raise ConversionError(say(path, error)) from error


def say(path: Path, error: Exception) -> str:
    """An error about a file in one line that names the file, once."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    if not isinstance(error, OSError | ValueError):
        reason = f"not in the expected form ({type(error).__name__}: {reason})"
    return (reason if str(path) in reason else f"{path}: {reason}").rstrip(".") + "."


def padding_multiple(config: ConvTransformerConfig) -> int:
    """What v1 pads long inputs to a multiple of: the largest stride times window over the levels of the detector."""
    return max(_level_multiples(config))


def _level_multiples(config: ConvTransformerConfig) -> list[int]:
    # v1 pairs the detector's strides with the backbone's windows from the first level on, wherever the neck starts.
    pairs = zip(config.detector_strides, config.window_sizes, strict=False)
    return [stride * (window // 2) * 2 if window > 1 else stride for stride, window in pairs]


def make_feature_extractor(
    path: Path, config: ConvTransformerConfig, fps: float | None, rates: set[float] = frozenset()
) -> ConvTransformerFeatureExtractor:
    """
    Args:
        fps: replaces what the file says.
        rates: those of the annotations, which v1 takes where the file says nothing.
    """
    settings = {"min_length": config.max_len, "pad_to_multiple_of": padding_multiple(config)}
    if fps is not None:
        return ConvTransformerFeatureExtractor.from_yaml(path, fps=fps, **settings)
    try:
        return ConvTransformerFeatureExtractor.from_yaml(path, **settings)
    except ValueError as error:
        if "does not say fps" not in str(error):
            raise
    if len(rates) == 1:
        return ConvTransformerFeatureExtractor.from_yaml(path, fps=min(rates), **settings)
    given = f"hold {len(rates)} different ones" if rates else "say none or were not given"
    warnings.warn(
        f"{path} leaves the frame rate to the annotations, which {given}: 30 frames per second are written down. "
        "Segments of other recordings need geometry={'fps': ...} in post-processing, or --fps here."
    )
    return ConvTransformerFeatureExtractor.from_yaml(path, fps=30, **settings)


def _make_config(path: Path, state: dict[str, torch.Tensor], names: list[str] | None) -> ConvTransformerConfig:
    """The config of a v1 file, as its weights are, with names for its classes."""
    config = ConvTransformerConfig.from_yaml(path)
    # v1 has these scales only where the drop path rate is above 0, and never in the conv backbone.
    if not any(".drop_path_" in name for name in state):
        config.path_pdrop = 0.0
    if names is None:
        return config
    if config.num_labels == 1 and len(names) > 1:
        names = ["action"]  # class-agnostic: v1 takes every annotation as class 0
    if len(names) > config.num_labels:
        raise ValueError(f"num_classes is {config.num_labels}, but the annotations name {len(names)} classes.")
    # EPIC-KITCHENS' last classes have no data, and so no name.
    names = [*names, *(f"LABEL_{index}" for index in range(len(names), config.num_labels))]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    return config


def convert(
    source: Path,
    out: Path,
    config: Path,
    weights: str = "ema",
    annotations: Path | None = None,
    fps: float | None = None,
    allow_unused: bool = False,
    overwrite: bool = False,
) -> ConvTransformerForTemporalActionLocalization:
    """
    Writes a v1 checkpoint as a folder that `from_pretrained` loads, and returns the model.

    Args:
        source: .pth.tar of v1's training script, or a bare state dict.
        out: folder to write.
        config: v1's YAML file, or the config.txt that its training script records.
        weights: "ema" or "raw".
        annotations: v1's annotation JSON, for class names and the frame rate.
        fps: frames per second of the recordings, where the config leaves it to the annotations.
        allow_unused: leave out tensors that no rule knows, instead of refusing.

    Raises:
        ConversionError: the checkpoint cannot be converted exactly; the message says why.
    """
    check_free(out, overwrite)
    if fps is not None and not 0 < fps < float("inf"):
        raise ConversionError(f"--fps is {fps}; expected a positive number of frames per second.")
    state, _, unknown = map_names(read_state(source, weights), RULES)
    if not state:
        raise ConversionError(f"{source} is another model: ActionFormer has no tensor like {', '.join(unknown[:3])}.")
    if unknown and not allow_unused:
        raise ConversionError(
            f"{source} holds tensors that ActionFormer does not have (--allow-unused leaves them out): {_list(unknown, 5)}."
        )
    if unknown:
        warnings.warn(f"left out, because ActionFormer does not have them: {', '.join(unknown)}")
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) > 1 or not min(dtypes, key=str).is_floating_point:
        raise ConversionError(
            f"{source} holds tensors of the types {_list(sorted(map(str, dtypes)), 3)}; expected one."
        )

    names, rates = read_annotations(annotations)
    try:
        model_config = _make_config(config, state, names)
        feature_extractor = make_feature_extractor(config, model_config, fps, rates)
        recipe = read_recipe(config)
        with torch.device("meta"):  # a config of another model could ask for much memory
            check_fit(ConvTransformerForTemporalActionLocalization(model_config), state, source, config)
    except ConversionError:
        raise
    except Exception as error:  # whatever is wrong in the file
        raise ConversionError(say(config, error)) from error
    if (recipe.get("dataset") or {}).get("force_upsampling"):
        warnings.warn(
            f"v1 stretches every recording of this dataset to {model_config.max_len} features (force_upsampling), and so "
            f"must you: data.TemporalActionDataset does it with resize_to={model_config.max_len}."
        )

    model = ConvTransformerForTemporalActionLocalization(model_config).to(dtypes.pop())
    fill(model, state, source, config)
    model.eval()

    def write(folder: Path):
        model.save_pretrained(folder)
        feature_extractor.save_pretrained(folder)
        name = out.absolute().name
        card = _CARD.format(
            name=name,
            path=json.dumps(name),
            source=source.name,
            weights="moving-average weights (raw ones, where it has no others)" if weights == "ema" else "raw weights",
            width=feature_extractor.feature_size,
            min_length=feature_extractor.min_length,
            multiple=feature_extractor.pad_to_multiple_of,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    write_folder(out, write, overwrite)
    return model


def fill(model: torch.nn.Module, state: dict[str, torch.Tensor], source: Path, config: Path):
    """Loads a state dict of our names, all of it and nothing else but the loss normaliser, which v1 does not save."""
    check_fit(model, state, source, config)
    own = model.state_dict()
    for name, tensor in tqdm(state.items(), desc="tensors", leave=False, disable=None):
        own[name].copy_(tensor)


def check_fit(model: torch.nn.Module, state: dict[str, torch.Tensor], source: Path, config: Path):
    """Refuses a state dict that lacks a tensor of the model, or has another one, or one of another shape."""
    own = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "criterion.loss_normalizer"}
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is too much" for name in state if name not in own]
    problems += [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in own.items()
        if name in state and state[name].shape != shape
    ]
    if problems:
        raise ConversionError(
            f"{source} does not fit {config}, which may be that of another model: {_list(problems, 4)}."
        )


def _list(items: list[str], count: int) -> str:
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return f"{', '.join(items[:count])}{more}"


def reverse(folder: Path, out: Path, overwrite: bool = False):
    """
    Writes a folder of ours as a checkpoint that v1's eval.py loads: the same tensors under both `state_dict`s.

    Raises:
        ConversionError: v1 has no such model, or the folder is incomplete.
    """
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder} is no folder of ours: it has no config.json.")
    try:
        if (
            kind := json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        ) != "convtransformer":
            raise ValueError(f"its model_type is {kind!r} instead of 'convtransformer'")
        model, info = ConvTransformerForTemporalActionLocalization.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # whatever is wrong in the folder
        raise ConversionError(f"{folder} is no folder of ours ({first_line(error)}).") from error
    incomplete = sorted(
        str(name) for kind in ("missing_keys", "mismatched_keys", "unexpected_keys") for name in info[kind]
    )
    if incomplete:
        raise ConversionError(f"{folder} does not hold the detector of its config.json: see {_list(incomplete, 4)}.")
    if reasons := _beyond_v1(model.config):
        raise ConversionError(f"{folder} holds a model that v1 does not have: {'; '.join(reasons)}.")
    state, unknown = unmap_names(model.state_dict(), RULES)
    assert unknown == ["criterion.loss_normalizer"], unknown
    state = {f"module.{name}": tensor.clone() for name, tensor in state.items()}
    checkpoint = {"epoch": 0, "state_dict": state, "state_dict_ema": state}
    write_file(out, lambda path: torch.save(checkpoint, path), overwrite)


def _beyond_v1(config: ConvTransformerConfig) -> list[str]:
    """What a model has that v1 cannot express, in words."""
    has_attention = config.backbone_type == "convTransformer"
    multiple = next((x for x in _level_multiples(config) if config.max_len % x), None)
    reasons = {
        "RoPE": has_attention and config.use_rope,
        "SwiGLU": has_attention and config.use_swiglu,
        "fewer key/value heads than query heads": has_attention
        and (config.n_kv_head or config.n_head) != config.n_head,
        "a relative bias in global attention": has_attention
        and any(
            width and window <= 1
            for width, window in zip(config.relative_bias_widths, config.window_sizes, strict=True)
        ),
        "a window of 3, at which v1 fails": has_attention and 3 in config.window_sizes,
        "positions without attention": not has_attention and config.use_abs_pe,
        "learned positions": config.use_learned_pe,
        "RMSNorm": config.use_rms_norm,
        "batch norm": config.use_batch_norm,
        f"norm_eps {config.norm_eps} instead of 1e-5": config.norm_eps != 1e-5,
        "is_causal": config.is_causal,
        f"max_len {config.max_len}, which v1 wants as a multiple of stride times window ({multiple})": multiple
        is not None,
        "mask_conv_inputs, without which the same tensors give other outputs near the end of a recording (to accept that, "
        "save the model with mask_conv_inputs=False first)": config.mask_conv_inputs,
    }
    return [reason for reason, applies in reasons.items() if applies]
