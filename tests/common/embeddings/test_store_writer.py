"""A writer loses no volume it has written, and lets in nothing of another origin."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.embeddings.store import EmbeddingStore, stored_volumes
from common.embeddings.store_writer import EmbeddingStoreWriter

IDENTITY = {
    "encoder": "ct_fm",
    "encoder_id": "sha256:0",
    "preprocessing": "ct_fm",
    "slice_order": "none",
    "token_kind": "grid",
}
SPACING_MM = (0.7, 0.7, 3.0)


def test_parts_are_written_when_full_and_at_the_end(tmp_path: Path) -> None:
    with EmbeddingStoreWriter(tmp_path, IDENTITY, "float16", part_bytes=100) as writer:
        found = []
        for volume in "abcde":  # 2 x 15 numbers of 2 bytes: two volumes fill a part
            writer.add(volume, torch.ones(2, 15), SPACING_MM)
            found.append(len(stored_volumes(tmp_path)))
    assert found == [0, 2, 2, 4, 4]
    assert stored_volumes(tmp_path) == set("abcde")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_part_is_written_when_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    writer = EmbeddingStoreWriter(tmp_path, IDENTITY, "float16", part_seconds=60)
    for seconds, expected in ((0, 0), (59, 0), (60, 3), (100, 3), (161, 5)):
        now[0] = 100.0 + seconds
        writer.add(f"v{seconds}", torch.ones(2, 3), SPACING_MM)
        assert len(stored_volumes(tmp_path)) == expected


def test_what_was_added_before_an_error_is_kept(tmp_path: Path) -> None:
    def write() -> None:
        with EmbeddingStoreWriter(tmp_path, IDENTITY, "float32") as writer:
            for volume, num_tokens in (("a", 2), ("b", 0)):
                writer.add(volume, torch.ones(num_tokens, 3), SPACING_MM)

    with pytest.raises(ValueError, match="at least one token"):
        write()
    assert stored_volumes(tmp_path) == {"a"}


@pytest.mark.slow
def test_a_killed_process_loses_only_the_part_it_was_filling(tmp_path: Path) -> None:
    program = f"""
import torch
from common.embeddings.store_writer import EmbeddingStoreWriter
writer = EmbeddingStoreWriter({str(tmp_path)!r}, {IDENTITY}, "float16", part_bytes=100)
for number in range(7):
    writer.add(str(number), torch.ones(2, 15), {SPACING_MM})
print("added", flush=True)
input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path.cwd()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"added\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert stored_volumes(tmp_path) == set("012345")
    with EmbeddingStoreWriter(tmp_path, IDENTITY, "float16") as writer:
        writer.add("6", torch.ones(2, 15), SPACING_MM)
    assert EmbeddingStore(tmp_path).volumes == list("0123456")


def test_writers_side_by_side_share_a_folder(tmp_path: Path) -> None:
    first, second = (EmbeddingStoreWriter(tmp_path, IDENTITY, "float32") for _ in range(2))
    first.add("a", torch.ones(2, 3), SPACING_MM, grid_shape=[1, 1, 2])
    second.add("b", torch.zeros(4, 3), SPACING_MM, grid_shape=[1, 2, 2])
    first.close()
    second.close()
    store = EmbeddingStore(tmp_path)
    assert store.volumes == ["a", "b"]
    assert store.fields == ()
    assert store.read("b").metadata["grid_shape"] == [1, 2, 2]
    assert store.read("b").z_mm is None


@pytest.mark.parametrize(
    ("identity", "dtype", "message"),
    [
        (
            {"encoder": "merlin"},
            "float16",
            "encoder must be 'ct_fm' as in .*, got 'merlin'. Write into another",
        ),
        ({"encoder_id": "sha256:1"}, "float16", "encoder_id must be 'sha256:0' as in"),
        ({"preprocessing": "x"}, "float16", "preprocessing must be 'ct_fm' as in"),
        ({}, "float32", "dtype must be 'float16' as in .*, got 'float32'"),
        ({"token_kind": "pixel"}, "float16", r"token_kind must be one of \('slice', 'grid'\), got 'pixel'"),
        ({}, "bfloat16", r"dtype must be one of \('float16', 'float32'\), got 'bfloat16'"),
    ],
)
def test_another_origin_is_refused_at_once(
    tmp_path: Path, identity: dict[str, str], dtype: str, message: str
) -> None:
    with EmbeddingStoreWriter(tmp_path, IDENTITY, "float16") as writer:
        writer.add("a", torch.ones(2, 3), SPACING_MM)
    with pytest.raises(ValueError, match=message):
        EmbeddingStoreWriter(tmp_path, IDENTITY | identity, dtype)
    with pytest.raises(ValueError, match=r"identity must have the keys .*, got none of \['encoder'\]"):
        EmbeddingStoreWriter(
            tmp_path, {key: IDENTITY[key] for key in IDENTITY if key != "encoder"}, "float16"
        )


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize(
    ("volume", "arguments", "message"),
    [
        ("a", {}, "a volume must be embedded once, got 'a' again"),
        ("b", {"tokens": torch.ones(2, 4)}, "dim must be 3 as in .*, got 4"),
        ("b", {"pooled": torch.ones(3)}, r"fields must be \(\) as in .*, got \('pooled',\)"),
        ("b", {"z_mm": torch.arange(2)}, r"fields must be \(\) as in .*, got \('z_mm',\)"),
    ],
)
def test_a_volume_unlike_the_others_is_refused(
    tmp_path: Path, volume: str, arguments: dict[str, Any], message: str, reopened: bool
) -> None:
    writer = EmbeddingStoreWriter(tmp_path, IDENTITY, "float16")
    writer.add("a", torch.ones(2, 3), SPACING_MM)
    if reopened:
        writer.close()
        writer = EmbeddingStoreWriter(tmp_path, IDENTITY, "float16")
    with pytest.raises(ValueError, match=message):
        writer.add(volume, **{"tokens": torch.ones(2, 3), "spacing_mm": SPACING_MM} | arguments)


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    writer = EmbeddingStoreWriter(tmp_path, IDENTITY, "float16")
    with pytest.raises(ValueError, match="NaN or Inf in 1 of 2 rows for volume 'a'. Store float32"):
        writer.add("a", torch.tensor([[1.0], [70000.0]]), SPACING_MM)
    writer.close()
    assert stored_volumes(tmp_path) == set()
