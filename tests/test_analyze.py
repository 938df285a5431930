"""examples/analyze.py: the page says what the evaluation says, needs nothing from outside, and refuses bad input."""

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from scripts import load_script

for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package, reason="the report needs the demo extra")

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
    pipeline_convtransformer,  # noqa: F401 - registers the pipeline
)
from modeling_convtransformer.evaluation import evaluate_detections, precision_recall, profile_errors

ROOT = Path(__file__).resolve().parent.parent
LABELS = ["sit <b>still</b>", 'jump & "run"', "costs 5 $ or $ 6"]
VIDEOS = [f"v{index}" for index in range(4)] + ["<script>alert('v')</script>"]


@pytest.fixture(scope="module")
def script():
    return load_script("analyze")


@pytest.fixture
def analyze(script, tmp_path, monkeypatch):
    """`analyze("--tiou", 0.4)`: the command in this process, in a folder; returns the page."""
    monkeypatch.chdir(tmp_path)

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["analyze.py", "out/report.html", *map(str, options)])
        script.main()
        assert [path.name for path in Path("out").iterdir()] == ["report.html"]  # nothing temporary is left
        return Path("out/report.html").read_text(encoding="utf-8")

    return call


def detections(labels=LABELS, seed=0):
    """Predictions and truths as rows of names and seconds; the last class is often taken for the first."""
    rng = np.random.default_rng(seed)
    found, truth = {}, {}
    for name in VIDEOS:
        truth[name], found[name] = [], []
        for place in range(6):
            start, length, label = 20.0 * place + rng.uniform(6, 9), rng.uniform(2, 12), int(rng.integers(len(labels)))
            truth[name].append({"label": labels[label], "segment": [start, start + length]})
            for score in rng.uniform(0, 1, 2):
                other = 0 if label == len(labels) - 1 and rng.random() < 0.6 else label
                segment = sorted(np.array([start, start + length]) + rng.normal(0, 0.15 * length, 2))
                found[name].append({"label": labels[other], "segment": segment, "score": score})
    return found, truth


def as_arrays(rows, labels=LABELS):
    return {
        name: {
            "segments": [row["segment"] for row in own],
            "labels": [labels.index(row["label"]) for row in own],
            "scores": [row.get("score", 1.0) for row in own],
        }
        for name, own in rows.items()
    }


def database(truth, labels=LABELS):
    """ActivityNet's format, with a recording of another subset."""
    entries = {name: {"subset": "validation", "duration": 130.0, "annotations": own} for name, own in truth.items()}
    entries["other"] = {"subset": "training", "duration": 9.0, "annotations": []}
    return {"labels": labels, "database": entries}


def write_json(name, content):
    Path(name).write_text(json.dumps(content), encoding="utf-8")


class Page(HTMLParser):
    """The texts of a page, its tables' cells, and what it refers to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.tables, self.texts, self.is_cell = [], [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.is_cell = True

    def handle_endtag(self, tag):
        self.is_cell = self.is_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.texts.append(data)
        if self.is_cell:
            self.tables[-1][-1][-1] += data

    @property
    def pictures(self):
        return [base64.b64decode(one.removeprefix("data:image/svg+xml;base64,")) for one in self.references]


def test_page_says_what_the_evaluation_says(analyze, capsys):
    found, truth = detections()
    found["elsewhere"] = found["v0"]
    write_json("found.json", {"version": "1", "results": found, "external_data": {}})
    write_json("truth.json", database(truth))
    files = ["--predictions", "found.json", "--annotations", "truth.json", "--subset", "Validation"]
    text = analyze(*files, "--recordings", 2)
    assert "report: out/report.html" in capsys.readouterr().out
    page = Page(text)
    del found["elsewhere"]
    predictions, ground_truth = as_arrays(found), as_arrays(truth)
    metrics, profile = evaluate_detections(predictions, ground_truth), profile_errors(predictions, ground_truth)
    words = " ".join("".join(page.texts).split())
    assert f"Average mAP: {100 * metrics.average_map:.1f} %. 3 classes, 30 true segments, 60 predictions." in words
    assert "1 predicted recordings that the annotations lack are left out" in words

    summary, classes, confusion = page.tables
    assert [row[1] for row in summary[1:-1]] == [f"{100 * value:.1f}" for value in metrics.map]
    assert summary[-1] == ["mean", *(f"{100 * v:.1f}" for v in (metrics.average_map, *metrics.recall.mean(axis=0)))]
    order = np.argsort(metrics.ap.mean(axis=0))
    assert [row[0] for row in classes[1:]] == [LABELS[index] for index in order]
    assert [row[2] for row in classes[1:]] == [f"{100 * metrics.ap[:, index].mean():.1f}" for index in order]
    assert [row[3] for row in classes[1:]] == [f"{100 * metrics.ap[2, index]:.1f}" for index in order]
    fates = [[int(cell or 0) for cell in row[4:]] for row in classes[1:]]
    assert fates == profile.fates.sum(axis=1)[order].tolist()
    assert [[int(cell or 0) for cell in row[1:]] for row in confusion[1:]] == profile.confusion.tolist()

    kinds = ["double detection", "wrong label", "localization", "confusion", "background", "missed"]
    worst = int(profile.gain_if_right.argmax())
    gain = f"+{100 * profile.gain_if_right[worst]:.1f} points"
    assert re.search(rf"Most mAP is lost to [^:]*\({kinds[worst]}\): {re.escape(gain)}", words)
    wrong = sorted(profile.video_errors, key=lambda name: -sum(profile.video_errors[name]))
    headings = re.findall(r"<h3>(.*?)</h3>", text)
    assert len(headings) == 3
    assert headings[0].replace("&lt;", "<").replace("&gt;", ">").replace("&#x27;", "'") == wrong[0]
    assert len(page.pictures) == 2 + 3
    assert analyze(*files, "--recordings", 2) == text  # the same input gives the same page


def test_page_needs_nothing_and_hides_nothing(analyze):
    found, truth = detections()
    write_json("found.json", found)
    write_json("truth.json", truth)
    text = analyze(
        "--predictions",
        "found.json",
        "--annotations",
        "truth.json",
        "--recordings",
        2,
        "--title",
        "<i>A & B",
        "--pictures",
        "pictures",
    )
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert "<title>&lt;i&gt;A &amp; B</title>" in text
    assert "<h1>&lt;i&gt;A &amp; B</h1>" in text
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in text
    assert not {"script", "link", "iframe", "object", "form"} & {*page.tags}
    assert "<script" not in text
    assert "<b>still" not in text
    assert all(one.startswith("data:image/svg+xml;base64,") for one in page.references)
    assert "url(" not in text
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    for picture in page.pictures:
        root = ElementTree.fromstring(picture)
        outside = [
            value
            for one in root.iter()
            for name, value in one.attrib.items()
            if name.endswith("href") and value[0] != "#"
        ]
        assert outside == []
        assert b"font-family" not in picture  # letters are outlines
    # The same pictures beside the page, under names that any file system takes.
    names = [path.name for path in Path("pictures").iterdir()]
    assert len(names) == len(page.pictures)
    assert all(re.fullmatch(r"(errors|precision_recall|timeline_[-.\w]+)\.png", name) for name in names)
    images = re.findall(r"<img alt=\"([^\"]*)\"", text)
    assert all(images)
    assert len(images) == 2 + 3


def test_all_formats_give_the_same_page(analyze):
    labels = ["a", "b", "c"]
    found, truth = detections(labels)
    rows = {
        name: [
            {"label": row["label"], "score": row["score"], "start": row["segment"][0], "end": row["segment"][1]}
            for row in own
        ]
        for name, own in found.items()
    }
    numbered = lambda given: {  # noqa: E731
        name: [{**row, "label": str(labels.index(row["label"]))} for row in own] for name, own in given.items()
    }
    pages = []
    for own, true in [
        ({"results": found}, truth),
        (rows, truth),
        ({"results": numbered(found)}, numbered(truth)),
        (as_arrays(found, labels), as_arrays(truth, labels)),
    ]:
        write_json("found.json", own)
        write_json("truth.json", true)
        pages.append(
            analyze("--predictions", "found.json", "--annotations", "truth.json", "--recordings", 0, "--best", 0)
        )
    assert pages[0] == pages[1]
    assert pages[2] == pages[3]


def test_nothing_is_found(analyze):
    found, truth = detections()
    write_json("truth.json", truth)
    write_json("found.json", {name: [] for name in found})
    text = analyze("--predictions", "found.json", "--annotations", "truth.json", "--recordings", 1, "--best", 0)
    assert "segments that no detection comes near (missed): +100.0 points" in text
    assert "No class is taken for another." in text


def test_confusion_of_many_classes_is_a_list(script):
    labels = [f"class {index}" for index in range(30)]
    found, truth = detections(labels)
    for row, label in zip((row for own in truth.values() for row in own), labels, strict=True):
        row["label"] = label
    for own in found.values():
        for row in own:
            row["label"] = "class 0"
    profile = profile_errors(as_arrays(found, labels), as_arrays(truth, labels))
    (table,) = Page(script.confusion_table(profile, dict(enumerate(labels)))).tables
    assert table[0] == ["class", "taken for", "times"]  # a matrix would be too wide
    rows = [
        [label, "class 0", "1 of 1"]
        for label, count in zip(labels[1:], profile.confusion[1:, 0], strict=True)
        if count
    ]
    assert table[1:] == rows[: script.WIDEST_TABLE]


def test_best_threshold_equals_trying_all(script):
    found, truth = (as_arrays(rows) for rows in detections())
    for entry in found.values():
        entry["scores"] = [round(score, 1) for score in entry["scores"]]  # ties
    curves = precision_recall(found, truth)
    best = (0.0,)
    for threshold in sorted({score for entry in found.values() for score in entry["scores"]}, reverse=True):
        kept = {
            name: {
                key: [v for v, s in zip(values, entry["scores"], strict=True) if s >= threshold]
                for key, values in entry.items()
            }
            for name, entry in found.items()
        }
        hits = sum(
            curve.recall[-1] * curve.num_truths
            for curve in precision_recall(kept, truth).values()
            if len(curve.recall)
        )
        count = sum(len(entry["scores"]) for entry in kept.values())
        best = max(best, (2 * hits / (count + 30), -threshold, hits / count, hits / 30))
    score, f1, precision, recall = script.best_threshold(curves)
    assert (f1, -score, precision, recall) == pytest.approx(best)
    tie = {
        "a": {"segments": [[0, 1], [5, 6]], "labels": [0, 0], "scores": [0.5, 0.5]}
    }  # no score keeps the first only
    one = {"a": {"segments": [[0, 1]], "labels": [0]}}
    assert script.best_threshold(precision_recall(tie, one)) == pytest.approx((0.5, 2 / 3, 0.5, 1.0))
    nothing = precision_recall({}, truth)
    assert script.best_threshold(nothing) is None


# --- A model --------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    """A folder with an untrained model, and signals with annotations for it."""
    torch.manual_seed(0)
    id2label = {0: "low", 1: "high"}
    config = ConvTransformerConfig(
        n_in=30, n_embd=16, n_head=2, arch=(1, 1, 2), head_dim=16, max_len=64, id2label=id2label, cls_prior_prob=0.3
    )
    ConvTransformerForTemporalActionLocalization(config).save_pretrained(tmp_path / "model")
    extractor = ConvTransformerFeatureExtractor(
        feature_size=30, fps=20.0, feature_stride=5, num_frames=10, max_seg_num=20
    )
    extractor.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    signals = {name: rng.normal(size=(300, 3)).astype(np.float32) for name in ("r0", "r1", "r2")}
    np.savez(tmp_path / "signals.npz", **signals)
    own = [{"label": "low", "segment": [1.0, 3.0]}, {"label": "high", "segment": [6.0, 9.0]}]
    entries = {name: {"subset": "test", "duration": 15.0, "fps": 20.0, "annotations": own} for name in signals}
    (tmp_path / "truth.json").write_text(json.dumps({"labels": ["low", "high"], "database": entries}))
    (tmp_path / "features").mkdir()
    for name, signal in signals.items():
        windows = np.lib.stride_tricks.sliding_window_view(signal, 10, axis=0)[::5]  # (time, channels, samples)
        np.save(tmp_path / "features" / f"{name}.npy", windows.transpose(0, 2, 1).reshape(len(windows), -1))
    return tmp_path / "model", signals


def test_a_model_is_run_and_its_predictions_are_kept(analyze, model, tmp_path):
    from transformers import pipeline

    folder, signals = model
    files = ["--model", folder, "--annotations", "truth.json", "--subset", "test", "--recordings", 1]
    text = analyze(*files, "--signals", "signals.npz", "--save", "found.json")
    assert "from the model " in text
    assert text.count("Scores before suppression") == 2
    saved = json.loads(Path("found.json").read_text())["results"]
    localize = pipeline("temporal-action-localization", model=str(folder))
    for name, signal in signals.items():
        expected = localize({"signal": signal})
        assert [row["label"] for row in saved[name]] == [row["label"] for row in expected]
        # Two batches of one recording each through the same code: equal to the last digit or two of float32.
        np.testing.assert_allclose(
            [row["score"] for row in saved[name]], [row["score"] for row in expected], rtol=1e-5
        )
        ends = [[row["start"], row["end"]] for row in expected]
        np.testing.assert_allclose([row["segment"] for row in saved[name]], ends, rtol=1e-5, atol=1e-5)

    assert analyze(*files, "--features", "features") == text  # the windows of the same signals
    again = analyze("--predictions", "found.json", "--annotations", "truth.json", "--no-scores", "--recordings", 0)
    assert Page(again).tables == Page(text).tables


# --- Mistakes -------------------------------------------------------------------------------------------------------

BOTH = ["--predictions", "found.json", "--annotations", "truth.json"]
ROW = {"label": "a", "segment": [0, 1], "score": 0.5}


@pytest.mark.parametrize(
    ("found", "truth", "options", "message"),
    [
        ({"v": [ROW]}, {"v": [ROW]}, [], "give either --predictions or --model"),
        ({"v": [ROW]}, {"v": [ROW]}, BOTH[:2], "--predictions needs --annotations"),
        ({"v": [ROW]}, {"v": [ROW]}, [*BOTH, "--watch", "8"], "go with --model"),
        ({"v": [ROW]}, {"v": [ROW]}, ["--model", "."], "needs one of --features, --signals and --watch"),
        ({"v": [ROW]}, {"v": [ROW]}, ["--model", ".", "--watch", "8", *BOTH[2:]], "leave out --annotations"),
        (
            {"v": [ROW]},
            {"v": [ROW]},
            ["--model", ".", "--signals", "s.npz"],
            "--features and --signals need --annotations",
        ),
        ({"v": [ROW]}, {"v": [ROW]}, [*BOTH[:3], "missing.json"], "there is no missing.json"),
        ({"v": [ROW]}, {"v": [ROW]}, [*BOTH, "--tiou", "1.5"], "1.5 is not a number in (0, 1]"),
        ({"v": [ROW]}, {"v": [ROW]}, [*BOTH, "--recordings", "-1"], "-1 is below 0"),
        ({"v": [ROW]}, {"v": [ROW]}, [*BOTH, "--subset", "test"], "names no subsets"),
        ({"v": [ROW]}, {"v": [ROW]}, [*BOTH, "--tious", "0.05"], "background_tiou must be"),
        ({"v": [ROW]}, {"v": [ROW]}, [*BOTH, "--lengths", "3", "2"], "lengths must be rising"),
        ({"v": [ROW]}, {"database": {"v": {"subset": "a", "annotations": []}}}, [*BOTH, "--subset", "b"], "it has a"),
        ({"v": [ROW]}, {"database": {"v": {"subset": "a"}}}, BOTH, "There is nothing to detect"),
        ({"v": [ROW]}, {"w": [ROW]}, BOTH, "have no recording in common"),
        (
            {"v": [{**ROW, "segment": [0]}]},
            {"v": [ROW]},
            BOTH,
            "found.json: recording 'v', segment 0: found [0], expected",
        ),
        ({"v": [{**ROW, "segment": [3, 1]}]}, {"v": [ROW]}, BOTH, "found.json: recording 'v', segment 0: "),
        ({"v": [{"label": "a", "start": 0, "end": 1}]}, {"v": [ROW]}, BOTH, "predictions need a score"),
        ({"v": [{**ROW, "score": 7}]}, {"v": [ROW]}, BOTH, "scores must lie in [0, 1]"),
        (
            {"v": {"segments": [[0, 1]], "labels": [0, 1], "scores": [1]}},
            {"v": [ROW]},
            BOTH,
            "expected segments (N, 2)",
        ),
        ({"v": "a"}, {"v": [ROW]}, BOTH, "found 'a', expected a list of segments"),
        ([ROW], {"v": [ROW]}, BOTH, "segments without the name of their recording"),
    ],
)
def test_mistakes_end_with_one_line(analyze, capsys, found, truth, options, message):
    write_json("found.json", found)
    write_json("truth.json", truth)
    Path("s.npz").write_text("no archive")
    with pytest.raises(SystemExit) as end:
        analyze(*options)
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("analyze.py: error: ")
    assert message in last
    assert not Path("out").exists()


def test_files_that_are_not_what_they_seem(analyze, capsys, model):
    Path("s.npz").write_text("no archive")
    Path("found.json").write_text("{")
    for options, message in [
        (BOTH, "found.json cannot be read as JSON"),
        (["--model", model[0], "--signals", "s.npz", *BOTH[2:]], "s.npz is no .npz file of arrays"),
        (["--model", "features", "--signals", "signals.npz", *BOTH[2:]], "features"),
    ]:
        with pytest.raises(SystemExit):
            analyze(*options)
        assert message in capsys.readouterr().err.splitlines()[-1]
