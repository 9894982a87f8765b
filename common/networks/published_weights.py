"""Weights that others publish: the part of them that a network is, loaded strictly by name."""

import fnmatch
import logging
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from common.networks.encoder import load_strictly

logger = logging.getLogger(__name__)


def load_published(
    network: nn.Module,
    path: str | Path | None,
    prefixes: Mapping[str, str],
    ignored: Sequence[str] = (),
    summed: Sequence[str] = (),
) -> nn.Module:
    """Load the part of a published state dictionary that a network is, strictly, and switch it to inference.

    Args:
        network: takes the weights.
        path: safetensors file, or a PyTorch file, of which nothing but tensors is read; None keeps the random
            initial weights and says so.
        prefixes: how the names of the network's part begin, and what they begin with in the network. The rest
            of the file (a text encoder, say) is left out.
        ignored: patterns of names in that part, after renaming, that the network has no use for.
        summed: names of convolutions whose input channels are added up to one, because the published
            network sees the same channel several times.

    Returns:
        The same network, for use in a config.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds anything but tensors, or a key or a shape differs.
    """
    if path is None:
        logger.warning("encoder_weights is null: the encoder keeps its random initial weights.")
        return network.eval()
    load_strictly(network, own_part(_read(Path(path)), prefixes, ignored, summed), path)
    return network.eval()


def own_part(
    published: Mapping[str, torch.Tensor],
    prefixes: Mapping[str, str],
    ignored: Sequence[str] = (),
    summed: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """Take a network's part of a published state dictionary, under the network's own names.

    Args:
        published: the whole dictionary.
        prefixes: see :func:`load_published`.
        ignored: see :func:`load_published`.
        summed: see :func:`load_published`.

    Example:
        >>> published = {"image.conv.weight": torch.ones(1, 3), "image.head.bias": torch.zeros(1)}
        >>> own_part(published, {"image.": ""}, ignored=["head.*"], summed=["conv.weight"])
        {'conv.weight': tensor([[3.]])}
    """
    tensors = {}
    for key, tensor in published.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if prefix is None:
            continue
        name = prefixes[prefix] + key.removeprefix(prefix)
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored):
            tensors[name] = tensor.sum(1, keepdim=True) if name in summed else tensor
    return tensors


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"encoder_weights must be a file, got '{path}', which does not exist.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(
            f"encoder_weights must be a whole file of tensors, got '{path}' ({str(error).splitlines()[0]})."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(item, torch.Tensor) for item in content.values()):
        raise ValueError(f"encoder_weights must be a dictionary of tensors, got another content in '{path}'.")
    return content
