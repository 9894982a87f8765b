"""Each volume is embedded once, by one process, under every strategy that lacks it."""

from pathlib import Path
from unittest import mock

import numpy as np
import torch

from common.embeddings.sources import CTSlices, CTSource
from common.embeddings.store_writer import EmbeddingStoreWriter
from common.embeddings.work import embedding_work, store_folders
from common.transforms.slice_strategies import slice_strategies

STRATEGIES = slice_strategies(["raw_32", "cropped_32"], 16)
SOURCES = [
    CTSource(volume, lambda: CTSlices(np.zeros((2, 4, 4), np.int16), (1, 1, 1))) for volume in "abcdefg"
]


def embed(folder: Path, strategy: str, volumes: str) -> None:
    identity = {"encoder": "x", "encoder_id": "x", "slice_order": "feet_to_head", "token_kind": "slice"}
    with EmbeddingStoreWriter(folder, identity | {"preprocessing": strategy}, "float16") as writer:
        for volume in volumes:
            writer.add(volume, torch.ones(2, 3), (1, 1, 1))


def test_one_strategy_has_the_folder_and_several_a_sub_folder_each() -> None:
    assert store_folders("out", STRATEGIES[:1]) == {"raw_32": Path("out")}
    assert store_folders("out", STRATEGIES) == {
        "raw_32": Path("out/raw_32"),
        "cropped_32": Path("out/cropped_32"),
    }


def test_what_is_embedded_is_done(tmp_path: Path) -> None:
    folders = store_folders(tmp_path, STRATEGIES)
    embed(folders["raw_32"], "raw_32", "ab")
    embed(folders["cropped_32"], "cropped_32", "bc")
    work = embedding_work(SOURCES[:4], STRATEGIES, folders)
    assert [(item.source.volume, [one.name for one in item.strategies]) for item in work] == [
        ("a", ["cropped_32"]),
        ("c", ["raw_32"]),
        ("d", ["raw_32", "cropped_32"]),
    ]


def test_ranks_share_what_is_left(tmp_path: Path) -> None:
    folders = store_folders(tmp_path, STRATEGIES[:1])
    embed(tmp_path, "raw_32", "b")
    shares = []
    for rank in range(3):
        with mock.patch.multiple(
            "common.embeddings.work.idist",
            get_rank=lambda rank=rank: rank,
            get_world_size=lambda: 3,
        ):
            work = embedding_work(SOURCES, STRATEGIES[:1], folders)
        shares.append("".join(item.source.volume for item in work))
    assert shares == ["ae", "cf", "dg"]
