"""Write the tokens that a 3D encoder makes of each volume, and say what came of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from monai.utils import CommonKeys
from tqdm import tqdm

from common.ct.rejection import RejectedError, RejectedVolume, is_failure
from common.embeddings.ct_batches import VolumeBatches
from common.embeddings.store import DTYPES, EmbeddingStoreWriter, check_finite
from common.embeddings.work import log_embedded, report_doubts, report_rejected


class GridWriter:
    """Write what ``common.inferers.volumes`` gives: a grid of tokens, row-major, and the pooled vector.

    At the end, rank 0 lists the volumes of all ranks that could not be embedded in ``rejected.csv``, or
    removes that of an earlier run. What was added before an error or Ctrl-C is written.

    Args:
        output_dir: folder of the store.
        identity: of the embeddings.
        axcodes: where the grid's axes point, such as "RAS"; kept with each volume.
        dtype: "float16" or "float32", type the tokens are stored in.
        batches: that the engine runs on.
        num_volumes: of the whole run, all ranks and those that were embedded before.
        rejected: volumes that were left out before the run.
        max_rejected: share of volumes that may fail.

    Raises:
        ValueError: at the end of the run, if more failed; at its start, if the folder holds embeddings of
            another origin.
    """

    def __init__(
        self,
        output_dir: str | Path,
        identity: Mapping[str, Any],
        axcodes: str,
        dtype: str,
        batches: VolumeBatches,
        num_volumes: int,
        rejected: Sequence[RejectedVolume],
        max_rejected: float,
    ) -> None:
        self.writer = EmbeddingStoreWriter(output_dir, identity, dtype)
        self.dtype = DTYPES[dtype]
        self.output_dir = Path(output_dir)
        self.axcodes = axcodes
        self.batches = batches
        self.num_volumes = num_volumes + sum(map(is_failure, rejected))
        self.rejected = list(rejected) if idist.get_rank() == 0 else []  # every rank lists the same
        self.max_rejected = max_rejected

    def attach(self, engine: Engine) -> None:
        """Register with an Ignite engine."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)
        engine.add_event_handler(Events.COMPLETED, self._finish)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._stop)

    def _start(self, engine: Engine) -> None:
        total = len(self.batches.work)
        self.bar = tqdm(total=total, unit="volume", dynamic_ncols=True, disable=idist.get_rank() > 0)

    def _write(self, engine: Engine) -> None:
        state: Any = engine.state
        volume, bag = state.batch["volume"], state.output[CommonKeys.PRED]
        tokens = bag["tokens"][0].to(self.dtype)
        try:
            check_finite(tokens, "tokens", volume)
        except ValueError as error:
            self.rejected.append(RejectedError("embedding", str(error)).of(volume))
        else:
            self.writer.add(
                volume,
                tokens,
                state.batch["spacing_mm"],
                grid_shape=bag["grid"][0].tolist(),
                axcodes=self.axcodes,
                **state.batch["notes"],
            )
        self.bar.update()

    def _close(self) -> None:
        self.bar.close()
        self.writer.close()

    def _stop(self, engine: Engine, error: BaseException) -> None:
        self._close()
        raise error

    def _finish(self, engine: Engine) -> None:
        self._close()
        rejected = [*self.rejected, *self.batches.rejected]
        failed = report_rejected(self.output_dir, rejected, self.num_volumes, self.max_rejected)
        report_doubts(self.output_dir)
        log_embedded(self.output_dir, self.num_volumes, failed)
