"""The built site in a browser: a telephone's width, the console, links, copy buttons and the search."""

import functools
import http.server
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urljoin

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md"))
PAGES = [page for page in PAGES if not page.startswith("assets/")]
WIDTH, HEIGHT = 360, 740


def address(page: str) -> str:
    """Where MkDocs puts a page: each in a folder of its own."""
    return re.sub(r"(^|/)index$", r"\1", page.removesuffix(".md")).rstrip("/") + "/" if page != "index.md" else ""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """The tests say what is missing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder of the built site, and the address at which it is served."""
    pytest.importorskip("mkdocs", reason="a browser's test: the docs extra is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium through selenium; a visible skip where either is missing."""
    selenium = pytest.importorskip("selenium", reason="a browser's test: selenium is not installed")
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("a browser's test: neither chromium nor google-chrome, or no chromedriver, is installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    options.add_experimental_option("mobileEmulation", {"deviceMetrics": {"width": WIDTH, "height": HEIGHT}})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    assert selenium.__version__
    yield running
    running.quit()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_a_telephone_and_the_console_is_silent(page: str, site: tuple[Path, str], browser: Any) -> None:
    browser.get(site[1] + address(page))
    assert browser.execute_script("return window.innerWidth") == WIDTH
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= WIDTH, f"{page} is {wide} pixels wide"
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    blocks = browser.execute_script("return document.querySelectorAll('pre > code').length")
    buttons = browser.execute_script("return document.querySelectorAll('.md-code__button[data-md-type=copy]').length")
    signatures = browser.execute_script("return document.querySelectorAll('.doc-signature pre > code').length")
    assert blocks - signatures <= buttons <= blocks


def test_equations_use_the_font_that_the_site_brings(site: tuple[Path, str], browser: Any) -> None:
    browser.get(site[1] + "mathematics/")
    loaded = browser.execute_async_script(
        "const done = arguments[0]; document.fonts.ready.then(() => done("
        "[...document.fonts].filter(f => f.status == 'loaded').map(f => f.family.replaceAll('\"', ''))))"
    )
    assert "Latin Modern Math" in loaded


def test_the_search_finds_epsilon(site: tuple[Path, str], browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(site[1] + "?q=epsilon")
    results = WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, ".md-search-result__item"))
    assert len(results) > 2


def test_a_long_signature_has_a_line_for_each_argument(site: tuple[Path, str]) -> None:
    """The plug-in leaves it on one line of thousands of pixels where no formatter is installed."""
    text = (site[0] / "api" / "smart" / "index.html").read_text("utf-8")
    (signature, *_) = re.findall(r'<div class="doc-signature.*?</div>', text, re.DOTALL)
    lines = re.sub(r"<[^>]+>", "", signature).strip().splitlines()
    assert lines[0] == "SmartLoss("
    assert len(lines) > 15


def test_no_internal_link_is_broken(site: tuple[Path, str]) -> None:
    folder, _ = site
    pages = {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in folder.rglob("*.html")}
    anchors = {name: set(re.findall(r'\bid="([^"]+)"', text)) for name, text in pages.items()}
    broken, looked_at = [], 0
    for name, text in pages.items():
        if name == "404.html":  # its links are from the root of the site, wherever that is
            continue
        for link in re.findall(r'\b(?:href|src)="([^"]+)"', text):
            if re.match(r"[a-z]+:|//", link):
                continue
            looked_at += 1
            target, anchor = urldefrag(urljoin(f"/{name}", link.replace("&amp;", "&")))
            file = target.lstrip("/").split("?")[0]
            file = file + "index.html" if not file or file.endswith("/") else file
            known = anchors.get(file, {anchor}) | {"__tabbed", ""}
            if not (folder / file).is_file() or anchor not in known:
                broken.append((name, link))
    assert looked_at > 100
    assert broken == []
