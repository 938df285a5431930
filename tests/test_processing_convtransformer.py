"""The processor: recordings and questions in, moments in seconds out."""

import json

import numpy as np
import pytest
import torch
from test_modeling_convtransformer import make_config, randomize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoFeatureExtractor, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from modeling_convtransformer import (
    ConvTransformerFeatureExtractor,
    ConvTransformerForMomentRetrieval,
    ConvTransformerProcessor,
)

WORDS = ["[PAD]", "[UNK]", "turn", "the", "arm", "outward", "lift", "lean", "forward"]
BERT = {
    "model_type": "bert",
    "vocab_size": len(WORDS),
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 12,
}


def make_tokenizer(limit=12):
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=limit
    )


def make_processor(limit=12, **settings):
    settings = {"feature_size": 6, "fps": 10, "feature_stride": 5, "num_frames": 10, **settings}
    return ConvTransformerProcessor(ConvTransformerFeatureExtractor(**settings), make_tokenizer(limit))


def make_retrieval(seed=0, **fields):
    torch.manual_seed(seed)
    model = ConvTransformerForMomentRetrieval(make_config(**{"text_config": BERT, **fields}))
    randomize(model, seed)
    model.decoder.class_head.output.weight.data /= 5  # scores of 1.0 are all equal
    return model.eval()


def draw(*lengths):
    return [np.random.default_rng(length).normal(size=(length, 6)).astype(np.float32) for length in lengths]


def test_queries_of_each_recording():
    processor = make_processor()
    queries = [["turn the arm outward", "lift"], ["lean forward"]]
    annotations = [[[[1.0, 3.5], [6.0, 9.0]], []], [{"segments": np.array([[0.5, 2.0]])}]]
    batch = processor(draw(20, 11), queries, annotations)
    assert list(batch) == [*processor.model_input_names, "labels"]
    assert batch["query_input_ids"].tolist() == [[[2, 3, 4, 5], [6, 0, 0, 0]], [[7, 8, 0, 0], [0, 0, 0, 0]]]
    assert batch["query_attention_mask"].tolist() == [[[1, 1, 1, 1], [1, 0, 0, 0]], [[1, 1, 0, 0], [0, 0, 0, 0]]]
    assert batch["query_input_ids"].dtype == torch.long
    labels = batch["labels"]
    assert [len(own) for own in labels] == [2, 1]
    # grid = (seconds * 10 - 5) / 5
    assert labels[0][0]["segments"].tolist() == [[1.0, 6.0], [11.0, 17.0]]
    assert labels[0][1]["segments"].shape == (0, 2)
    assert labels[1][0]["segments"].tolist() == [[0.0, 3.0]]
    output = make_retrieval()(**batch)
    assert output.query_mask.tolist() == [[1, 1], [1, 0]]
    assert output.loss_dict["num_positives"] > 0


def test_queries_for_all_recordings_and_of_one():
    processor = make_processor()
    shared = processor(draw(20, 11), ["lift", "lean forward"])
    each = processor(draw(20, 11), [["lift", "lean forward"]] * 2)
    for name in shared:
        assert torch.equal(shared[name], each[name])
    one = processor(draw(20)[0], "lean forward")
    assert one["query_input_ids"].tolist() == [[[7, 8]]]
    alone = processor.tokenize("lean forward")
    assert torch.equal(alone["query_input_ids"], one["query_input_ids"])
    arrays = processor(draw(20), ["lift"], [[[[1.0, 2.0]]]], return_tensors="np")
    assert all(isinstance(arrays[name], np.ndarray) for name in processor.model_input_names)
    assert isinstance(arrays["labels"][0][0]["segments"], np.ndarray)


def test_geometry_is_each_recordings_own():
    processor = make_processor()
    features = [{"features": array, "fps": fps} for array, fps in zip(draw(20, 20), (10, 20), strict=True)]
    labels = processor(features, ["lift"], [[[[1.0, 2.0]]], [[[1.0, 2.0]]]])["labels"]
    assert labels[0][0]["segments"].tolist() == [[1.0, 3.0]]
    assert labels[1][0]["segments"].tolist() == [[3.0, 7.0]]


def test_saved_and_loaded(tmp_path):
    processor = make_processor(nms_sigma=0.3)
    processor.save_pretrained(tmp_path)
    for loaded in (ConvTransformerProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is ConvTransformerProcessor
        assert type(loaded.feature_extractor) is ConvTransformerFeatureExtractor
        assert loaded.feature_extractor.nms_sigma == 0.3
        expected, output = (one(draw(9), ["lift"]) for one in (processor, loaded))
        assert all(torch.equal(expected[name], output[name]) for name in expected)
    for kind in (ConvTransformerFeatureExtractor, AutoFeatureExtractor):
        assert kind.from_pretrained(tmp_path).nms_sigma == 0.3
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 12
    saved = json.loads((tmp_path / "processor_config.json").read_text(encoding="utf-8"))
    assert saved["auto_map"]["AutoProcessor"] == "processing_convtransformer.ConvTransformerProcessor"
    assert (tmp_path / "processing_convtransformer.py").exists()


def test_a_folder_without_a_tokenizer_has_a_feature_extractor(tmp_path):
    ConvTransformerForMomentRetrieval(make_config(text_dim=5)).config.save_pretrained(tmp_path)
    make_processor().feature_extractor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path, trust_remote_code=False)) is ConvTransformerFeatureExtractor


@pytest.mark.parametrize("as_arrays", [False, True])
def test_moments_are_the_detections_of_each_query(as_arrays):
    processor, model = make_processor(), make_retrieval()
    queries = [["lift", "turn the arm"], ["lean"]]
    with torch.no_grad():
        outputs = model(**processor(draw(40, 23), queries))
    geometry = [{"fps": 10, "duration": 20.0}, {"fps": 20, "duration": 6.0}]
    given = outputs
    if as_arrays:
        given = {name: value.numpy() for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    found = processor.post_process_moment_retrieval(given, geometry, threshold=0.1, top_k=5, nms_method="linear")
    assert [len(own) for own in found] == [2, 1]
    for sample, own in enumerate(found):
        for query, moments in enumerate(own):
            one = {
                "logits": outputs.logits[sample, query][None, :, None],
                "pred_segments": outputs.pred_segments[sample, query][None],
                "point_mask": outputs.point_mask[[sample]],
                "point_levels": outputs.point_levels[[sample]],
            }
            (expected,) = processor.feature_extractor.post_process_temporal_action_localization(
                one, geometry[sample], threshold=0.1, top_k=5, nms_method="linear"
            )
            assert sorted(moments) == ["scores", "segments"]
            assert 0 < len(moments["scores"]) <= 5
            for name, value in moments.items():
                assert isinstance(value, np.ndarray if as_arrays else torch.Tensor)
                np.testing.assert_array_equal(np.asarray(value), np.asarray(expected[name]))


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([], "No queries given"),
        ([["lift"], []], "sample 1: no queries"),
        ("", r"sample 0: query 0 is ''"),
        (["lift", "  "], r"sample 0: query 1 is '  '"),
        ([["lift"], [3]], "sample 1: query 0 is 3; expected a text"),
        ([["lift"], None], "sample 1: None"),
        (["lift", 3], "query 1 is 3"),
        ([["lift"]], "queries has 1 lists for 2 recordings"),
        (["lift " * 13], r"sample 0: query 0 .* has 13 tokens, .* at most 12.*truncation=True"),
    ],
)
def test_queries_that_say_nothing_or_too_much(queries, message):
    with pytest.raises(ValueError, match=message):
        make_processor()(draw(9, 8), queries)


def test_long_queries_can_be_cut():
    batch = make_processor()(draw(9), ["lift " * 13], truncation=True)
    assert batch["query_input_ids"].shape == (1, 1, 12)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([[[]]], "annotations has 1 entries for 2 recordings"),
        ([[[]], [[], []]], "sample 1: annotations of 2 queries, but there are 1"),
        ([[[[2.0, 1.0]]], [[]]], "sample 0, query 0: segment 0 .* does not start before it ends"),
        ([[[]], [[[1.0, 99.0]]]], "sample 1, query 0: .* ends after the recording"),
    ],
)
def test_answers_that_do_not_fit(annotations, message):
    with pytest.raises(ValueError, match=message):
        make_processor()(draw(9, 8), ["lift"], annotations)


def test_parts_of_another_kind_are_refused():
    from transformers import Wav2Vec2FeatureExtractor

    with pytest.raises(ValueError, match="is a Wav2Vec2FeatureExtractor; expected a ConvTransformerFeatureExtractor"):
        ConvTransformerProcessor(Wav2Vec2FeatureExtractor(), make_tokenizer())
    processor = make_processor()
    with pytest.raises(ValueError, match="expected those of ConvTransformerForMomentRetrieval"):
        processor.post_process_moment_retrieval({"logits": np.zeros((1, 9, 2)), "pred_segments": np.zeros((1, 9, 2))})
