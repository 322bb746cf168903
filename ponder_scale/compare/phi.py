"""Fit the recurrence-equivalence exponent phi, which says how many parameters a pass is worth, to losses of many runs.

    L = E + A (N_once + r^phi N_rec)^-alpha + B D^-beta

The law is that of "How Much Is One Recurrence Worth?" (arXiv 2604.21106). L is a loss in nats after D tokens. r = S + 1
passes run over N_rec parameters, and more passes do not multiply the other N_once. With phi = 1, a pass is worth as
much as layers of its own. With phi = 0 it is worth nothing. The fit is Chinchilla's (arXiv 2203.15556): Huber's loss of
log L with delta 1e-3, and the best of many starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ponder_scale.errors import ConfigError

DELTA = 1e-3  # delta of Huber's loss, in log L
ITERATIONS = 300
RESAMPLES = 200
Array = np.ndarray
# Bounds of ln E, ln A, alpha, phi, ln B and beta. If an exponent ends at its bound, the losses do not determine it.
_LEAST = np.array([-20.0, -20.0, 1e-3, -3.0, -20.0, 1e-3])
_MOST = np.array([5.0, 5.0, 5.0, 4.0, 5.0, 5.0])
_ALPHA, _PHI, _OF_TOKENS = 2, 3, 4  # places in theta; if all runs have the same D, theta ends before the last one


class Point(NamedTuple):
    """The measurements of one finished run."""

    once: float  # parameters that more passes do not multiply
    recurrent: float
    passes: int
    tokens: float
    loss: float  # held-out loss in nats


@dataclass(frozen=True)
class Fit:
    """The fitted law.

    Args:
        low, high: 95% interval of phi over resampled runs.
        b, beta: None if all runs have the same number of tokens. E contains their term then.
        worst: largest error of a predicted loss, relative to the loss.
    """

    phi: float
    low: float
    high: float
    e: float
    a: float
    alpha: float
    b: float | None
    beta: float | None
    runs: int
    worst: float

    def worth(self, once: float, recurrent: float, passes: int) -> float:
        """The parameters of a model with one pass that would be as good."""
        return float(once + passes**self.phi * recurrent)


def fit(points: Sequence[Point], *, resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """Fit the law to these runs. Raises ConfigError, with the reason, if they cannot tell phi."""
    _check(points)
    data = _Data(np.array(points, dtype=np.float64))
    best = min((_descend(data, start) for start in _starts(data)), key=lambda found: found[1])[0]
    data.check(best)
    phis = _resampled(data, best, resamples, np.random.default_rng(seed))
    low, high = np.percentile(phis, [2.5, 97.5]).tolist()
    if high - low >= 1:  # so wide an interval cannot tell 0 (nothing) from 1 (everything)
        raise ConfigError(
            f"phi is from {low:.2f} to {high:.2f} (95%), so these {len(points)} runs do not tell whether a pass is "
            "worth nothing or as much as layers of its own; add runs of other widths, steps S, or seeds"
        )
    e, a, alpha, phi, b, beta = data.law(best)
    worst = float(np.abs(np.expm1(data.residuals(best)[0])).max())
    alike = data.parameters == _OF_TOKENS
    return Fit(phi, low, high, e, a, alpha, None if alike else b, None if alike else beta, len(points), worst)


def _check(points: Sequence[Point]) -> None:
    """Raise ConfigError if these runs cannot tell phi, whatever their losses are."""
    passes = sorted({point.passes for point in points})
    sizes = sorted({(point.once, point.recurrent) for point in points})
    tokens = {point.tokens for point in points}
    if not points or not all(np.isfinite(point.loss) and point.loss > 0 for point in points):
        raise ConfigError("phi is fitted to finite losses, but a run has none, or there are no runs")
    if len(passes) < 2:
        raise ConfigError(
            f"all {len(points)} runs have S = {passes[0] - 1}, so they do not show what a pass is worth; add runs with "
            "another model.pondering_steps, such as 0"
        )
    if len(sizes) < 2:
        once, recurrent = sizes[0]
        raise ConfigError(
            f"all {len(points)} runs have {once + recurrent:,.0f} parameters, so they do not show what parameters are "
            "worth, with which phi compares passes; add runs of another width or depth"
        )
    needed = 1 + (_OF_TOKENS if len(tokens) == 1 else len(_LEAST))
    cells = len({point[:4] for point in points})
    if cells < needed:
        raise ConfigError(
            f"{cells} different runs cannot determine the {needed - 1} constants of the law; train at least {needed} "
            "with different sizes, steps S and tokens"
        )


class _Data:
    """The runs as arrays. Sizes and tokens are relative to their geometric means, so that all constants are near 1.

    The fit determines theta: ln E, ln A, alpha, phi, and if the tokens differ ln B and beta.
    """

    def __init__(self, rows: Array, scales: tuple[float, float] | None = None, parameters: int = 0) -> None:
        self._rows = rows
        self.once, self.recurrent, self.passes, self.tokens, losses = rows.T
        self.log_loss, self.log_passes = np.log(losses), np.log(self.passes)
        self.scales = scales or (
            float(np.exp(np.log(self.once + self.recurrent).mean())),
            float(np.exp(np.log(self.tokens).mean())),
        )
        self.parameters = parameters or (len(_LEAST) if len(set(self.tokens)) > 1 else _OF_TOKENS)

    def pick(self, chosen: Array) -> _Data:
        """The data of some of the runs, for the same law."""
        return _Data(self._rows[chosen], self.scales, self.parameters)

    def residuals(self, theta: Array) -> tuple[Array, Array]:
        """ln of the predicted minus ln of the measured losses, (n,), and the derivatives by theta, (n, k)."""
        ln_e, ln_a, alpha, phi = theta[:_OF_TOKENS]
        raised = np.exp(phi * self.log_passes) * self.recurrent
        log_size = np.log((self.once + raised) / self.scales[0])
        floor, by_size = np.full(len(self.tokens), np.exp(ln_e)), np.exp(ln_a - alpha * log_size)
        by_phi = -alpha * by_size * raised / (self.once + raised) * self.log_passes
        columns, total = [floor, by_size, -by_size * log_size, by_phi], floor + by_size
        if self.parameters > _OF_TOKENS:
            log_tokens = np.log(self.tokens / self.scales[1])
            by_tokens = np.exp(theta[_OF_TOKENS] - theta[_OF_TOKENS + 1] * log_tokens)
            columns, total = [*columns, by_tokens, -by_tokens * log_tokens], total + by_tokens
        return np.log(total) - self.log_loss, np.stack(columns, 1) / total[:, None]

    def check(self, theta: Array) -> None:
        """Raise ConfigError if phi is at its bound, or if another phi fits as well."""
        jacobian = self.residuals(theta)[1]
        scale = np.linalg.norm(jacobian, axis=0)
        phi = jacobian[:, _PHI]
        others = np.delete(jacobian / np.where(scale > 0, scale, 1), _PHI, axis=1)
        left = phi - others @ np.linalg.lstsq(others, phi, rcond=1e-10)[0]
        least, most = _LEAST[_PHI], _MOST[_PHI]
        # `left` is the part of a change in phi that the other constants cannot compensate, in ln L. If it is below
        # rounding errors, the losses do not determine phi.
        if not least < theta[_PHI] < most or np.abs(left).max() < 1e-6:
            raise ConfigError(
                f"these {len(jacobian)} runs fit as well with another phi, since the other constants of the law make "
                "up for it; add runs of other widths and steps S, whose losses differ"
            )

    def law(self, theta: Array) -> list[float]:
        """E, A, alpha, phi, B and beta for sizes and tokens in their own units."""
        ln_e, ln_a, alpha, phi = theta[:_OF_TOKENS].tolist()
        ln_b, beta = theta[_OF_TOKENS:].tolist() if self.parameters > _OF_TOKENS else (-np.inf, 0.0)
        a, b = (
            float(np.exp(logarithm) * scale**power)
            for logarithm, scale, power in zip((ln_a, ln_b), self.scales, (alpha, beta), strict=True)
        )
        return [float(np.exp(ln_e)), a, alpha, phi, b, beta]


def _starts(data: _Data) -> list[Array]:
    """The starts of the descents: small and large values of E, both slopes and phi, with A and B to match."""
    lowest, middle = float(np.exp(data.log_loss.min())), float(np.exp(data.log_loss.mean()))
    found = []
    for share in (0.3, 0.9):
        rest = np.log((middle - share * lowest) / (2 if data.parameters > _OF_TOKENS else 1))
        for alpha in (0.1, 0.5):
            for beta in (0.1, 0.5) if data.parameters > _OF_TOKENS else (0.1,):
                for phi in (0.0, 0.5, 1.0):
                    theta = [np.log(share * lowest), rest, alpha, phi, rest, beta]
                    found.append(np.array(theta[: data.parameters]))
    return found


def _huber(residuals: Array) -> float:
    size = np.abs(residuals)
    return float(np.where(size <= DELTA, size**2 / 2, DELTA * (size - DELTA / 2)).sum())


def _descend(data: _Data, theta: Array) -> tuple[Array, float]:
    """Minimize by Levenberg and Marquardt, with weights that turn least squares into Huber's loss."""
    least, most = _LEAST[: len(theta)], _MOST[: len(theta)]
    residuals, jacobian = data.residuals(theta)
    value, damping, still = _huber(residuals), 1e-2, 0
    for _ in range(ITERATIONS):
        weights = DELTA / np.maximum(np.abs(residuals), DELTA)
        normal, gradient = (jacobian.T * weights) @ jacobian, (jacobian.T * weights) @ residuals
        ridge = np.diag(damping * np.maximum(np.diag(normal), 1e-12))
        trial = np.clip(theta - np.linalg.solve(normal + ridge, gradient), least, most)
        tried = data.residuals(trial)
        better = _huber(tried[0])
        if not better < value:
            damping *= 4
            if damping > 1e12:
                break
            continue
        still = still + 1 if value - better < 1e-10 * value else 0
        theta, value, damping = trial, better, max(damping / 3, 1e-12)
        residuals, jacobian = tried
        if still == 3:
            break
    return theta, value


def _resampled(data: _Data, best: Array, resamples: int, generator: np.random.Generator) -> list[float]:
    """The phi of samples of the runs, drawn with replacement. Samples that could not tell phi are drawn again."""
    found: list[float] = []
    count = len(data.log_loss)
    for _ in range(20 * resamples):
        if len(found) == resamples:
            break
        some = data.pick(generator.integers(0, count, count))
        sizes = set(zip(some.once.tolist(), some.recurrent.tolist(), strict=True))
        if len(set(some.passes)) > 1 and len(sizes) > 1:
            found.append(float(_descend(some, best)[0][_PHI]))
    return found
