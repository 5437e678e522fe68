"""Look at the website with a browser, as a reader would: `make site-check`.

    python tests/check_site.py                    # every page of _proc/site
    python tests/check_site.py 04_objective api/  # pages whose address begins so

Chromium or Chrome opens each page, wide and as wide as a phone. Wrong are: an error on the console,
a request to another host, a picture that does not load or is missing, a link to a page or an anchor
that is not there, a formula that MathJax does not set, Markdown that was left as it stands, a page
wider than the phone, and a search that does not find what is there. First come pages with one such
fault each: a fault that is not reported ends the check. Not a part of `make test`: it takes minutes
and needs a browser.
"""

import json
import re
import shutil
import sys
import tempfile
import threading
from contextlib import contextmanager
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_proc" / "site"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE = 390  # CSS pixels

# what is on a page, as one object; text of code and of formulas is left out of `raw`
LOOK = r"""
async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  const images = [...document.querySelectorAll(".md-content img")];
  for (const image of images) image.loading = "eager";
  await Promise.all(images.map(i => i.decode().catch(() => 0)));
  const text = document.querySelector(".md-content").cloneNode(true);
  for (const code of text.querySelectorAll("pre, code, mjx-container, script")) code.remove();
  const raw = text.textContent.match(/\$[^$\n]+\$|\]\([^)\n]*\)|\]\[[\w.]*\]|\*\*|\\[(\[]/g) || [];
  return {
    images: images.length, figures: document.querySelectorAll("img.figure").length,
    broken: images.filter(i => !i.naturalWidth).map(i => i.src),
    links: [...document.querySelectorAll("a[href]")].map(a => a.href),
    formulas: document.querySelectorAll(".arithmatex").length,
    set: document.querySelectorAll(".arithmatex mjx-container").length,
    wrong: [...document.querySelectorAll("mjx-merror")].map(e => e.textContent), raw,
  };
}
"""


# each page would read the whole index of the search anew, seconds of work: only `finds` gets it
INDEX = "search/search_index.json"
# a page with nothing but one fault, and how the line begins that reports it
PLANTED = {
    "<p>nothing</p>": None,
    '<img src="gone.png">': "does not load:",
    '<a href="gone.html">a</a>': "leads nowhere:",
    '<a href="#gone">a</a>': "leads nowhere:",
    '<script src="http://127.0.0.2:9/a.js"></script>': "asks another host:",
    '<script>console.error("a")</script>': "console: a",
    '<script>throw Error("a")</script>': "error: a",
    r'<p class="arithmatex">\(a\)</p>': "0 of 1 formulas",
    "<p>**a**</p>": "left as Markdown:",
    f'<p style="width: {2 * PHONE}px">a</p>': f"{2 * PHONE}",
}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


def pictures(stem):
    "How many pictures a notebook has, or None where the page is no notebook."
    path = ROOT / "nbs" / f"{stem}.ipynb"
    if not path.exists():
        return None
    outputs = (
        o
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        for o in cell.get("outputs", [])
    )
    return sum("image/png" in o.get("data", {}) for o in outputs)


@contextmanager
def served(folder):
    "The address at which the files of a folder can be read."
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@cache
def anchors(file):
    return set(re.findall(r'\b(?:id|name)="?([^"\s>]+)', file.read_text(encoding="utf-8")))


class Visitor:
    def __init__(self, browser, folder, address, dark=False):
        self.folder, self.address, self.said = folder, address, []
        scheme = "dark" if dark else "light"
        self.page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        self.page.set_default_timeout(
            120_000
        )  # ms; a loaded machine needs more than the usual 30 s
        if (folder / INDEX).exists():
            empty = json.loads((folder / INDEX).read_text(encoding="utf-8")) | {"docs": []}
            self.page.route(f"**/{INDEX}", lambda route: route.fulfill(json=empty))
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda e: self.said.append(f"error: {e}"))
        self.page.on("response", self._answered)
        self.page.on("request", self._asked)

    def _heard(self, message):
        if message.type in ("error", "warning"):
            self.said.append(f"console: {message.text}")

    def _answered(self, response):
        if response.status >= 400:
            self.said.append(f"{response.status}: {response.url}")

    def _asked(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.said.append(f"asks another host: {request.url}")

    def _leads_nowhere(self, link):
        "Is it a link to a file or an anchor of this site that does not exist?"
        if not link.startswith(self.address):
            return False
        parts = urlsplit(link)
        file = self.folder / unquote(parts.path).lstrip("/")
        file = file / "index.html" if file.is_dir() else file
        exists = file.is_file() and (not parts.fragment or unquote(parts.fragment) in anchors(file))
        return not exists

    def look(self, place):
        "What is wrong with one page, as a list of sentences."
        self.said.clear()
        self.page.set_viewport_size({"width": 1280, "height": 900})
        self.page.goto(f"{self.address}/{place}")
        seen = self.page.evaluate(LOOK)
        self.said += [f"does not load: {source}" for source in seen["broken"]]
        self.said += [f"leads nowhere: {x}" for x in set(seen["links"]) if self._leads_nowhere(x)]
        self.said += [f"formula: {text}" for text in seen["wrong"]]
        self.said += [f"left as Markdown: {text}" for text in seen["raw"]]
        if seen["formulas"] != seen["set"]:
            self.said.append(f"{seen['set']} of {seen['formulas']} formulas are set")
        in_page = pictures(place.removesuffix(".html"))
        if in_page is not None and seen["figures"] != in_page:
            self.said.append(f"{seen['figures']} of {in_page} pictures")
        self.page.set_viewport_size({"width": PHONE, "height": 844})
        across = self.page.evaluate("document.documentElement.scrollWidth")
        if across > PHONE:
            self.said.append(f"{across} pixels across on a phone of {PHONE}")
        return list(self.said), seen

    def finds(self, words, place):
        "Does the search list a page for these words?"
        self.page.unroute(f"**/{INDEX}")
        self.page.set_viewport_size({"width": 1280, "height": 900})
        self.page.goto(f"{self.address}/index.html")
        self.page.locator("input.md-search__input").click()
        self.page.keyboard.type(words)
        results = self.page.locator(".md-search-result__link")
        results.first.wait_for()
        links = results.evaluate_all("links => links.map(l => l.href)")
        return any(f"/{place}" in link for link in links)


def find_planted(browser):
    "End the check where a planted fault is not reported, or one is reported that is not there."
    with tempfile.TemporaryDirectory() as folder, served(folder) as address:
        visitor = Visitor(browser, Path(folder), address)
        for i, (fault, report) in enumerate(PLANTED.items()):
            head = '<!doctype html><link rel="icon" href="data:,"><body class="md-content" style="margin: 0">'
            place = f"planted{i}.html"
            (Path(folder) / place).write_text(head + fault, encoding="utf-8")
            said, _ = visitor.look(place)
            found = any(line.startswith(report) for line in said) if report else not said
            if not found:
                sys.exit(f"the check does not work: {fault} gave {said}")
        visitor.page.close()
    print(f"{len(PLANTED) - 1} planted faults are reported", flush=True)


def main(beginnings):
    browser_file = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_file is None:
        sys.exit(f"no browser found: {', '.join(BROWSERS)}")
    places = [str(p.relative_to(SITE)) for p in sorted(SITE.rglob("*.html"))]
    places = [p for p in places if p != "404.html" and p.startswith(tuple(beginnings or [""]))]
    if not places:
        sys.exit(f"no pages in {SITE}: run make site")
    bad = formulas = drawn = 0
    with sync_playwright() as p, served(SITE) as address:
        browser = p.chromium.launch(executable_path=browser_file, args=["--no-sandbox"])
        find_planted(browser)
        visitors = [Visitor(browser, SITE, address, dark) for dark in (False, True)]
        for i, place in enumerate(places):  # in turn light and dark
            said, seen = visitors[i % 2].look(place)
            formulas += seen["set"]
            drawn += seen["images"]
            bad += bool(said)
            for line in said[:8]:
                print(f"{place}: {line}", flush=True)
        if not visitors[0].finds("routing replay", "07_routing.html"):
            bad += 1
            print("search: 'routing replay' does not find 07_routing")
        browser.close()
    print(f"{len(places)} pages, {formulas} formulas, {drawn} pictures: {bad} with faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
