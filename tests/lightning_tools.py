"""A LightningModule around the small models, and what every rank of `test_smart_lightning.py` trains."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainer_tools import BETA, CASES, LAMBDA, MU, RATE, SEARCH, Rows, averages, batch_of, row_noise, weights

from smartreg import SmartLoss
from smartreg.integrations.lightning import SmartCallback, smart_loss


class Module(lightning.LightningModule):
    """One step for training and validation, with the one line or without it."""

    def __init__(self, name: str, model: nn.Module, *, plain: bool = False) -> None:
        super().__init__()
        self.case, self.model, self.plain = CASES[name], model, plain

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        if self.plain:
            return self.case.task(self.model(**batch), batch)
        output_mask = None if self.case.output_mask is None else self.case.output_mask(batch)
        outputs, term = smart_loss(
            self, self.model, lambda m: m(**batch), mask=self.case.masks(batch), output_mask=output_mask
        )
        return self.case.task(outputs, batch) + term

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("val_loss", self.step(batch), batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def fit(
    folder: Path,
    module: Module,
    batch: dict[str, Tensor],
    callbacks: list[Any],
    *,
    size: int = 8,
    validate: bool = False,
    ckpt_path: Path | None = None,
    **options: Any,
) -> lightning.Trainer:
    """Three epochs of all rows, unless options say otherwise."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    saving = any(isinstance(one, lightning.callbacks.ModelCheckpoint) for one in callbacks)
    here = {"accelerator": "cpu", "devices": 1, "max_epochs": 3, "enable_checkpointing": saving}
    here["limit_val_batches"] = 1.0 if validate else 0
    trainer = lightning.Trainer(default_root_dir=folder, callbacks=callbacks, **{**quiet, **here, **options})
    loader = DataLoader(Rows(batch), batch_size=size)
    module.model.train()
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    return trainer


def main(folder: Path) -> None:
    forward = SmartLoss.forward
    SmartLoss.forward = lambda self, *a, **k: forward(self, *a, **{**k, "noise": row_noise})
    module = Module("one label", CASES["one label"].model())
    options = {"smart_options": SEARCH, "bregman_options": {"beta": BETA}}
    callback = SmartCallback(smart_lambda=LAMBDA, bregman_mu=MU, **options)
    trainer = fit(folder, module, batch_of("one label"), [callback], size=4, devices=2, strategy="ddp")
    found = {"weights": weights(module.model), "averages": averages(callback.regularizers.bregman)}
    torch.save(found, folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
