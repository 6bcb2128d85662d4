"""Write the golden values: ``python tests/golden/freeze.py [part …]``; without a part, all.

What is frozen is the behaviour of the package before it was rewritten. Freeze anew only what a
change was meant to change, and say so where the change is described.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import golden_recipes  # noqa: E402

import soundscapes_utils  # noqa: E402


def main(names):
    print("package:", soundscapes_utils.__file__)
    for name in names or golden_recipes.PARTS:
        begin = time.time()
        with tempfile.TemporaryDirectory() as folder, golden_recipes.one_thread():
            found = golden_recipes.PARTS[name](Path(folder))
        text = json.dumps(found, ensure_ascii=False, allow_nan=False)
        text = text.replace("}, ", "},\n").replace("], ", "],\n").replace('", "', '",\n"')
        assert json.loads(text) == found, "no plain data"
        (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(f"{name}: {len(text)} bytes, {time.time() - begin:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
