"""
A folder that was published works where only transformers is installed: in a virtual environment without this package,
offline, from another working directory, again and again, and beside another version of the code.
"""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from test_processing_convtransformer import make_processor, make_retrieval
from transformers import AutoConfig, AutoModelForObjectDetection, pipeline

from modeling_convtransformer import (
    ConvTransformerBackbone,
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
    ConvTransformerModel,
)

CLASSES = (ConvTransformerModel, ConvTransformerBackbone, ConvTransformerForTemporalActionLocalization)
HUB_FILES = sorted(
    path.name for path in (Path(__file__).parent.parent / "modeling_convtransformer").glob("*_convtransformer.py")
)
TASK = "temporal-action-localization"

# The preamble of every script: this package is not there, and what is printed last is the result.
PREAMBLE = """
import importlib.util, json, sys
assert importlib.util.find_spec("modeling_convtransformer") is None
import numpy as np
import torch
from transformers import (
    AutoBackbone, AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForObjectDetection, logging, pipeline
)
logging.set_verbosity_error()
features = np.random.default_rng(0).normal(size=(90, 6)).astype("float32")
"""


def make_model(seed: int = 0) -> ConvTransformerForTemporalActionLocalization:
    torch.manual_seed(seed)
    config = ConvTransformerConfig(
        n_in=6, n_embd=16, n_head=2, arch=(1, 1, 2), mha_win_size=5, id2label={0: "walk", 1: "run", 2: "rest"}
    )
    model = ConvTransformerForTemporalActionLocalization(config).eval()
    torch.nn.init.normal_(model.class_head.output.weight, std=0.3)  # scores that differ
    return model


def publish(folder: Path, seed: int = 0) -> Path:
    make_model(seed).save_pretrained(folder)
    ConvTransformerFeatureExtractor(feature_size=6, fps=10, feature_stride=5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return publish(tmp_path_factory.mktemp("published") / "my-model")


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory) -> Path:
    """
    A virtual environment with everything that is installed here but this package: a .pth file adds the directories, and
    those of a directory that it adds, where an editable install would be named, are not read.
    """
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    found = [path for path in (*site.getsitepackages(), *sys.path) if Path(path).name == "site-packages"]
    (packages / "installed.pth").write_text("\n".join(dict.fromkeys(found)), encoding="utf-8")
    return folder / "bin" / "python"


def run_clean(python: Path, script: str, *args, home: Path, cwd: Path | None = None):
    """The result of a script in the clean environment, offline, with a module cache in `home`."""
    cwd = home / "elsewhere" if cwd is None else cwd
    cwd.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    if older := os.environ.get("PYTHONPATH"):  # another version of transformers, tested from a folder of its own
        paths = [path for path in older.split(os.pathsep) if not (Path(path) / "modeling_convtransformer").exists()]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [str(python), "-c", PREAMBLE + script, *map(str, args)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# --- What is written ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", CLASSES)
def test_every_class_brings_all_code_and_names_all_classes(model_class, tmp_path):
    model_class(make_model().config).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert sorted(config["auto_map"]) == [
        "AutoBackbone",
        "AutoConfig",
        "AutoFeatureExtractor",
        "AutoModel",
        "AutoModelForObjectDetection",
        "AutoModelForZeroShotObjectDetection",
    ]
    assert sorted(config["custom_pipelines"]) == ["moment-retrieval", TASK]
    assert sorted(path.name for path in tmp_path.glob("*.py")) == HUB_FILES
    for name in HUB_FILES:
        source = Path(__file__).parent.parent / "modeling_convtransformer" / name
        assert (tmp_path / name).read_bytes() == source.read_bytes()
    for reference in (*config["auto_map"].values(), *(one["impl"] for one in config["custom_pipelines"].values())):
        module, name = reference.split(".")
        assert f"\nclass {name}(" in (tmp_path / f"{module}.py").read_text(encoding="utf-8")


def test_the_feature_extractor_and_the_config_bring_all_code(tmp_path):
    ConvTransformerFeatureExtractor(feature_size=6, fps=10, feature_stride=5).save_pretrained(tmp_path / "a")
    saved = json.loads((tmp_path / "a" / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert saved["auto_map"] == {
        "AutoFeatureExtractor": "feature_extraction_convtransformer.ConvTransformerFeatureExtractor"
    }
    ConvTransformerConfig(n_in=6).save_pretrained(tmp_path / "b")
    for folder in ("a", "b"):
        assert sorted(path.name for path in (tmp_path / folder).glob("*.py")) == HUB_FILES


def test_here_the_installed_code_is_used_and_needs_no_permission(published):
    config = AutoConfig.from_pretrained(published)
    assert type(config) is ConvTransformerConfig
    for trust in ({}, {"trust_remote_code": True}):
        model = AutoModelForObjectDetection.from_pretrained(published, **trust)
        assert type(model) is ConvTransformerForTemporalActionLocalization
        localize = pipeline(TASK, model=str(published), **trust)
        assert type(localize).__module__ == "modeling_convtransformer.pipeline_convtransformer"


# --- Without this package -----------------------------------------------------------------------------------------------------------

USE = """
def use(where):
    trust = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(where, **trust)
    detector = AutoModelForObjectDetection.from_pretrained(where, **trust)
    backbone = AutoModel.from_pretrained(where, **trust)
    levels = AutoBackbone.from_config(config, **trust)
    feature_extractor = AutoFeatureExtractor.from_pretrained(where, **trust)
    classes = [type(one) for one in (config, detector, backbone, levels, feature_extractor)]
    inputs = feature_extractor(features)
    with torch.no_grad():
        outputs = detector(**inputs)
        pyramid = backbone(**inputs).feature_maps
    segments = feature_extractor.post_process_temporal_action_localization(outputs, top_k=5)[0]
    localize = pipeline("temporal-action-localization", model=where, **trust)
    return {
        "names": [one.__name__ for one in classes],
        "modules": sorted({one.__module__.split(".")[0] for one in classes}),
        "levels": len(pyramid),
        "scores": segments["scores"].tolist(),
        "found": localize(features, top_k=5),
        "batched": localize([features, features[:41]], batch_size=2, top_k=5),
    }

print(json.dumps([use(where) for where in sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_published_model_runs_without_the_package_twice(published, clean_python, tmp_path):
    localize = pipeline(TASK, model=str(published))
    features = np.random.default_rng(0).normal(size=(90, 6)).astype("float32")
    expected = localize(features, top_k=5)
    assert len(expected) == 5
    # the second time by a relative path, from the folder beside it
    results = run_clean(clean_python, USE, published, home=tmp_path)
    results += run_clean(clean_python, USE, "my-model", home=tmp_path, cwd=published.parent)
    for result in results:
        assert result["names"] == [
            "ConvTransformerConfig",
            "ConvTransformerForTemporalActionLocalization",
            "ConvTransformerModel",
            "ConvTransformerBackbone",
            "ConvTransformerFeatureExtractor",
        ]
        assert result["modules"] == ["transformers_modules"]
        assert result["levels"] == 3
        assert result["found"] == expected  # the same code and weights on the same machine
        assert result["batched"][0] == [pytest.approx(one, abs=1e-4) for one in expected]  # other sums: a batch of two
        assert result["scores"] == [one["score"] for one in expected]


@pytest.mark.slow
def test_two_versions_of_the_code_do_not_mix(clean_python, tmp_path):
    """Two folders of one name and one model type whose code differs, in one process, then in another with the same cache."""
    old, new = publish(tmp_path / "old" / "model"), publish(tmp_path / "new" / "model")
    changed = new / "modeling_convtransformer.py"
    text = changed.read_text(encoding="utf-8")
    assert text.count("logits=logits,") == 2  # of the detector, and of moment retrieval
    changed.write_text(text.replace("logits=logits,", "logits=logits + 100,"), encoding="utf-8")
    script = """
sums = []
for where in [*sys.argv[1:], *sys.argv[1:]]:
    localize = pipeline("temporal-action-localization", model=where, trust_remote_code=True)
    with torch.no_grad():
        outputs = localize.model(torch.from_numpy(features)[None])
    sums.append([outputs.logits.mean().item(), localize(features, top_k=1)[0]["score"]])
print(json.dumps(sums))
"""
    for _ in range(2):
        (a, score_a), (b, score_b), *again = run_clean(clean_python, script, old, new, home=tmp_path / "home")
        assert b == pytest.approx(a + 100, abs=1e-3)
        assert score_a < 0.99 < score_b
        assert again == [[a, score_a], [b, score_b]]
    # the code in a folder is updated: the next process runs the new one
    shutil.copy(changed, old / changed.name)
    (a, _), (b, _), *_ = run_clean(clean_python, script, old, new, home=tmp_path / "home")
    assert a == b


@pytest.mark.slow
def test_what_was_loaded_without_the_package_can_be_published_again(published, clean_python, tmp_path):
    script = """
where, target = sys.argv[1:]
trust = {"trust_remote_code": True}
AutoModelForObjectDetection.from_pretrained(where, **trust).save_pretrained(target + "/model")
AutoFeatureExtractor.from_pretrained(where, **trust).save_pretrained(target + "/model")
localize = pipeline("temporal-action-localization", model=where, **trust)
localize.save_pretrained(target + "/pipeline")
print(json.dumps(localize(features, top_k=5)))
"""
    # a copy that is gone when its copies are used
    source = shutil.copytree(published, tmp_path / "gone")
    expected = run_clean(clean_python, script, source, tmp_path, home=tmp_path / "home")
    shutil.rmtree(source)
    copies = [tmp_path / "model", tmp_path / "pipeline"]
    for result in run_clean(clean_python, USE, *copies, home=tmp_path / "another home"):
        assert result["found"] == expected
    for copy in copies:
        assert sorted(path.name for path in copy.glob("*.py")) == HUB_FILES
        assert pipeline(TASK, model=str(copy)).model.config.id2label == {0: "walk", 1: "run", 2: "rest"}


@pytest.mark.slow
def test_from_a_repository_in_the_hub_cache(published, clean_python, tmp_path):
    """As after a download: the folder of a repository's commit in the cache, named by its id, and its revision pinned."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--their-model"
    shutil.copytree(published, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    localize = pipeline(TASK, model=str(published))
    expected = localize(np.random.default_rng(0).normal(size=(90, 6)).astype("float32"), top_k=5)
    script = """
found = []
for revision in ({}, {"revision": sys.argv[1]}):
    localize = pipeline(
        "temporal-action-localization", model="someone/their-model", trust_remote_code=True, **revision
    )
    config = AutoConfig.from_pretrained("someone/their-model", trust_remote_code=True, **revision)
    assert type(config) is type(localize.model.config)
    found.append(localize(features, top_k=5))
localize.model.save_pretrained(sys.argv[2])
localize.feature_extractor.save_pretrained(sys.argv[2])
print(json.dumps(found))
"""
    found = run_clean(clean_python, script, commit, tmp_path / "copy", home=tmp_path)
    assert found == [expected] * 2
    (copy,) = run_clean(clean_python, USE, tmp_path / "copy", home=tmp_path / "another")
    assert copy["found"] == expected


@pytest.mark.slow
def test_without_permission_the_error_names_the_argument(published, clean_python, tmp_path):
    script = """
errors = []
for load in (
    lambda: pipeline("temporal-action-localization", model=sys.argv[1], trust_remote_code=False),
    lambda: AutoModelForObjectDetection.from_pretrained(sys.argv[1], trust_remote_code=False),
    lambda: AutoFeatureExtractor.from_pretrained(sys.argv[1], trust_remote_code=False),
):
    try:
        load()
    except ValueError as error:
        errors.append(str(error))
print(json.dumps(errors))
"""
    errors = run_clean(clean_python, script, published, home=tmp_path)
    assert len(errors) == 3
    assert all("trust_remote_code=True" in error for error in errors)


@pytest.mark.slow
def test_moments_without_the_package(clean_python, tmp_path):
    folder = tmp_path / "finder"
    make_retrieval().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    assert sorted(path.name for path in folder.glob("*.py")) == HUB_FILES
    features = np.random.default_rng(0).normal(size=(90, 6)).astype("float32")
    expected = pipeline("moment-retrieval", model=str(folder))(features, ["lift", "lean forward"], top_k=2)
    script = """
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

where, trust = sys.argv[1], {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(where, **trust)
model = AutoModelForZeroShotObjectDetection.from_pretrained(where, **trust).eval()
with torch.no_grad():
    outputs = model(**processor(features, ["lift", "lean forward"]))
moments = processor.post_process_moment_retrieval(outputs, top_k=2)[0]
find = pipeline("moment-retrieval", model=where, **trust)
print(json.dumps({
    "names": [type(one).__name__ for one in (processor, model, processor.feature_extractor)],
    "scores": [one["scores"].tolist() for one in moments],
    "found": find(features, ["lift", "lean forward"], top_k=2),
}))
"""
    result = run_clean(clean_python, script, folder, home=tmp_path / "home")
    assert result["names"] == [
        "ConvTransformerProcessor",
        "ConvTransformerForMomentRetrieval",
        "ConvTransformerFeatureExtractor",
    ]
    assert result["found"] == expected
    assert result["scores"] == [[moment["score"] for moment in own] for own in expected]
