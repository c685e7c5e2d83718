// The map of training samples by their loss kernel, moving through training.
import * as Plot from "@observablehq/plot";
import { roomFor } from "../axes";
import { ofLabel } from "../colour";
import type { Context } from "../context";
import { h } from "../dom";
import { figure } from "../figure";
import { dots, found } from "../many";
import type { Mapped } from "../run";
import { nearest } from "../state";
import { short, step as stepText } from "../words";

export async function map({ run, store, state, influence, set }: Context): Promise<Node> {
  if (!run.map) return h("p", { class: "empty" }, "There is no map: it needs chains that can be trusted, and samples with labels.");
  const steps = run.map.step;
  const { names, label, sample } = await store.document<Mapped>("map/samples");
  const at = nearest(steps, state.step);
  const { data, shape } = await store.numbers("map/value", [at, null, null]);
  const reach = 1.06 * run.map.reach || 1;
  const points = sample.map((number, k) => ({ number, label: label[k], x: data[k * shape[1]], y: data[k * shape[1] + 1] }));
  const chosen = influence.entry.of === "group" ? names.indexOf(state.train) : -1;
  const one = influence.entry.of === "sample" ? points.filter((point) => String(point.number) === state.train) : [];
  const width = roomFor(640);
  const picture = Plot.plot({
    width, height: width, margin: 20,
    ariaLabel: "Training samples by the likeness of their losses",
    x: { domain: [-reach, reach], axis: null }, y: { domain: [-reach, reach], axis: null },
    marks: [
      Plot.ruleX([0], { stroke: "var(--rule)" }), Plot.ruleY([0], { stroke: "var(--rule)" }),
      names.map((_, k) => dots(points.filter((p) => p.label === k), ofLabel(k), 5, chosen < 0 || k === chosen ? 0.85 : 0.25)),
      Plot.dot(one, { x: "x", y: "y", r: 7, stroke: "var(--ink)", strokeWidth: 2 }),
    ],
  });
  const say = found(picture, points,
    (k) => `sample ${points[k].number}: ${short(names[points[k].label], 60)}`,
    (k) => set({ train: influence.entry.of === "group" ? names[points[k].label] : String(points[k].number) }));
  const legend = h("ul", { class: "legend", "aria-label": "labels" }, names.map((name, k) =>
    h("li", {}, h("button", { type: "button", "aria-pressed": String(k === chosen), click: () => set({ train: name }) }, h("i", { style: `background:${ofLabel(k)}` }), short(name)))));
  const share = run.map.share[at].reduce((sum, part) => sum + part, 0);
  const caption =
    `${points.length.toLocaleString("en-US")} training samples at step ${stepText(steps[at])}, near each other where their losses rise and fall together over the draws (classical scaling of 1 − R, every step turned to the one before). ` +
    `Colours are labels, of which the map knows nothing. This plane holds ${(100 * share).toFixed(0)} % of all spread; the rest lies outside of it, noise of the draws too.`;
  const rows = points.map((p) => [steps[at], p.number, names[p.label], p.x, p.y]);
  return h("div", {}, figure("map", "Samples that are alike to the model", h("div", {}, picture, say), caption, { columns: ["step", "sample", "label", "x", "y"], rows }), legend);
}
