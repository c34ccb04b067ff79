"""Spoilt texts, moved embeddings, and film reviews read by a sentiment head."""

import random
from pathlib import Path

import pytest
import torch
from example_tools import SAMPLE, tiny_encoder

from minbert.data import read_split
from minbert.model import build_model, encoder_config
from minbert.settings import resolve
from minbert.study.perturbed import RATE, TEXTS, MovedEmbeddings, binary_sentiment, dropped, spoilt, swapped, typos
from minbert.tasks import TASKS

WORDS = [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(600)]


def test_every_model_reads_the_same_spoilt_text() -> None:
    split = read_split(SAMPLE, TASKS["para"], "dev")
    for name in TEXTS:
        once, again = spoilt(split, name), spoilt(split, name)
        assert once.examples == again.examples
        assert [(e.id, e.label) for e in once.examples] == [(e.id, e.label) for e in split.examples]
        assert once.examples != split.examples
        assert all(len(e.sentences) == 2 and all(e.sentences) for e in once.examples)
    alone = spoilt(read_split(SAMPLE, TASKS["para"], "dev", 5), "typos")
    by_id = {e.id: e for e in spoilt(split, "typos").examples}
    assert all(by_id[e.id] == e for e in alone.examples)  # its neighbours have no say


def test_what_each_does_to_the_words() -> None:
    changed = [(a, b) for a, b in zip(WORDS, typos(WORDS, random.Random(0)), strict=True) if a != b]
    assert all(sorted(a) == sorted(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 2 for a, b in changed)
    assert len(changed) / len(WORDS) == pytest.approx(RATE, abs=0.05)  # standard error 1.5 %; no word has twin letters
    kept = dropped(WORDS, random.Random(0))
    assert kept == [word for word in WORDS if word in set(kept)]
    assert 1 - len(kept) / len(WORDS) == pytest.approx(RATE, abs=0.05)
    moved = swapped(WORDS, random.Random(0))
    assert sorted(moved) == sorted(WORDS)
    assert moved != WORDS
    assert all(dropped(["one"], random.Random(seed)) == ["one"] for seed in range(50))  # never nothing
    assert typos(["a"], random.Random(1)) == ["a"]


def test_moved_embeddings(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder", layers=1, size=8, dropout=0.0)
    settings = resolve({"config": "vanilla", "tasks": ("sst",)})
    torch.manual_seed(0)
    model = build_model(settings, encoder_config(encoder, settings), encoder).eval()
    embedding = model.get_input_embeddings()
    ids = torch.tensor([[2, 7, 7, 3]])
    clean = embedding(ids)
    with MovedEmbeddings(model, 0.3):
        gap = embedding(ids) - clean
        alone = embedding(ids[:, :2]) - clean[:, :2]
    expected = 0.3 * embedding.weight.square().mean().sqrt()
    torch.testing.assert_close(gap.square().mean(-1).sqrt(), expected.expand(1, 4))
    assert not torch.allclose(gap[0, 1], gap[0, 2])  # one word, two places
    torch.testing.assert_close(alone, gap[:, :2])  # the batch has no say
    assert torch.equal(embedding(ids), clean)


def test_five_stars_as_two() -> None:
    outputs = torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.3], [0.2, 0.2, 0.5, 0.05, 0.05]]).log()
    found = binary_sentiment(outputs)
    # (0.1 + 0.3) against (0.1 + 0.2), and 0.1 against 0.4: the middle does not count.
    torch.testing.assert_close(found.exp(), torch.tensor([[0.3, 0.4], [0.4, 0.1]], dtype=torch.float64))
    assert found.argmax(-1).tolist() == [1, 0]
