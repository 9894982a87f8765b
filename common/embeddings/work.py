"""What an embedding run still has to do, and which of it falls to this process."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ignite.distributed as idist

from common.embeddings.sources import CTSource
from common.embeddings.store import stored_volumes
from common.run.distributed import wait_for_ranks
from common.transforms.slice_strategies import SliceStrategy


class Work(NamedTuple):
    """A volume and what is to be made of it.

    Args:
        source: the volume.
        strategies: that have no embedding of it yet.
    """

    source: CTSource
    strategies: tuple[SliceStrategy, ...]


def store_folders(output_dir: str | Path, strategies: Sequence[SliceStrategy]) -> dict[str, Path]:
    """Say where each strategy's store lies: one alone in the folder itself, several in a sub-folder each.

    Args:
        output_dir: folder of the run.
        strategies: of the run.

    Example:
        >>> strategies = [SliceStrategy(name, 16) for name in ("raw_144", "cropped_256")]
        >>> str(store_folders("embeddings/train", strategies)["raw_144"])
        'embeddings/train/raw_144'
        >>> str(store_folders("embeddings/train", strategies[:1])["raw_144"])
        'embeddings/train'
    """
    root = Path(output_dir)
    return {one.name: root if len(strategies) == 1 else root / one.name for one in strategies}


def embedding_work(
    sources: Sequence[CTSource], strategies: Sequence[SliceStrategy], folders: Mapping[str, Path]
) -> list[Work]:
    """List this process's share of the volumes that are not embedded yet.

    With several processes (torchrun) every n-th volume falls to each. They agree, as none of them writes
    before all have looked.

    Args:
        sources: all volumes.
        strategies: of the run.
        folders: see :func:`store_folders`.
    """
    done = {strategy.name: stored_volumes(folders[strategy.name]) for strategy in strategies}
    work = []
    for source in sources:
        missing = tuple(strategy for strategy in strategies if source.volume not in done[strategy.name])
        if missing:
            work.append(Work(source, missing))
    wait_for_ranks()
    return work[idist.get_rank() :: idist.get_world_size()]
