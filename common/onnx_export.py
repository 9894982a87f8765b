"""A bundle's encoder as ONNX: ``python -m common.onnx_export --bundle ... --out encoder.onnx``."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from common.networks.encoder import load_encoder
from common.run.atomic_file import atomic_file
from common.run.short_errors import short_errors
from common.weights import SliceAxes, bundle_encoder, image_side_px


def export_onnx(encoder: nn.Module, out: str | Path, size_px: int) -> Path:
    """Write an encoder as ONNX, with any number of slices of one size.

    Args:
        encoder: timm VisionTransformer with one input channel.
        out: file to write, weights included.
        size_px: side of the slices; fixed, since position embeddings are resampled to it once.

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
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as file:
        file.write(program.model_proto.SerializeToString())
    return out


def main(
    bundle: Annotated[Path, typer.Option(help="Folder of the encoder's bundle.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    weights: Annotated[str, typer.Option(help="Weights; by default the bundle's. 'random' for none.")] = "",
    size_px: Annotated[int, typer.Option(help="Side of the slices; by default the bundle's.")] = 0,
    slice_axes: SliceAxes = "",
) -> None:
    """Export the CLS embedding of slices; needs `pip install onnx onnxscript`.

    Example: python -m common.onnx_export --bundle bundles/dale_ct_2s --out dale_ct_2s.onnx
    """
    short_errors()
    encoder, identity, config = bundle_encoder(bundle, slice_axes or None)
    path = None if weights == "random" else weights or bundle / "models" / "model.safetensors"
    load_encoder(encoder, path, identity)
    typer.echo(export_onnx(encoder, out, size_px or image_side_px(config)))


if __name__ == "__main__":
    typer.run(main)
