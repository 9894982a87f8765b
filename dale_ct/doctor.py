"""What this machine has for ``dale-ct``: each line is fine, or says what to do."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

MIN_PYTHON = (3, 11)
MIN_MEMORY_GB = 8
MIN_SHARED_MEMORY_GB = 2
MIN_DISK_GB = 10
GATED = {
    "CT-RATE": ("dataset", "ibrahimhamamci/CT-RATE"),
    "ReXGroundingCT": ("dataset", "rajpurkarlab/ReXGroundingCT"),
}
"""Repositories of the Hugging Face hub whose terms have to be accepted before their files can be had."""


class Finding(NamedTuple):
    """One line of the report.

    Args:
        name: what was looked at.
        is_fine: False where something is to be done.
        text: what was found, or what to do.
    """

    name: str
    is_fine: bool
    text: str


def examine(folder: Path, online: bool = True) -> Iterator[Finding]:
    """Look at the machine, one finding after the other.

    Args:
        folder: folder that runs would write to.
        online: ask the Hugging Face hub who is logged in, and for the terms of the gated datasets.
    """
    checks: list[Callable[[], Finding]] = [_python, _packages, _device, _memory, _shared_memory]
    for check in checks:
        yield check()
    yield _disk(folder)
    yield _compiler()
    yield _tracking()
    if online:
        yield from _hub()


def _python() -> Finding:
    enough = sys.version_info[:2] >= MIN_PYTHON
    wanted = "" if enough else f": {'.'.join(map(str, MIN_PYTHON))} or newer is needed; see 'make install'"
    return Finding("Python", enough, f"{platform.python_version()} in {sys.prefix}{wanted}")


def _packages() -> Finding:
    names = ("torch", "monai", "timm", "pytorch-ignite", "mlflow")
    try:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    except importlib.metadata.PackageNotFoundError as error:
        return Finding("Packages", False, f"{error.name} is missing: run 'pip install -r requirements.txt'")
    return Finding("Packages", True, versions)


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = "" if has_bf16 else "; no bfloat16: pass --amp_dtype float32"
        return Finding("GPU", not bf16, f"{names}, CUDA {torch.version.cuda}{bf16}")
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        return Finding(
            "GPU",
            False,
            f"there is an NVIDIA driver, but PyTorch {torch.__version__} does not see a GPU. "
            f"Its CUDA is {torch.version.cuda}: compare with the version that 'nvidia-smi' shows",
        )
    return Finding("GPU", True, f"none: {os.cpu_count()} CPU cores are used; a ViT-L takes seconds per slice")


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    enough = memory.total / 2**30 >= MIN_MEMORY_GB
    less = "" if enough else f": with less than {MIN_MEMORY_GB} GiB use --num_workers 0"
    return Finding(
        "Memory", enough, f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB free{less}"
    )


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("Shared memory", True, "not Linux: data loaders use files")
    free = shutil.disk_usage(folder).free / 1e9
    enough = free >= MIN_SHARED_MEMORY_GB
    less = "" if enough else ": pretraining wants 2 GB per GPU. Start containers with --shm-size 16g"
    return Finding("Shared memory", enough, f"{free:.1f} GB free in {folder.resolve()}{less}")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 1e9
    enough = free >= MIN_DISK_GB
    return Finding("Disk", enough, f"{free:.0f} GB free in {folder}{'' if enough else ': make room'}")


def _compiler() -> Finding:
    found = next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    text = found or "none: torch.compile needs one on a GPU. Install gcc, or pass --compiled False"
    return Finding("C compiler", found is not None, text)


def _tracking() -> Finding:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    shown = re.sub(r"//[^/@]*@", "//", uri)  # without a password, as reports are pasted into issues
    if not uri.startswith("http"):
        return Finding("MLflow", True, f"{shown}; see runs with: mlflow ui --backend-store-uri {shown}")
    import requests

    try:
        requests.get(f"{uri}/health", timeout=5).raise_for_status()
    except requests.RequestException as error:
        reason = " ".join(str(error).split())[:120]
        return Finding(
            "MLflow", False, f"no answer from MLFLOW_TRACKING_URI={shown} ({reason}). Is it running?"
        )
    return Finding("MLflow", True, shown)


def _hub() -> Iterator[Finding]:
    from huggingface_hub import HfApi, errors, get_token

    from common.networks.hub import be_quiet

    be_quiet()
    api = HfApi()
    failed = (OSError, errors.HTTPError, errors.OfflineModeIsEnabled)
    if get_token() is None:
        text = "not logged in: released weights need no login, gated datasets need 'hf auth login'"
        yield Finding("Hugging Face", True, text)
        return
    try:
        yield Finding("Hugging Face", True, f"logged in as {api.whoami()['name']}")
    except failed as error:
        reason = " ".join(str(error).split())[:120]
        text = (
            f"no answer ({reason}): check the token and the network, or place weights in the bundles' models/"
        )
        yield Finding("Hugging Face", False, text)
        return
    for name, (kind, repository) in GATED.items():
        try:
            api.auth_check(repository, repo_type=kind)
            yield Finding(name, True, f"the terms of {repository} are accepted")
        except errors.GatedRepoError:
            page = f"https://huggingface.co/{kind}s/{repository}"
            yield Finding(name, False, f"accept the terms on {page} to download it")
        except failed as error:
            yield Finding(name, False, f"could not be checked: {' '.join(str(error).split())[:120]}")
