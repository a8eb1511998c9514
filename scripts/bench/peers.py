#!/usr/bin/env python3
"""One rank of one peer: load a checkpoint as that peer's users do, and say how long it took.

  peers.py PEER CKPT [options]     RANK and WORLD_SIZE from the environment, as under torchrun

Started by harness.py. Imports, prints "ready", waits for a line on standard input, loads, prints one JSON line. With one
rank the result is every tensor whole; with more it is the rank's tensor-parallel slices, cut as vLLM and SGLang cut
them. Either way each tensor ends in private memory and all are held at the end.
"""
import argparse
import json
import mmap
import os
import re
import resource
import sys
import threading
import time
import zlib
from collections import deque

from harness import busy_seconds, checkpoint_files, cpu_seconds

MIB = 1 << 20
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

COLUMN = re.compile(r"(q_proj|k_proj|v_proj|gate_proj|up_proj|q_b_proj|kv_b_proj|embed_tokens|lm_head)\.weight(_scale_inv)?$")
ROW = re.compile(r"(o_proj|down_proj)\.weight(_scale_inv)?$")


def shard(name, shape):
    """(dimension, start, length) of this rank's part, or None where the tensor is replicated."""
    dim = 0 if COLUMN.search(name) else 1 if ROW.search(name) else None
    if WORLD == 1 or dim is None or len(shape) < 2 or shape[dim] % WORLD:
        return None
    return dim, RANK * (shape[dim] // WORLD), shape[dim] // WORLD


class Params:
    """What the loader's user holds."""

    def __init__(self):
        import torch
        torch.set_num_threads(1)
        self.torch, self.held = torch, {}

    def keep(self, name, tensor, owned):
        """`owned`: the peer hands the memory over; everything else, and every slice, is copied out."""
        part = shard(name, tensor.shape)
        if part:
            tensor = tensor.narrow(*part)
        if part or not owned:
            tensor = tensor.clone(memory_format=self.torch.contiguous_format)
        self.held[name] = tensor

    def bytes(self):
        return sum(t.nbytes for t in self.held.values())

    def verify(self, files):
        """Checksums of what is held against those of the same slices cut from the files."""
        want = dict(expected_crcs(files))
        have = {n: zlib.crc32(t.reshape(-1).view(self.torch.uint8).numpy()) for n, t in self.held.items()}
        bad = [n for n in want.keys() | have.keys() if want.get(n) != have.get(n)]
        return f"{len(bad)} of {len(want)} tensors differ, {sorted(bad)[:3]}" if bad else "ok"


def expected_crcs(files):
    import numpy as np
    for path in files:
        data = np.memmap(path, dtype=np.uint8, mode="r")
        base = 8 + int.from_bytes(data[:8].tobytes(), "little")
        for name, entry in json.loads(data[8:base].tobytes()).items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            tensor, part = data[base + start:base + end], shard(name, entry["shape"])
            if part:
                dim, first, length = part
                rows = tensor.reshape(*entry["shape"][:2], -1)
                tensor = rows[first:first + length] if dim == 0 else rows[:, first:first + length]
            yield name, zlib.crc32(np.ascontiguousarray(tensor))


# ---- the peers: each imports and sets up, then returns the function that loads ----------------------------------------

def safetensors(a, files, params):
    """Memory-mapped, tensor by tensor: the default of transformers, vLLM and SGLang."""
    from safetensors import safe_open

    def load():
        for path in files:
            with safe_open(path, framework="pt", device="cpu") as f:
                for name in f.keys():
                    params.keep(name, f.get_tensor(name), owned=False)
    return load


def runai(a, files, params):
    """Run:ai Model Streamer. One rank keeps what it is given; several slice what streams by."""
    os.environ["RUNAI_STREAMER_DIST"] = "1" if a.distributed else "0"
    if a.strategy:
        os.environ["RUNAI_STREAMER_FS_STRATEGY"] = a.strategy
    from runai_model_streamer import SafetensorsStreamer
    owned = WORLD == 1
    if WORLD > 1:
        join_group()

    def load():
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(files, device="cpu", is_distributed=a.distributed, owned=owned)
            for name, tensor in streamer.get_tensors():
                params.keep(name, tensor, owned)
    return load


def fastsafetensors(a, files, params):
    """fastsafetensors without GPUDirect, by the loader that vLLM uses: files dealt to the ranks, every tensor broadcast."""
    from fastsafetensors import ParallelLoader
    group = join_group() if WORLD > 1 else None
    options = {} if WORLD == 1 else {"accumulate_resident": False}

    def load():
        loader = ParallelLoader(group, files, use_tqdm_on_load=False, device="cpu", nogds=True, max_threads=16, **options)
        for name, tensor in loader.iterate_weights():
            params.keep(name, tensor, owned=WORLD == 1)
        loader.close()
    return load


def join_group():
    import torch.distributed as dist
    dist.init_process_group("gloo")
    return dist.group.WORLD


class Limit:
    """No loader: positioned reads of this rank's share of the bytes by several threads into fresh huge pages.

    Headers are read as bytes and not looked at. That is what the storage and the memory allow, whatever the format.
    """

    def __init__(self, a, files):
        self.block, self.threads, self.region = a.block_mib * MIB, a.threads, None
        self.opened = [os.open(f, os.O_RDONLY | (os.O_DIRECT if a.direct else 0)) for f in files]
        self.chunks, at = [], 0
        for fd, path in zip(self.opened, files):
            size = os.path.getsize(path)
            blocks = -(-size // self.block)
            for i in range(blocks * RANK // WORLD, blocks * (RANK + 1) // WORLD):
                length = min(self.block, size - i * self.block)
                self.chunks.append((fd, i * self.block, at, length))
                at += -(-length // 4096) * 4096
        self.size = at

    def load(self):
        self.region = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.region.madvise(mmap.MADV_HUGEPAGE)
        view, left = memoryview(self.region), deque(self.chunks)

        def work():
            while True:
                try:
                    fd, offset, at, length = left.popleft()
                except IndexError:
                    return
                done, room = 0, -(-length // 4096) * 4096
                while done < length:
                    got = os.preadv(fd, [view[at + done:at + room]], offset + done)
                    if got <= 0:
                        raise OSError("short read")
                    done += got
        threads = [threading.Thread(target=work) for _ in range(self.threads)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()

    def bytes(self):
        return sum(length for *_, length in self.chunks)

    def verify(self, files):
        fds, view = dict(zip(self.opened, files)), memoryview(self.region)
        for fd, offset, at, length in self.chunks:
            with open(fds[fd], "rb") as f:
                f.seek(offset)
                if zlib.crc32(f.read(length)) != zlib.crc32(view[at:at + length]):
                    return f"{fds[fd]} differs in the {length} bytes at {offset}"
        return "ok"


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("peer", choices=("safetensors", "runai", "fastsafetensors", "limit"))
    ap.add_argument("ckpt")
    ap.add_argument("--strategy", help="runai: how it reads files")
    ap.add_argument("--distributed", action="store_true", help="runai: each rank reads a part and broadcasts it")
    ap.add_argument("--threads", type=int, default=4, help="limit: per rank")
    ap.add_argument("--block-mib", type=int, default=8, help="limit: bytes per read")
    ap.add_argument("--direct", action="store_true", help="limit: past the page cache")
    ap.add_argument("--verify", action="store_true", help="compare checksums after the clock has stopped")
    a = ap.parse_args()

    files = checkpoint_files(a.ckpt)
    if a.peer == "limit":
        result = Limit(a, files)
        load = result.load
    else:
        result = Params()
        load = globals()[a.peer](a, files, result)

    print("ready", flush=True)
    if not sys.stdin.readline():
        return
    before, busy, start = resource.getrusage(resource.RUSAGE_SELF), busy_seconds(), time.monotonic()
    load()
    end, busy, after = time.monotonic(), busy_seconds() - busy, resource.getrusage(resource.RUSAGE_SELF)
    line = {"start": start, "end": end, "bytes": result.bytes(), "peak_rss_bytes": after.ru_maxrss * 1024,
            "disk_bytes": (after.ru_inblock - before.ru_inblock) * 512,
            "cpu_s": cpu_seconds(after) - cpu_seconds(before), "busy_s": busy}
    if a.verify:
        line["verified"] = result.verify(files)
    print(json.dumps(line), flush=True)
    sys.stdin.readline()  # the others of a group may still need this rank


if __name__ == "__main__":
    main()
