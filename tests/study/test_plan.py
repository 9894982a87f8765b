from study.plan import ABLATIONS, CEILING, DENSE_ENCODERS, FLOORS, SIZES, TABLE_ENCODERS, TRAINED


def test_no_encoder_is_two_things_and_the_ceiling_has_no_patches():
    groups = (FLOORS, TRAINED, ABLATIONS, (CEILING,))
    names = [name for group in groups for name in group]
    assert len(set(names)) == len(names)
    assert {*TABLE_ENCODERS} - {*DENSE_ENCODERS} == {CEILING}


def test_strategies_of_table_vi_are_at_the_sizes_of_the_views():
    assert SIZES["small"].grid == 6
    assert SIZES["small"].strategies == [
        *("raw_48", "cropped_48", "raw_96", "cropped_96", "raw_full", "cropped_full", "tiled_5cut"),
    ]
    assert SIZES["gpu"].grid == 8
