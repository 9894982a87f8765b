"""The audit as one HTML page that a radiologist reads at a glance, with the pictures in it.

Names and messages come from data that others made: everything is escaped.
"""

import base64
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from common.ct.geometry import EXCLUDED
from common.labels import load_labels
from common.run.process import atomic_file
from data_prep.audit.charts import bars, histogram, shares
from data_prep.audit.checks import CHECKS, ERROR, Check, Tally
from data_prep.audit.cohort import Row, Volume
from data_prep.audit.measures import RULES
from data_prep.audit.page import light, listing, page, section, table
from data_prep.audit.pictures import FINDING_COLOUR, ORGAN_COLOURS, Picture
from data_prep.audit.run import Audit, label_prevalence, organ_prevalence
from data_prep.audit.volume import HU_BIN

MAX_ROWS = 200
"""Rows of a table; all of them are in the JSON file."""

CHARTED = ("length", "width", "lungs", "tissue", "shape", "back", "head", "heart", "organs")
"""Measures with a histogram; the others are in the JSON file."""

Volumes = Mapping[str, Volume]

HOW_TO_READ = (
    "Left: coronal and sagittal cut through the middle of the body, head up, at true proportions. "
    "Right: axial slices from the feet (1) to the head, the patient's right (R) on the left of the picture; "
    "above in the lung window, below in the mediastinal window with the masks. Click to enlarge."
)


def write_report(audit: Audit, sheets: Sequence[Picture], suspects: Sequence[Picture], path: Path) -> None:
    """Write the page.

    Args:
        audit: what came of it.
        sheets: pictures of a random sample.
        suspects: pictures of suspicious volumes.
        path: of the file.
    """
    volumes = {volume.name: volume for volume in audit.volumes}
    parts = (
        _verdict(audit),
        section("Checks", _checks(audit.tally)),
        section("Volumes to look at", _suspicious(audit, suspects, volumes)),
        section("A random sample", _sample(audit, sheets, suspects, volumes)),
        section("The cohort", _cohort(audit)),
        section("Volumes that were left out", _rejected(audit.rejected)),
    )
    with atomic_file(path, "w", encoding="utf-8") as file:
        file.write(page(f"Audit of {audit.folder.name}", "".join(parts)))


def _verdict(audit: Audit) -> str:
    failed = [check for check in CHECKS if audit.tally.failed[check.name]]
    num_errors = sum(check.level == ERROR for check in failed)
    if num_errors:
        state, words = "bad", f"{_number(num_errors, 'check')} failed: do not train on these shards"
    elif failed:
        state, words = "warn", "All checks of the data passed; some volumes should be looked at"
    else:
        state, words = "ok", "All checks passed"
    decoded = f"{len(audit.contents):,} of {_number(len(audit.volumes), 'volume')} decoded and looked at"
    numbers = {
        "volumes": f"{len(audit.volumes):,}",
        "slices": f"{sum(volume.entry.num_slices for volume in audit.volumes):,}",
        "shards": f"{audit.num_shards:,}",
        "GB": f"{audit.num_bytes / 1e9:,.2f}",
        "with label map": f"{sum(volume.entry.has_ts for volume in audit.volumes):,}",
        "with findings outlined": f"{sum(volume.entry.has_rex for volume in audit.volumes):,}",
        "to look at": f"{len(audit.suspicious):,}",
        "left out": f"{len(audit.rejected):,}",
    }
    cards = "".join(f'<div class="number-card"><b>{value}</b>{name}</div>' for name, value in numbers.items())
    where = f"{audit.folder}, {', '.join(audit.splits)}"
    return (
        f'<header class="verdict {state}"><h1>{escape(words)}</h1>'
        f"<p>{escape(where)} &middot; {decoded}</p></header>"
        f'<div class="numbers">{cards}</div>'
    )


def _number(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _checks(tally: Tally) -> str:
    failed = [check for check in CHECKS if tally.failed[check.name]]
    others = [check for check in CHECKS if not tally.failed[check.name]]
    heads = ("", "What was checked", "Looked at", "Failed", "Where")
    open_rows = table(heads, [_check_row(check, tally) for check in failed]) if failed else ""
    num_passed = sum(tally.checked[check.name] > 0 for check in others)
    words = f"{_number(num_passed, 'check')} passed, {len(others) - num_passed} not applicable"
    folded = table(heads[:3], [_check_row(check, tally)[:3] for check in others])
    return f"{open_rows}<details><summary>{words}</summary>{folded}</details>"


def _check_row(check: Check, tally: Tally) -> list[str]:
    failed, checked = tally.failed[check.name], tally.checked[check.name]
    offences = tally.offences.get(check.name, [])
    if failed:
        state = light("bad", "✗ failed") if check.level == ERROR else light("warn", "! look at")
    else:
        state = light("ok", "✓ passed") if checked else light("none", "– not applicable")
    words = [f"{offence.where}: {offence.what}" for offence in offences]
    first = escape(words[0]) if words else ""
    rest = listing(words[1:], failed - len(words))
    more = f"<details><summary>{failed - 1:,} more</summary>{rest}</details>" if rest else ""
    return [state, escape(check.claim), f"{checked:,}", f"{failed:,}" if failed else "", first + more]


def _suspicious(audit: Audit, suspects: Sequence[Picture], volumes: Volumes) -> str:
    if not audit.suspicious:
        return ""
    share = len(audit.suspicious) / max(len(audit.contents), 1)
    intro = (
        f"<p>{len(audit.suspicious):,} of {_number(len(audit.contents), 'decoded volume')} ({share:.1%}) "
        "look unlike a whole chest CT that lies the right way. That may be the patient, the scan, or a "
        "mistake on the way: look, then keep the volume or put it on a skip list.</p>"
    )
    drawn = {picture.volume for picture in suspects}
    cards = "".join(
        _card(picture, volumes[picture.volume], list(audit.suspicious[picture.volume].values()))
        for picture in suspects
    )
    others = [(name, found) for name, found in audit.suspicious.items() if name not in drawn]
    rows = [[escape(name), listing(list(found.values()))] for name, found in others[:MAX_ROWS]]
    rest = table(("Volume", "Why"), rows) if rows else ""
    left = len(others) - len(rows)
    return intro + _legend() + cards + rest + (f"<p>and {left:,} more in audit.json</p>" if left > 0 else "")


def _sample(audit: Audit, sheets: Sequence[Picture], suspects: Sequence[Picture], volumes: Volumes) -> str:
    """Volumes that stand among the suspicious ones already are only named."""
    above = {picture.volume for picture in suspects}
    repeated = [picture.volume for picture in sheets if picture.volume in above]
    note = f"<p>Also drawn for it, and shown above: {escape(', '.join(repeated))}.</p>" if repeated else ""
    cards = [
        _card(picture, volumes[picture.volume], list(audit.suspicious.get(picture.volume, {}).values()))
        for picture in sheets
        if picture.volume not in above
    ]
    return note + (_legend() if cards and not suspects else "") + "".join(cards)


def _legend() -> str:
    colours = {**ORGAN_COLOURS, "finding (outline)": FINDING_COLOUR}
    items = "".join(
        f'<span><i style="background:rgb{colour}"></i>{escape(name)}</span>'
        for name, colour in colours.items()
    )
    return f'<p class="soft">{escape(HOW_TO_READ)}</p><div class="legend">{items}</div>'


def _card(picture: Picture, volume: Volume, reasons: Sequence[str]) -> str:
    entry = volume.entry
    x, y, z = entry.spacing_mm
    height, width = entry.shape
    facts = (
        f"{volume.split} · {entry.num_slices} slices of {width} × {height} · "
        f"{x:.2f} × {y:.2f} × {z:.2f} mm · {entry.num_slices * z:.0f} mm from feet to head"
    )
    labels = [name for name, value in (entry.labels or {}).items() if value]
    lines = [f"<h3>{escape(entry.volume)}</h3>", f'<p class="soft">{escape(facts)}</p>']
    if entry.labels:
        lines.append(f"<p>Labels: {escape(', '.join(labels) or 'none of them')}</p>")
    if picture.findings:
        lines.append(f"<p>Outlined: {escape('; '.join(picture.findings))}</p>")
    lines += [f'<p class="why">! {escape(reason)}</p>' for reason in reasons]
    data = base64.b64encode(picture.jpeg).decode("ascii")
    alt = escape(f"Cuts and axial slices of {entry.volume}")
    image = f'<label><input type="checkbox"><img alt="{alt}" src="data:image/jpeg;base64,{data}"></label>'
    return f'<article class="sheet">{"".join(lines)}{image}</article>'


def _cohort(audit: Audit) -> str:
    entries = [volume.entry for volume in audit.volumes]
    contents = list(audit.contents.values())
    charts = [
        histogram([entry.num_slices for entry in entries], "Slices of a volume"),
        histogram([entry.spacing_mm[2] for entry in entries], "Slice distance", "mm"),
        histogram([entry.spacing_mm[0] for entry in entries], "Pixel spacing", "mm"),
    ]
    if contents:
        counts = np.sum([content.hu_counts for content in contents], axis=0)
        # the first bin is air outside the body, which would hide all others
        charts.append(
            bars(
                counts[1:94].tolist(),
                [-1024 + HU_BIN * k for k in range(1, 95)],
                "Voxels of all volumes",
                "HU",
            )
        )
        charts += [
            histogram([content.hu_percentiles[1] for content in contents], "Median of a volume", "HU"),
            histogram(
                [content.hu_percentiles[2] for content in contents], "99 % of a volume stay below", "HU"
            ),
        ]
    for rule in (rule for rule in RULES if rule.name in CHARTED):
        values = [content.measures.get(rule.name, math.nan) for content in contents]
        known = [value for value in values if math.isfinite(value)]
        charts.append(
            histogram(known, rule.measure[:1].upper() + rule.measure[1:], rule.unit, (rule.low, rule.high))
        )
    organs = {name: share for name, share in organ_prevalence(contents).items() if name != "background"}
    groups = (
        shares(label_prevalence(audit.volumes), "Volumes with a label"),
        shares(_findings(audit), "Annotated volumes with a finding"),
        shares(organs, "Volumes with an organ in their label map"),
    )
    folded = f"<details><summary>Organs in the label maps</summary>{groups[2]}</details>" if groups[2] else ""
    return (
        f'<div class="charts">{"".join(charts)}</div><div class="charts">{groups[0]}{groups[1]}</div>{folded}'
    )


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


def _rejected(rejected: Sequence[Row]) -> str:
    if not rejected:
        return ""
    counts = Counter(row["reason"] for row in rejected)
    by_reason = table(
        ("Reason", "Volumes"),
        [
            [escape(reason) + (" (by the dataset's own list)" if reason == EXCLUDED else ""), f"{count:,}"]
            for reason, count in counts.most_common()
        ],
    )
    rows = [
        [escape(row[name]) for name in ("volume", "split", "reason", "detail")] for row in rejected[:MAX_ROWS]
    ]
    each = table(("Volume", "Split", "Reason", "Detail"), rows)
    more = (
        f"<p>and {len(rejected) - len(rows):,} more in rejected.csv</p>" if len(rejected) > len(rows) else ""
    )
    return f"{by_reason}<details><summary>Every volume</summary>{each}{more}</details>"
