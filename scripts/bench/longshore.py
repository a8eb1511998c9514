#!/usr/bin/env python3
"""Runs `longshore load` under the same conditions as the peers and prints the same JSON line.

  longshore.py CKPT --bin PATH [--tp N] [--state warm|cold] [--memory-limit BYTES] [--hold-gib G] [-- MORE OPTIONS]

"seconds" is the load's own figure, from the first header to the last rank ready; wall_s is the whole command, its start and
end included. With `-- --ranks processes` the first includes that the ranks find each other, and the second that all of
them start and end. Peak memory is checked against parameters + staging limit + 128 MiB: of the one process that
holds all ranks, or of each rank process, a shared page counted for the rank that made it (harness.RankMemory).
"""
import argparse
import json
import re
import sys

import harness

MIB = 1 << 20
STAGING_DEFAULT = 512 * MIB


def byte_count(text):
    number, unit = re.fullmatch(r"(\d+)\s*([KMG]i?B|B?)", text.strip()).groups()
    return int(number) * ((1024 if "i" in unit else 1000) ** " KMG".index((unit or " ").strip("B")[:1] or " "))


def run(binary, ckpt, tp, state, memory, options=(), memory_limit=None, uri=None, more=None):
    """One run; from `uri`, where the checkpoint is served from elsewhere, with `more` in the environment."""
    command = [binary, "load", uri or ckpt, "--tp", str(tp), "--json", "--no-digest", "--device", "cpu", *options]
    if memory_limit:
        command += ["--memory-limit", memory_limit]
    processes = "processes" in options or "--ranks=processes" in options
    text, measures = harness.run_program(command, harness.checkpoint_files(ckpt), state, memory, tp if processes else 0, more)
    if text is None:
        return measures
    try:
        load, seen = json.loads(text), measures.pop("ranks_seen", None)
        if processes != (load.get("ranks_as") == "processes"):
            return {"error": f"ranks were {load.get('ranks_as')}, not what was asked for"}
        return measures | figures(load, measures, seen, byte_count(memory_limit) if memory_limit else STAGING_DEFAULT)
    except (ValueError, KeyError) as e:
        return {"error": f"not the JSON expected: {e!r}: {text[:200]}"}


def figures(load, measures, seen, limit):
    ranks, more = load["ranks"], {}
    parameters = [r["parameter_bytes"] for r in ranks]
    peaks = [r.get("peak_rss_bytes") or 0 for r in ranks]
    if seen is None:  # one process holds all
        peak = max(measures["process_peak_rss_bytes"], *peaks)
        excess = peak - sum(parameters) - len(ranks) * limit
        peaks = [peak // len(ranks)] * len(ranks)
    else:
        peaks = [max(peak, s["peak_rss_bytes"]) for peak, s in zip(peaks, seen)]
        resident = [peak - s["others_bytes"] for peak, s in zip(peaks, seen)]
        excess = max(r - p - limit for r, p in zip(resident, parameters))
        more = {"rank_resident_bytes": resident}
    return {"seconds": load["seconds"], "phases": load.get("phases", {}), "rank_bytes": parameters,
            "rank_peak_rss_bytes": peaks, "rss_over_parameters_and_limit_mib": round(excess / MIB, 1),
            "asked_bytes": load["storage_bytes_read"], "exchanged_bytes": load.get("exchanged_bytes")} | more


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("ckpt")
    ap.add_argument("--bin", required=True)
    ap.add_argument("--tp", type=int, default=1)
    ap.add_argument("--state", choices=("warm", "cold"), default="warm")
    ap.add_argument("--memory-limit")
    ap.add_argument("--hold-gib", type=float)
    ap.add_argument("options", nargs="*", help="more options of `longshore load`, after --")
    a = ap.parse_intermixed_args()
    with harness.HeldMemory(a.hold_gib, harness.tensor_bytes(a.ckpt)) as memory:
        line = run(a.bin, a.ckpt, a.tp, a.state, memory, a.options, a.memory_limit)
    print(json.dumps(line))
    sys.exit("error" in line)


if __name__ == "__main__":
    main()
