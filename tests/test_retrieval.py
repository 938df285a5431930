"""Search over many recordings, beside a search that compares everything with everything in float64."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_convtransformer.retrieval import SegmentIndex

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
