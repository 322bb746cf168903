"""What the versions of transformers call the same things, and which of them this code was tested with."""

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

CACHE_NAMES = ("past_key_values", "cache")  # of the same argument: before transformers 5.24, and from it on
# arguments that decorators of transformers take off before a backbone's `forward` sees them
TAKEN_OFF = frozenset({"return_dict", "debug_io", "debug_io_dir", "prune_layers"})
# what collators of transformers and TRL say of the documents of a row, beside their positions
DOCUMENT_BOUNDS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})
# what `TransformersKwargs` says in the versions that have it, for those that do not
NAMES_OF_TRANSFORMERS = frozenset({"output_attentions", "output_hidden_states", "is_causal"})


def parameters(forward: Any) -> tuple[str, ...]:
    """The names of the parameters of a stock `forward`, in its order, without `self` and what it collects."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = inspect.signature(forward).parameters.values()
    return tuple(parameter.name for parameter in named if parameter.kind not in kinds and parameter.name != "self")


def cache_name(names: Iterable[str]) -> str:
    """What a stock `forward` with parameters of these names calls its cache."""
    return "cache" if "cache" in names else "past_key_values"


def known_arguments(forward: Any) -> frozenset[str]:
    """The names that a stock backbone's `forward` and its layers do something with."""
    shared = getattr(utils, "TransformersKwargs", None)
    names = NAMES_OF_TRANSFORMERS if shared is None else frozenset(shared.__annotations__)
    return frozenset(parameters(forward)) | names | TAKEN_OFF | DOCUMENT_BOUNDS


def only_known(arguments: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """The arguments, without those of unknown names that say nothing, since they are None.

    Raises:
        TypeError: an argument has a name that is not known, and would be passed over.
    """
    for name, value in arguments.items():
        if name in known or value is None:
            continue
        if isinstance(value, Cache):
            raise TypeError(f"{name} is a cache, which this model takes as {' or '.join(CACHE_NAMES)} only")
        raise TypeError(
            f"{name} is an argument that neither the pondering model nor its backbone in transformers "
            f"{transformers.__version__} knows; it would have no effect, so leave it out"
        )
    return {name: value for name, value in arguments.items() if name in known}


def by_position(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let what follows the first argument be given by position, in the order that the stock `forward` has.

    That order is another one for each architecture. `forward` is a method of a model with a `stock_forward`.
    """

    @functools.wraps(forward)
    def taking_positions(self: Any, *given: Any, **arguments: Any) -> Any:
        if len(given) < 2:
            return forward(self, *given, **arguments)
        names = parameters(self.stock_forward)
        if len(given) > len(names):
            raise TypeError(f"forward takes {len(names)} arguments by position, {len(given)} were given")
        named = dict(zip(names, given, strict=False))
        for name in named.keys() & arguments.keys():
            raise TypeError(f"{name} was given twice, by position and by name")
        return forward(self, **named, **arguments)

    return taking_positions


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, under whichever of its names it was given.

    Raises:
        ValueError: two different ones were given.
        TypeError: it is none of transformers' caches, as the tuples of old versions.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument, and got two caches; give one")
    found = cache if past_key_values is None else past_key_values
    if found is not None and not isinstance(found, Cache):
        raise TypeError(f"the cache is a {type(found).__name__}; give a Cache of transformers, such as DynamicCache()")
    return found


def _minor(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@functools.cache
def warn_of_untested_version() -> None:
    """Say once in a process that this version of transformers came after, or before, those that were tested."""
    if not _minor(OLDEST) <= _minor(transformers.__version__) <= _minor(NEWEST):
        warnings.warn(
            f"this pondering model was tested with transformers {OLDEST} to {NEWEST}, and runs on "
            f"{transformers.__version__}; compare generation with use_cache=True and False before you rely on it",
            stacklevel=2,
        )
