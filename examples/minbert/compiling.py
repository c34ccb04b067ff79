"""`--compile`."""

from typing import cast

import torch
from torch import nn

VARIANTS = 64
"""Graphs that one function may be compiled into; past it, torch silently falls back to uncompiled code."""


def compiled(model: nn.Module) -> nn.Module:
    """The model under `torch.compile`, with room for all its variants.

    The tasks have different heads and one or two sentences, and the clean, the ascent and the perturbed pass differ in
    what needs a gradient: more variants than the default limit of 8.
    """
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # the name before torch 2.7
    setattr(config, name, max(getattr(config, name), VARIANTS))
    return cast(nn.Module, torch.compile(model, dynamic=True))
