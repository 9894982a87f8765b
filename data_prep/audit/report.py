"""The audit as one HTML page that a radiologist reads at a glance, with the pictures in it.

The page itself is ``report.html``, a template that escapes every text: names and messages come from others.
"""

import base64
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined

from common.cohort.cohort import load_labels
from common.ct.rejection import EXCLUDED
from common.run.process import atomic_file
from data_prep.audit.checks import CHECKS, RULES
from data_prep.audit.pictures import FINDING_COLOUR, ORGANS, Picture
from data_prep.audit.run import Audit, label_prevalence, organ_prevalence
from data_prep.audit.volume import HU_BIN

TEMPLATE = Path(__file__).with_name("report.html")

MAX_ROWS = 200
"""Rows of a table; all of them are in the JSON file."""

CHARTED = ("length", "width", "lungs", "tissue", "shape", "back", "head", "heart", "organs")
"""Measures with a histogram; the others are in the JSON file."""

NUM_BINS = 24
_LEFT, _RIGHT, _TOP, _FLOOR = 8, 292, 12, 120
"""Edges of a chart in the template's drawing, which is 300 wide and 150 high."""


class Chart(NamedTuple):
    """A histogram, ready to be drawn.

    Args:
        title: heading.
        unit: unit of the values, if they have one.
        bars: place and size of each bar, and whether it lies within the limits of a sound volume.
        ticks: text, place and alignment of the numbers below.
        most: count of the highest bar.
    """

    title: str
    unit: str
    bars: list[dict[str, Any]]
    ticks: list[tuple[str, str, str]]
    most: int


def write_report(audit: Audit, sheets: Sequence[Picture], suspects: Sequence[Picture], path: Path) -> None:
    """Write the page.

    Args:
        audit: outcome of the checks.
        sheets: pictures of a random sample.
        suspects: pictures of suspicious volumes.
        path: file to write.
    """
    contents = list(audit.contents.values())
    failed = [check for check in CHECKS if audit.tally.failed[check.name]]
    others = [check for check in CHECKS if not audit.tally.failed[check.name]]
    drawn = {picture.volume for picture in suspects}
    colours = {name: colour for name, (colour, _) in ORGANS.items()} | {"finding (outline)": FINDING_COLOUR}
    organs = {name: share for name, share in organ_prevalence(contents).items() if name != "background"}
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.globals.update(
        number=lambda count: f"{count:,}",
        plural=_plural,
        base64=lambda content: base64.b64encode(content).decode("ascii"),
        present=lambda labels: [name for name, value in labels.items() if value],
        texts=lambda offences: [f"{offence.where}: {offence.what}" for offence in offences],
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        audit=audit,
        tally=audit.tally,
        volumes={volume.name: volume for volume in audit.volumes},
        failed=failed,
        others=others,
        num_passed=sum(audit.tally.checked[check.name] > 0 for check in others),
        suspects=suspects,
        undrawn=[name for name in audit.suspicious if name not in drawn],
        sheets=[picture for picture in sheets if picture.volume not in drawn],
        repeated=[picture.volume for picture in sheets if picture.volume in drawn],
        colours=colours,
        charts=_charts(audit),
        labels=label_prevalence(audit.volumes),
        findings=_findings(audit),
        organs=organs,
        reasons=Counter(row["reason"] for row in audit.rejected).most_common(),
        excluded=EXCLUDED,
        max_rows=MAX_ROWS,
    )
    with atomic_file(path, "w", encoding="utf-8") as file:
        file.write(page)


def _plural(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def histogram(
    values: Sequence[float], title: str, unit: str = "", limits: tuple[float, float] = (-math.inf, math.inf)
) -> list[Chart]:
    """Count how often values occur.

    Args:
        values: finite numbers.
        title: heading.
        unit: unit of the values.
        limits: least and greatest value of a sound volume.

    Returns:
        One chart; none without values.
    """
    if len(values) == 0:
        return []
    low, high = float(min(values)), float(max(values))
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(values, bins=NUM_BINS, range=(low, high))
    return [bars(counts.tolist(), edges.tolist(), title, unit, limits)]


def bars(
    counts: Sequence[int],
    edges: Sequence[float],
    title: str,
    unit: str = "",
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> Chart:
    """Place the bars of a histogram: ``counts`` between ``edges``; the rest as for ``histogram``."""
    most = max(*counts, 1)
    step = (_RIGHT - _LEFT) / len(counts)
    drawn = []
    for i, count in enumerate(counts):
        height = count / most * (_FLOOR - _TOP)
        drawn.append(
            {
                "x": f"{_LEFT + i * step:.1f}",
                "y": f"{_FLOOR - height:.1f}",
                "width": f"{max(step - 1, 0.5):.1f}",
                "height": f"{height:.1f}",
                "sound": edges[i + 1] >= limits[0] and edges[i] <= limits[1],
            }
        )
    ticks = [
        (f"{value:.4g}", f"{place:g}", anchor)
        for value, place, anchor in (
            (edges[0], _LEFT, "start"),
            ((edges[0] + edges[-1]) / 2, (_LEFT + _RIGHT) / 2, "middle"),
            (edges[-1], _RIGHT, "end"),
        )
    ]
    return Chart(title, unit, drawn, ticks, most)


def _charts(audit: Audit) -> list[Chart]:
    entries = [volume.entry for volume in audit.volumes]
    contents = list(audit.contents.values())
    charts = [
        *histogram([entry.num_slices for entry in entries], "Slices of a volume"),
        *histogram([entry.spacing_mm[2] for entry in entries], "Slice distance", "mm"),
        *histogram([entry.spacing_mm[0] for entry in entries], "Pixel spacing", "mm"),
    ]
    if contents:
        counts = np.sum([content.hu_counts for content in contents], axis=0)
        # the first bin is air outside the body, which would dwarf all others
        edges = [-1024 + HU_BIN * k for k in range(1, 95)]
        charts.append(bars(counts[1:94].tolist(), edges, "Voxels of all volumes", "HU"))
        for k, title in ((1, "Median of a volume"), (2, "99 % of a volume stay below")):
            charts += histogram([content.hu_percentiles[k] for content in contents], title, "HU")
    for rule in (rule for rule in RULES if rule.name in CHARTED):
        values = [content.measures.get(rule.name, math.nan) for content in contents]
        known = [value for value in values if math.isfinite(value)]
        title = rule.measure[:1].upper() + rule.measure[1:]
        charts += histogram(known, title, rule.unit, (rule.low, rule.high))
    return charts


def _findings(audit: Audit) -> dict[str, float]:
    """Share of the decoded annotated volumes with each ReXGroundingCT finding."""
    annotated = [volume.name for volume in audit.volumes if volume.entry.has_rex]
    slices = [audit.contents[name].finding_slices for name in annotated if name in audit.contents]
    if not slices:
        return {}
    return {
        f"{label.name} ({label.code})": sum(counts[label.index] > 0 for counts in slices) / len(slices)
        for label in load_labels("rexgroundingct")
    }
