"""The documents hold together: every page can be reached, every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def _pages() -> list[Path]:
    return [*_ROOT.glob("*.md"), *(_ROOT / "docs").rglob("*.md")]


def _prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text())


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ +(.+?) *$", _prose(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", h.lower().replace("`", "")) for h in headings)
    return {text.replace(" ", "-") for text in plain}


@pytest.mark.parametrize("page", _pages(), ids=lambda p: str(p.relative_to(_ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    for link in _LINK.findall(_prose(page)):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links {link}, which is not there"
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target), f"{page.name} links {link}: no such heading"


def test_the_readme_leads_to_every_page():
    readme = (_ROOT / "README.md").read_text()
    pages = [p for p in (_ROOT / "docs").glob("*.md") if f"docs/{p.name}" not in readme]
    assert pages == []
