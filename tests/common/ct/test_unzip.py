"""Archives of strangers: whole and inside their folder, or refused without a trace."""

import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.ct import unzip
from common.ct.rejection import RejectedError
from common.ct.unzip import unzipped


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test does, the folder for temporary files is empty after it, and nothing lies beside it."""
    place = tmp_path / "deep" / "temporary"
    place.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    assert [path for path in tmp_path.rglob("*") if path.name != "archive.zip"] == [place.parent, place]


def archive_of(folder: Path, *members: tuple[zipfile.ZipInfo | str, bytes], method: int = 8) -> Path:
    path = folder / "archive.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def content_of(archive: Path, only: list[str] | None = None) -> dict[str, bytes]:
    with unzipped(archive, only) as folder:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_files_and_folders_come_out_as_they_went_in(tmp_path: Path) -> None:
    members = {"a/one.txt": b"1", "a/b/two.txt": b"2", "content": b"3"}
    archive = archive_of(tmp_path, *members.items())
    assert content_of(archive) == members
    assert content_of(archive, ["a/b/two.txt"]) == {"a/b/two.txt": b"2"}


def test_backslashes_separate_folders(tmp_path: Path) -> None:
    archive = archive_of(tmp_path, ("a\\b\\one.dcm", b"1"), ("a/two.dcm", b"2"), ("c\\", b""))
    assert content_of(archive) == {"a/b/one.dcm": b"1", "a/two.dcm": b"2"}
    assert content_of(archive, ["a/b/one.dcm"]) == {"a/b/one.dcm": b"1"}


def test_a_link_becomes_a_file(tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("a")
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    assert content_of(archive_of(tmp_path, (entry, b"/etc/passwd"))) == {"a": b"/etc/passwd"}


@pytest.mark.parametrize("only", [None, ["fine.txt"]])
@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a\\..\\..\\x", "C:x"])
def test_names_that_lead_out_are_refused(name: str, only: list[str] | None, tmp_path: Path) -> None:
    archive = archive_of(tmp_path, ("fine.txt", b"1"), (name, b"evil"))
    with pytest.raises(RejectedError, match=r"archive\.zip.*leads out"):
        content_of(archive, only)


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive = archive_of(tmp_path, ("a", b"1"), ("a", b"2"))
    with pytest.raises(RejectedError, match="'a' twice"):
        content_of(archive)


@pytest.mark.parametrize(
    ("members", "bound", "said"),
    [
        ([("zeros", bytes(2**24))], {}, "'zeros' .*200 times: .* for 16,777,216"),
        ([("a", b"12345"), ("b", b"12345")], {"MAX_BYTES": 9}, "10 bytes, more than 9"),
        ([("a", b""), ("b", b""), ("c", b"")], {"MAX_FILES": 2}, "3 files, more than 2"),
    ],
)
def test_more_than_fits_is_refused(
    members: list, bound: dict[str, int], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in bound.items():
        monkeypatch.setattr(unzip, name, value)
    with pytest.raises(RejectedError, match=said):
        content_of(archive_of(tmp_path, *members))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_uncommon_packings_are_refused(method: int, tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match=f"'a' is packed by method {method}"):
        content_of(archive_of(tmp_path, ("a", b"1"), method=method))


def lying(data: bytes) -> bytes:
    """The archive says that a file is smaller than it is."""
    place = data.rindex(b"PK\x01\x02") + 24
    return data[:place] + struct.pack("<I", 10) + data[place + 4 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:60] + bytes([data[60] ^ 0xFF]) + data[61:],
        lying,
        lambda data: b"<html>Not found</html>",
    ],
    ids=["cut", "flipped", "lying", "page"],
)
def test_what_is_not_whole_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    archive = archive_of(tmp_path, ("a.bin", bytes(range(256)) * 16))
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(RejectedError, match=f"unreadable: Cannot unpack '{archive}'"):
        content_of(archive)
