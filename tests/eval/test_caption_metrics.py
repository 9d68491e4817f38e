"""BLEU, ROUGE-L and CIDEr-D against the scorers of pycocoevalcap, on the same tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.eval.bleu import bleu_from_statistics, bleu_statistics
from vlm.eval.cider import cider_d
from vlm.eval.rouge import rouge_l

pytest.importorskip("pycocoevalcap")
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

Corpus = list[tuple[list[str], list[list[str]]]]

HAND_MADE_TEXTS = [
    ("a man rides a red bike down the street", ["a man is riding a bike", "man on bike"]),
    ("two dogs play in the park", ["two dogs play in the park"]),
    ("", ["a cat on a mat"]),
    ("dog", ["dog", "a dog"]),
    ("the the the the the", ["the cat is on the mat", "there is a cat"]),
    ("completely different words here", ["nothing shared at all with it"]),
]
HAND_MADE: Corpus = [(prediction.split(), [ref.split() for ref in refs]) for prediction, refs in HAND_MADE_TEXTS]

tokens = st.lists(st.sampled_from(["a", "the", "man", "dog", "on", "red", "'s", "runs"]), max_size=9)
corpora = st.lists(st.tuples(tokens, st.lists(tokens.filter(bool), min_size=1, max_size=4)), min_size=1, max_size=8)


def check(corpus: Corpus) -> None:
    predictions = [prediction for prediction, _ in corpus]
    references = [refs for _, refs in corpus]
    expected_of = {i: [" ".join(prediction)] for i, prediction in enumerate(predictions)}
    given_to = {i: [" ".join(ref) for ref in refs] for i, refs in enumerate(references)}

    bleu, per_item = Bleu(4).compute_score(given_to, expected_of, verbose=0)
    statistics = bleu_statistics(predictions, references)
    np.testing.assert_allclose(bleu_from_statistics(statistics.sum(axis=0)), bleu[3], rtol=0, atol=1e-9)
    np.testing.assert_allclose(bleu_from_statistics(statistics), per_item[3], rtol=0, atol=1e-9)

    rouge, per_item = Rouge().compute_score(given_to, expected_of)
    np.testing.assert_allclose(rouge_l(predictions, references), per_item, rtol=0, atol=1e-9)
    np.testing.assert_allclose(rouge_l(predictions, references).mean(), rouge, rtol=0, atol=1e-9)

    cider, per_item = Cider().compute_score(given_to, expected_of)
    np.testing.assert_allclose(cider_d(predictions, references), per_item, rtol=0, atol=1e-9)
    np.testing.assert_allclose(cider_d(predictions, references).mean(), cider, rtol=0, atol=1e-9)


def test_hand_made_corpus() -> None:
    check(HAND_MADE)


def test_all_predictions_empty() -> None:
    check([([], refs) for _, refs in HAND_MADE])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(corpora)
def test_random_corpora(corpus: Corpus) -> None:
    check(corpus)


def test_cider_of_a_shard_is_not_a_part_of_the_cider_of_the_set() -> None:
    predictions, references = [p for p, _ in HAND_MADE], [r for _, r in HAND_MADE]
    halves = np.concatenate([cider_d(predictions[:3], references[:3]), cider_d(predictions[3:], references[3:])])
    assert not np.allclose(halves.mean(), cider_d(predictions, references).mean())
