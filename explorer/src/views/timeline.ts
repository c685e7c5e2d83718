// Influence on the chosen query over training, with the run's own stages and losses; press or drag to choose a step.
import * as Plot from "@observablehq/plot";
import { chooseStep, roomFor, scaleOf, stepAxis } from "../axes";
import { ofLabel } from "../colour";
import type { Context } from "../context";
import { h } from "../dom";
import { figure } from "../figure";
import { largest } from "../largest";
import type { Event, Values } from "../run";
import { number, short, step as stepText, superscript } from "../words";

const OTHERS = 3;
const SAMPLED = "BIF"; // the estimator that rests on chains
const MARKS: Record<string, "diamond" | "triangle" | "triangle2"> = {
  flip: "diamond",
  "helpful peak": "triangle2",
  "harmful peak": "triangle",
};

export async function timeline(context: Context): Promise<Node> {
  const { influence, run, query, state, set } = context;
  const { labels, entry } = influence;
  const chosen = await strongest(context);
  const curves = await Promise.all(chosen.map((train) => influence.curve(train, query)));
  const name = labels.query[query];
  const unit = scaleOf(Math.max(...curves.flatMap((curve) => Array.from(curve.value, Math.abs))));
  const points = curves.flatMap((curve, k) => along(curve, labels.step, entry.reach, unit, chosen[k]));
  const shown = new Set(chosen.map((k) => String(labels.train[k])));
  const events = entry.events.filter(
    (e) => MARKS[e.kind] && !e.detail.at_edge && String(e.query) === String(name) && shown.has(String(e.train)),
  );
  const steps = [...new Set([...labels.step, ...run.losses.step])].sort((a, b) => a - b);
  const stages = run.stages.filter((stage) => stage.query === null || String(stage.query) === String(name));
  const width = roomFor(960);
  const colour = (train: number) => ofLabel(train);
  const untrusted = entry.name === SAMPLED ? Object.keys(run.omitted).map(Number) : [];
  const ends = curves.map((curve, k) => ({ step: labels.step.at(-1)!, value: curve.value.at(-1)! / unit, train: chosen[k] }));
  const measured = await measuredPoints(context, chosen, unit);
  const picture = Plot.plot({
    width,
    height: 300,
    marginRight: 110,
    marginLeft: 52,
    ariaLabel: `Influence on ${name} over training`,
    x: stepAxis(steps),
    y: { label: `${unit === 1 ? "" : `10${superscript(Math.round(Math.log10(unit)))} `}${entry.unit}; below zero = helpful`, labelArrow: "none", grid: true, nice: true },
    marks: [
      Plot.ruleX(untrusted, { stroke: "var(--shade)", strokeWidth: 8 }),
      Plot.rectX(stages, { x1: "lower", x2: "upper", fill: "var(--rule)", fillOpacity: stages.length > 2 ? 0.2 : 0.5 }),
      Plot.ruleX(stages, { x: "step", stroke: "var(--muted)", strokeDasharray: "3,3" }),
      // One below the other, so that they do not cover each other.
      ...stages.map((stage, k) => Plot.text([stage], { x: "step", frameAnchor: "top", text: "name", dx: 4, dy: LINE * k, textAnchor: "start", fill: "var(--muted)" })),
      Plot.ruleY([0], { stroke: "var(--muted)" }),
      Plot.areaY(points, { x: "step", y1: "low", y2: "high", z: "train", fill: (d) => colour(d.train), fillOpacity: 0.15 }),
      Plot.lineY(points, { x: "step", y: "value", z: "train", stroke: (d) => colour(d.train), strokeWidth: (d) => (d.train === context.train ? 2.6 : 1.3) }),
      Plot.dot(points, { x: "step", y: "value", fill: (d) => colour(d.train), r: 2 }),
      Plot.dot(measured, { x: "step", y: "value", symbol: "square", stroke: (d) => colour(d.train), fill: "var(--paper)", r: 3 }),
      Plot.ruleY(events, { x1: "lower", x2: "upper", y: (e) => level(e, unit), stroke: (e) => colour(influence.place("train", e.train)) }),
      Plot.dot(events, { x: "step", y: (e: Event) => level(e, unit), symbol: "kind", stroke: (e: Event) => colour(influence.place("train", e.train)), fill: "var(--paper)", r: 5, title: described }),
      endLabels(ends.map((end) => ({ ...end, text: short(labels.train[end.train], 14), colour: colour(end.train) }))),
      Plot.ruleX([state.step], { stroke: "var(--ink)", strokeWidth: 1.5 }),
      Plot.tip(points, Plot.pointer({ x: "step", y: "value", title: (d) => `${short(labels.train[d.train])} at step ${d.step}\n${number(d.value)} [${number(d.low)}, ${number(d.high)}]`, fill: "var(--paper)" })),
    ],
    symbol: { domain: Object.keys(MARKS), range: Object.values(MARKS) },
  });
  chooseStep(picture, labels.step, (step) => set({ step }));
  const losses = await lossCurves(context, steps, width);
  chooseStep(losses, labels.step, (step) => set({ step }));
  const columns = ["step", "train", "query", `value (${entry.unit})`, "stderr"];
  const rows = curves.flatMap((curve, k) => labels.step.map((step, i) => [step, labels.train[chosen[k]], name, curve.value[i], curve.stderr[i]]));
  const caption =
    `Influence on ${short(name, 40)} of ${short(labels.train[context.train], 40)} (bold) and of the ${entry.of}s that reach furthest at this step. ` +
    `Below zero is helpful: more weight lowers the loss. ${entry.noisy ? "Bands are pointwise 95 % intervals. " : entry.rung === "imported" ? "Imported scores, whose errors are not known. " : "This estimator has no noise. "}` +
    (events.length ? "Diamonds are sign flips, triangles peaks that noise cannot have made, with the interval of their step. " : "") +
    (measured.length ? "Open squares were measured by training again. " : "") +
    (stages.length ? "Dashed: stages of the model, half learnt where half of the query's loss is gone. " : "") +
    (untrusted.length ? "Shaded: checkpoints whose chains cannot be trusted." : "");
  return h("div", {}, figure("timeline", "Over training", h("div", {}, picture, losses), caption, { columns, rows }), listed(context, events));
}

// The chosen training data first, then those of the largest influence at this step.
async function strongest({ influence, step, query, train }: Context): Promise<number[]> {
  const { value } = await influence.ranking(step, query);
  const own = influence.labels.own[query];
  return [train, ...largest(OTHERS, value.length, (k) => (k === train || own.includes(k) ? NaN : Math.abs(value[k])))];
}

function along(curve: Values, steps: number[], reach: number, unit: number, train: number) {
  return steps.map((step, k) => {
    const value = curve.value[k] / unit;
    const half = (reach * curve.stderr[k]) / unit;
    return { step, train, value, low: value - half, high: value + half };
  });
}

async function measuredPoints({ run, store, influence, query }: Context, chosen: number[], unit: number) {
  const measured = run.measured;
  if (!measured || !influence.entry.checked || measured.weight === 1) return [];
  const column = measured.query.map(String).indexOf(String(influence.labels.query[query]));
  const effect = (await store.numbers("measured/effect")).data;
  return chosen.flatMap((train) => {
    const row = measured.train.map(String).indexOf(String(influence.labels.train[train]));
    if (row < 0 || column < 0) return [];
    const change = influence.labels.train_size![train] * (measured.weight - 1);
    return measured.step.map((step, k) => ({
      step,
      train,
      value: effect[(k * measured.train.length + row) * measured.query.length + column] / change / unit,
    }));
  });
}

async function lossCurves({ run, store, influence, query, state }: Context, steps: number[], width: number) {
  const { losses } = run;
  const at = losses.query.map(String).indexOf(String(influence.labels.query[query]));
  const lines = [
    { name: losses.of === null ? "training set" : `${stepText(losses.of)} of training`, values: losses.train, colour: "var(--ink)" },
    ...(at < 0 ? [] : [{ name: short(losses.query[at], 14), values: Array.from((await store.numbers("losses", [at, null])).data), colour: "var(--harmful)" }]),
  ];
  const points = lines.flatMap((line) => losses.step.map((step, k) => ({ step, loss: line.values[k], ...line })));
  return Plot.plot({
    width,
    height: 130,
    marginRight: 110,
    marginLeft: 52,
    ariaLabel: "Mean losses over training",
    x: stepAxis(steps),
    y: { label: "mean loss (nats)", labelArrow: "none", zero: true, grid: true, ticks: 4 },
    marks: [
      Plot.lineY(points, { x: "step", y: "loss", stroke: "colour", z: "name" }),
      Plot.dot(points, { x: "step", y: "loss", fill: "colour", r: 1.8 }),
      endLabels(lines.map((line) => ({ step: losses.step.at(-1)!, value: line.values.at(-1)!, text: line.name, colour: line.colour }))),
      Plot.ruleX([state.step], { stroke: "var(--ink)", strokeWidth: 1.5 }),
    ],
  });
}

type End = { step: number; value: number; text: string; colour: string };

const LINE = 13; // pixels

// Labels at the ends of curves, pushed apart where they would cover each other.
function endLabels(ends: End[]): Plot.Markish {
  return (_index, scales, _channels, dimensions) => {
    const group = document.createElementNS("http://www.w3.org/2000/svg", "g");
    const placed = ends.map((end) => ({ ...end, x: scales.x!(end.step)!, y: scales.y!(end.value)! })).sort((a, b) => a.y - b.y);
    // Downwards from the first, but not below the axis.
    const lowest = dimensions.height - dimensions.marginBottom - LINE * (placed.length - 1);
    let last = -Infinity;
    for (const [k, end] of placed.entries()) {
      last = Math.max(last + LINE, Math.min(end.y, lowest + LINE * k));
      const text = document.createElementNS("http://www.w3.org/2000/svg", "text");
      const attributes = { x: end.x + 8, y: last, dy: "0.32em", "text-anchor": "start", fill: end.colour };
      for (const [name, value] of Object.entries(attributes)) text.setAttribute(name, String(value));
      text.textContent = end.text;
      group.append(text);
    }
    return group;
  };
}

function listed({ set }: Context, events: Event[]): Node {
  if (!events.length) return h("p", { class: "muted" }, "No flip or peak of these curves is clear of noise.");
  const items = events.map((e) =>
    h("li", {}, h("button", { type: "button", class: "link", click: () => set({ step: e.step, train: String(e.train) }) }, described(e))),
  );
  return h("details", { class: "events" }, h("summary", {}, `${events.length} flips and peaks`), h("ul", {}, items));
}

function described(e: Event): string {
  const when = e.lower === e.upper ? `at step ${number(e.step)}` : `at step ${Math.round(e.step)}, between ${e.lower} and ${e.upper}`;
  return `${short(e.train)}: ${e.kind} ${when}`;
}

function level(e: Event, unit: number): number {
  return e.kind === "flip" ? 0 : (e.detail.value ?? 0) / unit;
}
