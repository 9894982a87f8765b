"""What a run says of the volumes it could not use: a list, a warning, and an error if there are many."""

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

import ignite.distributed as idist

from common.ct.rejection import RejectedVolume, is_failure
from common.embeddings.store import EmbeddingStore, stored_volumes
from common.run.atomic_file import atomic_file
from common.run.distributed import gather_objects

logger = logging.getLogger(__name__)

REJECTED = "rejected.csv"


def report_rejected(
    output_dir: str | Path, rejected: Sequence[RejectedVolume], num_volumes: int, max_rejected: float
) -> int:
    """Write ``rejected.csv`` of all ranks' volumes, or remove that of an earlier run, and judge their share.

    All ranks must call it; rank 0 writes.

    Args:
        output_dir: folder of the list.
        rejected: of this rank.
        num_volumes: of the whole run.
        max_rejected: share of volumes that may fail.

    Returns:
        Number of volumes that failed.

    Raises:
        ValueError: if more failed.
    """
    path = Path(output_dir) / REJECTED
    everyones = sorted({volume for of_rank in gather_objects(list(rejected)) for volume in of_rank})
    if idist.get_rank() == 0:
        _write(path, everyones)
    failed = [volume for volume in everyones if is_failure(volume)]
    num_failed = len({volume.volume for volume in failed})
    share = num_failed / max(num_volumes, 1)
    if share > max_rejected:
        raise ValueError(
            f"rejected volumes must be at most {max_rejected:.2%}, got {share:.2%} "
            f"({len(failed)} volumes, such as '{failed[0].volume}': {failed[0].detail}). "
            f"They are listed in '{path}': fix them, or raise --max_rejected."
        )
    return num_failed


def log_embedded(output_dir: str | Path, num_volumes: int, num_failed: int) -> None:
    """Say on rank 0, as the last line of a run, what lies where and what does not.

    Args:
        output_dir: folder of the embeddings.
        num_volumes: of the whole run.
        num_failed: of these that have no embedding.
    """
    if idist.get_rank() == 0:
        left_out = f"; {num_failed} rejected, listed in '{Path(output_dir) / REJECTED}'" if num_failed else ""
        embedded = num_volumes - num_failed
        logger.info("Done: embeddings of %d volumes in '%s'%s.", embedded, output_dir, left_out)


def report_doubts(folder: str | Path) -> None:
    """Say in one line how many embedded volumes are doubtful; call it after ``report_rejected``.

    Args:
        folder: of the embedding store, into which all ranks have written.
    """
    if idist.get_rank() > 0 or not stored_volumes(folder):
        return
    store = EmbeddingStore(folder)
    if doubts := store.doubts():
        volume, texts = next(iter(doubts.items()))
        logger.warning(
            "%d of %d embedded volumes are doubtful, such as '%s': %s. "
            "EmbeddingStore('%s').doubts() lists them.",
            *(len(doubts), len(store), volume, texts[0], folder),
        )


def _write(path: Path, rejected: Sequence[RejectedVolume]) -> None:
    if not rejected:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(RejectedVolume._fields)
        table.writerows(rejected)
