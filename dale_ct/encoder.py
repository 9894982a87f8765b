"""The bundled encoders, and one of slices with its weights, ready to use."""

# Z slices, H x W of a slice, I side of an image, D embedding

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from threading import Lock
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
    """List the bundled encoders, by name.

    Example:
        >>> encoders()["dale_ct_2s"].dim
        1024
    """
    folders = sorted(path.parents[1] for path in BUNDLES.glob("*/configs/inference.json"))
    return {folder.name: _facts(folder) for folder in folders}


def bundle_folder(bundle: str | Path, config: str = "inference.json") -> Path:
    """Find the bundle of an encoder, or another that has some config.

    Args:
        bundle: name of a bundled one, or its folder.
        config: what it must have in ``configs``, such as "train.json".

    Raises:
        ValueError: if there is none; names the nearest.
    """
    for folder in (BUNDLES / bundle, Path(bundle)):
        if (folder / "configs" / config).is_file():
            return folder
    known = sorted(path.parents[1].name for path in BUNDLES.glob(f"*/configs/{config}"))
    nearest = get_close_matches(str(bundle), known, n=1)
    hint = f"Did you mean '{nearest[0]}'?" if nearest else f"Known: {', '.join(known)}."
    raise ValueError(f"No bundle '{bundle}' with a {config}. {hint} A bundle's folder works too.")


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
    licence = "yours, or that of their source" if _states_itself(own) else str(config["weights_licence"])
    return Facts(
        name=folder.name,
        takes="slices" if "strategies" in config else "volumes",
        dim=output["num_channels"],
        tokens=output["channel_def"]["0"],
        weights=weights,
        licence=licence,
        is_here=own.is_file() or _in_cache(config),
    )


def _states_itself(path: Path) -> bool:
    """Whether weights were trained or imported here; a file that says nothing is taken for the release."""
    if path.suffix != ".safetensors" or not path.is_file():
        return path.is_file()
    from common.networks.encoder import stated_identity  # torch, only where there are weights

    return bool(stated_identity(path))


def _in_cache(config: Mapping[str, Any]) -> bool:
    from huggingface_hub import try_to_load_from_cache

    names = ("weights_repo", "weights_name", "weights_revision", "weights_repo_type")
    repository, name, revision, kind = (config[key] for key in names)
    return isinstance(try_to_load_from_cache(repository, name, revision=revision, repo_type=kind), str)


@dataclass(frozen=True)
class SliceEncoder:
    """An encoder of slices, its weights loaded.

    Args:
        network: timm VisionTransformer in evaluation mode; images ``(N, 1, I, I)`` to CLS ``(N, D)``. It is
            shared by all that load the same encoder: copy it before you change it.
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
                as ``read_ct(...).hu``. Rounded, and clipped to what a CT can hold.

        Shape:
            Input ``(Z, H, W)``; output float32 ``(Z, 1, I, I)``.
        """
        import numpy as np
        import torch

        from common.ct.geometry import STORED_HU_RANGE
        from common.embeddings.ct_batches import images_of
        from common.transforms.slice_strategies import body_box, pad_to_square

        values = hu.cpu().numpy() if isinstance(hu, torch.Tensor) else np.asarray(hu)
        whole = np.rint(values).clip(*STORED_HU_RANGE).astype(np.int16)
        slices = torch.from_numpy(pad_to_square(whole, STORED_HU_RANGE[0]))
        region = self.strategy.region(slices, body_box(slices) if self.strategy.is_cropped else None)
        return images_of(region, self.strategy, self.given.window, self.given.slice_axes, self.device)


def load_encoder(
    encoder: str = "dale_ct_2s",
    weights: str | None = None,
    device: str | None = None,
    strategy: str | None = None,
    *,
    slice_axes: str | None = None,
    hu_window: "str | Sequence[float] | None" = None,
    patch_tokens: bool = False,
) -> SliceEncoder:
    """Load an encoder of slices for your own loop; a second call for the same network returns at once.

    Args:
        encoder: name of a bundled encoder, or a bundle's folder.
        weights: a file, ``hub:<owner>/<name>[@revision]`` or "random"; None for those in the bundle's
            ``models`` folder, else the authors' release from the hub.
        device: "cuda", "cuda:1", "cpu"; None for a GPU where there is one.
        strategy: how slices become images, a name of Table VI; None for the bundle's.
        slice_axes: "yx" or "xy", for weights of which it is not known.
        hu_window: name or four numbers, for weights of which it is not known.
        patch_tokens: whether patch tokens are to be kept, which tiles do not allow.

    Raises:
        ValueError: if there is no such encoder, device or strategy, it takes volumes, or weights do not fit.
        FileNotFoundError: if the weights are neither on disk nor on the hub.
    """
    import torch

    from common.transforms.slice_strategies import slice_strategies

    folder = bundle_folder(encoder).resolve()
    config = read_config(folder)
    if "strategies" not in config:
        raise ValueError(
            f"'{encoder}' encodes whole volumes, not slices. Run: dale-ct embed <ct> --encoder {encoder}"
        )
    names = [strategy or config["strategies"][0]]
    (chosen,) = slice_strategies(names, config["patch_size_px"], patch_tokens)
    own = folder / "models" / "model.safetensors"
    file = own if weights is None else Path(weights)
    inputs = (folder / "configs" / "inference.json", file)
    changed = tuple(one.stat().st_mtime_ns if one.is_file() else 0 for one in inputs)
    window = hu_window if hu_window is None or isinstance(hu_window, str) else tuple(hu_window)
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _one_at_a_time:
        network, given, identity = _loaded(folder, weights, name, slice_axes, window, changed)
    return SliceEncoder(network, given, chosen, identity, config, torch.device(name))


_one_at_a_time = Lock()


@lru_cache(maxsize=2)
def _loaded(
    folder: Path,
    weights: str | None,
    device: str,
    slice_axes: str | None,
    hu_window: "str | tuple[float, ...] | None",
    changed: tuple[int, ...],  # when the files that are read here were written: others are another encoder
) -> "tuple[nn.Module, SliceInput, dict[str, Any]]":
    """Build the network of a bundle without MONAI and its seconds of imports, and say what it expects."""
    import torch

    from common.networks import encoder as networks
    from dale_ct.timm_network import build_network

    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"No device '{device}' here: {str(error).splitlines()[0]}") from error
    config = read_config(folder)
    own = folder / "models" / "model.safetensors"
    release = {name: config[name] for name in config if name in RELEASE}
    facts = _resolved(config["weights"]["facts"], config)
    asked = None if weights == RANDOM else weights or own
    found = networks.find_weights(asked, bundle_weights=own, **release, facts=facts)
    axes, window = slice_axes or config["slice_axes"], hu_window or config["hu_window"]
    given = networks.slice_input(found, axes, window)
    arguments = {name: value for name, value in config["network_def"].items() if not name.startswith("_")}
    network = build_network(_resolved(arguments, config), config["seed"], found.path is None).to(where)
    stated = {name: config.get(name) for name in config["identity"]}
    stated |= {"slice_axes": given.slice_axes, "hu_window": list(given.window)}
    networks.load_encoder(network, found.path, stated)
    encoder_id = networks.encoder_id(
        sha256=found.sha256,
        seed=config["seed"],
        slice_axes=given.slice_axes,
        window=given.window,
        layer_scale_init=config["layer_scale_init"],
    )
    identity = {"encoder": config["name"], "encoder_id": encoder_id, "weights": found.name}
    return network.eval(), given, identity | {"slice_order": "feet_to_head", "token_kind": "slice"}


RELEASE = ("weights_repo", "weights_repo_type", "weights_revision", "weights_name", "weights_licence")


def _resolved(part: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Put in the knobs that a part of the config refers to, such as ``"@depth"``."""
    values = {
        name: config[value[1:]] if isinstance(value, str) and value.startswith("@") else value
        for name, value in part.items()
    }
    for name, value in values.items():
        if isinstance(value, str) and value.startswith(("$", "@")):
            raise ValueError(f"'{name}' of the bundle is an expression, {value}: run it by monai.bundle.")
    return values
