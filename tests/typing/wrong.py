"""What both type checkers refuse: exactly the lines that say so. Never run: `.ci/check_types.py` has it checked."""

from torch import Tensor, nn

from smartreg import MomentumBregman, SmartLoss, smoothness_penalty


def train(model: nn.Module, ids: Tensor) -> None:
    smart = SmartLoss(model)
    bregman = MomentumBregman(model)
    smart(lambda m: m(ids), maks=ids)  # refused: a misspelt keyword
    smart(lambda m: m(ids), divergence=3)  # refused: no divergence
    smart(lambda m: m(ids), divergence=one_argument)  # refused: a divergence of one tensor
    smart(ids)  # refused: no function of a module
    bregman(lambda m: m(ids))  # refused: the outputs are missing
    bregman(lambda m: m(ids), ids, mask=ids)  # refused: no such keyword
    SmartLoss(model, epsilom=0.1)  # refused: a misspelt keyword
    SmartLoss(model, ascent="steep")  # refused: no such rule
    SmartLoss(model, divergence=3)  # refused: no divergence
    MomentumBregman(model, beta="0.99")  # refused: a string
    smoothness_penalty(lambda x: x, ids, start="random")  # refused: no such start


def one_argument(outputs: Tensor) -> Tensor:
    return outputs.mean()
