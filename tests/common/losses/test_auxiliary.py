"""The auxiliary loss against explicit loops over groups, samples, views, patches and classes."""

import math

import pytest
import torch

from common.losses.auxiliary import TERMS, AuxiliaryBCELoss

B = 5
SHAPES = {"global": (2, 4), "local": (3, 6)}  # views, patches
# exact in float32
WEIGHTS = {"ts": [1.0, 2.5, 40.0], "rex": [800.0, 0.5]}
HAS_TS = torch.tensor([True, True, False, True, True])
HAS_REX = torch.tensor([False, True, False, True, False])

Tree = dict[str, dict[str, torch.Tensor]]


def auxiliary_loss(
    ts=WEIGHTS["ts"], rex=WEIGHTS["rex"], terms=TERMS, rex_targets="presence"
) -> AuxiliaryBCELoss:
    rest = {"auxiliary_terms": terms, "aux_weight": 0.1, "rex_targets": rex_targets}
    return AuxiliaryBCELoss(ts_pos_weight=ts, rex_pos_weight=rex, **rest)


def random_tree(seed: int, num_samples: int = B) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    tree: Tree = {}
    for group, (views, patches) in SHAPES.items():
        tree[group] = {}
        for term in TERMS:
            tokens = (patches,) if term.endswith("patch") else ()
            shape = (num_samples, views, *tokens, len(WEIGHTS[term.split("_")[0]]))
            tree[group][term] = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return tree


def logits_and_targets() -> tuple[Tree, Tree]:
    fractions = {g: {t: x.sigmoid() for t, x in terms.items()} for g, terms in random_tree(1).items()}
    return random_tree(0), fractions


def cross_entropy_by_hand(logit: float, target: float, pos_weight: float) -> float:
    probability = 1 / (1 + math.exp(-logit))
    return -(pos_weight * target * math.log(probability) + (1 - target) * math.log(1 - probability))


def term_by_loop(term: str, logits: Tree, targets: Tree, annotated: torch.Tensor) -> float:
    weights = WEIGHTS[term.split("_")[0]]
    by_group = []
    for group in logits:
        values = []
        for sample in range(B):
            if annotated[sample]:
                for row, target_row in zip(
                    logits[group][term][sample].reshape(-1, len(weights)),
                    targets[group][term][sample].reshape(-1, len(weights)),
                    strict=True,
                ):
                    entropies = map(cross_entropy_by_hand, row.tolist(), target_row.tolist(), weights)
                    values.append(sum(entropies) / len(weights))
        by_group.append(sum(values) / len(values))
    return sum(by_group) / len(by_group)


def test_every_term_is_the_loop_over_annotated_samples_and_the_loss_their_mean() -> None:
    logits, targets = logits_and_targets()
    terms = auxiliary_loss()(logits, targets, HAS_TS, HAS_REX)
    assert list(terms) == ["loss", *TERMS]
    expected = {t: term_by_loop(t, logits, targets, HAS_TS if t.startswith("ts") else HAS_REX) for t in TERMS}
    for term, value in expected.items():
        assert float(terms[term]) == pytest.approx(value, rel=1e-12), term
    assert float(terms["loss"]) == pytest.approx(sum(expected.values()) / 4, rel=1e-12)


@pytest.mark.parametrize("terms", [("ts_cls",), ("ts_cls", "ts_patch")], ids=["1s", "1s_v2"])
def test_a_subset_of_terms_is_averaged_alone_and_needs_only_its_weights(terms) -> None:
    logits, targets = logits_and_targets()
    only = {group: {term: of_group[term] for term in terms} for group, of_group in logits.items()}
    found = auxiliary_loss(rex=None, terms=terms)(only, targets, HAS_TS, HAS_REX)
    assert list(found) == ["loss", *terms]
    expected = [term_by_loop(term, logits, targets, HAS_TS) for term in terms]
    assert float(found["loss"]) == pytest.approx(sum(expected) / len(terms), rel=1e-12)


def test_optimum_is_the_weighted_odds_of_the_share() -> None:
    # the gradient vanishes at sigmoid(logit) = w y / (w y + 1 - y)
    share, weight = 0.01, 100.0
    odds = weight * share / (1 - share)
    logit = torch.tensor([[[math.log(odds)]]], dtype=torch.float64, requires_grad=True)
    yes = torch.ones(1, dtype=torch.bool)
    target = {"global": {"ts_cls": torch.full((1, 1, 1), share, dtype=torch.float64)}}
    auxiliary_loss([weight], None, ("ts_cls",))({"global": {"ts_cls": logit}}, target, yes, yes)[
        "loss"
    ].backward()
    assert float(logit.grad) == pytest.approx(0, abs=1e-12)


def test_samples_without_annotation_have_no_influence() -> None:
    logits, targets = logits_and_targets()
    loss = auxiliary_loss()
    before = loss(logits, targets, HAS_TS, HAS_REX)
    for tree, other in ((logits, random_tree(7)), (targets, random_tree(8))):
        for group, terms in tree.items():
            for term, tensor in terms.items():
                absent = ~(HAS_TS if term.startswith("ts") else HAS_REX)
                tensor[absent] = other[group][term][absent]
    for name, value in loss(logits, targets, HAS_TS, HAS_REX).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_term_without_any_annotated_sample_is_zero_with_a_gradient_of_zero() -> None:
    logits, targets = logits_and_targets()
    leaves = [tensor.requires_grad_() for terms in logits.values() for tensor in terms.values()]
    nowhere = torch.zeros(B, dtype=torch.bool)
    terms = auxiliary_loss()(logits, targets, HAS_TS, nowhere)
    values = {name: value.item() for name, value in terms.items()}
    assert values["rex_cls"] == values["rex_patch"] == 0
    assert values["loss"] == pytest.approx((values["ts_cls"] + values["ts_patch"]) / 4)
    terms["loss"].backward()
    assert all(leaf.grad is not None for leaf in leaves)
    for group in SHAPES:
        for term in TERMS:
            assert bool(logits[group][term].grad.any()) == term.startswith("ts")


def test_gradient_is_that_of_finite_differences() -> None:
    logits, targets = logits_and_targets()
    loss = auxiliary_loss()
    names = [(group, term) for group in SHAPES for term in TERMS]

    def of_leaves(*leaves: torch.Tensor) -> torch.Tensor:
        tree: Tree = {group: {} for group in SHAPES}
        for (group, term), leaf in zip(names, leaves, strict=True):
            tree[group][term] = leaf
        return loss(tree, targets, HAS_TS, HAS_REX)["loss"]

    leaves = tuple(logits[group][term].requires_grad_() for group, term in names)
    assert torch.autograd.gradcheck(of_leaves, leaves, fast_mode=True)


def test_bfloat16_logits_are_compared_in_float32() -> None:
    logits, targets = logits_and_targets()
    half = {group: {term: x.bfloat16() for term, x in terms.items()} for group, terms in logits.items()}
    full = {group: {term: x.float() for term, x in terms.items()} for group, terms in half.items()}
    loss = auxiliary_loss()
    expected = loss(full, targets, HAS_TS, HAS_REX)
    with torch.autocast("cpu", torch.bfloat16):
        values = loss(half, targets, HAS_TS, HAS_REX)
    for name, value in values.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("terms", [[], ["ts_cls", "ts_cls"], ["ts_slice"]])
def test_impossible_terms_are_refused(terms: list[str]) -> None:
    with pytest.raises(ValueError, match=r"auxiliary_terms must be .*'ts_cls', .*got \("):
        auxiliary_loss(WEIGHTS["ts"], WEIGHTS["rex"], terms)


def test_missing_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rex_pos_weight must be given for terms of 'rex', got None\."):
        auxiliary_loss(WEIGHTS["ts"], None)


@pytest.mark.parametrize("pos_weight", [[], [1.0, 0.0], [1.0, math.inf], [[1.0]]])
def test_impossible_weights_are_refused(pos_weight: list) -> None:
    with pytest.raises(ValueError, match=r"ts_pos_weight must be a list of positive numbers, got \["):
        auxiliary_loss(pos_weight, None, ("ts_cls",))


def test_other_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="rex_targets.*'presence', 'fraction'.*got 'share'"):
        auxiliary_loss(rex_targets="share")


def test_what_does_not_go_together_is_refused() -> None:
    logits, targets = logits_and_targets()
    loss = auxiliary_loss()
    with pytest.raises(ValueError, match=r"has_ts and has_rex .*\(5,\) and \(4,\)"):
        loss(logits, targets, HAS_TS, HAS_REX[:4])
    with pytest.raises(ValueError, match=r"4 samples and 3 classes, got shape \(5, 2, 3\) for 'ts_cls'"):
        loss(logits, targets, HAS_TS[:4], HAS_REX[:4])
    with pytest.raises(ValueError, match=r"5 samples and 2 classes, got shape \(5, 2, 3\) for 'ts_cls'"):
        auxiliary_loss([1.0, 1.0])(logits, targets, HAS_TS, HAS_REX)
    with pytest.raises(KeyError, match="local"):
        loss(logits, {"global": targets["global"]}, HAS_TS, HAS_REX)
    targets["local"]["rex_cls"] = targets["local"]["rex_cls"][:, :1]
    with pytest.raises(ValueError, match=r"logits \(5, 3, 2\), got \(5, 1, 2\) for 'rex_cls' of the local"):
        loss(logits, targets, HAS_TS, HAS_REX)
