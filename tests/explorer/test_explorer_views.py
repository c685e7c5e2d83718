"""What every view shows, and what can be taken away of it, is what the datasets say."""

import io
import xml.etree.ElementTree as ET

import made_runs
import numpy as np
import pytest
from matplotlib.image import imread
from viewing import VIEWS, served

from stagewise.explorer import serve, store
from stagewise.explorer.page import export_page, write_explorer
from stagewise.results import EXACT

STEP, AT = "100", 3
GROUPS, CHAINS, SAMPLES = "influence/0", "influence/1", "influence/2"


@pytest.fixture(scope="module")
def results():
    return made_runs.digits()


@pytest.fixture(scope="module")
def folder(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_explorer(results, folder)
    return folder


@pytest.fixture(scope="module")
def url(folder):
    with served(folder) as url:
        yield url


@pytest.fixture
def opened(viewer, url):
    return lambda view, **state: viewer(url).open(view=view, **{"step": STEP, "query": "1", "train": "2"} | state)


def numbers(rows, *columns):
    return np.array([[row[column] for column in columns] for row in rows], dtype=float).T


def at(data, rows, name="value"):
    """Of a dataset at the step, train and query of rows, as the page holds it."""
    found = [data[name].sel(step=int(step), train=train, query=query).item() for step, train, query, *_ in rows]
    return np.float32(found)


@pytest.mark.parametrize(("by", "name"), [(GROUPS, "exact"), (CHAINS, "sampled")])
def test_the_timeline_and_the_matrix_hold_the_influence(opened, results, by, name):
    page, data = opened("matrix", by=by), getattr(results, name)
    _, rows = page.table("timeline")
    assert [row[1] for row in rows[:5]] == ["2"] * 5
    assert {row[1] for row in rows} == {"0", "2", "3"}  # not the query's own
    assert [row[0] for row in rows[:5]] == [str(step) for step in made_runs.STEPS]
    columns, pairs = page.table("matrix")
    assert columns[:3] == ["step", "train", "query"]
    assert len({(row[1], row[2]) for row in pairs}) == 16
    assert {row[0] for row in pairs} == {STEP}
    for shown in (rows, pairs):
        value, stderr = numbers(shown, 3, 4)
        np.testing.assert_array_equal(np.float32(value), at(data, shown))
        np.testing.assert_array_equal(np.float32(stderr), at(data, shown, "stderr"))
    value = data["value"].sel(step=int(STEP), train="2", query="1").item()
    said = page.page.inner_text("#matrix .say")
    assert said.startswith("2 on 1: ")
    if name == "sampled":
        assert "± 4) × 10⁻⁴" in said
    else:
        assert said.endswith("helpful" if value < 0 else "harmful")


def test_influence_in_two_times_is_that_of_the_chosen_pair(opened, results):
    page = opened("two-times")
    _, rows = page.table("two-times")
    pair = results.in_two_times["value"].sel(train="2", query="1")
    assert len(rows) == 10
    for trained, stop, asked, value in rows:
        assert int(trained) < int(asked)
        assert made_runs.STEPS.index(int(stop)) == made_runs.STEPS.index(int(trained)) + 1
        expected = np.float32(pair.sel(trained=int(trained), asked=int(asked)).item())
        assert np.isnan(expected) if value == "" else np.float32(value) == expected
    titles = page.page.eval_on_selector_all("#two-times rect title", "all => all.map(one => one.textContent)")
    assert len(titles) == 10
    assert sum("did not bear" in title for title in titles) == 1


def test_samples_are_ranked_by_size_at_a_step_without_noise_although_others_have_some(viewer, tmp_path):
    single = made_runs.single([str(k) for k in range(100, 112)], noise=3e-4)
    single["stderr"].loc[{"step": int(STEP)}] = 0.0
    write_explorer(made_runs.digits(single={EXACT: single}), tmp_path)
    with served(tmp_path) as url:
        page = viewer(url).open(view="data", step=STEP, query="1", train="2")
        shown = page.page.eval_on_selector(".sides .helpful", "side => side.querySelector('button').textContent.trim()")
        said = page.page.inner_text(".panel > p")
    column = single["value"].sel(step=int(STEP), query="1")
    assert shown == f"sample {column['train'].values[int(column.argmin())]}"
    assert "12 are not zero" in said


def test_the_data_are_ranked_and_drawn_as_they_are(opened, results):
    page = opened("data")
    single = results.single[EXACT].sel(step=int(STEP), query="1")
    _, rows = page.table("histogram-step-100")
    assert {row[1]: np.float32(row[3]) for row in rows} == {
        name: np.float32(value) for name, value in zip(single["train"].values, single["value"].values, strict=True)
    }
    order = single["train"].values[np.argsort(single["value"].values)].tolist()
    helpful = int((single["value"] < 0).sum())
    shown = page.page.eval_on_selector_all(".datum button", "all => all.map(one => one.textContent.trim())")
    assert shown == [f"sample {name}" for name in order[:helpful] + order[helpful:][::-1]]
    page.page.wait_for_selector(".datum canvas[data-painted]")
    pixels = page.page.eval_on_selector(
        ".datum canvas", "one => Array.from(one.getContext('2d').getImageData(0, 0, 5, 4).data)"
    )
    image = results.samples["image"].sel(sample=int(order[0])).values
    np.testing.assert_array_equal(np.reshape(pixels, (4, 5, 4))[:, :, 0], image)
    label = str(results.samples["label"].sel(sample=int(order[0])).item())
    assert page.page.get_attribute(".datum canvas", "aria-label") == f"sample {order[0]}: {label}"


def test_two_steps_of_the_data_stand_side_by_side(opened, results):
    page = opened("data", beside="10")
    single = results.single[EXACT].sel(query="1")
    for panel, step in zip(page.page.locator(".panel").all(), (100, 10), strict=True):
        best = single["train"].values[single["value"].sel(step=step).argmin("train").item()]
        assert panel.locator(".datum button").first.inner_text() == f"sample {best}"


@pytest.mark.parametrize(("by", "name"), [(GROUPS, "exact"), (CHAINS, "sampled")])
def test_predictions_are_influence_times_the_change_of_weight(opened, results, by, name):
    page, data = opened("proof", by=by), getattr(results, name)
    _, rows = page.table("predicted-measured")
    assert len(rows) == 12  # no group with itself
    predicted, doubt, measured, error = numbers(rows, 3, 4, 5, 6)
    np.testing.assert_allclose(predicted, at(data, rows) * 20 * (0.8 - 1), rtol=1e-6)
    np.testing.assert_allclose(doubt, at(data, rows, "stderr") * 4, rtol=1e-6)
    np.testing.assert_array_equal(np.float32(measured), at(results.measured, rows, "effect"))
    np.testing.assert_array_equal(np.float32(error), at(results.measured, rows, "effect_stderr"))
    _, scores = page.table("agreement-retraining")
    for shown, step, correlation, lower, *_ in scores:
        expected = results.agreements[shown].sel(step=int(step))
        assert float(correlation) == expected["correlation_off_diagonal"].item()
        assert float(lower) == expected["correlation_off_diagonal_lower"].item()


def test_the_map_and_the_chains_are_those_of_the_step(opened, results):
    page = opened("map")
    _, rows = page.table("map")
    expected = results.positions["value"].sel(step=int(STEP)).values
    np.testing.assert_array_equal(np.float32(numbers(rows, 3, 4).T), expected.astype("<f4"))
    assert [row[2] for row in rows] == results.positions["label"].values.tolist()
    assert "40 % of all spread" in page.page.inner_text("#map figcaption")
    page.open(view="chains", step=STEP)
    _, rows = page.table("draws")
    np.testing.assert_array_equal(
        np.float32(numbers(rows, 2)[0]), results.draws.sel(step=int(STEP)).values.ravel().astype("<f4")
    )
    _, rows = page.table("chains-rhat")
    np.testing.assert_array_equal(numbers(rows, 1)[0], results.diagnostics["rhat"].values)
    _, rows = page.table("chains-ess-bulk")
    np.testing.assert_allclose(numbers(rows, 1)[0], results.diagnostics["ess_bulk"].values / 4)


def test_pictures_can_be_taken_away(opened):
    page = opened("matrix")
    for figure in ("timeline", "matrix"):
        drawing = page.downloaded(figure, "SVG").decode()
        assert "var(--" not in drawing
        root = ET.fromstring(drawing)
        assert root.tag.endswith("svg")
        assert len(list(root.iter())) > 10
        painted = page.downloaded(figure, "PNG")
        assert painted.startswith(b"\x89PNG\r\n")
        wide = int.from_bytes(painted[16:20], "big")
        assert wide == 2 * round(float(root.get("width")))
        assert len(np.unique(imread(io.BytesIO(painted))[..., :3].reshape(-1, 3), axis=0)) > 10


@pytest.mark.parametrize("make", ["hierarchy", "induction", "language", "table"])
def test_runs_of_every_kind_have_all_views_or_say_why_not(viewer, tmp_path, make):
    results = getattr(made_runs, make)()
    write_explorer(results, tmp_path)
    with served(tmp_path) as url:
        page = viewer(url).open()
        texts = {}
        for k, view in enumerate(VIEWS):
            page.after(lambda k=k: page.page.keyboard.press(str(k + 1)))
            assert page.state["view"] == view
            texts[view] = page.page.inner_text("section[aria-label=view]")
            assert page.page.locator("[role=alert]").count() == 0
            assert texts[view]
            if view == "data" and make == "language":
                token = page.page.locator(".tokens span[style*=background]").first
                assert token.get_attribute("title").startswith(("helpful: ", "harmful: "))
                assert token.inner_text().strip() in {"def", "f", "():↵", "pass"}
            if view == "data" and make == "induction":
                assert page.page.locator(".tokens .chosen").count() > 0
                assert page.page.locator(".tokens .uncounted").first.inner_text() == "a"
            if view == "data" and make == "table":
                assert page.page.locator(".row span").count() == 3 * page.page.locator(".datum").count()
        page.open(view="matrix", step=STEP)
        _, rows = page.table("matrix")
        np.testing.assert_array_equal(np.float32(numbers(rows, 3)[0]), at(results.exact, rows))
    assert "There are no diagnostics" in texts["chains"]
    assert "There is no map" in texts["map"]
    assert "was not computed" in texts["two-times"]
    assert "No effect was measured" in texts["proof"]
    assert ("were not looked at" in texts["data"]) == (make == "hierarchy")


def test_an_exported_page_opens_from_disk_and_asks_for_nothing(viewer, folder, tmp_path):
    export_page(folder, tmp_path / "page.html")
    page = viewer((tmp_path / "page.html").as_uri())
    for view in VIEWS:
        page.open(view=view)
        assert page.page.locator("[role=alert]").count() == 0
    assert {url.split("#")[0] for url in page.asked if not url.startswith(("data:", "blob:", "about:"))} == {page.url}


def test_a_large_run_is_read_piece_by_piece_and_says_the_same(viewer, results, tmp_path, monkeypatch):
    for name, size in {"LARGE": 40, "_CURVES": 5, "_TOGETHER": 30, "_STRONGEST": 7}.items():
        monkeypatch.setattr(store, name, size)
    monkeypatch.setattr(serve, "_FIRST", 0)
    write_explorer(results, tmp_path)
    with served(tmp_path) as url:
        page = viewer(url).open(view="matrix", step=STEP, by=GROUPS, query="1")
        asked = [one.split("data.zarr/")[1] for one in page.asked if "data.zarr/" in one]
        assert any(path.startswith(f"{GROUPS}/by_query/") for path in asked)
        assert not [
            path for path in asked if path.startswith((CHAINS, SAMPLES, "samples", "map", "two_times", "draws"))
        ]
        page.open(view="data", step=STEP, by=SAMPLES, query="1")
        _, rows = page.table("histogram-step-100")
        assert len(rows) == 12
        _, curves = page.table("timeline")
        page.open(view="matrix", step=STEP, by=SAMPLES, query="1")
        _, strongest = page.table("matrix")
        assert len(strongest) == 7 * 4
        single = results.single[EXACT]
        for shown in (rows, curves, strongest):
            np.testing.assert_array_equal(np.float32(numbers(shown, 3)[0]), at(single, shown))
        page.open(view="proof", step=STEP, by=GROUPS)
        _, rows = page.table("predicted-measured")
        np.testing.assert_allclose(numbers(rows, 3)[0], at(results.exact, rows) * -4, rtol=1e-6)


def test_a_page_that_cannot_be_read_says_what_to_do(browser, folder, tmp_path, monkeypatch):
    write_explorer(made_runs.digits(influence=None, baselines={}, single={}, events=[]), tmp_path)
    page = browser.new_page()
    page.goto((tmp_path / "explorer" / "index.html").as_uri())
    assert "no checkpoint of this run could be answered" in page.inner_text("[role=alert]")
    monkeypatch.setattr("stagewise.explorer.page._BAKED", 0)
    write_explorer(made_runs.hierarchy(), tmp_path)
    page.goto((tmp_path / "explorer" / "index.html").as_uri())
    assert "stagewise explore RUN" in page.inner_text("[role=alert]")
    page.close()
