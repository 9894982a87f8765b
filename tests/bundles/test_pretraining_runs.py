"""``python -m monai.bundle run`` on the pretraining bundle: tiny network, everything else as users run it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from mlflow.tracking import MlflowClient
from monai.bundle import ConfigWorkflow
from safetensors import safe_open
from safetensors.torch import load_file

from common.data.shards import VolumeSlices, write_shard

REPOSITORY = Path(__file__).resolve().parents[2]
BUNDLE = REPOSITORY / "bundles" / "dale_ct_2s"
TINY = {
    **{
        "global_size_px": 32,
        "local_size_px": 16,
        "img_size_px": 32,
        "patch_size_px": 8,
        "embed_dim": 24,
        "depth": 1,
    },
    **{"num_heads": 2, "layer_scale_init": 0.1, "projector_hidden_dim": 16, "projection_dim": 11},
    **{"num_directions": 32, "batch_size": 4, "max_steps": 9, "warmup_steps": 2, "amp_dtype": "float32"},
    **{"num_workers": 0, "log_every": 1, "checkpoint_every": 2, "num_local": 3},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Seven little volumes of noise with masks, two of them ReX-annotated."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)

    def volume(index: int, rex: bool) -> VolumeSlices:
        slices = 6 + index
        return VolumeSlices(
            volume=f"train_{index}_a_1",
            ct=rng.integers(-1000, 1000, (slices, 40, 48)).astype(np.int16),
            ts=rng.integers(0, 118, (slices, 128, 128)).astype(np.uint8),
            rex=(rng.random((slices, 128, 128)) < 0.01).astype(np.uint16) * 5 if rex else None,
            spacing_mm=(0.8, 0.8, 3.0),
            original_shape=(48, 40, slices),
            original_axcodes="LPS",
            labels={"Lung nodule": index % 2},
            split="train",
        )

    write_shard(folder / "train-000000.tar", [volume(index, rex=False) for index in range(5)])
    write_shard(folder / "train-rex-000000.tar", [volume(index, rex=True) for index in range(5, 7)])
    return folder


def command(shards: Path, out: Path, launcher: tuple[str, ...] = (), **knobs) -> list[str]:
    paths = {"bundle_root": BUNDLE, "dataset_dir": shards, "output_dir": out, "run_name": out.name}
    paths |= {
        "encoder_weights": out / "model.safetensors",
        "tracking_uri": f"sqlite:///{out.parent}/mlflow.db",
    }
    words = [word for name, value in {**paths, **TINY, **knobs}.items() for word in (f"--{name}", str(value))]
    config = str(BUNDLE / "configs" / "train.json")
    return [sys.executable, *launcher, "-m", "monai.bundle", "run", "--config_file", config, *words]


def run(shards: Path, out: Path, launcher: tuple[str, ...] = (), **knobs) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # run from another folder: the bundle finds its code by itself
    return subprocess.run(
        command(shards, out, launcher, **knobs),
        cwd=out.parent,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def unbroken(shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    result = run(shards, out)
    assert result.returncode == 0, result.stderr[-3000:]
    return out


def record(out: Path, name: str):
    client = MlflowClient(f"sqlite:///{out.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("pretraining")
    return client, next(r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name == name)


def test_a_run_leaves_its_encoder_a_picture_of_its_views_and_a_record(unbroken):
    weights = load_file(unbroken / "model.safetensors")
    assert weights["patch_embed.proj.weight"].shape == (24, 1, 8, 8)
    assert (unbroken / "views.png").stat().st_size > 10_000
    with safe_open(unbroken / "model.safetensors", framework="pt") as file:
        identity = json.loads(file.metadata()["identity"])
    assert identity["hu_window"] == [-997.0, 888.0, -142.39, 360.97]
    assert identity["slice_axes"] == "yx"
    client, run_record = record(unbroken, "unbroken")
    assert run_record.info.status == "FINISHED"
    assert run_record.data.params["slab_mm"] == "12.0"
    assert run_record.data.params["embed_dim"] == "24"  # what ran, not what the bundle's file says
    terms = {"loss", "lejepa", "invariance", "sigreg", "aux", "aux_ts_cls", "aux_ts_patch", "aux_rex_cls"}
    others = {"aux_rex_patch", "lr", "grad_norm", "views_per_second", "data_wait_share", "cls_effective_rank"}
    others |= {"projection_ks"}
    assert terms | others <= run_record.data.metrics.keys()
    values = run_record.data.metrics
    assert values["lejepa"] == pytest.approx(0.98 * values["invariance"] + 0.02 * values["sigreg"], rel=1e-5)
    quarters = [values[f"aux_{term}"] for term in ("ts_cls", "ts_patch", "rex_cls", "rex_patch")]
    assert values["aux"] == pytest.approx(sum(quarters) / 4, rel=1e-5)
    assert values["loss"] == pytest.approx(values["lejepa"] + 0.1 * values["aux"], rel=1e-5)
    assert {"executed_config.json", "views.png", "checkpoints"} <= {
        item.path for item in client.list_artifacts(run_record.info.run_id)
    }


def test_a_run_killed_at_any_moment_resumes_to_the_same_weights(shards, unbroken, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen(
        command(shards, out),
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/step_*.pt")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "model.safetensors").exists()
    result = run(shards, out)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Resumed at step" in result.stderr
    resumed, expected = load_file(out / "model.safetensors"), load_file(unbroken / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0, msg=name)
    assert record(out, "killed")[1].info.status == "FINISHED"


def test_a_run_of_another_seed_ends_elsewhere(shards, unbroken, tmp_path):
    """The control of the two equalities beside it: they could fail."""
    assert run(shards, tmp_path / "other", seed=43).returncode == 0
    other, expected = (
        load_file(tmp_path / "other" / "model.safetensors"),
        load_file(unbroken / "model.safetensors"),
    )
    assert (other["cls_token"] - expected["cls_token"]).abs().max() > 1e-3


def torchrun(ranks: int) -> tuple[str, ...]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ("--master_addr=127.0.0.1", f"--master_port={port}")
    return ("-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *where)


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    ("ranks", "knobs"),
    [
        (1, {"micro_batch_size": 3}),
        (2, {}),
        (2, {"micro_batch_size": 1, "sharding": "fsdp2", "checkpoint_activations": True}),
        (4, {}),
        (4, {"sharding": "fsdp2"}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(map(str, value.values())),
)
def test_however_a_global_batch_is_spread_the_run_is_the_same(shards, unbroken, tmp_path, ranks, knobs):
    launcher = torchrun(ranks) if ranks > 1 else ()
    result = run(shards, tmp_path / "spread", launcher, batch_size=4 // ranks, **knobs)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_course(tmp_path / "spread", unbroken)


def assert_same_course(out: Path, unbroken: Path) -> None:
    """Weights and curves equal those of one process; another seed's differ by 1e-3, see the control."""
    found, expected = load_file(out / "model.safetensors"), load_file(unbroken / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    (client, run_record), (client_of_one, record_of_one) = record(out, out.name), record(unbroken, "unbroken")
    for term in ("loss", "sigreg", "aux_rex_patch", "grad_norm"):
        curves = [
            [metric.value for metric in of.get_metric_history(which.info.run_id, term)]
            for of, which in ((client, run_record), (client_of_one, record_of_one))
        ]
        assert curves[0] == pytest.approx(curves[1], rel=1e-3)
        assert len(curves[0]) == TINY["max_steps"]


@pytest.mark.two_ranks
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "sharding"), [(2, "ddp"), (2, "fsdp2")])
def test_ranks_killed_at_any_moment_resume_to_the_run_of_one_process(
    shards, unbroken, tmp_path, ranks, sharding
):
    out, knobs = tmp_path / "killed", {"batch_size": 4 // ranks, "sharding": sharding}
    process = subprocess.Popen(
        command(shards, out, torchrun(ranks), **knobs),
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 180
    while not list(out.glob("checkpoints/step_*.pt")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    # torchrun puts the ranks into sessions of their own: they would outlive it
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in everyone:
        member.suspend()
    for member in everyone:
        member.kill()
    psutil.wait_procs(everyone)
    process.wait()
    assert not (out / "model.safetensors").exists()
    shutil.copytree(out, tmp_path / "forgetful")
    # and on another number of ranks, with the other sharding: a checkpoint knows neither
    result = (
        run(shards, out, batch_size=4) if sharding == "fsdp2" else run(shards, out, torchrun(ranks), **knobs)
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Resumed at step" in result.stderr
    assert_same_course(out, unbroken)
    # the control: a run whose optimizer starts afresh ends elsewhere
    newest = max((tmp_path / "forgetful").glob("checkpoints/step_*.pt"))
    state = torch.load(newest, weights_only=True)
    for memory in state["optimizer"]["state"].values():
        memory["exp_avg"].zero_()
        memory["exp_avg_sq"].zero_()
    torch.save(state, newest)
    result = run(shards, tmp_path / "forgetful", batch_size=4)
    assert result.returncode == 0, result.stderr[-3000:]
    forgetful = load_file(tmp_path / "forgetful" / "model.safetensors")
    expected = load_file(unbroken / "model.safetensors")
    assert max((forgetful[name] - tensor).abs().max() for name, tensor in expected.items()) > 1e-3


@pytest.mark.two_ranks
def test_ranks_asked_to_stop_save_the_same_step_and_end(shards, tmp_path):
    out = tmp_path / "asked"
    knobs = {"batch_size": 2, "max_steps": 100_000, "warmup_steps": 2, "checkpoint_every": 5}
    process = subprocess.Popen(
        command(shards, out, torchrun(2), **knobs),
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 180
    while not list(out.glob("checkpoints/step_*.pt")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on, as srun does
    _, log = process.communicate(timeout=120)
    saved = re.findall(r"Asked to stop: saving step (\d+) and ending", log)
    assert len(saved) == 2
    assert saved[0] == saved[1]
    newest = max(out.glob("checkpoints/step_*.pt"))
    assert newest.name == f"step_{int(saved[0]):08d}.pt"
    assert torch.load(newest, weights_only=True)["iteration"] == int(saved[0])
    assert record(out, "asked")[1].info.status == "KILLED"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"slab_mn": 5},
            "knob must be one the bundle defines, got 'slab_mn' in the command line. Did you mean 'slab_mm'",
        ),
        ({"global_size_px": 33}, "global_size_px must be a multiple of patch_size_px, got 33 and 8. Use 32"),
        ({"dataset_dir": "nowhere"}, "nowhere"),
        ({"seed": 7}, "knobs must be those of checkpoint"),
    ],
    ids=["unknown knob", "patch size", "no shards", "another run's folder"],
)
def test_a_bad_setting_ends_at_once_with_one_clear_line(shards, unbroken, tmp_path, knobs, message):
    out = unbroken if "seed" in knobs else tmp_path / "bad"
    result = run(shards, out, **knobs)
    assert result.returncode != 0
    assert message in result.stderr.strip().splitlines()[-1]


def test_the_bundle_has_what_monais_training_contract_asks_for(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the bundle sets it, and monkeypatch puts it back
    workflow = ConfigWorkflow(
        str(BUNDLE / "configs" / "train.json"),
        workflow_type="train",
        logging_file=False,
        bundle_root=str(BUNDLE),
        dataset_dir=str(shards),
        output_dir=str(tmp_path),
        **TINY,
    )
    workflow.initialize()
    assert workflow.check_properties() == []


@pytest.mark.real_ct
def test_real_cts_with_their_real_masks_train_a_few_steps(real_ct_dir, tmp_path):
    pairs = {
        "totalseg_example_ct_sm_3mm": "totalseg_example_sm_seg117_3mm",
        "totalseg_dicom_ct_native": "totalseg_dicom_seg117_native",  # stored LAS, its CT LPS
    }
    for ct, mask in pairs.items():
        for folder, name in (("ct", ct), ("masks", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{ct}.nii.gz").symlink_to(real_ct_dir / f"{name}.nii.gz")
    prepare = ["data_prep", "nifti", "ct", "--out", "shards", "--masks", "masks"]
    prepared = subprocess.run(
        [sys.executable, "-m", *prepare],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert prepared.returncode == 0, prepared.stderr
    result = run(tmp_path / "shards", tmp_path / "out", max_steps=3)
    assert result.returncode == 0, result.stderr[-3000:]
    values = record(tmp_path / "out", "out")[1].data.metrics
    assert values["aux_ts_patch"] > 0
    assert values["aux_rex_patch"] == 0  # none of the scans is annotated
    assert values["loss"] > 0
