"""Seeds: one profile run from several of them, and what comes out of all that is trained.

What is finished is kept, so the same command goes on after a stop. Tables are printed in Markdown:
of each figure the mean over the seeds, its 95 % interval (Student's t), the standard deviation (n − 1),
the least and the largest. Of what is changed, by fine-tuning or by synthetic clips, the change too.

    python benchmarks/seeds.py quick
    python benchmarks/seeds.py esc10 -p esc50_root FOLDER --seeds 0 1 2 3 4
"""

import argparse
import sys
from pathlib import Path

import numpy as np
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
    wide = scores.pivot_table("value", ["metric", "embedding"], "candidate")
    change = (wide["finetuned"] - wide[scores["candidate"].iloc[0]]).dropna().reset_index(name="value")
    names = change["metric"] + ", change by fine-tuning (" + change["embedding"] + ")"
    rows = {"table": "distances", "figure": names, "of": "finetuned", "value": change["value"]}
    found.append(pd.DataFrame(rows).assign(n=pd.NA))
    for number in ("02", "03"):
        summary = store.read_table(folder / "tables" / f"{number}_summary.csv")
        value = pd.to_numeric(summary["value"], errors="coerce")
        kept = value.notna() & ~summary["quantity"].str.contains(LEFT_OUT)
        rows = {"table": f"notebook {number}", "figure": summary["quantity"], "of": summary["note"]}
        found.append(pd.DataFrame(rows).assign(value=value, of="", n=pd.NA)[kept])
    fit = summary.set_index("quantity")["value"]
    after, before = (float(fit[f"caption and sound: {when}"]) for when in ("after", "before"))
    rows = {"figure": "caption and sound: change", "of": "", "value": after - before, "n": pd.NA}
    found.append(pd.DataFrame([{"table": "notebook 03"} | rows]))
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
    """Mean with its interval, standard deviation, least and largest over the seeds of each figure."""
    grouped = table.groupby(["table", "figure", "of"], sort=False)
    found = grouped["value"].agg(["mean", "std", "min", "max"]).join(grouped["n"].max())
    ends = grouped["value"].agg(
        lambda part: stats.bootstrap_ci(part) if len(part) > 1 else (np.nan,) * 2
    )
    found.insert(1, "low", ends.str[0])
    found.insert(2, "high", ends.str[1])
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
        if not part["figure"].str.contains("less real|change").any():
            part = part.drop(columns="above 0")
        print(f"\n{name}, profile {wanted.profile}, seeds {wanted.seeds}\n\n{markdown(part)}")


if __name__ == "__main__":
    main()
