"""Command line: ``soundscapes --help``; ``run_all.sh`` calls it after set-up.

profiles    A profile is a file notebooks/profiles/<name>.yaml: for each notebook the parameters
            that differ from its own defaults. `profiles` lists them with time, memory and needs;
            `profiles NAME` shows all parameters of one.
-p          -p name value sets a parameter in every notebook that has one of that name. Names are
            checked before anything runs. Lists in quotes: -p test_folds "[1, 2]".
paths       Relative ones are looked for in the folder that you are in, then in the project.
resuming    The same command again continues a run: notebooks whose code, parameters and inputs are
            unchanged are skipped. --fresh runs everything again; --appendix adds what a class can skip.
one         --only 03 runs just that one, on what the others left in the same run folder.
report      runs/<name>/index.html; `report runs/<name> --open` makes it again and opens it.

some calls
  soundscapes plan-mixes events scenes plan.csv -n 2000 --snr -5 15
  soundscapes mix plan.csv mixes --shard 1/4             a quarter of a large set of mixes
  soundscapes generate clips --prompt "a forklift beeping" -n 20
  soundscapes score recordings clips                     how far apart are two folders of sounds?
"""

import argparse
import csv
import os
import re
import signal
import sys
import textwrap
import time
from importlib.metadata import requires, version
from pathlib import Path


def main(argv=None):
    """Run the command line; return 0, 1 where something failed, 2 for a wrong call, 130 if stopped.

    >>> main(["run", "qick"])
    2
    """
    options = _parser().parse_args(argv)
    try:
        code = options.action(options) or 0
        sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt) as error:
        if code := getattr(error, "exit_code", None):  # of a run, which says how to resume
            return print(error, file=sys.stderr) or code
        # a library may have turned the interruption into an error of its own
        if _STOPS or isinstance(error, KeyboardInterrupt):
            return _interrupted()
        if isinstance(error, BrokenPipeError):  # who read the output has seen enough
            return 141
        if not isinstance(error, (ValueError, OSError, ImportError)):
            raise
        from .pipeline import UsageError, in_words

        said = _how_to_get(error) if isinstance(error, ImportError) else in_words(error)
        print("error:", *said.split(), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _how_to_get(error):
    """Say what brings a library that is not installed: an extra of the package, or the lock."""
    if not (library := (error.name or "").partition(".")[0]):
        return str(error)  # who raised it has said so
    lines = "\n".join(requires("soundscapes-utils")).replace("-", "_")
    found = re.search(rf"^{library}\b.*extra == .(\w+)", lines, re.MULTILINE)
    extra = found[1] if found else "models,notebooks"  # which depend on it
    by_pip = "" if extra in ("audiogen", "clap") else f"pip install 'PATH_OF_THE_CLONE[{extra}]', or "
    return f"{error}: to get it, {by_pip}./run_all.sh setup in the clone"


# what the kinds of options in commands.csv are for argparse
_KINDS = {"": {}, "whole": {"type": int}, "switch": {"action": "store_true"}, "optional": {"nargs": "?"}}
_KINDS["pairs"] = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
_KINDS |= {"number": {"type": float}, "many": {"nargs": "+", "default": ["logmel-stats", "mini-clap"]}}
_KINDS["some"] = {"nargs": "+", "required": True}
_KINDS["range"] = {"nargs": 2, "type": float, "metavar": ("LOW", "HIGH"), "default": (-5.0, 15.0)}


def _parser():
    parser = argparse.ArgumentParser(
        prog="soundscapes",
        description="Run the notebooks of a profile in order and make the report; or one step alone.",
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("soundscapes-utils"))
    commands = parser.add_subparsers(required=True, metavar="command")
    text = (Path(__file__).parent / "commands.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines()):
        name, option = row["command"], row["option"]
        if not option:  # the first row of a command says what it does
            about = f"{row['help'][0].upper()}{row['help'][1:]}."
            command = commands.add_parser(name, help=row["help"], description=about)
            command.set_defaults(action=globals()[f"_{name.replace('-', '_')}"])
            continue
        given = {key: row[key] for key in ("default", "metavar", "help") if row[key]}
        if row["default"]:
            given["help"] = f"{row['help']} (default {row['default']})".strip()
        command.add_argument(option, **_KINDS[row["kind"]] | given)
    return parser


# --- runs and their pages ------------------------------------------------------------------------


def _run(options):
    from . import pipeline, report

    given = {name: getattr(options, name) for name in ("name", "only", "fresh", "appendix")}
    begin = time.monotonic()
    folder = pipeline.run(options.profile, dict(options.p), **given)
    page = report.write_report(folder)
    for row in report.findings(folder)[:3].itertuples():
        print("", textwrap.fill(f"{row.question} {row.answer}", 100, break_on_hyphens=False), sep="\n")
    print(f"\nIt took {pipeline.duration(time.monotonic() - begin)}.\nReport: {page}")


def _report(options):
    from . import report

    _show(report.write_report(_found(options.run_dir)), options)


def _listen(options):
    from . import report

    _show(report.page_of(_found(options.place), options.per_class), options)


def _show(page, options):
    import webbrowser

    print(f"Page: {page}")
    if options.open:
        webbrowser.open(page.as_uri())


def _profiles(options):
    from . import pipeline, store

    if options.name:
        for stem, values in pipeline.resolve_parameters(options.name).items():
            print(stem, *(f"  {name} = {value!r}" for name, value in values.items()), sep="\n")
        return
    for name, profile in pipeline.profile_table(store.project_root(pipeline.PACKAGE)).iterrows():
        print(name)
        print(textwrap.indent(textwrap.fill(profile.pop("description"), 94), "  "))
        for key, text in profile.items():
            print(f"  {key + ':':8}{text}")


def _publish(options):
    from . import report

    for path in report.publish(_found(options.run_dir)):
        print(f"copied: {path.name}")


# --- one step alone ------------------------------------------------------------------------------


def _plan_mixes(options):
    from . import datasets, mixing, store

    events, scenes = map(datasets.load_folder, [_found(options.events), _found(options.scenes)])
    given = {"snr_db": tuple(options.snr)} | {name: _value(value) for name, value in options.o}
    plan = mixing.plan_mixes(events, scenes, options.n, options.seed, **given)
    print(f"{len(plan)} mixes of {len(events)} events and {len(scenes)} scenes are planned")
    print(f"Table: {store.write_table(plan, options.plan)}")


def _mix(options):
    from . import metadata, mixing

    chosen = {name: getattr(options, name) for name in ("workers", "engine", "stems", "shard")}
    chosen["events"] = events = _table(options.events) if options.events else None
    plan, out_dir = _table(options.plan), Path(options.out_dir)
    mixes = mixing.render_mixes(plan, out_dir, options.sample_rate, **chosen)
    scaled = (mixes["peak_scale"] < 1).sum()
    print(f"{len(mixes)} mixes are in {out_dir}, {scaled} scaled to fit")
    if (mixes := _of_all_shards(mixes, plan, out_dir / "mixes.csv", options.shard)) is not None:
        _keep(mixes, out_dir / "mixes.csv")
        print(f"Metadata: {metadata.write_audiocaps(mixes, out_dir / 'metadata', 'mixes', events)}")


def _generate(options):
    from . import generation, selection

    out_dir, begin = Path(options.out_dir), time.monotonic()
    preset = generation.preset(options.backend)
    plan = _requests(options, preset["duration_s"])
    if (plan["duration_s"] != preset["duration_s"]).any() and options.backend in generation.PRESETS:
        print(f"note: other durations than the {preset['duration_s']} s of {options.backend}")
    candidates = selection.plan_candidates(plan, options.best_of or preset["candidates"])
    chosen = {name: _value(value) for name, value in options.o}
    backend = generation.get_backend(options.backend, checkpoint=options.checkpoint, **chosen)
    loudness = _value(options.loudness) if options.loudness else preset["loudness"]
    existing, n_rejected = set(out_dir.glob("*.wav")), len(generation.rejected_clips(out_dir))
    how = (options.batch_size, options.max_attempts, loudness, options.shard)
    clips = generation.generate_clips(candidates, backend, out_dir, *how)
    n_new = sum(Path(path) not in existing for path in clips["path"])
    n_rejected = len(generation.rejected_clips(out_dir)) - n_rejected
    seconds = time.monotonic() - begin
    print(
        f"{len(clips)} clips are in {out_dir}: {n_new} made, {len(clips) - n_new} kept, "
        f"{n_rejected} outputs rejected; {seconds:.0f} s, {n_new / seconds:.2f} clips/s"
    )
    file = out_dir / "generated.csv"
    if (clips := _of_all_shards(clips, candidates, file, options.shard)) is not None:
        if len(candidates) > len(plan):
            clips = selection.best_by_clap(candidates, clips, options.clap)
            print(f"{len(clips)} clips chosen of {len(candidates)} candidates")
        _keep(clips, file)


def _requests(options, seconds):
    """The plan that is given, or one of `n` clips of the prompts that are, each in its turn."""
    import pandas as pd

    from . import captions, generation, pipeline, store

    if sum(map(bool, (options.plan, options.prompt, options.prompts))) != 1:
        raise pipeline.UsageError("give a plan, or --prompt TEXT, or --prompts FILE")
    if options.plan:
        plan = _table(options.plan)
        return plan if "duration_s" in plan else plan.assign(duration_s=seconds)
    texts = [options.prompt]
    if file := options.prompts and _found(options.prompts):
        texts = _table(file)["prompt"] if file.suffix == ".csv" else file.read_text("utf-8").splitlines()
    texts = [text.strip() for text in texts if text.strip()]
    store.check_rows(pd.DataFrame({"prompt": texts[:1] or [""]}), "the prompts", prompt="text")
    turns = pd.DataFrame({"caption": [texts[i % len(texts)] for i in range(options.n or len(texts))]})
    turns["label"] = turns["caption"].map(captions.tidy)
    names = turns["label"].str.replace(r"\W+", "_", regex=True).str[:40]
    turns["clip_id"] = [f"{name}-{i:04d}" for i, name in enumerate(names)]
    seconds = options.seconds or seconds
    return generation.plan_captions(turns, duration_s=seconds, seed=options.seed)


def _score(options):
    import pandas as pd

    from . import audio, datasets, embeddings, fad, pipeline, store

    made = datasets.load_folder(_found(options.generated))
    if options.official:
        folder = datasets.SOURCES.loc["dcase2024_task7", "folder"]
        _, published = datasets.load_dcase2024_task7(store.project_path(Path(options.data_dir) / folder))
        networks = {k: embeddings.get_embedding(name) for k, name in embeddings.CHALLENGE.items()}
        scores = fad.challenge_scores(published, {options.generated: made["path"].tolist()}, networks)
    elif not options.real:
        raise pipeline.UsageError("give two folders, or one and --official")
    else:
        place = _found(options.real)
        real = datasets.load_folder(place)
        # the same of every file, so that the scores compare sounds and not lengths or levels
        seconds = options.seconds or min(real["duration_s"].min(), made["duration_s"].min())
        sounds = [audio.excerpts(table["path"], seconds) for table in (real, made)]
        # every file counts as a recording, unless a table, given or in the folder, says otherwise
        told = place.is_file() or any(place.glob("*.csv"))
        groups = {"real": real["source_id"]} if told else {}
        tables = []
        for name, _, path in (text.partition("=") for text in options.embedding):
            ruler = embeddings.get_embedding(name, path)
            x, y = (ruler.embed(part, audio.LOG_MEL_RATE, silence="allow") for part in sounds)
            tables.append(fad.score_table(x, {"made": y}, embedding=name, groups=groups))
        scores = pd.concat(tables).assign(reference=options.real, candidate=options.generated)
    table = fad.score_lines(scores).to_string(index=False)
    print(f"{table}\nTable: {store.write_table(scores, options.out)}")


def _compare(options):
    from . import pipeline

    official = options.prompts == "dcase2024-task7"
    if not (official or options.real):
        raise pipeline.UsageError("give --real FOLDER, or the prompts dcase2024-task7")
    given = {"backends": options.backends, "n_clips": options.n, "clip_s": options.seconds}
    given |= {"prompts": options.prompts if official else str(_found(options.prompts).absolute())}
    given |= {"real_root": options.real, "seed": options.seed, "embedding_names": options.embedding}
    given = {name: value for name, value in given.items() if value is not None}
    folder = pipeline.run("compare", given, name=options.name, only="A6")
    _show(folder / "compare" / "index.html", options)


def _table(path):
    from . import store

    return store.read_table(_found(path))


def _found(place):
    """Path of what a command is given: from where one stands, or else in the project."""
    from . import store

    if not (path := store.project_path(place)).exists():
        raise store.DataError(f"{place}: no such file or folder; check its spelling")
    return path


def _value(text):
    """An option's value as YAML reads it; two numbers in brackets are a range."""
    import yaml

    value = yaml.safe_load(text)
    return tuple(value) if isinstance(value, list) else value


def _of_all_shards(table, plan, file, shard):
    """Keep the table of a shard; give that of all of them once the last is there, else nothing."""
    import pandas as pd

    from . import store

    if not shard:
        return table
    number, _, total = shard.partition("/")
    name = f"{file.stem}-{store.content_key(plan.to_csv())}"  # of this plan, and of no other
    store.write_table(table, file.parent / ".shards" / f"{name}-{number}-of-{total}.csv")
    parts = list((file.parent / ".shards").glob(f"{name}-*-of-{total}.csv"))
    if len(parts) < int(total):
        return print(f"{len(parts)} of {total} shards are done: the table comes with the last")
    whole = pd.concat(map(store.read_table, parts)).set_index("clip_id", drop=False)
    return whole.loc[plan["clip_id"][plan["clip_id"].isin(whole.index)]].reset_index(drop=True)


def _keep(table, file):
    """Write the table of a folder of sounds; its paths are relative to it, so that it can be moved."""
    from . import store

    table = table.assign(path=[os.path.relpath(path, file.parent) for path in table["path"]])
    print(f"Table: {store.write_table(table, file)}\nTo hear it: soundscapes listen {file.parent}")


def _finetune(options):
    from . import finetuning

    result = finetuning.finetune(finetuning.read_config(options.config, options.p))
    if os.environ.get("RANK", "0") == "0":
        print(f"Checkpoint: {result.checkpoint} (best step {result.best_step})")


def _train_mini(options):
    from . import minimodel

    given = {"unet_steps": options.steps, "clap_steps": options.clap_steps, "seed": options.seed}
    config = minimodel.MiniConfig(**given)
    pool = (options.data_dir, options.clips_per_class, options.scenes_per_class)
    print(f"Checkpoint: {minimodel.train_builtin(options.out, *pool, config)}")


_STOPS = []


def _stop(_, frame):
    _STOPS.append(True)
    while frame:
        # an error raised while a library loads may abort it: compiled code need not expect one
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(_interrupted())
        frame = frame.f_back
    raise KeyboardInterrupt


def _interrupted():
    if os.environ.get("RANK", "0") == "0":
        print("\ninterrupted: the same command again goes on from here", file=sys.stderr, flush=True)
    return 130


def command():
    """Run the command line of this process and end it: what ``soundscapes`` calls."""
    # A scheduler's time limit is an interruption like any other: say how to resume.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    if sys.argv[1:2] in (["mix"], ["train-mini"]):
        # Ctrl-C reaches their workers too, whose last words say nothing; errors come back without these.
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    code = main()
    if code < 128:
        sys.exit(code)
    os._exit(code)  # without the last words of what was stopped


if __name__ == "__main__":
    command()
