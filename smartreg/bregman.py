"""The momentum Bregman proximal term: stay close to the moving average of yourself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smartreg._checks import check_forward, flag
from smartreg._masks import Masks
from smartreg._model.held import HeldState
from smartreg._model.replay import undone
from smartreg._outputs import Forward, OutputToLogits, check_output_to_logits, compared_tensors, divergence_of
from smartreg._teacher.modes import Distance, check_shapes, in_train_mode, look_at_modes
from smartreg._teacher.momentum import checked_beta, paper_beta, suggested_beta
from smartreg._teacher.saved import misfit, unsound
from smartreg._teacher.teacher import Teacher
from smartreg._typing import typed_as
from smartreg._wrappers import innermost, noting_calls, outside_graphs
from smartreg.divergences import Divergence, name_of, resolve_divergence

__all__ = ["MomentumBregman", "paper_beta", "suggested_beta"]


class MomentumBregman(nn.Module):
    r"""The Bregman proximal term of SMART, with a teacher that follows by momentum.

    \[ D_{\text{Breg}}(\theta, \tilde\theta) = \frac1n \sum_i \ell_s\big(f(x_i;\theta), f(x_i;\tilde\theta)\big),
    \qquad \tilde\theta_{t+1} = (1-\beta)\,\theta_{t+1} + \beta\,\tilde\theta_t \]

    where f is the model, \(\ell_s\) the divergence and \(\tilde\theta\) the weights of the teacher. The first is
    what a call returns, to be multiplied by μ and added to the loss; the second is `update()`, to be called after the
    optimizer's step. Algorithm 1 moves the teacher every S optimizer steps: call `update()` that often. (Equation 2
    of the RO-BERT report writes \(\theta_t\) where \(\tilde\theta_t\) is meant, and the index of its \(\tilde\theta\)
    differs by one from line 14 of the algorithm; here it is as in the algorithm, with \(\tilde\theta_0 = \theta_0\).)

    The teacher is a frozen copy in eval mode, and stays so: it computes without dropout, in the model's dtype, on the
    model's device, and follows the model to another. What happens to the

    * *trained parameters*: averaged. In half precision the average is kept in float32, because the steps of an average
      are too small for bfloat16.
    * *frozen parameters*: shared by storage, so that with LoRA the teacher costs the adapters alone. One that the model
      is found to train at a later call gets a storage of its own then, before the optimizer moves it. One that is
      frozen later goes on converging to the model's value.
    * *buffers*, such as the statistics of BatchNorm: the model's own. During a call the teacher works on copies of
      them, so that a forward that writes to a buffer does not write to the model's.
    * tensors that are neither (plain attributes): stay as they were when the copy was made.

    The module itself has no parameters, no buffers and no submodules: it can be assigned to an attribute of a larger
    module, and `parameters()` never hands the model or the teacher to an optimizer. `deepcopy` and pickle of it copy
    the model too, unless both are copied in one go.

    Args:
        model: The model in training, wrapped (`DistributedDataParallel`, `torch.compile`, PEFT) or not. Its parameters
            are paired by name, without the names of wrappers.
        beta: β in [0, 1), or a function of the 0-based index of the update, such as `paper_beta(total_steps)`.
            A run of a few hundred updates wants less than 0.99: `suggested_beta(total_steps)`.
        divergence: \(\ell_s\), a name or a function of (student, teacher) that returns a scalar.
        teacher: The teacher at the start, with the weights \(\tilde\theta_0\), as a module with the parameters of the
            model. Frozen and set to eval mode, otherwise used as it is. None: a copy of the model. Pass one where a
            copy cannot be made, as with FSDP2: build it before sharding, and shard it in the same way.
        output_to_logits: From what `forward` returned to the tensor, or the sequence of tensors, to compare. None: a
            tensor is itself, otherwise `.logits` or `["logits"]`.
        check_first_call: Run the teacher twice more in the first call, in train mode, and warn if the model answers
            otherwise in eval mode: the penalty would measure that.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: β is out of range, the divergence unknown, or the teacher does not fit the model.
        RuntimeError: The model cannot be copied.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> bregman = MomentumBregman(model, beta=0.5, divergence="mse")
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(2.0)  # stands for optimizer.step()
        >>> x = torch.ones(3, 1)
        >>> penalty = bregman(lambda m: m(x), model(x))
        >>> print(f"{penalty.item():.4f}")
        4.0000
        >>> bregman.update()
        >>> print(f"{bregman(lambda m: m(x), model(x)).item():.4f}")
        1.0000

    Reference:
        Jiang et al. 2020, SMART, doi 10.18653/v1/2020.acl-main.197, section 3.2 and Algorithm 1.
    """

    beta: float | Callable[[int], float]
    divergence: Divergence
    output_to_logits: OutputToLogits | None

    def __init__(
        self,
        model: nn.Module,
        *,
        beta: float | Callable[[int], float] = 0.99,
        divergence: str | Divergence = "symmetric_kl",
        teacher: nn.Module | None = None,
        output_to_logits: OutputToLogits | None = None,
        check_first_call: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, got {type(model).__name__}")
        if not callable(beta):
            checked_beta(beta)
        check_output_to_logits(output_to_logits)
        flag("check_first_call", check_first_call)
        # Past the registration of submodules: each of the three may be a module.
        self.__dict__.update(beta=beta, divergence=resolve_divergence(divergence), output_to_logits=output_to_logits)
        self.check_first_call, self._looked, self.updates = check_first_call, False, 0
        self._teacher = Teacher(model, teacher)

    @property
    def teacher(self) -> nn.Module:
        """The module with the averaged weights, to evaluate. It follows the model's device, dtype and buffers."""
        self._teacher.follow()
        return self._teacher.module

    @outside_graphs
    def forward(
        self,
        forward: Forward,
        outputs: Any,
        *,
        divergence: str | Divergence | None = None,
        output_mask: Masks = None,
    ) -> Tensor:
        """The penalty D_Breg, without μ.

        Args:
            forward: Runs the module given to it once and returns its output, as in `lambda m: m(**batch)`. It is called
                with the teacher, under `no_grad`.
            outputs: What the model returned for the same batch, with its graph.
            divergence: In place of the constructor's, for a task of its own.
            output_mask: (batch, sequence) for token outputs, 1 or True where the outputs are compared (see
                `token_mask`); one for each tensor to compare.

        Returns:
            A scalar. Gradients reach `outputs` alone.

        Raises:
            TypeError: `forward` cannot be called, or no tensor can be taken from the outputs.
            ValueError: The two outputs differ in shape, or the divergence returns no scalar.
            RuntimeError: `forward` never called the teacher, or ran trained modules of the model beside it, or the
                model's parameters have changed.
        """
        check_forward(forward)
        compare = self.divergence if divergence is None else resolve_divergence(divergence)
        student = compared_tensors(outputs, self.output_to_logits)
        self._teacher.follow(unshare=True)
        # The copy has the model's own hooks, and what they have kept of its pass is the user's.
        kept = HeldState(innermost(self._teacher.module)).replayed({})
        with (
            torch.no_grad(),
            self._teacher.lent() as module,
            noting_calls(module.modules()) as called,
            noting_calls(self._teacher.trained()) as strays,
            kept,
        ):
            teacher_outputs = forward(module)
        if not called:
            raise RuntimeError(
                "forward never called the teacher given to it, so that the penalty would be 0 for ever: call its "
                "argument, as in `lambda m: m(**batch)`, not the model"
            )
        if strays:
            raise RuntimeError(
                f"forward ran {self._teacher.name_of(strays[0])}, which is trained, in place of the teacher's own, so "
                f"that the penalty would compare the model with itself: run nothing of the model but the argument, and "
                f"let no forward replaced on an object, and no hook, hold modules of the model. Replace it on the "
                f"class, or pass teacher= made before"
            )
        teacher = compared_tensors(teacher_outputs, self.output_to_logits)
        check_shapes(student, teacher)
        if self.check_first_call:
            self._look_at_modes(forward, teacher, partial(divergence_of, compare, output_mask=output_mask))
        return divergence_of(compare, student, teacher, output_mask)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self) -> None: ...  # noqa: D102  # `forward` has the docstring

    def _look_at_modes(self, forward: Forward, answer: tuple[Tensor, ...], distance: Distance) -> None:
        """Once, and while model and teacher are still equal, so that any difference is one of train and eval mode."""
        looked, self._looked = self._looked, True
        if looked or self.updates or not self._teacher.equals_model():
            return
        inner = innermost(self._teacher.module)
        with torch.no_grad():
            with self._teacher.lent() as module, undone(inner), in_train_mode(inner):
                trained = [compared_tensors(forward(module), self.output_to_logits) for _ in range(2)]
            look_at_modes(answer, trained, distance)

    def update(self) -> None:
        """Moves the teacher by one step of the average; call it after `optimizer.step()`.

        After a step that a gradient scaler skipped, skip it too.

        Raises:
            TypeError, ValueError: The function `beta` returned no number in [0, 1).
            RuntimeError: The parameters of the model have changed, or it trains one that the teacher shares. The
                message names them; the teacher has not moved.
        """
        beta = checked_beta(self.beta(self.updates) if callable(self.beta) else self.beta)
        self._teacher.move(beta)
        self.updates += 1

    def copy_to(self, model: nn.Module) -> None:
        """Copies the averaged weights, and with them the shared ones and the persistent buffers, into `model`.

        Args:
            model: A module with the parameters of the model, wrapped or not; the model itself too.

        Raises:
            ValueError: Its parameters differ in name or shape; it is as it was.

        Examples:
            >>> import torch
            >>> model, best = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
            >>> MomentumBregman(model).copy_to(best)
            >>> torch.equal(best.weight, model.weight)
            True
        """
        self._teacher.copy_to(model)

    def extra_repr(self) -> str:
        """What printing shows."""
        return f"beta={self.beta}, divergence={name_of(self.divergence)}, updates={self.updates}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A flat mapping of tensors, which safetensors can hold: the counter, the averages, and which are shared.

        The tensors are copies: later updates leave a state alone, whose counter could not follow them.
        """
        destination[f"{prefix}updates"] = torch.tensor(self.updates)
        names = "\n".join(sorted(self._teacher.shared)).encode()
        destination[f"{prefix}shared_names"] = torch.tensor(list(names), dtype=torch.uint8)
        for name, average in self._teacher.averages().items():
            destination[f"{prefix}average.{name}"] = average.detach().clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mine = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        missing = [name for name in ("updates", "shared_names") if name not in mine]
        missing_keys.extend(prefix + name for name in missing)
        if missing:
            return
        updates = mine.pop("updates")
        shared = set(bytes(mine.pop("shared_names").tolist()).decode().split("\n")) - {""}
        averages = {key.removeprefix("average."): mine.pop(key) for key in list(mine) if key.startswith("average.")}
        unexpected_keys.extend(prefix + key for key in mine)
        wrong = misfit(self._teacher.pairs(), averages, shared) or unsound(updates, averages)
        if wrong:
            error_msgs.append(wrong)
            return
        self._teacher.restore(averages)
        self.updates = int(updates)
