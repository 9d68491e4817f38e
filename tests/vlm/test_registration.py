"""`import vlm` is cheap, and the Auto classes know the model whichever is imported first, each in a new process."""

import subprocess
import sys

import pytest

CHECK = """
config = AutoConfig.for_model("vlm")
assert type(config).__module__ == "vlm.configuration", type(config)
assert AutoModelForImageTextToText._model_mapping[type(config)].__name__ == "VLMForConditionalGeneration"
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
assert PROCESSOR_MAPPING[type(config)].__name__ == "VLMProcessor"
"""
CLASSES = "from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor\n"


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "imports",
    [
        f"import vlm\n{CLASSES}",
        pytest.param(f"{CLASSES}import vlm\n", marks=pytest.mark.slow),
        # which imports the Auto classes from the middle of modules that they need themselves
        f"import vlm\nfrom transformers import CLIPImageProcessor\n{CLASSES}",
        *(
            pytest.param(f"import vlm\nfrom transformers import {name}\n{CLASSES}", marks=pytest.mark.slow)
            for name in ("CLIPVisionModelWithProjection", "Trainer", "pipeline")
        ),
        pytest.param(f"import transformers\nimport vlm\n{CLASSES}", marks=pytest.mark.slow),
        f"import vlm.encoder\n{CLASSES}",  # which imports the Auto classes, to which it is then registered itself
        *(
            pytest.param(f"import vlm.{module}\n{CLASSES}", marks=pytest.mark.slow)
            for module in ("configuration", "processing", "modeling", "build")
        ),
    ],
)
def test_the_auto_classes_know_the_model(imports):
    run(imports + CHECK + "import sys\nassert not any('vlm' in type(finder).__module__ for finder in sys.meta_path)")


def test_import_alone_loads_neither_transformers_nor_torch():
    run(
        "import sys, vlm\n"
        "heavy = {'transformers', 'torch', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert vlm.VLMConfig.model_type == 'vlm'\n"
        "assert 'transformers' in sys.modules\n"
    )


def test_an_unknown_attribute_is_an_attribute_error():
    import vlm

    with pytest.raises(AttributeError, match="has no attribute 'bild'"):
        vlm.bild  # noqa: B018
