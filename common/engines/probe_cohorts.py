"""Checks of the cohorts that a probe is trained, chosen and tested on."""

import logging

from common.embeddings.bags import EmbeddingBags
from common.embeddings.store import check_identity
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
    train = {name: value for name, value in cohorts["train"].identity.items() if name != "dtype"}
    seen: dict[str, str] = {}
    for cohort, bags in cohorts.items():
        remedy = "Embed all cohorts with one encoder."
        check_identity(bags.identity, train, of=f"cohort '{cohort}'", source="in train", remedy=remedy)
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
