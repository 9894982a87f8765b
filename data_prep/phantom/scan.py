"""Renders one synthetic volume from its identity: body, diseases, scanner."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.phantom import findings as of_chest
from data_prep.phantom import lung_findings as of_lungs
from data_prep.phantom.anatomy import lung_points
from data_prep.phantom.body import draw_body, draw_skeleton
from data_prep.phantom.canvas import Canvas
from data_prep.phantom.grid import Pose
from data_prep.phantom.lungs import draw_airways, draw_vessels, grow_tree
from data_prep.phantom.organs import draw_abdomen, draw_head, draw_mediastinum
from data_prep.phantom.population import CT_RATE_LABELS, Person, ScanId, draw_fluid, draw_labels, draw_person
from data_prep.phantom.scanner import (
    SITES,
    Protocol,
    Redraw,
    acquire,
    draw_protocol,
    draw_table,
    redrawn,
    scan_grid,
)
from data_prep.phantom.scene import Drawer, Finding, Scene

# In drawing order: fluid first, since no lung lies in it; dense findings after faint ones.
DRAWERS: dict[str, Drawer] = {
    "Cardiomegaly": of_chest.draw_cardiomegaly,
    "Pleural effusion": of_chest.draw_pleural_effusion,
    "Mosaic attenuation pattern": of_lungs.draw_mosaic,
    "Emphysema": of_lungs.draw_emphysema,
    "Lung opacity": of_lungs.draw_opacity,
    "Interlobular septal thickening": of_lungs.draw_septal,
    "Peribronchial thickening": of_lungs.draw_peribronchial,
    "Bronchiectasis": of_lungs.draw_bronchiectasis,
    "Pulmonary fibrotic sequela": of_lungs.draw_fibrosis,
    "Consolidation": of_lungs.draw_consolidation,
    "Atelectasis": of_lungs.draw_atelectasis,
    "Lung nodule": of_lungs.draw_nodules,
    "Hiatal hernia": of_chest.draw_hiatal_hernia,
    "Pericardial effusion": of_chest.draw_pericardial_effusion,
    "Lymphadenopathy": of_chest.draw_lymphadenopathy,
    "Arterial wall calcification": of_chest.draw_arterial_calcification,
    "Coronary artery wall calcification": of_chest.draw_coronary_calcification,
    "Medical material": of_chest.draw_medical_material,
}


AS_IT_IS = Redraw()


class Volume(NamedTuple):
    """A rendered volume; arrays ``(Z, Y, X)``, feet to head, rows to the back, columns to the patient's left.

    Attributes:
        scan: identity.
        person: the patient.
        protocol: spacing and storage.
        labels: severity of each positive label.
        hu: int16.
        ts: uint8, TotalSegmentator ids.
        findings: what was drawn.
    """

    scan: ScanId
    person: Person
    protocol: Protocol
    labels: dict[str, float]
    hu: NDArray[np.int16]
    ts: NDArray[np.uint8]
    findings: list[Finding]


def describe(
    scan: ScanId,
    site: str,
    matrix: int,
    slice_mm: tuple[float, float] | None,
    labels: dict[str, float] | None = None,
    redraw: Redraw = AS_IT_IS,
) -> tuple[dict[str, float], Person, Protocol]:
    """Labels, patient and protocol of a volume, without rendering it (arguments as in :func:`render`)."""
    drawn = draw_labels(scan) if labels is None else labels
    person = draw_person(scan, drawn, SITES[site].contrast_prob)
    if scan.is_head:
        person = person._replace(pose=Pose(person.pose.shift_mm, person.pose.rotation_deg, (1.0, 1.0, 1.0)))
    protocol = redrawn(draw_protocol(scan, person, SITES[site], matrix, slice_mm), redraw)
    if scan.is_head:
        protocol = protocol._replace(bottom_mm=-110.0, num_slices=max(2, round(225 / protocol.slice_mm)))
    return drawn, person, protocol


def render(
    scan: ScanId,
    site: str = "a",
    matrix: int = 512,
    slice_mm: tuple[float, float] | None = None,
    labels: dict[str, float] | None = None,
    redraw: Redraw = AS_IT_IS,
) -> Volume:
    """Render a volume.

    Args:
        scan: from :func:`data_prep.phantom.population.roster`.
        site: "a" or "b".
        matrix: rows and columns. CT-RATE: 512.
        slice_mm: range of the slice distance; None for the site's own.
        labels: severities to draw instead of the scan's own; all else stays the same.
        redraw: what of the scanner is drawn otherwise.
    """
    drawn, person, protocol = describe(scan, site, matrix, slice_mm, labels, redraw)
    canvas = Canvas(scan_grid(protocol, person, matrix))
    findings: list[Finding] = []
    if scan.is_head:
        draw_head(canvas)
    else:
        findings = _draw_chest(canvas, scan, person, drawn)
    if redraw.table:
        draw_table(canvas, person, protocol.table_curve_mm)
    hu = acquire(canvas, protocol, scan.reconstruction_rng(2))
    return Volume(scan, person, protocol, drawn, hu, canvas.labels, findings)


def _draw_chest(canvas: Canvas, scan: ScanId, person: Person, labels: dict[str, float]) -> list[Finding]:
    anatomy = person.anatomy
    abdomen = draw_body(canvas, anatomy)
    draw_skeleton(canvas, anatomy)
    draw_abdomen(canvas, anatomy, abdomen)
    draw_mediastinum(canvas, anatomy)
    tree = grow_tree(anatomy)
    draw_vessels(canvas, anatomy, tree)
    draw_airways(canvas, anatomy, tree)
    fluid = draw_fluid(scan, labels)
    around = lung_points(anatomy, scan.scan_rng(5), 64, 0.8)
    dry = around[~fluid.contains(*around.T.astype(np.float32))]
    scene = Scene(canvas, anatomy, tree, fluid, dry[0])
    findings: list[Finding] = []
    for label, draw in DRAWERS.items():
        if label in labels:
            findings += draw(scene, scan.scan_rng(6, CT_RATE_LABELS.index(label)), labels[label])
    return [finding for finding in findings if finding.region.num_voxels()]
