"""The training loss: F(θ) = L(θ) + λ_s R_s(θ) + μ D_Breg(θ, θ̃). This is the file to copy from."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from smartreg import MomentumBregman, SmartLoss
from smartreg.results import SmartStats

from .batching import Batch
from .settings import BETAS, Settings
from .tasks import Task, task_loss


@dataclass(frozen=True)
class Losses:
    """The parts of a batch's loss; terms that are off are None."""

    total: Tensor
    task: Tensor
    smoothness: Tensor | None = None
    proximal: Tensor | None = None
    stats: SmartStats | None = None


class Objective:
    """Computes the loss of a batch, with the regularizers that the configuration asks for.

    Args:
        model: what `forward` is to call: the model, compiled or not, under DDP or not.
        plain: the model inside, which the teacher copies.
        settings: the run's settings.
        total_updates: teacher updates of the whole run (for a β that follows from it).
        task_loss: the loss without regularizers, of (task, outputs, labels).
    """

    def __init__(
        self,
        model: nn.Module,
        plain: nn.Module,
        settings: Settings,
        total_updates: int,
        task_loss: Callable[[Task, Tensor, Tensor], Tensor] = task_loss,
    ) -> None:
        self.model, self.settings, self.task_loss = model, settings, task_loss
        self.smart: dict[str, SmartLoss] = {}
        self.bregman: MomentumBregman | None = None
        if settings.smooth:
            options = settings.library_options("smoothness")
            # Values have no uniform prediction to go towards: their direction is drawn.
            starts = {settings.start, "gradient"} if settings.start == "towards_uniform" else {settings.start}
            self.smart = {start: SmartLoss(model, **{**options, "start": start}) for start in starts}
        if settings.proximal:
            options = settings.library_options("proximal")
            if options["beta"] in BETAS:
                options["beta"] = BETAS[options["beta"]](total_updates)
            self.bregman = MomentumBregman(plain, **options)

    def __call__(self, batch: Batch, step: int) -> Losses:
        """The loss of a batch at an optimizer step (which the noise is seeded by)."""
        settings, divergence = self.settings, batch.task.divergence

        def forward(model: nn.Module) -> Tensor:
            return model(batch.task.name, batch.sentences, batch.masks)

        smoothness = proximal = stats = None
        # λ_s = 0 would pay for the search of a perturbation and then ignore it.
        if self.smart and settings.lambda_s > 0:
            smart, noise = self._search(batch, (settings.seed, step, batch.task.name))
            outputs, smoothness = smart(forward, mask=batch.masks, divergence=divergence, noise=noise)
            stats = smart.stats
        else:
            outputs = forward(self.model)
        if batch.labels is None:
            raise ValueError("batch: expected labels to train on, got a batch of a label-less file")
        task = total = self.task_loss(batch.task, outputs, batch.labels)
        if smoothness is not None:
            total = total + settings.lambda_s * smoothness
        if self.bregman is not None and settings.mu > 0:
            proximal = self.bregman(forward, outputs, divergence=divergence)
            total = total + settings.mu * proximal
        return Losses(total, task, smoothness, proximal, stats)

    def _search(self, batch: Batch, key: tuple[object, ...]) -> tuple[SmartLoss, Callable[[Tensor], Tensor] | None]:
        """The regularizer of a batch, and what its start is drawn by."""
        settings = self.settings
        if settings.start == "noise":
            draw = SeededNoise(settings.noise_std, settings.epsilon_scale, batch.masks, batch.rows, key)
            return self.smart["noise"], draw
        if batch.task.divergence == "mse":
            return self.smart["gradient"], partial(seeded_normal, rows=batch.rows, key=key)
        return self.smart[settings.start], None

    def stepped(self, step: int) -> None:
        """To be called after optimizer step number `step` (from 0): moves the teacher every `inner_steps` steps."""
        if self.bregman is not None and (step + 1) % self.settings.inner_steps == 0:
            self.bregman.update()


class SeededNoise:
    """ν for `SmartLoss(...)(..., noise=SeededNoise(...))`: called once for each look-up, in order.

    Drawn from the global random state, the noise of an example would depend on how many processes share the batch and
    on who comes before it. Here each example has its own generator, seeded by (seed, step, task, row, sentence), so
    that one process and eight draw the same, and a resumed run needs no state for it.

    Args:
        std: σ.
        scale: "rms", where σ is a multiple of the root mean square of the example's unmasked embedding entries, or
            "absolute".
        masks: True for real tokens, one (batch, length) for each look-up.
        rows: what names the examples of the batch.
        key: what the seed depends on besides row and look-up: the run's seed, the step, the task.
    """

    def __init__(
        self, std: float, scale: str, masks: Sequence[Tensor], rows: Sequence[int], key: tuple[object, ...]
    ) -> None:
        self.std, self.scale, self.masks, self.rows, self.key = std, scale, masks, rows, key
        self.calls = 0

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Noise of the shape of the embeddings, (batch, length, dim); zero on padding."""
        lookup = self.calls % len(self.masks)
        self.calls += 1
        mask = self.masks[lookup]
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        noise = torch.zeros(embeddings.shape, dtype=dtype, device=embeddings.device)
        generator = torch.Generator(embeddings.device)
        for i, (row, length) in enumerate(zip(self.rows, mask.sum(1).tolist(), strict=True)):
            generator.manual_seed(seed_of(*self.key, row, lookup))
            # Drawn at the example's own length: the padding depends on the batch.
            noise[i, :length] = torch.randn(
                length, embeddings.shape[-1], generator=generator, device=embeddings.device, dtype=dtype
            )
        if self.scale == "absolute":
            return noise * self.std
        squares = embeddings.detach().to(dtype).square().mean(-1) * mask  # (batch, length)
        return noise * (self.std * (squares.sum(1) / mask.sum(1)).sqrt()[:, None, None])


def seeded_normal(outputs: Tensor, *, rows: Sequence[int], key: tuple[object, ...]) -> Tensor:
    """Standard normal numbers of the shape of the outputs (batch, ...), each example's by a seed of its own."""
    drawn = []
    for row in rows:
        generator = torch.Generator().manual_seed(seed_of(*key, row))
        drawn.append(torch.randn(outputs.shape[1:], generator=generator))
    return torch.stack(drawn).to(outputs.device)


def seed_of(*parts: object) -> int:
    """A 63-bit seed that is a function of its parts, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
