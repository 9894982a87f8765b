import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from common.metrics.linear_readout import moments, r_squared, read_out, ridge


def data(seed: int = 0, samples: int = 83) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, 7)) @ rng.standard_normal((7, 7)) + 3
    return x, x @ rng.standard_normal((7, 2)) + rng.standard_normal((samples, 2)) - 5


@pytest.mark.parametrize("penalty", [0.001, 0.3, 10.0])
def test_ridge_from_moments_of_parts_is_sklearns(penalty: float) -> None:
    x, y = data()
    fit = ridge(moments(x[:20], y[:20]) + moments(x[20:], y[20:]), [penalty])[0]
    scale = np.var(x, axis=0).mean()
    expected = Ridge(alpha=penalty * scale * len(x)).fit(x, y)
    np.testing.assert_allclose(read_out(fit, x), expected.predict(x), rtol=1e-9, atol=1e-9)
    score = r2_score(y, expected.predict(x), multioutput="raw_values")
    np.testing.assert_allclose(r_squared(read_out(fit, x), y), score)


def test_features_that_do_not_vary_do_no_harm() -> None:
    x, y = data()
    wide = np.concatenate([x, np.full((len(x), 3), 7.0)], axis=1)
    with_them, without = (read_out(ridge(moments(z, y), [0.0])[0], z) for z in (wide, x))
    np.testing.assert_allclose(with_them, without, atol=1e-7)


def test_a_constant_target_has_no_share_explained_and_shapes_must_agree() -> None:
    assert np.isnan(r_squared([[1.0], [1.0]], [[1.0], [1.0]])).all()
    with pytest.raises(ValueError, match=r"embeddings and targets .* got \(4, 2\) and \(3, 1\)"):
        moments(np.zeros((4, 2)), np.zeros((3, 1)))
