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
    chunks,
    collate_bags,
    fits,
    labelled_volumes,
    open_embeddings,
)
from common.embeddings.store import IDENTITY_KEYS, EmbeddingStore, EmbeddingStoreWriter

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
    with pytest.raises(ValueError, match="tokens of volume .* checksum"):
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


def test_every_epoch_visits_every_bag_once_in_an_order_of_its_own() -> None:
    batches = ShuffledBatches(num_bags=11, batch_size=4, seed=3)
    epochs = [[batches.batch(epoch * 3 + place) for place in range(3)] for epoch in range(2)]
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[4, 4, 3], [4, 4, 3]]
    orders = [sum(epoch, []) for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(11))
    assert orders[0] != orders[1]


def test_batch_depends_on_seed_and_step_alone() -> None:
    batches = ShuffledBatches(num_bags=11, batch_size=4, seed=3)
    straight = list(islice(batches, 10))
    for step in (9, 0, 5, 2):
        assert batches.batch(step) == straight[step]
    resumed = ShuffledBatches(num_bags=11, batch_size=4, seed=3)
    resumed.start_step = 5
    assert list(islice(resumed, 5)) == straight[5:]
    assert list(islice(ShuffledBatches(num_bags=11, batch_size=4, seed=4), 10)) != straight


def test_batch_larger_than_the_cohort_is_the_cohort() -> None:
    assert sorted(ShuffledBatches(num_bags=3, batch_size=16, seed=0).batch(7)) == [0, 1, 2]


@pytest.mark.parametrize(("num_bags", "batch_size"), [(0, 4), (4, 0)])
def test_no_bag_or_no_batch_is_refused(num_bags: int, batch_size: int) -> None:
    message = f"num_bags and batch_size must be at least 1, got {num_bags} and {batch_size}"
    with pytest.raises(ValueError, match=message):
        ShuffledBatches(num_bags, batch_size, seed=0)


def test_collated_bags_keep_their_lengths_and_memory() -> None:
    samples = [
        {"index": index, "tokens": torch.randn(length, 3), "labels": torch.tensor([1.0, 0.0])}
        for index, length in ((4, 2), (1, 5))
    ]
    batch = collate_bags(samples)
    assert batch["index"].tolist() == [4, 1]
    assert [bag.data_ptr() for bag in batch["bags"]] == [sample["tokens"].data_ptr() for sample in samples]
    assert batch["labels"].tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_bags_are_read_where_they_lie_on_a_cpu(write_cohort: Any) -> None:
    bags = EmbeddingBags(*write_cohort("train", 5, dtype=torch.float16), ["Emphysema"])
    reader = BagReader(bags, torch.device("cpu"))
    assert reader.resident is None
    for index, bag in zip((3, 0), reader([3, 0]), strict=True):
        assert bag.dtype == torch.float16
        assert torch.equal(bag, bags[index]["tokens"])
        assert bag.data_ptr() == bags[index]["tokens"].data_ptr()


@pytest.mark.parametrize(
    ("at_once", "expected"),
    [(10**9, [[0, 1, 2], [3, 4]]), (2 * 11 * 7 * 2, [[0, 1], [2, 3], [4]]), (1, [[0], [1], [2], [3], [4]])],
)
def test_a_chunk_has_few_bags_and_few_bytes(
    write_cohort: Any, monkeypatch: pytest.MonkeyPatch, at_once: int, expected: list[list[int]]
) -> None:
    given = write_cohort("train", 5, dtype=torch.float16)
    bags = EmbeddingBags(*given, ["Emphysema"])
    bags.lengths[:] = torch.tensor([3, 11, 5, 4, 9])  # of 7 numbers in 16 bits
    monkeypatch.setattr("common.embeddings.bags.BAGS_PER_CHUNK", 3)
    monkeypatch.setattr("common.embeddings.bags.CHUNK_BYTES", at_once)
    assert [list(places) for places in chunks(bags)] == expected
    assert chunks(EmbeddingBags(*given, ["Emphysema"], volumes=[])) == []


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


@pytest.fixture
def dump_of_arrays(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, length in (("v2", 5), ("v1", 3)):
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((length, 7)).astype(np.float16))
    return tmp_path


def test_arrays_are_read_with_their_checksums(dump_of_arrays: Path) -> None:
    arrays = EmbeddingArrays(dump_of_arrays)
    assert arrays.volumes == ["v1", "v2"]
    assert arrays.lengths.tolist() == [3, 5]
    for volume in ("v2", "v1"):
        tokens = arrays.view(volume)
        assert tokens.dtype == torch.float16
        np.testing.assert_array_equal(tokens, np.load(dump_of_arrays / f"{volume}.npy"))
    expected = [zlib.crc32(np.load(dump_of_arrays / f"{volume}.npy").tobytes()) for volume in ("v2", "v1")]
    assert arrays.checksums(["v2", "v1"]) == expected


def test_what_is_done_to_a_view_stays_out_of_the_file(dump_of_arrays: Path) -> None:
    arrays = EmbeddingArrays(dump_of_arrays)
    before = arrays.view("v1").clone()
    arrays.view("v1").zero_()
    assert torch.equal(arrays.view("v1"), before)


def test_arrays_do_not_say_what_made_them(dump_of_arrays: Path) -> None:
    unknown = dict.fromkeys(("encoder_id", "preprocessing", "slice_order", "token_kind"), "unknown")
    shape = {"dim": 7, "dtype": "float16"}
    assert EmbeddingArrays(dump_of_arrays).identity == unknown | shape | {"encoder": "unknown"}
    assert EmbeddingArrays(dump_of_arrays, "merlin").identity == unknown | shape | {"encoder": "merlin"}


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
def test_bad_arrays_are_refused(dump_of_arrays: Path, array: np.ndarray, message: str) -> None:
    np.save(dump_of_arrays / "v3.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        EmbeddingArrays(dump_of_arrays)


def test_nan_names_its_volume(dump_of_arrays: Path) -> None:
    array = np.load(dump_of_arrays / "v2.npy")
    array[4, 1] = np.nan
    np.save(dump_of_arrays / "v2.npy", array)
    arrays = EmbeddingArrays(dump_of_arrays)
    assert len(arrays.view("v1")) == 3
    with pytest.raises(ValueError, match="NaN or Inf in 1 of 5 rows for volume 'v2'"):
        arrays.view("v2")


def test_what_is_not_there_is_named(dump_of_arrays: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="No array of volume 'v9'"):
        EmbeddingArrays(dump_of_arrays).view("v9")
    with pytest.raises(FileNotFoundError, match=r"got no <volume>.npy there"):
        EmbeddingArrays(tmp_path / "none")


def test_a_truncated_array_is_refused(dump_of_arrays: Path) -> None:
    path = dump_of_arrays / "v1.npy"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="must be a whole .npy array, got .*v1.npy"):
        EmbeddingArrays(dump_of_arrays)
