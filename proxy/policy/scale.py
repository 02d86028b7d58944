"""Other embedders' similarities on the scale the guard was trained on, that of all-MiniLM-L6-v2.

A cosine belongs to its embedder: one gives unrelated questions 0.1, another 0.8. So whoever uses another embedder embeds
`ANCHORS` once, and `Scale.fit` maps its cosines onto MiniLM's so that the anchors' values have the same distribution:
quantile by quantile, straight lines between them, rising throughout. What is below the first anchor or above the last is
stretched towards -1 and 1. The order of similarities never changes; how well they tell paraphrases apart does not either.

To change an anchor, change its similarity with it: tests/semcache/test_anchors.py embeds them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple, Self


class Anchor(NamedTuple):
    """Two texts, and their cosine by all-MiniLM-L6-v2 (int8)."""

    a: str
    b: str
    similarity: float


ANCHORS: tuple[Anchor, ...] = (
    Anchor("How do I whiten my teeth?", "What is the best way to get whiter teeth?", 0.860),
    Anchor("How can I find a lost phone?", "I lost my phone. How do I find it?", 0.920),
    Anchor("Why is my bread not rising?", "What is the reason my bread does not rise?", 0.945),
    Anchor("How many moons does Jupiter have?", "What is the number of moons of Jupiter?", 0.960),
    Anchor("What does a solicitor do?", "What is the job of a solicitor?", 0.942),
    Anchor("How do I get better at chess?", "What can I do to improve my chess?", 0.881),
    Anchor("Write a toast for a wedding.", "Please write a short speech for a wedding.", 0.647),
    Anchor("How long do turtles live?", "What is the lifespan of a turtle?", 0.918),
    Anchor("What is a good name for a horse?", "Can you suggest names for my horse?", 0.877),
    Anchor("How do I convert a PDF to text?", "Is there a way to turn a PDF into plain text?", 0.806),
    Anchor("Why do leaves fall in autumn?", "What makes trees lose their leaves in autumn?", 0.863),
    Anchor("What is a class in Java?", "Explain classes in Java.", 0.878),
    Anchor("How do I whiten my teeth?", "How do I floss my teeth?", 0.640),
    Anchor("How can I find a lost phone?", "How can I unlock a locked phone?", 0.458),
    Anchor("Why is my bread not rising?", "How do I slice bread evenly?", 0.487),
    Anchor("How many moons does Jupiter have?", "How far is Jupiter from the sun?", 0.638),
    Anchor("What does a solicitor do?", "How do I become a judge?", 0.281),
    Anchor("How do I get better at chess?", "Who is the world champion in chess?", 0.538),
    Anchor("Write a toast for a wedding.", "What should I wear to a wedding?", 0.407),
    Anchor("How long do turtles live?", "What do turtles eat?", 0.706),
    Anchor("What is a good name for a horse?", "How much does a horse cost?", 0.575),
    Anchor("How do I convert a PDF to text?", "How do I sign a PDF?", 0.467),
    Anchor("Why do leaves fall in autumn?", "When should I rake the leaves?", 0.425),
    Anchor("What is a class in Java?", "What is an interface in C#?", 0.355),
    Anchor("How do I whiten my teeth?", "What is a class in Java?", -0.034),
    Anchor("How can I find a lost phone?", "How long do turtles live?", 0.067),
    Anchor("Why is my bread not rising?", "Who is the world champion in chess?", 0.071),
    Anchor("How many moons does Jupiter have?", "How do I sign a PDF?", -0.021),
    Anchor("What does a solicitor do?", "Why do leaves fall in autumn?", 0.041),
    Anchor("How do I get better at chess?", "How much does a horse cost?", 0.034),
    Anchor("Write a toast for a wedding.", "How do I convert a PDF to text?", 0.137),
    Anchor("What is a good name for a horse?", "What is the lifespan of a turtle?", 0.272),
    Anchor("What do turtles eat?", "Explain classes in Java.", 0.095),
    Anchor("How do I slice bread evenly?", "How far is Jupiter from the sun?", 0.078),
    Anchor("How do I floss my teeth?", "What makes trees lose their leaves in autumn?", 0.063),
    Anchor("What should I wear to a wedding?", "How can I unlock a locked phone?", 0.088),
)
"""A third each of rewordings, of questions on one subject, and of questions that have nothing to do with each other."""

_KNOTS = 9


class Scale(NamedTuple):
    """A rising function from an embedder's cosines to MiniLM's, by its knots. Without any: the identity."""

    given: tuple[float, ...] = ()
    wanted: tuple[float, ...] = ()

    @classmethod
    def fit(cls, similarities: Sequence[float]) -> Self:
        """The scale of an embedder by its cosines of `ANCHORS`, in their order.

        ValueError when there are not as many, or when they are all but equal, so that nothing can be told by them.
        """
        if len(similarities) != len(ANCHORS):
            raise ValueError(f"{len(ANCHORS)} similarities are needed, not {len(similarities)}")
        ours = sorted(min(1.0, max(-1.0, similarity)) for similarity in similarities)
        if not ours[-1] - ours[0] > 1e-3:
            raise ValueError("the embedder gives all pairs the same similarity")
        theirs = sorted(anchor.similarity for anchor in ANCHORS)
        given, wanted = [-1.0], [-1.0]
        for knot in range(_KNOTS):
            value, target = (_quantile(values, knot / (_KNOTS - 1)) for values in (ours, theirs))
            if given[-1] < value < 1:
                given.append(value)
                wanted.append(target)
        return cls((*given, 1.0), (*wanted, 1.0))

    def apply(self, cosine: float) -> float:
        """A cosine of the embedder on MiniLM's scale, -1 to 1; what is no number is -1."""
        if cosine != cosine:
            return -1.0
        cosine = min(1.0, max(-1.0, cosine))
        if not self.given:
            return cosine
        place = min(bisect_right(self.given, cosine), len(self.given) - 1)
        low, high = self.given[place - 1], self.given[place]
        start, end = self.wanted[place - 1], self.wanted[place]
        return start + (end - start) * (cosine - low) / (high - low)


def _quantile(values: list[float], share: float) -> float:
    place = share * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)
