"""Download a released bundle and check it before anything of it is unpacked.

``python -m monai.bundle download`` checks neither checksum nor version. This does: ``python -m
common.fetch_bundle URL --sha256 <digest>``, or with the SHA256SUMS that lies beside every released zip file.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Annotated
from urllib.parse import urljoin, urlsplit

import requests
import typer
from tqdm import tqdm

from common.ct.unzip import unzip
from common.run.short_errors import short_errors

CHUNK_BYTES = 2**20
TIMEOUT_S = 60


def fetch_bundle(url: str, bundle_dir: str | Path, sha256: str | None = None) -> Path:
    """Download ``<name>_v<version>.zip``, verify it and unpack it as ``bundle_dir/<name>``.

    Args:
        url: of the zip file.
        bundle_dir: folder to put the bundle's folder in.
        sha256: what the file must have; None reads it from ``SHA256SUMS`` beside the file.

    Returns:
        The bundle's folder.

    Raises:
        FileExistsError: if the bundle is there already.
        ValueError: if the server does not have the file or its checksum, the checksum is another, or the
            archive is damaged, unsafe or no bundle. Nothing is left behind.
    """
    name = Path(urlsplit(url).path).name
    bundle, version = name.removesuffix(".zip").partition("_v")[::2]
    if not name.endswith(".zip") or not bundle or not version:
        raise ValueError(f"url must end in <name>_v<version>.zip, got '{url}'.")
    target = Path(bundle_dir) / bundle
    if target.exists():
        raise FileExistsError(f"bundle must not be there yet, got '{target}'. Delete it, or choose another.")
    expected = sha256 or _published_digest(url, name)
    Path(bundle_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{bundle}-", dir=bundle_dir) as aside:
        archive = Path(aside, name)
        found = _download(url, archive)
        if found != expected.lower():
            raise ValueError(
                f"sha256 of '{url}' must be {expected.lower()}, got {found}. It was not unpacked."
            )
        content = Path(aside, "content")
        unzip(archive, content)
        if [path.name for path in content.iterdir()] != [bundle]:
            raise ValueError(f"archive must hold the one folder '{bundle}', got others in '{url}'.")
        if not (content / bundle / "configs" / "metadata.json").is_file():
            raise ValueError(f"bundle must have configs/metadata.json, got none in '{url}'.")
        shutil.move(content / bundle, target)
    return target


def _published_digest(url: str, name: str) -> str:
    sums = _get(urljoin(url, "SHA256SUMS")).text
    pairs = [words for line in sums.splitlines() if len(words := line.split(maxsplit=1)) == 2]
    digests = {file.removeprefix("*"): digest for digest, file in pairs}  # sha256sum's star for binary files
    if name not in digests:
        raise ValueError(f"SHA256SUMS beside '{url}' must list {name}, got {sorted(digests)}. Pass --sha256.")
    return digests[name]


def _get(url: str, stream: bool = False) -> requests.Response:
    try:
        answer = requests.get(url, stream=stream, timeout=TIMEOUT_S)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise ValueError(f"url must be one that answers, got '{url}' ({error}).") from error
    return answer


def _download(url: str, path: Path) -> str:
    """Write the file and return its SHA-256."""
    answer, digest = _get(url, stream=True), hashlib.sha256()
    total = int(answer.headers.get("content-length", 0)) or None
    with path.open("wb") as file, tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as bar:
        try:
            for chunk in answer.iter_content(CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
        except requests.RequestException as error:
            raise ValueError(
                f"download must not break off, got {bar.n:,} bytes of '{url}' ({error})."
            ) from error
    return digest.hexdigest()


def main(
    url: Annotated[str, typer.Argument(help="<name>_v<version>.zip of a release.")],
    bundle_dir: Annotated[Path, typer.Option(help="Folder to put the bundle's folder in.")] = Path("bundles"),
    sha256: Annotated[str, typer.Option(help="Expected digest; by default from SHA256SUMS beside it.")] = "",
) -> None:
    """Download a released bundle, check it, unpack it.

    Example: python -m common.fetch_bundle https://example.org/v0.1.0/dale_ct_2s_v0.1.0.zip
    """
    short_errors()
    typer.echo(fetch_bundle(url, bundle_dir, sha256 or None))


if __name__ == "__main__":
    typer.run(main)
