"""What may be said of a run to strangers: no folders of this machine, and no credentials."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from vlm.errors import UserError
from vlm.paths import existing
from vlm.recipe_source import read_yaml

CREDENTIALS = {"token", "hub_token", "access_token", "auth_token", "api_key", "password", "secret"}
"""Keys whose values are left out."""

HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,31}://[^\s\"'<>]+")
SIGNED = re.compile(r"token|key|secret|sig(nature)?$|credential|password|auth", re.IGNORECASE)
"""Names of a URL's parameters that give access."""


def portable(value: Any, folders: Sequence[Path] = ()) -> Any:
    """Return plain values (of YAML or JSON) as they may be published.

    An absolute path inside one of the `folders` becomes relative to the first that holds it; of any other its last
    part is left. Both begin with `./`, so that no path looks like a Hub name. In longer texts the names of `folders`
    are cut out. URLs lose user names, passwords and signed parameters; the keys of `CREDENTIALS` are dropped.
    """
    if isinstance(value, Mapping):
        return {key: portable(item, folders) for key, item in value.items() if str(key).lower() not in CREDENTIALS}
    if isinstance(value, list | tuple):
        return [portable(item, folders) for item in value]
    return portable_text(value, folders) if isinstance(value, str) else value


def portable_text(text: str, folders: Sequence[Path] = ()) -> str:
    """The same for one text."""
    if is_local_path(text):
        return _relative(text, folders)
    for folder in sorted(map(str, folders), key=len, reverse=True):
        if len(folder) > 1:
            text = re.sub(rf"{re.escape(folder)}(?:/|(?![\w.-]))", "", text)
    return HUB_TOKEN.sub("hf_...", URL.sub(lambda found: _public_url(found[0]), text))


def is_local_path(text: str) -> bool:
    """Whether a text is an absolute path, of this system or of another, or one in a home folder."""
    if "\n" in text or len(text) < 3:
        return False
    return text.startswith("~/") or PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()


def _relative(text: str, folders: Sequence[Path]) -> str:
    if PureWindowsPath(text).is_absolute() and not PurePosixPath(text).is_absolute():
        return f"./{PureWindowsPath(text).name}"
    path = Path(text).expanduser()
    for folder in folders:
        if path.is_relative_to(folder):
            inside = path.relative_to(folder)
            return "." if inside == Path() else f"./{inside.as_posix()}"
    return f"./{path.name}"


def _public_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        kept = [(name, value) for name, value in parse_qsl(parts.query) if not SIGNED.search(name)]
    except ValueError:  # no URL after all
        return url
    query = parts.query if len(kept) == len(parse_qsl(parts.query)) else urlencode(kept)
    return urlunsplit(parts._replace(netloc=host, query=query))


def public_summary(run_dir: Path) -> dict[str, Any]:
    """Return the scores of a run for strangers; empty if it has none."""
    summary: dict[str, Any] = portable(read_json(run_dir / "evaluation" / "summary.json"), local_folders(run_dir))
    return summary


def public_recipe(run_dir: Path) -> dict[str, Any]:
    """Return the recipe of a run for strangers: folders of models as the Hub names they are copies of, other paths
    relative, no credentials."""
    path = run_dir / "recipe.yaml"
    recipe = read_yaml(path.read_text(encoding="utf-8"), str(path))[0] if path.is_file() else {}
    model = recipe.get("model")
    if isinstance(model, dict):
        for key in ("pretrained", "vision", "language"):
            if isinstance(names := model.get(key), list):
                model[key] = [hub_id(name) or name for name in names]
            elif isinstance(names, str):
                model[key] = hub_id(names) or names
    public: dict[str, Any] = portable(recipe, local_folders(run_dir, recipe))
    return public


def local_folders(run_dir: Path, recipe: Mapping[str, Any] | None = None) -> list[Path]:
    """Folders whose names nobody else has to know, the innermost first."""
    data = (recipe or {}).get("data")
    base = data.get("base_dir") if isinstance(data, dict) else None
    known = [Path(base)] if isinstance(base, str) and Path(base).is_absolute() else []
    return [*known, run_dir.resolve().parent, Path.cwd(), Path.home()]


def hub_id(name: str) -> str | None:
    """The Hub name of a model: itself, or what `source.json` in the folder says it is a copy of."""
    if path := existing(name):
        source = read_json(path / "source.json").get("model")
        return source if isinstance(source, str) else None
    return name if HUB_ID.fullmatch(name) else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file. Raises UserError for a damaged one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return found if isinstance(found, dict) else {}
