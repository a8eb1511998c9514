#!/usr/bin/env python3
"""One client of object storage: load a checkpoint from s3:// as its users do, and say how long it took.

  s3_clients.py CLIENT CKPT [options]     CKPT: the checkpoint on disk, S3_URI: where it is served, AWS_*: by whom

The protocol of peers.py: imports, prints "ready", waits for a line on standard input, loads, prints one JSON line. The clock
has the listing in it. Every byte ends in private memory that is held at the end, but for `curl`, which throws them away.
"""
import argparse
import http.client
import json
import mmap
import os
import queue
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from urllib.parse import quote, urlsplit

from harness import busy_seconds, checkpoint_files, cpu_seconds

MIB = 1 << 20
BUCKET, _, PREFIX = os.environ["S3_URI"].removeprefix("s3://").partition("/")
ENDPOINT = urlsplit(os.environ["AWS_ENDPOINT_URL"])


def listed():
    """(key, bytes) of every weight file. The server asks for no signature."""
    c = http.client.HTTPConnection(ENDPOINT.hostname, ENDPOINT.port)
    c.request("GET", f"/{BUCKET}?list-type=2&prefix={quote(PREFIX, safe='')}%2F")
    found = re.findall(r"<Key>([^<]*)</Key>.*?<Size>(\d+)</Size>", c.getresponse().read().decode(), re.DOTALL)
    return [(key, int(size)) for key, size in found if key.endswith(".safetensors")]


def region(size):
    m = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    m.madvise(mmap.MADV_HUGEPAGE)
    return m


class Files:
    """Whole files in memory. No tensors are made of them, which costs little: they would be views."""

    def __init__(self):
        self.held = {}

    def bytes(self):
        return sum(len(m) for m in self.held.values())

    def verify(self, paths):
        crcs = {os.path.basename(key): zlib.crc32(m) for key, m in self.held.items()}
        for path in paths:
            with open(path, "rb") as f:
                if crcs.get(os.path.basename(path)) != zlib.crc32(f.read()):
                    return f"{path} differs"
        return "ok"


# ---- the clients: each imports and sets up, then returns what it fills and the function that loads ----------------------

def runai(a):
    """Run:ai Model Streamer: tensors as it hands them over; of two processes each streams all and keeps its slices."""
    if a.concurrency:
        os.environ["RUNAI_STREAMER_CONCURRENCY"] = str(a.concurrency)
    import peers
    from runai_model_streamer import SafetensorsStreamer, list_safetensors
    params, owned = peers.Params(), peers.WORLD == 1

    def load():
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(sorted(list_safetensors(os.environ["S3_URI"])), device="cpu", owned=owned)
            for name, tensor in streamer.get_tensors():
                params.keep(name, tensor, owned)
    return params, load


def crt(a):
    """The client that boto3[crt] uses, straight: a file per request, which it splits; pieces copied to their place."""
    from awscrt import auth, http as crt_http, io, s3
    import numpy as np
    group = io.EventLoopGroup(os.cpu_count())
    bootstrap = io.ClientBootstrap(group, io.DefaultHostResolver(group))
    credentials = auth.AwsCredentialsProvider.new_static(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    signing = s3.create_default_s3_signing_config(region=os.environ["AWS_REGION"], credential_provider=credentials)
    client = s3.S3Client(bootstrap=bootstrap, region=os.environ["AWS_REGION"], part_size=a.part_mib * MIB, signing_config=signing,
                         throughput_target_gbps=a.gbps, tls_mode=s3.S3RequestTlsMode.DISABLED)
    files = Files()

    def load():
        running = []
        for key, size in listed():
            files.held[key] = m = region(size)

            def body(chunk, offset, target=np.frombuffer(m, dtype=np.uint8), **_):
                target[offset:offset + len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)
            request = crt_http.HttpRequest("GET", f"/{BUCKET}/{key}", crt_http.HttpHeaders([("Host", ENDPOINT.netloc)]))
            running.append(client.make_request(type=s3.S3RequestType.GET_OBJECT, request=request, on_body=body))
        for request in running:
            request.finished_future.result()
    return files, load


def connector(a):
    """s3torchconnector: a reader per file, as its checkpoint reader has it; files side by side in threads."""
    from s3torchconnector import S3ClientConfig, S3ReaderConstructor
    from s3torchconnector._s3client import S3Client
    config = S3ClientConfig(throughput_target_gbps=a.gbps, part_size=a.part_mib * MIB, force_path_style=True)
    client = S3Client(os.environ["AWS_REGION"], endpoint=os.environ["AWS_ENDPOINT_URL"], s3client_config=config)
    files = Files()

    def one(key, size):
        files.held[key] = m = region(size)
        reader = client.get_object(BUCKET, key, reader_constructor=S3ReaderConstructor.sequential())
        view, at = memoryview(m), 0
        while at < size:
            got = reader.readinto(view[at:at + 8 * MIB])
            if not got:
                raise OSError("short read")
            at += got

    def load():
        together([lambda k=k, n=n: one(k, n) for k, n in listed()])
    return files, load


def program(a):
    """A whole `longshore load` on one rank: two of them know nothing of each other, as two servers would not."""
    class Loaded:
        def bytes(self):
            return sum(rank["parameter_bytes"] for rank in self.report["ranks"])

        def verify(self, _):
            return "ok"
    loaded = Loaded()

    def load():
        command = [a.bin, "load", os.environ["S3_URI"], "--tp", "1", "--json", "--no-digest", "--device", "cpu", "--log-level", "error"]
        loaded.report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return loaded, load


def sockets(a):
    """No client: ranges by several threads with a plain socket each, received where they belong, in fresh huge pages."""
    files = Files()

    def worker(left):
        with_socket = http.client.HTTPConnection(ENDPOINT.hostname, ENDPOINT.port)
        with_socket.connect()
        s = with_socket.sock
        while True:
            try:
                key, start, length = left.get_nowait()
            except queue.Empty:
                return
            s.sendall(f"GET /{BUCKET}/{key} HTTP/1.1\r\nHost: {ENDPOINT.netloc}\r\nRange: bytes={start}-{start + length - 1}\r\n\r\n".encode())
            head = b""
            while b"\r\n\r\n" not in head:
                head += s.recv(2048)
            head, _, first = head.partition(b"\r\n\r\n")
            if b" 206 " not in head[:20]:
                raise OSError(head[:80])
            view = memoryview(files.held[key])[start:start + length]
            view[:len(first)], at = first, len(first)
            while at < length:
                got = s.recv_into(view[at:])
                if not got:
                    raise OSError("short body")
                at += got

    def load():
        left = queue.SimpleQueue()
        for key, size in listed():
            files.held[key] = region(size)
            for start in range(0, size, a.part_mib * MIB):
                left.put((key, start, min(a.part_mib * MIB, size - start)))
        together([lambda: worker(left)] * (a.concurrency or 16))
    return files, load


def curl(a):
    """Parallel ranges by curl into nothing: what server and loopback give to one process that keeps no byte."""
    config, total = tempfile.NamedTemporaryFile("w", suffix=".curl"), 0
    for key, size in listed():
        for start in range(0, size, a.part_mib * MIB):
            end = min(start + a.part_mib * MIB, size) - 1
            config.write(f'next\nurl = "{ENDPOINT.geturl()}/{BUCKET}/{key}"\nrange = "{start}-{end}"\noutput = "/dev/null"\nsilent\nfail\n')
        total += size
    config.flush()

    class Nothing:
        file = config

        def bytes(self):
            return total

        def verify(self, _):
            return "ok"

    def load():
        subprocess.run(["curl", "--silent", "--fail", "--parallel", "--parallel-immediate", "--parallel-max", str(a.concurrency or 16),
                        "--config", config.name], check=True, stdout=subprocess.DEVNULL)
    return Nothing(), load


def together(jobs):
    """Runs them side by side; raises what the first of them raises."""
    failed = []

    def run(job):
        try:
            job()
        except Exception as e:
            failed.append(e)
    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failed:
        raise failed[0]


def used_cpu():
    return sum(cpu_seconds(resource.getrusage(who)) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("client", choices=("runai", "crt", "connector", "program", "sockets", "curl"))
    ap.add_argument("ckpt")
    ap.add_argument("--concurrency", type=int, help="requests in flight (default: the client's own, 16 of sockets and curl)")
    ap.add_argument("--part-mib", type=int, default=8, help="bytes per request, where the client is told")
    ap.add_argument("--gbps", type=float, default=10, help="crt, connector: what they are told to aim at")
    ap.add_argument("--bin", help="program: the longshore binary")
    ap.add_argument("--verify", action="store_true", help="compare checksums after the clock has stopped")
    a = ap.parse_args()
    held, load = globals()[a.client](a)

    print("ready", flush=True)
    if not sys.stdin.readline():
        return
    cpu, busy, start = used_cpu(), busy_seconds(), time.monotonic()
    load()
    end, busy, cpu = time.monotonic(), busy_seconds() - busy, used_cpu() - cpu
    usage = resource.getrusage(resource.RUSAGE_SELF)
    line = {"start": start, "end": end, "bytes": held.bytes(), "peak_rss_bytes": usage.ru_maxrss * 1024,
            "disk_bytes": 0, "cpu_s": cpu, "busy_s": busy}
    if a.verify:
        line["verified"] = held.verify(checkpoint_files(a.ckpt))
    print(json.dumps(line), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
