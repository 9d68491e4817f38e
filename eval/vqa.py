"""VQA accuracy as the official evaluation script computes it (Antol et al., 2015), and exact match.

An answer that k of the ten annotators gave scores .3, .6, .9 or 1 for k = 1, 2, 3 or 4 and more: min(matches / 3, 1),
averaged over the ten ways of leaving one annotator out. Before comparing, answers are normalised by the rules of the
script, its slips included, so that numbers can be compared with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The script means "a full stop not between digits", but its look-behind is spelled so that it never bites.
_FULL_STOP = re.compile(r"\.(?!\d)")
_DIGIT_COMMA = re.compile(r"\d,\d")
# The script passes re.UNICODE (32) where re.sub expects the number of replacements.
_MOST_FULL_STOPS = 32
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS.split())}
_ARTICLES = frozenset(["a", "an", "the"])

# Words whose apostrophes people leave out: the only one, or either of two.
_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd
where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
you've
"""
_TWO_APOSTROPHES = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""
_APOSTROPHES = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
_APOSTROPHES["somebody'd"] = "somebodyd"  # the wrong way round in the script, and kept
for _word in _TWO_APOSTROPHES.split():
    _head, _middle, _tail = _word.split("'")
    _APOSTROPHES[f"{_head}{_middle}'{_tail}"] = _word
    _APOSTROPHES[f"{_head}'{_middle}{_tail}"] = _word
_APOSTROPHES |= dict.fromkeys(["yall'd've", "y'alld've", "y'all'dve"], "y'all'd've")
_APOSTROPHES |= dict.fromkeys(["ow's'at", "'ows'at", "'ow'sat"], "'ow's'at")
# The script's entries with capitals ("Im", "Id've") never match, because answers are lower-cased first: left out.


def _clean(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(answer: str) -> str:
    """An answer as the script compares it: punctuation, articles and capitals off, number words as digits.

    >>> normalize_answer("The two dogs.")
    '2 dogs'
    """
    answer = _clean(answer)
    text = answer
    for mark in _PUNCTUATION:
        if mark + " " in answer or " " + mark in answer or _DIGIT_COMMA.search(answer):
            text = text.replace(mark, "")
        else:
            text = text.replace(mark, " ")
    text = _FULL_STOP.sub("", text, count=_MOST_FULL_STOPS)
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def _accuracy(prediction: str, answers: Sequence[str]) -> float:
    answers = [_clean(answer) for answer in answers]
    if len(answers) >= 10 and len(set(answers)) == 1:
        # Since 2021 the script compares as written when all annotators agree.
        prediction = _clean(prediction)
    else:
        prediction = normalize_answer(prediction)
        answers = [normalize_answer(answer) for answer in answers]
    matches = sum(answer == prediction for answer in answers)
    if len(answers) == 1:
        return float(matches)
    needed = min(3, len(answers) - 1)
    # Leaving out one of the matching answers, or one of the others.
    without_match, with_match = min(1.0, (matches - 1) / needed), min(1.0, matches / needed)
    return (matches * without_match + (len(answers) - matches) * with_match) / len(answers)


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """VQA accuracy of each item, [items], in 0..1; the score of a set is the mean.

    Fewer than ten answers: the same leave-one-out average, with as many agreeing answers needed for a full score as are
    left to agree (at most three). One answer: 1 if it matches after normalisation, otherwise 0.
    """
    return np.array([_accuracy(p, refs) for p, refs in zip(predictions, references, strict=True)], dtype=float)


def _plain(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").rstrip().casefold()


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """1 for each item whose prediction equals any reference, otherwise 0, [items].

    Capitals, space around the text, the length of the space within it, and one full stop at the end do not count.
    Articles, number words and other punctuation do: see `vqa_accuracy` for a comparison without them.
    """
    return np.array(
        [float(_plain(p) in {_plain(ref) for ref in refs}) for p, refs in zip(predictions, references, strict=True)]
    )
