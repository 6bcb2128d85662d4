import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import types
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
THREE = ["a dog", "rain", "a dog barking loudly"]
HALF_TOLERANCE = 0.05  # of full scale, by the size of the pass
# float16 takes a processor ten times as long for Stable Audio's convolutions
HALF = [
    ("audioldm", "float16"),
    ("audioldm", "bfloat16"),
    ("audioldm2", "float16"),
    ("stable-audio", "bfloat16"),
    ("auto", "bfloat16"),
]


def small_plan(n=3, labels=("dog", "rain")):
    return generation.plan_clips(list(labels), n, duration_s=0.25)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.wav")}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    makers = {name: name.replace("-", "_") for name in generation.BACKENDS} | {"auto": "longcat"}
    return {name: getattr(tiny_checkpoints, own)(folder / name) for name, own in makers.items()}


@pytest.fixture(scope="module")
def backends(checkpoints):
    before = Path.cwd()
    os.chdir(checkpoints["audiogen"].parent)  # where audiocraft finds the tiny T5 by its name
    diffusion = {"steps": 3, "guidance_scale": 2.5, "device": "cpu"}
    options = dict.fromkeys(generation.BACKENDS, diffusion)
    options["audioldm"] = {**diffusion, "eta": 1.0}
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
        assert y.shape == (backend.sample_rate // 2,)
        assert np.isfinite(y).all()
        np.testing.assert_array_equal(y, backwards[i])
        np.testing.assert_array_equal(y, backend.generate([PROMPTS[i]], [SEEDS[i]], 0.5)[0])
    assert not np.array_equal(together[0], together[3]), "the seed must matter"


@pytest.mark.parametrize("name", generation.BACKENDS)
def test_odd_durations_have_exactly_the_samples_asked_for(backends, name):
    # 4.1 s / 10 ms falls just short of 410 frames in floating point
    for duration_s in (0.33, 1.11 if name == "stable-audio" else 4.1):
        y = backends[name].generate(["rain"], [1], duration_s)[0]
        assert y.shape == (round(duration_s * backends[name].sample_rate),)
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


@pytest.mark.parametrize("name", [name for name in generation.BACKENDS if name != "audiogen"])
def test_negative_prompt_reaches_the_model(backends, name):
    prompts, seeds, negatives = ["a dog"] * 3, [1, 1, 1], ["", "hiss", ""]
    plain, negative, again = backends[name].generate(prompts, seeds, 0.5, negatives)
    assert not np.array_equal(plain, negative)
    np.testing.assert_array_equal(plain, again)


def test_stable_audio_is_what_diffusers_makes_of_the_same_noise(backends, checkpoints):
    import torch
    from diffusers import StableAudioPipeline

    with ldm.cosine_sampler():
        pipe = StableAudioPipeline.from_pretrained(checkpoints["stable-audio"])
    for negative in ("", "hiss"):
        ours = backends["stable-audio"].generate(["a dog"], [11], 0.5, [negative])[0]
        stereo = pipe(
            "a dog",
            negative_prompt=negative or None,
            audio_end_in_s=0.5,
            num_inference_steps=3,
            guidance_scale=2.5,
            generator=torch.Generator().manual_seed(11),
        ).audios[0]
        assert stereo.shape == (2, 22_050)
        np.testing.assert_allclose(ours, stereo.mean(0), atol=1e-6)


def test_stable_audio_solver_is_that_of_diffusers_given_the_noise(monkeypatch):
    import importlib

    import torch

    # the reference imports torchsde for its noise only, which is drawn here
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module("diffusers.schedulers.scheduling_cosine_dpmsolver_multistep")
    theirs = module.CosineDPMSolverMultistepScheduler()
    ours = ldm.CosineSDESolver.from_config(theirs.config)
    ours.set_timesteps(7)
    theirs.set_timesteps(7)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    assert float(ours.init_noise_sigma) == pytest.approx(float(theirs.init_noise_sigma))
    x = y = torch.randn(2, 4, 8) * ours.init_noise_sigma
    noise = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    same = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    theirs.noise_sampler = lambda *_: torch.stack(
        [torch.randn(1, 4, 8, generator=g)[0] for g in same]
    )
    for t in ours.timesteps:
        output = torch.tanh(x) * 0.5  # any function of the state will do
        torch.testing.assert_close(
            ours.scale_model_input(x, t), theirs.scale_model_input(y, t), rtol=1e-5, atol=1e-5
        )
        x = ours.step(output, t, x, generator=noise).prev_sample
        y = theirs.step(output, t, y).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["audioldm", "audioldm2", "stable-audio"])
def test_auto_makes_what_the_named_backend_makes(backends, checkpoints, name):
    options = {"steps": 3, "guidance_scale": 2.5, "device": "cpu"}
    options |= {"eta": 1.0} if name == "audioldm" else {}
    auto = generation.get_backend("auto", checkpoint=checkpoints[name], **options)
    assert auto.sample_rate == backends[name].sample_rate
    ours = auto.generate(PROMPTS[:2], SEEDS[:2], 0.5, ["", "hiss"])
    wanted = backends[name].generate(PROMPTS[:2], SEEDS[:2], 0.5, ["", "hiss"])
    np.testing.assert_array_equal(np.stack(ours), np.stack(wanted))


def test_auto_takes_the_defaults_of_the_pipeline(checkpoints):
    backend = generation.get_backend("auto", checkpoint=checkpoints["auto"], device="cpu")
    assert (backend.settings["steps"], backend.settings["guidance_scale"]) == (16, 4.0)


def test_auto_refuses_what_makes_no_sound(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(GenerationError, match="DDPMPipeline is no text-to-audio pipeline"):
        generation.get_backend("auto", checkpoint=tmp_path)


def test_clips_that_are_too_long_are_refused_by_name(backends):
    with pytest.raises(GenerationError, match=r"stable-audio: its pipeline refuses 2.0 s"):
        backends["stable-audio"].generate(["rain"], [1], 2.0)


@pytest.mark.parametrize("name", generation.BACKENDS)
def test_every_way_of_sharing_out_the_work_leaves_the_bytes_alone(backends, name):
    table = generation.check_invariance(backends[name], THREE, 0.25, clips_per_pass=2)
    exact, passes = table[:-1], table.iloc[-1]
    assert len(exact) == 4 and passes.change == "passes of 2"
    assert exact.same_bytes.all() and (exact.max_difference == 0).all()
    assert passes.max_difference < 1e-3


@pytest.mark.parametrize(("name", "dtype"), HALF)
def test_half_precision_is_as_independent_of_the_batch(checkpoints, name, dtype):
    options = {"checkpoint": checkpoints[name], "steps": 2, "device": "cpu", "dtype": dtype}
    backend = generation.get_backend(name, **options)
    table = generation.check_invariance(backend, THREE, 0.25, clips_per_pass=2)
    assert table.same_bytes[:-1].all()
    assert table.max_difference.iloc[-1] < HALF_TOLERANCE


def test_a_dependent_backend_is_found_out():
    class Careless(Tones):
        def generate(self, prompts, seeds, duration_s, negative_prompts=None):
            # the place in the batch decides
            return super().generate(prompts, range(len(seeds)), duration_s)

    table = generation.check_invariance(Careless()).set_index("change")
    assert not table.same_bytes.any()


# --- memory ------------------------------------------------------------------------------------


def out_of_memory_above(limit, one_pass):
    import torch

    def run(rows, duration_s):
        if len(rows) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return one_pass(rows, duration_s)

    return run


@pytest.mark.parametrize("name", generation.BACKENDS)
def test_out_of_memory_halves_the_pass_and_goes_on(backends, name, monkeypatch):
    backend = backends[name]
    prompts, seeds = ["a dog", "a cat", "a cow"], [1, 2, 3]
    monkeypatch.setitem(backend.settings, "clips_per_pass", 2)
    smaller = backend.generate(prompts, seeds, 0.2)
    monkeypatch.setitem(backend.settings, "clips_per_pass", 8)
    monkeypatch.setattr(backend, "pass_limit", None)
    monkeypatch.setattr(backend, "_one_pass", out_of_memory_above(3, backend._one_pass))
    with pytest.warns(UserWarning, match=r"out of memory with 8 .*going on with 4") as notes:
        halved = backend.generate(prompts, seeds, 0.2)
    assert len(notes) == 2
    np.testing.assert_array_equal(np.stack(halved), np.stack(smaller))
    backend.generate(prompts[:1], seeds[:1], 0.2)
    assert len(notes) == 2, "what was learnt is kept"


def test_out_of_memory_with_one_clip_gives_the_remedies(backends, monkeypatch):
    backend = backends["audioldm"]
    monkeypatch.setattr(backend, "_one_pass", out_of_memory_above(0, backend._one_pass))
    with pytest.raises(GenerationError, match=r"one clip.*float16.*smaller batch.*shorter clips"):
        backend.generate(["rain"], [1], 0.3)


def test_other_failures_of_a_pass_are_not_taken_for_memory(backends, monkeypatch):
    def broken(rows, duration_s):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(backends["audioldm"], "_one_pass", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        backends["audioldm"].generate(["rain"], [1], 0.3)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (MemoryError(), True),
        (RuntimeError("expected scalar type Half"), False),
    ],
)
def test_out_of_memory_is_known_in_all_its_words(error, memory):
    assert generation._out_of_memory(error) == memory


def test_too_little_memory_is_said_before_a_download(monkeypatch):
    monkeypatch.setattr(generation, "_free_gb", lambda device: 3.0)
    with pytest.raises(GenerationError, match=r"audioldm2: its weights take 4.3 GB .*float16"):
        generation.get_backend("audioldm2", device="cpu")
    with pytest.raises(GenerationError, match=r"offload='model'"):
        generation.get_backend("stable-audio", device="cuda")


def test_remedies_fit_the_device_and_the_precision(checkpoints, monkeypatch):
    from diffusers import AudioLDM2Pipeline

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(AudioLDM2Pipeline, "from_pretrained", full)
    options = {"checkpoint": checkpoints["audioldm2"], "device": "cpu"}
    for dtype, halves in (("float16", False), ("float32", True)):
        with pytest.raises(GenerationError, match="does not suffice to load") as error:
            generation.get_backend("audioldm2", dtype=dtype, **options)
        assert ("halves it" in str(error.value)) == halves
        assert "offload" not in str(error.value)
    assert "offload" in generation._remedy("cuda:0", "float16")


def test_offload_is_for_gpus(checkpoints, monkeypatch):
    with pytest.raises(GenerationError, match="the device is the CPU"):
        generation.get_backend(
            "audioldm", checkpoint=checkpoints["audioldm"], device="cpu", offload="model"
        )

    class Pipe:
        asked = ()

        def enable_model_cpu_offload(self, device):
            self.asked = "model", device

        def enable_sequential_cpu_offload(self, device):
            self.asked = "sequential", device

    for way in ("model", "sequential"):
        assert generation._placed(Pipe(), "cuda:1", way, False).asked == (way, "cuda:1")


def test_compiled_models_are_other_recipes(checkpoints, monkeypatch):
    import torch

    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: asked.append(net))
    options = {"checkpoint": checkpoints["audioldm"], "steps": 2, "device": "cpu"}
    plain, compiled = (
        generation.get_backend("audioldm", compile=on, **options) for on in (False, True)
    )
    assert asked == [compiled.pipe.unet]
    assert compiled.settings == plain.settings | {"compile": True}
    # the layout alone leaves the sound as it is
    one, other = (b.generate(["rain"], [1], 0.3)[0] for b in (plain, compiled))
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_licence_and_size_are_said_before_a_download(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(generation, "_free_gb", lambda device: 1000.0)
    for checkpoint, note in [
        (
            "stabilityai/stable-audio-open-1.0",
            "Stability AI Community License.* 5.3 GB to download",
        ),
        ("someone/else", "licence and size not known here"),
    ]:
        with pytest.raises(GenerationError, match="cannot be opened"):
            generation.get_backend("stable-audio", checkpoint=checkpoint)
        assert re.search(note, capsys.readouterr().err)


def test_nothing_is_said_of_what_is_there(checkpoints, capsys):
    generation.get_backend("audioldm", checkpoint=checkpoints["audioldm"], device="cpu")
    assert capsys.readouterr().err == ""


def test_known_checkpoints_cover_every_preset_and_named_backend():
    known = generation.known_checkpoints().set_index("checkpoint")
    for preset in generation.PRESETS.values():
        assert known.loc[preset["options"]["checkpoint"], "backend"] == preset["backend"]
    assert set(known.backend) == set(generation.BACKENDS) - {"auto"}
    assert (known.memory_gb_half < known.memory_gb).all()


@pytest.mark.parametrize("name", generation.PRESETS)
def test_presets_run_on_any_checkpoint_of_their_kind(backends, checkpoints, name):
    # in the folder where audiocraft finds the tiny T5, which `backends` has gone to
    preset = generation.PRESETS[name]
    options = {"checkpoint": checkpoints[preset["backend"]], "device": "cpu"}
    if preset["backend"] == "audiogen":
        options["top_k"] = 8  # the tiny vocabulary has 32 tokens
    backend = generation.get_backend(name, **options)
    settings = {**preset["options"], **options}
    for key in set(settings) - {"checkpoint", "device"}:
        assert backend.settings[key] == settings[key]


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
        # set first: a name that was not there is taken out again afterwards only when it was set
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    assert generation.import_audiocraft().laion_clap is None
    import laion_clap

    assert laion_clap.__file__ == str(tmp_path / "laion_clap.py"), "importable again afterwards"
    monkeypatch.delitem(sys.modules, "audiocraft")
    assert generation.import_audiocraft().laion_clap is None
    assert sys.modules["laion_clap"] is laion_clap, "and left alone where it was there before"


@pytest.mark.skipif(
    not (ldm.BUILTIN_CHECKPOINT / "model_index.json").is_file(),
    reason="the built-in checkpoint has not been made",
)
def test_embedded_checkpoint_makes_the_same_clip_alone_and_in_a_batch():
    backend = generation.get_backend("audioldm", steps=3, device="cpu")
    together = backend.generate(PROMPTS[:5], SEEDS[:5], 1.28)
    alone = backend.generate(PROMPTS[4:5], SEEDS[4:5], 1.28)[0]
    np.testing.assert_array_equal(together[4], alone)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("audiomagic", {}, "audioldm, audioldm2, audiogen.*ronchini2024-audioldm2"),
        ("auto", {}, "needs a checkpoint"),
        ("audioldm", {"offload": "moon"}, "'model' or 'sequential'"),
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


def test_counts_may_differ_by_class():
    counts = generation.class_counts({"dog": 2, "rain": 5}, 200)
    plan = generation.plan_clips(["rain", "dog"], counts, ["simple", "task"], duration_s=1.0)
    found = plan.groupby(["label", "prompt_family"]).size().to_dict()
    assert found == {
        ("dog", "simple"): 4,
        ("dog", "task"): 4,
        ("rain", "simple"): 10,
        ("rain", "task"): 10,
    }
    equal = generation.plan_clips(["rain", "dog"], 10, ["simple", "task"], duration_s=1.0)
    assert len(plan.merge(equal, on=generation.PLAN_COLUMNS)) == len(plan)


def test_counts_of_urbansound8k_are_those_of_the_data_set():
    counts = generation.class_counts("ronchini2024")
    assert sum(counts.values()) == 8732
    assert [counts[name] for name in ("siren", "car_horn", "gun_shot")] == [929, 429, 374]
    assert sum(generation.class_counts("ronchini2024", 400).values()) == 4 * 8732


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: generation.class_counts("esc50"), "ronchini2024"),
        (lambda: generation.class_counts({}), "a dict"),
        (lambda: generation.class_counts({"dog": 1}, 0), "must be positive"),
        (
            lambda: generation.plan_clips(["dog", "cat"], {"dog": 1}, duration_s=1.0),
            "no number for the class 'cat'",
        ),
    ],
)
def test_impossible_counts_are_refused(make, message):
    with pytest.raises(GenerationError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", {"car_horn": 5, "siren": 5}),
        ("150%", {"car_horn": 2, "siren": 3}),
        ("ronchini2024", {"car_horn": 429, "siren": 929}),
        (" ronchini2024 400 % ", {"car_horn": 1716, "siren": 3716}),
    ],
)
def test_counts_are_read_from_a_line(text, wanted):
    clips = pd.DataFrame({"label": ["siren", "car_horn", "siren"]})
    assert generation.read_counts(text, clips, 5) == wanted


@pytest.mark.parametrize(
    ("text", "label", "message"),
    [
        ("esc50", "siren", "counts is 'esc50': give '200%'"),
        ("0%", "siren", "must be positive"),
        ("ronchini2024", "dog", "no number for the class 'dog'"),
    ],
)
def test_impossible_lines_of_counts_are_refused(text, label, message):
    with pytest.raises(GenerationError, match=message):
        generation.read_counts(text, pd.DataFrame({"label": [label]}), 5)


def test_a_preset_fills_in_what_was_left_open():
    ours = generation.preset("ronchini2024-audioldm2")
    assert (ours["checkpoint"], ours["duration_s"]) == ("cvssp/audioldm2", 4.0)
    assert generation.preset("ronchini2024-audiogen")["loudness"] == -14.0
    mine = generation.preset("gaurav2024-audioldm", "my/folder", 8.0)
    assert (mine["checkpoint"], mine["duration_s"], mine["candidates"]) == ("my/folder", 8.0, 3)
    for name, checkpoint in [
        ("audioldm", "builtin"),
        ("audiogen", "facebook/audiogen-medium"),
        ("auto", ""),
    ]:
        plain = {"duration_s": 2.56, "candidates": 1, "loudness": "peak"}
        assert generation.preset(name) == {"checkpoint": checkpoint} | plain


def test_captions_of_mixes_become_a_plan():
    mixes = pd.DataFrame(
        {"clip_id": ["m1", "m2"], "label": ["dog", "rain"], "caption": ["same", "same"]}
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
    for shard in ("2/2", "1/2"):
        generation.generate_clips(plan, backend, tmp_path / "shards", batch_size=4, shard=shard)
    one = contents(tmp_path / "one")
    assert len(one) == 6
    assert one == contents(tmp_path / "five") == contents(tmp_path / "shards")
    whole = generation.generate_clips(plan, backend, tmp_path / "shards")
    assert whole.clip_id.tolist() == plan.clip_id.tolist()


@pytest.mark.parametrize("name", ["audioldm", "audioldm2", "audiogen"])
def test_no_pass_is_filled_up_but_the_last_of_each_length(backends, tmp_path, monkeypatch, name):
    backend, passes = backends[name], []

    def counted(rows, duration_s):
        passes.append(len({seed for _, seed, *_ in rows}))
        tone = np.sin(np.arange(round(duration_s * backend.sample_rate)) / 10)
        return [tone.astype(np.float32)] * len(rows)

    monkeypatch.setitem(backend.settings, "clips_per_pass", 8)
    monkeypatch.setattr(backend, "_one_pass", counted)
    # three lengths of prompt that take turns in the plan
    plan = pd.concat(
        [small_plan(20, ["dog"]), small_plan(9, ["rain"]), small_plan(11, ["helicopter"])]
    ).sample(frac=1, random_state=0)
    generation.generate_clips(plan, backend, tmp_path)
    # CLAP's text tower pads all prompts to one length, T5 does not
    assert sum(passes) == 40
    assert len(passes) == (5 if name == "audioldm" else 3 + 2 + 2)


@pytest.mark.parametrize(("per_pass", "calls"), [(1, [16, 16, 8]), (4, [32, 8]), (32, [40])])
def test_a_call_is_of_eight_passes_or_of_sixteen_clips(tmp_path, per_pass, calls):
    sizes = []

    class Counted(Tones):
        def generate(self, prompts, *request):
            sizes.append(len(prompts))
            return super().generate(prompts, *request)

    backend = Counted()
    backend.settings = {"clips_per_pass": per_pass}
    generation.generate_clips(small_plan(20), backend, tmp_path)
    assert sizes == calls


@given(st.integers(1, 40), st.integers(1, 9))
def test_shards_share_out_the_plan(n, total):
    plan = pd.DataFrame({"clip_id": range(n)})
    parts = [generation._part(plan, f"{i}/{total}").clip_id.tolist() for i in range(1, total + 1)]
    assert sorted(row for part in parts for row in part) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_shard_without_rows_is_empty(tmp_path):
    done = generation.generate_clips(small_plan(1, ["dog"]), Tones(), tmp_path, shard="2/2")
    assert done.empty
    assert list(done.columns) == generation.GENERATED_COLUMNS


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", 1])
def test_impossible_shards_are_refused(tmp_path, shard):
    with pytest.raises(GenerationError, match="give 'i/n'"):
        generation.generate_clips(small_plan(), Tones(), tmp_path, shard=shard)


def write_manifest_lines(folder, process):
    for number in range(200):
        generation._append(Path(folder), {"clip_id": f"{process}-{number}", "text": "x" * 9000})


def test_manifest_of_several_processes_keeps_every_line_whole(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_manifest_lines, args=(tmp_path, k)) for k in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = (tmp_path / generation.MANIFEST).read_text().splitlines()
    assert {json.loads(line)["clip_id"] for line in lines if line} == {
        f"{k}-{number}" for k in range(2) for number in range(200)
    }


@pytest.fixture()
def tones_by_name(monkeypatch):
    def tones(checkpoint=None, device=None, bad=None):
        return Tones(bad={int(seed): 0.0 for seed in bad or ()})

    monkeypatch.setitem(generation.BACKENDS, "tones", tones)
    generation._loaded.cache_clear()


def generate_as_accelerate_does(plan, folder, options):
    from accelerate import PartialState

    table = generation.generate_on_gpus(plan, "tones", folder, options=options)
    table.to_csv(Path(folder) / f"{PartialState().process_index}.csv", index=False)


def test_processes_of_accelerate_share_out_the_plan(tones_by_name, tmp_path):
    from accelerate import PartialState, debug_launcher

    # what this process has found out about itself would be taken over by those that it starts
    PartialState._reset_state()
    plan = small_plan(3)
    alone = generation.generate_clips(plan, Tones(), tmp_path / "alone")
    shared = tmp_path / "shared"
    shared.mkdir()
    debug_launcher(generate_as_accelerate_does, (plan, shared, {}), num_processes=2)
    assert contents(shared) == contents(tmp_path / "alone")
    lines = (shared / generation.MANIFEST).read_text().split("\n")
    assert len([line for line in lines if line]) == len(plan), "no clip is made twice"
    columns = [name for name in alone if name not in ("path", "score", "guidance_scale")]
    for rank in range(2):
        table = pd.read_csv(shared / f"{rank}.csv", keep_default_na=False)
        pd.testing.assert_frame_equal(table[columns], alone[columns], check_dtype=False)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_same_bytes_and_leave_the_threads_alone(tmp_path, workers):
    import torch

    plan, threads = small_plan(2), torch.get_num_threads()
    options = {"steps": 1, "device": "cpu"}
    torch.set_num_threads(1)
    backend = generation.get_backend("audioldm", **options)
    alone = generation.generate_clips(plan, backend, tmp_path / "alone")
    torch.set_num_threads(threads)
    shared = generation.generate_with_workers(
        plan, "audioldm", tmp_path / "shared", options=options, workers=workers
    )
    assert torch.get_num_threads() == threads
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert shared.drop(columns="path").equals(alone.drop(columns="path"))


def test_a_dask_cluster_makes_the_same_bytes(tones_by_name, tmp_path):
    distributed = pytest.importorskip("distributed")
    plan = small_plan(3)
    generation.generate_clips(plan, Tones(), tmp_path / "alone")
    with pytest.raises(GenerationError, match="finds no client"):
        generation.generate_with_workers(plan, "tones", tmp_path, runner="dask")
    # threads of this process: only they know a back-end that a test has added
    with distributed.Client(
        processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None
    ):
        table = generation.generate_with_workers(plan, "tones", tmp_path / "shared", runner="dask")
        assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
        assert table.clip_id.tolist() == plan.clip_id.tolist()
        with pytest.raises(GenerationError, match="unknown backend 'none'"):
            generation.generate_with_workers(plan, "none", tmp_path, runner="dask")


class Stateful(Tones):
    """A model that keeps its place in itself, as samplers do."""

    def generate(self, prompts, seeds, duration_s, negative_prompts=None):
        sounds = []
        for seed in seeds:
            self.pitch = seed
            time.sleep(0.005)
            sounds += super().generate(prompts[:1], [self.pitch], duration_s)
        return sounds


def test_threads_take_turns_at_the_model(monkeypatch, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setitem(generation.BACKENDS, "stateful", Stateful)
    generation._loaded.cache_clear()
    plan = small_plan(6)
    generation.generate_clips(plan, Stateful(), tmp_path / "alone")
    with ThreadPoolExecutor(2) as threads:
        tasks = [
            threads.submit(generation._make_part, part, "stateful", {}, tmp_path / "shared", {})
            for part in (plan[::2], plan[1::2])
        ]
        assert [task.result()[1] for task in tasks] == [None, None]
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_whatever_stops_a_part_reaches_those_that_gather(monkeypatch, tmp_path):
    def broken():
        raise TypeError("of no kind that one thinks of")

    monkeypatch.setitem(generation.BACKENDS, "broken", broken)
    generation._loaded.cache_clear()
    with pytest.raises(GenerationError, match="TypeError: of no kind"):
        generation.generate_with_workers(small_plan(1), "broken", tmp_path, workers=1)
    table, problem = generation._make_part(small_plan(1), "broken", {}, tmp_path, {})
    assert table is None and "in broken" in problem


@pytest.mark.parametrize("bar", [False, True])
def test_progress_without_a_terminal_is_a_line_a_minute(monkeypatch, capsys, tmp_path, bar):
    seconds = 0.0

    class Slow(Tones):
        def generate(self, *request):
            nonlocal seconds
            seconds += 25.0
            return super().generate(*request)

    monkeypatch.setattr(generation, "_clock", lambda: seconds)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: bar, raising=False)
    generation.generate_clips(small_plan(5), Slow(), tmp_path, batch_size=1)
    told = capsys.readouterr()
    lines = ["none: 3 of 10 clips, 0.04 clips/s, 3 min left"]
    lines += ["none: 6 of 10 clips, 0.04 clips/s, 2 min left"]
    lines += ["none: 9 of 10 clips, 0.04 clips/s, 0 min left"]
    assert told.out.splitlines() == ([] if bar else lines)
    assert bool(told.err) == bar


def test_dask_asks_for_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(GenerationError, match="cluster"):
        generation.generate_with_workers(small_plan(), "audioldm", tmp_path, runner="dask")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runner": "slurm"}, "choose loky or dask"),
        ({"workers": 0}, "at least 1"),
        ({"batchsize": 3}, "unknown option batchsize"),
        ({"loudness": "loud"}, "'peak', 'none', or LUFS"),
    ],
)
def test_impossible_shares_are_refused(tmp_path, options, message):
    with pytest.raises(GenerationError, match=message):
        generation.generate_with_workers(small_plan(), "audioldm", tmp_path, **options)


def test_what_one_worker_cannot_make_the_others_have_made(tones_by_name, tmp_path):
    plan = small_plan(2)
    lost = plan.seed.iloc[::2].tolist()
    bad = [(seed + k) for seed in lost for k in range(3)]
    with pytest.raises(GenerationError, match="2 of 2 clips were silent"):
        generation.generate_on_gpus(plan[::2], "tones", tmp_path, options={"bad": bad})
    with pytest.warns(UserWarning, match="2 of 4"):
        done = generation.generate_on_gpus(plan, "tones", tmp_path, options={"bad": bad})
    assert done.seed.tolist() == plan.seed.iloc[1::2].tolist()


# --- command line ------------------------------------------------------------------------------


def test_command_line_makes_a_plan_in_shards(tmp_path, capsys):
    from soundscapes_utils.__main__ import main

    plan, out = small_plan(2), str(tmp_path / "clips")
    path = str(tmp_path / "plan.csv")
    plan.to_csv(path, index=False)
    options = ["-o", "steps", "1", "-o", "device", "cpu", "--loudness", "-30"]
    for shard in ("1/2", "2/2"):
        assert main(["generate", path, out, *options, "--shard", shard]) == 0
        assert not (tmp_path / "clips/generated.csv").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "clips").glob("*.wav")}
    assert main(["generate", path, out, *options]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    first, _, last, _ = capsys.readouterr().out.splitlines()
    assert re.search("2 clips .*: 2 made, 0 kept, 0 outputs set aside; .* s, .* clips/s$", first)
    assert re.search("4 clips .*: 0 made, 4 kept, 0 outputs set aside; .* s, 0.00 clips/s$", last)
    table = pd.read_csv(tmp_path / "clips/generated.csv")
    assert table.clip_id.tolist() == plan.clip_id.tolist()
    assert (table.lufs <= -29.9).all()
    assert (table.steps == 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "audiomagic"], "unknown backend"),
        (["-o", "stepz", "3"], "no option stepz"),
        (["-o", "device", "cpu", "--shard", "3/2"], "i from 1 to n"),
        (["-o", "device", "cpu", "--loudness", "loud"], "LUFS"),
    ],
)
def test_command_line_refuses_in_one_line(tmp_path, capsys, arguments, message):
    from soundscapes_utils.__main__ import main

    small_plan(1).to_csv(tmp_path / "plan.csv", index=False)
    assert main(["generate", str(tmp_path / "plan.csv"), str(tmp_path), *arguments]) == 2
    assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)


def test_command_line_takes_the_level_of_a_preset(tmp_path, monkeypatch):
    from soundscapes_utils.__main__ import main

    small_plan(1).to_csv(tmp_path / "plan.csv", index=False)
    monkeypatch.setattr(generation, "get_backend", lambda name, **options: Tones())
    arguments = ["generate", str(tmp_path / "plan.csv"), str(tmp_path / "clips")]
    assert main([*arguments, "--backend", "ronchini2024-audiogen"]) == 0
    table = pd.read_csv(tmp_path / "clips/generated.csv")
    np.testing.assert_allclose(table.lufs, -14, atol=0.1)


def test_command_line_keeps_the_candidate_that_suits_its_prompt_best(tmp_path, monkeypatch, capsys):
    from soundscapes_utils import selection
    from soundscapes_utils.__main__ import main

    small_plan(1).drop(columns="duration_s").to_csv(tmp_path / "plan.csv", index=False)
    monkeypatch.setattr(generation, "get_backend", lambda name, **options: Tones())
    asked = []

    def last(candidates, generated, clap):
        asked.append(clap)
        return selection.best_candidates(candidates, generated, np.arange(len(generated)))

    monkeypatch.setattr(selection, "best_by_clap", last)
    arguments = ["generate", str(tmp_path / "plan.csv"), str(tmp_path / "clips")]
    assert main([*arguments, "--backend", "gaurav2024-audioldm", "--clap", "mini-clap"]) == 0
    assert asked == ["mini-clap"]
    table = pd.read_csv(tmp_path / "clips/generated.csv")
    assert table.score.tolist() == [2, 5]
    assert (table.duration_s == 4.0).all(), "the preset's, where the plan says nothing"
    assert "2 clips chosen of 6 candidates" in capsys.readouterr().out
    small_plan(1).to_csv(tmp_path / "plan.csv", index=False)
    assert main([*arguments, "--backend", "gaurav2024-audioldm", "--best-of", "1"]) == 0
    assert "other durations than the 4.0 s of gaurav2024-audioldm" in capsys.readouterr().out


def test_command_line_plans_what_a_preset_and_the_counts_say(tmp_path, capsys):
    from soundscapes_utils.__main__ import main

    clips, out = tmp_path / "clips.csv", tmp_path / "plan.csv"
    pd.DataFrame({"label": ["dog", "dog", "rain"]}).to_csv(clips, index=False)
    arguments = [
        "plan",
        str(clips),
        str(out),
        "--counts",
        "200%",
        "--backend",
        "ronchini2024-audioldm2",
    ]
    assert main([*arguments, "--family", "task"]) == 0
    plan = pd.read_csv(out)
    assert plan.label.value_counts().to_dict() == {"dog": 4, "rain": 2}
    assert (plan.duration_s == 4.0).all() and (plan.prompt_family == "task").all()
    assert "6 clips of 2 classes, 4.0 s each" in capsys.readouterr().out
    assert main([*arguments, "--counts", "many"]) == 2
    assert capsys.readouterr().err.startswith("error: counts is 'many'")


def test_command_line_leaves_the_shares_to_accelerate(tmp_path, monkeypatch, capsys):
    from soundscapes_utils.__main__ import main

    def all_of_it(plan, name, out_dir, *, options, **how):
        return generation.generate_clips(plan, Tones(), out_dir, **how)

    small_plan(1).to_csv(tmp_path / "plan.csv", index=False)
    monkeypatch.setattr(generation, "generate_on_gpus", all_of_it)
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["generate", str(tmp_path / "plan.csv"), str(tmp_path / "clips")]
    # each process has the whole table, and one of them tells
    for rank, told in (("1", ""), ("0", "2 clips are in")):
        monkeypatch.setenv("RANK", rank)
        assert main(arguments) == 0
        assert (tmp_path / "clips/generated.csv").exists() == bool(told)
        assert told in capsys.readouterr().out
    assert main([*arguments, "--shard", "1/2"]) == 2
    assert "accelerate shares out the plan" in capsys.readouterr().err


# --- levels ------------------------------------------------------------------------------------


def test_loudness_is_what_was_asked_for_and_recorded(tmp_path):
    plan, levels = small_plan(1, ["dog"]), {"peak": None, "none": None, -23.0: -23.0, -3.0: None}
    for level, lufs in levels.items():
        folder = tmp_path / str(level)
        done = generation.generate_clips(plan, Tones(), folder, loudness=level)
        y = audio.load_audio(done.path[0])[0]
        made = Tones().generate(["x"], plan.seed.tolist(), 0.25)[0]
        entry = json.loads((folder / generation.MANIFEST).read_text())
        assert entry["loudness"] == level
        np.testing.assert_allclose(y, made * 10 ** (entry["gain_db"] / 20), atol=2e-3)
        if lufs:
            assert audio.loudness(y, 8000) == pytest.approx(lufs, abs=0.05)
    # -3 LUFS cannot be had below the highest peak
    np.testing.assert_allclose(np.abs(y).max(), generation.PEAK, atol=1e-4)


def test_other_levels_are_other_files(tmp_path):
    plan = small_plan(1, ["dog"])
    for level in ("peak", "none", -23.0, -24.0, "peak"):
        generation.generate_clips(plan, Tones(), tmp_path, loudness=level)
    assert len(contents(tmp_path)) == 4


def test_clipped_outputs_are_set_aside(tmp_path):
    t = np.arange(8000) / 8000
    sine = np.sin(2 * np.pi * 100 * t).astype(np.float32)
    assert generation._fault(0.999 * sine) == ""
    assert generation._fault(np.clip(2 * sine, -1, 1)) == "clipped"
    assert generation._fault(np.clip(2 * sine, -1.5, 0.9)) == "clipped"
    assert generation._fault(np.maximum(sine, 0)) == "", "silence at one end is no flat top"
    # a peak that is met now and then is none
    assert generation._fault(np.sin(2 * np.pi * 1000 * t).astype(np.float32)) == ""
    plan = small_plan(1, ["dog"])
    loud = Tones(bad={int(plan.seed[0]): 4.0})
    done = generation.generate_clips(plan, loud, tmp_path, loudness="none")
    assert generation.rejected_clips(tmp_path).reason.tolist() == ["beyond full scale"]
    assert done.seed.tolist() == [plan.seed[0] + 1]


def test_what_has_no_loudness_is_set_aside(tmp_path):
    class Clicks(Tones):
        def generate(self, prompts, seeds, duration_s, negative_prompts=None):
            sounds = super().generate(prompts, seeds, duration_s)
            click = np.zeros(2000, np.float32)
            click[1000] = 0.002
            return [click if seed == bad else y for seed, y in zip(seeds, sounds, strict=True)]

    plan = small_plan(1, ["dog"])
    bad = plan.seed[0]
    done = generation.generate_clips(plan, Clicks(), tmp_path, loudness=-23.0)
    assert generation.rejected_clips(tmp_path).reason.tolist() == ["below -70 LUFS"]
    assert done.seed.tolist() == [bad + 1]


@pytest.mark.parametrize("loudness", ["loud", 3.0, -80.0, True, None])
def test_impossible_levels_are_refused(tmp_path, loudness):
    with pytest.raises(GenerationError, match="loudness is"):
        generation.generate_clips(small_plan(), Tones(), tmp_path, loudness=loudness)


def test_halves_of_a_killed_run_are_removed(tmp_path):
    plan = small_plan(1, ["dog"])
    (whole,) = generation.generate_clips(plan, Tones(), tmp_path).path
    half = tmp_path / f".{Path(whole).name}.4711.part"
    other = tmp_path / ".somebody-else.wav.4711.part"
    for path in (half, other):
        path.write_bytes(b"RIFF")
    Path(whole).unlink()
    generation.generate_clips(plan, Tones(), tmp_path)
    assert not half.exists()
    assert other.exists()


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
