"""The page of examples/app.py in a browser, as a user meets it: a file dropped, sliders moved, segments played and saved."""

import importlib.util
import os
import shutil
import socket
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from test_modeling_convtransformer import make_config, randomize
from transformers import pipeline

from modeling_convtransformer import ConvTransformerFeatureExtractor, ConvTransformerForTemporalActionLocalization
from modeling_convtransformer.segments import format_segments, parse_segments

gradio = pytest.importorskip("gradio", reason='the page needs gradio: pip install "modeling-convtransformer[app]"')
playwright = pytest.importorskip(
    "playwright.sync_api", reason="tests of the page need playwright: pip install playwright, and a browser"
)

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--autoplay-policy=no-user-gesture-required"),
]
# A class name that would be code in the page if it were not escaped, for Python, for gradio's templates and for the browser.
LABELS = {0: "walk", 1: "<img src=x onerror='window.broken=1'> ${window.broken=1} {{value}} \"&amp;\"", 2: "rest"}
PLAIN = {0: "walk", 1: "run", 2: "rest"}
CLASSES = ["walk", LABELS[1], "run", "rest"]  # in the order of both
SECONDS = 15_000  # of patience, in ms: far more than any step takes


# --- What is in the page -----------------------------------------------------------------------------------------------------------


def make_detector(folder: Path, seed: int, labels: dict[int, str]) -> str:
    config = make_config(id2label=labels)
    model = randomize(ConvTransformerForTemporalActionLocalization(config), seed)
    model.class_head.output.weight.data /= 2  # scores all over the range, none of them 1.0
    model.save_pretrained(folder)
    width = sum(config.stream_widths)
    ConvTransformerFeatureExtractor(width, fps=10, feature_stride=5, num_frames=2, nms_sigma=0.4).save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture(scope="module")
def app():
    specification = importlib.util.spec_from_file_location("app", ROOT / "examples" / "app.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


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
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def served(app, tmp_path_factory):
    """The page at a free port of this machine, with two models that count how often they run."""
    folder = tmp_path_factory.mktemp("models")
    models = {}
    for seed, (name, labels) in enumerate({"first": LABELS, "second": PLAIN}.items()):
        model = make_detector(folder / name, seed, labels)
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
    yield address, models
    page.close(verbose=False)


# --- The browser ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
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
    address, _ = served
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
        page.set_default_timeout(SECONDS)
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
    page.wait_for_selector("#downloads button:enabled, #message .message")


def read_list(page) -> list[tuple]:
    """What the list shows: label, start, end, and the score in two decimals."""
    return page.evaluate(
        """[...document.querySelectorAll("#timeline .list button")].map((one) => [one.querySelector(".name").textContent,
        parseFloat(one.dataset.start), parseFloat(one.dataset.end), one.querySelector(".score").textContent])"""
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
    for _ in range(100):
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


# --- Tests ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_settings_redraw_without_running_the_model(open_page, served, files):
    _, models = served
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
    assert page.is_visible("#sigma")
    assert not page.is_visible("#iou")
    choose(page, "nms", "Hard NMS")
    assert_shows(page, expected["hard"], seconds)
    assert page.is_visible("#iou")
    assert not page.is_visible("#sigma")
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
    _, models = served
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
    _, models = served
    page, other = open_page(), open_page()
    expected = {
        name: find(localize, np.load(files["walk & rest.npy"]), threshold=0.3) for name, localize in models.items()
    }
    drop(page, files["walk & rest.npy"])
    assert_shows(page, expected["first"], 29.7)

    # A session is not touched by what another does, nor its segments by another's settings.
    signal = models["first"]({"signal": str(files["signal.npy"])}, threshold=0.3)
    drop(other, files["signal.npy"])
    assert_shows(other, sorted(signal, key=lambda row: (row["start"], row["end"])), 40.0)
    set_slider(other, "threshold", 0.9)
    set_slider(page, "threshold", 0.5)
    assert_shows(page, find(models["first"], np.load(files["walk & rest.npy"]), threshold=0.5), 29.7)
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
        "cut.npy": ("cut.npy",),
    }.items():
        drop(page, files[name])
        message = page.inner_text("#message .message")
        for word in (name, *words):
            assert word in message, name
        assert str(files[name].parent) not in message
        assert "/tmp" not in message
        assert "Traceback" not in message
        assert page.is_disabled("#downloads >> text=JSON")
    drop(page, files["short.safetensors"])
    assert page.locator("#message .message").count() == 0
    assert page.locator("#timeline .segment").count() > 0


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
