// Thousands of points or bars as one shape for each colour, which a browser draws at once; they are found by their place.
import type * as Plot from "@observablehq/plot";

export type Point = { x: number; y: number };
type Bar = [x1: number, y1: number, x2: number, y2: number];

export function dots(points: Point[], colour: string, width: number, opacity = 1): Plot.Markish {
  const shown = points.filter((p) => Number.isFinite(p.x) && Number.isFinite(p.y));
  return shape(shown.map((p) => [p.x, p.y, p.x, p.y]), { stroke: colour, "stroke-width": width, "stroke-linecap": "round", "stroke-opacity": opacity });
}

export function bars(all: Bar[], colour: string, opacity: number): Plot.Markish {
  return shape(all.filter((bar) => bar.every(Number.isFinite)), { stroke: colour, "stroke-opacity": opacity });
}

function shape(lines: Bar[], attributes: Record<string, string | number>): Plot.Markish {
  return (_index, { x, y }) => {
    const at = (place: number) => place.toFixed(1);
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", lines.map(([x1, y1, x2, y2]) => `M${at(x!(x1)!)},${at(y!(y1)!)}L${at(x!(x2)!)},${at(y!(y2)!)}`).join(""));
    for (const [name, value] of Object.entries(attributes)) path.setAttribute(name, String(value));
    return path;
  };
}

// The point under the pointer, or near it: what to say of it, and what a press does.
export function found(picture: Element, points: Point[], say: (k: number) => string, press: (k: number) => void): HTMLElement {
  const svg = (picture instanceof SVGSVGElement ? picture : picture.querySelector("svg")) as SVGSVGElement;
  const { x, y } = { x: (picture as unknown as Plot.Plot).scale("x")!, y: (picture as unknown as Plot.Plot).scale("y")! };
  const said = document.createElement("output");
  said.className = "say";
  const near = (event: MouseEvent): number => {
    const box = svg.getBoundingClientRect();
    const ratio = (svg.viewBox.baseVal.width || box.width) / box.width;
    const [left, top] = [(event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio];
    let [best, nearest] = [-1, REACH];
    points.forEach((point, k) => {
      const distance = Math.hypot(x.apply(point.x) - left, y.apply(point.y) - top);
      if (distance < nearest) [best, nearest] = [k, distance];
    });
    return best;
  };
  svg.addEventListener("pointermove", (event) => {
    const k = near(event);
    said.textContent = k < 0 ? "" : say(k);
    svg.style.cursor = k < 0 ? "" : "pointer";
  });
  svg.addEventListener("click", (event) => {
    const k = near(event);
    if (k >= 0) press(k);
  });
  return said;
}

const REACH = 12; // pixels
