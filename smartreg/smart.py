"""`SmartLoss`: the smoothness-inducing adversarial regularizer around any model."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from smartreg._ascent.adversary import Adversary, Query
from smartreg._ascent.looks import Looks
from smartreg._ascent.search import Found
from smartreg._ascent.settings import Ascent, Dropout, EpsilonScale, NormOver, SmartSettings, Start
from smartreg._ascent.start import Noise, check_generator, refuse_surroundings
from smartreg._checks import check_forward, flag
from smartreg._masks import Masks
from smartreg._model.embedding import EmbeddingTap, input_embeddings
from smartreg._model.passes import CleanPass, ModelPasses
from smartreg._model.replay import worth_remembering
from smartreg._model.stored_gradients import StoredGradients, graph_mark
from smartreg._outputs import Forward, OutputToLogits, check_output_to_logits, divergence_of
from smartreg._typing import typed_as
from smartreg._wrappers import outside_graphs, unwrapped
from smartreg.divergences import Divergence, name_of, resolve_divergence
from smartreg.results import SmartOutput, SmartStats


class SmartLoss(nn.Module):
    r"""Smoothness-inducing adversarial regularization of a model (SMART).

    \[ R_s(\theta) = \frac1n \sum_i \max_{\|\delta_i\|_p \le \epsilon}
       \ell_s(f(x_i + \delta_i; \theta), f(x_i; \theta)) \]

    where \(x_i\) is the output of the model's input embedding for example i and \(\ell_s\) the divergence. The maximum
    is sought from a start \(\delta_i\) by `steps` steps

    \[ \delta_i \leftarrow \Pi_{\epsilon}\big(\delta_i + \eta \, s_i\big), \qquad s_i = g_i / \|g_i\|_p, \qquad
       g_i = \nabla_{\delta_i} \, \ell_s(f(x_i + \delta_i; \theta), f(x_i; \theta)). \]

    Gradients reach θ through both outputs (and through x, whose perturbation is a constant), so that
    `(loss + lambda_s * penalty).backward()` is all that a training loop adds. The model is not registered here, and a
    call leaves nothing changed but the graph: gradients, flags, train or eval mode, buffers, attributes and random
    state are as after one clean pass plus the draw of the start. With dropout the passes share their masks, so a zero
    perturbation has a penalty of exactly 0.

    Args:
        model: Any module, also wrapped in `DistributedDataParallel`, `torch.compile` or PEFT.
        embedding: The module whose output is perturbed, or its dotted name; each look-up is perturbed by itself. None:
            `model.get_input_embeddings()` and every embedding module with the same weight.
        divergence: ℓ_s, called as (perturbed, clean): a name, or a function of two tensors that returns a scalar.
        epsilon: ε ≥ 0, radius of the ball. 0 means no perturbation, and no ascent.
        step_size: η ≥ 0, of each of the `steps`: with the default of none it is not used.
        noise_std: σ ≥ 0, of the noise that `start="noise"` draws: with the other starts it is not used.
        steps: Ascent steps; 0 takes the start, in the ball, as perturbation (with noise: random smoothing).
        norm: p, `"inf"` or `"2"`, for normalisation and projection.
        norm_over: `"example"`, one norm for a whole sentence, or `"token"`.
        epsilon_scale: `"rms"`: `epsilon`, `step_size` and `noise_std` are multiples of the root mean square of that
            example's unmasked embedding entries (for ε and η with norm 2, times the square root of the number of
            entries under the norm). `"absolute"`: they are what they say.
        ascent: `"projected"`, Algorithm 1, as above; `"steepest"`: s_i the sign of g_i for norm inf (for norm 2 the
            same); `"normalized"`, what MT-DNN and smart-pytorch do: δ ← (δ + η g) / (‖δ + η g‖_p + ε).
        start: `"noise"`, Algorithm 1: N(0, σ² I). The other two begin on the sphere of radius ε, in the direction that
            raises ⟨u, f(x)⟩ most, for one backward through the clean pass: `"gradient"` draws u, with the curvature of
            ℓ_s at equality as covariance; `"towards_uniform"` takes the uniform less the clean prediction for u and
            draws nothing (values have no uniform prediction: as `"gradient"`).
        dropout: `"shared"`: the perturbed passes see the dropout masks of the clean one; `"independent"`: fresh masks.
        detach_reference: No gradient through the clean output.
        memory_efficient: The same values and gradients at the activation memory of one pass, for one more clean pass.
        output_to_logits: From what `forward` returned to the tensor (or sequence of tensors, whose divergences are
            summed) to compare. None: a tensor is itself; else `.logits` or `["logits"]`.
        generator: Draws the start, and nothing else. None: torch's own, on the device of the embeddings.
        ascent_autocast: False runs the `steps` with the user's autocast off: half precision would drown a small ε.
        check_first_call: In the first call of each `forward` and mode run the clean pass once more, and warn if its
            output differs: `forward` is not repeatable then.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind or out of range; no embedding can be found.
        RuntimeError: `torch.compile(DistributedDataParallel(model))`.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from smartreg import SmartLoss
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Dropout(0.1), nn.Linear(12, 2))
        >>> smart = SmartLoss(model, embedding="0")
        >>> ids, labels = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([0, 1])
        >>> logits, penalty = smart(lambda m: m(ids))
        >>> loss = nn.functional.cross_entropy(logits, labels) + 0.03 * penalty
        >>> loss.backward()
        >>> round(smart.stats.radius_used, 3)
        1.0

    Reference:
        Jiang et al., SMART, ACL 2020, doi 10.18653/v1/2020.acl-main.197, Algorithm 1.
    """

    divergence: Divergence
    output_to_logits: OutputToLogits | None
    stats: SmartStats | None
    """Numbers of the last call; None before the first."""

    def __init__(
        self,
        model: nn.Module,
        *,
        embedding: nn.Module | str | None = None,
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
        memory_efficient: bool = False,
        output_to_logits: OutputToLogits | None = None,
        generator: torch.Generator | None = None,
        ascent_autocast: bool = True,
        check_first_call: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        flag("memory_efficient", memory_efficient)
        flag("check_first_call", check_first_call)
        check_generator(generator)
        check_output_to_logits(output_to_logits)
        self.settings = SmartSettings.checked(
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
        # Past the registration of submodules: either may be a module, and its weights are not ours.
        self.__dict__.update(divergence=resolve_divergence(divergence), output_to_logits=output_to_logits)
        self.memory_efficient, self.check_first_call = memory_efficient, check_first_call
        self.generator, self.stats = generator, None
        self._unregistered = (model,)  # in a tuple, so that its parameters are not ours
        self._embedding, self._remember_draws = embedding, True  # the second as the size of the last batch has it
        self._looks = Looks.of(check_first_call=check_first_call)
        self._tap: EmbeddingTap | None = EmbeddingTap(input_embeddings(unwrapped(model), embedding))
        self._looks.outcome.look_ahead(self.settings, self.divergence)

    @classmethod
    def paper(cls, model: nn.Module, **options: Any) -> Self:
        """Algorithm 1 with the values that the paper publishes: ε = 1e-5, η = 1e-3, σ = 1e-5, absolute, one step.

        They make a penalty of 8.7e-6 in a fitted MiniLM, of 1.2e-9 with a new head: see the page on numerics first.

        Args:
            model: As in the constructor.
            **options: Any other argument of the constructor; those given here win.
        """
        sizes = {"epsilon": 1e-5, "step_size": 1e-3, "noise_std": 1e-5, "epsilon_scale": "absolute", "norm": "inf"}
        return cls(model, **{**sizes, "steps": 1, "start": "noise", "ascent": "projected", **options})

    @property
    def model(self) -> nn.Module:
        """The model as it was given."""
        return self._unregistered[0]

    def remove(self) -> None:
        """Take this object's share of the hook off the embedding; it cannot be called afterwards."""
        self._attached().remove()

    @outside_graphs
    def forward(
        self,
        forward: Forward,
        *,
        mask: Masks = None,
        divergence: str | Divergence | None = None,
        noise: Noise = None,
        output_mask: Masks = None,
        example_ids: Masks = None,
    ) -> SmartOutput:
        """Run the model cleanly, search the perturbation, and compare.

        Args:
            forward: Runs the module given to it once and returns its output, as in `lambda m: m(**batch)`. It is called
                several times: arguments must stay as they are; the random state of torch, Python and numpy is replayed,
                and what `model` holds, generators too. A module outside of `model`, such as a head with BatchNorm,
                counts every pass: make it part of `model`.
            mask: (batch, sequence), 1 or True for real tokens; padding is never perturbed. One a look-up, in order.
            example_ids: Integers like `mask`, equal inside an example, for (length, batch) or packed rows. None: a row.
            divergence: Overrides the constructor's, for multitask training.
            noise: The start, a tensor of the shape of the embeddings (one for each look-up), or a function from these
                to it; with `start="gradient"` u, likewise for each tensor to compare. None draws it.
            output_mask: (batch, sequence) for token outputs, 1 or True where they are compared (see `token_mask`); one
                for each tensor to compare.

        Returns:
            `outputs`, what `forward` returned in the clean pass, and `penalty`.

        Raises:
            ValueError, TypeError: A mask, `noise` or the output of `forward` does not fit.
            RuntimeError: The perturbation cannot reach the model, or the mode cannot apply; it says what to do.
        """
        check_forward(forward)
        tap = self._attached()
        if tap.removed:
            raise RuntimeError("this SmartLoss was removed from its model: make a new one")
        refuse_surroundings(self.settings)
        resolved = self.divergence if divergence is None else resolve_divergence(divergence)
        if noise is None:
            self._looks.outcome.look_ahead(self.settings, resolved)
        shared = self.settings.dropout == "shared"
        passes = ModelPasses(
            self.model, tap, forward, self.output_to_logits, shared_dropout=shared, remember_draws=self._remember_draws
        )
        query = Query(resolved, mask, noise, output_mask, example_ids)
        adversary = Adversary(self.settings, self.generator, self._looks)
        run = self._efficient if self.memory_efficient and torch.is_grad_enabled() else self._standard
        with passes:
            return run(passes, adversary, query)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self) -> None: ...  # noqa: D102  # `forward` has the docstring

    def extra_repr(self) -> str:
        """What printing shows."""
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self.settings).items())
        return (
            f"{type(unwrapped(self.model)).__name__}, divergence={name_of(self.divergence)}, {settings}, "
            f"memory_efficient={self.memory_efficient}"
        )

    def _standard(self, passes: ModelPasses, adversary: Adversary, query: Query) -> SmartOutput:
        """Clean graph and perturbed graph live side by side until the user's backward."""
        # The table's dense gradient is made once where both graphs start from one look-up. With a detached reference
        # the graphs have nothing in common, and each may have a backward of its own.
        share_lookups = self.settings.dropout == "shared" and not self.settings.detach_reference
        clean = passes.clean(share_lookups=share_lookups, differentiable=adversary.pulls_back)
        run = partial(passes.perturbed, bases=clean.shared_lookups)
        found, penalty = adversary.penalty(passes, clean, query, run)
        self._record(found, penalty.detach(), clean)
        return SmartOutput(clean.outputs, penalty)

    def _efficient(self, passes: ModelPasses, adversary: Adversary, query: Query) -> SmartOutput:
        """One graph at a time: the perturbed pass is differentiated before the clean graph is built."""
        detached = self.settings.detach_reference
        first = passes.reference(differentiable=adversary.pulls_back)
        begin = adversary.begin(passes, first, query)
        first = first.as_leaves()  # its graph, if it had one, has served
        found = adversary.search(passes, first, begin)
        reference = tuple(tensor.detach() for tensor in first.compared) if detached else first.compared
        mark = graph_mark()
        # With a detached reference the penalty stays apart from the clean graph, as in the standard mode.
        leaves = None if detached else passes.embeddings_as_leaves()
        with passes.perturbed(found.perturbations, bases=leaves, inner=True) as perturbed:
            value = divergence_of(query.divergence, perturbed, reference, query.output_mask)
            scale = self._looks.loss_scale.get(value.device, *begin.objective.dtypes, *(p.dtype for p in perturbed))
            stored = StoredGradients.of(value, (*reference, *(leaves or ())), mark, scale)
        self._looks.loss_scale.update(scale, stored.all())
        self._looks.outcome.look(first.compared, found, stored.value, query.output_mask, first.autocast_dtype)
        self._record(found, stored.value, first)
        share_lookups = leaves is not None
        del perturbed, value, begin, found, leaves, reference, first  # nothing of the freed graph need outlive it
        clean = passes.clean_again(share_lookups=share_lookups)
        return SmartOutput(clean.outputs, stored.attach((*clean.compared, *(clean.shared_lookups or ()))))

    def _record(self, found: Found, penalty: Tensor, clean: CleanPass) -> None:
        self._remember_draws = worth_remembering(clean.embeddings)
        start = penalty if found.start_divergence is None else found.start_divergence
        self.stats = SmartStats(penalty, start, found.largest(), found.bad_examples, found.radius_used)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The state of the generator, if there is one: without it a resumed run would draw other noise."""
        if self.generator is not None:
            destination[f"{prefix}generator"] = self.generator.get_state()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        _metadata, _strict, missing, unexpected, _errors = more
        if self.generator is None:
            unexpected.extend(key for key in state_dict if key == f"{prefix}generator")
        elif f"{prefix}generator" in state_dict:
            self.generator.set_state(state_dict[f"{prefix}generator"].cpu())
        else:
            missing.append(f"{prefix}generator")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_tap", "_looks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it without types
        self._looks = Looks.of(check_first_call=self.check_first_call)
        self._tap = None

    def _attached(self) -> EmbeddingTap:
        """The hooks; those of a copy are made when it is used, since its model may hold it and be incomplete before."""
        if self._tap is None:
            self._tap = EmbeddingTap(input_embeddings(unwrapped(self.model), self._embedding))
        return self._tap
