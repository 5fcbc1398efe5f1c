"""What one test does in the processes of the pool does not reach the next."""

from tp_embed.nn import fused_loss


def set_constant(gang, value):
    fused_loss._MIN_TOKENS = value
    return fused_loss._MIN_TOKENS


def read_constant(gang):
    return fused_loss._MIN_TOKENS


def test_constants_hold_for_one_function(pool):
    before = fused_loss._MIN_TOKENS
    assert pool(2, set_constant, before + 1) == [before + 1] * 2
    assert pool(2, read_constant) == [before] * 2
