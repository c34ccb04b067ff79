"""`SmartLoss` on unmodified Hugging Face models, against the same mathematics through their `inputs_embeds`."""

import copy
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from smart_models import algorithm_1
from tiny_transformers import FAMILIES, LABELS, VOCABULARY, batch, build, masks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smartreg import SmartLoss, symmetric_kl

EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)
BOTH_MODES = pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "memory-efficient"])
EPSILON, STEP_SIZE, NOISE = 0.05, 0.04, 0.02


def compared(name: str) -> Any:
    return (lambda out: (out.start_logits, out.end_logits)) if name == "question answering" else None


def logits_of(output: Any) -> list[Tensor]:
    return [output.logits] if hasattr(output, "logits") else [output.start_logits, output.end_logits]


def smart_loss(name: str, model: nn.Module, **options: Any) -> SmartLoss:
    return algorithm_1(model, output_to_logits=compared(name), **options)


def by_inputs_embeds(name: str, model: nn.Module, inputs: dict[str, Tensor], noise: Sequence[Tensor]) -> Tensor:
    """One ascent step in the max-norm per example, with no hook: the public `inputs_embeds` arguments carry x + δ."""
    embeddings = {key: model.get_submodule(path)(inputs[key]) for key, path in FAMILIES[name].embeddings.items()}
    others = {key: value for key, value in inputs.items() if key not in embeddings}
    real = [mask.unsqueeze(-1) != 0 for mask in masks(inputs)]

    def divergence(deltas: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
        moved = {
            key.replace("input_ids", "inputs_embeds"): x + d
            for (key, x), d in zip(embeddings.items(), deltas, strict=True)
        }
        pairs = zip(logits_of(model(**moved, **others)), reference, strict=True)
        return torch.stack([symmetric_kl(perturbed, clean) for perturbed, clean in pairs]).sum()

    clean = logits_of(model(**inputs))
    deltas = [torch.where(r, n, 0.0).requires_grad_() for r, n in zip(real, noise, strict=True)]
    gradients = torch.autograd.grad(divergence(deltas, clean), deltas)
    ascended = []
    for delta, gradient, visible in zip(deltas, gradients, real, strict=True):
        gradient = torch.where(visible, gradient, 0.0)
        direction = gradient / gradient.abs().amax(dim=(1, 2), keepdim=True)
        ascended.append((delta.detach() + STEP_SIZE * direction).clamp(-EPSILON, EPSILON))
    return divergence(ascended, clean)


@EVERY_FAMILY
@BOTH_MODES
def test_penalty_and_gradients_are_those_of_the_inputs_embeds_path(name: str, memory_efficient: bool) -> None:
    model, inputs = build(name).eval(), batch(name)
    generator = torch.Generator().manual_seed(1)
    noise = [NOISE * torch.randn(*m.shape, 16, generator=generator, dtype=torch.float64) for m in masks(inputs)]

    expected = by_inputs_embeds(name, model, inputs, noise)
    trainable = [p for p in model.parameters() if p.requires_grad]
    expected_gradients = torch.autograd.grad(expected, trainable, allow_unused=True)

    smart = smart_loss(
        name,
        model,
        epsilon=EPSILON,
        step_size=STEP_SIZE,
        epsilon_scale="absolute",
        memory_efficient=memory_efficient,
    )
    _, penalty = smart(lambda m: m(**inputs), mask=masks(inputs), noise=noise)
    gradients = torch.autograd.grad(penalty, trainable, allow_unused=True)

    assert expected.item() > 1e-4
    torch.testing.assert_close(penalty, expected, rtol=1e-9, atol=1e-15)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)


@EVERY_FAMILY
@BOTH_MODES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_perturbation_under_dropout_gives_exactly_zero(name: str, memory_efficient: bool, attention: str) -> None:
    model, inputs = build(name, dropout=0.3, dtype=torch.float32, attention=attention).train(), batch(name)

    def penalty(dropout: Any) -> float:
        smart = smart_loss(name, model, epsilon=0.0, dropout=dropout, memory_efficient=memory_efficient)
        return smart(lambda m: m(**inputs), mask=masks(inputs)).penalty.item()

    assert penalty("shared") == 0.0
    assert penalty("independent") > 1e-3


@EVERY_FAMILY
def test_the_perturbed_pass_with_no_perturbation_gives_the_logits_of_the_ids(name: str) -> None:
    """Fed to `inputs_embeds`, the output of a whole embedding block would get positions and LayerNorm twice."""
    model, inputs = build(name).eval(), batch(name)
    seen: list[list[Tensor]] = []

    def spy(first: Tensor, second: Tensor) -> Tensor:
        seen.append([first.detach(), second.detach()])
        return symmetric_kl(first, second)

    smart = smart_loss(name, model, epsilon=0.0, divergence=spy)
    outputs, penalty = smart(lambda m: m(**inputs), mask=masks(inputs))
    wanted = logits_of(model(**inputs))

    assert penalty.item() == 0.0
    assert type(outputs) is type(model(**inputs))
    assert len(seen) == len(wanted)
    for (perturbed, clean), found, logits in zip(seen, logits_of(outputs), wanted, strict=True):
        assert torch.equal(perturbed, logits)
        assert torch.equal(clean, logits)
        assert torch.equal(found, logits)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.tied])
def test_a_tied_output_projection_has_no_hook(name: str) -> None:
    model = build(name)
    projection = model.get_submodule(FAMILIES[name].tied)
    smart = smart_loss(name, model)

    assert projection.weight is model.get_input_embeddings().weight
    assert not projection._forward_hooks
    assert all(model.get_submodule(path)._forward_hooks for path in FAMILIES[name].embeddings.values())
    smart.remove()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_and_decoder_each_need_a_mask(name: str) -> None:
    model, inputs = build(name), batch(name)
    with pytest.raises(ValueError, match="one tensor for each embedding look-up, in order: expected 2, got 1"):
        SmartLoss(model)(lambda m: m(**inputs), mask=inputs["attention_mask"])


def test_padding_of_encoder_and_decoder_stays_where_it_is() -> None:
    model, inputs = build("bart").eval(), batch("bart")
    embedded: list[Tensor] = []
    for path in FAMILIES["bart"].embeddings.values():
        model.get_submodule(path).register_forward_hook(lambda module, args, out: embedded.append(out.detach()))
    given = masks(inputs)
    given[1][2, 3:] = 0
    smart = SmartLoss(model)
    for path in FAMILIES["bart"].embeddings.values():  # ours first, so that the recorder sees what the model sees
        hooks = model.get_submodule(path)._forward_hooks
        hooks.move_to_end(next(iter(hooks)))
    smart(lambda m: m(**inputs), mask=given)

    clean, perturbed = embedded[:2], embedded[-2:]
    for before, after, mask in zip(clean, perturbed, given, strict=True):
        moved = (after - before).abs().amax(-1) > 0
        assert torch.equal(moved, mask != 0)


def train(model: nn.Module, smart: SmartLoss | None, steps: int = 30) -> list[float]:
    """The loop of the README: with `SmartLoss` five lines differ."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (12, 6), generator=generator)
    labels = ids[:, 0] % LABELS
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        if smart is None:
            logits, penalty = model(input_ids=ids).logits, 0.0
        else:
            outputs, penalty = smart(lambda m: m(input_ids=ids))
            logits = outputs.logits
        loss = nn.functional.cross_entropy(logits, labels) + 0.3 * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@BOTH_MODES
def test_an_unmodified_bert_trains_in_five_changed_lines(memory_efficient: bool) -> None:
    model = build("bert", dropout=0.1, dtype=torch.float32).train()
    untouched = copy.deepcopy(model)
    losses = train(model, SmartLoss(model, memory_efficient=memory_efficient))
    plain = train(untouched, None)

    assert losses[-1] < 0.5 * losses[0]
    assert losses != plain
    assert [name for name, _ in model.named_modules()] == [name for name, _ in untouched.named_modules()]


@BOTH_MODES
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning:transformers.*")
def test_checkpointed_layers_give_the_same_penalty_and_gradients(memory_efficient: bool) -> None:
    inputs, found = batch(), []
    for checkpointed in (False, True):
        model = build(dropout=0.3).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(3)
        smart = SmartLoss(model, memory_efficient=memory_efficient)
        outputs, penalty = smart(lambda m, i=inputs: m(**i), mask=inputs["attention_mask"])
        (outputs.logits.square().sum() + penalty).backward()
        found.append((penalty.detach(), {name: p.grad for name, p in model.named_parameters()}, torch.rand(3)))
        zero = SmartLoss(model, epsilon=0.0, memory_efficient=memory_efficient)
        assert zero(lambda m, i=inputs: m(**i)).penalty.item() == 0.0
    assert found[0][0].item() > 1e-4
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-13)


@BOTH_MODES
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning:transformers.*")
def test_reentrant_checkpointing_is_refused_by_torch_with_the_remedy(memory_efficient: bool) -> None:
    model, inputs = build(dropout=0.1).train(), batch()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    smart = SmartLoss(model, memory_efficient=memory_efficient)
    with pytest.raises(RuntimeError, match="set use_reentrant=False"):
        smart(lambda m: m(**inputs))
    assert all(p.requires_grad for p in model.parameters())


class CheckpointedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 2)

    def body(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).tanh()).mean(1)

    def forward(self, ids: Tensor) -> Tensor:
        return checkpoint(self.body, ids, use_reentrant=False)


@BOTH_MODES
def test_a_checkpointed_embedding_is_an_error_not_a_missing_perturbation(memory_efficient: bool) -> None:
    torch.manual_seed(0)
    model, ids = CheckpointedEmbedding(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    smart = SmartLoss(model, embedding="embedding", memory_efficient=memory_efficient)
    with pytest.raises(RuntimeError, match="recomputed inside a backward, where its perturbation is gone"):
        smart(lambda m: m(ids))
    smart.remove()
    model(ids).sum().backward()


class TorchEncoder(nn.Module):
    """`nn.TransformerEncoderLayer`, which has a fused path of its own for evaluation without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, LABELS)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(ids), src_key_padding_mask=mask == 0)[:, 0])


@BOTH_MODES
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning:torch.nn")
@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder_layer(memory_efficient: bool, training: bool) -> None:
    torch.manual_seed(0)
    model, inputs = TorchEncoder().train(training), batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def call(**options: Any) -> Any:
        smart = SmartLoss(model, embedding="embedding", memory_efficient=memory_efficient, **options)
        return smart(lambda m: m(ids, mask), mask=mask)

    assert call(epsilon=0.0).penalty.item() == 0.0
    outputs, penalty = call()
    assert penalty.item() > 1e-6
    penalty.backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        quiet = call(noise_std=0.1)
    assert quiet.penalty.item() > 1e-6
    if not training:
        # The fused path of the clean pass and the ordinary one of the ascent differ by rounding alone.
        assert call(epsilon=0.0, steps=0).penalty.item() < 1e-10
        torch.testing.assert_close(quiet.outputs, outputs, rtol=1e-4, atol=1e-5)


def test_a_deep_copy_and_a_saved_model_carry_no_switch() -> None:
    model, inputs = build().eval(), batch()
    smart = SmartLoss(model)
    copies: list[nn.Module] = []
    file = io.BytesIO()

    wanted = model(**inputs).logits

    def forward(m: nn.Module) -> Any:
        if not copies:  # in the middle of a pass
            copies.append(copy.deepcopy(m))
            torch.save(m, file)
        assert torch.equal(copies[0](**inputs).logits, wanted)  # in the perturbed passes as well
        return m(**inputs)

    smart(forward)
    assert b"smartreg" not in file.getvalue()  # it loads where the package is not installed
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    for other in copies:
        assert torch.equal(other(**inputs).logits, wanted)
        penalty = SmartLoss(other)(lambda m: m(**inputs)).penalty
        assert penalty.item() > 1e-6


def test_generation_with_the_hook_in_place() -> None:
    model = build("gpt2", dtype=torch.float32).eval()
    ids = batch("gpt2")["input_ids"][:1]
    before = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    smart = SmartLoss(model)
    smart(lambda m: m(input_ids=ids))
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0), before)


def test_a_model_whose_logits_are_left_out_says_so() -> None:
    output = transformers.modeling_outputs.SequenceClassifierOutput(loss=torch.zeros(()), logits=None)
    model, inputs = build(), batch()

    def forward(m: nn.Module) -> Any:
        m(**inputs)
        return output

    with pytest.raises(TypeError, match="fused cross-entropy kernels"):
        SmartLoss(model)(forward)
