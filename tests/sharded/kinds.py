"""Kinds of models and checkpoints that two processes hold together, each with the influence found."""

import problem
import torch
from problem import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.tensor import Shard

import stagewise as sw

COLUMNS = {"shard_placement_fn": lambda parameter: Shard(parameter.ndim - 1)}
WITHOUT_PADDING = {"train": torch.arange(45).reshape(15, 3) % 10 + 1, "val": torch.arange(15).reshape(5, 3) % 7 + 1}


def loss(model, batch):
    tokens, targets = batch
    return nn.functional.cross_entropy(model(tokens).mT, targets, reduction="none")


def task(model, looked_up=True):
    """Tokens of the task, with the padding among them or without."""
    plain = problem.task(problem.made())
    sets = {"train": plain.train.batch(slice(0, 15)), "val": plain.queries["val"].batch(slice(0, 5))}
    if not looked_up:
        sets = {name: (WITHOUT_PADDING[name], targets) for name, (_, targets) in sets.items()}
    groups = [str(row % 3) for row in range(15)]
    return sw.Task(model, loss, train=sets["train"], queries={"val": sets["val"]}, train_groups=groups, forward_batch=5)


def influence(of, model, run=None, looked_up=True, **given):
    asked = {"window": 2, "order": problem.BATCHES} | given
    return of(task(model, looked_up), run or problem.normed_run(), **asked).value.values


def drawn(model, out):
    settings = problem.BY_HAND | {"step_size": 0.1, "split": False}
    store = sw.sharded.sample(task(model), problem.normed_run(), problem.POSTERIOR, out=out, **settings)
    return store.load(0)["train"].loss.values


def recomputing(model):
    apply_activation_checkpointing(model, check_fn=lambda layer: isinstance(layer, problem.Layer))
    return model


def kinds(shard, out):
    exact = sw.sharded.window_influence
    own = problem.checkpoint(dtype=torch.float64)

    def of_shards():
        model = shard(problem.made(torch.float64))
        saved = own.holding(params=model.state_dict())
        return influence(exact, model, sw.Trajectory.from_checkpoints([saved]), window=1)

    def refused():
        try:
            return influence(exact, shard(problem.normed(tied=True)), problem.normed_run(tied=True))
        except ValueError as error:
            return str(error)

    return {
        "one update, in columns": influence(exact, problem.sharded(problem.normed(), **COLUMNS), window=1),
        "tied": influence(
            exact, shard(problem.normed(tied=True)), problem.normed_run(tied=True), looked_up=False, window=1
        ),
        "tied, looked up": refused(),
        "recomputing": influence(exact, shard(recomputing(problem.normed()))),
        "of shards": of_shards(),
        "drawn, in columns": drawn(problem.sharded(problem.normed(), **COLUMNS), out / "in columns"),
    }
