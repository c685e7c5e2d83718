"""Texts whose tokens are coloured: the colour means the number, and no text of the data is markup."""

import re
from dataclasses import replace

import numpy as np
import pytest
from test_page import Page, written

from stagewise.reporting.passages import passages_of, visible
from stagewise.results import Exemplar

NOTHING = float("nan")
HOSTILE = [
    "</span></div><script>alert(1)</script>",
    '" onload="x',
    "<img src=x onerror=y>",
    "&lt;",
    "\n\n",
    "\ud800\u202e",
]


def exemplar(step=0, size=1.0, **changes):
    """One text that helps, one that harms and one that does nothing."""
    values = [[-3.0 * size, 1.0 * size, 0.0], [2.0 * size, NOTHING, 0.001 * size], [0.0, 0.0, 0.0]]
    made = {"query": "val", "step": step, "samples": [7, 1234, 9], "labels": ["a", "b", "c"]}
    made |= {"values": [-2.0 * size, 2.001 * size, 0.0], "stderrs": [0.0, 0.1 * size, 0.0]}
    made |= {"texts": [[" de", "f", "\n"], ["x", "y", "z"], ["n", "o", "."]], "token_values": values}
    return Exemplar(**made | changes)


def tokens_of(passages):
    return [t for panel in passages.panels for side in panel.sides for passage in side for t in passage.tokens]


def background(token):
    return tuple(int(token.style[12:18][k : k + 2], 16) for k in (0, 2, 4))


def test_every_step_shows_what_helped_and_what_harmed_in_words_and_in_order():
    passages = passages_of([exemplar(30), exemplar(5)])
    assert [panel.title for panel in passages.panels] == ["Step 5", "Step 30"]
    (helpful,), (harmful,) = passages.panels[0].sides  # what does nothing is not shown
    assert (helpful.kind, helpful.sample, helpful.value) == ("helpful", "sample 7", "−2 nats per unit weight")
    assert (harmful.kind, harmful.sample, harmful.value) == (
        "harmful", "sample 1,234", "2.00\u00a0±\u00a00.10 nats per unit weight",
    )  # fmt: skip
    assert helpful.strongest == "Strongest: “ de” helpful −3, “f” harmful 1."
    assert [token.title for token in helpful.tokens] == [
        "helpful: −3 nats per unit weight",
        "harmful: 1 nats per unit weight",
        "no influence: 0 nats per unit weight",
    ]
    assert [token.kind for token in harmful.tokens] == ["up", "un", ""]
    assert not harmful.tokens[1].style


def test_colours_are_symmetric_about_zero_and_have_one_scale_for_all_steps():
    pair = [[-1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.0] * 3]
    first, second = exemplar(0, token_values=pair), exemplar(1, token_values=(10 * np.array(pair)).tolist())
    small, large = (
        tokens_of(replace(passages_of([first, second]), panels=[panel]))
        for panel in passages_of([first, second]).panels
    )
    helpful, harmful, none = (background(token) for token in small[:3])
    assert helpful[2] > helpful[0]  # blue
    assert harmful[0] > harmful[2]  # red
    assert min(none) > 240
    assert sum(background(large[0])) < sum(helpful)
    assert sum(background(large[1])) < sum(harmful)
    alone = tokens_of(passages_of([first]))
    assert alone[0].style == large[0].style
    legend = passages_of([first, second])
    assert legend.low == legend.high.replace("≥ ", "≤ −") == "≤ −10"
    assert legend.gradient.startswith("#1d4f80,")
    assert legend.gradient.endswith(",#84290f")


def test_small_numbers_have_a_unit_that_is_named():
    passages = passages_of([exemplar(size=1e-6)])
    assert passages.unit == "10⁻⁶ nats per unit weight"
    assert tokens_of(passages)[0].title == "helpful: −3 × 10⁻⁶ nats per unit weight"


def test_what_has_no_value_anywhere_has_a_scale_all_the_same():
    empty = exemplar(token_values=[[0.0] * 3, [NOTHING] * 3, [0.0] * 3])
    assert len(tokens_of(passages_of([empty]))) == 6


@pytest.mark.parametrize("value", np.linspace(-1, 1, 41).tolist())
def test_text_can_be_read_on_every_colour(value):
    token = tokens_of(passages_of([exemplar(token_values=[[value, 1.0, -1.0], [1.0] * 3, [0.0] * 3])]))[0]

    def light(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(colour) / 255]
        return np.dot([0.2126, 0.7152, 0.0722], linear) + 0.05

    ink = (255, 255, 255) if "color:#fff" in token.style else (0, 0, 0)
    dark, bright = sorted([light(ink), light(background(token))])
    assert bright / dark >= 4.5


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\n", "↵\n"),
        (" a\n\n  ", " a↵\n↵\n  "),
        ("\r\n", "↵\n"),
        ("\t", "\t"),
        ("\x00\x1b", "\\x00\\x1b"),
        ("\u202e\ud800", "\\u202e\\ud800"),
        ("é😀\ufffd", "é😀\ufffd"),
    ],
)
def test_line_breaks_have_a_mark_and_what_cannot_be_printed_is_written_out(text, shown):
    assert visible(text) == shown


@pytest.fixture(scope="module")
def page(make, no_pictures, tmp_path_factory):
    numbers = [-0.1 * (k + 1) for k in range(len(HOSTILE))]
    hostile = exemplar(
        query=HOSTILE[0],
        labels=HOSTILE[:3],
        texts=[HOSTILE, HOSTILE[::-1], HOSTILE],
        token_values=[numbers, numbers, numbers],
    )
    results = make(labels=["a", "b"], steps=[0, 20], exemplars=[hostile, exemplar()])
    return written(results, tmp_path_factory.mktemp("report"))


def test_hostile_tokens_are_text_and_nothing_else(page):
    html, read = page
    assert not {tag for tag, _ in read.elements} & {"script", "img", "iframe", "object"}
    assert not [name for _, attrs in read.elements for name in attrs if name.startswith("on")]
    assert "<script" not in html
    shown = "".join(read.text)
    assert "".join(visible(text) for text in HOSTILE) in shown
    assert "".join(visible(text) for text in HOSTILE[::-1]) in shown


def test_the_tokens_of_a_text_are_spans_side_by_side_without_anything_between(page):
    html, _ = page
    tokens = re.findall(r'<div class="tokens" dir="auto">(.*?)</div>', html, re.DOTALL)
    assert len(tokens) == 4
    for passage in tokens:
        assert not re.sub(r"<span[^<>]*>[^<>]*</span>", "", passage)
        assert "</div" not in passage
    assert "white-space: pre-wrap" in html
    assert 'title="helpful: −3 nats per unit weight"> de</span>' in html
    assert 'class="un" title="not counted in the loss">y</span>' in html


def test_passages_stand_before_the_table_of_all_and_texts_without_tokens_have_the_table_alone(page, make, tmp_path):
    html, read = page
    assert html.count('<section class="passages">') == 2
    assert "Training samples that mattered most for val" in "".join(read.text)
    assert html.index("What in the texts mattered for “val”") < html.index(
        "Training samples that mattered most for val"
    )
    plain = exemplar(texts=None, token_values=None)
    html, read = written(make(labels=["a", "b"], steps=[0, 20], exemplars=[plain]), tmp_path)
    assert isinstance(read, Page)
    assert 'class="passages"' not in html
    assert "Training samples that mattered most for val" in "".join(read.text)
