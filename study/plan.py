"""What the study compares: encoders, what they are held against, and at which sizes."""

from typing import Any, NamedTuple

TRAINED: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "dinov2_ct": ("dinov2_ct", [], {}),
    "dale_ct_0": ("dale_ct_0", [], {}),
    "dale_ct_0_single_slice": ("dale_ct_0", ["bundles/_overlays/single_slice.json"], {}),
    "dale_ct_1s": ("dale_ct_1s", [], {}),
    "dale_ct_2s": ("dale_ct_2s", [], {}),
}
"""Encoders of the tables: bundle, overlays after the size's, knobs."""

ABLATIONS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "2s_frozen_heads": ("dale_ct_2s", [], {"train_auxiliary_head": False}),
    "2s_released_guidance": ("dale_ct_2s", [], {"guidance": "released"}),
    "2s_fractional_rex": ("dale_ct_2s", [], {"rex_targets": "fraction"}),
    "2s_wide_knots": ("dale_ct_2s", ["bundles/_overlays/wide_knots.json"], {}),
    "2s_stream_shuffle": ("dale_ct_2s", ["study/stream_shuffle.json"], {}),
}
"""DALE-CT-2S with one thing changed each."""

FLOORS = ("random_weights", "intensity_histogram", "pixels")
"""Encoders of which nothing was learned."""

CEILING = "lesion_areas"
"""True areas of what was drawn for each label: of slices, so that it is not in Table I."""

TABLE_ENCODERS = (*FLOORS, *TRAINED, CEILING)
DENSE_ENCODERS = (*FLOORS, *TRAINED)


class Size(NamedTuple):
    """How large the study is.

    Args:
        overlays: folder of the configs that shrink the bundles: train.json, train_dinov2.json, inference.json
            and eval.json.
        volumes: of site A and of site B.
        matrix: slices of matrix x matrix pixels.
        spacing_mm: range of the distance of slices.
        views_px: sides of local and global views, as the overlays have them; patches are 16 px wide.
        takes: how long, for the first line of output.
    """

    overlays: str
    volumes: tuple[int, int]
    matrix: int
    spacing_mm: tuple[float, float]
    views_px: tuple[int, int]
    takes: str

    @property
    def grid(self) -> int:
        """Patches along a side of a global view."""
        return self.views_px[1] // 16

    @property
    def strategies(self) -> list[str]:
        """Table VI's, at the sizes of the views."""
        sides = [f"{kind}_{side}" for side in (*self.views_px, "full") for kind in ("raw", "cropped")]
        return [*sides, "tiled_5cut"]


SIZES = {
    "small": Size("demo", (340, 300), 192, (4, 6), (48, 96), "some 3 hours on 2 CPU cores"),
    "gpu": Size(
        "study/gpu",
        (2000, 1200),
        256,
        (1.5, 3),
        (64, 128),
        "not measured; sized for one H200 and 16 CPU cores",
    ),
}
