"""Localize actions in one recording: a trained model and a file in, a table and a picture out.

    python examples/localize.py outputs/watch/model outputs/watch/person08_left_0.npy --picture timeline.png
    python examples/localize.py a/detector match.mp4 --encoder MCG-NJU/videomae-base --save match.vtt

The recording is a video or sound (through an encoder of transformers), a .csv or .parquet table of sensor values, or an array
(.npy, .npz, .safetensors) of features or, for models of raw windows, of sensor values (samples, channels).
"""

import argparse
from pathlib import Path

import numpy as np
from transformers import pipeline

import modeling_convtransformer  # noqa: F401 - registers the pipeline
from modeling_convtransformer.feature_extraction_convtransformer import ARRAY_SUFFIXES
from modeling_convtransformer.segments import FORMATS, read_segments, write_segments
from modeling_convtransformer.visualization import plot_timeline, save_figure


def format_table(segments: list[dict], truth: list[dict] | None) -> str:
    """The segments found in order of time, each beside the true segment that it overlaps most."""
    lines = [f"{'found':<22}{'start':>8}{'end':>8}{'score':>8}" + ("" if truth is None else "   truth")]
    for found in sorted(segments, key=lambda segment: segment["start"]):
        line = f"{found['label']:<22}{found['start']:>8.1f}{found['end']:>8.1f}{found['score']:>8.2f}"
        if truth is not None:
            overlaps = [min(found["end"], one["end"]) - max(found["start"], one["start"]) for one in truth]
            best = int(np.argmax(overlaps)) if overlaps else -1
            if best < 0 or overlaps[best] <= 0:
                line += "   (nothing there)"
            else:
                line += "   {label:<22}{start:>8.1f}{end:>8.1f}".format(**truth[best])
        lines.append(line)
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder written by save_pretrained, or a name on the Hub")
    parser.add_argument("recording", type=Path, help="video, sound, table of sensor values, or array")
    parser.add_argument("--encoder", help="what makes features of a video or sound (default: what the model names)")
    parser.add_argument("--columns", nargs="+", help="channels of a table (default: all but the times)")
    parser.add_argument("--truth", type=Path, help="segments to show beside, in any format of docs/segments.md")
    parser.add_argument("--picture", type=Path, help="timeline to write: .png, .svg or .pdf")
    parser.add_argument("--save", type=Path, help="segments to write: .json, .csv, .vtt, ... (docs/segments.md)")
    parser.add_argument("--format", choices=FORMATS, help="of --save (default: by its suffix)")
    parser.add_argument("--threshold", type=float, default=0.3, help="least score to show (default: 0.3)")
    options = parser.parse_args()
    for file in (options.recording, options.truth):
        if file is not None and not file.exists():
            parser.error(f"there is no {file}")
    suffixes = (".json", ".csv", ".vtt")
    if options.save is not None and options.format is None and options.save.suffix.lower() not in suffixes:
        parser.error(f"--save {options.save}: only {', '.join(suffixes)} say their format; give --format")

    try:
        truth = None if options.truth is None else read_segments(options.truth)
        if isinstance(truth, dict):  # of many recordings
            if options.recording.stem not in truth:
                raise ValueError(f"{options.truth} has no recording {options.recording.stem}")
            truth = truth[options.recording.stem]
        localize = pipeline("temporal-action-localization", model=options.model)
        is_array = options.recording.suffix.lower() in ARRAY_SUFFIXES
        recording = localize.feature_extractor.as_sample(options.recording) if is_array else options.recording
        sample = localize.open(recording, encoder=options.encoder, columns=options.columns)
        segments = localize(sample, threshold=options.threshold)
        if options.save is not None:
            write_segments(options.save, segments, options.format)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    steps = (len(sample["features"]) - 1) * sample["feature_stride"] + sample["num_frames"]
    duration = sample["duration"] or steps / sample["fps"]
    print(
        f"{options.recording.name}: {duration:.0f} s, {len(segments)} segments with a score above {options.threshold}\n"
    )
    print(format_table(segments, truth))
    if options.picture is not None:
        id2label = localize.model.config.id2label
        figure = plot_timeline(segments, id2label, truth, duration=duration, title=options.recording.stem)
        print(f"\npicture: {save_figure(figure, options.picture)}")


if __name__ == "__main__":
    main()
