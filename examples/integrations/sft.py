"""Fine-tunes a causal language model on sentences with TRL: SMART is two class names and a field.

python examples/integrations/sft.py --model FOLDER
"""

import argparse
import csv
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from smartreg.integrations.trl import SmartSFTConfig, SmartSFTTrainer

SAMPLE = Path(__file__).parent.parent / "minbert" / "sample"


def sentences(name: str, limit: int | None) -> Dataset:
    """The sentences of a file of the sample."""
    with (SAMPLE / name).open(encoding="utf-8") as file:
        return Dataset.from_dict({"text": [row["sentence"] for row in csv.DictReader(file, delimiter="\t")][:limit]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or name of a causal language model of transformers")
    parser.add_argument("--output-dir", default="sft-results")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--limit", type=int, help="use so many sentences")
    options = parser.parse_args()

    config = SmartSFTConfig(  # was SFTConfig
        output_dir=options.output_dir,
        num_train_epochs=options.epochs,
        max_length=32,
        logging_steps=2,
        report_to="none",
        bf16=False,  # TRL sets it, and not every CPU has it
        smart_lambda=0.03,
    )
    trainer = SmartSFTTrainer(  # was SFTTrainer
        AutoModelForCausalLM.from_pretrained(options.model),
        config,
        train_dataset=sentences("ids-sst-train.csv", options.limit),
        eval_dataset=sentences("ids-sst-dev.csv", options.limit),
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )
    trainer.train()
    print(trainer.evaluate())


if __name__ == "__main__":
    main()
