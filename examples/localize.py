"""Localize actions in one recording: a trained model and raw sensor values in, a table and a picture out.

    python examples/localize.py outputs/watch/model outputs/watch/person08_left_0.npy --picture timeline.png

The signal is a .npy file (samples, channels) at the rate that the model was trained on. It is cut into the windows that
the model's preprocessor_config.json names (num_frames samples, one window every feature_stride samples).
"""

import argparse
import json
from pathlib import Path

import numpy as np
from transformers import logging, pipeline

import modeling_convtransformer  # noqa: F401 - registers the pipeline
from modeling_convtransformer.visualization import plot_timeline, save_figure


def format_table(segments: list[dict], truth: list[dict] | None) -> str:
    """The segments found in order of time, each beside the true segment that it overlaps most."""
    lines = [f"{'found':<22}{'start':>8}{'end':>8}{'score':>8}" + ("" if truth is None else "   truth")]
    for found in sorted(segments, key=lambda segment: segment["start"]):
        line = f"{found['label']:<22}{found['start']:>8.1f}{found['end']:>8.1f}{found['score']:>8.2f}"
        if truth is not None:
            overlaps = [min(found["end"], one["segment"][1]) - max(found["start"], one["segment"][0]) for one in truth]
            best = int(np.argmax(overlaps)) if overlaps else -1
            if best < 0 or overlaps[best] <= 0:
                line += "   (nothing there)"
            else:
                start, end = truth[best]["segment"]
                line += f"   {truth[best]['label']:<22}{start:>8.1f}{end:>8.1f}"
        lines.append(line)
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder written by save_pretrained")
    parser.add_argument("signal", type=Path, help=".npy file of sensor values (samples, channels)")
    parser.add_argument(
        "--truth", type=Path, help='JSON to show beside: [{"label": ..., "segment": [start, end]}, ...]'
    )
    parser.add_argument("--picture", type=Path, help="timeline to write: .png, .svg or .pdf")
    parser.add_argument("--threshold", type=float, default=0.3, help="least score to show (default: 0.3)")
    options = parser.parse_args()
    for file in (options.model, options.signal, options.truth):
        if file is not None and not file.exists():
            parser.error(f"there is no {file}")

    logging.disable_progress_bar()
    try:
        localize = pipeline("temporal-action-localization", model=str(options.model))
        segments = localize({"signal": options.signal}, threshold=options.threshold)
        signal = np.load(options.signal, allow_pickle=False)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    config, duration = localize.model.config, len(signal) / localize.feature_extractor.fps
    truth = None if options.truth is None else json.loads(options.truth.read_text(encoding="utf-8"))
    print(
        f"{options.signal.name}: {duration:.0f} s, {len(segments)} segments with a score above {options.threshold}\n"
    )
    print(format_table(segments, truth))

    if options.picture is not None:
        ground_truth = truth and [
            {"label": one["label"], "start": one["segment"][0], "end": one["segment"][1]} for one in truth
        ]
        figure = plot_timeline(segments, config.id2label, ground_truth, duration=duration, title=options.signal.stem)
        print(f"\npicture: {save_figure(figure, options.picture)}")


if __name__ == "__main__":
    main()
