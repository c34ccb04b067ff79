"""Where a run computes: its device, and its place among the processes that `torchrun` started; `--compile`."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import InputError, OutputError

VARIANTS = 64
"""Graphs that one function may be compiled into; past it, torch silently falls back to uncompiled code."""


@dataclass(frozen=True)
class Place:
    """The device of this process, its rank, and how many processes there are."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process speaks for all: prints and writes."""
        return self.rank == 0


def join(device: str) -> Place:
    """Finds the device and, under `torchrun`, joins the other processes.

    Raises:
        InputError: the device is not there.
    """
    world, local = _environment("WORLD_SIZE", 1), _environment("LOCAL_RANK", 0)
    if world > 1 and (lacking := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]):
        raise InputError(f"WORLD_SIZE is {world}, but {lacking[0]} is not set: start with torchrun, or unset it")
    kind = device
    if device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        kind = "cpu" if kind == "mps" and world > 1 else kind
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this PyTorch sees no CUDA device; choose --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: this PyTorch sees no MPS device; choose --device cpu")
    if kind == "mps" and world > 1:
        raise InputError("--device mps: expected one process, got several; choose --device cpu")
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise InputError(f"--device cuda: {torch.cuda.device_count()} devices are too few for {world} processes")
    place = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    if world == 1:
        return Place(place)
    if not dist.is_initialized():
        # Control messages (stop requests, random states) travel on CPU tensors, whatever the gradients use.
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    return Place(place, dist.get_rank(), world)


def _environment(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"{name}: expected a whole number in the environment, got {text!r}; torchrun sets it")
    return int(text)


def leave() -> None:
    """Ends the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    """The model under `torch.compile`, with room for all its variants.

    The tasks have different heads and one or two sentences, and the clean, the ascent and the perturbed pass differ in
    what needs a gradient: more variants than the default limit of 8.
    """
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # the name before torch 2.7
    setattr(config, name, max(getattr(config, name), VARIANTS))
    return cast(nn.Module, torch.compile(model, dynamic=True))


def wrap(model: nn.Module, place: Place) -> nn.Module:
    """The model under DDP where there are several processes."""
    if place.world == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    # A step trains one task, so the heads of the others have no gradient in it.
    ids = [place.device.index] if place.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True)


def no_sync(model: nn.Module, more_to_come: bool) -> AbstractContextManager[Any]:
    """Keeps DDP from exchanging gradients while more micro-batches of the step follow."""
    if more_to_come and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def any_process(place: Place, value: bool) -> bool:
    """Whether the value is True in any process."""
    if place.world == 1:
        return value
    flag = torch.tensor([float(value)])
    dist.all_reduce(flag)
    return bool(flag.item())


def total(place: Place, tensor: Tensor) -> Tensor:
    """The sum over all processes, on the CPU."""
    tensor = tensor.detach().cpu()
    if place.world > 1:
        dist.all_reduce(tensor)
    return tensor


def joined(place: Place, sums: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of one tensor and maxima of another over all processes; both stand on the CPU."""
    if place.world > 1:
        dist.all_reduce(sums)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return sums, largest


def first_decides(place: Place, decide: Callable[[], object]) -> str:
    """What the first process decides, as text, in every process; so too what it refuses, or the others would wait."""
    if place.world == 1:
        return str(decide())
    refusals = {"InputError": InputError, "OutputError": OutputError}
    kind, text = "", ""
    if place.first:
        try:
            text = str(decide())
        except (InputError, OutputError) as error:
            kind, text = type(error).__name__, str(error)
    kind, text = _from_first(place, kind), _from_first(place, text)
    if kind:
        raise refusals[kind](text)
    return text


def _from_first(place: Place, text: str) -> str:
    data = list(text.encode("utf-8", "surrogatepass"))  # the name of a file may be no valid Unicode
    size = torch.tensor(len(data))
    dist.broadcast(size, 0)
    sent = torch.tensor(data if place.first else [0] * int(size), dtype=torch.uint8)
    if int(size):
        dist.broadcast(sent, 0)
    return bytes(sent.tolist()).decode("utf-8", "surrogatepass")


def random_states(place: Place) -> list[Tensor]:
    """The random state of every process as bytes, in the order of the ranks: the CPU's, and its device's after it."""
    own = _own_random_state(place)
    if place.world == 1:
        return [own]
    states = [torch.empty_like(own) for _ in range(place.world)]
    dist.all_gather(states, own)
    return states


def _own_random_state(place: Place) -> Tensor:
    parts = [torch.get_rng_state()]
    if place.device.type == "cuda":
        parts.append(torch.cuda.get_rng_state(place.device))
    elif place.device.type == "mps":
        parts.append(torch.mps.get_rng_state())
    return torch.cat(parts)


def set_random_state(place: Place, state: Tensor) -> bool:
    """Puts back one of `random_states` in this process; returns whether it holds a state of this kind of device."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())
    if len(state) != len(_own_random_state(place)):
        return False
    if place.device.type == "cuda":
        torch.cuda.set_rng_state(state[size:].clone(), place.device)
    elif place.device.type == "mps":
        torch.mps.set_rng_state(state[size:].clone())
    return True
