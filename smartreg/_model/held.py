"""What modules hold beside parameters and buffers and change in place: containers, tensors, generators.

Restoring the attributes of a module brings back the list that it held, not what stood in the list. Here are the
contents: of lists, dicts, sets and deques, however nested, of tensors that are plain attributes or stand in such a
container or in a tuple, and of the dicts and objects in which the user's forward hooks keep features. A list that a
hook appends to is left alone: it is the log of somebody who wants to see every pass. Arrays of numpy, and objects of
other classes that a module holds, are not looked into.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections import deque
from collections.abc import Container, Iterable, Iterator
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smartreg._wrappers import in_reach

MOST_COPIED = 2**20
"""Entries up to which a plain tensor is copied in every call; a larger one must be a buffer to be written in place."""

_INTERNAL = frozenset(vars(nn.Module()))
_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size})
_CONTAINERS = (list, dict, set, deque)
_ABSENT = object()


class _Watched(NamedTuple):
    """A tensor before the clean pass: how often it had been written to, and its content if it is small."""

    tensor: Tensor
    version: int
    content: Tensor | None
    name: str


class _Contents(NamedTuple):
    """A container and what stood in it, before and after the clean pass."""

    container: Any
    before: Any
    after: Any


class HeldState:
    """The contents of what the modules of a model hold, as the clean pass found and as it left them.

    Args:
        model: The unwrapped model, before the clean pass.

    Attributes:
        generators: Every generator of random numbers found.
    """

    def __init__(self, model: nn.Module) -> None:
        self.generators: list[Any] = []
        self._tensors: list[_Watched] = []
        self._contents: list[_Contents] = []
        self._seen: set[int] = set()
        self._kinds = _generator_kinds()
        for module in model.modules():
            for name, value in vars(module).items():
                if type(value) not in _PLAIN and name not in _INTERNAL:
                    self._take(value, f"{type(module).__name__}.{name}")
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                for features in written_by(hook):
                    self._take(features, f"what a hook of {type(module).__name__} holds")

    def keep_clean(self) -> None:
        """Call after the clean pass: what it changed is brought back by every replay, the rest is left alone.

        Raises:
            RuntimeError: It wrote to a tensor that is too large to have been copied.
        """
        self._tensors = [watched for watched in self._tensors if watched.tensor._version != watched.version]
        for watched in self._tensors:
            if watched.content is None:
                raise RuntimeError(
                    f"forward must be repeatable: it changes {watched.name} in place, a tensor of shape "
                    f"{tuple(watched.tensor.shape)} that is no buffer and too large to be copied in every call; "
                    f"register it with register_buffer(..., persistent=False)"
                )
        written = {id(watched.tensor) for watched in self._tensors}
        self._contents = [
            _Contents(container, before, _copy(container))
            for container, before, _ in self._contents
            if not _same(container, before) or any(_reaches(item, written) for item in _items(before))
        ]

    def fresh(self, *, now: bool = False) -> dict[int, Tensor]:
        """For each tensor that the clean pass wrote to, by id, another with the content from before it, or of now."""
        if now:  # a checkpointed layer that runs again for a graph that is there must save as many tensors for it
            return {
                id(w.tensor): w.tensor.detach().clone().requires_grad_(w.tensor.requires_grad) for w in self._tensors
            }
        return {id(w.tensor): w.content.clone() for w in self._tensors if w.content is not None}

    @contextlib.contextmanager
    def replayed(self, fresh: dict[int, Tensor], *, keep: bool = False, now: bool = False) -> Iterator[None]:
        """Start the block from the contents before the clean pass, and end it with those after.

        Args:
            fresh: From `fresh`, what stands in the place of tensors that were written to.
            keep: Leave what the block puts into containers (it belongs to the graph that lives on).
            now: Start from the contents after the clean pass instead.
        """
        try:
            for container, before, after in self._contents:
                _put(container, after if now else before, fresh)
            yield
        except BaseException:
            self.leave()
            raise
        if not keep:
            self.leave()
            return
        originals = self.originals(fresh)
        for container, _, _ in self._contents:
            _put(container, _copy(container), originals)

    def leave(self) -> None:
        """Every content as the clean pass left it."""
        for container, _, after in self._contents:
            _put(container, after, {})

    def originals(self, fresh: dict[int, Tensor]) -> dict[int, Tensor]:
        """From the tensors in `fresh`, by id, back to those that others may hold, unless these carry a graph."""
        own = {id(watched.tensor): watched.tensor for watched in self._tensors}
        return {id(new): own[old] for old, new in fresh.items() if not own[old].requires_grad}

    def _take(self, value: Any, name: str) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and not value.is_inference():
                small = type(value) is Tensor and value.numel() <= MOST_COPIED and not value.is_nested
                self._tensors.append(_Watched(value, value._version, value.detach().clone() if small else None, name))
        elif isinstance(value, self._kinds):
            self.generators.append(value)
        elif isinstance(value, _CONTAINERS):
            content = _copy(value)
            self._contents.append(_Contents(value, content, content))
            self._take_items(content, name)
        elif isinstance(value, tuple):
            self._take_items(value, name)

    def _take_items(self, content: Any, name: str) -> None:
        for item in _items(content):
            if type(item) not in _PLAIN:
                self._take(item, name)


def written_by(hook: Any) -> Iterator[dict[Any, Any]]:
    """The dicts that a hook of the user's may write features to: its object's, and those that its function names.

    Examples:
        >>> features = {}
        >>> list(written_by(lambda module, inputs, output: features.update(out=output))) == [features]
        True
    """
    yield from (value for value in in_reach(hook) if isinstance(value, dict))


def _generator_kinds() -> tuple[type, ...]:
    numpy = sys.modules.get("numpy.random")
    return (torch.Generator, random.Random, *((numpy.Generator, numpy.RandomState) if numpy else ()))


def _copy(container: Any) -> Any:
    """A plain copy: of a dict subclass a dict, of a deque a list."""
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def _items(content: Any) -> Iterable[Any]:
    return content.values() if isinstance(content, dict) else content


def _same(container: Any, content: Any) -> bool:
    """Whether these very objects stand in it, in this order; `==` would compare tensors entry by entry."""
    if len(container) != len(content):
        return False
    if isinstance(content, set):
        return all(item in container for item in content)
    keys = not isinstance(content, dict) or all(map(is_, container, content))
    return keys and all(map(is_, _items(container), _items(content)))


def replaced(value: Any, instead: dict[int, Tensor]) -> Any:
    """What stands in the place of a value; a tuple is made anew if that is so of something in it.

    Examples:
        >>> state = torch.zeros(1)
        >>> replaced((1, (state,)), {id(state): torch.ones(1)})
        (1, (tensor([1.]),))
    """
    if not _is_open_tuple(value) or not _reaches(value, instead):
        return instead.get(id(value), value)
    items = [replaced(item, instead) for item in value]
    kind = type(value)
    return kind._make(items) if hasattr(kind, "_make") else kind(items)


def _reaches(value: Any, ids: Container[int]) -> bool:
    """Whether it, or anything in a tuple that it is, is one of these."""
    return id(value) in ids or (_is_open_tuple(value) and any(_reaches(item, ids) for item in value))


def _is_open_tuple(value: Any) -> bool:
    """Whether it can be made again of its items alone: a tuple, a named one, or one of `torch.return_types`."""
    kind = type(value)
    return kind is tuple or (
        isinstance(value, tuple) and (hasattr(kind, "_make") or hasattr(kind, "n_sequence_fields"))
    )


def _put(container: Any, content: Any, instead: dict[int, Tensor]) -> None:
    """Make `content` what stands in the container, with another object in the place of some."""
    if isinstance(content, dict):
        restore(container, {key: replaced(value, instead) for key, value in content.items()})
        if list(container) != list(content):
            for key in content:
                container[key] = container.pop(key)
        return
    wanted = [replaced(item, instead) for item in content]
    if isinstance(content, set):
        container.intersection_update(wanted)
        container.update(wanted)
    elif not _same(container, wanted):
        container.clear()
        container.extend(wanted)


def restore(current: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Make the entries of a dict those of another, touching no more than differs."""
    present = dict(current)  # a scripted module answers with less than a dict
    for name in present.keys() - wanted.keys():
        del current[name]
    for name, value in wanted.items():
        if present.get(name, _ABSENT) is not value:
            current[name] = value
