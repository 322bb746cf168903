"""The differences between versions of transformers, and the versions that this code was tested with."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import transformers
from transformers import utils
from transformers.cache_utils import Cache

# The oldest version that loads an exported folder, and the newest that the tests have run with.
OLDEST, NEWEST = "4.56", "5.24"

CACHE_NAMES = ("past_key_values", "cache")  # names of one argument, before transformers 5.24 and from 5.24 on
# arguments that decorators of transformers remove before a backbone's `forward` sees them
TAKEN_OFF = frozenset({"return_dict", "debug_io", "debug_io_dir", "prune_layers"})
# arguments by which collators of transformers and TRL describe the documents of a row, besides positions
DOCUMENT_BOUNDS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})
# the names in `TransformersKwargs`, for versions that do not have it
NAMES_OF_TRANSFORMERS = frozenset({"output_attentions", "output_hidden_states", "is_causal"})


def parameters(forward: Any) -> tuple[str, ...]:
    """The parameters of a stock `forward` by name, in its order, without `self`, *args and **kwargs."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = inspect.signature(forward).parameters.values()
    return tuple(parameter.name for parameter in named if parameter.kind not in kinds and parameter.name != "self")


def cache_name(names: Iterable[str]) -> str:
    """The name that a stock `forward` with these parameters has for its cache."""
    return "cache" if "cache" in names else "past_key_values"


def known_arguments(forward: Any) -> frozenset[str]:
    """The names of all arguments that a stock backbone's `forward` and its layers use."""
    shared = getattr(utils, "TransformersKwargs", None)
    names = NAMES_OF_TRANSFORMERS if shared is None else frozenset(shared.__annotations__)
    return frozenset(parameters(forward)) | names | TAKEN_OFF | DOCUMENT_BOUNDS


def only_known(arguments: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """The arguments, without unknown ones that are None.

    Raises:
        TypeError: an argument has an unknown name, so it would be ignored.
    """
    for name, value in arguments.items():
        if name in known or value is None:
            continue
        if isinstance(value, Cache):
            raise TypeError(f"{name} is a cache; give it under the name {' or '.join(CACHE_NAMES)}")
        raise TypeError(
            f"{name} is an argument that neither the pondering model nor its backbone in transformers "
            f"{transformers.__version__} knows; it would have no effect, so leave it out"
        )
    return {name: value for name, value in arguments.items() if name in known}


def by_position(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let callers give the arguments after the first by position, in the order of the stock `forward`.

    Each architecture has its own order. `forward` is a method of a model with a `stock_forward`.
    """

    @functools.wraps(forward)
    def taking_positions(self: Any, *given: Any, **arguments: Any) -> Any:
        if len(given) < 2:
            return forward(self, *given, **arguments)
        names = parameters(self.stock_forward)
        if len(given) > len(names):
            raise TypeError(f"forward takes {len(names)} arguments by position, but {len(given)} were given")
        named = dict(zip(names, given, strict=False))
        for name in named.keys() & arguments.keys():
            raise TypeError(f"{name} was given twice, by position and by name")
        return forward(self, **named, **arguments)

    return taking_positions


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, whichever of its names it was given under.

    Raises:
        ValueError: two different caches were given.
        TypeError: it is not a cache of transformers, but for example a tuple, as old versions had.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are names of one argument, but two caches were given; give one")
    found = cache if past_key_values is None else past_key_values
    if found is not None and not isinstance(found, Cache):
        raise TypeError(f"the cache is a {type(found).__name__}; give a Cache of transformers, such as DynamicCache()")
    return found


def _minor(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@functools.cache
def warn_of_untested_version() -> None:
    """Warn once in a process if this version of transformers is newer or older than the tested ones."""
    if not _minor(OLDEST) <= _minor(transformers.__version__) <= _minor(NEWEST):
        warnings.warn(
            f"this pondering model was tested with transformers {OLDEST} to {NEWEST}, but runs on "
            f"{transformers.__version__}; compare generation with use_cache=True and False before you rely on it",
            stacklevel=2,
        )
