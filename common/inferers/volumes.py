"""Run a 3D encoder over a volume: whole, or window by window."""

# B = 1 volume, D width of a token, G0 G1 G2 grid, T = G0 G1 G2 tokens

from collections.abc import Sequence

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SlidingWindowSplitter
from torch import nn

from common.networks.encoder import FittingParts


class VolumeInferer(Inferer):
    """Encode one volume in one pass and give its grid of tokens.

    The network returns a grid ``(1, D, G0, G1, G2)``, or a sequence ``(1, T, D)`` without places; of a tuple
    the first entry counts.

    Args:
        amp_dtype: "bfloat16" for autocast, "float32" for none.

    Shape:
        Input ``(1, 1, ...)``, one volume. Output: the grid in float32, ``(1, D, T, 1, 1)`` of a sequence; and
        None in place of the patches that encoders of slices give.

    Raises:
        ValueError: if more than one volume comes at a time, the network's output is neither a grid nor a
            sequence, or the GPU's memory is too small for one volume, or one window.
    """

    def __init__(self, amp_dtype: str) -> None:
        super().__init__()
        self.amp_dtype = amp_dtype
        self._parts = FittingParts()

    def __call__(self, inputs: torch.Tensor, network: nn.Module) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """Encode; see the class."""
        if len(inputs) != 1:
            raise ValueError(
                f"inputs must hold one volume, got {len(inputs)}. Set the loader's batch_size to 1."
            )
        volume = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        (grid,) = self._parts(lambda whole: self._grid(whole, network), volume)
        return grid.float(), None

    def _grid(self, volumes: torch.Tensor, network: nn.Module) -> torch.Tensor:
        """Encode volumes ``(B, 1, ...)`` to grids ``(B, D, G0, G1, G2)``."""
        with torch.autocast(volumes.device.type, torch.bfloat16, enabled=self.amp_dtype == "bfloat16"):
            output = network(volumes)
        tokens: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
        if tokens.ndim == 3:
            return tokens.transpose(1, 2)[..., None, None]
        if tokens.ndim == 5:
            return tokens
        raise ValueError(
            "The network must return a grid (B, D, G0, G1, G2) or a sequence (B, T, D), "
            f"got {tuple(tokens.shape)}."
        )


class WindowsInferer(VolumeInferer):
    """Encode one volume window by window: a token is the mean of a window's grid.

    Windows start at the first voxel and every ``round(side x (1 - overlap))`` voxels after; the volume's end
    is padded with zeros until the last one is whole.

    Args:
        window_size: sides of a window, in voxels; no side of the volume may be smaller.
        overlap: share of a side that neighbours have in common.
        windows_per_batch: windows encoded at a time; bounds the memory whatever the volume's size.
        amp_dtype: "bfloat16" for autocast, "float32" for none.

    Shape:
        As :class:`VolumeInferer`; the grid is that of the windows.

    Raises:
        ValueError: as :class:`VolumeInferer`, or if the volume is smaller than a window.
    """

    def __init__(
        self, window_size: Sequence[int], overlap: float, windows_per_batch: int, amp_dtype: str
    ) -> None:
        super().__init__(amp_dtype)
        self.window_size = tuple(window_size)
        self.splitter = SlidingWindowSplitter(self.window_size, overlap)
        self.windows_per_batch = windows_per_batch

    def _grid(self, volumes: torch.Tensor, network: nn.Module) -> torch.Tensor:
        sides, step = tuple(volumes.shape[2:]), self.windows_per_batch
        if any(side < window for side, window in zip(sides, self.window_size, strict=True)):
            raise ValueError(
                f"The volume must be at least as large as the window {self.window_size}, got {sides}. "
                "Pad it in the preprocessing."
            )
        windows, starts = zip(*self.splitter(volumes), strict=True)
        encode = super()._grid
        tokens: list[torch.Tensor] = []
        for i in range(0, len(windows), step):
            batch = torch.cat(windows[i : i + step])
            tokens += self._parts(lambda part: encode(part, network).flatten(2).mean(2), batch)
        counts = [len(set(axis)) for axis in zip(*starts, strict=True)]
        return torch.cat(tokens).T.reshape(1, -1, *counts)
