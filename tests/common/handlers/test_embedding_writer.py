"""What an engine encodes lies in the store of its strategy; what it cannot encode is listed."""

import csv
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from monai.engines.utils import PrepareBatchExtraInput

from common.ct.rejection import NOT_AXIAL_CT, RejectedError
from common.embeddings.ct_batches import Piece, SliceBatches, VolumeTask
from common.embeddings.store import EmbeddingStore, stored_volumes
from common.embeddings.work import CTSlices, CTSource, Work, embedding_work, store_folders
from common.handlers import embedding_writer
from common.handlers.embedding_writer import EmbeddingWriter, VolumeOutputs
from common.transforms.hounsfield import hu_window
from common.transforms.slice_strategies import SliceStrategy, slice_strategies

IDENTITY = {
    "encoder": "dale_ct_2s",
    "encoder_id": "random:3",
    "slice_order": "feet_to_head",
    "token_kind": "slice",
}
WINDOW = hu_window([-1000, 1000, 0, 1])  # images are HU


def source(volume: str, num_slices: int, first_hu: int) -> CTSource:
    """A volume whose slice z has the HU first_hu + z everywhere."""
    hu = np.full((num_slices, 32, 32), first_hu, np.int16)
    hu += np.arange(num_slices, dtype=np.int16)[:, None, None]
    return CTSource(volume, lambda: CTSlices(hu, (0.7, 0.8, 2.5)))


class MeanHU:
    """An inferer whose CLS is (mean HU, 1) and whose patches are the means of the four quadrants, twice."""

    def __init__(self, patch_tokens: bool) -> None:
        self.patch_tokens = patch_tokens

    def __call__(self, images: torch.Tensor, network: Any, is_fixed: bool) -> tuple[torch.Tensor, Any]:
        means = images.mean((1, 2, 3))
        patches = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        cls = torch.stack([means, torch.ones_like(means)], 1)
        return cls, patches[..., None].expand(-1, -1, 2) if self.patch_tokens else None


def run(
    folder: Path,
    sources: list[CTSource],
    names: tuple[str, ...] = ("raw_32",),
    patch_tokens: bool = False,
    dtype: str = "float32",
    stop_at: int | None = None,
    **changes: Any,
) -> None:
    strategies = slice_strategies(list(names), 16)
    folders = store_folders(folder, strategies)
    work: list[Work] = embedding_work(sources, strategies, folders)
    batches = SliceBatches(work, WINDOW, "yx", 10, 2, torch.device("cpu"), padded=False)
    settings = {"num_volumes": len(sources), "rejected": [], "max_rejected": 0.0} | changes
    writer = EmbeddingWriter(folders, folder, IDENTITY, dtype, batches, **settings)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=batches,
        network=torch.nn.Identity(),
        inferer=MeanHU(patch_tokens),
        prepare_batch=PrepareBatchExtraInput({"is_fixed": "is_fixed"}),
        val_handlers=[writer],
        decollate=False,
    )
    if stop_at is not None:

        def stop(engine: Engine) -> None:
            raise KeyboardInterrupt

        evaluator.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), stop)
    evaluator.run()


SOURCES = [source("a", 3, 0), source("b", 25, 100), source("c", 1, -500), source("d", 9, 7)]


def test_tokens_are_cls_feet_to_head_with_positions_and_identity(tmp_path: Path) -> None:
    run(tmp_path, SOURCES)
    store = EmbeddingStore(tmp_path)
    assert store.volumes == list("abcd")
    assert store.identity == IDENTITY | {"preprocessing": "raw_32", "dim": 2, "dtype": "float32"}
    embedding = store.read("b")
    np.testing.assert_allclose(embedding.tokens[:, 0], 100.0 + np.arange(25))
    assert embedding.z_mm is not None
    np.testing.assert_allclose(embedding.z_mm, 2.5 * np.arange(25))
    assert embedding.metadata["spacing_mm"] == [0.7, 0.8, 2.5]
    assert embedding.metadata["side_px"] == 32
    assert not (tmp_path / "rejected.csv").exists()


def test_patches_come_with_their_grid(tmp_path: Path) -> None:
    run(tmp_path, SOURCES, patch_tokens=True)
    store = EmbeddingStore(tmp_path)
    assert store.read("d").metadata["patch_grid"] == [2, 2]
    np.testing.assert_allclose(store.read_patches("d", [8])[0], np.full((4, 2), 15.0))


def test_each_strategy_has_its_store(tmp_path: Path) -> None:
    run(tmp_path, SOURCES, ("raw_32", "tiled_5cut", "tiled_5cut_items", "cropped_full"))
    shapes = {name: EmbeddingStore(tmp_path / name).read("d").tokens.shape for name in STORES}
    assert shapes == {
        "raw_32": (9, 2),
        "tiled_5cut": (9, 10),
        "tiled_5cut_items": (45, 2),
        "cropped_full": (9, 2),
    }
    assert EmbeddingStore(tmp_path / "tiled_5cut").identity["preprocessing"] == "tiled_5cut"
    assert EmbeddingStore(tmp_path / "cropped_full").read("d").metadata["box"] == [0, 0, 32]


STORES = ("raw_32", "tiled_5cut", "tiled_5cut_items", "cropped_full")


def fail() -> CTSlices:
    raise RejectedError("geometry", "tilted by 20 degrees")


def test_a_bad_volume_is_listed_and_fails_the_run_past_a_share(tmp_path: Path) -> None:
    sources = [*SOURCES, CTSource("e", fail)]
    scout = RejectedError(NOT_AXIAL_CT, "a scout").of("s")
    run(tmp_path, sources, max_rejected=0.2, rejected=[scout])
    assert EmbeddingStore(tmp_path).volumes == list("abcd")
    with (tmp_path / "rejected.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["volume", "reason", "detail"],
            ["e", "geometry", "tilted by 20 degrees"],
            ["s", NOT_AXIAL_CT, "a scout"],
        ]
    with pytest.raises(
        ValueError, match="must be at most 19.00%, got 20.00% .1 volumes, such as 'e': tilted by 20 degrees"
    ):
        run(tmp_path, sources, max_rejected=0.19)


def test_the_list_of_an_earlier_run_goes_when_all_is_well(tmp_path: Path) -> None:
    run(tmp_path, [*SOURCES, CTSource("e", fail)], max_rejected=1)
    assert (tmp_path / "rejected.csv").is_file()
    run(tmp_path, [*SOURCES, source("e", 2, 0)])
    assert not (tmp_path / "rejected.csv").exists()
    assert EmbeddingStore(tmp_path).volumes == list("abcde")


def test_embeddings_that_are_not_finite_are_a_bad_volume(tmp_path: Path) -> None:
    with mock.patch.object(MeanHU, "__call__", autospec=True) as encode:

        def bad(self: MeanHU, images: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
            means = images.mean((1, 2, 3))
            return torch.stack([means.where(means != -500, torch.nan), means], 1), None

        encode.side_effect = bad
        run(tmp_path, SOURCES, max_rejected=0.25)
    assert EmbeddingStore(tmp_path).volumes == ["a", "b", "d"]
    text = (tmp_path / "rejected.csv").read_text()
    assert 'c,embedding,"tokens must be finite, got NaN or Inf in 1 of 1 rows for volume' in text


def test_what_is_done_before_a_stop_is_kept_and_not_done_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, SOURCES, stop_at=2)
    assert stored_volumes(tmp_path) == {"a"}
    run(tmp_path, SOURCES)
    assert EmbeddingStore(tmp_path).volumes == list("abcd")
    straight = tmp_path / "straight"
    run(straight, SOURCES)
    for volume in "abcd":
        assert torch.equal(*(EmbeddingStore(folder).view(volume) for folder in (tmp_path, straight)))


def test_nothing_to_do_is_fine(tmp_path: Path) -> None:
    run(tmp_path, SOURCES)
    before = sorted(path.name for path in tmp_path.iterdir())
    run(tmp_path, SOURCES)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_error_in_the_writing_thread_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(embedding_writer.EmbeddingStoreWriter, "add", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, SOURCES)


def test_another_encoder_in_the_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path, SOURCES)
    with pytest.raises(ValueError, match="dtype .*'float32' as in .*'float16'"):
        run(tmp_path, SOURCES, dtype="float16")


RAW, TILED = SliceStrategy("raw_32", 16), SliceStrategy("tiled_5cut", 16)


def task(volume: str, num_slices: int, strategy: SliceStrategy = RAW) -> VolumeTask:
    return VolumeTask(volume, strategy, num_slices, (1.0, 1.0, 1.0), {})


@pytest.mark.parametrize("with_patches", [False, True])
def test_volumes_are_complete_when_their_last_image_is_there(with_patches: bool) -> None:
    a, b, c = task("a", 3), task("b", 4), task("c", 1)
    batches = [[Piece(a, 0, 3), Piece(b, 0, 1)], [Piece(b, 1, 3), Piece(c, 0, 1)]]
    cls = torch.randn(8, 5)
    patches = torch.randn(8, 4, 5) if with_patches else None
    outputs = VolumeOutputs(torch.float32)
    found = []
    for number, pieces in enumerate(batches):
        rows = slice(4 * number, 4 * number + 4)
        padded = torch.cat([cls[rows], torch.full((2, 5), torch.nan)])
        own = None if patches is None else torch.cat([patches[rows], torch.zeros(2, 4, 5)])
        volumes = list(outputs.add(pieces, padded, own))
        found.append([volume.task.volume for volume in volumes])
        for volume in volumes:
            place = {"a": slice(0, 3), "b": slice(3, 7), "c": slice(7, 8)}[volume.task.volume]
            assert torch.equal(volume.cls, cls[place])
            assert volume.patches is None if patches is None else torch.equal(volume.patches, patches[place])
    assert found == [["a"], ["b", "c"]]
    assert list(outputs.rest()) == []


def test_strategies_of_a_volume_are_kept_apart() -> None:
    raw, tiled = task("a", 2), task("a", 2, TILED)
    outputs = VolumeOutputs(torch.float16)
    assert list(outputs.add([Piece(raw, 0, 1)], torch.zeros(1, 3), None)) == []
    (volume,) = outputs.add([Piece(tiled, 0, 10)], torch.ones(10, 3), None)
    assert volume.task is tiled
    assert volume.cls.shape == (10, 3)
    assert volume.cls.dtype == torch.float16
    (volume,) = outputs.add([Piece(raw, 1, 1)], torch.full((1, 3), 2.0), None)
    assert volume.cls.tolist() == [[0] * 3, [2] * 3]


@pytest.mark.gpu
def test_outputs_of_a_gpu_come_later_and_whole() -> None:
    outputs = VolumeOutputs(torch.float32)
    cls = torch.randn(40, 5, device="cuda")
    found = [
        volume
        for number in range(10)
        for volume in outputs.add([Piece(task(str(number), 4), 0, 4)], cls[4 * number : 4 * number + 4], None)
    ]
    assert len(found) == 8
    found += outputs.rest()
    assert torch.equal(torch.cat([volume.cls for volume in found]), cls.cpu())
