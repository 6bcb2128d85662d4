"""The README: its length, its links, and its recipes, run as they stand but in small."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from soundscapes_utils import audio, datasets, pipeline, store

ROOT = store.project_root(Path(__file__).parent)
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = TEXT.partition("## Recipes")[2].partition("\n## ")[0]
SMALL = {"-n 2000": "-n 5", "-n 20": "-n 3", "steps: 300": "steps: 2"}
SMALL["soundscapes "] = f"{sys.executable} -m soundscapes_utils "


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", RECIPES, re.DOTALL)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what the recipes speak of: sounds, scenes, captions, a configuration."""
    desk = tmp_path_factory.mktemp("desk")
    for folder, labels in (("sounds", ["dog", "rooster"]), ("scenes", ["park", "bus"])):
        for label in labels:
            for number in range(10):
                rng = np.random.default_rng([len(label), number])
                path = desk / folder / label / f"{label}{number:02d}-{number}.wav"
                audio.save_audio(path, 0.1 * rng.standard_normal(16_000 * 11), 16_000)
    clips = datasets.load_folder(desk / "sounds")
    table = pd.DataFrame({"path": [os.path.relpath(path, desk) for path in clips["path"]]})
    store.write_table(table.assign(caption="a " + clips["label"]), desk / "captions.csv")
    (configuration,) = blocks("yaml")
    (desk / "train.yaml").write_text(in_small(configuration))
    return desk


def in_small(text):
    for large, small in SMALL.items():
        text = text.replace(large, small)
    return text


def test_recipes_run_as_they_stand(desk):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ran = 0
    for block in blocks("bash"):
        if "run_all.sh" not in block:
            words = ["bash", "-euc", in_small(block)]
            done = subprocess.run(words, cwd=desk, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
            ran += 1
    assert ran >= 3
    for left in ("mixes/mixes.csv", "mixes/listen/index.html", "clips/generated.csv", "tuned"):
        assert (desk / left).exists(), left


def test_calls_of_the_runner_name_what_there_is(desk, monkeypatch):
    monkeypatch.chdir(desk)
    calls = re.findall(r"\./run_all\.sh ([a-z0-9-].*)", re.sub(r"[`;,)].*| +#.*", "", TEXT, flags=re.M))
    others = {"setup", "test", "report", "profiles", "site"}
    for words in map(str.split, calls):
        if words[0] in others or words[0].startswith("-"):
            continue
        given = dict(zip(words[2::3], words[3::3], strict=False)) if "-p" in words else {}
        given = {name: value for name, value in given.items() if "my_module" not in value}
        assert pipeline.resolve_parameters(words[0], given, ROOT)


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(TEXT.split()) <= 1200
    for target in re.findall(r"\]\(([^)#\s]+)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for rows in re.findall(r"## What was found.*?((?:\|[^\n]*\n)+)", TEXT, re.DOTALL):
        assert rows.count("\n") <= 8, "at most six rows below the head"
