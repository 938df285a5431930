"""Features of all recordings in a folder: videos or sound through an encoder, sensor files in windows.

    python examples/extract_features.py videos/ features/ --encoder MCG-NJU/videomae-base --feature_stride 8 --device cuda
    python examples/extract_features.py videos/ features/ --encoder log-mel
    python examples/extract_features.py sessions/ features/ --num_frames 50 --feature_stride 25 --columns acc_x acc_y acc_z

features/ gets a .safetensors file for each recording, under the same name; examples/train.py, the pipeline and
examples/batch_inference.py read it, with the rate, the stride and the encoder that it says it has.

A killed run goes on with the same command, in the middle of a recording if need be. The same command may run on many machines
that share the folders: none does what another is doing or has done. A recording that cannot be read is left out; all such are
listed at the end, with the reason, and the exit status is 1.
"""

import argparse
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import logging

from modeling_convtransformer import ConvTransformerFeatureExtractor
from modeling_convtransformer.features import extract_features, load_encoder
from modeling_convtransformer.recordings import AUDIO_SUFFIXES, SIGNAL_SUFFIXES, VIDEO_SUFFIXES

encoder = None  # of the process that extracts


def start(settings: dict | None, device: str, threads: int, numbers):
    """In each of several processes: its own encoder, on a GPU of its own where there are several."""
    global encoder
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    if settings is not None:
        if device == "cuda":
            with numbers.get_lock():
                device, numbers.value = f"cuda:{numbers.value % torch.cuda.device_count()}", numbers.value + 1
        encoder = load_encoder(**settings, device=device)


def end_with(parent):
    """A process that waits for work would not notice that nobody is left to give it, and keep its memory for good."""
    parent.join()
    os._exit(1)  # as if killed: what it has done lies beside the file


def extract(path: Path, target: Path, locks: Path, settings: dict) -> tuple[str, str]:
    """What became of a recording: "done", "there already", "taken" by another process, or "failed" and why."""
    locks.mkdir(parents=True, exist_ok=True)
    try:
        # The operating system frees the lock of a process that dies, whatever it dies of.
        with FileLock(locks / "{}.lock".format("_".join(target.relative_to(locks.parent).parts)), timeout=0):
            was_there = target.exists()  # and of the same encoder, or it raises
            extract_features(path, encoder, cache=target, **settings)
            return "there already" if was_there else "done", ""
    except Timeout:
        return "taken", ""
    except Exception as error:
        reason = " ".join(str(error).split())
        return "failed", reason if str(path) in reason else f"{path}: {type(error).__name__}: {reason}"


def find(folder: Path, output: Path, suffixes: tuple[str, ...]) -> list[tuple[Path, Path]]:
    """Recordings and the files for their features.

    Raises:
        ValueError: none, or two that would have the same file.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in suffixes)
    files = [path for path in files if output not in path.parents]
    if not files:
        raise ValueError(f"{folder} holds no recording; looked for {', '.join(suffixes)}")
    targets = [(output / path.relative_to(folder)).with_suffix(".safetensors") for path in files]
    if twice := [target for target, count in Counter(targets).items() if count > 1]:
        same = [str(path) for path, target in zip(files, targets, strict=True) if target == twice[0]]
        raise ValueError(f"{' and '.join(same)} would both be {twice[0]}; rename one, or choose with --suffixes")
    return list(zip(files, targets, strict=True))


def results(batch: list[tuple[Path, Path]], pool: ProcessPoolExecutor | None, locks: Path, settings: dict):
    """Each recording and what became of it, as they are done."""
    if pool is None:
        for one in batch:
            yield one, extract(*one, locks, settings)
        return
    futures = {pool.submit(extract, *one, locks, settings): one for one in batch}
    for future in as_completed(futures):
        yield futures.pop(future), future.result()


def run(
    batch: list[tuple[Path, Path]], pool: ProcessPoolExecutor | None, output: Path, settings: dict
) -> list[tuple[Path, str]]:
    """Extracts all, and what other runs had begun and did not end; returns what failed."""
    failed, counts = [], Counter()
    with tqdm(total=len(batch), unit="recording") as bar:
        while batch:
            taken = []
            for one, (state, reason) in results(batch, pool, output / ".locks", settings):
                counts[state] += 1
                if state == "taken":
                    taken.append(one)
                    continue
                bar.update()
                if state == "failed":
                    failed.append((one[0], reason))
                    bar.write(f"failed: {reason}")
            if taken and len(taken) == counts["taken"]:
                bar.write(f"{len(taken)} are in the hands of another run, such as {taken[0][0]}; waiting for it")
            time.sleep(2 if taken else 0)
            batch = taken
    print(f"{counts['done']} extracted, {counts['there already']} were there already, {len(failed)} failed")
    return failed


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="recordings, in subfolders too")
    parser.add_argument("output", type=Path, help="folder for the features")
    parser.add_argument("--encoder", help="model of transformers, a folder of one, or log-mel; none for sensor files")
    parser.add_argument("--revision", help="of the encoder's repository")
    parser.add_argument("--pooling", help="mean of a window's tokens (default), cls, or pooler")
    parser.add_argument(
        "--like", help="a trained model or a recipe, whose encoder, fps, feature_stride and num_frames to take"
    )
    parser.add_argument("--fps", type=float, help="ticks a second (default: each recording's own)")
    parser.add_argument("--feature_stride", type=int, help="ticks from one feature to the next")
    parser.add_argument("--num_frames", type=int, help="ticks that a feature covers")
    parser.add_argument("--columns", nargs="+", help="channels of sensor tables (default: all but the times)")
    parser.add_argument(
        "--suffixes", nargs="+", help="of the recordings, such as .mp4 .mkv (default: all of their kind)"
    )
    parser.add_argument("--batch_size", type=int, help="windows at once")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    parser.add_argument("--dtype", help="of the encoder, such as bfloat16 (default: float32)")
    return parser, parser.parse_args()


def main():
    global encoder
    parser, options = parse()
    if not options.folder.is_dir():
        parser.error(f"there is no folder {options.folder}")
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    names = ("fps", "feature_stride", "num_frames")
    settings = {name: getattr(options, name) for name in (*names, "columns", "batch_size")}
    spec = {"name": options.encoder, **{name: getattr(options, name) for name in ("revision", "pooling", "dtype")}}
    try:
        if options.like is not None:
            is_recipe = options.like.endswith((".yaml", ".yml"))
            read = (
                ConvTransformerFeatureExtractor.from_yaml
                if is_recipe
                else ConvTransformerFeatureExtractor.from_pretrained
            )
            like = read(options.like)
            settings |= {name: settings[name] or getattr(like, name) for name in names}
            spec = {**(like.encoder or {}), **{name: value for name, value in spec.items() if value is not None}}
        spec = {name: value for name, value in spec.items() if value is not None}
        if spec and "name" not in spec:
            parser.error(f"--{next(iter(spec))} is of an encoder; give --encoder")
        if spec:  # (several processes have each their own: this one is to see that there is such an encoder)
            encoder = load_encoder(**spec, device=options.device if options.workers == 1 else "cpu")
        kind = encoder.kind if spec else "signal"
        suffixes = {"video": VIDEO_SUFFIXES, "audio": AUDIO_SUFFIXES + VIDEO_SUFFIXES, "signal": SIGNAL_SUFFIXES}[kind]
        if not spec and None in (settings["feature_stride"], settings["num_frames"]):
            parser.error("give --encoder for videos or sound, or --num_frames and --feature_stride for sensor files")
        todo = find(options.folder, options.output, tuple(options.suffixes or suffixes))
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))

    settings["progress"] = options.workers == 1
    pool = None
    if options.workers > 1:
        encoder, context = None, multiprocessing.get_context("spawn")
        threads = max(1, (os.cpu_count() or 1) // options.workers)
        arguments = (spec or None, options.device, threads, context.Value("i", 0))
        pool = ProcessPoolExecutor(options.workers, mp_context=context, initializer=start, initargs=arguments)
    try:
        failed = run(todo, pool, options.output, settings)
    except BrokenProcessPool:
        sys.exit("A process was killed, perhaps because memory ran out (see --workers). The same command goes on.")
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on.")
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    if failed:
        print(
            "Failed:",
            *(f"  {path}: {reason.removeprefix(f'{path}: ')}" for path, reason in failed),
            sep="\n",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
