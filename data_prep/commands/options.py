"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option(help="Folder for shards, manifest.csv and rejected.csv.")]
Shards = Annotated[
    Path, typer.Argument(help="Folder of shards that data_prep wrote.", metavar="SHARDS", exists=True)
]
SlicesPerShard = Annotated[
    int, typer.Option(help="A shard takes volumes until the next would exceed this.", min=1)
]
MaxRejected = Annotated[
    float, typer.Option(help="Share of rejected volumes past which the exit status is 1.", min=0, max=1)
]
Workers = Annotated[
    int | None,
    typer.Option(help="Worker processes on this machine. Default: by its cores and memory.", min=1),
]
Scheduler = Annotated[
    str | None,
    typer.Option(help="Join the Dask cluster at this address, as tcp://host:8786, in place of own workers."),
]
