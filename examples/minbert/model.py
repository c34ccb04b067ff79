"""One encoder, one head a task.

A pair of sentences is encoded apart (siamese), with two look-ups of the word embedding. The head of a pair sees
|u − v|, u · v (elementwise) and their cosine, which do not change when the two sentences are swapped: whether two
questions ask the same does not depend on their order. An encoder such as MiniLM, trained to put sentences of like
meaning close together, has most of the answer in these features; it has never read two sentences as one text.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import InputError
from .bert import BertConfig, BertEncoder
from .files import Shapes
from .pretrained import load_encoder, read_config
from .settings import Settings
from .tasks import TASKS


def head(size_in: int, size: int, outputs: int, layers: int, activation: str, dropout: float) -> nn.Sequential:
    """`layers` linear layers with dropout before each and, if asked for, a ReLU between them."""
    blocks: list[nn.Module] = []
    for i in range(layers):
        last = i == layers - 1
        blocks += [nn.Dropout(dropout), nn.Linear(size_in if i == 0 else size, outputs if last else size)]
        if activation == "relu" and not last:
            blocks.append(nn.ReLU())
    return nn.Sequential(*blocks)


class MultitaskModel(nn.Module):
    """A BERT encoder with a head for each task.

    Args:
        encoder: the encoder; all tasks share it.
        tasks: names of the tasks.
        pooling: how a sentence becomes a vector: "mean" over its tokens, the "cls" token's hidden state, or the
            "pooler"'s output.
        head_layers: linear layers of a head.
        head_activation: "relu" between them, or "none".
        dropout: rate before each of them.
    """

    def __init__(
        self,
        encoder: BertEncoder,
        tasks: Sequence[str],
        *,
        pooling: str = "mean",
        head_layers: int = 2,
        head_activation: str = "relu",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        size = encoder.config.hidden_size
        self.heads = nn.ModuleDict()
        for name in tasks:
            size_in = size if len(TASKS[name].columns) == 1 else 2 * size + 1
            self.heads[name] = head(size_in, size, TASKS[name].outputs, head_layers, head_activation, dropout)

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embedding, where the smoothness term perturbs."""
        return self.encoder.get_input_embeddings()

    def sentence(self, ids: Tensor, mask: Tensor) -> Tensor:
        """A vector for each sentence: (batch, length) → (batch, dim)."""
        hidden, pooled = self.encoder(ids, mask)
        if self.pooling == "pooler":
            return pooled
        if self.pooling == "cls":
            return hidden[:, 0]
        weights = mask.to(hidden.dtype)[:, :, None]
        return (hidden * weights).sum(1) / weights.sum(1)

    def forward(self, task: str, sentences: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """The head's output for a batch of one task.

        Args:
            task: the task's name.
            sentences: token ids, one tensor (batch, length) for each sentence of the task.
            masks: True for real tokens, in the same shapes.

        Returns:
            Logits (batch, classes), or (batch,) for a single logit or a score.
        """
        vectors = [self.sentence(ids, mask) for ids, mask in zip(sentences, masks, strict=True)]
        features = vectors[0] if len(vectors) == 1 else pair_features(*vectors)
        outputs = self.heads[task](features)
        return outputs.squeeze(-1) if TASKS[task].outputs == 1 else outputs


def pair_features(u: Tensor, v: Tensor) -> Tensor:
    """What two sentence vectors have in common, in an order-free form: (batch, dim) twice → (batch, 2 dim + 1).

    The vectors are brought to length √dim first, so that the features have the size a linear layer expects, whatever
    the encoder's own scale; the cosine is scaled by √dim, or one feature among 2 dim would go unheard.
    """
    root = math.sqrt(u.shape[-1])
    u, v = F.normalize(u, dim=-1) * root, F.normalize(v, dim=-1) * root
    cosine = (u * v).sum(-1, keepdim=True) / root
    return torch.cat([(u - v).abs(), u * v, cosine], dim=-1)


def encoder_config(folder: Path, settings: Settings) -> BertConfig:
    """The encoder's configuration, with the run's own dropout rate if it has one.

    Raises:
        InputError: `--max-length` is beyond the encoder's positions.
    """
    config = read_config(folder / "config.json")
    if settings.dropout is not None:
        rate = settings.dropout
        config = replace(config, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)
    if settings.max_length > config.max_position_embeddings:
        raise InputError(
            f"--max-length {settings.max_length}: the encoder has {config.max_position_embeddings} positions"
        )
    return config


def model_shapes(settings: Settings, config: BertConfig) -> Shapes:
    """The shape of each tensor of a run's model, without the memory for one."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in build_model(settings, config, None).state_dict().items()}


def build_model(settings: Settings, config: BertConfig, weights: Path | None) -> MultitaskModel:
    """The model of a run: fresh heads on an encoder, whose weights come from a checkpoint folder unless None."""
    encoder = BertEncoder(config) if weights is None else load_encoder(weights, config)
    return MultitaskModel(
        encoder,
        settings.tasks,
        pooling=settings.pooling,
        head_layers=settings.head_layers,
        head_activation=settings.head_activation,
        dropout=config.hidden_dropout_prob,
    )
