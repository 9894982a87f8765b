"""Run a 2D encoder over images of slices."""

# B images of a batch, P patches of one, D embedding

from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import Inferer
from torch import nn

from common.networks.encoder import cls_and_patches


class SlicesInferer(Inferer):
    """Encode a batch of images: CLS, and patch tokens on demand.

    Args:
        amp_dtype: "bfloat16" for autocast, "float32" for none.
        compiled: compile the encoder once for each shape of images that all batches share.
        patch_tokens: whether to return the patch tokens, too.

    Shape:
        Input ``(B, 1, I, I)``. Output: CLS ``(B, D)`` and patches ``(B, P, D)`` or None, in the type that
        the encoder computes them in.
    """

    def __init__(self, amp_dtype: str, compiled: bool, patch_tokens: bool) -> None:
        super().__init__()
        self.amp_dtype = amp_dtype
        self.patch_tokens = patch_tokens
        self.compiled = compiled
        self._encode: Callable[..., Any] = _encode
        if compiled:
            self._encode = torch.compile(_encode, dynamic=False)

    def __call__(  # type: ignore[override]
        self, inputs: torch.Tensor, network: nn.Module, is_fixed: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode; see the class. Batches that do not share a shape are never compiled for."""
        encode = self._encode if is_fixed else _encode
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.amp_dtype == "bfloat16"):
            return encode(network, inputs, self.patch_tokens)


def _encode(
    network: nn.Module, images: torch.Tensor, patch_tokens: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if patch_tokens:
        return cls_and_patches(network, images)
    return network(images), None
