"""Localize actions with an exported detector, without torch: numpy, ONNX Runtime and the feature extractor.

    python examples/run_onnx.py outputs/watch/exported features.npy
    python examples/run_onnx.py outputs/watch/exported outputs/watch/person08_left_0.npy --signal --threshold 0.5

The folder is one that examples/export.py wrote. The features are a .npy file (time, n_in), as the detector was trained on;
with --signal, raw sensor values (samples, channels), of which windows are cut.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from modeling_convtransformer.feature_extraction_convtransformer import ConvTransformerFeatureExtractor


def localize(folder: Path, recording: Path | dict, threshold: float) -> list[dict]:
    """
    Segments in seconds, best first, each with its label and score.

    Args:
        recording: as the feature extractor takes it, such as `{"signal": path}`.

    Raises:
        ValueError: features that the detector cannot use; the message names the file and what to do.
    """
    import onnxruntime

    feature_extractor = ConvTransformerFeatureExtractor.from_pretrained(folder)
    inputs = feature_extractor(recording, return_tensors="np")

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs = session.run(
        names,
        {
            "input_features": inputs["input_features"].astype(np.float32),
            "attention_mask": inputs["attention_mask"].astype(np.int64),
        },
    )
    found = feature_extractor.post_process_temporal_action_localization(
        dict(zip(names, outputs, strict=True)), threshold=threshold
    )[0]
    id2label = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
    return [
        {"label": id2label[str(label)], "score": score, "start": start, "end": end}
        for (start, end), label, score in zip(
            found["segments"].tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True
        )
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder written by examples/export.py")
    parser.add_argument("features", type=Path, help=".npy file of features (time, n_in)")
    parser.add_argument("--signal", action="store_true", help="the file holds raw sensor values (samples, channels)")
    parser.add_argument("--threshold", type=float, default=0.3, help="least score to show (default: 0.3)")
    options = parser.parse_args()
    needed = [options.folder / name for name in ("model.onnx", "config.json", "preprocessor_config.json")]
    for file in (*needed, options.features):
        if not file.is_file():
            parser.error(f"there is no {file}")
    try:
        recording = {"signal" if options.signal else "features": options.features}
        segments = localize(options.folder, recording, options.threshold)
    except ModuleNotFoundError as error:
        parser.error(f'{error.name} is not installed: pip install -e ".[export]"')
    except ValueError as error:
        parser.error(str(error))
    print(f"{options.features.name}: {len(segments)} segments with a score above {options.threshold}\n")
    print(f"{'found':<22}{'start':>8}{'end':>8}{'score':>8}")
    for one in sorted(segments, key=lambda segment: segment["start"]):
        print(f"{one['label']:<22}{one['start']:>8.1f}{one['end']:>8.1f}{one['score']:>8.2f}")


if __name__ == "__main__":
    main()
