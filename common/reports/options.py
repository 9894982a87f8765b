"""Options that the picture commands share."""

from pathlib import Path
from typing import Annotated

import typer

Bundle = Annotated[Path, typer.Option(help="Encoder bundle, such as bundles/dale_ct_2s.")]
Weights = Annotated[
    Path | None, typer.Option(help="Its weights. Default: the bundle's own; 'random' for none.")
]
Overrides = Annotated[
    list[Path] | None, typer.Option(help="Further config file of the bundle, such as demo/inference.json.")
]
SizePx = Annotated[int | None, typer.Option(help="Side of the images. Default: 256 in whole patches.")]
Out = Annotated[Path, typer.Option(help="PNG to write.")]
Slices = Annotated[
    list[int] | None, typer.Option(help="Slice from the feet, several times. Default: spread over the scan.")
]
