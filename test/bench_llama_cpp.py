"""Compares astrovl's speed with llama.cpp's on the same files of random weights (test/bench --synthetic), in turns.

    make bench LLAMA_CPP=DIR        DIR: a build folder with bin/llama-bench and bin/llama-mtmd-cli
    python3 test/bench_llama_cpp.py DIR [--model smollm2-135m] [--types "q4_0 f16"] [--rounds 5] [--images 9]

Both read the same number of positions and then write the same number of tokens behind them; "image" is the time llama-mtmd-cli
logs for encoding (astrovl's includes resizing the image). "together" is astrovl alone: the tokens a second of several answers that
are written together, and as its ratio how many times those of one alone that is. Ratios are taken within a round, since machines
change their speed from minute to minute, and their median is printed: above 1 astrovl is faster (or smaller). --images N measures
the image alone N times more: a round takes minutes, an image seconds. Standard library only.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BENCH = os.path.join(ROOT, "test", "bench")
IMAGE = os.path.join(ROOT, "test", "images", "spiral.png")
# what is compared, in which unit, and whether less is better
ROWS = (("image", "s", True), ("prompt", "tokens/s", False), ("answer", "tokens/s", False), ("memory", "GB", True))


def run(command, **environment):
    """-> standard output, standard error, the most memory it held in GB. Ends the comparison if the program fails."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env={**os.environ, **environment})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    if status != 0:
        sys.exit("%s failed:\n%s" % (" ".join(command), texts[1][-2000:]))
    return texts[0], texts[1], usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def astrovl(options, kind, prompt, tokens, batch):
    command = [BENCH, "--json", "--rounds", "1", "--synthetic", "%s:%s" % (options.model, kind), "--prompt",
               str(prompt), "--tokens", str(tokens), "--threads", str(options.threads), "--batch", str(batch)]
    if options.dir:
        command += ["--dir", options.dir]
    out, err, _ = run(command, **({"ASTROVL_ISA": options.isa} if options.isa else {}))
    files, result = re.findall(r"^(.*\.gguf): .* random weights", err, re.M), json.loads(out)
    found = {part: result[part]["per_second"] for part in ("prompt", "answer")}
    found["memory"] = result["memory"]["peak"] / 1e9
    if "image" in result:
        found["image"] = result["image"]["seconds"]
    if "batch" in result:
        found["together"], found["gain"] = result["batch"]["per_second"], result["batch"]["ratio"]
    return files, found


TRIES = 3      # llama-mtmd-cli with a tiny model may end before its log's last lines are written
IMAGE_TIME = re.compile(r"(?:encoding done|encoded) in (\d+) ms")


def mtmd(options, files):
    return [os.path.join(options.build, "bin", "llama-mtmd-cli"), "-m", files[0], "--mmproj", files[1], "--image", IMAGE, "-p",
            "What is this?", "-n", "1", "-t", str(options.threads), "-c", str(max(1024, options.prompt + options.tokens)),
            "--chat-template", "vicuna", "-lv", "5"]


def image_alone(options, kind):
    """-> seconds, and llama.cpp's, which is stopped when it has logged them: its language model need not read the image."""
    files, ours = astrovl(options, kind, 1, 1, 0)
    for _ in range(TRIES):
        process = subprocess.Popen(mtmd(options, files), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
                                   errors="replace")
        found = next(filter(None, map(IMAGE_TIME.search, process.stdout)), None)
        process.kill()
        process.communicate()
        if found:
            return {"image": ours["image"]}, {"image": int(found[1]) / 1000}
    sys.exit("llama-mtmd-cli does not log its encoding time as expected")


def llama_cpp(options, files):
    def bench(*arguments):
        out, _, memory = run([os.path.join(options.build, "bin", "llama-bench"), "-m", files[0], "-t", str(options.threads), "-r", "1",
                              "-o", "json", *arguments])
        return json.loads(out)[-1]["avg_ts"], memory

    found = {}
    found["prompt"], memory = bench("-p", str(options.prompt), "-n", "0")
    found["answer"], memory2 = bench("-p", "0", "-n", str(options.tokens), "-d", str(options.prompt))
    found["memory"] = max(memory, memory2)
    if len(files) > 1:
        # (its prompt is read too, and its memory is the one to compare with)
        for _ in range(TRIES):
            out, err, found["memory"] = run(mtmd(options, files))
            times = IMAGE_TIME.findall(out + err)
            if times:
                found["image"] = sum(map(int, times)) / 1000
                return found
        sys.exit("llama-mtmd-cli does not log its encoding time as expected:\n" + (out + err)[-2000:])
    return found


def compare(options, kind):
    rounds = []
    for i in range(options.rounds):
        files, ours = astrovl(options, kind, options.prompt, options.tokens, options.batch)
        rounds.append((ours, llama_cpp(options, files)))
        print("%s, round %d: %s" % (kind, i + 1, rounds[-1]), file=sys.stderr)
    for i in range(options.images):
        rounds.append(image_alone(options, kind))
        print("%s, image %d: %s" % (kind, i + 1, rounds[-1]), file=sys.stderr)
    print("%s %s, %d threads: %d positions read, %d tokens written after them; medians of %d rounds%s" %
          (options.model, kind, options.threads, options.prompt, options.tokens, options.rounds,
           ", the image's of %d" % (options.rounds + options.images) if options.images else ""))
    print("  %-18s %9s %10s %7s  %s" % ("", "astrovl", "llama.cpp", "ratio", "from round to round"))
    for part, unit, less in ROWS:
        pairs = [(ours[part], theirs[part]) for ours, theirs in rounds if part in ours and part in theirs]
        if not pairs:
            continue
        ratios = [theirs / ours if less else ours / theirs for ours, theirs in pairs]
        print("  %-18s %9.3f %10.3f %7.2f  %.2f to %.2f" % ("%s, %s" % (part, unit), statistics.median(p[0] for p in pairs),
              statistics.median(p[1] for p in pairs), statistics.median(ratios), min(ratios), max(ratios)))
    together = [ours for ours, _ in rounds if "gain" in ours]
    if together:
        gains = [ours["gain"] for ours in together]
        print("  %-18s %9.3f %10s %7.2f  %.2f to %.2f (astrovl's %d together, against one alone)" % ("together, tokens/s",
              statistics.median(ours["together"] for ours in together), "", statistics.median(gains), min(gains), max(gains), options.batch))
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", help="llama.cpp's build folder")
    parser.add_argument("--model", default="llava-1.5-7b", help="llava-1.5-7b (default), smollm2-135m or nano")
    parser.add_argument("--types", default="q4_0", help="types of the weights, separated by blanks (default q4_0)")
    parser.add_argument("--dir", help="where the files are kept")
    parser.add_argument("--isa", help="astrovl's kernels (ASTROVL_ISA), such as avx2: llama.cpp must then be built for the same")
    for name, default in (("rounds", 3), ("images", 0), ("prompt", 620), ("tokens", 32), ("batch", 8), ("threads", os.cpu_count() or 1)):
        parser.add_argument("--" + name, type=int, default=default, help="default %d" % default)
    options = parser.parse_args()
    if options.images and options.model == "smollm2-135m":
        parser.error("smollm2-135m has no images to encode")
    for name in ("llama-bench", "llama-mtmd-cli"):
        if not os.path.exists(os.path.join(options.build, "bin", name)):
            parser.error("%s has no bin/%s" % (options.build, name))
    for kind in options.types.split():
        compare(options, kind)


if __name__ == "__main__":
    main()
