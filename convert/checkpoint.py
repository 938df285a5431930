"""What all converters share: reading untrusted files safely, tables of names, and writing a folder all at once."""

import os
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


# how: (foreign tensor to ours, ours to foreign). A foreign tensor of another shape stays: comparing shapes finds it.
_SHAPES: dict[str, tuple[Callable, Callable]] = {
    "copy": (lambda x: x, lambda x: x),
    "squeeze": (lambda x: x.squeeze(-1) if x.dim() == 3 else x, lambda x: x.unsqueeze(-1) if x.dim() == 2 else x),
    "flatten": (lambda x: x[0, :, 0] if x.shape[::2] == (1, 1) else x, lambda x: x.reshape(1, -1, 1)),
    "heads": (lambda x: x[0, 0] if x.dim() == 4 and x.shape[:2] == (1, 1) else x, lambda x: x[None, None]),
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
        if sorted(scalars) != list(range(len(scalars))) or any(scalar.shape != () for scalar in scalars.values()):
            raise ConversionError(
                f"{target} is made of one number for each level, but the checkpoint has {len(scalars)} tensors for the "
                f"levels {', '.join(map(str, sorted(scalars)))}, of the shapes {sorted({tuple(x.shape) for x in scalars.values()})}."
            )
        mapped[target] = torch.stack([scalars[index] for index in range(len(scalars))])
    return mapped, dropped, unknown


def map_known_names(
    foreign: dict[str, torch.Tensor], rules: list[Rule], source: Path, whose: str, allow_unused: bool
) -> dict[str, torch.Tensor]:
    """
    A foreign state dict under our names, as float32.

    Raises:
        ConversionError: it holds tensors that no rule knows and that may not be left out, or no floating point numbers.
    """
    state, _, unknown = map_names(foreign, rules)
    if unknown and not (allow_unused and state):
        raise ConversionError(
            f"{source} holds tensors that {whose} does not have (--allow-unused leaves them out): "
            f"{', '.join(unknown[:5])}{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}."
        )
    if unknown:
        warnings.warn(f"left out, because {whose} does not have them: {', '.join(unknown)}")
    if strange := [name for name, tensor in state.items() if tensor.dim() and not tensor.is_floating_point()]:
        raise ConversionError(f"{source} holds {state[strange[0]].dtype} for {strange[0]}; expected floating point.")
    return {name: tensor.float() for name, tensor in state.items()}


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
    strange = [str(key) for key, value in content.items() if not (isinstance(key, str) and _is_plain(value))]
    if strange or not content:
        raise ConversionError(
            f"{path} holds no state dict: {', '.join(strange[:3]) or 'nothing'}{' ...' if len(strange) > 3 else ''} "
            "instead of named tensors, and no `state_dict` with such."
        )
    state = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    if len(state) < len(content):
        raise ConversionError(f"{path} holds tensors twice, with and without the prefix `module.`.")
    return state


def _is_plain(value) -> bool:
    """
    A tensor with all its values in memory: not sparse, not quantized, not on the meta device, and no small storage that
    is expanded to a huge shape.
    """
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _read(path: Path):
    if path.is_dir():
        raise ConversionError(f"{path} is a folder, not a checkpoint file.")
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
    except ConversionError:
        raise
    except pickle.UnpicklingError as error:
        # torch wraps the reason in advice to load the file in spite of it
        error = error.__context__ or error
        if "GLOBAL " not in str(error):
            raise ConversionError(f"{path} is no checkpoint, or a damaged one ({first_line(error)}).") from error
        reason = str(error).split("GLOBAL ")[-1].split(" ")[0]
        raise ConversionError(
            f"{path} is refused: it holds {reason}, and loading such things runs code from the file."
        ) from error
    except Exception as error:  # a damaged or hostile file can raise anything
        raise ConversionError(f"{path} is no checkpoint, or a truncated one ({first_line(error)}).") from error


def first_line(error: Exception) -> str:
    """The first sentence of an error, for a message of one line: torch goes on with advice."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].strip().rstrip(".")[:200]


def write_folder(out: Path, write: Callable[[Path], None], overwrite: bool = False):
    """
    Calls `write(folder)` for a temporary folder and renames it to `out` when all is well: all or nothing. `overwrite`
    replaces a folder of ours, never one that holds something else.
    """
    check_free(out, overwrite)
    with _all_or_nothing(out) as temporary:
        temporary.mkdir()
        write(temporary)


def write_file(out: Path, write: Callable[[Path], None], overwrite: bool = False):
    """The same for one file."""
    if out.is_dir():
        raise ConversionError(f"{out} is a folder; give the name of a file to write.")
    if out.exists() and not overwrite:
        raise ConversionError(f"{out} exists already; choose another name, or say --overwrite.")
    with _all_or_nothing(out) as temporary:
        write(temporary)


def check_free(out: Path, overwrite: bool = False):
    """Whether `write_folder` may write here; worth asking before the work."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ConversionError(f"{out} exists already; choose another folder, or say --overwrite.")
    if not (out / "config.json").is_file():
        raise ConversionError(f"{out} holds no converted model, and --overwrite replaces nothing else.")


@contextmanager
def _all_or_nothing(out: Path) -> Iterator[Path]:
    """A path to write to, which becomes `out` at the end, or leaves no trace."""
    out = Path(os.path.abspath(out))
    made_parents = [parent for parent in out.parents if not parent.exists()]  # nearest first
    holder, is_done = None, False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{out.name}.part-", dir=out.parent))
        new, old = holder / "new", holder / "old"
        yield new
        try:
            if out.exists():
                os.replace(out, old)
            os.replace(new, out)
        except BaseException:
            if old.exists() and not out.exists():
                os.replace(old, out)
            raise
        is_done = True
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConversionError(f"{out} cannot be written ({first_line(error)}).") from error
    finally:
        if holder is not None:
            shutil.rmtree(holder, ignore_errors=True)
        if not is_done:
            with suppress(OSError):
                for parent in made_parents:
                    parent.rmdir()
