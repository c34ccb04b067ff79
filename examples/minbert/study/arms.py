"""The arms of the comparison: for each its settings of the example, its method if no setting has it, its search space.

A choice is a dict of names and numbers. A name is a setting of the example; or a method of `methods.py`, whose strength
it then is; or one of

half_life   of the teacher's average, as a share of the run: it becomes β
stretch     how many times the epochs chosen are made: training at the cost of another arm
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from smartreg import suggested_beta

from ..extras import Extras
from ..model import MultitaskModel
from ..objective import seed_of
from ..settings import TABLE, Settings, resolve
from .methods import METHODS, averaged

Choice = dict[str, Any]


@dataclass(frozen=True)
class Log:
    """Numbers from low to high, uniform in their logarithm."""

    low: float
    high: float

    def draw(self, random: random.Random) -> float:
        """One of them, to three digits."""
        return float(f"{math.exp(random.uniform(math.log(self.low), math.log(self.high))):.3g}")


@dataclass(frozen=True)
class OneOf:
    """One of a few values."""

    values: Sequence[Any]

    def draw(self, random: random.Random) -> Any:
        """One of them."""
        return random.choice(self.values)


Space = dict[str, Log | OneOf]

COMMON: Space = {
    "lr": Log(1e-5, 2e-4),
    "head_lr": Log(1e-4, 3e-3),
    "epochs": OneOf((3, 5, 8)),
    "dropout": OneOf((0.0, 0.1, 0.2)),
}
"""What is searched for every arm; trial i has the same of these in all arms."""
DEFAULTS: Choice = {"lr": 3e-5, "head_lr": 3e-4, "epochs": 5, "batch_size": 16}
"""Trial 0 of every arm, beside the arm's own."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        config: its `--config`.
        choice: what sets it apart, before any search.
        space: what is searched besides `COMMON`.
        relative: settings that follow ε, as multiples of it.
        average: whether the teacher is measured in place of the model.
        partner: whether a second run answers beside it (`together.py`).
    """

    config: str
    choice: Choice = field(default_factory=dict)
    space: Space = field(default_factory=dict)
    relative: dict[str, float] = field(default_factory=dict)
    average: bool = False
    partner: bool = False


STRENGTH = Log(0.01, 30)
RADIUS = Log(0.02, 2)
SMOOTHING = {"label_smoothing": OneOf((0.0, 0.05, 0.1))}
MBPP = {"mu": Log(0.01, 3), "half_life": Log(0.02, 0.5)}
# λ_s alone: the teacher is there in t-smart, and weighs nothing. 0.3 is what README had before the first results.
ALONE = {"mu": 0.0, "lambda_s": 0.3}
PRINTED = {"start": "noise", "ascent_steps": 1, "norm": "inf"}
PACKAGES = PRINTED | {"epsilon": 1e-6, "step_size": 1e-3, "noise_std": 1e-5, "epsilon_scale": "absolute"}
PACKAGES |= {"ascent": "normalized", "norm_over": "token", "smart_dropout": "independent", "lambda_s": 1.0}
PUBLISHED = PRINTED | {"epsilon": 1e-5, "step_size": 1e-3, "noise_std": 1e-5, "epsilon_scale": "absolute"}

_SEARCHED_BALL: Space = {"lambda_s": STRENGTH, "epsilon": RADIUS, "norm_over": OneOf(("example", "token"))}
_DEFAULT_BALL: Space = _SEARCHED_BALL | {"norm": OneOf(("2", "inf")), "ascent_steps": OneOf((0, 1))}

ARMS: dict[str, Arm] = {
    "plain": Arm("vanilla", {"label_smoothing": 0.0}, SMOOTHING),
    "t-vanilla": Arm("t-vanilla", {"label_smoothing": 0.0}, SMOOTHING),
    "longer": Arm("t-vanilla", {"label_smoothing": 0.0, "stretch": 7 / 3}, SMOOTHING),
    "two-runs": Arm("t-vanilla", {"label_smoothing": 0.0}, SMOOTHING, partner=True),
    "label-smoothing": Arm("t-vanilla", {"label_smoothing": 0.1}, {"label_smoothing": Log(0.02, 0.3)}),
    "entropy": Arm("t-vanilla", {"entropy": 0.1}, {"entropy": Log(0.01, 1)}),
    "ema": Arm("t-bregman", {"mu": 0.0, "half_life": 0.1}, {"half_life": MBPP["half_life"]}, average=True),
    "neftune": Arm("t-vanilla", {"neftune": 5.0}, {"neftune": Log(1, 15)}),
    "l2-sp": Arm("t-vanilla", {"l2_sp": 0.01}, {"l2_sp": Log(1e-4, 1)}),
    "sam": Arm("t-vanilla", {"sam": 0.05}, {"sam": Log(0.01, 0.2)}),
    # Half of R-Drop's alpha = 1, since its divergence is half of the symmetric one.
    "r-drop": Arm(
        "t-smart",
        ALONE | {"epsilon": 0.0, "start": "noise", "smart_dropout": "independent", "lambda_s": 0.5},
        {"lambda_s": STRENGTH},
    ),
    "random-smoothing": Arm("t-smart", ALONE | {"start": "noise"}, _SEARCHED_BALL, {"noise_std": 1.0}),
    "smart-printed": Arm("t-smart", ALONE | PRINTED, _SEARCHED_BALL, {"step_size": 1.0, "noise_std": 0.1}),
    "smart-published": Arm("t-smart", ALONE | PUBLISHED | {"lambda_s": 1.0}, {"lambda_s": STRENGTH}),
    "smart-packages": Arm("t-smart", ALONE | PACKAGES, {"lambda_s": STRENGTH}),
    "smart": Arm("t-smart", ALONE, _DEFAULT_BALL, {"step_size": 1.0}),
    "mbpp": Arm("t-bregman", {"half_life": 0.1}, MBPP),
}
"""Without the Bregman term; `with_mbpp` adds it."""


def with_mbpp(arm: Arm) -> Arm:
    """The same with the Bregman term, whose teacher has a half-life of a tenth of the run."""
    config = "t-smart" if arm.config == "t-smart" else "t-bregman"
    return replace(arm, config=config, choice=arm.choice | {"mu": 1.0, "half_life": 0.1}, space=arm.space | MBPP)


# The smoothness term at another weight, or with a ball of a third of the radius, nothing else changed.
ARMS |= {
    f"smart:{weight}": replace(ARMS["smart"], choice=ALONE | {"lambda_s": float(weight)})
    for weight in (0.01, 0.03, 0.1, 3, 30)
}
# R-Drop's first weight turned out to weigh little: its term was a thousandth of the loss on paraphrase.
ARMS["r-drop:5"] = replace(ARMS["r-drop"], choice=ARMS["r-drop"].choice | {"lambda_s": 5.0})
ARMS["smart-small-ball"] = replace(ARMS["smart"], choice=ALONE | {"epsilon": 0.05})

_ALONE = ("plain", "t-vanilla", "longer", "two-runs", "ema", "mbpp")  # t-vanilla with the term is mbpp
ARMS |= {f"{name}+mbpp": with_mbpp(arm) for name, arm in ARMS.items() if name not in _ALONE}


def _caused(change: Choice, **more: Any) -> Arm:
    base = ARMS["smart+mbpp"]
    return replace(base, choice=base.choice | change, space={}, **more)


CAUSES = {
    "cause:independent-masks": _caused({"smart_dropout": "independent"}),
    "cause:no-projection": _caused({"start": "noise", "ascent_steps": 1, "ascent": "normalized"}),
    "cause:weak-ascent": _caused(PRINTED, relative={"step_size": 1.0, "noise_std": 1.0}),
    "cause:tiny-epsilon": _caused(PUBLISHED, relative={}),
    "cause:equation-3": _caused({"lr_schedule": "equation3"}),
    "cause:slow-teacher": _caused({"beta": 0.99, "half_life": None}),
}
"""T-SMART with one thing wrong. A softmax over one logit is no arm: the library refuses it, and it would make both
terms 0 on Quora, which is `t-vanilla`. A tenth of the data is a size."""
ARMS |= CAUSES


def choice_of(name: str, trial: int) -> Choice:
    """What a trial of an arm is made with: trial 0 the defaults, every other one drawn from the space.

    Example:
        >>> choice_of("t-vanilla", 3)["lr"] == choice_of("smart", 3)["lr"]
        True
    """
    arm = ARMS[name]
    if trial == 0:
        return DEFAULTS | arm.choice
    common, own = random.Random(seed_of("trial", trial)), random.Random(seed_of("trial", trial, name))
    drawn = {key: each.draw(common) for key, each in COMMON.items()}
    return DEFAULTS | arm.choice | drawn | {key: each.draw(own) for key, each in sorted(arm.space.items())}


def settings_of(name: str, choice: Choice, rows: int, **fixed: Any) -> Settings:
    """The example's settings of an arm and a choice, for this many training rows (by which β follows from half-life).

    Args:
        name: of the arm.
        choice: as `choice_of` makes it.
        rows: training rows of all tasks together.
        **fixed: settings of the stage, such as tasks and seed.
    """
    arm = ARMS[name]
    given = {key: value for key, value in choice.items() if key in TABLE}
    given["epochs"] = round(given["epochs"] * choice.get("stretch", 1))
    if arm.relative:
        radius = given.get("epsilon", Settings.epsilon)
        given |= {key: factor * radius for key, factor in arm.relative.items()}
    if choice.get("half_life") is not None:
        updates = given["epochs"] * math.ceil(rows / given["batch_size"])
        given["beta"] = suggested_beta(updates, choice["half_life"])
    return resolve({"config": arm.config, **given, **fixed})


def extras_of(name: str, choice: Choice, model: MultitaskModel) -> Extras:
    """What an arm adds to the trainer. A method of strength 0 is left out."""
    if ARMS[name].average:
        return averaged(model)
    methods = [key for key in METHODS if choice.get(key)]
    if len(methods) > 1:
        raise ValueError(f"arm {name!r}: expected one method at most, got {', '.join(methods)}")
    return METHODS[methods[0]](model, choice[methods[0]]) if methods else Extras()
