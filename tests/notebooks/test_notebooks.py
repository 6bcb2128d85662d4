"""The notebooks: how they are written, whether they run, and whether their outputs still hold."""

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from soundscapes_utils import pipeline, report, store

ROOT = store.project_root(Path(__file__).parent)
NOTEBOOKS = pipeline.notebooks(ROOT)
SERIES = [stem for stem in NOTEBOOKS if stem[0] == "0"]
# this profile changes none
DEFAULTS = pipeline.resolve_parameters("quick", root=ROOT, appendix=True)
MORE = yaml.safe_load((ROOT / "notebooks" / "more.yaml").read_text(encoding="utf-8"))
# The tables that stages hand to each other, with the columns that the others rely on.
TABLES = {
    "clips": "clip_id path label fold source_id dataset duration_s sample_rate",
    "foregrounds": "clip_id path label fold source_id dataset duration_s sample_rate",
    "scenes": "clip_id path label fold source_id dataset duration_s sample_rate",
    "mixes": "clip_id path label fold source_id dataset duration_s sample_rate split foreground "
    "background scene "
    "background_source onset_s foreground_gain_db background_gain_db snr_db peak_scale seed "
    "caption caption_2 caption_3",
    "generated": "clip_id path label fold source_id dataset duration_s sample_rate prompt "
    "prompt_family negative_prompt backend checkpoint seed guidance_scale steps lufs score heard",
    "scores": "metric embedding reference candidate value ci_low ci_high n_reference "
    "n_candidate floor floor_low floor_high floor_n note",
    "results": "arm model backend prompt_family ratio fold run seed n_real n_synthetic accuracy "
    "macro_f1 epochs seconds",
}


@pytest.fixture
def clone(tmp_path):
    """A copy of the project with its own runs/, so that a user's runs are left alone."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    return tmp_path


@pytest.mark.notebooks
@pytest.mark.timeout(1500)
def test_all_notebooks_run_in_small_and_are_skipped_afterwards(clone, capsys):
    with capsys.disabled():
        print()
        page = report.write_report(pipeline.run("test", root=clone, appendix=True))
    for name, columns in TABLES.items():
        table = pd.read_csv(clone / "runs/test/tables" / f"{name}.csv")
        assert len(table) and set(columns.split()) <= set(table.columns), name
    for stem in NOTEBOOKS:
        assert f'href="html/{stem}.html"' in page.read_text(encoding="utf-8")
        html = (page.parent / "html" / f"{stem}.html").read_text(encoding="utf-8")
        assert "No description has been provided" not in html
    for stem in SERIES:
        assert (clone / "runs/test/tables" / f"{stem[:2]}_summary.csv").is_file()
    found = report.findings(clone / "runs/test")
    assert found["rank"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert found["answer"].str.fullmatch(r"[A-Z][^:]+: .+\.").all()
    assert not found["answer"].str.contains(r"\bnan\b").any()
    pipeline.run("test", root=clone, appendix=True)
    assert capsys.readouterr().out.count("unchanged, skipped") == len(NOTEBOOKS)


@pytest.mark.notebooks
@pytest.mark.timeout(600)
def test_any_notebook_can_be_the_first(clone, capfd):
    """Opened by hand, with nothing before it, a notebook makes in small what it needs, and says so."""
    stem = "04_fad_evaluation"
    small = pipeline.resolve_parameters("test", root=clone, only="04")[stem]
    cell = {name: value for name, value in small.items() if name not in MORE[stem]}
    cell["more"] = {name: value for name, value in small.items() if name in MORE[stem]}
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import papermill; papermill.execute_notebook("
    )
    code += f"{str(NOTEBOOKS[stem])!r}, 'out.ipynb', {cell!r}, kernel_name='python3', cwd='notebooks')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_PREFER_ENV_PATH": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=clone, env=environment, check=True)
    said = (clone / "out.ipynb").read_text(encoding="utf-8")
    assert "runs/starter" in said
    run = json.loads((clone / "runs/starter/run.json").read_text(encoding="utf-8"))
    assert {stage["status"] for stage in run["stages"].values()} == {"finished"}
    assert sorted(run["stages"]) == SERIES[:4]


@pytest.mark.notebooks
@pytest.mark.timeout(1800)
def test_committed_outputs_still_hold(clone, capfd):
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    words += ["--nbval-lax", "--nbval-current-env"]
    words += ["--nbval-sanitize-with", str(Path(__file__).with_name("sanitize.cfg"))]
    # the appendix and the solutions have run above, in small
    words += [str(clone / "notebooks" / f"{stem}.ipynb") for stem in SERIES]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_PREFER_ENV_PATH": "1"}
    with capfd.disabled():
        print(flush=True)
        done = subprocess.run(words, cwd=clone, env=environment, check=False)
    assert done.returncode == 0


# --- how they are written ------------------------------------------------------------------------

every = pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=NOTEBOOKS.keys())


@every
def test_parameters_are_plain_commented_and_injectable(path):
    tagged = [
        cell
        for cell in nbformat.read(path, as_version=4).cells
        if "parameters" in cell.metadata.get("tags", [])
    ]
    assert len(tagged) == 1
    names = [line.partition(" = ")[0] for line in tagged[0].source.splitlines()]
    assert all(re.search(r"  # \S", line) for line in tagged[0].source.splitlines())
    assert names.count("run_dir") == 1 and len({*names} - {"run_dir", "more"}) <= 8
    assert ("more" in names) == bool(MORE.get(path.stem))
    code = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
    for name in DEFAULTS[path.stem]:  # each is read, and in one place
        seldom = name in MORE.get(path.stem, {})
        assert seldom != (name in names)
        read = rf"\bmore\.{name}\b|\b(vars|getattr)\(more\b" if seldom else rf"\b{name}\b(?! = )"
        assert re.search(read, code), name
    assert "more" not in names or f'more = pipeline.settings("{path.stem}", more)' in code
    text = (ROOT / "notebooks/more.yaml").read_text(encoding="utf-8")
    assert all("  # " in line or " # " in line for line in text.splitlines() if line.startswith("  "))


@every
def test_more_text_than_code_in_short_cells_without_branches_for_profiles(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    lengths = sorted(len(source.splitlines()) for source in code)
    assert len(cells) - len(code) >= len(code)
    assert statistics.median(lengths) <= 8
    assert lengths[int(0.9 * (len(lengths) - 1))] <= 20
    for source in code:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.If):
                assert "quick" not in ast.unparse(node.test)


@every
def test_outputs_are_small_and_clean(path):
    assert path.stat().st_size <= 1.5e6
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.get("text")
            text = json.dumps(output.get("text", output.get("data", {}).get("text/plain", "")))
            assert not re.search(r"(?<![\w.:])/(home|root|tmp|work|Users)/", text), text
            assert "it/s]" not in text and "%|" not in text
            for kind in {"image/png", "image/svg+xml"} & {*output.get("data", {})}:
                assert output.metadata[kind]["alt"], cell.source


def test_a_name_means_the_same_in_all_notebooks():
    seen = {}
    for stem in NOTEBOOKS:
        for name, default in DEFAULTS[stem].items():
            first, value = seen.setdefault(name, (stem, default))
            assert (type(default), default) == (type(value), value), f"{name}: {first} and {stem}"


def test_only_the_first_notebook_knows_where_sounds_are():
    asked = {"load_clips": {"sounds_root"}, "load_scenes": {"scenes_root", "ambient_classes"}}
    found = {name: set() for name in asked}
    for stem, path in NOTEBOOKS.items():
        code = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        for node in ast.walk(ast.parse("\n".join(code))):
            name = getattr(getattr(node, "func", None), "attr", "")
            if name in asked:
                passed = {
                    word.arg
                    for word in node.keywords
                    if ast.unparse(word.value).removeprefix("more.") == word.arg
                }
                assert asked[name] <= passed and asked[name] <= DEFAULTS[stem].keys(), stem
                found[name].add(stem[:2])
        writes = re.search(
            r"captions\.(mix_captions|prompts|negative_prompt)|plan_scenes", "".join(code)
        )
        if writes and stem != "solutions":
            assert "captions.add_words(" in "".join(code) and "words" in DEFAULTS[stem], stem
    assert found == {"load_clips": {"00"}, "load_scenes": {"00"}}


def test_links_lead_somewhere():
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs/glossary.md").read_text(encoding="utf-8"), re.M)
    anchors = {re.sub(r"[^\w -]", "", text.lower()).strip().replace(" ", "-") for text in headings}
    for path in NOTEBOOKS.values():
        for cell in nbformat.read(path, as_version=4).cells:
            for target in re.findall(r"\]\(([^)\s]+)\)", cell.source * (cell.cell_type == "markdown")):
                place, _, anchor = target.partition("#")
                if not place.startswith("http"):
                    assert not place or (path.parent / place).exists(), f"{path.name}: {target}"
                    assert not place.endswith("glossary.md") or not anchor or anchor in anchors, target


def test_formulas_become_mathml(tmp_path):
    """Every formula of the notebooks: no LaTeX command is left on their pages, in or outside it."""

    (tmp_path / "notebooks").mkdir()
    stages = {
        stem: {"status": "finished", "parameters": {}, "peak_memory_gb": 0, "seconds": 1}
        for stem in NOTEBOOKS
    }
    for stem, path in NOTEBOOKS.items():
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.source, cell.outputs = "", []
        nbformat.write(notebook, tmp_path / "notebooks" / f"{stem}.ipynb")
    record = {
        "name": "x",
        "profile": "quick",
        "started": "",
        "stages": stages,
        "parameters": {},
        "versions": {},
        "given": {},
    }
    record |= {"python": "", "platform": "", "cores": 2, "git": {"commit": "", "dirty": False}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    report.write_report(tmp_path)
    n = 0
    for stem in NOTEBOOKS:
        html = (tmp_path / "html" / f"{stem}.html").read_text(encoding="utf-8")
        formulas = re.findall(r"<math.*?</math>", html, re.S)
        n += len(formulas)
        body = re.sub(r"<style.*?</style>|<script.*?</script>", "", html, flags=re.S)
        assert not re.search(r"\\(frac|sum|sqrt|alpha|sigma|mu|hat|bar|text|left|lVert)", body), stem
        assert "$" not in re.sub(r"<(code|pre).*?</\1>", "", body, flags=re.S), stem
    assert n >= 20
