"""CTs with labels: in the order asked for, as the encoder wants them, or refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.ct.rejection import RejectedError
from common.embeddings.ct_bags import CTBags, labelled_cts
from common.embeddings.ct_batches import images_of
from common.embeddings.work import CTSlices, CTSource
from common.transforms.hounsfield import HU_WINDOWS
from common.transforms.slice_strategies import SliceStrategy

WINDOW = HU_WINDOWS["ct_rate"]


class Encoder(dict):
    """Stands in for an encoder bundle."""

    name, slice_axes, window = "tiny", "yx", WINDOW

    def __init__(self, *strategies: str) -> None:
        super().__init__({"strategies": list(strategies)} if strategies else {})
        self.strategies = [SliceStrategy(name, 8) for name in strategies]


def source(number: int, is_damaged: bool = False) -> CTSource:
    def read() -> CTSlices:
        if is_damaged:
            raise RejectedError("unreadable", "a truncated file")
        return CTSlices(np.full((2 + number, 16, 16), 10 * number, np.int16), (0.8, 0.8, 2.0))

    return CTSource(f"train_{number}_a_1", read)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "labels.csv"
    rows = [f"train_{number}_a_1.nii.gz,{number % 2},1" for number in (3, 1, 2)]
    path.write_text("\n".join(["VolumeName,a,b", *rows]))
    return path


@pytest.fixture
def bags(table: Path) -> Callable[..., CTBags]:
    def make(sources: list[CTSource], *strategies: str, num_workers: int = 2, **others) -> CTBags:
        return CTBags(
            sources=sources,
            labels_csv=table,
            class_names=["a", "b"],
            encoder=Encoder(*strategies),
            num_workers=num_workers,
            device=torch.device("cpu"),
            **others,
        )

    return make


@pytest.mark.parametrize("num_workers", [0, 2])
def test_volumes_come_in_the_order_asked_for_as_embedding_would_show_them(num_workers, bags) -> None:
    sources = [source(number) for number in (1, 2, 3)]
    of = bags(sources, "raw_8", num_workers=num_workers, volumes=["train_2_a_1", "train_1_a_1"])
    assert of.labels.tolist() == [[0, 1], [1, 1]]
    for index, images in zip([1, 0, 1], of.read([1, 0, 1]), strict=True):
        hu = torch.from_numpy(sources[(1, 0)[index]].read().hu)
        expected = images_of(hu, SliceStrategy("raw_8", 8), WINDOW, "yx", torch.device("cpu"))
        torch.testing.assert_close(images, expected, rtol=0, atol=0)
    assert of.checksum() != bags(sources, "raw_8").checksum()


def test_a_volume_that_cannot_be_read_stops_the_training(bags) -> None:
    of = bags([source(1), source(2, is_damaged=True)], "raw_8")
    images = of.read([0, 1, 0])
    next(images)
    with pytest.raises(ValueError, match=r"train_2_a_1.*truncated.*--skip_list"):
        next(images)


@pytest.mark.parametrize(
    ("strategies", "others", "told"),
    [
        ((), {}, "tiny"),
        (("raw_8", "raw_16"), {}, "raw_16"),
        (("tiled",), {}, "tiled"),
        (("raw_8",), {"volumes": ["train_9_a_1"]}, "train_9_a_1"),
        (("raw_8",), {"volumes": []}, "labels.csv"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(strategies, others, told, bags) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        bags([source(1)], *strategies, **others)


def test_labelled_cts_come_in_the_order_of_the_table_and_others_are_counted(table, caplog) -> None:
    assert labelled_cts(([source(2), source(3), source(7)], []), table) == ["train_3_a_1", "train_2_a_1"]
    assert "1 CTs" in caplog.text
    assert "train_7_a_1" in caplog.text
    assert "train_1_a_1" in caplog.text
    with pytest.raises(ValueError, match="train_8_a_1"):
        labelled_cts(([source(8)], []), table)
    damaged = RejectedError("unreadable", "a truncated file").of("train_1_a_1")
    with pytest.raises(ValueError, match=r"train_1_a_1.*truncated"):
        labelled_cts(([source(2)], [damaged]), table)
