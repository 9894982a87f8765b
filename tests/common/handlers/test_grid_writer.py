"""What a 3D encoder makes of a volume is on disk with what it takes to read it."""

import pytest
import torch
from ignite.engine import Engine

from common.data.embedding_store import EmbeddingStore
from common.handlers.grid_writer import GridWriter


def test_tokens_pooled_vector_grid_and_identity_are_written(tmp_path):
    bags = {
        name: {"tokens": torch.randn(2 * 3 * 5, 7), "grid": torch.tensor([2, 3, 5]), "pooled": torch.randn(4)}
        for name in ("train_1_a_1", "train_2_a_1")
    }

    def encode(engine, name):
        engine.state.batch = [{"volume": name, "spacing_mm": torch.tensor([0.7, 0.8, 2.5])}]
        return [{"pred": bags[name]}]

    engine = Engine(encode)
    GridWriter(tmp_path, "colipri", "random:3", "ras_2mm", "RAS", dtype="float32").attach(engine)
    engine.run(list(bags))
    store = EmbeddingStore(tmp_path)
    for name, bag in bags.items():
        embedding = store.read(name)
        assert torch.equal(embedding.tokens, bag["tokens"])
        assert torch.equal(embedding.pooled, bag["pooled"])
        assert embedding.z_mm is None
        assert embedding.metadata["grid_shape"] == [2, 3, 5]
        assert embedding.metadata["axcodes"] == "RAS"
        assert embedding.metadata["spacing_mm"] == pytest.approx([0.7, 0.8, 2.5])
    expected = {"encoder": "colipri", "encoder_id": "random:3", "preprocessing": "ras_2mm"}
    assert store.identity.items() >= (expected | {"token_kind": "grid", "slice_order": "none"}).items()
