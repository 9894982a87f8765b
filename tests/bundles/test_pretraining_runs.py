"""``python -m monai.bundle run`` on the pretraining bundle: tiny network, everything else as users run it."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.bundles.conftest import TINY, assert_same_weights

REPOSITORY = Path(__file__).resolve().parents[2]
BUNDLE = REPOSITORY / "bundles" / "dale_ct_2s"


@pytest.fixture(scope="module")
def runs(training_runs):
    return training_runs("dale_ct_2s", TINY | {"grad_norms_every": 1})


@pytest.fixture(scope="module")
def unbroken(runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    runs.run(out)
    return out


def test_a_run_leaves_its_encoder_a_picture_of_its_views_and_a_record(runs, unbroken):
    weights = load_file(unbroken / "model.safetensors")
    assert weights["patch_embed.proj.weight"].shape == (24, 1, 8, 8)
    assert (unbroken / "views.png").stat().st_size > 10_000
    with safe_open(unbroken / "model.safetensors", framework="pt") as file:
        identity = json.loads(file.metadata()["identity"])
    assert identity["hu_window"] == [-997.0, 888.0, -142.39, 360.97]
    assert identity["slice_axes"] == "yx"
    client, run_record = runs.record(unbroken)
    assert run_record.info.status == "FINISHED"
    assert run_record.data.params["slab_mm"] == "12.0"
    assert run_record.data.params["embed_dim"] == "24"  # what ran, not what the bundle's file says
    terms = {"loss", "lejepa", "invariance", "sigreg", "aux", "aux_ts_cls", "aux_ts_patch", "aux_rex_cls"}
    others = {"aux_rex_patch", "lr", "grad_norm", "views_per_second", "data_wait_share", "cls_effective_rank"}
    others |= {"projection_ks", "grad_norm_invariance", "grad_norm_sigreg", "grad_norm_aux_rex_cls"}
    assert terms | others <= run_record.data.metrics.keys()
    values = run_record.data.metrics
    assert values["lejepa"] == pytest.approx(0.98 * values["invariance"] + 0.02 * values["sigreg"], rel=1e-5)
    quarters = [values[f"aux_{term}"] for term in ("ts_cls", "ts_patch", "rex_cls", "rex_patch")]
    assert values["aux"] == pytest.approx(sum(quarters) / 4, rel=1e-5)
    assert values["loss"] == pytest.approx(values["lejepa"] + 0.1 * values["aux"], rel=1e-5)
    files = {item.path for item in client.list_artifacts(run_record.info.run_id)}
    assert files == {"executed_config.json", "views.png"}  # checkpoints only where asked for
    (read,) = run_record.inputs.dataset_inputs
    assert read.dataset.name.endswith(f"/{runs.shards.name}")


def test_a_run_killed_at_any_moment_resumes_to_the_same_weights(runs, unbroken, tmp_path):
    out = tmp_path / "killed"
    process = runs.start_and_wait_for_a_checkpoint(out)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "model.safetensors").exists()
    said = runs.run(out)
    assert "Resumed at step" in said
    assert "Done: encoder in" in said
    assert_same_weights(out, unbroken)
    assert runs.record(out)[1].info.status == "FINISHED"


def test_a_folder_in_use_is_refused_and_ctrl_c_saves_the_step_and_says_one_line(runs, tmp_path):
    out = tmp_path / "stopped"
    process = runs.start_and_wait_for_a_checkpoint(out, max_steps=100_000, num_workers=1)
    status, said = runs.result(out)
    assert status == 1
    assert f"'{out}' is in use by process {process.pid} " in said
    assert "Traceback" not in said
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the loader's worker as well
    _, log = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in log
    (step,) = re.findall(r"Stopped: saved step (\d+)", log)
    assert torch.load(max(out.glob("checkpoints/step_*.pt")), weights_only=True)["iteration"] == int(step)
    record = runs.record(out)[1]
    assert record.info.status == "KILLED"
    assert "error" not in record.data.tags


def test_a_run_of_another_seed_ends_elsewhere(runs, unbroken, tmp_path):
    """The control of the two equalities beside it: they could fail."""
    runs.run(tmp_path / "other", seed=43)
    other, expected = (
        load_file(tmp_path / "other" / "model.safetensors"),
        load_file(unbroken / "model.safetensors"),
    )
    assert (other["cls_token"] - expected["cls_token"]).abs().max() > 1e-3


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    ("ranks", "knobs"),
    [
        (1, {"micro_batch_size": 3}),
        (2, {}),
        (2, {"micro_batch_size": 1, "sharding": "fsdp2", "checkpoint_activations": True}),
        (4, {}),
        (4, {"sharding": "fsdp2", "checkpoint_every": 3}),  # which saves the last step as any other
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(map(str, value.values())),
)
def test_however_a_global_batch_is_spread_the_run_is_the_same(runs, unbroken, tmp_path, ranks, knobs):
    runs.run(tmp_path / "spread", ranks, batch_size=4 // ranks, **knobs)
    assert_same_course(runs, tmp_path / "spread", unbroken)


def assert_same_course(runs, out: Path, unbroken: Path) -> None:
    """Weights and curves equal those of one process; another seed's differ by 1e-3, see the control."""
    assert_same_weights(out, unbroken, rtol=1e-3, atol=2e-5)
    for term in ("loss", "sigreg", "aux_rex_patch", "grad_norm", "grad_norm_sigreg", "grad_norm_aux_ts_cls"):
        curve = runs.curve(out, term)
        assert curve == pytest.approx(runs.curve(unbroken, term), rel=1e-3)
        assert len(curve) == TINY["max_steps"]


@pytest.mark.two_ranks
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "sharding"), [(2, "ddp"), (2, "fsdp2")])
def test_ranks_killed_at_any_moment_resume_to_the_run_of_one_process(
    runs, unbroken, tmp_path, ranks, sharding
):
    out, knobs = tmp_path / "killed", {"batch_size": 4 // ranks, "sharding": sharding}
    process = runs.start_and_wait_for_a_checkpoint(out, ranks, **knobs)
    # torchrun puts the ranks into sessions of their own: they would outlive it
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in everyone:
        member.suspend()
    for member in everyone:
        member.kill()
    psutil.wait_procs(everyone)
    process.communicate()
    assert not (out / "model.safetensors").exists()
    shutil.copytree(out, tmp_path / "forgetful")
    # and on another number of ranks, with the other sharding: a checkpoint knows neither
    said = runs.run(out) if sharding == "fsdp2" else runs.run(out, ranks, **knobs)
    assert "Resumed at step" in said
    assert_same_course(runs, out, unbroken)
    # the control: a run whose optimizer starts afresh ends elsewhere
    newest = max((tmp_path / "forgetful").glob("checkpoints/step_*.pt"))
    state = torch.load(newest, weights_only=True)
    for memory in state["optimizer"]["state"].values():
        memory["exp_avg"].zero_()
        memory["exp_avg_sq"].zero_()
    torch.save(state, newest)
    runs.run(tmp_path / "forgetful")
    forgetful = load_file(tmp_path / "forgetful" / "model.safetensors")
    expected = load_file(unbroken / "model.safetensors")
    assert max((forgetful[name] - tensor).abs().max() for name, tensor in expected.items()) > 1e-3


@pytest.mark.two_ranks
def test_ranks_asked_to_stop_save_the_same_step_and_end(runs, tmp_path):
    out = tmp_path / "asked"
    knobs = {"batch_size": 2, "max_steps": 100_000, "warmup_steps": 2, "checkpoint_every": 5}
    process = runs.start_and_wait_for_a_checkpoint(out, 2, **knobs)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on, as srun does
    _, log = process.communicate(timeout=300)
    saved = re.findall(r"Stopped: saved step (\d+)", log)
    assert len(saved) == 1  # rank 0 says it
    newest = max(out.glob("checkpoints/step_*.pt"))
    assert newest.name == f"step_{int(saved[0]):08d}.pt"
    assert torch.load(newest, weights_only=True)["iteration"] == int(saved[0])
    assert runs.record(out)[1].info.status == "KILLED"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"slab_mn": 5}, "'slab_mn' in the command line. Did you mean 'slab_mm'"),
        ({"global_size_px": 33}, "global_size_px must be a multiple of patch_size_px, got 33 and 8. Use 32"),
        ({"dataset_dir": "nowhere"}, "nowhere"),
        ({"seed": 7}, "was made with seed 42, now 7"),
    ],
    ids=["unknown knob", "patch size", "no shards", "another run's folder"],
)
def test_a_bad_setting_ends_at_once_with_one_clear_line(runs, unbroken, tmp_path, knobs, message):
    status, said = runs.result(unbroken if "seed" in knobs else tmp_path / "bad", **knobs)
    assert status != 0
    assert message in said.strip().splitlines()[-1]


def test_the_bundle_has_what_monais_training_contract_asks_for(workflow, noise_shards):
    assert workflow("dale_ct_2s", "train", dataset_dir=noise_shards, **TINY).check_properties() == []


@pytest.mark.real_ct
def test_real_cts_with_their_real_masks_train_a_few_steps(real_ct_dir, runs, python_m, tmp_path):
    pairs = {
        "totalseg_example_ct_sm_3mm": "totalseg_example_sm_seg117_3mm",
        "totalseg_dicom_ct_native": "totalseg_dicom_seg117_native",  # stored LAS, its CT LPS
    }
    for ct, mask in pairs.items():
        for folder, name in (("ct", ct), ("masks", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{ct}.nii.gz").symlink_to(real_ct_dir / f"{name}.nii.gz")
    prepare = ["data_prep", "nifti", "ct", "--out", "shards", "--masks", "masks"]
    prepared = python_m(prepare, tmp_path, PYTHONPATH=str(REPOSITORY))
    assert prepared.returncode == 0, prepared.stderr
    runs.run(tmp_path / "out", dataset_dir=tmp_path / "shards", max_steps=3)
    values = runs.record(tmp_path / "out")[1].data.metrics
    assert values["aux_ts_patch"] > 0
    assert values["aux_rex_patch"] == 0  # none of the scans is annotated
    assert values["loss"] > 0
