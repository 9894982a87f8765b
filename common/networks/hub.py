"""Files of the Hugging Face hub: fetched once, with the way out in one line where that fails."""

import logging
from pathlib import Path

HUB = "hub:"
"""How a name on the hub begins: ``hub:<owner>/<name>[@revision]``."""


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
