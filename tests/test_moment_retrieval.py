"""ConvTransformerForMomentRetrieval: queries, losses, the text encoder, embeddings for search.

What every model class must do is in test_conformance.py, attention to words under every backend in
test_attention_convtransformer.py.
"""

import math

import pytest
import torch
from test_modeling_convtransformer import CLOSE, make_config, randomize
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForZeroShotObjectDetection,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    T5Config,
)

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerForMomentRetrieval,
    ConvTransformerForTemporalActionLocalization,
    modeling_convtransformer,
)
from modeling_convtransformer.loss_convtransformer import sigmoid_focal_loss

Retrieval = ConvTransformerForMomentRetrieval

BERT = {
    "model_type": "bert",
    "vocab_size": 30,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 10,
}
ANSWERS = [
    [{"segments": [[1.0, 4.5], [3.0, 19.0]]}, {"segments": []}, {"segments": [[6.0, 12.0]]}],
    [{"segments": torch.tensor([[2.5, 8.0]])}, {"segments": []}],
]


def make(seed=0, **fields):
    torch.manual_seed(seed)
    fields = {"text_dim": 5, **fields} if "text_config" not in fields else fields
    return randomize(Retrieval(make_config(**fields)), seed).eval()


def batch_of(model, batch=2, length=21, queries=3, words=4):
    """Recordings of which the last is shorter, with one query less."""
    generator = torch.Generator().manual_seed(length)
    inputs = {"input_features": torch.randn(batch, length, 6, generator=generator)}
    inputs["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
    inputs["attention_mask"][-1, length // 2 + 2 :] = 0
    shape = (batch, queries, words)
    if model.text_encoder is None:
        inputs["query_embeds"] = torch.randn(*shape, model.config.text_width, generator=generator)
    else:
        inputs["query_input_ids"] = torch.randint(0, 30, shape, generator=generator)
    inputs["query_attention_mask"] = torch.ones(shape, dtype=torch.long)
    inputs["query_attention_mask"][0, 0, 2:] = 0
    inputs["query_attention_mask"][-1, -1] = 0
    return inputs


def run(model, **inputs):
    with torch.no_grad():
        return model(**inputs)


# --- Queries -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"decoder_layers": 2}, {"fpn_type": "fpn", "fpn_start_level": 1}], ids=str)
def test_many_queries_cost_the_recording_once_and_come_in_parts(fields, monkeypatch):
    model = make(**fields)
    inputs = batch_of(model, queries=7)
    calls = []
    model.model.register_forward_hook(lambda module, args, output: calls.append(module))
    model.decoder.time_blocks[0].register_forward_hook(lambda module, args, output: calls.append(module))
    levels = len(model.config.detector_strides)
    output = run(model, **inputs)
    assert calls == [model.model] + [model.decoder.time_blocks[0]] * levels
    for steps in (1, 100):  # one query at a time, and two
        monkeypatch.setattr(modeling_convtransformer, "_STEPS_AT_ONCE", steps)
        calls.clear()
        parts = run(model, **inputs)
        assert calls == [model.model] + [model.decoder.time_blocks[0]] * levels
        torch.testing.assert_close(parts.logits, output.logits, **CLOSE)
        torch.testing.assert_close(parts.pred_segments, output.pred_segments, **CLOSE)
    alone = run(model, **{**inputs, **{name: inputs[name][:, 2:3] for name in inputs if name.startswith("query")}})
    torch.testing.assert_close(alone.logits[:, 0], output.logits[:, 2], **CLOSE)


def test_another_query_gives_another_answer():
    model = make()
    inputs = batch_of(model)
    output = run(model, **inputs)
    inputs["query_embeds"][0, 1] += 1
    changed = run(model, **inputs)
    same = torch.ones(2, 3, dtype=torch.bool)
    same[0, 1] = False
    assert torch.equal(changed.logits[same], output.logits[same])
    assert (changed.logits[0, 1] - output.logits[0, 1]).abs().max() > 0.01
    # and words that are not there are not read
    inputs["query_embeds"][0, 0, 2:] = math.nan
    assert torch.equal(run(model, **inputs).logits[same], output.logits[same])


@pytest.mark.parametrize("fields", [{}, {"mha_win_size": 5}, {"fpn_type": "fpn"}, {"n_kv_head": 1}], ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_future_changes_nothing_before_it(fields, implementation):
    model = make(is_causal=True, decoder_layers=2, implementation=implementation, **fields)
    inputs = {name: value for name, value in batch_of(model, length=24).items() if name != "attention_mask"}
    inputs["query_attention_mask"][-1, -1] = 1
    output = run(model, **inputs)
    inputs["input_features"][:, 13:] += 3
    changed = run(model, **inputs)
    position = torch.cat([torch.arange(0, 24, stride) for stride in model.config.detector_strides])
    for name in ("logits", "pred_segments"):
        one, other = getattr(output, name), getattr(changed, name)
        # (kernels sum in an order that depends on what stands beside)
        torch.testing.assert_close(one[:, :, position < 13], other[:, :, position < 13], **CLOSE)
        assert (one[:, :, position >= 13] - other[:, :, position >= 13]).abs().max() > 0.01


def test_the_default_width_of_the_decoder():
    for n_embd, n_head, width in [(256, 4, 32), (128, 4, 16), (512, 8, 64), (16, 4, 8), (64, 8, 16)]:
        assert ConvTransformerConfig(n_embd=n_embd, n_head=n_head).decoder_width == width
    model = make(decoder_dim=12, use_rope=False)
    assert model.decoder.time_proj.out_features == model.decoder.class_head.output.in_channels == 12
    assert model.decoder.text_blocks[0].attn.q_proj.out_features == 12


# --- Losses ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection_dim", [None, 4])
def test_the_loss_is_that_of_a_detector_of_one_class_for_each_query(projection_dim):
    model = make(projection_dim=projection_dim, init_loss_norm=7)
    inputs = batch_of(model)
    output = run(model, **inputs, labels=ANSWERS)
    detector = ConvTransformerForTemporalActionLocalization(make_config(num_labels=1, init_loss_norm=7)).eval()
    mask = output.point_mask
    points, strides, levels = detector._make_points([21, 11, 6, 3], "cpu")
    parts = {"cls_loss": 0.0, "reg_loss": 0.0, "contrastive_loss": 0.0, "num_positives": 0.0}
    embeds = (
        model.get_segment_features(inputs["input_features"], inputs["attention_mask"]).embeds
        if projection_dim
        else None
    )
    words = {name: inputs[name] for name in ("query_embeds", "query_attention_mask")}
    for sample, own in enumerate(ANSWERS):
        for query, one in enumerate(own):
            segments = torch.as_tensor(one["segments"]).reshape(-1, 2).float()
            label = {"segments": segments, "class_labels": torch.zeros(len(segments), dtype=torch.long)}
            before = points - output.pred_segments[sample, query, :, 0]
            offsets = (
                torch.stack((before, output.pred_segments[sample, query, :, 1] - points), dim=-1) / strides[:, None]
            )
            arguments = (mask[[sample]].bool(), points, strides, detector._make_ranges(levels), [label])
            logits = output.logits[sample, query][None, :, None]
            _, losses = detector.criterion(logits, offsets[None], *arguments)
            for name in ("cls_loss", "reg_loss", "num_positives"):
                parts[name] += losses[name].item()
            if projection_dim:
                targets = detector.criterion._assign(*arguments)[0][0, :, 0]
                text = model.get_text_features(**words)[sample, query]
                match = model.match.scale * (embeds[sample] @ text) + model.match.bias
                loss = sigmoid_focal_loss(match, targets)[mask[sample] == 1].sum() / 7
                parts["contrastive_loss"] += loss.item()
    assert parts["num_positives"] > 5
    if not projection_dim:
        del parts["contrastive_loss"]
    for name, value in parts.items():  # float32 sums of a hundred terms in another order
        assert output.loss_dict[name].item() == pytest.approx(value, rel=1e-5), name
    assert output.loss.item() == pytest.approx(sum(parts.values()) - parts["num_positives"], rel=1e-5)


def test_queries_without_an_answer_teach_that_there_is_none():
    model = make()
    inputs = batch_of(model)
    nothing = [[{"segments": []}] * 3, [{"segments": torch.zeros(0, 2)}] * 2]
    output = model.train()(**inputs, labels=nothing)
    assert output.loss_dict["num_positives"] == output.loss_dict["reg_loss"] == 0
    output.loss.backward()
    gradient = model.decoder.class_head.output.bias.grad
    assert gradient > 0  # scores go down
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_query_that_is_padding_teaches_nothing():
    model = make(projection_dim=4)
    inputs = batch_of(model)
    loss = run(model, **inputs, labels=ANSWERS).loss
    longer = [ANSWERS[0], [*ANSWERS[1], {"segments": []}]]  # an entry for the padding is as good as none
    inputs["query_embeds"][-1, -1] = 100.0
    assert run(model, **inputs, labels=longer).loss == loss


@pytest.mark.parametrize("projection_dim", [None, 4])
def test_all_parts_learn(projection_dim):
    """(What a process of DDP does not use, it waits for.)"""
    model = make(projection_dim=projection_dim, text_config=BERT).train()
    model(**batch_of(model), labels=ANSWERS).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("text_encoder."):
            assert parameter.grad is None
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_labels_go_to_queries_wherever_padding_is():
    model = make()
    inputs = batch_of(model)
    inputs["query_attention_mask"][-1] = torch.tensor([[0] * 4, [1] * 4, [1] * 4])
    answer, nothing = {"segments": [[2.5, 8.0]]}, {"segments": []}
    own, every = ([ANSWERS[0], [answer, nothing]], [ANSWERS[0], [nothing, answer, nothing]])
    losses = [run(model, **inputs, labels=labels).loss for labels in (own, every)]
    assert losses[0] == losses[1]
    assert losses[0] != run(model, **inputs, labels=[ANSWERS[0], [nothing, answer]]).loss


@pytest.mark.parametrize("layers", [1, 2])
def test_batch_norm_does_not_count_queries_that_are_padding(layers):
    fields = {"use_batch_norm": True, "use_rms_norm": False, "decoder_layers": layers, "path_pdrop": 0}
    inputs = batch_of(make(), batch=1, queries=1)
    more = {**inputs, "query_embeds": torch.cat((inputs["query_embeds"], torch.randn(1, 3, 4, 5)), dim=1)}
    inputs["query_attention_mask"][:] = 1
    more["query_attention_mask"] = torch.cat(
        (inputs["query_attention_mask"], torch.zeros(1, 3, 4, dtype=torch.long)), 1
    )
    buffers = []
    for one in (inputs, more):
        model = make(**fields).train()
        output = model(**one)
        buffers.append({name: value for name, value in model.named_buffers() if "running" in name})
        buffers[-1]["logits"] = output.logits[:, :1].detach()
    for name, value in buffers[0].items():
        torch.testing.assert_close(buffers[1][name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_it_learns_what_words_mean():
    """Two kinds of bumps, two words: after a short training each word finds its own bump in new recordings."""
    torch.manual_seed(0)
    model = Retrieval(make_config(text_dim=5, projection_dim=8, n_embd=32, init_loss_norm=20, path_pdrop=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    words = torch.randn(2, 1, 5)

    def draw(generator, count=8):
        features, answers = torch.randn(count, 48, 6, generator=generator) * 0.3, []
        for sample in features:
            order = torch.randperm(2, generator=generator).tolist()
            segments = [None, None]
            for place, kind in enumerate(order):
                start = int(torch.randint(2, 10, (), generator=generator)) + 24 * place
                end = start + int(torch.randint(6, 12, (), generator=generator))
                sample[start : end + 1, 3 * kind : 3 * kind + 3] += 2
                segments[kind] = {"segments": [[float(start), float(end)]]}
            answers.append(segments)
        return {"input_features": features, "query_embeds": words[None].expand(count, -1, -1, -1)}, answers

    generator = torch.Generator().manual_seed(1)
    for _ in range(120):
        inputs, answers = draw(generator)
        loss = model.train()(**inputs, labels=answers).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inputs, answers = draw(generator, 20)
    output = run(model.eval(), **inputs)
    best = output.pred_segments.take_along_dim(output.logits.argmax(-1)[..., None, None], dim=2)[:, :, 0]
    truth = torch.tensor([[one["segments"][0] for one in own] for own in answers])
    overlap = (torch.minimum(best[..., 1], truth[..., 1]) - torch.maximum(best[..., 0], truth[..., 0])).clamp(min=0)
    union = torch.maximum(best[..., 1], truth[..., 1]) - torch.minimum(best[..., 0], truth[..., 0])
    assert (overlap / union > 0.5).float().mean() > 0.9
    # and so does the contrastive head, without having read the words
    scores = model.match_scores(
        model.get_text_features(inputs["query_embeds"]), model.get_segment_features(inputs["input_features"]).embeds
    )
    position = torch.cat([torch.arange(0, 48, stride) for stride in model.config.detector_strides])
    found = position[scores.argmax(-1)]
    assert ((found >= truth[..., 0] - 2) & (found <= truth[..., 1] + 2)).float().mean() > 0.9


def test_starts_and_ends_can_learn_from_the_first_step():
    """A narrow head whose last ReLU lets nothing through would never learn. From a bias of 0, two of these twenty models have a
    side that does so at every point, and ten at more than seven of ten points."""
    torch.manual_seed(0)
    inputs = {"input_features": torch.randn(2, 40, 6), "query_embeds": torch.randn(2, 3, 4, 5)}
    for seed in range(20):
        torch.manual_seed(seed)
        model = Retrieval(make_config(text_dim=5, decoder_dim=8)).eval()
        output = run(model, **inputs)
        steps = [math.ceil(40 / stride) for stride in model.config.detector_strides]
        places = [torch.arange(n) * stride for n, stride in zip(steps, model.config.detector_strides, strict=True)]
        distances = (output.pred_segments - torch.cat(places)[:, None]).abs()
        assert ((distances > 0).float().mean(dim=(0, 1, 2)) > 0.3).all(), seed


@pytest.mark.parametrize("projection_dim", [None, 4])
def test_logits_are_what_the_decoder_says_and_how_alike_point_and_query_are(projection_dim):
    model = make(projection_dim=projection_dim)
    inputs = batch_of(model)
    whole = run(model, **inputs).logits
    with torch.no_grad():
        scale = model.match.scale.item()
        model.match.scale.zero_()
        decoder = run(model, **inputs).logits
        model.match.scale.fill_(scale)
        pyramid = model.model(inputs["input_features"], inputs["attention_mask"])
        points = model._embed_points(model._apply_neck(pyramid, inputs["attention_mask"])[0])
    for sample, query, point in ((0, 0, 3), (1, 1, 7), (0, 2, 30)):
        words = inputs["query_embeds"][sample, query][inputs["query_attention_mask"][sample, query] == 1]
        with torch.no_grad():
            text = model.text_projection(words.mean(0))
        expected = decoder[sample, query, point] + scale * (text @ points[sample, point])
        torch.testing.assert_close(whole[sample, query, point], expected, **CLOSE)
    assert (whole - decoder).abs().max() > 0.1


# --- The text encoder --------------------------------------------------------------------------------------------------------------


def test_token_ids_are_read_by_the_text_encoder(tmp_path):
    torch.manual_seed(3)
    bert = BertModel(BertConfig(**{name: value for name, value in BERT.items() if name != "model_type"})).eval()
    bert.save_pretrained(tmp_path)
    model = Retrieval.from_text_pretrained(tmp_path, make_config()).eval()
    assert model.config.text_width == 12
    inputs = batch_of(model)
    ids, mask = inputs.pop("query_input_ids"), inputs["query_attention_mask"]
    with torch.no_grad():
        own = bert(ids[0], attention_mask=mask[0]).last_hidden_state
    encoded, valid = model.encode_queries(query_input_ids=ids, query_attention_mask=mask)
    assert torch.equal(valid, mask.bool())
    torch.testing.assert_close(encoded[0][valid[0]], own[valid[0]], **CLOSE)
    assert (encoded[~valid] == 0).all()
    one, other = run(model, **inputs, query_input_ids=ids), run(model, **inputs, query_embeds=encoded)
    assert torch.equal(one.logits, other.logits)


@pytest.mark.parametrize(
    "text_config",
    [
        BERT,
        BertConfig(**{name: value for name, value in BERT.items() if name != "model_type"}),
        T5Config(vocab_size=30, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2),
    ],
    ids=["dict", "bert", "t5"],
)
def test_a_model_with_its_text_encoder_goes_round(text_config, tmp_path):
    model = make(text_config=text_config, projection_dim=4)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is Retrieval
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded.config.text_config) is type(model.config.text_config)
    inputs = batch_of(model)
    assert torch.equal(run(loaded, **inputs).logits, run(model, **inputs).logits)
    for one in (model, loaded):
        assert not any(parameter.requires_grad for parameter in one.text_encoder.parameters())
        assert not one.train().text_encoder.training
        assert one.decoder.training


def test_a_text_encoder_that_learns(tmp_path):
    model = make(text_config={**BERT, "hidden_dropout_prob": 0.5}, freeze_text_encoder=False).train()
    assert model.text_encoder.training
    model(**batch_of(model), labels=ANSWERS).loss.backward()
    assert model.text_encoder.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    loaded = Retrieval.from_pretrained(tmp_path)
    assert next(loaded.text_encoder.parameters()).requires_grad


def test_what_learns_in_a_text_encoder_is_asked_of_its_parameters():
    """Thawed by hand, or by an adapter; what nothing reads never learns, or DDP would wait for it."""
    model = make(text_config=BERT)
    layer = model.text_encoder.encoder.layer[-1]
    layer.requires_grad_(True)
    assert model.train().text_encoder.training
    model(**batch_of(model), labels=ANSWERS).loss.backward()
    assert layer.output.dense.weight.grad.abs().sum() > 0
    whole = make(text_config=BERT, freeze_text_encoder=False).train()
    whole(**batch_of(whole), labels=ANSWERS).loss.backward()
    assert [name for name, one in whole.named_parameters() if one.requires_grad and one.grad is None] == []


def test_a_text_encoder_in_another_dtype_or_of_two_modalities(tmp_path):
    BertModel(
        BertConfig(**{name: value for name, value in BERT.items() if name != "model_type"})
    ).half().save_pretrained(tmp_path / "half")
    model = Retrieval.from_text_pretrained(tmp_path / "half", make_config(implementation="eager"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.text_encoder.config._attn_implementation == "eager"
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 30, "max_position_embeddings": 10}
    clip = CLIPConfig(text_config=text, vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=4)
    CLIPModel(clip).save_pretrained(tmp_path / "clip")
    assert Retrieval.from_text_pretrained(tmp_path / "clip", make_config()).config.text_width == 8
    with pytest.raises(ValueError, match=r"type 'clip', which has no hidden_size.*get_text_config"):
        make_config(text_config=clip)


def test_positions_that_begin_later():
    """RoBERTa's table has two more places than tokens may be."""
    config = {**BERT, "model_type": "roberta", "pad_token_id": 1}
    model = make(text_config=config)
    features = torch.randn(1, 9, 6)
    run(model, input_features=features, query_input_ids=torch.full((1, 1, 8), 5))
    with pytest.raises(ValueError, match="has 9 tokens, but the text encoder takes at most 8"):
        run(model, input_features=features, query_input_ids=torch.full((1, 1, 9), 5))


def test_another_text_encoder_at_load(tmp_path):
    make(text_config=BERT).save_pretrained(tmp_path)
    other = ConvTransformerConfig.from_pretrained(tmp_path, text_config={**BERT, "hidden_size": 16})
    assert other.text_config.hidden_size == other.text_width == 16


@pytest.mark.slow
def test_one_graph_serves_any_number_of_queries():
    model = make(arch=(1, 1, 1), head_num_layers=1)
    inputs = batch_of(model, length=40)
    dynamic = dict.fromkeys(range(2), torch.export.Dim.AUTO)
    shapes = {name: {**dynamic, 2: torch.export.Dim.AUTO} if "query" in name else dynamic for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False).module()
    for batch, length, queries, words in ((2, 40, 3, 4), (3, 33, 2, 5), (2, 25, 6, 3)):
        inputs = batch_of(model, batch, length, queries, words)
        torch.testing.assert_close(program(**inputs).logits, run(model, **inputs).logits, **CLOSE)


def test_a_detector_is_a_start(tmp_path):
    torch.manual_seed(0)
    detector = randomize(ConvTransformerForTemporalActionLocalization(make_config(fpn_type="fpn")))
    detector.save_pretrained(tmp_path)
    model = Retrieval.from_pretrained(tmp_path, text_dim=5)
    for name, tensor in [*detector.model.state_dict().items(), *detector.neck.state_dict().items()]:
        own = model.model if name in detector.model.state_dict() else model.neck
        assert torch.equal(own.state_dict()[name], tensor), name
    new = {"decoder", "match", "segment_projection", "text_projection"}
    assert {name.split(".")[0] for name in model.untrained_weights} == new


def test_backends_of_both_models(tmp_path):
    make(text_config=BERT).save_pretrained(tmp_path)
    model = Retrieval.from_pretrained(tmp_path, attn_implementation={"": "sdpa", "text_config": "eager"})
    assert model.config._attn_implementation == model.model.config._attn_implementation == "sdpa"
    assert model.text_encoder.config._attn_implementation == "eager"


# --- Embeddings for search ---------------------------------------------------------------------------------------------------------


def test_embeddings_of_points_and_queries():
    model = make(projection_dim=4)
    inputs = batch_of(model)
    padded = model.get_segment_features(inputs["input_features"], inputs["attention_mask"])
    output = run(model, **inputs)
    assert torch.equal(padded.point_mask, output.point_mask)
    assert torch.equal(padded.point_levels, output.point_levels)
    torch.testing.assert_close(padded.embeds.norm(dim=-1), torch.ones(2, 41), **CLOSE)
    alone = model.get_segment_features(inputs["input_features"][1:, :12])
    torch.testing.assert_close(padded.embeds[1, padded.point_mask[1] == 1], alone.embeds[0], **CLOSE)

    words = {name: inputs[name] for name in ("query_embeds", "query_attention_mask")}
    texts = model.get_text_features(**words)
    assert texts.shape == (2, 3, 4)
    torch.testing.assert_close(texts[0].norm(dim=-1), torch.ones(3), **CLOSE)
    torch.testing.assert_close(model.get_text_features(words["query_embeds"][:1, :1, :2])[0, 0], texts[0, 0], **CLOSE)
    cosine = F.cosine_similarity(texts[0, 1], padded.embeds[0, 5], dim=0)
    expected = model.match.scale * cosine + model.match.bias
    torch.testing.assert_close(model.match_scores(texts, padded.embeds)[0, 1, 5], expected[0], **CLOSE)


def test_without_a_contrastive_head_there_are_none():
    model = make()
    with pytest.raises(ValueError, match="projection_dim=128"):
        model.get_segment_features(torch.randn(1, 9, 6))
    with pytest.raises(ValueError, match="projection_dim=128"):
        model.get_text_features(torch.randn(1, 1, 2, 5))


# --- What it refuses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_embeds": None}, "Neither query_embeds nor query_input_ids"),
        ({"query_input_ids": torch.zeros(2, 3, 4, dtype=torch.long)}, "Both query_embeds and query_input_ids"),
        ({"query_embeds": torch.zeros(2, 0, 4, 5)}, r"shape \(2, 0, 4, 5\).*at least one query"),
        ({"query_embeds": torch.zeros(2, 3, 0, 5)}, "at least one word"),
        ({"query_embeds": torch.zeros(3, 4, 5)}, r"expected \(batch, queries, words, text width\)"),
        ({"query_embeds": torch.zeros(2, 3, 4, 7)}, "is 7 wide .* reads text of width 5"),
        (
            {"query_attention_mask": torch.ones(2, 3, 5)},
            r"query_attention_mask has shape \(2, 3, 5\); expected \(2, 3, 4\)",
        ),
        ({"query_embeds": torch.zeros(1, 3, 4, 5), "query_attention_mask": None}, "queries for 1 recordings, but 2"),
        ({"labels": ANSWERS[:1]}, "labels has 1 entries for a batch of 2"),
        ({"labels": [{"segments": []}, ANSWERS[1]]}, r"labels\[0\] is one dict for 3 queries"),
        ({"labels": [ANSWERS[0][:2], ANSWERS[1]]}, r"labels\[0\] is 2 entries for 3 queries"),
        (
            {"labels": [ANSWERS[0], [[1.0, 2.0], {"segments": []}]]},
            r"labels\[1\]\[0\] is \[1.0, 2.0\]; expected a dict",
        ),
        ({"labels": [ANSWERS[0], [{"segments": [[5.0, 2.0]]}] * 2]}, r"\[5.0, 2.0\]"),
    ],
)
def test_what_does_not_fit(change, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        run(model, **{**batch_of(model), **change})


def test_what_the_text_encoder_does_not_take():
    with pytest.raises(ValueError, match=r"has no text encoder .*query_embeds"):
        run(make(), input_features=torch.randn(1, 9, 6), query_input_ids=torch.zeros(1, 1, 2, dtype=torch.long))
    model = make(text_config=BERT)
    with pytest.raises(ValueError, match="has 11 tokens, but the text encoder takes at most 10"):
        run(model, input_features=torch.randn(1, 9, 6), query_input_ids=torch.zeros(1, 1, 11, dtype=torch.long))


def test_configs_that_contradict():
    with pytest.raises(ValueError, match=r"text_config=AutoConfig.*text_dim=384"):
        Retrieval(make_config())
    with pytest.raises(ValueError, match=r"decoder_dim is 10; expected a multiple of 8 .*: 8 would work"):
        make_config(decoder_dim=10)
    assert make_config(decoder_dim=12, use_rope=False).decoder_width == 12
    with pytest.raises(ValueError, match=r"text_dim is 5, but .* hidden_size 12"):
        make_config(text_dim=5, text_config=BERT)
    with pytest.raises(ValueError, match="model_type None"):
        make_config(text_config={"hidden_size": 12})
    with pytest.raises(ValueError, match="text_config has model_type 'nonsense'"):
        make_config(text_config={"model_type": "nonsense"})
    for field in ("text_dim", "decoder_dim", "decoder_layers", "projection_dim"):
        with pytest.raises(ValueError, match=f"{field} is 0"):
            make_config(**{field: 0})


def test_the_text_config_goes_round(tmp_path):
    config = make_config(text_config=BERT)
    assert config.text_width == 12
    config.save_pretrained(tmp_path)
    for other in (ConvTransformerConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(other.text_config, BertConfig)
        assert other.text_config.to_dict() == config.text_config.to_dict()
