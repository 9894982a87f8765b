"""The picture of the first batch is drawn once."""

import matplotlib.image
import numpy as np
from ignite.engine import Engine
from torch.utils.data import default_collate

from common.handlers.view_sheet import ViewSheet
from common.transforms.hounsfield import HU_WINDOWS
from common.transforms.multi_crop import RandSlabMultiCrop


def test_the_first_batch_is_drawn_and_later_ones_are_not(tmp_path):
    multi_crop = RandSlabMultiCrop(32, 16, patch_size_px=8)
    plan = multi_crop.draw(np.random.default_rng(0), slab_len=3, shape=(40, 44), ts=None, rex=None)
    views = multi_crop.render(plan, lambda z: np.full((40, 44), 100 * z, np.int16), ts=None, rex=None)
    sample = {**views, **plan._asdict(), "has_ts": False, "has_rex": False, "first_slice": 4, "position": 0}
    batch = default_collate([sample | {"volume": "train_1_a_1", "spacing_mm": np.ones(3, np.float32)}])
    path = tmp_path / "run" / "views.png"
    written = []

    def step(engine, _):
        written.append(path.is_file() and path.stat().st_mtime_ns)
        engine.state.batch = batch

    engine = Engine(step)
    ViewSheet(path, HU_WINDOWS["ct_rate"]).attach(engine)
    engine.run([0, 1, 2])
    assert written[0] is False
    assert written[1] == written[2]
    assert matplotlib.image.imread(path).std() > 0
