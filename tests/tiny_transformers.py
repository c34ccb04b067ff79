"""Hugging Face models of a few thousand random weights, made from a configuration: nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, WIDTH, LABELS = 60, 16, 3

# A range of initial weights so wide that a perturbation moves the output by far more than rounding.
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def _bert_config(dropout: float, labels: int) -> transformers.BertConfig:
    return transformers.BertConfig(
        **_ENCODER, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=labels
    )


def _bert(dropout: float) -> nn.Module:
    return transformers.BertForSequenceClassification(_bert_config(dropout, LABELS))


def _roberta(dropout: float) -> nn.Module:
    return transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(
            **_ENCODER, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=LABELS
        )
    )


def _distilbert(dropout: float) -> nn.Module:
    return transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=WIDTH,
            n_layers=2,
            n_heads=2,
            hidden_dim=32,
            max_position_embeddings=40,
            initializer_range=0.3,
            dropout=dropout,
            attention_dropout=dropout,
            seq_classif_dropout=dropout,
            num_labels=LABELS,
        )
    )


def _modernbert(dropout: float) -> nn.Module:
    return transformers.ModernBertForSequenceClassification(
        transformers.ModernBertConfig(
            **_ENCODER,
            embedding_dropout=dropout,
            attention_dropout=dropout,
            mlp_dropout=dropout,
            classifier_dropout=dropout,
            num_labels=LABELS,
            cls_token_id=1,
            bos_token_id=1,
            sep_token_id=2,
            eos_token_id=2,
        )
    )


def _gpt2(dropout: float) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=2,
            n_head=2,
            n_positions=40,
            initializer_range=0.3,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _t5(dropout: float) -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            dropout_rate=dropout,
            decoder_start_token_id=0,
            tie_word_embeddings=True,
        )
    )


def _bart(dropout: float) -> nn.Module:
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=40,
            init_std=0.3,
            dropout=dropout,
            attention_dropout=dropout,
            scale_embedding=True,
            forced_eos_token_id=None,
        )
    )


def _question_answering(dropout: float) -> nn.Module:
    return transformers.BertForQuestionAnswering(_bert_config(dropout, labels=2))  # start and end


@dataclass(frozen=True)
class Family:
    """How to build one kind of model, and how it is called.

    Attributes:
        build: the model, from its dropout probability.
        embeddings: dotted names of the embedding modules that the model calls, by the argument that holds their ids.
        tied: dotted name of an output projection with the weight of the embedding.
    """

    build: Callable[[float], nn.Module]
    embeddings: dict[str, str] = field(default_factory=dict)
    tied: str | None = None


FAMILIES = {
    "bert": Family(_bert, {"input_ids": "bert.embeddings.word_embeddings"}),
    "roberta": Family(_roberta, {"input_ids": "roberta.embeddings.word_embeddings"}),
    "distilbert": Family(_distilbert, {"input_ids": "distilbert.embeddings.word_embeddings"}),
    "modernbert": Family(_modernbert, {"input_ids": "model.embeddings.tok_embeddings"}),
    "gpt2": Family(_gpt2, {"input_ids": "transformer.wte"}, tied="lm_head"),
    "t5": Family(
        _t5, {"input_ids": "encoder.embed_tokens", "decoder_input_ids": "decoder.embed_tokens"}, tied="lm_head"
    ),
    "bart": Family(
        _bart,
        {"input_ids": "model.encoder.embed_tokens", "decoder_input_ids": "model.decoder.embed_tokens"},
        tied="lm_head",
    ),
    "question answering": Family(_question_answering, {"input_ids": "bert.embeddings.word_embeddings"}),
}


def build(
    name: str = "bert", *, dropout: float = 0.0, dtype: torch.dtype = torch.float64, attention: str | None = None
) -> nn.Module:
    """A seeded model of a family."""
    torch.manual_seed(0)
    model = FAMILIES[name].build(dropout).to(dtype)
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


def batch(name: str = "bert", *, examples: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Ids and an attention mask with padding on the right, and decoder ids where the model has a decoder."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (examples, 7), generator=generator)}
    inputs["attention_mask"] = torch.ones(examples, 7, dtype=torch.long)
    if examples > 1:
        inputs["attention_mask"][1, 5:] = 0
        inputs["input_ids"][1, 5:] = 0
    if "decoder_input_ids" in FAMILIES[name].embeddings:
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (examples, 5), generator=generator)
    return inputs


def masks(inputs: dict[str, Tensor]) -> list[Tensor]:
    """One mask for each look-up of the embedding."""
    found = [inputs["attention_mask"]]
    if "decoder_input_ids" in inputs:
        found.append(torch.ones_like(inputs["decoder_input_ids"]))
    return found
