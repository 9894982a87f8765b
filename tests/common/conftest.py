"""Data that several tests share: random embeddings with labels, and slabs out of arrays."""

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from scipy.sparse import csr_matrix
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from common.embeddings.dense_labels import DenseLabels, write_dense_labels
from common.embeddings.store import EmbeddingStoreWriter
from common.reports.results import Predictions
from common.shards.index import VolumeEntry
from common.shards.slab_dataset import SlabViews
from common.transforms.multi_crop import RandSlabMultiCrop

LEJEPA = json.loads((Path(__file__).parents[2] / "bundles" / "_recipes" / "lejepa_train.json").read_text())
CLASSES = ["Emphysema", "Lung nodule", "Pleural effusion"]

WriteCohort = Callable[..., tuple[Path, Path]]


def predictions(size: int = 40, seed: int = 0) -> Predictions:
    """What a probe answers for volumes whose last class never occurs."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((size, 3)) < 0.4).astype(float)
    labels[:, 2] = 0
    scores = (0.5 * labels + 0.5 * rng.random((size, 3))).round(1)
    volumes = [f"valid_{index}_a_1" for index in range(size)]
    return Predictions("dale_ct_2s", volumes, CLASSES, scores, np.array([0.6, 0.4, 0.5]), labels)


@pytest.fixture
def write_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteCohort:
    """Return ``write(split, num_volumes, ...) -> (embeddings_dir, labels_csv)``.

    Class c of a volume shows as a shift of a third of its slices along dimension c.
    """

    def write(
        split: str,
        num_volumes: int,
        dim: int = 7,
        signal: float = 0.0,
        classes: Sequence[str] = CLASSES,
        encoder: str = "dale_ct_2s",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        labels: np.ndarray | None = None,
    ) -> tuple[Path, Path]:
        rng = np.random.default_rng(seed)
        folder = tmp_path / "embeddings" / split
        if labels is None:
            labels = (rng.random((num_volumes, len(classes))) < 0.4).astype(int)
        rows = [",".join(["VolumeName", *classes])]
        identity = {
            "encoder": encoder,
            "encoder_id": f"sha256:{encoder}",
            "preprocessing": "cropped_256",
            "slice_order": "feet_to_head",
            "token_kind": "slice",
        }
        names = {torch.float16: "float16", torch.float32: "float32"}
        monkeypatch.setattr("common.embeddings.store.PART_BYTES", 1000)  # several parts
        with EmbeddingStoreWriter(folder, identity, names[dtype]) as writer:
            for index, row in enumerate(labels):
                volume = f"{split}_{index // 2 + 1}_{'ab'[index % 2]}_1"
                tokens = torch.from_numpy(rng.standard_normal((int(rng.integers(3, 12)), dim)))
                for place, present in enumerate(row):
                    tokens[: len(tokens) // 3 + 1, place] += signal * float(present)
                writer.add(volume, tokens, (0.7, 0.7, 1.5), z_mm=torch.arange(len(tokens)) * 1.5)
                rows.append(",".join([f"{volume}.nii.gz", *map(str, row)]))
        labels_csv = tmp_path / f"{split}_labels.csv"
        labels_csv.write_text("\n".join(rows) + "\n")
        return folder, labels_csv

    return write


def tiny_vit(name: str = "vit_large_patch14_dinov2", **changes: Any) -> nn.Module:
    """A timm VisionTransformer for 16 pixels: 2 x 2 patches, width 16."""
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 0.1}
    fixed = {"in_chans": 1, "num_classes": 0, "dynamic_img_size": True}
    return timm.create_model(name, **fixed | sizes | changes)


class FakeGPU:
    """A GPU of tensors without values: what reads one raises, and what mixes devices."""

    device = torch.device("cuda")

    def __init__(self) -> None:
        self.mode = FakeTensorMode()

    def given(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch as the loader gives it: on the CPU."""
        return {
            name: self.mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }

    def holds(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Return tensors as they are on the GPU."""
        with self.mode:
            return [self.mode.from_tensor(tensor).to(self.device) for tensor in tensors]

    def take(self, *networks: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Move networks here, and what an optimizer knows of them."""
        moved = {}
        for network in networks:
            before = list(network.parameters())
            network._apply(lambda tensor: self.holds(tensor)[0])
            moved |= dict(zip(map(id, before), network.parameters(), strict=True))
        for group in optimizer.param_groups if optimizer else ():
            group["params"] = [moved[id(parameter)] for parameter in group["params"]]

    def try_step(self, engine: Any, batch: dict[str, Any], *modules: nn.Module) -> None:
        """Run a step of pretraining, which reads nothing from here, and the one that measures, which does.

        FakeTensorMode ends at the backward pass.
        """
        self.take(engine.network, *modules, optimizer=engine.optimizer)
        engine.state.device = self.device
        places = {"position": batch.pop("position")}  # of the step's record, which stays on the CPU
        reached = []

        def backward(loss: torch.Tensor) -> None:
            reached.append(loss.device.type)
            for parameter in engine.network.parameters():
                parameter.grad = torch.zeros_like(parameter)

        with self.mode, pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", backward)
            engine.state.iteration = 1
            (means,) = engine._iteration(engine, self.given(batch) | places)
            engine.state.iteration = engine.log_every = 2
            with pytest.raises(DataDependentOutputException):  # the control
                engine._iteration(engine, self.given(batch) | places)
        assert reached == ["cuda"] * 2
        assert {value.device.type for value in means.values()} == {engine.state.cls.device.type} == {"cuda"}


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    """A GPU to try code on whose machine has none; what runs on it runs under ``fake_gpu.mode``."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield FakeGPU()
    torch.__future__.set_overwrite_module_params_on_conversion(before)


class Scan(NamedTuple):
    """A volume in memory: HU ``(Z, H, W)`` and masks ``(Z, 128, 128)``."""

    hu: np.ndarray
    ts: np.ndarray | None = None
    rex: np.ndarray | None = None
    labels: dict[str, int] | None = None
    spacing_z_mm: float = 1.0


class Scans:
    """Stands in for a ShardSet, and for the slab of one of its volumes."""

    def __init__(self, scans: Sequence[Scan], volume_id: int = 0, window: slice = slice(0)) -> None:
        self.scans = scans
        self.scan, self.window = scans[volume_id], window
        self.volumes = [
            VolumeEntry(
                volume=f"train_{number}_a_1",
                shard="none",
                first_sample=0,
                num_slices=len(scan.hu),
                spacing_mm=(0.7, 0.7, scan.spacing_z_mm),
                shape=scan.hu.shape[1:],
                has_ts=scan.ts is not None,
                has_rex=scan.rex is not None,
                labels=scan.labels,
                source="",
                source_sha256="",
            )
            for number, scan in enumerate(scans)
        ]

    def read_slab(self, volume_id: int, z0: int, n: int) -> "Scans":
        return Scans(self.scans, volume_id, slice(z0, z0 + n))

    def read_ct(self, z: int) -> np.ndarray:
        return self.scan.hu[self.window][z]

    def read_ts(self) -> np.ndarray | None:
        return None if self.scan.ts is None else self.scan.ts[self.window]

    def read_rex(self) -> np.ndarray | None:
        return None if self.scan.rex is None else self.scan.rex[self.window]


def multi_crop(
    global_size_px: int, local_size_px: int, patch_size_px: int, **changes: Any
) -> RandSlabMultiCrop:
    """Views of these sizes, otherwise drawn as the recipe does."""
    sizes = {"global_size_px": global_size_px, "local_size_px": local_size_px, "patch_size_px": patch_size_px}
    recipe = {name: LEJEPA[name] for name in inspect.signature(RandSlabMultiCrop).parameters}
    return RandSlabMultiCrop(**recipe | sizes | changes)


SlabsOf = Callable[..., SlabViews]


@pytest.fixture
def slabs_of() -> SlabsOf:
    """Return ``slabs(scans, multi_crop, ...) -> SlabViews``, each scan one slab, in one pool, with masks.

    A scan is a dictionary of ``Scan``.
    """

    def slabs(scans: Sequence[dict[str, Any]], crop: RandSlabMultiCrop, **changes: Any) -> SlabViews:
        arguments = {"slab_mm": 1000.0, "rex_fraction": None, "seed": 0, "with_masks": True}
        shards: Any = Scans([Scan(**scan) for scan in scans])
        return SlabViews(shards=shards, multi_crop=crop, **arguments | changes)

    return slabs


DenseCohortDirs = Callable[..., tuple[Path, Path]]


@pytest.fixture
def write_dense(tmp_path: Path) -> DenseCohortDirs:
    """Return ``write(num_volumes, ...) -> (embeddings_dir, labels_dir)`` of 2 x 2 patches a slice.

    Finding k shows as a shift along dimension k, organ k as one along dimension 3 + k, in patches and, over
    the slice, in CLS tokens.
    """

    def write(num_volumes: int = 20, signal: float = 3.0, dim: int = 9, seed: int = 0) -> tuple[Path, Path]:
        rng = np.random.default_rng(seed)
        identity = {"encoder": "dale_ct_2s", "encoder_id": "sha256:0", "preprocessing": "cropped_256"}
        identity |= {"slice_order": "feet_to_head", "token_kind": "slice"}
        with EmbeddingStoreWriter(tmp_path / "tokens", identity, "float32") as writer:
            for number in range(num_volumes):
                volume = f"valid_{number + 1}_a_1"
                slices = int(rng.integers(4, 9))
                present = rng.random((slices, 4, 2)) < 0.3
                organs = rng.random((slices, 4, 3)) * (rng.random((slices, 4, 3)) < 0.4) / 3
                patches = rng.standard_normal((slices, 4, dim))
                patches[..., :2] += signal * present
                patches[..., 3:6] += signal * (organs > 0)
                cls = rng.standard_normal((slices, dim))
                cls[:, :2] += signal * present.any(1)
                cls[:, 3:6] += signal * organs.mean(1)
                shares = np.zeros((slices * 4, 118), np.float32)
                shares[:, 1:4] = organs.reshape(-1, 3)
                shares[:, 0] = 1 - shares.sum(1)
                findings = (present @ [1, 2]).astype(np.uint16)
                labels = DenseLabels(volume, (0, 0, 8), csr_matrix(shares), findings)
                write_dense_labels(tmp_path / "labels", labels)
                z_mm = torch.arange(slices) * 1.5
                tokens = (torch.from_numpy(part) for part in (cls, patches))
                writer.add(
                    *(volume, next(tokens), (0.7, 0.7, 1.5)),
                    **{"z_mm": z_mm, "patches": next(tokens), "patch_grid": (2, 2), "box": (0, 0, 8)},
                )
        return tmp_path / "tokens", tmp_path / "labels"

    return write


@pytest.fixture
def dense_cohorts(write_dense: DenseCohortDirs) -> dict[str, Any]:
    """Cohorts of 12, 5 and 7 volumes of ``write_dense``."""
    from common.embeddings.dense_cohort import DenseCohort

    dirs = write_dense(num_volumes=24)
    sides = {"train": range(1, 13), "validation": range(13, 18), "test": range(18, 25)}
    return {side: DenseCohort(*dirs, [f"valid_{n}_a_1" for n in numbers]) for side, numbers in sides.items()}


@pytest.fixture
def build_dense() -> Callable[..., Any]:
    """Return ``build(cohorts, ...)``, which builds a ``DenseProbeTrainer`` anew, as a new process does."""
    # these take seconds, which other tests do not wait for
    from monai.optimizers import WarmupCosineSchedule
    from torch.utils.data import DataLoader

    from common.embeddings.dense_cohort import DrawnRows, RemainingSteps, tasks
    from common.engines.dense_probe import BestLayers, DenseProbeTrainer
    from common.handlers.checkpoint import Checkpoint
    from common.networks.dense_probe import DenseProbes

    def build(
        cohorts: dict[str, Any],
        max_steps: int = 20,
        *,
        rates: Sequence[float] = (0.3, 0.1),
        dtype: torch.dtype = torch.float32,
        checkpoints: Path | None = None,
        handlers: Sequence[Any] = (),
        val_interval: int = 10,
    ) -> DenseProbeTrainer:
        network = DenseProbes(tasks(), rates, dim=9, seed=42).to(dtype)
        optimizer = torch.optim.SGD(network.parameter_groups(), momentum=0.95)
        scheduler = WarmupCosineSchedule(optimizer, warmup_steps=0, t_total=max_steps)
        best = BestLayers()
        others = {"lr_scheduler": scheduler, "best": best}
        keeping = {"network": network, "optimizer": optimizer, "others": others, "knobs": {}}
        keeping |= {"interval_steps": 7, "keep": 2, "only_finite": False}
        folders = [checkpoints] if checkpoints else []
        drawn = DrawnRows(cohorts["train"], max_steps, batch_size=16, seed=7)
        return DenseProbeTrainer(
            device=torch.device("cpu"),
            max_epochs=1,
            max_steps=max_steps,
            train_data_loader=DataLoader(drawn, batch_size=None, sampler=RemainingSteps(max_steps)),
            val_cohort=cohorts["validation"],
            test_cohort=cohorts["test"],
            network=network,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            loss_function=nn.BCEWithLogitsLoss(reduction="none"),
            best=best,
            val_interval=val_interval,
            min_positives=5,
            num_resamples=20,
            train_handlers=[*(Checkpoint(**keeping, folder=folder) for folder in folders), *handlers],
        )

    return build


WritePaths = Callable[..., Path]

# heart and liver of the slices of write_paths: id, and where they begin and end as shares of the scan
ORGANS_SHOWN = {51: (0.3, 0.6), 5: (0.05, 0.4)}


@pytest.fixture
def write_paths(tmp_path: Path) -> WritePaths:
    """Return ``write(shape, ...) -> embeddings_dir``: slices along a known path, an encoder a shape.

    ``line``: straight, by the share of the scan below. ``circle``: nine tenths of one. ``tangle``: no order.
    ``organs``: which of ``ORGANS_SHOWN`` a slice shows. Volumes, their slices and spacings are the same for
    all; 20 patients, one of them with two scans.
    """

    def write(shape: str, dim: int = 6, split: str = "valid") -> Path:
        identity = {"encoder": shape, "encoder_id": "sha256:0", "preprocessing": "cropped_256"}
        identity |= {"slice_order": "feet_to_head", "token_kind": "slice"}
        noise = np.random.default_rng(1)
        with EmbeddingStoreWriter(tmp_path / shape, identity, "float32") as writer:
            for number in range(21):
                volume = f"{split}_{number + 1}_a_1" if number < 20 else f"{split}_20_b_1"
                rng = np.random.default_rng(number)
                slices, spacing = int(rng.integers(20, 31)), float(rng.uniform(2, 4))
                share = np.linspace(0, 1, slices)
                tokens = np.zeros((slices, dim))
                if shape == "line":
                    tokens[:, 0], tokens[:, 1] = 3, 4 * share - 1
                elif shape == "circle":
                    tokens[:, 0], tokens[:, 1] = (f(1.8 * np.pi * share) for f in (np.cos, np.sin))
                elif shape == "tangle":
                    tokens = noise.standard_normal((slices, dim))
                else:
                    tokens[:, :2] = np.array([span_of(share, *span) for span in ORGANS_SHOWN.values()]).T
                    tokens[:, 2] = 1
                z_mm = torch.arange(slices) * spacing
                writer.add(volume, torch.from_numpy(tokens), (0.7, 0.7, spacing), z_mm=z_mm)
        return tmp_path / shape

    return write


@pytest.fixture
def write_spans(tmp_path: Path) -> Callable[[], Path]:
    """Return ``write() -> labels_dir``: dense labels, a patch a slice, of the volumes of ``write_paths``."""

    def write() -> Path:
        for number in range(21):
            volume = f"valid_{number + 1}_a_1" if number < 20 else "valid_20_b_1"
            slices = int(np.random.default_rng(number).integers(20, 31))
            shares = np.zeros((slices, 118), np.float32)
            for organ, span in ORGANS_SHOWN.items():
                shares[:, organ] = 0.2 * span_of(np.linspace(0, 1, slices), *span)
            shares[:, 0] = 1 - shares.sum(1)
            findings = np.zeros((slices, 1), np.uint16)
            labels = DenseLabels(volume, (0, 0, 8), csr_matrix(shares), findings)
            write_dense_labels(tmp_path / "spans", labels)
        return tmp_path / "spans"

    return write


def span_of(share: np.ndarray, first: float, last: float) -> np.ndarray:
    return (share >= first) & (share <= last)
