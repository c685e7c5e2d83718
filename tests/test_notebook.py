"""What a notebook shows of what a user holds: tables of escaped text, and of a dataset its figure, or a reason."""

import json
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import stagewise as sw
from stagewise.notebook import listed
from stagewise.results import Results

DIMS = ("step", "train", "query")


class Texts(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, _attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def losses(model, batch):
    return (model(batch[0])[:, 0] - batch[1]) ** 2


@pytest.fixture
def task():
    x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
    labels = ["<b>one</b>", "<b>one</b>", "two & more", None]
    return sw.Task(nn.Linear(4, 1), losses, train=(x, y), queries={"<i>": (x, y)}, train_groups=labels)


@pytest.fixture
def influence():
    """Of two groups on two queries; group "a" turns from helpful to harmful on "p", between steps 10 and 100."""
    value = 1e-3 * np.random.default_rng(0).normal(size=(4, 2, 2))
    value[:, 0, 0] = [-3.0, -2.0, 1.0, 3.0]
    data = {"value": (DIMS, value), "stderr": (DIMS, np.full_like(value, 0.1))}
    coords = {"step": [1, 10, 100, 1000], "train": ["a", "b"], "query": ["p", "q"]}
    return xr.Dataset(data, coords, {"omitted": json.dumps({"30": "not converged"})})


def drawn(figure, label):
    return [artist for ax in figure.axes for artist in ax.get_children() if artist.get_label() == label]


def test_importing_stagewise_gives_datasets_the_accessor_without_matplotlib_or_torch():
    code = "import sys, stagewise, xarray; xarray.Dataset().sw; print({'matplotlib', 'torch'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


def test_labels_that_look_like_tags_are_shown_as_they_are(task):
    page = Texts(task._repr_html_())
    assert set(page.tags) == {"table", "caption", "b", "tbody", "tr", "th", "td"}
    assert page.tags.count("b") == 1  # the caption's own
    assert "<b>one</b>, two & more" in page.texts
    assert "queries['<i>']" in page.texts


def test_the_table_of_a_task_says_what_its_text_says(task):
    texts = Texts(task._repr_html_()).texts
    for line in repr(task).split("\n")[1:-1]:
        name, what = line.strip().split(": ", 1)
        assert name in texts
        assert what in texts


def test_a_trajectory_in_memory_is_shown_without_its_weights():
    run = sw.Trajectory.from_checkpoints(sw.Checkpoint(k, nn.Linear(4, 1).state_dict()) for k in range(20))
    assert "tensor" not in repr(run)
    assert "0, 1, 2, 3, 4, 5, ... 19 (20)" in Texts(run._repr_html_()).texts


def test_few_items_are_all_listed_and_of_many_the_last_is_still_named():
    assert listed(range(8)) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert listed(range(9)) == "0, 1, 2, 3, 4, 5, ... 8 (9)"
    assert listed([]) == "none"


def test_a_run_folder_is_shown_with_its_steps(task, tmp_path):
    start = sw.Checkpoint(7, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
    run = sw.Trajectory.from_checkpoints([start])
    store = sw.sample(task, run, sw.LocalPosterior(window=10), out=tmp_path / "a", chains=2, draws=8)
    texts = Texts(store._repr_html_()).texts
    assert texts[texts.index("steps") + 1] == "7"
    assert texts[texts.index("folder") + 1] == str(tmp_path / "a")


def test_results_are_shown_with_the_number_of_every_verdict(influence):
    known = xr.Dataset(
        {"verdict": ("step", ["ok", "ok", "not converged"]), "advice": ("step", ["", "", "more"])},
        {"step": [1, 10, 100]},
    )
    steps = {"step": [1, 10, 100, 1000], "query": ["p", "q"]}
    means = xr.Dataset({"train": ("step", np.ones(4)), "queries": (("step", "query"), np.ones((4, 2)))}, steps)
    shown = Texts(Results("<title>", means, known, influence, notes=["a & b"])._repr_html_())
    assert "ok: 2, not converged: 1" in shown.texts
    assert {"<title>", "a & b"} <= set(shown.texts)
    assert shown.texts[shown.texts.index("influence") + 1] == "at 4 checkpoints"


def test_influence_is_drawn_as_curves_with_its_flip_and_what_was_left_out_is_shaded(influence):
    figure = influence.sw.plot()
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["on “p”", "on “q”"]
    (flip,) = drawn(figure, "flip")
    assert 10 < flip.get_xdata()[0] < 100
    assert len(drawn(figure, "untrusted")) == 2


def test_one_query_is_one_panel_with_the_events_that_all_curves_have_together(influence):
    figure = influence.sw.plot(query="q")
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["on “q”"]
    assert not drawn(figure, "flip")
    with pytest.raises(ValueError, match="no query 'z' among p, q"):
        influence.sw.plot(query="z")


def test_events_of_a_curve_do_not_depend_on_which_others_are_drawn(influence):
    # 2.7 standard errors are a sign for one curve at four steps and none for four: a choice must not make it one.
    influence["value"].loc[{"train": "b", "query": "q"}] = [-0.27, -0.27, 0.27, 0.27]
    everything, one = influence.sw.plot(), influence.sw.plot(train="b", query="q")
    assert len(sw.events(influence.sel(train=["b"], query=["q"]))) > 0
    assert len(drawn(everything, "flip")) == 1
    assert not drawn(one, "flip")


def test_correlations_are_not_called_nats(influence):
    influence.attrs["kind"] = "correlation"
    assert "nats" not in influence.sw.plot().get_supylabel()
    assert "correlation" in influence.sw.plot().get_supylabel()


def test_influence_in_two_times_is_the_triangle_of_the_largest_pair_of_different_labels_or_of_the_one_that_is_asked():
    value = np.zeros((2, 2, 2, 2))
    value[0, :, 0, 0] = 5.0  # of a group on itself
    value[0, :, 1, 0] = -1.0
    coords = {"trained": [0, 5], "asked": [5, 20], "train": ["a", "b"], "query": ["a", "b"]}
    data = xr.Dataset(
        {"value": (("trained", "asked", "train", "query"), value)}, {**coords, "trained_stop": ("trained", [5, 20])}
    )
    assert data.sw.plot().axes[0].get_title(loc="left") == "“b” on “a”"
    assert data.transpose().sw.plot().axes[0].get_title(loc="left") == "“b” on “a”"
    assert data.sw.plot(train="a", query="a").axes[0].get_title(loc="left") == "“a” on “a”"


def test_diagnostics_are_drawn_with_the_checkpoints_shaded_that_are_not_answered():
    data = {"verdict": ["ok", "beyond first order", "not converged"], "advice": ["", "", "more"], "chains_ok": [4] * 3}
    data |= {"rhat": [1.0, 1.01, 1.3], "ess_bulk": [90.0, 80.0, 20.0]}
    figure = xr.Dataset({name: ("step", list(of)) for name, of in data.items()}, {"step": [1, 10, 100]}).sw.plot()
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["R-hat", "effective draws per chain"]
    assert len(drawn(figure, "untrusted")) == 2


@pytest.mark.parametrize("labels", [None, list("aab")])
def test_a_loss_kernel_is_drawn_as_the_map_of_its_samples_with_labels_or_without(labels):
    kernel = xr.Dataset({"value": (("step", "sample", "other"), np.eye(3)[None])}, {"step": [4]})
    kernel = kernel if labels is None else kernel.assign_coords(label=("sample", labels))
    figures = [kernel.sw.plot(), sw.influence_map(kernel).sw.plot()]
    for figure in figures:
        dots = [line for ax in figure.axes for line in ax.lines if line.get_marker() == "."]
        assert sum(len(line.get_xdata()) for line in dots) == 3
    with pytest.raises(ValueError, match="query can be chosen of influence only"):
        kernel.sw.plot(query="a")


def test_what_cannot_be_drawn_is_named_with_what_could_be(influence):
    with pytest.raises(ValueError, match=r"this holds losses \('step',\)"):
        xr.Dataset({"losses": ("step", [1.0])}).sw.plot()
    with pytest.raises(ValueError, match="holds nothing"):
        xr.Dataset().sw.plot()
    effects = influence.rename(value="effect")
    with pytest.raises(ValueError, match=r"sw.measured_influence\(data\).sw.plot\(\)"):
        effects.sw.plot()
    with pytest.raises(ValueError, match="expected 2 axes, got 1"):
        xr.Dataset({"value": (("step", "sample", "axis"), np.ones((1, 3, 1)))}).sw.plot()


def test_a_notebook_shows_the_figure_without_pyplot(influence):
    svg = influence.sw.plot()._repr_svg_()
    assert svg.lstrip().startswith("<?xml")
    assert "on “p”" in svg
