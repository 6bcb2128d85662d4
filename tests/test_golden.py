"""What the package did before it was rewritten, it does still: see ``golden_recipes.py``."""

import json
import math
from pathlib import Path

import golden_recipes
import pytest

GOLDEN = Path(__file__).parent / "golden"


def golden(part):
    return json.loads((GOLDEN / f"{part}.json").read_text(encoding="utf-8"))


def differences(found, frozen, rtol=0.0, atol=0.0, place=""):
    """Every place where two structures of plain data differ by more than the tolerance."""
    if isinstance(frozen, dict) and isinstance(found, dict):
        for key in frozen.keys() | found.keys():
            if key not in found or key not in frozen:
                yield f"{place}/{key}: only {'frozen' if key in frozen else 'found'}"
            else:
                yield from differences(found[key], frozen[key], rtol, atol, f"{place}/{key}")
    elif isinstance(frozen, list) and isinstance(found, list):
        if len(frozen) != len(found):
            yield f"{place}: {len(found)} found, {len(frozen)} frozen"
        for i, pair in enumerate(zip(found, frozen, strict=False)):
            yield from differences(*pair, rtol, atol, f"{place}/{i}")
    elif isinstance(frozen, float) and isinstance(found, (int, float)):
        if not (found == frozen or math.isclose(found, frozen, rel_tol=rtol, abs_tol=atol)):
            yield f"{place}: {found!r} found, {frozen!r} frozen"
    elif found != frozen:
        yield f"{place}: {found!r} found, {frozen!r} frozen"


def assert_same(found, frozen, rtol=0.0, atol=0.0):
    wrong = sorted(differences(found, frozen, rtol, atol))
    assert not wrong, f"{len(wrong)} differences, such as\n" + "\n".join(wrong[:20])


def without(part, *names):
    return {key: value for key, value in part.items() if key not in names}


def only(part, *names):
    return {key: part[key] for key in names}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with golden_recipes.one_thread():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # one folder for all: the built-in sounds are made once
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module")
def found(folder):
    """What a part gives now, computed once."""
    kept = {}

    def compute(part):
        if part not in kept:
            kept[part] = golden_recipes.PARTS[part](folder)
        return kept[part]

    return compute


@pytest.fixture(scope="module")
def config(folder):
    return golden_recipes.tiny_start(folder)


# --- the comparison itself ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part", ["mixes", "captions", "clips", "finetuning", "scores", "challenge", "study"]
)
def test_one_changed_value_is_noticed(part):
    frozen, changed = golden(part), golden(part)
    place = changed
    while isinstance(place, (dict, list)):
        before, key = place, (sorted(place)[-1] if isinstance(place, dict) else -1)
        place = place[key]
    before[key] = place + "." if isinstance(place, str) else (place or 1) * 1.01
    assert not list(differences(frozen, frozen))
    assert len(list(differences(changed, frozen, rtol=1e-3))) == 1


# --- what was frozen ------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", golden_recipes.PLANS)
@pytest.mark.parametrize("what", ["recipes", "events", "numpy", "pydub"])
def test_mixes(found, plan, what):
    assert_same(found("mixes")[plan][what], golden("mixes")[plan][what])


def test_captions_and_prompts(found):
    assert_same(found("captions"), golden("captions"))


def test_plan_and_files_of_generated_clips(found):
    frozen = golden("clips")
    assert_same(without(found("clips"), "levels"), without(frozen, "levels"))


def test_sound_of_generated_clips(found):
    # of the peak: the last bits depend on the machine
    assert_same(found("clips")["levels"], golden("clips")["levels"], atol=1e-4)


# Norms of gradients are sums of many roundings, which differ from machine to machine.
ROUNDED = ("grad_norm",)


def assert_same_log(log, frozen, rtol, rounded_rtol):
    assert_same(without(log, *ROUNDED), without(frozen, *ROUNDED), rtol=rtol)
    assert_same(only(log, *ROUNDED), only(frozen, *ROUNDED), rtol=rounded_rtol)


@pytest.fixture(scope="module")
def whole(config):
    return golden_recipes.tuned(config)


def test_losses_of_fine_tuning(whole):
    assert_same_log(whole, golden("finetuning"), 1e-4, 1e-3)


def test_interrupted_fine_tuning_ends_as_the_unbroken_one(config, whole):
    assert_same(golden_recipes.tuned_after_a_kill(config), whole, atol=1e-6)


def test_two_processes_fine_tune_as_one(config, whole, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    both = without(golden_recipes.tuned_by_two(config), "best_step")
    rows = len(both["step"])
    assert rows == 3
    assert_same_log(both, {name: whole[name][:rows] for name in both}, 2e-6, 2e-5)


@pytest.mark.parametrize("what", ["halves", "outside", "frechet", "kernel"])
def test_scores(found, what):
    assert_same(found("scores")[what], golden("scores")[what], rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not golden_recipes.DCASE.exists(), reason="no DCASE 2024 Task 7 set here")
def test_floors_of_the_challenge(found):
    assert_same(found("challenge"), golden("challenge"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("what", ["results", "predictions"])
def test_study_of_classifiers(found, what):
    assert_same(found("study")[what], golden("study")[what])


def test_learning_curves_of_classifiers(found):
    assert_same(found("study")["curves"], golden("study")["curves"], rtol=1e-4)


@pytest.mark.parametrize("what", golden("statistics"))
def test_statistics(found, what):
    assert_same(found("statistics")[what], golden("statistics")[what], rtol=1e-9, atol=1e-12)
