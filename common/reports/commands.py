"""Pictures of CTs and of what encoders make of them, and tables of results: ``dale-ct show``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from common.run.config import short_errors

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Bundle = Annotated[Path, typer.Option(exists=True, help="Encoder bundle, such as bundles/dale_ct_2s.")]
Weights = Annotated[
    Path | None, typer.Option(help="Its weights. Default: the bundle's own; 'random' for none.")
]
Overrides = Annotated[
    list[Path] | None,
    typer.Option(exists=True, help="Further config file of the bundle, such as demo/inference.json."),
]
SizePx = Annotated[
    int | None, typer.Option(help="Side of the images. Default: that of the images that the bundle embeds.")
]
Out = Annotated[Path, typer.Option(dir_okay=False, help="PNG to write.")]
Slices = Annotated[
    list[int] | None,
    typer.Option(help="Slice, counted from 0 at the feet; once for each. Default: spread over the scan."),
]


class Shown(StrEnum):
    """What a row shows of each patch."""

    COMPONENTS = "components"
    ATTENTION = "attention"
    LIKENESS = "likeness"


@app.callback()
def begin() -> None:
    """Draw what encoders make of CTs, and lay out results."""
    short_errors()


@app.command(
    epilog="Example: dale-ct show patches ct.nii.gz --bundle bundles/dale_ct_2s --out ct.png. "
    "For a probe, add --probes bundles/eval_dense_2d/runs/dale_ct_2s --name liver --name heart"
)
def patches(
    ct: Annotated[
        Path,
        typer.Argument(exists=True, help="One CT: NIfTI in HU, npz, or a zip or folder of a DICOM series."),
    ],
    bundle: Bundle,
    out: Out,
    show: Annotated[
        list[Shown] | None,
        typer.Option(
            help="Row to draw; once for each. Principal components as colours, where the CLS token looks, "
            "which patches are like a chosen one. Default: all three, or with --name none."
        ),
    ] = None,
    patch: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Row and column of the patch that others are compared with. Default: the middle."),
    ] = None,
    probes: Annotated[
        Path | None, typer.Option(exists=True, help="Output folder of eval_dense_2d, for the same encoder.")
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="Finding or organ whose probability is mapped; once for each, all of one task."),
    ] = None,
    slices: Slices = None,
    weights: Weights = None,
    overrides: Overrides = None,
    size_px: SizePx = None,
) -> None:
    """Draw slices of a CT, and rows that show what an encoder makes of their patches."""
    if bool(name) != bool(probes):
        raise typer.BadParameter("--name and --probes go together.")
    from common.reports import ct_tokens, patch_rows
    from common.reports.slice_grid import Row, slice_grid
    from common.run.process import write_figure

    encoder = ct_tokens.open_slice_encoder(bundle, weights, overrides or (), size_px)
    probe = patch_rows.probe_of(probes, name, encoder.name) if probes and name else None
    scan = ct_tokens.read_images(ct, encoder.side_px)
    images = scan.some(ct_tokens.slices_to_show(slices, len(scan.hu), 6))
    hu, tokens = images.hu, ct_tokens.encode(encoder, images.hu)[1]
    rows = {
        Shown.COMPONENTS: lambda: patch_rows.components_row(hu, tokens),
        Shown.ATTENTION: lambda: patch_rows.attention_row(hu, ct_tokens.cls_attention(encoder, hu)),
        Shown.LIKENESS: lambda: patch_rows.likeness_row(hu, tokens, patch),
    }
    drawn = [Row(hu, images.titles), *(rows[shown]() for shown in show or ([] if probe else Shown))]
    if probe and name:
        drawn += patch_rows.probability_rows(hu, tokens, layer=probe[0], places=probe[1], names=name)
    write_figure(out, slice_grid(drawn, f"{scan.name}: patch tokens of {encoder.name}")[0])


@app.command(
    epilog="Example: dale-ct show levels a.nii.gz b.nii.gz --bundle bundles/dale_ct_2s --out levels.png"
)
def levels(
    query: Annotated[Path, typer.Argument(exists=True, help="CT whose slices are looked for.")],
    others: Annotated[list[Path], typer.Argument(exists=True, help="CTs to find them in.")],
    bundle: Bundle,
    out: Out,
    slices: Slices = None,
    weights: Weights = None,
    overrides: Overrides = None,
    size_px: SizePx = None,
) -> None:
    """Find the levels of a scan's slices in other scans by CLS tokens: by likeness, and by a ridge to mm.

    The other scans are sorted, the most alike first.
    """
    from common.reports import ct_tokens
    from common.reports.scan_levels import compare_scans, draw_levels
    from common.run.process import write_figure

    encoder = ct_tokens.open_slice_encoder(bundle, weights, overrides or (), size_px)
    images = [ct_tokens.read_images(path, encoder.side_px) for path in (query, *others)]
    chosen = ct_tokens.slices_to_show(slices, len(images[0].hu), 5)
    scans = compare_scans(images, [ct_tokens.encode(encoder, i.hu)[0].double().numpy() for i in images])
    title = f"Slices of {images[0].name} in other scans, by CLS tokens of {encoder.name}"
    write_figure(out, draw_levels(scans, chosen, title))
    for scan, _, match, reading in scans:
        off = f"r {reading.correlation:.3f}, {reading.error_mm:.1f} mm off, up to an offset"
        typer.echo(f"{scan.name}: cos {match.of_volumes:.3f}, {off}")


@app.command(epilog="Example: dale-ct show paths embeddings/slab embeddings/flat --out figure_2.png")
def paths(
    embeddings: Annotated[
        list[Path], typer.Argument(exists=True, help="Folders of slice embeddings, one per encoder.")
    ],
    out: Out,
    volume: Annotated[
        list[str] | None, typer.Option(help="Volume to draw; once for each. Default: the first three.")
    ] = None,
) -> None:
    """Draw the slices of volumes as paths through latent space, encoders side by side."""
    from common.embeddings.store import EmbeddingStore
    from common.reports.latent_paths import chosen_paths, draw_paths

    stores = [EmbeddingStore(folder) for folder in embeddings]
    shared = sorted(set(stores[0].volumes).intersection(*(store.volumes for store in stores[1:])))
    if not shared:
        raise ValueError(f"No volume is in all of {', '.join(map(str, embeddings))}.")
    draw_paths(out, chosen_paths(stores, volume or shared[:3]))


@app.command(epilog="Example: dale-ct show results results/*.csv")
def results(
    csvs: Annotated[list[Path], typer.Argument(help="Results CSVs, such as results/*.csv.")],
) -> None:
    """Print the results of all evaluations as one table."""
    from common.reports.results import print_whole, read_rows, results_table

    print_whole(results_table([row for path in csvs for row in read_rows(path)]))


def compare(
    reference: Annotated[Path, typer.Argument(help="Folder of the evaluation to compare with.")],
    others: Annotated[list[Path], typer.Argument(help="Folders of the other encoders' evaluations.")],
    num_resamples: Annotated[
        int, typer.Option(help="Bootstrap resamples; dense probes bring their own.")
    ] = 2000,
    resampling: Annotated[str, typer.Option(help="What a resample draws: patients or volumes.")] = "patients",
    out: Annotated[Path | None, typer.Option(help="CSV to write, with every class.")] = None,
) -> None:
    """Compare encoders on the same test volumes, on the same bootstrap resamples.

    MIL probes are compared by their test_predictions.csv (which may be named too), dense probes by their
    resamples.npz.
    """
    from common.reports.paired_differences import compare as compared
    from common.reports.paired_differences import differences_table
    from common.reports.results import print_whole

    rows = compared(reference, others, num_resamples=num_resamples, resampling=resampling, out=out)
    print_whole(differences_table(rows))
