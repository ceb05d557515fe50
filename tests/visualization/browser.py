"""A Chromium for tests: Debian's, or the one Playwright installed; none means that the test is skipped."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",  # containers have little of it
]  # fmt: skip
TIMEOUT_MS = 120_000
"""Of whatever is waited for: machines may be slow."""


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a Playwright browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if installed is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium is installed")
        browser = playwright.chromium.launch(executable_path=installed, args=FLAGS, timeout=TIMEOUT_MS)
        try:
            yield browser
        finally:
            browser.close()


def open_tab(browser: Any, **options: Any) -> Any:
    """Open a tab in a context of its own, `tab.context`, that waits patiently."""
    context = browser.new_context(**options)
    context.set_default_timeout(TIMEOUT_MS)
    return context.new_page()
