"""One batch under one model: run by hand for the reference, and by the library for the rules."""

from __future__ import annotations

from typing import Any

import torch
from smart_pytorch import SMARTLoss, sym_kl_loss
from torch import Tensor

from smartreg import SmartLoss

from .reference import Ball, Deltas, divergence
from .rules import NOISE, Rule
from .subject import TASKS, Batch, Model

DROPOUT_SEED = 123  # of the masks that the reference and the library's clean pass share in train mode
TINY = 0.01


class Case:
    """A model and a batch; `Case.run` is the function that is searched, `Case.reached` what the library finds.

    Args:
        model: Its weights are frozen here, which no rule notices.
        batch: What is measured on.
        task: Which head it is.
        train: Whether dropout is on, with the same masks in every pass.
    """

    def __init__(self, model: Model, batch: Batch, task: str, *, train: bool) -> None:
        self.model = model.requires_grad_(False).train(train)
        self.batch = batch
        self.kind = TASKS[task].divergence
        self.embeddings = [model.get_input_embeddings()(ids) for ids in batch.ids]
        with torch.no_grad():
            self.clean = self.run([torch.zeros_like(embedded) for embedded in self.embeddings])

    def run(self, deltas: Deltas) -> Tensor:
        """The outputs at x + delta."""
        torch.manual_seed(DROPOUT_SEED)
        moved = [embedded + delta for embedded, delta in zip(self.embeddings, deltas, strict=True)]
        return self.model.from_embeddings(moved, self.batch.masks)

    def balls(self, norm: str, over: str, epsilon: float) -> list[Ball]:
        pairs = zip(self.embeddings, self.batch.masks, strict=True)
        return [Ball.around(e, mask, norm=norm, over=over, epsilon=epsilon) for e, mask in pairs]

    def values(self, deltas: Deltas) -> Tensor:
        """The divergence of each example."""
        with torch.no_grad():
            return divergence(self.kind, self.run(deltas), self.clean)

    def reached(self, rule: Rule, norm: str, over: str, epsilon: float, steps: int, seed: int) -> Tensor:
        """The divergence of each example that a rule reaches."""
        options = {**rule.settings(epsilon, steps), "norm": norm, "norm_over": over}
        return self.values(self._found(options, seed, rule.u))

    def power_iteration(self, over: str, epsilon: float, iterations: int, seed: int) -> Tensor:
        """VAT, through the library: a direction from a tiny ball, taken out to the radius.

        In a ball a hundredth as large, a step longer than its diameter ends on the sphere, next to the gradient's own
        direction wherever it began, so that steps are power iterations; a call without steps keeps what they found.
        """
        ball = {**NOISE, "norm": "2", "norm_over": over, "ascent": "projected"}
        small = TINY * epsilon
        steps = {"epsilon": small, "noise_std": small, "step_size": 100 * small, "steps": iterations}
        direction = self._found({**ball, **steps}, seed)
        far = [delta / TINY for delta in direction]
        return self.values(self._found({**ball, "epsilon": epsilon, "steps": 0}, seed, far))

    def packages(self, epsilon: float, seed: int) -> dict[str, Tensor]:
        """The perturbations of MT-DNN's rule and of smart-pytorch, brought to the length that ε has for norm 2."""
        published = {"epsilon": 1e-6, "step_size": 1e-3, "noise_std": 1e-5, "epsilon_scale": "absolute", "steps": 1}
        rule = {**NOISE, **published, "ascent": "normalized", "norm": "inf", "norm_over": "token"}
        found = {"MT-DNN's rule": self._found(rule, seed)}
        if self.kind == "symmetric_kl":  # the package's softmax has nothing to say of a single output
            found["smart-pytorch"] = [self._smart_pytorch(seed)]
        balls = self.balls("2", "example", epsilon)
        return {
            name: self.values([ball.steepest(delta) for ball, delta in zip(balls, deltas, strict=True)])
            for name, deltas in found.items()
        }

    def _found(self, options: dict[str, Any], seed: int, noise: Any = None) -> Deltas:
        """Where `SmartLoss` ends: what its last pass saw, less the embeddings."""
        generator = torch.Generator().manual_seed(seed)
        smart = SmartLoss(self.model, divergence=self.kind, generator=generator, **options)
        seen: list[Tensor] = []
        # Registered after that of `SmartLoss`, so that it sees what the model sees.
        handle = self.model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(out))

        def forward(model: Any) -> Tensor:
            seen.clear()
            return model(self.batch)

        torch.manual_seed(DROPOUT_SEED)
        smart(forward, mask=self.batch.masks, noise=noise)
        handle.remove()
        smart.remove()
        return [moved.detach() - clean for moved, clean in zip(seen, self.embeddings, strict=True)]

    def _smart_pytorch(self, seed: int) -> Tensor:
        """The perturbation that the package makes, with its own defaults, divergence and (in train mode) dropout."""
        seen: list[Tensor] = []

        def evaluated(embedded: Tensor) -> Tensor:
            seen.append(embedded.detach())
            return self.model.from_embeddings([embedded], self.batch.masks)

        torch.manual_seed(seed)
        clean = evaluated(self.embeddings[0])
        SMARTLoss(evaluated, sym_kl_loss)(self.embeddings[0], clean)
        return seen[-1] - self.embeddings[0]
