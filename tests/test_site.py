"""The website: links, sounds, pictures and alt texts of its pages; nothing is fetched from elsewhere."""

import base64
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
import test_report
import yaml
from packaging.requirements import Requirement

from soundscapes_utils import store

ROOT = store.project_root(__file__)
BUILD = ROOT / "docs/website/build.py"
LOCKS = {name: (ROOT / name).read_text(encoding="utf-8").splitlines()
         for name in ("requirements.txt", "requirements.site.txt")}  # fmt: skip
NOTEBOOKS = sorted(p.relative_to(ROOT) for p in (ROOT / "notebooks").glob("**/[!.]*.ipynb")
                   if ".ipynb_checkpoints" not in p.parts)  # fmt: skip


def held(name):
    """Names and specifiers of a lock that hold on this machine."""
    requirements = map(Requirement, LOCKS[name])
    return {r.name: str(r.specifier) for r in requirements if r.marker is None or r.marker.evaluate()}


def test_lock_of_the_generator_fits_the_lock_of_the_project():
    site, project = held("requirements.site.txt"), held("requirements.txt")
    assert {name: project[name] for name in site.keys() & project} == {
        name: site[name] for name in site.keys() & project
    }
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    for line in groups["site"]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(site[wanted.name].removeprefix("==")), line


def test_workflow_runs_the_documented_commands_with_little_power():
    flow = yaml.safe_load((ROOT / ".github/workflows/site.yml").read_text(encoding="utf-8"))
    assert flow["permissions"] == {"contents": "read"}
    test, publish = flow["jobs"]["test"], flow["jobs"]["publish"]
    assert "permissions" not in test and publish["needs"] == "test"
    assert publish["permissions"] == {"pages": "write", "id-token": "write"}
    steps = [step for job in flow["jobs"].values() for step in job["steps"]]
    runs = [step["run"] for step in steps if "run" in step]
    assert runs == ["./run_all.sh setup --cpu", "./run_all.sh site", "./run_all.sh test"]
    for step in steps:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step.get("uses", "a/b@" + "0" * 40))


def test_citation_package_and_readme_say_the_same():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    package = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name in ("version", "license", "keywords"):
        assert citation[name] == package[name]
    assert [one["name"] for one in citation["authors"]] == [one["name"] for one in package["authors"]]
    assert citation["cff-version"] == "1.2.0"
    released = f"## {citation['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert released == ("date-released" in citation), "it gets its date with its release"
    for work in citation["references"]:
        assert {"type", "title", "authors", "year", "url"} <= work.keys()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"title = {{{citation['title']}}}" in readme
    assert f"version = {{{citation['version']}}}, license = {{{citation['license']}}}" in readme


# --- what the generator is given -------------------------------------------------------------------


@pytest.fixture
def stage(tmp_path):
    spec = importlib.util.spec_from_file_location("build_site", BUILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Stage(tmp_path / "stage")


def test_links_between_files_become_links_between_pages(stage):
    page = "notebooks/00_start_here.ipynb"
    text = "[a](../README.md#b) [c](05_esc_augmentation.ipynb) [d](profiles) [e](https://x.org) [f](#g)"
    expected = "[a](../index.md#b) [c](05_esc_augmentation.ipynb) d [e](https://x.org) [f](#g)"
    assert stage.text(page, text) == expected and not stage.dead
    assert stage.text(page, "[terms](../LICENSE)") == "[terms](../LICENSE)"
    assert (stage.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert stage.text(page, "[x](../nowhere.md)") == "x" and stage.dead == [f"{page}: ../nowhere.md"]


def test_every_text_has_a_page(stage):
    texts = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")}
    assert texts and texts <= stage.known.keys()


def test_pictures_keep_their_alt_texts_and_sounds_are_files(stage):
    pixels = {"image/png": base64.b64encode(b"png").decode(), "text/plain": "<Figure>"}
    for about in ({"image/png": {"alt": 'a "dog"'}}, {"alt": 'a "dog"'}):
        picture = {"output_type": "display_data", "data": dict(pixels), "metadata": about}
        stage.output("notebooks/appendix/A1.ipynb", picture)
        assert 'alt="a &quot;dog&quot;"' in picture["data"]["text/html"]
        (source,) = set(re.findall(r'(?:src|href)="../../([^"]+)"', picture["data"]["text/html"]))
        assert (stage.folder / "extra" / source).read_bytes() == b"png"
    encoded = base64.b64encode(b"ogg").decode()
    player = {"data": {"text/html": [f'<audio src="data:audio/ogg;base64,{encoded}"></audio>']}}
    stage.output("notebooks/00.ipynb", player)
    source = re.search(r'src="../([^"]+\.ogg)"', player["data"]["text/html"])[1]
    assert (stage.folder / "extra" / source).read_bytes() == b"ogg"


# --- the pages -------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page links to, fetches, shows and plays."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.fetched, self.alts, self.players = set(), [], [], [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids |= {attributes.get("id"), attributes.get("name")}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        elif tag == "link" or "src" in attributes:
            self.fetched.append(attributes.get("src") or attributes["href"])
        if tag == "img":
            self.alts.append(attributes.get("alt"))
        self.players += tag == "audio"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if not all(map(importlib.util.find_spec, ("sphinx", "furo", "myst_nb", "autoapi"))):
        pytest.skip("the website's generator is not installed: ./run_all.sh site")
    folder = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run(
        [sys.executable, BUILD, folder], capture_output=True, text=True, check=False, cwd=folder.parent
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in sorted(site.glob("**/*.html"))}


@pytest.mark.timeout(300)
def test_every_link_leads_somewhere_and_nothing_is_fetched_from_elsewhere(site, pages):
    assert len(pages) > 30
    for path, page in pages.items():
        for link in page.fetched + page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert link in page.links and parts.scheme in ("https", "mailto"), f"{path.name}: {link}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file() and target.is_relative_to(site), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids | {""}, f"{path.name}: {link}"
    for path in site.glob("**/*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", path.read_text(encoding="utf-8")), path


def test_pages_of_notebooks_hold_all_their_sounds_and_pictures(site, pages):
    total = 0
    for name in NOTEBOOKS:
        cells = json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]
        data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
        players = sum("".join(one.get("text/html", "")).count("<audio ") for one in data)
        pictures = sum(not one.keys().isdisjoint({"image/png", "image/svg+xml"}) for one in data)
        page = pages[site / name.with_suffix(".html")]
        assert page.players == players and len(page.alts) >= pictures, name
        total += players
    if total:  # there are none while notebooks wait for their outputs
        assert pages[site / "listen.html"].players == total
    assert all(alt for page in pages.values() for alt in page.alts)


def test_formulas_are_whole(site, pages):
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    formulas = re.findall(r"<math.*?</math>", text, re.DOTALL)
    assert formulas and not [formula for formula in formulas if re.search(r"\\[a-zA-Z]", formula)]


def test_reference_and_search_know_the_package(site, pages):
    for module in (ROOT / "soundscapes_utils").glob("[a-z]*.py"):
        page = pages[site / f"reference/soundscapes_utils/{module.stem}/index.html"]
        assert f"module-soundscapes_utils.{module.stem}" in page.ids
    text = (site / "reference/soundscapes_utils/fad/index.html").read_text(encoding="utf-8")
    assert "Kilgour" in text and 'class="problematic"' not in text
    words = (site / "searchindex.js").read_text(encoding="utf-8")
    assert "soundscapes_utils.mixing" in words and "signal" in words


@pytest.mark.timeout(240)
@pytest.mark.parametrize("width, scheme", [(1200, "light"), (400, "dark")])
def test_pages_in_a_browser(site, tmp_path, width, scheme):
    if test_report.BROWSER is None:
        pytest.skip("no Chromium or Chrome on this machine")
    pytest.importorskip("websocket", reason="websocket-client comes with JupyterLab")
    browser = test_report.Browser(tmp_path, width)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.call("Emulation.setEmulatedMedia", features=[feature])
    # files that fail to load, and errors of scripts
    listen = "errors = []; addEventListener('error', e => errors.push(e.message || e.target.src), true);"
    listen += "addEventListener('unhandledrejection', e => errors.push(String(e.reason)))"
    browser.call("Page.enable")
    browser.call("Page.addScriptToEvaluateOnNewDocument", source=listen)
    for name in ("index", "notebooks/00_start_here", "notebooks/01_dataset_mixing", "listen",
                 "reference/soundscapes_utils/fad/index"):  # fmt: skip
        if not (site / f"{name}.html").is_file():
            continue
        address = (site / f"{name}.html").as_uri()
        browser.call("Page.navigate", url=address)
        ready = f"document.readyState === 'complete' && location.href === {json.dumps(address)}"
        browser.until(lambda ready=ready: browser.value(ready))
        assert browser.value("document.documentElement.scrollWidth") <= width, name
        dark = browser.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 128")
        assert dark == (scheme == "dark"), name
        assert browser.value("errors") == [], name
    address = (site / "search.html").as_uri() + "?q=kernel_distance"
    browser.call("Page.navigate", url=address)
    browser.until(lambda: browser.value("!!document.querySelector('#search-results li a')"))
    assert browser.value("errors") == []
    browser.close()
