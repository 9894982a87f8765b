"""Each volume's embeddings are on disk before the next is encoded."""

import pytest
import torch
from ignite.engine import Engine

from common.data.embedding_store import EmbeddingStore
from common.handlers.embedding_writer import EmbeddingWriter


def test_cls_is_written_feet_to_head_with_positions_and_identity(tmp_path):
    cls = torch.randn(5, 7)

    def encode(engine, _):
        engine.state.batch = [{"volume": "train_1_a_1", "spacing_mm": torch.tensor([0.7, 0.8, 2.5])}]
        return [{"pred": cls}]

    engine = Engine(encode)
    EmbeddingWriter(tmp_path, "dale_ct_2s", "random:3", "cropped_256", dtype="float32").attach(engine)
    engine.run([0])
    store = EmbeddingStore(tmp_path)
    embedding = store.read("train_1_a_1")
    torch.testing.assert_close(embedding.tokens, cls)
    torch.testing.assert_close(embedding.z_mm, torch.tensor([0.0, 2.5, 5.0, 7.5, 10.0]))
    assert store.identity["encoder_id"] == "random:3"
    assert store.identity["preprocessing"] == "cropped_256"
    assert embedding.metadata["spacing_mm"] == pytest.approx([0.7, 0.8, 2.5])
