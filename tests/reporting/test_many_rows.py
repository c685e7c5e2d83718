"""Thousands of samples or tokens in a report: the ones that matter are shown, each under its own name."""

import numpy as np
import xarray as xr

from stagewise.reporting.figures import MAX_ROWS, furthest_rows
from stagewise.reporting.tables import PER_SIDE, tokens_table


def test_a_table_of_tokens_names_sample_and_token_of_both_ends_and_leaves_out_those_without_influence():
    value = np.zeros((2, 400))
    value[0, [7, 123]], value[1, 399] = [-2.0, 3.0], 0.5
    names = [f"{sample}/{token}" for sample in range(40) for token in range(10)]
    dims = ("step", "train")
    influence = xr.Dataset(
        {"value": (dims, value), "stderr": (dims, np.full_like(value, 0.1))}, {"step": [5, 1000], "train": names}
    )
    rows = [row[:4] for row in tokens_table(influence, "late").rows]
    assert rows == [
        ("5", "most helpful", "0", "7"),
        ("5", "most harmful", "12", "3"),
        ("1,000", "most harmful", "39", "9"),
    ]


def test_no_token_stands_in_both_halves_of_a_table_of_few():
    count = PER_SIDE + 1
    dims = ("step", "train")
    value = np.arange(1.0, count + 1)[None]
    influence = xr.Dataset(
        {"value": (dims, value), "stderr": (dims, 0 * value)}, {"step": [0], "train": [f"0/{k}" for k in range(count)]}
    )
    tokens = [row[3] for row in tokens_table(influence, "all").rows]
    assert sorted(tokens) == [str(k) for k in range(count)]


def test_a_figure_of_many_rows_keeps_those_that_reach_furthest_in_their_order():
    value = np.zeros((1, 300, 2))
    kept = np.arange(0, 300, 7)[:MAX_ROWS]
    value[0, kept, 1] = -1 - np.arange(len(kept))
    coords = {"step": [0], "train": np.arange(300), "query": ["a", "b"]}
    influence = xr.Dataset({"value": (("step", "train", "query"), value)}, coords).assign(stderr=0.0)
    influence["stderr"] = xr.zeros_like(influence.value)
    assert furthest_rows(influence)["train"].values.tolist() == kept.tolist()
