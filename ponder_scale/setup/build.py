"""Turn the recipe's `model` section into a transformers configuration and a freshly initialized model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import ponder_scale.model
from ponder_scale.config import ModelConfig, RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.model import configuration as configurations
from ponder_scale.model import modeling
from ponder_scale.setup.width import scale_initial_weights
from ponder_scale.shards.format import ShardSet

try:
    from huggingface_hub.errors import StrictDataclassError
except ImportError:  # before its version 0.34, which transformers 5 needs
    StrictDataclassError = ValueError  # type: ignore[misc, assignment]

# The errors by which transformers refuses a configuration, when it is created or when the model is built from it.
REFUSALS = (
    *(ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError, ZeroDivisionError),
    StrictDataclassError,
)
RECIPE_ONLY = ("architecture", "init_from", "extra")
# Keys of older folders that configurations convert, or that attention reads although no configuration declares them.
OLDER_FIELDS = (
    *("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base"),
    *("original_max_position_embeddings", "head_dim"),
)
UNSET_BY_DEFAULT = ("num_key_value_heads", "rope_theta", "tie_word_embeddings", "init_by_passes")


@dataclass(frozen=True)
class Architecture:
    """A transformer that ponders.

    Args:
        names: the recipe's keys that have another name in its configuration. None marks a key that it does not have.
        defaults: values of its configuration for which we have another default.
    """

    configuration: Any
    model: Any
    names: dict[str, str | None]
    defaults: dict[str, Any] = field(default_factory=dict)


# Pretraining sees each token about once, so no architecture has dropout unless `extra` asks for it.
ARCHITECTURES = {
    "llama": Architecture(
        configurations.PonderLlamaConfig, modeling.PonderLlamaForCausalLM, {"norm_eps": "rms_norm_eps"}
    ),
    "olmo2": Architecture(
        configurations.PonderOlmo2Config, modeling.PonderOlmo2ForCausalLM, {"norm_eps": "rms_norm_eps"}
    ),
    "gpt_neox": Architecture(
        configurations.PonderGPTNeoXConfig,
        modeling.PonderGPTNeoXForCausalLM,
        {"norm_eps": "layer_norm_eps", "num_key_value_heads": None},
    ),
    "gpt2": Architecture(
        configurations.PonderGPT2Config,
        modeling.PonderGPT2LMHeadModel,
        {
            "norm_eps": "layer_norm_epsilon",
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "num_key_value_heads": None,
            "rope_theta": None,
        },
        {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
}


def model_configuration(model: ModelConfig, *, vocab_size: int, seq_len: int, eod_id: int | None) -> Any:
    """The transformers configuration of the recipe's model.

    Args:
        vocab_size: size of the tokenizer's vocabulary. That of the model may be larger, never smaller.
        seq_len: number of positions, unless the recipe sets `max_position_embeddings`.
        eod_id: the token that ends a document, and so ends generation.

    Raises:
        ConfigError: a value does not fit the data or the architecture.
    """
    if model.vocab_size is not None and model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size is {model.vocab_size}, but the shards' tokenizer has {vocab_size} tokens; "
            "raise it or leave it null"
        )
    if model.max_position_embeddings is not None and model.max_position_embeddings < seq_len:
        raise ConfigError(
            f"model.max_position_embeddings is {model.max_position_embeddings}, below data.seq_len ({seq_len}); "
            "raise it or leave it null"
        )
    architecture = ARCHITECTURES[model.architecture]
    given = {key: value for key, value in vars(model).items() if key not in RECIPE_ONLY}
    given |= {
        "vocab_size": model.vocab_size or vocab_size,
        "max_position_embeddings": model.max_position_embeddings or seq_len,
    }
    values = _named(given, model.architecture, architecture.names)
    _check_extra(model.extra)
    known = architecture.configuration().to_dict()
    for key in model.extra:
        if key not in known:
            name = architecture.configuration.__name__
            raise ConfigError(f"model.extra.{key}: {name} has no such field; see transformers' documentation")
        if key in values:
            raise ConfigError(f"model.extra.{key}: set it as model.{_recipe_key(key, architecture.names)}")
    _check_heads(model, {**architecture.defaults, **model.extra})
    values |= {"bos_token_id": None, "eos_token_id": eod_id, "pad_token_id": None, "use_cache": True}
    try:
        return architecture.configuration(**{**architecture.defaults, **values, **model.extra})
    except REFUSALS as error:
        raise ConfigError(f"model: {_in_one_line(error)}") from error


def _check_heads(model: ModelConfig, extra: dict[str, Any]) -> None:
    """Raise ConfigError for heads that attention cannot use. Torch would only fail in the middle of a pass."""
    heads, shared = model.num_attention_heads, model.num_key_value_heads
    if shared is not None and heads % shared:
        raise ConfigError(
            f"model.num_key_value_heads is {shared}; expected a divisor of model.num_attention_heads ({heads})"
        )
    own = extra.get("head_dim")
    width = model.hidden_size // heads if own is None else own
    share = extra.get("partial_rotary_factor", extra.get("rotary_pct", 0.25)) if model.architecture == "gpt_neox" else 1
    if model.architecture == "gpt2" or not all(isinstance(value, (int, float)) for value in (width, share)):
        return
    rotated = int(width * share)
    if rotated < 2 or rotated % 2 or not 0 < share <= 1:
        of = f", of which {share:g} is rotated" if share != 1 else ""
        raise ConfigError(
            f"model.hidden_size is {model.hidden_size} with model.num_attention_heads {heads}, so a head is {width} "
            f"wide{of}; expected to rotate an even number of at least 2, because the rotary embedding turns pairs"
        )


def _check_extra(extra: dict[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"model.extra.{key} is {value}; expected a finite number")
        is_share = key.endswith(("dropout", "_drop", "_pdrop"))
        if is_share and not (isinstance(value, (int, float)) and 0 <= value < 1):
            raise ConfigError(f"model.extra.{key} is {value}; expected a share, at least 0 and below 1")


def _in_one_line(error: BaseException) -> str:
    """The text of an error of transformers. Its checks of a whole configuration wrap the error that matters."""
    inner = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ is not None else error
    text = " ".join(str(inner).split())
    is_name = isinstance(inner, KeyError) and " " not in text
    return f"transformers has no {text}, which a key of model.extra names" if is_name else text


def _named(given: dict[str, Any], architecture: str, names: dict[str, str | None]) -> dict[str, Any]:
    """The recipe's values under the names of the architecture's configuration."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key in UNSET_BY_DEFAULT and value is None:
            continue
        name = names.get(key, key)
        if name is None:
            raise ConfigError(f"model.{key} is {value}, which {architecture} does not have; leave it null")
        values[name] = value
    if "rope_theta" in values:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    return values


def _recipe_key(name: str, names: dict[str, str | None]) -> str:
    return next((key for key, own in names.items() if own == name), name)


def make_model(config: RunConfig, shards: ShardSet) -> Any:
    """The model that a run on these shards begins with, in fp32 on the CPU. It ignores `model.init_from`.

    Raises:
        ConfigError: a value of the recipe does not fit the shards or the architecture.
    """
    manifest = shards.manifest
    configuration = model_configuration(
        config.model, vocab_size=manifest.vocab_size, seq_len=config.data.seq_len, eod_id=manifest.eod_id
    )
    model = build_model(configuration, config.seed)
    scale_initial_weights(model, config.optim.mup_base_width)
    return model


def build_model(configuration: Any, seed: int) -> Any:
    """A model in fp32 whose weights depend only on the configuration and the seed, not on ranks or devices."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return new_model(configuration)


def new_model(configuration: Any) -> Any:
    """A model with weights from torch's current generator. Raises ConfigError if transformers cannot build it."""
    try:
        return model_class(configuration)(configuration)
    except REFUSALS as error:
        raise ConfigError(f"model: it cannot be built: {_in_one_line(error)}") from error


def model_class(configuration: Any) -> Any:
    """The `...ForCausalLM` class of a configuration."""
    return next(a.model for a in ARCHITECTURES.values() if isinstance(configuration, a.configuration))


def configuration_from_dict(values: dict[str, Any]) -> Any:
    """Rebuild a configuration from the plain values that its `to_dict` returned.

    Raises:
        ConfigError: they belong to another architecture than ours.
    """
    by_type = {a.configuration.model_type: a.configuration for a in ARCHITECTURES.values()}
    name = values.get("model_type")
    if not isinstance(name, str) or name not in by_type:
        raise ConfigError(f"model_type is {name!r}; expected one of {', '.join(by_type)}")
    return by_type[name].from_dict(own_fields(by_type[name], values))


def auto_map(configuration: Any, model: Any) -> dict[str, str]:
    """The entry of an exported config.json that tells the loader where to find our configuration and model class.

    Its AutoModel refuses to be built alone and says why, because a loader that got a bare backbone would not ponder.
    """
    return {
        "AutoConfig": f"configuration.{configuration.__name__}",
        "AutoModel": f"modeling.{model.backbone_class.__name__}",
        "AutoModelForCausalLM": f"modeling.{model.__name__}",
    }


def model_code() -> dict[str, bytes]:
    """The code that ships with the weights: the files of `ponder_scale/model`, by name."""
    files = sorted(Path(ponder_scale.model.__path__[0]).glob("*.py"))
    return {path.name: path.read_bytes() for path in files if path.name != "__init__.py"}


def own_fields(configuration: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config.json that the configuration class knows.

    transformers would store any other key as an attribute. Such a key would be part of every export. It could replace a
    method, or name code to load (`auto_map`, `custom_pipelines`, `attn_implementation` with a kernel of the hub).
    """
    known = {*configuration().to_dict(), *configuration.attribute_map, *OLDER_FIELDS} - {"_name_or_path"}
    return {key: value for key, value in values.items() if key in known}
