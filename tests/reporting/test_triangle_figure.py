import numpy as np
import pytest
import xarray as xr

from stagewise.dynamics.events import Event
from stagewise.dynamics.stages import Transition
from stagewise.reporting import style
from stagewise.reporting.triangle_figure import time_triangle

BINS, ASKED = [0, 5, 20, 100], [5, 20, 100]


@pytest.fixture
def influence():
    """Of two groups on one query; that of "b" is masked where it was trained on first and asked last."""
    after = np.array(BINS[:-1])[:, None] >= np.array(ASKED)
    value = np.where(after, 0.0, np.arange(9.0).reshape(3, 3) - 3)[..., None, None] * np.array([[1.0], [-2.0]])
    value[0, 2, 1] = np.nan
    coords = {"trained": BINS[:-1], "asked": ASKED, "train": ["a", "b"], "query": ["q"]}
    dims = ("trained", "asked", "train", "query")
    return xr.Dataset({"value": (dims, value)}, {**coords, "trained_stop": ("trained", BINS[1:])})


def test_cells_are_the_numbers_where_the_question_comes_later_and_nothing_elsewhere(influence):
    ax, _ = time_triangle(influence, "a", "q").axes
    drawn = ax.collections[0].get_array().reshape(3, 3)
    np.testing.assert_array_equal(drawn.filled(np.nan), [[-3, np.nan, np.nan], [-2, 1, np.nan], [-1, 2, 5]])
    corners = ax.collections[0].get_coordinates()
    np.testing.assert_array_equal(corners[0, :, 0], BINS)
    np.testing.assert_array_equal(corners[:, 0, 1], [0, *ASKED])
    assert len(ax.collections) == 1


def test_masked_cells_are_hatched_and_have_no_colour_of_influence(influence):
    ax, _ = time_triangle(influence, "b", "q").axes
    mesh, hatched = ax.collections
    assert mesh.get_array().reshape(3, 3).mask[2, 0]
    assert hatched.get_hatch()
    (cell,) = [path.get_extents().extents for path in hatched.get_paths()]
    np.testing.assert_array_equal(cell, [0, 20, 5, 100])


def test_helpful_is_blue_harmful_red_and_both_reach_the_same_magnitude(influence):
    mesh = time_triangle(influence, "a", "q").axes[0].collections[0]
    assert mesh.cmap is style.DIVERGING
    assert (mesh.norm.vmin, mesh.norm.vmax) == (-5, 5)
    blue, red = mesh.to_rgba([-3.0]), mesh.to_rgba([5.0])
    assert blue[0, 2] > blue[0, 0]
    assert red[0, 0] > red[0, 2]


def test_both_axes_have_one_scale_and_stages_are_lines_on_both(influence):
    stages = [
        Transition("circuit forms", "rise", 10.0, 8.0, 12.0, {}),
        Event("flip", "a", "q", 50.0, 40.0, 60.0, {"sign": 1.0}),
    ]
    ax, _ = time_triangle(influence, "a", "q", stages).axes
    assert ax.get_xlim() == ax.get_ylim()
    np.testing.assert_array_equal(ax.get_xticks(), ax.get_yticks())
    lines = [line.get_xydata().tolist() for line in ax.get_lines()]
    for step in (10.0, 50.0):
        assert sum([step, step] in line for line in lines) == 2
    assert [text.get_text() for text in ax.texts] == ["circuit forms", "flip"]


def test_a_triangle_of_nothing_but_masked_cells_is_drawn(influence):
    influence["value"][:] = np.nan
    ax, _ = time_triangle(influence, "a", "q").axes
    assert len(ax.collections[1].get_paths()) == 6
