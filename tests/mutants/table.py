"""The slips: one change each to the arithmetic that matters, and the tests that have to notice it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`old`, which stands in the file once, becomes `new`; then one of `tests` has to fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied_to(self, code: str) -> str:
        """The code with the slip."""
        assert code.count(self.old) == 1, f"{self.file}: {self.old!r} stands there {code.count(self.old)} times"
        return code.replace(self.old, self.new)

    def __str__(self) -> str:
        return f"{self.file}: {self.old.strip()} -> {self.new.strip()}"


def _of(file: str, tests: str, *changes: tuple[str, str]) -> list[Mutant]:
    return [Mutant(file, old, new, tuple(tests.split())) for old, new in changes]


WATCHDOG = " ".join(
    f"tests/train/survive/test_watchdog.py::test_{name}"
    for name in (
        "a_straggler_is_much_slower_than_the_median_and_worth_its_name",
        "heartbeats_of_all_ranks_are_at_most_200_files_a_second",
    )
)
HEALTH = " ".join(
    f"tests/train/survive/test_health.py::test_{name}"
    for name in (
        "a_spike_is_so_many_deviations_above_the_mean_once_half_the_window_is_there",
        "too_many_skips_in_a_row_end_the_run",
        "a_restored_window_judges_alike",
    )
)
SCHEDULES = " ".join(
    f"tests/train/zero/test_engine.py::test_{name}"
    for name in ("schedules_warm_up_and_end_at_the_minimum", "pondering_steps_are_drawn_by_step_and_seed_and_ramp_up")
)
MULTI_TOKEN = " ".join(
    f"tests/model/test_multi_token.py::test_{name}"
    for name in (
        "losses_and_gradients_are_those_of_loops[{}-llama]",
        "no_head_predicts_a_token_of_another_document[llama]",
        "labels_count_up_to_the_first_token_that_does_not",
    )
)
SPECULATION = " ".join(
    f"tests/model/test_speculation.py::test_{name}"
    for name in (
        "greedy_text_is_that_of_plain_decoding[llama]",
        "every_layer_of_the_cache_holds_what_was_read_of_the_text_and_goes_on[2]",
        "the_draft_is_what_the_heads_say_at_the_last_token_that_was_kept",
        "a_cache_without_the_heads_or_of_other_steps_is_refused",
    )
)
HALTING = " ".join(
    f"tests/model/test_halting.py::test_{name}"
    for name in (
        "logits_losses_and_gradients_are_those_of_loops_over_what_is_active[{}-llama]",
        "a_decoded_batch_runs_a_pass_for_the_rows_that_have_not_halted[{}-gate-llama]",
        "the_loss_of_exits_is_the_expected_one_of_dense_passes[{}-llama]",
        "exits_halt_after_training_by_what_their_gates_leave[llama]",
        "a_cache_that_is_filled_in_pieces_gives_what_the_whole_text_does[mixed-gate-llama]",
        "documents_in_one_row_do_not_see_each_other[sdpa-llama]",
        "a_token_continues_at_its_threshold_and_halts_a_bit_above_it",
        "a_gate_that_is_surely_open_has_a_finite_gradient",
        "gates_that_a_step_does_not_use_get_a_gradient_of_zero",
        "the_loss_counts_no_token_without_a_label",
    )
)
DEPTH = "tests/train/test_depth.py::test_draws_have_the_published_density_clipped_at_both_ends"
MUTANTS = [
    *_of(
        "data_pipeline/clean/filters.py",
        "tests/data_pipeline/test_cleaning.py",
        ("if not min_words <= len(words) <= max_words:", "if not min_words < len(words) <= max_words:"),
        ("min_words: int = 50", "min_words: int = 49"),
        ("min_mean_word: float = 3.0", "min_mean_word: float = 2.9"),
        ("sum(map(len, words)) / len(words) <= max_mean_word", "sum(map(len, words)) / len(words) < max_mean_word"),
        ("max_symbols_per_word * len(words)", "max_symbols_per_word * len(text)"),
        ('text.count("...") + text.count("…")', 'text.count("...")'),
        ('startswith(("•", "-", "*", "‣"))', 'startswith(("•", "*", "‣"))'),
        ("> max_ellipsis_lines * len(lines)", ">= max_ellipsis_lines * len(lines)"),
        ("< min_alphabetic_words * len(words)", "<= min_alphabetic_words * len(words)"),
        ("< min_stop_words:", "<= min_stop_words:"),
        ("characters > character_bound * len(text)", "characters > character_bound * len(pieces)"),
        ("enumerate(max_top_n_grams, start=2)", "enumerate(max_top_n_grams, start=3)"),
        ("enumerate(max_duplicate_n_grams, start=5)", "enumerate(max_duplicate_n_grams, start=6)"),
        ('count * len(" ".join(gram)) if count > 1 else 0', 'count * len(" ".join(gram))'),
        ("            begin += n\n", "            begin += 1\n"),
        ("max_word: int = 1000, **of_pages", "max_word: int = 999, **of_pages"),
        ("< min_sentences:", "<= min_sentences:"),
        ("if len(text) < min_characters:", "if len(text) <= min_characters:"),
    ),
    *_of(
        "data_pipeline/clean/filters.py",
        "tests/data_pipeline/test_own_filters.py",
        ("bound = int(share * 2**64)", "bound = int(share * 2**63)"),
        ("seed=2**32 + seed", "seed=seed"),
    ),
    *_of(
        "data_pipeline/clean/dedup.py",
        "tests/data_pipeline/test_cleaning.py",
        ("NGRAM_WORDS, BANDS, HASHES_OF_BAND = 5, 14, 8", "NGRAM_WORDS, BANDS, HASHES_OF_BAND = 5, 8, 14"),
        ("repeated, new = order[~first],", "repeated, new = order[:-1][~first[1:]],"),
        ("count = max(0, len(hashes) - n + 1)", "count = max(0, len(hashes) - n)"),
    ),
    *_of(
        "data_pipeline/clean/dedup.py",
        "tests/data_pipeline/test_grow.py::test_documents_that_are_in_the_set_are_not_taken_again",
        ("keys[first & (units[order] != _BEFORE)]", "keys[first & (units[order] == _BEFORE)]"),
    ),
    *_of(
        "data_pipeline/build/caps.py",
        "tests/data_pipeline/test_caps.py::test_where_a_cap_lies_by_the_journals_of_units "
        "tests/data_pipeline/test_caps.py::test_so_many_tokens_are_the_documents_before_the_first_that_exceeds_them",
        ('side="right"', 'side="left"'),
        ('ended = room.full or result["full"]', "ended = room.full"),
    ),
    *_of(
        "ponder_scale/data/order.py",
        "tests/data/test_order.py",
        ("0.5 + int(i) * (math.sqrt(5) - 1) / 2", "0.5 + int(i) * (math.sqrt(5) + 2) / 2"),
        ("(number + self._phases[source]) / self._shares[source]", "number / self._shares[source]"),
        ("epoch, position = np.divmod(served, size)", "position, epoch = np.divmod(served, size)"),
        ("source_key + epoch.astype(np.uint64) * np.uint64(_GOLDEN)", "source_key + np.uint64(_GOLDEN)"),
        (
            "right = (right + _round(left, key, step + 1)) % columns",
            "right = (right + _round(left, key, step)) % columns",
        ),
        ("(step + 1) * _GOLDEN % 2**64", "_GOLDEN % 2**64"),
        ('f"{seed}:{name}"', 'f"{seed}"'),
        ("while len(outside):", "if len(outside):"),
    ),
    *_of(
        "ponder_scale/data/order.py",
        "tests/data/test_mixture.py",
        ("served + stretch.before[source]", "served"),
        (
            "(mixture.served(middle, len(limits)) <= limits).all()",
            "(mixture.served(middle, len(limits)) < limits).all()",
        ),
        ("_within(mixture, left, limits - before)", "_within(mixture, left, limits)"),
    ),
    *_of(
        "ponder_scale/data/mixture.py",
        "tests/data/test_mixture.py",
        ("max(1, math.floor(stream.max_epochs * count))", "max(1, math.ceil(stream.max_epochs * count))"),
        ("if end > first), default=None)", "if end >= first), default=None)"),
        ("math.ceil(phase.tokens / data.seq_len)", "math.floor(phase.tokens / data.seq_len)"),
        ("config.weight * weight / total", "config.weight * weight"),
    ),
    *_of(
        "ponder_scale/data/loader.py",
        "tests/data/test_loader.py tests/data/test_mixture.py",
        (
            "reshape(-1, self._world_size, self._micro_batch)[:, self._rank]",
            "reshape(self._world_size, -1, self._micro_batch)[self._rank]",
        ),
        ("if after > self._order.end:", "if after > self._order.end + 1:"),
        ("if self._ahead is None or self._ahead[0] != sequences:", "if self._ahead is None:"),
        ("left_out + max(0, end - first)", "left_out + max(0, end - first) + 1"),
        ("first + mine < total", "first + mine <= total"),
        ("min(sequences, sum(counts))", "max(sequences, sum(counts))"),
        ('"consumed": self._consumed}', '"consumed": self._consumed + 1}'),
    ),
    *_of(
        "ponder_scale/data/sequences.py",
        "tests/data/test_loader.py tests/data/test_mixture.py tests/data/test_packing.py",
        ("max(0, shard.info.tokens - 1) // seq_len", "max(0, shard.info.tokens) // seq_len"),
        ("[Piece(first, self._seq_len + 1, False)]", "[Piece(first + 1, self._seq_len + 1, False)]"),
        ("            into[end - 1 :] = IGNORE_INDEX", "            into[end:] = IGNORE_INDEX"),
        ("if piece.continues and end:", "if end:"),
    ),
    *_of(
        "ponder_scale/train/schedules.py",
        SCHEDULES,
        ("optim.lr * step / optim.warmup_steps", "optim.lr * (step - 1) / optim.warmup_steps"),
        ("0.5 * (1.0 + math.cos(math.pi * progress))", "math.cos(0.5 * math.pi * progress)"),
        ("max(1, steps - begin)", "max(1, steps)"),
        ("math.sqrt(progress) if minus_sqrt", "progress**2 if minus_sqrt"),
        ("optim.min_lr + (optim.lr - optim.min_lr) * shape", "optim.lr * shape"),
        (".randint(schedule.low, highest)", ".randrange(schedule.low, highest)"),
        ("math.floor((highest - schedule.low) * done)", "math.ceil((highest - schedule.low) * done)"),
        ("min(1.0, step / schedule.ramp_steps)", "min(1.0, (step - 1) / schedule.ramp_steps)"),
    ),
    *_of(
        "ponder_scale/train/schedules.py",
        DEPTH,
        ("- DEPTH_SIGMA**2 / 2", "+ DEPTH_SIGMA**2 / 2"),
        ("while time <= rate", "while time <= schedule.mean"),
        ("max(schedule.low, steps)", "max(schedule.low, steps + 1)"),
    ),
    *_of(
        "ponder_scale/runs/status.py",
        "tests/runs/test_status.py",
        ("STALE_SECONDS, STALE_STEPS = 60.0, 5.0", "STALE_SECONDS, STALE_STEPS = 60.0, 4.0"),
        ("STALE_SECONDS, STALE_STEPS = 60.0, 5.0", "STALE_SECONDS, STALE_STEPS = 50.0, 5.0"),
        ("patience = max(STALE_SECONDS,", "patience = min(STALE_SECONDS,"),
        ('if now - heart["time"] > patience]', 'if now - heart["time"] > 2 * patience]'),
        ("START_SECONDS = 3600.0", "START_SECONDS = 360.0"),
        ('at > last["time"] + STALE_SECONDS for at', 'at > last["time"] for at'),
        ("if len(hearts.stale) < len(working):", "if not hearts.stale:"),
        ('if start is None or start["time"] <= known:', 'if start is None or start["time"] >= known:'),
    ),
    *_of(
        "ponder_scale/train/survive/alarms.py",
        "tests/train/survive/test_alarms.py",
        ("IDLE_KL = 1e-5", "IDLE_KL = 1e-4"),
        ("UNIFORM_SHARE = 0.98", "UNIFORM_SHARE = 0.97"),
        ("LOGGED_STEPS = 5", "LOGGED_STEPS = 4"),
        ("FIRST_STEP = 200", "FIRST_STEP = 201"),
        ("if step < self._from:", "if step <= self._from:"),
        ("max(kls) < IDLE_KL", "min(kls) < IDLE_KL"),
        ("min(entropies) > self._uniform", "max(entropies) > self._uniform"),
        ('means["pass_entropies"][:-1]', 'means["pass_entropies"]'),
        ("if self._seen[kind] == LOGGED_STEPS:", "if self._seen[kind] >= LOGGED_STEPS:"),
        ("self._seen[kind] + 1 if present else 0", "self._seen[kind] + 1 if present else self._seen[kind]"),
        ("max(FIRST_STEP, config.optim.warmup_steps)", "FIRST_STEP"),
    ),
    *_of(
        "ponder_scale/train/survive/health.py",
        HEALTH,
        ("self._config.spike_window // 2", "self._config.spike_window // 2 + 1"),
        (
            "if value > mean + self._config.spike_sigma * deviation:",
            "if value > mean + self._config.spike_sigma * deviation**2:",
        ),
        ("if self._in_a_row > self._config.max_skips:", "if self._in_a_row >= self._config.max_skips:"),
        ("        self._in_a_row = 0\n", ""),
    ),
    *_of(
        "ponder_scale/train/survive/watchdog.py",
        WATCHDOG,
        ("if spent > factor * median and", "if spent >= factor * median or"),
        ("max(HEARTBEAT_SECONDS, world_size / 200)", "max(HEARTBEAT_SECONDS, world_size / 2000)"),
        ("NEGLIGIBLE = 0.05", "NEGLIGIBLE = 0.5"),
    ),
    *_of(
        "ponder_scale/planning/cost.py",
        "tests/planning/test_cost.py",
        (
            "2.0 * shape.layers * shape.hidden * (shape.sequence + 1)",
            "4.0 * shape.layers * shape.hidden * (shape.sequence + 1)",
        ),
        ("passes=(steps + 1 + 2.0 * backward) * forward", "passes=(steps + 2.0 * backward) * forward"),
        ("losses, scores = 2.0 * product, 4.0 * product", "losses, scores = 2.0 * product, 2.0 * product"),
        ("losses, scores = product + rows, 4.0 * rows", "losses, scores = product + rows, 2.0 * rows"),
        ("last = 3.0 * product", "last = 2.0 * product"),
        ("0.0, (backward - 1) * product", "0.0, backward * product"),
        ('again = forward - attention if recompute == "selective" else forward', "again = forward"),
        ("masters=4 * sharded if has_masters else 0", "masters=4 * sharded"),
        ("moments=(12 if average else 8) * sharded", "moments=8 * sharded"),
        (
            "gradients=narrow * (share if stage >= 2 else parameters)",
            "gradients=narrow * (share if stage >= 1 else parameters)",
        ),
        ("2 * backward - 1 if again else 1", "2 * backward if again else 1"),
        ("LIVE_LAYERS = 3 ", "LIVE_LAYERS = 2 "),
    ),
    *_of(
        "ponder_scale/planning/hardware.py",
        "tests/planning/test_hardware.py",
        ('"a100", bf16=312e12', '"a100", bf16=624e12'),
        (
            '"a100-40", bf16=312e12, fp32=19.5e12, memory=40 * GIB',
            '"a100-40", bf16=312e12, fp32=19.5e12, memory=48 * GIB',
        ),
        ('"h100", bf16=989e12', '"h100", bf16=1979e12'),
        ("memory=141e9", "memory=141 * GIB"),
        ("memory=180e9", "memory=192e9"),
        ('r"H100 PCIE": (756e12', 'r"H100 PCIE": (989e12'),
        ('r"H100 NVL": (835e12', 'r"H100 NVL": (989e12'),
        ('r"\\bA[18]00\\b": (312e12', 'r"\\bA[18]00\\b": (624e12'),
        ('r"\\bL40S\\b": (362e12', 'r"\\bL40S\\b": (733e12'),
    ),
    *_of(
        "ponder_scale/planning/time.py",
        "tests/planning/test_time.py",
        ("MIXTURE_PRODUCTS = 2, 5 ", "MIXTURE_PRODUCTS = 2, 4 "),
        ("LOSS_PRODUCTS = 3\n", "LOSS_PRODUCTS = 2\n"),
        ("rounds = 2 if kind ==", "rounds = 1 if kind =="),
        ("seconds - hiding), small", "seconds), small"),
        ("(nodes - 1) * between.hop_seconds", "nodes * between.hop_seconds"),
        ("between.bytes_per_second[kind] * per_node", "between.bytes_per_second[kind]"),
        ("if job.stage < 2:  # once", "if job.stage < 1:  # once"),
    ),
    *_of(
        "ponder_scale/planning/plan.py",
        "tests/planning/test_cost.py",
        ("USABLE = 0.92 ", "USABLE = 0.95 "),
        ("USABLE = 0.92 ", "USABLE = 0.9 "),
        ("+ self.beside_bytes, states.gradients)", ", states.gradients)"),
    ),
    *_of(
        "ponder_scale/planning/depth.py",
        "tests/planning/test_cost.py",
        ("(steps - low + 1) / (highest - low + 1)", "(steps - low) / (highest - low + 1)"),
        ("share * (highest - schedule.low) / 2", "share * (highest - schedule.low)"),
        ("- DEPTH_SIGMA**2 / 2)", ")"),
    ),
    *_of(
        "ponder_scale/planning/failures.py",
        "tests/planning/test_failures.py",
        ("math.sqrt(2 * self.save * self.between)", "math.sqrt(self.save * self.between)"),
        ("ratio / 9) - self.save", "ratio / 9)"),
        ("(interval + self.save) / self.between", "interval / self.between"),
        ("DEVICE_HOURS = 16_384 * 54 * 24 / 419", "DEVICE_HOURS = 16_384 * 54 * 24 / 466"),
    ),
    *_of(
        "ponder_scale/train/zero/replicas.py",
        "tests/train/survive/test_health.py::test_other_bits_name_their_rank_and_tensors",
        ("MULTIPLIER = 6364136223846793005", "MULTIPLIER = 1"),
        ("majority = votes > world_size / 2", "majority = votes >= world_size / 2"),
        ("INTEGERS[tensor.element_size()]", "torch.int8"),
    ),
    *_of(
        "ponder_scale/data/heldout.py",
        "tests/data/test_heldout.py",
        ("torch.cat([losses * count, torch.tensor(", "torch.cat([losses, torch.tensor("),
        ("[part.tokens / tokens for part in parts]", "[1 / len(parts) for part in parts]"),
    ),
    *_of(
        "ponder_scale/data/text_bytes.py",
        "tests/data/test_text_bytes.py",
        ("sizes[known].sum() - added.sum()", "sizes[known].sum()"),
        ("for i in special | ends:", "for i in special:"),
        ("return bytes(1)", "return token.encode()"),
    ),
    *_of(
        "ponder_scale/compare/phi.py",
        "tests/compare/test_phi.py",
        ("by_phi = -alpha *", "by_phi = alpha *"),
        ("weights = DELTA / np.maximum(np.abs(residuals), DELTA)", "weights = np.ones_like(residuals)"),
        ("if high - low >= 1:", "if high - low >= 100:"),
        ("phi * self.log_passes) * self.recurrent", "phi * self.log_passes) * (self.once + self.recurrent)"),
    ),
    *_of(
        "ponder_scale/setup/width.py",
        "tests/setup/test_width.py",
        ("1.0 if weight.ndim < 2 else 1 / ratio", "1.0 if weight.ndim < 2 else 1.0"),
        ("1.0 if factor == 1 else ratio**-0.5", "1 / ratio"),
    ),
    *_of(
        "ponder_scale/model/multi_token.py",
        MULTI_TOKEN,
        ("== 1, (0, 1))", "== 1, (1, 0))"),
        ("follows = targets != IGNORE_INDEX", "follows = targets == targets"),
        ("value=IGNORE_INDEX)[..., ahead:]", "value=IGNORE_INDEX)[..., ahead - 1 : -1]"),
        ("reached = reached & nn", "reached = nn"),
        ("norm(each[0] if isinstance(each, tuple) else each)", "each[0] if isinstance(each, tuple) else each"),
    ),
    *_of("ponder_scale/model/multi_token.py", SPECULATION, ("layers + index)", "layers)")),
    *_of("ponder_scale/model/losses.py", MULTI_TOKEN, ("wanted.multi_token_weight * ahead", "ahead")),
    *_of("ponder_scale/model/cache.py", SPECULATION, ("if passes > first or", "if")),
    *_of(
        "ponder_scale/model/speculation.py",
        SPECULATION,
        ("cache.crop(-surplus)", "cache.crop(0)"),
        ("min(said, drafts.shape[1])]", "0]"),
        ("or token.item() != drafts[0, said].item()", ""),
    ),
    *_of(
        "ponder_scale/model/halting.py",
        HALTING,
        ("keys = self._merged(active, keys, self._new_part(before.keys, keys))", "keys = keys + 0"),
        ("self._merged(self._active.unsqueeze(-1), hidden, self._hidden)", "hidden"),
        ("cached[..., self._begin : self._begin + new.shape[-2], :]", "cached[..., : new.shape[-2], :]"),
        ("else left >= self._threshold)", "else left > 1.1 * self._threshold)"),
        ("left = torch.where(self.active[-1], gate, 0.0)", "left = gate"),
        ("alive if len(alive) < len(hidden) else None", "None"),
        ("torch.where(active[self._rows], new, before[self._rows])", "new"),
        ("feedback(hidden[self._rows], index)", "feedback(hidden, index)[: len(self._rows)]"),
        ("self.remaining[-1] * gate if self.remaining else gate", "gate"),
        ("weight = torch.where(self.active[-1], self.remaining[-1], 0.0)", "weight = self.active[-1].float()"),
        ("gate(embeds[:, :1].detach()).mean()", "embeds.mean()"),
        (".masked_fill(~counted, torch.inf)", ""),
        ("share * counted.sum() * len(gates)", "share * counted.sum()"),
        ("expected + entropy_weight *", "expected - entropy_weight *"),
        ("p.clamp(min=torch.finfo(p.dtype).tiny).log()", "p.log()"),
        ("position_ids.diff(dim=-1) != 1", "position_ids.diff(dim=-1) < -99"),
    ),
    *_of(
        "ponder_scale/model/products.py",
        "tests/model/test_kernels.py::test_interpreted_kernels_are_the_equation[fp32-1e-06-1e-06]",
        ("tl.where(label[None, :] == rows[:, None], 1.0, 0.0)", "0.0"),
        ("power = tl.load(row_powers + depth,", "power = tl.load(powers + depth,"),
        (
            "b = hidden.load([row_tile * M, step * K]), head.load([tile * N, step * K])",
            "b = hidden.load([row_tile * M, step * K]), head.load([tile * N, 0])",
        ),
        (
            "row_tile, tile = _tile_of(program, row_tiles, column_tiles, GROUP)",
            "row_tile, tile = _tile_of(tl.program_id(0), row_tiles, column_tiles, GROUP)",
        ),
    ),
    *_of(
        "ponder_scale/model/pondering_embedding.py",
        " ".join(
            f"tests/model/test_pondering_embedding.py::test_a_few_tokens_without_gradients_{name}"
            for name in ("are_those_of_the_equation", "need_no_product_of_the_library")
        ),
        ("repeat_interleave(vocabulary)", "repeat(vocabulary)"),
        ("_mean_rows(p, table, index).mul_(scale)", "_mean_rows(p, table, None).mul_(scale)"),
        ("if torch.is_grad_enabled() or torch.is_autocast_enabled", "if torch.is_autocast_enabled"),
        ('if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):', "if torch.is_grad_enabled():"),
    ),
    *_of(
        "ponder_scale/model/kernels.py",
        "tests/model/test_kernels.py::test_interpreted_kernels_are_the_equation[fp32-1e-06-1e-06]",
        (".masked_fill_(ignored.unsqueeze(1), 0.0)", ""),
        ("torch.where(ignored, 0.0, 1.0 + 2.0 * z_loss * lse)", "torch.where(ignored, 0.0, 1.0 + z_loss * lse)"),
    ),
    *_of(
        "ponder_scale/model/learned.py",
        "tests/model/test_pass_losses.py tests/model/test_learned_losses.py",
        ("torch.where(inside, -self.slopes, 0.0)", "torch.where(inside, self.slopes, 0.0)"),
        ("torch.where(counted, slopes, 0.0)", "slopes"),
        ("torch.where(counted, loss + picked, torch.inf)", "loss + picked"),
    ),
    *_of(
        "ponder_scale/model/losses.py",
        f"tests/model/test_pass_losses.py {HALTING}",
        ("z_loss = z_loss / weights[-1]", "z_loss = z_loss * weights[-1]"),
        ("sum(watch.learned, weights[-1] * total)", "sum(watch.learned, total)"),
        ("else weights[-1] * z_term", "else z_term"),
        ("(count if wanted.num_items is None else wanted.num_items)", "count"),
        ("_shares(watch.halting, counted) / count", "_shares(watch.halting, counted) / counted.numel()"),
        ("(total - before).detach() / count", "(total - before).detach()"),
    ),
    *_of(
        "ponder_scale/model/losses.py",
        "tests/model/test_modeling.py::test_pass_losses_and_entropies_are_those_of_fewer_steps",
        ("(seen.entropy * counted).sum()", "seen.entropy.sum()"),
    ),
    *_of(
        "ponder_scale/model/passes.py",
        "tests/model/test_pass_losses.py tests/model/test_depth.py",
        ("max(0, self.steps + 1 - backward_passes)", "max(0, self.steps - backward_passes)"),
        ("if index >= first:", "if index > first:"),
        ("self.learned.append(weight * (", "self.learned.append(("),
        ("any(self.weights[:first_differentiated])", "any(self.weights[: first_differentiated - 1])"),
    ),
    *_of(
        "ponder_scale/model/passes.py",
        "tests/model/test_generation.py::test_early_exit_is_the_pass_whose_prediction_settled",
        ("after.exp() * (after - before[0])", "before[0].exp() * (before[0] - after)"),
        ("if moved >= exit_kl:", "if moved >= 2 * exit_kl:"),
    ),
    *_of(
        "ponder_scale/harness/shared.py",
        "tests/train/measure/test_tasks.py::test_two_ranks_of_stage_3_have_the_scores_of_the_exported_step",
        ("answers[number::ranks] = part", "answers[number * len(part) : (number + 1) * len(part)] = part"),
    ),
]
