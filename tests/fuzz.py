"""Damaged input for as long as you like: ``PYTHONPATH=. python tests/fuzz.py --minutes 10``.

Each case takes good files of some kind, damages one of them at random, and reads them. That may succeed, or
end in an error that a user can mend: a ValueError or FileNotFoundError that a line of ours raised, in a line
of text. All else is a defect (another error, a library's own words, 4 GiB of memory, 30 s): it is shown with
its seed, and the files are kept. Mend it, and add a test beside the module.
"""

import gzip
import json
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import torch
import typer
from scipy.sparse import csr_matrix

from common.data.ct_sources import ct_sources
from common.data.dense_labels import DenseLabels, read_dense_labels, write_dense_labels
from common.data.embedding_store import EmbeddingStore
from common.data.embedding_store_writer import EmbeddingStoreWriter
from common.data.labels_csv import read_labels
from common.data.nifti_ct import read_grid
from common.data.predictions import COLUMNS as PREDICTION_COLUMNS
from common.data.predictions import read_predictions
from common.data.shard_volume import VolumeSlices
from common.data.shards import ShardSet, write_shard
from common.data.skip_list import listed_volumes
from common.executed_config import executed_config
from common.handlers.results_table import FIELDS, read_rows
from data_prep.audit.shard import ShardTask, audit_shard
from data_prep.ct_rate import METADATA_COLUMNS, read_metadata
from data_prep.rexgroundingct import read_annotations
from data_prep.splits import read_split
from data_prep.totalsegmentator import read_label_map

REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLES = sorted(path.parents[1] for path in (REPOSITORY / "bundles").glob("*/configs/metadata.json"))
OWN = tuple(str(REPOSITORY / name) for name in ("common", "data_prep"))
SECONDS, MEMORY_BYTES = 30, 4 * 2**30
ODD_CELLS = (
    "",
    " ",
    "nan",
    "-1",
    "2",
    "1e999",
    "0x1",
    "None",
    '"',
    "a,b",
    "\x00",
    "ü" * 300,
    "../../etc",
    "1\r2",
)
RNG = np.random.default_rng(0)
HU = RNG.integers(-1000, 1000, (21, 23, 6)).astype(np.int16)
AFFINE = np.diag([-0.7, -0.8, 1.5, 1.0])


def nifti(folder: Path) -> None:
    nib.save(nib.Nifti1Image(HU, AFFINE), folder / "a.nii.gz")
    nib.save(nib.Nifti2Image(HU, AFFINE), folder / "b.nii")
    np.savez_compressed(folder / "trn1.npz", ct=np.ascontiguousarray(HU.T))
    np.savez(folder / "trn2.npz", ct=np.ascontiguousarray(HU.T))


def dicom(folder: Path) -> None:
    from conftest import series_of

    series_of(folder, HU.transpose(2, 1, 0)[:3])


def zipped(folder: Path) -> None:
    dicom(folder / "series")
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (folder / "series").iterdir():
            archive.write(path, path.name)
    shutil.rmtree(folder / "series")


def read_cts(folder: Path) -> None:
    sources, _ = ct_sources(folder)
    for source in sources:
        try:
            source.read()
        except ValueError as error:
            check(error)


def label_map(folder: Path) -> None:
    nib.save(nib.Nifti1Image(HU, AFFINE), folder / "ct.nii.gz")
    for name, affine in (("same", AFFINE), ("other", np.diag([1.4, 0.8, 3.0, 1.0]))):
        nib.save(nib.Nifti1Image((HU % 118).astype(np.uint8), affine), folder / f"{name}.nii.gz")


def read_label_maps(folder: Path) -> None:
    grid = read_grid(folder / "ct.nii.gz")
    for name in ("same", "other"):
        try:
            read_label_map(folder / f"{name}.nii.gz", grid)
        except ValueError as error:
            check(error)


def shards(folder: Path) -> None:
    for first in (0, 2):
        volumes = [
            VolumeSlices(
                volume=f"train_{first + n}_a_1",
                ct=RNG.integers(-1000, 1000, (4, 20, 24)).astype(np.int16),
                ts=RNG.integers(0, 118, (4, 128, 128)).astype(np.uint8),
                rex=(RNG.random((4, 128, 128)) < 0.01).astype(np.uint16) if first else None,
                spacing_mm=(0.8, 0.8, 3.0),
                original_shape=(24, 20, 4),
                original_axcodes="LPS",
                labels={"Lung nodule": n},
                split="train",
            )
            for n in range(2)
        ]
        write_shard(folder / f"train-{'rex-' * bool(first)}000000.tar", volumes)


def read_shards(folder: Path) -> None:
    read = ShardSet(folder, "train")
    for number, entry in enumerate(read.volumes):
        slab = read.read_slab(number, 0, entry.num_slices)
        reads = [partial(slab.read_ct, z) for z in range(entry.num_slices)] + [slab.read_ts, slab.read_rex]
        for decode in reads:
            try:
                decode()
            except ValueError as error:
                check(error)
    for path in sorted(folder.glob("*.tar")):
        with suppress(Exception):  # the audit reports whatever a task of it raises
            audit_shard(ShardTask(path))


def embeddings(folder: Path) -> None:
    identity = {"encoder": "a", "encoder_id": "sha256:0", "preprocessing": "cropped_256"}
    identity |= {"slice_order": "feet_to_head", "token_kind": "slice"}
    with EmbeddingStoreWriter(folder, identity, "float16") as writer:
        for name in ("train_1_a_1", "train_2_a_1"):
            writer.add(name, torch.randn(5, 8), (0.7, 0.7, 5.0), z_mm=torch.arange(5) * 5.0)


def read_embeddings(folder: Path) -> None:
    store = EmbeddingStore(folder)
    for volume in store.volumes:
        store.read(volume)


def dense(folder: Path) -> None:
    shares = RNG.random((12, 118)).astype(np.float32) * (RNG.random((12, 118)) < 0.1)
    findings = RNG.integers(0, 4, (3, 4)).astype(np.uint16)
    write_dense_labels(folder, DenseLabels("valid_1_a_1", (0, 0, 8), csr_matrix(shares), findings))


def tables(folder: Path) -> None:
    names = [f"train_{n}_a_1.nii.gz" for n in range(1, 6)]

    def table(name: str, heads: list[str], rows: list[list[object]]) -> None:
        lines = [",".join(map(str, row)) for row in (heads, *rows)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    table("labels.csv", ["VolumeName", "Emphysema"], [[name, n % 2] for n, name in enumerate(names)])
    table(
        "metadata.csv",
        list(METADATA_COLUMNS),
        [[name, *["1"] * (len(METADATA_COLUMNS) - 1)] for name in names],
    )
    table("split.csv", ["volume", "patient", "split"], [[name[:11], name[:7], "train"] for name in names])
    table("results.csv", list(FIELDS), [["0.5"] * len(FIELDS) for _ in names])
    rows = [["a", name, label, 0.5, 0.4, 1] for name in names for label in ("Emphysema", "Atelectasis")]
    table("predictions.csv", list(PREDICTION_COLUMNS), rows)
    (folder / "no_chest.txt").write_text("\n".join(names), encoding="utf-8")


def read_tables(folder: Path) -> None:
    for read in (
        lambda: read_labels(folder / "labels.csv", ["Emphysema"]),
        lambda: read_metadata(folder / "metadata.csv"),
        lambda: read_split(folder / "split.csv"),
        lambda: read_rows(folder / "results.csv"),
        lambda: read_predictions(folder / "predictions.csv"),
        lambda: listed_volumes(folder / "no_chest.txt"),
    ):
        try:
            read()
        except (ValueError, FileNotFoundError) as error:
            check(error)


def annotations(folder: Path) -> None:
    item = {"name": "train_1_a_1.nii.gz", "findings": {"0": "text"}, "categories": {"0": "2e"}}
    (folder / "dataset.json").write_text(json.dumps({"train": [item, item | {"name": "train_2_a_1.nii.gz"}]}))
    (folder / "train_1_a_1.nii.gz").write_bytes(b"")


def overlay(folder: Path) -> None:
    (folder / "overlay.json").write_text(
        json.dumps({"slab_mm": 6.0, "network_def": {"depth": 2}, "poolers": []})
    )
    (folder / "words.txt").write_text(
        "--seed\n3\n--slab_mm\n6.0\n--loss#sigreg#num_knots\n9\n--amp_dtype=float32\n"
    )


def read_overlay(folder: Path) -> None:
    words = (folder / "words.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    for bundle in BUNDLES:
        for path in (bundle / "configs").glob("*.json"):
            if path.name == "metadata.json":
                continue
            for files in ([str(path)], [str(path), str(folder / "overlay.json")]):
                try:
                    executed_config(str(bundle), path.name, ["run", *words, "--config_file", str(files)])
                except (ValueError, FileNotFoundError) as error:
                    check(error)


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "nifti": (nifti, read_cts),
    "dicom": (dicom, read_cts),
    "zip": (zipped, read_cts),
    "label map": (label_map, read_label_maps),
    "shards": (shards, read_shards),
    "embeddings": (embeddings, read_embeddings),
    "dense labels": (dense, lambda folder: read_dense_labels(folder / "valid_1_a_1.safetensors").of_slices()),
    "tables": (tables, read_tables),
    "annotations": (annotations, lambda folder: read_annotations(folder / "dataset.json", folder)),
    "overrides": (overlay, read_overlay),
}


def check(error: Exception) -> None:
    """Raise an error again that is not for users: not raised by ours, or of several lines."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    kinds = (ValueError, FileNotFoundError)
    if isinstance(error, UnicodeError) or not isinstance(error, kinds) or not last.startswith(OWN):
        raise AssertionError(f"not an error for users: {type(error).__name__}: {error}") from error
    if "\n" in str(error):
        raise AssertionError(f"an error must be one line, got {error!r}.") from error


def damage(path: Path, rng: np.random.Generator) -> None:
    """Change a file one to four times: its bytes, or its cells and lines where it is text."""
    packed = path.name.endswith(".gz") and path.stat().st_size > 0 and rng.random() < 0.7
    data = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    is_text = path.suffix in (".csv", ".txt", ".json")
    for _ in range(rng.integers(1, 5)):
        data = damaged_text(data, rng) if is_text and rng.random() < 0.5 else damaged_bytes(data, rng)
    path.write_bytes(gzip.compress(data, 1) if packed else data)


def damaged_text(data: bytes, rng: np.random.Generator) -> bytes:
    """Change a cell, or put a line elsewhere again."""
    text = data.decode("utf-8", "replace")
    if rng.random() < 0.6:
        cells = text.split(",")
        cells[int(rng.integers(len(cells)))] = str(rng.choice(ODD_CELLS))
        return ",".join(cells).encode()
    lines = text.split("\n")
    lines.insert(int(rng.integers(len(lines) + 1)), lines[int(rng.integers(len(lines)))])
    return "\n".join(lines).encode()


def damaged_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Change a byte or a number, cut the end off, leave a piece out or put one elsewhere."""
    size = max(len(data), 1)
    # what a file says of itself is mostly at its front
    at = int(rng.integers(size) if rng.random() < 0.5 else min(rng.integers(400), size - 1))
    some = int(rng.integers(1, 64))
    match rng.integers(5):
        case 0:
            return data[:at] + rng.bytes(1) + data[at + 1 :]
        case 1:
            odd = int(rng.choice([0, 1, -1, 2**15, 2**31 - 1, -(2**31)]))
            return data[:at] + odd.to_bytes(4, "little", signed=True) + data[at + 4 :]
        case 2:
            return data[:at]
        case 3:
            return data[:at] + data[at + some :]
    piece = data[int(rng.integers(size)) :][:some]
    return data[:at] + piece + data[at:]


def run_case(kind: str, good: Path, folder: Path, seed: int) -> str | None:
    """Run one case in a copy of the good files; return the traceback of a defect."""
    rng = np.random.default_rng(seed)
    shutil.copytree(good, folder)
    damage(rng.choice(sorted(path for path in folder.rglob("*") if path.is_file())), rng)
    signal.alarm(SECONDS)
    try:
        KINDS[kind][1](folder)
    except (ValueError, FileNotFoundError) as error:
        try:
            check(error)
        except AssertionError:
            return traceback.format_exc()
    except Exception:  # noqa: BLE001 (whatever it is, it is a defect)
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    return None


def main(
    minutes: Annotated[float, typer.Option(help="How long, shared by the kinds.")] = 1.0,
    kind: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(KINDS)}; all by default.")] = None,
    first_seed: Annotated[int, typer.Option(help="Of the first case; each case has the next one.")] = 0,
) -> None:
    """Read damaged files and say what came of it; exit with 1 if there was a defect."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"it took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (max(used, virtual) + MEMORY_BYTES,) * 2)
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    kinds = kind or list(KINDS)
    cases: Counter[str] = Counter()
    defects: dict[str, str] = {}
    seed = first_seed
    for name in kinds:
        good = root / name
        good.mkdir()
        KINDS[name][0](good)
        end = time.monotonic() + 60 * minutes / len(kinds)
        while time.monotonic() < end:
            folder = root / f"{name} {seed}"
            said = run_case(name, good, folder, seed)
            cases[name] += 1
            place = "".join(line for line in (said or "").splitlines() if line.startswith('  File "'))
            if said is not None and place not in defects:
                defects[place] = said
                typer.echo(f"{name}, seed {seed}, kept in {folder}:\n{said}")
            else:
                shutil.rmtree(folder)
            seed += 1
    typer.echo(f"{sum(cases.values()):,} cases: {dict(cases)}; {len(defects)} defects")
    sys.exit(1 if defects else 0)


if __name__ == "__main__":
    typer.run(main)
