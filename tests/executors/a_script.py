"""A task that only a script knows, sampled where its argument says, held against this process."""

import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional

import stagewise as sw


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(x)


def losses(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_task():
    torch.manual_seed(0)
    x, y = torch.randn(30, 5), torch.arange(30) % 3
    return sw.Task(Net(), losses, train=(x, y), queries={"q": (x[:6], y[:6])})


if __name__ == "__main__":
    task = make_task()
    sgd = sw.Optimizer("sgd", 0.1, batch_size=0)
    run = sw.Trajectory.from_checkpoints(
        sw.Checkpoint(step, {name: tensor + 0.01 * step for name, tensor in task.state().items()}, sgd)
        for step in range(3)
    )
    executors = {"ray": sw.Ray(), "slurm": sw.Slurm(cluster="local", jobs=2, poll=0.1), "local": sw.Local(threads=1)}
    there = executors[sys.argv[1]]
    with tempfile.TemporaryDirectory() as folder:
        stores = [
            sw.sample(
                task,
                run,
                sw.LocalPosterior(window=5, n_beta=100.0),
                out=Path(folder) / str(number),
                chains=4,
                draws=16,
                workers=workers,
                executor=executor,
                make_task=make,
            )
            for number, (workers, executor, make) in enumerate(
                [(1, sw.Local(threads=1), None), (2, there, None), (2, there, make_task)]
            )
        ]
        trees = [[store.load(step) for store in stores] for step in run.steps]
        print([all(same.identical(first) for same in others) for first, *others in trees])
