"""The commands ``dale-ct golden record`` and ``verify``."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Encoder; 'dale-ct encoders' lists them.")]
Weights = Annotated[str | None, typer.Option(help="File, hub:<owner>/<name>[@revision] or 'random'.")]
CT = Annotated[Path | None, typer.Option(exists=True, help="File of a CT. Default: a phantom is drawn.")]
Golden = Annotated[Path | None, typer.Option(help="File of the numbers. Default: the bundle's golden.json.")]
Device = Annotated[str, typer.Option(help="cuda, cuda:1, cpu.")]


@app.command(epilog="Example: dale-ct golden record dale_ct_2s --weights random")
def record(
    encoder: Name,
    weights: Weights = None,
    ct: CT = None,
    seed: Annotated[int, typer.Option(help="Which phantom; 2 is cropped to its body.")] = 2,
    golden: Golden = None,
    device: Device = "cpu",
) -> None:
    """Record the numbers that an encoder gives for a CT, in float32."""
    from common.run.process import atomic_file
    from dale_ct import golden as numbers
    from dale_ct.encoder import bundle_folder

    path = golden or bundle_folder(encoder) / numbers.FILE
    content = numbers.record(encoder, weights, ct, seed, device)
    with atomic_file(path, "w", encoding="ascii") as file:
        text = json.dumps(content, indent=1)
        file.write(re.sub(r"\[[^\[\]]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n")
    typer.echo(f"{path}: {content['encoder']}, weights {content['weights']} ({content['encoder_id']})")


@app.command(epilog="Example: dale-ct golden verify dale_ct_2s")
def verify(
    encoder: Name,
    weights: Weights = None,
    ct: CT = None,
    golden: Golden = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of an encoder of slices.")] = "float32",
    port: Annotated[
        Path | None,
        typer.Option(exists=True, help="npz of another program with any of hu, box, images and tokens."),
    ] = None,
) -> None:
    """Compare them with what comes out here, a line for each stage; exit status 1 if one differs.

    Without --weights, numbers of random weights are compared with the same random weights.
    """
    from dale_ct import golden as numbers
    from dale_ct.encoder import RANDOM, bundle_folder, load_encoder

    path = golden or bundle_folder(encoder) / numbers.FILE
    if not path.is_file():
        raise FileNotFoundError(f"No '{path}'. Where the numbers are right: dale-ct golden record {encoder}.")
    known = json.loads(path.read_text(encoding="ascii"))
    if port is not None:
        lines = numbers.compare(known, numbers.stages_of(numbers.read_port(port)), f"cpu {dtype}")
    else:
        drawn = RANDOM if known["weights"] == RANDOM else None
        lines = numbers.verify(known, load_encoder(encoder, weights or drawn, device), ct, dtype)
    is_fine = True
    for stage, stage_is_fine, text in lines:
        is_fine &= stage_is_fine
        typer.echo(f"{stage:10} {'ok' if stage_is_fine else 'DIFFERS'}: {text}")
    raise typer.Exit(not is_fine)
