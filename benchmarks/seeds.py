"""Seeds: one profile run from several of them, and what comes out of all that is trained.

What is finished is kept, so the same command goes on after a stop. Tables are printed in Markdown:
of each figure the mean over the seeds, its standard deviation (n − 1), the least and the largest.

    python benchmarks/seeds.py quick
    python benchmarks/seeds.py esc10 -p esc50_root FOLDER --seeds 0 1 2 3 4
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from soundscapes_utils import pipeline, stats, store

# what is not a result but a cost
LEFT_OUT = "seconds|gigabytes"


def tables_of(folder, seed):
    """What the notebooks of one run have measured: one row a figure, its value in this seed."""
    found = []
    scores = store.read_table(folder / "tables" / "scores.csv")
    scores = scores[scores["reference"].str.contains("test mixes")]
    for kind, column in (("", "value"), (", floor", "floor")):
        names = scores["metric"] + kind + " (" + scores["embedding"] + ")"
        rows = {"table": "distances", "figure": names, "of": scores["candidate"]}
        found.append(pd.DataFrame(rows).assign(value=scores[column], n=scores["n_candidate"]))
    for number in ("02", "03"):
        summary = store.read_table(folder / "tables" / f"{number}_summary.csv")
        value = pd.to_numeric(summary["value"], errors="coerce")
        kept = value.notna() & ~summary["quantity"].str.contains(LEFT_OUT)
        rows = {"table": f"notebook {number}", "figure": summary["quantity"], "of": summary["note"]}
        found.append(pd.DataFrame(rows).assign(value=value, of="", n=pd.NA)[kept])
    predictions = store.read_table(folder / "tables" / "predictions.csv")
    accuracy = stats.intervals(predictions).set_index(["model", "arm", "ratio"])
    for (model, arm, ratio), row in accuracy.iterrows():
        name, real = stats.arm_name(arm, ratio), accuracy.loc[(model, "real", 0.0), "accuracy"]
        gain = {"figure": f"{name} less real", "value": row["accuracy"] - real}
        for cells in [{"figure": name, "value": row["accuracy"]}] + [gain] * (arm != "real"):
            rows = {"table": "accuracy", "of": model, "n": int(row["n_clips"])} | cells
            found.append(pd.DataFrame([rows]))
    return pd.concat(found, ignore_index=True).assign(seed=seed)


def spread(table):
    """Mean, standard deviation, least and largest over the seeds of each figure."""
    grouped = table.groupby(["table", "figure", "of"], sort=False)
    found = grouped["value"].agg(["mean", "std", "min", "max"]).join(grouped["n"].max())
    found["seeds"] = grouped.size()
    found["above 0"] = grouped["value"].agg(lambda part: int((part > 0).sum()))
    return found.reset_index()


def markdown(table):
    """Write a table as Markdown."""
    cells = [list(table), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def main():
    """Run the profile from every seed and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    wanted = parser.parse_args()
    parts = []
    for seed in wanted.seeds:
        given = dict(wanted.p) | {"seed": str(seed)}
        parts.append(
            tables_of(pipeline.run(wanted.profile, given, name=f"{wanted.profile}-seed{seed}"), seed)
        )
    for name, part in spread(pd.concat(parts)).groupby("table", sort=False):
        part = part.drop(columns="table").round(3).replace({pd.NA: ""})
        if not part["figure"].str.contains("less real").any():
            part = part.drop(columns="above 0")
        print(f"\n{name}, profile {wanted.profile}, seeds {wanted.seeds}\n\n{markdown(part)}")


if __name__ == "__main__":
    main()
