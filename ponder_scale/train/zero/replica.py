"""A whole model with the weights of an engine, for uses outside of training."""

from __future__ import annotations

import json
from typing import Any

import deepspeed
import torch

from ponder_scale.setup.build import configuration_from_dict, new_model
from ponder_scale.train.zero.engine import Engine


@torch.no_grad()
def replica(engine: Engine) -> Any:
    """The model as an export of this step would hold it, on the device of each rank. Collective.

    It is independent of the engine, without gathering, recomputation and compilation. So each rank may run it by
    itself. It takes the memory of one more copy of the weights, in the precision of training. ZeRO-3's weights are
    gathered one at a time.
    """
    from accelerate import init_empty_weights  # installed with lm-eval

    values = json.loads(json.dumps(engine.module.config.to_dict()))
    with init_empty_weights(include_buffers=False):  # drawing initial weights would waste time, as they are replaced
        model = new_model(configuration_from_dict(values))
    parameters, failure = dict(engine.module.named_parameters()), None
    try:
        for name, parameter in parameters.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)  # a partitioned weight itself is empty
            whole = torch.empty(shape, dtype=parameter.dtype, device=engine.device)
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, torch.nn.Parameter(whole, requires_grad=False))
        model.tie_weights()
    except torch.OutOfMemoryError as error:
        failure = error
    if engine.total(
        torch.tensor(float(failure is not None))
    ):  # must come before the first gather, in which the other ranks would wait
        raise failure or RuntimeError("another rank has no memory for a copy of the weights; see its log")
    for name, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_stage == 3):
            model.get_parameter(name).copy_(parameter)
    assert not any(parameter.is_meta for parameter in model.parameters()), "a weight that the engine does not have"
    return model.to(engine.device).eval()
