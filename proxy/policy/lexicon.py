"""What the guard knows of English: small tables, written by hand.

They hold what changes a question's meaning (opposites, units, words of negation), and what does not (fillers, spellings,
synonyms that are safe in nearly every question). A synonym belongs here only if swapping it leaves the answer as it was:
"delete" and "remove" are, "rent" and "lease" are not. Words stand in their base form: `stem` is applied on both sides.
"""

from __future__ import annotations

from collections.abc import Set

from proxy.policy.stems import stem


def words_of(text: str) -> frozenset[str]:
    """The words of a table's line."""
    return frozenset(text.split())


FUNCTION = words_of(
    "a an the of to in on at by for from with into onto as about over under between through during within among and or but "
    "if so that than then because while although though is are am was were be been being do does did done has have had "
    "having will would can could should shall may might must ought i me my mine myself you your yours yourself we us our "
    "ours they them their theirs it its he him his she her hers one ones this these those there here who whom whose which "
    "what when where why how not no nor also too very just let ever yet still any some such each every own same other "
    "per via toward towards upon against up down out off until till since whether yes"
)
"""Words that carry grammar rather than content. Some of them count elsewhere: as negation, direction, question word."""

FILLER = words_of(
    "please kindly tell explain describe give show help know understand wonder like want need hello hi hey thanks thank "
    "dear ok okay well really actually exactly basically simply just good best better great nice proper right correct "
    "way ways method manner someone somebody anyone anybody person people guy folk something anything thing stuff possible "
    "possibly able get got go going idea tip advice suggestion suggest recommend recommendation mean meaning definition "
    "define called name term word kind type some various different certain particular question answer "
    "reason cause make work happen usually generally normally typically commonly currently find could try "
    "much many lot every always easy easily easier easiest simple simplest effective efficient quick quickly quicker "
    "quickest fast faster fastest more most there suppose "
    "think opinion thought believe say feel look come take long far often number amount exact specific behind "
    "consider fine okay useful proper overall personal successful involve regard related available"
)
"""Words that a rewording adds or leaves out. They are never a difference by themselves."""

NEGATIONS = words_of(
    "not no never none nobody nothing nowhere neither nor cannot without except hardly barely scarcely"
)
"""Words that turn a statement round. Two of them are as good as none; `avoid`, `stop` and their like are content."""

CONTRACTIONS = {
    "what's": "what is", "who's": "who is", "where's": "where is", "when's": "when is", "how's": "how is",
    "why's": "why is", "that's": "that is", "it's": "it is", "there's": "there is", "here's": "here is",
    "he's": "he is", "she's": "she is", "let's": "let us", "i'm": "i am", "can't": "can not", "won't": "will not",
    "shan't": "shall not", "ain't": "is not", "cannot": "can not", "whats": "what is", "whos": "who is",
    "dont": "do not", "doesnt": "does not", "didnt": "did not", "cant": "can not", "isnt": "is not", "wont": "will not",
    "arent": "are not", "wasnt": "was not", "im": "i am", "gonna": "going to", "wanna": "want to", "gotta": "have to",
    "e-mail": "email", "wi-fi": "wifi", "on-line": "online", "u.s.": "usa", "u.s": "usa", "u.s.a": "usa", "u.k": "uk",
    "u.k.": "uk", "e.g": "", "i.e": "", "etc": "", "username": "user name", "website": "web site", "webpage": "web page",
    "cellphone": "phone", "smartphone": "phone", "smartphones": "phone", "cellphones": "phone", "pls": "please",
    "plz": "please", "u": "you", "ur": "your", "coworker": "colleague", "coworkers": "colleague", "co-worker": "colleague",
    "co-workers": "colleague",
}  # fmt: skip
"""Whole tokens, lower case, and what is read in their place. A curly apostrophe is a straight one by then."""

ENDINGS = {"n't": " not", "'re": " are", "'ve": " have", "'ll": " will", "'d": " would", "'m": " am", "'s": "", "'": ""}
"""Endings of contractions; a possessive's is dropped."""

_SYNONYMS = """
delete remove erase rid
begin start commence
buy purchase
big large huge
little small tiny
fix repair mend correct rectify
quick fast rapid speedy
film movie
photo picture photograph pic image
improve enhance better boost
end finish
error bug
allow permit
choose pick select
answer reply
ask enquire inquire
car automobile
job occupation
salary wage pay
kid child children
doctor physician
sick ill
happen occur
reduce lower decrease lessen
increase raise
difference differ distinction different distinguish
benefit advantage pro
disadvantage drawback downside con
important significant
famous well-known renowned
error mistake
handle deal cope
clear unclog clogged
stain spot
colleague coworker
substitute replacement replace alternative
frequent frequently often
begin beginner
invent inventor invention
discover discoverer discovery
paint painter painting
build builder built constructed construct
write writer author wrote written
create make made creating
check verify
display show
tall height high
deep depth
wide width
heavy weight weigh
old age
cost price expensive
need require requirement necessary
fall collapse
speed fast
distance far
smart intelligent clever
rich wealthy
beautiful pretty
angry mad
happy glad
sad unhappy
scared afraid
quit exit leave
flat apartment
holiday vacation
luggage baggage
lift elevator
petrol gasoline gas
university college uni
shop store
maths math mathematics
advert ad advertisement advertising
tv television
phone mobile telephone
laptop notebook
pc computer
app application
info information detail
usa america american
uk britain british
nyc manhattan
germany german
france french
spain spanish
italy italian
india indian
china chinese
japan japanese
russia russian
canada canadian
mexico mexican
overcome conquer
earn income
learn study
teach teacher
major main primary
prepare preparation
safe safety secure security
healthy health
travel trip journey
go visit
live living life
die death dead
marry marriage married
invest investment
educate education
grow growth
develop development developer
manage management manager
program programming programmer code coding coder
speak speaking spoken
design designer
train training
play player
sing singer singing
act actor acting
compare comparison versus vs
popular popularity
success successful succeed
move transfer
get obtain receive acquire gain
crash crashed
broke broken
freeze froze frozen
close shut
open opening
change modify alter update
cancel terminate
pay payment
"""

OPPOSITES = """
enable disable|activate deactivate|on off|in out|up down|before after|with without|more less|more fewer|most least
high low|higher lower|highest lowest|increase decrease|increase reduce|raise lower|rise fall|rising falling|up down
maximum minimum|max min|maximize minimize|buy sell|legal illegal|open close|open closed|open shut|start stop|start end
begin end|begin stop|first last|early late|earlier later|earliest latest|old new|old young|older younger|oldest newest
oldest youngest|big small|bigger smaller|biggest smallest|large small|larger smaller|largest smallest|long short
longer shorter|longest shortest|tall short|taller shorter|hot cold|hotter colder|hottest coldest|warm cold|warm cool
fast slow|faster slower|fastest slowest|quick slow|good bad|best worst|better worse|right wrong|left right|true false
advantage disadvantage|benefit drawback|pro con|benefit risk|gain lose|win lose|won lost|push pull|import export
upload download|send receive|give take|give receive|borrow lend|lend borrow|credit debit|deposit withdraw|income expense
add remove|add delete|add subtract|plus minus|multiply divide|create delete|create destroy|build destroy|save delete
install uninstall|mount unmount|lock unlock|mute unmute|follow unfollow|freeze unfreeze|zip unzip|load unload|do undo
encrypt decrypt|encode decode|compress decompress|connect disconnect|attach detach|subscribe unsubscribe|accept decline
accept reject|accept refuse|approve reject|approve deny|allow forbid|allow block|allow ban|allow deny|grant revoke
show hide|visible hidden|enter exit|enter leave|arrive leave|arrive depart|arrival departure|come go|inside outside
indoor outdoor|indoors outdoors|internal external|inner outer|input output|above below|over under|top bottom|front back
forward backward|forwards backwards|ascending descending|ascend descend|north south|east west|northern southern
eastern western|day night|morning evening|morning night|summer winter|spring autumn|spring fall|yesterday tomorrow|past future
last next|previous next|this next|this last|first latest|ancient modern|public private|free paid|cheap expensive|cheaper expensive
cheapest expensive|rich poor
strong weak|stronger weaker|hard soft|hard easy|difficult easy|harder easier|heavy light|dark light|bright dark|dry wet
dry moist|clean dirty|full empty|loud quiet|safe dangerous|healthy unhealthy|sick healthy|alive dead|birth death
born died|male female|man woman|men women|boy girl|he she|his her|him her|husband wife|father mother|son daughter
brother sister|king queen|uncle aunt|dad mom|introvert extrovert|hyperthyroidism hypothyroidism|love hate|friend enemy
like dislike|love hate|agree disagree|trust distrust|appear disappear|success failure|succeed fail|pass fail|positive negative
optimist pessimist|even odd|single married|single multiple|singular plural|single double|together apart|merge split
join leave|join split|hire fire|employer employee|teacher student|buyer seller|landlord tenant|lender borrower
client server|parent child|attack defend|offense defense|guilty innocent|war peace|left right|supply demand|profit loss
asset liability|synonym antonym|question answer|cause effect|cause prevent|cause cure|prevent cure|produce consume
import export|inhale exhale|attract repel|expand shrink|expand contract|grow shrink|deep shallow|wide narrow|thick thin
tight loose|rough smooth|sharp blunt|sweet sour|raw cooked|fresh stale|major minor|senior junior|maternal paternal
virtual physical|online offline|manual automatic|temporary permanent|domestic foreign|domestic international|local global
local remote|urban rural|lower upper|lowercase uppercase|horizontal vertical|odd even|static dynamic|mandatory optional
always never|all none|everyone nobody|everything nothing|rarely often|seldom often|freeze thaw|melt freeze|boil freeze
heat cool|fat thin|gain lose|wake sleep|sunrise sunset|dawn dusk|heaven hell|hired fired|wins loses|ally enemy
read write|read unread|reading writing|get set|give get|ask answer|print scan|mute unmute|pause resume|play pause|enlarge reduce
shrink enlarge|widen narrow|strengthen weaken|tighten loosen|lengthen shorten|brighten darken|promote demote|hit miss
overweight underweight|overestimate underestimate|pre post|king queen|actor actress|host guest|victory defeat
"""

_PREFIXES = (
    "un",
    "in",
    "im",
    "ir",
    "il",
    "dis",
    "non",
    "de",
    "mis",
    "anti",
    "hyper",
    "hypo",
    "over",
    "under",
    "re",
    "pre",
)

UNITS = {
    name: names.split()[0]
    for names in (
        "kilometre kilometer kilometres kilometers km", "metre meter metres meters", "mile miles mi",
        "centimetre centimeter centimetres centimeters cm", "millimetre millimeter millimetres millimeters mm",
        "inch inches", "foot feet ft", "yard yards yd", "gram grams gramme g", "kilogram kilograms kilo kilos kg kgs",
        "milligram milligrams mg", "pound pounds lb lbs", "ounce ounces oz", "tonne tonnes ton tons", "stone stones",
        "litre liter litres liters l", "millilitre milliliter millilitres milliliters ml", "gallon gallons gal",
        "pint pints", "cup cups", "teaspoon teaspoons tsp", "tablespoon tablespoons tbsp", "second seconds secs sec",
        "minute minutes mins", "hour hours hrs hr", "day days", "week weeks", "month months", "year years yrs yr",
        "decade decades", "century centuries", "byte bytes", "kilobyte kilobytes kb", "megabyte megabytes mb",
        "gigabyte gigabytes gb", "terabyte terabytes tb", "bit bits", "hertz hz", "kilohertz khz", "megahertz mhz",
        "gigahertz ghz", "watt watts", "kilowatt kilowatts kw", "volt volts", "ampere amperes amp amps", "celsius c",
        "fahrenheit f", "kelvin", "degree degrees", "percent percentage %", "euro euros eur €", "dollar dollars usd $ bucks",
        "pound_sterling gbp £ quid", "yen jpy ¥", "rupee rupees inr rs ₹", "calorie calories kcal", "joule joules",
        "knot knots", "acre acres", "hectare hectares",
    )
    for name in names.split()
}  # fmt: skip
"""Units and their short forms. One letter alone is a unit only behind a number."""

_CARDINALS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_ORDINALS = (
    "zeroth first - third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
    "fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
)
_TENS = "thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS = {
    **{word: value for value, word in enumerate(_CARDINALS.split())},
    **{word: value for value, word in enumerate(_ORDINALS.split()) if word != "-"},
    **{word: 10 * value for value, word in enumerate(_TENS.split(), 3)},
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12, "half": 0.5,
    "quarter": 0.25, "twice": 2, "once": 1, "thrice": 3, "double": 2, "triple": 3,
}  # fmt: skip
"""Numbers in words. `second` is left out: mostly it is a time."""

MONTHS_AND_DAYS = words_of(
    "january february march april may june july august september october november december monday tuesday wednesday "
    "thursday friday saturday sunday today tomorrow yesterday tonight christmas easter ramadan diwali hanukkah thanksgiving"
)

TIME_BOUND = words_of(
    "today tonight tomorrow yesterday now nowadays current currently latest newest recent recently upcoming ongoing "
    "trending weather forecast traffic news headlines"
)
"""Single words whose answer ages."""

TIME_BOUND_PHRASES = frozenset(
    tuple(phrase.split())
    for phrase in (
        *(f"{which} {what}" for which in ("this", "next", "last", "current", "coming", "past")
          for what in ("week", "weekend", "month", "year", "morning", "afternoon", "evening", "night", "summer", "winter",
                       "spring", "autumn", "season", "quarter", "monday", "tuesday", "wednesday", "thursday", "friday",
                       "saturday", "sunday")),
        "right now", "at the moment", "as of", "so far", "up to date", "these days", "stock price", "share price",
        "exchange rate", "price of bitcoin", "bitcoin price", "gold price", "price of gold", "interest rate",
        "what time is", "what is the time", "the time now", "what day is", "what date is", "what is the date",
        "who is winning", "who won the game", "open now", "in stock", "current price", "current time", "current date",
        "current version", "current president", "current status", "most recent", "how old is", "years ago", "days ago",
        "months ago", "weeks ago", "hours ago", "this is the year", "in theaters", "in cinemas", "is it raining",
        "will it rain", "is it going to rain", "next game", "next match", "next election", "box office",
    )
)  # fmt: skip
"""Runs of words whose answer ages."""

FOREIGN_FUNCTION = words_of(
    "der das dem den des ein eine einen einem einer und oder nicht ist sind wird werden wie wo wer warum wann welche welcher "
    "kann ich du sie wir ihr mein meine mit ohne für von zum zur im auf bei nach el los las una unos que cómo como qué cuál "
    "cuándo dónde por para con sin es son está puedo mi tu su del al y le les une des du et ou est sont quel quelle comment "
    "pourquoi où quand avec sans pour dans sur je il elle nous vous mon ma mes il lo gli di che e è come perché dove quando "
    "quanto quale con senza per non sono posso o os um uma e ou não é são qual quanto onde com sem meu minha de het een van "
    "en niet wat hoe waar waarom kan ik mijn met zonder voor op naar la ne pas se si"
)
"""Function words of six other languages that are not English words."""

ENGLISH_FUNCTION = FUNCTION - words_of("a an i in me no so am on was die as do or he one per") - FOREIGN_FUNCTION


def _groups() -> dict[str, str]:
    table: dict[str, str] = {}
    for line in _SYNONYMS.split("\n"):
        members = [stem(word) for word in line.split()]
        if not members:
            continue
        head = next((table[member] for member in members if member in table), members[0])
        for member in members:
            table.setdefault(member, head)
    return table


SYNONYMS = _groups()
"""Stem to the head of its group."""


def _opposed() -> dict[str, frozenset[str]]:
    table: dict[str, set[str]] = {}
    for entry in OPPOSITES.replace("\n", "|").split("|"):
        if entry:
            one, other = entry.split()
            for left in (one, stem(one)):
                for right in (other, stem(other)):
                    table.setdefault(left, set()).add(right)
                    table.setdefault(right, set()).add(left)
    return {word: frozenset(others) for word, others in table.items()}


OPPOSED = _opposed()
"""Word, and stem, to what is its opposite."""


def opposite_among(word: str, others: Set[str]) -> str | None:
    """An opposite of a word or stem among others: by the table, or because a prefix is all that tells them apart."""
    known = others & OPPOSED.get(word, frozenset())
    if known:
        return min(known)
    for prefix in _PREFIXES:
        if len(word) >= 3 and prefix + word in others:
            return prefix + word
        bare = word.removeprefix(prefix)
        if 3 <= len(bare) < len(word) and bare in others:
            return bare
    for prefix, contrary in (("hypo", "hyper"), ("hyper", "hypo"), ("under", "over"), ("over", "under")):
        if word.startswith(prefix) and contrary + word.removeprefix(prefix) in others:
            return contrary + word.removeprefix(prefix)
    return None
