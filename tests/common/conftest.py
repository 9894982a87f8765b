"""A cohort of random embeddings with labels, written as the encoder bundles write them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from common.data.embeddings import write_embedding

CLASSES = ["Emphysema", "Lung nodule", "Pleural effusion"]

WriteCohort = Callable[..., tuple[Path, Path]]


@pytest.fixture
def write_cohort(tmp_path: Path) -> WriteCohort:
    """Return ``write(split, num_volumes, ...) -> (embeddings_dir, labels_csv)``.

    Class c of a volume shows as a shift of a third of its slices along dimension c.
    """

    def write(
        split: str,
        num_volumes: int,
        dim: int = 7,
        signal: float = 0.0,
        classes: Sequence[str] = CLASSES,
        encoder: str = "dale_ct_2s",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        labels: np.ndarray | None = None,
    ) -> tuple[Path, Path]:
        rng = np.random.default_rng(seed)
        folder = tmp_path / "embeddings" / split
        if labels is None:
            labels = (rng.random((num_volumes, len(classes))) < 0.4).astype(int)
        rows = [",".join(["VolumeName", *classes])]
        for index, row in enumerate(labels):
            volume = f"{split}_{index // 2 + 1}_{'ab'[index % 2]}_1"
            cls = torch.from_numpy(rng.standard_normal((int(rng.integers(3, 12)), dim)))
            for place, present in enumerate(row):
                cls[: len(cls) // 3 + 1, place] += signal * float(present)
            write_embedding(
                folder / f"{volume}.safetensors",
                cls.to(dtype),
                torch.arange(len(cls)) * 1.5,
                {
                    "volume": volume,
                    "encoder": encoder,
                    "encoder_id": f"sha256:{encoder}",
                    "preprocessing": "cropped_256",
                    "spacing_mm": "[0.7, 0.7, 1.5]",
                    "slice_order": "feet_to_head",
                },
            )
            rows.append(",".join([f"{volume}.nii.gz", *map(str, row)]))
        labels_csv = tmp_path / f"{split}_labels.csv"
        labels_csv.write_text("\n".join(rows) + "\n")
        return folder, labels_csv

    return write
