"""Whatever a file is called, its volume has a name that fits everywhere, and no two have one in silence."""

import logging
import os
import string
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from common.ct.dicom_files import series_volume
from common.ct.geometry import RejectedError, RejectedVolume
from common.ct.names import (
    VOLUME_NAME,
    VOLUME_SUFFIXES,
    find_named,
    only_file,
    say_unread,
    unique_names,
    volume_files,
    volume_name,
    walk,
)


@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
def test_the_suffix_is_no_part_of_a_name_in_any_case(suffix: str) -> None:
    for written in (suffix, suffix.upper(), suffix.title(), ""):
        assert volume_name(f"train_1_a_1{written}") == "train_1_a_1"


@pytest.mark.parametrize(
    "text",
    [
        "/data/ct/train_1_a_1.nii.gz",
        "C:\\ct\\train_1_a_1.nii",
        ' "train_1_a_1" ',
        "'train_1_a_1.NII'\r\n",
        "a b/train_1_a_1/",
        "train_1_a_1.img.gz",
    ],
)
def test_folders_quotes_and_blanks_are_no_part_of_a_name(text: str) -> None:
    assert volume_name(text) == "train_1_a_1"


def test_dots_and_blanks_become_underscores_as_in_names_of_series() -> None:
    uid = "1.3.6.1.4.1.9328.50.4.0175"
    assert volume_name(f"{uid}.nii.gz") == volume_name(uid) == series_volume(uid)
    assert volume_name("Patient 01.mha") == "Patient_01"


def test_names_of_any_characters_are_safe_stable_and_different() -> None:
    rng = np.random.default_rng(0)
    letters = [*string.ascii_letters, *string.digits, *"_-()[]{}#%&+=@!$;,~^äöüßéçñ中文字кир\u0301\x07"]
    texts = {"".join(rng.choice(letters, rng.integers(1, 120))) for _ in range(2000)}
    texts |= {"", "_a", "-a", "a" * 81, "a" * 82, "中", "文", "con:", ".."}
    names = {text: volume_name(text) for text in texts}
    assert all(map(VOLUME_NAME.fullmatch, names.values()))
    assert len(set(names.values())) == len(texts)
    assert all(volume_name(name) == name for name in names.values())


def test_names_of_bytes_that_are_no_text_are_safe_and_differ() -> None:
    names = {volume_name(os.fsdecode(text)) for text in (b"M\xfcller.nii", b"M\xe4ller.nii", b"Mller.nii")}
    assert len(names) == 3
    assert all(map(VOLUME_NAME.fullmatch, names))


def test_one_letter_written_in_two_ways_is_one_name() -> None:
    """As macOS and others write an umlaut into the name of a file."""
    assert volume_name("M\u00fcller.nii") == volume_name("Mu\u0308ller.nii")


def test_a_name_that_is_not_unique_takes_its_folders_and_then_its_path() -> None:
    paths = "a/ct.nii", "b/ct.nii.gz", "b/x.nii", "c/d/y.nii", "e/d/y.nii", "ct2.nii", "b.nii"
    names = unique_names([Path(path) for path in paths])
    assert [names[Path(path)] for path in paths] == ["a", "b_ct", "x", "c_d_y", "e_d_y", "ct2", "b"]


def test_what_no_folder_tells_apart_keeps_one_name() -> None:
    names = unique_names([Path("x/a.b.nii"), Path("x/a b.mha"), Path("c.nii"), Path("c.nrrd")])
    assert [*names.values()] == ["a_b", "a_b", "c", "c"]


PLACES = {
    "s0": Path("set/s0/ct.nii.gz"),
    "s1": Path("set/s1/ct.nii.gz"),
    "one_a": Path("one/a.nii"),
    "p_one_a": Path("p/one/a.nii"),
    "b": Path("x/b.mha"),
}


@pytest.mark.parametrize(
    ("text", "volume"),
    [
        ("s0", "s0"),
        ("s0/ct.nii.gz", "s0"),
        ("/mnt/other/set/s1/ct.NII.GZ", "s1"),
        ("D:\\set\\s1\\ct.nii.gz", "s1"),
        ("b", "b"),
        ("b.nii.gz", "b"),  # as another format
        ("elsewhere/b.nii", "b"),
        ("p/one/a.nii", "p_one_a"),
        ("one/a.nii", None),  # either of two
        ("ct.nii.gz", None),
        ("s2/ct.nii.gz", None),
    ],
)
def test_a_list_names_volumes_by_name_or_by_path(text: str, volume: str | None) -> None:
    found, absent = find_named([text], PLACES)
    assert (found, absent) == (({volume}, []) if volume else (set(), [text]))


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_files_of_users_come_in_order_without_those_of_systems(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = "b/a.nii", "a ü/c d/x.dcm", "z.txt", "a.nii"
    hidden = (
        "._a.nii",
        ".cache/x.nii",
        "__MACOSX/a.nii",
        "b/.DS_Store",
        "b/THUMBS.DB",
        "desktop.ini",
        "DICOMDIR",
    )
    touch(tmp_path, *names, *hidden)
    caplog.set_level("INFO")
    rejected: list[RejectedVolume] = []
    found = [path.relative_to(tmp_path).as_posix() for path in walk(tmp_path, rejected)]
    assert (found, rejected) == (["a.nii", "z.txt", "a ü/c d/x.dcm", "b/a.nii"], [])
    assert "Passed over as hidden or of an operating system: 7, such as" in caplog.text
    assert [path.name for path in walk(tmp_path, rejected, leave_out=tmp_path / "b")] == [
        "a.nii",
        "z.txt",
        "x.dcm",
    ]


def test_links_to_folders_are_not_followed_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "real/a.nii")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "lost.nii").symlink_to("nowhere")
    assert [path.name for path in walk(tmp_path, [])] == ["lost.nii", "a.nii"]
    assert "loop' is a link to a folder and is not searched" in caplog.text


@contextmanager
def permissions() -> Iterator[None]:
    """Be a user whom permissions bind: root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_without_permission_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = touch(Path(place), "a.nii", "closed/b.nii")
        (folder / "closed").chmod(0)
        folder.chmod(0o755)
        rejected: list[RejectedVolume] = []
        with permissions():
            assert [path.name for path in walk(folder, rejected)] == ["a.nii"]
            assert list(volume_files(folder)) == ["a"]
        (folder / "closed").chmod(0o755)
    said = f"Cannot read folder '{folder / 'closed'}': Permission denied."
    assert rejected == [RejectedVolume("closed", "unreadable", said)]
    assert said in caplog.text


def test_volumes_are_listed_by_the_names_of_their_files(tmp_path: Path) -> None:
    touch(tmp_path, "b/train 2.NII.GZ", "a ü/c d/train_1.mha", "b/notes.nii.txt", "a ü/train_2.nii", "x.npz")
    found = volume_files(tmp_path)
    assert {volume: len(files) for volume, files in found.items()} == {"train_1": 1, "train_2": 2}
    assert list(volume_files(tmp_path, [".npz"])) == ["x"]
    assert only_file(found["train_1"], "volumes").name == "train_1.mha"
    with pytest.raises(
        RejectedError, match=r"duplicate: 2 volumes have one name, .*train_2\.nii' and '.*\.GZ'"
    ):
        only_file(found["train_2"], "volumes")


@pytest.mark.parametrize(("name", "level"), [("a.txt", logging.INFO), ("A.MGZ", logging.WARNING)])
def test_files_that_are_not_read_are_counted_by_kind(
    name: str, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    say_unread([])
    say_unread([Path("LICENSE"), Path(name), Path("b") / name.lower()])
    (record,) = caplog.records
    assert record.levelno == level
    assert f"2 {Path(name).suffix.lower()}, 1 without suffix, such as 'LICENSE'" in record.getMessage()
