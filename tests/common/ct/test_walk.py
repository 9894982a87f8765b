import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.ct.rejection import RejectedError, RejectedVolume
from common.ct.walk import only_file, say_unread, volume_files, walk


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
