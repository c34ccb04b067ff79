"""The recipes of the documentation, executed: plain loops, Accelerate, PEFT."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import accelerate
import peft
import pytest
import recipes
import reference
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from smart_models import algorithm_1
from tiny_transformers import FAMILIES, LABELS, VOCABULARY, build
from torch import Tensor, nn

from smartreg import MomentumBregman, SmartLoss, token_mask

# What accelerate's own data loader does with a recent torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning:(accelerate|transformers|peft).*")

TOKENS, WIDTH = 8, 16


class Sentences(torch.utils.data.Dataset):
    def __init__(self, examples: int = 8) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, VOCABULARY, (examples, TOKENS), generator=generator)
        self.mask = torch.arange(TOKENS) < torch.randint(3, TOKENS + 1, (examples, 1), generator=generator)
        self.ids[~self.mask] = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": self.mask[index].long(), "labels": ids[0] % LABELS}


def loader(batch_size: int, examples: int = 8) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Sentences(examples), batch_size=batch_size)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class SeededSmartLoss(SmartLoss):
    """Draws the noise of an example from its embeddings, so that it does not depend on how batches are cut."""

    def forward(self, *args: Any, **options: Any) -> Any:
        return super().forward(*args, noise=lambda x: 0.3 * torch.sin(1e3 * x), **options)


def names(
    model: nn.Module, batch_size: int, smart_loss: type[SmartLoss] = SeededSmartLoss, **more: Any
) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return {
        "SmartLoss": smart_loss,
        "MomentumBregman": MomentumBregman,
        "model": model,
        "optimizer": optimizer,
        "loader": loader(batch_size),
        "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        **more,
    }


def test_accumulated_batches_are_one_large_batch() -> None:
    model = build()
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    wanted = recipes.run("loop.py", **names(whole, 8))
    found = recipes.run("accumulation.py", **names(parts, 2), accumulation_steps=4)

    assert not torch.equal(whole.classifier.weight, model.classifier.weight)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["bregman"].state_dict(), wanted["bregman"].state_dict(), rtol=1e-9, atol=1e-12)
    assert found["bregman"].updates == 1


def counting_smart_loss() -> tuple[type[SmartLoss], list[int]]:
    calls: list[int] = []

    class Counting(SmartLoss):
        def forward(self, *args: Any, **options: Any) -> Any:
            calls.append(1)
            return super().forward(*args, **options)

    return Counting, calls


@pytest.mark.parametrize(
    ("title", "more", "expected"), [("warm_up.py", {"warm_up_steps": 2}, 3), ("every_kth_step.py", {}, 1)]
)
def test_steps_without_penalty_do_not_call_it(title: str, more: dict[str, Any], expected: int) -> None:
    smart_loss, calls = counting_smart_loss()
    model = build().train()
    before = weights(model)
    recipes.run(title, **names(model, 2, smart_loss), **more)
    assert len(calls) == expected
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])


@pytest.fixture
def accelerator() -> Any:
    """Makes one, and forgets the state that accelerate keeps for the process."""

    def make(**options: Any) -> accelerate.Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return accelerate.Accelerator(cpu=True, **options)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_accelerate_with_accumulation_gives_the_weights_of_one_large_batch(accelerator: Callable[..., Any]) -> None:
    model = build()
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    recipes.run("loop.py", **names(whole, 8))
    found = recipes.run("accelerate_loop.py", **names(parts, 2), accelerator=accelerator(gradient_accumulation_steps=4))
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-9, atol=1e-12)
    assert found["bregman"].updates == 1


def test_accelerate_saves_the_teacher(accelerator: Callable[..., Any], tmp_path: Path) -> None:
    one = accelerator()
    model = build()
    found = recipes.run("accelerate_loop.py", **names(model, 4), accelerator=one)
    bregman, saved = found["bregman"], {key: value.clone() for key, value in found["bregman"].state_dict().items()}
    one.save_state(tmp_path)
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    bregman.update()
    assert bregman.updates == 3
    one.load_state(tmp_path)
    assert bregman.updates == 2
    torch.testing.assert_close(dict(bregman.state_dict()), saved, rtol=0, atol=0)


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "memory-efficient"])
def test_accelerate_in_bfloat16(accelerator: Callable[..., Any], memory_efficient: bool) -> None:
    class Options(SmartLoss):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model, memory_efficient=memory_efficient)

    model = build(dropout=0.3, dtype=torch.float32).train()
    found = recipes.run(
        "accelerate_loop.py", **names(model, 4, Options), accelerator=accelerator(mixed_precision="bf16")
    )
    smart, bregman, batch = found["smart"], found["bregman"], found["batch"]
    assert found["penalty"].dtype == torch.float32
    assert smart.stats.penalty > 1e-4
    assert smart.stats.bad_examples == 0
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert bregman.updates == 2

    zero = algorithm_1(found["model"], epsilon=0.0, memory_efficient=memory_efficient)
    assert zero(lambda m: m(**batch)).penalty.item() == 0.0
    # Made from the prepared model, the teacher rounds as the model does.
    model.eval()
    fresh = MomentumBregman(found["model"])
    assert fresh(lambda m: m(**batch), found["model"](**batch)).item() == 0.0
    assert (bregman.teacher.forward.__self__) is bregman.teacher


LORA = {
    "attention": {"target_modules": ["query", "value"]},
    "embedding": {"target_modules": ["query", "word_embeddings"]},
    "embedding saved whole": {"target_modules": ["query"], "modules_to_save": ["word_embeddings", "classifier"]},
    "trainable tokens": {"target_modules": ["query"], "trainable_token_indices": [3, 4]},
}


def lora(kind: str, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="SEQ_CLS", lora_dropout=dropout, init_lora_weights=False, **LORA[kind])
    return peft.get_peft_model(build(dropout=dropout), config)


@pytest.mark.parametrize("kind", LORA)
@pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "memory-efficient"])
def test_adapters(kind: str, memory_efficient: bool) -> None:
    model = lora(kind, dropout=0.3).train()
    (batch,) = loader(4, 4)
    mask = batch["attention_mask"]
    before = {name: p.requires_grad for name, p in model.named_parameters()}

    zero = SmartLoss(model, epsilon=0.0, memory_efficient=memory_efficient)
    assert zero(lambda m: m(**batch), mask=mask).penalty.item() == 0.0
    outputs, penalty = SmartLoss(model, memory_efficient=memory_efficient)(lambda m: m(**batch), mask=mask)
    assert penalty.item() > 1e-4
    (outputs.loss + penalty).backward()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["embedding", "embedding saved whole", "trainable tokens"])
def test_an_adapted_embedding_is_perturbed_once_behind_its_adapter(kind: str) -> None:
    model = lora(kind).eval()
    (batch,) = loader(4, 4)
    adapted = model.get_submodule(f"base_model.model.{FAMILIES['bert'].embeddings['input_ids']}")
    noise = 0.1 * torch.randn(4, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen: list[Tensor] = []
    smart = SmartLoss(model, steps=0, epsilon=10.0)
    adapted.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    smart(lambda m: m(**batch), noise=noise)

    clean, *_, perturbed = seen
    original = build().get_input_embeddings().weight[batch["input_ids"]]
    if kind == "embedding":
        assert (clean - original).abs().max() > 1e-3  # its adapter takes part
    torch.testing.assert_close(perturbed - clean, noise, rtol=1e-9, atol=1e-12)


def test_the_teacher_of_a_lora_model_holds_the_adapters_alone() -> None:
    found = recipes.run(
        "lora.py",
        model=build(),
        get_peft_model=peft.get_peft_model,
        LoraConfig=peft.LoraConfig,
        SmartLoss=SmartLoss,
        MomentumBregman=MomentumBregman,
    )
    model, bregman = found["model"], found["bregman"]
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own = sum(p.numel() for p in bregman.teacher.parameters() if p.untyped_storage().data_ptr() not in storages)
    assert own == sum(trainable.values())
    assert own < 0.2 * sum(p.numel() for p in model.parameters())
    averages = {key for key in bregman.state_dict() if key.startswith("average.")}
    assert averages == {f"average.{name}" for name in trainable}

    (batch,) = loader(4, 4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        outputs, penalty = found["smart"](lambda m: m(**batch), mask=batch["attention_mask"])
        proximal = bregman(lambda m: m(**batch), outputs)
        optimizer.zero_grad()
        (outputs.loss + penalty + proximal).backward()
        optimizer.step()
        bregman.update()
    assert proximal.item() > 1e-9

    model.add_adapter("second", peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with pytest.raises(RuntimeError, match=r"only in the model: .*lora_A\.second.*Make a new one"):
        bregman(lambda m: m(**batch), outputs)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning:transformers.*")
def test_the_checkpointing_recipe() -> None:
    model = build(dtype=torch.float32).train()
    found = recipes.run("checkpointing.py", model=model, SmartLoss=SmartLoss)
    (batch,) = loader(4, 4)
    outputs, penalty = found["smart"](lambda m: m(**batch))
    (outputs.loss + penalty).backward()
    assert penalty.item() > 1e-6
    assert all(p.grad is not None for p in model.parameters())


def test_every_recipe_with_a_name_is_executed() -> None:
    assert set(recipes.BLOCKS) == {
        "loop.py",
        "tokens.py",
        "causal.py",
        "warm_up.py",
        "every_kth_step.py",
        "accumulation.py",
        "accelerate_loop.py",
        "lora.py",
        "compile.py",
        "checkpointing.py",
    }


class Tokens(torch.utils.data.Dataset):
    """Four sentences, padded to a width; the first token of each and what follows the end have no label."""

    def __init__(self, width: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.tensor([6, 4, 5, 3]).unsqueeze(1)
        ids = torch.randint(3, VOCABULARY, (4, 6), generator=generator)
        labels = torch.randint(classes, (4, 6), generator=generator)
        real = torch.arange(6) < lengths
        labels[~real], labels[:, 0] = -100, -100
        pad = (0, width - 6)
        self.ids = nn.functional.pad(ids * real, pad)
        self.mask = nn.functional.pad(real.long(), pad)
        self.labels = nn.functional.pad(labels, pad, value=-100)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "attention_mask": self.mask[index], "labels": self.labels[index]}


class OneNoise(SmartLoss):
    """Draws the noise of a token from its embedding, so that it does not depend on the padding."""

    penalties: ClassVar[list[float]] = []

    def forward(self, *args: Any, **options: Any) -> Any:
        found = super().forward(*args, noise=lambda x: 0.1 * torch.sin(1e3 * x), **options)
        self.penalties.append(found.penalty.item())
        return found


def token_classifier() -> nn.Module:
    torch.manual_seed(0)
    config = build("bert").config
    return transformers.BertForTokenClassification(config).double()


@pytest.mark.parametrize("title", ["tokens.py", "causal.py"])
def test_padding_of_token_outputs_changes_nothing(title: str) -> None:
    make = token_classifier if title == "tokens.py" else (lambda: build("gpt2"))
    found = []
    for width in (6, 12):
        model = make().train()
        OneNoise.penalties.clear()
        data = torch.utils.data.DataLoader(Tokens(width, LABELS), batch_size=4)
        smart_loss: Any = functools.partial(OneNoise, start="noise", steps=0, epsilon=1.0)
        recipes.run(title, **names(model, 4, smart_loss, loader=data, token_mask=token_mask))
        found.append((OneNoise.penalties[0], weights(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    assert found[0][0] > 0
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("title", ["tokens.py", "causal.py"])
def test_the_positions_of_the_loss_are_compared(title: str) -> None:
    """The penalty is the mean over the very logits that the model's own cross-entropy takes."""
    causal = title == "causal.py"
    model = (build("gpt2") if causal else token_classifier()).train()
    twin = copy.deepcopy(model)
    OneNoise.penalties.clear()
    data = torch.utils.data.DataLoader(Tokens(9, LABELS), batch_size=4)
    smart_loss: Any = functools.partial(OneNoise, start="noise", steps=0, epsilon=1.0)
    recipes.run(title, **names(model, 4, smart_loss, loader=data, token_mask=token_mask))
    batch = next(iter(data))
    x = twin.get_input_embeddings()(batch["input_ids"])
    delta = 0.1 * torch.sin(1e3 * x) * batch["attention_mask"].unsqueeze(-1)  # inside the ball of one RMS
    labels = batch["labels"][:, 1:] if causal else batch["labels"]
    outputs = []
    for embeds in (x + delta, x):
        logits = twin(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        outputs.append((logits[:, :-1] if causal else logits)[labels != -100].detach().numpy())
    assert OneNoise.penalties[0] == pytest.approx(reference.symmetric_kl(*outputs), rel=1e-8)
