"""How much each row that goes into a Hessian counts, where some tokens of the text count more (`Stream.importance`).

Letters: B windows of a batch, T tokens of a window, R rows.
"""

from torch import Tensor

from moepress.models.forward.walk import Stream


def of_tokens(stream: Stream, tokens: Tensor | slice) -> Tensor | None:
    """Of some tokens, by their places among all of the stream's: fp32 on the CPU; None where all count alike."""
    if stream.importance is None:
        return None
    return stream.importance[tokens.cpu() if isinstance(tokens, Tensor) else tokens]


def of_rows(stream: Stream, windows: slice, inputs: Tensor) -> Tensor | None:
    """Of the rows that a batch of windows gives a Linear.

    Args:
        stream: whose windows.
        windows: which.
        inputs: as the Linear gets it, [B * T, ..., I], or [B, ..., T, ..., I] with one size that is T.

    Returns:
        fp32 [R], R the product of all sizes but the last, on the device of the inputs. None where all count alike: also
        of a Linear whose inputs are not of single tokens, such as what attention has compressed.
    """
    if stream.importance is None:
        return None
    length, before = stream.windows.shape[1], inputs.shape[:-1]
    own = stream.importance[windows.start * length : windows.stop * length]
    places = list(before[1:])
    if before[0] == len(own):
        shape = [len(own), *(1 for _ in places)]
    elif before[0] * length == len(own) and places.count(length) == 1:
        shape = [before[0], *(size if size == length else 1 for size in places)]
    else:
        return None
    return own.view(shape).expand(before).flatten().to(inputs.device)
