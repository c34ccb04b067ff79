"""`example_ids=`: text whose examples are not rows has the penalty of the same examples as rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from smart_models import both_modes, gradients
from torch import Tensor, nn

from smartreg import SmartLoss, diagnose, smoothness_penalty

WORDS, FEATURES, CLASSES = 11, 4, 3
# Three sentences of 3, 1 and 4 words, as padded rows. PLACES says where each word stands in the other two layouts.
ROWS = torch.tensor([[3, 7, 2, 0], [5, 0, 0, 0], [9, 1, 4, 8]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
REAL = MASK.bool()
PACKED = torch.tensor([[3, 7, 2, 5], [9, 1, 4, 8]])
PACKED_IDS = torch.tensor([[7, 7, 7, 2], [4, 4, 4, 4]])
PACKED_PLACES = (
    torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]),
    torch.tensor([[0, 1, 2, 0], [3] * 4, [0, 1, 2, 3]]),
)
COLUMNS_PLACES = (torch.arange(4).expand(3, 4), torch.arange(3)[:, None].expand(3, 4))


class Mean(nn.Module):
    """The mean over the words of each sentence, wherever `places` says that they stand, and a layer on it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, FEATURES)
        self.head = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES))

    def forward(self, ids: Tensor, places: tuple[Tensor, Tensor] | None = None) -> Tensor:
        words = self.embedding(ids)
        return self.pooled(words if places is None else words[places])

    def pooled(self, words: Tensor) -> Tensor:
        hidden = torch.tanh(words) * MASK.unsqueeze(-1)
        return self.head(hidden.sum(1) / MASK.sum(1, keepdim=True))


def model() -> Mean:
    torch.manual_seed(0)
    return Mean().double()


def spread(of_rows: Tensor, places: tuple[Tensor, Tensor], like: Tensor) -> Tensor:
    """What stands at the real words of rows, put where another layout has them."""
    found = torch.zeros(*like.shape, of_rows.shape[-1], dtype=of_rows.dtype)
    found[places[0][REAL], places[1][REAL]] = of_rows[REAL]
    return found


LAYOUTS: dict[str, tuple[Tensor, tuple[Tensor, Tensor], dict[str, Tensor]]] = {
    "packed": (PACKED, PACKED_PLACES, {"example_ids": PACKED_IDS}),
    # Ids of padding are not looked at.
    "columns": (ROWS.T, COLUMNS_PLACES, {"example_ids": torch.tensor([5, 6, 8]) * MASK.T, "mask": MASK.T}),
}
SETTINGS = [
    {"start": start, "norm": norm, "norm_over": over, "steps": steps, "ascent": ascent}
    for start, steps, ascent in [
        ("noise", 0, "projected"),
        ("noise", 2, "projected"),
        ("noise", 1, "normalized"),
        ("gradient", 0, "projected"),
        ("towards_uniform", 2, "steepest"),
    ]
    for norm in ("2", "inf")
    for over in ("example", "token")
]


@both_modes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_any_layout_gives_what_rows_give(layout: str, settings: dict[str, Any], memory_efficient: bool) -> None:
    ids, places, given = LAYOUTS[layout]
    torch.manual_seed(1)
    noise = 0.05 * torch.randn(*ROWS.shape, FEATURES, dtype=torch.float64)
    u = torch.randn(3, CLASSES, dtype=torch.float64)
    start = {"noise": (noise, spread(noise, places, ids)), "gradient": (u, u)}.get(settings["start"], (None, None))
    found = []
    for forward, more, first in (
        (lambda m: m(ROWS), {"mask": MASK}, start[0]),
        (lambda m: m(ids, places), given, start[1]),
    ):
        smart = SmartLoss(model(), embedding="embedding", memory_efficient=memory_efficient, **settings)
        penalty = smart(forward, noise=first, **more).penalty
        penalty.backward()
        found.append((penalty, smart.stats, gradients(smart.model)))
    (wanted, rows, wanted_gradients), (penalty, stats, found_gradients) = found
    torch.testing.assert_close(penalty, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(found_gradients, wanted_gradients, rtol=1e-9, atol=1e-14)
    for name in ("radius_used", "max_perturbation", "start_divergence"):
        assert stats[name] == pytest.approx(rows[name], rel=1e-12), name


def test_without_them_the_norms_are_of_something_else() -> None:
    ids, places, given = LAYOUTS["packed"]
    smart = SmartLoss(model(), embedding="embedding")
    right, wrong = (smart(lambda m: m(ids, places), **more).penalty.item() for more in (given, {}))
    assert abs(wrong / right - 1) > 0.05  # 0.09 as it is: two sentences share one radius, as if they were one


def test_examples_without_a_gradient_are_counted_by_their_ids() -> None:
    ids, places, given = LAYOUTS["packed"]
    net = model()
    net.embedding.register_forward_hook(lambda *args: args[2] * (ids != 5).unsqueeze(-1))  # the second sentence's word
    smart = SmartLoss(net, embedding="embedding", epsilon_scale="absolute")
    smart(lambda m: m(ids, places).index_fill(0, torch.tensor(1), 0.0), **given)
    assert smart.stats.bad_examples == 1


def test_the_function_and_the_diagnosis_take_them_too() -> None:
    net = model()
    ids, places, given = LAYOUTS["packed"]
    wanted = smoothness_penalty(net.pooled, net.embedding(ROWS), mask=MASK).penalty
    packed = smoothness_penalty(lambda x: net.pooled(x[places]), net.embedding(ids), **given).penalty
    torch.testing.assert_close(packed, wanted, rtol=1e-12, atol=0)
    sweeps = [
        diagnose(net, forward, embedding="embedding", epsilons=[0.1], start="towards_uniform", **more)
        for forward, more in ((lambda m: m(ROWS), {"mask": MASK}), (lambda m: m(ids, places), given))
    ]
    assert sweeps[1].penalty == pytest.approx(sweeps[0].penalty, rel=1e-9)
    assert sweeps[1].share_of_maximum == pytest.approx(sweeps[0].share_of_maximum, rel=1e-9)


def test_several_look_ups_have_ids_of_their_own() -> None:
    ids, places, given = LAYOUTS["packed"]
    smart = SmartLoss(model(), embedding="embedding")
    wanted = smart(lambda m: m(ROWS) + m(ROWS), mask=[MASK, MASK]).penalty
    mixed = smart(
        lambda m: m(ROWS) + m(ids, places), mask=[MASK, None], example_ids=[None, given["example_ids"]]
    ).penalty
    torch.testing.assert_close(mixed, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        (PACKED_IDS.double(), TypeError, "example_ids must be a tensor of integers, got torch.float64"),
        (PACKED_IDS > 3, TypeError, "example_ids must be a tensor of integers, got torch.bool"),
        ([[0]], TypeError, "example_ids must be a tensor, or a sequence of tensors, got a list with a list"),
        (PACKED_IDS[:1], ValueError, r"example_ids must have the shape .*\(2, 4\), got \(1, 4\)"),
        ([PACKED_IDS] * 2, ValueError, "example_ids must be one tensor for each .*: expected 1, got 2"),
        # Counted from 0 in each row: 0 would be the words of two sentences.
        (torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]]), ValueError, "got id 0 in several of both"),
    ],
)
def test_ids_that_cannot_be_right_are_refused(ids: Any, error: type[Exception], words: str) -> None:
    smart = SmartLoss(model(), embedding="embedding")
    with pytest.raises(error, match=words):
        smart(lambda m: m(PACKED, PACKED_PLACES), example_ids=ids)


def test_the_remedy_for_ids_that_count_from_0_in_each_row() -> None:
    counted = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]])
    smart = SmartLoss(model(), embedding="embedding")
    forward: Callable[[nn.Module], Tensor] = lambda m: m(PACKED, PACKED_PLACES)  # noqa: E731
    different = torch.arange(len(counted))[:, None] * counted.shape[1] + counted
    assert smart(forward, example_ids=different).penalty == smart(forward, example_ids=PACKED_IDS).penalty
