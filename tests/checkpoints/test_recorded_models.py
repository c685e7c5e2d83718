"""Models are recorded under their own names, whole, and with what acts in them in train mode."""

import pytest
import torch
from small_runs import assert_same
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from stagewise.checkpoints import Recorder, Trajectory


def make_model(dropout: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(dropout), nn.Linear(6, 3))


def loaded(folder, step=0):
    return Trajectory.from_directory(folder).load(step)


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "compile": compiled,
    "DataParallel": DataParallel,
    "compile of DataParallel": lambda model: compiled(DataParallel(model)),
    "DataParallel of compile": lambda model: DataParallel(compiled(model)),
    "DistributedDataParallel": DistributedDataParallel,
    "compile of DistributedDataParallel": lambda model: compiled(DistributedDataParallel(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_leave_no_prefix_on_any_name(tmp_path, wrapper, request):
    if "Distributed" in wrapper:
        request.getfixturevalue("one_process")
    model = make_model()
    wrapped = WRAPPERS[wrapper](model)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.ndim > 1], lr=0.1)
    record = Recorder(tmp_path / "run", wrapped, optimizer, [1])
    wrapped(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
    record(1)
    checkpoint = loaded(tmp_path / "run", 1)
    assert_same(checkpoint.params, model.state_dict())
    assert checkpoint.optimizer.updated == {"0.weight", "3.weight"}
    assert set(checkpoint.second_moment) == {"0.weight", "3.weight"}
    assert checkpoint.train_mode == ("BatchNorm1d", "Dropout")


def test_a_layer_compiled_by_itself_keeps_its_name(tmp_path):
    model = make_model()
    names = set(model.state_dict())
    model[1] = compiled(model[1])
    Recorder(tmp_path, model, torch.optim.SGD(model[1].parameters()), [0])(0)
    assert set(loaded(tmp_path).params) == names
    assert loaded(tmp_path).optimizer.updated == {"1.weight", "1.bias"}


def test_a_submodule_that_is_merely_called_module_stays_in_the_names(tmp_path):
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    Recorder(tmp_path, model, None, [0])(0)
    assert set(loaded(tmp_path).params) == {"module.weight", "module.bias"}


def test_a_compiled_update_is_seen_like_any_other(tmp_path):
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.25), foreach=False)
    record = Recorder(tmp_path, model, optimizer, [0, 3])
    record(0)
    step_compiled = torch.compile(optimizer.step, backend="eager")
    for step in (1, 2, 3):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        step_compiled()
        record(step)
    assert loaded(tmp_path, 3).learning_rates in ((0.25,) * 3, ())  # never a wrong number of them


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.inner = nn.Module()
        self.inner.register_buffer("passing", torch.ones(2), persistent=False)
        self.inner.register_buffer("mask", torch.full((2,), -torch.inf))


def test_persistent_buffers_are_recorded_and_passing_ones_are_not(tmp_path):
    Recorder(tmp_path, Buffers(), None, [0])(0)
    assert set(loaded(tmp_path).params) == {"layer.weight", "layer.bias", "kept", "inner.mask"}


def test_looking_at_a_model_runs_none_of_its_hooks(tmp_path):
    model = Buffers()
    model.register_state_dict_post_hook(lambda *_: 1 / 0)
    model.register_forward_hook(lambda *_: 1 / 0)
    Recorder(tmp_path, model, None, [0])(0)
    assert "kept" in loaded(tmp_path).params


def test_half_precision_is_recorded_exactly_in_float32(tmp_path):
    model = make_model().to(torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters())
    record = Recorder(tmp_path, model, optimizer, [1])
    model(torch.randn(5, 4, dtype=torch.bfloat16)).square().mean().backward()
    optimizer.step()
    record(1)
    checkpoint = loaded(tmp_path, 1)
    assert_same(
        checkpoint.params, {n: t.float() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    )
    assert {tensor.dtype for tensor in checkpoint.second_moment.values()} == {torch.float32}


# Train mode.


def test_layers_in_train_mode_are_named_and_those_in_eval_mode_are_not(tmp_path):
    model = make_model()
    record = Recorder(tmp_path, model, None, range(3))
    record(0)
    model[1].eval()
    record(1)
    model.eval()
    record(2)
    kinds = [loaded(tmp_path, step).train_mode for step in range(3)]
    assert kinds == [("BatchNorm1d", "Dropout"), ("Dropout",), ()]


def test_a_model_evaluated_before_the_call_was_in_train_mode_when_it_was_updated(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    record = Recorder(tmp_path, model, optimizer, [0, 1, 2])
    record(0)
    for step in (1, 2):
        model.train()
        optimizer.step()
        model.eval()
        record(step)
    assert [loaded(tmp_path, step).train_mode for step in (1, 2)] == [("BatchNorm1d", "Dropout")] * 2


def test_weights_alone_still_say_what_acted_in_train_mode(tmp_path):
    model = make_model()
    with pytest.warns(UserWarning, match="RMSprop is none of SGD"):
        Recorder(tmp_path, model, torch.optim.RMSprop(model.parameters()), [0])(0)
    assert loaded(tmp_path).train_mode == ("BatchNorm1d", "Dropout")


def test_an_optimizer_inside_of_accelerates_is_the_one_recorded(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = make_model()
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, plain)
    record = Recorder(tmp_path, model, optimizer, [0, 1])
    record(0)
    accelerator.backward(model(torch.randn(5, 4)).square().mean())
    optimizer.step()
    record(1)
    checkpoint = loaded(tmp_path, 1)
    assert (checkpoint.optimizer.momentum, checkpoint.learning_rates) == (0.9, (0.1,))
    assert set(checkpoint.first_moment) == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}
