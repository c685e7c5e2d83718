"""Made-up results in the shapes of the four studies, and of a table."""

import json

import numpy as np
import xarray as xr

from stagewise.dynamics import events
from stagewise.results import EXACT, Exemplar, Results

STEPS = [0, 10, 30, 100, 300]
CLASSES = list("0123")
DIMS = ("step", "train", "query")


def influence(trains, queries, steps=STEPS, seed=0, noise=0.0, sizes=20, **attrs):
    generator = np.random.default_rng(seed)
    value = 1e-3 * generator.normal(size=(len(steps), len(trains), len(queries)))
    data = {"value": (DIMS, value), "stderr": (DIMS, np.full_like(value, noise))}
    coords = {"step": steps, "train": trains, "query": queries, "train_size": ("train", np.full(len(trains), sizes))}
    return xr.Dataset(data, coords, {"window": 30, "estimator": EXACT, **attrs})


def losses(queries, steps=STEPS):
    fall = np.linspace(2.0, 0.1, len(steps))
    curves = np.outer(fall, np.linspace(0.8, 1.2, len(queries)))
    data = {"train": ("step", fall), "queries": (("step", "query"), curves)}
    return xr.Dataset(data, {"step": steps, "query": queries})


def diagnostics(steps=STEPS):
    generator, n = np.random.default_rng(1), len(steps)
    data = {name: ("step", generator.random(n)) for name in ("rhat", "ess_bulk", "even_share", "loss_rise")}
    said = {"verdict": ("step", ["ok"] * n), "advice": ("step", [""] * n), "chains_ok": ("step", [4] * n)}
    return xr.Dataset({**said, **data}, {"step": steps})


def single(names, queries=CLASSES, **changes):
    return influence(names, queries, seed=2, sizes=1, **changes)


def two_times(trains, queries, steps=STEPS):
    shape = (len(steps) - 1, len(steps) - 1, len(trains), len(queries))
    value = np.random.default_rng(3).normal(size=shape)
    value[0, -1] = np.nan
    coords = {"trained": steps[:-1], "trained_stop": ("trained", steps[1:]), "asked": steps[1:]}
    return xr.Dataset(
        {"value": (("trained", "asked", "train", "query"), value)}, {**coords, "train": trains, "query": queries}
    )


def digits(labels=CLASSES, **changes):
    """Images, chains, retraining, influence in two times, a map: something in every view."""
    generator, samples = np.random.default_rng(4), np.arange(100, 112)
    exact = influence(labels, labels)
    of_chains = influence(labels, labels, seed=5, noise=4e-4, estimator="bif")
    effect = -4.0 * exact["value"] * generator.uniform(0.9, 1.1, exact["value"].shape)
    measured = xr.Dataset({"effect": effect, "effect_stderr": abs(effect) / 9}, attrs={"window": 30, "weight": 0.8})
    kinds = ("sample", np.resize(labels, len(samples)))
    positions = xr.Dataset(
        {
            "value": (("step", "sample", "axis"), generator.normal(size=(len(STEPS), len(samples), 2))),
            "share": (("step", "axis"), np.full((len(STEPS), 2), 0.2)),
        },
        {"step": STEPS, "sample": samples, "label": kinds},
    )
    pictures = (("sample", "height", "width"), generator.integers(0, 256, (len(samples), 4, 5), dtype=np.uint8))
    made = {
        "title": "Digits",
        "losses": losses(labels),
        "diagnostics": diagnostics(),
        "influence": of_chains,
        "baselines": {EXACT: exact},
        "single": {EXACT: single([str(k) for k in samples], labels)},
        "events": events(exact),
        "measured": measured,
        "in_two_times": two_times(labels, labels),
        "positions": positions,
        "draws": xr.DataArray(generator.random((len(STEPS), 4, 6)), {"step": STEPS}, ("step", "chain", "draw")),
        "samples": xr.Dataset({"label": kinds, "image": pictures}, {"sample": samples}),
        "config": {"chains": 4},
        "provenance": {"seed": 0},
    }
    return Results(**made | changes)


def bare(trains, queries=None, **changes):
    """The exact influence of groups, and nothing else."""
    queries = trains if queries is None else queries
    made = {
        "title": "Bare",
        "losses": losses(queries),
        "diagnostics": diagnostics([]),
        "influence": None,
        "baselines": {EXACT: influence(trains, queries)},
    }
    return Results(**made | changes)


def hierarchy(**changes):
    """Concepts of a tree, without chains or retraining."""
    return bare(["animal", "bird", "canary", "plant"], **{"title": "Hierarchy"} | changes)


def texts(words, samples):
    return xr.Dataset(
        {"label": ("sample", ["".join(words)] * len(samples)), "text": ("sample", [json.dumps(words)] * len(samples))},
        {"sample": samples},
    )


def induction(**changes):
    """Classes of tokens, and single tokens, of which some are not counted."""
    names = [f"{sample}/{token}" for sample in range(3) for token in range(1, 4)]
    classes = ["first of a pair", "second of a pair"]
    known = texts(["a", "b", "a", "c"], range(3))
    made = {"title": "Induction", "single": {EXACT: single(names, classes)}, "samples": known}
    return bare(classes, **made | changes)


def language(words=("def ", "f", "():\n", "    pass"), **changes):
    """Texts of the samples that matter most, their tokens with values."""
    classes = ["keyword", "name"]
    generator = np.random.default_rng(6)
    values = generator.normal(size=6)
    exemplars = [
        Exemplar(
            query,
            step,
            range(6),
            ["".join(words)] * 6,
            values,
            0.1 * abs(values),
            texts=[list(words)] * 6,
            token_values=generator.normal(size=(6, len(words))),
            estimator=EXACT,
        )
        for query in classes
        for step in STEPS
    ]
    return bare(classes, **{"title": "Language", "exemplars": exemplars} | changes)


def table(**changes):
    """Rows of numbers, looked at one by one."""
    rows = (("sample", "column"), np.random.default_rng(7).normal(size=(5, 3)).astype(np.float32))
    samples = xr.Dataset({"label": ("sample", list("abcde")), "row": rows}, {"sample": range(5)})
    made = {"title": "Table", "single": {EXACT: single(list("01234"), ["0", "1"])}, "samples": samples}
    return bare(["0", "1"], **made | changes)
