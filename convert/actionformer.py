"""Checkpoints of ActionFormer's release (v1) to ours, and back: exact, tensor by tensor."""

import warnings
from pathlib import Path

import torch

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
)
from modeling_convtransformer.data import label_names, load_annotations

from .checkpoint import ConversionError, Rule, map_names, read_state, unmap_names, write_folder

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
license: mit
tags:
- temporal-action-localization
- convtransformer
- actionformer
---

# {name}

Converted from `{source}`, a checkpoint of the [ActionFormer release](https://github.com/happyharrycn/actionformer_release)
(Zhang, Wu and Li, ECCV 2022, https://arxiv.org/abs/2202.07925; code MIT), by `convtransformer-convert actionformer`.
Every tensor of its {weights} weights was carried over as it is; the model gives v1's outputs.

```python
from modeling_convtransformer import ConvTransformerFeatureExtractor, ConvTransformerForTemporalActionLocalization

model = ConvTransformerForTemporalActionLocalization.from_pretrained("{name}").eval()
feature_extractor = ConvTransformerFeatureExtractor.from_pretrained("{name}")
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
    except (OSError, ValueError, KeyError) as error:
        raise ConversionError(f"{path}: {error}") from error
    return names, {float(entry["fps"]) for entry in annotations["database"].values() if entry.get("fps")}


def padding_multiple(config: ConvTransformerConfig) -> int:
    """What v1 pads long inputs to a multiple of: the largest stride times window over the levels of the detector."""
    pairs = zip(config.detector_strides, config.window_sizes, strict=False)
    return max(stride * (window // 2) * 2 if window > 1 else stride for stride, window in pairs)


def _make_feature_extractor(path: Path, config: ConvTransformerConfig, fps: float | None):
    settings = {"min_length": config.max_len, "pad_to_multiple_of": padding_multiple(config)}
    if fps is not None:
        settings["fps"] = fps
    try:
        return ConvTransformerFeatureExtractor.from_yaml(path, **settings)
    except ValueError as error:
        if "does not say fps" not in str(error):
            raise
    warnings.warn(
        f"{path} leaves the frame rate to the annotations, which were not given (or hold several): 30 frames per second "
        "are written down. Segments of other recordings need geometry={'fps': ...} in post-processing, or --fps here."
    )
    return ConvTransformerFeatureExtractor.from_yaml(path, fps=30, **settings)


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
    state, _, unknown = map_names(read_state(source, weights), RULES)
    if unknown and not allow_unused:
        raise ConversionError(
            f"{source} holds tensors that ActionFormer does not have: {', '.join(unknown[:5])}"
            f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}. It is another model, or say --allow-unused."
        )
    names, rates = read_annotations(annotations)
    overrides = (
        {} if names is None else {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    )
    try:
        model_config = ConvTransformerConfig.from_yaml(config, **overrides)
        # v1 has these scales only where the drop path rate is above 0: the weights know best.
        if not any(".drop_path_" in name for name in state):
            model_config.path_pdrop = 0.0
        if names is None and "class_head.output.bias" in state:
            model_config.num_labels = len(state["class_head.output.bias"])
        fps = fps or (rates.pop() if len(rates) == 1 else None)
        feature_extractor = _make_feature_extractor(config, model_config, fps)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ConversionError(f"{config}: {error}") from error

    model = ConvTransformerForTemporalActionLocalization(model_config)
    fill(model, state, source, config)
    model.eval()

    def write(folder: Path):
        model.save_pretrained(folder)
        feature_extractor.save_pretrained(folder)
        card = _CARD.format(
            name=out.name,
            source=source.name,
            weights="moving-average" if weights == "ema" else "raw",
            width=feature_extractor.feature_size,
            min_length=feature_extractor.min_length,
            multiple=feature_extractor.pad_to_multiple_of,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    write_folder(out, write, overwrite)
    return model


def fill(model: torch.nn.Module, state: dict[str, torch.Tensor], source: Path, config: Path):
    """Loads a state dict of our names, all of it and nothing else but the loss normaliser, which v1 does not save."""
    own = model.state_dict()
    state = {**state, "criterion.loss_normalizer": own["criterion.loss_normalizer"]}
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    differing = [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ]
    problems = [f"{name} is missing" for name in missing] + [f"{name} is too much" for name in extra] + differing
    if problems:
        raise ConversionError(
            f"{source} does not fit {config}: {'; '.join(problems[:4])}"
            f"{f' and {len(problems) - 4} more' if len(problems) > 4 else ''}. Is it the configuration of this checkpoint?"
        )
    model.load_state_dict(state)


def reverse(folder: Path, out: Path):
    """Writes a folder of ours as a checkpoint that v1's eval.py loads: the same tensors under both `state_dict`s."""
    try:
        model = ConvTransformerForTemporalActionLocalization.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{folder} is no folder of ours: {error}") from error
    state, unknown = unmap_names(model.state_dict(), RULES)
    unknown = [name for name in unknown if name != "criterion.loss_normalizer"]
    if unknown or any(
        getattr(model.config, name) for name in ("use_rope", "use_rms_norm", "use_batch_norm", "is_causal")
    ):
        raise ConversionError(
            f"{folder} is no model that v1 has: only LayerNorm, GELU, no RoPE and as many key as query heads go back"
            f"{' (' + ', '.join(unknown[:3]) + ')' if unknown else ''}."
        )
    state = {f"module.{name}": tensor for name, tensor in state.items()}
    temporary = out.with_name(f".{out.name}.part")
    try:
        torch.save({"epoch": 0, "state_dict": state, "state_dict_ema": state}, temporary)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
