"""From files to features: encoders of transformers, made small on the spot, on videos and sound that are real files."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from media import code, save_encoder, tone, write_sound, write_video
from safetensors.numpy import load_file
from safetensors.torch import save_file
from transformers import AutoModel
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function
from transformers.utils import logging

from modeling_convtransformer import features
from modeling_convtransformer.data import TemporalActionDataset
from modeling_convtransformer.feature_extraction_convtransformer import (
    stored_encoder,
    stored_geometry,
    window_features,
)
from modeling_convtransformer.features import extract_features, load_encoder, read_features
from modeling_convtransformer.recordings import VideoFile

pytest.importorskip("av", reason='these tests need PyAV: pip install "modeling-convtransformer[video]"')

ROOT = Path(__file__).resolve().parent.parent
CLOSE = 1e-5  # the same float32 sums in batches of other sizes


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Encoders, and recordings for them."""
    folder = tmp_path_factory.mktemp("features")
    for kind in ("videomae", "timesformer", "vivit", "vjepa2", "dinov2", "wav2vec2", "whisper", "ast"):
        save_encoder(folder / kind, kind)
    write_video(folder / "video.mp4", frames=60, rate=25, sound=True)
    write_video(folder / "short.mp4", frames=2, rate=25)
    times = np.cumsum([0.0, *([0.02] * 30), *([0.08] * 29)]).tolist()
    write_video(folder / "uneven.mp4", frames=60, times=times)
    write_sound(folder / "tone.wav", seconds=2.0)
    return folder


@pytest.fixture(scope="module")
def videomae(files):
    return load_encoder(files / "videomae")


def processed(frames: torch.Tensor, folder: Path) -> torch.Tensor:
    """Frames through transformers' own processor, which resizes with Pillow: (frames, 3, 32, 32)."""
    content = json.loads((folder / "preprocessor_config.json").read_text())
    name = content.get("image_processor_type", "VideoMAEImageProcessor").replace("FeatureExtractor", "ImageProcessor")
    name = name.removesuffix("Fast")
    if not hasattr(transformers, f"{name}Pil"):
        pytest.skip("this transformers has no processor without torchvision to compare with")
    processor = getattr(transformers, f"{name}Pil")(**content)
    values = processor(list(frames.numpy()), return_tensors="pt")["pixel_values"]
    return values[0] if values.ndim == 5 else values


def written_tone() -> np.ndarray:
    """What is in tone.wav: 16 bits a sample."""
    return np.round(32768 * tone(2.0, 16000)) / 32768


# ---------------------------------------------------------------------------------------------------------------------
# Encoders


@pytest.mark.parametrize("kind", ["videomae", "timesformer", "vivit", "vjepa2", "dinov2"])
def test_features_are_the_encoders_of_the_right_frames(files, kind):
    sample = extract_features(files / "video.mp4", load_encoder(files / kind), feature_stride=7, num_frames=12)
    assert {key: sample[key] for key in ("fps", "feature_stride", "num_frames")} == {
        "fps": 25.0,
        "feature_stride": 7,
        "num_frames": 12,
    }
    assert sample["duration"] == pytest.approx(60 / 25)
    assert sample["features"].shape == ((60 - 12) // 7 + 1, 16)

    model = AutoModel.from_pretrained(files / kind).eval()
    for row, found in enumerate(sample["features"]):
        # Of 12 frames the middles of 4 equal parts; an image encoder sees the one in the middle of all.
        numbers = 7 * row + (np.array([6]) if kind == "dinov2" else np.array([1, 4, 7, 10]))
        frames = VideoFile(files / "video.mp4", decoder="pyav").frames_at((numbers + 0.5) / 25)
        values = processed(frames, files / kind)
        values = values if kind == "dinov2" else values[None]
        with torch.no_grad():
            expected = model(values).last_hidden_state.mean(dim=1)[0]
        # Pillow and torch round one grey level in some hundred otherwise.
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-3)
        assert np.std(expected.numpy()) > 0.1
    assert np.abs(np.diff(sample["features"], axis=0)).max() > 0.02  # frames that differ give features that differ


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resample": 3},
        {"resample": 0},
        {"size": {"height": 40, "width": 52}},
        {"size": {"shortest_edge": 20}},  # smaller than the crop: black around it
        {"do_center_crop": False, "size": {"height": 32, "width": 32}},
        {"rescale_factor": 1 / 127.5, "do_normalize": False},
        # A size of one number means what it means to the checkpoint's processor.
        {"image_processor_type": "ViTFeatureExtractor", "size": 36, "do_center_crop": False},
        {"image_processor_type": "CLIPFeatureExtractor", "size": 36, "crop_size": 32},
        {"image_processor_type": "ConvNextFeatureExtractor", "size": 40, "crop_pct": 0.875, "do_center_crop": False},
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "do_center_crop": False},
        # What is null, or left out (...), is as the processor has it.
        {"image_processor_type": "ViTImageProcessorFast", "size": 36, "crop_size": None, "do_center_crop": None},
        {"image_processor_type": "BitImageProcessor", "size": ..., "crop_size": ..., "resample": ...},
        {"image_processor_type": "ConvNextImageProcessor", "size": ..., "do_center_crop": False},
    ],
)
def test_frames_are_prepared_as_transformers_does(tmp_path, settings):
    folder = save_encoder(tmp_path / "encoder", "convnext" if "image_processor_type" in settings else "videomae")
    path = folder / "preprocessor_config.json"
    settings = {key: value for key, value in (json.loads(path.read_text()) | settings).items() if value is not ...}
    path.write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    frames = np.stack([code(number, 96, 64) for number in range(5)]).astype(int) + rng.integers(
        -60, 60, (5, 64, 96, 3)
    )
    frames = torch.from_numpy(np.clip(frames, 0, 255).astype(np.uint8)).permute(0, 3, 1, 2)
    found, expected = load_encoder(folder).prepare(frames), processed(frames, folder)
    assert found.shape == expected.shape
    grey = json.loads(path.read_text()).get("rescale_factor", 1 / 255) / 0.224
    # One grey level, where they round otherwise; two where pictures are enlarged, which rounds along both axes.
    assert (found - expected).abs().max() <= (2.01 if max(found.shape) > 96 else 1.01) * grey
    assert (found - expected).abs().mean() <= 0.02 * grey


def test_poolings(files):
    model = AutoModel.from_pretrained(files / "dinov2").eval()
    frames = VideoFile(files / "video.mp4").frames_at([0.1])
    for pooling in ("mean", "cls", "pooler"):
        encoder = load_encoder(files / "dinov2", pooling=pooling)
        values = encoder.prepare(frames)
        with torch.no_grad():
            outputs = model(values)
        tokens = outputs.last_hidden_state
        expected = {"mean": tokens.mean(1), "cls": tokens[:, 0], "pooler": outputs.pooler_output}[pooling]
        torch.testing.assert_close(encoder.encode(values[:, None]), expected)
    with pytest.raises(ValueError, match="no pooler_output; expected"):
        load_encoder(files / "videomae", pooling="pooler")


def test_a_convolutional_encoder_gives_its_channels(files, tmp_path):
    folder = save_encoder(tmp_path / "convnext", "convnext")
    encoder = load_encoder(folder)
    frames = VideoFile(files / "video.mp4").frames_at([0.1, 0.5])
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder).eval()(encoder.prepare(frames)).last_hidden_state.mean(dim=(2, 3))
    assert encoder.width == expected.shape[1] == 16
    torch.testing.assert_close(encoder.encode(encoder.prepare(frames)[:, None]), expected)
    with pytest.raises(ValueError, match="no first token"):
        load_encoder(folder, pooling="cls")


def test_encoders_that_do_not_fit(files, tmp_path):
    with pytest.raises(ValueError, match="pooling is 'max'; expected one of mean, cls, pooler"):
        load_encoder(files / "videomae", pooling="max")
    with pytest.raises(ValueError, match="dtype is 'float31'"):
        load_encoder(files / "videomae", dtype="float31")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(**small, vocab_size=8)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="takes input_ids; expected an encoder of video, images or sound"):
        load_encoder(tmp_path / "bert")
    folder = save_encoder(tmp_path / "encoder")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="no settings of a video or image processor"):
        load_encoder(folder)
    folder = save_encoder(tmp_path / "odd")
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 36}}))
    with pytest.raises(ValueError, match=r"size is \{'longest_edge': 36\}"):
        load_encoder(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 36, "image_processor_type": "LevitImageProcessor"}')
    with pytest.raises(ValueError, match=r"LevitImageProcessor prepares pictures in a way of its own"):
        load_encoder(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 36, "do_flip_channel_order": True}))
    with pytest.raises(ValueError, match=r"a way of its own \(do_flip_channel_order\)"):
        load_encoder(folder)
    folder = save_encoder(tmp_path / "half")
    weights = {key: torch.from_numpy(value) for key, value in load_file(folder / "model.safetensors").items()}
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="features would be random"):
        load_encoder(folder)


def test_sound_through_an_encoder(files):
    model = AutoModel.from_pretrained(files / "wav2vec2").eval()
    sample = extract_features(files / "tone.wav", load_encoder(files / "wav2vec2"), num_frames=8000)
    assert (sample["fps"], sample["feature_stride"], sample["features"].shape) == (16000.0, 8000, (4, 16))
    window = written_tone()[8000:16000]
    window = (window - window.mean()) / np.sqrt(window.var() + 1e-7)  # what its processor does
    with torch.no_grad():
        expected = model(torch.from_numpy(window).float()[None]).last_hidden_state.mean(dim=1)[0]
    np.testing.assert_allclose(sample["features"][1], expected, rtol=0, atol=CLOSE)
    # Whisper hears 30 s; the silence after the window does not count.
    whisper = extract_features(files / "tone.wav", load_encoder(files / "whisper"))
    assert whisper["features"].shape == (3, 16)
    with pytest.raises(
        ValueError, match=r"tone.wav: .*ast cannot encode windows of 48000 ticks \(it hears 40960 samples at once"
    ):
        extract_features(files / "tone.wav", load_encoder(files / "ast"), num_frames=48000)
    with pytest.raises(ValueError, match="takes sound at 16000 samples a second"):
        extract_features(files / "tone.wav", load_encoder(files / "wav2vec2"), fps=8000)


def test_of_a_spectrogram_in_patches_what_was_heard_counts(files):
    """AST gives tokens of 2.56 s here, of which a window fills one second: 100 steps of 256."""
    model = AutoModel.from_pretrained(files / "ast").eval()
    processor = transformers.AutoFeatureExtractor.from_pretrained(files / "ast")
    window = written_tone()[8000:24000].astype(np.float32)
    inputs = processor(window, sampling_rate=16000, return_tensors="pt")["input_values"]
    rows, columns, heard = 2, 31, 13  # patches of 16 by 16, one each 10 bands and 8 steps; the 13th ends with step 112
    wanted = [2 + row * columns + column for row in range(rows) for column in range(heard)]
    with torch.no_grad():
        tokens = model(inputs).last_hidden_state[0]
        silent = inputs.clone()
        silent[:, 112:] += 1.0
        changed = (model.embeddings(silent) - model.embeddings(inputs)).abs().amax(dim=2)[0] > 0
    assert len(tokens) == 2 + rows * columns
    assert changed.nonzero().flatten().tolist() == [one for one in range(2, len(tokens)) if one not in wanted]
    found = extract_features(files / "tone.wav", load_encoder(files / "ast"))["features"]
    assert found.shape == (3, 16)
    np.testing.assert_allclose(found[1], tokens[wanted].mean(dim=0), rtol=0, atol=CLOSE)


def test_log_mel_is_that_of_transformers(files):
    sample = extract_features(files / "tone.wav", load_encoder("log-mel"))
    filters = mel_filter_bank(257, 64, 125.0, 7500.0, 16000, mel_scale="htk")
    energies = spectrogram(
        written_tone(),
        window_function(400, "hann"),
        400,
        160,
        fft_length=512,
        power=1.0,
        center=False,
        mel_filters=filters,
    )
    assert sample["features"].shape == (198, 64)
    # Sums of hundreds of products in float32, where the logarithm enlarges errors up to a hundredfold; theirs in float64.
    np.testing.assert_allclose(sample["features"], np.log(energies.T + 0.01), rtol=0, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Extraction


@pytest.mark.parametrize("name", ["video.mp4", "uneven.mp4"])
def test_batch_size_makes_no_difference(files, videomae, name):
    expected = extract_features(files / name, videomae, feature_stride=3, batch_size=64)["features"]
    for batch_size in (1, 2, 5):
        found = extract_features(files / name, videomae, feature_stride=3, batch_size=batch_size)["features"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)
    far = extract_features(files / name, videomae, feature_stride=9, batch_size=2)["features"]  # frames are left out
    np.testing.assert_allclose(far, expected[::3][: len(far)], rtol=0, atol=CLOSE)


def test_the_clock_takes_what_is_shown_at_its_ticks(files, videomae, monkeypatch):
    asked = []
    monkeypatch.setattr(
        VideoFile,
        "frames_at",
        lambda self, seconds: asked.append(seconds) or torch.zeros(len(seconds), 3, 48, 64, dtype=torch.uint8),
    )
    sample = extract_features(files / "uneven.mp4", videomae, fps=10, feature_stride=2)
    ticks = round(sample["duration"] * 10)
    assert sample["fps"] == 10
    assert len(sample["features"]) == (ticks - 4) // 2 + 1
    np.testing.assert_allclose(np.concatenate(asked), (np.arange(2 * len(sample["features"]) + 2) + 0.5) / 10)


def test_a_recording_shorter_than_a_window_gives_one_feature(files, videomae):
    sample = extract_features(files / "short.mp4", videomae)
    frames = VideoFile(files / "short.mp4").frames_at(np.array([0, 1, 1, 1]) / 25 + 0.01)  # the last one held
    expected = videomae.encode(videomae.prepare(frames)[None])
    np.testing.assert_allclose(sample["features"], expected, rtol=0, atol=CLOSE)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("at", [1, 4])
def test_an_interrupted_run_goes_on(files, videomae, tmp_path, monkeypatch, at):
    expected = extract_features(files / "video.mp4", videomae, batch_size=3)
    cache, part = tmp_path / "video.safetensors", tmp_path / ".video.safetensors.part"
    encode, batches = videomae.encode, []

    def encode_some(windows):
        batches.append(len(windows))
        if len(batches) > at:
            raise Interrupted
        return encode(windows)

    monkeypatch.setattr(videomae, "encode", encode_some)
    with pytest.raises(Interrupted):
        extract_features(files / "video.mp4", videomae, batch_size=3, cache=cache, save_every=0)
    assert len(read_features(part)[0]["features"]) == 3 * at
    assert not cache.exists()
    monkeypatch.setattr(videomae, "encode", lambda windows: batches.append(len(windows)) or encode(windows))
    batches.clear()
    found = extract_features(files / "video.mp4", videomae, batch_size=4, cache=cache)
    assert sum(batches) == len(expected["features"]) - 3 * at
    assert [path.name for path in tmp_path.iterdir()] == [cache.name]
    np.testing.assert_allclose(found["features"], expected["features"], rtol=0, atol=CLOSE)
    batches.clear()
    again = extract_features(files / "video.mp4", videomae, cache=cache)
    assert not batches
    assert {**again, "features": None} == {**expected, "features": None}
    np.testing.assert_array_equal(again["features"], found["features"])


@pytest.mark.slow
def test_a_killed_process_goes_on(files, videomae, tmp_path):
    cache = tmp_path / "video.safetensors"
    program = f"""
        import time
        from modeling_convtransformer.features import VideoEncoder, extract_features, load_encoder
        encode = VideoEncoder.encode
        VideoEncoder.encode = lambda self, windows: time.sleep(0.2) or encode(self, windows)
        encoder = load_encoder({str(files / "videomae")!r})
        extract_features({str(files / "video.mp4")!r}, encoder, batch_size=2, cache={str(cache)!r}, save_every=0)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], env=environment)
    part = tmp_path / ".video.safetensors.part"
    deadline = time.monotonic() + 120
    while not part.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(read_features(part)[0]["features"])
    expected = extract_features(files / "video.mp4", videomae)["features"]
    assert 0 < done < len(expected)
    found = extract_features(files / "video.mp4", videomae, cache=cache)["features"]
    np.testing.assert_array_equal(
        found[:done], extract_features(files / "video.mp4", videomae, batch_size=2)["features"][:done]
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)


def test_a_cache_says_what_it_is_and_is_not_taken_for_another(files, videomae, tmp_path):
    cache = tmp_path / "video.safetensors"
    sample = extract_features(files / "video.mp4", videomae, cache=cache)
    read, description = read_features(cache)
    np.testing.assert_array_equal(read["features"], sample["features"])
    assert description["encoder"] == str(files / "videomae")
    assert (description["pooling"], description["dtype"], description["recording"]) == ("mean", "float32", "video.mp4")
    assert stored_geometry(cache) == {"fps": 25, "feature_stride": 2, "num_frames": 4, "duration": 2.4}
    assert stored_encoder(cache) == {"name": str(files / "videomae"), "pooling": "mean", "dtype": "float32"}
    assert description["encoder_revision"] == ""  # of a folder
    for arguments, words in [
        ({"feature_stride": 3}, "feature_stride is 2, now 3"),
        ({"fps": 10}, "fps is 25.0, now 10.0"),
        ({"encoder": load_encoder(files / "videomae", pooling="cls")}, "pooling is mean, now cls"),
        ({"encoder": load_encoder(files / "timesformer")}, "encoder_weights is"),
        ({"path": files / "uneven.mp4"}, "of video.mp4, not of this uneven.mp4"),
    ]:
        with pytest.raises(ValueError, match=words):
            extract_features(**{"path": files / "video.mp4", "encoder": videomae, "cache": cache, **arguments})
    # The same weights elsewhere, and the same file under another name, are the same.
    (tmp_path / "copy.mp4").write_bytes((files / "video.mp4").read_bytes())
    os.symlink(files / "videomae", tmp_path / "elsewhere")
    extract_features(tmp_path / "copy.mp4", load_encoder(tmp_path / "elsewhere"), cache=cache)
    # What another program left half written is done anew.
    cache.rename(tmp_path / "whole")
    (tmp_path / ".video.safetensors.part").write_bytes(b"half")
    extract_features(files / "video.mp4", videomae, cache=cache)
    with pytest.raises(ValueError, match=r"must be a \.safetensors file"):
        extract_features(files / "video.mp4", videomae, cache=tmp_path / "video.npy")


def test_sensor_files_are_cut_into_windows(tmp_path):
    pytest.importorskip("pyarrow", reason="tables of sensor values need pyarrow: pip install pyarrow")
    values = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    rows = [",".join([f"{i / 50:g}", *map(repr, map(float, row))]) for i, row in enumerate(values)]
    (tmp_path / "session.csv").write_text("\n".join(["time,x,y,z", *rows]))
    arguments = {"feature_stride": 10, "num_frames": 20}
    sample = extract_features(tmp_path / "session.csv", **arguments, cache=tmp_path / "session.safetensors")
    np.testing.assert_array_equal(sample["features"], window_features(values, 20, 10))
    assert {key: sample[key] for key in ("fps", "duration", *arguments)} == {"fps": 50.0, "duration": 2.0, **arguments}
    again = extract_features(tmp_path / "session.csv", **arguments, cache=tmp_path / "session.safetensors")
    np.testing.assert_array_equal(again["features"], sample["features"])
    two = extract_features(tmp_path / "session.csv", **arguments, columns=["z", "x"])
    np.testing.assert_array_equal(two["features"], window_features(values[:, [2, 0]], 20, 10))
    with pytest.raises(ValueError, match=r"session\.csv: feature_stride and num_frames are missing"):
        extract_features(tmp_path / "session.csv")
    with pytest.raises(ValueError, match=r"100 samples .* expected at least the 101"):
        extract_features(tmp_path / "session.csv", feature_stride=1, num_frames=101)


def test_wrong_calls(files, videomae):
    with pytest.raises(ValueError, match=r"video\.mp4: a recording of this kind needs an encoder"):
        extract_features(files / "video.mp4")
    with pytest.raises(ValueError, match="leave the encoder out"):
        extract_features(files / "video.mp4", videomae, columns=["x"])
    for name, values in {
        "batch_size": (0, True, "x"),
        "num_frames": (2.5, -1),
        "fps": (0.0, -1, float("nan")),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{name} is "):
                extract_features(files / "video.mp4", videomae, **{name: value})
    with pytest.raises(ValueError, match=r"tone\.wav: .* cannot encode windows of 10 ticks"):
        extract_features(files / "tone.wav", load_encoder(files / "wav2vec2"), num_frames=10)
    with pytest.raises(ValueError, match=r"tone\.wav: no video stream"):
        extract_features(files / "tone.wav", videomae)


def test_data_sets_take_the_geometry_of_the_files(files, videomae, tmp_path):
    for name in ("video", "uneven"):
        extract_features(files / f"{name}.mp4", videomae, fps=12.5, cache=tmp_path / f"{name}.safetensors")
    entry = {"subset": "a", "duration": 2.4, "fps": 25, "annotations": [{"label": "x", "segment": [0.4, 1.2]}]}
    annotations = {"database": {"video": entry, "uneven": entry}}
    dataset = TemporalActionDataset(annotations, tmp_path, feature_stride=2, num_frames=4)
    assert dataset.encoder == stored_encoder(tmp_path / "video.safetensors")
    assert dataset[0]["geometry"]["fps"] == 12.5  # the clock's, whatever the video's was
    np.testing.assert_allclose(dataset[0]["segments"], [[(0.4 * 12.5 - 2) / 2, (1.2 * 12.5 - 2) / 2]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"video: .* was made with feature_stride 2, but the data set has 4"):
        TemporalActionDataset(annotations, tmp_path, feature_stride=4, num_frames=4)
    (tmp_path / "uneven.safetensors").unlink()
    other = load_encoder(files / "timesformer")
    extract_features(files / "uneven.mp4", other, fps=12.5, num_frames=4, cache=tmp_path / "uneven.safetensors")
    with pytest.raises(ValueError, match=r"uneven: .* was made by the encoder"):
        TemporalActionDataset(annotations, tmp_path, feature_stride=2, num_frames=4)


def test_memory_does_not_grow_with_the_video(files, tmp_path, monkeypatch):
    """Frames that are held at once: those of a batch, however long the recording is."""
    held = []
    encoder = load_encoder(files / "videomae")
    read = features._VideoTicks.read
    monkeypatch.setattr(features._VideoTicks, "read", lambda self, ticks: held.append(len(ticks)) or read(self, ticks))
    long = write_video(tmp_path / "long.mp4", frames=600, rate=25)
    extract_features(long, encoder, batch_size=4)
    assert max(held) == 3 * 2 + 4
    assert sum(held) == 600
