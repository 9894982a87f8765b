"""Parses DICOM files as scanners, archives and tools for anonymising leave them, or says what is wrong."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from common.ct.rejection import RejectedError

if TYPE_CHECKING:  # takes 0.2 s to import; --help must not wait for it
    from pydicom import FileDataset
    from pydicom.uid import UID

DEFLATED = "1.2.840.10008.1.2.1.99"
FIRST_GROUPS = (2, 4, 8)
"""Groups of elements a file without a preamble begins with: meta information, directory, identification."""


def parse(path: Path, source: Path | io.BytesIO, **options: Any) -> FileDataset:  # noqa: ANN401 (pydicom's own)
    """Parse a DICOM file without a word about small deviations from the standard.

    The preamble, the meta information or both may be missing, as in files of old archives; the transfer
    syntax in the meta information of what is returned is then that of the elements.

    Args:
        path: of the file, for the message.
        source: the same path, or the file's content.
        options: of ``pydicom.dcmread``.

    Raises:
        RejectedError: if it is no DICOM file or damaged.
    """
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    with rejecting(path), _SizedFile(path) if isinstance(source, Path) else source as file:
        start = elements_start(file)
        if start is None:
            raise ValueError("it begins with neither a preamble nor an element")
        if _is_deflated(file, start):  # pydicom would inflate all of it, a thousandfold at worst
            raise ValueError("it is deflated, which scanners don't write. Convert it to Explicit VR")
        file.seek(0)
        dataset = pydicom.dcmread(file, force=True, **options)
        if not dataset.file_meta.get("TransferSyntaxUID"):
            dataset.file_meta.TransferSyntaxUID = _found_syntax(dataset)
        for elements in (dataset.file_meta, dataset) if "specific_tags" in options else ():
            list(elements)  # pydicom interprets an element when it is first asked for
    return dataset


def elements_start(file: BinaryIO) -> int | None:
    """Return the byte at which a DICOM file's elements start; None where it is none.

    Without a preamble the first element must be one that DICOM files begin with, short, and of a type that
    exists.
    """
    from pydicom.values import converters

    file.seek(0)
    head = file.read(132)
    if head[128:] == b"DICM":
        return 132
    if len(head) < 8:
        return None
    for order in "<>":
        group, element, length = struct.unpack(f"{order}HHI", head[:8])
        is_explicit = head[4:6].decode("latin-1") in converters
        if group in FIRST_GROUPS and element < 0x2000 and (is_explicit or length < 1024):
            return 0
    return None


def _is_deflated(file: BinaryIO, start: int) -> bool:
    """Look for the transfer syntax in the elements of group 2, which stand in front of all others."""
    from pydicom.filereader import read_dataset

    for is_implicit in (False, True):  # the second is against the standard; pydicom reads it, too
        file.seek(start)
        meta = read_dataset(file, is_implicit, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        with suppress(NotImplementedError):
            if "TransferSyntaxUID" in meta:
                return bool(meta.TransferSyntaxUID == DEFLATED)
    return False


def _found_syntax(dataset: FileDataset) -> UID:
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    is_implicit, is_little_endian = dataset.original_encoding
    if is_implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if is_little_endian else ExplicitVRBigEndian


class _SizedFile(io.BufferedReader):
    """A file that gives all it has left if asked for more than its size.

    Python makes room for as much as is asked for, and a damaged header asks for gigabytes.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        return super().read(size if size is not None and size < self._size else -1)


@contextmanager
def rejecting(path: Path) -> Iterator[None]:
    """Turn what pydicom and SimpleITK raise for damaged files into a rejection."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    damaged = (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
        OverflowError,
    )
    try:
        yield
    except RejectedError:
        raise
    except (*damaged, struct.error, zlib.error, BytesLengthException, InvalidDicomError) as error:
        said = str(error).strip().rsplit("\n", 1)[-1]  # SimpleITK begins with where in its sources
        detail = f"Cannot read '{path}' as DICOM: {said}. Copy or export it again."
        raise RejectedError("unreadable", detail) from error
