"""Trees for a Q-Former that reads the question: answers to the same question share their image, others do not."""

import pytest

from tests.data.test_tree_masks import examples, in_trees, one_conversation_at_a_time
from tests.data.test_trees import assert_close
from tests.tiny import small_projector, tiny
from tests.training.test_plain_rows import items_of, why

READS = small_projector("qformer") | {"use_qformer_text_input": True}


def test_those_with_the_same_question_stand_in_a_tree():
    """Captions do all; of the questions about the second example each stands alone."""
    _, processor = tiny(projector=READS)
    assert [item.answers for item in items_of(processor, examples())] == [3, 1, 1, 1, 2]
    _, processor = tiny(projector=small_projector("qformer"))
    assert [item.answers for item in items_of(processor, examples())] == [3, 2, 1, 2]


@pytest.mark.parametrize("budget", [1, 400])
@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_their_loss_and_gradients_are_those_of_one_conversation_at_a_time(fusion, budget):
    model, processor = tiny(fusion=fusion, projector=READS)
    wanted = one_conversation_at_a_time(model, processor, examples())
    found, batch = in_trees(model, processor, examples(), budget)
    assert_close(found, wanted)
    assert len(batch["qformer_input_ids"]) == len(batch["pixel_values"]) == 6
    assert any("word_embeddings" in name for name in found[1]), "gradients reach the words"


def test_such_trees_are_found_to_be_exact():
    assert why(*tiny(projector=READS), examples()) is None
