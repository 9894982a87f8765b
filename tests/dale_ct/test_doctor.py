import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from dale_ct import doctor


@pytest.fixture
def findings(monkeypatch, tmp_path):
    return lambda: {finding.name: finding for finding in doctor.examine(tmp_path, online=False)}


def test_a_sound_machine_is_fine(findings):
    assert findings()["Python"].is_fine
    assert findings()["Packages"].is_fine


def test_what_is_missing_is_told_with_what_to_do(findings, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1e9))
    told = findings()
    assert not told["C compiler"].is_fine
    assert "gcc" in told["C compiler"].text
    assert not told["Disk"].is_fine
    if Path("/dev/shm").is_dir():
        assert "--shm-size" in told["Shared memory"].text


def test_a_tracking_server_that_is_gone_is_told(findings, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    told = findings()["MLflow"]
    assert not told.is_fine
    assert "127.0.0.1:9" in told.text
