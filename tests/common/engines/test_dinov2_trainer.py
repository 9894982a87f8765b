"""One iteration is DINO plus iBOT, towards a teacher that follows the student."""

import math

import numpy as np
import pytest
import timm
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils.data import Dataset

from common.engines.dinov2_trainer import DINOv2Trainer
from common.losses.dino import DINOLoss, IBOTLoss
from common.losses.koleo import koleo_loss
from common.networks.dino_model import DINOModel, new_teacher
from common.networks.pretraining_model import DINOHead
from common.optimizers.adamw import layerwise_adamw
from common.optimizers.dino_schedule import DINOSchedule
from common.shards.slab_dataset import StepBatches, StepLoader, collate_views
from common.transforms.batch_views import render_views
from common.transforms.hounsfield import HU_WINDOWS
from common.transforms.patch_masks import PatchMasks, masked_places

SIDES, K, STEPS = np.array([16, 16, 8, 8, 8]), 13, 20
WINDOW = HU_WINDOWS["ct_rate"]


class Samples(Dataset):
    """A sample is a function of its position; each view as large as its crop."""

    masks = PatchMasks(grid=2, num_global=2, seed=3, ratio=(0.3, 0.8))

    def __getitem__(self, position: int) -> dict:
        rng = np.random.default_rng(position)
        hu = [rng.integers(-1024, 1000, side * side).astype(np.int16) for side in SIDES]
        return {
            "position": position,
            "volume": f"train_{position}",
            "global_pixels": np.concatenate(hu[:2]),
            "local_pixels": np.concatenate(hu[2:]),
            "boxes": np.array([(0, 0, 0, side) for side in SIDES], np.int32),
            "flips": np.zeros(5, bool),
            "gamma": np.ones(5, np.float32),
            "blur_sigma": np.zeros(5, np.float32),
            "shape": np.array((20, 20), np.int32),
            "masks": self.masks.draw(position),
        }

    def collate(self, samples: list) -> dict:
        batch = collate_views(samples, 2, (16, 8), patch_size_px=8)
        return batch | masked_places(batch["masks"], self.masks.most_masked(len(samples)))


def trainer(steps: int, **changes) -> DINOv2Trainer:
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_large_patch14_reg4_dinov2",
        **{"in_chans": 1, "num_classes": 0, "dynamic_img_size": True, "img_size": 16, "patch_size": 8},
        **{"embed_dim": 12, "depth": 1, "num_heads": 2, "init_values": 0.1},
    )
    student = DINOModel(vit, DINOHead(12, 9, 6, K), DINOHead(12, 9, 6, K))
    teacher = new_teacher(student)
    optimizer = layerwise_adamw(student, 1, 1e-3, 0.04, 1.0, 0.2)
    arguments = {
        "device": torch.device("cpu"),
        "max_epochs": 1,
        "epoch_length": steps,
        "train_data_loader": StepLoader(Samples(), StepBatches(5, rank=0, world_size=1)),
        "network": student,
        "teacher": teacher,
        "optimizer": optimizer,
        "schedule": DINOSchedule(
            optimizer, STEPS, 0, 1e-3, 1e-4, (0.04, 0.2), (0.9, 1.0), (0.04, 0.07), 5, 2
        ),
        "loss_function": DINOLoss(K, "sinkhorn_knopp"),
        "ibot_loss": IBOTLoss(K, "sinkhorn_knopp"),
        "ibot_weight": 0.5,
        "koleo_weight": 0.1,
        "hu_window": WINDOW,
        "clip_norm": 3.0,
        "amp_dtype": "float32",
        "measure_every": 1,
        "output_dir": "unused",
    }
    return DINOv2Trainer(**arguments | changes)


def test_the_loss_of_a_step_is_computed_view_by_view_and_patch_by_patch():
    engine = trainer(steps=1)
    student, teacher = engine.network, engine.teacher
    batch = Samples().collate([Samples()[position] for position in range(5)])
    with torch.no_grad():
        images = [view for views in render_views(batch, WINDOW) for view in views.unbind(1)]
        seen = [teacher.tokens(image, None) for image in images[:2]]
        masks = [batch["masks"][:, view] for view in range(2)]
        told = [student.tokens(image, mask) for image, mask in zip(images[:2], masks, strict=True)]
        told += [student.tokens(image, None) for image in images[2:]]
        dino = DINOLoss(K, "sinkhorn_knopp")(
            torch.stack([student.dino_head(tokens[:, 0]) for tokens in told]),
            torch.stack([teacher.dino_head(tokens[:, 0]) for tokens in seen]),
            0.04,
        )
        rows = [
            (student.ibot_head(told[view][s, 5 + p]), teacher.ibot_head(seen[view][s, 5 + p]), masks[view][s])
            for s in range(5)
            for view in range(2)
            for p in range(4)
            if masks[view][s, p]
        ]
        weights = torch.tensor([1 / row[2].sum() for row in rows])
        ibot = IBOTLoss(K, "sinkhorn_knopp")(
            torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows]), weights, 10, 0.04
        )
        koleo = koleo_loss(torch.stack([tokens[:, 0] for tokens in told[:2]], 1))
    engine.run()
    output = engine.state.output[0]
    expected = {"dino": dino["loss"], "ibot": ibot["loss"], "koleo": koleo}
    expected["loss"] = dino["loss"] + 0.5 * ibot["loss"] + 0.1 * koleo
    for name, value in expected.items():
        assert float(output[name]) == pytest.approx(float(value), rel=1e-4), name
    assert output.keys() == expected.keys() | {
        "teacher_entropy",
        "kl",
        "centre_norm",
        "ibot_centre_norm",
        "grad_norm",
    }
    assert engine.state.cls.shape == (5, 2, 12)


def test_training_moves_every_part_of_the_student_and_the_teacher_after_it():
    engine = trainer(steps=8)
    before = {name: tensor.clone() for name, tensor in engine.network.state_dict().items()}
    path, frozen = {name: tensor.clone() for name, tensor in before.items()}, []

    def follow_by_hand(engine):
        step = engine.state.iteration - 1
        momentum = 1 - 0.1 * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for name, tensor in engine.network.state_dict().items():
            path[name] = momentum * path[name] + (1 - momentum) * tensor
        frozen.append(
            torch.equal(engine.network.dino_head.last_layer.weight, before["dino_head.last_layer.weight"])
        )

    engine.add_event_handler("ITERATION_COMPLETED", follow_by_hand)
    engine.run()
    after = engine.network.state_dict()
    assert [name for name, tensor in before.items() if torch.equal(after[name], tensor)] == []
    for name, tensor in engine.teacher.state_dict().items():
        torch.testing.assert_close(tensor, path[name], rtol=1e-5, atol=1e-6, msg=name)
    assert frozen == [True, True, *[False] * 6]
    assert all(parameter.grad is None for parameter in engine.teacher.parameters())
    assert engine.state.metrics["teacher_temp"] == 0.07
    assert engine.state.metrics["weight_decay"] > 0.04


def test_without_koleo_there_is_none():
    engine = trainer(steps=1, koleo_weight=0.0)
    engine.run()
    assert "koleo" not in engine.state.output[0]
    output = engine.state.output[0]
    assert float(output["loss"]) == pytest.approx(float(output["dino"] + 0.5 * output["ibot"]), rel=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    engine = trainer(steps=3, output_dir=tmp_path)
    with torch.no_grad():
        engine.network.mask_token.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"got nan at step 1; its slabs are listed in '.*Lower lr"):
        engine.run()
    assert engine.state.iteration == 1
    assert (tmp_path / "not_finite_step_00000001_rank_0.json").is_file()


def test_bfloat16_autocast_leaves_the_losses_in_float32():
    engines = [trainer(steps=1, amp_dtype=dtype) for dtype in ("bfloat16", "float32")]
    for engine in engines:
        engine.run()
    rounded, exact = (engine.state.output[0] for engine in engines)
    assert {value.dtype for value in rounded.values()} == {torch.float32}
    assert float(rounded["loss"]) == pytest.approx(float(exact["loss"]), rel=0.03)


def test_settings_without_sense_are_refused():
    with pytest.raises(ValueError, match="amp_dtype must be 'bfloat16' or 'float32', got 'float16'"):
        trainer(steps=1, amp_dtype="float16")
    with pytest.raises(ValueError, match="koleo_weight must not be negative, got -0.1"):
        trainer(steps=1, koleo_weight=-0.1)


@pytest.mark.parametrize("balance", ["sinkhorn_knopp", "centring"])
def test_a_step_on_a_gpu_reads_nothing_from_it_until_it_is_measured(fake_gpu, monkeypatch, balance):
    losses = {"loss_function": DINOLoss(K, balance), "ibot_loss": IBOTLoss(K, balance)}
    engine = trainer(steps=1, measure_every=2, **losses)
    fake_gpu.take(engine.network, optimizer=engine.optimizer)
    fake_gpu.take(engine.teacher, engine.loss_function, engine.ibot_loss)
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
