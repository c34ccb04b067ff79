"""What every rank of `test_distributed.py` runs; each check compares with one process and the whole batch.

Run on its own with `torchrun --nproc-per-node 2 tests/integrations/distributed_checks.py FOLDER`: one JSON file a rank.
"""

import contextlib
import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from smartreg import MomentumBregman, SmartLoss

EXAMPLES, TOKENS, WIDTH = 4, 5, 4


class Reader(nn.Module):
    """Two heads, of which a batch may use one; a buffer that the clean pass writes."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.hidden, self.dropout = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 6), nn.Dropout(dropout)
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(()))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: Tensor, head: str = "both") -> Tensor:
        with torch.no_grad():
            self.calls += 1
        hidden = self.dropout(self.hidden(self.embedding(ids)).tanh()).mean(1)
        if head == "first":
            return self.first(hidden)
        return torch.cat([self.first(hidden), self.second(hidden)], dim=-1)


def reader(dropout: float = 0.0) -> Reader:
    torch.manual_seed(0)
    return Reader(dropout).double()


def data(batches: int = 1) -> tuple[Tensor, Tensor]:
    """Ids and noise of the whole batch, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (batches, EXAMPLES, TOKENS), generator=generator)
    return ids, 0.2 * torch.randn(batches, EXAMPLES, TOKENS, WIDTH, generator=generator, dtype=torch.float64)


def mine(batch: Tensor) -> Tensor:
    """This rank's half."""
    share = EXAMPLES // dist.get_world_size()
    return batch[dist.get_rank() * share :][:share]


def backward(smart: SmartLoss, ids: Tensor, noise: Tensor | None, head: str = "both") -> Tensor:
    """A mean over examples, so that the mean over ranks is that of the whole batch."""
    outputs, penalty = smart(lambda m: m(ids, head), noise=noise)
    (outputs.square().mean() + penalty).backward()
    return penalty.detach()


def single(head: str = "both", batches: int = 1) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Penalty and gradients in one process, standard mode."""
    model = reader()
    smart = SmartLoss(model)
    penalties = [backward(smart, ids, noise, head) for ids, noise in zip(*data(batches), strict=True)]
    return torch.stack(penalties).sum(), {name: p.grad for name, p in model.named_parameters()}


def differences(model: nn.Module, penalty: Tensor, wanted: tuple[Tensor, dict[str, Tensor | None]]) -> dict[str, Any]:
    """How far the mean penalty of the ranks and the synchronised gradients are from those of one process."""
    penalty = penalty.clone()
    dist.all_reduce(penalty)
    found = {name.replace("_orig_mod.", ""): p.grad for name, p in model.named_parameters()}
    gaps = []
    for name, gradient in wanted[1].items():
        whole = found[name].full_tensor() if hasattr(found[name], "full_tensor") else found[name]
        gaps.append(0.0 if gradient is None and whole is None else (whole - gradient).abs().max().item())
    return {
        "penalty": wanted[0].item(),
        "penalty gap": abs(penalty.item() / dist.get_world_size() - wanted[0].item()),
        "gradient gap": max(gaps),
        "gradient": max(g.abs().max().item() for g in wanted[1].values() if g is not None),
    }


class Offset(Reader):
    """Reads in train mode a buffer of its own, which the processes count up differently until DDP makes them equal."""

    def forward(self, ids: Tensor, head: str = "both") -> Tensor:
        outputs = super().forward(ids, head) * (1 + self.calls.detach().clone())
        with torch.no_grad():
            self.calls += dist.get_rank()
        return outputs


def check_buffers_that_ranks_change() -> Iterator[tuple[str, Any]]:
    """Nothing is perturbed, so that a replay of the clean pass differs from it only if it reads other buffers."""
    (ids,), _ = data()
    for memory_efficient in (False, True):
        torch.manual_seed(0)
        smart = SmartLoss(DistributedDataParallel(Offset().double()), epsilon=0, memory_efficient=memory_efficient)
        mode = "memory-efficient" if memory_efficient else "standard"
        yield f"{mode}, nothing perturbed", [backward(smart, mine(ids), None).item() for _ in range(3)]


def message(action: Callable[[], Any]) -> str:
    """What it raises."""
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def check_ddp() -> Iterator[tuple[str, Any]]:
    (ids,), (noise,) = data()
    wanted = single()
    for memory_efficient in (False, True):
        mode = "memory-efficient" if memory_efficient else "standard"
        for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
            ddp = DistributedDataParallel(reader(), **options)
            smart = SmartLoss(ddp, memory_efficient=memory_efficient)
            for _ in range(2):  # a static graph reduces in another way from the second step on
                ddp.zero_grad()
                penalty = backward(smart, mine(ids), mine(noise))
            label = next(iter(options), "plain")
            yield f"{mode}, {label}", differences(ddp.module, penalty, wanted)

        ddp = DistributedDataParallel(reader(), find_unused_parameters=True)
        smart = SmartLoss(ddp, memory_efficient=memory_efficient)
        for _ in range(2):
            ddp.zero_grad(set_to_none=True)
            penalty = backward(smart, mine(ids), mine(noise), "first")
        yield f"{mode}, unused head", differences(ddp.module, penalty, single("first"))
        yield f"{mode}, calls counted", ddp.module.calls.item()

        ddp = DistributedDataParallel(reader())
        smart = SmartLoss(ddp, memory_efficient=memory_efficient)
        many_ids, many_noises = data(3)
        total = torch.zeros((), dtype=torch.float64)
        for index, (one, its_noise) in enumerate(zip(many_ids, many_noises, strict=True)):
            with contextlib.nullcontext() if index == 2 else ddp.no_sync():
                total += backward(smart, mine(one), mine(its_noise))
        yield f"{mode}, no_sync", differences(ddp.module, total, single(batches=3))

        torch.manual_seed(7 + dist.get_rank())
        ddp = DistributedDataParallel(Reader(dropout=0.3))
        zero = SmartLoss(ddp, epsilon=0.0, memory_efficient=memory_efficient)
        yield f"{mode}, zero", zero(lambda m: m(mine(ids))).penalty.item()
        backward(SmartLoss(ddp, memory_efficient=memory_efficient), mine(ids), mine(noise))
        gradient = ddp.module.hidden.weight.grad.clone()
        dist.all_reduce(gradient)
        yield f"{mode}, synchronised", (gradient / 2 - ddp.module.hidden.weight.grad).abs().max().item()


class TrainingStep(nn.Module):
    """The whole step inside of what DDP wraps, as Lightning's `training_step` is."""

    def __init__(self, model: nn.Module, memory_efficient: bool) -> None:
        super().__init__()
        self.model = model
        self.smart = SmartLoss(model, memory_efficient=memory_efficient)

    def forward(self, ids: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        outputs, penalty = self.smart(lambda m: m(ids), noise=noise)
        return outputs.square().mean() + penalty, penalty.detach()


def check_step_inside() -> Iterator[tuple[str, Any]]:
    (ids,), (noise,) = data()
    for memory_efficient in (False, True):
        mode = "memory-efficient" if memory_efficient else "standard"
        ddp = DistributedDataParallel(TrainingStep(reader(), memory_efficient))
        loss, penalty = ddp(mine(ids), mine(noise))
        loss.backward()
        yield f"{mode}, step inside", differences(ddp.module.model, penalty, single())


def check_errors() -> Iterator[tuple[str, Any]]:
    (ids,), _ = data()
    for memory_efficient in (False, True):
        mode = "memory-efficient" if memory_efficient else "standard"
        ddp = DistributedDataParallel(reader())
        smart = SmartLoss(ddp, memory_efficient=memory_efficient)
        yield f"{mode}, around", message(lambda s=smart, d=ddp: s(lambda m: d.module(mine(ids))))
        yield f"{mode}, closure", message(lambda s=smart, d=ddp: s(lambda m: d(mine(ids))))
    yield "compiled outside", message(lambda: SmartLoss(torch.compile(ddp)))


def check_compiled() -> Iterator[tuple[str, Any]]:
    (ids,), (noise,) = data()
    model = reader()
    ddp = DistributedDataParallel(torch.compile(model, backend="aot_eager"))
    smart = SmartLoss(ddp)
    penalty = backward(smart, mine(ids), mine(noise))
    yield "compiled inside", differences(model, penalty, single())


def check_start_along_the_gradient() -> Iterator[tuple[str, Any]]:
    """Nothing is given and nothing drawn: the start comes from the clean graph, or from a pass of its own."""
    (ids,), _ = data()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for steps in (0, 1):
        lone = reader()
        wanted = backward(SmartLoss(lone, steps=steps), ids, None), {n: p.grad for n, p in lone.named_parameters()}
        for memory_efficient in (False, True):
            mode = "memory-efficient" if memory_efficient else "standard"
            for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
                ddp = DistributedDataParallel(reader(), **options)
                smart = SmartLoss(ddp, steps=steps, memory_efficient=memory_efficient)
                for _ in range(2):
                    ddp.zero_grad()
                    penalty = backward(smart, mine(ids), None)
                label = next(iter(options), "plain")
                yield f"start, {mode}, {label}, {steps}", differences(ddp.module, penalty, wanted)
            model = reader()
            fully_shard(model.hidden, mesh=mesh)
            fully_shard(model, mesh=mesh)
            penalty = backward(SmartLoss(model, steps=steps, memory_efficient=memory_efficient), mine(ids), None)
            yield f"start, {mode}, fully_shard, {steps}", differences(model, penalty, wanted)


def check_fully_shard() -> Iterator[tuple[str, Any]]:
    (ids,), (noise,) = data()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def shard(model: nn.Module) -> nn.Module:
        fully_shard(model.hidden, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    model, teacher = reader(), reader()
    with torch.no_grad():
        teacher.first.weight[0].add_(0.5)
    lone_model, lone_teacher = copy.deepcopy(model), copy.deepcopy(teacher)
    shard(model), shard(teacher)
    smart, bregman = SmartLoss(model), MomentumBregman(model, beta=0.5, teacher=teacher)
    penalty = backward(smart, mine(ids), mine(noise))
    yield "fully_shard", differences(model, penalty, single())
    yield "fully_shard, flags", all(p.requires_grad for p in model.parameters())
    model.zero_grad()
    penalty = backward(SmartLoss(model, memory_efficient=True), mine(ids), mine(noise))
    yield "fully_shard, memory-efficient", differences(model, penalty, single())

    lone = MomentumBregman(lone_model, beta=0.5, teacher=lone_teacher)
    for step in range(2):
        proximal = bregman(lambda m: m(mine(ids)), model(mine(ids)))
        dist.all_reduce(proximal.detach_())
        wanted = lone(lambda m: m(ids), lone_model(ids)).detach()
        yield (
            f"fully_shard, teacher {step}",
            {
                "penalty": wanted.item(),
                "gap": abs(proximal.item() / dist.get_world_size() - wanted.item()),
            },
        )
        bregman.update()
        lone.update()
    yield "fully_shard, deepcopy", message(lambda: MomentumBregman(model))


def main(folder: Path) -> None:
    """Run every check and write what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    start, buffers = check_start_along_the_gradient, check_buffers_that_ranks_change
    for check in (check_ddp, check_step_inside, check_errors, check_compiled, check_fully_shard, start, buffers):
        found.update(check())
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
