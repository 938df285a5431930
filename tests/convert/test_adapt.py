"""A model of one configuration from the weights of another: every state that a tensor can end in, by numbers."""

import json

import pytest
import torch
from torch.nn import functional as F

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
)
from modeling_convtransformer.convert.adapt import adapt, find_configuration, retarget, target_config
from modeling_convtransformer.convert.checkpoint import ConversionError

V1 = {"use_rope": False, "use_swiglu": False, "use_rms_norm": False, "mask_conv_inputs": False}
SMALL = {"n_in": 6, "n_embd": 32, "n_head": 4, "arch": (1, 1, 2), "max_len": 32, "mha_win_size": 5}


def make(**changes):
    """A source with v1's settings whose tensors are all random."""
    torch.manual_seed(0)
    model = ConvTransformerForTemporalActionLocalization(ConvTransformerConfig(**{**SMALL, **V1, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def start(source, **changes):
    config = ConvTransformerConfig.from_dict({**source.config.to_dict(), **changes})
    model, report = adapt(source, config)
    return model.eval(), report


def states(report, part):
    return {entry["state"] for name, entry in report.items() if part in name}


def test_the_same_configuration_is_a_copy():
    source = make()
    model, report = start(source)
    theirs = source.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert list(report.shares()) == ["copied"]
    assert report.shares()["copied"]["share"] == 1.0


def test_shares_add_up_and_count_every_parameter():
    model, report = start(make(), use_rms_norm=True, use_swiglu=True, n_kv_head=1, use_rope=True)
    rows = report.shares().values()
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    assert sum(row["parameters"] for row in rows) == sum(tensor.numel() for tensor in model.state_dict().values())
    assert sum(row["tensors"] for row in rows) == len(model.state_dict())
    assert all(state.split(":")[0] in {"copied", "adapted", "initialised"} for state in report.shares())


def test_key_and_value_heads_are_averaged_in_groups():
    source = make()
    model, report = start(source, n_kv_head=2)
    theirs, ours = source.model.stem[0].attn.k_proj, model.model.stem[0].attn.k_proj
    for head, (first, second) in enumerate([(0, 1), (2, 3)]):
        for kind in ("weight", "bias"):
            whole = getattr(theirs, kind)
            mean = (whole[8 * first : 8 * first + 8] + whole[8 * second : 8 * second + 8]) / 2
            torch.testing.assert_close(getattr(ours, kind)[8 * head : 8 * head + 8], mean)
    assert torch.equal(model.model.stem[0].attn.q_proj.weight, source.model.stem[0].attn.q_proj.weight)
    assert states(report, "k_proj") == {"adapted"}


def test_equal_heads_survive_averaging_exactly():
    """Where all heads have the same keys and values, MQA is what MHA was."""
    source = make()
    with torch.no_grad():
        for block in [*source.model.stem, *source.model.branch]:
            for projection in (block.attn.k_proj, block.attn.v_proj):
                projection.weight.copy_(projection.weight[:8].repeat(4, 1))
                projection.bias.copy_(projection.bias[:8].repeat(4))
    model, _ = start(source, n_kv_head=1)
    features = torch.randn(1, 20, 6)
    with torch.no_grad():
        # float32, means of four equal numbers: rounding only
        torch.testing.assert_close(model(features).logits, source(features).logits, atol=1e-5, rtol=1e-5)


def test_gelu_mlp_becomes_nearly_the_same_swiglu():
    source = make()
    model, report = start(source, use_swiglu=True)
    theirs, ours = source.model.stem[0].mlp, model.model.stem[0].mlp
    assert len(ours.gate_proj.weight) == 128 == len(theirs.up_proj.weight)  # all hidden units find room here
    x = torch.randn(1, 200, 32)
    with torch.no_grad():
        hidden = theirs.up_proj(x)
        gated = F.silu(ours.gate_proj(x)) * ours.up_proj(x)
    # |gelu(u) - u sigmoid(1.702 u)| is at most 0.0203 for any u (Hendrycks and Gimpel, 2016)
    assert (gated - F.gelu(hidden)).abs().max() < 0.0204
    assert states(report, ".mlp.gate_proj") == {"adapted"}
    fresh = ConvTransformerForTemporalActionLocalization(model.config).eval()
    features = torch.randn(1, 20, 6)
    with torch.no_grad():
        wanted = source(features).logits
        assert (model(features).logits - wanted).abs().mean() < 0.1 * (fresh(features).logits - wanted).abs().mean()


def test_fewer_hidden_units_keep_the_ones_that_matter():
    source = make(n_embd=96, n_head=4)  # GELU: 384 hidden units, SwiGLU: 256
    mlp = source.model.stem[0].mlp
    with torch.no_grad():
        mlp.down_proj.weight[:, ::3] = 0  # a third of the units does nothing
    model, _ = start(source, use_swiglu=True)
    ours = model.model.stem[0].mlp
    assert len(ours.gate_proj.weight) == 256
    kept = [unit for unit in range(384) if unit % 3]
    assert torch.equal(ours.down_proj.weight, mlp.down_proj.weight[:, kept])
    torch.testing.assert_close(ours.gate_proj.weight, 1.702 * mlp.up_proj.weight[kept])


def test_more_hidden_units_have_no_say_at_first():
    source = make(n_embd=12, n_head=2)  # GELU: 48 hidden units, SwiGLU: 64
    model, _ = start(source, use_swiglu=True)
    mlp, ours = source.model.stem[0].mlp, model.model.stem[0].mlp
    assert torch.equal(ours.down_proj.weight[:, :48], mlp.down_proj.weight)
    assert not ours.down_proj.weight[:, 48:].any()
    assert ours.gate_proj.weight[48:].abs().min() > 0


def test_norm_gains_go_on_and_biases_go():
    source = make()
    model, report = start(source, use_rms_norm=True)
    assert torch.equal(model.model.stem[0].ln1.weight, source.model.stem[0].ln1.weight)
    assert "model.stem.0.ln1.bias" not in model.state_dict()
    assert states(report, ".ln1.") == {"adapted"}


def test_position_table_is_resampled():
    source = make(use_learned_pe=True)
    model, report = start(source, max_len=64)
    theirs, ours = source.model.embedding.positions.table, model.model.embedding.positions.table
    # linear, align_corners False: new step 1 stands at old position 0.25, step 2 at 0.75
    torch.testing.assert_close(ours[1], 0.75 * theirs[0] + 0.25 * theirs[1])
    torch.testing.assert_close(ours[2], 0.25 * theirs[0] + 0.75 * theirs[1])
    assert report["model.embedding.positions.table"]["how"] == "position table resampled"


def test_class_rows_are_matched_by_name():
    source = make(id2label={0: "run", 1: "jump", 2: "sit"}, label2id={"run": 0, "jump": 1, "sit": 2})
    labels = {0: "sit", 1: "crawl", 2: "run"}
    model, report = start(source, id2label=labels, label2id={name: i for i, name in labels.items()})
    theirs, ours = source.class_head.output, model.class_head.output
    assert torch.equal(ours.weight[0], theirs.weight[2])
    assert torch.equal(ours.weight[2], theirs.weight[0])
    assert not torch.equal(ours.weight[1], theirs.weight[1])
    assert torch.equal(ours.bias[[0, 2]], theirs.bias[[2, 0]])
    assert ours.bias[1].item() == pytest.approx(-4.59512, abs=1e-5)  # -log(0.99 / 0.01): a new class starts from 0.01
    assert report["class_head.output.weight"]["how"] == "2 of 3 classes by name"


def test_names_that_say_nothing_match_nothing():
    model, report = start(
        make(num_labels=3), id2label={0: "LABEL_0", 1: "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1}
    )
    assert states(report, "class_head.output") == {"initialised"}
    assert len(model.class_head.output.bias) == 2


def test_streams_in_common_are_carried_over():
    source = make(n_in=[6, 10, 4], stream_dims=[8, 16, 8])
    model, report = start(source, n_in=[6, 4], stream_dims=[8, 8])
    theirs, ours = source.model.embedding, model.model.embedding
    assert torch.equal(ours.streams[0].weight, theirs.streams[0].weight)
    assert torch.equal(ours.streams[1].weight, theirs.streams[2].weight)
    assert torch.equal(ours.convs[0].weight[:, :8], theirs.convs[0].weight[:, :8])
    assert torch.equal(ours.convs[0].weight[:, 8:], theirs.convs[0].weight[:, 24:])
    assert report["model.embedding.convs.0.weight"]["how"] == "2 of 2 streams"


def test_another_width_is_refused_or_reported():
    source = make()
    _, report = start(source, n_embd=64)
    assert states(report, ".attn.q_proj") == {"initialised"}
    assert report.shares()["initialised"]["share"] > 0.9


def test_configurations_by_name_and_by_path(tmp_path):
    assert find_configuration("balanced").name == "balanced.yaml"
    own = tmp_path / "own.yaml"
    own.write_text("model: {n_embd: 32}\n")
    assert find_configuration(str(own)) == own
    with pytest.raises(ConversionError, match=r"neither a file, nor one of .*balanced.*v1_compatible"):
        find_configuration("blanced")


def test_target_takes_the_data_from_the_source():
    labels = {0: "run", 1: "jump", 2: "sit"}
    source = make(id2label=labels, label2id={name: i for i, name in labels.items()}).config
    config = target_config(source, "balanced", n_embd=32, arch=[1, 1, 2])
    assert (config.n_in, config.max_len, config.id2label) == (6, 32, labels)
    assert (config.use_rope, config.use_swiglu, config.use_rms_norm, config.mask_conv_inputs) == (True,) * 4
    with pytest.raises(ConversionError, match="n_head"):
        target_config(source, "balanced", n_head=7)


def test_a_target_that_nothing_fits_says_so(tmp_path):
    make().save_pretrained(tmp_path / "source")
    ConvTransformerFeatureExtractor(6, 50, 25, 50).save_pretrained(tmp_path / "source")
    with pytest.warns(UserWarning, match="--set n_embd=32 --set n_head=4"):
        retarget(tmp_path / "source", tmp_path / "out", "balanced", "epoch.pth.tar", arch=[1, 1, 2])


def test_retarget_writes_a_folder_that_loads_with_its_report(tmp_path):
    source = make()
    source.save_pretrained(tmp_path / "source")
    ConvTransformerFeatureExtractor(6, 50, 25, 50, min_length=32, pad_to_multiple_of=8).save_pretrained(
        tmp_path / "source"
    )
    model, _ = retarget(
        tmp_path / "source", tmp_path / "out", "balanced", "epoch.pth.tar", n_embd=32, arch=[1, 1, 2], mha_win_size=5
    )
    again = ConvTransformerForTemporalActionLocalization.from_pretrained(tmp_path / "out")
    theirs = model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.state_dict().items())
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert set(report["tensors"]) == set(again.state_dict())
    assert report["tensors"]["model.stem.0.mlp.gate_proj.weight"]["how"] == "GELU MLP as SwiGLU"
    # the target masks its convolutions, so nothing needs v1's padding any more
    assert ConvTransformerFeatureExtractor.from_pretrained(tmp_path / "out").min_length is None
    assert "epoch.pth.tar" in (tmp_path / "out" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]  # nothing temporary is left
