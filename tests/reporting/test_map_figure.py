import numpy as np
import pytest
import xarray as xr

from stagewise.dynamics.kernel_map import influence_map
from stagewise.reporting import style
from stagewise.reporting.contents import sections
from stagewise.reporting.map_figure import sample_map
from stagewise.reporting.page import Plate

LABELS = list("babac")


@pytest.fixture
def positions():
    every = np.random.default_rng(0).normal(size=(2, 8, 5, 5)) / 10 + np.eye(5)
    every = (every + every.swapaxes(-1, -2)) / 2
    dims = ("step", "replicate", "sample", "other")
    kernel = xr.Dataset({"value": (("step", *dims[2:]), every.mean(1)), "replicates": (dims, every)})
    return influence_map(kernel.assign_coords(step=[3, 40], label=("sample", LABELS)))


def dots(ax, name):
    (line,) = [line for line in ax.lines if line.get_label() == name]
    return line


def test_every_panel_has_the_dots_of_every_label_in_its_colour_and_the_share_of_the_plane(positions):
    axes = [ax for ax in sample_map(positions).axes if ax.lines]
    assert len(axes) == 2
    for k, ax in enumerate(axes):
        at = positions.isel(step=k)
        for name in "abc":
            rows = [n for n, label in enumerate(LABELS) if label == name]
            np.testing.assert_array_equal(dots(ax, name).get_xydata(), at["value"].values[rows])
            assert dots(ax, name).get_color() == style.colours(list("abc"))[name]
        assert f": {float(at['share'].sum()):.0%}" in ax.get_title(loc="left")
        (error,) = ax.containers
        (across,) = error.lines[2][0].get_segments()
        assert np.ptp(across[:, 0]) == pytest.approx(2 * float(at["stderr"].isel(axis=0).median()))


def test_without_replicates_there_is_no_cross_and_numbers_are_in_their_order(positions):
    numbered = positions.drop_vars("stderr").assign_coords(label=("sample", ["10", "9", "10", "9", "9"]))
    figure = sample_map(numbered)
    assert not figure.axes[0].containers
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["9", "10"]


def test_a_report_shows_the_map_where_there_is_one_and_no_section_where_there_is_none(make, positions):
    with_map = {section.title: section for section in sections(make(positions=positions))}
    (plate,) = with_map["Samples that are alike to the model"].parts
    assert isinstance(plate, Plate)
    assert plate.caption.startswith("The 5 training samples")
    assert "Samples that are alike to the model" not in {section.title for section in sections(make())}


def test_positions_without_labels_are_refused(make, positions):
    with pytest.raises(ValueError, match="positions must hold 'label'"):
        make(positions=positions.drop_vars("label"))
