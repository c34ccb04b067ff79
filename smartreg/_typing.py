"""What a type checker is told about calling a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def typed_as(function: Function) -> Callable[[Callable[..., None]], Function]:
    """Declares that the decorated method has the type of `function`; for use under `TYPE_CHECKING`.

    `nn.Module` declares `__call__` as a function of anything to anything. pyright keeps that declaration where a
    subclass assigns `__call__ = forward`, and lets a misspelt keyword pass; a decorated method takes its place.
    """
    return lambda _: function
