"""Segments to and from the files of other tools: evaluation servers, spreadsheets, annotation tools, players.

    write_segments("session.vtt", localize("session.npy"))           # what the pipeline found, beside the video
    truth = read_segments("labels.txt", "audacity")                  # what a person marked, as rows
    predictions = to_arrays(rows, config.label2id)                   # as evaluation.py and visualization.py take it

Rows are what `pipeline("temporal-action-localization")` gives for a recording: a list of `{"label": str, "score":
float, "start": float, "end": float}`, times in seconds. Annotated truth has no "score". Other keys of a row are left
out. Several recordings are `{recording name: rows}`.

What was written comes back in the same shape: a list for one recording without a name, a dict `{recording name: rows}`
where the text names its recordings. So "audacity", "webvtt", "youtube" and "elan" always give a list, "activitynet"
always a dict, "json" and "csv" what they were written from (in CSV the column "recording" decides).

"json", "csv" and "activitynet" keep the order of the rows and every float exactly. The others are written in order of
start, with rounded times, and without scores unless `with_scores=True`. A label that a format cannot hold is refused,
never changed ("youtube" alone loses more; its writer says what). Bad input is a ValueError that names the line or the
recording and the index of the segment, counted from 0.
"""

import csv
import html
import inspect
import io
import json
import math
import numbers
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = [
    "FORMATS",
    "Format",
    "format_segments",
    "parse_segments",
    "read_segments",
    "to_arrays",
    "to_rows",
    "write_segments",
]

Rows = list[dict]
Segments = Rows | dict[str, Rows]


@dataclass(frozen=True)
class Format:
    """A text format of segments.

    Attributes:
        suffix: of its files. Several formats share ".json" and ".txt".
        description: one line.
        recordings: it can hold several recordings, under their names.
        scores: it keeps scores exactly. Of the others, those that take `with_scores` can append them to the labels.
        labels: it keeps any label. The others refuse the ones that they cannot hold.
        write: rows (or `{name: rows}`, if `recordings`) and options to text.
        read: text and options to rows or `{name: rows}`.
    """

    suffix: str
    description: str
    recordings: bool
    scores: bool
    labels: bool
    write: Callable[..., str]
    read: Callable[..., Segments] | None


def format_segments(segments: Segments, format: str, **options) -> str:
    """The text of segments in a format.

    Args:
        segments: rows of one recording, or `{recording name: rows}`. For a format of one recording the dict may hold
            one entry, whose name is lost.
        format: a key of `FORMATS`.
        options: those of the format's writer, e.g. `with_scores` ("audacity", "webvtt", "elan"), `tier` ("elan"),
            `duration` and `gap` ("youtube"), `kind`, `recording`, `subset`, `durations` ("activitynet").

    Raises:
        ValueError: an unknown format or option; rows that are not rows; times that are negative, not finite or in the
            wrong order; several recordings for a format of one; a label or a score that the format cannot hold.
    """
    entry = _entry(format)
    segments = _checked(segments)
    if isinstance(segments, dict) and not entry.recordings:
        if len(segments) != 1:
            able = ", ".join(repr(name) for name, other in FORMATS.items() if other.recordings)
            raise ValueError(
                f"{format!r} holds one recording, but there are {len(segments)} ({', '.join(map(repr, segments))}). "
                f"Write a file for each one, or use one of {able}."
            )
        (segments,) = segments.values()
    return _call(entry.write, segments, options, format)


def parse_segments(text: str, format: str, **options) -> Segments:
    """The segments in a text: rows, or `{recording name: rows}` if the text names its recordings (see the module).

    Args:
        text: what `format_segments` or another tool wrote.
        format: a key of `FORMATS`.
        options: those of the format's reader, e.g. `with_scores` ("audacity", "webvtt", "elan"), `tier` ("elan"),
            `duration` and `gap` ("youtube"), `subset` ("activitynet").

    Raises:
        ValueError: an unknown format or option, or a text that is not in the format. Names the line, or the recording
            and the index of the segment.
    """
    entry = _entry(format)
    if entry.read is None:
        raise ValueError(f"{format!r} can be written, but not read.")
    return _call(entry.read, text.removeprefix("\ufeff"), options, format)


def write_segments(path: str | Path, segments: Segments, format: str | None = None, **options) -> Path:
    """Writes segments into a file (UTF-8, under a temporary name, then renamed).

    Args:
        path: file to write; its folder is made if needed.
        segments, options: see `format_segments`.
        format: default: by the suffix (.json: the pipeline's rows); .txt, which several formats have, needs the name.

    Returns:
        the path.

    Raises:
        ValueError: see `format_segments`; or several formats or none have the suffix.
    """
    path = Path(path)
    format = format or _by_suffix(path, text=None)
    with _naming(path):
        text = format_segments(segments, format, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")  # the formats say where lines end
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_segments(path: str | Path, format: str | None = None, **options) -> Segments:
    """Reads the segments of a file (UTF-8, with or without a byte order mark).

    Args:
        path: file to read.
        format: default: by the suffix, and by the content where several formats share it (.json, .txt).
        options: see `parse_segments`.

    Returns:
        rows, or `{recording name: rows}` if the file names its recordings.

    Raises:
        ValueError: see `parse_segments`; the file is not UTF-8, or its format is not clear. Names the file.
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}: line {line}: byte 0x{content[error.start]:02x} is not UTF-8. Save the file as UTF-8 (in Excel: "
            '"CSV UTF-8").'
        ) from None
    format = format or _by_suffix(path, text)
    with _naming(path):
        return parse_segments(text, format, **options)


def to_rows(arrays: Mapping, id2label: Mapping[int, str]) -> Segments:
    """Predictions or truth as rows.

    Args:
        arrays: `{"segments": (N, 2) seconds, "labels": (N,) class ids, "scores": (N,) if there are any}` (arrays, lists
            or CPU tensors; other keys are left out), or `{recording name: such a dict}`.
        id2label: names of the classes, e.g. `config.id2label`.

    Returns:
        rows in the order given, or `{recording name: rows}`.

    Raises:
        ValueError: a missing key, lengths that differ, a label without a name, times that are not segments.
    """
    if isinstance(arrays, Mapping) and isinstance(arrays.get("segments", {}), Mapping):
        return {name: _to_rows(one, id2label, f"recording {name!r}: ") for name, one in arrays.items()}
    return _to_rows(arrays, id2label, "")


def _to_rows(arrays: Mapping, id2label: Mapping[int, str], where: str) -> Rows:
    missing = [key for key in ("segments", "labels") if not isinstance(arrays, Mapping) or key not in arrays]
    if missing:
        raise ValueError(f'{where}{missing[0]!r} is missing. Expected {{"segments": (N, 2), "labels": (N,)}}.')
    segments, labels = np.asarray(arrays["segments"], dtype=np.float64), np.asarray(arrays["labels"])
    scores = None if arrays.get("scores") is None else np.asarray(arrays["scores"], dtype=np.float64)
    segments = segments.reshape(-1, 2) if segments.size == 0 else segments
    shapes = [segments.shape, labels.shape, labels.shape if scores is None else scores.shape]
    if shapes != [(labels.size, 2), (labels.size,), (labels.size,)]:
        raise ValueError(f"{where}expected segments (N, 2), labels (N,) and scores (N,), found {shapes}.")
    if labels.size and labels.dtype.kind not in "iu":
        raise ValueError(f"{where}labels must be whole numbers (class ids), found {labels.dtype}.")
    rows = []
    for index, ((start, end), label) in enumerate(zip(segments.tolist(), labels.tolist(), strict=True)):
        if label not in id2label:
            raise ValueError(f"{where}segment {index}: id2label has no class {label}. It has {sorted(id2label)}.")
        score = None if scores is None else scores[index].item()
        rows.append(_row(id2label[label], start, end, score, f"{where}segment {index}"))
    return rows


def to_arrays(segments: Segments, label2id: Mapping[str, int]) -> dict:
    """Rows as `evaluate_detections` and `plot_timeline` take them.

    Args:
        segments: rows, or `{recording name: rows}`.
        label2id: class ids of the names, e.g. `config.label2id`.

    Returns:
        `{"segments": (N, 2) float64 seconds, "labels": (N,) int64, "scores": (N,) float64}`, or a dict of these by
        recording. Without "scores" if the rows have none.

    Raises:
        ValueError: what is not rows; a label without id; scores in some rows of a recording only.
    """
    segments = _checked(segments)
    if isinstance(segments, dict):
        return {name: _to_arrays(rows, label2id, f"recording {name!r}, ") for name, rows in segments.items()}
    return _to_arrays(segments, label2id, "")


def _to_arrays(rows: Rows, label2id: Mapping[str, int], where: str) -> dict[str, np.ndarray]:
    for index, row in enumerate(rows):
        if row["label"] not in label2id:
            raise ValueError(f"{where}segment {index}: label2id has no {row['label']!r}. It has {list(label2id)}.")
        if ("score" in row) != ("score" in rows[0]):
            raise ValueError(f"{where}segment {index}: all rows of a recording have a score, or none.")
    arrays = {
        "segments": np.array([(row["start"], row["end"]) for row in rows], dtype=np.float64).reshape(-1, 2),
        "labels": np.array([label2id[row["label"]] for row in rows], dtype=np.int64),
    }
    if not rows or "score" in rows[0]:
        arrays["scores"] = np.array([row["score"] for row in rows], dtype=np.float64)
    return arrays


# What a row is


def _row(label, start: float, end: float, score: float | None, where: str) -> dict:
    """A checked row; `where` begins the message of an error."""
    if not isinstance(label, str):
        raise ValueError(f"{where}: the label must be text, found {label!r}.")
    _check_unicode(label, where)
    start, end = _number(start, "start", where), _number(end, "end", where)
    if start < 0:
        raise ValueError(f"{where}: start must be 0 or more seconds, found {start}.")
    if end < start:
        raise ValueError(f"{where}: the segment ends before it starts, at {end} and {start} seconds. Swap them.")
    scored = {} if score is None else {"score": _number(score, "score", where)}
    return {"label": label, **scored, "start": start, "end": end}


def _number(value, name: str, where: str) -> float:
    """A finite float of a number or of the text of one."""
    try:
        if (
            isinstance(value, bool)
            or not isinstance(value, numbers.Real | str)
            or (isinstance(value, str) and "_" in value)
        ):
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{where}: {name} must be a number, found {value!r}.") from None
    if not math.isfinite(number):
        raise ValueError(f"{where}: {name} must be a finite number, found {number}.")
    return number


def _check_unicode(text: str, where: str):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {text!r} holds half of a surrogate pair, which no file can hold.") from None


def _checked(segments: Segments) -> Segments:
    """A copy of rows or `{name: rows}`, in which every row is one."""
    if not isinstance(segments, Mapping):
        return _checked_rows(segments, "")
    for name in segments:
        if not isinstance(name, str):
            raise ValueError(f"names of recordings must be text, found {name!r}.")
        _check_unicode(name, "name of a recording")
    return {name: _checked_rows(rows, f"recording {name!r}") for name, rows in segments.items()}


def _checked_rows(rows: Rows, where: str) -> Rows:
    shape = '[{"label": text, "score": number, "start": seconds, "end": seconds}, ...] (score may be missing)'
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise ValueError(
            f"{where + ': ' if where else ''}found {type(rows).__name__}, expected rows: {shape}, or {{name: rows}}. "
            "Arrays of segments and labels become rows with to_rows."
        )
    checked = []
    for index, row in enumerate(rows):
        place = f"{where}, segment {index}" if where else f"segment {index}"
        if not isinstance(row, Mapping) or not {"label", "start", "end"} <= row.keys():
            raise ValueError(f"{place}: found {_short(row)}, expected one of {shape}.")
        for key in ("start", "end", "score"):
            if isinstance(row.get(key), str):
                raise ValueError(f"{place}: {key} must be a number, found {row[key]!r}.")
        checked.append(_row(row["label"], row["start"], row["end"], row.get("score"), place))
    return checked


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ActivityNet and JSON


def _write_activitynet(
    segments: Segments,
    recording: str | None = None,
    kind: str | None = None,
    subset: str | Mapping[str, str] | None = None,
    durations: Mapping[str, float] | None = None,
) -> str:
    """ActivityNet's JSON, exact.

    Args:
        recording: the name, for rows without one.
        kind: "results" or "truth" (then scores are left out); default: results if the rows have scores.
        subset: of truth: one for all, or by name. data.py and ActivityNet's own evaluation need it.
        durations: of truth: seconds of each recording, by name. data.py needs them.
    """
    if isinstance(segments, list):
        if recording is None:
            raise ValueError(
                'ActivityNet\'s JSON names its recordings. Write {name: rows}, or give recording="the name".'
            )
        segments = {recording: segments}
    scored = {"score" in row for rows in segments.values() for row in rows}
    if kind is None:
        kind = "results" if True in scored else "truth"
    if kind not in ("results", "truth"):
        raise ValueError(f'kind must be "results" or "truth", found {kind!r}.')
    if kind == "results":
        for name, rows in segments.items():
            for index, row in enumerate(rows):
                if "score" not in row:
                    raise ValueError(
                        f'recording {name!r}, segment {index}: results need a score in every row. Use kind="truth" to '
                        "write annotations without scores."
                    )
        results = {
            name: [
                {"label": row["label"], "score": row["score"], "segment": [row["start"], row["end"]]} for row in rows
            ]
            for name, rows in segments.items()
        }
        return _to_json({"version": "VERSION 1.3", "results": results, "external_data": {}})
    database = {}
    for name, rows in segments.items():
        entry = {}
        for key, given in (("subset", subset), ("duration", durations)):
            if isinstance(given, Mapping) and name not in given:
                raise ValueError(f"recording {name!r}: its {key} is not given. Known: {list(given)}.")
            if given is not None:
                entry[key] = given[name] if isinstance(given, Mapping) else given
        annotations = [{"segment": [row["start"], row["end"]], "label": row["label"]} for row in rows]
        database[name] = entry | {"annotations": annotations}
    return _to_json({"version": "VERSION 1.3", "database": database})


def _read_activitynet(text: str, subset: str | None = None) -> dict[str, Rows]:
    """ActivityNet's JSON: ground truth ("database") or results.

    Args:
        subset: read the recordings of this subset of the ground truth; default: all.
    """
    content = _from_json(text)
    expected = (
        '{"database": {name: {"annotations": [{"segment": [start, end], "label": text}]}}} or {"results": {name: '
        '[{"label": text, "score": number, "segment": [start, end]}]}}'
    )
    kinds = [kind for kind in ("database", "results") if isinstance(content, dict) and kind in content]
    if len(kinds) != 1 or not isinstance(content[kinds[0]], dict):
        found = f"the keys {list(content)}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"found {found}, expected {expected}.")
    entries = content[kinds[0]]
    if kinds == ["results"]:
        if subset is not None:
            raise ValueError("results have no subsets. Leave subset out.")
        return {name: _json_rows(rows, f"recording {name!r}") for name, rows in entries.items()}
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise ValueError(f"recording {name!r}: found {_short(entry)}, expected {expected}.")
    if subset is not None:
        known = sorted({str(entry.get("subset")) for entry in entries.values()})
        entries = {name: entry for name, entry in entries.items() if entry.get("subset") == subset}
        if not entries:
            raise ValueError(f"no recording has the subset {subset!r}. There are {known}.")
    return {name: _json_rows(entry.get("annotations", []), f"recording {name!r}") for name, entry in entries.items()}


def _write_json(segments: Segments) -> str:
    """The rows as they are, or `{name: rows}`; exact."""
    return _to_json(segments)


def _read_json(text: str) -> Segments:
    """The pipeline's rows, or `{name: rows}`. A row may hold "segment": [start, end] in place of "start" and "end"."""
    content = _from_json(text)
    if isinstance(content, list):
        return _json_rows(content, "")
    if not isinstance(content, dict):
        raise ValueError(f"found {_short(content)}, expected a list of rows, or {{name: rows}}.")
    if _is_activitynet(content):
        raise ValueError('this is ActivityNet\'s JSON. Use the format "activitynet".')
    return {name: _json_rows(rows, f"recording {name!r}") for name, rows in content.items()}


def _is_activitynet(content) -> bool:
    return isinstance(content, dict) and any(isinstance(content.get(key), dict) for key in ("database", "results"))


def _json_rows(rows, where: str) -> Rows:
    """Rows whose times are under "start" and "end", or together under "segment"."""
    if not isinstance(rows, list):
        raise ValueError(f"{where + ': ' if where else ''}found {_short(rows)}, expected a list of segments.")
    spread = []
    for index, row in enumerate(rows):
        if isinstance(row, dict) and "segment" in row:
            segment = row["segment"]
            if not isinstance(segment, list) or len(segment) != 2:
                place = f"{where}, segment {index}" if where else f"segment {index}"
                raise ValueError(f"{place}: found {_short(segment)}, expected [start, end] in seconds.")
            row = row | {"start": segment[0], "end": segment[1]}
        spread.append(row)
    return _checked_rows(spread, where)


def _to_json(content) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _from_json(text: str):
    def unique(pairs: list[tuple]) -> dict:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} is there twice in one object. Keep one of them.")
        return content

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: not JSON ({error.msg}, column {error.colno}).") from None


# CSV

_COLUMNS = {  # without case, spaces, "-" and "_"
    "recording": {"recording", "recordingid", "recordingname", "video", "videoid", "videoname", "file", "filename"},
    "label": {"label", "labelname", "class", "classname", "action", "activity", "category"},
    "score": {"score", "confidence", "probability"},
    "start": {"start", "startseconds", "starttime", "tstart", "segmentstart", "begin", "begintime"},
    "end": {"end", "endseconds", "endtime", "tend", "segmentend", "stop", "stoptime"},
}


def _write_csv(segments: Segments) -> str:
    """A header, then a line for each segment (RFC 4180); floats and labels exact, the score is empty where there is
    none.

    The column "recording" is there for `{name: rows}`. A recording without segments is a line with nothing but its
    name.
    """
    named = isinstance(segments, dict)
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)  # its "\r\n" makes it quote both characters in labels
    writer.writerow(["recording"] * named + ["label", "score", "start", "end"])
    for name, rows in segments.items() if named else [("", segments)]:
        if named and not rows:
            writer.writerow([name, "", "", "", ""])
        for row in rows:
            score = repr(row["score"]) if "score" in row else ""
            writer.writerow([name] * named + [row["label"], score, repr(row["start"]), repr(row["end"])])
    return buffer.getvalue()


def _read_csv(text: str) -> Segments:
    """CSV with a header: label, start, end and, if there, recording and score, in any order, under common names (such
    as video-id, t-start, t-end); other columns are left out. The header says what separates the cells: a comma,
    semicolon or tab. Beside semicolons and tabs, numbers may have a decimal comma, as spreadsheets in many languages
    write them.
    """
    first, _, rest = text.partition("\n")
    skipped = 0
    if re.fullmatch(r"sep=.\r?", first):  # a line for Excel
        text, skipped = rest, 1
        first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns, width, named = None, 0, {}
    while True:
        where = f"line {reader.line_num + 1 + skipped}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{where}: not CSV ({error}).") from None
        if cells is None:
            break
        if not cells:
            continue
        if columns is None:
            columns, width = _columns(cells, where), len(cells)
            continue
        if len(cells) != width:
            raise ValueError(f"{where}: found {len(cells)} cells, expected {width} as in the header.")
        cell = {column: cells[index] for column, index in columns.items()}
        rows = named.setdefault(cell.get("recording"), [])
        if "recording" in cell and not any(cell[column] for column in cell if column != "recording"):
            continue  # a recording without segments
        times = {}
        for column in ("start", "end", "score"):
            if cell.get(column, "").strip():
                value = cell[column]
                times[column] = _number(value if delimiter == "," else value.replace(",", "."), column, where)
            elif column != "score":
                raise ValueError(f"{where}: {column} is empty, expected seconds.")
        rows.append(_row(cell["label"], times["start"], times["end"], times.get("score"), where))
    if columns is None:
        raise ValueError("line 1: the file is empty, expected a header such as recording,label,score,start,end.")
    return named if "recording" in columns else named.get(None, [])


def _columns(header: list[str], where: str) -> dict[str, int]:
    """The index of each column that is known."""
    columns = {}
    for index, name in enumerate(header):
        plain = re.sub(r"[\s_-]", "", name.lower())
        for column, names in _COLUMNS.items():
            if plain in names:
                if column in columns:
                    raise ValueError(
                        f"{where}: {header[columns[column]]!r} and {name!r} are both the {column}; keep one."
                    )
                columns[column] = index
    missing = [column for column in ("label", "start", "end") if column not in columns]
    if missing:
        raise ValueError(
            f"{where}: no column for {' and '.join(missing)} among {header}. Expected a header such as "
            "recording,label,score,start,end (recording and score may be missing)."
        )
    return columns


# Lines of text with times


def _in_order(rows: Rows) -> Rows:
    return sorted(rows, key=lambda row: (row["start"], row["end"]))


def _lines(text: str) -> list[str]:
    # Not splitlines: that also cuts at characters which labels may hold, such as U+2028.
    return re.split(r"\r\n|\r|\n", text)


def _check_label(label: str, forbidden: str, format: str):
    found = [character for character in forbidden if character in label]
    if found:
        raise ValueError(f"{format} cannot hold {found[0]!r}, as in {_short(label)}. Rename it, or use JSON or CSV.")


def _caption(row: dict, with_scores: bool) -> str:
    """The label; with scores: the label, a space and the score to four decimals."""
    if not with_scores:
        return row["label"]
    if "score" not in row:
        raise ValueError(
            f"with_scores needs a score in every row; the segment {row['label']!r} at {row['start']} s has none."
        )
    return f"{row['label']} {round(row['score'], 4)}"


def _uncaption(text: str, with_scores: bool, where: str) -> tuple[str, float | None]:
    """The label and the score of a caption. Only what `with_scores` appended is taken off, so that a label which itself
    ends in a number keeps it."""
    if not with_scores:
        return text, None
    label, space, score = text.rpartition(" ")
    if not space:
        raise ValueError(f"{where}: with_scores expects a label, a space and a score, found {text!r}.")
    return label, _number(score, "score", where)


def _milliseconds(row: dict) -> tuple[int, int]:
    """Start and end, rounded. A cue of WebVTT and an annotation of ELAN must end after they start: a segment that would
    have no length gets a millisecond."""
    start = round(row["start"] * 1000)
    return start, max(round(row["end"] * 1000), start + 1)


def _clock(milliseconds: int) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}"


def _seconds(hours: str | None, minutes: str, seconds: str, milliseconds: str = "0") -> float:
    whole = int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds)
    return (whole * 1000 + int(milliseconds)) / 1000  # one rounding: the float nearest to the written decimals


# Audacity


def _write_audacity(rows: Rows, with_scores: bool = False) -> str:
    """A label track as Audacity exports and imports it: start, end, label, separated by tabs; six decimals. A label
    cannot hold tabs and ends of lines.

    Args:
        with_scores: append a space and the score (four decimals) to the label.
    """
    lines = []
    for row in _in_order(rows):
        _check_label(row["label"], "\t\r\n", "Audacity's label track")
        lines.append(f"{row['start']:.6f}\t{row['end']:.6f}\t{_caption(row, with_scores)}\n")
    return "".join(lines)


def _read_audacity(text: str, with_scores: bool = False) -> Rows:
    """A label track that Audacity exported. Frequency ranges (lines that begin with a backslash) are left out. A label
    at a point is a segment of length 0; so is the "start, label" of Audacity 1.2.

    Args:
        with_scores: the labels end in a space and a score, as `with_scores` writes them.
    """
    rows = []
    for number, line in enumerate(_lines(text), 1):
        where = f"line {number}"
        if not line.strip() or line.startswith("\\"):
            continue
        start, *rest = line.split("\t", 2)
        if not rest:
            raise ValueError(f"{where}: found {_short(line)}, expected start, end and label with tabs between them.")
        end, label = rest[0], rest[1] if len(rest) > 1 else ""
        if len(rest) == 1 and not _is_number(end):
            end, label = start, end  # Audacity 1.2
        label, score = _uncaption(label, with_scores, where)
        rows.append(_row(label, _number(start, "start", where), _number(end, "end", where), score, where))
    return rows


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# WebVTT

_CUE_TIME = re.compile(r"(?:(\d+):)?([0-5]\d):([0-5]\d)\.(\d{3})", re.ASCII)


def _write_webvtt(rows: Rows, with_scores: bool = False) -> str:
    """WebVTT, a cue for each segment, whose text is the label: chapters or metadata of a `<track>`.

    Times are rounded to a millisecond; a segment that would have no length gets one. "&", "<" and ">" are escaped. A
    label of several lines stays so; empty lines, which would end the cue, and "\\r" and NUL cannot be held.

    Args:
        with_scores: append a space and the score (four decimals) to the label.
    """
    cues = ["WEBVTT\n"]
    for row in _in_order(rows):
        _check_label(row["label"], "\r\0", "WebVTT")
        text = _caption(row, with_scores)
        if text and "" in text.split("\n"):
            raise ValueError(
                f"WebVTT cannot hold the label {_short(row['label'])}: an empty line would end its cue. Rename it, or "
                "use JSON or CSV."
            )
        start, end = _milliseconds(row)
        payload = html.escape(text, quote=False) + "\n" if text else ""
        cues.append(f"{_clock(start)} --> {_clock(end)}\n{payload}")
    return "\n".join(cues)


def _read_webvtt(text: str, with_scores: bool = False) -> Rows:
    """The cues of a WebVTT file (https://www.w3.org/TR/webvtt1/). Ids, settings, tags such as `<v Name>`, and the
    blocks NOTE, STYLE and REGION are left out.

    Args:
        with_scores: the labels end in a space and a score, as `with_scores` writes them.
    """
    lines = _lines(text)
    if not re.match(r"WEBVTT(?:[ \t]|$)", lines[0]):
        raise ValueError(f'line 1: found {_short(lines[0])}, expected "WEBVTT": without it, it is not a WebVTT file.')
    rows, index = [], 1
    while index < len(lines):
        if "-->" not in lines[index]:  # an id, a header, or a line of a block that is left out
            index += 1
            continue
        where = f"line {index + 1}"
        start, _, after = lines[index].partition("-->")
        end = after.split()[0] if after.split() else ""
        times = []
        for name, value in (("start", start.strip()), ("end", end)):
            match = _CUE_TIME.fullmatch(value)
            if match is None:
                raise ValueError(
                    f"{where}: the {name} of the cue is {_short(value)}, expected hours:minutes:seconds.milliseconds "
                    "(hours may be missing)."
                )
            times.append(_seconds(*match.groups()))
        index += 1
        payload = []
        while index < len(lines) and lines[index] and "-->" not in lines[index]:
            payload.append(lines[index])
            index += 1
        label = html.unescape(re.sub(r"<[^>]*>?", "", "\n".join(payload)))
        label, score = _uncaption(label, with_scores, where)
        rows.append(_row(label, *times, score, where))
    return rows


# YouTube

_CHAPTER = re.compile(r"\s*(?:(\d+):)?(\d+):([0-5]\d)\s+(\S.*?)\s*", re.ASCII)
_SHORTEST = 10  # seconds of a chapter
_GAP = "…"


def _write_youtube(rows: Rows, duration: float | None = None, gap: str = _GAP) -> str:
    """Chapters for the description of a YouTube video: lines such as `1:02:45 Title`.

    YouTube wants the first chapter at 0:00, at least three, rising, each of at least 10 seconds. Chapters fill the
    video, so much is lost: scores, ends (where no segment is, a chapter `gap` begins), fractions of seconds, segments
    of no length, and overlaps (the segment that began last is shown). Of chapters that begin less than 10 seconds
    apart, the second is put off if 10 seconds of it are left then; otherwise the longer one is shown, from the start of
    the first. A gap of less than 10 seconds goes to the segment after it. Runs of white space in labels become one
    space.

    Args:
        duration: seconds of the video; default: up to the last end.
        gap: title of the time between segments.

    Warns:
        UserWarning: there are fewer than three chapters, which YouTube ignores.
    """
    last = max((row["end"] for row in rows), default=0.0)
    if duration is not None and _number(duration, "duration", "options") < last:
        raise ValueError(f"the duration is {duration} seconds, but a segment ends at {last}.")
    last = last if duration is None else float(duration)
    titles = [" ".join(row["label"].split()) for row in rows]
    for title, row in zip(titles, rows, strict=True):
        _check_label(title, "<>", "A YouTube description")
        if not title or title == gap:
            raise ValueError(f"the label {row['label']!r} cannot be a chapter: a title is needed, other than {gap!r}.")

    # (start, segment or None for a gap) wherever another segment is the one that began last.
    changes = []
    for time in sorted({0.0, *(row["start"] for row in rows), *(row["end"] for row in rows)}):
        running = [index for index, row in enumerate(rows) if row["start"] <= time < row["end"]]
        shown = max(running, key=lambda index: rows[index]["start"], default=None)
        if not changes or (time < last and changes[-1][1] != shown):
            changes.append((time, shown))

    chapters = []  # [second, seconds of the segment or 0 for a gap, title]
    for (time, shown), until in zip(changes, [time for time, _ in changes[1:]] + [last], strict=True):
        chapter = [round(time), 0.0 if shown is None else until - time, gap if shown is None else titles[shown]]
        earliest = chapters[-1][0] + _SHORTEST if chapters else 0
        if chapter[0] >= earliest:
            chapters.append(chapter)
        elif chapters[-1][1] and until - earliest >= _SHORTEST:
            chapters.append([earliest, *chapter[1:]])
        elif chapter[1] > chapters[-1][1]:
            chapters[-1][1:] = chapter[1:]
    latest = math.floor(last) - _SHORTEST
    while len(chapters) > 1 and chapters[-1][0] > latest:
        _, length, title = chapters.pop()
        if length and latest - chapters[-1][0] >= _SHORTEST:
            chapters.append([latest, length, title])
        elif length > chapters[-1][1]:
            chapters[-1][1:] = length, title
    if len(chapters) < 3:
        warnings.warn(f"YouTube shows chapters where there are three or more; these segments give {len(chapters)}.")
    return "".join(f"{_short_clock(second)} {title}\n" for second, _, title in chapters)


def _short_clock(second: int) -> str:
    minutes = f"{second // 60}" if second < 3600 else f"{second // 3600}:{second // 60 % 60:02}"
    return f"{minutes}:{second % 60:02}"


def _read_youtube(text: str, duration: float | None = None, gap: str | None = _GAP) -> Rows:
    """Chapters in the description of a YouTube video, each from its start to the next one's. Lines that do not begin
    with a time are left out.

    Args:
        duration: seconds of the video, where the last chapter ends; needed.
        gap: title of the chapters to leave out, as the writer uses it; None = none.
    """
    if duration is None:
        raise ValueError(
            "chapters have no ends. Give duration=..., the seconds of the video, where the last one ends."
        )
    starts = []
    for number, line in enumerate(_lines(text), 1):
        match = _CHAPTER.fullmatch(line)
        if match is not None:
            start = _seconds(*match.groups()[:3])
            if starts and start <= starts[-1][0]:
                raise ValueError(f"line {number}: chapters must rise, found {_short(line)} after {starts[-1][2]!r}.")
            starts.append((start, number, line, match[4]))
    if not starts:
        raise ValueError('found no chapter, expected lines such as "0:00 Title".')
    if _number(duration, "duration", "options") < starts[-1][0]:
        raise ValueError(
            f"line {starts[-1][1]}: a chapter begins at {starts[-1][0]} s, but the duration is {duration} s."
        )
    ends = [start for start, *_ in starts[1:]] + [float(duration)]
    return [
        _row(title, start, end, None, f"line {number}")
        for (start, number, _, title), end in zip(starts, ends, strict=True)
        if title != gap
    ]


# ELAN

_ELAN_TIME = re.compile(r"(\d+):([0-5]\d):([0-5]\d)\.(\d{3})", re.ASCII)
_ELAN_KINDS = {  # how ELAN names a time format in headers: what its cells look like
    "hh:mm:ss.ms": _ELAN_TIME,
    "ss.msec": re.compile(r"\d+\.\d+(?:E\d+)?", re.ASCII),
    "msec": re.compile(r"\d+", re.ASCII),
}
_ELAN_TIMECODES = re.compile(r"\d+:\d\d:\d\d[:;]\d\d", re.ASCII)


def _write_elan(rows: Rows, tier: str = "segments", with_scores: bool = False) -> str:
    """Tab-delimited text as ELAN exports it, without a header: tier, begin, end, duration (hh:mm:ss.ms), annotation.
    ELAN takes it with File > Import > CSV / Tab-delimited Text File.

    Times are rounded to a millisecond; a segment that would have no length gets one. Annotations of a tier cannot
    overlap in ELAN, so that overlapping segments go to further tiers, "segments-2" and so on. A label cannot hold tabs
    and ends of lines.

    Args:
        tier: name of the tier.
        with_scores: append a space and the score (four decimals) to the label.
    """
    _check_label(tier, "\t\r\n", "ELAN")
    if not tier.strip() or tier.startswith(('"#', "#")) or _elan_kind([tier]) is not None:
        raise ValueError(f"the tier needs a name that is not a number, a time or a comment, found {tier!r}.")
    lines, ends = [], []  # the last end of each tier
    for row in _in_order(rows):
        _check_label(row["label"], "\t\r\n", "ELAN's text")
        start, end = _milliseconds(row)
        lane = next((lane for lane, busy in enumerate(ends) if busy <= start), len(ends))
        ends[lane : lane + 1] = [end]
        name = tier if lane == 0 else f"{tier}-{lane + 1}"
        lines.append("\t".join([name, _clock(start), _clock(end), _clock(end - start), _caption(row, with_scores)]))
    return "".join(line + "\n" for line in lines)


def _read_elan(text: str, tier: str | None = None, with_scores: bool = False) -> Rows:
    """Tab-delimited text that ELAN exported: a line for each annotation (no header; tier, perhaps participant, times,
    annotation), or a column for each tier (with a header). Begin and end in hh:mm:ss.ms or ss.msec are read, with a
    header also msec; durations and time codes of video frames are left out.

    Args:
        tier: read the annotations of this tier; default: of all. (Without a header: the first column.)
        with_scores: the labels end in a space and a score, as `with_scores` writes them.
    """
    table = [
        (number, line.split("\t"))
        for number, line in enumerate(_lines(text), 1)
        if line.strip() and not line.startswith(('"#', "#"))  # lines that name the media
    ]
    if not table:
        return []
    number, header = table[0]
    times = _elan_header(header)
    if times is not None:
        table = table[1:]
        kind, begin, end = times
        texts = _elan_texts(header)
    for row_number, cells in table:
        if len(cells) != len(header):
            raise ValueError(
                f"line {row_number}: found {len(cells)} cells, expected {len(header)} as in line {number}."
            )
    if times is None:
        kind, begin, end, label = _elan_columns([cells for _, cells in table], number)
        texts = {label: 0 if begin > 0 else None}

    rows, tiers = [], set()
    for row_number, cells in table:
        where = f"line {row_number}"
        for column, named in texts.items():
            name = header[column] if named == -1 else cells[named] if named is not None else ""
            tiers.add(name)
            if (tier is not None and name != tier) or (named == -1 and not cells[column]):
                continue
            label, score = _uncaption(cells[column], with_scores, where)
            start, stop = (_elan_time(cells[index], kind, where) for index in (begin, end))
            rows.append(_row(label, start, stop, score, where))
    if tier is not None and tier not in tiers:
        raise ValueError(f"there is no tier {tier!r}. There are {sorted(tiers)}.")
    return rows


def _elan_kind(cells: Sequence[str]) -> str | None:
    """The time format of a column, if all of its cells are times."""
    return next((kind for kind, cell in _ELAN_KINDS.items() if all(map(cell.fullmatch, cells))), None)


def _elan_columns(table: list[list[str]], number: int) -> tuple[str, int, int, int]:
    """The time format and the columns of begin, end and annotation where no header names them. ELAN writes all begins,
    then all ends, then all durations, then the annotation; text in the last column only, whatever it looks like."""
    columns = list(zip(*table, strict=True))
    kinds = [
        "time code" if all(map(_ELAN_TIMECODES.fullmatch, column)) else _elan_kind(column) for column in columns[:-1]
    ]
    for kind in ("hh:mm:ss.ms", "ss.msec"):
        found = [index for index, other in enumerate(kinds) if other == kind]
        if len(found) >= 2:
            label = found[-1] + 1
            while label < len(kinds) and kinds[label] is not None:  # durations in other formats
                label += 1
            return kind, found[0], found[1], label
    raise ValueError(
        f"line {number}: found no columns of begin and end. Expected tier, begin, end, duration, annotation with tabs "
        "between them, times as hh:mm:ss.ms or ss.msec (tick one of them in ELAN's export)."
    )


def _elan_header(header: list[str]) -> tuple[str, int, int] | None:
    """The time format and the columns of begin and end, if the line is a header. Its words are in the language of ELAN,
    the time formats are not."""
    if any(_elan_kind([cell]) in ("hh:mm:ss.ms", "ss.msec") for cell in header):
        return None
    for kind in _ELAN_KINDS:
        found = [index for index, name in enumerate(header) if name.endswith(f" - {kind}")]
        if len(found) >= 2:
            return kind, found[0], found[1]
    plain = [re.sub(r"[\s_-]", "", name.lower()) for name in header]
    begin, end = (
        [index for index, name in enumerate(plain) if name in _COLUMNS[column]] for column in ("start", "end")
    )
    return ("any", begin[0], end[0]) if begin and end else None


def _elan_texts(header: list[str]) -> dict[int, int | None]:
    """{column of annotations: column of their tiers' names, -1 if the header names the tier, None if nothing does}."""
    plain = [name.strip().lower() for name in header]
    if "annotation" in plain:
        return {plain.index("annotation"): plain.index("tier") if "tier" in plain else None}
    begins = ("begin", "start", "end", "stop", "duration")
    others = [index for index, name in enumerate(plain) if " - " not in name and not name.startswith(begins)]
    return {index: -1 for index in others if plain[index] not in ("tier", "participant")}


def _elan_time(cell: str, kind: str, where: str) -> float:
    match = _ELAN_TIME.fullmatch(cell.strip())
    if match is not None:
        return _seconds(*match.groups())
    if kind == "hh:mm:ss.ms":
        raise ValueError(f"{where}: found the time {cell!r}, expected hh:mm:ss.ms.")
    return _number(cell, "time", where) / (1000 if kind == "msec" else 1)


# The table of formats

FORMATS: dict[str, Format] = {
    "activitynet": Format(
        ".json", "ActivityNet's ground truth and results", True, True, True, _write_activitynet, _read_activitynet
    ),
    "json": Format(".json", "the pipeline's rows, or {name: rows}", True, True, True, _write_json, _read_json),
    "csv": Format(".csv", "recording,label,score,start,end for spreadsheets", True, True, True, _write_csv, _read_csv),
    "audacity": Format(".txt", "label track of Audacity", False, False, False, _write_audacity, _read_audacity),
    "webvtt": Format(".vtt", "WebVTT chapters or metadata", False, False, False, _write_webvtt, _read_webvtt),
    "youtube": Format(".txt", "chapters of a YouTube description", False, False, False, _write_youtube, _read_youtube),
    "elan": Format(".txt", "tab-delimited text of ELAN", False, False, False, _write_elan, _read_elan),
}


def _entry(format: str) -> Format:
    if format not in FORMATS:
        raise ValueError(f"there is no format {format!r}. There are {', '.join(map(repr, FORMATS))}.")
    return FORMATS[format]


def _call(function: Callable, argument, options: dict, format: str):
    known = list(inspect.signature(function).parameters)[1:]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"{format!r} has no option {unknown[0]!r} here. It has {known}.")
    return function(argument, **options)


def _by_suffix(path: Path, text: str | None) -> str:
    """The format of a suffix; where several share it, the one that the text is in."""
    formats = [name for name, entry in FORMATS.items() if entry.suffix == path.suffix.lower()]
    if len(formats) == 1:
        return formats[0]
    if path.suffix.lower() == ".json":
        if text is None:
            return "json"
        try:
            return "activitynet" if _is_activitynet(json.loads(text)) else "json"
        except json.JSONDecodeError:
            return "json"  # whose reader says what is wrong
    if text is not None and formats:
        lines = [line for line in _lines(text) if line.strip() and not line.startswith(('"#', "#", "\\"))]
        cells = lines[0].split("\t") if lines else []
        if len(cells) > 1 and _is_number(cells[0]) and (len(cells) < 4 or not _is_number(cells[2])):
            return "audacity"
        if any(map(_ELAN_TIME.fullmatch, cells)) or _elan_header(cells) is not None:
            return "elan"
        if any(map(_CHAPTER.fullmatch, lines)):
            return "youtube"
    choice = ", ".join(map(repr, formats or FORMATS))
    raise ValueError(f"{path}: the suffix {path.suffix!r} does not say the format. Give format=..., one of {choice}.")


@contextmanager
def _naming(path: Path):
    """Puts the file before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
