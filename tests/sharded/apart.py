"""What two processes say where they were not given the same, or where one of them fails."""

import problem
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy

import stagewise as sw
from stagewise.ranks import Ranks

DIFFERING = (
    *("query 'val'", "train_groups", "training data", "list of queries", "forward_batch", "buffer", "window", "order"),
    *("checkpoint at step 3", "sampling", "split"),
)


def words(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def window(model, run=None, window=2, order=problem.BATCHES, **given):
    task = problem.task(model, **given)
    return words(lambda: sw.sharded.window_influence(task, run or problem.run(), window=window, order=order))


def differing(shard, out):
    """One thing is another one in the second process."""
    rank, model = dist.get_rank(), shard(problem.made())
    plain = problem.task(problem.made())
    data, val = plain.train.batch(slice(0, 15)), plain.queries["val"].batch(slice(0, 5))
    order = torch.arange(15)
    if rank == 1:  # all but the few that the checks look at
        rest = [row for row in range(15) if row not in plain.train.few(8)]
        order[rest] = order[rest].flip(0)

    def sample(**given):
        settings = problem.BY_HAND | {"step_size": 0.1} | given
        task = problem.task(model)
        return words(lambda: sw.sharded.sample(task, problem.run(), problem.POSTERIOR, out=out / "apart", **settings))

    def remembered():
        start = problem.made()
        start.register_buffer("mask", torch.full((1,), float(rank)), persistent=False)
        return window(shard(start))

    queries = {"val": (val[0], val[1].roll(rank, 0))}
    other = problem.checkpoint().holding(params=problem.made().state_dict() | {"scale": torch.full((1,), 1.5 + rank)})
    names = ["a", "b"] if rank else ["b", "a"]
    return {
        "query 'val'": window(model, queries=queries),
        "train_groups": window(model, train_groups=[str((row + rank) % 3) for row in range(15)]),
        "training data": window(model, train=tuple(part[order] for part in data)),
        "list of queries": window(model, queries=dict.fromkeys(names, val), query_groups={}),
        "forward_batch": window(model, forward_batch=5 + rank),
        "buffer": remembered(),
        "window": window(model, window=2 + rank),
        "order": window(model, order=sw.BatchOrder(15, 5, seed=rank)),
        "checkpoint at step 3": window(model, sw.Trajectory.from_checkpoints([other])),
        "sampling": sample(seed=rank),
        "split": sample(split=bool(rank)),
    }


class ResponseError(Exception):
    """As those of web clients: it can be sent, but not be read."""

    def __init__(self, said, response):
        super().__init__(said)
        self.response = response


class LockError(Exception):
    """It cannot be sent."""

    def __init__(self, said):
        super().__init__(said)
        self.held = lambda: None


class Restless:
    """Samples that are others each time they are read, in the second process, once a checkpoint has been."""

    def __init__(self):
        self.plain, self.reads, self.moves = problem.task(problem.made()).train.batch(slice(0, 15)), 0, False

    def __len__(self):
        return 15

    def __getitem__(self, row):
        self.reads += self.moves and dist.get_rank() == 1
        return self.plain[0][row], (self.plain[1][row] + self.reads) % 5


def failing(shard, out):
    """Something goes wrong in the second process alone."""
    rank, model = dist.get_rank(), shard(problem.made())

    def read(error):
        def load(step):
            if rank == 1:
                raise error
            return problem.checkpoint()

        return sw.Trajectory((3,), load)

    restless = Restless()

    def loaded(step):
        restless.moves = True
        return problem.checkpoint()

    ranks = Ranks(rank, 2, True, dist.group.WORLD)
    return {
        "cannot be read": window(model, read(ResponseError("the hub says 503", None))),
        "cannot be sent": window(model, read(LockError("lock held"))),
        "made cannot be sent": words(lambda: ranks.agreed(lambda: (lambda: 0) if rank else 0)),
        "unsteady": window(model, sw.Trajectory((3,), loaded), train=restless),
    }


def precision(shard, out):
    """What would round weights, or is not on the device of the mesh."""
    low = {"param_dtype": torch.bfloat16}, {"reduce_dtype": torch.bfloat16}
    with torch.device("meta"):
        elsewhere = problem.Tiny().eval()
    found = {next(iter(kind)): words(lambda k=kind: problem.task(_policy(k))) for kind in low}
    return found | {"elsewhere": words(lambda: sw.Task(problem.sharded(elsewhere), **_data()))}


def _policy(kind):
    return problem.sharded(problem.made(), mp_policy=MixedPrecisionPolicy(**kind))


def _data():
    plain = problem.task(problem.made())
    return {"loss": problem.token_loss, "train": plain.train, "queries": plain.queries}
