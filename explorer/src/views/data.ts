// The training data themselves: the most helpful and the most harmful for the chosen query, at one step or at two.
import * as Plot from "@observablehq/plot";
import { roomFor, scaleOf } from "../axes";
import { diverging, ink } from "../colour";
import type { Context } from "../context";
import { h } from "../dom";
import { figure } from "../figure";
import { largest } from "../largest";
import { Influence, type Exemplars, type Named } from "../run";
import { nearest } from "../state";
import { number, plusMinus, short, sign, step as stepText, superscript } from "../words";

const PER_SIDE = 8;
const TOKENS = 400;

type Image = { shape: number[]; bytes: Uint8Array };
type Datum = { sample: number; token?: number; label: string; value: number; stderr: number; text?: string[]; tokens?: (number | null)[]; image?: Promise<Image>; row?: number[] };
type Document = { samples: number[]; labels: string[]; values: number[]; stderrs: number[]; texts: string[][] | null; token_values: (number | null)[][] | null; images: { shape: number[]; bytes: string }[] | null };

export async function data(context: Context): Promise<Node> {
  const { state, run, set } = context;
  const own = await ofSingle(context);
  const choice = h("select", { id: "beside", change: (e: Event) => { const at = (e.target as HTMLSelectElement).value; set({ beside: at ? Number(at) : null }); } },
    h("option", { value: "" }, "one step"), run.losses.step.map((step) => h("option", { value: step, selected: step === state.beside }, `beside step ${stepText(step)}`)));
  const steps = state.beside === null ? [state.step] : [state.step, state.beside];
  const panels = await Promise.all(steps.map((step) => (own ? ranked(context, own, step) : picked(context, step))));
  return h("div", {}, h("p", {}, h("label", { for: "beside" }, "Show "), choice), h("div", { class: "beside" }, panels));
}

// The influence of single samples or tokens by the chosen estimator, else by another.
async function ofSingle({ run, store, influence }: Context): Promise<Influence | null> {
  if (influence.entry.of !== "group") return influence;
  const single = run.influences.filter((entry) => entry.of !== "group");
  const entry = single.find((one) => one.name === influence.entry.name) ?? single[0];
  return entry ? Influence.open(store, entry) : null;
}

async function ranked(context: Context, single: Influence, wanted: number): Promise<Node> {
  const { labels, entry } = single;
  const query = single.place("query", context.state.query);
  if (query < 0) return h("p", { class: "empty" }, `${entry.name} of single ${entry.of}s was not computed for this query.`);
  const at = nearest(labels.step, wanted);
  const { value, stderr } = await single.ranking(at, query);
  // Where there is noise by value / stderr, so that what is large but doubtful does not lead.
  const noisy = stderr.some((one) => one > 0); // at this step: others may be without noise
  const weight = (k: number) => (noisy ? (stderr[k] > 0 ? value[k] / stderr[k] : 0) : value[k]);
  const known = Array.from(value.keys()).filter((k) => Number.isFinite(value[k]));
  const helpful = largest(PER_SIDE, value.length, (k) => (value[k] < 0 ? -weight(k) : NaN));
  const harmful = largest(PER_SIDE, value.length, (k) => (value[k] > 0 ? weight(k) : NaN));
  const shown = (chosen: number[]) => Promise.all(chosen.map((k) => datum(context, String(labels.train[k]), value[k], stderr[k], entry.of === "token" ? { labels, value } : null)));
  const title = `Step ${stepText(labels.step[at])}`;
  const place = single.place("train", context.state.train);
  const histogram = spread(value, entry.unit, title, place >= 0 && context.influence.entry.of === entry.of ? value[place] : null, () => ({
    columns: ["step", entry.of, "query", `value (${entry.unit})`, "stderr"],
    rows: known.sort((a, b) => weight(a) - weight(b)).map((k) => [labels.step[at], labels.train[k], labels.query[query], value[k], stderr[k]]),
  }));
  const clear = known.filter((k) => (noisy ? Math.abs(value[k]) > 2 * stderr[k] : value[k] !== 0)).length;
  const said = `${entry.name} of ${known.length.toLocaleString("en-US")} ${entry.of}s on ${short(labels.query[query], 40)}: ${clear.toLocaleString("en-US")} are ${noisy ? "more than two standard errors from zero" : "not zero"}. Extremes picked from many look larger than they are.`;
  return panel(context, title, said, histogram, ...(await Promise.all([shown(helpful), shown(harmful)])), entry.path, entry.unit);
}

// Of runs that keep the samples that matter most alone.
async function picked(context: Context, wanted: number): Promise<Node> {
  const all = await context.store.document<Exemplars>("exemplars");
  const there = all.filter((one) => String(one.query) === context.state.query);
  if (!there.length) {
    const others = [...new Set(all.map((one) => String(one.query)))];
    const links = others.map((query) => h("li", {}, h("button", { type: "button", class: "link", click: () => context.set({ query }) }, short(query, 40))));
    return h("div", { class: "empty" }, h("p", {}, "Single training samples were not looked at for this query: set per: sample in the configuration."), others.length ? h("p", {}, "They were for:") : null, h("ul", {}, links));
  }
  const one = there[nearest(there.map((each) => each.step), wanted)];
  const found = await context.store.document<Document>(`exemplars/${one.document}`);
  const data: Datum[] = found.samples.map((sample, k) => ({
    sample, label: found.labels[k], value: found.values[k], stderr: found.stderrs[k],
    text: found.texts?.[k], tokens: found.token_values?.[k],
    image: found.images ? Promise.resolve({ shape: found.images[k].shape, bytes: Uint8Array.from(atob(found.images[k].bytes), (c) => c.charCodeAt(0)) }) : undefined,
  }));
  const once = [...new Map(data.map((each) => [each.sample, each])).values()].sort((a, b) => a.value - b.value);
  const said = `The training samples that mattered most for ${short(one.query, 40)}, by ${one.estimator}. Extremes picked from many look larger than they are.`;
  return panel(context, `Step ${stepText(one.step)}`, said, null, once.filter((each) => each.value < 0).slice(0, PER_SIDE), once.filter((each) => each.value > 0).reverse().slice(0, PER_SIDE), null, "nats per unit weight");
}

function panel(context: Context, title: string, said: string, histogram: Node | null, helpful: Datum[], harmful: Datum[], by: string | null, unit: string): Node {
  const limit = quantile([...helpful, ...harmful].flatMap((one) => (one.tokens ?? []).map((v) => Math.abs(v ?? 0))), 0.98) || 1;
  const side = (name: string, all: Datum[]) => h("section", { class: name.split(" ")[1] }, h("h3", {}, name), all.length ? h("ol", {}, all.map((one) => h("li", {}, card(context, one, limit, by, unit)))) : h("p", { class: "muted" }, "none"));
  return h("section", { class: "panel" }, h("h2", {}, title), h("p", { class: "muted" }, said), histogram, h("div", { class: "sides" }, side("most helpful", helpful), side("most harmful", harmful)));
}

function card(context: Context, one: Datum, limit: number, by: string | null, unit: string): Node {
  const name = one.token === undefined ? `sample ${one.sample}` : `token ${one.token} of sample ${one.sample}`;
  const train = one.token === undefined ? String(one.sample) : `${one.sample}/${one.token}`;
  const follow = by ? h("button", { type: "button", class: "link", title: "Show its influence over training", click: () => context.set({ by, train }) }, name) : h("span", {}, name);
  const value = h("span", { class: sign(one.value), title: unit }, plusMinus(one.value, one.stderr));
  return h("div", { class: "datum" }, one.image ? drawn(one.image, `${name}: ${one.label}`) : null, h("div", {}, follow, ` `, value, one.text ? null : h("div", { class: "label" }, short(one.label, 160)), one.row ? cells(one.row) : null, one.text ? passage(one, limit) : null));
}

async function datum(context: Context, name: string, value: number, stderr: number, tokens: { labels: { train: (string | number)[] }; value: Float32Array } | null): Promise<Datum> {
  const [sample, token] = name.split("/").map(Number);
  const { run, store } = context;
  const one: Datum = { sample, token, label: "", value, stderr };
  if (!run.samples) return one;
  const names = await store.document<Named>("samples/names");
  const place = names.sample.indexOf(sample);
  if (place < 0) return one;
  one.label = names.label[place];
  if (run.samples.image) {
    const reading = store.numbers("samples/image", [place, ...run.samples.image.map(() => null)]);
    one.image = reading.then(({ data, shape }) => ({ shape, bytes: data as Uint8Array }));
  } else if (run.samples.row) {
    one.row = Array.from((await store.numbers("samples/row", [place, null])).data);
  } else if (run.samples.text) {
    const texts = await store.document<string[][]>(`samples/text/${Math.floor(place / run.samples.text)}`);
    one.text = texts[place % run.samples.text].slice(0, TOKENS);
    if (tokens) one.tokens = ofTokens(one.text.length, sample, tokens);
  }
  return one;
}

function ofTokens(length: number, sample: number, { labels, value }: { labels: { train: (string | number)[] }; value: Float32Array }): (number | null)[] {
  const found: (number | null)[] = Array(length).fill(null);
  labels.train.forEach((label, k) => {
    const [of, token] = String(label).split("/").map(Number);
    if (of === sample && token < length) found[token] = value[k];
  });
  return found;
}

// Tokens in the colours of their influence; what a reader cannot see without colours stands in the titles.
function passage(one: Datum, limit: number): Node {
  return h("div", { class: "tokens", dir: "auto" }, one.text!.map((text, k) => {
    const value = one.tokens?.[k];
    const shown = text.replace(/\r\n/g, "\n").replace(/\n/g, "↵\n");
    if (value === null || value === undefined) return h("span", one.tokens ? { class: "uncounted", title: "not counted in the loss" } : {}, shown);
    const place = value / limit;
    const marked = [value > 0.25 * limit ? "up" : "", k === one.token ? "chosen" : ""].filter(Boolean).join(" ");
    return h("span", { class: marked || null, style: `background:${diverging(place)};color:${ink(place)}`, title: `${sign(value)}: ${number(value)}` }, shown);
  }));
}

// Numbers do not wait for pictures, which come in as they are read.
function drawn(image: Promise<Image>, name: string): Node {
  const canvas = h("canvas", { width: 1, height: 1, class: "image", role: "img", "aria-label": name });
  image.then(
    (read) => painted(canvas, read),
    (error) => (canvas.title = `the picture cannot be read: ${error}`),
  );
  return canvas;
}

function painted(canvas: HTMLCanvasElement, { shape, bytes }: Image): void {
  const [high, wide, channels = 1] = shape;
  [canvas.width, canvas.height] = [wide, high];
  const brush = canvas.getContext("2d")!;
  const pixels = brush.createImageData(wide, high);
  for (let k = 0; k < wide * high; k++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * k + c] = bytes[k * channels + (channels === 3 ? c : 0)];
    pixels.data[4 * k + 3] = 255;
  }
  brush.putImageData(pixels, 0, 0);
  canvas.dataset.painted = "";
}

function cells(row: number[]): Node {
  return h("div", { class: "row" }, row.map((value, k) => h("span", { title: `column ${k}` }, number(value))));
}

function spread(value: Float32Array, unit: string, title: string, chosen: number | null, table: () => { columns: string[]; rows: (string | number)[][] }): Node {
  const finite = Array.from(value).filter(Number.isFinite);
  const power = scaleOf(quantile(finite.map(Math.abs), 0.99));
  const width = roomFor(420);
  const ticks = [0, 1, 10, 100, 1000, 10000, 100000].filter((tick) => tick <= finite.length);
  const picture = Plot.plot({
    width, height: 150, marginTop: 24, marginLeft: 52,
    ariaLabel: `Influence of all, ${title}`,
    x: { label: `${power === 1 ? "" : `10${superscript(Math.round(Math.log10(power)))} `}${unit}; below zero = helpful`, labelAnchor: "center", labelArrow: "none" },
    y: { label: "how many", labelArrow: "none", type: "symlog", domain: [0, finite.length], ticks, tickFormat: (tick: number) => tick.toLocaleString("en-US") },
    marks: [Plot.rectY(finite, Plot.binX<Plot.RectYOptions>({ y: "count" }, { x: { value: (v: number) => v / power, thresholds: 40 }, fill: "var(--muted)" })), Plot.ruleX([0], { stroke: "var(--ink)" }), Plot.ruleX(chosen === null ? [] : [chosen / power], { stroke: "var(--harmful)", strokeWidth: 2 })],
  });
  return figure(`histogram-${title.replace(/\W+/g, "-").toLowerCase()}`, `All of them at ${title.toLowerCase()}`, picture, "How many training data have which influence, on a logarithmic scale.", table);
}

function quantile(sizes: number[], share: number): number {
  const sorted = sizes.filter((v) => v > 0).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : 0;
}
