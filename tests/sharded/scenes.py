"""What one process does, and two do together; results are compared in test_two_processes.py."""

import sys
from functools import partial
from pathlib import Path

import problem
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from apart import differing, failing, precision
from kinds import kinds
from torch.distributed.checkpoint.state_dict import get_state_dict

import stagewise as sw
from stagewise.checkpoints.shards import Index
from stagewise.derivatives import mean_gradient
from stagewise.sampling.base import standard_normal
from stagewise.sampling.noise import noise_source
from stagewise.sharded.fingerprint import fingerprint
from stagewise.sharded.lent import lent, loaded, point_at
from stagewise.traces.store import TraceStore

WINDOWS = {
    f"{kind}, {'clipped' if clip else 'not clipped'}": {"kind": kind, "clip_norm": clip, "dtype": torch.float64}
    for kind in ("sgd", "adam")
    for clip in (None, 0.05)
    if kind == "adam" or clip
}
DRAWN = {  # settings by name, each with whether the samples of a batch are divided
    "sgld, same": (False, {"sampler": "sgld", "step_size": 0.02}),
    "underdamped, minibatches, same": (False, {"step_size": 0.1, "batch_size": 6}),
    "rmsprop_sgld, same": (False, {"sampler": "rmsprop_sgld", "step_size": 0.001}),
    "underdamped, minibatches, split": (True, {"step_size": 0.1, "batch_size": 6}),
    "own minibatches, split": (True, {"step_size": 0.1, "batch_size": 6, "control_variate": False}),
}


def draws(shard, out):
    task = problem.task(shard(problem.made()))
    before = {name: tensor.clone() for name, tensor in task.state().items()}
    for name, (split, settings) in DRAWN.items():
        sw.sharded.sample(
            task, problem.run(), problem.POSTERIOR, out=out / name, split=split, **problem.BY_HAND | settings
        )
    unequal = problem.task_of_unequal_lengths(shard(problem.made()))
    sw.sharded.sample(unequal, problem.run(), problem.POSTERIOR, out=out / "unequal", step_size=0.1, **problem.BY_HAND)
    tuned = {"chains": 2, "draws": 2, "batch_size": 6}
    task, run = problem.task(task.model, forward_batch=15), problem.run(clip_norm=0.2)
    sw.sharded.sample(task, run, sw.LocalPosterior(window=4), out=out / "tuned", **tuned)
    return {"kept": all(torch.equal(before[name], tensor) for name, tensor in task.state().items())}


def places(shard, out):
    """Gradient, noise and hash at a checkpoint, by the rows that are here."""
    with lent(problem.task(shard(problem.made())), True) as task:
        fitted = loaded(task, problem.run(), 3)
        point = point_at(task, fitted)
        place = point.vector.flatten(point.state)
        noise = standard_normal(place.repeat(2, 1), noise_source(point, 0, 0, "noise", 2))
        return {
            "gradient": point.vector.unflatten(mean_gradient(point, place, task.train)),
            "noise": point.vector.unflatten(noise[1]),
            "length": float(task.ranks.norm(place)),
            "hash": fingerprint(task.pure, fitted),
        }


def windows(shard, out):
    found = {}
    influence = partial(sw.sharded.window_influence, window=4, order=problem.BATCHES)
    for name, given in WINDOWS.items():
        found[name] = influence(problem.task(shard(problem.made(torch.float64))), problem.run(**given)).value
    given = WINDOWS["adam, clipped"]
    task = problem.task(shard(problem.made(torch.float64)))
    found["samples"] = influence(task, problem.run(**given), per="sample", split=False).value
    single = problem.task(shard(problem.made()))
    found["float32"] = influence(single, problem.run(**given | {"dtype": torch.float32})).value
    return found


def language(shard, out):
    """A model from Hugging Face with tied embeddings, whose parts cannot be called alone when it is sharded."""
    from torch.distributed.fsdp import fully_shard

    model = problem.language_model()
    for layer in model.gpt_neox.layers:
        fully_shard(layer)
    asked = {"window": 2, "order": sw.BatchOrder(9, 3)}
    task = problem.language_task(fully_shard(model))
    return {"influence": sw.sharded.window_influence(task, problem.language_run(), **asked).value}


def saved_shards(shard, out):
    """A folder that two processes have saved, each its own rows; read by rows, and what of it was read."""
    model = shard(problem.made(torch.float64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if dist.is_initialized():
        batch = problem.task(problem.made()).train.batch(slice(0, 5))
        for _ in range(2):
            optimizer.zero_grad()
            problem.token_loss(model, batch).mean().backward()
            optimizer.step()
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optim": moments}, checkpoint_id=out.parent / "shards" / "step_2")
    run = sw.Trajectory.from_directory(out.parent / "shards", clip_norm=0, batch_size=5)
    read, one_by_one = [], Index._part
    Index._part = lambda self, key, *place: read.append((key, place[1])) or one_by_one(self, key, *place)
    with lent(problem.task(model), True) as task:
        fitted = loaded(task, run, 2)
        Index._part = one_by_one
        whole = task.fitted(run.load(2))
        pairs = [(vars(fitted)[kind], vars(whole)[kind]) for kind in ("params", "first_moment", "second_moment")]
        same = [own.keys() == cut.keys() and all(torch.equal(own[k], cut[k]) for k in own) for own, cut in pairs]
    found = sw.sharded.window_influence(problem.task(model), run, window=2, order=problem.BATCHES).value
    return {"read": read, "same": same, "optimizer": fitted.optimizer, "influence": found}


def words(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return "nothing"


def refusals(shard, out):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def sample(task, run=None, posterior=problem.POSTERIOR, folder=out / "refused", **given):
        return words(lambda: sw.sharded.sample(task, run or problem.run(), posterior, out=folder, **given))

    def partly():
        model = problem.made()
        fully_shard(model.layers[0])
        return model

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "rows"))
    ordinary = problem.task(shard(problem.made()))
    rounded = problem.task(ordinary.model, loss=problem.rounded_loss)
    cast = problem.task(ordinary.model, loss=problem.cast_loss)
    one_head = sw.LocalPosterior(gamma=1.0, parameters=("head.weight[:, 1:2]",))
    by_hand, order = {"step_size": 0.1} | problem.BY_HAND, problem.BATCHES
    return {
        "one model each": sample(problem.task(problem.made())),
        "two dimensions": words(lambda: problem.task(problem.sharded(problem.made(), mesh=mesh))),
        "some of it": words(lambda: problem.task(partly())),
        "bfloat16 shards": words(lambda: problem.task(shard(problem.made(torch.bfloat16)))),
        "rounded losses": words(lambda: sw.sharded.window_influence(rounded, problem.run(), window=2, order=order)),
        "rounded curvature": sample(rounded, posterior=sw.LocalPosterior(gamma=1.0)),
        "autocast by hand": sample(cast, **by_hand),
        "slices": sample(ordinary, posterior=one_head),
        "one process fails": sample(ordinary, sw.Trajectory((3,), _fail_in_one)),
        "ordinary chains": words(lambda: sw.sample(ordinary, problem.run(), problem.POSTERIOR, out=out / "refused")),
        "ordinary folder": sample(ordinary, folder=out.parent / "ordinary", **by_hand),
        "first order": sample(ordinary, linear=True),
        "independent draws": sample(ordinary, sampler="window"),
    }


def _fail_in_one(step):
    if dist.get_rank() == 1:
        raise ValueError("the second process cannot read it")
    return problem.checkpoint()


def going_on(shard, out):
    """The folder of one process, again and with one block more: how many cells were computed each time."""
    task, computed, write = problem.task(shard(problem.made())), [], TraceStore.write
    split, settings = DRAWN["sgld, same"]
    for blocks in (1, 2):
        wrote = []
        TraceStore.write = lambda self, cell, *rest, wrote=wrote: wrote.append(cell) or write(self, cell, *rest)
        sw.sharded.sample(
            task,
            problem.run(),
            problem.POSTERIOR,
            out=out.parent / "one" / "sgld, same",
            blocks=blocks,
            split=split,
            **problem.BY_HAND | settings,
        )
        computed.append(len(wrote))
    TraceStore.write = write
    return {"computed": computed}


def unsharded(model):
    return model


SCENES = [draws, places, windows, language, saved_shards, refusals, going_on, differing, failing, precision, kinds]


def main(rank, folder):
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    results = {scene.__name__: scene(problem.sharded, folder / "two") for scene in SCENES}
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
