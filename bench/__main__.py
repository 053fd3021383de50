"""Run the benchmarks, one after the other: python -m bench [--list] [NAME ...]"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

BENCHES = {
    "throughput": "share of the matrix-product rate, images/s and memory: training and sampling at 16 to 256 px",
    "memory": "the plan's peak of memory against the one of training steps, each in a fresh process",
    "gpu": "one GPU in ten minutes: memory, MFU, kernels, latency, saving, loading, sampling (without one: a toy)",
    "loader": "images/s of the loader against a bare decode-and-resize loop over the same files",
    "input": "images/s that reach training against what the same workers decode with nothing behind them",
    "index": "12.4 million samples by their index: seconds to open, to the first batch; memory of every process",
    "sampling_overhead": "what sampling costs beyond the network's evaluations",
    "resume": "twenty runs that meet random faults and go on: the same bytes as one left alone (--processes 2: of two)",
    "distribution": "throughput that two processes lose against one that has half the work",
    "contention": "training beside other processes: what spinning threads cost, what the command line's setting saves",
    "biased_teacher": "reconstruction against distillation as a teacher gets worse, in two dimensions",
    "onestep": "one evaluation against guided sampling, by part, by resolution, and against an autoencoder's decoder",
    "pairs": "a pairs stage killed at random moments, a damaged shard, another teacher; the round trip of the teacher",
    "editing": "transfer, inpainting and upscaling of held-out scenes by the shipped model, judged by the checker",
    "drift": "a generator grown by four, with and without reconstruction: does its picture stay the one it grew from",
    "metrics": "memory and time of every metric of 50,000 images with 2048 features (40 minutes on one thread)",
    "distances": "does the Frechet distance by EfficientNet-Lite0 order real, blurred, JPEG, noisy images (5 minutes)",
    "exact": "exact growth against plain preserve on equal images, and what progressive sampling saves",
    "search": "the best of 16 previews by the checker: what it gains over one sample, what it costs (20 minutes)",
    "emoji": "does a model of emoji draw what captions name: retrieval, distance (10 minutes; needs pictures)",
    "ablation": "the papers' comparisons at equal compute, three seeds (about three hours on two cores)",
    "growth": "six ways to a 64 px model at equal training compute, three seeds (about 50 minutes on two cores)",
}
OPTIONS = {
    "resume": ["--processes", "2"],
    "memory": ["--output", "runs/bench/memory.jsonl"],
    "editing": ["--figures", "docs/figures"],
    "biased_teacher": ["--figures", "docs/figures"],
    "onestep": ["--figures", "docs/figures"],
    "throughput": ["--output", "runs/bench/throughput.jsonl", "--figures", "docs/figures"],
    "exact": ["--root", "runs/bench/exact"],
    "ablation": ["--root", "runs/ablation", "--figures", "docs/figures", "--processes", "2"],
    "growth": ["--root", "runs/bench/growth", "--figures", "docs/figures"],
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:<18} {what}" for name, what in BENCHES.items()),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="all of those below if none is given")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in BENCHES]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(BENCHES)}")
    failed = []
    for name in args.names or BENCHES:
        command = [sys.executable, "-m", f"bench.{name}", *OPTIONS.get(name, [])]
        print(f"\n$ python {shlex.join(command[1:])}", flush=True)
        if not args.list and subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
