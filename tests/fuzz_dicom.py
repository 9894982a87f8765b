"""DICOM files that say something wrong: the kinds of ``tests/fuzz.py`` that are no damage to random bytes."""

import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.uid import (
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from tests.conftest import series_of
from tests.fuzz_kinds import HU, dicom, read_cts
from tests.fuzz_wrong import NUMBERS, REALS, TEXTS, Kind, any_of, random_bytes

TAGS = (
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "BitsStored", "HighBit", "PixelRepresentation"),
    *("BitsAllocated", "ImageType", "SeriesInstanceUID", "StudyInstanceUID", "SOPInstanceUID", "SOPClassUID"),
    *("NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "Modality", "StackID", "RescaleType"),
    *("RescaleSlope", "RescaleIntercept", "PixelSpacing", "ImagePositionPatient", "Rows", "Columns"),
    *("ImageOrientationPatient", "VolumeBasedCalculationTechnique", "FloatPixelPaddingValue"),
)
VRS = ("US", "SS", "UL", "SL", "DS", "IS", "UN", "OW", "LO", "CS", "UI", "FL", "FD", "OB", "SQ", "AT")


def value_of(rng: np.random.Generator, vr: str) -> bytes:
    """Return the bytes of a value that a type may have, or nearly."""
    types = {"US": "<u2", "SS": "<i2", "UL": "<u4", "SL": "<i4", "FL": "<f4", "FD": "<f8"}
    if vr in ("UN", "OW", "OB"):
        return rng.bytes(2 * int(rng.integers(5)))
    if vr == "SQ":
        return b"\xfe\xff\x00\xe0\x00\x00\x00\x00" * int(rng.integers(3))  # empty items
    if vr in types:
        some = [any_of(rng, REALS if vr[0] == "F" else NUMBERS) for _ in range(rng.choice([0, 1, 1, 2]))]
        return np.array(some).astype(types[vr]).tobytes()
    text = any_of(rng, (*TEXTS, *map(str, REALS))).encode()
    return text + b" " * (len(text) % 2)


def put(dataset: pydicom.Dataset, rng: np.random.Generator, names: tuple[str, ...] = TAGS) -> None:
    """Leave an element out, or give it another type and value."""
    tag = pydicom.tag.Tag(any_of(rng, names))
    if rng.random() < 0.2:
        dataset.pop(tag, None)
        return
    usual = pydicom.datadict.dictionary_VR(tag).split(" or ")[0]
    vr = usual if rng.random() < 0.6 else any_of(rng, VRS)
    value = value_of(rng, vr)
    dataset[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)


def save(dataset: pydicom.Dataset, path: Path, syntax: str = ExplicitVRLittleEndian) -> None:
    """Write a dataset however wrong it is; one that pydicom can't write stays as it was."""
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    content = io.BytesIO()
    is_implicit, is_little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    try:
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(content, implicit_vr=is_implicit, little_endian=is_little, force_encoding=True)
    except Exception:  # noqa: BLE001 (pydicom raises whatever it stumbles over)
        return
    path.write_bytes(content.getvalue())


def files_of(folder: Path, rng: np.random.Generator) -> list[Path]:
    """Return one file or all."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return paths if rng.random() < 0.6 else [any_of(rng, tuple(paths))]


def wrong_meta(folder: Path, rng: np.random.Generator) -> None:
    """Write a series in another transfer syntax, then leave out or damage what stands in front."""
    encoded = any_of(rng, (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian))
    stated = any_of(
        rng, (encoded, encoded, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, "", "1.2")
    )
    cut, seed = int(rng.integers(5)), int(rng.integers(2**31))
    for path in files_of(folder, rng):
        save(pydicom.dcmread(path), path, encoded)
        data = path.read_bytes()
        end = 144 + int.from_bytes(data[140:144], "little")  # of the meta information, by its first element
        meta, elements = data[132:end], data[end:]
        meta = meta.replace(str(encoded).encode(), str(stated).encode().ljust(len(encoded), b"\0"))
        own = np.random.default_rng(seed)
        parts = (
            data[:132] + random_bytes(meta, own, 0, len(meta)) + elements,
            data[:132] + meta + elements,
            meta + elements,
            elements,
            data[:132] + elements,
        )
        path.write_bytes(parts[cut])


def wrong_elements(folder: Path, rng: np.random.Generator) -> None:
    """Give one to three elements of a file, or of all alike, other values."""
    seed, count = int(rng.integers(2**31)), int(rng.integers(1, 4))
    for path in files_of(folder, rng):
        dataset, own = pydicom.dcmread(path, force=True), np.random.default_rng(seed)
        for _ in range(count):
            put(dataset, own)
        save(dataset, path)


SEQUENCES = {
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept", "RescaleType"),
    "FrameContentSequence": ("StackID", "TemporalPositionIndex"),
}


def groups_of(source: pydicom.Dataset, sequences: Sequence[str]) -> pydicom.Dataset:
    group = pydicom.Dataset()
    for name in sequences:
        item = pydicom.Dataset()
        for tag in SEQUENCES[name]:
            if tag in source:
                item[tag] = source[tag]
        setattr(group, name, [item])
    return group


def frames_of(
    path: Path,
    files: Sequence[Path],
    shared: Sequence[str] = (),
    sop_class: str = EnhancedCTImageStorage,
    compress: bool = False,
) -> Path:
    """Join files of one slice each into one of a frame each; the groups not shared are the frames' own."""
    slices = [pydicom.dcmread(file) for file in files]
    joined = pydicom.dcmread(files[0])
    for tags in SEQUENCES.values():
        for tag in tags:
            if tag in joined:
                delattr(joined, tag)
    joined.SOPClassUID = joined.file_meta.MediaStorageSOPClassUID = sop_class
    joined.NumberOfFrames = len(slices)
    joined.PixelData = b"".join(one.PixelData for one in slices)
    own = [name for name in SEQUENCES if name not in shared]
    joined.SharedFunctionalGroupsSequence = [groups_of(slices[0], shared)]
    joined.PerFrameFunctionalGroupsSequence = [groups_of(one, own) for one in slices]
    if compress:
        joined.compress(RLELossless, encapsulate_ext=len(files) > 3)
    joined.save_as(path)
    return path


def enhanced(folder: Path) -> None:
    """Write the slices of a series as frames of one file."""
    paths = series_of(folder, HU.transpose(2, 1, 0)[:4])
    shared = ("PixelMeasuresSequence", "PlaneOrientationSequence", "PixelValueTransformationSequence")
    frames_of(folder / "a.dcm", paths, shared)
    for path in paths:
        path.unlink()


def _spoil_groups(whole: pydicom.Dataset, rng: np.random.Generator) -> None:
    """Change elements within functional groups, or leave groups out, double them or nest them."""
    for _ in range(rng.integers(1, 4)):
        nested = [whole]
        for _ in range(rng.integers(1, 5)):
            sequences = [element for element in nested[-1] if element.VR == "SQ" and len(element.value)]
            if not sequences:
                break
            nested.append(any_of(rng, tuple(any_of(rng, tuple(sequences)).value)))
        at, names = nested[-1], tuple(element.keyword for element in nested[-1] if element.keyword)
        if len(nested) > 2 and rng.random() < 0.3:
            sequence = any_of(
                rng, (whole.SharedFunctionalGroupsSequence, whole.PerFrameFunctionalGroupsSequence)
            )
            if rng.random() < 0.5 and sequence:
                sequence.pop()
            else:
                sequence.append(at)
        elif names:
            put(at, rng, names if len(nested) > 1 and rng.random() < 0.7 else TAGS)
        if not all(
            name in whole for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
        ):
            break


def wrong_groups(folder: Path, rng: np.random.Generator) -> None:
    """Change what a file says of its frames."""
    (path,) = folder.glob("*.dcm")
    whole = pydicom.dcmread(path)
    with suppress(Exception):  # pydicom may not read what was put there before
        _spoil_groups(whole, rng)
    save(whole, path)


def run_lengths(folder: Path) -> None:
    dicom(folder)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless, encoding_plugin="pydicom")
        dataset.save_as(path)


def wrong_runs(folder: Path, rng: np.random.Generator) -> None:
    """Put random bytes into the table of segments, the runs, or the items around them; or cut them."""
    for path in files_of(folder, rng):
        data = path.read_bytes()
        pixels = data.find(b"\xe0\x7f\x10\x00")
        for _ in range(rng.integers(1, 4)):
            data = random_bytes(data, rng, pixels + 8, pixels + 100 if rng.random() < 0.6 else len(data))
        cut = int(rng.integers(pixels, len(data))) if rng.random() < 0.2 else len(data)
        path.write_bytes(data[:cut])


DICOM: dict[str, Kind] = {
    "dicom meta": (dicom, read_cts, wrong_meta),
    "dicom elements": (dicom, read_cts, wrong_elements),
    "enhanced": (enhanced, read_cts, wrong_groups),
    "run lengths": (run_lengths, read_cts, wrong_runs),
}
