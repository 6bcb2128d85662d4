"""Do the statistics hold where the truth is known? False-positive rates, coverages, null KAD.

Everything is simulated, so the truth is known: equal distributions, arms without a difference, a true
mean. A row per setting: the rate with its own 95 % interval (Wilson's; of a mean, Student's), and
whether it keeps the limits: "yes"; "no"; "within error" where it does not, but its interval reaches
them. Limits: false positives at most 6 % at 5 %; coverage 93 to 97 %; mean KAD of equal distributions
within ± 0.1. Rows "for comparison" show what the package does not do, or does only when asked.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --quick
    python benchmarks/calibration.py tests --simulations 4000

kad
    Real against real where a recording gives several rows, which correlate: value, floor, interval.
tests
    Two arms without a difference on 80 clips of 57 recordings in ten classes, as in ESC-10's fold 5.
    Recordings differ in difficulty and suit one arm or the other (SD 0.5 logit); every training moves
    each class by 0, 0.5 or 1 logit. Of one training, all clips of a recording get the same answer.
    Power: the second arm is better by 0.7 logit.
intervals
    Means of few normal values.
"""

import argparse

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from scipy.stats import t as student

from soundscapes_utils import fad, stats

FALSE_POSITIVES, COVERAGE, NULL_KAD = (0.0, 0.06), (0.93, 0.97), (-0.1, 0.1)


def row(setting, what, values, limits):
    """A row of the table: a rate of what is true or false, or a mean of numbers."""
    values = np.asarray(values)
    mean, n = values.mean(), len(values)
    if values.dtype == bool:
        low, high = binomtest(int(values.sum()), n).proportion_ci(method="wilson")
    else:
        low, high = mean + student.ppf([0.025, 0.975], n - 1) * values.std(ddof=1) / np.sqrt(n)
    verdict = ""
    if limits:
        apart = high < limits[0] or low > limits[1]
        verdict = "yes" if limits[0] <= mean <= limits[1] else "no" if apart else "within error"
    numbers = {"rate": round(mean, 3), "low": round(low, 3), "high": round(high, 3)}
    limits = f"{limits[0]:g} to {limits[1]:g}" if limits else ""
    return {"setting": setting, "what": what, "n": n} | numbers | {"limits": limits, "keeps": verdict}


# --- KAD ------------------------------------------------------------------------------------------


def recordings(rng, n, each, dim=8, alike=0.5):
    """Rows [n · each, dim], standard normal; those of one recording correlate by `alike`."""
    shared = np.repeat(rng.normal(size=(n, dim)), each, axis=0)
    return np.sqrt(alike) * shared + np.sqrt(1 - alike) * rng.normal(size=(n * each, dim))


def kad(n):
    """Real against real, and the intervals of equal and of unequal sets."""
    rows = []
    for name, clips, each, dim, alike in (
        ("24 recordings × 2 clips", 24, 2, 8, 0.5),
        ("30 clips × 10 windows", 30, 10, 64, 0.8),
        ("12 clips × 10 windows", 12, 10, 64, 0.8),
    ):
        groups, values, floors = np.arange(clips * each) // each, [], []
        for i in range(n):
            rng = np.random.default_rng([clips, i])
            x, y = (recordings(rng, clips, each, dim, alike) for _ in range(2))
            values.append(fad.kernel_distance(x, y, groups_x=groups, groups_y=groups))
            if each == 2:
                metric = fad.METRICS["KAD"]
                floors.append(fad.noise_floor(x, 16, 10, i, metric=metric, groups=groups).mean())
        rows.append(row(name, "null KAD", values, NULL_KAD))
        if floors:
            rows.append(row(f"{name}, floor of 16", "null KAD", floors, NULL_KAD))
    # of other distances the truth is the mean over many draws
    return rows + [
        line
        for metric, shift in (("KAD", 0.0), ("KAD", 1.0), ("FAD", 1.0))
        for line in distance_interval(metric, shift, max(4, n // 2))
    ]


def distance_interval(metric, shift, n):
    """How often a score table's interval holds the mean score, 24 recordings × 2 clips a side."""
    groups = {"real": np.arange(48) // 2, "made": np.arange(48) // 2}
    found = []
    for i in range(n):
        rng = np.random.default_rng([48, i])
        x, made = recordings(rng, 24, 2), recordings(rng, 24, 2) + shift
        table = fad.score_table(
            x, {"made": made}, embedding="", metrics=[metric], groups=groups, repeats=100, seed=i
        )
        found.append(table.loc[0, ["value", "ci_low", "ci_high"]].to_numpy(dtype=float))
    value, low, high = np.array(found).T
    truth = value.mean() if shift else 0.0
    name = f"{metric} interval, sets {shift:g} SD apart"
    limits = COVERAGE if shift else (COVERAGE[0], 1.0)  # a jackknife of like sets is too wide
    yield row(name, "coverage", (low <= truth) & (truth <= high), limits)


# --- tests ----------------------------------------------------------------------------------------


def predictions(rng, runs, scatter, better=0.0, classes=10, sources=57, clips=80):
    """Predictions of two arms, whose trainings scatter, and the recording of every clip."""
    source = np.concatenate([np.arange(sources), rng.integers(0, sources, clips - sources)])
    label = source % classes
    table = pd.DataFrame({"clip_id": np.arange(clips), "source_id": source, "fold": 5})
    table["label"] = label.astype(str)
    difficulty = rng.normal(0, 1.5, sources) + rng.normal(0, 0.5, classes)[np.arange(sources) % classes]
    parts = []
    for arm, ratio, gain in (("real", 0.0, 0.0), ("both", 1.0, better)):
        suits = 1.0 + gain + difficulty + rng.normal(0, 0.5, sources)
        for run in range(runs):
            chance = 1 / (1 + np.exp(-suits[source] - rng.normal(0, scatter, classes)[label]))
            drawn = rng.random(sources)[source] if runs == 1 else rng.random(clips)
            said = np.where(drawn < chance, table["label"], "none")
            parts.append(table.assign(arm=arm, ratio=ratio, model="cnn", run=run, predicted=said))
    return pd.concat(parts, ignore_index=True)


def tests(n):
    """Tests of arms at 5 %: by clips and by recordings, by one training and by several."""
    rows, single = [], {"clips": [], "recordings": []}
    for i in range(n):
        table = predictions(np.random.default_rng([1, i]), 1, 0.0)
        p = {"recordings": stats.compare(table), "clips": stats.compare(table, by="clip")}
        p = {name: found["p_value"].item() for name, found in p.items()}
        for name, value in p.items():
            single[name].append(value <= 0.05)
    kind = "false positives"
    rows.append(row("one training, recordings", kind, single["recordings"], FALSE_POSITIVES))
    rows.append(row("one training, clips: for comparison", kind, single["clips"], None))
    for runs, scatter in ((3, 0.0), (3, 0.5), (3, 1.0), (2, 1.0), (5, 1.0)):
        rows += several_trainings(n, runs, scatter)
    return rows


def several_trainings(n, runs, scatter):
    """False positives, coverage and power of the tests over recordings and trainings."""
    wrong, covers, power, given, classes = [], [], [], [], []
    for i in range(n):
        table = predictions(np.random.default_rng([2, i]), runs, scatter)
        found = stats.compare(table).iloc[0]
        wrong.append(found["p_value"] <= 0.05)
        covers.append(found["ci_low"] <= 0 <= found["ci_high"])
        sides = table.assign(right=table["label"] == table["predicted"])
        sides = sides.pivot_table("right", "source_id", "arm")
        given.append(stats.paired_test(sides["both"], sides["real"])["p_value"] <= 0.05)
        better = predictions(np.random.default_rng([3, i]), runs, scatter, 0.7)
        power.append(stats.compare(better).loc[0, "p_value"] <= 0.05)
        if i < n // 4:
            classes += list(stats.class_deltas(table, "both:1", "cnn")["p_value"] <= 0.05)
    name = f"{runs} trainings, scatter {scatter:g}"
    return [
        row(name, "false positives", wrong, FALSE_POSITIVES),
        row(f"{name}, a class", "false positives", classes, FALSE_POSITIVES),
        row(name, "coverage", covers, COVERAGE),
        row(f"{name}, given these: for comparison", "false positives", given, None),
        row(f"{name}, 0.7 logit better", "power", power, None),
    ]


# --- intervals ------------------------------------------------------------------------------------


def intervals(n):
    """Intervals of a mean of few values: of a study's accuracies, and of paired differences."""
    rows = []
    blank = dict.fromkeys(["ratio", "fold", "n_real", "n_synthetic", "macro_f1", "steps"], 0)
    blank |= {"arm": "real", "model": "cnn", "backend": "", "prompt_family": ""}
    for size in (3, 5, 10, 20, 40):
        accuracy, covers, paired = [], [], []
        for i in range(n):
            values = np.random.default_rng([size, i]).normal(0.5, 0.03, size)
            results = pd.DataFrame({"accuracy": values, "run": range(size)}).assign(**blank)
            found = stats.summarise(results).iloc[0]
            accuracy.append(found["ci_low"] <= 0.5 <= found["ci_high"])
            covers.append(abs(found["accuracy"] - 0.5) <= found["half_width"])
            test = stats.paired_test(values, np.full(size, 0.5), n=100, seed=i)
            paired.append(test["ci_low"] <= 0 <= test["ci_high"])
        rows.append(row(f"summarise, {size} classifiers", "coverage", accuracy, COVERAGE))
        rows.append(row(f"paired_test, {size} pairs", "coverage", paired, COVERAGE))
        rows.append(row(f"1.96·SD/√runs of {size}: for comparison", "coverage", covers, None))
    return rows


SECTIONS = {"kad": kad, "tests": tests, "intervals": intervals}


def calibrate(sections, n):
    """The table of the sections asked for, `n` simulations a setting."""
    return pd.DataFrame([line for name in sections for line in SECTIONS[name](n)])


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="section", default=list(SECTIONS))
    parser.add_argument("--simulations", type=int, default=400, help="per setting")
    parser.add_argument("--quick", action="store_true", help="30 simulations, some seconds")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"unknown sections {sorted(unknown)}; there are: {', '.join(SECTIONS)}")
    for name in options.sections:
        table = calibrate([name], 30 if options.quick else options.simulations)
        print(table.to_string(index=False), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
