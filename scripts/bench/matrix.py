#!/usr/bin/env python3
"""Runs longshore and its peers in turn (A B C A B C ...) and prints tables with ratios and the targets met or missed.

  matrix.py --bin LONGSHORE --out FILE.jsonl [options] CKPT_DEEPSEEK CKPT_LLAMA [-- MORE OPTIONS OF longshore load]
  matrix.py --show FILE.jsonl          the tables of an earlier run

A ratio is "its seconds / longshore's seconds", taken within each round, then the median over the rounds: above 1 longshore
is faster. Two ranks of longshore run twice, as threads and as processes, and everything has a ratio to each. Called by
../bench_local.sh.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from importlib import metadata

import harness
import longshore

GB = 1e9
OURS, PROCESSES = "longshore", "longshore, processes"
LIMIT_8 = ["limit", "--block-mib", "8", "--threads"]
LIMIT_2 = ["limit", "--direct", "--block-mib", "2", "--threads"]

# ranks -> (label, command of peers.py or options of longshore, states in which it runs)
BOTH, COLD = ("warm", "cold"), ("cold",)
ROWS = {
    1: [
        (OURS, [], BOTH),
        ("safetensors, safe_open, each tensor cloned", ["safetensors"], BOTH),
        ("Run:ai, as it comes", ["runai"], BOTH),
        ("Run:ai, sync_buffered", ["runai", "--strategy", "sync_buffered"], BOTH),
        ("fastsafetensors, parallel loader", ["fastsafetensors"], BOTH),
        ("limit: 4 x 8 MiB, buffered", [*LIMIT_8, "4"], BOTH),
        ("limit: 4 x 8 MiB, direct", [*LIMIT_8, "4", "--direct"], COLD),
        ("limit: 16 x 2 MiB, direct", [*LIMIT_2, "16"], COLD),
    ],
    2: [
        (OURS, [], BOTH),
        (PROCESSES, ["--ranks", "processes"], BOTH),
        ("safetensors, memory-mapped, narrow and clone", ["safetensors"], BOTH),
        ("Run:ai, each rank reads all", ["runai"], BOTH),
        ("Run:ai, each rank reads all, sync_buffered", ["runai", "--strategy", "sync_buffered"], BOTH),
        ("Run:ai, distributed", ["runai", "--distributed"], BOTH),
        ("fastsafetensors, broadcast", ["fastsafetensors"], BOTH),
        ("limit: 2 processes, half each, 2 x 8 MiB, buffered", [*LIMIT_8, "2"], BOTH),
        ("limit: 2 processes, half each, 8 x 2 MiB, direct", [*LIMIT_2, "8"], COLD),
    ],
}

# checkpoint, ranks, state, factor wanted, what it is measured against (the fastest of the rows that match)
AIMS = [
    ("deepseek", 1, "warm", 3.0, "safetensors"),
    ("deepseek", 1, "warm", 2.0, "Run:ai, as it comes"),
    ("deepseek", 1, "warm", 1.3, "Run:ai, sync_buffered"),
    ("deepseek", 1, "warm", 0.9, "limit:"),
    ("deepseek", 1, "cold", 0.95, "limit: .*direct"),
    ("deepseek", 1, "cold", 1.0, "Run:ai"),
    ("deepseek", 2, "warm", 1.6, "safetensors"),
    ("deepseek", 2, "warm", 3.3, "Run:ai"),
    ("deepseek", 2, "warm", 7.0, "fastsafetensors"),
    ("deepseek", 2, "warm", 0.9, "limit:"),
    ("deepseek", 2, "cold", 1.4, "safetensors"),
    ("deepseek", 2, "cold", 1.7, "Run:ai"),
    ("deepseek", 2, "cold", 0.9, "limit:"),
] + [
    ("llama", ranks, state, factor, who)
    for ranks in (1, 2) for state in BOTH
    for factor, who in ((0.95, "limit:"), (1.0, "safetensors"), (1.0, "Run:ai"), (1.0, "fastsafetensors"))
]
# whose time, and the same; rank processes within 10 % of what is asked of threads
TARGETS = [(OURS, *aim) for aim in AIMS] + [
    (PROCESSES, ckpt, ranks, state, 0.9 * factor, who) for ckpt, ranks, state, factor, who in AIMS if ranks == 2
]
RSS_ALLOWANCE_MIB = 128


# ---- running ----------------------------------------------------------------------------------------------------------

def run_once(a, ckpt, ranks, state, label, command, memory):
    if label.startswith(OURS):
        return longshore.run(a.bin, ckpt, ranks, state, memory, [*command, *a.options], a.memory_limit)
    return harness.run_peer(ckpt, command, ranks, state, memory, a.verify)


def run_quietly(a, *job):
    """Again, up to three times, while other work disturbs; the least disturbed counts."""
    tries = []
    for _ in range(3 if a.max_other is not None else 1):
        tries.append(run_once(a, *job))
        if "error" in tries[-1] or a.max_other is None or tries[-1]["other_cores"] <= a.max_other:
            break
    return min(tries, key=lambda t: t.get("other_cores", -1))


def run_block(a, name, ckpt, ranks, state, memory, out):
    rows = [(label, command) for label, command, states in ROWS[ranks]
            if state in states and re.search(a.only, f"{name} {ranks} {state} {label}")
            and (a.bin or not label.startswith(OURS))]
    size = harness.tensor_bytes(ckpt)
    if rows and a.rounds > 1:  # the first run after a change of checkpoint meets memory and cache in disorder
        run_once(a, ckpt, ranks, state, *next(r[:2] for r in ROWS[ranks] if r[0].startswith("limit")), memory)
    for number in range(a.rounds):
        for label, command in rows:
            line = {"ckpt": name, "ranks": ranks, "state": state, "round": number, "label": label, "bytes": size}
            line |= run_quietly(a, ckpt, ranks, state, label, command, memory)
            if "seconds" in line:
                line["gbps"] = round(size / line["seconds"] / GB, 3)
            out.write(json.dumps(line) + "\n")
            out.flush()
            said = line.get("error") or (f"{line['seconds']:.2f} s, {line['gbps']:.2f} GB/s, disk {line['disk_bytes'] / GB:.2f} GB, "
                                         f"others {line['other_cores']:.1f} cores {line.get('verified', '')}")
            print(f"{name} {ranks} {state} {number} {label}: {said}", file=sys.stderr, flush=True)


def run_all(a, ckpts):
    size = max(harness.tensor_bytes(c) for c in ckpts.values())
    with open(a.out, "a") as out, harness.HeldMemory(a.hold_gib, size) as memory:
        out.write(json.dumps({"machine": machine(a.out), "options": a.options, "verify": a.verify,
                              "checkpoints": {n: shape_of(c) for n, c in ckpts.items()}}) + "\n")
        for name, ckpt in ckpts.items():
            for other in ckpts.values():
                harness.drop_from_cache(harness.checkpoint_files(other))
            for ranks in ROWS:
                for state in BOTH:
                    run_block(a, name, ckpt, ranks, state, memory, out)


def shape_of(ckpt):
    with open(os.path.join(ckpt, "model.safetensors.index.json")) as f:
        index = json.load(f)
    tensors, files = len(index["weight_map"]), len(set(index["weight_map"].values()))
    return f"{index['metadata']['total_size'] / GB:.2f} GB, {tensors} tensors in {files} files"


def machine(path):
    def first(file, key):
        return next((line.split(":", 1)[1].strip() for line in open(file) if line.startswith(key)), "?")

    def mount(what):
        return subprocess.run(["findmnt", "-no", what, "-T", os.path.abspath(path)], capture_output=True, text=True).stdout.strip()
    packages = " ".join(f"{p} {metadata.version(p)}" for p in
                        ("torch", "safetensors", "runai-model-streamer", "fastsafetensors"))
    return {"processor": f"{os.cpu_count()} x {first('/proc/cpuinfo', 'model name')}",
            "memory": f"{int(first('/proc/meminfo', 'MemTotal').split()[0]) / 2**20:.1f} GiB",
            "kernel": os.uname().release, "storage": f"{mount('FSTYPE')} on {mount('SOURCE')}",
            "huge pages": open("/sys/kernel/mm/transparent_hugepage/enabled").read().strip(),
            "python": sys.version.split()[0], "peers": packages}


# ---- reporting --------------------------------------------------------------------------------------------------------

class Results:
    def __init__(self, path):
        self.head, self.runs = {}, {}
        for line in map(json.loads, open(path)):
            if "label" not in line:
                self.head = line
            else:
                key = line["ckpt"], line["ranks"], line["state"], line["label"]
                self.runs.setdefault(key, []).append(line)

    def good(self, *key):
        return [r for r in self.runs.get(key, []) if "seconds" in r]

    def median(self, field, *key):
        values = [r[field] for r in self.good(*key)]
        return statistics.median(values) if values else None

    def ratio(self, *key, to=OURS):
        """Its seconds / those of `to`, round by round."""
        ours = {r["round"]: r["seconds"] for r in self.good(*key[:3], to)}
        pairs = [r["seconds"] / ours[r["round"]] for r in self.good(*key) if r["round"] in ours]
        return statistics.median(pairs) if pairs else None

    def fastest(self, ckpt, ranks, state, pattern):
        keys = [k for k in self.runs if k[:3] == (ckpt, ranks, state) and re.match(pattern, k[3]) and self.good(*k)]
        return min(keys, key=lambda k: self.median("seconds", *k), default=None)


def cell(value, form="{:.2f}"):
    return "–" if value is None else form.format(value)


def table(results, ckpt, ranks):
    labels = list(dict.fromkeys(k[3] for k in results.runs if k[:2] == (ckpt, ranks)))
    if not labels:
        return
    print(f"\n### {ckpt} ({results.head['checkpoints'][ckpt]}), {ranks} rank{'s' * (ranks > 1)}\n")
    ours = [label for label in labels if label.startswith(OURS)]
    ratios = ["ratio"] if ours == [OURS] else [f"ratio to {'processes' if to == PROCESSES else 'threads'}" for to in ours]
    head = ["loader", *(h for s in BOTH for h in (f"{s} s", f"{s} GB/s", *ratios)), "read from disk when cold, GB",
            "peak memory of a rank, GB"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for label in labels:
        cells = [label]
        for state in BOTH:
            key = ckpt, ranks, state, label
            cells += [cell(results.median("seconds", *key)), cell(results.median("gbps", *key))]
            cells += [cell(results.ratio(*key, to=to)) for to in ours]
        disk = results.median("disk_bytes", ckpt, ranks, "cold", label)
        peaks = [max(r["rank_peak_rss_bytes"]) for s in BOTH for r in results.good(ckpt, ranks, s, label)]
        print("| " + " | ".join(cells + [cell(disk and disk / GB), cell(max(peaks) / GB if peaks else None)]) + " |")
    print()
    for label, state in ((label, state) for label in ours for state in BOTH):
        runs = results.good(ckpt, ranks, state, label)
        if runs:
            phases = {p: statistics.median(r["phases"].get(p, 0) for r in runs) for p in runs[0]["phases"]}
            passed = f", ranks passed {(runs[0]['exchanged_bytes'] or 0) / GB:.2f} GB to each other" if ranks > 1 else ""
            print(f"- {label} {state}: {results.median('seconds', ckpt, ranks, state, label):.2f} s, whole command "
                  f"{results.median('wall_s', ckpt, ranks, state, label):.2f} s; asked storage for "
                  f"{runs[0]['asked_bytes'] / GB:.2f} GB{passed}; "
                  + ", ".join(f"{p} {s:.2f} s" for p, s in phases.items()) + memory_of_processes(runs))
    block = [r for k, rs in results.runs.items() if k[:2] == (ckpt, ranks) for r in rs]
    noise = [r["other_cores"] for r in block if "other_cores" in r]
    unverified = [r for r in block if r.get("verified", "ok") != "ok"]
    if noise:
        print(f"- rounds: {1 + max(r['round'] for r in block)}; other work on the machine: "
              f"{statistics.median(noise):.2f} cores in the median, {max(noise):.2f} at most")
    for r in block:
        if r["state"] == "cold" and r.get("disk_bytes", r["bytes"]) < 0.9 * r["bytes"]:
            print(f"- NOT COLD: {r['label']}, round {r['round']}: {r['disk_bytes'] / GB:.2f} GB came from disk; "
                  "another program read the checkpoint, or the file system does not count")
    for r in unverified:
        print(f"- WRONG BYTES: {r['label']} {r['state']}: {r['verified']}")
    for r in block:
        if "error" in r:
            print(f"- FAILED: {r['label']}, {r['state']}, round {r['round']}: {r['error'][-300:]!r}")


def memory_of_processes(runs):
    if "rank_resident_bytes" not in runs[0]:
        return ""
    rank = max(max(r["rank_resident_bytes"]) for r in runs)
    launcher = max(r["launcher_peak_rss_bytes"] for r in runs)
    return f"; a rank held {rank / GB:.2f} GB, shared memory counted once, the launcher {launcher / GB:.3f} GB"


def targets(results):
    print("\n### Targets\n\n| checkpoint | ranks | state | of | against | wanted | measured | |\n|---|---|---|---|---|---|---|---|")
    for ours, ckpt, ranks, state, factor, pattern in TARGETS:
        key = results.fastest(ckpt, ranks, state, pattern)
        ratio = results.ratio(*key, to=ours) if key else None
        verdict = "not measured" if ratio is None else "pass" if ratio >= factor else "MISS"
        print(f"| {ckpt} | {ranks} | {state} | {ours} | {key[3] if key else pattern} | {factor:.3g}x | {cell(ratio)} | {verdict} |")
    for ckpt in ("deepseek", "llama"):
        for ranks in ROWS:
            for label in dict.fromkeys(k[3] for k in results.runs if k[:2] == (ckpt, ranks) and k[3].startswith(OURS)):
                over = [r["rss_over_parameters_and_limit_mib"] for s in BOTH for r in results.good(ckpt, ranks, s, label)]
                if over:
                    print(f"| {ckpt} | {ranks} | both | {label} | peak memory over parameters + staging limit | "
                          f"<= {RSS_ALLOWANCE_MIB} MiB | {max(over):.0f} MiB | {'pass' if max(over) <= RSS_ALLOWANCE_MIB else 'MISS'} |")


def report(path):
    results = Results(path)
    print("## Machine\n")
    for what, value in results.head["machine"].items():
        print(f"- {what}: {value}")
    print("\nEvery tensor ends in memory that the loader's user owns. Medians; ratio = its seconds / longshore's, per round:")
    print("above 1 longshore is faster. With threads as ranks, a rank's memory is its part of the one process. The peak memory")
    print("of a rank process is the kernel's figure, what it maps of other ranks' shared memory included; the target counts")
    print("each shared page for one rank.")
    for ckpt in results.head["checkpoints"]:
        for ranks in ROWS:
            table(results, ckpt, ranks)
    targets(results)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("deepseek", nargs="?")
    ap.add_argument("llama", nargs="?")
    ap.add_argument("options", nargs="*", help="after --: more options of `longshore load`")
    ap.add_argument("--show", metavar="FILE")
    ap.add_argument("--bin", help="the longshore binary; peers alone without it")
    ap.add_argument("--out", default=f"results-{time.strftime('%Y%m%d-%H%M%S')}.jsonl")
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--only", default="", help="regular expression on 'CKPT RANKS STATE LABEL'")
    ap.add_argument("--verify", action="store_true", help="check the peers' bytes too (slower between the runs)")
    ap.add_argument("--max-other", type=float, help="repeat a run during which other work kept more cores busy than this")
    ap.add_argument("--hold-gib", type=float, help="most memory to keep faulted in between the runs (default four checkpoints; 0: none)")
    ap.add_argument("--memory-limit", help="of longshore, for example 512MiB")
    a = ap.parse_args()
    if not a.show:
        run_all(a, {"deepseek": a.deepseek, "llama": a.llama})
    report(a.show or a.out)


if __name__ == "__main__":
    main()
