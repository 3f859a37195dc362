"""The documentation is current: the generated page matches the schema, and links point to files."""

from __future__ import annotations

import importlib.util
import re

import pytest
from places import REPO

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


def test_config_page_matches_the_schema():
    spec = importlib.util.spec_from_file_location("make_config_page", REPO / "docs" / "make_config_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (REPO / "docs" / "config.md").read_text() == module.page(), "run make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_files(page):
    for target in re.findall(r"\]\((?!https:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
