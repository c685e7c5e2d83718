"""Checkpoints under the names of transformers' files, against what its own loading makes of them."""

import pytest
import torch

from stagewise.checkpoint import Checkpoint, CheckpointError, Optimizer, ParameterGroup
from stagewise.fitting import fitted
from stagewise.functional import PureModel

transformers = pytest.importorskip("transformers")


def neox(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}
    fixed = {"vocab_size": 13, "max_position_embeddings": 8, "rotary_pct": 0.5, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes | fixed | settings)).eval()


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=13, bos_token_id=0, eos_token_id=0, **sizes)
    ).eval()


def old_pythia():
    """A state dict as Pythia's files have it: an ``embed_out``, masks and frequencies in every layer."""
    generator = torch.Generator().manual_seed(1)
    file = {}
    for name, tensor in neox().state_dict().items():
        file[name.replace("lm_head", "embed_out")] = torch.randn(tensor.shape, generator=generator)
    for layer in range(2):
        at = f"gpt_neox.layers.{layer}.attention."
        file[at + "bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        file[at + "masked_bias"] = torch.tensor(-1e9)
        file[at + "rotary_emb.inv_freq"] = torch.tensor([1.0, 0.01])
    return file


def own_loading(model, file):
    """What ``from_pretrained`` makes of a file."""
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=dict(file))
    return loaded.state_dict()


def assert_as_loaded(model, file):
    want = own_loading(model, file)
    got = fitted(PureModel(model), Checkpoint(3, file)).params
    for name, parameter in model.named_parameters():
        assert torch.equal(got[name], want[name]), name
        assert not torch.equal(got[name], parameter), name


def test_an_old_file_of_pythia_is_what_its_own_loading_makes_of_it():
    assert_as_loaded(neox(), old_pythia())


def test_wrappers_are_taken_off_before_names_are_translated():
    assert_as_loaded(neox(), old_pythia())
    file = {f"module._orig_mod.{name}": tensor for name, tensor in old_pythia().items()}
    got, want = (fitted(PureModel(neox()), Checkpoint(3, f)) for f in (file, old_pythia()))
    assert got.digest == want.digest


def test_a_file_of_the_body_alone_fills_a_model_whose_head_is_tied_to_it():
    other = {n: torch.randn_like(t) for n, t in gpt2().transformer.state_dict().items()}
    other["h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()  # in files of earlier versions
    assert_as_loaded(gpt2(), other)


def test_a_file_that_save_pretrained_wrote_is_read_back(tmp_path):
    from stagewise.checkpoints import Trajectory

    source = neox()
    source.save_pretrained(tmp_path / "step5")
    got = fitted(PureModel(neox()), Trajectory.from_directory(tmp_path).load(5)).params
    for name, parameter in source.named_parameters():
        assert torch.equal(got[name], parameter)


def test_what_the_optimizer_remembers_goes_by_the_same_names():
    file = old_pythia()
    moments = {name: tensor for name, tensor in file.items() if name.endswith("weight")}
    groups = (ParameterGroup(("embed_out.weight",), 0.1, 0.01), ParameterGroup(("gpt_neox.embed_in.weight",), 0.2))
    checkpoint = Checkpoint(
        3, file, Optimizer("adam", 0.1, groups=groups), moments, moments, update_counts={"embed_out.weight": 2}
    )
    known = fitted(PureModel(neox()), checkpoint)
    assert torch.equal(known.second_moment["lm_head.weight"], file["embed_out.weight"])
    assert torch.equal(known.first_moment["gpt_neox.embed_in.weight"], file["gpt_neox.embed_in.weight"])
    assert known.update_counts == {"lm_head.weight": 2}
    assert known.optimizer.group_of("lm_head.weight").weight_decay == 0.01
    assert len(known.second_moment) == len(moments)


def test_names_that_are_the_models_own_already_are_left_alone():
    model = neox()
    known = fitted(PureModel(model), Checkpoint(3, model.state_dict()))
    for name, tensor in model.state_dict().items():
        assert torch.equal(known.params[name], tensor), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"gpt_neox.layers.2.attention.dense.weight": torch.zeros(16, 16)},
            "'gpt_neox.layers.2.attention.dense.weight', wh",
        ),
        ({"embed_out.bias": torch.zeros(13)}, "has 'embed_out.bias', which the model does not"),
        ({"lm_head.weight": torch.zeros(13, 16)}, "'embed_out.weight' and 'lm_head.weight' are both 'lm_head.weight'"),
        (
            {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(1)},
            "1 rotary frequencies, the model 2; is its",
        ),
    ],
)
def test_what_is_not_of_this_model_is_refused_as_before(change, said):
    with pytest.raises(CheckpointError, match=said):
        fitted(PureModel(neox()), Checkpoint(3, old_pythia() | change))


def test_what_is_missing_is_refused_as_before():
    file = old_pythia()
    del file["embed_out.weight"]
    with pytest.raises(CheckpointError, match=r"lacks parameter 'lm_head.weight'"):
        fitted(PureModel(neox()), Checkpoint(3, file))


def test_models_that_are_not_of_transformers_keep_their_names():
    with pytest.raises(CheckpointError, match="has 'embed_out.weight'"):
        fitted(PureModel(torch.nn.Linear(2, 2)), Checkpoint(0, {"embed_out.weight": torch.zeros(2, 2)}))


def test_moments_of_parameters_that_the_model_does_not_have_are_not_dropped_in_silence():
    model = torch.nn.Linear(2, 2)
    moments = {"weight": torch.ones(2, 2), "other": torch.ones(2)}
    checkpoint = Checkpoint(3, model.state_dict(), Optimizer("adam", 0.1), moments, moments)
    with pytest.raises(CheckpointError, match="its optimizer has 'other', which the model does not"):
        fitted(PureModel(model), checkpoint)
