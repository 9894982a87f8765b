"""A slice encoder and a MIL probe as one network that learns from whole volumes."""

# S slices of a volume, I side of an image, D embedding, C classes

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.networks.hub import HUB, download
from common.networks.mil_probe import MILProbe, initial_probe
from common.run.process import sha256_of

MODES = ("probe", "lora", "last_blocks", "full")


class FineTunedProbe(nn.Module):
    """Encode the slices of one volume, pool their CLS tokens and read the classes.

    Slices go through the encoder in chunks of equal size, which the backward pass computes again one by one,
    but for the last, with which it begins: memory depends on the chunk, not on the volume, for at most one
    forward pass more. Value and gradient are those of all slices at once.

    Source: DALE-CT IV-B for the probe; end-to-end training as in the authors' release (their LoRA script).

    Args:
        encoder: timm VisionTransformer, see :func:`let_learn`.
        probe: pooler and classifier.
        slices_per_chunk: slices that go through the encoder at once, at most.
        amp_dtype: "bfloat16" for autocast of the encoder, "float32" for none.

    Shape:
        ``images (S, 1, I, I)``. Output: logits ``(C,)``.

    Raises:
        ValueError: if a chunk holds no slice, or ``amp_dtype`` is neither of the two.
    """

    def __init__(self, encoder: nn.Module, probe: MILProbe, slices_per_chunk: int, amp_dtype: str) -> None:
        super().__init__()
        if slices_per_chunk < 1:
            raise ValueError(f"slices_per_chunk must be at least 1, got {slices_per_chunk}.")
        if amp_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"amp_dtype must be 'bfloat16' or 'float32', got {amp_dtype!r}.")
        self.encoder, self.probe = encoder, probe
        self.slices_per_chunk, self.amp_dtype = slices_per_chunk, amp_dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Classify one volume; see the class."""
        *chunks, last = images.tensor_split(-(-len(images) // self.slices_per_chunk))
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.encoder.parameters())
        if learns:
            tokens = [checkpoint(self._encode, chunk, use_reentrant=False) for chunk in chunks]
        else:
            tokens = [self._encode(chunk) for chunk in chunks]
        bag = torch.cat([*tokens, self._encode(last)])[None]
        logits: torch.Tensor = self.probe(bag, bag.new_ones(bag.shape[:2], dtype=torch.bool))
        return logits[0]

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        enabled = self.amp_dtype == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=enabled):
            cls: torch.Tensor = self.encoder(images)
        return cls


def finetuned_probe(
    encoder: nn.Module,
    *,
    mode: str,
    num_blocks: int,
    lora: Mapping[str, Any],
    pooler: str,
    num_classes: int,
    seed: int,
    slices_per_chunk: int,
    amp_dtype: str,
) -> FineTunedProbe:
    """Put an encoder and a new probe together, and say what of the encoder learns.

    Args:
        encoder: timm VisionTransformer with its weights; it is changed.
        mode: see :func:`let_learn`.
        num_blocks: see :func:`let_learn`.
        lora: see :func:`let_learn`.
        pooler: name of ``common.networks.poolers.POOLERS``.
        num_classes: C.
        seed: seed of the initial weights of probe and LoRA; a probe of the grid with this seed begins alike.
        slices_per_chunk: see :class:`FineTunedProbe`.
        amp_dtype: see :class:`FineTunedProbe`.

    Raises:
        ValueError: if the pooler is unknown, or as the two.
    """
    width: int = encoder.embed_dim  # type: ignore[assignment]
    probe = initial_probe(pooler, width, num_classes, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        let_learn(encoder, mode, num_blocks, lora)
    return FineTunedProbe(encoder, probe, slices_per_chunk, amp_dtype)


def let_learn(encoder: nn.Module, mode: str, num_blocks: int, lora: Mapping[str, Any]) -> None:
    """Freeze an encoder but for what a mode lets learn.

    Args:
        encoder: timm VisionTransformer; ``lora`` puts adapters into it.
        mode: "probe" for nothing, "lora" for low-rank updates, "last_blocks" for the last ``num_blocks``
            blocks and the final norm, "full" for everything.
        num_blocks: blocks of "last_blocks".
        lora: arguments of ``peft.LoraConfig``, such as r, lora_alpha, lora_dropout and target_modules.

    Raises:
        ValueError: if the mode is unknown, or the encoder does not have so many blocks.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got '{mode}'.")
    encoder.requires_grad_(mode == "full")
    if mode == "lora":
        from peft import LoraConfig, inject_adapter_in_model  # here: takes seconds, and other modes need none

        inject_adapter_in_model(LoraConfig(**lora), encoder)
    if mode == "last_blocks":
        blocks: nn.Sequential = encoder.blocks  # type: ignore[assignment]
        if not 1 <= num_blocks <= len(blocks):
            raise ValueError(f"num_blocks must be between 1 and {len(blocks)}, got {num_blocks}.")
        for part in (*blocks[-num_blocks:], encoder.norm):
            part.requires_grad_(True)


def finetuning_optimizer(
    network: nn.Module, *, mode: str, encoder_lr: float, probe_lr: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """Build the optimizer of a mode: SGD for the probe alone, as in the grid of MIL probes, AdamW otherwise.

    Source: DALE-CT IV-B (SGD); the authors' LoRA script (AdamW, a learning rate each for LoRA and head).

    Args:
        network: ``FineTunedProbe``, distributed or not.
        mode: see :func:`let_learn`.
        encoder_lr: peak learning rate of what learns in the encoder.
        probe_lr: peak learning rate of the probe.
        weight_decay: of AdamW.
        momentum: of SGD.
    """
    learning = [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]
    is_of_probe = [name.removeprefix("module.").startswith("probe.") for name, _ in learning]
    of_probe = [weight for (_, weight), is_its in zip(learning, is_of_probe, strict=True) if is_its]
    if mode == "probe":
        return torch.optim.SGD(of_probe, lr=probe_lr, momentum=momentum)
    of_encoder = [weight for (_, weight), is_its in zip(learning, is_of_probe, strict=True) if not is_its]
    groups = [{"params": of_encoder, "lr": encoder_lr}, {"params": of_probe, "lr": probe_lr}]
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def base_of(path: str | Path, adapter: Mapping[str, str]) -> Path:
    """Find the weights that an adapter belongs to: where they lay when it was trained, or beside it.

    Args:
        path: the adapter's file.
        adapter: what it states: ``base``, a path or ``hub:<owner>/<name>@<commit>``, then with ``file`` and
            ``repo_type``, and ``base_sha256``.

    Raises:
        FileNotFoundError: if they are in neither place.
        ValueError: if they are not those that it was trained on.
    """
    base = adapter["base"]
    if base.startswith(HUB):
        repository, _, commit = base.removeprefix(HUB).partition("@")
        found = download(repository, adapter["file"], commit, adapter["repo_type"])
    else:
        places = (Path(base), Path(path).with_name(Path(base).name))
        found = next((place for place in places if place.is_file()), places[0])
    if not found.is_file():
        raise FileNotFoundError(f"No weights '{base}', which '{path}' changes. Put them there or beside it.")
    if sha256_of(found) != adapter["base_sha256"]:
        raise ValueError(
            f"'{path}' changes weights of SHA-256 {adapter['base_sha256']}, but '{found}' holds others. "
            "Put those that it was trained on there."
        )
    return found


def merged_lora(
    base: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor], scale: float
) -> dict[str, torch.Tensor]:
    """Add low-rank updates to the weights they were trained beside: W + scale B A.

    Source: LoRA, arXiv:2106.09685, equation 3.

    Args:
        base: weights of an encoder, in timm's keys.
        adapter: for each changed layer ``<layer>.lora_A.weight (r, in)`` and ``<layer>.lora_B.weight (out,
            r)``.
        scale: alpha / r.

    Raises:
        ValueError: if the base lacks a layer, or one has another shape.
    """
    merged = dict(base)
    for name, down in adapter.items():
        layer, found, _ = name.partition(".lora_A.")
        if not found:
            continue
        up, weight = adapter[f"{layer}.lora_B.weight"], merged.get(f"{layer}.weight")
        if weight is None or weight.shape != (len(up), down.shape[1]):
            there = "no such layer" if weight is None else f"{tuple(weight.shape)}"
            expected = (len(up), down.shape[1])
            raise ValueError(f"The adapter changes '{layer}' of shape {expected}, the encoder has {there}.")
        merged[f"{layer}.weight"] = (weight.double() + scale * up.double() @ down.double()).to(weight.dtype)
    return merged
