import errno
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.run.process import claimed
from data_prep.hub.access import open_repository
from data_prep.hub.download import (
    Plan,
    check_room,
    download,
    is_safe,
    is_whole,
    plan_download,
)
from data_prep.hub.files import Place, RemoteFile, list_files

REPO = "owner/CT"
LARGE, OTHER, SMALL = "a/train_1_a_1.nii.gz", "b/ä ö/train_2.nii.gz", "metadata.csv"


def content(path: str, num_bytes: int = 300_000) -> bytes:
    seed = hashlib.sha256(path.encode()).digest()
    return (seed * (num_bytes // len(seed) + 1))[:num_bytes]


def fill(hub: Any, *paths: str) -> None:
    hub.files |= {path: content(path, 300_000 + len(path)) for path in paths}


class Run:
    """One run of a download: what the command does, without its text."""

    def __init__(self, hub: Any, out: Path, jobs: int = 2) -> None:
        out.mkdir(exist_ok=True)
        api, commit = open_repository(REPO, endpoint=hub.url)
        files = list_files(api, REPO, commit, [Place("", "*")])
        self.plan = plan_download(files, out)
        self.shown: list[tuple[int, int]] = []
        self.failed = download(
            api, REPO, commit, self.plan.todo, out, jobs=jobs, progress=lambda *done: self.shown.append(done)
        )


def tree(folder: Path) -> dict[str, bytes]:
    """Files of a download without its own list of them."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    own = {".download/verified.csv", ".download/.lock"}
    return {name: path.read_bytes() for name, path in files.items() if name not in own}


def test_files_arrive_where_they_lie_in_the_dataset(start_hub, tmp_path) -> None:
    hub = start_hub(REPO)
    fill(hub, LARGE, OTHER, SMALL)
    run = Run(hub, tmp_path / "out")
    assert run.failed == []
    assert tree(tmp_path / "out") == hub.files
    num_bytes = sum(map(len, hub.files.values()))
    assert run.plan == Plan([*run.plan.todo], 0, num_bytes, [])
    assert run.shown[-1] == (3, num_bytes)
    assert [done for done, _ in run.shown] == sorted(done for done, _ in run.shown)


def test_the_token_stays_with_the_hub_and_nothing_else_is_told(start_hub, tmp_path) -> None:
    hub = start_hub(REPO)
    fill(hub, LARGE, SMALL)
    Run(hub, tmp_path / "out")
    known = re.compile(r"/api/datasets/owner/CT/(revision|tree|auth-check)|/datasets/owner/CT/resolve|/store")
    for path, headers in hub.headers:
        assert known.match(path), f"{path} is none of a download's business"
        assert ("authorization" in headers) == (not path.startswith("/store/")), path


def test_verified_files_are_not_asked_for_again(start_hub, tmp_path) -> None:
    hub = start_hub(REPO)
    fill(hub, LARGE, OTHER, SMALL)
    Run(hub, tmp_path / "out")
    asked = len(hub.requests)
    again = Run(hub, tmp_path / "out")
    assert again.plan == Plan([], 3, 0, [])
    assert len(hub.requests) == asked
    hub.files[SMALL] = content(SMALL + "!", len(hub.files[SMALL]))  # another file of the same size
    changed = Run(hub, tmp_path / "out")
    assert [file.path for file in changed.plan.todo] == [SMALL]
    assert tree(tmp_path / "out") == hub.files


def test_files_of_another_program_are_verified_in_place_of_fetched(start_hub, tmp_path) -> None:
    hub = start_hub(REPO)
    fill(hub, LARGE, SMALL)
    (tmp_path / "a").mkdir()
    (tmp_path / LARGE).write_bytes(hub.files[LARGE])
    (tmp_path / SMALL).write_bytes(bytes(len(hub.files[SMALL])))
    run = Run(hub, tmp_path)
    assert run.plan.num_bytes == 0, "both take no more room than now"
    assert hub.asked("GET", LARGE) == []
    assert tree(tmp_path) == hub.files


def test_a_connection_cut_in_mid_file_is_taken_up_where_it_broke(start_hub, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub = start_hub(REPO)
    fill(hub, LARGE)
    hub.cut_at[LARGE] = 123_456
    run = Run(hub, tmp_path)
    assert run.failed == []
    assert hub.asked("GET", LARGE) == ["", "bytes=123000-"]
    assert tree(tmp_path) == hub.files
    assert run.shown[-1] == (1, len(hub.files[LARGE]))


def test_a_file_that_is_not_what_the_hub_announced_is_not_kept(start_hub, tmp_path) -> None:
    hub = start_hub(REPO)
    fill(hub, LARGE, OTHER, SMALL)
    hub.corrupt = {LARGE, SMALL}
    run = Run(hub, tmp_path)
    for failed, path in zip(sorted(run.failed), (LARGE, SMALL), strict=True):
        assert failed.path == path
        assert f"{len(hub.files[path])} bytes of digest {hub.digest(path)}" in failed.reason
    assert list(tree(tmp_path)) == [OTHER]
    assert run.shown[-1] == (3, len(hub.files[OTHER]))
    hub.corrupt = set()
    assert Run(hub, tmp_path).failed == []
    assert tree(tmp_path) == hub.files


def test_a_file_the_hub_no_longer_has_does_not_stop_the_others(start_hub, tmp_path) -> None:
    hub = start_hub(REPO)
    fill(hub, LARGE, OTHER)
    hub.gone = {LARGE}
    run = Run(hub, tmp_path, jobs=1)
    assert [item.path for item in run.failed] == [LARGE]
    assert "Entry Not Found" in run.failed[0].reason
    assert "\n" not in run.failed[0].reason
    assert list(tree(tmp_path)) == [OTHER]


def test_terms_that_are_withdrawn_on_the_way_end_the_download(start_hub, tmp_path) -> None:
    hub = start_hub(REPO)
    fill(hub, *(f"train_{n}.nii.gz" for n in range(20)))
    api, commit = open_repository(REPO, endpoint=hub.url)
    files = list_files(api, REPO, commit, [Place("", "*")])
    hub.refusal = (403, "GatedRepo")
    with pytest.raises(PermissionError, match="No access to the dataset 'owner/CT'"):
        download(api, REPO, commit, files, tmp_path, jobs=1, progress=lambda *_: None)
    assert sum("resolve" in path for path, _ in hub.headers) < 10
    assert tree(tmp_path) == {}


def test_a_full_disk_ends_the_download(start_hub, tmp_path, monkeypatch) -> None:
    hub = start_hub(REPO)
    fill(hub, LARGE)

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("data_prep.hub.download.os.replace", no_room)
    with pytest.raises(OSError, match="disk is full"):
        Run(hub, tmp_path)
    assert tree(tmp_path) == {}


UNSAFE = [
    *("../out.csv", "a/../../out.csv", "/etc/out.csv", "a//b.csv"),
    *("./a.csv", "a\\..\\b.csv", "C:a.csv", "a\nb.csv"),
]


@pytest.mark.parametrize("path", [*UNSAFE, "..", "", ".download/verified.csv", "failed.csv"])
def test_a_path_that_leads_elsewhere_is_not_safe(path) -> None:
    assert not is_safe(path)


def test_names_from_the_hub_write_nothing_outside_of_the_download(start_hub, tmp_path) -> None:
    hub = start_hub(REPO)
    fill(hub, *UNSAFE, "..csv", "a/..b.csv")
    (tmp_path / "deep").mkdir()
    run = Run(hub, tmp_path / "deep" / "out")
    assert {item.path for item in run.plan.unsafe} == set(UNSAFE)
    assert run.plan.unsafe[0].reason == "its path leads outside the download"
    assert set(tree(tmp_path / "deep" / "out")) == {"..csv", "a/..b.csv"}
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert not {path for _, path, _ in hub.requests} & set(UNSAFE)


def test_a_download_without_room_is_refused(tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2_000_000_000))
    assert check_room(Plan([], 0, 2_000_000_000, []), tmp_path) == 2_000_000_000
    files = [RemoteFile(f"{n}.nii.gz", 500_000_001, "") for n in range(4)]
    with pytest.raises(OSError, match=r"4 files need 2\.0 GB, but only 2\.0 GB"):
        check_room(plan_download(files, tmp_path), tmp_path)


def test_two_downloads_to_one_folder_are_refused(start_hub, tmp_path) -> None:
    hub = start_hub(REPO)
    fill(hub, SMALL)
    with claimed(tmp_path / ".download"), pytest.raises(BlockingIOError, match="in use by process"):
        Run(hub, tmp_path)
    assert Run(hub, tmp_path).failed == []


def test_a_list_that_a_killed_process_left_unfinished_is_read(start_hub, tmp_path) -> None:
    hub = start_hub(REPO)
    fill(hub, LARGE, OTHER, SMALL)
    Run(hub, tmp_path)
    listing = tmp_path / ".download" / "verified.csv"
    listing.write_text(listing.read_text(encoding="utf-8")[:-60], encoding="utf-8")
    asked = len(hub.requests)
    for kept in (2, 3):
        assert Run(hub, tmp_path).plan.num_kept == kept
    assert len(hub.requests) == asked, "the file itself is whole"


def test_digests_are_those_of_git(tmp_path) -> None:
    """Of git hash-object on a file of 'what is up, doc?'; see Pro Git, 10.2."""
    path = tmp_path / "a"
    path.write_bytes(b"what is up, doc?")
    assert is_whole(path, RemoteFile("a", 16, "bd9dbf5aae1a3862dd1526723246b20206e5fc37"))
    assert not is_whole(path, RemoteFile("a", 16, "bd9dbf5aae1a3862dd1526723246b20206e5fc38"))
    assert not is_whole(path, RemoteFile("a", 15, "bd9dbf5aae1a3862dd1526723246b20206e5fc37"))
    assert is_whole(path, RemoteFile("a", 16, hashlib.sha256(b"what is up, doc?").hexdigest()))
    assert not is_whole(tmp_path / "b", RemoteFile("b", 0, hashlib.sha256(b"").hexdigest()))
