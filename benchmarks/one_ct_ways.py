"""The ways that ``one_ct.py`` compares, each in a process of its own that reports a line of JSON.

    python benchmarks/one_ct_ways.py <way> <settings as JSON>

Nothing but the standard library is imported up here: what a way imports is part of what it takes.
"""

# Z slices, H x W of a slice, I side of an image

import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of the repository, where this may run from
Settings = dict[str, Any]


class Watch:
    """Processor seconds of the parts of a process, and when its first images reached the encoder.

    Args:
        settings: ``started`` is when the shell was told, on the machine's monotonic clock; ``images`` names a
            file to keep the images in, and then the network encodes some; else a stand-in takes its place.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.seconds: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.images: list[Any] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that adds what it takes to a part."""

        def run(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 (the function's own)
            start = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[part] = self.seconds.get(part, 0) + time.process_time() - start

        return run

    def encode(self, images: Any, network: Any) -> Any:  # noqa: ANN401 (tensor and network, not imported yet)
        """Take images in place of the encoder: their pixels, in coarse, are the embedding."""
        if not self.first:
            now = time.clock_gettime(time.CLOCK_MONOTONIC)
            self.first = {"wall": now - self.settings["started"], "processor": time.process_time()}
        return self.timed("encode", self._encode)(images, network)

    def _encode(self, images: Any, network: Any) -> Any:  # noqa: ANN401
        import torch

        if self.settings.get("images"):
            if not self.images:
                some = images[: self.settings["encoded"]]
                with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                    network(some[:1])
                    start = time.process_time()
                    network(some)
                self.first["encode_a_slice"] = (time.process_time() - start) / len(some)
            self.images.append(images.numpy().copy())
        return torch.nn.functional.adaptive_avg_pool2d(images, 16).flatten(1)

    def report(self) -> None:
        """Print what was seen."""
        if self.images:
            import numpy as np

            np.save(self.settings["images"], np.concatenate(self.images))
        sys.stdout.write(json.dumps({"parts": self.seconds, "first": self.first}) + "\n")


def stand_in(watch: Watch, afterwards: Callable[[], None] = lambda: None) -> None:
    """Let a watch take the images in place of the encoder."""
    from common.networks.encoder import SlicesInferer

    def encode(_: Any, images: Any, network: Any, **options: Any) -> tuple[Any, None]:  # noqa: ANN401
        tokens = watch.encode(images, network)
        afterwards()
        return tokens, None

    owner, name = SlicesInferer, "__call__"
    setattr(owner, name, encode)


def ours(settings: Settings) -> None:
    """Run ``dale-ct embed``."""
    from common.embeddings import ct_batches, work
    from common.embeddings.store import EmbeddingStoreWriter
    from dale_ct import cli, encoder

    watch = Watch(settings)
    for part, owner, name in (
        ("read", work, "_read_file"),
        ("crop", ct_batches, "body_box"),
        ("resize", ct_batches, "images_of"),
        ("load", encoder, "_opened"),
        ("write", EmbeddingStoreWriter, "add"),
        ("write", EmbeddingStoreWriter, "close"),
    ):
        setattr(owner, name, watch.timed(part, getattr(owner, name)))
    stand_in(watch)
    words = ["embed", settings["ct"], "--out", settings["out"], "--encoder", settings["encoder"]]
    sys.argv = ["dale-ct", *words, "--weights", settings["weights"], "--device", "cpu"]
    try:
        cli.main()
    finally:
        watch.report()


def bundle(settings: Settings) -> None:
    """Run ``python -m monai.bundle run`` of the same job, up to its first images."""
    watch = Watch(settings)

    def end() -> None:
        watch.report()
        sys.stdout.flush()
        os._exit(0)

    stand_in(watch, end)
    folder = Path(__file__).resolve().parents[1] / "bundles" / settings["encoder"]
    words = ["--config_file", str(folder / "configs" / "inference.json"), "--bundle_root", str(folder)]
    words += ["--dataset_dir", settings["ct"], "--output_dir", settings["out"]]
    sys.argv = ["monai.bundle", "run", *words, "--encoder_weights", settings["weights"]]
    runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)


def twice(settings: Settings) -> None:
    """Call ``dale_ct.embed`` twice in one process."""
    import dale_ct

    calls = []
    for _ in range(2):
        watch = Watch(settings | {"started": time.clock_gettime(time.CLOCK_MONOTONIC)})
        stand_in(watch)
        start = time.process_time()
        dale_ct.load_encoder(settings["encoder"], settings["weights"], "cpu")
        loaded = time.process_time() - start
        dale_ct.embed(settings["ct"], settings["encoder"], weights=settings["weights"], device="cpu")
        calls.append({"load": loaded, "first": watch.first["wall"]})
    sys.stdout.write(json.dumps({"calls": calls}) + "\n")


def plain(settings: Settings) -> None:
    """Do the same with nibabel, SciPy and a loop around timm."""
    import nibabel  # noqa: F401 (here, so that it counts as import)
    import numpy as np
    import torch
    from scipy import ndimage  # noqa: F401

    watch = Watch(settings)
    hu = watch.timed("read", plain_slices)(settings["ct"])
    top, left, side = watch.timed("crop", plain_box)(hu)
    network = watch.timed("load", plain_network)(settings)
    tokens = []
    for start in range(0, len(hu), settings["batch"]):
        region = hu[start : start + settings["batch"], top : top + side, left : left + side]
        images = watch.timed("resize", plain_images)(region, settings)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            tokens.append(watch.encode(images, network))
    save = watch.timed("write", np.save)
    save(settings["out"], torch.cat(tokens).half().numpy())
    watch.report()


def plain_slices(ct: str) -> Any:  # noqa: ANN401 (an array)
    """Read slices ``(Z, H, H)``, feet first, rows to the back, columns to the left."""
    import nibabel as nib
    import numpy as np

    image = nib.as_closest_canonical(nib.load(ct))
    hu = image.get_fdata(dtype=np.float32)[::-1, ::-1].transpose(2, 1, 0)
    return np.clip(hu, -1024, 3071)


def plain_box(hu: Any) -> tuple[int, int, int]:  # noqa: ANN401
    """Open the body's mask of each slice by 25 x 25, and make the box of all of them a square."""
    import numpy as np
    from scipy import ndimage

    mask = (hu > -500).astype(np.uint8)
    mask = ndimage.minimum_filter(mask, (1, 25, 25), mode="constant", cval=1)
    body = ndimage.maximum_filter(mask, (1, 25, 25), mode="constant", cval=0).any(0)
    rows, columns = np.flatnonzero(body.any(1)), np.flatnonzero(body.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side, size = max(bottom - top, right - left), len(body)
    top, left = (min(max((a + b - side) // 2, 0), size - side) for a, b in ((top, bottom), (left, right)))
    return int(top), int(left), int(side)


def plain_network(settings: Settings) -> Any:  # noqa: ANN401 (a network)
    """Build the ViT and load its weights."""
    import timm
    from safetensors.torch import load_file

    network = timm.create_model(**settings["network"])
    network.load_state_dict(load_file(settings["weights"]))
    return network.eval()


def plain_images(region: Any, settings: Settings) -> Any:  # noqa: ANN401
    """Resize slices and normalise them."""
    import numpy as np
    import torch

    low, high, mean, std = settings["window"]
    images = torch.from_numpy(np.ascontiguousarray(region))[:, None]
    if settings["slice_axes"] == "xy":
        images = images.transpose(2, 3)
    size = (settings["side_px"], settings["side_px"])
    images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
    return (images.clamp(low, high) - mean) / std


if __name__ == "__main__":
    {"ours": ours, "bundle": bundle, "twice": twice, "plain": plain}[sys.argv[1]](json.loads(sys.argv[2]))
