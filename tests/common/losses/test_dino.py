"""DINO's and iBOT's losses against loops over pairs, samples and prototypes in float64."""

import numpy as np
import pytest
import torch

from common.losses.dino import DINOLoss, IBOTLoss, TeacherTargets, koleo_loss, sinkhorn_knopp

V, VG, B, K = 5, 2, 3, 7
TEMP, STUDENT_TEMP = 0.05, 0.1


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    """Cosines, as the heads' are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1


def softmax(row: np.ndarray) -> np.ndarray:
    weights = np.exp(row)
    return weights / weights.sum()


def sinkhorn_by_hand(scores: np.ndarray, temperature: float, iterations: int = 3) -> np.ndarray:
    """SwAV's listing: every sum one at a time, with its counts."""
    q = np.exp(scores / temperature).T
    num_prototypes, num_samples = q.shape
    q /= q.sum()
    for _ in range(iterations):
        for prototype in range(num_prototypes):
            q[prototype] /= q[prototype].sum() * num_prototypes
        for sample in range(num_samples):
            q[:, sample] /= q[:, sample].sum() * num_samples
    return (q * num_samples).T


def cross_entropy(target: np.ndarray, row: np.ndarray) -> float:
    return -float((target * np.log(softmax(row / STUDENT_TEMP))).sum())


def test_sinkhorn_knopp_is_swavs_listing() -> None:
    scores = logits(11, K)
    expected = sinkhorn_by_hand(scores.numpy().copy(), TEMP)
    np.testing.assert_allclose(sinkhorn_knopp(scores.clone(), TEMP).numpy(), expected, rtol=1e-12)


def test_sinkhorn_knopp_gives_every_sample_one_and_every_prototype_its_share() -> None:
    assigned = sinkhorn_knopp(logits(40, K), temperature=0.5)
    torch.testing.assert_close(assigned.sum(1), torch.ones(40, dtype=torch.float64))
    share = assigned.sum(0) / 40
    plain = (logits(40, K) / 0.5).softmax(-1).mean(0)
    assert (share - 1 / K).abs().max() < 1e-3 < 0.1 * (plain - 1 / K).abs().max()


def test_padding_counts_nowhere_in_sinkhorn_knopp() -> None:
    scores, valid = logits(9, K), torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    assigned = sinkhorn_knopp(scores.clone(), TEMP, valid)
    torch.testing.assert_close(assigned[valid], sinkhorn_knopp(scores[valid], TEMP), rtol=1e-12, atol=0)
    assert (assigned[~valid] == 0).all()


def test_centring_subtracts_the_running_mean_of_the_batches_before() -> None:
    targets = TeacherTargets(K, "centring").double()
    centre = np.zeros(K)
    for seed in range(4):
        batch = logits(6, K, seed=seed)
        found = targets(batch, TEMP).numpy()
        expected = np.stack([softmax((row - centre) / TEMP) for row in batch.numpy()])
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        centre = 0.9 * centre + 0.1 * batch.numpy().mean(0)
    np.testing.assert_allclose(targets.centre.numpy(), centre, rtol=1e-12)


def test_the_centre_is_that_of_what_is_no_padding_and_stays_without_any() -> None:
    targets = TeacherTargets(K, "sinkhorn_knopp").double()
    batch, valid = logits(4, K), torch.tensor([True, False, True, True])
    targets(batch, TEMP, valid)
    torch.testing.assert_close(targets.centre, 0.1 * batch[valid].mean(0))
    before = targets.centre.clone()
    assert not targets(batch, TEMP, torch.zeros(4, dtype=torch.bool)).any()
    assert torch.equal(targets.centre, before)


@pytest.mark.parametrize("balance", ["sinkhorn_knopp", "centring"])
def test_ibot_is_0_where_no_patch_of_the_batch_is_masked(balance: str) -> None:
    student = logits(4, K).requires_grad_()
    loss = IBOTLoss(K, balance).double()(student, logits(4, K, seed=1), torch.zeros(4).double(), 2, TEMP)
    assert loss["loss"] == 0
    loss["loss"].backward()
    assert not student.grad.any()


@pytest.mark.parametrize("balance", ["sinkhorn_knopp", "centring"])
@pytest.mark.parametrize(
    ("dtype", "rel"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.05)]
)
def test_dino_is_the_mean_over_pairs_of_different_views(balance: str, dtype: torch.dtype, rel: float) -> None:
    """Whatever the logits' type: the losses' buffers are float32."""
    student, teacher = logits(V, B, K), logits(VG, B, K, seed=1)
    terms = DINOLoss(K, balance)(student.to(dtype), teacher.to(dtype), TEMP)
    assert {value.dtype for value in terms.values()} >= {torch.promote_types(dtype, torch.float32)}
    rows = teacher.reshape(VG * B, K).numpy()
    if balance == "sinkhorn_knopp":
        targets = sinkhorn_by_hand(rows.copy(), TEMP).reshape(VG, B, K)
    else:
        targets = np.stack([softmax(row / TEMP) for row in rows]).reshape(VG, B, K)
    pairs = [
        cross_entropy(targets[seen, sample], student[told, sample].numpy())
        for seen in range(VG)
        for told in range(V)
        for sample in range(B)
        if seen != told
    ]
    assert len(pairs) == (2 * 1 + 2 * 3) * B
    assert float(terms["loss"]) == pytest.approx(np.mean(pairs), rel=rel)
    entropy = -np.mean([(t * np.log(t)).sum() for t in targets.reshape(-1, K)])
    assert float(terms["teacher_entropy"]) == pytest.approx(entropy, rel=3 * rel)
    assert float(terms["kl"]) == pytest.approx(np.mean(pairs) - entropy, rel=rel)
    norm = np.linalg.norm(0.1 * rows.mean(0))
    assert float(terms["centre_norm"]) == pytest.approx(norm, rel=max(rel, 1e-6))


def test_a_student_that_tells_the_teachers_choice_has_no_kl() -> None:
    teacher = logits(VG, B, K)
    teacher[1] = teacher[0]
    exact = (teacher / TEMP * STUDENT_TEMP)[[0, 0, 0]]
    terms = DINOLoss(K, "centring").double()(exact, teacher, TEMP)
    assert float(terms["kl"]) == pytest.approx(0, abs=1e-12)
    assert float(terms["loss"]) > 0.1


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_ibot_is_the_mean_over_masked_patches_of_a_view_and_then_over_views(
    dtype: torch.dtype, rel: float
) -> None:
    by_view = [[0, 1, 2], [], [3], []]  # places in the list of masked patches
    student, teacher = logits(6, K), logits(6, K, seed=1)  # the last two are padding
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1, 0, 0], dtype=torch.float64)
    given = [tensor.to(dtype) for tensor in (student, teacher, weights)]
    terms = IBOTLoss(K, "sinkhorn_knopp")(*given, num_views=4, teacher_temp=TEMP)
    targets = sinkhorn_by_hand(teacher[:4].numpy().copy(), TEMP)
    means = [
        np.mean([cross_entropy(targets[place], student[place].numpy()) for place in places]) if places else 0
        for places in by_view
    ]
    assert float(terms["loss"]) == pytest.approx(np.mean(means), rel=rel)
    norm = float(0.1 * teacher[:4].mean(0).norm())
    assert float(terms["centre_norm"]) == pytest.approx(norm, rel=max(rel, 1e-6))


def test_the_gradient_goes_to_the_student_alone_and_is_that_of_softmax() -> None:
    student, teacher = logits(3, 1, K).requires_grad_(), logits(1, 1, K, seed=1).requires_grad_()
    loss = DINOLoss(K, "centring").double()
    loss(student, teacher, TEMP)["loss"].backward()
    assert teacher.grad is None
    assert (student.grad[0] == 0).all()  # the only teacher's own view
    target = (teacher.detach()[0] / TEMP).softmax(-1)
    expected = ((student.detach()[1:] / STUDENT_TEMP).softmax(-1) - target) / STUDENT_TEMP / 2
    torch.testing.assert_close(student.grad[1:], expected)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"balance must be one of \('sinkhorn_knopp', 'centring'\), got 'x'"):
        DINOLoss(K, "x")
    with pytest.raises(ValueError, match=r"\(V, B, K\) and \(Vg, B, K\), got \(5, 3, 7\) and \(2, 4, 7\)"):
        DINOLoss(K, "centring")(logits(V, B, K), logits(VG, B + 1, K), TEMP)
    with pytest.raises(ValueError, match=r"must be \(M, K\), \(M, K\), \(M,\), got .* and \(5,\)"):
        IBOTLoss(K, "centring")(logits(6, K), logits(6, K), torch.ones(5), 1, TEMP)


def test_koleo_is_minus_the_mean_log_distance_to_the_nearest_other_sample_of_the_view() -> None:
    generator = torch.Generator().manual_seed(0)
    cls = torch.randn(6, 2, 3, generator=generator, dtype=torch.float64)
    unit = (cls / cls.norm(dim=-1, keepdim=True)).numpy()
    total = 0.0
    for view in range(2):
        for sample in range(6):
            others = [np.linalg.norm(unit[sample, view] - unit[i, view]) for i in range(6) if i != sample]
            total -= np.log(min(others)) / 6
    assert float(koleo_loss(cls)) == pytest.approx(total, rel=1e-6)


def test_koleos_gradient_drives_neighbours_apart() -> None:
    cls = torch.tensor([[[1.0, 0.1]], [[1.0, -0.1]], [[-1.0, 0.0]]], requires_grad=True)
    koleo_loss(cls).backward()
    assert cls.grad[0, 0, 1] < 0 < cls.grad[1, 0, 1]


def test_koleo_of_equal_samples_stays_finite() -> None:
    cls = torch.ones(3, 1, 4, requires_grad=True)
    loss = koleo_loss(cls)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(cls.grad).all()


def test_one_sample_has_no_neighbour() -> None:
    with pytest.raises(ValueError, match="cls must hold at least two samples, got 1"):
        koleo_loss(torch.ones(1, 2, 4))
