"""Words for sounds: captions of mixes and prompts of classes, from two small tables.

``lexicon.csv`` has one row per class or scene: its wordings, where it is heard and how far away,
with which classes it is confused, its AudioSet id. ``phrases.csv`` has the forms of sentences and the
words for places, distances and microphones. A class that the lexicon lacks is named by its label, or
in words of one's own (:func:`add_words`).

Texts are drawn by a seed: the same class, scene and seed give the same text on every machine, and a
longer list of texts begins with the shorter one.
"""

import hashlib
import itertools
import math
import re
import string
from pathlib import Path

import numpy as np
import pandas as pd

from soundscapes_utils import store

NEGATIVE_PROMPT = "low quality, average quality"
FAMILIES = ("label", "simple", "gpt", "varied", "task")


def _read(name):
    return store.read_table(Path(__file__).with_name(name))


def _lexicon(kind):
    rows = _read("lexicon.csv").set_index("label", drop=False).query("kind == @kind")
    rows = rows.to_dict("index")
    for row in rows.values():
        for slot in ("clause", "noun"):  # the usual wording first
            row[slot] = [row[name] for name in (slot, f"{slot}_2", f"{slot}_3") if row[name]]
    return rows


# label: its row of the lexicon, with lists of wordings under "clause" and "noun"
EVENTS, SCENES = _lexicon("event"), _lexicon("scene")
OWN = {}  # label: noun and clause of one's own, where there are any
# The forms "simple" and "gpt" are the prompts of Ronchini et al. (arXiv 2403.17864) word for word ("a
# urban" is theirs). "Mind the prompt" (arXiv 2504.03329) found that "task" serves classifiers best.
PHRASES = _read("phrases.csv").groupby(["kind", "key"])["text"].agg(list).to_dict()
VARIED_TEMPLATES = PHRASES["form", "varied first"]  # the built-in model was trained on these
# what a generator adds unasked, unless the lexicon says that the class contains it
UNWANTED = ("music", "speech")


def tidy(label):
    """Turn a class name as data sets write it into words: ``Glass_breaking``, ``glassBreaking``."""
    humps = r"(?<=[a-zß-ÿ])(?=[A-ZÀ-Þ])|(?<=[A-Z])(?=[A-Z][a-z]{2})"
    words = " ".join(re.sub(f"[_-]|{humps}", " ", str(label)).lower().split())
    if not words:
        raise ValueError(f"label {label!r} holds no word; give every clip a class name")
    return words


def _event(label):
    if label in EVENTS:
        return EVENTS[label]
    words = _with_article(tidy(label))
    row = dict.fromkeys(("several", "study_phrase", "confused_with", "contains"), "")
    row |= {"setting": "anywhere", "range": "near", "microphone": "any", "urbansound8k": math.nan}
    row |= {"clause": [f"{words} can be heard"], "noun": [f"the sound of {words}"]}
    return row | {"label": label, "phrase": words}


def _with_article(words):
    head, _, last = words.rpartition(" ")
    if re.fullmatch(r"\w*[aeiouy]\w*ing", last) and last not in ("building", "ceiling"):
        return f"{head and _with_article(head)} {last}".strip()  # a door creaking, water dripping
    plural = re.search(r"[^isu]s$", last) and last not in ("gas", "lens")
    if plural or last in PHRASES["article", "none"] or re.match(r"(an?|the|some|my|our|\d+)\b", words):
        return words
    vowel = r"(?!eu|uk|uni(?!n)|us[aeiu]|ut[ei]|one\b)[aeiou]|hour|honest|heir"
    return f"{'an' if re.match(vowel, words) else 'a'} {words}"


def _doing(clause):
    # "a dog is barking" names the sound as "a dog barking"
    clause = clause.replace(" is ", " ", 1).replace(" are ", " ", 1)
    return clause.removesuffix(" can be heard")


def add_words(path):
    """Word classes and scenes of one's own, in all that this process writes: a CSV, or "" for none.

    Columns ``label, noun, clause``: "forkliftBeep, the beep of a forklift, a forklift is beeping"; of a
    scene "hall_2, a warehouse, in a warehouse". What it does not list is worded by its label. A table
    without these columns, or with an empty cell, is a DataError that names file and row.
    """
    if not path:
        return
    table = store.read_table(path := store.project_path(path), as_text=True)
    table = table.map(lambda text: " ".join(text.split()))
    store.check_rows(table, path, label="text", noun="text", clause="text")
    for label, noun, clause in table[["label", "noun", "clause"]].itertuples(index=False):
        place = re.match(r"(in|on|at|by|near|inside|outside|under|beside|behind|with|next)\b", clause)
        said = f"{noun} can be heard" if place else clause
        own = {"noun": [noun], "clause": [said], "phrase": _doing(said), "study_phrase": ""}
        EVENTS[label] = _event(label) | own | {"several": ""}
        OWN[label] = [noun, clause]
        where = clause if place else f"with {noun} around"
        SCENES[label] = SCENES.get(label, {}) | {"noun": [noun], "clause": [where], "phrase": noun}


# --- captions of mixes ---------------------------------------------------------------------------


def mix_captions(labels, scene, seed, n=3):
    """Caption a mix in `n` ways, all different: a tuple of str.

    `labels` is the class of the foreground, or of several events each class once, in their order. The
    form of Gaurav et al.'s report, the form of the DCASE challenge, a paraphrase, and from the fourth on
    further sentences with synonyms; `seed` chooses the paraphrase and what follows it.

    >>> for text in mix_captions("dog", "park", seed=0, n=2):
    ...     print(text)
    dog barking with the sound of park in background
    a dog is barking with a park in the background
    """
    labels = [labels] if isinstance(labels, str) else list(dict.fromkeys(labels))
    if not labels or n < 1:
        raise ValueError(f"need at least one label and n of at least 1, got {labels} and n={n}")
    events, where = [_event(label) for label in labels], _with_article(tidy(scene))
    words = SCENES.get(scene) or {"noun": [where], "clause": [f"with {where} around"], "phrase": where}
    where = words["phrase"] or tidy(scene)
    slots = {"scene": words["noun"], "place": words["clause"]}
    usual, several = {"place": words["clause"][0]}, {"scene": "{scene}", "place": "{place}"}
    for slot in ("clause", "noun"):
        usual[slot] = _listed([event[slot][0] for event in events])
        # with two events, the slot "clause" becomes "clause0 and clause1"
        slots |= {f"{slot}{i}": event[slot] for i, event in enumerate(events)}
        several[slot] = _listed([f"{{{slot}{i}}}" for i in range(len(events))])
    paraphrases = PHRASES["form", "paraphrase"]
    first = (
        f"{_listed([event['phrase'] for event in events])} with the sound of {where} in background",
        f"{usual['clause']} with {words['noun'][0]} in the background",
        paraphrases[np.random.default_rng(seed).integers(len(paraphrases))].format(**usual),
    )
    if n <= len(first):
        return first[:n]
    forms = [form.format(**several) for form in PHRASES["form", "caption"]]
    more = _sentences(forms, slots, np.random.default_rng([seed, 1]), first)
    return tuple(_take(itertools.chain(first, more), n, f"{', '.join(labels)} with {scene}"))


def _listed(words):
    *head, last = words
    return f"{', '.join(head)} and {last}" if head else last


def _sentences(forms, slots, rng, known=()):
    """Yield every sentence of the forms once, in random order, except those that are `known`."""
    fields = [[f for _, f, _, _ in string.Formatter().parse(form) if f] for form in forms]
    sizes = [math.prod(len(slots[field]) for field in names) for names in fields]
    ends = np.cumsum(sizes)
    # drawn one by one, so that a longer list begins with the shorter one
    ranks, known = set(), set(known)
    while len(ranks) < ends[-1]:
        rank = int(rng.integers(ends[-1]))
        if rank in ranks:
            continue
        ranks.add(rank)
        i = int(np.searchsorted(ends, rank, side="right"))
        words, rest = {}, rank - int(ends[i]) + sizes[i]
        for field in fields[i]:
            rest, number = divmod(rest, len(slots[field]))
            words[field] = slots[field][number]
        text = forms[i].format(**words)
        if text not in known:
            known.add(text)
            yield text


def _take(texts, n, what):
    texts = list(itertools.islice(texts, n))
    if len(texts) < n:
        known = f"the lexicon has {len(texts)} different texts, {n} are wanted"
        raise ValueError(f"{what}: {known}; ask for fewer")
    return texts


def caption_columns(table):
    """Name the caption columns of a table in order: ``caption``, ``caption_2``, …"""
    names = [name for name in table if re.fullmatch(r"caption(_\d+)?", str(name))]
    return sorted(names, key=lambda name: int(name.removeprefix("caption")[1:] or 1))


# --- prompts of classes --------------------------------------------------------------------------


def prompts(labels, family="simple", n=1, seed=0):
    """Write the prompts of each class for a text-to-audio model.

    Families: "label", the bare class name; "simple", "gpt", the two prompts of Ronchini et al., word for
    word; "varied", different sentences without repetition; "task", number, place, distance and
    microphone, in rounds; or a table (CSV) of columns ``label, prompt`` that a person or a language
    model has written, whose stem is the family. `n` prompts per class (the families of one sentence
    repeat it); `seed` orders "varied" and "task". Columns ``label, prompt, prompt_family``; a class's
    rows depend on its name, the family and the seed alone.
    """
    labels = list(labels)
    if n < 1 or not labels or len(set(labels)) < len(labels):
        raise ValueError(f"need n of at least 1 and each label once, got n={n}, labels={labels}")
    if family in FAMILIES:
        rows = [(label, text, family) for label in labels for text in _texts(label, family, n, seed)]
        return pd.DataFrame(rows, columns=["label", "prompt", "prompt_family"])
    if Path(family).suffix != ".csv":
        known = ", ".join(FAMILIES)
        raise ValueError(f"unknown prompt family {family!r}; choose one of {known}, or a table (.csv)")
    return _written_prompts(Path(family), labels, n)


def _written_prompts(path, labels, n):
    table = store.read_table(path, as_text=True)
    store.check_rows(table, path, label="text", prompt="text")
    table = table[["label", "prompt"]].map(lambda text: " ".join(text.split()))
    table = table.drop_duplicates().assign(prompt_family=path.stem)
    for label in labels:
        if (count := (table["label"] == label).sum()) < n:
            raise store.DataError(f"{path}: {count} prompts for {label}, {n} are wanted")
    return pd.concat([table[table["label"] == label].head(n) for label in labels], ignore_index=True)


def _texts(label, family, n, seed):
    words = _event(label)
    doing = _doing(words["clause"][0])
    if family == "label":
        return [tidy(label)] * n
    if family in ("simple", "gpt"):
        text = PHRASES["form", family][0].format(x=words["study_phrase"] or doing)
        context = f" {PHRASES['context', family][0]}" if words["study_phrase"] else ""
        return [f"{text}{context}."] * n
    # keyed by the name, so that adding a class changes no other class's prompts
    key = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little")
    several = [words["several"]] if words["several"] else []
    slots = {kind: PHRASES[kind, words[kind]] for kind in ("setting", "range", "microphone")}
    if family == "task":
        slots["clause"] = [words["clause"][0], *several]
        rng = np.random.default_rng([seed, key, 1])
        rounds = (_sentences(PHRASES["form", "task"], slots, rng) for _ in itertools.count())
        return list(itertools.islice(itertools.chain.from_iterable(rounds), n))
    usual = {"clause": words["clause"][0], "noun": words["noun"][0], "x": doing}
    for slot in ("close", "away", "outside"):  # where a class that is heard so far off can be
        usual[slot] = PHRASES.get((slot, words["range"]), PHRASES[slot, "any"])[0]
    templates = np.random.default_rng([seed, key]).permutation(VARIED_TEMPLATES)
    first = list(dict.fromkeys(template.format(**usual) for template in templates))
    slots["rest"] = PHRASES["rest", "any"]
    start = {"setting": " ", "microphone": ", recorded with "}
    slots = {kind: ["", *(start.get(kind, ", ") + t for t in slots[kind])] for kind in slots}
    slots |= {"clause": words["clause"] + several, "noun": words["noun"]}
    more = _sentences(PHRASES["form", "varied"], slots, np.random.default_rng([seed, key, 2]), first)
    return _take(itertools.chain(first, more), n, label)


def negative_prompt(label=None, confusions=False):
    """Say what a class should not sound like: poor quality, and what it does not contain.

    With `confusions`, the classes that it is often confused with are named, too.
    """
    words = _event(label) if label else None
    unwanted = [what for what in UNWANTED if words and what not in words["contains"].split()]
    if words and confusions:
        unwanted += [EVENTS[name]["phrase"] for name in words["confused_with"].split()]
    return ", ".join([NEGATIVE_PROMPT, *unwanted])
