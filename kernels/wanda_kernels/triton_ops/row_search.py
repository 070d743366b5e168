"""The search for a row's threshold, one step: the next key to count below, and what its count says.

The number of keys below a guess never falls as the guess rises. False position guesses the key from the
counts at both ends. The final key depends on the guesses and the set of keys below it does not, so
approximate arithmetic serves. All values may be scalars, of one row, or vectors, of several.
Source: the Illinois variant of false position (Dowell & Jarratt 1971).
"""

import triton
import triton.language as tl

FALSE_POSITION_PASSES = tl.constexpr(16)  # after these every second pass halves, which bounds the search
NO_SIDE, LOW_SIDE, HIGH_SIDE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def next_guess(low, high, missing, surplus, n_passes):
    """The next key to count below, in low..high: by false position, or the middle once that takes long."""
    width = high - low
    guess = low + (width.to(tl.float32) * (missing / (missing + surplus))).to(tl.int32)
    halve = (n_passes >= FALSE_POSITION_PASSES) & (n_passes % 2 == 0)
    guess = tl.where(halve, low + width // 2, guess)
    return tl.minimum(tl.maximum(guess, low + 1), high - 1)


@triton.jit
def narrow(low, high, below, missing, surplus, side, guess, count, wanted):
    """The bracket after `count` keys were found below `guess`; an end that stays twice weighs half."""
    is_low = count <= wanted
    gap = tl.maximum(tl.abs(count - wanted), 1).to(tl.float32)
    surplus = tl.where(is_low, tl.where(side == LOW_SIDE, surplus * 0.5, surplus), gap)
    missing = tl.where(is_low, gap, tl.where(side == HIGH_SIDE, missing * 0.5, missing))
    low, high = tl.where(is_low, guess, low), tl.where(is_low, high, guess)
    return low, high, tl.where(is_low, count, below), missing, surplus, tl.where(is_low, LOW_SIDE, HIGH_SIDE)
