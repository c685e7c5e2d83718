"""What is differentiated is the model, wherever it keeps its weights; and the user's own model is never touched."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

from stagewise.check import check
from stagewise.checkpoint import Checkpoint
from stagewise.derivatives import mean_gradient
from stagewise.evaluate import at
from stagewise.fitting import fitted
from stagewise.functional import PureModel
from stagewise.in_place import InPlaceModel
from stagewise.sampling import Chains, LocalPosterior, sample_block
from stagewise.task import Task

N = 8


def vectors(size=4):
    return torch.randn(N, size, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3


def words():
    return torch.randint(10, (N, 5), generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Net(nn.Module):
    """A module whose forward pass is a function of itself and the input."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


class Compiled(nn.Module):
    """As ``torch.compile`` wraps a module."""

    def __init__(self, inner):
        super().__init__()
        self._orig_mod = inner

    def forward(self, x):
        return self._orig_mod(x)


def used_twice():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 3))


def two_names():
    layer = nn.Linear(4, 4)
    return Net(lambda m, x: m.head(m.b(torch.tanh(m.a(x)))), a=layer, b=layer, head=nn.Linear(4, 3))


def nested():
    layer = nn.Linear(4, 4)
    blocks = nn.ModuleList([nn.Sequential(layer), nn.ModuleDict({"x": nn.Sequential(nn.Sequential(layer))})])
    return Net(lambda m, x: m.head(m.blocks[1]["x"](torch.tanh(m.blocks[0](x)))), blocks=blocks, head=nn.Linear(4, 3))


def tied_to_an_embedding():
    model = Net(lambda m, x: m.out(m.tail(m.embed(x).mean(1)))[:, :3], embed=nn.Embedding(10, 5), tail=nn.Linear(5, 5))
    model.out = nn.Linear(5, 10, bias=False)
    model.out.weight = model.embed.weight
    return model


def tied_within_one_module():
    model = Net(lambda m, x: m.head(torch.tanh(x @ m.v) @ m.w.T))
    model.w = model.v = nn.Parameter(torch.randn(4, 4))
    model.head = nn.Linear(4, 3)
    return model


def tied_bias_of_frozen_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].bias = model[0].bias
    model[2].weight.requires_grad_(False)
    return model


def in_lists():
    weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 3))])
    return Net(lambda m, x: torch.tanh(x @ m.weights[0]) @ m.weights[1], weights=weights)


def in_dicts():
    weights = nn.ParameterDict({"a": nn.Parameter(torch.randn(4, 4)), "b": nn.Parameter(torch.randn(4, 3))})
    return Net(lambda m, x: torch.tanh(x @ m.weights["a"]) @ m.weights["b"], weights=weights)


def also_in_a_plain_list():
    model = Net(lambda m, x: torch.tanh(x @ m.mine[0].T) @ m.names["head"].T, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    model.mine, model.names = [model.a.weight, model.a.bias], {"head": model.b.weight}
    return model


def mixed_types():
    scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    return Net(lambda m, x: m.head(x) * m.scale.float(), scale=scale, head=nn.Linear(4, 3))


class Orthogonal(nn.Module):
    def forward(self, x):
        return torch.matrix_exp(x - x.mT)


def reparametrized():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    parametrize.register_parametrization(model[0], "weight", Orthogonal())
    return model


def with_spectral_norm():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3))
    for _ in range(20):
        model(torch.randn(2, 4))
    return model


def with_old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))


def recurrent(kind, **options):
    size = 2 * (2 if options.get("bidirectional") else 1)
    layer = kind(2, 2, batch_first=True, **options)
    return Net(
        lambda m, x: m.head(m.layer(m.embed(x))[0][:, -1]),
        embed=nn.Embedding(10, 2),
        layer=layer,
        head=nn.Linear(size, 3),
    )


def attention():
    def forward(m, x):
        hidden = m.embed(x)
        return m.head(m.attend(hidden, hidden, hidden, need_weights=False)[0].mean(1))

    attend = nn.MultiheadAttention(4, 2, batch_first=True)
    return Net(forward, embed=nn.Embedding(10, 4), attend=attend, head=nn.Linear(4, 3))


def cached_forward():
    """Keeps what it computed last, as some do for a plot."""

    def forward(m, x):
        m.last = torch.tanh(m.a(x))
        return m.b(m.last)

    model = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    model(torch.randn(2, 4))
    return model


def normalised():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    for _ in range(5):
        model(3 * torch.randn(8, 4) + 1)
    return model


GOOD = {
    "a layer used twice": (used_twice, vectors),
    "a layer under two names": (two_names, vectors),
    "a layer in nested containers": (nested, vectors),
    "a head tied to an embedding": (tied_to_an_embedding, words),
    "a parameter under two names": (tied_within_one_module, vectors),
    "a tied bias of a frozen layer": (tied_bias_of_frozen_layer, vectors),
    "ParameterList": (in_lists, vectors),
    "ParameterDict": (in_dicts, vectors),
    "a plain list and a dict beside the layers": (also_in_a_plain_list, vectors),
    "a float64 parameter among float32": (mixed_types, vectors),
    "parametrize": (reparametrized, vectors),
    "spectral norm": (with_spectral_norm, vectors),
    "old weight norm": (with_old_weight_norm, vectors),
    "new weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)),
        vectors,
    ),
    "LSTM": (lambda: recurrent(nn.LSTM), words),
    "deep LSTM": (lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True), words),
    "GRU": (lambda: recurrent(nn.GRU), words),
    "attention": (attention, words),
    "batch norm": (normalised, vectors),
    "sparse embedding": (
        lambda: Net(lambda m, x: m.h(m.e(x).mean(1)), e=nn.Embedding(10, 4, sparse=True), h=nn.Linear(4, 3)),
        words,
    ),
    "what an earlier pass left behind": (cached_forward, vectors),
    "DataParallel": (lambda: nn.DataParallel(nn.Linear(4, 3)), vectors),
    "compiled": (lambda: Compiled(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))), vectors),
}


def made(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def task_of(model, loss=cross_entropy, data=None):
    data = vectors() if data is None else data
    return Task(model, loss, train=data, queries={"q": data})


class Untouched:
    """A model whose tensors must stay the same objects with the same bits, in the same places."""

    def __init__(self, model):
        self.model = model
        self.kept = self.seen()
        self.bits = {name: tensor.detach().clone() for name, tensor in self.kept.items()}
        self.trained = {name for name, tensor in self.kept.items() if tensor.requires_grad}

    def seen(self):
        return dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())

    def verify(self):
        seen = self.seen()
        assert list(seen) == list(self.kept)
        for name, tensor in seen.items():
            assert tensor is self.kept[name], f"{name} is another object"
            assert torch.equal(tensor, self.bits[name]), f"{name} has other bits"
            assert tensor.requires_grad == (name in self.trained)
            assert tensor.grad is None, f"{name} has a gradient"
        self.model.state_dict()


def brute_force(model, params, data):
    """Losses and gradient of the mean by autograd, on a copy that has ``params``."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    bare = {name.removeprefix("module.").removeprefix("_orig_mod."): tensor for name, tensor in own.items()}
    with torch.no_grad():
        for name, tensor in bare.items():
            if name in params:
                tensor.copy_(params[name])
    losses = cross_entropy(model, data)
    moving = {name: tensor for name, tensor in bare.items() if tensor.requires_grad}
    slopes = torch.autograd.grad(losses.mean(), list(moving.values()), allow_unused=True, materialize_grads=True)
    return losses.detach(), {name: slope.to_dense() for name, slope in zip(moving, slopes, strict=True)}


@pytest.mark.parametrize("name", GOOD)
def test_losses_and_gradients_at_other_weights_are_those_of_a_copy_that_has_them(name):
    build, data = GOOD[name]
    model, data = made(build), data()
    untouched = Untouched(model)
    task = task_of(model, data=data)
    random = torch.Generator().manual_seed(1)
    params = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=random).to(tensor)
        for name, tensor in task.state().items()
        if name in task.trainable
    }
    checkpoint = Checkpoint(3, task.state() | params)
    losses, slopes = brute_force(made(build), params, data)
    torch.testing.assert_close(task.losses(params, data), losses)
    point, _ = at(task, checkpoint, curvature=True)
    u = point.vector.flatten(point.state)
    gradient = point.vector.unflatten(mean_gradient(point, u, task.train))
    assert set(gradient) == set(slopes)
    for which, slope in slopes.items():
        torch.testing.assert_close(gradient[which].to(slope), slope, rtol=1e-4, atol=1e-6)
    untouched.verify()


@pytest.mark.parametrize(
    "name", ["a layer used twice", "deep LSTM", "old weight norm", "a float64 parameter among float32"]
)
def test_every_checkpoint_after_the_first_gives_the_same_numbers(name):
    build, data = GOOD[name]
    model = made(build)
    untouched, task = Untouched(model), task_of(model, data=data())
    sampling = Chains(chains=3, draws=2, burn_in=2, thinning=1, batching="loop" if "LSTM" in name else "stacked")
    first, second = (
        sample_block(task, Checkpoint(7, task.state()), LocalPosterior(gamma=1e4), sampling) for _ in range(2)
    )
    assert first.identical(second)
    fresh = task_of(made(build), data=data())
    third = sample_block(fresh, Checkpoint(7, fresh.state()), LocalPosterior(gamma=1e4), sampling)
    assert first.identical(third)
    untouched.verify()


@pytest.mark.parametrize("name", ["a layer used twice", "batch norm", "GRU", "DataParallel"])
@pytest.mark.parametrize("when", [1, 4, 9, 14])
def test_a_loss_that_raises_leaves_the_model_as_it_was(name, when):
    build, data = GOOD[name]
    model = made(build)
    untouched, calls = Untouched(model), []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == when:
            raise KeyError("broken")
        return cross_entropy(model, batch)

    task = task_of(model, loss, data())
    with pytest.raises((ValueError, KeyError), match="broken"):
        sample_block(task, Checkpoint(0, task.state()), LocalPosterior(gamma=1e4), Chains(chains=2, draws=2, burn_in=1))
    untouched.verify()
    assert task.pure.module.training is False
    calls.append(1)
    torch.testing.assert_close(task.losses({}, data()), cross_entropy(made(build), data()))


def test_the_users_model_may_go_on_training_between_two_estimates():
    model = made(used_twice)
    task = task_of(model)
    before = task.losses(task.state(), vectors())
    kept = {name: tensor.clone() for name, tensor in task.state().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    cross_entropy(model, vectors()).mean().backward()
    optimizer.step()
    torch.testing.assert_close(task.losses(kept, vectors()), before)
    assert all(parameter.grad is not None for parameter in model.parameters())


def unregistered_tuple():
    model = Net(lambda m, x: torch.tanh(x @ m.both[0].T) @ m.both[1].T, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    model.both = (model.a.weight, model.b.weight)
    return model


def list_of_lists():
    model = Net(lambda m, x: torch.tanh(x @ m.both[0][0].T) @ m.both[1][0].T, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    model.both = [[model.a.weight], [model.b.weight]]
    return model


def closure():
    layer = nn.Linear(4, 3)
    return Net(lambda _m, x: x @ layer.weight.T, layer=layer)


def bound_method():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    forward = model.forward
    return Net(lambda _m, x: forward(x), inner=model)


def two_of_three():
    """One of the weights is used in place and through a tuple."""
    model = Net(lambda m, x: m.a(x) @ m.kept[0].T + m.b(x), a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    model.kept = (model.b.weight,)
    return model


@pytest.mark.parametrize("build", [unregistered_tuple, list_of_lists, closure, bound_method, two_of_three])
def test_weights_that_are_kept_where_they_cannot_be_exchanged_are_refused(build):
    model = made(build)
    untouched, task = Untouched(model), task_of(model)
    with pytest.raises(ValueError, match=r"kept somewhere else too|not parameters of the model it is given") as error:
        check(task, Checkpoint(0, task.state()))
    assert str(error.value).startswith("train: ")
    untouched.verify()


def computes_a_product_once():
    def forward(m, x):
        if m.product is None:
            m.product = m.b.weight @ m.a.weight
        return m.c(x) + x @ m.product.T

    model = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 3), c=nn.Linear(4, 3))
    model.product = None
    return model


def test_a_product_of_weights_that_is_computed_once_is_computed_again_for_other_weights():
    model = made(computes_a_product_once)
    task = task_of(model)
    for scale in (1.0, 2.0, -1.0):
        params = {name: scale * tensor for name, tensor in task.state().items()}
        expected = cross_entropy(made(lambda scale=scale: scaled(computes_a_product_once(), scale)), vectors())
        torch.testing.assert_close(task.losses(params, vectors()), expected.detach(), check_dtype=False)
    check(task, Checkpoint(0, task.state()), curvature=True)
    assert model.product is None


def scaled(model, by):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= by
    return model


def test_a_product_that_the_users_model_has_computed_already_is_refused_by_its_name():
    model = made(computes_a_product_once)
    model(torch.randn(1, 4))
    task = task_of(model)
    with pytest.raises(ValueError, match="'product', which the model keeps, is computed anew for other weights"):
        check(task, Checkpoint(0, task.state()))


def test_unregistered_parameters_are_refused_with_their_shape():
    model = Net(lambda m, x: m.head(x @ m.hidden[0]), head=nn.Linear(5, 3))
    model.hidden = [torch.randn(4, 5, requires_grad=True)]
    task = task_of(model)
    with pytest.raises(ValueError, match=r"1 tensor\(s\) .* not parameters .* shape \(4, 5\).*nn.ParameterList"):
        check(task, Checkpoint(0, task.state()))


def scripted(kind):
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(inner) if kind == "script" else torch.jit.trace(inner, torch.randn(2, 4))


@pytest.mark.parametrize("kind", ["script", "trace"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_torchscript_is_refused_with_the_way_out_also_inside_of_a_model(kind, wrapped):
    model = nn.Sequential(scripted(kind), nn.Linear(3, 3)) if wrapped else scripted(kind)
    with pytest.raises(ValueError, match=r"TorchScript.*build the Task with the Python module"):
        task_of(model)


def test_lazy_layers_are_refused_until_they_have_shapes():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="lazy layer has no shape yet; run one batch"):
        task_of(model)
    model(torch.randn(2, 4))
    task = task_of(model)
    check(task, Checkpoint(0, task.state()))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Net(
                lambda m, x: m.head(x) * m.t.real,
                t=nn.Parameter(torch.ones((), dtype=torch.complex64)),
                head=nn.Linear(4, 3),
            ),
            "parameter 't' is torch.complex64.*as two real ones",
        ),
        (
            lambda: Net(
                lambda m, x: m.h(m.e(x.long() % 5).mean(1)), e=nn.Embedding(5, 4, max_norm=1.0), h=nn.Linear(4, 3)
            ),
            r"Embedding \(e\) has max_norm.*'e.weight'",
        ),
        (
            lambda: nn.Sequential(nn.EmbeddingBag(5, 3, max_norm=1.0)),
            r"EmbeddingBag \(0\) has max_norm",
        ),
        (
            lambda: Net(lambda m, x: x @ m.w.to_dense(), w=nn.Parameter(torch.eye(4, 3).to_sparse())),
            r"'w' has the layout torch.sparse_coo",
        ),
        (lambda: nn.Linear(4, 3).requires_grad_(False), "no parameter of the model requires a gradient"),
    ],
)
def test_parameters_that_are_no_dense_real_block_are_refused_by_name(build, message):
    task = task_of(made(build))
    with pytest.raises(ValueError, match=message):
        check(task, Checkpoint(0, task.state()))


class Locked(nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle a lock")


def test_a_model_that_cannot_be_copied_is_refused_and_not_used_in_place():
    with pytest.raises(ValueError, match=r"cannot be copied.*never touched.*__deepcopy__"):
        task_of(Locked(4, 3))


def test_a_name_of_a_tied_weight_is_known_by_all_of_them():
    pure = PureModel(made(tied_to_an_embedding))
    assert pure.canonical["out.weight"] == pure.canonical["embed.weight"] == "embed.weight"
    assert "out.weight" not in pure.state
    assert set(pure.trainable) == {"embed.weight", "tail.weight", "tail.bias"}


def test_buffers_are_exchanged_and_those_that_do_not_persist_are_known():
    model = Net(lambda m, x: m.head(x) + m.shift * m.passing, head=nn.Linear(4, 3))
    model.register_buffer("shift", torch.zeros(3))
    model.register_buffer("passing", torch.ones(3), persistent=False)
    task = task_of(model)
    x = vectors()[0]
    shifted = task_of(model, lambda m, b: m(b[0])[:, 0]).losses({"shift": torch.full((3,), 2.0)}, (x,))
    torch.testing.assert_close(shifted, model.head(x)[:, 0] + 2)
    assert task.pure.persistent == {"head.weight", "head.bias", "shift"}


def test_gradients_flow_to_whatever_stands_in_for_a_parameter():
    task = task_of(made(used_twice))
    leaf = task.state()["0.weight"].clone().requires_grad_()
    task.losses({"0.weight": leaf}, vectors()).sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_chains_can_be_stacked_through_shared_and_tied_layers():
    for name in ("a layer used twice", "a head tied to an embedding", "new weight norm"):
        build, data = GOOD[name]
        task = task_of(made(build), data=data())
        trees = [
            sample_block(
                task,
                Checkpoint(0, task.state()),
                LocalPosterior(gamma=1e3),
                Chains(chains=3, draws=2, burn_in=2, thinning=1, batching=batching),
            )
            for batching in ("stacked", "loop")
        ]
        torch.testing.assert_close(
            *[torch.from_numpy(tree["train"]["loss"].values) for tree in trees], rtol=1e-4, atol=1e-5
        )


def test_layers_in_wrappers_are_known_by_the_names_that_a_run_without_them_has_saved():
    """Activation checkpointing and compiled layers put words into names, which only some of them take out again."""
    plain = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))).eval()
    wrapped = nn.Sequential(checkpoint_wrapper(plain[0]), Compiled(plain[1]))
    start = Checkpoint(0, plain.state_dict())
    for model in (PureModel(wrapped), InPlaceModel(wrapped)):
        known = fitted(model, start).params
        assert torch.equal(known["0._checkpoint_wrapped_module.weight"], start.params["0.weight"])
        assert torch.equal(known["1._orig_mod.0.running_var"], start.params["1.0.running_var"])
        assert "1._orig_mod.0.running_var" in model.persistent
        assert "0._checkpoint_wrapped_module.weight" in model.persistent
