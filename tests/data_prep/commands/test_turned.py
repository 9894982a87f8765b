from pathlib import Path

import numpy as np
from typer.testing import CliRunner, Result

from data_prep import __main__ as module


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(module.app, ["turned", *map(str, arguments)], env={"COLUMNS": "200"})


def test_volumes_are_written_once_and_those_that_are_no_ct_are_listed(tmp_path: Path) -> None:
    root, out = tmp_path / "rad", tmp_path / "out"
    root.mkdir()
    for number in (1, 2):
        np.savez_compressed(root / f"tst{number:05d}.npz", ct=np.full((3, 4, 5), number, np.int16))
    (root / "tst00003.npz").write_text("<html>")
    np.savez_compressed(root / "trn00001.npz", ct=np.zeros((3, 4, 5), np.int16))
    answer = invoke("--root", root, "--prefix", "tst", "--turn", "flipped", "--out", out)
    assert answer.exit_code == 1, answer.output
    assert sorted(path.name for path in out.glob("*.gz")) == ["tst00001.nii.gz", "tst00002.nii.gz"]
    assert "Rejected: tst00003" in answer.output
    assert "2 volumes, flipped, in" in answer.output
    written = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert (
        "0 volumes, flipped, in"
        in invoke("--root", root, "--prefix", "tst", "--turn", "flipped", "--out", out).output
    )
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == written
    other = invoke("--root", root, "--prefix", "tst", "--turn", "sagittal", "--out", out)
    assert "out must be empty or hold volumes of these settings, {'turn': 'sagittal'" in str(other.exception)
    (out / "turned.json").unlink()
    unknown = invoke("--root", root, "--prefix", "tst", "--turn", "flipped", "--out", out)
    assert "out must hold a turned.json beside its volumes" in str(unknown.exception)
