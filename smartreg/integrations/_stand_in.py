"""A stand-in for a model, to run code that calls the model with another call in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class StandIn:
    """Is the model to whoever looks at it, but a call of it is the given function."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "_call", call)

    @property  # type: ignore[misc]  # there is no setter
    def __class__(self) -> type[Any]:  # what isinstance asks, which is how wrappers are found
        return type(object.__getattribute__(self, "_model"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return object.__getattribute__(self, "_call")(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_model"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(object.__getattribute__(self, "_model"), name, value)
