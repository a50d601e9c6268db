"""Chromium, and visitors in it. Test modules load this with `pytest_plugins = "app_fixtures", "browser_fixtures"`."""

import pytest
from playwright.sync_api import sync_playwright

from visitor import ARGUMENTS, CHROMIUM, Visitor


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(request, browser):
    """Opens the demo as a new visitor. At the end, nobody's page may have failed or asked another host for anything."""
    visitors = []

    def open_page(url: str | None = None, **options) -> Visitor:
        visitors.append(Visitor(browser, url or request.getfixturevalue("app").url, **options))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.context.close()
        assert not visitor.outside and not visitor.errors
