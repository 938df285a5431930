"""Timelines: what is drawn, where, in which colour."""

import pytest

pytest.importorskip("matplotlib", reason="pictures need the demo extra")

from matplotlib import image

from modeling_convtransformer.visualization import _lanes, plot_timeline


def test_lanes_keep_overlapping_segments_apart():
    starts, ends, scores = [0.0, 1.0, 5.0, 1.5], [3.0, 4.0, 6.0, 2.0], [0.5, 0.9, 0.1, 0.2]
    lanes = _lanes(starts, ends, scores)
    assert lanes == [1, 0, 0, 2]  # the best of the three that overlap has the first lane, the lone one too


def test_lanes_of_touching_segments_are_one():
    assert _lanes([0.0, 1.0], [1.0, 2.0], [1.0, 1.0]) == [0, 0]


def test_picture_shows_truth_above_predictions_in_the_same_colour(tmp_path):
    truth = {"segments": [[0.0, 50.0]], "labels": [1]}
    found = {"segments": [[50.0, 100.0]], "labels": [1], "scores": [1.0]}
    path = plot_timeline(found, tmp_path / "new" / "timeline.png", {0: "a", 1: "b"}, truth, duration=100.0)
    assert path.exists()
    assert [file.name for file in path.parent.iterdir()] == ["timeline.png"]  # nothing temporary is left
    pixels = image.imread(path)[..., :3]
    orange = (abs(pixels - [1.0, 127 / 255, 14 / 255]).max(-1) < 0.02).nonzero()  # class 1 of tab10
    rows, columns = orange
    middle = (columns.min() + columns.max()) / 2
    legend = rows > pixels.shape[0] * 0.8
    left, right = rows[(columns < middle) & ~legend], rows[(columns > middle) & ~legend]
    assert len(left) > 1000
    assert len(right) > 1000
    assert left.max() < right.min()  # the truth, which is on the left here, is above


def test_recording_without_any_segment(tmp_path):
    nothing = {"segments": [], "labels": [], "scores": []}
    assert plot_timeline(nothing, tmp_path / "empty.png", {0: "a"}, duration=10.0).stat().st_size > 1000
