"""``python -m monai.bundle run`` on ``dinov2_ct``: tiny networks, everything else as users run it."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from safetensors import safe_open
from safetensors.torch import load_file, save_file

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "dinov2_ct"
VIT = "vit_large_patch14_reg4_dinov2.lvd142m"
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
TINY = {
    **{f"{name}_px" if "size" in name else name: value for name, value in SIZE.items()},
    **{"global_size_px": 32, "local_size_px": 16, "num_local": 3, "num_guided_local": 1},
    **{"head_hidden_dim": 16, "head_bottleneck_dim": 8, "num_prototypes": 11, "koleo_weight": 0.1},
    **{"batch_size": 4, "max_steps": 9, "warmup_steps": 2, "lr": 0.003, "amp_dtype": "float32"},
    **{"teacher_momentum": "[0.6,0.9]", "teacher_temp_warmup_steps": 4, "freeze_last_layer_steps": 2},
    **{"num_workers": 0, "log_every": 1, "checkpoint_every": 4, "keep_checkpoints": 3, "balance": "centring"},
}
TERMS = ("loss", "dino", "ibot", "koleo", "teacher_entropy", "kl", "centre_norm", "ibot_centre_norm")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Small random weights with three input channels under the names of the published ones."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("published") / "dinov2.safetensors"
    save_file(timm.create_model(VIT, num_classes=0, init_values=0.1, **SIZE).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def runs(training_runs, published):
    return training_runs("dinov2_ct", TINY | {"initial_weights": published})


@pytest.fixture(scope="module")
def unbroken(runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    runs.run(out)
    return out


def test_a_run_leaves_the_teachers_encoder_and_a_record(runs, unbroken, published):
    weights, start = load_file(unbroken / "model.safetensors"), load_file(published)
    assert weights.keys() == start.keys()
    assert weights["patch_embed.proj.weight"].shape == (24, 1, 8, 8)
    state = torch.load(unbroken / "checkpoints" / "step_00000009.pt", weights_only=True)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, state["teacher"][f"encoder.{name}"], rtol=0, atol=0)
    # it started from the published weights and is not the student
    summed = start["patch_embed.proj.weight"].sum(1, keepdim=True)
    assert 1e-4 < (weights["patch_embed.proj.weight"] - summed).abs().max() < 0.05
    assert (weights["norm.weight"] - state["network"]["encoder.norm.weight"]).abs().max() > 1e-4
    with safe_open(unbroken / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["identity"])["name"] == "dinov2_ct"
    values = runs.record(unbroken)[1].data.metrics
    others = {"grad_norm", "lr", "teacher_momentum", "teacher_temp", "weight_decay", "cls_effective_rank"}
    assert {*TERMS, *others, "views_per_second", "data_wait_share"} <= values.keys()
    assert values["loss"] == pytest.approx(values["dino"] + values["ibot"] + 0.1 * values["koleo"], rel=1e-5)
    assert values["kl"] == pytest.approx(values["dino"] - values["teacher_entropy"], rel=1e-4)
    assert (unbroken / "views.png").stat().st_size > 10_000


def test_a_run_that_gets_sigterm_with_all_its_processes_resumes_to_the_same_weights(runs, unbroken, tmp_path):
    out = tmp_path / "stopped"
    process = runs.start(out, num_workers=1, checkpoint_every=2)
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/step_*.pt")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGTERM)  # to the loader's worker as well, as clusters do
    said = process.communicate()[1]
    assert process.returncode == 0, said[-3000:]
    assert "Asked to stop" in said
    assert not (out / "model.safetensors").exists()
    assert "Resumed at step" in runs.run(out)
    resumed, expected = load_file(out / "model.safetensors"), load_file(unbroken / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0, msg=name)
    for term in TERMS:
        assert runs.curve(out, term) == pytest.approx(runs.curve(unbroken, term), rel=1e-6)


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    ("ranks", "knobs"),
    [(2, {"sharding": "fsdp2", "checkpoint_activations": True}), (4, {})],
    ids=["2-fsdp2", "4-ddp"],
)
def test_however_a_global_batch_is_spread_the_run_is_the_same(
    runs, unbroken, torchrun, tmp_path, ranks, knobs
):
    out = tmp_path / "spread"
    runs.run(out, torchrun(ranks), batch_size=4 // ranks, **knobs)
    assert_same_course(runs, out, unbroken)
    if "sharding" in knobs:  # a checkpoint knows neither ranks nor sharding: one process goes on from it
        for path in (out / "checkpoints").glob("step_0000000[89].pt"):
            path.unlink()
        (out / "model.safetensors").unlink()
        assert "Resumed at step 4" in runs.run(out)
        assert_same_course(runs, out, unbroken)


def assert_same_course(runs, out: Path, unbroken: Path) -> None:
    found, expected = load_file(out / "model.safetensors"), load_file(unbroken / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    for term in TERMS:
        curve = runs.curve(out, term)
        assert curve == pytest.approx(runs.curve(unbroken, term), rel=1e-3, abs=1e-5), term
        assert len(curve) == TINY["max_steps"]


def test_a_run_that_forgets_its_teacher_or_its_centres_ends_elsewhere(runs, unbroken, published, tmp_path):
    """The control of the equalities above, in this process: they could fail."""
    ends = [forgetful(runs, unbroken, published, tmp_path / what, what) for what in ("teacher", "loss", "")]
    expected = load_file(unbroken / "model.safetensors")
    apart = [max((end[name] - tensor).abs().max() for name, tensor in expected.items()) for end in ends]
    assert apart[2] == 0
    assert min(apart[:2]) > 1e-4


def forgetful(runs, unbroken: Path, published: Path, out: Path, what: str) -> dict[str, torch.Tensor]:
    """Go on from step 4 of the unbroken run with one entry of the checkpoint as it was at the start."""
    state = torch.load(unbroken / "checkpoints" / "step_00000004.pt", weights_only=True)
    state["knobs"] |= {"koleo_weight": TINY["koleo_weight"]}
    if what == "teacher":
        state["teacher"] = dict(state["network"])
    if what == "loss":
        state["loss"]["targets.centre"].zero_()
    (out / "checkpoints").mkdir(parents=True)
    torch.save(state, out / "checkpoints" / "step_00000004.pt")
    workflow(runs, out, initial_weights=str(published)).run()
    return load_file(out / "model.safetensors")


def workflow(runs, out: Path, **knobs) -> ConfigWorkflow:
    lists = {"teacher_momentum": [0.6, 0.9]}
    found = ConfigWorkflow(
        str(BUNDLE / "configs" / "train.json"),
        workflow_type="train",
        logging_file=False,
        bundle_root=str(BUNDLE),
        dataset_dir=str(runs.shards),
        output_dir=str(out),
        encoder_weights=str(out / "model.safetensors"),
        tracking_uri=f"sqlite:///{out}/mlflow.db",
        binding_knobs={},
        **TINY | lists | knobs,
    )
    hook = sys.excepthook
    found.initialize()
    sys.excepthook = hook  # the bundle sets it
    return found


def test_the_bundle_has_what_monais_training_contract_asks_for(runs, tmp_path, published):
    assert workflow(runs, tmp_path, initial_weights=str(published)).check_properties() == []


def test_eight_local_views_are_random_and_six_guided():
    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs" / "train.json")
    crop = parser.get_parsed_content("train::multi_crop")
    assert crop.num_views == (2, 14)
    assert crop.guided_probs.tolist() == [0.0] * (2 + 8) + [1.0] * 6
    assert crop.sizes_px == (224, 98)


def test_initial_weights_that_are_not_there_end_the_run_with_one_clear_line(runs, tmp_path):
    process = runs.start(tmp_path / "bad", initial_weights="nowhere.safetensors")
    said = process.communicate()[1]
    assert process.returncode != 0
    message = "initial_weights must be 'hub' or a file of timm's weights, got 'nowhere.safetensors'"
    assert message in said.strip().splitlines()[-1]
