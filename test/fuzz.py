#!/usr/bin/env python3
"""Runs each target of test/fuzz.c for some seconds: fuzz.py [SECONDS] [TARGET...]. As many run at once as there are processors. Starts
from files of the tests, prints how many inputs were tried, and ends with a line "N passed, N failed". An input that fails stays in
test/crash-*, and its report is printed."""

import concurrent.futures
import glob
import os
import re
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCHEMA = b'{"type": "object", "properties": {"a": {"type": "array", "items": {"enum": ["x", 1, null]}, "maxItems": 3}, "b": {"type": "number"}}}'
LINES = b'{"image": "a.png", "class": "x", "description": "y", "features": ["z"]}\n' * 2


def seeds(index):
    """{target: its first inputs}"""
    def read(*patterns):
        paths = sorted(path for pattern in patterns for path in glob.glob(os.path.join(ROOT, "test", pattern)))
        return [open(path, "rb").read() for path in paths if os.path.getsize(path) < 1 << 18]

    files = read("golden/*.gguf")
    return {"gguf": files, "image": read("images/*", "golden/*.png"), "text": [data + b"\0a spiral <s> galaxy" for data in read("golden/vocab_*.gguf")],
            "schema": [SCHEMA], "regex": [rb"(a|b)*c{2,5}[^x-z\d]?\\w+"], "json": [LINES], "index": [index],
            "blocks": [bytes([kind]) + bytes(range(256)) for kind in (2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 30)]}


def fuzz(target, inputs, folder, seconds):
    """-> number of inputs tried, "?" if it did not reach its end; what it printed, or "" if all is well"""
    corpus = os.path.join(folder, target)
    os.mkdir(corpus)
    for i, data in enumerate(inputs):
        with open(os.path.join(corpus, "seed%d" % i), "wb") as f:
            f.write(data)
    # json: where a line is wrong, the program ends without freeing what it holds
    done = subprocess.run([os.path.join(ROOT, "test", "fuzz"), "-max_total_time=%d" % seconds, "-timeout=20", "-rss_limit_mb=4096",
                           "-max_len=%d" % max(4096, *map(len, inputs)), "-close_fd_mask=3", "-print_final_stats=1",
                           "-artifact_prefix=" + os.path.join(ROOT, "test", "crash-%s-" % target), corpus],
                          cwd=ROOT, env={**os.environ, "FUZZ": target, "FUZZ_FILE": os.path.join(folder, "lines.jsonl"),
                                         "ASAN_OPTIONS": "detect_leaks=%d" % (target != "json")},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
    runs = re.search(r"number_of_executed_units:\s*(\d+)", done.stdout)
    good = done.returncode == 0 and runs is not None
    return runs.group(1) if runs else "?", "" if good else done.stdout[-4000:] or "status %d" % done.returncode


def main():
    seconds, wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 20, sys.argv[2:]
    failed = 0
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        index = os.path.join(folder, "seed.avl")
        subprocess.run([os.path.join(ROOT, "astrovl"), "index", "-q", "test/images", "-o", index], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        started = {target: pool.submit(fuzz, target, inputs, folder, seconds)
                   for target, inputs in seeds(open(index, "rb").read()).items() if not wanted or target in wanted}
        for target, future in started.items():
            runs, report = future.result()
            failed += report != ""
            print("%-7s %9s inputs  %s" % (target, runs, report and "FAILED\n" + report or "ok"), flush=True)
    print("%d passed, %d failed" % (len(started) - failed, failed))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
