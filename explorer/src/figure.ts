// A figure with its caption, and its numbers and picture to take away.
import { h } from "./dom";
import { csv } from "./words";

export type Table = { columns: string[]; rows: (string | number | null)[][] };

export function figure(name: string, title: string, picture: Element, caption: string, table: Table | (() => Table)): HTMLElement {
  const numbers = () => {
    const { columns, rows } = typeof table === "function" ? table() : table;
    return csv(columns, rows);
  };
  const said = h("span", { role: "status", class: "said" });
  const copy = async () => {
    await navigator.clipboard.writeText(numbers());
    said.textContent = "copied";
  };
  for (const one of [picture, ...picture.querySelectorAll("svg")]) if (one instanceof SVGSVGElement) named(one);
  const svg = picture instanceof SVGElement ? picture : picture.querySelector("svg:not([class*=swatch])");
  const buttons = [
    h("button", { type: "button", click: copy, title: "Copy the numbers as CSV" }, "copy CSV"),
    h("button", { type: "button", click: () => save(`${name}.csv`, new Blob([numbers()], { type: "text/csv" })) }, "CSV"),
  ];
  if (svg instanceof SVGSVGElement) {
    buttons.push(
      h("button", { type: "button", click: () => save(`${name}.svg`, drawing(svg)) }, "SVG"),
      h("button", { type: "button", click: async () => save(`${name}.png`, await painted(svg)) }, "PNG"),
    );
  }
  return h("figure", { id: name }, h("h2", {}, title), picture, h("figcaption", {}, caption),
    h("div", { class: "take", role: "group", "aria-label": `Take away: ${title}` }, buttons, said));
}

// Press a rectangle of a picture: the position of its datum, which Plot keeps with it.
export function pressed(picture: Element, act: (k: number) => void): void {
  picture.querySelector("g[aria-label=rect]")?.addEventListener("click", (event) => {
    const k = (event.target as { __data__?: unknown }).__data__;
    if (typeof k === "number") act(k);
  });
}

// To a screen reader a picture is one thing with one name; its numbers are in the table to take away.
function named(svg: SVGSVGElement): void {
  svg.setAttribute("role", "img");
  svg.querySelectorAll("g[aria-label]").forEach((mark) => mark.removeAttribute("aria-label"));
}

function save(name: string, blob: Blob): void {
  const url = URL.createObjectURL(blob);
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// The picture with its colours as they are now: variables and inherited colours mean nothing outside of the page.
function drawing(svg: SVGSVGElement): Blob {
  const copy = svg.cloneNode(true) as SVGSVGElement;
  const style = getComputedStyle(svg);
  const { width, height } = svg.getBoundingClientRect();
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", String(width));
  copy.setAttribute("height", String(height));
  copy.setAttribute("style", `color:${style.color};background:${getComputedStyle(document.body).backgroundColor};font-family:sans-serif`);
  const text = new XMLSerializer().serializeToString(copy);
  const root = getComputedStyle(document.documentElement);
  const resolved = text.replace(/var\((--[\w-]+)\)/g, (_, name) => root.getPropertyValue(name).trim() || "currentColor");
  return new Blob([resolved], { type: "image/svg+xml" });
}

async function painted(svg: SVGSVGElement): Promise<Blob> {
  const { width, height } = svg.getBoundingClientRect();
  const image = new Image(width, height);
  const url = URL.createObjectURL(drawing(svg));
  image.src = url;
  await image.decode();
  const canvas = h("canvas", { width: 2 * width, height: 2 * height });
  const context = canvas.getContext("2d")!;
  context.scale(2, 2);
  context.drawImage(image, 0, 0, width, height);
  URL.revokeObjectURL(url);
  return new Promise((resolve, reject) =>
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("the picture could not be drawn"))), "image/png"),
  );
}
