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


if __name__ == "__main__":
    torch.manual_seed(0)
    x, y = torch.randn(30, 5), torch.arange(30) % 3
    task = sw.Task(Net(), losses, train=(x, y), queries={"q": (x[:6], y[:6])})
    sgd = sw.Optimizer("sgd", 0.1, batch_size=0)
    run = sw.Trajectory.from_checkpoints(
        sw.Checkpoint(step, {name: tensor + 0.01 * step for name, tensor in task.state().items()}, sgd)
        for step in range(3)
    )
    executors = {"ray": sw.Ray(), "slurm": sw.Slurm(cluster="local", jobs=2, poll=0.1), "local": sw.Local(threads=1)}
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
            )
            for number, (workers, executor) in enumerate([(1, sw.Local(threads=1)), (2, executors[sys.argv[1]])])
        ]
        print(all(stores[0].load(step).identical(stores[1].load(step)) for step in run.steps))
