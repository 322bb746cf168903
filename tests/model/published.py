"""What the published code computed, as `tests/oracle` keeps it."""

from __future__ import annotations

import json
from pathlib import Path

ORACLE = Path(__file__).parents[1] / "oracle"
CONTENT = json.loads((ORACLE / "oracle.json").read_text())
CASES = {case["case"]: case for case in CONTENT["cases"]}
