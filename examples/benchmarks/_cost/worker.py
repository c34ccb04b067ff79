"""The process that one measurement lives in: it loads a case and then does as its standard input says.

    python worker.py '{"case": "variants", "variant": "plain", ...}'

Each line of input is a command: `peak` or `allocated` (memory of a call, in bytes), `seconds` (of a call) or `result`
(what a call returns). Each answer is a line of JSON.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import sys
from pathlib import Path


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    spec = json.loads(sys.argv[1])

    import torch

    from _cost.meter import Meter, allocated_peak_bytes

    torch.set_num_threads(spec["threads"])
    meter = Meter(spec["device"])
    case = importlib.import_module(f"_cost.cases.{spec['case']}")
    case.build({**spec, **case.WARM_UP})()  # kernels and libraries load before memory is counted
    gc.collect()
    call = case.build(spec)
    if "limit" in spec:
        _limit(spec["limit"], spec["device"])
    commands = {
        "peak": meter.peak_bytes,
        "allocated": allocated_peak_bytes,
        "seconds": meter.seconds,
        "result": lambda call: call(),
    }
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()](call)), file=answers)


def _limit(size: int, device: str) -> None:
    """No allocation may take this process above `size` bytes: of address space, or of GPU memory."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(device).total_memory)
    else:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # started by its path, so that it looks for the package beside itself
    main()
