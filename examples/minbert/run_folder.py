"""The folder of a run: what is in it, and when it may be written to.

settings.json      the settings, resolved
encoder/           config.json and tokenizer.json: with the checkpoint, all that evaluation needs
checkpoints/       the last complete checkpoint
metrics.jsonl      a line an epoch
metrics.json       written last: a run that has it is complete
predictions/       CSV files in the course's submission format
figures/           training curves
"""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .checkpoint import latest, write_json, write_text
from .config import BertConfig, read_config
from .encoder import BertEncoder
from .errors import InputError
from .model import MultitaskModel
from .pretrained import load_encoder, resolve_encoder
from .settings import Settings, differences
from .tokenizer import SentenceTokenizer


def default_name(settings: Settings) -> str:
    """A new folder under `runs/`: configuration, option and the time, so that no run meets another."""
    name = f"{settings.config}-{settings.option}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, count = Path("runs") / name, 1
    while folder.exists():
        count += 1
        folder = Path("runs") / f"{name}-{count}"
    return str(folder)


def refuse_occupied(folder: Path) -> None:
    """Raises InputError unless the folder is empty or not there."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output-dir {folder}: is a file; name a folder")
    if (folder / "settings.json").exists():
        raise InputError(f"--output-dir {folder}: holds another run; go on with --resume, or name another folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"--output-dir {folder}: is not empty; name another folder")


def saved_settings(folder: Path, flag: str) -> Settings:
    """The settings of a run.

    Raises:
        InputError: the folder is no run.
    """
    file = folder / "settings.json"
    if not folder.is_dir():
        raise InputError(f"{flag} {folder}: no such folder")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("expected an object")
        return Settings.from_dict(values)
    except FileNotFoundError:
        raise InputError(f"{flag} {folder}: is not a run: no settings.json in it") from None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file}: unreadable ({error})") from None


def settings_to_resume(folder: Path, given: dict[str, Any], resolved: Settings) -> Settings:
    """The settings to go on with: the run's own, save for what may change; the flags given must not contradict it."""
    if not (folder / "settings.json").exists():
        refuse_occupied(folder)
        return resolved
    saved = saved_settings(folder, "--output-dir")
    clashes = differences(saved, given)
    if clashes:
        raise InputError(f"--resume {folder}: {clashes[0]}; a run goes on with the settings that it began with")
    return replace(saved, device=resolved.device, **{k: given[k] for k in ("save_every", "data_dir") if k in given})


def prepare(folder: Path, settings: Settings, config: BertConfig, tokenizer: SentenceTokenizer) -> None:
    """Makes a new run's folder; `settings.json` comes last, so that a half-made folder is no run."""
    (folder / "encoder").mkdir(parents=True, exist_ok=True)
    write_json(folder / "encoder" / "config.json", config.to_dict())
    tokenizer.save(folder / "encoder")
    write_json(folder / "settings.json", settings.to_dict())


def write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    """Writes `metrics.jsonl` anew: a resumed run must not keep the lines of epochs that it repeats."""
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line, allow_nan=False) + "\n" for line in history))


def encoder_source(settings: Settings) -> Path:
    """The folder that the encoder's configuration, weights and tokenizer come from."""
    if settings.init_from is not None:
        saved_settings(Path(settings.init_from), "--init-from")
        return Path(settings.init_from) / "encoder"
    return resolve_encoder(settings.encoder)


def encoder_config(folder: Path, settings: Settings) -> BertConfig:
    """The encoder's configuration, with the run's own dropout rate if it has one.

    Raises:
        InputError: `--max-length` is beyond the encoder's positions.
    """
    config = read_config(folder / "config.json")
    if settings.dropout is not None:
        rates = {"hidden_dropout_prob": settings.dropout, "attention_probs_dropout_prob": settings.dropout}
        config = BertConfig(**{**asdict(config), **rates})
    if settings.max_length > config.max_position_embeddings:
        raise InputError(
            f"--max-length {settings.max_length}: the encoder has {config.max_position_embeddings} positions"
        )
    return config


def build_model(settings: Settings, config: BertConfig, weights: Path | None) -> MultitaskModel:
    """The model of a run: fresh heads on an encoder, whose weights come from a checkpoint folder unless None."""
    encoder = BertEncoder(config) if weights is None else load_encoder(weights, config)
    return MultitaskModel(
        encoder,
        settings.tasks,
        pooling=settings.pooling,
        head_layers=settings.head_layers,
        head_activation=settings.head_activation,
        dropout=config.hidden_dropout_prob,
    )


def last_checkpoint(folder: Path, flag: str) -> Path:
    """The last complete checkpoint.

    Raises:
        InputError: there is none.
    """
    checkpoint = latest(folder)
    if checkpoint is None:
        raise InputError(f"{flag} {folder}: the run has no checkpoint yet")
    return checkpoint
