"""Every bundle states what it is, in the form that MONAI's schema and the model cards ask for."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.utils import canonicalize_name

from common.networks.encoder import PAPER_INPUT, SliceInput
from common.transforms.hounsfield import HU_WINDOWS, hu_window

REPOSITORY = Path(__file__).resolve().parents[2]
BUNDLES = sorted(path.parents[1] for path in (REPOSITORY / "bundles").glob("*/configs/metadata.json"))
ENCODERS = [bundle for bundle in BUNDLES if not bundle.name.startswith(("eval_", "finetune_", "report_"))]
VOLUME_ENCODERS = [bundle for bundle in ENCODERS if bundle.name in {"ct_fm", "ct_clip", "merlin", "colipri"}]
SLICE_ENCODERS = [bundle for bundle in ENCODERS if bundle not in VOLUME_ENCODERS]

SCHEMA = json.loads((Path(__file__).parent / "meta_schema.json").read_text(encoding="utf-8"))
HEADINGS = [
    "What it is",
    "Use it",
    "Inputs and outputs",
    "How it was trained",
    "Results",
    "Data and licence",
    "Limits",
    "Citation",
]

each_bundle = pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
each_encoder = pytest.mark.parametrize("bundle", ENCODERS, ids=lambda bundle: bundle.name)
each_slice_encoder = pytest.mark.parametrize("bundle", SLICE_ENCODERS, ids=lambda bundle: bundle.name)
each_volume_encoder = pytest.mark.parametrize("bundle", VOLUME_ENCODERS, ids=lambda bundle: bundle.name)


def metadata_of(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))


def tensors_of(bundle: Path) -> dict[str, dict[str, Any]]:
    network = metadata_of(bundle)["network_data_format"]
    return network["inputs"] | network["outputs"]


@each_bundle
def test_metadata_has_what_the_schema_requires(bundle: Path) -> None:
    jsonschema.validate(metadata_of(bundle), SCHEMA)
    # MONAI renames this key on load, over the required packages
    assert "optional_packages_version" not in metadata_of(bundle)


@each_encoder
def test_network_has_the_names_that_monai_verifies(bundle: Path) -> None:
    network = metadata_of(bundle)["network_data_format"]
    assert "image" in network["inputs"]
    assert "pred" in network["outputs"]


@each_bundle
def test_every_channel_is_defined(bundle: Path) -> None:
    for name, tensor in tensors_of(bundle).items():
        # the dimensions of an embedding have no meaning of their own: one entry describes them together
        count = 1 if tensor["format"] == "latent" else tensor["num_channels"]
        assert list(tensor["channel_def"]) == [str(channel) for channel in range(count)], name


@each_bundle
def test_version_is_in_the_changelogs(bundle: Path) -> None:
    metadata = metadata_of(bundle)
    assert metadata["version"] in metadata["changelog"]
    assert metadata["version"] == max(metadata["changelog"])
    # monai.bundle sorts versions as strings, so that 0.10.0 would count as older than 0.9.0
    assert all(re.fullmatch(r"\d\.\d\.\d", version) for version in metadata["changelog"])
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"`{bundle.name}` {re.escape(metadata['version'])}\b", changes)


@each_bundle
def test_names_agree(bundle: Path) -> None:
    assert re.sub(r"[^a-z0-9]+", "_", metadata_of(bundle)["name"].lower()) == bundle.name


@each_bundle
def test_versions_are_those_of_the_requirements(
    bundle: Path, pinned: Callable[[str], dict[str, str]]
) -> None:
    metadata, pins = metadata_of(bundle), pinned("requirements.txt")
    assert metadata["monai_version"] == pins["monai"]
    assert metadata["pytorch_version"] == pins["torch"]
    assert metadata["numpy_version"] == pins["numpy"]
    stated = {
        canonicalize_name(name): version for name, version in metadata["required_packages_version"].items()
    }
    assert stated.items() <= pins.items()


@each_bundle
def test_model_card_has_its_eight_headings(bundle: Path) -> None:
    card = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", card, re.M) == HEADINGS


@each_bundle
def test_licences_are_there(bundle: Path) -> None:
    assert (bundle / "LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()
    assert (bundle / "docs" / "data_license.txt").read_text(encoding="utf-8").strip()


def large_files_of(text: str) -> list[dict[str, str]]:
    """Return the entries of a ``large_files.yml``, each of which MONAI can download and check."""
    content = yaml.safe_load(text)
    assert set(content) == {"large_files"}
    for file in content["large_files"]:
        assert set(file) == {"path", "url", "hash_type", "hash_val"}, file
        assert re.fullmatch(r"models/[\w.-]+", file["path"]), file
        assert file["url"].startswith("https://"), file
        assert file["hash_type"] == "sha256", file
        assert re.fullmatch(r"[0-9a-f]{64}", file["hash_val"]), file
    return content["large_files"]


@each_bundle
def test_large_files_can_be_fetched_and_checked(bundle: Path) -> None:
    listing = bundle / "large_files.yml"
    if not listing.exists():
        assert bundle not in ENCODERS
        return
    text = listing.read_text(encoding="utf-8")
    # a bundle without weights says in a comment where they come from
    assert large_files_of(text) or text.startswith("#")


@each_bundle
def test_a_bundle_holds_the_files_of_the_model_zoo_and_nothing_large(bundle: Path) -> None:
    ignored = {"models", "runs", "embeddings", "predictions"}  # what runs write; git ignores it
    files = {
        path.relative_to(bundle).as_posix(): path.stat().st_size
        for path in bundle.rglob("*")
        if path.is_file() and path.relative_to(bundle).parts[0] not in ignored
    }
    assert {"LICENSE", "configs/metadata.json", "configs/logging.conf", "docs/README.md"} <= files.keys()
    assert max(files.values()) < 500_000, "weights and volumes belong in large_files.yml"
    strange = [
        name for name in files if Path(name).suffix not in {"", ".json", ".conf", ".md", ".txt", ".yml"}
    ]
    assert not strange


@each_encoder
def test_inference_config_has_what_the_model_zoo_asks_for(bundle: Path) -> None:
    config = json.loads((bundle / "configs" / "inference.json").read_text(encoding="utf-8"))
    wanted = {"bundle_root", "device", "dataset_dir", "dataset", "evaluator", "network_def", "inferer"}
    assert wanted | {"output_dir"} <= config.keys()


def test_every_bundle_folder_has_metadata() -> None:
    folders = {
        path for path in (REPOSITORY / "bundles").iterdir() if path.is_dir() and path.name[0] not in "_."
    }
    assert folders == set(BUNDLES)


@each_slice_encoder
def test_encoder_states_the_input_that_its_weights_make_sense_with(bundle: Path) -> None:
    metadata, image = metadata_of(bundle), tensors_of(bundle)["image"]
    window = metadata["hu_window"]
    assert (
        tuple(window[key] for key in ("min_hu", "max_hu", "mean_hu", "std_hu")) == HU_WINDOWS[window["name"]]
    )
    span = [(window[end] - window["mean_hu"]) / window["std_hu"] for end in ("min_hu", "max_hu")]
    assert image["value_range"] == pytest.approx(span, abs=5e-4)
    assert metadata["slice_axes"] in {"yx", "xy"}
    assert image["spatial_shape"] == [f"{metadata['patch_size_px']}*n"] * 2
    assert metadata["image_size_px"] % metadata["patch_size_px"] == 0


@each_slice_encoder
def test_metadata_and_inference_config_agree(bundle: Path) -> None:
    metadata = metadata_of(bundle)
    config = json.loads((bundle / "configs" / "inference.json").read_text(encoding="utf-8"))
    assert config["name"] == bundle.name
    assert config["hu_window"] is config["slice_axes"] is None  # as is known of the weights
    weights = metadata["weights"]
    assert config["weights_repo"] == weights["repository"]
    assert config["weights_name"] == weights["file"]
    assert config["weights_licence"] == weights["licence"] == "CC-BY-NC-SA-4.0"
    assert config["weights_slice_axes"] == weights["slice_axes"] == "xy"
    assert config["weights_hu_window"] == weights["hu_window"]
    is_trained_here = (bundle / "configs" / "train.json").is_file()
    own = PAPER_INPUT if is_trained_here else SliceInput("xy", hu_window(weights["hu_window"]))
    assert own == (metadata["slice_axes"], hu_window(metadata["hu_window"]["name"]))
    assert config["patch_size_px"] == metadata["patch_size_px"]
    assert config["strategies"] == [f"cropped_{metadata['image_size_px']}"]
    assert config["embed_dim"] == metadata["network_data_format"]["outputs"]["pred"]["num_channels"]


@each_volume_encoder
def test_volume_encoder_and_its_inference_config_agree(bundle: Path) -> None:
    metadata, image = metadata_of(bundle), tensors_of(bundle)["image"]
    config = json.loads((bundle / "configs" / "inference.json").read_text(encoding="utf-8"))
    assert config["name"] == bundle.name
    assert image["value_range"] == config["value_range"]  # and see test_volume_geometry.py
    assert metadata["weights"]["repository"] == (
        "datasets/" * (config["weights_repo_type"] == "dataset") + config["weights_repo"]
    )
    assert metadata["weights"]["file"] == config["weights_name"]
    assert metadata["weights"]["licence"] == config["weights_licence"]


@each_slice_encoder
def test_card_says_whose_weights_are_downloaded_and_where_they_can_be_placed(bundle: Path) -> None:
    card = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    weights = metadata_of(bundle)["weights"]
    url = f"https://huggingface.co/{weights['repository']}"
    for words in (url, f"{url}/resolve/main/{weights['file']}", weights["licence"], "not run here"):
        assert words in card
    assert f"bundles/{bundle.name}/models/{weights['file']}" in card
    terms = (bundle / "docs" / "data_license.txt").read_text(encoding="utf-8")
    assert weights["repository"] in terms
    assert weights["licence"] in terms


@each_volume_encoder
def test_volume_encoder_says_what_is_free_and_what_was_not_run(bundle: Path) -> None:
    card = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    assert "not run here" in card
    terms = (bundle / "docs" / "data_license.txt").read_text(encoding="utf-8")
    for word in ("Code", "Weights", "Data", metadata_of(bundle)["weights"]["licence"]):
        assert word in terms
