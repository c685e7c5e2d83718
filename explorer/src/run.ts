// What the store says of a run, in types; written by contents.py.
import type { Store } from "./store";

export const FORMAT = 1;

export type Label = string | number;
export type Event = {
  kind: string;
  train: Label;
  query: Label;
  step: number;
  lower: number;
  upper: number;
  detail: { value?: number; sign?: number; at_edge?: boolean };
};
export type Stage = { query: Label | null; name: string; step: number; lower: number; upper: number };
export type Entry = {
  path: string;
  name: string;
  rung: "exact" | "estimated" | "imported";
  checked: boolean; // what was measured is of these rows, in nats
  unit: string;
  of: "group" | "sample" | "token";
  events: Event[];
  noisy: boolean;
  reach: number; // of a 95 % interval, in standard errors
  largest: number; // between different labels
  step: number[];
  large: boolean; // and read piece by piece
  by_step: boolean; // has pieces for rankings, too
};
export type Scores = {
  against: string;
  name: string;
  step: number[];
  correlation: (number | null)[];
  correlation_lower: (number | null)[];
  correlation_upper: (number | null)[];
  slope: (number | null)[];
  slope_lower: (number | null)[];
  slope_upper: (number | null)[];
};
export type Run = {
  format: number;
  id: string; // of this writing of the store
  title: string;
  window: number | null;
  losses: { step: number[]; query: Label[]; train: number[]; of: number | null };
  stages: Stage[];
  omitted: Record<string, string>;
  notes: string[];
  configuration: unknown;
  provenance: Record<string, string>;
  influences: Entry[];
  agreements: Scores[];
  diagnostics: { step: number[]; columns: Record<string, unknown[]>; limits: Record<string, number> };
  measured?: {
    step: number[];
    train: Label[];
    query: Label[];
    other: boolean[][];
    weight: number;
    window: number;
    errors: boolean;
  };
  replay?: string;
  two_times?: { trained: number[]; trained_stop: number[]; asked: number[]; train: Label[]; query: Label[]; unit: string };
  map?: { step: number[]; share: number[][]; reach: number };
  draws?: { step: number[] };
  samples?: { image?: number[]; row?: number; text?: number };
};
// Documents of their own, as there may be many samples.
export type Exemplars = { query: Label; step: number; estimator: string; document: number }[];
export type Mapped = { names: string[]; label: number[]; sample: number[] };
export type Named = { sample: number[]; label: string[] };

export type Values = { value: Float32Array; stderr: Float32Array };

type Labels = { step: number[]; train: Label[]; query: Label[]; train_size: number[] | null };
type Orders = { order: { train: number[] | null; query: number[] | null }; own: number[][] };

// One influence, (step, train, query). Positions, not labels, go in and out.
export class Influence {
  private static readonly opened = new Map<string, Influence>();
  private readonly places: { train: Map<string, number>; query: Map<string, number> };

  private constructor(
    private store: Store,
    readonly entry: Entry,
    readonly labels: Labels & Orders,
  ) {
    const places = (all: Label[]) => new Map(all.map((label, k) => [String(label), k]));
    this.places = { train: places(labels.train), query: places(labels.query) };
  }

  static async open(store: Store, entry: Entry): Promise<Influence> {
    const known = this.opened.get(entry.path);
    if (known) return known;
    const influence = new Influence(store, entry, await store.attributes<Labels & Orders>(entry.path));
    this.opened.set(entry.path, influence);
    return influence;
  }

  // The position of a label, -1 if there is none.
  place(of: "train" | "query", label: Label): number {
    return this.places[of].get(String(label)) ?? -1;
  }

  // Of one training datum on one query, at every step.
  async curve(train: number, query: number): Promise<Values> {
    const { step, train: trains, query: queries } = this.labels;
    return this.both(async (name) => {
      if (this.entry.large) return this.read(`by_query/${name}`, [query, train, null]);
      const all = await this.read(name);
      return Float32Array.from(step, (_, k) => all[(k * trains.length + train) * queries.length + query]);
    });
  }

  // Of all training data on one query at one step.
  async ranking(step: number, query: number): Promise<Values> {
    const { train, query: queries } = this.labels;
    return this.both(async (name) => {
      if (this.entry.by_step) return this.read(`by_step/${name}`, [step, query, null]);
      if (this.entry.large) return this.read(`by_query/${name}`, [query, null, step]);
      const all = await this.read(name);
      return Float32Array.from(train, (_, k) => all[(step * train.length + k) * queries.length + query]);
    });
  }

  // Of all training data on all queries at one step, (query, train).
  async whole(step: number): Promise<Values> {
    const { train, query } = this.labels;
    return this.both(async (name) => {
      if (this.entry.by_step) return this.read(`by_step/${name}`, [step, null, null]);
      if (this.entry.large) return this.read(`by_query/${name}`, [null, null, step]);
      const all = await this.read(name);
      const at = (k: number) => (step * train.length + (k % train.length)) * query.length + Math.floor(k / train.length);
      return Float32Array.from({ length: train.length * query.length }, (_, k) => all[at(k)]);
    });
  }

  // All rows at one step, (row, query); of a large one those that reach furthest.
  async matrix(step: number): Promise<Values & { rows: number[] }> {
    const { train, query } = this.labels;
    if (this.entry.large) {
      const rows = Array.from(await this.read("strongest/row", [step, null]));
      return { rows, ...(await this.both((name) => this.read(`strongest/${name}`, [step, null, null]))) };
    }
    const size = train.length * query.length;
    const both = await this.both(async (name) => (await this.read(name)).subarray(step * size, (step + 1) * size));
    return { rows: train.map((_, k) => k), ...both };
  }

  private async both(read: (name: string) => Promise<Float32Array>): Promise<Values> {
    const value = await read("value");
    return { value, stderr: this.entry.noisy ? await read("stderr") : new Float32Array(value.length) };
  }

  private async read(name: string, selection: (number | null)[] = []): Promise<Float32Array> {
    return (await this.store.numbers(`${this.entry.path}/${name}`, selection)).data as Float32Array;
  }
}
