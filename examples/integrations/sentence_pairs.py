"""Trains a sentence encoder on pairs with sentence-transformers: SMART is a loss around the loss, and its callback.

python examples/integrations/sentence_pairs.py --model FOLDER
"""

import argparse
import csv
from pathlib import Path

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

from smartreg.integrations.sentence_transformers import SmartLossModifier

SAMPLE = Path(__file__).parent.parent / "minbert" / "sample"


def pairs(name: str, limit: int | None) -> Dataset:
    """Two sentences and how similar they are, from a file of the sample."""
    with (SAMPLE / name).open(encoding="utf-8") as file:
        table = list(csv.DictReader(file, delimiter="\t"))[:limit]
    labels = [float(row["similarity"]) / 5 for row in table]
    return Dataset.from_dict(
        {
            "first": [row["sentence1"] for row in table],
            "second": [row["sentence2"] for row in table],
            "label": labels,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or name of a sentence encoder")
    parser.add_argument("--output-dir", default="pairs-results")
    parser.add_argument("--limit", type=int, help="use so many pairs")
    options = parser.parse_args()

    model = SentenceTransformer(options.model, device="cpu")
    loss = SmartLossModifier(model, CosineSimilarityLoss(model), compare="cosine")  # around the loss
    arguments = SentenceTransformerTrainingArguments(
        output_dir=options.output_dir, num_train_epochs=1, logging_steps=2, report_to="none"
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=pairs("sts-train.csv", options.limit),
        loss=loss,
        callbacks=[loss.callback],
    )
    trainer.train()


if __name__ == "__main__":
    main()
