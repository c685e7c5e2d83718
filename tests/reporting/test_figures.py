from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure

from stagewise.reporting import check_figures, figures, style
from stagewise.reporting.exemplar_figure import exemplar_grid, extremes
from stagewise.reporting.files import write_figure
from stagewise.results import ARBITRARY
from stagewise.traces import verdicts


@pytest.fixture(scope="module")
def small(make):
    return make(labels=list("0123"))


@pytest.fixture(scope="module")
def least(make):
    """One step, one pair, no events."""
    return make(steps=[30], labels=["a"], events=[])


def lines(ax, label=None):
    return [line for line in ax.get_lines() if label is None or line.get_label() == label]


def drawn(ax, values):
    """Whether some line of the panel has exactly these values."""
    return any(
        np.shape(line.get_ydata()) == np.shape(values) and np.allclose(line.get_ydata(), values)
        for line in ax.get_lines()
    )


def spans(ax):
    edges = [
        patch.get_extents().transformed(ax.transData.inverted())
        for patch in ax.patches
        if patch.get_label() == "untrusted"
    ]
    return [(box.x0, box.x1) for box in edges]


def test_losses_are_drawn_as_they_are_and_untrusted_checkpoints_shaded(small):
    (ax,) = figures.loss_curves(small.losses, small.trusted).axes
    assert drawn(ax, small.losses["train"])
    assert all(drawn(ax, small.losses["queries"].sel(query=query)) for query in "0123")
    for step, trusted in zip(small.trusted["step"].values, small.trusted.values, strict=True):
        assert any(low < step < high for low, high in spans(ax)) != trusted
    names = {text.get_text(): text for text in ax.texts}
    assert set(names) == {"0", "1", "2", "3", "training set"}


def above(figure):
    """What stands above the axes of steps of a figure: what, by where it is drawn."""
    figure.draw_without_rendering()
    told = []
    for ax in figure.axes:
        if ax.get_xlabel() == "sum of learning rates":
            texts = [text.get_text() for text in ax.get_xticklabels()]
            below = next(other for other in figure.axes if other is not ax and other.bbox.bounds == ax.bbox.bounds)
            places = below.transData.inverted().transform(ax.transData.transform([(t, 0) for t in ax.get_xticks()]))
            told.append(dict(zip(places[:, 0].tolist(), texts, strict=True)))
    return told


def test_sums_of_changing_learning_rates_stand_above_their_steps_and_constant_ones_nowhere(small):
    steps = small.losses["step"].values
    constant = small.losses.assign(rates=("step", 0.1 * (steps - steps[0])))
    changing = small.losses.assign(rates=("step", (steps - steps[0]) ** 2 / 1000))
    for losses in (small.losses, constant):
        assert not above(figures.loss_curves(losses))
    (told,) = above(figures.loss_curves(changing))
    assert len(told) > 3
    for step, text in told.items():
        assert float(text.replace(",", "")) == pytest.approx(
            np.interp(step, steps, changing["rates"]), rel=0.06, abs=1e-6
        )
    assert len(above(figures.influence_curves(small.influence, losses=changing))) == 2
    assert not above(figures.influence_curves(small.influence, losses=constant))


def test_names_at_line_ends_do_not_overlap_and_keep_their_order(make):
    results = make(labels=[f"class {k}" for k in range(12)])
    figure = figures.loss_curves(results.losses)
    (ax,) = figure.axes
    boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
    assert len(boxes) == 13
    assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes))
    order = [text.get_text() for text in sorted(ax.texts, key=lambda text: text.get_position()[1])]
    final = {query: results.losses["queries"].sel(query=query).values[-1] for query in results.losses["query"].values}
    final["training set"] = results.losses["train"].values[-1]
    assert order == sorted(final, key=final.get)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 900, [0, 1, 3, 10, 30, 100, 300]),
        (0, 0, [0]),
        (10, 900, [10, 20, 50, 100, 200, 500]),
        (1010, 1090, [1010, 1090]),
        (0, 143000, [0, 1, 10, 100, 1000, 10000, 100000]),
    ],
)
def test_ticks_are_round_steps_and_few(low, high, expected):
    assert style.step_ticks(low, high) == expected


def test_influence_panels_show_the_strongest_groups_with_bands_and_events(small):
    figure = figures.influence_curves(small.influence, small.events, small.trusted)
    assert [ax.get_title(loc="left") for ax in figure.axes] == [f"on “{query}”" for query in "0123"]
    for ax, query in zip(figure.axes, "0123", strict=True):
        scale = 1e-3 if "10⁻³" in figure.get_supylabel() else 1
        for train in set("0123") - {query}:
            assert drawn(ax, small.influence["value"].sel(train=train, query=query) / scale)
        assert not drawn(ax, small.influence["value"].sel(train=query, query=query) / scale)
        assert len(ax.collections) == 3
        for kind in ("flip", "helpful peak", "harmful peak"):
            there = [e for e in small.events if (e.kind, e.query) == (kind, query) and e.train != query]
            there = [event for event in there if not event.detail.get("at_edge")]
            assert len(lines(ax, kind)) == len(there)
    assert "negative = helpful" in figure.get_supylabel()


def test_many_queries_are_cut_to_those_influenced_most(make):
    influence = make(labels=[str(k) for k in range(14)]).influence
    influence["value"][:, :2, 7] = 1.0
    shown = figures.strongest_queries(influence)
    assert len(shown) == 12
    assert "7" in shown
    assert shown == sorted(shown, key=int)


def test_matrices_share_a_scale_that_pairs_of_different_labels_set(small):
    influence = small.influence.copy(deep=True)
    influence["value"].values[:, range(4), range(4)] = -1.0
    steps = [30, 90]
    figure = figures.influence_heatmaps(influence, steps)
    for ax, step in zip(figure.axes, steps, strict=False):
        (image,) = ax.images
        limit = np.abs(influence["value"].sel(step=steps).values[:, ~np.eye(4, dtype=bool)]).max() / 1e-3
        np.testing.assert_allclose(image.get_clim(), (-limit, limit))
        np.testing.assert_allclose(image.get_array(), influence["value"].sel(step=step) / 1e-3)
        (dots,) = lines(ax, "noise")
        noisy = np.abs(influence["value"]) < 2 * influence["stderr"]
        assert set(zip(dots.get_ydata(), dots.get_xdata(), strict=True)) == set(
            zip(*np.nonzero(noisy.sel(step=step).values), strict=True)
        )


def test_below_zero_is_blue_and_above_is_red():
    red, _, blue, _ = style.DIVERGING(0.1)
    assert blue > red + 0.2
    red, _, blue, _ = style.DIVERGING(0.9)
    assert red > blue + 0.2


def test_eventful_steps_are_those_nearest_to_most_events(small):
    steps = small.influence["step"].values
    flips = [event for event in small.events if event.kind == "flip"]
    flip = flips[0].__class__("flip", "0", "1", 91.0, 90, 130, {"sign": 1.0})
    assert figures.eventful_steps(small.influence, [flip] * 3, most=1) == [90]
    assert figures.eventful_steps(small.influence, []) == [20, 65, 190, 900]
    assert set(figures.eventful_steps(small.influence, small.events)) <= set(steps.tolist())


def test_scatter_has_the_data_the_identity_and_the_scores(small):
    scores = small.agreements["BIF"]
    figure = check_figures.predicted_against_measured(small.predicted, small.measured, scores, [45, 90])
    pairs = ~np.eye(4, dtype=bool)
    for ax, step in zip(figure.axes, [45, 90], strict=False):
        x, y = small.predicted["effect"].sel(step=step).values, small.measured["effect"].sel(step=step).values
        points = lines(ax)[-1] if lines(ax)[-1].get_marker() == "o" else lines(ax)[-2]
        scale = 1e-3 if "10⁻³" in figure.get_supxlabel() else 1
        np.testing.assert_allclose(points.get_xdata() * scale, x[pairs])
        np.testing.assert_allclose(points.get_ydata() * scale, y[pairs])
        (identity,) = lines(ax, "identity")
        np.testing.assert_array_equal(identity.get_xdata(), identity.get_ydata())
        slope = (x[pairs] @ y[pairs]) / (x[pairs] @ x[pairs])
        r, everything = np.corrcoef(x[pairs], y[pairs])[0, 1], np.corrcoef(x.ravel(), y.ravel())[0, 1]
        assert f"r {r:.2f}, slope {slope:.2f} (all pairs: r {everything:.2f})" in [t.get_text() for t in ax.texts]


def test_agreement_is_drawn_for_every_estimator_with_a_band_for_the_first(small):
    figure = check_figures.agreement_over_training(small.agreements, small.trusted)
    for ax, name in zip(figure.axes, ("correlation", "slope"), strict=True):
        for scores in small.agreements.values():
            assert drawn(ax, scores[f"{name}_off_diagonal"])
        (band,) = ax.collections
        top = band.get_datalim(ax.transData).y1
        np.testing.assert_allclose(top, small.agreements["BIF"][f"{name}_off_diagonal_upper"].max())


@pytest.mark.filterwarnings("error")
def test_scores_without_a_unit_have_a_curve_of_correlations_and_neither_curve_nor_name_among_slopes(small):
    foreign = small.influence.assign_attrs(units=ARBITRARY)
    scores = replace(small, baselines={"bergson": foreign}).agreements
    correlation, slope = check_figures.agreement_over_training(scores, small.trusted).axes
    assert "bergson" in [text.get_text() for text in correlation.texts]
    assert "BIF" in [text.get_text() for text in slope.texts]
    assert "bergson" not in [text.get_text() for text in slope.texts]
    assert not np.isfinite(scores["bergson"]["slope"]).any()


def test_diagnostics_stand_against_the_thresholds_that_decide(small):
    figure = check_figures.chain_diagnostics(small.diagnostics, small.trusted)
    assert len(figure.axes) == 4
    thresholds = [lines(ax, "threshold") for ax in figure.axes]
    assert [line[0].get_ydata()[0] for line in thresholds if line] == [
        verdicts.MAX_RHAT,
        verdicts.MIN_ESS_PER_CHAIN,
        verdicts.MAX_EVEN_SHARE,
    ]
    fewer = small.diagnostics.drop_vars(["even_share", "loss_rise_stderr"])
    assert sum(ax.axison for ax in check_figures.chain_diagnostics(fewer).axes) == 3
    with pytest.raises(ValueError, match="diagnostics must hold numbers"):
        check_figures.chain_diagnostics(small.diagnostics[["verdict", "advice"]])


def test_exemplars_go_from_most_helpful_to_most_harmful(small):
    (ax,) = exemplar_grid(small.exemplars[:2]).axes
    first = min(small.exemplars[:2], key=lambda exemplar: exemplar.step)
    row = sorted(ax.images, key=lambda image: (round(image.get_extent()[3]), image.get_extent()[0]))[:10]
    for image, k in zip(row, np.argsort(first.values), strict=True):
        np.testing.assert_array_equal(image.get_array(), first.images[k])


def test_a_sample_that_only_helps_is_never_shown_as_harmful(small):
    exemplar = small.exemplars[0]
    helpful, harmful = extremes(exemplar.__class__("q", 1, [1, 2, 3], list("abc"), [-1.0, -3.0, -2.0], [0.1] * 3))
    assert helpful.tolist() == [1, 2, 0]
    assert harmful.tolist() == []


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_least_data_still_make_figures(least):
    influence = least.influence
    made = [
        figures.loss_curves(least.losses, least.trusted),
        figures.influence_curves(influence, [], least.trusted),
        figures.influence_heatmaps(influence, figures.eventful_steps(influence, [])),
        check_figures.predicted_against_measured(least.predicted, least.measured, least.agreements["BIF"], [30]),
        check_figures.agreement_over_training(least.agreements, least.trusted),
        check_figures.chain_diagnostics(least.diagnostics, least.trusted),
    ]
    assert all(isinstance(figure, Figure) for figure in made)
    assert drawn(made[1].axes[0], influence["value"][:, 0, 0] / 1e-3)


def test_a_dollar_in_a_label_is_a_dollar(make):
    results = make(labels=[r"$\frac{$", "$5 to $10"], steps=[20, 30, 45])
    texts = [t.get_text() for t in figures.loss_curves(results.losses).axes[0].texts]
    assert {r"$\frac{$", "$5 to $10"} <= set(texts)
    figures.influence_heatmaps(results.influence, [30])


def test_open_squares_stand_where_the_chains_have_no_answer(results):
    damped = results.baselines["gradient product (Adam)"]
    stand_in = replace(results, baselines={"damped influence": damped}).stand_in
    figure = figures.influence_curves(results.influence, results.events, results.trusted, stand_in)
    squares = [line for ax in figure.axes for line in ax.lines if line.get_marker() == "s"]
    assert squares
    assert {tuple(line.get_xdata()) for line in squares} == {(0, 5, 10, 400)}
    plain = figures.influence_curves(results.influence, results.events, results.trusted)
    assert not [line for ax in plain.axes for line in ax.lines if line.get_marker() == "s"]


def test_fonts_of_pdf_files_are_of_the_type_that_publishers_take(results, tmp_path):
    _, _, pdf = write_figure(figures.loss_curves(results.losses), tmp_path, "losses")
    assert b"/CIDFontType2" in pdf.read_bytes()
    assert b"/Type3" not in pdf.read_bytes()
