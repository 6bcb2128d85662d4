"""The runner, on throw-away projects with tiny notebooks, and what it says of the machine."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat import v4

from soundscapes_utils import __main__ as cli
from soundscapes_utils import audio, datasets, pipeline, report, store

FIRST = """
run_dir = "runs/quick"  # where results go
seed = 0  # of everything
rate = 0.5  # a number
flag = False  # a switch
folds = [1, 2]  # a list
esc50_root = ""  # recordings
"""
USES_PACKAGE = "from soundscapes_utils import store\nrun = store.RunFolder(run_dir)\n"
WRITE = USES_PACKAGE + (
    "import pandas as pd\n"
    "run.save_table(pd.DataFrame({'seed': [seed]}), 'mixes0')\n"
    "run.save_table(pd.DataFrame({'quantity': ['the seed'], 'value': [seed], 'note': ['<n>']}),"
    " '00_summary')"
)
READ = USES_PACKAGE + (
    "seen = run.load_table('mixes0', made_by='00_make')\n"
    "run.save_table(seen.assign(gain=gain), 'result')"
)


def write_notebook(path, parameters, *code, text="# A title\n\nA sentence."):
    cells = [v4.new_markdown_cell(text)]
    cells.append(v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    cells += [v4.new_code_cell(source) for source in code]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # random ids would differ between two writings
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(v4.new_notebook(cells=cells, metadata=kernel), path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    root = tmp_path / "clone"
    (root / "notebooks" / "profiles").mkdir(parents=True)
    (root / "pyproject.toml").write_text("")
    (root / "notebooks/profiles/quick.yaml").write_text("description: small\n")
    (root / "notebooks/profiles/large.yaml").write_text(
        "extends: quick\ncommon: {seed: 5}\n01_use: {gain: 2}\n"
    )
    write_notebook(root / "notebooks/00_make.ipynb", FIRST, WRITE)
    write_notebook(root / "notebooks/01_use.ipynb", 'run_dir = "runs/quick"\ngain = 1.0\n', READ)
    monkeypatch.chdir(root)
    return root


def executions(root, name="quick"):
    stages = json.loads((root / "runs" / name / "run.json").read_text())["stages"]
    return {stem: stage["started"] + stage["status"] for stem, stage in stages.items()}


# --- inside a notebook ---------------------------------------------------------------------------


def test_relative_run_dir_is_the_same_folder_from_the_root_and_from_notebooks(project, monkeypatch):
    from_root = store.RunFolder("runs/x").path
    monkeypatch.chdir(project / "notebooks")
    assert store.RunFolder("runs/x").path == from_root == project / "runs" / "x"


def test_tables_come_back_as_they_were_saved(tmp_path):
    run = store.RunFolder(tmp_path)
    table = pd.DataFrame({"label": ["dog", "rain, heavy"], "value": [1.5, -2e-9]})
    run.save_table(table, "t")
    pd.testing.assert_frame_equal(run.load_table("t", made_by="00_x"), table)


def test_missing_table_names_the_notebook_to_run(tmp_path):
    with pytest.raises(store.MissingStage, match="run notebook 02_synthetic_generation first"):
        store.RunFolder(tmp_path).load_table("generated", made_by="02_synthetic_generation")


@pytest.mark.parametrize("fails_at", ["to_csv", "replace"])
def test_full_disk_leaves_the_old_table_and_no_debris(tmp_path, monkeypatch, fails_at):
    run = store.RunFolder(tmp_path)
    run.save_table(pd.DataFrame({"a": [1]}), "t")

    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = pd.DataFrame if fails_at == "to_csv" else os
    monkeypatch.setattr(owner, fails_at, no_space)
    with pytest.raises((OSError, store.DataError), match="No space left"):
        run.save_table(pd.DataFrame({"a": [2]}), "t")
    monkeypatch.undo()
    assert run.load_table("t", made_by="00_x")["a"].tolist() == [1]
    assert [path.name for path in run.tables.iterdir()] == ["t.csv"]


def test_figure_carries_its_caption(tmp_path):
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure()
    figure.subplots().set_title("Loudness of the mixes")
    shown = store.RunFolder(tmp_path).save_figure(figure, "01_loudness")
    path = tmp_path / "figures/01_loudness.png"
    assert shown.data == path.read_bytes() and shown.alt == "Loudness of the mixes"
    assert Image.open(path).info["Description"] == "Loudness of the mixes"


# --- parameters ----------------------------------------------------------------------------------


def test_texts_become_the_type_of_the_default(project):
    given = {"seed": "3", "rate": "1e-3", "flag": "true", "folds": "[3, 4]", "gain": "2"}
    resolved = pipeline.resolve_parameters("quick", given, project)
    expected = {"seed": 3, "rate": 0.001, "flag": True, "folds": [3, 4], "esc50_root": ""}
    assert resolved["00_make"] == expected
    assert resolved["01_use"] == {"gain": 2.0}
    assert isinstance(resolved["01_use"]["gain"], float)


def test_profile_extends_and_command_line_wins(project):
    assert pipeline.resolve_parameters("large", {}, project)["00_make"]["seed"] == 5
    assert pipeline.resolve_parameters("large", {"seed": 9}, project)["00_make"]["seed"] == 9


@pytest.mark.parametrize(
    ("profile", "given", "only", "message"),
    [
        ("qick", {}, None, "no profile 'qick'; nearest: quick"),
        ("quick", {"seeed": "1"}, None, "no parameter 'seeed'; nearest: seed"),
        ("quick", {"seed": "one"}, None, "'seed' of 00_make takes a whole number, not 'one'"),
        ("quick", {"seed": 1.5}, None, "takes a whole number"),
        ("quick", {"flag": "perhaps"}, None, "takes true or false"),
        ("quick", {"folds": "1"}, None, r"takes a list such as \[1, 2\]"),
        ("quick", {"folds": "[1, b]"}, None, "takes a list"),
        ("quick", {"esc50_root": "nowhere"}, None, "nowhere does not exist"),
        ("quick", {"run_dir": "elsewhere"}, None, "use --name"),
        ("quick", {}, "07", "no notebook '07'"),
        ("quick", {"seed": "1"}, "01", "notebook 01: no parameter 'seed'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(project, profile, given, only, message):
    with pytest.raises(pipeline.UsageError, match=message):
        pipeline.run(profile, given, only=only, root=project)
    assert not (project / "runs").exists()


def test_profile_with_an_unknown_section_or_parameter(project):
    path = project / "notebooks/profiles/mine.yaml"
    path.write_text("01_us: {gain: 2}\n")
    with pytest.raises(pipeline.UsageError, match="no notebook '01_us'; nearest: 01_use"):
        pipeline.resolve_parameters("mine", {}, project)
    path.write_text("01_use: {gian: 2}\n")
    with pytest.raises(pipeline.UsageError, match="no parameter 'gian'; nearest: gain"):
        pipeline.resolve_parameters("mine", {}, project)


@pytest.mark.parametrize("line", ["x = {}", "x: int = 1", "x = y = 1", "x = (1, 2)", "x = None"])
def test_parameters_cell_holds_plain_values_only(project, line):
    write_notebook(project / "notebooks/01_use.ipynb", line)
    with pytest.raises(pipeline.UsageError, match="scalar or list"):
        pipeline.resolve_parameters("quick", root=project)


def test_typed_paths_are_meant_from_where_one_stands(project, tmp_path, monkeypatch):
    (tmp_path / "elsewhere" / "ESC-50").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    resolved = pipeline.resolve_parameters("quick", {"esc50_root": "ESC-50"}, project)
    assert resolved["00_make"]["esc50_root"] == str(tmp_path / "elsewhere" / "ESC-50")


@pytest.mark.parametrize("name", ["../up", ".hidden", "a b", ""])
def test_run_name_stays_in_runs(project, name):
    if name:
        with pytest.raises(pipeline.UsageError, match="run's name"):
            pipeline.run("quick", name=name, root=project)
    else:
        assert pipeline.resolve_parameters("quick", {}, project)


@pytest.mark.parametrize("copy", ["00_make-Copy1", "00_make (1)", "01_use copy", "0_make", "00_"])
def test_copies_of_notebooks_do_not_join(project, copy):
    (project / "notebooks/00_make.ipynb").rename(project / "notebooks/00_mäke_2.ipynb")
    write_notebook(project / f"notebooks/{copy}.ipynb", "other = 1\n")
    assert list(pipeline.notebooks(project)) == ["00_mäke_2", "01_use"]


@pytest.mark.parametrize(
    "cell", ["x = !ls", "%matplotlib inline", "%%time\nseed = 1", "?print", "files = %sx ls", "!ls"]
)
def test_cells_are_read_as_ipython_reads_them(project, monkeypatch, cell):
    import papermill

    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: None)
    write_notebook(project / "notebooks/00_make.ipynb", FIRST, cell, "this is no Python")
    pipeline.run("quick", root=project)
    if "x =" not in cell and "files" not in cell:
        write_notebook(
            project / "notebooks/00_make.ipynb", f"%time\n{FIRST}{cell}\n".replace("%time\n%%", "%%")
        )
        assert pipeline.resolve_parameters("quick", {"seed": 2}, project)["00_make"]["seed"] == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"cells": 5}', '{"cells": [{}]}', "\xff"])
def test_what_is_no_notebook_is_named(project, content):
    (project / "notebooks/01_use.ipynb").write_text(content, encoding="latin-1")
    with pytest.raises(pipeline.UsageError, match=r"01_use\.ipynb: not a notebook"):
        pipeline.resolve_parameters("quick", root=project)


def test_yaml_types_nothing_by_itself(project):
    path = project / "notebooks/profiles/mine.yaml"
    path.write_text("00_make: {seed: 010, rate: 1e-3, folds: [08, 1], flag: TRUE}\n")
    values = pipeline.resolve_parameters("mine", {}, project)["00_make"]
    assert (values["seed"], values["rate"], values["folds"], values["flag"]) == (10, 0.001, [8, 1], True)
    for wrong in ("flag: on", "flag: yes", "seed: 1:30", "seed: 0x10", "rate: .nan", "rate: 1e999"):
        path.write_text(f"00_make: {{{wrong}}}\n")
        with pytest.raises(pipeline.UsageError, match=f"'{wrong[:4]}' of 00_make takes"):
            pipeline.resolve_parameters("mine", {}, project)


NO_PROFILES = ["[1, 2]", "just text", "00_make: 5", "00_make: [seed]", "a: [", "offline: perhaps"]
NO_PROFILES += ["? [a]\n: 1", "extends: mine", "extends: other", "extends: [quick, large]", "\xff"]


@pytest.mark.parametrize("content", NO_PROFILES)
def test_what_is_no_profile_is_refused_in_words(project, content):
    path = project / "notebooks/profiles/mine.yaml"
    path.write_text(content, encoding="latin-1")
    (path.parent / "other.yaml").write_text("extends: mine\n")
    with pytest.raises(pipeline.UsageError, match="mine"):
        pipeline.resolve_parameters("mine", {}, project)


REAL = store.project_root(Path(__file__).parent)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("test_folds", "[1, 2", "takes a list"),
        ("n_mixes", "-5", "from 5 on, not -5"),
        ("learning_rate", "nan", "takes a number, not 'nan'"),
        ("learning_rate", "inf", "takes a number, not 'inf'"),
        ("device", "3", "takes cpu, mps, cuda"),
        ("test_fold", "11", "from 1 to 10"),
        ("seed", "-1", "from 0 to 4294967295"),
        ("try_shares", "[0.5, 1.5]", "to 1, not 1.5"),
        ("metrics", '["FAD", "KID"]', "not 'KID'"),
        ("backend", "audioldm3", "audioldm2.*not 'audioldm3'"),
        ("dataset", "esc11", "esc10.*not 'esc11'"),
        ("prompt_family", "none.csv", "none.csv does not exist"),
        ("checkpoint", "./none", "none does not exist"),
    ],
)
def test_values_that_no_stage_takes_are_refused_by_name(name, value, message):
    with pytest.raises(pipeline.UsageError, match=f"'{name}' of .*{message}"):
        pipeline.resolve_parameters("quick", {name: value}, REAL, appendix=True)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["rate", "seed", "gain"]), st.floats(-1e9, 1e9))
def test_numbers_come_through_as_they_were_typed(tmp_path_factory, name, number):
    default = {"rate": 0.5, "seed": 0, "gain": 1.0}[name]
    path = tmp_path_factory.getbasetemp() / "numbers"
    (path / "notebooks/profiles").mkdir(parents=True, exist_ok=True)
    (path / "notebooks/profiles/quick.yaml").write_text("")
    write_notebook(path / "notebooks/00_x.ipynb", f"{name} = {default}\n")
    number = abs(int(number)) if name == "seed" else number
    resolved = pipeline.resolve_parameters("quick", {name: repr(number)}, path)
    assert resolved == {"00_x": {name: number}}


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """The real notebooks and profiles, none of whose cells is executed."""
    import papermill

    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "download_dataset", lambda *_: None)
    shutil.copytree(REAL / "notebooks", tmp_path / "notebooks")
    (tmp_path / "data").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("profile", "given", "message"),
    [
        ("quick", {}, None),
        ("test", {}, None),
        ("esc10", {}, None),
        ("esc10", {"n_per_class": "4"}, "both:0.5 needs 12 synthetic clips per class, n_per_class is 4"),
        ("esc10", {"counts": "10%"}, "both:0.5 needs 12 synthetic clips per class, counts is 10%"),
        ("esc10", {"test_folds": "[2]"}, "trained on all but 5 and the next"),
        ("esc10", {"test_folds": "[1]"}, None),
        ("esc10", {"n_per_class": "7", "arms": '["mixed:1"]'}, "mixed:1 needs 8 synthetic clips"),
        ("esc10", {"arms": '["synthetic:1.1"]'}, "synthetic:1.1 needs 26 synthetic clips"),
        ("esc10", {"few_arms": '["both/16:2"]'}, "both/16:2 needs 32 synthetic clips"),
        ("quick", {"n_per_class": "2", "real_per_class": "0"}, "both:1 needs 24 synthetic clips"),
        ("quick", {"n_per_class": "1", "real_per_class": "2"}, "both:1 needs 2 synthetic clips"),
        ("quick", {"arms": '["real","both:x"]'}, "cannot read the arm 'both:x'"),
        (
            "quick",
            {"few_arms": '["real/99"]'},
            "real/99 needs 99 real clips per class; of 40, 3/5 train",
        ),
        ("quick", {"real_per_class": "25"}, "real needs 25 real clips per class"),
        ("quick", {"models": '["sbcnnn"]'}, "models are"),
        ("quick", {"arms": '["real", "both@mine:1"]'}, "both@mine:1: no table .* 'mine'"),
        ("quick", {"challenge_form": "true"}, "challenge_form needs dcase_root"),
        pytest.param(
            "quick",
            {"mixed_precision": "fp16"},
            "fp16 needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        ("quick", {"snr_db": "[20, 15]"}, "20.0, 15.0"),
        ("quick", {"onset": "7"}, "does not lie in 5.0 s"),
    ],
)
def test_what_can_be_known_before_is_said_before(planned, profile, given, message):
    if message is None:
        assert pipeline.run(profile, given, root=planned, appendix=True)
        return
    with pytest.raises(pipeline.UsageError, match=message):
        pipeline.run(profile, given, root=planned, appendix=True)
    assert not (planned / "runs").exists()


@pytest.mark.parametrize(
    ("profile", "given", "fetched"),
    [
        ("esc10", {}, True),
        ("esc10", {"esc50_root": "ESC"}, False),
        ("esc10", {"data_dir": "with_esc50"}, False),
        ("quick", {}, False),
    ],
)
def test_esc10_is_fetched_before_anything_runs(planned, monkeypatch, profile, given, fetched):
    asked = []
    monkeypatch.setattr(datasets, "download_dataset", lambda *what: asked.append(what))
    monkeypatch.chdir(planned)
    (planned / "pyproject.toml").touch()
    for folder in ("ESC", "with_esc50/ESC-50"):
        (planned / folder).mkdir(parents=True)
    pipeline.run(profile, given, root=planned)
    assert asked == [("esc10", planned / "data")] * fetched


def write_sounds(folder, **counts):
    for label, count in counts.items():
        for number in range(count):
            audio.save_audio(folder / label / f"{number}.wav", np.full(800, 0.1), 8000)
    return str(folder)


@pytest.mark.parametrize(
    ("counts", "given", "message"),
    [
        ({"pump": 5, "saw": 5}, {}, None),
        ({"pump": 5, "saw": 5}, {"ambient_classes": "[pump]"}, None),
        ({"pump": 5}, {}, "classes: 1, recordings of pump: 5; a study needs two classes, one subf"),
        ({"pump": 5, "saw": 2}, {}, "saw: 2; .* add some, or leave one out"),
        ({"pump": 5, "saw": 4}, {}, "test fold [0-9] leaves a class nothing .*test on another"),
        ({"pump": 5, "saw": 5}, {"test_folds": "[6]"}, "test fold 6"),
        (
            {"pump": 5, "saw": 5},
            {"ambient_classes": "[hall]"},
            "ambient_classes hall: name some of pump",
        ),
        ({"pump": 5, "saw": 5}, {"words": "nowhere.csv"}, "nowhere.csv does not exist"),
    ],
)
def test_own_sounds_are_checked_before_anything_runs(planned, tmp_path, counts, given, message):
    given = given | {"sounds_root": write_sounds(tmp_path / "mine", **counts)}
    if counts.get("saw") == 4:
        # whichever fold lacks the class is the one that is asked for
        clips = datasets.load_folder(given["sounds_root"])
        lacking = ({*range(1, 6)} - set(clips.fold[clips.label == "saw"])).pop()
        given |= {"test_fold": str(lacking), "test_folds": f"[{lacking}]"}
    if message is None:
        assert pipeline.run("own", given, root=planned)
        return
    with pytest.raises(store.DataError, match=message) as caught:
        pipeline.run("own", given, root=planned)
    assert not (planned / "runs").exists() and not re.search("delete|fetch", str(caught.value))


def test_few_scenes_are_refused_before_anything_runs(planned, tmp_path):
    given = {"sounds_root": write_sounds(tmp_path / "mine", pump=5, saw=5)}
    given["scenes_root"] = write_sounds(tmp_path / "places", yard=1)
    with pytest.raises(store.DataError, match="places: all recordings fall into fewer than three"):
        pipeline.run("own", given, root=planned)
    write_sounds(tmp_path / "places", yard=3)
    assert pipeline.run("own", given, root=planned)


def test_one_notebook_needs_the_sounds_only_if_it_loads_them(planned, tmp_path):
    with pytest.raises(store.DataError, match="own: no such folder; name that of your sounds"):
        pipeline.run("own", only="00", root=planned)
    assert pipeline.run("own", only="05", root=planned)
    assert pipeline.run("own", only="02", root=planned)


# --- staleness -----------------------------------------------------------------------------------


@pytest.fixture
def runs_again(project, monkeypatch):
    """Whether 01_use would run again after a finished run; its cells are not really executed."""
    (project / "runs/quick/notebooks").mkdir(parents=True)
    for path in (project / "notebooks").glob("*.ipynb"):
        (project / "runs/quick/notebooks" / path.name).write_text("{}")
    executed = []
    import papermill

    def execute(source, *_, **__):
        executed.append(source.stem)

    monkeypatch.setattr(papermill, "execute_notebook", execute)

    def check(given=None, stem="01_use"):
        executed.clear()
        pipeline.run("quick", given, root=project)
        return stem in executed

    check()
    assert not check()
    return check


def test_results_are_stale_after_a_change_of_values_inputs_or_code(project, runs_again, tmp_path):
    assert runs_again({"gain": 2.0}) and not runs_again({"gain": 2.0})
    data = tmp_path / "ESC-50"
    data.mkdir()
    (data / "data.csv").write_text("a")
    given = {"esc50_root": str(data)}
    assert runs_again(given, "00_make")
    (data / "data.csv").write_text("ab")
    assert runs_again(given, "00_make") and not runs_again(given, "00_make")
    source = project / "notebooks/01_use.ipynb"
    write_notebook(source, "gain = 1.0\n", READ)
    assert runs_again()
    write_notebook(source, "gain = 1.0\n", READ, text="# Words do not change results")
    assert not runs_again()


@pytest.mark.parametrize("place", ["my_net.py", "my_layers.py", "my_package/deep/layers.py"])
def test_results_are_stale_after_ones_own_class_was_edited(project, runs_again, monkeypatch, place):
    monkeypatch.setattr(sys, "path", [*sys.path])
    own = {"my_net.py": "from torch import nn\nimport my_layers\nclass Net: pass", "my_layers.py": ""}
    own |= {"my_package/__init__.py": "class Net: pass", "my_package/deep/layers.py": "size = 1"}
    for name, text in (own | {"unrelated.py": ""}).items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    kind = f"{place.partition('/')[0].removesuffix('.py')}:Net".replace("layers", "net")
    write_notebook(project / "notebooks/01_use.ipynb", 'models = ["sbcnn"]\n', READ)
    given = {"models": f"[sbcnn, {kind}]"}
    assert runs_again(given) and not runs_again(given)
    (project / "unrelated.py").write_text("# edited")
    assert not runs_again(given)
    (project / place).write_text(own[place] + "\n# edited")
    assert runs_again(given) and not runs_again(given)


def test_results_are_stale_where_the_notebook_that_they_build_on_has_changed(project, runs_again):
    source = project / "notebooks/00_make.ipynb"  # which 01_use names
    write_notebook(source, FIRST, WRITE, "1 + 1")
    assert runs_again()
    write_notebook(project / "notebooks/01_use.ipynb", "gain = 1.0\n", "gain + 1")
    assert runs_again()
    write_notebook(source, FIRST, WRITE, "1 + 2")
    assert not runs_again()


def test_only_the_modules_that_a_notebook_leads_to_count(project, monkeypatch, runs_again):
    package = project / "soundscapes_utils"
    package.mkdir()
    (project / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    (package / "one.py").write_text("def f():\n    from . import two\n")
    (package / "two.py").write_text("from .three import x\n")
    for name in ("three.py", "four.py", "words.csv"):
        (package / name).write_text("")
    monkeypatch.setattr(pipeline, "PACKAGE", package)
    for code in ("from soundscapes_utils import one", "%time\nimport soundscapes_utils.one as o"):
        write_notebook(project / "notebooks/01_use.ipynb", "gain = 1.0\n", code)
        runs_again()
        (package / "four.py").write_text(f"# {code}")
        assert not runs_again()
        for name in ("one.py", "three.py", "words.csv"):
            with (package / name).open("a") as file:
                file.write("# changed\n")
            assert runs_again(), name


# --- running -------------------------------------------------------------------------------------


def test_run_resume_and_report(project, capsys):
    folder = pipeline.run("quick", {"seed": "3"}, root=project)
    assert folder == project / "runs/quick"
    assert pd.read_csv(project / "runs/quick/tables/result.csv")["seed"].tolist() == [3]
    record = json.loads((project / "runs/quick/run.json").read_text())
    assert record["stages"]["00_make"]["parameters"]["seed"] == 3
    assert record["stages"]["00_make"]["outputs"] == ["tables/00_summary.csv", "tables/mixes0.csv"]
    assert 0.01 < record["stages"]["00_make"]["peak_memory_gb"] < 64
    assert record["versions"]["papermill"] and record["finished"]
    page = report.write_report(folder).read_text()
    assert "the seed" in page and "&lt;n&gt;" in page

    before = executions(project)
    capsys.readouterr()
    pipeline.run("quick", {"seed": 3}, root=project)
    assert capsys.readouterr().out.count("unchanged, skipped") == 2
    assert executions(project) == before

    (project / "runs/quick/tables/result.csv").unlink()  # what is gone is made again
    pipeline.run("quick", {"seed": 3}, root=project)
    out = capsys.readouterr().out
    assert "00_make: unchanged" in out and "01_use: unchanged" not in out


def test_failing_cell_names_itself_and_resumes(project, capsys):
    source = project / "notebooks/01_use.ipynb"
    write_notebook(source, 'run_dir = ""\ngain = 1.0\n', "x = 1\n", "raise ValueError('too <loud>')")
    assert main_in(project, ["run", "quick", "-p", "seed", "3", "--name", "my-run"]) == 1
    said = capsys.readouterr().err
    assert "01_use failed in cell In [4]" in said
    assert "ValueError: too <loud>" in said
    assert "./run_all.sh quick -p seed 3 --name my-run" in said
    assert "runs/my-run/notebooks/01_use.ipynb" in said
    record = json.loads((project / "runs/my-run/run.json").read_text())
    assert record["stages"]["01_use"]["status"] == "failed"

    write_notebook(source, 'run_dir = ""\ngain = 1.0\n', READ)
    assert main_in(project, ["run", "quick", "-p", "seed", "3", "--name", "my-run"]) == 0
    said = capsys.readouterr().out
    assert "00_make: unchanged, skipped" in said and "01_use: unchanged" not in said
    assert "It took" in said and "runs/my-run/index.html" in said


def main_in(project, arguments):
    """Call the command line as if the package lay in `project`."""
    real = pipeline.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "run", lambda *a, **k: real(*a, root=project, **k))
        return cli.main(arguments)


def test_full_disk_inside_a_notebook_and_in_the_runner(project, monkeypatch):
    code = "raise OSError(28, 'No space left on device', 'a.wav')"
    write_notebook(project / "notebooks/00_make.ipynb", FIRST, code)
    with pytest.raises(pipeline.RunFailed, match=r"(?s)No space left.*make room.*Resume with"):
        pipeline.run("quick", root=project)

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(pipeline.RunFailed, match=r"(?s)No space left.*Resume with"):
        pipeline.run("quick", root=project)


MORE = 'run_dir = "runs/quick"\ngain = 1.0\nmore = {}\n'
SETTLE = "from soundscapes_utils import pipeline\nmore = pipeline.settings('01_use', more)\n"
SETTLE += "from soundscapes_utils import store\nimport pandas as pd\nrun = store.RunFolder(run_dir)\n"
SETTLE += "run.save_table(pd.DataFrame([vars(more) | {'gain': gain}]), 'given')"


@pytest.fixture
def with_more(project):
    (project / "notebooks/more.yaml").write_text(
        "01_use:\n  steps: 20  # of training\n  rates: [0.5, 1.0]  # to try\n  words: ''  # a file\n"
    )
    write_notebook(project / "notebooks/01_use.ipynb", MORE, SETTLE)
    return project


def test_what_is_seldom_changed_comes_from_its_file_profile_and_command_line(with_more):
    (with_more / "notebooks/profiles/large.yaml").write_text("01_use: {steps: 30, gain: 2}\n")
    resolved = pipeline.resolve_parameters("large", {"rates": "[2]"}, with_more)["01_use"]
    assert resolved == {"gain": 2.0, "steps": 30, "rates": [2.0], "words": ""}
    pipeline.run("large", {"rates": "[2]"}, root=with_more)
    given = store.read_table(with_more / "runs/large/tables/given.csv")
    assert given.loc[0, ["steps", "rates", "gain"]].tolist() == [30, "[2.0]", 2]
    executed = (with_more / "runs/large/notebooks/01_use.ipynb").read_text()
    assert 'more = {\\"steps\\": 30, \\"rates\\": [2.0]}' in executed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"stepz": 1}, "no parameter 'stepz'; nearest: steps"),
        ({"steps": "many"}, "'steps' of 01_use takes a whole number, not 'many'"),
        ({"steps": 0}, "takes numbers from 1 on, not 0"),
        ({"words": "./none.csv"}, "none.csv does not exist"),
    ],
)
def test_what_more_cannot_hold_is_refused(with_more, more, message):
    assert pipeline.settings("01_use", {"steps": 5}).steps == 5
    with pytest.raises(pipeline.UsageError, match=message):
        pipeline.settings("01_use", more)
    with pytest.raises(pipeline.UsageError, match=message):
        pipeline.run("quick", more, root=with_more)
    assert not (with_more / "runs").exists()


def test_notebooks_that_need_nothing_of_each_other_run_side_by_side(project, capsys):
    """Each waits for the other, so that one after the other they would never end."""
    wait = (
        "import os, pathlib, time\npathlib.Path(f'{here}').touch()\n"
        "while not pathlib.Path(f'{other}').exists(): time.sleep(0.05)\n"
        "assert os.environ['OMP_NUM_THREADS'] and os.getcwd().endswith('notebooks')"
    )
    for name, other in (("01_use", "02_too"), ("02_too", "01_use")):
        code = f"here, other = '{name[3:]}', '{other[3:]}'\n{wait}\n'00_make'"
        write_notebook(project / f"notebooks/{name}.ipynb", 'run_dir = ""\ngain = 1.0\n', code)
    before = Path.cwd()
    (project / "notebooks/profiles/large.yaml").unlink()
    pipeline.run("quick", root=project)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("[1/3] 00_make: ")  # on which both build
    assert sorted(lines[2:4]) == ["[2/3] 01_use …", "[3/3] 02_too …"] and Path.cwd() == before


def test_the_appendix_runs_when_it_is_asked_for(project, capsys):
    (project / "notebooks/appendix").mkdir()
    for name in ("appendix/A1_more.ipynb", "solutions.ipynb", "appendix/A1_more-Copy1.ipynb"):
        write_notebook(
            project / "notebooks" / name, 'run_dir = "runs/quick"\n', READ.replace("=gain", "=1")
        )
    pipeline.run("quick", root=project)
    assert "A1" not in capsys.readouterr().out
    pipeline.run("quick", root=project, appendix=True)
    said = capsys.readouterr().out
    assert said.count("unchanged") == 2 and "A1_more: " in said and "solutions: " in said
    pipeline.run("quick", root=project, only="A1")
    assert "[1/1] A1_more" in capsys.readouterr().out


def test_a_notebook_that_is_opened_first_finds_a_small_set(project, monkeypatch, capsys):
    path = project / "notebooks/00_make.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].metadata["tags"] = ["makes"]
    notebook.cells.append(v4.new_code_cell("raise ValueError('not one of the cells that make')"))
    nbformat.write(notebook, path)
    profile = 'tags: ["parameters", "makes"]\n00_make: {seed: 7}\n'
    (project / "notebooks/profiles/starter.yaml").write_text(profile)
    run = pipeline.open_run("runs/quick")
    assert run.load_table("mixes0", made_by="00_make")["seed"].tolist() == [7]
    said = capsys.readouterr().out
    assert "run notebook 00_make first" in said and "runs/starter" in said and "01_use" not in said
    assert run.load_table("mixes0", made_by="00_make")["seed"].tolist() == [7]
    assert "unchanged, skipped" in capsys.readouterr().out
    monkeypatch.setenv("SOUNDSCAPES_HERE", str(project))  # in a batch run
    with pytest.raises(store.MissingStage):
        pipeline.open_run("runs/quick").load_table("mixes0", made_by="00_make")


def test_only_runs_one_notebook_even_if_unchanged(project, capsys):
    pipeline.run("quick", only="00", root=project)
    pipeline.run("quick", only="0", root=project)
    out = capsys.readouterr().out
    assert "skipped" not in out and "01_use" not in out


@pytest.mark.parametrize("table", [True, False])
def test_run_that_lacks_a_stage_names_the_command_that_helps(project, table, monkeypatch):
    if table:  # a notebook alone: the whole profile brings what it needs
        only, wanted = "01", "./run_all.sh quick"
    else:  # what counts as finished is not there
        write_notebook(project / "notebooks/00_make.ipynb", FIRST, "1 + 1")
        only, wanted = None, "./run_all.sh quick --fresh"
    with pytest.raises(pipeline.RunFailed) as caught:
        pipeline.run("quick", only=only, root=project)
    assert "run notebook 00_make first" in str(caught.value)
    assert str(caught.value).endswith(f"Resume with:\n  {wanted}")


COMMAND = """
import signal, sys
from pathlib import Path
from soundscapes_utils import pipeline, __main__ as cli
for number in (signal.SIGTERM, signal.SIGINT):
    # a shell starts what runs in its background with interrupts ignored
    signal.signal(number, signal.default_int_handler)
real = pipeline.run
pipeline.run = lambda *a, **k: real(*a, root=Path.cwd(), **k)
sys.exit(cli.main(sys.argv[1:]))
"""


def start(project, *words, **environment):
    """Start the command line as if the package lay in `project`."""
    environment = {**os.environ, "PYTHONPATH": str(pipeline.PACKAGE.parent), **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words], cwd=project, env=environment, **pipes
    )


def wait_for(path, process):
    deadline = time.monotonic() + 150
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.1)


# these two wait for real kernels to begin and to end
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_says_how_to_resume_and_resumes(project, how, capsys):
    slow = "made_by = '00_make'\nimport time, pathlib\npathlib.Path('started').touch()\ntime.sleep(60)"
    write_notebook(project / "notebooks/01_use.ipynb", 'run_dir = ""\ngain = 1.0\n', slow)
    process = start(project, "run", "quick")
    wait_for(project / "notebooks/started", process)
    kernels = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(how)
    _, said = process.communicate(timeout=120)
    assert kernels and not psutil.wait_procs(kernels, timeout=10)[1], "a kernel was left behind"
    assert process.returncode == 130
    assert "Interrupted" in said and "./run_all.sh quick" in said
    write_notebook(project / "notebooks/01_use.ipynb", 'run_dir = ""\ngain = 1.0\n', READ)
    pipeline.run("quick", root=project)
    assert "00_make: unchanged, skipped" in capsys.readouterr().out


def test_a_run_owns_its_folder_and_leaves_no_process_behind_when_killed(project, tmp_path):
    code = (
        "import pathlib, subprocess, sys, time\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(300)']\n"
        "subprocess.Popen(sleep, start_new_session=True)\n"
        "pathlib.Path('started').touch()\ntime.sleep(300)"
    )
    write_notebook(project / "notebooks/00_make.ipynb", FIRST, code)
    (tmp_path / "tmp").mkdir()
    process = start(project, "run", "quick", TMPDIR=str(tmp_path / "tmp"))
    wait_for(project / "notebooks/started", process)
    begin = time.monotonic()
    with pytest.raises(pipeline.UsageError, match=rf"runs/quick is in use .*process {process.pid} "):
        pipeline.run("quick", root=project)
    assert time.monotonic() - begin < 5
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert len(children) >= 3 and not psutil.wait_procs(children, timeout=10)[1]
    assert not list((tmp_path / "tmp").glob("soundscapes-*"))
    write_notebook(project / "notebooks/00_make.ipynb", FIRST, WRITE)
    assert pipeline.run("quick", root=project)  # the lock went with its owner


def test_two_runs_at_once_keep_to_themselves(project, tmp_path):
    other = {"1": "2", "2": "1"}
    meet = (
        "import pathlib, time\npathlib.Path(f'here-{seed}').touch()\n"
        f"other = pathlib.Path('here-' + {other}[str(seed)])\n"
        "while not other.exists():\n    time.sleep(0.05)\ntime.sleep(1)"
    )
    write_notebook(project / "notebooks/00_make.ipynb", FIRST, meet, WRITE)
    long = tmp_path / ("a folder with a long name, " * 6)  # more than a socket's path can hold
    long.mkdir()
    places = {"1": str(tmp_path), "2": str(long)}
    runs = [
        start(project, "run", "quick", "-p", "seed", seed, "--name", f"run-{seed}", TMPDIR=place)
        for seed, place in places.items()
    ]
    for seed, process in zip(places, runs, strict=True):
        said = process.communicate(timeout=200)
        assert process.returncode == 0, said
        table = pd.read_csv(project / f"runs/run-{seed}/tables/result.csv")
        assert table["seed"].tolist() == [int(seed)]
    assert {path.suffix or path.name for path in (project / "notebooks").iterdir()} == {
        *(".ipynb", "profiles", "here-1", "here-2")
    }


def test_what_belongs_to_the_caller_does_not_reach_the_kernels(project, tmp_path, monkeypatch):
    evil = tmp_path / "evil"
    (evil / "profile_default/startup").mkdir(parents=True)
    bomb = "raise RuntimeError('not mine')"
    for place in (evil / "yaml.py", evil / "start.py", project / "notebooks/yaml.py"):
        place.write_text(bomb)
    (evil / "profile_default/startup/a.py").write_text("raise SystemExit")
    (project / "notebooks/helper.py").write_text("kind = 'mine'")
    settings = {"PYTHONPATH": evil, "PYTHONSTARTUP": evil / "start.py", "PYTHONUSERBASE": evil}
    settings |= {"IPYTHONDIR": evil, "JUPYTER_PATH": evil, "PYTHONDONTWRITEBYTECODE": "1"}
    settings |= {"MPLBACKEND": "Agg", "MATPLOTLIBRC": evil, "PYTHONHASHSEED": "7"}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    look = (
        "import json, os, pathlib\nimport yaml, helper, soundscapes_utils\n"
        "assert helper.kind == 'mine'\nnames = ('PYTHONDONTWRITEBYTECODE', 'PYTHONHASHSEED')\n"
        "import matplotlib\nassert 'inline' in matplotlib.get_backend()\n"
        f"seen = [k for k, v in os.environ.items() if {str(evil)!r} in v or k in names]\n"
        "pathlib.Path('seen.json').write_text(json.dumps([seen, soundscapes_utils.__file__]))"
    )
    write_notebook(project / "notebooks/00_make.ipynb", FIRST, look, WRITE)
    monkeypatch.chdir(evil)
    pipeline.run("quick", root=project)
    seen, package = json.loads((project / "notebooks/seen.json").read_text())
    # where a class of one's own is looked for, after all else
    assert seen == ["SOUNDSCAPES_HERE"] and Path(package).parent == pipeline.PACKAGE
    assert os.environ["PYTHONPATH"] == str(evil)  # the caller's own settings are back
