"""A part is ordinary safetensors, and nothing a reader could not rely on gets into one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from isal import isal_zlib
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.embeddings.part import (
    IDENTITY_KEYS,
    Embedding,
    check_embedding,
    check_finite,
    crc32,
    read_header,
    write_part,
)

IDENTITY = dict.fromkeys(IDENTITY_KEYS, "x")


def embedding(volume: str = "train_1_a_1", num_tokens: int = 5, **changes: Any) -> Embedding:
    good = Embedding(
        torch.randn(num_tokens, 7),
        torch.arange(num_tokens) * 1.5,
        {"volume": volume, "spacing_mm": [0.7, 0.8, 1.5]},
    )
    return good._replace(**changes)


def test_a_part_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    first, second = embedding("a", 5), embedding("b", 3)
    tensors = load_file(write_part(tmp_path, [first, second], IDENTITY))
    assert set(tensors) == {"tokens", "z_mm"}
    assert torch.equal(tensors["tokens"], torch.cat([first.tokens, second.tokens]))
    assert torch.equal(tensors["z_mm"], torch.tensor([0, 1.5, 3, 4.5, 6, 0, 1.5, 3]))
    assert len(list(tmp_path.iterdir())) == 1


def test_the_header_says_what_is_inside(tmp_path: Path) -> None:
    volumes = [embedding("a", 5, pooled=torch.ones(6)), embedding("b", 3, pooled=torch.zeros(6))]
    header = read_header(write_part(tmp_path, volumes, IDENTITY))
    assert header.identity == IDENTITY | {"dim": 7, "dtype": "float32"}
    assert header.fields == ("z_mm", "pooled")
    assert [record["num_tokens"] for record in header.records] == [5, 3]
    assert header.records[1]["metadata"] == volumes[1].metadata
    assert header.records[0]["crc32"]["pooled"] == isal_zlib.crc32(torch.ones(6).numpy().tobytes())


def test_the_name_is_that_of_the_volumes(tmp_path: Path) -> None:
    paths = {
        write_part(tmp_path, [embedding(name) for name in names], IDENTITY) for names in ("ab", "ba", "a")
    }
    assert len(paths) == 3
    again = write_part(tmp_path, [embedding("a"), embedding("b")], IDENTITY)
    assert again in paths


def test_checksum_is_that_of_the_bytes_in_order() -> None:
    tensor = torch.arange(12, dtype=torch.float16).reshape(3, 4)
    assert crc32(tensor.T) == isal_zlib.crc32(tensor.T.numpy().tobytes()) != crc32(tensor)


@pytest.mark.parametrize("kept", [4, 40, -3])
def test_a_truncated_part_is_refused(tmp_path: Path, kept: int) -> None:
    path = write_part(tmp_path, [embedding()], IDENTITY)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="whole files of an EmbeddingWriter, got .*Delete it and embed"):
        read_header(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.embeddings.safetensors"
    save_file({"tokens": torch.zeros(2, 3)}, path)
    with pytest.raises(ValueError, match="got .*x.embeddings.safetensors' .format None."):
        read_header(path)


@pytest.mark.parametrize("said", [b"spacing_mm", b"crc32", b"dale_ct"])
def test_a_header_that_was_changed_is_refused(tmp_path: Path, said: bytes) -> None:
    path = write_part(tmp_path, [embedding()], IDENTITY)
    data = path.read_bytes()
    assert said in data
    path.write_bytes(data.replace(said, said.swapcase(), 1))
    with pytest.raises(ValueError, match=r"must be whole files .* Delete it and embed its volumes again\."):
        read_header(path)


def test_a_part_with_other_rows_than_it_states_is_refused(tmp_path: Path) -> None:
    path = write_part(tmp_path, [embedding()], IDENTITY)
    with safe_open(path, framework="pt") as file:
        stated = file.metadata()
    save_file({"tokens": torch.zeros(4, 7), "z_mm": torch.zeros(5)}, path, metadata=stated)
    with pytest.raises(ValueError, match="must have the rows its volumes state, .*'tokens': 5.*'tokens': 4"):
        read_header(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(5)}, r"tokens must be float16 or float32 \(T, D\), got torch.float32 \(5,\)"),
        ({"tokens": torch.zeros(5, 7).int()}, r"\(T, D\), got torch.int32 \(5, 7\) for volume 'train_1_a_1'"),
        (
            {"tokens": torch.zeros(0, 7), "z_mm": torch.zeros(0)},
            "at least one token, got 0 for volume 'train_1_a_1'",
        ),
        ({"z_mm": torch.zeros(4)}, r"z_mm must rise feet to head with shape \(5,\), got \(4,\)"),
        ({"z_mm": -torch.arange(5.0)}, "z_mm must rise feet to head"),
        (
            {"tokens": torch.zeros(5, 7).index_fill_(0, torch.tensor([2, 4]), torch.inf)},
            "tokens must be finite, got NaN or Inf in 2 of 5 rows for volume 'train_1_a_1'",
        ),
        ({"pooled": torch.full((7,), torch.nan)}, "pooled must be finite"),
        ({"pooled": torch.zeros(2, 7)}, r"pooled must be torch.float32 \(E,\), got torch.float32 \(2, 7\)"),
        (
            {"patches": torch.zeros(4, 9, 7)},
            r"patches must be torch.float32 \(5, P, 7\), got torch.float32 \(4, 9, 7\)",
        ),
        ({"patches": torch.zeros(5, 9, 7).half()}, r"got torch.float16 \(5, 9, 7\)"),
        ({"patches": torch.full((5, 2, 7), -torch.inf)}, "patches must be finite, got NaN or Inf in 5 of 5"),
        (
            {"metadata": {"volume": "v"}},
            "spacing_mm must be three positive numbers .*got None for volume 'v'",
        ),
        ({"metadata": {"volume": "v", "spacing_mm": [1, 1, 0]}}, r"got \[1, 1, 0\] for volume 'v'"),
        ({"metadata": {"spacing_mm": [1, 1, 1]}}, "volume must be a name, got None"),
        (
            {"metadata": {"volume": "v", "spacing_mm": [1, 1, 1], "grid_shape": [2, 3]}},
            r"grid_shape must have 5 cells as there are tokens, got \[2, 3\] for volume 'v'",
        ),
    ],
)
def test_what_a_reader_could_not_trust_is_refused(changes: dict[str, Any], message: str) -> None:
    check_embedding(embedding())
    with pytest.raises(ValueError, match=message):
        check_embedding(embedding(**changes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 1234, 4997])
def test_one_bad_value_anywhere_is_found(dtype: torch.dtype, value: float, place: int) -> None:
    tensor = torch.randn(51, 98).to(dtype)
    check_finite(tensor, "tokens", "v")
    tensor.view(-1)[place] = value
    hint = "Store float32: float16 ends at 65504" if dtype == torch.float16 else "for volume 'v'.$"
    with pytest.raises(ValueError, match=f"tokens must be finite, got NaN or Inf in 1 of 51 rows.*{hint}"):
        check_finite(tensor, "tokens", "v")
