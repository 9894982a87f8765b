"""What a run read, for MLflow's dataset column."""

import hashlib
import json
import os
from pathlib import Path

from mlflow.entities import Dataset, DatasetInput, InputTag


def dataset_input(path: str | Path, context: str) -> DatasetInput:
    """Describe a folder or file that a run reads.

    ``mlflow.data`` would import pandas and read the data; this looks at names and sizes only, and the digest
    is theirs.

    Args:
        path: folder of shards or embeddings, or a file.
        context: what it is to the run, such as "training".
    """
    place = Path(path).resolve()
    files = sorted((file.name, file.stat().st_size) for file in _files(place))
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]
    profile = json.dumps({"files": len(files), "bytes": sum(size for _, size in files)})
    source = json.dumps({"uri": place.as_uri()})
    name = "/".join(place.parts[-2:]).lstrip("/")
    dataset = Dataset(name, digest, source_type="local", source=source, profile=profile)
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])


def _files(place: Path) -> list[os.DirEntry[str] | Path]:
    if not place.is_dir():
        return [place]
    with os.scandir(place) as entries:
        return [entry for entry in entries if entry.is_file() and not entry.name.startswith(".")]
