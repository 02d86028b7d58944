"""The pairs the guard learns from: made of data that may be shipped, and of edits and rewordings of our own.

Sources, each a name on the pair:

    blocks    data/blocks.txt: a block is about one subject, a line of it holds rewordings of one question. Two of a line
              deserve one answer, two of different lines do not.
    polite    a question and the same with words of courtesy around it.
    trifle    a question and the same with a trifle changed: an article, a pronoun, a contraction.
    opening   a wish in the openings that ask for how to do it, or for why; and in two that ask for different things.
    scope     a question and the same with a narrower scope: another answer.
    swap      a question and the same with one word of another question: another answer.
    intents   Banking77 and CLINC150 (data/intents.tsv.xz): each question with its nearest neighbour among half of the
              others, as in a cache. Other intent: another answer. Same intent: weak evidence for one answer; it is taken
              only if what sets the two apart are words that are common within the intent, so no name of a place or a song.
              Pairs of two intents that one answer does for all the same (data/reviewed.tsv: those that scored high were
              read by hand) are left out.
"""

from __future__ import annotations

import lzma
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from proxy.policy.reading import read
from scripts.guard.vectors import Vectors

DATA = Path(__file__).parent / "data"


class Pair(NamedTuple):
    """Two questions, and whether one answer will do for both (1) or not (0)."""

    a: str
    b: str
    label: int
    source: str
    group: str
    """What must not be divided between training and calibration: the block, the intent."""


class Asked(NamedTuple):
    """A question of the intents' data."""

    source: str
    part: str
    intent: str
    text: str


_POLITE = (
    "Please tell me: {}",
    "Hello! {} Thanks!",
    "Hi, can you tell me this: {}",
    "{} Thank you.",
    "Could you help me? {}",
    "Quick question: {}",
    "I was wondering: {}",
    "{} Please explain.",
)

_TRIFLES = (
    (" the ", " "), (" a ", " the "), (" a ", " "), (" my ", " the "), ("What is", "What's"), ("How do I", "How can I"),
    ("How do I", "How do you"), ("Is it", "Is it really"), ("Which", "What"), ("What is", "What exactly is"),
    ("Why do", "Why exactly do"), ("Why does", "Why would"), ("Can you", "Could you"), ("Should I", "Should one"),
    ("What are", "What are some"), ("What should I", "What should one"), ("How long does it", "How long will it"),
    ("?", ""), ("How can I", "How could I"), ("on ", "on the "), ("Do I", "Do we"),
)  # fmt: skip

_SCOPES = (
    "for beginners", "for children", "in Germany", "in California", "at night", "in winter", "on Linux", "on a small budget",
    "without the internet", "for a large company", "while pregnant", "in a wheelchair", "after surgery", "at high altitude",
    "for professionals", "in the Middle Ages", "in five minutes", "by law", "with diabetes", "for free", "as a student",
    "in a rented flat", "on a plane", "under water", "for left-handed people", "in rural areas", "during a pandemic",
    "for seniors", "in Spanish", "on an old phone",
)  # fmt: skip

_WISHES = (
    "bake a chocolate cake", "draw a portrait", "repair a bicycle tyre", "build a bookshelf", "sew a dress", "tie a bow tie",
    "install a dishwasher", "brew beer", "whistle with two fingers", "juggle three balls", "paint a ceiling", "prune roses",
    "compress a video", "format a hard drive", "rename a branch", "parse a log file", "deploy a web server", "resize an image",
    "plot a histogram", "measure humidity", "calm a crying baby", "plan a wedding", "memorise a speech", "sell a used car",
    "rent a boat", "adopt a hamster", "file a patent", "report a scam", "lower cholesterol", "treat a sunburn",
    "heal a sprained ankle", "quit smoking", "stretch before dancing", "cook quinoa", "peel a mango", "ferment cabbage",
    "season a cast iron pan", "descale a kettle", "polish silver", "wax a surfboard", "tune a ukulele", "read sheet music",
    "write a limerick", "publish a novel", "edit a podcast", "record vocals", "animate a cartoon", "carve a pumpkin",
    "knit a scarf", "fold a paper crane", "catch a trout", "pitch a tent", "navigate by stars", "sail upwind",
    "land a drone", "drive on ice", "park a trailer", "jump start a truck", "change spark plugs", "insulate an attic",
)  # fmt: skip

_HOW_TO = (
    "How do I {}?", "How can I {}?", "What is the best way to {}?", "How to {}", "How should I {}?", "How do you {}?",
    "I want to {}. How do I do that?", "What is the easiest way to {}?", "Can you tell me how to {}?",
    "What are the steps to {}?", "Please explain how to {}.", "What do I have to do to {}?", "Is there a way to {}?",
    "What are good ways to {}?", "Tips to {}", "I would like to know how to {}.",
)  # fmt: skip
_WHY = ("Why should I {}?", "What is the reason to {}?", "Why do people {}?", "What makes people {}?")
_COUNT = ("How much does it cost to {}?", "What is the price to {}?")
_LONG = ("How long does it take to {}?", "How much time do I need to {}?")
_WHEN = ("When should I {}?", "What is the best time to {}?")
_MAY = ("Is it legal to {}?", "Am I allowed to {}?")
_WISH_OPENINGS: tuple[tuple[str, ...], ...] = (_HOW_TO, _WHY, _COUNT, _LONG, _WHEN, _MAY)


def blocks() -> list[list[list[str]]]:
    """Blocks of lines of rewordings."""
    found = (DATA / "blocks.txt").read_text("utf-8").strip().split("\n\n")
    return [[line.split("|") for line in block.split("\n")] for block in found]


def intents() -> list[Asked]:
    """The questions of Banking77 and CLINC150, sorted."""
    lines = lzma.decompress((DATA / "intents.tsv.xz").read_bytes()).decode().splitlines()
    return [Asked(*line.split("\t")) for line in lines]


def _reviewed() -> set[frozenset[str]]:
    """Pairs of different intents that deserve one answer all the same."""
    lines = (DATA / "reviewed.tsv").read_text("utf-8").splitlines()
    return {frozenset(line.split("\t")) for line in lines}


def own_pairs(seed: int) -> list[Pair]:
    """All pairs but those of the intents' data."""
    chance = random.Random(seed)
    found = [*_of_blocks(chance), *_of_wishes(chance)]
    questions = [(line[0], f"block {number}") for number, block in enumerate(blocks()) for line in block]
    words = [shown for text, _ in questions for shown in _heavy(text).values()]
    for text, group in questions:
        found += [Pair(text, form.format(text), 1, "polite", group) for form in chance.sample(_POLITE, 2)]
        changed = {text.replace(old, new, 1) for old, new in _TRIFLES} - {text}
        found += [
            Pair(text, other, 1, "trifle", group) for other in chance.sample(sorted(changed), min(3, len(changed)))
        ]
        bare = text.rstrip("?.")
        found += [
            Pair(text, f"{bare} {scope}{text[len(bare) :]}", 0, "scope", group) for scope in chance.sample(_SCOPES, 4)
        ]
        for shown in list(_heavy(text).values())[:2]:
            found.append(Pair(text, text.replace(shown, chance.choice(words)), 0, "swap", group))
    return [pair for pair in found if pair.a != pair.b]


def _heavy(text: str) -> dict[str, str]:
    reading = read(text)
    return {word: shown for word, shown in reading.shown.items() if word not in reading.fillers}


def _of_blocks(chance: random.Random) -> Iterator[Pair]:
    for number, block in enumerate(blocks()):
        group = f"block {number}"
        for line in block:
            yield from (Pair(a, b, 1, "blocks", group) for a, b in combinations(line, 2))
        for one, other in combinations(block, 2):
            several = [(a, b) for a in one for b in other]
            yield from (Pair(a, b, 0, "blocks", group) for a, b in chance.sample(several, min(5, len(several))))


def _of_wishes(chance: random.Random) -> Iterator[Pair]:
    for wish in _WISHES:
        for openings in _WISH_OPENINGS:
            several = list(combinations(openings, 2))
            for one, other in chance.sample(several, min(4, len(several))):
                yield Pair(one.format(wish), other.format(wish), 1, "opening", wish)
        for openings, others in chance.sample(list(combinations(_WISH_OPENINGS, 2)), 5):
            yield Pair(chance.choice(openings).format(wish), chance.choice(others).format(wish), 0, "opening", wish)
        for other_wish in chance.sample(_WISHES, 3):
            one, other = chance.sample(_HOW_TO, 2)
            if other_wish != wish:
                yield Pair(one.format(wish), other.format(other_wish), 0, "opening", wish)


def neighbours(vectors: Vectors, seed: int) -> list[Pair]:
    """Half of the intents' questions, each with its nearest neighbour in the other half of the same data."""
    chance = random.Random(seed)
    found: list[Pair] = []
    everything = intents()
    habits = _habits(everything)
    reviewed = _reviewed()
    for source in ("banking", "clinc"):
        asked = [one for one in everything if one.source == source]
        chance.shuffle(asked)
        middle = len(asked) // 2
        cached = asked[middle:]
        matrix = np.stack([vectors[one.text] for one in cached])
        for start in range(0, middle, 1000):
            part = asked[start : min(start + 1000, middle)]
            nearest = (np.stack([vectors[one.text] for one in part]) @ matrix.T).argmax(axis=1)
            for one, place in zip(part, nearest, strict=True):
                pair = _judged(one, cached[place], habits)
                if pair is not None and frozenset((pair.a, pair.b)) not in reviewed and pair.a != pair.b:
                    found.append(pair)
    return found


def _habits(everything: list[Asked]) -> dict[str, Counter[str]]:
    """How many questions of an intent have a word; "" counts the questions."""
    habits: dict[str, Counter[str]] = defaultdict(Counter)
    for one in everything:
        habits[one.intent].update({"", *read(one.text).content})
    return habits


def _judged(one: Asked, other: Asked, habits: dict[str, Counter[str]]) -> Pair | None:
    """The pair with its weak label; None where there is none to be had."""
    if one.intent != other.intent:
        return Pair(one.text, other.text, 0, "intents", one.intent)
    habit = habits[one.intent]
    if one.intent == "oos":
        return None
    apart = _heavy(one.text).keys() ^ _heavy(other.text).keys()
    if all(habit[word] >= 0.03 * habit[""] for word in apart):
        return Pair(one.text, other.text, 1, "intents", one.intent)
    return None
