// Colours: blue is helpful, red harmful, in every view; ten for labels that colour-blind readers can tell apart.
const LIGHT = ["#1d4f80", "#2b6ca3", "#9dc1de", "#fbfaf7", "#eab59f", "#b5452c", "#84290f"];
const DARK = ["#9cc9f0", "#5a9fd4", "#2f5a80", "#1d2024", "#7d4030", "#e0714f", "#ffb59b"];

export function dark(): boolean {
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

type Colour = [number, number, number];

// From -1, most helpful, to 1, most harmful.
export function diverging(place: number): string {
  return `rgb(${components(place).join(",")})`;
}

export function components(place: number): Colour {
  const stops = dark() ? DARK : LIGHT;
  const along = ((Math.max(-1, Math.min(1, Number.isFinite(place) ? place : 0)) + 1) / 2) * (stops.length - 1);
  const k = Math.min(stops.length - 2, Math.floor(along));
  const [low, high] = [hex(stops[k]), hex(stops[k + 1])];
  return low.map((c, i) => Math.round(c + (along - k) * (high[i] - c))) as Colour;
}

// Black or white, whichever can be read on a colour.
export function ink(place: number): string {
  const [r, g, b] = components(place).map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b < 0.179 ? "#fff" : "#000";
}

// Of the label at a position: the same in all views.
export function ofLabel(k: number): string {
  return `var(--c${k % 10})`;
}

function hex(text: string): Colour {
  return [1, 3, 5].map((k) => parseInt(text.slice(k, k + 2), 16)) as Colour;
}
