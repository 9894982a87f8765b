"""Command line: ``python -m data_prep --help``."""

import logging
import sys
from collections.abc import Callable

import typer
from rich.logging import RichHandler
from rich.markup import escape

from data_prep.commands.audit import audit
from data_prep.commands.console import console
from data_prep.commands.ct_rate import ct_rate
from data_prep.commands.dense_labels import dense_labels
from data_prep.commands.dense_overlay import dense_overlay
from data_prep.commands.dicom import dicom
from data_prep.commands.download import download
from data_prep.commands.hu_stats import hu_stats
from data_prep.commands.nifti import nifti
from data_prep.commands.phantom import phantom
from data_prep.commands.pos_weights import pos_weights
from data_prep.commands.rad_chestct import rad_chestct
from data_prep.commands.rad_labels import rad_labels
from data_prep.commands.splits import splits
from data_prep.commands.subset import subset
from data_prep.commands.totalsegment import totalsegment
from data_prep.commands.turned import turned

app = typer.Typer(
    help="Prepare chest CT datasets for pre-training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
EXAMPLES: dict[Callable[..., None], str] = {
    audit: "audit /data/shards --split train --sample 0.1 --report audit.html",
    ct_rate: "ct-rate --root /data/CT-RATE --split train --out /data/shards "
    "--rexgroundingct /data/ReX/dataset.json --rexgroundingct-masks /data/ReX/segmentations",
    dense_labels: "dense-labels --root /data/CT-RATE --rexgroundingct /data/ReX/dataset.json "
    "--rexgroundingct-masks /data/ReX/segmentations --out /data/dense_labels",
    dense_overlay: "dense-overlay ct.nii.gz label_map.nii.gz --out overlay.png",
    dicom: "dicom /data/export --out /data/shards --masks label_maps/",
    download: "download ct-rate --out /data/CT-RATE --split train --patients 1:100 --label-maps",
    hu_stats: "hu-stats /data/shards --split train --volumes 1000 --out hu.json --picture hu.png",
    nifti: "nifti scans/ --out shards/ --masks label_maps/",
    phantom: "phantom --volumes 20 --out /tmp/phantom",
    pos_weights: "pos-weights /data/shards --split train --out weights/",
    rad_chestct: "rad-chestct --root /data/RAD-ChestCT --split train --out /data/shards",
    rad_labels: "rad-labels --root /data/RAD-ChestCT --out /data/RAD-ChestCT/rad_chestct_labels.csv",
    splits: "splits --labels train_predicted_labels.csv --out splits.csv",
    subset: "subset --labels train_predicted_labels.csv --patients 5000 --out subset.csv",
    totalsegment: "totalsegment scans/ --out label_maps/ --device gpu",
    turned: "turned --root /data/RAD-ChestCT --prefix tst --turn transposed --out /data/transposed",
}
for command, example in EXAMPLES.items():
    app.command(epilog=f"Example: python -m data_prep {example}")(command)


def main() -> None:
    """Run the command line; a mistake in its input ends in one line rather than in a traceback."""
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    try:
        app()
    except (ValueError, OSError) as error:
        console.print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
