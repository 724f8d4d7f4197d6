"""Signals in child processes of tests."""

import signal


def hears_ctrl_c() -> None:
    """For `preexec_fn`: a shell makes its background jobs, and so a test suite run as one, deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
