"""What the public project promises about itself: installs one name, its Hub files can travel, no unsafe loading."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "modeling_convtransformer"
HUB_FILES = sorted(PACKAGE.glob("*_convtransformer.py"))
PYTHON_FILES = [
    path
    for folder in ("modeling_convtransformer", "examples", "benchmarks", "convert")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def test_hub_files_are_there():
    names = {path.name for path in HUB_FILES}
    kinds = ("configuration", "modeling", "attention", "loss", "feature_extraction", "model_card")
    assert {f"{kind}_convtransformer.py" for kind in kinds} <= names


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_hub_files_import_only_flat_siblings_and_core_packages(path):
    siblings = {other.stem for other in HUB_FILES}
    allowed = set(sys.stdlib_module_names) | {"torch", "transformers", "safetensors", "numpy", "huggingface_hub"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno}: only `from .sibling import name` travels"
            assert node.module in siblings, f"line {node.lineno}: .{node.module} is not a Hub file"
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in allowed, f"line {node.lineno}: {node.module}"
        elif isinstance(node, ast.Import):
            # PyYAML comes with transformers; from_yaml imports it where it is needed.
            names = {alias.name.split(".")[0] for alias in node.names} - {"yaml"}
            assert names <= allowed, f"line {node.lineno}: {names}"


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_hub_files_have_no_line_that_looks_like_another_relative_import(path):
    # transformers finds what to copy with a regular expression over lines, docstrings included.
    siblings = {other.stem for other in HUB_FILES}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"^\s*(?:from\s+\.(\S*)\s+import|import\s+\.(\S+))", line)
        assert match is None or match.group(1) in siblings, line


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_from_files(path):
    text = path.read_text(encoding="utf-8")
    assert "allow_pickle=True" not in text
    assert "weights_only=False" not in text
    for call in re.findall(r"torch\.load\([^)]*\)", text):
        assert "weights_only=True" in call
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"np.load", "numpy.load"}:
            assert any(keyword.arg == "allow_pickle" for keyword in node.keywords), f"line {node.lineno}: np.load"


def test_core_dependencies_are_four():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    required = setup["options"]["install_requires"].split()
    assert {re.match(r"[a-z]+", name).group() for name in required} == {
        "torch",
        "transformers",
        "safetensors",
        "numpy",
    }


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_extras_are_imported_only_where_they_are_used(path):
    """`import modeling_convtransformer` and each of its modules work with the core dependencies alone."""
    core = set(sys.stdlib_module_names) | {"torch", "transformers", "safetensors", "numpy", "huggingface_hub"}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= core, f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in core, f"line {node.lineno}: {node.module}"
