import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from common.data.shards import ShardSet
from data_prep import __main__ as module

SHAPE_XYZ = (19, 17, 5)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(module.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize("command", ["ct-rate", "nifti", "phantom"])
def test_every_command_explains_itself(command: str) -> None:
    answer = invoke(command, "--help")
    assert answer.exit_code == 0
    assert "--out" in answer.output


@pytest.mark.parametrize("command", ["ct-rate", "nifti"])
def test_help_shows_an_example_that_is_accepted(command: str) -> None:
    answer = invoke(command, "--help")
    example = re.search(rf"Example: python -m data_prep {command} (.*)", answer.output)
    assert example is not None
    for option in re.findall(r"--[a-z-]+", example[1]):
        assert answer.output.count(option) > 1, f"{option} is in the example and not among the options"


def test_ct_rate_is_written_with_all_its_masks(
    tiny: Any, tmp_path: Path, write_rex: Callable[..., tuple[Path, Path]], save_nifti: Callable[..., Path]
) -> None:
    for volume in ("train_1_a_1", "train_2_a_1", "train_3_a_1"):
        tiny.add(volume)
    save_nifti(tiny.ts_path("train_1_a_1", "train"), np.ones(SHAPE_XYZ, np.uint8), tiny.affine())
    masks = np.ones((1, *SHAPE_XYZ), np.uint8)
    listing, folder = write_rex({"train_2_a_1": masks}, {"train_2_a_1": ["2d"]}, tiny.affine())
    answer = invoke(
        *("ct-rate", "--root", tiny.root, "--split", "train", "--out", tmp_path / "out", "--limit", 2),
        *("--rexgroundingct", listing, "--rexgroundingct-masks", folder, "--slices-per-shard", 5),
    )
    assert answer.exit_code == 0, answer.output
    entries = {entry.volume: entry for entry in ShardSet(tmp_path / "out", "train").volumes}
    assert list(entries) == ["train_1_a_1", "train_2_a_1"]
    assert entries["train_1_a_1"].has_ts
    assert entries["train_2_a_1"].has_rex
    for line in (r"volumes +│ +2", r"slices +│ +10", r"TotalSegmentator ids +│ +1", r"ReXGroundingCT +│ +1"):
        assert re.search(line, answer.stdout), answer.stdout


@pytest.mark.parametrize(("form", "status"), [("auto", 0), ("v1", 0), ("v2", 1)])
def test_the_form_is_the_users_to_state(form: str, status: int, tiny_v1: Any, tmp_path: Path) -> None:
    tiny_v1.add("train_1_a_1")
    answer = invoke(
        "ct-rate", "--root", tiny_v1.root, "--split", "train", "--out", tmp_path / "out", "--form", form
    )
    assert answer.exit_code == status, answer.output
    if status == 0:
        slices = ShardSet(tmp_path / "out", "train").read_ct(0, 3)
        np.testing.assert_array_equal(slices, tiny_v1.hu("train_1_a_1")[:, :, 3].T)
    else:
        assert re.search(r"left out: v1 or v2 +│ +1", answer.stdout)


@pytest.mark.parametrize(("allowed", "status"), [(None, 1), (0.2, 1), (0.25, 0), (1, 0)])
def test_too_many_rejected_volumes_are_a_failure(
    allowed: float | None, status: int, tiny: Any, tmp_path: Path
) -> None:
    for n in range(1, 5):
        tiny.add(f"train_{n}_a_1")
    tiny.path("train_2_a_1", "train").write_bytes(b"<html>")
    options = [] if allowed is None else ["--max-rejected", allowed]
    answer = invoke("ct-rate", "--root", tiny.root, "--split", "train", "--out", tmp_path / "out", *options)
    assert answer.exit_code == status
    assert re.search(r"left out: unreadable +│ +1", answer.stdout)
    assert "rejected.csv" in answer.stderr
    limit = "1.00%" if allowed is None else f"{allowed:.2%}"
    said = (
        f"rejected volumes must be at most {limit}, got 25.00% (1 volumes). Mend them, or raise"
        in answer.stderr
    )
    assert said == (status == 1)
    assert len(ShardSet(tmp_path / "out", "train").volumes) == 3


def test_a_folder_of_nifti_files_is_written(
    tmp_path: Path, tiny: Any, save_nifti: Callable[..., Path]
) -> None:
    for name in ("scan-a", "scan-b"):
        save_nifti(tmp_path / "in" / f"{name}.nii.gz", tiny.hu(name), tiny.affine())
    save_nifti(tmp_path / "masks" / "scan-b.nii.gz", np.full(SHAPE_XYZ, 51, np.uint8), tiny.affine())
    answer = invoke(
        "nifti", tmp_path / "in", "--out", tmp_path / "out", "--split", "valid", "--masks", tmp_path / "masks"
    )
    assert answer.exit_code == 0, answer.output
    shards = ShardSet(tmp_path / "out", "valid")
    assert [(entry.volume, entry.has_ts) for entry in shards.volumes] == [("scan-a", False), ("scan-b", True)]
    assert np.unique(shards.read_ts(1, 0, 5)).tolist() == [51]


def test_mistakes_end_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for arguments, message in (
        (
            ["nifti", str(tmp_path), "--out", str(tmp_path / "out")],
            "folder must hold .nii.gz or .nii volumes",
        ),
        (
            ["ct-rate", "--root", ".", "--split", "train", "--out", "out", "--rexgroundingct", "x.json"],
            "--rexgroundingct and --rexgroundingct-masks must be given together, got one of them.",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["data_prep", *arguments])
        with pytest.raises(SystemExit) as left:
            module.main()
        assert left.value.code == 2
        printed = capsys.readouterr().err
        assert message in " ".join(printed.split())
        assert "Traceback" not in printed


@pytest.mark.real_ct
def test_real_scans_and_their_label_maps_are_written(real_ct_dir: Path, tmp_path: Path) -> None:
    """Two scans stored as LPS and RAS, whose label maps are stored as LAS and RAS."""
    for ct, mask in (
        ("example_ct_sm_3mm", "example_sm_seg117_3mm"),
        ("dicom_ct_native", "dicom_seg117_native"),
    ):
        for folder, name in (("ct", ct), ("ts", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            link = tmp_path / folder / f"{ct}.nii.gz"
            link.symlink_to(real_ct_dir / f"totalseg_{name}.nii.gz")
    answer = invoke("nifti", tmp_path / "ct", "--masks", tmp_path / "ts", "--out", tmp_path / "out")
    assert answer.exit_code == 0, answer.output
    shards = ShardSet(tmp_path / "out", "train")
    for volume_id, entry in enumerate(shards.volumes):
        ids = shards.read_ts(volume_id, 0, entry.num_slices)
        rows, columns = (((np.arange(128) + 0.5) * size / 128).astype(int) for size in entry.shape)
        hu = np.stack([shards.read_ct(volume_id, z) for z in range(entry.num_slices)])[:, rows][:, :, columns]
        for muscle in (86, 87):
            assert -20 < np.median(hu[ids == muscle]) < 80
