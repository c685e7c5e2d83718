"""The answers by brute force: plain autograd and plain training on copies of the model, in float64."""

from __future__ import annotations

import torch
from generated import Problem, by_sample, size_of
from torch import Tensor, nn


class BruteForce:
    """Everything at the start checkpoint of a problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.training = problem.training.copied()
        self.again = problem.training.copied()
        self.model = self.training.model
        self.moving = {n: p for n, p in self.training.named.items() if id(p) in self._updated()}
        self.sample_gradients, self.weights = self._of_samples("train")

    def _updated(self) -> set[int]:
        return {id(p) for group in self.training.optimizer.param_groups for p in group["params"]}

    def _flat(self, value: Tensor, **settings) -> Tensor:
        found = torch.autograd.grad(value, list(self.moving.values()), allow_unused=True, **settings)
        pairs = zip(found, self.moving.values(), strict=True)
        return torch.cat([torch.zeros_like(p).reshape(-1) if g is None else g.to_dense().reshape(-1) for g, p in pairs])

    def losses_of(self, model: nn.Module, name: str, rows: list[int], measured: bool) -> tuple[Tensor, Tensor]:
        """Loss and weight of some samples."""
        task = self.problem.task
        loss = task.query_losses.get(name, task.loss) if measured else task.loss
        return by_sample(loss(model, self.problem.batch(name, rows)), task.objective)

    def _of_samples(self, name: str, measured: bool = False) -> tuple[Tensor, Tensor]:
        """Gradient and weight of every sample of a data set, each evaluated alone."""
        pairs = [self.losses_of(self.model, name, [row], measured) for row in self.rows(name)]
        weights = torch.cat([weight for _, weight in pairs]).detach().double()
        return torch.stack([self._flat(loss.sum()) for loss, _ in pairs]), weights

    def rows(self, name: str) -> list[int]:
        return list(range(size_of(self.problem.choice, name)))

    def objective(self, model: nn.Module) -> Tensor:
        task, rows = self.problem.task, self.rows("train")
        values, weights = by_sample(task.loss(model, self.problem.batch("train", rows)), task.objective)
        return (weights * values).sum() / weights.sum()

    def gradient(self) -> Tensor:
        return self._flat(self.objective(self.model))

    def hessian(self, step: float = 1e-5) -> Tensor:
        """Dense, of the objective: central differences of its gradient, which need no second derivative of torch's."""
        rows = []
        for parameter in self.moving.values():
            for entry in parameter.data.reshape(-1).split(1):  # views: what is written here is the parameter
                there = []
                for sign in (1, -2):
                    entry += sign * step
                    there.append(self.gradient())
                entry += step
                rows.append((there[0] - there[1]) / (2 * step))
        matrix = torch.stack(rows)
        return (matrix + matrix.T) / 2

    def train_gradients(self) -> Tensor:
        """Derivative of n times the objective by the weight of one sample, the mean over every group."""
        scaled = (self.weights / self.weights.mean())[:, None] * self.sample_gradients
        return torch.stack([scaled[group].mean(0) for group in self.problem.trained])

    def query_gradients(self) -> Tensor:
        """Gradient of every query group's mean loss."""
        of_sets = {name: self._of_samples(name, True) for name in self.problem.choice.queries}
        means = []
        for name, rows in self.problem.queried:
            gradients, weights = of_sets[name][0][rows], of_sets[name][1][rows]
            means.append((weights[:, None] * gradients).sum(0) / weights.sum())
        return torch.stack(means)

    def query_losses(self, model: nn.Module) -> Tensor:
        """Mean loss of every query group."""
        means = []
        for name, rows in self.problem.queried:
            with torch.no_grad():
                losses, weights = self.losses_of(model, name, rows, True)
            means.append((weights * losses).sum() / weights.sum())
        return torch.stack(means)

    def squared_scale(self) -> Tensor:
        """The posterior's metric P, for each moving parameter."""
        choice, optimizer = self.problem.choice, self.training.optimizer
        adam = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
        metric = choice.posterior.metric or ("adam" if adam and choice.posterior.window else "euclidean")
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        usual, pieces, window = self._usual_rate(), [], choice.posterior.window
        slope = dict(
            zip(self.moving, torch.split(self._clipped(), [p.numel() for p in self.moving.values()]), strict=True)
        )
        touched = self.sample_gradients[self.weights > 0].abs().sum(0) > 0
        touched = dict(zip(self.moving, torch.split(touched, [p.numel() for p in self.moving.values()]), strict=True))
        for name, parameter in self.moving.items():
            piece = torch.ones(parameter.numel()).double()
            if metric == "adam":
                group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
                kept, beta = optimizer.state.get(parameter, {}), group["betas"][1]
                moment = kept["exp_avg_sq"].reshape(-1) if kept else torch.zeros(parameter.numel()).double()
                count = float(kept["step"]) if kept else 0.0
                second = moment / (1 - beta**count) if count else moment
                moves = moment > 0
                if window:
                    ahead = beta**window * moment + (1 - beta**window) * slope[name] ** 2
                    second = torch.maximum(second, ahead / (1 - beta ** (count + window)))
                    moves = touched[name] & (second > 0)
                piece = torch.where(moves, 1 / (second.sqrt() + group["eps"]), 0.0)
            pieces.append(piece * (rates[id(parameter)] / usual if window else 1.0))
        return torch.cat(pieces)

    def _clipped(self) -> Tensor:
        """The full gradient as the optimiser would see it."""
        return self.gradient() * self._clip_factor()

    def _clip_factor(self) -> float:
        if self.problem.rule.clip is None:
            return 1.0
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        found = torch.autograd.grad(self.objective(self.model), parameters, allow_unused=True)
        norm = sum(float(g.square().sum()) for g in found if g is not None) ** 0.5
        return min(1.0, self.problem.rule.clip / norm)

    def _usual_rate(self) -> float:
        groups = self.training.optimizer.param_groups
        return max(groups, key=lambda g: sum(p.numel() for p in g["params"]))["lr"]

    def damping(self) -> float:
        """Precision of the localisation in units of the objective's curvature."""
        posterior = self.problem.choice.posterior
        if posterior.window is None:
            return posterior.gamma / (posterior.n_beta or 10 * self.problem.choice.n)
        # What a constant gradient of 1 does in the window, from the optimiser's memory of nothing.
        facts, moved, memory = self.training.optimizer.param_groups[0], 0.0, 0.0
        for _ in range(posterior.window):
            if "betas" in facts:
                memory = facts["betas"][0] * memory + (1 - facts["betas"][0])
            else:
                memory = facts["momentum"] * memory + 1
            moved += self._usual_rate() * memory
        return 1 / (moved * self._clip_factor())

    def gradient_product(self) -> Tensor:
        scale = self.squared_scale()
        product = (self.train_gradients() * scale) @ self.query_gradients().T
        return -product / (self.damping() * self.problem.choice.n)

    def damped(self) -> Tensor:
        """With the dense Hessian, whose eigenvalues below minus half the damping are raised to it."""
        root, damping = self.squared_scale().sqrt(), self.damping()
        values, vectors = torch.linalg.eigh(root[:, None] * self.hessian() * root)
        solve = (vectors / (values.clamp(min=-damping / 2) + damping)) @ vectors.T
        product = (self.train_gradients() * root) @ solve @ (self.query_gradients() * root).T
        return -product / self.problem.choice.n

    def tracin(self, updates: int) -> Tensor:
        """The sum over some updates, all as at the start; a gradient is followed for 1 + b + b^2 + ... updates."""
        optimizer = self.training.optimizer
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        length = torch.cat([torch.full((p.numel(),), rates[id(p)], dtype=torch.float64) for p in self.moving.values()])
        length = length * self._clip_factor() * updates / (1 - optimizer.param_groups[0]["momentum"])
        return -(self.train_gradients() * length) @ self.query_gradients().T / self.problem.choice.n

    def after(self, updates: int, samples: list[int], weight: float) -> Tensor:
        """Query losses after a training in which some samples count ``weight`` times."""
        beta = torch.ones(self.problem.choice.n).double()
        beta[samples] = weight
        return self.query_losses(self.again.at(self.training).run(updates, beta).model)

    def effects(self, updates: int, weight: float) -> Tensor:
        """Changed minus unchanged query losses."""
        unchanged = self.after(updates, [], 1.0)
        return torch.stack([self.after(updates, group, weight) - unchanged for group in self.problem.trained])

    def unrolled(self, updates: int, step: float = 1e-4) -> Tensor:
        """Central differences of whole trainings by the weight of every group, per sample."""
        rows = []
        for group in self.problem.trained:
            up, down = (self.after(updates, group, 1 + sign * step) for sign in (1, -1))
            rows.append((up - down) / (2 * step * len(group)))
        return torch.stack(rows)
