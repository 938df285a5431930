"""A page that shows what a model finds: drop a video, features or sensor values, see the segments, play and save them.

    python examples/app.py outputs/watch/model
    python examples/app.py outputs/watch/model someone/their-model --examples recordings/ --port 7861

A model is a folder written by save_pretrained, or a name on the Hub; with several, the page has a choice. The page is
served on this machine only (http://127.0.0.1:7860), asks nothing of any other, and is not shared unless --host says so.
Threshold and NMS change the timeline at once, because the model runs once for each recording. docs/app.md says more.
"""

import argparse
import html
import math
import re
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
from transformers import logging, pipeline

import modeling_convtransformer  # noqa: F401 - registers the pipeline
from modeling_convtransformer.feature_extraction_convtransformer import ARRAY_SUFFIXES
from modeling_convtransformer.features import load_encoder
from modeling_convtransformer.recordings import AUDIO_SUFFIXES, TABLE_SUFFIXES, VIDEO_SUFFIXES
from modeling_convtransformer.segments import format_segments
from modeling_convtransformer.visualization import class_colour

KNOWN = (*VIDEO_SUFFIXES, *AUDIO_SUFFIXES, *TABLE_SUFFIXES, *ARRAY_SUFFIXES)
KINDS = (
    f"a video ({', '.join(VIDEO_SUFFIXES)}), sound ({', '.join(AUDIO_SUFFIXES)}), features ({', '.join(ARRAY_SUFFIXES)}) or sensor "
    f"values ({', '.join((*TABLE_SUFFIXES, *ARRAY_SUFFIXES))})"
)
NMS_METHODS = {"Gaussian soft-NMS": "soft", "Linear soft-NMS": "linear", "Hard NMS": "hard", "None": "none"}
# Name on the button, format of modeling_convtransformer.segments, what follows the recording's name in the file's.
DOWNLOADS = (
    ("JSON", "json", ".json"),
    ("CSV", "csv", ".csv"),
    ("ELAN", "elan", ".elan.txt"),
    ("Chapters", "youtube", ".chapters.txt"),
)
MOST_SEGMENTS = 1000  # without NMS a recording has many thousands, more than anyone can look at
LANES = 6  # segments of one class that overlap are drawn below one another, up to this many
DAY = 24 * 3600  # seconds that dropped files are kept
EMPTY = '<p class="empty">The timeline of your recording comes here.</p>'
LOST = "This page was left alone for long, or its server was started again. Drop the recording again."


# ---------------------------------------------------------------------------------------------------------------------
# Running models


class Cache:
    """
    What was computed last, up to `limit` bytes: features of recordings and outputs of models, so that another model
    does not extract features again, and other settings do not run the model again. Keys name a file's content and what
    read it, so that no session sees what is another's; one whose results have made room for others' waits once more.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._kept: OrderedDict[Hashable, dict] = OrderedDict()
        # One recording is computed at a time: two would each take their memory and half of the processor.
        self._kept_lock, self._compute_lock = threading.Lock(), threading.RLock()

    def get(self, key: Hashable, compute: Callable[[], dict]) -> dict:
        if (found := self._find(key)) is not None:
            return found
        with self._compute_lock:
            if (found := self._find(key)) is not None:
                return found
            found = compute()
        with self._kept_lock:
            self._kept[key] = found
            while len(self._kept) > 1 and sum(map(_count_bytes, self._kept.values())) > self.limit:
                self._kept.popitem(last=False)
        return found

    def _find(self, key: Hashable) -> dict | None:
        with self._kept_lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)


def _count_bytes(computed: dict) -> int:
    return sum(value.nbytes for value in computed.values() if hasattr(value, "nbytes"))


def as_recording(path: Path, feature_extractor, encoder=None) -> str | dict:
    """
    What the pipeline takes. Whether an array is features or raw sensor values, its width says; other files it opens.

    Raises:
        ValueError: a kind of file, or a width, that the model does not take.
    """
    suffix = path.suffix.lower()
    if suffix in (*VIDEO_SUFFIXES, *AUDIO_SUFFIXES):
        if encoder is None and feature_extractor.encoder is None:
            raise ValueError(
                f"{path.name} is a video or sound, and this model does not say which encoder makes its features. Start "
                "the page with --encoder NAME, the encoder that made the features of its training, or drop a file of "
                "features."
            )
        return str(path)
    if suffix in TABLE_SUFFIXES:
        return str(path)
    if suffix not in ARRAY_SUFFIXES:
        kind = f"a {suffix} file" if suffix else "a file without a suffix"
        raise ValueError(f"{path.name} is {kind}. Expected {KINDS}. Convert it, or drop another file.")
    return feature_extractor.as_sample(path)


def run_model(localize, sample: dict) -> dict:
    """The outputs for a sample of `localize.open`, ready for `localize.postprocess`."""
    (inputs,) = localize.preprocess(sample)
    return localize.forward(inputs)


class Stopped(Exception):
    """Nobody waits for it any more."""


@contextmanager
def stoppable(is_wanted: Callable[[], bool]):
    """Whatever shows its progress in this thread (encoders, models on long recordings) raises Stopped once it is not wanted."""
    thread = threading.get_ident()

    def make_bar(factory: Callable, arguments: tuple, options: dict):
        bar = before(factory, arguments, options) if before else factory(*arguments, **options)
        if threading.get_ident() == thread:
            update = bar.update

            def update_or_stop(*steps):
                if not is_wanted():
                    raise Stopped
                return update(*steps)

            bar.update = update_or_stop
        return bar

    before = logging.set_tqdm_hook(make_bar)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def measure(sample: dict) -> float:
    """Seconds of a sample: those that it says, else those that its features cover."""
    covered = (len(sample["features"]) - 1) * sample["feature_stride"] + sample["num_frames"]
    return sample["duration"] or covered / sample["fps"]


# ---------------------------------------------------------------------------------------------------------------------
# Drawing. Everything that a file or a model says is escaped.


def format_time(seconds: float, digits: int = 1) -> str:
    """75.26 -> 1:15.3"""
    units = round(seconds * 10**digits)
    minutes, rest = divmod(units, 60 * 10**digits)
    hours, minutes = divmod(minutes, 60)
    rest = f"{rest / 10**digits:0{3 + digits if digits else 2}.{digits}f}"
    return f"{hours}:{minutes:02}:{rest}" if hours else f"{minutes}:{rest}"


def draw_message(text: str) -> str:
    return f'<div class="message" role="alert">{html.escape(text)}</div>' if text else ""


def draw_player(path: Path | None) -> str:
    tag = next(
        (
            tag
            for tag, kinds in (("video", VIDEO_SUFFIXES), ("audio", AUDIO_SUFFIXES))
            if path and path.suffix.lower() in kinds
        ),
        None,
    )
    if tag is None:
        return ""
    return (
        f'<{tag} controls playsinline preload="metadata" data-path="{html.escape(str(path))}"></{tag}>'
        f'<p class="message" hidden>This browser cannot play {html.escape(path.name)}. The timeline is not '
        f"affected. To play segments, convert it, for example with ffmpeg -i INPUT -pix_fmt yuv420p OUTPUT.mp4, "
        "and drop that.</p>"
    )


def draw_timeline(rows: list[dict], seconds: float, label2id: dict[str, int], threshold: float, most: int) -> str:
    """
    One row for each class that was found, in the order of the model's classes, with a button for each segment; and all
    segments by time. The script of the page finds segments by data-index.

    Args:
        rows: `{"label", "score", "start", "end"}`.
        seconds: length of the recording.
        most: how many segments there can be, so that there may be more where there are so many.
    """
    if not rows:
        return f'<p class="empty">No segment has a score above {threshold:.2f}. A lower threshold may show some.</p>'
    by_class: dict[str, list[int]] = {}
    by_time = sorted(range(len(rows)), key=lambda index: (rows[index]["start"], rows[index]["end"]))
    for index in by_time:
        by_class.setdefault(rows[index]["label"], []).append(index)

    tracks = []
    for label in sorted(by_class, key=label2id.get):
        lanes = _lanes([rows[index] for index in by_class[label]])
        count = max(lanes) + 1
        segments = "".join(
            _draw_segment(index, rows[index], seconds, lane / count, 1 / count)
            for index, lane in zip(by_class[label], lanes, strict=True)
        )
        tracks.append(
            f'<div class="row" style="{_colour(label2id[label])};--lanes:{count}"><span class="label" title="'
            f'{html.escape(label)}">{html.escape(label)}</span><div class="track">{segments}</div></div>'
        )
    items = "".join(
        f'<li><button type="button" data-index="{index}" data-start="{rows[index]["start"]}" '
        f'data-end="{rows[index]["end"]}" style="{_colour(label2id[rows[index]["label"]])}">'
        f'<span class="swatch"></span><span class="time">'
        f"{format_time(rows[index]['start'])} &ndash; {format_time(rows[index]['end'])}</span><span class='name'>"
        f"{html.escape(rows[index]['label'])}</span><span class='score'>{rows[index]['score']:.2f}</span></button></li>"
        for index in by_time
    )
    count = f"{len(rows)} segment{'s' if len(rows) > 1 else ''}"
    count = f"The best {count}" if len(rows) >= most else count
    return f"""
<div class="head"><strong>{count}</strong> above {threshold:.2f} in {format_time(seconds, 0)}
<span class="zoom"><button type="button" data-zoom="0.5" aria-label="Zoom out">&minus;</button><button type="button"
data-zoom="2" aria-label="Zoom in">+</button></span></div>
<div class="scroll" role="group" aria-label="Timeline"><div class="wide"><div class="cursor" hidden></div>
{"".join(tracks)}{_draw_axis(seconds)}</div></div>
<p class="chosen" aria-live="polite">Choose a segment.</p>
<ol class="list" aria-label="Segments by time">{items}</ol>"""


def _draw_segment(index: int, row: dict, seconds: float, top: float, height: float) -> str:
    start, end = (min(max(row[name] / seconds, 0.0), 1.0) for name in ("start", "end"))
    times = f"{format_time(row['start'])} to {format_time(row['end'])}"
    title = html.escape(f"{row['label']}, {times}, score {row['score']:.2f}")
    return (
        f'<button type="button" class="segment" data-index="{index}" data-start="{row["start"]}" '
        f'data-end="{row["end"]}" title="{title}" aria-label="{title}" style="left:{100 * start:.4f}%;'
        f"width:{100 * (end - start):.4f}%;top:{100 * top:.2f}%;height:{100 * height:.2f}%;"
        f'--score:{row["score"]:.4f}"></button>'
    )


def _draw_axis(seconds: float) -> str:
    steps = (0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800)
    step = next((step for step in steps if seconds / step <= 8), 3600 * math.ceil(seconds / 3600 / 8))
    ticks = "".join(
        f'<span style="left:{100 * tick * step / seconds:.4f}%">{format_time(tick * step, int(step < 1))}</span>'
        for tick in range(math.ceil(0.96 * seconds / step))  # (one at the very end would be cut)
    )
    track = f'<span class="label"></span><div class="track">{ticks}</div>'
    return f'<div class="row axis" style="--lanes:1" aria-hidden="true">{track}</div>'


def _lanes(rows: list[dict]) -> list[int]:
    """For each of the segments, in order of their starts, the first lane that is free, or the last if none is."""
    ends, lanes = [], []
    for row in rows:
        lane = next((lane for lane, end in enumerate(ends) if end <= row["start"]), len(ends))
        lane = min(lane, LANES - 1)
        ends[lane : lane + 1] = [row["end"]]
        lanes.append(lane)
    return lanes


def _colour(class_id: int) -> str:
    """Of a class, as in all pictures of this package."""
    return f"--colour:{class_colour(class_id)}"


CSS = """
.html-container { padding: 0; }
.gradio-container { --faint: color-mix(in srgb, var(--body-text-color) 68%, transparent); }
#title h1 { margin: 0; font-size: 1.7rem; font-weight: 700; line-height: 1.2; }
#title p { margin: .2rem 0 0; color: var(--faint); }
#message:not(:has(.message)), #player:not(:has([data-path])) { display: none; }
#player [hidden] { display: none; }
#player [data-path]:not([hidden]) { width: 100%; max-height: 52vh; border-radius: var(--block-radius); display: block; }
#player video { background: #000; }
.message { padding: .7rem .9rem; border-radius: var(--block-radius); border: 1px solid var(--error-border-color);
  background: var(--error-background-fill); color: var(--error-text-color); white-space: pre-line;
  overflow-wrap: anywhere; }
#takes { font-size: .85rem; line-height: 1.4; color: var(--faint); }
#timeline button { color: inherit; font: inherit; background: none; border: 0; cursor: pointer; }
#timeline .empty { padding: 4.5rem 1rem; text-align: center; color: var(--faint); margin: 0;
  border: 1px dashed var(--border-color-primary); border-radius: var(--block-radius); }
#timeline .head { display: flex; gap: .35em; align-items: center; flex-wrap: wrap; margin-bottom: .5rem; }
#timeline .zoom { margin-left: auto; display: flex; gap: .3rem; }
#timeline .zoom button { width: 2.2rem; height: 2.2rem; border: 1px solid var(--border-color-primary);
  border-radius: 6px; font-size: 1.2rem; line-height: 1; }
#timeline .scroll { overflow-x: auto; }
#timeline .wide { position: relative; width: calc(100% * var(--zoom, 1)); }
#timeline .row { display: grid; grid-template-columns: 10rem 1fr; margin-bottom: 4px;
  --height: calc(14px + 14px * var(--lanes)); }
#timeline .label { position: sticky; left: 0; z-index: 2; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; padding-right: .6rem; line-height: var(--height); background: var(--body-background-fill);
  font-size: .9rem; }
#timeline .track { position: relative; height: var(--height); border-radius: 4px; overflow: hidden;
  background: color-mix(in srgb, var(--body-text-color) 6%, transparent); }
#timeline .segment { position: absolute; min-width: 5px; padding: 0; border: 1px solid var(--colour);
  border-radius: 4px; background: color-mix(in srgb, var(--colour) calc(12% + 88% * var(--score)), transparent); }
#timeline .segment:hover { filter: brightness(1.15); }
#timeline .segment.chosen { box-shadow: inset 0 0 0 3px var(--body-text-color); z-index: 1; }
#timeline button:focus-visible { outline: 3px solid var(--color-accent); outline-offset: -3px; z-index: 1; }
#timeline .axis .track { background: none; height: 1.4em; font-size: .75rem; color: var(--faint); }
#timeline .axis .track span { position: absolute; padding-left: 3px; border-left: 1px solid var(--faint);
  white-space: nowrap; }
#timeline .cursor { position: absolute; top: 0; bottom: 0; width: 2px; background: var(--body-text-color); z-index: 1;
  pointer-events: none; }
#timeline p.chosen { margin: .3rem 0 .7rem; min-height: 1.5em; color: var(--faint); }
#timeline .list { list-style: none; margin: 0; padding: 0; max-height: 19rem; overflow-y: auto;
  border: 1px solid var(--border-color-primary); border-radius: var(--block-radius); }
#timeline .list li { margin: 0; padding: 0; }
#timeline .list li + li { border-top: 1px solid var(--border-color-primary); }
#timeline .list button { display: grid; grid-template-columns: .9rem 7.5rem 1fr auto; gap: .6rem; align-items: center;
  width: 100%; min-height: 2.4rem; padding: .25rem .7rem; text-align: left; }
#timeline .list button:hover, #timeline .list button.chosen {
  background: color-mix(in srgb, var(--body-text-color) 6%, transparent); }
#timeline .list button.chosen { box-shadow: inset 4px 0 var(--colour); }
#timeline .list .swatch { width: .9rem; height: .9rem; border-radius: 3px; background: var(--colour); }
#timeline .list .time, #timeline .list .score { font-variant-numeric: tabular-nums; }
#timeline .list .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
@media (max-width: 640px) {
  #title h1 { font-size: 1.3rem; }
  #timeline .row { grid-template-columns: 1fr; }
  #timeline .label { line-height: 1.5; width: fit-content; max-width: 85vw; }
  #timeline .axis .label { display: none; }
  #timeline .axis .track span:nth-child(even) { display: none; }
  #timeline .list button { grid-template-columns: .9rem 7rem 1fr auto; gap: .45rem; }
}
"""

# Runs once, when the timeline is made; what is drawn in it later is found through `element`. Events of media do not
# bubble, but can be caught on their way down.
JS = """
let playing = null;  // the segment whose end stops the video
let chosen = null;  // in a form that is the same after the timeline has been drawn again
let frame = null;
const video = () => document.querySelector("#player [data-path]");
const point = () => {
  const cursor = element.querySelector(".cursor"), track = element.querySelector(".track"), shown = video();
  if (!cursor || !track) return;
  cursor.hidden = !(shown && shown.duration);
  if (!cursor.hidden)
    cursor.style.left = track.offsetLeft + track.offsetWidth * Math.min(shown.currentTime / shown.duration, 1) + "px";
};
const follow = () => {
  const shown = video();
  if (!shown) return;
  // (while it seeks, someone may be moving on by hand: "seeking" below says)
  if (playing && !shown.seeking && shown.currentTime >= playing.end) { playing = null; shown.pause(); }
  point();
  cancelAnimationFrame(frame);
  if (!shown.paused) frame = requestAnimationFrame(follow);
};
const identify = (one) => [one.dataset.start, one.dataset.end, one.querySelector(".name").textContent].join(" ");
const mark = (index) => {
  element.querySelectorAll("button.chosen").forEach((other) => other.classList.remove("chosen"));
  element.querySelectorAll(`[data-index="${index}"]`).forEach((one) => one.classList.add("chosen"));
  const row = element.querySelector(`.list [data-index="${index}"]`), list = element.querySelector(".list");
  chosen = identify(row);
  const above = row.offsetTop - list.offsetTop, below = above + row.offsetHeight - list.clientHeight;
  list.scrollTop = Math.max(Math.min(list.scrollTop, above), below);
  element.querySelector("p.chosen").textContent = element.querySelector(`.segment[data-index="${index}"]`).title;
};
element.addEventListener("click", (event) => {
  const zoom = event.target.closest("[data-zoom]");
  if (zoom) {
    const now = parseFloat(element.style.getPropertyValue("--zoom") || 1) * zoom.dataset.zoom;
    element.style.setProperty("--zoom", Math.min(Math.max(now, 1), 64));
    return point();
  }
  const segment = event.target.closest("[data-index]");
  if (!segment) return;
  mark(segment.dataset.index);
  const shown = video();
  if (!shown || shown.error) return;
  playing = {start: +segment.dataset.start, end: +segment.dataset.end};
  shown.currentTime = playing.start;
  shown.scrollIntoView({block: "nearest"});  // on a phone the list is far below
  shown.play().catch(() => {});
});
document.addEventListener("play", follow, true);
document.addEventListener("timeupdate", follow, true);  // also where a hidden tab gets no animation frames
window.addEventListener("resize", () => point());
document.addEventListener("loadstart", () => { playing = null; point(); }, true);
document.addEventListener("seeking", (event) => {  // by hand: out of the segment, nothing is to be stopped
  const now = event.target.currentTime;
  if (playing && (now < playing.start - 0.1 || now > playing.end)) playing = null;
  point();
}, true);
document.addEventListener("error", (event) => {
  if (!event.target.matches?.("#player [data-path]")) return;
  event.target.hidden = true;
  event.target.nextElementSibling.hidden = false;
}, true);
watch("value", () => {
  point();
  const same = [...element.querySelectorAll(".list button")].find((one) => identify(one) === chosen);
  if (same) mark(same.dataset.index);
});
"""

# The address of an uploaded file depends on where the page is served (on a Space, behind a proxy); gradio says where.
PLAYER_JS = """
const load = () => {
  const shown = element.querySelector("[data-path]");
  if (!shown || shown.src) return;
  const root = new URL((window.gradio_config?.root ?? "").replace(/[/]?$/, "/"), document.baseURI);
  shown.src = new URL("gradio_api/file=" + encodeURIComponent(shown.dataset.path), root);
};
watch("value", load);
load();
"""

SAVE_JS = """
(file) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([file.text], {type: "text/plain;charset=utf-8"}));
  link.download = file.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
"""


# ---------------------------------------------------------------------------------------------------------------------
# The page


def build(
    models: dict,
    encoder=None,
    threshold: float = 0.3,
    examples: Sequence[Path] = (),
    cache: int = 2**30,
) -> gr.Blocks:
    """
    Args:
        models: names to pipelines.
        encoder: of video and sound, from `load_encoder`; default: each model's own.
        threshold: where the slider starts.
        examples: recordings to choose from.
        cache: bytes of features and outputs of models that are kept.
    """
    kept = Cache(cache)
    first = next(iter(models))
    working: dict[str, threading.Event] = {}  # sessions to what stops the work on their recording

    def features_of(recording: dict) -> tuple:
        """What makes its features: models that agree in it share them."""
        own = models[recording["model"]].feature_extractor
        maker = encoder.name if encoder else str(own.encoder)
        return recording["path"], maker, own.feature_size, own.fps, own.feature_stride, own.num_frames

    def get_outputs(recording: dict) -> dict:
        """Of the model, which runs if it did not before, and the recording's length in seconds."""
        path, name = Path(recording["path"]), recording["model"]
        if not path.is_file():
            raise ValueError(
                f"{path.name} is not here any more: dropped files are deleted after a day. Drop it again."
            )
        localize, stat = models[name], path.stat()
        # gradio stores a file under the hash of its content; an example may have been changed.
        version = (stat.st_size, stat.st_mtime_ns)

        def read() -> dict:
            return localize.open(as_recording(path, localize.feature_extractor, encoder), encoder=encoder)

        def run() -> dict:
            sample = kept.get((*features_of(recording), version), read)
            return {"seconds": measure(sample), **run_model(localize, sample)}

        return kept.get((str(path), version, name), run)

    def find(recording: dict, *settings) -> tuple[list[dict], float]:
        """Segments with these settings, and the length of the recording."""
        outputs = get_outputs(recording)
        names = ("threshold", "nms_method", "iou_threshold", "nms_sigma")
        settings = dict(zip(names, settings, strict=True))
        rows = models[recording["model"]].postprocess([outputs], top_k=MOST_SEGMENTS, **settings)
        return rows, outputs["seconds"]

    def enable(saving: bool) -> list:
        return [gr.update(interactive=saving) for _ in DOWNLOADS]

    def start(file: str | None, asked: dict):
        """Before the model runs: the player, and nothing left of the recording before."""
        asked["path"] = file
        return draw_player(Path(file) if file else None), "", EMPTY, None, *enable(False)

    def analyse(
        file: str | None,
        name: str,
        asked: dict,
        request: gr.Request,
        progress=gr.Progress(track_tqdm=True),  # noqa: B008
    ):
        """What sliders, which may move meanwhile, do not change. Stops, and shows nothing, when something else is asked for."""
        recording, text, nothing = {"path": file, "model": name}, "", [gr.skip()] * (2 + len(DOWNLOADS))
        for key, value in recording.items():
            asked.setdefault(key, value)
        left = working[request.session_hash] = threading.Event()

        def is_of_use() -> bool:
            return features_of(asked) == features_of(recording) and not left.is_set()

        try:
            if file is not None and asked == recording:
                progress(0, desc="Reading the recording")
                with stoppable(is_of_use):
                    get_outputs(recording)
        except Stopped:
            return nothing
        except Exception as error:  # whatever is wrong with a file: the page says it, and goes on
            path = Path(file)
            text = str(error).replace(file, path.name)
            if not isinstance(error, ValueError | ImportError):
                traceback.print_exc()
                text = f"it could not be read ({type(error).__name__}: {text}). Is the file whole?"
            text = text if path.name in text else f"{path.name}: {text.removeprefix('sample 0: ')}"
        finally:
            working.pop(request.session_hash, None)
        if asked != recording or left.is_set():
            return nothing
        is_found = file is not None and not text
        return draw_message(text), recording if is_found else None, *enable(is_found)

    def leave(request: gr.Request):
        """The page was closed, or loaded anew: nobody waits any more."""
        if left := working.get(request.session_hash):
            left.set()

    def redraw(file: str | None, recording: dict | None, asked: dict, *settings):
        if file is not None and not asked:
            raise gr.Error(LOST)
        if recording is None:
            return EMPTY
        if recording != asked:  # which is under way
            return gr.skip()
        try:
            rows, seconds = find(recording, *settings)
        except ValueError as error:
            raise gr.Error(html.escape(str(error))) from error
        localize, threshold = models[recording["model"]], settings[0]
        most = min(MOST_SEGMENTS, localize.feature_extractor.max_seg_num)
        return draw_timeline(rows, seconds, localize.model.config.label2id, threshold, most)

    def choose_model(name: str, asked: dict):
        """Settings of the model's feature extractor, which its makers chose."""
        asked["model"] = name
        own = models[name].feature_extractor
        return (
            describe(models[name], encoder),
            own.nms_method,
            gr.update(value=own.iou_threshold, visible=own.nms_method in ("hard", "linear")),
            gr.update(value=own.nms_sigma, visible=own.nms_method == "soft"),
            *enable(False),
        )

    def choose_nms(method: str):
        return gr.update(visible=method in ("hard", "linear")), gr.update(visible=method == "soft")

    def save(form: str, suffix: str) -> Callable:
        def write(recording: dict | None, *settings) -> dict:
            if recording is None:
                raise gr.Error(LOST)
            try:
                rows, seconds = find(recording, *settings)
                # (the last segment may end after the last feature)
                options = {"duration": max([seconds, *(row["end"] for row in rows)])} if form == "youtube" else {}
                text = format_segments(rows, form, **options)
            except ValueError as error:  # a label that the format cannot hold
                raise gr.Error(html.escape(str(error))) from error
            if form == "youtube" and (count := text.count("\n")) < 3:
                gr.Warning(f"YouTube shows chapters where there are three or more; this file has {count}.")
            return {"name": Path(recording["path"]).stem + suffix, "text": text}

        return write

    private = {"api_visibility": "private"}
    with gr.Blocks(title="ConvTransformer", analytics_enabled=False, delete_cache=(3600, DAY)) as page:
        gr.HTML(
            "<h1>What happens when?</h1>"
            "<p>Drop a recording. The model finds actions in it, each with a start and an end.</p>",
            elem_id="title",
            apply_default_css=False,
        )
        recording = gr.State(None)  # whose timeline is shown
        # What was chosen last. It is changed in place, for who is at work on something else to see.
        asked = gr.State({})
        text = gr.JSON(visible="hidden")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                file = gr.File(label="Video, features or sensor values", height=150, elem_id="recording")
                if examples:
                    gr.Examples([str(one) for one in examples], file, label="Examples", **private)
                    file.keep_in_cache.update(file.temp_files)  # else they are deleted like what users drop
                model = gr.Dropdown(list(models), value=first, label="Model", elem_id="model")
                takes = gr.HTML(describe(models[first], encoder), elem_id="takes", apply_default_css=False)
                slide = gr.Slider(0, 1, threshold, step=0.01, buttons=[], label="Threshold", elem_id="threshold")
                own = models[first].feature_extractor
                with gr.Accordion("Overlapping segments", open=False, elem_id="overlap"):
                    method = gr.Dropdown(list(NMS_METHODS.items()), value=own.nms_method, label="NMS", elem_id="nms")
                    iou = gr.Slider(
                        0, 1, own.iou_threshold, step=0.05, buttons=[], label="IoU threshold", elem_id="iou",
                        info="Less overlap than this leaves both alone.", visible=own.nms_method in ("hard", "linear"),
                    )  # fmt: skip
                    sigma = gr.Slider(
                        0.05, 2, own.nms_sigma, step=0.05, buttons=[], label="Sigma", elem_id="sigma",
                        info="Smaller suppresses more.", visible=own.nms_method == "soft",
                    )  # fmt: skip
            with gr.Column(scale=3, min_width=300):
                message = gr.HTML(elem_id="message", apply_default_css=False)
                player = gr.HTML(elem_id="player", js_on_load=PLAYER_JS, apply_default_css=False)
                timeline = gr.HTML(EMPTY, elem_id="timeline", js_on_load=JS, apply_default_css=False, min_height=190)
                with gr.Row(elem_id="downloads"):
                    buttons = [
                        gr.Button(f"↓ {name}", size="sm", min_width=60, interactive=False) for name, _, _ in DOWNLOADS
                    ]

        settings = [slide, method, iou, sigma]
        # (an event that shows no progress of its own)
        quiet = {"show_progress": "hidden", **private}
        # An event that comes while another of its kind is at work would be dropped, by default: the last one must count.
        last, each = {"trigger_mode": "always_last"}, {"trigger_mode": "multiple"}
        analysed = {
            "fn": analyse,
            "inputs": [file, model, asked],
            "outputs": [message, recording, *buttons],
            "show_progress_on": timeline,
            "concurrency_limit": 1,
            "concurrency_id": "model",
            **each,
            **private,
        }
        drawn = {"fn": redraw, "inputs": [file, recording, asked, *settings], "outputs": timeline, **quiet}
        changed = file.change(start, [file, asked], [player, message, timeline, recording, *buttons], **last, **quiet)
        chosen = model.input(choose_model, [model, asked], [takes, method, iou, sigma, *buttons], **last, **quiet)
        for before in (changed, chosen):
            before.then(**analysed).then(**each, **drawn)
        gr.on([setting.input for setting in settings], **last, **drawn)
        method.input(choose_nms, method, [iou, sigma], **last, **quiet)
        page.unload(leave)
        for button, (_, form, suffix) in zip(buttons, DOWNLOADS, strict=True):
            saved = button.click(save(form, suffix), [recording, *settings], text, **quiet)
            saved.success(None, text, None, js=SAVE_JS, **private)
    return page


def describe(localize, encoder=None) -> str:
    """What files a model takes, and what it finds."""
    own, labels = localize.feature_extractor, localize.model.config.id2label
    channels = own.num_channels
    made_by = encoder.name if encoder else own.encoder and own.encoder["name"]
    takes = f"video or sound (through {Path(made_by).name}), or " if made_by else ""
    takes += f"features {own.feature_size} wide"
    takes += f", or {channels} sensor channels at {own.fps:g} Hz" if channels and not made_by else ""
    names = [labels[index] for index in sorted(labels)]
    finds = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"Takes {html.escape(takes)}. Finds {html.escape(finds)}."


def main(arguments: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="folder written by save_pretrained, or a name on the Hub"
    )
    parser.add_argument(
        "--encoder", help="turns video into the features that MODEL was trained on: a folder, or a name on the Hub"
    )
    parser.add_argument("--examples", type=Path, help="folder of recordings that the page offers")
    parser.add_argument("--threshold", type=float, default=0.3, help="least score to show at first (default: 0.3)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 lets others in your network in (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument("--max_file_size", default="2gb", help="largest file that may be dropped (default: 2gb)")
    parser.add_argument("--device", help='where models run, such as "cuda" (default: a GPU, if there is one)')
    options = parser.parse_args(arguments)
    for name in (*options.models, *([options.encoder] if options.encoder else [])):
        if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            parser.error(f"there is no folder {name}, and a name on the Hub looks like someone/their-model")
    if not 0 <= options.threshold <= 1:
        parser.error(f"--threshold is {options.threshold}; expected a score, 0 to 1")
    if options.examples is not None and not options.examples.is_dir():
        parser.error(f"there is no folder {options.examples}")
    examples = []
    if options.examples is not None:
        examples = sorted(one for one in options.examples.iterdir() if one.suffix.lower() in KNOWN)
        if not examples:
            parser.error(f"{options.examples} has no recordings ({', '.join(KNOWN)})")

    logging.disable_progress_bar()  # of loading; those of encoders are shown in the page
    try:
        models = {
            name: pipeline("temporal-action-localization", model=name, device=options.device)
            for name in dict.fromkeys(options.models)
        }
        device = next(iter(models.values())).device
        encoder = load_encoder(options.encoder, device=device) if options.encoder else None
    except (ValueError, OSError) as error:
        parser.error(str(error))
    logging.enable_progress_bar()
    build(models, encoder, options.threshold, examples).launch(
        server_name=options.host, server_port=options.port, max_file_size=options.max_file_size, **LAUNCH
    )


# One of gradio's own, in the weights that it has all letters of.
FONT = (gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "ui-sans-serif", "system-ui", "sans-serif")
# Nothing of a session is kept in the browser or sent elsewhere.
LAUNCH = {
    "css": CSS,
    "ssr_mode": False,
    "theme": gr.themes.Default(font=FONT),
    "footer_links": [],
    "run_history": False,
    "share": False,
}

if __name__ == "__main__":
    main()
