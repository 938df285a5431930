"""Checkpoints of ActionFormer's release (v1) convert exactly: outputs, training and segments are those of its own code.

The fixtures (`../fixtures/v1`) are numbers of v1's official code, run on random weights in which nothing is 0 or 1 by
chance; each golden says in its JSON what it shows. `backbones` has the configurations of v1's backbone, `detectors` whole
detectors; both are narrow (8 channels), which changes nothing but the size of the files. `epoch_001` is a checkpoint that
v1's own training script wrote, with its YAML file, its recorded config.txt and the outputs of v1's evaluation.
`state_dicts` holds names and shapes of v1's published configurations.
"""

import ast
import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
    ConvTransformerModel,
)
from modeling_convtransformer.convert import actionformer
from modeling_convtransformer.convert.checkpoint import ConversionError, map_names, read_state, unmap_names
from modeling_convtransformer.loss_convtransformer import assign_targets
from modeling_convtransformer.modeling_convtransformer import AffineDropPath

FIXTURES = Path(__file__).parent.parent / "fixtures" / "v1"

# v1's own float32 and float64 outputs differ by up to 1.4e-5 on such models.
CLOSE = {"rtol": 0, "atol": 5e-5}
# Gradients sum over all steps and reach some ten: a relative part beside it.
CLOSE_GRADIENTS = {"rtol": 1e-4, "atol": 5e-5}

IMPLEMENTATIONS = ["eager", "sdpa"]


@functools.cache
def load_goldens(name: str) -> dict[str, dict]:
    """Goldens by name; `tensors` holds what each has, by its name without the golden's."""
    content = json.loads((FIXTURES / f"{name}.json").read_text())
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    tensors |= {name: tensors[other] for name, other in content["same_as"].items()}  # stored once
    goldens = content["goldens"]
    for name, golden in goldens.items():
        golden["tensors"] = {
            key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")
        }
        prefix = f"{golden['weights']}/sd/"
        golden["state"] = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return goldens


BACKBONES = list(load_goldens("backbones"))
DETECTORS = list(load_goldens("detectors"))


def assert_same_state(state, expected):
    """Bit for bit, with names, shapes and dtypes."""
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert state[name].shape == tensor.shape, name
        assert torch.equal(state[name], tensor), name


# --- Backbones ---------------------------------------------------------------------------------------------------------


def make_backbone(golden, implementation):
    fields = dict(golden["kwargs"])
    if isinstance(fields["n_embd"], list):
        fields["stream_dims"], fields["n_embd"] = fields["n_embd"], sum(fields["n_embd"])
    config = ConvTransformerConfig(
        backbone_type=golden["type"],
        **{"path_pdrop": 0.0, **fields},  # the default of v1's backbone; its detector says 0.1
        use_rope=False,
        use_swiglu=False,
        use_rms_norm=False,
        mask_conv_inputs=False,
        attn_implementation=implementation,
    )
    state, dropped, unknown = map_names({f"backbone.{n}": t for n, t in golden["state"].items()}, actionformer.RULES)
    assert dropped == unknown == []
    model = ConvTransformerModel(config)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    return model.eval()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", BACKBONES)
def test_backbone(name, implementation):
    golden = load_goldens("backbones")[name]
    model = make_backbone(golden, implementation)
    for run, expected in golden["runs"].items():
        features = golden["tensors"][f"{run}/x"].transpose(1, 2)
        mask = torch.arange(features.shape[1]) < torch.tensor(expected["valid"])[:, None]
        with torch.no_grad():
            output = model(features, mask)
        assert [mask.sum(1).tolist() for mask in output.feature_masks] == expected["valid_out"]
        assert len(output.feature_maps) == len(expected["valid_out"])
        for level, feature_map in enumerate(output.feature_maps):
            wanted = golden["tensors"][f"{run}/feat{level}"].transpose(1, 2)
            torch.testing.assert_close(feature_map, wanted, **CLOSE)


def test_backbones_cover_the_settings():
    settings = [golden["kwargs"] | {"type": golden["type"]} for golden in load_goldens("backbones").values()]
    for field, value in {
        "with_ln": False,
        "use_abs_pe": True,
        "use_rel_pe": True,
        "path_pdrop": 0.1,
        "scale_factor": 4,
        "n_embd_ks": 5,
        "arch": [2, 2, 5],
        "n_in": [4, 2],
        "type": "conv",
        "mha_win_size": [9, 9, 9, 5, -1, -1],
    }.items():
        assert any(one.get(field) == value for one in settings), field


# --- Detectors ---------------------------------------------------------------------------------------------------------


def v1_recipe(kwargs, **dataset):
    """The YAML content that makes v1 call its detector with these arguments."""
    model = dict(kwargs)
    dataset |= {key: model.pop(key) for key in ("input_dim", "num_classes", "max_seq_len")}
    sections = {key: model.pop(key) for key in ("train_cfg", "test_cfg")}
    return {"dataset": dataset, "model": model, **sections}


def write_source(folder: Path, golden) -> tuple[Path, Path]:
    """A bare state dict and the YAML file that belongs to it."""
    torch.save(golden["state"], folder / "v1.pth")
    recipe = v1_recipe(golden["kwargs"], default_fps=25, feat_stride=4, num_frames=16)
    (folder / "v1.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "v1.pth", folder / "v1.yaml"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Folder of a golden detector, converted on first use."""

    @functools.cache
    def convert(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        source, config = write_source(folder, load_goldens("detectors")[name])
        actionformer.convert(source, folder / "model", config)
        return folder / "model"

    return convert


def load_detector(folder, implementation="sdpa", **fields):
    model, info = ConvTransformerForTemporalActionLocalization.from_pretrained(
        folder, attn_implementation=implementation, output_loading_info=True, **fields
    )
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", DETECTORS)
def test_detector(name, implementation, converted):
    golden = load_goldens("detectors")[name]
    model = load_detector(converted(name), implementation).eval()
    feature_extractor = ConvTransformerFeatureExtractor.from_pretrained(converted(name))
    for run, expected in golden["eval"].items():
        tensors = {
            key.removeprefix(f"{run}/"): value for key, value in golden["tensors"].items() if key.startswith(run)
        }
        inputs = feature_extractor(tensors["feats"].T)
        assert inputs["input_features"].shape[1] == expected["padded_length"]
        assert inputs["attention_mask"].sum() == expected["length"]
        with torch.no_grad():
            outputs = model(**inputs)

        levels = range(len(expected["valid"]))
        logits, offsets = (
            torch.cat([tensors[f"{key}{level}"].transpose(1, 2) for level in levels], dim=1)
            for key in ("cls_logits", "offsets")
        )
        points = torch.cat([tensors[f"points{level}"] for level in levels])  # position, range, stride
        torch.testing.assert_close(outputs.logits, logits, **CLOSE)
        found = (outputs.pred_segments[0] - points[:, :1]) * torch.tensor([-1.0, 1.0]) / points[:, 3:]
        torch.testing.assert_close(found, offsets[0], **CLOSE)
        strides = torch.tensor(model.config.detector_strides)[outputs.point_levels[0]]
        ranges = torch.tensor(model.config.detector_ranges, dtype=torch.float32)[outputs.point_levels[0]]
        assert torch.equal(strides.float(), points[:, 3])
        assert torch.equal(ranges, points[:, 1:3])
        valid = [int(outputs.point_mask[outputs.point_levels == level].sum()) for level in levels]
        assert valid == expected["valid"]

        for variant, count in expected["counts"].items():
            method, *details = variant.split("_")
            segments = feature_extractor.post_process_temporal_action_localization(
                outputs,
                geometry={"duration": expected["duration"]},
                nms_method=method,
                multiclass_nms="agn" not in details,
                voting_thresh=0.0 if "novote" in details else 0.7,
            )[0]
            assert len(segments["scores"]) == count, variant
            assert segments["labels"].tolist() == tensors[f"{variant}/labels"].tolist(), variant
            for key in ("scores", "segments"):
                torch.testing.assert_close(segments[key], tensors[f"{variant}/{key}"], **CLOSE)


def make_labels(golden, without):
    return [
        {
            "segments": torch.tensor([] if index in without else segments).reshape(-1, 2),
            "class_labels": torch.tensor([] if index in without else labels, dtype=torch.long),
        }
        for index, (segments, labels) in enumerate(zip(golden["segments"], golden["labels"], strict=True))
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", DETECTORS)
def test_training(name, implementation, converted):
    golden = load_goldens("detectors")[name]
    feature_extractor = ConvTransformerFeatureExtractor.from_pretrained(converted(name))
    inputs = feature_extractor([golden["tensors"][f"train/feats{index}"].T for index in range(2)])
    for variant, expected in golden["train"].items():
        model = load_detector(converted(name), implementation, **expected["overrides"]).train()
        for module in model.modules():
            if isinstance(module, AffineDropPath):
                module.rate = 0.0  # as in the goldens: the scale stays, nothing is dropped at random
        assert model.criterion.loss_normalizer == 100
        labels = make_labels(golden, expected["without_segments"])
        for call in expected["calls"]:
            model.zero_grad()
            output = model(**inputs, labels=labels)
            output.loss.backward()
            found = {
                "cls_loss": output.loss_dict["cls_loss"].item(),
                "reg_loss": output.loss_dict["reg_loss"].item(),
                "final_loss": output.loss.item(),
                "loss_normalizer_after": model.criterion.loss_normalizer.item(),
            }
            assert found == pytest.approx(call, rel=0, abs=5e-5), variant
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        norm = math.sqrt(
            sum(gradient.square().sum().item() for gradient in gradients.values() if gradient is not None)
        )
        assert norm == pytest.approx(expected["gradient_norm"], rel=1e-4), variant
        if variant == "default":
            theirs = {
                k.removeprefix("train/grad/"): v for k, v in golden["tensors"].items() if k.startswith("train/grad/")
            }
            mapped, _, unknown = map_names(theirs, actionformer.RULES)
            assert unknown == []
            assert mapped.keys() == gradients.keys()
            for key, gradient in mapped.items():
                torch.testing.assert_close(
                    gradients[key], gradient, **CLOSE_GRADIENTS, msg=lambda m, k=key: f"{k}: {m}"
                )


@pytest.mark.parametrize("name", DETECTORS)
def test_targets(name, converted):
    golden = load_goldens("detectors")[name]
    model = load_detector(converted(name))
    lengths = [64 // stride for stride in model.config.detector_strides]
    points, strides, levels = model._make_points(lengths, "cpu")
    ranges = torch.tensor(model.config.detector_ranges, dtype=torch.float32)[levels]
    stored = [key.removeprefix("train/classes_") for key in golden["tensors"] if key.startswith("train/classes_")]
    assert model.config.center_sample in stored
    for center_sample in stored:
        for index, labels in enumerate(make_labels(golden, ())):
            classes, offsets, _ = assign_targets(
                points,
                strides,
                ranges,
                labels["segments"][None],
                labels["class_labels"][None],
                torch.ones(1, len(labels["segments"]), dtype=torch.bool),
                model.config.num_labels,
                center_sample,
            )
            wanted = golden["tensors"][f"train/classes_{center_sample}"][index]
            assert torch.equal(classes[0], wanted.float())
            is_positive = wanted.sum(-1) > 0
            assert 0 < is_positive.sum() < len(is_positive)
            wanted = golden["tensors"][f"train/offsets_{center_sample}"][index]
            torch.testing.assert_close(offsets[0][is_positive], wanted[is_positive], **CLOSE)


@pytest.mark.parametrize("name", DETECTORS)
def test_settings_arrive(name, converted):
    kwargs = load_goldens("detectors")[name]["kwargs"]
    config = ConvTransformerConfig.from_pretrained(converted(name))
    train_cfg, test_cfg = kwargs["train_cfg"], kwargs["test_cfg"]
    assert config.label_smoothing == train_cfg["label_smoothing"]
    assert list(config.empty_labels) == train_cfg["head_empty_cls"]
    assert config.loss_weight == train_cfg["loss_weight"]
    assert config.center_sample == train_cfg["center_sample"]
    assert config.path_pdrop == (train_cfg["droppath"] if kwargs["backbone_type"] == "convTransformer" else 0)
    assert config.num_labels == 5
    assert config.mask_conv_inputs is False
    stored = json.loads((converted(name) / "preprocessor_config.json").read_text())
    wanted = {key: value for key, value in test_cfg.items() if key != "ext_score_file"}
    wanted |= {"fps": 25, "feature_stride": 4, "num_frames": 16, "feature_size": 6, "min_length": 64}
    assert {key: stored[key] for key in wanted} == wanted


@pytest.mark.parametrize("name", DETECTORS)
def test_round_trip(name, converted, tmp_path):
    golden = load_goldens("detectors")[name]
    load_detector(converted(name)).save_pretrained(tmp_path / "again")
    actionformer.reverse(tmp_path / "again", tmp_path / "back.pth.tar")
    checkpoint = torch.load(tmp_path / "back.pth.tar", weights_only=True)
    for key in ("state_dict", "state_dict_ema"):
        assert_same_state(checkpoint[key], {f"module.{key}": tensor for key, tensor in golden["state"].items()})
    assert_same_state(read_state(tmp_path / "back.pth.tar"), golden["state"])


def test_detectors_cover_the_settings():
    settings = [golden["kwargs"] | golden["kwargs"]["train_cfg"] for golden in load_goldens("detectors").values()]
    for field, value in {
        "backbone_type": "conv",
        "fpn_type": "fpn",
        "scale_factor": 4,
        "fpn_start_level": 1,
        "embd_with_ln": False,
        "fpn_with_ln": False,
        "head_with_ln": False,
        "head_num_layers": 2,
        "head_kernel_size": 5,
        "use_abs_pe": True,
        "use_rel_pe": True,
        "n_mha_win_size": [9, 5, -1, -1],
        "input_dim": [4, 2],
        "droppath": 0.0,
        "label_smoothing": 0.1,
        "center_sample": "none",
        "head_empty_cls": [1, 3],
    }.items():
        assert any(one[field] == value for one in settings), field
    variants = {name for golden in load_goldens("detectors").values() for name in golden["train"]}
    assert variants == {
        "default",
        "label_smoothing_0.1",
        "loss_weight_auto",
        "center_sample_none",
        "second_sample_no_gt",
        "no_gt_at_all",
    }


# --- A checkpoint of v1's training script ---------------------------------------------------------------------------------


EPOCH = FIXTURES / "epoch_001.pth.tar"
ANNOTATIONS = FIXTURES / "epoch_001.annotations.json"


def state_of_epoch(key):
    checkpoint = torch.load(EPOCH, weights_only=True)
    return {name.removeprefix("module."): tensor for name, tensor in checkpoint[key].items()}


@pytest.mark.parametrize("config", ["epoch_001.yaml", "epoch_001.config.txt"])
def test_epoch_gives_the_official_outputs(config, tmp_path):
    actionformer.convert(EPOCH, tmp_path / "model", FIXTURES / config, annotations=ANNOTATIONS)
    model = load_detector(tmp_path / "model").eval()
    feature_extractor = ConvTransformerFeatureExtractor.from_pretrained(tmp_path / "model")
    assert model.config.id2label == {0: "c0", 1: "c1", 2: "c2"}
    assert model.config.label2id == {"c0": 0, "c1": 1, "c2": 2}
    assert (feature_extractor.fps, feature_extractor.feature_stride, feature_extractor.num_frames) == (25, 4, 16)
    assert (feature_extractor.min_length, feature_extractor.pad_to_multiple_of) == (64, 64)

    videos = json.loads((FIXTURES / "epoch_001.expected.json").read_text())["videos"]
    tensors = load_file(FIXTURES / "epoch_001.expected.safetensors")
    assert [video["video_id"] for video in videos] == ["vid4", "vid5"]
    for video in videos:
        expected = {k.split("/")[1]: v for k, v in tensors.items() if k.startswith(video["video_id"])}
        np.save(tmp_path / "features.npy", expected["feats"].T.numpy())  # as v1 has them on disk
        geometry = {"duration": video["duration"]}
        inputs = feature_extractor(tmp_path / "features.npy", geometry=geometry)
        with torch.no_grad():
            outputs = model(**inputs)
        logits, offsets = (
            torch.cat([expected[f"{key}{level}"].transpose(1, 2) for level in range(4)], dim=1)
            for key in ("cls_logits", "offsets")
        )
        torch.testing.assert_close(outputs.logits, logits, **CLOSE)
        points, strides, _ = model._make_points([expected[f"offsets{level}"].shape[2] for level in range(4)], "cpu")
        found = (outputs.pred_segments[0] - points[:, None]) * torch.tensor([-1.0, 1.0]) / strides[:, None]
        torch.testing.assert_close(found, offsets[0], **CLOSE)
        segments = feature_extractor.post_process_temporal_action_localization(outputs, geometry=geometry)[0]
        assert len(segments["scores"]) == video["n"]
        for key in ("scores", "segments"):
            torch.testing.assert_close(segments[key], expected[key], **CLOSE)
        assert segments["labels"].tolist() == expected["labels"].tolist()


@pytest.mark.parametrize(("weights", "key"), [("ema", "state_dict_ema"), ("raw", "state_dict")])
def test_epoch_weights(weights, key, tmp_path):
    actionformer.convert(
        EPOCH, tmp_path / "model", FIXTURES / "epoch_001.yaml", weights=weights, annotations=ANNOTATIONS
    )
    actionformer.reverse(tmp_path / "model", tmp_path / "back.pth.tar")
    assert_same_state(read_state(tmp_path / "back.pth.tar"), state_of_epoch(key))
    assert not torch.equal(
        *(state_of_epoch(k)["cls_head.cls_head.conv.bias"] for k in ("state_dict", "state_dict_ema"))
    )


@pytest.mark.parametrize("kind", ["bare", "module.", "only raw", "model", "safetensors", "legacy"])
def test_other_wrappings(kind, tmp_path):
    """A bare state dict, with and without the prefix; a wrapper without moving average; other containers."""
    state = state_of_epoch("state_dict")
    source = tmp_path / "v1.pth"
    if kind == "safetensors":
        source = tmp_path / "v1.safetensors"
        save_file(state, source)
    elif kind == "legacy":
        torch.save(state, source, _use_new_zipfile_serialization=False)
    else:
        prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
        content = {
            "bare": state,
            "module.": prefixed,
            "only raw": {"epoch": 3, "state_dict": prefixed},
            "model": {"model": state},
        }
        torch.save(content[kind], source)
    model = actionformer.convert(source, tmp_path / "model", FIXTURES / "epoch_001.yaml", fps=25)
    mapped, _, _ = map_names(state, actionformer.RULES)
    found = load_detector(tmp_path / "model").state_dict()
    found.pop("criterion.loss_normalizer")
    assert_same_state(found, mapped)
    assert not model.training


def test_half_precision_stays(tmp_path):
    state = {name: tensor.half() for name, tensor in state_of_epoch("state_dict").items()}
    torch.save(state, tmp_path / "v1.pth")
    actionformer.convert(tmp_path / "v1.pth", tmp_path / "model", FIXTURES / "epoch_001.yaml", fps=25)
    actionformer.reverse(tmp_path / "model", tmp_path / "back.pth")
    assert_same_state(read_state(tmp_path / "back.pth"), state)


# --- What the config and the annotations say ------------------------------------------------------------------------------


def write_recipe(path, **sections):
    """The recipe of epoch_001 with some keys replaced."""
    recipe = yaml.safe_load((FIXTURES / "epoch_001.yaml").read_text())
    for section, values in sections.items():
        recipe.setdefault(section, {}).update(values)
    path.write_text(yaml.safe_dump(recipe))
    return path


def fps_of(folder):
    return json.loads((folder / "preprocessor_config.json").read_text())["fps"]


def write_annotations(path, labels, fps):
    annotations = [{"segment": [0.0, 1.0], "label": label, "label_id": index} for index, label in enumerate(labels)]
    database = {
        f"v{index}": {"subset": "test", "duration": 9.0, "annotations": annotations} | ({"fps": rate} if rate else {})
        for index, rate in enumerate(fps)
    }
    path.write_text(json.dumps({"database": database}))
    return path


@pytest.mark.parametrize(
    ("default_fps", "annotated", "given", "expected"),
    [
        (None, [25.0, 25.0], None, 25),
        (15, [25.0, 25.0], None, 15),  # as in v1: the config goes before the annotations
        (15, [25.0, 25.0], 10.0, 10),
        (None, [25.0, 25.0], 10.0, 10),
        (None, None, 10.0, 10),
        (15, None, None, 15),
    ],
)
def test_frame_rate(default_fps, annotated, given, expected, tmp_path, recwarn):
    config = write_recipe(tmp_path / "v1.yaml", dataset={"default_fps": default_fps})
    annotations = None
    if annotated:
        annotations = write_annotations(tmp_path / "annotations.json", ["c0", "c1", "c2"], annotated)
    actionformer.convert(EPOCH, tmp_path / "model", config, annotations=annotations, fps=given)
    assert fps_of(tmp_path / "model") == expected
    assert not [str(warning.message) for warning in recwarn if "frame rate" in str(warning.message)]


@pytest.mark.parametrize(
    ("annotated", "reason"), [(None, "not given"), ([25.0, 30.0], "2 different ones"), ([None], "say none")]
)
def test_unknown_frame_rate_is_said(annotated, reason, tmp_path):
    annotations = None
    if annotated:
        annotations = write_annotations(tmp_path / "annotations.json", ["c0", "c1", "c2"], annotated)
    with pytest.warns(UserWarning, match=f"frame rate.*{reason}.*30 frames"):
        actionformer.convert(EPOCH, tmp_path / "model", FIXTURES / "epoch_001.yaml", annotations=annotations)
    assert fps_of(tmp_path / "model") == 30


def test_classes_without_data_get_names(tmp_path):
    annotations = write_annotations(tmp_path / "annotations.json", ["c0", "c1"], [25.0])
    model = actionformer.convert(EPOCH, tmp_path / "model", FIXTURES / "epoch_001.yaml", annotations=annotations)
    assert model.config.id2label == {0: "c0", 1: "c1", 2: "LABEL_2"}


def test_class_agnostic_model_has_one_name(tmp_path):
    """v1's ActivityNet models score proposals: one class, whatever the annotations say."""
    state = state_of_epoch("state_dict_ema")
    for kind in ("weight", "bias"):
        state[f"cls_head.cls_head.conv.{kind}"] = state[f"cls_head.cls_head.conv.{kind}"][:1]
    torch.save(state, tmp_path / "v1.pth")
    config = write_recipe(tmp_path / "v1.yaml", dataset={"num_classes": 1})
    model = actionformer.convert(tmp_path / "v1.pth", tmp_path / "model", config, annotations=ANNOTATIONS)
    assert model.config.id2label == {0: "action"}


def test_resized_recordings_are_said(tmp_path):
    config = write_recipe(tmp_path / "v1.yaml", dataset={"force_upsampling": True, "default_fps": 25})
    with pytest.warns(UserWarning, match="stretches every recording.* to 64 features.*resize_to=64"):
        actionformer.convert(EPOCH, tmp_path / "model", config)


def test_conv_backbone_has_no_positions(tmp_path):
    """v1's backbone without attention ignores use_abs_pe, use_rel_pe and droppath."""
    golden = load_goldens("detectors")["conv"]
    source, _ = write_source(tmp_path, golden)
    recipe = v1_recipe(golden["kwargs"], default_fps=25)
    recipe["model"] |= {"use_abs_pe": True, "use_rel_pe": True}
    (tmp_path / "v1.yaml").write_text(yaml.safe_dump(recipe))
    model = actionformer.convert(source, tmp_path / "model", tmp_path / "v1.yaml").eval()
    features = golden["tensors"]["short/feats"].T
    with torch.no_grad():
        logits = model(**ConvTransformerFeatureExtractor.from_pretrained(tmp_path / "model")(features)).logits
    wanted = torch.cat([golden["tensors"][f"short/cls_logits{level}"].transpose(1, 2) for level in range(4)], dim=1)
    torch.testing.assert_close(logits, wanted, **CLOSE)


@pytest.mark.parametrize("windows", [-1, 1, [-1, -1, -1, -1]])
def test_relative_positions_of_global_attention_are_ignored(windows, tmp_path):
    """v1 has a relative bias inside windows only: with global attention, use_rel_pe says nothing."""
    golden = load_goldens("detectors")["global_fpn"]
    source, _ = write_source(tmp_path, golden)
    recipe = v1_recipe(golden["kwargs"], default_fps=25)
    recipe["model"] |= {"use_rel_pe": True, "n_mha_win_size": windows}
    (tmp_path / "v1.yaml").write_text(yaml.safe_dump(recipe))
    model = actionformer.convert(source, tmp_path / "model", tmp_path / "v1.yaml")
    assert model.config.use_rel_pe is False


@pytest.mark.parametrize(("windows", "expected"), [(8, 9), (9, 9), ([8, 4, -1, 1], [9, 5, -1, 1])])
def test_even_windows(windows, expected, tmp_path):
    """v1's window reaches `window // 2` steps to either side, so that 8 is the same as 9."""
    config = write_recipe(tmp_path / "v1.yaml", model={"n_mha_win_size": windows}, dataset={"default_fps": 25})
    model = actionformer.convert(EPOCH, tmp_path / "model", config)
    assert model.config.mha_win_size == expected


@pytest.mark.parametrize(
    ("strides", "windows", "multiple"),
    [((2, 0, [1, 1, 3]), 9, 64), ((2, 0, [1, 1, 3]), -1, 8), ((2, 0, [2, 2, 5]), 19, 576), ((4, 0, [1, 1, 2]), [9, 5, -1], 16),
     ((2, 1, [1, 1, 3]), [9, 9, 5, -1], 32)],
)  # fmt: skip
def test_padding_multiple(strides, windows, multiple):
    """v1's `max_div_factor`: by hand, stride * (window // 2) * 2 at the level where it is largest."""
    scale_factor, start, arch = strides
    config = ConvTransformerConfig(scale_factor=scale_factor, fpn_start_level=start, arch=arch, mha_win_size=windows)
    assert actionformer.padding_multiple(config) == multiple


# --- Whole models of v1's release ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", json.loads((FIXTURES / "state_dicts.json").read_text()))
def test_every_tensor_of_the_release_has_its_place(name, tmp_path):
    published = json.loads((FIXTURES / "state_dicts.json").read_text())[name]
    # Without memory: the largest has 134 million parameters.
    state = {key: torch.empty(shape, device="meta") for key, shape in published["keys"].items()}
    mapped, dropped, unknown = map_names(state, actionformer.RULES)
    assert dropped == unknown == []
    (tmp_path / "v1.yaml").write_text(yaml.safe_dump(v1_recipe(published["config"], default_fps=30)))
    config = actionformer._make_config(tmp_path / "v1.yaml", mapped, None)
    with torch.device("meta"):
        model = ConvTransformerForTemporalActionLocalization(config)
    own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert own.pop("criterion.loss_normalizer") == ()
    assert {key: tuple(tensor.shape) for key, tensor in mapped.items()} == own
    parameters = sum(tensor.numel() for tensor in mapped.values())
    assert parameters == sum(math.prod(shape) for shape in published["keys"].values()) == published["n_params"]
    back, extra = unmap_names(mapped, actionformer.RULES)
    assert extra == []
    assert {key: list(tensor.shape) for key, tensor in back.items()} == published["keys"]


# --- What does not convert ------------------------------------------------------------------------------------------------


def broken_epoch(tmp_path, change):
    state = state_of_epoch("state_dict_ema")
    change(state)
    torch.save(state, tmp_path / "v1.pth")
    return tmp_path / "v1.pth"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("cls_head.norm.0.bias"), "class_head.norms.0.bias is missing"),
        (lambda state: state.pop("reg_head.scale.1.scale"), "segment_head.scale .* levels 0, 2, 3"),
        (lambda state: state.pop("reg_head.scale.3.scale"), r"segment_head.scale is \(3,\) instead of \(4,\)"),
        (lambda state: state.update({"reg_head.scale.0.scale": torch.ones(2)}), r"segment_head.scale .* shapes \[\(\), \(2,\)\]"),
        (lambda state: state.update({"cls_head.cls_head.conv.bias": torch.ones(4)}), r"output.bias is \(4,\) instead of \(3,\)"),
        (lambda state: state.update({"cls_head.norm.0.bias": torch.ones(12)[:, None, None]}), r"norms.0.bias is \(12, 1, 1\)"),
        (lambda state: state.update({"neck.fpn_norms.0.bias": torch.ones(2, 6, 1)}), r"norms.0.bias is \(2, 6, 1\)"),
        (lambda state: state.update({"backbone.stem.0.mlp.0.weight": torch.ones(48, 12, 3)}), r"is \(48, 12, 3\) instead of \(48, 12\)"),
        (lambda state: state.update({"neck.fpn_norms.4.bias": torch.ones(1, 12, 1)}), "neck.norms.4.bias is too much"),
        (lambda state: state.update({"backbone.stem.0.attn.rel_pe": torch.ones(1, 1, 2, 9)}), "relative_bias is too much"),
        (lambda state: state.update({"neck.gate.weight": torch.ones(3)}), "--allow-unused leaves them out.*: neck.gate.weight"),
        (lambda state: state.update({"cls_head.norm.0.bias": torch.ones(1, 12, 1, dtype=torch.long)}), "types torch.float32, torch.int64"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(change, message, tmp_path):
    source = broken_epoch(tmp_path, change)
    with pytest.raises(ConversionError, match=message) as error:
        actionformer.convert(source, tmp_path / "model", FIXTURES / "epoch_001.yaml", fps=25)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v1.pth"]


def test_unknown_tensors_are_left_out_on_request(tmp_path):
    source = broken_epoch(tmp_path, lambda state: state.update({"neck.gate.weight": torch.ones(3)}))
    with pytest.warns(UserWarning, match=r"left out.*neck\.gate\.weight"):
        model = actionformer.convert(
            source, tmp_path / "model", FIXTURES / "epoch_001.yaml", fps=25, allow_unused=True
        )
    assert_same_state(
        {name: tensor for name, tensor in model.state_dict().items() if name != "criterion.loss_normalizer"},
        map_names(state_of_epoch("state_dict_ema"), actionformer.RULES)[0],
    )


def test_computed_tensors_are_dropped(tmp_path):
    """Position tables and points, which other versions of v1's code may save."""
    computed = {"backbone.pos_embd": torch.ones(1, 12, 64), "point_generator.buffer_points.0": torch.ones(64, 4)}
    assert map_names(computed, actionformer.RULES) == ({}, list(computed), [])
    source = broken_epoch(tmp_path, lambda state: state.update(computed))
    actionformer.convert(source, tmp_path / "model", FIXTURES / "epoch_001.yaml", fps=25)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"embd_dim": 24, "fpn_dim": 24}}, r"model: model.embedding.convs.0.weight is \(12, 16, 3\) instead of \(24, 16, 3\)"),
        ({"model": {"backbone_arch": [1, 2, 3]}}, "model.stem.1.attn.* is missing"),
        ({"model": {"fpn_type": "fpn"}}, "neck.laterals.0.weight is missing"),
        ({"model": {"use_rel_pe": True}}, "relative_bias is missing"),
        ({"dataset": {"num_classes": 20}}, r"class_head.output.bias is \(3,\) instead of \(20,\)"),
        ({"dataset": {"input_dim": 99}}, r"\(12, 16, 3\) instead of \(12, 99, 3\)"),
        ({"model": {"n_head": 5}}, "n_embd 12 is not divisible by n_head 5"),
        ({"model": {"embd_dim": "wide"}}, "n_embd"),
        ({"model": {"embedding_dim": 24}}, "unknown keys in `model`: embedding_dim"),
        ({"model": {"embd_dim": 60000, "fpn_dim": 60000, "head_dim": 60000}}, "parameters; expected at most"),
        ({"model": {"embd_dim": 12000, "fpn_dim": 12000, "head_dim": 12000, "n_head": 4}}, "instead of"),  # without its 50 GB
        ({"test_cfg": {"nms_method": "magic"}}, "nms_method is 'magic'"),
        ({"dataset": {"feat_stride": -1}}, "feature_stride is -1"),
    ],
)  # fmt: skip
def test_config_of_another_model(sections, message, tmp_path):
    config = write_recipe(tmp_path / "v1.yaml", **sections)
    with pytest.raises(ConversionError, match=message) as error:
        actionformer.convert(EPOCH, tmp_path / "model", config, fps=25)
    assert "\n" not in str(error.value)
    assert str(error.value).count(str(config)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v1.yaml"]


def test_annotations_of_another_dataset(tmp_path):
    annotations = write_annotations(tmp_path / "annotations.json", ["c0", "c1", "c2", "c3"], [25.0])
    with pytest.raises(ConversionError, match="num_classes is 3, but the annotations name 4 classes"):
        actionformer.convert(EPOCH, tmp_path / "model", FIXTURES / "epoch_001.yaml", annotations=annotations)


@pytest.mark.parametrize("fps", [0.0, -25.0, math.nan, math.inf])
def test_impossible_frame_rate(fps, tmp_path):
    with pytest.raises(ConversionError, match="--fps is"):
        actionformer.convert(EPOCH, tmp_path / "model", FIXTURES / "epoch_001.yaml", fps=fps)


# --- Back to v1 ----------------------------------------------------------------------------------------------------------


V1_LIKE = {
    "n_in": 6,
    "n_embd": 16,
    "arch": (1, 1, 3),
    "max_len": 32,
    "use_rope": False,
    "use_swiglu": False,
    "use_rms_norm": False,
    "mask_conv_inputs": False,
}


def save_model(folder, **fields):
    ConvTransformerForTemporalActionLocalization(ConvTransformerConfig(**{**V1_LIKE, **fields})).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use_rope": True}, "RoPE"),
        ({"use_swiglu": True}, "SwiGLU"),
        ({"use_rms_norm": True}, "RMSNorm"),
        ({"use_batch_norm": True}, "batch norm"),
        ({"n_kv_head": 2}, "fewer key/value heads"),
        ({"is_causal": True}, "is_causal"),
        ({"use_learned_pe": True}, "learned positions"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-06"),
        ({"backbone_type": "conv", "use_abs_pe": True, "path_pdrop": 0}, "positions without attention"),
        ({"use_rel_pe": True}, "a relative bias in global attention"),
        ({"mha_win_size": 3}, "a window of 3"),
        ({"mha_win_size": 7}, r"max_len 32, .* \(6\)"),
        ({"mask_conv_inputs": True}, "mask_conv_inputs=False"),
        ({"use_rope": True, "use_swiglu": True}, "RoPE; SwiGLU"),
    ],
)
def test_reverse_refuses_what_v1_lacks(fields, reason, tmp_path):
    save_model(tmp_path / "model", **fields)
    with pytest.raises(ConversionError, match=f"v1 does not have: .*{reason}") as error:
        actionformer.reverse(tmp_path / "model", tmp_path / "back.pth")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mha_win_size": 5, "use_rel_pe": True, "use_abs_pe": True},
        {"mha_win_size": [5, 5, -1, -1], "use_rel_pe": True, "rel_pe_max_distance": 0},
        {"n_kv_head": 4, "n_in": [4, 2]},
        {"backbone_type": "conv", "path_pdrop": 0, "use_rope": True, "use_swiglu": True},  # no attention, no matter
    ],
)
def test_a_model_of_ours_goes_to_v1_and_comes_back(fields, tmp_path):
    save_model(tmp_path / "model", **fields)
    actionformer.reverse(tmp_path / "model", tmp_path / "v1.pth")
    mapped, dropped, unknown = map_names(read_state(tmp_path / "v1.pth"), actionformer.RULES)
    assert dropped == unknown == []
    expected = load_detector(tmp_path / "model").state_dict()
    expected.pop("criterion.loss_normalizer")
    assert_same_state(mapped, expected)


def test_reverse_needs_a_whole_detector(tmp_path):
    ConvTransformerModel(ConvTransformerConfig(**V1_LIKE)).save_pretrained(tmp_path / "backbone")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    save_model(tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for folder, message in {
        "backbone": "does not hold the detector",
        "other": "model_type is 'bert'",
        "damaged": "no folder of ours",
        "missing": "has no config.json",
    }.items():
        with pytest.raises(ConversionError, match=message) as error:
            actionformer.reverse(tmp_path / folder, tmp_path / "back.pth")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "back.pth").exists()


# --- The folder ----------------------------------------------------------------------------------------------------------


def test_model_card(tmp_path):
    folder = tmp_path / 'my "model"'
    actionformer.convert(EPOCH, folder, FIXTURES / "epoch_001.yaml", annotations=ANNOTATIONS)
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".py") == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    card = (folder / "README.md").read_text()
    _, front_matter, body = card.split("---\n", 2)
    assert yaml.safe_load(front_matter) == {
        "library_name": "transformers",
        "tags": ["temporal-action-localization", "convtransformer", "actionformer"],
    }
    assert body.startswith('\n# my "model"\n')
    assert "`epoch_001.pth.tar`" in body
    assert max(map(len, card.splitlines())) <= 125

    snippet = body.split("```python\n")[1].split("```")[0]
    name = json.dumps('my "model"')
    assert snippet.count(name) == 2
    tensors = load_file(FIXTURES / "epoch_001.expected.safetensors")
    scope = {"features": tensors["vid4/feats"].T.numpy(), "seconds": 9.6}
    exec(snippet.replace(name, repr(str(folder))), scope)
    torch.testing.assert_close(scope["segments"]["segments"], tensors["vid4/segments"], **CLOSE)
    torch.testing.assert_close(scope["segments"]["scores"], tensors["vid4/scores"], **CLOSE)

    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "c0", "1": "c1", "2": "c2"}
    assert config["architectures"] == ["ConvTransformerForTemporalActionLocalization"]
    assert config["model_type"] == "convtransformer"
    # config.txt and the YAML file say the same
    recorded = ast.literal_eval((FIXTURES / "epoch_001.config.txt").read_text())
    stored = json.loads((folder / "preprocessor_config.json").read_text())
    settings = {key: value for key, value in recorded["test_cfg"].items() if key != "ext_score_file"}
    assert len(settings) == 10
    assert {key: stored[key] for key in settings} == settings
