"""A small bundle of an encoder of volumes."""

import json
import shutil
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def small_volume_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COLIPRI with a network of two blocks, on volumes of 32 x 40 x 24 voxels: a grid of 4 x 5 x 3."""
    folder = tmp_path_factory.mktemp("bundles") / "colipri"
    shutil.copytree(REPOSITORY / "bundles" / "colipri", folder)
    path = folder / "configs" / "inference.json"
    config = json.loads(path.read_text())
    config["size_vox"] = [32, 40, 24]
    config["network_def"] |= {"embed_dim": 36, "latent_dim": 24, "num_pool_heads": 2}
    config["network_def"]["backbone"] |= {"embed_dim": 36, "depth": 2, "num_heads": 2}
    path.write_text(json.dumps(config))
    return folder
