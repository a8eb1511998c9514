#!/usr/bin/env python3
"""Runs longshore and other clients of S3 in turn against one local server and prints tables with ratios and targets.

  s3.py --bin LONGSHORE --server STORAGE_SERVER --out FILE.jsonl [options] CKPT [-- MORE OPTIONS OF longshore load]
  s3.py --show FILE.jsonl              the tables of an earlier run

A ratio is "its seconds / longshore's seconds", taken within each round, then the median over the rounds: above 1 longshore is
faster. The server is another process on the same machine and shares its cores with the client, so that a client that
needs less of them is faster. Called by ../bench_s3.sh.
"""
import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata

import harness
import longshore
import matrix

GB = 1e9
OURS, ALONE = "longshore", "two longshore, each streams everything"
PLAIN, SLOW = "undisturbed", "slow"
CURL = "limit: curl, 16 ranges of 8 MiB, kept nowhere"
FIXED = "limit: 16 sockets, ranges of 8 MiB"
# 50 ms more for every request, and 2 s for one in a hundred
DISTURBANCE = ["--latency-ms", "50", "--slow-share", "0.01", "--slow-ms", "2000"]

# ranks -> (label, command of s3_clients.py or options of longshore, conditions in which it runs)
BOTH = (PLAIN, SLOW)
ROWS = {
    1: [
        (OURS, [], BOTH),
        ("Run:ai, as it comes", ["runai"], BOTH),
        ("Run:ai, 16 at once", ["runai", "--concurrency", "16"], BOTH),
        ("awscrt, the client of boto3[crt]", ["crt"], BOTH),
        ("s3torchconnector", ["connector"], BOTH),
        (FIXED, ["sockets"], BOTH),
        (CURL, ["curl"], BOTH),
    ],
    2: [
        (OURS, ["--ranks", "processes"], (PLAIN,)),
        (ALONE, ["program"], (PLAIN,)),
        ("two Run:ai, each streams everything", ["runai"], (PLAIN,)),
    ],
}

# ranks, factor wanted, what longshore is measured against (the fastest of the rows that match)
TARGETS = [(1, 1.3, "Run:ai"), (1, 0.9, "limit: curl"), (1, 0.9, "limit: .*sockets"), (2, 1.8, "two longshore"), (2, 1.8, "two Run:ai")]
KEPT = 0.8


class Server:
    """The storage server, with its counters and the processor time that it took."""

    def __init__(self, binary, directory, options=()):
        command = [binary, "--dir", directory, "--bucket", "bench", *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.environment = {}
        self.counters()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def counters(self):
        """What came since the last call."""
        print(file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
            name, _, value = line.removeprefix("export ").strip().partition("=")
            self.environment[name] = value
        raise SystemExit("s3.py: the storage server has ended")

    def cpu_seconds(self):
        with open(f"/proc/{self.process.pid}/stat") as f:
            fields = f.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_once(a, ranks, label, command, server, uri, memory):
    with tempfile.TemporaryDirectory() as cache:  # metadata is fetched, by whoever keeps it
        more = server.environment | {"S3_URI": uri, "XDG_CACHE_HOME": cache, "AWS_DEFAULT_REGION": server.environment["AWS_REGION"],
                                     "AWS_EC2_METADATA_DISABLED": "true", "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
                                     "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        server.counters()
        cpu = server.cpu_seconds()
        if label == OURS:
            line = longshore.run(a.bin, a.ckpt, ranks, "warm", memory, [*command, *a.options], a.memory_limit, uri, more)
            if "seconds" in line:  # the listing and the metadata are before the first header; the peers' clock has them too
                line["seconds"] = round(line["seconds"] + line["phases"].get("source", 0.0), 4)
        else:
            command = command + ["--bin", a.bin] * (command == ["program"])
            line = harness.run_peer(a.ckpt, command, ranks, "warm", memory, a.verify, "s3_clients.py", more)
        told = server.counters()
        return line | {"server_cpu_s": round(server.cpu_seconds() - cpu, 3), "sent_bytes": told["sent_bytes"],
                       "requests": told["requests"], "in_flight_max": told["concurrent_max"]}


def run_block(a, ranks, condition, memory, out, served):
    rows = [(label, command) for label, command, conditions in ROWS[ranks]
            if condition in conditions and re.search(a.only, f"{ranks} {condition} {label}") and (a.bin or "longshore" not in label)]
    size = harness.tensor_bytes(a.ckpt)
    with Server(a.server, served, DISTURBANCE if condition == SLOW else []) as server:
        for number in range(a.rounds):
            for label, command in rows:
                line = {"ranks": ranks, "condition": condition, "round": number, "label": label, "bytes": size}
                line |= run_once(a, ranks, label, command, server, "s3://bench/model", memory)
                line["load_average"] = os.getloadavg()[0]
                if "seconds" in line:
                    line["gbps"] = round(size / line["seconds"] / GB, 3)
                out.write(json.dumps(line) + "\n")
                out.flush()
                said = line.get("error") or (f"{line['seconds']:.2f} s, {line['gbps']:.2f} GB/s, client {line['cpu_s']:.2f} s of processor, "
                                             f"sent {line['sent_bytes'] / GB:.2f} GB, others {line['other_cores'] - line['server_cpu_s'] / line['seconds']:.1f} "
                                             f"cores {line.get('verified', '')}")
                print(f"{ranks} {condition} {number} {label}: {said}", file=sys.stderr, flush=True)


def run_all(a):
    with open(a.out, "a") as out, harness.HeldMemory(a.hold_gib, harness.tensor_bytes(a.ckpt)) as memory, \
            tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(a.ckpt))) as served:
        os.mkdir(os.path.join(served, "model"))
        for name in os.listdir(a.ckpt):
            os.link(os.path.join(a.ckpt, name), os.path.join(served, "model", name))
        machine = matrix.machine(a.out) | {"clients": packages(), "longshore": version(a.bin), "date": time.strftime("%Y-%m-%d %H:%M")}
        del machine["peers"]
        out.write(json.dumps({"machine": machine, "options": a.options, "checkpoint": f"{os.path.basename(a.ckpt)}: {matrix.shape_of(a.ckpt)}"}) + "\n")
        for ranks, condition in ((1, PLAIN), (1, SLOW), (2, PLAIN)):
            run_block(a, ranks, condition, memory, out, served)


def packages():
    curl = subprocess.run(["curl", "--version"], capture_output=True, text=True).stdout.split()[1]
    return " ".join(f"{p} {metadata.version(p)}" for p in ("runai-model-streamer", "awscrt", "s3torchconnector")) + f" curl {curl}"


def version(binary):
    def said(*command):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    here = os.path.dirname(os.path.abspath(__file__))
    return f"{said(binary, '--version')} {said('git', '-C', here, 'describe', '--always', '--dirty')}" if binary else "none"


# ---- reporting --------------------------------------------------------------------------------------------------------

class Results:
    def __init__(self, path):
        self.head, self.runs = {}, {}
        for line in map(json.loads, open(path)):
            if "label" not in line:
                self.head = line
            else:
                self.runs.setdefault((line["ranks"], line["condition"], line["label"]), []).append(line)

    def good(self, *key):
        return [r for r in self.runs.get(key, []) if "seconds" in r]

    def median(self, of, *key):
        values = [of(r) for r in self.good(*key)]
        return statistics.median(values) if values else None

    def seconds(self, *key):
        return self.median(lambda r: r["seconds"], *key)

    def ratio(self, ranks, condition, label):
        ours = {r["round"]: r["seconds"] for r in self.good(ranks, condition, OURS)}
        pairs = [r["seconds"] / ours[r["round"]] for r in self.good(ranks, condition, label) if r["round"] in ours]
        return statistics.median(pairs) if pairs else None

    def kept(self, label):
        """The share of its undisturbed rate that is left when requests are slow."""
        plain, slow = self.seconds(1, PLAIN, label), self.seconds(1, SLOW, label)
        return plain / slow if plain and slow else None

    def fastest(self, ranks, pattern):
        labels = [label for (r, c, label) in self.runs if (r, c) == (ranks, PLAIN) and re.match(pattern, label) and self.good(r, c, label)]
        return min(labels, key=lambda label: self.seconds(ranks, PLAIN, label), default=None)


def table(results, ranks, condition):
    labels = list(dict.fromkeys(label for (r, c, label) in results.runs if (r, c) == (ranks, condition)))
    if not labels:
        return
    what = {PLAIN: "", SLOW: ", 50 ms more for each request, 2 s for one in a hundred"}[condition]
    print(f"\n### {ranks} rank{'s' * (ranks > 1)}{what}\n")
    kept = ["rate kept"] * (condition == SLOW)
    head = ["client", "s", "GB/s", "ratio", *kept, "client CPU s/GB", "server CPU s/GB", "fetched, GB", "requests", "most at once"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for label in labels:
        key, cell = (ranks, condition, label), matrix.cell
        cells = [label, cell(results.seconds(*key)), cell(results.median(lambda r: r["gbps"], *key)), cell(results.ratio(*key))]
        cells += [cell(results.kept(label))] * (condition == SLOW)
        cells += [cell(results.median(lambda r: r["cpu_s"] / r["bytes"] * GB, *key)),
                  cell(results.median(lambda r: r["server_cpu_s"] / r["bytes"] * GB, *key)),
                  cell(results.median(lambda r: r["sent_bytes"] / GB, *key)), cell(results.median(lambda r: r["requests"], *key), "{:.0f}"),
                  cell(results.median(lambda r: r["in_flight_max"], *key), "{:.0f}")]
        print("| " + " | ".join(cells) + " |")
    block = [r for k, rs in results.runs.items() if k[:2] == (ranks, condition) for r in rs]
    others = [max(0.0, r["other_cores"] - r["server_cpu_s"] / r["seconds"]) for r in block if "seconds" in r]
    if others:
        print(f"\n- rounds: {1 + max(r['round'] for r in block)}; other work on the machine, the server's apart: "
              f"{statistics.median(others):.2f} cores in the median, {max(others):.2f} at most")
    for r in block:
        if r.get("verified", "ok") != "ok":
            print(f"- WRONG BYTES: {r['label']}: {r['verified']}")
        if "error" in r:
            print(f"- FAILED: {r['label']}, round {r['round']}: {r['error'][-300:]!r}")


def targets(results):
    print("\n### Targets\n\n| what | against | wanted | measured | |\n|---|---|---|---|---|")

    def row(what, against, wanted, measured, met):
        verdict = "not measured" if measured is None else "pass" if met(measured) else "MISS"
        print(f"| {what} | {against} | {wanted} | {matrix.cell(measured)} | {verdict} |")
    for ranks, factor, pattern in TARGETS:
        label = results.fastest(ranks, pattern)
        ratio = results.ratio(ranks, PLAIN, label) if label else None
        row(f"{ranks} rank{'s' * (ranks > 1)}", label or pattern, f">= {factor:.3g}x", ratio, lambda r: r >= factor)
    ours, alone = (results.median(lambda r: r["sent_bytes"], 2, PLAIN, label) for label in (OURS, ALONE))
    row("2 ranks, bytes fetched", ALONE, "<= 0.505x", ours / alone if ours and alone else None, lambda r: r <= 0.505)
    row("slow requests, rate kept", OURS, f">= {KEPT}x", results.kept(OURS), lambda r: r >= KEPT)
    row("slow requests, rate kept by a fixed client", FIXED, f"< {KEPT}x", results.kept(FIXED), lambda r: r < KEPT)


def report(path):
    results = Results(path)
    print("## Machine\n")
    for what, value in results.head["machine"].items():
        print(f"- {what}: {value}")
    print(f"- checkpoint: {results.head['checkpoint']}, served from the page cache over loopback by a process beside the client")
    print("\nMedians; ratio = its seconds / longshore's, per round: above 1 longshore is faster. The listing is in everyone's clock.")
    for ranks, condition in ((1, PLAIN), (1, SLOW), (2, PLAIN)):
        table(results, ranks, condition)
    targets(results)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("ckpt", nargs="?")
    ap.add_argument("options", nargs="*", help="after --: more options of `longshore load`")
    ap.add_argument("--show", metavar="FILE")
    ap.add_argument("--bin", help="the longshore binary; the others alone without it")
    ap.add_argument("--server", help="the storage-server binary")
    ap.add_argument("--out", default=f"results-s3-{time.strftime('%Y%m%d-%H%M%S')}.jsonl")
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--only", default="", help="regular expression on 'RANKS CONDITION CLIENT'")
    ap.add_argument("--verify", action="store_true", help="check the bytes of clients that keep them (slower between the runs)")
    ap.add_argument("--hold-gib", type=float, help="most memory to keep faulted in between the runs (default four checkpoints; 0: none)")
    ap.add_argument("--memory-limit", help="of longshore, for example 512MiB")
    a = ap.parse_args()
    if not a.show:
        a.ckpt = os.path.abspath(a.ckpt)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))  # a client may open many connections
        run_all(a)
    report(a.show or a.out)


if __name__ == "__main__":
    main()
