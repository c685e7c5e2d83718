"""Trees of concepts, and the data sets of items and features that they make.

Items are the leaves of a tree. Every concept (node) has a feature: "the item is below this concept". Items that are
alike share most features, so that the data hold structure at every level of the tree, coarse to fine
(Saxe, McClelland & Ganguli, PNAS 2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Nested = Mapping[str, Any] | Sequence[str]


@dataclass(frozen=True)
class Concept:
    """A node of a tree with all that is below it; without children it is an item.

    Attributes:
        name: unique in the tree.
        children: the concepts directly below.
    """

    name: str
    children: tuple[Concept, ...] = ()

    @classmethod
    def of(cls, name: str, below: Nested = ()) -> Concept:
        """From nested names: ``Concept.of("thing", {"animal": ["dog", "cat"], "plant": ["oak"]})``.

        Raises:
            ValueError: two concepts have the same name.
        """
        if isinstance(below, Mapping):
            children = tuple(cls.of(child, rest) for child, rest in below.items())
        else:
            children = tuple(cls(child) for child in below)
        concept = cls(name, children)
        names = [node.name for node in concept.nodes]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"concepts need different names, got {twice[0]!r} {names.count(twice[0])} times")
        return concept

    @classmethod
    def balanced(cls, depth: int, branching: int = 2, name: str = "0") -> Concept:
        """A tree with ``branching`` children at every node and branching^depth items; depth 0 is a single item.

        Raises:
            ValueError: a negative depth, or no branching.
        """
        if depth < 0 or branching < 1:
            raise ValueError(f"need depth >= 0 and branching >= 1, got {depth} and {branching}")
        below = range(branching) if depth else ()
        return cls(name, tuple(cls.balanced(depth - 1, branching, f"{name}.{child}") for child in below))

    @property
    def nodes(self) -> list[Concept]:
        """This concept and all below, the coarsest first (by depth, then from left to right)."""
        level, nodes = [self], []
        while level:
            nodes += level
            level = [child for node in level for child in node.children]
        return nodes

    @property
    def items(self) -> list[Concept]:
        """The leaves, from left to right."""
        return [item for child in self.children for item in child.items] if self.children else [self]

    @property
    def names(self) -> list[str]:
        """Names of the items."""
        return [item.name for item in self.items]

    @property
    def depth(self) -> int:
        """Edges on the longest way to an item."""
        return 1 + max(child.depth for child in self.children) if self.children else 0

    def features(self) -> Floats:
        """Which items are below which concepts: ``(node, item)`` of 0 and 1."""
        names = self.names
        return np.array([[float(name in set(node.names)) for name in names] for node in self.nodes])

    def groupings(self) -> list[list[str]]:
        """For every level below the root, coarse to fine, the concept that each item belongs to there.

        An item that hangs higher than a level stands for itself on it.
        """
        paths = _paths(self)
        return [[path[min(level, len(path) - 1)] for path in paths] for level in range(1, self.depth + 1)]

    def split_level(self) -> NDArray[np.intp]:
        """The level, from 1, on which two items part: ``(item, item)``; 0 for an item with itself.

        Siblings in a tree of depth 3 part on level 3, their cousins on level 2.
        """
        apart = np.array([[[a != b for b in level] for a in level] for level in self.groupings()], dtype=bool)
        if not len(apart):
            return np.zeros((1, 1), np.intp)
        return np.where(apart.any(0), apart.argmax(0) + 1, 0)


def _paths(concept: Concept) -> list[list[str]]:
    """The names from the root down to each item."""
    if not concept.children:
        return [[concept.name]]
    return [[concept.name, *path] for child in concept.children for path in _paths(child)]


@dataclass(frozen=True, eq=False)
class Items:
    """A data set of one-hot items and their features.

    Attributes:
        tree: where it comes from.
        targets: true features ``(item, feature)``.
        shown: the item of every training sample ``(sample,)``.
        shown_targets: what the network is told of it ``(sample, feature)``: the true features, with noise if asked.
    """

    tree: Concept
    targets: Floats
    shown: NDArray[np.intp]
    shown_targets: Floats

    @classmethod
    def of(
        cls,
        tree: Concept,
        *,
        diffused: int | None = None,
        flip: float = 0.1,
        noise: float = 0.0,
        counts: Mapping[str, int] | None = None,
        seed: int = 0,
    ) -> Items:
        """The items of a tree.

        Args:
            tree: the concepts.
            diffused: number of +1/-1 features that run down the tree from the root and change their sign on every edge
                with probability ``flip``, instead of one 0/1 feature per concept. Many of them have the same modes on
                average.
            flip: see ``diffused``.
            noise: standard deviation of what is added to the training targets, once for the whole training run.
            counts: how often an item is in the training set, where that is not once.
            seed: of features and noise.

        Raises:
            ValueError: a probability outside [0, 1], negative noise, or counts of unknown items or below 1.
        """
        if not 0 <= flip <= 1 or noise < 0 or (diffused is not None and diffused < 1):
            raise ValueError(
                f"need 0 <= flip <= 1, noise >= 0 and diffused >= 1, got flip={flip}, noise={noise}, "
                f"diffused={diffused}"
            )
        times = dict.fromkeys(tree.names, 1) | dict(counts or {})
        if bad := [name for name, count in times.items() if name not in tree.names or count < 1]:
            raise ValueError(f"counts: need an item of {tree.names} and at least 1, got {bad[0]!r}: {times[bad[0]]}")
        generator = np.random.default_rng(seed)
        targets = tree.features().T if diffused is None else _diffused(tree, diffused, flip, generator)
        shown = np.repeat(np.arange(len(targets)), [times[name] for name in tree.names])
        return cls(
            tree, targets, shown, targets[shown] + noise * generator.standard_normal((len(shown), targets.shape[1]))
        )

    @property
    def names(self) -> list[str]:
        """Names of the items."""
        return self.tree.names

    def white_targets(self) -> Floats:
        """The targets Y that training is shown ``(feature, item)``: with its noise, which the closed forms then learn.

        Raises:
            ValueError: an item is shown more than once, so that inputs are not white and there is no closed form.
        """
        if len(self.shown) != len(self.targets):
            often = [name for k, name in enumerate(self.names) if (self.shown == k).sum() > 1]
            raise ValueError(f"the closed forms need every item once in the training set, {often} are there more often")
        return self.shown_targets.T


def _diffused(tree: Concept, features: int, flip: float, generator: np.random.Generator) -> Floats:
    """Features that diffuse down the tree, ``(item, feature)`` of +1 and -1."""

    def below(node: Concept, values: Floats) -> list[Floats]:
        if not node.children:
            return [values]
        flips = [np.where(generator.random(features) < flip, -1.0, 1.0) for _ in node.children]
        return [leaf for child, sign in zip(node.children, flips, strict=True) for leaf in below(child, values * sign)]

    return np.array(below(tree, np.where(generator.random(features) < 0.5, -1.0, 1.0)))


KINGDOMS = Concept.of(
    "thing",
    {
        "animal": {"mammal": ["dog", "cat"], "bird": ["sparrow", "eagle"]},
        "plant": {"tree": ["oak", "pine"], "flower": ["lily", "rose"]},
    },
)
"""Eight items that part on three levels: 15 features."""

KINDS = {1: "cross", 2: "cousin", 3: "sibling"}
"""What pairs are called that part on a level of a tree of depth three."""

LOPSIDED = Concept.of(
    "thing",
    {
        "animal": {"mammal": ["dog", "cat", "horse"], "bird": ["sparrow", "eagle"], "fish": ["trout"]},
        "plant": {"tree": ["oak", "pine"], "flower": ["lily", "rose", "iris"]},
        "stone": [],
    },
)
"""A tree without symmetry: kinds of different size, and an item without neighbours."""
