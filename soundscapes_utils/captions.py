"""Words for sounds: captions of mixes and prompts of classes, from two small tables.

``lexicon.csv`` has one row per class or scene: its wordings, where it is heard and how far away,
with which classes a listener confuses it, its AudioSet id. ``phrases.csv`` has the words for places,
distances and microphones. A class that the lexicon lacks is named by its own label.

Every text is drawn by a seed from a list of sentence forms, so that the same class, scene and seed
give the same text on every machine, and a longer list of texts begins with the shorter one.
"""

import hashlib
import itertools
import math
import re
import string
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from soundscapes_utils import store

HERE = Path(__file__).parent
NEGATIVE_PROMPT = "low quality, average quality"
FAMILIES = ("label", "simple", "gpt", "varied", "task")

# forms of a mix's third caption, and of those from the fourth on
PARAPHRASES = (
    "{clause} {place}",
    "{place}, {clause}",
    "{noun}, heard {place}",
    "one can hear {noun} {place}",
)
CAPTION_FORMS = (
    "{clause} {place}",
    "{place}, {clause}",
    "{clause} with {scene} in the background",
    "with {scene} in the background, {clause}",
    "{clause}, and {scene} can be heard behind",
    "{noun}, heard {place}",
    "one can hear {noun} {place}",
    "{scene} in the background of {noun}",
    "{noun} with {scene} in the background",
    "a recording of {noun} {place}",
)
# Prompts of Ronchini et al. (arXiv 2403.17864), word for word ("a urban" is theirs); a class that
# they do not have goes without its context.
STUDY_TEMPLATES = {
    "simple": ("A clear sound of {x}", " in a urban context"),
    "gpt": (
        "Generate a realistic audio representation of the sound of {x}",
        " in a urban environment",
    ),
}
# "varied" begins with these, which the built-in model was trained on, and goes on with the next
VARIED_TEMPLATES = (
    "{clause}",
    "{noun}",
    "the sound of {x}",
    "a recording of {noun}",
    "{clause} close to the microphone",
    "{clause} in the distance",
    "{noun}, recorded outdoors",
    "a clear recording of {x}",
    "the sound of {x} and nothing else",
    "{clause} in a quiet place",
)
VARIED_FORMS = tuple(
    start + "{setting}{range}{microphone}{rest}"
    for start in (
        "{clause}",
        "a recording in which {clause}",
        "audio of a scene where {clause}",
        "{noun}",
        "a recording of {noun}",
        "a clear recording of {noun}",
        "a field recording of {noun}",
    )
)
VARIED_PREFIXES = {
    "setting": " ",
    "range": ", ",
    "microphone": ", recorded with ",
    "rest": ", ",
}
# "Mind the prompt" (arXiv 2504.03329) found that task-specific prompts serve classifiers best
TASK_FORMS = ("{clause} {setting}, {range}, recorded with {microphone}",)
# what a generator adds unasked, and the classes that contain it
UNWANTED = {
    "music": ("street_music", "church_bells"),
    "speech": ("street_music", "children_playing", "laughing", "crying_baby"),
}


def _lexicon(kind):
    table = store.read_table(HERE / "lexicon.csv")
    rows = table[table["kind"] == kind].set_index("label", drop=False).to_dict("index")
    for row in rows.values():
        for slot in ("clause", "noun"):  # the usual wording first
            row[slot] = [text for text in (row[slot], row[f"{slot}_2"], row[f"{slot}_3"]) if text]
    return rows


# label: its row of the lexicon, with lists of wordings under "clause" and "noun"
EVENTS, SCENES = _lexicon("event"), _lexicon("scene")
PHRASES = (
    store.read_table(HERE / "phrases.csv").groupby(["kind", "key"])["text"].agg(list).to_dict()
)


def tidy(label):
    """Turn a class name as data sets write it into words.

    Raises
    ------
    ValueError
        If no word is left.

    Examples
    --------
    >>> tidy("Glass_breaking")
    'glass breaking'
    """
    words = " ".join(str(label).replace("_", " ").replace("-", " ").lower().split())
    if not words:
        raise ValueError(f"label {label!r} holds no word; give every clip a class name")
    return words


def _event(label):
    if label in EVENTS:
        return EVENTS[label]
    words = tidy(label)
    return {
        "phrase": words,
        "clause": [f"{words} can be heard"],
        "noun": [f"the sound of {words}"],
        "setting": "anywhere",
        "range": "near",
        "microphone": "any",
    } | dict.fromkeys(("several", "study_phrase", "confused_with"), "")


def _scene(scene):
    words = tidy(scene)
    return SCENES.get(scene) or {"noun": [words], "clause": [f"with {words} around"]}


# --- captions of mixes ---------------------------------------------------------------------------


def mix_captions(labels, scene, seed, n=3):
    """Caption a mix in several ways.

    Parameters
    ----------
    labels : str or list of str
        Class of the foreground; of several events each class once, in their order.
    scene : str
        Class of the background.
    seed : int
        Chooses among the paraphrases.
    n : int, optional
        How many captions.

    Returns
    -------
    tuple of str
        All different: the form of Gaurav et al.'s report, the form of the DCASE challenge, a
        paraphrase, and from the fourth on further sentences with synonyms.

    Raises
    ------
    ValueError
        If the lexicon has fewer than `n` texts.

    Examples
    --------
    >>> for text in mix_captions("dog", "park", seed=0, n=2):
    ...     print(text)
    dog barking with the sound of park in background
    a dog is barking with a park in the background
    """
    labels = [labels] if isinstance(labels, str) else list(dict.fromkeys(labels))
    if not labels or n < 1:
        raise ValueError(f"need at least one label and n of at least 1, got {labels} and n={n}")
    events, where = [_event(label) for label in labels], _scene(scene)
    clause, noun = (_listed([event[slot][0] for event in events]) for slot in ("clause", "noun"))
    paraphrase = PARAPHRASES[np.random.default_rng(seed).integers(len(PARAPHRASES))]
    first = (
        f"{_listed([event['phrase'] for event in events])} with the sound of {tidy(scene)} in "
        "background",
        f"{clause} with {where['noun'][0]} in the background",
        paraphrase.format(clause=clause, noun=noun, place=where["clause"][0]),
    )
    if n <= len(first):
        return first[:n]
    # with several events, the slot "clause" becomes "clause0 and clause1"
    slots, lists = {"scene": where["noun"], "place": where["clause"]}, {}
    for slot in ("clause", "noun"):
        slots |= {f"{slot}{i}": event[slot] for i, event in enumerate(events)}
        lists[slot] = _listed([f"{{{slot}{i}}}" for i in range(len(events))])
    forms = [form.format(**lists, scene="{scene}", place="{place}") for form in CAPTION_FORMS]
    more = _sentences(forms, slots, np.random.default_rng([seed, 1]), first)
    return tuple(_take(itertools.chain(first, more), n, f"{', '.join(labels)} with {scene}"))


def _listed(words):
    *head, last = words
    return f"{', '.join(head)} and {last}" if head else last


@lru_cache(maxsize=256)
def _fields(form):
    return [field for _, field, _, _ in string.Formatter().parse(form) if field]


def _sentences(forms, slots, rng, known=()):
    """Yield every sentence of the forms once, in random order, except those that are `known`."""
    sizes = [math.prod(len(slots[field]) for field in _fields(form)) for form in forms]
    # drawn one by one, so that a longer list begins with the shorter one
    ranks, known = set(), set(known)
    while len(ranks) < sum(sizes):
        rank = int(rng.integers(sum(sizes)))
        if rank in ranks:
            continue
        ranks.add(rank)
        text = _sentence(forms, sizes, slots, rank)
        if text not in known:
            known.add(text)
            yield text


def _sentence(forms, sizes, slots, rank):
    """Put one of all combinations into words: the `rank`-th."""
    for form, size in zip(forms, sizes, strict=True):
        if rank < size:
            words = {}
            for field in _fields(form):
                rank, number = divmod(rank, len(slots[field]))
                words[field] = slots[field][number]
            return form.format(**words)
        rank -= size
    raise IndexError("rank beyond the last sentence")


def _take(texts, n, what):
    texts = list(itertools.islice(texts, n))
    if len(texts) < n:
        raise ValueError(
            f"{what}: the lexicon has {len(texts)} different texts, {n} are wanted; ask for fewer"
        )
    return texts


def caption_columns(table):
    """Name the caption columns of a table in order: ``caption``, ``caption_2``, …

    Examples
    --------
    >>> caption_columns(pd.DataFrame(columns=["caption_10", "caption_2", "caption", "captions"]))
    ['caption', 'caption_2', 'caption_10']
    """
    names = [name for name in table if re.fullmatch(r"caption(_\d+)?", str(name))]
    return sorted(names, key=lambda name: int(name.removeprefix("caption")[1:] or 1))


# --- prompts of classes --------------------------------------------------------------------------


def prompts(labels, family="simple", n=1, seed=0):
    """Write the prompts of each class for a text-to-audio model.

    Parameters
    ----------
    labels : iterable of str
        Each class once.
    family : str or path-like
        ``"label"``: the bare class name. ``"simple"``, ``"gpt"``: the two prompts of Ronchini et
        al., word for word. ``"varied"``: different sentences without repetition. ``"task"``:
        number, place, distance and microphone, in rounds. Or a table for :func:`read_prompts`.
    n : int
        How many prompts per class; the families of one sentence repeat it.
    seed : int
        Order of "varied" and "task".

    Returns
    -------
    pandas.DataFrame
        Columns ``label, prompt, prompt_family``; a class's rows depend on its name, the family
        and the seed alone.

    Raises
    ------
    ValueError
        If the family is unknown, or has fewer than `n` prompts of a class.

    Examples
    --------
    >>> prompts(["siren"], "simple")["prompt"].item()
    'A clear sound of a siren coming from an emergency vehicle in a urban context.'
    """
    labels = list(labels)
    if n < 1 or not labels or len(set(labels)) < len(labels):
        raise ValueError(f"need n of at least 1 and each label once, got n={n}, labels={labels}")
    if family in FAMILIES:
        rows = [
            (label, text, family) for label in labels for text in _texts(label, family, n, seed)
        ]
        return pd.DataFrame(rows, columns=["label", "prompt", "prompt_family"])
    if not Path(family).suffix:
        raise ValueError(
            f"unknown prompt family {family!r}; choose one of {', '.join(FAMILIES)}, or a table "
            "of prompts (.csv or .parquet)"
        )
    table = read_prompts(family)
    for label in labels:
        if (count := (table["label"] == label).sum()) < n:
            raise store.DataError(f"{family}: {count} prompts for {label}, {n} are wanted")
    return pd.concat(
        [table[table["label"] == label].head(n) for label in labels], ignore_index=True
    )


def read_prompts(path):
    """Read prompts that a person or a language model has written.

    Parameters
    ----------
    path : path-like
        CSV or Parquet with columns ``label, prompt``.

    Returns
    -------
    pandas.DataFrame
        Columns ``label, prompt, prompt_family`` (the file's stem); a prompt that occurs twice is
        there once.

    Raises
    ------
    store.DataError
        If a column is missing or a cell is empty; the message names the row.
    """
    table = store.read_table(path)
    if not {"label", "prompt"} <= set(table):
        raise store.DataError(f"{path}: needs columns label, prompt, has {', '.join(table)}")
    table = table[["label", "prompt"]].map(lambda text: " ".join(str(text).split()))
    if (empty := (table == "").any(axis=1)).any():
        raise store.DataError(f"{path}: row {empty.idxmax() + 1} has no label or no prompt")
    return table.drop_duplicates(ignore_index=True).assign(prompt_family=Path(path).stem)


def _texts(label, family, n, seed):
    words = _event(label)
    # "a dog is barking" names the sound as "a dog barking"
    doing = words["clause"][0].replace(" is ", " ", 1).replace(" are ", " ", 1)
    doing = doing.removesuffix(" can be heard")
    if family == "label":
        return [tidy(label)] * n
    if family in STUDY_TEMPLATES:
        sound, context = STUDY_TEMPLATES[family]
        phrase = words["study_phrase"]
        return [sound.format(x=phrase or doing) + (context if phrase else "") + "."] * n
    # keyed by the name, so that adding a class changes no other class's prompts
    key = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little")
    several = [words["several"]] if words["several"] else []
    slots = {kind: PHRASES[kind, words[kind]] for kind in ("setting", "range", "microphone")}
    if family == "task":
        slots["clause"] = [words["clause"][0], *several]
        rng = np.random.default_rng([seed, key, 1])
        rounds = (_sentences(TASK_FORMS, slots, rng) for _ in itertools.count())
        return list(itertools.islice(itertools.chain.from_iterable(rounds), n))
    templates = np.random.default_rng([seed, key]).permutation(VARIED_TEMPLATES)
    usual = {"clause": words["clause"][0], "noun": words["noun"][0], "x": doing}
    first = list(dict.fromkeys(template.format(**usual) for template in templates))
    slots["rest"] = PHRASES["rest", "any"]
    slots = {kind: ["", *(VARIED_PREFIXES[kind] + t for t in slots[kind])] for kind in slots}
    slots |= {"clause": words["clause"] + several, "noun": words["noun"]}
    more = _sentences(VARIED_FORMS, slots, np.random.default_rng([seed, key, 2]), first)
    return _take(itertools.chain(first, more), n, label)


def negative_prompt(label=None, confusions=False):
    """Say what a class should not sound like: poor recordings, and what it does not contain.

    Parameters
    ----------
    label : str, optional
        Without it, poor quality alone.
    confusions : bool, optional
        Name the classes that it is often confused with, too.

    Examples
    --------
    >>> negative_prompt("dog", confusions=True)
    'low quality, average quality, music, speech, coughing'
    """
    unwanted = [what for what, owners in UNWANTED.items() if label and label not in owners]
    if label and confusions:
        unwanted += [EVENTS[name]["phrase"] for name in _event(label)["confused_with"].split()]
    return ", ".join([NEGATIVE_PROMPT, *unwanted])


# --- variety -------------------------------------------------------------------------------------


def vocabulary(table):
    """Measure how varied the captions of a table are.

    Returns
    -------
    pandas.DataFrame
        One row per caption column, and one of ``all``: number and mean length in words, distinct
        captions, size of the vocabulary, share of distinct words and word pairs (distinct-1 and -2
        of Li et al. 2016), and root type-token ratio, which depends less on the length.
    """
    names = caption_columns(table)
    rows = [{"column": name} | _variety(table[name].dropna()) for name in names]
    if len(names) > 1:
        rows.append({"column": "all"} | _variety(table[names].melt()["value"].dropna()))
    return pd.DataFrame(rows)


def _variety(texts):
    words = [re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower()) for text in texts]
    pairs = [pair for text in words for pair in itertools.pairwise(text)]
    words = list(itertools.chain.from_iterable(words))
    n_words, distinct = max(1, len(words)), len(set(words))
    return {
        "captions": len(texts),
        "distinct": len(set(texts)),
        "mean_length": len(words) / max(1, len(texts)),
        "words": len(words),
        "vocabulary": distinct,
        "distinct_1": distinct / n_words,
        "distinct_2": len(set(pairs)) / max(1, len(pairs)),
        "root_type_token": distinct / math.sqrt(n_words),
    }


def diversity(table, embed):
    """Compare prompt families: how varied are the prompts of each?

    Parameters
    ----------
    table : pandas.DataFrame
        From :func:`prompts`, of one or more families.
    embed : callable
        Texts to vectors, as a CLAP's text tower does.

    Returns
    -------
    pandas.DataFrame
        One row per family: the measures of :func:`vocabulary` (``prompts`` counts them) and
        ``embedding_distance``, the mean cosine distance of two prompts of one class.
    """
    rows = []
    for family, group in table.groupby("prompt_family", sort=False):
        row = {"prompt_family": family} | _variety(group["prompt"])
        row["prompts"] = row.pop("captions")
        rows.append(row | {"embedding_distance": _mean_distance(group, embed)})
    return pd.DataFrame(rows)


def _mean_distance(group, embed):
    texts = list(dict.fromkeys(group["prompt"]))
    vectors = np.asarray(embed(texts), dtype=np.float64)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if lengths.shape != (len(texts), 1) or not (lengths > 0).all():
        raise ValueError(
            f"embed gave an array of shape {vectors.shape} for {len(texts)} texts, or a vector "
            "that is zero or not a number"
        )
    unit = dict(zip(texts, vectors / lengths, strict=True))
    means = []
    for _, of_class in group.groupby("label")["prompt"]:
        if (n := len(of_class)) > 1:
            # the sum over all pairs is the squared length of the sum, less the n pairs with itself;
            # repeated prompts must not end a rounding below zero
            total = np.sum([unit[text] for text in of_class], axis=0)
            means.append(max(0.0, 1 - (total @ total - n) / (n * (n - 1))))
    return float(np.mean(means)) if means else float("nan")


ALL_FAMILIES = FAMILIES  # until every caller says FAMILIES
