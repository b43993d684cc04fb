"""A clock that is set back: the living are not taken for dead, nor the dead for living, and times stay sane."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY
from test_resume import numbers

from retrace.core.lease import LEASE_SECONDS, Busy
from retrace.core.plan import RunSpec, plan
from retrace.core.store import RunDir, Store

CHAIN = [*TINY, "seed=0", "base.optim.steps=150"]
HOUR = 3600


@pytest.fixture
def run(home: Path) -> RunDir:
    spec = plan(["quietstar/main"], CHAIN)[0]
    found = Store(home).run(spec.id)
    found.freeze(spec, command="test")
    return found


def test_a_run_stays_held_when_the_clock_is_set_back(run: RunDir, tmp_path: Path) -> None:
    """The kernel moves the time at which it says to have booted, and with it the start of every process."""
    stat = Path("/proc/stat").read_text()
    boot = int(re.search(r"^btime (\d+)$", stat, re.MULTILINE)[1])  # type: ignore[index]
    (tmp_path / "stat").write_text(stat.replace(f"btime {boot}", f"btime {boot - HOUR}"))
    (tmp_path / "look.py").write_text(
        "import sys, pathlib, retrace.core.store as s; print(s.RunDir(pathlib.Path(sys.argv[1])).state().status)"
    )
    command = f"mount --bind {tmp_path}/stat /proc/stat && exec {sys.executable} {tmp_path}/look.py {run.path}"
    with run.lease():
        seen = subprocess.run(["unshare", "--mount", "sh", "-c", command], capture_output=True, text=True)
        if seen.returncode and "not permitted" in seen.stderr:
            pytest.skip("needs the right to mount")
        assert seen.stdout == "RUNNING\n", seen.stderr


@pytest.mark.parametrize(
    ("age", "held"), [(10, True), (-10, True), (LEASE_SECONDS + 10, False), (-HOUR, False)],
    ids=["fresh", "of a clock slightly ahead", "old", "from before the clock was set back"],
)  # fmt: skip
def test_another_host_holds_a_run_as_long_as_its_heart_beats(age: float, held: bool, run: RunDir) -> None:
    lease = run.path / "lease.json"
    lease.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    os.utime(lease, (time.time() - age,) * 2)
    assert run.state().status == ("RUNNING" if held else "PLANNED")
    if held:
        with pytest.raises(Busy, match="elsewhere:1"), run.lease():
            pass
    else:
        with run.lease():
            assert json.loads(lease.read_text())["host"] != "elsewhere"


# Whatever asks for the time of day gets that of an hour ago once the file is there; other clocks stay as they are.
SET_BACK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, now);
    const char *file = getenv("CLOCK_SET_BACK");
    if (clock == CLOCK_REALTIME && file && access(file, F_OK) == 0) now->tv_sec -= 3600;
    return code;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_clock_that_is_set_back_in_the_middle_of_a_run_changes_no_number_and_no_duration(
    run: RunDir, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "back.c").write_text(SET_BACK)
    library, file = tmp_path / "back.so", tmp_path / "back"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "back.c", "-ldl"], check=True)
    spec: RunSpec = run.load()[0]
    environment = {**os.environ, "LD_PRELOAD": str(library), "CLOCK_SET_BACK": str(file)}
    began = time.monotonic()
    for place in (home, tmp_path / "steady"):
        one = Store(place).run(spec.id)
        one.freeze(spec, command="test")
        process = subprocess.Popen(
            [sys.executable, "-m", "retrace.worker", str(one.path)], env={**environment, "RETRACE_HOME": str(place)}
        )
        while place == home and one.state().step < 10 and process.poll() is None:
            time.sleep(0.02)
        if place == home:
            assert process.poll() is None
            file.touch()
            seen = one.state()
            assert seen.status == "RUNNING"
        assert process.wait() == 0
        if place == home:
            (ended,) = Store(home).records(spec.paper)
            assert 0 < ended.cost.seconds < time.monotonic() - began  # type: ignore[operator]
            assert ended.provenance["finished"] < time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() - HOUR / 2))
            file.unlink()
    assert numbers(home, spec) == numbers(tmp_path / "steady", spec)
