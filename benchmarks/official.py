"""ActionFormer's official code ("v1"), from a clone that the user has (`--v1 PATH`), to be measured beside ours.

https://github.com/happyharrycn/actionformer_release (MIT). Nothing here needs it unless `--v1` is given.
"""

import contextlib
import importlib.util
import math
import sys
import types
from pathlib import Path

import numpy as np
import torch
from harness import BenchmarkError, first_line
from torch import nn

from modeling_convtransformer import ConvTransformerConfig
from modeling_convtransformer.convert import actionformer
from modeling_convtransformer.convert.checkpoint import map_names

HELP = "a clone of ActionFormer's official code (github.com/happyharrycn/actionformer_release), measured beside ours"

# What v1's model reads of its `test_cfg` when it is built; none of it touches the forward.
_TEST_CFG = {
    "pre_nms_thresh": 0.001,
    "pre_nms_topk": 2000,
    "iou_threshold": 0.1,
    "min_score": 0.001,
    "max_seg_num": 200,
    "nms_method": "soft",
    "duration_thresh": 0.05,
    "multiclass_nms": True,
    "nms_sigma": 0.5,
    "voting_thresh": 0.7,
}


def check_clone(path: str | Path) -> Path:
    """
    The folder of the clone, absolute.

    Raises:
        BenchmarkError: there is no v1 in it.
    """
    path = Path(path).expanduser().absolute()
    for part in ("libs/modeling/meta_archs.py", "libs/utils/nms.py", "libs/utils/metrics.py"):
        if not (path / part).is_file():
            raise BenchmarkError(f"--v1 {path} has no {part}; expected a clone of ActionFormer's official code.")
    return path


@contextlib.contextmanager
def _importable(path: Path, **stand_ins: types.ModuleType):
    """Imports from the clone, with stand-ins for modules that what is measured does not use."""
    folders = [str(path), str(path / "libs" / "utils")]
    held = {name: sys.modules.get(name) for name in stand_ins}
    sys.path[:0] = folders
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        sys.path[:] = [folder for folder in sys.path if folder not in folders]
        for name, module in held.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def build_model(path: str | Path, config: ConvTransformerConfig, length: int) -> nn.Module:
    """
    v1's own detector with the settings of `config`, its weights as torch's generator gives them.

    Raises:
        BenchmarkError: v1 has no such model; the message says why.
    """
    if reasons := beyond_v1(config):
        raise BenchmarkError(f"v1 has no such model: {'; '.join(reasons)}.")
    # Its package of utilities brings the compiled NMS, pandas and joblib; the model needs none of them.
    utilities = types.ModuleType("libs.utils")
    utilities.batched_nms = None
    with _importable(check_clone(path), **{"libs.utils": utilities}):
        modeling = importlib.import_module("libs.modeling")
    widths = config.projected_stream_widths
    return modeling.make_meta_arch(
        "LocPointTransformer",
        backbone_type=config.backbone_type,
        fpn_type=config.fpn_type,
        backbone_arch=tuple(config.arch),
        scale_factor=config.scale_factor,
        input_dim=config.n_in,
        max_seq_len=config.max_len,
        max_buffer_len_factor=max(1, math.ceil(length / config.max_len)),
        n_head=config.n_head,
        n_mha_win_size=config.window_sizes,
        embd_kernel_size=config.n_embd_ks,
        embd_dim=config.n_embd if widths is None else widths,
        embd_with_ln=config.with_ln,
        fpn_dim=config.neck_width,
        fpn_with_ln=config.fpn_with_ln,
        fpn_start_level=config.fpn_start_level,
        head_dim=config.head_width,
        regression_range=config.detector_ranges,
        head_num_layers=config.head_num_layers,
        head_kernel_size=config.head_kernel_size,
        head_with_ln=config.head_with_ln,
        use_abs_pe=config.use_abs_pe,
        use_rel_pe=config.use_rel_pe,
        num_classes=config.num_labels,
        train_cfg={
            "center_sample": config.center_sample,
            "center_sample_radius": config.center_sample_radius,
            "loss_weight": config.loss_weight,
            "cls_prior_prob": config.cls_prior_prob,
            "dropout": config.proj_pdrop,
            "droppath": config.path_pdrop,
            "label_smoothing": config.label_smoothing,
            "init_loss_norm": config.init_loss_norm,
            "head_empty_cls": list(config.empty_labels),
        },
        test_cfg=_TEST_CFG,
    )


def beyond_v1(config: ConvTransformerConfig) -> list[str]:
    """What `config` has that v1 does not, in words; nothing: v1 has this model."""
    reasons = actionformer._beyond_v1(config)
    return [*reasons, "dropout on attention weights"] if config.attn_pdrop else reasons


def convert_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """v1's tensors under our names, by the converter's own table."""
    state, _, unknown = map_names(state, actionformer.RULES)
    assert not unknown, unknown
    return state


def run_detector(model: nn.Module, features: torch.Tensor, mask: torch.Tensor) -> tuple:
    """
    v1's forward without its preprocessing and post-processing.

    Args:
        features: (batch, channels, time).
        mask: (batch, 1, time) bool.

    Returns:
        points, logits, offsets and masks, each a list with one entry for each level; logits and offsets are (batch,
        time, channels), masks (batch, time).
    """
    features, masks = model.neck(*model.backbone(features, mask))
    points = model.point_generator(features)
    logits = [x.permute(0, 2, 1) for x in model.cls_head(features, masks)]
    offsets = [x.permute(0, 2, 1) for x in model.reg_head(features, masks)]
    return points, logits, offsets, [x.squeeze(1) for x in masks]


def detector_outputs(points: list, logits: list, offsets: list) -> dict[str, list[torch.Tensor]]:
    """Logits and segments of all points, as our detector gives them."""
    points, offsets = torch.cat(points), torch.cat(offsets, dim=1).float()
    places, strides = points[:, 0], points[:, 3]
    segments = torch.stack((places - offsets[..., 0] * strides, places + offsets[..., 1] * strides), dim=-1)
    return {"logits": [torch.cat(logits, dim=1)], "segments": [segments]}


def training_loss(model: nn.Module, features: torch.Tensor, mask: torch.Tensor, labels: list[dict]) -> torch.Tensor:
    """v1's loss, targets and all, of features that are on the device already."""
    points, logits, offsets, masks = run_detector(model, features, mask)
    segments = [label["segments"] for label in labels]
    classes = [label["class_labels"] for label in labels]
    targets = model.label_points(points, segments, classes)
    return model.losses(masks, logits, offsets, *targets)["final_loss"]


def import_nms(path: str | Path):
    """
    v1's `batched_nms`, which needs its compiled extension.

    Raises:
        BenchmarkError: the extension is missing; the message says how to build it.
    """
    path = check_clone(path)
    with _importable(path):
        try:
            importlib.import_module("nms_1d_cpu")
        except ImportError as error:
            raise BenchmarkError(
                f"v1's compiled NMS is missing ({first_line(error)}). Build it for this Python and torch: "
                f"cd {path / 'libs' / 'utils'} && python setup.py build_ext --inplace"
            ) from None
    return _load_utility(path, "nms").batched_nms


def import_evaluation(path: str | Path):
    """
    v1's `ANETdetection`.

    Raises:
        BenchmarkError: pandas or joblib, which it is written with, is missing.
    """
    if not hasattr(np, "float"):
        vars(np)["float"] = float  # v1's code is older than NumPy 1.24, which took this name away
    return _load_utility(check_clone(path), "metrics").ANETdetection


def _load_utility(path: Path, name: str) -> types.ModuleType:
    """A file of v1's utilities by itself: their package would import all of its training code."""
    spec = importlib.util.spec_from_file_location(f"v1_{name}", path / "libs" / "utils" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with _importable(path):
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            raise BenchmarkError(f"v1's libs/utils/{name}.py cannot be imported: {first_line(error)}.") from None
    return module
