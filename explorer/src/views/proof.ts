// How do we know: predicted against measured, and how every estimator fares over training.
import * as Plot from "@observablehq/plot";
import { roomFor, stepAxis } from "../axes";
import type { Context } from "../context";
import { h, table } from "../dom";
import { figure } from "../figure";
import { bars, dots, found, type Point } from "../many";
import type { Scores } from "../run";
import { nearest } from "../state";
import { number, short, step as stepText } from "../words";

export async function proof(context: Context): Promise<Node> {
  const parts: (Node | null)[] = [h("p", {}, standing(context)), await scatter(context)];
  for (const against of new Set(context.run.agreements.map((one) => one.against))) parts.push(agreement(context, against));
  if (context.run.replay) parts.push(h("p", {}, `Retraining: ${context.run.replay}.`));
  for (const note of context.run.notes) parts.push(h("p", { class: "muted" }, note));
  return h("div", {}, parts.filter((part) => part !== null));
}

// On which rung the numbers stand, and what the rung above says of them.
function standing({ run, influence, state }: Context): string {
  const { entry } = influence;
  const rung = {
    exact: "exact: the derivative of the window, by replaying it",
    estimated: "estimated from the checkpoint alone",
    imported: "what another tool says, imported",
  }[entry.rung];
  const tests = run.agreements.filter((one) => one.name === entry.name);
  const said = tests.map((one) => {
    const k = nearest(one.step, state.step);
    return `held against ${one.against} at step ${stepText(one.step[k])}, r = ${number(one.correlation[k])} and slope ${number(one.slope[k])}`;
  });
  return `What is shown by ${entry.name} is ${rung}; ${said.length ? said.join("; ") : "nothing above it was computed in this run, so that it is not proved here"}.`;
}

async function scatter({ run, store, influence, state, set }: Context): Promise<Node | null> {
  const { measured } = run;
  if (!measured) return h("p", { class: "muted" }, "No effect was measured by training again in this run.");
  if (!influence.entry.checked) return h("p", { class: "muted" }, "What was measured is of other rows, or this influence is not in nats: choose another above to hold it against effects.");
  const shared = measured.step.filter((step) => influence.labels.step.includes(step));
  if (!shared.length) return h("p", { class: "muted" }, "This influence and what was measured have no checkpoint in common.");
  const step = shared[nearest(shared, state.step)];
  const { value, stderr } = await influence.whole(influence.labels.step.indexOf(step));
  const effect = (await store.numbers("measured/effect")).data;
  const errors = measured.errors ? (await store.numbers("measured/effect_stderr")).data : null;
  const start = measured.step.indexOf(step) * measured.train.length * measured.query.length;
  const points = measured.train.flatMap((train, i) => {
    const row = influence.place("train", train);
    const change = influence.labels.train_size![row] * (measured.weight - 1);
    return measured.query.flatMap((query, j) => {
      const column = influence.place("query", query);
      if (row < 0 || column < 0 || !measured.other[i][j]) return [];
      const k = column * influence.labels.train.length + row;
      const place = start + i * measured.query.length + j;
      return [{ train, query, x: value[k] * change, doubt: Math.abs(stderr[k] * change), y: effect[place], error: errors ? errors[place] : 0 }];
    });
  });
  const chosen = points.filter((p) => String(p.train) === state.train && String(p.query) === state.query);
  const width = roomFor(520);
  const picture = Plot.plot({
    width, height: width, marginLeft: 60, marginBottom: 44,
    ariaLabel: "Measured against predicted effects",
    x: { label: "predicted effect (nats)", labelAnchor: "center", labelArrow: "none", grid: true, ticks: 5 },
    y: { label: "measured effect (nats)", labelArrow: "none", grid: true, ticks: 5 },
    marks: [
      Plot.line(diagonal(points), { x: "0", y: "1", stroke: "var(--muted)" }),
      bars(points.flatMap((p) => [[p.x - p.doubt, p.y, p.x + p.doubt, p.y], [p.x, p.y - p.error, p.x, p.y + p.error]]), "var(--helpful)", 0.35),
      dots(points, "var(--helpful)", 6),
      Plot.dot(chosen, { x: "x", y: "y", r: 7, stroke: "var(--ink)", strokeWidth: 2 }),
    ],
  });
  const say = found(picture, points,
    (k) => `${short(points[k].train)} on ${short(points[k].query)}: predicted ${number(points[k].x)}, measured ${number(points[k].y)} nats`,
    (k) => set({ train: String(points[k].train), query: String(points[k].query) }));
  const own = points.length < measured.train.length * measured.query.length ? " Pairs of a group with itself are left out." : "";
  const caption =
    `Change of the query losses after ${measured.window} training steps from step ${stepText(step)} with one train group at weight ${measured.weight}: ` +
    `measured by training again (up) against predicted by ${influence.entry.name} (across). On the line a prediction is right in nats. Bars are one standard error.${own}`;
  const columns = ["step", "train", "query", "predicted (nats)", "stderr", "measured (nats)", "stderr of measured"];
  const rows = points.map((p) => [step, p.train, p.query, p.x, p.doubt, p.y, p.error]);
  return figure("predicted-measured", "Predicted and measured", h("div", {}, picture, say), caption, { columns, rows });
}

function diagonal(points: (Point & { doubt: number; error: number })[]): number[][] {
  const reach = Math.max(...points.flatMap((p) => [Math.abs(p.x) + p.doubt, Math.abs(p.y) + p.error].filter(Number.isFinite)), 1e-12);
  return [[-reach, -reach], [reach, reach]];
}

function agreement({ run, state, influence, set }: Context, against: string): Node {
  const scores = run.agreements.filter((one) => one.against === against);
  const colour = new Map([...new Set(run.agreements.map((one) => one.name))].map((name, k) => [name, `var(--c${k % 10})`]));
  const steps = [...new Set(scores.flatMap((one) => one.step))].sort((a, b) => a - b);
  const points = scores.flatMap((one) => one.step.map((step, k) => ({ step, value: one.correlation[k], name: one.name })).filter((p) => p.value !== null));
  const width = roomFor(720);
  const picture = Plot.plot({
    width, height: 220, marginLeft: 52, marginRight: 130,
    ariaLabel: `Correlation with ${against} over training`,
    x: stepAxis(steps), y: { label: `correlation with ${against}`, labelArrow: "none", grid: true, domain: [Math.min(-0.1, ...points.map((p) => p.value!)), 1] },
    marks: [
      Plot.ruleY([0, 1], { stroke: "var(--rule)" }),
      Plot.lineY(points, { x: "step", y: "value", z: "name", stroke: (p) => colour.get(p.name), strokeWidth: (p) => (p.name === influence.entry.name ? 2.6 : 1.2) }),
      Plot.dot(points, { x: "step", y: "value", fill: (p) => colour.get(p.name), r: 2.5 }),
      Plot.ruleX([state.step], { stroke: "var(--muted)" }),
    ],
  });
  const rows = scores.map((one) => row(one, colour.get(one.name)!, state.step, () => {
    const found = run.influences.find((entry) => entry.name === one.name);
    if (found) set({ by: found.path });
  }));
  const columns = ["estimator", "step", "correlation", "lower", "upper", "slope", "lower", "upper"];
  const all = scores.flatMap((one) => one.step.map((step, k) => [one.name, step, one.correlation[k], one.correlation_lower[k], one.correlation_upper[k], one.slope[k], one.slope_lower[k], one.slope_upper[k]]));
  return h("div", {},
    figure(`agreement-${against === "retraining" ? "retraining" : "exact"}`, `Held against ${against}`, picture, "Correlation over pairs of groups at every checkpoint, for every estimator; 1 is perfect.", { columns, rows: all }),
    table(["estimator", "step", "correlation [95 %]", "slope [95 %]"], rows, `Agreement with ${against} nearest to this step; slope 1 is the right size`));
}

function row(one: Scores, colour: string, step: number, choose: () => void) {
  const k = nearest(one.step, step);
  const interval = (kind: "correlation" | "slope") => `${number(one[kind][k], 3)} [${number(one[`${kind}_lower`][k], 3)}, ${number(one[`${kind}_upper`][k], 3)}]`;
  return [h("button", { type: "button", class: "link", click: choose }, h("i", { class: "swatch", style: `background:${colour}` }), one.name), stepText(one.step[k]), interval("correlation"), interval("slope")];
}
