r"""The geometry of one embedding look-up: its units, noise, projection, and what is steepest in it.

Pure functions of tensors. Shapes throughout: an embedding output is (batch, ..., feature), usually
(batch, sequence, feature); its first dimension is the example unless ids say otherwise. Everything is computed in
float32 at least (float64 for float64 embeddings), whatever the dtype of the embeddings.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from smartreg._ascent import extent
from smartreg._ascent.extent import Extent
from smartreg._ascent.settings import Norm, SmartSettings


@dataclass(frozen=True)
class Ball:
    r"""The ball around the embeddings of one look-up, \(\{\tilde x : \|\tilde x_i - x_i\|_p \le \epsilon_i\}\).

    Attributes:
        embeddings: The clean embeddings x, detached, (batch, ..., feature).
        mask: Bool, (batch, ..., 1); False where padding stands. None if every position is real.
        entry_scale: What one entry is measured in: the example's root mean square, or 1; the unit of `noise_std`.
        norm_scale: What a norm is measured in, the unit of `epsilon` and `step_size`: the same, for the 2-norm times
            the square root of the number of entries under it. Both broadcast to `embeddings`.
        example: What one example is.
        under_norm: What stands under one norm: an example, or a token.
        settings: The hyperparameters.
    """

    embeddings: Tensor
    mask: Tensor | None
    entry_scale: Tensor
    norm_scale: Tensor
    example: Extent
    under_norm: Extent
    settings: SmartSettings

    @classmethod
    def around(
        cls, embeddings: Tensor, mask: Tensor | None, settings: SmartSettings, example_ids: Tensor | None = None
    ) -> "Ball":
        """Measure the scale of a look-up.

        Args:
            embeddings: x, (batch, ..., feature).
            mask: Bool, (batch, ...), or None.
            settings: The hyperparameters.
            example_ids: Integers, (batch, ...), equal where one example is; None: the first dimension is the example.
        """
        visible = None if mask is None else mask.to(embeddings.device).unsqueeze(-1)  # (batch, ..., 1)
        if example_ids is None:
            example = extent.rows(embeddings.ndim)
        else:
            example = extent.examples(example_ids.to(embeddings.device), mask, embeddings.shape)
        under_norm = example if settings.norm_over == "example" else extent.tokens(embeddings.ndim)
        wide = embeddings.to(wide_dtype(embeddings.dtype))
        if settings.epsilon_scale == "absolute":
            entry_scale = norm_scale = wide.new_ones([1] * wide.ndim)
        else:
            entry_scale = norm_scale = root_mean_square(wide, visible, example)
            if settings.norm == "2":
                norm_scale = entry_scale * entries(wide, visible, under_norm).sqrt()
        return cls(embeddings, visible, entry_scale, norm_scale, example, under_norm, settings)

    @property
    def radius(self) -> Tensor:
        """ε in the unit of the embeddings, broadcastable to them."""
        return self.settings.epsilon * self.norm_scale

    @property
    def step_size(self) -> Tensor:
        """η likewise."""
        return self.settings.step_size * self.norm_scale

    def noise(self, generator: torch.Generator | None) -> Tensor:
        r"""Draw \(\nu \sim N(0, \sigma^2 I)\), zero at padding (Algorithm 1, line 6)."""
        dtype, device = self.entry_scale.dtype, self.embeddings.device
        if self.settings.noise_std == 0:
            return torch.zeros(self.embeddings.shape, dtype=dtype, device=device)
        source = device if generator is None else generator.device
        noise = torch.randn(self.embeddings.shape, generator=generator, dtype=dtype, device=source).to(device)
        return self.hide_padding(noise.mul_(self.settings.noise_std * self.entry_scale))

    def hide_padding(self, values: Tensor) -> Tensor:
        """Zero at padding, by selection, so that NaN and inf stay out."""
        return values if self.mask is None else torch.where(self.mask, values, values.new_zeros(()))

    def project(self, perturbation: Tensor) -> Tensor:
        r"""\(\Pi_\epsilon\) of the perturbation; the packages' rule (`"normalized"`) has none."""
        if self.settings.ascent == "normalized":
            return perturbation
        return project(perturbation, self.radius, self.settings.norm, self.under_norm)

    def steepest(self, gradient: Tensor) -> Tensor:
        r"""The s that maximises \(\langle g, s \rangle\) over \(\|s\|_p \le 1\): the sign for ∞, g / ‖g‖ for 2."""
        return gradient.sign() if self.settings.norm == "inf" else normalize(gradient, "2", self.under_norm)

    def usable(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Which examples have a gradient to follow: one that is finite, and not zero.

        Returns:
            Bools that broadcast to the gradient, and their opposite, one for each example, in which an example that is
            all padding is not marked: it has nothing to perturb.
        """
        largest = self.example.largest(self.hide_padding(gradient))  # NaN and inf come through
        usable = torch.isfinite(largest) & (largest > 0)
        return usable, self.example.one_each(~usable).flatten() & ~self.empty()

    def empty(self) -> Tensor:
        """Which examples are all padding, bools (examples,)."""
        everything = torch.ones_like(self.embeddings[..., :1], dtype=torch.bool) if self.mask is None else self.mask
        return ~self.example.one_each(self.example.any(everything)).flatten()

    def share_of_radius(self, perturbation: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of ‖δ‖ / ε over the norms of all examples, and how many of them there are."""
        size = vector_norm(perturbation, self.settings.norm, self.under_norm)
        real = self.radius.expand_as(size) > 0
        if self.mask is not None:
            real = real & self.under_norm.any(self.mask)
        share = torch.where(real, size / torch.where(real, self.radius, 1.0), 0.0)
        return self.under_norm.one_each(share).sum(), self.under_norm.one_each(real).sum()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32 for half precision, the dtype itself otherwise."""
    return torch.promote_types(dtype, torch.float32)


def root_mean_square(values: Tensor, mask: Tensor | None, example: Extent) -> Tensor:
    """Root mean square of each example's unmasked entries, broadcastable to them; 0 for an example without any."""
    if mask is not None:
        values = torch.where(mask, values, values.new_zeros(()))
    return (example.sum(values.square()) / entries(values, mask, example).clamp_min(1)).sqrt()


def entries(values: Tensor, mask: Tensor | None, extent: Extent) -> Tensor:
    """How many unmasked entries an extent has, broadcastable to `values`."""
    there = torch.ones_like(values[..., :1], dtype=torch.bool) if mask is None else mask
    return (extent.sum(there) * values.shape[-1]).to(values.dtype)


def vector_norm(values: Tensor, norm: Norm, over: Extent) -> Tensor:
    r"""\(\|v\|_p\), broadcastable to `values`; 0 where there is no entry at all."""
    return over.largest(values) if norm == "inf" or values.numel() == 0 else over.length(values)


def normalize(values: Tensor, norm: Norm, over: Extent) -> Tensor:
    r"""\(v / \|v\|_p\); zero stays zero.

    The largest entry is divided out first, so that squares of tiny or huge entries neither vanish nor overflow.
    """
    largest = over.largest(values)
    unit = values / torch.where(largest > 0, largest, 1.0)
    if norm == "inf":
        return unit
    length = vector_norm(unit, "2", over)
    return unit / torch.where(length > 0, length, 1.0)


def project(values: Tensor, radius: Tensor, norm: Norm, over: Extent) -> Tensor:
    r"""\(\Pi\): the nearest point (in Euclidean distance) of the p-norm ball of that radius."""
    if norm == "inf":
        return torch.minimum(torch.maximum(values, -radius), radius)
    length = vector_norm(values, "2", over)
    return torch.where(length > radius, values * (radius / length.clamp_min(torch.finfo(length.dtype).tiny)), values)
