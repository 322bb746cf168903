"""The time of a step by hand: planted constants, so that each term is a number one can work out."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from ponder_scale.planning.cost import LIVE, PREFETCH, REUSE, Shape
from ponder_scale.planning.hardware import COLLECTIVES, CPU, TABLE, VOCABULARY_WAYS, Hardware, Link
from ponder_scale.planning.operations import AGAIN, BACKWARD, FORWARD, Operations, Product, Rest
from ponder_scale.planning.time import Job, StepTime, collective_seconds, product_seconds, step_time

# a product takes 1 s for 1,000 operations, memory 1 s for 100 bytes, a byte on a link 0.1 s, a call 2 s and 1 s a hop
RATE = dict.fromkeys(COLLECTIVES, 10.0)
PLANTED = Hardware(
    name="planted",
    peak_flops={"fp32": 2000.0, "bf16": 4000.0},
    memory_bytes=1e9,
    memory_bytes_per_second=100.0,
    inside=Link(RATE, 2.0, 1.0),
    between=Link(dict.fromkeys(COLLECTIVES, 1.0), 5.0, 3.0),
    host_bytes_per_second=50.0,
    host_optimizer_bytes_per_second=20.0,
    product_share=0.5,
    attention_share=0.25,
    vocabulary_share=dict(zip(VOCABULARY_WAYS, (0.5, 0.4, 0.25, 0.1), strict=True)),
    costly_per_second=10.0,
    optimizer_bytes_per_second=1000.0,
    call_seconds=0.5,
    asynchronous=False,
)
SHAPE = Shape(100, 20, vocabulary=50, hidden=8, layers=4, sequence=16, pondering_steps=3, layer_matrices=2)
OPERATIONS = Operations(
    (Product(FORWARD, 5, 10, 20), Product(BACKWARD, 5, 20, 10, 3), Product(AGAIN, 5, 10, 20)),
    {
        FORWARD: Rest(attention_flops=500, bytes=1000, costly=20, calls=4),
        BACKWARD: Rest(attention_flops=1000, bytes=2000, costly=0, calls=6),
        AGAIN: Rest(attention_flops=500, bytes=500, costly=10, calls=2),
    },
)
JOB = Job(
    operations=OPERATIONS,
    shape=SHAPE,
    tokens=10,
    micro_steps=2,
    pondering_steps=3,
    zero={"stage": 1},
    recompute="layer",
    ranks=1,
    per_node=8,
    width=4,
)
KEPT = {"stage": 3, LIVE: 1000, REUSE: 1000, PREFETCH: 50, "reduce_bucket_size": 40, "overlap_comm": True}
BOUNDED = {**KEPT, REUSE: 0}


def test_each_term_of_a_rank_alone_by_hand() -> None:
    step = step_time(JOB, PLANTED)
    assert step.products == pytest.approx(2 * (2000 + 3 * 2000) / 1000)  # 2 x 5 x 10 x 20 each
    assert step.attention == pytest.approx(2 * 1500 / 500)
    assert step.elementwise == pytest.approx(2 * (3000 / 100 + 20 / 10 + 10 * 0.5))
    assert step.recomputation == pytest.approx(2 * (2000 / 1000 + 500 / 500 + 500 / 100 + 10 / 10 + 2 * 0.5))
    # a product with the vocabulary is 2 x 10 x 50 x 8 = 8,000: 3 of the loss, 7 for each of 3 pondering steps
    assert step.vocabulary == pytest.approx(2 * (3 * 8000 / 500 + 3 * 7 * 8000 / 1000))
    assert step.optimizer == pytest.approx(100 * 4 * 10 / 1000)
    assert (step.gathers, step.reductions, step.offload, step.host) == (0, 0, 0, 0)
    assert step.seconds == pytest.approx(sum(getattr(step, entry.name) for entry in fields(StepTime)))
    assert sum(step.terms().values()) == pytest.approx(step.seconds)


def test_feedbacks_without_gradient_take_their_forward_alone() -> None:
    step = step_time(replace(JOB, shape=replace(SHAPE, backward_passes=2)), PLANTED)
    assert step.vocabulary == pytest.approx(2 * (3 * 8000 / 500 + (2 * 3 + 5 * 1) * 8000 / 1000))


def test_small_sides_of_a_product_cost_their_edges() -> None:
    edged = replace(PLANTED, product_edge=10.0)
    sides = 10 * (1 / 5 + 1 / 10 + 1 / 20)
    assert step_time(JOB, edged).products == pytest.approx(step_time(JOB, PLANTED).products * (1 + sides))


def test_a_mixture_of_k_tokens_makes_its_scores_and_moves_k_rows() -> None:
    step = step_time(replace(JOB, shape=replace(SHAPE, top_k=3)), PLANTED)
    rows = 5 * 10 * 3 * 8 * 4  # one forward, four backward, of (tokens, K, D) numbers
    assert step.vocabulary == pytest.approx(2 * (3 * 8000 / 500 + 3 * (8000 / 200 + rows / 100)))
    tied = step_time(replace(JOB, shape=replace(SHAPE, tied=True)), PLANTED)
    assert tied.vocabulary == pytest.approx(2 * (3 * 8000 / 500 + 3 * 7 * 8000 / 800))
    hidden = step_time(replace(JOB, shape=replace(SHAPE, feedback="hidden")), PLANTED)
    assert hidden.vocabulary == pytest.approx(2 * (3 + 3) * 8000 / 500)


def test_fewer_pondering_steps_run_fewer_passes() -> None:
    fewer, all_of_them = step_time(replace(JOB, pondering_steps=1), PLANTED), step_time(JOB, PLANTED)
    assert fewer.products == pytest.approx(all_of_them.products / 2)
    assert fewer.vocabulary == pytest.approx(2 * (3 * 8000 / 500 + 7 * 8000 / 1000))


@pytest.mark.parametrize(
    ("kind", "ranks", "per_node", "seconds"),
    [
        ("all_gather", 1, 8, 0),
        ("all_gather", 4, 8, 2 * (2 + 3) + 100 * 3 / 4 / 10),
        ("all_reduce", 4, 8, 2 * (2 + 2 * 3) + 2 * 100 * 3 / 4 / 10),
        # two nodes of two: one step between them, two inside; the two adapters of a node carry 2 bytes a second
        ("all_gather", 4, 2, 2 * (5 + 2 + 3) + 100 * 3 / 4 / 2),
        # adapters that together outrun the link inside a node do not help
        ("all_gather", 32, 16, 2 * (5 + 30 + 3) + 100 * 31 / 32 / 10),
        # one rank a node: no link inside takes part
        ("reduce_scatter", 4, 1, 2 * (5 + 3 * 3) + 100 * 3 / 4 / 1),
    ],
)
def test_collectives_by_hand(kind: str, ranks: int, per_node: int, seconds: float) -> None:
    assert collective_seconds(kind, 100.0, 2, ranks, per_node, PLANTED) == pytest.approx(seconds)


def on_ranks(zero: dict[str, Any], **changes: Any) -> StepTime:
    return step_time(replace(JOB, ranks=4, zero=zero, **changes), PLANTED)


def test_traffic_of_the_stages_by_hand() -> None:
    norms = 4 * (2 + 2 * 3)  # four all-reduces of next to nothing
    copies = 6 * 400 / 1000
    whole = 400 * 3 / 4 / 10  # all weights once around the ring
    assert on_ranks({"stage": 0}).reductions == pytest.approx(copies + 2 * whole + 8 + norms)
    assert on_ranks({"stage": 0}).gathers == 0
    one = on_ranks({"stage": 1})
    assert (one.reductions, one.gathers) == (pytest.approx(copies + 2 * whole + 8 + norms), pytest.approx(whole + 5))
    # stage 2 reduces in each of the two micro-steps
    assert on_ranks({"stage": 2}).reductions == pytest.approx(2 * (copies + 2 * whole + 8) + norms)
    kept = on_ranks(KEPT)
    assert kept.gathers == pytest.approx(2 * (whole + 2 * 5))  # in 100 / 50 pieces, each micro-step
    assert kept.reductions == pytest.approx(2 * (copies + whole + 3 * 5) + norms)  # in 100 / 40 buckets
    # eight sweeps, less 2.5 of 4 layers where they turn: 7.375 times the 80 of 100 weights in layers, and the tables
    bounded = on_ranks(BOUNDED)
    volume, calls = 7.375 * 0.8 + 0.2, 7.375 * 4 * 2
    assert bounded.gathers == pytest.approx(2 * (volume * whole + calls * 5))
    assert bounded.communication == pytest.approx((bounded.gathers + bounded.reductions) / bounded.seconds)


def test_zeropp_gathers_inside_nodes_and_halves_weights_and_quarters_gradients() -> None:
    far = replace(JOB, ranks=4, per_node=2, zero=KEPT)
    near = replace(far, zero={**KEPT, "zero_hpz_partition_size": 2})
    assert step_time(near, PLANTED).gathers == pytest.approx(2 * (400 / 2 / 10 + 2 * 3))
    assert step_time(near, PLANTED).gathers < step_time(far, PLANTED).gathers
    quantized = {**KEPT, "zero_quantized_weights": True, "zero_quantized_gradients": True}
    assert on_ranks(quantized).gathers == pytest.approx(2 * (400 / 2 * 3 / 4 / 10 + 2 * 5))
    assert on_ranks(quantized).reductions == pytest.approx(2 * (2.4 + 400 / 4 * 3 / 4 / 10 + 3 * 5) + 32)


def test_offload_moves_over_pcie_and_its_optimizer_runs_on_the_host() -> None:
    offload = on_ranks({**KEPT, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}})
    own = 100 / 4 * 4  # bytes of a rank's weights
    assert offload.offload == pytest.approx((2 * (own + own) + own) / 50)
    assert offload.optimizer == pytest.approx(10 * own / 20)
    assert on_ranks(KEPT).offload == 0


def test_a_device_that_runs_behind_its_host_hides_calls_and_links() -> None:
    ahead = replace(PLANTED, asynchronous=True)
    step = step_time(JOB, ahead)
    assert step.elementwise == pytest.approx(2 * (3000 / 100 + 20 / 10))  # without its calls
    assert step.host == 0
    slow = replace(ahead, call_seconds=1e4)
    busy = step_time(JOB, slow)
    assert busy.host == pytest.approx(2 * 12 * 1e4 - (busy.seconds - busy.host - busy.optimizer))
    fast_links = replace(ahead, inside=Link(dict.fromkeys(COLLECTIVES, 1e4), 1e-3, 1e-3))
    hidden = step_time(replace(JOB, ranks=4, zero=BOUNDED), fast_links)
    shown = step_time(replace(JOB, ranks=4, zero=BOUNDED), replace(fast_links, asynchronous=False))
    pieces = 7.375 * 4
    assert hidden.gathers == pytest.approx(shown.gathers / pieces)  # the first layer's alone


def test_gradients_hide_under_the_backward_of_one_pass_of_all() -> None:
    """They are complete when the first pass has gone backwards: a quarter of backward, with three pondering steps."""
    ahead = replace(PLANTED, asynchronous=True)
    one = step_time(replace(JOB, ranks=4, zero=KEPT), ahead)
    backward = 6000 / 1000 + 1000 / 500 + 2000 / 100  # of a micro-step
    again = 2000 / 1000 + 500 / 500 + 500 / 100 + 10 / 10
    seconds = 400 * 3 / 4 / 10 + 3 * 5
    assert one.reductions == pytest.approx(2 * (2.4 + seconds - (backward + again) / 4) + 32)


def test_every_term_that_has_work_grows_when_its_rate_falls() -> None:
    job = replace(JOB, ranks=16, zero={**BOUNDED, "offload_optimizer": {"device": "cpu"}})
    base = step_time(job, PLANTED)
    slower = {
        "product_share": ("products", "recomputation"),
        "attention_share": ("attention", "recomputation"),
        "memory_bytes_per_second": ("elementwise", "recomputation"),
        "optimizer_bytes_per_second": ("reductions",),
        "host_bytes_per_second": ("offload",),
        "host_optimizer_bytes_per_second": ("optimizer",),
        "costly_per_second": ("elementwise",),
    }
    for name, terms in slower.items():
        found = step_time(job, replace(PLANTED, **{name: getattr(PLANTED, name) / 2}))
        for term in terms:
            assert getattr(found, term) > getattr(base, term), (name, term)
        untouched = {entry.name for entry in fields(StepTime)} - {*terms, "elementwise", "recomputation"}
        assert all(getattr(found, term) == getattr(base, term) for term in untouched), name


def test_losses_of_earlier_passes_take_time_where_they_take_products() -> None:
    product = product_seconds(Product(FORWARD, 10, 50, 8), PLANTED, "fp32", PLANTED.vocabulary_share["loss"])
    for shape, products in ((SHAPE, 0), (replace(SHAPE, top_k=5), 3), (replace(SHAPE, feedback="hidden"), 2)):
        plain, learned = (replace(JOB, shape=shape, learned_passes=passes) for passes in (0.0, 1.5))
        more = step_time(learned, PLANTED).vocabulary - step_time(plain, PLANTED).vocabulary
        assert more == pytest.approx(JOB.micro_steps * 1.5 * products * product)


def test_exits_take_the_products_of_a_mixture_for_every_loss_they_read() -> None:
    product = {
        way: product_seconds(Product(FORWARD, 10, 50, 8), PLANTED, "fp32", share)
        for way, share in PLANTED.vocabulary_share.items()
    }
    statistics = JOB.pondering_steps * product["loss"]
    for shape, more in (
        (SHAPE, 7 * product["mixture"] - 3 * product["loss"]),
        (replace(SHAPE, tied=True), 7 * product["tied"] - 3 * product["loss"]),
        (
            replace(SHAPE, feedback="hidden"),
            (JOB.pondering_steps + 1) * 7 * product["mixture"] - 3 * product["loss"] - statistics,
        ),
    ):
        plain, exits = (step_time(replace(JOB, shape=shape, exits=exits), PLANTED) for exits in (False, True))
        assert exits.vocabulary - plain.vocabulary == pytest.approx(JOB.micro_steps * more)


def test_more_ranks_and_nodes_communicate_longer() -> None:
    waits = [
        step_time(replace(JOB, ranks=ranks, zero=zero), TABLE["h100"]).gathers
        for zero in ({"stage": 1}, BOUNDED)
        for ranks in (2, 8, 16, 64, 512)
    ]
    for one in (waits[:5], waits[5:]):
        assert one == sorted(one) and len(set(one)) == 5


def test_the_table_of_a_cpu_has_every_term() -> None:
    terms = step_time(replace(JOB, ranks=2, zero=BOUNDED), CPU).terms()
    assert set(terms) == {entry.name for entry in fields(StepTime)} - {"offload"}


def test_operations_of_any_micro_batch_follow_from_two() -> None:
    one = Operations((Product(FORWARD, 4, 8, 8), Product(BACKWARD, 8, 8, 4, 2)), _rest(10.0))
    two = Operations((Product(FORWARD, 8, 8, 8), Product(BACKWARD, 8, 8, 8, 4)), _rest(18.0))
    five = one.scaled(two, 4)
    assert five.products == (Product(FORWARD, 20, 8, 8), Product(BACKWARD, 8, 8, 20, 10))
    assert five.rest[AGAIN].bytes == 42.0


def test_operations_of_any_depth_follow_from_two() -> None:
    two = Operations((Product(FORWARD, 4, 8, 8), Product(FORWARD, 4, 8, 8), Product(FORWARD, 4, 8, 50)), _rest(10.0))
    three = Operations((*two.products[:2], *two.products[1:]), _rest(14.0))
    deep = two.deeper(three, 8)  # ten layers
    assert sum(product.flops for product in deep.products) == pytest.approx(10 * 512 + 3200)
    assert deep.rest[FORWARD].bytes == 42.0


def _rest(size: float) -> dict[str, Rest]:
    return {phase: Rest(bytes=size) for phase in (FORWARD, BACKWARD, AGAIN)}
