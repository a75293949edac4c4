#!/usr/bin/env python3
"""`astrovl quantize`'s blocks against llama.cpp and gguf-py: on random numbers and on a real model's weights.

    LLAMA_CPP=BUILD python3 test/real_quants.py [--cache ~/.cache/astrovl] [--values N]     (test/real_common.py says what it needs)

For the K types: the root-mean-square error as a ratio to that of ggml_quantize_chunk without an importance matrix, tensor by
tensor, and the values per second of both, one thread each. For the others: the same bits as gguf-py's. The model is
SmolLM2-135M-Instruct as Q4_1. Its expanded rows lie on Q4_1's grid, which Q4_K and Q5_K nearly contain; its columns do not, and are
the fairer test. At most N values (2^18) of each matrix are taken, as one row. A check fails if a type's error over all tensors of a
kind is more than 1.02 times llama.cpp's (ggml 0.25.3 in llama-cpp-python 0.3.36), or a bit differs. Needs a C compiler as `cc`, too;
without LLAMA_CPP only the bits are compared.
"""
import collections
import ctypes
import os
import subprocess
import sys
import tempfile
import time

import gguf
import numpy as np

import real_common
from real_common import ROOT, check

LIMIT = 1.02
K_TYPES = [gguf.GGMLQuantizationType[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")]
BIT_TYPES = [gguf.GGMLQuantizationType[name] for name in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")]


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


class Quantizers:
    def __init__(self, ggml):
        self.seconds = collections.Counter()
        self.values = collections.Counter()
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "astrovl.so")
            code = '#include "%s"\nvoid quantize(int type, const float *x, void *blocks, int64_t n);\n' \
                   'void quantize(int type, const float *x, void *blocks, int64_t n) {' \
                   ' quantize_row(type, x, (unsigned char *)blocks, n); }\n' % os.path.join(ROOT, "demo.c")
            subprocess.run(["cc", "-x", "c", "-O2", "-shared", "-fPIC", "-Dmain=astrovl_main", "-o", path, "-", "-lm", "-pthread"],
                           input=code.encode(), check=True)
            self.astrovl = ctypes.CDLL(path).quantize
        self.astrovl.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        self.astrovl.restype = None
        if not ggml: return
        self.ggml = ctypes.CDLL(ggml).ggml_quantize_chunk
        self.ggml.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
        self.ggml.restype = ctypes.c_size_t

    def run(self, who, kind, x):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        out = np.zeros(x.size // block * size, np.uint8)
        start = time.thread_time()
        if who == "astrovl":
            self.astrovl(int(kind), pointer(x), pointer(out), x.size)
        else:
            assert self.ggml(int(kind), pointer(x), pointer(out), 0, 1, x.size, None) == out.size
        self.seconds[who, kind] += time.thread_time() - start
        self.values[who, kind] += x.size
        return out

    def error(self, who, kind, x):         # the sum of squares
        return float(np.sum((gguf.dequantize(self.run(who, kind, x), kind).astype(np.float64) - x) ** 2))

    def rate(self, who, kind):             # millions of values per second
        return self.values[who, kind] / max(self.seconds[who, kind], 1e-9) / 1e6


def random_tensors():
    random, n = np.random.default_rng(1), 1 << 20
    yield "random", "Gaussian", random.standard_normal(n)
    yield "random", "Laplace", random.laplace(size=n)
    yield "random", "Student's t of 4", random.standard_t(4, size=n)
    yield "random", "Student's t of 3", random.standard_t(3, size=n)


def model_tensors(path, limit):
    for t in gguf.GGUFReader(path).tensors:
        if len(t.shape) < 2: continue
        w = gguf.dequantize(t.data, t.tensor_type)
        n = min(limit, w.size) // 256 * 256
        n_rows = -(-n // w.shape[1])
        yield "rows", t.name, w[:n_rows].ravel()[:n]
        yield "columns", t.name, w[:4096].T.ravel()[:n]


def main():
    parser = real_common.arguments(__doc__)
    parser.add_argument("--values", type=int, default=1 << 18)
    args = parser.parse_args()
    ggml = real_common.llama_cpp("LLAMA_CPP", "bin", "libggml-base.so")
    k_types = K_TYPES if ggml else []
    q, bits = Quantizers(ggml), collections.Counter()
    sums = collections.defaultdict(lambda: collections.Counter())
    print("%-40s%s" % ("error / llama.cpp's error", "".join("%9s" % k.name for k in k_types)))
    for part in (random_tensors(), model_tensors(real_common.fetch(args.cache, real_common.SMOLLM2), args.values)):
        for group, name, x in part:
            x = np.ascontiguousarray(x, np.float32)
            x = x[:x.size // 256 * 256]
            line = "%-8s%-32s" % (group, name)
            for kind in k_types:
                ours, theirs = q.error("astrovl", kind, x), q.error("ggml", kind, x)
                group_name = name if group == "random" else group
                sums[group_name][kind, "astrovl"] += ours
                sums[group_name][kind, "ggml"] += theirs
                line += "%9.4f" % np.sqrt(ours / theirs)
            for kind in BIT_TYPES:
                if not np.array_equal(q.run("astrovl", kind, x), gguf.quantize(x, kind).view(np.uint8)):
                    line += "   %s: other bits" % kind.name
                    bits[kind] += 1
            print(line, flush=True)
    print()
    for who in ("astrovl", "ggml") if ggml else ():
        print("%-40s%s" % ("million values/s, " + who, "".join("%9.1f" % q.rate(who, kind) for kind in k_types)))
    print("astrovl: " + ", ".join("%s %.0f" % (kind.name, q.rate("astrovl", kind)) for kind in BIT_TYPES))
    for group, counter in sums.items():
        for kind in k_types:
            ratio = np.sqrt(counter[kind, "astrovl"] / counter[kind, "ggml"])
            check("%s, all of %s" % (kind.name, group), ratio <= LIMIT, "%.4f times llama.cpp's error" % ratio)
    for kind in BIT_TYPES:
        check("%s, gguf's bits" % kind.name, not bits[kind], "%d tensors have others" % bits[kind] if bits[kind] else "")
    if not ggml: real_common.skip("K types", "LLAMA_CPP")
    return real_common.end()


if __name__ == "__main__":
    sys.exit(main())
