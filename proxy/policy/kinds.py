"""What kind of question it is, by how it begins: the same thing can be asked in many openings.

"What is the best way to X", "I would like to know how I can X" and "How do I X" ask for the same: how to. The kinds:

    why  who  where  when       a reason, a person, a place, a time
    count  duration  often      how many or how much, how long, how often
    price  height  distance  …  a measure: "how high is X", "what is the height of X"
    howto                       what to do
    how                         how something works or is
    define                      what something is, what a word means
    what                        any other what or which
    is, can, should, must       yes or no; by the verb, for "can I" and "should I" are not one question
    do                          no question by its form: an order, a statement, keywords

Words of an opening have done their work with the kind; the guard does not compare them again.
"""

from __future__ import annotations

from proxy.policy.lexicon import words_of

_COURTESIES = (
    "hello|hi|hey|please|kindly|so|ok|okay|well|and|but|thanks|dear|also|can you tell me|could you tell me|tell me|"
    "can you please tell me|could you please tell me|can you please|could you please|would you please|"
    "can anyone tell me|can someone tell me|can somebody tell me|could someone tell me|can you explain|"
    "can you explain to me|could you explain|could you explain to me|please explain|explain to me|"
    "i would like to know|i want to know|i need to know|i was wondering|i am wondering|if you could|"
    "i wonder|help me understand|do you know|does anyone know|does anybody know|do you have any idea|"
    "any idea|can you help me understand|in your opinion|do you think|you think|can you|could you|would you|"
    "me|to me|there"
)
_POLITE = frozenset(tuple(phrase.split()) for phrase in _COURTESIES.split("|"))

_SUBJECTS = words_of("i you we one someone somebody people anyone a")
_HELPERS = words_of("do can could should would might must did to shall may")
_WAYS = words_of("way ways method methods steps procedure process trick tricks tips advice")
_REASONS = words_of("reason reasons cause causes")
_BE = words_of("is are was were")
_CAUSING = words_of("makes made causes caused led leads")
_PLACES = words_of("country city place state town continent region countries cities places states")
_TIMES = words_of("year date day month time century years")
_PEOPLE = words_of("person people man woman")

_PHRASES = {
    tuple(phrase.split()): kind
    for kind, phrases in {
        "howto": "what should i do to|what should one do to|what can i do to|what do i have to do to|what do i need to do to|"
        "what must i do to|what do i do to|is there a way to|is there any way to|are there ways to|are there any ways to|"
        "is there a way i can|is there any way i can|i want to|i would like to|i need to|ways to|ways of|steps to|tips for|"
        "tips to|tips on|advice on|how to|what is needed to|what is required to|what does it take to|show me how to|"
        "teach me how to|help me to|help me|what could i do to|what would be the way to|how about|best way to|"
        "the best way to|what do you do to|what helps",
        "why": "how come|what is the reason|what are the reasons|what for|what leads to|what led to",
        "who": "by whom|to whom|with whom",
        "where": "in which country|in which city|in what country|in what city|from where|on which continent",
        "when": "in which year|in what year|at what time|since when|at which time|on what day|on which day|"
        "what is the best time to|what is a good time to|what is the right time to|when is the best time to",
        "duration": "how long|how much time|for how long|how many days|how many hours|how many weeks|how many months|"
        "how many years|how many minutes",
        "often": "how often|how frequently|how many times",
        "count": "how much|how many|what is the number of|what is the amount of|at how many|in how many|for how much|"
        "how many people live in|how many people are in|what is the population of",
        "price": "what is the price of|what is the cost of|how expensive is|how expensive are|what are the costs of",
        "height": "how high is|how tall is|what is the height of|what height is|how high are|how tall are",
        "depth": "how deep is|what is the depth of",
        "width": "how wide is|what is the width of",
        "length": "what is the length of",
        "distance": "how far is|how far away is|what is the distance to|what is the distance between|what is the distance from|"
        "what is the distance of|how far is it",
        "age": "how old is|how old are|how old was|what is the age of|what age is",
        "speed": "how fast is|how fast does|how fast can|how fast do|what is the speed of|how quick is",
        "weight": "how heavy is|what is the weight of|how heavy are",
        "size": "how big is|how large is|what is the size of|how big are|what size is",
        "temperature": "how hot is|how cold is|what is the temperature of",
        "define": "what is meant by|what is the meaning of|what does it mean|what is the definition of|meaning of|"
        "definition of|define|explain|what do you mean by|what do you understand by",
        "is": "is it true|is it|am i",
        "can": "is it possible to|is it possible for me to|is it possible|is it okay to|is it allowed to|"
        "am i able to|am i allowed to",
        "should": "is it better to|would it be better to|is it a good idea to|ought i to",
        "must": "do i have to|do i need to|do we have to|do you have to|do you need to|is it necessary to|does one have to",
    }.items()
    for phrase in phrases.split("|")
}
_LONGEST_POLITE = max(map(len, _POLITE))
_LONGEST_PHRASE = max(map(len, _PHRASES))

_YES_NO = {
    **dict.fromkeys(words_of("is are was were am do does did has have had will would"), "is"),
    **dict.fromkeys(words_of("can could may might"), "can"),
    **dict.fromkeys(words_of("should shall ought"), "should"),
    **dict.fromkeys(words_of("must need"), "must"),
}

_MEASURES = words_of("price height depth width length distance age speed weight size temperature")
_DEFINITE = words_of("why who where when count duration often howto") | _MEASURES
_YES_OR_NO = frozenset(_YES_NO.values())
_TOGETHER = frozenset(frozenset(pair.split()) for pair in ("howto can", "howto how", "is can", "is should", "is must",
                                                           "should must", "length duration"))  # fmt: skip
_OPEN = frozenset(("what", "do"))


def opening(words: tuple[str, ...]) -> tuple[str, int]:
    """The kind of a question by its words (lower case, contractions written out), and how many words said so."""
    start = _skip_polite(words)
    head = words[start : start + _LONGEST_PHRASE]
    for length in range(len(head), 1, -1):
        kind = _PHRASES.get(head[:length])
        if kind is not None:
            if kind == "count" and "cost" in words:
                kind = "price"
            return kind, start + length
    if not head:
        return "do", start
    first, second, third = (*head, "", "")[:3]
    match first:
        case "why" | "who" | "where" | "when":
            return first, start + 1
        case "define" | "explain":
            return "define", start + 1
        case "whom" | "whose":
            return "who", start + 1
        case "how":
            if second in _HELPERS and third in _SUBJECTS:
                return "howto", start + 3
            return "how", start + 1
        case "what" | "which":
            kind, length = _what(words[start:], head, second)
            return kind, start + length
    kind = _YES_NO.get(first)
    return ("do", start) if kind is None else (kind, start + 1)


def _skip_polite(words: tuple[str, ...]) -> int:
    start = 0
    while start < len(words):
        for length in range(min(_LONGEST_POLITE, len(words) - start), 0, -1):
            if words[start : start + length] in _POLITE:
                start += length
                break
        else:
            return start
    return 0


def _what(words: tuple[str, ...], head: tuple[str, ...], second: str) -> tuple[str, int]:
    if second in _CAUSING:
        return "why", 2
    if second in _PLACES:
        return "where", 2
    if second in _TIMES:
        return "when", 2
    if second in _PEOPLE:
        return "who", 2
    if second in _BE:
        for place in range(2, min(6, len(head))):
            if head[place] in _WAYS:
                return "howto", place + 1
            if head[place] in _REASONS and place < 5:
                return "why", place + 1
        if head[2:3] not in ((), ("the",), ("my",), ("your",), ("some",), ("good",)):
            return "define", 2
    if second in ("do", "does", "did") and words[-1] in ("mean", "cost"):
        return ("define" if words[-1] == "mean" else "price"), 2
    return "what", 1


def are_apart(one: str, other: str) -> bool:
    """Whether questions of these two kinds cannot have one answer, whatever else they say."""
    if one == other or one in _OPEN or other in _OPEN or frozenset((one, other)) in _TOGETHER:
        return False
    return not ({one, other} == {"how", "define"} or {one, other} == {"how", "is"})
