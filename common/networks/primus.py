"""Primus, the 3D vision transformer of COLIPRI, and COLIPRI's image encoder around it."""

# B volumes, X Y Z voxels, T = Tx Ty Tz tokens of the grid, D width of a token, E of the latent space

import torch
from timm.models.eva import EvaBlock
from torch import nn


class Primus(nn.Module):
    """Transformer over the patches of a volume, with rotary positions along its three axes.

    Blocks are timm's EVA-02 blocks: separate projections, SwiGLU with an inner norm, layer scale, a norm
    before the attention's output. Keys are those of ``dynamic_network_architectures``' Primus without its
    decoder. Positions are counted in patches: any volume whose sides the patch divides can be encoded.

    Source: Primus, arXiv:2503.01835; sizes of Primus-M as in COLIPRI, arXiv:2510.15042.

    Args:
        embed_dim: D; 6 x ``num_heads`` must divide it.
        depth: number of blocks.
        num_heads: attention heads.
        patch_size: side of a patch, in voxels.
        layer_scale_init: initial value of the layer scale.
        in_channels: channels of the volume.

    Shape:
        Input ``(B, in_channels, X, Y, Z)``. Output ``(B, D, X / patch, Y / patch, Z / patch)``.

    Raises:
        ValueError: if the width does not split into heads of three axes, or the patch does not divide a side.
    """

    mask_token: torch.Tensor

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_size: int,
        layer_scale_init: float,
        in_channels: int = 1,
    ) -> None:
        super().__init__()
        if embed_dim % (6 * num_heads):
            raise ValueError(
                f"embed_dim must be a multiple of 6 x num_heads, two numbers an axis and band, "
                f"got {embed_dim} for {num_heads} heads."
            )
        self.patch_size = patch_size
        self.bands_per_axis = embed_dim // num_heads // 6
        self.down_projection = nn.ModuleDict(
            {"proj": nn.Conv3d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)}
        )
        blocks = [
            EvaBlock(
                dim=embed_dim,
                num_heads=num_heads,
                qkv_fused=False,
                mlp_ratio=4 * 2 / 3,
                swiglu_mlp=True,
                scale_mlp=True,
                scale_attn_inner=True,
                num_prefix_tokens=0,
                norm_layer=nn.LayerNorm,  # epsilon 1e-5; timm's own is 1e-6
                init_values=layer_scale_init,
            )
            for _ in range(depth)
        ]
        self.eva = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "norm": nn.LayerNorm(embed_dim)})
        # of masked pretraining; published with the weights, unused here
        self.register_buffer("mask_token", torch.zeros(1, 1, embed_dim))

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Encode; see the class."""
        if any(side % self.patch_size for side in volumes.shape[2:]):
            raise ValueError(
                f"volume sides must be multiples of patch_size {self.patch_size}, "
                f"got {tuple(volumes.shape[2:])}."
            )
        grid = self.down_projection["proj"](volumes)
        tokens = grid.flatten(2).transpose(1, 2)
        positions = rotary_positions(grid.shape[2:], self.bands_per_axis).to(tokens)
        for block in self.eva["blocks"]:  # type: ignore[attr-defined]
            tokens = block(tokens, rope=positions)
        return self.eva["norm"](tokens).transpose(1, 2).reshape(grid.shape)


def rotary_positions(grid: torch.Size | tuple[int, ...], bands_per_axis: int) -> torch.Tensor:
    """Sines, then cosines, of each token's place along the axes of its grid.

    A place p turns pair k of numbers by p / 10000^(k / bands) radians; the pairs of the first axis come
    first, and both numbers of a pair share the angle: ``(T, 2 * 2 * axes * bands_per_axis)``.
    """
    bands = 10000.0 ** -(torch.arange(bands_per_axis) / bands_per_axis)
    places = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), dim=-1)
    angles = (places.reshape(-1, len(grid), 1) * bands).flatten(1).repeat_interleave(2, dim=1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class COLIPRIImageEncoder(nn.Module):
    """Primus with COLIPRI's projector and pooler: a grid of tokens, and one vector in its latent space.

    Source: COLIPRI, arXiv:2510.15042, and its package (MIT): the tokens are projected by a 1 x 1 x 1
    convolution; one attention query, their mean, gathers them into the vector that meets reports.

    Args:
        backbone: Primus of width D.
        embed_dim: D.
        latent_dim: E, width of projected tokens and of the vector.
        num_pool_heads: heads of the pooler.
        tokens: the grid to give: "backbone" for that of width D, "projected" for that of width E.

    Shape:
        Input ``(B, 1, X, Y, Z)``. Output ``(B, D, Tx, Ty, Tz)``; E channels if projected.

    Raises:
        ValueError: if ``tokens`` is neither.
    """

    def __init__(
        self, backbone: Primus, *, embed_dim: int, latent_dim: int, num_pool_heads: int, tokens: str
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Conv3d(embed_dim, latent_dim, kernel_size=1)
        self.pooler = nn.ModuleDict(
            {"attn": nn.MultiheadAttention(latent_dim, num_pool_heads, batch_first=True)}
        )
        if tokens not in ("backbone", "projected"):
            raise ValueError(f"tokens must be 'backbone' or 'projected', got '{tokens}'.")
        self.project = tokens == "projected"

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Encode; see the class."""
        grid = self.backbone(volumes)
        return self.projector(grid) if self.project else grid

    def pool(self, grid: torch.Tensor) -> torch.Tensor:
        """Gather the tokens of :meth:`forward` into one vector per volume, ``(B, E)``."""
        tokens = (grid if self.project else self.projector(grid)).flatten(2).transpose(1, 2)
        pooled, _ = self.pooler["attn"](tokens.mean(1, keepdim=True), tokens, tokens, need_weights=False)
        return pooled[:, 0]
