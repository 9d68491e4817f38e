"""Two processes that train a dual encoder give what one gives with the same global batch, the uneven last one too."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from tests.dual_encoders import text_sizes, tokenizer
from tests.training.helpers import TRAIN, recipe_values, save_images, save_parts, train
from tests.training.test_parallel import launch, write

pytestmark = pytest.mark.slow

CASES = {
    "infonce": {"loss": "infonce", "projection_dim": 16},
    "sigmoid in chunks": {"loss": "sigmoid", "projection_dim": 16, "chunk_size": 1},
}


def values_of(place, case, processes):
    values = recipe_values(place / "parts", place / "images", place / f"{case}-{processes}")
    values["model"]["language"] = str(place / "text")
    values["data"]["train"]["metadata"] = "uneven.jsonl"
    values["data"]["cache_features"] = False
    del values["data"]["max_tokens_per_row"], values["evaluation"], values["lora"]
    values["contrastive"] = CASES[case]
    values["trainable"] = {"projector": 1e-2, "language": 1e-3, "vision": 1e-3}
    values["train"] = TRAIN | {"max_steps": 7, "per_device_train_batch_size": 4 // processes, "save_steps": 7}
    return values


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Parts without dropout, and ten images with one to four texts."""
    folder = tmp_path_factory.mktemp("parallel_pairs")
    save_parts(folder / "parts")
    torch.manual_seed(2)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(**text_sizes(), **still)).save_pretrained(folder / "text")
    tokenizer().save_pretrained(folder / "text")
    images = save_images(folder / "images")
    rows = [json.loads(line) for line in (images / "train.jsonl").read_text().splitlines()]
    uneven = [row | {"captions": ["a cat", "no cat at all", "a dog", "2"][: 1 + n % 4]} for n, row in enumerate(rows)]
    (images / "uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in uneven))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_HOME", str(folder / "home"))
        for case in CASES:
            train(values_of(folder, case, 1))
        for processes in (2, 4):
            done = launch(processes, *(write(values_of(folder, case, processes)) for case in CASES))
            assert done.returncode == 0, done.stderr
        yield folder


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_losses_held_out_scores_and_weights_are_those_of_one_process(place, case, processes):
    runs = [place / f"{case}-{count}" for count in (1, processes)]
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    for kind in ("loss", "grad_norm", "eval_loss", "eval_image_to_text_r1"):
        one, several = ([entry[kind] for entry in log if kind in entry] for log in logs)
        assert len(one) == len(several) > 2
        assert several == pytest.approx(one, rel=1e-4), kind
    one, several = (load_file(run / "model" / "model.safetensors") for run in runs)
    for name, tensor in one.items():
        if name.endswith(("k_proj.bias", "key.bias")):  # softmax does not see them: their gradient is rounding alone
            continue
        torch.testing.assert_close(several[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
