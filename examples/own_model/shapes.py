"""The data, the model and its loss: the part of your own project that stagewise needs to import."""

import torch
from torch import nn
from torch.nn import functional

import stagewise as sw

SHAPES = ("disc", "ring", "square", "cross")


def draw(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy 10 x 10 images of discs, rings, squares and crosses: (count, 1, 10, 10) and their classes (count,)."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(len(SHAPES), (count,), generator=generator)
    centre = 4 + torch.rand(count, 2, 1, 1, generator=generator)
    size = 2.5 + torch.rand(count, 1, 1, generator=generator)
    grid = torch.arange(10.0)
    dy, dx = grid[:, None] - centre[:, 0], grid[None, :] - centre[:, 1]
    radius, box = (dx**2 + dy**2).sqrt(), torch.maximum(dx.abs(), dy.abs())
    disc = radius < size
    ring = disc & (radius > size - 1.5)
    square = box < size
    cross = square & (torch.minimum(dx.abs(), dy.abs()) < 1)
    pictures = torch.stack([disc, ring, square, cross], 1)[torch.arange(count), classes].float()
    noise = 0.3 * torch.randn(pictures.shape, generator=generator)
    return (pictures + noise)[:, None], classes


class ConvNet(nn.Module):
    """Two convolutions and a linear read-out, about 600 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(4, 8, 3),
            nn.ReLU(),
        )
        self.read_out = nn.Linear(8 * 2 * 2, len(SHAPES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes)."""
        return self.read_out(self.features(images).flatten(1))


def losses(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """One loss per image, not their mean: stagewise asks which image did what."""
    images, classes = batch
    return functional.cross_entropy(model(images), classes, reduction="none")


def task() -> sw.Task:
    """What is studied: named in config.yaml as `shapes.py:task`."""
    train, test = draw(240, seed=1), draw(120, seed=2)
    return sw.Task(
        ConvNet().eval(),
        losses,
        train=train,
        queries={"test": test},
        train_groups=[SHAPES[c] for c in train[1]],
        query_groups={"test": [SHAPES[c] for c in test[1]]},
    )
