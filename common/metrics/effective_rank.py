"""Effective rank of a batch of embeddings: the first sign of a collapsing encoder."""

import torch


def effective_rank(embeddings: torch.Tensor) -> float:
    """Return exp(entropy) of the normalized singular values of the centred embeddings.

    1 when all embeddings lie on one line, min(N - 1, D) when they fill the space evenly; 0 when they all
    agree; nan when one is not finite.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", 2007.

    Args:
        embeddings: one embedding a row.

    Shape:
        Input ``(N, D)``.

    Example:
        >>> round(effective_rank(torch.eye(4)), 3)
        3.0
    """
    with torch.no_grad():
        centred = embeddings.detach().float()
        centred = centred - centred.mean(0)
        if not torch.isfinite(centred).all():
            return float("nan")
        singular = torch.linalg.svdvals(centred)
        # below float32 rounding of the largest entry a singular value is noise, not a direction
        singular = singular[
            singular > 1e-6 * embeddings.detach().float().abs().max() * max(embeddings.shape) ** 0.5
        ]
        if len(singular) == 0:
            return 0.0
        shares = singular / singular.sum()
        return float(torch.exp(-(shares * shares.log()).sum()))
