"""Weights that others publish: found on disk or on the Hugging Face hub, and loaded strictly by name."""

import fnmatch
import hashlib
import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from common.networks.encoder import load_strictly

logger = logging.getLogger(__name__)


def weights_file(
    path: str | Path | None, repo_id: str | None, filename: str, revision: str, repo_type: str = "model"
) -> Path | None:
    """Find published weights: at ``path`` if there is a file, else in the hub's cache, else on the hub.

    The file's SHA-256 is logged; the embeddings record its beginning. A gated repository asks for a token:
    ``hf auth login``.

    Args:
        path: where a file placed by hand lies; None for no weights.
        repo_id: owner and name of the repository; None for weights that are on disk only.
        filename: path of the file in the repository.
        revision: branch, tag or commit; a commit is the same file for ever.
        repo_type: "model" or "dataset".

    Returns:
        The file, or None if no weights are asked for.

    Raises:
        FileNotFoundError: if the file is neither on disk nor to be had from the hub.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        if repo_id is None:
            raise FileNotFoundError(
                f"encoder_weights must be a file, got '{path}', which does not exist. Pass --encoder_weights."
            )
        path = _from_hub(Path(path), repo_id, filename, revision, repo_type)
    with open(path, "rb") as file:
        logger.info("weights '%s', sha256 %s", path, hashlib.file_digest(file, "sha256").hexdigest())
    return Path(path)


def _from_hub(path: Path, repo_id: str, filename: str, revision: str, repo_type: str) -> Path:
    # which packages are installed is nothing the hub need know; read at import
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    try:
        return Path(hf_hub_download(repo_id, filename, revision=revision, repo_type=repo_type))
    except (OSError, HTTPError, EntryNotFoundError) as error:
        page = f"huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"encoder_weights must be a file, got '{path}', which does not exist, and the hub did not give "
            f"it ({type(error).__name__}: {reason}). Accept the terms on {page} if there are any, get "
            f"'{filename}' at revision '{revision}' and place it at '{path}', or pass --encoder_weights."
        ) from None  # the first cause is what the user sees, and the hub's does not know what to do


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
