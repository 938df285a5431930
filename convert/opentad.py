"""ActionFormer checkpoints of OpenTAD (https://github.com/sming256/OpenTAD) to ours.

OpenTAD's ActionFormer differs from the release's (v1) in what no name or shape shows:

- Convolutions with a norm mask their output behind norm and activation, so that padding does not leak out of embedding and
  heads, as with our `mask_conv_inputs`. Inside attention and into the heads it does, as in v1. Hence outputs equal
  OpenTAD's where it does not pad, and differ slightly near the end of an input that it pads.
- The norms of embedding, neck and heads have an epsilon of 1e-6, those of the transformer blocks 1e-5. Ours has one, 1e-5.
  Where a convolution comes before the norm, its weights times sqrt(10) make up for it: norm(s x; s^2 eps) = norm(x; eps).
- Candidates for suppression are the best of all levels together, not of each level, and no shortest duration is asked for.
"""

import ast
import json
import warnings
from pathlib import Path

import torch

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
)

from .actionformer import fill
from .checkpoint import ConversionError, Rule, check_free, first_line, map_known_names, read_state, write_folder

RULES = [
    # projection: embedding and transformer blocks
    Rule("projection.proj.{i}.conv.{weight|bias}", "model.embedding.streams.{i}.{weight|bias}", "squeeze"),
    Rule("projection.embed.{i}.conv.{weight|bias}", "model.embedding.convs.{i}.{weight|bias}"),
    Rule("projection.embed.{i}.norm.{weight|bias}", "model.embedding.norms.{i}.{weight|bias}"),
    Rule("projection.{stem|branch}.{i}.{ln1|ln2}.{weight|bias}", "model.{stem|branch}.{i}.{ln1|ln2}.{weight|bias}"),
    Rule("projection.{stem|branch}.{i}.attn.{query|key|value}_conv.conv.weight", "model.{stem|branch}.{i}.attn.{query|key|value}_conv.weight"),
    Rule("projection.{stem|branch}.{i}.attn.{query|key|value}_norm.{weight|bias}", "model.{stem|branch}.{i}.attn.{query|key|value}_norm.{weight|bias}"),
    Rule("projection.{stem|branch}.{i}.attn.query.{weight|bias}", "model.{stem|branch}.{i}.attn.q_proj.{weight|bias}", "squeeze"),
    Rule("projection.{stem|branch}.{i}.attn.key.{weight|bias}", "model.{stem|branch}.{i}.attn.k_proj.{weight|bias}", "squeeze"),
    Rule("projection.{stem|branch}.{i}.attn.value.{weight|bias}", "model.{stem|branch}.{i}.attn.v_proj.{weight|bias}", "squeeze"),
    Rule("projection.{stem|branch}.{i}.attn.proj.{weight|bias}", "model.{stem|branch}.{i}.attn.o_proj.{weight|bias}", "squeeze"),
    Rule("projection.{stem|branch}.{i}.mlp.0.{weight|bias}", "model.{stem|branch}.{i}.mlp.up_proj.{weight|bias}", "squeeze"),
    Rule("projection.{stem|branch}.{i}.mlp.3.{weight|bias}", "model.{stem|branch}.{i}.mlp.down_proj.{weight|bias}", "squeeze"),
    Rule("projection.{stem|branch}.{i}.drop_path_{attn|mlp}.scale", "model.{stem|branch}.{i}.drop_path_{attn|mlp}.scale", "flatten"),
    # neck and heads
    Rule("neck.fpn_norms.{i}.{weight|bias}", "neck.norms.{i}.{weight|bias}"),
    Rule("rpn_head.cls_convs.{i}.conv.{weight|bias}", "class_head.convs.{i}.{weight|bias}"),
    Rule("rpn_head.cls_convs.{i}.norm.{weight|bias}", "class_head.norms.{i}.{weight|bias}"),
    Rule("rpn_head.cls_head.{weight|bias}", "class_head.output.{weight|bias}"),
    Rule("rpn_head.reg_convs.{i}.conv.{weight|bias}", "segment_head.convs.{i}.{weight|bias}"),
    Rule("rpn_head.reg_convs.{i}.norm.{weight|bias}", "segment_head.norms.{i}.{weight|bias}"),
    Rule("rpn_head.reg_head.{weight|bias}", "segment_head.output.{weight|bias}"),
    Rule("rpn_head.scale.{i}.scale", "segment_head.scale", "stack"),
    Rule("rpn_head.loss_normalizer", "criterion.loss_normalizer"),
]  # fmt: skip

# What its ActionFormer is in our terms; see above for the mask.
_SETTINGS = {"use_rope": False, "use_swiglu": False, "use_rms_norm": False, "mask_conv_inputs": True}
# Where OpenTAD's config says something: its path there, and our name for it.
_MODEL = {
    "model.projection.attn_cfg.n_head": "n_head",
    "model.projection.attn_cfg.n_mha_win_size": "mha_win_size",
    "model.projection.use_abs_pe": "use_abs_pe",
    "model.projection.max_seq_len": "max_len",
    "model.projection.conv_cfg.proj_pdrop": "proj_pdrop",
    "model.projection.path_pdrop": "path_pdrop",
    "model.rpn_head.prior_generator.regression_range": "regression_range",
    "model.rpn_head.center_sample": "center_sample",
    "model.rpn_head.center_sample_radius": "center_sample_radius",
    "model.rpn_head.label_smoothing": "label_smoothing",
    "model.rpn_head.cls_prior_prob": "cls_prior_prob",
    "model.rpn_head.loss_weight": "loss_weight",
}
_POST_PROCESSING = {
    "post_processing.pre_nms_thresh": "pre_nms_thresh",
    "post_processing.pre_nms_topk": "pre_nms_topk",
    "post_processing.nms.iou_threshold": "iou_threshold",
    "post_processing.nms.min_score": "min_score",
    "post_processing.nms.max_seg_num": "max_seg_num",
    "post_processing.nms.multiclass": "multiclass_nms",
    "post_processing.nms.sigma": "nms_sigma",
    "post_processing.nms.voting_thresh": "voting_thresh",
}
_DATASET = {
    f"dataset.test.{name}": name
    for name in ("feature_stride", "sample_stride", "offset_frames", "fps", "resize_length")
}
# OpenTAD counts a feature's time from its first frame plus `offset_frames`, half of our `num_frames`. Where the offset is
# 0, this is as good as none: num_frames is a positive number.
_NO_FRAMES = 1e-6
# What OpenTAD takes where its config is silent.
_POST_PROCESSING_DEFAULTS = {
    "pre_nms_thresh": 0.001,
    "pre_nms_topk": 2000,
    "iou_threshold": 0.0,
    "min_score": 0.0,
    "max_seg_num": 100,
    "multiclass_nms": True,
    "nms_sigma": 0.5,
    "voting_thresh": 0.0,
    "duration_thresh": 0.0,
}
# Settings of OpenTAD that our model lacks: path, the value that is harmless, what it does.
_NOT_OURS = {
    "model.rpn_head.prior_generator.use_offset": (False, "points half a stride later"),
    "model.rpn_head.filter_similar_gt": (True, "classes of all matching segments as targets, in training"),
    "model.projection.input_pdrop": (0.0, "dropout of the input, in training"),
    "post_processing.nms.method": (2, "a decay other than the Gaussian in soft-NMS"),
}

_CARD = """---
library_name: transformers
tags:
- temporal-action-localization
- convtransformer
- actionformer
---

# {name}

Converted from `{source}`, an ActionFormer checkpoint (Zhang, Wu and Li, ECCV 2022, https://arxiv.org/abs/2202.07925) of
[OpenTAD](https://github.com/sming256/OpenTAD) (code Apache-2.0), by `convtransformer-convert opentad`. Inputs that OpenTAD
does not pad give its outputs; near the end of padded ones they differ slightly, because OpenTAD lets padding into attention.
The licence of the weights is the source's.

```python
from modeling_convtransformer import ConvTransformerFeatureExtractor, ConvTransformerForTemporalActionLocalization

model = ConvTransformerForTemporalActionLocalization.from_pretrained({path}).eval()
feature_extractor = ConvTransformerFeatureExtractor.from_pretrained({path})
outputs = model(**feature_extractor(features))  # an array (time, {width}), or the path of a .npy file
segments = feature_extractor.post_process_temporal_action_localization(outputs, geometry={{{geometry}}})[0]
```
"""


def read_config(path: Path, _parents: tuple[Path, ...] = ()) -> dict:
    """
    A config of OpenTAD as a dictionary: its Python file with the files that `_base_` names, or one dumped as .json or .yaml.

    Nothing is executed. Of a Python file only assignments of literals, `dict(...)` and names assigned before are read;
    what is computed becomes None, as if the file did not say it.

    Raises:
        ConversionError: the file, or one that it is based on, is not there or is no such file.
    """
    path = path.resolve()
    if path in _parents:
        raise ConversionError(f"{path} is based on itself.")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            content = json.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            import yaml  # PyYAML comes with transformers

            content = yaml.safe_load(text)
        else:
            content = _read_assignments(ast.parse(text))
    except OSError as error:
        advice = (
            f" {_parents[-1]} is based on it: give that file in its place in OpenTAD's configs." if _parents else ""
        )
        raise ConversionError(f"{path} cannot be read ({error.strerror}).{advice}") from error
    except Exception as error:  # whatever three parsers raise for a file that is something else
        raise ConversionError(f"{path} is no config of OpenTAD ({first_line(error)}).") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} is no config of OpenTAD: it holds no settings by name.")
    bases = content.pop("_base_", None) or []
    merged: dict = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = _merge(merged, read_config(path.parent / str(base), (*_parents, path)))
    return _merge(merged, content)


def _read_assignments(tree: ast.Module) -> dict:
    values: dict = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            values[statement.targets[0].id] = _literal(statement.value, values)
    return values


def _literal(node: ast.expr, values: dict):
    """The value of an expression, or None where it would have to be computed."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {keyword.arg: _literal(keyword.value, values) for keyword in node.keywords if keyword.arg}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {key.value: _literal(value, values) for key, value in pairs if isinstance(key, ast.Constant)}
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(element, values) for element in node.elts]
    if isinstance(node, ast.Name):
        return values.get(node.id)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None


def _merge(base: dict, new: dict) -> dict:
    """`new` over `base`, mapping by mapping, as OpenTAD's config library does it; `_delete_` takes a mapping alone."""
    merged = dict(base)
    for key, value in new.items():
        if isinstance(value, dict):
            old = {} if value.get("_delete_") or not isinstance(base.get(key), dict) else base[key]
            value = _merge(old, {name: entry for name, entry in value.items() if name != "_delete_"})
        merged[key] = value
    return merged


def _get(content: dict, path: str):
    for key in path.split("."):
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _pick(content: dict, table: dict[str, str]) -> dict:
    return {ours: value for path, ours in table.items() if (value := _get(content, path)) is not None}


def _fields_from_shapes(state: dict[str, torch.Tensor]) -> dict:
    """The settings that a state dict (of our names) shows."""

    def count(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})

    convs, streams = count("model.embedding.convs."), count("model.embedding.streams.")
    first = state["model.embedding.convs.0.weight"]
    arch = (convs, count("model.stem."), count("model.branch."))
    fields = {
        "n_in": first.shape[1],
        "n_embd": first.shape[0],
        "n_embd_ks": first.shape[2],
        "arch": arch,
        "with_ln": "model.embedding.norms.0.weight" in state,
        "fpn_with_ln": "neck.norms.0.weight" in state,
        "fpn_start_level": 1 + arch[2] - len(state["segment_head.scale"]),
        "head_dim": state["class_head.output.weight"].shape[1],
        "head_kernel_size": state["class_head.output.weight"].shape[2],
        "head_num_layers": 1 + count("class_head.convs."),
        "head_with_ln": "class_head.norms.0.weight" in state,
        "num_labels": len(state["class_head.output.weight"]),
    }
    if streams:
        weights = [state[f"model.embedding.streams.{index}.weight"] for index in range(streams)]
        fields |= {"n_in": [weight.shape[1] for weight in weights], "stream_dims": [len(weight) for weight in weights]}
    if not any(".drop_path_" in name for name in state):
        fields["path_pdrop"] = 0.0
    return fields


def _make_feature_extractor(content: dict, config: ConvTransformerConfig, geometry: dict):
    """Geometry and suppression of OpenTAD's config, where `geometry` (of the command line) does not say otherwise."""
    fields = {**_POST_PROCESSING_DEFAULTS, **_pick(content, _POST_PROCESSING)}
    if _get(content, "post_processing.nms.use_soft_nms") is False:
        fields["nms_method"] = "hard"
    if config.num_labels == 1:  # proposals: OpenTAD suppresses all points, and an external classifier names them
        fields |= {"pre_nms_thresh": 0.0, "pre_nms_topk": 100_000}
    dataset = _pick(content, _DATASET)
    if "resize_length" in dataset:
        # Every recording is stretched to this many features: a feature is a "frame", and the rate is the recording's.
        fields |= {"feature_stride": 1, "num_frames": _NO_FRAMES, "fps": 1.0}
    elif "feature_stride" in dataset:
        fields["feature_stride"] = dataset["feature_stride"] * dataset.get("sample_stride", 1)
        fields["num_frames"] = 2 * dataset.get("offset_frames", 0) or _NO_FRAMES
        if dataset.get("fps", -1) > 0:
            fields["fps"] = dataset["fps"]
    fields |= {name: value for name, value in geometry.items() if value is not None}
    if "feature_stride" not in fields:
        raise ConversionError(
            "--feature-stride is needed, the frames from one feature to the next: no config says it."
        )
    if "fps" not in fields:
        warnings.warn(
            "OpenTAD takes the frame rate from the annotations: 30 frames per second are written down. Segments of other "
            "recordings need geometry={'fps': ...} in post-processing, or --fps here."
        )
        fields["fps"] = 30
    return ConvTransformerFeatureExtractor(feature_size=sum(config.stream_widths), **fields)


def convert(
    source: Path,
    out: Path,
    config: Path | None = None,
    weights: str = "ema",
    class_map: Path | None = None,
    geometry: dict | None = None,
    allow_unused: bool = False,
    overwrite: bool = False,
    **overrides,
) -> ConvTransformerForTemporalActionLocalization:
    """
    Writes an ActionFormer checkpoint of OpenTAD as a folder that `from_pretrained` loads, and returns the model.

    Args:
        source: .pth of OpenTAD's training script, or a bare state dict.
        out: folder to write.
        config: OpenTAD's config file (.py, .json or .yaml); see `read_config`.
        weights: "ema" or "raw".
        class_map: OpenTAD's class map, one name a line.
        geometry: `fps`, `feature_stride`, `num_frames` that replace the config's.
        allow_unused: leave out tensors that no rule knows, such as those of a video backbone, instead of refusing.
        overrides: fields of ConvTransformerConfig that replace the config's; `n_head` and `mha_win_size` are needed if there
            is no config, because no shape shows them.

    Raises:
        ConversionError: the checkpoint cannot be converted; the message says why.
    """
    check_free(out, overwrite)
    foreign = read_state(source, weights)
    if any(name.startswith("neck.lateral_convs.") for name in foreign):
        raise ConversionError(
            f"{source} has OpenTAD's FPN neck, whose convolutions mix channels; ours do not. Only FPNIdentity converts."
        )
    state = map_known_names(foreign, RULES, source, "OpenTAD's ActionFormer", allow_unused)
    normalizer = state.pop("criterion.loss_normalizer", None)
    content = {} if config is None else read_config(config)
    origin = config or Path("the command line")
    try:
        shapes = _fields_from_shapes(state)
    except (KeyError, IndexError) as error:
        raise ConversionError(f"{source} is no whole ActionFormer of OpenTAD: {error} is missing.") from error
    given = {**_pick(content, _MODEL), **{name: value for name, value in overrides.items() if value is not None}}
    for field, option in (("n_head", "--n-head"), ("mha_win_size", "--window")):
        if given.get(field) is None:
            raise ConversionError(
                f"{option} is needed: no tensor's shape shows it, and there is no config that says it."
            )
    shapes |= _read_class_map(class_map, shapes["num_labels"])
    try:
        if normalizer is not None:
            shapes["init_loss_norm"] = float(normalizer)
        model_config = ConvTransformerConfig(**{**_SETTINGS, **given, **shapes})
        feature_extractor = _make_feature_extractor(content, model_config, geometry or {})
    except ConversionError:
        raise
    except Exception as error:  # whatever is wrong in the file
        raise ConversionError(f"{origin}: {' '.join(str(error).split())}") from error
    for path, (harmless, effect) in _NOT_OURS.items():
        if _get(content, path) not in (None, harmless):
            warnings.warn(f"{path}={_get(content, path)} is left out: {effect}.")
    if length := _get(content, "dataset.test.resize_length"):
        warnings.warn(
            f"OpenTAD stretches every recording of this dataset to {length} features, and so must you; the frame rate of a "
            f"recording is then {length} / its seconds, in geometry={{'fps': ...}} of post-processing."
        )
    elif "Sliding" in str(_get(content, "dataset.test.type")):
        warnings.warn(
            "OpenTAD cuts a recording of this dataset into overlapping windows and suppresses over all of them; a feature "
            "extractor takes it whole."
        )

    for name in state:
        norm = name.replace(".convs.", ".norms.").replace(".bias", ".weight")
        if ".convs." in name and norm in state:
            state[name] = state[name] * 10**0.5  # an epsilon of 1e-6
    model = ConvTransformerForTemporalActionLocalization(model_config)
    fill(model, state, source, origin)
    model.eval()

    def write(folder: Path):
        model.save_pretrained(folder)
        feature_extractor.save_pretrained(folder)
        rate = f'"fps": {length} / seconds, ' if length else ""
        name = out.absolute().name
        card = _CARD.format(
            name=name,
            path=json.dumps(name),
            source=source.name,
            width=feature_extractor.feature_size,
            geometry=f'{rate}"duration": seconds',
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    write_folder(out, write, overwrite)
    return model


def _read_class_map(path: Path | None, classes: int) -> dict:
    if path is None:
        return {}
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} cannot be read as a class map, one name a line ({error}).") from error
    if len(names) != classes:
        raise ConversionError(f"{path} names {len(names)} classes, but the checkpoint has {classes}.")
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


__all__ = ["RULES", "convert", "read_config"]
