from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from common.embeddings.dense_labels import (
    DenseLabels,
    findings_present,
    read_dense_labels,
    write_dense_labels,
)


def labels(slices: int = 3, patches: int = 4) -> DenseLabels:
    rng = np.random.default_rng(0)
    shares = rng.random((slices * patches, 118)) * (rng.random((slices * patches, 118)) < 0.1)
    findings = rng.integers(0, 1 << 14, (slices, patches)).astype(np.uint16)
    return DenseLabels("valid_1_a_1", (3, 5, 71), csr_matrix(shares.astype(np.float32)), findings)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = labels()
    write_dense_labels(tmp_path / "out", written)
    read = read_dense_labels(tmp_path / "out" / "valid_1_a_1.safetensors")
    assert (read.volume, read.box) == (written.volume, written.box)
    assert (read.shares != written.shares).nnz == 0
    assert (read.findings == written.findings).all()


def test_slices_show_what_their_patches_show() -> None:
    of = labels()
    shares, findings = of.of_slices()
    np.testing.assert_allclose(shares, of.shares.toarray().reshape(3, 4, 118).mean(1), rtol=1e-6)
    present = findings_present(of.findings)
    assert (findings_present(findings) == present.any(1)).all()
    assert present.shape == (3, 4, 14)


def test_shares_of_other_patches_are_refused(tmp_path: Path) -> None:
    wrong = labels()._replace(findings=np.zeros((3, 5), np.uint16))
    with pytest.raises(
        ValueError, match=r"shares must have shape \(15, 118\) to fit the findings, got \(12, 1"
    ):
        write_dense_labels(tmp_path, wrong)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        read_dense_labels(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="bad.safetensors"):
        read_dense_labels(tmp_path / "bad.safetensors")


def test_one_changed_byte_anywhere_is_noticed(tmp_path: Path) -> None:
    write_dense_labels(tmp_path, labels())
    path = tmp_path / "valid_1_a_1.safetensors"
    data = path.read_bytes()
    for place in range(8, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match="Cannot read"):
            read_dense_labels(path)
