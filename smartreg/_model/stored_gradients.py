"""Gradients that were computed ahead of time, carried to the user's backward by a node of the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import Node
from typing_extensions import Self

from smartreg._loss_scale import scaled


@dataclass(frozen=True)
class StoredGradients:
    """A penalty that was differentiated at once, its graph already gone.

    Attributes:
        value: The penalty, without a graph.
        reference: Gradients with respect to the clean outputs and embeddings, by their index.
        leaves: Every leaf that the penalty depends on, with its gradient.
        scale: What the gradients have been multiplied by; None for 1.
    """

    value: Tensor
    reference: dict[int, Tensor]
    leaves: list[tuple[Tensor, Tensor]]
    scale: Tensor | None

    @classmethod
    def of(cls, value: Tensor, reference: Sequence[Tensor], mark: int, scale: Tensor | None) -> Self:
        """Differentiate `value` and free its graph, all of which was made after `mark`.

        Args:
            value: The penalty with its graph.
            reference: The clean outputs as leaves, and the embeddings where the pass took them as leaves; some may not
                require a gradient.
            mark: From `graph_mark`, before the graph was made.
            scale: What to multiply the penalty by first; None for 1.

        Raises:
            RuntimeError: A graph enters from outside.
        """
        outputs = {index: tensor for index, tensor in enumerate(reference) if tensor.requires_grad}
        leaves = [leaf for leaf in _leaves_since(value, mark) if all(leaf is not out for out in outputs.values())]
        gradients: Sequence[Tensor | None] = [None] * (len(outputs) + len(leaves))
        if value.requires_grad:
            with _silent_hooks(leaves):
                gradients = torch.autograd.grad(scaled(value, scale), [*outputs.values(), *leaves], allow_unused=True)
        by_output = zip(outputs, gradients[: len(outputs)], strict=True)
        by_leaf = zip(leaves, gradients[len(outputs) :], strict=True)
        return cls(
            value.detach(),
            {index: gradient for index, gradient in by_output if gradient is not None},
            # Only leaves with a gradient enter the graph: a search for unused parameters must find the others unused.
            [(leaf, gradient) for leaf, gradient in by_leaf if gradient is not None],
            scale,
        )

    def all(self) -> list[Tensor]:
        """Every stored gradient."""
        return [*self.reference.values(), *(gradient for _, gradient in self.leaves)]

    def attach(self, clean: Sequence[Tensor]) -> Tensor:
        """The penalty as part of the graph of the clean outputs, and of the embeddings behind them.

        One node for each tensor, each passing the scalar on, so that no more than one scaled copy is alive at a time.
        Its backward may run again under `retain_graph=True`.
        """
        value = self.value
        for tensor, gradient in [*((clean[index], g) for index, g in self.reference.items()), *self.leaves]:
            value = _StoredGradient.apply(value, tensor, gradient, self.scale)  # type: ignore[no-untyped-call]  # torch
        return value


class _StoredGradient(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, tensor: Tensor, gradient: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(gradient, scale)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "memory_efficient=True stores first derivatives only: backward(create_graph=True) needs "
                "memory_efficient=False"
            )
        try:
            gradient, scale = ctx.saved_tensors
        except RuntimeError as error:
            raise RuntimeError(
                "the gradients of the memory-efficient penalty are gone after one backward: call "
                "backward(retain_graph=True) the first time, or SmartLoss once for each backward"
            ) from error
        (upstream,) = outputs
        wide = torch.promote_types(gradient.dtype, torch.float32)
        factor = (upstream if scale is None else upstream / scale).to(gradient.device, wide)
        return upstream, (gradient.to(wide) * factor).to(gradient.dtype), None, None


def graph_mark() -> int:
    """The sequence number of an autograd node made now: those made later have a larger one, older ones a smaller.

    Autocast's cache is cleared, because a weight that it has cast already would bring an older node with it.
    """
    torch.clear_autocast_cache()
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).view(()).grad_fn
    return _sequence_number(node)


def _leaves_since(value: Tensor, mark: int) -> list[Tensor]:
    """The leaves of the graph of `value`, all of which was made after `mark`.

    Raises:
        RuntimeError: Part of the graph is older, so that differentiating it now would free what is not ours.
    """
    leaves: list[Tensor] = []
    seen: set[Node] = set()
    pending: list[Node | None] = [value.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("AccumulateGrad"):
            leaves.append(node.variable)  # type: ignore[attr-defined]  # this kind of node has it
            continue
        if _sequence_number(node) < mark:
            raise RuntimeError(
                f"memory_efficient=True needs every tensor with a graph to be made inside forward, got one that enters "
                f"from outside ({node.name()}): move its computation into forward, detach it, or use "
                f"memory_efficient=False"
            )
        pending.extend(following for following, _ in node.next_functions)
    return leaves


@contextlib.contextmanager
def _silent_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Tensor hooks of the leaves do not run in this block: they belong to the user's backward."""
    registered = [(leaf._backward_hooks, dict(leaf._backward_hooks)) for leaf in leaves if leaf._backward_hooks]
    for hooks, _ in registered:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in registered:
            hooks.update(kept)


def _sequence_number(node: Node | None) -> int:
    number: int = node._sequence_nr()  # type: ignore[union-attr]  # no public spelling
    return number
