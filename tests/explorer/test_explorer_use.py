"""Choosing by pointer, by keys and by links; for everybody; and texts that would like to be more than texts."""

import made_runs
import pytest
from viewing import VIEWS, served

from stagewise.explorer.page import write_explorer

EVIL = '</script><img src=x onerror="window.ran=1"><script>window.ran=1</script>'
HARM = {"serious", "critical"}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_explorer(made_runs.digits(), folder)
    with served(folder) as url:
        yield url


@pytest.fixture
def page(viewer, url):
    return viewer(url).open(step=30, query="1", train="2")


def test_the_slider_and_the_arrows_go_to_the_next_step_and_stop_at_the_last(page):
    page.after(lambda: page.page.press("#step", "ArrowRight"))
    assert page.state["step"] == "100"
    assert page.page.evaluate("document.activeElement.id") == "step"
    assert page.page.inner_text("output[for=step]").strip() == "100 (4 of 5)"
    assert "step 100" in page.page.inner_text("#matrix figcaption")
    page.page.evaluate("document.activeElement.blur()")
    for key, step in [("ArrowRight", "300"), ("ArrowRight", "300"), ("ArrowLeft", "100")]:
        page.after(lambda key=key: page.page.press("body", key))
        assert page.state["step"] == step
    for key, query in [("ArrowDown", "2"), ("ArrowUp", "1"), ("ArrowUp", "0"), ("ArrowUp", "0")]:
        page.after(lambda key=key: page.page.press("body", key))
        assert page.state["query"] == query


def test_dragging_over_the_timeline_follows_the_pointer(page):
    box = page.page.locator("#timeline svg").first.bounding_box()
    left, right, y = box["x"] + 52, box["x"] + box["width"] - 110, box["y"] + 100
    mouse = page.page.mouse
    mouse.move(left + 1, y)
    page.after(mouse.down)
    assert page.state["step"] == "0"
    page.after(lambda: mouse.move((left + right) / 2, y))  # log(1 + step) = 2.9
    assert page.state["step"] == "10"
    page.after(lambda: mouse.move(right - 1, y))
    assert page.state["step"] == "300"
    mouse.up()
    mouse.move(left + 1, y)
    page.after(lambda: page.page.press("body", "ArrowLeft"))
    assert page.state["step"] == "100"  # and has not followed since


def test_a_press_on_a_cell_follows_that_pair(page):
    page.after(lambda: page.page.check("label.inline input"))  # in the order of the data
    box = page.page.locator("#matrix svg").bounding_box()
    wide, high = (box["width"] - 90 - 20) / 4, (box["height"] - 20 - 56) / 4
    page.after(lambda: page.page.mouse.click(box["x"] + 90 + 2.5 * wide, box["y"] + 20 + 0.5 * high))
    assert (page.state["train"], page.state["query"]) == ("0", "2")
    assert page.page.inner_text("#matrix .say").startswith("0 on 2: ")
    assert page.page.input_value("[id='on query']") == "2"
    assert page.table("timeline")[1][0][1:3] == ["0", "2"]


def test_a_press_on_a_point_of_the_map_or_of_the_scatter_follows_it(page):
    page.after(lambda: page.page.keyboard.press("4"))
    rows = page.table("predicted-measured")[1]
    reach = max(abs(float(row[a])) + float(row[b]) for row in rows for a, b in ((3, 4), (5, 6)))
    box = page.page.locator("#predicted-measured svg").bounding_box()
    _, train, query, predicted, _, measured, _ = rows[0]
    x = box["x"] + 60 + (float(predicted) / reach + 1) / 2 * (box["width"] - 60 - 20)
    y = box["y"] + 20 + (1 - float(measured) / reach) / 2 * (box["height"] - 20 - 44)
    page.after(lambda: page.page.mouse.click(x, y))
    assert (page.state["train"], page.state["query"]) == (train, query)


def test_a_press_in_two_times_goes_to_the_step_that_was_trained_on(page):
    page.after(lambda: page.page.keyboard.press("2"))
    page.after(lambda: page.page.locator("#two-times rect").last.click())
    assert page.state["step"] == "100"


def test_a_link_shows_somebody_else_the_same(page, viewer):
    page.after(lambda: page.page.keyboard.press("3"))
    page.after(lambda: page.page.select_option("#beside", "10"))
    page.after(lambda: page.page.select_option("#by", "influence/2"))
    state = page.state
    assert {"view": "data", "beside": "10", "by": "influence/2"}.items() <= state.items()
    other = viewer(page.url).open(**state)
    assert other.state == state
    shown = [one.page.inner_text("main") for one in (page, other)]
    assert shown[0] == shown[1]
    page.page.reload()
    page.page.wait_for_selector("#app[data-done]")
    assert page.page.inner_text("main") == shown[0]
    page.after(lambda: page.page.evaluate("location.hash = 'view=data&step=30'"))
    assert page.page.locator(".panel").count() == 1


def test_a_link_to_what_is_not_there_shows_something_and_says_what(viewer, url):
    page = viewer(url).open(view="nothing", by="nothing", step="nothing", query="nothing", train="nothing")
    assert page.state["by"] == "nothing"  # an address is not changed before something is chosen
    assert page.page.inner_text("#matrix .say")
    assert page.page.input_value("#by") == "influence/0"


def test_every_control_can_be_reached_by_tab_alone(page):
    reached = []
    for _ in range(40):
        page.page.keyboard.press("Tab")
        if page.page.evaluate("document.activeElement === document.body"):
            break
        reached.append(page.page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        assert page.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", reached
    tabs = page.page.eval_on_selector_all("nav a", "all => all.map(one => one.textContent)")
    assert reached[:5] == ["step", "on query", "of", "by", "how do we know?"]
    assert {*tabs, "copy CSV", "configuration and versions"} <= {*reached}


def test_a_tab_is_opened_by_enter_and_says_that_it_is(page):
    page.page.focus("nav a:nth-child(5)")
    page.after(lambda: page.page.keyboard.press("Enter"))
    assert page.state["view"] == "map"
    assert page.page.inner_text("nav a[aria-current=page]") == "Map"


@pytest.mark.parametrize(("scheme", "width"), [("light", 1600), ("dark", 390)])
def test_no_view_shuts_anybody_out_or_is_wider_than_its_window(viewer, url, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install stagewise[browser]").Axe()
    size = {"width": width, "height": 800}
    page = viewer(url, color_scheme=scheme, viewport=size).open(step=30, query="1", train="2")
    for k, view in enumerate(VIEWS):
        page.after(lambda k=k: page.page.keyboard.press(str(k + 1)))
        found = axe.run(page.page).response["violations"]
        assert [(view, one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in HARM] == []
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width, view
        names = page.page.eval_on_selector_all("figure svg", "all => all.map(one => [one.role, one.ariaLabel])")
        assert names
        assert all(role == "img" and name for role, name in names)
        for figure in page.page.locator("figure").all():
            assert figure.locator("button:text-is('CSV')").count() == 1


def test_dark_is_dark(viewer, url):
    page = viewer(url, color_scheme="dark").open()
    assert page.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 25, 28)"
    assert b"#17191c" in page.downloaded("timeline", "SVG") or b"rgb(23, 25, 28)" in page.downloaded("timeline", "SVG")


@pytest.mark.parametrize("make", ["digits", "language"])
def test_nothing_that_the_data_say_is_ever_run_even_where_the_policy_would_let_it(viewer, tmp_path, make):
    labels = [EVIL, "=1+1", "c" * 200, "d e"]
    if make == "digits":
        results = made_runs.digits(labels, title=EVIL, notes=[EVIL], config={"model": EVIL})
    else:
        results = made_runs.language(words=(EVIL, "\u202e", "x" * 300), title=EVIL)
    write_explorer(results, tmp_path)
    with served(tmp_path) as url:
        page = viewer(url, bypass_csp=True, viewport={"width": 390, "height": 800}).open()
        for k, view in enumerate(VIEWS):
            page.after(lambda k=k: page.page.keyboard.press(str(k + 1)))
            assert page.page.evaluate("window.ran") is None
            assert page.page.locator("#app script, #app img").count() == 0
            assert page.page.evaluate("document.documentElement.scrollWidth") <= 390, view
        assert page.page.inner_text("h1") == EVIL
        page.page.evaluate("html => { document.createElement('div').innerHTML = html }", EVIL)
        page.page.wait_for_function("window.ran === 1")  # as it would have been
        page.complaints.clear()
        page.asked = [one for one in page.asked if not one.endswith("/x")]
        if make == "digits":
            page.after(lambda: page.page.keyboard.press("1"))
            _, rows = page.table("matrix")
            assert {row[1] for row in rows} == {EVIL, "'=1+1", "c" * 200, "d e"}  # no formula for a spreadsheet
