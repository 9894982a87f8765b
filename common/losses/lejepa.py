"""LeJEPA's loss: views of a slab agree, and a batch of them is spread like a normal distribution."""

# V views (global ones first), N samples on this rank, K projection

import torch
from torch import nn

from common.run.distributed import global_mean_weights


def invariance_loss(projections: torch.Tensor, num_global: int) -> torch.Tensor:
    """Return the mean squared distance of all views to the centre of the global views.

    The mean is over views, samples of the global batch and features: on several ranks the mean of the ranks'
    values is the value of the global batch. The centre has a gradient, too. In float32 unless given float64.

    Source: LeJEPA, arXiv:2511.08544, Eq. 5. Used in DALE-CT III-C1, Eq. 1.

    Args:
        projections: global views first.
        num_global: number of global views. DALE-CT III-A: 2.

    Shape:
        Input ``(V, N, K)``. Output: scalar.

    Raises:
        ValueError: if the projections are not three-dimensional or hold fewer than ``num_global`` views.

    Example:
        >>> invariance_loss(torch.tensor([[[0.0]], [[2.0]], [[4.0]]]), num_global=2)
        tensor(3.6667)
    """
    shape = tuple(projections.shape)
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"projections must have shape (V, N, K) with samples, got {shape}.")
    if not 1 <= num_global <= shape[0]:
        raise ValueError(f"num_global must be 1 to the number of views {shape[0]}, got {num_global}.")
    views = projections.to(torch.promote_types(projections.dtype, torch.float32))
    centre = views[:num_global].mean(0)
    by_sample = (centre - views).square().mean((0, 2))
    return (global_mean_weights(torch.ones_like(by_sample)) * by_sample).sum()


class LeJEPALoss(nn.Module):
    """Weighted sum of invariance over views and a regularizer: (1 - lambda) invariance + lambda SIGReg.

    Source: LeJEPA, arXiv:2511.08544. Used in DALE-CT III-C1, Eq. 1.

    Args:
        regularizer: ``SIGReg``, or another module of projections and step that keeps a batch spread.
        regularizer_weight: lambda of Eq. 1. Released DALE-CT configurations: 0.02.

    Shape:
        Input ``(V, N, K)``, global views first. Output: dictionary of the scalars ``loss``, ``invariance``
        and, under its class's name in small letters, the regularizer's.

    Raises:
        ValueError: if ``regularizer_weight`` lies outside [0, 1]; else as the regularizer and
            ``invariance_loss``.

    Example:
        >>> from common.losses.sigreg import SIGReg
        >>> terms = LeJEPALoss(SIGReg(), 0.02)(torch.zeros(10, 7, 124), num_global=2, step=0)
        >>> {name: round(float(value), 3) for name, value in terms.items()}
        {'loss': 0.056, 'invariance': 0.0, 'sigreg': 2.81}
    """

    def __init__(self, regularizer: nn.Module, regularizer_weight: float) -> None:
        super().__init__()
        if not 0 <= regularizer_weight <= 1:
            raise ValueError(f"regularizer_weight must lie in [0, 1], got {regularizer_weight}.")
        self.regularizer = regularizer
        self.regularizer_weight = regularizer_weight

    def forward(self, projections: torch.Tensor, num_global: int, step: int) -> dict[str, torch.Tensor]:
        """Return the loss and its two terms.

        Args:
            projections: see the class.
            num_global: number of global views.
            step: optimizer step, which chooses the regularizer's random directions.
        """
        invariance = invariance_loss(projections, num_global)
        regularization = self.regularizer(projections, step)
        loss = (1 - self.regularizer_weight) * invariance + self.regularizer_weight * regularization
        name = type(self.regularizer).__name__.lower()
        return {"loss": loss, "invariance": invariance, name: regularization}
