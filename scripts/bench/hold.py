#!/usr/bin/env python3
"""Holds memory: hold.py MOST LEAVE, in bytes. On standard input, "hold" faults it in and "free" gives it up at once.

MOST, and less where LEAVE would not stay available for others. Ends when standard input does; first to go when the
machine runs out of memory.
"""
import mmap
import sys

PART = 256 << 20
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14


def available():
    with open("/proc/meminfo") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))


def hold():
    for start in range(0, len(memory), PART):
        if available() < leave:
            break
        memory.madvise(POPULATE_WRITE, start, min(PART, len(memory) - start))


most, leave = int(sys.argv[1]), int(sys.argv[2])
with open("/proc/self/oom_score_adj", "w") as f:
    f.write("1000")
memory = mmap.mmap(-1, most, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
for line in sys.stdin:
    if line == "hold\n":
        hold()
    else:
        memory.madvise(mmap.MADV_DONTNEED)
    print("done", flush=True)
