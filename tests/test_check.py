"""One check where a task meets a checkpoint: what no estimator could use is refused by name, and nothing else is."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed

import zoo
from stagewise import differences
from stagewise.check import check
from stagewise.checkpoint import Checkpoint
from stagewise.task import Task

N = 7


def vectors(size=4):
    return torch.randn(N, size, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Net(nn.Module):
    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def net(forward, **parts):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = {name: part() for name, part in parts.items()}
    return Net(forward, **made).eval()


def linear(a=4, b=3):
    return lambda: nn.Linear(a, b)


def plain():
    return net(lambda m, x: m.b(torch.tanh(m.a(x))), a=linear(4, 4), b=linear())


def checked(model=None, loss=cross_entropy, data=None, curvature=True, **more):
    model = plain() if model is None else model
    data = vectors() if data is None else data
    task = Task(model, loss, train=data, **{"queries": {"q": data}} | more)
    check(task, task.fitted(Checkpoint(0, task.state())), curvature=curvature)
    return task


# Ordinary models pass.


@pytest.mark.parametrize("name", zoo.zoo())
@pytest.mark.parametrize(("scale", "updates"), [pytest.param(1, 20, id="trained"), pytest.param(1e3, 0, id="huge")])
def test_an_ordinary_model_is_not_refused(name, scale, updates):
    animal = zoo.make(name, seed=1, scale=scale, updates=updates)
    checked(animal.model, animal.loss, animal.data)


@pytest.mark.parametrize("name", ["relu", "gru", "l1", "hinge"])
@pytest.mark.parametrize(
    ("scale", "updates"),
    [pytest.param(1e-6, 0, id="tiny"), pytest.param(0, 0, id="zero"), pytest.param(1, 250, id="converged")],
)
def test_nor_at_the_ends_of_what_happens(name, scale, updates):
    animal = zoo.make(name, seed=2, scale=scale, updates=updates)
    checked(animal.model, animal.loss, animal.data)


def test_an_operation_without_second_derivatives_is_no_fault():
    model = net(lambda m, x: m.head(torch.cdist(x, m.places)), head=linear(5, 3))
    model.places = nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    checked(model, curvature=False)
    checked(model)


def test_a_first_derivative_that_is_wrong_is_seen_beside_an_operation_without_second_ones():
    model = net(lambda m, x: m.head(torch.cdist(x, m.places.detach() + 0 * m.places)), head=linear(5, 3))
    model.places = nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="by its gradient it should"):
        checked(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("double", [False, True])
def test_a_transformer_that_works_in_float32_inside_is_not_refused(attention, double):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.GPTNeoXForCausalLM(config).eval()
    tokens = torch.randint(11, (N, 5), generator=torch.Generator().manual_seed(0))

    def loss(model, tokens):
        logits = model(input_ids=tokens).logits[:, :-1]
        return functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")

    checked(model.double() if double else model, loss, tokens)


def test_constrained_parameters_are_not_moved_to_where_losses_do_not_exist():
    model = net(lambda m, x: m.mean(x)[:, 0], mean=linear(4, 1))
    model.variance = nn.Parameter(torch.tensor([1.0, 1e-5]))

    def loss(model, batch):
        variance = model.variance[(batch[1] > 0).long()]
        return 0.5 * (model(batch[0]).square() + variance.log() + 1e-3 / variance)

    checked(model, loss)


def test_losses_that_raise_for_arguments_out_of_range_are_not_pushed_there():
    model = net(lambda m, x: m.rate * x.abs().sum(1))
    model.rate = nn.Parameter(torch.tensor([1e-4]))
    checked(model, lambda m, b: -torch.distributions.Exponential(m(b[0])).log_prob(b[0].abs()[:, 0]))


def test_a_penalty_on_derivatives_by_the_inputs_is_not_taken_for_foreign_parameters():
    def loss(model, batch):
        with torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            slope = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]
        return cross_entropy(model, batch) + 0.1 * slope.square().sum(1)

    checked(loss=loss)


def test_a_penalty_on_derivatives_by_the_inputs_is_a_loss_also_where_nobody_else_differentiates():
    def loss(model, batch):
        x = batch[0].clone().requires_grad_()
        values = cross_entropy(model, (x, batch[1]))
        slope = torch.autograd.grad(values.sum(), x, create_graph=True)[0]
        return values + 0.1 * slope.square().sum(1)

    task = checked(loss=loss)
    batch = task.train.batch(slice(0, 3))
    with torch.no_grad():
        found = task.losses(task.state(), batch)
    assert not found.requires_grad
    torch.testing.assert_close(found, loss(task.model, batch).detach())


def test_a_cache_that_grows_and_buffers_of_nan_and_infinity_are_no_side_effects():
    def forward(m, x):
        if len(m.places) < x.shape[1]:
            m.places = torch.arange(float(x.shape[1]))
        return m.head(x + 0.1 * m.places) + m.mask.nan_to_num(0, 0, 0)[:3]

    model = net(forward, head=linear())
    model.register_buffer("places", torch.zeros(0), persistent=False)
    model.register_buffer("mask", torch.tensor([math.nan, -math.inf, 1.0]))
    checked(model)


def test_rounding_of_large_outputs_is_not_taken_for_a_dependence_on_the_batch():
    model = net(lambda m, x: m.b(torch.relu(m.a(x))), a=linear(4, 300), b=linear(300, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3e3
    checked(model)


def test_what_was_found_in_order_is_not_looked_at_again():
    calls = []

    def loss(model, batch):
        calls.append(len(batch[0]))
        return cross_entropy(model, batch)

    task = checked(loss=loss)
    once = len(calls)
    check(task, task.fitted(Checkpoint(0, task.state())), curvature=True)
    assert len(calls) == once
    other = {name: tensor + 1 for name, tensor in task.state().items()}
    check(task, task.fitted(Checkpoint(1, other)), curvature=True)
    assert calls[once:] == [N, N]  # finite everywhere: one pass over each data set


# What is hidden from differentiation.


def no_grad_norm(m, x):
    with torch.no_grad():
        norm = m.w.norm(dim=1, keepdim=True)
    return x @ (m.w / norm).T


def through_item(m, x):
    return m.a(x) * m.s.item()


def through_numpy(m, x):
    return m.a(x) * float(m.s.detach().numpy())


class Sign(torch.autograd.Function):
    """Sign with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, slope):
        return slope


class CubeOnce(torch.autograd.Function):
    """A right gradient that cannot be differentiated: torch would give zero."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, slope):
        with torch.no_grad():
            return 3 * ctx.saved_tensors[0].detach() ** 2 * slope.detach()


class CubeRefusing(CubeOnce):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return 3 * ctx.saved_tensors[0] ** 2 * slope


def parameter(*shape):
    return lambda: nn.Parameter(torch.randn(shape))


HIDDEN = {
    "torch.no_grad": lambda: net(no_grad_norm, w=parameter(3, 4)),
    "detach": lambda: net(lambda m, x: x @ (m.w / m.w.detach().norm()).T, w=parameter(3, 4)),
    ".data": lambda: net(lambda m, x: m.a(x) * m.s.data, a=linear(), s=parameter()),
    ".item()": lambda: net(through_item, a=linear(), s=parameter()),
    "numpy": lambda: net(through_numpy, a=linear(), s=parameter()),
    "straight through": lambda: net(lambda m, x: x @ (m.w + (m.w.sign() - m.w).detach()).T, w=parameter(3, 4)),
    "rounding weights": lambda: net(
        lambda m, x: m.b(x @ (m.w + ((8 * m.w).round() / 8 - m.w).detach()).T), w=parameter(4, 4), b=linear()
    ),
    "rounding activations": lambda: net(
        lambda m, x: m.b(m.a(x) + ((16 * m.a(x)).round() / 16 - m.a(x)).detach()), a=linear(4, 4), b=linear()
    ),
    "custom sign": lambda: net(lambda m, x: m.b(Sign.apply(m.a(x))), a=linear(4, 4), b=linear()),
    "gradient of no use": lambda: net(lambda m, x: m.b(CubeOnce.apply(m.a(x))), a=linear(4, 4), b=linear()),
    "once differentiable": lambda: net(lambda m, x: m.b(CubeRefusing.apply(m.a(x))), a=linear(4, 4), b=linear()),
}


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("where", ["float32", "float64", "float32 inside"])
def test_what_is_hidden_from_differentiation_is_refused_for_curvature_and_not_for_gradients(name, where):
    model, data, loss = HIDDEN[name](), vectors(), cross_entropy
    if where == "float64":
        model, data = model.double(), (data[0].double(), data[1])
    if where == "float32 inside":

        def loss(model, batch):
            return functional.cross_entropy(model(batch[0].float()).float(), batch[1], reduction="none")

    checked(model, loss, data, curvature=False)
    with pytest.raises(ValueError, match="hidden from differentiation|twice differentiated") as error:
        checked(model, loss, data)
    assert "gradient_product, tracin and retraining" in str(error.value)


def test_a_small_part_that_is_hidden_is_found_too():
    model = net(lambda m, x: m.b(torch.tanh(m.a(x))) + 0.02 * m.c(x).detach(), a=linear(4, 4), b=linear(), c=linear())
    with pytest.raises(ValueError, match="hidden from differentiation"):
        checked(model)


def test_hidden_parts_are_found_in_a_model_with_kinks():
    model = net(
        lambda m, x: m.b(torch.relu(m.a(x)) * (1 + m.c(x).detach().sigmoid())),
        a=linear(4, 50),
        b=linear(50, 3),
        c=linear(4, 50),
    )
    with pytest.raises(ValueError, match="hidden from differentiation"):
        checked(model)


def test_of_a_large_model_random_sums_are_compared_and_tell_the_same(monkeypatch):
    monkeypatch.setattr(differences, "_SUMS", 50)
    honest = net(lambda m, x: m.b(torch.tanh(m.a(x))), a=linear(4, 50), b=linear(50, 3))
    checked(honest)
    hiding = net(lambda m, x: m.b(m.a(x) * m.a(x).detach().sigmoid()), a=linear(4, 50), b=linear(50, 3))
    with pytest.raises(ValueError, match="hidden from differentiation"):
        checked(hiding)
    vectors = [torch.randn(10_000, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]
    monkeypatch.setattr(differences, "_SUMS", 2_000)
    sums = differences._flat(vectors)
    assert sums.shape == (2_000,)
    assert sums.norm().item() == pytest.approx(torch.cat([v.flatten() for v in vectors]).norm().item(), rel=0.1)
    torch.testing.assert_close(differences._flat([3 * v for v in vectors]), 3 * sums)


def test_a_hidden_part_without_parameters_is_no_concern():
    model = net(lambda m, x: m.a(x / x.detach().norm(dim=1, keepdim=True)), a=linear())
    checked(model)


# The loss and the model it is given.


def test_a_loss_that_uses_another_model_than_the_one_it_is_given_is_refused():
    model = plain()
    with pytest.raises(ValueError, match="another model than the one|use the model that the loss is handed"):
        checked(model, lambda _, b: cross_entropy(model, b))


def test_a_loss_that_uses_another_model_for_a_part_is_refused():
    model, teacher = plain(), plain()
    with pytest.raises(
        ValueError, match="not parameters of the model it is given.*use the model that the loss is handed"
    ):
        checked(model, lambda m, b: cross_entropy(m, b) + (m(b[0]) - teacher(b[0])).square().mean(1))


def test_a_frozen_teacher_is_no_concern():
    teacher = plain().requires_grad_(False)
    checked(plain(), lambda m, b: cross_entropy(m, b) + (m(b[0]) - teacher(b[0])).square().mean(1))


def test_a_penalty_on_a_global_models_weights_is_refused():
    model = plain()

    def loss(given, batch):
        return cross_entropy(given, batch) + 0.1 * sum(p.square().sum() for p in model.parameters())

    with pytest.raises(ValueError, match="another model than the one|not parameters of the model"):
        checked(model, loss)


def test_a_loss_with_parameters_of_its_own_is_refused():
    proxy = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"1 tensor\(s\) that require a gradient .* shape \(3,\)"):
        checked(loss=lambda m, b: functional.cross_entropy(m(b[0]) * proxy, b[1], reduction="none"))


def test_a_loss_without_parameters_is_refused():
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        checked(loss=lambda m, b: b[0].sum(1))


def test_a_loss_that_is_computed_without_gradients_is_refused():
    def loss(model, batch):
        with torch.no_grad():
            return cross_entropy(model, batch)

    with pytest.raises(ValueError, match=r"outside of torch.no_grad\(\)"):
        checked(loss=loss)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activations_that_are_recomputed_are_refused_by_name(reentrant):
    model = net(
        lambda m, x: m.b(recomputed(lambda h: torch.tanh(m.c(h)), m.a(x), use_reentrant=reentrant)),
        a=linear(4, 4),
        b=linear(),
        c=linear(4, 4),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"torch.utils.checkpoint.*switch activation checkpointing off"):
            checked(model)


# Form, repeatability, independence.


def noisy(model, batch):
    return functional.cross_entropy(functional.dropout(model(batch[0]), training=True), batch[1], reduction="none")


def centred_by_the_batch(model, batch):
    losses = cross_entropy(model, batch)
    return losses - 0.5 * losses.mean()


def barely_centred(model, batch):
    losses = cross_entropy(model, batch)
    return losses - 0.01 * losses.mean()


def infinite_for_the_last(model, batch):
    return cross_entropy(model, batch) / (batch[0] != vectors()[0][-1]).any(1)


def squared(model, batch):
    return functional.mse_loss(model(batch[0])[:, :1], batch[1].float(), reduction="none")


def two_whatever_the_batch(model, batch):
    return model(batch[0]).sum(0)[:2].expand(len(batch[0]) // 2, 2).reshape(-1)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        pytest.param(lambda m, b: cross_entropy(m, b).mean(), r"returned shape \(\), expected", id="mean"),
        pytest.param(lambda m, b: cross_entropy(m, b).mean()[None], r"returned \(1,\) for a batch of 4", id="one mean"),
        pytest.param(lambda m, b: cross_entropy(m, b)[:, None, None], r"shape \(4, 1, 1\), expected", id="3 axes"),
        pytest.param(lambda m, b: cross_entropy(m, b).tolist(), "returned list, expected", id="no tensor"),
        pytest.param(lambda m, b: cross_entropy(m, b).bfloat16(), "losses are torch.bfloat16", id="bfloat16"),
        pytest.param(lambda m, b: cross_entropy(m, b).half(), "losses are torch.float16", id="float16"),
        pytest.param(lambda m, b: m(b[0]).argmax(1), "losses are torch.int64", id="integers"),
        pytest.param(infinite_for_the_last, "the loss of sample 6 is not finite", id="infinite"),
        pytest.param(noisy, "two evaluations of the same batch differ", id="dropout in the loss"),
        pytest.param(centred_by_the_batch, "depends on the rest of its batch", id="batch mean"),
        pytest.param(barely_centred, "depends on the rest of its batch", id="a little of the batch mean"),
        pytest.param(squared, "depends on the rest of its batch", id="(B, B)"),
        pytest.param(lambda m, b: (cross_entropy(m, b), None, 3), "returned tuple", id="three things"),
        pytest.param(lambda m, b: (cross_entropy(m, b), [1] * len(b[0])), "weights of list", id="weights as a list"),
        pytest.param(lambda m, b: (cross_entropy(m, b), torch.ones(1)), r"weights of shape \(1,\)", id="one weight"),
        pytest.param(
            lambda m, b: (cross_entropy(m, b), b[1] - 1.0), "weights that are negative", id="negative weights"
        ),
        pytest.param(
            lambda m, b: cross_entropy(m, b)[b[1] > 0], r"returned \(\d,\) for a batch of 4", id="some left out"
        ),
        pytest.param(lambda m, b: m(b[0])[:, 0].squeeze(), "given one sample; squeeze", id="squeeze"),
        pytest.param(lambda m, b: m(b["x"])[:, 0], "cannot be evaluated: TypeError", id="wrong access"),
    ],
)
def test_an_unusable_loss_is_refused_with_the_data_and_the_reason(loss, message):
    with pytest.raises(ValueError, match=message) as error:
        checked(loss=loss)
    assert str(error.value).startswith("train: ")


def test_query_losses_are_checked_too():
    x, y = vectors()
    with pytest.raises(ValueError, match=r"queries\['bad'\]: the loss of sample 0 is not finite"):
        checked(queries={"good": (x, y), "bad": (x * torch.nan, y)})
    with pytest.raises(ValueError, match=r"queries\['q'\]: the loss returned shape \(\)"):
        checked(query_losses={"q": lambda m, b: cross_entropy(m, b).mean()})


@pytest.mark.parametrize("bad", [1, 3, 5])
@pytest.mark.parametrize("where", ["train", "queries['q']"])
def test_a_bad_sample_is_named_wherever_it_is(bad, where):
    x, y = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    broken = x.clone()
    broken[bad * 7, 2] = torch.nan
    train, query = (broken, x) if where == "train" else (x, broken)
    task = Task(plain(), cross_entropy, train=(train, y), queries={"q": (query, y)}, forward_batch=6)
    with pytest.raises(
        ValueError, match=rf"{where.replace('[', '.').replace(']', '.')}: the loss of sample {bad * 7} is not finite"
    ):
        check(task, task.fitted(Checkpoint(0, task.state())))


def test_a_sample_whose_loss_is_not_finite_but_has_no_weight_is_no_concern():
    x, y = vectors()
    x[5] = torch.nan

    def loss(model, batch):
        return cross_entropy(model, batch), batch[0].isfinite().all(1).float()

    checked(loss=loss, data=(x, y), curvature=False)


def test_batch_norm_that_uses_the_batch_is_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="depends on the rest of its batch|more than 1 value per channel"):
        checked(model)


@pytest.mark.parametrize("grow", [lambda m: m.count.add_(1), lambda m: setattr(m, "count", m.count + 1)])
def test_a_forward_pass_that_changes_a_buffer_is_refused_by_its_name(grow):
    def forward(m, x):
        grow(m)
        return m.a(x)

    model = net(forward, a=linear())
    model.register_buffer("count", torch.zeros(()))
    with pytest.raises(ValueError, match="evaluating the loss changes 'count'"):
        checked(model)
    assert model.count == 0


def test_a_loss_that_normalises_the_weights_is_refused():
    def loss(model, batch):
        with torch.no_grad():
            model.a.weight.clamp_(-0.1, 0.1)
        return cross_entropy(model, batch)

    model = plain()
    before = model.a.weight.clone()
    with pytest.raises(ValueError, match="evaluating the loss changes 'a.weight'"):
        checked(model, loss)
    assert torch.equal(model.a.weight, before)


def test_random_data_are_refused_before_the_loss_is_blamed():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return N

        def __getitem__(self, index):
            return torch.randn(4), index % 3

    with pytest.raises(ValueError, match="train: sample 0 is another one each time it is read; switch off random"):
        checked(data=Noisy(), queries={"q": vectors()})


def test_out_of_memory_passes_as_what_it_is():
    def loss(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        checked(loss=loss)


def test_data_of_one_sample_and_token_losses_pass():
    x, y = vectors()
    checked(data=(x[:1], y[:1]))
    checked(loss=lambda m, b: m(b[0]).square())
    checked(loss=lambda m, b: (m(b[0]).square(), torch.tensor([1.0, 0.0, 2.0]).expand(len(b[0]), 3)))


def test_the_callers_gradient_mode_makes_no_difference():
    with torch.no_grad():
        checked()
    with torch.inference_mode():
        checked()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("where", ["train", "q"])
def test_noise_that_spares_the_samples_that_are_looked_at_closely_is_found(where):
    x, y = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 3
    first = len(x) if where == "q" else 0

    def rarely(model, batch):
        noisy = torch.zeros(len(batch[2]))
        noisy[batch[2] == first + 60] = torch.rand(()).item()  # one of all samples
        return cross_entropy(model, batch[:2]) + noisy

    numbers = torch.arange(400)
    data = {"train": (x, y, numbers[:200]), "queries": {"q": (x, y, numbers[200:])}}
    task = Task(plain(), rarely, **data, forward_batch=64)
    with pytest.raises(ValueError, match=r"differ, first at sample 60 .*must be deterministic") as error:
        check(task, task.fitted(Checkpoint(0, task.state())))
    assert str(error.value).startswith("train: " if where == "train" else "queries['q']: ")


def test_dropout_of_one_unit_in_a_thousand_is_found():
    x, y = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)), torch.arange(500) % 3

    def losses(model, batch):
        return nn.functional.cross_entropy(
            nn.functional.dropout(model(batch[0]), 0.003, training=True), batch[1], reduction="none"
        )

    torch.manual_seed(0)
    task = Task(plain(), losses, train=(x, y), queries={"q": (x, y)})
    with pytest.raises(ValueError, match="deterministic"):
        check(task, task.fitted(Checkpoint(0, task.state())))
