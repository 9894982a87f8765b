"""The picture of the first batch is drawn once."""

import matplotlib.image
import numpy as np
from ignite.engine import Engine

from common.handlers.view_sheet import ViewSheet
from common.transforms.hounsfield import HU_WINDOWS
from common.transforms.multi_crop import RandSlabMultiCrop


def test_the_first_batch_is_drawn_and_later_ones_are_not(slabs_of, tmp_path):
    slabs = slabs_of(
        [{"hu": np.full((3, 40, 44), 100, np.int16)}], RandSlabMultiCrop(32, 16, patch_size_px=8)
    )
    batch = slabs.collate([slabs[0]])
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
