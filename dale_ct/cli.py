"""The command ``dale-ct``: embeddings, predictions, pictures, weights, data and training.

What a command needs is imported when it runs, so that ``--help`` answers at once.
"""

import logging
import runpy
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    help="Chest CT to embeddings: encoders, probes, pictures and training of DALE-CT.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
errors = Console(stderr=True)
ELSEWHERE = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

CT = Annotated[
    Path, typer.Argument(help="NIfTI in HU, MetaImage, NRRD, npz, DICOM series; a folder or zip of these.")
]
Encoder = Annotated[str, typer.Option(help="Encoder; 'dale-ct encoders' lists them.")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="File, hub:<owner>/<name>[@revision] or 'random'. Default: the bundle's own, else "
        "the authors' release."
    ),
]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu. Default: a GPU where there is one.")]


@app.callback(invoke_without_command=True)
def begin(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Chest CT to embeddings: encoders, probes, pictures and training of DALE-CT."""
    if version:
        from common import __version__

        console.print(__version__)
        raise typer.Exit


@app.command(epilog="Example: dale-ct embed ct.nii.gz --out embeddings")
def embed(
    ct: CT,
    out: Annotated[Path, typer.Option(help="Folder of the embeddings; new CTs are added to it.")] = Path(
        "embeddings"
    ),
    encoder: Encoder = "dale_ct_2s",
    weights: Weights = None,
    strategy: Annotated[
        str | None, typer.Option(help="How slices become images, a row of Table VI. Default: the bundle's.")
    ] = None,
    patch_tokens: Annotated[bool, typer.Option(help="Store the patch tokens of each slice, too.")] = False,
    device: Device = None,
) -> None:
    """Turn CTs into embeddings: one vector per slice, feet to head, or a grid of tokens per volume."""
    from dale_ct.encoder import bundle_folder, read_config

    folder = bundle_folder(encoder)
    takes_slices = "strategies" in read_config(folder)
    knobs = {"dataset_dir": str(ct), "output_dir": str(out)}
    knobs |= {"encoder_weights": "$None" if weights == "random" else weights} if weights else {}
    knobs |= {"strategies": f"['{strategy}']"} if strategy else {}
    knobs |= {"patch_tokens": "True"} if patch_tokens else {}
    knobs |= {"device": f"$torch.device('{device}')"} if device else {}
    words = bundle_command(folder, "inference.json", knobs)
    if not takes_slices:
        run_module(words)
        return
    from dale_ct.embedding import embed_to_store

    embed_to_store(
        ct, out, encoder, weights=weights, device=device, patch_tokens=patch_tokens, strategy=strategy
    )


@app.command(
    epilog="Example: dale-ct predict ct.nii.gz --probe bundles/eval_ct_rate/runs/dale_ct_2s --out results"
)
def predict(
    ct: CT,
    probe: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Output folder of eval_ct_rate.")],
    out: Annotated[Path, typer.Option(help="Folder of tables, pages and embeddings.")] = Path("predictions"),
    encoder: Encoder = "dale_ct_2s",
    weights: Weights = None,
    force: Annotated[bool, typer.Option(help="Go on with what does not look like a chest CT.")] = False,
) -> None:
    """Give the probabilities of a trained probe, with a page per CT. For research, not for diagnosis."""
    from dale_ct.encoder import BUNDLES, bundle_folder

    knobs = {"encoder_bundle": str(bundle_folder(encoder)), "probe_dir": str(probe), "dataset_dir": str(ct)}
    knobs |= {"output_dir": str(out)} | ({"force": "True"} if force else {})
    if weights:
        knobs["encoder_knobs"] = str({"encoder_weights": None if weights == "random" else weights})
    run_module(bundle_command(BUNDLES / "eval_ct_rate", "predict.json", knobs))


@app.command(
    context_settings={**ELSEWHERE, "help_option_names": ["-h", "--help"]},
    epilog="Example: dale-ct train dale_ct_2s --dataset_dir data/shards --max_steps 1000",
)
def train(
    context: typer.Context,
    bundle: Annotated[str, typer.Argument(help="Bundle with a train.json: an encoder, or an evaluation.")],
) -> None:
    """Train a bundle; every option after its name is a knob of its train.json. Run it again to resume."""
    from dale_ct.encoder import BUNDLES

    folder = next((place for place in (BUNDLES / bundle, Path(bundle)) if (place / "configs").is_dir()), None)
    if folder is None or not (folder / "configs" / "train.json").is_file():
        known = sorted(path.parents[1].name for path in BUNDLES.glob("*/configs/train.json"))
        raise ValueError(f"No bundle '{bundle}' that trains. Known: {', '.join(known)}.")
    run_module([*bundle_command(folder, "train.json", {}, show=False), *context.args])


@app.command(epilog="Example: dale-ct encoders")
def encoders() -> None:
    """List the encoders: size of a token, weights and their licence, and whether they are on this machine."""
    from dale_ct.encoder import encoders as known

    table = Table("encoder", "takes", "dim", "weights", "licence", "here", box=None)
    for facts in known().values():
        here = "yes" if facts.is_here else "to be fetched"
        table.add_row(facts.name, facts.takes, str(facts.dim), facts.weights, facts.licence, here)
    console.print(table)


@app.command(epilog="Example: dale-ct doctor")
def doctor(
    folder: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Where runs would write.")
    ] = Path(),
    online: Annotated[bool, typer.Option(help="Ask the Hugging Face hub, too.")] = True,
) -> None:
    """Look at this machine; each line is fine, or says what to do. The exit status is 1 if one is not."""
    from dale_ct.doctor import examine

    table = Table(box=None, show_header=False)
    findings = list(examine(folder, online))
    for name, is_fine, text in findings:
        table.add_row("[green]ok[/green]" if is_fine else "[red]look[/red]", name, text)
    console.print(table)
    raise typer.Exit(not all(finding.is_fine for finding in findings))


@app.command(context_settings=ELSEWHERE)
def show(context: typer.Context) -> None:
    """Draw what encoders make of CTs, and tables of results: patches, levels, paths, results, differences."""
    run_module(["common.reports", *context.args])


@app.command(context_settings=ELSEWHERE)
def weights(context: typer.Context) -> None:
    """Import weights into a bundle, or export them to timm."""
    run_module(["common.weights", *context.args])


@app.command(context_settings=ELSEWHERE)
def data(context: typer.Context) -> None:
    """Download datasets, write and audit shards, draw synthetic CTs: the commands of data_prep."""
    run_module(["data_prep", *context.args])


def bundle_command(folder: Path, config: str, knobs: dict[str, str], show: bool = True) -> list[str]:
    """Say how MONAI's users would type a run of a bundle, and print it unless told otherwise."""
    words = ["monai.bundle", "run", "--config_file", str(folder / "configs" / config)]
    words += ["--bundle_root", str(folder)]
    words += [word for name, value in knobs.items() for word in (f"--{name}", value)]
    if show:
        errors.print(
            f"[dim]$ {escape(shlex.join(['python', '-m', *words]))}[/dim]", soft_wrap=True, highlight=False
        )
    return words


def run_module(words: list[str]) -> None:
    """Become ``python -m words``."""
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def main() -> None:
    """Run the command line; a mistake in its input ends in one line rather than in a traceback."""
    handler = RichHandler(console=errors, show_path=False, show_time=False, show_level=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    try:
        app()
    except (ValueError, OSError) as error:
        errors.print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("Stopped. Run the same command again to go on.")
        sys.exit(130)


if __name__ == "__main__":
    main()
