"""Row P8 of `all.py`: how time and memory grow with the rows, every stage and size in a fresh process.

Sounds are tiny, so that what is measured is what a row costs beside its sound. Seconds are those of the
stage alone; memory is the peak of its whole process, libraries and table included.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from soundscapes_utils import embeddings, generation, metadata, mixing, report, store

sys.path.insert(0, str(Path(__file__).parent))
from mixing import make_clips

RATE, SECONDS, MILLION = 8_000, 0.05, 1_000_000
SIZES, QUICK = (1_000, 10_000, 100_000), (100, 200, 400)


class Stub:
    """A model that takes no time."""

    name = checkpoint = "stub"
    sample_rate, settings = RATE, {}

    def generate(self, prompts, seeds, duration_s, negative_prompts=None):
        """One short noise a prompt."""
        n = round(duration_s * RATE)
        return [np.random.default_rng(seed).uniform(-0.5, 0.5, n).astype(np.float32) for seed in seeds]


def level(y):
    """A trivial embedding."""
    return np.array([y.mean(), y.std(), y.min(), y.max()], np.float32)


def planned(n, work):
    """Plan mixes of 50 events and 50 scenes."""
    tables = [make_clips(work / kind, 50, SECONDS, rate=RATE) for kind in ("event", "scene")]
    yield
    mixes = mixing.plan_mixes(*tables, n, duration_s=SECONDS, sample_rate=RATE)
    yield
    mixes.to_pickle(work / f"plan-{n}")


def rendered(n, work):
    """Render them in one process; called again there is nothing to do."""
    mixes = pd.read_pickle(work / f"plan-{n}")
    yield
    made = mixing.render_mixes(mixes, work / f"mixes-{n}", RATE, workers=1)
    yield
    made[["clip_id", "path"]].to_pickle(work / f"made-{n}")


def embedded(n, work):
    """Embed the mixes; called again all of them are in the cache."""
    paths = pd.read_pickle(work / f"made-{n}")["path"].tolist()
    trivial = embeddings.Embedding("trivial", RATE, 4, SECONDS, "1", level)
    yield
    trivial.embed(paths, cache_dir=work / f"cache-{n}", silence="allow")
    yield


def generated(n, work):
    """Generate clips with a model that takes no time; called again all are there."""
    plan = generation.plan_clips([f"thing {i}" for i in range(10)], n // 10, duration_s=SECONDS)
    yield
    made = generation.generate_clips(plan, Stub(), work / f"clips-{n}")
    yield
    store.write_table(made, work / f"clips-{n}" / "generated.csv")


def reported(n, work):
    """Make the page of the generated clips, at most 24 a class."""
    yield
    report.page_of(work / f"clips-{n}")
    yield


def validated(n, work):
    """Plan, look for leaks, and take the table through the door of the renderer, without any sound."""
    tables = [make_clips(work / kind, 50, SECONDS, rate=RATE) for kind in ("event", "scene")]
    yield
    mixes = mixing.plan_mixes(*tables, n, duration_s=SECONDS, sample_rate=RATE)
    metadata.check_leaks(mixes)
    # a share that no mix falls into: all rows are checked, none is rendered
    mixing.render_mixes(mixes, work / "none", RATE, shard=f"{n}/{n}")
    yield


STAGES = {
    "plan": planned, "render": rendered, "resume": rendered, "embed": embedded,
    "embed, from the cache": embedded, "generate": generated, "generate, all there": generated,
    "report": reported,
}  # fmt: skip


def measured(function, n, work):
    """Seconds and MB of a stage in a fresh process."""
    command = [sys.executable, __file__, function.__name__, str(n), str(work)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def p8(work, quick, options):
    """Growth of every stage; a million rows planned and checked."""
    sizes = QUICK if quick else SIZES
    for name, function in STAGES.items():
        seconds, peaks = zip(*(measured(function, n, work) for n in sizes), strict=True)
        # of the last decade: what a start costs would hide what a row costs
        power = np.polyfit(np.log(sizes[-2:]), np.log(seconds[-2:]), 1)[0]
        note = (
            f"{' / '.join(f'{s:.3g}' for s in seconds)} s; {1e6 * seconds[-1] / sizes[-1]:.0f} µs a row"
        )
        row = {"what": f"{name}: time", "ours": power, "unit": "exponent", "note": note}
        yield row | {"most": np.log10(11)}  # a tenth more than ten times
        power = np.polyfit(np.log(sizes), np.log(peaks), 1)[0]
        each = 1e3 * (peaks[-1] - peaks[0]) / (sizes[-1] - sizes[0])
        note = f"{' / '.join(f'{mb:.0f}' for mb in peaks)} MB; {each:.2f} kB a row"
        row = {"what": f"{name}: memory", "ours": power, "unit": "exponent", "note": note}
        yield row | {"most": 0.1}  # a hundred times the rows in 1.6 times the memory
    n = 3_000 if quick else MILLION
    seconds, peak = measured(validated, n, work)
    what = f"{n:,} rows planned and validated"
    yield {"what": f"{what}: time", "ours": seconds / 60, "unit": "min", "most": 10}
    yield {"what": f"{what}: memory", "ours": peak / 1e3, "unit": "GB", "most": 1}


ROWS = {"P8": p8}


def main(name, n, work):
    """Measure one stage in this process."""
    stage = globals()[name](int(n), Path(work))
    next(stage)
    started = time.perf_counter()
    next(stage)
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    list(stage)
    print(json.dumps([seconds, peak * (1 if sys.platform == "darwin" else 1024) / 1e6]))


if __name__ == "__main__":
    main(*sys.argv[1:])
