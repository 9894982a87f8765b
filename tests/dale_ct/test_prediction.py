import pytest

from dale_ct import predict


def test_a_probe_that_is_not_there_is_named(small_bundle, ct_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no_probe"):
        predict(ct_folder, tmp_path / "no_probe", tmp_path / "out", str(small_bundle), weights="random")


def test_an_unknown_encoder_is_named(ct_folder, tmp_path):
    with pytest.raises(ValueError, match=r"dale_ct_2x.*dale_ct_2s"):
        predict(ct_folder, tmp_path, tmp_path / "out", "dale_ct_2x")
