"""What all converters share: reading untrusted files safely, tables of names, and writing a folder all at once."""

import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

# A checkpoint stores tensors as they are. An archive that claims to hold much more than its own size is an attack.
_MAX_EXPANSION = 1.5


class ConversionError(Exception):
    """A conversion that cannot be done, said in one sentence for the person who asked for it."""


class Rule(NamedTuple):
    """
    One line of a table of names. `{i}` in a name stands for a number, `{a|b}` for one of some words; both names have the
    same ones in the same order.

    Attributes:
        source: name in the foreign checkpoint.
        target: name in our model, or None: dropped on purpose.
        how: "copy"; "squeeze" (weight (out, in, 1) of a convolution of kernel 1 to (out, in) of a linear layer);
            "flatten" ((1, channels, 1) to (channels,)); "heads" ((1, 1, heads, window) to (heads, window)); "stack"
            (scalars of all `{i}` to one vector).
    """

    source: str
    target: str | None
    how: str = "copy"


# how: (foreign tensor to ours, ours to foreign)
_SHAPES: dict[str, tuple[Callable, Callable]] = {
    "copy": (lambda x: x, lambda x: x),
    "squeeze": (lambda x: x.squeeze(-1) if x.dim() == 3 else x, lambda x: x.unsqueeze(-1) if x.dim() == 2 else x),
    "flatten": (lambda x: x.flatten(), lambda x: x.reshape(1, -1, 1)),
    "heads": (lambda x: x.reshape(x.shape[-2:]), lambda x: x[None, None]),
}

_FIELD = re.compile(r"\{([^}]*)\}")


def _to_regex(name: str) -> re.Pattern:
    parts = _FIELD.split(name)  # text and fields in turn
    groups = [r"(\d+)" if part == "i" else f"({part})" for part in parts[1::2]]
    pattern = "".join(re.escape(text) + group for text, group in zip(parts[::2], [*groups, ""], strict=True))
    return re.compile(pattern)


def _fill(name: str, values: tuple[str, ...]) -> str:
    values = iter(values)
    return _FIELD.sub(lambda field: next(values), name)


def _find(name: str, patterns: list[tuple[re.Pattern, Rule]]) -> tuple[re.Match, Rule] | tuple[None, None]:
    return next(((match, rule) for pattern, rule in patterns if (match := pattern.fullmatch(name))), (None, None))


def map_names(
    state: dict[str, torch.Tensor], rules: list[Rule]
) -> tuple[dict[str, torch.Tensor], list[str], list[str]]:
    """
    A foreign state dict under our names.

    Returns:
        the tensors by our names, the source names dropped on purpose, and the source names that no rule knows.
    """
    patterns = [(_to_regex(rule.source), rule) for rule in rules]
    mapped, stacks, dropped, unknown = {}, {}, [], []
    for name, tensor in state.items():
        match, rule = _find(name, patterns)
        if match is None:
            unknown.append(name)
            continue
        if rule.target is None:
            dropped.append(name)
        elif rule.how == "stack":
            stacks.setdefault(rule.target, {})[int(match.group(1))] = tensor
        else:
            mapped[_fill(rule.target, match.groups())] = _SHAPES[rule.how][0](tensor)
    for target, scalars in stacks.items():
        mapped[target] = torch.stack([scalars[index] for index in sorted(scalars)])
    return mapped, dropped, unknown


def unmap_names(state: dict[str, torch.Tensor], rules: list[Rule]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Our state dict under foreign names, and the names of ours that the foreign model does not have."""
    patterns = [(_to_regex(rule.target), rule) for rule in rules if rule.target is not None]
    foreign, unknown = {}, []
    for name, tensor in state.items():
        match, rule = _find(name, patterns)
        if match is None:
            unknown.append(name)
            continue
        if rule.how == "stack":
            foreign.update({_fill(rule.source, (str(index),)): scalar for index, scalar in enumerate(tensor)})
        else:
            foreign[_fill(rule.source, match.groups())] = _SHAPES[rule.how][1](tensor)
    return foreign, unknown


def read_state(path: Path, weights: str = "ema") -> dict[str, torch.Tensor]:
    """
    The state dict of a .pth, .pth.tar, .pt or .safetensors file, without DataParallel's `module.` prefix.

    Args:
        path: a bare state dict, or a wrapper that holds it as `state_dict_ema` or `state_dict`.
        weights: "ema" (where there are such; else the raw ones) or "raw".

    Raises:
        ConversionError: not a file of tensors. Nothing in the file is ever executed.
    """
    content = _read(path)
    if not isinstance(content, dict) or not content:
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a state dict or a checkpoint with one.")
    keys = ["state_dict_ema", "state_dict"] if weights == "ema" else ["state_dict"]
    for key in [*keys, "model"]:
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    strange = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise ConversionError(
            f"{path} holds no state dict: {', '.join(strange[:3])} ... are no tensors, and there is no `state_dict` inside."
        )
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _read(path: Path):
    if not path.is_file():
        raise ConversionError(f"There is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                claimed = sum(entry.file_size for entry in archive.infolist())
            if claimed > _MAX_EXPANSION * path.stat().st_size + 2**20:
                raise ConversionError(
                    f"{path} claims to hold {claimed:,} bytes in a file of {path.stat().st_size:,}: refused."
                )
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("GLOBAL ")[-1].split(" ")[0] if "GLOBAL" in str(error) else "more than tensors"
        raise ConversionError(
            f"{path} is refused: it is damaged, or holds {reason}, and loading such things runs code from the file."
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, SafetensorError, zipfile.BadZipFile) as error:
        raise ConversionError(
            f"{path} cannot be read, it is truncated or no checkpoint ({_first_line(error)})."
        ) from error
    except Exception as error:  # a hostile pickle can raise anything
        raise ConversionError(f"{path} is no checkpoint ({type(error).__name__}: {_first_line(error)}).") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def write_folder(out: Path, write: Callable[[Path], None], overwrite: bool = False):
    """Calls `write(folder)` for a temporary folder beside `out` and renames it when all is well: all or nothing."""
    if out.exists() and not overwrite and (out.is_file() or any(out.iterdir())):
        raise ConversionError(f"{out} exists already; choose another folder, or say --overwrite.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.part-", dir=out.parent))
    try:
        os.chmod(temporary, 0o755)
        write(temporary)
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
