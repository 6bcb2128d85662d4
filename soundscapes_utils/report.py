"""Pages that open from the disk, on a phone and without a network; and what a run gives to the project.

:func:`write_report` makes the page of a run (what was found, then notebook by notebook) from what lies
in its folder, of half a run too; :func:`listening_page` that of a generated set, real beside synthetic.
Both fill one template, ``page.html.j2``: a page is a list of sections, a section holds tables, figures
and sides of cards, a card is one sound. :func:`publish` takes a run's outputs into the notebooks.
"""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd

from . import audio, captions, datasets, fad, generation, pipeline, stats, store

# The sounds on a run's page: one of each of the first labels in a notebook's table.
SOUNDS = {"01": ("mixes", 6), "02": ("generated", 10), "03": ("scene_samples", 4)}
LISTENING = "listen/index.html"  # what notebook 02 leaves beside them


# --- the page of a run ---------------------------------------------------------------------------


def write_report(run_dir):
    """Make ``index.html`` of a run, and the executed notebooks as pages in ``html/``.

    The page refers to files of the run folder only: copy the folder and it still works.
    """
    folder = store.project_path(run_dir)
    record = pipeline.read_record(folder)
    if not record:
        raise FileNotFoundError(f"{folder} holds no run (no run.json): run a profile first")
    stages = sorted(record["stages"].items())
    opening = {
        "title": "What was found",
        "findings": findings(folder).to_dict("records"),
        "sides": _listen(folder, _four_sounds(folder)),
        "figures": _figures(folder, "04_scores", "05_arms"),
    }
    by_notebook = [_stage_section(folder, stem, stage) for stem, stage in stages]
    return _write_page(
        folder / "index.html",
        title=f"Soundscapes: run “{record['name']}”",
        record=record,
        sections=[opening, *by_notebook, _how_section(stages, record["versions"])],
    )


def findings(run_dir):
    """Collect what the finished notebooks of a run found, ``NN_findings.csv``, main questions first.

    Columns ``rank``, ``question``, ``answer`` (in short, a colon, its numbers), ``stage`` (two digits).
    """
    folder = store.project_path(run_dir)
    stages = pipeline.read_record(folder)["stages"]
    done = {stem[:2] for stem, stage in stages.items() if stage["status"] == "finished"}
    files = [file for file in sorted(folder.glob("tables/*_findings.csv")) if file.stem[:2] in done]
    tables = [store.read_table(file).assign(stage=file.stem[:2]) for file in files]
    empty = pd.DataFrame(columns=["rank", "question", "answer", "stage"])
    return pd.concat(tables or [empty]).sort_values("rank", ignore_index=True)


def _stage_section(folder, stem, stage):
    executed, number = folder / "notebooks" / f"{stem}.ipynb", stem[:2]
    title, lead = _heading(executed) if executed.is_file() else (stem, "")
    return {
        "id": f"notebook-{number}",
        "title": title,
        "lead": lead,
        "status": stage["status"],
        "cost": _cost(stage),
        "notebook": _notebook_page(folder, executed) if executed.is_file() else "",
        "listening": LISTENING if number == "02" and (folder / LISTENING).is_file() else "",
        "sides": _listen(folder, _sounds(folder, number)),
        "figures": _figures(folder, f"{number}_*"),
        "tables": _tables(folder, number),
    }


def _cost(stage):
    if "seconds" not in stage:
        return "not finished"
    return f"{pipeline.duration(stage['seconds'])}, at most {stage['peak_memory_gb']} GB of memory"


def _how_section(stages, versions):
    took = [(stem, stage["status"], _cost(stage)) for stem, stage in stages]
    parameters = [(stem, *one) for stem, stage in stages for one in stage["parameters"].items()]
    tables = [
        _grid("Time and memory", pd.DataFrame(took, columns=["notebook", "state", "took"])),
        _grid("Parameters", pd.DataFrame(parameters, columns=["notebook", "parameter", "value"])),
        _grid("Versions", pd.DataFrame(versions.items(), columns=["library", "version"])),
    ]
    return {"title": "How it was run", "how": True, "tables": tables}


def _heading(notebook):
    """First heading of a notebook, and the paragraph below it."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    title, *paragraphs = "".join(cells[0]["source"]).strip().split("\n\n")
    return title.lstrip("# "), " ".join(" ".join(paragraphs[:1]).split())


def _notebook_page(folder, executed):
    """Executed notebook as an HTML page; made again only if the notebook is newer."""
    page = folder / "html" / f"{executed.stem}.html"
    if not page.is_file() or page.stat().st_mtime < executed.stat().st_mtime:
        import nbformat
        from nbconvert import HTMLExporter

        # Scripts that nbconvert would fetch from elsewhere serve widgets and TeX.
        scripts = ("require_js", "jquery", "mathjax", "mermaid_js", "mermaid_layout_elk_js")
        template = Path(__file__).with_name("notebook.html.j2")
        exporter = HTMLExporter(template_file=str(template), **{f"{name}_url": "" for name in scripts})
        notebook = nbformat.read(executed, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = re.sub(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", _mathml, cell.source, flags=re.S)
        html, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": executed.stem}})
        record = pipeline.read_record(folder)
        beside = rf"({'|'.join([*record['parameters'], *record['stages']])})\.ipynb"
        html = re.sub(rf'<a href="[\w./]*?\b{beside}', r'<a href="\1.html', html)
        # what the run's folder does not hold stays as text
        html = re.sub(r'<a href="[^":]+\.(?:ipynb|md|yaml)[^"]*"[^>]*>(.*?)</a>', r"\1", html)
        store.write_atomic(page, html)
    return page.relative_to(folder).as_posix()


def _mathml(formula):
    from latex2mathml.converter import convert

    block, inline = formula.groups()
    # the converter does not know the two by name behind \bigl and its like
    tex = re.sub(r"\\[lr]Vert(?![a-zA-Z])", "‖", block or inline)
    return convert(tex, display="block" if block else "inline")


def _figures(folder, *names):
    from PIL import Image

    figures = []
    for path in [path for name in names for path in sorted(folder.glob(f"figures/{name}.png"))]:
        with Image.open(path) as image:
            about = {"caption": image.info.get("Description", path.stem), "width": image.width}
        figures.append(about | {"height": image.height, "source": f"figures/{path.name}"})
    return figures


def _four_sounds(folder):
    """Name a real mix, the clips of its caption before and after fine-tuning, and one of its class."""
    files = [folder / "tables" / f"{name}.csv" for name in ("mixes", "scene_samples", "generated")]
    if not all(map(Path.is_file, files)):
        return []
    mixes, samples, generated = map(store.read_table, files)
    clip_id, label = samples.iloc[0][["clip_id", "label"]]
    before, after = (samples[samples["checkpoint"] == samples["checkpoint"].iloc[i]] for i in (0, -1))
    named = {"a real mix": mixes, "before fine-tuning": before, "after fine-tuning": after}
    named = {name: table[table["clip_id"] == clip_id] for name, table in named.items()}
    named[f"generated: {captions.tidy(label)}"] = generated[generated["label"] == label]
    return [(name, row) for name, table in named.items() for row in table[:1].to_dict("records")]


def _sounds(folder, number):
    """Name one clip of each of the first labels, for every checkpoint that made some."""
    name, count = SOUNDS.get(number, ("", 0))
    path = folder / "tables" / f"{name}.csv"
    if not path.is_file():
        return []
    table = store.read_table(path)
    several = "checkpoint" in table and len(table["checkpoint"].unique()) > 1
    table = table[table["label"].isin(table["label"].drop_duplicates()[:count])]
    named = []
    for row in table.drop_duplicates(["label", *["checkpoint"] * several]).to_dict("records"):
        title = captions.tidy(row["label"])
        title += f" in {captions.tidy(row['scene'])}" if "scene" in row else ""
        named.append((title + (f", {Path(row['checkpoint']).name}" if several else ""), row))
    return named


def _listen(folder, named):
    """The side of a section that holds a card for each named row of a table of sounds."""
    cards = []
    for name, row in named:
        text = row.get("caption", row.get("prompt", ""))
        player = _player(row["path"], folder, folder / "html")
        cards.append({"name": name, "text": text, "numbers": {}, "words": {}, **player})
    return [{"name": "listen", "title": "Listen", "cards": cards}] if cards else []


def _tables(folder, number):
    """Scores of notebook 04, accuracies of 05, and main numbers of each, as people read them."""
    known = {
        "scores": ("04", "Scores", fad.score_lines),
        "results": ("05", "Accuracy on recordings of the held-out folds", _accuracies),
        f"{number}_summary": (number, "Main numbers", pd.DataFrame),
    }
    files = {folder / "tables" / f"{name}.csv": about for name, about in known.items()}
    return [
        _grid(title, as_read(store.read_table(file)))
        for file, (owner, title, as_read) in files.items()
        if owner == number and file.is_file()
    ]


def _accuracies(results):
    """Means over folds and runs, with the names that differ between arms."""
    table = stats.summarise(results)
    names = ["model", "arm", "backend", "prompt_family", "ratio"]
    varying = [name for name in names if len(table[name].unique()) > 1]
    table = table[[*varying, "accuracy", "half_width", "n"]]
    return table.rename(columns={"half_width": "± (1.96·SD/√runs)", "n": "classifiers trained"})


def _grid(title, table):
    rows = [[_as_text(value) for value in row] for row in table.itertuples(index=False)]
    numeric = [table[column].dtype.kind in "if" for column in table]
    return {"title": title, "columns": list(table.columns), "numeric": numeric, "rows": rows}


def _as_text(value):
    """Four significant digits; what is not a number stays as it is."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    if number != number:
        return ""
    return f"{number:.0f}" if number == int(number) or abs(number) >= 1000 else f"{number:.4g}"


# --- a page of a generated set -------------------------------------------------------------------


def listening_page(out_dir, generated, real=None, *, title="Listen", per_class=24, seed=0):
    """Make a page of a generated set: class by class, real beside synthetic.

    `out_dir` gets ``index.html``, ``sounds/`` (FLAC at 16 kHz: what is heard is the clip and no codec)
    and ``pictures/``; what is there already is kept. Columns of `generated` (and of `real`, a clip
    table) beyond the usual are shown on the cards: numbers can be sorted by and cut off at, words can
    be searched for, and columns of true and false name the clips that they mark. Of more than
    `per_class` clips of a class on either side a random choice is shown.
    """
    out_dir = Path(out_dir)
    tables = {"real": real, "synthetic": generated}
    tables = {name: table for name, table in tables.items() if table is not None}
    for name, table in tables.items():
        absent = {"clip_id", "label", "path"} - set(table.columns)
        if absent or table.empty:
            what = f"lacks {', '.join(sorted(absent))}" if absent else "has no rows"
            raise store.DataError(f"the table of {name} clips {what}: there is nothing to listen to")
    sections = [
        {
            "label": label,
            "title": captions.tidy(label),
            "sides": [
                _side(name, table[table["label"] == label], out_dir, per_class, seed)
                for name, table in tables.items()
            ],
        }
        for label in sorted(generated["label"].unique())
    ]
    cards = [card for section in sections for side in section["sides"] for card in side["cards"]]
    return _write_page(
        out_dir / "index.html",
        title=title,
        lead=f"Class by class, {' next to '.join(tables)}.",
        sections=sections,
        sides=list(tables),
        back="../index.html" if (out_dir.parent / "run.json").is_file() else "",
        families=sorted({card.get("family", "") for card in cards} - {""}),
        numbers=list(dict.fromkeys(name for card in cards for name in card["numbers"])),
    )


def page_of(place, per_class=24):
    """Make a page to hear a set of sounds; return its path.

    `place` is a run, a folder with the table of its mixes or generated clips, any other folder of sounds
    (`datasets.load_folder`), or a table (CSV). Clips of a run stand next to its recordings, with their
    scores. The page goes to ``listen/`` in that folder, ``listen-<name>/`` for a table that is named,
    ``<folder>-listen/`` beside a plain folder of sounds.
    """
    place = store.project_path(place)
    known = (place / name for name in ("tables/generated.csv", "generated.csv", "mixes.csv"))
    file = place if place.suffix == ".csv" else next(filter(Path.is_file, known), None)
    if file is None:
        out_dir, table = place.with_name(f"{place.name}-listen"), datasets.load_folder(place)
        return listening_page(out_dir, table, title=place.name, per_class=per_class)
    table, real, name = store.read_table(file), None, file.stem
    folder = file.parent.parent if file.parent.name == "tables" else file.parent
    table["path"] = [str(_beside(file, path)) for path in table.get("path", [])]
    if (scores := file.with_name(f"{name}_scores.csv")).is_file():
        table = table.merge(store.read_table(scores).drop(columns="label"), on="clip_id", how="left")
    if (clips := file.with_name("clips.csv")).is_file():
        real = store.read_table(clips)
        real = real[real["label"].isin(table.get("label", []))]
        real = real if len(real) else None
    out_dir = folder / ("listen" if place != file or name == "generated" else f"listen-{name}")
    title = f"{folder.name}: {name.replace('_', ' ')}"
    return listening_page(out_dir, table, real, title=title, per_class=per_class)


def _beside(file, path):
    """Where a table's path leads: relative to the table, or as tables of a run say it."""
    near = file.parent / path
    return near if near.exists() else store.project_path(path)


def _side(name, table, out_dir, per_class, seed):
    shown = table if len(table) <= per_class else table.sample(per_class, random_state=seed).sort_index()
    n = len(table) if len(shown) == len(table) else f"{len(shown)} of {len(table)}"
    cards = [_card(row, name, out_dir) for row in shown.to_dict("records")]
    return {"name": name, "title": f"{name}: {n}", "cards": cards}


# shown in its place on a card, or not at all
_USUAL = {*generation.GENERATED_COLUMNS, "split", "candidate_of"} - {"score", "lufs"}


def _card(row, side, out_dir):
    numbers, words, marks = {}, {}, {}
    for name, value in row.items():
        if name in _USUAL or pd.isna(value) or value in (np.inf, -np.inf):
            continue
        name = name.replace("_", " ")
        if isinstance(value, (bool, np.bool_)):
            marks[name] = value
        elif isinstance(value, (int, float, np.number)):
            numbers[name] = float(value)
        else:
            words[name] = str(value).replace("_", " ")
    if marks:
        words["marked"] = ", ".join(name for name, value in marks.items() if value)
    about = {"side": side, "name": str(row["clip_id"]), "numbers": numbers, "words": words}
    if side == "synthetic":
        about |= {"text": row.get("prompt", ""), "family": row.get("prompt_family", "")}
    return about | _player(row["path"], out_dir, out_dir)


# --- one page, one player ------------------------------------------------------------------------


def _write_page(path, **content):
    return store.write_atomic(path, store.filled("page.html.j2", **content))


def _player(path, page_folder, folder):
    """Sound and picture of a clip in `folder`, under names that follow from its content."""
    import soundfile as sf

    from . import plots

    if not Path(path).is_absolute():
        path = store.project_root(folder) / path  # of the project that the run belongs to
    try:
        name = store.file_digest(path)[:12]
    except OSError as error:
        remedy = "was the run moved, or its audio deleted?"
        raise audio.AudioError(f"{path}: cannot be read ({error}); {remedy}") from error
    sound, picture = folder / "sounds" / f"{name}.flac", folder / "pictures" / f"{name}.png"
    if not (sound.is_file() and picture.is_file()):
        y, rate = audio.load_audio(path, audio.LOG_MEL_RATE)
        audio.save_audio(sound, np.clip(y, -1, 1), rate)
        store.write_atomic(picture, plots.mel_picture(y, rate))
    files = {"sound": sound, "picture": picture}
    places = {key: file.relative_to(page_folder).as_posix() for key, file in files.items()}
    return places | {"seconds": round(sf.info(sound).duration, 2)}


# --- what a run gives to the project -------------------------------------------------------------


def publish(run_dir="runs/quick"):
    """Take the outputs of a finished run over into the notebooks themselves; return their paths.

    Only outputs move. The run must be one of profile ``quick`` without other parameters, finished, and
    its notebooks unchanged since: else a ``pipeline.UsageError`` says which.
    """
    import nbformat

    folder = store.project_path(run_dir)
    record = pipeline.read_record(folder)
    if record.get("profile") != "quick" or record["given"]:
        wanted = "a plain run of profile quick, whose outputs the notebooks show"
        raise pipeline.UsageError(f"{folder} is not {wanted}")
    written = []
    for stem, path in pipeline.notebooks().items():
        if record["stages"].get(stem, {}).get("status") != "finished":
            unfinished = f"{stem} is not finished in {folder}"
            raise pipeline.UsageError(f"{unfinished}: run ./run_all.sh quick first")
        source = nbformat.read(path, as_version=4)
        _take_outputs(source, nbformat.read(folder / "notebooks" / path.name, as_version=4), stem)
        written.append(store.write_atomic(path, nbformat.writes(source) + "\n"))
    return written


def _take_outputs(source, executed, stem):
    cells, runs = (
        [c for c in notebook.cells if c.cell_type == "code"] for notebook in (source, executed)
    )
    runs = [run for run in runs if "injected-parameters" not in run.metadata.get("tags", [])]
    if [cell.source for cell in cells] != [cell.source for cell in runs]:
        raise pipeline.UsageError(f"{stem} was edited after it ran: run ./run_all.sh quick again")
    for number, (cell, run) in enumerate(zip(cells, runs, strict=True), 1):
        cell.outputs, cell.execution_count = run.outputs, number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
