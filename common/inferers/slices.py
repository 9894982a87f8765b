"""Run a 2D encoder over the slices of a volume."""

# S slices, D embedding

import torch
from monai.inferers import Inferer
from torch import nn


class SlicesInferer(Inferer):
    """Encode all slices of one volume in chunks of a fixed number of slices.

    Args:
        slices_per_batch: slices encoded at a time; bounds the memory whatever the volume's length.
        amp_dtype: "bfloat16" for autocast, "float32" for none.

    Shape:
        Input ``(1, S, 1, H, W)``, one volume. Output: CLS embeddings ``(1, S, D)``, float32.

    Raises:
        ValueError: if more than one volume comes at a time.
    """

    def __init__(self, slices_per_batch: int, amp_dtype: str) -> None:
        super().__init__()
        self.slices_per_batch = slices_per_batch
        self.amp_dtype = amp_dtype

    def __call__(self, inputs: torch.Tensor, network: nn.Module) -> torch.Tensor:  # type: ignore[override]
        """Encode; see the class."""
        if len(inputs) != 1:
            raise ValueError(
                f"inputs must hold one volume, got {len(inputs)}. Set the loader's batch_size to 1."
            )
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.amp_dtype == "bfloat16"):
            cls = [network(chunk).float() for chunk in inputs[0].split(self.slices_per_batch)]
        return torch.cat(cls).unsqueeze(0)
