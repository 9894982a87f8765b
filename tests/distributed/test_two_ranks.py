"""Two processes that share a batch compute the loss and the gradient of one process that holds all of it.

Everything runs in float64, so that only a wrong formula can make a difference. The two processes are started
once; they work through all cases and leave their values and gradients in a file each.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import distributed as dist
from torch import nn

from common.losses.auxiliary import TERMS, AuxiliaryBCELoss
from common.losses.dino import BALANCES, DINOLoss, IBOTLoss, koleo_loss
from common.losses.lejepa import LeJEPALoss, SIGReg
from common.networks.pretraining_model import AuxiliaryHead, ProjectionHead
from common.run.distributed import gather_over_ranks, global_mean_weights, sum_over_ranks
from tests.distributed.conftest import run_two_ranks

pytestmark = pytest.mark.two_ranks

VIEWS = {"global": (2, 5), "local": (3, 3)}  # views, patches
WIDTH, NUM_TS, NUM_REX = 7, 4, 2
STEP = 11


class Case(NamedTuple):
    """How a global batch is split, and which of its samples are annotated."""

    split: tuple[int, int]
    has_ts: list[int]
    has_rex: list[int]


CASES = {
    "equal shares, unequal findings": Case((3, 3), [1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1]),
    "no findings on rank 1": Case((3, 3), [1, 1, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0]),
    "no findings on rank 0": Case((2, 2), [1, 0, 1, 1], [0, 0, 0, 1]),
    "no findings anywhere": Case((2, 2), [1, 1, 1, 1], [0, 0, 0, 0]),
    "unequal shares": Case((5, 2), [1, 1, 1, 1, 0, 1, 1], [0, 1, 1, 0, 1, 1, 0]),
}


class Model(nn.Module):
    """A linear encoder of made-up tokens (CLS first) with both heads: all that the losses read."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(WIDTH, WIDTH)
        self.projector = ProjectionHead(WIDTH, 11, 6)
        self.auxiliary_head = AuxiliaryHead(
            WIDTH, NUM_TS, NUM_REX, train_auxiliary_head=True, prior_logits=None
        )

    def forward(self, tokens: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
        """Return the projections (V, B, K) and the logits of both groups."""
        projections, logits = [], {}
        for group, group_tokens in tokens.items():
            encoded = self.encoder(group_tokens)
            projections.append(self.projector(encoded[:, :, 0]).transpose(0, 1))
            cls, patch = self.auxiliary_head(encoded[:, :, 0]), self.auxiliary_head(encoded[:, :, 1:])
            logits[group] = {f"{s}_cls": x for s, x in cls.items()} | {
                f"{s}_patch": x for s, x in patch.items()
            }
        return torch.cat(projections), logits


def new_model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def batch(case: Case, samples: slice) -> dict[str, Any]:
    """Return some samples of the case's global batch."""
    generator = torch.Generator().manual_seed(5)
    num_samples = sum(case.split)
    tokens: dict[str, torch.Tensor] = {}
    targets: dict[str, dict[str, torch.Tensor]] = {}
    for group, (views, patches) in VIEWS.items():
        shape = (num_samples, views, 1 + patches)
        tokens[group] = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)[samples]
        targets[group] = {}
        for source, num_classes in (("ts", NUM_TS), ("rex", NUM_REX)):
            share = torch.rand(*shape, num_classes, generator=generator, dtype=torch.float64)[samples]
            targets[group] |= {f"{source}_cls": share[:, :, 0], f"{source}_patch": share[:, :, 1:]}
    flags = {name: torch.tensor(getattr(case, name)).bool()[samples] for name in ("has_ts", "has_rex")}
    return {"tokens": tokens, "targets": targets, **flags}


def losses_and_gradients(model: nn.Module, data: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return every term of the loss of Eq. 3 and the gradient of every parameter."""
    model.zero_grad()
    projections, logits = model(data["tokens"])
    sigreg = SIGReg(13, num_knots=17, t_max=3.0, compiled=False)
    terms = LeJEPALoss(sigreg, 0.4)(projections, num_global=2, step=STEP)
    auxiliary_loss = AuxiliaryBCELoss(
        **{"ts_pos_weight": [1.0, 2.0, 30.0, 4.0], "rex_pos_weight": [800.0, 5.0], "auxiliary_terms": TERMS},
        **{"aux_weight": 0.1, "rex_targets": "presence"},
    )
    auxiliary = auxiliary_loss(logits, data["targets"], data["has_ts"], data["has_rex"])
    terms |= {f"aux_{name}": value for name, value in auxiliary.items()}
    (terms["loss"] + 0.1 * auxiliary["loss"]).backward()
    gradients = {
        f"gradient of {n.removeprefix('module.')}": p.grad.clone() for n, p in model.named_parameters()
    }
    return {name: value.detach() for name, value in terms.items()} | gradients


def dino_and_koleo(samples: slice) -> dict[str, torch.Tensor]:
    """Return the losses of the DINOv2 baseline on some samples, their gradients, and the teachers' centres.

    Each global view of a sample has two places for masked patches; of sample 0 one is padding.
    """
    generator = torch.Generator().manual_seed(7)
    draw = {"generator": generator, "dtype": torch.float64}
    student, teacher = torch.randn(5, 6, 9, **draw)[:, samples], torch.randn(2, 6, 9, **draw)[:, samples]
    seen, masked = torch.randn(6, 4, 9, **draw)[samples], torch.randn(6, 4, 9, **draw)[samples]
    weights = torch.full((6, 4), 0.5, dtype=torch.float64)
    weights[0] = torch.tensor([1.0, 0.0, 0.5, 0.5])
    cls = torch.randn(6, 2, 7, **draw)[samples]
    found = {}
    for balance in BALANCES:
        dino, ibot = DINOLoss(9, balance).double(), IBOTLoss(9, balance).double()
        for _ in range(2):  # the second call centres by what the first saw
            leaves = [leaf.clone().requires_grad_() for leaf in (student, masked)]
            terms = dino(leaves[0], teacher, teacher_temp=0.07)
            patches = [leaf.flatten(0, 1) for leaf in (leaves[1], seen, weights[samples])]
            terms["ibot"] = ibot(*patches, num_views=2 * len(cls), teacher_temp=0.07)["loss"]
            (terms["loss"] + terms["ibot"]).backward()
        found |= {f"{balance} {name}": value.detach() for name, value in terms.items()}
        centres = dino.targets.centre, ibot.targets.centre
        found |= {f"same {balance} centres": torch.stack(centres)}
        found |= {f"own {balance} {i}": leaf.grad.movedim(1 - i, 0) for i, leaf in enumerate(leaves)}
    cls.requires_grad_()
    loss = koleo_loss(cls)
    loss.backward()
    return found | {"same koleo": loss.detach(), "own koleo": cls.grad}


def run_rank(folder: Path) -> None:
    """Work through all cases as one of two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        first = rank * case.split[0]
        share = slice(first, first + case.split[rank])
        model = nn.parallel.DistributedDataParallel(new_model())
        # directions that came from the global random state would now differ
        torch.manual_seed(100 + rank)
        results[name] = losses_and_gradients(model, batch(case, share))
    results["dino and koleo"] = dino_and_koleo(slice(3 * rank, 3 * rank + 3))
    leaf = torch.tensor([1.0 + rank, 10.0], requires_grad=True)
    total = sum_over_ranks(leaf)
    ((2.0 + rank) * total.square()).sum().backward()
    results["sum"], results["gradient of sum"] = total.detach(), leaf.grad
    side_by_side = torch.tensor([[1.0 + rank], [5.0 + rank]], requires_grad=True)
    gathered = gather_over_ranks(side_by_side, dim=1)
    ((2.0 + rank) * gathered.square()).sum().backward()
    results["gathered"], results["gradient of gathered"] = gathered.detach(), side_by_side.grad
    results["weights"] = global_mean_weights(torch.tensor([[1.0, 1.0], [0.0, 0.0]][rank]))
    torch.save(results, folder / f"rank_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Start the two processes and return what each of them found."""
    folder = tmp_path_factory.mktemp("two_ranks")
    statuses, said = run_two_ranks(__file__, folder)
    assert statuses == [0, 0], "\n".join(said)
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_loss_is_that_of_one_process_with_the_whole_batch(name: str, ranks: list[dict[str, Any]]) -> None:
    expected = losses_and_gradients(new_model(), batch(CASES[name], slice(None)))
    for term in (key for key in expected if not key.startswith("gradient")):
        mean = (ranks[0][name][term] + ranks[1][name][term]) / 2
        torch.testing.assert_close(mean, expected[term], rtol=1e-10, atol=1e-12, msg=f"{term}: {mean}")
    assert ranks[0][name]["sigreg"] == ranks[1][name]["sigreg"] != 0


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_one_process_with_the_whole_batch(name: str, ranks: list[dict[str, Any]]) -> None:
    expected = losses_and_gradients(new_model(), batch(CASES[name], slice(None)))
    gradients = [key for key in expected if key.startswith("gradient")]
    assert len(gradients) == 2 + 10 + 4
    for rank in ranks:
        for key in gradients:
            torch.testing.assert_close(rank[name][key], expected[key], rtol=1e-9, atol=1e-12)


def test_loss_of_a_share_is_another_so_that_equality_means_something() -> None:
    case = CASES["equal shares, unequal findings"]
    whole, *shares = (
        losses_and_gradients(new_model(), batch(case, samples))
        for samples in (slice(None), slice(0, 3), slice(3, 6))
    )
    for term in ("sigreg", "aux_rex_cls", "aux_rex_patch"):
        assert not torch.isclose((shares[0][term] + shares[1][term]) / 2, whole[term], rtol=1e-3)


def test_losses_of_the_baseline_are_those_of_one_process(ranks: list[dict[str, Any]]) -> None:
    expected = dino_and_koleo(slice(None))
    for name, value in expected.items():
        of_ranks = [rank["dino and koleo"][name] for rank in ranks]
        if name.startswith("own"):  # of this rank's samples; DistributedDataParallel halves the sum
            torch.testing.assert_close(torch.cat(of_ranks) / 2, value, rtol=1e-9, atol=1e-12, msg=name)
            continue
        torch.testing.assert_close(sum(of_ranks) / 2, value, rtol=1e-10, atol=1e-12, msg=name)
        if name.startswith("same"):
            assert torch.equal(*of_ranks)
    first, second = dino_and_koleo(slice(0, 3)), dino_and_koleo(slice(3, 6))
    for name in ("sinkhorn_knopp loss", "sinkhorn_knopp ibot", "centring loss", "same koleo"):
        assert not torch.isclose((first[name] + second[name]) / 2, expected[name], rtol=1e-4)


def test_sum_over_ranks_is_the_same_on_both_and_has_the_gradient_of_both_losses(
    ranks: list[dict[str, Any]],
) -> None:
    # the losses are 2 |s|^2 and 3 |s|^2 with s = (1 + 2, 10 + 10)
    for rank in ranks:
        torch.testing.assert_close(rank["sum"], torch.tensor([3.0, 20.0]))
        torch.testing.assert_close(rank["gradient of sum"], torch.tensor([2 * 5 * 3.0, 2 * 5 * 20.0]))


def test_gathered_samples_lie_side_by_side_and_have_the_gradient_of_both_losses(
    ranks: list[dict[str, Any]],
) -> None:
    # every sample is in both losses, 2 |g|^2 and 3 |g|^2: the gradient of g is 10 g
    for number, rank in enumerate(ranks):
        torch.testing.assert_close(rank["gathered"], torch.tensor([[1.0, 2.0], [5.0, 6.0]]))
        own = torch.tensor([[1.0 + number], [5.0 + number]])
        torch.testing.assert_close(rank["gradient of gathered"], 10 * own)


def test_weights_of_samples_count_the_samples_of_both_ranks(ranks: list[dict[str, Any]]) -> None:
    assert [rank["weights"].tolist() for rank in ranks] == [[1.0, 1.0], [0.0, 0.0]]


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
