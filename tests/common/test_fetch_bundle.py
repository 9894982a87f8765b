"""Released bundles over HTTP from a server on this machine: verified, or refused without a trace."""

import functools
import hashlib
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from common.fetch_bundle import fetch_bundle


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address where its files can be had."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def release(folder: Path, members: dict[str, bytes] | None = None) -> str:
    """Write a small bundle and its checksum; return the digest."""
    path = folder / "tiny_v0.1.0.zip"
    default = {
        "tiny/configs/metadata.json": b'{"version": "0.1.0"}',
        "tiny/LICENSE": b"text",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (default if members is None else members).items():
            archive.writestr(name, data)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"\n{digest}  other.zip\n{digest} *{path.name}\n")
    return digest


@pytest.mark.parametrize("stated", [True, False])
def test_a_bundle_whose_checksum_fits_is_unpacked(stated: bool, served, tmp_path: Path) -> None:
    folder, url = served
    digest = release(folder)
    bundle = fetch_bundle(f"{url}/tiny_v0.1.0.zip", tmp_path / "in", digest if stated else None)
    assert bundle == tmp_path / "in" / "tiny"
    assert (bundle / "LICENSE").read_bytes() == b"text"
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["tiny"]


def refused(url: str, folder: Path, message: str, sha256: str | None = None) -> None:
    with pytest.raises(ValueError, match=message):
        fetch_bundle(f"{url}/tiny_v0.1.0.zip", folder, sha256)
    assert not folder.exists() or list(folder.iterdir()) == []


def test_another_checksum_is_refused(served, tmp_path: Path) -> None:
    folder, url = served
    digest = release(folder)
    refused(url, tmp_path / "in", rf"sha256 of '.*' must be 0{{64}}, got {digest}. It was not", "0" * 64)


def test_a_changed_archive_is_refused(served, tmp_path: Path) -> None:
    folder, url = served
    release(folder)
    data = bytearray((folder / "tiny_v0.1.0.zip").read_bytes())
    data[50] ^= 1
    (folder / "tiny_v0.1.0.zip").write_bytes(data)
    refused(url, tmp_path / "in", "sha256 of")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"tiny/configs/metadata.json": b"{}", "../evil": b""}, "names in an archive must stay inside it"),
        ({"other/configs/metadata.json": b"{}"}, "archive must hold the one folder 'tiny', got others"),
        ({"tiny/LICENSE": b""}, "bundle must have configs/metadata.json, got none"),
        ({}, "archive must hold the one folder 'tiny', got others"),
    ],
    ids=["zip slip", "another folder", "no bundle", "empty"],
)
def test_an_archive_that_is_no_bundle_is_refused(members, message: str, served, tmp_path: Path) -> None:
    folder, url = served
    release(folder, members)
    refused(url, tmp_path / "in", message)


def test_a_file_the_server_does_not_have_is_named(served, tmp_path: Path) -> None:
    refused(served[1], tmp_path / "in", r"url must be one that answers, got '.*SHA256SUMS' \(404")


def test_checksums_that_do_not_list_the_file_are_refused(served, tmp_path: Path) -> None:
    folder, url = served
    release(folder)
    (folder / "SHA256SUMS").write_text("")
    refused(
        url, tmp_path / "in", r"SHA256SUMS beside '.*' must list tiny_v0.1.0.zip, got \[\]. Pass --sha256"
    )


def test_a_bundle_is_never_overwritten_and_an_odd_address_refused(served, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    with pytest.raises(FileExistsError, match="bundle must not be there yet"):
        fetch_bundle(f"{served[1]}/tiny_v0.1.0.zip", tmp_path)
    with pytest.raises(ValueError, match=r"url must end in <name>_v<version>.zip, got '.*tiny.zip'"):
        fetch_bundle(f"{served[1]}/tiny.zip", tmp_path)
