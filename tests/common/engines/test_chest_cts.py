"""What is no chest CT is refused, the rest remembered; what people are told is what was found."""

import pytest

from common.ct.rejection import Doubt, RejectedError
from common.embeddings.work import CTSlices, CTSource
from common.engines.chest_cts import NOT_CHEST_CT, ReadCT, read_chest_ct
from tests.common.engines.conftest import trunk


def test_a_volume_is_refused_with_its_reasons_unless_forced() -> None:
    hu, serious, slight = trunk(0, 3), Doubt("back", "it is turned", True), Doubt("heart", "mirrored?", False)
    sound = CTSource("a", lambda: CTSlices(hu, (1, 1, 1), "sum", [slight], [2]))
    turned = CTSource("b", lambda: CTSlices(hu, (1, 1, 1), "", [slight, serious]))
    cts: dict[str, ReadCT] = {}
    assert read_chest_ct(sound, False, cts).hu is hu
    with pytest.raises(RejectedError, match=f"{NOT_CHEST_CT}: it is turned$"):
        read_chest_ct(turned, False, cts)
    assert list(cts) == ["a"]
    assert cts["a"].sha256 == "sum"
    assert cts["a"].has_image.tolist() == [True, True, False]
    read_chest_ct(turned, True, cts)
    assert cts["b"].notes == ["This does not look like a chest CT: it is turned.", "Please check: mirrored?."]
