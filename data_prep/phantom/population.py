"""Who is scanned: names as in CT-RATE, labels with their prevalence and correlations, and bodies.

Everything about volume number k follows from (seed, site, k) alone, whatever the size of the cohort: the
roster is walked from its beginning, patient by patient, and each patient, scan and reconstruction has random
generators of its own.
"""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from common.cohort.cohort import load_labels
from data_prep.phantom.anatomy import Anatomy
from data_prep.phantom.grid import Pose
from data_prep.phantom.scene import Fluid

CT_RATE_LABELS = tuple(label.name for label in load_labels("ct_rate"))

# Share of the scans with each label: our choice, of the order of CT-RATE's training labels.
PREVALENCE = {
    "Medical material": 0.12,
    "Arterial wall calcification": 0.28,
    "Cardiomegaly": 0.11,
    "Pericardial effusion": 0.07,
    "Coronary artery wall calcification": 0.25,
    "Hiatal hernia": 0.14,
    "Lymphadenopathy": 0.26,
    "Emphysema": 0.19,
    "Atelectasis": 0.26,
    "Lung nodule": 0.45,
    "Lung opacity": 0.37,
    "Pulmonary fibrotic sequela": 0.27,
    "Pleural effusion": 0.12,
    "Mosaic attenuation pattern": 0.08,
    "Peribronchial thickening": 0.10,
    "Consolidation": 0.18,
    "Bronchiectasis": 0.10,
    "Interlobular septal thickening": 0.08,
}
# Diseases that occur together share a hidden factor (our choice); its weight is their correlation.
_COMPANY = {
    "vascular": ("Arterial wall calcification", "Coronary artery wall calcification", "Cardiomegaly",
                 "Medical material", "Hiatal hernia"),
    "airway": ("Emphysema", "Peribronchial thickening", "Bronchiectasis", "Mosaic attenuation pattern",
               "Pulmonary fibrotic sequela"),
    "acute": ("Pleural effusion", "Consolidation", "Lung opacity", "Atelectasis", "Pericardial effusion",
              "Interlobular septal thickening", "Lymphadenopathy"),
}  # fmt: skip
_CORRELATION = 0.4

SITE_CODES = {"a": 0, "b": 1}
# One patient in so many (offset in the roster) is a head CT filed under chest, as in CT-RATE.
HEAD_EVERY, HEAD_OFFSET = 127, 63
_PATIENT, _SCAN, _RECONSTRUCTION = 1, 2, 3


class ScanId(NamedTuple):
    """One volume of the cohort.

    Attributes:
        number: volume number, from 0.
        split: "train" or "valid".
        patient: number of the patient within the split, from 1.
        scan: 0 is CT-RATE's "a".
        reconstruction: from 1.
        seed: (seed, site code, patient number in the roster).
        is_head: a head CT, listed in no_chest.
    """

    number: int
    split: str
    patient: int
    scan: int
    reconstruction: int
    seed: tuple[int, int, int]
    is_head: bool

    @property
    def name(self) -> str:
        """CT-RATE's name: split_patient_scan_reconstruction."""
        return f"{self.split}_{self.patient}_{chr(ord('a') + self.scan)}_{self.reconstruction}"

    @property
    def folder(self) -> str:
        """CT-RATE's folder below train_fixed: ``train_1/train_1_a``."""
        scan = self.name.rsplit("_", 1)[0]
        return f"{scan.rsplit('_', 1)[0]}/{scan}"

    def patient_rng(self, *purpose: int) -> np.random.Generator:
        """Random generator for what stays with the patient."""
        return np.random.default_rng([*self.seed, _PATIENT, *purpose])

    def scan_rng(self, *purpose: int) -> np.random.Generator:
        """Random generator for what all reconstructions of the scan share."""
        return np.random.default_rng([*self.seed, _SCAN, self.scan, *purpose])

    def reconstruction_rng(self, *purpose: int) -> np.random.Generator:
        """Random generator for one volume alone: kernel, noise, field of view."""
        return np.random.default_rng([*self.seed, _RECONSTRUCTION, self.scan, self.reconstruction, *purpose])


def roster(num_volumes: int, seed: int, site: str = "a", valid_share: float = 0.2) -> list[ScanId]:
    """The cohort's first volumes, in order.

    One patient in six has two scans, one scan in four two reconstructions (our choice); patients are assigned
    to the splits evenly, so no patient is in both.

    Args:
        num_volumes: number of volumes; at least 1.
        seed: seed of the cohort; at least 0.
        site: "a" or "b".
        valid_share: share of the patients in the validation split, in [0, 1].

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> [scan.name for scan in roster(5, seed=0, valid_share=0.5)][0]
        'train_1_a_1'
        >>> roster(3, seed=7) == roster(9, seed=7)[:3]
        True
    """
    if num_volumes < 1:
        raise ValueError(f"num_volumes must be at least 1, got {num_volumes}.")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}.")
    if site not in SITE_CODES:
        raise ValueError(f"site must be one of {sorted(SITE_CODES)}, got '{site}'.")
    if not 0 <= valid_share <= 1:
        raise ValueError(f"valid_share must be in [0, 1], got {valid_share}.")
    volumes: list[ScanId] = []
    counts = {"train": 0, "valid": 0}
    patient = 0
    while len(volumes) < num_volumes:
        split = "valid" if int((patient + 1) * valid_share) > int(patient * valid_share) else "train"
        counts[split] += 1
        base = (seed, SITE_CODES[site], patient)
        rng = np.random.default_rng([*base, 0])
        is_head = patient % HEAD_EVERY == HEAD_OFFSET
        for scan in range(1 + int(rng.random() < 1 / 6)):
            for reconstruction in range(1, 2 + int(rng.random() < 1 / 4)):
                number = len(volumes)
                volumes.append(ScanId(number, split, counts[split], scan, reconstruction, base, is_head))
        patient += 1
    return volumes[:num_volumes]


def draw_labels(scan: ScanId) -> dict[str, float]:
    """Draw a scan's diseases.

    Each label has its prevalence exactly; labels that occur together share a factor; acute ones may change
    from one scan of a patient to the next, the rest stay.

    Returns:
        Severity in (0, 1] of each positive label; a head CT has none.
    """
    if scan.is_head:
        return {}
    company = {label: group for group, members in _COMPANY.items() for label in members}
    factors = {
        group: (scan.scan_rng(1) if group == "acute" else scan.patient_rng(index)).standard_normal()
        for index, group in enumerate(_COMPANY)
    }
    found = {}
    for index, label in enumerate(CT_RATE_LABELS):
        group = company.get(label)
        rng = scan.scan_rng(10 + index) if group == "acute" else scan.patient_rng(10 + index)
        alone, severity = rng.standard_normal(), rng.uniform(0.05, 1.0)
        weight = _CORRELATION if group else 0.0
        value = np.sqrt(weight) * factors.get(group or "", 0.0) + np.sqrt(1 - weight) * alone
        if value < NormalDist().inv_cdf(PREVALENCE[label]):
            found[label] = float(severity)
    return found


def draw_fluid(scan: ScanId, labels: dict[str, float]) -> Fluid:
    """Depth of the pleural effusion on either side; (0, 0) without one."""
    rng = scan.scan_rng(2)
    if "Pleural effusion" not in labels:
        return Fluid((0.0, 0.0))
    depth = (8 + 62 * labels["Pleural effusion"] ** 1.5) * rng.uniform(0.6, 1.0, 2)
    sides = ((1, 0), (0, 1), (1, 1))[int(rng.choice(3, p=[0.3, 0.25, 0.45]))]
    return Fluid((float(depth[0] * sides[0]), float(depth[1] * sides[1])))


class Person(NamedTuple):
    """What the metadata say about a patient, and the body that is drawn.

    Attributes:
        sex: "F" or "M".
        age_years: 18 to 92.
        anatomy: the drawn chest.
        pose: size, and position in the scanner.
    """

    sex: str
    age_years: int
    anatomy: Anatomy
    pose: Pose


def draw_person(scan: ScanId, labels: dict[str, float], contrast_prob: float) -> Person:
    """Draw body and position (our choice of ranges: adults; shifts of a few centimetres between scans).

    Args:
        scan: the volume.
        labels: its diseases (:func:`draw_labels`); cardiomegaly sets the heart's size.
        contrast_prob: chance of contrast medium in this scan.
    """
    rng = scan.patient_rng(3)
    female = bool(rng.random() < 0.45)
    height = rng.normal(0.955 if female else 1.03, 0.045)
    width = height * rng.normal(1.0, 0.035)
    fat_mm = float(np.clip(rng.gamma(5.0, 3.6), 6, 42))
    heart = rng.uniform(0.88, 1.07)
    base_dome, fissures = rng.normal(0, 7), rng.normal(0, 8, 2)
    age = int(np.clip(rng.normal(56, 16), 18, 92))
    if "Cardiomegaly" in labels:
        heart = 1.2 + 0.25 * labels["Cardiomegaly"]
    visit = scan.scan_rng(3)
    # Deep or shallow breath moves both halves of the diaphragm together.
    breath = base_dome + visit.normal(0, 7)
    domes = (float(breath + visit.normal(0, 3)), float(breath + visit.normal(0, 3)))
    blood = (42.0, 42.0, 42.0)
    if visit.random() < contrast_prob:
        right = float(visit.uniform(120, 320))
        left = float(visit.uniform(120, 280))
        blood = (right, left, left + float(visit.normal(0, 10)))
    anatomy = Anatomy(
        female=female,
        fat_mm=fat_mm,
        heart_scale=float(heart),
        dome_mm=domes,
        fissure_mm=(float(fissures[0]), float(fissures[1])),
        arms_down=bool(visit.random() < 0.12),
        blood_hu=blood,
        gas_mm=float(visit.uniform(4, 34)),
        seed=(*scan.seed, 9),
    )
    scale = (
        float(np.clip(width, 0.84, 1.16)),
        float(np.clip(width * rng.normal(1, 0.03), 0.84, 1.16)),
        float(height),
    )
    shift = visit.normal(0, [9, 8])
    pose = Pose((float(shift[0]), float(shift[1])), float(np.clip(visit.normal(0, 3), -8, 8)), scale)
    return Person("F" if female else "M", age, anatomy, pose)
