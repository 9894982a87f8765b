"""Slice encoder: tokens of a timm ViT, its weights as safetensors in timm's keys, and what they expect."""

# N images, B images of a batch, P patches of one, D embedding

import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from common.embeddings.store import check_identity
from common.networks.hub import HUB, download
from common.networks.timm_keys import TRANSFORMERS, to_timm_keys
from common.run.process import atomic_file, sha256_of
from common.transforms.hounsfield import HU_WINDOWS, HUWindow, hu_window

logger = logging.getLogger(__name__)
Output = TypeVar("Output")


class SliceInput(NamedTuple):
    """The slices that an encoder was trained on.

    Args:
        slice_axes: "yx", or "xy" for transposed slices.
        window: how their HU are normalized.
    """

    slice_axes: str
    window: HUWindow


class Weights(NamedTuple):
    """Weights, and where they come from.

    Attributes:
        path: their file; None for random initial weights.
        name: ``hub:<owner>/<name>@<commit>``, which finds the same file again, or the file's path, or
            "random".
        sha256: digest of the file, in hexadecimal; None for random weights.
        facts: what is known of them, such as HU window and slice axes.
    """

    path: Path | None
    name: str
    sha256: str | None
    facts: Mapping[str, Any]


PAPER_INPUT = SliceInput("yx", HU_WINDOWS["ct_rate"])


def cls_and_patches(encoder: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the CLS token and the patch tokens of a timm ViT after its final norm.

    Register tokens, where a model has them, are left out: they are prefix tokens that hold no place.

    Source: DALE-CT III-C; token order as in timm.

    Args:
        encoder: timm VisionTransformer.
        images: normalized slices or views.

    Shape:
        ``images (N, 1, H, W)``; CLS ``(N, D)``; patches ``(N, P, D)``, row-major, P = (H / patch) (W /
        patch).
    """
    tokens = encoder.forward_features(images)  # type: ignore[operator]
    return tokens[:, 0], tokens[:, encoder.num_prefix_tokens :]


class FittingParts:
    """Encode a batch whole, or in smaller parts from when it does not fit into the GPU's memory.

    A warning says once how large the parts are. What one item gives does not depend on the others, so that
    the parts change nothing but rounding.
    """

    def __init__(self) -> None:
        self.most = sys.maxsize

    def __call__(self, encode: Callable[[torch.Tensor], Output], batch: torch.Tensor) -> list[Output]:
        """Return what ``encode`` makes of each part; raises ValueError if one item alone does not fit."""
        size = whole = min(self.most, len(batch))
        while True:
            try:
                outputs = [encode(part) for part in batch.split(size)]
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise ValueError(
                        f"The memory of {batch.device} cannot hold one {tuple(batch.shape[1:])} at a time "
                        f"({str(error).splitlines()[0][:200]}). Free some, or compute on another --device."
                    ) from error
            else:
                if size < whole:
                    self.most = size
                    logger.warning("%d at a time do not fit into the GPU's memory: now %d.", whole, size)
                return outputs
            size //= 2
            torch.cuda.empty_cache()


class SlicesInferer:
    """Encode a batch of images: CLS, and patch tokens on demand.

    Args:
        amp_dtype: "bfloat16" for autocast, "float32" for none.
        compiled: compile the encoder once for each shape of images that all batches share.
        patch_tokens: whether to return the patch tokens as well.

    Shape:
        Input ``(B, 1, I, I)``. Output: CLS ``(B, D)`` and patches ``(B, P, D)`` or None, in the type that
        the encoder computes them in.
    """

    def __init__(self, amp_dtype: str, compiled: bool, patch_tokens: bool) -> None:
        self.amp_dtype = amp_dtype
        self.patch_tokens = patch_tokens
        self.compiled = compiled
        self._encode = torch.compile(_encode, dynamic=False) if compiled else _encode
        self._parts = FittingParts()

    def __call__(
        self, inputs: torch.Tensor, network: nn.Module, is_fixed: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode; see the class. Batches that do not share a shape are never compiled for."""
        encode = self._encode if is_fixed else _encode
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.amp_dtype == "bfloat16"):
            outputs = self._parts(lambda part: encode(network, part, self.patch_tokens), inputs)
        if len(outputs) == 1:
            return outputs[0]
        cls, patches = zip(*outputs, strict=True)
        return torch.cat(cls), torch.cat(patches) if self.patch_tokens else None


def _encode(
    network: nn.Module, images: torch.Tensor, patch_tokens: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if patch_tokens:
        return cls_and_patches(network, images)
    return network(images), None


def save_encoder(weights: Mapping[str, torch.Tensor], path: str | Path, identity: Mapping[str, Any]) -> None:
    """Write encoder weights atomically, with the facts that a loader must check.

    Args:
        weights: state dictionary of a timm VisionTransformer.
        path: ``.safetensors`` file to write.
        identity: JSON values such as name, patch size, HU window and slice axes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with atomic_file(path) as file:
        file.write(save(tensors, metadata={"identity": json.dumps(identity, sort_keys=True)}))


def find_weights(
    encoder_weights: str | Path | None,
    *,
    bundle_weights: str | Path,
    weights_repo: str | None,
    weights_repo_type: str,
    weights_revision: str,
    weights_name: str,
    weights_licence: str | None,
    facts: Mapping[str, Any],
) -> Weights:
    """Find an encoder's weights, and log in one line which they are, whose, and under which licence.

    In this order: those that are asked for; the bundle's own file, which training writes; the authors'
    release on the hub, which stays in the hub's cache. A file that states nothing of itself is the release if
    it comes from there, or was placed where the bundle's own would be.

    Args:
        encoder_weights: a file, or ``hub:<owner>/<name>[@revision]``; ``bundle_weights`` where nothing is
            asked for; None for random initial weights.
        bundle_weights: the bundle's own file.
        weights_repo: repository of the release; None for a bundle without.
        weights_repo_type: "model" or "dataset".
        weights_revision: its branch, tag or commit; a commit is the same file for ever.
        weights_name: path of the file in a repository.
        weights_licence: licence of the release.
        facts: what holds for the release, whose file does not state it.

    Raises:
        FileNotFoundError: if the file is neither on disk nor to be had from the hub.
        ValueError: if the file is damaged, or ``encoder_weights`` names nothing that could be on the hub.
    """
    if encoder_weights is None:
        return Weights(None, "random", None, {})
    asked, place = str(encoder_weights), Path(bundle_weights)
    is_own = Path(asked).absolute() == place.absolute()
    if asked.startswith(HUB):
        repository, _, revision = asked.removeprefix(HUB).partition("@")
        is_release = repository == weights_repo
        revision = revision or (weights_revision if is_release else "main")
        kind = weights_repo_type if is_release else "model"
    elif Path(asked).is_file():
        return _known(Path(asked), asked, weights_repo if is_own else None, weights_licence, facts)
    elif not is_own:
        raise FileNotFoundError(f"No encoder weights '{asked}': they are a file or {HUB}<owner>/<name>.")
    elif weights_repo is None:
        raise FileNotFoundError(f"No encoder weights '{place}'. Train the bundle, or pass --encoder_weights.")
    else:
        repository, revision, kind, is_release = weights_repo, weights_revision, weights_repo_type, True
    path = download(repository, weights_name, revision, kind, place if is_release else None)
    commit = path.parents[len(Path(weights_name).parts) - 1].name
    release = weights_repo if is_release else None
    return _known(path, f"{HUB}{repository}@{commit}", release, weights_licence, facts)


def _known(
    path: Path, name: str, release: str | None, licence: str | None, facts: Mapping[str, Any]
) -> Weights:
    """Put together what is known of a file, and log it."""
    digest, blob = sha256_of(path), path.resolve()  # the hub's cache names large files by their digest
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and blob.name != digest:
        raise ValueError(f"'{blob}' is damaged: its SHA-256 is another. Delete it, and run this again.")
    stated = stated_identity(path) if path.suffix == ".safetensors" else {}
    if stated:
        whose = f"of {stated.get('name', 'an encoder')}, trained or imported with this code"
    elif release:
        kind = f"released by {release.partition('/')[0]}" if name.startswith(HUB) else f"taken for {release}"
        whose = f"{kind}, licence {licence}"
    else:
        whose = "which state nothing of themselves"
    logger.info("Weights %s, %s, SHA-256 %s", name, whose, digest)
    return Weights(path, name, digest, stated or (facts if release else {}))


def stated_identity(path: str | Path) -> dict[str, Any]:
    """Read what a weights file says of itself; nothing for a file that was not written here.

    Args:
        path: safetensors file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No encoder weights '{path}'.")
    try:
        with safe_open(path, framework="pt") as file:
            identity: dict[str, Any] = json.loads((file.metadata() or {}).get("identity", "{}"))
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged, or no safetensors file ({error}).") from error
    return identity


def slice_input(
    weights: Weights, slice_axes: str | None = None, window: str | Sequence[float] | None = None
) -> SliceInput:
    """Find out which slices an encoder must be shown: what is known of its weights decides.

    Args:
        weights: where they come from and what is known of them; random ones get the paper's input.
        slice_axes: "yx" or "xy" for weights of which it is not known; None for what is known.
        window: likewise, see :func:`common.transforms.hounsfield.hu_window`.

    Raises:
        ValueError: if something else is known than the arguments say, or neither says it.
    """
    if weights.path is None:
        return SliceInput(slice_axes or PAPER_INPUT.slice_axes, hu_window(window or PAPER_INPUT.window))
    return agreed_input(weights.facts, weights.name, slice_axes, window)


def agreed_input(
    stated: Mapping[str, Any], source: str, slice_axes: str | None, window: str | Sequence[float] | None
) -> SliceInput:
    """Combine what is known of weights' slices with the arguments of :func:`slice_input`.

    Args:
        stated: identity of the weights, as far as known; its window is a name or four numbers.
        source: where the weights come from, for messages.
        slice_axes: as of :func:`slice_input`.
        window: as of :func:`slice_input`.

    Raises:
        ValueError: if the two differ, or neither states it.
    """
    asked = {"slice_axes": slice_axes, "hu_window": None if window is None else list(hu_window(window))}
    if "hu_window" in stated:
        stated = {**stated, "hu_window": list(hu_window(stated["hu_window"]))}
    for name, value in asked.items():
        if value is None and name not in stated:
            raise ValueError(
                f"'{source}' does not state its {name}. Pass --{name}: a wrong one gives wrong embeddings. "
                "The release that a bundle names needs none, from the hub or in the bundle's models folder."
            )
        if value is not None:
            about = {"of": "the command line", "source": f"'{source}' expects", "remedy": f"Drop --{name}."}
            check_identity({name: value}, stated, **about)
    agreed = {name: value for name, value in asked.items() if value is not None} | dict(stated)
    if agreed["slice_axes"] not in ("yx", "xy"):
        raise ValueError(f"slice_axes must be 'yx' or 'xy', got '{agreed['slice_axes']}'.")
    return SliceInput(agreed["slice_axes"], hu_window(agreed["hu_window"]))


def load_encoder(encoder: nn.Module, path: str | Path | None, identity: Mapping[str, Any]) -> nn.Module:
    """Load weights strictly into an encoder, after checking that they were trained for the same input.

    Args:
        encoder: timm VisionTransformer built from the bundle's ``network_def``.
        path: safetensors file, in timm's keys or those of transformers' Dinov2, or what LoRA learned, which
            names the file it belongs to; None keeps the random initial weights, with a warning.
        identity: facts of the bundle. Each one that the file also states must agree.

    Returns:
        The same encoder, for use in a config.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a stated fact, a key or a shape differs.
    """
    if path is None:
        logger.warning("encoder_weights is null: the encoder keeps its random initial weights.")
        return encoder
    remedy = "Use the bundle of these weights, or pass the value that they state."
    about = {"of": f"'{path}'", "source": "this bundle states", "remedy": remedy}
    tensors, stated = load_file(path), stated_identity(path)
    check_identity(stated, identity, **about)
    learned, adapter = tensors, stated.get("adapter")
    if adapter:
        from common.networks.finetuned import base_of, merged_lora  # here: few weights are LoRA's

        tensors = load_file(base_of(path, adapter))
    if TRANSFORMERS in tensors and TRANSFORMERS not in encoder.state_dict():
        tensors = to_timm_keys(tensors)
    if adapter:
        tensors = merged_lora(tensors, learned, adapter["scale"])
    load_strictly(encoder, tensors, path)
    return encoder


def load_strictly(network: nn.Module, tensors: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Load weights that must have exactly the keys and shapes of a network, and say which do not.

    Weights of the network's own types are taken as they lie, a mapped file without a copy.

    Args:
        network: network that takes the weights.
        tensors: its state dictionary.
        path: where the weights come from, for the message.

    Raises:
        ValueError: if a key or a shape differs.
    """
    own = network.state_dict()
    shared = own.keys() & tensors.keys()
    is_alike = all((own[n].dtype, own[n].device) == (tensors[n].dtype, tensors[n].device) for n in shared)
    try:
        network.load_state_dict(tensors, strict=True, assign=is_alike)
    except RuntimeError as error:  # names every key
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"Weights '{path}' do not fit the network. {reason}") from error


def encoder_id(
    sha256: str | None,
    seed: int,
    slice_axes: str = PAPER_INPUT.slice_axes,
    window: HUWindow = PAPER_INPUT.window,
    layer_scale_init: float | None = None,
) -> str:
    """Name what made an embedding, so that embeddings of two encoders are never mixed.

    A file in plain timm keys does not say how its slices lie or are windowed: the same weights on slices of
    another kind are another encoder.

    Args:
        sha256: digest of the weights file; None for random initial weights.
        seed: seed of the random initial weights.
        slice_axes: how slices are shown to it, "yx" or "xy".
        window: how their HU are normalized.
        layer_scale_init: LayerScale of random initial weights; None for networks without the knob.

    Returns:
        ``sha256:`` and the first 16 hexadecimal digits of the file's digest, or ``random:<seed>``, with
        ``:layer_scale=<value>`` where given; then ``:xy`` where slices are transposed, and the window's
        numbers where it is not CT-RATE's.
    """
    shown = "" if slice_axes == PAPER_INPUT.slice_axes else f":{slice_axes}"
    shown += "" if window == PAPER_INPUT.window else ":" + ",".join(map(str, window))
    if sha256 is None:
        scale = "" if layer_scale_init is None else f":layer_scale={layer_scale_init:g}"
        return f"random:{seed}{scale}{shown}"
    return f"sha256:{sha256[:16]}{shown}"
