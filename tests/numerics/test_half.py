"""Half precision: what stays in float32, how near the penalty is, and the scales that keep float16 in range."""

import copy
from typing import Any

import numerics_models as models
import pytest
import torch
from smart_models import algorithm_1
from torch import Tensor, nn

from smartreg import SmartLoss, smoothness_penalty
from smartreg._ascent.rules import step
from smartreg._ascent.settings import SmartSettings
from smartreg._ascent.start import balls_around, noise_start

HALF = [torch.bfloat16, torch.float16]
IDS = models.sentences()


def unit_noise(model: models.Encoder) -> Tensor:
    rms = model.words(IDS).float().square().mean((1, 2), keepdim=True).sqrt().detach()
    return rms * torch.randn(*IDS.shape, 32, generator=torch.Generator().manual_seed(1))


def penalty(model: nn.Module, size: float, noise: Tensor, autocast: torch.dtype | None = None, **options: Any) -> float:
    smart = SmartLoss(model, epsilon=size, step_size=size, noise_std=size, **options)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        return smart(lambda m: m(IDS), noise=size * noise).penalty.item()


@pytest.mark.parametrize("dtype", HALF)
def test_noise_scale_and_steps_are_in_float32(dtype: torch.dtype) -> None:
    settings = SmartSettings.checked(
        epsilon=0.15,
        step_size=0.15,
        noise_std=0.15,
        steps=1,
        norm="2",
        norm_over="example",
        epsilon_scale="rms",
        ascent="projected",
        start="noise",
        dropout="shared",
        detach_reference=False,
        ascent_autocast=True,
    )
    embeddings = torch.full((2, 3, 4), 0.1, dtype=dtype)
    (ball,) = balls_around([embeddings], None, settings)
    (noise,) = noise_start([ball], None, None).perturbations
    moved, _ = step(ball, noise, torch.full_like(embeddings, 6e-5))  # squares of it are 0 in float16
    assert {ball.entry_scale.dtype, ball.norm_scale.dtype, noise.dtype, moved.dtype} == {torch.float32}
    length = moved.flatten(1).norm(dim=1)
    assert torch.all(length <= 0.15 * 0.1001 * 12**0.5)
    assert torch.all(length > 0.1 * 0.1 * 12**0.5)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("whole", [True, False])
def test_divergence_and_stats_are_in_float32(dtype: torch.dtype, whole: bool) -> None:
    model = models.build().to(dtype if whole else torch.float32)
    smart = SmartLoss(model)
    with torch.autocast("cpu", dtype, enabled=not whole):
        outputs, value = smart(lambda m: m(IDS))
    assert outputs.dtype is dtype
    assert value.dtype is torch.float32
    assert smart.stats is not None
    assert smart.stats._start_divergence.dtype is torch.float32
    assert smart.stats._max_perturbation.dtype is torch.float32
    value.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("size", [1e-3, 1e-2, 0.15, 0.5])
def test_float32_is_within_one_percent_of_float64(size: float) -> None:
    model = models.build()
    exact = penalty(models.in_float64(model), size, unit_noise(model).double())
    assert penalty(model, size, unit_noise(model)) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("size", [0.2, 0.3, 0.5])
def test_bfloat16_autocast_is_within_ten_percent_of_float64(size: float) -> None:
    model = models.build()
    exact = penalty(models.in_float64(model), size, unit_noise(model).double())
    assert penalty(model, size, unit_noise(model), torch.bfloat16) == pytest.approx(exact, rel=0.1)


def found_direction(model: models.Encoder, size: float, autocast: torch.dtype | None, **options: Any) -> Tensor:
    """Where one long step from tiny noise leads: along the ascent direction."""
    smart = algorithm_1(model, epsilon=1e3, step_size=1.0, noise_std=size, norm="2", **options)
    seen: list[Tensor] = []
    handle = model.words.register_forward_hook(lambda m, a, out: seen.append(out.detach().double()))
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        smart(lambda m: m(IDS), noise=size * unit_noise(model))
    handle.remove()
    return seen[-1] - seen[0] - size * unit_noise(model).double()


@pytest.mark.parametrize("start", ["towards_uniform", "gradient"])
@pytest.mark.filterwarnings("ignore::smartreg.SmartWarning")  # noise, by which the dtype is judged, averages out here
def test_gradients_of_long_sentences_do_not_underflow_in_float16(start: str) -> None:
    """A mean over 512 tokens leaves each a gradient below what float16 holds, once the loss scale is divided out."""
    torch.manual_seed(0)
    words, head = nn.Embedding(50, 64), nn.Linear(64, 2)
    nn.init.normal_(words.weight, std=0.05)
    nn.init.normal_(head.weight, std=0.02)
    forward = lambda m: m[1](torch.tanh(m[0](ids)).mean(1))  # noqa: E731  # short
    ids, found = torch.randint(0, 50, (8, 512)), {}
    half = nn.ModuleList([words, head]).half()
    for dtype in (torch.float16, torch.float32):
        model = copy.deepcopy(half).to(dtype)
        smart = SmartLoss(model, embedding="0", start=start, generator=torch.Generator().manual_seed(0))
        found[dtype] = float(smart(forward).penalty.detach())
        assert smart.stats.bad_examples == 0
    assert found[torch.float16] == pytest.approx(found[torch.float32], rel=0.1)


def test_the_loss_scale_is_not_in_a_step_by_the_size_of_the_gradient() -> None:
    """`ascent="normalized"` adds the gradient itself to a small number, so that its scale is felt."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(40, 3))
    ids = torch.randint(0, 20, (4, 5))
    sizes = {"epsilon": 1e-3, "step_size": 1e-3, "noise_std": 0.05, "epsilon_scale": "absolute", "norm": "inf"}
    found = []
    for dtype in (torch.float16, None):
        generator = torch.Generator().manual_seed(0)
        smart = SmartLoss(
            model, ascent="normalized", start="noise", steps=1, embedding="0", generator=generator, **sizes
        )
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            smart(lambda m: m(ids))
        found.append(smart.stats.penalty)
    assert found[0] == pytest.approx(found[1], rel=0.05)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.filterwarnings("ignore::smartreg.SmartWarning")
def test_the_ascent_without_autocast_follows_the_exact_direction(dtype: torch.dtype) -> None:
    model, size = models.build(), 1e-4
    exact = models.direction(models.in_float64(model), IDS, size * unit_noise(model).double())
    per_example = exact.flatten(1) / exact.flatten(1).norm(dim=1, keepdim=True)

    def cosine(**options: Any) -> float:
        found = found_direction(copy.deepcopy(model), size, dtype, **options).flatten(1)
        return float((found / found.norm(dim=1, keepdim=True) * per_example).sum(1).mean())

    assert cosine(ascent_autocast=False) > 0.99
    assert cosine(ascent_autocast=True) < 0.9


@pytest.mark.parametrize("dtype", HALF)
def test_the_ascent_under_autocast_where_the_model_permits_it(dtype: torch.dtype) -> None:
    model, size = models.build(), 0.15
    exact = models.direction(models.in_float64(model), IDS, size * unit_noise(model).double())
    found = models.direction(model, IDS, size * unit_noise(model), dtype)
    assert models.cosine(found, exact) > 0.95


def test_a_step_under_grad_scaler_in_float16() -> None:
    """The user's scaler sees finite gradients that are those of float32, and steps."""
    steps = {}
    for name, dtype in (("float16", torch.float16), ("float32", None)):
        model = models.build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype is not None)
        smart = SmartLoss(model)
        before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            outputs, value = smart(lambda m: m(IDS), noise=0.15 * unit_noise(model))
            loss = nn.functional.cross_entropy(outputs, IDS[:, 0] % 3) + 10.0 * value
        assert all(p.grad is None for p in model.parameters())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        steps[name] = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert steps["float16"].norm() > 0
    assert models.cosine(steps["float16"], steps["float32"]) > 0.995


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_gradients_that_are_there_stay(memory_efficient: bool) -> None:
    model = models.build()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.autocast("cpu", torch.float16):
        SmartLoss(model, memory_efficient=memory_efficient)(lambda m: m(IDS))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in model.parameters())


class Steep(nn.Module):
    """Its gradient for the embeddings is `slope` in float16, under whatever loss scale it is taken."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 4)
        self.slope = slope

    def forward(self, ids: Tensor) -> Tensor:
        return (self.words(ids) * self.slope).mean(1)


@pytest.mark.parametrize(
    "search",
    [{}, {"memory_efficient": True}, {"start": "noise", "noise_std": 0.15, "steps": 1}],
    ids=["start", "start, memory-efficient", "step"],
)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_the_inner_scale_is_halved_on_overflow_until_it_fits(search: dict[str, Any], grad: bool) -> None:
    """Squared error of slope 400 in float16: 4096 times the gradient is out of range, a fraction of it is not."""
    torch.manual_seed(2)
    model = Steep(400.0).half()
    smart = SmartLoss(model, embedding="words", divergence="mse", **search)
    scales, bad = [], []
    for _ in range(8):
        with torch.set_grad_enabled(grad):
            smart(lambda m: m(IDS))
        scales.append(smart._looks.loss_scale.get(torch.device("cpu"), torch.float16).item())
        assert smart.stats is not None
        bad.append(smart.stats.bad_examples)
    assert bad[0] > 0
    assert scales[0] == 2048.0
    assert bad[-1] == 0
    assert scales[-1] == scales[-2] < 2048.0


@pytest.mark.parametrize("autocast", [None, *HALF])
def test_one_bad_example_leaves_the_others_alone(autocast: torch.dtype | None) -> None:
    """Its gradient is not finite: it is counted, and the others' embeddings are those of a batch without it."""

    class Bad(nn.Module):
        def __init__(self, inner: models.Encoder) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: Tensor) -> Tensor:
            logits = self.inner(ids)
            slope = torch.where((ids[:, :1] == 49) & (logits != logits.detach() + 1), torch.inf, 1.0)
            return _Slope.apply(logits, slope)

    model = models.build()
    ids = IDS.clone()
    ids[:, 0] = torch.arange(6)
    ids[2, 0] = 49
    noise = 0.15 * unit_noise(model)
    seen: list[Tensor] = []
    model.words.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    smart = algorithm_1(Bad(model), embedding="inner.words")
    deltas = {}
    for name, rows in (("with", [0, 1, 2, 3, 4, 5]), ("without", [0, 1, 3, 4, 5])):
        seen.clear()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            value = smart(lambda m, rows=rows: m(ids[rows]), noise=noise[rows]).penalty
        deltas[name] = (seen[-1] - seen[0])[[r != 2 for r in rows]]
        assert smart.stats is not None
        assert smart.stats.bad_examples == (name == "with")
        assert torch.isfinite(value)
    assert torch.allclose(deltas["with"], deltas["without"], atol=1e-3 if autocast else 1e-6)


class _Slope(torch.autograd.Function):
    """The identity, whose backward multiplies by `slope`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return gradient * slope.to(gradient.dtype), None


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_the_functional_form_in_every_dtype(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    embeds = torch.randn(4, 5, 8, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(4, 5, 8, generator=generator, dtype=torch.float64)
    exact = smoothness_penalty(lambda x: x.tanh().mean(1) @ head, embeds, noise=noise, epsilon=0.3, step_size=0.3)
    found = smoothness_penalty(
        lambda x: x.tanh().mean(1) @ head.to(dtype), embeds.to(dtype), noise=noise, epsilon=0.3, step_size=0.3
    )
    assert found.penalty.dtype is torch.promote_types(dtype, torch.float32)
    assert found.penalty.item() == pytest.approx(exact.penalty.item(), rel=0.1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", HALF)
def test_on_cuda_as_on_the_cpu(dtype: torch.dtype) -> None:
    model = models.build()
    exact = penalty(models.in_float64(model), 0.3, unit_noise(model).double())
    noise, device = unit_noise(model), torch.device("cuda")
    moved = copy.deepcopy(model).to(device)
    smart = SmartLoss(moved, epsilon=0.3, step_size=0.3, noise_std=0.3)
    with torch.autocast("cuda", dtype):
        value = smart(lambda m: m(IDS.to(device)), noise=0.3 * noise.to(device)).penalty
    assert value.item() == pytest.approx(exact, rel=0.1)
