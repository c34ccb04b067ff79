"""Everything that decides what a run computes, and what the configurations and presets set."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import InputError
from .tasks import SENTIMENT

CONFIGS = {
    "baseline": "sentiment alone",
    "vanilla": "all tasks",
    "t-vanilla": "vanilla + slanted triangular learning rate",
    "t-bregman": "t-vanilla + momentum Bregman proximal term",
    "t-smart": "t-bregman + adversarial smoothness",
}
REGULARIZERS = ("mu", "beta", "inner_steps")
SMOOTHNESS = (
    "lambda_s", "epsilon", "step_size", "noise_std", "ascent_steps", "norm", "norm_over", "epsilon_scale", "ascent",
    "smart_dropout", "detach_reference", "memory_efficient",
)  # fmt: skip
FREE_ON_RESUME = ("device", "save_every", "data_dir")
"""What may differ when a run is resumed: where it runs, how often it saves, and where the same files now lie."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run's settings; `--help` explains each. The defaults are those of `--config t-smart --option finetune`."""

    config: str = "t-smart"
    option: str = "finetune"
    preset: str = "default"
    tasks: tuple[str, ...] = ("sst", "para", "sts")
    data_dir: str | None = None
    encoder: str | None = None
    init_from: str | None = None
    train_limit: int | None = None
    dev_limit: int | None = None
    train_eval_limit: int = 2000
    max_length: int = 128
    interleave: str = "proportional"

    epochs: int = 2
    max_steps: int | None = None
    batch_size: int = 16
    grad_accum: int = 1
    seed: int = 0
    lr: float = 3e-5
    head_lr: float = 3e-4
    lr_schedule: str = "report"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    dropout: float | None = None

    pooling: str = "mean"
    head_layers: int = 2
    head_activation: str = "relu"

    mu: float = 1.0
    beta: float | str = 0.99
    inner_steps: int = 1
    lambda_s: float = 0.3
    epsilon: float = 0.15
    step_size: float = 0.15
    noise_std: float = 0.15
    ascent_steps: int = 1
    norm: str = "inf"
    norm_over: str = "example"
    epsilon_scale: str = "rms"
    ascent: str = "projected"
    smart_dropout: str = "shared"
    detach_reference: bool = False
    memory_efficient: bool = False

    device: str = "auto"
    dtype: str = "float32"
    amp: str = "off"
    compile: bool = False
    gradient_checkpointing: bool = False
    save_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "grad_accum", "inner_steps", "head_layers"):
            _at_least(name, getattr(self, name), 1)
        for name in ("train_limit", "dev_limit", "train_eval_limit", "max_steps", "save_every"):
            _at_least(name, getattr(self, name), 1)
        _at_least("max_length", self.max_length, 4)
        _at_least("seed", self.seed, 0)
        _at_least("ascent_steps", self.ascent_steps, 0)
        for name in ("lr", "head_lr"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{flag(name)}: expected a number above 0, got {value:g}")
        for name in ("weight_decay", "max_grad_norm", "mu", "lambda_s", "epsilon", "step_size", "noise_std"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise InputError(f"{flag(name)}: expected a number of at least 0, got {value:g}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise InputError(f"--dropout: expected a number from 0 to below 1, got {self.dropout:g}")
        if isinstance(self.beta, float) and not 0 <= self.beta < 1:
            raise InputError(f"--beta: expected a number from 0 to below 1, or 'paper', got {self.beta:g}")
        if self.dtype == "float64" and self.amp != "off":
            raise InputError(f"--amp {self.amp}: expected off with --dtype float64")
        if not self.train_tasks:
            raise InputError(
                f"--tasks {','.join(self.tasks)}: baseline trains on sentiment only; name one of {', '.join(SENTIMENT)}"
            )

    @property
    def train_tasks(self) -> tuple[str, ...]:
        """The tasks trained on; all of `tasks` are evaluated."""
        return tuple(t for t in self.tasks if self.config != "baseline" or t in SENTIMENT)

    @property
    def proximal(self) -> bool:
        """Whether the momentum Bregman term is on."""
        return self.config in ("t-bregman", "t-smart")

    @property
    def smooth(self) -> bool:
        """Whether adversarial smoothness is on."""
        return self.config == "t-smart"

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that `from_dict` reads back."""
        return {**asdict(self), "tasks": list(self.tasks)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """The settings that `to_dict` described."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"unknown setting {unknown[0]!r}; the run was made by another version")
        return cls(**{**values, "tasks": tuple(values["tasks"])})


def resolve(given: dict[str, Any]) -> Settings:
    """Settings from the flags a user gave; configuration and preset fill in the rest.

    Raises:
        InputError: a value is out of range, or a flag has no effect in this configuration.
    """
    config, option = given.get("config", "t-smart"), given.get("option", "finetune")
    if config in ("baseline", "vanilla", "t-vanilla"):
        _useless(given, (*REGULARIZERS, *SMOOTHNESS), config, "t-smart")
    elif config == "t-bregman":
        _useless(given, SMOOTHNESS, config, "t-smart")
    if "encoder" in given and "init_from" in given:
        raise InputError("--encoder: has no effect with --init-from, whose run brings its own")
    values: dict[str, Any] = {"lr_schedule": "constant" if config in ("baseline", "vanilla") else "report"}
    if option == "pretrain":
        values |= {"lr": 1e-3, "head_lr": 1e-3}
    if given.get("preset") == "report":
        values |= REPORT | {"lr": 1e-3 if option == "pretrain" else 1e-5}
    # One rate for all, unless the heads get their own.
    if "head_lr" not in given and ("lr" in given or given.get("preset") == "report"):
        values["head_lr"] = given.get("lr", values.get("lr"))
    return Settings(**(values | given))


REPORT: dict[str, Any] = {
    "pooling": "pooler",
    "batch_size": 8,
    "epochs": 10,
    "mu": 1.0,
    "beta": "paper",
    "lambda_s": 1.0,
    "epsilon": 1e-5,
    "step_size": 1e-3,
    "noise_std": 1e-5,
    "epsilon_scale": "absolute",
}
"""The report's learning rates (set in `resolve`) and pooled output; the SMART paper's own hyperparameters."""


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def differences(saved: Settings, given: dict[str, Any]) -> list[str]:
    """Which given flags contradict a saved run that is to be resumed."""
    return [
        f"{flag(name)} is {getattr(saved, name)!r} in the run, {value!r} here"
        for name, value in given.items()
        if name not in FREE_ON_RESUME and getattr(saved, name) != value
    ]


def _useless(given: dict[str, Any], names: tuple[str, ...], config: str, remedy: str) -> None:
    for name in names:
        if name in given:
            raise InputError(f"{flag(name)}: has no effect with --config {config}; choose --config {remedy}")


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise InputError(f"{flag(name)}: expected a whole number of at least {least}, got {value}")
