"""The training loss: F(θ) = L(θ) + λ_s R_s(θ) + μ D_Breg(θ, θ̃). This is the file to copy from."""

from dataclasses import dataclass

from torch import Tensor, nn

from smartreg import MomentumBregman, SmartLoss, paper_beta
from smartreg.results import SmartStats

from .batching import Batch
from .noise import SeededNoise
from .settings import Settings
from .tasks import task_loss


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
        total_updates: teacher updates of the whole run (for the paper's schedule of β).
    """

    def __init__(self, model: nn.Module, plain: nn.Module, settings: Settings, total_updates: int) -> None:
        self.model, self.settings = model, settings
        self.smart: SmartLoss | None = None
        self.bregman: MomentumBregman | None = None
        if settings.smooth:
            self.smart = SmartLoss(
                model,
                epsilon=settings.epsilon,
                step_size=settings.step_size,
                noise_std=settings.noise_std,
                steps=settings.ascent_steps,
                norm=settings.norm,
                norm_over=settings.norm_over,  # type: ignore[arg-type]  # argparse checked the choice
                epsilon_scale=settings.epsilon_scale,  # type: ignore[arg-type]  # argparse checked the choice
                ascent=settings.ascent,  # type: ignore[arg-type]  # argparse checked the choice
                dropout=settings.smart_dropout,  # type: ignore[arg-type]  # argparse checked the choice
                detach_reference=settings.detach_reference,
                memory_efficient=settings.memory_efficient,
            )
        if settings.proximal:
            beta = paper_beta(total_updates) if settings.beta == "paper" else settings.beta
            self.bregman = MomentumBregman(plain, beta=beta)  # type: ignore[arg-type]  # "paper" is the only string

    def __call__(self, batch: Batch, step: int) -> Losses:
        """The loss of a batch at an optimizer step (which the noise is seeded by)."""
        settings, divergence = self.settings, batch.task.divergence

        def forward(model: nn.Module) -> Tensor:
            return model(batch.task.name, batch.sentences, batch.masks)

        smoothness = proximal = stats = None
        # λ_s = 0 would pay for the search of a perturbation and then ignore it.
        if self.smart is not None and settings.lambda_s > 0:
            key = (settings.seed, step, batch.task.name)
            noise = SeededNoise(settings.noise_std, settings.epsilon_scale, batch.masks, batch.rows, key)
            outputs, smoothness = self.smart(forward, mask=batch.masks, divergence=divergence, noise=noise)
            stats = self.smart.stats
        else:
            outputs = forward(self.model)
        if batch.labels is None:
            raise ValueError("batch: expected labels to train on, got a batch of a label-less file")
        task = total = task_loss(batch.task, outputs, batch.labels)
        if smoothness is not None:
            total = total + settings.lambda_s * smoothness
        if self.bregman is not None and settings.mu > 0:
            proximal = self.bregman(forward, outputs, divergence=divergence)
            total = total + settings.mu * proximal
        return Losses(total, task, smoothness, proximal, stats)

    def stepped(self, step: int) -> None:
        """To be called after optimizer step number `step` (from 0): moves the teacher every `inner_steps` steps."""
        if self.bregman is not None and (step + 1) % self.settings.inner_steps == 0:
            self.bregman.update()
