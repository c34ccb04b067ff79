"""The code blocks of `docs/recipes.md` that have a file name."""

import re
from pathlib import Path
from typing import Any

_PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
BLOCKS = dict(re.findall(r'^```python title="(.+?)"\n(.*?)^```', _PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE))


def run(title: str, **names: Any) -> dict[str, Any]:
    """Execute a block as it stands on the page, with these names defined; returns all names after it."""
    names["__name__"] = title
    exec(compile(BLOCKS[title], f"docs/recipes.md: {title}", "exec"), names)
    return names
