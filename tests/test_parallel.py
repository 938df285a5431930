"""Data parallelism, FSDP2, tensor and pipeline parallelism: two processes train as one does, and their checkpoints load in one.

The processes are on the CPU, with gloo. accelerate has FSDP2 for accelerators only; told otherwise, it runs on the CPU too.
"""

import contextlib
import copy
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples"), str(Path(__file__).resolve().parent)]

pytest.importorskip("transformers.distributed.mixin", reason="an older transformers, without distributed_config")
pytest.importorskip("accelerate", reason="Trainer needs accelerate (the train and demo extras)")

import parallel
from test_examples import write_data
from test_training import Recordings, detector, make_trainer
from transformers.distributed import DistributedConfig

from modeling_convtransformer import ConvTransformerConfig, ConvTransformerForTemporalActionLocalization
from modeling_convtransformer.parallel import DetectorStage, Pipeline, balanced_cuts
from modeling_convtransformer.training import EMACallback, find_last_checkpoint, load_ema

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")

SETTINGS = {"n_in": 4, "n_embd": 32, "n_head": 4, "arch": (1, 2, 3), "num_labels": 3, "init_loss_norm": 20}
# What is spread over heads, and what is not, at least once each.
MODELS = {
    "default": {"n_kv_head": 2},
    "other": {
        "use_rope": False,
        "use_rel_pe": True,
        "use_learned_pe": True,
        "mha_win_size": [5, 7, -1, 3],
        "use_swiglu": False,
        "use_rms_norm": False,
        "fpn_type": "fpn",
        "fpn_start_level": 1,
    },
}
# Running statistics too, of samples of other lengths on each process. (A pipeline refuses batch norm; tensor parallelism has
# each batch twice, which shows in the unbiased variance.)
BATCH_NORM = {"use_rms_norm": False, "use_batch_norm": True, "use_rel_pe": True, "rel_pe_max_distance": 6}
WAYS = {name: list(parallel.WAYS) for name in MODELS} | {"batch_norm": ["ddp", "fsdp2"]}
# float32: the same sums in another order, over five steps of plain gradient descent. Losses are about 1, gradients at most 1.
CLOSE = 1e-5


def batches():
    return [parallel.make_batch(seed, 4, 40, 4, 3) for seed in range(5)]


def launcher_environment(name):
    """What `accelerate launch --config_file examples/accelerate/NAME.yaml` gives to the processes that it starts."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    config = ROOT / "examples" / "accelerate" / f"{name}.yaml"
    args, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(config), "train.py"])
    )
    return args, prepare_multi_gpu_env(args)


def trainer_of(folder, index, **changes):
    """A Trainer of two recordings a step, of which the second run goes on where the first one stopped."""
    trainer = make_trainer(
        folder,
        detector(),
        Recordings([0, 1, 2, 3]),
        Recordings([0, 1, 2, 3]),
        **{
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "max_steps": 2 * (index + 1),
            "learning_rate": 0.003,
            "max_grad_norm": 0.5,
            "optim": "adamw_torch",
            "adam_epsilon": 1e-2,  # or rounding errors of tiny gradients would become whole steps
            "save_strategy": "steps",
            "save_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "logging_strategy": "steps",
            "logging_steps": 1,
            **changes,
        },
    )
    ema = EMACallback(trainer, 0.5)
    trainer.add_callback(ema)
    return trainer, ema


def run_trainer(folder, **changes):
    """Trains, goes on, evaluates with either weights, and saves both; what came out."""
    for index in range(2):
        trainer, ema = trainer_of(folder, index, **changes)
        trainer.train(resume_from_checkpoint=find_last_checkpoint(folder))
    metrics = [trainer.evaluate()]
    trainer.save_model(f"{folder}/own")
    with ema.weights(trainer.model):
        metrics.append(trainer.evaluate())
        trainer.save_model(f"{folder}/average")
    metrics.append(trainer.evaluate())
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "norms": [float(row["grad_norm"]) for row in trainer.state.log_history if "grad_norm" in row],
        "metrics": [{name: float(one[name]) for name in ("eval_loss", "eval_map")} for one in metrics],
        "ema_losses": [row["eval_ema_loss"] for row in trainer.state.log_history if "eval_ema_loss" in row],
        "kinds": sorted({type(parameter.data).__name__ for parameter in trainer.model.parameters()}),
    }


@contextlib.contextmanager
def fsdp2_on_cpu():
    """accelerate's state says FSDP where it would say "several CPUs"; all else is accelerate's own."""
    from accelerate import state
    from accelerate.utils import DistributedType

    os.environ |= {name: value for name, value in launcher_environment("fsdp2")[1].items() if "FSDP" in name}
    own = state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        own(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.fsdp_plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        self.distributed_type = DistributedType.FSDP

    state.AcceleratorState.__init__ = init
    try:
        yield
    finally:
        state.AcceleratorState.__init__ = own


def run_example(folder):
    import train_pipeline_parallel

    os.chdir(folder)
    sys.argv = ["train_pipeline_parallel.py", "recipe.yaml", "--output_dir", "out", "--pad_to", "32"]
    train_pipeline_parallel.main()


def train_checkpointed(checkpoint):
    """DDP with activation checkpointing: the backward pass sums statistics over processes once more."""
    model = parallel.load(checkpoint)
    model.gradient_checkpointing_enable()
    wrapped = DistributedDataParallel(model)
    return parallel.train(model.named_parameters(), lambda batch: parallel.own_share(wrapped, batch), batches())


def train_on_two(rank, folder):
    for name, ways in WAYS.items():
        parallel.train_ways(rank, folder / name, ways, batches())
    parallel.train_ways(rank, folder / "batch_norm_tp", ["tp"], batches())
    checkpointed = train_checkpointed(folder / "batch_norm" / "start")
    if rank == 0:
        torch.save(checkpointed, folder / "batch_norm" / "checkpointed.pt")
    refusals = {name: refusal(folder / "default" / "start", *given) for name, given in REFUSED.items()}
    with pytest.raises(ValueError, match="3 samples cannot be cut into 2 equal microbatches; give 2 samples"):
        Pipeline(detector(), torch.device("cpu"), 2).step(parallel.make_batch(0, 3, 40, 6, 3))
    with pytest.raises(ValueError, match="make 3 stages; expected one for each of 2 processes"):
        Pipeline(detector(), torch.device("cpu"), 2, cuts=[1, 2])
    with fsdp2_on_cpu():
        result = run_trainer(str(folder / "trainer"), per_device_train_batch_size=1, per_device_eval_batch_size=1)
    if rank == 0:
        torch.save({"trainer": result, "refusals": refusals}, folder / "rest.pt")
    for name in [name for name in os.environ if name.startswith(("FSDP", "ACCELERATE"))]:
        del os.environ[name]
    run_example(folder / "example")


def refusal(checkpoint, fields, config):
    """What from_pretrained says, with these fields and this distributed_config."""
    with pytest.raises(ValueError, match="distributed_config has") as error:
        ConvTransformerForTemporalActionLocalization.from_pretrained(
            checkpoint, distributed_config=DistributedConfig(**config), **fields
        )
    return str(error.value)


REFUSED = {
    "mqa": ({"n_kv_head": 1}, {"tp_size": 2}),
    "heads": ({"n_head": 1, "n_kv_head": None}, {"tp_size": 2}),
    "conv": ({"backbone_type": "conv"}, {"tp_size": 2}),
    "pipeline": ({}, {"pp_size": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have left what they trained."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, changes in {**MODELS, "batch_norm": BATCH_NORM, "batch_norm_tp": BATCH_NORM}.items():
        parallel.make_detector(**SETTINGS, **changes).save_pretrained(folder / name / "start")
    (folder / "example").mkdir()
    write_data(folder / "example")
    parallel.start_processes(train_on_two, 2, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_two_processes_train_as_one(folder, name):
    found = parallel.compare(folder / name, WAYS[name], batches())
    for way, row in found.items():
        one, own = (parallel.load(folder / name / which).state_dict() for which in ("one", way))
        for key, tensor in one.items():  # running variances are up to 12, and off in proportion
            torch.testing.assert_close(own[key], tensor, rtol=CLOSE, atol=CLOSE, msg=f"{way}: {key}")
        for what in {*row} - {"weights"}:
            assert row[what] < CLOSE, f"{way}: {what} differ by {row[what]}"
    start = parallel.load(folder / name / "start").state_dict()
    trained = parallel.load(folder / name / "one").state_dict()
    assert max((trained[key] - tensor).abs().max() for key, tensor in start.items()) > 100 * CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("path", ["batch_norm_tp/tp.pt", "batch_norm/checkpointed.pt"])
def test_batch_norm_of_processes_with_one_batch_and_under_checkpointing(folder, path, tmp_path):
    wanted = parallel.train_one(folder / "batch_norm" / "start", batches(), tmp_path)
    found = torch.load(folder / path, weights_only=True)
    torch.testing.assert_close(found["losses"], wanted["losses"], rtol=0, atol=CLOSE)
    for name, gradient in wanted["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=0, atol=CLOSE, msg=name)


@pytest.mark.slow
def test_trainer_with_fsdp2_trains_averages_resumes_and_saves_as_one_process(folder, tmp_path):
    found = torch.load(folder / "rest.pt", weights_only=True)["trainer"]
    wanted = run_trainer(str(tmp_path))
    assert (found.pop("kinds"), wanted.pop("kinds")) == (["DTensor"], ["Tensor"])
    for key in ("losses", "norms", "ema_losses"):
        assert found[key] == pytest.approx(wanted[key], rel=1e-5), key
    assert len(found["losses"]) == 4
    for own, one in zip(found["metrics"], wanted["metrics"], strict=True):
        assert own == pytest.approx(one, rel=1e-5)
    assert found["metrics"][0] == pytest.approx(found["metrics"][2], abs=1e-9)  # its own weights are back
    assert found["metrics"][0]["eval_loss"] != pytest.approx(found["metrics"][1]["eval_loss"], rel=1e-4)
    for name in ("own", "average", "checkpoint-4"):
        own, one = (parallel.load(Path(place) / name).state_dict() for place in (folder / "trainer", tmp_path))
        for key, tensor in one.items():
            torch.testing.assert_close(own[key], tensor, rtol=0, atol=CLOSE, msg=f"{name} {key}")
    averaged = load_ema(parallel.load(folder / "trainer" / "own"), folder / "trainer" / "checkpoint-4")
    for key, tensor in parallel.load(folder / "trainer" / "average").named_parameters():
        assert torch.equal(averaged.get_parameter(key), tensor)


@pytest.mark.slow
def test_what_cannot_be_spread_is_refused_with_what_can(folder):
    said = torch.load(folder / "rest.pt", weights_only=True)["refusals"]
    assert "tp_size=2, by which n_head 4 and n_kv_head 1" in said["mqa"]
    assert "tp_size=1 would work, or fsdp_size=2" in said["mqa"]
    assert "n_head 1 and n_kv_head None (None: as many)" in said["heads"]
    assert "backbone_type 'conv' has no heads" in said["conv"]
    assert "train_pipeline_parallel.py" in said["pipeline"]


@pytest.mark.slow
def test_pipeline_example_trains_and_saves(folder):
    model = parallel.load(folder / "example" / "out")
    assert model.config.n_in == 30
    assert model.criterion.loss_normalizer != model.config.init_loss_norm
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert '"map"' in (folder / "example" / "out" / "metrics.json").read_text()


# --- In one process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [*MODELS.values(), {"arch": (1, 0, 3)}, {"arch": (1, 2, 0)}], ids=str)
def test_plans_name_modules_of_the_model(changes):
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    model = parallel.make_detector(**{**SETTINGS, **changes})
    names = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
    names = {replace_layer_number_by_wildcard(name) for name in names}
    for plan in (model.tp_plan, model.fsdp_plan):
        assert plan
        assert {*plan} <= names
    # Whatever is as wide as the heads or the hidden layer is spread.
    linear = {name for name, module in model.model.named_modules() if name.endswith("_proj")}
    assert {f"model.{replace_layer_number_by_wildcard(name)}" for name in linear} <= {*model.tp_plan}
    assert not [key for key in model.config.to_dict() if key.endswith("_plan") or key == "distributed_config"]


def test_a_backbone_of_convolutions_has_no_tensor_parallel_plan():
    config = ConvTransformerConfig(**SETTINGS, backbone_type="conv")
    assert config.base_model_tp_plan is None
    assert config.base_model_fsdp_plan == {
        "embedding": "free_full_weight",
        "stem.*": "free_full_weight",
        "branch.*": "free_full_weight",
    }


@pytest.mark.parametrize(
    ("arch", "stages", "cuts"),
    [((1, 2, 3), 2, [2]), ((2, 2, 5), 2, [2]), ((1, 2, 0), 4, [0, 1, 2]), ((0, 0, 0), 2, [0]), ((1, 2, 3), 1, [])],
)
def test_stages_have_about_the_same_work(arch, stages, cuts):
    settings = {**SETTINGS, "arch": arch, **({"n_in": 32} if arch[0] == 0 else {})}
    assert balanced_cuts(parallel.make_detector(**settings), stages) == cuts


@pytest.mark.parametrize("stages", [2, 3, 4, 5, 6, 7])
def test_stages_one_after_the_other_are_the_detector(stages):
    model = parallel.make_detector(**SETTINGS).eval()
    batch = batches()[0]
    cuts = balanced_cuts(model, stages)
    assert cuts == sorted({*cuts})
    wanted = model(**batch, num_items_in_batch=7.0).loss
    outputs, names, samples = (batch["input_features"],), [], torch.arange(4)
    for index in range(stages):
        stage = DetectorStage(copy.deepcopy(model), cuts, index)
        stage.labels, stage.num_items_in_batch = batch["labels"], torch.tensor(7.0)
        outputs = stage(*outputs, attention_mask=batch["attention_mask"], samples=samples)
        names += [name for name, _ in stage.detector.named_parameters()]
        assert stage.start < stage.stop or stage.is_first or stage.is_last
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    torch.testing.assert_close(outputs, wanted[None], rtol=0, atol=0)


def test_what_a_pipeline_cannot_do():
    model = parallel.make_detector(**SETTINGS)
    with pytest.raises(ValueError, match=r"8 processes for 7 parts .embedding, 5 blocks of arch .1, 2, 3.*at most 7"):
        balanced_cuts(model, 8)
    with pytest.raises(ValueError, match=r"cuts \[3, 2\].*rising numbers from 0 to 5"):
        DetectorStage(model, [3, 2], 0)
    with pytest.raises(RuntimeError, match="Start the script with torchrun"):
        Pipeline(model, torch.device("cpu"), 2)


def test_config_files_are_what_accelerate_reads():
    args, _ = launcher_environment("ddp")
    assert args.multi_gpu
    args, environment = launcher_environment("fsdp2")
    assert args.use_fsdp
    assert (environment["FSDP_VERSION"], environment["FSDP_STATE_DICT_TYPE"]) == ("2", "FULL_STATE_DICT")
    wrapped = environment["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(",")
    assert {*wrapped} < {*parallel.make_detector(**SETTINGS)._no_split_modules}
    args, _ = launcher_environment("deepspeed_zero3")
    assert args.use_deepspeed
    settings = json.loads((ROOT / args.deepspeed_config_file).read_text())
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]


def test_average_of_weights_that_deepspeed_spreads_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, detector())
    for parameter in trainer.model.parameters():
        parameter.ds_id = 0  # DeepSpeed's mark
    trainer.add_callback(EMACallback(trainer))
    with pytest.raises(ValueError, match=r"--ema_decay 0\), or use FSDP2"):
        trainer.train()


def test_benchmark_says_what_it_expects(capsys):
    with pytest.raises(SystemExit):
        parallel.main(["--steps", "0"])
    assert "expect integers of at least 1" in "".join(capsys.readouterr())
