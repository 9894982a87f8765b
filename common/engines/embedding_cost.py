"""What embedding with a preprocessing strategy costs, to be shown beside its scores in Table VI.

``python -m common.engines.embedding_cost --help``. Each strategy runs alone, through an encoder bundle's own
inference.json, on the same few volumes: reading, preprocessing, encoding and writing. Nothing is kept.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from monai.utils import set_determinism
from rich.console import Console

from common.embeddings.encoder_bundle import open_encoder_bundle
from common.embeddings.store import EmbeddingStore
from common.engines.each_preprocessing import TABLE_VI
from common.reports.results import NAN, add_rows, result_rows
from common.run.config import read_knobs, short_errors
from common.transforms.slice_strategies import SliceStrategy


def tokens_per_slice(strategy: SliceStrategy, side_px: int, box: Sequence[int] | None) -> int:
    """Count the tokens that the encoder computes for a slice: patches of all images, and a CLS for each.

    Args:
        strategy: how slices become images.
        side_px: side of the slice, padded to a square.
        box: body box (top, left, side), or None.

    Example:
        >>> tokens_per_slice(SliceStrategy("cropped_256", 16), side_px=512, box=(40, 30, 400))
        257
    """
    side = strategy.side_px(box[2] if strategy.is_cropped and box is not None else side_px)
    return strategy.num_images * ((side // strategy.patch_size_px) ** 2 + 1)


def embedding_cost(
    config_files: Sequence[Path], strategy: str, dataset_dir: Path, num_volumes: int, knobs: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, Any], int]:
    """Embed some volumes with one strategy, into a folder that is then deleted, and time it.

    Args:
        config_files: inference.json of an encoder bundle, and files that override it.
        strategy: name of the strategy.
        dataset_dir: folder of the volumes.
        num_volumes: how many to embed, spread over the sorted names.
        knobs: other knobs of the bundle.

    Returns:
        ``slices_per_second`` and ``tokens_per_slice``; the identity of the embeddings; how many they are.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {"dataset_dir": str(dataset_dir), "output_dir": folder}
        root, further = config_files[0].parents[1], config_files[1:]
        bundle = open_encoder_bundle(root, further, {**knobs, **paths, "strategies": [strategy]})
        found, _ = bundle["sources"]
        bundle.update({"sources": (found[:: max(len(found) // num_volumes, 1)][:num_volumes], [])})
        set_determinism(seed=bundle["seed"])
        evaluator = bundle["evaluator"]  # the encoder is loaded before the clock starts
        started = time.perf_counter()
        evaluator.run()
        seconds = time.perf_counter() - started
        store = EmbeddingStore(folder)
        (applied,) = bundle.strategies
        tokens = slices = 0
        for volume, length in zip(store.volumes, store.lengths.tolist(), strict=True):
            metadata = store.read(volume).metadata
            # tiles as items of the sequence are several tokens of the store for one slice
            num_slices = length // (applied.num_images if applied.as_items else 1)
            slices += num_slices
            tokens += num_slices * tokens_per_slice(applied, metadata["side_px"], metadata.get("box"))
    cost = {"slices_per_second": slices / seconds, "tokens_per_slice": tokens / slices}
    return cost, store.identity, len(store)


def main(
    context: typer.Context,
    config_file: Annotated[list[Path], typer.Option(help="inference.json, and files that override it.")],
    dataset_dir: Annotated[Path, typer.Option(help="Folder of the volumes.")],
    strategy: Annotated[
        list[str] | None, typer.Option(help="Strategy; may be repeated. [default: the seven of Table VI]")
    ] = None,
    volumes: Annotated[int, typer.Option(help="Volumes to embed. Warm-up is timed too.", min=1)] = 32,
    dataset: Annotated[str, typer.Option(help="Name of the data in the results.")] = "ct_rate",
    results_csv: Annotated[Path, typer.Option(help="CSV of all evaluations.")] = Path(
        "results/eval_preprocessing.csv"
    ),
) -> None:
    """Measure slices per second and tokens per slice of each strategy; other arguments are bundle knobs."""
    short_errors()
    knobs = read_knobs(context.args)
    for name in strategy or TABLE_VI:
        cost, identity, num_embedded = embedding_cost(config_file, name, dataset_dir, volumes, knobs)
        rows = result_rows(
            {metric: (value, NAN, NAN) for metric, value in cost.items()},
            encoder=str(identity["encoder"]),
            protocol=f"preprocessing_{name}",
            dataset=dataset,
            n=num_embedded,
            config={"knobs": {k: str(v) for k, v in knobs.items()}} | identity,
        )
        add_rows(results_csv, rows)
        speed, tokens = cost["slices_per_second"], cost["tokens_per_slice"]
        Console().print(f"{name}: {speed:.1f} slices/s, {tokens:.0f} tokens per slice")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(main)

if __name__ == "__main__":
    app()
