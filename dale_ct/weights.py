"""Encoder weights into a bundle and out of it: the functions of ``dale-ct weights``."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.embeddings.encoder_bundle import EncoderBundle, open_encoder_bundle
from common.networks.encoder import agreed_input, load_encoder, save_encoder, stated_identity
from common.networks.hub import HUB, download
from common.networks.timm_keys import to_timm_keys
from common.reports.results import MACRO_COLUMNS, read_rows
from common.run.process import atomic_file
from common.transforms.hounsfield import hu_window

HUB_FILE, HUB_CONFIG = "model.safetensors", "config.json"


def read_weights(
    source: str, releases: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read encoder weights under timm's names, and what is known of them.

    Args:
        source: a ``.safetensors`` file, a checkpoint ``step_*.pt`` of pretraining, whose teacher counts if it
            has one, or ``hub:<owner>/<name>[@revision]`` for ``model.safetensors`` of a repository there.
        releases: what is known of repositories whose files do not state it.

    Returns:
        The weights; and as far as the source states them ``slice_axes``, ``hu_window`` and other facts, from
        the file's metadata, else from a ``config.json`` beside it; sizes always, from the shapes.

    Raises:
        FileNotFoundError: if there is no such file, or the hub does not give it.
        ValueError: if the file is damaged or holds something else.
    """
    path, stated = _located(source, releases or {})
    try:
        if path.suffix == ".pt":
            state = torch.load(path, map_location="cpu", weights_only=True)
            weights = to_timm_keys(state["teacher"] if "teacher" in state else state["network"])
            if "hu_window" in state.get("knobs", {}):  # pretraining shows slices one way
                stated = {"slice_axes": "yx", "hu_window": [*hu_window(state["knobs"]["hu_window"])]}
        else:
            weights = to_timm_keys(load_file(path))
            stated |= stated_identity(path)
    except (SafetensorError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"source must be whole weights, got '{source}' ({error}).") from error
    return weights, stated | _sizes(weights)


def _located(source: str, releases: Mapping[str, Mapping[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """Find the file of a source, and what stands beside it about the slices."""
    stated: dict[str, Any] = {}
    if source.startswith(HUB):
        repository, _, revision = source.removeprefix(HUB).partition("@")
        path = download(repository, HUB_FILE, revision or "main")
        stated = dict(releases.get(repository, {}))
        try:
            config = download(repository, HUB_CONFIG, revision or "main")
        except FileNotFoundError:
            return path, stated
    else:
        path = Path(source)
        config = path.with_name(HUB_CONFIG)
    if not path.is_file():
        raise FileNotFoundError(
            f"source must be a file of weights or hub:<owner>/<name>, got '{source}', which is no file."
        )
    if config.is_file():
        stated |= json.loads(config.read_text(encoding="utf-8")).get("identity", {})
    return path, stated


def _sizes(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """Tell a ViT's sizes from its shapes; the position embedding may hold places of prefix tokens, too."""
    patch = weights["patch_embed.proj.weight"].shape[-1]
    positions, embed_dim = weights["pos_embed"].shape[1:]
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    side = math.isqrt(positions) * patch
    return {"patch_size_px": patch, "img_size_px": side, "embed_dim": embed_dim, "depth": len(blocks)}


def import_weights(
    source: str,
    bundle: str | Path,
    slice_axes: str | None = None,
    window: str | Sequence[float] | None = None,
) -> Path:
    """Put weights into ``models/model.safetensors`` of a bundle, with the facts that every use of them needs.

    Args:
        source: see ``read_weights``.
        bundle: folder of the encoder's bundle.
        slice_axes: how the weights expect slices, "yx" or "xy"; None for what the source states.
        window: their HU window, a name or four numbers; None for what the source states.

    Returns:
        The file.

    Raises:
        FileNotFoundError: if source or bundle are not there.
        ValueError: if the weights are not of the bundle's encoder, key by key and shape by shape, or what
            slices they expect is stated nowhere or otherwise.
    """
    opened = open_encoder_bundle(bundle, knobs={"encoder_weights": None})
    facts = opened["identity"]
    window_of_release = [*hu_window(opened["weights_hu_window"])]
    released = {"slice_axes": opened["weights_slice_axes"], "hu_window": window_of_release}
    weights, stated = read_weights(source, {opened["weights_repo"]: released})
    expected = agreed_input(stated, source, slice_axes, window)
    shown = {"slice_axes": expected.slice_axes, "hu_window": [*expected.window]}
    path = Path(bundle) / "models" / "model.safetensors"
    aside = path.with_name("imported.safetensors")
    try:
        save_encoder(weights, aside, facts | stated | shown | {"name": facts["name"]})
        load_encoder(opened["network_def"], aside, facts | shown)  # checks sizes, keys and shapes
        aside.replace(path)
    except ValueError as error:
        raise ValueError(str(error).replace(str(aside), source)) from error
    finally:
        aside.unlink(missing_ok=True)
    return path


def export_weights(bundle: str | Path, out: str | Path, results: list[Path]) -> Path:
    """Write a folder that ``timm.create_model("local-dir:<folder>")`` loads, or from the hub after an upload.

    ``model.safetensors`` with plain timm keys, ``config.json``, and the bundle's card with its results.

    Args:
        bundle: folder of the encoder's bundle, with weights.
        out: folder to write.
        results: results CSVs, whose rows of this encoder go into the card.

    Raises:
        FileNotFoundError: if bundle, weights or results are not there.
        ValueError: if the weights are not the bundle's.
    """
    bundle, out = Path(bundle), Path(out)
    path = bundle / "models" / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"No weights '{path}' to export. Train the bundle, or import weights, first.")
    opened = open_encoder_bundle(bundle)
    identity = opened["identity"]
    encoder = load_encoder(opened["network_def"], path, identity)
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    save_encoder(encoder.state_dict(), out / HUB_FILE, identity)
    with atomic_file(out / HUB_CONFIG, "w", encoding="utf-8") as file:
        json.dump(timm_config(opened), file, indent=2)
    card = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    header = "---\nlibrary_name: timm\ntags: [image-feature-extraction, medical, ct, chest]\n---\n\n"
    with atomic_file(out / "README.md", "w", encoding="utf-8") as file:
        file.write(header + card + _results_section(metadata["name"], identity["name"], results))
    return out


def timm_config(bundle: EncoderBundle) -> dict[str, Any]:
    """Describe the encoder of a bundle as timm's hub format does.

    Mean and standard deviation are those of slices clipped to the window and scaled to 0..1; the whole image
    is resized as ours, without timm's usual cut.
    """
    low, high, mean, std = bundle.window
    written = bundle.parser["network_def"]
    values = {name: bundle[f"network_def::{name}"] for name in written if not name.startswith("_")}
    architecture = values.pop("model_name")
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": bundle["embed_dim"],
        "model_args": {name: value for name, value in values.items() if name != "pretrained"},
        "pretrained_cfg": {
            "input_size": [1, *[bundle.side_px] * 2],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": 0,
            "mean": [(mean - low) / (high - low)],
            "std": [std / (high - low)],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "identity": bundle["identity"],
    }


def _results_section(title: str, encoder: str, results: list[Path]) -> str:
    rows = [row for path in results for row in read_rows(path) if row.encoder == encoder]
    if not rows:
        return ""
    lines = [
        f"\n## Results of {title}, from the results table\n",
        "| protocol | data | metric | value | 95 % | n |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows:
        interval = "" if math.isnan(row.low) else f"{row.low:.4f} to {row.high:.4f}"
        name = MACRO_COLUMNS.get(row.metric, row.metric)
        cells = (row.protocol, row.dataset, name, f"{row.value:.4f}", interval, str(row.n))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
