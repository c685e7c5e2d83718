// The few of many that weigh most, heaviest first: ten thousand need not be sorted for eight. What is not a number is not among them.
export function largest(count: number, length: number, weight: (k: number) => number): number[] {
  const best: { k: number; w: number }[] = [];
  for (let k = 0; k < length; k++) {
    const w = weight(k);
    if (!Number.isFinite(w) || (best.length === count && w <= best[count - 1].w)) continue;
    const place = best.findIndex((other) => w > other.w);
    best.splice(place < 0 ? best.length : place, 0, { k, w });
    best.length = Math.min(best.length, count);
  }
  return best.map(({ k }) => k);
}
