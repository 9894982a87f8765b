"""Evaluation on another institution, of a preprocessing strategy, and by overlays, as users run them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from common.cohort.class_map import class_map
from common.cohort.cohort import load_labels
from common.embeddings.store import EmbeddingStoreWriter
from common.networks.mil_probe import load_probe, save_probe
from common.networks.poolers import POOLERS, GatedAttentionPool, build_pooler, pad_bags
from common.reports.results import read_rows

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
CT_RATE, RAD = ([label.name for label in load_labels(name)] for name in ("ct_rate", "rad_chestct"))
SCHEDULE = {"max_steps": 30, "val_interval": 10, "checkpoint_every": 10, "log_every": 10, "num_seeds": 1}
SCHEDULE |= {"num_resamples": 50, "poolers": ["average", "max"], "learning_rates": [0.1]}
HANDLERS = json.loads((BUNDLES / "eval_ct_rate" / "configs" / "train.json").read_text())["train"]["handlers"]
PLACE_OF_REPORT = [handler["_target_"].rsplit(".", 1)[1] for handler in HANDLERS].index("ProbeReport")


def embed(folder: Path, labels: dict[str, np.ndarray], preprocessing: str = "cropped_256") -> None:
    """Embeddings whose dimension c is raised in all slices of a volume with label c."""
    rng = np.random.default_rng(len(labels))
    identity = {
        "encoder": "dale_ct_2s",
        "encoder_id": "x",
        "slice_order": "feet_to_head",
        "token_kind": "slice",
    }
    with EmbeddingStoreWriter(folder, identity | {"preprocessing": preprocessing}, "float16") as writer:
        for volume, positive in labels.items():
            tokens = rng.standard_normal((int(rng.integers(3, 9)), 23))
            tokens[:, :18] += 2 * positive
            z_mm = 2.0 * torch.arange(len(tokens))
            writer.add(volume, torch.from_numpy(tokens), (0.8, 0.8, 2.0), z_mm=z_mm)


def write_labels(path: Path, names: list[str], labels: dict[str, list[int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [",".join(["VolumeName", *names])]
    rows += [",".join([volume, *map(str, values)]) for volume, values in labels.items()]
    path.write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both sites, embedded by one encoder, where the bundles look for them."""
    root, rng = tmp_path_factory.mktemp("sites"), np.random.default_rng(0)
    for split, num_volumes in (("train", 60), ("valid", 20)):
        labels = {
            f"{split}_{index // 2 + 1}_a_{index % 2 + 1}": (rng.random(18) < 0.4).astype(int)
            for index in range(num_volumes)
        }
        embed(root / "dale_ct_2s" / "embeddings" / split, labels)
        folder = root / "ct_rate" / "dataset" / "multi_abnormality_labels"
        write_labels(folder / f"{split}_predicted_labels.csv", CT_RATE, {v: [*y] for v, y in labels.items()})
    names = [f"trn{n:05d}" for n in range(40)] + [f"val{n:05d}" for n in range(12)]
    names += [f"tst{n:05d}" for n in range(24)]
    labels = {name: (rng.random(18) < 0.4).astype(int) for name in names}
    embed(root / "dale_ct_2s" / "embeddings" / "rad_chestct", labels)
    rows = class_map(CT_RATE, RAD)
    rad = {name: [int(y[places].max()) for places in rows] for name, y in labels.items()}
    write_labels(root / "rad" / "rad_chestct_labels.csv", RAD, rad)
    return root


@pytest.fixture(autouse=True)
def _excepthook_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


Run = Callable[..., ConfigWorkflow]


@pytest.fixture
def run(cohort: Path, tmp_path: Path) -> Run:
    def make(bundle: str, config: str = "train", overlay: str | None = None, **knobs: Any) -> ConfigWorkflow:
        settings = {
            "bundle_root": str(BUNDLES / bundle),
            "encoder_bundle": str(cohort / "dale_ct_2s"),
            "dataset_dir": str(cohort / ("rad" if bundle == "eval_rad_chestct" else "ct_rate")),
            "results_csv": str(tmp_path / "results.csv"),
            "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db",
        }
        if config == "train":
            settings |= SCHEDULE | {"output_dir": str(tmp_path / bundle)}
            # its pictures take seconds: one run draws them
            settings[f"train::handlers::{PLACE_OF_REPORT}::_disabled_"] = overlay != "gated_abmil"
        files = [str(BUNDLES / bundle / "configs" / f"{config}.json")]
        files += [str(BUNDLES / "_overlays" / "probe" / f"{overlay}.json")] if overlay else []
        workflow = ConfigWorkflow(files, workflow_type="train", logging_file=False, **settings | knobs)
        workflow.initialize()
        workflow.run()
        return workflow

    return make


def save(trainer: Any, folder: Path) -> None:
    """Write the chosen probe as the report does."""
    identity = {name: value for name, value in trainer.test_bags.identity.items() if name != "dtype"}
    card = {
        "pooler": trainer.grid.names[trainer.best.index][0],
        "class_names": trainer.test_bags.class_names,
        "thresholds": trainer.best.thresholds.tolist(),
    }
    save_probe(folder, trainer.chosen_probe(), card | identity)


def values_of(path: Path) -> dict[tuple[str, str], float]:
    return {(row.protocol, row.metric): row.value for row in read_rows(path) if row.encoder == "dale_ct_2s"}


def test_a_probe_of_one_site_is_tested_frozen_beside_one_of_the_other(run: Run, tmp_path: Path) -> None:
    other = run("eval_ct_rate", num_val_patients=8, results_csv=str(tmp_path / "other.csv")).trainer
    trainer = run("eval_rad_chestct").trainer
    save(other, tmp_path / "frozen")
    save(trainer, tmp_path / "retrained")
    sides = (trainer.train_bags, trainer.val_bags, trainer.test_bags)
    assert [len(side) for side in sides] == [40, 12, 24]
    prefixes = [{volume[:3] for volume in side.volumes} for side in sides]
    assert prefixes == [{"trn"}, {"val"}, {"tst"}]
    assert trainer.test_bags.class_names == RAD
    before = values_of(tmp_path / "results.csv")
    run(
        "eval_rad_chestct",
        "evaluate",
        frozen_probe=str(tmp_path / "frozen"),
        retrained_probe=str(tmp_path / "retrained"),
        num_resamples=50,
    )
    after = values_of(tmp_path / "results.csv")
    for metric in ("macro_auroc", "macro_auprc", "macro_f1", "macro_balanced_accuracy"):
        assert after["retrained", metric] == pytest.approx(before["retrained", metric], abs=1e-5)
        difference = after["retrained", metric] - after["frozen", metric]
        assert after["retrained-frozen", metric] == pytest.approx(difference, abs=2e-6)
    # the sites share the shift of each class, so the frozen probe reads them too
    assert after["frozen", "macro_auroc"] > 0.65


def test_a_strategy_is_known_by_its_embeddings(cohort: Path, run: Run, tmp_path: Path) -> None:
    folder = cohort / "ct_rate" / "dataset" / "multi_abnormality_labels"
    embeddings = cohort / "dale_ct_2s" / "embeddings"
    run(
        "eval_preprocessing",
        train_labels_csv=str(folder / "train_predicted_labels.csv"),
        train_embeddings_dir=str(embeddings / "train"),
        test_embeddings_dir=str(embeddings / "valid"),
        num_val_patients=8,
    )
    assert ("preprocessing_cropped_256", "macro_auprc") in values_of(tmp_path / "results.csv")


@pytest.mark.parametrize("overlay", ["gated_abmil", "transformer", "low_shot_1", "low_shot_10"])
def test_overlays_of_probes_are_rows_beside_the_papers(overlay: str, run: Run, tmp_path: Path) -> None:
    own = json.loads((BUNDLES / "_overlays" / "probe" / f"{overlay}.json").read_text())
    changes = {"poolers": own["poolers"], "learning_rates": [0.001]} if "poolers" in own else {}
    trainer = run("eval_ct_rate", overlay=overlay, num_val_patients=8, **changes).trainer
    assert (own["protocol"], "macro_auroc") in values_of(tmp_path / "results.csv")
    patients = {volume.rsplit("_", 2)[0] for volume in trainer.train_bags.volumes}
    assert len(patients) == {"low_shot_1": 1, "low_shot_10": 3}.get(overlay, 22)
    assert len(trainer.val_bags) == 16
    written = {path.name for path in (tmp_path / "eval_ct_rate").glob("*")}
    has_report = overlay == "gated_abmil"
    files = {"probe.safetensors", "per_class.csv", "roc.png", "attention.png"}
    assert files <= written if has_report else not files & written
    if has_report:
        probe, _ = load_probe(tmp_path / "eval_ct_rate")
        bags = pad_bags([trainer.test_bags[0]["tokens"].float()])
        assert torch.equal(probe(*bags), trainer.chosen_probe()(*bags))


def test_a_pooler_added_as_the_readme_says_is_trained_and_comes_back(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POOLERS, "own", lambda dim: GatedAttentionPool(dim, hidden_dim=11))  # the class
    trainer = run(
        "eval_ct_rate",
        num_val_patients=8,
        num_seeds=2,
        poolers=["average", "own"],  # the line in the recipe
        learning_rates=[1.0],
    ).trainer
    trainer.best.index = 1
    trainer.best.parameters = trainer.grid.probe(1).state_dict()
    save(trainer, tmp_path / "own")
    loaded, card = load_probe(tmp_path / "own")
    assert card["pooler"] == "own"
    bags = pad_bags([trainer.test_bags[place]["tokens"].float() for place in range(5)])
    assert torch.equal(loaded(*bags), trainer.chosen_probe()(*bags))
    torch.manual_seed(42)
    initial = build_pooler("own", 23).state_dict()
    for name in ("value.weight", "gate.weight", "score.weight"):
        assert float((loaded.pooler.state_dict()[name] - initial[name]).abs().max()) > 1e-4


def test_every_overlay_of_probes_is_tested_above() -> None:
    names = sorted(path.stem for path in (BUNDLES / "_overlays" / "probe").glob("*.json"))
    assert names == ["gated_abmil", "low_shot_1", "low_shot_10", "transformer"]


@pytest.mark.parametrize(("bundle", "classes"), [("eval_rad_chestct", RAD), ("eval_preprocessing", CT_RATE)])
def test_class_names_of_the_metadata_are_those_of_the_label_set(bundle: str, classes: list[str]) -> None:
    metadata = json.loads((BUNDLES / bundle / "configs" / "metadata.json").read_text())
    assert list(metadata["network_data_format"]["outputs"]["pred"]["channel_def"].values()) == classes
