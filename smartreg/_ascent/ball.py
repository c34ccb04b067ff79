r"""The geometry of one embedding look-up: its units, noise, projection, and what is steepest in it.

Pure functions of tensors. Shapes throughout: an embedding output is (batch, ..., feature), usually
(batch, sequence, feature); its first dimension is the example, its last the feature. Everything is computed in float32
at least (float64 for float64 embeddings), whatever the dtype of the embeddings.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

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
        dims: The dimensions under one norm.
        settings: The hyperparameters.
    """

    embeddings: Tensor
    mask: Tensor | None
    entry_scale: Tensor
    norm_scale: Tensor
    dims: tuple[int, ...]
    settings: SmartSettings

    @classmethod
    def around(cls, embeddings: Tensor, mask: Tensor | None, settings: SmartSettings) -> "Ball":
        """Measure the scale of a look-up; `mask` is bool, (batch, ...), or None."""
        visible = None if mask is None else mask.to(embeddings.device).unsqueeze(-1)  # (batch, ..., 1)
        dims = tuple(range(1, embeddings.ndim)) if settings.norm_over == "example" else (embeddings.ndim - 1,)
        wide = embeddings.to(wide_dtype(embeddings.dtype))
        if settings.epsilon_scale == "absolute":
            entry_scale = norm_scale = wide.new_ones([1] * wide.ndim)
        else:
            entry_scale = norm_scale = root_mean_square(wide, visible)
            if settings.norm == "2":
                norm_scale = entry_scale * entries_under_norm(wide, visible, dims).sqrt()
        return cls(embeddings, visible, entry_scale, norm_scale, dims, settings)

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
        return project(perturbation, self.settings.epsilon * self.norm_scale, self.settings.norm, self.dims)

    def steepest(self, gradient: Tensor) -> Tensor:
        r"""The s that maximises \(\langle g, s \rangle\) over \(\|s\|_p \le 1\): the sign for ∞, g / ‖g‖ for 2."""
        return gradient.sign() if self.settings.norm == "inf" else normalize(gradient, "2", self.dims)

    def usable(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Which examples have a gradient to follow: one that is finite, and not zero.

        Returns:
            Bools (batch, 1, ..., 1), and their opposite (batch,), in which an example that is all padding is not
            marked: it has nothing to perturb.
        """
        gradient = self.hide_padding(gradient)
        largest = vector_norm(gradient, "inf", tuple(range(1, gradient.ndim)))  # NaN and inf come through
        usable = torch.isfinite(largest) & (largest > 0)  # (batch, 1, ..., 1)
        unusable = ~usable.flatten()
        return usable, unusable if self.mask is None else unusable & self.mask.flatten(1).any(dim=1)

    def share_of_radius(self, perturbation: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of ‖δ‖ / ε over the norms of all examples, and how many of them there are."""
        radius = self.settings.epsilon * self.norm_scale
        size = vector_norm(perturbation, self.settings.norm, self.dims)
        real = radius.expand_as(size) > 0
        if self.mask is not None:
            real = real & self.mask.any(self.dims, keepdim=True)
        return torch.where(real, size / torch.where(real, radius, 1.0), 0.0).sum(), real.sum()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32 for half precision, the dtype itself otherwise."""
    return torch.promote_types(dtype, torch.float32)


def root_mean_square(values: Tensor, mask: Tensor | None) -> Tensor:
    """Root mean square of each example's unmasked entries, (batch, 1, ..., 1); 0 for an example without any."""
    dims = tuple(range(1, values.ndim))
    if mask is not None:
        values = torch.where(mask, values, values.new_zeros(()))
    count = entries_under_norm(values, mask, dims)
    return (values.square().sum(dims, keepdim=True) / count.clamp_min(1)).sqrt()


def entries_under_norm(values: Tensor, mask: Tensor | None, dims: tuple[int, ...]) -> Tensor:
    """How many unmasked entries stand under one norm, broadcastable to `values`."""
    if mask is None:
        return values.new_ones([1] * values.ndim) * torch.Size(values.shape[d] for d in dims).numel()
    return (mask.sum(dims, keepdim=True) * values.shape[-1]).to(values.dtype)


def vector_norm(values: Tensor, norm: Norm, dims: tuple[int, ...]) -> Tensor:
    r"""\(\|v\|_p\) over `dims`, which are kept with size 1; 0 where there is no entry at all."""
    if values.numel() == 0:
        return values.new_zeros([1 if d in dims else n for d, n in enumerate(values.shape)])
    if norm == "inf":
        return values.abs().amax(dims, keepdim=True)
    length: Tensor = torch.linalg.vector_norm(values, 2, dims, keepdim=True)
    return length


def normalize(values: Tensor, norm: Norm, dims: tuple[int, ...]) -> Tensor:
    r"""\(v / \|v\|_p\); zero stays zero.

    The largest entry is divided out first, so that squares of tiny or huge entries neither vanish nor overflow.
    """
    largest = vector_norm(values, "inf", dims)
    unit = values / torch.where(largest > 0, largest, 1.0)
    if norm == "inf":
        return unit
    length = vector_norm(unit, "2", dims)
    return unit / torch.where(length > 0, length, 1.0)


def project(values: Tensor, radius: Tensor, norm: Norm, dims: tuple[int, ...]) -> Tensor:
    r"""\(\Pi\): the nearest point (in Euclidean distance) of the p-norm ball of that radius."""
    if norm == "inf":
        return torch.minimum(torch.maximum(values, -radius), radius)
    length = vector_norm(values, "2", dims)
    return torch.where(length > radius, values * (radius / length.clamp_min(torch.finfo(length.dtype).tiny)), values)
