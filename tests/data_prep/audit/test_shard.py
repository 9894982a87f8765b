"""A small shard, damaged in one way at a time: one check must fail, and say where."""

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.shards.index import FIELDS, ShardIndex, save_index
from common.shards.writer import VolumeSlices, write_shard
from data_prep.audit.shard import ShardAudit, ShardTask, audit_shard, draw

NUM_SLICES = 3


def volume(name: str) -> VolumeSlices:
    rng = np.random.default_rng(7)
    rex = np.zeros((NUM_SLICES, 128, 128), np.uint16)
    rex[1, 3:5, 4] = 1 << 9
    ts = np.zeros((NUM_SLICES, 128, 128), np.uint8)
    ts[:2, 9, 9] = 117
    return VolumeSlices(
        volume=name,
        ct=rng.integers(-1024, 3072, (NUM_SLICES, 11, 13)).astype(np.int16),
        ts=ts,
        rex=rex,
        spacing_mm=(0.7, 0.8, 1.5),
        original_shape=(13, 11, NUM_SLICES),
        original_axcodes="LPS",
        labels={"Emphysema": 1, "Lung nodule": 0},
        split="train",
    )


Shard = tuple[Path, ShardIndex]


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    path = tmp_path / "train-rex-000000.tar"
    return path, write_shard(path, [volume("a"), volume("b")])


def audited(path: Path, **index_changes: object) -> ShardAudit:
    """Audit a shard, its index changed."""
    from common.shards.index import load_index

    if index_changes:
        save_index(path, load_index(path)._replace(**index_changes))
    return audit_shard(ShardTask(path))


def overwritten(
    shard: Shard, row: int, field: str, change: Callable[[bytes], bytes]
) -> dict[str, np.ndarray]:
    """Change a member without changing its size, and let the checksum follow."""
    path, index = shard
    column = FIELDS.index(field)
    data = bytearray(path.read_bytes())
    part = slice(
        index.member_offset[row, column], index.member_offset[row, column] + index.member_size[row, column]
    )
    member = change(bytes(data[part]))
    assert len(member) == index.member_size[row, column]
    data[part] = member
    path.write_bytes(data)
    crc = index.member_crc32.copy()
    crc[row, column] = zlib.crc32(member)
    return {"member_crc32": crc}


def test_a_whole_shard_passes_every_check_and_all_volumes_are_seen(shard: Shard) -> None:
    result = audited(shard[0])
    assert not result.tally.failed
    assert {name: result.tally.checked[name] for name in ("records", "ct", "masks")} == {
        "records": 6,
        "ct": 6,
        "masks": 12,
    }
    assert list(result.contents) == ["a", "b"]
    assert result.contents["b"].organ_voxels[117] == 2
    assert result.contents["b"].finding_slices[9] == 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("spacing_mm", lambda values: values * [[1, 1, 1.0001], [1, 1, 1]]),
        ("original_shape", lambda values: values + [[1, 0, 0], [0, 0, 0]]),
        ("original_axcodes", lambda values: np.array(["RAS", "LPS"])),
        ("labels", lambda values: values ^ [[1, 0], [0, 0]]),
    ],
)
def test_a_record_that_the_index_contradicts_is_noticed(
    name: str, change: Callable[[np.ndarray], np.ndarray], shard: Shard
) -> None:
    tally = audited(shard[0], **{name: change(getattr(shard[1], name))}).tally
    assert tally.failed == {"records": NUM_SLICES}
    assert tally.offences["records"][0][1:] == ("a", f"slice 0: the index has another {name}")


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        (b'"slice_index": 1', b'"slice_index": 2', "slice 1: the index has another slice_index"),
        (b'"num_slices": 3', b'"num_slices": 4', "slice 1: the index has another num_slices"),
        (b'"split": "train"', b'"split": "valid"', "slice 1: the index has another split"),
        (b'"volume": "b"', b'"volume": "c"', "slice 1: the index has another volume"),
        (b'"schema_version": ', b'"schema_versiom": ', "another schema_versiom, schema_version"),
        (b'"rex_codes": ["2d"]', b'"rex_codes": null  ', "slice 1: the index has another rex_codes"),
        (b"{", b"[", "slice 1: its record must be a JSON object, got JSONDecodeError"),
    ],
)
def test_a_changed_record_is_noticed(old: bytes, new: bytes, what: str, shard: Shard) -> None:
    crc = overwritten(shard, NUM_SLICES + 1, "json", lambda data: data.replace(old, new, 1))
    tally = audited(shard[0], **crc).tally
    assert tally.failed == {"records": 1}
    assert what in tally.offences["records"][0].what


def test_findings_of_a_record_are_those_of_its_mask(shard: Shard) -> None:
    crc = overwritten(shard, 1, "json", lambda data: data.replace(b'"2d"', b'"2e"'))
    tally = audited(shard[0], **crc).tally
    assert tally.failed == {"masks": 1}
    assert tally.offences["masks"][0][1:] == (
        "a",
        "slice 1: rex.png has the findings ['2d'], its record says ['2e']",
    )


@pytest.mark.parametrize(("field", "check"), [("ct.blosc2", "ct"), ("ts.png", "masks"), ("rex.png", "masks")])
def test_what_does_not_decode_is_noticed_and_its_volume_not_looked_at(
    field: str, check: str, shard: Shard
) -> None:
    crc = overwritten(shard, 2, field, lambda data: bytes(len(data)))
    result = audited(shard[0], **crc)
    assert result.tally.failed == {check: 1}
    assert result.tally.offences[check][0].where == "a"
    assert result.tally.offences[check][0].what.startswith("slice 2: ")
    assert list(result.contents) == ["b"]


def test_slices_have_the_stated_size(shard: Shard) -> None:
    tally = audited(shard[0], shape=np.array([[11, 13], [13, 11]])).tally
    assert tally.failed == {"ct": NUM_SLICES}
    assert "slice 0: must have shape (13, 11) by the index, got (11, 13)" in tally.offences["ct"][0].what


def test_hu_lie_in_the_stored_range(tmp_path: Path) -> None:
    one = volume("a")
    one.ct[1, 0, 0] = 3072
    write_shard(tmp_path / "train-rex-000000.tar", [one])
    tally = audited(tmp_path / "train-rex-000000.tar").tally
    assert tally.failed == {"ct": 1}
    assert "slice 1: HU must lie in (-1024, 3071), got" in tally.offences["ct"][0].what


@pytest.mark.parametrize("name", ["slice_has_ts", "slice_has_rex"])
def test_flags_of_the_index_are_those_of_the_masks(name: str, shard: Shard) -> None:
    flags = getattr(shard[1], name).copy()
    flags[4] = not flags[4]
    tally = audited(shard[0], **{name: flags}).tally
    assert tally.failed == {"masks": 1}
    assert tally.offences["masks"][0].what.endswith("the index says otherwise")


def test_a_random_share_is_decoded_and_all_bytes_are_read(shard: Shard) -> None:
    between = sorted((draw("a", 0), draw("b", 0)))
    result = audit_shard(ShardTask(shard[0], share=float(np.mean(between))))
    assert len(result.contents) == 1
    assert result.tally.checked["ct"] == NUM_SLICES
    assert result.tally.checked["checksums"] == 4 * 2 * NUM_SLICES
    assert audit_shard(ShardTask(shard[0], share=0.0)).contents == {}


def test_a_share_is_that_share_of_many_volumes_and_another_with_another_seed() -> None:
    names = [f"train_{k}_a_1" for k in range(4000)]
    chosen = [{name for name in names if draw(name, seed) < 0.1} for seed in (0, 1)]
    assert all(0.08 < len(names_of) / len(names) < 0.12 for names_of in chosen)
    assert len(chosen[0] & chosen[1]) < 0.3 * len(chosen[0])


def test_a_shard_without_a_usable_index_is_refused(shard: Shard) -> None:
    with shard[0].open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="as its index says"):
        audit_shard(ShardTask(shard[0]))
