"""The settings that stand for other packages and papers, against the package itself or the formula written out."""

from collections.abc import Callable

import pytest
import smart_pytorch
import torch
import torch.nn.functional as F
from smart_models import algorithm_1
from torch import Tensor, nn

from smartreg import SmartLoss, symmetric_kl

IDS = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(0))


class Classifier(nn.Module):
    """Embedding, LayerNorm, dropout, one attention layer and a head, small enough for float64."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def after_norm(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        return self.head(self.dropout(x + self.mix(x, x, x, need_weights=False)[0]).mean(1))

    def from_embeddings(self, x: Tensor) -> Tensor:
        return self.after_norm(self.norm(x))

    def forward(self, ids: Tensor) -> Tensor:
        return self.from_embeddings(self.embedding(ids))


def build(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Classifier:
    torch.manual_seed(1)
    model = Classifier(dropout).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def assert_close(ours: list[Tensor], theirs: list[Tensor], relative: float) -> None:
    """All of them as one vector: some are 0 but for rounding."""
    mine, other = (torch.cat([g.flatten() for g in grads]) for grads in (ours, theirs))
    assert (mine - other).norm() <= relative * other.norm()


DIVERGENCES = {
    "sym_kl": smart_pytorch.sym_kl_loss,
    "kl": smart_pytorch.kl_loss,
    "js": smart_pytorch.js_loss,
}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_smart_pytorch_from_its_random_state(name: str, steps: int, dropout: float) -> None:
    """Loss and gradients to 1e-5, with the clean pass, the noise and the dropout masks of one seed."""
    model, divergence = build(dropout), DIVERGENCES[name]
    torch.manual_seed(5)
    embeds = model.embedding(IDS)
    peer = smart_pytorch.SMARTLoss(
        model.from_embeddings, divergence, num_steps=steps, step_size=0.5, epsilon=1e-2, noise_var=0.1
    )
    theirs = peer(embeds, model.from_embeddings(embeds))
    theirs.backward()
    their_gradients = gradients(model)

    smart = algorithm_1(
        model,
        embedding="embedding",
        divergence=divergence,
        epsilon=1e-2,
        step_size=0.5,
        noise_std=0.1,
        steps=steps,
        norm="inf",
        norm_over="token",
        epsilon_scale="absolute",
        ascent="normalized",
        dropout="independent",
    )
    torch.manual_seed(5)
    ours = smart(lambda m: m(IDS)).penalty
    ours.backward()
    assert theirs.item() > 1e-2
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert_close(gradients(model), their_gradients, 1e-5)


def test_smart_pytorch_does_not_stay_inside_epsilon() -> None:
    """Its perturbation has the size of 1 for each token, whatever epsilon says; the default ascent stays inside."""
    model, seen = build(), []
    embeds = model.embedding(IDS).detach()
    torch.manual_seed(6)
    peer = smart_pytorch.SMARTLoss(
        lambda x: [seen.append(x.detach()), model.from_embeddings(x)][1], smart_pytorch.sym_kl_loss, epsilon=1e-5
    )
    peer(embeds, model.from_embeddings(embeds))
    assert (seen[-1] - embeds).abs().amax(-1).min() > 0.1  # ten thousand times epsilon
    smart = SmartLoss.paper(model, embedding="embedding")
    smart(lambda m: m(IDS))
    assert smart.stats is not None
    assert smart.stats.max_perturbation <= 1e-5


def vat(model: Classifier, noise: Tensor, epsilon: float) -> Tensor:
    """Miyato et al. 2018, equations (5) to (10) with one power iteration: ξd in, LDS out."""
    x = model.embedding(IDS)
    clean = model.from_embeddings(x).detach()
    r = noise.clone().requires_grad_()

    def distance(r: Tensor) -> Tensor:
        p, log_q = clean.softmax(-1), model.from_embeddings(x + r).log_softmax(-1)
        return (p * (clean.log_softmax(-1) - log_q)).sum(-1).mean()

    (g,) = torch.autograd.grad(distance(r), r, retain_graph=True)
    return distance(epsilon * g / g.flatten(1).norm(dim=1)[:, None, None])


def test_virtual_adversarial_training() -> None:
    model, xi, epsilon = build(dtype=torch.float64), 1e-4, 0.5
    d = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    noise = xi * d / d.flatten(1).norm(dim=1)[:, None, None]
    expected = vat(model, noise, epsilon)
    expected.backward()
    expected_gradients = gradients(model)
    smart = algorithm_1(
        model,
        embedding="embedding",
        divergence="kl",
        epsilon=epsilon,
        step_size=1e9 * xi,
        norm="2",
        norm_over="example",
        epsilon_scale="absolute",
        detach_reference=True,
    )
    penalty = smart(lambda m: m(IDS), noise=noise).penalty
    penalty.backward()
    assert expected.item() > 1e-3
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_close(gradients(model), expected_gradients, 1e-6)


def r3f(model: Classifier, z: Tensor) -> Tensor:
    """Aghajanyan et al. 2020, equation (4): KL_S(f(x + z), f(x)) = KL(a, b) + KL(b, a), gradients through both."""
    x = model.embedding(IDS)
    p, q = model.from_embeddings(x + z).log_softmax(-1), model.from_embeddings(x).log_softmax(-1)
    return (F.kl_div(p, q, log_target=True, reduction="sum") + F.kl_div(q, p, log_target=True, reduction="sum")) / 3


@pytest.mark.parametrize("law", ["uniform", "normal"])
def test_r3f(law: str) -> None:
    model, sigma = build(dtype=torch.float64), 0.1
    generator = torch.Generator().manual_seed(8)
    draw: Callable[..., Tensor] = torch.rand if law == "uniform" else torch.randn
    z = draw(3, 5, 8, dtype=torch.float64, generator=generator)
    z = sigma * (2 * z - 1 if law == "uniform" else z)
    expected = r3f(model, z)
    expected.backward()
    expected_gradients = gradients(model)
    epsilon = sigma if law == "uniform" else 1e9
    smart = algorithm_1(model, embedding="embedding", steps=0, epsilon=epsilon, epsilon_scale="absolute")
    penalty = smart(lambda m: m(IDS), noise=z).penalty
    penalty.backward()
    assert expected.item() > 1e-3
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_close(gradients(model), expected_gradients, 1e-6)


def sift(model: Classifier, noise: Tensor, epsilon: float, step: float) -> Tensor:
    """He et al. 2021, section 4: one projected ascent step on the normalised embeddings, one norm for each example."""
    x = model.norm(model.embedding(IDS))
    clean = model.after_norm(x)
    delta = noise.clone().requires_grad_()

    def distance(delta: Tensor, reference: Tensor) -> Tensor:
        p, q = model.after_norm(x + delta).log_softmax(-1), reference.log_softmax(-1)
        return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()

    (g,) = torch.autograd.grad(distance(delta, clean.detach()), delta, retain_graph=True)
    moved = delta.detach() + step * g / g.abs().amax((1, 2), keepdim=True)
    return distance(moved.clamp(-epsilon, epsilon), clean)


def test_scale_invariant_fine_tuning() -> None:
    model = build(dtype=torch.float64)
    noise = 0.1 * torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    expected = sift(model, noise, epsilon=0.2, step=0.2)
    expected.backward()
    expected_gradients = gradients(model)
    smart = algorithm_1(model, embedding="norm", epsilon=0.2, step_size=0.2, epsilon_scale="absolute")
    penalty = smart(lambda m: m(IDS), noise=noise).penalty
    penalty.backward()
    assert expected.item() > 1e-3
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_close(gradients(model), expected_gradients, 1e-6)


def test_scale_invariance_is_of_the_normalised_embeddings() -> None:
    """Word embeddings ten times as large: the same penalty behind a LayerNorm, another one before it."""
    noise = 0.1 * torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    values: dict[str, list[float]] = {"norm": [], "embedding": []}
    for factor in (1.0, 10.0):
        model = build(dtype=torch.float64)
        model.norm.eps = 0.0
        with torch.no_grad():
            model.embedding.weight.mul_(factor)
        for where, found in values.items():
            smart = SmartLoss(model, embedding=where, epsilon=0.2, step_size=0.2, epsilon_scale="absolute")
            found.append(smart(lambda m: m(IDS), noise=noise).penalty.item())
            smart.remove()
    assert values["norm"][1] == pytest.approx(values["norm"][0], rel=1e-9)
    assert values["embedding"][1] < 0.1 * values["embedding"][0]


def test_r_drop() -> None:
    """Liang et al. 2021, equation (2): half of KL both ways between two passes with their own masks."""
    model = build(dropout=0.3, dtype=torch.float64)
    torch.manual_seed(10)
    p, q = (model(IDS).log_softmax(-1) for _ in range(2))
    expected = 0.5 * (
        F.kl_div(p, q, log_target=True, reduction="batchmean") + F.kl_div(q, p, log_target=True, reduction="batchmean")
    )
    expected.backward()
    expected_gradients = gradients(model)
    smart = SmartLoss(model, embedding="embedding", epsilon=0, noise_std=0, steps=0, dropout="independent")
    torch.manual_seed(10)
    penalty = 0.5 * smart(lambda m: m(IDS)).penalty
    penalty.backward()
    assert expected.item() > 1e-3
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_close(gradients(model), expected_gradients, 1e-6)


def test_shared_dropout_is_not_r_drop() -> None:
    model = build(dropout=0.3)
    assert SmartLoss(model, embedding="embedding", epsilon=0)(lambda m: m(IDS)).penalty.item() == 0.0


def test_single_logit_trap() -> None:
    """A softmax over one logit is constant: zero for ever in smart-pytorch, an error here."""
    a, b = torch.full((4, 1), 3.0), torch.full((4, 1), -3.0)
    assert smart_pytorch.sym_kl_loss(a, b).item() == 0.0
    with pytest.raises(ValueError, match="single logit is always 1"):
        symmetric_kl(a, b)
