"""Make a Hugging Face folder: weights, the code of `ponder_scale/model`, configuration, tokenizer and model card.

The folder is written beside its final place under a hidden name, and renamed at the end. You can check its SHA256SUMS
with `sha256sum -c`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ponder_scale.errors import CheckpointError
from ponder_scale.export.tokenizer import bundle_tokenizer
from ponder_scale.export.writer import write_safetensors
from ponder_scale.files.delete import MARK, delete_contents, delete_file, held
from ponder_scale.files.places import check_folder
from ponder_scale.files.write import sync_folder
from ponder_scale.setup.build import auto_map, model_class, model_code

SUMS = "SHA256SUMS"
_SUFFIXES = (".safetensors", ".json", ".py", ".md", ".model", ".txt", ".jinja", ".tmp")


@contextmanager
def making(out: Path) -> Iterator[Path]:
    """Yield a hidden folder, and rename it to `out` when the block ends well. If the block raises, it is deleted.

    Raises:
        CheckpointError: `out` exists, or cannot be made.
    """
    if out.exists():
        raise CheckpointError(f"{out}: exists already; remove it or give another folder")
    check_folder(out, "the folder to make")
    hidden = out.with_name(f".making-{out.name}")
    with held(hidden, _named_by_export):
        delete_contents(hidden, _named_by_export, keep=[MARK])
        try:
            yield hidden
            files = sorted(path for path in hidden.iterdir() if path.name != MARK)
            sums = "".join(f"{_sha256(path)}  {path.name}\n" for path in files)
            (hidden / SUMS).write_text(sums, encoding="utf-8")
            mode = hidden.stat().st_mode & 0o666  # new files get this mode here; some writers set another
            for path in hidden.iterdir():
                path.chmod(mode)
            sync_folder(hidden)
            delete_file(hidden / MARK)
            hidden.rename(out)
            sync_folder(out.parent)
        except BaseException as error:
            if hidden.is_dir():
                delete_contents(hidden, _named_by_export)
            if isinstance(error, OSError):  # for example, the disk is full
                raise CheckpointError(
                    f"{out}: cannot be created: {error}; the unfinished files were deleted"
                ) from error
            raise


def _named_by_export(name: str) -> bool:
    """Whether an export may have made a file of this name in an unfinished folder."""
    return "/" not in name and (name in (MARK, SUMS) or name.endswith(_SUFFIXES))


def write_folder(
    out: Path,
    configuration: Any,
    weights: Iterable[tuple[str, Tensor]],
    *,
    dtype: str,
    card: Callable[[int], str],
    tokenizer: Path | None,
) -> int:
    """Make the folder `out` and return its number of parameters.

    Args:
        configuration: configuration of a pondering model.
        weights: pairs (name, tensor). Only one tensor is in memory at a time.
        card: takes the number of parameters and returns the README.
        tokenizer: folder with the tokenizer's files, or None for a model without a tokenizer.
    """
    model = meta_model(configuration)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    parameters = sum(shape.numel() for shape in shapes.values())
    with making(out) as folder:
        write_safetensors(folder, shapes, weights, getattr(torch, dtype))
        _write_configuration(folder, configuration, dtype)
        for name, code in model_code().items():
            (folder / name).write_bytes(code)
        if tokenizer is not None:
            bundle_tokenizer(tokenizer, folder, eod_id=configuration.eos_token_id)
        (folder / "README.md").write_text(card(parameters), encoding="utf-8")
    return parameters


def meta_model(configuration: Any) -> Any:
    """The model of a configuration, without memory for its weights."""
    with torch.device("meta"):
        return model_class(configuration)(configuration)


def _write_configuration(folder: Path, configuration: Any, dtype: str) -> None:
    model = model_class(configuration)
    configuration.architectures = [model.__name__]
    configuration.dtype = dtype
    configuration.auto_map = auto_map(type(configuration), model)
    configuration.save_pretrained(folder)
    end = configuration.eos_token_id
    pad = end if configuration.pad_token_id is None else configuration.pad_token_id
    GenerationConfig(
        bos_token_id=configuration.bos_token_id, eos_token_id=end, pad_token_id=pad[0] if isinstance(pad, list) else pad
    ).save_pretrained(folder)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
