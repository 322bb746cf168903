"""Checks of exported folders in the hands of other packages: `python in_hands FOLDERS PLACE NAME...`.

Run by `test_finetuning.py` with the packages on the path and this project nowhere near: what ponders is the code in the
folders. Printed is one JSON object, of what each check found wrong.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
import with_others
import with_peft
import with_trl


def main() -> None:
    """Run the checks named, and print what was found."""
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    report: dict[str, Any] = {package.__name__: package.__version__ for package in (transformers, trl, peft)}
    for name in sys.argv[3:]:
        began = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                CHECKS[f"check_{name}"]()
            report[name] = "right"
        except Exception:
            report[name] = traceback.format_exc()
        print(f"{name}: {time.process_time() - began:.1f} s", file=sys.stderr)
    print(json.dumps(report))


CHECKS = {**vars(with_trl), **vars(with_peft), **vars(with_others)}

if __name__ == "__main__":
    main()
