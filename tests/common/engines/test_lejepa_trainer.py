"""One iteration is Eq. 3, on data and random numbers that are functions of the step."""

import numpy as np
import pytest
import torch
from ignite.engine import Events
from torch.nn import functional

from common.cohort.cohort import prior_logits
from common.engines.lejepa_trainer import LeJEPATrainer
from common.losses.auxiliary import TERMS, AuxiliaryBCELoss
from common.losses.lejepa import LeJEPALoss, SIGReg
from common.networks.pretraining_model import AuxiliaryHead, PretrainingModel, ProjectionHead
from common.optimizers.adamw import adamw, warmup_cosine
from common.transforms.hounsfield import HU_WINDOWS, normalize_hu
from common.transforms.render_views import count_labels, render_views
from tests.common.conftest import tiny_vit
from tests.common.engines.conftest import StepSamples, step_loader

TS_WEIGHT, REX_WEIGHT = torch.linspace(1, 9, 118), torch.linspace(3, 5, 14)
LOSS = LeJEPALoss(SIGReg(16, 17, 3.0, compiled=False), 0.02)


def views_of(sample: dict) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """HU, organ ids and finding bits of each view."""
    pixels, end, views = np.concatenate([sample["global_pixels"], sample["local_pixels"]]), 0, []
    for view, (_, top, left, side) in enumerate(sample["boxes"]):
        box = slice(top, top + side), slice(left, left + side)
        hu = pixels[end : end + side * side].reshape(side, side)
        end += side * side
        views.append((hu, sample["ts_planes"][view][box], sample["rex_planes"][view][box]))
    return views


def trainer(
    steps: int, auxiliary: bool = True, lr: float = 1e-3, priors: dict | None = None, **changes
) -> LeJEPATrainer:
    vit = tiny_vit(embed_dim=12, depth=1)
    head = AuxiliaryHead(12, 118, 14, True, priors) if auxiliary else None
    network = PretrainingModel(vit, ProjectionHead(12, 9, 7), head, False)
    optimizer = adamw(network, lr=lr, weight_decay=0.04)
    weights = {"ts_pos_weight": TS_WEIGHT, "rex_pos_weight": REX_WEIGHT, "aux_weight": 0.1}
    supervision = AuxiliaryBCELoss(**weights, auxiliary_terms=TERMS, rex_targets="presence")
    arguments = {
        "device": torch.device("cpu"),
        "max_epochs": 1,
        "max_steps": steps,
        "train_data_loader": step_loader(),
        "network": network,
        "optimizer": optimizer,
        "lr_scheduler": warmup_cosine(optimizer, warmup_steps=0, max_steps=10, final_lr=lr / 10),
        "loss_function": LOSS,
        "auxiliary_loss": supervision if auxiliary else None,
        "hu_window": HU_WINDOWS["ct_rate"],
        "clip_norm": 3.0,
        "amp_dtype": "float32",
        "micro_batch_size": None,
        "log_every": 1,
        "grad_norms_every": 0,
        "output_dir": "unused",
    }
    return LeJEPATrainer(**arguments | changes)


def loss_by_hand(network: PretrainingModel, step: int) -> dict[str, float]:
    """Eq. 1 to 3 from the samples, one view at a time."""
    samples = [StepSamples()[5 * (step - 1) + index] for index in range(5)]
    projections = torch.empty(5, 5, 7)
    by_group = []
    for offset, views in ((0, 2), (2, 3)):
        terms = {name: [] for name in TERMS}
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
    lejepa = LOSS(projections, num_global=2, step=step)["loss"]
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


def test_read_outs_start_as_constant_predictions_and_teach_the_encoder_from_the_second_step_on():
    priors = {"ts": prior_logits(torch.rand(118) / 9, TS_WEIGHT), "rex": prior_logits([0.1] * 14, REX_WEIGHT)}
    engine = trainer(steps=2, priors=priors, loss_function=LeJEPALoss(SIGReg(16, 17, 3.0, False), 0))
    first = Events.ITERATION_COMPLETED(once=1)
    engine.add_event_handler(first, lambda: aux.append(float(engine.state.output[0]["aux"])))
    aux: list[float] = []
    batch, expected = StepSamples().step(1), []
    targets = count_labels(batch, "presence")
    for group in ("global", "local"):
        for name, annotated in (("ts", batch["has_ts"]), ("rex", batch["has_rex"])):
            logits, weight = torch.tensor(priors[name]), {"ts": TS_WEIGHT, "rex": REX_WEIGHT}[name]
            for level in ("cls", "patch"):
                target = targets[group][f"{name}_{level}"][annotated].flatten(0, -2)
                expected += [bce(logits, share.double(), weight) for share in target.mean(0, keepdim=True)]
    engine.run()
    assert aux == [pytest.approx(float(sum(expected)) / 8, rel=1e-5)]
    for parameters in (engine.network.auxiliary_head.parameters(), engine.network.encoder.parameters()):
        assert all(parameter.grad.abs().sum() > 0 for parameter in parameters)


def test_training_lowers_the_loss_and_moves_every_part_of_the_network():
    engine = trainer(steps=10)
    before = {name: tensor.clone() for name, tensor in engine.network.state_dict().items()}
    losses = []
    engine.add_event_handler("ITERATION_COMPLETED", lambda e: losses.append(float(e.state.output[0]["loss"])))
    engine.run()
    after = engine.network.state_dict()
    assert losses[-1] < losses[0]
    assert [name for name, tensor in before.items() if torch.equal(after[name], tensor)] == []
    assert 0 < engine.state.metrics["cls_effective_rank"] <= 9
    assert 0 < engine.state.metrics["projection_ks"] < 1
    assert engine.state.cls.shape == (5, 2, 12)


def test_without_auxiliary_supervision_there_are_only_the_terms_of_equation_1():
    engine = trainer(steps=1, auxiliary=False)
    engine.run()
    assert engine.state.output[0].keys() == {"loss", "lejepa", "invariance", "sigreg", "grad_norm"}


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
    whole = LOSS(projections, num_global=2, step=1)["sigreg"]
    halves = [LOSS(half, num_global=2, step=1)["sigreg"] for half in projections.split(3, dim=1)]
    assert abs(sum(halves) / 2 - whole) > 0.01 * whole


def test_the_number_of_slabs_at_once_must_be_positive():
    with pytest.raises(ValueError, match="micro_batch_size must be positive, got 0"):
        trainer(steps=1, micro_batch_size=0)


def test_bfloat16_autocast_leaves_the_loss_in_float32():
    rounded, exact = trainer(steps=1, amp_dtype="bfloat16"), trainer(steps=1)
    for engine in (rounded, exact):
        engine.run()
    assert rounded.state.output[0]["sigreg"].dtype == torch.float32
    losses = [float(engine.state.output[0]["loss"]) for engine in (rounded, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("auxiliary", [True, False])
def test_a_step_on_a_gpu_reads_nothing_from_it_until_it_is_measured(fake_gpu, auxiliary):
    engine = trainer(steps=1, auxiliary=auxiliary, log_every=2)
    fake_gpu.try_step(engine, StepSamples().step(1), *([engine.auxiliary_loss] if auxiliary else []))


def gradient_norms_by_hand(engine: LeJEPATrainer) -> dict[str, float]:
    """Each term on the untrained network, one ``torch.autograd.grad`` for each."""
    batch = StepSamples().step(1)
    output = engine.network(*render_views(batch, HU_WINDOWS["ct_rate"]))
    lejepa = LOSS(output["projections"], num_global=2, step=1)
    flags = {name: batch[name] for name in ("has_ts", "has_rex")}
    auxiliary = engine.auxiliary_loss(output["logits"], count_labels(batch, "presence"), **flags)
    terms = {"invariance": 0.98 * lejepa["invariance"], "sigreg": 0.02 * lejepa["sigreg"]}
    terms |= {f"aux_{term}": 0.1 / 4 * auxiliary[term] for term in TERMS}
    parameters = list(engine.network.encoder.parameters())
    gradients = {
        name: torch.autograd.grad(term, parameters, retain_graph=True) for name, term in terms.items()
    }
    return {
        f"grad_norm_{n}": float(torch.cat([g.flatten() for g in gs]).norm()) for n, gs in gradients.items()
    }


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_how_hard_each_term_pulls_at_the_encoder_is_what_autograd_says(micro_batch_size):
    engine = trainer(steps=1, grad_norms_every=1, micro_batch_size=micro_batch_size)
    expected = gradient_norms_by_hand(engine)
    engine.run()
    output = engine.state.output[0]
    assert {name: float(output[name]) for name in expected} == pytest.approx(expected, rel=1e-3)


def test_measuring_gradients_changes_nothing_and_happens_when_asked():
    silent, measured = trainer(steps=4), trainer(steps=4, log_every=2, grad_norms_every=2)
    when: list[int] = []
    measured.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda e: when.append(e.state.iteration) if "grad_norm_sigreg" in e.state.output[0] else None,
    )
    for engine in (silent, measured):
        engine.run()
    assert when == [1, 2, 4]
    for name, tensor in silent.network.state_dict().items():
        assert torch.equal(measured.network.state_dict()[name], tensor), name
    for name, value in silent.state.output[0].items():
        assert torch.equal(measured.state.output[0][name], value), name
