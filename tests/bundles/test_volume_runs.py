"""The 3D baselines as users run them, small and with random weights: from a CT to a trained probe."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import typer
from monai.bundle import ConfigWorkflow, verify_net_in_out
from typer.testing import CliRunner

from common.cohort.cohort import load_labels
from common.embeddings.store import EmbeddingStore
from common.engines import neighbour_probe
from common.reports.results import read_rows
from common.run.config import first_cause

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
SMALL = {
    "ct_fm": {"network_def::init_filters": 2, "size_vox": [24, 96, 96]},
    "ct_clip": {
        "size_vox": [40, 60, 80],
        "network_def::grid_size": [3, 4],
        "network_def::dim": 16,
        "network_def::latent_dim": 8,
        "network_def::visual_transformer::dim": 16,
        "network_def::visual_transformer::num_heads": 2,
        "network_def::visual_transformer::codebook_size": 64,
    },
    "merlin": {
        "size_vox": [32, 64, 96],
        "network_def::layers": [1, 1, 1, 1],
        "network_def::block_planes": [2, 4, 6, 8],
    },
    "colipri": {
        "size_vox": [32, 40, 24],
        "network_def::embed_dim": 36,
        "network_def::latent_dim": 24,
        "network_def::num_pool_heads": 2,
        "network_def::backbone::embed_dim": 36,
        "network_def::backbone::depth": 2,
        "network_def::backbone::num_heads": 2,
    },
}
# grid of tokens, and their width
GIVEN = {
    "ct_fm": (None, 32),
    "ct_clip": ([4, 3, 4], 16),
    "merlin": ([2, 2, 3], 32),
    "colipri": ([4, 5, 3], 36),
}
each_bundle = pytest.mark.parametrize("bundle", SMALL)
Workflow = Callable[..., ConfigWorkflow]


@pytest.fixture
def embedding(workflow: Workflow) -> Workflow:
    """Return a prepared run of a small bundle with random weights."""
    small = {"encoder_weights": None, "num_workers": 0, "embedding_dtype": "float32"}

    def make(bundle: str, ct: Path, out: Path, **knobs) -> ConfigWorkflow:
        places = {"dataset_dir": ct, "output_dir": out}
        return workflow(bundle, "inference", **places, **small | SMALL[bundle] | knobs)

    return make


def random_ct(path: Path, seed: int, axcodes: str = "LPS") -> Path:
    """An asymmetric body in air, 144 x 132 x 96 mm, stored in any order of axes."""
    rng = np.random.default_rng(seed)
    hu = np.full((48, 44, 32), -1000, np.int16)
    hu[6:44, 6:40] = rng.integers(-100, 200, (38, 34, 32))
    hu[12:20, 10:30, 2:19] = -850
    image = nib.Nifti1Image(hu, np.diag([-3.0, -3.0, 3.0, 1.0]))
    target = nib.orientations.axcodes2ornt(axcodes)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(
        image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), target)), path
    )
    return path


@each_bundle
def test_a_ct_becomes_a_bag_with_its_grid(bundle, embedding, tmp_path):
    run = embedding(bundle, random_ct(tmp_path / "ct" / "valid_1_a_1.nii.gz", 0), tmp_path / "out")
    assert run.check_properties() == []
    assert [source.volume for source in run.dataset] == ["valid_1_a_1"]
    run.run()
    store = EmbeddingStore(tmp_path / "out")
    bag = store.read("valid_1_a_1")
    grid, width = GIVEN[bundle]
    assert bag.tokens.shape == (np.prod(bag.metadata["grid_shape"]), width)
    assert grid in (None, bag.metadata["grid_shape"])
    assert bag.metadata["axcodes"] == run.parser["axcodes"]
    assert bag.metadata["spacing_mm"] == pytest.approx([3.0, 3.0, 3.0])
    assert store.identity["encoder"] == bundle
    assert store.identity["encoder_id"] == "random:42"
    assert store.identity["token_kind"] == "grid"
    with torch.no_grad():
        (batch,) = run.parser.get_parsed_content("dataloader")
        expected, _ = run.inferer(batch["image"], run.network_def)
    torch.testing.assert_close(bag.tokens, expected[0].flatten(1).T, rtol=1e-5, atol=1e-5)
    assert len(torch.unique(bag.tokens, dim=0)) > 1


@each_bundle
def test_the_orientation_of_storage_changes_no_token_and_done_volumes_are_left(bundle, embedding, tmp_path):
    for axcodes in ("LPS", "RAS", "SPL"):
        random_ct(tmp_path / "ct" / f"{axcodes}.nii.gz", 0, axcodes)
    embedding(bundle, tmp_path / "ct", tmp_path / "out").run()
    store = EmbeddingStore(tmp_path / "out")
    lps, *others = (store.read(axcodes).tokens for axcodes in ("LPS", "RAS", "SPL"))
    for other in others:
        torch.testing.assert_close(other, lps, rtol=0, atol=1e-5 * float(lps.abs().max()))
    assert len(embedding(bundle, tmp_path / "ct", tmp_path / "out").dataset) == 0


@pytest.mark.parametrize(
    ("bundle", "knob", "value", "name"),
    [
        (
            "ct_clip",
            "network_def::visual_transformer::tokens",
            "before_codes",
            "slp_1.5x0.75x0.75mm_40x60x80_-1000..1000HU_-1..1_before_codes",
        ),
        (
            "colipri",
            "network_def::tokens",
            "projected",
            "ras_2x2x2mm_32x40x24_-1000..1000HU_-1..1_projected",
        ),
        ("colipri", "hu_range", [-500, 500], "ras_2x2x2mm_32x40x24_-500..500HU_-1..1_backbone"),
        ("ct_fm", "inferer::overlap", 0.5, "spl_3x1x1mm_24x96x96_-1024..2048HU_0..1_windows_0.5"),
    ],
)
def test_other_tokens_and_windows_go_by_another_name_into_another_store(
    bundle, knob, value, name, embedding, tmp_path
):
    ct = random_ct(tmp_path / "ct" / "a.nii.gz", 0)
    embedding(bundle, ct, tmp_path / "other", **{knob: value}).run()
    assert EmbeddingStore(tmp_path / "other").identity["preprocessing"] == name
    second = random_ct(tmp_path / "ct" / "b.nii.gz", 1)
    with pytest.raises(Exception, match="handlers") as caught:
        embedding(bundle, second, tmp_path / "other").evaluator  # noqa: B018 (resolves the config)
    assert "preprocessing of" in str(first_cause(caught.value))


def test_every_protocol_takes_the_bags_as_they_are(embedding, workflow, tmp_path):
    classes = [label.name for label in load_labels("ct_rate")]
    labels_dir = tmp_path / "ct_rate" / "dataset" / "multi_abnormality_labels"
    labels_dir.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, num_volumes in (("train", 12), ("valid", 6)):
        rows = [",".join(["VolumeName", *classes])]
        for index in range(num_volumes):
            volume = f"{split}_{index + 1}_a_1"
            random_ct(tmp_path / "ct" / split / f"{volume}.nii.gz", index)
            labels = (np.arange(len(classes)) + index) % 2 if index < 2 else rng.integers(0, 2, len(classes))
            rows.append(",".join([f"{volume}.nii.gz", *map(str, labels)]))
        (labels_dir / f"{split}_predicted_labels.csv").write_text("\n".join(rows) + "\n")
        embedding("merlin", tmp_path / "ct" / split, tmp_path / "embeddings" / split).run()
    paths = {"dataset_dir": "ct_rate", "embeddings_dir": "embeddings", "output_dir": "probe"}
    settings = {name: tmp_path / path for name, path in paths.items()} | {"encoder": "merlin"}
    settings |= {
        "num_val_patients": 4,
        "max_steps": 4,
        "val_interval": 2,
        "checkpoint_every": 4,
        "log_every": 2,
    }
    workflow("eval_ct_rate", "train", **settings).run()
    rows = [row for row in read_rows(tmp_path / "results.csv") if row.encoder == "merlin"]
    assert {"macro_auroc", "macro_auprc"} <= {row.metric for row in rows}
    assert {row.n for row in rows if row.metric == "macro_auprc"} == {6}
    retrieve_and_transfer(embedding, workflow, labels_dir, tmp_path)


def retrieve_and_transfer(embedding: Workflow, workflow: Workflow, labels_dir: Path, folder: Path) -> None:
    """Neighbours of the bags, and the probe frozen on volumes of the other data set."""
    arguments = ["--num-val-patients", "4", "--num-resamples", "20", "--k", "1", "--tracking-uri"]
    arguments += [f"sqlite:///{folder}/mlflow.db", "--results-csv", str(folder / "neighbours.csv")]
    for side, split in (("train", "train"), ("test", "valid")):
        arguments += [f"--{side}-embeddings", str(folder / "embeddings" / split)]
        arguments += [f"--{side}-labels", str(labels_dir / f"{split}_predicted_labels.csv")]
    app = typer.Typer()
    app.command()(neighbour_probe.main)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "retrieval" in {row.protocol for row in read_rows(folder / "neighbours.csv")}

    classes = [label.name for label in load_labels("rad_chestct")]
    rows = [",".join(["VolumeName", *classes])]
    for index in range(4):
        random_ct(folder / "rad" / f"tst{index:05d}.nii.gz", index)
        rows.append(
            ",".join([f"tst{index:05d}", *(str((index + place) % 2) for place in range(len(classes)))])
        )
    (folder / "rad.csv").write_text("\n".join(rows) + "\n")
    embedding("merlin", folder / "rad", folder / "embeddings" / "rad").run()
    paths = {"test_embeddings_dir": "embeddings/rad", "labels_csv": "rad.csv"}
    paths |= {"results_csv": "rad_results.csv", "frozen_probe": "probe", "retrained_probe": "probe"}
    settings = {name: folder / path for name, path in paths.items()}
    workflow("eval_rad_chestct", "evaluate", **settings, encoder="merlin", num_resamples=20).run()
    frozen = [row for row in read_rows(folder / "rad_results.csv") if row.protocol == "frozen"]
    assert {row.encoder for row in frozen} == {"merlin"}
    assert {row.n for row in frozen} == {4}


@each_bundle
def test_without_weights_the_first_cause_says_which_file_to_place_where(bundle, embedding, tmp_path):
    """The first cause is the one line that users see; tests run with HF_HUB_OFFLINE."""
    where = str(tmp_path / "weights.pt")
    knobs = {"bundle_weights": where, "encoder_weights": "@bundle_weights"}
    run = embedding(bundle, random_ct(tmp_path / "a.nii.gz", 0), tmp_path / "out", **knobs)
    with pytest.raises(RuntimeError) as caught:
        run.run()
    cause = first_cause(caught.value)
    assert isinstance(cause, FileNotFoundError)
    assert str(cause).endswith(f"/resolve/main/{run.parser['weights_name']} and save it as '{where}'.")


@each_bundle
def test_the_whole_network_takes_and_gives_what_the_metadata_say(bundle):
    configs = BUNDLES / bundle / "configs"
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        device="cpu",
        bundle_root=str(BUNDLES / bundle),
    )


@pytest.mark.real_ct
@each_bundle
def test_a_real_ct_becomes_finite_tokens(bundle, embedding, real_ct_dir, tmp_path):
    small = {"size_vox": [24, 128, 128]} if bundle == "ct_fm" else {}
    ct = real_ct_dir / "totalseg_example_ct_sm_3mm.nii.gz"
    embedding(bundle, ct, tmp_path / "out", **small).run()
    bag = EmbeddingStore(tmp_path / "out").read("totalseg_example_ct_sm_3mm")
    assert bag.tokens.std(0).max() > 0
    if bundle == "ct_fm":
        # 90 x 303 x 366 mm: windows of 24 slices every 9, of 128 pixels every 48, the last padded
        assert bag.metadata["grid_shape"] == [2, 5, 6]
