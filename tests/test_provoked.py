"""Every error and warning of the library is provoked by a test, which fails when it is gone.

Told from the source alone: a pattern (`match=`) or `assert` of some test holds words of the message, and more of them
than of any other message.
"""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from expected_words import BEGIN, expectations, expected, literal
from messages import raised


def runs(text: str) -> set[tuple[str, str]]:
    """Every two words in a row; of one alone, chance would find some anywhere. A word with a field in it is none."""
    words = text.replace(BEGIN, f"{BEGIN} ").split()
    return {pair for pair in pairwise(words) if "…" not in "".join(pair)}


def meant(words: str, messages: dict[str, set[tuple[str, str]]]) -> str | None:
    """The message that a test's words speak of: the one with most of them, of equals the one with nothing else."""
    mine = runs(words)
    shared = {message: len(mine & found) for message, found in messages.items()}
    most = max(shared.values())
    best = [message for message, count in shared.items() if count == most > 0]
    return next((vague for vague in best if all(messages[vague] <= messages[other] for other in best)), None)


def unprovoked(messages: Iterable[str], tests: Iterable[str]) -> list[str]:
    """The messages that no test's words speak of."""
    found = {message: runs(BEGIN + message) for message in messages}
    return sorted(found.keys() - {meant(words, found) for words in tests})


SHAPES = "… must …, got …"
"""Has no words of its own: each caller says in words which shape it wants of a mask."""
WANTED = ("mask must have the shape", "output_mask must have the leading shape", "mask must broadcast to")


def test_every_message_is_provoked() -> None:
    tests = expected(Path(__file__).parent)
    assert unprovoked(raised() - {SHAPES}, tests) == []
    assert [words for words in WANTED if not any(BEGIN + words in text for text in tests)] == []


def test_every_message_can_be_told_from_the_others() -> None:
    """So that none counts as provoked for want of words, and each would be missed."""
    messages = raised() - {SHAPES}
    assert len(messages) > 150
    assert unprovoked(messages, []) == sorted(messages)
    assert unprovoked(messages, [BEGIN + message for message in messages]) == []


MESSAGES = ["steps must be an int, got …", "total_steps must be an int, got …", "… must be one of …, got …"]
MESSAGES += ["reduction must be one of …, got …"]
TESTS = '''
WORDS = "total_steps must be"

@parametrize(("value", "words"), [(1, WORDS), (2, "norm must be one of")])
def test_a(value, words):
    """steps must be an int, got 1.5"""
    name = "reduction must be one of"
    raise ValueError("steps must be an int, got 1.5")
    with raises(ValueError, match=words):
        f(value)
'''


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("pass", [0, 3]),
        ('raises(ValueError, match=name + r"\\b")', [0]),
        ('assert "steps must be an" in str(error)', [3]),
        ('raises(ValueError, match="must be an int")', [0, 3]),  # which of two?
        ('f("steps must be an int")', [0, 3]),
        ('raises(ValueError, match=f"^{name} must be one of")', [0, 3]),
    ],
)
def test_words_that_no_test_expects_do_not_count(line: str, missing: list[int]) -> None:
    tests = list(expectations(f"{TESTS}    {line}\n"))
    assert unprovoked(MESSAGES, tests) == sorted(MESSAGES[i] for i in missing)
    assert unprovoked(MESSAGES, [literal(r"steps must be an int, got 1\.5")]) == sorted(MESSAGES[1:])
