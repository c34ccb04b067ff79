"""Small sentence encoders and cross-encoders with a tokenizer of their own, and what every rank trains."""

import sys
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
import transformers
from datasets import Dataset
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tiny_transformers import _ENCODER
from torch import Tensor, nn
from torch.nn import functional
from trainer_tools import BETA, LAMBDA, MU, RATE, SEARCH, arguments, averages, row_noise, weights

from smartreg import MomentumBregman, SmartLoss
from smartreg.integrations.sentence_transformers import SmartLossModifier

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "small",
    "large",
    "red",
    "green",
]
WORDS += ["blue", "dog", "cat", "tree"]
ON = {"smart_lambda": LAMBDA, "bregman_mu": MU, "smart_options": SEARCH, "bregman_options": {"beta": BETA}}


def sentences(seed: int, count: int = 8) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator)) for length in lengths]


def data() -> Dataset:
    labels = torch.rand(8, generator=torch.Generator().manual_seed(3)).tolist()
    return Dataset.from_dict({"first": sentences(1), "second": sentences(2), "label": labels})


def checkpoint(folder: Path, *, scores: bool = False, dropout: float = 0.0) -> Path:
    """A checkpoint of random weights in the layout of transformers."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    chances = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = transformers.BertConfig(**{**_ENCODER, "vocab_size": len(WORDS) + 5}, **chances, num_labels=1)
    kind = transformers.BertForSequenceClassification if scores else transformers.BertModel
    kind(config).save_pretrained(folder)
    return folder


def encoder(folder: Path, dropout: float = 0.0) -> Any:
    transformer = Transformer(str(checkpoint(folder, dropout=dropout)))
    pooling = Pooling(transformer.get_embedding_dimension())
    return sentence_transformers.SentenceTransformer(modules=[transformer, pooling], device="cpu").double()


class Cosine(nn.Module):
    """The loss of the cosine, in float64."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Any, labels: Tensor) -> Tensor:
        first, second = (self.model(column)["sentence_embedding"] for column in features)
        return functional.mse_loss(torch.cosine_similarity(first, second), labels.to(first.dtype))


def trainer_of(folder: Path, loss: Any, train: Dataset | None = None, callbacks: Any = None, **options: Any) -> Any:
    made = arguments(folder, sentence_transformers.SentenceTransformerTrainingArguments, **options)
    callbacks = [loss.callback] if callbacks is None and isinstance(loss, SmartLossModifier) else callbacks
    train = data() if train is None else train
    return sentence_transformers.SentenceTransformerTrainer(
        loss.model, made, train_dataset=train, eval_dataset=train, loss=loss, callbacks=callbacks
    )


def by_hand(model: Any, steps: int, *, cosine: bool = False) -> MomentumBregman:
    """All rows at each step; trains `model`, returns its teacher."""
    columns = [model.preprocess(list(data()[name])) for name in ("first", "second")]
    labels = torch.tensor(list(data()["label"]))

    def embed(m: nn.Module) -> list[Tensor]:
        return [m(dict(column))["sentence_embedding"] for column in columns]

    def compared(embedded: list[Tensor]) -> list[Tensor]:
        return [torch.cosine_similarity(*embedded)] if cosine else embedded

    compare = {"divergence": "mse", "output_to_logits": compared}
    smart = SmartLoss(model, embedding=model[0].model.get_input_embeddings(), **compare, **SEARCH)
    bregman = MomentumBregman(model, beta=BETA, **compare)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    model.train()
    for _ in range(steps):
        outputs, penalty = smart(embed, mask=[column["attention_mask"] for column in columns])
        proximal = bregman(embed, outputs)
        task = functional.mse_loss(torch.cosine_similarity(*outputs), labels.double())
        (task + LAMBDA * penalty + MU * proximal).backward()
        optimizer.step()
        optimizer.zero_grad()
        bregman.update()
    assert penalty > 1e-6
    assert proximal > 1e-9
    return bregman


def main(folder: Path) -> None:
    forward = SmartLoss.forward
    SmartLoss.forward = lambda self, *a, **k: forward(self, *a, **{**k, "noise": row_noise})
    model = encoder(folder / f"encoder {torch.distributed.is_initialized()} {sys.argv[2:]}")
    loss = SmartLossModifier(model, Cosine(model), **ON)
    trainer = trainer_of(folder / "run", loss, per_device_train_batch_size=4, ddp_backend="gloo")
    trainer.train()
    found = {"weights": weights(model), "averages": averages(loss.regularizers.bregman)}
    torch.save(found, folder / f"{trainer.args.process_index}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
