"""DINOv2's losses: DINO's and iBOT's cross-entropies with a balanced teacher, and KoLeo."""

# V views (Vg global ones first), B samples on this rank, M masked tokens with padding, K prototypes,
# D embedding

import torch
from torch import nn
from torch.nn import functional

from common.run.distributed import gather_over_ranks, sum_over_ranks

BALANCES = ("sinkhorn_knopp", "centring")
CENTRE_MOMENTUM = 0.9
STUDENT_TEMP = 0.1
"""Source: DINO."""

SINKHORN_ITERATIONS = 3
"""Source: DINOv2 and SwAV."""

EPSILON = 1e-8
"""Keeps the logarithm of two equal embeddings finite. Source: DINOv2."""


@torch.no_grad()
def sinkhorn_knopp(
    logits: torch.Tensor, temperature: float, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Return soft assignments that use every prototype alike over the global batch.

    Scales the columns (prototypes) and rows (samples) of exp(logits / temperature) to equal sums in turn,
    three times, rows last. Only the scales are kept: an iteration reads the matrix twice and writes none.
    Logits of ``DINOHead`` lie in [-1, 1], so that no exponential overflows.

    Source: SwAV, arXiv:2006.09882, and DINOv2, arXiv:2304.07193, section 4, whose counts of samples and
    prototypes cancel.

    Args:
        logits: ``(N, K)``; computed in float32 unless float64.
        temperature: temperature of the teacher.
        valid: ``(N,)``, 1 for a sample, 0 for padding, which counts nowhere; None for no padding.

    Returns:
        ``(N, K)``, rows sum to 1.
    """
    scores = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).exp_()
    present = torch.ones_like(scores[:, 0]) if valid is None else valid.to(scores)
    rows = columns = present
    for _ in range(SINKHORN_ITERATIONS):
        columns = 1 / sum_over_ranks(rows @ scores)
        rows = present / (scores @ columns)
    assigned = scores.mul_(columns).mul_(rows[:, None])
    # without a sample in the global batch the scales are infinite, and padding would be NaN
    return assigned if valid is None else assigned.masked_fill_((present == 0)[:, None], 0)


class TeacherTargets(nn.Module):
    """Sharpen and balance the teacher's logits, so that neither one prototype nor all of them at once win.

    ``sinkhorn_knopp`` balances the global batch. ``centring`` subtracts a running mean of the logits of the
    global batches before this one. The running mean is kept either way: its norm shows where logits drift.

    Source: DINO, arXiv:2104.14294 (centring, momentum 0.9); DINOv2's ViT-L configuration
    (Sinkhorn-Knopp).

    Args:
        num_prototypes: K.
        balance: one of ``BALANCES``.

    Shape:
        Input: logits ``(N, K)``, valid ``(N,)`` or None. Output: ``(N, K)``, no gradient.

    Raises:
        ValueError: if ``balance`` is neither of the two.
    """

    def __init__(self, num_prototypes: int, balance: str) -> None:
        super().__init__()
        if balance not in BALANCES:
            raise ValueError(f"balance must be one of {BALANCES}, got '{balance}'.")
        self.balance = balance
        self.centre: torch.Tensor
        self.register_buffer("centre", torch.zeros(num_prototypes))

    @torch.no_grad()
    def forward(
        self, logits: torch.Tensor, temperature: float, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the targets and, in training mode, move the centre; arguments as in ``sinkhorn_knopp``."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.balance == "sinkhorn_knopp":
            targets = sinkhorn_knopp(logits, temperature, valid)
        else:
            targets = ((logits - self.centre) / temperature).softmax(-1)
        present = torch.ones_like(logits[:, 0]) if valid is None else valid.to(logits)
        if not self.training:
            return targets
        count = sum_over_ranks(present.sum())
        mean = sum_over_ranks(present @ logits) / count.clamp(min=1)
        moved = self.centre.to(mean).lerp(mean, 1 - CENTRE_MOMENTUM)
        self.centre.copy_(torch.where(count > 0, moved, self.centre.to(mean)))  # no sample moves nothing
        return targets


class DINOLoss(nn.Module):
    """Cross-entropy of every view of the student with every other global view of the teacher.

    The mean over all pairs of different views and over samples: on several ranks the mean of the ranks'
    values is the value of the global batch. In float32 unless given float64.

    Source: DINO, arXiv:2104.14294, Eq. 3; weights of the pairs and the temperature as DINOv2.

    Args:
        num_prototypes: K. DINOv2 and DALE-CT's baseline: 65,536.
        balance: see ``TeacherTargets``.

    Shape:
        student ``(V, B, K)``, teacher ``(Vg, B, K)``: logits. Output: dictionary of the scalars ``loss``;
        ``teacher_entropy``, mean entropy of a target; ``kl``, their difference, which is 0 where the student
        predicts the teacher's choice exactly; ``centre_norm``, of the teacher's mean logits.

    Raises:
        ValueError: if ``balance`` is unknown; in a call, if shapes do not agree or there is no pair.
    """

    def __init__(self, num_prototypes: int, balance: str) -> None:
        super().__init__()
        self.targets = TeacherTargets(num_prototypes, balance)

    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, teacher_temp: float
    ) -> dict[str, torch.Tensor]:
        """Return the loss and what shows a collapse; global views come first."""
        num_views, num_global = len(student), len(teacher)
        if student.shape[1:] != teacher.shape[1:] or not 1 <= num_global <= num_views or num_views < 2:
            shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            raise ValueError(f"student and teacher must be (V, B, K) and (Vg, B, K), got {shapes}.")
        targets = self.targets(teacher.flatten(0, 1), teacher_temp).unflatten(0, teacher.shape[:2])
        logs = _log_softmax(student)
        # sum over all pairs of views, less those of a view with itself
        with_every, with_itself = (logs * targets.sum(0)).sum(), (logs[:num_global] * targets).sum()
        num_pairs = num_global * (num_views - 1)
        loss = (with_itself - with_every) / (num_pairs * student.shape[1])
        entropy = torch.special.entr(targets).sum(-1).mean()
        return {
            "loss": loss,
            "teacher_entropy": entropy,
            "kl": loss.detach() - entropy,
            "centre_norm": self.targets.centre.norm(),
        }


class IBOTLoss(nn.Module):
    """Cross-entropy of the student at masked patches with the teacher, which sees them.

    The mean over the masked patches of a view, then over all global views, those without a mask counting 0,
    as in DINOv2. On several ranks of equal batches the mean of the ranks' values is the value of the global
    batch. In float32 unless given float64.

    Source: iBOT, arXiv:2111.07832, Eq. 2, as DINOv2 weighs it.

    Args:
        num_prototypes: see ``DINOLoss``.
        balance: see ``TeacherTargets``; over all masked patches of the global batch.

    Shape:
        student, teacher ``(M, K)``: logits at the same patches; weights ``(M,)``: one over the number of
        masked patches of the view, 0 for padding. Output: dictionary of the scalars ``loss`` and
        ``centre_norm``.

    Raises:
        ValueError: if ``balance`` is unknown; in a call, if shapes do not agree.
    """

    def __init__(self, num_prototypes: int, balance: str) -> None:
        super().__init__()
        self.targets = TeacherTargets(num_prototypes, balance)

    def forward(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        weights: torch.Tensor,
        num_views: int,
        teacher_temp: float,
    ) -> dict[str, torch.Tensor]:
        """Return loss and centre; ``num_views`` counts this rank's global views, masked or not."""
        if student.shape != teacher.shape or weights.shape != student.shape[:1]:
            shapes = f"{tuple(student.shape)}, {tuple(teacher.shape)} and {tuple(weights.shape)}"
            raise ValueError(f"student, teacher and weights must be (M, K), (M, K), (M,), got {shapes}.")
        targets = self.targets(teacher, teacher_temp, weights > 0)
        by_patch = (_log_softmax(student) * targets).sum(-1)
        loss = -(weights * by_patch).sum() / num_views
        return {"loss": loss, "centre_norm": self.targets.centre.norm()}


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return functional.log_softmax(logits.to(dtype) / STUDENT_TEMP, dim=-1)


def koleo_loss(cls: torch.Tensor) -> torch.Tensor:
    """Return minus the mean log distance of embeddings to their nearest neighbour, summed over views.

    Embeddings are scaled to unit length and compared with the other samples of the same view over the global
    batch (DINOv2: of one GPU's), so that the value does not depend on the number of ranks. In float32
    unless given float64, also under autocast.

    Source: KoLeo, arXiv:1806.03198; summed over the global views as in DINOv2.

    Args:
        cls: ``(B, V, D)``, CLS tokens of the student's global views; as many on every rank.

    Returns:
        A scalar, the same on every rank.

    Raises:
        ValueError: if the global batch has fewer than two samples.
    """
    with torch.autocast(cls.device.type, enabled=False):
        tokens = cls.to(torch.promote_types(cls.dtype, torch.float32))
        views = gather_over_ranks(functional.normalize(tokens, dim=-1), dim=0).transpose(0, 1)
        if views.shape[1] < 2:
            raise ValueError(f"cls must hold at least two samples, got {views.shape[1]}.")
        with torch.no_grad():
            similarity = views @ views.mT
            similarity.diagonal(dim1=1, dim2=2).fill_(-2)
            nearest = similarity.argmax(-1)
        neighbours = views.gather(1, nearest.unsqueeze(-1).expand_as(views))
        distances = functional.pairwise_distance(views, neighbours, eps=EPSILON)
        return -(distances + EPSILON).log().mean(1).sum()
