#!/usr/bin/env python3
"""Turns the checkpoints that people train and publish into the GGUF files that astrovl and llama.cpp run.

Python 3.8 or later, nothing else. Bytes are moved, never recomputed: float32, float16 and bfloat16 stay what they are, but for
small tensors (norms, biases, positions) that llama.cpp wants as float32, which is exact. `astrovl quantize` makes files smaller.
Memory stays below a few hundred megabytes whatever the model's size. A checkpoint may come from anywhere: its sizes are checked
before they are used, and pickles are read by an interpreter that can build tensors and nothing else.
"""

import argparse
import itertools
import json
import os
import pickletools
import re
import reprlib
import struct
import sys
import zipfile

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

MAX_VALUES = 1 << 40        # of one tensor
MAX_JSON = 1 << 28          # bytes of a JSON file or a pickle: the largest tokenizer.json has 2^24
PIECE = 1 << 23             # bytes moved at once
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
GGUF_TYPES = {"F32": 0, "F16": 1, "BF16": 30}
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}      # general.file_type


class Problem(Exception):
    """What is wrong with the input, in one line that names the file."""


def shown(value):
    """A value of a hostile file: its repr could be endless."""
    return reprlib.repr(value)


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

    def n_values(self):
        return product(self.shape)

    def is_contiguous(self):
        return self.strides == row_major(self.shape) or self.n_values() <= 1

    def transposed(self, *axes):
        return Tensor(self.path, self.dtype, self.offset, [self.shape[a] for a in axes], [self.strides[a] for a in axes])

    def part(self, start, count):
        """Rows start..start+count of the first dimension."""
        return Tensor(self.path, self.dtype, self.offset + start * self.strides[0] * SIZES[self.dtype],
                      (count,) + self.shape[1:], self.strides)

    def split(self, *parts):
        """The first dimension as several."""
        inner = [product(parts[i + 1:]) * self.strides[0] for i in range(len(parts))]
        return Tensor(self.path, self.dtype, self.offset, parts + self.shape[1:], inner + list(self.strides[1:]))

    def chunks(self):
        """The values in row-major order, in pieces of bytes."""
        size = SIZES[self.dtype]
        if self.n_values() == 0:
            return
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            if self.is_contiguous():
                left = self.n_values() * size
                while left:
                    piece = read_exactly(file, min(left, PIECE))
                    left -= len(piece)
                    yield piece
                return
            span = sum((n - 1) * step for n, step in zip(self.shape, self.strides)) + 1
            values = memoryview(read_exactly(file, span * size)).cast({1: "B", 2: "H", 4: "I", 8: "Q"}[size])
        run = len(self.shape)                           # dimensions run.. lie without gaps: they move in one go
        while run > 0 and self.strides[run - 1] == product(self.shape[run:]):
            run -= 1
        if run == len(self.shape):                      # none does: the last one is gathered by its stride
            run, step, length = run - 1, self.strides[-1], self.shape[-1]
        else:
            step, length = 1, product(self.shape[run:])
        pieces, n_bytes = [], 0
        for starts in itertools.product(*(range(0, n * s, s) if s else [0] * n for n, s in zip(self.shape[:run], self.strides))):
            at = sum(starts)
            pieces.append(values[at:at + (length - 1) * step + 1:step].tobytes())
            n_bytes += length * size
            if n_bytes >= PIECE:
                yield b"".join(pieces)
                pieces, n_bytes = [], 0
        yield b"".join(pieces)


class Made:
    """A small tensor that no checkpoint holds: float32 values of one dimension."""

    def __init__(self, values):
        self.dtype, self.shape, self.values = "F32", (len(values),), values

    def chunks(self):
        yield struct.pack("<%df" % len(self.values), *self.values)


def product(numbers):
    total = 1
    for n in numbers:
        total *= n
    return total


def row_major(shape):
    return tuple(product(shape[i + 1:]) for i in range(len(shape)))


def read_exactly(file, n):
    data = file.read(n)
    if len(data) != n:
        raise Problem("%s: the file ends at byte %d, %d bytes too early" % (file.name, file.tell(), n - len(data)))
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
    if not isinstance(shape, (list, tuple)) or len(shape) > 8 or not all(is_count(n) for n in shape) or product(shape) > MAX_VALUES:
        raise Problem("%s: the shape %s is not one of a tensor" % (where, shown(shape)))


# ---- JSON --------------------------------------------------------------------------------------------------------------


def no_duplicates(pairs):
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError("the name %s occurs twice" % shown(max(names, key=names.count)))
    return result


def parse_json(data, where):
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=no_duplicates)
        json.dumps(value, ensure_ascii=False).encode("utf-8")      # "\ud800" alone is no character
    except (ValueError, RecursionError) as e:           # UnicodeError is a ValueError
        raise Problem("%s: no valid JSON: %.200s" % (where, e))
    if not isinstance(value, dict):
        raise Problem("%s: JSON, but no object" % where)
    return value


def read_small(path):
    if os.path.getsize(path) > MAX_JSON:
        raise Problem("%s: larger than %d bytes; that is no file of this kind" % (path, MAX_JSON))
    with open(path, "rb") as file:
        return file.read()


# ---- safetensors -------------------------------------------------------------------------------------------------------
# u64 length of a JSON header, the header, the data. {"name": {"dtype", "shape", "data_offsets": [begin, end]}}; the tensors
# fill the data without gaps. Source: huggingface/safetensors, README.


def read_safetensors(path):
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        n = int.from_bytes(read_exactly(file, 8), "little")
        if n > min(size - 8, 100000000):
            raise Problem("%s: the header at byte 0 says it has %d bytes, the file has %d" % (path, n, size))
        header = parse_json(read_exactly(file, n), path + ": header")
    tensors, places = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        where = "%s: tensor %.200s" % (path, name)
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or not isinstance(entry.get("data_offsets"), list):
            raise Problem("%s: the header's entry is incomplete" % where)
        check_shape(entry.get("shape"), where)
        offsets = entry["data_offsets"]
        if len(offsets) != 2 or not all(is_count(o, 1 << 60) for o in offsets):
            raise Problem("%s: data_offsets %s are not two byte numbers" % (where, shown(offsets)))
        dtype = entry["dtype"]
        if dtype in SIZES and offsets[1] - offsets[0] != product(entry["shape"]) * SIZES[dtype]:
            raise Problem("%s: %s %s does not take the %d bytes of its data_offsets" %
                          (where, dtype, list(entry["shape"]), offsets[1] - offsets[0]))
        places.append((offsets[0], offsets[1], name))
        tensors[name] = Tensor(path, dtype, 8 + n + offsets[0], entry["shape"])
    end = 0
    for begin, stop, name in sorted(places):
        if begin != end or stop < begin:
            raise Problem("%s: tensor %.200s begins at byte %d of the data, where %d was to follow: overlapping or missing data" %
                          (path, name, begin, end))
        end = stop
    if end != size - 8 - n:
        raise Problem("%s: the tensors end at byte %d, the file at %d (an incomplete download?)" % (path, 8 + n + end, size))
    return tensors


# ---- PyTorch -----------------------------------------------------------------------------------------------------------
# A zip archive, stored without compression: NAME/data.pkl, a pickle in which each storage is a persistent id
# ("storage", torch.HalfStorage, key, device, n_values), and NAME/data/KEY, the storage's bytes. Source: torch/serialization.py.
#
# A pickle is a program for a stack machine, and a hostile one runs whatever it likes. pickletools (standard library) splits
# it into instructions without running any; run_pickle then does what the few say that a dictionary of tensors needs.

STORAGES = {"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
            "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL"}


class Storage:
    """Values of one type in the file; offset None: only the type is known, a pickle's torch.HalfStorage."""

    def __init__(self, dtype, offset=None, n_values=0):
        self.dtype, self.offset, self.n_values = dtype, offset, n_values


def rebuild_tensor(path, storage, offset, shape, strides, *rest):
    """torch._utils._rebuild_tensor_v2"""
    for numbers in (shape, strides):
        check_shape(numbers, path + ": data.pkl")
    if not isinstance(storage, Storage) or storage.offset is None or not is_count(offset) or len(shape) != len(strides):
        raise TypeError
    span = sum((n - 1) * step for n, step in zip(shape, strides)) + 1 if product(shape) else 0
    if offset + span > storage.n_values or product(shape) > storage.n_values:
        raise Problem("%s: data.pkl: a tensor %s with strides %s from value %d reaches outside its storage of %d values" %
                      (path, list(shape), list(strides), offset, storage.n_values))
    return Tensor(path, storage.dtype, storage.offset + offset * SIZES[storage.dtype], shape, strides)


# what an instruction pushes
ARGUMENTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
CONTAINERS = {"EMPTY_DICT": dict, "EMPTY_LIST": list}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def pickle_global(path, name, functions):
    """What stands for a global: one of the functions that may be called, or a storage's type."""
    module, _, last = name.rpartition(" ")
    if name in functions:
        return functions[name]
    if module == "torch" and last in STORAGES:
        return Storage(STORAGES[last])
    raise Problem("%s: the pickle asks for %.100s, which is no part of a tensor; it may be hostile, and nothing of it was run. Save the "
                  "weights as safetensors." % (path, name.replace(" ", ".")))


def run_pickle(path, data, storage):
    """The object that a pickle makes of dictionaries, lists, tuples, numbers, texts and tensors."""
    functions = {"collections OrderedDict": lambda: {}, "torch Size": tuple, "torch._utils _rebuild_parameter": lambda tensor, *rest: tensor,
                 "torch._utils _rebuild_tensor_v2": lambda *arguments: rebuild_tensor(path, *arguments)}
    stack, marks, memo = [], [], {}

    def since(start):
        items = stack[start:]
        del stack[start:]
        return items

    for op, arg, at in pickletools.genops(data):
        name = op.name
        if name in ARGUMENTS:
            stack.append(arg)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in CONTAINERS:
            stack.append(CONTAINERS[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE" or name in TUPLES:
            stack.append(tuple(since(-TUPLES[name] if name in TUPLES else marks.pop())))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name in ("SETITEM", "SETITEMS"):
            items = since(-2 if name == "SETITEM" else marks.pop())
            if not isinstance(stack[-1], dict) or not all(isinstance(key, (str, int)) for key in items[0::2]):
                raise TypeError
            stack[-1].update(zip(items[0::2], items[1::2]))
        elif name in ("APPEND", "APPENDS"):
            items = since(-1 if name == "APPEND" else marks.pop())
            if not isinstance(stack[-1], list):
                raise TypeError
            stack[-1].extend(items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(pickle_global(path, arg if name == "GLOBAL" else "%s %s" % tuple(since(-2)), functions))
        elif name == "REDUCE":
            function, arguments = since(-2)
            if function not in functions.values() or not isinstance(arguments, tuple):
                raise TypeError
            stack.append(function(*arguments))
        elif name == "BUILD":                           # the state of an OrderedDict: versions of modules
            stack.pop()
        elif name == "BINPERSID":
            kind, kept, key, _, n_values = stack.pop()
            if kind != "storage" or not isinstance(kept, Storage) or not isinstance(key, str) or not is_count(n_values):
                raise TypeError
            stack.append(storage(kept.dtype, key, n_values))
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise Problem("%s: byte %d of data.pkl has the instruction %s, which no dictionary of tensors needs" % (path, at, name))
    raise Problem("%s: data.pkl ends without STOP" % path)


def read_torch(path):
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as e:
        raise Problem("%s: no zip archive of PyTorch (%.80s): damaged, incomplete, or saved before PyTorch 1.6 (load it and save it "
                      "anew, best as safetensors)" % (path, e))
    pickles = [name for name in entries if name.split("/")[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise Problem("%s: a zip archive without data.pkl: not saved by torch.save" % path)
    prefix = pickles[0][:-len("data.pkl")]
    if prefix + "constants.pkl" in entries:
        raise Problem("%s: a TorchScript program, not a checkpoint; save its state_dict() with torch.save" % path)

    def place(name):
        """Where a stored entry's bytes lie; its local header stands before them."""
        entry = entries.get(name)
        if entry is None:
            raise Problem("%s: the archive lacks %.200s" % (path, name))
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise Problem("%s: %.200s is compressed or encrypted; PyTorch stores it plainly" % (path, name))
        with open(path, "rb") as file:
            file.seek(max(entry.header_offset, 0))
            head = read_exactly(file, 30)
            begin = entry.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
            if entry.header_offset < 0 or head[:4] != b"PK\3\4" or begin + entry.file_size > os.path.getsize(path):
                raise Problem("%s: the archive's entry %.200s reaches outside the file" % (path, name))
        return begin, entry.file_size

    def stored(name, limit):
        begin, size = place(name)
        if size > limit:
            raise Problem("%s: %.200s has %d bytes; %d are the most that make sense" % (path, name, size, limit))
        with open(path, "rb") as file:
            file.seek(begin)
            return read_exactly(file, size)

    if prefix + "byteorder" in entries and stored(prefix + "byteorder", 64) != b"little":
        raise Problem("%s: saved on a big-endian machine; save it as safetensors" % path)

    def storage(dtype, key, n_values):
        begin, size = place(prefix + "data/" + key)
        if n_values * SIZES[dtype] > size:
            raise Problem("%s: storage %.80s has %d bytes; %d values of %s need more" % (path, key, size, n_values, dtype))
        return Storage(dtype, begin, n_values)

    try:
        state = run_pickle(path, stored(pickles[0], MAX_JSON), storage)
    except (ArithmeticError, LookupError, TypeError, ValueError) as e:      # a stack that runs empty, an argument cut short, ...
        raise Problem("%s: data.pkl is damaged (%s)" % (path, type(e).__name__))
    for key in ("state_dict", "model"):                 # a training loop's checkpoint
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = {name: t for name, t in state.items() if isinstance(name, str) and isinstance(t, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise Problem("%s: holds no dictionary of tensors" % path)
    return {re.sub(r"^module\.", "", name): t for name, t in tensors.items()}


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

    def fail(self, why):
        raise Problem("%s: byte %d: %s" % (self.path, self.file.tell(), why))

    def take(self, n):
        self.room(n)
        return self.file.read(n)

    def room(self, n):
        if n > self.size - self.file.tell():
            self.fail("the file ends before %d more bytes (an incomplete download?)" % n)

    def read(self):
        with open(self.path, "rb") as self.file:
            value = self.value(0)
            if self.file.tell() != self.size:
                self.fail("more bytes than the value that stands before them")
            return value

    def value(self, depth):
        if depth > 64:
            self.fail("nested too deeply")
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
        if head in MSGPACK_SIZED:
            method, width = MSGPACK_SIZED[head]
            return getattr(self, method)(int.from_bytes(self.take(width), "big"), depth)
        self.fail("0x%02X begins no msgpack value" % head)

    def text(self, n, depth):
        return self.take(n).decode("utf-8", "replace")

    def bytes(self, n, depth):                          # stays in the file: (offset, size)
        self.room(n)
        at = self.file.tell()
        self.file.seek(n, 1)
        return at, n

    def array(self, n, depth):
        self.room(n)                                    # an element takes a byte at least
        return [self.value(depth + 1) for _ in range(n)]

    def map(self, n, depth):
        self.room(2 * n)
        result = {}
        for _ in range(n):
            key = self.value(depth + 1)
            if not isinstance(key, str):
                self.fail("a name that is no text")
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
        if not isinstance(value, list) or len(value) != 3 or not isinstance(value[2], tuple) or self.file.tell() != end:
            self.fail("an array that is not [shape, dtype, bytes]")
        shape, dtype, (offset, size) = value
        check_shape(shape, "%s: byte %d" % (self.path, offset))
        dtype = NUMPY_TYPES.get(dtype if isinstance(dtype, str) else "")
        if dtype is None or product(shape) * SIZES[dtype] != size:
            self.fail("an array of %s %s in %d bytes" % (shown(value[1]), shown(shape), size))
        return Tensor(self.path, dtype, offset, shape)


def read_flax(path):
    tree = Msgpack(path).read()
    for key in ("params", "params"):                    # a train state, or the variables around it
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    tensors = {}

    def walk(node, name):
        if isinstance(node, dict):
            if "__msgpack_chunked_array__" in node:
                raise Problem("%s: %s is larger than 1 GB, which flax writes in pieces: not supported" % (path, name))
            for key, child in node.items():
                walk(child, name + "." + key if name else key)
        elif isinstance(node, Tensor):
            tensors[name] = node

    walk(tree, "")
    if not tensors:
        raise Problem("%s: holds no arrays" % path)
    result = {}
    for name, t in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "kernel" and len(t.shape) == 2:
            t = t.transposed(1, 0)                      # [in, out]
        elif leaf == "kernel" and len(t.shape) == 4:
            t = t.transposed(3, 2, 0, 1)                # [height, width, in, out]
        if leaf in ("kernel", "scale", "embedding"):
            leaf = "weight"
        # PAPERCLIP (smsharma/PAPERCLIP-Hubble, models/clip_transfer.py): a frozen CLIP inside, two dense layers behind it
        stem = re.sub(r"^(text|vision)_model\.(text|vision)_backbone\b", r"\1_model", stem)
        stem = re.sub(r"^(text|vision)_model\.Dense_([01])$", r"\1_head.\2", stem)
        result[stem + "." + leaf if stem else leaf] = t
    return result


# ---- a folder of weights, configuration and tokenizer ------------------------------------------------------------------

READERS = {".safetensors": read_safetensors, ".bin": read_torch, ".pt": read_torch, ".pth": read_torch, ".msgpack": read_flax}
WEIGHT_FILES = ["model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
                "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "flax_model.msgpack", "mm_projector.bin"]


class Folder:
    def __init__(self, path):
        if not os.path.exists(path):
            raise Problem("%s: no such file or folder" % path)
        self.path, self.file = (path, None) if os.path.isdir(path) else (os.path.dirname(path) or ".", os.path.basename(path))

    def has(self, name):
        return os.path.isfile(os.path.join(self.path, name))

    def weight_file(self):
        if self.file:
            return self.file
        if self.has("adapter_config.json") or self.has("adapter_model.safetensors") or self.has("adapter_model.bin"):
            raise Problem("%s: a LoRA adapter, only the difference to a model. Merge it first (peft: merge_and_unload(), then "
                          "save_pretrained()) and convert the result." % self.path)
        for name in WEIGHT_FILES:
            if self.has(name):
                return name
        others = sorted(n for n in os.listdir(self.path) if os.path.splitext(n)[1] in READERS and n != "training_args.bin")
        if len(others) == 1:
            return others[0]
        if self.has("manifest.ocdbt") or self.has("_METADATA"):
            raise Problem("%s: an orbax checkpoint; restore it in Python and save it with model.save_pretrained()" % self.path)
        raise Problem("%s: holds no weights that are recognised%s" % (self.path, ": which of %s? Name the file." %
                      ", ".join(others[:8]) if others else " (model.safetensors, pytorch_model.bin, flax_model.msgpack, ...)"))

    def tensors(self):
        name = self.weight_file()
        path = os.path.join(self.path, name)
        if not name.endswith(".index.json"):
            return self.read(name)
        weight_map = parse_json(read_small(path), path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise Problem("%s: has no weight_map" % path)
        result, shards = {}, {}
        for tensor, shard in weight_map.items():
            if not isinstance(shard, str) or os.path.basename(shard) != shard or shard in ("", ".", ".."):
                raise Problem("%s: tensor %.200s lies in %s, which is no file of this folder" % (path, tensor, shown(shard)))
            if shard not in shards:
                if not self.has(shard):
                    raise Problem("%s: the shard %s is missing (an incomplete download?)" % (path, shard))
                shards[shard] = self.read(shard)
            if tensor not in shards[shard]:
                raise Problem("%s: %s lacks the tensor %.200s" % (path, shard, tensor))
            result[tensor] = shards[shard][tensor]
        return result

    def read(self, name):
        reader = READERS.get(os.path.splitext(name)[1])
        if reader is None:
            raise Problem("%s: weights are read from .safetensors, .bin, .pt and .msgpack" % os.path.join(self.path, name))
        tensors = reader(os.path.join(self.path, name))
        if any("lora_A" in t or "lora_B" in t for t in tensors):
            raise Problem("%s: holds LoRA matrices. Merge them into the model first (peft: merge_and_unload())." % name)
        return tensors


class Files:
    """Small files of the checkpoint's folders, the first that has one counts."""

    def __init__(self, folders):
        self.folders = folders

    def find(self, name):
        return next((os.path.join(f.path, name) for f in self.folders if f.has(name)), None)

    def json(self, name):
        path = self.find(name)
        return parse_json(read_small(path), path) if path else {}

    def config(self, name="config.json"):
        path = self.find(name)
        if path is None:
            raise Problem("%s: no %s beside the weights; --base FOLDER may name one that has it" % (self.folders[0].path, name))
        return Config(parse_json(read_small(path), path), path)


class Config:
    """A JSON object whose values are checked as they are asked for."""

    def __init__(self, values, where):
        self.values, self.where = values, where

    def get(self, key, default=None):
        value = self.values.get(key)
        return default if value is None else value

    def number(self, key, default=None, most=1 << 24, least=1):
        value = self.get(key, default)
        if not is_count(value, most) or value < least:
            raise Problem("%s: %s is %s; it must be a whole number from %d to %d" % (self.where, key, shown(value), least, most))
        return value

    def real(self, key, default):
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e30:
            raise Problem("%s: %s is %s; it must be a positive number" % (self.where, key, shown(value)))
        return float(value)

    def one_of(self, key, choices, default):
        value = self.get(key, default)
        if value not in choices:
            raise Problem("%s: %s is %s; supported: %s" % (self.where, key, shown(value), ", ".join(map(str, choices))))
        return value

    def items(self, key):
        value = self.get(key, [])
        if not isinstance(value, list):
            raise Problem("%s: %s is no list" % (self.where, key))
        return value

    def section(self, key):
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise Problem("%s: %s is no object" % (self.where, key))
        return Config(value, "%s: %s" % (self.where, key))


# ---- names: every layout's tensors under GGUF's ------------------------------------------------------------------------

LLAMA = [(r"embed_tokens\.weight", "token_embd.weight"), (r"norm\.weight", "output_norm.weight"),
         (r"lm_head\.weight", "output.weight"), (r"layers\.(\d+)\.input_layernorm\.(.*)", r"blk.\1.attn_norm.\2"),
         (r"layers\.(\d+)\.post_attention_layernorm\.(.*)", r"blk.\1.ffn_norm.\2"),
         (r"layers\.(\d+)\.self_attn\.([qkv])_proj\.(.*)", r"blk.\1.attn_\2.\3"),
         (r"layers\.(\d+)\.self_attn\.o_proj\.(.*)", r"blk.\1.attn_output.\2"),
         (r"layers\.(\d+)\.mlp\.(gate|up|down)_proj\.(.*)", r"blk.\1.ffn_\2.\3")]
TOWER = [(r"embeddings\.class_embedding", "class_embd"), (r"embeddings\.patch_embedding\.(weight|bias)", r"patch_embd.\1"),
         (r"embeddings\.(position|token)_embedding\.weight", r"\1_embd.weight"), (r"pre_laye?rnorm\.(.*)", r"pre_ln.\1"),
         (r"(?:post_layernorm|final_layer_norm)\.(.*)", r"post_ln.\1"),
         (r"encoder\.layers\.(\d+)\.layer_norm([12])\.(.*)", r"blk.\1.ln\2.\3"),
         (r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(.*)", r"blk.\1.attn_\2.\3"),
         (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(.*)", r"blk.\1.attn_out.\2"),
         (r"encoder\.layers\.(\d+)\.mlp\.(fc[12])\.(.*)", r"blk.\1.\2.\3")]
PROJECTOR = [(r"(?:linear_1|0)\.(.*)", r"mm.0.\1"), (r"(?:linear_2|2)\.(.*)", r"mm.2.\1"), (r"(weight|bias)", r"mm.0.\1")]
# prefix of a tensor's name, the table for what follows, what goes before the result; the first prefix that fits counts
FAMILIES = [(r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?", TOWER, "v."), (r"vision_model\.", TOWER, "v."),
            (r"text_model\.", TOWER, "t."), (r"(?:model\.)?(?:multi_modal_projector|mm_projector)\.", PROJECTOR, ""),
            (r"model\.language_model\.|language_model\.model\.|language_model\.|model\.|(?=lm_head)", LLAMA, ""),
            (r"(?=(?:text|visual)_projection\.weight$)", [(r"(.*)", r"\1")], ""), (r"(?=logit_scale$)", [(r"(.*)", r"\1")], ""),
            (r"text_head\.", [(r"0\.(.*)", r"t.head.0.\1"), (r"1\.(.*)", r"t.head.2.\1")], ""),
            (r"vision_head\.", [(r"0\.(.*)", r"v.head.0.\1"), (r"1\.(.*)", r"v.head.2.\1")], ""),
            (r"(?=embeddings\.|encoder\.|pre_laye?rnorm\.|post_layernorm\.)", TOWER, "v.")]      # a vision tower by itself
IGNORED = re.compile(r"position_ids$|rotary_emb\.inv_freq$|masked_bias$|attn_mask$|image_newline$")


def gguf_name(name):
    """None for a name that no table knows."""
    for prefix, table, before in FAMILIES:
        found = re.match(prefix, name)
        if not found:
            continue
        for pattern, replacement in table:
            match = re.fullmatch(pattern, name[found.end():])
            if match:
                return before + match.expand(replacement)
    return None


def from_open_clip(tensors):
    """open_clip's and OpenAI's names as transformers' names; the fused q, k, v taken apart."""
    result = {}
    plain = {"visual.class_embedding": "vision_model.embeddings.class_embedding",
             "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
             "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
             "positional_embedding": "text_model.embeddings.position_embedding.weight",
             "token_embedding.weight": "text_model.embeddings.token_embedding.weight", "logit_scale": "logit_scale"}
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm",
             "ln_final": "text_model.final_layer_norm"}
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
             "mlp.c_proj": "mlp.fc2"}
    for name, t in tensors.items():
        name = re.sub(r"^text\.", "", name)             # CustomTextCLIP
        stem, _, leaf = name.rpartition(".")
        layer = re.match(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.*)", name)
        if name in plain:
            result[plain[name]] = t
        elif stem in norms:
            result[norms[stem] + "." + leaf] = t
        elif name in ("visual.proj", "text_projection") and len(t.shape) == 2:    # x @ projection
            result["visual_projection.weight" if name == "visual.proj" else "text_projection.weight"] = t.transposed(1, 0)
        elif layer:
            tower, what = "vision_model" if layer.group(1) else "text_model", layer.group(3)
            before = "%s.encoder.layers.%s." % (tower, layer.group(2))
            fused = re.fullmatch(r"attn\.in_proj_(weight|bias)", what)
            if fused and t.shape and t.shape[0] % 3 == 0:
                n = t.shape[0] // 3
                for i, letter in enumerate("qkv"):
                    result["%sself_attn.%s_proj.%s" % (before, letter, fused.group(1))] = t.part(i * n, n)
            else:
                what, _, leaf = what.rpartition(".")
                result[before + parts.get(what, what) + "." + leaf] = t
        else:
            result[name] = t
    return result


def renamed(tensors):
    """{GGUF's name: (tensor, its name in the checkpoint)}, and the names that no table knows."""
    if any(re.match(r"(visual\.|text\.)?transformer\.resblocks\.", name) for name in tensors):
        tensors = from_open_clip(tensors)
    known, unknown = {}, []
    for name, t in tensors.items():
        if IGNORED.search(name):
            continue
        target = gguf_name(name)
        if target is None:
            unknown.append(name)
        elif target in known:
            raise Problem("%s: %s and %s are both %s" % (t.path, name, known[target][1], target))
        else:
            known[target] = (t, name)
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
        raise Problem("%s: byte %d: a number that does not end" % (where, at))

    while at < len(data):
        tag, at = varint(at)
        if tag >> 3 == 0:
            raise Problem("%s: byte %d: a field without a number" % (where, at))
        if tag & 7 == 0:
            value, at = varint(at)
            yield tag >> 3, value
            continue
        if tag & 7 == 2:
            n, at = varint(at)
        else:
            n = {1: 8, 5: 4}.get(tag & 7, len(data) + 1)
        if n > len(data) - at:
            raise Problem("%s: byte %d: a field that reaches past the end" % (where, at))
        yield tag >> 3, data[at:at + n]
        at += n


class Vocabulary:
    """Tokens in the order of their ids, and what GGUF says about them."""

    def __init__(self, where, model):
        self.where, self.model, self.pre = where, model, None
        self.tokens, self.types, self.scores, self.merges = [], [], None, None
        self.add_bos = self.add_eos = self.space_prefix = None

    def put(self, i, token, kind):
        """An added token; the gap before it, if there is one, is filled."""
        if not is_count(i, 1 << 24) or not isinstance(token, str) or i < len(self.tokens) and self.tokens[i] not in (token, "[PAD%d]" % i):
            raise Problem("%s: an added token with the id %s" % (self.where, shown(i)))
        self.fill(i + 1)
        self.tokens[i], self.types[i] = token, kind

    def fill(self, n):
        for i in range(len(self.tokens), n):
            self.tokens.append("[PAD%d]" % i)
            self.types.append(UNUSED)
            if self.scores is not None:
                self.scores.append(-10000.0)

    def find(self, token):
        return self.tokens.index(token) if token in self.tokens else None


def read_sentencepiece(path):
    vocabulary = Vocabulary(path, "llama")
    vocabulary.scores, kind, strips = [], 1, True
    vocabulary.space_prefix = True
    for field, value in protobuf(read_small(path), path):
        if field == 1 and isinstance(value, bytes):     # SentencePiece: 1 piece, 2 score, 3 type
            piece = dict(protobuf(value, path))
            score = piece.get(2, bytes(4))
            if not isinstance(piece.get(1), bytes) or not isinstance(score, bytes) or len(score) != 4 or piece.get(3, 1) not in range(1, 7):
                raise Problem("%s: piece %d is damaged" % (path, len(vocabulary.tokens)))
            try:
                vocabulary.tokens.append(piece[1].decode("utf-8"))
            except UnicodeDecodeError:
                raise Problem("%s: piece %d is no UTF-8" % (path, len(vocabulary.tokens)))
            vocabulary.scores.append(struct.unpack("<f", score)[0])
            vocabulary.types.append(piece.get(3, NORMAL))
        elif field == 2 and isinstance(value, bytes):   # TrainerSpec: 3 model_type
            kind = dict(protobuf(value, path)).get(3, 1)
        elif field == 3 and isinstance(value, bytes):   # NormalizerSpec: 3 add_dummy_prefix, 4 remove_extra_whitespaces
            spec = dict(protobuf(value, path))
            vocabulary.space_prefix, strips = bool(spec.get(3, 1)), bool(spec.get(4, 1))
    if not vocabulary.tokens:
        raise Problem("%s: holds no pieces; is it a SentencePiece model?" % path)
    if kind != 2:
        raise Problem("%s: a SentencePiece model of type %s; LLaMA's are BPE (2)" % (path, kind))
    if strips:
        note("%s strips extra spaces, which LLaMA's do not and astrovl does not: texts with several spaces in a row may give other "
             "tokens" % path)
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
    raise Problem("%s: the pre-tokenizer (%s) is none of LLaMA-3's, SmolLM's and GPT-2's" % (where, ", ".join(map(str, kinds)) or "none"))


def bpe_pieces(vocabulary, ids, pairs):
    """ids: {piece: id};   pairs: (where it stands, a merge as two pieces or "left right"), best first"""
    if not ids or not all(is_count(i) for i in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
        raise Problem("%s: the vocabulary's ids are not 0 to n - 1" % vocabulary.where)
    vocabulary.tokens, vocabulary.types, vocabulary.merges = sorted(ids, key=ids.get), [NORMAL] * len(ids), []
    for where, pair in pairs:
        pair = pair.split(" ") if isinstance(pair, str) else pair
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part in ids for part in pair) or \
                pair[0] + pair[1] not in ids:
            raise Problem("%s: %s is not two tokens that make a third" % (where, shown(pair)))
        vocabulary.merges.append(pair)


def read_bpe_json(path):
    """tokenizer.json of the tokenizers library: byte-level BPE, SentencePiece's BPE rewritten, or CLIP's."""
    whole = Config(parse_json(read_small(path), path), path)
    model = whole.section("model")
    if model.values.get("type", "BPE") != "BPE" or not model.items("merges"):
        raise Problem("%s: a tokenizer of type %s with %d merges; supported is BPE" % (path, shown(model.get("type")), len(model.items("merges"))))
    steps = flattened(whole.get("normalizer"), "normalizers"), flattened(whole.get("pre_tokenizer"), "pretokenizers")
    if model.get("continuing_subword_prefix"):
        raise Problem("%s: pieces with a prefix inside words (continuing_subword_prefix) are not supported" % path)
    spm = bool(model.get("byte_fallback"))
    vocabulary = Vocabulary(path, "llama" if spm else "gpt2")
    bpe_pieces(vocabulary, model.section("vocab").values,
               (("%s: merge %d" % (path, i), pair) for i, pair in enumerate(model.items("merges"))))
    if model.get("end_of_word_suffix") == "</w>":       # CLIP: its rule is known, and told by no key
        pass
    elif spm:
        spm_from_merges(vocabulary, model.get("unk_token"))
        vocabulary.space_prefix = any(step.get("type") == "Prepend" for step in steps[0]) or any(
            step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps[1])
    else:
        if steps[0]:
            raise Problem("%s: the normalizer %s; byte-level BPE of LLaMA's kind has none" % (path, shown(steps[0][0].get("type"))))
        vocabulary.pre = word_rule(steps[1], path)
    for token in whole.items("added_tokens"):
        if not isinstance(token, dict):
            raise Problem("%s: added_tokens are no objects" % path)
        i = token.get("id")
        known = is_count(i, len(vocabulary.types) - 1) and vocabulary.types[i] in (UNKNOWN, BYTE)
        vocabulary.put(i, token.get("content"), vocabulary.types[i] if known else CONTROL if token.get("special") else USER_DEFINED)
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
    vocabulary.merges = None


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
    vocabulary = Vocabulary(vocab_path, "gpt2")
    vocabulary.pre = "gpt-2"
    lines = enumerate(read_small(merges_path).decode("utf-8", "replace").split("\n"), 1)
    bpe_pieces(vocabulary, parse_json(read_small(vocab_path), vocab_path),
               (("%s: line %d" % (merges_path, n), line.rstrip("\r")) for n, line in lines
                if line.strip() and not (n == 1 and line.startswith("#version"))))
    return vocabulary


def read_vocabulary(files, clip=False):
    model, fast, pair = files.find("tokenizer.model"), files.find("tokenizer.json"), (files.find("vocab.json"), files.find("merges.txt"))
    if model and not clip:
        vocabulary = read_sentencepiece(model)
    elif clip and all(pair):
        vocabulary = read_bpe_pair(*pair)
    elif fast:
        vocabulary = read_bpe_json(fast)
    elif all(pair):
        vocabulary = read_bpe_pair(*pair)
    else:
        raise Problem("%s: no tokenizer (tokenizer.model, tokenizer.json, or vocab.json with merges.txt) beside the weights; copy it "
                      "there, or let --base name a folder that has it" % files.folders[0].path)
    if not clip:
        add_tokens(vocabulary, files)
    return vocabulary


def add_tokens(vocabulary, files):
    """What other files of a transformers tokenizer say: tokens added later, and whether texts get BOS and EOS."""
    settings, known = files.json("tokenizer_config.json"), len(vocabulary.tokens)
    for token, i in files.json("added_tokens.json").items():
        if not is_count(i) or i >= known:
            vocabulary.put(i, token, USER_DEFINED)
    decoder = settings.get("added_tokens_decoder")
    for i, token in (decoder if isinstance(decoder, dict) else {}).items():
        if i.isdigit() and int(i) >= known and isinstance(token, dict):
            vocabulary.put(int(i), token.get("content"), CONTROL if token.get("special") else USER_DEFINED)
    for flag in ("add_bos", "add_eos"):
        value = settings.get(flag + "_token")
        if getattr(vocabulary, flag) is None and isinstance(value, bool):
            setattr(vocabulary, flag, value)
    if isinstance(settings.get("add_prefix_space"), bool) and vocabulary.model == "llama":
        vocabulary.space_prefix = settings["add_prefix_space"]


def special_ids(vocabulary, files, config):
    """{"bos": id, ...}: by the tokenizer's spelling, else by the model's configuration."""
    spelled = {**files.json("special_tokens_map.json"), **files.json("tokenizer_config.json")}
    result = {}
    for name in ("bos", "eos", "unk", "pad"):
        token = spelled.get(name + "_token")
        token = token.get("content") if isinstance(token, dict) else token
        i = vocabulary.find(token) if isinstance(token, str) else None
        if i is None:
            i = config.get(name + "_token_id")
            i = i[0] if isinstance(i, list) and i else i
        if is_count(i, len(vocabulary.tokens) - 1):
            result[name] = i
    return result


def chat_template(files):
    path = files.find("chat_template.jinja")
    if path:
        return read_small(path).decode("utf-8", "replace")
    for name in ("chat_template.json", "tokenizer_config.json", "processor_config.json"):
        template = files.json(name).get("chat_template")
        if isinstance(template, list):                  # several, by name
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template
    return None


def vocabulary_keys(gguf, vocabulary, files, config, n_vocab):
    if len(vocabulary.tokens) > n_vocab:
        raise Problem("%s: %d tokens, but the model's embedding has only %d rows" % (vocabulary.where, len(vocabulary.tokens), n_vocab))
    vocabulary.fill(n_vocab)                            # llama.cpp wants a token for every row
    gguf.text("tokenizer.ggml.model", vocabulary.model)
    gguf.text("tokenizer.ggml.pre", vocabulary.pre or "default")
    gguf.texts("tokenizer.ggml.tokens", vocabulary.tokens)
    if vocabulary.scores is not None:
        gguf.array("tokenizer.ggml.scores", "f", vocabulary.scores)
    gguf.array("tokenizer.ggml.token_type", "i", vocabulary.types)
    if vocabulary.model == "gpt2":
        gguf.texts("tokenizer.ggml.merges", [" ".join(pair) for pair in vocabulary.merges])
    for name, i in special_ids(vocabulary, files, config).items():
        gguf.number("tokenizer.ggml.%s_token_id" % {"unk": "unknown", "pad": "padding"}.get(name, name), i)
    add_bos = vocabulary.add_bos if vocabulary.add_bos is not None else vocabulary.model == "llama"
    gguf.flag("tokenizer.ggml.add_bos_token", add_bos)
    gguf.flag("tokenizer.ggml.add_eos_token", bool(vocabulary.add_eos))
    if vocabulary.space_prefix is not None:
        gguf.flag("tokenizer.ggml.add_space_prefix", vocabulary.space_prefix)
    template = chat_template(files)
    if template:
        gguf.text("tokenizer.chat_template", template)


# ---- GGUF --------------------------------------------------------------------------------------------------------------
# Version 3, little-endian. Source: ggml-org/ggml, docs/gguf.md.


class Gguf:
    def __init__(self, path):
        self.path, self.keys, self.tensors, self.n_keys, self.names = path, [], [], 0, set()

    @staticmethod
    def string(text):
        data = text.encode("utf-8")
        return struct.pack("<Q", len(data)) + data

    def put(self, key, kind, data):
        if key not in self.names:                       # in one file for all, the language model's name stands
            self.names.add(key)
            self.keys.append(self.string(key) + struct.pack("<I", kind) + data)
            self.n_keys += 1

    def number(self, key, value): self.put(key, 4, struct.pack("<I", value))
    def real(self, key, value): self.put(key, 6, struct.pack("<f", value))
    def flag(self, key, value): self.put(key, 7, b"\1" if value else b"\0")
    def text(self, key, value): self.put(key, 8, self.string(value))
    def texts(self, key, values): self.put(key, 9, struct.pack("<IQ", 8, len(values)) + b"".join(map(self.string, values)))

    def array(self, key, code, values):                 # code: "i" int32, "f" float32
        self.put(key, 9, struct.pack("<IQ", {"i": 5, "f": 6}[code], len(values)) + struct.pack("<%d%s" % (len(values), code), *values))

    def tensor(self, name, shape, source, wide):
        """shape: slowest dimension first; wide: as float32, whatever the checkpoint has."""
        self.tensors.append((name, shape, source, "F32" if wide else source.dtype))

    def n_bytes(self):
        return sum(product(shape) * SIZES[dtype] for _, shape, _, dtype in self.tensors)

    def write(self, path, report):
        weights = [(product(shape), dtype) for _, shape, _, dtype in self.tensors]
        by_type = {dtype: sum(n for n, d in weights if d == dtype) for _, dtype in weights}
        self.number("general.file_type", FILE_TYPES[max(by_type, key=by_type.get)])
        self.number("general.alignment", 32)
        with open(path, "wb") as file:
            file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(self.tensors), self.n_keys) + b"".join(self.keys))
            offset = 0
            for name, shape, _, dtype in self.tensors:
                file.write(self.string(name) + struct.pack("<I%dQ" % len(shape), len(shape), *reversed(shape)))
                file.write(struct.pack("<IQ", GGUF_TYPES[dtype], offset))
                offset += -(-product(shape) * SIZES[dtype] // 32) * 32
            for name, shape, source, dtype in self.tensors:
                file.write(bytes(-file.tell() % 32))
                start = file.tell()
                for chunk in source.chunks():
                    chunk = widened(chunk, source.dtype) if dtype != source.dtype else chunk
                    file.write(chunk)
                    report(len(chunk))
                if file.tell() - start != product(shape) * SIZES[dtype]:
                    raise Problem("%s: %s has not the values of its shape" % (source.path, name))
            file.write(bytes(-file.tell() % 32))


# ---- models ------------------------------------------------------------------------------------------------------------


class Weights:
    """The checkpoint's tensors, handed out once each: what a model asks for is checked, what is left over is reported."""

    def __init__(self, source, tensors):
        self.source, (self.tensors, self.unknown) = source, renamed(tensors)
        self.used = set()

    def has(self, name):
        return name in self.tensors

    def shape(self, name):
        return self.tensors[name][0].shape if name in self.tensors else ()

    def take(self, name, shape):
        if name not in self.tensors:
            raise Problem("%s: lacks the tensor that becomes %s %s" % (self.source, name, list(shape)))
        t, original = self.tensors[name]
        self.used.add(name)
        if tuple(shape) != t.shape:
            raise Problem("%s: tensor %s is %s; the configuration asks for %s" % (t.path, original, list(t.shape), list(shape)))
        if t.dtype not in GGUF_TYPES:
            raise Problem("%s: tensor %s is of type %s; supported: F32, F16, BF16 (of a quantised checkpoint take the original)" %
                          (t.path, original, t.dtype))
        return t

    def move(self, gguf, name, shape, target=None, n_head=0):
        """n_head: RoPE's halves of each head's rows become neighbours, as GGUF keeps them."""
        t, shape = self.take(name, shape), tuple(shape)
        if n_head:
            rows = shape[0] // n_head
            t = t.split(n_head, 2, rows // 2)
            t = t.transposed(0, 2, 1, *range(3, len(t.shape)))
        target = target or name
        conv = target == "v.patch_embd.weight" and t.dtype == "BF16"       # llama.cpp convolves in F16 or F32
        gguf.tensor(target, shape, t, len(shape) < 2 or target.endswith("position_embd.weight") or conv)

    def linear(self, gguf, name, n_out, n_in, bias, target=None, n_head=0):
        target = target or name
        self.move(gguf, name + ".weight", (n_out, n_in), target + ".weight", n_head)
        if bias or bias is None and self.has(name + ".bias"):
            self.move(gguf, name + ".bias", (n_out,), target + ".bias", n_head)

    def leftover(self):
        left = [self.tensors[name][1] for name in self.tensors if name not in self.used] + self.unknown
        if left:
            note("%d tensors of the checkpoint were not used: %s" % (len(left), ", ".join(left[:4]) + (", ..." if len(left) > 4 else "")))


def rope(gguf, config, head_dim):
    """RoPE's base and scaling; transformers 5 gathers them in rope_parameters."""
    scaling = config.section("rope_scaling" if config.get("rope_scaling") else "rope_parameters")
    theta = scaling.real("rope_theta", config.real("rope_theta", 10000.0))
    gguf.real("llama.rope.freq_base", theta)
    kind = scaling.one_of("rope_type", ("default", "linear", "llama3"), scaling.get("type", "default"))
    if kind == "linear":
        gguf.text("llama.rope.scaling.type", "linear")
        gguf.real("llama.rope.scaling.factor", scaling.real("factor", None))
    if kind == "llama3":     # one divisor per frequency; Source: transformers, modeling_rope_utils.py
        factor, low, high = (scaling.real(key, None) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        context = scaling.number("original_max_position_embeddings")
        if not (0 < low < high and factor > 0 and theta > 0):
            raise Problem("%s: low_freq_factor, high_freq_factor or factor make no sense" % scaling.where)
        divisors = []
        for i in range(0, head_dim, 2):
            turns = context / (2 * 3.141592653589793 * theta ** (i / head_dim))      # in the context it was trained for
            smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
        gguf.tensor("rope_freqs.weight", (len(divisors),), Made(divisors), False)


def put_llama(gguf, weights, config, files, name):
    """Hyperparameters (defaults: transformers' LlamaConfig), vocabulary and tensors of the language model."""
    config.one_of("model_type", ("llama", "llava", "llava_llama", "mistral"), "llama")
    config.one_of("hidden_act", ("silu",), "silu")
    if config.get("model_type") == "mistral" and config.get("sliding_window"):
        raise Problem("%s: attention in a sliding window is not supported" % config.where)
    n_embd, n_layer = config.number("hidden_size", 4096, 1 << 20), config.number("num_hidden_layers", 32, 1024)
    n_head, n_ff = config.number("num_attention_heads", 32, n_embd), config.number("intermediate_size", 11008, 1 << 22)
    n_head_kv = config.number("num_key_value_heads", n_head, n_head)
    head_dim = config.number("head_dim", n_embd // n_head, 65536)
    n_vocab = config.number("vocab_size", 32000)
    if head_dim % 2 or n_head % n_head_kv:
        raise Problem("%s: %d heads over %d key heads of %d values" % (config.where, n_head, n_head_kv, head_dim))
    gguf.text("general.architecture", "llama")
    gguf.text("general.name", name)
    gguf.number("llama.vocab_size", n_vocab)
    gguf.number("llama.context_length", config.number("max_position_embeddings", 2048))
    gguf.number("llama.embedding_length", n_embd)
    gguf.number("llama.block_count", n_layer)
    gguf.number("llama.feed_forward_length", n_ff)
    gguf.number("llama.attention.head_count", n_head)
    gguf.number("llama.attention.head_count_kv", n_head_kv)
    gguf.real("llama.attention.layer_norm_rms_epsilon", config.real("rms_norm_eps", 1e-6))
    gguf.number("llama.rope.dimension_count", head_dim)
    if head_dim != n_embd // n_head:
        gguf.number("llama.attention.key_length", head_dim)
        gguf.number("llama.attention.value_length", head_dim)
    vocabulary_keys(gguf, read_vocabulary(files), files, config, n_vocab)
    rope(gguf, config, head_dim)
    weights.move(gguf, "token_embd.weight", (n_vocab, n_embd))
    weights.move(gguf, "output_norm.weight", (n_embd,))
    if config.get("tie_word_embeddings"):
        weights.used.add("output.weight")               # a copy of token_embd.weight, if it is there at all
    else:
        weights.move(gguf, "output.weight", (n_vocab, n_embd))
    for i in range(n_layer):
        block = "blk.%d." % i
        for norm in ("attn_norm", "ffn_norm"):
            weights.move(gguf, block + norm + ".weight", (n_embd,))
        for letter, heads, turned in (("q", n_head, n_head), ("k", n_head_kv, n_head_kv), ("v", n_head_kv, 0)):
            weights.linear(gguf, block + "attn_" + letter, heads * head_dim, n_embd, None, n_head=turned)
        weights.linear(gguf, block + "attn_output", n_embd, n_head * head_dim, None)
        for part, n_out, n_in in (("gate", n_ff, n_embd), ("up", n_ff, n_embd), ("down", n_embd, n_ff)):
            weights.linear(gguf, block + "ffn_" + part, n_out, n_in, None)


def put_tower(gguf, weights, config, tower, sizes, swapped):
    """The layers of a CLIP tower, "v" or "t". swapped: clip.cpp calls fc1 ffn_down and fc2 ffn_up."""
    key, kind = ("clip.vision.", "clip_vision_model") if tower == "v" else ("clip.text.", "clip_text_model")
    config.one_of("model_type", (kind, "clip"), kind)
    n_embd, n_ff = config.number("hidden_size", sizes[0], 65536), config.number("intermediate_size", sizes[1], 1 << 20)
    n_layer, n_head = config.number("num_hidden_layers", 12, 1024), config.number("num_attention_heads", sizes[2], 65536)
    if n_embd % n_head:
        raise Problem("%s: %d heads over %d values" % (config.where, n_head, n_embd))
    gguf.number(key + "embedding_length", n_embd)
    gguf.number(key + "feed_forward_length", n_ff)
    gguf.number(key + "block_count", n_layer)
    gguf.number(key + "attention.head_count", n_head)
    gguf.real(key + "attention.layer_norm_epsilon", config.real("layer_norm_eps", 1e-5))
    gguf.flag("clip.use_gelu", config.one_of("hidden_act", ("gelu", "quick_gelu"), "quick_gelu") == "gelu")
    up, down = ("ffn_down", "ffn_up") if swapped else ("ffn_up", "ffn_down")
    for i in range(n_layer):
        block = "%s.blk.%d." % (tower, i)
        for norm in ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias"):
            weights.move(gguf, block + norm, (n_embd,))
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            weights.linear(gguf, block + part, n_embd, n_embd, True)
        weights.linear(gguf, block + "fc1", n_ff, n_embd, True, block + up)
        weights.linear(gguf, block + "fc2", n_embd, n_ff, True, block + down)
    return n_embd, n_layer


def put_vision(gguf, weights, config, files, is_clip, aspect):
    """The vision tower and what it wants images to look like. Defaults: transformers' CLIPVisionConfig."""
    n_embd, n_layer = put_tower(gguf, weights, config, "v", (768, 3072, 12), is_clip)
    size, patch = config.number("image_size", 224, 8192), config.number("patch_size", 32, 8192)
    config.one_of("num_channels", (3,), 3)
    if patch > size:
        raise Problem("%s: patches of %d pixels in images of %d" % (config.where, patch, size))
    gguf.number("clip.vision.image_size", size)
    gguf.number("clip.vision.patch_size", patch)
    settings = Config(files.json("preprocessor_config.json") or files.json("processor_config.json"),
                      files.find("preprocessor_config.json") or "processor_config.json")
    settings = settings.section("image_processor") if settings.get("image_processor") else settings
    open_clip = Config(files.json("open_clip_config.json"), "open_clip_config.json").section("preprocess_cfg")
    for name, short, usual, least in (("mean", "image_mean", (0.48145466, 0.4578275, 0.40821073), 0),
                                      ("std", "image_std", (0.26862954, 0.26130258, 0.27577711), 1e-6)):
        color = settings.get(short, open_clip.get(name, usual))
        if not isinstance(color, (list, tuple)) or len(color) != 3 or not all(isinstance(c, (int, float)) and least <= c < 1e6 for c in color):
            raise Problem("%s: %s is not three numbers from %g on" % (settings.where, short, least))
        gguf.array("clip.vision." + short, "f", color)
    gguf.text("clip.vision.image_aspect_ratio", aspect or ("pad" if settings.get("do_pad") else "crop"))
    weights.move(gguf, "v.class_embd", (n_embd,))
    weights.move(gguf, "v.patch_embd.weight", (n_embd, 3, patch, patch))
    weights.move(gguf, "v.position_embd.weight", (1 + (size // patch) ** 2, n_embd))
    for norm in ("v.pre_ln.weight", "v.pre_ln.bias", "v.post_ln.weight", "v.post_ln.bias"):
        if is_clip or norm.startswith("v.pre"):
            weights.move(gguf, norm, (n_embd,))
        else:
            weights.used.add(norm)                      # LLaVA's features are taken before it, but llama.cpp would apply it
    return n_embd, n_layer


def put_projector(gguf, weights, config, vision, n_embd, n_layer):
    layer = config.get("vision_feature_layer", config.get("mm_vision_select_layer", -2))
    if isinstance(layer, bool) or not isinstance(layer, int) or not -n_layer - 1 <= layer <= n_layer:
        raise Problem("%s: the vision tower's layer %s is taken for features; one number from %d to %d is supported" %
                      (config.where, shown(layer), -n_layer - 1, n_layer))
    config.one_of("vision_feature_select_strategy", ("default",), "default")
    config.one_of("mm_vision_select_feature", ("patch",), "patch")
    config.one_of("projector_hidden_act", ("gelu",), "gelu")
    config.one_of("mm_projector_type", ("linear", "mlp2x_gelu"), "linear" if not weights.has("mm.2.weight") else "mlp2x_gelu")
    gguf.array("clip.vision.feature_layer", "i", [layer if layer >= 0 else n_layer + 1 + layer])
    gguf.text("clip.projector_type", "mlp" if weights.has("mm.2.weight") else "linear")
    gguf.number("clip.vision.projection_dim", n_embd)
    n_hidden = (weights.shape("mm.0.weight") or (n_embd,))[0]
    weights.linear(gguf, "mm.0", n_hidden, vision, None)
    if weights.has("mm.2.weight"):
        weights.linear(gguf, "mm.2", n_embd, n_hidden, None)


def clip_flags(gguf, name, text, vision, projector):
    gguf.text("general.architecture", "clip")
    gguf.text("general.name", name)
    gguf.flag("clip.has_text_encoder", text)
    gguf.flag("clip.has_vision_encoder", vision)
    gguf.flag("clip.has_llava_projector", projector)


def put_head(gguf, weights, tower, n_embd):
    """PAPERCLIP's two dense layers, if they are there; returns the length of what goes into the projection."""
    if not weights.has(tower + ".head.0.weight"):
        return n_embd
    n_hidden = (weights.shape(tower + ".head.0.weight") + (0,))[0]
    n_out = (weights.shape(tower + ".head.2.weight") + (0,))[0]
    weights.linear(gguf, tower + ".head.0", n_hidden, n_embd, True)
    weights.linear(gguf, tower + ".head.2", n_out, n_hidden, True)
    return n_out


def open_clip_config(values, where):
    """open_clip_config.json's model_cfg as the configuration that transformers would write."""
    model = Config(values, where).section("model_cfg")
    vision, text = model.section("vision_cfg"), model.section("text_cfg")
    if vision.get("timm_model_name") or text.get("hf_model_name"):
        raise Problem("%s: towers of timm or Hugging Face inside open_clip are not supported, only CLIP's own" % where)
    act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    width, text_width = vision.number("width", 768, 65536), text.number("width", 512, 65536)
    return Config({"projection_dim": model.get("embed_dim"), "model_type": "clip",
                   "vision_config": {"hidden_size": width, "intermediate_size": int(width * vision.real("mlp_ratio", 4.0)),
                                     "num_hidden_layers": vision.get("layers", 12), "image_size": vision.get("image_size", 224),
                                     "num_attention_heads": width // vision.number("head_width", 64), "hidden_act": act,
                                     "patch_size": vision.get("patch_size", 16)},
                   "text_config": {"hidden_size": text_width, "intermediate_size": int(text_width * text.real("mlp_ratio", 4.0)),
                                   "num_hidden_layers": text.get("layers", 12), "num_attention_heads": text.get("heads", 8),
                                   "hidden_act": act, "vocab_size": text.get("vocab_size", 49408),
                                   "max_position_embeddings": text.get("context_length", 77)}}, where)


def convert_clip(out, weights, files, options, name):
    """clip.cpp's two-tower file. Defaults: transformers' CLIPTextConfig."""
    path = files.find("open_clip_config.json")
    config = open_clip_config(files.json("open_clip_config.json"), path) if path else files.config()
    config.one_of("model_type", ("clip",), "clip")
    text, gguf = config.section("text_config"), Gguf(out)
    clip_flags(gguf, name, True, True, False)
    n_joint = config.number("projection_dim", 512, 65536)
    n_vision, _ = put_vision(gguf, weights, config.section("vision_config"), files, True, options.image_aspect)
    weights.linear(gguf, "visual_projection", n_joint, put_head(gguf, weights, "v", n_vision), False)
    n_embd, _ = put_tower(gguf, weights, text, "t", (512, 2048, 8), True)
    if config.section("vision_config").get("hidden_act", "quick_gelu") != text.get("hidden_act", "quick_gelu"):
        raise Problem("%s: the towers have different activations" % config.where)
    n_ctx, n_vocab = text.number("max_position_embeddings", 77, 65536, 2), text.number("vocab_size", 49408)
    gguf.number("clip.text.context_length", n_ctx)
    gguf.number("clip.text.projection_dim", n_joint)
    gguf.number("clip.vision.projection_dim", n_joint)
    weights.move(gguf, "t.token_embd.weight", (n_vocab, n_embd))
    weights.move(gguf, "t.position_embd.weight", (n_ctx, n_embd))
    weights.move(gguf, "t.post_ln.weight", (n_embd,))
    weights.move(gguf, "t.post_ln.bias", (n_embd,))
    weights.linear(gguf, "text_projection", n_joint, put_head(gguf, weights, "t", n_embd), False)
    if weights.has("logit_scale"):
        scale = weights.take("logit_scale", weights.shape("logit_scale"))
        gguf.tensor("logit_scale", (1,), scale, True)
    vocabulary = read_vocabulary(files, clip=True)
    if len(vocabulary.tokens) > n_vocab:
        raise Problem("%s: %d tokens, but the text tower has %d rows" % (vocabulary.where, len(vocabulary.tokens), n_vocab))
    gguf.texts("tokenizer.ggml.tokens", vocabulary.tokens)
    gguf.texts("tokenizer.ggml.merges", [" ".join(pair) for pair in vocabulary.merges])
    return [gguf]


def vision_config(config, weights, options, vision_files):
    """The vision tower's configuration: inside LLaVA's, in --vision's folder, or known from the tower's name."""
    if config.get("vision_config"):
        section = config.section("vision_config")
        return section
    if options.vision:
        found = vision_files.config()
        return found.section("vision_config") if found.get("vision_config") else found
    shape, positions = weights.shape("v.patch_embd.weight"), weights.shape("v.position_embd.weight")
    tower = config.get("mm_vision_tower", config.get("mm_vision_tower_name", ""))
    if re.search(r"clip-vit-(base|large)-patch\d+(-336)?$", str(tower)) and len(shape) == 4 and shape[0] % 64 == 0 and positions:
        n_layer = sum(1 for name in weights.tensors if re.fullmatch(r"v\.blk\.\d+\.ln1\.weight", name))
        return Config({"hidden_size": shape[0], "intermediate_size": 4 * shape[0], "num_hidden_layers": n_layer,
                       "num_attention_heads": shape[0] // 64, "patch_size": shape[2],
                       "image_size": shape[2] * int((positions[0] - 1) ** 0.5 + 0.5)}, config.where + ": " + tower)
    raise Problem("%s: says nothing about the vision tower; name its folder (such as openai/clip-vit-large-patch14-336) with --vision" %
                  config.where)


def convert_llava(out, weights, files, options, name):
    """llama.cpp's pair of files, or both halves in one."""
    config = files.config()
    config.one_of("model_type", ("llava", "llava_llama", "llama"), "llava")
    if config.get("image_grid_pinpoints") and config.get("image_aspect_ratio") == "anyres":
        raise Problem("%s: LLaVA-1.6's several tiles per image (anyres) are not supported" % config.where)
    vision_files = Files(([Folder(options.vision)] if options.vision else []) + files.folders)
    text = config.section("text_config") if config.get("text_config") else config
    if text is not config and text.get("tie_word_embeddings") is None:
        text.values["tie_word_embeddings"] = config.get("tie_word_embeddings", False)
    aspect = options.image_aspect or {"pad": "pad", "square": "crop"}.get(str(config.get("image_aspect_ratio")))
    if config.get("mm_vision_tower") and not aspect:
        aspect = "crop"                                 # the authors' code does so where the configuration is silent
    model = Gguf(out)
    put_llama(model, weights, text, files, name)
    mmproj = model if options.single else Gguf(re.sub(r"(\.gguf)?$", "-mmproj.gguf", out, count=1))
    clip_flags(mmproj, name, False, True, True)
    n_vision, n_layer = put_vision(mmproj, weights, vision_config(config, weights, options, vision_files), vision_files, False, aspect)
    put_projector(mmproj, weights, config, n_vision, weights.shape("token_embd.weight")[1], n_layer)
    if not aspect and not vision_files.json("preprocessor_config.json").get("do_pad"):
        note("images are resized and cropped, as the checkpoint's image processor does. LLaVA-1.5 itself, and AstroLLaVA's training, pad "
             "them to a square: --image-aspect pad")
    return [model] if options.single else [model, mmproj]


def convert_llama(out, weights, files, options, name):
    gguf = Gguf(out)
    put_llama(gguf, weights, files.config(), files, name)
    return [gguf]


# ---- the program -------------------------------------------------------------------------------------------------------


def gather(options):
    """All tensors: SOURCE's, and from --vision and --base what SOURCE lacks."""
    source = Folder(options.source)
    tensors = source.tensors()
    names = set(renamed(tensors)[0])
    if options.base and "mm.0.weight" in names and "token_embd.weight" not in names:
        tensors = {**Folder(options.base).tensors(), **tensors}
    if options.vision and "v.patch_embd.weight" not in names:
        tower = renamed(Folder(options.vision).tensors())[0]
        tensors.update({original if original.startswith("vision_model.") else "vision_model." + original: t
                        for target, (t, original) in tower.items() if target.startswith("v.") and not target.startswith("v.head")})
    return source, tensors


def convert(options):
    source, tensors = gather(options)
    files = Files([source] + ([Folder(options.base)] if options.base else []))
    if files.json("config.json").get("quantization_config"):
        raise Problem("%s: a quantised checkpoint (bitsandbytes, GPTQ, AWQ, ...); convert the original" % files.find("config.json"))
    folder = os.path.basename(os.path.abspath(source.path)) or "model"
    out = os.path.realpath(options.output) if options.output else folder + ".gguf"
    weights = Weights(options.source, tensors)
    if weights.has("t.token_embd.weight"):
        kind = convert_clip
    elif weights.has("mm.0.weight"):
        kind = convert_llava
        for part, name, hint in (("token_embd.weight", "language model", "--base"), ("v.patch_embd.weight", "vision tower", "--vision")):
            if not weights.has(part):
                raise Problem("%s: holds a projector, but no %s: name its folder with %s" % (options.source, name, hint))
    elif weights.has("token_embd.weight"):
        kind = convert_llama
    elif weights.has("v.patch_embd.weight"):
        raise Problem("%s: a vision tower alone; give it as --vision beside a LLaVA checkpoint" % options.source)
    else:
        raise Problem("%s: none of LLaVA, LLaMA and CLIP; its first tensors are %s" % (options.source, ", ".join(list(tensors)[:4])))
    outputs = kind(out, weights, files, options, (options.name or folder).encode("utf-8", "replace").decode("utf-8"))
    weights.leftover()
    write_all(outputs, options.quiet)


def write_all(outputs, quiet):
    """Each under a temporary name first; all are renamed when all are complete."""
    total, done = sum(gguf.n_bytes() for gguf in outputs), 0
    shows = not quiet and sys.stderr.isatty()

    def report(n):
        nonlocal done
        done += n
        if shows:
            width = 30 * done // max(total, 1)
            print("\r[%s%s] %d / %d MB " % ("#" * width, "." * (30 - width), done >> 20, total >> 20), end="", file=sys.stderr, flush=True)

    for gguf in outputs:
        if os.path.exists(gguf.path) and not os.path.isfile(gguf.path):
            raise Problem("%s: exists and is no file" % gguf.path)
    try:
        for gguf in outputs:
            gguf.write(gguf.path + ".part", report)
        for gguf in outputs:
            os.replace(gguf.path + ".part", gguf.path)
    finally:
        if shows:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
        for gguf in outputs:
            if os.path.exists(gguf.path + ".part"):
                os.remove(gguf.path + ".part")
    if not quiet:
        for gguf in outputs:
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
    else:
        return 0
    message = "".join(c if c.isprintable() else "?" for c in message)
    print("convert.py: error: " + (message if len(message) <= 800 else message[:500] + " ... " + message[-200:]), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
