"""KoLeo: the regularizer that keeps embeddings of a batch apart from their nearest neighbours."""

# V views, B samples on this rank, D embedding

import torch
from torch.nn import functional

from common.run.distributed import gather_over_ranks

EPSILON = 1e-8
"""Keeps the logarithm of two equal embeddings finite. Source: DINOv2."""


def koleo_loss(cls: torch.Tensor) -> torch.Tensor:
    """Return minus the mean log distance of embeddings to their nearest neighbour, summed over views.

    Embeddings are scaled to unit length and compared with the other samples of the same view over the global
    batch (DINOv2: of one GPU's), so that the value does not depend on the number of ranks. In float32
    unless given float64, also under autocast.

    Source: Sablayrolles et al., arXiv:1806.03198; summed over the global views as in DINOv2.

    Args:
        cls: CLS tokens of the student's global views; as many on every rank.

    Shape:
        Input ``(B, V, D)``. Output: scalar, the same on every rank.

    Raises:
        ValueError: if the global batch has fewer than two samples.

    Example:
        >>> round(float(koleo_loss(torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]]]))), 3)  # -log(sqrt(2))
        -0.347
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
