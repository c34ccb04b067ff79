"""How much memory a run takes at most."""

import psutil
import torch


class Memory:
    """The peak: what CUDA allocated, or elsewhere the process's resident set, looked at after every step.

    (The operating system's own peak would count what came before the run, such as a test suite in the same process.)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.process = psutil.Process()
        self.peak = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def note(self) -> None:
        """Looks at the memory now."""
        if self.device.type == "cuda":
            now = torch.cuda.max_memory_allocated(self.device)
        else:
            now = self.process.memory_info().rss
        self.peak = max(self.peak, now)
