"""Tiny CTs in the layouts of the datasets, every voxel another value."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from common.labels import load_labels

SHAPE_XYZ = (19, 17, 5)
SPACING_MM = (0.7, 0.8, 1.5)


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


def save(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


@pytest.fixture
def tiny(tmp_path: Path) -> TinyCTRate:
    return TinyCTRate(tmp_path / "ct_rate")


@pytest.fixture
def tiny_v1(tmp_path: Path) -> TinyCTRate:
    return TinyCTRate(tmp_path / "ct_rate", form="v1")


@pytest.fixture
def save_nifti() -> Callable[[Path, np.ndarray, np.ndarray], Path]:
    return save


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
