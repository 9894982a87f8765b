import json
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests
import torch

from data_prep.totalsegmentator_setup import totalsegmentator_ready

FAST = "Dataset297_TotalSegmentator_total_3mm_1559subj"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory in which nothing of TotalSegmentator was ever done, on a machine without network."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TOTALSEG_HOME_DIR", "TOTALSEG_WEIGHTS_PATH"):
        monkeypatch.delenv(name, raising=False)

    def no_network(method: str, url: str, **_: object) -> None:
        asked.append(url)
        raise requests.ConnectionError(f"no route to {url}")

    asked: list[str] = []
    monkeypatch.setattr("requests.api.request", no_network)
    monkeypatch.setattr("totalsegmentator.config.asked", asked, raising=False)
    return tmp_path


def asked() -> list[str]:
    """Addresses that were asked for anything."""
    from totalsegmentator import config

    return config.asked


def test_the_real_package_runs_without_a_report_of_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of ``totalsegmentator`` but the prediction itself, which needs the weights."""
    from totalsegmentator import nnunet, python_api

    (home / "weights" / FAST).mkdir(parents=True)
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(home / "weights"))
    image = nib.Nifti1Image(np.zeros((5, 4, 3), np.int16), np.diag([-0.7, -0.8, 1.5, 1]))
    seen: list[Any] = []

    def predict(file_in: Any, file_out: Any, task_id: Any, **options: Any) -> Any:
        seen.append((file_in is image, file_out, task_id, options["resample"], options["multilabel_image"]))
        return nib.Nifti1Image(np.full((5, 4, 3), 51, np.uint8), image.affine), image, None

    monkeypatch.setattr(nnunet, "nnUNet_predict_image", predict)
    with totalsegmentator_ready("cpu", fast=True):
        result = python_api.totalsegmentator(
            image, None, ml=True, task="total", fast=True, device="cpu", quiet=True
        )
        settings = json.loads(Path(os.environ["TOTALSEG_HOME_DIR"], "config.json").read_text())
    assert np.unique(result.get_fdata()).tolist() == [51]
    assert seen == [(True, None, 297, 3.0, True)]
    assert settings["prediction_counter"] == 1, "the package got as far as its report"
    assert asked() == []
    assert not (home / ".totalsegmentator").exists(), "the user's own configuration is left alone"


def test_a_report_would_have_been_seen(home: Path) -> None:
    from totalsegmentator import config

    params = {
        **dict.fromkeys(("task", "fast", "preview", "multilabel", "statistics", "radiomics")),
        "roi_subset": None,
    }
    config.send_usage_stats(config.setup_totalseg() | {"send_usage_stats": True}, params)
    assert asked() == ["https://stats.totalsegmentator.com:443/log_totalseg_run"]


@pytest.mark.parametrize(("fast", "option"), [(True, "total_fast"), (False, "total")])
def test_missing_weights_are_said_before_any_volume(fast: bool, option: str, home: Path) -> None:
    with pytest.raises(ConnectionError) as caught, totalsegmentator_ready("cpu", fast):
        pytest.fail("there are no weights")
    said = str(caught.value)
    weights = home / ".totalsegmentator" / "nnunet" / "results"
    assert said.startswith(f"TotalSegmentator's weights must be in '{weights}', got none, and the download")
    assert f"With network, run: totalseg_download_weights -t {option}; elsewhere set TOTALSEG" in said
    assert "\n" not in said
    assert all(url.startswith("https://github.com/wasserth/TotalSegmentator/") for url in asked())


def test_the_environment_is_as_before_afterwards(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "weights" / FAST).mkdir(parents=True)
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(home / "weights"))
    with totalsegmentator_ready("cpu", fast=True):
        private = os.environ["TOTALSEG_HOME_DIR"]
        assert os.environ["TOTALSEG_WEIGHTS_PATH"] == str(home / "weights")
    assert "TOTALSEG_HOME_DIR" not in os.environ
    assert not Path(private).exists()
    assert os.environ["TOTALSEG_WEIGHTS_PATH"] == str(home / "weights")


@pytest.mark.parametrize("device", ["gpu", "gpu:63"])
def test_a_gpu_that_is_not_there_is_not_replaced_by_the_cpu(device: str, home: Path) -> None:
    if device == "gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with (
        pytest.raises(ValueError, match=f"device must be one that CUDA finds, got '{device}'"),
        totalsegmentator_ready(device, fast=True),
    ):
        pytest.fail("there is no such device")


def test_other_devices_are_refused(home: Path) -> None:
    expected = pytest.raises(ValueError, match="Invalid device type: 'tpu'")
    with expected, totalsegmentator_ready("tpu", fast=True):
        pytest.fail("there is no such device")
