"""The volumes that are shown are the surest true positives, and their CTs are read the right way up."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from common.cohort.predictions import Predictions
from common.handlers.probe_pictures import read_slices, volumes_to_show

pytestmark = pytest.mark.usefixtures("any_values")

CLASSES = ["Emphysema", "Lung nodule", "Pleural effusion"]
N = 40


def predictions() -> Predictions:
    """The last class never occurs."""
    rng = np.random.default_rng(0)
    labels = (rng.random((N, 3)) < 0.4).astype(float)
    labels[:, 2] = 0
    scores = (0.5 * labels + 0.5 * rng.random((N, 3))).round(1)
    volumes = [f"valid_{index}_a_1" for index in range(N)]
    return Predictions("dale_ct_2s", volumes, CLASSES, scores, np.array([0.6, 0.4, 0.5]), labels)


def test_volumes_to_show_are_the_surest_true_positives() -> None:
    p = predictions()
    chosen = volumes_to_show(p)
    for volume, name in chosen.items():
        row, column = p.volumes.index(volume), CLASSES.index(name)
        assert p.labels[row, column] == 1
        assert p.probabilities[row, column] == p.probabilities[p.labels[:, column] == 1, column].max()
    assert "Pleural effusion" not in chosen.values()
    assert len(volumes_to_show(p, most=1)) == 1
    assert volumes_to_show(p._replace(thresholds=np.full(3, 2.0))) == {}


def test_slices_are_read_feet_to_head(tmp_path: Path) -> None:
    # stored head to feet: the affine's z runs downwards
    hu = np.arange(5, dtype=np.int16)[None, None].repeat(3, 0).repeat(4, 1) - 1000
    affine = np.diag([1.0, 1.0, -2.0, 1.0])
    (tmp_path / "deep" / "er").mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(hu, affine), tmp_path / "deep" / "er" / "valid_1_a_1.NII")
    read = read_slices(tmp_path, ["valid_1_a_1"])["valid_1_a_1"]
    assert read.shape == (5, 4, 4)
    assert read[:, 0, 1].tolist() == [-996, -997, -998, -999, -1000]


def test_missing_ct_is_refused(tmp_path: Path) -> None:
    nibabel.save(
        nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.diag([2, 2, 2, 1])), tmp_path / "a.nii"
    )
    with pytest.raises(FileNotFoundError, match="No CT of 'valid_1_a_1' in"):
        read_slices(tmp_path, ["valid_1_a_1"])
