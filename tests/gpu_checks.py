"""Checks for tests of what runs them: of every outcome one."""

import os
import subprocess
import sys
import time

from benchmarks.gpu.__main__ import Check
from benchmarks.gpu.check import judged, skipped


def right(settings):
    yield judged(True, f"as expected on {settings.device}", number=1.5)
    yield skipped("needs what is not there")


def wrong(settings):
    yield judged(True, "one thing is right")
    yield judged(False, "found 3, expected 2", found=3)
    print("said before the end")


def crashes(settings):
    yield judged(True, "found before the end")
    os.abort()


def raises(settings):
    raise ValueError("nothing is as it was")
    yield


def hangs(settings):
    yield judged(True, "found before it hangs")
    (settings.results / "hangs").write_text(str(os.getpid()))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    (settings.results / "child").write_text(str(child.pid))
    time.sleep(3600)


def skips(settings):
    yield skipped("needs CUDA")


def says_nothing(settings):
    return iter(())


LONG = 3600.0


def check(function, seconds=LONG):
    return Check(function.__name__, f"a check that {function.__name__}", f"tests.gpu_checks:{function.__name__}", seconds)
