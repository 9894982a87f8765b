"""The network that is pretrained: encoder, projector and, for the guided variants, the auxiliary head."""

# B slabs, V views (Vg global, Vl local), P patches, D embedding, K projection, C classes

import torch
from torch import nn

from common.networks.encoder import cls_and_patches
from common.networks.heads import AuxiliaryHead, ProjectionHead


class PretrainingModel(nn.Module):
    """Encode all views of a batch of slabs symmetrically and read out projections and auxiliary logits.

    Global and local views go through the encoder as two dense batches, for they differ in size.
    One ``forward`` holds every trained parameter, so that DistributedDataParallel sees them all.

    Source: DALE-CT III-C, Eq. 1-3.

    Args:
        encoder: timm VisionTransformer with one input channel.
        projector: head on the CLS token, kept for pretraining only.
        auxiliary_head: linear read-outs shared by CLS and patch tokens; None for DALE-CT-0.
        checkpoint_activations: whether blocks keep their input only and compute the rest again in the
            backward pass: less memory, a third more time.

    Shape:
        ``global_views (B, Vg, 1, S, S)``, ``local_views (B, Vl, 1, s, s)``. Output: ``projections
        (Vg + Vl, B, K)``, global views first; ``cls (B, Vg, D)`` of the global views; ``logits``: for the
        groups "global" and "local" a dictionary of ``ts_cls (B, V, C)``, ``ts_patch (B, V, P, C)`` and the
        same for ``rex``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: ProjectionHead,
        auxiliary_head: AuxiliaryHead | None,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        encoder.set_grad_checkpointing(checkpoint_activations)  # type: ignore[operator]
        self.projector = projector
        self.auxiliary_head = auxiliary_head

    def forward(self, global_views: torch.Tensor, local_views: torch.Tensor) -> dict:
        """Encode the views; see the class."""
        projections, logits, cls_tokens = [], {}, []
        for group, views in (("global", global_views), ("local", local_views)):
            batch, num_views = views.shape[:2]
            cls, patches = cls_and_patches(self.encoder, views.flatten(0, 1))
            projections.append(self.projector(cls).unflatten(0, (batch, num_views)).transpose(0, 1))
            cls_tokens.append(cls.unflatten(0, (batch, num_views)))
            if self.auxiliary_head is not None:
                outputs = {"cls": self.auxiliary_head(cls), "patch": self.auxiliary_head(patches)}
                logits[group] = {
                    f"{source}_{level}": tensor.unflatten(0, (batch, num_views))
                    for level, by_source in outputs.items()
                    for source, tensor in by_source.items()
                }
        return {"projections": torch.cat(projections), "cls": cls_tokens[0], "logits": logits}
