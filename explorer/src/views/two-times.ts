// What training at one time did to the loss at another: the triangle trained x asked of the chosen pair.
import * as Plot from "@observablehq/plot";
import { roomFor, stepAxis } from "../axes";
import { diverging } from "../colour";
import type { Context } from "../context";
import { h } from "../dom";
import { figure, pressed } from "../figure";
import { number, short, sign } from "../words";
import { scale } from "./matrix";

const LINEAR = 0.02; // of the largest: below it colours are linear, above logarithmic, as lessons fade by orders of magnitude

export async function twoTimes(context: Context): Promise<Node> {
  const { run, store, influence, state, set } = context;
  const times = run.two_times;
  if (!times) return h("p", { class: "empty" }, "Influence in two times was not computed in this run: set two_times in its configuration.");
  const find = (all: (string | number)[], label: string | number) => Math.max(0, all.map(String).indexOf(String(label)));
  const [train, query] = [find(times.train, influence.labels.train[context.train]), find(times.query, influence.labels.query[context.query])];
  const { data } = await store.numbers("two_times/value", [train, query, null, null]);
  const before = [times.trained[0], ...times.asked];
  const cells = times.asked.flatMap((asked, a) =>
    times.trained.flatMap((trained, b) => {
      const value = data[a * times.trained.length + b];
      return trained >= asked ? [] : [{ trained, stop: times.trained_stop[b], from: before[a], asked, value }];
    }),
  );
  const limit = Math.max(...cells.map((cell) => Math.abs(cell.value) || 0)) || 1;
  const place = (value: number) => Math.asinh(value / (LINEAR * limit)) / Math.asinh(1 / LINEAR);
  const all = [...times.trained, ...times.trained_stop, ...times.asked];
  const width = roomFor(620);
  const told = (cell: (typeof cells)[number]) =>
    `trained in steps ${cell.trained} to ${cell.stop}, asked at ${cell.asked}: ` +
    (Number.isFinite(cell.value) ? `${number(cell.value)} ${times.unit}, ${sign(cell.value)}` : "training again did not bear the number out");
  const picture = Plot.plot({
    width,
    height: Math.round(width * 0.85),
    marginLeft: 60,
    marginBottom: 44,
    ariaLabel: "Influence in two times: trained on across, asked up",
    x: stepAxis(all, "trained on at: training step (log scale)"),
    y: { ...stepAxis(all, "asked at"), labelAnchor: "top" } as Plot.ScaleOptions,
    marks: [
      Plot.rect(cells, { x1: "trained", x2: "stop", y1: "from", y2: "asked", fill: (cell) => (Number.isFinite(cell.value) ? diverging(place(cell.value)) : "var(--shade)"), stroke: "var(--paper)", strokeWidth: 0.5, title: (cell) => told(cell) }),
      Plot.ruleX([state.step], { stroke: "var(--ink)", strokeWidth: 1 }),
    ],
  });
  pressed(picture, (k) => set({ step: cells[k].trained }));
  const caption =
    `When ${short(times.train[train], 40)} was trained on (across), and what that did to the loss on ${short(times.query[query], 40)} at a later step (up): exact, by differentiating the run itself. ` +
    "Read upwards what becomes of one lesson, across which lessons a loss is made of. Press a cell to go to its step. Grey: training again did not bear the number out.";
  const rows = cells.map((cell) => [cell.trained, cell.stop, cell.asked, cell.value]);
  return figure("two-times", "Influence in two times", h("div", {}, picture, scale(limit, times.unit)), caption, { columns: ["trained from", "trained to", "asked", `value (${times.unit})`], rows });
}
