"""The network of DINOv2's student and of its teacher: encoder, two heads and the mask token."""

# B slabs, V views (Vg global, Vl local), P patches, D embedding, M masked tokens with padding, K prototypes

import copy

import torch
from timm.models import checkpoint_seq
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from common.networks.pretraining_model import check_positive


class DINOHead(nn.Module):
    """Three-layer perceptron to the unit sphere, then the cosine of the angle to every prototype.

    Linear, GELU, twice, Linear, unit length; the last layer has rows of unit length and no bias: ``(..., D)``
    to ``(..., K)`` within [-1, 1]. Weights start from a normal distribution of width 0.02, cut off at two.

    Source: DINO, arXiv:2104.14294, appendix C, as in DINOv2, but with the length of a prototype fixed at 1
    (DINO's ``norm_last_layer``; DINOv2 starts it at 1). Sizes: DINOv2's defaults, which DALE-CT's code names.

    Args:
        embed_dim: D, width of the encoder. ViT-L: 1024.
        head_hidden_dim: width of the two hidden layers. 2048.
        head_bottleneck_dim: dimensions of the sphere. 256.
        num_prototypes: K. 65,536.

    Raises:
        ValueError: if a width is not positive.
    """

    def __init__(
        self, embed_dim: int, head_hidden_dim: int, head_bottleneck_dim: int, num_prototypes: int
    ) -> None:
        hidden, bottleneck = head_hidden_dim, head_bottleneck_dim
        check_positive(embed_dim=embed_dim, head_hidden_dim=hidden, head_bottleneck_dim=bottleneck)
        check_positive(num_prototypes=num_prototypes)
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.last_layer = nn.Linear(bottleneck, num_prototypes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the cosines."""
        points = functional.normalize(self.mlp(tokens), dim=-1, eps=1e-6)  # a bfloat16 is as small
        return functional.linear(points, functional.normalize(self.last_layer.weight, dim=-1))


class DINOModel(nn.Module):
    """Encode views and read prototypes out of CLS tokens and of masked patches.

    Global views go through the encoder as one dense batch, local ones as another, for they differ in size;
    each head is applied once, to the tokens whose loss is asked for and to no other. One ``forward`` holds
    every trained parameter, so that DistributedDataParallel sees them all.

    Source: DINOv2, arXiv:2304.07193, section 4, with heads that share nothing. Used in DALE-CT III-B.

    Args:
        encoder: timm VisionTransformer with one input channel.
        dino_head: head on CLS tokens.
        ibot_head: head on masked patches.
        checkpoint_activations: see ``PretrainingModel``.

    Shape:
        ``global_views (B, Vg, 1, S, S)``; ``local_views (B, Vl, 1, s, s)`` or None; ``masks (B, Vg, P)``
        bool, which patches of global views the encoder does not see, or None; ``places (M,)``: of the masked
        patches among all ``B Vg P``. Output: ``cls_logits (V, B, K)``, global views first; ``patch_logits
        (M, K)``; ``cls (B, Vg, D)`` of the global views.
    """

    def __init__(
        self,
        encoder: nn.Module,
        dino_head: DINOHead,
        ibot_head: DINOHead,
        checkpoint_activations: bool,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        encoder.set_grad_checkpointing(checkpoint_activations)  # type: ignore[operator]
        self.dino_head = dino_head
        self.ibot_head = ibot_head
        width: int = encoder.embed_dim  # type: ignore[assignment]
        self.mask_token = nn.Parameter(torch.zeros(1, width))

    def forward(
        self,
        global_views: torch.Tensor,
        local_views: torch.Tensor | None,
        masks: torch.Tensor | None,
        places: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Encode the views; see the class."""
        batch, num_global = global_views.shape[:2]
        tokens = self.tokens(global_views.flatten(0, 1), None if masks is None else masks.flatten(0, 1))
        patches = tokens[:, self.encoder.num_prefix_tokens :]
        by_group = [tokens[:, 0].unflatten(0, (batch, num_global))]
        if local_views is not None:
            local = self.tokens(local_views.flatten(0, 1), None)[:, 0]
            by_group.append(local.unflatten(0, (batch, -1)))
        cls = torch.cat(by_group, dim=1)
        return {
            "cls_logits": self.dino_head(cls.transpose(0, 1)),
            "patch_logits": self.ibot_head(patches.flatten(0, 1).index_select(0, places)),
            "cls": by_group[0],
        }

    def tokens(self, images: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
        """Return all tokens ``(N, prefix + P, D)`` after the final norm, the mask token for masked patches.

        The steps of timm's ``forward_features``, with the patches of ``masks (N, P)`` replaced before their
        positions are added, as in BEiT and DINOv2.
        """
        vit: nn.Module = self.encoder
        x = vit.patch_embed(images)  # type: ignore[operator]
        if masks is not None:  # timm keeps the grid of patches where images may have any size
            x = torch.where(masks.view(*x.shape[:-1], 1), self.mask_token.to(x.dtype), x)
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))  # type: ignore[operator]
        blocks: nn.Sequential = vit.blocks  # type: ignore[assignment]
        x = checkpoint_seq(blocks, x) if vit.grad_checkpointing and torch.is_grad_enabled() else blocks(x)
        return vit.norm(x)  # type: ignore[operator]


def new_teacher(student: nn.Module) -> nn.Module:
    """Return a copy of the student that does not learn; make it before the student is distributed."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's parameters towards the student's, which get the share 1 - momentum.

    Each rank moves what it holds, in a few fused kernels; nothing waits for the device.

    Source: DINO, arXiv:2104.14294, section 3.1.

    Args:
        teacher: teacher of ``new_teacher``, spread over the ranks as the student is.
        student: network of ``distribute``.
        momentum: share that stays.
    """
    moved, target = ([_held(p) for p in network.parameters()] for network in (teacher, student))
    torch._foreach_lerp_(moved, target, 1 - momentum)


def _held(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
