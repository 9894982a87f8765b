"""Bags of a cohort: embeddings and labels that belong together, and nothing else."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.embeddings.bags import EmbeddingBags, labelled_volumes, open_embeddings
from common.embeddings.part import IDENTITY_KEYS
from common.embeddings.store import EmbeddingStore
from common.embeddings.store_writer import EmbeddingStoreWriter

CLASSES = ["Emphysema", "Lung nodule", "Pleural effusion"]


def add(folder: Path, volume: str) -> None:
    """Embed one more volume."""
    identity = EmbeddingStore(folder).identity
    with EmbeddingStoreWriter(folder, identity, identity["dtype"]) as writer:
        writer.add(volume, torch.randn(5, identity["dim"]), (1, 1, 1), z_mm=torch.arange(5))


def add_label(labels_csv: Path, volume: str) -> None:
    labels_csv.write_text(labels_csv.read_text() + f"{volume},0,1,0\n")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bags_hold_each_volumes_slices_and_labels(write_cohort: Any, dtype: torch.dtype) -> None:
    folder, labels_csv = write_cohort("train", 11, dtype=dtype)
    bags = EmbeddingBags(folder, labels_csv, CLASSES)
    rows = [line.split(",") for line in labels_csv.read_text().splitlines()[1:]]
    assert len(bags) == 11
    assert bags.volumes == [row[0].removesuffix(".nii.gz") for row in rows]
    for index, row in enumerate(rows):
        assert torch.equal(bags[index]["tokens"], EmbeddingStore(folder).read(bags.volumes[index]).tokens)
        assert bags[index]["tokens"].dtype == dtype
        assert bags[index]["labels"].tolist() == [float(value) for value in row[1:]]
    assert bags.identity["encoder"] == "dale_ct_2s"
    assert bags.identity["dim"] == 7


def test_other_volumes_labels_or_tokens_have_another_checksum(write_cohort: Any) -> None:
    folder, labels_csv = write_cohort("train", 7)
    checksum = EmbeddingBags(folder, labels_csv, CLASSES).checksum()
    assert EmbeddingBags(folder, labels_csv, CLASSES).checksum() == checksum
    others = [EmbeddingBags(folder, labels_csv, CLASSES[::-1]).checksum()]
    turned = EmbeddingBags(folder, labels_csv, CLASSES).volumes[::-1]
    others.append(EmbeddingBags(folder, labels_csv, CLASSES, volumes=turned).checksum())
    shutil.rmtree(folder)
    others.append(EmbeddingBags(*write_cohort("train", 7, signal=1e-3), CLASSES).checksum())
    first, *_ = labels_csv.read_text().splitlines()[1:]
    flipped = first[:-1] + str(1 - int(first[-1]))
    labels_csv.write_text(labels_csv.read_text().replace(first, flipped))
    others.append(EmbeddingBags(folder, labels_csv, CLASSES).checksum())
    assert len({checksum, *others}) == 5
    assert len(EmbeddingBags(folder, labels_csv, CLASSES, volumes=[]).checksum()) == 8


def test_a_bag_is_where_it_lies_in_its_file(write_cohort: Any) -> None:
    bags = EmbeddingBags(*write_cohort("train", 5), CLASSES)
    assert bags.lengths.tolist() == [len(bags[index]["tokens"]) for index in range(5)]
    assert bags.row_bytes == bags[3]["tokens"][0].nbytes
    assert bags[3]["tokens"].data_ptr() == bags[3]["tokens"].data_ptr()
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    (file,) = [
        place[-1]
        for place in mapped
        if int(place[0].split("-")[0], 16) <= bags[3]["tokens"].data_ptr() < int(place[0].split("-")[1], 16)
    ]
    assert file.endswith(".embeddings.safetensors")


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
    folder, labels_csv = write_cohort("train", 4)
    add_label(labels_csv, "train_9_a_1")
    with caplog.at_level(logging.WARNING):
        volumes = labelled_volumes(folder, labels_csv)
    assert volumes == ["train_1_a_1", "train_1_b_1", "train_2_a_1", "train_2_b_1"]
    assert "1 of 5 labelled volumes have no embedding" in caplog.text
    assert "first 'train_9_a_1'" in caplog.text


def test_folder_without_embeddings_is_refused(tmp_path: Path, write_cohort: Any) -> None:
    _, labels_csv = write_cohort("train", 3)
    with pytest.raises(
        FileNotFoundError, match=r"embeddings_dir must hold \*.embeddings.safetensors .*, got neither in"
    ):
        EmbeddingBags(tmp_path, labels_csv, CLASSES)


def test_embedding_without_labels_is_refused(write_cohort: Any) -> None:
    folder, labels_csv = write_cohort("train", 3)
    add(folder, "train_9_a_1")
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
    add_label(labels_csv, "train_9_a_1")
    with pytest.raises(
        FileNotFoundError, match=r"an embedding of volume 'train_9_a_1', got none .*1 of 2 are missing"
    ):
        EmbeddingBags(folder, labels_csv, CLASSES, volumes=["train_1_a_1", "train_9_a_1"])


def test_two_rows_of_labels_are_refused(write_cohort: Any) -> None:
    folder, labels_csv = write_cohort("train", 3)
    labels_csv.write_text(labels_csv.read_text() + "train_1_a_1,0,0,0\n")
    with pytest.raises(ValueError, match="one row per volume, got two for volume 'train_1_a_1'"):
        EmbeddingBags(folder, labels_csv, CLASSES)


def test_embeddings_of_another_encoder_than_asked_are_refused(write_cohort: Any) -> None:
    folder, labels_csv = write_cohort("train", 3, encoder="dinov2_ct")
    with pytest.raises(
        ValueError, match="encoder must be 'dale_ct_2s', got 'dinov2_ct' in .*Pass --embeddings_dir"
    ):
        EmbeddingBags(folder, labels_csv, CLASSES, encoder="dale_ct_2s")


def test_a_damaged_embedding_is_refused(write_cohort: Any) -> None:
    folder, labels_csv = write_cohort("train", 3)
    for part in folder.iterdir():
        data = bytearray(part.read_bytes())
        data[-1] ^= 1  # of z_mm or of the tokens, whichever comes last
        data[-200] ^= 1
        part.write_bytes(data)
    bags = EmbeddingBags(folder, labels_csv, CLASSES)
    with pytest.raises(ValueError, match="tokens must have the checksum they were written with"):
        [bags[index] for index in range(3)]


@pytest.fixture
def dump(write_cohort: Any) -> tuple[Path, Path]:
    """A folder of plain arrays, and the labels of their volumes."""
    folder, labels_csv = write_cohort("train", 5)
    store = EmbeddingStore(folder)
    arrays = folder.parent / "arrays"
    arrays.mkdir()
    for volume in store.volumes:
        np.save(arrays / f"{volume}.npy", store.read(volume).tokens.numpy())
    return arrays, labels_csv


def test_a_plain_folder_of_arrays_gives_the_same_bags(dump: tuple[Path, Path]) -> None:
    arrays, labels_csv = dump
    ours = EmbeddingBags(arrays.parent / "train", labels_csv, CLASSES)
    theirs = EmbeddingBags(arrays, labels_csv, CLASSES)
    assert theirs.volumes == ours.volumes
    assert torch.equal(theirs.lengths, ours.lengths)
    for index in range(5):
        assert torch.equal(theirs[index]["tokens"], ours[index]["tokens"])
    assert torch.equal(theirs.labels, ours.labels)
    assert {theirs.identity[key] for key in IDENTITY_KEYS} == {"unknown"}
    assert theirs.identity["dim"] == 7
    assert EmbeddingBags(arrays, labels_csv, CLASSES, encoder="merlin").identity["encoder"] == "merlin"


def test_arrays_beside_a_store_are_refused(dump: tuple[Path, Path]) -> None:
    arrays, labels_csv = dump
    next((arrays.parent / "train").iterdir()).rename(arrays / "0.embeddings.safetensors")
    with pytest.raises(ValueError, match="embeddings_dir must hold .*, got both in"):
        EmbeddingBags(arrays, labels_csv, CLASSES)
    with pytest.raises(FileNotFoundError, match="got neither in"):
        open_embeddings(arrays / "none")


def test_no_volume_at_all_is_an_empty_cohort(write_cohort: Any) -> None:
    bags = EmbeddingBags(*write_cohort("train", 3), CLASSES, volumes=[])
    assert (len(bags), bags.lengths.shape, bags.labels.shape) == (0, (0,), (0, 3))


def test_labels_are_float32_for_the_loss(write_cohort: Any) -> None:
    labels = np.array([[1, 0, 1], [0, 0, 1], [1, 1, 0]])
    bags = EmbeddingBags(*write_cohort("train", 3, labels=labels), CLASSES)
    assert bags.labels.dtype == torch.float32
    np.testing.assert_array_equal(bags.labels.numpy(), labels)
