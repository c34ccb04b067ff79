"""The training loop: steps, epochs, and when a checkpoint is due."""

import statistics
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from . import distributed, resume, run_folder
from .batching import Step, TokenSet, collate, epoch_steps, micro_batches, share
from .distributed import Place
from .evaluate import evaluate
from .extras import Extras
from .model import MultitaskModel
from .objective import Losses, Objective
from .optimizer import make_optimizer, make_schedule
from .progress import Ledger, Memory, StopRequest, diverged, hidden, last_loss
from .settings import Settings
from .tasks import gap

FP16_PATIENCE = 32
"""Losses out of range in a row that a run in fp16 may have; a scaler that began at 2^16 is at 2^-16 by then."""


class Stopped(Exception):
    """The run was asked to stop; it has saved itself."""


class Trainer:
    """A run in progress.

    What it needs to go on is in a checkpoint and the settings: an epoch's steps are a function of (seed, epoch), the
    noise is one of (seed, step, example), and dropout follows from the random state.

    Args:
        settings: the run's settings.
        place: device and rank.
        model: the model, on its device.
        train: training sets; those of `settings.train_tasks` are trained on.
        dev: dev sets, evaluated at the end of every epoch.
        folder: the run's folder; None keeps nothing, and such a run cannot be resumed.
        extras: what is added to the run.
    """

    def __init__(
        self,
        settings: Settings,
        place: Place,
        model: MultitaskModel,
        train: dict[str, TokenSet],
        dev: dict[str, TokenSet],
        folder: Path | None,
        extras: Extras | None = None,
    ) -> None:
        self.settings, self.place, self.folder = settings, place, folder
        self.extras = Extras() if extras is None else extras
        self.model, self.train_sets, self.dev_sets = model, train, dev
        if settings.option == "pretrain":
            model.encoder.requires_grad_(False)
        model.encoder.encoder.gradient_checkpointing = settings.gradient_checkpointing

        # Each process drops out other units of its own examples; the noise does not depend on the process.
        torch.manual_seed(settings.seed * 4096 + place.rank)
        self.wrapped = distributed.wrap(distributed.compiled(model) if settings.compile else model, place)
        self.total_steps = self._total_steps()
        updates = max(1, self.total_steps // settings.inner_steps)  # of the teacher: β must be one of a run
        self.objective = Objective(self.wrapped, model, settings, updates, self.extras.loss)
        self.optimizer = make_optimizer(model, settings)
        self.schedule = make_schedule(settings.lr_schedule, self.optimizer, self.total_steps)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=settings.amp == "fp16")
        # With fp16 a loss out of range now and then is part of the bargain: the scaler skips such a step. A run without
        # a folder is one trial of a search, which records that it came apart.
        patience = FP16_PATIENCE if settings.amp == "fp16" else 1
        self.ledger = Ledger(place, patience=sys.maxsize if folder is None else patience)
        self.memory, self.stop = Memory(place.device), StopRequest()

        self.step = self.epoch = self.position = 0
        self.history: list[dict[str, Any]] = []
        self.before: dict[str, Any] = {}
        self.step_seconds: list[float] = []
        self.epoch_seconds = self.seconds_before = 0.0
        self.started = time.perf_counter()

    def run(self) -> None:
        """Trains to the end.

        Raises:
            Stopped: on SIGTERM, after saving.
        """
        if not self.before:
            self.before = evaluate(self.model, self.dev_sets, self.place, note="before training: ")
        with self.stop:
            while not self.done:
                self._epoch()

    @property
    def done(self) -> bool:
        """Whether all epochs, or `max_steps`, are through."""
        return self.epoch >= self.settings.epochs or self.step >= self.total_steps

    def _epoch(self) -> None:
        steps = self._steps(self.epoch)
        end = min(len(steps), self.position + self.total_steps - self.step)
        todo = range(self.position, end)
        started = time.perf_counter()
        self.model.train()
        label = f"epoch {self.epoch + 1}/{self.settings.epochs}"
        with tqdm(total=end, initial=self.position, desc=label, unit="step", disable=hidden(self.place)) as bar:
            for position in todo:
                begun = time.perf_counter()
                losses = self._train_step(steps[position])
                self.step_seconds.append(time.perf_counter() - begun)
                self.position = position + 1
                bar.update()
                if position % 10 == 0 and self.place.first:
                    bar.set_postfix_str(f"{steps[position].task} loss {last_loss(losses)}", refresh=False)
                last = self.position == end
                if self._asked_to_stop() and not last:
                    self.epoch_seconds += time.perf_counter() - started
                    self.save()
                    raise Stopped
                if self.settings.save_every and self.step % self.settings.save_every == 0 and not last:
                    self.epoch_seconds += time.perf_counter() - started
                    started = time.perf_counter()
                    self.save()
        self.epoch_seconds += time.perf_counter() - started
        self._end_epoch()
        if self._asked_to_stop() and not self.done:
            raise Stopped

    def _train_step(self, step: Step) -> Losses:
        """One optimizer step on the rows of one task."""
        settings = self.settings
        losses = self.extras.gradients(lambda: self._backward(step))
        self.scaler.unscale_(self.optimizer)
        if settings.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self._trainable(), settings.max_grad_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # With fp16 an overflow skips the step; then the teacher and the schedule must stand still too.
        if self.scaler.get_scale() >= scale:
            self.schedule.step()
            self.objective.stepped(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.memory.note()
        self.step += 1
        return losses

    def _backward(self, step: Step) -> Losses:
        """Adds the gradients of a step to `.grad`; returns the losses of its last micro-batch."""
        place = self.place
        data = self.train_sets[step.task]
        parts = micro_batches(step.rows, self.settings.grad_accum)
        for i, rows in enumerate(parts):
            own, weight = share(rows, place.rank, place.world)
            weight *= len(rows) / len(step.rows)  # 1 a step, on the average of the processes
            batch = collate(data, own, self.model.encoder.config.pad_token_id, place.device)
            # DDP decides in the forward pass whether the backward exchanges gradients, so no_sync encloses both.
            with distributed.no_sync(self.wrapped, more_to_come=i + 1 < len(parts)):
                with self._autocast():
                    losses = self.objective(batch, self.step)
                self.scaler.scale(losses.total * weight).backward()
            self.ledger.add(step.task, losses, weight / place.world, self.step + 1)
        return losses

    def _end_epoch(self) -> None:
        self._require_numbers()
        limit = self.settings.train_eval_limit
        model = self.extras.evaluated(self)
        train = evaluate(model, self.train_sets, self.place, limit, note="train: ")
        dev = evaluate(model, self.dev_sets, self.place, note="dev: ")
        self.history.append(
            {
                "epoch": self.epoch + 1,
                "step": self.step,
                "lr": self.optimizer.param_groups[0]["lr"],
                "losses": self.ledger.line(),
                "train": train,
                "dev": dev,
                "gap": {name: gap(self.dev_sets[name].task, train[name], dev[name]) for name in dev},
                "seconds": round(self.epoch_seconds, 3),
                "step_seconds_median": self.step_seconds_median,
                "peak_memory_bytes": self.memory.peak,
            }
        )
        self.ledger.clear()
        self.epoch, self.position, self.epoch_seconds = self.epoch + 1, 0, 0.0
        self.save()
        if self.place.first and self.folder is not None:
            run_folder.write_history(self.folder, self.history)
        self.extras.epoch_ended(self)

    @property
    def step_seconds_median(self) -> float | None:
        """The median time of the optimizer steps since this process started; of the one before, if it has made none."""
        if not self.step_seconds:
            return self.history[-1].get("step_seconds_median") if self.history else None
        return round(statistics.median(self.step_seconds), 5)

    @property
    def seconds(self) -> float:
        """Since the run began, the time between a checkpoint and going on from it left out."""
        return self.seconds_before + time.perf_counter() - self.started

    def _require_numbers(self) -> None:
        """Raises Diverged before weights that are no numbers are measured, or replace a checkpoint of some that are."""
        self.ledger.settle()
        for name, value in self.model.named_parameters() if self.folder is not None else ():
            if not bool(torch.isfinite(value).all()):
                raise diverged(f"after step {self.step} the weights {name} hold NaN or infinity")

    def save(self) -> None:
        """Writes a checkpoint, if there is a folder for it; every process must call it."""
        if self.folder is None:
            return
        self._require_numbers()
        resume.save(self, self.folder)

    def _asked_to_stop(self) -> bool:
        return distributed.any_process(self.place, self.stop.requested)

    def _steps(self, epoch: int) -> list[Step]:
        settings = self.settings
        lengths = {name: data.lengths for name, data in self.trained().items()}
        rows = settings.batch_size * settings.grad_accum
        return epoch_steps(lengths, rows, settings.seed, epoch, settings.interleave)

    def trained(self) -> dict[str, TokenSet]:
        """The training sets that are trained on."""
        return {name: self.train_sets[name] for name in self.settings.train_tasks}

    def _total_steps(self) -> int:
        total = len(self._steps(0)) * self.settings.epochs
        return total if self.settings.max_steps is None else min(total, self.settings.max_steps)

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.settings.amp)
        return nullcontext() if dtype is None else torch.autocast(self.place.device.type, dtype)
