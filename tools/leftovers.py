"""What a test run leaves behind: files in its own temporary folder, and processes that outlive it.

A run gets a folder of its own as TMPDIR. Every process that it starts inherits the variable, also
through torchrun and after its parent has gone, and is found by it. A fork shows the variables with
which its parent began; a page is a fork, so its own forks are found by the session that it leads.
"""

import os
import time
from pathlib import Path

import psutil

PATIENCE = 10  # seconds that a process may take to end after its parent


def processes(folder, but=(), session=None):
    """Living processes whose TMPDIR is `folder` or lies in it, and those of a session; not those in
    `but`, nor this one."""
    found = []
    for process in psutil.process_iter():
        try:
            inside = Path(process.environ().get("TMPDIR", "/")).is_relative_to(folder)
            inside = inside or os.getsid(process.pid) == session
            alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue
        except OSError:
            continue
        if inside and alive and process.pid not in {os.getpid(), *but}:
            found.append(process)
    return found


def described(process):
    try:
        return f"process {process.pid}: {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return f"process {process.pid}"


def files(folder, but=()):
    """What lies in `folder`, by name, without the names in `but`."""
    return sorted(p.name for p in Path(folder).iterdir() if p.name not in but)


def tidy(folder, but=(), patience=PATIENCE, session=None):
    """Sentences about what was left behind in `folder` and by its processes, which are ended."""
    end = time.time() + patience
    while (alive := processes(folder, session=session)) and time.time() < end:
        time.sleep(0.2)
    said = [described(process) for process in alive]
    for process in alive:
        try:
            process.kill()
        except psutil.Error:
            pass
    names = files(folder, but)
    if names:
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        said.append(f"in the temporary folder: {', '.join(names[:12])}{more}")
    return said
