"""The command ``dale-ct``: embeddings, predictions, pictures, weights, data and training.

What a command needs is imported when it runs, so that ``--help`` answers at once.
"""

import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.reports import commands as show
from dale_ct import golden_commands
from data_prep.__main__ import app as data_app
from data_prep.commands.console import run_app

app = typer.Typer(
    help="Chest CT to embeddings: encoders, probes, pictures and training of DALE-CT.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
weights_app = typer.Typer(no_args_is_help=True, help="Import or export weights.")
app.add_typer(show.app, name="show", help="Draw what encoders make of CTs, and print tables of results.")
app.add_typer(weights_app, name="weights")
app.add_typer(golden_commands.app, name="golden", help="Record or verify the numbers of an encoder.")
app.add_typer(data_app, name="data", help="Download datasets, write and audit shards, draw synthetic CTs.")
app.command(epilog="Example: dale-ct compare runs/dale_ct_0 runs/dale_ct_2s --out paired.csv")(show.compare)
console = Console()
errors = Console(stderr=True)

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
SliceAxes = Annotated[
    str | None,
    typer.Option(
        "--slice-axes", "--slice_axes", help="'yx', or 'xy' for transposed, of weights that do not say."
    ),
]
HUWindow = Annotated[
    str | None,
    typer.Option("--hu-window", "--hu_window", help="Name, or 'min,max,mean,std' in HU; likewise."),
]
Series = Annotated[
    str | None,
    typer.Option(help="The one to use of several CTs, by name or UID; 'all' to take all series of a study."),
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
    patch_tokens: Annotated[
        bool,
        typer.Option("--patch-tokens", "--patch_tokens", help="Store the patch tokens, too."),
    ] = False,
    organs: Annotated[
        Path | None,
        typer.Option(
            exists=True, help="TotalSegmentator's label maps, named as the CTs: store a token per organ."
        ),
    ] = None,
    radiomics: Annotated[
        bool, typer.Option("--radiomics", help="With --organs: volume, mean HU and texture after each token.")
    ] = False,
    slice_axes: SliceAxes = None,
    hu_window: HUWindow = None,
    series: Series = None,
    split: Annotated[str | None, typer.Option(help="Split of shards. Default: the bundle's.")] = None,
    device: Device = None,
    num_workers: Annotated[
        int | None, typer.Option("--num-workers", "--num_workers", help="Threads that read ahead.", min=0)
    ] = None,
    max_rejected: Annotated[
        float | None,
        typer.Option("--max-rejected", "--max_rejected", help="Share of CTs that may fail.", min=0, max=1),
    ] = None,
) -> None:
    """Turn CTs into embeddings: one vector per slice, feet to head, or a grid of tokens per volume."""
    from dale_ct.encoder import bundle_folder

    if organs is not None:
        from dale_ct.organs import embed_organs

        given: dict[str, Any] = {"weights": weights, "device": device, "strategy": strategy}
        given |= {"slice_axes": slice_axes, "num_workers": num_workers, "hu_window": window_of(hu_window)}
        embed_organs(ct, organs, out, encoder, radiomics=radiomics, **given)
        return
    if radiomics:
        raise typer.BadParameter("--radiomics needs --organs, the label maps.")

    options: dict[str, Any] = {"slice_axes": slice_axes, "hu_window": window_of(hu_window), "series": series}
    options |= {"split": split, "num_workers": num_workers, "max_rejected": max_rejected}
    knobs = {"dataset_dir": word_of(ct), "output_dir": word_of(out)}
    knobs |= {"encoder_weights": "$None" if weights == "random" else word_of(weights)} if weights else {}
    knobs |= {"strategies": word_of([strategy])} if strategy else {}
    knobs |= {name: word_of(value) for name, value in options.items() if value is not None}
    knobs |= {"patch_tokens": "True"} if patch_tokens else {}
    knobs |= {"device": f"$torch.device({device!r})"} if device else {}
    bundle_command(bundle_folder(encoder), "inference.json", knobs)
    from dale_ct.embedding import embed_to_store

    options |= {"weights": weights, "device": device, "strategy": strategy, "patch_tokens": patch_tokens}
    embed_to_store(ct, out, encoder, **options)


@app.command(epilog="Example: dale-ct predict ct.nii.gz --probe probes/dale_ct_2s --out results")
def predict(
    ct: CT,
    probe: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder of a trained probe. Default: show what needs none."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of tables, pages and embeddings.")] = Path("predictions"),
    encoder: Encoder = "dale_ct_2s",
    weights: Weights = None,
    series: Series = None,
    force: Annotated[bool, typer.Option(help="Continue even if it does not look like a chest CT.")] = False,
) -> None:
    """Give the probabilities of a trained probe, with a page per CT. For research, not for diagnosis."""
    from dale_ct.encoder import BUNDLES, bundle_folder

    paths = {
        "encoder_bundle": bundle_folder(encoder),
        "probe_dir": probe,
        "dataset_dir": ct,
        "output_dir": out,
    }
    knobs = {name: word_of(path) for name, path in paths.items() if path is not None}
    knobs |= {"force": "True"} if force else {}
    knobs |= {"series": word_of(series)} if series else {}
    if weights:
        knobs["encoder_knobs"] = str({"encoder_weights": None if weights == "random" else weights})
    run_module(bundle_command(BUNDLES / "eval_ct_rate", "predict.json", knobs))


@app.command(
    epilog="Example: dale-ct report ct.nii.gz --model bundles/report_generation/runs/dale_ct_2s_full"
)
def report(
    ct: CT,
    model: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder of a trained report model.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of texts, pictures and embeddings.")] = Path("reports"),
    encoder: Encoder = "dale_ct_2s",
    weights: Weights = None,
    series: Series = None,
    force: Annotated[bool, typer.Option(help="Continue even if it does not look like a chest CT.")] = False,
) -> None:
    """Write a report in words with a trained model. For research, not for diagnosis or reporting."""
    from dale_ct.encoder import BUNDLES, bundle_folder

    paths = {"encoder_bundle": bundle_folder(encoder), "report_dir": model, "dataset_dir": ct}
    knobs = {name: word_of(path) for name, path in (paths | {"output_dir": out}).items()}
    knobs |= {"force": "True"} if force else {}
    knobs |= {"series": word_of(series)} if series else {}
    if weights:
        knobs["encoder_knobs"] = str({"encoder_weights": None if weights == "random" else weights})
    run_module(bundle_command(BUNDLES / "report_generation", "predict.json", knobs))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: dale-ct probe /data/ct_rate --out probes/dale_ct_2s",
)
def probe(
    context: typer.Context,
    ct_rate: Annotated[
        Path,
        typer.Argument(exists=True, file_okay=False, help="CT-RATE, as 'dale-ct data download' leaves it."),
    ],
    encoder: Encoder = "dale_ct_2s",
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: probes/<encoder>.")] = None,
) -> None:
    """Train the probe of Table III: embed CT-RATE's two splits, train 20 probes, test the best.

    Run it again to resume. Other options are knobs of eval_ct_rate's train.json.
    """
    from dale_ct.encoder import BUNDLES, bundle_folder

    folder, here = bundle_folder(encoder), out or Path("probes") / Path(encoder).name
    tables = ct_rate / "dataset" / "multi_abnormality_labels"
    for path in (ct_rate / "dataset" / "train_fixed", ct_rate / "dataset" / "valid_fixed", tables):
        if not path.is_dir():
            fetch = f"dale-ct data download ct-rate --out {ct_rate} --split train, then --split valid"
            raise FileNotFoundError(f"No folder '{path}'. Download CT-RATE first: {fetch}.")
    given = {"encoder_weights": "$None" if weights == "random" else word_of(weights)} if weights else {}
    steps = []
    for split in ("train", "valid"):
        paths: dict[str, object] = {"dataset_dir": ct_rate / "dataset" / f"{split}_fixed", "split": split}
        paths |= {"output_dir": here / "embeddings" / split}
        skipped = ct_rate / "dataset" / "metadata" / f"no_chest_{split}.txt"
        paths |= {"skip_list": skipped} if skipped.is_file() else {}
        steps.append((folder, "inference.json", paths, given))
    paths = {"encoder_bundle": folder, "dataset_dir": ct_rate, "embeddings_dir": here / "embeddings"}
    paths |= {"output_dir": here, "results_csv": here / "results.csv"}
    steps.append((BUNDLES / "eval_ct_rate", "train.json", paths, {}))
    for bundle, config, paths, knobs in steps:
        knobs = {name: word_of(path) for name, path in paths.items()} | knobs
        words = bundle_command(bundle, config, knobs, context.args if bundle != folder else ())
        done = subprocess.run([sys.executable, "-m", *words], check=False)
        if done.returncode:
            raise typer.Exit(done.returncode)
    about = json.loads((BUNDLES / "eval_ct_rate" / "configs" / "metadata.json").read_text(encoding="utf-8"))
    numbers = about["paper_macro_auroc"].get(folder.name, {}).items()
    expected = ", ".join(f"{auroc:.4f} ({version})" for version, auroc in numbers) or "not reported"
    errors.print(f"Macro AUROC in the paper: {expected}; ours: {here / 'results.csv'}.", soft_wrap=True)
    errors.print(f"Now: dale-ct predict ct.nii.gz --probe {here} --encoder {encoder}", soft_wrap=True)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: dale-ct train dale_ct_2s --dataset_dir data/shards --max_steps 1000",
)
def train(
    context: typer.Context,
    bundle: Annotated[str, typer.Argument(help="Bundle with a train.json: an encoder, or an evaluation.")],
) -> None:
    """Train a bundle; every option after its name is a knob of its train.json. Run it again to resume."""
    from dale_ct.encoder import BUNDLES, bundle_folder

    folder = bundle_folder(bundle, "train.json")
    knobs: dict[str, str] = {}
    if folder.parent == BUNDLES and not (BUNDLES.parent / "pyproject.toml").is_file():
        # installed: what a checkout keeps in the bundle goes into a folder of its name here
        config = json.loads((folder / "configs" / "train.json").read_text(encoding="utf-8"))
        own = {name: config[name] for name in ("output_dir", "encoder_weights") if name in config}
        knobs = {name: str(value).replace("@bundle_root", repr(folder.name)) for name, value in own.items()}
    given = {word.lstrip("-").partition("=")[0] for word in context.args}
    knobs = {name: value for name, value in knobs.items() if name not in given}
    run_module(bundle_command(folder, "train.json", knobs, context.args))


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
    """Check this machine; a line that is not ok says what to do, and the exit status is 1."""
    from dale_ct.doctor import examine

    table = Table(box=None, show_header=False)
    findings = list(examine(folder, online))
    for name, is_fine, text in findings:
        table.add_row("[green]ok[/green]" if is_fine else "[red]fix[/red]", name, escape(text))
    console.print(table)
    raise typer.Exit(not all(finding.is_fine for finding in findings))


@weights_app.command("import", epilog="Example: dale-ct weights import my.safetensors --bundle dale_ct_2s")
def import_weights(
    source: Annotated[str, typer.Argument(help="File, checkpoint, or hub:<owner>/<name>[@revision].")],
    bundle: Annotated[str, typer.Option(help="Encoder, or folder of its bundle.")],
    slice_axes: SliceAxes = None,
    hu_window: HUWindow = None,
) -> None:
    """Check weights and put them into a bundle's models folder.

    HU window and slice axes must be given for weights that do not state them, and are then remembered.
    """
    from dale_ct.encoder import bundle_folder
    from dale_ct.weights import import_weights as put_in

    typer.echo(put_in(source, bundle_folder(bundle), slice_axes, window_of(hu_window)))


@weights_app.command("export", epilog="Example: dale-ct weights export --bundle dale_ct_2s --out export")
def export_weights(
    bundle: Annotated[str, typer.Option(help="Encoder, or folder of its bundle.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    results: Annotated[list[Path] | None, typer.Option(help="Results CSV; once for each.")] = None,
) -> None:
    """Write a bundle's encoder as a folder that timm loads."""
    from dale_ct.encoder import bundle_folder
    from dale_ct.weights import export_weights as write

    typer.echo(write(bundle_folder(bundle), out, results or []))


@weights_app.command("onnx", epilog="Example: dale-ct weights onnx --bundle dale_ct_2s --out dale_ct_2s.onnx")
def export_onnx(
    bundle: Annotated[str, typer.Option(help="Encoder, or folder of its bundle.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    weights: Weights = None,
    size_px: Annotated[int | None, typer.Option(help="Side of the slices; by default the bundle's.")] = None,
) -> None:
    """Write the CLS embedding of slices as ONNX; needs 'pip install onnx onnxscript'."""
    from dale_ct.encoder import bundle_folder
    from dale_ct.onnx_export import export_bundle

    typer.echo(export_bundle(bundle_folder(bundle), out, weights, size_px))


def window_of(text: str | None) -> str | list[float] | None:
    """Read a HU window: a name, or four numbers with commas between them."""
    return [float(value) for value in text.split(",")] if text and "," in text else text


def word_of(value: object) -> str:
    """Write a value so that MONAI's command line, which reads Python, takes a text for a text.

    Example:
        >>> print(word_of("ct.nii.gz"), word_of("12345"), word_of("a,b"), word_of(["raw_144"]))
        ct.nii.gz '12345' 'a,b' ['raw_144']
    """
    text = str(value)
    is_name = re.fullmatch(r"[\w./:@~-]*[A-Za-z/_][\w./:@~-]*", text) and not re.fullmatch(r"[\d.e+-]+", text)
    return text if is_name else repr(text if isinstance(value, Path) else value)


def bundle_command(folder: Path, config: str, knobs: dict[str, str], more: Sequence[str] = ()) -> list[str]:
    """Say how MONAI's users would type a run of a bundle, and print it; more are further words."""
    words = ["monai.bundle", "run", "--config_file", str(folder / "configs" / config)]
    words += ["--bundle_root", str(folder)]
    words += [*(word for name, value in knobs.items() for word in (f"--{name}", value)), *more]
    command = escape(shlex.join(["python", "-m", *words]))
    errors.print(f"[dim]$ {command}[/dim]", soft_wrap=True, highlight=False)
    return words


def run_module(words: list[str]) -> None:
    """Become ``python -m words``."""
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
