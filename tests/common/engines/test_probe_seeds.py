from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from common.embeddings.bags import BagReader, EmbeddingBags
from common.engines.probe_seeds import train_seeds
from common.networks.mil_probe import MILProbe, ProbeGrid
from common.networks.poolers import PAPER_POOLERS, build_pooler, pad_bags
from common.optimizers.adamw import warmup_cosine

CLASSES = ["Emphysema", "Lung nodule", "Pleural effusion"]
RATES = [0.1, 0.02]
STEPS, TOTAL, BATCH = 11, 17, 4


def train_alone(bags: EmbeddingBags, pooler: str, learning_rate: float, seed: int) -> MILProbe:
    """The plain way: one probe, padded batches, torch's own SGD and cosine, stopped before its end."""
    torch.manual_seed(seed)
    probe = MILProbe(build_pooler(pooler, bags.identity["dim"]), bags.identity["dim"], len(CLASSES)).double()
    optimizer = torch.optim.SGD(probe.parameters(), lr=learning_rate, momentum=0.95, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=TOTAL)
    per_epoch = -(-len(bags) // BATCH)
    for step in range(STEPS):
        order = np.random.default_rng([seed, step // per_epoch]).permutation(len(bags))
        chosen = order[step % per_epoch * BATCH :][:BATCH]
        logits = probe(*pad_bags([bags[index]["tokens"].double() for index in chosen]))
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(logits, bags.labels[chosen].double()).backward()
        optimizer.step()
        scheduler.step()
    return probe


def train(bags: EmbeddingBags, index: int, seeds: list[int]) -> list[MILProbe]:
    grid = ProbeGrid(list(PAPER_POOLERS), RATES, bags.identity["dim"], len(CLASSES), seed=1).double()
    optimizer = torch.optim.SGD(grid.parameter_groups(), momentum=0.95, weight_decay=0.01)
    reader = BagReader(bags, torch.device("cpu"))
    return train_seeds(
        seeds,
        grid,
        index,
        STEPS,
        BATCH,
        reader,
        grid.fixed_features(reader(range(len(bags)))),
        bags.labels,
        nn.BCEWithLogitsLoss(reduction="none"),
        optimizer,
        warmup_cosine(optimizer, warmup_steps=0, max_steps=TOTAL, final_lr=0.0),
    )


@pytest.mark.parametrize("index", range(10))
def test_every_seed_ends_where_it_would_alone(write_cohort: Any, index: int) -> None:
    bags = EmbeddingBags(*write_cohort("train", 13, signal=1.0), CLASSES)
    seeds = [5, 9, 6]
    for seed, together in zip(seeds, train(bags, index, seeds), strict=True):
        alone = train_alone(bags, list(PAPER_POOLERS)[index % 5], RATES[index // 5], seed)
        assert together.state_dict().keys() == alone.state_dict().keys()
        for name, expected in alone.state_dict().items():
            torch.testing.assert_close(together.state_dict()[name], expected, rtol=1e-10, atol=1e-12)


def test_no_further_seed_trains_nothing(write_cohort: Any) -> None:
    assert train(EmbeddingBags(*write_cohort("train", 5), CLASSES), 0, []) == []
