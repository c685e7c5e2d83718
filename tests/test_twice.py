"""Layers by their definition are the same functions as torch's own, and can be differentiated twice."""

import pytest
import torch
from torch import nn

from stagewise.twice import differentiate_twice

ROWS = (torch.tensor([[0, 3, 3], [6, 0, 1], [0, 0, 0]]),)
OFFSETS = (torch.tensor([0, 3, 3, 6, 1, 0]), torch.tensor([0, 2, 2, 5]))  # an empty bag among them


def both(inputs, **settings):
    """A bag of torch's, and one of ours with the same weights."""
    theirs, ours = (nn.EmbeddingBag(7, 2, dtype=torch.float64, **settings) for _ in range(2))
    torch.manual_seed(0)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    differentiate_twice(ours)
    return theirs(*inputs), ours(*inputs), theirs, ours


@pytest.mark.parametrize("inputs", [ROWS, OFFSETS], ids=["rows", "offsets"])
@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_an_embedding_bag_is_torchs_own_with_second_derivatives(mode, padding_idx, inputs):
    expected, found, theirs, ours = both(inputs, mode=mode, padding_idx=padding_idx)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(y.sin().sum(), m.weight)[0] for y, m in ((expected, theirs), (found, ours))]
    torch.testing.assert_close(*slopes)
    weight = ours.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda w: torch.func.functional_call(ours, {"weight": w}, inputs), (weight,))


def test_an_embedding_bag_with_weights_and_a_last_offset_is_torchs_own():
    words, offsets = OFFSETS
    inputs = (words, torch.cat([offsets, torch.tensor([len(words)])]), torch.rand(len(words)).double())
    expected, found, _, _ = both(inputs, mode="sum", include_last_offset=True, padding_idx=3)
    torch.testing.assert_close(found, expected)
