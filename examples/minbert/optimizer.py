"""What moves the weights: AdamW, with a learning rate for the encoder and one for the heads, and their schedules."""

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from smartreg import SlantedTriangularLR

from .model import MultitaskModel
from .settings import Settings


def make_optimizer(model: MultitaskModel, settings: Settings) -> AdamW:
    """PyTorch's AdamW over the trainable parameters; biases and LayerNorms are not decayed."""
    groups = []
    for module, lr in ((model.encoder, settings.lr), (model.heads, settings.head_lr)):
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for parameter in module.parameters():
            if parameter.requires_grad:
                (decayed if parameter.ndim > 1 else plain).append(parameter)
        groups += [
            {"params": decayed, "lr": lr, "weight_decay": settings.weight_decay},
            {"params": plain, "lr": lr, "weight_decay": 0.0},
        ]
    # One fused kernel reads and writes each weight once; on a CPU that is ten times faster than the loop over tensors.
    return AdamW([group for group in groups if group["params"]], fused=True)


def make_schedule(name: str, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """The scheduler of a run, to be stepped after every optimizer step."""
    if name == "report":
        return SlantedTriangularLR(optimizer, total_steps, cut_frac=0.25, ratio=3.0, peak_factor=3.0)
    if name == "howard-ruder":
        return SlantedTriangularLR(optimizer, total_steps, cut_frac=0.1, ratio=32.0)
    return LambdaLR(optimizer, equation3 if name == "equation3" else constant)


def equation3(step: int) -> float:
    """The report's equation (3), by the letter.

    factor(t) = 1 + t/100 before t = 200, then max(0, 7/2 − t/300)

    It jumps from 3 to 2.83 at step 200 and reaches 0 at step 1,050 however long the training is; from there on the
    equation itself is negative, which would undo what was learnt, so it is floored. That is why it is not the default.

    Example:
        >>> equation3(0), round(equation3(199), 2), round(equation3(200), 2), equation3(750), equation3(2000)
        (1.0, 2.99, 2.83, 1.0, 0.0)
    """
    return 1 + step / 100 if step < 200 else max(0.0, 3.5 - step / 300)


def constant(step: int) -> float:
    """1, whatever the step."""
    return 1.0


def schedule_note(name: str, total_steps: int) -> str | None:
    """What to know about a schedule in a run of this length, if anything.

    Example:
        >>> schedule_note("equation3", 1500)
        'the learning rate is 0 from step 1050 of 1500 on, where equation (3) of the report turns negative'
        >>> schedule_note("equation3", 800) is None
        True
    """
    end = 1050
    if name != "equation3" or total_steps <= end:
        return None
    return (
        f"the learning rate is 0 from step {end} of {total_steps} on, where equation (3) of the report turns negative"
    )
