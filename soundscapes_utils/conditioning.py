"""What the trainer keeps of sounds and captions: latents, and the condition that a U-Net is given.

A condition is one tensor a sample. For AudioLDM it is a row of CLAP's space, where texts and sounds
have places alike. For AudioLDM 2 it is a matrix of the tokens of both its cross-attentions: those that
its GPT-2 has generated, then those of its T5. Their last column says which: 1 generated, 2 of T5, and
0 where a shorter caption is filled up. The encoders are frozen, and each caption is encoded once.
"""

import warnings

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from . import audio, ldm, store

_GENERATED, _OF_T5 = 1.0, 2.0
# captions of AudioLDM 2 that are encoded at once
_TEXTS_PER_PASS = 32


def unet_inputs(unet, condition):
    """Name conditions [batch, …] as the arguments of the U-Net that they are for."""
    if condition.ndim == 2:
        return {"encoder_hidden_states": None, "class_labels": condition}
    # several processes train a wrapped U-Net
    _, *widths = getattr(unet, "module", unet).config.cross_attention_dim[0]
    stream = condition[..., -1]
    n = int((stream[0] == _GENERATED).sum())
    return {
        "encoder_hidden_states": condition[:, :n, : widths[0]],
        "encoder_hidden_states_1": condition[:, n:, : widths[1]],
        "encoder_attention_mask_1": (stream[:, n:] == _OF_T5).float(),
    }


def text_tensors(pipe, texts):
    """Encode distinct texts: ``text``, their conditions; ``empty``, those of the empty text.

    AudioLDM 2 guides every caption by an empty text that is filled up to the caption's own length, to
    which its GPT-2 is not indifferent: ``empty_of`` [texts] tells each text's row of ``empty``.
    """
    if not hasattr(pipe, "language_model"):
        rows = ldm.embed_text(pipe, [*texts, ""])
        return {"text": rows[:-1], "empty": rows[-1:], "empty_of": torch.zeros(len(texts)).long()}
    lengths = np.array([len(pipe.tokenizer_2(text, truncation=True).input_ids) for text in texts])
    rows, empty, empty_of = [None] * len(texts), [], torch.zeros(len(texts)).long()
    for number, length in enumerate(np.unique(lengths)):
        places = np.flatnonzero(lengths == length)
        empty_of[places] = number
        empty.append(_tokens(pipe, [texts[places[0]]], guided=True)[0])
        for part in np.split(places, range(_TEXTS_PER_PASS, len(places), _TEXTS_PER_PASS)):
            for i, row in zip(part, _tokens(pipe, [texts[i] for i in part]), strict=True):
                rows[i] = row
    filled = pad_sequence([*rows, *empty], batch_first=True)
    return {"text": filled[: len(texts)], "empty": filled[len(texts) :], "empty_of": empty_of}


@torch.no_grad()
def _tokens(pipe, texts, guided=False):
    """Encode texts of one length, behind their empty ones if `guided`, by the pipeline itself."""
    text, mask, generated = pipe.encode_prompt(texts, pipe.device, 1, guided)
    width = max(text.shape[-1], generated.shape[-1])
    tokens = torch.cat([F.pad(x, (0, width - x.shape[-1])) for x in (generated, text)], dim=1)
    stream = torch.cat([torch.full_like(generated[..., 0], _GENERATED), mask * _OF_T5], dim=1)
    return torch.cat([tokens, stream[..., None]], dim=2).float().cpu()


def sound_tensors(pipe, config, paths, start):
    """Encode and (for AudioLDM) embed segments as a `FinetuneConfig` asks: latents, clip, audio."""
    # each of the U-Net's levels but the last halves the latent once more
    unit = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    frames = max(1, round(config.segment_s * ldm.SAMPLE_RATE / ldm.HOP / unit)) * unit
    latents, segments, owner = [], [], []
    for i, path in enumerate(paths, start=start):
        y, _ = audio.load_audio(path, ldm.SAMPLE_RATE)
        rng = np.random.default_rng([config.seed, i])
        # of a clip that is no longer than a segment there is only one
        for _ in range(config.segments_per_clip if len(y) > frames * ldm.HOP else 1):
            segments.append(audio.loudest_segment(y, frames * ldm.HOP, ldm.TRIES, rng))
            latents.append(ldm.encode_mel(pipe, ldm.waveform_to_mel(segments[-1], frames)[None]))
            owner.append(i)
    found = {"latents": torch.cat(latents), "clip": torch.tensor(owner)}
    if not hasattr(pipe, "language_model"):
        clap = ldm.load_clap(str(config.checkpoint))
        clap.audio_encoder.to(pipe.device)
        found["audio"] = ldm.embed_audio(clap, segments, ldm.SAMPLE_RATE)
        clap.audio_encoder.to("cpu")  # others share this tower
    return found


def chosen(data, index, which, as_text, dropped):
    """Give segments the conditions of a training step, from one split of `finetuning.load_data`.

    Those of their captions `which` where `as_text`, else of their sounds; where `dropped`, of no text.
    """
    text = data["caption"][data["clip"][index], which]
    condition = data["text"][text]
    if "audio" in data:
        condition[~as_text] = data["audio"][index[~as_text]]
    condition[dropped] = data["empty"][data["empty_of"][text[dropped]]]
    return condition


def conditions_of(data, index):
    """Give segments the conditions of their first captions, of the least similar ones, of no text, …"""
    first = data["caption"][:, 0]
    text, others = first[data["clip"][index]], first.unique()
    ours, theirs = (F.normalize(data["text"][i].flatten(1), dim=1) for i in (text, others))
    conditions = {
        "matched": data["text"][text],
        "mismatched": data["text"][others[(ours @ theirs.T).argmin(dim=1)]],
        "unconditional": data["empty"][data["empty_of"][text]],
    }
    if "audio" in data:
        conditions["audio"] = data["audio"][index]
    return conditions


def cached_tensors(file, make, arguments):
    """Read tensors that are kept as safetensors, or make and keep them; damaged ones are made again."""
    if file.is_file():
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            warnings.warn(f"{file}: damaged ({error}); made again", stacklevel=2)
    store.write_atomic(file, save(make(*arguments)))
    return load_file(file)
