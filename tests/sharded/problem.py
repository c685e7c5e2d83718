"""A tiny model of sequences, whose parameters two processes cannot share evenly: 11, 5 and 1 rows."""

import torch
from torch import nn

import stagewise as sw
from stagewise.checkpoint import ParameterGroup

BATCHES = sw.BatchOrder(15, 5, seed=3)
BY_HAND = {"chains": 2, "draws": 2, "burn_in": 2, "thinning": 1}
POSTERIOR = sw.LocalPosterior(gamma=50.0, n_beta=30.0, require_localised=False)


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


class Rounded(torch.autograd.Function):
    """As in bfloat16, but nothing is of that type."""

    @staticmethod
    def forward(ctx, x):
        return x.bfloat16().float()

    @staticmethod
    def backward(ctx, slope):
        return slope.bfloat16().float()


def rounded_loss(model, batch):
    tokens, targets = batch
    return nn.functional.cross_entropy(Rounded.apply(model(tokens)).mT, targets, reduction="none")


def cast_loss(model, batch):
    tokens, targets = batch
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    return nn.functional.cross_entropy(logits.float().mT, targets, reduction="none")


def padded_loss(model, batch):
    tokens, targets = batch
    losses = nn.functional.cross_entropy(model(tokens).mT, targets.clamp(min=0), reduction="none")
    return losses, targets >= 0


class Normed(nn.Module):
    """With a norm, and an embedding whose first row has no gradient by definition."""

    def __init__(self, padding=0, tied=False):
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=padding)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens).cumsum(1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def normed(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return Normed(**options).to(dtype).eval()


def normed_run(**options):
    """From the first update on: Adam remembers nothing, and where a gradient is 0 its update is steep."""
    start = normed(**options)
    return sw.Trajectory.from_checkpoints(
        [sw.Checkpoint(0, start.state_dict(), sw.Optimizer("adam", 0.01, batch_size=5))]
    )


def made(dtype=torch.float32):
    torch.manual_seed(0)
    return Tiny().to(dtype).eval()


def sharded(model, root=None, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    options = {"mesh": init_device_mesh("cpu", (torch.distributed.get_world_size(),))} | options
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options | (root or {}))


def task(model, **given):
    """15 sequences in groups of 5, and as queries 5 in groups of tokens."""
    generator = torch.Generator().manual_seed(1)

    def data(count):
        return torch.randint(11, (count, 3), generator=generator), torch.randint(5, (count, 3), generator=generator)

    options = {
        "loss": token_loss,
        "train": data(15),
        "queries": {"val": data(5)},
        "train_groups": [str(k % 3) for k in range(15)],
        "query_groups": {"val": [["first", "later", "later"]] * 5},
        "forward_batch": 5,
    }
    return sw.Task(model, **options | given)


def task_of_unequal_lengths(model):
    generator = torch.Generator().manual_seed(1)

    def sample(length):
        return torch.randint(11, (length,), generator=generator), torch.randint(5, (length,), generator=generator)

    def collate(samples):
        tokens, targets = zip(*samples, strict=True)
        pad = nn.utils.rnn.pad_sequence
        return pad(tokens, batch_first=True), pad(targets, batch_first=True, padding_value=-1)

    train = [sample(1 + k // 3) for k in range(15)]  # those of the first process are shorter
    return sw.Task(
        model,
        padded_loss,
        train=train,
        queries={"val": train[::4]},
        collate=collate,
        objective="tokens",
        forward_batch=5,
    )


def checkpoint(kind="adam", dtype=torch.float32, **fields):
    """With moments, so that a window from it is one of training under way."""
    start, generator = made(dtype), torch.Generator().manual_seed(2)
    names = [name for name, _ in start.named_parameters()]
    rule = {"sgd": {"momentum": 0.9, "weight_decay": 0.01}, "adam": {"weight_decay": 0.1, "decoupled": True}}[kind]
    rate = 0.02 if kind == "sgd" else 0.005
    groups = (
        ParameterGroup(tuple(name for name in names if "bias" not in name), rate, rule["weight_decay"]),
        ParameterGroup(tuple(name for name in names if "bias" in name), rate, 0.0),
    )
    optimizer = sw.Optimizer(kind, rate, batch_size=5, groups=groups, **rule | fields)

    def drawn():
        return {
            name: 0.01 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(dtype)
            for name, tensor in start.named_parameters()
        }

    first = drawn()
    second = {name: tensor.square() + 1e-5 for name, tensor in drawn().items()} if kind == "adam" else {}
    return sw.Checkpoint(3, start.state_dict(), optimizer, first, second)


def run(**given):
    return sw.Trajectory.from_checkpoints([checkpoint(**given)])


def language_model(dtype=torch.float64):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 33, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GPTNeoXConfig(**sizes, intermediate_size=16, max_position_embeddings=8, tie_word_embeddings=True)
    return GPTNeoXForCausalLM(config).to(dtype).eval()


def language_task(model):
    generator = torch.Generator().manual_seed(1)
    train, val = (torch.randint(33, (count, 6), generator=generator) for count in (9, 3))
    return sw.Task(model, sw.losses.causal_lm, train=train, queries={"val": val}, train_groups=list("aaabbbccc"))


def language_run():
    start = language_model()
    return sw.Trajectory.from_checkpoints(
        [sw.Checkpoint(0, start.state_dict(), sw.Optimizer("adam", 1e-3, batch_size=3))]
    )
