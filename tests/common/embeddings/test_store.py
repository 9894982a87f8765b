"""What was written comes back, and what is no longer what was written does not."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.embeddings.store import EmbeddingStore, EmbeddingStoreWriter, stored_volumes

IDENTITY = {
    "encoder": "dale_ct_2s",
    "encoder_id": "sha256:0",
    "preprocessing": "cropped_256",
    "slice_order": "feet_to_head",
    "token_kind": "slice",
}
LENGTHS = {"b": 5, "a": 3, "d": 4, "c": 1}


def tokens_of(volume: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(ord(volume))
    return torch.randn(LENGTHS[volume], 7, generator=generator)


def patches_of(volume: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(ord(volume) + 1000)
    num_patches = 6 if volume == "d" else 4  # whole slices give each volume a grid of its own
    return torch.randn(LENGTHS[volume], num_patches, 7, generator=generator)


def write(folder: Path, volumes: str = "badc", dtype: str = "float32", patches: bool = True) -> Path:
    with EmbeddingStoreWriter(folder, IDENTITY, dtype, part_bytes=1000) as writer:
        for volume in volumes:
            writer.add(
                volume,
                tokens_of(volume),
                (0.7, 0.8, 2.5),
                z_mm=2.5 * torch.arange(LENGTHS[volume]),
                patches=patches_of(volume) if patches else None,
                pooled=tokens_of(volume).mean(0),
                patch_grid=[2, 3 if volume == "d" else 2],
            )
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_field_comes_back(tmp_path: Path, dtype: str) -> None:
    store = EmbeddingStore(write(tmp_path, dtype=dtype))
    stored = getattr(torch, dtype)
    assert len(list(tmp_path.iterdir())) == 2  # parts
    assert len(store) == 4
    assert store.volumes == ["a", "b", "c", "d"]
    assert store.lengths.tolist() == [3, 5, 1, 4]
    assert store.identity == IDENTITY | {"dim": 7, "dtype": dtype}
    assert store.fields == ("z_mm", "patches", "pooled")
    for volume in store.volumes:
        embedding = store.read(volume)
        assert torch.equal(embedding.tokens, tokens_of(volume).to(stored))
        assert embedding.tokens.dtype == stored
        assert embedding.z_mm is not None
        assert embedding.z_mm.tolist() == (2.5 * np.arange(LENGTHS[volume])).tolist()
        assert embedding.pooled is not None
        assert torch.equal(embedding.pooled, tokens_of(volume).mean(0).to(stored))
        assert embedding.metadata["spacing_mm"] == [0.7, 0.8, 2.5]
        assert embedding.metadata["patch_grid"] == [2, 3 if volume == "d" else 2]
        assert embedding.patches is None
        assert torch.equal(store.read_patches(volume), patches_of(volume).to(stored))


def test_patches_of_some_slices_come_in_the_order_asked_for(tmp_path: Path) -> None:
    store = EmbeddingStore(write(tmp_path))
    assert torch.equal(store.read_patches("d", [3, 0, 3]), patches_of("d")[[3, 0, 3]])
    assert store.read_patches("b", []).shape == (0, 4, 7)
    with pytest.raises(ValueError, match=r"slices must lie in 0..4, got \[5\] for volume 'b'"):
        store.read_patches("b", [5])
    with pytest.raises(ValueError, match=r"got \[-1\]"):
        store.read_patches("b", [-1])


def test_a_view_is_a_field_where_it_lies(tmp_path: Path) -> None:
    store = EmbeddingStore(write(tmp_path))
    for volume in "dab":
        assert torch.equal(store.view(volume), tokens_of(volume))
        assert torch.equal(store.view(volume, "z_mm"), store.read(volume).z_mm)
    assert store.view("a").data_ptr() == store.view("a").data_ptr() != store.view("b").data_ptr()


def test_a_store_can_be_sent_to_another_process(tmp_path: Path) -> None:
    store = pickle.loads(pickle.dumps(EmbeddingStore(write(tmp_path))))
    assert torch.equal(store.read("c").tokens, tokens_of("c"))


def test_copies_do_not_change_the_store(tmp_path: Path) -> None:
    store = EmbeddingStore(write(tmp_path))
    store.read("a").tokens.zero_()
    store.read_patches("a").zero_()
    assert torch.equal(store.read("a").tokens, tokens_of("a"))
    assert torch.equal(store.read_patches("a"), patches_of("a"))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    store = EmbeddingStore(write(tmp_path, patches=False))
    for read in (store.read, store.view):
        with pytest.raises(KeyError, match="volume must be one of .*got 'z', which is not embedded"):
            read("z")
    with pytest.raises(ValueError, match="patches must have been stored, got only .*--patch_tokens True"):
        store.read_patches("a")
    with pytest.raises(FileNotFoundError, match=r"got no \*.embeddings.safetensors there. Run the inference"):
        EmbeddingStore(tmp_path / "none")


def flip_a_bit(path: Path, value: torch.Tensor) -> None:
    """Change the last bit of the first byte of a value that occurs once in a file."""
    data = bytearray(path.read_bytes())
    wanted = value.numpy().tobytes()
    assert data.count(wanted) == 1
    data[data.index(wanted)] ^= 1
    path.write_bytes(data)


def test_one_changed_bit_is_noticed_where_it_is(tmp_path: Path) -> None:
    write(tmp_path, "ac", patches=True)
    (part,) = tmp_path.iterdir()
    flip_a_bit(part, patches_of("a")[1, 2])
    store = EmbeddingStore(tmp_path)
    assert torch.equal(store.read("a").tokens, tokens_of("a"))
    assert torch.equal(store.read_patches("a", [0, 2]), patches_of("a")[[0, 2]])
    with pytest.raises(ValueError, match="patches must have the checksum .* another for volume 'a' in"):
        store.read_patches("a")
    flip_a_bit(part, tokens_of("a")[1])
    store = EmbeddingStore(tmp_path)
    assert torch.equal(store.read("c").tokens, tokens_of("c"))
    with pytest.raises(ValueError, match="tokens must have the checksum .* another for volume 'a' in"):
        store.read("a")
    with pytest.raises(ValueError, match="tokens must have the checksum .* Delete the file and embed"):
        store.view("a")


def test_parts_of_two_origins_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a")
    with EmbeddingStoreWriter(tmp_path / "other", IDENTITY | {"encoder_id": "sha256:1"}, "float32") as writer:
        writer.add("z", torch.zeros(2, 7), (1, 1, 1))
    (part,) = (tmp_path / "other").iterdir()
    part.rename(tmp_path / part.name)
    with pytest.raises(
        ValueError,
        match="encoder_id must be the same for all embeddings, got 'sha256:.' for volume '.' and 'sha256:",
    ):
        EmbeddingStore(tmp_path)


def test_a_volume_in_two_parts_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a")
    write(tmp_path / "other", "ac")
    (part,) = (tmp_path / "other").iterdir()
    part.rename(tmp_path / part.name)
    with pytest.raises(ValueError, match="a volume must be embedded once, got .* for volume 'a'"):
        EmbeddingStore(tmp_path)


def test_volumes_of_no_store_are_none(tmp_path: Path) -> None:
    assert stored_volumes(tmp_path / "none") == set()
    (tmp_path / "x.embeddings.safetensors.partial").touch()
    assert stored_volumes(tmp_path) == set()
    assert stored_volumes(write(tmp_path)) == set("abcd")


IDENTITY_of_store_writer = {
    "encoder": "ct_fm",
    "encoder_id": "sha256:0",
    "preprocessing": "ct_fm",
    "slice_order": "none",
    "token_kind": "grid",
}
SPACING_MM = (0.7, 0.7, 3.0)


def test_parts_are_written_when_full_and_at_the_end(tmp_path: Path) -> None:
    with EmbeddingStoreWriter(tmp_path, IDENTITY_of_store_writer, "float16", part_bytes=100) as writer:
        found = []
        for volume in "abcde":  # 2 x 15 numbers of 2 bytes: two volumes fill a part
            writer.add(volume, torch.ones(2, 15), SPACING_MM)
            found.append(len(stored_volumes(tmp_path)))
    assert found == [0, 2, 2, 4, 4]
    assert stored_volumes(tmp_path) == set("abcde")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_part_is_written_when_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    writer = EmbeddingStoreWriter(tmp_path, IDENTITY_of_store_writer, "float16", part_seconds=60)
    for seconds, expected in ((0, 0), (59, 0), (60, 3), (100, 3), (161, 5)):
        now[0] = 100.0 + seconds
        writer.add(f"v{seconds}", torch.ones(2, 3), SPACING_MM)
        assert len(stored_volumes(tmp_path)) == expected


def test_what_was_added_before_an_error_is_kept(tmp_path: Path) -> None:
    def write() -> None:
        with EmbeddingStoreWriter(tmp_path, IDENTITY_of_store_writer, "float32") as writer:
            for volume, num_tokens in (("a", 2), ("b", 0)):
                writer.add(volume, torch.ones(num_tokens, 3), SPACING_MM)

    with pytest.raises(ValueError, match="at least one token"):
        write()
    assert stored_volumes(tmp_path) == {"a"}


@pytest.mark.slow
def test_a_killed_process_loses_only_the_part_it_was_filling(tmp_path: Path) -> None:
    program = f"""
import torch
from common.embeddings.store import EmbeddingStoreWriter
writer = EmbeddingStoreWriter({str(tmp_path)!r}, {IDENTITY}, "float16", part_bytes=100)
for number in range(7):
    writer.add(str(number), torch.ones(2, 15), {SPACING_MM})
print("added", flush=True)
input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path.cwd()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"added\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert stored_volumes(tmp_path) == set("012345")
    with EmbeddingStoreWriter(tmp_path, IDENTITY_of_store_writer, "float16") as writer:
        writer.add("6", torch.ones(2, 15), SPACING_MM)
    assert EmbeddingStore(tmp_path).volumes == list("0123456")


def test_writers_side_by_side_share_a_folder(tmp_path: Path) -> None:
    first, second = (EmbeddingStoreWriter(tmp_path, IDENTITY_of_store_writer, "float32") for _ in range(2))
    first.add("a", torch.ones(2, 3), SPACING_MM, grid_shape=[1, 1, 2])
    second.add("b", torch.zeros(4, 3), SPACING_MM, grid_shape=[1, 2, 2])
    first.close()
    second.close()
    store = EmbeddingStore(tmp_path)
    assert store.volumes == ["a", "b"]
    assert store.fields == ()
    assert store.read("b").metadata["grid_shape"] == [1, 2, 2]
    assert store.read("b").z_mm is None


@pytest.mark.parametrize(
    ("identity", "dtype", "message"),
    [
        (
            {"encoder": "merlin"},
            "float16",
            "encoder must be 'ct_fm' as in .*, got 'merlin'. Write into another",
        ),
        ({"encoder_id": "sha256:1"}, "float16", "encoder_id must be 'sha256:0' as in"),
        ({"preprocessing": "x"}, "float16", "preprocessing must be 'ct_fm' as in"),
        ({}, "float32", "dtype must be 'float16' as in .*, got 'float32'"),
        ({"token_kind": "pixel"}, "float16", r"token_kind must be one of \('slice', 'grid'\), got 'pixel'"),
        ({}, "bfloat16", r"dtype must be one of \('float16', 'float32'\), got 'bfloat16'"),
    ],
)
def test_another_origin_is_refused_at_once(
    tmp_path: Path, identity: dict[str, str], dtype: str, message: str
) -> None:
    with EmbeddingStoreWriter(tmp_path, IDENTITY_of_store_writer, "float16") as writer:
        writer.add("a", torch.ones(2, 3), SPACING_MM)
    with pytest.raises(ValueError, match=message):
        EmbeddingStoreWriter(tmp_path, IDENTITY_of_store_writer | identity, dtype)
    with pytest.raises(ValueError, match=r"identity must have the keys .*, got none of \['encoder'\]"):
        EmbeddingStoreWriter(
            tmp_path,
            {key: IDENTITY_of_store_writer[key] for key in IDENTITY_of_store_writer if key != "encoder"},
            "float16",
        )


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize(
    ("volume", "arguments", "message"),
    [
        ("a", {}, "a volume must be embedded once, got 'a' again"),
        ("b", {"tokens": torch.ones(2, 4)}, "dim must be 3 as in .*, got 4"),
        ("b", {"pooled": torch.ones(3)}, r"fields must be \(\) as in .*, got \('pooled',\)"),
        ("b", {"z_mm": torch.arange(2)}, r"fields must be \(\) as in .*, got \('z_mm',\)"),
    ],
)
def test_a_volume_unlike_the_others_is_refused(
    tmp_path: Path, volume: str, arguments: dict[str, Any], message: str, reopened: bool
) -> None:
    writer = EmbeddingStoreWriter(tmp_path, IDENTITY_of_store_writer, "float16")
    writer.add("a", torch.ones(2, 3), SPACING_MM)
    if reopened:
        writer.close()
        writer = EmbeddingStoreWriter(tmp_path, IDENTITY_of_store_writer, "float16")
    with pytest.raises(ValueError, match=message):
        writer.add(volume, **{"tokens": torch.ones(2, 3), "spacing_mm": SPACING_MM} | arguments)


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    writer = EmbeddingStoreWriter(tmp_path, IDENTITY_of_store_writer, "float16")
    with pytest.raises(ValueError, match="NaN or Inf in 1 of 2 rows for volume 'a'. Store float32"):
        writer.add("a", torch.tensor([[1.0], [70000.0]]), SPACING_MM)
    writer.close()
    assert stored_volumes(tmp_path) == set()
