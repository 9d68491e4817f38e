"""No text of a user becomes a special token, in any template, tokenizer or path to a model."""

import random
from typing import Any

import pytest
import torch

from tests.dual_encoders import tokenizer as text_tokenizer
from tests.dual_encoders import text_sizes
from tests.fuzz.cases import parts, run, told
from tests.stock import stock
from tests.tiny import byte_level_tokenizer, image, tiny
from transformers import CLIPConfig
from vlm.data.conversation import tokenize_branch
from vlm.data.example import question_and_answer
from vlm.dual_encoder import tokenize as tokenize_texts
from vlm.generation import tokenize
