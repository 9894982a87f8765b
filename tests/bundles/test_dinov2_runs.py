"""``python -m monai.bundle run`` on ``dinov2_ct``: tiny networks, everything else as users run it."""

import json
import os
import signal
from pathlib import Path

import pytest
import timm
import torch
from monai.bundle import ConfigParser
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
    "grad_norms_every": 1,
}
TERMS = ("loss", "dino", "ibot", "koleo", "teacher_entropy", "kl", "centre_norm", "ibot_centre_norm")
TERMS += ("grad_norm_dino", "grad_norm_ibot", "grad_norm_koleo")


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


def test_a_run_that_gets_sigterm_with_all_its_processes_resumes_to_the_same_weights(
    runs, resume, unbroken, tmp_path
):
    out = tmp_path / "stopped"
    process = runs.start_and_wait_for_a_checkpoint(out, num_workers=1, checkpoint_every=2)
    os.killpg(process.pid, signal.SIGTERM)  # to the loader's worker as well, as clusters do
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 143, said[-3000:]
    assert "Stopped: saved step" in said
    assert not (out / "model.safetensors").exists()
    newest = max(out.glob("checkpoints/step_*.pt"))
    assert_same(resume(newest, tmp_path / "resumed"), unbroken, rtol=0, atol=0)


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    ("ranks", "knobs"),
    [(2, {"sharding": "fsdp2", "checkpoint_activations": True}), (4, {})],
    ids=["2-fsdp2", "4-ddp"],
)
def test_however_a_global_batch_is_spread_the_run_is_the_same(runs, resume, unbroken, tmp_path, ranks, knobs):
    out = tmp_path / "spread"
    runs.run(out, ranks, batch_size=4 // ranks, **knobs)
    assert_same(load_file(out / "model.safetensors"), unbroken, rtol=1e-3, atol=2e-5)
    for term in TERMS:
        curve = runs.curve(out, term)
        assert curve == pytest.approx(runs.curve(unbroken, term), rel=1e-3, abs=1e-5), term
        assert len(curve) == TINY["max_steps"]
    if "sharding" in knobs:  # a checkpoint knows neither ranks nor sharding: one process goes on from it
        weights = resume(out / "checkpoints" / "step_00000004.pt", tmp_path / "resumed")
        assert_same(weights, unbroken, rtol=1e-3, atol=2e-5)


def assert_same(found: dict[str, torch.Tensor], unbroken: Path, rtol: float, atol: float) -> None:
    for name, tensor in load_file(unbroken / "model.safetensors").items():
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize(("forgotten", "least"), [("teacher", 2e-4), ("loss", 2e-6), ("ibot_loss", 2e-6)])
def test_a_run_that_forgets_its_teacher_or_a_centre_ends_elsewhere(
    resume, unbroken, tmp_path, forgotten, least
):
    """The control of the equalities above, that of a resumed run being exact: they could fail."""
    checkpoint = unbroken / "checkpoints" / "step_00000004.pt"
    found = resume(checkpoint, tmp_path / "resumed", forgotten)
    expected = load_file(unbroken / "model.safetensors")
    assert max((found[name] - tensor).abs().max() for name, tensor in expected.items()) > least


@pytest.fixture
def resume(runs, workflow):
    """Go on from a checkpoint in this process, where no process has to start; return the encoder."""

    def run(checkpoint: Path, out: Path, forgotten: str = "") -> dict[str, torch.Tensor]:
        state = torch.load(checkpoint, weights_only=True)
        state["knobs"] = {"global_batch_size": TINY["batch_size"]}  # others are read from the command line
        if forgotten == "teacher":
            state["teacher"] = state["network"]
        elif forgotten:
            state[forgotten]["targets.centre"].zero_()
        (out / "checkpoints").mkdir(parents=True)
        torch.save(state, out / "checkpoints" / checkpoint.name)
        paths = {"dataset_dir": runs.shards, "output_dir": out, "encoder_weights": out / "model.safetensors"}
        knobs = runs.knobs | {"teacher_momentum": [0.6, 0.9], "binding_knobs": {}}
        again = workflow("dinov2_ct", "train", **paths, **knobs)
        assert again.check_properties() == []
        again.run()
        return load_file(out / "model.safetensors")

    return run


def test_eight_local_views_are_random_and_six_guided():
    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs" / "train.json")
    crop = parser.get_parsed_content("train::multi_crop")
    assert crop.num_views == (2, 14)
    assert crop.guided_probs.tolist() == [0.0] * (2 + 8) + [1.0] * 6
    assert crop.sizes_px == (224, 98)
