"""Words of a caption as Stanford's PTBTokenizer cuts them, without Java.

The official caption scripts tokenize with Stanford's program, by the conventions of the Penn
Treebank, in lower case, and then drop plain punctuation. This does the same for English captions;
docs/metrics.md says how often the two differ. Brackets stay, as `-lrb-` and the like: the official
list of what to drop has them in capitals, which the tokens no longer are.
"""

import re
from html import unescape

# what the official script drops, of what can still occur once cases are lowered
DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("‘’‛‹›", "'"),
        **dict.fromkeys('“”„«»"', " '' "),
        **dict.fromkeys("–—―", " -- "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\ufe0e\ufe0f\ufffd", " "),
        **{sign: f" {sign} " for sign in "¹²³"},
        **{"\u00ad": "", "…": " ... ", "£": " # ", "€": " $ ", "¢": " cents "},
        **{"½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "},
    }
)
_EMOJI = re.compile("[\U00010000-\U0010ffff]")  # beyond the program of 2014, which drops them
_ENTITY = re.compile("&(?:amp|lt|gt|quot|apos|nbsp);")
_SPELLINGS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na",
    "lemme": "lem me", "gimme": "gim me",
}  # fmt: skip
_ABBREVIATIONS = """
    adm ave blvd capt co col corp dept dr etc ft gen gov hon inc jr lt ltd maj mr mrs ms mt ph.d
    prof rd rep rev sen sgt sr st vs jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues
    wed thu fri
""".split()
_LETTER = r"(?:[^\W\d_][\u0300-\u036f]*)"
_WORD = r"(?:[\w\u0300-\u036f]+(?:[-\u2010\u2011][\w\u0300-\u036f]+)*)"
_TOKEN = re.compile(
    rf"""
      <[!/]?[a-z][^<>]*>                                             # a tag
    | (?:https?://|www\.)[^\s"<>()|]*[^\s"<>()|.,;:!?'-]             # an address of a page
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)*                                   # or of a person
    | [@#]{_LETTER}\w*
    | (?:{"|".join(_ABBREVIATIONS)})\.(?!\w) | no\.(?=\s?\d)         # they keep their full stop
    | (?:{_LETTER}\.)+(?:-{_WORD})?(?!\w)                            # u.s. and single initials
    | (?-i:[A-Z]{{1,2}}&[A-Z])                                       # R&B, AT&T
    | '(?:s|m|d|re|ve|ll)(?!\w)                                      # it 's
    | '(?:em|till?|cause)(?!\w) | 'n'(?!\d) | 'n(?!\w)               # clipped words
    | (?<!\d)'\d\ds?(?![\w'])                                        # '80s
    | '(?=tis\b|twas\b)t
    | y'(?=\w) | ol'(?!\w)
    | (?:o'|[dlj]'){_LETTER}{{2,}} | ma'am\b | c'mon\b | n?e'er\b    # o'clock, d'oh
    | [+-]?\d*(?:[.,:]\d+)+(?:-{_LETTER}\w*)* | [+-]\d+(?![\w-])     # 1,000 .5 10:30 -3
    | \w+?(?=n't\b) | n't\b                                          # do n't
    | (?<!\d)\d{{1,4}}[ ]\d{{1,4}}/\d{{1,4}}                             # 5 3/4
    | {_WORD}(?:/{_WORD}){{1,2}}
    | \d+(?=[.!?])
    | {_WORD}(?:[.!?]{_LETTER}\w*)*                                  # man.woman, a slip, stays
    | [:;=]'?-?[()] | [:;=]-?[dp](?!\w)                              # faces
    | [?!]+ | \.+ | \*+ | @+ | -+ | <<|>>
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)


def ptb_tokens(text: str) -> list[str]:
    """The tokens of one text, in lower case, without plain punctuation."""
    text = _ENTITY.sub(lambda found: unescape(found[0]), text)
    text = " ".join(_EMOJI.sub(" ", text.translate(_CHARACTERS)).split())
    spelt = " ".join(_spelling(token) for token in _TOKEN.findall(text)).lower()
    return [token for token in spelt.split(" ") if token and token not in DROPPED]


def _spelling(token: str) -> str:
    if token[0] in ".-" and len(set(token)) == 1:
        return "--" if len(token) < 5 or token[0] == "." else token
    if len(token) > 1 and token[0] in ":;=" and token[-1] in "()":
        return token[:-1] + _SPELLINGS[token[-1]]
    # inside a token a space does not part it: 5 3/4
    return _SPELLINGS.get(token.lower(), token.replace(" ", "\u00a0"))
