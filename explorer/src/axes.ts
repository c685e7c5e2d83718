// The axis of training steps, log(1 + step), and choosing a step on it by pointer.
import type * as Plot from "@observablehq/plot";
import { nearest } from "./state";

export function stepAxis(steps: number[], label = "training step (log scale)"): Plot.ScaleOptions {
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  const round = [0, ...[0, 1, 2, 3, 4, 5, 6, 7, 8].flatMap((k) => [10 ** k, 3 * 10 ** k])];
  const ticks = round.filter((tick) => tick >= first && tick <= last);
  const enough = ticks.length > 1 ? ticks : [...new Set([first, last])];
  return {
    type: "symlog",
    constant: 1,
    domain: first === last ? [first - 1, last + 1] : [first, last],
    ticks: enough,
    tickFormat: (tick: number) => (tick >= 1000 && tick % 1000 === 0 ? `${tick / 1000}k` : String(tick)),
    label,
    labelAnchor: "center",
    labelArrow: "none",
  } as Plot.ScaleOptions;
}

// Press or drag over the picture: the step nearest to the pointer.
export function chooseStep(picture: Element, steps: number[], choose: (step: number) => void): void {
  const svg = (picture instanceof SVGSVGElement ? picture : picture.querySelector("svg")) as SVGSVGElement;
  const x = (picture as unknown as Plot.Plot).scale("x") as { invert?: (at: number) => number } | undefined;
  if (!x?.invert) return;
  svg.style.cursor = "col-resize";
  svg.addEventListener("pointerdown", (down) => {
    // The place of the picture now: the first choice draws another in its stead.
    const box = svg.getBoundingClientRect();
    const wide = svg.viewBox.baseVal.width || box.width;
    let last = NaN;
    const at = (event: PointerEvent) => {
      const step = steps[nearest(steps, x.invert!(((event.clientX - box.left) * wide) / box.width))];
      if (step !== last) choose((last = step));
    };
    at(down);
    const stop = new AbortController();
    for (const end of ["pointerup", "pointercancel"]) window.addEventListener(end, () => stop.abort(), { signal: stop.signal });
    window.addEventListener("pointermove", at, { signal: stop.signal });
  });
}

// A unit in which numbers are short to write: 1, 10⁻³, 10⁻⁶, ...
export function scaleOf(largest: number): number {
  if (!Number.isFinite(largest) || largest === 0 || largest >= 0.01) return 1;
  return 10 ** (3 * Math.floor((Math.log10(largest) + 1) / 3));
}

// Pixels for a picture: what its column has, which is half of a wide window.
export function roomFor(most: number): number {
  const column = innerWidth >= 1500 ? (Math.min(innerWidth, 1984) - 80) / 2 : innerWidth - 40;
  return Math.round(Math.min(most, Math.max(280, column)));
}
