"""A tokenizer, rows and trainers for TRL, and what every rank trains."""

import sys
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
import trl
from datasets import Dataset
from tiny_transformers import VOCABULARY
from torch import Tensor, nn
from torch.nn import functional
from trainer_tools import BETA, CASES, LAMBDA, MU, SEARCH, arguments, averages, batch_of, row_noise, weights

from smartreg import SmartLoss
from smartreg.integrations.trl import SmartSFTConfig, SmartSFTTrainer

NAME = "causal, GPT-2"  # float64 from end to end
ON = {"smart_lambda": LAMBDA, "bregman_mu": MU, "bregman_beta": BETA}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[UNK]": 1, "[EOS]": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )


def batch(name: str = NAME) -> dict[str, Tensor]:
    """As in the tests of the Trainer, but for the first token of a row, which no model predicts: TRL counts it too."""
    made = batch_of(name)
    made["labels"][:, 0] = -100
    return made


def data(name: str = NAME) -> Dataset:
    """Rows of ids and labels, each of its own length."""
    rows = batch(name)
    lengths = rows["attention_mask"].sum(1).tolist()
    return Dataset.from_dict(
        {k: [row[:n].tolist() for row, n in zip(rows[k], lengths, strict=True)] for k in ("input_ids", "labels")}
    )


def task(outputs: Any, rows: dict[str, Tensor]) -> Tensor:
    """The mean over the targets, in the dtype of the logits."""
    return functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten())


def trainer_of(
    folder: Path, model: nn.Module | None = None, *, name: str = NAME, stock: bool = False, **options: Any
) -> Any:
    """A trainer of the rows; fields of the config and arguments of the trainer by name."""
    model = CASES[name].model() if model is None else model
    own = {k: options.pop(k) for k in ("compute_loss_func", "peft_config", "smart_options") if k in options}
    rows = options.pop("rows", None) or data(name)
    plain = {"bf16": False, "gradient_checkpointing": False}
    kind, config = (trl.SFTTrainer, trl.SFTConfig) if stock else (SmartSFTTrainer, SmartSFTConfig)
    if not stock:
        options = {**ON, **options}
        own["smart_options"] = {**SEARCH, **own.get("smart_options", {})}
    made = arguments(folder, config, **{**plain, **options})
    return kind(model, made, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer(), **own)


def trained(*args: Any, **options: Any) -> Any:
    trainer = trainer_of(*args, **options)
    trainer.train()
    return trainer


def main(folder: Path) -> None:
    forward = SmartLoss.forward
    SmartLoss.forward = lambda self, *a, **k: forward(self, *a, **{**k, "noise": row_noise})
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_strategy": "epoch"}
    trainer = trained(folder / "run", ddp_backend="gloo", **cut)
    found = {"weights": weights(trainer.model), "averages": averages(trainer.regularizers.bregman)}
    log = [line for line in trainer.state.log_history if "loss" in line][-1]
    torch.save({**found, "log": log}, folder / f"{trainer.args.process_index}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
