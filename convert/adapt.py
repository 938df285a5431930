"""Start a model of one configuration from the weights of another: what fits is copied, what nearly fits is adapted.

    model, report = adapt(source_model, target_config)

Every tensor of the new model ends in one of three states, which `report` lists:

- copied: same name, same shape, same meaning.
- adapted: made from the source's tensors, in a way that the report names:
    - key and value heads averaged in groups (GQA, Ainslie et al., 2023, https://arxiv.org/abs/2305.13245);
    - the gain of a LayerNorm as that of an RMSNorm (its bias is dropped);
    - a position table resampled to another length;
    - a GELU MLP as a SwiGLU: gelu(u) is nearly u * sigmoid(1.702 u) = silu(1.702 u) / 1.702, which is a SwiGLU whose
      gate is 1.702 u and whose other factor is the constant 1 / 1.702. Where it has fewer hidden units, the ones that
      matter least (smallest product of the norms of their weights) go.
    - the classification head's rows of classes that both have, by name;
    - the first convolution's columns of streams that both have.
- initialised: as in a new model.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
)

from .checkpoint import ConversionError, write_folder

# Hendrycks and Gimpel, 2016 (https://arxiv.org/abs/1606.08415): gelu(x) is close to x * sigmoid(1.702 x).
_GELU_SLOPE = 1.702


# What the data decide, not the architecture: a target configuration takes these from the source.
_OF_THE_DATA = ("n_in", "stream_dims", "max_len", "id2label", "label2id", "empty_labels")


def find_configuration(name: str) -> Path:
    """A YAML file by path, or one of ours (configuration/*.yaml) by name."""
    ours = Path(__file__).resolve().parent.parent / "configuration"
    for path in (Path(name), ours / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in ours.glob("*.yaml")))
    raise ConversionError(f"There is no configuration {name}: neither a file, nor one of {known}.")


def target_config(source: ConvTransformerConfig, target: str, **overrides: Any) -> ConvTransformerConfig:
    """
    The configuration `target` (a path, or a name such as "balanced") for the source's features and classes.

    Raises:
        ConversionError: there is no such configuration, or it does not go with the overrides.
    """
    path = find_configuration(target)
    fields = {name: getattr(source, name) for name in _OF_THE_DATA}
    try:
        config = ConvTransformerConfig.from_yaml(path, **{**fields, "num_labels": source.num_labels, **overrides})
        if source.regression_range is not None and len(source.regression_range) == len(config.detector_strides):
            config.regression_range = source.regression_range
        config.validate_architecture()
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConversionError(f"{path}: {error}") from error
    return config


class Report(dict):
    """For each tensor of the new model (state, how, number of elements); printed as the share of each state."""

    def add(self, name: str, state: str, how: str, size: int):
        self[name] = {"state": state, "how": how, "parameters": size}

    def shares(self) -> dict[str, dict]:
        """For each state and way: tensors, parameters and the share of all parameters."""
        total = sum(entry["parameters"] for entry in self.values())
        rows: dict[str, dict] = {}
        for entry in self.values():
            key = entry["state"] if not entry["how"] else f"{entry['state']}: {entry['how']}"
            row = rows.setdefault(key, {"tensors": 0, "parameters": 0, "share": 0.0})
            row["tensors"] += 1
            row["parameters"] += entry["parameters"]
            row["share"] = row["parameters"] / total
        return dict(sorted(rows.items()))

    def __str__(self) -> str:
        lines = [f"{'state':<64}{'tensors':>9}{'parameters':>13}{'share':>9}"]
        for state, row in self.shares().items():
            lines.append(f"{state:<64}{row['tensors']:>9}{row['parameters']:>13,}{100 * row['share']:>8.1f}%")
        return "\n".join(lines)

    def write(self, path: Path):
        path.write_text(json.dumps({"shares": self.shares(), "tensors": self}, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def adapt(
    source: ConvTransformerForTemporalActionLocalization, config: ConvTransformerConfig
) -> tuple[ConvTransformerForTemporalActionLocalization, Report]:
    """
    A model of `config` that starts from `source` where it can.

    Raises:
        ConversionError: nothing at all can be carried over.
    """
    model = ConvTransformerForTemporalActionLocalization(config)
    theirs, report = source.state_dict(), Report()
    gelu_to_swiglu = config.use_swiglu and not source.config.use_swiglu and config.n_embd == source.config.n_embd
    for name, tensor in model.state_dict().items():
        state, how, value = _carry(name, tensor, theirs, source.config, config, gelu_to_swiglu)
        if value is not None:
            tensor.copy_(value)
        report.add(name, state, how, tensor.numel())
    if all(entry["state"] == "initialised" for entry in report.values()):
        raise ConversionError(
            f"Nothing fits: the source has n_embd {source.config.n_embd} and n_in {source.config.n_in}, the target "
            f"{config.n_embd} and {config.n_in}. Choose a target of the same width."
        )
    return model, report


_CARD = """---
library_name: transformers
tags:
- temporal-action-localization
- convtransformer
---

# {name}

A ConvTransformer that was started from `{source}` and has not been trained since: {share:.0f} % of its parameters were
carried over (conversion_report.json names the state of every tensor). Train it before use.
"""


def retarget(
    folder: Path, out: Path, target: str, source_name: str, overwrite: bool = False, **overrides: Any
) -> tuple[ConvTransformerForTemporalActionLocalization, Report]:
    """
    Writes a model of the configuration `target` that starts from the converted folder `folder`, with
    conversion_report.json beside it. `overrides` are fields of the configuration.

    Raises:
        ConversionError: see `target_config` and `adapt`.
    """
    source = ConvTransformerForTemporalActionLocalization.from_pretrained(folder)
    feature_extractor = ConvTransformerFeatureExtractor.from_pretrained(folder)
    model, report = adapt(source, target_config(source.config, target, **overrides))
    if report.shares().get("initialised", {"share": 0.0})["share"] > 0.9:
        warnings.warn(
            f"nearly nothing fits {target}: it has n_embd {model.config.n_embd} and arch {tuple(model.config.arch)}, the "
            f"checkpoint {source.config.n_embd} and {tuple(source.config.arch)}. Give it the checkpoint's sizes: "
            f"--set n_embd={source.config.n_embd} --set n_head={source.config.n_head}"
        )
    if model.config.mask_conv_inputs:  # results do not depend on padding: no need to pad as the source did
        feature_extractor.min_length = feature_extractor.pad_to_multiple_of = None

    def write(path: Path):
        model.save_pretrained(path)
        feature_extractor.save_pretrained(path)
        report.write(path / "conversion_report.json")
        share = 100 * sum(row["share"] for state, row in report.shares().items() if state != "initialised")
        card = _CARD.format(name=out.absolute().name, source=source_name, share=share)
        (path / "README.md").write_text(card, encoding="utf-8")

    write_folder(out, write, overwrite)
    return model, report


def _carry(name, tensor, theirs, source, target, gelu_to_swiglu):
    """(state, how, value or None) of one tensor of the new model."""
    if ".mlp." in name and gelu_to_swiglu:
        value = _swiglu_from_gelu(name, tensor, theirs)
        if value is not None:
            return "adapted", "GELU MLP as SwiGLU", value
        return "initialised", "", None
    if ".mlp." in name and source.use_swiglu != target.use_swiglu:
        return "initialised", "", None
    if name.startswith("class_head.output."):
        return _by_class_name(name, tensor, theirs, source, target)
    reads_streams = name == "model.embedding.convs.0.weight" or name.startswith("model.embedding.streams.")
    if reads_streams and source.stream_widths != target.stream_widths:
        return _by_stream(name, tensor, theirs, source, target)
    if name not in theirs:
        return "initialised", "", None
    value = theirs[name]
    if _is_norm(name) and source.use_rms_norm != target.use_rms_norm and value.shape == tensor.shape:
        if target.use_rms_norm:
            return "adapted", "LayerNorm's gain into RMSNorm", value
        return (
            ("adapted", "RMSNorm's gain into LayerNorm", value)
            if name.endswith("weight")
            else ("initialised", "", None)
        )
    if value.shape == tensor.shape:
        return "copied", "", value
    if ".k_proj." in name or ".v_proj." in name:
        heads, kept = source.n_kv_head or source.n_head, target.n_kv_head or target.n_head
        width = target.n_embd // target.n_head
        if source.n_embd == target.n_embd and source.n_head == target.n_head and heads % kept == 0:
            grouped = value.unflatten(0, (kept, heads // kept, width)).mean(dim=1)
            return "adapted", "key/value heads averaged in groups", grouped.flatten(0, 1)
    if name == "model.embedding.positions.table" and value.shape[1] == tensor.shape[1]:
        value = F.interpolate(value.T[None], len(tensor), mode="linear", align_corners=False)[0].T
        return "adapted", "position table resampled", value
    return "initialised", "", None


def _is_norm(name: str) -> bool:
    return any(part in name for part in (".norms.", ".ln1.", ".ln2.", "_norm."))


def _swiglu_from_gelu(name: str, tensor: torch.Tensor, theirs: dict[str, torch.Tensor]) -> torch.Tensor | None:
    prefix, layer, kind = name.rsplit(".", 2)
    if f"{prefix}.up_proj.weight" not in theirs:
        return None
    if (layer, kind) == ("down_proj", "bias"):
        return theirs[name]
    up, down = theirs[f"{prefix}.up_proj.weight"], theirs[f"{prefix}.down_proj.weight"]
    hidden = tensor.shape[1] if layer == "down_proj" else len(tensor)
    count = min(hidden, len(up))
    kept = (up.norm(dim=1) * down.norm(dim=0)).topk(count).indices.sort().values
    value = tensor.clone()  # units beyond the source's start as in a new model, without a say at first
    if layer == "gate_proj":
        value[:count] = _GELU_SLOPE * theirs[f"{prefix}.up_proj.{kind}"][kept]
    elif layer == "up_proj":
        value[:count] = 0.0 if kind == "weight" else 1 / _GELU_SLOPE
    else:
        value.zero_()
        value[:, :count] = down[:, kept]
    return value


def _by_class_name(name, tensor, theirs, source, target):
    value = theirs[name]
    if value.shape[1:] != tensor.shape[1:]:
        return "initialised", "", None
    if source.id2label == target.id2label:
        return "copied", "", value
    rows = [
        (target_id, source.label2id[label])
        for target_id, label in target.id2label.items()
        if label in source.label2id and not label.startswith("LABEL_")
    ]
    if not rows:
        return "initialised", "", None
    carried = tensor.clone()
    carried[[row for row, _ in rows]] = value[[row for _, row in rows]]
    return "adapted", f"{len(rows)} of {len(tensor)} classes by name", carried


def _shared_streams(source, target) -> dict[int, int]:
    """Target stream to source stream. Streams have no names: they are the same if both their widths are, in order."""
    if source.projected_stream_widths is None or target.projected_stream_widths is None:
        return {}
    theirs = list(zip(source.stream_widths, source.projected_stream_widths, strict=True))
    shared, start = {}, 0
    for index, widths in enumerate(zip(target.stream_widths, target.projected_stream_widths, strict=True)):
        if widths in theirs[start:]:
            shared[index] = theirs.index(widths, start)
            start = shared[index] + 1
    return shared


def _by_stream(name, tensor, theirs, source, target):
    """Projections of the streams that both models have, and their columns of the first convolution."""
    shared = _shared_streams(source, target)
    how = f"{len(shared)} of {len(target.stream_widths)} streams"
    if name != "model.embedding.convs.0.weight":
        index = int(name.split(".")[3])
        if index not in shared:
            return "initialised", "", None
        return "adapted", how, theirs[name.replace(f".{index}.", f".{shared[index]}.")]
    if not shared or theirs[name].shape[::2] != tensor.shape[::2]:
        return "initialised", "", None
    parts = theirs[name].split(source.projected_stream_widths, dim=1)
    columns = list(tensor.split(target.projected_stream_widths, dim=1))
    for index, own in shared.items():
        columns[index] = parts[own]
    return "adapted", how, torch.cat(columns, dim=1)


__all__ = ["Report", "adapt", "find_configuration", "retarget", "target_config"]
