"""Command line: ``python -m soundscapes_utils --help``; ``run_all.sh`` calls it after set-up."""

import argparse
import signal
import sys
import textwrap
import time
import webbrowser
from pathlib import Path

from . import pipeline, report, store

EPILOG = """\
profiles    A profile is a file notebooks/profiles/<name>.yaml: for each notebook the parameters
            that differ from its own defaults. `profiles` lists them with time, memory and needs.
-p          -p name value sets a parameter in every notebook that has one of that name. Names are
            checked before anything runs. Lists in quotes: -p test_folds "[1, 2]". Relative paths
            are taken from the folder that you are in.
resuming    The same command again continues a run: notebooks whose code, parameters and inputs are
            unchanged are skipped. --fresh runs everything again.
one notebook  --only 03 runs just that one, on what the others left in the same run folder.
report      runs/<name>/index.html; `report runs/<name> --open` makes it again and opens it.

examples
  ./run_all.sh                                           profile quick
  ./run_all.sh esc10 -p esc50_root ~/ESC-50              real recordings
  ./run_all.sh quick -p seed 1 --name quick-seed1        a second run beside the first
  python -m soundscapes_utils mix plan.csv mixes --shard 1/4   a quarter of a large set of mixes
  python -m soundscapes_utils plan runs/quick/tables/clips.csv plan.csv --counts 200%
  python -m soundscapes_utils generate plan.csv clips --backend ronchini2024-audioldm2 --shard 1/4
  accelerate launch -m soundscapes_utils generate plan.csv clips   on every GPU of this machine
"""


def main(argv=None):
    """Run the command line.

    Parameters
    ----------
    argv : list of str, optional
        Without the program's name; those of the process by default.

    Returns
    -------
    int
        Exit code: 0, 1 after a failed notebook, 2 for a wrong call, 130 after an interruption.

    Examples
    --------
    >>> main(["run", "qick"])
    2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train-mini"]:
        from . import minimodel

        return minimodel.main(arguments[1:])
    if arguments[:1] == ["finetune"]:
        from . import finetuning

        return finetuning.main(arguments[1:])
    if arguments[:1] == ["esc"]:
        from . import esc

        return esc.main(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        return options.action(options)
    except (pipeline.UsageError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except pipeline.RunFailed as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _parser():
    parser = argparse.ArgumentParser(
        prog="soundscapes_utils",
        description="Run the notebooks of a profile in order and make the report.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    run = commands.add_parser("run", help="run a profile, or go on with it")
    run.add_argument("profile", nargs="?", default="quick")
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    run.add_argument("--name", help="folder under runs/; the profile's name by default")
    run.add_argument("--only", metavar="NN", help="run this one notebook, changed or not")
    run.add_argument("--fresh", action="store_true", help="skip nothing")
    run.set_defaults(action=_run)
    page = commands.add_parser("report", help="make the report of a run again")
    page.add_argument("run_dir", help="for example runs/quick")
    page.add_argument("--open", action="store_true", help="show it in the browser")
    page.set_defaults(action=_report)
    page = commands.add_parser("listen", help="make a page of a generated set, to be listened to")
    page.add_argument("run_dir", help="for example runs/quick")
    page.add_argument("--table", default="generated", help="name of the run's table, or a CSV file")
    page.add_argument("--per-class", type=int, default=24, metavar="N", help="clips on either side")
    page.add_argument("--open", action="store_true", help="show it in the browser")
    page.set_defaults(action=_listen)
    listing = commands.add_parser("profiles", help="list the profiles and what they need")
    listing.set_defaults(action=_profiles)
    publishing = commands.add_parser(
        "publish", help="outputs of a quick run into notebooks/, figures and table for README.md"
    )
    publishing.add_argument("run_dir", nargs="?", default="runs/quick")
    publishing.set_defaults(action=_publish)
    mixing = commands.add_parser("mix", help="render a table of mixes, or a part of it")
    mixing.add_argument("table", help="CSV file of the plan, such as runs/quick/tables/mixes.csv")
    mixing.add_argument("out_dir", help="gets the mixes, and mixes.csv once all are there")
    mixing.add_argument("--sample-rate", type=int, default=16_000, metavar="HZ")
    mixing.add_argument("--workers", type=int, help="processes; as many as pay off by default")
    mixing.add_argument("--engine", default="numpy", help="numpy or pydub")
    mixing.add_argument("--format", default="wav", help="wav or flac")
    mixing.add_argument("--stems", action="store_true", help="foreground and background as well")
    mixing.add_argument("--shard", metavar="i/n", help="this part only; parts may run at once")
    mixing.set_defaults(action=_mix)
    planning = commands.add_parser("plan", help="plan clips of every class, for generate")
    planning.add_argument(
        "clips", help="CSV file of real clips, such as runs/quick/tables/clips.csv"
    )
    planning.add_argument("out", help="CSV file to write")
    planning.add_argument("-n", type=int, default=10, help="clips of each class")
    planning.add_argument(
        "--counts", default="", help="instead of -n: 200%% of the real clips, or ronchini2024"
    )
    planning.add_argument("--family", nargs="+", default=["simple"], help="of prompts, or a file")
    planning.add_argument("--negative-prompt", default="", metavar="TEXT")
    planning.add_argument("--dataset", default="builtin", help="part of each clip's identity")
    planning.add_argument("--backend", default="audioldm", help="a preset gives the duration")
    planning.add_argument("--duration", type=float, metavar="S", help="seconds of each clip")
    planning.add_argument("--seed", type=int, default=0)
    planning.set_defaults(action=_plan)
    generating = commands.add_parser("generate", help="make the clips of a plan, or a part of it")
    generating.add_argument("plan", help="CSV file, as written from generation.plan_clips")
    generating.add_argument("out_dir", help="gets the clips, and generated.csv once all are there")
    generating.add_argument("--backend", default="audioldm", help="a back-end or preset by name")
    generating.add_argument("--checkpoint", help="folder or hub name; the back-end's by default")
    generating.add_argument(
        "-o",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="further options of the back-end, such as -o steps 100 -o dtype float16",
    )
    generating.add_argument(
        "--batch-size", type=int, metavar="N", help="clips a call; 16 or eight passes by default"
    )
    generating.add_argument("--max-attempts", type=int, default=3, metavar="N", help="seeds tried")
    generating.add_argument("--loudness", help="peak, none, or a level in LUFS such as -23")
    generating.add_argument(
        "--best-of", type=int, metavar="N", help="candidates a clip; the preset's, else 1"
    )
    generating.add_argument(
        "--clap", default="laion-clap", help="what chooses among them: laion-clap or mini-clap"
    )
    sharing = generating.add_mutually_exclusive_group()
    sharing.add_argument("--shard", metavar="i/n", help="this part only; parts may run at once")
    sharing.add_argument("--workers", type=int, help="processes of this machine, a thread each")
    generating.set_defaults(action=_generate)
    commands.add_parser(
        "train-mini", help="make the small checkpoint again (its own --help)", add_help=False
    )
    commands.add_parser(
        "finetune", help="fine-tune AudioLDM on captioned sounds (its own --help)", add_help=False
    )
    commands.add_parser(
        "esc", help="a study of classifiers and arms (its own --help)", add_help=False
    )
    return parser


def _run(options):
    page = pipeline.run(
        options.profile, dict(options.p), name=options.name, only=options.only, fresh=options.fresh
    )
    _print_headlines(report.headlines(page.parent))
    print(f"\nReport: {page}")
    return 0


def _print_headlines(table):
    width = max(table["quantity"].str.len(), default=0)
    print()
    for row in table.itertuples():
        print(f"{row.stage}  {row.quantity:<{width}}  {row.value:>12}  {row.note}".rstrip())


def _report(options):
    page = report.write_report(options.run_dir)
    print(f"Report: {page}")
    if options.open:
        webbrowser.open(page.as_uri())
    return 0


def _listen(options):
    from . import audio, listening

    try:
        page = listening.page_of_run(options.run_dir, options.table, options.per_class)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, audio.AudioError) else 2
    print(f"Page: {page}")
    if options.open:
        webbrowser.open(page.as_uri())
    return 0


def _publish(options):
    for path in report.publish(options.run_dir):
        print(f"outputs taken over: {path.name}")
    print(report.copy_for_readme(options.run_dir, store.project_path("figures")))
    return 0


def _mix(options):
    import pandas as pd

    from . import audio, mixing

    chosen = ("workers", "engine", "format", "stems", "shard")
    try:
        table = pd.read_csv(options.table, float_precision="round_trip")
        done = mixing.render_mixes(
            table,
            options.out_dir,
            options.sample_rate,
            **{name: getattr(options, name) for name in chosen},
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, audio.AudioError) else 2
    print(
        f"{len(done)} mixes are in {options.out_dir}, {(done.peak_scale < 1).sum()} scaled to fit"
    )
    if options.shard is None:
        content = done.to_csv(index=False).encode()
        print(f"Table: {store.write_atomic(Path(options.out_dir) / 'mixes.csv', content)}")
    return 0


def _generate(options):
    import os

    import yaml

    from . import audio, generation, selection

    out_dir = Path(options.out_dir)
    begin, before = time.monotonic(), _made_in(out_dir)
    try:
        preset = generation.preset(options.backend)
        plan = _read_plan(options.plan, options.backend, preset)
        candidates = selection.plan_candidates(plan, options.best_of or preset["candidates"])
        level = yaml.safe_load(options.loudness) if options.loudness else preset["loudness"]
        n_processes = int(os.environ.get("WORLD_SIZE", 1))
        done = _generated(options, candidates, level, n_processes)
        if os.environ.get("RANK", "0") != "0":
            return 0
        _tell_generated(done, out_dir, before, time.monotonic() - begin)
        if options.shard is None:
            if len(candidates) > len(plan):
                done = selection.best_by_clap(candidates, done, options.clap)
                print(f"{len(done)} clips chosen of {len(candidates)} candidates")
            content = done.to_csv(index=False).encode()
            print(f"Table: {store.write_atomic(out_dir / 'generated.csv', content)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, audio.AudioError) else 2
    return 0


def _made_in(out_dir):
    from . import generation

    made = {path.name for path in out_dir.glob("*.wav")}
    return made, len(generation.rejected_clips(out_dir))


def _tell_generated(done, out_dir, before, seconds):
    files, set_aside = before
    new = sum(Path(path).name not in files for path in done["path"])
    print(f"{len(done)} clips are in {out_dir}: {new} made, {len(done) - new} kept, ", end="")
    print(f"{_made_in(out_dir)[1] - set_aside} outputs set aside", end="")
    print(f"; {seconds:.0f} s, {new / max(seconds, 1e-9):.2f} clips/s")


def _read_plan(path, backend, preset):
    import pandas as pd

    from . import generation

    texts = dict.fromkeys(("clip_id", "label", "prompt", "prompt_family", "negative_prompt"), str)
    plan = pd.read_csv(path, dtype=texts, float_precision="round_trip")
    if "duration_s" not in plan.columns:
        return plan.assign(duration_s=preset["duration_s"])
    if backend in generation.PRESETS and (plan["duration_s"] != preset["duration_s"]).any():
        print(
            f"note: {path} asks for other durations than the {preset['duration_s']} s of {backend}"
        )
    return plan


def _generated(options, plan, level, n_processes):
    import yaml

    from . import generation

    name = options.backend
    chosen = {key: yaml.safe_load(value) for key, value in options.o}
    chosen |= {"checkpoint": options.checkpoint} if options.checkpoint else {}
    how = {
        "batch_size": options.batch_size,
        "max_attempts": options.max_attempts,
        "loudness": level,
    }
    if n_processes > 1:
        if options.shard or options.workers:
            raise ValueError("accelerate shares out the plan: leave out --shard and --workers")
        return generation.generate_on_gpus(plan, name, options.out_dir, options=chosen, **how)
    if options.workers:
        how["workers"] = options.workers
        return generation.generate_with_workers(plan, name, options.out_dir, options=chosen, **how)
    backend = generation.get_backend(name, **chosen)
    return generation.generate_clips(plan, backend, options.out_dir, shard=options.shard, **how)


def _plan(options):
    import pandas as pd

    from . import generation

    try:
        clips = pd.read_csv(options.clips, dtype={"label": str})
        counts = generation.read_counts(options.counts, clips, options.n)
        told = generation.preset(options.backend, duration_s=options.duration or 2.56)
        plan = generation.plan_clips(
            list(counts),
            counts,
            options.family,
            duration_s=told["duration_s"],
            dataset=options.dataset,
            negative_prompt=options.negative_prompt,
            seed=options.seed,
        )
        path = store.write_atomic(options.out, plan.to_csv(index=False).encode())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(plan)} clips of {len(counts)} classes, {told['duration_s']} s each: {path}")
    return 0


def _profiles(_):
    for name in pipeline.profiles():
        profile = pipeline.read_profile(name)
        print(name)
        print(textwrap.indent(textwrap.fill(profile["description"], 94), "  "))
        for key in ("time", "memory", "disk", "needs"):
            print(f"  {key + ':':8}{profile[key]}")
    return 0


if __name__ == "__main__":
    # A scheduler's time limit is an interruption like any other: say how to resume.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
