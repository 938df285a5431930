"""A random checkpoint with OpenTAD's names and shapes, against its forward pass written as formulas, and against v1's."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F

from modeling_convtransformer import (
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
)
from modeling_convtransformer.convert import actionformer, opentad
from modeling_convtransformer.convert.checkpoint import ConversionError
from modeling_convtransformer.convert.cli import main

WIDTH, HEADS, ARCH, WINDOWS, CLASSES = 32, 4, (2, 1, 3), (9, 9, -1, -1), 5
OPTIONS = ("--n-head", "4", "--window", "9", "9", "-1", "-1", "--feature-stride", "4", "--num-frames", "16")
GEOMETRY = {"fps": 30, "feature_stride": 4, "num_frames": 16}

# Written for these tests in the form of OpenTAD's config files, with what makes them hard to read as text.
BASE = """
length = 64
dataset = dict(test=dict(type="ThumosPaddingDataset", feature_stride=4, sample_stride=2, offset_frames=8))
model = dict(
    type="ActionFormer",
    projection=dict(
        type="Conv1DTransformerProj",
        arch=(2, 1, 3),
        conv_cfg=dict(kernel_size=3, proj_pdrop=0.1),
        attn_cfg=dict(n_head=8, n_mha_win_size=19),
        max_seq_len=length,
        path_pdrop=0.2,
    ),
    rpn_head=dict(
        prior_generator=dict(regression_range=[(0, 4), (2, 8), (4, 16), (8, 10000)]),
        label_smoothing=0.1,
        loss_weight=2.0,
    ),
)
"""
CONFIG = """
_base_ = ["../base/model.py"]
import os
touched = open(os.path.join(os.path.dirname(__file__), "executed"), "w")
model = dict(projection=dict(attn_cfg={"n_head": 4, "n_mha_win_size": [9, 9, -1, -1]}, use_abs_pe=False))
post_processing = dict(
    pre_nms_topk=3000,
    nms=dict(use_soft_nms=True, sigma=0.4, max_seg_num=150 + 50, min_score=0.001, multiclass=False, voting_thresh=0.7),
)
"""


def make_weights(classes=CLASSES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def random(*shape):
        return torch.randn(shape, generator=generator)

    def conv(name, out, inside, kernel, bias):
        weights[f"{name}.weight"] = random(out, inside, kernel) / math.sqrt(inside * kernel)
        if bias:
            weights[f"{name}.bias"] = 0.2 * random(out)

    def norm(name):
        weights[f"{name}.weight"] = 1 + 0.2 * random(WIDTH)
        weights[f"{name}.bias"] = 0.2 * random(WIDTH)

    for layer in range(ARCH[0]):
        conv(f"projection.embed.{layer}.conv", WIDTH, WIDTH if layer else 20, 3, False)
        norm(f"projection.embed.{layer}.norm")
    for block in [f"stem.{i}" for i in range(ARCH[1])] + [f"branch.{i}" for i in range(ARCH[2])]:
        block = f"projection.{block}"
        norm(f"{block}.ln1")
        norm(f"{block}.ln2")
        for name in ("query", "key", "value"):
            conv(f"{block}.attn.{name}_conv.conv", WIDTH, 1, 3, False)
            norm(f"{block}.attn.{name}_norm")
            conv(f"{block}.attn.{name}", WIDTH, WIDTH, 1, True)
        conv(f"{block}.attn.proj", WIDTH, WIDTH, 1, True)
        conv(f"{block}.mlp.0", 4 * WIDTH, WIDTH, 1, True)
        conv(f"{block}.mlp.3", WIDTH, 4 * WIDTH, 1, True)
        for name in ("attn", "mlp"):
            weights[f"{block}.drop_path_{name}.scale"] = 0.5 * random(1, WIDTH, 1)
    for level in range(1 + ARCH[2]):
        norm(f"neck.fpn_norms.{level}")
        weights[f"rpn_head.scale.{level}.scale"] = 1 + 0.2 * random()
    for head, width in (("cls", classes), ("reg", 2)):
        for layer in range(2):
            conv(f"rpn_head.{head}_convs.{layer}.conv", WIDTH, WIDTH, 3, False)
            norm(f"rpn_head.{head}_convs.{layer}.norm")
        conv(f"rpn_head.{head}_head", width, WIDTH, 3, True)
    weights["rpn_head.loss_normalizer"] = torch.tensor(137.5)
    return weights


def write_checkpoint(path, weights=None, **wrapper):
    """As OpenTAD's training writes it: distributed, with moving averages."""
    weights = {f"module.{name}": tensor for name, tensor in (weights or make_weights()).items()}
    torch.save({"epoch": 34, "state_dict": weights, "state_dict_ema": weights, **wrapper}, path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# OpenTAD's forward pass as formulas; x is (batch, channels, time), mask (batch, time)


def tad_norm(weights, name, x, eps):
    gain, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return F.layer_norm(x.transpose(1, 2), gain.shape, gain, bias, eps).transpose(1, 2)


def tad_conv(weights, name, x, mask, stride=1, groups=1):
    """Convolution, mask, norm and ReLU where there are such, mask again."""
    kernel = weights[f"{name}.conv.weight"]
    valid = mask[:, None, ::stride]
    x = F.conv1d(x, kernel, None, stride, kernel.shape[-1] // 2, groups=groups) * valid
    if f"{name}.norm.weight" in weights:
        x = F.relu(tad_norm(weights, f"{name}.norm", x, 1e-6)) * valid
    return x


def tad_attention(weights, name, x, mask, stride, window):
    def pointwise(layer, y):
        return F.conv1d(y, weights[f"{name}.{layer}.weight"], weights[f"{name}.{layer}.bias"])

    projected = []
    for kind in ("query", "key", "value"):
        y = tad_conv(weights, f"{name}.{kind}_conv", x, mask, stride, groups=WIDTH)
        y = pointwise(kind, tad_norm(weights, f"{name}.{kind}_norm", y, 1e-5))
        projected.append(y.unflatten(1, (HEADS, -1)).transpose(2, 3))
    query, key, value = projected
    mask = mask[:, ::stride]
    steps = torch.arange(mask.shape[1])
    seen = mask[:, None, None, :] & ((steps[:, None] - steps).abs() <= (window // 2 if window > 1 else len(steps)))
    scores = (query @ key.transpose(2, 3) / math.sqrt(WIDTH // HEADS)).masked_fill(~seen, -1e9)
    return pointwise("proj", (scores.softmax(-1) @ value).transpose(2, 3).flatten(1, 2)) * mask[:, None]


def tad_block(weights, name, x, mask, stride, window):
    valid = mask[:, None, ::stride]
    attended = tad_attention(weights, f"{name}.attn", tad_norm(weights, f"{name}.ln1", x, 1e-5), mask, stride, window)
    skipped = F.max_pool1d(x, stride + 1, stride, stride // 2) if stride > 1 else x
    x = skipped * valid + weights[f"{name}.drop_path_attn.scale"] * attended
    y = tad_norm(weights, f"{name}.ln2", x, 1e-5)
    y = F.gelu(F.conv1d(y, weights[f"{name}.mlp.0.weight"], weights[f"{name}.mlp.0.bias"]))
    y = F.conv1d(y, weights[f"{name}.mlp.3.weight"], weights[f"{name}.mlp.3.bias"]) * valid
    return x + weights[f"{name}.drop_path_mlp.scale"] * y


def tad_detector(weights, x, mask):
    """Logits, segments on the grid and mask of all points."""
    for layer in range(ARCH[0]):
        x = tad_conv(weights, f"projection.embed.{layer}", x, mask)
    levels = []
    blocks = [("stem.0", 1), ("branch.0", 2), ("branch.1", 2), ("branch.2", 2)]
    for index, (block, stride) in enumerate(blocks):
        x = tad_block(weights, f"projection.{block}", x, mask, stride, WINDOWS[index])
        mask = mask[:, ::stride]
        levels.append((x, mask))
    logits, segments, masks = [], [], []
    for level, (x, mask) in enumerate(levels):
        x = tad_norm(weights, f"neck.fpn_norms.{level}", x, 1e-6)
        outputs = []
        for head in ("cls", "reg"):
            y = x
            for layer in range(2):
                y = tad_conv(weights, f"rpn_head.{head}_convs.{layer}", y, mask)
            y = F.conv1d(y, weights[f"rpn_head.{head}_head.weight"], weights[f"rpn_head.{head}_head.bias"], padding=1)
            outputs.append(y.transpose(1, 2))
        offsets = F.relu(weights[f"rpn_head.scale.{level}.scale"] * outputs[1]) * 2**level
        points = torch.arange(mask.shape[1]) * 2.0**level
        logits.append(outputs[0])
        segments.append(torch.stack((points - offsets[..., 0], points + offsets[..., 1]), dim=-1))
        masks.append(mask)
    return torch.cat(logits, 1), torch.cat(segments, 1), torch.cat(masks, 1)


def make_input(valid, scale=1.0, length=64):
    x = scale * torch.randn(1, 20, length, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(length)[None] < valid
    return x * mask[:, None], mask


@torch.no_grad()
def compare(model, weights, valid, scale=1.0):
    """Differences of the logits and segments at valid points."""
    x, mask = make_input(valid, scale)
    logits, segments, points = tad_detector(weights, x, mask)
    outputs = model(x.transpose(1, 2), mask)
    assert torch.equal(outputs.point_mask.bool(), points)
    return (outputs.logits - logits)[points].abs(), (outputs.pred_segments - segments)[points].abs()


# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("opentad")
    source = write_checkpoint(path / "best.pth")
    assert main(["opentad", str(source), str(path / "out"), *OPTIONS, "--fps", "30"]) == 0
    return path / "out"


@pytest.fixture(scope="module")
def model(folder):
    return ConvTransformerForTemporalActionLocalization.from_pretrained(folder).eval()


# Small features are where an epsilon tells: without its correction the difference is 2e-3.
@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_outputs_are_opentads_where_it_does_not_pad(model, scale):
    logits, segments = compare(model, make_weights(), 64, scale)
    assert logits.max() < 3e-5
    assert segments.max() < 3e-4  # in features, up to 8 of them a stride


def test_outputs_near_the_end_of_padded_inputs_are_close(model):
    logits, _ = compare(model, make_weights(), 41)
    assert logits.median() < 1e-5
    assert logits.mean() < 0.03
    assert logits.max() < 0.5  # logits are of size 1


@torch.no_grad()
def test_padding_changes_nothing(model):
    x, mask = make_input(41)
    padded = model(x.transpose(1, 2), mask)
    alone = model(x[:, :, :41].transpose(1, 2))
    kept = padded.point_mask[0].bool()
    assert torch.allclose(padded.logits[0, kept], alone.logits[0], atol=1e-5)


def to_v1(weights):
    """OpenTAD's tensors under the names, and in the shapes, of ActionFormer's release."""
    renamed = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        is_norm = any(part in ("norm", "ln1", "ln2", "fpn_norms") or part.endswith("_norm") for part in parts)
        if parts[0] == "projection":
            parts[0] = "backbone"
            if parts[1] == "embed":
                parts = ["backbone", "embd_norm" if parts[3] == "norm" else "embd", parts[2], *parts[3:]]
                parts = [part for part in parts if part != "norm"]
        elif parts[0] == "rpn_head" and parts[1].endswith("_convs"):
            part = ["norm", parts[2]] if parts[3] == "norm" else ["head", parts[2], "conv"]
            parts = [parts[1].replace("_convs", "_head"), *part, parts[4]]
        elif parts[1] == "cls_head":
            parts = ["cls_head", "cls_head", "conv", parts[2]]
        elif parts[1] == "reg_head":
            parts = ["reg_head", "offset_head", "conv", parts[2]]
        elif parts[1] == "scale":
            parts = ["reg_head", "scale", parts[2], "scale"]
        elif parts[1] == "loss_normalizer":
            continue  # v1 does not save it
        renamed[".".join(parts)] = tensor[None, :, None] if is_norm else tensor
    return renamed


def test_the_same_tensors_under_v1s_names_give_the_same_model(model, tmp_path):
    torch.save(to_v1(make_weights()), tmp_path / "v1.pth.tar")
    config = {
        "dataset": {"input_dim": 20, "num_classes": CLASSES, "max_seq_len": 64, "default_fps": 30},
        "model": {
            "embd_dim": WIDTH,
            "fpn_dim": WIDTH,
            "head_dim": WIDTH,
            "backbone_arch": list(ARCH),
            "n_mha_win_size": list(WINDOWS),
            "regression_range": [[0, 4], [4, 8], [8, 16], [16, 10000]],
        },
    }
    (tmp_path / "v1.yaml").write_text(yaml.safe_dump(config))
    v1 = actionformer.convert(tmp_path / "v1.pth.tar", tmp_path / "out", tmp_path / "v1.yaml")
    theirs, ours = v1.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys()
    for name in theirs.keys() - {"criterion.loss_normalizer"}:
        scale = 10**0.5 if ".convs." in name else 1.0  # the epsilon of the norm behind it
        assert torch.equal(ours[name], theirs[name] * scale), name
    x, mask = make_input(64)
    with torch.no_grad():
        difference = (v1(x.transpose(1, 2), mask).logits - model(x.transpose(1, 2), mask).logits).abs()
    assert difference.max() < 1e-4  # epsilons of 1e-5 and 1e-6


def test_sizes_come_from_the_tensors(model, folder):
    config = model.config
    assert (config.n_in, config.n_embd, config.n_head, config.n_embd_ks) == (20, WIDTH, HEADS, 3)
    assert tuple(config.arch) == ARCH
    assert (config.head_dim, config.head_num_layers, config.num_labels) == (WIDTH, 3, CLASSES)
    assert (config.use_rope, config.use_swiglu, config.use_rms_norm, config.mask_conv_inputs) == (False,) * 3 + (True,)
    assert config.init_loss_norm == model.criterion.loss_normalizer == 137.5
    extractor = ConvTransformerFeatureExtractor.from_pretrained(folder)
    assert (extractor.fps, extractor.feature_stride, extractor.num_frames) == (30, 4, 16)
    assert (extractor.feature_size, extractor.min_length, extractor.duration_thresh) == (20, None, 0)
    assert "OpenTAD" in (folder / "README.md").read_text()


def test_other_shapes(tmp_path):
    """Streams, no norms but the heads', no scales, a neck that starts later."""
    weights = make_weights()
    for name in list(weights):
        if any(part in name for part in ("embed.0.norm", "embed.1.norm", "fpn_norms", "drop_path", "scale.0.")):
            del weights[name]
    weights = {name.replace("scale.3.", "scale.0."): tensor for name, tensor in weights.items()}
    for layer in range(2):
        weights[f"projection.embed.{layer}.conv.bias"] = torch.full((WIDTH,), float(layer))
    for stream, width in enumerate((7, 8)):
        weights[f"projection.proj.{stream}.conv.weight"] = torch.randn(10, width, 1)
        weights[f"projection.proj.{stream}.conv.bias"] = torch.randn(10)
    source = write_checkpoint(tmp_path / "best.pth", weights)
    model = opentad.convert(source, tmp_path / "out", geometry=GEOMETRY, n_head=4, mha_win_size=9)
    assert (model.config.n_in, model.config.stream_dims) == ([7, 8], [10, 10])
    assert (model.config.with_ln, model.config.fpn_with_ln, model.config.head_with_ln) == (False, False, True)
    assert (model.config.path_pdrop, model.config.fpn_start_level) == (0, 1)
    conv = model.model.embedding.convs[1]
    assert torch.equal(conv.weight, weights["projection.embed.1.conv.weight"])  # no norm, no epsilon
    assert torch.equal(conv.bias, torch.ones(WIDTH))


def test_weights_and_their_wrapper(tmp_path):
    averaged = {name: 2 * tensor for name, tensor in make_weights().items()}
    source = write_checkpoint(tmp_path / "best.pth", state_dict_ema=averaged)
    arguments = {"geometry": GEOMETRY, "n_head": 4, "mha_win_size": 9}
    for weights, factor in (("ema", 2), ("raw", 1)):
        model = opentad.convert(source, tmp_path / weights, weights=weights, **arguments)
        assert torch.equal(model.class_head.output.bias, factor * make_weights()["rpn_head.cls_head.bias"])


# ---------------------------------------------------------------------------------------------------------------------
# Configs


@pytest.fixture
def config(tmp_path):
    for folder, text in (("base/model.py", BASE), ("actionformer/own.py", CONFIG)):
        path = tmp_path / folder
        path.parent.mkdir()
        path.write_text(text)
    return path


def test_config_is_read_and_not_executed(tmp_path, config, capsys):
    source = write_checkpoint(tmp_path / "best.pth")
    (tmp_path / "classes.txt").write_text("run\njump\nswim\nthrow\nrest\n")
    arguments = ["opentad", str(source), str(tmp_path / "out"), "--config", str(config)]
    assert main([*arguments, "--class-map", str(tmp_path / "classes.txt")]) == 0
    assert "30 frames per second are written down" in capsys.readouterr().err
    assert not (config.parent / "executed").exists()
    model = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path / "out")
    fields = model.config
    assert (fields.n_head, list(fields.mha_win_size), fields.max_len) == (4, [9, 9, -1, -1], 64)
    assert (fields.proj_pdrop, fields.path_pdrop, fields.label_smoothing, fields.loss_weight) == (0.1, 0.2, 0.1, 2.0)
    assert fields.detector_ranges == [(0, 4), (2, 8), (4, 16), (8, 10000)]
    assert fields.id2label[2] == "swim"
    extractor = ConvTransformerFeatureExtractor.from_pretrained(tmp_path / "out")
    assert (extractor.feature_stride, extractor.num_frames, extractor.fps) == (8, 16, 30)
    assert (extractor.nms_method, extractor.nms_sigma, extractor.min_score) == ("soft", 0.4, 0.001)
    assert (extractor.multiclass_nms, extractor.voting_thresh, extractor.pre_nms_topk) == (False, 0.7, 3000)
    assert extractor.max_seg_num == 100  # computed in the file: OpenTAD's default
    assert compare(model.eval(), make_weights(), 64)[0].max() < 3e-5


def test_options_go_before_the_config(tmp_path, config):
    source = write_checkpoint(tmp_path / "best.pth")
    options = ["--window", "7", "--n-head", "2", "--max-len", "128", "--abs-pe", "--fps", "25", "--num-frames", "2"]
    ranges = ["--regression-range", "0,1", "1,2", "2,3", "3,99"]
    arguments = ["opentad", str(source), str(tmp_path / "out"), "--config", str(config), *options, *ranges]
    assert main(arguments) == 0
    fields = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path / "out").config
    assert (fields.n_head, fields.mha_win_size, fields.max_len, fields.use_abs_pe) == (2, 7, 128, True)
    assert fields.detector_ranges[-1] == (3, 99)
    extractor = ConvTransformerFeatureExtractor.from_pretrained(tmp_path / "out")
    assert (extractor.fps, extractor.feature_stride, extractor.num_frames) == (25, 8, 2)


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_dumped_configs(tmp_path, config, suffix):
    content = opentad.read_config(config)
    dumped = tmp_path / f"dumped{suffix}"
    dumped.write_text(json.dumps(content) if suffix == ".json" else yaml.safe_dump(content))
    assert opentad.read_config(dumped) == content


def test_merging_of_bases(tmp_path):
    (tmp_path / "a.py").write_text("x = dict(one=1, two=dict(three=3), four=[1, 2])\ny = -1\n")
    (tmp_path / "b.py").write_text("_base_ = 'a.py'\nx = dict(two=dict(_delete_=True, five=5), four=[3])\nz = y\n")
    content = opentad.read_config(tmp_path / "b.py")
    assert content == {"x": {"one": 1, "two": {"five": 5}, "four": [3]}, "y": -1, "z": None}


def test_resized_recordings_and_proposals(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "best.pth", make_weights(classes=1))
    content = {
        "model": {"projection": {"attn_cfg": {"n_head": 4, "n_mha_win_size": 7}, "input_pdrop": 0.2}},
        "dataset": {"test": {"resize_length": 64}},
        "post_processing": {"nms": {"use_soft_nms": False, "iou_threshold": 0.7}},
    }
    (tmp_path / "own.json").write_text(json.dumps(content))
    arguments = ["opentad", str(source), str(tmp_path / "out"), "--config", str(tmp_path / "own.json")]
    assert main(arguments) == 0
    notes = capsys.readouterr().err
    assert "64 features" in notes
    assert "input_pdrop=0.2" in notes
    extractor = ConvTransformerFeatureExtractor.from_pretrained(tmp_path / "out")
    assert (extractor.nms_method, extractor.iou_threshold, extractor.pre_nms_thresh) == ("hard", 0.7, 0)
    # OpenTAD: seconds = grid / 64 * duration
    outputs = {
        "logits": torch.ones(1, 1, 1),
        "pred_segments": torch.tensor([[[16.0, 48.0]]]),
        "point_mask": torch.ones(1, 1).long(),
        "point_levels": torch.zeros(1, 1).long(),
    }
    geometry = {"fps": 64 / 20.0, "duration": 20.0}
    found = extractor.post_process_temporal_action_localization(outputs, geometry=geometry)[0]
    assert torch.allclose(found["segments"], torch.tensor([[5.0, 15.0]]), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def refuse(capsys, tmp_path, source, *options):
    """The one line that the command says, having written nothing."""
    before = sorted(tmp_path.iterdir())
    assert main(["opentad", str(source), str(tmp_path / "out"), *options]) == 1
    assert sorted(tmp_path.iterdir()) == before
    message = capsys.readouterr().err
    assert message.splitlines()[-1].startswith("error: ")
    assert message.count("error: ") == 1
    return message


def test_what_no_tensor_shows_is_asked_for(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "best.pth")
    assert "--n-head is needed" in refuse(capsys, tmp_path, source)
    assert "--window is needed" in refuse(capsys, tmp_path, source, "--n-head", "4")
    assert "--feature-stride is needed" in refuse(capsys, tmp_path, source, "--n-head", "4", "--window", "9")
    assert "n_head 5" in refuse(capsys, tmp_path, source, *OPTIONS, "--n-head", "5")
    assert "fps is -1" in refuse(capsys, tmp_path, source, *OPTIONS, "--fps", "-1")


def test_other_models_are_refused(tmp_path, capsys):
    weights = {**make_weights(), "backbone.blocks.0.weight": torch.zeros(2, 2)}
    source = write_checkpoint(tmp_path / "best.pth", weights)
    assert "backbone.blocks.0.weight" in refuse(capsys, tmp_path, source, *OPTIONS)
    assert main(["opentad", str(source), str(tmp_path / "allowed"), *OPTIONS, "--allow-unused"]) == 0
    capsys.readouterr()
    source = write_checkpoint(
        tmp_path / "best.pth", {**make_weights(), "neck.lateral_convs.0.conv.weight": weights["neck.fpn_norms.0.bias"]}
    )
    assert "FPNIdentity" in refuse(capsys, tmp_path, source, *OPTIONS)
    whole = make_weights()
    del whole["projection.branch.1.attn.key.bias"]
    source = write_checkpoint(tmp_path / "best.pth", whole)
    assert "model.branch.1.attn.k_proj.bias is missing" in refuse(capsys, tmp_path, source, *OPTIONS)
    del whole["projection.embed.0.conv.weight"]
    source = write_checkpoint(tmp_path / "best.pth", whole)
    assert "no whole ActionFormer" in refuse(capsys, tmp_path, source, *OPTIONS)


def test_bad_files_are_refused(tmp_path, config, capsys):
    source = write_checkpoint(tmp_path / "best.pth")
    assert "cannot be read" in refuse(capsys, tmp_path, source, "--config", str(tmp_path / "no.py"))
    (tmp_path / "bad.py").write_text("model = dict(\n")
    assert "no config of OpenTAD" in refuse(capsys, tmp_path, source, "--config", str(tmp_path / "bad.py"))
    (tmp_path / "bad.yaml").write_text("model: !!python/object/apply:os.getcwd []\n")
    assert "no config of OpenTAD" in refuse(capsys, tmp_path, source, "--config", str(tmp_path / "bad.yaml"))
    (tmp_path / "names.txt").write_text("run\njump\n")
    message = refuse(capsys, tmp_path, source, *OPTIONS, "--class-map", str(tmp_path / "names.txt"))
    assert "names 2 classes, but the checkpoint has 5" in message
    (tmp_path / "loop.py").write_text("_base_ = ['loop.py']\n")
    with pytest.raises(ConversionError, match="based on itself"):
        opentad.read_config(tmp_path / "loop.py")
    config.write_text("_base_ = '../elsewhere/model.py'\n")
    with pytest.raises(ConversionError, match="in its place in OpenTAD's configs"):
        opentad.read_config(Path(config))
