"""Where the time of one step goes, by kind of operation, from the profiler's self times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch.profiler import ProfilerActivity, profile

from . import variants

WARM_UP = variants.WARM_UP
KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "_flash_attention", "_efficient_attention"),
    "dropout": ("native_dropout", "native_dropout_backward", "bernoulli_", "dropout"),
    "GELU": ("gelu", "gelu_backward"),
    "softmax": ("_softmax", "_softmax_backward_data", "_safe_softmax", "_log_softmax"),
    "layer norm": ("native_layer_norm", "native_layer_norm_backward"),
    "embedding": ("embedding", "embedding_dense_backward", "index_select"),
    "copies and fills": ("copy_", "fill_", "zero_", "clone", "cat"),
    "sums and elementwise": ("add", "add_", "mul", "mul_", "div", "div_", "sum", "sub", "where", "masked_fill_"),
}


def build(spec: Mapping[str, Any]) -> Callable[[], dict[str, float]]:
    """A call that returns seconds by kind of operation: `other` is in no kind, `look-up` is part of embedding."""
    step = variants.build(spec)
    cuda = str(spec["device"]).startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    kind_of = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}

    def measure() -> dict[str, float]:
        step()
        with profile(activities=activities) as profiler:
            step()
        seconds: dict[str, float] = defaultdict(float, dict.fromkeys(KINDS, 0.0))
        for event in profiler.key_averages():
            own = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
            seconds[kind_of.get(event.key, "other")] += own
            if event.key in ("aten::embedding", "aten::index_select"):
                seconds["look-up"] += own
        return dict(seconds)

    return measure
