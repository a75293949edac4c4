#!/usr/bin/env python3
"""Writes test/golden/, what test.c compares with: by the reference implementations, never by astrovl.

    python3 test/make_golden.py [PART ...]     # convert, images, joint, models, quants, tokens, types; all of them without arguments

Not run by CI: it needs PyTorch (6 GB). The versions in test/requirements.txt are those the committed files were made with; another
version is told, and may give other bytes. In a virtual environment outside the tree:

    pip install -r test/requirements.txt
    apt-get install libjpeg-turbo-progs

The part `convert` has two more programs save what it makes, so the environment must name FLAX_PYTHON, the Python of another virtual
environment (pip install transformers==4.49.0 flax==0.12.8), and OPEN_CLIP, a folder (pip install --no-deps --target FOLDER
open_clip_torch==3.3.0 torchvision timm ftfy wcwidth protobuf).
"""
import codecs
import collections
import importlib.metadata
import io
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import types
import unicodedata
import zlib

import PIL.features
import gguf
import numpy as np
import safetensors.torch
import sentencepiece
import tokenizers
import torch
import transformers
import transformers.models.llama.modeling_llama as models_llama
from PIL import Image, ImageOps
from gguf.scripts.gguf_convert_endian import byteswap_tensors
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration


# =====================================================================================================================
# Images
# Golden data of the image section: files of every kind with the pixels that Pillow makes of them (as CRC-32), and resized,
# padded and cropped patterns. Needs Pillow, numpy, transformers, and cjpeg (Debian: libjpeg-turbo-progs) for rare samplings.
#
# images.pack       records: a line "name width height orientation crc crc_upright size", then the file's bytes
# images_ops.txt    lines "resize pattern w h out_w out_h crc", "pad pattern w h crc", "crop pattern w h out_w out_h crc"
# =====================================================================================================================

def images_crc(array):
    return "%08x" % zlib.crc32(np.ascontiguousarray(array, dtype=np.uint8).tobytes())


# ---- patterns that test.c computes too -------------------------------------------------------------------------------

def images_pattern(kind, width, height):
    """kind 0: noise, 1: ramps, 2: black and white squares (the hardest overshoot); [height][width][3]"""
    y, x, c = np.meshgrid(np.arange(height, dtype=np.uint32), np.arange(width, dtype=np.uint32),
                          np.arange(3, dtype=np.uint32), indexing="ij")
    if kind == 0:
        h = (x * np.uint32(73856093)) ^ (y * np.uint32(19349663)) ^ (c * np.uint32(83492791))
        h = (h ^ (h >> np.uint32(15))) * np.uint32(2654435761)
        return (h >> np.uint32(24)).astype(np.uint8)
    if kind == 1:
        return ((x * 5 + y * 3 + c * 80) & 255).astype(np.uint8)
    return (((x // 3 + y // 2 + c) & 1) * 255).astype(np.uint8)


def images_picture(width, height):
    """Smooth shapes, an edge and a little noise, so that compressed files are small but not trivial."""
    y, x = np.mgrid[0:height, 0:width]
    a = np.stack([128 + 100 * np.sin(x / 5.0 + y / 9.0), 128 + 110 * np.cos(y / 4.0), (x * 9 + y * 4) % 256], -1)
    a[y > height * 0.7] *= 0.4
    return np.clip(a + images_pattern(0, width, height) / 16.0, 0, 255).astype(np.uint8)


# ---- a PNG writer for what Pillow does not write -----------------------------------------------------------------------

def images_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def images_png_rows(samples, depth):
    """[h][w][channels] integers to packed rows."""
    h, w, n = samples.shape
    for row in samples.reshape(h, w * n):
        if depth == 16:
            yield row.astype(">u2").tobytes()
        elif depth == 8:
            yield row.astype(np.uint8).tobytes()
        else:
            bits = (row[:, None] >> np.arange(depth - 1, -1, -1)) & 1
            yield np.packbits(bits.reshape(-1).astype(np.uint8)).tobytes()


def images_png_filter(rows, step, first):
    """Rows with filter types 0 to 4 in turn."""
    out, up = b"", None
    for number, row in enumerate(rows):
        kind = (first + number) % 5
        up = up or bytes(len(row))
        line = bytearray([kind])
        for i, value in enumerate(row):
            a, b, c = (row[i - step] if i >= step else 0), up[i], (up[i - step] if i >= step else 0)
            p = a + b - c
            paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            line.append((value - [0, a, b, (a + b) // 2, paeth][kind]) & 255)
        out += bytes(line)
        up = row
    return out


def images_png(samples, depth, color, interlaced=False, extra=b"", level=9, strategy=zlib.Z_DEFAULT_STRATEGY, split=1, after=b""):
    h, w, n = samples.shape
    grids = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)] if interlaced \
        else [(0, 0, 1, 1)]
    raw = b""
    for number, (x, y, dx, dy) in enumerate(grids):
        part = samples[y::dy, x::dx]
        if part.size:
            raw += images_png_filter(images_png_rows(part, depth), max(1, depth * n // 8), number)
    packer = zlib.compressobj(level, zlib.DEFLATED, 15, 9, strategy)
    data = packer.compress(raw) + packer.flush()
    cut = -(-len(data) // split)
    return (b"\x89PNG\r\n\x1a\n" + images_chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, color, 0, 0, int(interlaced))) + extra
            + b"".join(images_chunk(b"IDAT", data[i:i + cut]) for i in range(0, len(data), cut)) + after + images_chunk(b"IEND", b""))


def images_pngs():
    n_channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
    palette = lambda n: images_chunk(b"PLTE", images_pattern(0, n, 1)[0].tobytes())
    def samples(w, h, depth, color):
        big = np.concatenate([images_picture(w, h), images_picture(w, h)[::-1, :, :1]], -1).astype(np.uint32)
        big = big * 257 + (images_pattern(1, w, h).astype(np.uint32)[..., :1] & 7)
        return (np.minimum(big, 65535) >> (16 - depth))[..., :n_channels[color]]
    for color, depths in ((0, (1, 2, 4, 8, 16)), (2, (8, 16)), (3, (1, 2, 4, 8)), (4, (8, 16)), (6, (8, 16))):
        for depth in depths:
            for interlaced in (0, 1):
                extra = palette(1 << depth) if color == 3 else b""
                yield "c%d_%d%s.png" % (color, depth, "_adam7" if interlaced else ""), \
                    images_png(samples(29, 21, depth, color), depth, color, interlaced, extra)
    for w, h in ((1, 1), (1, 5), (5, 1), (2, 3), (4, 4), (5, 5), (9, 8)):
        yield "tiny%dx%d_adam7.png" % (w, h), images_png(samples(w, h, 8, 2), 8, 2, 1)
        yield "tiny%dx%d_2bit_adam7.png" % (w, h), images_png(samples(w, h, 2, 0), 2, 0, 1)
    trns = lambda *v: images_chunk(b"tRNS", b"".join(struct.pack(">H", x) for x in v))
    yield "trns_gray1.png", images_png(samples(20, 9, 1, 0), 1, 0, extra=trns(1))
    yield "trns_gray8.png", images_png(samples(20, 9, 8, 0), 8, 0, extra=trns(7))
    yield "trns_gray16.png", images_png(samples(20, 9, 16, 0) // 200, 16, 0, extra=trns(7))
    yield "trns_rgb8.png", images_png(samples(20, 9, 8, 2), 8, 2, extra=trns(1, 2, 3))
    yield "trns_rgb16.png", images_png(samples(20, 9, 16, 2), 16, 2, extra=trns(1, 2, 3))
    yield "trns_palette.png", images_png(samples(20, 9, 4, 3), 4, 3, extra=palette(16) + images_chunk(b"tRNS", bytes([0, 99, 255])))
    yield "short_palette.png", images_png(samples(20, 20, 8, 3), 8, 3, extra=palette(100))
    yield "dark_gray16.png", images_png(samples(20, 20, 16, 0) // 200, 16, 0)
    yield "suggested_palette.png", images_png(samples(8, 8, 8, 2), 8, 2, extra=palette(20))
    yield "stored.png", images_png(samples(40, 30, 8, 2), 8, 2, level=0)
    yield "fixed_codes.png", images_png(samples(30, 30, 8, 2), 8, 2, strategy=zlib.Z_FIXED)
    yield "literals_only.png", images_png(samples(30, 30, 8, 2), 8, 2, strategy=zlib.Z_HUFFMAN_ONLY)
    yield "runs.png", images_png(np.zeros((300, 300, 3), int) + [10, 20, 30], 8, 2, strategy=zlib.Z_RLE)
    yield "flat.png", images_png(np.zeros((300, 300, 1), int), 8, 0)
    yield "many_idat.png", images_png(samples(20, 20, 8, 6), 8, 6, split=60, extra=images_chunk(b"tEXt", b"a\0b"), after=images_chunk(b"tIME", bytes(7)))
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "exif.png", images_png(samples(11, 7, 8, 2), 8, 2, extra=images_chunk(b"eXIf", exif.tobytes()[6:]))
    yield "exif_after.png", images_png(samples(11, 7, 8, 2), 8, 2, after=images_chunk(b"eXIf", exif.tobytes()[6:]))


# ---- JPEG ------------------------------------------------------------------------------------------------------------------

def images_jpeg(width, height, mode="RGB", **options):
    out = io.BytesIO()
    Image.fromarray(images_picture(width, height)).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def images_cjpeg(width, height, *options):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "in.ppm")
        Image.fromarray(images_picture(width, height)).save(path)
        with open(os.path.join(folder, "scans"), "w") as f:
            f.write("0;\n1;\n2;\n")
        options = [o.replace("SCANS", f.name) for o in options]
        return subprocess.run(["cjpeg", *options, path], check=True, capture_output=True).stdout


def images_without_segment(data, marker):
    at = data.index(bytes([0xFF, marker]))
    return data[:at] + data[at + 2 + struct.unpack(">H", data[at + 2:at + 4])[0]:]


def images_jpegs():
    for w, h in ((1, 1), (3, 3), (5, 4), (16, 16), (37, 29)):
        for sampling, name in ((0, "444"), (1, "422"), (2, "420")):
            for progressive in (False, True):
                yield "%s_%dx%d%s.jpg" % (name, w, h, "_prog" if progressive else ""), \
                    images_jpeg(w, h, quality=85, subsampling=sampling, progressive=progressive)
    for sampling in ("1x2", "4x1", "1x4", "4x2", "3x1", "1x3", "2x1,1x2,1x1", "2x2,2x1,1x2", "2x2,1x1,2x2", "1x1,2x2,2x2", "4x4,1x1,1x1"):
        if sampling == "4x4,1x1,1x1":   # 18 blocks per MCU: only possible with a scan for each component
            yield "sampling_4x4_scans.jpg", images_cjpeg(37, 43, "-sample", sampling, "-scans", "SCANS")
            continue
        for extra in ((), ("-progressive",)):
            yield "sampling_%s%s.jpg" % (sampling.replace(",", "_"), "_prog" if extra else ""), \
                images_cjpeg(33, 27, "-quality", "80", "-sample", sampling, *extra)
    yield "scans.jpg", images_cjpeg(37, 29, "-scans", "SCANS")
    yield "quality1.jpg", images_cjpeg(37, 29, "-quality", "1")            # 16-bit quantisation tables: extended, SOF1
    yield "quality100.jpg", images_cjpeg(37, 29, "-quality", "100", "-sample", "1x1")
    yield "optimised.jpg", images_cjpeg(37, 29, "-optimize")
    yield "rgb.jpg", images_cjpeg(37, 29, "-rgb")
    for progressive in (False, True):
        p = "_prog" if progressive else ""
        yield "restart%s.jpg" % p, images_jpeg(61, 45, quality=70, restart_marker_blocks=1, progressive=progressive)
        yield "restart_rows%s.jpg" % p, images_jpeg(61, 45, quality=70, restart_marker_rows=1, progressive=progressive)
        yield "gray%s.jpg" % p, images_jpeg(37, 29, "L", quality=80, progressive=progressive)
        cmyk = images_jpeg(37, 29, "CMYK", quality=90, progressive=progressive)
        adobe = cmyk.index(b"Adobe")
        yield "cmyk%s.jpg" % p, cmyk
        yield "ycck%s.jpg" % p, cmyk[:adobe + 11] + b"\2" + cmyk[adobe + 12:]
        yield "cmyk_unmarked%s.jpg" % p, images_without_segment(cmyk, 0xEE)
    plain = images_jpeg(37, 29, quality=80)
    yield "no_jfif.jpg", images_without_segment(plain, 0xE0)
    yield "junk_between.jpg", plain[:20] + b"\1\2\3\xff\xff\xff" + plain[20:]
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"
    for transform in (0, 1, 2):
        yield "adobe%d.jpg" % transform, plain[:2] + adobe + bytes([transform]) + images_without_segment(plain, 0xE0)[2:]
        yield "adobe%d_jfif.jpg" % transform, plain[:20] + adobe + bytes([transform]) + plain[20:]
    for orientation in range(1, 9):
        order = "<>"[orientation % 2]
        tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IHHHIIHHIHHI", 8, 2, 0x010F, 2, 4, 0x00414141,
                                                                      0x0112, 3, 1, orientation, 0, 0)
        yield "exif%d.jpg" % orientation, images_jpeg(13, 9, quality=80, exif=b"Exif\0\0" + tiff)


# ---- PNM -------------------------------------------------------------------------------------------------------------------

def images_pnms():
    v = images_pattern(0, 40, 30).reshape(-1).astype(int)
    text = lambda values: b"".join(b"%d%s" % (x, b"\n" if i % 11 == 10 else b" ") for i, x in enumerate(values))
    wide = lambda values: np.array(values, ">u2").tobytes()
    yield "p1.pbm", b"P1\n# a comment\n19 5\n" + b"".join(b"01"[x & 1:(x & 1) + 1] + b" \n"[: x % 3] for x in v[:95])
    yield "p4.pbm", b"P4 19 5\n" + bytes(v[:15].astype(np.uint8))
    yield "p2.pgm", b"P2\n7 6 #c\n255\n" + text(v[:42])
    yield "p2_15.pgm", b"P2\n7 6\n15\n# x\n" + text(v[:42] % 16)
    yield "p2_1000.pgm", b"P2\n7 6\n1000\n" + text(v[:42] * 3 % 1001)
    yield "p3.ppm", b"P3\n7 6\n255\n" + text(v[:126])
    yield "p3_10.ppm", b"P3\n7 6\n10\n" + text(v[:126] % 11)
    yield "p3_1000.ppm", b"P3\n7 6\n1000\n" + text(v[:126] * 3 % 1001)
    yield "p5.pgm", b"P5\n7 6\n255\n" + bytes(v[:42].astype(np.uint8))
    yield "p5_comments.pgm", b"P5 #a\n#b\n7#zz\n 6\n255\n" + bytes(v[:42].astype(np.uint8))
    yield "p5_100.pgm", b"P5\n16 16\n100\n" + bytes(range(256))
    yield "p5_10.pgm", b"P5\n4 4\n10\n" + bytes(range(16))
    yield "p5_1000.pgm", b"P5\n7 6\n1000\n" + wide(v[:42] * 3)
    yield "p5_65535.pgm", b"P5\n7 6\n65535\n" + wide(v[:42] * 2)
    yield "p6.ppm", b"P6\r7\t6\n255\n" + bytes(v[:126].astype(np.uint8)) + b"more"
    yield "p6_200.ppm", b"P6\n7 6\n200\n" + bytes((v[:126] % 201).astype(np.uint8))
    yield "p6_1000.ppm", b"P6\n7 6\n1000\n" + wide(v[:126] * 5)
    yield "p6_510.ppm", b"P6\n32 32\n510\n" + wide(np.arange(3072) % 511)
    yield "p6_65535.ppm", b"P6\n7 6\n65535\n" + wide(v[:126] * 257)


# ---- everything ------------------------------------------------------------------------------------------------------------

IMAGES_RESIZES = [
    (336, 336, 224, 224), (640, 480, 336, 336), (480, 640, 336, 252), (100, 75, 336, 336), (75, 100, 224, 299), (224, 224, 336, 336),
    (500, 333, 336, 224), (333, 500, 224, 336), (1, 1, 7, 5), (7, 5, 1, 1), (2, 2, 3, 3), (3, 3, 2, 2), (1, 40, 20, 20), (40, 1, 20, 20),
    (50, 50, 50, 20), (50, 50, 20, 50), (50, 50, 50, 90), (50, 50, 90, 50), (50, 50, 50, 50), (31, 17, 64, 64), (64, 64, 31, 17),
    (200, 3, 10, 100), (3, 200, 100, 10), (97, 89, 96, 88), (89, 97, 90, 98), (1000, 10, 336, 336), (10, 1000, 336, 336), (2, 300, 9, 30),
    (257, 129, 128, 64), (400, 300, 4, 3), (123, 456, 45, 167), (456, 123, 167, 45), (60, 45, 224, 168), (13, 7, 336, 181)]


def images_resize(source, width, height):
    """Pillow's resize with the passes in the order of Pillow up to 12: rows, then columns, the other way round only for
    images over 100 times as high as wide that become lower. (Pillow 13 chooses; single passes are the same in both.)"""
    image = Image.fromarray(source)
    between = (image.width, height) if image.height > 100 * image.width and height < image.height else (width, image.height)
    return np.array(image.resize(between, Image.BICUBIC).resize((width, height), Image.BICUBIC))


def images_pad(source, color):
    """LLaVA's expand2square"""
    h, w = source.shape[:2]
    side = max(w, h)
    out = Image.new("RGB", (side, side), color)
    out.paste(Image.fromarray(source), ((side - w) // 2, (side - h) // 2))
    return np.array(out)


def images_operations():
    from transformers.image_transforms import center_crop
    for number, (w, h, out_w, out_h) in enumerate(IMAGES_RESIZES):
        for kind in (number % 2, 2):
            yield "resize %d %d %d %d %d %s" % (kind, w, h, out_w, out_h, images_crc(images_resize(images_pattern(kind, w, h), out_w, out_h)))
    for w, h in ((30, 20), (20, 30), (31, 20), (20, 31), (21, 21), (1, 8), (9, 1)):
        yield "pad 0 %d %d %s" % (w, h, images_crc(images_pad(images_pattern(0, w, h), (122, 116, 104))))
    for w, h, out_w, out_h in ((30, 20, 10, 10), (31, 21, 10, 11), (30, 20, 11, 11), (30, 20, 40, 40), (31, 21, 40, 40), (30, 21, 41, 40),
                               (30, 20, 40, 10), (31, 20, 10, 33), (20, 20, 20, 20), (3, 3, 1, 1), (1, 1, 4, 5)):
        crop = center_crop(images_pattern(0, w, h), (out_h, out_w), data_format="channels_last", input_data_format="channels_last")
        yield "crop 0 %d %d %d %d %s" % (w, h, out_w, out_h, images_crc(crop))


def images_rgb(image):
    """Pillow's convert("RGB"), except that gray of 16 bits, which Pillow clips at 255, is scaled to 8 bits."""
    if not image.mode.startswith("I"):
        return np.array(image.convert("RGB"))
    return np.repeat(((np.array(image).astype(int) + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)


def make_images(folder):
    print("images: Pillow", PIL.__version__, "libjpeg-turbo", PIL.features.version("libjpeg_turbo"), "numpy", np.__version__,
          subprocess.run(["cjpeg", "-version"], capture_output=True, text=True).stderr.strip())
    with open(os.path.join(folder, "images.pack"), "wb") as out:
        for maker in (images_pngs, images_jpegs, images_pnms):
            for name, data in maker():
                image = Image.open(io.BytesIO(data))
                orientation = image.getexif().get(0x0112, 1)
                upright = images_rgb(ImageOps.exif_transpose(image))
                pixels = images_rgb(Image.open(io.BytesIO(data)))
                out.write(b"%s %d %d %d %s %s %d\n" % (name.encode(), image.width, image.height, orientation,
                                                         images_crc(pixels).encode(), images_crc(upright).encode(), len(data)))
                out.write(data)
    with open(os.path.join(folder, "images_ops.txt"), "w") as out:
        out.write("\n".join(images_operations()) + "\n")


# =====================================================================================================================
# Models
# Two tiny random LLaVA models, computed by transformers in float32: weights as GGUF files, every intermediate tensor,
# greedy continuations. Read by test.c's "models" tests.
#   models_a_text.gguf, models_a_mmproj.gguf   LLaMA-2-like, two files, F32 and F16, SentencePiece vocabulary, MLP
#   models_b.gguf                              LLaMA-3-like, one file, BF16 and F16, byte-level BPE, linear projector
#   models_chatml.gguf                         a vocabulary alone, with a chatml template
#   models_a.gold, models_b.gold               expected values (models_write_gold tells the format)
#   models_layouts.gold                        prompt templates: texts and the tokens they are laid out as
#   models_1.png, models_2.png                 the images
# =====================================================================================================================

MODELS_IMAGE = -200          # stands for one image in stored token lists, as in LLaVA (IMAGE_TOKEN_INDEX)
MODELS_MEAN = [0.48145466, 0.4578275, 0.40821073]
MODELS_STD = [0.26862954, 0.26130258, 0.27577711]
MODELS_GREEDY = 64
MODELS_MARGIN = 1e-3
MODELS_MAX_VALUES = 211      # of one tensor that are stored
MODELS_WHOLE = ("pixel_values", "images", "texts", "cosines", "probabilities")   # but of these all

# ---- text: two vocabularies trained on these lines -------------------------------------------------------------------

MODELS_SYSTEM_A = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives "
                   "helpful, detailed, and polite answers to the user's questions.")
MODELS_SYSTEM_B = "You answer questions about the sky."
MODELS_LINES = [
    MODELS_SYSTEM_A, MODELS_SYSTEM_A, MODELS_SYSTEM_A, MODELS_SYSTEM_B,
    "USER: What is in this image? ASSISTANT: A spiral galaxy with two arms and a bright bar.",
    "USER: How many stars are there? ASSISTANT: There are three bright stars and a faint comet.",
    "USER: Describe this image. ASSISTANT: A globular cluster, seen through thin dust.",
    "USER: Is the galaxy seen edge-on? ASSISTANT: Yes, with a dust lane across the disc.",
    "USER: Which is larger? ASSISTANT: The first planet is larger, and it has rings.",
    "A planetary nebula glows green around a white dwarf; the field holds many faint stars.",
    "The supernova remnant spreads its filaments, red and blue, over half of the frame.",
    "Les étoiles et la nébuleuse à l'été: 12 étoiles, 3 comètes.",
    "user\n\nWhat is this?\n\nassistant\n\nIt is a ringed planet.",
]
MODELS_QUESTIONS = {
    "one": "What is in this image?",
    "two": "Which is larger: <image> or <image>?",
    "turn1": "Describe this image.",
    "turn2": "Is the galaxy seen edge-on?",
    "text": "How many stars are there?",
}


class models_spm:            # SentencePiece BPE with byte fallback, as LLaMA 2
    template = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} "
                "{% else %}ASSISTANT: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}ASSISTANT:")
    system = None            # the template's own

    def __init__(self, n_vocab):
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(MODELS_LINES), model_writer=out, vocab_size=n_vocab, model_type="bpe",
            byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity",
            remove_extra_whitespaces=False, num_threads=1, split_digits=True, minloglevel=2, unk_id=0, bos_id=1, eos_id=2,
            pad_id=-1, max_sentence_length=1000)
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
        self.n_vocab = self.sp.get_piece_size()
        self.bos, self.end, self.image_token, self.ends = 1, 2, 0, [2]
        self.quiet = list(range(3 + 256))      # tokens that the random model shall not write

    def parts(self, pieces):                   # text and MODELS_IMAGE -> ids: each text on its own, as LLaVA does
        ids = []
        for p in pieces:
            ids += [MODELS_IMAGE] if p == MODELS_IMAGE else [p] if isinstance(p, int) else self.sp.encode(p)
        return ids

    def turn(self, text, first):               # conv_vicuna_v1 of LLaVA
        chunks = text.split("<image>")
        head = (MODELS_SYSTEM_A + " USER: " if first else "USER: ") + chunks[0]
        if len(chunks) == 1:
            pieces = [head + " ASSISTANT:"]
        else:
            pieces = [head]
            for i, chunk in enumerate(chunks[1:]):
                pieces += [MODELS_IMAGE, chunk + (" ASSISTANT:" if i == len(chunks) - 2 else "")]
        return self.parts([self.bos if first else self.end] + pieces)

    def text(self, ids):
        return self.sp.decode(ids)

    def write(self, w):
        w.add_tokenizer_model("llama")
        w.add_tokenizer_pre("default")
        kinds = [gguf.TokenType.UNKNOWN if self.sp.is_unknown(i) else gguf.TokenType.CONTROL if self.sp.is_control(i)
                 else gguf.TokenType.BYTE if self.sp.is_byte(i) else gguf.TokenType.NORMAL for i in range(self.n_vocab)]
        w.add_token_list([self.sp.id_to_piece(i).encode() for i in range(self.n_vocab)])
        w.add_token_scores([self.sp.get_score(i) for i in range(self.n_vocab)])
        w.add_token_types(kinds)
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)
        w.add_unk_token_id(0)
        w.add_add_bos_token(True)
        w.add_add_eos_token(False)
        w.add_chat_template(self.template)


class models_bpe:            # byte-level BPE with LLaMA 3's pre-tokenizer; models_chatml has other special tokens
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
               r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|start_header_id|>",
                "<|end_header_id|>", "<|eot_id|>"]
    template = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
                "{{ m['content'] }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n")
    system = MODELS_SYSTEM_B

    def __init__(self, n_vocab):
        t = tokenizers.Tokenizer(tokenizers.models.BPE())
        pre = tokenizers.pre_tokenizers
        t.pre_tokenizer = pre.Sequence([pre.Split(tokenizers.Regex(self.pattern), "isolated"),
                                        pre.ByteLevel(add_prefix_space=False, use_regex=False)])
        t.decoder = tokenizers.decoders.ByteLevel()
        t.train_from_iterator(MODELS_LINES, tokenizers.trainers.BpeTrainer(
            vocab_size=n_vocab - len(self.specials), initial_alphabet=sorted(pre.ByteLevel.alphabet()),
            show_progress=False))
        self.plain = tokenizers.Tokenizer.from_str(t.to_str())   # without special tokens: for what a user typed
        t.add_special_tokens(self.specials)    # after the ordinary ones, as in LLaMA 3
        self.t, self.n_vocab = t, t.get_vocab_size()
        self.init_specials(t.token_to_id)

    def init_specials(self, i):
        t = self.t
        self.bos, self.end = i("<|begin_of_text|>"), i("<|eot_id|>")
        self.image_token = i("<|reserved_special_token_0|>")
        self.ends = [self.end, i("<|end_of_text|>")]
        vocab = t.get_vocab()
        names = {c for c in tokenizers.pre_tokenizers.ByteLevel.alphabet()
                 if ord(c) > 0x7E or c in "\"#$%&()*+/0<=>@[\\]^_`{|}~"}
        self.quiet = [vocab[c] for c in names] + [vocab[s] for s in self.specials]

    def encode(self, text):
        return self.t.encode(text, add_special_tokens=False).ids

    def turn(self, text, first):
        message = "<|start_header_id|>system<|end_header_id|>\n\n" + MODELS_SYSTEM_B if first else ""
        message += "<|eot_id|>"
        message += ("<|start_header_id|>user<|end_header_id|>\n\n" + text +
                    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
        ids = [self.bos] if first else []
        for i, chunk in enumerate(message.split("<image>")):
            ids += ([MODELS_IMAGE] if i else []) + self.encode(chunk)
        return ids

    def text(self, ids):
        return self.t.decode(ids, skip_special_tokens=False)

    def write(self, w):
        import json
        model = json.loads(self.t.to_str())["model"]
        pieces = {i: p for p, i in self.t.get_vocab().items()}
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("llama-bpe")
        w.add_token_list([pieces[i].encode() for i in range(self.n_vocab)])
        w.add_token_types([gguf.TokenType.CONTROL if pieces[i] in self.specials else gguf.TokenType.NORMAL
                           for i in range(self.n_vocab)])
        w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
        w.add_bos_token_id(self.bos)
        w.add_eos_token_id(self.end)
        w.add_add_bos_token(True)
        w.add_chat_template(self.template)


class models_chatml(models_bpe):
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    template = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
                "{{ '<|im_start|>system\nYou look at the sky.<|im_end|>\n' }}{% endif %}"
                "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

    def init_specials(self, i):
        self.bos, self.end = i("<|endoftext|>"), i("<|im_end|>")

    def write(self, w):
        super().write(w)
        w.kv_data[0]["tokenizer.ggml.add_bos_token"].value = False


# ---- images ----------------------------------------------------------------------------------------------------------

def models_image(width, height, seed):         # a soft gradient with some stars: few bytes as PNG, no channels alike
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    rgb = np.stack([40 + 90 * x / width, 30 + 120 * y / height, 90 - 60 * x * y / (width * height)], axis=2)
    for _ in range(6):
        cx, cy, size, color = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(1, 5), rng.uniform(60, 255, 3)
        rgb += np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / size ** 2)[:, :, None] * color
    return Image.fromarray((np.clip(rgb, 0, 255).astype(np.uint8) // 4) * 4)


def models_preprocess(image, size):            # LLaVA's image_aspect_ratio = pad, then CLIPImageProcessor
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in MODELS_MEAN))
    square.paste(image, ((side - image.size[0]) // 2, (side - image.size[1]) // 2))
    pixels = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)).astype(np.float32) * np.float32(1 / 255)
    pixels = (pixels - np.array(MODELS_MEAN, np.float32)) / np.array(MODELS_STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))[None])


# ---- the models ------------------------------------------------------------------------------------------------------

class models_linear(torch.nn.Module):          # LLaVA's projector of type "linear", which LlavaConfig has no word for
    def __init__(self, n_in, n_out):
        super().__init__()
        self.linear = torch.nn.Linear(n_in, n_out)

    def forward(self, x):
        return self.linear(x)


def models_config(which, vocab):
    if which == "a":
        vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                                  image_size=28, patch_size=7, hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=24)
        text = LlamaConfig(vocab_size=vocab.n_vocab, hidden_size=24, intermediate_size=56, num_hidden_layers=3,
                           num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, rms_norm_eps=1e-5,
                           rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False)
    else:
        vision = CLIPVisionConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
                                  image_size=35, patch_size=7, hidden_act="gelu", layer_norm_eps=1e-6, projection_dim=24)
        text = LlamaConfig(vocab_size=vocab.n_vocab, hidden_size=32, intermediate_size=80, num_hidden_layers=3,
                           num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, rms_norm_eps=1e-6,
                           rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
                                            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                            "original_max_position_embeddings": 256}, tie_word_embeddings=True)
    n_patches = (vision.image_size // vision.patch_size) ** 2
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=vocab.image_token,
                       image_seq_length=n_patches,
                       projector_hidden_act="gelu", vision_feature_layer=-2, vision_feature_select_strategy="default",
                       tie_word_embeddings=text.tie_word_embeddings)


# The number format each weight is stored in; the reference then runs with the rounded values.
def models_type(which, name, shape):
    if len(shape) < 2 or "position_embedding" in name: return gguf.GGMLQuantizationType.F32
    if "vision_tower" in name or "projector" in name: return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType.F32 if which == "a" else gguf.GGMLQuantizationType.BF16


def models_scaled(name, x, vocab):             # random values of a size that keeps a model's activations alive
    if "norm" in name:
        return (1 if name.endswith("weight") else 0) + 0.2 * x
    if x.dim() == 1:
        return 0.2 * x if name.endswith("bias") else 0.7 * x
    if "position_embedding" in name:
        return 0.5 * x
    if "embed_tokens" in name or "lm_head" in name:
        x[vocab.quiet] *= 0.05
        return x * (3.5 / math.sqrt(x.shape[1]) if "lm_head" in name else 1.0)
    return x * ((2.2 if "q_proj" in name or "k_proj" in name else 1.2) / math.sqrt(x[0].numel()))


def models_build(which, vocab, seed):
    config = models_config(which, vocab)
    config._attn_implementation = "eager"
    config.text_config._attn_implementation = config.vision_config._attn_implementation = "eager"
    model = LlavaForConditionalGeneration(config).float().eval()
    if which == "b":
        model.model.multi_modal_projector = models_linear(config.vision_config.hidden_size,
                                                          config.text_config.hidden_size)
        model.tie_weights()
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = torch.randn(p.shape, generator=rng)
            if which == "b" and name == "model.language_model.norm.weight":
                pass                           # any sign: all positive, tied embeddings repeat their last token
            else:
                x = models_scaled(name, x, vocab)
            x[x.abs() < 2.0 ** -10] = 0        # so that every bfloat16 here is a float16 too: the test converts them
            kind = models_type(which, name, p.shape)
            p.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(x.numpy(), kind), kind).reshape(p.shape).copy()))
    return model


# ---- GGUF ------------------------------------------------------------------------------------------------------------

def models_permute(w, n_head):                 # transformers' half-split rows of a head -> GGUF's interleaved pairs
    return w.reshape(n_head, 2, w.shape[0] // n_head // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def models_rope_factors(config):               # LLaMA 3.1's frequency scaling, as what each frequency is divided by
    r = config.rope_parameters
    dim = config.hidden_size // config.num_attention_heads
    factors = []
    for freq in 1.0 / (r["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float32) / dim)):
        wavelength, old = 2 * math.pi / freq, r["original_max_position_embeddings"]
        if wavelength < old / r["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > old / r["low_freq_factor"]:
            factors.append(r["factor"])
        else:
            smooth = (old / wavelength - r["low_freq_factor"]) / (r["high_freq_factor"] - r["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / r["factor"] + smooth))
    assert any(1 < f < r["factor"] for f in factors)
    return np.array(factors, np.float32)


MODELS_TEXT_NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
                     "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
                     "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
MODELS_VISION_NAMES = {"layer_norm1": "ln1", "layer_norm2": "ln2", "self_attn.q_proj": "attn_q",
                       "self_attn.k_proj": "attn_k",
                       "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}


def models_gguf_name(name, old_names):
    base, kind = name.rsplit(".", 1)
    if base.startswith("model.language_model."):
        base = base[len("model.language_model."):]
        if base.startswith("layers."):
            _, layer, rest = base.split(".", 2)
            return "blk.%s.%s.%s" % (layer, MODELS_TEXT_NAMES[rest], kind)
        return {"embed_tokens": "token_embd", "norm": "output_norm"}[base] + "." + kind
    if base == "lm_head": return "output." + kind
    if "multi_modal_projector" in base:
        return {"linear_1": "mm.0", "linear_2": "mm.2", "linear": "mm.0"}[base.rsplit(".", 1)[1]] + "." + kind
    if name.endswith("embeddings.class_embedding"): return "v.class_embd"
    base = base.replace("model.vision_tower.", "").replace("vision_model.", "")
    if base.startswith("encoder.layers."):
        _, _, layer, rest = base.split(".", 3)
        out = MODELS_VISION_NAMES[rest]
        if old_names: out = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}.get(out, out)
        return "v.blk.%s.%s.%s" % (layer, out, kind)
    return {"embeddings.patch_embedding": "v.patch_embd", "embeddings.position_embedding": "v.position_embd",
            "pre_layrnorm": "v.pre_ln", "post_layernorm": "v.post_ln"}[base] + "." + kind


def models_write_text_keys(w, config, name):
    t = config.text_config
    w.add_name(name)
    w.add_context_length(t.max_position_embeddings)
    w.add_embedding_length(t.hidden_size)
    w.add_block_count(t.num_hidden_layers)
    w.add_feed_forward_length(t.intermediate_size)
    w.add_head_count(t.num_attention_heads)
    w.add_head_count_kv(t.num_key_value_heads)
    w.add_rope_dimension_count(t.hidden_size // t.num_attention_heads)
    w.add_rope_freq_base(t.rope_parameters["rope_theta"])
    w.add_layer_norm_rms_eps(t.rms_norm_eps)
    w.add_vocab_size(t.vocab_size)


def models_write_vision_keys(w, config, n_layers, projector, feature_layer):
    v = config.vision_config
    w.add_bool("clip.has_text_encoder", False)
    w.add_bool("clip.has_vision_encoder", True)
    w.add_bool("clip.has_llava_projector", True)
    w.add_string("clip.projector_type", projector)
    w.add_bool("clip.use_gelu", v.hidden_act == "gelu")
    w.add_uint32("clip.vision.image_size", v.image_size)
    w.add_uint32("clip.vision.patch_size", v.patch_size)
    w.add_uint32("clip.vision.embedding_length", v.hidden_size)
    w.add_uint32("clip.vision.feed_forward_length", v.intermediate_size)
    w.add_uint32("clip.vision.projection_dim", v.projection_dim)
    w.add_uint32("clip.vision.attention.head_count", v.num_attention_heads)
    w.add_float32("clip.vision.attention.layer_norm_epsilon", v.layer_norm_eps)
    w.add_uint32("clip.vision.block_count", n_layers)
    # llama.cpp's converter stores the index into transformers' hidden_states, where 0 is the embeddings: with 3 layers
    # and vision_feature_layer = -2 that is 2, which is the number of layers that run.
    if feature_layer is not None: w.add_array("clip.vision.feature_layer", [feature_layer])
    w.add_array("clip.vision.image_mean", MODELS_MEAN)
    w.add_array("clip.vision.image_std", MODELS_STD)


def models_write_tensors(which, text, vision, model):
    t = model.config.text_config
    n_vision = model.config.vision_config.num_hidden_layers
    for name, p in model.named_parameters():
        is_text = "language_model" in name or "lm_head" in name
        if which == "a" and (".layers.%d." % (n_vision - 1) in name or "post_layernorm" in name) and not is_text:
            continue                           # older converters left out what LLaVA does not use
        x = p.detach().numpy()
        kind = models_type(which, name, p.shape)
        if is_text and "q_proj" in name: x = models_permute(x, t.num_attention_heads)
        if is_text and "k_proj" in name: x = models_permute(x, t.num_key_value_heads)
        w = text if is_text else vision
        x = np.ascontiguousarray(x)
        if kind == gguf.GGMLQuantizationType.BF16:
            w.add_tensor(models_gguf_name(name, which == "a"), gguf.quantize(x, kind), raw_dtype=kind)
        else:
            w.add_tensor(models_gguf_name(name, which == "a"), x.astype(np.float16 if kind == 1 else np.float32))


def models_close(w):
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def models_write_gguf(which, folder, model, vocab):
    config = model.config
    if which == "a":
        text = gguf.GGUFWriter(os.path.join(folder, "models_a_text.gguf"), "llama")
        vision = gguf.GGUFWriter(os.path.join(folder, "models_a_mmproj.gguf"), "clip")
        models_write_vision_keys(vision, config, config.vision_config.num_hidden_layers - 1, "mlp", None)
    else:
        text = vision = gguf.GGUFWriter(os.path.join(folder, "models_b.gguf"), "llama")
        models_write_vision_keys(vision, config, config.vision_config.num_hidden_layers, "linear",
                                 config.vision_config.num_hidden_layers - 1)
        text.add_tensor("rope_freqs.weight", models_rope_factors(config.text_config))
    models_write_text_keys(text, config, "random " + which.upper())
    vocab.write(text)
    models_write_tensors(which, text, vision, model)
    models_close(text)
    if which == "a": models_close(vision)


# ---- running the reference -------------------------------------------------------------------------------------------

def models_expand(model, ids):                 # MODELS_IMAGE -> as many placeholder tokens as an image has rows
    c = model.config
    out = []
    for i in ids: out += [c.image_token_index] * c.image_seq_length if i == MODELS_IMAGE else [i]
    return torch.tensor([out])


def models_greedy(model, ids, pixels, n):      # -> tokens, logits of the prompt's last position, smallest top-1 margin
    kwargs = {"pixel_values": torch.cat(pixels)} if pixels else {}
    tokens, past, margin, first = [], None, 1e9, None
    step = models_expand(model, ids)
    with torch.no_grad():
        for _ in range(n):
            out = model(input_ids=step, past_key_values=past, use_cache=True, **kwargs)
            logits, past, kwargs = out.logits[0, -1], out.past_key_values, {}
            if first is None: first = logits.numpy().copy()
            top = torch.topk(logits, 2)
            margin = min(margin, float(top.values[0] - top.values[1]))
            tokens.append(int(top.indices[0]))
            step = torch.tensor([[tokens[-1]]])
    return tokens, first, margin


class models_recorder:                         # every module's values in one forward pass, by the names that the tap uses
    def __init__(self, model):
        self.values, self.handles, self.layer = {}, [], 0
        lm, n_vision = model.model.language_model, model.config.vision_config.num_hidden_layers
        vision = {n: m for n, m in model.model.vision_tower.named_modules()}
        find = lambda end: next(m for n, m in vision.items() if n == end or n == "vision_model." + end)
        self.out(find("embeddings.patch_embedding"), "vision_model.embeddings.patch_embedding",
                 lambda x: x.flatten(2).transpose(1, 2))
        self.out(find("embeddings"), "vision_model.embeddings")
        self.out(find("pre_layrnorm"), "vision_model.pre_layrnorm")
        for i in range(n_vision - 1):          # the last one runs in transformers, but nothing reads it
            self.tower_layer(find("encoder.layers.%d" % i), "vision_model.encoder.layers.%d" % i)
        projector = model.model.multi_modal_projector
        self.into(projector, "image_features")
        for part, module in projector.named_children():
            self.out(module, "multi_modal_projector." + part)
        self.into(lm.layers[0], "model.embed_tokens")
        for i, layer in enumerate(lm.layers):
            name = "model.layers.%d" % i
            self.out(layer, name)
            for part in ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                         "self_attn.o_proj",
                         "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
                self.out(layer.get_submodule(part), name + "." + part)
            self.out(layer.self_attn, name + ".self_attn.attn_weights", lambda y: y, 1)
            self.into(layer.self_attn.o_proj, name + ".self_attn.context")
            self.into(layer.mlp.down_proj, name + ".mlp.act")
        self.out(lm.norm, "model.norm")
        self.out(model.lm_head, "lm_head", lambda x: x[:, -1:])
        self.rope = models_llama.apply_rotary_pos_emb
        models_llama.apply_rotary_pos_emb = self.on_rope

    def tower_layer(self, layer, name):        # of CLIP, vision or text
        self.out(layer, name)
        for part in ("layer_norm1", "layer_norm2", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                     "self_attn.out_proj", "mlp.fc1", "mlp.activation_fn", "mlp.fc2"):
            self.out(layer.get_submodule(part), name + "." + part)
        self.out(layer.self_attn, name + ".self_attn.attn_weights", lambda y: y, 1)
        self.into(layer.self_attn.out_proj, name + ".self_attn.context")

    def put(self, name, x):
        assert name not in self.values, name
        assert x.shape[0] == 1, name
        self.values[name] = x[0].detach().float().numpy().copy()

    def out(self, module, name, view=lambda x: x, index=0):
        self.handles.append(module.register_forward_hook(
            lambda m, args, y: self.put(name, view(y[index] if isinstance(y, tuple) else y))))

    def into(self, module, name):
        self.handles.append(module.register_forward_pre_hook(
            lambda m, args, kwargs: self.put(name, args[0] if args else kwargs["hidden_states"]), with_kwargs=True))

    def on_rope(self, q, k, *args, **kwargs):  # [1][n_head][n][head_dim] -> [n][n_head * head_dim]
        result = self.rope(q, k, *args, **kwargs)
        for x, part in zip(result, "qk"):
            self.put("model.layers.%d.self_attn.%s_rope" % (self.layer, part), x.transpose(1, 2).flatten(2))
        self.layer += 1
        return result

    def close(self):
        models_llama.apply_rotary_pos_emb = self.rope
        for h in self.handles: h.remove()


# A .gold file: "GOLD", u32 entries; each: u32 name length, name, u32 kind (0 f32, 1 i32, 2 text), u32 n_dims,
# u32 dims[], f32 largest absolute value, u32 step, u32 count, values: the elements 0, step, 2 step, ... (all
# little-endian). `step` has no factor in common with the dims, so that every row and column is met.
def models_write_gold(path, entries):
    with open(path, "wb") as f:
        f.write(b"GOLD" + struct.pack("<I", len(entries)))
        for name, x in entries:
            if isinstance(x, str):
                x, kind = np.frombuffer(x.encode(), np.uint8), 2
            else:
                kind = 0 if np.asarray(x).dtype.kind == "f" else 1
                x = np.asarray(x, "<f4" if kind == 0 else "<i4")
            step = 1
            if kind == 0 and name not in MODELS_WHOLE:
                while -(-x.size // step) > MODELS_MAX_VALUES or any(math.gcd(step, d) > 1 for d in x.shape): step += 1
            largest = float(np.abs(x).max()) if kind == 0 else 0.0
            values = np.ascontiguousarray(x).reshape(-1)[::step]
            key = name.encode()
            f.write(struct.pack("<I", len(key)) + key)
            f.write(struct.pack("<II", kind, x.ndim) + struct.pack("<%dI" % x.ndim, *x.shape))
            f.write(struct.pack("<fII", largest, step, values.size) + values.tobytes())


# ---- prompt templates ------------------------------------------------------------------------------------------------

MODELS_SYSTEM_LLAMA2 = ("You are a helpful language and vision assistant. You are able to understand the visual content "
                        "that the user provides, and assist the user with a variety of tasks using natural language.")


# One case: [template, system or None, turn (0: the first), n_images, parse_special, user text, expected pieces], the
# pieces as in models_spm.parts: a text is cut into tokens on its own, a number is a token.
def models_layouts_spm(v):
    person = MODELS_SYSTEM_A.replace("user", "%s")
    image, bos, end, space = MODELS_IMAGE, 1, 2, v.sp.piece_to_id("\u2581")
    assert space > 258
    inst = "[INST] <<SYS>>\n%s\n<</SYS>>\n\n"
    return [
        ["vicuna_v1", None, 0, 0, 0, "What?", [bos, person % ("user", "user") + " USER: What? ASSISTANT:"]],
        ["vicuna_v1", "Look.", 0, 1, 0, "What?", [bos, "Look. USER: ", image, "\nWhat? ASSISTANT:"]],
        ["vicuna_v1", "", 0, 2, 0, "What?", [bos, "USER: ", image, "\n", image, "\nWhat? ASSISTANT:"]],
        ["vicuna_v1", "", 0, 2, 0, "Is <image> like <image>?",
         [bos, "USER: Is ", image, " like ", image, "? ASSISTANT:"]],
        ["vicuna_v1", None, 1, 1, 0, "And?", [end, "USER: ", image, "\nAnd? ASSISTANT:"]],
        ["vicuna_v1", "", 0, 0, 0, "</s>Ha", [bos, "USER: </s>Ha ASSISTANT:"]],
        ["vicuna_v1", "", 0, 0, 1, "</s>Ha", [bos, "USER: ", end, "Ha ASSISTANT:"]],
        ["vicuna_v1", "", 0, 0, 0, "What is <image>?", [bos, "USER: What is <image>? ASSISTANT:"]],
        ["llava_v1", None, 0, 1, 0, "What?",
         [bos, person % ("human", "human") + " USER: ", image, "\nWhat? ASSISTANT:"]],
        ["llava_llama_2", None, 0, 1, 0, "What?", [bos, inst % MODELS_SYSTEM_LLAMA2, image, "\nWhat? [/INST]"]],
        ["llava_llama_2", "", 0, 0, 0, "What?", [bos, "[INST] What? [/INST]"]],
        ["llava_llama_2", "Look.", 0, 0, 0, "What?", [bos, inst % "Look." + "What? [/INST]"]],
        ["llava_llama_2", None, 1, 0, 0, "And?", [space, end, bos, "[INST] And? [/INST]"]],
        ["plain", None, 0, 1, 0, "What?", [bos, image, "\nWhat?"]],
        ["plain", None, 0, 0, 0, "The sky", [bos, "The sky"]],
    ]


def models_layouts_llama3(v):
    h, e, eot = v.t.token_to_id("<|start_header_id|>"), v.t.token_to_id("<|end_header_id|>"), v.end
    user, answer, image = [h, "user", e, "\n\n"], [eot, h, "assistant", e, "\n\n"], MODELS_IMAGE
    return [
        ["llama_3", None, 0, 0, 0, "What?", [v.bos] + user[:3] + ["\n\nWhat?"] + answer],
        ["llama_3", "Look.", 0, 1, 0, "What?", [v.bos, h, "system", e, "\n\nLook.", eot] + user + [image,
                                                                                                   "\nWhat?"] + answer],
        ["llama_3", None, 1, 0, 0, "And?", [eot] + user[:3] + ["\n\nAnd?"] + answer],
        ["llama_3", None, 0, 0, 0, "A<|eot_id|>B", [v.bos] + user[:3] + ["\n\nA<|eot_id|>B"] + answer],
        ["llama_3", None, 0, 0, 1, "A<|eot_id|>B", [v.bos] + user[:3] + ["\n\nA", eot, "B"] + answer],
    ]


def models_layouts_chatml(v):
    start, end, image = v.t.token_to_id("<|im_start|>"), v.end, MODELS_IMAGE
    answer, system = [end, "\n", start, "assistant\n"], [start, "system\nYou look at the sky.", end, "\n"]
    cases = [
        ["chatml", None, 0, 0, 0, "What?", system + [start, "user\nWhat?"] + answer],
        ["chatml", "", 0, 0, 0, "What?", [start, "user\nWhat?"] + answer],
        ["chatml", "Look.", 0, 1, 0, "What?",
         [start, "system\nLook.", end, "\n", start, "user\n", image, "\nWhat?"] + answer],
        ["chatml", None, 1, 0, 0, "And?", [end, "\n", start, "user\nAnd?"] + answer],
        ["chatml", "", 0, 0, 0, "A<|im_end|>B", [start, "user\nA<|im_end|>B"] + answer],
    ]
    import jinja2                              # the file's own template is the reference for the first
    text = jinja2.Environment().from_string(v.template).render(messages=[{"role": "user", "content": "What?"}],
                                                               add_generation_prompt=True)
    assert v.t.encode(text).ids == models_pieces(v, cases[0][-1])
    return cases


def models_pieces(v, pieces):                  # texts are a user's: nothing in them is a special token
    encode = v.sp.encode if isinstance(v, models_spm) else lambda text: v.plain.encode(text).ids
    return [i for p in pieces for i in ([p] if isinstance(p, int) else encode(p))]


def models_make_layouts(folder, spm, bpe):
    chatml = models_chatml(360)
    w = gguf.GGUFWriter(os.path.join(folder, "models_chatml.gguf"), "llama")
    chatml.write(w)
    models_close(w)
    entries, n = [], 0
    for file, vocab, cases in (("models_a_text.gguf", spm, models_layouts_spm(spm)),
                               ("models_b.gguf", bpe, models_layouts_llama3(bpe)),
                               ("models_chatml.gguf", chatml, models_layouts_chatml(chatml))):
        for template, system, turn, n_images, special, text, pieces in cases:
            name, n = "%d" % n, n + 1
            entries += [(name + ".file", file), (name + ".template", template), (name + ".system", system or ""),
                        (name + ".text", text),
                        (name + ".options", np.array([system is not None, turn, n_images, special], np.int32)),
                        (name + ".tokens", np.array(models_pieces(vocab, pieces), np.int32))]
    models_write_gold(os.path.join(folder, "models_layouts.gold"), entries)
    print("models: %d prompt layouts" % n)


# ---- all together ----------------------------------------------------------------------------------------------------

def models_runs(model, vocab, images):         # -> {name: (prompt ids, n_images, greedy tokens)}, smallest margin
    q, runs, least = MODELS_QUESTIONS, {}, 1e9
    prompts = {"one": (vocab.turn("<image>\n" + q["one"], True), 1), "two": (vocab.turn(q["two"], True), 2),
               "text": (vocab.turn(q["text"], True), 0), "turn1": (vocab.turn("<image>\n" + q["turn1"], True), 1)}
    for name, (ids, n_images) in prompts.items():
        n = 12 if name == "turn1" else MODELS_GREEDY
        tokens, _, margin = models_greedy(model, ids, images[:n_images], n)
        runs[name], least = (ids, n_images, tokens), min(least, margin)
    ids = runs["turn1"][0] + runs["turn1"][2] + vocab.turn(q["turn2"], False)
    tokens, _, margin = models_greedy(model, ids, images[:1], MODELS_GREEDY)
    runs["turn2"] = (ids, 1, tokens)
    return runs, min(least, margin)


def models_good(vocab, runs, margin):          # comfortable margins, varied text, no end of text
    if margin < MODELS_MARGIN: return False
    for _, _, tokens in runs.values():
        if any(t in vocab.ends for t in tokens) or len(set(tokens)) < len(tokens) // 3: return False
        text = vocab.text(tokens)
        if "\ufffd" in text or text != text.strip(): return False
    return True


def models_make_one(which, folder, images, first_seed):
    vocab = models_spm(384) if which == "a" else models_bpe(400)
    size = models_config(which, vocab).vision_config.image_size
    pixels = [models_preprocess(i, size) for i in images]
    for seed in range(first_seed, first_seed + 2000):
        model = models_build(which, vocab, seed)
        runs, margin = models_runs(model, vocab, pixels)
        if models_good(vocab, runs, margin): break
    else:
        raise SystemExit("no seed gives usable text")
    models_write_gguf(which, folder, model, vocab)
    ids, n_images, tokens = runs["one"]
    recorder = models_recorder(model)
    with torch.no_grad():
        model(input_ids=models_expand(model, ids), pixel_values=pixels[0])
    recorder.close()
    entries = [("pixel_values", pixels[0][0].numpy()), ("system", vocab.system or "")]
    for name, (ids, n_images, tokens) in runs.items():
        entries += [(name + ".question", MODELS_QUESTIONS[name]), (name + ".n_images", np.array([n_images], np.int32)),
                    (name + ".prompt", np.array(ids, np.int32)), (name + ".tokens", np.array(tokens, np.int32)),
                    (name + ".text", vocab.text(tokens))]
    models_write_gold(os.path.join(folder, "models_%s.gold" % which), entries + list(recorder.values.items()))
    print("models %s: seed %d, margin %.4f, %d tensors, prompt of %d tokens" %
          (which, seed, margin, len(recorder.values), len(runs["one"][0])))
    for name, run in runs.items(): print("   ", name, len(run[0]), repr(vocab.text(run[2])))
    return vocab


def make_models(folder):
    torch.set_num_threads(1)
    images = [models_image(53, 37, 1), models_image(20, 31, 2)]
    for i, image in enumerate(images): image.save(os.path.join(folder, "models_%d.png" % (i + 1)), optimize=True)
    spm = models_make_one("a", folder, images, 1)
    bpe = models_make_one("b", folder, images, 1)
    models_make_layouts(folder, spm, bpe)


# =====================================================================================================================
# Tokens
# Golden data of section 7, "text": small vocabularies, hard strings with the reference's token ids, and detokenisation.
# =====================================================================================================================

TOKENS_ADD, TOKENS_PARSE = 1, 2          # ASTROVL_ADD_SPECIAL, ASTROVL_PARSE_SPECIAL
TOKENS_TYPE = {"normal": 1, "unknown": 2, "control": 3, "user": 4, "unused": 5, "byte": 6}
TOKENS_LLAMA3_RULE = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                      r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# The text the small vocabularies are trained on.
TOKENS_CORPUS = """
A barred spiral galaxy seen face-on, with two bright arms that wind out from the ends of its bar. The nucleus is yellow, the arms
are blue, and dark lanes of dust run along them. Several foreground stars show diffraction spikes. It's about 60,000 light-years wide.
An edge-on galaxy without a bulge. A globular cluster: hundreds of thousands of old stars, held together by gravity for 12.6 billion
years. The planetary nebula glows green where doubly ionised oxygen emits at 500.7 nm and red in H-alpha at 656.28 nm.
What is in the image? There's a ringed planet near the centre; I can't tell how many moons, but we've counted 3, and they'll be back.
USER: Is there a bar? ASSISTANT: Yes, there is. USER: How many arms does it have? ASSISTANT: It has two arms. You're right, I'd say so.
def magnitude(flux, zero_point=25.0):\n    return zero_point - 2.5 * math.log10(flux)\n\tif x < 0 and y >= 1e-3: raise ValueError("x")
The supernova remnant is expanding at 1,500 km/s. Ra 05h 34m 31.94s Dec +22d 00' 52.2" (J2000). M31, M42, NGC 1300, IC 434, SN 1987A.
Die Galaxie zeigt zwei Spiralarme; der Kern ist gelblich, die Arme sind blau. Die Größe beträgt ungefähr 60 000 Lichtjahre, schön!
La galaxie possède un bras brillant à l'est du noyau, où naissent des étoiles très chaudes. Ça, c'est déjà connu depuis l'été 1912.
La nebulosa está rodeada de polvo oscuro. ¿Cuántas estrellas hay? Mañana el niño verá la Vía Láctea sobre el cañón.
Галактика с перемычкой видна плашмя, её рукава голубые. Туманность светится зелёным светом. Сколько звёзд в скоплении?
Ο γαλαξίας έχει δύο σπειροειδείς βραχίονες και φωτεινό πυρήνα. Τα αστέρια είναι παλιά.
这张图片显示了一个棒旋星系,中心是黄色的,旋臂是蓝色的。图中有多少颗恒星?行星状星云发出绿光。
この画像には渦巻銀河が写っています。腕は青く、中心は黄色です。星はいくつありますか。
이 사진에는 막대 나선 은하가 있습니다. 팔은 파랗고 중심은 노랗습니다. 별이 몇 개 있습니까?
هذه صورة لمجرة حلزونية لها ذراعان. النجوم زرقاء والغبار داكن. كم عدد النجوم في الصورة؟
זוהי גלקסיה ספירלית עם שתי זרועות בהירות. כמה כוכבים יש בתמונה?
यह एक सर्पिल आकाशगंगा है जिसकी दो भुजाएँ हैं। चित्र में कितने तारे हैं?
นี่คือภาพของดาราจักรชนิดก้นหอย มีแขนสองข้าง
😀 🌌 🔭 ✨ ⭐ 🪐 ☄️ 🌠 👩‍🚀 → ≈ ± µ Å α β γ λ ° ² ½ … — “quoted” ‘single’
"""

# Strings that tokenizers disagree about.
TOKENS_STRINGS = [
    "", " ", "  ", "   ", "    ", "     ", " " * 16, " " * 17, "\t", "\t\t", "\n", "\n\n", "\n\n\n", "\r", "\r\n", "\r\n\r\n", "\n\r",
    "\t\n", " \n", "\n ", " \n ", "  \n  ", "\n\t", "\v", "\f", " \t \n \r ", "a\n", "\na", "\nWhat", " What", "  What", "What ",
    "What  ", "\n What", "\n  What", "What\n", "a b", "a  b", "a   b", "a    b", "a\tb", "a \tb", "a\t b", "a\n b", "a\n\nb", "a\n \nb",
    "a \n b", "a\r\nb", "a\r\n\r\n b", "a \r\n", "x\n\n\n\ny", "!\n", "!\n\n", "! \n", "!?\r\n\r\nx", "...\n   x", " !\n", "  !", "\n!", "\n\n!!",
    "Hello", "hello", "HELLO", "Hello world", " Hello world", "Hello world ", "Hello, world!", "Hello,world", "Hello  world!!",
    "(Hello) [world] {x}", "hello_world", "snake_case_name", "camelCaseName", "http://example.org/a?b=c&d=%20", "a@b.de", "#tag", "$5.00",
    "it's", "It's", "IT'S", "it'S", "they're", "THEY'RE", "They'Re", "we've", "WE'VE", "I'm", "I'M", "he'll", "HE'LL", "he'Ll", "I'd",
    "I'D", "can't", "CAN'T", "'s", "'S", " 's", "''s", "'", "''", "'x", "'sup", "'SUP", "'ret", "'v", "'l", "'re", "'veto", "x'\u017fy",
    "'\u017f", "d'accord", "l'\u00e9toile", "rock 'n' roll", "\u2019s", "it\u2019s", "'\n", "' s", "o'clock's",
    "0", "1", "12", "123", "1234", "12345", "123456", "1234567", "12345678901234567890", " 1", " 12", "  12", "1 2 3", "1,234,567.89",
    "3.14159", "-1", "+1", "1e-10", "0x1F", "1st", "2nd", "a1", "1a", "a1b2c3", "M31", "NGC1300", "v2.0.1", "10:30", "2026-11-22", "50%",
    "\u00b2", "x\u00b2", "\u00bd", "1\u00bd", "\u2163", "\u0661\u0662\u0663\u0664", "\u0967\u0968\u0969\u096a", "\uff11\uff12\uff13\uff14",
    "\U0001d7d8\U0001d7d9", "12\u00b234", "\u216712", " \u00b2", "1\u0661\u09671",
    "\u00e9", "e\u0301", "cafe\u0301", "caf\u00e9", "na\u00efve", "\u00c5ngstr\u00f6m", "\u212b", "\ufb01", "\u01c4", "\u0130stanbul", "\u00df",
    "\u1e9e", "stra\u00dfe", "a\u0300\u0301\u0302\u0303b", "\u0301", " \u0301", "\u0301a", "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd", "\u0627\u0644\u0633\u0644\u0627\u0645 \u0639\u0644\u064a\u0643\u0645",
    "\u0627\u0644\u0633\u0651\u064e\u0644\u0627\u0645\u064f", "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd", "\u200fabc\u200e", "\u202eabc\u202c",
    "\u0413\u0430\u043b\u0430\u043a\u0442\u0438\u043a\u0430", "\u0393\u03b1\u03bb\u03b1\u03be\u03af\u03b1\u03c2", "\u4f60\u597d", "\u4f60\u597d\u4e16\u754c", " \u4f60\u597d",
    "\u4f60 \u597d", "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c", "\uc548\ub155\ud558\uc138\uc694", "\u1112\u1161\u11ab", "\u7b2c12\u7ae0", "\u3002\u3001\u300c\u300d", "\u3000",
    "a\u3000b", "\u3000\u3000a", "\U00020000\U0002a6df", "\ufa0e",
    "\U0001f600", "\U0001f600\U0001f600", "a\U0001f600b", " \U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f469\u200d\U0001f680", "\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "1\ufe0f\u20e3", "\U0001f3f4\U000e0067\U000e0062\U000e007f",
    "\u2604\ufe0f \U0001fa90", "\u00a0", "a\u00a0b", "\u00a0\u00a0a", " \u00a0a", "\u00a0 a", "\u1680a", "\u2003a", "\u2003\u2003a", "\u2028", "a\u2028b", "\u2029\n",
    "\u202fa", "\u205fa", "\u0085", "a\u0085b", "\u0085\n", "\u180ea", "\u200ba", "\u200b", "\ufeffa", "\ufeff", "\u00ada", "\u2060", "\u001c\u001d\u001ea",
    "\x00", "a\x00b", "\x00\x00", " \x00", "\x01\x02\x03", "\x1b[31mred\x1b[0m", "\x7f", "\x80", "\u009f", "\ufffd", "\ufffda", "\uffff", "\U0010ffff", "\ue000", "\U000f0000",
    "\u2581", "\u2581\u2581", "a\u2581b", " \u2581a", "\u2581 a", "\u0120", "\u0120a", "\u010a", "\u0100", "\u0143", "<0x0A>", "<0x41>", "<0xZZ>", "\\n", "\\", "\"", "`", "~~~",
    "=" * 20, "-" * 33, "*" * 7, "ab" * 30, "a" * 300, "A" * 50, "\u00e9" * 40, "\u4e2d" * 50, "\U0001f600" * 20, "a " * 60, " a" * 60, "\n" * 30, "\t" * 20,
    "\r\n" * 12, ("x" * 7 + " ") * 9, "1" * 50, ".,;:" * 11, "'s" * 9, "\u00a0" * 9,
    "for (int i = 0; i < n; i++) {\n    x[i] += y[i];\n}\n", "\tif (a && b) return;\r\n\t\telse\r\n", "<div class=\"a\">&nbsp;</div>", "a->b::c<d>()",
    "SELECT * FROM stars WHERE mag < 6.5;", "E = mc^2", "$\\alpha_{ij}$", "T\u2091ff = 5\u202f778 K", "H\u03b1 (\u03bb6563 \u00c5)", "5.2\u00d710\u00b9\u2070 M\u2609",
    "The galaxy is a barred spiral.", "There's a ringed planet near the centre; I can't tell.", "A chat between a curious user and an artificial "
    "intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ", "What is in the image? ASSISTANT:",
    "Gr\u00f6\u00dfe: ungef\u00e4hr 60 000 Lichtjahre", "\u00bfCu\u00e1ntas estrellas hay?", "\u0421\u043a\u043e\u043b\u044c\u043a\u043e \u0437\u0432\u0451\u0437\u0434?", "\u56fe\u4e2d\u6709\u591a\u5c11\u9897\u6052\u661f?",
    "Mixed \u4e2d\u6587 and English, \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0438 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \U0001f30c 42!", "tab\tsep\tvalues\n1\t2\t3\n",
    "trailing spaces   \nand lines  \n\n  indented", "   leading", "\n\n\nleading lines", "x" + " " * 12 + "y", "end\n\n\n", "a magnitude", " magnitudes", "nebulosities", " nebulosities", "a.b.c...d", "?!?!", "--flag=value -x",
]

# Special tokens in the text. <s> is the SentencePiece vocabularies' own, <|...|> those of the byte-level ones; both see both.
TOKENS_SPECIAL_STRINGS = [
    "<s>", "</s>", "<unk>", "<s></s>", " <s>", "<s> ", "<s>a", "a<s>", "a <s> b", "a<s>b", "<s>\n", "\n<s>\nWhat", "<s>Hello</s>", "<S>", "<s", "s>", "< s>",
    "<<s>>", "<s><s><s>", "Hello</s><s>USER: Hi</s>", "yes</s>\n", "<image>", "<image>\nWhat", "a<image>b", " <image> ", "<im", "<ima", "<imag<image>", "<image><image>",
    "<s><image></s>", "<|endoftext|>", "a<|endoftext|>b", "<|endoftext|><|endoftext|>", " <|endoftext|> ", "<|end", "<|endoftext|", "<|im_start|>user\nHi<|im_end|>\n",
    "<|im_start|>assistant\n", "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nIt's 12:30<|im_end|>\n", "<|im_start|><|im_end|>", "<|im_start",
    "<|im_end|>>", "<<|im_end|>", "<extra>", "<extra>tail", "<extra tail", "a <extra> b\n<extra>", "\u00e9<|im_end|>\u00e9", "<|im_start|> \n<|im_end|>  x", "12<|im_end|>34", "x'<|im_end|>s",
]

# Bytes that are not UTF-8.
TOKENS_BROKEN = [
    b"\xff", b"\xfe\xff", b"\x80", b"a\x80b", b"\xc0\x80", b"\xc1\xbf", b"\xe2\x82", b"\xe2\x82a", b"a\xe2", b"\xe2\x28\xa1", b"\xf0\x9f\x98", b"\xf0\x9f\x98 x", b"\xf0\x9f",
    b"\xed\xa0\x80", b"\xed\xb0\x80", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf", b"caf\xe9", b"\xe9t\xe9 1912", b"\xc3\xc3\xa9",
    b"\xf0\x9f\x98\x80\xf0", b" \xff \xff", b"\xff\n\xff", b"\xef\xbf\xbd\xff", b"\xe2\x96", b"\x00\xff\x00",
]


def tokens_texts():
    """Every text of the goldens as (bytes, how often they are repeated)."""
    rng = random.Random(1610)
    texts = [(s.encode(), 1) for s in TOKENS_STRINGS + TOKENS_SPECIAL_STRINGS] + [(b, 1) for b in TOKENS_BROKEN]
    words = " ".join(rng.choice(TOKENS_CORPUS.split()) for _ in range(600)).encode()[:2500].decode(errors="ignore").encode()
    letters = "".join(rng.choice("abcdeinorst") for _ in range(1000)).encode()
    return texts + [(words, 4), (letters, 10), (b"a", 10000), (b" ", 10000)]   # text, one long word


def tokens_flags(text):
    """The flag sets that a text is tried with."""
    return [0, TOKENS_PARSE, TOKENS_ADD | TOKENS_PARSE] if b"<" in text and len(text) < 1000 else [0]


def tokens_write_texts(path, texts):
    """Little-endian, read by read_texts in test.c: count, then repetitions, size and bytes of each."""
    with open(path, "wb") as f:
        f.write(struct.pack("<I", len(texts)))
        for text, times in texts:
            f.write(struct.pack("<II", times, len(text)) + text)


def tokens_hash(ids):
    """FNV-1a over ids: long lists are compared by it."""
    h = 2166136261
    for i in ids:
        h = (h ^ i) * 16777619 & 0xFFFFFFFF
    return h


def tokens_write_cases(path, cases):
    """cases: (number of the text, flags, ids, what the ids read as: bytes, True for the text itself, None for not compared)"""
    with open(path, "wb") as f:
        f.write(struct.pack("<I", len(cases)))
        for text, flags, ids, decoded in cases:
            f.write(struct.pack("<III", text, flags, len(ids)))
            f.write(struct.pack("<I", tokens_hash(ids)) if len(ids) > 600 else struct.pack("<%dH" % len(ids), *ids))
            f.write(struct.pack("<I", 0xFFFFFFFF if decoded is None else 0xFFFFFFFE if decoded is True else len(decoded)))
            f.write(decoded if isinstance(decoded, bytes) else b"")


def tokens_writer(path, model):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("astrovl test vocabulary")
    writer.add_tokenizer_model(model)
    return writer


def tokens_close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


# ---- SentencePiece ------------------------------------------------------------------------------------------------------

def tokens_train_spm(folder, name, **settings):
    """A SentencePiece model with LLaMA's settings, but for those given."""
    corpus = os.path.join(folder, "corpus.txt")
    with open(corpus, "w", encoding="utf-8") as f:
        f.write((TOKENS_CORPUS + "\n") * 2)
    options = dict(model_type="bpe", vocab_size=1000, byte_fallback=True, normalization_rule_name="identity",
                   remove_extra_whitespaces=False, add_dummy_prefix=True, split_digits=True, character_coverage=0.99,
                   allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1,
                   max_sentence_length=100000, minloglevel=2, hard_vocab_limit=False)
    options.update(settings)
    sentencepiece.SentencePieceTrainer.train(input=corpus, model_prefix=os.path.join(folder, name), **options)
    return sentencepiece.SentencePieceProcessor(model_file=os.path.join(folder, name + ".model"))


def tokens_with_unused(proto, unused):
    """A serialised ModelProto with some pieces' type (field 3 of field 1) set to UNUSED. Sizes are one or two bytes here."""
    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128, n >> 7])
    out, at, piece = b"", 0, 0
    while proto[at] == 0x0A:                             # the pieces stand first
        size, start = proto[at + 1], at + 2
        assert size < 128
        body = proto[start:start + size] + (b"\x18\x05" if piece in unused else b"")
        out += b"\x0A" + varint(len(body)) + body
        at, piece = start + size, piece + 1
    return out + proto[at:]


def tokens_spm_types(sp):
    def kind(i):
        for name, holds in (("unknown", sp.is_unknown(i)), ("control", sp.is_control(i)), ("byte", sp.is_byte(i)), ("unused", sp.is_unused(i))):
            if holds:
                return TOKENS_TYPE[name]
        return TOKENS_TYPE["normal"]
    return [kind(i) for i in range(sp.get_piece_size())]


def tokens_write_spm(path, sp, user_defined, space_prefix):
    types = tokens_spm_types(sp)
    for piece in user_defined:
        types[sp.piece_to_id(piece)] = TOKENS_TYPE["user"]
    writer = tokens_writer(path, "llama")
    writer.add_token_list([sp.id_to_piece(i) for i in range(sp.get_piece_size())])
    writer.add_token_scores([sp.get_score(i) for i in range(sp.get_piece_size())])
    writer.add_token_types(types)
    writer.add_bos_token_id(sp.bos_id())
    writer.add_eos_token_id(sp.eos_id())
    writer.add_unk_token_id(sp.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(space_prefix)
    tokens_close(writer)


def tokens_split_special(text, special):
    """Cuts a text at the special tokens, leftmost and longest first, as transformers' Trie does."""
    at = start = 0
    while at < len(text):
        hits = [s for s in special if text.startswith(s, at)]
        if hits:
            yield text[start:at], max(hits, key=len)
            at = start = at + len(max(hits, key=len))
        else:
            at += 1
    yield text[start:], None


def tokens_encode_spm(sp, text, flags):
    """transformers' LlamaTokenizer with legacy=True: special tokens cut the text, SentencePiece sees each part alone."""
    ids = [sp.bos_id()] if flags & TOKENS_ADD else []
    special = {sp.id_to_piece(i).encode(): i for i in (sp.unk_id(), sp.bos_id(), sp.eos_id())} if flags & TOKENS_PARSE else {}
    for part, token in tokens_split_special(text, special):
        ids += sp.encode(part) if part else []
        ids += [special[token]] if token else []
    return ids


def tokens_spm_cases(sp):
    cases = []
    for number, (text, times) in enumerate(tokens_texts()):
        text *= times
        for flags in tokens_flags(text):
            ids = tokens_encode_spm(sp, text, flags)
            decoded = None
            if flags == 0 and text not in TOKENS_BROKEN and sp.unk_id() not in ids:   # it would show unknown tokens as " ?? "
                decoded = sp.decode(ids).encode()
            cases.append((number, flags, ids, decoded == text or decoded))
    return cases


def tokens_make_spm(folder, work):
    user_defined = ["<image>", "<im", "\u2581\u2581\u2581\u2581"]
    sp = tokens_train_spm(work, "spm", user_defined_symbols=user_defined)
    tokens_write_spm(os.path.join(folder, "vocab_spm.gguf"), sp, user_defined, True)
    tokens_write_cases(os.path.join(folder, "tokens_spm.bin"), tokens_spm_cases(sp))
    # without byte fallback and leading space, and with pieces that are only stepping stones (UNUSED)
    sp = tokens_train_spm(work, "plain", vocab_size=700, byte_fallback=False, add_dummy_prefix=False, character_coverage=0.98)
    unused = {i for i in range(3, sp.get_piece_size(), 3) if len(sp.id_to_piece(i)) > 1}
    sp = sentencepiece.SentencePieceProcessor(model_proto=tokens_with_unused(sp.serialized_model_proto(), unused))
    assert sum(sp.is_unused(i) for i in range(sp.get_piece_size())) == len(unused) > 50
    tokens_write_spm(os.path.join(folder, "vocab_plain.gguf"), sp, [], False)
    tokens_write_cases(os.path.join(folder, "tokens_plain.bin"), tokens_spm_cases(sp))


# ---- byte-level BPE -----------------------------------------------------------------------------------------------------

def tokens_pre_tokenizer(rule):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule != "llama-bpe")
    if rule == "gpt-2":
        return byte_level
    first = (pre_tokenizers.Digits(individual_digits=True) if rule == "smollm" else
             pre_tokenizers.Split(tokenizers.Regex(TOKENS_LLAMA3_RULE), "isolated"))
    return pre_tokenizers.Sequence([first, byte_level])


def tokens_bpe(rule, vocab, merges, special=(), added=()):
    """A tokenizer of the `tokenizers` package. special and added tokens are found in the text."""
    t = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule == "llama-bpe"))
    t.pre_tokenizer = tokens_pre_tokenizer(rule)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([tokenizers.AddedToken(s, normalized=False) for s in special])
    t.add_tokens([tokenizers.AddedToken(s, normalized=False) for s in added])
    return t


def tokens_encode_bpe(with_special, without, text, flags, bos):
    """bos: the id to put first, or None"""
    t = with_special if flags & TOKENS_PARSE else without
    ids = t.encode(text.decode("utf-8", "replace"), add_special_tokens=False).ids
    return ([bos] if flags & TOKENS_ADD and bos is not None else []) + ids


def tokens_make_bpe(folder, rule, size):
    special, added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<extra>", "<extra>tail"]
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = tokens_pre_tokenizer(rule)
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(TOKENS_CORPUS.split("\n"), trainer)
    state = json.loads(trained.to_str())["model"]
    vocab, merges = state["vocab"], [tuple(m) for m in state["merges"]]
    if rule == "llama-bpe":   # a word that no merge leads to, taken whole
        vocab["\u0120magnitude"] = len(vocab)
        vocab["nebulosities"] = len(vocab)
    pieces = sorted(vocab, key=vocab.get) + special + added
    types = [TOKENS_TYPE["normal"]] * len(vocab) + [TOKENS_TYPE["control"]] * len(special) + [TOKENS_TYPE["user"]] * len(added)
    name = rule.replace("-", "")
    writer = tokens_writer(os.path.join(folder, "vocab_%s.gguf" % name), "gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    writer.add_token_merges(["%s %s" % m for m in merges])
    writer.add_bos_token_id(pieces.index(special[1]))
    writer.add_eos_token_id(pieces.index(special[2]))
    writer.add_add_bos_token(rule == "llama-bpe")
    tokens_close(writer)
    both = tokens_bpe(rule, vocab, merges, special, added), tokens_bpe(rule, vocab, merges)
    bos = pieces.index(special[1]) if rule == "llama-bpe" else None
    cases = []
    for number, (text, times) in enumerate(tokens_texts()):
        text *= times
        for flags in tokens_flags(text):
            ids = tokens_encode_bpe(*both, text, flags, bos)
            decoded = both[0].decode(ids, skip_special_tokens=True).encode()
            cases.append((number, flags, ids, decoded == text or decoded))
    tokens_write_cases(os.path.join(folder, "tokens_%s.bin" % name), cases)


# ---- characters ---------------------------------------------------------------------------------------------------------

def tokens_make_utf8(folder):
    """Broken UTF-8 and what Python's incremental decoder makes of it."""
    rng = random.Random(4)
    pieces = [b"a", b" ", b"\xc3\xa9", b"\xe2\x82\xac", b"\xf0\x9f\x98\x80", b"\xef\xbf\xbd", b"\xed\x9f\xbf", b"\xf4\x8f\xbf\xbf"] + TOKENS_BROKEN
    texts = list(TOKENS_BROKEN)
    for _ in range(300):
        text = b"".join(rng.choice(pieces) for _ in range(rng.randint(1, 6)))
        texts.append(text[:rng.randint(1, len(text))])
    texts += [bytes(rng.choice((0x41, 0x80, 0xbf, 0x9f, 0xa0, 0xc2, 0xe0, 0xe1, 0xed, 0xf0, 0xf1, 0xf4)) for _ in range(8)) for _ in range(300)]
    shown = []
    for text in texts:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        shown.append(("".join(decoder.decode(text[i:i + 1]) for i in range(len(text))) + decoder.decode(b"", True)).encode())
        assert shown[-1] == text.decode("utf-8", "replace").encode()
    tokens_write_texts(os.path.join(folder, "tokens_utf8.bin"), [(t, 1) for pair in zip(texts, shown) for t in pair])


def tokens_number(n):
    """A number of section 6's tables: the last digit in base 56 from "#" to "Z", those before it in base 34 from "]" to "~"."""
    digits = chr(ord("#") + n % 56)
    n //= 56
    while n:
        digits = chr(ord("]") + n % 34) + digits
        n //= 34
    return digits


def tokens_signed(n):
    return tokens_number(2 * n if n >= 0 else -2 * n - 1)


def tokens_print_table(comment, text):
    print("// " + comment)
    assert "??" not in text                                          # a trigraph?
    for i in range(0, len(text), 114):
        print('    "%s"' % text[i:i + 114])


def tokens_print_runs(title, values, strides=(1,)):
    """Prints {code point: value} as runs: the gap to the run before, 4 * (count - 1) + (stride - 1), the value; without strides
    the gap and 4 * (count - 1) + the value."""
    runs, text, end = [], "", 0                                      # runs: first, count, stride, value
    for c, value in sorted(values.items()):
        last = runs[-1] if runs else [0, 0, 0, 0]
        step = c - last[0] - (last[1] - 1) * last[2]
        if last[3] == value and step in (strides or (1,)) and (last[1] == 1 or step == last[2]):
            last[1:3] = last[1] + 1, step
        else:
            runs.append([c, 1, 1, value])
    for first, count, stride, value in runs:
        text += tokens_number(first - end)
        if strides:
            text += tokens_number(4 * (count - 1) + stride - 1) + tokens_signed(value)
        else:
            text += tokens_number(4 * (count - 1) + value)
        end = first + (count - 1) * stride + 1
    tokens_print_table("%s: %d runs" % (title, len(runs)), text)


def tokens_unicode_tables():
    """Prints the tables of the section on text: Unicode's properties as the engine in `tokenizers` has them."""
    lower, decompose, compose = normalizers.Lowercase(), normalizers.NFD(), normalizers.NFC()
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    classes = {}
    for value, pattern in ((1, r"\p{L}"), (2, r"\p{N}"), (3, r"\s")):
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "removed")
        classes.update((c, value) for c in points if not split.pre_tokenize_str(chr(c)))
    tokens_print_runs("classes", classes, ())

    small = {c: lower.normalize_str(chr(c)) for c in points}         # U+0130 becomes two characters: written out in the code
    tokens_print_runs("lower case", {c: ord(s) - c for c, s in small.items() if s != chr(c) and len(s) == 1}, (1, 2))

    marks = {}                                                       # the engine's Unicode is older than Python's: what it
    for c in points:                                                 # does not reorder has no class for it
        rank = unicodedata.combining(chr(c))
        if rank and decompose.normalize_str(chr(c)) == chr(c):
            before, behind = ("a\u0345" + chr(c), "a" + chr(c) + "\u0345") if rank < 240 else ("a" + chr(c) + "\u0334", "a\u0334" + chr(c))
            if decompose.normalize_str(before) == behind:
                marks[c] = rank
    tokens_print_runs("marks", marks)

    groups, text, last = {}, "", 0                                   # (second, composes): [(whole, first)]
    for c in points:
        hangul, cjk = 0xAC00 <= c < 0xD7A4, 0xF900 <= c < 0xFB00 or 0x2F800 <= c < 0x2FA20
        if decompose.normalize_str(chr(c)) != chr(c) and not hangul and not cjk:
            parts = [int(x, 16) for x in unicodedata.decomposition(chr(c)).split()] + [0]
            groups.setdefault((parts[1], compose.normalize_str(chr(c)) == chr(c)), []).append((c, parts[0]))
    for (second, composes), pairs in sorted(groups.items()):
        text += tokens_number(second - last) + tokens_number(2 * len(pairs) + composes)
        for before, (whole, first) in zip([(0, 0)] + pairs, pairs):
            text += tokens_number(whole - before[0]) + tokens_signed(first - before[1])
        last = second
    tokens_print_table("pairs: %d" % sum(map(len, groups.values())), text)


def make_tokens(folder):
    tokens_write_texts(os.path.join(folder, "tokens_texts.bin"), tokens_texts())
    with tempfile.TemporaryDirectory() as work:
        tokens_make_spm(folder, work)
    for rule, size in (("gpt-2", 500), ("llama-bpe", 500), ("smollm", 420)):
        tokens_make_bpe(folder, rule, size)
    tokens_make_utf8(folder)


# =====================================================================================================================
# Joint
# Two tiny random CLIP models, computed by transformers in float32, with a small vocabulary of CLIP's kind. Read by test.c's
# "joint" tests.
#   joint_a.gguf         as clip.cpp writes: F32, no merges, no logit_scale, ffn_up and ffn_down swapped; quick-GELU
#   joint_b.gguf         F16 and BF16, GELU, PAPERCLIP's dense heads, merges, the vocabulary under clip.text.tokenizer.ggml.*
#   joint_a.gold, joint_b.gold   every intermediate tensor of the first image and text; embeddings and scores of all
#   joint_texts.bin, joint_tokens.bin   hard texts, and what CLIPTokenizer makes of them
#   joint_image.png      a wide image, beside models_1.png and models_2.png
# =====================================================================================================================

JOINT_TEXTS = ["a photo of a spiral galaxy", "An edge-on galaxy with a DUST lane", "globular cluster", "",
               "the ringed planet and its moons, seen through a small telescope on a clear night: can you count how many moons there "
               "are, and tell which of them is the largest one?"]
JOINT_STRINGS = ["\u0130stanbul", "STRASSE \u1e9e \u00df", "Caf\u00e9 cafe\u0301 CAFE\u0301", "\u212b \u2126 \u212a",
                 "\u1100\u1161\u11a8 \uac00\u11a8 \uac01", "q\u0323\u0307 q\u0307\u0323", "\u0958\u0929 \u0915\u093c",
                 "\uf900\u2f800 \U0002f81a", "\u03a3\u0391\u03a3", "it's IT'S can't CAN'T 'S", "don\u2019t", "1234 \u00bd\u00b2 x\u00b2",
                 "NGC1300 M 31  \t\n H\u03b1", "<|startoftext|> a <|endoftext|> b", "<|ENDOFTEXT|>", "<|endoftext|", "</w> a</w>",
                 "\u0344 a\u0344", "\u1e69 s\u0323\u0307 s\u0307\u0323 \u1e61\u0323", "\u0f73\u0f75", "A\u030a \u00c5", "\u0301a", " "]


def joint_strings():
    rng = random.Random(77)
    marks = [chr(c) for c in range(0x300, 0x370)] + ["\u0323", "\u0327", "\u0328", "\u093c", "\u3099", "\u05bc", "\u064b", "\u0651"]
    bases = list("aAeEiIoOuUsSzZ \u03b1\u03b9\u03c5\u03a9\u0391\u0438\u0418\u304b\u304f\u30db\u05d0\u0627\u0915\u00c9\u01d7\u1ea4\u1fb7")
    strings = list(JOINT_STRINGS) + [s for s in JOINT_TEXTS if s]
    for _ in range(120):
        strings.append("".join(rng.choice(bases) + "".join(rng.choice(marks) for _ in range(rng.choice([0, 1, 1, 2, 3])))
                               for _ in range(rng.randint(1, 6))))
    for _ in range(40):
        strings.append("".join(chr(rng.choice([rng.randint(0x20, 0x24ff), rng.randint(0xa640, 0xabff), rng.randint(0x1100, 0x11ff),
                                               rng.randint(0x10400, 0x104ff), rng.randint(0xac00, 0xd7a3), rng.randint(0x1e900, 0x1e943)]))
                               for _ in range(8)))
    return strings


def joint_vocabulary(n_merges=188):
    """-> tokens in the order of OpenAI's vocabulary (bytes, bytes that end a word, merges, two special tokens), merges"""
    letters = list(dict.fromkeys(byte for _, byte in sorted(joint_bytes().items())))
    clean = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    cut = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    text = clean.normalize_str(TOKENS_CORPUS + "\n".join(JOINT_TEXTS))
    words = collections.Counter(word for line in text.split("\n") for word, _ in cut.pre_tokenize_str(line))
    words = [[list(word[:-1]) + [word[-1] + "</w>"], n] for word, n in sorted(words.items())]
    merges = []                                # `tokenizers` breaks ties by chance when words have an ending, hence by hand
    while len(merges) < n_merges:
        pairs = collections.Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for item in words:
            word, i = item[0], 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = ["".join(best)]
                i += 1
    tokens = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    assert len(set(tokens)) == len(tokens) and len(letters) == 256
    return tokens, merges


def joint_bytes():                             # GPT-2's spelling of bytes
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


def joint_write_tokens(folder, tokenizer):
    texts = tokens_texts() + [(s.encode(), 1) for s in joint_strings()]
    tokens_write_texts(os.path.join(folder, "joint_texts.bin"), texts)
    cases = [(i, TOKENS_ADD | TOKENS_PARSE, tokenizer((text * times).decode("utf-8", "replace"))["input_ids"], None)
             for i, (text, times) in enumerate(texts)]
    tokens_write_cases(os.path.join(folder, "joint_tokens.bin"), cases)
    return len(cases)


class joint_head(torch.nn.Module):             # PAPERCLIP's frozen-backbone variant: flax's gelu is the tanh one
    def __init__(self, n, n_hidden):
        super().__init__()
        self.a, self.b = torch.nn.Linear(n, n_hidden), torch.nn.Linear(n_hidden, n)

    def forward(self, x):
        return self.b(torch.nn.functional.gelu(self.a(x), approximate="tanh"))


def joint_scaled(name, x, logit_scale):
    if name == "logit_scale":
        return torch.tensor(logit_scale)
    if "norm" in name:
        return (1 if name.endswith("weight") else 0) + 0.2 * x
    if x.dim() == 1 or "position" in name:
        return 0.3 * x
    return x if "token_embedding" in name else x / math.sqrt(x[0].numel()) * 1.3


def joint_build(which, tokens, seed):
    act = {"a": "quick_gelu", "b": "gelu"}[which]
    config = CLIPConfig(
        text_config=dict(vocab_size=len(tokens), hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
                         max_position_embeddings=24, hidden_act=act, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1),
        vision_config=dict(hidden_size=40 if which == "a" else 24, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
                           image_size=32, patch_size=8, hidden_act=act), projection_dim=20)
    model = CLIPModel(config).float().eval()
    model.set_attn_implementation("eager")
    if which == "b":
        model.vision_head, model.text_head = joint_head(24, 50), joint_head(32, 90)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = torch.randn(p.shape, generator=rng)
            x = joint_scaled(name, x, math.log(100.0) if which == "a" else 3.3)
            kind = joint_type(which, name, p)
            p.copy_(x.half().float() if kind == 1 else x.bfloat16().float() if kind == 30 else x)
    return model


def joint_type(which, name, p):                # as clip.cpp: the patches always F16
    if "patch_embedding" in name or (which == "b" and p.dim() == 2 and "position" not in name and "token" not in name):
        return 1
    return 30 if which == "b" and "token_embedding" in name else 0


def joint_gguf_name(name, swapped):
    if "projection" in name or name == "logit_scale":
        return name
    tower = {"vision": "v.", "text": "t."}[name.split("_")[0]]
    base, kind = (name.rsplit(".", 1) + [""])[:2]
    base = base.split(".", 1)[1]
    if base == "embeddings" and kind == "class_embedding":
        return "v.class_embd"
    if name.split(".")[0].endswith("_head"):
        return tower + {"a": "head.0.", "b": "head.2."}[base] + kind
    if base.startswith("encoder.layers."):
        _, _, layer, rest = base.split(".", 3)
        out = MODELS_VISION_NAMES[rest]
        if swapped:
            out = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}.get(out, out)
        return "%sblk.%s.%s.%s" % (tower, layer, out, kind)
    return tower + {"embeddings.patch_embedding": "patch_embd", "embeddings.position_embedding": "position_embd",
                    "embeddings.token_embedding": "token_embd", "pre_layrnorm": "pre_ln", "post_layernorm": "post_ln",
                    "final_layer_norm": "post_ln"}[base] + "." + kind


def joint_write_gguf(which, folder, model, tokens, merges):
    w = gguf.GGUFWriter(os.path.join(folder, "joint_%s.gguf" % which), "clip")
    w.add_name("random CLIP " + which.upper())
    for key in ("has_text_encoder", "has_vision_encoder"):
        w.add_bool("clip." + key, True)
    w.add_bool("clip.use_gelu", which == "b")
    v, t = model.config.vision_config, model.config.text_config
    w.add_uint32("clip.vision.image_size", v.image_size)
    w.add_uint32("clip.vision.patch_size", v.patch_size)
    w.add_uint32("clip.text.context_length", t.max_position_embeddings)
    for key, c in (("clip.vision.", v), ("clip.text.", t)):
        w.add_uint32(key + "embedding_length", c.hidden_size)
        w.add_uint32(key + "feed_forward_length", c.intermediate_size)
        w.add_uint32(key + "projection_dim", model.config.projection_dim)
        w.add_uint32(key + "attention.head_count", c.num_attention_heads)
        w.add_float32(key + "attention.layer_norm_epsilon", c.layer_norm_eps)
        w.add_uint32(key + "block_count", c.num_hidden_layers)
    w.add_array("clip.vision.image_mean", MODELS_MEAN)
    w.add_array("clip.vision.image_std", MODELS_STD)
    if which == "a":
        w.add_token_list(tokens)
    else:
        w.add_array("clip.text.tokenizer.ggml.tokens", tokens)
        w.add_array("clip.text.tokenizer.ggml.merges", [" ".join(m) for m in merges])
    for name, p in model.named_parameters():
        if which == "a" and name == "logit_scale":
            continue
        x, kind = np.ascontiguousarray(p.detach().numpy().reshape(p.shape or (1,))), joint_type(which, name, p)
        if kind == 30:
            w.add_tensor(joint_gguf_name(name, which == "a"), gguf.quantize(x, gguf.GGMLQuantizationType.BF16),
                         raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            w.add_tensor(joint_gguf_name(name, which == "a"), x.astype(np.float16 if kind == 1 else np.float32))
    models_close(w)


def joint_preprocess(image, size):             # CLIPImageProcessor: the short side to size, the middle cut out
    short, long = sorted(image.size)
    other = int(size * long / short)
    w, h = (size, other) if image.size[0] <= image.size[1] else (other, size)
    sized = image.resize((w, h), Image.Resampling.BICUBIC)
    left, top = (w - size) // 2, (h - size) // 2
    pixels = np.asarray(sized.crop((left, top, left + size, top + size))).astype(np.float32) * np.float32(1 / 255)
    pixels = (pixels - np.array(MODELS_MEAN, np.float32)) / np.array(MODELS_STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))[None])


class joint_recorder(models_recorder):
    def __init__(self, model):
        self.values, self.handles = {}, []
        self.out(model.vision_model.embeddings.patch_embedding, "vision_model.embeddings.patch_embedding",
                 lambda x: x.flatten(2).transpose(1, 2))
        for name in ("vision_model.embeddings", "vision_model.pre_layrnorm", "text_model.embeddings", "text_model.final_layer_norm"):
            self.out(model.get_submodule(name), name)
        for name, n in (("vision_model", 3), ("text_model", 2)):
            for i in range(n):
                path = "%s.encoder.layers.%d" % (name, i)
                self.tower_layer(model.get_submodule(path), path)

    def close(self):
        for h in self.handles:
            h.remove()


def joint_rows(model, images, ids, values):    # transformers' CLIPModel, with the heads where there are some
    identity = lambda x: x
    pooled_v = model.vision_model(pixel_values=images).pooler_output
    pooled_t = model.text_model(input_ids=ids).pooler_output
    head_v, head_t = getattr(model, "vision_head", identity)(pooled_v), getattr(model, "text_head", identity)(pooled_t)
    v, t = model.visual_projection(head_v), model.text_projection(head_t)
    if values is not None:
        values.update({"vision_model.post_layernorm": pooled_v.numpy(), "visual_projection": v.numpy(), "text_projection": t.numpy()})
        if head_v is not pooled_v:
            values.update({"visual_projection.head": head_v.numpy(), "text_projection.head": head_t.numpy()})
    return v, t


def joint_make_one(which, folder, tokens, merges, images, seed):
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
    model = joint_build(which, tokens, seed)
    joint_write_gguf(which, folder, model, tokens, merges)
    pixels = [joint_preprocess(i, model.config.vision_config.image_size) for i in images]
    ids = [torch.tensor([tokenizer(t, truncation=True, max_length=24)["input_ids"]]) for t in JOINT_TEXTS]
    recorder = joint_recorder(model)
    with torch.no_grad():
        joint_rows(model, pixels[0], ids[0], recorder.values)
        recorder.close()
        v = torch.cat([joint_rows(model, p, ids[0], None)[0] for p in pixels])
        t = torch.cat([joint_rows(model, pixels[0], i, None)[1] for i in ids])
        if which == "a":                       # the whole of transformers' own forward pass agrees
            whole = model(pixel_values=pixels[0], input_ids=ids[0])
            assert torch.allclose(whole.image_embeds, v[:1] / v[:1].norm(), atol=1e-6)
            assert torch.allclose(whole.text_embeds, t[:1] / t[:1].norm(), atol=1e-6)
        nv, nt = v / v.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True)
        cosines = nv @ nt.T
        logits = model.logit_scale.exp() * cosines
        square = nt[:3] @ nv.T                 # three pairs, for the metrics
        labels = torch.arange(3)
        loss = (torch.nn.functional.cross_entropy(model.logit_scale.exp() * square, labels) +
                torch.nn.functional.cross_entropy(model.logit_scale.exp() * square.T, labels)) / 2
    entries = [("pixel_values", pixels[0][0].numpy()), ("pixels.1", pixels[1][0].numpy()), ("pixels.2", pixels[2][0].numpy())]
    entries += [("text.%d" % i, text) for i, text in enumerate(JOINT_TEXTS)]
    entries += [("n_texts", np.array([len(JOINT_TEXTS)], np.int32)), ("images", v.numpy()), ("texts", t.numpy()),
                ("cosines", cosines.numpy()), ("probabilities", logits.softmax(dim=1).numpy()),
                ("order", np.array([sorted(range(len(JOINT_TEXTS)), key=lambda j: -float(row[j])) for row in logits], np.int32)),
                ("loss", np.array([[float(loss)]], np.float32)), ("logit_scale", np.array([[float(model.logit_scale.exp())]], np.float32))]
    models_write_gold(os.path.join(folder, "joint_%s.gold" % which), entries + sorted(recorder.values.items()))
    print("joint %s: %d tensors, loss %.4f" % (which, len(recorder.values), float(loss)))
    return tokenizer


def make_joint(folder):
    torch.set_num_threads(1)
    models_image(90, 41, 3).save(os.path.join(folder, "joint_image.png"), optimize=True)
    images = [Image.open(os.path.join(folder, n)) for n in ("models_1.png", "models_2.png", "joint_image.png")]
    tokens, merges = joint_vocabulary()
    tokenizer = joint_make_one("a", folder, tokens, merges, images, 5)
    joint_make_one("b", folder, tokens, merges, images, 6)
    print("joint: %d tokens, %d texts" % (len(tokens), joint_write_tokens(folder, tokenizer)))


# =====================================================================================================================
# Convert
# Tiny random checkpoints in the layouts that convert.py reads, under convert/: as transformers, LLaVA, open_clip and
# PAPERCLIP save them, with what the reference computes from them. Read by test_convert.py, which lays the folders together
# (tokenizers and the CLIP are shared). Every weight is a bfloat16 and a float16 at once: all formats hold the same model.
#   clip/            C, as transformers saves a CLIPModel (F16, vocab.json, merges.txt, the integer buffers of old versions)
#   clip_flax/       C by FlaxCLIPModel (float32), clip_transfer/  C with PAPERCLIP's heads (bfloat16): flax_model.msgpack
#   clip_open/       C by open_clip
#   llava_v5/        B, as transformers 5 saves it (F16): LLaMA-3-like, tokenizer.json, chat template, processor
#   llava_old/       A, as llava-1.5-7b-hf is (BF16, two shards): LLaMA-2-like, <image> and <pad> added; the tower is C's
#   liuhaotian/      A, as llava-v1.5-7b is (F16, three .bin; the third holds the tower)
#   projector/       A's projector alone: mm_projector.bin;   lora/  adapters, to be refused
#   llama2/          A's language model (.bin; tensors are views of a shared storage)
#   llama3/, smollm/ D and E: tied, grouped queries, LLaMA-3's frequencies; E with merges as texts and a config of version 4
#   spm/             tokenizer.model and its companions;   spm_json/  the same vocabulary as transformers 5 saves it
#   expected.json    {model: {run: {"text", "logits" (of the prompt's last position), "n_prompt"}}}; tokens; embeddings
# =====================================================================================================================

CONVERT_QUESTION = "What is in this image?"
CONVERT_GREEDY = 12
CONVERT_TEXTS = ["a photo of a spiral galaxy", "Globular CLUSTER, seen through thin dust", "12 \u00e9toiles & 3 com\u00e8tes"]
CONVERT_STRINGS = ["", " ", "Hello, world!", "It's 12345 stars; they'RE faint  and\tfar\n\n  away \n", "a\r\n\r\n  b", "caf\u00e9 \u4f60\u597d \U0001f600",
                   "NGC1300 M31 3.14159", "\u2581x \u0120y", "  lead", "trail  ", "THE GALAXY the galaxy", "\x00\x01", "'s 'S don't CAN'T",
                   "<s> <image> <|eot_id|> <|im_end|>", "a" * 40, "\u00bd\u00b2 \u0661\u0662", "e\u0301 \u00c5\u212b", "x\u00a0y\u3000z"]
# The program that saves by flax, run by FLAX_PYTHON: transformers 4.49 and flax 0.12. The tree with heads is that of
# PAPERCLIP's FlaxCLIPModelTransfer (models/clip_transfer.py in github.com/smsharma/PAPERCLIP-Hubble).
CONVERT_FLAX = r"""
import json, sys, jax, jax.numpy as jnp, flax.linen as nn, numpy as np
from flax.serialization import to_bytes
from transformers import CLIPConfig, FlaxCLIPModel
folder, weights, answer = sys.argv[1:]
data, tree = dict(np.load(weights)), {}
heads = {name: data.pop(name) for name in list(data) if "_head." in name}
for name, x in data.items():
    path = name.split(".")
    if path[-1] == "weight":
        kind = "embedding" if "embedding" in path[-2] and x.ndim == 2 else "scale" if x.ndim == 1 else "kernel"
        x = x.T if kind == "kernel" and x.ndim == 2 else x.transpose(2, 3, 1, 0) if x.ndim == 4 else x
        path[-1] = kind
    node = tree
    for part in path[:-1]:
        node = node.setdefault(part, {})
    node[path[-1]] = jnp.asarray(x)
config = CLIPConfig.from_pretrained(folder + "/clip")
model = FlaxCLIPModel(config)
shapes = lambda t: jax.tree_util.tree_map(lambda x: x.shape, dict(t))
assert shapes(model.params) == shapes(tree)
model.save_pretrained(folder + "/clip_flax", params=tree)
dense = lambda name: {"kernel": jnp.asarray(heads[name + ".weight"].T), "bias": jnp.asarray(heads[name + ".bias"])}
moved = dict(tree)
for tower in ("text", "vision"):
    moved[tower + "_model"] = {tower + "_backbone": tree[tower + "_model"], "Dense_0": dense(tower + "_head.a"), "Dense_1": dense(tower + "_head.b")}
config.architectures = ["CLIPModelTransfer"]
config.save_pretrained(folder + "/clip_transfer")
with open(folder + "/clip_transfer/flax_model.msgpack", "wb") as f:
    f.write(to_bytes(model.to_bf16(moved)))
"""
CONVERT_OPEN_CLIP = r"""
import json, sys, numpy as np, open_clip, torch
folder, weights, inputs, answer = sys.argv[1:]
with open(folder + "/clip_open/open_clip_config.json") as f:
    config = json.load(f)["model_cfg"]
model = open_clip.CLIP(**config).eval()
state, done = model.state_dict(), {}
data = {name: torch.from_numpy(x) for name, x in np.load(weights).items()}
for name in state:                             # what open_clip calls it -> what transformers calls it
    tower = "vision_model." if name.startswith("visual.") else "text_model."
    rest = name.replace("visual.", "")
    if rest.startswith("transformer.resblocks."):
        at = tower + "encoder.layers.%s." % rest.split(".")[2]
        rest = rest.split(".", 3)[3]
        if "in_proj" in rest:
            done[name] = torch.cat([data[at + "self_attn.%s_proj.%s" % (p, rest.split("_")[-1])] for p in "qkv"])
            continue
        for a, b in (("attn.", "self_attn."), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("c_fc", "fc1"), ("c_proj", "fc2")):
            rest = rest.replace(a, b)
        done[name] = data[at + rest]
    else:
        other = {"positional_embedding": "text_model.embeddings.position_embedding.weight", "text_projection": "text_projection.weight",
                 "logit_scale": "logit_scale", "visual.class_embedding": "vision_model.embeddings.class_embedding",
                 "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight", "visual.proj": "visual_projection.weight",
                 "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
                 "token_embedding.weight": "text_model.embeddings.token_embedding.weight"}.get(name)
        if not other:
            base, kind = name.rsplit(".", 1)
            other = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm",
                     "ln_final": "text_model.final_layer_norm"}[base] + "." + kind
        done[name] = data[other].T.contiguous() if name in ("text_projection", "visual.proj") else data[other]
model.load_state_dict(done)
model.half()
torch.save(model.state_dict(), folder + "/clip_open/open_clip_pytorch_model.bin")
model.float()
given = np.load(inputs)
with torch.no_grad():
    np.savez(answer, image=model.encode_image(torch.from_numpy(given["pixels"])), texts=torch.cat(
        [model.encode_text(torch.from_numpy(given["ids"][i:i + 1])) for i in range(len(given["ids"]))]))
"""


def convert_randomize(model, seed, scaled):    # values that are bfloat16 and float16 at once
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = scaled(name, torch.randn(p.shape, generator=rng))
            x[x.abs() < 2.0 ** -10] = 0
            p.copy_(x.bfloat16().float())
            assert torch.equal(p.half().float(), p)


def convert_clip(tokens):
    config = CLIPConfig(
        text_config=dict(vocab_size=len(tokens), hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                         max_position_embeddings=24, hidden_act="quick_gelu", bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1),
        vision_config=dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=28, patch_size=7,
                           hidden_act="quick_gelu"), projection_dim=20)
    model = CLIPModel(config).float().eval()
    convert_randomize(model, 31, lambda name, x: joint_scaled(name, x, 3.25))
    model.vision_head, model.text_head = joint_head(24, 40), joint_head(24, 40)
    for head, seed in ((model.vision_head, 32), (model.text_head, 33)):
        convert_randomize(head, seed, lambda name, x: joint_scaled(name, x, 0))
    return model


def convert_text_config(which, vocab):
    base = dict(vocab_size=vocab.n_vocab, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                intermediate_size=48, max_position_embeddings=512, rms_norm_eps=1e-5, bos_token_id=vocab.bos, eos_token_id=vocab.end,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False)
    llama3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 256}
    base.update({"A": dict(vocab_size=vocab.n_vocab + 8), "B": dict(num_key_value_heads=2, rope_parameters=llama3),
                 "D": dict(num_key_value_heads=1, rope_parameters=llama3, tie_word_embeddings=True, rms_norm_eps=1e-6),
                 "E": dict(hidden_size=36, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True, intermediate_size=40,
                           rope_parameters={"rope_type": "default", "rope_theta": 100000.0})}[which])
    return LlamaConfig(**base)


def convert_build(which, vocab, seed, clip):
    text = convert_text_config(which, vocab)
    if which in "AB":
        vision = clip.config.vision_config if which == "A" else CLIPVisionConfig(
            hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=3, image_size=28, patch_size=14, hidden_act="gelu",
            layer_norm_eps=1e-6, projection_dim=20)
        model = LlavaForConditionalGeneration(LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=vocab.n_vocab if which == "A" else vocab.image_token,
            image_seq_length=(vision.image_size // vision.patch_size) ** 2, projector_hidden_act="gelu", vision_feature_layer=-2,
            vision_feature_select_strategy="default", tie_word_embeddings=False))
    else:
        model = transformers.LlamaForCausalLM(text)
    model = model.float().eval()
    wild = text.tie_word_embeddings            # norms of any sign: all positive, tied embeddings repeat their last token
    convert_randomize(model, seed, lambda name, x: x if wild and name == "model.norm.weight" else models_scaled(name, x, vocab))
    if which == "A":
        model.model.vision_tower.load_state_dict({n.replace("vision_model.", ""): p for n, p in clip.state_dict().items()
                                                  if n.startswith("vision_model.")})
        with torch.no_grad():                  # the rows of <image>, <pad> and the padding never win
            model.lm_head.weight[vocab.n_vocab:] *= 0.01
            model.lm_head.weight.copy_(model.lm_head.weight.bfloat16().float() * (model.lm_head.weight.abs() >= 2.0 ** -10))
    return model


class convert_smollm(models_bpe):              # special tokens first, no BOS before a text, digits one by one
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    template = models_chatml.template

    def __init__(self, n_vocab):
        self.plain = tokenizers.Tokenizer(models.BPE())
        self.plain.pre_tokenizer, self.plain.decoder = tokens_pre_tokenizer("smollm"), decoders.ByteLevel()
        self.plain.train_from_iterator(MODELS_LINES, trainers.BpeTrainer(
            vocab_size=n_vocab, special_tokens=self.specials, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
        self.t, self.n_vocab = self.plain, n_vocab
        self.bos, self.end, self.ends, self.image_token = 1, 2, [0, 2], None
        vocab = self.t.get_vocab()
        self.quiet = [0, 1, 2] + [vocab[c] for c in pre_tokenizers.ByteLevel.alphabet() if ord(c) > 0x7E]


def convert_runs(model, vocab, images):        # -> {run: {...}}, smallest margin, texts
    with_image = isinstance(model, LlavaForConditionalGeneration)
    encode = vocab.sp.encode if isinstance(vocab, models_spm) else vocab.encode
    bos = [] if isinstance(vocab, convert_smollm) else [vocab.bos]
    runs = {"text": (bos + encode(CONVERT_QUESTION), [])}
    for name, pixels in images.items() if with_image else ():
        runs[name] = (bos + [MODELS_IMAGE] + encode("\n" + CONVERT_QUESTION), [pixels])
    out, least = {}, 1e9
    for name, (ids, pixels) in runs.items():
        tokens, logits, margin = models_greedy(model, ids, pixels, CONVERT_GREEDY)
        text, least = vocab.text(tokens) if max(tokens) < vocab.n_vocab else "\ufffd", min(least, margin)
        if any(t in vocab.ends for t in tokens) or len(set(tokens)) < 5 or "\ufffd" in text or text != text.strip():
            least = -1
        out[name] = {"text": text, "tokens": tokens, "logits": [float("%.9g" % x) for x in logits]}
    return out, least


def convert_search(which, vocab, clip, images):
    for seed in range(1, 2000):
        model = convert_build(which, vocab, seed, clip)
        runs, margin = convert_runs(model, vocab, images(model))
        if margin > MODELS_MARGIN:
            print("convert %s: seed %d, margin %.4f, %r" % (which, seed, margin, [run["text"] for run in runs.values()]))
            return model, runs
    raise SystemExit("no seed gives usable text")


def convert_json(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")


def convert_index(folder, form, shards):       # {file number: {name: tensor}} as sharded files with their index
    save = safetensors.torch.save_file if form == "safetensors" else lambda tensors, path, metadata: torch.save(tensors, path)
    stem, end = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    names = {}
    for i, tensors in enumerate(shards):
        file = "%s-%05d-of-%05d.%s" % (stem, i + 1, len(shards), end)
        save(tensors, os.path.join(folder, file), metadata={"format": "pt"})
        names.update({name: file for name in sorted(tensors)})
    total = sum(x.numel() * x.element_size() for tensors in shards for x in tensors.values())
    convert_json(os.path.join(folder, "%s.%s.index.json" % (stem, end)), {"metadata": {"total_size": total}, "weight_map": names})


def convert_old_names(name):                   # of today's modules -> of checkpoints before transformers 4.52
    if name.startswith("lm_head"): return "language_model." + name
    name = name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")
    return name.replace("language_model.", "language_model.model.")


def convert_liuhaotian_names(name):
    name = name.replace("model.language_model.", "model.").replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
    name = name.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")
    return name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")


def convert_preprocessor(size):                # preprocessor_config.json as transformers 4 wrote it
    return {"crop_size": {"height": size, "width": size}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True,
            "do_resize": True, "image_mean": MODELS_MEAN, "image_processor_type": "CLIPImageProcessor", "image_std": MODELS_STD, "resample": 3,
            "rescale_factor": 1 / 255, "size": {"shortest_edge": size}}


def convert_write_spm(folder, vocab):
    with open(os.path.join(folder, "tokenizer.model"), "wb") as f:
        f.write(vocab.sp.serialized_model_proto())
    convert_json(os.path.join(folder, "special_tokens_map.json"), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"})
    convert_json(os.path.join(folder, "tokenizer_config.json"), convert_spm_config({}))


CONVERT_SPM_JSON = "import sys, transformers; transformers.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"


def convert_spm_config(added):                 # tokenizer_config.json as transformers 4 wrote it
    token = lambda text: {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    names = {"0": "<unk>", "1": "<s>", "2": "</s>", **added}
    return {"add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": {i: {**token(t), "special": True} for i, t in names.items()},
            "bos_token": "<s>", "clean_up_tokenization_spaces": False, "eos_token": "</s>", "legacy": True, "model_max_length": 2048,
            "pad_token": None, "padding_side": "right", "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer", "unk_token": {"__type": "AddedToken", **token("<unk>")}}


def convert_write_llava_old(folder, model, vocab):
    os.makedirs(folder)
    n, t, v = vocab.n_vocab, model.config.text_config, model.config.vision_config
    state = {convert_old_names(name): p.detach().bfloat16().contiguous() for name, p in model.named_parameters()}
    text = {name: x for name, x in state.items() if name.startswith("language_model.")}
    first = {name: x for name, x in text.items() if "model.layers.1." not in name and "lm_head" not in name}
    convert_index(folder, "safetensors", [first, {name: x for name, x in state.items() if name not in first}])
    names = ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings", "rms_norm_eps", "vocab_size"]
    vision = ["hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size", "projection_dim"]
    convert_json(os.path.join(folder, "config.json"), {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": n, "model_type": "llava", "pad_token_id": n + 1,
        "projector_hidden_act": "gelu", "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
                                                        "model_type": "llama", **{k: getattr(t, k) for k in names}, "torch_dtype": "float16"},
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.36.0.dev0",
        "vision_config": {"model_type": "clip_vision_model", **{k: getattr(v, k) for k in vision}, "vocab_size": 32000},
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": t.vocab_size})
    convert_json(os.path.join(folder, "preprocessor_config.json"), convert_preprocessor(v.image_size))
    convert_json(os.path.join(folder, "added_tokens.json"), {"<image>": n, "<pad>": n + 1})
    convert_json(os.path.join(folder, "tokenizer_config.json"), convert_spm_config({str(n): "<image>", str(n + 1): "<pad>"}))
    convert_json(os.path.join(folder, "chat_template.json"), {"chat_template": vocab.template})


def convert_write_liuhaotian(folder, model, vocab):
    t, v = model.config.text_config, model.config.vision_config
    config = {"_name_or_path": "llava-v1.5-7b", "architectures": ["LlavaLlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
              "freeze_mm_mlp_adapter": False, "hidden_act": "silu", "hidden_size": t.hidden_size, "image_aspect_ratio": "pad",
              "intermediate_size": t.intermediate_size, "max_length": 4096, "max_position_embeddings": t.max_position_embeddings,
              "mm_hidden_size": v.hidden_size, "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None, "mm_use_im_patch_token": False,
              "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
              "mm_vision_tower": "openai/clip-vit-large-patch14-336", "model_type": "llava", "num_attention_heads": t.num_attention_heads,
              "num_hidden_layers": t.num_hidden_layers, "num_key_value_heads": t.num_key_value_heads, "pad_token_id": 0, "pretraining_tp": 1,
              "rms_norm_eps": t.rms_norm_eps, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
              "transformers_version": "4.31.0", "tune_mm_mlp_adapter": False, "unfreeze_mm_vision_tower": True, "use_cache": True, "use_mm_proj": True,
              "vocab_size": vocab.n_vocab}
    state = {convert_liuhaotian_names(name): p.detach().half() for name, p in model.named_parameters()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:vocab.n_vocab].clone()
    for i in range(t.num_hidden_layers):       # a buffer that versions of the time saved
        state["model.layers.%d.self_attn.rotary_emb.inv_freq" % i] = 1.0 / (10000.0 ** (torch.arange(0, 8, 2).float() / 8))
    tower = {name: x for name, x in state.items() if "vision_tower" in name}
    projector = {name: x for name, x in state.items() if "mm_projector" in name}
    last = {name: x for name, x in state.items() if name.startswith(("model.layers.1.", "lm_head"))}
    first = {name: x for name, x in state.items() if name not in {**tower, **last}}
    for name in ("liuhaotian", "projector", "llama2", "lora"):
        os.makedirs(os.path.join(folder, name))
    convert_index(os.path.join(folder, "liuhaotian"), "bin", [first, last, tower])
    convert_json(os.path.join(folder, "liuhaotian", "config.json"), config)
    torch.save(projector, os.path.join(folder, "projector", "mm_projector.bin"))
    convert_json(os.path.join(folder, "projector", "config.json"), {**config, "tune_mm_mlp_adapter": True, "unfreeze_mm_vision_tower": False})

    plain = {name: x for name, x in {**first, **last}.items() if "mm_projector" not in name}
    for i in range(t.num_hidden_layers):       # views: of one storage, and of one that lies transposed
        names = ["model.layers.%d.self_attn.%s_proj.weight" % (i, p) for p in "qkv"]
        joined = torch.cat([plain[name] for name in names])
        plain.update(zip(names, joined.split(t.hidden_size)))
        name = "model.layers.%d.mlp.down_proj.weight" % i
        plain[name] = plain[name].T.contiguous().T
    plain = collections.OrderedDict(plain)     # as state_dict() gives it
    plain._metadata = collections.OrderedDict({"": {"version": 1}, "model": {"version": 1}})
    torch.save(plain, os.path.join(folder, "llama2", "pytorch_model.bin"))
    convert_json(os.path.join(folder, "llama2", "config.json"), {
        **{k: x for k, x in config.items() if not k.startswith(("mm_", "image", "tune", "use_mm", "freeze", "unfreeze"))},
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "model_type": "llama"})

    base = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    safetensors.torch.save_file({base + "A.weight": torch.ones(2, 32), base + "B.weight": torch.ones(32, 2)},
                                os.path.join(folder, "lora", "adapter_model.safetensors"), metadata={"format": "pt"})
    convert_json(os.path.join(folder, "lora", "adapter_config.json"), {"base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "peft_type": "LORA", "r": 2,
                                                                      "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"})


def convert_write_fast(folder, vocab, **settings):
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=vocab.t, chat_template=vocab.template, **settings)
    fast.save_pretrained(folder)
    return fast


def convert_clip_rows(model, heads, pixels, ids):
    if not heads:
        model = types.SimpleNamespace(**{n: getattr(model, n) for n in ("vision_model", "text_model", "visual_projection", "text_projection")})
    with torch.no_grad():
        v = joint_rows(model, pixels, ids[0], None)[0]
        t = torch.cat([joint_rows(model, pixels, i, None)[1] for i in ids])
    return [[float("%.9g" % x) for x in row] for row in torch.cat([v, t]).tolist()]


def convert_run(program, *arguments):          # with packages that the goldens are made without
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, env={**os.environ, "PYTHONPATH": os.environ["OPEN_CLIP"]})


def convert_write_clips(folder, clip, tokens, merges, image):
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
    for name in ("clip", "clip_flax", "clip_transfer", "clip_open"):
        os.makedirs(os.path.join(folder, name))
    at = os.path.join(folder, "clip")
    bare = CLIPModel(clip.config)
    bare.load_state_dict({name: x for name, x in clip.state_dict().items() if "_head." not in name})
    bare.half().save_pretrained(at)
    with safetensors.safe_open(os.path.join(at, "model.safetensors"), "pt") as f:
        state = {name: f.get_tensor(name) for name in f.keys()}
    state["text_model.embeddings.position_ids"] = torch.arange(24)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    safetensors.torch.save_file(state, os.path.join(at, "model.safetensors"), metadata={"format": "pt"})
    convert_json(os.path.join(at, "vocab.json"), {t: i for i, t in enumerate(tokens)})
    with open(os.path.join(at, "merges.txt"), "w", encoding="utf-8") as f:
        f.write("#version: 0.2\n" + "".join("%s %s\n" % m for m in merges))
    convert_json(os.path.join(at, "tokenizer_config.json"), {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "model_max_length": 24,
                                                             "pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer", "unk_token": "<|endoftext|>"})
    convert_json(os.path.join(at, "preprocessor_config.json"), convert_preprocessor(28))
    v, t = clip.config.vision_config, clip.config.text_config
    convert_json(os.path.join(folder, "clip_open", "open_clip_config.json"), {
        "model_cfg": {"embed_dim": 20, "quick_gelu": True,
                      "vision_cfg": {"image_size": v.image_size, "layers": v.num_hidden_layers, "width": v.hidden_size, "patch_size": v.patch_size,
                                     "head_width": v.hidden_size // v.num_attention_heads, "mlp_ratio": v.intermediate_size / v.hidden_size},
                      "text_cfg": {"context_length": 24, "vocab_size": len(tokens), "width": t.hidden_size, "heads": t.num_attention_heads,
                                   "layers": t.num_hidden_layers, "mlp_ratio": t.intermediate_size / t.hidden_size}},
        "preprocess_cfg": {"mean": MODELS_MEAN, "std": MODELS_STD}})
    pixels, ids = joint_preprocess(image, v.image_size), [tokenizer(text, truncation=True, max_length=24)["input_ids"] for text in CONVERT_TEXTS]
    with tempfile.TemporaryDirectory() as work:
        weights, inputs, answer = (os.path.join(work, name) for name in ("weights.npz", "inputs.npz", "answer.npz"))
        np.savez(weights, **{name: p.detach().numpy() for name, p in clip.named_parameters()})
        np.savez(inputs, pixels=pixels.numpy(), ids=np.array([i + [0] * (24 - len(i)) for i in ids]))
        subprocess.run([os.environ["FLAX_PYTHON"], "-c", CONVERT_FLAX, folder, weights, answer], check=True)
        convert_run(CONVERT_OPEN_CLIP, folder, weights, inputs, answer)
        ids = [torch.tensor([i]) for i in ids]
        rows = convert_clip_rows(clip, False, pixels, ids)
        other = np.load(answer)
        assert np.abs(np.concatenate([other["image"], other["texts"]]) - np.array(rows)).max() < 1e-4
    return {"rows": rows, "rows_with_heads": convert_clip_rows(clip, True, pixels, ids), "texts": CONVERT_TEXTS,
            "logit_scale": float(clip.logit_scale.detach().exp())}, tokenizer


def make_convert(folder):
    torch.set_num_threads(1)
    out = os.path.join(folder, "convert")
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(os.path.join(out, "spm"))
    image = Image.open(os.path.join(folder, "models_1.png"))
    tokens, merges = joint_vocabulary(24)
    clip = convert_clip(tokens)
    spm, bpe, smol = models_spm(330), models_bpe(320), convert_smollm(320)
    size = lambda model: getattr(model.config, "vision_config", clip.config.vision_config).image_size
    images = lambda model: {"pad": models_preprocess(image, size(model)), "crop": joint_preprocess(image, size(model))}
    a, b, d, e = (convert_search(which, vocab, clip, images) for which, vocab in (("A", spm), ("B", bpe), ("D", bpe), ("E", smol)))
    expected = {"A": a[1], "B": b[1], "D": d[1], "E": e[1]}
    e[0].config.rope_parameters = {"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0}
    slow = transformers.LlamaForCausalLM(e[0].config).eval()    # E with stretched positions
    slow.load_state_dict(e[0].state_dict())
    expected["E"]["linear"] = convert_runs(slow, smol, {})[0]["text"]
    e[0].config.rope_parameters = {"rope_type": "default", "rope_theta": 100000.0}
    expected["C"], clip_tokenizer = convert_write_clips(out, clip, tokens, merges, image)
    convert_write_spm(os.path.join(out, "spm"), spm)
    convert_run(CONVERT_SPM_JSON, os.path.join(out, "spm"), os.path.join(out, "spm_json"))
    convert_write_llava_old(os.path.join(out, "llava_old"), a[0], spm)
    convert_write_liuhaotian(out, a[0], spm)

    bpe.t.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1", special_tokens=[("<|begin_of_text|>", bpe.bos)])
    llama3 = dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", clean_up_tokenization_spaces=False)
    fast = convert_write_fast(os.path.join(out, "llava_v5"), bpe, **llama3)
    crop = {"height": 28, "width": 28}
    transformers.LlavaProcessor(transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=crop), fast, patch_size=14,
                                vision_feature_select_strategy="default", chat_template=bpe.template,
                                num_additional_image_tokens=1).save_pretrained(os.path.join(out, "llava_v5"))
    b[0].half().save_pretrained(os.path.join(out, "llava_v5"))
    d[0].bfloat16().save_pretrained(os.path.join(out, "llama3"))
    smoll = os.path.join(out, "smollm")
    smol_fast = convert_write_fast(smoll, smol, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>", pad_token="<|im_end|>")
    e[0].bfloat16().save_pretrained(smoll)
    with open(os.path.join(smoll, "tokenizer.json"), encoding="utf-8") as f:
        state = json.load(f)
    state["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    convert_json(os.path.join(smoll, "tokenizer.json"), state)
    with open(os.path.join(smoll, "config.json"), encoding="utf-8") as f:
        config = json.load(f)
    config.update(rope_theta=config.pop("rope_parameters")["rope_theta"], rope_scaling=None, torch_dtype=config.pop("dtype"), transformers_version="4.42.3")
    convert_json(os.path.join(smoll, "config.json"), config)

    plain = [s for s in CONVERT_STRINGS if "<s>" not in s]     # what a user typed; with special tokens found and added: all
    expected["tokens"] = {
        "spm": {"plain": [[s, spm.sp.encode(s)] for s in CONVERT_STRINGS],
                "special": [[s, tokens_encode_spm(spm.sp, s.encode(), TOKENS_ADD | TOKENS_PARSE)] for s in CONVERT_STRINGS]},
        "llama3": {"plain": [[s, bpe.plain.encode(s).ids] for s in CONVERT_STRINGS], "special": [[s, fast(s)["input_ids"]] for s in CONVERT_STRINGS]},
        "smollm": {"plain": [[s, smol.t.encode(s).ids] for s in plain], "special": [[s, smol_fast(s)["input_ids"]] for s in CONVERT_STRINGS]},
        "clip": {"special": [[s, clip_tokenizer(s)["input_ids"]] for s in CONVERT_STRINGS]}}
    expected["question"] = CONVERT_QUESTION
    with open(os.path.join(out, "expected.json"), "w", encoding="utf-8") as f:
        json.dump(expected, f, ensure_ascii=False)
    sizes = {name: sum(os.path.getsize(os.path.join(out, name, f)) for f in os.listdir(os.path.join(out, name)))
             for name in sorted(os.listdir(out)) if os.path.isdir(os.path.join(out, name))}
    print("convert:", sizes, "sum", sum(sizes.values()) + os.path.getsize(os.path.join(out, "expected.json")))


# =====================================================================================================================
# Types
# The tensor types and the container, by the gguf package. Read by test.c's "numbers" and "gguf" tests.
#   types.gold       for each type: u32 type, u32 n_values, the blocks, float32 [n_values] (little-endian)
#   types_le.gguf    every metadata type, arrays of every element type, a tensor of every type (types.gold's blocks)
#   types_be.gguf    the same as a big-endian file, aligned to 64
# =====================================================================================================================

TYPES_VERSION = "0.19.0"     # of gguf
TYPES_ORDER = ["F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "BF16"]
# where the half-precision fields of a block lie, and the 32-bit ones (Q5's high bits: ggml copies them as one uint32_t)
TYPES_HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
                "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
TYPES_WORDS = {"Q5_0": [2], "Q5_1": [4]}
# 0, -0, smallest and largest subnormal, smallest normal, largest, -largest, 1, infinity, NaN
TYPES_SCALES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00, 0x7C00, 0x7E00]


def types_blocks(name, random):
    """Blocks [n][bytes]: random bits under random sane scales, then under each of TYPES_SCALES, then all 0s, all 1s."""
    kind = gguf.GGMLQuantizationType[name]
    size = gguf.GGML_QUANT_SIZES[kind][1]
    if name in ("F32", "F16", "BF16"):
        blocks = random.integers(0, 256, (256, size), dtype=np.uint8)
        special = [0, 1, 0x7F, 0x80, 0xFF]
        for i, high in enumerate(special):           # signed zeros, subnormals, infinities and NaNs among them
            for j, low in enumerate(special):
                blocks[5 * i + j, :] = low
                blocks[5 * i + j, -1] = high
        return blocks
    random_scales = (random.uniform(-0.1, 0.1, 4 * len(TYPES_HALVES[name]))).astype(np.float16).view(np.uint16)
    blocks = random.integers(0, 256, (6 + len(TYPES_SCALES), size), dtype=np.uint8)
    blocks[4 + len(TYPES_SCALES)] = 0
    blocks[5 + len(TYPES_SCALES)] = 255
    for row in range(len(blocks)):
        for k, at in enumerate(TYPES_HALVES[name]):
            if row < 4:
                scale = random_scales[row * len(TYPES_HALVES[name]) + k]
            elif row < 4 + len(TYPES_SCALES):        # a second scale takes another of the list
                scale = TYPES_SCALES[(row - 4 + 3 * k) % len(TYPES_SCALES)]
            else:
                scale = 0x2E66                       # 0.1
            blocks[row, at:at + 2] = np.frombuffer(struct.pack("<H", scale), np.uint8)
    return blocks


def types_swapped(name, blocks):
    """The blocks as a big-endian file has them: by gguf's own converter where it knows the type."""
    swapped = blocks.copy()
    kind = gguf.GGMLQuantizationType[name]
    if kind in byteswap_tensors:
        class Tensor:
            data = swapped.reshape(-1)
        for block in range(len(blocks)):
            byteswap_tensors[kind](Tensor, block * blocks.shape[1])
        return swapped
    if name in ("F32", "F16", "BF16"):
        return swapped[:, ::-1].copy()
    for at in TYPES_HALVES[name]:
        swapped[:, at:at + 2] = blocks[:, at:at + 2][:, ::-1]
    for at in TYPES_WORDS.get(name, []):
        swapped[:, at:at + 4] = blocks[:, at:at + 4][:, ::-1]
    return swapped


def types_metadata(writer):
    scalars = [("u8", 200), ("i8", -100), ("u16", 60000), ("i16", -30000), ("u32", 4000000000), ("i32", -2000000000),
               ("f32", 1.5), ("bool", True), ("u64", 2 ** 64 - 1), ("i64", -2 ** 63), ("f64", 1e300)]
    kinds = {"u8": "UINT8", "i8": "INT8", "u16": "UINT16", "i16": "INT16", "u32": "UINT32", "i32": "INT32",
             "f32": "FLOAT32", "bool": "BOOL", "u64": "UINT64", "i64": "INT64", "f64": "FLOAT64"}
    for name, value in scalars:
        writer.add_key_value("test." + name, value, gguf.GGUFValueType[kinds[name]])
    writer.add_string("test.string", "Crab Nebula \u2604 M1")
    for name, value in scalars:
        other = {"bool": False, "f32": -0.25, "f64": -1e-300}.get(name, 7)
        writer.add_key_value("test.array." + name, [value, other, value], gguf.GGUFValueType.ARRAY,
                             gguf.GGUFValueType[kinds[name]])
    writer.add_key_value("test.array.string", ["a", "", "\u2581the", "<0x0A>"], gguf.GGUFValueType.ARRAY,
                         gguf.GGUFValueType.STRING)


def types_write_gguf(path, all_blocks, big):
    order = gguf.GGUFEndian.BIG if big else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, "test", endianess=order)
    if big:
        writer.add_custom_alignment(64)
    types_metadata(writer)
    for i, name in enumerate(TYPES_ORDER):
        kind = gguf.GGMLQuantizationType[name]
        n_dims = i % 4 + 1                           # shapes [.], [4][.], [2][2][.], [2][1][2][.]
        blocks = all_blocks[name][:12 if kind.name in ("F32", "F16", "BF16") else 4]
        rows = {1: (), 2: (4,), 3: (2, 2), 4: (2, 1, 2)}[n_dims]
        if big:
            blocks = types_swapped(name, blocks)
        writer.add_tensor("tensor." + name, blocks.reshape(rows + (-1,)), raw_dtype=kind)   # bytes: written as they are
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_types(folder):
    random = np.random.default_rng(20261122)
    all_blocks = {name: types_blocks(name, random) for name in TYPES_ORDER}
    with open(f"{folder}/types.gold", "wb") as f:
        for name in TYPES_ORDER:
            kind, blocks = gguf.GGMLQuantizationType[name], all_blocks[name]
            with np.errstate(all="ignore"):
                if name in ("F32", "F16"):           # the package passes these through
                    values = blocks.view(np.float32 if name == "F32" else np.float16).astype(np.float32)
                else:
                    values = gguf.quants.dequantize(blocks, kind)
            f.write(struct.pack("<II", kind, values.size) + blocks.tobytes() + values.astype("<f4").tobytes())
    types_write_gguf(f"{folder}/types_le.gguf", all_blocks, False)
    types_write_gguf(f"{folder}/types_be.gguf", all_blocks, True)



# =====================================================================================================================
# Quants
# What the tensor types make of float32 values, by the gguf package; for the K types, which it does not write, how far from the
# values llama.cpp's blocks are. Read by test_convert.py.
#   quants.gold      u32 n_values, float32 [n_values]; for each type: u32 type, u32 n_bytes, the blocks (little-endian); for the K
#                    types n_bytes is 4, and what follows is a float32: the root mean square of the errors llama.cpp's
#                    quantiser makes (without an importance matrix) on quants_gaussian()
# With GGML_LIBRARY=libggml-base.so in the environment the latter are measured; otherwise they are those of the table below.
# =====================================================================================================================

QUANTS_ORDER = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
QUANTS_RMSE = {"Q2_K": 0.2956053, "Q3_K": 0.1497510, "Q4_K": 0.0712007, "Q5_K": 0.0361400, "Q6_K": 0.0177731}   # ggml 0.25.3's
QUANTS_N_GAUSSIAN = 64 * 256


def quants_gaussian():
    """Sums of 12 uniform numbers, less 6: nearly normal, of variance 1. test_convert.py computes the same."""
    state, values = 1, np.empty(QUANTS_N_GAUSSIAN, np.float32)
    for i in range(QUANTS_N_GAUSSIAN):
        total = 0
        for _ in range(12):
            state = (state * 1664525 + 1013904223) % 2 ** 32
            total += state >> 8
        values[i] = total / 2 ** 24 - 6
    return values


def quants_inputs(random):
    """float32 values in blocks of 32, none so large that a half cannot hold the scale, or so small that 1 / scale is infinite."""
    normal = lambda n: random.standard_normal((n, 32))
    parts = [normal(32), normal(8) * 1e-3, normal(4) * 1e4, random.uniform(-1, 1, (8, 32)), random.uniform(2, 3, (4, 32)),
             -random.uniform(2, 3, (4, 32)), random.standard_t(2, (8, 32)),
             normal(4) * 1e-6, normal(4) * 1e-8, normal(2) * 1e-36,         # scales that are subnormal halves, and 0
             normal(8) * (random.random((8, 32)) < 0.1) + 0.0]              # mostly zero; not -0: numpy's least of 0 and -0 is either
    ties = []                                                               # x / d is a half or near it, for each type's d
    for levels, last in ((127, 127), (8, -8), (16, -16), (15, 15), (31, 31)):
        x = random.integers(0 if levels % 2 and levels < 127 else -levels, levels, (3, 32)) + 0.5
        x[:, 7], x[:, 20] = last, 0
        ties.append(x * np.array([[1.0], [0.1], [3.0]]))
    constant = np.array([0.0, -0.0, 1.0, -1.0, 0.37, -5e-5, 65504.0, 1e-36])[:, None] * np.ones((1, 32))
    extremes = normal(4)
    extremes[:, 3], extremes[:, 30] = [4.0, -4.0, 4.0, -4.0], [-4.0, 4.0, 4.0, -4.0]   # which of two equals comes first
    tiny = normal(2) * 1e-40
    tiny[:, 5] = [1e-36, -1e-36]                                            # subnormal floats in a block that has a scale
    return np.concatenate(parts + ties + [constant, extremes, tiny]).astype(np.float32)


def quants_rmse(name, values):
    """Of llama.cpp's blocks, by its own quantiser and the gguf package's dequantiser."""
    import ctypes
    library, kind = ctypes.CDLL(os.environ["GGML_LIBRARY"]), gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.zeros(values.size // block * size, np.uint8)
    pointer = lambda array: array.ctypes.data_as(ctypes.c_void_p)
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    library.ggml_quantize_chunk(int(kind), pointer(values), pointer(blocks), 0, 1, values.size, None)
    return float(np.sqrt(np.mean((gguf.quants.dequantize(blocks, kind).astype(np.float64) - values) ** 2)))


def make_quants(folder):
    values = quants_inputs(np.random.default_rng(20261123))
    with open(f"{folder}/quants.gold", "wb") as f:
        f.write(struct.pack("<I", values.size) + values.astype("<f4").tobytes())
        for name in QUANTS_ORDER:
            kind = gguf.GGMLQuantizationType[name]
            with np.errstate(all="ignore"):
                blocks = gguf.quants.quantize(values, kind).tobytes()
            f.write(struct.pack("<II", kind, len(blocks)) + blocks)
        for name, rmse in QUANTS_RMSE.items():
            if "GGML_LIBRARY" in os.environ:
                rmse = round(quants_rmse(name, quants_gaussian()), 7)
                print("quants: %s %.7f (recorded: %.7f)" % (name, rmse, QUANTS_RMSE[name]))
            f.write(struct.pack("<IIf", gguf.GGMLQuantizationType[name], 4, rmse))


# ======================================================================================================================

def main():
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")
    parts = {"convert": make_convert, "images": make_images, "joint": make_joint, "models": make_models, "quants": make_quants,
             "tokens": make_tokens, "types": make_types}
    wanted = sys.argv[1:] or sorted(parts)
    missing = [name for name in ("FLAX_PYTHON", "OPEN_CLIP") if "convert" in wanted and not os.environ.get(name)]
    if missing:
        sys.exit("%s not set: the head of test/make_golden.py says what the part `convert` needs" % ", ".join(missing))
    with open(os.path.join(os.path.dirname(here), "requirements.txt")) as f:
        versions = [line.strip().split("==") for line in f if "==" in line]
    for name, version in versions:
        found = importlib.metadata.version(name).split("+")[0]
        print("%s %s%s" % (name, found, "" if found == version else "   (the files were made with %s)" % version))
    for name in wanted:
        parts[name](here)


if __name__ == "__main__":
    main()
