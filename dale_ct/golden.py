"""Golden embeddings: the numbers an encoder must give for a known CT, and where a port parts from them.

``bundles/<name>/golden.json`` names a CT (a phantom by its seed, or a file by its SHA-256), the weights, and
numbers of four stages: what was read, where it was cropped, what the network saw, and what it answered.
"""

# Z slices of the CT, H side of a slice, N slices that are shown, I side of an image, T tokens, D embedding

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch

from common.embeddings.ct_batches import images_of
from common.embeddings.work import CTSlices, ct_sources
from common.networks.encoder import SlicesInferer
from common.transforms.slice_strategies import body_box
from dale_ct.encoder import SliceEncoder, VolumeEncoder, load_encoder
from data_prep.phantom.cohort import Settings, write_cohort

FILE = "golden.json"
Stages = dict[str, dict[str, list[float]]]
PHANTOM_MM = 10.0  # between slices: 33 of them, a second to draw
FIRST = 8  # values of a token that are kept
TOLERANCE: dict[str, Any] = {
    "read": 0.05,
    "crop": 0,
    "normalise": 0.005,
    "network": {"cpu float32": 1e-3, "cuda float32": 1e-2, "cpu bfloat16": 0.05, "cuda bfloat16": 0.05},
}
"""What a stage's numbers may differ by: HU; pixels; deviations of the window; of the network the share of a
line's largest number. Our choice: a voxel of the phantom may round to the next HU on another machine, and
convolutions of a GPU use TF32."""


class Line(NamedTuple):
    """What became of one stage.

    Args:
        stage: "read", "crop", "normalise" or "network".
        is_fine: whether all its numbers are within the tolerance.
        text: the greatest difference, with what was expected.
    """

    stage: str
    is_fine: bool
    text: str


def record(
    encoder: str, weights: str | None = None, ct: Path | None = None, seed: int = 2, device: str = "cpu"
) -> dict[str, Any]:
    """Compute in float32 what ``golden.json`` holds.

    Args:
        encoder: name of a bundled encoder, or a bundle's folder.
        weights: as for :func:`dale_ct.encoder.load_encoder`.
        ct: file of a CT, a folder or zip of one; None for a phantom.
        seed: which phantom; 2 is cropped to its body.
        device: where the network computes.

    Raises:
        ValueError: if there is no such encoder, or not one CT.
    """
    opened = load_encoder(encoder, weights, device)
    scan = _read(ct, seed)
    source = {"phantom_seed": seed} if ct is None else {"name": ct.name, "sha256": scan.sha256}
    return {
        "encoder": opened.identity["encoder"],
        "encoder_id": opened.identity["encoder_id"],
        "weights": opened.identity["weights"],
        "recorded": f"{device} float32, torch {torch.__version__}",
        "ct": source,
        "slices": _shown(len(scan.hu)),
        "stages": stages_of(outputs_of(opened, scan, "float32")),
        "tolerance": TOLERANCE,
    }


def verify(
    golden: Mapping[str, Any],
    opened: SliceEncoder | VolumeEncoder,
    ct: Path | None = None,
    dtype: str = "float32",
) -> Iterator[Line]:
    """Compute the stages here and compare each with what was recorded.

    Args:
        golden: content of a ``golden.json``.
        opened: the encoder as it is here.
        ct: the CT that was recorded, unless that is a phantom.
        dtype: "float32" or "bfloat16" for slices; encoders of volumes compute as their bundle says.

    Raises:
        ValueError: if ``ct`` is missing or not the recorded one.
    """
    source = golden["ct"]
    if "sha256" in source and ct is None:
        raise ValueError(f"ct must be given: '{source['name']}' of SHA-256 {source['sha256']}.")
    scan = _read(None if "phantom_seed" in source else ct, source.get("phantom_seed", 0))
    if source.get("sha256", scan.sha256) != scan.sha256:
        raise ValueError(
            f"ct must be the recorded '{source['name']}' of SHA-256 {source['sha256']}, got {scan.sha256} "
            f"('{ct}')."
        )
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, got '{dtype}'.")
    found = stages_of(outputs_of(opened, scan, dtype))
    yield from compare(golden, found, f"{opened.device.type} {dtype}", opened.identity["encoder_id"])


def compare(golden: Mapping[str, Any], found: Stages, computed: str, encoder_id: str = "") -> Iterator[Line]:
    """Compare stages with recorded ones.

    Args:
        golden: content of a ``golden.json``.
        found: stages of :func:`stages_of`; those that are missing are passed over.
        computed: device and type of the network, such as "cpu float32".
        encoder_id: which weights it has, for the message.
    """
    for stage, expected in golden["stages"].items():
        if stage not in found:
            continue
        tolerance = golden["tolerance"][stage]
        limit = tolerance[computed] if stage == "network" else tolerance
        differences = {
            name: _difference(found[stage][name], numbers, is_relative=stage == "network")
            for name, numbers in expected.items()
        }
        worst = max(differences, key=differences.__getitem__)
        text = f"{worst} differs by {differences[worst]:.2g}, at most {limit:g}"
        is_fine = differences[worst] <= limit
        if not is_fine:
            text += f": {_short(found[stage][worst])}, recorded {_short(expected[worst])}"
            if stage == "network" and encoder_id not in ("", golden["encoder_id"]):
                text += f". Weights: {encoder_id}, recorded {golden['encoder_id']}"
        yield Line(stage, is_fine, text)


def read_port(path: Path) -> dict[str, np.ndarray]:
    """Read what another program's steps left, arrays of :func:`stages_of` in an npz.

    Raises:
        ValueError: if there is none of them.
    """
    with np.load(path, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in ("hu", "box", "images", "tokens") if name in arrays}
    if not found:
        raise ValueError(f"port must hold hu, box, images or tokens, got '{path}' without any.")
    return found


def outputs_of(opened: SliceEncoder | VolumeEncoder, scan: CTSlices, dtype: str) -> dict[str, Any]:
    """Run a CT through an encoder and keep what each step leaves, for :func:`stages_of`."""
    outputs: dict[str, Any] = {"hu": scan.hu}
    if isinstance(opened, SliceEncoder):
        slices = torch.from_numpy(scan.hu)
        box = body_box(slices) if opened.strategy.is_cropped else (0, 0, slices.shape[-1])
        region = opened.strategy.region(slices[_shown(len(slices))], box)
        images = images_of(
            region, opened.strategy, opened.given.window, opened.given.slice_axes, opened.device
        )
        infer = SlicesInferer(dtype, compiled=False, patch_tokens=False)
        with torch.inference_mode():
            tokens = opened.strategy.tokens(infer(images, opened.network)[0])
        return outputs | {"box": box, "images": images, "tokens": tokens}
    image = opened.image(scan.hu, scan.spacing_mm)
    with torch.inference_mode():
        grid = opened.inferer(image, opened.network)[0][0].flatten(1)
    return outputs | {"images": image, "tokens": grid.T[_shown(grid.shape[1])]}


def stages_of(outputs: Mapping[str, Any]) -> Stages:
    """Put what the steps of a pipeline left into few numbers; steps that are missing are passed over.

    Args:
        outputs: arrays or tensors by name: ``hu (Z, H, H)`` feet first, padded to squares; ``box`` (top,
            left, side) of the crop; ``images (N, 1, I, I)`` of the slices that ``golden.json`` lists, or one
            whole volume; ``tokens (T, D)``, two and two neighbours.

    Returns:
        By stage and name. Means of the eight octants see what is flipped or transposed.
    """
    stages: Stages = {}
    if "hu" in outputs:
        hu = _array(outputs["hu"])
        stages["read"] = {"shape": _rounded(hu.shape)} | _statistics(hu)
    if "box" in outputs:
        stages["crop"] = {"box": _rounded(outputs["box"])}
    if "images" in outputs:
        images = _array(outputs["images"])
        images = images.reshape(-1, *images.shape[-2:])
        stages["normalise"] = {"shape": _rounded(images.shape)} | _statistics(images)
    if "tokens" in outputs:
        tokens = _array(outputs["tokens"])
        norms = np.linalg.norm(tokens, axis=1)
        cosines = (tokens[::2] * tokens[1::2]).sum(1) / (norms[::2] * norms[1::2])
        first = {f"first_{row}": _rounded(token[:FIRST]) for row, token in enumerate(tokens)}
        stages["network"] = {"norm": _rounded(norms), "cosine_to_next": _rounded(cosines)} | first
    return stages


def _array(values: Any) -> np.ndarray:  # noqa: ANN401 (array or tensor)
    return np.asarray(torch.as_tensor(values).double().cpu())


def _statistics(values: np.ndarray) -> dict[str, list[float]]:
    """Mean, deviation and the means of the eight octants of an array of three axes."""
    halves = [np.array_split(np.arange(side), min(2, side)) for side in values.shape]
    octants = [values[np.ix_(z, y, x)].mean() for z in halves[0] for y in halves[1] for x in halves[2]]
    return {"mean_std": _rounded([values.mean(), values.std()]), "octants": _rounded(octants)}


def _rounded(values: Sequence[float] | np.ndarray) -> list[float]:
    return [float(f"{float(value):.6g}") for value in values]


def _difference(found: Sequence[float], expected: Sequence[float], is_relative: bool) -> float:
    """Greatest difference, or its share of the greatest number; infinite where it cannot be told."""
    if len(found) != len(expected):
        return float("inf")
    difference = float(np.max(np.abs(np.subtract(found, expected))))
    scale = float(np.max(np.abs(expected))) if is_relative else 1.0
    return difference / scale if np.isfinite(difference) else float("inf")


def _short(numbers: Sequence[float]) -> str:
    return "[" + ", ".join(f"{number:.5g}" for number in numbers) + "]"


def _shown(count: int) -> list[int]:
    """Slices, or tokens, at the quarters of a CT, each with its next: three pairs."""
    return [min(count * quarter // 4 + step, count - 1) for quarter in (1, 2, 3) for step in (0, 1)]


def _read(path: Path | None, seed: int) -> CTSlices:
    """Read the CT as inference does; or draw a phantom into a file and read that."""
    if path is None:
        with TemporaryDirectory() as folder:
            settings = Settings(seed, slice_mm=(PHANTOM_MM, PHANTOM_MM))
            list(write_cohort(Path(folder), 1, settings, num_processes=1))
            (file,) = Path(folder).glob("dataset/*_fixed/*/*/*.nii.gz")
            return _read(file, seed)
    sources, rejected = ct_sources(path)
    if len(sources) != 1:
        why = f": {rejected[0].detail}" if rejected else ""
        raise ValueError(f"ct must hold one CT, got {len(sources)} ('{path}'){why}.")
    return sources[0].read()
