"""Models and data with something wrong in them."""

from __future__ import annotations

import threading

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed
from torch.utils.data import Dataset, IterableDataset


class InAList(nn.Module):
    """Parameters in a plain list, which are not registered."""

    def __init__(self, dtype):
        super().__init__()
        self.weights = [nn.Parameter(torch.randn(3, 3, dtype=dtype))]
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.tanh(x @ self.weights[0]))


class InATuple(nn.Module):
    """A registered parameter that is used through a second place that nobody knows of."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.kept = (self.head.weight,)

    def forward(self, x):
        return functional.linear(x, self.kept[0], self.head.bias)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += len(x)
        return self.head(x)


class Locked(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.lock = threading.Lock()

    def forward(self, x):
        return self.head(x)


class Recomputed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body, self.head, self.reentrant = nn.Linear(3, 3), nn.Linear(3, 3), reentrant

    def forward(self, x):
        x = x.detach().requires_grad_() if self.reentrant and torch.is_grad_enabled() else x
        return self.head(torch.tanh(recomputed(self.body, x, use_reentrant=self.reentrant)))


class Once(torch.autograd.Function):
    """A square whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Detached(torch.autograd.Function):
    """A square whose backward pass detaches what it gets, so that its derivative is 0 without a word."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0].detach() * grad.detach()


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.body, self.head, self.function = nn.Linear(3, 3), nn.Linear(3, 3), function

    def forward(self, x):
        return self.head(self.function.apply(self.body(x)))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.phase = nn.Linear(3, 3), nn.Parameter(torch.ones((), dtype=torch.complex64))

    def forward(self, x):
        return self.head(x) * self.phase.abs().to(x.dtype)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = self.first

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Noisy(Dataset):
    """Random augmentation, of all but the first samples."""

    def __init__(self, x, y, first):
        self.x, self.y, self.first = x, y, first

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 0.1 * torch.randn(3).to(self.x) * (i >= self.first), self.y[i]


class Broken(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        if i == 9:
            raise OSError("no such image")
        return torch.zeros(3), 0


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(3), 0)])
