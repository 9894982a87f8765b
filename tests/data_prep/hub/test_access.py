import errno
import socket

import pytest

from data_prep.hub.access import explained, one_line, open_repository

REPO = "owner/CT"


def test_a_dataset_that_is_open_to_the_token_is_opened_at_its_commit(start_hub) -> None:
    hub = start_hub(REPO)
    api, commit = open_repository(REPO, endpoint=hub.url)
    assert (api.endpoint, commit) == (hub.url, hub.COMMIT)
    assert {headers["authorization"] for _, headers in hub.headers} == {f"Bearer {hub.TOKEN}"}


@pytest.mark.parametrize(("status", "code"), [(401, "GatedRepo"), (403, "GatedRepo"), (401, ""), (403, "")])
def test_a_dataset_whose_terms_are_not_accepted_says_where_and_how(status, code, start_hub) -> None:
    hub = start_hub(REPO)
    hub.refusal = (status, code)
    with pytest.raises(PermissionError) as caught:
        open_repository(REPO, endpoint=hub.url)
    assert f"'owner/CT' (status {status})" in str(caught.value)
    assert f"{hub.url}/datasets/owner/CT, and run: hf auth login" in str(caught.value)


def test_a_dataset_or_revision_that_is_not_there_is_named(start_hub) -> None:
    hub = start_hub(REPO)
    with pytest.raises(FileNotFoundError, match="dataset 'owner/MR' on .*404"):
        open_repository("owner/MR", endpoint=hub.url)
    with pytest.raises(FileNotFoundError, match="revision of 'owner/CT' on .*404"):
        open_repository(REPO, "v9", hub.url)


def test_a_hub_out_of_reach_is_said_in_one_line(start_hub, monkeypatch) -> None:
    start_hub(REPO)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(ConnectionError, match=rf"{url} does not answer: .*refused") as caught:
        open_repository(REPO, endpoint=url)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        open_repository(REPO, endpoint=url)


def test_a_full_disk_ends_a_download_and_a_damaged_file_does_not() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        full = explained(OSError(number, "No space left"), REPO, "https://hub")
        assert full is not None
        assert "disk is full" in str(full)
    assert explained(OSError("file must have 3 bytes"), REPO, "https://hub") is None
    assert explained(RuntimeError("xet"), REPO, "https://hub") is None


def test_text_of_several_lines_becomes_one() -> None:
    assert (
        one_line(ValueError("404 Client Error.\n\n  Entry Not Found")) == "404 Client Error. Entry Not Found"
    )
    assert one_line(TimeoutError()) == "TimeoutError"
