"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option(help="Folder for shards, manifest.csv and rejected.csv.")]
Shards = Annotated[
    Path, typer.Argument(help="Folder of shards that data_prep wrote.", metavar="SHARDS", exists=True)
]
CTRateRoot = Annotated[
    Path, typer.Option(help="CT-RATE as downloaded: the folder that holds dataset/.", exists=True)
]
CTRateMaps = Annotated[
    Path | None, typer.Option(help="Label maps. Default: dataset/ts_seg/ts_total/<split>_fixed if present.")
]
LabelMaps = Annotated[
    Path | None,
    typer.Option(
        help="TotalSegmentator label maps, named like the volumes (DICOM: or by SeriesInstanceUID)."
    ),
]
FirstVolumes = Annotated[int | None, typer.Option(help="Process the first N volumes only.", min=1)]
SplitName = Annotated[str, typer.Option(help="Name of the split.")]
SlicesPerShard = Annotated[
    int, typer.Option(help="A shard takes volumes until the next would exceed this.", min=1)
]
MaxRejected = Annotated[
    float, typer.Option(help="Share of rejected volumes above which the exit status is 1.", min=0, max=1)
]
Workers = Annotated[
    int | None,
    typer.Option(help="Worker processes on this machine. Default: by its cores and memory.", min=1),
]
Scheduler = Annotated[
    str | None,
    typer.Option(help="Use the Dask cluster at this address, such as tcp://host:8786, instead of --workers."),
]
