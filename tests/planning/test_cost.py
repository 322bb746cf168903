"""The arithmetic of a plan against the same by hand, on a shape with round numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ponder_scale.config import RunConfig
from ponder_scale.planning.cost import (
    LIVE,
    REUSE,
    Shape,
    StateBytes,
    flops_per_token,
    gathering,
    learned_passes,
    square_attention,
    state_bytes,
    step_flops,
)
from ponder_scale.planning.depth import mean_steps
from ponder_scale.planning.plan import Plan
from ponder_scale.planning.time import StepTime
from ponder_scale.settings import load

# of 1,000 parameters 600 are in blocks; a product with the vocabulary is 2 x 50 x 8 = 800 operations; a pass forward
# is 2 x 600, and 2 x 2 layers x 8 x 17 = 544 of attention
SHAPE = Shape(1000, 400, vocabulary=50, hidden=8, layers=2, sequence=16, pondering_steps=3)


@pytest.mark.parametrize(
    ("policy", "recomputed"),
    [
        ("none", 3 * 800),
        ("selective", 3 * 800 + 4 * 1200),
        ("layer", 3 * 800 + 4 * 1744),
        ("pass", 3 * 800 + 4 * 1744),
        ("pass+layer", 3 * 800 + 2 * 4 * 1744),
    ],
)
def test_operations_of_a_token_by_hand(policy: str, recomputed: int) -> None:
    flops = flops_per_token(SHAPE, policy)
    assert (flops.passes, flops.pondering, flops.loss) == (3 * 4 * 1744, 6 * 3 * 800, 3 * 800)
    assert (flops.recomputed, flops.model) == (recomputed, 20928 + 14400 + 2400)
    assert flops_per_token(SHAPE, policy, 0).model == 3 * 1744 + 2400
    assert step_flops(SHAPE, policy, 3, 7).hardware == 7 * (37728 + recomputed)


def test_passes_without_gradient_count_their_forward_alone() -> None:
    """Four passes and three feedbacks; the last two passes are differentiated, so one feedback is, and recomputed."""
    shape = replace(SHAPE, backward_passes=2)
    flops = flops_per_token(shape, "pass")
    assert flops.passes == 4 * 1744 + 2 * 2 * 1744
    assert flops.pondering == 3 * 2 * 800 + 1 * 4 * 800
    assert flops.recomputed == 2 * 1744 + 1 * 800
    assert flops_per_token(shape, "pass", 1) == flops_per_token(SHAPE, "pass", 1)  # two passes are all of them
    assert flops_per_token(replace(SHAPE, backward_passes=9), "pass") == flops_per_token(SHAPE, "pass")
    top_k = flops_per_token(replace(shape, top_k=5), "none")
    assert top_k.pondering == 3 * (800 + 2 * 5 * 8) + 1 * 8 * 5 * 8
    hidden = flops_per_token(replace(shape, feedback="hidden"), "none")
    assert (hidden.pondering, hidden.recomputed) == (0, 3 * 800)  # statistics of each pass but the last
    assert flops_per_token(replace(shape, feedback="both"), "pass") == flops


def test_positions_between_the_tokens_by_hand() -> None:
    """Latents, K = 1 and 2 to 3 refinements: a pass over T positions, then 3.5 over 2 T; pauses: one over 2 T.

    A position sees (n T + 1) / 2 keys, so n (n T + 1) is 17 for T positions and 66 for 2 T.
    """
    latent = replace(SHAPE, pondering_steps=1, feedback="latent", refinements=(2, 3))
    flops = flops_per_token(latent, "layer")
    forward = 2 * 600 * (1 + 3.5 * 2) + 2 * 2 * 8 * (17 + 3.5 * 66)
    assert (flops.passes, flops.pondering, flops.loss) == (3 * forward, 0, 3 * 800)
    assert flops.recomputed == forward + 800  # the statistics of the first position take a product
    assert flops_per_token(latent, "selective").recomputed == 2 * 600 * 8 + 800
    assert latent.passes(1) == 4.5 and latent.passes(1, 2) == 4 and latent.differentiated(1) == 4.5
    three = step_flops(latent, "none", 1, 7, refinements=3)
    assert three.passes == 7 * 3 * (2 * 600 * 9 + 2 * 2 * 8 * (17 + 4 * 66))
    two = flops_per_token(replace(latent, pondering_steps=2), "none", refinements=2)  # 1, 2, then three times 3 T
    assert two.passes == 3 * (2 * 600 * 12 + 2 * 2 * 8 * (17 + 66 + 3 * 3 * 49))
    pause = flops_per_token(replace(latent, feedback="pause"), "none")
    assert (pause.passes, pause.loss, pause.recomputed) == (3 * (2 * 600 * 2 + 2 * 2 * 8 * 66), 2400, 800)
    for feedback in ("latent", "pause"):
        shape = replace(latent, feedback=feedback)
        assert flops_per_token(shape, "none", 0).model == flops_per_token(SHAPE, "none", 0).model
        assert square_attention(shape, 0) == square_attention(SHAPE, 0)
    assert square_attention(latent) == 3 * 2 * 2 * 8 * (15 + 3.5 * 2 * 31)


def test_a_mixture_of_k_tokens_counts_its_scores_and_k_rows() -> None:
    """Scores over the whole vocabulary once, 800; forward 2 K D, and 8 K D backward: dE, dp, dW and dh."""
    flops = flops_per_token(replace(SHAPE, top_k=5), "none")
    assert flops.pondering == 3 * (800 + 10 * 5 * 8)
    assert flops.recomputed == 0  # the scores of the K tokens are kept
    assert flops_per_token(replace(SHAPE, top_k=50), "none") == flops_per_token(SHAPE, "none")


def test_exits_read_the_last_pass_by_the_op_of_the_mixture() -> None:
    """6 products in place of 3 and the scores once more; with hidden feedback for each of the four passes."""
    plain, exits = (flops_per_token(SHAPE, "none", pass_losses=losses) for losses in ("last", "exit"))
    assert (exits.passes, exits.pondering) == (plain.passes, plain.pondering)
    assert (exits.loss, exits.recomputed) == (6 * 800, plain.recomputed + 800)
    hidden = flops_per_token(replace(SHAPE, feedback="hidden"), "none", pass_losses="exit")
    assert (hidden.pondering, hidden.loss, hidden.recomputed) == (0, 4 * 6 * 800, 4 * 800)
    top_k = flops_per_token(replace(SHAPE, top_k=5), "none", pass_losses="exit")
    assert (top_k.loss, top_k.recomputed) == (6 * 800 + 3 * 2 * 800, 3 * 800 + 800)


def test_losses_of_earlier_passes_cost_products_only_where_no_mixture_makes_them() -> None:
    """Of three: 2 more with K tokens and their scores once more, 3 with hidden states, in place of that
    for statistics; of one pass if one is drawn."""
    for learned, losses in ((0, "last"), (3, "uniform"), (3, "linear"), (1, "random")):
        assert flops_per_token(SHAPE, "none", pass_losses=losses) == flops_per_token(SHAPE, "none")
        sparse, hidden = replace(SHAPE, top_k=5), replace(SHAPE, feedback="hidden")
        flops, plain = flops_per_token(sparse, "none", pass_losses=losses), flops_per_token(sparse, "none")
        assert (flops.model - plain.model, flops.recomputed) == (learned * 2 * 800, learned * 800)
        flops, plain = flops_per_token(hidden, "none", pass_losses=losses), flops_per_token(hidden, "none")
        assert (flops.model - plain.model, flops.recomputed) == (learned * 3 * 800, (3 - learned) * 800)
        assert step_flops(hidden, "none", 3, 7, losses).model == 7 * flops.model
    assert flops_per_token(replace(SHAPE, feedback="hidden"), "none", 0, "random").loss == 3 * 800
    assert [learned_passes(losses, 0.5) for losses in ("last", "uniform", "random")] == [0, 0.5, 0.5]


@pytest.mark.parametrize(("policy", "again"), [("none", 0), ("selective", 480), ("layer", 1024), ("pass+layer", 2048)])
def test_an_extra_head_is_a_layer_that_runs_once_and_a_loss(policy: str, again: int) -> None:
    """Two heads of 120 parameters: 2 x 240, and 2 x 2 x 8 x 17 = 544 of attention, on the same 600 of blocks."""
    shape = replace(SHAPE, parameters=1240, extra_heads=2, head_parameters=240)
    flops, plain = flops_per_token(shape, policy), flops_per_token(SHAPE, policy)
    assert shape.block_parameters == 600
    assert (flops.passes - plain.passes, flops.loss - plain.loss) == (3 * 1024, 3 * 2 * 800)
    assert (flops.pondering, flops.recomputed - plain.recomputed) == (plain.pondering, again)
    square = square_attention(shape) - square_attention(SHAPE)
    assert 3 * 1024 + square == 3 * 480 + 12 * 2 * 8 * 16


def test_the_whole_square_of_attention_is_what_palm_would_count() -> None:
    flops = flops_per_token(SHAPE, "none").passes
    # 12 L D T a token in PaLM's, 6 L D (T + 1) here, of each of four passes
    assert flops + square_attention(SHAPE) == 4 * (3 * 1200 + 12 * 2 * 8 * 16)


def test_state_of_a_rank_by_hand() -> None:
    assert state_bytes(1000, 0, 4, "fp32") == StateBytes(4000, 0, 8000, 4000)
    assert state_bytes(1000, 1, 4, "fp32") == StateBytes(4000, 1000, 2000, 4000)
    assert state_bytes(1000, 0, 4, "bf16") == StateBytes(2000, 4000, 8000, 2000)
    assert state_bytes(1000, 1, 4, "bf16") == StateBytes(2000, 1000, 2000, 2000)
    assert state_bytes(1000, 2, 4, "bf16") == StateBytes(2000, 1000, 2000, 500)
    assert state_bytes(1000, 3, 4, "bf16", average=True) == StateBytes(500, 1000, 3000, 500)
    assert state_bytes(1001, 3, 4, "bf16") == StateBytes(502, 1004, 2008, 502)


def test_gathers_of_a_micro_step_by_hand() -> None:
    """Three passes over eight layers that hold 80% of the weights: a sweep for each pass and each backward, one more
    where passes are recomputed; 2.5 layers are still there where a sweep turns."""
    shape = Shape(1000, 200, vocabulary=50, hidden=8, layers=8, sequence=16, pondering_steps=2)
    zero = {"stage": 3, LIVE: 0, REUSE: 0}
    for policy, rounds in (("none", 6 - 2.5 / 8), ("layer", 6 - 2.5 / 8), ("pass", 9 - 5 * 2.5 / 8)):
        gathers = gathering(shape, zero, policy)
        assert gathers is not None
        assert (gathers.volume, gathers.live_share) == pytest.approx((0.8 * rounds + 0.2, 0.2 + 3 / 8 * 0.8)), policy
    assert gathering(shape, {**zero, "stage": 2}, "pass") is None


def test_mean_pondering_steps_by_hand() -> None:
    settings = ["run_dir=unused", "data.sources.any.path=unused", "train.steps=100", "train.global_batch=4"]
    settings += ["model.pondering_steps=3", "train.pondering.low=1"]

    def mean(*more: str) -> float:
        return mean_steps(load(RunConfig, None, [*settings, *more]))

    assert mean() == 3.0
    assert mean("train.pondering.schedule=uniform") == 2.0
    assert mean("train.pondering.schedule=ramp", "train.pondering.ramp_steps=50") == 2.5
    assert mean("train.pondering.schedule=ramp", "train.pondering.ramp_steps=400") == 2.0
    drawn = "train.pondering.schedule=lognormal-poisson", "train.pondering.mean=8", "train.pondering.low=0"
    assert mean(*drawn, "model.pondering_steps=64") == pytest.approx(8.0, abs=2e-3)
    assert mean(*drawn, "model.pondering_steps=8") == pytest.approx(6.078, abs=1e-3)


@pytest.mark.parametrize(("beside", "bytes_of_plan"), [(0, 83), (3, 84), (8, 89)])
def test_the_peak_of_a_rank_is_in_backward_or_with_all_gradients(beside: int, bytes_of_plan: int) -> None:
    plan = Plan(
        shape=SHAPE,
        flops=flops_per_token(SHAPE, "pass"),
        states=StateBytes(weights=10, masters=20, moments=40, gradients=8),
        gathered_bytes=3,
        bucket_bytes=2,
        activation_bytes=5,
        workspace_bytes=1,
        beside_bytes=beside,
        gathers=None,
        ranks=4,
        tokens=1000,
        step=StepTime(*[1.0] * 10),
        steps=7,
    )
    assert plan.seconds == 70.0
    assert plan.memory_bytes == bytes_of_plan
    if beside == 8:  # 92% of a device may be planned for
        assert plan.fits(97) and not plan.fits(96)
