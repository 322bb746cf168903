"""Decide whether the code of an exported folder is ours. Loading a folder with its own code runs it with your rights.

A folder is known to be ours if its code is that of this installation, byte for byte. Then the installed classes load
it, and none of its code runs. What a folder says about itself does not matter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ponder_scale.errors import CheckpointError, ConfigError
from ponder_scale.setup.build import ARCHITECTURES, auto_map, configuration_from_dict, model_code

FLAG = "--trust-remote-code"


def installed_configuration(folder: Path) -> Any:
    """The configuration of a folder that is known to be ours, for the installed classes.

    Raises:
        CheckpointError: the folder is not known to be ours. The message says why.
    """
    values = _read(folder / "config.json")
    reason = _stranger(folder, values)
    if reason is not None:
        raise CheckpointError(
            f"{folder}: {reason}, so this version of ponder-scale may not have made it; loading it would run its code "
            f"with your rights; read the code, then add {FLAG}, or use import-reference, which runs none of it"
        )
    try:
        return configuration_from_dict(values)
    except (ConfigError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {' '.join(str(error).split())[:300]}") from error


def _stranger(folder: Path, values: dict[str, Any]) -> str | None:
    """Why the folder is not known to be ours, or None."""
    ours = {each.configuration.model_type: each for each in ARCHITECTURES.values()}
    name = values.get("model_type")
    if not isinstance(name, str) or name not in ours:
        return f"its model_type is {ascii(name)[:80]}"
    if values.get("auto_map") != auto_map(ours[name].configuration, ours[name].model):
        return f"auto_map in its config.json is {ascii(values.get('auto_map'))[:200]}"
    code, present = model_code(), sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    missing, added = sorted(code.keys() - present), sorted(set(present) - code.keys())
    if missing or added:
        return f"{added[0]} was added to its code" if added else f"{missing[0]} is missing from its code"
    changed = [file for file in present if (folder / file).read_bytes() != code[file]]
    if changed:
        return f"its {changed[0]} differs from that of this installation"
    if "auto_map" in _read(folder / "tokenizer_config.json"):
        return "its tokenizer_config.json has an auto_map"
    if (folder / "adapter_config.json").exists():
        return "it has an adapter"
    return None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected keys and values")
    return content
