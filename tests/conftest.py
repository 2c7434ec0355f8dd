"""What all tests rely on: the fixtures, and Ctrl-C as a terminal gives it."""

import signal

from helpers.serving import serve, trace_folder
from helpers.standing_in import elsewhere, workplace
from helpers.tiny import drawing, place

__all__ = ["drawing", "elsewhere", "place", "serve", "trace_folder", "workplace"]

# a shell that starts the tests in the background lets them, and what they start, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)
