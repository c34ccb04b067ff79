"""The passes of one `SmartLoss` call through the model: the clean one, and its replays with a perturbation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Self

from smartreg._model.ddp import around_wrapper, bring_buffers, through_wrapper
from smartreg._model.embedding import EmbeddingPass, EmbeddingTap
from smartreg._model.replay import ModuleState, RandomState, Stilled, backward_hooks, devices_of
from smartreg._outputs import Forward, OutputToLogits, compared_tensors
from smartreg._wrappers import code_of, is_compiled, unwrapped, without_ddp


@dataclass(frozen=True)
class CleanPass:
    """What a pass without perturbation gave.

    Attributes:
        outputs: What `forward` returned.
        compared: The tensors to compare in it.
        record: What was seen at the embedding.
        shared_lookups: The embeddings with their graph, where a perturbed pass may start from them; or None.
        graph: The tensors to compare and the embeddings that they come from, where their graph may be differentiated
            ahead of the user's backward, and kept for it; or None.
    """

    outputs: Any
    compared: tuple[Tensor, ...]
    record: EmbeddingPass
    shared_lookups: tuple[Tensor, ...] | None = None
    graph: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    @property
    def embeddings(self) -> list[Tensor]:
        """x of each look-up, by value."""
        return self.record.embeddings

    def as_leaves(self) -> CleanPass:
        """The values alone: the tensors to compare as leaves, and no graph behind them."""
        self.record.graphs.clear()
        leaves = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self.compared)
        return CleanPass(None, leaves, self.record)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What autocast made of float32 at the embedding; None where it is off."""
        return self.record.autocast_dtype


class ModelPasses:
    """Runs `forward` as often as it takes, and leaves behind what one clean pass would have left.

    The first pass is `clean` or `reference`, whatever follows is a replay of it.

    Args:
        model: The model as the user gave it, wrappers and all.
        tap: The hooks on its embedding.
        forward: The user's function.
        output_to_logits: See `SmartLoss`.
        shared_dropout: Every pass starts from the random state of the clean one.
        remember_draws: On the CPU such passes copy the dropout masks of the clean one, rather than draw them again.
    """

    def __init__(
        self,
        model: nn.Module,
        tap: EmbeddingTap,
        forward: Forward,
        output_to_logits: OutputToLogits | None,
        *,
        shared_dropout: bool,
        remember_draws: bool = False,
    ) -> None:
        self._model, self._tap, self._forward = model, tap, forward
        self._output_to_logits = output_to_logits
        self._inner = without_ddp(model)
        self._module = unwrapped(model)
        bring_buffers(model)  # the replays begin where the clean pass will
        self._state = ModuleState(self._module)
        self._random = RandomState(
            devices_of(self._module),
            self._state.held.generators,
            shared=shared_dropout,
            remember_draws=remember_draws,
        )
        self.same_dropout = self._random.sharing
        self._first = EmbeddingPass()
        self._stilled = Stilled(self._module, freeze=False)
        self._has_clean = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After a Ctrl-C, which may have come while a pass was putting things back, put them back once more."""
        if kind is not None and not issubclass(kind, Exception):
            self._stilled.release()
            self._tap.close()
            if self._has_clean:
                self._state.leave()

    def clean(self, *, share_lookups: bool, differentiable: bool) -> CleanPass:
        """The first pass with its graph, through the wrappers.

        Args:
            share_lookups: A perturbed pass shall start from the embeddings of this one.
            differentiable: The graph shall be differentiated with respect to the embeddings, if it may be.
        """
        differentiable = differentiable and self._may_differentiate()
        self._first = EmbeddingPass(attached=share_lookups or differentiable)
        outputs = self._through(self._first)
        return self._kept(outputs, share_lookups=share_lookups, differentiable=differentiable)

    def reference(self, *, differentiable: bool = False) -> CleanPass:
        """The first pass, around the wrappers, for its values: its saved tensors are dropped.

        In the user's grad mode all the same: some layers take another path, with other rounding, under `no_grad`.

        Args:
            differentiable: Keep the graph until `CleanPass.as_leaves`, if it may be differentiated.
        """
        differentiable = differentiable and self._may_differentiate()
        self._first = EmbeddingPass(attached=differentiable)
        with self._dropping(not differentiable), self._around(self._first) as outputs:
            pass
        found = self._kept(outputs, share_lookups=False, differentiable=differentiable)
        return found if differentiable else found.as_leaves()

    def _may_differentiate(self) -> bool:
        """Whether the graph of a clean pass may be differentiated ahead of the user's backward, and kept for it.

        Compiled graphs run once; FSDP and a static DDP graph count the backward passes; hooks of the user's on modules
        would take it for the user's own.
        """
        static = isinstance(self._model, DistributedDataParallel) and self._model.static_graph
        sharded = any(hasattr(type(module), "unshard") for module in self._module.modules())  # FSDP2 swaps the class
        return not (static or sharded or is_compiled(self._inner) or backward_hooks(self._module))

    @property
    def kind(self) -> object:
        """The code of `forward`, and the mode of the model: what can be repeated here need not be elsewhere."""
        return code_of(self._forward), self._module.training

    def repeated(self) -> tuple[Tensor, ...]:
        """The tensors to compare from a replay of the first pass, without a perturbation, detached."""
        return self._repeated()[0]

    def reference_without_autocast(self) -> tuple[tuple[Tensor, ...], bool]:
        """The same with the user's autocast off, and whether one was on all the same, entered inside of `forward`."""
        compared, record = self._repeated(autocast=False)
        return compared, record.autocast_dtype is not None

    def _repeated(self, *, autocast: bool = True) -> tuple[tuple[Tensor, ...], EmbeddingPass]:
        record = EmbeddingPass(attached=self._first.attached)  # as the first, for the graphs of torch.compile
        with self._replayed(), self._dropping(), self._around(record, autocast=autocast) as outputs:
            compared = compared_tensors(outputs, self._output_to_logits)
            return tuple(tensor.detach() for tensor in compared), record

    def undone(self) -> contextlib.AbstractContextManager[None]:
        """In this block whatever is written to buffers, and to what modules hold, is undone at its end."""
        return self._state.replayed(now=True)

    @contextlib.contextmanager
    def perturbed(
        self,
        perturbations: Sequence[Tensor],
        *,
        freeze: bool = False,
        inner: bool = False,
        autocast: bool = True,
        bases: Sequence[Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, ...]]:
        """A pass with perturbed embeddings; inside the block its graph may be differentiated.

        Args:
            perturbations: One for each look-up.
            freeze: No parameter requires a gradient in this block; implies `inner`.
            inner: The graph does not outlive the block; the user's hooks on the backward of modules do not see it.
            autocast: False switches the user's autocast off.
            bases: Embeddings of the clean pass, perturbed in place of what this pass looks up.
        """
        record = EmbeddingPass(perturbations, bases=bases, base_lookups=self._first.lookups_of)
        with self._replayed(), self._still(freeze=freeze) if freeze or inner else contextlib.nullcontext():
            with self._around(record, autocast=autocast) as outputs:
                logits = compared_tensors(outputs, self._output_to_logits)
            if record.lookups != len(perturbations):
                raise RuntimeError(
                    f"the perturbation reached {record.lookups} embedding look-ups in a perturbed pass, "
                    f"expected {len(perturbations)} as in the clean pass: forward must be repeatable"
                    + self._compile_hint()
                )
            if record.compiled_lookups != self._first.compiled_lookups:
                raise RuntimeError(
                    f"a perturbed pass ran {record.compiled_lookups} of {record.lookups} embedding "
                    f"look-ups compiled, expected {self._first.compiled_lookups} as in the clean pass: eager and "
                    f"compiled passes draw different dropout masks. torch.compile gives up after a number of graphs; "
                    f"raise torch._dynamo.config.recompile_limit before training, or compile with dynamic=True"
                )
            yield logits

    def embeddings_as_leaves(self) -> tuple[Tensor, ...] | None:
        """The recorded embeddings as leaves of the perturbed pass, whose gradients are small where a table's are dense.

        None where a look-up in that pass need not equal the recorded one (fresh dropout masks), or is compiled, so that
        its embeddings cannot be had with their graph.
        """
        if not self._random.shared or self._first.compiled_lookups:
            return None
        pairs = zip(self._first.embeddings, self._first.needs_gradient, strict=True)
        return tuple(embedded.detach().requires_grad_(needed) for embedded, needed in pairs)

    def clean_again(self, *, share_lookups: bool) -> CleanPass:
        """The clean pass once more, with its dropout masks, whose graph and attributes stay.

        Args:
            share_lookups: Record the embeddings with their graph as well.
        """
        record = EmbeddingPass(attached=share_lookups)
        with self._random.sharing(), self._random.replayed(), self._state.replayed(keep_attributes=True):
            outputs = self._through(record)
            compared = compared_tensors(outputs, self._output_to_logits)
            return CleanPass(outputs, compared, record, tuple(record.graphs) if share_lookups else None)

    def _kept(self, outputs: Any, *, share_lookups: bool, differentiable: bool) -> CleanPass:
        """After the first pass: check that it was recorded, and keep what it made of the model."""
        if not self._first.lookups:
            raise RuntimeError(
                "the perturbation cannot reach the model: forward never called the embedding that is perturbed. Check "
                "that forward runs the module that it is given, make a new SmartLoss if the embedding was replaced "
                "since (resize_token_embeddings), and pass embedding= if that is not the layer" + self._compile_hint()
            )
        compared = compared_tensors(outputs, self._output_to_logits)
        self._state.keep_clean()
        self._random.keep_clean()
        self._has_clean = True
        lookups = tuple(self._first.graphs) if len(self._first.graphs) == self._first.lookups else None
        # Embeddings that are frozen, for example, have no graph that goes as far as they.
        reached = differentiable and lookups is not None and all(lookup.requires_grad for lookup in lookups)
        graph = (compared, lookups) if reached and lookups is not None else None
        return CleanPass(outputs, compared, self._first, lookups if share_lookups else None, graph)

    @contextlib.contextmanager
    def _still(self, *, freeze: bool) -> Iterator[None]:
        self._stilled = stilled = Stilled(self._module, freeze=freeze)
        try:
            stilled.hold()
            yield
        finally:
            stilled.release()

    @contextlib.contextmanager
    def _replayed(self) -> Iterator[None]:
        with self._random.replayed(), self._state.replayed():
            yield

    def _through(self, record: EmbeddingPass) -> Any:
        """What `forward` returns for the model as the user gave it."""
        with self._tap.open(record), through_wrapper(self._model, record), self._random.draws:
            return self._forward(self._model)

    @contextlib.contextmanager
    def _around(self, record: EmbeddingPass, *, autocast: bool = True) -> Iterator[Any]:
        """What `forward` returns for the model inside of DDP; `autocast=False` switches the user's off in the block."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._tap.open(record))
            stack.enter_context(around_wrapper(self._model))
            stack.enter_context(self._random.draws)
            for device_type in {e.device.type for e in self._first.embeddings} if not autocast else ():
                stack.enter_context(torch.autocast(device_type, enabled=False))
            yield self._forward(self._inner)

    def _dropping(self, drop: bool = True) -> contextlib.AbstractContextManager[Any]:
        """In this block nothing is saved for a backward; compiled graphs free it with their output anyway."""
        if not drop or is_compiled(self._inner):
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(_drop, _missing)

    def _compile_hint(self) -> str:
        if not is_compiled(self._inner):
            return ""
        return (
            ". The model is compiled: one that was called before SmartLoss was made does not see the hook; call "
            "torch._dynamo.reset() after making SmartLoss"
        )


def _drop(tensor: Tensor) -> None:
    return None


def _missing(_: None) -> Tensor:
    raise RuntimeError(
        "a graph of the reference pass was differentiated; with memory_efficient=True forward must not run a backward "
        "of its own"
    )
