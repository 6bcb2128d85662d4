"""Pages of runs and of sets, what a click in them does, and what goes from a run into the project."""

import html.parser
import itertools
import json
import re
import shutil
import subprocess
import time
import urllib.request

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat import v4

from soundscapes_utils import audio, pipeline, report, store
from soundscapes_utils.__main__ import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(html.parser.HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.tags, self.rows, self.text = [], [], path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")

    def handle_data(self, text):
        if self.tags and self.tags[-1][0] == "td" and text.strip():
            self.rows[-1][-1] += text

    def named(self, tag, **wanted):
        return [a for t, a in self.tags if t == tag and wanted.items() <= a.items()]

    def links(self):
        return [a[name] for _, a in self.tags for name in ("src", "href") if name in a]


# --- the page of a run ---------------------------------------------------------------------------


def finished_run(folder):
    from matplotlib.figure import Figure

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
    record["parameters"] = {"01_dataset_mixing": {}, "02_synthetic_generation": {}}
    (run.path / "run.json").write_text(json.dumps(record))
    return run.path


def test_report_refers_to_files_of_the_run_only_and_escapes(tmp_path):
    page = report.write_report(finished_run(tmp_path))
    text = page.read_text()
    found = Page(page)
    ids = {attributes.get("id") for _, attributes in found.tags}
    for link in found.links():
        assert link[1:] in ids if link.startswith("#") else (tmp_path / link).is_file(), link
    images = found.named("img")
    assert all(image["alt"] for image in images) and len(images) == 3
    assert "&lt;b&gt;a dog" in text and "<b>a dog" not in text
    assert "://" not in text
    assert "1 min 01 s" in text


def test_pages_of_notebooks_keep_the_alt_texts_of_pictures(tmp_path):
    run = finished_run(tmp_path)
    shown = (
        {"image/png": "iVBORw0KGgo=", "text/plain": "x"},
        {"image/svg+xml": "<svg/>", "text/plain": "x"},
    )
    said = {"image/png": {"alt": 'a "dog" & <rain>'}, "image/svg+xml": {"alt": "a map"}}
    outputs = [v4.new_output("display_data", data, metadata=said) for data in shown]
    notebook = v4.new_notebook(
        cells=[
            v4.new_markdown_cell(
                "# A\n\n[b](02_synthetic_generation.ipynb#b) "
                "[c](appendix/A1_y.ipynb) [d](../docs/glossary.md#d)"
            ),
            v4.new_code_cell("1", outputs=outputs),
        ]
    )
    (run / "notebooks").mkdir(exist_ok=True)
    nbformat.write(notebook, run / "notebooks" / "01_dataset_mixing.ipynb")
    report.write_report(run)
    page = Page(run / "html" / "01_dataset_mixing.html")
    assert {"../index.html", "02_synthetic_generation.html#b"} <= {*page.links()}
    text = (run / "html" / "01_dataset_mixing.html").read_text()
    assert "c d</p>" in text, "what the run does not hold is no link"
    images = page.named("img")
    assert [image["alt"] for image in images] == ['a "dog" & <rain>', "a map"]
    assert all("height:auto" in image["style"] for image in images)


def test_notebook_that_is_still_running_has_no_cost(tmp_path):
    file = finished_run(tmp_path) / "run.json"
    record = json.loads(file.read_text())
    record["stages"]["02_x"] = {"status": "running", "parameters": {}}
    record["parameters"] = {key: {} for key in ["01_dataset_mixing", "02_x", "03_y"]}
    file.write_text(json.dumps(record))
    page = Page(report.write_report(tmp_path))
    assert ["02_x", "running", "not finished"] in page.rows
    state = " ".join(re.sub("<[^>]*>", "", page.text.split('role="status"')[1].split("</p>")[0]).split())
    assert state.endswith("Done: 01_dataset_mixing. Running: 02_x. To come: 03_y.")
    file.write_text(json.dumps(record | {"finished": "2024-01-01T00:01:00"}))
    assert 'role="status"' not in report.write_report(tmp_path).read_text()
    file.write_text(file.read_text()[:-9])
    with pytest.raises(store.DataError, match=r"run\.json: damaged .* remove it"):
        report.write_report(tmp_path)


def test_report_of_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        report.write_report(tmp_path)


def test_numbers_are_rounded_and_texts_kept(tmp_path):
    values = ["0.123456", "12345.6", "3.0", "62.9 ± 4.1", ""]
    table = pd.DataFrame({"quantity": list("abcde"), "value": values, "note": ""})
    store.RunFolder(finished_run(tmp_path)).save_table(table, "01_summary")
    rows = [row for row in Page(report.write_report(tmp_path)).rows if row and row[0] in list("abcde")]
    assert [row[1] for row in rows] == ["0.1235", "12346", "3", "62.9 ± 4.1", ""]


def test_the_page_opens_with_what_was_found_the_main_questions_first(tmp_path):
    run = store.RunFolder(finished_run(tmp_path))
    results_of_notebooks(run)
    asked = {
        "03": [(4, "Costs?", "1 < 2: p 0.5"), (5, "Copies?", "No")],
        "05": [(3, "Helps?", "Yes: so")],
    }
    for number, rows in asked.items():
        columns = ["rank", "question", "answer"]
        run.save_table(pd.DataFrame(rows, columns=columns), f"{number}_findings")
    found = report.findings(run.path)
    assert found["question"].tolist() == ["Helps?", "Costs?", "Copies?"]
    assert found["stage"].tolist() == ["05", "03", "03"]
    text = report.write_report(run.path).read_text()
    first = text[text.index("What was found</h2>") : text.index('id="notebook-01"')]
    assert first.index("Helps?") < first.index("Costs?") < first.index("Copies?")
    assert "<strong>1 &lt; 2</strong>: p 0.5" in first and "<strong>No</strong>" in first
    # what a notebook found before it ran again is not what it found
    record = json.loads((run.path / "run.json").read_text())
    record["stages"]["03_x"] = record["stages"]["03_x"] | {"status": "failed"}
    (run.path / "run.json").write_text(json.dumps(record))
    assert report.findings(run.path)["question"].tolist() == ["Helps?"]


def test_a_run_ends_with_three_findings_in_words_the_time_and_the_page(tmp_path, monkeypatch, capsys):
    run = store.RunFolder(finished_run(tmp_path))
    rows = [(rank, f"Question {rank}?", f"Yes: {'so ' * 50}{rank}.") for rank in (4, 2, 1, 3)]
    run.save_table(pd.DataFrame(rows, columns=["rank", "question", "answer"]), "01_findings")
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: run.path)
    assert main(["run"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"Question (\d)\? Yes: so", said) == ["1", "2", "3"]
    assert max(map(len, said.splitlines())) <= max(100, len(str(tmp_path)) + 20)
    assert re.search(r"\nIt took \d+ s\.\nReport: .*index\.html\n\Z", said)
    # of one that has found nothing yet too
    (run.tables / "01_findings.csv").unlink()
    assert main(["run"]) == 0 and "Question" not in capsys.readouterr().out


def test_report_opens_the_page(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert main(["report", str(finished_run(tmp_path)), "--open"]) == 0
    assert opened == [(tmp_path / "index.html").as_uri()]


def test_four_sounds_stand_beside_what_was_found(tmp_path):
    run = store.RunFolder(finished_run(tmp_path))
    mixes = store.read_table(run.tables / "mixes.csv").assign(clip_id=["test-1", "test-2"])
    run.save_table(mixes, "mixes")
    samples = mixes.assign(prompt="p", checkpoint="builtin")
    run.save_table(pd.concat([samples, samples.assign(checkpoint="models/tuned")]), "scene_samples")
    run.save_table(samples.assign(clip_id=["rain-1", "dog-1"], label=["rain", "dog"]), "generated")
    text = report.write_report(run.path).read_text()
    first = text[: text.index('id="notebook-01"')]
    names = [part.split("<")[0] for part in first.split('<div class="name">')[1:]]
    expected = ["a real mix", "before fine-tuning", "after fine-tuning", "generated: dog"]
    assert names == expected and first.count("<p>1.0 s · ") == 4


def results_of_notebooks(run):
    """Tables of notebooks 03 to 05 in a finished run."""
    rows = [("real", 0, 0.5), ("real", 1, 0.7), ("both", 0, 0.9)]
    results = pd.DataFrame(rows, columns=["arm", "run", "accuracy"])
    results = results.assign(model="cnn", backend=["", "", "ldm"], prompt_family="", ratio=0.0)
    run.save_table(results.assign(macro_f1=0.5, n_real=8, n_synthetic=0, steps=2), "results")
    scores = {"metric": "FAD", "embedding": "vggish", "reference": "real", "candidate": "<mini>"}
    scores |= {"value": 2.0, "ci_low": 1.5, "ci_high": 2.5, "floor": 0.25, "note": ""}
    scores |= {"floor_low": np.nan, "floor_high": np.nan}
    scores |= dict.fromkeys(("n_reference", "n_candidate", "floor_n"), 9)
    run.save_table(pd.DataFrame([scores]), "scores")
    samples = {"label": "dog", "prompt": "a dog", "path": [run.audio / "dog.wav"] * 3}
    samples["checkpoint"] = ["mini-audioldm", "mini-audioldm", "models/finetuned"]
    run.save_table(pd.DataFrame(samples), "scene_samples")
    record = json.loads((run.path / "run.json").read_text())
    stage = record["stages"]["01_dataset_mixing"]
    record["stages"] |= dict.fromkeys(["03_x", "04_y", "05_z"], stage)
    (run.path / "run.json").write_text(json.dumps(record))


def test_results_are_shown_as_people_read_them(tmp_path):
    results_of_notebooks(store.RunFolder(finished_run(tmp_path)))
    page = Page(report.write_report(tmp_path))
    # mean over folds and runs, the paper's margin of the runs' means, classifiers trained
    assert ["real", "", "0.6", "0.196", "2"] in page.rows
    assert ["both", "ldm", "0.9", "", "1"] in page.rows
    line = ["vggish", "FAD", "real", "<mini>", "9 / 9", "2 [1.5, 2.5]", "0.25", "9"]
    assert line in [[text.replace(".0", "") for text in row] for row in page.rows]
    text = page.text
    names = [part.split("<")[0] for part in text.split('<div class="name">')[1:]]
    assert names == ["dog in park", "rain in park", "dog, mini-audioldm", "dog, finetuned"]


# --- a page of a generated set ---------------------------------------------------------------------


def tables(folder, n=3):
    """Generated and real clips of two classes: tones whose pitch tells them apart."""
    rows = {"made": [], "real": []}
    places = itertools.product(rows, ("dog", "rain"), range(n))
    for number, (kind, label, index) in enumerate(places):
        path = folder / "source" / f"{kind}-{label}-{index}.wav"
        seconds = 1 if kind == "made" else 2
        tone = 0.4 * np.sin(np.arange(16_000 * seconds) * 0.02 * (number + 1))
        audio.save_audio(path, tone.astype(np.float32), 16_000)
        rows[kind].append({"clip_id": path.stem, "label": label, "path": str(path)})
    made = pd.DataFrame(rows["made"]).assign(
        prompt='a "loud" <b>one',
        prompt_family=np.resize(["simple", "gpt", "simple"], 2 * n),
        seed=7,
        clap_score=np.resize([0.1, 0.9, 0.5, -0.2, np.nan, 0.3], 2 * n),
        heard_as=np.resize(["dog", "dog", "rain"], 2 * n),
    )
    return made, pd.DataFrame(rows["real"]).assign(fold=1)


def test_page_refers_to_files_beside_it_only(tmp_path):
    made, real = tables(tmp_path)
    page = Page(report.listening_page(tmp_path / "listen", made, real, title="<set>"))
    assert "../index.html" not in page.links()
    links = [a[name] for _, a in page.tags for name in ("src", "href") if name in a]
    assert len(links) == 2 * 12
    for link in links:
        assert (tmp_path / "listen" / link).is_file(), link
    assert all(image["alt"] for image in page.named("img"))
    text = (tmp_path / "listen/index.html").read_text()
    assert "://" not in text and "&lt;set&gt;" in text
    assert "<b>one" not in text and "&lt;b&gt;one" in text
    assert "nan" not in text.lower()


def test_cards_hold_scores_and_words_of_both_sides(tmp_path):
    made, real = tables(tmp_path)
    page = Page(report.listening_page(tmp_path, made, real))
    cards = page.named("article")
    assert [card["data-side"] for card in cards] == (["real"] * 3 + ["synthetic"] * 3) * 2
    numbers = [json.loads(card["data-numbers"]) for card in cards]
    assert numbers[3:6] == [{"clap score": 0.1}, {"clap score": 0.9}, {"clap score": 0.5}]
    # no score: no number, and a real recording has none of the fold's
    assert numbers[10] == {} == numbers[0]
    values = [a["value"] for a in page.named("option") if "value" in a]
    assert {"dog", "rain", "clap score"} <= set(values)


def test_sounds_are_the_clips_sample_by_sample(tmp_path):
    made, _ = tables(tmp_path)
    page = Page(report.listening_page(tmp_path, made))
    players = page.named("audio")
    for player, path in zip(players, made.sort_values("label", kind="stable").path, strict=True):
        y, rate = audio.load_audio(tmp_path / player["src"])
        original, _ = audio.load_audio(path)
        assert rate == 16_000 and np.array_equal(y, original)


def test_pictures_are_log_mels_low_bands_below(tmp_path):
    from PIL import Image

    made, _ = tables(tmp_path)
    made = made.iloc[[0]]
    # 0.02 rad a sample at 16 kHz is 51 Hz: the lowest of 64 bands, the last row of the picture
    page = Page(report.listening_page(tmp_path, made))
    with Image.open(tmp_path / page.named("img")[0]["src"]) as image:
        pixels = np.asarray(image.convert("L"), dtype=float)
    assert pixels.shape == (64, 100)
    assert pixels.mean(axis=1).argmax() == 63


def test_second_call_keeps_files_and_a_changed_clip_is_noticed(tmp_path):
    made, real = tables(tmp_path)
    report.listening_page(tmp_path / "listen", made, real)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "listen").glob("*/*")}
    first = (tmp_path / "listen/index.html").read_bytes()
    report.listening_page(tmp_path / "listen", made, real)
    assert (tmp_path / "listen/index.html").read_bytes() == first
    assert {p: p.stat().st_mtime_ns for p in before} == before
    audio.save_audio(made.path[0], np.full(16_000, 0.1, np.float32), 16_000)
    report.listening_page(tmp_path / "listen", made, real)
    assert (tmp_path / "listen/index.html").read_bytes() != first


def test_large_classes_are_sampled_and_the_page_says_so(tmp_path):
    made, real = tables(tmp_path, n=5)
    text = report.listening_page(tmp_path, made, real, per_class=2).read_text()
    assert text.count("synthetic: 2 of 5") == 2 and text.count("<article") == 8


def test_bad_tables_and_lost_clips_are_named(tmp_path):
    made, real = tables(tmp_path)
    with pytest.raises(ValueError, match="synthetic clips lacks label, path"):
        report.listening_page(tmp_path, made[["clip_id"]])
    with pytest.raises(ValueError, match="real clips has no rows"):
        report.listening_page(tmp_path, made, real.iloc[:0])
    (tmp_path / "source/made-dog-0.wav").unlink()
    with pytest.raises(audio.AudioError, match=r"made-dog-0\.wav.*moved"):
        report.listening_page(tmp_path / "listen", made)
    assert not (tmp_path / "listen/index.html").exists()


def test_command_makes_the_page_of_a_run(tmp_path, capsys):
    made, real = tables(tmp_path)
    (tmp_path / "run/tables").mkdir(parents=True)
    run = str(tmp_path / "run")
    scores = made[["clip_id", "label", "clap_score"]].iloc[::-1].assign(keep_joint=True)
    made.drop(columns="clap_score").to_csv(tmp_path / "run/tables/generated.csv")
    scores.to_csv(tmp_path / "run/tables/generated_scores.csv", index=False)
    real.assign(label="dog").to_csv(tmp_path / "run/tables/clips.csv", index=False)
    (tmp_path / "run/run.json").write_text("{}")
    assert main(["listen", run, "--per-class", "2"]) == 0
    assert "../index.html" in Page(tmp_path / "run/listen/index.html").links()
    cards = Page(tmp_path / "run/listen/index.html").named("article")
    assert [card["data-side"] for card in cards] == ["real"] * 2 + ["synthetic"] * 4
    assert (tmp_path / "run/listen/index.html").read_text().count("marked: keep joint") == 4
    named = {json.loads(card["data-numbers"]).get("clap score") for card in cards[2:]}
    assert named <= {0.1, 0.9, 0.5, -0.2, 0.3, None} and len(named) > 1
    made.to_csv(tmp_path / "run/tables/mine.csv", index=False)
    assert main(["listen", str(tmp_path / "run/tables/mine.csv")]) == 0
    assert (tmp_path / "run/listen-mine/index.html").is_file()
    (tmp_path / "source/made-dog-1.wav").unlink()
    assert main(["listen", str(tmp_path / "run/tables/mine.csv")]) == 1


def test_any_folder_of_sounds_can_be_listened_to(tmp_path, monkeypatch, capsys):
    for name in ("dog/a.wav", "dog/b.wav", "rain/a.wav"):
        audio.save_audio(tmp_path / "sounds" / name, 0.1 * np.ones(8000), 16_000)
    monkeypatch.chdir(tmp_path)
    assert main(["listen", "sounds"]) == 0
    assert "Page: " in capsys.readouterr().out
    assert len(Page(tmp_path / "sounds-listen/index.html").named("article")) == 3


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
        ({"profile": "esc10"}, "not a plain run"),
        ({"given": {"seed": "1"}}, "not a plain run"),
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


# --- in a browser ----------------------------------------------------------------------------------


class Browser:
    """A page in headless Chromium, over its debugging protocol."""

    def __init__(self, folder, width):
        self.process = subprocess.Popen(
            [
                BROWSER,
                *("--headless", "--no-sandbox", "--disable-gpu", "--mute-audio"),
                *("--disable-background-networking", "--remote-debugging-port=0"),
                *("--autoplay-policy=no-user-gesture-required", f"--window-size={width},900"),
                *(f"--user-data-dir={folder}", "--remote-allow-origins=*", "about:blank"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port_file = folder / "DevToolsActivePort"
        self.until(lambda: port_file.is_file() and port_file.read_text().count("\n"))
        port = port_file.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            targets = json.load(answer)
        import websocket

        address = next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page")
        self.socket = websocket.create_connection(address, timeout=60)
        self.numbers, self.events = itertools.count(1), []
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    @staticmethod
    def until(true, seconds=60):
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "the browser did not get there in time"
            time.sleep(0.05)

    def call(self, method, **parameters):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv())
            self.events += [answer] * ("method" in answer)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, code):
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, path):
        self.call("Page.navigate", url=path.as_uri())
        self.until(lambda: self.value("document.readyState === 'complete' && typeof form === 'object'"))

    def look(self, path, width, scheme):
        """Open a page of that width, light or dark; return what it reports as errors."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.events.clear()
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        address = path.as_uri()
        self.call("Page.navigate", url=address)
        ready = f"document.readyState === 'complete' && location.href === {json.dumps(address)}"
        self.until(lambda: self.value(ready))
        # also those pictures that are not yet in sight
        self.value("for (const image of document.images) image.loading = 'eager'")
        self.until(lambda: self.value("[...document.images].every(image => image.complete)"))
        bad = self.value("[...document.images].filter(i => !i.naturalWidth || !i.alt).map(i => i.src)")
        about = [(event["method"], event["params"]) for event in self.events]
        bad += [params for method, params in about if method == "Runtime.exceptionThrown"]
        return bad + [
            params
            for method, params in about
            if "error" in (params.get("type"), params.get("entry", {}).get("level"))
        ]

    def press(self, key, code):
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            names = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type=kind, **names, **text)

    def click(self, selector, across=0.5):
        """Press the mouse where a finger or pointer would."""
        box = self.value(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect(); "
            f"return [b.x + b.width * {across}, b.y + b.height / 2]; }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            place = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **place)

    def enter(self, name, text):
        code = "form.elements[{0}].value = {1}; form.elements[{0}].dispatchEvent({2}); null"
        event = "new Event('input', {bubbles: true})"
        self.value(code.format(json.dumps(name), json.dumps(text), event))

    def shown(self, side="synthetic"):
        code = (
            "[...document.querySelectorAll('.card')].filter(c => c.offsetParent !== null && "
            f"c.dataset.side === '{side}').map(c => c.querySelector('.name').textContent)"
        )
        return self.value(code)

    def close(self):
        self.call("Browser.close")
        self.process.wait(60)


@pytest.fixture
def browse(tmp_path):
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome on this machine to click in")
    pytest.importorskip("websocket", reason="websocket-client comes with JupyterLab")
    opened = []

    def start(width):
        opened.append(Browser(tmp_path / f"profile-{width}", width))
        return opened[-1]

    yield start
    for browser in opened:
        browser.close()


@pytest.mark.timeout(240)
def test_clicks_on_a_player_and_on_filters(tmp_path, browse):
    made, real = tables(tmp_path)
    page = report.listening_page(tmp_path / "listen", made, real)
    browser = browse(1280)
    browser.open(page)
    names = [f"made-{label}-{i}" for label in ("dog", "rain") for i in range(3)]
    assert browser.shown() == names
    # a player plays, and only one at a time; the spectrogram plays from where it is clicked
    first, second = (f"[...document.querySelectorAll('audio')][{i}]" for i in (0, 4))
    browser.value("document.querySelectorAll('.seek')[0].id = 'first'; null")
    browser.click("#first", across=0.5)
    Browser.until(lambda: browser.value(f"!{first}.paused && {first}.currentTime >= 0.9"))
    browser.value("document.querySelectorAll('.seek')[4].id = 'second'; null")
    browser.click("#second", across=0.01)
    Browser.until(lambda: browser.value(f"{second}.currentTime > 0 && {first}.paused"))
    assert browser.value(f"{second}.error === null && Math.abs({second}.duration - 1) < 0.05")
    # filters and sorting
    browser.enter("label", "dog")
    assert browser.shown() == names[:3] and len(browser.shown("real")) == 3
    assert browser.value("form.querySelector('output').value") == "6 of 12 clips"
    browser.enter("sort", "clap score")
    assert browser.shown() == [names[1], names[2], names[0]]
    browser.enter("order", "1")
    assert browser.shown() == [names[0], names[2], names[1]]
    browser.enter("least", "0.4")
    assert browser.shown() == [names[2], names[1]]
    browser.enter("words", "heard as: rain")
    assert browser.shown() == [names[2]]
    browser.click("form button[type=reset]")
    Browser.until(lambda: browser.shown() == names)
    browser.enter("side", "synthetic")
    assert browser.shown("real") == []
    browser.enter("family", "gpt")
    assert browser.shown() == [names[1], names[4]]
    # a clip without the score is last, whichever the order
    browser.enter("family", "")
    for order, expected in (("-1", [5, 3, 4]), ("1", [3, 5, 4])):
        browser.enter("sort", "clap score")
        browser.enter("order", order)
        assert browser.shown()[3:] == [names[i] for i in expected]


def told_run(folder):
    """A finished run of one notebook, with all that its page can show."""
    from matplotlib.figure import Figure

    run = store.RunFolder(finished_run(folder))
    results_of_notebooks(run)
    figure = Figure(figsize=(10, 3))
    figure.subplots().set_title("Nothing was gained")
    run.save_figure(figure, "05_arms")
    found = {"rank": [3], "question": "Does it help?", "answer": ["Not shown: +0 points [-7, +7]"]}
    run.save_table(pd.DataFrame(found), "05_findings")
    made, real = tables(folder)
    (folder / "notebooks").mkdir()
    cells = [v4.new_markdown_cell("# 01 Mixing\n\nA lead."), v4.new_code_cell("x = 1  # " + "y" * 300)]
    nbformat.write(v4.new_notebook(cells=cells), folder / "notebooks/01_dataset_mixing.ipynb")
    return report.write_report(folder), report.listening_page(folder / "listen", made, real)


@pytest.mark.timeout(240)
def test_pages_of_a_run_in_a_browser_wide_and_narrow_light_and_dark(tmp_path, browse):
    page, listen = told_run(tmp_path / "run")
    browser = browse(1200)
    light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] > 128"
    looks = [(page, *look) for look in itertools.product((400, 1200), ("light", "dark"))]
    looks += [(path, 400, "light") for path in (listen, page.parent / "html/01_dataset_mixing.html")]
    for path, width, scheme in looks:
        assert browser.look(path, width, scheme) == [], (path.name, width, scheme)
        assert browser.value("document.documentElement.scrollWidth") <= width, (path.name, width)
        assert browser.value(light) == (scheme == "light"), (path.name, scheme)
    # a wide figure spans the page, any figure leads to its file
    browser.look(page, 1200, "light")
    across = "[...document.querySelectorAll('figure.wide')].map(f => f.getBoundingClientRect().width)"
    assert len(browser.value(across)) == 2 and min(browser.value(across)) > 1100
    shown = "[...document.querySelectorAll('figure a')].map(a => [a.href, a.querySelector('img').src])"
    assert browser.value(shown) and all(link == source for link, source in browser.value(shown))


@pytest.mark.timeout(240)
def test_page_of_a_run_by_keyboard_alone(tmp_path, browse):
    page, _ = told_run(tmp_path / "run")
    browser = browse(1200)
    browser.look(page, 1200, "light")
    browser.value(
        "for (const e of document.querySelectorAll('a, button, audio, summary')) e.dataset.left = 1"
    )
    here = "(e => { delete e.dataset.left; return e.className || e.tagName; })(document.activeElement)"
    seen = set()
    for _ in range(150):
        browser.press("Tab", 9)
        place = browser.value(here)
        if place == "seek" and place not in seen:
            browser.press("Enter", 13)
            playing = "document.activeElement.parentElement.querySelector('audio').currentTime > 0"
            Browser.until(lambda now=playing: browser.value(now))
        if place == "SUMMARY" and place not in seen:
            browser.press("Enter", 13)
            assert browser.value("document.activeElement.parentElement.open")
        seen.add(place)
        if not browser.value("document.querySelectorAll('[data-left]').length"):
            break
    assert {"seek", "SUMMARY", "AUDIO", "A"} <= seen
    assert browser.value("[...document.querySelectorAll('[data-left]')].map(e => e.outerHTML)") == []
    names = browser.value("[...document.querySelectorAll('audio')].map(e => e.ariaLabel)")
    assert names and all(re.fullmatch(r"\w.*: .+, 1\.0 s", name) for name in names)


@pytest.mark.timeout(240)
def test_page_fits_a_phone(tmp_path, browse):
    made, real = tables(tmp_path)
    page = report.listening_page(tmp_path / "listen", made, real)
    browser = browse(390)
    browser.open(page)
    assert browser.value("document.documentElement.scrollWidth") <= 390
    lefts = browser.value(
        "['real', 'synthetic'].map(s => document.querySelector('.side.' + s)"
        ".getBoundingClientRect().left)"
    )
    # still beside each other
    assert lefts[0] < 30 and 190 < lefts[1] < 230
    small = browser.value(
        "[...document.querySelectorAll('select, input, button')].filter(e => e.offsetParent && "
        "e.getBoundingClientRect().height < 32).length"
    )
    assert small == 0
