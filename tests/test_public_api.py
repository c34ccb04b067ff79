"""What may be imported from where, and that the class and the function agree."""

import dataclasses
import inspect
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import smartreg
from smartreg import SmartLoss, SmartOutput, SmartWarning, smoothness_penalty
from smartreg._ascent.settings import SmartSettings

NAMES = {
    "MomentumBregman",
    "SlantedTriangularLR",
    "SmartLoss",
    "SmartOutput",
    "SmartWarning",
    "binary_symmetric_kl",
    "diagnose",
    "hellinger",
    "jensen_shannon",
    "kl",
    "mse",
    "paper_beta",
    "smoothness_penalty",
    "suggested_beta",
    "symmetric_kl",
    "token_mask",
}
SHARED = [field.name for field in dataclasses.fields(SmartSettings)]
SHARED += ["divergence", "output_to_logits", "generator", "check_first_call"]


def parameters(function: object) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_public_names() -> None:
    assert set(smartreg.__all__) == NAMES
    assert smartreg.__all__ == sorted(smartreg.__all__)
    everything: dict[str, object] = {}
    exec("from smartreg import *", everything)
    assert everything.keys() - {"__builtins__"} == NAMES
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", smartreg.__version__)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_public_name_is_documented(name: str) -> None:
    assert len((getattr(smartreg, name).__doc__ or "").strip()) > 20


def test_the_import_file_holds_nothing_else() -> None:
    source = files("smartreg").joinpath("__init__.py").read_text()
    assert not re.search(r"^(def|class|if|for|try) ", source, re.MULTILINE)


@pytest.mark.parametrize("name", SHARED)
def test_class_and_function_have_the_same_defaults_and_types(name: str) -> None:
    of_class, of_function = parameters(SmartLoss)[name], parameters(smoothness_penalty)[name]
    assert of_class.default == of_function.default
    assert of_class.annotation == of_function.annotation
    assert of_class.kind == of_function.kind == inspect.Parameter.KEYWORD_ONLY


def test_signatures() -> None:
    assert next(iter(parameters(SmartLoss))) == "model"
    assert parameters(SmartLoss).keys() - set(SHARED) == {"model", "embedding", "memory_efficient"}
    function = parameters(smoothness_penalty)
    assert list(function)[:2] == ["fn", "embeds"]
    assert function.keys() - set(SHARED) == {"fn", "embeds", "reference", "mask", "noise", "output_mask", "example_ids"}
    call = parameters(SmartLoss.forward)
    assert list(call) == ["self", "forward", "mask", "divergence", "noise", "output_mask", "example_ids"]
    assert [p.kind for p in call.values()][2:] == [inspect.Parameter.KEYWORD_ONLY] * 5
    assert [p.default for p in call.values()][2:] == [None] * 5


def test_defaults() -> None:
    expected = {
        "embedding": None,
        "divergence": "symmetric_kl",
        "epsilon": 0.15,
        "step_size": 0.15,
        "noise_std": 0.015,
        "steps": 0,
        "norm": "2",
        "norm_over": "example",
        "epsilon_scale": "rms",
        "ascent": "projected",
        "start": "towards_uniform",
        "dropout": "shared",
        "detach_reference": False,
        "memory_efficient": False,
        "output_to_logits": None,
        "generator": None,
        "ascent_autocast": True,
        "check_first_call": True,
    }
    assert {name: p.default for name, p in parameters(SmartLoss).items() if name != "model"} == expected


def test_the_output_is_a_named_tuple() -> None:
    assert SmartOutput._fields == ("outputs", "penalty")
    outputs, penalty = SmartOutput("anything", torch.ones(()))
    assert (outputs, penalty.item()) == ("anything", 1.0)


def test_the_warning_is_one_of_its_own() -> None:
    assert issubclass(SmartWarning, UserWarning)
    assert SmartWarning is not UserWarning


def test_types_are_for_others_too() -> None:
    assert files("smartreg").joinpath("py.typed").is_file()


def test_importing_it_costs_no_more_than_its_own_files(tmp_path: Path) -> None:
    """Nothing of torch that `import torch` has left out (its compiler takes longer than torch itself), no framework."""
    script = """
import sys
import torch
import typing_extensions
before = set(sys.modules)
import smartreg
print(sorted(name for name in set(sys.modules) - before if name.split(".")[0] != "smartreg"))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_the_package_imports_torch_and_nothing_else_heavy(tmp_path: Path) -> None:
    script = """
import sys
for name in ("transformers", "matplotlib", "peft", "accelerate", "lightning", "scipy"):
    sys.modules[name] = None  # any import of it fails
import smartreg
print(sorted(smartreg.__all__)[0])
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "MomentumBregman\n"), done.stderr
