"""The page that closes a run: numbers, figures, players and notebooks, readable without a network.

Everything is read back from the run folder (``run.json``, ``tables/``, ``figures/``, ``audio/``,
``notebooks/``), so that the page can be made again at any time, of half a run too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from . import pipeline, store

# Which tables name sounds worth hearing: title, caption, how many, and the column whose values
# should all be heard before any value is heard twice.
SOUNDS = {
    "01": ("mixes", "caption", "label", 6),
    "02": ("generated", "prompt", "label", 10),
    "03": ("scene_samples", "prompt", "clip_id", 4),
}
# what notebook 02 leaves beside its few sounds here
LISTENING = "listen/index.html"


def headlines(run_dir):
    """Collect the main numbers that the notebooks of a run left.

    Parameters
    ----------
    run_dir : path-like
        Folder of the run; relative paths are taken from the project's root.

    Returns
    -------
    pandas.DataFrame
        Columns ``stage`` (two digits), ``quantity``, ``value`` (text), ``note``.

    Examples
    --------
    >>> import tempfile
    >>> len(headlines(tempfile.mkdtemp()))
    0
    """
    import pandas as pd

    tables = store.project_path(run_dir) / "tables"
    found = [
        pd.read_csv(path, dtype=str, keep_default_na=False).assign(stage=path.stem[:2])
        for path in sorted(tables.glob("[0-9][0-9]_summary.csv"))
    ]
    columns = ["stage", "quantity", "value", "note"]
    table = pd.concat(found) if found else pd.DataFrame(columns=columns)
    table["value"] = table["value"].map(_number)
    return table.reindex(columns=columns, fill_value="").reset_index(drop=True)


def write_report(run_dir):
    """Make ``index.html`` of a run, and the executed notebooks as pages in ``html/``.

    Parameters
    ----------
    run_dir : path-like
        Folder of the run; relative paths are taken from the project's root.

    Returns
    -------
    Path
        The page. It refers to files of the run folder only: copy the folder and it still works.

    Raises
    ------
    FileNotFoundError
        If the folder holds no run.
    """
    import jinja2

    folder = store.project_path(run_dir)
    if not (folder / "run.json").is_file():
        raise FileNotFoundError(f"{folder} holds no run (no run.json): run a profile first")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pipeline.PACKAGE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    stages = [_stage(folder, stem, record["stages"][stem]) for stem in sorted(record["stages"])]
    page = templates.get_template("report.html.j2").render(
        record=record,
        stages=stages,
        headlines=headlines(folder).to_dict("records"),
        scores=_scores(folder),
        accuracy=_accuracy(folder),
    )
    with pipeline._replacing(folder / "index.html") as part:
        part.write_text(page, encoding="utf-8")
    return folder / "index.html"


def copy_for_readme(run_dir, out_dir):
    """Copy the first figure of each stage for README.md, and write its table of main numbers.

    Parameters
    ----------
    run_dir : path-like
        Folder of the run; relative paths are taken from the project's root.
    out_dir : path-like
        Where the figures go.

    Returns
    -------
    str
        The table in Markdown.
    """
    folder = store.project_path(run_dir)
    firsts = {}
    for figure in sorted((folder / "figures").glob("[0-9][0-9]_*.png")):
        firsts.setdefault(figure.stem[:2], figure)
    for figure in firsts.values():
        with pipeline._replacing(Path(out_dir) / figure.name) as part:
            shutil.copyfile(figure, part)
    rows = [
        f"| {row.quantity} | {row.value} | {row.note} |" for row in headlines(folder).itertuples()
    ]
    return "\n".join(["| quantity | value | note |", "|---|---|---|", *rows])


def publish(run_dir="runs/quick"):
    """Take the outputs of a finished run over into the notebooks themselves.

    Only outputs move; the cells and their parameters stay as they are in ``notebooks/``.

    Parameters
    ----------
    run_dir : path-like, optional
        Run of profile ``quick``, without other parameters.

    Returns
    -------
    list of Path
        The notebooks that were written.

    Raises
    ------
    pipeline.UsageError
        If the run had other parameters than the notebooks, is not finished, or a notebook was
        edited since.
    """
    import nbformat

    folder = store.project_path(run_dir)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if record["profile"] != "quick" or record["given"]:
        raise pipeline.UsageError(
            f"{folder} is no plain run of profile quick: committed outputs would lie"
        )
    written = []
    for stem, path in pipeline.notebooks().items():
        if record["stages"].get(stem, {}).get("status") != "finished":
            raise pipeline.UsageError(
                f"{stem} is not finished in {folder}: run ./run_all.sh quick first"
            )
        source = nbformat.read(path, as_version=4)
        _take_outputs(source, nbformat.read(folder / "notebooks" / path.name, as_version=4), stem)
        with pipeline._replacing(path) as part:
            nbformat.write(source, part)
        written.append(path)
    return written


def _take_outputs(source, executed, stem):
    made = [
        cell
        for cell in executed.cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    cells = [cell for cell in source.cells if cell.cell_type == "code"]
    if [cell.source for cell in cells] != [cell.source for cell in made]:
        raise pipeline.UsageError(f"{stem} was edited after it ran: run ./run_all.sh quick again")
    for number, (cell, run) in enumerate(zip(cells, made, strict=True), 1):
        cell.outputs, cell.execution_count = run.outputs, number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number


def _stage(folder, stem, stage):
    executed = folder / "notebooks" / f"{stem}.ipynb"
    title, lead = _title_of(executed) if executed.is_file() else (stem, "")
    return {
        "stem": stem,
        "title": title,
        "lead": lead,
        "status": stage["status"],
        "seconds": pipeline._seconds(stage.get("seconds", 0)),
        "memory": stage.get("peak_memory_gb", ""),
        "parameters": stage["parameters"],
        "page": _notebook_page(folder, executed),
        "figures": [_figure(folder, path) for path in _figures(folder, stem[:2])],
        "sounds": _sounds(folder, stem[:2]),
        "listen": stem.startswith("02") and (folder / LISTENING).is_file() and LISTENING,
    }


def _title_of(notebook):
    """First heading of a notebook, and the paragraph below it."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    paragraphs = "".join(cells[0]["source"]).strip().split("\n\n") if cells else []
    title = paragraphs[0].lstrip("# ") if paragraphs else notebook.stem
    return title, " ".join(paragraphs[1].split()) if len(paragraphs) > 1 else ""


def _notebook_page(folder, executed):
    """Executed notebook as an HTML page; made again only if the notebook is newer."""
    if not executed.is_file():
        return None
    page = folder / "html" / f"{executed.stem}.html"
    if not page.is_file() or page.stat().st_mtime < executed.stat().st_mtime:
        from nbconvert import HTMLExporter

        # Scripts that nbconvert would fetch from elsewhere serve widgets and TeX, of which the
        # notebooks have none.
        nowhere = dict.fromkeys(
            (
                "require_js_url",
                "jquery_url",
                "mathjax_url",
                "mermaid_js_url",
                "mermaid_layout_elk_js_url",
            ),
            "",
        )
        exporter = HTMLExporter(**nowhere)
        text, _ = exporter.from_filename(str(executed))
        with pipeline._replacing(page) as part:
            part.write_text(text, encoding="utf-8")
    return page.relative_to(folder).as_posix()


def _figures(folder, number):
    return sorted((folder / "figures").glob(f"{number}_*.png"))


def _figure(folder, path):
    from PIL import Image

    with Image.open(path) as image:
        caption = image.info.get("Description", path.stem)
        width, height = image.size
    source = path.relative_to(folder).as_posix()
    return {"source": source, "caption": caption, "width": width, "height": height}


def _sounds(folder, number):
    """A few sounds of a stage as small Vorbis files with a picture of their log-mel."""
    import pandas as pd

    if number not in SOUNDS:
        return []
    name, text, spread, count = SOUNDS[number]
    path = folder / "tables" / f"{name}.csv"
    if not path.is_file():
        return []
    table = pd.read_csv(path, keep_default_na=False)
    chosen = table[table[spread].isin(table[spread].drop_duplicates()[:count])]
    by = [spread, "checkpoint"] if number == "03" else [spread]
    return [
        _player(folder, store.project_path(row["path"]), _sound_title(row, number), row[text])
        for row in chosen.drop_duplicates(by).to_dict("records")
    ]


def _sound_title(row, number):
    if number == "01":
        return f"{row['label']} in {row['scene']}"
    return row["label"] if number == "02" else Path(row["checkpoint"]).name


def _player(folder, path, title, text):
    import soundfile as sf
    from matplotlib import pyplot as plt

    from . import audio

    stem = folder / "report" / f"{path.parent.name}-{path.stem}"
    sound, picture = stem.with_suffix(".ogg"), stem.with_suffix(".png")
    if not picture.is_file() or picture.stat().st_mtime < path.stat().st_mtime:
        y, rate = audio.load_audio(path, 16_000)
        with pipeline._replacing(sound) as part:
            sf.write(part, y, rate, format="OGG", subtype="VORBIS")
        with pipeline._replacing(picture) as part:
            plt.imsave(part, audio.log_mel(y, rate).T[::-1], cmap="magma", format="png")
    return {
        "title": str(title).replace("_", " "),
        "text": text,
        "source": sound.relative_to(folder).as_posix(),
        "picture": picture.relative_to(folder).as_posix(),
    }


def _scores(folder):
    """Scores with their interval in one cell, as they are read."""
    import pandas as pd

    path = folder / "tables" / "scores.csv"
    if not path.is_file():
        return None
    scores = pd.read_csv(path)
    interval = [
        f"{_number(low)} … {_number(high)}" if pd.notna(low) else ""
        for low, high in zip(scores["ci_low"], scores["ci_high"], strict=True)
    ]
    shown = scores[["metric", "embedding", "reference", "candidate", "value"]].copy()
    shown["95 % interval"] = interval
    shown["n"] = [
        f"{reference} / {candidate}"
        for reference, candidate in zip(scores["n_reference"], scores["n_candidate"], strict=True)
    ]
    return _as_rows(shown.assign(note=scores["note"]))


def _accuracy(folder):
    """Mean accuracy of each arm over folds and runs, its spread, the number of trainings."""
    import pandas as pd

    path = folder / "tables" / "results.csv"
    if not path.is_file():
        return None
    keys = ["model", "arm", "backend", "prompt_family", "ratio"]
    groups = pd.read_csv(path).groupby(keys, dropna=False)["accuracy"]
    table = groups.agg(["mean", "std", "count"]).reset_index()
    table.columns = [*keys, "accuracy, mean", "standard deviation", "classifiers trained"]
    varying = [key for key in keys if len(table[key].unique()) > 1]
    return _as_rows(table[[*varying, *table.columns[len(keys) :]]])


def _as_rows(table):
    numeric = [table[column].dtype.kind in "if" for column in table]
    rows = [[_number(value) for value in row] for row in table.itertuples(index=False)]
    return {"columns": list(table.columns), "numeric": numeric, "rows": rows}


def _number(value):
    """Four significant digits; texts that are no numbers stay as they are."""
    try:
        number = float(value)
    except ValueError:
        return str(value)
    if number != number:
        return ""
    return f"{number:.0f}" if number == int(number) or abs(number) >= 1000 else f"{number:.4g}"
