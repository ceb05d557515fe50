"""JSON files of a checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(file: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        file: The file.

    Returns:
        The object.

    Raises:
        ValueError: if the file cannot be read, is not JSON or holds something else; the message names it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: got a JSON {type(content).__name__}, want an object")
    return content
