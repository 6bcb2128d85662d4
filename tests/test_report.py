"""The page of a run, and what is taken from a run into the repository."""

import html.parser
import json

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat import v4

from soundscapes_utils import pipeline, report, store


class References(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.images, self.ids = [], [], set()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        self.links += [attrs[name] for name in ("src", "href") if name in attrs]
        if tag == "img":
            self.images.append(attrs)


def finished_run(folder):
    from matplotlib.figure import Figure

    from soundscapes_utils import audio

    run = store.RunFolder(folder)
    sounds = []
    for number, label in enumerate(["dog", "rain"]):
        path = run.audio / f"{label}.wav"
        y = 0.3 * np.sin(np.arange(16_000) * 0.05 * (number + 1)).astype(np.float32)
        audio.save_audio(path, y, 16_000)
        sounds.append({"label": label, "scene": "park", "caption": "<b>a dog", "path": path})
    run.save_table(pd.DataFrame(sounds), "mixes")
    figure = Figure()
    figure.subplots().set_title('Two "mixes" & more')
    run.save_figure(figure, "01_mix")
    run.save_table(pd.DataFrame({"quantity": ["mixes"], "value": [2], "note": [""]}), "01_summary")
    stage = {"status": "finished", "seconds": 61, "peak_memory_gb": 1.0, "parameters": {"seed": 0}}
    record = {"name": "t", "profile": "quick", "given": {}, "started": "2024-01-01T00:00:00"}
    record |= {"python": "3.11", "platform": "x", "cores": 2, "versions": {"numpy": "2"}}
    record |= {"git": {"commit": "abc", "dirty": False}, "stages": {"01_dataset_mixing": stage}}
    (run.path / "run.json").write_text(json.dumps(record))
    return run.path


def test_report_refers_to_files_of_the_run_only_and_escapes(tmp_path):
    page = report.write_report(finished_run(tmp_path))
    text = page.read_text()
    found = References()
    found.feed(text)
    for link in found.links:
        if link.startswith("#"):
            assert link[1:] in found.ids
        else:
            assert (tmp_path / link).is_file(), link
    assert all(image["alt"] for image in found.images) and len(found.images) == 3
    assert "&lt;b&gt;a dog" in text and "<b>a dog" not in text
    assert "://" not in text
    assert "1 min 01 s" in text


def test_report_of_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        report.write_report(tmp_path)


def test_numbers_are_rounded_and_texts_kept():
    shown = [report._number(x) for x in (0.123456, 12345.6, 3.0, "62.9 ± 4.1", float("nan"))]
    assert shown == ["0.1235", "12346", "3", "62.9 ± 4.1", ""]


def test_accuracy_is_the_mean_over_folds_and_runs(tmp_path):
    rows = [("real", 1, 0.5), ("real", 2, 0.7), ("both", 1, 0.9)]
    table = pd.DataFrame(rows, columns=["arm", "fold", "accuracy"])
    table = table.assign(model="cnn", backend=["", "", "ldm"], prompt_family="", ratio=0)
    store.RunFolder(tmp_path).save_table(table, "results")
    shown = report._accuracy(tmp_path)
    by_arm = {row[shown["columns"].index("arm")]: row for row in shown["rows"]}
    assert by_arm["real"][shown["columns"].index("accuracy, mean")] == "0.6"
    assert by_arm["real"][-1] == "2" and by_arm["both"][-1] == "1"


def test_readme_figures_and_table(tmp_path):
    table = report.copy_for_readme(finished_run(tmp_path / "run"), tmp_path / "figures")
    assert (tmp_path / "figures" / "01_mix.png").is_file()
    assert "| mixes | 2 |  |" in table


# --- what goes back into the repository ----------------------------------------------------------


@pytest.fixture
def quick_run(tmp_path, monkeypatch):
    """A project with one notebook, and its finished run of profile quick with an output."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    cells = [v4.new_code_cell("seed = 0"), v4.new_code_cell("1 + 1")]
    nbformat.write(v4.new_notebook(cells=cells), tmp_path / "notebooks/00_start.ipynb")
    injected = v4.new_code_cell("seed = 0", metadata={"tags": ["injected-parameters"]})
    result = v4.new_output("execute_result", {"text/plain": "2"}, execution_count=3)
    cells = [cells[0], injected, v4.new_code_cell("1 + 1", outputs=[result], execution_count=3)]
    run = store.RunFolder("runs/quick")
    (run.path / "notebooks").mkdir()
    nbformat.write(v4.new_notebook(cells=cells), run.path / "notebooks/00_start.ipynb")
    record = {"profile": "quick", "given": {}, "stages": {"00_start": {"status": "finished"}}}
    (run.path / "run.json").write_text(json.dumps(record))
    return tmp_path


def test_publish_moves_outputs_and_nothing_else(quick_run):
    (path,) = report.publish()
    cells = nbformat.read(path, as_version=4).cells
    assert [cell.source for cell in cells] == ["seed = 0", "1 + 1"]
    assert [cell.execution_count for cell in cells] == [1, 2]
    assert cells[1].outputs[0].data["text/plain"] == "2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": "esc10"}, "no plain run"),
        ({"given": {"seed": "1"}}, "no plain run"),
        ({"stages": {}}, "not finished"),
    ],
)
def test_publish_refuses_another_or_an_unfinished_run(quick_run, change, message):
    path = quick_run / "runs/quick/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(pipeline.UsageError, match=message):
        report.publish()


def test_publish_refuses_a_notebook_edited_since(quick_run):
    path = quick_run / "notebooks/00_start.ipynb"
    path.write_text(path.read_text().replace("1 + 1", "1 + 2"))
    with pytest.raises(pipeline.UsageError, match="edited after it ran"):
        report.publish()
