"""What converters share: tables of names, files that nobody vouches for, and writing all or nothing."""

import os
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from modeling_convtransformer.convert.checkpoint import (
    ConversionError,
    Rule,
    check_free,
    map_names,
    read_state,
    unmap_names,
    write_file,
    write_folder,
)

# --- Names ---------------------------------------------------------------------------------------------------------------

RULES = [
    Rule("{stem|branch}.{i}.fc.{weight|bias}", "model.{stem|branch}.{i}.proj.{weight|bias}", "squeeze"),
    Rule("{stem|branch}.{i}.norm.weight", "model.{stem|branch}.{i}.norm.weight", "flatten"),
    Rule("{stem|branch}.{i}.pe", "model.{stem|branch}.{i}.table", "heads"),
    Rule("conv.{i}.w", "convs.{i}.weight"),
    Rule("scale.{i}.scale", "head.scale", "stack"),
    Rule("points.{i}", None),
]


def make_state():
    torch.manual_seed(0)
    shapes = {
        "stem.0.fc.weight": (4, 3, 1),
        "stem.0.fc.bias": (4,),
        "branch.12.fc.weight": (4, 3, 1),
        "branch.12.norm.weight": (1, 4, 1),
        "stem.0.pe": (1, 1, 2, 9),
        "conv.3.w": (4, 3, 1),
        **{f"scale.{index}.scale": () for index in range(11)},
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_names_and_shapes_there_and_back():
    state = make_state()
    mapped, dropped, unknown = map_names(state, RULES)
    assert dropped == unknown == []
    assert {name: tuple(tensor.shape) for name, tensor in mapped.items()} == {
        "model.stem.0.proj.weight": (4, 3),
        "model.stem.0.proj.bias": (4,),
        "model.branch.12.proj.weight": (4, 3),
        "model.branch.12.norm.weight": (4,),
        "model.stem.0.table": (2, 9),
        "convs.3.weight": (4, 3, 1),
        "head.scale": (11,),
    }
    assert mapped["head.scale"].tolist() == [state[f"scale.{index}.scale"].item() for index in range(11)]
    back, unknown = unmap_names({**mapped, "ours.only": torch.zeros(1)}, RULES)
    assert unknown == ["ours.only"]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    assert all(back[name].shape == tensor.shape for name, tensor in state.items())


def test_every_name_is_accounted_for():
    names = {
        "stem.0.fc.weight": "mapped",
        "points.3": "dropped",
        "stem.0.fc.gamma": "unknown",
        "stem.0.fc.weight.more": "unknown",
        "head.0.fc.weight": "unknown",
        "stem.x.fc.weight": "unknown",
        "stem.-1.fc.weight": "unknown",
        "stemX0.fc.weight": "unknown",  # a dot is a dot
        "": "unknown",
    }
    mapped, dropped, unknown = map_names({name: torch.zeros(1) for name in names}, RULES)
    assert list(mapped) == ["model.stem.0.proj.weight"]
    assert dropped == ["points.3"]
    assert unknown == [name for name, kind in names.items() if kind == "unknown"]


def test_other_shapes_stay_for_the_comparison():
    """A rule reshapes what has the shape that it knows, and nothing else: no data moves to another axis."""
    shapes = {
        "stem.0.fc.weight": (4, 3, 5),
        "branch.0.norm.weight": (2, 2, 1),
        "branch.1.norm.weight": (1, 2, 2),
        "stem.0.pe": (2, 1, 2, 9),
        "stem.1.pe": (9,),
    }
    mapped, _, _ = map_names({name: torch.zeros(shape) for name, shape in shapes.items()}, RULES)
    assert [tuple(tensor.shape) for tensor in mapped.values()] == list(shapes.values())


@pytest.mark.parametrize("scales", [{0: (), 2: ()}, {1: ()}, {0: (), 1: (1,)}])
def test_a_stack_is_complete(scales):
    with pytest.raises(ConversionError, match=r"head.scale is made of one number for each level"):
        map_names({f"scale.{index}.scale": torch.zeros(shape) for index, shape in scales.items()}, RULES)


# --- Reading -------------------------------------------------------------------------------------------------------------


def saved(tmp_path, content, name="file.pth", **kwargs):
    torch.save(content, tmp_path / name, **kwargs)
    return tmp_path / name


STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7)}
OTHER = {"a.weight": torch.zeros(2, 3), "b": torch.tensor(8)}
PREFIXED = {f"module.{name}": tensor for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    ("content", "weights"),
    [
        (STATE, "ema"),
        (STATE, "raw"),
        (PREFIXED, "ema"),
        ({"epoch": 1, "state_dict": OTHER, "state_dict_ema": PREFIXED, "optimizer": {"lr": 0.1}}, "ema"),
        ({"epoch": 1, "state_dict": PREFIXED, "state_dict_ema": OTHER}, "raw"),
        ({"state_dict": PREFIXED}, "ema"),
        ({"state_dict": PREFIXED, "state_dict_ema": None}, "ema"),
        ({"model": STATE, "args": [1, 2]}, "ema"),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_read_state(content, weights, is_zip, tmp_path):
    path = saved(tmp_path, content, _use_new_zipfile_serialization=is_zip)
    state = read_state(path, weights)
    assert {name: tensor.tolist() for name, tensor in state.items()} == {"a.weight": [[0, 1, 2], [3, 4, 5]], "b": 7}
    assert state["b"].dtype == torch.int64


def test_read_safetensors(tmp_path):
    save_file(STATE, tmp_path / "file.safetensors")
    assert read_state(tmp_path / "file.safetensors")["a.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


def refuse(path, *words):
    """The message, after checking that it is one line that names the file and holds the words."""
    with pytest.raises(ConversionError) as error:
        read_state(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    assert message.endswith(".")
    assert "Re-running" not in message  # torch's advice to load it all the same
    assert len(message) < len(str(path)) + 200
    for word in words:
        assert word in message, message
    return message


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: [torch.zeros(1)], ["list"]),
        (lambda: torch.zeros(1), ["Tensor"]),
        (lambda: 7, ["int"]),
        (dict, ["dict"]),
        (lambda: {"state_dict": {}}, ["nothing"]),
        (lambda: {"epoch": 3, "lr": 0.1, "loss": 2.0, "best": 1}, ["epoch, lr, loss ..."]),
        (lambda: {0: torch.zeros(1)}, ["0 instead of named tensors"]),
        (lambda: {"a": torch.zeros(1), "module.a": torch.zeros(1)}, ["twice"]),
        (lambda: {"a": torch.eye(3).to_sparse()}, ["a instead of named tensors"]),
        (lambda: {"a": torch.eye(3).to_sparse_csr()}, ["a instead of named tensors"]),
        (lambda: {"a": torch.empty(3, device="meta")}, ["a instead of named tensors"]),
        (
            lambda: {"a": torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8)},
            ["a instead of named tensors"],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's about sparse and quantized tensors
def test_files_without_a_state_dict(make, words, tmp_path):
    refuse(saved(tmp_path, make()), *words)


class Evil:
    """What an attacker writes: unpickling it runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("container", ["zip", "legacy", "pickle", "new pickle", "inside a wrapper"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_in_a_file_runs(container, tmp_path):
    evil = Evil(tmp_path / "marker")
    path = tmp_path / "file.pth"
    if "pickle" in container:
        path.write_bytes(pickle.dumps(evil, protocol=2 if container == "pickle" else 4))
    elif container == "inside a wrapper":
        torch.save({"state_dict": STATE, "scheduler": {"milestones": evil}}, path)
    else:
        torch.save({"a": evil}, path, _use_new_zipfile_serialization=container == "zip")
    message = refuse(path)
    # (torch does not read beyond the first instruction that it does not know)
    assert "Unsupported operand" in message or f"holds {os.system.__module__}.system, and loading" in message
    assert ("Unsupported operand" in message) == (container == "new pickle")
    assert not (tmp_path / "marker").exists()
    pickle.loads(pickle.dumps(evil))  # the attack is a real one
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"epoch 3, loss 0.1\n", b"\x80\x04", b"PK\x03\x04", b"\x00" * 5000, b"<html>404</html>", bytes(range(256)) * 20],
    ids=["empty", "text", "header", "zip header", "zeros", "html", "noise"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_are_no_checkpoint(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, "no checkpoint")


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
def test_truncated_files(share, is_zip, tmp_path):
    path = saved(tmp_path, {"a": torch.zeros(5000)}, _use_new_zipfile_serialization=is_zip)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refuse(path, "no checkpoint")


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 50_000_000) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[9999999999],"data_offsets":[0,4]}}'[:60],
        struct.pack("<Q", 63) + b'{"a":{"dtype":"F32","shape":[999999999],"data_offsets":[0,4]}}  ',
    ],
    ids=["header beyond all", "header beyond the file", "no object", "cut JSON", "shape beyond the data"],
)
def test_hostile_safetensors(content, tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    refuse(path, "no checkpoint")


def test_compressed_archives_are_refused(tmp_path):
    """64 MB of zeros in 64 KB: torch's own files are not compressed."""
    path = tmp_path / "file.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("file/data.pkl", bytes(2**26))
    assert path.stat().st_size < 2**17
    refuse(path, "claims to hold 67,108,864 bytes")


def test_archives_that_claim_too_much_are_refused(tmp_path):
    path = saved(tmp_path, STATE)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")  # the last record of the archive's directory
    content[entry + 24 : entry + 28] = struct.pack("<I", 2**31)  # its size
    path.write_bytes(content)
    refuse(path, "claims to hold 2,147,48")


def test_missing_files_and_folders(tmp_path):
    refuse(tmp_path / "nothing.pth", "There is no file")
    refuse(tmp_path, "is a folder")


# --- Writing -------------------------------------------------------------------------------------------------------------


def write_two(folder):
    (folder / "config.json").write_text("{}")
    (folder / "b").write_text("new")


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_write_folder(tmp_path):
    write_folder(tmp_path / "deep" / "out", write_two)
    assert listing(tmp_path) == ["deep", "deep/out", "deep/out/b", "deep/out/config.json"]
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", write_two)
    assert listing(tmp_path / "empty") == ["b", "config.json"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "deep" / "out").stat().st_mode == plain.stat().st_mode  # not the 0700 of temporary folders


def test_write_to_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    write_folder(type(tmp_path)("."), write_two)
    assert listing(tmp_path) == ["out", "out/b", "out/config.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), ValueError("bug")])
@pytest.mark.parametrize("existing", [False, True])
def test_all_or_nothing(error, existing, tmp_path):
    out = tmp_path / "deep" / "deeper" / "out"
    if existing:
        write_folder(out, write_two)
        (out / "b").write_text("old")
    before = listing(tmp_path)

    def fail(folder):
        (folder / "half").write_text("x")
        raise error

    expected = ConversionError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        write_folder(out, fail, overwrite=True)
    if expected is ConversionError:
        assert str(caught.value) == f"{out} cannot be written ([Errno 28] No space left on device)."
    assert listing(tmp_path) == before
    assert not existing or (out / "b").read_text() == "old"


def test_interrupted_renaming_restores_what_was_there(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_folder(out, write_two)
    (out / "b").write_text("old")
    replace, calls = os.replace, []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == 2:  # the old folder is aside, the new one not yet in place
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(KeyboardInterrupt):
        write_folder(out, write_two, overwrite=True)
    assert len(calls) == 3
    assert listing(tmp_path) == ["out", "out/b", "out/config.json"]
    assert (out / "b").read_text() == "old"


def test_existing_folders(tmp_path):
    ours, other, file = tmp_path / "ours", tmp_path / "other", tmp_path / "file"
    write_folder(ours, write_two)
    (ours / "more").write_text("old")
    other.mkdir()
    (other / "thesis.tex").write_text("years")
    file.write_text("years")
    for path in (ours, other, file):
        with pytest.raises(ConversionError, match=r"exists already; .* --overwrite"):
            write_folder(path, write_two)
        with pytest.raises(ConversionError, match="exists already"):
            check_free(path)
    for path in (other, file):
        with pytest.raises(ConversionError, match="holds no converted model, and --overwrite replaces nothing else"):
            write_folder(path, write_two, overwrite=True)
    write_folder(ours, write_two, overwrite=True)
    assert listing(tmp_path) == ["file", "other", "other/thesis.tex", "ours", "ours/b", "ours/config.json"]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    write_folder(tmp_path / "target", write_two)
    (tmp_path / "target" / "b").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target", target_is_directory=True)
    write_folder(tmp_path / "link", write_two, overwrite=True)
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "target" / "b").read_text() == "old"
    assert (tmp_path / "link" / "b").read_text() == "new"


def test_write_file(tmp_path):
    out = tmp_path / "deep" / "out.pth"
    write_file(out, lambda path: path.write_text("1"))
    assert listing(tmp_path) == ["deep", "deep/out.pth"]
    with pytest.raises(ConversionError, match="exists already; choose another name, or say --overwrite"):
        write_file(out, lambda path: path.write_text("2"))
    assert out.read_text() == "1"
    write_file(out, lambda path: path.write_text("2"), overwrite=True)
    assert out.read_text() == "2"
    with pytest.raises(ConversionError, match="is a folder"):
        write_file(tmp_path / "deep", lambda path: path.write_text("3"), overwrite=True)

    def fail(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "new" / "out.pth", fail)
    assert listing(tmp_path) == ["deep", "deep/out.pth"]


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConversionError, match=r"file/out cannot be written"):
        write_folder(tmp_path / "file" / "out", write_two)
    assert listing(tmp_path) == ["file"]


def test_a_small_storage_expanded_to_a_huge_tensor_is_refused(tmp_path):
    file = tmp_path / "huge.pth"
    torch.save({"backbone.embd.0.conv.weight": torch.zeros(1).expand(2**20, 2**18, 1)}, file)
    assert file.stat().st_size < 100_000
    with pytest.raises(ConversionError, match="no state dict"):
        read_state(file)
