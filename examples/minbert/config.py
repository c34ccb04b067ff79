"""What a BERT checkpoint says about itself: the `config.json` of the Hugging Face layout."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import InputError

ACTIVATIONS = ("gelu", "gelu_new", "relu", "tanh")


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
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name}: expected an integer of at least 1, got {value!r}")
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


def read_config(path: Path) -> BertConfig:
    """Reads `config.json`; keys that do not describe the encoder are ignored.

    Args:
        path: the file.

    Returns:
        The configuration.

    Raises:
        InputError: the file is missing, is not JSON, describes another kind of model than BERT, or asks for a variant
            that this encoder does not compute (relative positions, an unknown activation, a decoder).
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a BERT checkpoint in Hugging Face layout") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(raw).__name__}")

    # A variant that loads without complaint and computes something else would be the worst outcome, so each is named.
    kind = raw.get("model_type")
    if kind != "bert":
        raise InputError(f"{path}: model_type: expected 'bert', got {kind!r}; this encoder reads BERT checkpoints only")
    position = raw.get("position_embedding_type", "absolute")
    if position != "absolute":
        raise InputError(f"{path}: position_embedding_type: expected 'absolute', got {position!r}")
    if raw.get("is_decoder"):
        raise InputError(f"{path}: is_decoder: expected false, got true; this encoder attends in both directions")

    known = {key: raw[key] for key in BertConfig.__dataclass_fields__ if raw.get(key) is not None}
    try:
        return BertConfig(**known)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
