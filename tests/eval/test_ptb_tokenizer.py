"""The Python tokenizer against the Java one that pycocoevalcap ships, and against tokens read off by hand."""

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vlm.eval import ptb_tokenizer
from vlm.eval.ptb_tokenizer import PUNCTUATIONS, tokenize

CAPTIONS = """\
A man riding a bike.
A man's dog isn't here, and the dogs' bowl is empty.
Can't won't don't cannot gonna wanna gotta lemme gimme!
a red-haired man with a T-shirt and a 3-year-old
The price is $5.00 for 1,000 dogs; 50% off!
"Hello," he said. 'hello' there
Mr. Smith and Dr. Jones in the U.S. and U.S.A. at 5 p.m. today
St. Louis vs. Chicago etc.
a 10:30 clock, 3/4 and 1/2 of a pizza, 1 1/2 cups
(a man) [a woman] {a child}
two ... dots.. and -- dash --- dash - dash
email me@foo.com http://www.foo.com www.foo.com foo.com #hash @user
I'm you're we've they'd I'll he's o'clock 'tis 'twas rock 'n' roll
rock n' roll 'em y'all ma'am ol' d'oh o'brien D'Angelo jack o' lantern
A TV with a 42" screen and a 6'2" man
€5 £10 ¥100 5¢ $1.5million US$5 C$5
black & white R&B AT&T a/b and/or him/her M&M's b&w
no. 5 No. 10 #1 number 1. no. A no.5
1980s '80s 80's 1980's the 90s' the '90s.
“curly quotes” ‘single’ it’s don’t – dash — dash … end
cafe café naïve jalapeño
a cat,a dog;a bird:a fish, a cow
What?! Really!!! hmm... ok..
a man in the U.S.
2-3 people 1-2 5-6pm 5pm 5 pm 10am 10:30am
3.5 .5 1,234.56 -5 +5 1.2.3 555-1234
12/25/2010 2010-12-25 1st 2nd 3rd 4th 1,000-year-old 1/2-inch
well-known mother-in-law ex-wife e-mail pre-1980 x-ray's
the man.the woman, a stop.The sign
<unk> *bold* a+b c++ a_b ~ ^ | under_score 5° ™
James' shirt, girls' room; boys'.
:) :( ;-) <3 :D
half-eaten half- eaten - half
lb. ft. in. oz. jan. Jr. Inc. Co. Ltd. Ave. Blvd. Mt. Ph.D. W. Ill. ill.
a cat and a dog 😀 on a mat
an "ONE WAY" sign

.
"""

NOUNS = (
    "man woman dog cats street sign bench pizza train bus giraffe surfboard snowboarder T-shirt skateboard café TV "
    "kitchen frisbee teddy-bear James boss children x-ray black/white and/or O'Brien o'clock stop 7 12"
)
OTHERS = (
    "is riding isn't wasn't can't won't he's they're we've I'm she'll you'd doesn't sitting gonna let's the a an his "
    "two red red-haired half-eaten & large very well-known in on with of by up down 2 3rd 10:30 3/4 1,000 $5.00 50% "
    "1980's '90s 2-3 3-year-old 42\" #1 Mr. Dr. St. U.S. p.m. etc. vs. (small) 'stop' \"STOP\" - -- ..."
)


def captions(number: int, seed: int) -> list[str]:
    """Captions made of ordinary words, possessives, quotes, brackets and punctuation."""
    chance = random.Random(seed)

    def word() -> str:
        if chance.random() < 0.5:
            return chance.choice(OTHERS.split())
        noun = chance.choice(NOUNS.split())
        form = chance.random()
        if form < 0.1:
            noun += "'s"
        elif form < 0.15:
            noun = f'"{noun}"'
        elif form < 0.2:
            noun = f"({noun})"
        return noun.capitalize() if chance.random() < 0.1 else noun

    def sentence() -> str:
        words = [word() + chance.choice(["", "", "", "", "", ",", ";"]) for _ in range(chance.randint(1, 12))]
        return " ".join(words) + chance.choice(["", ".", " .", "!", "?"])

    return [sentence() for _ in range(number)]


@pytest.mark.skipif(shutil.which("java") is None, reason="compares with the Java tokenizer, and there is no java")
def test_equals_the_java_tokenizer(tmp_path: Path) -> None:
    module = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    jar = Path(module.__file__).with_name(module.STANFORD_CORENLP_3_4_1_JAR)
    texts = CAPTIONS.split("\n") + captions(4000, seed=0)
    source = tmp_path / "captions.txt"
    source.write_text("\n".join(texts), encoding="utf-8")
    java = ["java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-cp", str(jar)]
    command = [*java, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", str(source)]
    output = subprocess.run(command, capture_output=True, check=True).stdout.decode("utf-8")
    lines = output.split("\n")[: len(texts)]
    assert len(lines) == len(texts)
    expected = [[token for token in line.split() if token not in module.PUNCTUATIONS] for line in lines]
    wrong = [(text, e, tokenize(text)) for text, e in zip(texts, expected, strict=True) if tokenize(text) != e]
    assert wrong == []


def test_punctuation_is_the_list_of_coco_caption() -> None:
    module = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    assert frozenset(module.PUNCTUATIONS) == PUNCTUATIONS


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's dog isn't here.", "a man 's dog is n't here"),
        ("They can't, he won't; I'm", "they ca n't he wo n't i 'm"),
        ("a black-and-white photo", "a black-and-white photo"),
        ("at 5 p.m. in the U.S.", "at 5 p.m. in the u.s."),
        ('the "stop" sign', "the stop sign"),
        ("(a dog)", "-lrb- a dog -rrb-"),
        ("$5 and 50%", "$ 5 and 50 %"),
        ("", ""),
        (" \n.", ""),
    ],
)
def test_by_hand(caption: str, tokens: str) -> None:
    assert tokenize(caption) == tokens.split()


@pytest.mark.parametrize(("chunk", "looks"), [("a+" * 200, 0), ("a+" * 200 + "@b", 1), ("x@y,a+" + "a+" * 200, 1)])
def test_a_long_chunk_is_gone_through_once(chunk: str, looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands before an @ may be as long as the chunk, and is looked at once, not from each place in it."""
    rules = list(ptb_tokenizer._RULES)
    expected = tokenize(chunk)
    seen = []

    class Email:
        pattern, groupindex = ptb_tokenizer._EMAIL, dict[str, int]()

        def match(self, text: str, at: int) -> re.Match[str] | None:
            seen.append(at)
            return re.compile(self.pattern, re.IGNORECASE).match(text, at)

    changed = [Email() if rule.pattern == ptb_tokenizer._EMAIL else rule for rule in rules]
    monkeypatch.setattr(ptb_tokenizer, "_RULES", changed)
    ptb_tokenizer._chunk.cache_clear()
    assert tokenize(chunk) == expected
    assert len(seen) == looks
    ptb_tokenizer._chunk.cache_clear()
