"""The base forms of English words: a dozen rules, and tables for the irregular ones and for British spellings."""

from __future__ import annotations

_FORMS = (
    "child:children man:men woman:women foot:feet tooth:teeth mouse:mice goose:geese person:persons life:lives "
    "wife:wives knife:knives leaf:leaves half:halves shelf:shelves go:went,goes make:made buy:bought "
    "write:wrote,written break:broke,broken take:took,taken give:gave,given find:found know:knew,known "
    "think:thought bring:brought catch:caught teach:taught fight:fought begin:began,begun drink:drank,drunk "
    "sing:sang,sung swim:swam,swum run:ran see:saw,seen eat:ate,eaten fall:fell,fallen grow:grew,grown "
    "speak:spoke,spoken choose:chose,chosen freeze:froze,frozen steal:stole,stolen wear:wore,worn drive:drove,driven "
    "ride:rode,ridden rise:rose,risen build:built send:sent spend:spent lend:lent lose:lost keep:kept sleep:slept "
    "feel:felt mean:meant meet:met pay:paid say:said sell:sold tell:told hold:held hear:heard win:won "
    "lead:led sit:sat stand:stood understand:understood forget:forgot,forgotten get:got,gotten die:died,dying "
    "lie:lying lay:laid tie:tied,tying try:tried,tries shake:shook,shaken wake:woke,woken fly:flew,flown,flies "
    "draw:drew,drawn throw:threw,thrown show:shown become:became come:came shrink:shrank,shrunk bite:bitten "
    "hide:hid,hidden shoot:shot use:using,used,uses analysis:analyses crisis:crises "
    "criterion:criteria phenomenon:phenomena size:sizes"
)

_IRREGULAR = {form: base for base, forms in (entry.split(":") for entry in _FORMS.split()) for form in forms.split(",")}

_AMERICAN = {
    "colour": "color", "favourite": "favorite", "flavour": "flavor", "behaviour": "behavior", "labour": "labor",
    "neighbour": "neighbor", "honour": "honor", "humour": "humor", "rumour": "rumor", "tumour": "tumor",
    "harbour": "harbor", "centre": "center", "theatre": "theater", "fibre": "fiber", "defence": "defense",
    "offence": "offense", "licence": "license", "practise": "practice", "grey": "gray", "tyre": "tire",
    "programme": "program", "catalogue": "catalog", "dialogue": "dialog", "cheque": "check", "aluminium": "aluminum",
    "jewellery": "jewelry", "mould": "mold", "plough": "plow", "pyjamas": "pajamas", "sceptic": "skeptic",
    "analyse": "analyze", "paralyse": "paralyze", "travelling": "travel", "travelled": "travel", "cancelled": "cancel",
    "cancelling": "cancel", "traveller": "traveler", "enrol": "enroll", "fulfil": "fulfill", "skilful": "skillful",
    "mum": "mom", "yoghurt": "yogurt", "omelette": "omelet", "storey": "story", "kerb": "curb",
}  # fmt: skip

_DOUBLED = frozenset("bdgmnprt")
_VOWELS = frozenset("aeiouy")


def stem(word: str) -> str:
    """The base form of an English word in lower case, as well as a dozen rules can tell: both sides get the same.

    Short words, and words that are not plain ASCII, stay as they are.
    """
    word = _AMERICAN.get(word, word)
    known = _IRREGULAR.get(word)
    if known is not None:
        return known
    if len(word) < 4 or not word.isascii():
        return word
    if word.endswith("s"):
        if word.endswith(("ss", "us", "is")):
            return word
        if word.endswith("ies") and len(word) > 4:
            return word[:-3] + "y"
        if word.endswith(("sses", "shes", "ches", "xes", "zes", "oes")):
            return _silent(word[:-2])
        return stem(word[:-1]) if word.endswith(("ings", "eds")) else _silent(word[:-1])
    for ending in ("ing", "ed"):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            base = word[: -len(ending)]
            if _VOWELS.isdisjoint(base) or (ending == "ed" and base.endswith("e")):
                return word
            if base[-1] == base[-2] and base[-1] in _DOUBLED:
                base = base[:-1]
            elif ending == "ed" and base.endswith("i"):
                base = base[:-1] + "y"
            return _silent(base)
    if word.endswith("ly") and len(word) > 5 and not word.endswith(("ally", "ily", "ply")):
        return _silent(word[:-2])
    if word.endswith(("ise", "isation")) and len(word) > 6:
        word = word.replace("isation", "ization") if word.endswith("isation") else word[:-3] + "ize"
    return _silent(word)


def _silent(word: str) -> str:
    """A word without its silent e, so that `make` and `mak(ing)` meet."""
    return word[:-1] if len(word) > 3 and word.endswith("e") else word
