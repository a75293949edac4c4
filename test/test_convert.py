"""Command-line tests: runs ./astrovl as a user would. Standard library only (numpy.load is tried where it exists).

    python3 test/test_convert.py            all; the last line says "N passed, N failed"
    python3 test/test_convert.py Chat       one class
    ASTROVL=./astrovl-sanitize python3 test/test_convert.py
"""
import ast
import hashlib
import importlib.util
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
import xml.dom.minidom
import zipfile
import zlib

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.path.abspath(os.path.join(ROOT, os.environ.get("ASTROVL", "astrovl")))
BENCH = os.path.abspath(os.path.join(ROOT, os.environ.get("BENCH", os.path.join("test", "bench"))))
MODEL = os.path.join(ROOT, "test", "astrovl-tiny.gguf")
IMAGES = os.path.join(ROOT, "test", "images")
COMMANDS = ["caption", "ask", "chat", "tokens", "inspect", "quantize", "trace", "version", "score", "describe", "index", "search",
            "embed", "evaluate", "summarize"]
SHORT = ["--max-tokens", "6", "--threads", "1", "--quiet"]


class Result:
    def __init__(self, code, out, err):
        self.code, self.out_bytes = code, out
        self.out, self.err = out.decode("utf-8", "replace"), err.decode("utf-8", "replace")

    def __repr__(self):
        return "exit %s\nstdout: %r\nstderr: %r" % (self.code, self.out[:2000], self.err[:2000])


def astrovl(*arguments, stdin=b"", program=PROGRAM, **options):
    done = subprocess.run([program, *arguments], input=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
                          timeout=300, **options)
    return Result(done.returncode, done.stdout, done.stderr)


def png(width, height, pixel):
    """A PNG file's bytes; pixel(x, y) gives (r, g, b)."""
    rows = b"".join(b"\0" + bytes(v for x in range(width) for v in pixel(x, y)) for y in range(height))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) +
            chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def star_field(seed):
    """A picture of some stars on a dark sky."""
    rng = random.Random(seed)
    stars = [(rng.uniform(0, 64), rng.uniform(0, 48), rng.uniform(50, 220)) for _ in range(12)]

    def pixel(x, y):
        light = 10 + sum(s / (1 + ((x - sx) ** 2 + (y - sy) ** 2) ** 2) for sx, sy, s in stars)
        return (min(255, int(light)),) * 3
    return png(64, 48, pixel)


# ---- a GGUF reader and writer of our own, so that the program's is not judged by itself --------------------------------

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read_gguf(path):
    """-> version, {key: value}, [(name, shape slowest first, type number)]"""
    with open(path, "rb") as f:
        data = f.read()
    at = 0

    def take(form):
        nonlocal at
        value = struct.unpack_from("<" + form, data, at)[0]
        at += struct.calcsize("<" + form)
        return value

    def text():
        nonlocal at
        n = take("Q")
        at += n
        return data[at - n:at]

    def value(kind):
        if kind == 8:
            return text()
        if kind == 9:
            item, count = take("I"), take("Q")
            return [value(item) for _ in range(count)]
        return take(SCALARS[kind])

    magic, version, n_tensors, n_kv = take("4s"), take("I"), take("Q"), take("Q")
    assert magic == b"GGUF"
    metadata, tensors = {}, []
    for _ in range(n_kv):
        key = text().decode()
        metadata[key] = value(take("I"))
    for _ in range(n_tensors):
        name = text().decode()
        dims = [take("Q") for _ in range(take("I"))]
        tensors.append((name, dims[::-1], take("I")))
        take("Q")
    return version, metadata, tensors


def write_gguf(path, metadata, tensors=()):
    """metadata: [(key, type, value)], type a number or (9, item type); tensors: [(name, shape slowest first, floats)]"""
    def text(value):
        value = value if isinstance(value, bytes) else value.encode()
        return struct.pack("<Q", len(value)) + value

    def pack(kind, value):
        return text(value) if kind == 8 else struct.pack("<" + SCALARS[kind], value)
    out = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, kind, value in metadata:
        out += text(key)
        if isinstance(kind, tuple):
            out += struct.pack("<IIQ", 9, kind[1], len(value)) + b"".join(pack(kind[1], v) for v in value)
        else:
            out += struct.pack("<I", kind) + pack(kind, value)
    body = b""
    for name, shape, values in tensors:
        out += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in reversed(shape))
        out += struct.pack("<IQ", 0, len(body))
        body += struct.pack("<%df" % len(values), *values)
        body += b"\0" * (-len(body) % 32)
    out += b"\0" * (-len(out) % 32)
    with open(path, "wb") as f:
        f.write(out + body)


def write_vocabulary(path):
    """A LLaMA-style vocabulary: bytes, letters and a few words; no weights."""
    pieces = ["<unk>", "<s>", "</s>"] + ["<0x%02X>" % i for i in range(256)]
    pieces += ["▁"] + list("abcdefghijklmnopqrstuvwxyz") + ["th", "▁th", "the", "▁the", "st", "ar", "star", "▁st", "▁star"]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259)
    scores = [0.0] * 259 + [-100.0 - i for i in range(27)] + [-1.0, -2.0, -3.0, -2.5, -4.0, -5.0, -6.0, -7.0, -6.5]
    write_gguf(path, [("general.architecture", 8, "llama"), ("tokenizer.ggml.model", 8, "llama"),
                      ("tokenizer.ggml.tokens", (9, 8), pieces), ("tokenizer.ggml.scores", (9, 6), scores),
                      ("tokenizer.ggml.token_type", (9, 5), types), ("tokenizer.ggml.bos_token_id", 4, 1),
                      ("tokenizer.ggml.eos_token_id", 4, 2)])
    return pieces


# ---- the tests ---------------------------------------------------------------------------------------------------------

class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.folder = cls.temporary.name
        cls.images = []
        for seed in range(2):
            cls.images.append(cls.write("stars%d.png" % seed, star_field(seed)))

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    @classmethod
    def path(cls, name):
        return os.path.join(cls.folder, name)

    @classmethod
    def write(cls, name, data):
        with open(cls.path(name), "wb") as f:
            f.write(data)
        return cls.path(name)

    def succeeds(self, *arguments, **options):
        result = astrovl(*arguments, **options)
        self.assertEqual(result.code, 0, result)
        return result

    def fails(self, code, *arguments, **options):
        """The program ends with this status and says something on standard error."""
        result = astrovl(*arguments, **options)
        self.assertEqual(result.code, code, result)
        self.assertTrue(result.err.startswith("astrovl"), result)
        return result


class Help(Case):
    def test_overview_names_every_command(self):
        for word in ["--help", "-h", "help"]:
            result = self.succeeds(word)
            self.assertEqual(result.err, "")
            for command in COMMANDS:
                self.assertIn("\n  " + command + " ", result.out)

    def test_every_command_teaches(self):
        for command in COMMANDS:
            result = self.succeeds(command, "--help")
            self.assertTrue(result.out.startswith("Usage: astrovl " + command), result)
            self.assertIn("\nOptions:\n", result.out)
            self.assertIn("\nExamples:\n  ", result.out)
            self.assertEqual(self.succeeds("help", command).out, result.out)
            self.assertTrue(all(len(line) <= 130 for line in result.out.splitlines()), result)

    def test_help_lists_only_the_command_s_own_options(self):
        self.assertIn("--together", self.succeeds("ask", "--help").out)
        self.assertNotIn("--together", self.succeeds("caption", "--help").out)
        self.assertNotIn("--seed", self.succeeds("tokens", "--help").out)

    def test_version(self):
        self.assertRegex(self.succeeds("--version").out, r"^astrovl \d+\.\d+\.\d+\n$")
        result = self.succeeds("version")
        self.assertRegex(result.out, r"^astrovl \d+\.\d+\.\d+\n")
        self.assertIn(os.path.join("test", "astrovl-tiny.gguf"), result.out)


class Usage(Case):
    def wrong(self, *arguments, says):
        result = self.fails(2, *arguments)
        self.assertIn(says, result.err)
        self.assertIn("--help", result.err)
        self.assertEqual(result.out, "")

    def test_no_command(self):
        result = astrovl()
        self.assertEqual((result.code, result.out), (2, ""))
        self.assertIn("Usage:", result.err)

    def test_unknown_command(self):
        self.wrong("captoin", "x.png", says='"captoin"')
        self.wrong("help", "captoin", says='"captoin"')

    def test_unknown_option(self):
        self.wrong("caption", "--sede", "1", "x.png", says="--sede")
        self.wrong("caption", "-x", "x.png", says="-x")
        self.wrong("tokens", "--seed", "1", "x", says="--seed")

    def test_missing_arguments(self):
        self.wrong("caption", says="image")
        self.wrong("ask", says="question")
        self.wrong("ask", self.images[0], says="question")
        self.wrong("chat", "a.png", "b.png", says="one image")
        self.wrong("trace", says="prompt")
        self.wrong("trace", self.images[0], "What?", says="-o DIR")
        self.wrong("trace", self.images[0], "What?", "-o", "x", "--hash", says="-o DIR")
        self.wrong("tokens", "a", "b", says="quotes")
        self.wrong("version", "a", says="arguments")
        self.wrong("score", "--text", "a", says="which image")
        self.wrong("score", "a.png", says="--text")
        self.wrong("describe", says="which image")
        self.wrong("index", "-o", "x", says="which images")
        self.wrong("index", "a.png", says="-o FILE")
        for arguments in ([], ["x"], ["x", "q", "r"], ["x", "q", "--image", "a.png"]):
            self.wrong("search", *arguments, says="an index and a query")
        self.wrong("embed", says="--text")
        self.wrong("embed", "a.png", "--text", "a", says="--text")
        for arguments in ([], ["retrieval"], ["vqa", "a", "b"], ["galaxies", "x"]):
            self.wrong("evaluate", *arguments, says="vqa SET.jsonl")
        self.wrong("evaluate", "vqa", "x", "--svg", "y", says="retrieval")
        self.wrong("summarize", says="abstract")
        self.wrong("summarize", "x", "--bool", says="--query")
        self.wrong("summarize", "x", "--bool", "--query", "q", "--regex", "a", says="one of")

    def test_missing_value(self):
        self.wrong("caption", "x.png", "--seed", says="--seed wants a value")
        self.wrong("caption", "x.png", "-m", says="--model wants a value")

    def test_value_for_a_flag(self):
        self.wrong("caption", "--quiet=yes", "x.png", says="no value")

    def test_whole_numbers(self):
        for option in ["--threads", "--max-tokens", "--ctx"]:
            for value in ["", "0", "-1", "1.5", "1e3", "0x10", " 1", "1 ", "+1", "many", "99999999999999999999999"]:
                self.wrong("caption", "x.png", option, value, says=option)
        for value in ["", "-1", "1.5", "18446744073709551616", "seven"]:
            self.wrong("caption", "x.png", "--seed", value, says="--seed")

    def test_numbers(self):
        for option in ["--temperature", "--top-p", "--min-p", "--repetition-penalty"]:
            for value in ["", ".", "-1", "nan", "inf", "0,5", "1e1", "0x1", "101", "1.5.2", " 1", "warm"]:
                self.wrong("caption", "x.png", option, value, says=option)
        self.wrong("caption", "x.png", "--top-p", "1.01", says="from 0 to 1")

    def test_numbers_do_not_depend_on_the_language(self):
        environment = dict(os.environ, LC_ALL="de_DE.UTF-8", LANG="de_DE.UTF-8")
        self.succeeds("caption", self.images[0], "--temperature=0.5", *SHORT, env=environment)

    def test_template(self):
        self.wrong("caption", "x.png", "--template", "vicuna_v9", says="vicuna_v1")

    def test_all_ways_to_write_an_option(self):
        for seed in (["--seed", "7"], ["--seed=7"], ["-s", "7"], ["-s7"]):
            self.succeeds("caption", *seed, self.images[0], *SHORT)

    def test_two_dashes_end_the_options(self):
        self.assertIn("--seed: cannot be opened", self.fails(1, "caption", "--quiet", "--", "--seed").err)


class Failures(Case):
    def test_missing_image(self):
        result = self.fails(1, "caption", self.path("nowhere.png"), *SHORT)
        self.assertIn("nowhere.png", result.err)
        self.assertEqual(result.out, "")

    def test_not_an_image(self):
        for name, data in [("text.png", b"this is no image\n"), ("empty.png", b""), ("zeros.jpg", bytes(1000)),
                           ("half.png", star_field(1)[:300]), ("signature.png", star_field(1)[:8])]:
            result = self.fails(1, "caption", self.write(name, data), *SHORT)
            self.assertEqual(result.out, "")
        self.fails(1, "caption", self.folder, *SHORT)

    def test_missing_model(self):
        self.assertIn("nowhere.gguf", self.fails(1, "caption", "-m", self.path("nowhere.gguf"), self.images[0]).err)
        self.assertIn("nowhere.gguf", self.fails(1, "inspect", self.path("nowhere.gguf")).err)
        self.assertIn("nowhere.gguf", self.fails(1, "tokens", "-m", self.path("nowhere.gguf"), "x").err)

    def test_broken_models(self):
        with open(MODEL, "rb") as f:
            good = f.read()
        half = len(good) // 2
        for name, data in [("empty.gguf", b""), ("text.gguf", b"no model at all, but long enough\n" * 9),
                           ("magic.gguf", good[:4]), ("head.gguf", good[:24]),
                           ("cut.gguf", good[:5000]), ("half.gguf", good[:half]),
                           ("last.gguf", good[:-1]), ("version.gguf", good[:4] + b"\x09" + good[5:]),
                           ("counts.gguf", good[:8] + b"\xff" * 16 + good[24:])]:
            path = self.write(name, data)
            for command in (["caption", "-m", path, self.images[0]], ["inspect", path], ["tokens", "-m", path, "x"]):
                result = self.fails(1, *command)
                self.assertIn(name, result.err, result)
                self.assertEqual(result.out, "", result)

    def test_flipped_bytes_never_crash(self):
        with open(MODEL, "rb") as f:
            good = f.read()
        rng = random.Random(5)
        for _ in range(40):
            bad = bytearray(good[:200000])
            for _ in range(rng.randint(1, 4)):
                bad[rng.randrange(60000)] = rng.randrange(256)
            result = astrovl("inspect", self.write("flipped.gguf", bytes(bad)))
            self.assertIn(result.code, (0, 1), result)

    def test_several_images_one_bad(self):
        result = self.fails(1, "caption", self.images[0], self.path("nowhere.png"), self.images[1], *SHORT)
        lines = result.out.splitlines()
        self.assertEqual(len(lines), 2, result)
        for image, line in zip(self.images, lines):
            self.assertTrue(line.startswith(image + ": ") and len(line) > len(image) + 4, result)
        self.assertEqual(result.err.count("nowhere.png"), 1)

    def test_strips_and_bad_pictures_end_no_run(self):
        """Long strips, and pictures of which some are damaged or no pictures: each is reported by its name, the others are done."""
        good, bad = [self.images[0]], []
        for name, width, height in (("wide.png", 30000, 1), ("high.png", 1, 65500)):
            good.append(self.write(name, png(width, height, lambda x, y: (x % 256, y % 256, 9))))
        for name, data in (("page.png", b"<!DOCTYPE html>"), ("empty.jpg", b""), ("cut.png", star_field(0)[:100]), ("m31.tif", b"II*\0"),
                           ("huge.png", png(1, 1, lambda x, y: (0, 0, 0)).replace(b"\0\0\0\1" * 2, b"\0\1\0\0" * 2))):
            bad.append(self.write(name, data))
        files = [name for pair in zip(bad, good) for name in pair] + bad[3:]
        for command in (["caption", *SHORT], ["caption", "--batch", "5", *SHORT], ["score", "--text", "a comet"], ["describe", "-k", "1"],
                        ["embed", "--batch", "8"], ["index", "-o", self.path("strips.avl")]):
            result = self.fails(1, *command, *files)
            for name in bad:
                self.assertEqual(result.err.count(name + ": "), 1, (command, result.err))
            if command[0] != "index":
                self.assertTrue(all(name in result.out for name in good), (command, result.out))
        self.assertIn("3 images added", result.out)
        self.assertIn("TIFF: convert it", result.err)
        self.assertIn("the file is empty", result.err)

    def test_wrong_crc_of_pixels_is_a_warning(self):
        data = bytearray(star_field(0))
        size = struct.unpack_from(">I", data, 33)[0]
        data[33 + 8 + size] ^= 1
        name = self.write("crc.png", bytes(data))
        for command in (["caption", *SHORT], ["score", "--text", "a comet"], ["embed"]):
            self.assertRegex(self.succeeds(*command, name).err, r"warning: .*crc\.png: PNG: .*CRC")
        self.assertEqual(self.succeeds("embed", name).out.split("embedding")[1],
                         self.succeeds("embed", self.write("right.png", star_field(0))).out.split("embedding")[1])

    def test_model_without_vision(self):
        vocabulary = self.path("vocabulary.gguf")
        write_vocabulary(vocabulary)
        result = self.fails(1, "caption", "-m", vocabulary, self.images[0])
        self.assertEqual(result.out, "")

    def test_prompt_longer_than_the_context(self):
        result = self.fails(1, "ask", self.images[0], "star " * 20000, *SHORT)
        self.assertEqual(result.out, "")

    def test_context_too_small_for_the_image(self):
        self.fails(1, "caption", "--ctx", "8", self.images[0], *SHORT)


class Answers(Case):
    def test_caption_is_one_line_of_text(self):
        result = self.succeeds("caption", self.images[0])
        self.assertTrue(result.out.endswith("\n"))
        self.assertEqual(result.out.count("\n"), 1, result)
        self.assertGreater(len(result.out.split()), 2, result)
        self.assertIn("tokens/s", result.err)

    def test_example_images(self):
        folder = os.path.join(ROOT, "test", "images")
        names = sorted(os.listdir(folder))
        self.assertGreaterEqual(len(names), 4)
        result = self.succeeds("caption", "--quiet", *[os.path.join(folder, name) for name in names])
        self.assertEqual(result.out.count("\n"), len(names), result)
        self.assertEqual(result.err, "")

    def test_batches(self):
        """Images described together: the same output as one by one, whatever the batch, with an image that is broken between."""
        folder = os.path.join(ROOT, "test", "images")
        paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
        paths[2:2] = [self.write("broken.png", b"no image"), self.path("missing.png")]

        def output(batch, *options):
            result = self.fails(1, "caption", *paths, "--exact", "--quiet", "--max-tokens", "9", "--batch", batch, *options)
            return re.sub(r'"seconds": \{[^}]*\}', "", result.out), result.err
        for options in ([], ["--json"], ["--temperature", "1", "--seed", "5", "--stop", "the"], ["--ctx", "100"]):
            alone = output("1", *options)
            self.assertIn("broken.png", alone[1])
            for batch in ("2", "3", "64"):
                self.assertEqual(output(batch, *options), alone, options)
        quick = self.succeeds("caption", "--batch", "3", *self.images)
        self.assertEqual(quick.out.splitlines(), self.succeeds("caption", *self.images).out.splitlines())
        self.assertEqual(quick.err.count("tokens/s"), 2, quick)
        one = self.succeeds("caption", "--batch", "8", self.images[0], *SHORT).out
        self.assertEqual(one, self.succeeds("caption", self.images[0], *SHORT).out)
        seconds = [json.loads(line)["seconds"] for line in self.succeeds("caption", "--json", "-b2", *self.images).out.splitlines()]
        self.assertTrue(all(set(s) == {"image", "prompt", "answer"} and min(s.values()) >= 0 for s in seconds), seconds)
        for batch in ("0", "65", "x"):
            self.fails(2, "caption", "--batch", batch, *self.images)

    def test_quiet(self):
        self.assertEqual(self.succeeds("caption", self.images[0], *SHORT).err, "")

    def test_the_same_twice_and_with_any_number_of_threads(self):
        first = self.succeeds("caption", self.images[0], "--quiet", "--max-tokens", "12").out
        for threads in ("1", "2", "3", "8"):
            again = self.succeeds("caption", self.images[0], "--quiet", "--max-tokens", "12", "--threads", threads)
            self.assertEqual(again.out, first)

    def test_exact_mode(self):
        one = self.succeeds("caption", "--exact", "--threads", "1", self.images[0], *SHORT)
        two = self.succeeds("caption", "--exact", "--threads", "3", self.images[0], *SHORT)
        self.assertEqual(one.out, two.out)

    def test_seeds(self):
        def sample(seed):
            return self.succeeds("caption", self.images[0], "--temperature", "1.5", "--seed", seed, *SHORT).out
        texts = [sample(str(seed)) for seed in range(5)]
        self.assertEqual(texts, [sample(str(seed)) for seed in range(5)])
        self.assertGreater(len(set(texts)), 1)

    def test_one_candidate_is_greedy(self):
        greedy = self.succeeds("caption", self.images[0], *SHORT).out
        for option in (["--top-k", "1"], ["--top-p", "0.000001"], ["--top-p", "0"], ["--min-p", "1"]):
            other = self.succeeds("caption", self.images[0], "--temperature", "2", *option, *SHORT).out
            self.assertEqual(other, greedy, option)

    def test_max_tokens(self):
        short = self.succeeds("caption", self.images[0], "--quiet", "--max-tokens", "2").out
        long = self.succeeds("caption", self.images[0], "--quiet").out
        self.assertTrue(long.startswith(short.rstrip("\n")), (short, long))
        self.assertLess(len(short), len(long))

    def test_stop_text_ends_the_answer_and_is_left_out(self):
        words = self.succeeds("caption", self.images[0], *SHORT).out.split()
        stops = ["--stop", "no such text", "--stop", " " + words[1]]
        stopped = self.succeeds("caption", self.images[0], *stops, *SHORT).out
        self.assertEqual(stopped.split(), words[:1])

    def test_ask(self):
        result = self.succeeds("ask", self.images[0], "What kind of object is this?", "--quiet")
        self.assertGreater(len(result.out.strip()), 1)

    def test_ask_about_several(self):
        each = self.succeeds("ask", *self.images, "What is this?", *SHORT)
        self.assertEqual(len(each.out.splitlines()), 2, each)
        together = self.succeeds("ask", "--together", *self.images, "What is this?", *SHORT)
        self.assertEqual(len(together.out.splitlines()), 1, together)

    def test_orientation_in_exif_is_followed(self):
        jpegs = [n for n in sorted(os.listdir(os.path.join(ROOT, "test", "images"))) if n.endswith((".jpg", ".jpeg"))]
        self.assertTrue(jpegs, "an example image should be a JPEG")
        with open(os.path.join(ROOT, "test", "images", jpegs[0]), "rb") as f:
            plain = f.read()

        def with_orientation(value):
            tiff = b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, value, 0, 0)
            body = b"Exif\0\0" + tiff
            return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]

        def total(data):
            return self.succeeds("trace", self.write("turned.jpg", data), "What?", "--hash").out.splitlines()[-2]
        self.assertEqual(total(with_orientation(1)), total(plain))
        self.assertNotEqual(total(with_orientation(3)), total(plain))


class Json(Case):
    def test_fields(self):
        result = self.succeeds("caption", "--json", *self.images, "--max-tokens", "6")
        lines = result.out.splitlines()
        self.assertEqual(len(lines), 2, result)
        self.assertEqual(result.err, "")
        for image, line in zip(self.images, lines):
            answer = json.loads(line)
            self.assertEqual(answer["file"], image)
            self.assertTrue(answer["prompt"] and answer["text"])
            self.assertGreater(answer["tokens"]["prompt"], answer["tokens"]["answer"])
            self.assertLessEqual(answer["tokens"]["answer"], 6)
            ids = " ".join(map(str, answer["tokens"]["ids"]))
            self.assertEqual(answer["tokens"]["answer"], len(answer["tokens"]["ids"]))
            self.assertEqual(self.succeeds("tokens", "--decode", ids).out.strip(), answer["text"].strip())
            self.assertIsInstance(answer["complete"], bool)
            for stage in ("image", "prompt", "answer"):
                self.assertGreaterEqual(answer["seconds"][stage], 0)

    def test_text_equals_the_plain_output(self):
        plain = self.succeeds("caption", self.images[0], *SHORT).out
        answer = json.loads(self.succeeds("caption", "--json", self.images[0], *SHORT).out)
        self.assertEqual(answer["text"].strip(), plain.strip())

    def test_errors_are_objects_too(self):
        result = self.fails(1, "caption", "--json", self.path("nowhere.png"), self.images[0], *SHORT)
        first, second = [json.loads(line) for line in result.out.splitlines()]
        self.assertIn("nowhere.png", first["error"])
        self.assertEqual(first["status"], "file")
        self.assertIn("text", second)

    def test_every_command(self):
        """README's table: what each command prints can be read, has a version, and the model where there is one."""
        image, abstract = self.images[0], self.write("abstract.txt", b"A survey of spiral galaxies.")
        pairs, vqa = (os.path.join(ROOT, "test", name) for name in ("pairs.jsonl", "vqa.jsonl"))
        small = self.path("small.gguf")
        for keys, arguments in (("file prompt text tokens complete seconds", ["caption", image, *SHORT]),
                                ("file prompt text tokens complete seconds", ["ask", image, "What?", *SHORT]),
                                ("files prompt text tokens complete seconds", ["ask", "--together", *self.images[:2], "What?", *SHORT]),
                                ("prompt text tokens complete seconds", ["chat", "--prompt", "What?", *SHORT]),
                                ("file prompt text tokens complete seconds", ["summarize", "--bool", "--query", "spirals", abstract]),
                                ("tokens", ["tokens", "M31"]), ("file embedding", ["embed", image]), ("text embedding", ["embed", "--text", "x"]),
                                ("file matches", ["score", image, "--text", "x"]), ("file matches", ["describe", image]),
                                ("index added known unreadable passed_over rows images_per_second", ["index", image, "-o", self.path("json.avl")]),
                                ("text rows hits", ["search", self.path("json.avl"), "x"]),
                                ("file rows hits", ["search", self.path("json.avl"), "--image", image]),
                                ("pairs logit_scale contrastive_loss accuracy cosines_matched cosines_shuffled", ["evaluate", "retrieval", pairs]),
                                ("images accuracy none_named features_found semantic_score classes answers", ["evaluate", "vqa", vqa]),
                                ("files parts", ["inspect", MODEL]), ("runnable commands problems", ["inspect", "--check", MODEL]),
                                ("file bytes_before bytes bits_per_weight seconds tensors changed fallbacks requantized types",
                                 ["quantize", MODEL, small, "q4_0"])):
            with self.subTest(arguments[:2]):
                result = json.loads(self.succeeds(arguments[0], "--json", *arguments[1:]).out)
                self.assertEqual(result["version"], self.succeeds("--version").out.split()[1])
                self.assertEqual("model" in result, arguments[0] not in ("quantize", "inspect") or "--check" in arguments, result)
                self.assertLessEqual(set(keys.split()), set(result), result)
                self.assertLessEqual(set(result), set(keys.split()) | {"version", "model"})

    def test_every_failure(self):
        image, nothing = self.images[0], self.path("nowhere.gguf")
        text, version = self.write("text.txt", b"x"), self.succeeds("--version").out.split()[1]
        for arguments in (["caption", "-m", nothing, image], ["search", nothing, "x"], ["search", MODEL, "x"], ["embed", "-m", nothing, image],
                          ["index", image, "-o", self.path("no/x.avl")], ["summarize", "--regex", "(", text], ["summarize", nothing],
                          ["summarize", "--schema", text, text], ["evaluate", "retrieval", text], ["inspect", nothing],
                          ["quantize", nothing, "x", "q4_0"], ["chat", "-p", "x", nothing], ["evaluate", "vqa", nothing], ["tokens", "-m", nothing, "x"], ["embed", nothing], ["score", nothing, "--text", "x"]):
            with self.subTest(arguments[:2]):
                result = self.fails(1, arguments[0], "--json", *arguments[1:])
                lines = [json.loads(line) for line in result.out.splitlines()]
                self.assertTrue(lines and lines[0]["error"] in result.err, result)
                self.assertEqual(lines[0]["version"], version)
                self.assertEqual("file" in lines[0], "--regex" not in arguments, result)

    def test_odd_file_names(self):
        names = ['quote".png', "back\\slash.png", "new\nline.png", "tab\t.png", "bell\a.png", "Äpfel 星.png", "-d.png"]
        paths = [self.write(name, star_field(0)) for name in names]
        result = self.succeeds("caption", "--json", *paths, "--max-tokens", "1")
        self.assertEqual([json.loads(line)["file"] for line in result.out.splitlines()], paths)

    def test_invalid_utf8_is_replaced(self):
        for bad in (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"):
            path = os.path.join(os.fsencode(self.folder), b"bad" + bad + b".png")
            result = self.fails(1, "caption", "--json", path, *SHORT)
            self.assertIn("\ufffd", json.loads(result.out_bytes.decode("utf-8"))["file"])   # strict decoding

    def test_question_comes_back(self):
        question = 'Is it "round"?\n\tOr a \\ bar — 棒?'
        result = self.succeeds("ask", "--json", self.images[0], question, *SHORT)
        self.assertEqual(json.loads(result.out)["prompt"], question)


class Tokens(Case):
    TEXTS = ["a barred spiral galaxy", "", " ", "  two  spaces ", "M31, NGC 1300!", "line\nbreak\ttab\r\n",
             "Äpfel, 星雲, 🌌", "<s>", "</s> <unk>", "a" * 500, "\u00a0\u200b", "3.14159"]

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.vocabulary = cls.path("vocabulary.gguf")
        cls.pieces = write_vocabulary(cls.vocabulary)

    def ids(self, text, *options):
        return [int(word) for word in self.succeeds("tokens", "--ids", *options, "--", text).out.split()]

    def test_clip(self):
        ids = [int(word) for word in self.succeeds("tokens", "--clip", "A Galaxy").out.split()]
        self.assertEqual(ids, [int(word) for word in self.succeeds("tokens", "--clip", "--ids", " a  galaxy ").out.split()])
        self.assertEqual((ids[0] + 1, len(ids) >= 4), (ids[-1], True))       # <|startoftext|> and <|endoftext|> stand last
        self.assertIn("--clip", self.fails(2, "tokens", "--clip", "--json", "x").err)
        self.assertIn("text tower", self.fails(1, "tokens", "--clip", "-m", self.vocabulary, "x").err)

    def test_round_trip(self):
        for options in ((), ("-m", self.vocabulary)):
            for text in self.TEXTS:
                ids = self.succeeds("tokens", "--ids", *options, stdin=text.encode())
                back = self.succeeds("tokens", "--decode", *options, stdin=ids.out.encode())
                self.assertEqual(back.out_bytes, text.encode(), (text, ids.out))

    def test_any_characters(self):
        rng = random.Random(1)
        for limit in (0x80, 0x800, 0xD800, 0x110000):
            text = "".join(chr(rng.randrange(1, limit)) for _ in range(200)).encode("utf-8", "ignore")
            ids = self.succeeds("tokens", "--ids", stdin=text)
            self.assertEqual(self.succeeds("tokens", "--decode", stdin=ids.out.encode()).out_bytes, text)

    def test_any_bytes(self):
        rng = random.Random(2)
        for _ in range(10):
            data = bytes(rng.randrange(256) for _ in range(200))
            ids = self.succeeds("tokens", "--ids", stdin=data)
            text = self.succeeds("tokens", "--decode", stdin=ids.out.encode()).out_bytes
            self.assertEqual(text.decode("utf-8"), text.decode("utf-8", "replace"))

    def test_known_ids(self):
        def of(*pieces):
            return [self.pieces.index(piece) for piece in pieces]
        self.assertEqual(self.ids("the star", "-m", self.vocabulary), of("▁the", "▁star"))
        self.assertEqual(self.ids("ab", "-m", self.vocabulary), of("▁", "a", "b"))
        self.assertEqual(self.ids("\n", "-m", self.vocabulary), of("▁", "<0x0A>"))
        self.assertEqual(self.ids("é", "-m", self.vocabulary), of("▁", "<0xC3>", "<0xA9>"))

    def test_special(self):
        plain = self.ids("the star", "-m", self.vocabulary)
        self.assertEqual(self.ids("the star", "--special", "-m", self.vocabulary), [1] + plain)
        self.assertNotIn(2, self.ids("</s>", "-m", self.vocabulary))
        self.assertIn(2, self.ids("</s>", "--special", "-m", self.vocabulary))

    def test_standard_input_and_argument_agree(self):
        given = self.succeeds("tokens", "the star").out
        self.assertEqual(self.succeeds("tokens", stdin=b"the star").out, given)
        self.assertEqual(self.succeeds("tokens", "-", stdin=b"the star").out, given)
        self.assertNotEqual(self.succeeds("tokens", "-", stdin=b"the star\n").out, given)

    def test_rows(self):
        rows = self.succeeds("tokens", "the star", "-m", self.vocabulary).out.splitlines()
        self.assertEqual([row.split() for row in rows], [[str(self.pieces.index("▁the")), "▁the", '"', 'the"'],
                                                         [str(self.pieces.index("▁star")), "▁star", '"', 'star"']])
        self.assertEqual(len({row.index('"') for row in rows}), 1, "aligned")

    def test_json(self):
        tokens = json.loads(self.succeeds("tokens", "--json", 'the "star"\x07').out)["tokens"]
        self.assertEqual("".join(token["text"] for token in tokens).lstrip(" "), 'the "star"\x07')
        self.assertEqual([token["id"] for token in tokens], self.ids('the "star"\x07'))

    def test_long_text(self):
        text = "the star and the stars " * 5000
        self.assertGreater(len(self.succeeds("tokens", "--ids", stdin=text.encode()).out.split()), 20000)

    def test_wrong_ids(self):
        for bad in ("99999999", "-1", "seven", "1 2 x", "4294967296", "1.5"):
            self.fails(1, "tokens", "--decode", "--", bad)
        self.fails(2, "tokens", "--ids", "--json", "x")


class Inspect(Case):
    def test_json_says_what_the_file_holds(self):
        version, metadata, tensors = read_gguf(MODEL)
        seen = json.loads(self.succeeds("inspect", "--json", "--full", MODEL).out)["files"][0]
        self.assertEqual(seen["version"], version)
        self.assertEqual(seen["bytes"], os.path.getsize(MODEL))
        self.assertEqual(set(seen["metadata"]), set(metadata))
        for key, value in metadata.items():
            if isinstance(value, bytes):
                value = value.decode("utf-8", "replace")
            if isinstance(value, list) and value and isinstance(value[0], bytes):
                value = [item.decode("utf-8", "replace") for item in value]
            self.check_value(key, seen["metadata"][key], value)
        self.assertEqual([(t["name"], t["shape"]) for t in seen["tensors"]], [(name, dims) for name, dims, _ in tensors])
        self.assertEqual(sum(t["type"] == "F32" for t in seen["tensors"]), sum(kind == 0 for _, _, kind in tensors))

    def check_value(self, key, seen, value):
        if isinstance(value, float):
            self.assertEqual(struct.pack("<f", seen), struct.pack("<f", value), key)
        elif isinstance(value, list) and value and isinstance(value[0], float):
            self.assertEqual(struct.pack("<%df" % len(seen), *seen), struct.pack("<%df" % len(value), *value), key)
        else:
            self.assertEqual(seen, value, key)

    def test_model(self):
        model = json.loads(self.succeeds("inspect", "--json").out)["parts"]
        for part in ("vocabulary", "language_model", "vision_tower", "projector", "contrastive", "text_tower"):
            self.assertIsInstance(model[part], dict, part)
        self.assertEqual((model["contrastive"]["images"], model["contrastive"]["texts"]), (1, 1))
        self.assertGreater(model["contrastive"]["logit_scale"], 1)
        _, metadata, _ = read_gguf(MODEL)
        self.assertEqual(model["language_model"]["layers"], metadata["llama.block_count"])
        self.assertEqual(model["language_model"]["width"], metadata["llama.embedding_length"])
        self.assertEqual(model["contrastive"]["dims"], metadata["clip.text.projection_dim"])
        self.assertEqual(model["text_tower"]["layers"], metadata["clip.text.block_count"])
        self.assertEqual(model["vocabulary"]["tokens"], len(metadata["tokenizer.ggml.tokens"]))

    def test_long_arrays_are_abbreviated(self):
        short = self.succeeds("inspect", "--json", MODEL).out
        tokens = json.loads(short)["files"][0]["metadata"]["tokenizer.ggml.tokens"]
        self.assertEqual((tokens["type"], tokens["count"] > 100, len(tokens["first"])), ("string", True, 16))
        self.assertLess(len(short), len(self.succeeds("inspect", "--json", "--full", MODEL).out))

    def test_text(self):
        result = self.succeeds("inspect", MODEL)
        for text in ("GGUF version", "general.architecture", "token_embd.weight", "totals", "vision_tower", "template"):
            self.assertIn(text, result.out)
        self.assertEqual(self.succeeds("inspect").out.replace(MODEL, ""), result.out.replace(MODEL, ""))

    def test_several_files(self):
        vocabulary = self.path("vocabulary.gguf")
        write_vocabulary(vocabulary)
        seen = json.loads(self.succeeds("inspect", "--json", vocabulary).out)
        self.assertIsNone(seen["parts"]["language_model"])
        self.assertIsInstance(seen["parts"]["vocabulary"], dict)
        both = self.succeeds("inspect", "--json", MODEL, vocabulary)
        self.assertEqual(len(json.loads(both.out)["files"]), 2)

    def test_values_of_every_type(self):
        values = [(0, 255), (1, -128), (2, 65535), (3, -32768), (4, 2**32 - 1), (5, -2**31), (6, 0.1), (7, True),
                  (7, False), (8, 'a "quoted"\n\x1b[31m text'),
                  (10, 2**63 - 1), (10, 2**63), (10, 2**64 - 1), (11, -2**63), (12, 1 / 3), (6, 3e38), (12, 1e-300)]
        path = self.path("values.gguf")
        write_gguf(path, [("general.architecture", 8, "nothing"), ("empty", (9, 4), [])] +
                   [("v%d" % i, kind, v) for i, (kind, v) in enumerate(values)] +
                   [("a%d" % i, (9, kind), [v] * 3) for i, (kind, v) in enumerate(values)],
                   [("weights", [2, 3], [1, 2, 3, 4, 5, 6])])
        file = json.loads(self.succeeds("inspect", "--json", path).out)["files"][0]
        for i, (kind, value) in enumerate(values):
            for seen in [file["metadata"]["v%d" % i]] + file["metadata"]["a%d" % i]:
                if kind == 6:
                    self.assertEqual(struct.pack("<f", seen), struct.pack("<f", value))
                else:
                    self.assertEqual(seen, value)
        self.assertEqual(file["metadata"]["empty"], [])
        self.assertEqual(file["tensors"][0]["shape"], [2, 3])
        self.assertEqual(file["tensors"][0]["bytes"], 24)
        self.assertNotIn("\x1b", self.succeeds("inspect", path).out)

    def test_named_pipe(self):                 # a reader that opens it twice loses what was written in between
        pipe = self.path("pipe")
        os.mkfifo(pipe)
        for _ in range(10):
            writer = subprocess.Popen(["dd", "if=" + MODEL, "of=" + pipe, "bs=4096"], stderr=subprocess.DEVNULL)
            self.succeeds("tokens", "-m", pipe, "x")
            writer.wait()


def golden(name):
    return os.path.join(ROOT, "test", "golden", name)


class Check(Case):
    """inspect --check: which commands run, or the first problem."""

    TEXT, MMPROJ, B, CLIP = (golden(name) for name in ("models_a_text.gguf", "models_a_mmproj.gguf", "models_b.gguf", "joint_a.gguf"))

    def runs(self, commands, *files):
        result = self.succeeds("inspect", "--check", *files)
        self.assertTrue(result.out.startswith("these files can be used with " + commands), result)
        seen = json.loads(self.succeeds("inspect", "--check", "--json", *files).out)
        self.assertEqual((seen["runnable"], seen["commands"], seen["problems"]), (True, commands.split(";")[0].split(), []))
        return result.out

    def test_unknown_template_is_refused_with_the_choices(self):
        text = self.changed(self.TEXT, (b"%}ASSISTANT: {{", b"%}Assistant: {{"), (b"%}ASSISTANT:", b"%}Assistant:"))
        files = ["-m", text, "-m", self.MMPROJ]
        self.lacks("--template: vicuna_v1, llava_v1", text, self.MMPROJ)
        self.assertIn("not recognized", self.succeeds("inspect", text).out)
        self.succeeds("tokens", "-m", text, "stars")
        for words in (["caption", self.images[0]], ["ask", self.images[0], "What?"], ["chat", "--prompt", "Hi"], ["chat"],
                      ["summarize", "--regex", "a", self.write("abstract.txt", b"Stars.")], ["trace", "--hash", "Hi"]):
            result = astrovl(words[0], *files, *words[1:])
            self.assertEqual((result.code, result.out), (1, ""), result)
            self.assertIn("zephyr", result.err)
            self.succeeds(words[0], *files, "--template", "plain", "--ctx", "120", "--max-tokens", "2", *words[1:])

    def test_notes_on_a_vocabulary(self):
        path = self.path("note.gguf")
        write_gguf(path, [("tokenizer.ggml.model", 8, "llama"), ("tokenizer.ggml.tokens", (9, 8), ["<unk>", "<s>", "</s>", "a"]),
                          ("tokenizer.ggml.scores", (9, 6), [0.0] * 4), ("tokenizer.ggml.eos_token_id", 4, 4)])
        for words in (["tokens", "-m", path, "a"], ["inspect", "--check", path]):
            self.assertIn("note.gguf: note: a special token's id is out of range", astrovl(*words).err)

    def test_full_context_names_the_option(self):
        result = astrovl("caption", "-m", self.TEXT, "-m", self.MMPROJ, "-c", "12", self.images[0])
        self.assertEqual(result.code, 1)
        self.assertIn("(-c, n_ctx)", result.err)

    def lacks(self, text, *files):
        """The one problem that is told holds this text."""
        result = astrovl("inspect", "--check", *files)
        self.assertEqual((result.code, result.err), (1, ""), result)
        lines = result.out.splitlines()
        self.assertTrue(lines[0].startswith("these files make up no model"), result)
        self.assertTrue(len(lines) == 2 and lines[1].startswith("- ") and text in lines[1], (text, result))
        seen = astrovl("inspect", "--check", "--json", *files)
        self.assertEqual(seen.code, 1)
        self.assertEqual((json.loads(seen.out)["runnable"], json.loads(seen.out)["problems"]), (False, [line[2:] for line in lines[1:]]))

    def changed(self, path, *changes, name="changed.gguf"):
        """A copy with bytes replaced, each by as many others."""
        with open(path, "rb") as f:
            data = f.read()
        for old, new in changes:
            self.assertTrue(data.count(old) == 1 and len(old) == len(new), old)
            data = data.replace(old, new)
        return self.write(name, data)

    def test_what_runs(self):
        both = "score describe search index embed "
        self.runs("caption ask chat trace summarize " + both + "tokens")
        self.runs("caption ask chat trace summarize tokens", self.TEXT, self.MMPROJ)
        self.runs("caption ask chat trace summarize tokens", "-m", self.MMPROJ, "--model", self.TEXT)
        self.runs(both.strip(), self.CLIP)
        self.assertIn("give the mmproj file as well: -m FILE", self.runs("chat trace summarize tokens", self.TEXT))

    def test_lone_parts(self):
        self.lacks("no language model, which answers are made with: give its file as well (-m FILE)", self.MMPROJ)
        self.lacks("a vocabulary and nothing else: give the file with the weights as well", golden("vocab_spm.gguf"))
        self.lacks("no text tower (t.*)", write_micro_model(self.path("micro.gguf")))
        self.lacks("convert it again with tokenizer.model or tokenizer.json next to its weights",
                   self.changed(self.TEXT, (b"tokenizer.ggml.model", b"tokenizer.ggml.mXdel")))
        self.lacks("tokenizer.ggml.tokens is missing: no vocabulary; convert again with its tokenizer",
                   self.changed(self.CLIP, (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tXkens")))
        shape, other = struct.pack("<I2QI", 2, 24, 24, 1), struct.pack("<I2QI", 2, 24, 12, 0)     # as many bytes, F16 and F32
        self.lacks("12 values, the language model reads 24; these files belong to different models", self.TEXT, self.changed(
            self.MMPROJ, (b"mm.2.weight" + shape, b"mm.2.weight" + other), (b"mm.2.bias", b"mm.2.biaX")))
        self.lacks("give only one of the two models", self.MMPROJ, self.B)

    def test_unused_tensors(self):
        """Named by --check, and once on standard error, where the model is used all the same."""
        path = self.changed(self.MMPROJ, (b"v.blk.0.attn_k.bias", b"v.blk.0.attn_sinks."))
        says = "unused, so answers may be wrong: v.blk.0.attn_sinks."
        result = astrovl("inspect", "--check", self.TEXT, path)
        self.assertEqual((result.code, result.out.splitlines()[1:]), (1, ["- " + says]), result)
        seen = json.loads(astrovl("inspect", "--check", "--json", self.TEXT, path).out)
        self.assertEqual((seen["runnable"], seen["problems"]), (True, [says]))
        result = self.succeeds("caption", "-q", "-n", "2", "-m", self.TEXT, "-m", path, self.images[0])
        self.assertEqual(result.err.splitlines(), ["astrovl: " + says])

    def test_unknown_type(self):
        """A tensor of a type that is not known is listed; a model that needs it is refused by its name."""
        with open(self.TEXT, "rb") as f:
            data = bytearray(f.read())
        at = data.index(b"blk.0.attn_q.weight") + 19 + 4 + 16
        data[at] = 23
        path = self.write("iq4.gguf", bytes(data))
        self.assertRegex(self.succeeds("inspect", path).out, r"blk\.0\.attn_q\.weight +#23 +24 x 24 ")
        self.lacks("tensor blk.0.attn_q.weight is of type number 23", path)
        self.assertIn("is number 23", self.fails(1, "quantize", path, self.path("out.gguf"), "q8_0").err)

    def test_every_missing_tensor_and_key(self):
        for name in (b"blk.1.ffn_up.weight", b"blk.0.attn_norm.weight", b"output_norm.weight", b"token_embd.weight",
                     b"llama.context_length"):
            self.lacks(name.decode() + " is missing", self.changed(self.TEXT, (name, name[:-1] + b"X")))
        for name in (b"v.blk.0.ln1.bias", b"v.patch_embd.weight", b"clip.vision.patch_size"):
            self.lacks(name.decode() + " is missing", self.TEXT, self.changed(self.MMPROJ, (name, name[:-1] + b"X")))

    def test_shapes_and_kinds(self):
        def tensor(name, rows, columns, kind=0):
            return name + struct.pack("<IQQI", 2, columns, rows, kind)
        gate, up = b"blk.0.ffn_gate.weight", b"blk.1.ffn_up.weight"
        self.lacks("blk.0.ffn_gate.weight is [24, 56]; the model's keys ask for [56, 24]",
                   self.changed(self.TEXT, (tensor(gate, 56, 24), tensor(gate, 24, 56))))
        self.lacks("blk.1.ffn_up.weight is [42, 32]", self.changed(self.TEXT, (tensor(up, 56, 24), tensor(up, 42, 32))))
        architecture = b"general.architecture" + struct.pack("<IQ", 8, 5)
        self.lacks('architecture "qwen2"; this runs "llama": take a model of that family',
                   self.changed(self.TEXT, (architecture + b"llama", architecture + b"qwen2")))
        self.lacks("is of type number 99; take a file in F32, F16, BF16",
                   self.changed(self.TEXT, (tensor(up, 56, 24), tensor(up, 56, 24, 99))))

    def test_broken_files(self):
        with open(self.TEXT, "rb") as f:
            cut = self.write("cut.gguf", f.read()[:-1000])
        self.lacks("cut.gguf: tensor", cut)
        self.lacks("(an incomplete download?)", self.MMPROJ, cut)
        self.lacks("not a GGUF file", self.MMPROJ, os.path.join(ROOT, "README.md"))
        self.lacks("nowhere.gguf: cannot be opened", self.path("nowhere.gguf"), cut)
        self.lacks("holds no part of a model", self.write_empty())

    def write_empty(self):
        write_gguf(self.path("empty.gguf"), [("general.architecture", 8, "nothing")])
        return self.path("empty.gguf")


QUANTIZED = {"f32": (0, 1, 4), "f16": (1, 1, 2), "bf16": (30, 1, 2), "q4_0": (2, 32, 18), "q4_1": (3, 32, 20), "q5_0": (6, 32, 22),
             "q5_1": (7, 32, 24), "q8_0": (8, 32, 34), "q2_k": (10, 256, 84), "q3_k": (11, 256, 110), "q4_k": (12, 256, 144),
             "q5_k": (13, 256, 176), "q6_k": (14, 256, 210)}          # type number, values and bytes of a block
MIXES = ["q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m"]


def gaussian():
    """Sums of 12 uniform numbers, less 6: nearly normal, of variance 1. make_golden.py computes the same."""
    state, values = 1, []
    for _ in range(64 * 256):
        total = 0
        for _ in range(12):
            state = (state * 1664525 + 1013904223) % 2 ** 32
            total += state >> 8
        values.append(total / 2 ** 24 - 6)
    return list(struct.unpack("<%df" % len(values), struct.pack("<%df" % len(values), *values)))


def deviation(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)) / len(a))


class Quantize(Case):
    def quantize(self, values, width, *recipes):
        """A matrix of float32 values, in rows of `width`, through one recipe after another. -> bytes of its data"""
        path = self.path("matrix.gguf")
        write_gguf(path, [], [("x.weight", [len(values) // width, width], values)])
        for recipe in recipes:
            self.succeeds("quantize", "-q", path, path, recipe)
        kind, n, n_bytes = QUANTIZED[recipes[-1]]
        self.assertEqual(read_gguf(path)[2], [("x.weight", [len(values) // width, width], kind)])
        size = len(values) // n * n_bytes
        data = read_bytes(path)
        return data[len(data) - (size + 31) // 32 * 32:][:size]

    def expanded(self, values, *recipes):
        return struct.unpack("<%df" % len(values), self.quantize(values, 256, *recipes, "f32"))

    def test_bits_and_errors_of_others(self):
        """The `gguf` package's bits; for the K types, llama.cpp's error at most."""
        with open(os.path.join(ROOT, "test", "golden", "quants.gold"), "rb") as f:
            data = f.read()
        n, names, normal = struct.unpack_from("<I", data)[0], {row[0]: name for name, row in QUANTIZED.items()}, gaussian()
        values, at = struct.unpack_from("<%df" % n, data, 4), 4 + 4 * n
        while at < len(data):
            kind, size = struct.unpack_from("<II", data, at)
            at += 8 + size
            name = names.pop(kind)
            if size == 4:
                limit = struct.unpack("<f", data[at - 4:at])[0]
                self.assertLessEqual(deviation(normal, self.expanded(normal, name)), limit, name)
            else:
                self.assertEqual(self.quantize(values, 32, name), data[at - size:at], name)
        self.assertEqual(names, {})

    def test_same_bytes_everywhere(self):
        """All recipes: the bytes of the day this was written, on every machine and with any number of threads."""
        for name, wanted in (("models_b.gguf", "20ce5f34ab5a5377"), ("joint_a.gguf", "92a2c61b6392a53b"), ("vocab_spm.gguf", "831211a8fc8e6111")):
            seen = hashlib.sha256()
            for recipe in [*QUANTIZED, *MIXES]:
                for threads in "13":
                    self.succeeds("quantize", "-q", "-j", threads, golden(name), self.path("file%s.gguf" % threads), recipe)
                data = read_bytes(self.path("file1.gguf"))
                self.assertEqual(read_bytes(self.path("file3.gguf")), data, recipe)
                seen.update(data)
            self.assertEqual(seen.hexdigest()[:16], wanted, name)

    def test_long_tensors(self):
        """More than one chunk of values, and more rows than threads: each row as if it were alone."""
        row = gaussian()[:4096]
        self.assertEqual(self.quantize(row * 1026, 4096, "q8_0"), self.quantize(row * 2, 4096, "q8_0") * 513)

    def test_errors_are_small(self):
        """More bits, less error, at any scale; and no group pays for another that is 16 times as large."""
        normal, order = gaussian()[:4096], ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "f16", "f32"]
        largest = [0.3, 0.15, 0.08, 0.04, 0.02, 0.01, 0.001, 0]                # for a variance of 1
        for scale in (0.01, 1, 128):
            values, before = [x * scale for x in normal], 1e30
            values = struct.unpack("<4096f", struct.pack("<4096f", *values))
            for name, limit in zip(order, largest):
                error = deviation(values, self.expanded(values, name))
                self.assertTrue(error < before and error <= limit * scale, (name, scale, error))
                before = error
        values = [x * (1 + i // 16 % 16) for i, x in enumerate(normal)]
        for name, limit in zip(order[:5], largest):
            self.assertLess(deviation(values, self.expanded(values, name)), 10 * limit)      # sqrt(mean g^2) is 9.7

    def test_again(self):
        """What was read from a block and is written again is read as the same, where the rule finds the block's own scale."""
        values = gaussian()[:4096]
        for name in ("f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"):
            self.assertEqual(self.expanded(values, name), self.expanded(values, name, "f32", name), name)

    def test_awkward_values(self):
        constants, rows = [0, -0.0, 1e-45, 1e-40, -1e-38, 1e-36, 1e-13, -3e-8, 65504, -1e6, 1e9, -1e38, 3.4e38], []
        rng = random.Random(5)
        for c in constants:
            rows += [[c] * 256, [c if i == 77 else 0 for i in range(256)], [rng.choice((c, -c)) for _ in range(256)],
                     [c * (rng.random() - 0.5) for _ in range(256)]]
        rows += [list(struct.unpack("<256f", rng.getrandbits(8192).to_bytes(1024, "little"))) for _ in range(20)]   # any bits
        values = [x for row in rows for x in row]
        for name in QUANTIZED:
            if name in ("f32", "f16", "bf16"):
                continue                                    # they may hold infinity and NaN
            back = self.expanded(values, name)
            for i, row in enumerate(rows):
                largest = max(abs(x) for x in row if x == x)
                limit = 1.2 * largest + 6e-8 * 31           # the least half, 31 steps at most
                self.assertTrue(all(abs(y) <= limit for y in back[256 * i:256 * i + 256]), (name, i))

    def test_nan_and_infinity(self):
        normal = gaussian()[:512]
        holes = [math.nan if i % 37 == 0 else x for i, x in enumerate(normal)]
        zeros = [0 if i % 37 == 0 else x for i, x in enumerate(normal)]
        for name in QUANTIZED:
            self.assertEqual(self.quantize(holes, 256, name) == self.quantize(zeros, 256, name), name[0] == "q", name)
            for sign in (1, -1):
                values = zeros[:]
                values[100] = sign * math.inf
                back = self.expanded(values, name)
                if name[0] == "q":
                    self.assertTrue(65504 <= sign * back[100] < 1e9, (name, back[100]))
                else:
                    self.assertTrue(back[100] == values[100] and back[101] != 0, name)

    def test_lost_values_are_said(self):
        for values, recipe, n in (([math.nan, math.inf, 1.0] + [0.5] * 29, "q8_0", 2), ([70000.0] + [0.5] * 31, "f16", 1), ([0.5] * 32, "q4_0", 0)):
            path = self.path("lost.gguf")
            write_gguf(path, [], [("x.weight", [2, 32], values + [0.25] * 32)])
            said = self.succeeds("quantize", path, path, recipe).err
            self.assertEqual("warning: x.weight: %d values" % n in said, n > 0, said)

    def test_mixes(self):
        """What llama.cpp's llama-quantize makes of a model of 18 blocks."""
        mixes = {"q3_k_s": ("3" * 18, "3" * 18, "3" * 18), "q3_k_m": ("55" + "4" * 16, "5" + "4" * 17, "4" * 18),
                 "q3_k_l": ("5" * 18, "5" * 18, "5" * 18), "q4_k_s": ("5555" + "4" * 14, "55" + "4" * 16, "4" * 18),
                 "q4_k_m": ("664464464464464666", "664464464464464666", "4" * 18), "q5_k_s": ("5" * 18, "5" * 18, "5" * 18),
                 "q5_k_m": ("665565565565565666", "665565565565565666", "5" * 18)}
        digits = {row[0]: name[1] for name, row in QUANTIZED.items()}
        parts = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
        for with_output in (False, True):
            tensors = [("token_embd.weight", [2, 256], [0.1] * 512)] + [("output.weight", [2, 256], [0.1] * 512)] * with_output
            for i in range(18):
                tensors += [("blk.%d.%s.weight" % (i, part), [2, 256], [0.1] * 512) for part in parts]
                tensors += [("blk.%d.attn_norm.weight" % i, [256], [1.0] * 256)]
            path = self.path("blocks.gguf")
            write_gguf(path, [], tensors)
            for name, (v, down, output) in mixes.items():
                self.succeeds("quantize", "-q", path, self.out(), name)
                types = {tensor: digits[kind] for tensor, _, kind in read_gguf(self.out())[2]}
                for part in parts:
                    wanted = {"attn_v": v, "ffn_down": down, "attn_output": output}.get(part, name[1] * 18)
                    self.assertEqual("".join(types["blk.%d.%s.weight" % (i, part)] for i in range(18)), wanted, (name, part))
                self.assertEqual(types["token_embd.weight"], name[1] if with_output else "6")
                self.assertEqual(types.get("output.weight", "6"), "6")
                self.assertEqual(types["blk.3.attn_norm.weight"], "3")          # F32
        os.remove(self.out())

    def test_short_rows(self):
        """Rows that are not whole blocks take a type of smaller blocks, or F16."""
        others = {"q2_k": 2, "q3_k": 2, "q4_k": 6, "q5_k": 7, "q6_k": 8}
        for name in QUANTIZED:
            for width in (32, 24):
                write_gguf(self.path("short.gguf"), [], [("x.weight", [4, width], [0.5] * 4 * width)])
                self.succeeds("quantize", "-q", self.path("short.gguf"), self.out(), name)
                wanted = others.get(name, QUANTIZED[name][0]) if width == 32 or name[0] != "q" else 1
                self.assertEqual(read_gguf(self.out())[2][0][2], wanted, (name, width))
        os.remove(self.out())

    def out(self):
        return self.path("out.gguf")

    def check_nothing_left(self):
        self.assertEqual([name for name in os.listdir(self.folder) if name.startswith("out.gguf")], [])

    def captions(self, path):
        images = sorted(os.path.join(IMAGES, name) for name in os.listdir(IMAGES))
        return self.succeeds("caption", "--quiet", "-m", path, *images).out.splitlines()

    def test_captions_survive(self):
        wanted, wide = self.captions(MODEL), self.path("wide.gguf")
        self.succeeds("quantize", MODEL, wide, "f32")
        self.assertEqual(self.captions(wide), wanted)
        self.succeeds("quantize", wide, self.out(), "q8_0")
        self.assertEqual(self.captions(self.out()), wanted)
        self.succeeds("quantize", wide, self.out(), "Q4_K_M", "--threads", "2")
        for seen, line in zip(self.captions(self.out()), wanted):
            self.assertEqual(seen.split()[:2], line.split()[:2])
        self.assertLess(os.path.getsize(self.out()), 0.75 * os.path.getsize(MODEL))
        self.succeeds("score", "-m", self.out(), os.path.join(IMAGES, "spiral.png"), "--text", "a galaxy")
        os.remove(self.out())

    def test_what_is_written(self):
        result = json.loads(self.succeeds("quantize", "--json", MODEL, self.out(), "q4_k_m").out)
        _, metadata, tensors = read_gguf(MODEL)
        _, metadata2, tensors2 = read_gguf(self.out())
        self.assertEqual([t[:2] for t in tensors], [t[:2] for t in tensors2])
        self.assertEqual((metadata2.pop("general.file_type"), metadata2.pop("general.quantization_version")), (15, 2))
        for key in ("general.file_type", "general.quantization_version"):
            metadata.pop(key, None)
        self.assertEqual(repr(metadata), repr(metadata2))
        self.assertEqual((result["bytes_before"], result["bytes"]), (os.path.getsize(MODEL), os.path.getsize(self.out())))
        self.assertEqual(result["changed"], sum(a[2] != b[2] for a, b in zip(tensors, tensors2)))
        self.assertEqual(sum(result["types"].values()), len(tensors))
        self.assertEqual(result["requantized"], sum(a[2] != b[2] and a[2] >= 2 for a, b in zip(tensors, tensors2)))
        self.assertGreater(result["fallbacks"], 0)
        self.assertAlmostEqual(result["bits_per_weight"], 6.05, delta=0.3)
        os.remove(self.out())

    def test_what_is_said(self):
        result = self.succeeds("quantize", MODEL, self.out(), "q6_k")
        self.assertRegex(result.out, r"^6\.8 MB, now \d\.\d MB, \d\.\d\d bits a weight; \d+ of 217 tensors changed in \d")
        self.assertRegex(result.out, r"Q6_K +\d+ tensors")
        self.assertRegex(result.err, "note: \\d+ tensors got another type")
        self.assertRegex(result.err, "warning: \\d+ tensors were quantized before")
        result = self.succeeds("quantize", "--quiet", MODEL, self.out(), "q6_k")
        self.assertEqual((result.out, result.err), ("", ""))
        self.assertEqual(self.succeeds("quantize", "-q", golden("models_b.gguf"), self.out(), "bf16").err, "")
        os.remove(self.out())

    def test_onto_itself(self):
        with open(MODEL, "rb") as f:
            path = self.write("itself.gguf", f.read())
        self.succeeds("quantize", "-q", MODEL, self.path("reference.gguf"), "q5_0")
        self.succeeds("quantize", "-q", path, path, "q5_0")
        with open(path, "rb") as f, open(self.path("reference.gguf"), "rb") as g:
            self.assertEqual(f.read(), g.read())

    def test_errors(self):
        self.fails(2, "quantize", MODEL, self.out())
        self.fails(2, "quantize", MODEL, self.out(), "q8_0", "more")
        result = self.fails(2, "quantize", MODEL, self.out(), "q4_k_xl")
        for name in ('"q4_k_xl"', "q8_0", "q4_k_m", "bf16", "Try: astrovl quantize --help"):
            self.assertIn(name, result.err)
        self.assertIn("is a folder", self.fails(1, "quantize", MODEL, self.folder, "q8_0").err)
        self.assertIn("cannot be created", self.fails(1, "quantize", MODEL, self.path("no/such/out.gguf"), "q8_0").err)
        self.assertIn("not a GGUF file", self.fails(1, "quantize", self.images[0], self.out(), "q8_0").err)
        self.assertIn("cannot be opened", self.fails(1, "quantize", self.path("nowhere.gguf"), self.out(), "q8_0").err)
        self.write("out.gguf.part", b"")
        self.assertIn("exists", self.fails(1, "quantize", MODEL, self.out(), "q8_0").err)
        os.remove(self.out() + ".part")
        self.check_nothing_left()

    def test_full_disk(self):
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        result = self.fails(1, "quantize", MODEL, self.out(), "q4_0", preexec_fn=limit, restore_signals=False)
        self.assertIn("is the disk full?", result.err)
        self.check_nothing_left()

    def test_interrupted(self):
        wide = self.path("wide.gguf")
        self.succeeds("quantize", "-q", MODEL, wide, "f32")
        process = subprocess.Popen([PROGRAM, "quantize", "-q", "-j", "1", wide, self.out(), "q3_k_m"], stderr=subprocess.PIPE)
        while process.poll() is None and not os.path.exists(self.out() + ".part"):
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        message = process.communicate()[1].decode()
        if process.returncode:                            # it may have been faster
            self.assertEqual((process.returncode, "cancelled" in message), (1, True), message)
            self.check_nothing_left()
        else:
            os.remove(self.out())


def load_npy(path):
    """-> shape, values; checks the header by the format's rules"""
    with open(path, "rb") as f:
        data = f.read()
    assert data[:8] == b"\x93NUMPY\x01\x00", data[:8]
    size = struct.unpack_from("<H", data, 8)[0]
    header = data[10:10 + size].decode("ascii")
    assert (10 + size) % 64 == 0 and header.endswith("\n"), (size, header)
    fields = ast.literal_eval(header)
    assert fields["descr"] == "<f4" and fields["fortran_order"] is False, fields
    n = 1
    for length in fields["shape"]:
        n *= length
    assert len(data) == 10 + size + 4 * n, (len(data), size, n)
    return fields["shape"], struct.unpack_from("<%df" % n, data, 10 + size), data[10 + size:]


def fnv1a64(data):
    h = 14695981039346656037
    for byte in data:
        h = ((h ^ byte) * 1099511628211) % 2**64
    return h


class Trace(Case):
    def test_a_file_is_no_prompt(self):
        self.assertIn("the prompt is missing", self.fails(2, "trace", self.images[0], "--hash").err)

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.out = cls.path("trace")
        cls.result = astrovl("trace", cls.images[0], "What is this?", "-o", cls.out, "--max-tokens", "3")

    def index(self):
        with open(os.path.join(self.out, "index.tsv")) as f:
            rows = [line.rstrip("\n").split("\t") for line in f]
        self.assertEqual(rows[0], ["file", "name", "layer", "call", "shape", "fnv1a64"])
        return [dict(zip(rows[0], row)) for row in rows[1:]]

    def test_files(self):
        self.assertEqual(self.result.code, 0, self.result)
        rows = self.index()
        self.assertGreater(len(rows), 20)
        self.assertEqual({row["file"] for row in rows} | {"index.tsv"}, set(os.listdir(self.out)))
        self.assertEqual(len({row["file"] for row in rows}), len(rows))
        for row in rows:
            shape, values, _ = load_npy(os.path.join(self.out, row["file"]))
            self.assertEqual("x".join(map(str, shape)), row["shape"])
            self.assertTrue(all(abs(v) < 1e30 for v in values), row)
            expected = row["name"] + (".npy" if row["call"] == "1" else ".call%s.npy" % row["call"])
            self.assertEqual(row["file"], expected)

    def test_hashes(self):
        for row in sorted(self.index(), key=lambda row: os.path.getsize(os.path.join(self.out, row["file"])))[:10]:
            _, _, data = load_npy(os.path.join(self.out, row["file"]))
            self.assertEqual("%016x" % fnv1a64(data), row["fnv1a64"])

    def test_hash_option_agrees_with_the_files(self):
        result = self.succeeds("trace", self.images[0], "What is this?", "--hash", "--max-tokens", "3")
        lines = result.out.splitlines()
        rows = [[row["fnv1a64"], row["name"], row["shape"]] for row in self.index()]
        self.assertEqual([line.split() for line in lines[:-2]], rows)
        total = fnv1a64("".join(line + "\n" for line in lines[:-2]).encode())
        self.assertEqual(lines[-2], "total %016x of %d tensors" % (total, len(lines) - 2))
        self.assertEqual(json.loads(lines[-1].split(" ", 1)[1]).strip(), self.result.out.strip())

    def test_threads_do_not_matter(self):
        outs = {self.succeeds("trace", self.images[0], "What?", "--hash", "--threads", n).out for n in ("1", "2", "8")}
        self.assertEqual(len(outs), 1)

    def test_numpy(self):
        try:
            import numpy
        except ImportError:
            self.skipTest("numpy is not installed")
        for row in self.index():
            array = numpy.load(os.path.join(self.out, row["file"]))
            self.assertEqual((array.dtype, "x".join(map(str, array.shape))), (numpy.float32, row["shape"]))

    def test_text_alone(self):
        result = self.succeeds("trace", "What is a galaxy?", "--hash")
        self.assertNotIn("vision", result.out)

    def test_folder_that_cannot_be_written(self):
        for folder in (self.path("missing/below"), self.images[0], "/proc/trace"):
            result = self.fails(1, "trace", self.images[0], "What?", "-o", folder)
            self.assertEqual(result.out, "")

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full here")
    def test_full_disk(self):
        folder = self.path("full")
        os.mkdir(folder)
        os.symlink("/dev/full", os.path.join(folder, self.index()[0]["file"]))
        index = self.write("full/index.tsv", b"earlier")
        self.assertIn("cannot be written", self.fails(1, "trace", self.images[0], "What?", "-o", folder).err)
        self.assertEqual(read_bytes(index), b"earlier")


class Chat(Case):
    def chat(self, script, *options, code=0):
        result = astrovl("chat", *options, *SHORT, stdin=script.encode())
        self.assertEqual(result.code, code, result)
        return result

    def test_answers_alone_on_standard_output(self):
        result = self.chat("What is this?\n\nIs it red?\n", self.images[0])
        self.assertEqual(len(result.out.splitlines()), 2, result)
        self.assertEqual(result.err, "")

    def test_first_answer_is_ask_s(self):
        asked = self.succeeds("ask", self.images[0], "What is this?", *SHORT).out
        self.assertEqual(self.chat("What is this?\n", self.images[0]).out, asked)
        self.assertEqual(self.chat("/image %s\nWhat is this?\n" % self.images[0]).out, asked)
        self.assertEqual(self.chat("What is this?", self.images[0]).out, asked)          # no newline at the end
        self.assertEqual(self.chat("What is this?\r\n", self.images[0]).out, asked)
        self.assertEqual(self.chat("", "--prompt", "What is this?", self.images[0]).out, asked)

    def test_reset(self):
        twice = self.chat("What is this?\n/reset\nWhat is this?\n", self.images[0]).out.splitlines()
        self.assertEqual(twice[0], twice[1])

    def test_turns_are_remembered(self):
        result = self.chat("What is this?\nWhat is this?\n", "--json", self.images[0])
        first, second = [json.loads(line) for line in result.out.splitlines()]
        self.assertLess(second["tokens"]["prompt"], first["tokens"]["prompt"])    # the image is not read again

    def test_quit_ends_it(self):
        self.assertEqual(self.chat("/quit\nWhat is this?\n", self.images[0]).out, "")

    def test_help_and_unknown_commands(self):
        self.assertIn("/image FILE", self.chat("/help\n").err)
        result = self.chat("/imgae x\nWhat is this?\n", self.images[0], code=1)
        self.assertIn("/imgae", result.err)
        self.assertEqual(len(result.out.splitlines()), 1)

    def test_bad_image(self):
        result = self.chat("/image %s\nWhat is this?\n" % self.path("nowhere.png"), self.images[0], code=1)
        self.assertIn("nowhere.png", result.err)
        self.assertEqual(len(result.out.splitlines()), 1)                         # the talk goes on
        self.assertEqual(self.chat("What?\n", self.path("nowhere.png"), code=1).out, "")

    def test_another_image(self):
        first, second = self.images[:2]
        alone = self.chat("What is this?\n", second).out
        self.assertEqual(self.chat("What is this?\n/image %s\nWhat is this?\n" % second, first).out.splitlines()[1:], alone.splitlines())
        n_prompt = {}
        for command in ("/add", "/image"):     # /image begins with the system text again, /add goes on
            lines = self.chat("What is this?\n%s %s\nWhat is this?\n" % (command, second), "--json", first).out.splitlines()
            n_prompt[command] = json.loads(lines[1])["tokens"]["prompt"]
        self.assertLess(n_prompt["/add"], n_prompt["/image"])

    def test_an_image_for_a_model_that_cannot_see(self):
        script = "/image %s\n" % self.images[0]
        self.assertIn("cannot see", self.chat(script, "-m", golden("models_a_text.gguf"), code=1).err)

    def test_without_an_image(self):
        self.assertEqual(len(self.chat("What is a galaxy?\n").out.splitlines()), 1)

    def test_full_context(self):
        result = self.chat("What is this?\n" * 60, "--ctx", "200", self.images[0], code=1)
        self.assertIn("/reset", result.err)

    def test_long_line(self):
        self.chat("star " * 100000 + "\nWhat is this?\n", self.images[0], code=1)

    def test_zero_bytes(self):
        self.chat("What is\0 this?\n", self.images[0])


class Output(Case):
    def run_with(self, out, *arguments):
        done = subprocess.run([PROGRAM, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE,
                              cwd=ROOT, timeout=300)
        return done.returncode, done.stderr.decode()

    def test_reader_that_leaves(self):
        for arguments in (["caption", self.images[0], *SHORT], ["inspect"], ["--help"], ["tokens", "x"],
                          ["caption", "--json", self.images[0], *SHORT], ["trace", self.images[0], "What?", "--hash"]):
            read, write = os.pipe()
            os.close(read)
            code, err = self.run_with(write, *arguments)
            os.close(write)
            self.assertEqual((code, err), (1, ""), arguments)

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full here")
    def test_full_disk(self):
        for arguments in (["caption", self.images[0], *SHORT], ["inspect"], ["tokens", "x"]):
            with open("/dev/full", "wb") as full:
                code, err = self.run_with(full, *arguments)
            self.assertEqual(code, 1, arguments)
            self.assertIn("cannot be written", err)

    def test_closed_streams(self):
        for redirect in (">&-", "<&- >&-", "<&- >&- 2>&-"):
            code = subprocess.call(["sh", "-c", '"$0" caption --quiet "$1" ' + redirect, PROGRAM, self.images[0]],
                                   stderr=subprocess.DEVNULL, cwd=ROOT, timeout=300)
            self.assertEqual(code, 1, redirect)

    def test_other_working_folder_and_path(self):
        done = subprocess.run([PROGRAM, "tokens", "--ids", "x"], cwd=self.folder, stdout=subprocess.PIPE, timeout=60)
        self.assertEqual(done.returncode, 0)
        environment = dict(os.environ, PATH=os.path.dirname(PROGRAM) + os.pathsep + os.environ["PATH"])
        done = subprocess.run([os.path.basename(PROGRAM), "tokens", "--ids", "x"], cwd=self.folder, env=environment,
                              stdout=subprocess.PIPE, timeout=60)
        self.assertEqual(done.returncode, 0)

    def test_interrupt_ends_the_program(self):
        def listen():   # a job in the background (CI) is started with interrupts ignored, and hands that on
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen([PROGRAM, "caption", "--exact", "--threads", "1", *(self.images * 500)], cwd=ROOT,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=listen)
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            self.fail("still running a minute after the interrupt")
        self.assertIn(process.returncode, (1, -2))


# ---- images and texts in one space -------------------------------------------------------------------------------------

LABELS = ["spiral galaxy", "globular cluster", "comet", "ringed planet", "merging galaxies"]


def examples():
    return sorted(os.path.join(IMAGES, name) for name in os.listdir(IMAGES) if name.endswith((".png", ".jpg")))


def write_micro_model(path, seed=0):
    """A vision tower of one layer and 8 numbers, so small that indexing costs next to nothing. Random weights."""
    rng = random.Random(seed)

    def tensor(name, *shape):
        n = 1
        for length in shape:
            n *= length
        return name, list(shape), [rng.uniform(-0.5, 0.5) for _ in range(n)]
    tensors = [tensor("v.class_embd", 8), tensor("v.patch_embd.weight", 8, 3, 14, 14), tensor("v.position_embd.weight", 5, 8),
               tensor("visual_projection.weight", 8, 8), ("logit_scale", [1], [3.0])]
    for name in ("v.pre_ln", "v.post_ln", "v.blk.0.ln1", "v.blk.0.ln2"):
        tensors += [tensor(name + ".weight", 8), tensor(name + ".bias", 8)]
    for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
        tensors += [tensor("v.blk.0.%s.weight" % name, 8, 8), tensor("v.blk.0.%s.bias" % name, 8)]
    tensors += [tensor("v.blk.0.ffn_up.weight", 16, 8), tensor("v.blk.0.ffn_up.bias", 16),
                tensor("v.blk.0.ffn_down.weight", 8, 16), tensor("v.blk.0.ffn_down.bias", 8)]
    write_gguf(path, [("general.architecture", 8, "clip"), ("clip.has_vision_encoder", 7, True),
                      ("clip.has_text_encoder", 7, False), ("clip.has_llava_projector", 7, False), ("clip.use_gelu", 7, False),
                      ("clip.vision.image_size", 4, 28), ("clip.vision.patch_size", 4, 14),
                      ("clip.vision.embedding_length", 4, 8), ("clip.vision.feed_forward_length", 4, 16),
                      ("clip.vision.projection_dim", 4, 8), ("clip.vision.attention.head_count", 4, 2),
                      ("clip.vision.block_count", 4, 1), ("clip.vision.attention.layer_norm_epsilon", 6, 1e-5),
                      ("clip.vision.image_mean", (9, 6), [0.5] * 3), ("clip.vision.image_std", (9, 6), [0.25] * 3)], tensors)
    return path


def read_index(path):
    """An index as demo.c documents it -> n_dims, [(offset, name, row's bytes)], bytes of a torn record at the end"""
    with open(path, "rb") as f:
        data = f.read()
    magic, version, n_dims, _, check = struct.unpack_from("<8sIIQQ", data)
    assert (magic, version, check) == (b"AVLINDEX", 1, fnv1a64(data[:24])), data[:32]
    records, at = [], 32
    while len(data) - at >= 8:
        n, negated = struct.unpack_from("<II", data, at)
        assert n ^ negated == 0xFFFFFFFF, at
        end = at + 8 + 2 * n_dims + n
        if end + 8 > len(data):
            break
        assert struct.unpack_from("<Q", data, end)[0] == fnv1a64(data[at:end]), at
        records.append((at, data[end - n:end].decode(), data[at + 8:end - n]))
        at = end + 8
    return n_dims, records, len(data) - at


class Contrastive(Case):
    def rows(self, *arguments):
        return [json.loads(line) for line in self.succeeds("embed", *arguments).out.splitlines()]

    def test_score(self):
        result = json.loads(self.succeeds("score", "--json", os.path.join(IMAGES, "comet.jpg"), "--text", "a comet", "--text",
                                          "a ringed planet").out)
        self.assertEqual([match["text"] for match in result["matches"]], ["a comet", "a ringed planet"])
        self.assertGreater(result["matches"][0]["cosine"], result["matches"][1]["cosine"])
        self.assertAlmostEqual(sum(match["probability"] for match in result["matches"]), 1, places=5)
        text = self.succeeds("score", *examples(), "--text", "a comet").out.splitlines()
        self.assertEqual(text[0::2], examples())
        self.assertTrue(all(re.match(r"  [ -]\d\.\d{4}  100\.0 %  a comet$", line) for line in text[1::2]), text)

    def test_score_goes_on_after_a_bad_image(self):
        result = self.fails(1, "score", self.path("nowhere.png"), self.images[0], "--text", "a")
        self.assertIn("nowhere.png", result.err)
        self.assertTrue(result.out.startswith(self.images[0] + "\n"), result)
        result = self.fails(1, "score", "--json", self.path("nowhere.png"), self.images[0], "--text", "a")
        self.assertEqual(["error" in json.loads(line) for line in result.out.splitlines()], [True, False])

    def test_score_is_the_cosine_of_the_embeddings(self):
        texts = ["a comet", "ein Komet, \u2604", "", "galaxy " * 200]
        matches = json.loads(self.succeeds("score", "--json", examples()[0], *[a for t in texts for a in ("--text", t)]).out)["matches"]
        image = self.rows(examples()[0])[0]["embedding"]
        for match, row in zip(matches, self.rows(*[a for t in texts for a in ("--text", t)])):
            self.assertEqual(match["text"], row["text"])
            self.assertAlmostEqual(match["cosine"], sum(a * b for a, b in zip(image, row["embedding"])), places=5)

    def test_describe_with_the_list_shipped(self):
        result = self.succeeds("describe", "-k", "2", os.path.join(IMAGES, "spiral.png")).out.splitlines()
        self.assertEqual(len(result), 1 + 3 * 3, result)
        self.assertIn("spiral galaxy", result[2])
        groups = json.loads(self.succeeds("describe", "--json", "-k1000", os.path.join(IMAGES, "spiral.png")).out)["matches"]
        self.assertGreaterEqual(len(groups), 190)
        self.assertEqual(len({match["group"] for match in groups}), 3)
        self.assertEqual(len({match["text"] for match in groups}), len(groups))
        with open(os.path.join(ROOT, "test", "labels.txt"), encoding="utf-8") as f:
            self.assertEqual({match["text"] for match in groups}, {line.strip() for line in f if line[0] not in "#["})

    def test_describe_with_labels_of_one_s_own(self):
        labels = self.write("labels.txt", "\ufeff# five\r\n\r\n  {}\r\n#x\n\t{} \n{}\n{}\n\n{}".format(*LABELS).encode())
        for name, best in (("comet.jpg", "comet"), ("globular.jpg", "globular cluster"), ("planet.png", "ringed planet")):
            result = json.loads(self.succeeds("describe", "--json", "-l", labels, os.path.join(IMAGES, name)).out)["matches"]
            self.assertEqual(sorted(match["text"] for match in result), sorted(LABELS))
            self.assertEqual(result[0]["text"], best)
            self.assertEqual(result, sorted(result, key=lambda match: -match["cosine"]))
        self.assertEqual(len(self.succeeds("describe", "-k", "1", "-l", labels, self.images[0]).out.splitlines()), 2)

    def test_hostile_labels(self):
        for data, says in [(b"", "no label"), (b"\n# none\n \t\n", "no label"), (b"a\n\xff\n", ":2: "), (b"a\nb\0c\n", ":2: "),
                           (b"a\n\n\x1b[31m\n", ":3: "), (b"x" * 1001, ":1: "), (b"a\n" * 100001, ":100001: "),
                           (b"\xed\xa0\x80", ":1: "), (b"a\nb\xe2\x82", ":2: ")]:
            result = self.fails(1, "describe", "-l", self.write("bad.txt", data), self.images[0])
            self.assertIn(says, result.err)
            self.assertIn("bad.txt", result.err)
            self.assertEqual(result.out, "")
        for path in (self.path("nowhere.txt"), self.folder):
            self.assertIn(path, self.fails(1, "describe", "-l", path, self.images[0]).err)

    def test_embed_numbers(self):
        rows = self.rows(*self.images)
        self.assertEqual([row["file"] for row in rows], self.images)
        for row in rows:
            self.assertAlmostEqual(sum(v * v for v in row["embedding"]), 1, places=5)
        raw = self.rows("--raw", self.images[0])[0]["embedding"]
        length = sum(v * v for v in raw) ** 0.5
        self.assertGreater(abs(length - 1), 1e-3)
        for a, b in zip(raw, rows[0]["embedding"]):
            self.assertAlmostEqual(a / length, b, places=5)
        for batch in ("1", "2", "256"):
            self.assertEqual(self.rows("--batch", batch, *self.images), rows)

    def test_embed_npy_holds_the_same_bits(self):
        for arguments in (self.images, ["--text", "a comet", "--text", "a star"]):
            rows = self.rows(*arguments)
            self.assertEqual(self.succeeds("embed", *arguments, "-o", self.path("rows.npy")).out, "")
            shape, _, data = load_npy(self.path("rows.npy"))
            self.assertEqual(shape, (2, len(rows[0]["embedding"])))
            self.assertEqual(data, b"".join(struct.pack("<%df" % shape[1], *row["embedding"]) for row in rows))

    def test_a_full_disk_costs_no_earlier_file(self):
        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        path = self.write("earlier", b"earlier")
        for arguments in (["embed", self.images[0], "-o"], ["evaluate", "retrieval", os.path.join(ROOT, "test/pairs.jsonl"), "--svg"]):
            result = astrovl(*arguments, path, preexec_fn=limit)
            self.assertEqual(result.code, 1, result)
            self.assertIn("cannot be written", result.err)
            self.assertEqual(read_bytes(path), b"earlier")
            self.assertFalse(os.path.exists(path + ".part"))

    def test_long_paths_keep_the_reason(self):
        for path in ("x" * 3000, self.folder + "/no" * 400 + ".png"):
            for arguments in (["caption", path], ["index", path, "-o", self.path("a.avl")], ["inspect", path], ["embed", path],
                              ["ask", path, "What?", "-m", MODEL], ["summarize", path], ["search", path, "x"],
                              ["embed", self.images[0], "-o", path], ["index", self.images[0], "-o", path]):
                self.assertRegex(self.fails(1, *arguments).err, "cannot be|too long|no index|no such", arguments)

    def test_embed_failures(self):
        result = self.fails(1, "embed", self.images[0], self.path("nowhere.png"))
        self.assertEqual(len(result.out.splitlines()), 1)
        self.fails(1, "embed", self.images[0], self.path("nowhere.png"), "-o", self.path("half.npy"))
        self.assertFalse(os.path.exists(self.path("half.npy")))
        self.assertIn("cannot be created", self.fails(1, "embed", self.images[0], "-o", self.path("missing/rows.npy")).err)

    def test_models_without_the_towers(self):
        vocabulary = self.path("vocabulary.gguf")
        write_vocabulary(vocabulary)
        micro = write_micro_model(self.path("micro.gguf"))
        for model, arguments in ((vocabulary, ["embed", self.images[0]]), (micro, ["embed", "--text", "a"]),
                                 (micro, ["score", self.images[0], "--text", "a"]), (vocabulary, ["index", self.images[0], "-o", "x"])):
            result = self.fails(1, arguments[0], "-m", model, *arguments[1:])
            self.assertIn(os.path.basename(model), result.err)
            self.assertIn("cannot embed", result.err)

    def test_search_by_another_engine(self):
        """What README.md shows with numpy and FAISS: the rows elsewhere, the nearest found by products, as `astrovl search`."""
        index = self.path("examples.avl")
        self.succeeds("index", IMAGES, "-o", index)
        rows = self.rows(*examples())
        self.succeeds("embed", "--text", "a ringed planet", "-o", self.path("query.npy"))
        _, query, _ = load_npy(self.path("query.npy"))
        scores = {row["file"]: sum(a * b for a, b in zip(row["embedding"], query)) for row in rows}
        hits = json.loads(self.succeeds("search", index, "a ringed planet", "--json").out)["hits"]
        self.assertEqual([hit["file"] for hit in hits], sorted(scores, key=lambda name: -scores[name]))
        self.assertEqual(hits[0]["file"], os.path.join(IMAGES, "planet.png"))
        for hit in hits:
            self.assertAlmostEqual(hit["cosine"], scores[hit["file"]], places=3)           # the index keeps float16
        text = self.succeeds("search", index, "a ringed planet", "-k", "2").out.splitlines()
        self.assertEqual([line.split(None, 1)[1] for line in text], [hit["file"] for hit in hits[:2]])
        nearest = json.loads(self.succeeds("search", index, "--image", examples()[1], "--json", "-k1").out)["hits"]
        self.assertEqual(nearest[0]["file"], examples()[1])
        self.assertAlmostEqual(nearest[0]["cosine"], 1, places=3)


class Index(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.micro = write_micro_model(cls.path("micro.gguf"))
        cls.tree = cls.path("tree")
        for i in range(300):                                       # different pictures, in folders of several depths
            folder = os.path.join(cls.tree, *["abc"[i % 3]] * (i % 4))
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, "%03d.%s" % (i, ["ppm", "PNM", "Ppm"][i % 3])), "wb") as f:
                f.write(b"P6 5 4 255\n" + bytes(random.Random(i).randrange(256) for _ in range(60)))
        cls.three = [os.path.join(cls.tree, "%03d.%s" % (i, e)) for i, e in ((0, "ppm"), (4, "PNM"), (8, "Ppm"))]

    def index(self, name, *words, code=0, **options):
        return (self.succeeds if code == 0 else lambda *a, **o: self.fails(code, *a, **o))(
            "index", "-m", self.micro, "-o", self.path(name), *words, **options)

    def search(self, name, code=0):
        arguments = ["search", "-m", self.micro, self.path(name), "--image", self.three[0], "--json", "-k", "1000"]
        return (self.succeeds if code == 0 else lambda *a: self.fails(code, *a))(*arguments)

    def found(self, name):
        return sorted(hit["file"] for hit in json.loads(self.search(name).out)["hits"])

    def names(self, name):
        return [record[1] for record in read_index(self.path(name))[1]]

    def all_images(self):
        return sorted(os.path.join(folder, file) for folder, _, files in os.walk(self.tree) for file in files)

    def test_rows(self):
        result = self.index("rows.avl", *self.three)
        self.assertIn("3 images added", result.out)
        n_dims, records, torn = read_index(self.path("rows.avl"))
        self.assertEqual((n_dims, torn, [record[1] for record in records]), (8, 0, self.three))
        lines = self.succeeds("embed", "-m", self.micro, *self.three).out.splitlines()
        for (_, _, row), line in zip(records, lines):
            self.assertEqual(row, struct.pack("<8e", *json.loads(line)["embedding"]))
        hits = json.loads(self.search("rows.avl").out)["hits"]
        query = json.loads(lines[0])["embedding"]
        for hit in hits:
            row = struct.unpack("<8e", records[self.three.index(hit["file"])][2])
            self.assertAlmostEqual(hit["cosine"], sum(a * b for a, b in zip(row, query)), places=6)

    def test_folders(self):
        self.index("tree.avl", self.tree)
        self.assertEqual(self.names("tree.avl"), self.all_images())
        for batch in ("1", "7", "256"):
            self.index("batch%s.avl" % batch, self.tree + "/", "--batch", batch)
            self.assertEqual(read_index(self.path("batch%s.avl" % batch)), read_index(self.path("tree.avl")))

    def test_only_images_and_no_circles(self):
        folder = self.path("mixed")
        os.mkdir(folder)
        for name in ("a.png", "B.PNG", "c.JpG", "d.jpeg", "e.pnm", "f.pgm", "g.txt", "h", "png", "i.pngx", "j.gif", ".k.png", "l.jp"):
            with open(os.path.join(folder, name), "wb") as f:
                f.write(star_field(0) if name != "f.pgm" else b"P5 1 1 255\n\x80")
        os.symlink(folder, os.path.join(folder, "circle"))
        os.symlink("..", os.path.join(folder, "up.png"))
        os.symlink(os.path.join(folder, "a.png"), os.path.join(folder, "link.png"))
        os.mkfifo(os.path.join(folder, "pipe.png"))
        self.index("mixed.avl", folder)
        self.assertEqual([os.path.basename(name) for name in self.names("mixed.avl")],
                         [".k.png", "B.PNG", "a.png", "c.JpG", "d.jpeg", "e.pnm", "f.pgm", "link.png"])

    def test_what_is_passed_over_is_said(self):
        folder = self.path("kinds")
        os.mkdir(folder)
        for name in ("a.png", "b.fits", "c.TIF", "d.txt", "e.heif", "f.fits.FZ", "g.fits.gz", "h.JPE"):
            with open(os.path.join(folder, name), "wb") as f:
                f.write(star_field(0))
        self.assertIn("6 images of other formats", self.index("kinds.avl", folder).err)
        self.assertEqual(json.loads(self.index("kinds.avl", "--json", folder).out)["passed_over"], 6)
        os.symlink("nowhere.png", os.path.join(folder, "gone.png"))
        self.assertIn("gone.png", self.index("kinds.avl", folder, code=1).err)

    def test_one_file_by_several_spellings(self):
        name = self.three[0]
        head, tail = os.path.split(name)
        result = self.index("spelled.avl", name, head + "/./" + tail, head + "//" + tail, head + "/.//./" + tail)
        self.assertIn("1 images added", result.out)
        self.assertEqual(self.names("spelled.avl"), [name])
        for spelled in (".//none.png", "././/none.png", ".///./none.png"):     # never /none.png
            self.assertIn('"file": "none.png"', self.index("none.avl", spelled, "--json", code=1).out)

    def test_names_from_standard_input(self):
        names = ("\r\n".join(self.three) + "\n\n" + self.three[0]).encode()
        self.index("stdin.avl", "-", stdin=names)
        self.assertEqual(self.names("stdin.avl"), self.three)
        result = self.index("zero.avl", "-", stdin=b"a\nb\0c\n", code=1)
        self.assertIn("standard input:2: ", result.err)

    def test_resumes(self):
        self.index("resume.avl", self.three[1])
        result = self.index("resume.avl", self.tree)
        self.assertIn("has 1 of these 300", result.err)
        self.assertEqual(sorted(self.names("resume.avl")), self.all_images())
        counts = json.loads(self.index("resume.avl", self.tree, "--json", "--quiet").out)
        self.assertEqual((counts["added"], counts["known"], counts["unreadable"], counts["rows"]), (0, 300, 0, 300))

    def test_unreadable_images(self):
        broken, missing = self.write("broken.png", star_field(0)[:100]), self.path("nowhere.png")
        result = self.index("bad.avl", self.three[0], broken, missing, self.three[1], code=1)
        self.assertEqual((result.err.count("broken.png"), result.err.count("nowhere.png")), (1, 1))
        self.assertIn("2 images added", result.out)
        self.assertIn("2 unreadable", result.out)
        self.assertEqual(self.names("bad.avl"), sorted(self.three[:2]))
        self.assertEqual(self.found("bad.avl"), self.three[:2])
        self.index("none.avl", missing, code=1)
        self.assertEqual(json.loads(self.search("none.avl").out)["hits"], [])

    def test_nothing_to_index(self):
        os.mkdir(self.path("empty"))
        self.assertIn("no images", self.index("nothing.avl", self.path("empty"), code=1).err)
        self.assertIn("no images", self.index("nothing.avl", "-", stdin=b"\n", code=1).err)

    def test_places_that_cannot_be_written(self):
        self.assertIn("cannot be written", self.index("missing/x.avl", self.three[0], code=1).err)
        os.mkfifo(self.path("pipe"))
        for place in (".", "pipe", "/dev/null"):
            self.assertIn("name a file", self.index(place, self.three[0], code=1).err)
        self.assertIn("no index", self.fails(1, "search", "-m", self.micro, MODEL, "--image", self.three[0]).err)
        self.assertIn("no index", self.index("../" + os.path.basename(self.folder) + "/micro.gguf", self.three[0], code=1).err)
        self.fails(1, "search", "-m", self.micro, self.path("nowhere.avl"), "--image", self.three[0])

    def test_full_disk(self):
        """Here: a limit to the size of files. What does not fit is taken back, and the run can go on later."""
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        result = self.index("full.avl", self.tree, "-b", "3", code=1, preexec_fn=limit, restore_signals=False)
        self.assertIn("full.avl: cannot be written", result.err)
        _, records, torn = read_index(self.path("full.avl"))
        self.assertEqual((len(records) % 3, len(records) > 0, torn), (0, True, 0))
        self.assertIn("%d already there" % len(records), self.index("full.avl", self.tree).out)
        self.assertEqual(self.names("full.avl"), self.all_images())

    def test_another_model(self):
        self.index("model.avl", *self.three)
        before = read_index(self.path("model.avl"))
        other = write_micro_model(self.path("other.gguf"), seed=1)
        for arguments in (["search", "-m", other, self.path("model.avl"), "--image", self.three[0]],
                          ["search", self.path("model.avl"), "a comet"], ["index", *self.three, "-o", self.path("model.avl")],
                          ["index", "-m", other, *self.three, "-o", self.path("model.avl")]):
            self.assertIn("another model", self.fails(1, *arguments).err)
        self.assertEqual(read_index(self.path("model.avl")), before)

    def test_two_at_once(self):
        os.mkfifo(self.path("wait.png"))
        first = subprocess.Popen([PROGRAM, "index", "-m", self.micro, "-o", self.path("two.avl"), self.path("wait.png")],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with open(self.path("wait.png"), "wb"):                    # opens once the first has: it then holds the index
            self.assertIn("another astrovl", self.index("two.avl", self.three[0], code=1).err)
            self.assertEqual(self.found("two.avl"), [])             # whoever only reads may
        first.wait(timeout=60)
        os.unlink(self.path("wait.png"))
        self.index("two.avl", self.three[0])

    def test_a_kill_loses_only_the_pass_in_flight(self):
        fifo = os.path.join(self.folder, "tree", "005.png")         # between 004 and 008 in the order of names
        for batch in (1, 4):
            names = self.all_images()
            os.mkfifo(fifo)
            before = sorted(names + [fifo]).index(fifo)
            process = subprocess.Popen([PROGRAM, "index", "-m", self.micro, "-o", self.path("flight%d.avl" % batch), "-b", str(batch), "-"],
                                       stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            process.stdin.write("\n".join(names + [fifo]).encode())
            process.stdin.close()
            with open(fifo, "wb"):                                  # it has come to this image
                process.kill()
                process.wait()
            os.unlink(fifo)
            self.assertEqual(self.names("flight%d.avl" % batch), names[:before - before % batch])

    def test_kills(self):
        self.index("whole.avl", self.tree)
        whole = read_index(self.path("whole.avl"))
        start = time.time()
        self.index("timed.avl", self.tree)
        seconds = time.time() - start
        rng = random.Random(7)
        names, kills, torn_tails = [], 0, 0
        while kills < 30:
            process = subprocess.Popen([PROGRAM, "index", "-m", self.micro, "-o", self.path("killed.avl"), self.tree, "-b", "2"],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(rng.uniform(0, seconds / 4))
            process.kill()
            process.wait()
            kills += 1
            if not os.path.exists(self.path("killed.avl")) or os.path.getsize(self.path("killed.avl")) < 32:
                continue
            _, records, torn = read_index(self.path("killed.avl"))
            now = [record[1] for record in records]
            self.assertEqual(now[:len(names)], names)               # nothing that was there is lost
            self.assertEqual(now, self.all_images()[:len(now)])
            self.assertEqual(self.found("killed.avl"), now)
            if len(now) == 300:
                os.unlink(self.path("killed.avl"))
                now = []
            names, torn_tails = now, torn_tails + (torn > 0)
        self.index("killed.avl", self.tree)
        self.assertEqual(read_index(self.path("killed.avl")), whole)
        with open(self.path("killed.avl"), "rb") as a, open(self.path("whole.avl"), "rb") as b:
            self.assertEqual(a.read(), b.read())

    def three_rows(self):
        self.index("three.avl", *self.three)
        with open(self.path("three.avl"), "rb") as f:
            data = f.read()
        return data, [record[0] for record in read_index(self.path("three.avl"))[1]] + [len(data)]

    def test_torn_at_every_byte(self):
        data, starts = self.three_rows()
        for size in range(starts[2], len(data)):
            self.write("torn.avl", data[:size])
            result = self.search("torn.avl")
            self.assertEqual(sorted(hit["file"] for hit in json.loads(result.out)["hits"]), self.three[:2])
            self.assertEqual("incomplete record" in result.err, size > starts[2])
            if size % 8 == 0 or size == starts[2] + 1:
                result = self.index("torn.avl", *self.three)
                self.assertIn("1 images added", result.out)
                with open(self.path("torn.avl"), "rb") as f:
                    self.assertEqual(f.read(), data)
        for zeros in (1, 8, 100, 5000):                             # a machine that lost power
            self.write("zeros.avl", data[:starts[2]] + bytes(zeros))
            self.assertEqual(self.found("zeros.avl"), self.three[:2])
            self.index("zeros.avl", *self.three)
            self.assertEqual(self.found("zeros.avl"), self.three)

    def test_damage_in_the_middle(self):
        data, starts = self.three_rows()
        for at in range(starts[1], starts[2]):
            bad = data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1:]
            self.write("damaged.avl", bad)
            for result in [self.search("damaged.avl", code=1)] + ([self.index("damaged.avl", *self.three, code=1)] if at % 15 == 0 else []):
                self.assertIn("damaged.avl: the record at byte %d is damaged" % starts[1], result.err)
            with open(self.path("damaged.avl"), "rb") as f:
                self.assertEqual(f.read(), bad)                     # an error changes nothing
        self.write("damaged.avl", data[:starts[1]] + bytes(8) + data[starts[1] + 8:])
        self.search("damaged.avl", code=1)
        for at in range(starts[2], len(data), 3):                   # in the last record: an error, or passed over
            self.write("damaged.avl", data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1:])
            result = astrovl("search", "-m", self.micro, self.path("damaged.avl"), "--image", self.three[0])
            self.assertIn((result.code, "damaged.avl" in result.err), [(0, True), (1, True)], result)

    def test_hostile_headers_and_sizes(self):
        data, starts = self.three_rows()
        for at in range(32):
            self.write("hostile.avl", data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1:])
            self.assertIn("hostile.avl", self.search("hostile.avl", code=1).err)
            if at % 4 == 0:
                self.index("hostile.avl", *self.three, code=1)
        for size in range(32):
            self.write("hostile.avl", data[:size])
            self.assertIn("incomplete", self.search("hostile.avl", code=1).err)
            if size % 6 == 1:
                self.index("hostile.avl", *self.three)
                self.assertEqual(self.found("hostile.avl"), self.three)
        model = data[16:24]
        for version, n_dims in ((1, 0), (1, 7), (1, 0xFFFFFFFF), (2, 8), (0, 8)):          # with a checksum that is right
            head = struct.pack("<8sII", b"AVLINDEX", version, n_dims) + model
            self.write("hostile.avl", head + struct.pack("<Q", fnv1a64(head)) + data[32:])
            self.search("hostile.avl", code=1)
        for n in (0, 65536, 0x7FFFFFFF, 0xFFFFFFFE):
            self.write("hostile.avl", data[:32] + struct.pack("<II", n, n ^ 0xFFFFFFFF) + data[40:])
            self.assertIn("byte 32", self.search("hostile.avl", code=1).err)
        rng = random.Random(3)
        for _ in range(30):
            bad = bytearray(data)
            for _ in range(rng.randint(1, 6)):
                bad[rng.randrange(32, len(bad))] = rng.randrange(256)
            self.write("hostile.avl", bytes(bad))
            self.assertIn(astrovl("search", "-m", self.micro, self.path("hostile.avl"), "--image", self.three[0]).code, (0, 1))


class Evaluate(Case):
    PAIRS = os.path.join(ROOT, "test", "pairs.jsonl")
    SET = os.path.join(ROOT, "test", "vqa.jsonl")

    def test_retrieval(self):
        svg = self.path("plot.svg")
        result = json.loads(self.succeeds("evaluate", "retrieval", self.PAIRS, "--json", "--svg", svg).out)
        n = result["pairs"]
        with open(self.PAIRS) as f:
            pairs = [json.loads(line) for line in f]
        self.assertEqual((n, [row["k_percent"] for row in result["accuracy"]]), (len(pairs), list(range(1, 101))))
        texts = self.embed(*[a for pair in pairs for a in ("--text", pair["caption"])])
        images = self.embed(*[os.path.join(ROOT, "test", pair["image"]) for pair in pairs])
        cosines = [[sum(a * b for a, b in zip(image, text)) for text in texts] for image in images]
        for row in result["accuracy"]:
            best = row["k_percent"] * n // 100
            self.assertEqual(row["best"], best)
            for key, table in (("image_to_text", cosines), ("text_to_image", [list(column) for column in zip(*cosines)])):
                right = sum(sum(v > line[i] for v in line) < best for i, line in enumerate(table))
                self.assertAlmostEqual(row[key], right / n, places=6)
        loss, scale = 0, result["logit_scale"]                       # CLIP's, by its definition
        for table in (cosines, list(zip(*cosines))):
            loss += sum(math.log(sum(math.exp(scale * (v - line[i])) for v in line)) for i, line in enumerate(table)) / (2 * n)
        self.assertAlmostEqual(result["contrastive_loss"] / loss, 1, places=4)
        matched = sorted(cosines[i][i] for i in range(n))
        for seen, value in zip(result["cosines_matched"]["sorted"], matched):
            self.assertAlmostEqual(seen, value, places=5)
        wrong = sorted(v for i in range(n) for j, v in enumerate(cosines[i]) if i != j)
        for seen in result["cosines_shuffled"]["sorted"]:           # none is a pair's
            self.assertTrue(any(abs(seen - v) < 1e-5 for v in wrong), seen)
        self.assertAlmostEqual(result["cosines_matched"]["mean"], sum(matched) / n, places=5)
        self.assertAlmostEqual(result["cosines_matched"]["median"], matched[n // 2], places=5)
        texts = xml.dom.minidom.parse(svg).getElementsByTagName("text")
        words = " ".join(node.firstChild.data for node in texts)
        for word in ("5 pairs", "accuracy (%)", "k (% of the set)", "cosine", "chance", "wrong pairs"):
            self.assertIn(word, words)
        with open(svg) as f:
            self.assertNotRegex(f.read(), "nan|inf")

    def embed(self, *arguments):
        return [json.loads(line)["embedding"] for line in self.succeeds("embed", *arguments).out.splitlines()]

    def test_retrieval_as_text(self):
        lines = self.succeeds("evaluate", "retrieval", self.PAIRS).out.splitlines()
        rows = {line.split()[0]: line for line in lines if re.match(r" *\d+ %", line)}
        self.assertEqual(sorted(rows, key=int), ["1", "5", "10", "20", "50"])
        for k in ("1", "5", "10"):                                  # floor(k/100 * 5) is 0: said, and not called a success
            self.assertIn("too few pairs", rows[k])
            self.assertIn("0.0 %", rows[k])
        self.assertNotIn("too few", rows["20"])

    def test_vqa(self):
        result = json.loads(self.succeeds("evaluate", "vqa", self.SET, "--json").out)
        with open(self.SET) as f:
            samples = [json.loads(line) for line in f]
        caption = json.loads(self.succeeds("caption", "--json", os.path.join(ROOT, "test", samples[0]["image"])).out)["text"]
        self.assertEqual(result["answers"][0]["text"], caption)
        self.assertEqual([answer["class"] for answer in result["answers"]], [sample["class"] for sample in samples])
        right = found = 0
        for sample, answer in zip(samples, result["answers"]):
            words = [w for w in sample["features"] if re.search(r"\b%s\b" % re.escape(w), answer["text"], re.I)]
            self.assertEqual(answer["features_found"], len(words))
            found += len(words)
            right += answer["named"] == sample["class"]
            pair = self.embed("--text", answer["text"], "--text", sample["description"])
            self.assertAlmostEqual(answer["semantic_score"], sum(a * b for a, b in zip(*pair)), places=5)
        self.assertAlmostEqual(result["accuracy"], right / len(samples), places=6)
        self.assertAlmostEqual(result["features_found"], found / sum(len(s["features"]) for s in samples), places=6)
        self.assertEqual([c["class"] for c in result["classes"]], [s["class"] for s in samples])
        self.assertTrue(all(sum(c["named"]) == 1 and c["accuracy"] == c["named"][i] for i, c in enumerate(result["classes"])))
        text = self.succeeds("evaluate", "vqa", self.SET).out
        self.assertIn("(%d of 5" % right, text)
        self.assertEqual(len(re.findall(r"^ +\d  .*%.*$", text, re.M)), 5, text)

    def test_named_classes(self):
        """Whole words, any case, the first class named, the longest of those that begin there."""
        text = json.loads(self.succeeds("caption", "--json", self.images[0]).out)["text"]
        words = re.findall(r"[A-Za-z]+", text)
        phrase = " ".join(words[:2])
        for classes, named in (([words[1], "zebra"], words[1]), ([words[1].upper(), "zebra"], words[1].upper()),
                               ([words[0], phrase, words[1]], phrase), ([words[1][:-1], words[1][1:]], "none")):
            lines = [json.dumps({"image": self.images[0], "class": name}) for name in classes]
            path = self.write("named.jsonl", ("\n".join(lines) + "\n").encode())
            result = json.loads(self.succeeds("evaluate", "vqa", path, "--json").out)
            self.assertEqual([answer["named"] for answer in result["answers"]], [named] * len(classes), (text, classes))
            self.assertEqual((result["semantic_score"], result["features_found"]), (None, None))

    def test_broken_lines(self):
        good = json.dumps({"image": self.images[0], "caption": "stars", "class": "stars"})
        for line, says in [("{", ""), ("[]", ""), ("nothing", ""), ('{"image": "a.png"}', "is missing"), ('{"caption": "a", "class": "a"}', "image"),
                           ('{"image": 1, "caption": "a", "class": "a"}', ""), ('{"image": "", "caption": "a", "class": "a"}', "empty"),
                           ('{"image": ["a", "b"], "caption": "a", "class": "a"}', "one text"), (good + "x", ""), (good[:-1], ""),
                           ('{"image": "a.png", "caption": "\\ud800", "class": "\\ud800"', "")]:
            path = self.write("broken.jsonl", ("%s\n\n%s\n%s" % (good, line, good)).encode())
            for what in ("retrieval", "vqa"):
                result = self.fails(1, "evaluate", what, path)
                self.assertIn("broken.jsonl:3: ", result.err)
                self.assertIn(says, result.err)
                self.assertEqual(result.out, "")
        path = self.write("broken.jsonl", (good + "\n" + good[:-1] + ', "features": 7}\n').encode())
        self.assertIn(":2: ", self.fails(1, "evaluate", "vqa", path).err)

    def test_missing_files(self):
        for path in (self.path("nowhere.jsonl"), self.folder, self.write("empty.jsonl", b""), self.write("one.jsonl", b'\n{"image": "a", "caption": "b", "class": "c"}\n')):
            for what in ("retrieval", "vqa"):
                self.assertIn(path, self.fails(1, "evaluate", what, path).err)
        lines = [json.dumps({"image": name, "caption": "x", "class": "x"}) for name in (self.images[0], "nowhere.png")]
        path = self.write("images.jsonl", "\n".join(lines).encode())
        for what in ("retrieval", "vqa"):
            result = self.fails(1, "evaluate", what, path)
            self.assertIn(self.path("nowhere.png"), result.err)     # as seen from the set's folder
            self.assertEqual(result.out, "")
        path = self.write("images.jsonl", (lines[0] + "\n" + lines[0]).encode())
        self.assertIn("cannot be created", self.fails(1, "evaluate", "retrieval", path, "--svg", self.path("no/x.svg")).err)


class Summarize(Case):
    ABSTRACT = b"We propose to image the gravitational arcs in the cluster Abell 370, to map its dark matter.\n"

    def run_json(self, *arguments, **options):
        return json.loads(self.succeeds("summarize", *arguments, "-", stdin=self.ABSTRACT, **options).out)

    def test_the_paper_s_schema(self):
        for arguments in (["60"], ["100", "--temperature", "1", "--seed", "5"], ["150", "--temperature", "2", "--seed", "6"]):
            answer = self.run_json("--quiet", "--max-tokens", *arguments)
            self.assertEqual(list(answer), ["objects_and_phenomena", "science_use_cases"])
            for entries in answer.values():
                self.assertTrue(1 <= len(entries) <= 5 and all(isinstance(e, str) and 1 <= len(e) <= 80 for e in entries), answer)

    def test_too_few_tokens(self):
        self.assertIn("tokens to end", self.fails(1, "summarize", "--max-tokens", "20", "-", stdin=self.ABSTRACT).err)

    def test_files_and_json(self):
        files = [self.write("abstract%d.txt" % i, self.ABSTRACT * (i + 1)) for i in range(2)]
        lines = self.succeeds("summarize", "--json", "--max-tokens", "80", *files).out.splitlines()
        self.assertEqual([json.loads(line)["file"] for line in lines], files)
        for line in lines:
            self.assertEqual(len(json.loads(json.loads(line)["text"])), 2)

    def test_other_forms(self):
        self.assertIsInstance(self.run_json("--bool", "--query", "gravitational lensing"), bool)
        self.assertIn("lensing", self.succeeds("summarize", "--json", "--bool", "--query", "lensing", "-", stdin=self.ABSTRACT).out)
        result = self.succeeds("summarize", "--regex", "(galaxy|star){2}-[0-9]{4}", "-q", "-", stdin=self.ABSTRACT).out
        self.assertRegex(result, r"^(galaxy|star){2}-[0-9]{4}\n$")
        schema = self.write("schema.json", b'{"type": "object", "properties": {"n": {"type": "integer"}, "kind": {"enum": '
                            b'["galaxy", "star"]}}, "required": ["n", "kind"]}')
        answer = self.run_json("--schema", schema, "--prompt", "How many are there, and of which kind?")
        self.assertIsInstance(answer["n"], int)
        self.assertIn(answer["kind"], ("galaxy", "star"))

    def test_errors(self):
        for data, says in ((b"", "empty"), (b" \n\n", "empty"), (b"a\0b", "zero bytes")):
            self.assertIn(says, self.fails(1, "summarize", self.write("bad.txt", data)).err)
        self.fails(1, "summarize", self.path("nowhere.txt"))
        self.fails(1, "summarize", "--schema", self.path("nowhere.json"), "-", stdin=self.ABSTRACT)
        for schema in (b"", b"{", b'{"type": "unicorn"}', b'{"type": "object", "properties": {"a": {"pattern": "x"}}}', b"\xff"):
            result = self.fails(1, "summarize", "--schema", self.write("bad.json", schema), "-", stdin=self.ABSTRACT)
            self.assertIn("bad.json", result.err)
            self.assertEqual(result.out, "")
        for pattern in ("(", "[", "a{2", "*", "(?=x)"):
            self.assertIn("--regex", self.fails(1, "summarize", "--regex", pattern, "-", stdin=self.ABSTRACT).err)
        self.fails(1, "summarize", "-", stdin=self.ABSTRACT * 2000)          # longer than the context


class Bench(Case):
    """test/bench: what it prints; never how fast it is."""

    def measure(self, *arguments, **options):
        return self.succeeds(*arguments, program=BENCH, **options)

    def cannot(self, *arguments, **options):
        result = astrovl(*arguments, program=BENCH, **options)
        self.assertEqual((result.code, result.out), (1, ""), result)
        self.assertTrue(result.err.startswith("bench: ") or ": a model of random" in result.err, result)
        return result

    def test_options(self):
        for says, *arguments in (("wanted: bench", "find"), ("wanted: bench", "search", "again"), ("TEXTFILE", "accuracy"),
                                 ("too many words", "accuracy", "a", "b"), ("--batch wants", "--batch", "65"),
                                 ("--rounds wants", "--rounds", "100"), ("one of", "--synthetic", "nano", "-m", MODEL),
                                 ("no option --foo", "--foo", "1"), ("wants a value", "--rounds")):
            self.assertIn(says, self.cannot(*arguments).err)
        for name in ("", "nano:", ":q4_0", "nano:q4_k_m", "nano:q9_0", "nan", "nanox", "llava"):
            self.assertIn("llava-1.5-7b, smollm2-135m or nano", self.cannot("--synthetic", name).err)

    def test_search(self):
        result = json.loads(self.measure("search", "--rows", "2000", "--dims", "64", "--json").out)
        self.assertEqual((result["rows"], result["dims"]), (2000, 64))
        self.assertAlmostEqual(result["ratio"], result["search_seconds"] / result["read_seconds"], delta=0.01 * result["ratio"])
        self.assertIn("ratio", self.measure("search", "--rows", "100", "--dims", "3", "--rounds", "2").out)

    def bench(self, *arguments):
        return json.loads(self.measure("--json", "--rounds", "1", "--prompt", "8", "--tokens", "3", *arguments).out)

    def check_pace(self, pace, n, work, kind):
        self.assertEqual((pace["n"], pace["type"]), (n, kind))
        self.assertAlmostEqual(pace["per_second"] * pace["seconds"], n, delta=0.01 * n)
        self.assertAlmostEqual(pace["reached"], pace[work] / pace["seconds"] / pace["limit_per_second"], delta=0.01 * pace["reached"])
        self.assertGreater(pace["limit_per_second"], 1e5)

    def test_shipped_model(self):
        result = self.bench()
        self.assertEqual((result["name"], result["rounds"]), ("astrovl-tiny", 1))
        self.check_pace(result["image"], 1, "operations", "Q8_0")
        self.check_pace(result["prompt"], 8, "operations", "Q8_0")
        self.check_pace(result["answer"], 3, "bytes", "Q8_0")
        matrices = [t for t in read_gguf(MODEL)[2] if t[2] == 8 and (t[0].startswith("blk.") or t[0] == "output.weight")]
        values = sum(shape[0] * shape[1] for _, shape, _ in matrices)
        seen = (9 + 10 + 11) * 4 * 2 * 32 * 2              # keys and values that the three tokens see: float16, or float as below
        self.assertIn(result["answer"]["bytes"] - 3 * values * 34 // 32, (2 * seen, 4 * seen))
        self.assertGreater(result["first_token_seconds"], result["image"]["seconds"])
        self.assertEqual(result["memory"]["files"], os.path.getsize(MODEL))
        self.assertGreater(result["memory"]["peak"], 1 << 20)
        numbers = (64 + 35) * 4 * 2 * 32 * 2               # keys and values of the image and a question: float16, or float if
        self.assertIn(result["memory"]["kv_cache"], (2 * numbers, 4 * numbers))                    # there are no fast kernels
        self.assertEqual(self.bench("--prompt", "5000", "--tokens", "24")["prompt"]["n"], 1000)   # cut to the context
        result = self.measure("--rounds", "2", "--prompt", "4", "--tokens", "1", "-j", "1",
                               env=dict(os.environ, ASTROVL_ISA="portable"))
        self.assertRegex(result.out, "(?s)astrovl-tiny, medians of 2.*one image .* s .* GOP/s .*%.*prompt.*answer.*GB/s.*memory")
        self.assertEqual(result.err, "")
        self.assertIn('"avx1024"', self.cannot(env=dict(os.environ, ASTROVL_ISA="avx1024")).err)

    def test_answers_together(self):
        result = self.bench()
        batch = result["batch"]
        self.assertEqual((batch["n"], batch["prompt"], batch["tokens"]), (8, 8, 3))
        self.assertAlmostEqual(batch["ratio"], batch["per_second"] / batch["alone_per_second"], delta=1e-4 * batch["ratio"])
        numbers = 8 * (8 + 3) * 4 * 2 * 32 * 2
        self.assertIn(batch["kv_caches"], (2 * numbers, 4 * numbers))
        self.assertEqual(self.bench("--batch", "2")["batch"]["n"], 2)
        self.assertNotIn("batch", self.bench("--batch", "0"))
        result = self.measure("--rounds", "1", "--prompt", "4", "--tokens", "1", "--batch", "3")
        self.assertRegex(result.out, r"3 answers together .* /s, .* times .* of one alone \(1 tokens after 4 positions each; KV caches")

    def accuracy(self, text, *arguments, **options):
        path = self.write("text.txt", text.encode())
        return json.loads(self.measure("accuracy", path, "--json", *arguments, **options).out)

    TEXT = "The image shows a barred spiral galaxy. Is there a bar? Yes, there is a bar.\n" * 8

    def test_accuracy(self):
        result = self.accuracy(self.TEXT, "--tokens", "100")
        self.assertEqual((result["name"], result["tokens"]), ("astrovl-tiny", 100))
        for part in (result["prompt"], result["steps"]):
            self.assertTrue(0.99 < part["least_cosine"] <= part["mean_cosine"] <= 1 + 1e-9, result)
            self.assertTrue(0.9 <= part["same_token"] <= 1 and part["largest_difference"] > 0, result)
            self.assertAlmostEqual(part["perplexity_ratio"], part["perplexity"] / result["exact_perplexity"], delta=1e-5)
            self.assertAlmostEqual(part["perplexity_ratio"], 1, delta=0.05)
        text = self.measure("accuracy", self.write("text.txt", self.TEXT.encode()), "-n", "100").out
        self.assertIn("%.6f" % result["steps"]["mean_cosine"], text)
        self.assertRegex(text, "(?s)astrovl-tiny, 100 tokens.*cosine.*perplexity.*together.*one by one")

    def test_accuracy_of_simple_kernels(self):
        result = self.accuracy(self.TEXT, "-m", golden("models_a_text.gguf"), "-n", "40", env=dict(os.environ, ASTROVL_ISA="portable"))
        for part in (result["prompt"], result["steps"]):
            self.assertTrue(part["least_cosine"] > 0.99999 and abs(part["perplexity_ratio"] - 1) < 1e-3, result)

    def test_perplexity(self):
        # exact mode's, against the logits that trace writes: of the first token alone, and of the first two
        ids = [int(i) for i in self.succeeds("tokens", "--special", "--ids", "a spiral").out.split()]
        self.assertEqual(len(ids), 3)
        surprise = 0
        for n, text in ((1, ""), (2, "a")):
            folder = self.path("trace%d" % n)
            self.succeeds("trace", text, "-o", folder, "--template", "plain", "-q")
            data = read_bytes(folder, "lm_head.npy")
            logits = struct.unpack("<%df" % ((len(data) - 128) // 4), data[128:])
            surprise += math.log(sum(math.exp(x - max(logits)) for x in logits)) + max(logits) - logits[ids[n]]
        result = self.accuracy("a spiral")
        self.assertEqual(result["tokens"], 3)
        self.assertAlmostEqual(result["exact_perplexity"] / math.exp(surprise / 2), 1, delta=1e-5)

    def test_accuracy_errors(self):
        self.assertIn("two tokens", self.cannot("accuracy", self.write("empty.txt", b"")).err)
        self.cannot("accuracy", self.path("nowhere.txt"))
        text = self.write("text.txt", self.TEXT.encode())
        self.assertIn("no language model", self.cannot("accuracy", text, "-m", golden("vocab_spm.gguf")).err)
        self.assertIn("no vocabulary", self.cannot("accuracy", text, "-m", golden("joint_a.gguf")).err)
        long = json.loads(self.measure("accuracy", "README.md", "--json", "-n", "5000").out)     # cut to the context
        self.assertEqual(long["tokens"], 1024)

    def test_parts_of_models(self):
        result = self.bench("-m", golden("models_a_text.gguf"))
        self.assertFalse("image" in result or "first_token_seconds" in result, result)
        self.assertEqual(result["batch"]["n"], 8)
        result = self.bench("-m", golden("joint_a.gguf"))
        self.assertFalse({"prompt", "answer", "first_token_seconds", "batch"} & set(result), result)
        self.assertGreater(result["image"]["reached"], 0)
        self.assertIn("neither", self.cannot("-m", golden("vocab_spm.gguf")).err)

    def test_synthetic(self):
        folder = self.path("synthetic")
        os.mkdir(folder)
        for kind, name in (("", "Q4_0"), (":q8_0", "Q8_0"), (":Q4_K", "Q4_K"), (":f16", "F16")):
            arguments = ["--json", "--rounds", "1", "--prompt", "8", "--tokens", "2", "--dir", folder, "--synthetic", "nano" + kind]
            first = self.measure(*arguments)
            paths = [line.split(".gguf: ")[0] + ".gguf" for line in first.err.splitlines()]
            self.assertEqual([os.path.basename(p) for p in paths], ["astrovl-nano-%s.gguf" % name, "astrovl-nano-mmproj-F16.gguf"])
            result = json.loads(first.out)
            self.assertEqual((result["name"], result["prompt"]["type"], result["image"]["type"]), ("nano", name, "F16"))
            self.assertEqual(result["memory"]["files"], sum(map(os.path.getsize, paths)))
            before = [os.stat(p).st_mtime_ns for p in paths]
            self.assertEqual(self.measure(*arguments).err, first.err)
            self.assertEqual([os.stat(p).st_mtime_ns for p in paths], before)
        good = read_bytes(paths[0])
        self.write("synthetic/astrovl-nano-F16.gguf", good[:-100])                        # cut short: made anew
        self.measure(*arguments)
        self.assertEqual(read_bytes(paths[0]), good)
        self.succeeds("inspect", "--check", *paths)
        # its numbers: as many operations as the shapes say, a standard deviation of about 0.02, and no two layers alike
        result = self.measure(*arguments)
        result, layers = json.loads(result.out), 2 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 256)
        self.assertEqual(result["prompt"]["operations"], 2 * (8 * layers + 256 * 512 + 2 * 2 * 256 * 8 * 9 / 2))
        tower = 4 * 64 * 64 + 2 * 64 * 128
        self.assertEqual(result["image"]["operations"], 2 * (16 * 147 * 64 + 2 * (17 * tower + 2 * 17 * 17 * 64) + 16 * (64 * 256 + 256 * 256)))
        for kind in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
            self.measure("--rounds", "1", "-p", "1", "-n", "1", "-b", "0", "--dir", folder, "--synthetic", "nano:" + kind)
            wide = self.path("wide.gguf")
            self.succeeds("quantize", "-q", os.path.join(folder, "astrovl-nano-%s.gguf" % kind), wide, "f32")
            data, n = read_bytes(wide), 256 * 256
            end = len(data) - 2 * 256 * 4                         # behind them are two norms
            values = [struct.unpack("<%df" % n, data[end - 4 * n * k:][:4 * n]) for k in (1, 2)]     # blk.1.ffn_down, ffn_up
            for x in values:
                self.assertAlmostEqual(sum(x) / n, 0, delta=0.003)
                self.assertAlmostEqual(math.sqrt(sum(v * v for v in x) / n), 0.02, delta=0.003, msg=kind)
            self.assertNotEqual(values[0][:256], values[1][:256])
        environment = dict(os.environ, TMPDIR=folder)
        self.assertIn(folder, self.measure("--synthetic", "nano", "--rounds", "1", env=environment).err)

    def test_synthetic_cannot_be_written(self):
        result = self.cannot("--synthetic", "nano", "--dir", self.path("no/such"))
        self.assertIn("cannot be created", result.err)

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, 1 << 17))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        full = self.path("full")
        os.mkdir(full)
        result = self.cannot("--synthetic", "nano", "--dir", full, preexec_fn=limit, restore_signals=False)
        self.assertIn("is the disk full?", result.err)
        self.assertEqual(os.listdir(full), [])

    def test_guided(self):
        result = json.loads(self.measure("guided", "--rounds", "1", "-n", "60", "--json").out)
        self.assertAlmostEqual(result["ratio"], result["guided_ms"] / result["free_ms"], delta=1e-6 * result["ratio"])
        self.assertIn("guided", self.measure("guided", "--rounds", "1", "-n", "60").out)
        self.assertIn("no vocabulary", self.cannot("guided", "-m", golden("joint_a.gguf")).err)


# ---- convert.py --------------------------------------------------------------------------------------------------------

CONVERT = os.path.join(ROOT, "convert.py")
CHECKPOINTS = os.path.join(ROOT, "test", "golden", "convert")     # test/make_golden.py tells what lies there
IMAGE = os.path.join(ROOT, "test", "golden", "models_1.png")
GIGABYTE = 1 << 30


def read_bytes(*path):
    with open(os.path.join(*path), "rb") as f:
        return f.read()


def read_json(*path):
    return json.loads(read_bytes(*path).decode())


def write_json(value, *path):
    with open(os.path.join(*path), "w") as f:
        json.dump(value, f)


def read_safetensors(*path):
    """-> {name: [dtype, shape, bytes]}"""
    data = read_bytes(*path)
    size, = struct.unpack_from("<Q", data)
    header = json.loads(data[8:8 + size].decode())
    header.pop("__metadata__", None)
    return {name: [t["dtype"], t["shape"], data[8 + size + t["data_offsets"][0]:8 + size + t["data_offsets"][1]]] for name, t in header.items()}


def safetensors_file(tensors):
    """{name: [dtype, shape, bytes]} -> the file's header, as an object, and its data"""
    header, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    return header, data


def with_header(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_safetensors(tensors, *path):
    with open(os.path.join(*path), "wb") as f:
        f.write(with_header(*safetensors_file(tensors)))


def limit_convert(file_size=None):
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTE, GIGABYTE))
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))


def run_convert(*arguments, folder, **limits):
    """Runs convert.py in this folder, with a gigabyte of memory and ten seconds."""
    done = subprocess.run([sys.executable, CONVERT, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          cwd=folder, timeout=10, preexec_fn=lambda: limit_convert(**limits))
    return Result(done.returncode, done.stdout, done.stderr)


def fork_convert(*arguments, folder, **limits):
    """The same without starting Python anew, for hundreds of cases. A status below 0 is a signal: -14 for ten seconds."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            status = 99
            try:
                signal.alarm(10)
                limit_convert(**limits)
                os.chdir(folder)
                for file, fd in ((out, 1), (err, 2)):
                    os.dup2(file.fileno(), fd)
                sys.stdout, sys.stderr, sys.argv = open(1, "w", closefd=False), open(2, "w", closefd=False), [CONVERT, *arguments]
                try:
                    status = load_convert().main()
                except SystemExit as e:
                    status = e.code
                except BaseException:
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)
        status = os.waitpid(pid, 0)[1]
        status = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        out.seek(0)
        err.seek(0)
        return Result(status, out.read(), err.read())


def load_convert():
    if "astrovl_convert" not in sys.modules:
        spec = importlib.util.spec_from_file_location("astrovl_convert", CONVERT)
        before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        sys.modules["astrovl_convert"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["astrovl_convert"])
        sys.dont_write_bytecode = before
    return sys.modules["astrovl_convert"]


def lay_together(folder, *parts):
    """A folder of files from folders of test/golden/convert/; what comes later wins. Made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    os.mkdir(folder)
    for part in parts:
        for file in os.listdir(os.path.join(CHECKPOINTS, part)):
            shutil.copyfile(os.path.join(CHECKPOINTS, part, file), os.path.join(folder, file))
    return folder


class ConvertCase(Case):
    @classmethod
    def checkpoint(cls, name, *parts):
        return lay_together(cls.path(name), *parts)


def rewrite(path, change):
    """Changes a JSON file's object in place."""
    value = read_json(path)
    change(value)
    write_json(value, path)


def rope_of_version_4(config):
    """Where transformers 4 kept what `rope_parameters` holds."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["head_dim"] = config["attention_bias"] = None                 # some versions write null for what is not set
    if config["rms_norm_eps"] == 1e-6:
        del config["rms_norm_eps"]                                       # what LlamaConfig takes without it


# Checkpoints that are others with another face. Each changes a folder in place.

def new_names(folder):                         # transformers 4.52's modules, written with a configuration of version 4
    rename = [("language_model.lm_head", "lm_head"), ("language_model.model.", "model.language_model."),
              ("vision_tower.", "model.vision_tower.vision_model."), ("multi_modal_projector.", "model.multi_modal_projector.")]
    tensors = {}
    for name, tensor in read_safetensors(folder, "model.safetensors").items():
        old, new = next(pair for pair in rename if name.startswith(pair[0]))
        tensors[new + name[len(old):]] = tensor
    write_safetensors(tensors, folder, "model.safetensors")
    rewrite(os.path.join(folder, "config.json"), lambda config: rope_of_version_4(config["text_config"]))


def rope_scaling(folder):
    rewrite(os.path.join(folder, "config.json"), rope_of_version_4)


def without_tower(folder):                     # liuhaotian's own: the third shard holds the tower and nothing else
    os.remove(os.path.join(folder, "pytorch_model-00003-of-00003.bin"))

    def change(index):
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if "00003-of" not in file}
    rewrite(os.path.join(folder, "pytorch_model.bin.index.json"), change)


def tower_alone(folder):                       # as CLIPVisionModel is saved
    tensors = read_safetensors(folder, "model.safetensors")
    write_safetensors({name: t for name, t in tensors.items() if name.startswith("vision_model.")}, folder, "model.safetensors")
    rewrite(os.path.join(folder, "config.json"), lambda config: config.update(config.pop("vision_config")))


def configuration_alone(folder):
    os.remove(os.path.join(folder, "model.safetensors"))


def tokenizer_alone(folder):                   # of llava_v5, below a language model
    os.remove(os.path.join(folder, "processor_config.json"))


def stretched(folder):                         # LLaMA-1's way to longer texts
    rewrite(os.path.join(folder, "config.json"), lambda config: config.update(rope_scaling={"type": "linear", "factor": 4.0}))


def rope_scaling_of_version_4(folder):
    tokenizer_alone(folder)
    rope_scaling(folder)


def lay_out(layout, path):
    """Makes a layout's folders below `path` -> convert.py's arguments"""
    parts, change, more, source, _, _ = LAYOUTS.get(layout) or CLIP_LAYOUTS[layout]
    arguments = []
    for name, option, (folders, change) in [(layout, None, (parts, change))] + [(layout + o, o, f) for o, f in more.items()]:
        folder = lay_together(os.path.join(path, name), *folders)
        if change:
            change(folder)
        arguments += [option, folder] if option else [os.path.join(folder, source)]
    return arguments


# name: (folders laid together, a change, more folders as {option: (folders, change)}, SOURCE within the folder, model, run)
LAYOUTS = {
    "llava_v5": (["llava_v5"], None, {}, "", "B", "crop"),
    "llava_new": (["llava_v5"], new_names, {}, "", "B", "crop"),
    "llava_old": (["spm", "llava_old"], None, {}, "", "A", "crop"),
    "llava_index": (["spm_json", "spm", "llava_old"], None, {}, "model.safetensors.index.json", "A", "crop"),
    "liuhaotian": (["spm", "liuhaotian"], None, {"--vision": (["clip"], configuration_alone)}, "", "A", "pad"),
    "liuhaotian_apart": (["spm", "liuhaotian"], without_tower, {"--vision": (["clip"], None)}, "", "A", "pad"),
    "liuhaotian_tower": (["spm", "liuhaotian"], without_tower, {"--vision": (["clip"], tower_alone)}, "", "A", "pad"),
    "projector": (["projector"], None, {"--base": (["spm", "llama2"], None), "--vision": (["clip"], None)}, "mm_projector.bin", "A", "pad"),
    "llama2": (["spm", "llama2"], None, {}, "", "A", "text"),
    "llama2_json": (["llama2", "spm_json"], None, {}, "", "A", "text"),
    "llama3": (["llava_v5", "llama3"], tokenizer_alone, {}, "model.safetensors", "D", "text"),
    "llama3_v4": (["llava_v5", "llama3"], rope_scaling_of_version_4, {}, "", "D", "text"),
    "smollm": (["smollm"], None, {}, "", "E", "text"),
    "smollm_linear": (["smollm"], stretched, {}, "", "E", "linear"),
}
IMAGE_RUNS = ("pad", "crop")                   # how the image becomes square
CLIP_LAYOUTS = {
    "clip": (["clip"], None, {}, "", "C", "rows"),
    "clip_flax": (["clip_flax"], None, {"--base": (["clip"], None)}, "flax_model.msgpack", "C", "rows"),
    "clip_transfer": (["clip_transfer"], None, {"--base": (["clip"], None)}, "", "C", "rows_with_heads"),
    "clip_open": (["clip_open"], None, {"--base": (["clip"], configuration_alone)}, "", "C", "rows"),
}


@unittest.skipUnless(os.path.exists(CONVERT), "no convert.py here")
class Convert(ConvertCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.expected = read_json(CHECKPOINTS, "expected.json")
        cls.made = {}

    def converted(self, layout, single=False):
        """Converts a layout, once -> the files made, text first"""
        if (layout, single) not in self.made:
            run = (LAYOUTS.get(layout) or CLIP_LAYOUTS[layout])[-1]
            arguments = lay_out(layout, self.folder)
            out = self.path("%s%s.gguf" % (layout, "-single" if single else ""))
            before = set(os.listdir(self.folder))
            result = run_convert("-o", out, *["--single"] * single, *arguments, folder=self.folder)
            self.assertEqual(result.code, 0, result)
            self.assertNotIn("error", result.err)
            files = [out] + [out.replace(".gguf", "-mmproj.gguf")] * (run in IMAGE_RUNS and not single)
            self.assertEqual(sorted(set(os.listdir(self.folder)) - before), sorted(map(os.path.basename, files)))
            self.made[layout, single] = files
        return self.made[layout, single]

    def models(self, layout, single=False):
        return [a for file in self.converted(layout, single) for a in ("-m", file)]

    def assertClose(self, seen, wanted):
        largest = max(map(abs, wanted))
        self.assertLess(max(abs(a - b) for a, b in zip(seen, wanted)), 1e-5 * largest)

    def trace(self, layout, single=False, *options):
        image = [IMAGE] if LAYOUTS[layout][-1] in IMAGE_RUNS else []
        return self.succeeds("trace", *self.models(layout, single), *image, self.expected["question"], "--template", "plain",
                             "--system", "", "--max-tokens", "12", *options)

    def test_the_reference_s_numbers(self):
        for layout, (_, _, _, _, model, run) in LAYOUTS.items():
            with self.subTest(layout):
                wanted = self.expected[model][run]
                out = self.path("trace-" + layout)
                result = self.trace(layout, False, "-o", out)
                self.assertEqual(result.out.rstrip("\n"), wanted["text"])
                shape, values, _ = load_npy(os.path.join(out, "lm_head.npy"))
                self.assertIn(len(wanted["logits"]) - shape[-1], (0, 8) if model == "A" else (0,))     # <image>, <pad> and padding
                self.assertClose(values[-shape[-1]:], wanted["logits"])

    def test_one_file_says_what_two_say(self):
        for layout in LAYOUTS:
            with self.subTest(layout):
                self.assertEqual(self.trace(layout, True, "--hash").out, self.trace(layout, False, "--hash").out)

    def test_clips(self):
        wanted = self.expected["C"]
        texts = [a for text in wanted["texts"] for a in ("--text", text)]
        for layout, (_, _, _, _, _, rows) in CLIP_LAYOUTS.items():
            for single in (False, True):
                with self.subTest(layout, single=single):
                    models = self.models(layout, single)
                    seen = [json.loads(line)["embedding"] for arguments in ([IMAGE], texts) for line in
                            self.succeeds("embed", "--exact", "--raw", *models, *arguments).out.splitlines()]
                    self.assertEqual(len(seen), len(wanted[rows]))
                    for a, b in zip(seen, wanted[rows]):
                        self.assertClose(a, b)
                    model = json.loads(self.succeeds("inspect", "--json", *models[1::2]).out)["parts"]
                    self.assertAlmostEqual(model["contrastive"]["logit_scale"] / wanted["logit_scale"], 1, places=5)

    def test_tokens(self):
        for layout, tokenizer in (("llava_old", "spm"), ("llama2", "spm"), ("llama2_json", "spm"), ("llava_v5", "llama3"), ("llama3", "llama3"), ("smollm", "smollm"),
                                  ("clip", "clip"), ("clip_flax", "clip")):
            for kind, cases in self.expected["tokens"][tokenizer].items():
                options = ["--special"] * (kind == "special") + ["--clip"] * (tokenizer == "clip")
                for text, ids in cases:
                    if layout == "llava_old" and "<image>" in text and kind == "special":
                        continue                       # an added token: below
                    with self.subTest(layout, kind=kind, text=text):
                        result = self.succeeds("tokens", "--ids", *options, *self.models(layout), stdin=text.encode())
                        self.assertEqual([int(i) for i in result.out.split()], ids)

    def test_added_tokens(self):
        vocabulary = len(self.expected["A"]["text"]["logits"])
        for text, token in (("<image>", vocabulary - 8), ("<pad>", vocabulary - 7)):
            result = self.succeeds("tokens", "--ids", "--special", *self.models("llava_old"), stdin=text.encode())
            self.assertEqual(int(result.out.split()[-1]), token)

    def test_added_tokens_without_a_row_are_left_out(self):
        folder = self.checkpoint("beyond", "smollm")
        tokens = read_json(folder, "config.json")["vocab_size"]
        write_json({"[PAD]": tokens}, folder, "added_tokens.json")
        result = run_convert("-o", "beyond.gguf", "--name", "smollm", folder, folder=self.folder)
        self.assertEqual(result.code, 0, result)
        self.assertRegex(result.err, r"note: .*\[PAD\]")
        self.assertEqual(read_bytes(self.path("beyond.gguf")), read_bytes(self.converted("smollm")[0]))

    def test_faces_of_one_checkpoint(self):
        """What people's folders look like gives the same file as the tidy folder; or the one difference that is named."""
        def stale(folder):                     # as AstroLLaVA's training leaves it
            rewrite(os.path.join(folder, "config.json"),
                    lambda config: config.update(text_config={"hidden_size": 4096, "rms_norm_eps": 1e-6, "vocab_size": 32064}))

        def layer_list(folder):
            rewrite(os.path.join(folder, "config.json"), lambda config: config.update(vision_feature_layer=[-2]))

        def tiktoken(folder):
            with open(os.path.join(folder, "tokenizer.model"), "w") as f:
                f.write("IQ== 0\nIg== 1\n")

        def bare(folder):
            os.rename(os.path.join(folder, "flax_model.msgpack"), os.path.join(folder, "step_1000"))

        def added_in_json(folder):             # tokens that only tokenizer.json has, beside tokenizer.model
            added = read_json(folder, "added_tokens.json")
            os.remove(os.path.join(folder, "added_tokens.json"))
            rewrite(os.path.join(folder, "tokenizer_config.json"), lambda config: config.pop("added_tokens_decoder", None))
            write_json({"added_tokens": [{"id": i, "content": text, "special": True} for text, i in added.items()]}, folder, "tokenizer.json")

        vision = ["--vision", self.checkpoint("vision", "clip")]
        base = ["--base", self.path("vision")]
        for layout, change, arguments in (("liuhaotian", stale, vision), ("llava_v5", layer_list, []), ("smollm", tiktoken, []),
                                          ("clip_flax", bare, base), ("llava_old", added_in_json, [])):
            with self.subTest(change.__name__):
                made = [read_bytes(path) for path in self.converted(layout)]
                folder = self.checkpoint("face", *(LAYOUTS.get(layout) or CLIP_LAYOUTS[layout])[0])
                change(folder)
                name = read_gguf(self.converted(layout)[0])[1]["general.name"].decode()
                result = run_convert("-o", "face.gguf", "--name", name, folder, *arguments, folder=self.folder)
                self.assertEqual(result.code, 0, result)
                self.assertEqual(read_bytes(self.path("face.gguf")), made[0])

    def test_sliding_window(self):
        folder = self.checkpoint("mistral", "spm", "llama2")
        rewrite(os.path.join(folder, "config.json"), lambda config: config.update(model_type="mistral", sliding_window=99))
        result = run_convert("-o", "mistral.gguf", folder, folder=self.folder)
        self.assertEqual(result.code, 0, result)
        self.assertRegex(result.err, r"note: .*99 positions")
        self.assertEqual(read_gguf(self.path("mistral.gguf"))[1]["llama.context_length"], 99)

    def test_names_of_towers(self):
        convert = load_convert()

        class Weights:
            tensors = {"v.blk.%d.ln1.weight" % i: 0 for i in range(24)}

            def shape(self, name):
                return {"v.patch_embd.weight": (1024, 3, 14, 14), "v.position_embd.weight": (577, 1024)}[name]

        class Options:
            vision = None

        for tower in ("openai/clip-vit-large-patch14-336", "/data/clip-vit-large-patch14-336/",
                      "/root/.cache/huggingface/hub/models--openai--clip-vit-large-patch14-336/snapshots/ce19dc912ca5cd21c8a653c79e251e808ccabcd1"):
            config = convert.vision_config(convert.Config({"mm_vision_tower": tower}, "config.json"), Weights(), Options(), None)
            self.assertEqual([config.get(key) for key in ("hidden_size", "num_hidden_layers", "patch_size", "image_size")], [1024, 24, 14, 336])
        with self.assertRaises(convert.Problem):
            convert.vision_config(convert.Config({"mm_vision_tower": "google/siglip-so400m-patch14-384"}, "config.json"), Weights(), Options(), None)

    def test_the_checkpoint_itself_is_not_overwritten(self):
        folder = self.checkpoint("own", "smollm")
        weights = os.path.join(folder, "model.safetensors")
        before = read_bytes(weights)
        result = run_convert("-o", weights, folder, folder=self.folder)
        self.assertEqual(result.code, 1, result)
        self.assertRegex(result.err, r"^convert\.py: error: .*model\.safetensors.*\n$")
        self.assertEqual(read_bytes(weights), before)

    def test_metadata(self):
        for layout, template in (("llava_v5", ["llava_v5", "chat_template.jinja"]), ("llava_new", ["llava_v5", "chat_template.jinja"]),
                                 ("llava_old", ["llava_old", "chat_template.json"]), ("smollm", ["smollm", "chat_template.jinja"])):
            with self.subTest(layout):
                text = read_bytes(CHECKPOINTS, *template).decode()
                text = json.loads(text)["chat_template"] if template[1].endswith(".json") else text
                file = json.loads(self.succeeds("inspect", "--json", "--full", self.converted(layout)[0]).out)["files"][0]
                self.assertEqual(file["metadata"]["tokenizer.chat_template"], text)
                self.assertEqual(file["metadata"]["general.architecture"], "llama")
        for layout, (_, _, _, _, model, _) in LAYOUTS.items():
            with self.subTest(layout):
                keys = read_gguf(self.converted(layout)[0])[1]
                context, n_embd, n_ff, n_head, n_kv, eps, theta = {
                    "A": (512, 32, 48, 4, 4, 1e-5, 1e4), "B": (512, 32, 48, 4, 2, 1e-5, 5e5), "D": (512, 32, 48, 4, 1, 1e-6, 5e5),
                    "E": (512, 36, 40, 3, 1, 1e-5, 1e5)}[model]
                for key, value in (("context_length", context), ("embedding_length", n_embd), ("feed_forward_length", n_ff), ("block_count", 2),
                                   ("attention.head_count", n_head), ("attention.head_count_kv", n_kv), ("rope.dimension_count", n_embd // n_head)):
                    self.assertEqual(keys["llama." + key], value, key)
                for key, value in (("attention.layer_norm_rms_epsilon", eps), ("rope.freq_base", theta)):
                    self.assertAlmostEqual(keys["llama." + key] / value, 1, places=6, msg=key)
        for layout, (_, _, _, _, model, run) in LAYOUTS.items():
            if run not in IMAGE_RUNS:
                continue
            with self.subTest(layout):
                _, file = json.loads(self.succeeds("inspect", "--json", "--full", *self.converted(layout)).out)["files"]
                names = [tensor["name"] for tensor in file["tensors"]]   # llama.cpp would apply the norm that LLaVA leaves out
                self.assertEqual([name for name in names if "post_ln" in name or not name.startswith(("v.", "mm."))], [])
                size, patch, gelu = (28, 7, False) if model == "A" else (28, 14, True)
                for key, value in (("general.architecture", "clip"), ("clip.has_vision_encoder", True), ("clip.has_llava_projector", True),
                                   ("clip.projector_type", "mlp"), ("clip.vision.image_size", size), ("clip.vision.patch_size", patch),
                                   ("clip.use_gelu", gelu), ("clip.vision.image_aspect_ratio", run)):
                    self.assertEqual(file["metadata"][key], value, key)
                self.assertEqual([round(x, 4) for x in file["metadata"]["clip.vision.image_mean"]], [0.4815, 0.4578, 0.4082])
                self.assertAlmostEqual(file["metadata"]["clip.vision.attention.layer_norm_epsilon"] * 1e6, 10 if model == "A" else 1, places=4)

    def test_images_are_prepared_as_the_checkpoint_says(self):
        folder = self.checkpoint("colours", "llava_v5")
        rewrite(os.path.join(folder, "processor_config.json"),
                lambda config: config["image_processor"].update(image_mean=[0.5, 0.25, 0.75], image_std=[0.125, 0.5, 0.25]))
        for option in ("pad", "crop"):
            result = run_convert("--image-aspect", option, "-o", "colours.gguf", folder, folder=self.folder)
            self.assertEqual(result.code, 0, result)
            keys = read_gguf(self.path("colours-mmproj.gguf"))[1]
            self.assertEqual((keys["clip.vision.image_mean"], keys["clip.vision.image_std"], keys["clip.vision.image_aspect_ratio"]),
                             ([0.5, 0.25, 0.75], [0.125, 0.5, 0.25], option.encode()))

    def test_types_are_kept(self):
        for layout, kind in (("llava_v5", 1), ("llava_old", 30), ("liuhaotian", 1), ("llama3", 30), ("clip_flax", 0)):
            with self.subTest(layout):
                for file in self.converted(layout):
                    for name, shape, stored in read_gguf(file)[2]:
                        small = len([n for n in shape if n > 1]) < 2 or "position" in name
                        patches = name == "v.patch_embd.weight"
                        self.assertIn(stored, (0,) if small else (kind, 0, 1) if patches else (kind,), name)

    def test_options(self):
        folder = self.checkpoint("named", "smollm")
        result = run_convert("--name", "A name", folder, folder=self.folder)
        self.assertEqual(result.code, 0, result)
        metadata = read_gguf(self.path("named.gguf"))[1]                 # by default the folder's name, here
        self.assertEqual(metadata["general.name"], b"A name")
        self.assertNotEqual(result.out + result.err, "")
        result = run_convert("--quiet", folder, folder=self.folder)
        self.assertEqual((result.code, result.out, result.err), (0, "", ""))
        first = read_bytes(self.path("named.gguf"))
        run_convert(folder, "--quiet", folder=self.folder)
        self.assertEqual(read_bytes(self.path("named.gguf")), first)     # the same bytes again, the old file replaced
        for arguments in ((), ("--nonsense", folder), (folder, folder), ("-o",)):
            self.assertEqual(run_convert(*arguments, folder=self.folder).code, 2)

    def test_links(self):
        """As Hugging Face's cache keeps files: names that lead to blobs."""
        folder, blobs = self.checkpoint("snapshot", "smollm"), self.path("blobs")
        os.mkdir(blobs)
        for name in os.listdir(folder):
            os.rename(os.path.join(folder, name), os.path.join(blobs, "blob-" + name[:4] + str(len(name))))
            os.symlink(os.path.join("..", "blobs", "blob-" + name[:4] + str(len(name))), os.path.join(folder, name))
        result = run_convert("-o", "links.gguf", "--name", "smollm", folder, folder=self.folder)
        self.assertEqual(result.code, 0, result)
        self.assertEqual(read_bytes(self.path("links.gguf")), read_bytes(self.converted("smollm")[0]))

    def test_adapters_are_refused(self):
        result = run_convert(self.checkpoint("lora", "lora"), folder=self.folder)
        self.assertEqual(result.code, 1, result)
        self.assertRegex(result.err, r"^convert\.py: error: .*lora.*[Mm]erge")


# Little writers of the formats that checkpoints come in, so that each field can lie.

def op_text(text):
    return b"X" + struct.pack("<I", len(text)) + text


def op_int(n):
    data = n.to_bytes((n.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data if len(data) < 256 else b"\x8b" + struct.pack("<I", len(data)) + data


def op_tuple(*items):
    return b"(" + b"".join(items) + b"t"


def op_global(module, name):
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def op_ints(*numbers):
    return op_tuple(*map(op_int, numbers))


def op_call(module, name, *arguments):
    return op_global(module, name) + op_tuple(*arguments) + b"R"


def op_storage(key=b"0", n=32, kind="BFloat16Storage"):
    return op_tuple(op_text(b"storage"), op_global("torch", kind), op_text(key), op_text(b"cpu"), op_int(n)) + b"Q"


def op_tensor(storage=None, offset=0, shape=None, strides=None):
    return op_call("torch._utils", "_rebuild_tensor_v2", op_storage() if storage is None else storage, op_int(offset),
                   op_ints(32) if shape is None else shape, op_ints(1) if strides is None else strides, b"\x89", op_call("collections", "OrderedDict"))


def op_dictionary(items):
    return b"\x80\x02}(" + b"".join(op_text(name.encode()) + value for name, value in items.items()) + b"u."


def torch_file(pickle, storages, more=(), compress=zipfile.ZIP_STORED):
    """As torch.save writes it. storages: {key: bytes}; more: [(name, bytes)]"""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as archive:
        for name, data in [("archive/data.pkl", pickle), ("archive/version", b"3\n"), *more] + [("archive/data/" + k, v) for k, v in storages.items()]:
            archive.writestr(zipfile.ZipInfo(name), data, compress)
    return out.getvalue()


def packed_array(shape, dtype, data):
    """What flax writes for an array: msgpack's extension 1"""
    def number(n):
        return bytes([n]) if 0 <= n < 128 else struct.pack(">Bq", 0xD3, n)
    shape = shape if isinstance(shape, bytes) else bytes([0x90 + len(shape)]) + b"".join(map(number, shape))
    dtype = dtype if isinstance(dtype, bytes) else bytes([0xA0 + len(dtype)]) + dtype.encode()
    body = b"\x93" + shape + dtype + b"\xc4" + bytes([len(data)]) + data
    return b"\xc7" + bytes([len(body), 1]) + body


def bomb(empty, begin, end, get=b"h"):
    """A tuple of 27 values, each with two of the one before: a few hundred bytes, 2^27 things to whoever walks through it"""
    ops = b"(" + empty + b"q\0"
    for i in range(26):
        ops += begin + (get + bytes([i])) * 2 + end + b"q" + bytes([i + 1])
    return ops + b"t"


NORM = "model.norm.weight"                     # of 32 bfloat16 values, here in the place of what is attacked


@unittest.skipUnless(os.path.exists(CONVERT), "no convert.py here")
class ConvertHostile(ConvertCase):
    """What anyone may put on a server. Each is refused with one line that names the file; nothing is written, nothing run."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        load_convert()                         # before the forks
        cls.out = cls.path("out")
        os.mkdir(cls.out)
        cls.tensors = read_safetensors(CHECKPOINTS, "llama3", "model.safetensors")
        cls.good = read_bytes(CHECKPOINTS, "llama3", "model.safetensors")

    def refuses(self, source, mentions, *arguments, why=None):
        with open(os.path.join(self.out, "model.gguf"), "w") as f:       # an earlier file stays as it is
            f.write("earlier")
        with self.subTest(why if why is not None else mentions):
            result = fork_convert("-o", "model.gguf", source, *arguments, folder=self.out)
            self.assertEqual(result.code, 1, result)
            lines = result.err.splitlines()
            self.assertEqual((len(lines), lines[0][:19]), (1, "convert.py: error: "), result)
            self.assertIn(mentions, lines[0])
            self.assertLess(len(lines[0]), 2000)
            self.assertTrue(all(c.isprintable() for c in lines[0]), result)
            self.assertEqual(os.listdir(self.out), ["model.gguf"])
            self.assertEqual(read_bytes(self.out, "model.gguf"), b"earlier")
        for name in os.listdir(self.out):
            os.remove(os.path.join(self.out, name))

    def refuse_all(self, folder, name, cases):
        """cases: {why: the file's bytes}"""
        path = os.path.join(folder, name)
        for why, data in cases.items():
            with open(path, "wb") as f:
                f.write(data)
            self.refuses(folder, name, why=why)

    def refuse_changes(self, folder, name, cases, mentions=None):
        """cases: [(path of keys in a JSON file, value)]; no value takes the key away. mentions: other than the file's name"""
        path = os.path.join(folder, name)
        original = read_json(path)
        for keys, *value in cases:
            changed = json.loads(json.dumps(original))
            node = changed
            for key in keys[:-1]:
                node = node[key]
            if value:
                node[keys[-1]] = value[0]
            else:
                del node[keys[-1]]
            write_json(changed, path)
            self.refuses(folder, name if mentions is None else mentions, why="%s: %.60r" % (keys, value))
        write_json(original, path)

    def llama(self, without=("processor_config.json",), parts=("llava_v5", "llama3")):
        folder = self.checkpoint("checkpoint", *parts)
        for name in without:
            os.remove(os.path.join(folder, name))
        return folder

    def accepted(self, folder, *arguments):
        """-> the file's bytes: what is attacked below is right before it is attacked"""
        result = fork_convert("-o", self.path("good.gguf"), folder, "--name", "x", *arguments, folder=self.folder)
        self.assertEqual((result.code, result.err), (0, ""), result)
        return read_bytes(self.path("good.gguf"))

    # ---- containers ----------------------------------------------------------------------------------------------------

    def test_safetensors(self):
        folder, (header, data) = self.llama(), safetensors_file(self.tensors)
        whole, cases = self.accepted(folder), {}
        shuffled = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"], reverse=True))
        for same in (with_header(shuffled, data), with_header({"__metadata__": {"format": "pt"}, **header}, data)):
            with open(os.path.join(folder, "model.safetensors"), "wb") as f:
                f.write(same)
            self.assertEqual(self.accepted(folder), whole)               # the header's order is free
        n = 8 + struct.unpack_from("<Q", self.good)[0]
        for size in (0, 1, 7, 8, 9, n - 1, n, n + 1, len(self.good) // 2, len(self.good) - 1):
            cases["cut to %d" % size] = self.good[:size]
        for length in (0, 1, n - 9, n - 7, len(self.good), 1 << 31, 1 << 32, 1 << 60, 1 << 63, (1 << 64) - 1):
            cases["header of %d" % length] = struct.pack("<Q", length) + self.good[8:]
        cases["bytes after the data"] = self.good + b"\0"
        text = json.dumps(header).encode()
        for why, other in (("not JSON", b"{"), ("no object", b"[]"), ("a text", b'"x"'), ("no UTF-8", text[:-1] + b',"\xff":1}'), ("nothing", b""),
                           ("no tensors", b"{}"), ("nested", b'{"a":' * 60000 + b"1" + b"}" * 60000), ("nested lists", b"[" * 100000),
                           ("a name twice", text[:-1] + b"," + text[1:]), ("digits", b'{"a":' + b"9" * 1000000 + b"}")):
            cases[why] = with_header(other, data)
        entry, size = header[NORM], header[NORM]["data_offsets"]
        odd = [{"shape": s} for s in ([-32], [-32, -1], [1 << 40, 1 << 40], [1 << 62, 4], [32.0], "32", [[32]], [], [31], [33], [32, 2], None, [True] * 5,
                                      {"0": 32}, [1] * 100000, [0], [0, 1 << 62], ["32"])]
        odd += [{"dtype": d} for d in ("F8_E4M3", "F8_E5M2", "I4", "", "bf16", 7, None, ["BF16"], "F32", "I64", "I16", "BOOL")]
        odd += [{"data_offsets": o} for o in ([], size[:1], size[::-1], [-64, 0], [size[0] + 2, size[1] + 2], [size[0], size[1] + 2], [0, 64],
                                              [len(data), len(data) + 64], [1 << 63, (1 << 63) + 64], [float(size[0]), float(size[1])], None,
                                              "%d %d" % tuple(size), [size[0], None], [10 ** 30, 10 ** 30 + 64], size + [0])]
        odd = [{**entry, **change} for change in odd] + [[], None, 5, {}] + [{k: v for k, v in entry.items() if k != gone} for gone in entry]
        for i, change in enumerate(odd):
            cases["entry %d: %.100s" % (i, change)] = with_header({**header, NORM: change}, data)
        between = "model.layers.0.input_layernorm.weight"                # with others before and behind it
        begin, end = header[between]["data_offsets"]
        for offsets in ([0, 64], [begin - 64, end - 64], [begin - 2, end - 2], [begin + 2, end + 2], [begin + 64, end + 64]):
            cases["%s at %s instead of %s" % (between, offsets, [begin, end])] = with_header({**header, between: {**header[between], "data_offsets": offsets}}, data)
        for why, tensor in (("I64", ["I64", [32], bytes(256)]), ("F64", ["F64", [32], bytes(256)]), ("U8", ["U8", [32], bytes(32)]),
                            ("none", ["BF16", [0], b""]), ("turned", ["BF16", [32, 1], bytes(64)]), ("none at all", None), ("short", ["BF16", [16], bytes(32)]),
                            ("C64", ["C64", [32], bytes(256)])):
            changed = {**self.tensors, NORM: tensor}
            if tensor is None:
                del changed[NORM]
            cases["as " + why] = with_header(*safetensors_file(changed))
        folder = self.llama()
        for why, bytes_ in cases.items():
            with open(os.path.join(folder, "model.safetensors"), "wb") as f:
                f.write(bytes_)
            # a weight that is missing or has another shape is one of the model, not of the file
            self.refuses(folder, "norm.weight" if why in ("as none at all",) else "model.safetensors", why=why)

    def test_index(self):
        folder = self.llama((), ("spm", "llava_old"))
        index = "model.safetensors.index.json"
        name = sorted(read_json(folder, index)["weight_map"])[0]
        other = self.checkpoint("other", "llava_old")                    # whole shards, but outside the folder
        file = read_json(folder, index)["weight_map"][name]
        self.refuse_changes(folder, index, [(["weight_map", name], os.path.join(place, file)) for place in ("../other", other, "./", "../checkpoint")])
        self.refuse_changes(folder, index, [(["weight_map", name], file) for file in (
            "model-00003-of-00002.safetensors", "../model-00001-of-00002.safetensors", "../../../../../../etc/passwd", "/etc/passwd", "", ".", "..",
            "sub/x.safetensors", "model-00001-of-00002.safetensors\0", "added_tokens.json", 5, None, ["model-00001-of-00002.safetensors"], "x" * 5000)], "json")
        other = {"model-00001-of-00002.safetensors": "model-00002-of-00002.safetensors"}
        self.refuse_changes(folder, index, [(["weight_map", name], other.get(file, "model-00001-of-00002.safetensors")),
                                            (["weight_map", "model.nowhere.weight"], file), (["weight_map"],), (["weight_map"], {}), (["weight_map"], []),
                                            (["weight_map"], None), (["weight_map"], "x")])
        self.refuse_all(folder, index, {"not JSON": b"{", "empty": b"", "a list": b"[]", "nested": b'{"weight_map":' * 60000, "no UTF-8": b'{"\xff":1}'})

    def in_torch(self):
        """llama3's weights as PyTorch stores them -> the pickle's items, the storages"""
        items, storages = {}, {"0": self.tensors[NORM][2]}
        for name, (_, shape, data) in self.tensors.items():
            key = "0" if name == NORM else str(len(storages))
            storages[key] = data
            strides = [len(data) // 2 // shape[0], 1][:len(shape)] if len(shape) == 2 else [1]
            items[name] = op_tensor(op_storage(key.encode(), len(data) // 2), 0, op_ints(*shape), op_ints(*strides))
        return items, storages

    def torch_folder(self):
        return self.llama(("processor_config.json", "model.safetensors"))

    def test_pickles(self):
        items, storages = self.in_torch()
        good = self.accepted(self.llama())
        folder, name = self.torch_folder(), "pytorch_model.bin"
        with open(os.path.join(folder, name), "wb") as f:
            f.write(torch_file(op_dictionary(items), storages))
        self.assertEqual(self.accepted(folder), good)

        trained = {"module." + name: op_call("torch._utils", "_rebuild_parameter", value, b"\x88", op_call("collections", "OrderedDict"))
                   for name, value in items.items()}
        inside = op_call("collections", "OrderedDict") + op_dictionary(trained)[3:-1]
        state = b"}(" + op_text(b"state") + b"}(" + op_int(0) + b"}(" + op_text(b"step") + items[NORM] + b"uu" + op_text(b"groups") + b"](G" + bytes(8) + b"Neu"
        with open(os.path.join(folder, name), "wb") as f:                # a training loop's: parameters of a wrapped module, an optimiser
            f.write(torch_file(op_dictionary({"epoch": op_int(3), "name": op_text(b"x"), "state_dict": inside, "optimizer": state}), storages))
        self.assertEqual(self.accepted(folder), good)

        touch, evil = op_text(b"touch PWNED"), op_text(b"open('PWNED', 'w')")
        values = {
            "os.system": op_call("os", "system", touch), "posix.system": op_call("posix", "system", touch), "nt.system": op_call("nt", "system", touch),
            "subprocess": op_call("subprocess", "getoutput", touch), "eval": op_call("builtins", "eval", evil), "exec": op_call("builtins", "exec", evil),
            "__builtin__.eval": op_call("__builtin__", "eval", evil), "open": op_call("builtins", "open", op_text(b"PWNED"), op_text(b"w")),
            "getattr": op_call("builtins", "getattr", op_global("os", "path"), op_text(b"os")), "runpy": op_call("runpy", "_run_code", evil, b"}"),
            "torch.load": op_call("torch", "load", op_text(b"x")), "torch.hub": op_call("torch.hub", "load", op_text(b"x")),
            "dotted": op_call("torch._utils", "_rebuild_tensor_v2.__globals__", touch), "importlib": op_call("importlib", "import_module", op_text(b"antigravity")),
            "apply": op_call("torch", "_utils._rebuild_tensor_v2", touch), "codecs": op_call("_codecs", "encode", evil, op_text(b"latin1")),
            "numpy": op_call("numpy.core.multiarray", "_reconstruct", op_tuple()), "instance": b"(" + touch + b"iposix\nsystem\n",
            "object": b"(" + op_global("posix", "system") + touch + b"o", "new object": op_global("posix", "system") + op_tuple(touch) + b"\x81",
            "new object with names": op_global("posix", "system") + op_tuple(touch) + b"}\x92", "stack global": op_text(b"posix") + op_text(b"system") + b"\x93" +
            op_tuple(touch) + b"R", "memoized parts": op_text(b"os") + b"q\x01" + op_text(b"system") + b"q\x02000h\x01h\x02\x93" + op_tuple(touch) + b"R",
            "extension registry": b"\x82\x01", "extension registry 4": b"\x84\1\0\0\0", "state": op_call("collections", "OrderedDict") + b"}(" +
            op_text(b"__setstate__") + op_global("posix", "system") + b"ub", "no function": op_text(b"x") + op_tuple() + b"R", "called text": touch + touch + b"R",
            "a storage as function": op_global("torch", "FloatStorage") + op_tuple(op_text(b"/etc/passwd")) + b"R", "a function as value": op_global(
                "torch._utils", "_rebuild_tensor_v2"), "parameter of nothing": op_call("torch._utils", "_rebuild_parameter"), "tensor of nothing": op_call(
                "torch._utils", "_rebuild_tensor_v2"), "lists": bomb(b"]", b"](", b"e"), "tuples": bomb(b")", b"(", b"t"), "a number": op_int(5), "a text": touch,
            "nothing": b"N", "nested": b"]" * 100000 + b"a" * 99999, "nested tuples": b")" + b"\x85" * 100000, "digits": b"I" + b"9" * 100000 + b"\n",
            "long digits": b"L" + b"9" * 1000000 + b"L\n", "a long number": op_int(1 << 4000000), "persistent text": b"P0\n", "float": b"G" + bytes(8)}
        for i, (shape, strides) in enumerate([
                (op_ints(-32), None), (op_ints(1 << 40, 1 << 40), op_ints(0, 0)), (op_ints(1 << 62, 4), op_ints(0, 0)), (op_ints(31), None), (op_ints(33), None),
                (op_ints(32, 1), op_ints(1, 1)), (op_ints(), op_ints()), (None, op_ints(2)), (None, op_ints(-1)), (None, op_ints(1 << 62)), (None, op_ints()),
                (None, op_ints(1, 1)), (op_int(32), None), (op_text(b"32"), None), (b"N", None), (op_tuple(op_text(b"32")), None), (op_tuple(b"G" + bytes(8)), None),
                (op_tuple(b"\x88"), None), (op_ints(*[1] * 100000), op_ints(*[1] * 100000)), (bomb(b"]", b"](", b"e"), None), (bomb(b")", b"(", b"t"), None),
                (op_tuple(op_int(1 << 4000000)), None), (None, bomb(b"]", b"](", b"e")), (op_ints(1 << 30), op_ints(0)), (op_ints(0), op_ints(1))]):
            values["shape %d" % i] = op_tensor(None, 0, shape, strides)
        for offset in (-1, 1, 32, 1 << 62, -(1 << 70)):
            values["from value %d" % offset] = op_tensor(None, offset)
        for i, storage in enumerate([
                op_storage(b"missing"), op_storage(b"../version"), op_storage(b"../../../../etc/passwd"), op_storage(b""), op_storage(n=-32), op_storage(n=33),
                op_storage(n=1 << 62), op_storage(n=1 << 100), op_storage(n=31), op_storage(kind="QInt8Storage"), op_storage(kind="FloatStorage"),
                op_storage(kind="UntypedStorage"), op_storage(kind="LongStorage"), op_text(b"storage") + b"Q", op_int(0) + b"Q", op_tuple() + b"Q", b"]Q",
                op_tuple(op_text(b"storage"), op_text(b"FloatStorage"), op_text(b"0"), op_text(b"cpu"), op_int(32)) + b"Q",
                op_tuple(op_text(b"module"), op_global("torch", "FloatStorage"), op_text(b"0"), op_text(b"cpu"), op_int(32)) + b"Q",
                op_tuple(op_text(b"storage"), op_global("torch", "FloatStorage"), op_int(0), op_text(b"cpu"), op_int(32)) + b"Q",
                op_tuple(op_text(b"storage"), op_global("torch", "FloatStorage"), op_text(b"0"), op_text(b"cpu"), b"N") + b"Q",
                op_tuple(op_text(b"storage"), op_global("torch", "FloatStorage"), bomb(b"]", b"](", b"e"), op_text(b"cpu"), op_int(32)) + b"Q",
                op_global("torch", "BFloat16Storage"), op_text(b"0"), b"N"]):
            values["storage %d" % i] = op_tensor(storage)
        cases = {why: op_dictionary({**items, NORM: value}) for why, value in values.items()}
        whole = op_dictionary(items)
        cases.update({"cut to %d" % n: whole[:n] for n in (0, 1, 2, 3, 20, len(whole) // 2, len(whole) - 2, len(whole) - 1)})
        cases.update({"alone: %r" % ops[:12]: b"\x80\x02" + ops for ops in (
            b".", b"R.", b"u.", b"t.", b"0.", b"}s.", b"h\x05.", b"N.", b"].", b"}.", op_int(1) + b".", touch + b".", b"\xff.", b"}(" + b"]Nu.", b"}(" + b"}Nu.",
            b"}(" + op_text(b"\xff\xfe") + b"Nu.", b"X\xff\xff\xff\xff.", b"\x8d" + b"\xff" * 8 + b".", b"\x8b\xff\xff\xff\x7f.", b"\x8e" + b"\xff" * 7 + b"\x0f.",
            b"r\xff\xff\xff\xff.", b"(" * 1000000 + b".", b"2" * 100000 + b".", b"\x95" + b"\xff" * 8 + b".", b"c\xff\n\xfe\n.")})
        cases["names that are numbers"] = op_dictionary({}).replace(b"(u", b"(" + op_int(1) + items[NORM] + b"u")
        cases["bomb as name"] = b"\x80\x02}(" + bomb(b")", b"(", b"t") + b"Nu."
        # a value that is no tensor is passed over; then the weight is missing
        passed_over = {"lists", "tuples", "a number", "a text", "nothing", "nested", "nested tuples", "a function as value", "float"}
        for why, pickle in cases.items():
            with open(os.path.join(folder, name), "wb") as f:
                f.write(torch_file(pickle, storages))
            self.refuses(folder, "norm.weight" if why in passed_over else name, why=why)

    def test_archives(self):
        items, storages = self.in_torch()
        whole, folder = torch_file(op_dictionary(items), storages), self.torch_folder()
        end = whole.rindex(b"PK\5\6")
        directory, = struct.unpack_from("<I", whole, end + 16)

        def patched(name, at, form, *values, local=False):
            """An entry's header, in the directory or before its data, with other numbers"""
            mark = b"PK\3\4" if local else b"PK\1\2"
            where = -1
            while True:
                where = whole.index(mark, where + 1)
                if whole[where + (30 if local else 46):].startswith(name):
                    break
            data = bytearray(whole)
            struct.pack_into(form, data, where + at, *values)
            return bytes(data)
        pickle, storage = b"archive/data.pkl", b"archive/data/0"
        cases = {"cut to %d" % n: whole[:n] for n in (0, 3, 100, len(whole) // 2, directory, directory + 20, end, end + 10, len(whole) - 1)}
        cases.update({"pickle of 4 GB": patched(pickle, 20, "<II", 0xFFFFFFF0, 0xFFFFFFF0), "storage of 4 GB": patched(storage, 20, "<II", 0xFFFFFFF0, 0xFFFFFFF0),
                      "deflated, 4 GB": patched(pickle, 10, "<H10xII", 8, 20, 0xFFFFFFF0), "a short storage": patched(storage, 20, "<II", 62, 62),
                      "elsewhere": patched(storage, 42, "<I", len(whole) - 20), "far away": patched(storage, 42, "<I", 0xFFFFFFF0),
                      "no header there": patched(storage, 42, "<I", directory + 1), "encrypted": patched(pickle, 8, "<H", 1),
                      "method 99": patched(storage, 10, "<H", 99), "a long name": patched(storage, 26, "<H", 65535, local=True),
                      "another name": patched(pickle, 46, "<16s", b"archive/data.pk_"), "absolute": patched(pickle, 46, "<16s", b"/etc/etc/passwd_")})
        cases["a directory beyond the end"] = whole[:end + 16] + struct.pack("<I", 0xFFFFFF00) + whole[end + 20:]
        cases["a directory of 4 GB"] = whole[:end + 12] + struct.pack("<I", 0xFFFFFF00) + whole[end + 16:]
        cases["deflated"] = torch_file(op_dictionary(items), storages, compress=zipfile.ZIP_DEFLATED)
        cases["a bomb"] = torch_file(op_dictionary(items) + bytes(200000000), {}, compress=zipfile.ZIP_DEFLATED)
        cases["no storages"] = torch_file(op_dictionary(items), {})
        cases["big-endian"] = torch_file(op_dictionary(items), storages, [("archive/byteorder", b"big")])
        cases["no pickle"] = whole.replace(b"data.pkl", b"data.bin")
        cases["text"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        cases["TorchScript"] = torch_file(op_dictionary(items), storages, [("archive/constants.pkl", b"\x80\x02)."), ("archive/code/x.py", b"")])
        cases["before PyTorch 1.6"] = b"\x80\x02" + op_int(0x1950A86A20F9469CFC6C) + b"." + b"\x80\x02" + op_int(1001) + b"." + op_dictionary(items)
        cases["a plain pickle"] = b"\x80\x02" + op_call("posix", "system", op_text(b"touch PWNED")) + b"."
        self.refuse_all(folder, "pytorch_model.bin", cases)
        for why, says in (("TorchScript", "TorchScript"), ("before PyTorch 1.6", "1.6"), ("deflated", "compress")):
            with open(os.path.join(folder, "pytorch_model.bin"), "wb") as f:
                f.write(cases[why])
            self.refuses(folder, says)

    def test_msgpack(self):
        folder, name = self.checkpoint("flax", "clip_flax"), "flax_model.msgpack"
        for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            shutil.copyfile(os.path.join(CHECKPOINTS, "clip", file), os.path.join(folder, file))
        whole, good = read_bytes(folder, name), self.accepted(folder)
        at = whole.index(b"final_layer_norm\x82\xa5scale") + 23
        shape, number = [24], whole[at + 3:at + 3 + whole[at + 1]][-96:]
        end = at + 3 + whole[at + 1]
        self.assertEqual(whole[at:end], packed_array(shape, "float32", number))
        cases = {"cut to %d" % n: whole[:n] for n in (0, 1, 2, at, at + 1, at + 3, end - 1, len(whole) // 2, len(whole) - 1)}
        cases["bytes after the end"] = whole + b"\xc0"
        values = {"nothing": b"\xc0", "a number": b"\x05", "a text": b"\xa1x", "a list": b"\x91\x05", "a map": b"\x80", "0xC1": b"\xc1", "bytes": b"\xc4\x01x",
                  "deep lists": b"\x91" * 1000000, "deep maps": b"\x81\xa1a" * 300000, "deep arrays": b"\xc9\x00\x0f\xff\xff\x01" * 10000,
                  "a long text": b"\xdb" + b"\xff" * 4, "long bytes": b"\xc6" + b"\xff" * 4, "a long list": b"\xdd" + b"\xff" * 4,
                  "a long map": b"\xdf" + b"\xff" * 4, "a long extension": b"\xc9" + b"\xff" * 4 + b"\1", "a map with a number": b"\x81\x05\x05"}
        values.update({"extension %d" % kind: b"\xd4" + bytes([kind]) + b"x" for kind in (0, 2, 3, 42, 255)})
        values.update({"in extension %d" % kind: b"\xc7" + bytes([end - at - 3, kind]) + whole[at + 3:end] for kind in (2, 3, 42)})
        values.update({"dtype %r" % (d,): packed_array(shape, d, number) for d in ("O", "object", "|O", "float128", "<U1", "complex64", "V4", "bool", "", b"\x05",
                                                                                b"\xc0", "bfloat16", "float64", "float8_e4m3fn", "int32")})
        values.update({"shape %r" % (s,): packed_array(s, "float32", number) for s in (
            [], [23], [25], [12, 2], [0], [-24], [-1, -24], [1 << 40, 1 << 40], [1 << 62, 4], b"\x05", b"\xc0", b"\xa1x", b"\x91\xa1x", b"\x91\xcb" + bytes(8), b"\x91\xc3",
            b"\x91" * 60 + b"\x01", [1] * 15, b"\xdd\xff\xff\xff\xff")})
        values["too much"], values["too little"] = packed_array(shape, "float32", number * 2), packed_array(shape, "float32", number[:95])
        values["no array"] = b"\xc7\x03\x01\x92\x05\x05"
        for why, value in values.items():
            cases[why] = whole[:at] + value + whole[end:]
        names = {"in extension 2", "in extension 3", "in extension 42", "extension 0", "extension 2", "extension 3", "extension 42", "extension 255",
                 "nothing", "a number", "a text", "a list", "a map", "bytes"}      # no arrays: then the weight is missing
        for why, data in cases.items():
            with open(os.path.join(folder, name), "wb") as f:
                f.write(data)
            self.refuses(folder, "t.post_ln.weight" if why in names else name, why=why)
        self.refuse_all(folder, name, {"a list": b"\x91\x05", "a number": b"\x05", "an empty map": b"\x80", "arrays without names": b"\x91" + whole[at:end]})

    # ---- configurations and tokenizers ---------------------------------------------------------------------------------

    def test_configurations(self):
        folder, name = self.llama(), "config.json"
        self.accepted(folder)
        odd = [-1, 0, 10 ** 9, 10 ** 30, 2.5, "2", None, True, [2], {}]
        cases = [([key], value) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size",
                                            "max_position_embeddings") for value in odd if value is not None]
        cases += [(["num_key_value_heads"], v) for v in (-1, 0, 3, 5, 8, 10 ** 9, 10 ** 30, 1.5, "1", [1])] + [(["head_dim"], v) for v in (-8, 0, 7, 10 ** 9, "8")]
        cases += [(["rms_norm_eps"], v) for v in ("x", -1, [], float("nan"), float("inf"), 10 ** 400)]
        cases += [(["rope_parameters", "rope_theta"], v) for v in ("x", 0, -1, [], float("nan"), float("inf"))]
        cases += [(["rope_parameters", "rope_type"], v) for v in ("yarn", "dynamic", "longrope", "x", 5, [])]
        cases += [(["rope_parameters", "factor"], v) for v in ("x", 0, -1, float("nan"), [])] + [(["rope_parameters"], v) for v in (5, "x", [1])]
        cases += [(["rope_parameters", "factor"],), (["rope_parameters", "original_max_position_embeddings"], -5)]
        cases += [(["hidden_act"], "gelu"), (["quantization_config"], {"load_in_4bit": True})]
        cases += [(["num_hidden_layers"], 3), (["hidden_size"], 64), (["intermediate_size"], 47), (["vocab_size"], 319), (["num_attention_heads"], 3)]
        self.refuse_changes(folder, name, cases, "")     # what disagrees with the weights may blame a tensor
        for family, architecture in (("qwen2", "Qwen2ForCausalLM"), ("gemma", "GemmaForCausalLM"), ("phi3", "Phi3ForCausalLM"), ("mamba", "MambaForCausalLM"),
                                     ("gpt2", "GPT2LMHeadModel"), ("", ""), (5, "x"), ([], "LlamaForCausalLM")):
            rewrite(os.path.join(folder, name), lambda config: config.update(model_type=family, architectures=[architecture]))
            self.refuses(folder, name, why="%s" % family)
        self.refuse_all(folder, name, {"not JSON": b"{", "empty": b"", "a list": b"[]", "null": b"null", "nested": b'{"a":' * 60000 + b"1" + b"}" * 60000,
                                       "no UTF-8": b'{"a": "\xff"}', "digits": b'{"num_hidden_layers": ' + b"9" * 100000 + b"}",
                                       "a name twice among many": b"{%s, \"7\": 1}" % b",".join(b'"%d": 1' % i for i in range(100000))})
        os.remove(os.path.join(folder, name))
        self.refuses(folder, name)

    def test_llava_configurations(self):
        folder = self.llama((), ("llava_v5",))
        cases = [(["vision_config", key], value) for key in ("image_size", "patch_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
                 for value in (0, -1, 10 ** 9, 10 ** 30, "x", 2.5)]
        cases += [(["vision_config", key], value) for key, value in (("patch_size", 29), ("hidden_act", "silu"), ("num_channels", 1), ("model_type", "siglip_vision_model"),
                                                                     ("layer_norm_eps", "x"), ("num_attention_heads", 5), ("image_size", 42))]
        cases += [([key], value) for key, value in (("vision_feature_layer", 99), ("vision_feature_layer", [-2, -3]), ("vision_feature_layer", "x"),
                                                    ("vision_feature_layer", -9), ("vision_feature_select_strategy", "full"), ("projector_hidden_act", "relu"),
                                                    ("vision_config", []), ("text_config", 5), ("model_type", "llava_next"))]
        self.refuse_changes(folder, "config.json", cases, "")
        self.refuse_changes(folder, "processor_config.json", [(["image_processor", key], value) for key, value in (
            ("image_mean", [0.5]), ("image_mean", "x"), ("image_mean", ["a", "b", "c"]), ("image_std", [0, 0, 0]), ("image_std", [1, 1, None]),
            ("image_mean", [1e999, 0, 0]), ("image_mean", [0.5, 1.5, 0.5]))])
        folder = self.llama((), ("spm", "liuhaotian"))
        vision = self.checkpoint("vision", "clip")
        for keys, value in ((["mm_projector_type"], "mlp3x_gelu"), (["mm_projector_type"], "ldpnet"), (["mm_vision_select_layer"], 7), (["mm_vision_select_feature"], "cls_patch")):
            rewrite(os.path.join(folder, "config.json"), lambda config: config.update({keys[0]: value}))
            self.refuses(folder, "", "--vision", vision, why="%s" % value)
            shutil.copyfile(os.path.join(CHECKPOINTS, "liuhaotian", "config.json"), os.path.join(folder, "config.json"))

    def test_sentencepiece(self):
        folder, name = self.llama((), ("spm", "llama2")), "tokenizer.model"
        whole = read_bytes(folder, name)
        self.accepted(folder)
        long = b"\x0a" + b"\xff" * 5
        cases = {"cut to %d" % n: whole[:n] for n in (0, 1, 2, 3, 10, len(whole) // 2, len(whole) - 1)}
        cases.update({"endless number": whole + b"\x80" * 100, "only numbers": b"\x80" * 1000, "a long field": whole + b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
                      "a piece outside its field": b"\x0a\x05" + b"\x0a\x7f" + b"abc" + whole, "group": whole + b"\x0b\x0c", "wire type 7": whole + b"\x0f",
                      "field 0": whole + b"\x02\x00", "no text": b"\x0a\x04\x0a\x02\xff\xfe" + whole, "surrogate": b"\x0a\x05\x0a\x03\xed\xa0\x80" + whole,
                      "type 99": whole + b"\x0a\x05\x0a\x01q\x18\x63", "type text": whole + b"\x0a\x06\x0a\x01q\x1a\x01x", "unigram": whole + b"\x12\x02\x18\x01",
                      "word": whole + b"\x12\x02\x18\x03", "cut number": whole + b"\x0a\x05\x0a\x01q\x15\x00", "too many pieces": whole + b"\x0a\x03\x0a\x01q" * 1000,
                      "not a number": whole + b"\x0a\x08\x0a\x01q\x15\x00\x00\xc0\x7f", "JSON": b'{"a": 1}', "no pieces": b"\x12\x00", "long": long + whole})
        self.refuse_all(folder, name, cases)
        with open(os.path.join(folder, name), "wb") as f:
            f.write(whole)
        for key in ("\u00b2", "9" * 5000, "-1", "1e3", "400"):           # no ids, or one beyond the embedding
            for file, value in (("tokenizer_config.json", {"added_tokens_decoder": {key: {"content": "x"}}}), ("added_tokens.json", {"x": key})):
                with self.subTest(file, key=key[:9]):
                    original = read_json(folder, "tokenizer_config.json")
                    write_json({**original, **value} if "config" in file else value, folder, file)
                    result = fork_convert("-o", "model.gguf", folder, folder=self.out)
                    self.assertIn(result.code, (0, 1), result)           # passed over or refused, both are right
                    self.assertNotIn("Traceback", result.err)
                    write_json(original, folder, "tokenizer_config.json")
        os.remove(os.path.join(folder, "added_tokens.json"))
        for made in os.listdir(self.out):
            os.remove(os.path.join(self.out, made))
        os.remove(os.path.join(folder, name))
        self.refuses(folder, "tokenizer")

    def test_tokenizer_json(self):
        folder, name = self.llama(), "tokenizer.json"
        self.accepted(folder)
        state = read_json(folder, name)
        first, merges = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)[0], state["model"]["merges"]
        cases = [(["model", "type"], kind) for kind in ("Unigram", "WordPiece", "WordLevel", "", 5)]
        cases += [(["model"],), (["model"], []), (["model"], None), (["model", "vocab"], []), (["model", "vocab"], {}), (["model", "vocab"],), (["model", "merges"], {}),
                  (["model", "merges"], "x"), (["model", "merges"],)]
        cases += [(["model", "vocab", first], i) for i in (-1, 1, 10 ** 9, 10 ** 30, 0.5, "0", None, [])]
        cases += [(["model", "merges", 0], m) for m in ("a", "a b c", ["a"], ["a", "b", "c"], 5, None, [1, 2], "", [])]
        cases += [(["added_tokens"], 5), (["added_tokens"], [5]), (["added_tokens", 0, "id"], -1), (["added_tokens", 0, "id"], 10 ** 9), (["added_tokens", 0, "id"], "x"),
                  (["added_tokens", 0, "id"], 0), (["added_tokens", 0, "content"], 5), (["added_tokens", 0, "content"],), (["added_tokens", 0, "id"],)]
        cases += [(["pre_tokenizer"], v) for v in ({"type": "Whitespace"}, {"type": "Metaspace"}, {"type": "Sequence", "pretokenizers": 5}, 5, {}, [],
                                                   {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "x"}}]})]
        cases += [(["normalizer"], {"type": "Lowercase"}), (["normalizer"], {"type": "NFKC"}), (["model", "continuing_subword_prefix"], "##")]
        self.refuse_changes(folder, name, cases)
        self.assertTrue(merges)
        self.refuse_all(folder, name, {"not JSON": b"{", "empty": b"", "a list": b"[]", "nested": b'{"model":' * 60000 + b"1" + b"}" * 60000, "no UTF-8": b'{"\xff": 1}',
                                       "a lone surrogate": read_bytes(CHECKPOINTS, "llava_v5", name).replace(b'"!"', b'"\\ud800"', 1)})
        os.remove(os.path.join(folder, name))
        self.refuses(folder, "tokenizer")

    def test_clip_vocabularies(self):
        folder, name = self.checkpoint("clip", "clip"), "vocab.json"
        self.accepted(folder)
        first = next(iter(read_json(folder, name)))
        self.refuse_changes(folder, name, [([first], i) for i in (-1, 1, 10 ** 9, 10 ** 30, 0.5, "0", None, [])] + [([first],), (["extra"], 10 ** 6)])
        self.refuse_all(folder, name, {"not JSON": b"{", "empty": b"", "a list": b"[]", "an empty object": b"{}", "no UTF-8": b'{"\xff": 0}'})
        shutil.copyfile(os.path.join(CHECKPOINTS, "clip", name), os.path.join(folder, name))
        merges = read_bytes(folder, "merges.txt")
        self.refuse_all(folder, "merges.txt", {"one word": merges + b"a\n", "three words": merges + b"a b c\n", "no UTF-8": merges + b"\xff\xfe x\n",
                                               "zero bytes": merges + b"\0\0\n"})
        self.refuse_changes(folder, "config.json", [(keys.split("."), value) for keys, value in (
            ("projection_dim", 21), ("projection_dim", 0), ("text_config.max_position_embeddings", 23), ("text_config.vocab_size", 1),
            ("text_config.num_attention_heads", 0), ("vision_config.patch_size", 0), ("text_config.num_hidden_layers", 10 ** 9),
            ("text_config.hidden_act", "relu"))], "")

    # ---- places --------------------------------------------------------------------------------------------------------

    def test_places(self):
        os.mkdir(self.path("empty"))
        os.mkdir(self.path("folder.gguf"))
        good = self.llama()
        for source, says in ((self.path("nowhere"), "nowhere"), (self.path("empty"), "empty"), (self.images[0], "stars0.png"), ("/dev/null", "/dev/null"),
                             (os.path.join(good, "config.json"), "config.json"), ("", "")):
            self.refuses(source, says)
        for option in ("--base", "--vision"):
            self.refuses(self.checkpoint("part", "projector"), "nowhere", option, self.path("nowhere"))
        os.mkfifo(self.path("pipe.gguf"))
        for out, limit in (("missing/model.gguf", None), (self.path("folder.gguf"), None), (self.path("pipe.gguf"), None), ("/proc/x.gguf", None),
                           ("model.gguf", 10000)):                       # the last: a disk with little room
            with self.subTest(out):
                result = fork_convert("-o", out, good, folder=self.out, file_size=limit)
                self.assertEqual(result.code, 1, result)
                self.assertRegex(result.err, r"^convert\.py: error: .*\n$")
                self.assertEqual(os.listdir(self.out), [])

    def test_layouts_of_others(self):
        """Folders that hold something else than weights of transformers are called by their name."""
        empty = b""
        for says, files in (("index.json", {"model-00001-of-00002.safetensors": empty, "model-00002-of-00002.safetensors": empty, "config.json": b"{}"}),
                            ("Meta's own", {"consolidated.00.pth": empty, "params.json": b"{}"}),
                            ("DeepSpeed", {"mp_rank_00_model_states.pt": empty}), ("DeepSpeed", {"zero_to_fp32.py": empty, "latest": b"global_step100"}),
                            ("orbax", {"_CHECKPOINT_METADATA": b"{}"}), ("orbax", {"default/manifest.ocdbt": empty}),
                            ("orbax", {"ckpts/step_1000/default/_METADATA": b"{}"})):
            folder = self.path("layout")
            shutil.rmtree(folder, ignore_errors=True)
            for name, data in files.items():
                os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
                with open(os.path.join(folder, name), "wb") as f:
                    f.write(data)
            self.refuses(folder, says, why=str(list(files)))
        folder = self.llama()
        tensors = dict(self.tensors)
        tensors["model.layers.0.self_attn.q_proj.qweight"] = ["I32", [1], bytes(4)]
        write_safetensors(tensors, folder, "model.safetensors")
        self.refuses(folder, "GPTQ")
        folder = self.llama()
        write_json({"bits": 4}, folder, "quantize_config.json")
        self.refuses(folder, "quantize_config.json")
        folder = self.llama((), ("spm", "llama2"))
        with open(os.path.join(folder, "tokenizer.model"), "w") as f:
            f.write("IQ== 0\nIg== 1\n")
        self.refuses(folder, "tiktoken")

    def test_models_that_are_something_else(self):
        """A configuration with which the model would give other results than its authors' code is refused by the key's name."""
        folder = self.llama((), ("llava_v5",))
        for key, value in (("image_aspect_ratio", "anyres_max_9"), ("image_aspect_ratio", "anyres"), ("image_aspect_ratio", "highres"),
                           ("mm_patch_merge_type", "spatial_unpad"), ("mm_use_im_start_end", True), ("mm_resampler_type", "spatial_pool"),
                           ("s2", True), ("s2_scales", "336,672"), ("mm_projector_type", "mlp2x_res_syn"), ("mm_projector_type", "linear")):
            self.refuse_changes(folder, "config.json", [([key], value)], key)
        for section in ("text_config", "vision_config"):
            self.refuse_changes(folder, "config.json", [([section, "quantization_config"], {"bits": 4})], "quantized")
        self.refuse_changes(folder, "processor_config.json", [(["image_processor", key], value) for key, value in (
            ("resample", 2), ("do_center_crop", False), ("do_resize", False), ("do_normalize", False), ("size", {"height": 28, "width": 28}),
            ("size", {"shortest_edge": 32}), ("crop_size", 20), ("crop_size", {"height": 28, "width": 20}))])
        folder = self.llama((), ("clip", "clip_open"))
        os.remove(os.path.join(folder, "model.safetensors"))
        self.accepted(folder)
        self.refuse_changes(folder, "open_clip_config.json", [(keys.split("."), value) for keys, value in (
            ("preprocess_cfg.resize_mode", "squash"), ("preprocess_cfg.interpolation", "bilinear"), ("preprocess_cfg.size", 99),
            ("model_cfg.text_cfg.no_causal_mask", True), ("model_cfg.text_cfg.pool_type", "last"), ("model_cfg.vision_cfg.pool_type", "avg"),
            ("model_cfg.vision_cfg.attentional_pool", True), ("model_cfg.text_cfg.act_kwargs", {"approximate": "tanh"}),
            ("model_cfg.init_logit_bias", -10), ("model_cfg.text_cfg.hf_tokenizer_name", "x"))])

    def test_missing_parts(self):
        llava = self.checkpoint("liuhaotian", "spm", "liuhaotian")
        without_tower(llava)
        for folder, arguments, says in ((llava, (), "--vision"), (self.checkpoint("part", "projector"), (), "--base"),
                                        (self.checkpoint("tower", "clip_flax"), (), "tokenizer|vocab"), (self.checkpoint("lora", "lora"), (), "[Mm]erge")):
            with self.subTest(says):
                result = fork_convert("-o", "model.gguf", folder, *arguments, folder=self.out)
                self.assertEqual(result.code, 1, result)
                self.assertRegex(result.err, r"^convert\.py: error: .*(%s).*\n$" % says)
                self.assertEqual(os.listdir(self.out), [])


def main():
    os.chdir(ROOT)
    program = unittest.main(exit=False, verbosity=1)
    result = program.result
    failed = len(result.failures) + len(result.errors)
    print("%d passed, %d failed" % (result.testsRun - failed - len(result.skipped), failed), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
