"""Turns the TeX that arithmatex marks into MathML, so that the pages need no script from elsewhere."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_MARKED = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(page_html: str, **_: Any) -> str:
    """Called by MkDocs with the rendered body of every page."""
    return _MARKED.sub(_mathml, page_html)


def _mathml(match: re.Match[str]) -> str:
    tag, bracket, tex = match.groups()
    display = "block" if bracket == "[" else "inline"
    mathml = convert(html.unescape(tex), display=display)
    if unknown := re.search(r"\\[a-zA-Z]+", mathml):
        raise ValueError(f"latex2mathml does not know {unknown[0]}, in {tex}: write it in another way")
    return f'<{tag} class="equation">{mathml}</{tag}>'
