"""Compare two encoders on the same volumes: Table V, and what slices' embeddings say of their place."""

# N volumes, S slices, R resamples

import logging
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events

from common.cohort.cohort import natural_order, split_three_ways
from common.embeddings.store import EmbeddingStore
from common.engines.world_model import label_free, organ_spans, slices_of, stride_scores, z_position
from common.metrics.paired_samples import Mean, compare_pairs, mean_over_volumes
from common.metrics.slice_paths import DISTANCES, latent_continuity, matched_slices

logger = logging.getLogger(__name__)

SAMPLINGS = ("stored", "matched")
"""All slices, as the paper scores them; and slices equally far apart in every volume."""


def open_encoders(
    slab_dir: str | Path, flat_dir: str | Path, floor_dirs: Sequence[str | Path] = ()
) -> dict[str, EmbeddingStore]:
    """Open the embeddings of an encoder pre-trained on slabs and of one on single slices, by encoder's name.

    Floors, such as histograms, may follow: they are measured likewise, and compared with neither.

    Raises:
        ValueError: if two are of one encoder, or one is not of slices.
    """
    stores: dict[str, EmbeddingStore] = {}
    for folder in (slab_dir, flat_dir, *floor_dirs):
        store = EmbeddingStore(folder)
        name, kind = store.identity["encoder"], store.identity["token_kind"]
        if kind != "slice":
            raise ValueError(f"embeddings must be of slices, got tokens of kind '{kind}' in '{folder}'.")
        if name in stores:
            raise ValueError(
                f"'{stores[name].folder}' and '{folder}' both hold embeddings of '{name}'. Give those of two "
                "encoders."
            )
        stores[name] = store
    return stores


def shared_volumes(stores: dict[str, EmbeddingStore], min_slices: int) -> list[str]:
    """List the volumes that all encoders embedded with enough slices: 16 in the authors' re-created probe.

    Raises:
        ValueError: if there is none, or encoders disagree on the number of slices of a volume.
    """
    lengths = [dict(zip(store.volumes, store.lengths.tolist(), strict=True)) for store in stores.values()]
    shared = sorted(set(lengths[0]).intersection(*lengths[1:]), key=natural_order)
    for volume in shared:
        counts = [of[volume] for of in lengths]
        if len(set(counts)) > 1:
            raise ValueError(
                f"The encoders embedded different numbers of slices of '{volume}': {counts}. Embed it again."
            )
    volumes = [volume for volume in shared if lengths[0][volume] >= min_slices]
    if not volumes:
        raise ValueError(
            f"None of the {len(shared)} volumes that all encoders embedded has {min_slices} slices or more."
        )
    left_out = len(set().union(*lengths)) - len(volumes)
    if left_out:
        logger.warning(
            "%d volumes left out: not embedded by all, or fewer than %d slices.", left_out, min_slices
        )
    return volumes


class LatentGeometryEvaluator(Engine):
    """Measure two encoders and floors on the same volumes, one per iteration, and compare the two at the end.

    ``engine.state.continuity``: encoder, sampling and distance to ``(N,)``. When completed,
    ``engine.state.table``: rows of ``encoder, measure, value, error, low, high, n`` in the order of Table V
    and then the world-model probes; ``engine.state.comparisons``: ``measure`` to
    :class:`~common.metrics.paired_samples.Comparison` of the first encoder with the second;
    ``engine.state.world``: encoder to the probes' results, for pictures. ``engine.state.metrics`` holds the
    table's values as ``<encoder>/<measure>``.

    Source: DALE-CT V-D, Table V and Figure 2; its released world-model probes.

    Args:
        stores: embeddings from :func:`open_encoders`; all after the second are floors.
        volumes: volumes from :func:`shared_volumes`.
        sample_mm: distance between slices in the matched sampling.
        gaps_mm: gaps of the distance-gap curve.
        split_percent: percent of patients to fit, choose and test read-outs on.
        split_seed: seed of the split.
        num_resamples: number of resamples of patients, R.
        seed: seed of the resamples.
        dense_labels_dir: labels from ``data_prep dense-labels``, for organ spans; None leaves these out.
        probe_dirs: MIL probe of each of the two encoders, for stride robustness; None leaves it out.
        labels_csv: labels of the probes' classes; needed with ``probe_dirs``.
        strides: distances in slices of the slices that the probes are given.
        handlers: Ignite handlers.
    """

    state: Any  # Ignite's, with what is listed above

    def __init__(
        self,
        *,
        stores: dict[str, EmbeddingStore],
        volumes: Sequence[str],
        sample_mm: float,
        gaps_mm: Sequence[float],
        split_percent: Sequence[int],
        split_seed: int,
        num_resamples: int,
        seed: int,
        dense_labels_dir: str | Path | None,
        probe_dirs: Sequence[str | Path] | None,
        labels_csv: str | Path | None,
        strides: Sequence[int],
        handlers: Sequence[Any],
    ) -> None:
        super().__init__(self._measure)
        self.stores, self.volumes = stores, list(volumes)
        self.sample_mm, self.gaps_mm = sample_mm, list(gaps_mm)
        fit, choose, test = split_percent
        self.split = split_three_ways(self.volumes, split_seed, (fit, choose, test))
        self.num_resamples, self.seed = num_resamples, seed
        self.dense_labels_dir, self.probe_dirs, self.labels_csv = dense_labels_dir, probe_dirs, labels_csv
        self.strides = list(strides)
        self.state.continuity = {
            key: np.full(len(self.volumes), np.nan) for key in product(stores, SAMPLINGS, DISTANCES)
        }
        self.state.table, self.state.comparisons, self.state.world = [], {}, {}
        self.add_event_handler(Events.COMPLETED, self._conclude)
        for handler in handlers:
            handler.attach(self)

    def measure_all(self) -> None:
        """Run over all volumes."""
        self.run(self.volumes, max_epochs=1, epoch_length=len(self.volumes))

    def _measure(self, engine: Engine, volume: str) -> list[dict[str, float]]:
        place = self.state.iteration - 1
        for encoder, store in self.stores.items():
            (slices,) = slices_of(store, [volume])
            chosen = matched_slices(slices.z_mm, self.sample_mm)
            sampled = zip(SAMPLINGS, (slices.tokens, slices.tokens[chosen]), strict=True)
            for (sampling, tokens), distance in product(sampled, DISTANCES):
                if len(tokens) > 1:
                    score = latent_continuity(tokens, distance)
                    self.state.continuity[encoder, sampling, distance][place] = score
        paper = {encoder: self.state.continuity[encoder, "stored", "cosine"] for encoder in self.stores}
        return [{f"{encoder}/continuity_cosine": float(of[place]) for encoder, of in paper.items()}]

    def _conclude(self, engine: Engine) -> None:
        for (encoder, sampling, distance), scores in self.state.continuity.items():
            mean = mean_over_volumes(scores, self.volumes, self.num_resamples, self.seed)
            self._add(encoder, _continuity(sampling, distance), mean)
        first, second, *_ = self.stores
        for sampling, distance in product(SAMPLINGS, DISTANCES):
            one, other = (self.state.continuity[name, sampling, distance] for name in (first, second))
            comparison = compare_pairs(
                one, other, volumes=self.volumes, num_resamples=self.num_resamples, seed=self.seed
            )
            self.state.comparisons[_continuity(sampling, distance)] = comparison
        for place, (encoder, store) in enumerate(self.stores.items()):
            self._world_model(encoder, store, place)

    def _world_model(self, encoder: str, store: EmbeddingStore, place: int) -> None:
        logger.info("World-model probes of '%s' on %d volumes.", encoder, len(self.volumes))
        world = z_position(store, self.split, self.num_resamples, self.seed)
        world |= label_free(store, self.volumes, self.gaps_mm, self.num_resamples, self.seed)
        for name in ("r2_fraction", "r2_mm", "mae_fraction", "mae_mm"):
            self._add(encoder, f"z_position_{name}", world[name])
        for name in ("tau_principal_axis", "tau_nearest_neighbours", "effective_rank", "participation_ratio"):
            self._add(encoder, name, world[name])
        for gap, mean in zip(self.gaps_mm, world["gap_curve"], strict=True):
            self._add(encoder, f"distance_at_{gap:g}_mm", mean)
        if self.dense_labels_dir is not None:
            labels_dir = self.dense_labels_dir
            world["organ_spans"] = organ_spans(store, self.split, labels_dir, self.num_resamples, self.seed)
            self._add_all(encoder, world["organ_spans"], "organ_span_{1}/{0}")
        if self.probe_dirs is not None and place < len(self.probe_dirs):
            given = (self.probe_dirs[place], str(self.labels_csv), self.strides)
            world["strides"] = stride_scores(store, *given, self.num_resamples, self.seed)
            self._add_all(encoder, world["strides"], "stride_{0}_{1}")
        self.state.world[encoder] = world

    def _add_all(self, encoder: str, means: Mapping[Any, Mapping[str, Mean]], measure: str) -> None:
        for of_what, by_name in means.items():
            for name, mean in by_name.items():
                self._add(encoder, measure.format(of_what, name), mean)

    def _add(self, encoder: str, measure: str, mean: Mean) -> None:
        self.state.table.append({"encoder": encoder, "measure": measure, **mean._asdict()})
        self.state.metrics[f"{encoder}/{measure}"] = mean.value


def _continuity(sampling: str, distance: str) -> str:
    return f"continuity_{distance}" + ("_matched" if sampling == "matched" else "")
