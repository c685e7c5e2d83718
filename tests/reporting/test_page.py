import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr

from stagewise.reporting import write_report
from stagewise.reporting.contents import _influence, _two_times
from stagewise.reporting.findings import clearest_flips

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '<script>alert(1)</script>"onload="x'


class Page(HTMLParser):
    """Every element with its attributes, and all text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def attributes(self, *names):
        return [value for _, attrs in self.elements for name, value in attrs.items() if name in names]


def written(results, folder):
    path = write_report(results, folder)
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def full(make, tmp_path_factory):
    """A report of everything, with hostile text wherever text comes from the data."""
    results = make(labels=[EVIL, "$b$", "c & d"], steps=[0, 20, 30, 90])
    results = replace(
        results,
        title=f"Title {EVIL}",
        baselines={EVIL: results.baselines["gradient product (Adam)"]},
        diagnostics=results.diagnostics.assign(advice=("step", [EVIL] * 4)),
        config={"model": EVIL},
        provenance={"commit": "</pre>" + EVIL},
    )
    folder = tmp_path_factory.mktemp("report")
    return folder, results, *written(results, folder)


def test_the_page_asks_for_nothing_from_outside(full):
    _, _, html, page = full
    links = page.attributes("href", "xlink:href", "src", "srcset", "data", "action", "poster", "formaction")
    assert links
    assert all(link.startswith(("#", "data:", "figures/")) for link in links)
    assert set(re.findall(r"\w+://[^\s\"'<>]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_text_of_the_data_is_never_markup(full):
    _, _, html, page = full
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "base", "form"}
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    text = "".join(page.text)
    assert text.count("<script>alert(1)</scrip") > 10
    assert f"Title {EVIL}" in text
    assert "$b$" in text
    assert "c & d" in text
    assert "<script" not in html


def shown(page):
    """The title of a page once a browser has opened it and run whatever it would run."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    dom = subprocess.run([CHROMIUM, *options, page.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    return re.search(r"<title>(.*?)</title>", dom.stdout, re.DOTALL)[1]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_a_browser_runs_nothing_that_the_data_say(make, tmp_path, no_pictures_here):
    bad = "document.title='it ran'"
    evil = [f"<script>{bad}</script>", f'"><img src=x onerror="{bad}">', f"</title><svg onload={bad}>"]
    results = replace(make(labels=evil, steps=[0, 20, 30, 90]), title=evil[2], config={"model": evil[0]})
    html, _ = written(replace(results, provenance={"commit": f"</pre>{evil[1]}"}), tmp_path)
    bare = re.sub(r"<meta http-equiv=.Content-Security-Policy.*?>", "", html)  # which would keep anything from running
    assert len(bare) < len(html)
    page = tmp_path / "bare.html"
    page.write_text(bare, encoding="utf-8")
    assert shown(page).startswith("&lt;/title&gt;&lt;svg")
    page.write_text(f"{bare}<script>{bad}</script>", encoding="utf-8")
    assert shown(page) == "it ran"


def test_ids_of_all_figures_are_unique_and_references_meet_them(full):
    _, _, html, page = full
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    references = [link[1:] for link in page.attributes("href", "xlink:href") if link.startswith("#")]
    references += re.findall(r"url\(#([^)]+)\)", html)
    assert references
    assert set(references) <= set(ids)


def test_figures_are_on_the_page_and_in_files_of_three_formats(full):
    folder, _, html, page = full
    names = {"losses", "influence", "heatmaps", "correlations", "predicted-measured", "agreement", "chains"}
    names |= {"exemplars-1"}
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"{name}.{suffix}" for name in names for suffix in ("svg", "png", "pdf")
    }
    assert sum(tag == "svg" for tag, _ in page.elements) == len(names)
    assert [int(n) for n in re.findall(r"<b>Figure (\d+)\.", html)] == list(range(1, len(names) + 1))
    for link in page.attributes("href"):
        assert not link.startswith("figures/") or (folder / link).stat().st_size > 0


def test_a_figure_does_not_style_the_page(full):
    _, _, html, _ = full
    assert html.count("<style") == 1
    assert "<metadata" not in html


def test_the_page_leads_with_how_to_read_and_findings(full):
    _, _, html, _ = full
    assert html.index("Negative is helpful") < html.index("Findings") < html.index("<figure")
    assert "during the 30 training steps after a checkpoint" in " ".join(html.split())


def test_tables_hold_the_numbers_of_the_data(full):
    _, results, _, page = full
    text = "".join(page.text)
    scores = results.agreements["BIF"]
    for value in scores["correlation_off_diagonal"].values:
        assert f"{value:.2f} [".replace("-", "−") in text
    assert f"{results.diagnostics['rhat'].values[-1]:.3g}" in text
    assert f"All {len(results.events)} events" in text


@pytest.fixture
def unanswered(make):
    """A run of which not one checkpoint can be answered, and nothing else was done."""
    bad = dict.fromkeys([0, 5], "not localised")
    results = make(labels=["a", "b"], steps=[0, 5], bad=bad, events=[], baselines={}, measured=None, correlation=None)
    assert results.influence.sizes["step"] == 0
    return results


def test_the_same_results_give_the_same_bytes(unanswered, tmp_path):
    first, second = (write_report(unanswered, tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    for path in (tmp_path / "a" / "figures").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "figures" / path.name).read_bytes()


def test_what_is_missing_is_left_out_with_a_reason(unanswered, tmp_path):
    _, page = written(unanswered, tmp_path)
    text = " ".join("".join(page.text).split())
    assert "There are no influence curves, because no checkpoint could be answered." in text
    assert "No effect was measured by retraining" in text
    assert "Single training samples were not looked at" in text
    assert "There is no figure of the chains" in text
    assert "0 of 2 checkpoints can be answered." in text
    assert sum(tag == "svg" for tag, _ in page.elements) == 1


def test_exemplars_without_images_become_a_table(unanswered, results, tmp_path):
    texts = [
        replace(exemplar, images=None, labels=[f"def f{k}():" for k in range(10)]) for exemplar in results.exemplars
    ]
    _, page = written(replace(unanswered, exemplars=texts), tmp_path)
    rows = "".join(page.text).replace("\n", "|")
    worst = int(np.argmax(texts[0].values))
    assert f"most harmfuldef f{worst}():{texts[0].samples[worst]}" in rows.replace("|", "").replace("  ", "")
    assert not [path for path in (tmp_path / "figures").iterdir() if "exemplars" in path.name]


def test_the_curves_of_a_report_are_exact_with_what_was_measured_beside_them(exact):
    plate = next(_influence(exact))
    assert "Open squares: measured by retraining the window." in plate.caption
    squares = [line for ax in plate.figure.axes for line in ax.lines if line.get_marker() == "s"]
    assert {len(line.get_xdata()) for line in squares} == {14}
    unmeasured = next(_influence(replace(exact, measured=None)))
    assert "Open squares: sampled" in unmeasured.caption


def test_a_report_without_chains_has_every_section(exact, tmp_path, no_pictures_here):
    bare = replace(exact, influence=None, correlation=None, diagnostics=exact.diagnostics.isel(step=[]), measured=None)
    write_report(bare, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Held against the replayed window" in page
    assert "no checkpoint was sampled" in page


def test_influence_in_two_times_is_drawn_for_the_pairs_that_turn_and_only_where_there_is_any(exact):
    labels, trained, asked = exact.exact["train"].values.tolist(), [0, 5, 10], [5, 10, 20]
    value = np.random.default_rng(0).normal(size=(3, 3, len(labels), len(labels)))
    coords = {"trained": trained, "asked": asked, "train": labels, "query": labels}
    coords["trained_stop"] = ("trained", [5, 10, 20])
    in_two_times = xr.Dataset({"value": (("trained", "asked", "train", "query"), value)}, coords)
    plates = [*_two_times(replace(exact, in_two_times=in_two_times))]
    first = clearest_flips(exact.exact, exact.events)[0]
    assert f"“{first.train}” was trained on" in plates[0].caption
    assert [plate.name for plate in plates] == ["two-times-1", "two-times-2"]
    assert not [*_two_times(exact)]
    without = replace(exact, in_two_times=in_two_times, baselines={}, influence=None, correlation=None, events=[])
    assert [*_two_times(without)]
