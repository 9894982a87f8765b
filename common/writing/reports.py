"""Radiology reports of a cohort, from a table such as CT-RATE's."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from common.cohort.cohort import table_rows
from common.ct.files import volume_name

logger = logging.getLogger(__name__)

FINDINGS = "Findings_EN"


def read_reports(reports_csv: str | Path, column: str = FINDINGS) -> dict[str, str]:
    """Read the report of each volume, in the order of the table; white space becomes single blanks.

    Rows without text are left out; a warning counts them and names the first.

    Args:
        reports_csv: CSV with a column ``VolumeName``, as in CT-RATE's ``radiology_text_reports``.
        column: column of the text.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no CSV in UTF-8, a column is missing, a volume has two rows, or none has text.
    """
    reports: dict[str, str] = {}
    for row in table_rows(reports_csv, "reports_csv", ("VolumeName", column)):
        volume = volume_name(row["VolumeName"].strip())
        if volume in reports:
            raise ValueError(f"reports_csv has two rows for volume '{volume}' in '{reports_csv}'.")
        reports[volume] = " ".join(row[column].split())
    empty = [volume for volume, text in reports.items() if not text]
    if empty:
        logger.warning(
            "%d of %d reports in '%s' have no %s and are left out, first '%s'.",
            *(len(empty), len(reports), reports_csv, column, empty[0]),
        )
    if len(empty) == len(reports):
        raise ValueError(f"No report with text under '{column}' in '{reports_csv}'.")
    return {volume: text for volume, text in reports.items() if text}


def reported_volumes(embedded: Iterable[str], reports: Mapping[str, str]) -> list[str]:
    """List the volumes that have an embedding and a report, in the order of the reports.

    Warnings count the volumes that lack either, and name the first.

    Raises:
        ValueError: if no volume has both.
    """
    have = set(embedded)
    both = [volume for volume in reports if volume in have]
    if not both:
        raise ValueError(
            f"None of {len(have)} embedded volumes, such as '{min(have, default='')}', is among the "
            f"{len(reports)} reports, such as '{next(iter(reports), '')}'."
        )
    for lacking, what in ((sorted(have - reports.keys()), "report"), (list(reports), "embedding")):
        missing = [volume for volume in lacking if what == "report" or volume not in have]
        if missing:
            logger.warning(
                "%d volumes have no %s and are left out, first '%s'.", len(missing), what, missing[0]
            )
    return both
