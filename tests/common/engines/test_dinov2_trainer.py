"""One iteration is DINO plus iBOT, towards a teacher that follows the student."""

import math

import pytest
import torch

from common.engines.dinov2_trainer import DINOv2Trainer
from common.losses.dino import DINOLoss, IBOTLoss, koleo_loss
from common.networks.dino_model import DINOHead, DINOModel, new_teacher
from common.optimizers.adamw import layerwise_adamw
from common.optimizers.dino_schedule import DINOSchedule
from common.transforms.hounsfield import HU_WINDOWS
from common.transforms.render_views import render_views
from tests.common.conftest import tiny_vit
from tests.common.engines.conftest import StepSamples, step_loader

K, STEPS = 13, 20
WINDOW = HU_WINDOWS["ct_rate"]


def trainer(steps: int, **changes) -> DINOv2Trainer:
    vit = tiny_vit("vit_large_patch14_reg4_dinov2", embed_dim=12, depth=1)
    heads = [DINOHead(12, 9, 6, K) for _ in range(2)]
    student = DINOModel(vit, *heads, checkpoint_activations=False)
    rates = {"lr": 1e-3, "layer_decay": 1.0, "patch_embed_lr_multiplier": 0.2}
    optimizer = layerwise_adamw(student, depth=1, weight_decay=0.04, **rates)
    schedule = {
        **{"max_steps": STEPS, "warmup_steps": 0, "lr": 1e-3, "final_lr": 1e-4, "weight_decay": (0.04, 0.2)},
        **{"teacher_momentum": (0.9, 1.0), "teacher_temp": (0.04, 0.07), "teacher_temp_warmup_steps": 5},
        "freeze_last_layer_steps": 2,
    }
    arguments = {
        "device": torch.device("cpu"),
        "max_epochs": 1,
        "max_steps": steps,
        "train_data_loader": step_loader(),
        "network": student,
        "teacher": new_teacher(student),
        "optimizer": optimizer,
        "schedule": DINOSchedule(optimizer, **schedule),
        "loss_function": DINOLoss(K, "sinkhorn_knopp"),
        "ibot_loss": IBOTLoss(K, "sinkhorn_knopp"),
        "ibot_weight": 0.5,
        "koleo_weight": 0.1,
        "hu_window": WINDOW,
        "clip_norm": 3.0,
        "amp_dtype": "float32",
        "log_every": 1,
        "grad_norms_every": 0,
        "output_dir": "unused",
    }
    return DINOv2Trainer(**arguments | changes)


def test_the_loss_of_a_step_is_computed_view_by_view_and_patch_by_patch():
    engine = trainer(steps=1)
    student, teacher = engine.network, engine.teacher
    batch = StepSamples().step(1)
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


def test_bfloat16_autocast_leaves_the_losses_in_float32():
    engines = [trainer(steps=1, amp_dtype=dtype) for dtype in ("bfloat16", "float32")]
    for engine in engines:
        engine.run()
    rounded, exact = (engine.state.output[0] for engine in engines)
    assert {value.dtype for value in rounded.values()} == {torch.float32}
    assert float(rounded["loss"]) == pytest.approx(float(exact["loss"]), rel=0.03)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="koleo_weight must not be negative, got -0.1"):
        trainer(steps=1, koleo_weight=-0.1)


@pytest.mark.parametrize("balance", ["sinkhorn_knopp", "centring"])
def test_a_step_on_a_gpu_reads_nothing_from_it_until_it_is_measured(fake_gpu, balance):
    losses = {"loss_function": DINOLoss(K, balance), "ibot_loss": IBOTLoss(K, balance)}
    engine = trainer(steps=1, log_every=2, **losses)
    fake_gpu.try_step(engine, StepSamples().step(1), engine.teacher, engine.loss_function, engine.ibot_loss)


def test_how_hard_each_term_pulls_at_the_encoder_is_what_autograd_says():
    engine, batch = trainer(steps=1, grad_norms_every=1), StepSamples().step(1)
    global_views, local_views = render_views(batch, WINDOW)
    places = batch["masked_places"]
    target = engine.teacher(global_views, None, None, places)
    output = engine.network(global_views, local_views, batch["masks"], places)
    ibot = IBOTLoss(K, "sinkhorn_knopp")(
        output["patch_logits"], target["patch_logits"], batch["masked_weights"], 10, 0.04
    )
    dino = DINOLoss(K, "sinkhorn_knopp")(output["cls_logits"], target["cls_logits"], 0.04)
    terms = {"dino": dino["loss"], "ibot": 0.5 * ibot["loss"], "koleo": 0.1 * koleo_loss(output["cls"])}
    parameters, norms = list(engine.network.encoder.parameters()), {}
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, parameters, retain_graph=True)
        norms[f"grad_norm_{name}"] = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    engine.run()
    output = engine.state.output[0]
    assert {name: float(output[name]) for name in norms} == pytest.approx(norms, rel=1e-3)


def test_measuring_gradients_changes_neither_student_nor_teacher_nor_centres():
    engines = [
        trainer(steps=3, grad_norms_every=every, loss_function=DINOLoss(K, "centring")) for every in (0, 1)
    ]
    for engine in engines:
        engine.run()
    for part in ("network", "teacher", "loss_function", "ibot_loss"):
        silent, measured = (getattr(engine, part).state_dict() for engine in engines)
        for name, tensor in silent.items():
            assert torch.equal(measured[name], tensor), f"{part} {name}"
