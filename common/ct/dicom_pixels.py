"""Decodes a slice of a DICOM file into HU, whatever its compression, sign, spare bits and padding."""

import tempfile

import numpy as np
from pydicom import Dataset, FileDataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import pixel_array
from pydicom.uid import CTImageStorage, RLELossless

from common.ct.dicom_header import SliceHeader
from common.ct.geometry import STORED_HU_RANGE, HUValues, store_hu

FLOATS = {"FloatPixelData": "Float", "DoubleFloatPixelData": "DoubleFloat"}


def read_hu(dataset: FileDataset, header: SliceHeader, *, out: np.ndarray, kept: HUValues) -> None:
    """Read a slice in HU as shards keep them; padding, which is no part of the image, becomes the lowest.

    Args:
        dataset: the whole file.
        header: header of the slice.
        out: ``(H, W)`` int16, filled with HU.
        kept: takes in the image's values before the clip; nothing where all is padding.

    Raises:
        RejectedError: if a value is not finite.
        ValueError: if the shape is not that of ``out``; and what pydicom and SimpleITK raise.
    """
    words = _stored_words(dataset, header.frame)
    if words.shape != out.shape:
        raise ValueError(f"it has pixels of shape {words.shape} under a header of {out.shape}")
    values = words if words.dtype.kind == "f" else _as_integers(words, dataset)
    padding = _padding(words, values, dataset)
    if not padding.all():
        if padding.any():
            values = np.where(padding, values[~padding][0], values)
        store_hu(values, header.slope, header.intercept, out=out, kept=kept, where=header.name)
    out[padding] = STORED_HU_RANGE[0]


def _stored_words(dataset: FileDataset, frame: int) -> np.ndarray:
    """Return the numbers of a slice as they are stored, spare high bits included."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and syntax != RLELossless:  # GDCM divides by zero at damaged run lengths
        return _decoded(dataset, frame)
    if syntax != RLELossless and "PixelData" in dataset and dataset["PixelData"].is_undefined_length:
        raise ValueError("its pixels are compressed, and TransferSyntaxUID does not say how")
    words = pixel_array(dataset, index=frame, correct_unused_bits=False, decoding_plugin="pydicom")
    return words.astype(words.dtype.newbyteorder("="), copy=False)


def _as_integers(words: np.ndarray, dataset: FileDataset) -> np.ndarray:
    """Take the lowest BitsStored bits of each word; those above may hold overlays or anything."""
    kind = "i" if dataset.PixelRepresentation else "u"
    spare = 8 * words.itemsize - int(dataset.BitsStored)
    if not 0 <= spare < 8 * words.itemsize:
        raise ValueError(f"it has {dataset.BitsStored} BitsStored in words of {8 * words.itemsize}")
    if spare == 0:
        return words.view(f"{kind}{words.itemsize}")
    shifted: np.ndarray = (words << spare).view(f"{kind}{words.itemsize}") >> spare
    return shifted


def _padding(words: np.ndarray, values: np.ndarray, dataset: FileDataset) -> np.ndarray:
    """Mark the pixels of PixelPaddingValue to PixelPaddingRangeLimit.

    Headers give the bounds in the wrong sign at times, 63536 for -2000: their bits count, in the sign
    of the pixels. Padding that BitsStored bits cannot hold is looked for in whole words.
    """
    prefix = next((prefix for name, prefix in FLOATS.items() if name in dataset), "")
    value = dataset.get(f"{prefix}PixelPaddingValue")
    if value is None:
        return np.zeros(words.shape, bool)
    limit = dataset.get(f"{prefix}PixelPaddingRangeLimit")
    bounds = sorted([value, value if limit is None else limit])
    if not prefix:
        bits = 8 * words.itemsize
        patterns = np.array([int(bound) % 2**bits for bound in bounds], f"u{words.itemsize}")
        low, high = bounds = sorted(patterns.view(values.dtype).tolist())
        sign = 1 if values.dtype.kind == "i" else 0
        stored_bits = int(dataset.BitsStored) - sign
        if not -sign * 2**stored_bits <= low <= high < 2**stored_bits:
            values = words.view(values.dtype)
    mask: np.ndarray = (values >= bounds[0]) & (values <= bounds[1])
    return mask


def _decoded(dataset: FileDataset, frame: int) -> np.ndarray:
    """Decode JPEG, JPEG-LS or JPEG 2000 to whole words.

    GDCM, which does it, makes gigabytes ready where lengths in a file are wrong, inverts MONOCHROME1, and
    wants identifiers. So it is given the pixels alone, in a file written for it.
    """
    import SimpleITK  # takes 0.3 s to import; --help must not wait for it

    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, "1.2.3"
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.Rows, image.Columns = dataset.Rows, dataset.Columns
    image.BitsAllocated = image.BitsStored = dataset.BitsAllocated
    image.HighBit, image.PixelRepresentation = dataset.BitsAllocated - 1, dataset.PixelRepresentation
    offsets = None
    if "ExtendedOffsetTable" in dataset:
        offsets = dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths
    num_frames = int(dataset.get("NumberOfFrames") or 1)
    pixels = get_frame(dataset.PixelData, frame, number_of_frames=num_frames, extended_offsets=offsets)
    image.PixelData = encapsulate([pixels])
    image["PixelData"].is_undefined_length = True
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    with tempfile.NamedTemporaryFile(prefix="dale-ct-", suffix=".dcm") as file:
        image.save_as(file, enforce_file_format=True)
        file.flush()
        reader.SetFileName(file.name)
        try:
            return np.asarray(SimpleITK.GetArrayFromImage(reader.Execute()))[0]
        except RuntimeError as error:
            syntax = image.file_meta.TransferSyntaxUID.name
            raise ValueError(f"its pixels cannot be decoded as {syntax}") from error
