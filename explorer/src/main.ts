// Boot, controls, and which view is shown. Everything that is chosen stands in the address.
import "./explorer.css";
import type { Context, View } from "./context";
import { h } from "./dom";
import { Influence, FORMAT, type Entry, type Run } from "./run";
import { nearest, read, VIEWS, written, type State } from "./state";
import { Files, Store } from "./store";
import { chains } from "./views/chains";
import { data } from "./views/data";
import { map } from "./views/map";
import { matrix } from "./views/matrix";
import { proof } from "./views/proof";
import { timeline } from "./views/timeline";
import { twoTimes } from "./views/two-times";
import { short, step as stepText } from "./words";

const SHOWN: Record<(typeof VIEWS)[number], [string, View]> = {
  matrix: ["Matrix", matrix],
  "two-times": ["Two times", twoTimes],
  data: ["Data", data],
  proof: ["How do we know?", proof],
  map: ["Map", map],
  chains: ["Chains", chains],
};

class Page {
  private state: State;
  private drawing = 0;
  private readonly controls = h("section", { class: "controls", "aria-label": "what is looked at" });
  private readonly tabs = h("nav", { "aria-label": "views" });
  private readonly time = h("section", { "aria-label": "over training" });
  private readonly view = h("section", { "aria-label": "view" });

  constructor(
    private run: Run,
    private store: Store,
    private root: HTMLElement,
  ) {
    this.state = { view: "matrix", by: run.influences[0].path, query: "", step: NaN, train: "", beside: null, ...read(location.hash) };
    const when = run.window ? `during the ${run.window} training steps after a checkpoint` : "around a checkpoint";
    root.replaceChildren(
      h("header", {}, h("p", { class: "kicker" }, "stagewise"), h("h1", {}, run.title),
        h("p", { class: "muted" }, `Influence of training data ${when}: the change of a query's loss per unit of weight. `, h("b", { class: "helpful" }, "Negative is helpful"), ", ", h("b", { class: "harmful" }, "positive is harmful"), ".")),
      this.controls,
      h("main", {}, this.time, h("div", {}, this.tabs, this.view)),
      h("footer", { class: "muted" }, "Keys: ← → step, ↑ ↓ query, 1 to 6 view. ", inRunFolder() ? h("a", { href: "../report.html" }, "The printed report") : null, details(run)),
    );
    addEventListener("hashchange", () => this.show(read(location.hash)));
    addEventListener("keydown", (event) => this.key(event));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.show({}));
    addEventListener("resize", debounced(() => this.show({})));
  }

  set = (change: Partial<State>) => {
    const next = written({ ...this.state, ...change });
    history.replaceState(null, "", next);
    void this.show(change);
  };

  async show(change: Partial<State>): Promise<void> {
    this.state = { ...this.state, ...change };
    const turn = ++this.drawing;
    try {
      const context = await this.context();
      if (turn !== this.drawing) return;
      this.draw(context);
      const shown = SHOWN[context.state.view as keyof typeof SHOWN] ?? SHOWN.matrix;
      const [time, view] = await Promise.all([timeline(context), shown[1](context)]);
      if (turn !== this.drawing) return; // something else was chosen meanwhile
      this.time.replaceChildren(time);
      this.view.replaceChildren(view);
      this.root.dataset.done = String(Number(this.root.dataset.done ?? 0) + 1);
    } catch (error) {
      this.view.replaceChildren(h("p", { class: "empty", role: "alert" }, error instanceof Error ? error.message : String(error)));
      throw error;
    }
  }

  private async context(): Promise<Context> {
    const entry = this.run.influences.find((one) => one.path === this.state.by) ?? this.run.influences[0];
    const influence = await Influence.open(this.store, entry);
    const { labels } = influence;
    const query = Math.max(0, influence.place("query", this.state.query));
    const wanted = Number.isFinite(this.state.step) ? this.state.step : labels.step[Math.floor(labels.step.length / 2)];
    const step = nearest(labels.step, wanted);
    let train = influence.place("train", this.state.train);
    if (train < 0) train = furthest((await influence.ranking(step, query)).value, labels.own[query]);
    this.state = { ...this.state, by: entry.path, query: String(labels.query[query]), step: labels.step[step], train: String(labels.train[train]) };
    return { run: this.run, store: this.store, state: this.state, influence, query, step, train, set: this.set };
  }

  private draw({ influence, query, step, state }: Context): void {
    const { labels } = influence;
    const focused = document.activeElement?.id;
    const choose = (name: string, options: HTMLOptionElement[], changed: (value: string) => void) =>
      h("span", {}, h("label", { for: name }, name), h("select", { id: name, change: (e: Event) => changed((e.target as HTMLSelectElement).value) }, options));
    const slider = h("input", { id: "step", type: "range", min: 0, max: labels.step.length - 1, value: step, "aria-valuetext": `step ${labels.step[step]}`, input: (e: Event) => this.set({ step: labels.step[Number((e.target as HTMLInputElement).value)] }) });
    slider.value = String(step);
    const trains = labels.train.length <= 2000 ? choose("of", labels.train.map((label) => h("option", { value: label, selected: String(label) === state.train }, short(label, 40))), (train) => this.set({ train }))
      : h("span", {}, h("label", { for: "of" }, "of"), h("input", { id: "of", value: state.train, size: 8, change: (e: Event) => this.set({ train: (e.target as HTMLInputElement).value }) }));
    this.controls.replaceChildren(
      h("span", {}, h("label", { for: "step" }, "step "), slider, h("output", { for: "step" }, ` ${stepText(labels.step[step])} (${step + 1} of ${labels.step.length})`)),
      choose("on query", labels.query.map((label, k) => h("option", { value: label, selected: k === query }, short(label, 40))), (chosen) => this.set({ query: chosen })),
      trains,
      choose("by", this.run.influences.map((entry) => h("option", { value: entry.path, selected: entry.path === state.by }, described(entry))), (by) => this.set({ by })),
      h("button", { type: "button", class: "link", click: () => this.set({ view: "proof" }) }, "how do we know?"),
    );
    if (focused) document.getElementById(focused)?.focus();
    this.tabs.replaceChildren(...VIEWS.map((name) => h("a", { href: written({ ...state, view: name }), "aria-current": name === state.view ? "page" : null }, SHOWN[name][0])));
  }

  private key(event: KeyboardEvent): void {
    const target = event.target as HTMLElement;
    if (event.ctrlKey || event.metaKey || event.altKey || ["INPUT", "SELECT", "TEXTAREA"].includes(target.tagName) || target.closest?.(".wide")) return;
    const along = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const down = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    const view = VIEWS[Number(event.key) - 1];
    if (view) this.set({ view });
    else if (along || down) {
      event.preventDefault();
      void this.context().then(({ influence: { labels }, step, query }) => {
        if (along) this.set({ step: labels.step[clamp(step + along, labels.step.length)] });
        else this.set({ query: String(labels.query[clamp(query + down!, labels.query.length)]) });
      });
    }
  }
}

function clamp(k: number, length: number): number {
  return Math.max(0, Math.min(length - 1, k));
}

function described(entry: Entry): string {
  return `${entry.name} of ${entry.of}s (${entry.rung})`;
}

function furthest(value: Float32Array, own: number[]): number {
  let best = -1;
  value.forEach((one, k) => {
    if (!own.includes(k) && Number.isFinite(one) && (best < 0 || Math.abs(one) > Math.abs(value[best]))) best = k;
  });
  return Math.max(0, best);
}

function details(run: Run): Node {
  return h("details", {}, h("summary", {}, "configuration and versions"), h("pre", { tabindex: 0 }, JSON.stringify({ provenance: run.provenance, configuration: run.configuration }, null, 1)));
}

// As against a page that was exported, or one that is served alone.
function inRunFolder(): boolean {
  return location.pathname.endsWith("/explorer/index.html");
}

function debounced(act: () => void): () => void {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(act, 150) as unknown as number;
  };
}

async function start(): Promise<void> {
  const root = document.getElementById("app")!;
  try {
    const baked = JSON.parse(document.getElementById("baked")!.textContent!);
    const files = new Files(baked, "data.zarr");
    const store = new Store(files);
    const run = await store.attributes<Run>("");
    files.version = run.id;
    if (run.format !== FORMAT) throw new Error(`this page reads data of format ${FORMAT}, and these are of format ${run.format}: write them again with \`stagewise report RUN\``);
    if (!run.influences.length) throw new Error("no checkpoint of this run could be answered; the report says why");
    await new Page(run, store, root).show({});
  } catch (error) {
    if (!root.dataset.done) root.replaceChildren(h("p", { class: "empty", role: "alert" }, error instanceof Error ? error.message : String(error)));
    throw error;
  }
}

void start();
