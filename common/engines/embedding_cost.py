"""What embedding with a preprocessing strategy costs, to be shown beside its scores in Table VI.

``python -m common.engines.embedding_cost --help``. Each strategy runs alone, through an encoder bundle's own
inference.json, on the same few volumes: reading, preprocessing, encoding and writing. Nothing is kept.
"""

import ast
import csv
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from monai.bundle.workflows import ConfigWorkflow
from rich.console import Console

from common.embeddings.store import EmbeddingStore
from common.embeddings.work import ct_sources
from common.engines.each_preprocessing import TABLE_VI
from common.reports.results import NAN, add_rows, result_rows
from common.run.config import short_errors
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
    config_files: Sequence[Path],
    strategy: str,
    dataset_dir: Path,
    volumes: Sequence[str],
    knobs: dict[str, Any],
) -> tuple[dict[str, float], dict[str, Any]]:
    """Embed some volumes with one strategy, into a folder that is then deleted, and time it.

    Args:
        config_files: inference.json of an encoder bundle, and files that override it.
        strategy: name of the strategy.
        dataset_dir: folder of the volumes.
        volumes: names of those to embed.
        knobs: other knobs of the bundle.

    Returns:
        ``slices_per_second`` and ``tokens_per_slice``, and the identity of the embeddings.
    """
    with tempfile.TemporaryDirectory() as folder:
        subset = Path(folder) / "subset.csv"
        with subset.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["VolumeName"], *([volume] for volume in volumes)])
        out = Path(folder) / "embeddings"
        workflow = ConfigWorkflow(
            [str(path) for path in config_files],
            workflow_type="inference",
            logging_file=False,
            bundle_root=str(config_files[0].parent.parent),
            dataset_dir=str(dataset_dir),
            subset_csv=str(subset),
            output_dir=str(out),
            strategies=[strategy],
            **knobs,
        )
        workflow.initialize()
        # the encoder is loaded before the clock starts
        evaluator = workflow.parser.get_parsed_content("evaluator")
        started = time.perf_counter()
        evaluator.run()
        seconds = time.perf_counter() - started
        store = EmbeddingStore(out)
        applied = SliceStrategy(strategy, workflow.parser.get_parsed_content("patch_size_px"))
        # tiles as items of the sequence are several tokens of the store for one slice
        per_slice = applied.num_images if applied.as_items else 1
        tokens = slices = 0
        for volume, length in zip(store.volumes, store.lengths.tolist(), strict=True):
            metadata = store.read(volume).metadata
            slices += length // per_slice
            tokens += (
                length // per_slice * tokens_per_slice(applied, metadata["side_px"], metadata.get("box"))
            )
        identity = dict(store.identity)
    return {"slices_per_second": slices / seconds, "tokens_per_slice": tokens / slices}, identity


def knobs_of(words: Sequence[str]) -> dict[str, Any]:
    """Read ``--name value`` pairs; a value that is a Python literal is read as one.

    Args:
        words: words of a command line.

    Raises:
        ValueError: if a name has no value, or a value has no name.

    Example:
        >>> knobs_of(["--embed_dim", "128", "--amp_dtype", "float32"])
        {'embed_dim': 128, 'amp_dtype': 'float32'}
    """
    pairs = list(zip(words[::2], words[1::2], strict=False))
    odd = [word for word in words[::2] if not word.startswith("--")] or (words[-1:] if len(words) % 2 else [])
    if odd:
        raise ValueError(f"Options must be pairs --name value, got '{odd[0]}' on its own.")
    knobs: dict[str, Any] = {}
    for name, value in pairs:
        try:
            knobs[name.removeprefix("--")] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            knobs[name.removeprefix("--")] = value
    return knobs


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
    knobs = knobs_of(context.args)
    names = [source.volume for source in ct_sources(dataset_dir)[0]]
    chosen = names[:: max(len(names) // volumes, 1)][:volumes]
    for name in strategy or TABLE_VI:
        cost, identity = embedding_cost(config_file, name, dataset_dir, chosen, knobs)
        rows = result_rows(
            {metric: (value, NAN, NAN) for metric, value in cost.items()},
            encoder=str(identity["encoder"]),
            protocol=f"preprocessing_{name}",
            dataset=dataset,
            n=len(chosen),
            config={"knobs": {k: str(v) for k, v in knobs.items()}} | identity,
        )
        add_rows(results_csv, rows)
        speed, tokens = cost["slices_per_second"], cost["tokens_per_slice"]
        Console().print(f"{name}: {speed:.1f} slices/s, {tokens:.0f} tokens per slice")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(main)

if __name__ == "__main__":
    app()
