"""A bundle's encoder as ONNX: ``dale-ct weights onnx --bundle ... --out encoder.onnx``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.embeddings.encoder_bundle import open_encoder_bundle
from common.run.process import atomic_file


def export_onnx(encoder: nn.Module, out: str | Path, size_px: int, facts: Mapping[str, Any]) -> Path:
    """Write an encoder as ONNX, with any number of slices of one size.

    Args:
        encoder: timm VisionTransformer with one input channel.
        out: file to write, weights included.
        size_px: side of the slices; fixed, since position embeddings are resampled to it once.
        facts: what a user must know of the network, such as its HU window; JSON values, which go with the
            size into the file's ``metadata_props``.

    Shape:
        Input ``image (S, 1, size_px, size_px)`` float32, S any number; output ``cls (S, D)``.

    Raises:
        ModuleNotFoundError: without the packages onnx and onnxscript.
    """
    slices = torch.export.Dim("slices", min=1)
    program = torch.onnx.export(
        encoder.eval(),
        (torch.zeros(2, 1, size_px, size_px),),
        input_names=["image"],
        output_names=["cls"],
        dynamic_shapes=({0: slices},),
        dynamo=True,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program.")
    proto = program.model_proto
    for name, value in {**facts, "size_px": size_px}.items():
        proto.metadata_props.add(key=name, value=value if isinstance(value, str) else json.dumps(value))
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as file:
        file.write(proto.SerializeToString())
    return out


def export_bundle(bundle: Path, out: Path, weights: str | None, size_px: int | None) -> Path:
    """Export the encoder of a bundle, see :func:`export_onnx`.

    Args:
        bundle: folder of the bundle.
        out: ``.onnx`` file to write.
        weights: "random", a file or a name on the hub; None for the bundle's.
        size_px: side of the slices; None for that of the images that the bundle embeds.
    """
    knobs = {"encoder_weights": None if weights == "random" else weights} if weights else {}
    opened = open_encoder_bundle(bundle, knobs=knobs)
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    facts = opened["identity"] | {"version": metadata["version"]}
    return export_onnx(opened.network.cpu(), out, size_px or opened.side_px, facts)
