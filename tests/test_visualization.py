"""Pictures: what is drawn, where, in which colour. The artists of a figure are compared with the data, not its pixels."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="pictures need the demo extra")

import matplotlib as mpl
from matplotlib.colors import to_rgba
from matplotlib.image import imread
from matplotlib.patches import Polygon, Rectangle

from modeling_convtransformer import ConvTransformerConfig, ConvTransformerForTemporalActionLocalization
from modeling_convtransformer.evaluation import KINDS, precision_recall, profile_errors
from modeling_convtransformer.visualization import (
    _COLOURS,
    _KIND_COLOURS,
    _TRUTH,
    _lanes,
    _name,
    class_colour,
    plot_error_profile,
    plot_precision_recall,
    plot_scores,
    plot_timeline,
    save_figure,
)

NAMES = {0: "sit", 1: "stand", 2: "walk", 7: "a name that is much too long for the margin of any picture: the seventh"}
TRUTH = {"segments": [[0.0, 40.0], [60.0, 90.0]], "labels": [1, 7]}
FOUND = {"segments": [[5.0, 45.0], [0.0, 10.0], [2.0, 30.0]], "labels": [1, 0, 1], "scores": [1.0, 0.25, 0.5]}


def bars(axes):
    """(left, right, top, bottom, colour without opacity, opacity) of the bars, in order of drawing."""
    rows = []
    for bar in axes.containers:
        for one in bar:
            x, y, width, height = one.get_x(), one.get_y(), one.get_width(), one.get_height()
            rows.append((x, x + width, y, y + height, one.get_facecolor()[:3], one.get_facecolor()[3]))
    return rows


def names(axes):
    return [text.get_text() for text in axes.get_yticklabels()]


# --- Colours --------------------------------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency" (2009):
# linear RGB as people see it who have all cones, no red ones, no green ones.
SIGHT = {
    "all": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def lab(colour, sight):
    """CIELAB of an sRGB colour."""
    rgb = np.array(to_rgba(colour)[:3])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(np.array(SIGHT[sight]) @ linear, 0, 1) / [0.95047, 1.0, 1.08883]
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("colours", [_COLOURS, (*_KIND_COLOURS, _TRUTH)], ids=["classes", "kinds"])
def test_colours_stay_apart_for_everyone(colours, sight):
    # A difference of 2.3 is just noticed side by side; 15 is told apart across a picture.
    seen = [lab(colour, sight) for colour in colours]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 15
    assert min(np.linalg.norm(one - lab("white", sight)) for one in seen) > 25


def test_thirty_classes_have_thirty_colours():
    assert len({class_colour(label) for label in range(30)}) == 30
    assert class_colour(3) == _COLOURS[3]
    assert class_colour(33) == class_colour(3)
    assert class_colour(13) == "#7A4964"  # 0.6 x CC79A7
    assert class_colour(20) == "#80B8D8"  # half way from 0072B2 to white


# --- Timelines ------------------------------------------------------------------------------------------------------


def test_lanes_keep_overlapping_segments_apart():
    starts, ends, scores = [0.0, 1.0, 5.0, 1.5], [3.0, 4.0, 6.0, 2.0], [0.5, 0.9, 0.1, 0.2]
    lanes = _lanes(starts, ends, scores)
    assert lanes == [1, 0, 0, 2]  # the best of the three that overlap has the first lane, the lone one too


def test_lanes_of_touching_segments_are_one():
    assert _lanes([0.0, 1.0], [1.0, 2.0], [1.0, 1.0]) == [0, 0]


def test_each_class_has_a_row_with_the_truth_above_what_was_found():
    (axes,) = plot_timeline(FOUND, NAMES, TRUTH, duration=100.0).axes
    assert [name.replace("\n", " ") for name in names(axes)] == ["sit", "stand", "a name that is ... the seventh"]
    assert axes.get_xlim() == (0, 100)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is on top
    found = {(left, right): rest for left, right, *rest in bars(axes)}
    assert set(found) == {(5, 45), (0, 10), (2, 30), (0, 40), (60, 90)}
    row = {(0, 10): 0, (0, 40): 1, (5, 45): 1, (2, 30): 1, (60, 90): 2}
    for segment, (top, bottom, *_) in found.items():
        assert row[segment] - 0.5 < top < bottom < row[segment] + 0.5
    assert found[0, 40][1] < found[5, 45][0]
    assert found[5, 45][1] <= found[2, 30][0]  # the second lane

    for segment, label, score in zip(FOUND["segments"], FOUND["labels"], FOUND["scores"], strict=True):
        *_, colour, opacity = found[tuple(segment)]
        assert colour == to_rgba(class_colour(label))[:3]
        assert opacity == pytest.approx(0.2 + 0.8 * score)
    assert found[0, 40][2:] == found[60, 90][2:] == [to_rgba(_TRUTH)[:3], 1.0]


def test_low_scores_are_left_out_and_their_classes_too():
    (axes,) = plot_timeline(FOUND, NAMES, min_score=0.5).axes
    assert names(axes) == ["stand"]
    assert sorted(row[:2] for row in bars(axes)) == [(2, 30), (5, 45)]
    assert axes.get_xlim() == (0, 45)


def test_rows_of_the_pipeline_and_tensors_make_the_same_picture():
    rows = [
        {"label": NAMES[label], "score": score, "start": start, "end": end}
        for (start, end), label, score in zip(*FOUND.values(), strict=True)
    ]
    truth = [{"label": NAMES[label], "start": a, "end": b} for (a, b), label in zip(*TRUTH.values(), strict=True)]
    tensors = {name: torch.tensor(values) for name, values in FOUND.items()}
    expected = bars(plot_timeline(FOUND, NAMES, TRUTH).axes[0])
    assert bars(plot_timeline(rows, NAMES, truth).axes[0]) == expected
    assert bars(plot_timeline(tensors, NAMES, TRUTH).axes[0]) == expected


@pytest.mark.parametrize("truth", [None, {"segments": [], "labels": []}, []])
@pytest.mark.parametrize("found", [[], {"segments": [], "labels": [], "scores": []}])
def test_recording_without_any_segment(found, truth):
    (axes,) = plot_timeline(found, NAMES, truth, duration=10.0).axes
    assert bars(axes) == []
    assert [text.get_text() for text in axes.texts] == ["no segments"]
    assert axes.get_xlim() == (0, 10)


@pytest.mark.parametrize(
    ("seconds", "label", "ticks"),
    [
        (90, "seconds", ["0", "10", "20", "30", "40"]),
        (303, "minutes:seconds", ["0:00", "0:30", "1:00", "1:30", "2:00"]),
        (4000, "hours:minutes:seconds", ["0:00:00", "0:10:00", "0:20:00", "0:30:00"]),
        (400_000, "hours:minutes:seconds", ["0:00:00", "12:00:00", "24:00:00"]),
    ],
)
def test_time_is_written_as_people_do(seconds, label, ticks):
    figure = plot_timeline(FOUND, NAMES, duration=seconds)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_xlabel() == label
    shown = [text.get_text() for text in axes.get_xticklabels() if 0 <= text.get_position()[0] <= seconds]
    assert shown[: len(ticks)] == ticks
    assert len(shown) <= 13


@pytest.mark.parametrize("count", [1, 7, 20, 60])
def test_nothing_is_clipped(count):
    id2label = {
        label: f"some activity of a person with a long name, and it is number {label}" for label in range(count)
    }
    found = {"segments": [[i, i + 3] for i in range(count)], "labels": list(range(count)), "scores": [0.5] * count}
    figure = plot_timeline(found, id2label, {**found, "segments": found["segments"]}, title="A title " * 20)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    page = figure.bbox
    times = [text for text in axes.get_xticklabels() if text.get_position()[0] <= axes.get_xlim()[1]]
    texts = [*axes.get_yticklabels(), *times, axes.xaxis.label, axes._left_title, *axes.get_legend().get_texts()]
    boxes = [text.get_window_extent() for text in texts]
    assert all(box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0 and box.y1 <= page.y1 for box in boxes)
    rows = [text.get_window_extent() for text in axes.get_yticklabels()]
    assert not any(above.overlaps(below) for above, below in pairwise(rows))
    assert figure.get_figheight() < 14


@pytest.mark.parametrize(
    ("found", "truth", "message"),
    [
        ([{"label": "sit", "start": 0, "end": 1}], None, "predictions must be a dictionary .* or rows with"),
        (
            [{"label": "fly", "start": 0, "end": 1, "score": 1}],
            None,
            "predictions has classes that id2label lacks: fly",
        ),
        ({"segments": [[0, 1]], "labels": [4], "scores": [0.5]}, None, r"class ids that id2label lacks: \[4\]"),
        ({"segments": [[0, 1]], "labels": [1]}, None, "predictions lacks scores"),
        ({"segments": [[0, 1]], "labels": [1], "scores": [3.0]}, None, "scores must lie in"),
        ([], {"segments": [[0, 1]]}, "ground_truth lacks labels"),
        ([], {"segments": [[0, 1]], "labels": [0, 1]}, "ground_truth: 1 segments, 2 labels do not fit"),
        ("sit", None, "predictions must be"),
    ],
)
def test_timeline_refuses_what_it_cannot_draw(found, truth, message):
    with pytest.raises(ValueError, match=message):
        plot_timeline(found, NAMES, truth)


def test_names_fit():
    assert _name("short") == "short"
    assert _name("cost in $ and more $") == r"cost in \$ and more \$"
    assert _name("taking the big green plate out of the cupboard number 17") == "taking the big ...\nnumber 17"
    assert all(len(line) <= 24 for line in _name("x" * 200).split("\n"))


# --- Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_figures_are_saved_whole_and_nothing_else_changes(tmp_path, suffix):
    before = dict(mpl.rcParams)
    path = save_figure(plot_timeline(FOUND, NAMES, TRUTH), tmp_path / "new" / f"timeline.{suffix}")
    assert [file.name for file in path.parent.iterdir()] == [f"timeline.{suffix}"]  # nothing temporary is left
    assert path.stat().st_size > 3000
    if suffix == "png":
        assert imread(path).shape[1] == 1500
    assert dict(mpl.rcParams) == before


def test_a_format_that_is_unknown_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="xyz"):
        save_figure(plot_timeline(FOUND, NAMES), tmp_path / "timeline.xyz")
    assert list(tmp_path.iterdir()) == []


# --- Scores ---------------------------------------------------------------------------------------------------------

GEOMETRY = {"fps": 50.0, "feature_stride": 25, "num_frames": 50, "duration": 24.0}


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    config = ConvTransformerConfig(n_in=6, n_embd=16, n_head=2, arch=(1, 1, 2), head_dim=16, num_labels=3, max_len=64)
    return ConvTransformerForTemporalActionLocalization(config).eval()


@pytest.mark.parametrize("start_level", [0, 1])
def test_points_lie_at_their_times(start_level):
    """The model says where its points are: with distances of 0, a segment is a point."""
    torch.manual_seed(0)
    config = ConvTransformerConfig(
        n_in=6, n_embd=16, n_head=2, arch=(1, 1, 2), head_dim=16, num_labels=3, max_len=64, fpn_start_level=start_level
    )
    model = ConvTransformerForTemporalActionLocalization(config).eval()
    torch.nn.init.zeros_(model.segment_head.scale)  # distances of 0
    features = torch.randn(1, 61, 6)
    mask = torch.ones(1, 61, dtype=torch.long)
    mask[:, 47:] = 0
    with torch.no_grad():
        outputs = model(features, attention_mask=mask)
    assert torch.equal(outputs.pred_segments[..., 0], outputs.pred_segments[..., 1])
    figure = plot_scores(outputs, GEOMETRY, config.detector_strides, {0: "a", 1: "b", 2: "c"}, min_score=0.0)
    assert len(figure.axes) == len(config.detector_strides)
    for level, axes in enumerate(figure.axes):
        own = (outputs.point_levels[0] == level) & (outputs.point_mask[0] > 0)
        seconds = (outputs.pred_segments[0, own, 0] * 25 + 25) / 50
        assert [line.get_label() for line in axes.lines] == ["a", "b", "c"]
        for label, line in enumerate(axes.lines):
            # Both sides are exact in float32 here (halves and whole numbers); scores are the same float32 up to the
            # last digit, which two ways to write the sigmoid may round otherwise.
            np.testing.assert_array_equal(line.get_xdata(), seconds.numpy())
            np.testing.assert_allclose(line.get_ydata(), outputs.logits[0, own, label].sigmoid().numpy(), rtol=1e-6)
            assert line.get_color() == class_colour(label)
        assert axes.get_ylabel() == f"every {0.5 * config.detector_strides[level]:g} s"


def test_truth_is_shaded_and_silent_classes_are_left_out(detector):
    with torch.no_grad():
        outputs = detector(torch.randn(1, 47, 6))
    outputs.logits[..., 1] = -9.0
    outputs.logits[0, 3, 0] = 2.0
    outputs.logits[..., 2] = -9.0
    truth = {"segments": [[2.0, 5.5]], "labels": [2]}
    arrays = {name: np.asarray(outputs[name]) for name in ("logits", "point_levels")}
    strides = detector.config.detector_strides
    figure = plot_scores(arrays, GEOMETRY, strides, {0: "a", 1: "b", 2: "c"}, truth)
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == ["a"]
        (shade,) = [patch for patch in axes.patches if isinstance(patch, Rectangle | Polygon)]
        box = shade.get_extents().transformed(axes.transData.inverted())
        assert (box.x0, box.x1) == pytest.approx((2.0, 5.5))
        assert shade.get_facecolor()[:3] == to_rgba(class_colour(2))[:3]
        assert axes.get_xlim() == (0, 24)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "c"]


def test_scores_refuse_what_does_not_fit(detector):
    with torch.no_grad():
        outputs = detector(torch.randn(2, 16, 6))
    one = {name: outputs[name][:1] for name in ("logits", "point_levels", "point_mask")}
    strides, id2label = detector.config.detector_strides, {0: "a", 1: "b", 2: "c"}
    with pytest.raises(ValueError, match="of one recording, but found"):
        plot_scores(outputs, GEOMETRY, strides, id2label)
    with pytest.raises(ValueError, match="3 levels, but there are 1 strides"):
        plot_scores(one, GEOMETRY, strides[:1], id2label)
    with pytest.raises(ValueError, match="geometry lacks fps"):
        plot_scores(one, {**GEOMETRY, "fps": None}, strides, id2label)
    with pytest.raises(ValueError, match="need logits and point_levels"):
        plot_scores({"logits": one["logits"]}, GEOMETRY, strides, id2label)


# --- Curves and errors ----------------------------------------------------------------------------------------------


def some_detections(num_classes=5, seed=0):
    rng = np.random.default_rng(seed)
    predictions, truth = {}, {}
    for video in range(6):
        starts = np.arange(num_classes * 2) * 12.0
        segments = np.stack([starts, starts + rng.uniform(2, 10, len(starts))], axis=1)
        labels = rng.permutation(np.arange(num_classes * 2) % num_classes)
        truth[video] = {"segments": segments, "labels": labels}
        predictions[video] = {
            "segments": np.sort(np.repeat(segments, 2, axis=0) + rng.normal(0, 1.5, (4 * num_classes, 2)), axis=1),
            "labels": np.where(rng.random(4 * num_classes) < 0.7, np.repeat(labels, 2), 0),
            "scores": rng.random(4 * num_classes),
        }
    return predictions, truth


def test_curves_are_drawn_worst_first_and_their_area_is_average_precision():
    curves = precision_recall(*some_detections())
    id2label = {label: f"class {label}" for label in range(5)}
    figure = plot_precision_recall(curves, id2label, columns=3)
    order = sorted(curves, key=lambda label: curves[label].ap)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(figure.axes) == 6
    for axes, label in zip(shown, order, strict=True):
        assert axes.get_title(loc="left") == (
            f"class {label}\nAP {100 * curves[label].ap:.1f} %, {curves[label].num_truths} truths"
        )
        (line,) = axes.lines
        np.testing.assert_array_equal(line.get_xdata(), curves[label].recall)
        np.testing.assert_array_equal(line.get_ydata(), curves[label].precision)
        (area,) = axes.collections
        x, y = area.get_paths()[0].vertices[:-1].T
        shoelace = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
        assert shoelace == pytest.approx(curves[label].ap, abs=1e-12)
    assert any(axes.get_xlabel() == "recall" for axes in shown)


def test_curve_of_a_class_without_predictions():
    nothing = {"a": {"segments": [], "labels": [], "scores": []}}
    curves = precision_recall(nothing, {"a": {"segments": [[0, 1]], "labels": [1]}})
    (axes,) = plot_precision_recall(curves, NAMES).axes
    assert axes.get_title(loc="left") == "stand\nAP 0.0 %, 1 truths"


def heights(axes):
    """(bars, kinds) of a stack of bars."""
    return np.array([[bar.get_height() for bar in container] for container in axes.containers]).T


def test_error_profile_is_drawn_as_it_is():
    profile = profile_errors(*some_detections())
    figure = plot_error_profile(profile, title="a title")
    left, middle, right = figure.axes
    counts = profile.counts.sum(axis=1)
    counts = counts[counts.any(axis=1)]
    np.testing.assert_allclose(heights(left), 100 * counts / counts.sum(axis=1, keepdims=True), atol=1e-12)
    bottoms = [bar.get_y() for bar in left.containers[2]]
    np.testing.assert_allclose(bottoms, heights(left)[:, :2].sum(axis=1), atol=1e-12)
    fates = profile.fates.sum(axis=0)
    np.testing.assert_allclose(heights(right), 100 * fates / fates.sum(axis=1, keepdims=True), atol=1e-12)
    assert [text.get_text() for text in middle.get_yticklabels()] == [*KINDS[1:], "missed"]
    right_gains, removed_gains = ([bar.get_width() for bar in container] for container in middle.containers)
    np.testing.assert_allclose(right_gains, 100 * profile.gain_if_right, atol=1e-12)
    np.testing.assert_allclose(removed_gains, 100 * profile.gain_if_removed, atol=1e-12)
    assert max(right_gains) < middle.get_xlim()[1]
    colours = [container[0].get_facecolor() for container in left.containers]
    assert colours == [to_rgba(colour) for colour in _KIND_COLOURS]
    assert [text.get_text() for text in figure.legends[0].get_texts()][-2:] == ["background", "missed"]


def test_error_profile_of_nothing():
    profile = profile_errors({}, {"a": {"segments": [[0, 40]], "labels": [1]}}, lengths=(30, 60, 120, 180))
    figure = plot_error_profile(profile)
    figure.draw_without_rendering()
    left, _, right = figure.axes
    assert heights(left).sum() == 0
    assert heights(right)[1].tolist() == [0, 0, 0, 0, 0, 100]
    ticks = [text.get_window_extent() for text in right.get_xticklabels()]
    assert not any(one.overlaps(other) for one, other in pairwise(ticks))
