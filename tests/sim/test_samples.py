import numpy as np
import pytest
from scipy.spatial import cKDTree

from nanobeam_bluesky.sim import Phantom, phantom

# what one pattern of 6000 counts resolves (the Cramér–Rao bound with a blurred pupil)
SIGMA = np.array([1e-4, 1.5e-4, 4.5e-4])


def values(sample: Phantom) -> np.ndarray:
    """(rows, columns, 3) in units of what can be resolved."""
    return np.stack([sample.strain, sample.omega, sample.chi], axis=-1) / SIGMA


def test_figure3_has_the_strain_wave_of_the_paper() -> None:
    strain = phantom("figure3", (41, 41)).strain  # 0.05 per step, the wave is 0.4 long
    assert strain[20, 20] == pytest.approx(0, abs=1e-15)
    assert strain[20, 22] == pytest.approx(5e-4)
    assert strain[22, 20] == pytest.approx(5e-4)
    assert strain[18, 20] == pytest.approx(-5e-4)
    np.testing.assert_allclose(strain[:, :-8], strain[:, 8:], atol=1e-15)


def test_figure3_has_the_tilt_steps_of_the_paper() -> None:
    sample = phantom("figure3", (41, 41))
    # in the middle the second sigmoid is 1 / (1 + exp(0.25 / 0.07)), the others are 0
    assert sample.omega[20, 20] == pytest.approx(0.005 - 0.01 * 0.0273468, abs=1e-8)
    assert sample.omega[20, 40] == pytest.approx(0.005 - 0.01 * 0.9726532, abs=1e-5)
    # the step is tilted: at y = -0.75 it is past, at y = 0.75 not yet there
    assert sample.omega[[5, 35], 20] == pytest.approx([-0.005, 0.005], abs=2e-4)
    assert sample.omega.min() == pytest.approx(-0.005, abs=1e-4)
    assert sample.omega.max() == pytest.approx(0.005, abs=1e-4)
    np.testing.assert_allclose(sample.chi, 1.5 * sample.omega, atol=1e-12)


def test_film_has_domains_a_crack_and_a_region_without_film() -> None:
    sample = phantom("film", (48, 64))
    assert 0.02 < (sample.intensity == 0).mean() < 0.2
    dark = (sample.intensity > 0) & (sample.intensity < 0.3)
    assert dark.any(axis=1).all()  # the crack runs through every row
    bright = sample.intensity > 0.9
    steps = np.abs(np.diff(sample.chi, axis=1))[bright[:, 1:] & bright[:, :-1]]
    assert np.median(steps) < 1e-3 < 1e-2 < steps.max()


def test_film_depends_on_its_seed_alone() -> None:
    first, again, other = (phantom("film", (9, 9), seed=s).strain for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("shape", [(16, 16), (9, 30), (64, 64)])
def test_no_two_points_of_unique_look_alike(shape: tuple[int, int]) -> None:
    points = values(phantom("unique", shape)).reshape(-1, 3)
    for column in points.T:
        assert len(np.unique(column)) == len(column)
    nearest = cKDTree(points).query(points, k=2)[0][:, 1]
    assert nearest.min() > 5


def test_unique_shows_any_wrong_arrangement_of_its_points() -> None:
    points = values(phantom("unique", (16, 16)))
    odd_rows_mirrored = points.copy()
    odd_rows_mirrored[1::2] = points[1::2, ::-1]
    mirrored_pattern = points[:, ::-1] * [1, 1, -1]  # row and pattern mirrored cancel in χ
    for name, wrong in {
        "rows reversed": points[::-1],
        "columns reversed": points[:, ::-1],
        "transposed": points.swapaxes(0, 1),
        "one point late": np.roll(points.reshape(-1, 3), 1, axis=0).reshape(points.shape),
        "one row late": np.roll(points, 1, axis=0),
        "mirrored twice": mirrored_pattern,
    }.items():
        seen = np.linalg.norm(wrong - points, axis=-1) > 5
        assert seen.mean() > 0.9, name
    seen = np.linalg.norm(odd_rows_mirrored - points, axis=-1) > 5
    assert seen[1::2].mean() > 0.9


def test_a_snaked_scan_visits_odd_rows_backwards() -> None:
    sample = phantom("unique", (3, 4))
    order = sample.in_scan_order(snake=True)
    assert order["row"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert order["col"].tolist() == [0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3]
    assert order["strain"][4] == sample.strain[1, 3]
    assert order["x"][4] == sample.x[3]
    assert order["y"][4] == sample.y[1]
    straight = sample.in_scan_order(snake=False)
    np.testing.assert_array_equal(straight["chi"].reshape(3, 4), sample.chi)


def test_a_phantom_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="read-only"):
        phantom("figure3", (3, 3)).strain[0, 0] = 1


def test_maps_of_different_shapes_are_refused() -> None:
    good = np.zeros((3, 4))
    with pytest.raises(ValueError, match=r"chi has shape \(4, 3\), must have \(3, 4\)"):
        Phantom("odd", good, good, good.T, good, np.arange(3.0), np.arange(4.0))


def test_unknown_names_and_empty_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no phantom 'film2'; choose one of figure3, film"):
        phantom("film2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one row"):
        phantom("film", (0, 4))
