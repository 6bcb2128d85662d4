"""Listening: a model's parts, what it makes on its way, and a page of a finished set.

The page is one HTML file with its sounds and pictures beside it: it opens from the disk, works
without a network and on a phone, and can be copied or put on a server as a folder.
"""

import functools
import hashlib
import io
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from . import audio, captions, store
from .generation import GENERATED_COLUMNS

PAGE_RATE = 16_000
PICTURE_FRAMES = 256  # columns of a spectrogram: more than its card is wide


# The parts of a text-to-audio model in the order in which a prompt passes through them.
PARTS = {
    "text_encoder": ("CLAP text tower", "prompt to a vector"),
    "text_encoder_2": ("T5", "prompt to a list of vectors"),
    "projection_model": ("projection", "both to one width"),
    "language_model": ("GPT-2", "these to a description of the sound"),
    "unet": ("U-Net", "noise to a latent, step by step"),
    "transformer": ("transformer", "noise to a latent, step by step"),
    "condition_provider": ("T5", "prompt to a list of vectors"),
    "lm": ("language model", "one token of sound after another"),
    "compression_model": ("EnCodec", "tokens to a waveform"),
    "vae": ("VAE decoder", "latent to mel or waveform"),
    "vocoder": ("vocoder", "log-mel to a waveform"),
}


def model_parts(backend):
    """List the networks that a text-to-audio model is made of, with their sizes.

    Parameters
    ----------
    backend : generation.TextToAudio
        From `generation.get_backend`.

    Returns
    -------
    pandas.DataFrame
        In the order in which a prompt passes: ``part, does, millions`` (of parameters). Empty for
        a back-end of one's own, whose parts nobody here can know.

    Examples
    --------
    >>> from soundscapes_utils import generation
    >>> model_parts(generation.get_backend("audioldm", device="cpu")).part.tolist()
    ['CLAP text tower', 'U-Net', 'VAE decoder', 'vocoder']
    """
    whole = getattr(backend, "pipe", getattr(backend, "model", None))
    rows = []
    for name, (part, does) in PARTS.items():
        holder = getattr(whole, "lm", None) if name == "condition_provider" else whole
        found = getattr(holder, name, None)
        if found is not None:
            inner = getattr(found, "condition_provider", None)
            size = _size(found) - (_size(inner) if inner is not None else 0)
            rows.append((part, does, size / 1e6))
    return pd.DataFrame(rows, columns=["part", "does", "millions"])


def _size(module):
    # audiocraft keeps a frozen T5 where torch does not see it
    hidden = [part.__dict__.get("t5") for part in module.modules()]
    whole = [module, *(part for part in hidden if hasattr(part, "parameters"))]
    return sum(values.numel() for part in whole for values in part.parameters())


def denoising_steps(backend, prompt, seed, duration_s, at, view="latent"):
    """Decode a clip at several steps of its sampling: from noise to sound.

    Parameters
    ----------
    backend : generation.TextToAudio
        From `generation.get_backend`.
    prompt : str
        What to hear.
    seed : int
        As for `generate`: the last step is the clip that `generate` makes of it.
    duration_s : float
        Seconds.
    at : sequence of int
        Steps after which to listen, counted from 1; those beyond the last are taken as the last.
    view : {"latent", "estimate"}
        What is decoded: the latent as it is, with the noise that is left in it; or the model's
        estimate, at that step, of where all this will end (x₀ in Song et al., DDIM, arXiv
        2010.02502, equation 9). The last latent is the clip; the last estimate differs from it by the
        little noise that the schedule ends with.

    Returns
    -------
    dict of str to np.ndarray, float32 [samples]
        ``"after 1 of 25 steps"`` and so on, each scaled to its own peak. A back-end that does not
        denoise a mel latent (AudioGen writes a sound from left to right) gives its clip alone.

    Raises
    ------
    ValueError
        A step below 1, or another view.

    Examples
    --------
    >>> from soundscapes_utils import generation
    >>> backend = generation.get_backend("audioldm", steps=3, device="cpu")
    >>> list(denoising_steps(backend, "rain", 0, 1.28, [1, 3]))
    ['after 1 of 3 steps', 'after 3 of 3 steps']
    """
    if min(at) < 1 or view not in ("latent", "estimate"):
        raise ValueError(f"step {min(at)}, view {view!r}: steps count from 1, views are two")
    pipe, n = getattr(backend, "pipe", None), round(duration_s * backend.sample_rate)
    if not hasattr(pipe, "mel_spectrogram_to_waveform"):
        return {"as made": _to_peak(backend.generate([prompt], [seed], duration_s)[0])}
    import torch

    steps = backend.settings["steps"]
    with _watched(pipe.scheduler, view) as seen:
        pipe(
            prompt,
            negative_prompt="",
            audio_length_in_s=(n + 0.5) / backend.sample_rate,
            generator=torch.Generator("cpu").manual_seed(int(seed)),
            num_inference_steps=steps,
            guidance_scale=backend.settings["guidance_scale"],
            eta=backend.settings["eta"],
        )
    wanted = sorted({min(step, len(seen)) for step in at})
    return {
        f"after {step} of {steps} steps": _to_peak(_decoded(pipe, seen[step - 1], n))
        for step in wanted
    }


@contextmanager
def _watched(scheduler, view):
    """Note what a scheduler returns at every step; diffusers' own callback shows no estimates."""
    seen, original = [], scheduler.step

    # the pipeline reads from the signature what the scheduler understands
    @functools.wraps(original)
    def step(*arguments, **options):
        made = original(*arguments, **options)
        latents = made.prev_sample if view == "latent" else made.pred_original_sample
        seen.append(latents.detach().clone())
        return made

    scheduler.step = step
    try:
        yield seen
    finally:
        del scheduler.step


def _decoded(pipe, latents, n):
    import torch

    from . import ldm

    with torch.no_grad():
        mel = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return audio.fix_length(ldm.vocode(pipe, mel)[0].astype(np.float32), n, "pad")


def _to_peak(y):
    return y * np.float32(10 ** (-1 / 20) / max(float(np.abs(y).max()), 1e-9))


def write_page(out_dir, generated, real=None, *, title="Listen", per_class=24, seed=0):
    """Make a page of a generated set: class by class, real beside synthetic.

    Parameters
    ----------
    out_dir : str or Path
        Gets ``index.html``, ``sounds/`` (FLAC at 16 kHz: what is heard is the clip and no codec)
        and ``pictures/``. What is there already is kept, so a second call is quick.
    generated : pandas.DataFrame
        Any `generated` table. Columns beyond the usual are shown on the cards: numbers can be sorted
        by and cut off at (as ``score`` and ``lufs`` can), words can be searched for, and columns of
        true and false name the clips that they mark.
    real : pandas.DataFrame, optional
        Clip table of real recordings, of the same classes; its further columns likewise.
    title : str
        Of the page.
    per_class : int
        Clips of a class shown on either side at most; the page says of how many. Of more clips, a
        random choice is shown.
    seed : int
        Of that choice.

    Returns
    -------
    Path
        ``index.html``; written last and in one piece.

    Raises
    ------
    ValueError
        The table is empty or lacks ``clip_id``, ``label`` or ``path``.
    audio.AudioError
        A clip that cannot be read, by name, or a folder that cannot be written to.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> path = audio.save_audio(folder / "a.wav", np.sin(np.arange(16_000) * 0.1), 16_000)
    >>> made = pd.DataFrame({"clip_id": ["a"], "label": "dog", "path": str(path), "score": [0.3]})
    >>> write_page(folder / "listen", made).name
    'index.html'
    """
    import jinja2

    out_dir = Path(out_dir)
    sides = {"real": real, "synthetic": generated}
    sides = {name: _checked(table, name) for name, table in sides.items() if table is not None}
    labels = sorted(sides["synthetic"]["label"].unique())
    sections = [
        {
            "label": label,
            "name": captions.tidy(label),
            "sides": [
                _side(name, table[table["label"] == label], out_dir, per_class, seed)
                for name, table in sides.items()
            ],
        }
        for label in labels
    ]
    cards = [card for part in sections for side in part["sides"] for card in side["cards"]]
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("listening.html.j2").render(
        title=title,
        sections=sections,
        n=len(cards),
        names=list(sides),
        families=_different(card["family"] for card in cards),
        numbers=_different(name for card in cards for name in card["numbers"]),
    )
    return store.write_atomic(out_dir / "index.html", page.encode())


def page_of_run(run_dir, table="generated", per_class=24):
    """Make the page of a table that a run has left, with its scores and real clips if there are any.

    Parameters
    ----------
    run_dir : str or Path
        Folder of the run.
    table : str or Path
        Name of a table in the run's ``tables/``, or a CSV file of the same columns. The page goes
        to ``listen/``, or ``listen-<name>/`` for another table than ``generated``.
    per_class : int
        As for `write_page`.

    Returns
    -------
    Path
        ``index.html``.

    Raises
    ------
    ValueError
        No such table, or one that `write_page` refuses.
    audio.AudioError
        A clip that cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> page_of_run(tempfile.mkdtemp())
    Traceback (most recent call last):
    ValueError: ...generated.csv: no such table...
    """
    tables = Path(run_dir) / "tables"
    file = Path(table) if Path(table).suffix == ".csv" else tables / f"{table}.csv"
    if not file.is_file():
        raise ValueError(f"{file}: no such table; run notebook 02 first, or give a CSV file")
    made, real, name = pd.read_csv(file), None, file.stem
    scores = tables / f"{name}_scores.csv"
    if scores.is_file():
        more = pd.read_csv(scores).drop(columns="label", errors="ignore")
        made = made.merge(more, on="clip_id", how="left")
    if (tables / "clips.csv").is_file():
        real = pd.read_csv(tables / "clips.csv")
        real = real[real["label"].isin(made["label"])] if "label" in made else real
    out_dir = Path(run_dir) / ("listen" if name == "generated" else f"listen-{name}")
    return write_page(
        out_dir,
        made,
        real if real is not None and len(real) else None,
        title=f"{Path(run_dir).resolve().name}: {name.replace('_', ' ')}",
        per_class=per_class,
    )


def _different(words):
    return [word for word in dict.fromkeys(words) if word]


def _checked(table, name):
    absent = {"clip_id", "label", "path"} - set(table.columns)
    if absent or table.empty:
        what = f"lacks {', '.join(sorted(absent))}" if absent else "has no rows"
        raise ValueError(f"the table of {name} clips {what}: there is nothing to listen to")
    return table


def _side(name, table, out_dir, per_class, seed):
    shown = table
    if len(table) > per_class:
        shown = table.sample(per_class, random_state=seed).sort_index()
    cards = [_card(row, name, out_dir) for row in shown.to_dict("records")]
    return {"name": name, "n": len(table), "cards": cards}


# what every clip table and generated table has: shown in its place on a card, or not at all
_USUAL = {
    *(set(GENERATED_COLUMNS) - {"score", "lufs"}),
    *("fold", "source_id", "dataset", "split", "seed", "candidate_of"),
}


def _card(row, side, out_dir):
    extra = {key: value for key, value in row.items() if key not in _USUAL and not _empty(value)}
    numbers = {key: value for key, value in extra.items() if _is_number(value)}
    marks = {key: value for key, value in extra.items() if isinstance(value, (bool, np.bool_))}
    words = {k: str(v) for k, v in extra.items() if k not in numbers and k not in marks}
    words |= {"marked": ", ".join(key for key, value in marks.items() if value)} if marks else {}
    sound, picture, seconds = _files(Path(row["path"]), out_dir)
    text = str(row.get("prompt", "")) if side == "synthetic" else ""
    return {
        "id": str(row["clip_id"]),
        "side": side,
        "family": str(row.get("prompt_family", "")) if side == "synthetic" else "",
        "text": text,
        "numbers": {key.replace("_", " "): float(value) for key, value in numbers.items()},
        "words": {key.replace("_", " "): value.replace("_", " ") for key, value in words.items()},
        "sound": sound,
        "picture": picture,
        "seconds": seconds,
    }


def _empty(value):
    return value is None or (_is_number(value) and not np.isfinite(float(value))) or value is pd.NA


def _is_number(value):
    return isinstance(value, (int, float, np.number)) and not isinstance(value, (bool, np.bool_))


def _files(path, out_dir):
    """Sound and picture of a clip, under names that follow from its content."""
    import soundfile as sf

    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise audio.AudioError(
            f"{path}: cannot be read ({error}); was the run moved, or its audio deleted?"
        ) from error
    sound, picture = out_dir / "sounds" / f"{digest}.flac", out_dir / "pictures" / f"{digest}.png"
    if not (sound.is_file() and picture.is_file()):
        y, rate = audio.load_audio(path, PAGE_RATE)
        buffer = io.BytesIO()
        sf.write(buffer, np.clip(y, -1, 1), rate, format="FLAC", subtype="PCM_16")
        store.write_atomic(sound, buffer.getvalue())
        store.write_atomic(picture, _picture(y, rate))
    seconds = sf.info(sound).duration
    parts = [file.relative_to(out_dir).as_posix() for file in (sound, picture)]
    return *parts, round(seconds, 2)


def _picture(y, rate):
    from matplotlib import pyplot as plt

    mel = audio.log_mel(audio.fix_length(y, max(len(y), 1024), "pad"), rate)
    width = max(1, len(mel) // PICTURE_FRAMES)
    mel = mel[: len(mel) // width * width].reshape(-1, width, mel.shape[1]).mean(axis=1)
    buffer = io.BytesIO()
    # one scale for all pictures, so that they can be compared
    plt.imsave(
        buffer,
        mel.T[::-1],
        cmap="magma",
        vmin=-8,
        vmax=2,
        format="png",
        metadata={"Software": None},
    )
    return buffer.getvalue()
