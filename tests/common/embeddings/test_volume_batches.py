"""Volumes reach a 3D encoder in their place in the world, in order, and the bad ones are listed."""

import numpy as np
import pytest
import torch
from monai.transforms import Orientationd

from common.ct.rejection import RejectedError
from common.embeddings.sources import CTSlices, CTSource
from common.embeddings.store_writer import EmbeddingStoreWriter
from common.embeddings.volume_batches import VolumeBatches, lps_volume, unembedded


def slices(seed: int = 0) -> CTSlices:
    hu = np.random.default_rng(seed).integers(-1000, 1000, (7, 5, 5)).astype(np.int16)
    return CTSlices(hu, (0.7, 0.8, 1.5))


def source(name: str, seed: int = 0) -> CTSource:
    return CTSource(name, lambda: slices(seed))


def failing(name: str, error: Exception) -> CTSource:
    def read():
        raise error

    return CTSource(name, read)


def test_ct_is_lps_with_its_spacing():
    ct = slices()
    volume = lps_volume(ct)
    assert volume.dtype == torch.float32
    assert volume.shape == (1, 5, 5, 7)
    assert volume.pixdim.tolist() == pytest.approx([0.7, 0.8, 1.5])
    for z, y, x in ((0, 0, 0), (6, 1, 3), (2, 4, 0)):
        assert float(volume[0, x, y, z]) == ct.hu[z, y, x]
    # canonical slices run feet to head, front to back, right to left: seen from RAS, two axes turn
    ras = Orientationd("image", axcodes="RAS")({"image": volume})["image"]
    np.testing.assert_array_equal(ras[0].numpy(), ct.hu.transpose(2, 1, 0)[::-1, ::-1])


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_volumes_come_in_order_and_bad_ones_are_listed(num_workers):
    work = [source("a", 1), failing("b", RejectedError("not axial", "it is oblique")), source("c", 2)]
    work += [failing("d", OSError("damaged")), source("e", 3), source("f", 4)]
    batches = VolumeBatches(work, lambda item: {"image": item["image"] + 1}, num_workers)
    given = list(batches)
    assert [batch["volume"] for batch in given] == ["a", "c", "e", "f"]
    for batch, seed in zip(given, (1, 2, 3, 4), strict=True):
        assert batch["image"].shape == (1, 1, 5, 5, 7)
        np.testing.assert_array_equal(batch["image"][0, 0].numpy(), slices(seed).hu.transpose(2, 1, 0) + 1)
        assert batch["spacing_mm"] == (0.7, 0.8, 1.5)
    assert [(item.volume, item.reason) for item in batches.rejected] == [
        ("b", "not axial"),
        ("d", "unreadable"),
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_the_transform_is_no_fault_of_the_volume(num_workers):
    def broken(item):
        raise RuntimeError("axcodes")

    with pytest.raises(RuntimeError, match="axcodes"):
        list(VolumeBatches([source("a"), source("b"), source("c")], broken, num_workers))


def test_embedded_volumes_are_left_out(tmp_path):
    identity = {"encoder": "x", "encoder_id": "y", "preprocessing": "z"}
    identity |= {"slice_order": "none", "token_kind": "grid"}
    with EmbeddingStoreWriter(tmp_path, identity, "float32") as writer:
        writer.add("b", torch.ones(2, 3), (1.0, 1.0, 1.0))
    work = [source(name) for name in "abc"]
    assert [item.volume for item in unembedded(work, tmp_path)] == ["a", "c"]
    assert unembedded(work, tmp_path / "new") == work
