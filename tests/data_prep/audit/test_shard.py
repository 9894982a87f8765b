"""A small shard, damaged in one way at a time: one check must fail, and say where."""

import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.shards.index import FIELDS, ShardIndex, load_index, save_index
from common.shards.writer import VolumeSlices, write_shard
from data_prep.audit.checks import Tally
from data_prep.audit.shard import (
    Sample,
    ShardAudit,
    ShardTask,
    audit_shard,
    check_order,
    draw,
    read_samples,
)
from tests.noise_volume import noise_volume

SIZES = {"a": 4, "b_1": 3}
NAME = "train-rex-000000.tar"
Shard = tuple[Path, ShardIndex]


def volume(name: str) -> VolumeSlices:
    num_slices = SIZES[name]
    rex = np.zeros((num_slices, 128, 128), np.uint16)
    rex[1, 3:5, 4] = 1 << 9
    ts = np.zeros((num_slices, 128, 128), np.uint8)
    ts[:2, 9, 9] = 117
    labels = {"Emphysema": 1, "Lung nodule": 0}
    return noise_volume(name, num_slices)._replace(ts=ts, rex=rex, labels=labels)


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return tmp_path / NAME, write_shard(tmp_path / NAME, [volume(name) for name in SIZES])


def read(path: Path, index: ShardIndex) -> tuple[list[Sample], Tally]:
    tally = Tally()
    return list(read_samples(path, index, tally)), tally


def audited(path: Path, **index_changes: object) -> ShardAudit:
    """Audit a shard, its index changed."""
    if index_changes:
        save_index(path, load_index(path)._replace(**index_changes))
    return audit_shard(ShardTask(path))


def rewritten(path: Path, index: ShardIndex, order: list[int]) -> ShardIndex:
    """Write the tar's members in another order; the index follows them."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    offsets = {}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (members[k] for k in order):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            offsets[name] = tar.offset + tarfile.BLOCKSIZE
            tar.addfile(info, io.BytesIO(data))
    names = [f"{v}_{z:04d}" for v, n in SIZES.items() for z in range(n)]
    moved = np.array([[offsets.get(f"{name}.{field}", -1) for field in FIELDS] for name in names])
    return index._replace(member_offset=moved)


def overwritten(
    shard: Shard, row: int, field: str, change: Callable[[bytes], bytes]
) -> dict[str, np.ndarray]:
    """Change a member without changing its size; return the index's checksums that follow."""
    path, index = shard
    column = FIELDS.index(field)
    first, size = index.member_offset[row, column], index.member_size[row, column]
    data = bytearray(path.read_bytes())
    member = change(bytes(data[first : first + size]))
    assert len(member) == size
    data[first : first + size] = member
    path.write_bytes(data)
    crc = index.member_crc32.copy()
    crc[row, column] = zlib.crc32(member)
    return {"member_crc32": crc}


def test_a_whole_shard_passes_every_check_and_yields_its_slices_in_order(shard) -> None:
    samples, tally = read(*shard)
    assert [(s.volume_id, s.z, s.row) for s in samples] == [
        *((0, z, z) for z in range(4)),
        *((1, z, 4 + z) for z in range(3)),
    ]
    assert all(sample.data.keys() == set(FIELDS) == sample.fields for sample in samples)
    assert not tally.failed
    result = audited(shard[0])
    assert not result.tally.failed
    counted = {name: result.tally.checked[name] for name in ("members", "checksums", "order", "ct", "masks")}
    assert counted == {"members": 28, "checksums": 28, "order": 7, "ct": 7, "masks": 14}
    assert list(result.contents) == list(SIZES)
    assert result.contents["b_1"].organ_voxels[117] == 2
    assert result.contents["b_1"].finding_slices[9] == 1


@pytest.mark.parametrize("field", FIELDS)
def test_one_other_byte_fails_the_checksum_of_its_slice(field, shard) -> None:
    path, index = shard
    data = bytearray(path.read_bytes())
    data[index.member_offset[5, FIELDS.index(field)] + 7] ^= 1
    path.write_bytes(data)
    samples, tally = read(path, index)
    assert tally.failed == {"checksums": 1}
    assert tally.offences["checksums"][0].where == "b_1"
    assert f"slice 1: {field}" in tally.offences["checksums"][0].what
    assert field not in samples[5].data


def test_two_exchanged_slices_fail_the_order(shard) -> None:
    order = [*range(4), *range(8, 12), *range(4, 8), *range(12, 28)]
    _, tally = read(shard[0], rewritten(*shard, order))
    assert tally.failed.keys() == {"order"}
    assert tally.offences["order"][0][1:] == ("a", f"slice 2 follows slice 0 in {NAME}")


def test_members_that_moved_without_their_index_are_noticed(shard) -> None:
    rewritten(*shard, [3, 0, 1, 2, *range(4, 28)])
    samples, tally = read(*shard)
    assert tally.failed == {"members": 4}
    assert "in the index" in tally.offences["members"][0].what
    assert samples[0].data == {}


def test_missing_and_foreign_members_are_noticed(shard) -> None:
    shorter = rewritten(*shard, list(range(27)))
    _, tally = read(shard[0], shorter)
    assert tally.failed == {"members": 1}
    assert tally.offences["members"][0][1:] == ("b_1", f"slice 2: json is not in {NAME}")
    with tarfile.open(shard[0], "a") as tar:
        tar.addfile(tarfile.TarInfo("b_1_0003.json"))
    _, tally = read(shard[0], shorter)
    assert tally.failed == {"members": 2}
    assert "'b_1_0003.json' is not in the index" in tally.offences["members"][0].what


def test_a_broken_header_loses_what_follows(shard) -> None:
    path, index = shard
    data = bytearray(path.read_bytes())
    data[index.member_offset[4, 0] - tarfile.BLOCKSIZE] ^= 255
    path.write_bytes(data)
    samples, tally = read(path, index)
    assert len(samples) == 4
    assert tally.failed == {"members": 12}


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["a_0000", "a_0001", "b_0000"], []),
        (["a_0001", "a_0002"], ["it begins with slice 1 in s"]),
        (["a_0000", "a_0002"], ["slice 2 follows slice 0 in s"]),
        (["a_0002", "a_0001", "a_0000"], ["it begins with slice 2", "slice 1 follows", "slice 0 follows"]),
        (["a_0000", "b_0000", "a_0001"], ["it continues with slice 1 after another volume in s"]),
    ],
)
def test_order_is_judged_by_the_tar_alone(keys, what) -> None:
    tally = Tally()
    check_order([f"{key}.{field}" for key in keys for field in ("ct.blosc2", "json")], "s", tally)
    found = [offence.what for offence in tally.offences.get("order", [])]
    assert len(found) == len(what)
    assert all(start in text for start, text in zip(what, found, strict=True))


def test_members_of_a_slice_that_lie_apart_are_noticed() -> None:
    tally = Tally()
    check_order(["a_0000.ct.blosc2", "a_0001.ct.blosc2", "a_0000.json", "a_0001.json"], "s", tally)
    assert tally.failed["order"] > 0


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("spacing_mm", lambda values: values * [[1, 1, 1.0001], [1, 1, 1]]),
        ("original_shape", lambda values: values + [[1, 0, 0], [0, 0, 0]]),
        ("original_axcodes", lambda values: np.array(["RAS", "LPS"])),
        ("labels", lambda values: values ^ [[1, 0], [0, 0]]),
    ],
)
def test_a_record_that_the_index_contradicts_is_noticed(name, change, shard) -> None:
    tally = audited(shard[0], **{name: change(getattr(shard[1], name))}).tally
    assert tally.failed == {"records": 4}
    assert tally.offences["records"][0][1:] == ("a", f"slice 0: the index has another {name}")


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        (b'"slice_index": 1', b'"slice_index": 2', "slice 1: the index has another slice_index"),
        (b'"num_slices": 3', b'"num_slices": 4', "slice 1: the index has another num_slices"),
        (b'"split": "train"', b'"split": "valid"', "slice 1: the index has another split"),
        (b'"volume": "b', b'"volume": "c', "slice 1: the index has another volume"),
        (b'"schema_version": ', b'"schema_versiom": ', "another schema_versiom, schema_version"),
        (b'"rex_codes": ["2d"]', b'"rex_codes": null  ', "slice 1: the index has another rex_codes"),
        (b"{", b"[", "slice 1: its record is not a JSON object"),
    ],
)
def test_a_changed_record_is_noticed(old, new, what, shard) -> None:
    crc = overwritten(shard, 5, "json", lambda data: data.replace(old, new, 1))
    tally = audited(shard[0], **crc).tally
    assert tally.failed == {"records": 1}
    assert what in tally.offences["records"][0].what


def test_findings_of_a_record_are_those_of_its_mask(shard) -> None:
    crc = overwritten(shard, 1, "json", lambda data: data.replace(b'"2d"', b'"2e"'))
    tally = audited(shard[0], **crc).tally
    assert tally.failed == {"masks": 1}
    assert tally.offences["masks"][0][1:] == (
        "a",
        "slice 1: rex.png has the findings ['2d'], its record says ['2e']",
    )


@pytest.mark.parametrize(("field", "check"), [("ct.blosc2", "ct"), ("ts.png", "masks"), ("rex.png", "masks")])
def test_what_does_not_decode_is_noticed_and_its_volume_not_looked_at(field, check, shard) -> None:
    crc = overwritten(shard, 2, field, lambda data: bytes(len(data)))
    result = audited(shard[0], **crc)
    assert result.tally.failed == {check: 1}
    assert result.tally.offences[check][0].where == "a"
    assert result.tally.offences[check][0].what.startswith("slice 2: ")
    assert list(result.contents) == ["b_1"]


def test_slices_have_the_stated_size(shard) -> None:
    tally = audited(shard[0], shape=np.array([[11, 13], [13, 11]])).tally
    assert tally.failed == {"ct": 3}
    assert "slice 0: its shape is (11, 13), in the index (13, 11)" in tally.offences["ct"][0].what


def test_hu_lie_in_the_stored_range(tmp_path) -> None:
    one = volume("a")
    one.ct[1, 0, 0] = 3072
    write_shard(tmp_path / NAME, [one])
    tally = audited(tmp_path / NAME).tally
    assert tally.failed == {"ct": 1}
    assert "slice 1: HU must lie in (-1024, 3071), got" in tally.offences["ct"][0].what


@pytest.mark.parametrize("name", ["slice_has_ts", "slice_has_rex"])
def test_flags_of_the_index_are_those_of_the_masks(name, shard) -> None:
    flags = getattr(shard[1], name).copy()
    flags[4] = not flags[4]
    tally = audited(shard[0], **{name: flags}).tally
    assert tally.failed == {"masks": 1}
    assert tally.offences["masks"][0].what.endswith("the index says otherwise")


def test_a_random_share_is_decoded_and_all_bytes_are_read(shard) -> None:
    first, second = sorted(SIZES, key=lambda name: draw(name, 0))
    result = audit_shard(ShardTask(shard[0], share=(draw(first, 0) + draw(second, 0)) / 2))
    assert list(result.contents) == [first]
    assert result.tally.checked["ct"] == SIZES[first]
    assert result.tally.checked["checksums"] == 4 * 7
    assert audit_shard(ShardTask(shard[0], share=0.0)).contents == {}


def test_a_share_is_that_share_of_many_volumes_and_another_with_another_seed() -> None:
    names = [f"train_{k}_a_1" for k in range(4000)]
    chosen = [{name for name in names if draw(name, seed) < 0.1} for seed in (0, 1)]
    assert all(0.08 < len(names_of) / len(names) < 0.12 for names_of in chosen)
    assert len(chosen[0] & chosen[1]) < 0.3 * len(chosen[0])


def test_a_shard_without_a_usable_index_is_refused(shard) -> None:
    with shard[0].open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="index"):
        audit_shard(ShardTask(shard[0]))
