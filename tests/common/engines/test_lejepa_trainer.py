"""One iteration is Eq. 3, on data and random numbers that are functions of the step."""

import json

import numpy as np
import pytest
import timm
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn import functional
from torch.utils.data import Dataset

from common.engines.lejepa_trainer import LeJEPATrainer
from common.losses.auxiliary import AuxiliaryBCELoss
from common.losses.lejepa import LeJEPALoss
from common.losses.sigreg import SIGReg
from common.networks.pretraining_model import AuxiliaryHead, PretrainingModel, ProjectionHead
from common.optimizers.adamw import adamw, warmup_cosine
from common.shards.slab_dataset import StepBatches, StepLoader, collate_views
from common.transforms.hounsfield import HU_WINDOWS, normalize_hu

TS_WEIGHT, REX_WEIGHT = torch.linspace(1, 9, 118), torch.linspace(3, 5, 14)


SIDES, SHAPE = np.array([16, 16, 8, 8, 8]), (20, 20)


class Samples(Dataset):
    """A sample is a function of its position, as ``SlabViews``' are; each view as large as its crop.

    The mask grid is the slice's, so that a mask's part in the box is the mask of the view.
    """

    def __getitem__(self, position: int) -> dict:
        rng = np.random.default_rng(position)
        corners = [rng.integers(0, 20 - side, 2) for side in SIDES]
        boxes = [(0, *corner, side) for corner, side in zip(corners, SIDES, strict=True)]
        planes = {
            "ts_planes": rng.integers(0, 118, (5, *SHAPE)).astype(np.uint8),
            "rex_planes": (rng.integers(0, 2**14, (5, *SHAPE)) * (rng.random((5, *SHAPE)) < 0.05)).astype(
                np.int16
            ),
        }
        hu = [rng.integers(-1024, 1000, side * side).astype(np.int16) for side in SIDES]
        sample = {
            "position": position,
            "volume": f"train_{position}",
            "has_ts": True,
            "has_rex": position % 3 == 0,
            "global_pixels": np.concatenate(hu[:2]),
            "local_pixels": np.concatenate(hu[2:]),
            "boxes": np.array(boxes, np.int32),
            "flips": np.zeros(5, bool),
            "gamma": np.ones(5, np.float32),
            "blur_sigma": np.zeros(5, np.float32),
            "shape": np.array(SHAPE, np.int32),
            "ts_plane": np.arange(5),
            "rex_plane": np.arange(5),
        }
        return sample | planes

    def collate(self, samples: list) -> dict:
        return collate_views(samples, 2, (16, 8), patch_size_px=8)


def views_of(sample: dict) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """HU, organ ids and finding bits of each view."""
    pixels, end, views = np.concatenate([sample["global_pixels"], sample["local_pixels"]]), 0, []
    for view, (_, top, left, side) in enumerate(sample["boxes"]):
        box = slice(top, top + side), slice(left, left + side)
        hu = pixels[end : end + side * side].reshape(side, side)
        end += side * side
        views.append((hu, sample["ts_planes"][view][box], sample["rex_planes"][view][box]))
    return views


def trainer(steps: int, auxiliary: bool = True, lr: float = 1e-3, **changes) -> LeJEPATrainer:
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_large_patch14_dinov2",
        **{"in_chans": 1, "num_classes": 0, "dynamic_img_size": True, "img_size": 16, "patch_size": 8},
        **{"embed_dim": 12, "depth": 1, "num_heads": 2, "init_values": 0.1},
    )
    network = PretrainingModel(
        vit, ProjectionHead(12, 9, 7), AuxiliaryHead(12, 118, 14) if auxiliary else None
    )
    optimizer = adamw(network, lr=lr, weight_decay=0.04)
    arguments = {
        "device": torch.device("cpu"),
        "max_epochs": 1,
        "epoch_length": steps,
        "train_data_loader": StepLoader(Samples(), StepBatches(5, rank=0, world_size=1)),
        "network": network,
        "optimizer": optimizer,
        "lr_scheduler": warmup_cosine(optimizer, warmup_steps=0, total_steps=10, final_lr=lr / 10),
        "loss_function": LeJEPALoss(SIGReg(16), 0.02),
        "auxiliary_loss": AuxiliaryBCELoss(TS_WEIGHT, REX_WEIGHT) if auxiliary else None,
        "aux_weight": 0.1,
        "hu_window": HU_WINDOWS["ct_rate"],
        "patch_size_px": 8,
        "rex_targets": "presence",
        "clip_norm": 3.0,
        "amp_dtype": "float32",
        "measure_every": 1,
        "output_dir": "unused",
    }
    return LeJEPATrainer(**arguments | changes)


def loss_by_hand(network: PretrainingModel, step: int) -> dict[str, float]:
    """Eq. 1 to 3 from the samples, one view at a time."""
    samples = [Samples()[5 * (step - 1) + index] for index in range(5)]
    projections = torch.empty(5, 5, 7)
    sums = {name: [] for name in ("ts_cls", "ts_patch", "rex_cls", "rex_patch")}
    by_group = []
    for offset, views in ((0, 2), (2, 3)):
        terms = {name: [] for name in sums}
        for index, sample in enumerate(samples):
            for view in range(views):
                image, ids, bits = map(torch.from_numpy, views_of(sample)[offset + view])
                tokens = network.encoder.forward_features(
                    normalize_hu(image, HU_WINDOWS["ct_rate"])[None, None]
                )[0]
                projections[offset + view, index] = network.projector(tokens[0])
                logits = network.auxiliary_head(tokens)
                side = image.shape[0] // 8
                organs = functional.one_hot(ids.long(), 118).float()
                findings = torch.stack([(bits >> code) & 1 for code in range(14)], -1).float()
                for place in range(-1, side * side):
                    rows, columns = slice(None), slice(None)
                    if place >= 0:
                        rows = slice(8 * (place // side), 8 * (place // side) + 8)
                        columns = slice(8 * (place % side), 8 * (place % side) + 8)
                    level = "cls" if place < 0 else "patch"
                    share = organs[rows, columns].mean((0, 1))
                    terms[f"ts_{level}"].append(bce(logits["ts"][place + 1], share, TS_WEIGHT))
                    if sample["has_rex"]:
                        present = findings[rows, columns].amax((0, 1))
                        terms[f"rex_{level}"].append(bce(logits["rex"][place + 1], present, REX_WEIGHT))
        by_group.append({name: torch.stack(values).mean() for name, values in terms.items()})
    auxiliary = sum(sum(group.values()) / 4 for group in by_group) / 2
    lejepa = LeJEPALoss(SIGReg(16), 0.02)(projections, num_global=2, step=step)["loss"]
    return {"loss": float(lejepa + 0.1 * auxiliary), "lejepa": float(lejepa), "aux": float(auxiliary)}


def bce(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    positive, negative = torch.sigmoid(logits).log(), torch.sigmoid(-logits).log()
    return -(weight * target * positive + (1 - target) * negative).mean()


def test_the_loss_of_a_step_is_equation_3_computed_view_by_view():
    engine = trainer(steps=1)
    with torch.no_grad():
        expected = loss_by_hand(engine.network, step=1)
    engine.run()
    output = engine.state.output[0]
    assert {name: float(output[name]) for name in expected} == pytest.approx(expected, rel=1e-4)


def test_training_lowers_the_loss_and_moves_every_part_of_the_network():
    engine = trainer(steps=10)
    before = {name: tensor.clone() for name, tensor in engine.network.state_dict().items()}
    losses = []
    engine.add_event_handler("ITERATION_COMPLETED", lambda e: losses.append(float(e.state.output[0]["loss"])))
    engine.run()
    after = engine.network.state_dict()
    assert losses[-1] < losses[0]
    still = [name for name, tensor in before.items() if torch.equal(after[name], tensor)]
    assert still == []
    assert 0 < engine.state.metrics["cls_effective_rank"] <= 9
    assert 0 < engine.state.metrics["projection_ks"] < 1
    assert engine.state.cls.shape == (5, 2, 12)


def test_without_auxiliary_supervision_there_are_only_the_terms_of_equation_1():
    engine = trainer(steps=1, auxiliary=False)
    engine.run()
    assert engine.state.output[0].keys() == {"loss", "lejepa", "invariance", "sigreg", "grad_norm"}


def test_a_run_that_starts_at_a_later_step_reads_the_data_of_that_step():
    engine, seen = trainer(steps=7), []
    engine.add_event_handler("STARTED", lambda e: setattr(e.state, "iteration", 4))
    engine.add_event_handler("ITERATION_COMPLETED", lambda e: seen.append(e.state.batch["position"].tolist()))
    engine.run()
    assert seen == [list(range(5 * step, 5 * step + 5)) for step in (4, 5, 6)]


def test_the_gradient_is_clipped_by_its_global_norm():
    free, clipped = trainer(steps=1, clip_norm=1e9), trainer(steps=1, clip_norm=0.01)
    for engine in (free, clipped):
        engine.run()
    norms = [
        torch.stack([parameter.grad.norm() for parameter in engine.network.parameters()]).norm()
        for engine in (free, clipped)
    ]
    assert float(norms[1]) == pytest.approx(0.01, rel=1e-3)
    assert float(clipped.state.output[0]["grad_norm"]) == pytest.approx(float(norms[0]), rel=1e-4)


@pytest.mark.parametrize(("measure_every", "looked_at"), [(1, 1), (2, 2), (5, 3)])
def test_a_loss_that_is_not_finite_stops_the_run_and_lists_its_batch(measure_every, looked_at, tmp_path):
    engine = trainer(steps=3, measure_every=measure_every, output_dir=tmp_path)
    with torch.no_grad():
        engine.network.projector[0].weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"got nan at step 1; its slabs are listed in '.*Lower lr"):
        engine.run()
    assert engine.state.iteration == looked_at
    listed = json.loads((tmp_path / "not_finite_step_00000001_rank_0.json").read_text())
    assert listed["volume"] == [f"train_{position}" for position in range(5)]
    assert listed["position"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("auxiliary", [True, False])
def test_a_batch_in_parts_has_the_loss_and_gradient_of_the_whole(micro_batch_size, auxiliary):
    whole, parts = (
        trainer(steps=2, auxiliary=auxiliary, clip_norm=1e9, micro_batch_size=size)
        for size in (None, micro_batch_size)
    )
    for engine in (whole, parts):
        engine.run()
    expected, found = whole.state.output[0], parts.state.output[0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=1e-6, msg=name)
    for (name, one), other in zip(whole.network.named_parameters(), parts.network.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 2e-4 * one.grad.norm() + 1e-7, name
    torch.testing.assert_close(parts.state.cls, whole.state.cls, rtol=1e-4, atol=1e-5)


def test_losses_of_parts_that_are_added_up_are_not_the_loss_of_the_batch():
    """The control of the equality above: SIGReg of halves is another number."""
    torch.manual_seed(0)
    projections = torch.randn(3, 6, 7)
    loss = LeJEPALoss(SIGReg(16), 0.02)
    whole = loss(projections, num_global=2, step=1)["sigreg"]
    halves = [loss(half, num_global=2, step=1)["sigreg"] for half in projections.split(3, dim=1)]
    assert abs(sum(halves) / 2 - whole) > 0.01 * whole


def test_the_number_of_slabs_at_once_must_be_positive():
    with pytest.raises(ValueError, match="micro_batch_size must be positive, got 0"):
        trainer(steps=1, micro_batch_size=0)


def test_an_unknown_amp_dtype_is_refused():
    with pytest.raises(ValueError, match="amp_dtype must be 'bfloat16' or 'float32', got 'float16'"):
        trainer(steps=1, amp_dtype="float16")


def test_bfloat16_autocast_leaves_the_loss_in_float32():
    engine = trainer(steps=1, amp_dtype="bfloat16")
    engine.run()
    exact = trainer(steps=1)
    exact.run()
    assert engine.state.output[0]["sigreg"].dtype == torch.float32
    assert float(engine.state.output[0]["loss"]) == pytest.approx(
        float(exact.state.output[0]["loss"]), rel=0.02
    )


@pytest.mark.parametrize("auxiliary", [True, False])
def test_a_step_on_a_gpu_reads_nothing_from_it_until_it_is_measured(fake_gpu, monkeypatch, auxiliary):
    engine = trainer(steps=1, auxiliary=auxiliary, measure_every=2)
    heads = [engine.network, *([engine.auxiliary_loss] if auxiliary else [])]
    fake_gpu.take(*heads, optimizer=engine.optimizer)
    engine.state.device = fake_gpu.device
    batch = Samples().collate([Samples()[position] for position in range(5)])
    places = {"position": batch.pop("position")}  # of the step's record, which stays on the CPU
    reached = []

    def backward(loss):
        reached.append(loss.device.type)
        for parameter in engine.network.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with fake_gpu.mode:
        engine.state.iteration = 1
        (means,) = engine._iteration(engine, fake_gpu.given(batch) | places)
        engine.state.iteration = 2
        with pytest.raises(DataDependentOutputException):  # the control
            engine._iteration(engine, fake_gpu.given(batch) | places)
    assert reached == ["cuda"] * 2
    assert {value.device.type for value in means.values()} == {engine.state.cls.device.type} == {"cuda"}
