// What is looked at. It stands in the address, so that a link shows the same.
export type State = {
  view: string;
  by: string; // path of the influence
  query: string;
  step: number;
  train: string;
  beside: number | null; // another step, to be seen side by side
};

export const VIEWS = ["matrix", "two-times", "data", "proof", "map", "chains"] as const;

export function read(hash: string): Partial<State> {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const state: Partial<State> = {};
  for (const name of ["view", "by", "query", "train"] as const) {
    const value = given.get(name);
    if (value !== null) state[name] = value;
  }
  const [step, beside] = ["step", "beside"].map((name) => parseFloat(given.get(name) ?? ""));
  if (Number.isFinite(step)) state.step = step;
  return { ...state, beside: Number.isFinite(beside) ? beside : null };
}

export function written(state: State): string {
  const { beside, step, ...texts } = state;
  const all: Record<string, string> = { ...texts, step: String(step) };
  if (beside !== null) all.beside = String(beside);
  return `#${new URLSearchParams(all)}`;
}

// The position of the step nearest to a given one.
export function nearest(steps: number[], step: number): number {
  let best = 0;
  steps.forEach((one, k) => {
    if (Math.abs(one - step) < Math.abs(steps[best] - step)) best = k;
  });
  return best;
}
