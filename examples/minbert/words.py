"""What a run says in words: a line an epoch, what its closing table means, and the same run without SMART."""

import shlex
from collections.abc import Iterator
from typing import Any

from .settings import TABLE, Settings, flag, resolve
from .tasks import TASKS

PARTS = {"task_loss": "loss", "smoothness": "smoothness", "proximal": "proximal", "ascent_gain": "ascent gain"}
"""What a line tells of each task's training, by its name in `metrics.jsonl`."""


def epoch_line(line: dict[str, Any], epochs: int) -> str:
    """One line of the history as one line of text, for a terminal and a log alike.

    Example:
        >>> losses = {"sst": {"task_loss": 1.5, "smoothness": 0.25, "ascent_gain": 1.0}}
        >>> entry = {"epoch": 1, "losses": losses, "dev": {"sst": {"accuracy": 0.375}}, "seconds": 2.0}
        >>> epoch_line(entry, epochs=2)
        'epoch 1/2 in 2 s; sst: loss 1.5, smoothness 0.25, ascent gain 1, dev accuracy 0.375'
    """
    tasks = []
    for name, dev in line["dev"].items():
        losses = line["losses"].get(name, {})
        words = [f"{word} {_number(losses[part])}" for part, word in PARTS.items() if part in losses]
        metric = TASKS[name].metric
        tasks.append(f"{name}: {', '.join([*words, f'dev {metric} {_number(dev[metric])}'])}")
    return "; ".join([f"epoch {line['epoch']}/{epochs} in {line['seconds']:.0f} s", *tasks])


def meaning(metrics: dict[str, Any], settings: Settings, processes: int) -> Iterator[str]:
    """What the closing table says, a sentence for each task, and how to find out whether SMART had a part in it."""
    for name in settings.train_tasks:
        yield _learned(name, metrics)
    if regularizers := [word for word, on in (("smoothness", settings.smooth), ("proximal", settings.proximal)) if on]:
        last = metrics["epochs"][-1]["losses"]
        weight = {"smoothness": settings.lambda_s, "proximal": settings.mu}
        shares = [
            f"{name} {share:.1%}"
            for name, parts in last.items()
            if (share := _share(parts, {word: weight[word] for word in regularizers})) is not None
        ]
        if shares:
            yield f"Share of {' and '.join(regularizers)} in the loss of the last epoch: {', '.join(shares)}."
        yield "One run does not tell whether SMART helped. The same run without it, to set beside this one, is"
        yield f"  {without_smart(settings, processes)}"
        yield "and examples/minbert_study.py does both over several seeds, with intervals."


def without_smart(settings: Settings, processes: int = 1) -> str:
    """The command line of the run that has every setting of this one, but for the regularizers.

    Example:
        >>> without_smart(Settings(epochs=3, lambda_s=1.0))
        'python examples/minbert_multitask.py --config t-vanilla --epochs 3'
    """
    given: dict[str, Any] = {"config": "t-vanilla"}
    # Option and preset set other defaults, and one rate can be that of the heads too: each is looked at after those.
    for name in ("option", "preset", "lr", *TABLE):
        value = getattr(settings, name)
        if name not in given and TABLE[name].term is None and value != getattr(resolve(dict(given)), name):
            given[name] = value
    words = [word for name, value in given.items() for word in _words(name, value)]
    start = f"torchrun --nproc-per-node {processes}" if processes > 1 else "python"
    return f"{start} {shlex.join(['examples/minbert_multitask.py', *words])}"


def _learned(name: str, metrics: dict[str, Any]) -> str:
    task = TASKS[name]
    dev, train, before = (metrics[part][name][task.metric] for part in ("dev", "train", "untrained"))
    usual = metrics["baseline"][name][task.metric]
    constant = "a constant answer" if task.kind == "score" else "always the most frequent class"
    text = f"{name}: {task.metric} {_number(dev)} on {metrics['dev'][name]['n']} rows that it was not trained on"
    text += f" ({_number(before)} before training; {constant} gets {_number(usual)})"
    gap = metrics["gap"][name]
    if gap is None:
        return f"{text}."
    return f"{text}; on training rows {_number(train)}, {abs(gap):.3f} {'more' if gap >= 0 else 'less'}: the gap."


def _share(parts: dict[str, Any], weights: dict[str, float]) -> float | None:
    """The weighted regularizers over the whole loss; None where a number is missing."""
    values = [parts.get(word) for word in weights]
    if not parts.get("loss") or None in values:
        return None
    terms = zip(weights.values(), values, strict=True)
    return float(sum(weight * value for weight, value in terms if value is not None) / parts["loss"])


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag(name)] if value else []
    return [flag(name), ",".join(value) if isinstance(value, tuple) else str(value)]


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3g}"
