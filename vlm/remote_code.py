"""A checkpoint that brings the code of its model along, for transformers without this package.

Loading it takes `trust_remote_code=True`: transformers then imports the files that `auto_map` names, and what those
import from files beside them. So the modules of this package that the model consists of become files in one folder.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

AUTO_MAPS: dict[str, dict[str, dict[str, str]]] = {
    "vlm": {
        "config.json": {
            "AutoConfig": "configuration.VLMConfig",
            "AutoModel": "base_model.VLMModel",
            "AutoModelForImageTextToText": "modeling.VLMForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling.VLMForConditionalGeneration",
        },
        "processor_config.json": {"AutoProcessor": "processing.VLMProcessor"},
    },
    "vlm_dual_encoder": {
        "config.json": {"AutoConfig": "dual_encoder.DualEncoderConfig", "AutoModel": "dual_encoder.DualEncoderModel"}
    },
}
"""By `model_type`, the file whose `auto_map` names a class, and the class by its Auto class."""

SEVERAL_ENCODERS = "\n\nfrom .vision_towers import register\n\nregister()\n"
"""What the entry modules of a model with several encoders end with: the Auto classes have to know those first."""


def write(model: Any, processor: Any, folder: Path) -> None:
    """Save a model and its processor with their code."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name, text in code(model.config.to_dict()).items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, auto_map in AUTO_MAPS[model.config.model_type].items():
        values = json.loads((folder / name).read_text(encoding="utf-8")) | {"auto_map": auto_map}
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def code(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the files of a model with this `config`, by name: the modules that `AUTO_MAPS` names and all of ours that
    they import."""
    auto_maps = AUTO_MAPS[config["model_type"]]
    entries = {target.partition(".")[0] for auto_map in auto_maps.values() for target in auto_map.values()}
    several = (config.get("vision_config") or {}).get("model_type") == "vision_towers"
    waiting, texts = [f"vlm.{name}" for name in sorted(entries | ({"vision_towers"} if several else set()))], {}
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
    if several:
        for name in entries - {"base_model", "modeling"}:  # models come after their configuration
            texts[f"{name}.py"] += SEVERAL_ENCODERS
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
