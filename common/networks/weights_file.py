"""Weights files: found on disk or by name on the Hugging Face hub, and what is known of them."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

HUB = "hub:"
"""How a name on the hub begins: ``hub:<owner>/<name>[@revision]``."""


class Weights(NamedTuple):
    """Weights, and where they come from.

    Attributes:
        path: their file; None for random initial weights.
        name: ``hub:<owner>/<name>@<commit>``, which finds the same file again, or the file's path, or
            "random".
        sha256: digest of the file, in hexadecimal; None for random weights.
        facts: what is known of them, such as HU window and slice axes.
    """

    path: Path | None
    name: str
    sha256: str | None
    facts: Mapping[str, Any]


def find_weights(
    encoder_weights: str | Path | None,
    *,
    bundle_weights: str | Path,
    weights_repo: str | None,
    weights_repo_type: str,
    weights_revision: str,
    weights_name: str,
    weights_licence: str | None,
    facts: Mapping[str, Any],
) -> Weights:
    """Find an encoder's weights, and log in one line which they are, whose, and under which licence.

    In this order: those that are asked for; the bundle's own file, which training writes; the authors'
    release on the hub, which stays in the hub's cache. A file that states nothing of itself is the release if
    it comes from there, or was placed where the bundle's own would be.

    Args:
        encoder_weights: a file, or ``hub:<owner>/<name>[@revision]``; ``bundle_weights`` where nothing is
            asked for; None for random initial weights.
        bundle_weights: the bundle's own file.
        weights_repo: repository of the release; None for a bundle without.
        weights_repo_type: "model" or "dataset".
        weights_revision: its branch, tag or commit; a commit is the same file for ever.
        weights_name: path of the file in a repository.
        weights_licence: licence of the release.
        facts: what holds for the release, whose file does not state it.

    Raises:
        FileNotFoundError: if the file is neither on disk nor to be had from the hub.
        ValueError: if the file is damaged, or ``encoder_weights`` names nothing that could be on the hub.
    """
    if encoder_weights is None:
        return Weights(None, "random", None, {})
    asked, place = str(encoder_weights), Path(bundle_weights)
    is_own = Path(asked).absolute() == place.absolute()
    if asked.startswith(HUB):
        repository, _, revision = asked.removeprefix(HUB).partition("@")
        is_release = repository == weights_repo
        revision = revision or (weights_revision if is_release else "main")
        kind = weights_repo_type if is_release else "model"
    elif Path(asked).is_file():
        return _known(Path(asked), asked, weights_repo if is_own else None, weights_licence, facts)
    elif not is_own:
        raise FileNotFoundError(f"No encoder weights '{asked}': they are a file or {HUB}<owner>/<name>.")
    elif weights_repo is None:
        raise FileNotFoundError(f"No encoder weights '{place}'. Train the bundle, or pass --encoder_weights.")
    else:
        repository, revision, kind, is_release = weights_repo, weights_revision, weights_repo_type, True
    path = download(repository, weights_name, revision, kind, place if is_release else None)
    commit = path.parents[len(Path(weights_name).parts) - 1].name
    release = weights_repo if is_release else None
    return _known(path, f"{HUB}{repository}@{commit}", release, weights_licence, facts)


def download(
    repository: str, filename: str, revision: str, repo_type: str = "model", place: Path | None = None
) -> Path:
    """Return a file of the hub, from its cache where it lies there already.

    Args:
        repository: owner and name.
        filename: path of the file in it.
        revision: branch, tag or commit.
        repo_type: "model" or "dataset".
        place: where a file fetched by hand would be looked for.

    Raises:
        FileNotFoundError: if the hub cannot be reached, does not give the file, or the download breaks off.
        ValueError: if ``repository`` is no name of one.
    """
    from huggingface_hub import errors, hf_hub_download, hf_hub_url

    be_quiet()
    try:
        url = hf_hub_url(repository, filename, repo_type=repo_type, revision=revision)
        return Path(hf_hub_download(repository, filename, repo_type=repo_type, revision=revision))
    except errors.HFValidationError as error:
        raise ValueError(f"A repository is written {HUB}<owner>/<name>, got '{repository}'.") from error
    except (OSError, errors.HTTPError, errors.EntryNotFoundError) as error:
        page = url.partition("/resolve/")[0]
        by_hand = f"save it as '{place}'" if place else "pass the path of the file"
        raise FileNotFoundError(f"{_reason(error, page)} Or get {url} and {by_hand}.") from error


def be_quiet() -> None:
    """Tell the hub nothing of this machine, and the log nothing of each request."""
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True  # its environment variable is read at import
    logging.getLogger("httpx2").setLevel(logging.WARNING)


def _reason(error: Exception, page: str) -> str:
    """Say why the hub did not give a file, and what to do about it."""
    from huggingface_hub import errors, is_offline_mode

    if isinstance(error, errors.GatedRepoError):
        return f"Access to {page} is granted there: accept its terms, then `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"The hub has no {page}, or it is private: check the name, or `hf auth login`."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{page} has no such revision: check --weights_revision."
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{page} has no such file."
    if is_offline_mode():
        return f"{page} was never downloaded, and HF_HUB_OFFLINE forbids it now."
    cause = error.__cause__ or error
    detail = " ".join(str(cause).split())[:200] or type(cause).__name__
    return f"The download from {page} failed ({detail}): run this again once the hub can be reached."


def sha256_of(path: Path) -> str:
    """Return a file's digest in hexadecimal.

    Raises:
        ValueError: if the file lies in the hub's cache under another digest.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    blob = path.resolve()  # the cache names large files by their digest
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and blob.name != digest:
        raise ValueError(f"'{blob}' is damaged: its SHA-256 is another. Delete it, and run this again.")
    return digest


def stated_identity(path: str | Path) -> dict[str, Any]:
    """Read what a weights file says of itself; nothing for a file that was not written here.

    Args:
        path: safetensors file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No encoder weights '{path}'.")
    try:
        with safe_open(path, framework="pt") as file:
            identity: dict[str, Any] = json.loads((file.metadata() or {}).get("identity", "{}"))
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged, or no safetensors file ({error}).") from error
    return identity


def _known(
    path: Path, name: str, release: str | None, licence: str | None, facts: Mapping[str, Any]
) -> Weights:
    """Put together what is known of a file, and log it."""
    digest = sha256_of(path)
    stated = stated_identity(path) if path.suffix == ".safetensors" else {}
    if stated:
        whose = f"of {stated.get('name', 'an encoder')}, trained or imported with this code"
    elif release:
        kind = f"released by {release.partition('/')[0]}" if name.startswith(HUB) else f"taken for {release}"
        whose = f"{kind}, licence {licence}"
    else:
        whose = "which state nothing of themselves"
    logger.info("Weights %s, %s, SHA-256 %s", name, whose, digest)
    return Weights(path, name, digest, stated or (facts if release else {}))
