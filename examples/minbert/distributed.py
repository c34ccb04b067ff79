"""Where a run computes: its device, and its place among the processes that `torchrun` started."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .errors import InputError


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
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
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


def leave() -> None:
    """Ends the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: torch.nn.Module, place: Place) -> torch.nn.Module:
    """The model under DDP where there are several processes."""
    if place.world == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    # A step trains one task, so the heads of the others have no gradient in it.
    ids = [place.device.index] if place.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True)


def no_sync(model: torch.nn.Module, more_to_come: bool) -> AbstractContextManager[Any]:
    """Keeps DDP from exchanging gradients while more micro-batches of the step follow."""
    if more_to_come and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def barrier(place: Place) -> None:
    """Waits for all processes."""
    if place.world > 1:
        dist.all_reduce(torch.zeros(1))


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


def gather_bytes(place: Place, state: Tensor) -> list[Tensor]:
    """Equal-sized byte tensors of all processes, in the order of the ranks."""
    if place.world == 1:
        return [state]
    states = [torch.empty_like(state) for _ in range(place.world)]
    dist.all_gather(states, state)
    return states


def agree_on(place: Place, text: str) -> str:
    """The first process's text, in every process."""
    if place.world == 1:
        return text
    room = torch.zeros(4096, dtype=torch.uint8)
    data = text.encode()
    room[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    dist.broadcast(room, 0)
    return bytes(room.tolist()).rstrip(b"\0").decode()
