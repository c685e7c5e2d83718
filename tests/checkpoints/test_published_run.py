"""A published run from the cache to a result: half precision, pickled, under old names, without an optimiser."""

import numpy as np
import pytest
import torch
from test_hub import publish

import stagewise as sw

transformers = pytest.importorskip("transformers")


def neox():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    fixed = {"vocab_size": 13, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes | fixed)).eval()


def as_published(model):
    file = {name.replace("lm_head", "embed_out"): t.detach().half() for name, t in model.state_dict().items()}
    at = "gpt_neox.layers.0.attention."
    masks = {"bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril(), "masked_bias": torch.tensor(-1e9).half()}
    return file | {at + name: tensor for name, tensor in masks.items()}


def losses(model, batch):
    logits = model(batch).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)


def test_a_run_from_the_hub_is_answered_like_the_same_weights_in_memory(tmp_path):
    tokens = torch.randint(13, (16, 8), generator=torch.Generator().manual_seed(1))
    model, held = neox(), []
    for step in (0, 8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        publish(tmp_path, step, {"pytorch_model.bin": lambda path: torch.save(as_published(model), path)})
        weights = {name: tensor.half().float() for name, tensor in model.state_dict().items()}
        held.append(sw.Checkpoint(step, weights))
    published = sw.Trajectory.from_hub("org/tiny", cache_dir=tmp_path, local_files_only=True)
    task = sw.Task(neox(), losses, train=tokens, queries={"val": tokens[:2]}, train_groups=["a", "b"] * 8)

    posterior = sw.LocalPosterior(gamma=1.0)
    got, want = (
        sw.gradient_product(task, run, posterior=posterior) for run in (published, sw.Trajectory.from_checkpoints(held))
    )
    assert got.step.values.tolist() == [0, 8]
    np.testing.assert_array_equal(got.value, want.value)

    adam = sw.Optimizer("adam", 1e-3, betas=(0.9, 0.95), batch_size=64, clip_norm=1.0)
    known = sw.Trajectory.from_checkpoints([sw.estimated_second_moment(task, published.load(8), adam, batches=8)])
    window = sw.gradient_product(task, known, posterior=sw.LocalPosterior(window=5))
    assert window.attrs["metric"] == "adam, second moment estimated"
    assert np.isfinite(window.value).all()
    assert (window.value != 0).any()
