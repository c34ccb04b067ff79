"""BERT, written from scratch: configuration, embeddings, self-attention, feed-forward, pooler.

Module names follow the Hugging Face checkpoints, so that `load_state_dict` needs no table of names.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import InputError

ACTIVATIONS = ("gelu", "gelu_new", "relu", "tanh")
LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 16,
    "num_hidden_layers": 512,
    "num_attention_heads": 1 << 16,
    "intermediate_size": 1 << 20,
    "max_position_embeddings": 1 << 20,
    "type_vocab_size": 1 << 16,
}
"""Far beyond any BERT. What is larger still is a mistake, and would take minutes and the memory of the machine."""


@dataclass(frozen=True)
class BertConfig:
    """Sizes and rates of a BERT encoder, under the names Hugging Face gives them.

    The defaults are BERT-base. `pad_token_id` only matters for building batches: attention is masked by the
    attention mask, never by token id.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"{name}: expected an integer of at least 1, got {value!r}")
            if value > most:
                raise InputError(f"{name}: expected an integer of at most {most}, got {value!r}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise InputError(f"{name}: expected a number from 0 to 1, got {value!r}")
        if type(self.pad_token_id) is not int or not 0 <= self.pad_token_id < self.vocab_size:
            raise InputError(
                f"pad_token_id: expected an integer from 0 to {self.vocab_size - 1}, got {self.pad_token_id!r}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size: expected a multiple of num_attention_heads ({self.num_attention_heads}), "
                f"got {self.hidden_size}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise InputError(f"hidden_act: expected one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}")

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that `read_config` reads back."""
        return {"model_type": "bert", **asdict(self)}


def activation(name: str) -> nn.Module:
    """The non-linearity of the feed-forward block, by its name in `config.json`."""
    if name == "gelu_new":
        return nn.GELU(approximate="tanh")
    return {"gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh}[name]()


class Embeddings(nn.Module):
    """Word, position and segment embeddings, summed, normalised, dropped out."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        # The word embedding alone is what SMART perturbs: before position, LayerNorm and dropout.
        total = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        total = total + self.position_embeddings(positions)  # (batch, length, dim)
        return self.dropout(self.LayerNorm(total))


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention over the unmasked tokens."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.dropout_rate = config.attention_probs_dropout_prob
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        batch, length, size = hidden.shape
        shape = (batch, length, self.heads, size // self.heads)
        query = self.query(hidden).view(shape).transpose(1, 2)  # (batch, heads, length, dim)
        key = self.key(hidden).view(shape).transpose(1, 2)
        value = self.value(hidden).view(shape).transpose(1, 2)
        rate = self.dropout_rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=rate)
        return mixed.transpose(1, 2).reshape(batch, length, size)  # (batch, length, heads * dim)


class Residual(nn.Module):
    """dense → dropout → add the input back → LayerNorm; closes both halves of a layer."""

    def __init__(self, size_in: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(size_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class Attention(nn.Module):
    """Self-attention with its residual connection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Residual(config.hidden_size, config)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        return self.output(self.self(hidden, attention_mask), hidden)


class Intermediate(nn.Module):
    """The widening half of the feed-forward block."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation(config.hidden_act)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.dense(hidden))


class Layer(nn.Module):
    """One transformer layer: attention, then feed-forward, each with a residual connection and a LayerNorm after it."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Residual(config.intermediate_size, config)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        attended = self.attention(hidden, attention_mask)
        return self.output(self.intermediate(attended), attended)


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        for layer in self.layer:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # The re-entrant variant breaks the inner gradient of SMART; this one supports `autograd.grad`.
                hidden = checkpoint(layer, hidden, attention_mask, use_reentrant=False)
            else:
                hidden = layer(hidden, attention_mask)
        return hidden


class Pooler(nn.Module):
    """tanh(W h + b) of the first token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden[:, 0]))


class BertEncoder(nn.Module):
    """The BERT encoder of Devlin et al. 2019.

    Args:
        config: sizes and rates.

    Example:
        >>> import torch
        >>> tiny = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...                   intermediate_size=16)
        >>> hidden, pooled = BertEncoder(tiny)(torch.tensor([[1, 2, 3]]), torch.ones(1, 3))
        >>> hidden.shape, pooled.shape
        (torch.Size([1, 3, 8]), torch.Size([1, 8]))
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embedding: the layer whose output SMART perturbs."""
        return self.embeddings.word_embeddings

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs the encoder.

        Args:
            input_ids: token ids, (batch, length), at most `max_position_embeddings` long.
            attention_mask: 1 or True for real tokens, (batch, length); every row needs at least one.
            token_type_ids: segment of each token, (batch, length); all 0 if left out.

        Returns:
            The last hidden state, (batch, length, dim), and the pooler's output, (batch, dim).
        """
        attend = attention_mask.bool()[:, None, None, :]  # (batch, heads, query, key)
        hidden = self.encoder(self.embeddings(input_ids, token_type_ids), attend)
        return hidden, self.pooler(hidden)
