"""CT-CLIP's image tower: CTViT, attention within slabs and then across them, and a codebook."""

# B volumes, T H W tokens along slices, rows and columns, N tokens of one sequence, D width

import torch
from torch import nn
from torch.nn import functional

ATTENTION_SCALE = 8.0  # of the cosines of query and key; fixed in the published network
ROWS_PER_LOOKUP = 2048  # tokens compared with the codebook at once; bounds memory, changes no number


class CTViT(nn.Module):
    """Encoder of CT-CLIP: patches, attention within each slab, attention across slabs, nearest codes.

    Written from the description of the network (it follows Phenaki's C-ViViT, arXiv:2210.02399) and from the
    names and shapes of its released weights, which it loads strictly. What makes it differ from a plain
    transformer, and is kept because the weights were trained with it:

    - Keys and values come from the tokens before the norm, queries from those after it; both are normalised
      to unit length.
    - A causal depth-wise convolution in front of every attention gives the tokens their place. In front of
      attention across slabs it reads the tokens, which by then lie in the order (H, W, T), as if they lay in
      the order (T, H, W).

    Source: CT-CLIP, arXiv:2403.17834.

    Args:
        dim: D.
        patch_size: rows and columns of a patch, in voxels.
        temporal_patch_size: slices of a patch.
        spatial_depth: blocks within slabs.
        temporal_depth: blocks across slabs.
        num_heads: attention heads.
        dim_head: width of a head.
        codebook_size: number of codes.
        tokens: "codes" for each token's nearest code, as CT-CLIP does, or "before_codes" for the token.

    Shape:
        Input ``(B, 1, slices, rows, columns)``. Output ``(B, D, T, H, W)``.

    Raises:
        ValueError: if ``tokens`` is neither, or a patch does not divide a side of the volume.
    """

    def __init__(
        self,
        *,
        dim: int,
        patch_size: int,
        temporal_patch_size: int,
        spatial_depth: int,
        temporal_depth: int,
        num_heads: int,
        dim_head: int,
        codebook_size: int,
        tokens: str,
    ) -> None:
        super().__init__()
        self.patch = (temporal_patch_size, patch_size, patch_size)
        if tokens not in ("codes", "before_codes"):
            raise ValueError(f"tokens must be 'codes' or 'before_codes', got '{tokens}'.")
        self.after_codebook = tokens == "codes"
        voxels = temporal_patch_size * patch_size**2
        # entry 0 cuts the patches: it has no weights, but counts in the names of those that follow
        self.to_patch_emb = nn.Sequential(
            nn.Identity(), nn.LayerNorm(voxels), nn.Linear(voxels, dim), nn.LayerNorm(dim)
        )
        self.spatial_rel_pos_bias = _OffsetBias(dim, num_heads)
        self.enc_spatial_transformer = _Transformer(dim, spatial_depth, num_heads, dim_head)
        self.enc_temporal_transformer = _Transformer(dim, temporal_depth, num_heads, dim_head)
        self.vq = nn.ModuleDict({"_codebook": _Codebook(codebook_size, dim)})

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Encode; see the class."""
        if any(side % patch for side, patch in zip(volumes.shape[2:], self.patch, strict=True)):
            raise ValueError(
                f"volume sides must be multiples of the patch {self.patch}, got {tuple(volumes.shape[2:])}."
            )
        tokens = self.to_patch_emb(_patches(volumes, self.patch))
        batch, slabs, rows, columns, dim = grid = tokens.shape
        bias = self.spatial_rel_pos_bias(rows, columns)
        tokens = tokens.reshape(batch * slabs, rows * columns, dim)
        tokens = self.enc_spatial_transformer(tokens, grid[:4], bias).reshape(grid)
        tokens = tokens.permute(0, 2, 3, 1, 4).reshape(batch * rows * columns, slabs, dim)
        tokens = self.enc_temporal_transformer(tokens, grid[:4], None)
        tokens = tokens.reshape(batch, rows, columns, slabs, dim).permute(0, 3, 1, 2, 4)
        if self.after_codebook:
            tokens = self.vq["_codebook"](tokens)
        return tokens.permute(0, 4, 1, 2, 3)


class CTCLIPImageEncoder(nn.Module):
    """CTViT with CT-CLIP's projection: a grid of tokens, and one vector in the latent space of reports.

    Args:
        visual_transformer: CTViT of width D.
        grid_size: rows and columns of the grid that the projection was made for, 24 and 24.
        dim: D.
        latent_dim: width of the vector.

    Shape:
        Input ``(B, 1, slices, rows, columns)``. Output ``(B, D, T, H, W)``.
    """

    def __init__(
        self, visual_transformer: CTViT, grid_size: tuple[int, int], dim: int, latent_dim: int
    ) -> None:
        super().__init__()
        self.visual_transformer = visual_transformer
        self.to_visual_latent = nn.Linear(grid_size[0] * grid_size[1] * dim, latent_dim, bias=False)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Encode; see the class."""
        return self.visual_transformer(volumes)

    def pool(self, grid: torch.Tensor) -> torch.Tensor:
        """Average the slabs of :meth:`forward` and project, ``(B, latent_dim)``."""
        return self.to_visual_latent(grid.mean(2).permute(0, 2, 3, 1).flatten(1))


def _patches(volumes: torch.Tensor, patch: tuple[int, int, int]) -> torch.Tensor:
    """Cut ``(B, 1, ...)`` into ``(B, T, H, W, voxels)``, each patch slice by slice and row by row."""
    depth, height, width = patch
    batch, channels, slices, rows, columns = volumes.shape
    grid = volumes.reshape(
        batch, channels, slices // depth, depth, rows // height, height, columns // width, width
    )
    return grid.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


class _Norm(nn.Module):
    """Layer norm with a learned scale and a shift that stays as published (zero)."""

    beta: torch.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(tokens, tokens.shape[-1:], self.gamma, self.beta)


class _OffsetBias(nn.Module):
    """A bias for attention from a small network of the offset between two tokens of a slab."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        layers = [
            nn.Sequential(nn.Linear(2, dim), nn.LeakyReLU(0.1)),
            nn.Sequential(nn.Linear(dim, dim), nn.LeakyReLU(0.1)),
            nn.Linear(dim, num_heads),
        ]
        self.net = nn.ModuleList(layers)

    def forward(self, rows: int, columns: int) -> torch.Tensor:
        """Return ``(heads, N, N)``: each distinct offset passes the network once."""
        weight = self.net[2].weight
        offsets = [torch.arange(1 - size, size, device=weight.device) for size in (rows, columns)]  # type: ignore[arg-type]
        pairs = torch.stack(torch.meshgrid(*offsets, indexing="ij"), dim=-1).to(weight.dtype)  # type: ignore[arg-type]
        bias = pairs.sign() * (pairs.abs() + 1).log()
        for layer in self.net:
            bias = layer(bias)
        row, column = (
            places.flatten()
            for places in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        )
        return bias[row[:, None] - row + rows - 1, column[:, None] - column + columns - 1].permute(2, 0, 1)


class _CausalConvolution(nn.Module):
    """Depth-wise 3 x 3 x 3 convolution that looks backwards along the first axis of the grid."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dsconv = nn.Conv3d(dim, dim, kernel_size=3, groups=dim)

    def forward(self, tokens: torch.Tensor, grid: torch.Size) -> torch.Tensor:
        volume = tokens.reshape(*grid, -1).permute(0, 4, 1, 2, 3)
        volume = self.dsconv(functional.pad(volume, (1, 1, 1, 1, 2, 0)))
        return volume.permute(0, 2, 3, 4, 1).reshape(tokens.shape)


class _Attention(nn.Module):
    """Attention by the cosine of query and key."""

    def __init__(self, dim: int, num_heads: int, dim_head: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = _Norm(dim)
        self.to_q = nn.Linear(dim, num_heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * num_heads * dim_head, bias=False)
        self.q_scale = nn.Parameter(torch.ones(dim_head))
        self.k_scale = nn.Parameter(torch.ones(dim_head))
        self.to_out = nn.Linear(num_heads * dim_head, dim, bias=False)

    def forward(self, tokens: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        query, (key, value) = self.to_q(self.norm(tokens)), self.to_kv(tokens).chunk(2, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value)
        )
        query = functional.normalize(query, dim=-1) * self.q_scale
        key = functional.normalize(key, dim=-1) * self.k_scale
        out = functional.scaled_dot_product_attention(
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            attn_mask=None if bias is None else bias.to(value.dtype),
            scale=ATTENTION_SCALE,
        )
        return self.to_out(out.transpose(1, 2).flatten(2))


class _GatedGELU(nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        values, gate = tokens.chunk(2, dim=-1)
        return functional.gelu(gate) * values


class _Transformer(nn.Module):
    """Blocks of convolution, attention and feed-forward; the numbers name what the weights' names do."""

    def __init__(self, dim: int, depth: int, num_heads: int, dim_head: int) -> None:
        super().__init__()
        hidden = int(4 * (2 / 3) * dim)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            feed_forward = nn.Sequential(
                nn.LayerNorm(dim),
                nn.Linear(dim, 2 * hidden, bias=False),
                _GatedGELU(),
                nn.Identity(),  # dropout in training
                nn.Linear(hidden, dim, bias=False),
            )
            attention = _Attention(dim, num_heads, dim_head)
            self.layers.append(
                nn.ModuleDict({"0": _CausalConvolution(dim), "1": attention, "3": feed_forward})
            )
        self.norm_out = _Norm(dim)

    def forward(self, tokens: torch.Tensor, grid: torch.Size, bias: torch.Tensor | None) -> torch.Tensor:
        for layer in self.layers:
            tokens = layer["0"](tokens, grid) + tokens  # type: ignore[index]
            tokens = layer["1"](tokens, bias) + tokens  # type: ignore[index]
            tokens = layer["3"](tokens) + tokens  # type: ignore[index]
        return self.norm_out(tokens)


class _Codebook(nn.Module):
    """Codes, and for each token the one that has the largest cosine with it."""

    embed: torch.Tensor

    def __init__(self, codebook_size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embed", functional.normalize(torch.randn(1, codebook_size, dim), dim=-1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        # float32 as published: in bfloat16 near codes would be confused
        with torch.autocast(tokens.device.type, enabled=False):
            codes = functional.normalize(self.embed[0].float(), dim=-1)
            rows = functional.normalize(tokens.reshape(-1, tokens.shape[-1]).float(), dim=-1)
            nearest = torch.cat([(part @ codes.T).argmax(1) for part in rows.split(ROWS_PER_LOOKUP)])
        return self.embed[0][nearest].reshape(tokens.shape)
