"""Fine-tunes a classifier with the Trainer of transformers: SMART is two class names and a field.

python examples/integrations/glue.py --model FOLDER --epochs 1
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from smartreg.integrations.transformers import SmartTrainer, SmartTrainingArguments

SAMPLE = Path(__file__).parent.parent / "minbert" / "sample"


def rows(name: str, tokenizer, limit: int | None) -> list[dict]:
    """Sentences and their labels, from a file of the sample."""
    with (SAMPLE / name).open(encoding="utf-8") as file:
        table = list(csv.DictReader(file, delimiter="\t"))[:limit]
    return [{**tokenizer(row["sentence"], truncation=True), "labels": int(row["sentiment"])} for row in table]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or name of a checkpoint of transformers")
    parser.add_argument("--output-dir", default="glue-results")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--limit", type=int, help="use so many sentences")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=5)
    arguments = SmartTrainingArguments(  # was TrainingArguments
        output_dir=options.output_dir,
        num_train_epochs=options.epochs,
        logging_steps=2,
        report_to="none",
        smart_lambda=0.03,
    )
    trainer = SmartTrainer(  # was Trainer
        model=model,
        args=arguments,
        train_dataset=rows("ids-sst-train.csv", tokenizer, options.limit),
        eval_dataset=rows("ids-sst-dev.csv", tokenizer, options.limit),
        processing_class=tokenizer,
        compute_metrics=lambda found: {"accuracy": float((np.argmax(found[0], -1) == found[1]).mean())},
    )
    trainer.train()
    print(trainer.evaluate())


if __name__ == "__main__":
    main()
