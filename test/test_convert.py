"""Command-line tests: runs ./astrovl as a user would. Standard library only (numpy.load is tried where it exists).

    python3 test/test_convert.py            all; the last line says "N passed, N failed"
    python3 test/test_convert.py Chat       one class
    ASTROVL=./astrovl-sanitize python3 test/test_convert.py
"""
import ast
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import unittest
import zlib

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.path.abspath(os.path.join(ROOT, os.environ.get("ASTROVL", "astrovl")))
MODEL = os.path.join(ROOT, "test", "astrovl-tiny.gguf")
COMMANDS = ["caption", "ask", "chat", "tokens", "inspect", "trace", "version"]
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
        for option in (["--top-k", "1"], ["--top-p", "0.000001"], ["--min-p", "1"]):
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
        self.assertEqual((seen["version"], seen["byte_order"]), (version, "little"))
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
        model = json.loads(self.succeeds("inspect", "--json").out)["model"]
        for part in ("vocabulary", "language_model", "vision_tower", "projector"):
            self.assertIsInstance(model[part], dict, part)
        _, metadata, _ = read_gguf(MODEL)
        self.assertEqual(model["language_model"]["layers"], metadata["llama.block_count"])
        self.assertEqual(model["language_model"]["width"], metadata["llama.embedding_length"])
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
        self.assertIsNone(seen["model"]["language_model"])
        self.assertIsInstance(seen["model"]["vocabulary"], dict)
        both = self.succeeds("inspect", "--json", MODEL, vocabulary)
        self.assertEqual(len(json.loads(both.out)["files"]), 2)

    def test_values_of_every_type(self):
        values = [(0, 255), (1, -128), (2, 65535), (3, -32768), (4, 2**32 - 1), (5, -2**31), (6, 0.1), (7, True),
                  (7, False), (8, 'a "quoted"\n\x1b[31m text'),
                  (10, 2**63 - 1), (11, -2**63), (12, 1 / 3), (6, 3e38), (12, 1e-300)]
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
        self.assertIn("cannot be written", self.fails(1, "trace", self.images[0], "What?", "-o", folder).err)


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


def main():
    os.chdir(ROOT)
    program = unittest.main(exit=False, verbosity=1)
    result = program.result
    failed = len(result.failures) + len(result.errors)
    print("%d passed, %d failed" % (result.testsRun - failed - len(result.skipped), failed), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
