"""Token outputs: which positions are compared, so that neither padding nor a position without a label counts."""

from functools import partial
from typing import Any

import pytest
import reference
import torch
from smart_models import CLASSES, FEATURES, HIDDEN, VOCABULARY
from torch import Tensor, nn

from smartreg import MomentumBregman, SmartLoss, diagnose, mse, smoothness_penalty, symmetric_kl, token_mask

LENGTHS = (4, 2, 3)
both_modes = pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "efficient"])


class Tagger(nn.Module):
    """Logits for each token, from that token and the mean over the real tokens."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, FEATURES)
        self.hidden = nn.Linear(FEATURES, HIDDEN)
        self.head = nn.Linear(2 * HIDDEN, classes)
        self.double()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden(self.embedding(ids))) * mask.unsqueeze(-1)
        mean = hidden.sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        return self.head(torch.cat([hidden, mean.expand_as(hidden)], dim=-1))  # (batch, sequence, classes)


def sentences(width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in LENGTHS]
    ids = torch.stack([nn.functional.pad(row, (0, width - len(row))) for row in rows])
    return ids, torch.stack([torch.arange(width) < n for n in LENGTHS]).long()


def noise(width: int, size: float = 0.05) -> Tensor:
    longest = size * torch.randn(3, 4, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return nn.functional.pad(longest, (0, 0, 0, width - 4))


def mean_over_real_tokens(model: Tagger, delta: Tensor, kind: str = "symmetric_kl") -> float:
    """The mean of ℓ over the nine real tokens, sentence by sentence and without padding, by the restatement."""
    total = 0.0
    for i, n in enumerate(LENGTHS):
        ids, _ = sentences(4)
        one = ids[i : i + 1, :n]
        x = model.embedding(one)
        outputs = []
        for moved in (x + delta[i, :n], x):
            hidden = torch.tanh(model.hidden(moved))
            joined = torch.cat([hidden, hidden.mean(1, keepdim=True).expand_as(hidden)], dim=-1)
            outputs.append(model.head(joined)[0].detach().numpy())
        total += getattr(reference, kind)(*outputs, reduction="sum")
    return total / sum(LENGTHS)


@both_modes
@pytest.mark.parametrize("width", [4, 6, 12])
def test_padding_does_not_change_the_penalty(width: int, memory_efficient: bool) -> None:
    model, (ids, mask) = Tagger(), sentences(width)
    smart = SmartLoss(model, steps=0, start="noise", epsilon=5.0, memory_efficient=memory_efficient)
    call: Any = partial(smart, lambda m: m(ids, mask), mask=mask, noise=noise(width))
    expected = mean_over_real_tokens(model, noise(4))
    assert call(output_mask=mask).penalty.item() == pytest.approx(expected, rel=1e-9)
    if width > 4:
        assert call().penalty.item() != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("name", ["mse", "binary_symmetric_kl"])
def test_elements_are_left_out_with_their_token(name: str) -> None:
    model, (ids, mask) = Tagger(classes=1), sentences(6)
    smart = SmartLoss(model, steps=0, start="noise", epsilon=5.0, divergence=name)
    _, penalty = smart(lambda m: m(ids, mask), mask=mask, noise=noise(6), output_mask=mask)
    assert penalty.item() == pytest.approx(mean_over_real_tokens(model, noise(4), name), rel=1e-9)


def test_a_divergence_of_the_users_own_sees_the_kept_positions_alone() -> None:
    model, (ids, mask) = Tagger(), sentences(6)
    seen: list[tuple[int, ...]] = []

    def own(a: Tensor, b: Tensor) -> Tensor:
        seen.append(tuple(a.shape))
        return symmetric_kl(a, b)

    smart = SmartLoss(model, steps=0, start="noise", epsilon=5.0, divergence=own)
    _, penalty = smart(lambda m: m(ids, mask), mask=mask, noise=noise(6), output_mask=mask)
    assert seen == [(sum(LENGTHS), CLASSES)]
    assert penalty.item() == pytest.approx(mean_over_real_tokens(model, noise(4)), rel=1e-9)
    _, nothing = smart(lambda m: m(ids, mask), mask=mask, noise=noise(6), output_mask=torch.zeros_like(mask))
    nothing.backward()
    assert nothing.item() == 0


@both_modes
@pytest.mark.parametrize("start", ["noise", "gradient", "towards_uniform"])
def test_the_search_does_not_see_what_is_left_out(start: str, memory_efficient: bool) -> None:
    model, (ids, mask) = Tagger(), sentences(6)
    with torch.no_grad():
        model.embedding.weight[0] = torch.nan  # what stands at padding is NaN, and so are the logits there
    u = torch.full((3, 6, CLASSES), torch.nan, dtype=torch.float64)
    u[mask.bool()] = torch.randn(9, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    smart = SmartLoss(model, start=start, steps=1, memory_efficient=memory_efficient)
    given = {"noise": noise(6, 0.01), "gradient": u, "towards_uniform": None}[start]

    def forward(m: nn.Module) -> Tensor:
        hidden = torch.tanh(m.hidden(m.embedding(ids)))
        mean = torch.where(mask.bool().unsqueeze(-1), hidden, 0.0).sum(1, keepdim=True)
        return m.head(torch.cat([hidden, mean.expand_as(hidden)], dim=-1))

    _, penalty = smart(forward, mask=mask, noise=given, output_mask=mask)
    assert smart.stats is not None
    assert torch.isfinite(penalty)
    assert penalty > 1e-6
    assert smart.stats.bad_examples == 0


def test_the_teacher_is_compared_where_the_mask_says() -> None:
    model, (ids, mask) = Tagger(), sentences(6)
    bregman = MomentumBregman(model)
    with torch.no_grad():
        model.head.weight.mul_(1.5)
    outputs = model(ids, mask)
    teacher = bregman.teacher(ids, mask)
    expected = reference.symmetric_kl(outputs.detach().numpy(), teacher.numpy(), mask=mask.numpy())
    penalty = bregman(lambda m: m(ids, mask), outputs, output_mask=mask)
    assert penalty.item() == pytest.approx(expected, rel=1e-9)
    assert penalty.item() != pytest.approx(bregman(lambda m: m(ids, mask), outputs).item(), rel=1e-3)


def test_several_tensors_have_a_mask_each() -> None:
    model, (ids, mask) = Tagger(), sentences(4)
    smart = SmartLoss(model, steps=0, start="noise", epsilon=5.0, output_to_logits=lambda out: [out, out])
    whole = mean_over_real_tokens(model, noise(4))
    first = [[1, 0, 0, 0]] * 3
    _, penalty = smart(lambda m: m(ids, mask), noise=noise(4), mask=mask, output_mask=[mask, torch.tensor(first)])
    _, head = smart(lambda m: m(ids, mask), noise=noise(4), mask=mask, output_mask=[None, torch.tensor(first)])
    _, everything = smart(lambda m: m(ids, mask), noise=noise(4), mask=mask)
    alone = head.item() - everything.item() / 2
    assert penalty.item() == pytest.approx(whole + alone, rel=1e-9)


def test_the_function_and_the_diagnosis_take_it_too() -> None:
    model, (ids, mask) = Tagger(), sentences(4)
    options: dict[str, Any] = {"steps": 0, "start": "noise", "epsilon": 5.0}
    mean = lambda x: (x * mask.unsqueeze(-1)).sum(1, keepdim=True) / mask.sum(1)[:, None, None]  # noqa: E731  # short

    def fn(x: Tensor) -> Tensor:
        hidden = torch.tanh(model.hidden(x))
        return model.head(torch.cat([hidden, mean(hidden).expand_as(hidden)], dim=-1))

    found = smoothness_penalty(fn, model.embedding(ids), mask=mask, noise=noise(4), output_mask=mask, **options)
    assert found.penalty.item() == pytest.approx(mean_over_real_tokens(model, noise(4)), rel=1e-9)
    result = diagnose(
        model, lambda m: m(ids, mask), mask=mask, output_mask=mask, epsilons=[0.1], start="noise", steps=1
    )
    whole = diagnose(model, lambda m: m(ids, mask), mask=mask, epsilons=[0.1], start="noise", steps=1)
    assert result.penalty[0] != pytest.approx(whole.penalty[0], rel=1e-2)


def test_labels_make_a_mask() -> None:
    labels = torch.tensor([[-100, 4, 2, -100], [1, -100, 3, 5]])
    assert token_mask(labels).tolist() == [[False, True, True, False], [True, False, True, True]]
    # The logits at a position predict the next label: the first label predicts nothing, the last position neither.
    assert token_mask(labels, shift=True).tolist() == [[True, True, False, False], [False, True, True, False]]
    assert token_mask(labels, ignore_index=2).tolist() == [[True, True, False, True], [True, True, True, True]]
    with pytest.raises(TypeError, match=r"labels must be a tensor of integers, got torch\.float32"):
        token_mask(labels.float())
    with pytest.raises(TypeError, match="labels must be a tensor of integers, got list"):
        token_mask([[1]])  # type: ignore[arg-type]  # the misuse
    with pytest.raises(ValueError, match=r"labels must be \(batch, sequence\) to be shifted, got shape \(4,\)"):
        token_mask(labels[0], shift=True)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(3, 5), ValueError, r"output_mask must have the leading shape .*\(3, 4, 3\).*, got \(3, 5\)"),
        (torch.ones(()), ValueError, r"output_mask must have the leading shape .*, got \(\)"),
        (torch.ones(3, 4, 3), ValueError, r"output_mask must leave out positions, not classes.*got \(3, 4, 3\)"),
        ([torch.ones(3, 4)] * 2, ValueError, "output_mask must be one tensor for each tensor to compare.*expected 1"),
        (
            [[[1, 1, 1, 1]] * 3],
            TypeError,
            "output_mask must be a tensor, or a sequence.*got a list with a list",
        ),
    ],
)
def test_masks_that_do_not_fit(mask: Any, error: type[Exception], message: str) -> None:
    model, (ids, real) = Tagger(), sentences(4)
    with pytest.raises(error, match=message):
        SmartLoss(model)(lambda m: m(ids, real), output_mask=mask)
    with pytest.raises(error, match=message):
        MomentumBregman(model)(lambda m: m(ids, real), model(ids, real), output_mask=mask)


def test_a_partial_of_a_divergence_keeps_its_reduction() -> None:
    model, (ids, mask) = Tagger(classes=1), sentences(6)
    smart = SmartLoss(model, steps=0, start="noise", epsilon=5.0, divergence=partial(mse, reduction="sum"))
    _, penalty = smart(lambda m: m(ids, mask), mask=mask, noise=noise(6), output_mask=mask)
    assert penalty.item() == pytest.approx(9 * mean_over_real_tokens(model, noise(4), "mse"), rel=1e-9)


def test_a_batch_in_which_nothing_is_compared_is_no_news() -> None:
    """Without anything to compare no example has a gradient to follow, and none is missed."""
    model, (ids, mask) = Tagger(), sentences(4)
    smart = SmartLoss(model, check_first_call=False)
    found = smart(lambda m: m(ids, mask), mask=mask, output_mask=torch.zeros_like(mask))
    assert found.penalty.item() == 0.0
