"""Archives of strangers: whole and inside their folder, or refused without a trace."""

import stat
import struct
import zipfile
from pathlib import Path

import pytest

from common.ct import unzip as safe_unzip
from common.ct.unzip import unzip


def archive_of(folder: Path, *members: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    path = folder / "archive.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return entry


def test_files_and_folders_come_out_as_they_went_in(tmp_path: Path) -> None:
    archive = archive_of(tmp_path, ("a/one.txt", b"1"), ("a/b/two.txt", b"2"), ("content", b"3"))
    files = unzip(archive, tmp_path / "out" / "bundle")
    assert [path.relative_to(tmp_path / "out" / "bundle").as_posix() for path in files] == [
        "a/b/two.txt",
        "a/one.txt",
        "content",
    ]
    assert files[0].read_bytes() == b"2"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bundle"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a\\..\\..\\x", "C:x"])
def test_names_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    archive = archive_of(tmp_path, ("fine.txt", b"1"), (name, b"evil"))
    with pytest.raises(ValueError, match="names in an archive must stay inside it, got"):
        unzip(archive, tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []
    assert not (tmp_path / "x").exists()


def test_backslashes_separate_folders(tmp_path: Path) -> None:
    archive = archive_of(tmp_path, ("a\\b\\one.dcm", b"1"), ("a/two.dcm", b"2"), ("c\\", b""))
    files = unzip(archive, tmp_path / "out", only=["a/b/one.dcm"])
    assert [path.relative_to(tmp_path / "out").as_posix() for path in files] == ["a/b/one.dcm"]
    assert files[0].read_bytes() == b"1"
    assert len(unzip(archive, tmp_path / "all")) == 2


def test_links_are_refused(tmp_path: Path) -> None:
    archive = archive_of(tmp_path, (link("a"), b"/etc/passwd"))
    with pytest.raises(ValueError, match="archive must hold no links, got 'a'"):
        unzip(archive, tmp_path / "out")


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive = archive_of(tmp_path, ("a", b"1"), ("a", b"2"))
    with pytest.raises(ValueError, match="names in an archive must differ, got 'a' twice"):
        unzip(archive, tmp_path / "out")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    archive = archive_of(tmp_path, ("zeros", bytes(2**24)))
    with pytest.raises(ValueError, match="files must be packed at most 200 times, got 16,777,216 bytes"):
        unzip(archive, tmp_path / "out")


def test_more_than_fits_is_refused(tmp_path: Path) -> None:
    archive = archive_of(tmp_path, ("a", b"12345"), ("b", b"12345"))
    with pytest.raises(ValueError, match="archive must hold at most 9 bytes, got 10"):
        unzip(archive, tmp_path / "out", max_bytes=9)


def test_some_files_alone_come_out_of_a_checked_archive(tmp_path: Path) -> None:
    archive = archive_of(tmp_path, ("a/one.txt", b"1"), ("a/two.txt", b"2"))
    assert unzip(archive, tmp_path / "out", only=["a/two.txt"]) == [tmp_path / "out" / "a" / "two.txt"]
    archive = archive_of(tmp_path, ("a/one.txt", b"1"), ("../two.txt", b"2"))
    with pytest.raises(ValueError, match="names in an archive must stay inside it"):
        unzip(archive, tmp_path / "other", only=["a/one.txt"])


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_uncommon_packings_are_refused(method: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "archive.zip", "w", method) as archive:
        archive.writestr("a", b"1")
    with pytest.raises(
        ValueError, match=f"files must be stored or deflated, got compression method {method} for"
    ):
        unzip(tmp_path / "archive.zip", tmp_path / "out")


def test_more_files_than_any_archive_of_ours_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_unzip, "MAX_FILES", 2)
    archive = archive_of(tmp_path, *((str(number), b"") for number in range(3)))
    with pytest.raises(ValueError, match=r"archive must hold at most 2 files, got 3 in '.*archive\.zip'"):
        unzip(archive, tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "flipped", "lies about its size", "no zip"])
def test_what_is_not_whole_is_refused_and_leaves_nothing(damage: str, tmp_path: Path) -> None:
    archive = archive_of(tmp_path, ("a.bin", bytes(range(256)) * 16))
    data = bytearray(archive.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[60] ^= 0xFF
    elif damage == "lies about its size":
        place = data.rindex(b"PK\x01\x02") + 24
        data[place : place + 4] = struct.pack("<I", 10)
    else:
        data = bytearray(b"<html>Not found</html>")
    archive.write_bytes(data)
    with pytest.raises(ValueError, match="archive must be a whole zip file, got"):
        unzip(archive, tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_missing_archive_and_a_folder_that_is_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"archive must be a zip file, got '.*none.zip'"):
        unzip(tmp_path / "none.zip", tmp_path / "out")
    archive = archive_of(tmp_path, ("a", b"1"))
    with pytest.raises(FileExistsError, match="folder must not exist yet"):
        unzip(archive, tmp_path)
