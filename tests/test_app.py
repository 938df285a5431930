"""The page of examples/app.py in a browser, as users meet it: files dropped, sliders moved, segments played, saved."""

import os
import shutil
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from scripts import load_script
from test_modeling_convtransformer import make_config, randomize
from transformers import VideoMAEConfig, VideoMAEImageProcessor, VideoMAEModel, pipeline
from transformers.utils import logging

from modeling_convtransformer import ConvTransformerFeatureExtractor, ConvTransformerForTemporalActionLocalization
from modeling_convtransformer.features import VideoEncoder
from modeling_convtransformer.segments import format_segments, parse_segments
from modeling_convtransformer.visualization import class_colour

gradio = pytest.importorskip("gradio", reason='the page needs gradio: pip install "modeling-convtransformer[app]"')
av = pytest.importorskip("av", reason='videos need PyAV: pip install "modeling-convtransformer[video]"')

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--autoplay-policy=no-user-gesture-required"),
]
# A class name that would be code in the page if it were not escaped: for gradio's templates, and for the browser.
LABELS = {0: "walk", 1: "<img src=x onerror='window.broken=1'> ${window.broken=1} {{value}} \"&amp;\"", 2: "rest"}
PLAIN = {0: "walk", 1: "run", 2: "rest"}
CLASSES = ["walk", LABELS[1], "run", "rest"]  # in the order of both
# Of gradio's own use of pandas; and chapters of short recordings, which the page warns of in its own way.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio"),
    pytest.mark.filterwarnings("ignore:YouTube shows chapters"),
]
PATIENCE = 60_000  # ms, far more than any step takes


# --- What is in the page ---------------------------------------------------------------------------------------------


def make_detector(folder: Path, seed: int, labels: dict[int, str], encoder: str | None = None, **fields) -> str:
    config = make_config(id2label=labels, **fields)
    model = randomize(ConvTransformerForTemporalActionLocalization(config), seed)
    model.class_head.output.weight.data /= 2  # scores all over the range, none of them 1.0
    model.save_pretrained(folder)
    width = sum(config.stream_widths)
    stride, window = (2, 4) if encoder else (5, 2)
    ConvTransformerFeatureExtractor(width, 10, stride, window, encoder=encoder, nms_sigma=0.4).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def app():
    return load_script("app")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Recordings that the detectors take, and ones that they do not. Six channels: see `make_config`."""
    folder = tmp_path_factory.mktemp("recordings")
    random = np.random.default_rng(0)
    features = random.normal(size=(60, 6)).astype(np.float32)
    np.save(folder / "walk & rest.npy", features)
    np.save(folder / "signal.npy", random.normal(size=(400, 3)).astype(np.float32))
    save_file({"features": random.normal(size=(40, 6)).astype(np.float32)}, folder / "short.safetensors")
    np.save(folder / "wide.npy", np.zeros((60, 7), dtype=np.float32))
    np.save(folder / "turned.npy", np.zeros((6, 60), dtype=np.float32))
    broken = features.copy()
    broken[3, 2] = np.nan
    np.save(folder / "broken.npy", broken)
    (folder / "cut.npy").write_bytes((folder / "walk & rest.npy").read_bytes()[:500])
    (folder / "notes.docx").write_bytes(b"no recording")
    times = np.arange(400) / 10
    table = np.column_stack([times, random.normal(size=(400, 3))])
    np.savetxt(folder / "watch.csv", table, delimiter=",", header="time,x,y,z", comments="")
    np.savetxt(folder / "two.csv", table[:, :3], delimiter=",", header="time,x,y", comments="")
    write_video(folder / "clip.webm", "libvpx-vp9")
    write_video(folder / "old.avi", "mpeg4")
    (folder / "cut.mp4").write_bytes((folder / "clip.webm").read_bytes()[:700])
    return {path.name: path for path in folder.iterdir()}


def write_video(path: Path, codec: str):
    """Ten seconds at 10 frames a second, each second a key frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 10
        for index in range(100):
            image = np.full((48, 64, 3), 2 * index, dtype=np.uint8)
            image[:, : index // 2] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def make_encoder(folder: Path) -> str:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    VideoMAEModel(VideoMAEConfig(**sizes, image_size=32, patch_size=16, num_frames=4)).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return str(folder)


class Served(NamedTuple):
    address: str
    models: dict
    blocks: gradio.Blocks


@pytest.fixture(scope="module")
def served(app, tmp_path_factory):
    """The page at a free port of this machine, with models that count how often they run."""
    folder = tmp_path_factory.mktemp("models")
    detectors = {
        "first": make_detector(folder / "first", 0, LABELS),
        "second": make_detector(folder / "second", 1, PLAIN),
        "video": make_detector(folder / "video", 6, PLAIN, make_encoder(folder / "encoder"), n_in=16),
        "same features": make_detector(folder / "same", 7, PLAIN, str(folder / "encoder"), n_in=16),
    }
    models = {}
    for name, model in detectors.items():
        localize = pipeline("temporal-action-localization", model=model, device="cpu")
        localize.runs = 0
        localize.model.register_forward_pre_hook(lambda *_, own=localize: setattr(own, "runs", own.runs + 1))
        models[name] = localize
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = app.build(models)
    _, address, _ = page.launch(
        server_port=port, prevent_thread_lock=True, quiet=True, max_file_size="1mb", **app.LAUNCH
    )
    yield Served(address, models, page)
    page.close(verbose=False)


# --- The browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the page is tested in a browser: pip install playwright"
    )
    names = (os.environ.get("CHROMIUM"), *map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    path = next(filter(None, names), None)
    with playwright.sync_playwright() as driver:
        if path is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip(
                "no browser: apt install chromium, or playwright install chromium, or set CHROMIUM to its path"
            )
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, served):
    """Opens the page, in a session of its own for each call; at the end, nothing may have gone wrong in any."""
    address = served.address
    contexts, troubles = [], []

    def note_request(request):
        if urlsplit(request.url).netloc != urlsplit(address).netloc and not request.url.startswith(("data:", "blob:")):
            troubles.append(f"asked {request.url}")

    def open_one(width: int = 1280, height: int = 900):
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        contexts.append(context)
        # Nobody without a network, or behind a firewall, may miss anything: not one request leaves this machine.
        context.on("request", note_request)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#timeline .empty")
        return page

    yield open_one
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("window.broken") is None, "a class name was run as code"
        context.close()
    assert not troubles


def drop(page, path: Path):
    """A file into the drop zone, in place of the one that is there; waits for what the page says to it."""
    if page.locator("#recording button[aria-label='Clear']").count():
        page.click("#recording button[aria-label='Clear']")
        page.wait_for_selector("#timeline .empty")
        page.wait_for_selector("#message .message", state="detached")
    page.set_input_files("#recording input[type=file]", path)
    page.wait_for_selector("#timeline .segment, #message .message")


def read_list(page) -> list[tuple]:
    """What the list shows: label, start, end, and the score in two decimals."""
    return page.evaluate(
        """[...document.querySelectorAll("#timeline .list button")].map((one) => {
        const {start, end} = one.dataset, [name, score] = one.querySelectorAll(".name, .score");
        return [name.textContent, parseFloat(start), parseFloat(end), score.textContent]; })"""
    )


def read_timeline(page) -> list[tuple]:
    """What the timeline shows: label of the row, left and right end as shares of the recording."""
    return page.evaluate(
        """[...document.querySelectorAll("#timeline .segment")].map((one) => {
        const left = parseFloat(one.style.left) / 100, width = parseFloat(one.style.width) / 100;
        return [one.closest(".row").querySelector(".label").textContent, left, left + width]; })"""
    )


def find(localize, features, **settings) -> list[dict]:
    """The segments, without the pipeline and the page, by time."""
    with torch.no_grad():
        outputs = localize.model(**localize.feature_extractor(features))
    (found,) = localize.feature_extractor.post_process_temporal_action_localization(outputs, **settings)
    rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["segments"].tolist(), strict=True)
    names = localize.model.config.id2label
    rows = [{"label": names[label], "score": score, "start": a, "end": b} for label, score, (a, b) in rows]
    return sorted(rows, key=lambda row: (row["start"], row["end"]))


def assert_shows(page, expected: list[dict], seconds: float):
    """Waits for the list to be these segments, by time, and compares the timeline with it."""
    listed = [[row["label"], row["start"], row["end"], f"{row['score']:.2f}"] for row in expected]
    for _ in range(PATIENCE // 100):
        if read_list(page) == listed:
            break
        page.wait_for_timeout(100)
    assert read_list(page) == listed
    drawn = read_timeline(page)
    by_class = sorted(expected, key=lambda row: CLASSES.index(row["label"]))
    assert [label for label, _, _ in drawn] == [row["label"] for row in by_class]
    shares = [[min(max(row[end] / seconds, 0), 1) for end in ("start", "end")] for row in by_class]
    # Percents have four decimals.
    np.testing.assert_allclose([one[1:] for one in drawn], shares, atol=2e-6)


def set_slider(page, name: str, value: float):
    page.fill(f"#{name} input[type=number]", str(value))


def choose(page, name: str, option: str):
    page.click(f"#{name} input")
    page.get_by_role("option", name=option, exact=True).click()


def slow_down(monkeypatch) -> list[int]:
    """Encoders take half a second for each batch from now on; gives the list to which they add how many windows it has."""
    encode, seen = VideoEncoder.encode, []

    def encode_slowly(self, windows):
        seen.append(len(windows))
        time.sleep(0.5)
        return encode(self, windows)

    monkeypatch.setattr(VideoEncoder, "encode", encode_slowly)
    return seen


# --- Tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_settings_redraw_without_running_the_model(open_page, served, files):
    models = served.models
    localize, features = models["first"], np.load(files["walk & rest.npy"])
    seconds = (59 * 5 + 2) / 10
    page = open_page()
    before = localize.runs
    drop(page, files["walk & rest.npy"])
    everything = find(localize, features, threshold=0.3)
    before += 1  # (`find` runs it too)
    assert 5 < len(everything) < 500
    assert_shows(page, everything, seconds)
    assert localize.runs == before + 1

    expected = {
        threshold: find(localize, features, threshold=threshold, nms_sigma=0.4) for threshold in (0.05, 0.7, 0.31)
    }
    expected["hard"] = find(localize, features, threshold=0.31, nms_method="hard", iou_threshold=0.1)
    expected["iou"] = find(localize, features, threshold=0.31, nms_method="hard", iou_threshold=0.6)
    expected["sigma"] = find(localize, features, threshold=0.31, nms_sigma=0.1)
    assert len({len(one) for one in expected.values()}) >= 5  # (each setting shows)
    runs = localize.runs

    set_slider(page, "threshold", 0.05)
    assert_shows(page, expected[0.05], seconds)
    set_slider(page, "threshold", 0.7)
    assert_shows(page, expected[0.7], seconds)
    set_slider(page, "threshold", 0.3)
    page.focus("#threshold input[type=range]")
    page.keyboard.press("ArrowRight")  # by keyboard, and the handle itself
    assert_shows(page, expected[0.31], seconds)

    page.click("#overlap button")
    page.wait_for_selector("#sigma", state="visible")
    assert not page.is_visible("#iou")
    choose(page, "nms", "Hard NMS")
    assert_shows(page, expected["hard"], seconds)
    page.wait_for_selector("#iou", state="visible")
    page.wait_for_selector("#sigma", state="hidden")
    set_slider(page, "iou", 0.6)
    assert_shows(page, expected["iou"], seconds)
    choose(page, "nms", "Gaussian soft-NMS")
    set_slider(page, "sigma", 0.1)
    assert_shows(page, expected["sigma"], seconds)
    assert localize.runs == runs

    set_slider(page, "threshold", 1)
    page.wait_for_selector("#timeline .empty")
    assert "No segment has a score above 1.00" in page.inner_text("#timeline")


@pytest.mark.slow
def test_a_segment_is_chosen_by_mouse_and_keyboard(open_page, files):
    page = open_page()
    drop(page, files["walk & rest.npy"])
    assert page.locator("#player video").count() == 0
    third = page.locator("#timeline .segment").nth(2)
    third.click()
    index, title = third.get_attribute("data-index"), third.get_attribute("title")
    assert page.inner_text("#timeline p.chosen") == title
    chosen = page.locator("#timeline .chosen[data-index]")
    assert {one.get_attribute("data-index") for one in chosen.all()} == {index}
    assert chosen.count() == 2  # on the timeline and in the list, which scrolls to it
    row, shown = chosen.nth(1).bounding_box(), page.locator("#timeline .list").bounding_box()
    assert shown["y"] - 1 <= row["y"] <= shown["y"] + shown["height"] - row["height"] + 1

    page.keyboard.press("Tab")  # the next segment
    page.keyboard.press("Enter")
    fourth = page.locator("#timeline .segment").nth(3).get_attribute("data-index")
    assert {one.get_attribute("data-index") for one in chosen.all()} == {fourth}

    width = page.locator("#timeline .track").first.bounding_box()["width"]
    page.click("[data-zoom='2']")
    assert page.locator("#timeline .track").first.bounding_box()["width"] > 2 * width
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # the timeline scrolls, not the page


@pytest.mark.slow
def test_downloads_are_what_is_shown(open_page, served, files, app):
    models = served.models
    page = open_page()
    choose(page, "model", "second")
    drop(page, files["walk & rest.npy"])
    set_slider(page, "threshold", 0.6)
    rows = models["second"](str(files["walk & rest.npy"]), threshold=0.6)
    assert_shows(page, sorted(rows, key=lambda row: (row["start"], row["end"])), 29.7)
    for name, form, suffix in app.DOWNLOADS:
        with page.expect_download() as download:
            page.click(f"#downloads >> text={name}")
        assert download.value.suggested_filename == "walk & rest" + suffix
        text = Path(download.value.path()).read_bytes().decode()
        assert text == format_segments(rows, form, **({"duration": 29.7} if form == "youtube" else {}))
        if form in ("json", "csv"):
            assert parse_segments(text, form) == rows
        elif form == "elan":
            times = [(round(row["start"], 3), round(row["end"], 3)) for row in rows]
            assert sorted((row["start"], row["end"]) for row in parse_segments(text, form)) == pytest.approx(
                sorted(times)
            )

    # What a format cannot hold is said, and the page goes on.
    choose(page, "model", "first")
    set_slider(page, "threshold", 0.5)
    assert_shows(page, find(models["first"], np.load(files["walk & rest.npy"]), threshold=0.5), 29.7)
    page.click("#downloads >> text=Chapters")
    assert "cannot hold" in page.inner_text("[data-testid=toast-body]:has-text('cannot')")


@pytest.mark.slow
def test_models_sessions_and_kinds_of_files(open_page, served, files):
    models = served.models
    page, other = open_page(), open_page()
    features = np.load(files["walk & rest.npy"])
    expected = {name: find(models[name], features, threshold=0.3) for name in ("first", "second")}
    drop(page, files["walk & rest.npy"])
    assert_shows(page, expected["first"], 29.7)

    # A session is not touched by what another does.
    for name, recording in {
        "watch.csv": str(files["watch.csv"]),
        "signal.npy": {"signal": str(files["signal.npy"])},
    }.items():
        rows = models["first"](recording, threshold=0.3)
        drop(other, files[name])
        assert_shows(other, sorted(rows, key=lambda row: (row["start"], row["end"])), 40.0)
    set_slider(other, "threshold", 0.9)
    set_slider(page, "threshold", 0.5)
    assert_shows(page, find(models["first"], features, threshold=0.5), 29.7)
    set_slider(page, "threshold", 0.3)

    runs = models["second"].runs
    choose(page, "model", "second")
    assert_shows(page, expected["second"], 29.7)
    choose(page, "model", "first")
    assert_shows(page, expected["first"], 29.7)
    choose(page, "model", "second")
    assert_shows(page, expected["second"], 29.7)
    assert models["second"].runs == runs + 1


@pytest.mark.slow
def test_wrong_files_are_named_and_the_page_goes_on(open_page, files):
    page = open_page()
    for name, words in {
        "notes.docx": ("a .docx file", "Expected a video (.mp4", "drop another"),
        "wide.npy": ("(60, 7)", "(time, 6)", "(samples, 3)", "Choose the model"),
        "turned.npy": ("(6, 60)", "(time, 6)", "transposed"),
        "broken.npy": ("1 values that are NaN", "time step 3, channel 2", "Repair"),
        "cut.npy": ("no readable .npy",),
        "two.csv": ("(400, 2)", "(samples, 3)"),
        "clip.webm": ("does not say which encoder", "--encoder"),
    }.items():
        drop(page, files[name])
        message = page.inner_text("#message .message")
        for word in (name, *words):
            assert word in message, name
        assert str(files[name].parent) not in message
        assert tempfile.gettempdir() not in message
        assert "Traceback" not in message
        assert page.is_disabled("#downloads >> text=JSON")
    drop(page, files["short.safetensors"])
    assert page.locator("#message .message").count() == 0
    assert page.locator("#timeline .segment").count() > 0


@pytest.mark.slow
def test_a_video_plays_from_the_start_of_a_segment_to_its_end(open_page, served, files, monkeypatch):
    models = served.models
    logging.enable_progress_bar()  # which tests of commands in this process may have turned off
    page = open_page()
    choose(page, "model", "video")
    page.wait_for_selector("#takes:has-text('through encoder')")

    seen = slow_down(monkeypatch)
    page.set_input_files("#recording input[type=file]", files["clip.webm"])
    page.wait_for_selector("#player video")  # while features are made, whose progress stands at the timeline
    page.wait_for_selector("#timeline .progress-bar", state="attached")  # (of no width at first)
    page.wait_for_selector("#timeline :text('clip.webm')")
    set_slider(page, "threshold", 0.32)  # not lost, though there is nothing yet to apply it to
    page.wait_for_selector("#timeline .segment")
    monkeypatch.undo()
    assert seen[0] == 1  # of zeros, when the encoder is loaded
    assert sum(seen[1:]) == 49  # windows of 4 frames, one each 2, in 100
    rows = sorted(models["video"](str(files["clip.webm"]), threshold=0.32), key=lambda row: (row["start"], row["end"]))
    assert_shows(page, rows, 10.0)

    page.evaluate(
        """() => { const video = document.querySelector("#player video"); window.told = [];
        for (const name of ["play", "pause", "error"])
            video.addEventListener(name, () => told.push([name, video.currentTime])); }"""
    )
    good = [row["start"] > 1 and 0.3 < row["end"] - row["start"] < 3 and row["end"] < 8 for row in rows]
    index, row = next((index, row) for index, row in enumerate(rows) if good[index])
    page.locator("#timeline .list button").nth(index).click()
    page.wait_for_function("told.length == 2")
    (first, started), (second, stopped) = page.evaluate("told")
    assert (first, second) == ("play", "pause")
    assert row["start"] - 0.01 <= started < row["end"]
    # The video stops with the first picture drawn after the end; a second is for a machine with other things to do.
    assert row["end"] <= stopped < row["end"] + 1

    # On the timeline likewise. Who moves on by hand, here beyond the end, is not stopped.
    segment = f"document.querySelectorAll('#timeline .list button')[{index}].dataset.index"
    page.evaluate(
        f"""() => {{ const video = document.querySelector("#player video");
        video.addEventListener("play", () => {{
            video.currentTime = {row["end"] + 1};
            video.dispatchEvent(new Event("timeupdate"));  // the page may look before it is told that the place has changed
        }}, {{once: true}});
        document.querySelector(`#timeline .segment[data-index='${{{segment}}}']`).click(); }}"""
    )
    page.wait_for_function(f"document.querySelector('#player video').currentTime > {row['end'] + 1.2}")
    now, paused = page.evaluate(
        "(({currentTime, paused}) => [currentTime, paused])(document.querySelector('#player video'))"
    )
    assert not paused
    cursor, track = (page.locator(f"#timeline {name}").first.bounding_box() for name in (".cursor", ".track"))
    assert track["x"] + now / 10 * track["width"] - 2 <= cursor["x"] <= track["x"] + track["width"]


@pytest.mark.slow
def test_what_is_dropped_last_is_shown(open_page, served, files, monkeypatch):
    models = served.models
    page = open_page()
    choose(page, "model", "video")
    page.wait_for_selector("#takes:has-text('through encoder')")
    models["video"](str(files["old.avi"]))  # the encoder is loaded
    seen = slow_down(monkeypatch)
    page.set_input_files("#recording input[type=file]", files["clip.webm"])
    page.wait_for_selector("#timeline .progress-bar", state="attached")
    drop(page, files["cut.mp4"])  # the work on the first video stops
    assert "cut.mp4" in page.inner_text("#message .message")
    assert page.is_disabled("#downloads >> text=JSON")
    assert sum(seen) < 49
    drop(page, files["old.avi"])
    rows = sorted(models["video"](str(files["old.avi"]), threshold=0.3), key=lambda row: (row["start"], row["end"]))
    assert_shows(page, rows, 10.0)
    assert page.is_enabled("#downloads >> text=JSON")

    # Another model while one is at work: only the last one's answer is shown.
    page.click("#recording button[aria-label='Clear']")
    page.wait_for_selector("#timeline .empty")
    page.set_input_files("#recording input[type=file]", files["clip.webm"])
    page.wait_for_selector("#timeline .progress-bar", state="attached")
    choose(page, "model", "second")
    page.wait_for_selector("#message .message")
    assert "does not say which encoder" in page.inner_text("#message .message")

    # The work stops for who leaves: nobody waits behind it.
    seen.clear()
    choose(page, "model", "video")
    page.wait_for_selector("#timeline .progress-bar", state="attached")
    page.context.close()
    page = open_page()
    drop(page, files["walk & rest.npy"])
    assert 0 < sum(seen) < 49

    # It goes on for a model of the same features.
    page.click("#recording button[aria-label='Clear']")
    page.wait_for_selector("#timeline .empty")
    choose(page, "model", "video")
    page.wait_for_selector("#takes:has-text('through encoder')")
    seen.clear()
    page.set_input_files("#recording input[type=file]", files["clip.webm"])
    page.wait_for_selector("#timeline .progress-bar", state="attached")
    choose(page, "model", "same features")
    page.wait_for_selector("#timeline .segment")
    assert sum(seen) == 49
    monkeypatch.undo()
    expected = models["same features"](str(files["clip.webm"]), threshold=0.3)
    assert_shows(page, sorted(expected, key=lambda row: (row["start"], row["end"])), 10.0)


@pytest.mark.slow
def test_a_page_whose_server_forgot_it_goes_on(open_page, served, files):
    features = np.load(files["walk & rest.npy"])
    page = open_page()
    choose(page, "model", "second")
    drop(page, files["walk & rest.npy"])
    expected = find(served.models["second"], features, threshold=0.3)
    assert_shows(page, expected, 29.7)
    served.blocks.app.state_holder.session_data.clear()  # as after a restart, or an hour without a connection
    set_slider(page, "threshold", 0.5)
    page.wait_for_selector("[data-testid=toast-body]:has-text('Drop the recording again')")
    page.click("[data-testid=toast-close]")
    page.click("#downloads >> text=CSV")
    page.wait_for_selector("[data-testid=toast-body]:has-text('Drop the recording again')")
    set_slider(page, "threshold", 0.3)
    drop(page, files["walk & rest.npy"])
    assert_shows(page, expected, 29.7)
    assert page.is_enabled("#downloads >> text=JSON")


@pytest.mark.slow
def test_a_video_that_the_browser_cannot_play_has_a_timeline(open_page, files):
    page = open_page()
    choose(page, "model", "video")
    drop(page, files["old.avi"])
    page.wait_for_selector("#player .message:visible")
    assert "This browser cannot play old.avi" in page.inner_text("#player")
    page.locator("#timeline .segment").first.click()
    assert page.locator("#timeline .chosen[data-index]").count() == 2
    drop(page, files["cut.mp4"])
    assert "cut.mp4" in page.inner_text("#message .message")


@pytest.mark.slow
def test_files_that_were_not_dropped_are_not_opened(open_page, served, files):
    address = served.address
    page = open_page()
    for path in (files["walk & rest.npy"], Path("/etc/passwd")):
        data = [{"path": str(path), "meta": {"_type": "gradio.FileData"}}]
        request = {"data": data, "fn_index": 0, "session_hash": path.stem}
        page.request.post(f"{address}gradio_api/queue/join", data=request)
        answer = page.request.get(f"{address}gradio_api/queue/data", params={"session_hash": path.stem}).text()
        assert '"success":false' in answer
        assert page.request.get(f"{address}gradio_api/file={path}").status == 403


@pytest.mark.slow
def test_a_file_over_the_limit_is_refused(open_page, tmp_path):
    np.save(tmp_path / "large.npy", np.zeros((60_000, 6), dtype=np.float32))
    page = open_page()
    page.set_input_files("#recording input[type=file]", tmp_path / "large.npy")
    message = page.inner_text("[data-testid=toast-body]")
    assert "large.npy" in message
    assert "maximum allowed size of 1" in message


@pytest.mark.slow
def test_a_phone_shows_everything(open_page, files):
    page = open_page(390, 844)
    drop(page, files["walk & rest.npy"])
    page.click("#overlap button")
    page.wait_for_selector("#nms")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for name in (
        "#recording",
        "#model input",
        "#threshold input[type=range]",
        "#nms",
        "#sigma",
        "#timeline .segment",
        "#downloads",
    ):
        box = page.locator(name).first.bounding_box()
        assert 0 <= box["x"] <= box["x"] + box["width"] <= 390, name
    for button in page.locator("#downloads button").all():
        box = button.bounding_box()
        assert 0 <= box["x"] <= box["x"] + box["width"] <= 390
    page.locator("#timeline .list button").nth(1).click()
    assert page.locator("#timeline .chosen[data-index]").count() == 2


# --- Without a browser -----------------------------------------------------------------------------------------------


def test_arguments_that_cannot_work_are_told(app, tmp_path, capsys):
    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as stop:
            app.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert stop.value.code == (0 if "--help" in arguments else 2)
        return said.out if "--help" in arguments else said.err

    assert "save_pretrained" in run("--help")
    assert f"there is no folder {tmp_path / 'gone'}" in run(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert f"there is no folder {tmp_path / 'gone'}" in run(tmp_path / "empty", "--encoder", tmp_path / "gone")
    assert f"there is no folder {tmp_path / 'gone'}" in run(tmp_path / "empty", "--examples", tmp_path / "gone")
    assert "expected a score, 0 to 1" in run(tmp_path / "empty", "--threshold", 2)
    assert "has no recordings" in run(tmp_path / "empty", "--examples", tmp_path / "empty")
    assert "config.json" in run(tmp_path / "empty")


def test_the_cache_holds_what_was_used_last_within_its_limit(app):
    computed = []

    def compute(key):
        computed.append(key)
        return {"logits": torch.zeros(25), "seconds": 1.0}  # 100 bytes

    cache = app.Cache(250)
    for key in ("a", "b", "a", "c", "a", "b"):
        cache.get(key, lambda key=key: compute(key))
    assert computed == ["a", "b", "c", "b"]  # b made room for c, a was used in between
    small = app.Cache(50)  # one result is always kept, however large: its sliders would not work else
    for key in ("a", "a", "b", "a"):
        small.get(key, lambda key=key: compute(key))
    assert computed[4:] == ["a", "b", "a"]


def test_work_that_nobody_waits_for_stops(app):
    wanted, seen = [True], []

    def work(thread: str):
        for step in logging.tqdm(range(3), disable=True):
            seen.append((thread, step))
        with logging.tqdm(total=3, disable=True) as bar:
            for step in range(3):
                seen.append((thread, step))
                bar.update()

    with app.stoppable(lambda: wanted[0]):
        work("this")
        wanted[0] = False
        another = threading.Thread(target=work, args=("another",))
        another.start()
        another.join()
        with pytest.raises(app.Stopped):
            work("stops")
    work("after")
    counts = {thread: sum(1 for name, _ in seen if name == thread) for thread in ("this", "another", "stops", "after")}
    assert counts == {"this": 6, "another": 6, "stops": 4, "after": 6}


def test_what_was_left_out_is_said(app):
    rows = [{"label": "walk", "score": 0.5, "start": float(start), "end": start + 1.0} for start in range(3)]
    drawn = [app.draw_timeline(rows[:count], 9.0, {"walk": 0}, 0.3, most=3) for count in range(4)]
    assert "No segment has a score above 0.30" in drawn[0]
    said = [text.split("<strong>")[1].split("</strong>")[0] for text in drawn[1:]]
    assert said == ["1 segment", "2 segments", "The best 3 segments"]


def test_times_lanes_and_colours(app):
    times = {0: "0:00.0", 59.96: "1:00.0", 75.26: "1:15.3", 3599.99: "1:00:00.0", 3725.5: "1:02:05.5"}
    assert {seconds: app.format_time(seconds) for seconds in times} == times
    assert app.format_time(119.6, 0) == "2:00"
    rows = [{"start": start, "end": end} for start, end in ((0, 4), (1, 2), (2, 3), (3, 5), (4, 6))]
    assert app._lanes(rows) == [0, 1, 1, 1, 0]
    assert max(app._lanes([{"start": 0, "end": 1}] * 20)) == app.LANES - 1
    # A class has the colour that it has in other pictures, which tests/test_visualization.py looks at.
    assert {app._colour(index) for index in range(12)} == {f"--colour:{class_colour(index)}" for index in range(12)}
