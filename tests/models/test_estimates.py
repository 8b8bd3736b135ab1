import dataclasses

import numpy as np

from nanobeam_bluesky.models import Estimates, Flag


def test_every_field_has_a_unit_in_order():
    assert list(Estimates.UNITS) == [field.name for field in dataclasses.fields(Estimates)]


def test_what_no_estimator_gave_is_nan():
    points = Estimates.empty(3, Flag.FRAME_MISSING)
    assert len(points) == 3
    assert points.flags.tolist() == [32, 32, 32]
    values = [v for name, v in points.columns().items() if name != "flags"]
    assert np.isnan(values).all()


def test_selected_parts_concatenate_to_the_whole():
    points = dataclasses.replace(
        Estimates.empty(5), strain=np.arange(5.0), flags=np.arange(5, dtype=np.int64)
    )
    parts = [points.select(slice(0, 2)), points.select(np.array([2, 3, 4]))]
    whole = Estimates.concatenate(parts)
    for name, values in points.columns().items():
        np.testing.assert_array_equal(whole.columns()[name], values)


def test_put_replaces_only_the_points_of_the_mask():
    points = dataclasses.replace(Estimates.empty(3), strain=np.arange(3.0))
    mask = np.array([False, True, False])
    changed = points.put(mask, Estimates.empty(1, Flag.MISFIT))
    np.testing.assert_array_equal(changed.strain, [0, np.nan, 2])
    assert changed.flags.tolist() == [0, 8, 0]
    assert points.strain.tolist() == [0, 1, 2]
