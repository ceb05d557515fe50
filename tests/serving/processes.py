"""The servers in processes of their own, as a user starts them."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def server(script: str, *settings: str, temporary: Path | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start `scripts/<script>.py` on a free port; gives its address and the process, whose files go to `temporary`."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "port=0", *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **({} if temporary is None else {"TMPDIR": str(temporary)})},
        # A program started in the background of a shell ignores Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"http://[\d.]+:\d+", line):
                yield found[0], process
                break
        else:
            raise AssertionError("".join(said))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
