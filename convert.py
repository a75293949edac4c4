#!/usr/bin/env python3
"""Turns the checkpoints that people train and publish into the GGUF files that astrovl and llama.cpp run.

Python 3.8 or later, nothing else. Bytes are moved, never recomputed: float32, float16 and bfloat16 stay what they are, but for
small tensors (norms, biases, positions) that llama.cpp wants as float32, which is exact. `astrovl quantize` makes files smaller.
Memory stays below a few hundred megabytes whatever the model's size. A checkpoint may come from anywhere: its sizes are checked
before they are used, and pickles are read by an interpreter that can build tensors and nothing else.
"""

import argparse
import collections
import itertools
import json
import os
import pickletools
import re
import struct
import sys
import zipfile
from math import pi, prod
from reprlib import repr as shown         # values of a hostile file: an ordinary repr could be endless

EPILOG = """\
what SOURCE may be
  LLaVA as transformers saves it (AstroLLaVA, llava-1.5-7b-hf), old or new tensor names
  LLaVA as its authors' code saves it (liuhaotian/llava-v1.5-7b); --vision names CLIP's folder if the tower is not inside
  mm_projector.bin alone, with --base (the language model's folder) and --vision
  LLaMA 1 to 3, Vicuna, SmolLM2: text alone
  CLIP of transformers (PyTorch or flax), of open_clip, and PAPERCLIP with or without its dense heads
in safetensors (one file or shards), PyTorch's .bin and .pt (zip archives), or flax's .msgpack, with config.json and the
tokenizer's files (tokenizer.model, tokenizer.json, or vocab.json and merges.txt) beside the weights or in --base.

examples
  python3 convert.py AstroLLaVA/                             # AstroLLaVA.gguf and AstroLLaVA-mmproj.gguf
  python3 convert.py AstroLLaVA/ --single -o astro.gguf      # both in one file (astrovl only)
  python3 convert.py llava-v1.5-7b/ --vision clip-vit-large-patch14-336/
  python3 convert.py pretrain/mm_projector.bin --base vicuna-7b/ --vision clip-vit-large-patch14-336/
  python3 convert.py paperclip/flax_model.msgpack --base clip-vit-base-patch16/ -o paperclip.gguf
  ./astrovl quantize AstroLLaVA.gguf AstroLLaVA-q4_k_m.gguf q4_k_m
  ./astrovl inspect --check AstroLLaVA-q4_k_m.gguf AstroLLaVA-mmproj.gguf
"""

MSGPACK_MAPS = [bytes([byte]) for byte in (*range(0x81, 0x90), 0xDE, 0xDF)]      # first bytes of a dictionary that is not empty
MAX_VALUES = 1 << 40        # of one tensor
MAX_JSON = 1 << 28          # bytes of a JSON file or a pickle: the largest tokenizer.json has 2^24
PIECE = 1 << 23             # bytes moved at once
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
GGUF_TYPES = {"F32": 0, "F16": 1, "BF16": 30}
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}      # general.file_type


class Problem(Exception):
    """What is wrong with the input, in one line: the file (and the place in it), then why, with the values set in."""

    def __init__(self, where, why, *values):
        super().__init__("%s: %s" % (where, why % values))


def check(right, where, why, *values):
    if not right:
        raise Problem(where, why, *values)


def note(text):
    print("convert.py: note: " + text, file=sys.stderr)


# ---- tensors: numbers that still lie in their file ---------------------------------------------------------------------

class Tensor:
    """shape and strides, in values, slowest dimension first; the first value lies at byte `offset` of the file at `path`.

    Transposing, splitting and permuting change shape and strides; the bytes move once, when the tensor is written.
    """

    def __init__(self, path, dtype, offset, shape, strides=None):
        self.path, self.dtype, self.offset, self.shape = path, dtype, offset, tuple(shape)
        self.strides = tuple(strides) if strides is not None else row_major(self.shape)

    def transposed(self, *axes):
        return Tensor(self.path, self.dtype, self.offset, [self.shape[a] for a in axes], [self.strides[a] for a in axes])

    def part(self, start, count):
        """Rows start..start+count of the first dimension."""
        offset = self.offset + start * self.strides[0] * SIZES[self.dtype]
        return Tensor(self.path, self.dtype, offset, (count,) + self.shape[1:], self.strides)

    def split(self, *parts):
        """The first dimension as several."""
        strides = tuple(step * self.strides[0] for step in row_major(parts)) + self.strides[1:]
        return Tensor(self.path, self.dtype, self.offset, parts + self.shape[1:], strides)

    def chunks(self):
        """The values in row-major order, in pieces of bytes."""
        size, n_values = SIZES[self.dtype], prod(self.shape)
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            if self.strides == row_major(self.shape) or n_values <= 1:
                for left in range(n_values * size, 0, -PIECE):
                    yield read_exactly(file, min(left, PIECE))
                return
            span = sum((n - 1) * step for n, step in zip(self.shape, self.strides)) + 1
            values = memoryview(read_exactly(file, span * size)).cast({1: "B", 2: "H", 4: "I", 8: "Q"}[size])
        # the values of dimensions run.. lie `step` apart throughout: each such row is one slice
        run, step = (len(self.shape) - 1, self.strides[-1]) if self.strides[-1] else (len(self.shape), 1)
        while run > 0 and self.strides[run - 1] == prod(self.shape[run:]) * step:
            run -= 1
        length, pieces = prod(self.shape[run:]), []
        for starts in itertools.product(*(range(0, n * s, s) if s else [0] * n for n, s in zip(self.shape[:run], self.strides))):
            at = sum(starts)
            pieces.append(values[at:at + (length - 1) * step + 1:step].tobytes())
            if len(pieces) * length * size >= PIECE:
                yield b"".join(pieces)
                pieces = []
        yield b"".join(pieces)


class Made:
    """A small tensor that no checkpoint holds: float32 values of one dimension."""

    def __init__(self, values):
        self.dtype, self.shape, self.values = "F32", (len(values),), values

    def chunks(self):
        yield struct.pack("<%df" % len(self.values), *self.values)


def row_major(shape):
    return tuple(prod(shape[i + 1:]) for i in range(len(shape)))


def read_exactly(file, n):
    data = file.read(n)
    check(len(data) == n, file.name, "the file ends at byte %d, %d bytes too early", file.tell(), n - len(data))
    return data


def widened(chunk, dtype):
    """float16 or bfloat16 bytes as float32 bytes: the same numbers."""
    if dtype == "F16":
        n = len(chunk) // 2
        return struct.pack("<%df" % n, *struct.unpack("<%de" % n, chunk))
    if dtype == "BF16":                                 # the upper half of a float32
        wide = bytearray(2 * len(chunk))
        wide[2::4], wide[3::4] = chunk[0::2], chunk[1::2]
        return bytes(wide)
    return chunk


def is_count(value, limit=MAX_VALUES):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit


def check_shape(shape, where):
    right = isinstance(shape, (list, tuple)) and len(shape) <= 8 and all(is_count(n) for n in shape) and prod(shape) <= MAX_VALUES
    check(right, where, "the shape %s is not one of a tensor", shown(shape))


# ---- JSON --------------------------------------------------------------------------------------------------------------

def no_duplicates(pairs):
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError("the name %s occurs twice" % shown(counts.most_common(1)[0][0]))
    return result


def parse_json(data, where):
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=no_duplicates)
        json.dumps(value, ensure_ascii=False).encode("utf-8")      # "\ud800" alone is no character
    except (ValueError, RecursionError) as e:           # UnicodeError is a ValueError
        raise Problem(where, "no valid JSON: %.200s", e)
    check(isinstance(value, dict), where, "JSON, but no object")
    return value


def read_bytes(path, n):
    with open(path, "rb") as file:
        return file.read(n)


def read_small(path):
    check(os.path.getsize(path) <= MAX_JSON, path, "larger than %d bytes; that is no file of this kind", MAX_JSON)
    with open(path, "rb") as file:
        return file.read()


# ---- safetensors -------------------------------------------------------------------------------------------------------
# u64 length of a JSON header, the header, the data. {"name": {"dtype", "shape", "data_offsets": [begin, end]}}; the tensors
# fill the data without gaps. Source: huggingface/safetensors, README.

def read_safetensors(path):
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        n = int.from_bytes(read_exactly(file, 8), "little")
        check(n <= min(size - 8, 100000000), path, "the header at byte 0 says it has %d bytes, the file has %d", n, size)
        header = parse_json(read_exactly(file, n), path + ": header")
    header.pop("__metadata__", None)
    tensors, places = {}, []
    for name, entry in header.items():
        where = "%s: tensor %.200s" % (path, name)
        entry = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        check(isinstance(dtype, str) and isinstance(offsets, list), where, "the header's entry is incomplete")
        check_shape(shape, where)
        check(len(offsets) == 2 and all(is_count(o, 1 << 60) for o in offsets), where,
              "data_offsets %s are not two byte numbers", shown(offsets))
        begin, end = offsets
        check(dtype not in SIZES or end - begin == prod(shape) * SIZES[dtype], where,
              "%s %s does not take the %d bytes of its data_offsets", dtype, shape, end - begin)
        places.append((begin, end, name))
        tensors[name] = Tensor(path, dtype, 8 + n + begin, shape)
    expected = 0
    for begin, end, name in sorted(places):
        check(expected == begin <= end, path, "tensor %.200s begins at byte %d of the data, where %d was to follow: overlapping "
              "or missing data", name, begin, expected)
        expected = end
    end = 8 + n + expected
    check(end == size, path, "the tensors end at byte %d, the file at %d (an incomplete download?)", end, size)
    return tensors


# ---- PyTorch -----------------------------------------------------------------------------------------------------------
# A zip archive, stored without compression: NAME/data.pkl, a pickle in which each storage is a persistent id
# ("storage", torch.HalfStorage, key, device, n_values), and NAME/data/KEY, the storage's bytes. Source: torch/serialization.py.
#
# A pickle is a program for a stack machine, and a hostile one runs whatever it likes. pickletools (standard library) splits
# it into instructions without running any; run_pickle then does what the few say that a dictionary of tensors needs.

STORAGES = {"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
            "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL"}
# values of one type in the file; offset None: only the type is known, a pickle's torch.HalfStorage
Storage = collections.namedtuple("Storage", "dtype offset n_values")


def rebuild_tensor(path, storage, offset, shape, strides, *rest):
    """torch._utils._rebuild_tensor_v2"""
    for numbers in (shape, strides):
        check_shape(numbers, path + ": data.pkl")
    if not isinstance(storage, Storage) or storage.offset is None or not is_count(offset) or len(shape) != len(strides):
        raise TypeError
    span = sum((n - 1) * step for n, step in zip(shape, strides)) + 1 if prod(shape) else 0
    check(max(offset + span, prod(shape)) <= storage.n_values, path, "data.pkl: a tensor %s with strides %s from value %d reaches "
          "outside its storage of %d values", list(shape), list(strides), offset, storage.n_values)
    return Tensor(path, storage.dtype, storage.offset + offset * SIZES[storage.dtype], shape, strides)


# instructions that push their argument, and those that push what is here made anew
ARGUMENTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
CONSTANTS = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict,
             "EMPTY_LIST": list}
# how many values an instruction takes from the stack; None: all above the last mark
TAKES = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "SETITEM": 2, "SETITEMS": None, "APPEND": 1, "APPENDS": None,
         "STACK_GLOBAL": 2, "REDUCE": 2, "BUILD": 1, "BINPERSID": 1, "STOP": 1}


def run_pickle(path, data, storage):
    """The object that a pickle makes of dictionaries, lists, tuples, numbers, texts and tensors."""
    types = {"torch " + name: Storage(dtype, None, 0) for name, dtype in STORAGES.items()}
    functions = {"collections OrderedDict": lambda: {}, "torch Size": tuple,
                 "torch._utils _rebuild_parameter": lambda tensor, *rest: tensor,
                 "torch._utils _rebuild_tensor_v2": lambda *arguments: rebuild_tensor(path, *arguments)}
    stack, marks, memo = [], [], {}
    for op, arg, at in pickletools.genops(data):
        name, items = op.name, []
        if name in TAKES:
            start = marks.pop() if TAKES[name] is None else -TAKES[name]
            items = stack[start:]
            del stack[start:]
        if name in ARGUMENTS:
            stack.append(arg)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name.startswith("TUPLE"):
            stack.append(tuple(items))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name in ("SETITEM", "SETITEMS"):
            if not isinstance(stack[-1], dict) or not all(isinstance(key, (str, int)) for key in items[0::2]):
                raise TypeError
            stack[-1].update(zip(items[0::2], items[1::2]))
        elif name in ("APPEND", "APPENDS"):
            if not isinstance(stack[-1], list):
                raise TypeError
            stack[-1].extend(items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            wanted = arg if name == "GLOBAL" else "%s %s" % tuple(items)
            check(wanted in functions or wanted in types, path, "the pickle asks for %.100s, which is no part of a tensor; it may "
                  "be hostile, and nothing of it was run. Save the weights as safetensors.", wanted.replace(" ", "."))
            stack.append(functions[wanted] if wanted in functions else types[wanted])
        elif name == "REDUCE":
            function, arguments = items
            if function not in functions.values() or not isinstance(arguments, tuple):
                raise TypeError
            stack.append(function(*arguments))
        elif name == "BINPERSID":
            kind, kept, key, _, n_values = items[0]
            if kind != "storage" or not isinstance(kept, Storage) or not isinstance(key, str) or not is_count(n_values):
                raise TypeError
            stack.append(storage(kept.dtype, key, n_values))
        elif name == "STOP":
            return items[0]
        else:                                           # BUILD's is the state of an OrderedDict: versions of modules
            check(name in ("PROTO", "FRAME", "BUILD"), path, "byte %d of data.pkl has the instruction %s, which no dictionary of "
                  "tensors needs", at, name)
    raise Problem(path, "data.pkl ends without STOP")


def read_torch(path):
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as e:
        raise Problem(path, "no zip archive of PyTorch (%.80s): damaged, incomplete, or saved before PyTorch 1.6 (load it and "
                      "save it anew, best as safetensors)", e)
    pickles = [name for name in entries if name.split("/")[-1] == "data.pkl"]
    check(len(pickles) == 1, path, "a zip archive without data.pkl: not saved by torch.save")
    prefix = pickles[0][:-len("data.pkl")]
    check(prefix + "constants.pkl" not in entries, path,
          "a TorchScript program, not a checkpoint; save its state_dict() with torch.save")

    def place(name, most=1 << 62):
        """Where a stored entry's bytes lie; its local header stands before them."""
        entry = entries.get(name)
        check(entry is not None, path, "the archive lacks %.200s", name)
        check(entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1, path,
              "%.200s is compressed or encrypted; PyTorch stores it plainly", name)
        with open(path, "rb") as file:
            file.seek(max(entry.header_offset, 0))
            head = read_exactly(file, 30)
        begin, size = entry.header_offset + 30 + sum(struct.unpack("<HH", head[26:30])), entry.file_size
        check(entry.header_offset >= 0 and head[:4] == b"PK\3\4" and begin + size <= os.path.getsize(path), path,
              "the archive's entry %.200s reaches outside the file", name)
        check(size <= most, path, "%.200s has %d bytes; %d are the most that make sense", name, size, most)
        return begin, size

    def stored(name, most):
        begin, size = place(name, most)
        return b"".join(Tensor(path, "U8", begin, [size]).chunks())

    def storage(dtype, key, n_values):
        begin, size = place(prefix + "data/" + key)
        check(n_values * SIZES[dtype] <= size, path,
              "storage %.80s has %d bytes; %d values of %s need more", key, size, n_values, dtype)
        return Storage(dtype, begin, n_values)

    check(prefix + "byteorder" not in entries or stored(prefix + "byteorder", 64) == b"little", path,
          "saved on a big-endian machine; save it as safetensors")
    try:
        state = run_pickle(path, stored(pickles[0], MAX_JSON), storage)
    except (ArithmeticError, LookupError, TypeError, ValueError) as e:      # a stack that runs empty, an argument cut short, ...
        raise Problem(path, "data.pkl is damaged (%s)", type(e).__name__)
    state = opened(state, "state_dict", "model")        # a training loop's checkpoint
    tensors = {re.sub(r"^module\.", "", name): t for name, t in state.items() if isinstance(name, str) and isinstance(t, Tensor)}
    check(tensors, path, "holds no dictionary of tensors")
    return tensors


def opened(tree, *keys):
    """A dictionary, taken out of those that others put around it under these keys."""
    for key in keys:
        tree = tree[key] if isinstance(tree, dict) and isinstance(tree.get(key), dict) else tree
    return tree if isinstance(tree, dict) else {}


# ---- flax --------------------------------------------------------------------------------------------------------------
# msgpack: nested maps of parameters; an array is extension type 1 around [shape, dtype, bytes]. Sources: msgpack/spec.md,
# flax/serialization.py. Dense layers multiply from the other side, so "kernel" is PyTorch's "weight" transposed.

NUMPY_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}
# values that begin with their size: the method that reads them, the size's bytes
MSGPACK_SIZED = {0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4), 0xC7: ("extension", 1), 0xC8: ("extension", 2),
                 0xC9: ("extension", 4), 0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4), 0xDC: ("array", 2),
                 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)}


class Msgpack:
    def __init__(self, path):
        self.path, self.size = path, os.path.getsize(path)

    def check(self, right, why, *values):
        check(right, "%s: byte %d" % (self.path, self.file.tell()), why, *values)

    def room(self, n):
        self.check(n <= self.size - self.file.tell(), "the file ends before %d more bytes (an incomplete download?)", n)

    def take(self, n):
        self.room(n)
        return self.file.read(n)

    def read(self):
        with open(self.path, "rb") as self.file:
            value = self.value(0)
            self.check(self.file.tell() == self.size, "more bytes than the value that stands before them")
            return value

    def value(self, depth):
        self.check(depth <= 64, "nested too deeply")
        head = self.take(1)[0]
        if head <= 0x7F or head >= 0xE0:
            return head if head <= 0x7F else head - 256
        if head <= 0x9F:
            return (self.map if head <= 0x8F else self.array)(head & 15, depth)
        if head <= 0xBF:
            return self.text(head & 31, depth)
        if head in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[head]
        if head in (0xCA, 0xCB):
            return struct.unpack(">f" if head == 0xCA else ">d", self.take(4 if head == 0xCA else 8))[0]
        if 0xCC <= head <= 0xD3:
            return int.from_bytes(self.take(1 << (head & 3)), "big", signed=head >= 0xD0)
        if 0xD4 <= head <= 0xD8:
            return self.extension(1 << (head - 0xD4), depth)
        self.check(head in MSGPACK_SIZED, "0x%02X begins no msgpack value", head)
        method, width = MSGPACK_SIZED[head]
        return getattr(self, method)(int.from_bytes(self.take(width), "big"), depth)

    def text(self, n, depth):
        return self.take(n).decode("utf-8", "replace")

    def bytes(self, n, depth):                          # stays in the file: (offset, size)
        self.room(n)
        return self.file.seek(n, 1) - n, n

    def array(self, n, depth):
        self.room(n)                                    # an element takes a byte at least
        return [self.value(depth + 1) for _ in range(n)]

    def map(self, n, depth):
        self.room(2 * n)
        result = {}
        for _ in range(n):
            key = self.value(depth + 1)
            self.check(isinstance(key, str), "a name that is no text")
            result[key] = self.value(depth + 1)
        return result

    def extension(self, n, depth):
        kind = self.take(1)[0]
        self.room(n)
        end = self.file.tell() + n
        if kind != 1:
            self.file.seek(end)                         # complex numbers and numpy scalars: no weights
            return None
        value = self.value(depth + 1)
        self.check(isinstance(value, list) and len(value) == 3 and isinstance(value[2], tuple) and self.file.tell() == end,
                   "an array that is not [shape, dtype, bytes]")
        shape, name, (offset, size) = value
        check_shape(shape, "%s: byte %d" % (self.path, offset))
        dtype = NUMPY_TYPES.get(name if isinstance(name, str) else "")
        self.check(dtype and prod(shape) * SIZES[dtype] == size, "an array of %s %s in %d bytes", shown(name), shown(shape), size)
        return Tensor(self.path, dtype, offset, shape)


def read_flax(path):
    def leaves(node, *names):
        if isinstance(node, Tensor):
            yield from_flax(".".join(names[:-1]), names[-1], node)
        elif isinstance(node, dict):
            check("__msgpack_chunked_array__" not in node, path,
                  "%s is larger than 1 GB, which flax writes in pieces: not supported", ".".join(names))
            for name, child in node.items():
                yield from leaves(child, *names, name)

    tensors = dict(leaves(opened(Msgpack(path).read(), "params", "params")))      # a train state, or the variables around it
    check(tensors, path, "holds no arrays")
    return tensors


def from_flax(stem, leaf, t):
    """A flax tensor as PyTorch would name and keep it."""
    if leaf == "kernel" and len(t.shape) == 2:
        t = t.transposed(1, 0)                          # [in, out]
    elif leaf == "kernel" and len(t.shape) == 4:
        t = t.transposed(3, 2, 0, 1)                    # [height, width, in, out]
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    # PAPERCLIP (smsharma/PAPERCLIP-Hubble, models/clip_transfer.py): a frozen CLIP inside, two dense layers behind it
    stem = re.sub(r"^(text|vision)_model\.(text|vision)_backbone\b", r"\1_model", stem)
    stem = re.sub(r"^(text|vision)_model\.Dense_([01])$", r"\1_head.\2", stem)
    return stem + "." + leaf if stem else leaf, t


# ---- a folder of weights, configuration and tokenizer ------------------------------------------------------------------

READERS = {".safetensors": read_safetensors, ".bin": read_torch, ".pt": read_torch, ".pth": read_torch, ".msgpack": read_flax}
WEIGHT_FILES = ["model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
                "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "flax_model.msgpack", "mm_projector.bin"]


def reader_of(path):
    """What reads a file of weights: by its ending; without one it may be what flax's to_bytes() gave. None: nothing does."""
    if "." not in os.path.basename(path) and os.path.isfile(path) and read_bytes(path, 1) in MSGPACK_MAPS:
        return read_flax
    return READERS.get(os.path.splitext(path)[1])


def weight_file(folder):
    """The name of the file that has a folder's weights, or says in which files they are."""
    names = sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name)))
    check(not {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"}.intersection(names), folder, "a LoRA "
          "adapter, only the difference to a model. Merge it first (peft: merge_and_unload(), then save_pretrained()) and convert "
          "the result.")
    for name in WEIGHT_FILES:
        if name in names:
            return name
    for name in names:
        shard = re.fullmatch(r"(.+?)-\d{5}-of-\d{5}(\.safetensors|\.bin)", name)
        check(not shard, folder, "holds %s, one of several shards, but not their index, %s.index.json; is the download complete?",
              name, shard and shard.group(1) + shard.group(2))
        check(not re.fullmatch(r"consolidated\.\d\d\.pth", name), folder, "Meta's own layout (%s); download the model's -hf folder, or "
              "rewrite it with transformers' convert_llama_weights_to_hf.py", name)
        check(not name.endswith(("_optim_states.pt", "_model_states.pt")) and name != "zero_to_fp32.py", folder, "a checkpoint of "
              "DeepSpeed, whose weights lie in parts; run the zero_to_fp32.py beside it and convert what that writes")
    check(not is_orbax(folder), folder, "an orbax checkpoint; restore it in Python and save it with model.save_pretrained()")
    others = [name for name in names if reader_of(os.path.join(folder, name)) and name != "training_args.bin"]
    if len(others) == 1:
        return others[0]
    raise Problem(folder, "holds no weights that are recognised%s", ": which of %s? Name the file." % ", ".join(others[:8])
                  if others else " (model.safetensors, pytorch_model.bin, flax_model.msgpack, ...)")


def is_orbax(folder, depth=3):
    """Whether this is an orbax checkpoint, or a folder of such (ckpts/step_1000/default)."""
    with os.scandir(folder) as entries:
        entries = list(entries)
    return any(entry.name in ("manifest.ocdbt", "_METADATA", "_CHECKPOINT_METADATA") for entry in entries) or depth > 0 and any(
        is_orbax(entry.path, depth - 1) for entry in entries if re.fullmatch(r"default|ckpts|checkpoints|(step_)?\d+", entry.name)
        and entry.is_dir(follow_symlinks=False))


def read_weights(path):
    """{name: tensor} of one file."""
    reader = reader_of(path)
    check(reader, path, "weights are read from .safetensors, .bin, .pt and .msgpack")
    tensors = reader(path)
    check(not any(name.endswith((".qweight", ".qzeros")) for name in tensors), path, "holds weights of GPTQ or AWQ (qweight); "
          "convert the original")
    check(not any("lora_A" in name or "lora_B" in name for name in tensors), path,
          "holds LoRA matrices. Merge them into the model first (peft: merge_and_unload()).")
    return tensors


def read_checkpoint(source):
    """{name: tensor} of a folder or file, whose weights may lie in several files (shards) that an index tells."""
    folder = folder_of(source)
    path = os.path.join(source, weight_file(source)) if os.path.isdir(source) else source
    if not path.endswith(".index.json"):
        return read_weights(path)
    weight_map = parse_json(read_small(path), path).get("weight_map")
    check(isinstance(weight_map, dict) and weight_map, path, "has no weight_map")
    result, shards = {}, {}
    for tensor, shard in weight_map.items():
        check(isinstance(shard, str) and os.path.basename(shard) == shard and shard not in ("", ".", ".."), path,
              "tensor %.200s lies in %s, which is no file of this folder", tensor, shown(shard))
        if shard not in shards:
            check(os.path.isfile(os.path.join(folder, shard)), path, "the shard %s is missing (an incomplete download?)", shard)
            shards[shard] = read_weights(os.path.join(folder, shard))
        check(tensor in shards[shard], path, "%s lacks the tensor %.200s", shard, tensor)
        result[tensor] = shards[shard][tensor]
    return result


def folder_of(path):
    check(os.path.exists(path), path, "no such file or folder")
    return path if os.path.isdir(path) else os.path.dirname(path) or "."


class Files:
    """Small files of the checkpoint's folders, the first that has one counts."""

    def __init__(self, *places):
        self.folders = [folder_of(place) for place in places if place]

    def find(self, name):
        return next(filter(os.path.isfile, (os.path.join(folder, name) for folder in self.folders)), None)

    def config(self, name, needed=False):
        path = self.find(name)
        check(path or not needed, self.folders[0], "no %s beside the weights; --base FOLDER may name one that has it", name)
        return Config(parse_json(read_small(path), path) if path else {}, path or name)


class Config:
    """A JSON object whose values are checked as they are asked for."""

    def __init__(self, values, where):
        self.values, self.where = values, where

    def get(self, key, default=None):
        value = self.values.get(key)
        return default if value is None else value

    def checked(self, key, default, fits, why, *values):
        value = self.get(key, default)
        check(fits(value), self.where, "%s is %s; " + why, key, shown(value), *values)
        return value

    def number(self, key, default=None, most=1 << 24, least=1):
        return self.checked(key, default, lambda value: is_count(value, most) and value >= least,
                            "it must be a whole number from %d to %d", least, most)

    def real(self, key, default):
        return float(self.checked(key, default, lambda value: not isinstance(value, bool) and isinstance(value, (int, float)) and
                                  0 <= value < 1e30, "it must be a positive number"))

    def one_of(self, key, choices, default):
        return self.checked(key, default, lambda value: value in choices, "supported: %s", ", ".join(map(str, choices)))

    def items(self, key):
        return self.checked(key, [], lambda value: isinstance(value, list), "it must be a list")

    def section(self, key):
        value = self.checked(key, {}, lambda value: isinstance(value, dict), "it must be an object")
        return Config(value, "%s: %s" % (self.where, key))


# ---- names: every layout's tensors under GGUF's ------------------------------------------------------------------------

LLAMA = [(r"embed_tokens\.weight", "token_embd.weight"), (r"norm\.weight", "output_norm.weight"),
         (r"lm_head\.weight", "output.weight"), (r"layers\.(\d+)\.input_layernorm\.(.*)", r"blk.\1.attn_norm.\2"),
         (r"layers\.(\d+)\.post_attention_layernorm\.(.*)", r"blk.\1.ffn_norm.\2"),
         (r"layers\.(\d+)\.self_attn\.([qkv])_proj\.(.*)", r"blk.\1.attn_\2.\3"),
         (r"layers\.(\d+)\.self_attn\.o_proj\.(.*)", r"blk.\1.attn_output.\2"),
         (r"layers\.(\d+)\.mlp\.(gate|up|down)_proj\.(.*)", r"blk.\1.ffn_\2.\3")]
# both of CLIP's towers, as transformers names them, or as OpenAI and open_clip do
LAYER = r"(?:encoder\.layers|transformer\.resblocks)\.(\d+)\."
TOWER = [(r"(?:embeddings\.)?class_embedding", "class_embd"),
         (r"(?:embeddings\.patch_embedding|conv1)\.(weight|bias)", r"patch_embd.\1"),
         (r"embeddings\.position_embedding\.weight|positional_embedding", "position_embd.weight"),
         (r"(?:embeddings\.)?token_embedding\.weight", "token_embd.weight"), (r"(?:pre_laye?rnorm|ln_pre)\.(.*)", r"pre_ln.\1"),
         (r"(?:post_layernorm|final_layer_norm|ln_post|ln_final)\.(.*)", r"post_ln.\1"),
         (LAYER + r"(?:layer_norm|ln_)([12])\.(.*)", r"blk.\1.ln\2.\3"), (LAYER + r"attn\.in_proj_(.*)", r"blk.\1.attn_{qkv}.\2"),
         (LAYER + r"self_attn\.([qkv])_proj\.(.*)", r"blk.\1.attn_\2.\3"),
         (LAYER + r"(?:self_)?attn\.out_proj\.(.*)", r"blk.\1.attn_out.\2"),
         (LAYER + r"mlp\.(?:fc1|c_fc)\.(.*)", r"blk.\1.fc1.\2"), (LAYER + r"mlp\.(?:fc2|c_proj)\.(.*)", r"blk.\1.fc2.\2")]
PROJECTOR = [(r"(?:linear_1|0)\.(.*)", r"mm.0.\1"), (r"(?:linear_2|2)\.(.*)", r"mm.2.\1"), (r"(weight|bias)", r"mm.0.\1")]
HEAD = [(r"0\.(.*)", r"head.0.\1"), (r"1\.(.*)", r"head.2.\1")]
# prefix of a tensor's name, the table for what follows, what goes before the result; the first that fits counts
FAMILIES = [(r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?|vision_model\.|visual\.", TOWER, "v."),
            (r"text_model\.", TOWER, "t."), (r"(?:model\.)?(?:multi_modal_projector|mm_projector)\.", PROJECTOR, ""),
            (r"model\.language_model\.|language_model\.model\.|language_model\.|model\.|(?=lm_head)", LLAMA, ""),
            (r"(?:text\.)?(?=(?:text|visual)_projection\.weight$|logit_scale$)", [(r"(.*)", r"\1")], ""),
            (r"visual\.|(?:text\.)?(?=text_)", [(r"proj", "visual_projection.T"), (r"text_projection", "text_projection.T")], ""),
            (r"text_head\.", HEAD, "t."), (r"vision_head\.", HEAD, "v."),
            (r"(?=embeddings\.|encoder\.|pre_laye?rnorm\.|post_layernorm\.)", TOWER, "v."),      # a vision tower by itself
            (r"text\.|(?=transformer\.|ln_final\.|positional_embedding|token_embedding\.)", TOWER, "t.")]      # open_clip's texts
IGNORED = re.compile(r"position_ids$|rotary_emb\.inv_freq$|masked_bias$|attn_mask$|image_newline$")


def gguf_name(name):
    """None for a name that no table knows."""
    for prefix, table, before in FAMILIES:
        for pattern, replacement in table:
            match = re.fullmatch("(?:%s)(?:%s)" % (prefix, pattern), name)
            if match:
                return before + match.expand(replacement)
    return None


def pieces(target, t):
    """{GGUF's name: tensor}: open_clip keeps q, k, v in one tensor, and multiplies by its projections from the other side."""
    if "{qkv}" in target and t.shape and t.shape[0] % 3 == 0:
        n = t.shape[0] // 3
        return {target.replace("{qkv}", letter): t.part(i * n, n) for i, letter in enumerate("qkv")}
    if target.endswith("_projection.T") and len(t.shape) == 2:
        return {target[:-1] + "weight": t.transposed(1, 0)}
    return {target: t}


def renamed(tensors):
    """{GGUF's name: (tensor, its name in the checkpoint)}, and the names that no table knows."""
    known, unknown = {}, []
    for name, t in tensors.items():
        if IGNORED.search(name):
            continue
        target = gguf_name(name)
        if target is None:
            unknown.append(name)
            continue
        for target, part in pieces(target, t).items():
            if target in known:
                raise Problem(t.path, "%s and %s are both %s", name, known[target][1], target)
            known[target] = (part, name)
    return known, unknown


# ---- tokenizers --------------------------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)      # tokenizer.ggml.token_type, SentencePiece's numbers
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")


def protobuf(data, where):
    """The fields of a message: (number, value), value an int for varints, bytes for all else."""
    at = 0

    def varint(at):
        value = shift = 0
        while at < len(data) and shift < 64:
            value |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128:
                return value, at
        raise Problem(where, "byte %d: a number that does not end", at)

    while at < len(data):
        tag, at = varint(at)
        check(tag >> 3, where, "byte %d: a field without a number", at)
        if tag & 7 == 0:
            value, at = varint(at)
            yield tag >> 3, value
            continue
        n, at = varint(at) if tag & 7 == 2 else ({1: 8, 5: 4}.get(tag & 7, len(data) + 1), at)
        check(n <= len(data) - at, where, "byte %d: a field that reaches past the end", at)
        yield tag >> 3, data[at:at + n]
        at += n


class Vocabulary:
    """Tokens in the order of their ids, and what GGUF says about them."""

    def __init__(self, where, model, pre=None):
        self.where, self.model, self.pre = where, model, pre
        self.tokens, self.types, self.scores, self.merges = [], [], None, None
        self.add_bos = self.add_eos = self.space_prefix = None
        self.added = set()                              # ids of tokens that came later

    def put(self, i, token, kind):
        """An added token; the gap before it, if there is one, is filled."""
        check(is_count(i, 1 << 20) and isinstance(token, str) and self.tokens[i:i + 1] in ([], [token], ["[PAD%d]" % i]),
              self.where, "an added token with the id %s", shown(i))
        self.fill(i + 1)
        self.tokens[i], self.types[i] = token, kind
        self.added.add(i)

    def leave_out(self, n):
        """Added tokens from id n on, for which the model has no embedding."""
        if len(self.tokens) > n and self.added.issuperset(range(n, len(self.tokens))):
            note("%s: added tokens without a row in the model's embedding are left out: %s" % (self.where, ", ".join(self.tokens[n:][:4])))
            for values in (self.tokens, self.types, self.scores or []):
                del values[n:]

    def fill(self, n):
        for i in range(len(self.tokens), n):
            self.tokens.append("[PAD%d]" % i)
            self.types.append(UNUSED)
            if self.scores is not None:
                self.scores.append(-10000.0)


def read_sentencepiece(path):
    vocabulary = Vocabulary(path, "llama")
    vocabulary.scores, vocabulary.space_prefix, kind, strips = [], True, 1, True
    for field, value in protobuf(read_small(path), path):
        if field not in (1, 2, 3) or not isinstance(value, bytes):
            continue
        message = dict(protobuf(value, path))
        if field == 1:                                  # SentencePiece: 1 piece, 2 score, 3 type
            text, score, token_type = message.get(1), message.get(2, bytes(4)), message.get(3, NORMAL)
            check(isinstance(text, bytes) and isinstance(score, bytes) and len(score) == 4 and token_type in range(1, 7), path,
                  "piece %d is damaged", len(vocabulary.tokens))
            try:
                vocabulary.tokens.append(text.decode("utf-8"))
            except UnicodeDecodeError:
                raise Problem(path, "piece %d is no UTF-8", len(vocabulary.tokens))
            vocabulary.scores.append(struct.unpack("<f", score)[0])
            vocabulary.types.append(token_type)
        elif field == 2:                                # TrainerSpec: 3 model_type
            kind = message.get(3, 1)
        else:                                           # NormalizerSpec: 3 add_dummy_prefix, 4 remove_extra_whitespaces
            vocabulary.space_prefix, strips = bool(message.get(3, 1)), bool(message.get(4, 1))
    check(vocabulary.tokens, path, "holds no pieces; is it a SentencePiece model?")
    check(kind == 2, path, "a SentencePiece model of type %s; LLaMA's are BPE (2)", kind)
    if strips:
        note("%s strips extra spaces, which LLaMA's do not and astrovl does not: texts with several spaces in a row may give "
             "other tokens" % path)
    return vocabulary


def flattened(node, inner):
    """The steps of a normalizer or pre-tokenizer of tokenizer.json, taken out of their sequences."""
    if not isinstance(node, dict):
        return []
    if node.get("type") != "Sequence":
        return [node]
    children = node.get(inner) if isinstance(node.get(inner), list) else [{"type": "unreadable"}]
    return [step for child in children for step in flattened(child, inner)]


def word_rule(steps, where):
    """llama.cpp's name (tokenizer.ggml.pre) for the way a byte-level BPE cuts text into words."""
    kinds = [step.get("type") for step in steps]
    level = steps[-1] if kinds and kinds[-1] == "ByteLevel" else {}
    if not level.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and level.get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and level.get("use_regex", True) and steps[0].get("individual_digits"):
            return "smollm"
        pattern = steps[0].get("pattern") if kinds == ["Split", "ByteLevel"] else None
        if isinstance(pattern, dict) and pattern.get("Regex") == LLAMA3_WORDS and not level.get("use_regex", True):
            return "llama-bpe"
    raise Problem(where, "the pre-tokenizer (%s) is none of LLaMA-3's, SmolLM's and GPT-2's", ", ".join(map(str, kinds)) or "none")


def bpe_pieces(vocabulary, ids, pairs):
    """ids: {piece: id};   pairs: (where it stands, a merge as two pieces or "left right"), best first"""
    check(ids and all(is_count(i) for i in ids.values()) and sorted(ids.values()) == list(range(len(ids))), vocabulary.where,
          "the vocabulary's ids are not 0 to n - 1")
    vocabulary.tokens, vocabulary.types, vocabulary.merges = sorted(ids, key=ids.get), [NORMAL] * len(ids), []
    for where, pair in pairs:
        pair = pair.split(" ") if isinstance(pair, str) else pair
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part in ids for part in pair) or \
                pair[0] + pair[1] not in ids:
            raise Problem(where, "%s is not two tokens that make a third", shown(pair))
        vocabulary.merges.append(pair)


def read_bpe_json(path):
    """tokenizer.json of the tokenizers library: byte-level BPE, SentencePiece's BPE rewritten, or CLIP's."""
    whole = Config(parse_json(read_small(path), path), path)
    model = whole.section("model")
    merges = model.items("merges")
    check(model.values.get("type", "BPE") == "BPE" and merges, path, "a tokenizer of type %s with %d merges; supported is BPE",
          shown(model.get("type")), len(merges))
    normalizer, words = flattened(whole.get("normalizer"), "normalizers"), flattened(whole.get("pre_tokenizer"), "pretokenizers")
    check(not model.get("continuing_subword_prefix"), path,
          "pieces with a prefix inside words (continuing_subword_prefix) are not supported")
    spm = bool(model.get("byte_fallback"))
    vocabulary = Vocabulary(path, "llama" if spm else "gpt2")
    bpe_pieces(vocabulary, model.section("vocab").values, (("%s: merge %d" % (path, i), pair) for i, pair in enumerate(merges)))
    if model.get("end_of_word_suffix") == "</w>":       # CLIP: its rule is known, and told by no key
        pass
    elif spm:
        spm_from_merges(vocabulary, model.get("unk_token"))
        vocabulary.space_prefix = any(step.get("type") == "Prepend" for step in normalizer) or any(
            step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in words)
    else:
        if normalizer:
            raise Problem(path, "the normalizer %s; byte-level BPE of LLaMA's kind has none", shown(normalizer[0].get("type")))
        vocabulary.pre = word_rule(words, path)
    for token in whole.items("added_tokens"):
        check(isinstance(token, dict), path, "added_tokens are no objects")
        i, kind = token.get("id"), CONTROL if token.get("special") else USER_DEFINED
        known = is_count(i, len(vocabulary.types) - 1) and vocabulary.types[i] in (UNKNOWN, BYTE)
        vocabulary.put(i, token.get("content"), vocabulary.types[i] if known else kind)
    read_template(vocabulary, whole.get("post_processor"))
    return vocabulary


def spm_from_merges(vocabulary, unknown):
    """SentencePiece merges the pair with the best score; its merges as a list are sorted by it, so a rank serves as score."""
    rank = {}
    for i, (left, right) in enumerate(vocabulary.merges):
        rank.setdefault(left + right, i)
    for i, token in enumerate(vocabulary.tokens):
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            vocabulary.types[i] = BYTE
        elif token == unknown:
            vocabulary.types[i] = UNKNOWN
    vocabulary.scores = [float(-rank[token]) if token in rank else -1e6 for token in vocabulary.tokens]


def read_template(vocabulary, processor):
    """Which special tokens go around a text: the post-processor's template for a single one."""
    for step in flattened(processor, "processors"):
        single = step.get("single") if step.get("type") == "TemplateProcessing" else None
        if isinstance(single, list):
            kinds = [next(iter(item), None) if isinstance(item, dict) else None for item in single]
            vocabulary.add_bos = kinds[:1] == ["SpecialToken"]
            vocabulary.add_eos = len(kinds) > 1 and kinds[-1] == "SpecialToken"


def read_bpe_pair(vocab_path, merges_path):
    """vocab.json and merges.txt, as CLIP and GPT-2 have them."""
    vocabulary = Vocabulary(vocab_path, "gpt2", "gpt-2")
    lines = enumerate(read_small(merges_path).decode("utf-8", "replace").split("\n"), 1)
    bpe_pieces(vocabulary, parse_json(read_small(vocab_path), vocab_path),
               (("%s: line %d" % (merges_path, n), line.rstrip("\r")) for n, line in lines
                if line.strip() and not (n == 1 and line.startswith("#version"))))
    return vocabulary


def read_vocabulary(files, clip=False):
    model, fast, vocab, merges = map(files.find, ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt"))
    if model and not clip:
        if not re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", read_bytes(model, 200)):
            return read_sentencepiece(model)
        check(fast, model, "a vocabulary of tiktoken, as Meta's LLaMA-3 has it; add tokenizer.json of the model's -hf folder")
        return read_bpe_json(fast)
    if vocab and merges and (clip or not fast):
        return read_bpe_pair(vocab, merges)
    check(fast, files.folders[0], "no tokenizer (tokenizer.model, tokenizer.json, or vocab.json with merges.txt) beside the "
          "weights; copy it there, or let --base name a folder that has it")
    return read_bpe_json(fast)


def add_tokens(vocabulary, files):
    """What other files of a transformers tokenizer say: tokens added later, and whether texts get BOS and EOS."""
    settings, known = files.config("tokenizer_config.json"), len(vocabulary.tokens)
    for token, i in files.config("added_tokens.json").values.items():
        if not is_count(i) or i >= known:
            vocabulary.put(i, token, USER_DEFINED)
    decoder = settings.get("added_tokens_decoder")
    later = [(int(i), token) for i, token in (decoder.items() if isinstance(decoder, dict) else ()) if re.fullmatch("[0-9]{1,9}", i)]
    if vocabulary.where.endswith(".model"):             # tokenizer.json may know more than the SentencePiece model
        tokens = files.config("tokenizer.json").items("added_tokens")
        later += [(token["id"], token) for token in tokens if isinstance(token, dict) and is_count(token.get("id"), 1 << 20)]
    for i, token in later:
        if i >= known and isinstance(token, dict):
            vocabulary.put(i, token.get("content"), CONTROL if token.get("special") else USER_DEFINED)
    for flag in ("add_bos", "add_eos"):
        value = settings.get(flag + "_token")
        if getattr(vocabulary, flag) is None and isinstance(value, bool):
            setattr(vocabulary, flag, value)
    if isinstance(settings.get("add_prefix_space"), bool) and vocabulary.model == "llama":
        vocabulary.space_prefix = settings.get("add_prefix_space")


def special_ids(vocabulary, files, config):
    """{GGUF's key: id}: by the tokenizer's spelling, else by the model's configuration."""
    spelled = {**files.config("special_tokens_map.json").values, **files.config("tokenizer_config.json").values}
    result = {}
    for name, word in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token, i = spelled.get(name + "_token"), config.get(name + "_token_id")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in vocabulary.tokens:
            i = vocabulary.tokens.index(token)
        i = i[0] if isinstance(i, list) and i else i
        if is_count(i, len(vocabulary.tokens) - 1):
            result[word + "_token_id"] = i
    return result


def chat_template(files):
    path = files.find("chat_template.jinja")
    if path:
        return read_small(path).decode("utf-8", "replace")
    for name in ("chat_template.json", "tokenizer_config.json", "processor_config.json"):
        template = files.config(name).get("chat_template")
        if isinstance(template, list):                  # several, by name
            template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}.get("default")
        if isinstance(template, str):
            return template
    return None


def put_vocabulary(gguf, files, config, n_vocab):
    vocabulary = read_vocabulary(files)
    add_tokens(vocabulary, files)
    vocabulary.leave_out(n_vocab)
    n_tokens = len(vocabulary.tokens)
    check(n_tokens <= n_vocab, vocabulary.where, "%d tokens, but the model's embedding has only %d rows", n_tokens, n_vocab)
    vocabulary.fill(n_vocab)                            # llama.cpp wants a token for every row
    is_spm = vocabulary.model == "llama"
    merges = None if is_spm else [" ".join(pair) for pair in vocabulary.merges]
    ids = special_ids(vocabulary, files, config)
    for key, value in (("model", vocabulary.model), ("pre", vocabulary.pre or "default"), ("tokens", vocabulary.tokens),
                       ("scores", vocabulary.scores), ("token_type", vocabulary.types), ("merges", merges), *ids.items(),
                       ("add_bos_token", is_spm if vocabulary.add_bos is None else vocabulary.add_bos),
                       ("add_eos_token", bool(vocabulary.add_eos)), ("add_space_prefix", vocabulary.space_prefix)):
        gguf.put("tokenizer.ggml." + key, value)
    gguf.put("tokenizer.chat_template", chat_template(files) or None)


# ---- GGUF --------------------------------------------------------------------------------------------------------------
# Version 3, little-endian. Source: ggml-org/ggml, docs/gguf.md.

def gguf_string(text):
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def gguf_value(value, in_array=False):
    """(its type's number, its bytes). Python's type tells GGUF's; whole numbers are unsigned, but in arrays."""
    if isinstance(value, list):
        items = [gguf_value(item, True) for item in value]
        return 9, struct.pack("<IQ", items[0][0] if items else 8, len(items)) + b"".join(data for _, data in items)
    if isinstance(value, str):
        return 8, gguf_string(value)
    kind, code = {bool: (7, "<?"), float: (6, "<f"), int: (5, "<i") if in_array else (4, "<I")}[type(value)]
    return kind, struct.pack(code, value)


class Gguf:
    def __init__(self, path):
        self.path, self.keys, self.tensors = path, {}, []

    def put(self, key, value):
        """Metadata, if there is a value; returns it. In one file for all, the language model's name stands."""
        if value is not None and key not in self.keys:
            kind, data = gguf_value(value)
            self.keys[key] = gguf_string(key) + struct.pack("<I", kind) + data
        return value

    def tensor(self, name, shape, source, wide):
        """shape: slowest dimension first; wide: as float32, whatever the checkpoint has."""
        self.tensors.append((name, shape, source, "F32" if wide else source.dtype))

    def n_bytes(self):
        return sum(prod(shape) * SIZES[dtype] for _, shape, _, dtype in self.tensors)

    def write(self, path, report):
        n_values = {dtype: sum(prod(shape) for _, shape, _, d in self.tensors if d == dtype) for dtype in GGUF_TYPES}
        self.put("general.file_type", FILE_TYPES[max(n_values, key=n_values.get)])
        self.put("general.alignment", 32)
        with open(path, "wb") as file:
            file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(self.tensors), len(self.keys)) + b"".join(self.keys.values()))
            offset = 0
            for name, shape, _, dtype in self.tensors:
                sizes = struct.pack("<I%dQ" % len(shape), len(shape), *reversed(shape))
                file.write(gguf_string(name) + sizes + struct.pack("<IQ", GGUF_TYPES[dtype], offset))
                offset += -(-prod(shape) * SIZES[dtype] // 32) * 32
            for name, shape, source, dtype in self.tensors:
                file.write(bytes(-file.tell() % 32))
                start = file.tell()
                for chunk in source.chunks():
                    report(file.write(chunk if dtype == source.dtype else widened(chunk, source.dtype)))
                if file.tell() - start != prod(shape) * SIZES[dtype]:
                    raise Problem(source.path, "%s has not the values of its shape", name)
            file.write(bytes(-file.tell() % 32))


# ---- models ------------------------------------------------------------------------------------------------------------

class Weights:
    """The checkpoint's tensors, handed out once each: what a model asks for is checked, what is left over is reported."""

    def __init__(self, source, tensors, unknown):
        self.source, self.tensors, self.unknown, self.used = source, tensors, unknown, set()

    def has(self, name):
        return name in self.tensors

    def shape(self, name):
        return self.tensors[name][0].shape if name in self.tensors else ()

    def move(self, gguf, name, shape, target=None, n_head=0):
        """n_head: RoPE's halves of each head's rows become neighbours, as GGUF keeps them."""
        check(self.has(name), self.source, "lacks the tensor that becomes %s %s", name, list(shape))
        (t, original), target = self.tensors[name], target or name
        self.used.add(name)
        check(shape == t.shape, t.path, "tensor %s is %s; the configuration asks for %s", original, list(t.shape), list(shape))
        check(t.dtype in GGUF_TYPES, t.path, "tensor %s is of type %s; supported: F32, F16, BF16 (of a quantised checkpoint take "
              "the original)", original, t.dtype)
        if n_head:
            t = t.split(n_head, 2, shape[0] // n_head // 2)
            t = t.transposed(0, 2, 1, *range(3, len(t.shape)))
        conv = target == "v.patch_embd.weight" and t.dtype == "BF16"       # llama.cpp convolves in F16 or F32
        gguf.tensor(target, shape or (1,), t, len(shape) < 2 or target.endswith("position_embd.weight") or conv)

    def linear(self, gguf, name, n_out, n_in, bias=None, target=None, n_head=0):
        """bias None: moved if there is one"""
        self.move(gguf, name + ".weight", (n_out, n_in), (target or name) + ".weight", n_head)
        if bias or bias is None and self.has(name + ".bias"):
            self.move(gguf, name + ".bias", (n_out,), (target or name) + ".bias", n_head)

    def norm(self, gguf, name, n_embd):
        self.move(gguf, name + ".weight", (n_embd,))
        self.move(gguf, name + ".bias", (n_embd,))

    def leftover(self):
        left = [original for name, (_, original) in self.tensors.items() if name not in self.used] + self.unknown
        if left:
            note("%d tensors of the checkpoint were not used: %s" % (len(left), ", ".join(left[:4] + ["..."] * (len(left) > 4))))


def put_rope(gguf, config, head_dim):
    """RoPE's base and scaling; transformers 5 gathers them in rope_parameters."""
    scaling = config.section("rope_scaling" if config.get("rope_scaling") else "rope_parameters")
    theta = gguf.put("llama.rope.freq_base", scaling.real("rope_theta", config.real("rope_theta", 10000.0)))
    kind = scaling.one_of("rope_type", ("default", "linear", "llama3"), scaling.get("type", "default"))
    if kind == "linear":
        gguf.put("llama.rope.scaling.type", "linear")
        gguf.put("llama.rope.scaling.factor", scaling.real("factor", None))
    if kind == "llama3":     # one divisor per frequency; Source: transformers, modeling_rope_utils.py
        factor, low, high = (scaling.real(key, None) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        context = scaling.number("original_max_position_embeddings")
        check(0 < low < high and factor > 0 and theta > 0, scaling.where, "low_freq_factor, high_freq_factor or factor make no sense")
        divisors = []
        for i in range(0, head_dim, 2):
            turns = context / (2 * pi * theta ** (i / head_dim))      # in the context it was trained for
            smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
        gguf.tensor("rope_freqs.weight", (len(divisors),), Made(divisors), False)


def put_llama(gguf, weights, config, files, name):
    """Hyperparameters (defaults: transformers' LlamaConfig), vocabulary and tensors of the language model."""
    config.one_of("model_type", ("llama", "llava", "llava_llama", "mistral", "llava_mistral"), "llama")
    config.one_of("hidden_act", ("silu",), "silu")
    gguf.put("general.architecture", "llama")
    gguf.put("general.name", name)

    def put(key, *where):
        return gguf.put("llama." + key, config.number(*where))

    n_vocab = put("vocab_size", "vocab_size", 32000)
    n_ctx = config.number("max_position_embeddings", 2048)
    window = config.number("sliding_window") if config.get("sliding_window") and "mistral" in str(config.get("model_type")) else n_ctx
    if window < n_ctx:
        note("%s: attention looks back %d positions. The context is limited to as many, where that makes no difference" % (config.where, window))
    gguf.put("llama.context_length", min(n_ctx, window))
    n_embd = put("embedding_length", "hidden_size", 4096, 1 << 20)
    n_layer = put("block_count", "num_hidden_layers", 32, 1024)
    n_ff = put("feed_forward_length", "intermediate_size", 11008, 1 << 22)
    n_head = put("attention.head_count", "num_attention_heads", 32, n_embd)
    n_head_kv = put("attention.head_count_kv", "num_key_value_heads", n_head, n_head)
    gguf.put("llama.attention.layer_norm_rms_epsilon", config.real("rms_norm_eps", 1e-6))
    head_dim = put("rope.dimension_count", "head_dim", n_embd // n_head, 65536)
    check(head_dim % 2 == 0 and n_head % n_head_kv == 0, config.where,
          "%d heads over %d key heads of %d values", n_head, n_head_kv, head_dim)
    if head_dim != n_embd // n_head:
        gguf.put("llama.attention.key_length", head_dim)
        gguf.put("llama.attention.value_length", head_dim)
    weights.move(gguf, "token_embd.weight", (n_vocab, n_embd))      # first: it tells an absurd n_vocab
    put_vocabulary(gguf, files, config, n_vocab)
    put_rope(gguf, config, head_dim)
    weights.move(gguf, "output_norm.weight", (n_embd,))
    if config.get("tie_word_embeddings"):
        weights.used.add("output.weight")               # a copy of token_embd.weight, if it is there at all
    else:
        weights.move(gguf, "output.weight", (n_vocab, n_embd))
    n_q, n_kv = n_head * head_dim, n_head_kv * head_dim
    for block in map("blk.%d.".__mod__, range(n_layer)):
        weights.move(gguf, block + "attn_norm.weight", (n_embd,))
        weights.move(gguf, block + "ffn_norm.weight", (n_embd,))
        for part, n_out, n_in, turned in (
                ("attn_q", n_q, n_embd, n_head), ("attn_k", n_kv, n_embd, n_head_kv), ("attn_v", n_kv, n_embd, 0),
                ("attn_output", n_embd, n_q, 0), ("ffn_gate", n_ff, n_embd, 0), ("ffn_up", n_ff, n_embd, 0),
                ("ffn_down", n_embd, n_ff, 0)):
            weights.linear(gguf, block + part, n_out, n_in, n_head=turned)


def put_tower(gguf, weights, config, tower, sizes, swapped):
    """The layers of a CLIP tower, "v" or "t". swapped: clip.cpp calls fc1 ffn_down and fc2 ffn_up."""
    key, kind = ("clip.vision.", "clip_vision_model") if tower == "v" else ("clip.text.", "clip_text_model")
    config.one_of("model_type", (kind, "clip"), kind)
    n_embd = gguf.put(key + "embedding_length", config.number("hidden_size", sizes[0], 65536))
    n_ff = gguf.put(key + "feed_forward_length", config.number("intermediate_size", sizes[1], 1 << 20))
    n_layer = gguf.put(key + "block_count", config.number("num_hidden_layers", 12, 1024))
    n_head = gguf.put(key + "attention.head_count", config.number("num_attention_heads", sizes[2], 65536))
    check(n_embd % n_head == 0, config.where, "%d heads over %d values", n_head, n_embd)
    gguf.put(key + "attention.layer_norm_epsilon", config.real("layer_norm_eps", 1e-5))
    gguf.put("clip.use_gelu", config.one_of("hidden_act", ("gelu", "quick_gelu"), "quick_gelu") == "gelu")
    up, down = ("ffn_down", "ffn_up") if swapped else ("ffn_up", "ffn_down")
    for i in range(n_layer):
        block = "%s.blk.%d." % (tower, i)
        weights.norm(gguf, block + "ln1", n_embd)
        weights.norm(gguf, block + "ln2", n_embd)
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            weights.linear(gguf, block + part, n_embd, n_embd, True)
        weights.linear(gguf, block + "fc1", n_ff, n_embd, True, block + up)
        weights.linear(gguf, block + "fc2", n_embd, n_ff, True, block + down)
    return n_embd, n_layer


def put_vision(gguf, weights, config, files, is_clip, aspect):
    """The vision tower and what it wants images to look like. Defaults: transformers' CLIPVisionConfig."""
    n_embd, n_layer = put_tower(gguf, weights, config, "v", (768, 3072, 12), is_clip)
    size = gguf.put("clip.vision.image_size", config.number("image_size", 224, 8192))
    patch = gguf.put("clip.vision.patch_size", config.number("patch_size", 32, 8192))
    config.one_of("num_channels", (3,), 3)
    check(patch <= size, config.where, "patches of %d pixels in images of %d", patch, size)
    settings = files.config("preprocessor_config.json")
    settings = settings if settings.values else files.config("processor_config.json")
    settings = settings.section("image_processor") if settings.get("image_processor") else settings
    open_clip = files.config("open_clip_config.json").section("preprocess_cfg")
    for name, usual, least, most in (("mean", [0.48145466, 0.4578275, 0.40821073], 0, 1),
                                     ("std", [0.26862954, 0.26130258, 0.27577711], 1e-6, 1e6)):
        color = settings.get("image_" + name, open_clip.get(name, usual))
        check(isinstance(color, list) and len(color) == 3 and all(isinstance(c, (int, float)) and least <= c <= most for c in color),
              settings.where, "image_%s is not three numbers from %g to %g", name, least, most)
        gguf.put("clip.vision.image_" + name, [float(c) for c in color])
    settings.one_of("resample", (3, None), None)        # 3: bicubic
    for key in ("do_resize", "do_rescale", "do_normalize", *["do_center_crop"] * (not aspect)):
        settings.one_of(key, (True, None), None)
    for key in () if aspect else ("size", "crop_size"):
        wanted = settings.get(key, size)
        wanted = wanted if is_count(wanted) else [v for v in wanted.values() if v is not None] if isinstance(wanted, dict) else None
        check(wanted in (size, [size]) or key == "crop_size" and wanted == [size, size], settings.where, "%s is %s; supported: the shorter "
              "edge at the tower's image_size (%d), then a square of it", key, shown(settings.get(key)), size)
    gguf.put("clip.vision.image_aspect_ratio", aspect or ("pad" if settings.get("do_pad") else "crop"))
    weights.move(gguf, "v.class_embd", (n_embd,))
    weights.move(gguf, "v.patch_embd.weight", (n_embd, 3, patch, patch))
    weights.move(gguf, "v.position_embd.weight", (1 + (size // patch) ** 2, n_embd))
    weights.norm(gguf, "v.pre_ln", n_embd)
    if is_clip:
        weights.norm(gguf, "v.post_ln", n_embd)
    else:                                               # LLaVA's features are taken before it, but llama.cpp would apply it
        weights.used.update(("v.post_ln.weight", "v.post_ln.bias"))
    return n_embd, n_layer


def put_projector(gguf, weights, config, n_vision, n_embd, n_layer):
    layer = config.get("vision_feature_layer", config.get("mm_vision_select_layer", -2))
    layer = layer[0] if isinstance(layer, list) and len(layer) == 1 else layer
    check(isinstance(layer, int) and not isinstance(layer, bool) and -n_layer - 1 <= layer <= n_layer, config.where, "the vision "
          "tower's layer %s is taken for features; one number from %d to %d is supported", shown(layer), -n_layer - 1, n_layer)
    config.one_of("vision_feature_select_strategy", ("default",), "default")
    config.one_of("mm_vision_select_feature", ("patch",), "patch")
    config.one_of("projector_hidden_act", ("gelu",), "gelu")
    kind = config.one_of("mm_projector_type", ("linear", "mlp2x_gelu", None), None)
    check(kind is None or (kind == "mlp2x_gelu") == weights.has("mm.2.weight"), config.where,
          "mm_projector_type is %s, which does not fit the projector's tensors", shown(kind))
    gguf.put("clip.vision.feature_layer", [layer if layer >= 0 else n_layer + 1 + layer])
    gguf.put("clip.projector_type", "mlp" if weights.has("mm.2.weight") else "linear")
    gguf.put("clip.vision.projection_dim", n_embd)
    n_hidden = (weights.shape("mm.0.weight") or (n_embd,))[0]
    weights.linear(gguf, "mm.0", n_hidden, n_vision)
    if weights.has("mm.2.weight"):
        weights.linear(gguf, "mm.2", n_embd, n_hidden)


def put_clip(gguf, name, **parts):
    gguf.put("general.architecture", "clip")
    gguf.put("general.name", name)
    for part in ("text_encoder", "vision_encoder", "llava_projector"):
        gguf.put("clip.has_" + part, part in parts)


def put_head(gguf, weights, tower, n_embd):
    """PAPERCLIP's two dense layers, if they are there; returns the length of what goes into the projection."""
    if not weights.has(tower + ".head.0.weight"):
        return n_embd
    n_hidden, n_out = ((weights.shape("%s.head.%d.weight" % (tower, i)) + (0,))[0] for i in (0, 2))
    weights.linear(gguf, tower + ".head.0", n_hidden, n_embd, True)
    weights.linear(gguf, tower + ".head.2", n_out, n_hidden, True)
    return n_out


# Keys of open_clip that are read, and what the others have in CLIP (else: nothing, 0 or false).
OPEN_CLIP_READ = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "width", "layers", "heads", "head_width", "mlp_ratio", "patch_size",
                  "image_size", "context_length", "vocab_size", "mean", "std", "size", "init_logit_scale", "custom_text", "patch_dropout")
OPEN_CLIP = {}
OPEN_CLIP_VISION = {"pool_type": "tok", "pos_embed_type": "learnable", "attn_pooler_queries": 256, "attn_pooler_heads": 8}
OPEN_CLIP_TEXT = {"pool_type": "argmax", "proj_type": "linear"}
OPEN_CLIP_IMAGES = {"interpolation": "bicubic", "resize_mode": "shortest", "mode": "RGB"}


def open_clip_config(config):
    """open_clip_config.json's model_cfg as the configuration that transformers would write."""
    model = config.section("model_cfg")
    vision, text = model.section("vision_cfg"), model.section("text_cfg")
    check(not vision.get("timm_model_name") and not text.get("hf_model_name"), config.where,
          "towers of timm or Hugging Face inside open_clip are not supported, only CLIP's own")

    for section, known in ((model, OPEN_CLIP), (vision, OPEN_CLIP_VISION), (text, OPEN_CLIP_TEXT), (config.section("preprocess_cfg"), OPEN_CLIP_IMAGES)):
        for key, value in section.values.items():
            check(not value or key not in known and key in OPEN_CLIP_READ or value == known.get(key), section.where,
                  "%s is %s; CLIP has %s", key, shown(value), shown(known.get(key, "none")))
    size = config.section("preprocess_cfg").get("size")
    check(size in (None, vision.get("image_size"), [vision.get("image_size")] * 2), config.where, "preprocess_cfg: size is %s, but "
          "vision_cfg: image_size is %s", shown(size), shown(vision.get("image_size")))
    n_vision, n_text = vision.number("width", 768, 65536), text.number("width", 512, 65536)

    def tower(section, n_embd, n_head, **more):
        return {"hidden_size": n_embd, "intermediate_size": int(n_embd * section.real("mlp_ratio", 4.0)),
                "num_hidden_layers": section.get("layers", 12), "num_attention_heads": n_head,
                "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu", **more}

    return Config({"projection_dim": model.get("embed_dim"), "model_type": "clip",
                   "vision_config": tower(vision, n_vision, n_vision // vision.number("head_width", 64),
                                          image_size=vision.get("image_size", 224), patch_size=vision.get("patch_size", 16)),
                   "text_config": tower(text, n_text, text.get("heads", 8), vocab_size=text.get("vocab_size", 49408),
                                        max_position_embeddings=text.get("context_length", 77))}, config.where)


def convert_clip(out, weights, files, options, name):
    """clip.cpp's two-tower file. Defaults: transformers' CLIPTextConfig."""
    open_clip, gguf = files.config("open_clip_config.json"), Gguf(out)
    config = open_clip_config(open_clip) if open_clip.values else files.config("config.json", needed=True)
    config.one_of("model_type", ("clip",), "clip")
    text, vision = config.section("text_config"), config.section("vision_config")
    put_clip(gguf, name, text_encoder=True, vision_encoder=True)
    n_joint = config.number("projection_dim", 512, 65536)
    n_embd, _ = put_vision(gguf, weights, vision, files, True, options.image_aspect)
    weights.linear(gguf, "visual_projection", n_joint, put_head(gguf, weights, "v", n_embd), False)
    n_embd, _ = put_tower(gguf, weights, text, "t", (512, 2048, 8), True)
    check(vision.get("hidden_act", "quick_gelu") == text.get("hidden_act", "quick_gelu"), config.where,
          "the towers have different activations")
    n_vocab = text.number("vocab_size", 49408)
    n_ctx = gguf.put("clip.text.context_length", text.number("max_position_embeddings", 77, 65536, 2))
    gguf.put("clip.text.projection_dim", n_joint)
    gguf.put("clip.vision.projection_dim", n_joint)
    weights.move(gguf, "t.token_embd.weight", (n_vocab, n_embd))
    weights.move(gguf, "t.position_embd.weight", (n_ctx, n_embd))
    weights.norm(gguf, "t.post_ln", n_embd)
    weights.linear(gguf, "text_projection", n_joint, put_head(gguf, weights, "t", n_embd), False)
    if weights.has("logit_scale"):
        weights.move(gguf, "logit_scale", weights.shape("logit_scale") and (1,))      # PyTorch knows numbers without a dimension
    vocabulary = read_vocabulary(files, clip=True)
    n_tokens = len(vocabulary.tokens)
    check(n_tokens <= n_vocab, vocabulary.where, "%d tokens, but the text tower has %d rows", n_tokens, n_vocab)
    gguf.put("tokenizer.ggml.tokens", vocabulary.tokens)
    gguf.put("tokenizer.ggml.merges", [" ".join(pair) for pair in vocabulary.merges])
    return [gguf]


def vision_config(config, weights, options, files):
    """The vision tower's configuration: inside LLaVA's, in --vision's folder, or known from the tower's name."""
    found = files.config("config.json", needed=True) if options.vision and not config.get("vision_config") else config
    if found is not config or found.get("vision_config"):
        return found.section("vision_config") if found.get("vision_config") else found
    shape, positions = weights.shape("v.patch_embd.weight"), weights.shape("v.position_embd.weight")
    tower = str(config.get("mm_vision_tower", config.get("mm_vision_tower_name", "")))
    # "openai/clip-vit-large-patch14-336", a folder of that name, or a path into Hugging Face's cache
    check(re.search(r"clip-vit-(base|large)-patch\d+(-336)?(/|$)", tower) and len(shape) == 4 and shape[0] % 64 == 0 and
          positions and positions[0] > 0, config.where,
          "says nothing about the vision tower; name its folder (such as openai/clip-vit-large-patch14-336) with --vision")
    n_layer = sum(1 for name in weights.tensors if re.fullmatch(r"v\.blk\.\d+\.ln1\.weight", name))
    return Config({"hidden_size": shape[0], "intermediate_size": 4 * shape[0], "num_hidden_layers": n_layer,
                   "num_attention_heads": shape[0] // 64, "patch_size": shape[2],
                   "image_size": shape[2] * int((positions[0] - 1) ** 0.5 + 0.5)}, config.where + ": " + tower)


def convert_llava(out, weights, files, options, name):
    """llama.cpp's pair of files, or both halves in one."""
    config = files.config("config.json", needed=True)
    config.one_of("model_type", ("llava", "llava_llama", "llama", "llava_mistral", "mistral"), "llava")
    config.one_of("image_aspect_ratio", ("pad", "square", None), None)      # not "anyres", ...: LLaVA-1.6's several tiles per image
    config.one_of("mm_patch_merge_type", ("flat", None), None)
    for key in ("mm_use_im_start_end", "mm_resampler_type", "s2", "s2_scales"):
        config.one_of(key, (False, None), None)
    vision_files = Files(options.vision, *files.folders)
    # The authors' code keeps the language model's numbers at the top, and may leave a stale text_config beside them.
    is_authors = config.get("mm_vision_tower") or config.get("model_type") in ("llava_llama", "llava_mistral")
    text = config if is_authors or not config.get("text_config") else config.section("text_config")
    if text is not config and text.get("tie_word_embeddings") is None:
        text.values["tie_word_embeddings"] = config.get("tie_word_embeddings", False)
    aspect = options.image_aspect or {"pad": "pad", "square": "crop"}.get(str(config.get("image_aspect_ratio")))
    if config.get("mm_vision_tower") and not aspect:
        aspect = "crop"                                 # the authors' code does so where the configuration is silent
    model = Gguf(out)
    put_llama(model, weights, text, files, name)
    mmproj = model if options.single else Gguf(re.sub(r"(\.gguf)?$", "-mmproj.gguf", out, count=1))
    put_clip(mmproj, name, vision_encoder=True, llava_projector=True)
    vision = vision_config(config, weights, options, vision_files)
    n_vision, n_layer = put_vision(mmproj, weights, vision, vision_files, False, aspect)
    put_projector(mmproj, weights, config, n_vision, weights.shape("token_embd.weight")[1], n_layer)
    if not aspect and not vision_files.config("preprocessor_config.json").get("do_pad"):
        note("images are resized and cropped, as the checkpoint's image processor does. LLaVA-1.5 itself, and AstroLLaVA's "
             "training, pad them to a square: --image-aspect pad")
    return [model] if options.single else [model, mmproj]


def convert_llama(out, weights, files, options, name):
    gguf = Gguf(out)
    put_llama(gguf, weights, files.config("config.json", needed=True), files, name)
    return [gguf]


# ---- the program -------------------------------------------------------------------------------------------------------

def gather(options):
    """All tensors: SOURCE's, and from --vision and --base what SOURCE lacks; and the names that no table knows."""
    tensors, unknown = renamed(read_checkpoint(options.source))
    if options.vision and "v.patch_embd.weight" not in tensors:
        tower = renamed(read_checkpoint(options.vision))[0]
        tensors.update({name: tower[name] for name in tower if name.startswith("v.") and not name.startswith("v.head")})
    if options.base and "mm.0.weight" in tensors and "token_embd.weight" not in tensors:
        base, base_unknown = renamed(read_checkpoint(options.base))
        tensors, unknown = {**base, **tensors}, base_unknown + unknown
    return Weights(options.source, tensors, unknown)


def convert(options):
    weights, files = gather(options), Files(options.source, options.base)
    config = files.config("config.json")
    check(not any(c.get("quantization_config") for c in (config, config.section("text_config"), config.section("vision_config"))),
          config.where, "a quantized checkpoint (bitsandbytes, GPTQ, AWQ, ...); convert the original")
    check(not files.find("quantize_config.json"), files.find("quantize_config.json"), "a checkpoint quantized by GPTQ; convert the "
          "original")
    folder = os.path.basename(os.path.abspath(files.folders[0])) or "model"
    out = os.path.realpath(options.output) if options.output else folder + ".gguf"
    if weights.has("t.token_embd.weight"):
        kind = convert_clip
    elif weights.has("mm.0.weight"):
        kind = convert_llava
        for part, what, hint in (("token_embd", "language model", "--base"), ("v.patch_embd", "vision tower", "--vision")):
            check(weights.has(part + ".weight"), options.source,
                  "holds a projector, but no %s: name its folder with %s", what, hint)
    else:
        text = weights.has("token_embd.weight")
        check(text or not weights.has("v.patch_embd.weight"), options.source,
              "a vision tower alone; give it as --vision beside a LLaVA checkpoint")
        check(text, options.source, "none of LLaVA, LLaMA and CLIP; its first tensors are %s",
              ", ".join((weights.unknown + list(weights.tensors))[:4]))
        kind = convert_llama
    outputs = kind(out, weights, files, options, (options.name or folder).encode("utf-8", "replace").decode("utf-8"))
    weights.leftover()
    write_all(outputs, options.quiet)


def write_all(outputs, quiet):
    """Each under a temporary name first; all are renamed when all are complete."""
    total, done, shows = sum(gguf.n_bytes() for gguf in outputs), 0, not quiet and sys.stderr.isatty()

    def report(n):
        nonlocal done
        done += n
        if shows:
            width = 30 * done // max(total, 1)
            print("\r[%-30s] %d / %d MB " % ("#" * width, done >> 20, total >> 20), end="", file=sys.stderr, flush=True)

    for gguf in outputs:
        check(os.path.isfile(gguf.path) or not os.path.exists(gguf.path), gguf.path, "exists and is no file")
        inputs = {source.path for _, _, source, _ in gguf.tensors if isinstance(source, Tensor)}
        check(not any(os.path.exists(gguf.path) and os.path.samefile(gguf.path, path) for path in inputs), gguf.path,
              "is one of the files that are read; name another with -o")
    try:
        for gguf in outputs:
            gguf.write(gguf.path + ".part", report)
        for gguf in outputs:
            os.replace(gguf.path + ".part", gguf.path)
    finally:
        if shows:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
        for part in (gguf.path + ".part" for gguf in outputs):
            if os.path.exists(part):
                os.remove(part)
    for gguf in [] if quiet else outputs:
        print("%s: %d tensors, %.1f MB" % (gguf.path, len(gguf.tensors), os.path.getsize(gguf.path) / 1e6))


def main():
    parser = argparse.ArgumentParser(prog="convert.py", description=__doc__.split("\n")[0], epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="the checkpoint's folder, or one of its weight files")
    parser.add_argument("-o", "--output", metavar="OUT.gguf", help="default: the folder's name, in the current directory; LLaVA's second "
                        "file is OUT-mmproj.gguf")
    parser.add_argument("--vision", metavar="FOLDER", help="where the vision tower is, if SOURCE lacks it")
    parser.add_argument("--base", metavar="FOLDER", help="where else to look for configuration, tokenizer and the language model")
    parser.add_argument("--single", action="store_true", help="LLaVA: one file instead of two")
    parser.add_argument("--image-aspect", choices=("pad", "crop"), help="how images become square (default: as the checkpoint says)")
    parser.add_argument("--name", help="the model's name in the file (default: the folder's)")
    parser.add_argument("--quiet", action="store_true", help="neither progress nor summary")
    options = parser.parse_args()
    try:
        convert(options)
        return 0
    except Problem as e:
        message = str(e)
    except MemoryError:
        message = "%s: out of memory" % options.source
    except RecursionError:
        message = "%s: nested too deeply" % options.source
    except OSError as e:
        message = "%s: %s" % (e.filename or options.source, e.strerror or e)
    except KeyboardInterrupt:
        print("convert.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    message = "".join(c if c.isprintable() else "?" for c in message)
    print("convert.py: error: " + (message if len(message) <= 800 else message[:500] + " ... " + message[-200:]), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
