"""What a run says when another process of it is gone: one line, and not the backend's traceback."""

from __future__ import annotations

SIGNS = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Connection refused",
    "Socket Timeout",
    "Timed out waiting",
    "remote process exited",
    "ncclRemoteError",
    "Watchdog caught collective operation timeout",
)
"""What gloo, nccl and the store write when the other end does not answer."""
LOST = (
    "another process of the run is gone or hangs (its own log says why); start the same command again: it goes on "
    "from the last whole checkpoint"
)


def lost_process(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that another process does not answer."""
    seen: BaseException | None = error
    while seen is not None:
        if any(sign in str(seen) for sign in SIGNS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
