"""How a model does where its input is not what it was trained on: spoilt text, moved embeddings, film reviews.

The perturbations are seeded by the row's id, so that every model reads the same text.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..batching import SentenceTokenizer, TokenSet, tokenize
from ..data import Split, read_split, split_file
from ..distributed import Place
from ..evaluate import outputs_of
from ..model import MultitaskModel
from ..objective import seed_of
from ..tasks import TASKS, score
from .measure import finite
from .split import Parts

ROWS = 500
"""Rows held out that the probes are measured on; their order is random, so the first will do."""
RATE = 0.15
RADII = (0.1, 0.3, 1.0)


def typos(words: list[str], draw: random.Random) -> list[str]:
    """Two neighbouring letters change places in some of the words."""
    return [_typo(word, draw) if draw.random() < RATE else word for word in words]


def _typo(word: str, draw: random.Random) -> str:
    if len(word) < 2:
        return word
    at = draw.randrange(len(word) - 1)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def dropped(words: list[str], draw: random.Random) -> list[str]:
    """Some of the words are left out; one at least stays."""
    return [word for word in words if draw.random() >= RATE] or [draw.choice(words)]


def swapped(words: list[str], draw: random.Random) -> list[str]:
    """Some neighbours change places."""
    words = list(words)
    for at in range(len(words) - 1):
        if draw.random() < RATE:
            words[at], words[at + 1] = words[at + 1], words[at]
    return words


def upper(words: list[str], draw: random.Random) -> list[str]:
    """Everything in capitals: nothing changes for a tokenizer that lowers them."""
    return [word.upper() for word in words]


TEXTS: dict[str, Callable[[list[str], random.Random], list[str]]] = {
    "typos": typos,
    "dropped": dropped,
    "swapped": swapped,
    "upper": upper,
}


def spoilt(split: Split, name: str) -> Split:
    """A split with all its sentences perturbed; a row's words depend on its id and the perturbation alone."""
    examples = []
    for example in split.examples:
        draw = random.Random(seed_of(name, example.id))
        sentences = tuple(" ".join(TEXTS[name](text.split(), draw)) for text in example.sentences)
        examples.append(replace(example, sentences=sentences))
    return replace(split, examples=examples)


class MovedEmbeddings:
    """While entered, adds noise to the word embeddings that a model looks up.

    Each token's is drawn from N(0, I) and brought to `radius` times the root mean square of the embedding table, per
    entry. It is seeded by the token and its place, so that neither batch nor model has a say.

    Args:
        model: the model.
        radius: size of the noise.
    """

    def __init__(self, model: MultitaskModel, radius: float) -> None:
        self.embedding = model.get_input_embeddings()
        weight = self.embedding.weight.detach()
        generator = torch.Generator().manual_seed(seed_of("moved embeddings"))
        # One direction for a token and one for a place: their sum differs wherever one of them does.
        by_token = torch.randn(weight.shape, generator=generator)
        by_place = torch.randn((512, weight.shape[1]), generator=generator)
        self.by_token, self.by_place = by_token.to(weight), by_place.to(weight)
        self.size = radius * float(weight.square().mean().sqrt())

    def __enter__(self) -> "MovedEmbeddings":
        self.handle = self.embedding.register_forward_hook(self._move)
        return self

    def __exit__(self, *exception: object) -> None:
        self.handle.remove()

    def _move(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ids = args[0]
        noise = self.by_token[ids] + self.by_place[: ids.shape[1]]
        return output + self.size * noise / noise.square().mean(-1, keepdim=True).sqrt()


def binary_sentiment(outputs: Tensor) -> Tensor:
    """Five stars as two: log-odds of the two good ones against the two bad ones, (n, 5) → (n, 2); the middle is out."""
    logs = outputs.double().log_softmax(-1)
    return torch.stack([logs[:, :2].logsumexp(-1), logs[:, 3:].logsumexp(-1)], -1)


def probes(
    model: MultitaskModel, found: dict[str, Parts], tokenizer: SentenceTokenizer, folder: Path, place: Place
) -> dict[str, Any]:
    """Metrics under every perturbation, by task, on the first rows held out; and on CFIMDB for who has learnt SST."""
    result: dict[str, Any] = {}
    for name, each in found.items():
        rows = replace(each.held_out, examples=each.held_out.examples[:ROWS])
        clean = tokenize(rows, tokenizer)
        result[name] = {"clean": _score(model, clean, place)}
        for text in TEXTS:
            data = tokenize(spoilt(rows, text), tokenizer)
            same = data.tokens == clean.tokens  # capitals, for a tokenizer that lowers them
            result[name][text] = result[name]["clean"] if same else _score(model, data, place)
        for radius in RADII:
            with MovedEmbeddings(model, radius):
                result[name][f"embeddings {radius:g}"] = _score(model, clean, place)
    film = TASKS["cfimdb"]
    if "sst" in found and split_file(folder, film, "dev") is not None:
        reviews = tokenize(read_split(folder, film, "dev"), tokenizer)
        # The sentiment head reads them; they are a task of their own only in their labels.
        outputs = finite(outputs_of(model, replace(reviews, task=found["sst"].train.task), place))
        result["cfimdb"] = {"transfer": score(film, binary_sentiment(outputs), torch.tensor(reviews.labels))}
    return result


def _score(model: MultitaskModel, data: TokenSet, place: Place) -> dict[str, Any]:
    return dict(score(data.task, finite(outputs_of(model, data, place)), torch.tensor(data.labels)))
