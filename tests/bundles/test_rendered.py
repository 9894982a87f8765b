"""Bundles are rendered from recipes: nothing is edited by hand, and a variant differs only in what it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bundles.render import BUNDLES, dumped, merged, rendered

CONFIGS = sorted(path for path in rendered() if path.suffix == ".json")


def test_committed_bundles_are_up_to_date():
    check = subprocess.run([sys.executable, BUNDLES / "render.py", "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parts[-3]}/{path.stem}")
def test_configs_hold_no_macro_no_lambda_and_are_ascii(path):
    text = path.read_text()
    assert '"%' not in text
    assert "lambda" not in text
    assert text.isascii()
    assert "_desc_" in json.loads(text)


def test_both_configs_of_an_encoder_build_the_same_network():
    for path in CONFIGS:
        is_encoder = not path.parts[-3].startswith("eval_")
        if path.stem == "train" and is_encoder and (path.parent / "inference.json") in CONFIGS:
            train, inference = (
                json.loads(path.read_text()),
                json.loads((path.parent / "inference.json").read_text()),
            )
            assert [node["network_def"].pop("_desc_") for node in (train, inference)]
            assert train["network_def"] == inference["network_def"]
            facts = {"name", "patch_size_px", "img_size_px", "slice_axes", "hu_window"}
            facts |= {"embed_dim", "depth", "num_heads"}
            assert set(train["identity"]) == set(inference["identity"]) == facts
            shared = [
                name for name in ("vit", "img_size_px", "patch_size_px", "embed_dim", "depth", "num_heads")
            ]
            assert [train[name] for name in shared] == [inference[name] for name in shared]


AUXILIARY = {"aux_weight", "auxiliary_terms", "auxiliary_head", "auxiliary_loss"}
SIZES = {"global_size_px", "local_size_px"}
PATCH_14 = {"patch_size_px", "img_size_px"}
SCHEDULE = {"rex_fraction", "batch_size", "max_steps", "warmup_steps", "checkpoint_every"}


@pytest.mark.parametrize(
    ("config", "one", "other", "expected"),
    [
        # III-C2: 2S is 0 anchored by labels; 1S has its own labels, patches and sizes that they divide
        ("train", "dale_ct_0", "dale_ct_2s", {"name"} | AUXILIARY),
        (
            "train",
            "dale_ct_0",
            "dale_ct_1s",
            {"name", "global_size_px", "local_size_px"} | AUXILIARY | PATCH_14,
        ),
        (
            "train",
            "dale_ct_1s",
            "dale_ct_2s",
            {"name"} | SIZES | (AUXILIARY - {"aux_weight"}) | PATCH_14,
        ),
        ("train", "dale_ct_1s", "dale_ct_1s_v2", {"name", "auxiliary_terms"} | SIZES | PATCH_14 | SCHEDULE),
        ("inference", "dale_ct_0", "dale_ct_2s", {"name", "weights_repo"}),
        ("inference", "dale_ct_0", "dale_ct_1s", {"name", "weights_repo", "strategies"} | PATCH_14),
        ("inference", "dale_ct_0", "dale_ct_1s_v2", {"name", "weights_repo"}),
        ("inference", "dale_ct_0", "dale_ct_0_l", {"name", "weights_repo", "weights_hu_window"}),
        ("inference", "dale_ct_1s", "dinov2_ct", {"name", "weights_repo", "vit"}),
    ],
)
def test_variants_differ_in_exactly_what_the_paper_says_of_them(config, one, other, expected):
    first, second = (
        json.loads((BUNDLES / name / "configs" / f"{config}.json").read_text()) for name in (one, other)
    )
    assert {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)} == expected


def test_predict_is_found_under_the_name_that_monais_users_look_for():
    configs = BUNDLES / "eval_ct_rate" / "configs"
    assert (configs / "inference.json").read_text() == (configs / "predict.json").read_text()


def test_dale_ct_0_is_the_recipe_itself():
    for config, recipe in (("train", "lejepa_train"), ("inference", "slice_inference")):
        rendered_config = json.loads((BUNDLES / "dale_ct_0" / "configs" / f"{config}.json").read_text())
        assert rendered_config == json.loads((BUNDLES / "_recipes" / f"{recipe}.json").read_text())


def test_a_misspelt_key_of_an_overlay_is_an_error():
    with pytest.raises(KeyError, match="x.json: 'aux_wieght' is not defined by the recipe"):
        merged({"aux_weight": 0}, {"aux_wieght": 1}, "x.json")
    with pytest.raises(KeyError, match="'train::trainr' is not defined"):
        merged({"train": {"trainer": 1}}, {"train::trainr": 1}, "x.json")


def test_an_overlay_reaches_into_a_section_and_leaves_the_recipe_alone():
    recipe = {"train": {"trainer": {"a": 1}, "b": 2}}
    assert merged(recipe, {"train::b": 3}, "x")["train"] == {"trainer": {"a": 1}, "b": 3}
    assert recipe["train"]["b"] == 2


def test_rendering_changes_the_form_of_json_only():
    content = {"a": [1, 2.5, None], "b": {"c": ["$x"] * 40, "d": {}}, "e": [{"f": [1, [2, 3]]}], "g": "@h"}
    assert json.loads(dumped(content)) == content
    assert all(len(line) <= 110 for line in dumped(content).splitlines())


def test_recipes_are_all_rendered_or_used():
    used = set()
    for path in (BUNDLES / "_recipes").glob("*.json"):
        used |= {path.stem} & {p.name for p in BUNDLES.iterdir()}
        used |= set(json.loads(path.read_text()).get("_recipes_", {}).values())
    assert used == {path.stem for path in Path(BUNDLES / "_recipes").glob("*.json")}
