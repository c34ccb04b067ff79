"""Whether a model answers in eval mode, in which the teacher runs, as it does in train mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from smartreg._warnings import warn

Distance = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]

_TIMES = 10.0  # what dropout does between two passes of train mode, it does about as much between train and eval mode
_ROUNDING = 1e-3  # and a fused kernel of eval mode may round by less than this


@contextlib.contextmanager
def in_train_mode(module: nn.Module) -> Iterator[None]:
    """Train mode for all of the module but its batch normalisation.

    Statistics of the batch instead of the running ones make no other kind of answer.
    """
    parts = [part for part in module.modules() if not isinstance(part, nn.modules.batchnorm._NormBase)]
    before = [part.training for part in parts]
    try:
        for part in parts:
            part.training = True
        yield
    finally:
        for part, mode in zip(parts, before, strict=True):
            part.training = mode


def check_shapes(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Raises a `ValueError` unless the outputs of model and teacher can be compared."""
    ours, theirs = ([tuple(tensor.shape) for tensor in tensors] for tensors in (student, teacher))
    if ours != theirs:
        raise ValueError(
            f"model and teacher must return tensors of one shape to compare, got {_shapes(ours)} and "
            f"{_shapes(theirs)}: forward must be of the same batch, and a model that returns more in train mode than "
            f"in eval mode, in which the teacher runs, needs output_to_logits to pick what both have"
        )


def look_at_modes(evaluated: tuple[Tensor, ...], trained: Sequence[tuple[Tensor, ...]], distance: Distance) -> None:
    """Warn if eval mode differs from train mode by far more than two passes of train mode do.

    Args:
        evaluated: The outputs in eval mode.
        trained: Those of two passes in train mode, with the same weights.
        distance: D.
    """
    first, second = trained
    check_shapes(first, evaluated)
    gap, spread = (abs(float(distance(first, other))) for other in (evaluated, second))
    nearly = tuple((1.0 + _ROUNDING) * tensor for tensor in first)
    if gap > _TIMES * spread + abs(float(distance(nearly, first))):
        warn(
            f"the model answers otherwise in eval mode, in which the teacher runs: with equal weights the divergence "
            f"of its outputs in the two modes is {gap:.3g}, that of two passes in train mode {spread:.3g}, and the "
            f"penalty would pull towards the difference for ever. Let forward return the same kind of output in both "
            f"modes, such as logits and not probabilities, or pick it with output_to_logits. check_first_call=False "
            f"leaves this look out"
        )


def _shapes(shapes: list[tuple[int, ...]]) -> str:
    return str(shapes[0]) if len(shapes) == 1 else str(shapes)
