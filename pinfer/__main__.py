"""`pinfer` and `python -m pinfer`. Imports the command line late, so that Ctrl-C ends well even while torch loads."""

import gc
import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def main() -> NoReturn:
    """Run the process's command line and exit with its code."""
    # torch and numpy swallow a KeyboardInterrupt, or break on it, while their C parts load.
    signal.signal(signal.SIGINT, _leave)
    gc.disable()  # a tenth of a second goes into looking for garbage among modules
    from pinfer.cli.main import commands, run

    commands(sys.argv[1:])
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGHUP"):  # as on Ctrl-C, what is half-written goes; nohup's SIGHUP stays ignored
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_DFL:
            signal.signal(getattr(signal, name), _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without the character still gets the text
    code = run(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said; the rest is the interpreter's shutdown
    sys.exit(code)


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(signum)


def _leave(signum: int, frame: FrameType | None) -> None:
    os.write(2, b"pinfer: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
