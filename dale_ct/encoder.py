"""The bundled encoders, and one with its weights, ready to use."""

# Z slices, H x W of a slice, I side of an image, D embedding, G0 G1 G2 grid of a volume's tokens

import json
from collections.abc import Callable, Mapping, Sequence
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

    from common.embeddings.encoder_bundle import EncoderBundle
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
    return {name: _facts(BUNDLES / name) for name in _bundles("inference.json")}


def bundle_folder(bundle: str | Path, config: str = "inference.json") -> Path:
    """Find the bundle of an encoder, or another that has some config.

    Args:
        bundle: name of a bundled one, or its folder.
        config: what it must have in ``configs``, such as "train.json".

    Raises:
        ValueError: if there is none; names the nearest.
    """
    for folder in (BUNDLES / bundle, Path(bundle)):
        if _is_of_kind(folder / "configs" / config):
            return folder
    known = _bundles(config)
    nearest = get_close_matches(str(bundle), known, n=1)
    hint = f"Did you mean '{nearest[0]}'?" if nearest else f"Known: {', '.join(known)}."
    raise ValueError(f"No bundle '{bundle}' with a {config}. {hint} A bundle's folder works too.")


def _bundles(config: str) -> list[str]:
    return sorted(path.parents[1].name for path in BUNDLES.glob(f"*/configs/{config}") if _is_of_kind(path))


def _is_of_kind(path: Path) -> bool:
    """Whether a config is there, and one of an encoder if it is an inference.json: evaluations' predict."""
    return path.is_file() and (
        path.name != "inference.json" or "weights_name" in read_config(path.parents[1])
    )


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
        import torch

        from common.embeddings.ct_batches import images_of
        from common.transforms.slice_strategies import body_box

        slices = torch.from_numpy(_whole_squares(hu))
        region = self.strategy.region(slices, body_box(slices) if self.strategy.is_cropped else None)
        return images_of(region, self.strategy, self.given.window, self.given.slice_axes, self.device)


@dataclass(frozen=True)
class VolumeEncoder:
    """An encoder of whole volumes, its weights loaded.

    Args:
        network: as of :class:`SliceEncoder`, and so the last three.
        inferer: calls it on one volume ``(1, 1, ...)``: a grid of tokens ``(1, D, G0, G1, G2)``, and None.
        transform: MONAI's transforms of the bundle.
    """

    network: "nn.Module"
    inferer: "Callable[[torch.Tensor, nn.Module], tuple[torch.Tensor, None]]"
    transform: "Callable[[dict[str, Any]], dict[str, Any]]"
    identity: dict[str, Any]
    config: dict[str, Any]
    device: "torch.device"

    def image(self, hu: "np.ndarray | torch.Tensor", spacing_mm: Sequence[float]) -> "torch.Tensor":
        """Turn slices, as for :meth:`SliceEncoder.images`, ``spacing_mm`` (x, y, z) apart, into a volume."""
        from common.embeddings.ct_batches import lps_volume
        from common.embeddings.work import CTSlices

        x, y, z = map(float, spacing_mm)
        volume = lps_volume(CTSlices(_whole_squares(hu), (x, y, z)))
        return self.transform({"image": volume})["image"][None].to(self.device)


def _whole_squares(hu: "np.ndarray | torch.Tensor") -> "np.ndarray":
    """Slices as inference reads them from a file: whole numbers of a CT's range, padded to squares."""
    import numpy as np
    import torch

    from common.ct.geometry import STORED_HU_RANGE
    from common.transforms.slice_strategies import pad_to_square

    values = hu.cpu().numpy() if isinstance(hu, torch.Tensor) else np.asarray(hu)
    return pad_to_square(np.rint(values).clip(*STORED_HU_RANGE).astype(np.int16), STORED_HU_RANGE[0])


def load_encoder(
    encoder: str = "dale_ct_2s",
    weights: str | None = None,
    device: str | None = None,
    strategy: str | None = None,
    *,
    slice_axes: str | None = None,
    hu_window: "str | Sequence[float] | None" = None,
    patch_tokens: bool = False,
) -> SliceEncoder | VolumeEncoder:
    """Load an encoder for your own loop; a second call for the same network returns at once.

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
        ValueError: if there is no such encoder, device or strategy, one of the last four is given for an
            encoder of volumes, or weights do not fit.
        FileNotFoundError: if the weights are neither on disk nor on the hub.
    """
    import torch

    from common.transforms.slice_strategies import slice_strategies

    folder = bundle_folder(encoder).resolve()
    config = read_config(folder)
    window = hu_window if hu_window is None or isinstance(hu_window, str) else tuple(hu_window)
    knobs: dict[str, Any] = {"slice_axes": slice_axes, "hu_window": window}
    for option, value in {**knobs, "strategy": strategy, "patch_tokens": patch_tokens or None}.items():
        if value is not None and "strategies" not in config:
            raise ValueError(f"{option} must be left out for '{encoder}' (volumes), got {value!r}.")
    file = folder / "models" / Path(config["weights_name"]).name if weights is None else Path(weights)
    inputs = (folder / "configs" / "inference.json", file)
    changed = tuple(one.stat().st_mtime_ns if one.is_file() else 0 for one in inputs)
    if weights is not None:
        knobs["encoder_weights"] = None if weights == RANDOM else weights
    with _one_at_a_time:
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        bundle = _opened(folder, where, tuple(knobs.items()), changed)
    network, identity, place = (bundle[part] for part in ("network", "embedding_identity", "device"))
    if "strategies" not in config:
        return VolumeEncoder(network, bundle["inferer"], bundle["preprocessing"], identity, config, place)
    names = [strategy or bundle["strategies"][0]]
    (chosen,) = slice_strategies(names, bundle.patch_size_px, patch_tokens)
    return SliceEncoder(network, bundle["input"], chosen, identity, config, place)


_one_at_a_time = Lock()


@lru_cache(maxsize=2)
def _opened(
    folder: Path,
    device: str,
    knobs: tuple[tuple[str, Any], ...],
    changed: tuple[int, ...],  # when the files that are read here were written: others are another encoder
) -> "EncoderBundle":
    """Open a bundle and build its network; without MONAI and its seconds of imports where it takes slices."""
    import torch

    from common.embeddings.encoder_bundle import open_encoder_bundle

    try:
        where = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"No device '{device}' here: {str(error).splitlines()[0]}") from error
    config = read_config(folder)
    network: dict[str, Any] = config["network_def"]
    is_plain = "strategies" in config and "." in network["_target_"] and "::" not in json.dumps(config)
    given = {name: value for name, value in knobs if value is not None or name == "encoder_weights"}
    given |= {"device": where} | ({"compiled": False} if "strategies" in config else {})
    if is_plain and network["_target_"] == "timm.create_model":  # the same network, built sooner
        arguments = {name: value for name, value in network.items() if not name.startswith("_")}
        network = {"_target_": "dale_ct.timm_network.build_network", "arguments": arguments}
        given["network_def"] = network | {"seed": "@seed", "is_drawn": "$@weights.path is None"}
    bundle = open_encoder_bundle(folder, knobs=given, with_monai=not is_plain)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        _ = bundle.network
    return bundle
