"""Token dumps of others: plain arrays, checked like our own."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from common.embeddings.arrays import EmbeddingArrays


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, length in (("v2", 5), ("v1", 3)):
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((length, 7)).astype(np.float16))
    return tmp_path


def test_arrays_are_read_with_their_checksums(dump: Path) -> None:
    arrays = EmbeddingArrays(dump)
    assert arrays.volumes == ["v1", "v2"]
    assert arrays.lengths.tolist() == [3, 5]
    for volume in ("v2", "v1"):
        tokens = arrays.view(volume)
        assert tokens.dtype == torch.float16
        np.testing.assert_array_equal(tokens, np.load(dump / f"{volume}.npy"))
    expected = [zlib.crc32(np.load(dump / f"{volume}.npy").tobytes()) for volume in ("v2", "v1")]
    assert arrays.checksums(["v2", "v1"]) == expected


def test_what_is_done_to_a_view_stays_out_of_the_file(dump: Path) -> None:
    arrays = EmbeddingArrays(dump)
    before = arrays.view("v1").clone()
    arrays.view("v1").zero_()
    assert torch.equal(arrays.view("v1"), before)


def test_arrays_do_not_say_what_made_them(dump: Path) -> None:
    unknown = dict.fromkeys(("encoder_id", "preprocessing", "slice_order", "token_kind"), "unknown")
    shape = {"dim": 7, "dtype": "float16"}
    assert EmbeddingArrays(dump).identity == unknown | shape | {"encoder": "unknown"}
    assert EmbeddingArrays(dump, "merlin").identity == unknown | shape | {"encoder": "merlin"}


def test_float64_is_read_as_float32(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.full((2, 3), 1 / 3))
    arrays = EmbeddingArrays(tmp_path)
    assert arrays.identity["dtype"] == "float32"
    assert torch.equal(arrays.view("v"), torch.full((2, 3), 1 / 3))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 6), np.float16), "dim must be the same for all embeddings, got 7 .*'v1' and 6 .*'v3'"),
        (np.zeros((2, 7), np.float32), "dtype must be the same for all embeddings, got float16 .* float32"),
        (np.zeros((0, 7), np.float16), r"at least one token, got float16 \(0, 7\) for volume 'v3'"),
        (np.zeros(7, np.float16), r"floating array \(T, D\) .*, got float16 \(7,\) for volume 'v3'"),
        (np.zeros((2, 7), int), r"got int64 \(2, 7\) for volume 'v3'"),
        (np.array([{"a": 1}]), "must be a whole .npy array, got .*v3.npy' .*Python objects"),
    ],
)
def test_bad_arrays_are_refused(dump: Path, array: np.ndarray, message: str) -> None:
    np.save(dump / "v3.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        EmbeddingArrays(dump)


def test_nan_names_its_volume(dump: Path) -> None:
    array = np.load(dump / "v2.npy")
    array[4, 1] = np.nan
    np.save(dump / "v2.npy", array)
    arrays = EmbeddingArrays(dump)
    assert len(arrays.view("v1")) == 3
    with pytest.raises(ValueError, match="NaN or Inf in 1 of 5 rows for volume 'v2'"):
        arrays.view("v2")


def test_what_is_not_there_is_named(dump: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="No array of volume 'v9'"):
        EmbeddingArrays(dump).view("v9")
    with pytest.raises(FileNotFoundError, match=r"got no <volume>.npy there"):
        EmbeddingArrays(tmp_path / "none")


def test_a_truncated_array_is_refused(dump: Path) -> None:
    path = dump / "v1.npy"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="must be a whole .npy array, got .*v1.npy"):
        EmbeddingArrays(dump)
