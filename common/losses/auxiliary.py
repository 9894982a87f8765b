"""Auxiliary loss: CLS and patch tokens predict which organs and findings they cover."""

# B samples on this rank, V views of a group, P patches, C classes

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

from common.run.distributed import global_mean_weights
from common.transforms.soft_labels import REX_TARGETS

LogitTree = Mapping[str, Mapping[str, torch.Tensor]]

TERMS = ("ts_cls", "ts_patch", "rex_cls", "rex_patch")


class AuxiliaryBCELoss(nn.Module):
    """Binary cross-entropy of soft labels of organs and findings, for CLS and patch tokens.

    Each term is the mean over classes, views, patches and the annotated samples of the global batch, averaged
    over the groups of views (global, local); the loss is the mean of the terms. On several ranks the mean of
    the ranks' values is the value of the global batch, also when some rank holds no annotated sample. A term
    without any annotated sample is 0 and has a gradient of 0. Computed in float32 unless given float64.

    Source: DALE-CT III-C2, Eq. 2.

    Args:
        ts_pos_weight: weight of each organ's positive part. ``common/labels/totalsegmentator.csv``.
        rex_pos_weight: weight of each finding's positive part; None where no term needs it.
            ``common/labels/rexgroundingct.csv``.
        auxiliary_terms: which of ``TERMS`` to average. DALE-CT-2S: all four; DALE-CT-1S: ``("ts_cls",)``.
        aux_weight: lambda_aux of Eq. 3, for the trainer. Released DALE-CT configurations: 0.1.
        rex_targets: "presence" of a finding in a crop or patch, or the "fraction" it covers (released code);
            for the trainer.

    Shape:
        logits and targets: for each group of views a dictionary with, for each term, ``(B, V, C)`` (cls) or
        ``(B, V, P, C)`` (patch); targets in [0, 1]. has_ts and has_rex: ``(B,)`` bool.
        Output: dictionary of the scalar ``loss`` (without ``aux_weight``) and a scalar for each term.

    Raises:
        ValueError: if terms, weights or targets make no sense; in a call, if shapes do not agree.
        KeyError: in a call, if a group or term is missing.
    """

    def __init__(
        self,
        *,
        ts_pos_weight: Sequence[float] | torch.Tensor,
        rex_pos_weight: Sequence[float] | torch.Tensor | None,
        auxiliary_terms: Sequence[str],
        aux_weight: float,
        rex_targets: str,
    ) -> None:
        super().__init__()
        self.terms = tuple(auxiliary_terms)
        if not self.terms or not set(self.terms) <= set(TERMS) or len(set(self.terms)) < len(self.terms):
            raise ValueError(f"auxiliary_terms must be different ones of {TERMS}, got {self.terms}.")
        if rex_targets not in REX_TARGETS:
            raise ValueError(f"rex_targets must be one of {list(REX_TARGETS)}, got {rex_targets!r}.")
        self.aux_weight = aux_weight
        self.rex_targets = rex_targets
        for source, pos_weight in {"ts": ts_pos_weight, "rex": rex_pos_weight}.items():
            if source in map(_source, self.terms):
                self.register_buffer(f"{source}_pos_weight", _checked_pos_weight(source, pos_weight))

    def forward(
        self,
        logits: LogitTree,
        targets: LogitTree,
        has_ts: torch.Tensor,
        has_rex: torch.Tensor,
        part: slice = slice(None),
    ) -> dict[str, torch.Tensor]:
        """Return the loss and its terms.

        Args:
            logits: by group of views ("global", "local") and term.
            targets: share or presence of each class, in the same structure; other terms are ignored.
            has_ts: whether the sample's volume has an organ map.
            has_rex: whether the sample's volume was annotated for findings, even if it shows none.
            part: samples of the batch that logits and targets are of; the flags are always those of the whole
                batch. The values of parts that make up the batch add up to its value.
        """
        if has_ts.dim() != 1 or has_ts.shape != has_rex.shape:
            shapes = f"{tuple(has_ts.shape)} and {tuple(has_rex.shape)}"
            raise ValueError(f"has_ts and has_rex must have one shape (B,), got {shapes}.")
        by_sample = []
        for term in self.terms:
            groups = [self._by_sample(term, group, logits, targets, len(has_ts[part])) for group in logits]
            by_sample.append(torch.stack(groups).mean(0))
        values = torch.stack(by_sample)
        annotated = {"ts": has_ts, "rex": has_rex}
        included = torch.stack([annotated[_source(term)] for term in self.terms]).to(values)
        terms = (global_mean_weights(included)[:, part] * values).sum(1)
        return {"loss": terms.mean(), **dict(zip(self.terms, terms, strict=True))}

    def _by_sample(
        self, term: str, group: str, logits: LogitTree, targets: LogitTree, num_samples: int
    ) -> torch.Tensor:
        """Return the cross-entropy of each sample, averaged over its views, patches and classes."""
        predicted, target = logits[group][term], targets[group][term]
        pos_weight = self.get_buffer(f"{_source(term)}_pos_weight")
        shape = tuple(predicted.shape)
        if shape[0] != num_samples or shape[-1] != len(pos_weight):
            rule = f"logits must have {num_samples} samples and {len(pos_weight)} classes"
            raise ValueError(f"{rule}, got shape {shape} for '{term}' of the {group} views.")
        if target.shape != predicted.shape:
            rule = f"targets must have the shape of the logits {shape}"
            raise ValueError(f"{rule}, got {tuple(target.shape)} for '{term}' of the {group} views.")
        dtype = torch.promote_types(predicted.dtype, torch.float32)
        losses = functional.binary_cross_entropy_with_logits(
            predicted.to(dtype), target.to(dtype), reduction="none", pos_weight=pos_weight.to(dtype)
        )
        return losses.flatten(1).mean(1)


def _checked_pos_weight(source: str, pos_weight: Sequence[float] | torch.Tensor | None) -> torch.Tensor:
    if pos_weight is None:
        raise ValueError(f"{source}_pos_weight must be given for terms of '{source}', got None.")
    tensor = torch.as_tensor(pos_weight, dtype=torch.float32).detach().clone()
    if tensor.dim() != 1 or len(tensor) == 0 or not bool((tensor > 0).all() and tensor.isfinite().all()):
        raise ValueError(f"{source}_pos_weight must be a list of positive numbers, got {pos_weight}.")
    return tensor


def _source(term: str) -> str:
    return term.split("_")[0]
