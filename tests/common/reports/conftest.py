"""A small CT on disk, and an encoder bundle to look at it with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from common.cohort.cohort import load_labels
from common.embeddings.encoder_bundle import EncoderBundle
from common.networks.mil_probe import save_probe
from common.reports.commands import app
from common.reports.ct_tokens import open_slice_encoder

BUNDLE = Path(__file__).resolve().parents[3] / "bundles" / "dale_ct_2s"
SMALL = {"img_size_px": 32, "patch_size_px": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SMALL |= {"amp_dtype": "float32", "strategies": ["cropped_32"], "layer_scale_init": 1.0}


@pytest.fixture
def ct_path(tmp_path: Path) -> Path:
    """A body off the middle, brighter from slice to slice, with a bright block; stored RAS."""
    hu = np.full((60, 50, 9), -1000, np.int16)
    hu[9:50, 4:45] = np.arange(9) * 20
    hu[12:22, 8:16, 3:6] = 900  # stored RAS: to the right and in front
    path = tmp_path / "scan_1.nii.gz"
    nib.save(nib.Nifti1Image(hu[::-1, ::-1], np.diag([0.7, 0.7, 2.5, 1.0])), path)
    return path


@pytest.fixture
def probes(tmp_path: Path) -> Path:
    """Patch probes of the small encoder for both tasks."""
    torch.manual_seed(0)
    for task in ("rexgroundingct", "totalsegmentator"):
        names = [label.name for label in load_labels(task)]
        card = {"class_names": names, "encoder": "dale_ct_2s"}
        save_probe(tmp_path / "probes", torch.nn.Linear(24, len(names)), card, f"patch_{task}")
    return tmp_path / "probes"


@pytest.fixture
def bundle() -> Path:
    return BUNDLE


@pytest.fixture
def open_small(tmp_path: Path) -> Callable[..., EncoderBundle]:
    """Open a ViT of four patches by four, with random weights of one seed; keywords change its config."""

    def opened(**changes: Any) -> EncoderBundle:
        path = tmp_path / "small.json"
        path.write_text(json.dumps(SMALL | changes))
        return open_slice_encoder(BUNDLE, "random", [path])

    return opened


@pytest.fixture
def draw(tmp_path: Path) -> Callable[..., Result]:
    """Run a picture command with the small encoder's options behind the given words."""

    def run(*words: object) -> Result:
        path = tmp_path / "small.json"
        path.write_text(json.dumps(SMALL))
        options = ["--bundle", BUNDLE, "--weights", "random", "--overrides", path]
        return CliRunner().invoke(app, [str(word) for word in (*words, *options)])

    return run
