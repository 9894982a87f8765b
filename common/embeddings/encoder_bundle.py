"""An encoder bundle opened from Python: its ``inference.json`` with further files and knobs, part by part."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from common.run.config import PlainConfig, first_cause, merged_config
from common.transforms.hounsfield import HUWindow
from common.transforms.slice_strategies import FULL_PX, SliceStrategy

if TYPE_CHECKING:  # takes 5 s to import
    from monai.bundle import ConfigParser


def open_encoder_bundle(
    folder: str | Path,
    configs: Sequence[str | Path] = (),
    knobs: Mapping[str, Any] | None = None,
    with_monai: bool = True,
) -> "EncoderBundle":
    """Open an encoder bundle as ``python -m monai.bundle run`` would; nothing of it is built yet.

    Args:
        folder: folder of the bundle.
        configs: further config files, such as demo/inference.json.
        knobs: values of single knobs, such as ``{"slice_axes": "xy"}``.
        with_monai: False to do without its seconds of imports, for the network of an encoder of slices and
            what it expects; without further files.

    Raises:
        FileNotFoundError: if the bundle or a further file does not exist.
        ValueError: if a further file or a knob names something that the bundle does not have.
    """
    path = Path(folder) / "configs" / "inference.json"
    if not path.is_file():
        raise FileNotFoundError(f"No encoder bundle in '{folder}': it has no configs/inference.json.")
    known = json.loads(path.read_text(encoding="utf-8"))
    knobs = {"bundle_root": str(folder), **(knobs or {})}
    if not with_monai:
        return EncoderBundle(PlainConfig(known | knobs))
    return EncoderBundle(merged_config(known, [str(path), *map(str, configs)], knobs))


class EncoderBundle:
    """The parts of an encoder bundle, each built when it is first asked for.

    ``bundle["amp_dtype"]`` is any part of the config by its name, and ``"strategies" in bundle`` asks whether
    it has one: encoders of slices have strategies, encoders of volumes have none.

    Args:
        parser: merged content of an ``inference.json``.

    Raises:
        KeyError: if a part is asked for that the bundle does not have.
    """

    def __init__(self, parser: "ConfigParser | PlainConfig") -> None:
        self.parser = parser

    def __contains__(self, name: str) -> bool:
        return name in self.parser

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 (whatever the config makes)
        if name not in self.parser:
            raise KeyError(f"The encoder bundle '{self.name}' has no '{name}'.")
        try:
            return self.parser.get_parsed_content(name)
        except RuntimeError as error:  # MONAI's, one around each reference
            cause = first_cause(error)
            if cause is None:
                raise
            raise cause from None

    def update(self, parts: Mapping[str, Any]) -> None:
        """Set parts by name. What was built before is built anew when it is asked for again."""
        self.parser.update(pairs=dict(parts))

    @property
    def name(self) -> str:
        """Name of the encoder."""
        return str(self.parser["name"])

    @property
    def network(self) -> nn.Module:
        """The encoder with its weights, in evaluation mode; random weights are those of the knob ``seed``."""
        torch.manual_seed(self["seed"])
        network: nn.Module = self["network"]
        return network.eval()

    @property
    def window(self) -> HUWindow:
        """Clip range and statistics in HU."""
        window: HUWindow = self["window"]
        return window

    @property
    def slice_axes(self) -> str:
        """How slices are shown to the encoder: "yx", or "xy" for transposed."""
        return str(self["axes"])

    @property
    def patch_size_px(self) -> int:
        """Side of a patch."""
        return int(self["patch_size_px"])

    @property
    def strategies(self) -> list[SliceStrategy]:
        """How slices become images."""
        strategies: list[SliceStrategy] = self["preprocessing"]
        return strategies

    @property
    def side_px(self) -> int:
        """Side of the images that it embeds; for whole sides, of slices of 512 px."""
        return self.strategies[0].side_px(FULL_PX)
