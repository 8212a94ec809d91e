"""The answer normalisation of the official VQA script, which GQA and video QA share here.

Written from its published description, and equal to it in its oddities too: a colon and an
apostrophe are kept; "none" is the number 0; any comma between digits makes all punctuation vanish
instead of becoming spaces; a full stop goes unless a digit follows it, but only the first 32 of a
text; "somebody'd" loses its apostrophe.
"""

import re
from functools import lru_cache

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32  # the script hands re.UNICODE, which is 32, to the argument `count`
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
    you've
""".split()
# each of them with one apostrophe forgotten
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTED
    for at, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


@lru_cache(maxsize=100_000)  # the same few answers are given again and again
def normalise(text: str) -> str:
    """Trim, then punctuation, then case, number words, articles and contractions."""
    return normalise_words(strip_punctuation(trim(text)))


def trim(text: str) -> str:
    """Line breaks and tabs become spaces; none at either end."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """Each sign vanishes where a space stands beside it anywhere in the text, else becomes one."""
    vanish = _DIGIT_COMMA.search(text) is not None
    stripped = text
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        stripped = stripped.replace(sign, "" if vanish or beside_space else " ")
    return _FULL_STOP.sub("", stripped, count=_MOST_FULL_STOPS)


def normalise_words(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophes."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
