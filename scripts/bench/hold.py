#!/usr/bin/env python3
"""Holds memory: hold.py GIB. Commands on standard input: "hold" faults it in, "feed" gives it up as it is needed.

GIB of huge pages, and small pages for what is free beside them, as those take up the fragments that small allocations
would meet first. While feeding, a part is freed whenever others have used up what was freed last, so that whoever
allocates gets pages that were in use a moment ago. Gives way when memory runs short. Ends when standard input does.
"""
import mmap
import os
import select
import sys

PART = 256 << 20
AHEAD = 3 * PART  # freed beyond what was free anyway
LEFT_FREE = 3 << 29  # 1.5 GiB for everybody else
SHORT = LEFT_FREE // 3
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14


def free_bytes():
    return int(os.pread(MEMINFO, 128, 0).split(b"MemFree:")[1].split()[0]) * 1024


class Region:
    def __init__(self, size, advice):
        self.size, self.held = size // PART * PART, 0
        self.memory = mmap.mmap(-1, max(self.size, PART), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(advice)

    def fill(self, left_free):
        while self.held < self.size and free_bytes() > left_free:
            self.memory.madvise(POPULATE_WRITE, self.held, PART)
            self.held += PART

    def give(self):
        if self.held:
            self.held -= PART
            self.memory.madvise(mmap.MADV_DONTNEED, self.held, PART)


def give():
    HUGE.give()
    SMALL.give()


def feed():
    floor = free_bytes() + AHEAD
    give()
    print("feeding", flush=True)
    while not select.select([sys.stdin], [], [], 0.002)[0]:
        while free_bytes() < floor and (HUGE.held or SMALL.held):
            give()


def idle():
    while not select.select([sys.stdin], [], [], 0.02)[0]:
        if free_bytes() < SHORT:
            give()


with open("/proc/self/oom_score_adj", "w") as f:
    f.write("1000")
MEMINFO = os.open("/proc/meminfo", os.O_RDONLY)
HUGE = Region(int(float(sys.argv[1]) * 2**30), mmap.MADV_HUGEPAGE)
SMALL = Region(os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE, mmap.MADV_NOHUGEPAGE)
while words := sys.stdin.buffer.raw.read(64).split():
    for word in words:
        if word == b"hold":
            HUGE.fill(0)
            SMALL.fill(LEFT_FREE)
            print("held", flush=True)
            idle()
        else:
            feed()
