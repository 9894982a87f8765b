"""Settings and fixtures that all tests share."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# Before anything is imported that reads them: tests download nothing, report nothing, open no window and
# compute in one thread.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import nibabel as nib  # noqa: E402 (see above)
import numpy as np  # noqa: E402 (see above)
import pytest  # noqa: E402 (see above)
import torch  # noqa: E402 (see above)
from monai.bundle import ConfigWorkflow  # noqa: E402 (see above)
from packaging.utils import canonicalize_name  # noqa: E402 (see above)
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402 (see above)
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid  # noqa: E402 (see above)

from common.shards.writer import VolumeSlices, write_shard  # noqa: E402 (see above)
from study.commands import start_command  # noqa: E402 (see above)
from tests.loopback_hub import LoopbackHub  # noqa: E402 (see above)

collect_ignore = ["fuzz.py", "fuzz_dicom.py", "fuzz_kinds.py", "fuzz_wrong.py", "mutants.py"]  # programs

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL_VIT = {"img_size_px": 32, "patch_size_px": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
DICOM_SPACING_MM = (0.7, 0.8, 1.5)


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
def wrong_inputs(real_ct_dir: Path) -> ModuleType:
    """The program that writes wrong inputs made of a real chest, see ``cases/make.py`` beside the data."""
    path = real_ct_dir.parent / "cases" / "make.py"
    if not path.is_file():
        pytest.skip(f"no wrong inputs: '{path}' is not there")
    spec = importlib.util.spec_from_file_location("make_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def any_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let readers take numbers that are no HU, where a test is not about what they are."""
    monkeypatch.setattr("common.ct.checks.check_hu", lambda ct: None)


@pytest.fixture(scope="session")
def pinned() -> Callable[[str], dict[str, str]]:
    """Versions by normalized package name, of requirements.txt or requirements-dev.txt."""

    def read(name: str) -> dict[str, str]:
        lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
        pins = (line.partition("==") for line in lines if line and not line.startswith("#"))
        return {canonicalize_name(package): version for package, _, version in pins}

    return read


PLAIN_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="session")
def python_m(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess]:
    """Run ``python -m`` and words in a folder and say what came of it; see ``study/commands.py``.

    Nothing but what a user has is on its path; keywords are variables of its environment.
    """
    said = [tmp_path_factory.mktemp("said") / name for name in ("out.txt", "err.txt")]

    def run(words: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
        for path in said:
            path.write_bytes(b"")
        process = start_command([str(word) for word in words], cwd, PLAIN_ENVIRONMENT | environment, *said)
        process.join()
        out, err = (path.read_text(errors="replace") for path in said)
        return subprocess.CompletedProcess(words, process.exitcode, out, err)

    return run


@pytest.fixture
def stop_and_resume(python_m: Callable, tmp_path: Path) -> Callable[..., str]:
    """Send Ctrl-C to a command that has come so far, look at how it ends, and run it again to its end."""

    def run(words: list[str], has_come_so_far: Callable[[str], object], folder: Path) -> str:
        said = tmp_path / "said.txt"
        said.touch()
        process = start_command([str(word) for word in words], tmp_path, PLAIN_ENVIRONMENT, said, said)
        while not has_come_so_far(said.read_text()):
            assert process.is_alive(), said.read_text()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to a loader's workers as well
        process.join(120)
        text = said.read_text()
        assert process.exitcode == 130, text
        assert "Traceback" not in text
        assert re.search("Stopped.*Run the same command again to resume.$", text.splitlines()[-1])
        assert not list(folder.rglob("*.partial"))
        resumed = python_m(words, tmp_path)
        assert resumed.returncode == 0, resumed.stderr
        return resumed.stdout + resumed.stderr

    return run


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """Replace the Hugging Face hub, in this process, by one on this machine, with an empty cache."""
    server = LoopbackHub()
    server.be_the_hub(tmp_path / "hub_cache", monkeypatch)
    yield server
    server.close()


def touch(folder: Path, *names: str) -> Path:
    """Make empty files in a folder; return it."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def save(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    """Save an array as NIfTI; return its file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.fixture
def save_nifti() -> Callable[[Path, np.ndarray, np.ndarray], Path]:
    """Return :func:`save`."""
    return save


def series_of(
    folder: Path,
    hu: np.ndarray,
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    first_mm: tuple[float, ...] = (-5.0, -7.0, -100.0),
    series: str = "1.2.840.99.7",
    edit: Callable[[int, Dataset], None] = lambda z, dataset: None,
) -> list[Path]:
    """Write a CT series as DICOM files; return them in the order of their slices along the normal."""
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(orientation[:3], orientation[3:])
    # File names that sort in another order than the slices do.
    names = [f"IM{number:04d}" for number in np.random.default_rng(len(hu)).permutation(len(hu))]
    for z, (name, values) in enumerate(zip(names, hu, strict=True)):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID = CTImageStorage
        dataset.SOPInstanceUID = f"{series}.{z + 1}" if series else generate_uid()
        dataset.SeriesInstanceUID = series
        dataset.Modality = "CT"
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.PatientName = "Phantom^Synthetic"
        dataset.InstanceNumber = 1
        dataset.ImageOrientationPatient = list(orientation)
        dataset.ImagePositionPatient = [
            round(float(mm), 6) for mm in first_mm + DICOM_SPACING_MM[2] * z * normal
        ]
        dataset.PixelSpacing = [DICOM_SPACING_MM[1], DICOM_SPACING_MM[0]]  # of rows, of columns
        dataset.SliceThickness = 5.0  # of the beam, not their distance
        dataset.Rows, dataset.Columns = values.shape
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit, dataset.PixelRepresentation = 15, 0
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
        dataset.PixelData = (values + 1024).astype("<u2").tobytes()
        edit(z, dataset)
        dataset.save_as(folder / name, enforce_file_format=True)
    return [folder / name for name in names]


@pytest.fixture
def write_series() -> Callable[..., list[Path]]:
    """Return :func:`series_of`."""
    return series_of


@pytest.fixture
def workflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ConfigWorkflow]]:
    """Return ``open(bundle, config, *overlays, **knobs)``: an initialized bundle that writes to tmp_path."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # bundles set it, and what signals do
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def make(bundle: str, config: str, *overlays: Path, **knobs: Any) -> ConfigWorkflow:
        files = [REPOSITORY / "bundles" / bundle / "configs" / f"{config}.json", *overlays]
        settings = {"bundle_root": REPOSITORY / "bundles" / bundle, "output_dir": tmp_path / "out"}
        if "tracking_uri" in json.loads(files[0].read_text()):
            settings |= {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}
            settings |= {"results_csv": tmp_path / "results.csv"} if bundle.startswith("eval") else {}
        settings |= knobs
        paths = {name: str(value) for name, value in settings.items() if isinstance(value, Path)}
        kind = {"train": "train", "inference": "inference"}.get(config, "infer")
        found = ConfigWorkflow(
            [str(file) for file in files], workflow_type=kind, logging_file=False, **settings | paths
        )
        found.initialize()
        return found

    yield make
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dale_ct_2s with a network of one block, computing in float32."""
    folder = tmp_path_factory.mktemp("bundles") / "dale_ct_2s"
    shutil.copytree(REPOSITORY / "bundles" / "dale_ct_2s", folder)
    path = folder / "configs" / "inference.json"
    config = json.loads(path.read_text())
    config |= {**SMALL_VIT, "strategies": ["cropped_32"], "amp_dtype": "float32", "slices_per_batch": 7}
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture
def ct_folder(tmp_path: Path, save_nifti) -> Path:
    """Two CTs of 11 and 5 slices: a body of soft tissue in air."""
    folder = tmp_path / "cts"
    folder.mkdir()
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    affine[:3, 3] = 40.0, 50.0, -60.0
    for name, num_slices in (("a", 11), ("b", 5)):
        rng = np.random.default_rng(num_slices)
        hu = rng.integers(-1010, -990, (40, 48, num_slices)).astype(np.int16)
        hu[8:32, 10:38] = rng.integers(-200, 200, (24, 28, num_slices))
        save_nifti(folder / f"{name}.nii.gz", hu, affine)
    return folder


@pytest.fixture(scope="session")
def noise_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven little volumes of noise with masks, two of them ReX-annotated."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)

    def volume(index: int, rex: bool) -> VolumeSlices:
        slices = 6 + index
        return VolumeSlices(
            volume=f"train_{index}_a_1",
            ct=rng.integers(-1000, 1000, (slices, 40, 48)).astype(np.int16),
            ts=rng.integers(0, 118, (slices, 128, 128)).astype(np.uint8),
            rex=(rng.random((slices, 128, 128)) < 0.01).astype(np.uint16) * 5 if rex else None,
            spacing_mm=(0.8, 0.8, 3.0),
            original_shape=(48, 40, slices),
            original_axcodes="LPS",
            labels={"Lung nodule": index % 2},
            split="train",
        )

    write_shard(folder / "train-000000.tar", [volume(index, rex=False) for index in range(5)])
    write_shard(folder / "train-rex-000000.tar", [volume(index, rex=True) for index in range(5, 7)])
    return folder
