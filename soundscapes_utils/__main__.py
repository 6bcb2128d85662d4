"""Command line: ``python -m soundscapes_utils --help``; ``run_all.sh`` calls it after set-up.

profiles    A profile is a file notebooks/profiles/<name>.yaml: for each notebook the parameters
            that differ from its own defaults. `profiles` lists them with time, memory and needs;
            `profiles NAME` shows all parameters of one.
-p          -p name value sets a parameter in every notebook that has one of that name. Names are
            checked before anything runs. Lists in quotes: -p test_folds "[1, 2]". Relative paths
            are taken from the folder that you are in.
resuming    The same command again continues a run: notebooks whose code, parameters and inputs are
            unchanged are skipped. --fresh runs everything again.
one notebook  --only 03 runs just that one, on what the others left in the same run folder.
report      runs/<name>/index.html; `report runs/<name> --open` makes it again and opens it;
            --table generated makes a page of all generated clips, to be listened to.

some calls
  ./run_all.sh                                           profile quick
  ./run_all.sh esc10 -p esc50_root ~/ESC-50              real recordings
  ./run_all.sh quick -p seed 1 --name quick-seed1        a second run next to the first
  python -m soundscapes_utils mix plan.csv mixes --shard 1/4   a quarter of a large set of mixes
  python -m soundscapes_utils generate plan.csv clips --backend ronchini2024-audioldm2 --shard 1/4
  accelerate launch -m soundscapes_utils generate plan.csv clips   on every GPU of this machine
  accelerate launch -m soundscapes_utils finetune config.yaml      likewise
"""

import argparse
import os
import signal
import sys
import textwrap
import time
from pathlib import Path

# an option that may be given several times, each with a name and a value
_PAIRS = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}


def main(argv=None):
    """Run the command line; return 0, 1 after a failed notebook, 2 for a wrong call, 130 if stopped.

    Examples
    --------
    >>> main(["run", "qick"])
    2
    """
    options = _parser().parse_args(argv)
    try:
        return options.action(options) or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser():
    parser = argparse.ArgumentParser(
        prog="soundscapes_utils",
        description="Run the notebooks of a profile in order and make the report; or one step alone.",
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for action, text, fill in (
        (_run, "run a profile, or go on with it", _run_options),
        (_report, "make the report of a run again", _report_options),
        (_profiles, "list the profiles and what they need", _profiles_options),
        (_publish, "outputs of a quick run into notebooks/, figures and README", _publish_options),
        (_mix, "render a table of mixes, or a part of it", _mix_options),
        (_generate, "make the clips of a plan, or a part of it", _generate_options),
        (_finetune, "fine-tune AudioLDM on captioned sounds", _finetune_options),
        (_train_mini, "make the small checkpoint again", _train_mini_options),
    ):
        name = action.__name__.strip("_").replace("_", "-")
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        fill(command.add_argument)
        command.set_defaults(action=action)
    return parser


# --- runs and their pages ------------------------------------------------------------------------


def _run_options(add):
    add("profile", nargs="?", default="quick")
    add("-p", **_PAIRS, help="parameter of every notebook that has one of that name")
    add("--name", help="folder under runs/; the profile's name by default")
    add("--only", metavar="NN", help="run this one notebook, changed or not")
    add("--fresh", action="store_true", help="skip nothing")


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


def _report_options(add):
    add("run_dir", help="for example runs/quick")
    add("--table", help="instead, a page to listen to: name of a run's table, or a CSV file")
    add("--per-class", type=int, default=24, metavar="N", help="clips on either side of that page")
    add("--open", action="store_true", help="show it in the browser")


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


def _profiles_options(add):
    add("name", nargs="?", help="show all parameters of this profile")


def _profiles(options):
    from . import pipeline

    if options.name:
        for stem, values in pipeline.resolve_parameters(options.name).items():
            print(stem, *(f"  {name} = {value!r}" for name, value in values.items()), sep="\n")
        return
    for name, profile in pipeline.profile_table().iterrows():
        print(name)
        print(textwrap.indent(textwrap.fill(profile.pop("description"), 94), "  "))
        for key, text in profile.items():
            print(f"  {key + ':':8}{text}")


def _publish_options(add):
    add("run_dir", nargs="?", default="runs/quick")


def _publish(options):
    from . import report, store

    for path in report.publish(options.run_dir):
        print(f"outputs taken over: {path.name}")
    print(report.copy_for_readme(options.run_dir, store.project_path("figures")))


# --- one step alone ------------------------------------------------------------------------------


def _mix_options(add):
    add("table", help="CSV file of the plan, such as runs/quick/tables/mixes.csv")
    add("out_dir", help="gets the mixes, and mixes.csv once all are there")
    add("--events", help="CSV file of the events of mixes with several")
    add("--sample-rate", type=int, default=16_000, metavar="HZ")
    add("--workers", type=int, help="processes; as many as pay off by default")
    add("--engine", default="numpy", help="numpy or pydub")
    add("--stems", action="store_true", help="foreground and background as well")
    add("--shard", metavar="i/n", help="this part only; parts may run at once")


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


def _generate_options(add):
    add("plan", help="CSV file, as written from generation.plan_clips")
    add("out_dir", help="gets the clips, and generated.csv once all are there")
    add("--backend", default="audioldm", help="a back-end or preset by name")
    add("--checkpoint", help="folder or hub name; the back-end's by default")
    add("-o", **_PAIRS, help="option of the back-end, such as -o steps 100 -o dtype float16")
    add("--batch-size", type=int, metavar="N", help="clips per call; 16 or eight passes by default")
    add("--max-attempts", type=int, default=3, metavar="N", help="seeds tried")
    add("--loudness", help="peak, none, or a level in LUFS such as -23")
    add("--best-of", type=int, metavar="N", help="candidates per clip; the preset's, else 1")
    add("--clap", default="laion-clap", help="what chooses among them: laion-clap or mini-clap")
    add("--shard", metavar="i/n", help="this part only; parts may run at once")


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


def _finetune_options(add):
    add("config", help="YAML file of the names of finetuning.FinetuneConfig and their values")
    add("-p", **_PAIRS, help="in place of the file's")


def _finetune(options):
    from . import finetuning

    result = finetuning.finetune(finetuning.read_config(options.config, options.p))
    if os.environ.get("RANK", "0") == "0":
        print(f"Checkpoint: {result.checkpoint} (best step {result.best_step})")


def _train_mini_options(add):
    add("--out", default="data/checkpoints/mini-audioldm", help="folder to write")
    add("--data-dir", default="data", help="where the pool of sounds is kept")
    add("--clips-per-class", type=int, default=120)
    add("--scenes-per-class", type=int, default=25)
    add("--steps", type=int, help="of the U-Net")
    add("--clap-steps", type=int)
    add("--seed", type=int)


def _train_mini(options):
    from . import minimodel

    given = {"unet_steps": options.steps, "clap_steps": options.clap_steps, "seed": options.seed}
    config = minimodel.MiniConfig(**{k: v for k, v in given.items() if v is not None})
    pool = (options.data_dir, options.clips_per_class, options.scenes_per_class)
    print(f"Checkpoint: {minimodel.train_builtin(options.out, *pool, config)}")


if __name__ == "__main__":
    # A scheduler's time limit is an interruption like any other: say how to resume.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
