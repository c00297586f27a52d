"""The pages in docs/ say what the code says, and name everything that there is."""

import importlib.util
from pathlib import Path

import pytest

from featherweight import passes, targets

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["passes.md", "targets.md", "commands.md"])
def test_what_is_committed_is_what_the_code_says(generate, page):
    written = (DOCS / page).read_text(encoding="utf-8") if (DOCS / page).exists() else ""
    assert written == generate.PAGES[page](), f"docs/{page} is not up to date: run `python docs/generate.py`"


def test_everything_has_its_heading(generate):
    headings = {line[3:] for page in generate.PAGES.values() for line in page().splitlines() if line[:3] == "## "}
    commands = ("compress", "apply", "predict", "measure", "bench-machine", "verify", "report", "inspect", "list")
    assert headings >= {*passes.names(), *targets.names(), *(f"featherweight {name}" for name in commands)}


def test_every_setting_is_explained(generate):
    for name in passes.names():
        kind = passes.find(name)
        assert set(generate.explanations(kind)) == set(kind().settings())
