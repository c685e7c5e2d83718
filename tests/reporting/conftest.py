"""A made-up run that looks like a real one: ten groups, stages, sign flips, noise, untrusted checkpoints."""

import json
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from stagewise.dynamics import events
from stagewise.results import Exemplar, Results

STEPS = [0, 5, 10, 20, 30, 45, 65, 90, 130, 190, 280, 400, 600, 900]
LABELS = list("0123456789")
BAD = {0: "not localised", 5: "not localised", 10: "not localised", 400: "not converged"}
ADVICE = {
    "ok": "",
    "not localised": "the loss curves downwards by more than the localisation holds back, so there is no local "
    "posterior; use a window of at most 12 training steps",
    "not converged": "chains disagree (R-hat 1.09 > 1.05); use a longer burn_in (about 2 times: 200 -> 400)",
    "beyond first order": "24% of the spread of the losses is of second order; raise n_beta at the same window: "
    "n_beta (about 6 times: 30 -> 180)",
}
WINDOW, WEIGHT = 30, 0.8


def matrices(value, stderr, steps, labels, sizes, replicates=None, **attrs):
    dims = ("step", "train", "query")
    data = {"value": (dims, value), "stderr": (dims, stderr)}
    if replicates is not None:
        data["replicates"] = (("step", "replicate", "train", "query"), replicates)
    coords = {"step": steps, "train": labels, "query": labels}
    coords |= {"train_size": ("train", sizes), "query_size": ("query", sizes // 3)}
    return xr.Dataset(data, coords, {"units": "nats per unit weight", "sign": "negative = helpful", **attrs})


def bump(x, centre, width):
    return np.exp(-(((x - centre) / width) ** 2) / 2)


def true_influence(steps, k, generator):
    """(step, train, query): helpful while classes share features, competing while they are told apart."""
    x = np.log1p(np.asarray(steps, dtype=float))[:, None, None]
    alike = generator.gamma(0.6, 1.0, (k, k))
    alike = (alike + alike.T) / 2 + 0.3 * generator.random((k, k))
    when = generator.uniform(3.2, 5.6, (k, k))
    shared = -0.5 * bump(x, when - 1.1, 0.6) + 1.1 * bump(x, when, 0.7) - 0.15 * bump(x, when + 1.4, 0.8)
    own = -9 * np.eye(k) * (bump(x, 4, 1.3) + 0.1)
    return 3e-4 * (alike * shared * (1 - np.eye(k)) + own)


def diagnostics(steps, bad, generator):
    verdict = [bad.get(step, "beyond first order" if step == 20 else "ok") for step in steps]
    nowhere = np.array([v == "not localised" for v in verdict])
    n = len(steps)

    def column(values):
        return ("step", np.where(nowhere, np.nan, values))

    rise = 0.03 * (1 + generator.random(n))
    data = {
        "verdict": ("step", verdict),
        "advice": ("step", [ADVICE[v] for v in verdict]),
        "chains_ok": ("step", np.where(nowhere, 0, 4)),
        "chains_failed": ("step", np.where(nowhere, 4, 0)),
        "localised": ("step", ~nowhere),
        "rhat": column([1.09 if v == "not converged" else 1.005 + 0.03 * generator.random() for v in verdict]),
        "ess_bulk": column(4 * generator.uniform(8, 90, n)),
        "loss_rise": column(rise),
        "loss_rise_stderr": column(0.1 * rise),
        "drift": column(generator.normal(size=n)),
        "even_share": column([0.24 if v == "beyond first order" else 0.06 for v in verdict]),
    }
    return xr.Dataset(data, {"step": steps})


def exemplars(labels, steps, generator, images=True):
    def one(step):
        values = np.concatenate([-generator.gamma(4, 0.004, 5), generator.gamma(3, 0.003, 5)])
        y, x = np.mgrid[-1:1:8j, -1:1:8j]
        rings = [np.clip(1.4 * bump(np.hypot(x, y * r), 0.7, 0.22), 0, 1) for r in generator.uniform(0.4, 1.6, 10)]
        shown = np.stack(rings) if images else None
        chosen = generator.choice(labels, 10).tolist()
        return Exemplar(labels[-1], step, generator.integers(0, 1400, 10), chosen, values, 0.1 * abs(values), shown)

    return [one(step) for step in steps]


def make_results(steps=STEPS, labels=LABELS, bad=None, seed=0, **changes):
    bad = BAD if bad is None else bad
    generator, k = np.random.default_rng(seed), len(labels)
    sizes = np.full(k, 140)
    truth = true_influence(steps, k, generator)
    good = [n for n, step in enumerate(steps) if step not in bad]
    kept = [steps[n] for n in good]
    noise = generator.normal(size=(len(good), 16, k, k)) * (2e-5 + 0.3 * np.abs(truth[good])[:, None])
    replicates = truth[good][:, None] + noise
    value, stderr = replicates.mean(1), replicates.std(1, ddof=1) / 4
    omitted = json.dumps({str(step): f"{why}: {ADVICE[why]}" for step, why in bad.items() if step in steps})
    influence = matrices(
        value, stderr, kept, labels, sizes, replicates, estimator="bif", window=WINDOW, n_beta=30.0, omitted=omitted
    )
    correlation = matrices(
        np.clip(value * 300, -1, 1), stderr * 300, kept, labels, sizes, kind="correlation", omitted=omitted
    )
    blurred = truth + 2e-4 * generator.normal(size=truth.shape)
    gradient = matrices(3 * blurred, 0 * truth, steps, labels, sizes, estimator="gradient product")
    slope = np.linspace(0.9, 1.4, len(steps))[:, None, None]
    effect = truth * 140 * (WEIGHT - 1) * slope + 1e-3 * generator.normal(size=truth.shape)
    measured = xr.Dataset(
        {
            "effect": (("step", "train", "query"), effect),
            "effect_stderr": (("step", "train", "query"), np.full_like(effect, 8e-4)),
        },
        {"step": steps, "train": labels, "query": labels, "train_size": ("train", sizes)},
        {"window": WINDOW, "weight": WEIGHT},
    )
    fall = 1 / (1 + np.exp(1.6 * (np.log1p(steps) - 4.2)))
    queries = 0.12 + 2.2 * fall[:, None] ** generator.uniform(0.7, 1.5, k)
    losses = xr.Dataset(
        {"train": ("step", 0.05 + 2.25 * fall), "queries": (("step", "query"), queries)},
        {"step": steps, "query": labels},
    )
    made = Results(
        title="Which digits taught which, and when",
        losses=losses,
        diagnostics=diagnostics(steps, bad, generator),
        influence=influence,
        correlation=correlation,
        events=events(influence) if kept else [],
        baselines={"gradient product (Adam)": gradient},
        measured=measured,
        exemplars=exemplars(labels, kept[:: max(1, len(kept) // 4)][:4], generator),
        config={"study": "digits", "posterior": {"window": WINDOW, "n_beta": 30}, "chains": 4, "draws": 200},
        provenance={"stagewise": "0.1.0", "seed": seed},
    )
    return replace(made, **changes)


@pytest.fixture(scope="session")
def results():
    return make_results()


@pytest.fixture(scope="session")
def exact(results):
    """The same with the exact influence, whose sizes are 1.25 times those of the chains."""
    value = results.baselines["gradient product (Adam)"]["value"].copy()
    value.loc[{"step": results.influence["step"]}] = 1.25 * results.influence["value"]
    found = xr.Dataset({"value": value, "stderr": 0 * value}, attrs={"estimator": "exact influence", "window": WINDOW})
    found.attrs |= {"batches": "recorded", "omitted": "{}"}
    return replace(results, baselines={"exact influence": found, **results.baselines}, events=events(found))


@pytest.fixture(scope="session")
def make():
    return make_results
