"""The teacher θ̃: a frozen module beside the model, and the averages of the parameters that it does not share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from smartreg._teacher.averaging import average_dtype, move_averages
from smartreg._teacher.parameters import Layout, Pair, differences, is_sharded, listed, pair
from smartreg._teacher.sharing import can_share, checked_teacher, frozen_copy, is_view, own_copy, reshard, view_of
from smartreg._wrappers import innermost

_Buffers = dict[str, Tensor | None]


class _Group(NamedTuple):
    """Parameters that are averaged in one go."""

    dtype: torch.dtype
    device: torch.device
    averages: list[Tensor]
    students: list[Tensor]
    teachers: list[Tensor]


class Teacher:
    r"""Keeps \(\tilde\theta\), the exponential moving average of the parameters \(\theta\) of a model.

    `module` computes with \(\tilde\theta\). Each of its parameters is either *shared*, and then has the storage of the
    model's own parameter, or *averaged*. The average of a half-precision parameter is kept in float32 beside it, in
    `wide`. Buffers are the model's.

    Args:
        model: The model whose parameters are averaged; behind wrappers, the module inside.
        module: The teacher at the start, or None for a copy that shares what is frozen in the model.

    Raises:
        TypeError: `module` is no module.
        ValueError: `module` does not fit the model, or shares what the model trains; the model has lazy parameters.
        RuntimeError: The model cannot be copied.
    """

    def __init__(self, model: nn.Module, module: nn.Module | None = None) -> None:
        self.model = innermost(model)
        lazy = [name for name, parameter in Layout(self.model).parameters.items() if is_lazy(parameter)]
        if lazy:
            raise ValueError(f"model must have run once before it gets a teacher, got lazy parameters: {listed(lazy)}")
        self.shared: set[str] = set()
        self.wide: dict[str, Tensor] = {}
        self._layouts: tuple[Layout, ...] = ()
        self._pairs: dict[str, Pair] = {}
        self._groups: list[_Group] = []
        self._buffers: list[tuple[_Buffers, _Buffers]] = []
        with _ordinary_tensors():
            self.module = frozen_copy(self.model) if module is None else checked_teacher(self.model, module)
            for name, (student, own) in list(self.pairs().items()):
                if not student.requires_grad and can_share(student, own):
                    self._share(name)
                else:
                    self._settle(name, own.data)
            self._follow()

    def pairs(self) -> dict[str, Pair]:
        """The parameters of model and teacher by name, looked up anew if either has changed.

        Raises:
            RuntimeError: The two no longer have the same parameters; the message names the difference.
        """
        if not self._layouts or not all(layout.is_current() for layout in self._layouts):
            reshard(self.model)
            reshard(self.module)
            layouts = Layout(self.model), Layout(self.module)
            changed = differences(*layouts)
            if changed:
                raise RuntimeError(
                    f"the model's parameters have changed since its MomentumBregman was made: {changed}. Make a new "
                    f"one after adding, removing, resizing or sharding modules"
                )
            self._layouts, self._pairs, self._groups = layouts, pair(*layouts), []
            model, teacher = (layout.modules for layout in layouts)
            both = [name for name in teacher if name in model and model[name]._buffers]
            self._buffers = [(model[name]._buffers, teacher[name]._buffers) for name in both]
        return self._pairs

    def trained(self) -> list[nn.Module]:
        """The modules of the model that have trained parameters of their own: the teacher must run none of them."""
        return [module for module in self.model.modules() if any(p.requires_grad for p in module.parameters(False))]

    def name_of(self, module: nn.Module) -> str:
        """What to call a module of the model in a message."""
        found = next(name for name, other in self.model.named_modules() if other is module)
        return f"the model's {type(module).__name__} {found!r}" if found else f"the model, {type(module).__name__},"

    def follow(self, *, unshare: bool = False) -> None:
        """Brings the teacher to where the model is: its device, dtype, shared storage and buffers.

        Args:
            unshare: Whether a shared parameter that the model now trains gets a storage of its own, at its value.

        Raises:
            RuntimeError: The parameters of the model have changed.
        """
        self.pairs()
        with _ordinary_tensors():
            if unshare:
                for name in self._thawed():
                    self._unshare(name)
            self._follow()

    def move(self, beta: float) -> None:
        r"""\(\tilde\theta \leftarrow (1-\beta)\,\theta + \beta\,\tilde\theta\), for every parameter not shared.

        Raises:
            RuntimeError: The parameters of the model have changed, or it trains one that is shared.
        """
        self.pairs()
        thawed = self._thawed()
        if thawed:
            raise RuntimeError(
                f"the model trains parameters that were frozen when the teacher last ran and that it shares: "
                f"{listed(thawed)}. Their value of that time is lost once the optimizer has moved them: after "
                f"unfreezing, call the penalty before the next optimizer step"
            )
        with _ordinary_tensors():
            self._take_buffers()
            for group in self._grouped():
                move_averages(group.averages, group.students, beta)
                if group.averages[0] is not group.teachers[0]:
                    torch._foreach_copy_(group.teachers, group.averages)

    def averages(self) -> dict[str, Tensor]:
        """Every average by name, at the precision in which it is kept; nothing of what is shared."""
        return {
            name: self.wide.get(name, own.detach())
            for name, (_, own) in self.pairs().items()
            if name not in self.shared
        }

    def restore(self, averages: dict[str, Tensor]) -> None:
        """Takes over saved averages; what is not among them becomes shared. Names and shapes were checked before."""
        with _ordinary_tensors():
            for name in list(self.pairs()):
                if name not in averages:
                    self._share(name)
                elif name in self.shared:
                    self._unshare(name)
            self._follow()
            for name, average in self.averages().items():
                average.copy_(averages[name])
                if name in self.wide:
                    self._pairs[name].teacher.copy_(average)

    def equals_model(self) -> bool:
        """Whether every parameter has the value of the model's; one that is sharded does not tell."""
        pairs = self.pairs().values()
        if any(is_sharded(own) for _, own in pairs):
            return False
        return all(own is student or torch.equal(own, student) for student, own in pairs)

    def copy_to(self, model: nn.Module) -> None:
        """Writes the averages, the shared parameters and the persistent buffers into a model of the same names.

        Raises:
            ValueError: The names or shapes differ; nothing was written.
        """
        self.follow()
        target, teacher = Layout(innermost(model)), self._layouts[1]
        different = differences(target, teacher)
        if different:
            raise ValueError(f"model must have the parameters of the teacher: {different}")
        averages = {id(self._pairs[name].teacher): average for name, average in self.averages().items()}
        with _ordinary_tensors():
            for parameter, own in pair(target, teacher).values():
                if not is_view(own, parameter):
                    parameter.copy_(averages.get(id(own), own))
            for name, module in teacher.modules.items():
                found = target.modules[name]._buffers if name in target.modules else {}
                for key, buffer in module._buffers.items():
                    into = found.get(key)
                    if buffer is not None and into is not None and key not in module._non_persistent_buffers_set:
                        into.copy_(buffer)

    @contextmanager
    def lent(self) -> Iterator[nn.Module]:
        """The module for one forward, on copies of the buffers: one that writes to them leaves the model's alone.

        Embeddings with `max_norm`, which shorten the rows that they look up, do so to a copy as well.

        Raises:
            RuntimeError: The forward wrote to a parameter; it moves in `move` alone.
        """
        copies: dict[int, Tensor] = {}
        for _, own in self._buffers:
            for name, buffer in own.items():
                if buffer is not None and id(buffer) not in copies:
                    copies[id(buffer)] = buffer.clone()
                if buffer is not None:
                    own[name] = copies[id(buffer)]
        shortened = [
            (module, module._parameters["weight"], nn.Parameter(module.weight.clone(), requires_grad=False))
            for module in self._layouts[1].modules.values()
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
        ]
        versions = [(name, own, _writes(own)) for name, (_, own) in self._pairs.items()]
        try:
            for embedding, _, copy in shortened:
                embedding._parameters["weight"] = copy
            yield self.module
        finally:
            for embedding, average, _ in shortened:
                embedding._parameters["weight"] = average
            self._take_buffers()
            reshard(self.module)
        written = listed(name for name, own, writes in versions if _writes(own) != writes)
        if written:
            raise RuntimeError(
                f"forward writes to parameters of the teacher, which move in update() alone: {written}. Change weights "
                f"outside of forward, after optimizer.step(), and make the MomentumBregman anew: these averages are "
                f"spoilt"
            )

    def _follow(self) -> None:
        self._place()
        for name in self.shared:
            self._share(name)
        for student, own in self._pairs.values():
            if own.requires_grad and own is not student:
                own.requires_grad_(False)
        self._take_buffers()
        if any(module.training for module in self._layouts[1].modules.values()):
            self.module.eval()

    def _place(self) -> None:
        for name, (student, own) in list(self._pairs.items()):
            if name not in self.shared and (own.dtype != student.dtype or own.device != student.device):
                self._settle(name, self.wide.get(name, own.data))

    def _take_buffers(self) -> None:
        for source, own in self._buffers:
            own.update(source)

    def _grouped(self) -> list[_Group]:
        """The parameters to average, by device and dtype; kept, since to gather them takes time."""
        if any(s.dtype != group.dtype or s.device != group.device for group in self._groups for s in group.students):
            self._groups = []
        if not self._groups:
            self._place()
            found: dict[tuple[object, ...], _Group] = {}
            for name, (student, own) in self._pairs.items():
                if name not in self.shared and (own.is_floating_point() or own.is_complex()):
                    empty = _Group(student.dtype, student.device, [], [], [])
                    group = found.setdefault((student.dtype, student.device, type(own)), empty)
                    group.averages.append(self.wide.get(name, own))
                    group.students.append(student)
                    group.teachers.append(own)
            self._groups = list(found.values())
        return self._groups

    def _thawed(self) -> list[str]:
        return [name for name in self.shared if self._pairs[name].model.requires_grad]

    def _share(self, name: str) -> None:
        student, own = self._pairs[name]
        if name not in self.shared:
            self.shared.add(name)
            self.wide.pop(name, None)
        if not is_view(own, student):
            self._put(name, view_of(student))

    def _unshare(self, name: str) -> None:
        self.shared.discard(name)
        self._put(name, own_copy(self._pairs[name].model))
        self._settle(name, self._pairs[name].teacher.data)

    def _settle(self, name: str, average: Tensor) -> None:
        """Keeps the average as precise as it needs, on the model's device; the parameter has the model's dtype."""
        student, own = self._pairs[name]
        dtype = average_dtype(student.dtype)
        average = average.to(student.device, dtype)
        self.wide.pop(name, None)
        if dtype != student.dtype:
            self.wide[name] = average
        if own.dtype != student.dtype or own.device != student.device:
            self._put(name, nn.Parameter(average.to(student.dtype), requires_grad=False))

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        student, own = self._pairs[name]
        self._layouts[1].replace(own, parameter)
        self._pairs[name] = Pair(student, parameter)
        self._groups = []

    def __getstate__(self) -> dict[str, Any]:
        """What is kept for speed is found anew where a copy is used."""
        return {**self.__dict__, "_layouts": (), "_pairs": {}, "_groups": [], "_buffers": []}


def _writes(tensor: Tensor) -> int:
    """How often a tensor was written to, as far as it counts."""
    return 0 if tensor.is_inference() else tensor._version


def _ordinary_tensors() -> AbstractContextManager[object]:
    """No graph, and no inference tensors either: those could never be updated outside of inference mode."""
    if not torch.is_inference_mode_enabled():
        return torch.no_grad()
    ordinary = ExitStack()
    ordinary.enter_context(torch.inference_mode(False))
    ordinary.enter_context(torch.no_grad())
    return ordinary
