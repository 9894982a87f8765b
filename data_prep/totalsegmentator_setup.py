"""Prepares the TotalSegmentator package: device, weights, and no reports of its use."""

import contextlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def totalsegmentator_ready(device: str, fast: bool) -> Iterator[None]:
    """Prepare TotalSegmentator and keep it from reporting its use.

    It reports each run unless its configuration says otherwise, and counts runs in that file. This process
    gets a configuration of its own, which also keeps parallel ones from writing to one file. Weights that are
    missing are downloaded, into the place where TotalSegmentator looks for them.

    Args:
        device: ``gpu``, ``gpu:1`` or ``cpu``.
        fast: whether the model of 3 mm is wanted.

    Raises:
        ValueError: if there is no such device.
        ConnectionError: if weights are missing and cannot be downloaded.
    """
    from totalsegmentator import config, python_api

    python_api.validate_device_type_api(device)
    with contextlib.redirect_stdout(io.StringIO()):
        selected = python_api.select_device(device)
    if device.startswith("gpu") and str(selected) == "cpu":
        raise ValueError(f"device must be one that CUDA finds, got '{device}'. Try cpu.")
    weights = config.get_weights_dir()
    settings = {"totalseg_id": "", "send_usage_stats": False, "prediction_counter": 0}
    with tempfile.TemporaryDirectory(prefix="totalsegmentator_") as home:
        Path(home, "config.json").write_text(json.dumps(settings | {"statistics_disclaimer_shown": True}))
        with _environment(TOTALSEG_HOME_DIR=home, TOTALSEG_WEIGHTS_PATH=str(weights)):
            _ensure_weights(fast, weights)
            yield


def _ensure_weights(fast: bool, weights: Path) -> None:
    from totalsegmentator import python_api

    tasks = python_api.get_task_config("total", fast=fast, quiet=True)["task_id"]
    try:
        for task in tasks if isinstance(tasks, list) else [tasks]:
            python_api.download_pretrained_weights(task)
    except (OSError, zipfile.BadZipFile) as error:
        option = "total_fast" if fast else "total"
        raise ConnectionError(
            f"TotalSegmentator's weights must be in '{weights}', got none, and the download failed: "
            f"{' '.join(str(error).split())}. With network, run: totalseg_download_weights -t {option}; "
            "elsewhere set TOTALSEG_WEIGHTS_PATH to a copy of that folder."
        ) from error


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
