// All training data on all queries at the chosen step, on one colour scale for all of training.
import * as Plot from "@observablehq/plot";
import { roomFor, scaleOf } from "../axes";
import { components, diverging } from "../colour";
import type { Context } from "../context";
import { h } from "../dom";
import { figure } from "../figure";
import { plusMinus, short, sign, step as stepText, superscript } from "../words";

const DOUBT = 2; // standard errors
const NAMED = 44;
const LEVELS = 256; // of each colour
const DOT = packed([138, 138, 138]);

let byLabel = false;

export async function matrix(context: Context): Promise<Node> {
  const { influence, step, set } = context;
  const { labels, entry } = influence;
  const { rows, value, stderr } = await influence.matrix(step);
  const shown = order(rows, byLabel ? null : labels.order.train);
  const columns = order(labels.query.map((_, k) => k), byLabel ? null : labels.order.query);
  const queries = labels.query.length;
  const at = new Map(rows.map((row, k) => [row, k]));
  const cell = (row: number, column: number) => at.get(row)! * queries + column;
  const limit = entry.largest;
  const width = roomFor(960);
  const left = entry.of === "group" ? 90 : 64;
  const height = Math.min(640, Math.max(160, 60 + 24 * shown.length));
  const named = (all: number[]) => all.filter((_, k) => k % Math.ceil(all.length / NAMED) === 0);
  const picture = Plot.plot({
    width,
    height,
    marginLeft: left,
    marginBottom: 56,
    ariaLabel: `Influence at step ${labels.step[step]}: training data down, queries across`,
    x: { type: "band", domain: columns, padding: 0, ticks: named(columns), tickFormat: (k: number) => short(labels.query[k], 10), tickRotate: queries > 12 ? -45 : 0, label: "query", tickSize: 0 },
    y: { type: "band", domain: shown, padding: 0, ticks: named(shown), tickFormat: (k: number) => short(labels.train[k], 12), label: `training ${entry.of}`, labelArrow: "none", tickSize: 0 },
    marks: [
      painted(shown, columns, entry.noisy, (row, column) => [value[cell(row, column)] / limit, Math.abs(value[cell(row, column)]) < DOUBT * stderr[cell(row, column)]]),
      Plot.cell([[context.query, context.train]].filter(() => at.has(context.train)), { x: "0", y: "1", fill: "none", stroke: "var(--ink)", strokeWidth: 2 }),
    ],
  });
  const say = h("output", { class: "say" }, told(context, at.has(context.train) ? cell(context.train, context.query) : -1, value, stderr));
  const under = (event: PointerEvent) => {
    const svg = (picture instanceof SVGSVGElement ? picture : picture.querySelector("svg")) as SVGSVGElement;
    const box = svg.getBoundingClientRect();
    const place = (all: number[], from: number, to: number, where: number) => all[Math.floor(((where - from) / (to - from)) * all.length)];
    const ratio = box.width / width;
    const column = place(columns, box.left + left * ratio, box.left + (width - 20) * ratio, event.clientX);
    const row = place(shown, box.top + 20 * ratio, box.top + (height - 56) * ratio, event.clientY);
    return row === undefined || column === undefined ? null : { row, column };
  };
  picture.addEventListener("click", (event) => {
    const found = under(event as unknown as PointerEvent);
    if (found) set({ query: String(labels.query[found.column]), train: String(labels.train[found.row]) });
  });
  picture.addEventListener("pointermove", (event) => {
    const found = under(event as PointerEvent);
    if (found) say.textContent = told({ ...context, train: found.row, query: found.column }, cell(found.row, found.column), value, stderr);
  });
  const few = rows.length < labels.train.length ? `the ${rows.length} of ${labels.train.length.toLocaleString("en-US")} ${entry.of}s that reach furthest at this step` : `every training ${entry.of}`;
  const caption =
    `Influence at step ${stepText(labels.step[step])} of ${few} (rows) on every query (columns); the colours are those of all steps, fullest at the largest influence between different labels. ` +
    (entry.noisy ? "A dot marks cells within two standard errors of zero. " : "") +
    "Press a cell to follow it.";
  const table = () => ({
    columns: ["step", "train", "query", `value (${entry.unit})`, "stderr"],
    rows: shown.flatMap((row) => columns.map((column) => [labels.step[step], labels.train[row], labels.query[column], value[cell(row, column)], stderr[cell(row, column)]])),
  });
  const sorting = h("label", { class: "inline" }, h("input", { type: "checkbox", checked: byLabel, change: (e: Event) => { byLabel = (e.target as HTMLInputElement).checked; set({}); } }), " in the order of the data, not of likeness");
  return h("div", {}, figure("matrix", "All pairs at this step", h("div", {}, picture, scale(limit, entry.unit), say), caption, table), sorting);
}

function told({ influence, train, query }: Context, cell: number, value: Float32Array, stderr: Float32Array): string {
  const { labels, entry } = influence;
  if (cell < 0) return "";
  const doubt = entry.noisy && Math.abs(value[cell]) < DOUBT * stderr[cell] ? "cannot be told from zero" : sign(value[cell]);
  return `${short(labels.train[train], 40)} on ${short(labels.query[query], 40)}: ${plusMinus(value[cell], stderr[cell])} ${entry.unit}, ${doubt}`;
}

function order(all: number[], alike: number[] | null): number[] {
  if (!alike) return all;
  const there = new Set(all);
  return alike.filter((k) => there.has(k));
}

// One image for all cells, of one pixel each, or of odd numbers of them with a dot in the middle: thousands of rectangles would be slow.
function painted(rows: number[], columns: number[], dotted: boolean, at: (row: number, column: number) => [number, boolean]): Plot.Markish {
  return (_index, _scales, _channels, { width, height, marginLeft, marginRight, marginTop, marginBottom }) => {
    const [wide, high] = [width - marginLeft - marginRight, height - marginTop - marginBottom];
    const down = !dotted ? 1 : rows.length * columns.length > 4096 ? 3 : 5;
    const along = !dotted ? 1 : Math.max(3, 1 + 2 * Math.round((down * wide * rows.length) / (high * columns.length) / 2));
    const canvas = h("canvas", { width: columns.length * along, height: rows.length * down });
    const brush = canvas.getContext("2d")!;
    const pixels = brush.createImageData(canvas.width, canvas.height);
    const whole = new Uint32Array(pixels.data.buffer);
    const known = Array.from({ length: 2 * LEVELS + 1 }, (_, k) => packed(components(k / LEVELS - 1)));
    rows.forEach((row, i) =>
      columns.forEach((column, j) => {
        const [place, doubtful] = at(row, column);
        const colour = known[Math.round(LEVELS * (1 + Math.max(-1, Math.min(1, place || 0))))];
        const corner = i * down * canvas.width + j * along;
        for (let k = 0; k < down; k++) whole.fill(colour, corner + k * canvas.width, corner + k * canvas.width + along);
        if (doubtful) whole[corner + ((down - 1) / 2) * canvas.width + (along - 1) / 2] = DOT;
      }),
    );
    brush.putImageData(pixels, 0, 0);
    const image = document.createElementNS("http://www.w3.org/2000/svg", "image");
    const place = { href: canvas.toDataURL(), x: marginLeft, y: marginTop, width: wide, height: high, preserveAspectRatio: "none", style: "image-rendering:pixelated" };
    for (const [name, one] of Object.entries(place)) image.setAttribute(name, String(one));
    return image as unknown as SVGElement;
  };
}

// As a pixel stands in memory.
function packed([red, green, blue]: [number, number, number]): number {
  return new Uint32Array(new Uint8Array([red, green, blue, 255]).buffer)[0];
}

export function scale(limit: number, unit: string): Node {
  const power = scaleOf(limit);
  const stops = Array.from({ length: 9 }, (_, k) => diverging(k / 4 - 1)).join(",");
  const end = (value: number) => (value / power).toPrecision(2).replace("-", "−");
  const text = power === 1 ? unit : `10${superscript(Math.round(Math.log10(power)))} ${unit}`;
  return h("div", { class: "scale" }, h("b", { class: "helpful" }, `helpful ${end(-limit)}`), h("i", { style: `background:linear-gradient(to right,${stops})` }), h("b", { class: "harmful" }, `${end(limit)} harmful`), ` ${text}`);
}
