"""Weights by name, from a hub on this machine: which are found, what is known of them, what is refused."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save

from common.networks.encoder import Weights, find_weights, save_encoder, stated_identity
from tests.loopback_hub import COMMIT, LoopbackHub

REPO = "Kentucky-Open-Science/DALE-CT-2S"
FACTS = {"slice_axes": "xy", "hu_window": [-997, 888, -142.39, 360.97]}
STATED = {"name": "mine", "slice_axes": "yx", "hu_window": [-1000, 1000, 0, 500]}
RELEASED = save({"weight": torch.arange(100.0)})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the bundle's own weights lie; nothing lies there yet."""
    (tmp_path / "models").mkdir()
    return tmp_path / "models" / "model.safetensors"


@pytest.fixture
def released(hub: LoopbackHub) -> LoopbackHub:
    hub.files[REPO, "model.safetensors"] = RELEASED
    return hub


def found(place: Path, asked: str | Path | None = "", **changes: Any) -> Weights:
    """What a bundle finds; nothing is asked for by default."""
    options = {"weights_repo": REPO, "weights_repo_type": "model", "weights_revision": "main"}
    options |= {"weights_name": "model.safetensors", "weights_licence": "CC-BY-NC-SA-4.0", "facts": FACTS}
    return find_weights(place if asked == "" else asked, bundle_weights=place, **options | changes)


def test_the_release_comes_from_the_hub_with_all_that_is_known_of_it(released, place, caplog):
    caplog.set_level(logging.INFO, "common")
    weights = found(place)
    digest = hashlib.sha256(RELEASED).hexdigest()
    assert weights.path.read_bytes() == RELEASED
    assert weights[1:] == (f"hub:{REPO}@{COMMIT}", digest, FACTS)
    (line,) = [record.getMessage() for record in caplog.records]
    for word in (REPO, COMMIT, "Kentucky-Open-Science", "CC-BY-NC-SA-4.0", digest):
        assert word in line


def test_it_is_downloaded_once_and_nothing_else_is_asked_or_told(released, place, monkeypatch):
    first = found(place)
    file = f"/{REPO}/resolve/main/model.safetensors"
    assert [request[:2] for request in released.asked] == [("HEAD", file), ("GET", f"/cdn{file}")]
    assert not any("torch" in agent for *_, agent in released.asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert found(place) == first == found(place, first.name)
    assert len(released.asked) == 2


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_weights_can_be_asked_for_by_name_and_revision(released, place, revision):
    released.files["someone/encoder", "model.safetensors"] = b"\x02\0\0\0\0\0\0\0{}"
    theirs = found(place, f"hub:someone/encoder@{revision}", weights_revision="v9")
    assert theirs.name == f"hub:someone/encoder@{COMMIT}"
    assert theirs.facts == {}  # the release's do not hold for others
    assert found(place, f"hub:{REPO}@{revision}").facts == FACTS
    assert found(place, weights_revision=revision).name == f"hub:{REPO}@{COMMIT}"


def test_files_come_first_and_what_they_state_counts(released, place, tmp_path, caplog):
    caplog.set_level(logging.INFO, "common")
    place.write_bytes(RELEASED)  # placed by hand
    assert found(place).facts == FACTS
    assert found(place).path == place
    assert REPO in caplog.text
    save_encoder({}, place, STATED)  # by training
    assert found(place).facts == STATED
    save_encoder({}, tmp_path / "other.safetensors", STATED | {"name": "other"})
    assert found(place, tmp_path / "other.safetensors").facts["name"] == "other"
    (tmp_path / "plain.safetensors").write_bytes(RELEASED)
    assert found(place, tmp_path / "plain.safetensors").facts == {}
    assert released.asked == []
    assert found(place, None) == (None, "random", None, {})


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "GatedRepo", ["accept its terms", "`hf auth login`"]),
        (403, "GatedRepo", ["accept its terms", "`hf auth login`"]),
        (401, "RepoNotFound", ["check the name"]),
        (404, "RepoNotFound", ["check the name"]),
        (404, "EntryNotFound", ["no such file"]),
        (404, "RevisionNotFound", ["--weights_revision"]),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line_with_the_way_out(status, code, words, released, place):
    released.refused[REPO] = (status, code)
    with pytest.raises(FileNotFoundError) as caught:
        found(place)
    words = [*words, f"{released.url}/{REPO}/resolve/main/model.safetensors and save it as '{place}'"]
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message
    with pytest.raises(FileNotFoundError, match=r"resolve/main/model\S+ and pass the path"):
        found(place, "hub:no/body")


def test_offline_the_line_says_which_file_to_place_where(released, place, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as caught:
        found(place)
    message = str(caught.value)
    assert "HF_HUB_OFFLINE" in message
    assert message.endswith(f"{REPO}/resolve/main/model.safetensors and save it as '{place}'.")
    assert released.asked == []


def test_a_hub_out_of_reach_is_no_traceback(released, place, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    released.close()
    with pytest.raises(FileNotFoundError, match=f"can be reached.*resolve.*'{place}'") as caught:
        found(place)
    assert "\n" not in str(caught.value)


def test_a_download_that_breaks_off_is_not_used(released, place):
    released.cut.add(REPO)
    with pytest.raises(FileNotFoundError, match=rf"size {len(RELEASED)} but has size {len(RELEASED) // 2}"):
        found(place)
    released.cut.clear()
    assert found(place).path.read_bytes() == RELEASED


def test_other_bytes_than_the_hub_announced_are_not_used(released, place):
    released.swapped.add(REPO)
    with pytest.raises(ValueError, match="is damaged: .*SHA-256.*Delete it") as caught:
        found(place)
    released.swapped.clear()
    with pytest.raises(ValueError, match="is damaged"):
        found(place)  # as long as the file lies in the cache
    Path(str(caught.value).split("'")[1]).unlink()
    assert found(place).path.read_bytes() == RELEASED


@pytest.mark.parametrize("content", [b"<!doctype html>", RELEASED[:50], b""])
def test_files_that_are_no_weights_are_named(content, released, place):
    place.write_bytes(content)
    with pytest.raises(ValueError, match=f"'{place}' is damaged, or no safetensors file"):
        found(place)
    place.unlink()
    released.files[REPO, "model.safetensors"] = content
    with pytest.raises(ValueError, match="model.safetensors' is damaged, or no safetensors file"):
        found(place)


def test_what_can_be_nowhere_is_refused_before_the_hub_is_asked(released, place, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'.*mistyped.*a file or hub:<owner>/<name>"):
        found(place, tmp_path / "mistyped.safetensors")
    with pytest.raises(ValueError, match="hub:<owner>/<name>, got 'no name'"):
        found(place, "hub:no name")
    with pytest.raises(FileNotFoundError, match=f"'{place}'.*Train the bundle, or .*--encoder_weights"):
        found(place, weights_repo=None)
    assert released.asked == []
    with pytest.raises(FileNotFoundError, match="No encoder weights"):
        stated_identity(place)


def test_a_file_of_a_data_set_is_found_by_its_path(released, place):
    released.files["datasets/someone/ct", "sub/model.pt"] = b"weights"
    options = {"weights_repo": "someone/ct", "weights_repo_type": "dataset", "weights_name": "sub/model.pt"}
    weights = found(place, **options, facts={})
    assert weights.path.read_bytes() == b"weights"
    assert weights.name == f"hub:someone/ct@{COMMIT}"


def test_metadata_of_other_programs_say_nothing(place):
    place.write_bytes(save({"weight": torch.zeros(1)}, metadata={"format": "pt"}))
    assert stated_identity(place) == {}
    save_encoder({}, place, STATED)
    assert stated_identity(place) == json.loads(json.dumps(STATED))
