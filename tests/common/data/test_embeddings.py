import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.data.embeddings import (
    METADATA_KEYS,
    EmbeddingBags,
    labelled_volumes,
    read_embedding,
    write_embedding,
)

CLASSES = ["Emphysema", "Lung nodule", "Pleural effusion"]
METADATA = dict.fromkeys(METADATA_KEYS, "x") | {"volume": "train_1_a_1", "slice_order": "feet_to_head"}


def write(path: Path, num_slices: int = 5, dim: int = 7, **changes: str) -> Path:
    write_embedding(path, torch.randn(num_slices, dim), torch.arange(num_slices) * 1.5, METADATA | changes)
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_embedding_comes_back_as_written(tmp_path: Path, dtype: torch.dtype) -> None:
    cls, z_mm = torch.randn(5, 7).to(dtype), torch.tensor([-310.5, -309.0, -307.5, -306.0, -304.5])
    write_embedding(tmp_path / "new" / "train_1_a_1.safetensors", cls, z_mm, METADATA)
    back = read_embedding(tmp_path / "new" / "train_1_a_1.safetensors")
    assert torch.equal(back.cls, cls)
    assert back.cls.dtype == dtype
    assert torch.equal(back.z_mm, z_mm)
    assert back.metadata == METADATA
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_embedding_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    tensors = load_file(write(tmp_path / "v.safetensors"))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"cls": (5, 7), "z_mm": (5,)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cls": torch.zeros(5)}, r"cls must be float16 or float32 \(S, D\), got torch.float32 \(5,\)"),
        (
            {"cls": torch.zeros(5, 7).int()},
            r"cls must be float16 or float32 \(S, D\), got torch.int32 \(5, 7\)",
        ),
        (
            {"cls": torch.zeros(0, 7), "z_mm": torch.zeros(0)},
            "at least one slice, got 0 for volume 'train_1_a_1'",
        ),
        ({"z_mm": torch.zeros(4)}, r"z_mm must rise feet to head with shape \(5,\), got \(4,\)"),
        ({"z_mm": -torch.arange(5.0)}, "z_mm must rise feet to head"),
        (
            {"cls": torch.zeros(5, 7).index_fill_(0, torch.tensor([2]), torch.inf)},
            "NaN or Inf in 1 of 5 slices",
        ),
        (
            {"metadata": {"volume": "v"}},
            r"metadata must have the keys .*, got none of \['spacing_mm', 'encoder'",
        ),
    ],
)
def test_embedding_that_a_reader_could_not_trust_is_not_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    good = {"cls": torch.randn(5, 7), "z_mm": torch.arange(5.0), "metadata": METADATA}
    with pytest.raises(ValueError, match=message):
        write_embedding(tmp_path / "v.safetensors", **good | changes)
    assert list(tmp_path.iterdir()) == []


def test_missing_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"embedding must be a file, got '.*none.safetensors'"):
        read_embedding(tmp_path / "none.safetensors")


def test_truncated_embedding_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "v.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(
        ValueError, match=r"must be a whole safetensors file, got '.*v.safetensors' .*Embed it again"
    ):
        read_embedding(path)


def test_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"cls": torch.zeros(2, 3), "z_mm": torch.zeros(2)}, tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match="metadata must have the keys"):
        read_embedding(tmp_path / "v.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bags_hold_each_volumes_slices_and_labels(write_cohort: Any, dtype: torch.dtype) -> None:
    folder, labels_csv = write_cohort("train", 11, dtype=dtype)
    bags = EmbeddingBags(folder, labels_csv, CLASSES)
    rows = [line.split(",") for line in labels_csv.read_text().splitlines()[1:]]
    assert len(bags) == 11
    assert bags.volumes == [row[0].removesuffix(".nii.gz") for row in rows]
    for index, row in enumerate(rows):
        cls = load_file(folder / f"{bags.volumes[index]}.safetensors")["cls"]
        assert torch.equal(bags[index]["tokens"], cls)
        assert bags[index]["tokens"].dtype == dtype
        assert bags[index]["labels"].tolist() == [float(value) for value in row[1:]]
    assert bags.identity["encoder"] == "dale_ct_2s"
    assert bags.identity["dim"] == 7


def test_bags_share_one_packed_tensor(write_cohort: Any) -> None:
    bags = EmbeddingBags(*write_cohort("train", 5), CLASSES)
    assert bags.tokens.shape == (int(bags.offsets[-1]), 7)
    assert bags[3]["tokens"].data_ptr() == bags.tokens[bags.offsets[3]].data_ptr()


@pytest.mark.parametrize("suffix", ["", ".nii.gz"])
def test_volumes_are_chosen_with_or_without_suffix(write_cohort: Any, suffix: str) -> None:
    folder, labels_csv = write_cohort("train", 7)
    chosen = EmbeddingBags(
        folder, labels_csv, CLASSES[::-1], volumes=[f"train_2_b_1{suffix}", f"train_1_a_1{suffix}"]
    )
    assert chosen.volumes == ["train_2_b_1", "train_1_a_1"]
    everything = EmbeddingBags(folder, labels_csv, CLASSES)
    assert torch.equal(chosen.labels, everything.labels[[3, 0]].flip(1))


def test_labelled_volume_without_embedding_is_counted(
    write_cohort: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder, labels_csv = write_cohort("train", 5)
    (folder / "train_1_b_1.safetensors").unlink()
    (folder / "train_1_b_1.safetensors.partial").touch()
    with caplog.at_level(logging.WARNING):
        volumes = labelled_volumes(folder, labels_csv)
    assert volumes == ["train_1_a_1", "train_2_a_1", "train_2_b_1", "train_3_a_1"]
    assert "1 of 5 labelled volumes have no embedding" in caplog.text
    assert "first 'train_1_b_1'" in caplog.text


def test_folder_without_embeddings_is_refused(tmp_path: Path, write_cohort: Any) -> None:
    _, labels_csv = write_cohort("train", 3)
    with pytest.raises(
        FileNotFoundError, match=r"embeddings_dir must hold <volume>.safetensors files, got none"
    ):
        EmbeddingBags(tmp_path, labels_csv, CLASSES)


def test_embedding_without_labels_is_refused(write_cohort: Any) -> None:
    folder, labels_csv = write_cohort("train", 3)
    write(folder / "train_9_a_1.safetensors")
    with pytest.raises(
        ValueError, match=r"must have a row in '.*', got none for 1 volumes of .*'train_9_a_1'"
    ):
        EmbeddingBags(folder, labels_csv, CLASSES)
    with pytest.raises(
        ValueError, match="every volume must have a row in .*, got none for volume 'train_9_a_1'"
    ):
        EmbeddingBags(folder, labels_csv, CLASSES, volumes=["train_1_a_1", "train_9_a_1"])


def test_volume_without_embedding_is_refused(write_cohort: Any) -> None:
    folder, labels_csv = write_cohort("train", 3)
    (folder / "train_2_a_1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="must hold an embedding of volume 'train_2_a_1', got none"):
        EmbeddingBags(folder, labels_csv, CLASSES, volumes=["train_1_a_1", "train_2_a_1"])


def test_two_rows_of_labels_are_refused(write_cohort: Any) -> None:
    folder, labels_csv = write_cohort("train", 3)
    labels_csv.write_text(labels_csv.read_text() + "train_1_a_1,0,0,0\n")
    with pytest.raises(ValueError, match="one row a volume, got two for volume 'train_1_a_1'"):
        EmbeddingBags(folder, labels_csv, CLASSES)


@pytest.mark.parametrize(
    ("changes", "dim", "message"),
    [
        ({}, 5, "dim must be the same for all embeddings, got 7 for volume 'train_1_a_1' and 5 for"),
        (
            {"encoder": "dale_ct_0"},
            7,
            "encoder must be the same .*'dale_ct_2s' .* and 'dale_ct_0' for volume 'train_2_a_1'",
        ),
        ({"encoder_id": "sha256:0"}, 7, "encoder_id must be the same for all embeddings"),
        (
            {"preprocessing": "raw_256"},
            7,
            "preprocessing must be the same for all .* 'cropped_256' .* 'raw_256'",
        ),
    ],
)
def test_embeddings_of_another_width_or_encoder_are_refused(
    write_cohort: Any, changes: dict[str, str], dim: int, message: str
) -> None:
    folder, labels_csv = write_cohort("train", 3)
    own = read_embedding(folder / "train_1_a_1.safetensors").metadata | {"volume": "train_2_a_1"}
    write(folder / "train_2_a_1.safetensors", dim=dim, **own | changes)
    with pytest.raises(ValueError, match=message):
        EmbeddingBags(folder, labels_csv, CLASSES)


def test_embeddings_of_another_encoder_than_asked_are_refused(write_cohort: Any) -> None:
    folder, labels_csv = write_cohort("train", 3, encoder="dinov2_ct")
    with pytest.raises(
        ValueError, match="encoder must be 'dale_ct_2s', got 'dinov2_ct' for volume 'train_1_a_1'"
    ):
        EmbeddingBags(folder, labels_csv, CLASSES, encoder="dale_ct_2s")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"cls": torch.full((5, 7), torch.nan)},
            "finite, got NaN or Inf in 5 of 5 slices for volume 'train_2_a_1'",
        ),
        (
            {"cls": torch.zeros(0, 7), "z_mm": torch.zeros(0)},
            "at least one slice, got 0 for volume 'train_2_a_1'",
        ),
    ],
)
def test_bag_without_usable_slices_is_refused(
    write_cohort: Any, tensors: dict[str, torch.Tensor], message: str
) -> None:
    folder, labels_csv = write_cohort("train", 3)
    metadata = read_embedding(folder / "train_2_a_1.safetensors").metadata
    good = {"cls": torch.randn(5, 7), "z_mm": torch.arange(5.0)}
    save_file(good | tensors, folder / "train_2_a_1.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        EmbeddingBags(folder, labels_csv, CLASSES)


def test_truncated_embedding_of_a_cohort_is_refused(write_cohort: Any) -> None:
    folder, labels_csv = write_cohort("train", 3)
    path = folder / "train_2_a_1.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"whole safetensors file, got '.*train_2_a_1.safetensors'"):
        EmbeddingBags(folder, labels_csv, CLASSES)


def test_labels_are_float32_for_the_loss(write_cohort: Any) -> None:
    labels = np.array([[1, 0, 1], [0, 0, 1], [1, 1, 0]])
    bags = EmbeddingBags(*write_cohort("train", 3, labels=labels), CLASSES)
    assert bags.labels.dtype == torch.float32
    np.testing.assert_array_equal(bags.labels.numpy(), labels)
