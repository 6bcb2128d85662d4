import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_checkpoints
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import Tones

from soundscapes_utils import audio, generation, ldm
from soundscapes_utils.generation import GenerationError

PROMPTS = ["a dog", "a dog barking loudly", "rain", "a dog", "rain", "a dog"]
SEEDS = [11, 12, 13, 14, 15, 16]


def small_plan(n=3, labels=("dog", "rain")):
    return generation.plan_clips(list(labels), n, duration_s=0.25)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.wav")}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    makers = {name: getattr(tiny_checkpoints, name) for name in generation.BACKENDS}
    return {name: make(folder / name) for name, make in makers.items()}


@pytest.fixture(scope="module")
def backends(checkpoints):
    before = Path.cwd()
    os.chdir(checkpoints["audiogen"].parent)  # where audiocraft finds the tiny T5 by its name
    diffusion = {"steps": 3, "guidance_scale": 2.5, "device": "cpu"}
    options = {"audioldm": {**diffusion, "eta": 1.0}, "audioldm2": diffusion}
    options["audiogen"] = {"top_k": 8, "device": "cpu"}
    yield {
        name: generation.get_backend(name, checkpoint=checkpoints[name], **own)
        for name, own in options.items()
    }
    os.chdir(before)


# --- back-ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", generation.BACKENDS)
def test_a_clip_is_the_same_alone_in_a_batch_and_in_another_order(backends, name):
    backend = backends[name]
    together = backend.generate(PROMPTS, SEEDS, 0.5)
    backwards = backend.generate(PROMPTS[::-1], SEEDS[::-1], 0.5)[::-1]
    for i, y in enumerate(together):
        assert y.dtype == np.float32
        assert y.shape == (8000,)
        assert np.isfinite(y).all()
        np.testing.assert_array_equal(y, backwards[i])
        np.testing.assert_array_equal(y, backend.generate([PROMPTS[i]], [SEEDS[i]], 0.5)[0])
    assert not np.array_equal(together[0], together[3]), "the seed must matter"


@pytest.mark.parametrize("name", generation.BACKENDS)
def test_odd_durations_have_exactly_the_samples_asked_for(backends, name):
    # 4.1 s / 10 ms falls just short of 410 frames in floating point
    for duration_s in (0.33, 4.1):
        y = backends[name].generate(["rain"], [1], duration_s)[0]
        assert y.shape == (round(duration_s * 16_000),)
        assert np.abs(y[-100:]).max() > 0, "the end must be made, not filled up"


def test_audioldm_is_what_diffusers_makes_of_the_same_noise(backends, checkpoints):
    import torch

    ours = backends["audioldm"].generate(["a dog"], [11], 0.5, ["noise"])[0]
    reference = ldm.load_pipeline(checkpoints["audioldm"], "cpu")(
        "a dog",
        negative_prompt="noise",
        audio_length_in_s=0.5,
        num_inference_steps=3,
        guidance_scale=2.5,
        eta=1.0,
        generator=torch.Generator().manual_seed(11),
    ).audios[0]
    np.testing.assert_array_equal(ours, reference)


@pytest.mark.parametrize("name", generation.BACKENDS)
def test_passes_of_several_clips_differ_by_rounding_only(backends, name, monkeypatch):
    one = backends[name].generate(PROMPTS, SEEDS, 0.5)
    monkeypatch.setitem(backends[name].settings, "clips_per_pass", 4)
    four = backends[name].generate(PROMPTS, SEEDS, 0.5)
    np.testing.assert_allclose(np.stack(four), np.stack(one), atol=1e-3)


@pytest.mark.parametrize("name", ["audioldm", "audioldm2"])
def test_negative_prompt_reaches_the_model(backends, name):
    plain, negative = (backends[name].generate(["a dog"], [1], 0.5, [n])[0] for n in ("", "hiss"))
    assert not np.array_equal(plain, negative)


def test_audiogen_without_chance_is_what_audiocraft_makes(backends, checkpoints):
    greedy = generation.get_backend(
        "audiogen", checkpoint=checkpoints["audiogen"], top_k=1, device="cpu", clips_per_pass=2
    )
    prompts = ["a dog", "a cat"]
    ours = greedy.generate(prompts, [1, 2], 1.0)
    greedy.model.set_generation_params(use_sampling=False, duration=1.02, cfg_coef=3.0)
    reference = greedy.model.generate(prompts).numpy()[:, 0]
    np.testing.assert_array_equal(np.stack(ours), reference)


def test_audiogen_draws_tokens_with_their_probabilities(backends):
    import torch
    from audiocraft.utils import utils

    wanted = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    with generation._sample_by_row([3, 4]):
        # (rows, codebooks, tokens): 2 × 4000 draws
        drawn = utils.multinomial(wanted.expand(2, 4000, 5), num_samples=1)
    assert drawn.shape == (2, 4000, 1)
    seen = torch.bincount(drawn.flatten(), minlength=5) / 8000
    np.testing.assert_allclose(seen, wanted, atol=0.02)  # four standard deviations
    assert utils.multinomial.__module__ == "audiocraft.utils.utils", "must be put back"


def test_audiocraft_is_imported_without_laion_clap(tmp_path, monkeypatch):
    # stand-ins, because the real ones are imported once a process
    (tmp_path / "laion_clap.py").write_text("")
    code = "try:\n    import laion_clap\nexcept ImportError:\n    laion_clap = None\n"
    (tmp_path / "audiocraft.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("audiocraft", "laion_clap"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert generation.import_audiocraft().laion_clap is None
    import laion_clap

    assert laion_clap.__file__ == str(tmp_path / "laion_clap.py"), "importable again afterwards"
    monkeypatch.delitem(sys.modules, "audiocraft")
    assert generation.import_audiocraft().laion_clap is None
    assert sys.modules["laion_clap"] is laion_clap, "and left alone where it was there before"


@pytest.mark.skipif(
    not (ldm.EMBEDDED_CHECKPOINT / "model_index.json").is_file(),
    reason="the embedded checkpoint has not been made",
)
def test_embedded_checkpoint_makes_the_same_clip_alone_and_in_a_batch():
    backend = generation.get_backend("audioldm", steps=3, device="cpu")
    together = backend.generate(PROMPTS[:5], SEEDS[:5], 1.28)
    alone = backend.generate(PROMPTS[4:5], SEEDS[4:5], 1.28)[0]
    np.testing.assert_array_equal(together[4], alone)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("audiomagic", {}, "audioldm, audioldm2, audiogen"),
        ("audiogen", {"steps": 3}, "it takes .*top_k"),
        ("audioldm", {"clips_per_pass": 0}, "at least 1"),
        ("audioldm", {"dtype": "float8", "checkpoint": "cvssp/audioldm-s-full-v2"}, "float16"),
        ("audioldm2", {"checkpoint": "/no/such/folder"}, "/no/such/folder"),
        ("audiogen", {"checkpoint": "no/such-model"}, "no/such-model"),
    ],
)
def test_impossible_backends_are_refused_by_name(name, options, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(GenerationError, match=message):
        generation.get_backend(name, **options)


@pytest.mark.parametrize(
    ("prompts", "seeds", "duration_s", "message"),
    [
        (["a", "b"], [1], 1.0, "2 prompts, 1 seeds"),
        (["a", " "], [1, 2], 1.0, "a prompt is empty"),
        (["a"], [1], 0.0, "must be positive"),
        (["a"], [1], float("nan"), "must be positive"),
    ],
)
def test_impossible_requests_are_refused(backends, prompts, seeds, duration_s, message):
    with pytest.raises(GenerationError, match=message):
        backends["audioldm"].generate(prompts, seeds, duration_s)


def test_audiogen_refuses_a_negative_prompt(backends):
    with pytest.raises(GenerationError, match="no negative prompt"):
        backends["audiogen"].generate(["a dog"], [1], 0.5, ["hiss"])


# --- plans -------------------------------------------------------------------------------------


@given(st.text(), st.text(), st.text(), st.integers(0, 10**6), st.integers(0, 10**6))
def test_clip_seed_depends_on_every_part_of_the_identity(dataset, label, prompt, index, seed):
    own = generation.clip_seed(dataset, label, prompt, index, seed)
    assert 0 <= own < 2**32
    others = {
        generation.clip_seed(dataset + "x", label, prompt, index, seed),
        generation.clip_seed(dataset, label + "x", prompt, index, seed),
        generation.clip_seed(dataset, label, prompt + "x", index, seed),
        generation.clip_seed(dataset, label, prompt, index + 1, seed),
        generation.clip_seed(dataset, label, prompt, index, seed + 1),
    }
    assert own not in others


def test_clip_seed_does_not_confuse_its_parts():
    assert generation.clip_seed("a", "bc", "d", 0) != generation.clip_seed("ab", "c", "d", 0)


@pytest.mark.parametrize("family", ["simple", "varied", ["label", "gpt"]])
def test_a_longer_plan_contains_the_shorter_one(family):
    short = generation.plan_clips(["dog"], 3, family, duration_s=1.0)
    long = generation.plan_clips(["rain", "dog"], 40, family, duration_s=1.0)
    assert list(short.columns) == generation.PLAN_COLUMNS
    assert long.clip_id.is_unique
    both = short.merge(long, on=generation.PLAN_COLUMNS)
    assert len(both) == len(short)


def test_captions_of_mixes_become_a_plan():
    mixes = pd.DataFrame(
        {"mix_id": ["m1", "m2"], "foreground_label": ["dog", "rain"], "caption": ["same", "same"]}
    )
    plan = generation.plan_captions(mixes, duration_s=2.56)
    assert plan.clip_id.tolist() == ["m1", "m2"]
    assert plan.prompt.tolist() == ["same", "same"]
    assert plan.seed.nunique() == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.drop(columns="seed"), "lacks the columns seed"),
        (lambda plan: plan.iloc[:0], "no rows"),
        (lambda plan: pd.concat([plan, plan]), "dog-simple-0000.* twice"),
        (lambda plan: plan.assign(clip_id=["../x", *plan.clip_id[1:]]), "no file name"),
    ],
)
def test_bad_plans_are_refused_before_anything_is_made(tmp_path, change, message):
    backend = Tones()
    with pytest.raises(GenerationError, match=message):
        generation.generate_clips(change(small_plan()), backend, tmp_path)
    assert backend.asked == []


# --- batches -----------------------------------------------------------------------------------


def test_batch_size_order_and_shards_leave_the_files_alone(backends, tmp_path):
    backend, plan = backends["audioldm"], small_plan()
    generation.generate_clips(plan, backend, tmp_path / "one", batch_size=1)
    generation.generate_clips(plan[::-1], backend, tmp_path / "five", batch_size=5)
    for shard in range(2):
        generation.generate_clips(plan[shard::2], backend, tmp_path / "shards", batch_size=4)
    one = contents(tmp_path / "one")
    assert len(one) == 6
    assert one == contents(tmp_path / "five") == contents(tmp_path / "shards")
    whole = generation.generate_clips(plan, backend, tmp_path / "shards")
    assert whole.clip_id.tolist() == plan.clip_id.tolist()


def test_generated_table_describes_the_files(tmp_path):
    plan = small_plan()
    generated = generation.generate_clips(plan, Tones(), tmp_path)
    assert list(generated.columns) == generation.GENERATED_COLUMNS
    assert generated.score.isna().all()
    for row in generated.itertuples():
        y, rate = audio.load_audio(row.path)
        assert rate == row.sample_rate
        assert len(y) == round(row.duration_s * rate)
        assert 20 * np.log10(np.abs(y).max()) == pytest.approx(-1.0, abs=0.01)
        assert audio.loudness(y, rate) == pytest.approx(row.lufs, abs=0.02)


def test_tables_survive_a_csv_file(tmp_path):
    plan = small_plan()
    plan.to_csv(tmp_path / "plan.csv", index=False)
    generated = generation.generate_clips(pd.read_csv(tmp_path / "plan.csv"), Tones(), tmp_path)
    assert (generated.negative_prompt == "").all()
    again = Tones()
    generation.generate_clips(plan, again, tmp_path)
    assert again.asked == []
    generated.to_csv(tmp_path / "generated.csv", index=False)
    read_back = pd.read_csv(
        tmp_path / "generated.csv", keep_default_na=False, na_values={"score": ""}
    )
    assert read_back.seed.tolist() == plan.seed.tolist()
    assert read_back.lufs.tolist() == generated.lufs.tolist()


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    plan = small_plan(4)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        generation.generate_clips(plan, Tones(interrupt_at=4), tmp_path, batch_size=2)
    assert "4 of 8 clips are complete" in interrupt.value.__notes__[0]
    again = Tones()
    generated = generation.generate_clips(plan, again, tmp_path, batch_size=2)
    assert again.asked == plan.seed.tolist()[4:]
    assert len(generated) == 8
    third = Tones()
    generation.generate_clips(plan, third, tmp_path)
    assert third.asked == []


def test_a_killed_process_leaves_only_whole_clips(tmp_path):
    code = (
        "from tiny_checkpoints import Tones; from soundscapes_utils import generation as g;"
        "plan = g.plan_clips(['dog', 'rain'], 50, duration_s=0.25);"
        f"g.generate_clips(plan, Tones(pause=0.05), {str(tmp_path)!r}, batch_size=1)"
    )
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        deadline = time.monotonic() + 300  # only a bound for a loaded machine
        while len(contents(tmp_path)) < 3:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    made_before = len(contents(tmp_path))
    backend, plan = Tones(), small_plan(50)
    generated = generation.generate_clips(plan, backend, tmp_path)
    assert made_before < 100
    assert 100 - made_before <= len(backend.asked) <= 101 - made_before
    assert all(len(audio.load_audio(path)[0]) == 2000 for path in generated.path)


def test_damage_is_repaired(tmp_path):
    plan = small_plan()
    generation.generate_clips(plan, Tones(), tmp_path)
    whole = contents(tmp_path)
    cut, gone, *_ = sorted(tmp_path.glob("*.wav"))
    cut.write_bytes(cut.read_bytes()[:100])
    gone.unlink()
    manifest = tmp_path / generation.MANIFEST
    # a line cut short, as by a kill: the last clip is unknown to the manifest
    manifest.write_text(manifest.read_text()[:-30])
    backend = Tones()
    generation.generate_clips(plan, backend, tmp_path)
    assert len(backend.asked) == 3
    assert contents(tmp_path) == whole
    last = Tones()
    generation.generate_clips(plan, last, tmp_path)
    assert last.asked == []


def test_other_settings_and_other_weights_are_other_clips(checkpoints, tmp_path):
    plan = small_plan(1, ["dog"])
    first, other_steps = Tones(), Tones()
    other_steps.settings = {"steps": 2}
    generation.generate_clips(plan, first, tmp_path)
    generation.generate_clips(plan, other_steps, tmp_path)
    assert other_steps.asked == plan.seed.tolist()
    assert len(contents(tmp_path)) == 2

    folder = tmp_path / "retrained"
    for seed in (0, 1):
        tiny_checkpoints.audioldm(folder, seed=seed)
        backend = generation.get_backend("audioldm", checkpoint=folder, steps=1, device="cpu")
        generation.generate_clips(plan, backend, tmp_path / "same name")
    assert backend.checkpoint == "retrained"
    assert len(contents(tmp_path / "same name")) == 2


def test_useless_outputs_are_set_aside_and_made_again(tmp_path):
    plan = small_plan(2, ["dog"])
    silent, broken = plan.seed
    backend = Tones(bad={silent: 1e-4, broken: np.nan, broken + 1: np.nan})
    generated = generation.generate_clips(plan, backend, tmp_path)
    assert generated.seed.tolist() == [silent + 1, broken + 2]
    rejected = generation.rejected_clips(tmp_path)
    assert list(rejected.columns) == generation.REJECTED_COLUMNS
    assert dict(zip(rejected.seed, rejected.reason, strict=True)) == {
        silent: "silent",
        broken: "not finite",
        broken + 1: "not finite",
    }
    again = Tones()
    assert generation.generate_clips(plan, again, tmp_path).equals(generated)
    assert again.asked == []


def test_clips_that_never_succeed_are_reported(tmp_path):
    plan = small_plan(2, ["dog"])
    bad = {int(plan.seed[1]) + k: 0.0 for k in range(2)}
    with pytest.warns(UserWarning, match=r"1 of 2 clips .*dog-simple-0001"):
        generated = generation.generate_clips(plan, Tones(bad=bad), tmp_path, max_attempts=2)
    assert generated.clip_id.tolist() == ["dog-simple-0000"]
    with pytest.raises(GenerationError, match="Check the checkpoint"):
        generation.generate_clips(plan[1:], Tones(bad=bad), tmp_path, max_attempts=2)


def test_a_constant_offset_counts_as_silence():
    assert generation._fault(np.full(100, 0.7, np.float32)) == "silent"
    assert generation._fault(np.array([0.7, 0.71], np.float32)) == ""


def test_a_full_disk_is_named_and_loses_nothing(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(audio.AudioError, match=r"dog-simple-0000.*No space left"):
            generation.generate_clips(small_plan(), Tones(), tmp_path)
    assert len(generation.generate_clips(small_plan(), Tones(), tmp_path)) == 6


def test_a_manifest_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / generation.MANIFEST).mkdir()
    with pytest.raises(GenerationError, match=r"manifest.jsonl: cannot be written"):
        generation.generate_clips(small_plan(), Tones(), tmp_path)


def test_manifest_lines_are_plain_json(tmp_path):
    generation.generate_clips(small_plan(), Tones(), tmp_path)
    lines = (tmp_path / generation.MANIFEST).read_text().splitlines()
    assert [json.loads(line)["clip_id"] for line in lines if line] == small_plan().clip_id.tolist()
