"""Checks of the cohorts that a probe is trained, chosen and tested on."""

import logging

from common.embeddings.bags import EmbeddingBags
from common.embeddings.part import IDENTITY_KEYS
from common.metrics.bootstrap import groups_of

logger = logging.getLogger(__name__)


def check_cohorts(cohorts: dict[str, EmbeddingBags], resampling: str = "patients") -> None:
    """Refuse cohorts that do not belong together; name classes that cannot be learned or measured.

    Args:
        cohorts: by the name that a message uses; the others are compared with ``train``.
        resampling: "patients" or "volumes": what no two cohorts may share.

    Raises:
        ValueError: if embeddings differ in origin or width, cohorts share a patient, or a volume has no
            slice.
    """
    train = cohorts["train"].identity
    seen: dict[str, str] = {}
    for cohort, bags in cohorts.items():
        for key in ("dim", *IDENTITY_KEYS):
            if bags.identity[key] != train[key]:
                raise ValueError(
                    f"{key} must be the same in every cohort, got {train[key]!r} in train and "
                    f"{bags.identity[key]!r} in {cohort}. Embed them with one encoder."
                )
        groups = groups_of(bags.volumes, resampling)
        for volume, group in zip(bags.volumes, groups, strict=True):
            if group in seen:
                raise ValueError(
                    f"cohorts must not share {resampling}, got '{volume}' of {cohort}: '{group}' is in "
                    f"{seen[group]}, too."
                )
        seen |= dict.fromkeys(groups, cohort)
        if not bool((bags.lengths > 0).all()):
            volume = bags.volumes[int(bags.lengths.argmin())]
            raise ValueError(
                f"embedding must have at least one slice, got 0 for volume '{volume}' of {cohort}. "
                f"Embed it again, or leave it out."
            )
        counts = zip(bags.class_names, bags.labels.sum(0).tolist(), strict=True)
        absent = [name for name, positives in counts if positives == 0]
        if absent:
            logger.warning("%s (%d volumes) has no positive of %s.", cohort, len(bags), absent)
