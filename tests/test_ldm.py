"""The pieces of AudioLDM against independent computations and through diffusers' own loading."""

import json

import numpy as np
import pytest
import torch
from diffusers import AudioLDMPipeline
from sklearn.decomposition import PCA

from soundscapes_utils import audio, ldm

TEXTS = ["a dog is barking", "the sound of rain", "a rooster crowing in a park"] * 3


def textured_mels(n=6, frames=64, seed=0):
    rng = np.random.default_rng(seed)
    waves = rng.normal(size=(n, frames * ldm.HOP)) * np.linspace(0.1, 1, frames * ldm.HOP)
    return torch.stack([ldm.waveform_to_mel(y, frames) for y in waves])


@pytest.fixture(scope="module")
def small():
    pipe, tower = ldm.build_small(TEXTS, channels=(16, 32, 48))
    pipe.vae.fit(textured_mels())
    return pipe, tower.eval()


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "small"
    return ldm.save_checkpoint(small[0], folder, {"training_folds": [2]}, small[1])


def test_latent_is_the_whitened_pca_of_the_patches(small):
    mels = textured_mels()
    rows = mels.unfold(1, 8, 8).unfold(2, 8, 8).reshape(-1, 64).numpy()
    expected = PCA(32, whiten=True).fit(rows)
    latents = ldm.encode_mel(small[0], mels).movedim(1, -1).reshape(-1, 32).numpy()
    projected = expected.transform(rows)
    # principal axes are defined up to their sign
    for k in range(32):
        assert abs(np.corrcoef(latents[:, k], projected[:, k])[0, 1]) > 0.999
    assert latents.std(0) == pytest.approx(np.ones(32), rel=0.02)


def test_decoding_is_the_best_reconstruction_of_that_rank(small):
    mels = textured_mels()
    rows = mels.unfold(1, 8, 8).unfold(2, 8, 8).reshape(-1, 64).numpy()
    pca = PCA(32).fit(rows)
    best = np.mean((pca.inverse_transform(pca.transform(rows)) - rows) ** 2)
    ours = ldm.decode_latents(small[0], ldm.encode_mel(small[0], mels)) - mels
    assert float((ours**2).mean()) == pytest.approx(best, rel=1e-3)


def test_vocoder_meets_the_mel_and_repeats_itself(small):
    mels = textured_mels()
    y = ldm.vocode(small[0], mels)
    assert y.shape == (len(mels), mels.shape[1] * ldm.HOP)
    error = np.mean(
        [np.abs(audio.log_mel(a) - m.numpy()).mean() for a, m in zip(y, mels, strict=True)]
    )
    assert error < 0.2
    np.testing.assert_array_equal(y, ldm.vocode(small[0], mels))


def test_waveform_is_conditioned_as_the_trainer_does():
    y = np.random.default_rng(1).normal(2.0, 0.1, 10 * ldm.HOP).astype(np.float32)
    centred = y - y.mean()
    padded = np.pad(centred * 0.5 / np.abs(centred).max(), (0, 6 * ldm.HOP))
    mel = ldm.waveform_to_mel(np.pad(y - y.mean(), (0, 6 * ldm.HOP)), 16).numpy()
    np.testing.assert_allclose(mel, audio.log_mel(padded.astype(np.float32)), atol=1e-3)


def test_text_embedding_is_the_one_the_pipeline_samples_with(small):
    pipe = small[0]
    theirs = pipe._encode_prompt(["a dog is barking"], "cpu", 1, True)
    ours = ldm.embed_text(pipe, ["", "a dog is barking"])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_checkpoint_opens_in_diffusers_and_sounds_the_same(small, saved):
    def sample(pipe):
        generator = torch.Generator().manual_seed(0)
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            "a dog is barking",
            audio_length_in_s=0.64,
            num_inference_steps=3,
            generator=generator,
        ).audios

    np.testing.assert_allclose(
        sample(AudioLDMPipeline.from_pretrained(saved)), sample(small[0]), atol=1e-5
    )


def test_half_precision_keeps_the_checkpoint_small_and_close(small, tmp_path):
    before = {k: v.clone() for k, v in small[0].unet.state_dict().items()}
    folder = ldm.save_checkpoint(small[0], tmp_path / "half", {}, small[1], half=True)
    assert all(torch.equal(v, before[k]) for k, v in small[0].unet.state_dict().items())
    halved = ldm.load_pipeline(folder, device="cpu").unet.state_dict()
    for name, value in small[0].unet.state_dict().items():
        torch.testing.assert_close(halved[name], value, atol=1e-3, rtol=1e-3)
    assert small[0].unet.dtype == torch.float32
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))


def test_saving_replaces_a_checkpoint_and_leaves_nothing_else(small, tmp_path):
    for steps in (1, 2):
        ldm.save_checkpoint(small[0], tmp_path / "twice", {"steps": steps}, small[1])
    assert ldm.checkpoint_info(tmp_path / "twice")["steps"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["twice"]


def test_checkpoint_names_no_place_of_the_machine_that_made_it(saved, tmp_path):
    pipe = ldm.load_pipeline(saved, device="cpu")
    tower, _ = ldm.load_audio_tower(str(saved))
    for folder in (
        ldm.save_checkpoint(pipe, tmp_path / "again", {}, tower),
        ldm.EMBEDDED_CHECKPOINT,
    ):
        texts = [p.read_text() for p in folder.rglob("*.json")]
        assert texts and not any("_name_or_path" in text for text in texts)


def test_own_audio_tower_comes_with_the_checkpoint(small, saved):
    y = np.random.default_rng(0).normal(size=16_000).astype(np.float32)
    ours = ldm.embed_audio([y, y[:8000]], 16_000, saved)
    expected = small[1](ldm.waveform_to_mel(y, 100)[None]).detach().numpy()
    np.testing.assert_allclose(ours[:1], expected, atol=1e-5)
    assert np.linalg.norm(ours, axis=1) == pytest.approx([1, 1], abs=1e-5)


def test_published_audio_tower_is_used_where_the_folder_holds_one(small, tmp_path):
    from transformers import ClapAudioConfig, ClapAudioModelWithProjection

    folder = ldm.save_checkpoint(small[0], tmp_path / "published", {})
    config = ClapAudioConfig(
        hidden_size=64,
        patch_embeds_hidden_size=8,
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 1, 1],
        projection_dim=16,
    )
    torch.manual_seed(0)
    ClapAudioModelWithProjection(config).save_pretrained(folder / "audio_encoder")
    y = np.random.default_rng(0).normal(size=16_000).astype(np.float32)
    embedding = ldm.embed_audio([y], 16_000, folder)
    assert embedding.shape == (1, 16)
    assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)


def test_wrong_places_name_the_remedy(tmp_path):
    with pytest.raises(ldm.CheckpointError, match=r"no model_index\.json.*train-mini"):
        ldm.load_pipeline(tmp_path)
    with pytest.raises(ldm.CheckpointError, match=r"nobody/nothing.*hub"):
        ldm.load_pipeline("nobody/nothing")


def test_incomplete_checkpoint_is_refused(saved, tmp_path):
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(saved, folder)
    next(folder.glob("unet/*.safetensors")).unlink()
    with pytest.raises(ldm.CheckpointError, match="broken"):
        ldm.load_pipeline(folder)


def test_hub_checkpoints_have_the_published_sampling():
    info = ldm.checkpoint_info("cvssp/audioldm-s-full-v2")
    assert (info["steps"], info["guidance_scale"], info["training_folds"]) == (200, 3.5, [])


def test_embedded_checkpoint_is_small_free_of_pickle_and_documented():
    folder = ldm.EMBEDDED_CHECKPOINT
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 25e6
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".md", ".txt"}
    assert "train-mini" in (folder / "README.md").read_text()
    assert json.loads((folder / ldm.INFO_FILE).read_text())["training_folds"]
