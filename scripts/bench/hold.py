#!/usr/bin/env python3
"""Holds memory: hold.py GIB. Commands on standard input: "hold" faults all of it in, "feed" gives it up as it is needed.

While feeding, a part is freed whenever others have used up what was freed last, so that whoever allocates gets pages
that were in use a moment ago. Ends when standard input does.
"""
import mmap
import os
import select
import sys

PART = 256 << 20
AHEAD = 1 << 30  # free beside what was free anyway
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14


def free_bytes():
    return int(os.pread(MEMINFO, 128, 0).split(b"MemFree:")[1].split()[0]) * 1024


def feed(memory):
    floor = free_bytes() + AHEAD
    memory.madvise(mmap.MADV_DONTNEED, 0, min(AHEAD, len(memory)))
    print("feeding", flush=True)
    for start in range(AHEAD, len(memory), PART):
        while free_bytes() > floor:
            if select.select([sys.stdin], [], [], 0.002)[0]:
                return
        memory.madvise(mmap.MADV_DONTNEED, start, min(PART, len(memory) - start))


MEMINFO = os.open("/proc/meminfo", os.O_RDONLY)
memory = mmap.mmap(-1, int(float(sys.argv[1]) * 2**30), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
while command := sys.stdin.buffer.raw.read(64).split():
    for word in command:
        if word == b"hold":
            memory.madvise(POPULATE_WRITE)
            print("held", flush=True)
        else:
            feed(memory)
