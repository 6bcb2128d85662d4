"""Kills: what SIGKILL at a random moment costs, stage by stage, and what outlives a killed run.

Each stage works once undisturbed; then, time after time in a new folder (of one name, which stands in
tables), it is killed at a random moment and begun again until it ends. What it leaves must be the
undisturbed run's, byte for byte, and nothing that it started may live on. Stage `run` is the whole
profile `test`; the others are mixing, generation with the built-in model, the embedding cache, a study
and a fine-tuning.

    python benchmarks/kills.py --times 20
    python benchmarks/kills.py run --times 3
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# what tells the processes of a trial, wherever they went
MARK = "SOUNDSCAPES_KILLS"
# what each stage leaves that must be the same
LEAVES = {
    "mixing": ["**/*.wav", "mixes.csv"],
    "generation": ["*.wav", "generated.csv"],
    "embedding": ["**/*.npy"],
    "study": ["predictions.csv", "curves.csv"],
    "finetuning": ["out/**/*.safetensors", "log.csv"],
    "run": ["audio/**/*.*", "metadata/**/*.*", "models/**/*.safetensors", "esc/predictions.csv"],
}
LEAVES["run"] += ["tables/*mixes.csv", "tables/*generated.csv", "tables/*scores.csv"]


def sounds(folder):
    """Make, or find, built-in events and scenes, which all trials share."""
    from soundscapes_utils import datasets

    events = datasets.load_builtin(folder / "data", clips_per_class=6)
    return datasets.load_scenes("builtin", events, data_dir=folder / "data", scenes_per_class=5)


def mixing(shared, out):
    """Render 600 mixes in two processes."""
    from soundscapes_utils import mixing, store

    mixes = mixing.plan_mixes(*sounds(shared), 600, duration_s=4.0, sample_rate=16_000)
    made = mixing.render_mixes(mixes, out, 16_000, workers=2)
    store.write_table(made.assign(path=made["path"].str.removeprefix(f"{out}/")), out / "mixes.csv")


def generation(shared, out):
    """Generate 24 clips with the built-in model."""
    from soundscapes_utils import generation, store

    plan = generation.plan_clips(["dog", "rain", "rooster"], 8, "varied", duration_s=1.28)
    backend = generation.get_backend("audioldm", steps=8, device="cpu")
    made = generation.generate_clips(plan, backend, out)
    store.write_table(made.assign(path=made["path"].str.removeprefix(f"{out}/")), out / "generated.csv")


def embedding(shared, out):
    """Embed all sounds in two spaces, with a cache."""
    from soundscapes_utils import embeddings

    paths = pd.concat(sounds(shared))["path"].tolist()
    for name in ("logmel-stats", "mini-clap"):
        embeddings.get_embedding(name).embed(paths, cache_dir=out, silence="allow")


def study(shared, out):
    """Train nine classifiers in two processes."""
    from soundscapes_utils import esc

    events = sounds(shared)[0]
    labels = sorted(events["label"].unique())[:4]
    few = events[events["label"].isin(labels)]
    compared = esc.Study(("real", "repeat:1", "mixup:0.2"), ("sbcnn",), runs=3)
    esc.run_study(few, None, compared, esc.Training(epochs=4, batch_size=8, workers=2), out)


def finetuning(shared, out):
    """Fine-tune the built-in model for 30 steps, with a state every third."""
    from soundscapes_utils import finetuning, metadata, mixing, store

    if not (shared / "set" / "dataset_root.json").is_file():
        mixes = mixing.plan_mixes(*sounds(shared), 24, duration_s=4.0, sample_rate=16_000)
        made = mixing.render_mixes(mixes, shared / "mixes", 16_000)
        metadata.write_audiocaps(made, shared / "set", "kills")
    config = finetuning.FinetuneConfig(
        "builtin", str(shared / "set" / "dataset_root.json"), str(out / "out"), steps=30,
        batch_size=2, validation_steps=3, validation_segments=4, test_segments=0, n_watched=2,
        segment_s=1.28, text_condition_probability=0.5,
    )  # fmt: skip
    log = finetuning.finetune(config).log
    store.write_table(log.drop(columns=["seconds", "samples_per_s"]), out / "log.csv")


STAGES = {part.__name__: part for part in (mixing, generation, embedding, study, finetuning)}


def start(stage, shared, out, token):
    """Begin a stage, or go on with it, in a process of its own."""
    call = [sys.executable, __file__, stage, "--child", str(shared), str(out)]
    if stage == "run":
        call = [sys.executable, "-m", "soundscapes_utils", "run", "test", "--name", out.name]
    log = out.with_name(f"{out.name}.log").open("ab")
    return subprocess.Popen(call, env=os.environ | {MARK: token}, cwd=ROOT, stdout=log, stderr=log)


def survivors(token):
    """Processes that carry the mark of a trial."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def seconds_outlived(token, most=15):
    """For how long something of a killed trial lived on; what still does after `most` is ended."""
    begin = time.perf_counter()
    while (alive := survivors(token)) and time.perf_counter() - begin < most:
        time.sleep(0.1)
    for process in alive:
        process.kill()
    return time.perf_counter() - begin


def left(stage, out):
    """Digests of what a stage leaves, by name."""
    files = {path for pattern in LEAVES[stage] for path in out.glob(pattern) if path.is_file()}
    # records of what was made are of the process that made it
    files = {path for path in files if ".records" not in path.parts}
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def trial(stage, shared, out, token, moment):
    """Kill a stage after so many seconds and finish it; what it leaves, and how long it outlived."""
    process = start(stage, shared, out, token)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    outlived = seconds_outlived(token)
    before = len(left(stage, out)) if out.is_dir() else 0
    status = start(stage, shared, out, token).wait()
    return {"status": status, "before": before, "outlived": outlived, "left": left(stage, out)}


def measure(stage, times, folder, rng):
    """Kill a stage `times` over; one row of the table."""
    shared, place = folder / "shared", ROOT / "runs" if stage == "run" else folder / stage
    place.mkdir(parents=True, exist_ok=True)
    out = place / f"kills-{os.getpid()}"
    for attempt in ("warm", "timed") if stage != "run" else ("timed",):
        shutil.rmtree(out, ignore_errors=True)
        begin = time.perf_counter()
        if start(stage, shared, out, out.name).wait():
            log = out.with_name(f"{out.name}.log").read_text(errors="replace")
            raise SystemExit(f"{stage}: the undisturbed run failed ({attempt})\n{log[-2000:]}")
    seconds = time.perf_counter() - begin
    wanted, found, different = left(stage, out), [], set()
    for number in range(times):
        shutil.rmtree(out, ignore_errors=True)
        # what the trial before has left alive is not this one's
        found.append(trial(stage, shared, out, f"{out.name}-{number}", rng.uniform(0, seconds)))
        names = {n for n in wanted if found[-1]["left"].get(n) != wanted[n]}
        different |= names | (found[-1]["left"].keys() - wanted)
        print(f"  {stage} {number}: {found[-1]['before']} before, {len(names)} differ", flush=True)
    for name in sorted(different):
        print(f"  {stage}: {name} is not the same")
    return {
        "stage": stage, "seconds": round(seconds, 1), "files": len(wanted), "kills": times,
        "resumed": sum(not part["status"] for part in found),
        "same bytes": sum(part["left"] == wanted for part in found),
        "files at the kill, median": int(np.median([part["before"] for part in found])),
        "outlived by, s": round(max(part["outlived"] for part in found), 1),
    }  # fmt: skip


def main():
    """Run the stages that are named, by default all but the whole run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(LEAVES)}")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return STAGES[options.stages[0]](*map(Path, options.child))
    rng, rows = np.random.default_rng(options.seed), []
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        for stage in options.stages or STAGES:
            rows.append(measure(stage, options.times, Path(folder), rng))
            print(pd.DataFrame(rows).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
