"""Build the website: what is committed, as static pages that open from the disk or any web server.

Copies the pages into ``build/website``, with links between files turned into links between pages, and
with the sounds and pictures of the notebooks' outputs as files of their own; Sphinx makes the site of
that. No notebook is run.

    python docs/website/build.py [FOLDER]      # default: site
"""

import base64
import hashlib
import json
import os
import re
import shutil
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# one pattern a line, below the heading that the menu gives it
MENU = {
    "Notebooks": ["notebooks/[0-9]*.ipynb", "notebooks/solutions*.ipynb", "listen.md"],
    "Appendix": ["notebooks/appendix/*.ipynb"],
    "Results": ["docs/results.md", "docs/scale.md", "docs/glossary.md"],
    "The project": [
        "docs/generators.md",
        "data/README.md",
        "data/checkpoints/mini-*/README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    ],
}
# linked already, not there yet: until it is, such a link is plain text
LISTEN = """Every sound of the notebooks, in their order: recordings, mixes, and clips of the built-in
model. The names of the notebooks lead to where they are explained."""
PICTURES = {"image/png": "png", "image/jpeg": "jpg", "image/svg+xml": "svg"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
SOUND = re.compile(r'src="data:audio/(\w+);base64,([^"]+)"')


class Stage:
    """The folder that Sphinx reads; and the links that lead nowhere."""

    def __init__(self, folder):
        self.folder, self.dead = folder, []
        self.pages = {name: sorted(p.relative_to(ROOT).as_posix() for pattern in patterns
                                   for p in ROOT.glob(pattern))
                      for name, patterns in MENU.items()}  # fmt: skip
        self.known = {page: page for pages in self.pages.values() for page in pages}
        self.known["README.md"] = "index.md"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "extra").mkdir(parents=True)

    def write(self, name, content):
        """Write a file of the stage, text or bytes."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))

    def media(self, page, content, suffix):
        """Keep a sound or a picture as a file named by its content; return its address for a page."""
        name = f"media/{hashlib.sha256(content).hexdigest()[:16]}.{suffix}"
        self.write(f"extra/{name}", content)
        return "../" * page.count("/") + name

    def text(self, page, text):
        """Map the links of Markdown: to pages, to files (copied, to be downloaded), or to words."""

        def mapped(match):
            picture, words, target, anchor = match.groups()
            path = os.path.normpath(Path(page).parent / target)
            if path in self.known:
                target = os.path.relpath(self.known[path], Path(self.known.get(page, page)).parent)
                return f"[{words}]({target}{anchor or ''})"
            if (ROOT / path).is_file():
                self.write(path, (ROOT / path).read_bytes())
                return f"{picture}[{words}]({target})"
            if not (ROOT / path).is_dir():
                self.dead.append(f"{page}: {target}")
            return words

        return LINK.sub(mapped, text)

    def output(self, page, output):
        """Move the sounds and pictures of an output into files; pictures keep their alt texts."""
        data, about = output.get("data", {}), output.get("metadata", {})
        if "text/html" in data:
            data["text/html"] = SOUND.sub(
                lambda m: f'src="{self.media(page, base64.b64decode(m[2]), m[1])}"',
                _join(data["text/html"]),
            )
            return
        for mime in PICTURES.keys() & data.keys():
            content = _join(data[mime])
            content = content.encode() if mime.endswith("xml") else base64.b64decode(content)
            source = self.media(page, content, PICTURES[mime])
            alt = about.get(mime, {}).get("alt") or about.get("alt") or "figure"
            picture = f'<img src="{source}" alt="{escape(alt)}" loading="lazy">'
            output["data"] = {"text/html": f'<a href="{source}">{picture}</a>'}

    def notebook(self, page):
        """Stage a notebook, and return the sounds of its outputs by title and last heading."""
        notebook = json.loads((ROOT / page).read_text(encoding="utf-8"))
        sounds, headings = {}, []
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = self.text(page, _join(cell["source"]))
                headings += re.findall(r"^#+ (.+)$", cell["source"], re.MULTILINE)
            for output in cell.get("outputs", []):
                self.output(page, output)
                html = output.get("data", {}).get("text/html", "")
                if "<audio " in html:
                    html = re.sub(r'src="(\.\./)+', 'src="', html)
                    sounds.setdefault((headings[0], headings[-1]), []).append(html)
        self.write(page, json.dumps(notebook))
        return sounds

    def listening(self, notebooks):
        """Gather the sounds of all notebooks on one page."""
        parts = ["# Listen", LISTEN]
        for page, sounds in notebooks.items():
            parts.append(f"## [{next(iter(sounds))[0]}]({page})")
            for (_, heading), players in sounds.items():
                html = "\n".join(re.sub(r"\n\s*\n", "\n", player) for player in players)
                parts += [f"### {heading}", f'<div class="sounds">\n{html}\n</div>']
        self.write("listen.md", "\n\n".join(parts) + "\n")
        self.pages["Notebooks"].append("listen.md")

    def fill(self):
        """Stage all pages, with a menu on the first."""
        notebooks = [page for page in self.known if page.endswith(".ipynb")]
        if sounds := {page: found for page in notebooks if (found := self.notebook(page))}:
            self.listening(sounds)
        for page, name in self.known.items():
            if page.endswith(".md"):
                text = self.text(page, (ROOT / page).read_text(encoding="utf-8"))
                self.write(name, text + (self.menu() if name == "index.md" else ""))

    def menu(self):
        """The menu of all pages, in the words of Sphinx."""
        pages = {**self.pages, "The package": ["reference/soundscapes_utils/index"]}
        return "".join(
            "\n```{toctree}\n:hidden:\n:caption: " + f"{name}\n\n" + "\n".join(listed) + "\n```\n"
            for name, listed in pages.items()
            if listed
        )


def _join(text):
    return text if isinstance(text, str) else "".join(text)


def build(folder):
    """Build the site into a folder, and return 0, or 1 where there were warnings: they are errors."""
    from sphinx.cmd.build import build_main

    stage = Stage(ROOT / "build/website")
    stage.fill()
    for dead in stage.dead:
        print(f"link to a file that is not there: {dead}", file=sys.stderr)
    made = ROOT / "build/website-made/html"
    shutil.rmtree(made.parent, ignore_errors=True)
    words = [
        "-q",
        "-W",
        "--keep-going",
        "-d",
        str(made.parent / "trees"),
        "-c",
        str(Path(__file__).parent),
    ]
    status = build_main([*words, str(stage.folder), str(made)]) or bool(stage.dead)
    if (made / "index.html").is_file():  # an earlier site stays until there is a new one
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made, folder)
    return int(status)


if __name__ == "__main__":
    site = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "site").resolve()
    status = build(site)
    print(f"{'Not clean: ' if status else ''}{site}/index.html")
    sys.exit(status)
