"""Good files of every kind that the project reads, and how it reads them: what ``tests/fuzz.py`` damages."""

import json
import shutil
import traceback
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy.sparse import csr_matrix

from common.cohort.cohort import listed_volumes, read_labels
from common.ct.files import ct_file, read_grid
from common.embeddings.dense_labels import DenseLabels, read_dense_labels, write_dense_labels
from common.embeddings.store import EmbeddingStore, EmbeddingStoreWriter
from common.embeddings.work import ct_sources
from common.reports.results import FIELDS, PREDICTION_COLUMNS, read_predictions, read_rows
from common.run.config import executed_config
from common.shards.shards import ShardSet
from common.shards.writer import write_shard
from data_prep.audit.shard import ShardTask, audit_shard
from data_prep.sources.ct_rate import METADATA_COLUMNS, read_metadata
from data_prep.sources.rexgroundingct import read_annotations
from data_prep.sources.totalsegmentator import read_label_map
from data_prep.splits import read_split
from tests.conftest import series_of
from tests.noise_volume import noise_volume

REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLES = sorted(path.parents[1] for path in (REPOSITORY / "bundles").glob("*/configs/metadata.json"))
OWN = tuple(str(REPOSITORY / name) for name in ("common", "data_prep"))
RNG = np.random.default_rng(0)
HU = RNG.integers(-1000, 1000, (21, 23, 6)).astype(np.int16)
AFFINE = np.diag([-0.7, -0.8, 1.5, 1.0])


def check(error: Exception) -> None:
    """Raise an error again that is not for users: not raised by ours, or of several lines."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    kinds = (ValueError, FileNotFoundError)
    if isinstance(error, UnicodeError) or not isinstance(error, kinds) or not last.startswith(OWN):
        raise AssertionError(f"not an error for users: {type(error).__name__}: {error}") from error
    if "\n" in str(error):
        raise AssertionError(f"an error must be one line, got {error!r}.") from error


def attempt(read: Callable[..., object], *args: object) -> None:
    """Read; what is wrong must be told in words for users."""
    try:
        read(*args)
    except (ValueError, FileNotFoundError) as error:
        check(error)


def nifti(folder: Path) -> None:
    nib.save(nib.Nifti1Image(HU, AFFINE), folder / "a.nii.gz")
    nib.save(nib.Nifti2Image(HU, AFFINE), folder / "b.nii")
    np.savez_compressed(folder / "trn1.npz", ct=np.ascontiguousarray(HU.T))
    np.savez(folder / "trn2.npz", ct=np.ascontiguousarray(HU.T))


def dicom(folder: Path) -> None:
    series_of(folder, HU.transpose(2, 1, 0)[:3])


def zipped(folder: Path) -> None:
    dicom(folder / "series")
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (folder / "series").iterdir():
            archive.write(path, path.name)
    shutil.rmtree(folder / "series")


def read_cts(folder: Path) -> None:
    sources, _ = ct_sources(folder)
    for source in sources:
        attempt(source.read)


def label_map(folder: Path) -> None:
    nib.save(nib.Nifti1Image(HU, AFFINE), folder / "ct.nii.gz")
    for name, affine in (("same", AFFINE), ("other", np.diag([1.4, 0.8, 3.0, 1.0]))):
        nib.save(nib.Nifti1Image((HU % 118).astype(np.uint8), affine), folder / f"{name}.nii.gz")


def read_label_maps(folder: Path) -> None:
    grid = read_grid(ct_file(folder / "ct.nii.gz"))
    for name in ("same", "other"):
        attempt(read_label_map, folder / f"{name}.nii.gz", grid)


def shards(folder: Path) -> None:
    for first in (0, 2):
        volumes = [
            noise_volume(f"train_{first + n}_a_1", 4, (20, 24), rex=first > 0, labels={"Lung nodule": n})
            for n in range(2)
        ]
        write_shard(folder / f"train-{'rex-' * bool(first)}000000.tar", volumes)


def read_shards(folder: Path) -> None:
    read = ShardSet(folder, "train")
    for number, entry in enumerate(read.volumes):
        slab = read.read_slab(number, 0, entry.num_slices)
        for z in range(entry.num_slices):
            attempt(slab.read_ct, z)
        attempt(slab.read_ts)
        attempt(slab.read_rex)
    for path in sorted(folder.glob("*.tar")):
        with suppress(Exception):  # the audit reports whatever a task of it raises
            audit_shard(ShardTask(path))


def embeddings(folder: Path) -> None:
    identity = {"encoder": "a", "encoder_id": "sha256:0", "preprocessing": "cropped_256"}
    identity |= {"slice_order": "feet_to_head", "token_kind": "slice"}
    with EmbeddingStoreWriter(folder, identity, "float16") as writer:
        for name in ("train_1_a_1", "train_2_a_1"):
            writer.add(name, torch.randn(5, 8), (0.7, 0.7, 5.0), z_mm=torch.arange(5) * 5.0)


def read_embeddings(folder: Path) -> None:
    store = EmbeddingStore(folder)
    for volume in store.volumes:
        store.read(volume)


def dense(folder: Path) -> None:
    shares = RNG.random((12, 118)).astype(np.float32) * (RNG.random((12, 118)) < 0.1)
    findings = RNG.integers(0, 4, (3, 4)).astype(np.uint16)
    write_dense_labels(folder, DenseLabels("valid_1_a_1", (0, 0, 8), csr_matrix(shares), findings))


def tables(folder: Path) -> None:
    names = [f"train_{n}_a_1.nii.gz" for n in range(1, 6)]

    def table(name: str, heads: list[str], rows: list[list[object]]) -> None:
        lines = [",".join(map(str, row)) for row in (heads, *rows)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    table("labels.csv", ["VolumeName", "Emphysema"], [[name, n % 2] for n, name in enumerate(names)])
    ones = ["1"] * (len(METADATA_COLUMNS) - 1)
    table("metadata.csv", list(METADATA_COLUMNS), [[name, *ones] for name in names])
    table("split.csv", ["volume", "patient", "split"], [[name[:11], name[:7], "train"] for name in names])
    table("results.csv", list(FIELDS), [["1"] * len(FIELDS) for _ in names])
    rows = [["a", name, label, 0.5, 0.4, 1] for name in names for label in ("Emphysema", "Atelectasis")]
    table("predictions.csv", list(PREDICTION_COLUMNS), rows)
    (folder / "no_chest.txt").write_text("\n".join(names), encoding="utf-8")


def read_tables(folder: Path) -> None:
    attempt(read_labels, folder / "labels.csv", ["Emphysema"])
    attempt(read_metadata, folder / "metadata.csv")
    attempt(read_split, folder / "split.csv")
    attempt(read_rows, folder / "results.csv")
    attempt(read_predictions, folder / "predictions.csv")
    attempt(listed_volumes, folder / "no_chest.txt")


def annotations(folder: Path) -> None:
    item = {"name": "train_1_a_1.nii.gz", "findings": {"0": "text"}, "categories": {"0": "2e"}}
    (folder / "dataset.json").write_text(json.dumps({"train": [item, item | {"name": "train_2_a_1.nii.gz"}]}))
    (folder / "train_1_a_1.nii.gz").write_bytes(b"")


def overlay(folder: Path) -> None:
    words = "--seed", "3", "--slab_mm", "6.0", "--loss#sigreg#num_knots", "9", "--amp_dtype=float32", ""
    (folder / "words.txt").write_text("\n".join(words))
    overlay = {"slab_mm": 6.0, "network_def": {"depth": 2}, "poolers": []}
    (folder / "overlay.json").write_text(json.dumps(overlay))


def read_overlay(folder: Path) -> None:
    words = (folder / "words.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    for bundle in BUNDLES:
        for path in (bundle / "configs").glob("*.json"):
            if path.name == "metadata.json":
                continue
            for files in ([str(path)], [str(path), str(folder / "overlay.json")]):
                arguments = ["run", *words, "--config_file", str(files)]
                attempt(executed_config, str(bundle), path.name, arguments)


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "nifti": (nifti, read_cts),
    "dicom": (dicom, read_cts),
    "zip": (zipped, read_cts),
    "label map": (label_map, read_label_maps),
    "shards": (shards, read_shards),
    "embeddings": (embeddings, read_embeddings),
    "dense labels": (dense, lambda folder: read_dense_labels(folder / "valid_1_a_1.safetensors").of_slices()),
    "tables": (tables, read_tables),
    "annotations": (annotations, lambda folder: read_annotations(folder / "dataset.json", folder)),
    "overrides": (overlay, read_overlay),
}
