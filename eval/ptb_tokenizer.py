"""The tokens that coco-caption scores, in Python.

BLEU, ROUGE-L and CIDEr of the captioning literature are computed on the tokens of coco-caption: Stanford CoreNLP
3.4.1's ``PTBTokenizer -preserveLines -lowerCase``, less a list of punctuation marks. Starting a JVM for it is slow and
often impossible, so the rules that a caption can meet are written out here. They were found by giving the Java
tokenizer millions of short strings and looking at what it does; the tests compare the two on thousands of captions.

A whitespace-separated chunk is cut by the longest rule that matches at each place. Chunks do not depend on their
neighbours, except for "no. 5" (an abbreviation) against "no. a" (the end of a sentence).

Known differences, all of them rare in captions: telephone numbers, URLs with odd punctuation, SGML tags with
attributes, and unusual emoticons.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

# coco-caption drops these tokens. Brackets survive it, because by then they are lower-case: "-lrb-", not "-LRB-".
PUNCTUATIONS = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

_NORMALISED = str.maketrans(
    {
        "‘": "'", "’": "'", "“": '"', "”": '"', "–": " -- ", "—": " -- ", "…": " ... ", "\xa0": " ",
        "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 ",
    }
)  # fmt: skip
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&nbsp;": " "}
_ENTITY = re.compile("|".join(_ENTITIES))
_SYMBOLS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "€": "$", "£": "#", "¢": "cents", '"': "''",
}  # fmt: skip

# Words that keep their full stop. The states do so only when they start with a capital: "Ill." but "ill .".
_ABBREVIATIONS = """
adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bhd bldg blvd brig bros calif capt cf cie
cmdr co col colo conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov
govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn mlle
mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppte ppty pres prof pte ptes pty
ptys pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs tue tues
univ va vs vt wed wis wisc wm wyo
"""
_CAPITAL_ABBREVIATIONS = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
_BEFORE_NUMBER = "art|ca|figs?|nos?|op|pp|prop"
_SPLIT_WORDS = {
    "cannot": ["can", "not"], "gonna": ["gon", "na"], "wanna": ["wan", "na"], "gotta": ["got", "ta"],
    "lemme": ["lem", "me"], "gimme": ["gim", "me"], "'tis": ["'t", "is"], "'twas": ["'t", "was"],
}  # fmt: skip

_L = r"[^\W\d_]"  # a letter
_A = r"[^\W_]"  # a letter or a digit
_THING = rf"(?:[dlno]'(?={_L})(?!(?:[sdmt]|ll|re|ve)(?!{_L})))?{_A}+"
_ABBREVIATION = "(?:" + "|".join(sorted(_ABBREVIATIONS.split(), key=len, reverse=True)) + ")"
_CAPITALS = "(?-i:" + "|".join(w.upper() + "|" + w for w in _CAPITAL_ABBREVIATIONS.split()) + ")"

_EMAIL = rf"{_A}[\w.+-]*@{_A}+(?:\.{_A}+)*"

# The longest match wins, what stands in a look-ahead counted (the group "ahead"); on a tie the earlier rule wins.
_RULES = [
    re.compile(rule, re.IGNORECASE)
    for rule in (
        rf"</?{_L}[^<>]*>",
        r"https?://[^\s\"<>]+|www\.[^\s\"<>]*[^\W_]",
        _EMAIL,
        rf"{_L}+?(?=(?P<ahead>(?<!n)n't(?!{_L})))",  # is|n't
        rf"{_L}{_A}*(?:[.!?]{_L}{_A}*)*",  # a word; also "cat.dog", where the space is missing
        rf"{_THING}(?:[-_]{_THING})*",  # red-haired, foo_bar, d'angelo
        rf"{_THING}(?:[-/]{_THING})*",  # and/or, 1/2-inch
        rf"{_L}{_A}*(?:\.{_L}{_A}*)+(?:-{_THING})+",
        rf"(?:{_BEFORE_NUMBER})\.(?=\d)",
        r"c\+\+",
        rf"{_L}+[aeiou]'[aeiou]{_L}*",  # ma'am
        rf"(?:ol|dunkin|somethin|[dlj])'|y'(?={_L})|c'mon",
        rf"'(?:ll|re|ve|[sdm])(?!{_L})|n't",
        rf"'n(?!{_A})'?|'em|'till?|'cause",
        r"'twas|'tis",
        r"'\d\d(?:s(?!\w)|$)",  # '90s, '90
        r"[-+]?[.,:]?\d+(?:[.,:]\d+)*",
        rf"\d+(?:[.,]\d+)+(?:-{_THING})+",  # 1,000-year-old
        r"\d+(?:-\d+)?/\d+",
        rf"{_L}(?:\.{_L})*\.(?!{_L}{_L})(?:-{_THING}(?:\.{_L}\.)*)*|ph\.d\.",  # b., u.s., u.s.-based
        rf"(?:{_ABBREVIATION}|{_CAPITALS})\.(?:-{_THING})*",
        r"(?-i:[A-Z]+(?:&[A-Z]+)+)",  # AT&T
        r"(?-i:US|HK|NZ|[ACS])\$",
        rf"@[A-Za-z_]\w*|\#{_L}+",
        rf">?[:;=]['-]?[()]|[:;=]-?(?-i:[DPp3])(?!{_A})",
        r"[?!]+|-+|\.+|\*+|_+|''|``",
    )
]

_BEFORE_AT = re.compile(r"[\w.+-]*")
_HOST = re.compile(rf"@{_A}")

_NUMBERED = re.compile(rf"(?:{_BEFORE_NUMBER})\.", re.IGNORECASE)

_CONTRACTED = re.compile(rf"'(?:ll|re|ve|[sdm])(?!{_L})", re.IGNORECASE)  # "cannot's" stays whole


@lru_cache(maxsize=1 << 16)
def _chunk(chunk: str) -> tuple[str, ...]:
    """Tokens of a piece without whitespace, lower-case, the punctuation still in."""
    lowered = chunk.lower()
    if lowered.isascii() and lowered.isalpha() and lowered not in _SPLIT_WORDS:
        return (lowered,)
    tokens: list[str] = []
    at = before_at = 0
    while at < len(chunk):
        end, longest = at + 1, 0
        if at >= before_at:  # once for all places up to there: else long chunks take the square of their length
            before_at = max(at + 1, _BEFORE_AT.match(chunk, at).end())  # type: ignore[union-attr]  # it always matches
        for rule in _RULES:
            if rule.pattern == _EMAIL and not _HOST.match(chunk, before_at):
                continue
            match = rule.match(chunk, at)
            if match and match.end() > at:
                reach = match.end("ahead") if "ahead" in rule.groupindex else match.end()
                if reach > longest:
                    end, longest = match.end(), reach
        token = chunk[at:end].lower()
        at = end
        if token in _SPLIT_WORDS and not _CONTRACTED.match(chunk, at):
            tokens += _SPLIT_WORDS[token]
        elif len(token) > 1 and set(token) <= {".", "-"}:
            tokens.append("--" if token[0] == "-" else "...")
        elif ord(token[0]) <= 0xFFFF:  # the Java lexer drops what needs two UTF-16 units, such as most emoji
            tokens.append("".join(_SYMBOLS.get(character, character) for character in token))
    return tuple(tokens)


def tokenize(caption: str) -> list[str]:
    """The tokens of one caption as coco-caption scores them: lower-case, without punctuation.

    >>> tokenize("A man's dog isn't here.")
    ['a', 'man', "'s", 'dog', 'is', "n't", 'here']
    """
    text = _ENTITY.sub(lambda match: _ENTITIES[match.group()], caption).translate(_NORMALISED)
    chunks = text.split()
    tokens: list[str] = []
    for chunk, following in zip(chunks, [*chunks[1:], ""], strict=False):
        if following[:1].isdigit() and _NUMBERED.fullmatch(chunk):
            tokens.append(chunk.lower())
        else:
            tokens += _chunk(chunk)
    return [token for token in tokens if token not in PUNCTUATIONS]


def tokenize_all(captions: Iterable[str]) -> list[list[str]]:
    """`tokenize` for each caption."""
    return [tokenize(caption) for caption in captions]
