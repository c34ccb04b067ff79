"""`smoothness_penalty`: the regularizer as a function of embeddings, pixels or audio."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smartreg._ascent.adversary import Adversary, Query
from smartreg._ascent.looks import Looks
from smartreg._ascent.objective import Graph
from smartreg._ascent.settings import Ascent, Dropout, EpsilonScale, NormOver, SmartSettings, Start
from smartreg._ascent.start import Noise, check_generator, refuse_surroundings
from smartreg._masks import Masks, not_dense
from smartreg._model.replay import RandomState, worth_remembering
from smartreg._outputs import OutputToLogits, check_output_to_logits, compared_tensors
from smartreg._wrappers import code_of
from smartreg.divergences import Divergence, resolve_divergence
from smartreg.results import SmartOutput

# What each function has been looked at for; see `_looks_of`.
_looks: weakref.WeakKeyDictionary[object, Looks] = weakref.WeakKeyDictionary()


def smoothness_penalty(
    fn: Callable[[Tensor], Any],
    embeds: Tensor,
    *,
    reference: Any = None,
    mask: Tensor | None = None,
    noise: Noise = None,
    output_mask: Masks = None,
    example_ids: Tensor | None = None,
    divergence: str | Divergence = "symmetric_kl",
    epsilon: float = 0.15,
    step_size: float = 0.15,
    noise_std: float = 0.015,
    steps: int = 0,
    norm: str | float = "2",
    norm_over: NormOver = "example",
    epsilon_scale: EpsilonScale = "rms",
    ascent: Ascent = "projected",
    start: Start = "towards_uniform",
    dropout: Dropout = "shared",
    detach_reference: bool = False,
    output_to_logits: OutputToLogits | None = None,
    generator: torch.Generator | None = None,
    ascent_autocast: bool = True,
    check_first_call: bool = True,
) -> SmartOutput:
    r"""R_s of a function of embeddings, for those who hold the embeddings (or pixels, or audio) in their hands.

    \[ R_s = \frac1n \sum_i \max_{\|\tilde x_i - x_i\|_p \le \epsilon} \ell_s(f(\tilde x_i), f(x_i)) \]

    As in `SmartLoss`, sizes that the dtype in use cannot carry raise a `SmartWarning`, looked at once for each place in
    the code that `fn` comes from, device, dtype and autocast dtype (not where a `reference` is given). An autocast has
    to stand around the call to be seen: one that `fn` enters itself is neither judged nor switched off, and in float16
    it gets no loss scale.

    Args:
        fn: F, run several times; its only randomness is torch's on the CPU and the device of `embeds`. Buffers that it
            writes are not restored (`SmartLoss` restores those of its model).
        embeds: X, (batch, ..., feature), the first dimension being the example; may carry a graph.
        reference: What `fn(embeds)` returned, if the caller has run it; made under other dropout masks than the
            perturbed passes can have, so that it needs `dropout="independent"`. None: the clean pass runs here.
        mask: (batch, ...), 1 or True where `embeds` may be perturbed.
        noise: The start itself, a tensor of the shape of `embeds`, or a function from `embeds` to it; with
            `start="gradient"` u in place of it. None draws it.
        output_mask: 1 or True at the positions of the output that are compared.
        example_ids: (batch, ...), equal integers where one example is; as in `SmartLoss`.
        divergence: ℓ_s. This and all that follow are as in `SmartLoss`, with the same defaults.
        epsilon: ε.
        step_size: η.
        noise_std: σ.
        steps: Ascent steps.
        norm: p.
        norm_over: What one norm is taken over.
        epsilon_scale: The unit of ε, η and σ.
        ascent: The update.
        start: Where the ascent begins.
        dropout: Whether the passes share their masks.
        detach_reference: No gradient through the clean output.
        output_to_logits: From what `fn` returned to the tensors to compare.
        generator: Draws the noise.
        ascent_autocast: False runs the `steps` with autocast off.
        check_first_call: Run `fn(embeds)` once more in the first call, and warn if the output is another.

    Returns:
        `outputs`, the clean output, and `penalty`, a scalar.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind, shape or range.
        RuntimeError: `torch.inference_mode` is on (but for noise without steps), or the output does not depend on
            `embeds`.

    Examples:
        >>> import torch
        >>> from smartreg import smoothness_penalty
        >>> pixels = torch.eye(2).reshape(2, 1, 2)
        >>> outputs, penalty = smoothness_penalty(
        ...     lambda x: 2 * x.sum(dim=1), pixels, noise=torch.full((2, 1, 2), 0.01), divergence="mse",
        ...     epsilon=0.5, step_size=1.0, epsilon_scale="absolute", norm="inf", start="noise", steps=1,
        ... )
        >>> penalty  # every entry moves by 0.5, every output by 1
        tensor(1.)

    Reference:
        Jiang et al., SMART, ACL 2020, doi 10.18653/v1/2020.acl-main.197, Algorithm 1.
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function of the embeddings, got {type(fn).__name__}")
    if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
        raise TypeError(
            f"embeds must be a floating-point tensor, got {getattr(embeds, 'dtype', type(embeds).__name__)}"
        )
    if embeds.ndim < 2:
        raise ValueError(f"embeds must be (batch, ..., feature), got shape {tuple(embeds.shape)}")
    if reference is not None and dropout == "shared":
        raise ValueError(
            "a given reference was made under other dropout masks than the perturbed passes see: pass "
            'dropout="independent" (with no dropout in fn they are the same), or leave reference out'
        )
    if kind := not_dense(embeds):
        raise TypeError(
            f"embeds must be a dense tensor, got a {kind} one: pad it (or densify it), and pass mask= for what is "
            f"padding"
        )
    check_output_to_logits(output_to_logits)
    check_generator(generator)
    settings = SmartSettings.checked(
        epsilon=epsilon,
        step_size=step_size,
        noise_std=noise_std,
        steps=steps,
        norm=norm,
        norm_over=norm_over,
        epsilon_scale=epsilon_scale,
        ascent=ascent,
        start=start,
        dropout=dropout,
        detach_reference=detach_reference,
        ascent_autocast=ascent_autocast,
    )
    refuse_surroundings(settings)
    resolved = resolve_divergence(divergence)
    passes = _FunctionPasses(fn, embeds, output_to_logits, shared_dropout=dropout == "shared")
    outputs = passes.clean() if reference is None else reference
    clean = _FunctionClean(compared_tensors(outputs, output_to_logits), [embeds.detach()], passes.autocast_dtype)
    # With a given reference, rounding could not be told from the dropout masks that the reference was made under.
    looks = replace(_looks_of(fn))  # a copy to switch looks off in; what it remembers is shared
    if reference is not None:
        looks.precision = None
    if reference is not None or not check_first_call:
        looks.repeatable = None
    if noise is None:
        looks.outcome.look_ahead(settings, resolved)
    query = Query(resolved, mask, noise, output_mask, example_ids)
    _, penalty = Adversary(settings, generator, looks).penalty(passes, clean, query, passes.perturbed)
    return SmartOutput(outputs, penalty)


class _FunctionClean(NamedTuple):
    """The clean pass of a function, as the search sees it."""

    compared: tuple[Tensor, ...]
    embeddings: list[Tensor]
    autocast_dtype: torch.dtype | None
    graph: Graph | None = None  # nobody can tell whether it may be differentiated ahead of time


class _FunctionPasses:
    """The passes of one call through `fn`: the clean one, and those with a perturbation."""

    def __init__(
        self,
        fn: Callable[[Tensor], Any],
        embeds: Tensor,
        output_to_logits: OutputToLogits | None,
        *,
        shared_dropout: bool,
    ) -> None:
        self._fn, self._embeds, self._output_to_logits = fn, embeds, output_to_logits
        remember = worth_remembering([embeds])
        self._random = RandomState([embeds.device], shared=shared_dropout, remember_draws=remember)
        self.same_dropout = self._random.sharing
        device = embeds.device.type
        self.autocast_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def clean(self) -> Any:
        """What `fn` returns for the embeddings as they are."""
        with self._random.draws:
            outputs = self._fn(self._embeds)
        self._random.keep_clean()
        return outputs

    @contextlib.contextmanager
    def perturbed(
        self, perturbations: Sequence[Tensor], *, freeze: bool = False, autocast: bool = True
    ) -> Iterator[tuple[Tensor, ...]]:
        """A pass with perturbed embeddings; inside the block its graph may be differentiated.

        Args:
            perturbations: δ, in a sequence of one.
            freeze: The graph ends at the embeddings.
            autocast: False switches the user's autocast off.
        """
        base = self._embeds.detach() if freeze else self._embeds
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._random.replayed())
            if not autocast:
                stack.enter_context(torch.autocast(base.device.type, enabled=False))
            perturbed = (base + perturbations[0]).to(base.dtype)
            with self._random.draws:
                outputs = self._fn(perturbed)
            yield compared_tensors(outputs, self._output_to_logits)

    kind: object = "clean"  # of a pass; what has been looked at is kept by function

    def repeated(self, *, autocast: bool = True) -> tuple[Tensor, ...]:
        """The tensors to compare of one more clean pass, detached.

        Args:
            autocast: False switches the user's autocast off.
        """
        nothing = torch.zeros((), dtype=self._embeds.dtype, device=self._embeds.device)
        with self.perturbed([nothing], freeze=True, autocast=autocast) as compared:
            return tuple(tensor.detach() for tensor in compared)

    def reference_without_autocast(self) -> tuple[tuple[Tensor, ...], bool]:
        """The tensors to compare of a clean pass with autocast off, detached; one inside of `fn` is not seen."""
        return self.repeated(autocast=False), False

    def undone(self) -> contextlib.AbstractContextManager[None]:
        """Does nothing: what `fn` writes to is not known."""
        return contextlib.nullcontext()


def _looks_of(fn: Callable[[Tensor], Any]) -> Looks:
    """What has been looked at in the code that `fn` runs, where it is defined."""
    return _looks.setdefault(code_of(fn), Looks())
