"""Puts the machine into a known state, then lets a loader run: page cache warm or cold, free memory ready for use.

Every loader gets the same: its process is up and has imported what it needs, the checkpoint's pages are all in the page
cache or all out of it, memory that was in use until now has just been freed, and only then does its clock start. It ends when
every tensor lies in memory that the loader's user owns.
"""
import ctypes
import glob
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

TIMEOUT_S = 300
HERE = os.path.dirname(os.path.abspath(__file__))


def checkpoint_files(ckpt):
    return sorted(glob.glob(os.path.join(ckpt, "*.safetensors")))


def tensor_bytes(ckpt):
    with open(os.path.join(ckpt, "model.safetensors.index.json")) as f:
        return json.load(f)["metadata"]["total_size"]


# ---- page cache -----------------------------------------------------------------------------------------------------

def read_through(files):
    buffer = bytearray(1 << 20)
    for path in files:
        with open(path, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


def drop_from_cache(files):
    for path in files:
        with open(path, "rb") as f:
            os.fsync(f.fileno())  # dirty pages stay
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:  # root on a machine of its own: directory entries and block maps too
        with open("/proc/sys/vm/drop_caches", "w") as f:
            f.write("3")
    except OSError:
        pass


def cached_fraction(files):
    """Share of the files' pages that is in the page cache."""
    libc, pages, cached = ctypes.CDLL(None, use_errno=True), 0, 0
    for path in files:
        size = os.path.getsize(path)
        with open(path, "rb") as f, mmap.mmap(f.fileno(), size, access=mmap.ACCESS_COPY) as m:
            state = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            at = ctypes.c_char.from_buffer(m)
            if libc.mincore(ctypes.c_void_p(ctypes.addressof(at)), ctypes.c_size_t(size), state) == 0:
                pages, cached = pages + len(state), cached + bytes(state).count(1)
            del at
    return round(cached / max(pages, 1), 4)


# ---- memory ---------------------------------------------------------------------------------------------------------

class HeldMemory:
    """Memory that another process (hold.py) keeps faulted in between runs and gives up just before a clock starts.

    A virtual machine that returns free pages to its host (balloon with free page reporting) pays twenty times the price
    for the first touch of a returned page. Which loader meets how many of those is chance; pages that were in use a
    moment ago are still there. All is given up at once, as a loader may look at how much is available.
    """

    def __init__(self, gib, ckpt_bytes):
        """Four checkpoints where `gib` is None; the page cache keeps room for one, everybody else 4 GiB."""
        most = 4 * ckpt_bytes if gib is None else int(gib * 2**30)
        self.command = [sys.executable, os.path.join(HERE, "hold.py"), str(most), str(ckpt_bytes + (4 << 30))]
        self.wanted, self.process = most > 0, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def hold(self):
        if self.wanted and not (self.process and self.ask("hold")):  # not started yet, or out of memory since
            self.__exit__()
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            if not self.ask("hold"):
                raise SystemExit("harness: cannot hold memory, try a smaller --hold-gib (0: none)")

    def free(self):
        if self.process:
            self.ask("free")

    def ask(self, command):
        try:
            print(command, file=self.process.stdin, flush=True)
            return self.process.stdout.readline() != ""
        except BrokenPipeError:
            return False


# ---- memory of rank processes ---------------------------------------------------------------------------------------

def process(pid):
    """(its parent, its state, when it started)"""
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rpartition(")")[2].split()
    return int(fields[1]), fields[0], fields[19]


def rank_of(pid):
    """Which rank a process was started as, None where it is none."""
    with open(f"/proc/{pid}/environ", "rb") as f:
        found = [v for v in f.read().split(b"\0") if v.startswith(b"RANK=")]
    return int(found[0].split(b"=")[1]) if found else None


def memory_status(pid):
    """Bytes by the kernel's names: VmHWM, VmRSS, RssShmem and more."""
    with open(f"/proc/{pid}/status") as f:
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in f if line.endswith(" kB\n")}


def segment_sizes(pid):
    """Bytes that are really there of each shared segment that a process has open."""
    sizes, folder = {}, f"/proc/{pid}/fd"
    for fd in os.listdir(folder):
        try:
            if os.readlink(f"{folder}/{fd}").startswith(("/memfd:", "/dev/shm/")):
                found = os.stat(f"{folder}/{fd}")
                sizes[found.st_dev, found.st_ino] = found.st_blocks * 512
        except FileNotFoundError:  # closed meanwhile
            pass
    return list(sizes.values())


class RankMemory(threading.Thread):
    """Watches the memory of the rank processes that a program starts, until stopped.

    The kernel knows a process's peak exactly (VmHWM), but counts in it whatever the process maps: of the segments through
    which ranks pass bytes, the other ranks' as well as its own. To count a shared page once, for the rank that made it,
    `others_bytes` is what has to be taken off: the shared memory that the process mapped beyond its own segment when it was
    seen at its largest. Whose a segment is does not show from outside, so the largest is taken for its own: what is
    left is never too little. A rank that could not be looked at has nothing taken off.

    Counters are looked at, no page tables: a look costs less than a millisecond and holds up no page fault.
    """

    EVERY_S = 0.05

    def __init__(self, program, ranks):
        super().__init__(daemon=True)
        self.program, self.ranks, self.ended = program, ranks, threading.Event()
        self.pids, self.started, self.program_peak = {}, {}, 0
        self.peaks, self.largest, self.own, self.others = {}, {}, {}, {}  # of each rank, in bytes

    def run(self):
        while not self.ended.wait(self.EVERY_S):
            if len(self.pids) < self.ranks:
                self.find()
            for rank, pid in self.pids.items():
                try:
                    self.look(rank, pid)
                except OSError:  # it has ended, or may not be looked at
                    pass
            try:
                self.program_peak = max(self.program_peak, memory_status(self.program).get("VmHWM", 0))
            except OSError:
                pass

    def find(self):
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                parent, _, started = process(pid)
                if parent == self.program and (rank := rank_of(pid)) is not None:
                    self.pids[rank], self.started[int(pid)] = int(pid), started
            except OSError:
                pass

    def look(self, rank, pid):
        # segments first: one that is given up in between is missing in the status then, and nothing is taken off for it
        self.own[rank] = max([self.own.get(rank, 0), *segment_sizes(pid)])
        status = memory_status(pid)
        if "VmRSS" not in status:  # it is ending: its memory has gone
            return
        self.peaks[rank] = max(self.peaks.get(rank, 0), status["VmHWM"])
        if status["VmRSS"] > self.largest.get(rank, 0):
            self.largest[rank], self.others[rank] = status["VmRSS"], max(0, status["RssShmem"] - self.own[rank])

    def stop(self):
        """-> what was seen of each rank; raises where a rank outlives the program, and its memory with it."""
        self.ended.set()
        self.join()
        deadline = time.monotonic() + 5
        while left := [pid for pid in self.pids.values() if self.runs(pid)]:
            if time.monotonic() > deadline:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise LeftBehind(f"processes {left} still ran after the program had ended")
            time.sleep(0.01)
        return {"launcher_peak_rss_bytes": self.program_peak,
                "ranks_seen": [{"peak_rss_bytes": self.peaks.get(r, 0), "others_bytes": self.others.get(r, 0)}
                               for r in range(self.ranks)]}

    def runs(self, pid):
        try:
            _, state, started = process(pid)
            return state not in "ZX" and started == self.started[pid]  # the number may be another's by now
        except OSError:
            return False


class LeftBehind(Exception):
    pass


# ---- processor ------------------------------------------------------------------------------------------------------

def busy_seconds():
    """Processor seconds that this machine has spent on anything, and those that its host took away."""
    v = [int(x) for x in open("/proc/stat").readline().split()[1:9]]
    return (v[0] + v[1] + v[2] + v[5] + v[6] + v[7]) / os.sysconf("SC_CLK_TCK")


def cpu_seconds(usage):
    return usage.ru_utime + usage.ru_stime


# ---- running --------------------------------------------------------------------------------------------------------

def environment(**more):
    """The caller's, less what would turn a loader's knobs; one copying thread per rank as servers set it."""
    own = ("RUNAI_", "FASTSAFETENSORS_", "LONGSHORE_", "OMP_", "MKL_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    return env | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"} | more


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class NotPrepared(Exception):
    pass


def prepare(files, state, memory, program=()):
    """Everything but the go -> the share of the files that is cached."""
    if state == "cold":
        drop_from_cache(files)  # before memory is held, so that the pages which this frees are held too
        read_through(program)  # what runs is warm, as the peers' imports are
    memory.hold()
    for _ in range(4):
        cached = cached_fraction(files)
        if cached == (state == "warm"):
            break
        if state == "cold":
            drop_from_cache(files)
        else:
            read_through(files)  # a page that is read a second time is kept longer
    if abs(cached - (state == "warm")) > 0.01:
        raise NotPrepared(f"{cached:.0%} of the checkpoint is cached before a {state} run: does another program use it?")
    memory.free()
    return cached


def error_tail(f):
    f.seek(0)
    return f.read()[-600:].strip()


def run_peer(ckpt, peer, world, state, memory, verify=False, script="peers.py", more=None):
    """One run of peers.py with `world` processes that start together; the time is that of the last to be ready.

    Another script may follow the same protocol. `more` is added to the environment.
    """
    files, port = checkpoint_files(ckpt), str(free_port())
    command = [sys.executable, os.path.join(HERE, script), *peer, ckpt] + ["--verify"] * verify
    errors = tempfile.TemporaryFile("w+")
    ranks = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                              env=environment(RANK=str(r), WORLD_SIZE=str(world), LOCAL_RANK=str(r), MASTER_PORT=port, **(more or {})))
             for r in range(world)]
    watchdog = threading.Timer(TIMEOUT_S, lambda: [p.kill() for p in ranks])
    watchdog.start()
    try:
        for p in ranks:
            if not any(line == "ready\n" for line in p.stdout):
                return {"error": error_tail(errors) or "ended before it was ready"}
        cached = prepare(files, state, memory)
        for p in ranks:
            p.stdin.write("go\n")
            p.stdin.flush()
        found = [next((line for line in p.stdout if line.startswith("{")), None) for p in ranks]
        if None in found:
            return {"error": error_tail(errors) or "no result"}
        return sum_up([json.loads(line) for line in found]) | {"cached_before": cached}
    except BrokenPipeError:
        return {"error": error_tail(errors) or "ended before its start"}
    except NotPrepared as e:
        return {"error": str(e)}
    finally:
        watchdog.cancel()
        for p in ranks:  # a rank with its result out only waits for the others
            p.kill()
            p.communicate()
        errors.close()


def sum_up(ranks):
    seconds = max(r["end"] for r in ranks) - min(r["start"] for r in ranks)
    busy = max(r["busy_s"] for r in ranks) - sum(r["cpu_s"] for r in ranks)
    out = {"seconds": round(seconds, 4), "disk_bytes": sum(r["disk_bytes"] for r in ranks),
           "rank_bytes": [r["bytes"] for r in ranks], "rank_peak_rss_bytes": [r["peak_rss_bytes"] for r in ranks],
           "cpu_s": round(sum(r["cpu_s"] for r in ranks), 3), "other_cores": round(max(0.0, busy / seconds), 2)}
    verified = [r["verified"] for r in ranks if "verified" in r]
    return out | ({"verified": "ok" if all(v == "ok" for v in verified) else verified} if verified else {})


def run_program(command, files, state, memory, rank_processes=0, more=None):
    """One run of a program of its own -> (its standard output, measures) or (None, {"error"}).

    It may start `rank_processes` processes. The processor time and what came from disk are those of all of them: the
    system adds up what a program has waited for. Memory it does not add up, so each rank is watched.
    """
    try:
        cached = prepare(files, state, memory, program=[command[0]])
    except NotPrepared as e:
        return None, {"error": str(e)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        busy, start = busy_seconds(), time.monotonic()
        p = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, env=environment(**(more or {})))
        watchdog = threading.Timer(TIMEOUT_S, p.kill)
        watchdog.start()
        ranks, seen = RankMemory(p.pid, rank_processes) if rank_processes else None, {}
        try:
            if ranks:
                ranks.start()
            _, status, usage = os.wait4(p.pid, 0)
            wall = time.monotonic() - start
            p.returncode = os.waitstatus_to_exitcode(status)
            seen = ranks.stop() if ranks else {}
        except LeftBehind as e:
            return None, {"error": str(e)}
        finally:
            watchdog.cancel()
            if p.returncode is None:
                p.kill()
        if p.returncode:
            return None, {"error": f"exit code {p.returncode}: {error_tail(errors)}"}
        out.seek(0)
        other = (busy_seconds() - busy - cpu_seconds(usage)) / max(wall, 0.01)
        return out.read(), {"wall_s": round(wall, 3), "cpu_s": round(cpu_seconds(usage), 3),
                            "disk_bytes": usage.ru_inblock * 512, "process_peak_rss_bytes": usage.ru_maxrss * 1024,
                            "other_cores": round(max(0.0, other), 2), "cached_before": cached} | seen
