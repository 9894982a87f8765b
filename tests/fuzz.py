"""Damaged input for as long as you like: ``PYTHONPATH=. python tests/fuzz.py --minutes 10``.

Each case takes good files of some kind, damages one of them at random or makes them say something wrong, and
reads them. That may succeed, or end in an error that a user can fix: a ValueError or FileNotFoundError that a
line of ours raised, in a line of text. All else is a defect (another error, a library's own words, 4 GiB of
memory, 30 s): it is shown with its seed, and the files are kept. Fix it, and add a test beside the module.
A crash of a library ends the program: the files of the last case are still there.
"""

import gzip
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from tests.fuzz_dicom import DICOM
from tests.fuzz_kinds import KINDS as DAMAGED
from tests.fuzz_kinds import check
from tests.fuzz_wrong import WRONG

SECONDS, MEMORY_BYTES = 30, 4 * 2**30
ODD_CELLS = (
    *("", " ", "nan", "-1", "2", "1e999", "0x1", "None", '"', "a,b", "\x00", "ü" * 300, "../../etc", "1\r2"),
)


class TooLongError(BaseException):
    """A case took too long; no TimeoutError, which is an OSError, and readers refuse a file for those."""


def damage(folder: Path, rng: np.random.Generator) -> None:
    """Change a file one to four times: its bytes, or its cells and lines where it is text."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
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


KINDS = {name: (*kind, damage) for name, kind in DAMAGED.items()} | DICOM | WRONG


def run_case(kind: str, good: Path, folder: Path, seed: int) -> str | None:
    """Run one case in a copy of the good files; return the traceback of a defect."""
    rng = np.random.default_rng(seed)
    shutil.copytree(good, folder)
    _, read, spoil = KINDS[kind]
    spoil(folder, rng)
    signal.alarm(SECONDS)
    try:
        read(folder)
    except (ValueError, FileNotFoundError) as error:
        try:
            check(error)
        except AssertionError:
            return traceback.format_exc()
    except (Exception, TooLongError):  # noqa: BLE001 (whatever it is, it is a defect)
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
        raise TooLongError(f"it took more than {SECONDS} s")

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
