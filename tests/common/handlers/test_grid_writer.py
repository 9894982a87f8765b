"""What a 3D encoder makes of a volume is on disk with what it takes to read it; what is not is listed."""

import csv

import pytest
import torch
from ignite.engine import Engine

from common.ct.rejection import RejectedError
from common.embeddings.ct_batches import VolumeBatches
from common.embeddings.store import EmbeddingStore
from common.handlers.grid_writer import GridWriter

IDENTITY = {"encoder": "colipri", "encoder_id": "random:3", "preprocessing": "ras_2mm"}
IDENTITY |= {"slice_order": "none", "token_kind": "grid"}


def bag() -> dict[str, torch.Tensor]:
    return {"tokens": torch.randn(1, 30, 7), "grid": torch.tensor([[2, 3, 5]]), "pooled": torch.randn(1, 4)}


def run(bags, folder, rejected=(), unread=(), max_rejected=0.5, dtype="float32"):
    def encode(engine, name):
        engine.state.batch = {
            "volume": name,
            "spacing_mm": (0.7, 0.8, 2.5),
            "notes": {"doubts": ["mirrored?"]},
        }
        if isinstance(bags[name], BaseException):
            raise bags[name]
        return {"pred": bags[name]}

    batches = VolumeBatches([], dict, num_workers=0)
    batches.rejected = list(unread)
    engine = Engine(encode)
    writer = GridWriter(folder, IDENTITY, "RAS", dtype, batches, len(bags), rejected, max_rejected)
    writer.attach(engine)
    engine.run(list(bags))


def test_tokens_pooled_vector_grid_and_identity_are_written(tmp_path):
    bags = {"train_1_a_1": bag(), "train_2_a_1": bag()}
    run(bags, tmp_path)
    store = EmbeddingStore(tmp_path)
    for name, given in bags.items():
        embedding = store.read(name)
        assert torch.equal(embedding.tokens, given["tokens"][0])
        assert embedding.z_mm is None
        assert embedding.metadata["grid_shape"] == [2, 3, 5]
        assert embedding.metadata["axcodes"] == "RAS"
        assert embedding.metadata["doubts"] == ["mirrored?"]
        assert embedding.metadata["spacing_mm"] == pytest.approx([0.7, 0.8, 2.5])
    assert store.identity.items() >= IDENTITY.items()


def test_what_could_not_be_embedded_is_listed_and_too_much_of_it_is_an_error(tmp_path):
    too_large = bag()
    too_large["tokens"][0, 3, 2] = 1e6  # beyond float16
    left_out = RejectedError("duplicate", "two files").of("train_9_a_1")
    unread = RejectedError("unreadable", "cut off").of("train_3_a_1")
    bags = {"train_1_a_1": bag(), "train_2_a_1": too_large}
    run(bags, tmp_path, [left_out], [unread], max_rejected=1.0, dtype="float16")
    assert EmbeddingStore(tmp_path).volumes == ["train_1_a_1"]
    with (tmp_path / "rejected.csv").open() as file:
        rows = {row["volume"]: row["reason"] for row in csv.DictReader(file)}
    assert rows == {"train_2_a_1": "embedding", "train_3_a_1": "unreadable", "train_9_a_1": "duplicate"}
    with pytest.raises(ValueError, match=r"rejected volumes must be at most 50.00%, got 100.00% \(1 volumes"):
        run({"train_4_a_1": bag()}, tmp_path, unread=[unread], dtype="float16")
    run({"train_5_a_1": bag()}, tmp_path, dtype="float16")
    assert not (tmp_path / "rejected.csv").exists()


def test_what_was_added_before_an_error_is_written(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run({"train_1_a_1": bag(), "train_2_a_1": KeyboardInterrupt()}, tmp_path)
    assert EmbeddingStore(tmp_path).volumes == ["train_1_a_1"]
