"""Cohorts are written by processes of their own here, which are stopped and killed."""

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest
from distributed import Client

from common.ct.geometry import axial_slices
from common.ct.npz import npz_affine
from common.ct.rejection import EXCLUDED, RejectedVolume
from common.shards.shards import PARTS, ShardSet
from data_prep.cluster import dask_client
from data_prep.commands.prepare import finish
from data_prep.phantom.files import npz_bytes, rad_chestct_array
from data_prep.phantom.population import roster
from data_prep.phantom.scan import Volume, render
from data_prep.shards.write import Summary, write_shards
from data_prep.sources.folders import find_volumes
from tests.data_prep.conftest import cells_of, checksums

REPOSITORY = Path(__file__).resolve().parents[3]
NUM_VOLUMES = 24
SHAPE_XYZ = (19, 17, 5)
Save = Callable[[Path, np.ndarray, np.ndarray], Path]


# What every Python process of the command runs first: a worker waits in the middle of its third volume, whose
# tar has some bytes but no name yet, until the test lets it go on.
HELD = """
import os, tarfile, time
from pathlib import Path

ADD_FILE, OPENED = tarfile.TarFile.addfile, []

def add_file(tar, *args):
    ADD_FILE(tar, *args)
    tar.fileobj.flush()
    if tar not in OPENED:
        OPENED.append(tar)
    if len(OPENED) == 3:
        held = Path(os.environ["HELD"])
        (held / str(os.getpid())).touch()
        while not (held / "go on").exists():
            time.sleep(0.01)

tarfile.TarFile.addfile = add_file
"""


@pytest.fixture
def scans(tmp_path: Path, save_nifti: Save, tiny: Any) -> Path:
    """Scans in a folder whose name needs quotes."""
    rng = np.random.default_rng(0)
    for number in range(NUM_VOLUMES):
        hu = rng.integers(-1000, 1000, (64, 63, 30)).astype(np.int16)
        save_nifti(tmp_path / "my scäns" / f"scan-{number:02d}.nii.gz", hu, tiny.affine())
    return tmp_path / "my scäns"


def write(scans: Path, out: Path, client: Client, **options: Any) -> Summary:
    sources, rejected = find_volumes(scans, "train", None)
    return write_shards(sources, rejected, out, "train", client, slices_per_shard=240, **options)


def start_and_freeze(scans: Path, out: Path, held: Path) -> subprocess.Popen:
    """Start the command as a terminal would; freeze it once both workers have a volume half written."""
    (held / "site").mkdir(parents=True)
    (held / "site" / "sitecustomize.py").write_text(HELD, encoding="utf-8")
    command = [sys.executable, "-m", "data_prep", "nifti", str(scans), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--workers", "2", "--slices-per-shard", "240"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(held / "site"), "HELD": str(held)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len([path for path in held.iterdir() if path.name.isdigit()]) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGSTOP)
    (held / "go on").touch()
    assert len(half_written(out)) == 2
    return process


def half_written(out: Path) -> list[Path]:
    """Tars in the making, which already have some bytes."""
    return [path for path in (out / PARTS).glob("*.tar.partial") if path.stat().st_size]


def test_a_run_that_was_stopped_and_killed_goes_on_to_the_same_bytes(scans, tmp_path, dask) -> None:
    whole = write(scans, tmp_path / "whole", dask)
    out = tmp_path / "out"

    for number in (signal.SIGINT, signal.SIGTERM):
        process = start_and_freeze(scans, out, tmp_path / f"held-{number}")
        os.killpg(process.pid, number)  # as Ctrl-C does: to the command and its workers
        os.killpg(process.pid, signal.SIGCONT)
        printed = process.communicate(timeout=300)[1]
        assert process.returncode == 128 + number, printed
        assert printed.rstrip().endswith("Stopped. Run the same command again to resume.")

    process = start_and_freeze(scans, out, tmp_path / "held")
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    os.killpg(process.pid, signal.SIGCONT)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert psutil.wait_procs(workers, timeout=300)[1] == []  # workers do not outlive their client

    assert not (out / "manifest.csv").exists()
    summary = write(scans, out, dask)
    assert summary.num_resumed >= 9
    assert summary.num_done == NUM_VOLUMES - summary.num_resumed
    assert summary[:6] == whole[:6]
    assert checksums(out) == checksums(tmp_path / "whole")


def test_workers_that_joined_a_scheduler_share_a_run_and_one_may_be_lost(
    scans, tmp_path, dask, dask_scheduler, dask_command
) -> None:
    """Two processes as two machines would run them; then the nanny of one is killed, and it with her."""
    write(scans, tmp_path / "whole", dask)
    address, _ = dask_scheduler
    nannies = [dask_command("worker", address, "--host", "127.0.0.1", "--nthreads", "1") for _ in range(2)]
    lost: list[int] = []

    def kill_a_nanny(stage: str, done: int, total: int) -> None:
        if stage == "Writing volumes" and done == 12:
            nannies[0].kill()
            lost.append(done)

    with dask_client(address) as client:
        client.wait_for_workers(2, timeout=300)
        client.run(importlib.import_module, "data_prep.shards.write")  # that neither is still importing
        summary = write(scans, tmp_path / "out", client, progress=kill_a_nanny)
    assert lost == [12]
    assert summary.num_workers == 2
    assert (summary.num_volumes, summary.rejected) == (NUM_VOLUMES, ())
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")


@pytest.mark.parametrize(("allowed", "status"), [(None, 1), (0.2, 1), (0.25, 0), (1, 0)])
def test_too_many_rejected_volumes_are_a_failure(allowed, status, tiny, tmp_path, invoke) -> None:
    for n in range(1, 5):
        tiny.add(f"train_{n}_a_1")
    tiny.path("train_2_a_1", "train").write_bytes(b"<html>")
    options = [] if allowed is None else ["--max-rejected", allowed]
    answer = invoke("ct-rate", "--root", tiny.root, "--split", "train", "--out", tmp_path / "out", *options)
    assert answer.exit_code == status
    assert re.search(r"left out: unreadable +│ +1", answer.stdout)
    assert "rejected.csv" in answer.stderr
    limit = "1.00%" if allowed is None else f"{allowed:.2%}"
    said = re.search(rf"25\.00% .*\(1\).*{limit}.*--max-rejected", answer.stderr)
    assert (said is not None) == (status == 1)
    assert len(ShardSet(tmp_path / "out", "train").volumes) == 3


def test_the_summary_says_what_was_done_and_how_fast(tmp_path, monkeypatch, capsys) -> None:
    """Figures by hand: 30 volumes in 45 s are 40 a minute; 123.4 MB of 5 volumes are 24.7 each."""
    rejected = (RejectedVolume("a", "mask", "x"), RejectedVolume("b", EXCLUDED, "y"))
    summary = Summary(
        num_volumes=5,
        num_slices=1234,
        num_ts=4,
        num_rex=3,
        num_doubtful=0,
        num_shards=2,
        num_bytes=123_400_000,
        num_resumed=17,
        num_done=30,
        num_resumed_shards=1,
        rejected=rejected,
        num_workers=8,
        peak_worker_bytes=1_500_000_000,
        seconds=45.0,
    )
    monkeypatch.setenv("COLUMNS", "100")
    finish(summary, tmp_path, max_rejected=0.5)
    rows = dict(re.findall(r"│ (.+?) +│ +(\S+) │", capsys.readouterr().out))
    assert rows == {
        "volumes": "5",
        "with TotalSegmentator ids": "4",
        "annotated by ReXGroundingCT": "3",
        "slices": "1,234",
        "shards": "2",
        "MB": "123.4",
        "MB per volume": "24.7",
        "done before: volumes": "17",
        "done before: shards": "1",
        "volumes per minute": "40.0",
        "workers": "8",
        "peak memory of a worker, MB": "1,500",
        "left out: mask": "1",
        f"left out: {EXCLUDED}": "1",
    }
    finish(summary._replace(num_workers=0, rejected=()), tmp_path, max_rejected=1)
    assert "per minute" not in capsys.readouterr().out


def test_ct_rate_is_written_with_all_its_masks(tiny, tmp_path, write_rex, save_nifti, invoke) -> None:
    for volume in ("train_1_a_1", "train_2_a_1", "train_3_a_1", "train_4_a_1"):
        tiny.add(volume)
    tiny.rows.pop()  # without metadata, but not among the first two
    tiny.write_tables("train")
    save_nifti(tiny.ts_path("train_1_a_1", "train"), np.ones(SHAPE_XYZ, np.uint8), tiny.affine())
    masks = np.ones((1, *SHAPE_XYZ), np.uint8)
    listing, folder = write_rex({"train_2_a_1": masks}, {"train_2_a_1": ["2d"]}, tiny.affine())
    answer = invoke(
        *("ct-rate", "--root", tiny.root, "--split", "train", "--out", tmp_path / "out", "--limit", 2),
        *("--rexgroundingct", listing, "--rexgroundingct-masks", folder, "--slices-per-shard", 5),
    )
    assert answer.exit_code == 0, answer.output
    assert len((tmp_path / "out" / "rejected.csv").read_text().splitlines()) == 1
    entries = {entry.volume: entry for entry in ShardSet(tmp_path / "out", "train").volumes}
    assert list(entries) == ["train_1_a_1", "train_2_a_1"]
    assert entries["train_1_a_1"].has_ts
    assert entries["train_2_a_1"].has_rex
    for line in (r"volumes +│ +2", r"slices +│ +10", r"TotalSegmentator ids +│ +1", r"ReXGroundingCT +│ +1"):
        assert re.search(line, answer.stdout), answer.stdout


@pytest.mark.parametrize(("form", "status"), [("auto", 0), ("v1", 0), ("v2", 1)])
def test_the_form_is_the_users_to_state(form, status, tiny_v1, tmp_path, invoke) -> None:
    tiny_v1.add("train_1_a_1")
    answer = invoke(
        "ct-rate", "--root", tiny_v1.root, "--split", "train", "--out", tmp_path / "out", "--form", form
    )
    assert answer.exit_code == status, answer.output
    if status == 0:
        slices = ShardSet(tmp_path / "out", "train").read_slab(0, 3, 1).read_ct(0)
        np.testing.assert_array_equal(slices, tiny_v1.hu("train_1_a_1")[:, :, 3].T)
    else:
        assert re.search(r"left out: v1 or v2 +│ +1", answer.stdout)


@pytest.fixture(scope="module")
def phantom() -> Volume:
    """A rendered chest, clipped as RAD-ChestCT is, on cubes of 0.8 mm, all axes of other sizes."""
    drawn = render(roster(1, seed=2)[0], "b", 40, (8.0, 8.0), {})
    hu = drawn.hu[:, :-3].clip(-1000, 1000)
    assert len({*hu.shape}) == 3
    return drawn._replace(hu=hu, protocol=drawn.protocol._replace(pixel_mm=0.8, slice_mm=0.8))


def slices(folder: Path, split: str) -> np.ndarray:
    shards = ShardSet(folder, split)
    return np.stack([shards.read_slab(0, z, 1).read_ct(0) for z in range(shards.volumes[0].num_slices)])


def test_a_scan_stored_both_ways_gives_the_same_shards(phantom, tmp_path, invoke, save_nifti) -> None:
    """Once as NIfTI in LPS, once as npz in (I, P, L), with a label map in an orientation of its own."""
    for folder in ("nifti", "rad", "masks"):
        (tmp_path / folder).mkdir()
    affine = np.diag([-0.8, -0.8, 0.8, 1])
    save_nifti(tmp_path / "nifti" / "trn00001.nii.gz", phantom.hu.T, affine)
    (tmp_path / "rad" / "trn00001.npz").write_bytes(npz_bytes(rad_chestct_array(phantom, 0.8)))
    ids = phantom.ts[:, :-3].astype(np.uint8)
    on_npz = nib.Nifti1Image(ids[::-1], npz_affine())
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(on_npz.affine), nib.orientations.axcodes2ornt("RAS")
    )
    nib.save(on_npz.as_reoriented(turn), tmp_path / "masks" / "trn00001.nii.gz")
    for arguments in (
        ("nifti", tmp_path / "nifti", "--out", tmp_path / "a", "--split", "valid"),
        ("rad-chestct", "--root", tmp_path / "rad", "--split", "train", "--out", tmp_path / "b")
        + ("--totalsegmentator", tmp_path / "masks"),
    ):
        answer = invoke(*arguments)
        assert answer.exit_code == 0, answer.output
    np.testing.assert_array_equal(slices(tmp_path / "a", "valid"), phantom.hu)
    np.testing.assert_array_equal(slices(tmp_path / "b", "train"), phantom.hu)
    shards = ShardSet(tmp_path / "b", "train")
    assert shards.volumes[0].spacing_mm == pytest.approx((0.8, 0.8, 0.8))
    np.testing.assert_array_equal(shards.read_slab(0, 0, len(ids)).read_ts(), cells_of(ids))


def hu(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 600, (4, 17, 19)).astype(np.int16)


def test_a_tree_of_series_is_written_with_label_maps(tmp_path, invoke, write_series, save_nifti) -> None:
    write_series(tmp_path / "in" / "study ä" / "1", hu(1), series="1.2.3")
    write_series(tmp_path / "in" / "study ä" / "2", hu(2), (-1, 0, 0, 0, -1, 0), series="1.2.4")
    (tmp_path / "in" / "DICOMDIR").write_bytes(b"no preamble")
    # The label map of the prone series, on its CT's voxels and in another order of axes.
    ids = np.arange(4 * 17 * 19).reshape(4, 17, 19).astype(np.uint8) % 118
    affine = np.array([[0.7, 0, 0, 5], [0, 0.8, 0, 7], [0, 0, 1.5, -100], [0, 0, 0, 1]])
    image = nib.Nifti1Image(ids.T, affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt("SPL"))
    turned = image.as_reoriented(turn)
    save_nifti(tmp_path / "masks" / "1.2.4.nii.gz", np.asarray(turned.dataobj), turned.affine)
    answer = invoke(
        "dicom", tmp_path / "in", "--out", tmp_path / "out", "--split", "valid", "--masks", tmp_path / "masks"
    )
    assert answer.exit_code == 0, answer.output
    shards = ShardSet(tmp_path / "out", "valid")
    assert [(entry.volume, entry.source, entry.has_ts) for entry in shards.volumes] == [
        ("1_2_3", "study ä/1", False),
        ("1_2_4", "study ä/2", True),
    ]
    for volume_id, expected in enumerate((hu(1), hu(2)[:, ::-1, ::-1])):
        slices = np.stack([shards.read_slab(volume_id, z, 1).read_ct(0) for z in range(4)])
        np.testing.assert_array_equal(slices, expected)
        assert shards.volumes[volume_id].spacing_mm == pytest.approx((0.7, 0.8, 1.5))
        assert re.fullmatch("[0-9a-f]{64}", shards.volumes[volume_id].source_sha256)
    np.testing.assert_array_equal(shards.read_slab(1, 0, 4).read_ts(), cells_of(ids[:, ::-1, ::-1]))


@pytest.mark.real_ct
def test_a_real_series_and_its_label_map_become_the_shard_of_their_nifti(
    real_ct_dir, tmp_path, invoke
) -> None:
    """The label map is stored as LAS and lies on the series by its affine alone."""
    links = {"dicom": "series", "nifti": "ct_native.nii.gz", "masks": "seg117_native.nii.gz"}
    for folder, name in links.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).symlink_to(real_ct_dir / f"totalseg_dicom_{name}")
    answer = invoke("dicom", real_ct_dir / "totalseg_dicom_series", "--out", tmp_path / "probe")
    assert answer.exit_code == 0, answer.output
    volume = ShardSet(tmp_path / "probe", "train").volumes[0].volume
    (tmp_path / "masks" / links["masks"]).rename(tmp_path / "masks" / f"{volume}.nii.gz")
    (tmp_path / "nifti" / links["nifti"]).rename(tmp_path / "nifti" / f"{volume}.nii.gz")
    for command, folder in (("dicom", real_ct_dir / "totalseg_dicom_series"), ("nifti", tmp_path / "nifti")):
        answer = invoke(command, folder, "--out", tmp_path / "out" / command, "--masks", tmp_path / "masks")
        assert answer.exit_code == 0, answer.output
    a, b = (ShardSet(tmp_path / "out" / command, "train") for command in ("dicom", "nifti"))
    np.testing.assert_array_equal(a.read_slab(0, 0, 20).read_ts(), b.read_slab(0, 0, 20).read_ts())
    nifti = nib.load(real_ct_dir / "totalseg_dicom_ct_native.nii.gz")
    expected, _ = axial_slices(np.asarray(nifti.dataobj), nifti.affine)
    for z in range(20):
        np.testing.assert_array_equal(a.read_slab(0, z, 1).read_ct(0), expected[z])
        np.testing.assert_array_equal(b.read_slab(0, z, 1).read_ct(0), expected[z])
