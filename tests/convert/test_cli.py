"""`convtransformer-convert actionformer` as it is typed: what it prints, what it leaves behind, and every way to fail.

Every failure is one sentence on stderr and exit status 1, without a trace in the file system. How far files are trusted is
tested in test_checkpoint.py, what is converted in test_actionformer.py.
"""

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import logging

from modeling_convtransformer import ConvTransformerConfig, ConvTransformerForTemporalActionLocalization
from modeling_convtransformer.convert.cli import main

FIXTURES = Path(__file__).parent.parent / "fixtures" / "v1"
EPOCH = FIXTURES / "epoch_001.pth.tar"
CONFIG = FIXTURES / "epoch_001.yaml"
ANNOTATIONS = FIXTURES / "epoch_001.annotations.json"


@pytest.fixture(autouse=True)
def _restore_logging():
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def run(*arguments):
    return main(["actionformer", *map(str, arguments)])


def listing(folder):
    """What lies in the folder, but for the code that goes along with a model (tests/test_hub.py looks at that)."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".py")


def fail(capfd, *arguments) -> str:
    """The one line that a failing command says."""
    assert run(*arguments) == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"error: [^\n]+\.\n", captured.err), captured.err
    return captured.err


# --- It works ----------------------------------------------------------------------------------------------------------


def test_convert(tmp_path, capfd):
    out = tmp_path / "model"
    assert run(EPOCH, out, "--config", CONFIG, "--annotations", ANNOTATIONS) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    *_, first, last = captured.out.splitlines()
    assert first == f"11,061 parameters in {out}. Load them with"
    assert last.strip() == f'ConvTransformerForTemporalActionLocalization.from_pretrained("{out}")'
    assert eval(last, {"ConvTransformerForTemporalActionLocalization": ConvTransformerForTemporalActionLocalization})
    assert listing(tmp_path) == [
        "model",
        "model/README.md",
        "model/config.json",
        "model/model.safetensors",
        "model/preprocessor_config.json",
    ]


def test_there_and_back(tmp_path, capfd):
    assert run(EPOCH, tmp_path / "model", "--config", CONFIG, "--weights", "raw", "--fps", "25") == 0
    assert run(tmp_path / "model", tmp_path / "back.pth.tar", "--reverse") == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert (
        captured.out.splitlines()[-1]
        == f"{tmp_path}/back.pth.tar is a checkpoint for eval.py of ActionFormer's release."
    )
    source, back = (torch.load(path, weights_only=True)["state_dict"] for path in (EPOCH, tmp_path / "back.pth.tar"))
    assert source.keys() == back.keys()
    assert all(torch.equal(source[name], back[name]) for name in source)


def test_guesses_are_noted(tmp_path, capfd):
    state = torch.load(EPOCH, weights_only=True)["state_dict"]
    torch.save({**state, "module.extra": torch.ones(1)}, tmp_path / "v1.pth")
    assert run(tmp_path / "v1.pth", tmp_path / "model", "--config", CONFIG, "--allow-unused") == 0
    notes = capfd.readouterr().err.splitlines()
    assert len(notes) == 2
    assert notes[0] == "note: left out, because ActionFormer does not have them: extra"
    assert re.fullmatch(
        "note: .* leaves the frame rate to the annotations, .*: 30 frames per second are .*--fps here.", notes[1]
    )


def test_overwrite(tmp_path, capfd):
    out = tmp_path / "model"
    assert run(EPOCH, out, "--config", CONFIG, "--fps", "25") == 0
    assert run(EPOCH, out, "--config", CONFIG, "--fps", "10", "--overwrite") == 0
    assert json.loads((out / "preprocessor_config.json").read_text())["fps"] == 10
    back = tmp_path / "back.pth"
    back.write_text("old")
    capfd.readouterr()
    assert "exists already" in fail(capfd, out, back, "--reverse")
    assert back.read_text() == "old"
    assert run(out, back, "--reverse", "--overwrite") == 0
    assert back.stat().st_size > 10_000


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bar_on_a_terminal(tmp_path, monkeypatch):
    """134 million parameters take a while; a log file needs no bar (test_convert: nothing on stderr)."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run(EPOCH, tmp_path / "model", "--config", CONFIG, "--fps", "25") == 0
    assert re.search(r"tensors: +0%.*0/136", sys.stderr.getvalue())


def test_help(capfd):
    for arguments in (["--help"], ["actionformer", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    text = capfd.readouterr().out
    assert "actionformer" in text.split("usage:")[1]
    assert "--config FILE" in text
    # examples can be copied
    assert "convtransformer-convert actionformer epoch_034.pth.tar my_thumos \\\n" in text
    assert max(map(len, text.splitlines())) <= 119


def test_usage_errors(capfd):
    for arguments in ([], ["actionformer"], ["actionformer", "a", "b", "--weights", "best"], ["nothing"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert "usage:" in capfd.readouterr().err


# --- It fails, and says so -----------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("v1/data.pkl", bytes(2**25))


RESNET = {
    "conv1.weight": torch.zeros(64, 3, 7, 7),
    "bn1.weight": torch.zeros(64),
    "layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3),
    "fc.weight": torch.zeros(10, 64),
    "fc.bias": torch.zeros(10),
}

SOURCES = {
    "malicious pickle": (lambda path: torch.save({"state_dict": Evil(path.parent / "ran")}, path), "runs code from the file"),
    "bare pickle": (lambda path: path.write_bytes(pickle.dumps(Evil(path.parent / "ran"), 2)), "runs code from the file"),
    "truncated": (lambda path: path.write_bytes(EPOCH.read_bytes()[:100_000]), "no checkpoint, or a truncated one"),
    "empty": (lambda path: path.write_bytes(b""), "no checkpoint"),
    "text": (lambda path: path.write_text("epoch 3, loss 0.1\n"), "no checkpoint"),
    "bomb": (bomb, "claims to hold"),
    "a folder": (lambda path: path.mkdir(), "is a folder"),
    "nothing": (lambda path: None, "There is no file"),
    "another model": (lambda path: torch.save(RESNET, path), "is another model: ActionFormer has no tensor like conv1.weight, bn1"),
    "no tensors": (lambda path: torch.save({"epoch": 3, "best": 0.5}, path), "no state dict: epoch, best instead of named tensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("option", [None, "--allow-unused"])
def test_sources(kind, option, tmp_path, capfd):
    make, message = SOURCES[kind]
    source = tmp_path / "v1.pth"
    make(source)
    before = listing(tmp_path)
    said = fail(capfd, source, tmp_path / "deep" / "model", "--config", CONFIG, *([option] if option else []))
    assert message in said
    assert str(source) in said
    assert listing(tmp_path) == before  # and nothing ran


def test_safetensors_with_an_absurd_header(tmp_path, capfd):
    source = tmp_path / "v1.safetensors"
    source.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert "no checkpoint" in fail(capfd, source, tmp_path / "model", "--config", CONFIG)
    assert listing(tmp_path) == ["v1.safetensors"]


CONFIGS = {
    "missing": (lambda path: None, "No such file"),
    "a folder": (lambda path: path.mkdir(), "directory"),
    "empty": (lambda path: path.write_text(""), "expected a mapping"),
    "a list": (lambda path: path.write_text("- 1\n- 2\n"), "expected a mapping"),
    "no YAML": (lambda path: path.write_text("model: [1, 2\nx: }"), "not a YAML file"),
    "binary": (lambda path: path.write_bytes(bytes(range(256))), "v1.yaml"),
    "malicious": (lambda path: path.write_text(f"!!python/object/apply:os.system ['touch {path.parent}/ran']"), "not a YAML file"),
    "without sections": (lambda path: path.write_text("epochs: 30\n"), "no `model` section"),
    "a section of a wrong kind": (lambda path: path.write_text("dataset: 3\nmodel: {embd_dim: 12}\n"), "`dataset` is 3"),
    "a value of a wrong kind": (lambda path: path.write_text("dataset: {input_dim: many}\nmodel: {embd_dim: 12}\n"), "n_in"),
    "too deep": (lambda path: path.write_text("[" * 100_000), "v1.yaml"),
    "another model's": (lambda path: path.write_text(CONFIG.read_text().replace("embd_dim: 12", "embd_dim: 24").replace("fpn_dim: 12", "fpn_dim: 24")), "may be that of another model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs(kind, tmp_path, capfd):
    make, message = CONFIGS[kind]
    config = tmp_path / "v1.yaml"
    make(config)
    before = listing(tmp_path)
    said = fail(capfd, EPOCH, tmp_path / "model", "--config", config, "--fps", "25")
    assert message in said
    assert str(config) in said
    assert listing(tmp_path) == before


@pytest.mark.parametrize("text", ["__import__('os').system('touch ran')", "{'model': {", "[" * 100_000, "[]"])
def test_recorded_configs(text, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.txt").write_text(text)
    assert "config.txt" in fail(capfd, EPOCH, "model", "--config", "config.txt", "--fps", "25")
    assert listing(tmp_path) == ["config.txt"]


@pytest.mark.parametrize(
    "text", [None, "", "{}", "[]", '{"database": {"v": {"fps": "fast"}}}', '{"database": {"v": 3}}', "[" * 100_000]
)
def test_annotations(text, tmp_path, capfd):
    path = tmp_path / "annotations.json"
    if text is not None:
        path.write_text(text)
    assert str(path) in fail(capfd, EPOCH, tmp_path / "model", "--config", CONFIG, "--annotations", path)
    assert not (tmp_path / "model").exists()


def test_missing_config(tmp_path, capfd):
    assert "--config is needed" in fail(capfd, EPOCH, tmp_path / "model")
    assert listing(tmp_path) == []


def test_existing_out(tmp_path, capfd):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("years")
    before = listing(tmp_path)
    for out in ("model", "file"):
        assert "exists already" in fail(capfd, EPOCH, tmp_path / out, "--config", CONFIG)
        assert "holds no converted model" in fail(capfd, EPOCH, tmp_path / out, "--config", CONFIG, "--overwrite")
    assert "cannot be written" in fail(capfd, EPOCH, tmp_path / "file" / "model", "--config", CONFIG, "--fps", "25")
    assert listing(tmp_path) == before


def test_reverse_fails(tmp_path, capfd):
    config = ConvTransformerConfig(n_in=6, n_embd=16, arch=(1, 1, 1), max_len=32)
    ConvTransformerForTemporalActionLocalization(config).save_pretrained(tmp_path / "modern")
    (tmp_path / "empty").mkdir()
    capfd.readouterr()
    before = listing(tmp_path)
    back = tmp_path / "deep" / "back.pth"
    said = fail(capfd, tmp_path / "modern", back, "--reverse")
    assert "v1 does not have: RoPE; SwiGLU; RMSNorm; mask_conv_inputs" in said
    assert "has no config.json" in fail(capfd, tmp_path / "empty", back, "--reverse")
    assert "has no config.json" in fail(capfd, EPOCH, back, "--reverse")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("arguments", [["--config", CONFIG, "--fps", "25"], ["--reverse"]])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted(arguments, error, tmp_path, capfd, monkeypatch):
    """Ctrl-C, or a full disk, in the middle of writing."""
    source = EPOCH
    if "--reverse" in arguments:
        source = tmp_path / "model"
        assert run(EPOCH, source, "--config", CONFIG, "--fps", "25") == 0
    before = listing(tmp_path)
    capfd.readouterr()

    def half(self_or_content, path, *args, **kwargs):
        path = Path(path)
        (path / "model.safetensors" if path.is_dir() else path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(ConvTransformerForTemporalActionLocalization, "save_pretrained", half)
    monkeypatch.setattr(torch, "save", half)
    out = tmp_path / "deep" / "out"
    if isinstance(error, KeyboardInterrupt):
        assert run(source, out, *arguments) == 130
        assert capfd.readouterr().err == "interrupted: nothing was written.\n"
    else:
        assert f"{out} cannot be written ([Errno 28] No space left on device)" in fail(capfd, source, out, *arguments)
    assert listing(tmp_path) == before


def test_failed_upload_keeps_the_folder(tmp_path, capfd, monkeypatch):
    def refuse(self, repo_id, **kwargs):
        raise OSError(f"no network for {repo_id}\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    arguments = ["--config", CONFIG, "--fps", "25", "--push-to-hub", "me/thumos"]
    said = fail(capfd, EPOCH, tmp_path / "model", *arguments)
    assert "is written, but was not uploaded (no network for me/thumos)" in said
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_upload(tmp_path, monkeypatch):
    calls = []

    class Created:
        repo_id = "me/thumos"

    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, name, **kwargs: calls.append(name) or Created
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **kwargs: calls.append(kwargs))
    assert run(EPOCH, tmp_path / "model", "--config", CONFIG, "--fps", "25", "--push-to-hub", "thumos") == 0
    assert calls == ["thumos", {"repo_id": "me/thumos", "folder_path": tmp_path / "model"}]


def test_as_a_process(tmp_path):
    """The installed command, which says what is wrong and no more. (torchao, where it is installed, says in lines of its own
    which of its libraries this machine cannot load, as soon as transformers is imported.)"""
    torch.save({"state_dict": Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    command = Path(sysconfig.get_path("scripts")) / "convtransformer-convert"
    result = subprocess.run(
        [command, "actionformer", "evil.pth", "model", "--config", CONFIG],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    refused = f"it holds {os.system.__module__}.system, and loading such things runs code from the file."
    *others, last = result.stderr.splitlines()
    assert last == f"error: evil.pth is refused: {refused}"
    assert all("torchao" in line or "torch/utils/_pytree.py" in line for line in others)
    assert listing(tmp_path) == ["evil.pth"]


def test_set_needs_a_target(tmp_path, capsys):
    assert main(["actionformer", "no.pth.tar", str(tmp_path / "out"), "--set", "n_embd=32"]) == 1
    assert "it needs --target" in capsys.readouterr().err
