"""CTs to embeddings in one call: in memory, or in a store on disk as an encoder's bundle writes it."""

# B images of a batch, D embedding

import logging
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dale_ct.encoder import SliceEncoder, VolumeEncoder, bundle_folder, load_encoder, read_config

if TYPE_CHECKING:
    import torch

    from common.ct.rejection import RejectedVolume
    from common.embeddings.ct_batches import SliceBatches, VolumeBatches
    from common.embeddings.store import Embedding, EmbeddingStore
    from common.embeddings.work import CTSource
    from common.handlers.embedding_writer import VolumeOutput

logger = logging.getLogger("dale_ct")


def embed(
    path: str | Path,
    encoder: str = "dale_ct_2s",
    *,
    weights: str | None = None,
    device: str | None = None,
    patch_tokens: bool = False,
    strategy: str | None = None,
    slice_axes: str | None = None,
    hu_window: str | Sequence[float] | None = None,
    series: str | None = None,
    num_workers: int = 1,
) -> "Embedding | dict[str, Embedding]":
    """Embed chest CTs: one vector per slice, feet to head, or a grid of tokens per volume.

    On a CPU the numbers are those of the encoder's bundle, bit by bit; on a GPU the bundle compiles the
    network, which rounds differently. The network stays loaded for the next call.

    Args:
        path: a CT as NIfTI in HU, MetaImage, NRRD or npz, a DICOM series, or a folder or zip of these.
        encoder: name of a bundled encoder, see :func:`dale_ct.encoders`, or a bundle's folder.
        weights: a file, ``hub:<owner>/<name>[@revision]`` or "random"; None for the bundle's own, else the
            authors' release.
        device: "cuda", "cpu"; None for a GPU where there is one.
        patch_tokens: whether to return the patch tokens of each slice, too. This and the next three are for
            encoders of slices.
        strategy: how slices become images, a name of Table VI; None for the bundle's.
        slice_axes: "yx" or "xy", for weights of which it is not known.
        hu_window: name or four numbers, for weights of which it is not known.
        series: the one to embed of several CTs in ``path``, by name or SeriesInstanceUID; "all" to take all
            where they are of one study.
        num_workers: threads that read further CTs meanwhile.

    Returns:
        The embedding if ``path`` holds one CT, with ``tokens (slices, D)``, ``z_mm`` (positions of the
        slices, feet to head), ``patches (slices, P, D)`` or None, and ``metadata`` with ``spacing_mm`` (x, y,
        z). Tiles give ``(slices, 5 D)``, an encoder of volumes ``tokens (G0 G1 G2, D)``, row-major, the grid
        in ``metadata["grid_shape"]`` and its axes in ``metadata["axcodes"]``, no ``z_mm``. Of several CTs, a
        dictionary by name; those that cannot be used are logged.

    Raises:
        FileNotFoundError: if there is no CT, or no weights can be found.
        ValueError: if the encoder is unknown; if ``path`` holds nothing but several series of one study, with
            a table of them; or if no CT can be used: says which and why.
    """
    from common.ct.rejection import is_failure
    from common.embeddings.work import ALL, ct_sources

    sources, rejected = ct_sources(path, series=series)
    given: dict[str, Any] = {"slice_axes": slice_axes, "hu_window": hu_window, "patch_tokens": patch_tokens}
    opened = load_encoder(encoder, weights, device, strategy, **given)
    found = dict(embeddings_of(opened, sources, num_workers, patch_tokens, rejected))
    for volume, reason, detail in rejected:
        logger.warning("'%s' is left out, %s: %s", volume, reason, detail)
    if not found:
        volume, reason, detail = rejected[0]
        raise ValueError(f"No CT of '{path}' can be used: '{volume}', {reason}: {detail}")
    is_alone = len(found) == 1 and (series not in (None, ALL) or not any(map(is_failure, rejected)))
    return next(iter(found.values())) if is_alone else found


def embed_to_store(
    path: str | Path,
    output_dir: str | Path,
    encoder: str = "dale_ct_2s",
    *,
    weights: str | None = None,
    device: str | None = None,
    patch_tokens: bool = False,
    strategy: str | None = None,
    slice_axes: str | None = None,
    hu_window: str | Sequence[float] | None = None,
    series: str | None = None,
    split: str | None = None,
    num_workers: int | None = None,
    max_rejected: float | None = None,
) -> "EmbeddingStore":
    """Embed the CTs of a folder that are not in the store yet; an interrupted run is resumed.

    Args:
        path: CTs, as for :func:`embed`, or a folder of shards.
        output_dir: folder of the store.
        encoder: as for :func:`embed`.
        weights: as for :func:`embed`.
        device: as for :func:`embed`.
        patch_tokens: whether to store patch tokens, too.
        strategy: as for :func:`embed`.
        slice_axes: as for :func:`embed`.
        hu_window: as for :func:`embed`.
        series: as for :func:`embed`.
        split: split of the shards; None for the bundle's.
        num_workers: threads that read ahead; None for the bundle's.
        max_rejected: share of CTs that may fail; None for the bundle's.

    Returns:
        The store, opened.

    Raises:
        FileNotFoundError: as :func:`embed`.
        ValueError: as :func:`embed`; if more CTs failed; if the store holds embeddings of another origin, has
            patch tokens where none are asked for or the reverse, or holds another CT of the file's name.
        BlockingIOError: if another process writes to the folder.
    """
    from common.embeddings.store import EmbeddingStore
    from common.embeddings.work import ct_sources, embedding_work, store_folders
    from common.handlers.embedding_writer import EmbeddingWriter
    from common.run.process import claimed

    knobs = {"split": split, "num_workers": num_workers, "max_rejected": max_rejected}
    config = read_config(bundle_folder(encoder)) | {
        name: knob for name, knob in knobs.items() if knob is not None
    }
    sources, rejected = ct_sources(path, config["split"], series=series)
    given: dict[str, Any] = {"slice_axes": slice_axes, "hu_window": hu_window, "patch_tokens": patch_tokens}
    opened = load_encoder(encoder, weights, device, strategy, **given)
    folders = store_folders(output_dir, [_store_name(opened)])
    with claimed(output_dir):
        work = embedding_work(sources, folders)
        _check_store(Path(output_dir), path, sources, patch_tokens)
        batches = _batches(opened, work, config["num_workers"])
        writer = EmbeddingWriter(
            folders=folders,
            output_dir=output_dir,
            identity=opened.identity,
            dtype=opened.config["embedding_dtype"],
            batches=batches,
            num_volumes=len(sources),
            rejected=rejected,
            max_rejected=config["max_rejected"],
        )
        writer.start()
        try:
            with closing(_encoded(opened, batches, patch_tokens)) as encoded:
                for pieces, cls, patches in encoded:
                    writer.take(pieces, cls, patches)
            writer.finish()
        except BaseException:
            writer.close()
            raise
    return EmbeddingStore(output_dir)


def embeddings_of(
    opened: SliceEncoder | VolumeEncoder,
    sources: Sequence["CTSource"],
    num_workers: int,
    patch_tokens: bool,
    rejected: list["RejectedVolume"],
) -> Generator[tuple[str, "Embedding"]]:
    """Yield volume after volume as soon as it is encoded.

    Args:
        opened: the encoder.
        sources: CTs.
        num_workers: threads that read ahead.
        patch_tokens: whether to keep the patch tokens, too.
        rejected: list to which CTs that cannot be used are appended, at the end.
    """
    from common.embeddings.store import DTYPES
    from common.handlers.embedding_writer import VolumeOutputs

    work = [source._replace(stores=(_store_name(opened),)) for source in sources]
    batches = _batches(opened, work, num_workers)
    outputs = VolumeOutputs(DTYPES[opened.config["embedding_dtype"]])
    with closing(_encoded(opened, batches, patch_tokens)) as encoded:
        for pieces, cls, patches in encoded:
            yield from _sound(outputs.add(pieces, cls, patches), batches.rejected).items()
    yield from _sound(outputs.rest(), batches.rejected).items()
    rejected += batches.rejected


def _sound(volumes: Iterable["VolumeOutput"], rejected: list["RejectedVolume"]) -> dict[str, "Embedding"]:
    """Put embeddings together; what the store would refuse, such as NaN, is rejected."""
    from common.ct.rejection import RejectedError
    from common.embeddings.store import check_embedding
    from common.handlers.embedding_writer import NOT_EMBEDDED, embedding_of

    found = {}
    for volume in volumes:
        embedding = embedding_of(volume)
        try:
            check_embedding(embedding)
        except ValueError as error:
            rejected.append(RejectedError(NOT_EMBEDDED, str(error)).of(volume.task.volume))
        else:
            found[volume.task.volume] = embedding
    return found


def _check_store(folder: Path, path: str | Path, sources: Sequence["CTSource"], patch_tokens: bool) -> None:
    """Refuse a store without the fields that are asked for, and another CT under the name of one file.

    A single file is read again for that; of a folder, names count, as reading a cohort again takes hours.
    """
    from common.embeddings.store import EmbeddingStore, stored_volumes

    known = stored_volumes(folder)
    if not known:
        return
    store = EmbeddingStore(folder)
    if ("patches" in store.fields) != patch_tokens:
        has = "patch tokens" if "patches" in store.fields else "no patch tokens"
        raise ValueError(f"The embeddings in '{folder}' have {has}. Ask for the same, or write elsewhere.")
    for source in sources if Path(path).is_file() else ():
        if source.volume in known:
            stored = store.read(source.volume).metadata.get("sha256")
            if stored not in (None, source.read().sha256):
                raise ValueError(
                    f"'{folder}' holds the embedding of another '{source.volume}'. Rename the file, or write "
                    "elsewhere."
                )


def _store_name(encoder: SliceEncoder | VolumeEncoder) -> str:
    return encoder.strategy.name if isinstance(encoder, SliceEncoder) else encoder.identity["preprocessing"]


def _batches(
    encoder: SliceEncoder | VolumeEncoder, sources: list[Any], num_workers: int
) -> "SliceBatches | VolumeBatches":
    """Batches of images of the CTs, or one volume after another."""
    from common.embeddings.ct_batches import SliceBatches, VolumeBatches

    if isinstance(encoder, VolumeEncoder):
        return VolumeBatches(sources, encoder.transform, encoder.config["axcodes"], num_workers)
    return SliceBatches(
        work=sources,
        strategies=[encoder.strategy],
        window=encoder.given.window,
        slice_axes=encoder.given.slice_axes,
        slices_per_batch=encoder.config["slices_per_batch"],
        num_workers=num_workers,
        device=encoder.device,
        padded=False,
    )


def _encoded(
    encoder: SliceEncoder | VolumeEncoder, batches: "SliceBatches | VolumeBatches", patch_tokens: bool
) -> Generator[tuple[Any, "torch.Tensor", "torch.Tensor | None"]]:
    """Encode batch after batch; in smaller parts, from when one does not fit into the GPU."""
    import torch

    from common.networks.encoder import SlicesInferer

    infer: Any = SlicesInferer(encoder.config["amp_dtype"], compiled=False, patch_tokens=patch_tokens)
    if isinstance(encoder, VolumeEncoder):
        infer = encoder.inferer
    for batch in batches:
        with torch.inference_mode():
            encoded, patches = infer(batch["image"].to(encoder.device), encoder.network)
        yield batch["pieces"], encoded, patches
