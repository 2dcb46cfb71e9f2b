"""What a step is given. Apart from the pipeline that makes it, so that a step can be looked at without Grain."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Rows to predict, each from itself shifted right behind bos: those of one process on the host, or all of them on devices.

    Attributes:
        tokens: int32 [rows, T].
        mask: bool [rows, T], the targets that count.
        segments: int32 [rows, T] with data.intra_document_mask=true: which of its row's documents a target belongs to, from 0.
            Then none is predicted from another document, its first token from bos alone. None: a row is read as one text.
    """

    tokens: Any
    mask: Any
    segments: Any = None
