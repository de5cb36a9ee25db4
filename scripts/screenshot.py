"""Picture of a page of `powerplan report` in a headless Chromium, for the documentation.

    python scripts/screenshot.py docs/images/report.png

Needs the dev extra (selenium) and Debian's packages chromium and chromium-driver, or the like.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import powerplan

WIDTH, HEIGHT = 1440, 1230
"""Pixels of the picture: the head of the page and the charts over the context."""

DRAWN_S = 60
"""Seconds that a page may take until its charts are there."""

ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def chromium() -> tuple[str, str] | None:
    """Return the programs of Chromium and its driver; None where one of them is not installed."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    return None if program is None or driver is None else (program, driver)


@contextmanager
def browser() -> Iterator[Any]:
    """Yield a driver of a headless Chromium with an empty profile, which logs its console and requests.

    The browser is closed and its profile removed whatever happens. Raises FileNotFoundError without Chromium.
    """
    from selenium import webdriver

    programs = chromium()
    if programs is None:
        raise FileNotFoundError("chromium and chromedriver are not installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = programs[0]
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
        try:
            driver.get("about:blank")  # In place of the new tab page, whose hundreds of files may still be loading.
            yield driver
        finally:
            driver.quit()


def show(driver: Any, file: Path, width: int, dark: bool = False) -> None:
    """Open a page at a width in pixels, light or dark, and wait until its charts are drawn."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(file.resolve().as_uri())
    end = time.monotonic() + DRAWN_S
    while not driver.execute_script("return document.documentElement.dataset.drawn"):
        if time.monotonic() > end:
            raise TimeoutError(f"{file}: no charts after {DRAWN_S} s")
        time.sleep(0.05)


def picture(driver: Any, height: int | None = None) -> bytes:
    """Return a PNG of the page that is open: its first `height` pixels, or all of it."""
    wanted: dict[str, Any] = {"format": "png", "captureBeyondViewport": True}
    if height is not None:
        width = driver.execute_script("return document.documentElement.clientWidth")
        wanted["clip"] = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    return base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", wanted)["data"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the PNG to write")
    parser.add_argument("--page", type=Path, help="an HTML page; by default that of llama-3.1-8b at 128k")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--height", type=int, default=HEIGHT, help="0 for all of the page")
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, browser() as driver:
        page = given.page or Path(folder) / "page.html"
        if given.page is None:
            run = powerplan.page("llama-3.1-8b", "128k", gpu="h100-sxm", devices=64, tokens="100B", price=2.5)
            run.save(page)
        show(driver, page, given.width, given.dark)
        given.file.write_bytes(picture(driver, given.height or None))


if __name__ == "__main__":
    main()
