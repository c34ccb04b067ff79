"""Small models for the tests of the teacher, what stands for training them, and what the tests read of a teacher."""

import torch
from torch import Tensor, nn

from smartreg.bregman import MomentumBregman

X = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 3.0]])
TARGET = torch.tensor([0, 1])


class Net(nn.Module):
    """With dropout, batch statistics, and a method that is not forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.hidden(x)))


def mlp(dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(device, dtype)


def normed(seed: int = 0) -> nn.Sequential:
    """With batch statistics, so that there are buffers too."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def shift(model: nn.Module, seed: int = 0) -> None:
    """Stands for an optimizer step: moves what is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * step.to(parameter))


def train(model: nn.Module, bregman: MomentumBregman, steps: int) -> None:
    """Without state of its own, so that the weights and the teacher are all there is to resume."""
    for _ in range(steps):
        outputs = model(X.to(model[0].weight.dtype))
        penalty = bregman(lambda m: m(X.to(m[0].weight.dtype)), outputs)
        (nn.functional.cross_entropy(outputs, TARGET) + penalty).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.3 * parameter.grad)
                    parameter.grad = None
        bregman.update()


def averages(bregman: MomentumBregman) -> dict[str, Tensor]:
    state = bregman.state_dict()
    return {name.removeprefix("average."): value for name, value in state.items() if name.startswith("average.")}
