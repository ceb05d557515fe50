"""Processes that share the work: Ctrl-C ends them at once and in silence, whatever they are doing."""

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import signal, sys, time
from aurora.evaluation.workers import worker_pool

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
    try:
        with worker_pool(2) as pool:
            waiting = [pool.submit(time.sleep, 300) for _ in range(2)]
            print("started", flush=True)
            waiting[0].result()
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.slow
@pytest.mark.parametrize("everybody", [True, False], ids=["Ctrl-C", "the parent alone"])
@pytest.mark.parametrize("delay_s", [0.0, 0.5, 10.0], ids=["at birth", "importing torch", "at work"])
def test_an_interrupt_ends_all_processes_in_silence(tmp_path, delay_s, everybody):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    running = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert running.stdout.readline() == "started\n"
    time.sleep(delay_s)
    (os.killpg if everybody else os.kill)(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (130, "")
    deadline = time.monotonic() + 20  # multiprocessing's own helper takes a moment
    while group_lives(running.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def group_lives(pid):
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True
