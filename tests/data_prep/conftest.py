"""Tiny CTs in the layouts of the datasets, every voxel another value."""

import csv
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import numpy as np
import psutil
import pytest
from distributed import Client, LocalCluster
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from typer.testing import CliRunner, Result

from common.cohort.cohort import load_labels
from common.shards.writer import VolumeSlices
from data_prep.phantom.population import roster
from data_prep.phantom.scan import render
from tests.conftest import save
from tests.loopback_hub import LoopbackServer, ReplyHandler
from tests.noise_volume import noise_volume

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPE_XYZ = (19, 17, 5)
SPACING_MM = (0.7, 0.8, 1.5)
LOOPBACK = "127.0.0.1:0"


class TinyCTRate:
    """A CT-RATE download of a few small volumes, to be damaged by tests.

    Args:
        root: folder of the download.
        form: "v1" or "v2".
    """

    def __init__(self, root: Path, form: str = "v2") -> None:
        self.root = root
        self.form = form
        self.rows: list[dict[str, str]] = []
        self.labels: list[dict[str, str]] = []

    def hu(self, volume: str) -> np.ndarray:
        """HU of a volume as (X, Y, Z), stored as LPS; air at both ends of the body's range."""
        rng = np.random.default_rng(sum(volume.encode()))
        return rng.permutation(np.prod(SHAPE_XYZ)).reshape(SHAPE_XYZ).astype(np.int16) - 1000

    def affine(self) -> np.ndarray:
        affine = np.diag([-SPACING_MM[0], -SPACING_MM[1], SPACING_MM[2], 1.0])
        affine[:3, 3] = (5, 7, -100)
        return affine

    def path(self, volume: str, split: str) -> Path:
        folder = f"{split}_fixed" if self.form == "v2" else split
        patient, scan = volume.rsplit("_", 2)[0], volume.rsplit("_", 1)[0]
        return self.root / "dataset" / folder / patient / scan / f"{volume}.nii.gz"

    def ts_path(self, volume: str, split: str) -> Path:
        patient, scan = volume.rsplit("_", 2)[0], volume.rsplit("_", 1)[0]
        folder = self.root / "dataset" / "ts_seg" / "ts_total" / f"{split}_fixed"
        return folder / patient / scan / f"{volume}.nii.gz"

    def add(self, volume: str, split: str = "train", **row: Any) -> Path:
        """Write a volume and its rows; return its file."""
        path = self.path(volume, split)
        raw = self.form == "v1"
        save(path, self.hu(volume) + 1024 * raw, np.eye(4) if raw else self.affine())
        self.rows.append(
            {
                "VolumeName": f"{volume}.nii.gz",
                "RescaleSlope": "1",
                "RescaleIntercept": "-1024",
                "XYSpacing": "[0.7, 0.8]",
                "ZSpacing": "1.5",
            }
            | row
        )
        ones = {label.name: str(label.index % 2) for label in load_labels("ct_rate")}
        self.labels.append({"VolumeName": f"{volume}.nii.gz"} | ones)
        self.write_tables(split)
        return path

    def write_tables(self, split: str = "train") -> None:
        """Write metadata and labels as they are now."""
        name = {"train": "train_metadata.csv", "valid": "validation_metadata.csv"}[split]
        write_csv(self.root / "dataset" / "metadata" / name, self.rows)
        folder = self.root / "dataset" / "multi_abnormality_labels"
        write_csv(folder / f"{split}_predicted_labels.csv", self.labels)


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def cells_of(planes: np.ndarray) -> np.ndarray:
    """Slices (Z, H, W) at the centres of 128 x 128 cells."""
    rows, columns = (((2 * np.arange(128) + 1) * size // 256) for size in planes.shape[1:])
    return planes[:, rows[:, None], columns]


def drawn_patient(number: int, name: str, **changes: Any) -> VolumeSlices:
    """A synthetic patient in few and thick slices, with organs and without findings."""
    drawn = render(roster(4, seed=2)[number], "a", 64, (8.0, 8.0), {})
    spacing_mm = (drawn.protocol.pixel_mm, drawn.protocol.pixel_mm, 8.0)
    ct, ts = drawn.hu.clip(-1024, 3071), cells_of(drawn.ts).astype(np.uint8)
    return noise_volume(name, ct=ct, spacing_mm=spacing_mm)._replace(ts=ts, **changes)


@pytest.fixture(scope="module")
def dask() -> Iterator[Client]:
    """Client of two workers that are threads of this process, so that what a test patches holds.

    Each module has its own: one that had lain idle among other tests was once seen without its workers.
    """
    cluster = LocalCluster(n_workers=2, processes=False, threads_per_worker=1, dashboard_address=LOOPBACK)
    with cluster, Client(cluster) as client:
        yield client


@pytest.fixture(scope="session")
def run_command() -> Callable[..., Result]:
    """Run a command of data_prep in this process."""
    from data_prep.__main__ import app

    return lambda *words: CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "250"})


@pytest.fixture
def mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Run a command as a terminal does, which must end with status 2; return the line that it says."""
    from data_prep.__main__ import app, run_app

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["data_prep", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            run_app(app)
        said = capsys.readouterr().err
        assert (left.value.code, "Traceback" in said) == (2, False)
        return " ".join(said.split())

    return run


@pytest.fixture
def invoke(
    dask: Client, monkeypatch: pytest.MonkeyPatch, run_command: Callable[..., Result]
) -> Callable[..., Result]:
    """Run a command on the workers that all tests share."""

    @contextmanager
    def shared_client(*_: object) -> Iterator[Client]:
        yield dask

    for module in ("audit", "dense", "prepare", "statistics"):
        monkeypatch.setattr(f"data_prep.commands.{module}.dask_client", shared_client)
    return run_command


@pytest.fixture
def dask_command(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start ``dask ...`` as a process of its own, which finds data_prep as the README says."""
    started: list[subprocess.Popen] = []
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    log = (tmp_path / "dask.log").open("w")

    def start(*arguments: str) -> subprocess.Popen:
        command = [str(Path(sys.executable).with_name("dask")), *arguments, "--no-dashboard"]
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait()
    log.close()


@pytest.fixture
def dask_scheduler(dask_command: Callable[..., subprocess.Popen]) -> tuple[str, subprocess.Popen]:
    """Address and process of a scheduler of its own, which nobody has joined."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    process = dask_command("scheduler", "--host", "127.0.0.1", "--port", port)
    return f"tcp://127.0.0.1:{port}", process


@pytest.fixture
def tiny(tmp_path: Path) -> TinyCTRate:
    return TinyCTRate(tmp_path / "ct_rate")


@pytest.fixture
def tiny_v1(tmp_path: Path) -> TinyCTRate:
    return TinyCTRate(tmp_path / "ct_rate", form="v1")


@pytest.fixture
def write_rex(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Write ReXGroundingCT's JSON and masks; return both places."""

    def write(
        masks: dict[str, np.ndarray], codes: dict[str, list[str]], affine: np.ndarray
    ) -> tuple[Path, Path]:
        items = [
            {
                "name": f"{volume}.nii.gz",
                "findings": {str(f): "a finding" for f in range(len(own))},
                "categories": {str(f): code for f, code in enumerate(own)},
            }
            for volume, own in codes.items()
        ]
        folder = tmp_path / "rex" / "segmentations"
        for volume, mask in masks.items():
            save(folder / f"{volume}.nii.gz", mask, affine)
        listing = tmp_path / "rex" / "dataset.json"
        folder.mkdir(parents=True, exist_ok=True)
        listing.write_text(json.dumps({"train": items, "val": []}), encoding="utf-8")
        return listing, folder

    return write


class LoopbackHub(LoopbackServer):
    """A server on this machine that answers as the Hugging Face hub does, as far as a download asks.

    Small files are served by the hub itself, large ones by redirecting to another origin, the content store.
    What it was asked is in ``requests`` as method, path and range.

    Args:
        repo_id: owner and name of the one dataset it has.
    """

    COMMIT = "c0ffee" + 34 * "0"
    TOKEN = "hf_loopback"

    def __init__(self, repo_id: str) -> None:
        self.repo_id = repo_id
        self.files: dict[str, bytes] = {}
        self.corrupt: set[str] = set()
        self.gone: set[str] = set()
        self.cut_at: dict[str, int] = {}
        self.stall: dict[str, threading.Event] = {}
        self.refusal: tuple[int, str] | None = None
        self.page_size = 1000
        self.requests: list[tuple[str, str, str]] = []
        self.headers: list[tuple[str, dict[str, str]]] = []
        super().__init__(HubHandler)
        self.store = f"{self.url.replace('127.0.0.1', 'localhost')}/store/"

    def close(self) -> None:
        """Stop serving, what it holds back too."""
        for event in self.stall.values():
            event.set()
        super().close()

    def asked(self, method: str, path: str) -> list[str]:
        """Ranges of the requests for a file's bytes."""
        return [span for done, asked, span in self.requests if (done, asked) == (method, path)]

    def digest(self, path: str) -> str:
        content = self.files[path]
        if self.is_large(path):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    @staticmethod
    def is_large(path: str) -> bool:
        return path.endswith((".gz", ".npz"))

    def entry(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(self.files[path]), "oid": self.digest(path)}
        if self.is_large(path):
            sha256 = self.digest(path)
            entry |= {"oid": 40 * "f", "lfs": {"oid": sha256, "size": entry["size"], "pointerSize": 134}}
        return entry

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """Files of a folder in the order of their names, each after the folders that it is in."""
        skip = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path in sorted(path for path in self.files if path.startswith(skip)):
            parts = path.removeprefix(skip).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                name = skip + "/".join(parts[:depth])
                entries.setdefault(name, {"type": "directory", "path": name, "oid": 40 * "d"})
            if recursive or len(parts) == 1:
                entries[path] = self.entry(path)
        return list(entries.values())


class HubHandler(ReplyHandler):
    """Answers the requests to a ``LoopbackHub``."""

    def do_GET(self) -> None:
        hub = self.server.hub
        address = urlsplit(self.path)
        hub.headers.append((address.path, dict(self.headers)))
        api, files = f"/api/datasets/{hub.repo_id}/", f"/datasets/{hub.repo_id}/resolve/{hub.COMMIT}/"
        path = unquote(address.path)
        if path.startswith("/store/"):
            self.reply_content(path.removeprefix("/store/"), {})
        elif path.startswith(files):
            self.reply_file(path.removeprefix(files))
        elif path.startswith(api):
            self.reply_api(path.removeprefix(api), address.query)
        else:
            self.refuse(404, "RepoNotFound")

    def reply_api(self, path: str, query: str) -> None:
        hub = self.server.hub
        if path == "revision/main":
            self.reply_json({"id": hub.repo_id, "sha": hub.COMMIT, "siblings": []})
        elif path.startswith(f"tree/{hub.COMMIT}"):
            self.reply_tree(path.removeprefix(f"tree/{hub.COMMIT}").strip("/"), query)
        elif path == "auth-check" and hub.refusal:
            self.refuse(*hub.refusal)
        elif path == "auth-check":
            self.reply_json({})
        else:
            self.refuse(404, "RevisionNotFound")

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, {"X-Error-Code": code} if code else {})

    def reply_json(self, value: object, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.reply(200, {"Content-Type": "application/json"} | (headers or {}), content)

    def reply_tree(self, folder: str, query: str) -> None:
        hub = self.server.hub
        asked = parse_qs(query)
        recursive = asked["recursive"][0].lower() == "true"
        entries = hub.tree(folder, recursive)
        if folder and not entries:
            self.refuse(404, "EntryNotFound")
            return
        first = int(asked.get("cursor", ["0"])[0])
        last = first + hub.page_size
        address = f"{hub.url}{self.path.split('?')[0]}?recursive={recursive}&cursor={last}"
        link = {"Link": f'<{address}>; rel="next"'} if last < len(entries) else None
        self.reply_json(entries[first:last], link)

    def reply_file(self, path: str) -> None:
        hub = self.server.hub
        facts = {"X-Repo-Commit": hub.COMMIT}
        if hub.refusal:
            self.refuse(*hub.refusal)
        elif path not in hub.files or path in hub.gone:
            self.refuse(404, "EntryNotFound")
        elif hub.is_large(path):
            facts["X-Linked-Size"] = str(len(hub.files[path]))
            facts["X-Linked-Etag"] = f'"{hub.digest(path)}"'
            self.reply(302, facts | {"Location": hub.store + quote(path)})
        else:
            self.reply_content(path, facts | {"ETag": f'"{hub.digest(path)}"'})

    def reply_content(self, path: str, facts: dict[str, str]) -> None:
        hub = self.server.hub
        span = self.headers.get("Range", "")
        hub.requests.append((self.command, path, span))
        whole = hub.files[path] if path not in hub.corrupt else bytes(len(hub.files[path]))
        first = int(span.removeprefix("bytes=").removesuffix("-")) if span else 0
        if self.command == "HEAD" or path not in hub.cut_at | hub.stall:
            about = {"Content-Range": f"bytes {first}-{len(whole) - 1}/{len(whole)}"} if span else {}
            self.reply(206 if span else 200, facts | about, whole[first:])
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        self.wfile.write(whole[: hub.cut_at.pop(path, len(whole) // 2)])
        self.wfile.flush()
        if path in hub.stall:
            hub.stall[path].wait(60)
        self.close_connection = True


@pytest.fixture
def start_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], LoopbackHub]]:
    """Start a hub that has one dataset and let huggingface_hub in this process know of no other."""
    with ExitStack() as stack:

        def start(repo_id: str) -> LoopbackHub:
            hub = stack.enter_context(closing(LoopbackHub(repo_id)))
            hub.be_the_hub(tmp_path / "no_cache", monkeypatch)
            return hub

        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", LoopbackHub.TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
        close_session()
        yield start
        close_session()
