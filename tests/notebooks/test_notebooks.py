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

from soundscapes_utils import pipeline, report, store

ROOT = store.project_root(Path(__file__).parent)
NOTEBOOKS = pipeline.notebooks(ROOT)
DEFAULTS = pipeline.resolve_parameters("quick", root=ROOT)  # this profile changes none
# The tables that stages hand to each other, with the columns that the others rely on.
TABLES = {
    "clips": "clip_id path label fold source_id dataset duration_s sample_rate",
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
        page = report.write_report(pipeline.run("test", root=clone))
    for name, columns in TABLES.items():
        table = pd.read_csv(clone / "runs/test/tables" / f"{name}.csv")
        assert len(table) and set(columns.split()) <= set(table.columns), name
    for stem in NOTEBOOKS:
        assert (clone / "runs/test/tables" / f"{stem[:2]}_summary.csv").is_file()
        assert f'href="html/{stem}.html"' in page.read_text(encoding="utf-8")
    pipeline.run("test", root=clone)
    assert capsys.readouterr().out.count("unchanged, skipped") == len(NOTEBOOKS)


@pytest.mark.notebooks
@pytest.mark.timeout(1800)
def test_committed_outputs_still_hold(clone, capfd):
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    words += ["--nbval-lax", "--nbval-current-env"]
    words += ["--nbval-sanitize-with", str(Path(__file__).with_name("sanitize.cfg"))]
    words += [str(clone / "notebooks" / path.name) for path in NOTEBOOKS.values()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_PREFER_ENV_PATH": "1"}
    with capfd.disabled():
        print(flush=True)
        done = subprocess.run(words, cwd=clone, env=environment, check=False)
    assert done.returncode == 0


# --- how they are written ------------------------------------------------------------------------

every = pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=NOTEBOOKS.keys())


@every
def test_parameters_are_plain_commented_and_injectable(path):
    parameters = DEFAULTS[path.stem]
    tagged = [
        cell
        for cell in nbformat.read(path, as_version=4).cells
        if "parameters" in cell.metadata.get("tags", [])
    ]
    assert len(tagged) == 1
    lines = tagged[0].source.splitlines()
    assert len(lines) == len(parameters) + 1
    assert sum(line.startswith("run_dir = ") for line in lines) == 1
    assert all(re.search(r"  # \S", line) for line in lines), "every parameter says what it is"


@every
def test_more_text_than_code_in_short_cells_without_branches_for_profiles(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    lengths = sorted(len(source.splitlines()) for source in code)
    assert len(cells) - len(code) >= len(code)
    assert statistics.median(lengths) <= 8
    assert lengths[int(0.9 * (len(lengths) - 1))] <= 35
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


def test_a_name_means_the_same_in_all_notebooks():
    seen = {}
    for stem in NOTEBOOKS:
        for name, default in DEFAULTS[stem].items():
            first, value = seen.setdefault(name, (stem, default))
            assert (type(default), default) == (type(value), value), f"{name}: {first} and {stem}"


def test_every_load_of_sounds_takes_the_parameters_of_own_ones():
    asked = {"load_clips": {"sounds_root"}, "load_scenes": {"scenes_root", "ambient_classes"}}
    found = {name: set() for name in asked}
    for stem, path in NOTEBOOKS.items():
        code = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        for node in ast.walk(ast.parse("\n".join(code))):
            name = getattr(getattr(node, "func", None), "attr", "")
            if name in asked:
                passed = {word.arg for word in node.keywords if ast.unparse(word.value) == word.arg}
                assert asked[name] <= passed and asked[name] <= DEFAULTS[stem].keys(), stem
                found[name].add(stem[:2])
        writes = re.search(
            r"captions\.(mix_captions|prompts|negative_prompt)|plan_scenes", "".join(code)
        )
        assert not writes or "captions.add_words(words)" in "".join(code), stem
        assert bool(writes) == ("words" in DEFAULTS[stem]), stem
    assert found == {"load_clips": {"00", "01"}, "load_scenes": {"00", "01", "02", "03"}}
