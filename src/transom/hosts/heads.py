"""What an attention operator with parameters a head has to know of a block."""

from __future__ import annotations

from transom.slots import BlockView


def head_shape(view: BlockView) -> tuple[int, int] | None:
    """Number and width of the heads that an attention operator meets in a block.

    None where that cannot be told from its projections.
    """
    given = view.projections()
    if given is None:
        return None
    width = len(given.q[0]) // given.heads
    # differential attention splits its heads once more
    own = getattr(view.part("attention"), "head_dim", width)
    return (given.heads, width) if own == width else None
