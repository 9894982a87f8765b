"""What was written comes back, and what is no longer what was written does not."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from isal import isal_zlib
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.embeddings import store as store_module
from common.embeddings.store import (
    EmbeddingStore,
    EmbeddingStoreWriter,
    check_finite,
    check_identity,
    crc32,
    stored_volumes,
)

IDENTITY = {
    "encoder": "dale_ct_2s",
    "encoder_id": "sha256:0",
    "preprocessing": "cropped_256",
    "slice_order": "feet_to_head",
    "token_kind": "slice",
}
LENGTHS = {"b": 5, "a": 3, "d": 4, "c": 1}
SPACING_MM = (0.7, 0.8, 2.5)


def tokens_of(volume: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(ord(volume))
    return torch.randn(LENGTHS[volume], 7, generator=generator)


def patches_of(volume: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(ord(volume) + 1000)
    num_patches = 6 if volume == "d" else 4  # whole slices give each volume a grid of its own
    return torch.randn(LENGTHS[volume], num_patches, 7, generator=generator)


def write(folder: Path, volumes: str = "badc", dtype: str = "float32", patches: bool = True) -> Path:
    with EmbeddingStoreWriter(folder, IDENTITY, dtype) as writer:
        for volume in volumes:
            writer.add(
                volume,
                tokens_of(volume),
                SPACING_MM,
                z_mm=2.5 * torch.arange(LENGTHS[volume]),
                patches=patches_of(volume) if patches else None,
                patch_grid=[2, 3 if volume == "d" else 2],
            )
    return folder


def part_of(folder: Path) -> Path:
    (part,) = folder.glob("*.embeddings.safetensors")
    return part


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_field_comes_back(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "PART_BYTES", 1000)
    store = EmbeddingStore(write(tmp_path, dtype=dtype))
    stored = getattr(torch, dtype)
    assert len(list(tmp_path.iterdir())) == 2  # parts
    assert len(store) == 4
    assert store.volumes == ["a", "b", "c", "d"]
    assert store.lengths.tolist() == [3, 5, 1, 4]
    assert store.identity == IDENTITY | {"dim": 7, "dtype": dtype}
    assert store.fields == ("z_mm", "patches")
    for volume in store.volumes:
        embedding = store.read(volume)
        assert torch.equal(embedding.tokens, tokens_of(volume).to(stored))
        assert embedding.tokens.dtype == stored
        assert embedding.z_mm is not None
        assert embedding.z_mm.tolist() == (2.5 * np.arange(LENGTHS[volume])).tolist()
        assert embedding.metadata["spacing_mm"] == [0.7, 0.8, 2.5]
        assert embedding.metadata["patch_grid"] == [2, 3 if volume == "d" else 2]
        assert embedding.patches is None
        assert torch.equal(store.read_patches(volume), patches_of(volume).to(stored))
        assert torch.equal(store.view(volume), embedding.tokens)
        assert torch.equal(store.view(volume, "z_mm"), embedding.z_mm)


def test_patches_of_some_slices_come_in_the_order_asked_for(tmp_path: Path) -> None:
    store = EmbeddingStore(write(tmp_path))
    assert torch.equal(store.read_patches("d", [3, 0, 3]), patches_of("d")[[3, 0, 3]])
    assert store.read_patches("b", []).shape == (0, 4, 7)
    for outside in (5, -1):
        with pytest.raises(ValueError, match=rf"slices.*0\.\.4.*{outside}.*'b'"):
            store.read_patches("b", [outside])


def test_a_view_is_the_file_itself_and_copies_do_not_change_it(tmp_path: Path) -> None:
    store = EmbeddingStore(write(tmp_path))
    assert store.view("a").data_ptr() == store.view("a").data_ptr() != store.view("b").data_ptr()
    store.read("a").tokens.zero_()
    store.read_patches("a").zero_()
    assert torch.equal(store.read("a").tokens, tokens_of("a"))
    assert torch.equal(store.read_patches("a"), patches_of("a"))


def test_a_store_can_be_sent_to_another_process(tmp_path: Path) -> None:
    sent = pickle.dumps(EmbeddingStore(write(tmp_path)))
    assert len(sent) < 500  # the folder, not what is in it
    assert torch.equal(pickle.loads(sent).read("c").tokens, tokens_of("c"))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    store = EmbeddingStore(write(tmp_path, patches=False))
    for read in (store.read, store.view):
        with pytest.raises(KeyError, match=f"'z' in '{tmp_path}'"):
            read("z")
    with pytest.raises(ValueError, match=f"patch.*'{tmp_path}'.*--patch_tokens"):
        store.read_patches("a")
    with pytest.raises(FileNotFoundError, match=r"none'.*\*.embeddings.safetensors"):
        EmbeddingStore(tmp_path / "none")


def test_a_part_is_an_ordinary_safetensors_file_named_for_its_volumes(tmp_path: Path) -> None:
    first, again, other = (
        part_of(write(tmp_path / str(n), names)) for n, names in enumerate(("ab", "ab", "ba"))
    )
    assert first.name == again.name != other.name
    tensors = load_file(first)
    assert set(tensors) == {"tokens", "z_mm", "patches", "patches_crc32"}
    assert torch.equal(tensors["tokens"], torch.cat([tokens_of("a"), tokens_of("b")]))
    with safe_open(first, framework="pt") as file:
        (record, _) = json.loads(file.metadata()["volumes"])
    assert record["crc32"]["tokens"] == isal_zlib.crc32(tokens_of("a").numpy().tobytes())


def test_checksum_is_that_of_the_bytes_in_order() -> None:
    tensor = torch.arange(12, dtype=torch.float16).reshape(3, 4)
    assert crc32(tensor.T) == isal_zlib.crc32(tensor.T.numpy().tobytes()) != crc32(tensor)


def rewritten(part: Path, tensors: dict[str, torch.Tensor], **changes: str) -> None:
    """Write a part anew with other tensors and header entries, and the checksum that these have."""
    with safe_open(part, framework="pt") as file:
        header = file.metadata() | changes
    text = "".join(header[name] for name in ("identity", "fields", "volumes"))
    save_file(tensors, part, metadata=header | {"crc32": str(isal_zlib.crc32(text.encode()))})


def test_parts_of_the_versions_that_also_stored_a_pooled_vector_are_read_and_added_to(tmp_path: Path) -> None:
    write(tmp_path, "ab")
    part = part_of(tmp_path)
    rewritten(part, load_file(part) | {"pooled": torch.ones(2, 4)}, fields='["z_mm", "patches", "pooled"]')
    write(tmp_path, "c")
    store = EmbeddingStore(tmp_path)
    assert store.volumes == list("abc")
    assert store.fields == ("z_mm", "patches")
    assert torch.equal(store.read("b").tokens, tokens_of("b"))


@pytest.mark.parametrize("kept", [4, 40, -3])
def test_a_truncated_part_is_refused(tmp_path: Path, kept: int) -> None:
    part = part_of(write(tmp_path))
    part.write_bytes(part.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{part.name}.*Delete"):
        EmbeddingStore(tmp_path)


@pytest.mark.parametrize("said", [b"spacing_mm", b"crc32", b"dale_ct"])
def test_a_header_that_was_changed_is_refused(tmp_path: Path, said: bytes) -> None:
    part = part_of(write(tmp_path))
    data = part.read_bytes()
    assert said in data
    part.write_bytes(data.replace(said, said.swapcase(), 1))
    with pytest.raises(ValueError, match=f"{part.name}.*Delete"):
        EmbeddingStore(tmp_path)


def test_a_foreign_file_and_other_rows_than_stated_are_refused(tmp_path: Path) -> None:
    part = part_of(write(tmp_path, "bc"))
    tensors = load_file(part)
    rewritten(part, tensors | {"tokens": tensors["tokens"][:-1].clone()})
    with pytest.raises(ValueError, match=f"{part.name}.*'tokens': 6"):
        EmbeddingStore(tmp_path)
    save_file({"tokens": torch.zeros(2, 3)}, part)
    with pytest.raises(ValueError, match=f"{part.name}.*format is None"):
        EmbeddingStore(tmp_path)


def flip_a_bit(path: Path, value: torch.Tensor) -> None:
    """Change the last bit of the first byte of a value that occurs once in a file."""
    data = bytearray(path.read_bytes())
    wanted = value.numpy().tobytes()
    assert data.count(wanted) == 1
    data[data.index(wanted)] ^= 1
    path.write_bytes(data)


def test_one_changed_bit_is_noticed_where_it_is(tmp_path: Path) -> None:
    part = part_of(write(tmp_path, "ac"))
    flip_a_bit(part, patches_of("a")[1, 2])
    store = EmbeddingStore(tmp_path)
    assert torch.equal(store.read("a").tokens, tokens_of("a"))
    assert torch.equal(store.read_patches("a", [0, 2]), patches_of("a")[[0, 2]])
    with pytest.raises(ValueError, match="patches.*'a'.*checksum"):
        store.read_patches("a")
    flip_a_bit(part, tokens_of("a")[1])
    store = EmbeddingStore(tmp_path)
    assert torch.equal(store.read("c").tokens, tokens_of("c"))
    for read in (store.read, store.view):
        with pytest.raises(ValueError, match=f"tokens.*'a'.*{part.name}.*checksum.*Delete"):
            read("a")


def test_parts_of_two_origins_and_volumes_in_two_parts_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a")
    write(tmp_path / "twice", "ac")
    with EmbeddingStoreWriter(tmp_path / "other", IDENTITY | {"encoder_id": "sha256:1"}, "float32") as writer:
        writer.add("z", torch.zeros(2, 7), (1, 1, 1))
    part = part_of(tmp_path / "other").rename(tmp_path / part_of(tmp_path / "other").name)
    with pytest.raises(ValueError, match="encoder_id.*sha256:.*sha256:"):
        EmbeddingStore(tmp_path)
    part.unlink()
    part_of(tmp_path / "twice").rename(tmp_path / part_of(tmp_path / "twice").name)
    with pytest.raises(ValueError, match="'a' is in .* and in .*Delete one"):
        EmbeddingStore(tmp_path)


def test_an_identity_is_compared_as_far_as_both_sides_state_it() -> None:
    about = {"of": "'w.safetensors'", "source": "the probe needs", "remedy": "Embed again."}
    check_identity({"dim": 3, "encoder": "a"}, {"dim": 3, "pooler": "max"}, **about)
    with pytest.raises(
        ValueError, match=r"dim of 'w\.safetensors' .* 4 as the probe needs.* 3\. Embed again"
    ):
        check_identity({"dim": 3}, {"dim": 4}, **about)


def test_where_weights_were_found_is_kept_and_does_not_tell_embeddings_apart(tmp_path: Path) -> None:
    for number, place in enumerate(("hub:owner/name@abc", "models/model.safetensors", None)):
        origin = {} if place is None else {"weights": place}
        with EmbeddingStoreWriter(tmp_path, IDENTITY | origin, "float32") as writer:
            writer.add(f"v{number}", torch.zeros(2, 7), SPACING_MM)
        if number == 0:
            assert EmbeddingStore(tmp_path).identity == IDENTITY | origin | {"dim": 7, "dtype": "float32"}
    assert EmbeddingStore(tmp_path).volumes == ["v0", "v1", "v2"]
    check_identity({"weights": "a"}, {"weights": "b"}, of="these", source="those", remedy="None.")


def test_volumes_of_no_store_are_none(tmp_path: Path) -> None:
    assert stored_volumes(tmp_path / "none") == set()
    (tmp_path / "x.embeddings.safetensors.partial").touch()
    assert stored_volumes(tmp_path) == set()
    assert stored_volumes(write(tmp_path)) == set("abcd")


GRID = IDENTITY | {"encoder": "ct_fm", "preprocessing": "ct_fm", "slice_order": "none", "token_kind": "grid"}


def test_parts_are_written_when_full_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "PART_BYTES", 100)
    with EmbeddingStoreWriter(tmp_path, GRID, "float16") as writer:
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
    monkeypatch.setattr(store_module, "PART_SECONDS", 60)
    writer = EmbeddingStoreWriter(tmp_path, GRID, "float16")
    for seconds, expected in ((0, 0), (59, 0), (60, 3), (100, 3), (161, 5)):
        now[0] = 100.0 + seconds
        writer.add(f"v{seconds}", torch.ones(2, 3), SPACING_MM)
        assert len(stored_volumes(tmp_path)) == expected


def test_what_was_added_before_an_error_is_kept(tmp_path: Path) -> None:
    def write_two() -> None:
        with EmbeddingStoreWriter(tmp_path, GRID, "float32") as writer:
            for volume, num_tokens in (("a", 2), ("b", 0)):
                writer.add(volume, torch.ones(num_tokens, 3), SPACING_MM)

    with pytest.raises(ValueError, match="T > 0.*'b'"):
        write_two()
    assert stored_volumes(tmp_path) == {"a"}


def test_a_process_that_ends_early_loses_only_the_part_it_was_filling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PART_BYTES", 100)
    killed = EmbeddingStoreWriter(tmp_path, GRID, "float16")  # never closed
    for number in range(7):
        killed.add(str(number), torch.ones(2, 15), SPACING_MM)
    del killed
    assert stored_volumes(tmp_path) == set("012345")
    with EmbeddingStoreWriter(tmp_path, GRID, "float16") as writer:
        writer.add("6", torch.ones(2, 15), SPACING_MM)
    assert EmbeddingStore(tmp_path).volumes == list("0123456")


def test_writers_side_by_side_share_a_folder(tmp_path: Path) -> None:
    first, second = (EmbeddingStoreWriter(tmp_path, GRID, "float32") for _ in range(2))
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
        ({"encoder": "merlin"}, "float16", "encoder of .*'ct_fm' as in .*'merlin'"),
        ({"encoder_id": "sha256:1"}, "float16", "encoder_id of .*'sha256:0'"),
        ({"preprocessing": "x"}, "float16", "preprocessing of .*'ct_fm'"),
        ({}, "float32", "dtype of .*'float16' as in .*'float32'"),
        ({"token_kind": "pixel"}, "float16", r"token_kind .*\('slice', 'grid', 'organ'\), got 'pixel'"),
        ({}, "bfloat16", r"dtype .*\('float16', 'float32'\), got 'bfloat16'"),
    ],
)
def test_another_origin_is_refused_at_once(
    tmp_path: Path, identity: dict[str, str], dtype: str, message: str
) -> None:
    with EmbeddingStoreWriter(tmp_path, GRID, "float16") as writer:
        writer.add("a", torch.ones(2, 3), SPACING_MM)
    with pytest.raises(ValueError, match=message):
        EmbeddingStoreWriter(tmp_path, GRID | identity, dtype)
    with pytest.raises(ValueError, match=r"identity.*\['encoder'\]"):
        EmbeddingStoreWriter(tmp_path, {key: GRID[key] for key in GRID if key != "encoder"}, "float16")


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize(
    ("volume", "arguments", "message"),
    [
        ("a", {}, "'a' is already"),
        ("b", {"tokens": torch.ones(2, 4)}, "dim .* 3 as in .*, got 4"),
        ("b", {"patches": torch.ones(2, 1, 3)}, r"fields .* \(\) as in .*, got \('patches',\)"),
        ("b", {"z_mm": torch.arange(2)}, r"fields .* \(\) as in .*, got \('z_mm',\)"),
    ],
)
def test_a_volume_unlike_the_others_is_refused(
    tmp_path: Path, volume: str, arguments: dict[str, Any], message: str, reopened: bool
) -> None:
    writer = EmbeddingStoreWriter(tmp_path, GRID, "float16")
    writer.add("a", torch.ones(2, 3), SPACING_MM)
    if reopened:
        writer.close()
        writer = EmbeddingStoreWriter(tmp_path, GRID, "float16")
    with pytest.raises(ValueError, match=message):
        writer.add(volume, **{"tokens": torch.ones(2, 3), "spacing_mm": SPACING_MM} | arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(5)}, r"tokens.*\(T, D\).*\(5,\)"),
        ({"tokens": torch.zeros(0, 7)}, r"T > 0.*\(0, 7\).*'v'"),
        ({"z_mm": torch.zeros(4)}, r"z_mm.*\(5,\), got \(4,\)"),
        ({"z_mm": -torch.arange(5.0)}, "z_mm must rise"),
        ({"tokens": torch.ones(5, 7).index_fill_(0, torch.tensor([2, 4]), 70000.0)}, "2 of 5 rows.*float32"),
        ({"patches": torch.zeros(4, 9, 7)}, r"patches.*\(5, P, 7\), got \(4, 9, 7\)"),
        ({"patches": torch.full((5, 2, 7), -torch.inf)}, "patches .* 5 of 5 rows"),
        ({"spacing_mm": (1, 1, 0)}, r"spacing_mm.*\[1.0, 1.0, 0.0\].*'v'"),
        ({"grid_shape": [2, 3]}, r"grid_shape .* 5 cells.*\[2, 3\].*'v'"),
    ],
)
def test_what_a_reader_could_not_rely_on_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    good = {"tokens": torch.randn(5, 7), "spacing_mm": SPACING_MM, "z_mm": torch.arange(5) * 1.5}
    with EmbeddingStoreWriter(tmp_path, IDENTITY, "float16") as writer:
        with pytest.raises(ValueError, match=message):
            writer.add("v", **good | changes)
    assert stored_volumes(tmp_path) == set()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 1234, 4997])
def test_one_bad_value_anywhere_is_found(dtype: torch.dtype, value: float, place: int) -> None:
    tensor = torch.randn(51, 98).to(dtype)
    check_finite(tensor, "tokens", "v")
    tensor.view(-1)[place] = value
    hint = "float16 ends at 65504" if dtype == torch.float16 else r"'v'\.$"
    with pytest.raises(ValueError, match=f"tokens .* 1 of 51 rows.*{hint}"):
        check_finite(tensor, "tokens", "v")
