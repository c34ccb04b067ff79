"""Starting noise that depends on the example, not on the batch it happens to be in.

Drawn from the global random state, the noise of an example would depend on how many processes share the batch and on
who comes before it. Here each example has its own generator, seeded by (seed, step, task, row, sentence), so that one
process and eight draw the same, and a resumed run needs no state for it.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seed_of(*parts: object) -> int:
    """A 63-bit seed that is a function of its parts, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class SeededNoise:
    """ν for `SmartLoss(...)(..., noise=SeededNoise(...))`: called once for each look-up, in order.

    Args:
        std: σ.
        scale: "rms", where σ is a multiple of the root mean square of the example's unmasked embedding entries, or
            "absolute".
        masks: True for real tokens, one (batch, length) for each look-up.
        rows: what names the examples of the batch.
        key: what the seed depends on besides row and look-up: the run's seed, the step, the task.
    """

    def __init__(
        self, std: float, scale: str, masks: Sequence[Tensor], rows: Sequence[int], key: tuple[object, ...]
    ) -> None:
        self.std, self.scale, self.masks, self.rows, self.key = std, scale, masks, rows, key
        self.calls = 0

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Noise of the shape of the embeddings, (batch, length, dim); zero on padding."""
        lookup = self.calls % len(self.masks)
        self.calls += 1
        mask = self.masks[lookup]
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        noise = torch.zeros(embeddings.shape, dtype=dtype, device=embeddings.device)
        generator = torch.Generator(embeddings.device)
        for i, (row, length) in enumerate(zip(self.rows, mask.sum(1).tolist(), strict=True)):
            generator.manual_seed(seed_of(*self.key, row, lookup))
            # Drawn at the example's own length: the padding depends on the batch.
            noise[i, :length] = torch.randn(
                length, embeddings.shape[-1], generator=generator, device=embeddings.device, dtype=dtype
            )
        scale = self.std * (_rms(embeddings.detach().to(dtype), mask) if self.scale == "rms" else 1.0)
        return noise * scale


def _rms(embeddings: Tensor, mask: Tensor) -> Tensor:
    """Root mean square of each example's unmasked entries, (batch, 1, 1)."""
    squares = embeddings.square().mean(-1) * mask  # (batch, length)
    return (squares.sum(1) / mask.sum(1)).sqrt()[:, None, None]
