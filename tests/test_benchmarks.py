"""The runner of the benchmarks: it names every row, and says of each whether it is met."""

import re
import subprocess
import sys

from soundscapes_utils import store

ROOT = store.project_root()
ROWS = ["P1a", "P1b", "P1c", "P1d", "P1e", "P2", "P3", "P5", "P6", "P7", "P8", "P9"]


def called(*words):
    command = [sys.executable, str(ROOT / "benchmarks" / "all.py"), *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_row_is_named_and_stands_in_a_script():
    listed = called("--list").stdout
    assert re.findall(r"^P\w+", listed, re.MULTILINE) == ROWS
    assert "unknown rows" in called("P4").stderr


def test_a_row_is_measured_in_a_process_of_its_own_and_kept(tmp_path):
    out = tmp_path / "table"
    done = called("P9", "--quick", "--dir", str(tmp_path), "--out", str(out))
    assert done.returncode == 0, done.stderr
    table = store.read_table(f"{out}.csv", as_text=True)
    assert table["what"].tolist() == ["soundscapes --help", "soundscapes run --help"]
    assert set(table["met"]) == {"not judged"} and (table["ours"].astype(float) > 0).all()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
