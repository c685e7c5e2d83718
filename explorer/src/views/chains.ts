// Can the chains be trusted: verdicts and what they rest on, and the traces at the chosen step.
import * as Plot from "@observablehq/plot";
import { roomFor, stepAxis } from "../axes";
import type { Context } from "../context";
import { h, table } from "../dom";
import { figure } from "../figure";
import { number, step as stepText } from "../words";
import { nearest } from "../state";

const SHOWN: Record<string, string> = {
  rhat: "R-hat",
  ess_bulk: "effective draws",
  even_share: "share beyond first order",
  loss_rise: "loss rise (nats)",
};

export async function chains({ run, store, state, set }: Context): Promise<Node> {
  const { step: steps, columns, limits } = run.diagnostics;
  if (!steps.length) return h("p", { class: "empty" }, "There are no diagnostics, because no checkpoint was sampled.");
  const at = nearest(steps, state.step);
  const verdicts = columns.verdict as string[];
  const ok = columns.chains_ok as number[] | undefined;
  const value = (name: string, k: number) => {
    const one = (columns[name]?.[k] ?? null) as number | null;
    return name === "ess_bulk" && one !== null && ok ? one / Math.max(1, ok[k]) : one;
  };
  const names = Object.keys(SHOWN).filter((name) => columns[name]?.some((one) => one !== null));
  const rows = steps.map((step, k) => [
    h("button", { type: "button", class: "link", "aria-current": k === at ? "step" : null, click: () => set({ step }) }, stepText(step)),
    verdicts[k],
    ...names.map((name) => number(value(name, k))),
    String(columns.advice?.[k] ?? ""),
  ]);
  const width = roomFor(420);
  const panels = names.map((name) => {
    const points = steps.map((step, k) => ({ step, value: value(name, k) })).filter((point) => point.value !== null);
    const limit = limits[name];
    const title = name === "ess_bulk" ? "effective draws per chain" : SHOWN[name];
    const picture = Plot.plot({
      width, height: 170, marginLeft: 52,
      ariaLabel: `${title} over training`,
      x: stepAxis(steps), y: { label: title, labelArrow: "none", grid: true, ticks: 5 },
      marks: [
        Plot.ruleY(limit === undefined ? [] : [limit], { stroke: "var(--harmful)", strokeDasharray: "4,3" }),
        Plot.lineY(points, { x: "step", y: "value", stroke: "var(--ink)" }),
        Plot.dot(points, { x: "step", y: "value", fill: "var(--ink)", r: 2.5 }),
        Plot.ruleX([state.step], { stroke: "var(--muted)" }),
      ],
    });
    return figure(`chains-${name.replace("_", "-")}`, title, picture, limit === undefined ? "" : `Dashed: the threshold of a verdict, ${limit}.`, {
      columns: ["step", title], rows: points.map((point) => [point.step, point.value]),
    });
  });
  const heading = h("p", {}, h("strong", {}, `Step ${stepText(steps[at])}: ${verdicts[at]}. `), String(columns.advice?.[at] ?? ""));
  return h("div", {}, heading, await traces({ run, store, state, width: roomFor(960) }), h("div", { class: "panels" }, panels),
    table(["step", "verdict", ...names.map((name) => (name === "ess_bulk" ? "effective draws per chain" : SHOWN[name])), "what to change"], rows, "Verdict on the chains of every checkpoint"));
}

async function traces({ run, store, state, width }: Pick<Context, "run" | "store" | "state"> & { width: number }): Promise<Node | null> {
  if (!run.draws) return null;
  const at = nearest(run.draws.step, state.step);
  const { data, shape } = await store.numbers("draws", [at, null, null]);
  const points = Array.from(data as Float32Array, (loss, k) => ({ chain: Math.floor(k / shape[1]), draw: k % shape[1], loss })).filter((p) => Number.isFinite(p.loss));
  if (!points.length) return h("p", { class: "muted" }, `No draws were kept at step ${stepText(run.draws.step[at])}.`);
  const picture = Plot.plot({
    width, height: 220, marginLeft: 60, ariaLabel: "Mean training loss along the draws of every chain",
    x: { label: "draw", labelAnchor: "center", labelArrow: "none" }, y: { label: "mean training loss (nats)", labelArrow: "none", grid: true },
    marks: [Plot.lineY(points, { x: "draw", y: "loss", z: "chain", stroke: (p) => `var(--c${p.chain % 10})`, strokeWidth: 0.8, strokeOpacity: 0.7 })],
  });
  return figure("draws", `Chains at step ${stepText(run.draws.step[at])}`, picture, `Mean training loss along the draws of ${shape[0]} chains. Chains that agree and do not drift lie on each other.`, {
    columns: ["chain", "draw", "mean training loss (nats)"], rows: points.map((p) => [p.chain, p.draw, p.loss]),
  });
}
