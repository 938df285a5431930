"""The model card: valid for the Hub, true to what was measured, there after training and in every upload. There is no Hub
here: what would be uploaded is caught where huggingface_hub would send it."""

import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, repocard
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from torch.utils.data import Dataset
from transformers import TrainingArguments

from modeling_convtransformer import (
    ConvTransformerBackbone,
    ConvTransformerConfig,
    ConvTransformerFeatureExtractor,
    ConvTransformerForTemporalActionLocalization,
    ConvTransformerModel,
    ConvTransformerPreTrainedModel,
)
from modeling_convtransformer.evaluation import evaluate_detections
from modeling_convtransformer.model_card_convtransformer import is_hub_id, make_model_card, write_model_card
from modeling_convtransformer.training import shareable_command

PACKAGE = Path(sys.modules["modeling_convtransformer"].__file__).parent
LABELS = ["wave", "clap", "jump"]
FIGURES = {"map": 0.61237, "map_30": 0.9, "map_50": 0.61, "map_7.5": 1.0, "recall_1x_30": 0.5}
GEOMETRY = {"fps": 25, "feature_stride": 5, "num_frames": 10}


def make_config(labels=LABELS, **changes):
    settings = {"n_in": 6, "n_embd": 16, "n_head": 2, "arch": (1, 1, 2), "head_dim": 16, "max_len": 64}
    return ConvTransformerConfig(**{**settings, **changes}, id2label=dict(enumerate(labels)))


def make_model(seed=0, kind=ConvTransformerForTemporalActionLocalization):
    torch.manual_seed(seed)
    return kind(make_config())


def make_extractor():
    return ConvTransformerFeatureExtractor(6, 10, 5, num_frames=8, max_seg_num=20)


def full_card(**changes):
    arguments = {
        "model_id": "me/gestures",
        "num_parameters": 12345,
        "geometry": GEOMETRY,
        "results": {"validation": FIGURES},
        "dataset": "Gestures",
        "dataset_ids": ["me/gestures-data"],
        "picture": "timeline.png",
        "base_model": "me/base",
        "license": "Apache-2.0",
        "tags": ["sensor"],
        "command": "python examples/train.py recipe.yaml --seed 3",
        "training": {"learning rate": "0.001", "seed": "3"},
    }
    return make_model_card(make_config(), **{**arguments, **changes})


def table_of(text):
    """{row: {column: cell}} of the table of results."""
    lines = re.findall(r"^\|(.*)\|$", text.split("## Results")[1].split("\n## ")[0], flags=re.MULTILINE)
    header, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines)
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


# --- Content --------------------------------------------------------------------------------------------------------


def test_metadata_is_what_was_measured_and_survives():
    content = str(full_card())
    card = ModelCard(content)
    assert str(card) == content
    assert str(ModelCard(str(card))) == content
    metadata = card.data.to_dict()
    assert {*metadata} == {"library_name", "license", "base_model", "datasets", "tags", "model-index"}
    assert metadata["license"] == "apache-2.0"
    assert metadata["base_model"] == "me/base"
    assert metadata["datasets"] == ["me/gestures-data"]
    assert metadata["tags"] == ["temporal-action-localization", "convtransformer", "sensor"]
    assert "pipeline_tag" not in metadata
    found = {one.metric_name: one for one in card.data.eval_results}
    assert {name: one.metric_value for name, one in found.items()} == {
        "mAP at tIoU 0.075 (%)": 100.0,
        "mAP at tIoU 0.3 (%)": 90.0,
        "mAP at tIoU 0.5 (%)": 61.0,
        "Average mAP (%)": 61.24,
    }
    assert found["mAP at tIoU 0.3 (%)"].metric_args == {"tiou_thresholds": [0.3]}
    assert found["Average mAP (%)"].metric_args == {"tiou_thresholds": [0.075, 0.3, 0.5]}
    for one in found.values():
        assert (one.task_type, one.dataset_name, one.dataset_type, one.dataset_split) == (
            "temporal-action-localization",
            "Gestures",
            "me/gestures-data",
            "validation",
        )
    front = content.split("---\n")[1]
    assert "!!" not in front  # a plain loader reads it
    assert yaml.safe_load(front) == metadata


def test_numbers_of_numpy_are_plain_in_the_metadata():
    results = {"validation": {name: np.float64(value) for name, value in FIGURES.items()}}
    assert str(full_card(results=results)) == str(full_card())


def test_text_says_the_same():
    text = full_card().text
    assert table_of(text) == {
        "Gestures, validation": {"tIoU 0.075": "100.00", "tIoU 0.3": "90.00", "tIoU 0.5": "61.00", "average": "61.24"}
    }
    assert text.startswith("\n# gestures\n")
    for part in (
        "https://arxiv.org/abs/2202.07925",
        "12,345 parameters, width 16, 3 levels (one step in 1, 2, 4 features)",
        "3 classes: `wave`, `clap`, `jump`.",
        "![Timeline of one recording](timeline.png)",
        "Features of shape (time, 6)",
        "The recordings have 25 frames (or samples) a second; feature t covers 10 frames from frame 5 · t on: 0.4 seconds, "
        "every 0.2 seconds.",
        "Trained on Gestures ([me/gestures-data](https://huggingface.co/datasets/me/gestures-data)). It started from the weights "
        "of [me/base](https://huggingface.co/me/base).",
        "```bash\npython examples/train.py recipe.yaml --seed 3\n```",
        "- learning rate: 0.001\n- seed: 3\n",
    ):
        assert part in text
    assert "nformation needed" not in text


def test_snippets_pin_a_revision():
    blocks = re.findall(r"```python\n(.*?)```", full_card(revision="0a1b2c").text, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "README.md", "exec")
        assert '"me/gestures"' in block
        assert 'revision="0a1b2c"' in block
    assert "trust_remote_code=True" in blocks[0]
    assert "trust_remote_code" not in blocks[1]
    unknown = full_card(model_id=None, model_name="gestures").text
    assert unknown.count('model="<repository>"') == 2
    assert unknown.count('revision="<commit>"') == 2
    assert "Replace `<commit>` by the commit that you have looked at" in unknown
    assert "Replace" not in full_card(revision="0a1b2c").text


def test_nothing_measured_is_said_and_nothing_is_invented():
    for results in (None, {}, {"validation": {}}, {"validation": {"loss": 1.0, "map": float("nan")}}):
        card = make_model_card(make_config(), results=results)
        assert {*card.data.to_dict()} == {"library_name", "tags"}
        assert "No evaluation of these weights is recorded." in card.text
        assert "|" not in card.text
        assert "## Training" not in card.text
        assert "not been measured" in card.text
    assert ModelCard(str(card)).data.eval_results is None


def test_several_evaluated_sets_are_rows_of_one_table():
    card = full_card(results={"day": {"map": 0.5, "map_50": 0.5}, "night": {"map": 0.2, "map_30": 0.2}})
    assert table_of(card.text) == {
        "Gestures, day": {"tIoU 0.3": "", "tIoU 0.5": "50.00", "average": "50.00"},
        "Gestures, night": {"tIoU 0.3": "20.00", "tIoU 0.5": "", "average": "20.00"},
    }
    found = ModelCard(str(card)).data.eval_results
    assert [(one.dataset_split, one.metric_value) for one in found] == [
        ("day", 50.0),
        ("day", 50.0),
        ("night", 20.0),
        ("night", 20.0),
    ]


def test_data_without_a_name_are_unknown():
    (one, *_) = ModelCard(str(full_card(dataset=None, dataset_ids=()))).data.eval_results
    assert (one.dataset_name, one.dataset_type) == ("unknown", "unknown")


ODD = [
    'say "hi": now',
    "a | b",
    "*bold* _it_ `code` ``two``",
    "two\nlines",
    "<b>&amp;",
    "# head",
    "---",
    "{x: !!python}",
    "日本",
    "$x$",
]


@pytest.mark.parametrize("odd", ODD)
def test_odd_names_break_neither_metadata_nor_table(odd):
    line = " ".join(odd.split())
    card = make_model_card(
        make_config([odd, "clap", "jump"]),
        model_name=odd,
        results={odd: FIGURES},
        dataset=odd,
        tags=[odd],
        training={odd: odd},
        command=f"python train.py {odd}",
    )
    again = ModelCard(str(card))
    assert again.data.model_name == line
    assert {one.dataset_name for one in again.data.eval_results} == {line}
    assert {one.dataset_split for one in again.data.eval_results} == {line}
    assert len(again.data.eval_results) == 4
    (row,) = table_of(again.text).values()
    assert row["average"] == "61.24"
    (title,) = re.findall(r"^# .*$", again.text.split("##")[0], flags=re.MULTILINE)
    assert re.sub(r"\\(.)", r"\1", title) == f"# {line}"
    assert [*re.findall(r"^## (.*)$", again.text, flags=re.MULTILINE)] == [
        "Results",
        "Use",
        "What goes in",
        "Training",
        "Limits",
    ]
    for block in re.findall(r"^```python\n(.*?)^```", again.text, flags=re.DOTALL | re.MULTILINE):
        compile(block, "README.md", "exec")


def test_many_and_nameless_classes_stay_short():
    assert "100 classes: `c0`, " in (text := make_model_card(make_config([f"c{i}" for i in range(100)])).text)
    assert "`c59` and 40 more (`id2label` in config.json)." in text
    assert (
        "7 classes, whose names were not recorded."
        in make_model_card(make_config([f"LABEL_{i}" for i in range(7)])).text
    )


def test_a_folder_is_no_base_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "old").mkdir(parents=True)
    for folder in ("outputs/old", str(tmp_path / "outputs" / "old")):
        card = full_card(base_model=folder)
        assert "base_model" not in card.data.to_dict()
        assert "It started from the weights of a model that is not on the Hub (the folder `old`)." in card.text
        assert str(tmp_path) not in card.text
    assert is_hub_id("me/old")
    assert not any(map(is_hub_id, ("old", "a/b/c", "../old", "me/", "/me/old", "./old", "me/o ld", "me\\old")))


def test_streams_and_backbones_are_described():
    card = make_model_card(make_config(n_in=[4, 2], stream_dims=[8, 8]), geometry=GEOMETRY)
    assert "Features of shape (time, 6) (4 + 2: several streams side by side)" in card.text
    config = make_config()
    config.architectures = ["ConvTransformerModel"]
    text = make_model_card(config, model_id="me/backbone").text
    assert "AutoModel.from_pretrained(" in text
    assert "pipeline" not in text
    assert "wave" not in text


def test_secrets_are_not_published():
    words = [
        "python",
        "train.py",
        "--hub_token",
        "hf_abcdefghijklmnopqrst",
        "--lr",
        "1",
        "--api-key=abc",
        "--x=hf_abcdefghijklmnopqrst",
    ]
    assert shareable_command(words) == "python train.py --hub_token '***' --lr 1 '--api-key=***' '--x=***'"
    assert (
        shareable_command(["python", "train.py", "--hub_token", "--lr", "1"]) == "python train.py --hub_token --lr 1"
    )
    assert shareable_command(["python", "train.py", "--set", "arch=[2, 2]"]) == "python train.py --set 'arch=[2, 2]'"


# --- Files ----------------------------------------------------------------------------------------------------------


def test_what_people_wrote_stays(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    path = tmp_path / "README.md"
    assert write_model_card(full_card(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    assert ModelCard(path.read_text(encoding="utf-8")).data.to_dict() == full_card().data.to_dict()
    assert write_model_card(full_card(license="mit"), tmp_path)  # ours, unchanged: written anew
    assert "license: mit" in path.read_text(encoding="utf-8")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # git may have done that
    assert write_model_card(full_card(license="mit"), tmp_path)
    for change in (
        lambda text: text.replace("## Limits", "## My words"),
        lambda text: f"{text}\nMore.",
        lambda _: "My words.",
    ):
        write_model_card(full_card(), tmp_path)
        changed = change(path.read_text(encoding="utf-8"))
        path.write_text(changed, encoding="utf-8")
        assert not write_model_card(full_card(), tmp_path)
        assert path.read_text(encoding="utf-8") == changed
        path.unlink()
    assert "was written or changed by hand" in caplog.text


# --- Upload ---------------------------------------------------------------------------------------------------------


class Hub:
    """What is uploaded, by repository and path; `cards` are those that are there already."""

    def __init__(self, folder):
        self.folder, self.files, self.cards = folder, {}, {}

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_commit(self, repo_id, operations, **_):
        for operation in operations:
            assert isinstance(operation, CommitOperationAdd)
            self.files.setdefault(repo_id, {})[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

    def upload_folder(self, repo_id, folder_path, ignore_patterns=None, **_):
        paths = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        for name in filter_repo_objects(paths, ignore_patterns=ignore_patterns):
            self.files.setdefault(repo_id, {})[name] = (Path(folder_path) / name).read_bytes()

    def download(self, repo_id, *_, **__):
        if repo_id not in self.cards:
            raise EntryNotFoundError("no card")
        path = self.folder / "downloaded.md"
        path.write_text(self.cards[repo_id], encoding="utf-8")
        return str(path)

    def card(self, repo_id="me/new") -> str:
        return self.files[repo_id]["README.md"].decode()


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    hub = Hub(tmp_path_factory.mktemp("hub"))
    for name in ("create_repo", "create_commit", "upload_folder"):
        monkeypatch.setattr(
            HfApi, name, lambda self, *args, _name=name, **kwargs: getattr(hub, _name)(*args, **kwargs)
        )
    monkeypatch.setattr(repocard, "hf_hub_download", hub.download)
    return hub


GENERIC = "has been automatically generated"


@pytest.mark.parametrize(
    "kind", [ConvTransformerForTemporalActionLocalization, ConvTransformerModel, ConvTransformerBackbone]
)
def test_a_new_model_is_uploaded_with_a_card_and_its_code(hub, kind):
    make_model(kind=kind).push_to_hub("me/new", tags=["mine"])
    files = hub.files["me/new"]
    assert {path.name for path in PACKAGE.glob("*_convtransformer.py")} <= {*files}
    assert {"README.md", "config.json", "model.safetensors"} <= {*files}
    card = ModelCard(hub.card())
    assert card.data.tags == ["temporal-action-localization", "convtransformer", "mine"]
    assert card.data.eval_results is None
    assert GENERIC not in card.text
    assert "No evaluation of these weights is recorded." in card.text
    assert f"{make_model(kind=kind).num_parameters():,} parameters" in card.text
    assert '"me/new"' in card.text
    assert ("pipeline(" in card.text) == (kind is ConvTransformerForTemporalActionLocalization)


@pytest.fixture
def trained(tmp_path):
    """A folder with a model, its card (which does not know its repository yet) and a picture."""
    folder = tmp_path / "trained"
    make_model().save_pretrained(folder)
    make_extractor().save_pretrained(folder)
    write_model_card(full_card(model_id=None, model_name="gestures"), folder)
    (folder / "timeline.png").write_bytes(b"a timeline")
    (folder / "images").mkdir()
    (folder / "images" / "picture.png").write_bytes(b"a picture")
    return folder


def test_the_card_of_the_folder_goes_with_its_weights(hub, trained):
    model = ConvTransformerForTemporalActionLocalization.from_pretrained(trained)
    model.push_to_hub("me/new", tags=["mine"])
    card = ModelCard(hub.card())
    assert "<repository>" not in hub.card()
    assert card.text.count('model="me/new"') == 2
    assert table_of(card.text) == table_of(full_card().text)
    assert card.data.eval_results == full_card().data.eval_results
    assert card.data.tags == ["temporal-action-localization", "convtransformer", "sensor", "mine"]
    assert hub.files["me/new"]["timeline.png"] == b"a timeline"
    assert not any(name.startswith("images/") for name in hub.files["me/new"])  # not shown
    assert "<repository>" in (trained / "README.md").read_text(encoding="utf-8")  # the folder's own is as it was

    # Our card is on the Hub now. One of newer figures of these weights takes its place, none at all does not.
    hub.cards["me/new"] = hub.card()
    write_model_card(full_card(model_id=None, results={"validation": {"map": 0.75}}), trained)
    model.push_to_hub("me/new")
    assert ModelCard(hub.card()).data.eval_results[0].metric_value == 75.0
    make_model().push_to_hub("me/new")
    assert hub.card().split() == hub.cards["me/new"].split()


def test_figures_of_other_weights_are_not_published(hub, trained):
    model = ConvTransformerForTemporalActionLocalization.from_pretrained(trained)
    with torch.no_grad():
        model.class_head.output.bias.add_(1)
    model.push_to_hub("me/new")
    card = ModelCard(hub.card())
    assert card.data.eval_results is None
    assert "timeline.png" not in hub.files["me/new"]
    assert "base_model" not in card.data.to_dict()


def test_a_model_from_the_hub_names_its_base(hub):
    model = make_model()
    model.name_or_path = "someone/base"
    model.push_to_hub("me/new")
    assert ModelCard(hub.card()).data.base_model == "someone/base"
    model.push_to_hub("someone/base")
    assert ModelCard(hub.card("someone/base")).data.base_model is None


def test_own_words_stay(hub, trained):
    own = "---\nlicense: mit\n---\n\nMy own words. ![](images/picture.png) ![](../secret.png)\n"
    (trained.parent / "secret.png").write_bytes(b"secret")
    (trained / "link.png").symlink_to(trained.parent / "secret.png")
    own += "![](link.png) ![](https://somewhere.org/x.png)\n"
    (trained / "README.md").write_text(own, encoding="utf-8")
    model = ConvTransformerForTemporalActionLocalization.from_pretrained(trained)
    model.push_to_hub("me/new")
    assert hub.card() == own
    assert hub.files["me/new"]["images/picture.png"] == b"a picture"
    assert b"secret" not in hub.files["me/new"].values()

    for words in ("---\nlicense: mit\n---\nOn the Hub.\n", "Without metadata.\n"):
        hub.cards["me/new"] = words
        model.push_to_hub("me/new")
        assert ModelCard(hub.card()).text.strip() == ModelCard(words).text.strip()

    # transformers' own card, once somebody has worked on it, is their card.
    hub.cards.clear()
    monkey = pytest.MonkeyPatch()
    monkey.setattr(ConvTransformerPreTrainedModel, "_upload_modified_files", super_upload)
    model.push_to_hub("me/generic")
    monkey.undo()
    generic = hub.card("me/generic")
    assert GENERIC in generic
    for change, stays in (
        (("", ""), False),
        (("# Model Card for Model ID", "# Mine"), True),
        (("---\n\n", "license: mit\n---\n\n"), True),
    ):
        hub.cards["me/new"] = generic.replace(*change, 1)
        assert change == ("", "") or hub.cards["me/new"] != generic
        model.push_to_hub("me/new")
        assert (GENERIC in hub.card()) == stays


def super_upload(self, *args, **kwargs):
    from transformers.utils.hub import PushToHubMixin

    return PushToHubMixin._upload_modified_files(self, *args, **kwargs)


def test_saving_and_uploading_a_folder_keeps_its_card(hub, trained):
    """transformers writes its card over the folder's before the upload."""
    before = (trained / "README.md").read_text(encoding="utf-8")
    model = ConvTransformerForTemporalActionLocalization.from_pretrained(trained)
    model.save_pretrained(trained, push_to_hub=True, repo_id="me/new")
    assert ModelCard(hub.card()).data.eval_results == full_card().data.eval_results
    assert (trained / "README.md").read_text(encoding="utf-8") == hub.card()
    assert hub.card() != before  # it knows its repository now
    assert hub.files["me/new"]["timeline.png"] == b"a timeline"
    assert not any(name.startswith("images/") for name in hub.files["me/new"])

    (trained / "README.md").write_text("My own words.\n", encoding="utf-8")
    with torch.no_grad():
        model.class_head.output.bias.add_(1)
    model.save_pretrained(trained, push_to_hub=True, repo_id="me/other")
    assert hub.card("me/other") == (trained / "README.md").read_text(encoding="utf-8") == "My own words.\n"

    # But our figures are not those of the weights that have just been saved in place of the old ones.
    (trained / "README.md").unlink()
    write_model_card(full_card(), trained)
    with torch.no_grad():
        model.class_head.output.bias.add_(1)
    model.save_pretrained(trained, push_to_hub=True, repo_id="me/third")
    assert ModelCard(hub.card("me/third")).data.eval_results is None
    assert "The recordings have 10 frames" in hub.card("me/third")  # preprocessor_config.json lies there


# --- Trainer --------------------------------------------------------------------------------------------------------


class Recordings(Dataset):
    """Noise with two segments each."""

    def __init__(self, count=3, seed=0):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        features = np.random.default_rng([self.seed, index]).normal(size=(24 + index, 6))
        return {
            "video_id": f"v{index}",
            "features": features.astype(np.float32),
            "segments": np.array([[1.0, 6.0], [10.0, 18.0]], dtype=np.float32),
            "class_labels": np.array([index % 3, 1]),
            "geometry": {"fps": 10.0, "feature_stride": 5, "num_frames": 8, "duration": 0.5 * (24 + index)},
        }


def make_trainer(folder, model=None, evaluate=None, **changes):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate (the train and demo extras)")
    from modeling_convtransformer.training import TemporalActionTrainer, compute_detection_metrics

    settings = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "weight_decay": 0.02,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "seed": 5,
    }
    return TemporalActionTrainer(
        model=make_model() if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **{**settings, **changes}),
        train_dataset=Recordings(),
        eval_dataset=Recordings(2, seed=1) if evaluate is None else evaluate,
        feature_extractor=make_extractor(),
        compute_metrics=compute_detection_metrics,
    )


def figures(folder, split="evaluation"):
    """{tIoU or None: percent} of the card in a folder; that table and metadata agree is looked at here too."""
    card = ModelCard.load(str(folder / "README.md"))
    ours = [one for one in card.data.eval_results if one.dataset_split == split]
    values = {
        "average" if "Average" in one.metric_name else f"tIoU {one.metric_args['tiou_thresholds'][0]:g}": one
        for one in ours
    }
    (row,) = [row for name, row in table_of(card.text).items() if name.endswith(split)]
    assert row == {name: f"{one.metric_value:.2f}" for name, one in values.items()}
    return {name: one.metric_value for name, one in values.items()}


def percents(metrics, prefix):
    names = {"map": "average", **{f"map_{percent}": f"tIoU {percent / 100:g}" for percent in (30, 40, 50, 60, 70)}}
    return {column: round(100 * metrics[f"{prefix}_{name}"], 2) for name, column in names.items()}


def test_trainer_writes_what_it_measured(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "out")
    trainer.train()
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", "abc"])
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "train.py", raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    trainer.create_model_card(license="mit", dataset="Noise", dataset_tags="me/noise", tags="sensor", language="en")
    rows = [row for row in trainer.state.log_history if "eval_map" in row]
    assert figures(tmp_path / "out") == percents(rows[-1], "eval")
    card = ModelCard.load(str(tmp_path / "out" / "README.md"))
    assert card.data.license == "mit"
    assert card.data.language == "en"
    assert card.data.datasets == ["me/noise"]
    assert card.data.tags == ["temporal-action-localization", "convtransformer", "sensor"]
    assert card.data.base_model is None
    assert card.data.model_name == "out"
    for part in (
        "```bash\npython train.py --hub_token '***'\n```",
        "- learning rate: 0.05, linear schedule\n",
        "weight decay 0.02",
        "- batch size: 2\n",
        "- epochs: 2 (4 steps)\n",
        "- recordings: 3 to train on, 2 to evaluate on\n",
        "- seed: 5\n",
        f"torch {torch.__version__}",
        "The recordings have 10 frames (or samples) a second; feature t covers 8 frames from frame 5",
    ):
        assert part in card.text
    assert "flatter" not in card.text

    # Measured again, otherwise: the later figures. And weights that were not measured have none.
    metrics = trainer.evaluate(Recordings(3, seed=2))
    trainer.create_model_card()
    assert figures(tmp_path / "out") == percents(metrics, "eval")
    trainer = make_trainer(tmp_path / "unmeasured", eval_strategy="no")
    trainer.train()
    trainer.create_model_card()
    assert "No evaluation of these weights is recorded." in (tmp_path / "unmeasured" / "README.md").read_text()


def test_trainer_without_script_or_training(tmp_path, monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    trainer = make_trainer(tmp_path / "out")
    metrics = trainer.evaluate()
    trainer.create_model_card()
    assert figures(tmp_path / "out") == percents(metrics, "eval")
    assert "## Training" not in (tmp_path / "out" / "README.md").read_text()
    trainer.train()
    trainer.create_model_card()
    assert "```bash" not in (tmp_path / "out" / "README.md").read_text()


def test_several_evaluation_sets(tmp_path):
    trainer = make_trainer(tmp_path, evaluate={"day": Recordings(2, seed=1), "night_time": Recordings(2, seed=2)})
    trainer.train()
    trainer.create_model_card(dataset=["Noise", "More noise"])
    logged = {name: value for row in trainer.state.log_history for name, value in row.items()}
    assert figures(tmp_path, "day") == percents(logged, "eval_day")
    assert figures(tmp_path, "night_time") == percents(logged, "eval_night_time")
    assert "Trained on Noise and More noise." in (tmp_path / "README.md").read_text()


def test_figures_are_those_of_the_weights_that_are_saved(tmp_path):
    """The best checkpoint's, its own weights or the averaged ones."""
    pytest.importorskip("accelerate", reason="Trainer needs accelerate (the train and demo extras)")
    from modeling_convtransformer.training import EMACallback

    model = make_model()
    torch.nn.init.normal_(model.class_head.output.weight, std=0.5)
    settings = {
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_ema_map",
        "num_train_epochs": 4,
    }
    trainer = make_trainer(tmp_path, model, **settings)
    average = EMACallback(trainer, decay=0.8)
    trainer.add_callback(average)
    trainer.train()
    rows = {name: [row for row in trainer.state.log_history if f"{name}_map" in row] for name in ("eval", "eval_ema")}
    step = trainer.state.best_global_step
    (own,), (averaged,) = ([row for row in rows[name] if row["step"] == step] for name in ("eval", "eval_ema"))
    trainer.create_model_card()
    assert figures(tmp_path) == percents(own, "eval")
    text = (tmp_path / "README.md").read_text()
    assert len(table_of(text)) == 1
    assert "- weights: the last ones, not their moving average (decay 0.8)" in text
    assert f"The weights are the best of 4 evaluations during training (step {step}, by `eval_ema_map`)" in text
    with average.weights(trainer.model):
        trainer.create_model_card()
    assert figures(tmp_path) == percents(averaged, "eval_ema")
    assert "- weights: their moving average (decay 0.8)" in (tmp_path / "README.md").read_text()
    assert len(table_of((tmp_path / "README.md").read_text())) == 1
    assert not average.in_use
    # Measured again after the training, whatever step it was at.
    metrics = trainer.evaluate(Recordings(4, seed=2))
    trainer.create_model_card()
    assert figures(tmp_path) == percents(metrics, "eval") != percents(own, "eval")


def test_trainer_uploads_its_card_and_the_code(hub, tmp_path):
    model = make_model()
    model.name_or_path = "someone/base"
    trainer = make_trainer(tmp_path / "out", model, push_to_hub=True, hub_model_id="me/new", num_train_epochs=1)
    trainer.train()
    trainer.push_to_hub(dataset="Noise", license="apache-2.0")
    files = hub.files["me/new"]
    assert {path.name for path in PACKAGE.glob("*_convtransformer.py")} <= {*files}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {*files}
    card = ModelCard(hub.card())
    assert card.text.count('model="me/new"') == 2
    assert card.data.base_model == "someone/base"
    rows = [row for row in trainer.state.log_history if "eval_map" in row]
    (tmp_path / "uploaded").mkdir()
    (tmp_path / "uploaded" / "README.md").write_text(hub.card(), encoding="utf-8")
    assert figures(tmp_path / "uploaded") == percents(rows[-1], "eval")

    (tmp_path / "out" / "README.md").write_text("My own words.\n", encoding="utf-8")
    trainer.save_model()  # uploads too, because of push_to_hub
    assert hub.card() == "My own words.\n"


def test_adapters_get_the_card_of_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="adapters need peft")
    import modeling_convtransformer.training  # noqa: F401  tells PEFT which layers to adapt

    folder = tmp_path / "base"
    make_model().save_pretrained(folder)
    base = ConvTransformerForTemporalActionLocalization.from_pretrained(folder)
    trainer = make_trainer(tmp_path / "out", peft.get_peft_model(base, peft.LoraConfig(r=2)), num_train_epochs=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = ModelCard.load(str(tmp_path / "out" / "README.md"))
    assert card.data.library_name == "peft"
    assert "pipeline(" not in card.text


# --- The snippet ----------------------------------------------------------------------------------------------------


def test_the_snippets_run(tmp_path, monkeypatch):
    """As a reader would type them, with the folder in the place of the repository, and the package that is installed here."""
    folder = tmp_path / "model"
    model = make_model()
    torch.nn.init.normal_(model.class_head.output.weight, std=1.0)
    model.save_pretrained(folder)
    make_extractor().save_pretrained(folder)
    np.save(tmp_path / "features.npy", np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32))
    write_model_card(make_model_card(model.config, geometry=GEOMETRY), folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    for block in reversed(blocks):
        block = block.replace("<repository>", str(folder))
        exec(compile(block, "README.md", "exec"), names)
        found = names["localize"]("features.npy", threshold=0.3)
        assert found
        assert {*found[0]} == {"label", "score", "start", "end"}
    assert names["segments"] == found
    json.dumps(found)


def test_figures_of_evaluate_detections_are_understood():
    one = {"v": {"segments": [[0.0, 4.0], [6.0, 8.0]], "labels": [0, 1], "scores": [0.9, 0.8]}}
    metrics = evaluate_detections(one, one, tiou_thresholds=(0.35, 0.5))
    found = ModelCard(str(full_card(results={"validation": metrics.to_dict()}))).data.eval_results
    assert [(each.metric_args["tiou_thresholds"], each.metric_value) for each in found] == [
        ([0.35], 100.0),
        ([0.5], 100.0),
        ([0.35, 0.5], 100.0),
    ]
