"""What the README shows is what comes out, and its links lead somewhere."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "data/README.md", "data/experiments.md"]


def snippets(page="README.md"):
    """(language, text) of every fenced block."""
    return re.findall(r"```(\w*)\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def snippet(words):
    """The README's Python that holds these words."""
    [found] = [text for language, text in snippets() if language == "python" and words in text]
    return found


def anchor_of(heading):
    """The name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_by_hand_prints_what_stands_below_it():
    by_hand = snippet("print(")
    assert by_hand.count("\n") <= 20
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(by_hand, {})
    texts = [text for _, text in snippets()]
    assert printed.getvalue() == texts[texts.index(by_hand) + 1]


@pytest.mark.parametrize("page", PAGES)
def test_links_inside_the_repository_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            linked = (ROOT / page).parent / path if path else ROOT / page
            assert linked.exists(), target
            if anchor:
                text = linked.read_text(encoding="utf-8")
                headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
                assert anchor in map(anchor_of, headings), target


def test_every_test_that_the_readme_names_exists():
    tests = (ROOT / "test_ulma.py").read_text(encoding="utf-8")
    for name in re.findall(r"`(test_\w+)`", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert f"def {name}(" in tests
