"""One run of the comparison, from its arm, choice and seed to its record."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..batching import SentenceTokenizer, TokenSet, fingerprint, tokenize
from ..distributed import Place
from ..evaluate import outputs_of
from ..model import MultitaskModel, build_model, encoder_config
from ..pretrained import resolve_encoder
from ..tasks import TASKS, score
from ..train import Trainer
from . import measure, perturbed
from .arms import ARMS, Choice, extras_of, settings_of
from .measure import finite
from .record import Record, code_version, commit, comparable, packed
from .split import Parts, parts
from .together import OTHER_SEED, Partner

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Trial:
    """What a run is made from.

    Attributes:
        arm: its name.
        number: of the trial: 0 the defaults, others drawn (`arms.choice_of`).
        choice: what that number stands for, or what another stage has chosen.
        seed: draws the training rows, their order, and the weights of the heads.
        tasks: trained on together.
        rows: training rows a task; None for all.
        judged: whether the rows held out are measured; the search of settings never sees them.
        probed: whether the perturbed texts, the perturbed embeddings and CFIMDB are measured too.
        held_out: rows held out of train; None for the study's own number.
    """

    arm: str
    number: int
    choice: Choice
    seed: int
    tasks: tuple[str, ...]
    rows: int | None
    judged: bool = False
    probed: bool = False
    held_out: int | None = None

    @property
    def name(self) -> str:
        """Its file's name, without the ending."""
        return f"{self.arm.replace(':', '-')}.{self.number}.seed{self.seed}"


class Watch:
    """Measures dev after every epoch, or the last alone, and remembers the weights of the best.

    Best is the highest main metric on dev (its mean over tasks), the earliest among equals.

    Args:
        dev: the dev sets.
        every: whether all epochs are measured; a search asks for the last only.
    """

    def __init__(self, dev: dict[str, TokenSet], every: bool) -> None:
        self.dev, self.every = dev, every
        self.epochs: list[dict[str, Any]] = []
        self.best = 0
        self.best_outputs: Outputs = {}
        self.last_outputs: Outputs = {}
        self.best_weights: dict[str, Tensor] = {}
        self.seconds = 0.0

    def __call__(self, trainer: Trainer) -> None:
        """To be called at the end of an epoch."""
        if not (self.every or trainer.done):
            return
        started = time.process_time()
        model = trainer.extras.evaluated(trainer)
        self.last_outputs = {name: finite(outputs_of(model, data, trainer.place)) for name, data in self.dev.items()}
        metrics = {name: score(TASKS[name], self.last_outputs[name], _labels(data)) for name, data in self.dev.items()}
        self.epochs.append(metrics)
        if self._quality(-1) > self._quality(self.best) or len(self.epochs) == 1:
            self.best, self.best_outputs = len(self.epochs) - 1, self.last_outputs
            self.best_weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
        self.seconds += time.process_time() - started

    def _quality(self, epoch: int) -> float:
        return sum(values[TASKS[name].metric] or 0.0 for name, values in self.epochs[epoch].items())


def run(trial: Trial, folder: Path, *, device: str = "cpu", encoder: str | None = None) -> Record:
    """Makes a run.

    Args:
        trial: what to run.
        folder: the data folder.
        device: where.
        encoder: as the example's `--encoder`.

    Returns:
        The record, ready for JSON.
    """
    found = {name: parts(folder, name, trial.rows, trial.seed, trial.held_out) for name in trial.tasks}
    rows = sum(len(each.train.examples) for each in found.values())
    fixed: dict[str, Any] = {"seed": trial.seed, "tasks": trial.tasks, "train_eval_limit": 64, "device": device}
    settings = settings_of(trial.arm, trial.choice, rows, **fixed)
    place = distributed.join(settings.device)
    source = resolve_encoder(encoder)
    tokenizer = SentenceTokenizer(source, settings.max_length)
    sets = {
        part: {name: tokenize(getattr(each, part), tokenizer) for name, each in found.items()} for part in Parts._fields
    }

    def begun(seed: int) -> Trainer:
        torch.manual_seed(seed)
        model = build_model(settings, encoder_config(source, settings), source).to(place.device)
        extras = extras_of(trial.arm, trial.choice, model)
        # The trainer itself measures no dev rows: the watch does, and keeps the outputs.
        return Trainer(replace(settings, seed=seed), place, model, sets["train"], {}, None, extras)

    watch = Watch(sets["dev"], every=trial.judged)
    wall = time.perf_counter()
    partner = Partner(begun(settings.seed + OTHER_SEED)) if ARMS[trial.arm].partner else None
    trainer = begun(settings.seed)
    trainer.extras = replace(trainer.extras, epoch_ended=watch)
    if partner is not None:
        trainer.extras = replace(trainer.extras, evaluated=partner.beside)
    started = time.process_time()
    trainer.run()
    training = time.process_time() - started - watch.seconds + (partner.seconds if partner else 0.0)

    final = trainer.extras.evaluated(trainer)
    record: Record = {
        "name": trial.name,
        "arm": trial.arm,
        "trial": trial.number,
        "seed": trial.seed,
        "rows": trial.rows,
        "choice": trial.choice,
        "settings": comparable(settings),
        "code": code_version(),
        "commit": commit(),
        "torch": torch.__version__,
        "device": place.device.type,
        "data": "".join(fingerprint(sets[part])[:8] for part in Parts._fields),
        "steps": trainer.step,
        "cpu_seconds_a_step": round(training / trainer.step, 5),
        "epochs": [{"losses": line["losses"], "train": line["train"]} for line in trainer.history],
        "dev": watch.epochs,
        "best_epoch": watch.best + 1 if trial.judged else None,
        "last": _judged(final, watch.last_outputs, sets, place, trial.judged, by_row=True),
    }
    if trial.probed:
        record["probes"] = perturbed.probes(final, found, tokenizer, folder, place)
    if trial.judged:
        if watch.best == len(watch.epochs) - 1:
            record["best"] = _without_rows(record["last"])
        else:
            final.load_state_dict(watch.best_weights)
            record["best"] = _judged(final, watch.best_outputs, sets, place, judged=True, by_row=False)
    record["seconds"] = round(time.perf_counter() - wall, 1)
    return record


def _judged(
    model: MultitaskModel, dev: Outputs, sets: dict[str, dict[str, TokenSet]], place: Place, judged: bool, by_row: bool
) -> Record:
    """Metrics of a model, by task: on dev, and on the rows held out if it is to be judged; there by row if asked."""
    result: Record = {}
    for name, data in sets["dev"].items():
        task, labels = data.task, _labels(data)
        scale = measure.fitted_scale(task, dev[name], labels)
        result[name] = {"dev": score(task, dev[name], labels), "scale": scale}
        if not judged:
            continue
        held = sets["held_out"][name]
        outputs, labels = finite(outputs_of(model, held, place)), _labels(held)
        rows = measure.contributions(task, outputs, labels)
        result[name]["held_out"] = {
            **score(task, outputs, labels),
            "nll": float(rows["nll"].mean()),
            "nll_scaled": float(measure.nll_rows(task, outputs, labels, scale).mean()),
            "ece": measure.calibration_error(task, outputs, labels),
            "ece_scaled": measure.calibration_error(task, outputs, labels, scale),
        }
        if by_row:
            result[name]["held_out"]["by_row"] = {key: packed(values) for key, values in rows.items()}
    return result


def _without_rows(judged: Record) -> Record:
    """What `_judged` would say of the same model without `by_row`."""
    held = {
        name: {key: value for key, value in each["held_out"].items() if key != "by_row"}
        for name, each in judged.items()
    }
    return {name: each | {"held_out": held[name]} for name, each in judged.items()}


def _labels(data: TokenSet) -> Tensor:
    if data.labels is None:
        raise ValueError(f"{data.task.name}: expected labels")
    return torch.tensor(data.labels)
