"""Bags of a cohort: embeddings and labels that belong together, and nothing else."""

import logging
import shutil
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.embeddings.bags import (
    BagReader,
    EmbeddingArrays,
    EmbeddingBags,
    ShuffledBatches,
    check_cohorts,
    collate_bags,
    fits,
    labelled_volumes,
    open_embeddings,
)
from common.embeddings.store import IDENTITY_KEYS, EmbeddingStore, EmbeddingStoreWriter

CLASSES = ["Emphysema", "Lung nodule", "Pleural effusion"]


@pytest.fixture
def train(write_cohort: Any) -> tuple[Path, Path]:
    """Embeddings of three volumes and their label table."""
    return write_cohort("train", 3)


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
    assert bags.labels.dtype == torch.float32  # for the loss
    assert (bags.identity["encoder"], bags.identity["dim"]) == ("dale_ct_2s", 7)


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
    bags = EmbeddingBags(*write_cohort("train", 5, dtype=torch.float16), CLASSES)
    assert bags.lengths.tolist() == [len(bags[index]["tokens"]) for index in range(5)]
    assert bags.row_bytes == bags[3]["tokens"][0].nbytes
    reader = BagReader(bags, torch.device("cpu"))
    assert reader.resident is None
    place = bags[3]["tokens"].data_ptr()
    assert [bag.data_ptr() for bag in reader([3, 0])] == [place, bags[0]["tokens"].data_ptr()]
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [([int(end, 16) for end in words[0].split("-")], words[-1]) for words in mapped]
    (file,) = [name for (first, last), name in spans if first <= place < last]
    assert file.endswith(".embeddings.safetensors")


@pytest.mark.parametrize("suffix", ["", ".nii.gz"])
def test_volumes_are_chosen_with_or_without_suffix(write_cohort: Any, suffix: str) -> None:
    folder, labels_csv = write_cohort("train", 7)
    names = [f"train_2_b_1{suffix}", f"train_1_a_1{suffix}"]
    chosen = EmbeddingBags(folder, labels_csv, CLASSES[::-1], volumes=names)
    assert chosen.volumes == ["train_2_b_1", "train_1_a_1"]
    everything = EmbeddingBags(folder, labels_csv, CLASSES)
    assert torch.equal(chosen.labels, everything.labels[[3, 0]].flip(1))


def test_no_volume_at_all_is_an_empty_cohort(train: tuple[Path, Path]) -> None:
    bags = EmbeddingBags(*train, CLASSES, volumes=[])
    assert (len(bags), bags.lengths.shape, bags.labels.shape) == (0, (0,), (0, 3))
    assert list(BagReader(bags, torch.device("cpu")).chunks()) == []


def test_labelled_volume_without_embedding_is_counted(
    train: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    add_label(train[1], "train_9_a_1")
    with caplog.at_level(logging.WARNING):
        assert labelled_volumes(*train) == ["train_1_a_1", "train_1_b_1", "train_2_a_1"]
    assert "1 of 4 labelled volumes have no embedding" in caplog.text
    assert "first 'train_9_a_1'" in caplog.text


def test_embedding_without_labels_is_refused(train: tuple[Path, Path]) -> None:
    add(train[0], "train_9_a_1")
    with pytest.raises(ValueError, match="1 of 4 .*'train_9_a_1'"):
        EmbeddingBags(*train, CLASSES)
    with pytest.raises(ValueError, match="No row of volume 'train_9_a_1'"):
        EmbeddingBags(*train, CLASSES, volumes=["train_1_a_1", "train_9_a_1"])


def test_volume_without_embedding_is_refused(train: tuple[Path, Path], tmp_path: Path) -> None:
    add_label(train[1], "train_9_a_1")
    with pytest.raises(FileNotFoundError, match="No embedding of volume 'train_9_a_1'"):
        EmbeddingBags(*train, CLASSES, volumes=["train_1_a_1", "train_9_a_1"])
    with pytest.raises(FileNotFoundError, match=f"No embeddings in '{tmp_path}/none'"):
        EmbeddingBags(tmp_path / "none", train[1], CLASSES)


def test_embeddings_of_another_encoder_than_asked_are_refused(train: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="encoder must be 'dinov2_ct', got 'dale_ct_2s'"):
        EmbeddingBags(*train, CLASSES, encoder="dinov2_ct")


def test_a_plain_folder_of_arrays_gives_the_same_bags(write_cohort: Any, tmp_path: Path) -> None:
    folder, labels_csv = write_cohort("train", 5)
    ours = EmbeddingBags(folder, labels_csv, CLASSES)
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    for index, volume in enumerate(ours.volumes):
        np.save(arrays / f"{volume}.npy", ours[index]["tokens"].numpy())
    theirs = EmbeddingBags(arrays, labels_csv, CLASSES)
    assert theirs.volumes == ours.volumes
    assert torch.equal(theirs.lengths, ours.lengths)
    assert all(torch.equal(theirs[index]["tokens"], ours[index]["tokens"]) for index in range(5))
    assert {theirs.identity[key] for key in IDENTITY_KEYS} == {"unknown"}
    assert theirs.identity["dim"] == 7
    assert EmbeddingBags(arrays, labels_csv, CLASSES, encoder="merlin").identity["encoder"] == "merlin"
    next(folder.iterdir()).rename(arrays / "0.embeddings.safetensors")
    with pytest.raises(ValueError, match="holds both"):
        EmbeddingBags(arrays, labels_csv, CLASSES)


@pytest.fixture
def cohorts(write_cohort: Any) -> dict[str, EmbeddingBags]:
    splits = ("train", "validation", "test")
    return {split: EmbeddingBags(*write_cohort(split, 9), CLASSES) for split in splits}


def test_cohorts_that_belong_together_pass_and_a_class_without_positives_is_named(
    cohorts: dict[str, EmbeddingBags], caplog: pytest.LogCaptureFixture
) -> None:
    check_cohorts(cohorts, "patients")
    assert caplog.text == ""
    cohorts["test"].labels[:, 1] = 0
    check_cohorts(cohorts, "patients")
    assert "test (9 volumes) has no positive of ['Lung nodule']" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [("encoder", "dale_ct_0"), ("encoder_id", "sha256:x"), ("preprocessing", "raw_144"), ("dim", 8)],
)
def test_embeddings_of_another_encoder_weights_preprocessing_or_width_are_refused(
    cohorts: dict[str, EmbeddingBags], key: str, value: Any
) -> None:
    cohorts["test"].identity[key] = value
    with pytest.raises(ValueError, match=rf"{key}.*{value}"):
        check_cohorts(cohorts, "patients")


def test_volume_or_patient_on_two_sides_is_refused(cohorts: dict[str, EmbeddingBags]) -> None:
    with pytest.raises(ValueError, match="patients, got 'train_1' in train and test"):
        check_cohorts(cohorts | {"test": cohorts["train"]}, "patients")
    cohorts["test"].volumes[2] = "train_2_z_9"
    with pytest.raises(ValueError, match="patients, got 'train_2' in train and test"):
        check_cohorts(cohorts, "patients")
    check_cohorts(cohorts, "volumes")


def test_collated_bags_have_places_and_labels() -> None:
    samples = [
        {"index": index, "tokens": torch.randn(length, 3), "labels": torch.tensor([1.0, 0.0])}
        for index, length in ((4, 2), (1, 5))
    ]
    batch = collate_bags(samples)
    assert batch["index"].tolist() == [4, 1]
    assert batch["labels"].tolist() == [[1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("at_once", "expected"),
    [(10**9, [[0, 1, 2], [3, 4]]), (2 * 11 * 7 * 2, [[0, 1], [2, 3], [4]]), (1, [[0], [1], [2], [3], [4]])],
)
def test_a_chunk_has_few_bags_and_few_bytes(
    write_cohort: Any, monkeypatch: pytest.MonkeyPatch, at_once: int, expected: list[list[int]]
) -> None:
    bags = EmbeddingBags(*write_cohort("train", 5, dtype=torch.float16), ["Emphysema"])
    bags.lengths[:] = torch.tensor([3, 11, 5, 4, 9])  # of 7 numbers in 16 bits
    monkeypatch.setattr("common.embeddings.bags.BAGS_PER_CHUNK", 3)
    monkeypatch.setattr("common.embeddings.bags.CHUNK_BYTES", at_once)
    chunks = list(BagReader(bags, torch.device("cpu")).chunks())
    assert [list(range(places.start, places.stop)) for places, _ in chunks] == expected
    assert torch.equal(chunks[-1][1][-1], bags[4]["tokens"])


def test_a_gpu_keeps_what_leaves_a_fifth_of_its_memory_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    assert fits(800, torch.device("cuda"))
    assert not fits(801, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.8, 0.0])
def test_resident_and_streamed_bags_are_the_same(
    write_cohort: Any, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr("common.embeddings.bags.RESIDENT_SHARE", share)
    bags = EmbeddingBags(*write_cohort("train", 5, dtype=torch.float16), ["Emphysema"])
    reader = BagReader(bags, torch.device("cuda"))
    assert (reader.resident is not None) == (share > 0)
    for index, bag in zip((3, 0), reader([3, 0]), strict=True):
        assert bag.is_cuda
        assert torch.equal(bag.cpu(), bags[index]["tokens"])


def test_every_epoch_visits_every_bag_once_in_another_order() -> None:
    batches = ShuffledBatches(num_bags=11, batch_size=4, seed=3)
    epochs = [[batches.batch(epoch * 3 + place) for place in range(3)] for epoch in range(2)]
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[4, 4, 3], [4, 4, 3]]
    orders = [sum(epoch, []) for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(11))
    assert orders[0] != orders[1]
    assert sorted(ShuffledBatches(num_bags=3, batch_size=16, seed=0).batch(7)) == [0, 1, 2]


def test_batch_depends_on_seed_and_step_alone() -> None:
    batches = ShuffledBatches(num_bags=11, batch_size=4, seed=3)
    straight = list(islice(batches, 10))
    for step in (9, 0, 5, 2):
        assert batches.batch(step) == straight[step]
    resumed = ShuffledBatches(num_bags=11, batch_size=4, seed=3)
    resumed.start_step = 5
    assert list(islice(resumed, 5)) == straight[5:]
    assert list(islice(ShuffledBatches(num_bags=11, batch_size=4, seed=4), 10)) != straight


@pytest.mark.parametrize(("num_bags", "batch_size"), [(0, 4), (4, 0)])
def test_no_bag_or_no_batch_is_refused(num_bags: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"num_bags.* {num_bags} and {batch_size}"):
        ShuffledBatches(num_bags, batch_size, seed=0)


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, length in (("v2", 5), ("v1", 3)):
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((length, 7)).astype(np.float16))
    return tmp_path


def test_arrays_are_read_with_their_checksums(arrays: Path) -> None:
    read = EmbeddingArrays(arrays)
    assert read.volumes == ["v1", "v2"]
    assert read.lengths.tolist() == [3, 5]
    assert (read.identity["dim"], read.identity["dtype"]) == (7, "float16")
    stored = {volume: np.load(arrays / f"{volume}.npy") for volume in ("v2", "v1")}
    for volume, array in stored.items():
        assert read.view(volume).dtype == torch.float16
        np.testing.assert_array_equal(read.view(volume), array)
    assert read.checksums(["v2", "v1"]) == [zlib.crc32(array.tobytes()) for array in stored.values()]


def test_what_is_done_to_a_view_stays_out_of_the_file(arrays: Path) -> None:
    read = EmbeddingArrays(arrays)
    before = read.view("v1").clone()
    read.view("v1").zero_()
    assert torch.equal(read.view("v1"), before)


def test_float64_is_read_as_float32(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.full((2, 3), 1 / 3))
    read = EmbeddingArrays(tmp_path)
    assert read.identity["dtype"] == "float32"
    assert torch.equal(read.view("v"), torch.full((2, 3), 1 / 3))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 6), np.float16), "width 7.* width 6|width 6.* width 7"),
        (np.zeros((2, 7), np.float32), "float16.*float32|float32.*float16"),
        (np.zeros((0, 7), np.float16), r"at least one token, got float16 \(0, 7\) in .*v3"),
        (np.zeros(7, np.float16), r"\(S, D\) .*, got float16 \(7,\) in .*v3"),
        (np.zeros((2, 7), int), r"got int64 \(2, 7\) in .*v3"),
        (np.array([{"a": 1}]), "v3.npy' is not a whole .npy array .*Python objects"),
    ],
)
def test_bad_arrays_are_refused(arrays: Path, array: np.ndarray, message: str) -> None:
    np.save(arrays / "v3.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        EmbeddingArrays(arrays)


def test_missing_damaged_and_nan_arrays_are_named(arrays: Path) -> None:
    array = np.load(arrays / "v2.npy")
    array[4, 1] = np.nan
    np.save(arrays / "v2.npy", array)
    read = EmbeddingArrays(arrays)
    assert len(read.view("v1")) == 3
    with pytest.raises(ValueError, match="NaN or Inf in 1 of 5 rows .*'v2'"):
        read.view("v2")
    with pytest.raises(KeyError, match="'v9'"):
        read.view("v9")
    path = arrays / "v1.npy"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="v1.npy' is not a whole"):
        open_embeddings(arrays)
