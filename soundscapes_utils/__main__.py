"""Command line: ``python -m soundscapes_utils --help``; ``run_all.sh`` calls it after set-up.

profiles    A profile is a file notebooks/profiles/<name>.yaml: for each notebook the parameters
            that differ from its own defaults. `profiles` lists them with time, memory and needs;
            `profiles NAME` shows all parameters of one.
-p          -p name value sets a parameter in every notebook that has one of that name. Names are
            checked before anything runs. Lists in quotes: -p test_folds "[1, 2]". Relative paths
            are taken from the folder that you are in.
resuming    The same command again continues a run: notebooks whose code, parameters and inputs are
            unchanged are skipped. --fresh runs everything again.
one         --only 03 runs just that one, on what the others left in the same run folder.
report      runs/<name>/index.html; `report runs/<name> --open` makes it again and opens it;
            --table generated makes a page of all generated clips, to be listened to.

some calls
  ./run_all.sh esc10 -p esc50_root ~/ESC-50              real recordings
  ./run_all.sh quick -p seed 1 --name quick-seed1        a second run next to the first
  python -m soundscapes_utils mix plan.csv mixes --shard 1/4   a quarter of a large set of mixes
  python -m soundscapes_utils generate plan.csv clips --backend ronchini2024-audioldm2 --shard 1/4
"""

import argparse
import csv
import os
import signal
import sys
import textwrap
import time
from pathlib import Path


def main(argv=None):
    """Run the command line; return 0, 1 after a failed notebook, 2 for a wrong call, 130 if stopped.

    >>> main(["run", "qick"])
    2
    """
    options = _parser().parse_args(argv)
    try:
        code = options.action(options) or 0
        sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt) as error:
        # a library may have turned the interruption into an error of its own
        if _STOPS or isinstance(error, KeyboardInterrupt):
            if os.environ.get("RANK", "0") == "0":
                print("\ninterrupted: the same command again goes on from here", file=sys.stderr)
            return 130
        if isinstance(error, BrokenPipeError):  # who read the output has seen enough
            return 141
        if not isinstance(error, (ValueError, OSError)):
            raise
        from .pipeline import in_words

        print("error:", *in_words(error).split(), file=sys.stderr)
        return 2


# what the kinds of options in commands.csv are for argparse
_KINDS = {"": {}, "whole": {"type": int}, "switch": {"action": "store_true"}, "optional": {"nargs": "?"}}
_KINDS["pairs"] = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}


def _parser():
    parser = argparse.ArgumentParser(
        prog="soundscapes_utils",
        description="Run the notebooks of a profile in order and make the report; or one step alone.",
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
        command.add_argument(option, **_KINDS[row["kind"]], **given)
    return parser


# --- runs and their pages ------------------------------------------------------------------------


def _run(options):
    from . import pipeline, report

    given = {"name": options.name, "only": options.only, "fresh": options.fresh}
    try:
        folder = pipeline.run(options.profile, dict(options.p), **given)
    except pipeline.RunFailed as error:
        print(error, file=sys.stderr)
        return error.exit_code
    page = report.write_report(folder)
    table = report.headlines(folder)
    width = max(table["quantity"].str.len(), default=0)
    print()
    for row in table.itertuples():
        print(f"{row.stage}  {row.quantity:<{width}}  {row.value:>12}  {row.note}".rstrip())
    print(f"\nReport: {page}")


def _report(options):
    import webbrowser

    from . import report

    if options.table:
        page = report.page_of_table(options.run_dir, options.table, options.per_class)
    else:
        page = report.write_report(options.run_dir)
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
    from . import report, store

    for path in report.publish(options.run_dir):
        print(f"outputs taken over: {path.name}")
    print(report.copy_for_readme(options.run_dir, store.project_path("figures")))


# --- one step alone ------------------------------------------------------------------------------


def _mix(options):
    from . import mixing, store

    chosen = {name: getattr(options, name) for name in ("workers", "engine", "stems", "shard")}
    chosen["events"] = store.read_table(options.events) if options.events else None
    plan = store.read_table(options.table)
    mixes = mixing.render_mixes(plan, options.out_dir, options.sample_rate, **chosen)
    scaled = (mixes["peak_scale"] < 1).sum()
    print(f"{len(mixes)} mixes are in {options.out_dir}, {scaled} scaled to fit")
    if options.shard is None:
        print(f"Table: {store.write_table(mixes, Path(options.out_dir) / 'mixes.csv')}")


def _generate(options):
    import yaml

    from . import generation, selection, store

    out_dir, begin = Path(options.out_dir), time.monotonic()
    preset = generation.preset(options.backend)
    plan = store.read_table(options.plan)
    if "duration_s" not in plan:
        plan["duration_s"] = preset["duration_s"]
    if (plan["duration_s"] != preset["duration_s"]).any() and options.backend in generation.PRESETS:
        usual = f"the {preset['duration_s']} s of {options.backend}"
        print(f"note: {options.plan} asks for other durations than {usual}")
    candidates = selection.plan_candidates(plan, options.best_of or preset["candidates"])
    chosen = {name: yaml.safe_load(value) for name, value in options.o}
    backend = generation.get_backend(options.backend, checkpoint=options.checkpoint, **chosen)
    loudness = yaml.safe_load(options.loudness) if options.loudness else preset["loudness"]
    existing, n_rejected = set(out_dir.glob("*.wav")), len(generation.rejected_clips(out_dir))
    how = (options.batch_size, options.max_attempts, loudness, options.shard)
    clips = generation.generate_clips(candidates, backend, out_dir, *how)
    if os.environ.get("RANK", "0") != "0":
        return
    n_new = sum(Path(path) not in existing for path in clips["path"])
    n_rejected = len(generation.rejected_clips(out_dir)) - n_rejected
    seconds = time.monotonic() - begin
    print(
        f"{len(clips)} clips are in {out_dir}: {n_new} made, {len(clips) - n_new} kept, "
        f"{n_rejected} outputs rejected; {seconds:.0f} s, {n_new / seconds:.2f} clips/s"
    )
    if options.shard is None:
        if len(candidates) > len(plan):
            clips = selection.best_by_clap(candidates, clips, options.clap)
            print(f"{len(clips)} clips chosen of {len(candidates)} candidates")
        print(f"Table: {store.write_table(clips, out_dir / 'generated.csv')}")


def _finetune(options):
    from . import finetuning

    result = finetuning.finetune(finetuning.read_config(options.config, options.p))
    if os.environ.get("RANK", "0") == "0":
        print(f"Checkpoint: {result.checkpoint} (best step {result.best_step})")


def _train_mini(options):
    from . import minimodel

    given = {"unet_steps": options.steps, "clap_steps": options.clap_steps, "seed": options.seed}
    config = minimodel.MiniConfig(**{k: v for k, v in given.items() if v is not None})
    pool = (options.data_dir, options.clips_per_class, options.scenes_per_class)
    print(f"Checkpoint: {minimodel.train_builtin(options.out, *pool, config)}")


# --- stopped from outside ------------------------------------------------------------------------

_STOPS = []


def _stop(*_):
    _STOPS.append(True)
    raise KeyboardInterrupt


if __name__ == "__main__":
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
