import re

import numpy as np
import pytest
from typer.testing import Result


@pytest.mark.usefixtures("any_values")
def test_volumes_are_written_once_and_those_that_are_no_ct_are_listed(tmp_path, run_command) -> None:
    root, out = tmp_path / "rad", tmp_path / "out"
    root.mkdir()
    for number in (1, 2):
        np.savez_compressed(root / f"tst{number:05d}.npz", ct=np.full((3, 4, 5), number, np.int16))
    (root / "tst00003.npz").write_text("<html>")
    np.savez_compressed(root / "trn00001.npz", ct=np.zeros((3, 4, 5), np.int16))

    def turn(how: str) -> Result:
        return run_command("turned", "--root", root, "--prefix", "tst", "--turn", how, "--out", out)

    answer = turn("flipped")
    assert answer.exit_code == 1, answer.output
    assert sorted(path.name for path in out.glob("*.gz")) == ["tst00001.nii.gz", "tst00002.nii.gz"]
    assert "Left out: 'tst00003'" in answer.output
    assert "2 volumes, flipped, in" in answer.output
    written = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "0 volumes, flipped, in" in turn("flipped").output
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == written
    assert re.search("made with .*flipped.*, now .*sagittal", str(turn("sagittal").exception))
    (out / "turned.json").unlink()
    assert "has volumes but no turned.json" in str(turn("flipped").exception)
