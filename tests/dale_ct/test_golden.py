import numpy as np
import pytest
import torch

from dale_ct import golden
from dale_ct.encoder import load_encoder
from dale_ct.golden import compare, outputs_of, record, stages_of, verify
from data_prep.phantom.cohort import Settings, write_cohort


@pytest.fixture(scope="module")
def ct(tmp_path_factory):
    """A CT of 96 x 96 pixels whose body does not fill the slices, and is no square."""
    folder = tmp_path_factory.mktemp("cohort")
    list(write_cohort(folder, 1, Settings(seed=2, matrix=96, slice_mm=(20, 20)), num_processes=1))
    (path,) = folder.glob("dataset/*_fixed/*/*/*.nii.gz")
    return path


@pytest.fixture(scope="module")
def known(small_bundle, ct):
    return record(str(small_bundle), "random", ct)


def failing(lines):
    return [line.stage for line in lines if not line.is_fine]


def test_the_same_encoder_passes_and_bfloat16_within_its_own_tolerance(small_bundle, ct, known):
    opened = load_encoder(str(small_bundle), "random", "cpu")
    for dtype in ("float32", "bfloat16"):
        lines = list(verify(known, opened, ct, dtype))
        assert [line.stage for line in lines] == ["read", "crop", "normalise", "network"]
        assert not failing(lines)
    exact = known | {"tolerance": known["tolerance"] | {"network": {"cpu bfloat16": 1e-6}}}
    assert failing(verify(exact, opened, ct, "bfloat16")) == ["network"]


def test_each_stage_finds_its_own_mistake(small_bundle, ct, known):
    name = str(small_bundle)
    for option in ({"slice_axes": "xy"}, {"hu_window": "dale_ct_0_l"}):
        lines = verify(known, load_encoder(name, "random", "cpu", **option), ct)
        assert failing(lines) == ["normalise", "network"]
    opened = load_encoder(name, "random", "cpu")
    outputs = outputs_of(opened, golden._read(ct, 0), "float32")
    for hu in (outputs["hu"].swapaxes(1, 2), outputs["hu"][::-1].copy(), outputs["hu"] + 1):
        assert failing(compare(known, stages_of({"hu": hu}), "cpu float32")) == ["read"]
    shifted = stages_of(outputs | {"box": (1, *outputs["box"][1:])})
    assert failing(compare(known, shifted, "cpu float32")) == ["crop"]
    network = {**opened.network.state_dict(), "norm.bias": torch.full_like(opened.network.norm.bias, 0.1)}
    opened.network.load_state_dict(network)
    try:
        (line,) = [line for line in verify(known, opened, ct) if not line.is_fine]
    finally:
        opened.network.norm.bias.data.zero_()  # shared by all who load it
    assert line.stage == "network"
    assert "recorded [" in line.text


def test_other_weights_are_named(small_bundle, known, ct):
    outputs = outputs_of(load_encoder(str(small_bundle), "random", "cpu"), golden._read(ct, 0), "float32")
    found = stages_of({"tokens": outputs["tokens"] * 1.1})
    (line,) = compare(known, found, "cpu float32", "sha256:0123456789abcdef")
    assert not line.is_fine
    assert f"sha256:0123456789abcdef, recorded {known['encoder_id']}" in line.text


def test_numbers_are_those_of_a_loop(known, ct):
    rng = np.random.default_rng(0)
    images, tokens = rng.normal(size=(4, 1, 5, 7)), rng.normal(size=(4, 10))
    stages = stages_of({"images": images, "tokens": torch.from_numpy(tokens)})
    planes = images[:, 0]
    expected = [
        np.mean([planes[z, y, x] for z in zs for y in ys for x in xs])
        for zs in ((0, 1), (2, 3))
        for ys in ((0, 1, 2), (3, 4))
        for xs in ((0, 1, 2, 3), (4, 5, 6))
    ]
    assert stages["normalise"]["octants"] == pytest.approx(expected, rel=1e-5)
    assert stages["normalise"]["mean_std"] == pytest.approx([planes.mean(), planes.std()], rel=1e-5)
    cosines = [
        float(a @ b / np.sqrt((a @ a) * (b @ b))) for a, b in ((tokens[0], tokens[1]), (tokens[2], tokens[3]))
    ]
    assert stages["network"]["cosine_to_next"] == pytest.approx(cosines, rel=1e-5)
    assert stages["network"]["first_3"] == pytest.approx(tokens[3, :8], rel=1e-5)
    broken = stages_of({"tokens": np.full((6, 24), np.nan)})
    assert failing(compare(known, broken, "cpu float32")) == ["network"]


def test_an_encoder_of_volumes_has_no_crop(small_volume_bundle, ct):
    known = record(str(small_volume_bundle), "random", ct)
    assert list(known["stages"]) == ["read", "normalise", "network"]
    opened = load_encoder(str(small_volume_bundle), "random", "cpu")
    assert not failing(verify(known, opened, ct))
    flipped = stages_of({"images": opened.image(golden._read(ct, 0).hu, (1, 1, 20)).flip(2)})
    assert failing(compare(known, flipped, "cpu float32")) == ["normalise"]


def test_another_ct_is_refused(small_bundle, ct, known, ct_folder):
    opened = load_encoder(str(small_bundle), "random", "cpu")
    with pytest.raises(ValueError, match=rf"ct must be given: '{ct.name}'"):
        list(verify(known, opened))
    with pytest.raises(ValueError, match=r"ct must be the recorded .* got .*a\.nii\.gz"):
        list(verify(known, opened, ct_folder / "a.nii.gz"))
    with pytest.raises(ValueError, match="ct must hold one CT, got 2"):
        record(str(small_bundle), "random", ct_folder)
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, got 'float16'"):
        list(verify(known, opened, ct, "float16"))
