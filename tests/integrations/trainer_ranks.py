"""What every rank of `test_smart_trainer.py` trains: half of the rows each, and the weights go to a file.

Run on its own with `torchrun --nproc-per-node 2 tests/integrations/trainer_ranks.py FOLDER`.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from trainer_tools import BETA, CASES, LAMBDA, MU, SEARCH, Rows, arguments, averages, batch_of, row_noise, weights

from smartreg import SmartLoss
from smartreg.integrations.transformers import SmartTrainer, SmartTrainingArguments


def run(folder: Path, label: str, name: str, *, dropout: float = 0.0, resume: str | None = None, **options: Any) -> Any:
    more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo", **options}
    more |= {"smart_lambda": LAMBDA, "bregman_mu": MU, "bregman_beta": BETA, "logging_strategy": "epoch"}
    made = arguments(folder / "run", SmartTrainingArguments, **more)
    generator = torch.Generator().manual_seed(made.process_index) if dropout else None
    trainer = SmartTrainer(
        CASES[name].model(dropout=dropout),
        made,
        train_dataset=Rows(batch_of(name)),
        smart_options={**SEARCH, "generator": generator},
    )
    trainer.train(resume_from_checkpoint=resume)
    keys = ("smart_penalty", "bregman_penalty")
    log = [line for line in trainer.state.log_history if "loss" in line][-1]
    found = {"weights": weights(trainer.model), "averages": averages(trainer.regularizers.bregman)}
    torch.save({**found, "log": {key: log[key] for key in keys}}, folder / f"{label} {made.process_index}.pt")
    return trainer


def main(folder: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    run(folder, "whole", "one label", dropout=0.2, **saving)
    run(folder, "resumed", "one label", dropout=0.2, resume=str(folder / "run" / "checkpoint-2"), **saving)
    forward = SmartLoss.forward
    SmartLoss.forward = lambda self, *a, **k: forward(self, *a, **{**k, "noise": row_noise})
    for name in ("one label", "tokens", "causal, GPT-2"):
        run(folder, name, name)
    (folder / f"compiled {dist.get_rank()}.txt").write_text(refusal(folder))
    gc.collect()  # a wrapper in a cycle of references that outlives its group may abort the process
    dist.destroy_process_group()


def refusal(folder: Path) -> str:
    """What the Trainer's own `torch_compile` raises, which puts the graph around the wrapper."""
    try:
        run(folder, "compiled", "one label", torch_compile=True, torch_compile_backend="eager")
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
