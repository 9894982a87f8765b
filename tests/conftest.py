"""Settings and fixtures that all tests share."""

import os
from collections.abc import Callable
from pathlib import Path

# Before anything is imported that reads them: tests download nothing, report nothing and open no window.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MPLBACKEND"] = "Agg"

import pytest  # noqa: E402 (see above)
import torch  # noqa: E402 (see above)
from packaging.utils import canonicalize_name  # noqa: E402 (see above)

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers share the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def real_ct_dir() -> Path:
    """Folder of real CT volumes: DALE_CT_TEST_DATA, or ../shared/data beside the repository."""
    stated = os.environ.get("DALE_CT_TEST_DATA")
    folder = Path(stated) if stated else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        if stated:
            raise FileNotFoundError(f"DALE_CT_TEST_DATA must be a folder, got '{stated}'.")
        pytest.skip(f"no real CT in '{folder}'; set DALE_CT_TEST_DATA to a folder that has some")
    return folder


@pytest.fixture(scope="session")
def pinned() -> Callable[[str], dict[str, str]]:
    """Versions by normalized package name, of requirements.txt or requirements-dev.txt."""

    def read(name: str) -> dict[str, str]:
        lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
        pins = (line.partition("==") for line in lines if line and not line.startswith("#"))
        return {canonicalize_name(package): version for package, _, version in pins}

    return read
