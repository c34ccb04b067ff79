"""What every rank of `test_accelerate.py` trains by the recipe of the documentation.

Run on its own with `accelerate launch --multi_gpu --num_processes 2 tests/accelerate_tools.py FOLDER`: the
processes find no GPU to use, and talk through gloo.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import accelerate
import recipes
import torch
import torch.distributed as dist
from trainer_tools import CASES, RATE, ROWS, SEARCH, Rows, averages, batch_of, row_noise, weights

from smartreg import MomentumBregman, SmartLoss

STEPS = 3


class FromTheRow(SmartLoss):
    """The search starts where the row alone says."""

    def forward(self, *args: Any, **options: Any) -> Any:
        return super().forward(*args, noise=row_noise, **options)


class Resuming(accelerate.Accelerator):
    """Loads where a script would: when everything is prepared and registered."""

    folder: Path

    def register_for_checkpointing(self, *objects: Any) -> None:
        super().register_for_checkpointing(*objects)
        self.load_state(str(self.folder))


def train(
    title: str, steps: range, size: int, smart_loss: Any, *, dropout: float = 0.0, **more: Any
) -> tuple[Any, dict[str, Any]]:
    """Run a recipe on the whole batch at each of these steps; returns the model, and the names that it left."""
    model = CASES["one label"].model(dropout=dropout).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    data = torch.utils.data.Subset(Rows(batch_of("one label")), [row for _ in steps for row in range(ROWS)])
    names = {
        "SmartLoss": smart_loss,
        "MomentumBregman": MomentumBregman,
        "model": model,
        "optimizer": optimizer,
        # With a generator of its own a loader takes no number from the random state when its iteration begins.
        "loader": torch.utils.data.DataLoader(data, batch_size=size, generator=torch.Generator()),
        "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
    }
    return model, recipes.run(title, **names, **more)


def found(model: Any, names: dict[str, Any]) -> dict[str, Any]:
    penalties = {"penalty": names["penalty"].item(), "proximal": names["proximal"].item()}
    return {"weights": weights(model), "averages": averages(names["bregman"]), **penalties}


def interrupted(folder: Path, size: int, **search: Any) -> dict[str, Any]:
    """A run in one piece, and one in two that goes on from what the first saved."""
    results = {}
    drawing = functools.partial(SmartLoss, **SEARCH)

    def smart_loss(model: Any) -> SmartLoss:
        generator = torch.Generator().manual_seed(3) if search.get("generator") else None
        return drawing(model, generator=generator)

    for label, steps in {"whole": range(STEPS), "first": range(1), "second": range(1, STEPS)}.items():
        accelerator = (Resuming if label == "second" else accelerate.Accelerator)(cpu=True)
        accelerate.utils.set_seed(5, device_specific=True)
        Resuming.folder = folder
        run = train("accelerate_loop.py", steps, size, smart_loss, dropout=0.2, accelerator=accelerator)
        if label == "first":
            accelerator.save_state(str(folder))
        results[label] = found(*run)
    return results


def main(folder: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    run = train("accelerate_loop.py", range(STEPS), ROWS // 2, FromTheRow, accelerator=accelerator)
    results = {"ranks": accelerator.num_processes, "three steps": found(*run)}
    results["resumed"] = interrupted(folder / "state", ROWS // 2)
    torch.save(results, folder / f"{accelerator.process_index}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
