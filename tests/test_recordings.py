"""Files of video, sound and sensors: every frame says its number, so that what is shown when is known without a decoder."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media import decode, ffprobe, tone, write_sound, write_video

from modeling_convtransformer.recordings import AudioFile, VideoFile, read_signal

pytest.importorskip("av", reason='these tests need PyAV: pip install "modeling-convtransformer[video]"')

NTSC = Fraction(30000, 1001)
UNEVEN = np.cumsum([0.0, *([0.02] * 12), *([0.1] * 6), *([0.04] * 9), 0.35, *([1 / 30] * 11)]).tolist()
VIDEOS = {
    "h264_25.mp4": {"rate": 25},
    "h264_2997.mp4": {"rate": NTSC, "sound": True},
    "vp9_25.webm": {"rate": 25, "codec": "libvpx-vp9"},
    "vp9_2997.webm": {"rate": NTSC, "codec": "libvpx-vp9", "sound": True},
    "h264_vfr.mp4": {"times": UNEVEN},
    "vp9_vfr.webm": {"times": UNEVEN, "codec": "libvpx-vp9"},
    "h264_rotated.mp4": {"rate": 25, "rotation": 90},
    "h264_upside_down.mp4": {"rate": NTSC, "rotation": 180},
    "h264_late.mkv": {"times": [0.5 + number / 25 for number in range(40)], "sound": True},
    "h264.ts": {"rate": 25},
    "mpeg4.avi": {"rate": 25, "codec": "mpeg4"},
    "h264.avi": {"rate": 25},
}


def has_torchcodec() -> bool:
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_video(folder / name, **arguments) for name, arguments in VIDEOS.items()}


def true_times(name: str) -> np.ndarray:
    arguments = VIDEOS[name]
    return np.array(arguments.get("times") or [number / float(arguments["rate"]) for number in range(40)])


@pytest.mark.parametrize("name", VIDEOS)
def test_frame_times_are_those_of_ffprobe(videos, name):
    frames = ffprobe(videos[name], "frame=pts_time,best_effort_timestamp_time")["frames"]
    times = VideoFile(videos[name]).frame_times
    assert len(times) == len(frames)
    # AVI has no times of showing: FFmpeg guesses some, a frame later where they are reordered.
    if name.endswith(".avi"):
        guessed = [frame.get("best_effort_timestamp_time", "nan") for frame in frames]
        assert np.nanmax(late := np.array(guessed, dtype=float) - times) <= np.nanmin(late) + 1e-6
        assert np.nanmax(late) <= 0.04 + 1e-6
    else:
        found = [float(frame["pts_time"]) for frame in frames]
        np.testing.assert_allclose(times, found, rtol=0, atol=1e-6)  # it prints 6 digits


@pytest.mark.parametrize("name", VIDEOS)
def test_frame_times_are_those_that_were_written(videos, name):
    video = VideoFile(videos[name], decoder="pyav")
    times = true_times(name)
    # WebM and Matroska round times to milliseconds, MPEG-TS to 1/90000 s.
    offset = video.frame_times[0] - times[0]
    np.testing.assert_allclose(video.frame_times - offset, times, rtol=0, atol=1.1e-3)
    if "times" not in VIDEOS[name]:
        assert video.fps == pytest.approx(float(VIDEOS[name]["rate"]), rel=1e-9)
    last = 1 / video.fps if "times" not in VIDEOS[name] else 0.05
    assert video.duration == pytest.approx(times[-1] + offset - video.start_time + last, abs=0.05)


@pytest.mark.parametrize("decoder", ["pyav", "torchcodec"])
@pytest.mark.parametrize("name", VIDEOS)
def test_a_frame_is_shown_from_its_time_to_the_next(videos, name, decoder):
    if decoder == "torchcodec" and not has_torchcodec():
        pytest.skip("torchcodec cannot be loaded here (it needs FFmpeg's libraries: apt install ffmpeg)")
    if decoder == "torchcodec" and name == "h264.ts":
        decoder = "auto"  # torchcodec 0.13 finds others there, which is noticed
    video = VideoFile(videos[name], decoder=decoder)
    times = video.frame_times - video.start_time
    rotation = VIDEOS[name].get("rotation", 0)
    seconds = np.sort(np.concatenate([times + 0.001, times[1:] - 0.003, [0.0, times[-1] + 5.0]]))
    shown = video.frames_at(seconds)
    expected = np.maximum(np.searchsorted(times, seconds, side="right") - 1, 0)
    assert [decode(frame, rotation) for frame in shown] == expected.tolist()
    assert shown.dtype == torch.uint8
    assert tuple(shown.shape[1:]) == ((3, 64, 48) if rotation == 90 else (3, 48, 64))
    assert (video.rotation, video.width, video.height) == (rotation, shown.shape[3], shown.shape[2])


def test_rotation_is_what_ffprobe_says(videos):
    sides = ffprobe(videos["h264_rotated.mp4"], "stream_side_data=rotation")["streams"][0]["side_data_list"]
    assert VideoFile(videos["h264_rotated.mp4"]).rotation == sides[0]["rotation"] % 360


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 39), min_size=1, max_size=8), st.sampled_from(["h264_25.mp4", "vp9_vfr.webm", "h264.ts"])
)
def test_reading_anywhere_in_any_order(videos, numbers, name):
    video = VideoFile(videos[name], decoder="pyav")
    for number in numbers:  # each from wherever the last one ended: forward, back, over key frames
        assert decode(video.frames_at([video.frame_times[number] - video.start_time])[0]) == number


def test_both_decoders_give_the_same_bytes(videos, tmp_path):
    if not has_torchcodec():
        pytest.skip("torchcodec cannot be loaded here (it needs FFmpeg's libraries: apt install ffmpeg)")
    ten = write_video(tmp_path / "ten.mp4", pixels="yuv420p10le")
    comb = write_video(tmp_path / "comb.mp4", options={"flags": "+ilme+ildct", "x264-params": "tff=1"})
    for path in (videos["h264_2997.mp4"], videos["vp9_25.webm"], videos["h264_rotated.mp4"], ten, comb):
        seconds = np.arange(0, 1.5, 0.04)
        one, other = (VideoFile(path, decoder).frames_at(seconds) for decoder in ("pyav", "torchcodec"))
        # Their builds of FFmpeg may round colours differently.
        assert (one.int() - other.int()).abs().max() <= 2


def cut(path, to, share):
    to.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return to


def test_bad_files_are_named(videos, tmp_path):
    av = pytest.importorskip("av")
    (tmp_path / "text.mp4").write_text("hello " * 50)
    (tmp_path / "empty.mp4").touch()
    codec = videos["h264_25.mp4"].read_bytes().replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC")
    (tmp_path / "codec.mp4").write_bytes(codec)
    with av.open(str(tmp_path / "frameless.mp4"), "w", options={"movflags": "empty_moov+frag_keyframe"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    long = write_video(tmp_path / "long.mkv", frames=200, rate=25)
    broken = bytearray(videos["h264_25.mp4"].read_bytes())
    start = broken.index(b"mdat") + 4
    end = broken.index(b"moov") - 4 if broken.index(b"moov") > start else len(broken)
    broken[start:end] = bytes(end - start)
    (tmp_path / "zeros.mp4").write_bytes(broken)
    (tmp_path / "joined.ts").write_bytes(2 * videos["h264.ts"].read_bytes())
    bad = {
        tmp_path / "missing.mp4": "there is no such file",
        tmp_path: "a folder",
        tmp_path / "text.mp4": "not readable as a recording",
        tmp_path / "empty.mp4": "0 bytes",
        tmp_path / "codec.mp4": "codec",
        tmp_path / "frameless.mp4": "frames",
        tmp_path / "zeros.mp4": "can be decoded",
        tmp_path / "joined.ts": r"its clock jumps back from \d\.\d\d s to 0\.00 s",
        write_sound(tmp_path / "sound.wav"): "no video stream; the streams it has: audio",
        cut(videos["h264_25.mp4"], tmp_path / "cut.mp4", 0.5): "truncated",
        cut(long, tmp_path / "cut.mkv", 0.5): "truncated: its header says",
    }
    for path, words in bad.items():
        with pytest.raises(ValueError, match=words) as raised:
            VideoFile(path)
        assert str(path) in str(raised.value)
    with pytest.raises(ValueError, match="no audio stream; the streams it has: video"):
        AudioFile(videos["h264_25.mp4"], 16000)
    with pytest.raises(ValueError, match="decoder is 'opencv'"):
        VideoFile(videos["h264_25.mp4"], decoder="opencv")


@pytest.mark.parametrize(
    "name", ["h264.mkv", "vp9.webm", "h264.avi", "first.mp4", "pieces.mp4", "sound.wav", "sound.flac"]
)
def test_files_that_were_cut_off_are_told(tmp_path, name):
    flags = {"first.mp4": "faststart", "pieces.mp4": "frag_keyframe+empty_moov"}
    if name.startswith("sound"):
        whole = write_sound(tmp_path / name, seconds=5)
        open_file = lambda path: AudioFile(path, 16000)  # noqa: E731
    else:
        codec = "libvpx-vp9" if name == "vp9.webm" else "libx264"
        whole = write_video(tmp_path / name, 60, codec=codec, container_options={"movflags": flags.get(name, "")})
        open_file = VideoFile
    assert open_file(whole).duration > 0.9
    # (FLAC says how long it is, but not how large. The pieces of an MP4 are followed by a table that nobody needs.)
    for share in (0.6,) if name == "sound.flac" else (0.3, 0.5) if name == "pieces.mp4" else (0.7, 0.9, 0.98):
        with pytest.raises(ValueError, match=rf"cut.{name}: truncated: its header says"):
            open_file(cut(whole, tmp_path / f"cut.{name}", share))
    with open(whole, "ab") as file:
        file.write(b"something behind it" * 9)
    assert open_file(whole).duration > 0.9


@pytest.mark.parametrize("form", ["matroska", "avi", "wav"])
def test_what_was_written_into_a_pipe_has_no_length_to_keep(tmp_path, form):
    av = pytest.importorskip("av")

    class Pipe:
        def __init__(self, file):
            self.write = file.write

    with open(tmp_path / "piped", "wb") as file, av.open(Pipe(file), "w", format=form) as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux([*stream.encode(frame), *stream.encode()])
    assert AudioFile(tmp_path / "piped", 16000).duration == pytest.approx(1.0, abs=0.01)


def test_a_name_with_a_colon_is_a_name(videos, tmp_path, monkeypatch):
    (tmp_path / "cut:final.mp4").write_bytes(videos["h264_25.mp4"].read_bytes())
    monkeypatch.chdir(tmp_path)
    for decoder in ("auto", "pyav"):
        assert decode(VideoFile("cut:final.mp4", decoder).frames_at([0.02])[0]) == 0


def test_a_damaged_stretch_shows_other_frames_and_ends_with_it(tmp_path):
    av = pytest.importorskip("av")
    path = write_video(tmp_path / "damaged.mp4", frames=60, rate=25)
    seconds = np.arange(60) / 25 + 0.02
    whole = VideoFile(path, decoder="pyav").frames_at(seconds)
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    for packet in packets[20:23]:
        content[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(content)
    for decoder in ("auto", "pyav"):
        shown = VideoFile(path, decoder=decoder).frames_at(seconds)
        assert torch.equal(shown[:12], whole[:12])
        assert torch.equal(shown[-12:], whole[-12:])  # after the next key frame


# ---------------------------------------------------------------------------------------------------------------------
# Sound


def test_sound_is_what_was_written(tmp_path):
    for name in ("tone.wav", "tone.flac"):
        audio = AudioFile(write_sound(tmp_path / name), 16000)
        assert audio.duration == pytest.approx(3.0, abs=1e-6)
        samples = audio.read(0, 48000).numpy()
        np.testing.assert_allclose(samples, tone(3.0, 16000), rtol=0, atol=0.51 / 32768)  # 16 bits
        assert (audio.read(48000, 48100) == 0).all()  # silence after the end


def test_frames_of_sound_without_a_time_are_heard(tmp_path):
    path = write_sound(tmp_path / "adpcm.wav", codec="adpcm_ima_wav")  # each second frame has none
    samples = AudioFile(path, 16000).read(0, 48000).numpy()
    # 4 bits a sample, which begin to fit after some: the tone, roughly, and nowhere silence in its place.
    assert np.abs(samples - tone(3.0, 16000))[100:].max() < 0.1


def test_sound_in_pieces_is_the_same(tmp_path):
    audio = AudioFile(write_sound(tmp_path / "tone.flac", rate=44100), 16000)
    whole = audio.read(0, 48000)
    pieces = torch.cat([audio.read(start, min(start + 777, 48000)) for start in range(0, 48000, 777)])
    assert torch.equal(pieces, whole)
    assert torch.equal(audio.read(5000, 9000), whole[5000:9000])  # back
    # Resampled: the same tone, but where the filter starts and ends.
    np.testing.assert_allclose(whole[100:-100].numpy(), tone(3.0, 16000)[100:-100], rtol=0, atol=5e-3)


def test_sound_of_a_video_that_starts_late_keeps_its_time(tmp_path):
    path = write_video(tmp_path / "late.mkv", times=[0.5 + number / 25 for number in range(40)], sound=True)
    assert VideoFile(path).start_time == pytest.approx(AudioFile(path, 16000).start_time)


# ---------------------------------------------------------------------------------------------------------------------
# Sensors

TIMES = np.arange(200) / 50
VALUES = np.stack([np.sin(TIMES), np.cos(TIMES), TIMES], axis=1)


def write_csv(path, times=None, values=VALUES, header="x,y,z", delimiter=",", unit=1.0):
    rows = values if times is None else np.column_stack([times * unit, values])
    lines = [] if header is None else [header]
    lines += [delimiter.join(f"{value:.9g}" for value in row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def needs_arrow(request):
    if "path" in request.fixturenames or "signal" in request.node.name:
        pytest.importorskip("pyarrow", reason="tables of sensor values need pyarrow: pip install pyarrow")


def test_signals_come_back_from_every_kind_of_file(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"time": TIMES, **{name: VALUES[:, i] for i, name in enumerate("xyz")}})
    parquet.write_table(table, tmp_path / "a.parquet")
    np.save(tmp_path / "a.npy", VALUES)
    np.savez(tmp_path / "a.npz", signal=VALUES, fps=50.0, names=np.arange(3))
    comma = write_csv(tmp_path / "comma.csv", TIMES, header="timestamp,x,y,z")
    comma.write_text(comma.read_text().replace(",", ";").replace(".", ","))
    files = {
        write_csv(tmp_path / "plain.csv"): 50.0,
        write_csv(tmp_path / "bare.csv", header=None): 50.0,
        write_csv(tmp_path / "seconds.csv", TIMES, header="time,x,y,z"): None,
        write_csv(tmp_path / "milli.csv", TIMES, header="Time (ms),x,y,z", unit=1e3): None,
        write_csv(tmp_path / "micro.tsv", TIMES, header="timestamp_us\tx\ty\tz", delimiter="\t", unit=1e6): None,
        comma: None,
        tmp_path / "a.parquet": None,
        tmp_path / "a.npy": 50.0,
        tmp_path / "a.npz": None,
    }
    for path, fps in files.items():
        signal, found = read_signal(path, fps)
        assert (found, signal.dtype) == (50.0, np.float32), path
        np.testing.assert_allclose(signal, VALUES, rtol=0, atol=1e-6, err_msg=str(path))


def test_dates_since_1970_are_told_by_their_size(tmp_path):
    for number, (unit, digits) in enumerate([(1.0, ".3f"), (1e3, ".0f"), (1e9, ".0f")]):
        path = tmp_path / f"{number}.csv"
        rows = [f"{(1.69e9 + time) * unit:{digits}},{x:.9g}" for time, x in zip(TIMES, VALUES[:, 0], strict=True)]
        path.write_text("\n".join(["timestamp,x", *rows]))
        signal, fps = read_signal(path)
        assert fps == 50.0
        np.testing.assert_allclose(signal[:, 0], VALUES[:, 0], rtol=0, atol=1e-6)
    path.write_text("when,x\n" + "\n".join(f"2026-01-01T00:00:0{i // 10}.{i % 10}00,{i}" for i in range(50)))
    signal, fps = read_signal(path)
    assert (fps, signal.shape) == (10.0, (50, 1))


def test_uneven_times_are_put_on_a_clock(tmp_path):
    rng = np.random.default_rng(0)
    times = np.sort(np.concatenate([[0.0, 4.0], rng.uniform(0, 4, 300)]))
    path = write_csv(tmp_path / "uneven.csv", times, np.sin(times)[:, None], header="t,x")
    signal, fps = read_signal(path, fps=50)
    clock = np.arange(201) / 50
    assert fps == 50
    np.testing.assert_allclose(signal[:, 0], np.interp(clock, times, np.sin(times)), rtol=0, atol=1e-6)


def test_columns_are_taken_by_name_and_in_order(tmp_path):
    path = tmp_path / "labelled.csv"
    path.write_text("time,x,label,y\n" + "\n".join(f"{i / 50},{i},walk,{-i}" for i in range(20)))
    signal, _ = read_signal(path, columns=["y", "x"])
    np.testing.assert_array_equal(signal, np.stack([-np.arange(20), np.arange(20)], axis=1))
    with pytest.raises(ValueError, match=r"column 'label' holds 'walk' \(line 2\).*columns=\['x', 'y'\]"):
        read_signal(path)
    with pytest.raises(ValueError, match="has no columns w; those it has: time, x, label, y"):
        read_signal(path, columns=["w"])


def test_tables_as_watches_phones_and_pandas_write_them(tmp_path):
    times = np.arange(200) / 100
    dates = [f"2024-03-01 12:00:{int(time):02}.{round(1000 * time) % 1000:03}" for time in times]
    rows = [",".join(f"{value:.9g}" for value in row) for row in VALUES]
    dated = [f"{date},{row}" for date, row in zip(dates, rows, strict=True)]
    written = {
        "axivity.csv": dated,  # no header
        "pandas.csv": ["0,1,2", *rows],  # a frame without names
        "phone.csv": [
            "time,seconds_elapsed,z,y,x",
            *(f"{1700000000000000000 + 10000000 * i},{i / 100:g},{row}" for i, row in enumerate(rows)),
        ],
        "watch.csv": ["Elapsed Time (ms),x,y,z", *(f"{10 * i},{row}" for i, row in enumerate(rows))],
        "excel.csv": ["sep=,", "x,y,z", *rows],
        "remarks.csv": ["# recorded at home", "# left arm", "x,y,z", *rows],
        "american.csv": ["time,x,y,z", *(f"03/01/2024 12:00:00,{row}" for row in rows)],  # of no use; fps is given
    }
    for name, lines in written.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        signal, fps = read_signal(
            tmp_path / name, 100 if name not in ("axivity.csv", "phone.csv", "watch.csv") else None
        )
        assert fps == 100, name
        np.testing.assert_allclose(signal, VALUES, rtol=0, atol=1e-6, err_msg=name)
    # Remarks count as lines.
    (tmp_path / "remarks.csv").write_text("# at home\nx,y,z\n1,2,3\n1,oops,3\n")
    with pytest.raises(ValueError, match=r"column 'y' holds 'oops' \(line 4\)"):
        read_signal(tmp_path / "remarks.csv", 50)


def test_bad_signals_are_named(tmp_path):
    good = [f"{i / 50:g},{i},{-i}" for i in range(100)]

    def write(name, lines, header="time,x,y"):
        (tmp_path / name).write_text("\n".join([header, *lines]) + "\n")
        return tmp_path / name

    text, hole, jump, back = (list(good) for _ in range(4))
    text[10] = "0.2,oops,3"
    hole[11] = "0.22,,3"
    jump[50:] = [f"{5 + i / 50:g},{i},{-i}" for i in range(50, 100)]
    back[20] = "0.1,1,1"
    (tmp_path / "latin.csv").write_bytes("zeit,größe\n1,2\n".encode("latin-1"))
    (tmp_path / "empty.csv").touch()
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "two.npz", a=VALUES, b=VALUES)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "two.npz").read_bytes()[:2000])
    np.savez(tmp_path / "rate.npz", signal=VALUES, fps=-3.0)
    np.save(tmp_path / "hollow.npy", np.zeros((0, 3)))
    bad = [
        (write("text.csv", text), "column 'x' holds 'oops' (line 12)"),
        (write("hole.csv", hole), "column 'x' has 1 gaps, the first in line 13"),
        (write("jump.csv", jump), "a gap of 5.02 s before line 52"),
        (write("back.csv", back), "time does not rise in line 22"),
        (write("ragged.csv", [*good, "1,2"]), "not readable as a table"),
        (write("none.csv", []), "has no samples"),
        (write("nan.csv", [*good, "2,nan,1"]), "column 'x' h"),
        (write("rate.csv", [line.split(",", 1)[1] for line in good], header="x,y"), "sampling rate is missing"),
        (write("counts.csv", [f"{i},1,2" for i in range(9)]), "the unit of column 'time' is unclear"),
        (tmp_path / "latin.csv", "Save it as UTF-8"),
        (tmp_path / "empty.csv", "the file is empty (0 bytes)"),
        (tmp_path / "absent.csv", "there is no such file"),
        (write("table.xlsx", good), "not a sensor file"),
        (tmp_path / "objects.npy", "refused"),
        (tmp_path / "two.npz", "expected one array"),
        (tmp_path / "cut.npz", "not readable as an array"),
        (tmp_path / "rate.npz", "fps is np.float64(-3.0)"),
        (tmp_path / "hollow.npy", "has no samples"),
        (write("us.csv", ["03/01/2024 12:00:00,1,2"] * 3), "the times in column 'time' are not understood"),
    ]
    for path, words in bad:
        with pytest.raises(ValueError, match=re.escape(words)) as raised:
            read_signal(path)
        assert str(path) in str(raised.value)
