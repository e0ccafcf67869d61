"""The polar factor of a batch of matrices by a fixed number of matrix products, so that nothing waits for the device.

The products are the composed minimax quintics of Polar Express (https://huggingface.co/papers/2505.16932).
"""

import functools
import math

import torch
from torch import Tensor


Quintic = tuple[float, float, float]


def polar_factor(
    X: Tensor,  # (n, r, r), singular values in [lower, 1]
    coefficients: tuple[Quintic, ...],
) -> Tensor:  # (n, r, r)
    """The orthogonal W of X = W H, where H is symmetric positive definite.

    Args:
        coefficients: `polar_coefficients(lower)`.
    """
    for a, b, c in coefficients:
        Y = X.mT @ X
        # a X + X (b Y + c Y²); baddbmm adds within the product, which saves a pass over memory each time.
        X = torch.baddbmm(X, X, torch.baddbmm(Y, Y, Y, beta=b, alpha=c), beta=a)
    return X


@functools.cache
def polar_coefficients(lower: float, error: float = 1e-12) -> tuple[Quintic, ...]:
    """Coefficients (a, b, c) of odd quintics a x + b x³ + c x⁵ whose composition maps [lower, 1] to 1.

    Each quintic is the minimax approximation of 1 on the interval that its predecessor leaves, which Remez exchange
    finds in float64. The last one or two are Newton-Schulz steps, which cube the error that is left.

    Args:
        lower: Smallest singular value that is mapped to 1, in (0, 1].
        error: The distance from 1 that may be left. What is below the dtype's rounding costs a step for nothing.

    Raises:
        ValueError: `lower` is out of range.
    """
    if not 0 < lower <= 1:
        raise ValueError(f"polar_coefficients needs 0 < lower <= 1, got {lower}.")
    low, high, quintics = lower, 1.0, []
    while high - low > 2e-2:
        # Rounding can lift a singular value above `high`, where a quintic grows fast, so the fit has a margin.
        top = high * (1 + 2e-3)
        # For a tiny `low` the best quintic presses singular values near 1 down to `low`, too, and their digits are
        # lost. The fit therefore starts at 1/40 of the interval, where the quintic stays large; `low` itself is then
        # mapped below 1 - deviation.
        floor = max(low, 0.025 * top)
        (a, b, c), deviation = _minimax_quintic(floor, top)
        least = 1 - deviation if floor == low else a * low + b * low**3 + c * low**5
        scale = 2 / (least + 1 + deviation)
        low, high = scale * least, scale * (1 + deviation)
        quintics.append((scale * a, scale * b, scale * c))
    left = max(1 - low, high - 1)
    while left > error:
        quintics.append((15 / 8, -10 / 8, 3 / 8))
        left = 2.5 * left**3  # the quintic's third derivative at 1 is 15, and the first two are 0
    return tuple(quintics)


def _minimax_quintic(low: float, high: float) -> tuple[Quintic, float]:
    """The odd quintic p closest to 1 on [low, high], and its largest error there."""
    signs = (1, -1, 1, -1)
    inner = [low + (high - low) * 0.25, low + (high - low) * 0.75]
    for _ in range(100):
        # p(x_i) = x_i (a + b t_i + c t_i²) = 1 - (±1) E, t = x², at four points. The third divided difference of the
        # bracket vanishes, which gives E; Newton's form through the last three points gives a, b, c.
        x = (low, *inner, high)
        t = [point * point for point in x]
        weights = [1 / (x[i] * math.prod(t[i] - t[j] for j in range(4) if j != i)) for i in range(4)]
        error = sum(weights) / sum(sign * weight for sign, weight in zip(signs, weights, strict=True))
        y = [(1 - sign * error) / point for sign, point in zip(signs, x, strict=True)]
        slope, next_slope = (y[2] - y[1]) / (t[2] - t[1]), (y[3] - y[2]) / (t[3] - t[2])
        c = (next_slope - slope) / (t[3] - t[1])
        b = slope - c * (t[1] + t[2])
        a = y[1] - t[1] * (b + c * t[1])
        # The error is extremal where p'(x) = a + 3 b x² + 5 c x⁴ = 0.
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        previous, inner = inner, sorted(math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
        if max(abs(p - q) for p, q in zip(previous, inner, strict=True)) < 1e-12 * high:
            break
    return (a, b, c), abs(error)
