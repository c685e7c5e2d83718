"""A tiny model of sequences, whose parameters two processes cannot share evenly: 11, 5 and 1 rows."""

import torch
from torch import nn

import stagewise as sw
from stagewise.checkpoint import ParameterGroup


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.inner = nn.Linear(6, 1), nn.Linear(6, 6)

    def forward(self, x):
        return x + torch.tanh(self.inner(x)) * torch.sigmoid(self.gate(x))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(6, 5)
        self.register_buffer("scale", torch.full((1,), 1.5))

    def forward(self, tokens):
        x = self.embed(tokens).cumsum(1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x) * self.scale


def token_loss(model, batch):
    tokens, targets = batch
    return nn.functional.cross_entropy(model(tokens).mT, targets, reduction="none")


def made(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Tiny().to(dtype).eval()


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def task(model, n=15, **given):
    generator = torch.Generator().manual_seed(1)

    def data(count):
        return torch.randint(11, (count, 3), generator=generator), torch.randint(5, (count, 3), generator=generator)

    groups = {"train_groups": [str(k % 3) for k in range(n)]} | given
    return sw.Task(model, token_loss, train=data(n), queries={"val": data(5)}, forward_batch=4, **groups)


def checkpoint(step=3, kind="adam", dtype=torch.float32, **fields):
    """With moments, so that a window from it is one of training under way."""
    start, generator = made(dtype), torch.Generator().manual_seed(2)
    names = [name for name, _ in start.named_parameters()]
    rule = {"sgd": {"momentum": 0.9, "weight_decay": 0.01}, "adam": {"weight_decay": 0.1, "decoupled": True}}[kind]
    decayed = tuple(name for name in names if "bias" not in name)
    rest = tuple(name for name in names if "bias" in name)
    rate = 0.02 if kind == "sgd" else 0.005
    groups = (ParameterGroup(decayed, rate, rule["weight_decay"]), ParameterGroup(rest, rate, 0.0))
    optimizer = sw.Optimizer(kind, rate, batch_size=5, groups=groups, **rule | fields)

    def drawn(scale):
        return {
            name: scale * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(dtype)
            for name, tensor in start.named_parameters()
        }

    second = {name: tensor.square() + 1e-5 for name, tensor in drawn(0.01).items()} if kind == "adam" else {}
    return sw.Checkpoint(step, start.state_dict(), optimizer, drawn(0.01), second)


def run(*checkpoints):
    return sw.Trajectory.from_checkpoints(checkpoints)
