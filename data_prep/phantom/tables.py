"""Writes a synthetic cohort's tables: metadata, labels, no_chest lists, ReXGroundingCT's, RAD-ChestCT's.

Columns and file names are those of the real datasets, so the same readers take both.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.phantom.files import rad_name, write_atomic
from data_prep.phantom.population import CT_RATE_LABELS, Person, ScanId
from data_prep.phantom.scanner import Protocol, Site
from data_prep.tables import write_table

_SPLIT_TABLES = {"train": "train_metadata.csv", "valid": "validation_metadata.csv"}

# RAD-ChestCT's columns are all pairs of an abnormality and a place. These are the abnormalities of its 16
# shared classes and some others that no class takes; those stay 0, or share a finding with a class.
RAD_ABNORMALITIES = (
    "atelectasis", "bronchial_wall_thickening", "bronchiectasis", "calcification", "cardiomegaly",
    "catheter_or_port", "chest_tube", "clip", "consolidation", "coronary_artery_disease", "emphysema",
    "fibrosis", "fracture", "gi_tube", "groundglass", "hardware", "hernia", "honeycombing",
    "lymphadenopathy", "mass", "nodule", "nodulegr1cm", "opacity", "pacemaker_or_defib",
    "pericardial_effusion", "pericardial_thickening", "pleural_effusion", "pleural_thickening",
    "pneumothorax", "septal_thickening", "stent", "tracheal_tube",
)  # fmt: skip
RAD_LOCATIONS = (
    "right_upper", "right_mid", "right_lower", "left_upper", "left_lower", "lung", "right_lung",
    "left_lung", "heart", "aorta", "mediastinum", "esophagus", "chest_wall", "other_location",
)  # fmt: skip
_RAD_PLACES = {
    "right upper lobe": "right_upper", "right middle lobe": "right_mid", "right lower lobe": "right_lower",
    "left upper lobe": "left_upper", "left lower lobe": "left_lower", "lung": "lung", "right": "right_lung",
    "left": "left_lung", "heart": "heart", "aorta": "aorta", "mediastinum": "mediastinum",
    "esophagus": "esophagus", "pacemaker": "chest_wall", "port": "chest_wall",
    "sternal wires": "chest_wall", "gastric tube": "esophagus",
}  # fmt: skip
_RAD_MATERIAL = {
    "pacemaker": "pacemaker_or_defib",
    "port": "catheter_or_port",
    "sternal wires": "hardware",
    "gastric tube": "gi_tube",
}
_RAD_NAMES: dict[str, tuple[str, ...]] = {
    "Arterial wall calcification": ("calcification",),
    "Cardiomegaly": ("cardiomegaly",),
    "Pericardial effusion": ("pericardial_effusion",),
    "Coronary artery wall calcification": ("calcification", "coronary_artery_disease"),
    "Hiatal hernia": ("hernia",),
    "Lymphadenopathy": ("lymphadenopathy",),
    "Emphysema": ("emphysema",),
    "Atelectasis": ("atelectasis",),
    "Lung nodule": ("nodule",),
    "Lung opacity": ("opacity", "groundglass"),
    "Pulmonary fibrotic sequela": ("fibrosis",),
    "Pleural effusion": ("pleural_effusion",),
    "Mosaic attenuation pattern": (),
    "Peribronchial thickening": ("bronchial_wall_thickening",),
    "Consolidation": ("consolidation",),
    "Bronchiectasis": ("bronchiectasis",),
    "Interlobular septal thickening": ("septal_thickening",),
}

README = """# A synthetic cohort

Every volume here was drawn by `python -m data_prep phantom`; no person was ever scanned. The folders and
tables look like those of CT-RATE, ReXGroundingCT and (site b) RAD-ChestCT, so that the same readers take
both, but this is neither of them. Never mix it with real data in a result.

All 18 labels of CT-RATE are drawn into the images; `synthetic/<volume>.json` says what was drawn, where and
how severe. Head CTs are listed in `dataset/metadata/no_chest_*.txt`. `cohort.json` holds the settings; the
same settings give the same bytes.
"""


def _write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, columns, ([row[column] for column in columns] for row in rows))


def metadata_row(scan: ScanId, person: Person, protocol: Protocol, site: Site, matrix: int) -> dict[str, Any]:
    """CT-RATE's metadata of one volume."""
    return {
        "VolumeName": f"{scan.name}.nii.gz",
        "Manufacturer": site.manufacturer,
        "SeriesDescription": "synthetic chest phantom" if not scan.is_head else "synthetic head phantom",
        "ManufacturerModelName": "data_prep phantom",
        "PatientSex": person.sex,
        "PatientAge": f"{person.age_years:03d}Y",
        "ConvolutionKernel": protocol.kernel.name,
        "ReconstructionDiameter": round(protocol.pixel_mm * matrix, 2),
        "PatientPosition": "HFS",
        "StudyDate": f"2000{1 + scan.scan:02d}01",
        "RescaleIntercept": protocol.intercept,
        "RescaleSlope": 1,
        "Rows": matrix,
        "Columns": matrix,
        "XYSpacing": f"[{protocol.pixel_mm}, {protocol.pixel_mm}]",
        "ZSpacing": protocol.slice_mm,
        "NumberofSlices": protocol.num_slices,
    }


def write_ct_rate_tables(
    out: Path, rows: Mapping[ScanId, Mapping[str, Any]], labels: Mapping[ScanId, Mapping[str, float]]
) -> None:
    """Write metadata, labels and no_chest lists of both splits.

    Args:
        out: the cohort's folder.
        rows: :func:`metadata_row` of each volume.
        labels: severities of each volume's positive labels.
    """
    columns = list(next(iter(rows.values())))
    for split, table in _SPLIT_TABLES.items():
        scans = [scan for scan in rows if scan.split == split]
        _write_rows(out / "dataset" / "metadata" / table, columns, [rows[scan] for scan in scans])
        heads = [f"dataset/{split}/{scan.folder}/{scan.name}.nii.gz\n" for scan in scans if scan.is_head]
        write_atomic(out / "dataset" / "metadata" / f"no_chest_{split}.txt", "".join(heads).encode("ascii"))
        positive = [
            {
                "VolumeName": f"{scan.name}.nii.gz",
                **{label: int(label in labels[scan]) for label in CT_RATE_LABELS},
            }
            for scan in scans
        ]
        path = out / "dataset" / "multi_abnormality_labels" / f"{split}_predicted_labels.csv"
        _write_rows(path, ["VolumeName", *CT_RATE_LABELS], positive)


def write_rexgroundingct_json(out: Path, records: Mapping[ScanId, Mapping[str, Any]]) -> None:
    """Write ReXGroundingCT's list: training patients as "train", the others by turns as "val" and "test"."""
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "test": []}
    for scan, record in records.items():
        if record["rexgroundingct"]["categories"]:
            split = "train" if scan.split == "train" else ("val", "test")[scan.patient % 2]
            splits[split].append({"name": f"{scan.name}.nii.gz", **record["rexgroundingct"]})
    write_atomic(out / "rexgroundingct" / "dataset.json", json.dumps(splits, indent=1).encode("ascii"))


def _rad_positive(record: Mapping[str, Any]) -> set[str]:
    """RAD-ChestCT's columns that a volume's findings make positive."""
    found = set()
    for finding in record["findings"]:
        label, place = finding["label"], _RAD_PLACES[finding["location"]]
        names = (
            _RAD_NAMES.get(label) if label != "Medical material" else (_RAD_MATERIAL[finding["location"]],)
        )
        if label == "Lung nodule" and finding["size_mm"] > 10:
            names = ("nodulegr1cm",)
        if finding["code"] == "2f":
            names = ("fibrosis", "honeycombing")
        found |= {f"{name}*{place}" for name in names or ()}
    return found


def write_rad_chestct_tables(
    out: Path, records: Mapping[ScanId, Mapping[str, Any]], spacing_mm: float
) -> None:
    """Write RAD-ChestCT's three label tables and its table of spacings.

    Args:
        out: the cohort's folder.
        records: sidecar of each volume.
        spacing_mm: edge of the npz volumes' voxels.
    """
    folder = out / "rad_chestct"
    columns = [f"{abnormality}*{location}" for abnormality in RAD_ABNORMALITIES for location in RAD_LOCATIONS]
    chests = {rad_name(scan): record for scan, record in records.items() if not scan.is_head}
    for prefix, split in (("trn", "train"), ("val", "valid"), ("tst", "test")):
        rows = []
        for name in [name for name in chests if name.startswith(prefix)]:
            positive = _rad_positive(chests[name])
            rows.append({"NoteAcc_DEID": name, **{column: int(column in positive) for column in columns}})
        path = folder / f"img{split}_Abnormality_and_Location_Labels.csv"
        _write_rows(path, ["NoteAcc_DEID", *columns], rows)
    spacing = f"[{spacing_mm}, {spacing_mm}, {spacing_mm}]"
    sizes = [{"NoteAcc_DEID": n, "VolumeAcc_DEID": f"{n}.npz", "final_spacing": spacing} for n in chests]
    path = folder / "CT_Scan_Metadata_Complete_35747.csv"
    _write_rows(path, ["NoteAcc_DEID", "VolumeAcc_DEID", "final_spacing"], sizes)
