import json

import numpy as np
from typer.testing import CliRunner

from dale_ct.cli import app


def test_a_phantom_is_recorded_and_verified_and_a_port_is_told_where_it_parts(small_bundle, tmp_path):
    def run(*words):
        return CliRunner().invoke(app, ["golden", *map(str, words), "--golden", str(path)])

    path = tmp_path / "golden.json"
    missing = run("verify", small_bundle)
    assert isinstance(missing.exception, FileNotFoundError)
    recorded = run("record", small_bundle, "--weights", "random")
    assert recorded.exit_code == 0, recorded.output
    known = json.loads(path.read_text())
    assert known["ct"] == {"phantom_seed": 2}
    assert known["encoder_id"].startswith("random:42")
    same = run("verify", small_bundle)  # random weights again, without being told
    assert same.exit_code == 0, same.output
    assert [line.split(":")[0].split() for line in same.stdout.splitlines()] == [
        [stage, "ok"] for stage in ("read", "crop", "normalise", "network")
    ]
    np.savez(tmp_path / "port.npz", box=known["stages"]["crop"]["box"], tokens=np.ones((6, 24)))
    other = run("verify", small_bundle, "--port", tmp_path / "port.npz")
    assert other.exit_code == 1
    assert [line.split(":")[0].split() for line in other.stdout.splitlines()] == [
        ["crop", "ok"],
        ["network", "DIFFERS"],
    ]
    np.savez(tmp_path / "port.npz", pixels=np.ones(3))
    assert "port must hold" in str(run("verify", small_bundle, "--port", tmp_path / "port.npz").exception)
