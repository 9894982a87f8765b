"""The truth of a synthetic cohort in the form of embeddings: a ceiling to hold encoders against."""

import json
from pathlib import Path

import torch

from common.embeddings.store import EmbeddingStoreWriter, stored_volumes
from data_prep.phantom.files import rad_name, sidecar_path
from data_prep.phantom.population import CT_RATE_LABELS, roster

IDENTITY = {
    **{"encoder": "lesion_areas", "encoder_id": "phantom:truth", "weights": "none"},
    **{"preprocessing": "lesion_areas", "slice_order": "feet_to_head", "token_kind": "slice"},
}


def write_lesion_areas(root: Path, out: Path, split: str | None) -> int:
    """Write the area in cm2 that was drawn of each CT-RATE label into each slice, as tokens ``(S, 18)``.

    No image is looked at. Volumes of site b have RAD-ChestCT's names. What is stored already stays.

    Args:
        root: a finished cohort of :func:`data_prep.phantom.cohort.write_cohort`.
        out: folder of the store.
        split: "train" or "valid"; None for both.

    Returns:
        Number of volumes in the store.

    Raises:
        FileNotFoundError: if the folder holds no cohort, or not all of it.
        ValueError: if it was drawn by an earlier version, which kept no areas.
    """
    settings = json.loads((root / "cohort.json").read_text(encoding="ascii"))
    is_rad = settings["site"] == "b"
    known = {name: settings[name] for name in ("seed", "site", "valid_share")}
    done = stored_volumes(out)
    with EmbeddingStoreWriter(out, IDENTITY, "float32") as writer:
        for scan in roster(settings["num_volumes"], **known):
            volume = rad_name(scan) if is_rad else scan.name
            if volume in done or split not in (None, scan.split) or (is_rad and scan.is_head):
                continue
            record = json.loads(sidecar_path(root, scan).read_text(encoding="ascii"))
            x_mm, y_mm, z_mm = record["spacing_mm"]
            areas = torch.zeros(record["shape"][0], len(CT_RATE_LABELS))
            for finding in record["findings"]:
                if "area_px" not in finding:
                    raise ValueError(f"'{root}' was drawn by an earlier version. Draw it again elsewhere.")
                area, first = torch.tensor(finding["area_px"]), finding["first_slice"]
                areas[first : first + len(area), CT_RATE_LABELS.index(finding["label"])] += area
            writer.add(
                volume, areas * (x_mm * y_mm / 100), (x_mm, y_mm, z_mm), z_mm=z_mm * torch.arange(len(areas))
            )
            done.add(volume)
    return len(done)
