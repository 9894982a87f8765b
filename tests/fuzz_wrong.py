"""Whole files that say something wrong: for ``tests/fuzz.py``, beside the damaged ones of ``fuzz_kinds``.

Each kind writes good files into an empty folder, and has a function that makes them wrong at random.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from common.cohort.cohort import listed_volumes
from common.ct.files import VOLUME_NAME
from common.embeddings.work import ct_sources
from tests.fuzz_kinds import AFFINE, HU, attempt, read_cts

NUMBERS = (0, 1, -1, 0.5, 7, 15, 16, 17, 255, 32767, 32768, 63536, 65535, -2000, -32768, -32769, 2**31, 1e30)
REALS = (*NUMBERS, 1e-30, -1e-30, 3e38, float("nan"), float("inf"), -float("inf"))
TEXTS = (
    *("", " ", "\x00", "1", "1.2.840.99.7", "ORIGINAL\\PRIMARY\\AXIAL", "DERIVED", "a" * 70, "../..", "\\"),
    *("LOCALIZER", "MIP", "é", "HU", "MONOCHROME1", "RGB", "nan", "1e999", "1\\2", "0.7\\0.8\\0.9\\1\\0\\0"),
)
WORDS = (
    *("a", "ct", "Ä", "e\u0301", "日本", "🫁", ".", "..", " ", "-", "_", "\n", "\t", "'", '"', "%s", "{}"),
    "0" * 90,
)
ENDS = (
    *("", ".nii", ".nii.gz", ".NII.Gz", ".hdr", ".img", ".mha", ".NRRD", ".npz", ".zip", ".dcm", "."),
    ".nii ",
)

FIELDS = (
    *("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "pixdim", "xyzt_units", "dim", "quatern_b"),
    *("quatern_c", "quatern_d", "qoffset_x", "vox_offset", "magic", "bitpix", "datatype"),
)
"""Fields of a NIfTI header."""

Kind = tuple[Callable[[Path], None], Callable[[Path], Any], Callable[[Path, np.random.Generator], None]]


def any_of(rng: np.random.Generator, some: tuple[Any, ...]) -> Any:  # noqa: ANN401 (one of them, as it is)
    return some[int(rng.integers(len(some)))]


def random_bytes(data: bytes, rng: np.random.Generator, first: int, end: int) -> bytes:
    """Put one to eight random bytes in place of those between two positions."""
    at, count = int(rng.integers(first, max(end, first + 1))), int(rng.integers(1, 9))
    return data[:at] + rng.bytes(count) + data[at + count :]


def empty(folder: Path) -> None:
    (folder / "notes.txt").write_text("nothing yet\n", encoding="utf-8")


def wrong_values(folder: Path, rng: np.random.Generator) -> None:
    """Write a NIfTI file of odd values and rescale: constant, padded, huge, not finite."""
    dtype = any_of(rng, (np.int16, np.uint16, np.int8, np.uint8, np.int32, np.float32, np.float64, np.int64))
    is_float = np.issubdtype(dtype, np.floating)
    bounds = np.finfo(dtype) if is_float else np.iinfo(dtype)
    voxels = HU.clip(max(bounds.min, -1000), min(bounds.max, 1000)).astype(dtype)
    odd = (bounds.min, bounds.max, 0, np.nan, np.inf, -np.inf) if is_float else (bounds.min, bounds.max, 0)
    for _ in range(rng.integers(1, 4)):
        voxels[rng.random(HU.shape) < any_of(rng, (0.001, 0.3, 0.999, 1.0))] = any_of(rng, odd)
    image = nib.Nifti1Image(voxels, AFFINE, dtype=dtype)
    nib.save(image, folder / "a.nii")
    data = bytearray((folder / "a.nii").read_bytes())
    slopes = np.array([any_of(rng, REALS), any_of(rng, REALS)]).astype("<f4")
    if rng.random() < 0.6:
        data[112:120] = slopes.tobytes()
    (folder / "a.nii").write_bytes(data)


def wrong_geometry(folder: Path, rng: np.random.Generator) -> None:
    """Write a file, or a pair of header and image, whose fields of geometry are random and contradict."""
    shape = tuple(int(rng.choice([1, 1, 2, 5, 9])) for _ in range(rng.integers(1, 8)))
    shape = any_of(rng, (HU.shape, (*HU.shape, 1, 1), (1, *HU.shape), shape))
    voxels = np.resize(HU, shape)
    kind, ending = any_of(rng, ((nib.Nifti1Image, "nii"), (nib.Nifti2Image, "nii"), (nib.Nifti1Pair, "hdr")))
    image = kind(voxels, AFFINE)
    path = folder / f"a.{ending}"
    nib.save(image, path)
    header = image.header.copy()
    for _ in range(rng.integers(1, 6)):
        field = any_of(rng, FIELDS)
        of = header.structarr[field]
        if of.dtype.kind == "S":
            header.structarr[field] = any_of(rng, (b"n+1", b"ni1", b"n+2", b"", b"xxx"))
        elif of.ndim:
            odd = np.array(any_of(rng, NUMBERS)).astype(of.dtype)
            header.structarr[field][int(rng.integers(of.size))] = odd
        else:
            numbers = REALS if of.dtype.kind == "f" else NUMBERS
            header.structarr[field] = np.array(any_of(rng, numbers)).astype(of.dtype)
    block = header.structarr.tobytes()
    path.write_bytes(block + path.read_bytes()[len(block) :])
    if ending == "hdr" and rng.random() < 0.4:
        image_path = path.with_suffix(".img")
        image_path.rename(folder / any_of(rng, ("A.IMG", "b.img", "a.img.gz", "a.nii", "a.raw")))


def images(folder: Path) -> None:
    image = sitk.GetImageFromArray(np.ascontiguousarray(HU.T))
    image.SetSpacing((0.7, 0.8, 1.5))
    image.SetOrigin((3.0, 4.0, 5.0))
    for name in ("a.mha", "b.mhd", "c.nrrd", "d.nhdr"):
        sitk.WriteImage(image, str(folder / name), useCompression=False)


def wrong_images(folder: Path, rng: np.random.Generator) -> None:
    """Change, leave out, or write twice the lines of the headers of MetaImage and NRRD."""
    names = "LOCAL", "LIST", "b.raw", "../b.raw", "gzip", "MET_DOUBLE", "(1,0,0) none", "%d 1 9 1"
    odd = (*TEXTS, *map(str, REALS), *names)
    for path in sorted(path for path in folder.iterdir() if path.suffix != ".raw"):
        head, mark, voxels = path.read_bytes().partition(b"LOCAL\n" if path.suffix == ".mha" else b"\n\n")
        lines = head.decode("latin-1").split("\n")
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(lines)))
            key, between, value = lines[at].partition(" = " if "=" in lines[at] else ": ")
            cells = value.split(" ")
            cells[int(rng.integers(len(cells)))] = any_of(rng, odd)
            start, twice = key + between, lines[at] + "\n" + lines[at]
            lines[at] = any_of(rng, (start + " ".join(cells), start + any_of(rng, odd), "", twice))
        path.write_bytes("\n".join(lines).encode("utf-8") + mark + voxels)


def name_of(rng: np.random.Generator) -> str:
    """Return a name that a file system takes."""
    words = "".join(any_of(rng, WORDS) for _ in range(rng.integers(1, 4)))
    name = (words + any_of(rng, ENDS)).replace("/", "").replace("\0", "")[:80]
    return name if name.strip(".") else f"a{name}"


def wrong_names(folder: Path, rng: np.random.Generator) -> None:
    """Write volumes under odd names and folders, links, bytes that are no text, names that fall together."""
    content = nib.Nifti1Image(HU, AFFINE).to_bytes()
    for _ in range(rng.integers(1, 6)):
        place = folder / name_of(rng) if rng.random() < 0.4 else folder
        path = place / name_of(rng)
        if place.is_file() or path.exists() or path.is_symlink():
            continue
        place.mkdir(exist_ok=True)
        match rng.integers(6):
            case 0:
                path.symlink_to(any_of(rng, (folder, Path("nowhere"), path, folder / "notes.txt")))
            case 1:
                (place / "no text \udcff\udcfe.nii").write_bytes(content[: any_of(rng, (0, 400, None))])
            case 2:
                path.mkdir()
            case _:
                path.write_bytes(content if rng.random() < 0.7 else b"")


def wrong_zip(folder: Path, rng: np.random.Generator) -> None:
    """Write a zip of odd names: with backslashes, absolute, of folders above, twice, folder and file."""
    odd = "..\\ ../ / C:\\ a\\ a/ ./ // \\\\host\\ a/../ A/ .hidden/ a/a.nii/".split()
    with zipfile.ZipFile(folder / "a.zip", "w", any_of(rng, (0, 8, 12, 14))) as archive:
        for _ in range(rng.integers(0, 5)):
            info = zipfile.ZipInfo("a")
            place, name = any_of(rng, (*odd, "", "", "")), any_of(rng, (name_of(rng), "a.nii", "a.nii/", ""))
            info.filename = place + name
            info.external_attr = any_of(rng, (0o644, 0o120777, 0o040755, 0o000)) << 16
            archive.writestr(info, any_of(rng, (nib.Nifti1Image(HU, AFFINE).to_bytes(), b"", b"x")))


def volumes(folder: Path) -> None:
    for name in ("s1/ct.nii", "s2/ct.nii", "a.b.nii", "Müller.nii"):
        (folder / name).parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(HU[:3, :3, :3], AFFINE), folder / name)


def wrong_lists(folder: Path, rng: np.random.Generator) -> None:
    """Write a list of names with odd headings, cells, quotes, ends of lines and encodings."""
    names = "VolumeName", "id", "File Name", "s1/ct.nii", "s2\\ct.nii.gz", "a_b", "/", "//", "ct", "a.b"
    cells = (*WORDS, *TEXTS, *names)
    between = any_of(rng, (",", ";", "\t", ",,", '","', " "))
    counts = rng.integers(0, 4, rng.integers(0, 6))
    rows = [between.join(any_of(rng, cells) for _ in range(count)) for count in counts]
    text = any_of(rng, ("\n", "\r\n", "\r", "\n\n", "\u2028")).join(rows)
    encoding = any_of(rng, ("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"))
    data = text.encode(encoding, "replace")
    huge = b"a" * 200_000 if rng.random() < 0.05 else b""
    (folder / any_of(rng, ("list.csv", "list.txt", "list.TSV", "list"))).write_bytes(data + huge)


def read_lists(folder: Path) -> None:
    (listing,) = folder.glob("list*")
    attempt(lambda: ct_sources(folder, subset_csv=listing))
    attempt(lambda: ct_sources(folder, skip_list=listing))
    attempt(listed_volumes, listing)


def read_named(folder: Path) -> None:
    """Read CTs; their names must fit a shard and differ, and what is said of the others one line of text."""
    sources, rejected = ct_sources(folder)
    names = [source.volume for source in sources]
    if len({*names}) < len(names) or not all(map(VOLUME_NAME.fullmatch, names)):
        raise AssertionError(f"volumes must have a name each that fits a shard, got {names}.")
    if any("\n" in one.detail for one in rejected):
        raise AssertionError(f"each volume must be left out in a line, got {rejected}.")
    read_cts(folder)


WRONG: dict[str, Kind] = {
    "values": (empty, read_cts, wrong_values),
    "geometry": (empty, read_cts, wrong_geometry),
    "images": (images, read_cts, wrong_images),
    "names": (empty, read_named, wrong_names),
    "zip names": (empty, read_named, wrong_zip),
    "lists": (volumes, read_lists, wrong_lists),
}
"""By name: what writes good files, how they are read, and what makes them wrong."""
