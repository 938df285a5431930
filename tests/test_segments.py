"""Segments in files: what is written comes back, what other tools write is read, what others read is written."""

import csv
import io
import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_convtransformer.data import validate_annotations
from modeling_convtransformer.evaluation import evaluate_detections
from modeling_convtransformer.segments import (
    FORMATS,
    format_segments,
    parse_segments,
    read_segments,
    to_arrays,
    to_rows,
    write_segments,
)

ROWS = [
    {"label": "squat", "score": 0.875, "start": 12.25, "end": 20.5},
    {"label": "press", "score": 0.5, "start": 3.0, "end": 11.0},
]
TRUTH = [{"label": row["label"], "start": row["start"], "end": row["end"]} for row in ROWS]

# Labels that meet every separator, quote and escape of the formats; the second kind stays within one line.
SPECIAL = [
    "-->",
    "&amp;",
    "&",
    "<b>",
    ">",
    '"',
    "'",
    ",",
    ";",
    "\\",
    " 0.87",
    "é",
    "跑",
    "\u2028",
    "\x85",
    "\x0b",
    "WEBVTT",
    "NOTE",
]
ENDS = ["\t", "\n", "\r", "\r\n"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def joined(pieces):
    return st.lists(st.sampled_from(pieces) | TEXT, max_size=4).map("".join)


ANY_LABELS = joined(SPECIAL + ENDS)
LINE_LABELS = joined(SPECIAL).map(lambda label: "".join(one for one in label if one not in "\t\r\n\0"))
TIMES = st.floats(0, 1e6, allow_nan=False) | st.integers(0, 10**9).map(lambda value: value / 1000)
SCORES = st.floats(-1e6, 1e6, allow_nan=False)


def rows_of(labels, scores=st.none(), times=TIMES):  # noqa: B008 - a strategy holds no state
    def row(values):
        label, times, score = values
        return {"label": label, **({} if score is None else {"score": score}), "start": min(times), "end": max(times)}

    return st.lists(st.tuples(labels, st.tuples(times, times), scores).map(row), max_size=5)


MANY = st.dictionaries(ANY_LABELS, rows_of(ANY_LABELS, SCORES | st.none()), max_size=3)
QUICK = settings(max_examples=150, deadline=None)


# What is written comes back


@pytest.mark.parametrize("format", ["json", "csv"])
@given(segments=MANY | rows_of(ANY_LABELS, SCORES | st.none()))
@QUICK
def test_json_and_csv_keep_everything(format, segments):
    assert parse_segments(format_segments(segments, format), format) == segments


@given(segments=st.dictionaries(ANY_LABELS, rows_of(ANY_LABELS, SCORES), max_size=3))
@QUICK
def test_activitynet_keeps_everything(segments):
    text = format_segments(segments, "activitynet", kind="results")
    assert parse_segments(text, "activitynet") == segments
    truth = {
        name: [{key: row[key] for key in ("label", "start", "end")} for row in rows] for name, rows in segments.items()
    }
    assert parse_segments(format_segments(segments, "activitynet", kind="truth"), "activitynet") == truth


def in_order(rows):
    return sorted(rows, key=lambda row: (row["start"], row["end"]))


@given(rows=rows_of(LINE_LABELS))
@QUICK
def test_audacity_keeps_six_decimals(rows):
    found = parse_segments(format_segments(rows, "audacity"), "audacity")
    expected = [
        {"label": row["label"], "start": float(f"{row['start']:.6f}"), "end": float(f"{row['end']:.6f}")}
        for row in in_order(rows)
    ]
    assert found == expected


@pytest.mark.parametrize("format", ["webvtt", "elan"])
@given(rows=rows_of(LINE_LABELS))
@QUICK
def test_webvtt_and_elan_keep_milliseconds(format, rows):
    found = parse_segments(format_segments(rows, format), format)
    for before, after in zip(in_order(rows), found, strict=True):
        assert after["label"] == before["label"]
        start, end = round(before["start"] * 1000), round(before["end"] * 1000)
        # The float nearest to the milliseconds written; a segment without length gets one.
        assert (after["start"], after["end"]) == (start / 1000, max(end, start + 1) / 1000)
    assert parse_segments(format_segments(found, format), format) == in_order(found)  # nothing more is lost


@given(label=joined([*SPECIAL, "\n"]).map(lambda label: "".join(one for one in label if one not in "\r\0")))
@QUICK
def test_webvtt_keeps_labels_of_several_lines_or_refuses_them(label):
    rows = [{"label": label, "start": 1.0, "end": 2.0}]
    if label and "" in label.split("\n"):
        with pytest.raises(ValueError, match="empty line"):
            format_segments(rows, "webvtt")
    else:
        assert parse_segments(format_segments(rows, "webvtt"), "webvtt") == rows


@pytest.mark.parametrize("format", ["audacity", "webvtt", "elan"])
@given(rows=rows_of(LINE_LABELS, SCORES))
@QUICK
def test_scores_survive_to_four_decimals_and_leave_labels_alone(format, rows):
    found = parse_segments(format_segments(rows, format, with_scores=True), format, with_scores=True)
    assert [row["label"] for row in found] == [row["label"] for row in in_order(rows)]
    assert [row["score"] for row in found] == [round(row["score"], 4) for row in in_order(rows)]


def chapters():
    """Rows that obey YouTube's rules by themselves: whole seconds, 10 or more, without gaps, from 0."""
    title = LINE_LABELS.map(lambda label: " ".join(label.replace("<", "").replace(">", "").split()))
    title = title.filter(lambda label: label not in ("", "…"))
    lengths = st.lists(st.tuples(title, st.integers(10, 5000)), min_size=3, max_size=6)

    def rows(pieces):
        starts = np.cumsum([0, *(length for _, length in pieces)]).tolist()
        return [
            {"label": label, "start": float(start), "end": float(end)}
            for (label, _), start, end in zip(pieces, starts, starts[1:], strict=False)
        ]

    return lengths.map(rows)


@given(rows=chapters())
@QUICK
def test_youtube_keeps_what_are_chapters_already(rows):
    assert parse_segments(format_segments(rows, "youtube"), "youtube", duration=rows[-1]["end"]) == rows


@pytest.mark.filterwarnings("ignore:YouTube shows chapters")
@given(rows=rows_of(st.sampled_from("abcd"), times=st.floats(0, 90)), extra=st.floats(0, 100))
@QUICK
def test_youtube_rules_hold(rows, extra):
    duration = max((row["end"] for row in rows), default=0.0) + extra
    lines = format_segments(rows, "youtube", duration=duration).splitlines()
    assert lines[0].startswith("0:00 ")
    found = parse_segments("\n".join(lines), "youtube", duration=max(duration, 10), gap=None)
    assert [row["start"] for row in found] == sorted({row["start"] for row in found})
    assert all(row["end"] - row["start"] >= 10 for row in found)
    assert {row["label"] for row in found} <= {row["label"] for row in rows} | {"…"}


def test_youtube_chapters_fill_gaps_and_share_short_ones():
    rows = [
        {"label": "warm up", "start": 5.0, "end": 60.4},
        {"label": "squat", "start": 60.4, "end": 64.0},  # too short beside the next one, which is put off
        {"label": "press", "start": 64.0, "end": 3700.0},
        {"label": "rest", "start": 100.0, "end": 200.0},  # within "press"
        {"label": "stretch", "start": 3760.0, "end": 3764.0},  # too short at the end: begins earlier
    ]
    assert format_segments(rows, "youtube") == (
        "0:00 warm up\n1:00 squat\n1:10 press\n1:40 rest\n3:20 press\n1:01:40 …\n1:02:34 stretch\n"
    )


def test_youtube_says_when_there_are_too_few_chapters():
    with pytest.warns(UserWarning, match="three or more; these segments give 2"):
        assert format_segments(ROWS[1:], "youtube", duration=60) == "0:00 press\n0:11 …\n"


# What other tools write


def test_activitynet_ground_truth():
    text = """{"version": "VERSION 1.3", "taxonomy": [], "database": {
      "---9CpRcKoU": {"duration": 14.07, "subset": "training", "resolution": "320x240",
        "url": "https://www.youtube.com/watch?v=---9CpRcKoU",
        "annotations": [{"label": "Drinking beer", "segment": [0.01, 12.644405017160688]}]},
      "--0edUL8zmA": {"duration": 92.18, "subset": "validation", "annotations": []},
      "--1DO2V4K74": {"duration": 211.53, "subset": "testing"}}}"""
    beer = [{"label": "Drinking beer", "start": 0.01, "end": 12.644405017160688}]
    assert parse_segments(text, "activitynet") == {"---9CpRcKoU": beer, "--0edUL8zmA": [], "--1DO2V4K74": []}
    assert parse_segments(text, "activitynet", subset="training") == {"---9CpRcKoU": beer}
    with pytest.raises(
        ValueError, match=r"no recording has the subset 'test'. There are \['testing', 'training', 'valid"
    ):
        parse_segments(text, "activitynet", subset="test")


def test_activitynet_results():
    text = """{"version": "VERSION 1.3", "results": {"5n7NCViB5TU": [
        {"score": 0.64, "segment": [24.25, 38.08], "label": "Discus throw"},
        {"score": 0.77, "segment": [11, 19.37], "label": "Shot put"}]},
      "external_data": {"used": true, "details": "First fully-connected layer from VGG-16"}}"""
    assert parse_segments(text, "activitynet") == {
        "5n7NCViB5TU": [
            {"label": "Discus throw", "score": 0.64, "start": 24.25, "end": 38.08},
            {"label": "Shot put", "score": 0.77, "start": 11.0, "end": 19.37},
        ]
    }


def test_activitynet_is_written_as_its_evaluation_reads_it():
    results = json.loads(format_segments({"a": ROWS, "b": []}, "activitynet"))
    assert set(results) == {"version", "results", "external_data"}
    assert results["results"] == {
        "a": [
            {"label": "squat", "score": 0.875, "segment": [12.25, 20.5]},
            {"label": "press", "score": 0.5, "segment": [3.0, 11.0]},
        ],
        "b": [],
    }
    truth = json.loads(format_segments(TRUTH, "activitynet", recording="a", subset="val", durations={"a": 30.0}))
    assert truth["database"] == {
        "a": {
            "subset": "val",
            "duration": 30.0,
            "annotations": [
                {"segment": [12.25, 20.5], "label": "squat"},
                {"segment": [3.0, 11.0], "label": "press"},
            ],
        }
    }


def test_activitynet_truth_is_what_the_data_sets_read(tmp_path):
    durations = {"a": 30.0, "b": 5.0}
    path = write_segments(
        tmp_path / "truth.json", {"a": TRUTH, "b": []}, "activitynet", subset="training", durations=durations
    )
    assert validate_annotations(path) == []


def test_rows_with_segments_as_pairs():
    text = '[{"segment": [1, 2.5], "label": "a"}]'
    assert parse_segments(text, "json") == [{"label": "a", "start": 1.0, "end": 2.5}]


def test_csv_of_excel():
    """A byte order mark, semicolons, decimal commas, other columns, columns in another order."""
    content = '\ufeffEnd;Start;Comment;Label;Score\r\n20,5;12,25;"one; two";Kniebeuge;0,875\r\n11;3;;"a;b";\r\n'
    assert parse_segments(content, "csv") == [
        {"label": "Kniebeuge", "score": 0.875, "start": 12.25, "end": 20.5},
        {"label": "a;b", "start": 3.0, "end": 11.0},
    ]
    assert parse_segments("sep=;\r\nlabel;start;end\r\na;1;2\r\n", "csv") == [{"label": "a", "start": 1.0, "end": 2.0}]


@pytest.mark.parametrize("names", [("video-id", "t-start", "t-end"), ("video_id", "t_start", "t_end")])
def test_csv_of_pandas(names):
    """With the index as a column without name, as `DataFrame.to_csv` writes it."""
    video, start, end = names
    text = f",{video},{start},{end},label,score\n0,v1,12.25,20.5,7,0.875\n1,v2,3.0,11.0,8,0.5\n2,v1,0.0,1.0,7,\n"
    assert parse_segments(text, "csv") == {
        "v1": [
            {"label": "7", "score": 0.875, "start": 12.25, "end": 20.5},
            {"label": "7", "start": 0.0, "end": 1.0},
        ],
        "v2": [{"label": "8", "score": 0.5, "start": 3.0, "end": 11.0}],
    }


def test_csv_is_read_by_the_csv_module():
    text = format_segments({"a, b": ROWS, "empty": []}, "csv")
    table = list(csv.DictReader(io.StringIO(text, newline="")))
    assert table == [
        {"recording": "a, b", "label": "squat", "score": "0.875", "start": "12.25", "end": "20.5"},
        {"recording": "a, b", "label": "press", "score": "0.5", "start": "3.0", "end": "11.0"},
        {"recording": "empty", "label": "", "score": "", "start": "", "end": ""},
    ]
    assert format_segments(TRUTH[:1], "csv") == "label,score,start,end\r\nsquat,,12.25,20.5\r\n"


def test_audacity_export():
    """Points, regions, frequency ranges, a label without text, and a line of Audacity 1.2."""
    text = (
        "0.450000\t0.450000\tpoint label\r\n"
        "1.400000\t3.100000\tregion label \r\n"
        "\\\t-1.000000\t6334.588867\r\n"
        "4.150000\t5.000000\t\r\n"
        "5.700000\tAnswer 1\r\n"
        "6.000000\t7.000000\r\n"
    )
    assert parse_segments(text, "audacity") == [
        {"label": "point label", "start": 0.45, "end": 0.45},
        {"label": "region label ", "start": 1.4, "end": 3.1},
        {"label": "", "start": 4.15, "end": 5.0},
        {"label": "Answer 1", "start": 5.7, "end": 5.7},
        {"label": "", "start": 6.0, "end": 7.0},
    ]
    assert format_segments(ROWS, "audacity") == "3.000000\t11.000000\tpress\n12.250000\t20.500000\tsquat\n"


def test_webvtt_chapters_of_the_specification():
    """The example of section 1.6 of https://www.w3.org/TR/webvtt1/."""
    text = """WEBVTT

NOTE
This is from a talk Silvia gave about WebVTT.

Slide 1
00:00:00.000 --> 00:00:10.700
Title Slide

Slide 2
00:00:10.700 --> 00:00:47.600
Introduction by Naomi Black

Slide 3
00:00:47.600 --> 00:01:50.100
Impact of Captions on the Web

Slide 4
00:01:50.100 --> 00:03:33.000
Requirements of a Video text format
"""
    assert parse_segments(text, "webvtt") == [
        {"label": "Title Slide", "start": 0.0, "end": 10.7},
        {"label": "Introduction by Naomi Black", "start": 10.7, "end": 47.6},
        {"label": "Impact of Captions on the Web", "start": 47.6, "end": 110.1},
        {"label": "Requirements of a Video text format", "start": 110.1, "end": 213.0},
    ]


def test_webvtt_with_all_that_is_left_out():
    text = (
        "\ufeffWEBVTT - a title\r\nKind: captions\r\n\r\n"
        "STYLE\r\n::cue { color: lime }\r\n\r\nREGION\r\nid:fred\r\n\r\n"
        "00:11.000 --> 00:13.000 align:start position:50%\r\n"
        "<v Roger Bingham>We are in <b>New York</b> &amp; City\r\n\r\n"
        "NOTE one line\r\n\r\n1\r\n100:00:00.000\t-->\t100:00:01.500\r\n- a &lt; b\r\n- c --&gt; d&nbsp;e\r\n\r\n"
        "00:14.000 --> 00:15.000\r\n\r\n"
    )
    assert parse_segments(text, "webvtt") == [
        {"label": "We are in New York & City", "start": 11.0, "end": 13.0},
        {"label": "- a < b\n- c --> d\xa0e", "start": 360000.0, "end": 360001.5},
        {"label": "", "start": 14.0, "end": 15.0},
    ]
    assert parse_segments("WEBVTT", "webvtt") == []


def test_ffprobe_reads_webvtt(tmp_path):
    if shutil.which("ffprobe") is None:
        pytest.skip("ffprobe is not installed (it comes with ffmpeg): nobody else has read our WebVTT")
    rows = [
        {"label": "a & b", "start": 0.0, "end": 1.5},
        {"label": "two\nlines --> here", "start": 1.5, "end": 1.5},
        {"label": "", "start": 3.0, "end": 4.0},
        {"label": "跑", "start": 3600.25, "end": 7265.125},
    ]
    path = write_segments(tmp_path / "cues.vtt", rows)
    command = ["ffprobe", "-v", "error", "-of", "json", "-show_packets", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    packets = [(float(one["pts_time"]), float(one["duration_time"])) for one in json.loads(result.stdout)["packets"]]
    assert packets == [(0.0, 1.5), (1.5, 0.001), (3.0, 1.0), (3600.25, 3664.875)]


@pytest.mark.parametrize(
    "text",
    [
        # Without a header, with tier and (empty) participant: hh:mm:ss.ms, ss.msec, and both.
        "gesture\t\t00:00:00.780\t00:00:01.340\t00:00:00.560\tpoint left\n"
        "gesture\t\t00:01:02.005\t00:01:03.000\t00:00:00.995\twave\n",
        "gesture\t\t0.78\t1.34\t0.56\tpoint left\ngesture\t\t62.005\t63.0\t0.995\twave\n",
        '"#file:///C:/videos/session.mp4 -- offset: 0"\n\n'
        "gesture\t\t00:00:00.780\t0.78\t00:00:01.340\t1.34\t00:00:00.560\t0.56\tpoint left\n"
        "gesture\t\t00:01:02.005\t62.005\t00:01:03.000\t63.0\t00:00:00.995\t0.995\twave\n",
        # A column for each tier, with a header in two languages.
        "Begin Time - hh:mm:ss.ms\tEnd Time - hh:mm:ss.ms\tDuration - hh:mm:ss.ms\tgesture\tspeech\n"
        "00:00:00.780\t00:00:01.340\t00:00:00.560\tpoint left\t\n"
        "00:01:02.005\t00:01:03.000\t00:00:00.995\twave\t\n\n",
        "Anfangszeit - msec\tEndzeit - msec\tDauer - msec\tgesture\n"
        "780\t1340\t560\tpoint left\n62005\t63000\t995\twave\n",
        # A header by hand.
        "Tier\tBegin Time\tEnd Time\tDuration\tAnnotation\n"
        "gesture\t00:00:00.780\t00:00:01.340\t00:00:00.560\tpoint left\ngesture\t62.005\t63\t0.995\twave\n",
    ],
    ids=["clock", "seconds", "both", "columns", "german", "own header"],
)
def test_elan_exports(text):
    expected = [
        {"label": "point left", "start": 0.78, "end": 1.34},
        {"label": "wave", "start": 62.005, "end": 63.0},
    ]
    assert parse_segments(text, "elan") == expected
    assert parse_segments(text, "elan", tier="gesture") == expected
    with pytest.raises(ValueError, match="there is no tier 'hand'"):
        parse_segments(text, "elan", tier="hand")


def test_elan_tiers_never_overlap():
    rows = [
        {"label": "a", "start": 0.0, "end": 10.0},
        {"label": "b", "start": 5.0, "end": 7.0},
        {"label": "c", "start": 7.0, "end": 12.0},
        {"label": "d", "start": 10.0, "end": 11.0},
    ]
    assert format_segments(rows, "elan", tier="found") == (
        "found\t00:00:00.000\t00:00:10.000\t00:00:10.000\ta\n"
        "found-2\t00:00:05.000\t00:00:07.000\t00:00:02.000\tb\n"
        "found-2\t00:00:07.000\t00:00:12.000\t00:00:05.000\tc\n"
        "found\t00:00:10.000\t00:00:11.000\t00:00:01.000\td\n"
    )
    assert parse_segments(format_segments(rows, "elan", tier="found"), "elan", tier="found-2") == rows[1:3]


def test_youtube_description():
    text = "My training\n\n00:00 Warm up\n1:30 Squats & co\n  1:02:45   The end \n\nMusic: nobody, at 3:00 sharp\n"
    assert parse_segments(text, "youtube", duration=4000) == [
        {"label": "Warm up", "start": 0.0, "end": 90.0},
        {"label": "Squats & co", "start": 90.0, "end": 3765.0},
        {"label": "The end", "start": 3765.0, "end": 4000.0},
    ]


# Bad input


@pytest.mark.parametrize(
    ("format", "text", "message"),
    [
        ("json", '[{"label": "a",\n "start" 1}]', "line 2: not JSON"),
        ("json", '{"a": [], "a": []}', "'a' is there twice"),
        ("json", "3", "found 3, expected a list of rows"),
        ("json", '{"a": {"label": "b"}}', "recording 'a': found .* expected a list of segments"),
        ("json", '[{"label": "a", "start": 1}]', "segment 0: found .* expected one of"),
        ("json", '[{"label": "a", "segment": [1]}]', r"segment 0: found \[1\], expected \[start, end\]"),
        ("json", '{"a": [{"label": "a", "start": 2, "end": 1}]}', "'a', segment 0: the segment ends before it starts"),
        ("json", '[{"label": "a", "start": NaN, "end": 1}]', "segment 0: start must be a finite number, found nan"),
        ("json", '[{"label": "a", "start": 0, "end": Infinity}]', "segment 0: end must be a finite number"),
        ("json", '[{"label": "a", "start": -1, "end": 1}]', "segment 0: start must be 0 or more seconds, found -1"),
        ("json", '[{"label": "a", "start": "0", "end": 1}]', "segment 0: start must be a number, found '0'"),
        ("json", '[{"label": "a", "start": true, "end": 1}]', "segment 0: start must be a number, found True"),
        ("json", '[{"label": 3, "start": 0, "end": 1}]', "segment 0: the label must be text, found 3"),
        ("json", '{"results": {}}', 'Use the format "activitynet"'),
        ("activitynet", "[]", 'found list, expected {"database"'),
        ("activitynet", '{"a": []}', r"found the keys \['a'\], expected"),
        ("activitynet", '{"database": {"a": []}}', r"recording 'a': found \[\], expected"),
        ("activitynet", '{"results": {"a": [{"segment": [1, 2]}]}}', "recording 'a', segment 0: found"),
        ("csv", "", "line 1: the file is empty"),
        ("csv", "label,start\na,1\n", "line 1: no column for end among"),
        ("csv", "label,start,t-start,end\n", "line 1: 'start' and 't-start' are both the start"),
        ("csv", 'label,start,end\n"a\nb",1,2\nc,1\n', "line 4: found 2 cells, expected 3"),
        ("csv", "label,start,end\na,1,two\n", "line 2: end must be a number, found 'two'"),
        ("csv", "label,start,end\na,,2\n", "line 2: start is empty"),
        ("csv", 'label,start,end\n"a,1,2\n', "line 2: not CSV"),
        ("csv", "label,start,end\na,3,2\n", "line 2: the segment ends before it starts, at 2.0 and 3.0"),
        ("audacity", "1.0\t2.0\ta\n\nhello\n", "line 3: found 'hello', expected start, end and label with tabs"),
        ("audacity", "one\t2.0\ta\n", "line 1: start must be a number, found 'one'"),
        ("audacity", "1.0\ttwo\ta\n", "line 1: end must be a number, found 'two'"),
        ("webvtt", "1\n00:00:01,000 --> 00:00:02,000\na\n", "line 1: found '1', expected \"WEBVTT\""),
        ("webvtt", "WEBVTTX\n", "line 1"),
        ("webvtt", "WEBVTT\n\n00:00:01,000 --> 00:00:02.000\na\n", "line 3: the start of the cue is '00:00:01,000'"),
        ("webvtt", "WEBVTT\n\n00:01.000 --> \na\n", "line 3: the end of the cue is ''"),
        ("webvtt", "WEBVTT\n\n00:02.000 --> 00:01.000\na\n", "line 3: the segment ends before it starts"),
        ("youtube", "0:00 a\n0:30 b\n0:20 c\n", "line 3: chapters must rise, found '0:20 c' after '0:30 b'"),
        ("youtube", "0:00 a\n1:41 b\n", "line 2: a chapter begins at 101.0 s, but the duration is 100 s"),
        ("youtube", "hello", 'expected lines such as "0:00 Title"'),
        ("elan", "a\t00:00:01.000\t00:00:02.000\tx\na\tb\n", "line 2: found 2 cells, expected 4 as in line 1"),
        ("elan", "a\t1000\t2000\t1000\tx\n", "line 1: found no columns of begin and end"),
        (
            "elan",
            "Begin Time - ss.msec\tEnd Time - ss.msec\ta\n1.0\tx\ty\n",
            "line 2: time must be a number, found 'x'",
        ),
    ],
)
def test_bad_text(format, text, message):
    options = {"duration": 100} if format == "youtube" else {}
    with pytest.raises(ValueError, match=message):
        parse_segments(text, format, **options)


@pytest.mark.parametrize(
    ("format", "segments", "options", "message"),
    [
        ("srt", [], {}, "there is no format 'srt'. There are 'activitynet'"),
        ("csv", [], {"tier": "a"}, r"'csv' has no option 'tier' here. It has \[\]"),
        ("webvtt", {"a": [], "b": []}, {}, r"'webvtt' holds one recording, but there are 2 \('a', 'b'\)"),
        ("activitynet", ROWS, {}, 'give recording="the name"'),
        ("activitynet", {"a": [ROWS[0], TRUTH[1]]}, {}, "recording 'a', segment 1: results need a score"),
        ("activitynet", {"a": TRUTH}, {"durations": {}}, "recording 'a': its duration is not given"),
        ("json", [{"label": "a", "start": 0.0, "end": math.inf}], {}, "segment 0: end must be a finite number"),
        ("json", [{"label": "\ud800", "start": 0.0, "end": 1.0}], {}, "segment 0: .* half of a surrogate pair"),
        ("json", {"segments": [[0, 1]], "labels": [0]}, {}, "recording 'segments', segment 0: found"),
        ("json", {"segments": np.zeros((1, 2))}, {}, "become rows with to_rows"),
        ("audacity", [{"label": "a\tb", "start": 0.0, "end": 1.0}], {}, r"cannot hold '\\t', as in 'a\\tb'"),
        ("elan", [{"label": "a\nb", "start": 0.0, "end": 1.0}], {}, r"cannot hold '\\n', as in 'a\\nb'"),
        ("elan", [], {"tier": "00:00:01.000"}, "the tier needs a name"),
        ("webvtt", [{"label": "a\rb", "start": 0.0, "end": 1.0}], {}, r"WebVTT cannot hold '\\r'"),
        (
            "webvtt",
            TRUTH,
            {"with_scores": True},
            "with_scores needs a score in every row; the segment 'press' at 3.0 s",
        ),
        ("youtube", [{"label": " ", "start": 0.0, "end": 1.0}], {}, "the label ' ' cannot be a chapter"),
        ("youtube", [{"label": "a < b", "start": 0.0, "end": 1.0}], {}, "A YouTube description cannot hold '<'"),
        ("youtube", ROWS, {"duration": 20}, "the duration is 20 seconds, but a segment ends at 20.5"),
    ],
)
def test_bad_segments(format, segments, options, message):
    with pytest.raises(ValueError, match=message):
        format_segments(segments, format, **options)


def test_youtube_needs_the_duration():
    with pytest.raises(ValueError, match="Give duration="):
        parse_segments("0:00 a\n", "youtube")


def test_with_scores_refuses_labels_without_a_score():
    with pytest.raises(ValueError, match="line 1: score must be a number, found 'label'"):
        parse_segments("0.0\t1.0\tpoint label\n", "audacity", with_scores=True)


# Files


def test_documentation_has_all_formats():
    page = (Path(__file__).resolve().parent.parent / "docs" / "segments.md").read_text(encoding="utf-8")
    for name, entry in FORMATS.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f'| `"{name}"`')]
        _, _, suffix, recordings, _times, scores, labels, _ = [cell.strip() for cell in line.split("|")]
        assert suffix == entry.suffix
        assert ("several" in recordings) == entry.recordings
        assert scores.startswith("exact") == entry.scores
        assert (labels == "any") == entry.labels


@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"youtube"}))
def test_files_are_found_by_suffix_and_content(tmp_path, format):
    entry = FORMATS[format]
    segments = {"one": TRUTH} if entry.recordings else in_order(TRUTH)
    path = write_segments(tmp_path / "new" / f"segments{entry.suffix}", segments, format)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing temporary is left
    assert read_segments(path) == segments


def test_chapters_are_found_by_content(tmp_path):
    path = tmp_path / "description.txt"
    path.write_text("Hello\n0:00 a\n0:10 b\n0:30 c\n", encoding="utf-8")
    assert [row["label"] for row in read_segments(path, duration=60)] == ["a", "b", "c"]


def test_nothing_temporary_is_left_where_writing_fails(tmp_path):
    (tmp_path / "cues.vtt").mkdir()
    with pytest.raises(OSError, match="cues"):
        write_segments(tmp_path / "cues.vtt", ROWS)
    assert [file.name for file in tmp_path.iterdir()] == ["cues.vtt"]


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_bytes("label,start,end\nr\u00e9p\u00e9,1,2\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels\.csv: line 2: byte 0xe9 is not UTF-8"):
        read_segments(path)
    path.write_text("label,start,end\na,1,x\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"labels\.csv: line 2: end must be a number"):
        read_segments(path)
    with pytest.raises(ValueError, match=r"cues\.vtt: 'webvtt' holds one recording"):
        write_segments(tmp_path / "cues.vtt", {"a": [], "b": []})
    assert not (tmp_path / "cues.vtt").exists()
    write_segments(tmp_path / "rows.json", ROWS)
    assert json.loads((tmp_path / "rows.json").read_text(encoding="utf-8")) == ROWS
    for name in ("labels.txt", "labels.mp4"):
        with pytest.raises(ValueError, match=f"{name}: the suffix .* does not say the format. Give format="):
            write_segments(tmp_path / name, ROWS)
    (tmp_path / "labels.txt").write_text("hello\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"one of 'audacity', 'youtube', 'elan'"):
        read_segments(tmp_path / "labels.txt")


# Arrays


@given(segments=st.dictionaries(st.text(max_size=3), rows_of(st.sampled_from("abc"), SCORES), max_size=3))
@QUICK
def test_arrays_and_back(segments):
    id2label = {2: "a", 0: "b", 7: "c"}
    label2id = {name: label for label, name in id2label.items()}
    assert to_rows(to_arrays(segments, label2id), id2label) == segments
    for rows in segments.values():
        assert to_rows(to_arrays(rows, label2id), id2label) == rows


def test_arrays_are_what_the_evaluation_takes():
    label2id = {"squat": 0, "press": 1}
    truth = to_arrays({"a": TRUTH, "b": []}, label2id)
    assert "scores" not in truth["a"]
    assert evaluate_detections(to_arrays({"a": ROWS, "b": []}, label2id), truth).average_map == 1.0


def test_arrays_that_do_not_fit():
    names = {0: "a"}
    with pytest.raises(ValueError, match="recording 'x': 'labels' is missing"):
        to_rows({"x": {"segments": [[0, 1]]}}, names)
    with pytest.raises(ValueError, match=r"expected segments \(N, 2\)"):
        to_rows({"segments": [[0, 1]], "labels": [0, 0]}, names)
    with pytest.raises(ValueError, match="labels must be whole numbers"):
        to_rows({"segments": [[0, 1]], "labels": [0.5]}, names)
    with pytest.raises(ValueError, match=r"segment 0: id2label has no class 3. It has \[0\]"):
        to_rows({"segments": [[0, 1]], "labels": [3]}, names)
    with pytest.raises(ValueError, match="segment 0: the segment ends before it starts"):
        to_rows({"segments": [[2, 1]], "labels": [0]}, names)
    with pytest.raises(ValueError, match=r"segment 0: label2id has no 'squat'\. It has"):
        to_arrays(ROWS, {"a": 0})
    with pytest.raises(ValueError, match="segment 1: all rows of a recording have a score, or none"):
        to_arrays([ROWS[0], TRUTH[1]], {"squat": 0, "press": 1})
