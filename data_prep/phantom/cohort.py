"""Writes a synthetic chest-CT cohort in the layouts of the real datasets: the demo's and the tests' data.

Volume k of a cohort is a function of (seed, site, k) and of the settings of the scan, whatever the number of
volumes; so a cohort can be stopped, resumed with the same command, and enlarged. What is drawn is analytic
(:mod:`data_prep.phantom.anatomy`): no patient's data are used. All 18 CT-RATE labels are drawn.
"""

import json
import multiprocessing
import os
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data_prep.phantom.files import (
    FORMS,
    rad_path,
    rex_path,
    sidecar_path,
    ts_path,
    volume_path,
    write_atomic,
    write_volume,
)
from data_prep.phantom.population import SITE_CODES, ScanId, roster
from data_prep.phantom.scan import describe, render
from data_prep.phantom.scanner import KERNELS, SITES, Redraw
from data_prep.phantom.tables import (
    README,
    metadata_row,
    write_ct_rate_tables,
    write_rad_chestct_tables,
    write_rexgroundingct_json,
)

MIN_MATRIX = 32


@dataclass(frozen=True)
class Settings:
    """Everything that determines a cohort's voxels and tables, besides the number of volumes.

    Args:
        seed: at least 0; another seed gives other patients.
        site: "a", or "b": another scanner, also written as RAD-ChestCT.
        form: "v2" (HU and a proper header), "v1" (raw values and a blank header), or "both".
        matrix: rows and columns. CT-RATE: 512.
        slice_mm: range of the slice distance; None for the site's own (a: 1 to 5 mm, b: 1 to 3 mm).
        valid_share: share of the patients in the validation split. CT-RATE: 0.06; our choice: 0.2, for small
            cohorts.
        rex_share: share of the scans with lung findings that have ReXGroundingCT masks (our choice: 0.3).
        npz_spacing_mm: voxel edge of RAD-ChestCT's npz at site b. RAD-ChestCT: 0.8; larger is faster.
        kernel: see :class:`data_prep.phantom.scanner.Redraw`.
        dose: likewise.
        table: likewise.

    Raises:
        ValueError: if a setting is out of its range.
    """

    seed: int = 0
    site: str = "a"
    form: str = "v2"
    matrix: int = 512
    slice_mm: tuple[float, float] | None = None
    valid_share: float = 0.2
    rex_share: float = 0.3
    npz_spacing_mm: float = 0.8
    kernel: str | None = None
    dose: float = 1.0
    table: bool = True

    @property
    def redraw(self) -> Redraw:
        """What of the scanner is drawn otherwise."""
        return Redraw(self.kernel, self.dose, self.table)

    def __post_init__(self) -> None:
        allowed: dict[str, list[str | None]] = {
            "site": [*sorted(SITE_CODES)],
            "form": [*FORMS],
            "kernel": [None, *KERNELS],
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, got '{getattr(self, name)}'.")
        if self.matrix < MIN_MATRIX:
            raise ValueError(f"matrix must be at least {MIN_MATRIX}, got {self.matrix}.")
        if self.slice_mm is not None and not 0 < self.slice_mm[0] <= self.slice_mm[1]:
            raise ValueError(f"spacing_mm must be two ascending positive numbers, got {self.slice_mm}.")
        if not 0 <= self.rex_share <= 1:
            raise ValueError(f"rex_share must be in [0, 1], got {self.rex_share}.")
        if not self.npz_spacing_mm > 0:
            raise ValueError(f"npz_spacing_mm must be positive, got {self.npz_spacing_mm}.")
        if not self.dose > 0:
            raise ValueError(f"dose must be positive, got {self.dose}.")


def write_cohort(
    out: Path, num_volumes: int, settings: Settings, num_processes: int | None = None
) -> Generator[ScanId, None, None]:
    """Write a cohort; existing volumes are kept.

    Args:
        out: the cohort's folder.
        num_volumes: at least 1; volume k is the same in cohorts of any size.
        settings: settings of the cohort.
        num_processes: None: one per core; 1: no other process.

    Yields:
        Each volume when it is finished; the tables are written after the last one.

    Raises:
        ValueError: if the folder holds a cohort with other settings, or a larger one, or a number is below 1.
    """
    scans = roster(num_volumes, settings.seed, settings.site, settings.valid_share)
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"processes must be at least 1, got {num_processes}.")
    _claim(out, num_volumes, settings)
    records: dict[ScanId, dict[str, Any]] = {}
    for scan, record in _write_volumes(out, scans, settings, num_processes or os.cpu_count() or 1):
        records[scan] = record
        yield scan
    _write_tables(out, {scan: records[scan] for scan in scans}, settings)


def _claim(out: Path, num_volumes: int, settings: Settings) -> None:
    """Write the cohort's settings, or compare them with the existing ones."""
    path = out / "cohort.json"
    wanted = {"synthetic": True, **json.loads(json.dumps(asdict(settings)))}
    if path.exists():
        # a cohort of before a setting was there has its default
        defaults = {field.name: field.default for field in fields(Settings)}
        found = defaults | json.loads(path.read_text(encoding="ascii"))
        before = found.pop("num_volumes")
        if found != wanted:
            differing = sorted(key for key in wanted if found.get(key) != wanted[key])
            raise ValueError(
                f"The cohort in '{out}' was made with other settings: {differing}. Use another --out."
            )
        if before > num_volumes:
            raise ValueError(
                f"volumes must be at least {before}, the size of the cohort in '{out}', got {num_volumes}."
            )
    content = json.dumps({**wanted, "num_volumes": num_volumes}, indent=1)
    write_atomic(path, content.encode("ascii"))
    write_atomic(out / "README.md", README.encode("ascii"))


def _write_volumes(
    out: Path, scans: list[ScanId], settings: Settings, num_processes: int
) -> Iterator[tuple[ScanId, dict[str, Any]]]:
    missing = []
    for scan in scans:
        record = _finished(out, scan, settings)
        if record is None:
            missing.append(scan)
        else:
            yield scan, record
    if num_processes == 1 or len(missing) < 2:
        for scan in missing:
            yield scan, _make(out, scan, settings)
        return
    # Forked: a spawned worker would import the whole command line, which takes longer than a small cohort.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(num_processes, len(missing)), mp_context=context) as pool:
        futures = {pool.submit(_make, out, scan, settings): scan for scan in missing}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _make(out: Path, scan: ScanId, settings: Settings) -> dict[str, Any]:
    volume = render(scan, settings.site, settings.matrix, settings.slice_mm, redraw=settings.redraw)
    npz_spacing_mm = settings.npz_spacing_mm if settings.site == "b" else None
    return write_volume(volume, out, settings.form, settings.rex_share, npz_spacing_mm)


def _finished(out: Path, scan: ScanId, settings: Settings) -> dict[str, Any] | None:
    """The sidecar of a volume all of whose files exist."""
    path = sidecar_path(out, scan)
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
    forms = ("v1", "v2") if settings.form == "both" else (settings.form,)
    expected = [ts_path(out, scan), *(volume_path(out, scan, form) for form in forms)]
    if record["rexgroundingct"]["categories"]:
        expected.append(rex_path(out, scan))
    if settings.site == "b" and not scan.is_head:
        expected.append(rad_path(out, scan))
    return record if all(file.exists() for file in expected) else None


def _write_tables(out: Path, records: dict[ScanId, dict[str, Any]], settings: Settings) -> None:
    site = SITES[settings.site]
    rows, labels = {}, {}
    for scan in records:
        severities, person, protocol = describe(
            scan, settings.site, settings.matrix, settings.slice_mm, redraw=settings.redraw
        )
        rows[scan], labels[scan] = metadata_row(scan, person, protocol, site, settings.matrix), severities
    write_ct_rate_tables(out, rows, labels)
    write_rexgroundingct_json(out, records)
    if settings.site == "b":
        write_rad_chestct_tables(out, records, settings.npz_spacing_mm)
