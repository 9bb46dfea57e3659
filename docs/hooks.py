"""Hooks of mkdocs: Sphinx roles of docstrings become links; links to files outside docs/ become plain text."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>~?([\w.]+)</code>")
PAGE = re.compile(r"\bdocs/([\w-]+)\.md\b")
LINK_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:bench|examples|CONTRIBUTING)\b[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Keep the text of links such as [bench/bench_train.py](../bench/bench_train.py): the site has no such file."""
    return LINK_OUTSIDE.sub(r"`\1`", markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Link :func:`name` to its entry in the reference, where it has one, and docs/name.md to that page."""

    def link(role: re.Match[str]) -> str:
        name = role[1].removeprefix("qlora_native.")
        return f'<autoref identifier="qlora_native.{name}" optional><code>{name}</code></autoref>'

    if page.file.src_uri.startswith("reference/"):
        html = PAGE.sub(r'<a href="../\1.html">\1</a>', html)
    return ROLE.sub(link, html)
