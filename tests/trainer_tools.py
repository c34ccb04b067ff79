"""Small tasks of every kind for the trainers, and the loop that a person would write for them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_transformers import _ENCODER, LABELS, VOCABULARY, build
from torch import Tensor, nn
from torch.nn import functional

from smartreg import MomentumBregman, SmartLoss, token_mask

TOKENS, ROWS, LAMBDA, MU, BETA, RATE = 8, 8, 0.7, 3.0, 0.6, 0.05
SEARCH = {"start": "noise", "noise_std": 0.15, "steps": 1}  # draws numbers, and has a step to gain by


def row_noise(embeddings: Tensor) -> Tensor:
    """A start that depends on the row alone, not on how rows are put into batches."""
    return 0.3 * torch.sin(1e3 * embeddings)


def bert(kind: str, labels: int, dropout: float = 0.0, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **_ENCODER, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=labels, **more
    )
    return getattr(transformers, f"BertFor{kind}")(config).double()


def llama(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, **sizes, initializer_range=0.3, attention_dropout=dropout, max_position_embeddings=40
    )
    return transformers.LlamaForCausalLM(config).double()


def rows(count: int = ROWS, seed: int = 0) -> dict[str, Tensor]:
    """Sentences of different lengths, padded to one, and labels of every kind."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, TOKENS), generator=generator)
    mask = torch.arange(TOKENS) < torch.randint(3, TOKENS + 1, (count, 1), generator=generator)
    ids[~mask] = 0
    return {"input_ids": ids, "attention_mask": mask.long()}


def with_padding_ignored(ids: Tensor, mask: Tensor) -> Tensor:
    return ids.where(mask.bool(), -100)


@dataclass(frozen=True)
class Case:
    """A kind of head: its model, its labels, and how a person would write its loss.

    Attributes:
        model: From the dropout probability.
        labels: From ids and mask.
        task: From outputs and batch to the loss of a whole step.
        divergence: The one that belongs to the head.
        share: From the batch to what the mean of a penalty is multiplied with, 1 unless the loss counts otherwise.
    """

    model: Callable[..., nn.Module]
    labels: Callable[[Tensor, Tensor], dict[str, Tensor]]
    task: Callable[[Any, dict[str, Tensor]], Tensor]
    divergence: str = "symmetric_kl"
    output_to_logits: Callable[[Any], Any] | None = None
    output_mask: Callable[[dict[str, Tensor]], Tensor] | None = None
    masks: Callable[[dict[str, Tensor]], Any] = lambda batch: batch["attention_mask"]
    share: Callable[[dict[str, Tensor]], float] = lambda batch: 1.0


def _classes(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"labels": ids[:, 0] % LABELS}


def _several(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"labels": (ids[:, :LABELS] % 2).double()}


def _tokens(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"labels": with_padding_ignored(ids % LABELS, mask)}


def _next(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    labels = with_padding_ignored(ids, mask)
    labels[::2, 1] = -100  # a prompt
    return {"labels": labels}


def _next_but_the_first(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Versions of the Trainer differ in whether they count the label of the first token, which no logits are for."""
    labels = _next(ids, mask)["labels"]
    labels[:, 0] = -100
    return {"labels": labels}


def _spans(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"start_positions": ids[:, 0] % 3, "end_positions": ids[:, 1] % 3}


def next_tokens(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
    """The sum over the targets, not yet divided."""
    return functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


def shifted(batch: dict[str, Tensor]) -> Tensor:
    return token_mask(batch["labels"], shift=True)


def unshifted(batch: dict[str, Tensor]) -> Tensor:
    return token_mask(batch["labels"])


def decoder_masks(batch: dict[str, Tensor]) -> list[Tensor]:
    """Real is what has a label: the start token, and what follows a label but the last."""
    return [batch["attention_mask"], batch["labels"] != -100]


CASES = {
    "one label": Case(
        lambda dropout=0.0: bert("SequenceClassification", LABELS, dropout),
        _classes,
        lambda out, batch: functional.cross_entropy(out.logits, batch["labels"]),
    ),
    "regression": Case(
        lambda dropout=0.0: bert("SequenceClassification", 1, dropout),
        lambda ids, mask: {"labels": ids[:, 0].double() / VOCABULARY},
        lambda out, batch: (out.logits[:, 0] - batch["labels"]).square().mean(),
        divergence="mse",
    ),
    "several labels": Case(
        lambda dropout=0.0: bert("SequenceClassification", LABELS, dropout),
        _several,
        lambda out, batch: functional.binary_cross_entropy_with_logits(out.logits, batch["labels"]),
        divergence="binary_symmetric_kl",
    ),
    "tokens": Case(
        lambda dropout=0.0: bert("TokenClassification", LABELS, dropout),
        _tokens,
        lambda out, batch: functional.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten()),
        output_mask=unshifted,
    ),
    "causal, Llama": Case(
        llama,
        _next_but_the_first,
        lambda out, batch: next_tokens(out, batch) / shifted(batch).sum(),
        output_mask=shifted,
    ),
    "causal, GPT-2": Case(  # the Trainer counts its labels before they are shifted
        lambda dropout=0.0: build("gpt2", dropout=dropout),
        _next,
        lambda out, batch: next_tokens(out, batch) / unshifted(batch).sum(),
        output_mask=shifted,
        share=lambda batch: shifted(batch).sum().item() / unshifted(batch).sum().item(),
    ),
    "sequence to sequence": Case(
        lambda dropout=0.0: build("t5", dropout=dropout),
        lambda ids, mask: {"labels": with_padding_ignored(ids, mask).flip(0)},
        lambda out, batch: functional.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten()),
        output_mask=unshifted,
        masks=decoder_masks,
    ),
    "question answering": Case(
        lambda dropout=0.0: bert("QuestionAnswering", 2, dropout),
        _spans,
        lambda out, batch: (
            (
                functional.cross_entropy(out.start_logits, batch["start_positions"])
                + functional.cross_entropy(out.end_logits, batch["end_positions"])
            )
            / 2
        ),
        output_to_logits=lambda out: (out.start_logits, out.end_logits),
    ),
}


def batch_of(name: str, count: int = ROWS, seed: int = 0) -> dict[str, Tensor]:
    batch = rows(count, seed)
    return {**batch, **CASES[name].labels(batch["input_ids"], batch["attention_mask"])}


class Rows(torch.utils.data.Dataset):
    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(next(iter(self.batch.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[index] for key, value in self.batch.items()}


def by_hand(
    name: str,
    model: nn.Module,
    batch: dict[str, Tensor],
    steps: int,
    *,
    task: Callable[[Any, dict[str, Tensor]], Tensor] | None = None,
) -> MomentumBregman:
    """The whole batch at every step, in the five lines of the start page; trains `model`, returns its teacher."""
    case = CASES[name]
    compare = {"divergence": case.divergence, "output_to_logits": case.output_to_logits}
    smart, bregman = SmartLoss(model, **compare, **SEARCH), MomentumBregman(model, beta=BETA, **compare)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    output_mask = None if case.output_mask is None else case.output_mask(batch)
    model.train()
    for _ in range(steps):
        outputs, penalty = smart(lambda m: m(**batch), mask=case.masks(batch), output_mask=output_mask)
        proximal = bregman(lambda m: m(**batch), outputs, output_mask=output_mask)
        loss = (task or case.task)(outputs, batch) + case.share(batch) * (LAMBDA * penalty + MU * proximal)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bregman.update()
    assert penalty > 1e-6
    assert proximal > 1e-9
    return bregman


def arguments(folder: Path, kind: type, **options: Any) -> Any:
    """Arguments of a run without anything that is beside the point."""
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    plain = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    here = {"use_cpu": True, "dataloader_pin_memory": False, "seed": 0, "num_train_epochs": 3}
    return kind(output_dir=str(folder), **{**quiet, **plain, **here, **options})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def averages(bregman: MomentumBregman) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in bregman.state_dict().items() if key != "shared_names"}


def farthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name].double() - right[name].double()).abs().max().item() for name in left)


def forwards(model: nn.Module) -> list[bool]:
    """Grows by whether the model is in training, at each of its calls."""
    calls: list[bool] = []
    model.register_forward_pre_hook(lambda module, _: calls.append(module.training))
    return calls


class Interrupted(transformers.TrainerCallback):
    """Stops a run where it has saved itself."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = True


class Overflow(transformers.TrainerCallback):
    """Puts an infinity into the gradients of the second step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if state.global_step == 1:
            next(model.parameters()).grad[0] = torch.inf
