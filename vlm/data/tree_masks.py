"""Who sees whom in a row of trees, by the model's own rule.

In most decoders a token sees all before it. In some it sees less (a sliding window: Mistral, Gemma 2), in some more
(the tokens of an image see each other: Gemma 3; image and prompt do: PaliGemma). Whatever the rule is, it is about one
conversation, and that is one path through a tree. So the model is asked for the mask that it would make for each path,
and its answer carried over:

    mask of the tree at (i, j) = mask of a path through i and j, at the places of i and j in it

The trunk is on every path, and must see the same on each. Where it sees the end of a prompt that all answers have,
which stands in each branch once more, it is given that of the first: they are all alike.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

from vlm.attention import supports_own_attention
from vlm.data.prompts import IMAGE_MASKS
from vlm.data.trees import Tree, path_places, paths
from vlm.tree_attention import TRUNK, tree_layout

PathMasks = dict[str, Tensor | None]
"""For each kind of layer the boolean mask `[L, L]` of a path; None if it is causal and nothing else."""


class NotATree(ValueError):  # noqa: N818 - named for what was found
    """No mask of a tree says what the model's own masks say of one row an answer."""


def require_trees(rows: Sequence[Sequence[Tree]]) -> None:
    """Raise [`NotATree`] if the model is given something for a row as a whole: a row then has one conversation."""
    trees = [tree for row in rows for tree in row]
    if any(name in IMAGE_MASKS for tree in trees for name in tree.token_types):
        raise NotATree("its layers look at the images of their row")


class TreeMasks:
    """Makes the masks of rows of trees for `model`, by its own function for a single row (which `generate` uses)."""

    def __init__(self, model: Any) -> None:
        owners = [model, getattr(model, "language_model", None)]
        own = [found for owner in owners if (found := getattr(owner, "create_masks_for_generate", None))]
        self._create = own[0] if own else create_masks_for_generate
        self._config = copy.deepcopy(model.config)
        # Asked for boolean masks, which are those of SDPA, whatever the model computes attention with.
        self._config.get_text_config()._attn_implementation = "sdpa"
        self._tree_attention = supports_own_attention(model)
        self._cross_attention = getattr(model.config, "uses_cross_attention", False)
        self._added = model.config.get_text_config()._attn_implementation == "eager"

    def __call__(self, rows: Sequence[Sequence[Tree]], causal: Tensor) -> dict[str, Any]:
        """What a batch of `rows` needs, whose mask for a causal decoder is `causal [B, 1, L, L]`: `attention_mask`, a
        dictionary where kinds of layers differ, and `tree_layout` if tree attention, which is causal, can be used.

        Raises [`NotATree`] if a trunk would have to see into its branches, or if every layer has a window and
        cross-attention, which has none, needs a mask to tell by whose image it is.
        """
        masks: dict[str, Tensor] = {}
        known: dict[Any, PathMasks] = {}
        for row, trees in enumerate(rows):
            start = 0
            for tree in trees:
                trunk = tree.branch_ids.count(TRUNK)
                for number, (path, places) in enumerate(zip(paths(tree), path_places(tree), strict=True)):
                    at = start + torch.tensor(places)
                    for kind, mask in self._of_path(path, known).items():
                        whole = masks.setdefault(kind, causal)
                        if mask is not None:
                            _require_same_trunk(mask, tree, trunk)
                            whole = masks[kind] = causal.clone() if whole is causal else whole
                            whole[row, 0, at[:, None], at] = _own_rows(mask, trunk) if number else mask
                start += len(tree)
        if all(mask is causal for mask in masks.values()) and self._tree_attention:
            return {"attention_mask": causal, "tree_layout": tree_layout(rows)}
        if self._cross_attention and all(mask is not causal for mask in masks.values()):
            raise NotATree("each of its layers has a sliding window, and the image of a token may be behind it")
        first, *others = masks.values()
        if all(mask is first or torch.equal(mask, first) for mask in others):
            return {"attention_mask": self._as_taken(first)}
        return {"attention_mask": {kind: self._as_taken(mask) for kind, mask in masks.items()}}

    def _of_path(self, path: Tree, known: dict[Any, PathMasks]) -> PathMasks:
        """The masks of one path, looked up in `known`: many paths of a batch are alike."""
        key = (len(path), *map(tuple, path.token_types.values()))
        if key not in known:
            made = self._create(
                config=self._config,
                inputs_embeds=torch.empty(1, len(path), 0),
                attention_mask=None,
                cache=None,
                position_ids=None,
                is_first_iteration=True,
                **{name: torch.tensor([column]) for name, column in path.token_types.items()},
            )
            made = made if isinstance(made, dict) else {"all": made}
            # Recurrent layers take no mask of this kind.
            known[key] = {k: m[0, 0] if m is not None and m.ndim == 4 else None for k, m in made.items()}
        return known[key]

    def _as_taken(self, mask: Tensor) -> Tensor:
        """Eager attention adds its mask to the scores; a boolean one would be taken for 0 and 1."""
        return torch.where(mask, 0.0, torch.finfo(torch.float32).min) if self._added else mask


def _require_same_trunk(mask: Tensor, tree: Tree, trunk: int) -> None:
    """Raise [`NotATree`] if the first `trunk` tokens of a path with this `mask [L, L]` see more of a branch than what
    all branches of `tree` begin with."""
    if not mask[:trunk, trunk:].any():
        return
    seen = int(mask[:trunk].any(dim=0).nonzero().max()) + 1
    columns = (tree.input_ids, *tree.token_types.values())
    begins = [[[column[i] for i in places[trunk:seen]] for column in columns] for places in path_places(tree)]
    if mask[:seen, seen:].any() or any(begin != begins[0] for begin in begins):
        raise NotATree("what the answers about an image share would see what they do not share")


def _own_rows(mask: Tensor, trunk: int) -> Tensor:
    """The mask of a path without what its trunk sees of its branch."""
    mask = mask.clone()
    mask[:trunk, trunk:] = False
    return mask
