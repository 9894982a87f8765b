"""What an engine encodes lies in the store of its strategy; what it cannot encode is listed."""

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator
from torch.nn import functional

from common.ct.rejection import NOT_AXIAL_CT, Doubt, RejectedError
from common.embeddings.ct_batches import Piece, SliceBatches, Task, VolumeBatches
from common.embeddings.store import EmbeddingStore, stored_volumes
from common.embeddings.work import CTSlices, CTSource, embedding_work, store_folders
from common.handlers import embedding_writer
from common.handlers.embedding_writer import EmbeddingWriter, VolumeOutputs
from common.transforms.hounsfield import hu_window
from common.transforms.slice_strategies import SliceStrategy, slice_strategies

IDENTITY = {"encoder": "x", "encoder_id": "random:3", "slice_order": "feet_to_head", "token_kind": "slice"}
WINDOW = hu_window([-1000, 1000, 0, 1])  # images are HU


def source(volume: str, num_slices: int, first_hu: int) -> CTSource:
    """A volume whose slice z has the HU first_hu + z everywhere."""
    hu = np.full((num_slices, 32, 32), first_hu, np.int16)
    hu += np.arange(num_slices, dtype=np.int16)[:, None, None]
    doubts = [Doubt("heart", "mirrored?", False)] if volume == "b" else []
    return CTSource(volume, lambda: CTSlices(hu, (0.7, 0.8, 2.5), f"sum of {volume}", doubts))


def mean_hu(images: torch.Tensor, network: Any, patch_tokens: bool = False) -> tuple[torch.Tensor, Any]:
    """An inferer whose CLS is (mean HU, 1) and whose patches are the means of the four quadrants, twice."""
    means = images.mean((1, 2, 3))
    patches = functional.adaptive_avg_pool2d(images, 2).flatten(1)
    cls = torch.stack([means, torch.ones_like(means)], 1)
    return cls, patches[..., None].expand(-1, -1, 2) if patch_tokens else None


def grid_of(volume: MetaTensor, network: Any) -> tuple[torch.Tensor, None]:
    """An inferer of volumes (1, 1, X, Y, Z): mean and maximum of its 2 x 4 x Z cells."""
    pool, plain = (functional.adaptive_avg_pool3d, functional.adaptive_max_pool3d), volume.as_tensor()
    return torch.cat([one(plain, (2, 4, volume.shape[-1])) for one in pool], 1), None


def run(
    folder: Path,
    sources: list[CTSource],
    names: tuple[str, ...] = ("raw_32",),
    inferer: Callable[..., Any] = mean_hu,
    dtype: str = "float32",
    stop_at: int | None = None,
    **changes: Any,
) -> None:
    folders = store_folders(folder, names)
    work = embedding_work(sources, folders)
    batches: SliceBatches | VolumeBatches
    if inferer is grid_of:
        batches = VolumeBatches(work, lambda item: item, "LPS", num_workers=2)
    else:
        batches = SliceBatches(
            work=work,
            strategies=slice_strategies(list(names), 16),
            window=WINDOW,
            slice_axes="yx",
            slices_per_batch=10,
            num_workers=2,
            device=torch.device("cpu"),
            padded=False,
        )
    settings = {"num_volumes": len(sources), "rejected": [], "max_rejected": 0.0} | changes
    writer = EmbeddingWriter(
        folders=folders, output_dir=folder, identity=IDENTITY, dtype=dtype, batches=batches, **settings
    )
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=batches,
        network=torch.nn.Identity(),
        inferer=inferer,
        val_handlers=[writer],
        decollate=False,
    )
    if stop_at is not None:

        def stop(engine: Engine) -> None:
            raise KeyboardInterrupt

        evaluator.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), stop)
    evaluator.run()


SOURCES = [source("a", 3, 0), source("b", 25, 100), source("c", 1, -500), source("d", 9, 7)]


def test_tokens_are_cls_feet_to_head_with_positions_identity_and_notes(tmp_path: Path) -> None:
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
    assert embedding.metadata["sha256"] == "sum of b"
    assert store.doubts() == {"b": ["mirrored?"]}
    assert not (tmp_path / "rejected.csv").exists()


def test_tokens_of_a_grid_are_row_major(tmp_path: Path) -> None:
    run(tmp_path, SOURCES, inferer=grid_of)
    embedding = EmbeddingStore(tmp_path).read("d")
    assert embedding.metadata["grid_shape"] == [2, 4, 9]
    assert embedding.metadata["axcodes"] == "LPS"
    assert embedding.z_mm is None
    assert embedding.tokens.shape == (2 * 4 * 9, 2)
    assert embedding.tokens[:, 0].tolist() == [7.0 + z for _ in range(8) for z in range(9)]
    assert EmbeddingStore(tmp_path).doubts() == {"b": ["mirrored?"]}


def test_patches_come_with_their_grid(tmp_path: Path) -> None:
    run(tmp_path, SOURCES, inferer=partial(mean_hu, patch_tokens=True))
    store = EmbeddingStore(tmp_path)
    assert store.read("d").metadata["patch_grid"] == [2, 2]
    np.testing.assert_allclose(store.read_patches("d", [8])[0], np.full((4, 2), 15.0))


def test_each_strategy_has_its_store(tmp_path: Path) -> None:
    shapes = {"raw_32": (9, 2), "tiled_5cut": (9, 10), "tiled_5cut_items": (45, 2), "cropped_full": (9, 2)}
    run(tmp_path, SOURCES, (*shapes,))
    assert {name: EmbeddingStore(tmp_path / name).read("d").tokens.shape for name in shapes} == shapes
    assert EmbeddingStore(tmp_path / "tiled_5cut").identity["preprocessing"] == "tiled_5cut"
    assert EmbeddingStore(tmp_path / "cropped_full").read("d").metadata["box"] == [0, 0, 32]


def fail() -> CTSlices:
    raise RejectedError("geometry", "tilted by 20 degrees")


@pytest.mark.parametrize("inferer", [mean_hu, grid_of])
def test_a_bad_volume_is_listed_and_fails_the_run_past_a_share(tmp_path: Path, inferer: Any) -> None:
    sources = [*SOURCES, CTSource("e", fail)]
    scout = RejectedError(NOT_AXIAL_CT, "a scout").of("s")
    run(tmp_path, sources, inferer=inferer, max_rejected=0.2, rejected=[scout])
    assert EmbeddingStore(tmp_path).volumes == list("abcd")
    with (tmp_path / "rejected.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["volume", "reason", "detail"],
            ["e", "geometry", "tilted by 20 degrees"],
            ["s", NOT_AXIAL_CT, "a scout"],
        ]
    with pytest.raises(ValueError, match=r"20\.00%.*19\.00%.*'e': tilted by 20 degrees"):
        run(tmp_path, sources, inferer=inferer, max_rejected=0.19)
    run(tmp_path, [*SOURCES, source("e", 2, 0)], inferer=inferer)
    assert not (tmp_path / "rejected.csv").exists()
    assert EmbeddingStore(tmp_path).volumes == list("abcde")


def test_embeddings_that_are_not_finite_are_a_bad_volume(tmp_path: Path) -> None:
    def bad(images: torch.Tensor, network: Any) -> tuple[torch.Tensor, None]:
        cls, _ = mean_hu(images, network)
        return cls.where(cls != -500, torch.nan), None

    run(tmp_path, SOURCES, inferer=bad, max_rejected=0.25)
    assert EmbeddingStore(tmp_path).volumes == ["a", "b", "d"]
    assert 'c,embedding,"tokens must be finite' in (tmp_path / "rejected.csv").read_text()


@pytest.mark.parametrize("inferer", [mean_hu, grid_of])
def test_what_is_done_before_a_stop_is_kept_and_not_done_again(tmp_path: Path, inferer: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, SOURCES, inferer=inferer, stop_at=2)
    assert {"a"} <= stored_volumes(tmp_path) < set("abcd")
    run(tmp_path, SOURCES, inferer=inferer)
    run(tmp_path / "straight", SOURCES, inferer=inferer)
    for volume in "abcd":
        both = (EmbeddingStore(folder).view(volume) for folder in (tmp_path, tmp_path / "straight"))
        assert torch.equal(*both)


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


def task(volume: str, num_images: int, store: str = "raw_32") -> Task:
    return Task(volume, store, num_images, (1.0, 1.0, 1.0), {}, SliceStrategy(store, 16))


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
        of_batch = None if patches is None else torch.cat([patches[rows], torch.zeros(2, 4, 5)])
        volumes = list(outputs.add(pieces, padded, of_batch))
        found.append([volume.task.volume for volume in volumes])
        for volume in volumes:
            place = {"a": slice(0, 3), "b": slice(3, 7), "c": slice(7, 8)}[volume.task.volume]
            assert torch.equal(volume.encoded, cls[place])
            assert volume.patches is None if patches is None else torch.equal(volume.patches, patches[place])
    assert found == [["a"], ["b", "c"]]
    assert list(outputs.rest()) == []


def test_strategies_of_a_volume_are_kept_apart() -> None:
    raw, tiled = task("a", 2), task("a", 10, "tiled_5cut")
    outputs = VolumeOutputs(torch.float16)
    assert list(outputs.add([Piece(raw, 0, 1)], torch.zeros(1, 3), None)) == []
    (volume,) = outputs.add([Piece(tiled, 0, 10)], torch.ones(10, 3), None)
    assert volume.task is tiled
    assert volume.encoded.shape == (10, 3)
    assert volume.encoded.dtype == torch.float16
    (volume,) = outputs.add([Piece(raw, 1, 1)], torch.full((1, 3), 2.0), None)
    assert volume.encoded.tolist() == [[0] * 3, [2] * 3]


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
    assert torch.equal(torch.cat([volume.encoded for volume in found]), cls.cpu())
