"""Names and shapes of the tensors that the authors released, written out from their code and cards."""

import torch

CT_RATE, DALE_CT_0_L = (-997, 888, -142.39, 360.97), (-940.8, 923.1, -25.03, 246.87)
RELEASES = {
    "dale_ct_0": ("Kentucky-Open-Science/DALE-CT-0", CT_RATE),
    "dale_ct_0_l": ("Kentucky-Open-Science/DALE-CT-0-L", DALE_CT_0_L),
    "dale_ct_1s": ("Kentucky-Open-Science/DALE-CT-1S", CT_RATE),
    "dale_ct_1s_v2": ("Kentucky-Open-Science/DALE-CT-1S-v2", CT_RATE),
    "dale_ct_2s": ("Kentucky-Open-Science/DALE-CT-2S", CT_RATE),
    "dinov2_ct": ("Kentucky-Open-Science/Finetuned-DINOv2-Chest-CT", CT_RATE),
}
"""Repository and HU window of the release of each bundle; all of them expect transposed slices."""

Shapes = dict[str, tuple[int, ...]]


def shapes_of(bundle: str, dim: int = 1024, depth: int = 24) -> Shapes:
    """Return the shapes in the release of a bundle, or in one of another width and depth."""
    if bundle == "dinov2_ct":
        return transformers_shapes(dim, depth)
    return timm_shapes(dim, depth, *((14, 37) if bundle == "dale_ct_1s" else (16, 32)))


def timm_shapes(dim: int, depth: int, patch: int, grid: int) -> Shapes:
    """Return the shapes of timm's ``vit_large_patch14_dinov2`` with one input channel."""
    shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1 + grid * grid, dim),
        **{"patch_embed.proj.weight": (dim, 1, patch, patch), "patch_embed.proj.bias": (dim,)},
        **{"norm.weight": (dim,), "norm.bias": (dim,)},
    }
    in_block = {
        **{"norm1.weight": (dim,), "norm1.bias": (dim,), "norm2.weight": (dim,), "norm2.bias": (dim,)},
        **{"attn.qkv.weight": (3 * dim, dim), "attn.qkv.bias": (3 * dim,)},
        **{"attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,)},
        **{"ls1.gamma": (dim,), "ls2.gamma": (dim,)},
        **{"mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim,)},
        **{"mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": (dim,)},
    }
    return shapes | {f"blocks.{b}.{name}": shape for b in range(depth) for name, shape in in_block.items()}


def transformers_shapes(dim: int, depth: int) -> Shapes:
    """Return the shapes of transformers' Dinov2WithRegisters: patch 14, 518 px, 4 registers, one channel."""
    shapes = {
        "embeddings.cls_token": (1, 1, dim),
        "embeddings.mask_token": (1, dim),
        "embeddings.register_tokens": (1, 4, dim),
        "embeddings.position_embeddings": (1, 1 + 37 * 37, dim),
        "embeddings.patch_embeddings.projection.weight": (dim, 1, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (dim,),
        **{"layernorm.weight": (dim,), "layernorm.bias": (dim,)},
    }
    in_block = {
        **{"norm1.weight": (dim,), "norm1.bias": (dim,), "norm2.weight": (dim,), "norm2.bias": (dim,)},
        **{f"attention.attention.{name}.weight": (dim, dim) for name in ("query", "key", "value")},
        **{f"attention.attention.{name}.bias": (dim,) for name in ("query", "key", "value")},
        **{"attention.output.dense.weight": (dim, dim), "attention.output.dense.bias": (dim,)},
        **{"layer_scale1.lambda1": (dim,), "layer_scale2.lambda1": (dim,)},
        **{"mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim,)},
        **{"mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": (dim,)},
    }
    blocks = {f"encoder.layer.{b}.{name}": s for b in range(depth) for name, s in in_block.items()}
    return shapes | blocks


def random_weights(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Return tensors of these shapes, no two of which are alike."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
