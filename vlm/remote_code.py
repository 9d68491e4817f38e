"""A checkpoint that brings the code of its model along, for transformers without this package.

Loading it takes `trust_remote_code=True`: transformers then imports the files that `auto_map` names, and what those
import from files beside them. So the modules of this package that the model consists of become files in one folder.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from vlm.errors import UserError

AUTO_MAP = {
    "config.json": {
        "AutoConfig": "configuration.VLMConfig",
        "AutoModelForImageTextToText": "modeling.VLMForConditionalGeneration",
    },
    "processor_config.json": {"AutoProcessor": "processing.VLMProcessor"},
}


def write(model: Any, processor: Any, folder: Path) -> None:
    """Save a model and its processor with their code. Raises UserError for several encoders side by side, which the
    Auto classes would have to know first."""
    if model.config.vision_config.model_type == "vision_towers":
        raise UserError(
            "several encoders side by side are loaded by an Auto class that only vlm teaches: push the model"
        )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name, text in code().items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, auto_map in AUTO_MAP.items():
        values = json.loads((folder / name).read_text(encoding="utf-8")) | {"auto_map": auto_map}
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def code() -> dict[str, str]:
    """The files, by name: the modules that `AUTO_MAP` names and all of ours that they import."""
    entries = {target.partition(".")[0] for auto_map in AUTO_MAP.values() for target in auto_map.values()}
    waiting, texts = [f"vlm.{name}" for name in sorted(entries)], dict[str, str]()
    while waiting:
        module = waiting.pop()
        if _file_name(module) not in texts:
            text = _source(module)
            texts[_file_name(module)] = re.sub(r"^( *)from (vlm\.[\w.]+) import", _relative, text, flags=re.MULTILINE)
            waiting += [
                node.module or ""
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlm.")
            ]
    return texts


def _relative(found: re.Match[str]) -> str:
    return f"{found[1]}from .{_file_name(found[2]).removesuffix('.py')} import"


def _file_name(module: str) -> str:
    return module.removeprefix("vlm.").replace(".", "_") + ".py"


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")
