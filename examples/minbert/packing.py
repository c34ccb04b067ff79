"""Nested state dicts ↔ tensors for a safetensors file and plain values for a JSON file; no pickle.

`Optimizer.state_dict()` and its like nest tensors in dicts with integer keys and in tuples, neither of which JSON has.
"""

from typing import Any

from torch import Tensor


def pack(value: Any, tensors: dict[str, Tensor], path: str = "root") -> Any:
    """The JSON form of a nested value; its tensors are put into `tensors` under their path.

    Floats survive exactly: JSON text carries Python's shortest exact form of each.

    Example:
        >>> import torch
        >>> tensors = {}
        >>> plain = pack({0: (1.5, torch.ones(2))}, tensors)
        >>> unpack(plain, tensors)
        {0: (1.5, tensor([1., 1.]))}
    """
    if isinstance(value, Tensor):
        # A copy on the CPU: safetensors refuses tensors that share memory.
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {"kind": "tensor", "value": path}
    if isinstance(value, dict):
        items = [[pack(k, tensors, path), pack(v, tensors, f"{path}.{k}")] for k, v in value.items()]
        return {"kind": "dict", "value": items}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {"kind": kind, "value": [pack(v, tensors, f"{path}.{i}") for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: cannot be saved without pickle: {type(value).__name__}")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if not isinstance(value, dict):
        return value
    kind, content = value["kind"], value["value"]
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {unpack(k, tensors): unpack(v, tensors) for k, v in content}
    items = [unpack(v, tensors) for v in content]
    return items if kind == "list" else tuple(items)
