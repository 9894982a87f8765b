"""What the study runs, stage by stage: only commands that the documentation gives to users.

Site A of the synthetic cohort stands in for CT-RATE, site B (other scanners) for RAD-ChestCT. Encoders are
trained on site A's training split; every number comes from volumes that no encoder has seen.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from study.plan import ABLATIONS, CEILING, DENSE_ENCODERS, FLOORS, TABLE_ENCODERS, TRAINED, Size

REPOSITORY = Path(__file__).resolve().parents[1]
ENCODER = "bundles/dale_ct_2s"
SIDES = {"train": "train", "test": "valid"}
"""What an evaluation calls a split, and what CT-RATE calls it."""
TURNS = ("transposed", "flipped", "sagittal")
CHANGES = ("thicker_slices", "lower_dose", "sharper_kernel", "hu_offset", "metal_streaks", "transposed")
"""Changes of the scan that every encoder meets; DALE-CT-2S meets all there are."""
STANDARDIZED = "eval_ct_rate_standardized"
"""Folder of the MIL probes that standardize tokens, beside the paper's."""


class Stage(NamedTuple):
    """Some commands that belong together, run one after the other.

    Args:
        name: name of its log and in the list of what is done.
        commands: words after ``python -m`` of each command, to run in the repository's root.
        needs: stages whose results it reads; when one of them changes, this one runs anew.
    """

    name: str
    commands: list[list[str]]
    needs: tuple[str, ...] = ()


def module(name: str, *arguments: object) -> list[str]:
    """Return the words of the command ``python -m name arguments`` after ``-m``."""
    return [name, *map(str, arguments)]


def options(knobs: dict[str, Any]) -> list[str]:
    """Return ``--name value`` for each knob, None as the bundles want it."""
    return [
        part
        for name, value in knobs.items()
        for part in (f"--{name}", "$None" if value is None else str(value))
    ]


def prep(command: str, **flags: Any) -> list[str]:  # noqa: ANN401 (whatever a flag may be)
    """Return the command ``python -m data_prep command`` with its flags."""
    return module("data_prep", command, *_flags(flags))


def _flags(flags: dict[str, Any]) -> list[str]:
    parts: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, (list, tuple)) else (value,)
        parts += [f"--{name.replace('_', '-')}", *map(str, values)]
    return parts


def bundle(root: str, configs: list[str], **knobs: Any) -> list[str]:  # noqa: ANN401 (whatever a knob may be)
    """Return the command that runs a bundle with configs merged in order and knobs set."""
    return module(
        "monai.bundle", "run", "--config_file", str(configs), *options({"bundle_root": root} | knobs)
    )


def all_stages(size: Size, out: Path, amp_dtype: str) -> list[Stage]:
    """Return every stage of the study in the order to run.

    Args:
        size: of the study.
        out: folder of everything that is made.
        amp_dtype: precision of training and embedding, ``bfloat16`` or ``float32``.
    """
    cohort = out / "cohort"
    labels = cohort / "dataset" / "multi_abnormality_labels"
    stages = [
        Stage("site a", _site_a(size, out)),
        Stage("shards", _shards(out), ("site a",)),
        Stage("site b", _site_b(size, out)),
    ]
    for name in TABLE_ENCODERS:
        stages += _encoder(name, size, out, labels, amp_dtype)
    for name in TABLE_ENCODERS:
        needs: tuple[str, ...] = (f"table III {name}", "site b")
        stages.append(Stage(f"table IV {name}", _table_iv(name, size, out, amp_dtype), needs))
    pair = ("dale_ct_0", "dale_ct_0_single_slice")
    needs = tuple(f"table {number} {name}" for number in ("I", "III") for name in (*pair, *FLOORS))
    stages.append(Stage("table V", [_table_v(out, labels)], needs))
    stages.append(Stage("table VI", _table_vi(size, out, labels, amp_dtype), ("train dale_ct_2s",)))
    stages.append(Stage("beside table III", _beside(size, out, labels), ("table III dale_ct_2s",)))
    table, subset = labels / "valid_predicted_labels.csv", out / "subset_robustness.csv"
    chosen = [prep("subset", labels=table, patients=30, out=subset)]
    stages.append(Stage("patients robustness", chosen, ("site a",)))
    for name in DENSE_ENCODERS:
        command = _robustness(name, size, out, labels, amp_dtype)
        needs = (f"table III {name}", "patients robustness")
        stages.append(Stage(f"robustness {name}", [command], needs))
    stages.append(Stage("curves", [_curves(out)], tuple(f"train {name}" for name in TRAINED)))
    for name in ABLATIONS:
        stages += _encoder(name, size, out, labels, amp_dtype)
    tested = [f"table I {name}" for name in (*DENSE_ENCODERS, *ABLATIONS)]
    tested += [f"table III {name}" for name in (*TABLE_ENCODERS, *ABLATIONS)]
    stages.append(Stage("differences", _differences(size, out), (*tested, "table VI")))
    return stages


def weights_of(name: str, out: Path) -> Path | None:
    """Return the weights of an encoder, None for random ones and for what has none."""
    return None if name in (*FLOORS, CEILING) else out / "encoders" / name / "model.safetensors"


def _site_a(size: Size, out: Path) -> list[list[str]]:
    return [
        prep("phantom", volumes=size.volumes[0], out=out / "cohort", seed=1, **_scans(size), rex_share=1),
        prep("dense-labels", root=out / "cohort", **_findings(out), grid=size.grid, out=out / "dense_labels"),
    ]


def _site_b(size: Size, out: Path) -> list[list[str]]:
    own = {"rex_share": 0, "site": "b", "npz_spacing_mm": 2.5}
    rad = out / "site_b" / "rad_chestct"
    return [
        prep("phantom", volumes=size.volumes[1], out=out / "site_b", seed=2, **_scans(size), **own),
        prep("rad-labels", root=rad, out=out / "rad_chestct_labels.csv"),
        *(
            prep("turned", root=rad, npz_spacing_mm=2.5, turn=turn, out=out / "ct" / turn, **only)
            for turn, only in (("right", {}), *((turn, {"prefix": "tst"}) for turn in TURNS))
        ),
    ]


def _scans(size: Size) -> dict[str, Any]:
    return {"matrix": size.matrix, "spacing_mm": size.spacing_mm, "valid_share": 0.35}


def _shards(out: Path) -> list[list[str]]:
    return [
        prep("ct-rate", root=out / "cohort", split=split, out=out / "shards", **_findings(out))
        for split in ("train", "valid")
    ]


def _findings(out: Path) -> dict[str, Path]:
    folder = out / "cohort" / "rexgroundingct"
    return {"rexgroundingct": folder / "dataset.json", "rexgroundingct_masks": folder / "segmentations"}


def _encoder(name: str, size: Size, out: Path, labels: Path, amp_dtype: str) -> list[Stage]:
    """Train an encoder, where there is one to train, and read its tokens by MIL and dense probes."""
    stages, needs = [], ("site a",)
    if name in TRAINED | ABLATIONS:
        root, overlays, knobs = (TRAINED | ABLATIONS)[name]
        command = train(name, root, overlays, knobs, size, out, amp_dtype)
        stages, needs = [Stage(f"train {name}", [command], ("shards",))], (f"train {name}",)
    stages.append(Stage(f"table III {name}", _table_iii(name, size, out, labels, amp_dtype), needs))
    if name != CEILING:
        stages.append(Stage(f"table I {name}", _table_i(name, size, out, amp_dtype), needs))
    return stages


def train(
    name: str, root: str, overlays: list[str], knobs: dict[str, Any], size: Size, out: Path, amp_dtype: str
) -> list[str]:
    """Return the command that trains an encoder of the bundle ``root`` on the study's shards."""
    smaller = "train_dinov2.json" if root == "dinov2_ct" else "train.json"
    configs = [f"bundles/{root}/configs/train.json", f"{size.overlays}/{smaller}", *overlays]
    own = {
        "name": name,
        "dataset_dir": out / "shards",
        "output_dir": out / "encoders" / name,
        "run_name": name,
        "amp_dtype": amp_dtype,
    }
    return bundle(f"bundles/{root}", configs, **own, encoder_weights=weights_of(name, out), **knobs)


def embed(
    name: str, volumes: Path, to: Path, size: Size, out: Path, amp_dtype: str, **knobs: object
) -> list[str]:
    """Return the command that embeds volumes with an encoder of the study, a floor or the ceiling."""
    if name == CEILING:
        return prep("lesion-areas", root=volumes, out=to, **knobs)
    root, smaller = _opened(name, size)
    configs = [f"{root}/configs/inference.json", smaller]
    own = {"name": name, "dataset_dir": volumes, "output_dir": to, "encoder_weights": weights_of(name, out)}
    return bundle(root, configs, **own, amp_dtype=amp_dtype, **knobs)


def _opened(name: str, size: Size) -> tuple[str, str]:
    """Return the bundle of an encoder or floor, and the config that makes it the study's."""
    root = (TRAINED | ABLATIONS).get(name, ("dale_ct_2s",))[0]
    is_floor = name in FLOORS and name != "random_weights"
    smaller = f"bundles/_overlays/floors/{name}.json" if is_floor else f"{size.overlays}/inference.json"
    return f"bundles/{root}", smaller


def _table_iii(name: str, size: Size, out: Path, labels: Path, amp_dtype: str) -> list[list[str]]:
    embeddings = out / "embeddings" / name
    volumes = {split: out / "cohort" / "dataset" / f"{split}_fixed" for split in ("train", "valid")}
    commands = [
        embed(
            *(name, out / "cohort" if name == CEILING else volumes[split], embeddings / split),
            *(size, out, amp_dtype),
            split=split,
        )
        for split in volumes
    ]
    configs = ["bundles/eval_ct_rate/configs/train.json", f"{size.overlays}/eval.json"]
    own: dict[str, Any] = {"embeddings_dir": embeddings, "labels_dir": labels, "ct_dir": volumes["valid"]}
    if name in ABLATIONS:
        own["num_seeds"] = 1
    own["results_csv"] = out / "results" / ("ablations.csv" if name in ABLATIONS else "eval_ct_rate.csv")
    plain, standardized = (out / folder / name for folder in ("eval_ct_rate", STANDARDIZED))
    commands.append(bundle("bundles/eval_ct_rate", configs, **own, output_dir=plain))
    if name not in ABLATIONS:
        own |= {"output_dir": standardized, "standardize": True}
        commands.append(bundle("bundles/eval_ct_rate", configs, **own))
    return commands


def _table_iv(name: str, size: Size, out: Path, amp_dtype: str) -> list[list[str]]:
    root, embeddings = "bundles/eval_rad_chestct", out / "embeddings" / name / "site_b"
    turns = TURNS if name == "dale_ct_2s" else ()
    volumes = {turn: out / "ct" / turn for turn in ("right", *turns)}
    if name == CEILING:
        volumes["right"] = out / "site_b"
    commands = [embed(name, volumes[turn], embeddings / turn, size, out, amp_dtype) for turn in volumes]
    shared = {"results_csv": out / "results" / "eval_rad_chestct.csv"}
    retrained = {
        "": out / "eval_rad_chestct" / name,
        "_standardized": out / "eval_rad_chestct_standardized" / name,
    }
    configs = [f"{root}/configs/train.json", f"{size.overlays}/eval.json"]
    own = {
        "max_steps": 600,
        "val_interval": 100,
        "labels_dir": out,
        "train_embeddings_dir": embeddings / "right",
    }
    for kind, folder in retrained.items():
        own |= {"output_dir": folder, "standardize": bool(kind)}
        commands.append(bundle(root, configs, **own, ct_dir=None, **shared))
    tests = {f"{turn}_embeddings_dir": embeddings / turn for turn in turns}
    own = {"labels_csv": out / "rad_chestct_labels.csv", "test_embeddings_dir": embeddings / "right", **tests}
    probes = {f"retrained{kind}_probe": folder for kind, folder in retrained.items()}
    probes |= {"frozen_probe": out / "eval_ct_rate" / name}
    probes |= {"frozen_standardized_probe": out / STANDARDIZED / name}
    return [*commands, bundle(root, [f"{root}/configs/evaluate.json"], **own, **probes, **shared)]


def _table_i(name: str, size: Size, out: Path, amp_dtype: str) -> list[list[str]]:
    tokens = out / "patch_tokens" / name
    own = {
        "subset_csv": out / "dense_labels" / "volumes.csv",
        "embedding_dtype": "float16",
        "patch_tokens": True,
    }
    root = "bundles/eval_dense_2d"
    probe = {
        "learning_rates": [3.0, 1.0, 0.3, 0.1],
        "max_steps": 3000,
        "val_interval": 1000,
        "checkpoint_every": 1000,
    }
    folders = {
        "embeddings_dir": tokens,
        "labels_dir": out / "dense_labels",
        "output_dir": out / "eval_dense_2d" / name,
    }
    shared: dict[str, Any] = {**folders, **probe, "results_csv": out / "results" / "eval_dense_2d.csv"}
    if name in FLOORS and name != "random_weights":  # the crop and the grid that the labels have
        own |= {"strategies": [f"cropped_{32 * size.grid}"], "patch_size_px": 32}
    config = [f"{root}/configs/train.json"]
    commands = [
        embed(name, out / "cohort" / "dataset" / "valid_fixed", tokens, size, out, amp_dtype, **own),
        bundle(root, config, **shared),
    ]
    if name not in ABLATIONS:
        shared |= {"output_dir": out / "eval_dense_2d_standardized" / name, "standardize": True}
        commands.append(bundle(root, config, **shared))
    return commands


def _table_v(out: Path, labels: Path) -> list[str]:
    root, pair = "bundles/eval_slab_depth", ("dale_ct_0", "dale_ct_0_single_slice")
    tokens = {
        f"{arm}_embeddings_dir": out / "patch_tokens" / name
        for arm, name in zip(("slab", "flat"), pair, strict=True)
    }
    floors = {"floor_embeddings_dirs": [str(out / "patch_tokens" / name) for name in FLOORS]}
    probes = {"probe_dirs": [str(out / "eval_ct_rate" / name) for name in pair]}
    read = {"dense_labels_dir": out / "dense_labels", "labels_csv": labels / "valid_predicted_labels.csv"}
    results = {
        "classification_csv": out / "results/eval_ct_rate.csv",
        "results_csv": out / "results/eval_slab_depth.csv",
    }
    config = [f"{root}/configs/evaluate.json"]
    inputs = {**tokens, **floors, **probes, **read}
    return bundle(root, config, **inputs, **results, output_dir=out / "eval_slab_depth")


def _table_vi(size: Size, out: Path, labels: Path, amp_dtype: str) -> list[list[str]]:
    root, results = "bundles/eval_preprocessing", out / "results" / "eval_preprocessing.csv"
    stores = {split: out / "strategies" / split for split in ("train", "valid")}
    subsets = {split: out / f"subset_{split}.csv" for split in stores}
    volumes = {split: out / "cohort" / "dataset" / f"{split}_fixed" for split in stores}
    commands = []
    for split, patients in (("train", 40), ("valid", 30)):
        table = labels / f"{split}_predicted_labels.csv"
        own = {"subset_csv": subsets[split], "strategies": size.strategies}
        commands.append(prep("subset", labels=table, patients=patients, out=subsets[split]))
        commands.append(embed("dale_ct_2s", volumes[split], stores[split], size, out, amp_dtype, **own))
    each = [part for strategy in size.strategies for part in ("--strategy", strategy)]
    folders = {f"{side}_embeddings_dir": f"{stores[split]}/{{}}" for side, split in SIDES.items()}
    probes = {
        "config_file": [f"{root}/configs/train.json", f"{size.overlays}/eval.json"],
        **{f"{side}_labels_csv": subsets[split] for side, split in SIDES.items()},
        "num_val_patients": 12,
        "max_steps": 600,
        "val_interval": 100,
        "num_seeds": 1,
        "ct_dir": None,
        "output_dir": f"$'{out}/eval_preprocessing/' + @train::dataset.identity['preprocessing']",
    }
    flags = _flags(folders | {"results_csv": results})
    commands.append(module("common.engines.each_preprocessing", *each, *flags, *options(probes)))
    configs = [f"{ENCODER}/configs/inference.json", f"{size.overlays}/inference.json"]
    flags = [part for config in configs for part in ("--config-file", config)]
    flags += _flags({"volumes": 6, "dataset_dir": volumes["valid"], "results_csv": results})
    weights = {"encoder_weights": weights_of("dale_ct_2s", out), "amp_dtype": amp_dtype}
    return [*commands, module("common.engines.embedding_cost", *each, *flags, *options(weights))]


def _beside(size: Size, out: Path, labels: Path) -> list[list[str]]:
    embeddings, results = out / "embeddings" / "dale_ct_2s", out / "results" / "beside_table_iii.csv"
    files = {f"{side}_embeddings": embeddings / split for side, split in SIDES.items()}
    files |= {f"{side}_labels": labels / f"{split}_predicted_labels.csv" for side, split in SIDES.items()}
    flags = _flags(files | {"num_val_patients": 40, "results_csv": results})
    commands = [module("common.engines.neighbour_probe", *flags)]
    for overlay in ("gated_abmil", "transformer", "low_shot_10"):
        configs = [
            "bundles/eval_ct_rate/configs/train.json",
            f"{size.overlays}/eval.json",
            f"bundles/_overlays/probe/{overlay}.json",
        ]
        folder = out / "beside_table_iii" / overlay
        own = {"embeddings_dir": embeddings, "labels_dir": labels, "output_dir": folder}
        shorter = {"max_steps": 400, "val_interval": 50, "num_seeds": 1, "ct_dir": None}
        commands.append(bundle("bundles/eval_ct_rate", configs, **own, **shorter, results_csv=results))
    return commands


def _robustness(name: str, size: Size, out: Path, labels: Path, amp_dtype: str) -> list[str]:
    root, cohort, weights = "bundles/eval_robustness", out / "cohort" / "dataset", weights_of(name, out)
    encoder, smaller = _opened(name, size)
    knobs = {"name": name, "amp_dtype": amp_dtype, "subset_csv": str(out / "subset_robustness.csv")}
    own = {
        "encoder_bundle": encoder,
        "encoder_configs": [smaller],
        "encoder_knobs": knobs | {"encoder_weights": str(weights) if weights else None},
        "probe_dir": out / STANDARDIZED / name,
        "test_dir": cohort / "valid_fixed",
        "labels_csv": labels / "valid_predicted_labels.csv",
        "masks_dir": cohort / "ts_seg" / "ts_total" / "valid_fixed",
        "output_dir": out / "eval_robustness" / name,
        "changes": None if name == "dale_ct_2s" else list(CHANGES),
        "results_csv": out / "results" / "eval_robustness.csv",
    }
    return bundle(root, [f"{root}/configs/evaluate.json"], **own)


def _curves(out: Path) -> list[str]:
    shown = ("dale_ct_0_single_slice", "dale_ct_0", "dale_ct_1s", "dale_ct_2s")
    runs = [part for name in shown for part in ("--run", name)]
    files = ("--tracking-uri", f"sqlite:///{out}/mlflow.db", "--out", out / "curves.png")
    return module("study.draw_curves", *files, *runs)


def _differences(size: Size, out: Path) -> list[list[str]]:
    reference = "dale_ct_2s"
    names = (reference, *TABLE_ENCODERS, *ABLATIONS)
    files = {name: out / "eval_ct_rate" / name / "test_predictions.csv" for name in names}
    standardized = [out / STANDARDIZED / n / "test_predictions.csv" for n in (reference, *TABLE_ENCODERS)]
    dense = [out / "eval_dense_2d" / name for name in (reference, *DENSE_ENCODERS, *ABLATIONS)]
    strategies = [out / "eval_preprocessing" / name / "test_predictions.csv" for name in size.strategies]
    differences, folder = partial(module, "dale_ct.cli", "compare"), out / "differences"
    return [
        differences(*files.values(), "--out", folder / "table_iii.csv"),
        differences(*standardized, "--out", folder / "table_iii_standardized.csv"),
        differences(files["dale_ct_0_single_slice"], files["dale_ct_0"], "--out", folder / "table_v.csv"),
        differences(*strategies, "--out", folder / "table_vi.csv"),
        differences(*dense, "--out", folder / "table_i.csv"),
    ]
