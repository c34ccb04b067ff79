"""The slanted triangular learning rate: a short rise, a long fall."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from smartreg._checks import number, whole
from smartreg._warnings import warn


@dataclass
class SlantedTriangle:
    """The multiplier of `SlantedTriangularLR` as a pure function of the step.

    An object with state and not a lambda, so that `LambdaLR.state_dict` saves it.

    Examples:
        >>> triangle = SlantedTriangle(total_steps=20, cut_frac=0.25, ratio=3.0, peak_factor=3.0)
        >>> [triangle(step) for step in (0, 5, 20, 21)]
        [1.0, 3.0, 1.0, 0.0]
    """

    total_steps: int
    cut_frac: float = 0.1
    ratio: float = 32.0
    peak_factor: float = 1.0

    def __post_init__(self) -> None:
        # Plain numbers: NumPy ones would make the checkpoint need pickle.
        self.total_steps = whole("total_steps", self.total_steps, least=1)
        for name in ("cut_frac", "ratio", "peak_factor"):
            setattr(self, name, number(name, getattr(self, name)))
        if not 0.0 <= self.cut_frac <= 1.0:
            raise ValueError(f"cut_frac must be in [0, 1], the share of steps that rise, got {self.cut_frac}")
        if not 1.0 <= self.ratio < math.inf:
            raise ValueError(f"ratio must be 1 or more, the largest rate over the smallest, got {self.ratio}")
        if not 0.0 < self.peak_factor < math.inf:
            raise ValueError(f"peak_factor must be positive and finite, got {self.peak_factor}")

    @property
    def cut(self) -> int:
        """The step at which the rate is largest."""
        # The product may be rounded down: 100 * 0.29 is 28.999999999999996.
        return math.floor(self.total_steps * self.cut_frac * (1.0 + 4.0 * sys.float_info.epsilon))

    def __call__(self, step: int) -> float:
        """The factor at a step."""
        if step > self.total_steps:
            return 0.0
        if step < self.cut:
            p = step / self.cut
        elif self.cut == self.total_steps:
            p = 1.0
        else:
            p = 1.0 - (step - self.cut) / (self.total_steps - self.cut)
        return self.peak_factor * (1.0 + p * (self.ratio - 1.0)) / self.ratio


class SlantedTriangularLR(LambdaLR):
    r"""Slanted triangular learning rates of Howard and Ruder.

    At step t each parameter group has its own base rate times

    \[ \text{factor}(t) = \text{peak} \cdot \frac{1 + p \, (\text{ratio} - 1)}{\text{ratio}}, \qquad
    p = \begin{cases} t / \text{cut} & t < \text{cut} \\
    1 - (t - \text{cut}) / (T - \text{cut}) & \text{cut} \le t \le T \end{cases}, \qquad
    \text{cut} = \lfloor T \cdot \text{cut\_frac} \rfloor \]

    and 0 past the end T. Call `scheduler.step()` after every `optimizer.step()`. With cut = 0 there is no rise, with
    cut = T no fall (p = 1 at T). Wherever T · cut_frac is an integer this is Howard and Ruder's equation 3; elsewhere
    theirs divides the fall by cut · (1 / cut_frac − 1), which is less than T − cut, and undershoots the smallest rate.

    The RO-BERT report (Fergesen and Hokia, CS224N) rises from lr to 3·lr over the first 20 to 25 % of the iterations
    and falls back to lr: `ratio=3, peak_factor=3, cut_frac=0.25`. The report says that its schedule is informed by the
    model's performance, but its equation (3) uses the iteration alone. Taken literally, that equation jumps from 3·lr
    to 2.83·lr at iteration 200 and turns negative after iteration 1,050, which is why it is not offered here.

    Saving and resuming: `state_dict()` holds the step, the base rates and the multiplier's settings, as plain numbers.
    A loaded state wins over what the constructor was given, with a `SmartWarning` that names what differs: a run
    resumed with another `total_steps` keeps the old one. Loading a `LambdaLR` alone leaves the optimizer at the rate
    of step 0 until the next `step()`. Here the optimizer gets the rate of the loaded step too, unless its rates are no
    longer those that this scheduler last set, as after `optimizer.load_state_dict(...)`: then they stay as they are.
    Load the optimizer's state as well; the order is free.

    Args:
        optimizer: The optimizer, with one or more parameter groups.
        total_steps: T, the number of optimizer steps (not epochs) of the whole run.
        cut_frac: The share of the steps that rise, in [0, 1].
        ratio: The largest rate over the smallest, 1 or more.
        peak_factor: The largest factor; 1 makes the base rate the peak.
        last_epoch: The last step taken, for a resumed run without saved state; -1 starts afresh.

    Raises:
        TypeError: An argument is not a number, or `optimizer` is none.
        ValueError: An argument is out of range.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        >>> scheduler = SlantedTriangularLR(optimizer, 8, cut_frac=0.25, ratio=4)
        >>> rates = []
        >>> for _ in range(10):
        ...     rates.append(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     scheduler.step()
        >>> rates
        [0.125, 0.3125, 0.5, 0.4375, 0.375, 0.3125, 0.25, 0.1875, 0.125, 0.0]

    Reference:
        Howard and Ruder 2018, Universal Language Model Fine-tuning for Text Classification, arXiv 1801.06146, eq. 3.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        *,
        cut_frac: float = 0.1,
        ratio: float = 32.0,
        peak_factor: float = 1.0,
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        triangle = SlantedTriangle(total_steps, cut_frac, ratio, peak_factor)
        super().__init__(optimizer, triangle, last_epoch)

    def get_lr(self) -> list[Any]:
        """The rate of each parameter group at this step.

        Raises:
            RuntimeError: The optimizer has got another number of groups since.
        """
        groups, rates = len(self.optimizer.param_groups), len(self.base_lrs)
        if groups != rates:
            raise RuntimeError(
                f"SlantedTriangularLR was made for {rates} parameter groups, and the optimizer has {groups} now: make "
                f"the scheduler after the last add_param_group, with last_epoch={self.last_epoch - 1} in a running "
                f"schedule (and 'initial_lr' in the new group)"
            )
        return super().get_lr()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the saved schedule stopped; see the class for what wins.

        Args:
            state_dict: What `state_dict()` returned. It is not changed.

        Raises:
            ValueError: The state is not one of this class, or of another number of parameter groups. Nothing is loaded.
        """
        _check_state(state_dict, groups=len(self.optimizer.param_groups))
        differing = _differences(self.state_dict(), state_dict)
        untouched = [
            float(group["lr"]) == float(rate)
            for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True)
        ]
        super().load_state_dict(state_dict)
        for group, rate, as_set in zip(self.optimizer.param_groups, self._last_lr, untouched, strict=True):
            if as_set and isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            elif as_set:
                group["lr"] = float(rate)
        if differing:
            warn(
                f"SlantedTriangularLR: the loaded state wins over the constructor where they differ: "
                f"{'; '.join(differing)}. To run with the new values, make a scheduler and do not load the state",
            )


def _check_state(state_dict: dict[str, Any], *, groups: int) -> None:
    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict must be the state of a SlantedTriangularLR, got {type(state_dict).__name__}")
    multipliers = state_dict.get("lr_lambdas")
    fields = set(SlantedTriangle.__dataclass_fields__)
    if not isinstance(multipliers, list) or not all(isinstance(m, dict) and set(m) == fields for m in multipliers):
        raise ValueError(
            "state_dict must be the state of a SlantedTriangularLR, with the multiplier's settings under 'lr_lambdas'; "
            f"got {multipliers!r}"
        )
    missing = [name for name in ("last_epoch", "base_lrs", "_last_lr", "_step_count") if name not in state_dict]
    if missing:
        raise ValueError(f"state_dict must be the state of a SlantedTriangularLR, got one without {', '.join(missing)}")
    if len(multipliers) != groups:
        raise ValueError(
            f"state_dict must be of {groups} parameter groups, as the optimizer has, got {len(multipliers)}"
        )


def _differences(own: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """What a saved state changes besides the step: the settings of the multiplier and the base rates."""
    before, after = own["lr_lambdas"][0], saved["lr_lambdas"][0]
    found = [f"{name} {after[name]!r} instead of {before[name]!r}" for name in before if before[name] != after[name]]
    rates = [[float(rate) for rate in state["base_lrs"]] for state in (own, saved)]
    if rates[0] != rates[1]:
        found.append(f"base rates {rates[1]} instead of {rates[0]}")
    return found
