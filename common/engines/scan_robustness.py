"""How robust an encoder and a probe are: every test CT as it is and changed, from one reading of its file."""

# N volumes, K kinds of scan (the unchanged one first), C classes, Z slices, H side of a slice

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from common.cohort.cohort import read_labels, write_table
from common.ct.files import VOLUME_SUFFIXES, only_file, volume_files
from common.ct.rejection import RejectedError, is_failure
from common.embeddings.changed_scans import UNCHANGED, ChangedScans, label
from common.embeddings.ct_bags import labelled_cts
from common.embeddings.ct_batches import Prepared, Task, read_ahead
from common.embeddings.encoder_bundle import EncoderBundle, open_encoder_bundle
from common.embeddings.store import DTYPES, check_identity
from common.embeddings.work import CTSource, report_rejected
from common.engines.probe_grid import measured_beside_floor
from common.metrics.bootstrap import RESAMPLING_SEED, groups_of, interval, resample_weights
from common.networks.mil_probe import MILProbe, load_probe
from common.reports.paired_differences import MACRO, paired_differences
from common.reports.results import NAN, Numbers, Predictions, ResultRow, add_rows, log_rows, result_rows
from common.reports.robustness_card import Card, Effect, print_card, write_card
from common.run.process import atomic_file, sha256_of
from common.transforms.scan_changes import CHANGES, chosen_changes

logger = logging.getLogger(__name__)
FloatArray = NDArray[np.float64]
SETTINGS = "settings.json"
RANKING = ("auroc", "auprc")


class Scores(NamedTuple):
    """What a probe says of each kind of scan; nan where a volume does not allow the change."""

    volumes: list[str]
    probabilities: FloatArray  # (N, K, C)
    cosines: FloatArray  # (N, K), mean over slices of the cosine to the unchanged slice's token


def scan_robustness(
    *,
    encoder_bundle: str | Path | None,
    probe_dir: str | Path | None,
    dataset_dir: str | Path,
    labels_csv: str | Path,
    output_dir: str | Path,
    dataset_name: str,
    results_csv: str | Path,
    changes: Sequence[str] | None,
    masks_dir: str | Path | None,
    encoder_configs: Sequence[str],
    encoder_knobs: Mapping[str, Any] | None,
    num_resamples: int,
    resampling: str,
    seed: int,
    tracking_uri: str,
    experiment: str,
) -> list[ResultRow]:
    """Measure what changes of the scan do to a frozen encoder's tokens and to a probe on them.

    Each CT is read once; the slices of all its changes go through the encoder in full batches. What was
    measured of a volume is a file in ``output_dir/volumes``, so that a stopped run resumes; CTs measured
    before are read again for their checksum alone. Files of ``output_dir`` besides: ``robustness.csv`` (each
    change, macro and by class), ``robustness.html``, ``robustness.png``, ``robustness.md`` for a model card,
    and ``rejected.csv``. Rows: protocol
    ``robustness_<change>_<strength>``, ``robustness_unchanged``, and the floor "prevalence".

    Source: our choice; the changes state theirs. Intervals are those of paired differences, over the same
    resamples for all changes that all volumes allow.

    Args:
        encoder_bundle: folder of an encoder of slices.
        probe_dir: folder of its frozen probe, an evaluation bundle's output_dir.
        dataset_dir: CTs, in any form that the encoder bundle reads.
        labels_csv: labels of the probe's classes; CTs without take no part.
        output_dir: folder to write.
        dataset_name: name of the data.
        results_csv: CSV of all evaluations.
        changes: names of ``CHANGES``; None for all.
        masks_dir: TotalSegmentator label maps named as the volumes, for contrast; None leaves it out.
        encoder_configs: further config files of the encoder bundle.
        encoder_knobs: knobs of the encoder bundle.
        num_resamples: bootstrap resamples.
        resampling: "patients", or "volumes" for data without patient names.
        seed: seed of the changes.
        tracking_uri: MLflow's store.
        experiment: its experiment.

    Raises:
        FileNotFoundError: if bundle, probe, CTs or labels are not there.
        ValueError: if a change is unknown, the encoder is not one of slices or not the probe's, there are
            fewer than two patients, no class has positives, too many CTs are refused, ``output_dir`` is
            another run's, or a CT was measured there from another file.
    """
    if encoder_bundle is None or probe_dir is None:
        raise ValueError("Pass --encoder_bundle and --probe_dir, the folders of encoder and probe.")
    kinds, output = chosen_changes(changes), Path(output_dir)
    probe, card = load_probe(probe_dir)
    knobs = {"dataset_dir": str(dataset_dir), "output_dir": str(output), **(encoder_knobs or {})}
    bundle = _open(encoder_bundle, encoder_configs, knobs, card)
    found, rejected = bundle["sources"]
    volumes = labelled_cts((found, []), labels_csv)
    labels = read_labels(labels_csv, card["class_names"])
    _check(volumes, labels, resampling)
    settings = {
        **bundle["embedding_identity"],
        "preprocessing": card["preprocessing"],
        "probe": sha256_of(Path(probe_dir) / "probe.safetensors"),
        "changes": [list(kind) for kind in kinds],
        "masks": masks_dir is not None,
        "seed": seed,
    }
    _agree(output / SETTINGS, settings)
    folder = output / "volumes"
    folder.mkdir(exist_ok=True)
    batches = ChangedScans(
        changes=kinds,
        seed=seed,
        masks=_masks(masks_dir),
        work=_not_measured(
            [source for source in found if source.volume in {*volumes}], folder, bundle["num_workers"]
        ),
        strategies=bundle.strategies,
        window=bundle.window,
        slice_axes=bundle.slice_axes,
        slices_per_batch=bundle["slices_per_batch"],
        num_workers=bundle["num_workers"],
        device=bundle["device"],
        padded=bundle["compiled"],
    )
    batches.rejected += [item for item in rejected if is_failure(item)]
    _measure(batches, bundle, probe, [label(*kind) for kind in kinds], folder)
    report_rejected(output, batches.rejected, len(volumes), bundle["max_rejected"])
    scores = read_scores(folder, [volume for volume in volumes if (folder / f"{volume}.npz").is_file()])
    _check(scores.volumes, labels, resampling)
    predictions = Predictions(
        str(settings["encoder"]),
        scores.volumes,
        card["class_names"],
        scores.probabilities[:, 0],
        np.asarray(card["thresholds"], np.float64),
        np.array([labels[volume] for volume in scores.volumes], np.float64),
    )
    effects, lines = effects_of(scores, predictions, kinds, num_resamples, resampling)
    weights = resample_weights(groups_of(scores.volumes, resampling), num_resamples, RESAMPLING_SEED)
    unchanged, floor = _macro_means(predictions, weights)
    config = {**settings, "num_resamples": num_resamples, "resampling": resampling}
    facts: dict[str, Any] = {"dataset": dataset_name, "config": config, "seeds": str(seed)}
    protocol, n = f"robustness_{UNCHANGED}", len(scores.volumes)
    rows = result_rows(unchanged, encoder=predictions.encoder, protocol=protocol, n=n, **facts)
    for effect in effects:
        changed = f"robustness_{label(effect.change, effect.strength)}"
        rows += result_rows(
            effect.numbers, encoder=predictions.encoder, protocol=changed, n=effect.n, **facts
        )
    log_rows(rows, tracking_uri, experiment)
    rows += result_rows(floor, encoder="prevalence", protocol=protocol, n=n, **facts)
    add_rows(results_csv, rows)
    write_table(output / "robustness.csv", lines)
    measured = {(effect.change, effect.strength) for effect in effects}
    number = len(set(groups_of(scores.volumes, resampling)))
    about = Card(
        encoder=predictions.encoder,
        dataset=dataset_name,
        unchanged=unchanged,
        floor=floor,
        effects=effects,
        left_out=[
            f"{label(*kind)} (needs {CHANGES[kind[0]].needs})" for kind in kinds if kind not in measured
        ],
        facts=[
            f"{n} volumes of {number} {resampling}, {len(batches.rejected)} refused",
            f"weights {settings['weights']}, {settings['encoder_id']}",
            f"{card['pooler'].replace('_', ' ')} pooling, probe {settings['probe'][:12]}",
        ],
        note=str(card.get("note") or ""),
    )
    write_card(output, about)
    print_card(about)
    return rows


def _macro_means(predictions: Predictions, weights: NDArray[np.float32]) -> list[Numbers]:
    """Measure the unchanged scans, and one score for all volumes."""
    reports, intervals = measured_beside_floor(predictions, weights)
    return [
        {
            f"macro_{metric}": (value, *intervals[subject]["macro"][metric])
            for metric, value in reports[subject]["macro"].items()
        }
        for subject in ("probe", "prevalence")
    ]


def _open(
    encoder_bundle: str | Path, configs: Sequence[str], knobs: Mapping[str, Any], card: Mapping[str, Any]
) -> EncoderBundle:
    """Open the encoder as the probe knows it."""
    bundle = open_encoder_bundle(encoder_bundle, configs, knobs)
    if "strategies" not in bundle:
        raise ValueError(
            f"encoder_bundle must encode slices, got '{bundle.name}', of volumes: changed scans reach an "
            "encoder as images of slices. Pass an encoder of slices."
        )
    bundle.update({"strategies": [card["preprocessing"]]})
    remedy = "Pass the --encoder_bundle and weights that the probe was made for."
    identity = bundle["embedding_identity"]
    check_identity(identity, card, of="the embeddings", source="the probe needs", remedy=remedy)
    (strategy,) = bundle.strategies
    if strategy.num_images > 1:
        raise ValueError(f"The probe must read one image per slice, got one of '{strategy.name}'.")
    return bundle


def _check(volumes: Sequence[str], labels: Mapping[str, np.ndarray], resampling: str) -> None:
    """Refuse a test set on which nothing can be measured."""
    groups = set(groups_of(volumes, resampling))
    if len(groups) < 2:
        raise ValueError(f"The CTs with labels must be of at least 2 {resampling}, got {len(groups)}.")
    positives = np.sum([labels[volume] for volume in volumes], axis=0)
    if not ((positives > 0) & (positives < len(volumes))).any():
        raise ValueError(f"No class has positive and negative volumes among the {len(volumes)} with labels.")


def _agree(path: Path, settings: Mapping[str, Any]) -> None:
    """Write what a folder's results depend on, or compare it with what stands there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        with atomic_file(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(settings, indent=2) + "\n")
    known = json.loads(path.read_text(encoding="utf-8"))
    for name, value in json.loads(json.dumps(settings)).items():
        if name != "weights" and known.get(name) != value:
            raise ValueError(
                f"'{path.parent}' was measured with {name} {known.get(name)}, now {value}. Use another "
                "--output_dir, or the old value."
            )


def _not_measured(sources: Sequence[CTSource], folder: Path, num_workers: int) -> list[CTSource]:
    """Pass over the volumes that were measured before, read to refuse one of another file."""
    done = [source for source in sources if (folder / f"{source.volume}.npz").is_file()]
    checksums = {
        source.volume: prepared.notes.get("sha256", "")
        for source, prepared in read_ahead(done, _without_pixels, num_workers, [])
    }
    for source in done:
        with np.load(folder / f"{source.volume}.npz", allow_pickle=False) as file:
            known = str(file["sha256"])
        if checksums.get(source.volume) != known:
            raise ValueError(
                f"'{source.volume}' was measured in '{folder}' from another file. Delete "
                f"'{source.volume}.npz' there, or use another --output_dir."
            )
    return [source for source in sources if source.volume not in checksums]


def _without_pixels(source: CTSource) -> Prepared:
    """Read a CT and keep what is known of it, not its slices."""
    ct = source.read()
    return Prepared(torch.empty(0), ct.spacing_mm, ct.notes)


def _masks(folder: str | Path | None) -> dict[str, Path]:
    found = {} if folder is None else volume_files(Path(folder), VOLUME_SUFFIXES)
    return {volume: only_file(paths, "masks") for volume, paths in found.items()}


@torch.no_grad()
def _encoded(batches: ChangedScans, bundle: EncoderBundle) -> Iterator[tuple[Task, torch.Tensor]]:
    """Yield the tokens of each kind of scan, volume by volume; a kind's pieces follow one another."""
    network, inferer, dtype = bundle.network, bundle["inferer"], DTYPES[bundle["embedding_dtype"]]
    parts: list[torch.Tensor] = []
    for batch in batches:
        cls, _ = inferer(batch["image"], network, batch["is_fixed"])
        sizes = [piece.num_images for piece in batch["pieces"]]
        encoded = cls[: sum(sizes)].to("cpu", dtype).split(sizes)
        for (task, first, num_images), tokens in zip(batch["pieces"], encoded, strict=True):
            parts.append(tokens)
            if first + num_images == task.num_images:
                yield task, torch.cat(parts).float()
                parts = []


def _measure(
    batches: ChangedScans, bundle: EncoderBundle, probe: MILProbe, labels: Sequence[str], folder: Path
) -> None:
    """Write a file for each volume."""
    places = {name: place for place, name in enumerate((UNCHANGED, *labels))}
    with tqdm(total=len(batches.work), unit="volume", dynamic_ncols=True) as bar:
        for volume, kinds in groupby(_encoded(batches, bundle), lambda found: found[0].volume):
            probabilities, cosines, sha256 = _scored(kinds, probe, places)
            if np.isfinite(probabilities[0]).all():
                with atomic_file(folder / f"{volume}.npz") as file:
                    np.savez(file, probabilities=probabilities, cosines=cosines, sha256=sha256)
            else:
                reason = RejectedError("embedding", "its tokens contain NaN or Inf")
                batches.rejected.append(reason.of(volume))
            bar.update()


@torch.no_grad()
def _scored(
    kinds: Iterable[tuple[Task, torch.Tensor]], probe: MILProbe, places: Mapping[str, int]
) -> tuple[FloatArray, FloatArray, str]:
    """Apply the probe to each kind of scan of a volume: ``(K, C)`` and ``(K,)``, and its checksum."""
    probabilities = np.full((len(places), probe.classifier.out_features), np.nan)
    cosines, original, sha256 = np.full(len(places), np.nan), torch.empty(0), ""
    for task, tokens in kinds:
        if task.store == UNCHANGED:
            original, sha256 = tokens, task.metadata["sha256"]
        mask = torch.ones(1, len(tokens), dtype=torch.bool)
        place = places[task.store]
        probabilities[place] = torch.sigmoid(probe(tokens[None], mask))[0].double().numpy()
        cosine = torch.cosine_similarity(tokens.double(), original[task.metadata["origin"]].double())
        cosines[place] = float(cosine.mean())
    return probabilities, cosines, sha256


def read_scores(folder: Path, volumes: Sequence[str]) -> Scores:
    """Read the files of a run's volumes."""
    found = []
    for volume in volumes:
        with np.load(folder / f"{volume}.npz", allow_pickle=False) as file:
            found.append((file["probabilities"], file["cosines"]))
    probabilities, cosines = (np.stack(arrays) for arrays in zip(*found, strict=True))
    return Scores(list(volumes), probabilities, cosines)


def effects_of(
    scores: Scores,
    unchanged: Predictions,
    kinds: Sequence[tuple[str, float]],
    num_resamples: int,
    resampling: str,
) -> tuple[list[Effect], list[dict[str, Any]]]:
    """Compare each change with the unchanged scans, on the volumes that allow it.

    Returns:
        Effects on macro means, and lines of a table with the classes as well. A change that fewer than two
        patients allow has none.
    """
    effects: list[Effect] = []
    lines: list[dict[str, Any]] = []
    for place, (change, strength) in enumerate(kinds, 1):
        has = np.isfinite(scores.cosines[:, place])
        volumes = [volume for volume, one in zip(scores.volumes, has, strict=True) if one]
        if len(set(groups_of(volumes, resampling))) < 2:
            continue
        before = unchanged._replace(
            volumes=volumes, probabilities=unchanged.probabilities[has], labels=unchanged.labels[has]
        )
        after = before._replace(
            encoder=label(change, strength), probabilities=scores.probabilities[has, place]
        )
        numbers: Numbers = {}
        for row in paired_differences(before, [after], num_resamples, resampling):
            lines.append(
                {"change": change, "strength": strength, "n": len(volumes), **row, "encoder": before.encoder}
            )
            del lines[-1]["reference"]
            if row["class"] == MACRO and row["metric"] in RANKING:
                numbers[f"macro_{row['metric']}"] = (row["value"], NAN, NAN)
                numbers[f"macro_{row['metric']}_change"] = (row["difference"], row["low"], row["high"])
        flips = (after.probabilities >= after.thresholds) != (before.probabilities >= before.thresholds)
        weights = resample_weights(groups_of(volumes, resampling), num_resamples, RESAMPLING_SEED)
        for name, values in {
            "probability_change": np.abs(after.probabilities - before.probabilities).mean(1),
            "calls_flipped": flips.mean(1),
            "token_cosine": scores.cosines[has, place],
        }.items():
            numbers[name] = (float(values.mean()), *interval(weights @ values / weights.sum(1)))
        effects.append(Effect(change, strength, CHANGES[change].axis, len(volumes), numbers))
    return effects, lines
