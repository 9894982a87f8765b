"""Reports of a synthetic cohort, in the form of CT-RATE's: what was drawn, said in varied words."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.phantom.files import sidecar_path
from data_prep.phantom.population import CT_RATE_LABELS, roster
from data_prep.tables import write_table

COLUMNS = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")
SYNTHETIC = "SYNTHETIC: a drawn phantom, no person was scanned."
TABLES = {"train": "train_reports.csv", "valid": "validation_reports.csv"}

# A sentence of each names its label alone, by words of common.writing.labels; {where} begins with a
# blank or is empty.
_PRESENT = {
    "Medical material": (
        "{Device} in place.",
        "Medical material: {device}.",
        "Status after placement of a device: {device}.",
    ),
    "Arterial wall calcification": (
        "Calcified plaques in the wall of the aorta.",
        "There are calcifications of the aortic wall.",
        "Aortic wall calcification is seen.",
    ),
    "Cardiomegaly": ("The heart is enlarged.", "Heart size is increased.", "Cardiomegaly is present."),
    "Pericardial effusion": ("Pericardial effusion.", "There is pericardial fluid."),
    "Coronary artery wall calcification": (
        "Coronary artery calcification{where}.",
        "Calcified plaques in the coronary arteries{where}.",
    ),
    "Hiatal hernia": ("Hiatal hernia.", "There is a hiatal hernia.", "Stomach herniates through the hiatus."),
    "Lymphadenopathy": ("Enlarged lymph nodes{where}.", "Lymphadenopathy{where}."),
    "Emphysema": ("Emphysema{where}.", "Emphysematous changes are seen{where}."),
    "Atelectasis": ("Atelectasis{where}.", "There are atelectatic changes{where}."),
    "Lung nodule": (
        "{Kind}{where}{size}.",
        "There is a {kind}{where}{size}.",
        "A {kind} is seen{where}{size}.",
    ),
    "Lung opacity": ("Ground-glass opacity{where}.", "There are ground-glass densities{where}."),
    "Pulmonary fibrotic sequela": ("Fibrotic bands{where}.", "Fibrotic sequelae are seen{where}."),
    "Pleural effusion": ("Pleural effusion{where}.", "There is pleural fluid{where}."),
    "Mosaic attenuation pattern": ("Mosaic attenuation{where}.", "A mosaic pattern is seen{where}."),
    "Peribronchial thickening": ("Peribronchial thickening.", "The bronchial walls are thick."),
    "Consolidation": ("Consolidation{where}.", "There is consolidated lung{where}."),
    "Bronchiectasis": ("Bronchiectasis{where}.", "There are dilated bronchi{where}."),
    "Interlobular septal thickening": (
        "Interlobular septal thickening{where}.",
        "Thickened interlobular septa{where}.",
    ),
}
_ABSENT = ("No {noun}.", "There is no {noun}.", "{Noun} is absent.", "No evidence of {noun}.")
_NOUNS = {"Arterial wall calcification": "aortic wall calcification", "Medical material": "medical material"}
_NORMAL = ("Trachea and main bronchi are open.", "Both main bronchi are open.", "The airways are open.")
ABSENT_SHARE = 0.4  # of the absent labels that a report says are absent; our choice
_DETAIL = re.compile(r"Enlarged (.+) lymph node\.|Calcification of the (.+) artery\.")


def findings_text(
    labels: Sequence[str], findings: Sequence[Mapping[str, Any]], rng: np.random.Generator
) -> str:
    """Word the findings of a volume, label by label in CT-RATE's order.

    Each positive label has a sentence, with the lobes, sides, vessels or nodal stations that were drawn, and
    the largest nodule's size; some of the others are said to be absent.

    Args:
        labels: positive labels of the volume.
        findings: its findings as in the sidecar.
        rng: chooses the words.
    """
    parts = [str(rng.choice(_NORMAL))]
    for label in CT_RATE_LABELS:
        if label in labels:
            parts.append(_present(label, [one for one in findings if one["label"] == label], rng))
        elif rng.random() < ABSENT_SHARE:
            noun = _NOUNS.get(label, label.lower())
            parts.append(str(rng.choice(_ABSENT)).format(noun=noun, Noun=noun.capitalize()))
    return " ".join(parts)


def _present(label: str, findings: Sequence[Mapping[str, Any]], rng: np.random.Generator) -> str:
    device = findings[0]["location"] if findings else "medical material"
    largest = max(findings, key=lambda one: one["size_mm"], default={"text": "", "size_mm": 0.0})
    kind, size = "cluster of micronodules", ""
    if largest["size_mm"]:
        kind = str(largest["text"]).partition(" of ")[0].lower()
        size = f" of {largest['size_mm']:.0f} mm"
    words = {"device": device, "Device": device.capitalize(), "kind": kind, "Kind": kind.capitalize()}
    template = str(rng.choice(_PRESENT[label]))
    return template.format(**words, where=_where(label, findings), size=size)


def _where(label: str, findings: Sequence[Mapping[str, Any]]) -> str:
    """Say where the findings of a label are, from its leading blank on; nothing where that goes without."""
    if label in ("Lymphadenopathy", "Coronary artery wall calcification"):
        details = [_DETAIL.fullmatch(one["text"]) for one in findings]
        places = [next(filter(None, found.groups())) for found in details if found]
        after = " stations" if label == "Lymphadenopathy" else " branches"
    else:
        places, after = [one["location"] for one in findings], ""
    places = sorted(set(places))
    if not places or places[0] in ("heart", "aorta", "esophagus"):
        return ""
    if label == "Pleural effusion":
        return " on both sides" if len(places) == 2 else f" on the {places[0]}"
    if places == ["lung"]:
        return " in both lungs"
    return " in the " + " and ".join([", ".join(places[:-1]), places[-1]] if places[1:] else places) + after


def write_reports(root: Path) -> int:
    """Write the reports of a cohort as ``dataset/radiology_text_reports/{train,validation}_reports.csv``.

    Reconstructions of a scan are worded alike. Head CTs have no report. Every row says that it is synthetic.

    Args:
        root: a finished cohort of :func:`data_prep.phantom.cohort.write_cohort`.

    Returns:
        Number of reports.

    Raises:
        FileNotFoundError: if the folder holds no cohort, or not all of it.
    """
    settings = json.loads((root / "cohort.json").read_text(encoding="ascii"))
    known = {name: settings[name] for name in ("seed", "site", "valid_share")}
    rows: dict[str, list[tuple[str, ...]]] = {split: [] for split in TABLES}
    for scan in roster(settings["num_volumes"], **known):
        if scan.is_head:
            continue
        record = json.loads(sidecar_path(root, scan).read_text(encoding="ascii"))
        labels = list(record["severity"])
        text = findings_text(labels, record["findings"], scan.scan_rng(20))
        impression = "; ".join(labels) + "." if labels else "Normal chest CT."
        technique = f"SYNTHETIC chest CT, slices {record['spacing_mm'][2]:.1f} mm apart."
        rows[scan.split].append((f"{scan.name}.nii.gz", SYNTHETIC, technique, text, impression))
    folder = root / "dataset" / "radiology_text_reports"
    folder.mkdir(parents=True, exist_ok=True)
    for split, table in TABLES.items():
        write_table(folder / table, COLUMNS, rows[split])
    return sum(map(len, rows.values()))
