"""Find the model behind its wrappers, and the input embedding inside it."""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from smartreg.pairing import innermost

_COMPILED = torch._dynamo.OptimizedModule


def without_ddp(model: nn.Module) -> nn.Module:
    """What the passes after the clean one run through: the model without `DistributedDataParallel`, still compiled.

    Raises:
        RuntimeError: the order of the wrappers is one under which gradients or random masks would be silently wrong.
    """
    if isinstance(model, DataParallel):
        raise RuntimeError(
            "SmartLoss needs one module a process, got torch.nn.DataParallel, whose replicas live for one forward; "
            "use DistributedDataParallel"
        )
    if isinstance(model, _COMPILED) and isinstance(model._orig_mod, DistributedDataParallel):
        raise RuntimeError(
            "SmartLoss cannot take DistributedDataParallel off inside torch.compile: got "
            "torch.compile(DistributedDataParallel(model)), expected DistributedDataParallel(torch.compile(model))"
        )
    return model.module if isinstance(model, DistributedDataParallel) else model


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module: no `DistributedDataParallel`, no `torch.compile`."""
    return innermost(without_ddp(model))


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of the model runs through `torch.compile`."""
    return any(isinstance(m, _COMPILED) or m._compiled_call_impl is not None for m in model.modules())


def input_embeddings(model: nn.Module, embedding: nn.Module | str | None) -> tuple[nn.Module, ...]:
    """The modules whose outputs are perturbed.

    Args:
        model: the unwrapped model.
        embedding: a submodule, its dotted name, or None for `model.get_input_embeddings()` and every embedding module
            that holds the same weight: T5 and BART return one that is never called.

    Raises:
        TypeError: `embedding` is none of these.
        ValueError: there is no such submodule, or the model does not tell its input embedding.
    """
    if isinstance(embedding, str):
        try:
            return (model.get_submodule(embedding),)
        except AttributeError:
            raise ValueError(
                f"embedding must name a submodule of {type(model).__name__}, got {embedding!r}; {_candidates(model)}"
            ) from None
    if isinstance(embedding, nn.Module):
        if not any(module is embedding for module in model.modules()):
            raise ValueError(
                f"embedding must be a submodule of {type(model).__name__}, got a {type(embedding).__name__} that is "
                f"not in it; {_candidates(model)}"
            )
        return (embedding,)
    if embedding is not None:
        raise TypeError(f"embedding must be a module, a dotted name or None, got {type(embedding).__name__}")
    told = _told(model)
    if told is None:
        raise ValueError(
            f"{type(model).__name__} does not tell its input embedding: pass embedding=, the module (or its dotted "
            f"name) whose output is perturbed; {_candidates(model)}"
        )
    return _sharing_weight(model, told)


def _told(model: nn.Module) -> nn.Module | None:
    try:
        told = model.get_input_embeddings()  # type: ignore[operator]  # a method of the user's class, looked up by name
    except (AttributeError, NotImplementedError):
        return None
    return told if isinstance(told, nn.Module) else None


def _sharing_weight(model: nn.Module, told: nn.Module) -> tuple[nn.Module, ...]:
    """The embedding modules with the weight of `told`; a tied output projection is none."""
    weight = getattr(told, "weight", None)
    sharing = [
        module
        for module in model.modules()
        if module is told
        or (isinstance(weight, Tensor) and isinstance(module, nn.Embedding) and module.weight is weight)
    ]
    if all(module is not told for module in sharing):
        sharing.append(told)
    # A LoRA embedding holds the original one: perturb the outer look-up, not both.
    inner = {id(child) for module in sharing for child in module.modules() if child is not module}
    return tuple(module for module in sharing if id(module) not in inner)


def _candidates(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return f"its nn.Embedding modules are: {', '.join(names)}" if names else "it has no nn.Embedding module"
