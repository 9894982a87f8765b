"""Opens a dataset on the Hugging Face hub, and says in one line why it cannot be read."""

import errno
import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REQUEST_TIMEOUT_S = 30


def open_repository(repo_id: str, revision: str = "main", endpoint: str | None = None) -> tuple["HfApi", str]:
    """Connect to the hub and check that a dataset may be read.

    The token is that of the environment variable HF_TOKEN or of ``hf auth login``.

    Args:
        repo_id: owner and name of the dataset.
        revision: branch, tag or commit.
        endpoint: address of the hub; by default the environment variable HF_ENDPOINT.

    Returns:
        The hub, and the commit of the revision.

    Raises:
        PermissionError: if the dataset's terms are not accepted, or the token is missing or wrong.
        FileNotFoundError: if there is no such dataset or revision.
        ConnectionError: if the hub does not answer.
        OSError: if it answers with another error.
    """
    # Requests then do not tell which packages are installed and which program started this one either.
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError

    constants.HF_HUB_DISABLE_TELEMETRY = True  # read from the environment at import, which may be long ago

    logging.getLogger("httpx2").setLevel(logging.WARNING)  # else a line for each request
    api = HfApi(endpoint=endpoint)
    try:
        info = api.dataset_info(repo_id, revision=revision, timeout=REQUEST_TIMEOUT_S)
        api.auth_check(repo_id, repo_type="dataset")
    except (OSError, HTTPError) as error:
        raise explained(error, repo_id, api.endpoint) or OSError(one_line(error)) from error
    if info.sha is None:
        raise OSError(f"The hub does not state the commit of '{repo_id}'.")
    return api, info.sha


def explained(error: BaseException, repo_id: str, endpoint: str) -> OSError | None:
    """Explain an error after which no file can be downloaded.

    Args:
        error: error of a request or a file.
        repo_id: owner and name of the dataset.
        endpoint: address of the hub.

    Returns:
        The one-line error to raise, or None if other files may still succeed.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if isinstance(cause, GatedRepoError) or status in (401, 403):
        page = f"{endpoint}/datasets/{repo_id}"
        return PermissionError(
            f"No access to the dataset '{repo_id}' (status {status}). Log in, accept its terms on {page}, "
            "and run: hf auth login (or set HF_TOKEN to a token that may read it)."
        )
    if isinstance(cause, RepositoryNotFoundError | RevisionNotFoundError):
        what = "such revision of" if isinstance(cause, RevisionNotFoundError) else "dataset"
        return FileNotFoundError(f"No {what} '{repo_id}' on {endpoint} (status {status}).")
    if isinstance(cause, OfflineModeIsEnabled):
        return ConnectionError("HF_HUB_OFFLINE is set, which forbids downloads. Unset it.")
    if isinstance(cause, HTTPError) and status is None:
        return ConnectionError(f"{endpoint} does not answer: {one_line(cause)}. Check the network.")
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return OSError("The disk is full. Free some space, then run the same command again: it resumes.")
    return None


def one_line(error: BaseException) -> str:
    """Return the text of an error without its line breaks."""
    return " ".join((str(error) or type(error).__name__).split())
