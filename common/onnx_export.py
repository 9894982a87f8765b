"""A bundle's encoder as ONNX: ``python -m common.onnx_export --bundle ... --out encoder.onnx``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from common.embeddings.encoder_bundle import open_encoder_bundle
from common.run.config import short_errors
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


def main(
    bundle: Annotated[Path, typer.Option(help="Folder of the encoder's bundle.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    weights: Annotated[str, typer.Option(help="Weights; by default the bundle's. 'random' for none.")] = "",
    size_px: Annotated[int, typer.Option(help="Side of the slices; by default the bundle's.")] = 0,
) -> None:
    """Export the CLS embedding of slices; needs `pip install onnx onnxscript`.

    Example: python -m common.onnx_export --bundle bundles/dale_ct_2s --out dale_ct_2s.onnx
    """
    short_errors()
    knobs = {"encoder_weights": None if weights == "random" else weights} if weights else {}
    opened = open_encoder_bundle(bundle, knobs=knobs)
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    facts = opened["identity"] | {"version": metadata["version"]}
    typer.echo(export_onnx(opened.network.cpu(), out, size_px or opened.side_px, facts))


if __name__ == "__main__":
    typer.run(main)
