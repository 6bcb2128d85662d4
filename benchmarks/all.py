"""Every stage beside its peer: one table of rates, ratios, goals and verdicts, from one machine.

    python benchmarks/all.py                     every row, about two hours on two idle cores
    python benchmarks/all.py P1a P3              these rows
    python benchmarks/all.py --quick             tiny sizes, to see that it works; P6 takes minutes
    python benchmarks/all.py --out runs/speed    the table also as runs/speed.csv and runs/speed.md

Every row runs in a process of its own, in a folder of its own under `--dir`, which should be on a disk.
Peers are formulas and loops written out beside ours; scaper and dscaper want an environment of their own
(numpy < 2, sox): `--scaper-python env/bin/python`. With `--former 1296`, the seconds that the quick
profile of commit af60f48 took on this machine, a quarter of it is the goal of P6 where that is more.
"""

import argparse
import csv
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
# row, the script that holds it, and what it compares
WHAT = {
    "P1a": (
        "mixing",
        "mixes of WAV sources that are used once or twice, over pydub's loop and the floor",
    ),
    "P1b": ("mixing", "the same, 25 mixes a source"),
    "P1c": ("mixing", "mixes of Ogg sources, resampled, over pydub's loop"),
    "P1d": ("mixing", "mixes with SNR in LUFS, captions and JAMS, over scaper"),
    "P1e": ("mixing", "mixes on the fly through a shuffled data loader"),
    "P2": ("evaluation", "FAD, KAD, PRDC, intervals and FAD-inf, over sqrtm and the peers' formulas"),
    "P3": ("evaluation", "clips embedded, over a loop a file; cache hits"),
    "P5": ("finetuning", "preparing and steps of fine-tuning, over encoding in every step"),
    "P6": ("all", "the quick profile: wall, memory, notebooks, slowest cells"),
    "P7": ("esc", "epochs with validation, over bare steps"),
    "P8": ("growth", "growth of time and memory with the rows"),
    "P9": ("all", "CPU seconds of every --help"),
}
COLUMNS = ["row", "what", "peer", "peer's rate", "ours", "unit", "ratio", "goal", "met", "note"]


# --- rows ----------------------------------------------------------------------------------------


def p6(work, quick, options):
    """Run the quick profile anew, and read what it left."""
    name, profile = f"speed-{os.getpid()}", "test" if quick else "quick"
    launcher = [str(ROOT / "run_all.sh")]
    if not (ROOT / ".venv" / "set-up-complete").is_file():  # never set up from here
        launcher = [sys.executable, "-m", "soundscapes_utils", "run"]
    started = time.perf_counter()
    command = [*launcher, profile, "--fresh", "--name", name]
    peak, folder = 0, ROOT / "runs" / name
    with (work / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.5)
    wall = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"profile {profile} failed: {(work / 'log').read_text()[-500:]}")
    row = {"peer": "", "unit": "s"}
    goal = max(300.0, (options.former or 0) / 4)
    yield row | {"what": f"profile {profile}, wall", "ours": wall, "most": goal}
    what = f"profile {profile}, memory in all its processes"
    yield row | {"what": what, "ours": peak / 1e9, "unit": "GB", "most": 4}
    stages, cells = json.loads((folder / "run.json").read_text())["stages"], []
    for stem, stage in sorted(stages.items()):
        yield row | {"what": f"  notebook {stem}", "ours": stage["seconds"]}
        executed = json.loads((folder / "notebooks" / f"{stem}.ipynb").read_text())["cells"]
        for number, cell in enumerate(executed):
            took = cell["metadata"].get("papermill", {}).get("duration") or 0
            cells.append((took, f"  {stem[:2]}, cell {number}: {first_line(cell)}"))
    for took, what in sorted(cells, reverse=True)[:10]:
        yield row | {"what": what, "ours": took}
    shutil.rmtree(folder)


def resident(pid):
    """Resident bytes of a process and all that it began."""
    total, process = 0, None
    try:
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            total += one.memory_info().rss
    except psutil.Error:  # one has just ended: the next sample counts
        return 0
    return total


def first_line(cell):
    """First line of a cell's code that is no comment, to know it by."""
    lines = (line.strip() for line in "".join(cell["source"]).splitlines())
    return next((line for line in lines if line and not line.startswith("#")), "")[:60].replace("|", "¦")


def p9(work, quick, options):
    """CPU seconds of `--help`, by command; the least of three calls after one that warms up."""
    text = (ROOT / "soundscapes_utils" / "commands.csv").read_text(encoding="utf-8")
    commands = list(dict.fromkeys(row["command"] for row in csv.DictReader(text.splitlines())))
    for name in ["", *(commands[:1] if quick else commands)]:
        call = [sys.executable, "-m", "soundscapes_utils", *filter(None, [name]), "--help"]
        taken = []
        for _ in range(4):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(call, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        what = f"soundscapes {name} --help".replace("  ", " ")
        yield {"what": what, "ours": min(taken[1:]), "unit": "CPU s", "most": 1}


ROWS = {"P6": p6, "P9": p9}


# --- the runner ----------------------------------------------------------------------------------


def judged(name, found, quick):
    """Complete what a row yields: ratio, goal, verdict.

    A row has `what`, `ours`, `unit`, and where there is one `peer` and its rate `theirs`; with `least`
    the rate, or its ratio to the peer's, must be that; with `most` the seconds must not pass it.
    """
    ours, theirs = found["ours"], found.get("theirs")
    bound = found.get("least", found.get("most"))
    ratio = ours / theirs if theirs else None
    goal = "" if bound is None else f"{'≥' if 'least' in found else '≤'} {short(bound)}"
    goal += " ×" * bool(goal and found.get("peer"))
    value, met = ratio if found.get("peer") else ours, ""
    if goal and quick:
        met = "not judged"
    elif goal:
        fits = value is not None and (value >= bound if "least" in found else value <= bound)
        met = "not measured" if value is None else "yes" if fits else "no"
    cells = [name, found["what"], found.get("peer", ""), short(theirs), short(ours), found["unit"]]
    return [*cells, short(ratio), goal, met, found.get("note", "")]


def short(number):
    """A number in three digits."""
    return "" if number is None else f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"


def run_row(name, options):
    """Measure one row in this process; its lines go to the file of the parent."""
    module = __import__(WHAT[name][0])
    rows = ROWS if module.__name__ == "all" else module.ROWS
    with tempfile.TemporaryDirectory(dir=options.dir, prefix=f"{name}-") as folder:
        for found in rows[name](Path(folder), options.quick, options):
            with Path(options.child).open("a", encoding="utf-8") as file:
                file.write(json.dumps(found, default=float) + "\n")


def measured(name, options):
    """Lines of the table of one row, from a process of its own; one that fails says why."""
    started, kept = time.perf_counter(), {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with tempfile.NamedTemporaryFile(suffix=".jsonl", dir=options.dir) as file:
        command = [sys.executable, __file__, name, "--child", file.name, "--dir", str(options.dir)]
        command += ["--quick"] * options.quick
        command += [f"--scaper-python={python}" for python in options.scaper_python]
        command += [f"--former={options.former}"] * bool(options.former)
        done = subprocess.run(command, env=os.environ | kept, stderr=subprocess.PIPE, text=True)
        lines = Path(file.name).read_text(encoding="utf-8").splitlines()
    table = [judged(name, json.loads(line), options.quick) for line in lines]
    if done.returncode:
        why = " ".join(done.stderr.split())[-300:] or f"exit {done.returncode}"
        table.append([name, WHAT[name][1], *[""] * 6, "failed", why])
    print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return table


def machine(folder):
    """What the figures were measured on."""
    model = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        f": {platform.processor()}",
    ) if Path("/proc/cpuinfo").is_file() else f": {platform.processor()}"  # fmt: skip
    parts = [p for p in psutil.disk_partitions(all=True) if Path(folder).is_relative_to(p.mountpoint)]
    disk = max(parts, key=lambda part: len(part.mountpoint)).fstype
    disk += ", which is memory: give --dir on a disk" * (disk in ("tmpfs", "ramfs"))
    memory, load = psutil.virtual_memory().total / 1e9, psutil.getloadavg()[0]
    names = ["numpy", "scipy", "pandas", "torch", "soundfile", "pydub", "scikit-learn", "joblib"]
    commit = subprocess.run(
        ["git", "log", "-1", "--format=%h"], cwd=ROOT, capture_output=True, text=True
    )
    return (
        f"{os.cpu_count()} cores ({model.partition(':')[2].strip()}), {memory:.0f} GB, disk {disk}, "
        f"load {load:.1f} at the start, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}; "
        f"{platform.system()}, Python {platform.python_version()}, "
        f"{', '.join(f'{name} {version(name)}' for name in names)}; commit {commit.stdout.strip()}"
    )


def markdown(table, head=True):
    """The table as Markdown."""
    rows = [COLUMNS, ["---"] * len(COLUMNS)] * head + table
    return "\n".join(f"| {' | '.join(cell.replace('|', '¦') for cell in row)} |" for row in rows)


def main():
    """Measure the rows that were asked for, print the table and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(WHAT)}; all by default")
    parser.add_argument("--list", action="store_true", help="name the rows and what they compare")
    parser.add_argument("--quick", action="store_true", help="seconds a row, to see that it works")
    parser.add_argument("--out", help="path without suffix: the table as .csv and .md")
    parser.add_argument("--dir", default=ROOT / "runs", help="for what the rows write; on a disk")
    parser.add_argument("--scaper-python", action="append", default=[], help="that has (d)scaper")
    parser.add_argument("--former", type=float, help="seconds of the quick profile of af60f48")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.rows) - set(WHAT):
        parser.error(f"unknown rows {sorted(unknown)}; there are: {', '.join(WHAT)}")
    if options.list:
        print("\n".join(f"{name:4} {what}" for name, (_, what) in WHAT.items()))
        return
    options.dir = Path(options.dir).resolve()
    options.dir.mkdir(parents=True, exist_ok=True)
    if options.child:
        run_row(options.rows[0], options)
        return
    where = machine(options.dir)
    where += "; tiny sizes, not for judging" * options.quick
    print(f"{where}\n\n{markdown([])}", flush=True)
    table = []
    for name in options.rows or WHAT:
        table += (rows := measured(name, options))
        print(markdown(rows, head=False), flush=True)
        if options.out:  # what there is so far
            Path(f"{options.out}.md").write_text(f"{where}\n\n{markdown(table)}\n", encoding="utf-8")
            with Path(f"{options.out}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([COLUMNS, *table])


if __name__ == "__main__":
    main()
