"""MIL probes: a pooler and a linear classifier on frozen embeddings, one alone or a grid of them at once."""

# B bags, S slices (padded), D embedding, C classes, L learning rates, K poolers, F fixed poolers of these

import copy
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from safetensors.torch import load_file, save
from torch import nn

from common.networks.poolers import LearnedQueryAttentionPool, build_pooler, pad_bags, segment_softmax
from common.run.process import atomic_file


class Standardizer(nn.Module):
    """Gives every dimension of tokens mean 0 and standard deviation 1 over the training tokens.

    Measured in one pass, in float64, so that bags may be larger than memory. A dimension that is constant in
    training says nothing: its ``std`` is infinite, and it becomes 0.

    Args:
        chunks: training tokens ``(n, D)``, some at a time; nothing to load the statistics instead.
        dim: D.

    Example:
        >>> Standardizer([torch.tensor([[1.0, 7.0], [5.0, 7.0]])], dim=2)(torch.tensor([[7.0, 8.0]]))
        tensor([[2., 0.]])
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, chunks: Iterable[torch.Tensor], dim: int) -> None:
        super().__init__()
        total, square = torch.zeros(2, dim, dtype=torch.float64)
        first, count = total, 0
        for chunk in filter(len, chunks):
            # from the first token, so that constants give zeros and no large numbers cancel
            first = first if count else chunk[0].double()
            tokens = chunk.double() - first
            total, square, count = total + tokens.sum(0), square + tokens.square().sum(0), count + len(tokens)
        mean = total / max(count, 1)
        std = (square / max(count, 1) - mean.square()).clamp(min=0).sqrt()
        self.register_buffer("mean", (first + mean).float())
        self.register_buffer("std", std.where(std > 0, math.inf).float())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Standardize tokens ``(..., D)``."""
        return (tokens - self.mean) / self.std

    def fold(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight ``(..., C, D)`` and bias ``(..., C)`` that read from tokens as they are."""
        folded = weight.double() / self.std
        return folded.to(weight), (bias - folded @ self.mean.double()).to(bias)


class MILProbe(nn.Module):
    """Pool the slices of each volume, standardized or as they are, and read the classes linearly from them.

    Source: DALE-CT IV-B, without ``standardizer``.

    Shape:
        ``bags (B, S, D)`` of any floating type, ``mask (B, S)`` bool. Output: logits ``(B, C)``.

    Example:
        >>> probe = MILProbe(build_pooler("max", dim=4), dim=4, num_classes=3)
        >>> probe(torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self, pooler: nn.Module, dim: int, num_classes: int, standardizer: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.pooler = pooler
        self.classifier = nn.Linear(dim, num_classes)
        self.standardizer = standardizer or nn.Identity()

    def forward(self, bags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Classify; see the class."""
        return self.classifier(self.pooler(self.standardizer(bags.to(self.classifier.weight.dtype)), mask))

    def slice_weights(self, bag: torch.Tensor) -> torch.Tensor:
        """Return the share ``(S,)`` of each slice of a bag ``(S, D)`` in what is pooled."""
        pooler: Any = self.pooler
        weights: torch.Tensor = pooler.slice_weights(self.standardizer(bag))
        return weights


class ProbeGrid(nn.Module):
    """One MIL probe for each pair of a learning rate and a pooler, trained side by side on the same batches.

    The probes share no parameter: from the sum of their losses each gets the gradient of its loss, and takes
    the course it would take alone. What they share is the reading of the data. Poolers without parameters are
    applied once per volume (:meth:`fixed_features`); learned queries of all learning rates meet the packed
    slices in one product, without padding; any other pooler with weights has a copy per learning rate.

    The initial weights of a probe depend on the seed and its pooler only, so that learning rates compare.

    Source: DALE-CT IV-B: 4 learning rates x 5 poolers.

    Args:
        poolers: names of ``common.networks.poolers.POOLERS``.
        learning_rates: peak learning rates; one parameter group for each.
        dim: D, width of the embeddings.
        num_classes: C.
        seed: seed of the initial weights.
        standardizer: applied to all tokens; None for tokens as they are, as in the paper.
        prior_logits: ``(C,)``; classifiers start at this constant prediction, their weights at 0. None for
            PyTorch's random start, as in the paper.

    Shape:
        ``fixed (B, F, D)`` rows of :meth:`fixed_features`, ``bags`` B tensors ``(S, D)``.
        Output: logits ``(L * K, B, C)``, probe ``l * K + k`` having learning rate l and pooler k.

    Raises:
        ValueError: if a pooler is unknown, or a pooler or a learning rate is given twice or not at all; in
            use, if a bag is empty.
    """

    query_counts: torch.Tensor

    def __init__(
        self,
        *,
        poolers: Sequence[str],
        learning_rates: Sequence[float],
        dim: int,
        num_classes: int,
        seed: int,
        standardizer: nn.Module | None = None,
        prior_logits: ArrayLike | None = None,
    ) -> None:
        super().__init__()
        for name, values in (("poolers", poolers), ("learning_rates", learning_rates)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be given, each once, got {list(values)}.")
        self.dim, self.num_classes, self.prior_logits = dim, num_classes, prior_logits
        self.standardizer = standardizer or nn.Identity()
        self.names = [(pooler, learning_rate) for learning_rate in learning_rates for pooler in poolers]
        self.learning_rates = list(learning_rates)
        templates = [initial_probe(name, dim, num_classes, seed) for name in poolers]
        self.kinds = [_kind(template.pooler) for template in templates]
        by_kind: dict[str, list[Any]] = {"fixed": [], "queries": [], "trained": []}
        for kind, template in zip(self.kinds, templates, strict=True):
            by_kind[kind].append(template.pooler)
        self.fixed_poolers = nn.ModuleList(by_kind["fixed"])
        self.num_queries = [len(pooler.queries) for pooler in by_kind["queries"]]
        self.trained_poolers = nn.ModuleList(
            copy.deepcopy(pooler) for _ in learning_rates for pooler in by_kind["trained"]
        )
        weight = torch.stack([template.classifier.weight.detach() for template in templates])
        bias = torch.stack([template.classifier.bias.detach() for template in templates])
        if prior_logits is not None:
            weight, bias = torch.zeros_like(weight), torch.tensor(prior_logits).expand_as(bias).to(bias)
        self.weights = nn.ParameterList(weight.clone() for _ in learning_rates)
        self.biases = nn.ParameterList(bias.clone() for _ in learning_rates)
        queries = [pooler.queries.detach() for pooler in by_kind["queries"]]
        self.queries = nn.ParameterList(torch.cat(queries) for _ in learning_rates if queries)
        counts = torch.tensor(self.num_queries, dtype=torch.long)
        self.register_buffer("query_counts", counts, persistent=False)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return one optimizer group for each learning rate."""
        lists = [parameters for parameters in (self.weights, self.biases, self.queries) if len(parameters)]
        num_trained, groups = self.kinds.count("trained"), []
        for i, learning_rate in enumerate(self.learning_rates):
            poolers = self.trained_poolers[i * num_trained : (i + 1) * num_trained]
            parameters = [*(of_rates[i] for of_rates in lists), *poolers.parameters()]
            groups.append({"params": parameters, "lr": learning_rate})
        return groups

    @torch.no_grad()
    def fixed_features(self, bags: Sequence[torch.Tensor]) -> torch.Tensor:
        """Apply the poolers that have no parameters to bags ``(S, D)``; returns ``(B, F, D)``."""
        weight = self.weights[0]
        features = weight.new_empty(len(bags), len(self.fixed_poolers), self.dim)
        first = 0
        for group in _read_together(bags, weight.device):
            padded, mask = pad_bags(group)
            padded = self.standardizer(padded.to(weight.dtype))
            for index, pooler in enumerate(self.fixed_poolers):
                features[first : first + len(group), index] = pooler(padded, mask)
            first += len(group)
        return features

    def forward(self, fixed: torch.Tensor, bags: Sequence[torch.Tensor]) -> torch.Tensor:
        """Classify with every probe; see the class."""
        empty = [place for place, bag in enumerate(bags) if not len(bag)]
        if empty:
            raise ValueError(f"bags must hold at least one slice, got 0 for bag {empty[0]} of the batch.")
        columns = {
            "fixed": iter(fixed.unbind(1)),
            "queries": iter(self._query_features(bags) if self.num_queries else ()),
            "trained": self._trained_features(bags),
        }
        num_rates = len(self.learning_rates)
        pooled = torch.stack([next(columns[kind]).expand(num_rates, -1, -1) for kind in self.kinds], dim=1)
        weight, bias = torch.stack(list(self.weights)), torch.stack(list(self.biases))
        return (pooled @ weight.mT + bias[:, :, None]).flatten(0, 1)

    def probe(self, index: int) -> MILProbe:
        """Return a copy of one of ``names`` that works alone, in evaluation mode."""
        rate, place = divmod(index, len(self.kinds))
        kind, nth = self.kinds[place], self.kinds[:place].count(self.kinds[place])
        pooler: Any
        if kind == "queries":
            pooler = build_pooler(self.names[index][0], self.dim)
        elif kind == "fixed":
            pooler = copy.deepcopy(self.fixed_poolers[nth])
        else:
            pooler = copy.deepcopy(self.trained_poolers[rate * self.kinds.count(kind) + nth])
        standardizer = copy.deepcopy(self.standardizer)
        probe = MILProbe(pooler, self.dim, self.num_classes, standardizer).to(self.weights[0])
        with torch.no_grad():
            probe.classifier.weight.copy_(self.weights[rate][place])
            probe.classifier.bias.copy_(self.biases[rate][place])
            if kind == "queries":
                pooler.queries.copy_(self.queries[rate].split(self.num_queries)[nth])
        return probe.eval()

    def _trained_features(self, bags: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Output of each pooler with other weights for every learning rate and bag, ``(L, B, D)`` each."""
        num_trained, weight = self.kinds.count("trained"), self.weights[0]
        if not num_trained:
            return
        groups = [pad_bags(group) for group in _read_together(bags, weight.device)]
        groups = [(self.standardizer(padded.to(weight.dtype)), mask) for padded, mask in groups]
        for nth in range(num_trained):
            copies = self.trained_poolers[nth::num_trained]
            yield torch.stack([torch.cat([pooler(*group) for group in groups]) for pooler in copies])

    def _query_features(self, bags: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Attention output of each pooler of queries for every learning rate and bag, ``(L, B, D)`` each."""
        queries = torch.stack(list(self.queries)).flatten(0, 1) / math.sqrt(self.dim)
        groups = _read_together(bags, queries.device)
        outputs = torch.cat([self._attend(queries, group) for group in groups], dim=1)
        means = outputs.unflatten(0, (len(self.learning_rates), -1)) / self.query_counts[:, None, None]
        return means.unbind(1)

    def _attend(self, queries: torch.Tensor, bags: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sum over each learned pooler's queries of their attention output, ``(L * poolers, B, D)``."""
        lengths = [len(bag) for bag in bags]
        slices = self.standardizer((bags[0] if len(bags) == 1 else torch.cat(list(bags))).to(queries.dtype))
        attention = segment_softmax(queries @ slices.mT, lengths)
        # the sum of a pooler's outputs over its queries is the output of its summed attention
        of_poolers = attention.unflatten(0, (len(self.learning_rates), -1)).split(self.num_queries, dim=1)
        summed = torch.stack([of_one.sum(1) for of_one in of_poolers], dim=1).flatten(0, 1)
        if len(bags) == 1:
            return (summed @ slices)[:, None]
        places = torch.arange(len(bags))
        owner = torch.repeat_interleave(places, torch.tensor(lengths), output_size=sum(lengths))
        belongs = (owner == places[:, None]).to(slices.device, non_blocking=True)
        # one block for each bag: what another bag's slices would add is an exact 0
        blocks = torch.where(belongs, summed[:, None], 0)
        return (blocks.flatten(0, 1) @ slices).unflatten(0, (-1, len(bags)))


def _read_together(bags: Sequence[torch.Tensor], device: torch.device) -> list[list[torch.Tensor]]:
    """Group bags for one product each, as suits the device."""
    # a CPU keeps one bag in its cache between two products (1.4 times as fast as all at once, measured);
    # a GPU is fastest with one large product
    return [list(bags)] if device.type == "cuda" else [[bag] for bag in bags]


def probe_name(pooler: str, learning_rate: float) -> str:
    """Name a probe of the grid, as metrics and tables do: "max/lr_0.1"."""
    return f"{pooler}/lr_{learning_rate:g}"


def save_probe(folder: str | Path, probe: nn.Module, card: Mapping[str, Any], name: str = "probe") -> None:
    """Write a probe as ``<name>.safetensors`` and ``<name>.json``, each appearing only when whole.

    The card is what the weights only make sense with, JSON values; NaN becomes null. :func:`load_probe` needs
    ``pooler``, ``dim`` and ``class_names``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in probe.state_dict().items()}
    with atomic_file(folder / f"{name}.safetensors") as file:
        file.write(save(tensors))
    with atomic_file(folder / f"{name}.json", "w", encoding="utf-8") as file:
        file.write(json.dumps(without_nan(card), indent=2, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:  # noqa: ANN401 (any of JSON's)
    """Return JSON values with null where they hold NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def read_probe(folder: str | Path, name: str = "probe") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the weights and the card that :func:`save_probe` wrote.

    Raises:
        FileNotFoundError: if one of the two files does not exist.
    """
    weights, card = (Path(folder) / f"{name}{suffix}" for suffix in (".safetensors", ".json"))
    for path in (weights, card):
        if not path.is_file():
            raise FileNotFoundError(f"No '{path.name}' in '{folder}'. Run an evaluation bundle first.")
    return load_file(weights), json.loads(card.read_text())


def load_probe(folder: str | Path) -> tuple[MILProbe, dict[str, Any]]:
    """Load a probe of :func:`save_probe` in evaluation mode, and its card: class names, thresholds, encoder.

    Raises:
        FileNotFoundError: if one of the two files does not exist.
    """
    weights, card = read_probe(folder)
    dim, is_standardized = card["dim"], "standardizer.mean" in weights
    standardizer = Standardizer([], dim) if is_standardized else None
    probe = MILProbe(build_pooler(card["pooler"], dim), dim, len(card["class_names"]), standardizer)
    probe.load_state_dict(weights)
    return probe.eval(), card


def _kind(pooler: nn.Module) -> str:
    """Tell how the grid applies a pooler: once per volume, by packed queries, or a copy per learning rate."""
    if type(pooler) is LearnedQueryAttentionPool:  # a subclass may pool otherwise
        return "queries"
    return "trained" if any(True for _ in pooler.parameters()) else "fixed"


def initial_probe(name: str, dim: int, num_classes: int, seed: int) -> MILProbe:
    """Return a probe with the initial weights that a seed gives to this pooler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MILProbe(build_pooler(name, dim), dim, num_classes)
