"""The encoders that come along, and one of slices with its weights, ready to use."""

# Z slices, H x W of a slice, I side of an image, D embedding

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from common.networks.encoder import SliceInput
    from common.transforms.slice_strategies import SliceStrategy

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
RANDOM = "random"
"""Asks for random initial weights in place of trained ones."""


class Facts(NamedTuple):
    """What can be said of an encoder without loading it.

    Args:
        name: name of its bundle.
        takes: "slices" or "volumes".
        dim: D, length of a token.
        tokens: what a token is.
        weights: where its weights are, or where they come from.
        licence: licence of these weights.
        is_here: whether they are on this machine, in the bundle's ``models`` folder or the hub's cache.
    """

    name: str
    takes: str
    dim: int
    tokens: str
    weights: str
    licence: str
    is_here: bool


def encoders() -> dict[str, Facts]:
    """List the encoders that come along, by name.

    Example:
        >>> encoders()["dale_ct_2s"].dim
        1024
    """
    folders = sorted(path.parents[1] for path in BUNDLES.glob("*/configs/inference.json"))
    return {folder.name: _facts(folder) for folder in folders}


def bundle_folder(encoder: str) -> Path:
    """Find the bundle of an encoder.

    Args:
        encoder: name of an encoder that comes along, or a bundle's folder.

    Raises:
        ValueError: if there is no such encoder; names the nearest.
    """
    for folder in (BUNDLES / encoder, Path(encoder)):
        if (folder / "configs" / "inference.json").is_file():
            return folder
    known = [*encoders()]
    nearest = get_close_matches(encoder, known, n=1)
    hint = f"Did you mean '{nearest[0]}'?" if nearest else f"Known: {', '.join(known)}."
    raise ValueError(f"Unknown encoder '{encoder}'. {hint} A bundle's folder will do, too.")


def read_config(folder: Path) -> dict[str, Any]:
    """Read a bundle's ``inference.json`` as it is written."""
    config: dict[str, Any] = json.loads((folder / "configs" / "inference.json").read_text(encoding="utf-8"))
    return config


def _facts(folder: Path) -> Facts:
    config = read_config(folder)
    metadata = json.loads((folder / "configs" / "metadata.json").read_text(encoding="utf-8"))
    output = metadata["network_data_format"]["outputs"]["pred"]
    own = folder / "models" / Path(config["weights_name"]).name
    weights = str(own) if own.is_file() else f"hub:{config['weights_repo']}"
    return Facts(
        name=folder.name,
        takes="slices" if "strategies" in config else "volumes",
        dim=output["num_channels"],
        tokens=output["channel_def"]["0"],
        weights=weights,
        licence="your own" if own.is_file() else str(config["weights_licence"]),
        is_here=own.is_file() or _in_cache(config),
    )


def _in_cache(config: Mapping[str, Any]) -> bool:
    from huggingface_hub import try_to_load_from_cache

    names = ("weights_repo", "weights_name", "weights_revision", "weights_repo_type")
    repository, name, revision, kind = (config[key] for key in names)
    return isinstance(try_to_load_from_cache(repository, name, revision=revision, repo_type=kind), str)


@dataclass(frozen=True)
class SliceEncoder:
    """An encoder of slices, its weights loaded.

    Args:
        network: timm VisionTransformer in evaluation mode; images ``(N, 1, I, I)`` to CLS ``(N, D)``.
        given: HU window and axes of the slices that it was trained on.
        strategy: how a slice becomes an image.
        identity: what embeddings are compared by.
        config: its bundle's ``inference.json`` as written.
        device: where it computes.
    """

    network: "nn.Module"
    given: "SliceInput"
    strategy: "SliceStrategy"
    identity: dict[str, Any]
    config: dict[str, Any]
    device: "torch.device"

    def images(self, hu: "np.ndarray | torch.Tensor") -> "torch.Tensor":
        """Turn the slices of a CT into the images that the network takes.

        Args:
            hu: slices in HU, rows from front to back, columns from the patient's right to left, feet first,
                as ``read_ct(...).hu``.

        Shape:
            Input ``(Z, H, W)``; output float32 ``(Z, 1, I, I)``.
        """
        import numpy as np
        import torch

        from common.ct.geometry import STORED_HU_RANGE
        from common.transforms.hounsfield import normalize_hu
        from common.transforms.slice_strategies import body_box, pad_to_square

        slices = torch.from_numpy(pad_to_square(np.asarray(hu, np.int16), STORED_HU_RANGE[0]))
        region = self.strategy.region(slices, body_box(slices) if self.strategy.is_cropped else None)
        region = region.transpose(1, 2) if self.given.slice_axes == "xy" else region
        return normalize_hu(self.strategy(region.to(self.device)), self.given.window)


@lru_cache(maxsize=2)
def load_encoder(
    encoder: str = "dale_ct_2s",
    weights: str | None = None,
    device: str | None = None,
    strategy: str | None = None,
) -> SliceEncoder:
    """Load an encoder of slices for one's own loop; a second call with the same arguments is at once done.

    Args:
        encoder: name of an encoder that comes along, or a bundle's folder.
        weights: a file, ``hub:<owner>/<name>[@revision]`` or "random"; None for those in the bundle's
            ``models`` folder, else the authors' release from the hub.
        device: "cuda", "cuda:1", "cpu"; None for a GPU where there is one.
        strategy: how slices become images, a name of Table VI; None for the bundle's.

    Raises:
        ValueError: if there is no such encoder, it takes volumes, or the weights do not fit it.
        FileNotFoundError: if the weights are neither on disk nor to be had from the hub.
    """
    import timm
    import torch

    from common.networks import encoder as networks
    from common.transforms.slice_strategies import slice_strategies

    folder = bundle_folder(encoder)
    config = read_config(folder)
    if "strategies" not in config:
        raise ValueError(f"'{encoder}' encodes volumes: use dale_ct.embed, or its bundle.")
    own = folder / "models" / "model.safetensors"
    found = networks.find_weights(
        None if weights == RANDOM else weights or own,
        bundle_weights=own,
        **{name: config[name] for name in config if name.startswith("weights_") and name in TOLD},
        facts=_resolved(config["weights"]["facts"], config),
    )
    given = networks.slice_input(found)
    torch.manual_seed(config["seed"])
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network = timm.create_model(**_resolved(_arguments(config["network_def"]), config)).to(where)
    facts = {name: config.get(name) for name in config["identity"]}
    facts |= {"slice_axes": given.slice_axes, "hu_window": list(given.window)}
    networks.load_encoder(network, found.path, facts)
    encoder_id = networks.encoder_id(
        sha256=found.sha256,
        seed=config["seed"],
        slice_axes=given.slice_axes,
        window=given.window,
        layer_scale_init=config["layer_scale_init"],
    )
    return SliceEncoder(
        network=network.eval(),
        given=given,
        strategy=slice_strategies([strategy or config["strategies"][0]], config["patch_size_px"])[0],
        identity={
            "encoder": config["name"],
            "encoder_id": encoder_id,
            "weights": found.name,
            "slice_order": "feet_to_head",
            "token_kind": "slice",
        },
        config=config,
        device=where,
    )


TOLD = ("weights_repo", "weights_repo_type", "weights_revision", "weights_name", "weights_licence")


def _arguments(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if not name.startswith("_")}


def _resolved(part: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Put in the knobs that a part of the config refers to, such as ``"@depth"``."""
    return {
        name: config[value[1:]] if isinstance(value, str) and value.startswith("@") else value
        for name, value in part.items()
    }
