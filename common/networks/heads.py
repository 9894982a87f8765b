"""Heads on the encoder's tokens that exist for pretraining only."""

# D embedding, K projection or prototypes, C classes

import torch
from torch import nn
from torch.nn import functional


class ProjectionHead(nn.Sequential):
    """Three-layer perceptron from the CLS token to the space where LeJEPA compares views.

    Linear, LayerNorm, GELU, twice, then Linear.

    Source: DALE-CT III-C1; widths of the released configurations.

    Args:
        embed_dim: D, width of the encoder. ViT-L: 1024.
        hidden_dim: width of the two hidden layers. Released DALE-CT configurations: 2048.
        out_dim: K, width of the projection. Released DALE-CT configurations: 124.

    Shape:
        Input ``(..., D)``. Output: ``(..., K)``.

    Raises:
        ValueError: if a width is not positive.

    Example:
        >>> ProjectionHead(embed_dim=16, hidden_dim=32, out_dim=5)(torch.zeros(3, 16)).shape
        torch.Size([3, 5])
    """

    def __init__(self, embed_dim: int, hidden_dim: int, out_dim: int) -> None:
        _check_positive(embed_dim=embed_dim, hidden_dim=hidden_dim, out_dim=out_dim)
        super().__init__(
            nn.Linear(embed_dim, hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, out_dim),
        )


class AuxiliaryHead(nn.Module):
    """Linear read-outs of organs and findings, each shared by CLS and patch tokens.

    Source: DALE-CT III-C2.

    Args:
        embed_dim: D, width of the encoder. ViT-L: 1024.
        num_ts_classes: TotalSegmentator classes with the background. DALE-CT III-C2: 118.
        num_rex_classes: ReXGroundingCT findings; 0 for none. DALE-CT-2S: 14, DALE-CT-1S: 0.
        trained: whether it learns. The released code forgot to: its encoders serve a random read-out.

    Shape:
        Input ``(..., D)``. Output: dictionary of logits ``ts (..., num_ts_classes)`` and, if there are any
        findings, ``rex (..., num_rex_classes)``.

    Raises:
        ValueError: if a width is not positive, or the number of findings negative.

    Example:
        >>> head = AuxiliaryHead(embed_dim=16, num_ts_classes=118, num_rex_classes=14)
        >>> logits = head(torch.zeros(3, 81, 16))
        >>> {source: tuple(tensor.shape) for source, tensor in logits.items()}
        {'ts': (3, 81, 118), 'rex': (3, 81, 14)}
    """

    def __init__(
        self, embed_dim: int, num_ts_classes: int, num_rex_classes: int, trained: bool = True
    ) -> None:
        super().__init__()
        _check_positive(embed_dim=embed_dim, num_ts_classes=num_ts_classes)
        if num_rex_classes < 0:
            raise ValueError(f"num_rex_classes must not be negative, got {num_rex_classes}.")
        self.readouts = nn.ModuleDict({"ts": nn.Linear(embed_dim, num_ts_classes)})
        if num_rex_classes:
            self.readouts["rex"] = nn.Linear(embed_dim, num_rex_classes)
        self.requires_grad_(trained)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits of every source for every token."""
        return {source: readout(tokens) for source, readout in self.readouts.items()}


class DINOHead(nn.Module):
    """Three-layer perceptron to the unit sphere, then the cosine of the angle to every prototype.

    Linear, GELU, twice, Linear, unit length; the last layer has rows of unit length and no bias. Weights
    start from a normal distribution of width 0.02, cut off at two.

    Source: DINO, arXiv:2104.14294, appendix C, as in DINOv2, but with the length of a prototype fixed at 1
    (DINO's ``norm_last_layer``; DINOv2 starts it at 1). Sizes: DINOv2's defaults, which DALE-CT's code names.

    Args:
        embed_dim: D, width of the encoder. ViT-L: 1024.
        hidden_dim: width of the two hidden layers. 2048.
        bottleneck_dim: dimensions of the sphere. 256.
        num_prototypes: K. 65,536.

    Shape:
        Input ``(..., D)``. Output: ``(..., K)``, within [-1, 1].

    Raises:
        ValueError: if a width is not positive.

    Example:
        >>> head = DINOHead(embed_dim=16, hidden_dim=32, bottleneck_dim=8, num_prototypes=5)
        >>> head(torch.zeros(3, 16)).shape
        torch.Size([3, 5])
    """

    def __init__(self, embed_dim: int, hidden_dim: int, bottleneck_dim: int, num_prototypes: int) -> None:
        _check_positive(
            embed_dim=embed_dim,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            num_prototypes=num_prototypes,
        )
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.last_layer = nn.Linear(bottleneck_dim, num_prototypes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the cosines."""
        points = functional.normalize(self.mlp(tokens), dim=-1, eps=1e-6)  # a bfloat16 is as small
        return functional.linear(points, functional.normalize(self.last_layer.weight, dim=-1))


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}.")
