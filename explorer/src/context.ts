// What every view is given: the run, what is looked at in it, and how to look at something else.
import type { Influence, Run } from "./run";
import type { State } from "./state";
import type { Store } from "./store";

export type Context = {
  run: Run;
  store: Store;
  state: State;
  influence: Influence;
  query: number; // positions in the influence's labels
  step: number;
  train: number;
  set: (change: Partial<State>) => void;
};

export type View = (context: Context) => Promise<Node>;
