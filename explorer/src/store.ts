// The store: files baked into the page, else read beside it over HTTP; arrays by path and selection, each read once.
import * as zarr from "zarrita";
import type { AbsolutePath, AsyncReadable, RangeQuery } from "zarrita";

export const FROM_DISK =
  "This page reads its data over HTTP, which browsers refuse to pages opened from disk. Open it with " +
  "`stagewise explore RUN`, or make one file of it with `stagewise export RUN page.html`.";

const KEPT = 256; // reads that are remembered: a slider goes back and forth

type Remembered = <T>(key: string, read: () => Promise<T>) => Promise<T>;

// What was read lately, or is being read, is not read again; failures are.
function remembering(): Remembered {
  const reads = new Map<string, Promise<unknown>>();
  return <T>(key: string, read: () => Promise<T>) => {
    const known = reads.get(key);
    if (known) return known as Promise<T>;
    const reading = read();
    reading.catch(() => reads.delete(key));
    reads.set(key, reading);
    if (reads.size > KEPT) reads.delete(reads.keys().next().value!);
    return reading;
  };
}

export class Files implements AsyncReadable {
  private once = remembering();
  version = ""; // of the store; a server refuses another, and a cache does not mix them up

  constructor(
    private baked: Record<string, string>,
    private base: string,
  ) {}

  async get(key: AbsolutePath): Promise<Uint8Array | undefined> {
    const baked = this.baked[key.slice(1)];
    return baked === undefined ? this.fetched(key) : decoded(baked);
  }

  async getRange(key: AbsolutePath, range: RangeQuery): Promise<Uint8Array | undefined> {
    const baked = this.baked[key.slice(1)];
    if (baked !== undefined) {
      const all = decoded(baked);
      return "suffixLength" in range
        ? all.slice(all.length - range.suffixLength)
        : all.slice(range.offset, range.offset + range.length);
    }
    const bytes = "suffixLength" in range ? `-${range.suffixLength}` : `${range.offset}-${range.offset + range.length - 1}`;
    return this.fetched(key, { Range: `bytes=${bytes}` }, range);
  }

  private fetched(key: string, headers = {}, range?: RangeQuery): Promise<Uint8Array | undefined> {
    return this.once(`${key} ${JSON.stringify(headers)}`, () => this.asked(key, headers, range));
  }

  private async asked(key: string, headers: Record<string, string>, range?: RangeQuery): Promise<Uint8Array | undefined> {
    if (location.protocol === "file:") throw new Error(FROM_DISK);
    const response = await fetch(`${this.base}${key}${this.version && `?v=${this.version}`}`, { headers });
    if (response.status === 404) return undefined;
    if (response.status === 409) throw new Error("The results were written anew meanwhile: reload the page.");
    if (!response.ok) throw new Error(`reading ${key} failed: ${response.status} ${response.statusText}`);
    const bytes = new Uint8Array(await response.arrayBuffer());
    if (!range || response.status === 206) return bytes;
    // A server without byte ranges sends all.
    return "suffixLength" in range
      ? bytes.slice(bytes.length - range.suffixLength)
      : bytes.slice(range.offset, range.offset + range.length);
  }
}

function decoded(text: string): Uint8Array {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let k = 0; k < binary.length; k++) bytes[k] = binary.charCodeAt(k);
  return bytes;
}

export type Numbers = { data: Float32Array | Uint8Array; shape: number[] };

export class Store {
  private arrays = new Map<string, Promise<zarr.Array<"float32" | "uint8", Files>>>();
  private once = remembering();

  constructor(private files: Files) {}

  attributes<T>(path: string): Promise<T> {
    return this.once(`${path}/`, async () => (await zarr.open.v3(zarr.root(this.files).resolve(path), { kind: "group" })).attrs as T);
  }

  // A selection has an index, or null for all, for each dimension.
  numbers(path: string, selection: (number | null)[] = []): Promise<Numbers> {
    return this.once(`${path} ${JSON.stringify(selection)}`, () => this.read(path, selection));
  }

  document<T>(path: string): Promise<T> {
    return this.once(`${path}.json`, async () => {
      const bytes = await this.files.get(`/${path}.json`);
      if (!bytes) throw new Error(`${path}.json is not in the store`);
      return JSON.parse(new TextDecoder().decode(bytes)) as T;
    });
  }

  private async read(path: string, selection: (number | null)[]): Promise<Numbers> {
    if (!this.arrays.has(path)) {
      const opening = zarr.open.v3(zarr.root(this.files).resolve(path), { kind: "array" });
      this.arrays.set(path, opening as Promise<zarr.Array<"float32" | "uint8", Files>>);
    }
    const array = await this.arrays.get(path)!;
    const found = await zarr.get(array, selection.length ? selection : null);
    if (typeof found !== "object" || !("data" in found)) throw new Error(`${path}: a selection of one number`);
    return { data: found.data as Float32Array, shape: found.shape };
  }
}
