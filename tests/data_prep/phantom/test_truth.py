import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.embeddings.store import EmbeddingStore
from data_prep.phantom.cohort import Settings, write_cohort
from data_prep.phantom.files import rad_name, sidecar_path
from data_prep.phantom.population import CT_RATE_LABELS, roster
from data_prep.phantom.scan import render
from data_prep.phantom.truth import write_lesion_areas


def test_areas_are_those_of_the_drawn_masks_and_stand_under_their_labels(tmp_path: Path) -> None:
    list(write_cohort(tmp_path / "a", 7, Settings(3, matrix=40, slice_mm=(9, 11), valid_share=0.4), 1))
    scans = [scan for scan in roster(7, 3, "a", 0.4) if scan.split == "train"]
    assert write_lesion_areas(tmp_path / "a", tmp_path / "out", "train") == len(scans)
    assert write_lesion_areas(tmp_path / "a", tmp_path / "out", "train") == len(scans)  # again: nothing to do
    store = EmbeddingStore(tmp_path / "out")
    assert store.volumes == sorted(scan.name for scan in scans)
    table = tmp_path / "a/dataset/multi_abnormality_labels/train_predicted_labels.csv"
    with table.open(newline="") as file:
        positive = {row["VolumeName"]: row for row in csv.DictReader(file)}
    seen = 0.0
    for scan in scans:
        volume, read = render(scan, "a", 40, (9, 11)), store.read(scan.name)
        pixel_mm = volume.protocol.pixel_mm
        expected = np.zeros((len(volume.hu), 18))
        for finding in volume.findings:
            mask = np.zeros(volume.hu.shape, bool)
            mask[finding.region.box] = finding.region.mask
            expected[:, CT_RATE_LABELS.index(finding.label)] += mask.sum((1, 2)) * pixel_mm**2 / 100
        np.testing.assert_allclose(read.tokens, expected, rtol=1e-5)
        assert torch.equal(read.z_mm, volume.protocol.slice_mm * torch.arange(len(expected)))
        for label, area in zip(CT_RATE_LABELS, expected.sum(0), strict=True):
            assert area == 0 or positive[f"{scan.name}.nii.gz"][label] == "1"
        seen += expected.sum()
    assert seen > 0


def test_site_b_has_rad_chestcts_names_and_an_earlier_cohort_is_refused(tmp_path: Path) -> None:
    settings = Settings(3, site="b", matrix=32, slice_mm=(20, 22), npz_spacing_mm=20)
    list(write_cohort(tmp_path / "b", 3, settings, 1))
    write_lesion_areas(tmp_path / "b", tmp_path / "out", None)
    scans = roster(3, 3, "b")
    assert EmbeddingStore(tmp_path / "out").volumes == sorted(map(rad_name, scans))
    for scan in scans:
        path = sidecar_path(tmp_path / "b", scan)
        record = json.loads(path.read_text())
        record["findings"] = [{"label": "Emphysema"}]
        path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="earlier version"):
        write_lesion_areas(tmp_path / "b", tmp_path / "other", None)
