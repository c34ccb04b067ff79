"""`symmetric_kl` of large logits, a block of positions at a time, with its gradient written by hand.

Autograd keeps every intermediate result of the formula at the size of the logits. Here nothing larger than a few blocks
is allocated apart from the gradients themselves, and a block stays in the cache from its first operation to its last.

With q = softmax(b) and d = a - b, p_c = q_c exp(d_c) / sum_k q_k exp(d_k): one exponential of each kind is enough, and
d may be shifted by any constant. For u_c = d_c - E_q[d] and the excess r = E_q[exp(u)] - 1,

    KL(p || q) + KL(q || p) = E_p[u] - E_q[u] = E_q[u (exp(u) - 1)] / (1 + r),

a sum of terms that are not negative, and accurate however small d is. Blocks with infinite or very different logits
take the formulas of `formulas`, and so do devices other than the CPU, where the host would have to wait
for the device before it could look at the numbers of a block.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from smartreg._divergences.formulas import symmetric_kl, symmetric_kl_gradients

# The largest |u| whose exponentials keep clear of the ends of float32.
_MODERATE = 40.0


def blockwise_symmetric_kl(a: Tensor, b: Tensor, keep: Tensor | None) -> Tensor:
    """KL(p || q) + KL(q || p) of each position.

    Args:
        a: Logits (..., classes) of any floating dtype, half precision included; computed in float32 at least.
        b: The same shape; the dtype may differ.
        keep: Booleans (...); False makes the divergence and the gradients of a position 0, whatever stands there.

    Returns:
        Divergences (...), in float32 or float64.
    """
    # The gradients come cheapest with the values, when all that they need is in the cache. Half precision waits for the
    # backward pass: small gradients have to be multiplied by the scale of the loss before they are rounded.
    dtype = _compute_dtype(a, b)
    store_a, store_b = (torch.is_grad_enabled() and x.requires_grad and x.dtype == dtype for x in (a, b))
    values: Tensor
    values, _, _ = _BlockwiseSymmetricKL.apply(a, b, keep, store_a, store_b)  # type: ignore[no-untyped-call]  # torch: no types
    return values


class _BlockwiseSymmetricKL(torch.autograd.Function):
    """Returns values and, for its own backward pass only, the gradients of their sum."""

    @staticmethod
    def forward(
        a: Tensor, b: Tensor, keep: Tensor | None, store_a: bool, store_b: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return _run(a, b, keep, store_a, store_b, scale=None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        a, b, keep, _, _ = inputs
        _, *gradients = output
        ctx.set_materialize_grads(False)  # no zeros, as large as the logits, for the outputs that nobody sees
        ctx.mark_non_differentiable(*(gradient for gradient in gradients if gradient is not None))
        ctx.save_for_backward(a, b, keep)
        # Not saved tensors: the first backward pass takes them away and multiplies them in place.
        ctx.gradients = gradients

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        a, b, keep = ctx.saved_tensors
        need_a, need_b, *_ = ctx.needs_input_grad
        scale, *_ = grad_outputs
        if scale is None:
            return None, None, None, None, None
        if torch.is_grad_enabled():
            # Somebody will differentiate these gradients: operations that autograd can follow, at autograd's memory.
            return *_differentiable_gradients(a, b, keep, scale), None, None, None
        (grad_a, grad_b), ctx.gradients = ctx.gradients, (None, None)
        for gradient in (grad_a, grad_b):
            if gradient is not None:
                gradient.mul_(scale.unsqueeze(-1))
        need_a, need_b = need_a and grad_a is None, need_b and grad_b is None
        if need_a or need_b:  # half precision, or another backward pass through a retained graph
            _, late_a, late_b = _run(a, b, keep, need_a, need_b, scale)
            grad_a, grad_b = (late_a if need_a else grad_a), (late_b if need_b else grad_b)
        return grad_a, grad_b, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, tuple[int | None, ...]]:
        """A batch dimension is one more dimension of positions."""
        tensors: list[Tensor | None] = []
        for tensor, dim in zip(arguments[:3], in_dims[:3], strict=True):
            if tensor is None or dim is not None:
                tensors.append(None if tensor is None else tensor.movedim(dim, 0))
            else:
                tensors.append(tensor.expand(info.batch_size, *tensor.shape))
        output = _BlockwiseSymmetricKL.apply(*tensors, *arguments[3:])  # type: ignore[no-untyped-call]  # torch: no types
        return output, tuple(None if tensor is None else 0 for tensor in output)


def _run(
    a: Tensor, b: Tensor, keep: Tensor | None, need_a: bool, need_b: bool, scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Values (...) and the gradients (..., classes) that are needed of their sum, weighted by `scale` (...)."""
    positions, classes = a.shape[:-1], a.shape[-1]
    dtype = _compute_dtype(a, b)
    values = a.new_empty(positions.numel(), dtype=dtype)
    scale = values.new_ones(values.shape) if scale is None else scale.reshape(-1)
    drop = None if keep is None else ~keep.reshape(-1)
    grad_a = torch.empty_like(a, memory_format=torch.contiguous_format) if need_a else None
    grad_b = torch.empty_like(b, memory_format=torch.contiguous_format) if need_b else None
    targets = [gradient for gradient in (grad_a, grad_b) if gradient is not None]
    rows_in_block = max(1, _block_elements(a.device) // classes)
    buffers = values.new_empty((4, min(rows_in_block, len(values)), classes))
    for rows, (a_block, b_block, *outputs) in _blocks(rows_in_block, a, b, *targets):
        out_a, out_b = outputs[0] if need_a else None, outputs[-1] if need_b else None
        _block(a_block, b_block, scale[rows], values[rows], out_a, out_b, buffers[:, : len(a_block)])
        if drop is not None:
            for output in outputs:
                output.masked_fill_(drop[rows].unsqueeze(-1), 0.0)
    if drop is not None:
        values.masked_fill_(drop, 0.0)
    return values.view(positions), grad_a, grad_b


def _block(
    a: Tensor, b: Tensor, scale: Tensor, values: Tensor, out_a: Tensor | None, out_b: Tensor | None, buffers: Tensor
) -> None:
    """Fill `values` (rows,) and the outputs (rows, classes) that are given; `buffers` is (4, rows, classes)."""
    q, u, growth, work = buffers
    if a.dtype == b.dtype == u.dtype:
        torch.sub(a, b, out=u)
    else:
        u.copy_(a).sub_(b)  # `torch.sub` itself would round to half precision before it writes to `u`
    torch.softmax(b, -1, dtype=q.dtype, out=q)
    u.sub_(torch.mul(q, u, out=work).sum(-1, keepdim=True))
    if not _is_ordinary(u):
        _extraordinary_block(a.to(u.dtype), b.to(u.dtype), scale, values, out_a, out_b)
        return
    # The mean of u has gone but for its rounding error; what is left of it is corrected for.
    mean_q = torch.mul(q, u, out=work).sum(-1)
    torch.expm1(u, out=growth)
    excess = torch.mul(q, growth, out=work).sum(-1)
    total = (work.mul_(u).sum(-1) - excess * mean_q) / (1.0 + excess)
    values.copy_(total.clamp_(min=0.0))
    # Gradients, with p = q (1 + growth) / (1 + excess) and q / (1 + excess) drawn out of every term.
    q.mul_((scale / (1.0 + excess)).unsqueeze(-1))
    mean_q, mean_p, excess = mean_q.unsqueeze(-1), (total + mean_q).unsqueeze(-1), excess.unsqueeze(-1)
    if out_a is not None:  # p - q + p (u - E_p[u])
        torch.sub(u, mean_p - 1.0, out=work).mul_(growth).add_(u).sub_(mean_p + excess)
        torch.mul(work, q, out=out_a)
    if out_b is not None:  # q - p - q (u - E_q[u])
        u.sub_(mean_q).mul_(-1.0 - excess).sub_(growth).add_(excess)
        torch.mul(u, q, out=out_b)


def _is_ordinary(u: Tensor) -> bool:
    """Whether all are finite and moderate, so that nothing overflows. Asked on a CPU only."""
    return u.device.type == "cpu" and bool(u.amin() >= -_MODERATE) and bool(u.amax() <= _MODERATE)


def _extraordinary_block(
    a: Tensor, b: Tensor, scale: Tensor, values: Tensor, out_a: Tensor | None, out_b: Tensor | None
) -> None:
    values.copy_(symmetric_kl(a, b))
    if out_a is None and out_b is None:
        return
    for gradient, out in zip(symmetric_kl_gradients(a, b), (out_a, out_b), strict=True):
        if out is not None:
            torch.mul(gradient, scale.unsqueeze(-1), out=out)


def _differentiable_gradients(a: Tensor, b: Tensor, keep: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the values, weighted by `scale`, as functions of a, b and `scale`."""
    dtype = _compute_dtype(a, b)
    left, right = a.to(dtype), b.to(dtype)
    if keep is not None:
        left, right = (torch.where(keep.unsqueeze(-1), logits, 0.0) for logits in (left, right))
    grad_a, grad_b = symmetric_kl_gradients(left, right)
    return (grad_a * scale.unsqueeze(-1)).to(a.dtype), (grad_b * scale.unsqueeze(-1)).to(b.dtype)


def _compute_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def _block_elements(device: torch.device) -> int:
    """On a CPU a thread's share of the four buffers stays near its core; elsewhere launches have to be outlasted."""
    return min(2**18 * torch.get_num_threads(), 2**22) if device.type == "cpu" else 2**22


def _blocks(step: int, *tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Cut tensors of one shape (..., classes) into views (rows, classes), each with its range of flat positions.

    Logits shifted along the sequence, `logits[:, :-1]`, are no view of (positions, classes): they are cut along their
    leading dimensions first, as a copy would be as large as they are.
    """
    *leading, classes = tensors[0].shape
    try:
        matrices = [[tensor.view(-1, classes) for tensor in tensors]]
    except RuntimeError:
        indices = itertools.product(*map(range, leading[:-1]))
        matrices = [[tensor[index] for tensor in tensors] for index in indices]
    start = 0
    for matrix in matrices:
        for first in range(0, len(matrix[0]), step):
            block = [tensor[first : first + step] for tensor in matrix]
            yield slice(start, start + len(block[0])), block
            start += len(block[0])
