"""For all tests."""

from __future__ import annotations

import signal

# A shell script that starts the suite in the background has it ignore Ctrl-C, and so would every process that a test
# starts. Some tests are about Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
