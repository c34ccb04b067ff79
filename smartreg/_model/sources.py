"""Where random numbers come from: a way to read, to set and to compare the state of each generator."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Source(NamedTuple):
    """A generator of random numbers."""

    read: Callable[[], Any]
    write: Callable[[Any], Any]

    def is_at(self, state: Any) -> bool:
        """Whether nothing was drawn since that state was read."""
        return _equal(self.read(), state)


def torch_sources(devices: Iterable[torch.device]) -> list[Source]:
    """Torch's own generator of the CPU and of each of these accelerators."""
    return [
        Source(torch.get_rng_state, torch.set_rng_state),
        *(Source(partial(_get_state, device), partial(_set_state, device)) for device in devices),
    ]


def other_sources(held: Iterable[Any]) -> list[Source]:
    """Python's generator, numpy's if it is in use, and generators that somebody holds."""
    numpy = sys.modules.get("numpy.random")
    found = [Source(random.getstate, random.setstate)]
    if numpy is not None:
        found.append(Source(numpy.get_state, numpy.set_state))
    for generator in held:
        if isinstance(generator, random.Random):
            found.append(Source(generator.getstate, generator.setstate))
        elif hasattr(generator, "bit_generator"):  # numpy.random.Generator
            bits = generator.bit_generator
            found.append(Source(partial(getattr, bits, "state"), partial(setattr, bits, "state")))
        else:  # torch.Generator and numpy.random.RandomState have methods of one name
            found.append(Source(generator.get_state, generator.set_state))
    return found


def has_generator(device: torch.device) -> bool:
    """Whether an accelerator has a generator of its own."""
    return device.type not in ("cpu", "meta") and hasattr(torch.get_device_module(device), "get_rng_state")


def _get_state(device: torch.device) -> Tensor:
    module = torch.get_device_module(device)
    state: Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def _set_state(device: torch.device, state: Tensor) -> None:
    module = torch.get_device_module(device)
    if device.type == "mps":  # one generator, no device argument
        module.set_rng_state(state)
    else:
        module.set_rng_state(state, device)


def _equal(first: Any, second: Any) -> bool:
    """Equality of states: nests of dicts, tuples, arrays and tensors."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return all(_equal(first[name], second[name]) for name in first)
    if isinstance(first, tuple) and len(first) < 10:  # Python's own state is a tuple of hundreds of numbers
        return all(map(_equal, first, second))
    if hasattr(first, "tobytes"):
        return bool(first.tobytes() == second.tobytes())
    return bool(first == second)
