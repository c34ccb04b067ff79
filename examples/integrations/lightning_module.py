"""A LightningModule with SMART: a callback, and one line in the shared step.

python examples/integrations/lightning_module.py
"""

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from smartreg.integrations.lightning import SmartCallback, smart_loss

VOCABULARY, TOKENS = 50, 8


class Classifier(lightning.LightningModule):
    """Words, their mean, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Embedding(VOCABULARY, 16), nn.Flatten(), nn.Linear(16 * TOKENS, 32), nn.Tanh(), nn.Linear(32, 2)
        )

    def step(self, batch: list[Tensor]) -> Tensor:
        ids, labels = batch
        outputs, term = smart_loss(self, self.model, lambda m: m(ids))  # was outputs = self.model(ids)
        return nn.functional.cross_entropy(outputs, labels) + term

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", self.step(batch), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    lightning.seed_everything(0)
    ids = torch.randint(VOCABULARY, (256, TOKENS))
    data = TensorDataset(ids, (ids[:, 0] < VOCABULARY // 2).long())
    smart = SmartCallback(smart_options={"embedding": "0"})
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", callbacks=[smart], **quiet)
    trainer.fit(Classifier(), DataLoader(data, batch_size=32, shuffle=True), DataLoader(data, batch_size=256))
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
