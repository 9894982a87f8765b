"""A volume that is no CT of known geometry is refused before anything is made of it."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.transforms.check_volume import CheckVolumed


def ct(affine: np.ndarray | None = None, **changes: torch.Tensor) -> dict:
    hu = changes.get("hu", torch.arange(3 * 5 * 7.0).reshape(1, 3, 5, 7))
    affine = np.diag([-0.7, -0.8, 1.5, 1.0]) if affine is None else affine
    return {"image": MetaTensor(hu, affine=torch.from_numpy(affine), meta={"filename_or_obj": "a.nii"})}


def test_ct():
    spl = np.array([[0, 0, -0.7, 3], [0, -0.8, 0, 5], [1.5, 0, 0, 7], [0, 0, 0, 1]])
    for affine in (None, spl):
        sample = ct(affine)
        out = CheckVolumed("image")(sample)
        assert out["spacing_mm"] == pytest.approx((0.7, 0.8, 1.5))
        assert out["image"] is sample["image"]
        assert "spacing_mm" not in sample


def test_what_is_no_ct_is_refused_by_name():
    check, hu = CheckVolumed("image"), torch.arange(105.0).reshape(1, 3, 5, 7)
    with pytest.raises(ValueError, match="'image' must be a meta tensor with an affine, got Tensor. Load it"):
        check({"image": hu})
    with pytest.raises(ValueError, match=r"must have shape \(1, X, Y, Z\), got \(2, 3, 5, 7\) for a.nii"):
        check(ct(hu=hu.repeat(2, 1, 1, 1)))
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="must have finite voxels, got NaN or infinity for a.nii"):
            check(ct(hu=hu.where(hu != 50, bad)))
    with pytest.raises(ValueError, match="must show something, got -1024 HU everywhere for a.nii"):
        check(ct(hu=torch.full_like(hu, -1024)))
    with pytest.raises(ValueError, match=r"affine must have three perpendicular axes, got .* for a.nii\."):
        check(ct(np.diag([1.0, 1.0, 0.0, 1.0])))
    turned = np.array([[1.0, 1.0, 0, 0], [-1.0, 1.0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    with pytest.raises(
        ValueError, match=r"got 45\.0 for a\.nii\. Resample the volume to axial slices first\.$"
    ):
        check(ct(turned))
