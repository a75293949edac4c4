// demo.c: the `astrovl` program. It captions images, answers questions about them, talks about them, and shows what
// happens inside the model while it does: tokens, tensors, every intermediate result. It scores images against texts, searches
// folders of them, turns abstracts into JSON and quantises models. It uses the public API of astrovl.h only.
//
//     cc -O2 -o astrovl demo.c -lm -pthread
//     ./astrovl --help
//
// From top to bottom: printing, options, running the model, one function per command, main.

#if defined(__linux__) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE 1        // readlink, also when compiled with -std=c99
#endif
#define _FILE_OFFSET_BITS 64     // index files above 2 GB, on 32-bit machines too

#define ASTROVL_IMPLEMENTATION
#include "astrovl.h"

#include <ctype.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(_WIN32)
#include <direct.h>
#include <io.h>
#include <share.h>
#define SLASHES               "/\\"
#define make_folder(path)     _mkdir(path)
#define is_terminal(fd)       _isatty(fd)
#define open_to_append(path)  _fsopen(path, "ab+", _SH_DENYWR)
#define lock_file(f)          0                            // _SH_DENYWR has done it
#define write_file(f, p, n)   _write(_fileno(f), p, (unsigned)(n))
#define cut_file(f, size)     _chsize_s(_fileno(f), (long long)(size))
#define sync_file(f)          _commit(_fileno(f))
#else
#include <dirent.h>
#include <fcntl.h>
#include <strings.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>
#define SLASHES               "/"
#define make_folder(path)     mkdir(path, 0777)
#define is_terminal(fd)       isatty(fd)
#define open_to_append(path)  fopen(path, "ab+")
#define lock_file(f)          flock(fileno(f), LOCK_EX | LOCK_NB)
#define write_file(f, p, n)   write(fileno(f), p, n)
#define cut_file(f, size)     ftruncate(fileno(f), (off_t)(size))
#define sync_file(f)          fsync(fileno(f))
#endif

#ifndef ASTROVL_DATA_DIR
#define ASTROVL_DATA_DIR "/usr/local/share/astrovl"   // where `make install` puts the shipped model; the Makefile says
#endif
#define SHIPPED_MODEL "astrovl-tiny.gguf"

enum { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_USAGE = 2 };
// ==== Printing =======================================================================================================
// Reads one character of UTF-8. Returns its bytes (at least 1; so must size be); *valid is 0 when they are none.
static size_t utf8_next(const char *text, size_t size, unsigned *code, int *valid) {
    static const unsigned smallest[5] = {0, 0, 0x80, 0x800, 0x10000};   // longer spellings than needed are not UTF-8
    const unsigned char *s = (const unsigned char *)text;
    size_t n = s[0] < 0x80 ? 1 : s[0] >= 0xF0 && s[0] < 0xF5 ? 4 : s[0] >= 0xE0 ? 3 : 2, i;
    *valid = s[0] < 0x80 || (s[0] >= 0xC2 && s[0] < 0xF5);
    *code = n == 1 ? s[0] : n == 2 ? s[0] & 0x1Fu : n == 3 ? s[0] & 0x0Fu : s[0] & 0x07u;
    for (i = 1; i < n && *valid; i++) {
        if (i >= size || (s[i] & 0xC0) != 0x80) *valid = 0;
        else *code = *code << 6 | (s[i] & 0x3Fu);
    }
    if (*valid && (*code < smallest[n] || (*code >= 0xD800 && *code < 0xE000) || *code > 0x10FFFF)) *valid = 0;
    return *valid ? n : 1;
}

static int is_control(unsigned code) { return code < 0x20 || (code >= 0x7F && code < 0xA0); }

// Text with nothing in it that drives a terminal. quoted: as a JSON string, control codes escaped; otherwise they are dropped,
// but for newline and tab.
static void print_string(FILE *out, const char *text, size_t size, int quoted) {
    unsigned code;
    int valid;
    size_t n;
    if (quoted) fputc('"', out);
    for (; size; text += n, size -= n) {
        n = utf8_next(text, size, &code, &valid);
        if (!valid) fputs("\xEF\xBF\xBD", out);         // U+FFFD, for bytes that are no UTF-8
        else if (quoted && (code == '"' || code == '\\')) fprintf(out, "\\%c", (char)code);
        else if (quoted && (code == '\n' || code == '\t')) fputs(code == '\n' ? "\\n" : "\\t", out);
        else if (quoted && is_control(code)) fprintf(out, "\\u%04x", code);
        else if (!is_control(code) || code == '\n' || code == '\t') fwrite(text, 1, n, out);
    }
    if (quoted) fputc('"', out);
}
static void print_safe(FILE *out, const char *text) { print_string(out, text, strlen(text), 0); }

// Text, with blanks up to a width (wide characters counted as one).
static void print_padded(const char *text, size_t size, int width) {
    unsigned code;
    int valid;
    size_t at;
    print_string(stdout, text, size, 0);
    for (at = 0; at < size; width--) at += utf8_next(text + at, size - at, &code, &valid);
    printf("%*s", width > 0 ? width : 0, "");
}

// 7340032 -> "7.3 MB"
static const char *human_bytes(uint64_t bytes) {
    static const char *const units[] = {"bytes", "kB", "MB", "GB", "TB"};
    static char texts[4][32];              // of the last four calls
    static int  n_calls;
    char *text = texts[n_calls++ % 4];
    double value = (double)bytes;
    int unit = 0;
    while (value >= 999.5 && unit < 4) value /= 1000, unit++;
    snprintf(text, 32, unit == 0 ? "%.0f %s" : "%.1f %s", value, units[unit]);
    return text;
}

// The shortest decimal that reads back as the same number. JSON has no infinities: null.
static void print_number(FILE *out, double value, int is_float32) {
    char text[40];
    int digits;
    if (!(value - value == 0)) { fputs("null", out); return; }
    for (digits = 6; digits <= 17; digits++) {
        double back;
        snprintf(text, sizeof text, "%.*g", digits, value);
        back = strtod(text, NULL);
        if (is_float32 ? (float)back == (float)value : !(back < value || back > value)) break;
    }
    fputs(strcmp(text, "-0") == 0 ? "-0.0" : text, out);      // JSON readers take -0 for an integer
}

// "577 x 1024", slowest dimension first
static const char *shape_text(const int64_t *shape, int n_dims, const char *between) {
    static char text[128];
    int i, at = 0;
    text[0] = 0;
    for (i = 0; i < n_dims && at < 100; i++)
        at += snprintf(text + at, 128 - (size_t)at, "%s%lld", i ? between : "", (long long)shape[i]);
    return text;
}

// JSON on standard output: brackets as they stand, "word:" a key, %k a key, %s a text, %S a text and its size, %d an int, %l a
// long long, %f a number in float32's digits, %b a flag, %- what the caller prints next. Commas and quotes are put in:
// put_json("{name:%s sizes:[%d %d]}\n", "x", 1, 2)      After ~ keys stand for reading: "name x, ..."
static void put_json(const char *f, ...) {
    static int comma;          // the next entry has one before it
    int plain = *f == '~';
    const char *text;
    size_t size;
    va_list args;
    va_start(args, f);
    for (f += plain; *f; f++) {
        if (*f == ' ') continue;
        if (comma && !strchr("}]\n", *f)) fputs(", ", stdout);
        comma = !strchr("{[\n", *f);
        if (strchr("{[}]\n", *f)) {
            putchar(*f);
        } else if (*f != '%') {
            size = strcspn(f, ":");
            print_string(stdout, f, size, !plain);
            f += size;
            fputs(plain ? " " : ": ", stdout);
            comma = 0;
        } else if (strchr("ksS", *++f)) {
            text = va_arg(args, const char *);
            size = *f == 'S' ? va_arg(args, size_t) : strlen(text);
            print_string(stdout, text, size, 1);
            if (*f == 'k') fputs(": ", stdout), comma = 0;
        } else if (*f == 'd') printf("%d", va_arg(args, int));
        else if (*f == 'l') printf("%lld", va_arg(args, long long));
        else if (*f == 'f') print_number(stdout, va_arg(args, double), 1);
        else if (*f == 'b') fputs(va_arg(args, int) ? "true" : "false", stdout);
    }
    va_end(args);
}

// ==== Options ========================================================================================================
// A table describes every option once: the parser, the checks and the help pages are made from it.

enum { CAPTION = 1, ASK = 2, CHAT = 4, TOKENS = 8, INSPECT = 16, TRACE = 32, VERSION = 64, SCORE = 128, DESCRIBE = 256,
       INDEX = 512, SEARCH = 1024, EMBED = 2048, EVALUATE = 4096, SUMMARIZE = 8192, BENCH = 16384, QUANTIZE = 32768,
       SPEAK = CAPTION | ASK | CHAT | SUMMARIZE, GENERATE = SPEAK | TRACE, ALL = 65535,
       FAST = ALL & ~(TOKENS | INSPECT | VERSION),           // those that compute
       MAX_TURNS = 64 };                                     // of caption --batch
typedef struct list { const char **items; int n, capacity; } list;
typedef struct options {
    list        models, stop, texts, words;              // words: the arguments that are no options
    int         threads, exact, ctx, together, json, quiet, help;
    int         ids, special, clip, decode, full, hash, best, batch, raw, boolean, rows, dims, check, rounds, n_prompt, n_tokens;
    astrovl_generation how;                              // the answers'
    const char *prompt, *out, *labels, *image, *svg, *schema, *regex, *query, *synthetic, *dir;
    int         chat_template, n_batch;
} options;
typedef enum option_kind { FLAG, INTEGER, SEED, NUMBER, TEXT, TEXTS, TEMPLATE } option_kind;
typedef struct option_spec {
    const char *name;
    char        letter;
    option_kind kind;
    size_t      field;                                   // where in `options`
    double      low, high;
    unsigned    commands;
    const char *value, *help;
} option_spec;

#define F(name) offsetof(options, name)
static const option_spec option_table[] = {
    {"model", 'm', TEXTS, F(models), 0, 0, ALL & ~(VERSION | QUANTIZE), "FILE", "a GGUF file; again for more parts (else: shipped)"},
    {"out", 'o', TEXT, F(out), 0, 0, TRACE, "DIR", "the folder that the .npy files go to (made if missing)"},
    {"out", 'o', TEXT, F(out), 0, 0, INDEX, "FILE", "the index; one that exists is continued"},
    {"out", 'o', TEXT, F(out), 0, 0, EMBED, "FILE", "write the rows to a .npy file instead of printing them as JSON"},
    {"text", 0, TEXTS, F(texts), 0, 0, SCORE | EMBED, "TEXT", "a text; may be given several times"},
    {"labels", 'l', TEXT, F(labels), 0, 0, DESCRIBE, "FILE", "texts to choose from, one a line; '#' begins a comment"},
    {"image", 'i', TEXT, F(image), 0, 0, SEARCH, "FILE", "search for what resembles this image instead of a text"},
    {"best", 'k', INTEGER, F(best), 1, 1000000000, DESCRIBE | SEARCH, "N", "print the N best (default: 5 of each group, 10 hits)"},
    {"batch", 'b', INTEGER, F(batch), 1, 256, INDEX | EMBED | EVALUATE, "N", "images in one pass (default 4)"},
    {"batch", 'b', INTEGER, F(n_batch), 0, MAX_TURNS, BENCH, "N", "answers written together, against one alone (default 8; 0: none)"},
    {"batch", 'b', INTEGER, F(batch), 1, MAX_TURNS, CAPTION, "N", "describe N images together: faster, printed N at a time (default 1)"},
    {"raw", 0, FLAG, F(raw), 0, 0, EMBED, NULL, "rows as the towers give them, not divided by their length"},
    {"svg", 0, TEXT, F(svg), 0, 0, EVALUATE, "FILE", "retrieval: plot accuracy and cosines into this file"},
    {"schema", 0, TEXT, F(schema), 0, 0, SUMMARIZE, "FILE", "the answer is JSON of this schema, not the paper's"},
    {"regex", 0, TEXT, F(regex), 0, 0, SUMMARIZE, "PATTERN", "the answer matches this regular expression"},
    {"bool", 0, FLAG, F(boolean), 0, 0, SUMMARIZE, NULL, "judge: the answer is true or false; see --query"},
    {"query", 0, TEXT, F(query), 0, 0, SUMMARIZE, "TEXT", "--bool: would they show this object or concept?"},
    {"prompt", 'p', TEXT, F(prompt), 0, 0, SUMMARIZE, "TEXT", "the instruction before the abstract (default: our own)"},
    {"synthetic", 0, TEXT, F(synthetic), 0, 0, BENCH, "NAME[:TYPE]", "random weights: llava-1.5-7b, smollm2-135m, nano (TYPE: q4_0)"},
    {"dir", 0, TEXT, F(dir), 0, 0, BENCH, "DIR", "where --synthetic keeps its files (default: $TMPDIR, or /tmp)"},
    {"prompt", 'p', INTEGER, F(n_prompt), 1, 1000000, BENCH, "N", "positions of the prompt (default 620)"},
    {"tokens", 'n', INTEGER, F(n_tokens), 1, 1000000, BENCH, "N", "tokens written after it (default 32); accuracy: of the text (512)"},
    {"rounds", 0, INTEGER, F(rounds), 1, 99, BENCH, "N", "medians are of N rounds (default 3; search 9)"},
    {"rows", 0, INTEGER, F(rows), 1, 100000000, BENCH, "N", "search: rows (default 1000000)"},
    {"dims", 0, INTEGER, F(dims), 1, 65536, BENCH, "N", "search: numbers in a row (default 512)"},
    {"hash", 0, FLAG, F(hash), 0, 0, TRACE, NULL, "write no files; print a hash of each tensor and one of all"},
    {"together", 0, FLAG, F(together), 0, 0, ASK, NULL, "ask once about all the images instead of once about each"},
    {"prompt", 'p', TEXT, F(prompt), 0, 0, CHAT, "TEXT", "say this, print the answer and leave"},
    {"ids", 0, FLAG, F(ids), 0, 0, TOKENS, NULL, "print the ids alone, on one line"},
    {"special", 0, FLAG, F(special), 0, 0, TOKENS, NULL, "add the tokens that begin (and end) a text; take \"<s>\" as the token"},
    {"clip", 0, FLAG, F(clip), 0, 0, TOKENS, NULL, "print the ids by the vocabulary of CLIP's text tower (with its --special)"},
    {"decode", 0, FLAG, F(decode), 0, 0, TOKENS, NULL, "the other way: the text is ids, print what they spell"},
    {"full", 0, FLAG, F(full), 0, 0, INSPECT, NULL, "print long arrays and strings whole"},
    {"check", 0, FLAG, F(check), 0, 0, INSPECT, NULL, "say whether the files together can be run, or what they lack"},
    {"max-tokens", 'n', INTEGER, F(how.max_tokens), 1, 1000000, GENERATE, "N", "at most N tokens (else 256; trace 1, summarize 512)"},
    {"temperature", 't', NUMBER, F(how.temperature), 0, 100, GENERATE, "X", "0: the likeliest token (default); 1: by the model's odds"},
    {"top-k", 0, INTEGER, F(how.top_k), 0, 1000000000, GENERATE, "N", "draw from the N likeliest tokens (default 0: all)"},
    {"top-p", 0, NUMBER, F(how.top_p), 0, 1, GENERATE, "X", "draw from the likeliest with probability X together (default 1: all)"},
    {"min-p", 0, NUMBER, F(how.min_p), 0, 1, GENERATE, "X", "drop tokens less likely than X times the likeliest (default 0)"},
    {"repetition-penalty", 0, NUMBER, F(how.repetition_penalty), 0, 100, GENERATE, "X", "above 1: avoid recent tokens (else 1 or 1.1)"},
    {"seed", 's', SEED, F(how.seed), 0, 0, GENERATE, "N", "the draws' seed: the same gives the same text (default 0)"},
    {"stop", 0, TEXTS, F(stop), 0, 0, GENERATE, "TEXT", "end the answer before this text; may be given several times"},
    {"system", 0, TEXT, F(how.system), 0, 0, GENERATE, "TEXT", "the system prompt (default: the template's own; \"\": none)"},
    {"template", 0, TEMPLATE, F(chat_template), 0, 0, GENERATE, "NAME", "the prompt's form (default: as the file says)"},
    {"ctx", 'c', INTEGER, F(ctx), 1, 16777216, GENERATE, "N", "tokens a conversation may hold (default: the model's, to 4096)"},
    {"threads", 'j', INTEGER, F(threads), 1, ASTROVL_MAX_THREADS, FAST, "N", "processors to use (default: all)"},
    {"exact", 0, FLAG, F(exact), 0, 0, FAST & ~(TRACE | BENCH | QUANTIZE), NULL, "arithmetic with the same bits on every machine; slower"},
    {"json", 0, FLAG, F(json), 0, 0, ALL & ~(TRACE | VERSION | EMBED), NULL, "print JSON, an object a line for each answer"},
    {"quiet", 'q', FLAG, F(quiet), 0, 0, FAST & ~BENCH, NULL, "no timings and no progress on standard error"},
    {"help", 'h', FLAG, F(help), 0, 0, ALL, NULL, "this page"},
};
enum { N_OPTIONS = (int)(sizeof option_table / sizeof *option_table), MANY = 2147483647 };
typedef struct program program;
typedef struct command {
    const char *name;
    unsigned    bit;
    int       (*run)(program *p);
    int         least, most;               // words
    const char *wanted;                    // said when there are more or fewer
    const char *usage, *summary, *about, *examples;
} command;

static int print_around(const char *before, const command *c, const char *after) {
    return fprintf(stderr, "%s%s%s%s", before, c ? " " : "", c ? c->name : "", after), EXIT_USAGE;
}
// Says what is wrong with the command line and where to read on. Its value is EXIT_USAGE. (Compilers check what printf gets.)
#define usage_error(c, ...) \
    (print_around("astrovl", c, ": "), fprintf(stderr, __VA_ARGS__), print_around("\nTry: astrovl", c, " --help\n"))

// Digits, and in a fraction at most one point; no signs, exponents, names or blanks. (The program never calls setlocale, so a point
// is a point whatever the user's language.)  x, whole: the number, twice
static int parse_number(const char *text, int is_fraction, const option_spec *spec, double *x, uint64_t *whole) {
    char *end;
    errno = 0;
    *x = strtod(text, &end);
    if (!*text || text[strspn(text, is_fraction ? "0123456789." : "0123456789")] || *end) return 0;
    *whole = is_fraction ? 0 : strtoull(text, NULL, 10);
    return errno == 0 && *x >= spec->low && (*x <= spec->high || spec->kind == SEED);
}

static void print_templates(FILE *out) {
    int t;
    for (t = ASTROVL_TEMPLATE_AUTO; t <= ASTROVL_TEMPLATE_PLAIN; t++)
        fprintf(out, "%s%s", t ? ", " : "", astrovl_template_name((astrovl_template)t));
}

// Stores one option's value; `text` is NULL for a flag.
static int set_option(const command *c, options *o, const option_spec *spec, const char *text) {
    void *field = (char *)o + spec->field;
    uint64_t whole;
    double x;
    switch (spec->kind) {
    case FLAG: *(int *)field = 1; return EXIT_OK;
    case TEXT: *(const char **)field = text; return EXIT_OK;
    case TEXTS: ((list *)field)->items[((list *)field)->n++] = text; return EXIT_OK;
    case TEMPLATE:
        if ((*(int *)field = astrovl_template_from_name(text)) >= 0) return EXIT_OK;
        usage_error(c, "no template is called \"%s\"", text);
        fputs("Templates: ", stderr), print_templates(stderr), fputc('\n', stderr);
        return EXIT_USAGE;
    default: break;
    }
    if (!parse_number(text, spec->kind == NUMBER, spec, &x, &whole))
        return spec->kind == SEED ? usage_error(c, "--%s wants a whole number below 2^64, not \"%s\"", spec->name, text) :
               usage_error(c, "--%s wants a %s from %.10g to %.10g, not \"%s\"", spec->name,
                           spec->kind == INTEGER ? "whole number" : "number", spec->low, spec->high, text);
    if (spec->kind == SEED) *(uint64_t *)field = whole;
    else if (spec->kind == INTEGER) *(int *)field = (int)whole;
    else *(float *)field = (float)x;
    return EXIT_OK;
}

// The option that an argument ("--seed", "--seed=7", "-s", "-s7") names for this command, or NULL. *value: "7" or NULL
static const option_spec *find_option(const command *c, const char *argument, const char **value) {
    const int is_long = argument[1] == '-';
    const char *name = argument + 1 + is_long;
    size_t length = is_long ? strcspn(name, "=") : 1;
    int i;
    *value = name[length] ? name + length + is_long : NULL;
    for (i = 0; i < N_OPTIONS; i++) {
        const option_spec *spec = &option_table[i];
        if (!(spec->commands & c->bit)) continue;
        if (is_long ? strlen(spec->name) == length && memcmp(spec->name, name, length) == 0 : spec->letter == *name) return spec;
    }
    return NULL;
}

// Sorts the arguments behind the command's name into options and words. "--" ends the options, "-" is a word.
static int parse_options(const command *c, options *o, int argc, char **argv) {
    int i, only_words = 0, status = EXIT_OK;
    for (i = 0; i < argc && status == EXIT_OK; i++) {
        const option_spec *spec;
        const char *value;
        if (only_words || argv[i][0] != '-' || !argv[i][1]) { o->words.items[o->words.n++] = argv[i]; continue; }
        if ((only_words = strcmp(argv[i], "--") == 0) != 0) continue;
        spec = find_option(c, argv[i], &value);
        if (!spec) return usage_error(c, "there is no option %s", argv[i]);
        if (spec->kind == FLAG && value) return usage_error(c, "--%s takes no value", spec->name);
        if (spec->kind != FLAG && !value && !(value = argv[++i]))        // behind the last argument stands NULL
            return usage_error(c, "--%s wants a value: --%s %s", spec->name, spec->name, spec->value);
        status = set_option(c, o, spec, value);
    }
    return status;
}

static void print_command_help(const command *c) {
    int i;
    printf("Usage: astrovl %s\n\n%s\n\nOptions:\n", c->usage, c->about);
    for (i = 0; i < N_OPTIONS; i++) {
        const option_spec *spec = &option_table[i];
        char left[64];
        if (!(spec->commands & c->bit)) continue;
        snprintf(left, sizeof left, spec->letter ? "-%c, --%s %s" : "%-3c --%s %s", spec->letter ? spec->letter : ' ', spec->name,
                 spec->value ? spec->value : "");
        printf("  %-27s %s\n", left, spec->help);
        if (spec->kind == TEMPLATE) printf("%30s", ""), print_templates(stdout), putchar('\n');
    }
    printf("\nExamples:\n%s", c->examples);
}

// ==== Running the model ==============================================================================================
struct program {
    const command     *cmd;                // the command that runs
    options            o;
    astrovl_model     *model;
    astrovl_session   *session, *more[MAX_TURNS];   // more[1] on: those that go on beside the first
    astrovl_info       info;               // of the model
    astrovl_error      err;                // the last one
    char               shipped[4096];      // the shipped model's path
    int                safe_output;        // standard output is a terminal: strip control codes
    int                show_progress;      // standard error is one, and nobody asked for quiet
    int                bar_drawn;
    int                counting;           // the bar shows images done of all, not the layers of each; answers are not printed
    int                stop;               // output cannot be written: end the work
    time_t             started;            // the turn in progress
    union block       *memory;             // what new_memory gave
};

// Set by Ctrl-C while an answer is computed. (The one global: a signal handler has no other way to say something.)
static volatile sig_atomic_t g_interrupted;

static void on_interrupt(int signal_number) { g_interrupted = signal_number != 0; }

// From here on Ctrl-C ends the work (on: 1) or the program (0); or neither, if it was started so (in the background of a script).
static void catch_interrupts(int on) {
    if (signal(SIGINT, on ? on_interrupt : SIG_DFL) == SIG_IGN) signal(SIGINT, SIG_IGN);
}

static int end_failure(int printed) { return (void)printed, fputc('\n', stderr), EXIT_FAILED; }
// Says what went wrong, as printf, with a literal for its format. Its value is EXIT_FAILED.
#define fail(...) end_failure(fprintf(stderr, "astrovl: " __VA_ARGS__))

static void clear_bar(program *p) {
    if (p->bar_drawn) fputs("\r\033[K", stderr);
    p->bar_drawn = 0;
}

// The same of what the header says in p->err.
static int failed(program *p) { return clear_bar(p), fail("%s", p->err.message); }

// Writes out what is buffered. When that fails, says so (but not of a reader that left: `astrovl ... | head`) and stops.
static void flush_output(program *p) {
    if ((fflush(stdout) == 0 && !ferror(stdout)) || p->stop) return;
    if (errno != EPIPE) fprintf(stderr, "astrovl: standard output cannot be written: %s\n", strerror(errno));
    p->stop = 1;
}

typedef union block {                      // what stands before each piece of memory; a union for its alignment
    union block *next;
    double       number;
    uint64_t     integer;
} block;

// Memory of zeros that stays until the program ends. There is always some: the program ends if there is none.
static void *new_memory(program *p, size_t n, size_t size) {
    block *b = n < SIZE_MAX / 2 / (size + 1) ? (block *)calloc(1, sizeof *b + n * size) : NULL;
    if (!b) exit(fail("out of memory"));
    b->next = p->memory;
    p->memory = b;
    return b + 1;
}

// The shipped model lies beside the program in the source tree, or in the data folder once installed.
static void find_shipped_model(program *p, const char *argv0) {
    static const char *const places[] = {"test", "../share/astrovl", ASTROVL_DATA_DIR};
    char folder[2048];
    size_t n = 0;
    int i;
    FILE *f = NULL;
#if defined(__linux__)
    long size = (long)readlink("/proc/self/exe", folder, sizeof folder - 1);     // follows links and $PATH
    n = size < 0 ? 0 : (size_t)size;
#endif
    if (!n) n = (size_t)snprintf(folder, sizeof folder, "%s", argv0 ? argv0 : "");
    while (n && (n >= sizeof folder || !strchr(SLASHES, folder[n - 1]))) n--;
    for (i = 0; i < 3 && !f; i++) {
        snprintf(p->shipped, sizeof p->shipped, "%.*s%s/%s", i < 2 ? (int)n : 0, folder, places[i], SHIPPED_MODEL);
        f = i == 1 && !n ? NULL : fopen(p->shipped, "rb");
    }
    if (f) fclose(f);
    else p->shipped[0] = 0;
}

// Opens the files of -m, or the shipped model. (Like other functions below it ends the program where nothing can go on.)
static void open_model(program *p) {
    astrovl_open_options how = {0, (astrovl_template)p->o.chat_template};
    if (p->o.models.n == 0 && !p->shipped[0])
        exit(fail("the shipped model %s is neither beside the program nor in %s; name one with -m", SHIPPED_MODEL, ASTROVL_DATA_DIR));
    if (p->o.models.n == 0) p->o.models.items[p->o.models.n++] = p->shipped;
    p->model = astrovl_open_files(p->o.models.items, p->o.models.n, &how, &p->err);
    if (!p->model) exit(failed(p));
    astrovl_get_info(p->model, &p->info);
}

// Draws "image [########------------] 9/23" once the work has taken more than a second. per_second 0: do not say
static void draw_bar(program *p, const char *stage, int done, int total, double per_second) {
    int i, filled = total > 0 ? (int)((int64_t)done * 30 / total) : 0;
    if (!p->show_progress || time(NULL) - p->started < 2) return;
    fprintf(stderr, "\r%-6s [", stage);
    for (i = 0; i < 30; i++) fputc(i < filled ? '#' : '-', stderr);
    fprintf(stderr, "] %d/%d", done, total);
    if (per_second > 0) fprintf(stderr, ", %.1f/s", per_second);
    fputs("\033[K", stderr);
    fflush(stderr);
    p->bar_drawn = 1;
}

static int on_progress(void *user, const char *stage, int done, int total) {
    program *p = (program *)user;
    if (!p->counting || strcmp(stage, "rounds") == 0) draw_bar(p, stage, done, total, 0);
    return g_interrupted || p->stop;
}

static void print_text(const program *p, const char *text, size_t size) {
    if (p->safe_output) print_string(stdout, text, size, 0);
    else fwrite(text, 1, size, stdout);
}

// Gets the answer piece by piece.
static int on_text(void *user, const char *text, size_t size) {
    program *p = (program *)user;
    if (p->counting || p->o.json || p->o.hash) return g_interrupted != 0;
    clear_bar(p);
    print_text(p, text, size);
    flush_output(p);
    return g_interrupted || p->stop;
}

// tap: may be NULL
static astrovl_session *new_session(program *p, astrovl_mode mode, astrovl_tap tap, void *tap_user) {
    astrovl_session_options how = {mode, p->o.threads, p->o.ctx, tap, tap_user, on_progress, p, getenv("ASTROVL_ISA")};
    astrovl_session *session = astrovl_session_new(p->model, &how, &p->err);
    if (!session) exit(failed(p));
    return session;
}

static void open_model_and_session(program *p) {
    open_model(p);
    p->session = new_session(p, p->o.exact ? ASTROVL_EXACT : ASTROVL_FAST, NULL, NULL);
}

// Loads an image the right way up.
static astrovl_status load_image(const char *path, astrovl_image *image, astrovl_error *err) {
    astrovl_status status;
    memset(image, 0, sizeof *image);
    status = astrovl_image_load(path, 0, image, err);
    if (status == ASTROVL_OK) status = astrovl_image_upright(image, err);
    if (status != ASTROVL_OK) astrovl_image_free(image);   // which leaves zeros
    return status;
}

// Turns of several conversations. Ctrl-C ends them and not the program.
static void say_together(program *p, astrovl_turn *turns, int n) {
    catch_interrupts(1);
    g_interrupted = 0;
    if (!p->counting) p->started = time(NULL);
    astrovl_chat_batch(turns, n, NULL);               // each turn has its own error
    if (!p->counting) clear_bar(p);
    catch_interrupts(0);
}

static char *say(program *p, const astrovl_image *images, int n_images, const char *text) {
    astrovl_turn turn = {p->session, images, n_images, text, &p->o.how, NULL, {ASTROVL_OK, ""}};
    say_together(p, &turn, 1);
    p->err = turn.err;
    return turn.answer;
}

static void print_label(FILE *out, const char *label) { if (label) print_safe(out, label), fputs(": ", out); }

static void print_timings(const astrovl_stats *t, const char *label) {
    print_label(stderr, label);
    if (t->encode_seconds > 0) fprintf(stderr, "image %.2f s, ", t->encode_seconds);
    fprintf(stderr, "prompt %d tokens %.2f s, answer %d tokens %.2f s", t->n_prompt_tokens, t->prompt_seconds,
            t->n_answer_tokens, t->decode_seconds);
    if (t->decode_seconds > 0) fprintf(stderr, " (%.1f tokens/s)", t->n_answer_tokens / t->decode_seconds);
    fprintf(stderr, "%s\n", t->stopped_by_limit ? ", cut short by the token limit" : "");
}

// Prints one answer's end: the JSON object, or the newline and the timings. file, label: may be NULL
static void finish_answer(program *p, const astrovl_session *s, const char *file, const char *label, const char *prompt,
                          const char *answer) {
    astrovl_stats t;
    int i, n = 0;
    const int32_t *ids = astrovl_answer_tokens(s, &n);
    astrovl_get_stats(s, &t);
    if (p->o.json) {
        put_json("{");
        if (file) put_json("file:%s", file);
        put_json("prompt:%s text:%s tokens:{prompt:%d answer:%d ids:[", prompt, answer, t.n_prompt_tokens, t.n_answer_tokens);
        for (i = 0; i < n; i++) put_json("%d", (int)ids[i]);
        put_json("]} complete:%b seconds:{image:%f prompt:%f answer:%f}}\n", !t.stopped_by_limit, t.encode_seconds,
                 t.prompt_seconds, t.decode_seconds);
    } else putchar('\n');
    flush_output(p);
    if (!p->o.json && !p->o.quiet) print_timings(&t, label);
}

static void print_error_json(const char *file, const astrovl_error *err) {
    put_json("{file:%s error:%s status:%s}\n", file, err->message, astrovl_status_name(err->status));
}

// Reads a line of any length without its end. NULL at the end of the stream.
static char *read_line(program *p, FILE *in) {
    size_t size = 0, capacity = 256;
    char *line = (char *)new_memory(p, capacity + 1, 1);
    int c;
    for (; (c = fgetc(in)) != EOF && c != '\n'; line[size++] = (char)c)
        if (size == capacity) line = (char *)memcpy(new_memory(p, (capacity *= 2) + 1, 1), line, size);
    if (size && line[size - 1] == '\r') line[size - 1] = 0;
    return size || c != EOF ? line : NULL;
}

// ==== Texts, lists and numbers in files ==============================================================================
static void list_add(program *p, list *l, const char *text, size_t size) {
    if (l->n == l->capacity) {
        const char **more = (const char **)new_memory(p, (size_t)l->n * 2 + 64, sizeof *more);
        if (l->n) memcpy((void *)more, (const void *)l->items, (size_t)l->n * sizeof *more);
        l->items = more;
        l->capacity = l->n * 2 + 64;
    }
    l->items[l->n++] = (const char *)memcpy(new_memory(p, size + 1, 1), text, size);
}

static int cannot_open(const char *path) { return fail("%s: cannot be opened: %s", path, strerror(errno)); }
static int write_error(const char *path) { return fail("%s: cannot be written: %s", path, strerror(errno)); }

// Reads a whole file, or standard input for "-".
static char *read_text(program *p, const char *path, size_t *size) {
    const size_t limit = (size_t)256 << 20;                // more is a mistake: nobody writes so much by hand
    FILE *in = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    size_t capacity = 65536;
    char *text = (char *)new_memory(p, capacity + 1, 1);   // zeros: one ends the text
    if (!in) exit(cannot_open(path));
    for (*size = 0; (*size += fread(text + *size, 1, capacity - *size, in)) == capacity && *size <= limit; capacity *= 2)
        text = (char *)memcpy(new_memory(p, capacity * 2 + 1, 1), text, capacity);
    if (ferror(in)) exit(fail("%s: cannot be read: %s", path, strerror(errno)));
    if (*size > limit) exit(fail("%s: is larger than 256 MiB; cut it into parts", path));
    if (in != stdin) fclose(in);
    return text;
}

// A text seen as lines, without their ends (LF or CRLF).
typedef struct lines {
    const char *path;
    char       *at, *end, *line;           // line: the current one, [size], with a zero behind it
    size_t      size;
    int         number;                    // from 1
} lines;

static lines lines_of(const char *path, char *text, size_t size) {
    lines l = {path, text, text + size, text, 0, 0};
    if (size >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0) l.at += 3;      // the mark that some editors begin a file with
    return l;
}

static int next_line(lines *l) {
    char *end = l->at < l->end ? (char *)memchr(l->at, '\n', (size_t)(l->end - l->at)) : NULL;
    if (l->at >= l->end) return 0;
    if (!end) end = l->end;
    l->line = l->at;
    l->at = end + 1;
    if (end > l->line && end[-1] == '\r') end--;
    *end = 0;
    l->size = (size_t)(end - l->line);
    l->number++;
    return 1;
}

static void line_error(const lines *l, const char *what) { exit(fail("%s:%d: %s", l->path, l->number, what)); }

// "folder/name"; size: of the folder's name
static char *join_path(program *p, const char *folder, size_t size, const char *name) {
    char *path = (char *)new_memory(p, size + strlen(name) + 2, 1);
    memcpy(path, folder, size);
    strcpy(path + size + (size && path[size - 1] != '/' ? (path[size] = '/', 1) : 0), name);
    return path;
}

// Numbers as n little-endian bytes, whatever the machine's order.
static void put_le(unsigned char *bytes, uint64_t value, int n) {
    for (; n > 0; n--, value >>= 8) *bytes++ = (unsigned char)value;
}

static uint64_t get_le(const unsigned char *bytes, int n) {
    uint64_t value = 0;
    while (n > 0) value = value << 8 | bytes[--n];
    return value;
}

// FNV-1a, 64 bits (Fowler, Noll, Vo): h = (h xor byte) * prime. Start with FNV_START.
#define FNV_START 14695981039346656037ULL
static uint64_t fnv1a64(uint64_t h, const void *data, size_t size) {
    const unsigned char *bytes = (const unsigned char *)data;
    size_t i;
    for (i = 0; i < size; i++) h = (h ^ bytes[i]) * 1099511628211ULL;
    return h;
}

// Hashes the values' bytes and, with a file, writes them.
static uint64_t put_values(FILE *f, const float *values, uint64_t n) {
    uint64_t hash = FNV_START;
    unsigned char bytes[4];
    uint32_t bits;
    for (; n > 0; n--, values++) {
        memcpy(&bits, values, 4);
        put_le(bytes, bits, 4);
        hash = fnv1a64(hash, bytes, 4);
        if (f) fwrite(bytes, 4, 1, f);
    }
    return hash;
}

static uint64_t count_values(const int64_t *shape, int n_dims) {
    uint64_t n = 1;
    while (n_dims > 0) n *= (uint64_t)shape[--n_dims];
    return n;
}

// Writes a file of numpy's format, version 1.0: magic, version, length, a Python dictionary padded to 64 bytes, the values.
// Source: numpy.lib.format's documentation (NEP 1). Returns the values' hash.
static uint64_t save_npy(const char *path, const int64_t *shape, int n_dims, const float *values) {
    char text[256];
    int used = snprintf(text, sizeof text, "{'descr': '<f4', 'fortran_order': False, 'shape': (%s%s), }",
                        shape_text(shape, n_dims, ", "), n_dims == 1 ? "," : "");
    int size = (10 + used + 1 + 63) / 64 * 64 - 10;
    FILE *f = fopen(path, "wb");
    uint64_t hash;
    if (!f) exit(write_error(path));
    fprintf(f, "\x93NUMPY%c%c%c%c%-*s\n", 1, 0, size & 0xFF, size >> 8, size - 1, text);
    hash = put_values(f, values, count_values(shape, n_dims));
    if (ferror(f) || fclose(f) != 0) exit(write_error(path));
    return hash;
}

// ==== caption, ask ===================================================================================================
// Prints what a turn about `each` images has given, or why there is nothing. label: what it is about, or NULL
static int finish_turn(program *p, astrovl_turn *t, const char *const *paths, int each, const char *label) {
    int loaded = t->n_images == each;
    if (loaded && p->counting) print_label(stdout, label);
    if (t->answer) {
        if (p->counting && !p->o.json) print_text(p, t->answer, strlen(t->answer));
        finish_answer(p, t->session, p->o.together ? NULL : paths[0], label, t->text, t->answer);
        astrovl_free(t->answer);
        return g_interrupted ? EXIT_FAILED : EXIT_OK;
    }
    if (loaded && label) putchar('\n');
    if (p->o.json) print_error_json(paths[loaded ? 0 : t->n_images], &t->err);
    flush_output(p);
    p->err = t->err;
    return failed(p);
}

// Asks about images in n fresh conversations, about `each` of them in a turn; the turns are taken together.
static int answer_images(program *p, const char *const *paths, int n, int each, int with_labels, const char *prompt) {
    astrovl_image *images = (astrovl_image *)new_memory(p, (size_t)n * (size_t)each, sizeof *images);
    astrovl_turn turns[MAX_TURNS], *of[MAX_TURNS];         // of[i] is about paths[i * each]; turns that lack an image stand last
    int i, k, good = 0, status = EXIT_OK;
    for (i = 0; i < n; i++) {
        astrovl_turn t = {i ? p->more[i] : p->session, images + i * each, 0, prompt, &p->o.how, NULL, {ASTROVL_OK, ""}};
        astrovl_session_reset(t.session);
        for (k = i * each; t.n_images < each && load_image(paths[k], &images[k], &t.err) == ASTROVL_OK; k++) t.n_images++;
        of[i] = t.n_images == each ? &turns[good++] : &turns[n - 1 - (i - good)];
        *of[i] = t;
    }
    if (good && !p->counting) print_label(stdout, with_labels ? paths[0] : NULL);
    if (good) say_together(p, turns, good);
    clear_bar(p);
    for (i = 0; i < n; i++) status |= finish_turn(p, of[i], paths + i * each, each, with_labels ? paths[i] : NULL);
    for (i = 0; i < n * each; i++) astrovl_image_free(&images[i]);
    return status;
}

// Goes on after an image that fails, and remembers it.
static int answer_each(program *p, int n_images, const char *prompt) {
    const char **paths = p->o.words.items;
    int i, batch = p->o.batch ? p->o.batch : 1, status = EXIT_OK;
    open_model_and_session(p);
    if (p->o.together) return answer_images(p, paths, 1, n_images, 0, prompt);
    p->counting = batch > 1;               // answers are printed when all of their batch are there
    p->started = time(NULL);
    for (i = 1; i < batch && i < n_images; i++)
        if (!(p->more[i] = astrovl_session_fork(p->session, p->o.ctx, &p->err))) exit(failed(p));
    for (i = 0; i < n_images && !p->stop && !g_interrupted; i += batch) {
        if (p->counting) draw_bar(p, "images", i, n_images, 0);
        status |= answer_images(p, paths + i, n_images - i < batch ? n_images - i : batch, 1, n_images > 1 && !p->o.json, prompt);
    }
    return status;
}

static int run_caption(program *p) { return answer_each(p, p->o.words.n, ASTROVL_CAPTION_PROMPT); }
static int run_ask(program *p) { return answer_each(p, p->o.words.n - 1, p->o.words.items[p->o.words.n - 1]); }

// ==== chat ===========================================================================================================
typedef struct chat_state {
    astrovl_image image;
    int           pending;                 // the next question carries the image
    int           interactive;             // a person types: show a prompt
    int           n_failed;
} chat_state;

static const char chat_help[] = "  /image FILE  look at another image (shown with the next question); /image alone: none\n"
    "  /reset       forget the conversation; the image is shown again with the next question\n  /help        this list\n"
    "  /quit        leave (so does the end of input); Ctrl-C stops an answer\n";

static void chat_image(program *p, chat_state *c, const char *path) {
    astrovl_image image;
    memset(&image, 0, sizeof image);
    if (*path && load_image(path, &image, &p->err) != ASTROVL_OK) { c->n_failed += failed(p); return; }
    astrovl_image_free(&c->image);
    c->image = image;
    c->pending = *path != 0;
    if (c->interactive && *path) fprintf(stderr, "(%d x %d pixels)\n", image.width, image.height);
}

static void chat_turn(program *p, chat_state *c, const char *text) {
    char *answer = say(p, &c->image, c->pending ? 1 : 0, text);
    int stopped = answer ? g_interrupted : p->err.status == ASTROVL_CANCELLED && c->interactive;
    if (answer) c->pending = 0, finish_answer(p, p->session, NULL, NULL, text, answer);
    if (stopped && c->interactive) fprintf(stderr, "(stopped)\n");
    if (!answer && !stopped) {
        c->n_failed++;
        failed(p);
        if (p->err.status == ASTROVL_ERROR_LIMIT) fail("/reset begins a new conversation");
    }
    astrovl_free(answer);
}

// A line that begins with a slash. Returns 0 to leave.
static int chat_command(program *p, chat_state *c, const char *line) {
    if (strcmp(line, "/quit") == 0 || strcmp(line, "/exit") == 0) return 0;
    if (strcmp(line, "/reset") == 0) {
        astrovl_session_reset(p->session);
        c->pending = c->image.rgb != NULL;
    } else if (strncmp(line, "/image", 6) == 0 && (!line[6] || line[6] == ' ')) {
        chat_image(p, c, line + 6 + strspn(line + 6, " "));
    } else {
        int known = strcmp(line, "/help") == 0;
        if (!known) fprintf(stderr, "astrovl: there is no command %s; there are:\n", line), c->n_failed++;
        fputs(chat_help, stderr);
    }
    return 1;
}

static void chat_loop(program *p, chat_state *c) {
    char *line;
    int go_on = 1;
    if (c->interactive) fprintf(stderr, "Ask something, or:\n%s", chat_help);
    while (go_on && !p->stop) {
        if (c->interactive) fputs("> ", stderr), fflush(stderr);
        line = read_line(p, stdin);
        if (!line && c->interactive) fputc('\n', stderr);
        if (!line) break;
        if (line[0] == '/') go_on = chat_command(p, c, line);
        else if (line[strspn(line, " \t")]) chat_turn(p, c, line);
    }
}

static int run_chat(program *p) {
    chat_state c;
    memset(&c, 0, sizeof c);
    open_model_and_session(p);
    if (p->o.words.n == 1) chat_image(p, &c, p->o.words.items[0]);
    if (c.n_failed) return EXIT_FAILED;              // the image is none: do not talk about nothing
    c.interactive = !p->o.prompt && is_terminal(0);
    if (p->o.prompt) chat_turn(p, &c, p->o.prompt);
    else chat_loop(p, &c);
    astrovl_image_free(&c.image);
    return c.n_failed && !c.interactive ? EXIT_FAILED : EXIT_OK;
}

// ==== tokens =========================================================================================================
// Returns the tokens of a text, *n of them.
static int32_t *encode_text(program *p, const char *text, size_t size, int flags, int *n) {
    int32_t *tokens;
    int room = 0;
    do {
        tokens = (int32_t *)new_memory(p, (size_t)room, sizeof *tokens);
        *n = p->o.clip ? astrovl_clip_tokenize(p->model, text, size, tokens, room, &p->err) :
                         astrovl_tokenize(p->model, text, size, flags, tokens, room, &p->err);
        if (*n < 0) exit(failed(p));
    } while (*n > room && (room = *n));
    return tokens;
}

static int print_tokens(program *p, const char *word, size_t word_size) {
    int i, n, size;
    int32_t *tokens = encode_text(p, word, word_size, p->o.special ? ASTROVL_ADD_SPECIAL | ASTROVL_PARSE_SPECIAL : 0, &n);
    if (p->o.ids || p->o.clip) {   // the pieces are those of the language model's vocabulary
        for (i = 0; i < n; i++) printf("%s%ld", i ? " " : "", (long)tokens[i]);
        putchar('\n');
        return EXIT_OK;
    }
    if (p->o.json) put_json("{tokens:[");
    for (i = 0; i < n; i++) {
        astrovl_string piece = astrovl_token_piece(p->model, tokens[i]);
        char *text = (char *)new_memory(p, (size_t)(size = astrovl_token_text(p->model, tokens[i], NULL, 0)) + 1, 1);
        astrovl_token_text(p->model, tokens[i], text, size);
        if (p->o.json) put_json("{id:%d piece:%S text:%S}", (int)tokens[i], piece.data, piece.size, text, (size_t)size);
        else {
            printf("%8ld  ", (long)tokens[i]);
            print_padded(piece.data, piece.size, 16);
            print_string(stdout, text, (size_t)size, 1);
            putchar('\n');
        }
    }
    if (p->o.json) put_json("]}\n");
    return EXIT_OK;
}

// Prints what ids, separated by blanks or commas, spell.
static int decode_ids(program *p, const char *text, size_t size) {
    static const char separators[] = " ,\t\r\n";
    int32_t *ids = (int32_t *)new_memory(p, size / 2 + 1, sizeof *ids);
    int n = 0;
    char *end, *decoded;
    for (text += strspn(text, separators); *text; text = end + strspn(end, separators)) {
        unsigned long long value = strtoull(text, &end, 10);
        if (!isdigit((unsigned char)*text) || !strchr(separators, *end) || value > INT32_MAX ||
            astrovl_token_piece(p->model, (int32_t)value).size == 0)
            return fail("\"%.*s\" is no token of this vocabulary", (int)strcspn(text, separators), text);
        ids[n++] = (int32_t)value;
    }
    decoded = astrovl_detokenize(p->model, ids, n, &p->err);
    if (!decoded) return failed(p);
    print_text(p, decoded, strlen(decoded));
    if (p->safe_output) putchar('\n');       // a terminal's next line; a pipe gets the bytes as they are
    astrovl_free(decoded);
    return EXIT_OK;
}

static int run_tokens(program *p) {
    const char *word = p->o.words.n ? p->o.words.items[0] : "-";
    size_t size = strlen(word);
    if ((p->o.ids || p->o.clip) && (p->o.json || (p->o.clip && p->o.decode)))
        return usage_error(p->cmd, "--ids or --json, not both; --clip prints ids");
    open_model(p);
    if (strcmp(word, "-") == 0) word = read_text(p, word, &size);
    return (p->o.decode ? decode_ids : print_tokens)(p, word, size);
}

// ==== inspect ========================================================================================================
static const char *const value_types[] = {               // by astrovl_value_type
    "u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"};

// One value of a metadata entry, as JSON. long_strings: 0 cuts strings for the screen.
static void print_value(const astrovl_gguf *file, int index, uint64_t i, int long_strings) {
    astrovl_string s;
    int64_t integer = astrovl_gguf_int(file, index, i);
    switch (astrovl_gguf_kv(file, index)->item_type) {
    case ASTROVL_VALUE_STRING:
        s = astrovl_gguf_string(file, index, i);
        print_string(stdout, s.data, long_strings || s.size <= 100 ? s.size : 96, 1);
        if (!long_strings && s.size > 100) printf(" ... (%llu bytes)", (unsigned long long)s.size);
        break;
    case ASTROVL_VALUE_F32: print_number(stdout, astrovl_gguf_float(file, index, i), 1); break;
    case ASTROVL_VALUE_F64: print_number(stdout, astrovl_gguf_float(file, index, i), 0); break;
    case ASTROVL_VALUE_BOOL: printf("%s", integer ? "true" : "false"); break;
    case ASTROVL_VALUE_U64: printf("%llu", (unsigned long long)integer); break;
    default: printf("%lld", (long long)integer); break;
    }
}

// One metadata entry; of a long array its first items, unless --full is given. JSON: "key": value, or [values], or
// {"type": ..., "count": ..., "first": [values]}
static void print_kv(const program *p, const astrovl_gguf *file, int index) {
    const astrovl_kv *kv = astrovl_gguf_kv(file, index);
    int is_array = kv->type == ASTROVL_VALUE_ARRAY, as_json = p->o.json;
    uint64_t i, most = as_json ? 16 : 5, shown = p->o.full || kv->count <= most ? kv->count : most;
    char type[64];
    snprintf(type, sizeof type, is_array ? "%s[%llu]" : "%s", value_types[kv->item_type], (unsigned long long)kv->count);
    if (as_json) {
        put_json("%k", kv->key);
        if (shown < kv->count) put_json("{type:%s count:%l first:", value_types[kv->item_type], (long long)kv->count);
        if (is_array) put_json("[");
    } else {
        printf("  ");
        print_padded(kv->key, strlen(kv->key), 40);
        printf("  %-14s ", type);
    }
    for (i = 0; i < shown; i++) {
        if (as_json) put_json("%-");
        else if (i) printf(", ");
        print_value(file, index, i, as_json || p->o.full);
    }
    if (as_json && is_array) put_json(shown < kv->count ? "]}" : "]");
    else if (!as_json) printf("%s\n", shown < kv->count ? ", ..." : "");
}

// Shapes are written with the slowest dimension first, as the header's comments and numpy do.
static void print_tensor(const astrovl_tensor *t, int as_json) {
    int64_t shape[4];
    int i, n = t->n_dims;
    for (i = 0; i < n; i++) shape[i] = t->ne[n - 1 - i];
    if (as_json) {
        put_json("{name:%s type:%s shape:[", t->name, astrovl_type_name(t->type));
        for (i = 0; i < n; i++) put_json("%l", (long long)shape[i]);
        put_json("] offset:%l bytes:%l}", (long long)t->offset, (long long)t->n_bytes);
        return;
    }
    printf("  ");
    print_padded(t->name, strlen(t->name), 28);
    printf("  %-5s %-18s %12llu\n", astrovl_type_name(t->type), shape_text(shape, n, " x "), (unsigned long long)t->n_bytes);
}

enum { N_TYPES = ASTROVL_TYPE_BF16 + 1 };
// Tensors, values and bytes of each type, and at the end of all.
typedef struct totals { uint64_t of[N_TYPES + 1][3]; } totals;

static totals add_up(const astrovl_gguf *file) {
    totals sums = {{{0}}};
    int i;
    for (i = 0; i < 2 * astrovl_gguf_n_tensors(file); i++) {
        const astrovl_tensor *t = astrovl_gguf_tensor(file, i / 2);
        uint64_t *sum = sums.of[i % 2 ? N_TYPES : (int)t->type];
        sum[0]++, sum[1] += (uint64_t)(t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3]), sum[2] += t->n_bytes;
    }
    return sums;
}

static void print_totals(const totals *sums) {
    int k;
    for (k = 0; k <= N_TYPES; k++)
        if (sums->of[k][0]) printf("  %-5s %6d tensors %14llu values  %s\n", k < N_TYPES ? astrovl_type_name(k) : "all",
                                   (int)sums->of[k][0], (unsigned long long)sums->of[k][1], human_bytes(sums->of[k][2]));
}

static void print_file(const program *p, const astrovl_gguf *file) {
    int i, n_kv = astrovl_gguf_n_kv(file), n_tensors = astrovl_gguf_n_tensors(file), as_json = p->o.json;
    const char *order = astrovl_gguf_big_endian(file) ? "big" : "little";
    totals sums = add_up(file);
    if (as_json) {
        put_json("{file:%s version:%d byte_order:%s bytes:%l metadata:{", astrovl_gguf_name(file), astrovl_gguf_version(file),
                 order, (long long)astrovl_gguf_size(file));
    } else {
        print_safe(stdout, astrovl_gguf_name(file));
        printf(": GGUF version %d, %s-endian, %s, %d metadata entries, %d tensors\n%s", astrovl_gguf_version(file), order,
               human_bytes(astrovl_gguf_size(file)), n_kv, n_tensors, n_kv ? "\nmetadata\n" : "");
    }
    for (i = 0; i < n_kv; i++) print_kv(p, file, i);
    if (as_json) put_json("} tensors:[");
    else if (n_tensors) printf("\ntensors: name, type, shape (slowest dimension first), bytes\n");
    for (i = 0; i < n_tensors; i++) print_tensor(astrovl_gguf_tensor(file, i), as_json);
    if (as_json) put_json("]}");
    else printf("%s", n_tensors ? "\ntotals\n" : ""), print_totals(&sums), putchar('\n');
}

// Begins a part of the model: "name {", or null (text: "name", none) if the files lack it. Returns whether they have it.
static int begin_part(int as_json, const char *part, int present) {
    if (as_json) put_json(present ? "%k {" : "%k %-", part);
    else printf("  %-16s", part);
    if (!present) fputs(as_json ? "null" : "none\n", stdout);
    return present;
}

// Ends it with its sizes, format as of put_json; the text is "layers 2, width 32".
#define end_part(as_json, format, ...) ((as_json) ? put_json(format "}", __VA_ARGS__) : put_json("~" format "\n", __VA_ARGS__))

static void print_parts(int j, const astrovl_info *m) {
    if (begin_part(j, "vocabulary", m->has_vocab)) end_part(j, "tokens:%d bos:%d eos:%d", m->n_vocab, m->bos_token, m->eos_token);
    if (begin_part(j, "language_model", m->has_text))
        end_part(j, "layers:%d width:%d heads:%d kv_heads:%d head_dim:%d feed_forward:%d context:%d", m->n_layer, m->n_embd,
                 m->n_head, m->n_head_kv, m->head_dim, m->n_ff, m->n_ctx_train);
    if (begin_part(j, "vision_tower", m->has_vision))
        end_part(j, "layers:%d feature_layer:%d width:%d heads:%d feed_forward:%d image_size:%d patch_size:%d patches:%d",
                 m->vision_n_layer, m->vision_feature_layer, m->vision_n_embd, m->vision_n_head, m->vision_n_ff, m->image_size,
                 m->patch_size, m->n_patches);
    if (begin_part(j, "projector", m->has_projector)) end_part(j, "image_tokens:%d", m->n_image_tokens);
    if (begin_part(j, "text_tower", m->clip_text_n_layer > 0))
        end_part(j, "layers:%d width:%d heads:%d feed_forward:%d context:%d tokens:%d", m->clip_text_n_layer, m->clip_text_n_embd,
                 m->clip_text_n_head, m->clip_text_n_ff, m->clip_text_n_ctx, m->clip_text_n_vocab);
    if (begin_part(j, "contrastive", m->has_joint_image || m->has_joint_text))
        end_part(j, "images:%d texts:%d dims:%d logit_scale:%f", m->has_joint_image, m->has_joint_text, m->n_embd_joint,
                 m->logit_scale);
}

// What the files are together; that they are no model this program can run is an answer, not a failure.
static void print_model(program *p, const list *paths) {
    const astrovl_info *m = &p->info;
    p->model = astrovl_open_files(paths->items, paths->n, NULL, &p->err);
    if (!p->model) {
        if (p->o.json) put_json("model:{error:%s}", p->err.message);
        else printf("no model that astrovl can run: %s\n", p->err.message);
        return;
    }
    astrovl_get_info(p->model, &p->info);
    if (p->o.json) put_json("model:{name:%s parameters:%l weight_bytes:%l template:%s", m->name, (long long)m->n_params,
                            (long long)m->n_weight_bytes, astrovl_template_name(m->chat_template));
    else printf("what this makes up: %llu parameters in %s\n  name            ", (unsigned long long)m->n_params,
                human_bytes(m->n_weight_bytes)), print_string(stdout, m->name, strlen(m->name), 1), putchar('\n');
    print_parts(p->o.json, m);
    if (p->o.json) put_json("}");
    else printf("  template        %s\n", astrovl_template_name(m->chat_template));
}

// What whole files lack to be of use together; NULL: nothing.
static const char *lacking(const astrovl_info *m) {
    const int images = m->has_joint_image;
    if (m->has_text && !m->has_vocab)
        return "the language model has no tokenizer (tokenizer.ggml.*): convert it again with tokenizer.model or "
               "tokenizer.json next to its weights";
    if (m->has_projector && !m->has_text)
        return "there is no language model, which answers are made with: give its file as well (-m FILE)";
    if (m->has_vision && !m->has_projector && !images)
        return "the vision tower has neither a projector (mm.0.weight) nor a projection (visual_projection.weight): "
               "convert it again, with that part";
    if (images && !m->has_joint_text && !m->has_text)
        return "there is no text tower (t.*), which images are compared with: give its file as well (-m FILE), or "
               "convert the model again with both towers";
    if (m->has_joint_text && !images)
        return "there is no vision tower with a projection (v.*, visual_projection.weight), which texts are compared "
               "with: give its file as well (-m FILE), or convert the model again with both towers";
    if (m->has_vocab && !m->has_text && !m->has_vision && !m->has_joint_text)
        return "there is a vocabulary and nothing else: give the file with the weights as well (-m FILE)";
    return NULL;
}

// --check: which commands the files can be used with, or the first problem.
static int check_model(program *p, const list *paths) {
    static const struct { const char *command; int use; } rows[] = {{"caption", 0}, {"ask", 0}, {"chat", 1}, {"trace", 1},
        {"summarize", 1}, {"score", 2}, {"describe", 2}, {"search", 2}, {"index", 3}, {"embed", 3}, {"tokens", 4}};
    const astrovl_info *m = &p->info;
    const char *problem;
    int i, uses[5];
    p->model = astrovl_open_files(paths->items, paths->n, NULL, &p->err);
    astrovl_get_info(p->model, &p->info);
    problem = p->model ? lacking(m) : p->err.message;
    uses[4] = m->has_vocab, uses[3] = m->has_joint_image, uses[2] = m->has_joint_image && m->has_joint_text;
    uses[1] = m->has_text && m->has_vocab, uses[0] = uses[1] && m->has_vision && m->has_projector;
    if (p->o.json) put_json("{runnable:%b commands:[", !problem);
    else if (problem) printf("these files make up no model that astrovl can run:\n- ");
    else printf("these files can be used with");
    for (i = 0; i < (int)(sizeof rows / sizeof *rows); i++)
        if (!problem && uses[rows[i].use])
            p->o.json ? put_json("%s", rows[i].command) : (void)printf(" %s", rows[i].command);
    if (p->o.json) put_json("] problems:[");
    if (p->o.json && problem) put_json("%s", problem);
    if (p->o.json) put_json("]}\n");
    else if (problem) print_safe(stdout, problem), putchar('\n');
    else puts(uses[1] && !uses[0] ? "; for images, give the mmproj file as well: -m FILE" : "");
    return problem ? EXIT_FAILED : EXIT_OK;
}

static int run_inspect(program *p) {
    list *paths = p->o.words.n ? &p->o.words : &p->o.models;
    astrovl_gguf **files;
    int i;
    if (p->o.words.n && p->o.models.n) return usage_error(p->cmd, "name the files as arguments or with -m, not both");
    if (paths->n == 0 && p->shipped[0]) paths->items[paths->n++] = p->shipped;
    if (paths->n == 0) return usage_error(p->cmd, "which file? (the shipped model was not found)");
    if (p->o.check) return check_model(p, paths);
    files = (astrovl_gguf **)new_memory(p, (size_t)paths->n, sizeof *files);
    for (i = 0; i < paths->n; i++)                         // all, before anything is printed: half a JSON text is none
        if (!(files[i] = astrovl_gguf_open(paths->items[i], 0, &p->err))) exit(failed(p));
    if (p->o.json) put_json("{files:[");
    for (i = 0; i < paths->n; i++) print_file(p, files[i]), astrovl_gguf_close(files[i]);
    if (p->o.json) put_json("]");
    print_model(p, paths);
    if (p->o.json) put_json("}\n");
    return EXIT_OK;
}

// ==== quantize =======================================================================================================
static void print_quantized(const program *p, const astrovl_gguf *in, const astrovl_gguf *out, const astrovl_quantize_report *r,
                            double seconds) {
    totals sums = add_up(out);
    long long sizes[2] = {(long long)astrovl_gguf_size(in), (long long)astrovl_gguf_size(out)};
    double bits = (double)sums.of[N_TYPES][2] * 8 / (double)sums.of[N_TYPES][1];
    int k;
    if (p->o.json) {
        put_json("{file:%s bytes_before:%l bytes:%l bits_per_weight:%f seconds:%f tensors:%d changed:%d fallbacks:%d "
                 "requantized:%d types:{", astrovl_gguf_name(out), sizes[0], sizes[1], bits, seconds, r->n_tensors, r->n_changed,
                 r->n_fallbacks, r->n_requantized);
        for (k = 0; k < N_TYPES; k++) if (sums.of[k][0]) put_json("%k %d", astrovl_type_name(k), (int)sums.of[k][0]);
        put_json("}}\n");
    } else if (!p->o.quiet) {
        printf("%s, now %s, %.2f bits a weight; %d of %d tensors changed in %.1f s\n", human_bytes((uint64_t)sizes[0]),
               human_bytes((uint64_t)sizes[1]), bits, r->n_changed, r->n_tensors, seconds);
        print_totals(&sums);
    }
    if (p->o.quiet) return;
    if (r->n_fallbacks) fail("note: %d tensors got another type, since their rows do not fit its blocks", r->n_fallbacks);
    if (r->n_requantized) fail("warning: %d tensors were quantised before and lose again; F16 is better", r->n_requantized);
}

static int run_quantize(program *p) {
    const char *const *words = p->o.words.items;
    astrovl_quantize_report report;
    astrovl_gguf *in = astrovl_gguf_open(words[0], 0, &p->err), *out = NULL;
    double start = astrovl_seconds();
    astrovl_status status = in ? ASTROVL_OK : p->err.status;
    p->started = time(NULL);
    catch_interrupts(1);                   // nothing is left behind
    if (!status) status = astrovl_quantize_file(in, words[1], words[2], p->o.threads, on_progress, p, &report, &p->err);
    clear_bar(p);
    if (!status) out = astrovl_gguf_open(words[1], 0, &p->err);
    if (out) print_quantized(p, in, out, &report, astrovl_seconds() - start);
    astrovl_gguf_close(in);
    astrovl_gguf_close(out);
    if (status == ASTROVL_ERROR_ARGUMENT) return usage_error(p->cmd, "%s", p->err.message);
    return out ? EXIT_OK : failed(p);
}

// ==== trace ==========================================================================================================
enum { MAX_TRACED = 65536 };

typedef struct trace_state {
    program     *p;
    const char  *folder;                   // NULL: hashes only
    FILE        *index;                    // folder/index.tsv: what came when
    list         names;
    int          calls[MAX_TRACED];        // how often each name has come
    uint64_t     n_tensors, n_bytes, total;
} trace_state;

// How often this name has come, this time included.
static int count_call(trace_state *t, const char *name) {
    int i;
    for (i = 0; i < t->names.n && strcmp(t->names.items[i], name) != 0; i++) {}
    if (i == t->names.n) list_add(t->p, &t->names, name, strlen(name));
    return ++t->calls[i < MAX_TRACED ? i : MAX_TRACED - 1];
}

// "model.norm" -> "model.norm.npy", the third time "model.norm.call3.npy"
static void save_tensor(trace_state *t, const char *name, int layer, const int64_t *shape, int n_dims, const float *data) {
    char file[256], path[4096], *c;
    int call = count_call(t, name);
    uint64_t hash;
    snprintf(file, sizeof file, call == 1 ? "%.180s.npy" : "%.180s.call%d.npy", name, call);
    for (c = file; *c; c++)
        if (!isalnum((unsigned char)*c) && !strchr("._-", *c)) *c = '_';
    snprintf(path, sizeof path, "%s/%s", t->folder, file);
    hash = save_npy(path, shape, n_dims, data);
    fprintf(t->index, "%s\t%s\t%d\t%d\t%s\t%016llx\n", file, name, layer, call, shape_text(shape, n_dims, "x"),
            (unsigned long long)hash);
}

static void on_tensor(void *user, const char *name, int layer, const int64_t *shape, int n_dims, const float *data) {
    trace_state *t = (trace_state *)user;
    uint64_t n = count_values(shape, n_dims);
    char line[512];
    if (t->folder) {
        save_tensor(t, name, layer, shape, n_dims, data);
    } else {
        int size = snprintf(line, sizeof line, "%016llx %.300s %s\n", (unsigned long long)put_values(NULL, data, n), name,
                            shape_text(shape, n_dims, "x"));
        t->total = fnv1a64(t->total, line, (size_t)size);
        fputs(line, stdout);
    }
    flush_output(t->p);
    t->n_tensors++;
    t->n_bytes += n * 4;
}

// Makes the folder and its index before the long work, so that a folder that cannot be written is said at once.
static void open_trace_folder(program *p, trace_state *t) {
    char *path = join_path(p, t->folder, strlen(t->folder), "index.tsv");
    if (make_folder(t->folder) != 0 && errno != EEXIST) exit(write_error(t->folder));
    if (!(t->index = fopen(path, "w"))) exit(write_error(path));
    fprintf(t->index, "file\tname\tlayer\tcall\tshape\tfnv1a64\n");
}

static int run_trace(program *p) {
    trace_state *t = (trace_state *)new_memory(p, 1, sizeof *t);
    int n_images = p->o.words.n - 1;
    astrovl_image image = {0, 0, NULL, 0};
    char *answer;
    t->p = p;
    t->folder = p->o.out;
    t->total = FNV_START;
    if (p->o.hash == (t->folder != NULL)) return usage_error(p->cmd, "where to: -o DIR, or --hash?");
    if (p->o.how.max_tokens == 0) p->o.how.max_tokens = 1;
    open_model(p);
    p->session = new_session(p, ASTROVL_EXACT, on_tensor, t);
    if (t->folder) open_trace_folder(p, t);
    if (n_images && load_image(p->o.words.items[0], &image, &p->err) != ASTROVL_OK) return failed(p);
    answer = say(p, &image, n_images, p->o.words.items[n_images]);
    astrovl_image_free(&image);
    if (p->stop || !answer) exit(p->stop ? EXIT_FAILED : failed(p));
    if (t->index && (ferror(t->index) || fclose(t->index) != 0)) return write_error("index.tsv");
    if (!t->folder) {
        printf("total %016llx of %llu tensors\nanswer ", (unsigned long long)t->total, (unsigned long long)t->n_tensors);
        print_string(stdout, answer, strlen(answer), 1);
    } else if (!p->o.quiet) {
        fprintf(stderr, "%llu tensors, %s, in %s; index.tsv lists them in the order they were computed\n",
                (unsigned long long)t->n_tensors, human_bytes(t->n_bytes), t->folder);
    }
    putchar('\n');
    astrovl_free(answer);
    return EXIT_OK;
}

// ==== score, describe, embed: images and texts in one space ==========================================================
enum { IMAGE_TOWER = 1, TEXT_TOWER = 2, MAX_BATCH = 256 };

// Opens the model and a session, and says which of the towers that the command needs is missing.
static void open_towers(program *p, int towers) {
    open_model_and_session(p);
    if (p->o.batch == 0) p->o.batch = 4;
    p->started = time(NULL);
    p->counting = 1;
    if ((towers & IMAGE_TOWER) && !p->info.has_joint_image)
        exit(fail("%s: cannot embed images: no CLIP vision tower with a projection; name one with -m", p->o.models.items[0]));
    if ((towers & TEXT_TOWER) && !p->info.has_joint_text)
        exit(fail("%s: cannot embed texts: no CLIP text tower; name a file that has one with -m", p->o.models.items[0]));
}

static float *new_rows(program *p, int n) { return (float *)new_memory(p, (size_t)n, (size_t)p->info.n_embd_joint * 4); }
static float *row_of(const program *p, float *rows, int i) { return rows + (size_t)i * (size_t)p->info.n_embd_joint; }

// Embeds up to MAX_BATCH images in one pass. rows: out, [n][n_embd_joint]. Of an image that cannot be read, which is reported, ok
// and the row are zeros. Returns how many could be.
static int embed_batch(program *p, const char *const *paths, int n, float *rows, char *ok) {
    astrovl_image images[MAX_BATCH];
    size_t row_size = (size_t)p->info.n_embd_joint * sizeof(float);
    int i, good = 0, next;
    for (i = 0; i < n; i++) {
        ok[i] = load_image(paths[i], &images[good], &p->err) == ASTROVL_OK;
        good += ok[i];
        if (ok[i]) continue;
        failed(p);
        if (p->o.json) print_error_json(paths[i], &p->err);
    }
    if (good && astrovl_embed_images(p->session, images, good, !p->o.raw, rows, &p->err) != ASTROVL_OK) exit(failed(p));
    for (i = 0; i < good; i++) astrovl_image_free(&images[i]);
    for (i = n - 1, next = good; i >= 0; i--)              // from the rows of the good ones to those of all
        if (ok[i]) memmove(row_of(p, rows, i), row_of(p, rows, --next), row_size);
        else memset(row_of(p, rows, i), 0, row_size);
    return good;
}

// {"image": path, "embedding": [...]}; every number reads back as the same float32
static void print_embedding(program *p, const char *key, const char *name, const float *row) {
    int k;
    put_json("{%k %s embedding:[", key, name);
    for (k = 0; k < p->info.n_embd_joint; k++) put_json("%f", row[k]);
    put_json("]}\n");
}

// Embeds any number of images, pass by pass. print: the rows as JSON lines. EXIT_FAILED if one cannot be read.
static int embed_images(program *p, const char *const *paths, int n, float *rows, int print) {
    char ok[MAX_BATCH];
    int i, k, some, status = EXIT_OK;
    for (i = 0; i < n && !p->stop; i += some) {
        some = n - i < p->o.batch ? n - i : p->o.batch;
        draw_bar(p, "images", i, n, 0);
        if (embed_batch(p, paths + i, some, row_of(p, rows, i), ok) < some) status = EXIT_FAILED;
        for (k = 0; k < some && print; k++)
            if (ok[k]) clear_bar(p), print_embedding(p, "image", paths[i + k], row_of(p, rows, i + k));
        flush_output(p);
    }
    clear_bar(p);
    return status;
}

static void embed_texts(program *p, const char *const *texts, int n, float *rows) {
    int i, some;
    for (i = 0; i < n; i += some) {
        some = n - i < 32 ? n - i : 32;
        draw_bar(p, "texts", i, n, 0);
        if (astrovl_embed_texts(p->session, texts + i, some, !p->o.raw, row_of(p, rows, i), &p->err) != ASTROVL_OK) exit(failed(p));
    }
    clear_bar(p);
}

static int run_embed(program *p) {
    list *images = &p->o.words, *texts = &p->o.texts;
    int i, n = images->n + texts->n, status = EXIT_OK;
    int64_t shape[2];
    float *rows;
    if ((images->n == 0) == (texts->n == 0)) return usage_error(p->cmd, "images are wanted, or --text TEXT (not both)");
    open_towers(p, images->n ? IMAGE_TOWER : TEXT_TOWER);
    rows = new_rows(p, n);
    if (images->n) status = embed_images(p, images->items, n, rows, !p->o.out);
    else embed_texts(p, texts->items, n, rows);
    shape[0] = n, shape[1] = p->info.n_embd_joint;
    if (p->o.out && status != EXIT_OK) return fail("%s: not written, since rows are missing", p->o.out);
    if (p->o.out) return save_npy(p->o.out, shape, 2, rows), EXIT_OK;
    for (i = 0; i < texts->n; i++) print_embedding(p, "text", texts->items[i], row_of(p, rows, i));
    return status;
}

// Texts that compete with each other for an image.
typedef struct group {
    const char *title;                     // NULL: the only one
    list        texts;
    float      *rows, *odds;               // [texts.n][n_embd_joint]; [texts.n], cosines, then probabilities
    astrovl_hit *fits;                     // [texts.n], the texts with their cosines
} group;

static int by_score(const void *a, const void *b) {
    const astrovl_hit *x = (const astrovl_hit *)a, *y = (const astrovl_hit *)b;
    return x->score < y->score ? 1 : x->score > y->score ? -1 : (int)(x->row - y->row);
}

// Cosines, and probabilities = softmax(logit_scale * cosine) over the group. best: print so many, best first; 0: all as they stand
static void print_fits(program *p, const group *g, const float *image, int best) {
    int i, n = g->texts.n;
    astrovl_linear(g->odds, image, g->rows, NULL, 1, p->info.n_embd_joint, n);
    for (i = 0; i < n; i++) g->fits[i].row = i, g->fits[i].score = g->odds[i], g->odds[i] *= p->info.logit_scale;
    astrovl_softmax(g->odds, n);
    if (best) qsort(g->fits, (size_t)n, sizeof *g->fits, by_score);
    if (!p->o.json && g->title) printf("  %s\n", g->title);
    for (i = 0; i < (best && best < n ? best : n); i++) {
        const char *text = g->texts.items[g->fits[i].row];
        float cosine = g->fits[i].score, probability = g->odds[g->fits[i].row];
        if (p->o.json) {
            put_json("{text:%s cosine:%f probability:%f", text, cosine, probability);
            put_json(g->title ? "group:%s}" : "}", g->title);
        } else {
            printf("  %7.4f  %5.1f %%  ", cosine, probability * 100);
            print_safe(stdout, text);
            putchar('\n');
        }
    }
}

static int match_images(program *p, group *groups, int n_groups, int best) {
    int i, k, status = EXIT_OK;
    float *row;
    open_towers(p, IMAGE_TOWER | TEXT_TOWER);
    row = new_rows(p, 1);
    for (i = 0; i < n_groups; i++) {
        group *g = &groups[i];
        g->rows = new_rows(p, g->texts.n);
        g->odds = (float *)new_memory(p, (size_t)g->texts.n, sizeof *g->odds);
        g->fits = (astrovl_hit *)new_memory(p, (size_t)g->texts.n, sizeof *g->fits);
        embed_texts(p, g->texts.items, g->texts.n, g->rows);
    }
    for (i = 0; i < p->o.words.n && !p->stop; i++) {
        const char *path = p->o.words.items[i];
        char ok;
        if (!embed_batch(p, &path, 1, row, &ok)) { status = EXIT_FAILED; continue; }
        if (p->o.json) put_json("{file:%s matches:[", path);
        else print_safe(stdout, path), putchar('\n');
        for (k = 0; k < n_groups; k++) print_fits(p, &groups[k], row, best);
        if (p->o.json) put_json("]}\n");
        flush_output(p);
    }
    return status;
}

static int run_score(program *p) {
    group g = {NULL, p->o.texts, NULL, NULL, NULL};
    if (p->o.texts.n < 1) return usage_error(p->cmd, "against which texts? --text TEXT");
    return match_images(p, &g, 1, 0);
}

// What `describe` chooses from by itself: our own list.
static const char *const built_in_titles[3] = {"astrophysical object classes", "phenomena and structures", "science use cases"};
static const char *const built_in_labels[3] = {
    "spiral galaxy\ngrand design spiral galaxy\nflocculent spiral galaxy\nbarred spiral galaxy\ntightly wound spiral galaxy\n"
    "loosely wound spiral galaxy\nface-on spiral galaxy\nedge-on spiral galaxy\nedge-on galaxy with a central bulge\nedge-on "
    "galaxy without a bulge\nelliptical galaxy\nround smooth galaxy\nsmooth oval galaxy\nsmooth cigar-shaped galaxy\ngiant "
    "elliptical galaxy at the centre of a cluster\nlenticular galaxy\nirregular galaxy\ndwarf galaxy\ndwarf spheroidal galaxy\n"
    "ultra-diffuse galaxy\nring galaxy\npolar ring galaxy\ndisturbed galaxy with a distorted shape\npair of merging galaxies\n"
    "interacting galaxies\nstarburst galaxy\nblue compact dwarf galaxy\nluminous infrared galaxy\nlow surface brightness galaxy\n"
    "jellyfish galaxy\nhigh-redshift galaxy\nlyman-alpha emitting galaxy\npost-starburst galaxy\nactive galaxy\nseyfert galaxy\n"
    "radio galaxy\nquasar\nblazar\ncompact group of galaxies\ncluster of galaxies\nproto-cluster of galaxies\ndeep field full of "
    "galaxies\ngravitational lens\nstrongly lensed quasar\ngalaxy cluster acting as a lens\nglobular cluster\nextragalactic "
    "globular cluster\nopen star cluster\nyoung massive star cluster\nnuclear star cluster\nstellar association\nstar field\n"
    "crowded field of stars\nresolved stars in a nearby galaxy\nstars in the galactic bulge\nmagellanic cloud\nemission nebula\n"
    "region of ionised hydrogen\nreflection nebula\ndark nebula\nmolecular cloud\nplanetary nebula\nbipolar planetary nebula\n"
    "protoplanetary nebula\nsupernova remnant\npulsar wind nebula\nwolf-rayet nebula\nbow shock nebula\nherbig-haro object\nyoung "
    "stellar object\nprotoplanetary disk\ndebris disk\nbrown dwarf\nred dwarf star\nred giant star\nred supergiant star\nluminous "
    "blue variable star\nwolf-rayet star\nwhite dwarf\nneutron star\nmagnetar\npulsar\nbinary star\ncataclysmic variable star\n"
    "symbiotic star\ncepheid variable star\nrr lyrae variable star\nnova\ntype ia supernova\ncore-collapse supernova\nkilonova\n"
    "gamma-ray burst\ntidal disruption event\nblack hole candidate\nsupermassive black hole\nexoplanet\ntransiting hot jupiter\n"
    "gas giant planet\nbanded giant planet\nringed planet\nice giant planet\nterrestrial planet\ncratered moon\nicy moon\n"
    "asteroid\nbinary asteroid\nnear-earth object\nkuiper belt object\ndwarf planet\ncentaur\ncomet\nactive asteroid with a tail\n"
    "interstellar object\n",
    "spiral arms\nstellar bar in a galaxy\ngalactic bulge\ngalactic disk seen edge-on\ngalaxy halo\ndust lane across a galaxy\n"
    "rings of star formation in a galaxy\ntidal tails and bridges between galaxies\nstellar streams and shells around a galaxy\n"
    "warped galactic disk\ngalactic outflow\njet from an active nucleus\naccretion disk\ndusty torus around a nucleus\nextended "
    "emission lines around a quasar\ncircumgalactic gas\nintergalactic medium\nintracluster light\ngas stripped from a galaxy\n"
    "arcs of a gravitational lens\neinstein ring\nmultiple images of one quasar\nmicrolensing\nweak lensing shear\ndark matter "
    "halo\nstar formation\ntriggered star formation at the rim of a nebula\npillars of gas and dust\nionisation front\nglowing "
    "filaments of gas\nshock waves in gas\nexpanding shell of gas\nlight echo\nstellar wind\nstellar outflow and jet\nmass loss "
    "from a dying star\nsupernova explosion\nstellar pulsation\nstellar flare\nstellar rotation\nmass transfer in a binary star\n"
    "blue stragglers\nmain sequence turn-off\nhorizontal branch stars\nmultiple populations in a star cluster\nmass segregation in "
    "a star cluster\ntidal tails of a star cluster\ninterstellar dust\ninterstellar extinction\ndiffuse interstellar bands\n"
    "polarised light scattered by dust\ninfrared excess from warm dust\nplanet formation in a disk\ngap in a protoplanetary disk\n"
    "atmosphere of an exoplanet\nplanetary rings\ncloud bands on a giant planet\nstorm on a giant planet\naurora on a planet\n"
    "impact craters\nvolcanic activity on a moon\nwater plumes from an icy moon\ntail of a comet\ncoma and nucleus of a comet\n"
    "break-up of a comet\nzodiacal light\ncosmic reionisation\nlyman-alpha absorption lines\n",
    "measuring the expansion rate with type ia supernovae\nmeasuring the hubble constant with cepheids\ncalibrating the cosmic "
    "distance ladder with red giants\nmeasuring time delays of lensed quasars\nmapping dark matter with weak lensing\nmapping mass "
    "in a galaxy cluster with strong lensing\nfinding faint distant galaxies behind a lens\nsearching for the first galaxies\n"
    "tracing the history of cosmic star formation\nstudying how galaxies grow by mergers\nclassifying galaxy shapes\nmeasuring the "
    "light profiles of elliptical galaxies\nstudying how bars drive gas to the centre of galaxies\ntracing the structure of spiral "
    "arms\nmeasuring the thickness of galactic disks\nmapping dust in galaxies\nresolving stars in nearby galaxies\ndating a "
    "stellar population from its colours and magnitudes\ndating a globular cluster by its oldest stars\nmeasuring proper motions "
    "in a star cluster\nweighing a central black hole from the motion of stars\nsearching for intermediate-mass black holes\n"
    "monitoring the variability of active nuclei\nimaging the host galaxies of quasars\nstudying jets and hot spots of radio "
    "galaxies\nfinding the afterglow of a gamma-ray burst\nlooking for the light of a gravitational wave source\nidentifying the "
    "progenitor star of a supernova\nmeasuring the expansion of a supernova remnant\ndetermining the composition of a nebula from "
    "its emission lines\nstudying how dying stars shed their envelopes\nstudying how massive stars shape their surroundings\n"
    "surveying young stars in a star-forming region\ncounting low-mass stars to find the initial mass function\nimaging disks "
    "around young stars\nsearching for planets by transits\nmeasuring starlight through the atmosphere of an exoplanet\ndirectly "
    "imaging a planet beside its star\nstudying white dwarfs and their cooling\nmeasuring orbits and masses of binary stars\n"
    "searching for brown dwarfs in young clusters\nmonitoring weather on the giant planets\nobserving aurorae in ultraviolet "
    "light\nsearching for new moons and rings\ncounting craters to date a surface\nmapping the surface of a dwarf planet\n"
    "searching for small bodies beyond neptune\ntracking the activity of a comet\nmeasuring the size and shape of an asteroid\n"
    "watching an impact on a planet\nstudying absorption lines along the line of sight to quasars\nmeasuring the cosmic background "
    "light\ncalibrating a camera on a standard star field\nparallel imaging of a random field\n"};

// One label a line; blank lines and those that begin with '#' are passed over.
static void read_labels(program *p, const char *path, char *text, size_t size, list *labels) {
    lines l = lines_of(path, text, size);
    unsigned code;
    int valid;
    size_t at;
    while (next_line(&l)) {
        for (; *l.line == ' ' || *l.line == '\t'; l.size--) l.line++;
        while (l.size && (l.line[l.size - 1] == ' ' || l.line[l.size - 1] == '\t')) l.size--;
        if (!l.size || *l.line == '#') continue;
        for (at = 0; at < l.size;) {
            at += utf8_next(l.line + at, l.size - at, &code, &valid);
            if (!valid || (is_control(code) && code != '\t')) line_error(&l, "this is not UTF-8 text, or holds control characters");
        }
        if (l.size > 1000) line_error(&l, "a label of more than 1000 bytes");
        if (labels->n == 100000) line_error(&l, "more than 100000 labels");
        list_add(p, labels, l.line, l.size);
    }
    if (!labels->n) exit(fail("%s: there is no label in it; write one a line", path));
}

static int run_describe(program *p) {
    const char *path = p->o.labels;
    group groups[3];
    int i, n = path ? 1 : 3;
    memset(groups, 0, sizeof groups);
    for (i = 0; i < n; i++) {
        size_t size = strlen(built_in_labels[i]);
        char *text = path ? read_text(p, path, &size) : (char *)memcpy(new_memory(p, size + 1, 1), built_in_labels[i], size);
        if (!path) groups[i].title = built_in_titles[i];
        read_labels(p, path ? path : "labels built in", text, size, &groups[i].texts);
    }
    return match_images(p, groups, n, p->o.best ? p->o.best : 5);
}

// ==== index, search ==================================================================================================
//
// An index file, all numbers little-endian:
//   header   "AVLINDEX" | version u32 (1) | n_dims u32 | model u64 (see model_fingerprint) | FNV-1a u64 of the 24 bytes before
//   record   n u32, bytes of the name | ~n u32 | row, n_dims float16, L2-normalised | name, n bytes as the system gave it
//            (UTF-8 as a rule) | FNV-1a u64 of all the record's bytes before
// Records follow each other without gaps, one an image. They are appended, those of one pass in one write, then synced: a
// program that is killed leaves at worst an incomplete record at the end. Whoever reads the file passes over that one, and
// `astrovl index` cuts it off before it goes on. A broken record anywhere else is an error.

enum { INDEX_HEADER = 32, MAX_NAME = 65535 };

typedef struct image_index {
    const char    *path;
    FILE          *file;
    int            n_dims, keep_rows, torn;
    unsigned char  header[INDEX_HEADER];   // what the model in use would write
    list           names;
    unsigned char *rows;                   // [names.n][n_dims] float16, if keep_rows
    size_t         capacity;               // of rows, in bytes
    uint64_t       end;                    // where the last whole record ends; behind it lies a torn one, if anything
} image_index;

// A number that tells models apart whose embeddings differ: the sum of a hash for each tensor but those of the language model and
// the projector. It covers name, type, shape, and all bytes if there are up to 64 KiB, otherwise 16 pieces of 4 KiB at equal steps.
static uint64_t model_fingerprint(const astrovl_model *model) {
    static const char *const others[] = {"blk.", "token_embd", "output", "rope_freqs", "mm.", "model.image_newline"};
    uint64_t sum = 0, h, k;
    char text[128];
    int f, i, o;
    for (f = 0; f < astrovl_n_files(model); f++) {
        const astrovl_gguf *file = astrovl_file(model, f);
        for (i = 0; i < astrovl_gguf_n_tensors(file); i++) {
            const astrovl_tensor *t = astrovl_gguf_tensor(file, i);
            uint64_t pieces = t->n_bytes <= 65536 ? 1 : 16, piece = pieces == 1 ? t->n_bytes : 4096;
            for (o = 0; o < 6 && strncmp(t->name, others[o], strlen(others[o])) != 0; o++) {}
            if (o < 6) continue;
            h = fnv1a64(FNV_START, t->name, strlen(t->name));
            h = fnv1a64(h, text, (size_t)snprintf(text, sizeof text, "%d %lld %lld %lld %lld", (int)t->type, (long long)t->ne[0],
                                                  (long long)t->ne[1], (long long)t->ne[2], (long long)t->ne[3]));
            for (k = 0; k < pieces; k++)
                h = fnv1a64(h, (const char *)t->data + (size_t)((t->n_bytes - piece) / 15 * k), (size_t)piece);
            sum += h;
        }
    }
    return sum;
}

static image_index *new_index(program *p, const char *path) {
    image_index *ix = (image_index *)new_memory(p, 1, sizeof *ix);
    ix->path = path;
    ix->n_dims = p->info.n_embd_joint;
    memcpy(ix->header, "AVLINDEX\1\0\0", 12);
    put_le(ix->header + 12, (uint64_t)ix->n_dims, 4);
    put_le(ix->header + 16, model_fingerprint(p->model), 8);
    put_le(ix->header + 24, fnv1a64(FNV_START, ix->header, 24), 8);
    return ix;
}

// Reads the header; it has to be the one that the model in use would write. Returns how many of its bytes there are.
static size_t read_index_header(image_index *ix) {
    unsigned char h[INDEX_HEADER];
    size_t size = fread(h, 1, INDEX_HEADER, ix->file);
    if (ferror(ix->file)) exit(fail("%s: cannot be read: %s", ix->path, strerror(errno)));
    if (memcmp(h, "AVLINDEX", size < 8 ? size : 8) != 0) exit(fail("%s: is no index made by astrovl", ix->path));
    ix->end = size;
    if (size < INDEX_HEADER || memcmp(h, ix->header, INDEX_HEADER) == 0) return size;
    if (get_le(h + 24, 8) != fnv1a64(FNV_START, h, 24)) exit(fail("%s: its header is damaged; make the index anew", ix->path));
    if (get_le(h + 8, 4) != 1) exit(fail("%s: is of another version of the format", ix->path));
    exit(fail("%s: was made with another model (%016llx, %u numbers a row; this one is %016llx, %d): name that model with -m, or "
                "begin another index", ix->path, (unsigned long long)get_le(h + 16, 8), (unsigned)get_le(h + 12, 4),
                (unsigned long long)get_le(ix->header + 16, 8), ix->n_dims));
}

static void keep_record(program *p, image_index *ix, const unsigned char *record, size_t row_size, size_t n) {
    size_t used = (size_t)ix->names.n * row_size;
    if (ix->keep_rows && used + row_size > ix->capacity) {
        ix->capacity = used * 2 + 64 * row_size;
        ix->rows = (unsigned char *)realloc(ix->rows, ix->capacity);
        if (!ix->rows || ix->capacity < used) exit(fail("%s: out of memory after %d rows", ix->path, ix->names.n));
    }
    if (ix->keep_rows) memcpy(ix->rows + used, record + 8, row_size);
    list_add(p, &ix->names, (const char *)record + 8 + row_size, n);
}

// Reads all records behind the header. A torn one at the end sets ix->torn and is no error.
static void read_records(program *p, image_index *ix) {
    size_t row_size = (size_t)ix->n_dims * 2, n, size, got;
    unsigned char *record = (unsigned char *)new_memory(p, row_size + MAX_NAME + 16, 1);
    const char *damage = NULL;
    while (!ix->torn && !damage && (got = fread(record, 1, 8, ix->file)) > 0) {
        n = (size_t)get_le(record, 4);
        size = 8 + row_size + n;                           // up to the checksum
        ix->torn = 1;
        if (got == 8 && get_le(record, 8) == 0) {          // zeros: a machine that lost power may leave them, up to the end
            int c;
            while ((c = getc(ix->file)) == 0) {}
            if (c != EOF) damage = "zeros";
        } else if (got == 8 && (get_le(record + 4, 4) != (~n & 0xFFFFFFFFu) || n < 1 || n > MAX_NAME)) {
            damage = "its size is impossible";
        } else if (got == 8 && fread(record + 8, 1, size, ix->file) == size) {
            ix->torn = get_le(record + size, 8) != fnv1a64(FNV_START, record, size);
            if (ix->torn && getc(ix->file) != EOF) damage = "its checksum is wrong";
            if (ix->torn) continue;
            keep_record(p, ix, record, row_size, n);
            ix->end += size + 8;
        }
    }
    if (ferror(ix->file)) exit(fail("%s: cannot be read: %s", ix->path, strerror(errno)));
    if (damage) exit(fail("%s: the record at byte %llu is damaged (%s) and is not the last one: make the index anew", ix->path,
                          (unsigned long long)ix->end, damage));
}

// Appends bytes and has them on the disk; on failure takes back what was written.
static void append_to_index(image_index *ix, const unsigned char *bytes, size_t size) {
    size_t done = 0;
    long long n = 0;
    for (; done < size; done += n > 0 ? (size_t)n : 0) {
        n = (long long)write_file(ix->file, bytes + done, size - done);
        if (n == 0 || (n < 0 && errno != EINTR)) break;
    }
    if (done < size || (sync_file(ix->file) != 0 && errno != EINVAL)) {      // EINVAL: a file that needs no syncing
        write_error(ix->path);
        if (cut_file(ix->file, ix->end) != 0) write_error(ix->path);
        exit(EXIT_FAILED);
    }
    ix->end += size;
}

// Opens the index to append to: makes it, or reads the one there is and cuts a torn record off. One program at a time may.
static void open_index(program *p, image_index *ix) {
    size_t size;
    ix->file = open_to_append(ix->path);
    if (!ix->file) exit(write_error(ix->path));
    if (lock_file(ix->file) != 0) exit(fail("%s: another astrovl is writing to this index; wait until it is done", ix->path));
    rewind(ix->file);
    size = read_index_header(ix);
    if (size < INDEX_HEADER) ix->end = 0;                  // a new file, or one whose making was cut short
    else read_records(p, ix);
    if (ix->torn) fail("%s: cutting off an incomplete record at the end (a run was stopped)", ix->path);
    if ((ix->torn || !ix->end) && size && cut_file(ix->file, ix->end) != 0) exit(write_error(ix->path));
    if (!ix->end) append_to_index(ix, ix->header, INDEX_HEADER);
}

// The record of one image. Returns its bytes.
static size_t make_record(const image_index *ix, const char *name, const float *row, unsigned char *record) {
    size_t n = strlen(name), at = 8;
    int k;
    put_le(record, n, 4);
    put_le(record + 4, ~(uint64_t)n, 4);
    for (k = 0; k < ix->n_dims; k++, at += 2) put_le(record + at, astrovl_f32_to_f16(row[k]), 2);
    memcpy(record + at, name, n);
    put_le(record + at + n, fnv1a64(FNV_START, record, at + n), 8);
    return at + n + 8;
}

static int by_text(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

#if !defined(_WIN32)
// An image by its ending, in any case.
static int has_image_ending(const char *name) {
    static const char *const endings[] = {".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".pnm"};
    const char *dot = strrchr(name, '.');
    int i = 0;
    while (dot && i < 6 && strcasecmp(dot, endings[i]) != 0) i++;
    return dot && i < 6;
}
#endif

// A file as it is named, or the images in a folder and below it. is_found: it was met in a folder. There, links to folders are
// not followed: they could lead in circles. (On Windows folders are not walked; give their files with -.)
static int add_images(program *p, const char *path, int is_found, list *names) {
#if !defined(_WIN32)
    struct dirent *entry;
    struct stat s, target;
    DIR *folder;
    int status = EXIT_OK, found = (is_found ? lstat(path, &s) : stat(path, &s)) == 0;
    if (found && S_ISDIR(s.st_mode)) {
        folder = opendir(path);
        if (!folder) return cannot_open(path);
        while ((entry = readdir(folder)) != NULL)
            if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
                status |= add_images(p, join_path(p, path, strlen(path), entry->d_name), 1, names);
        closedir(folder);
        return status;
    }
    if (is_found && (!has_image_ending(path) || stat(path, &target) != 0 || !S_ISREG(target.st_mode))) return EXIT_OK;
#else
    (void)is_found;
#endif
    list_add(p, names, path, strlen(path));
    return EXIT_OK;
}

// What the arguments name ("-": the lines of standard input), sorted, less what the index holds. Says how many that are.
static int collect_images(program *p, image_index *ix, list *todo, int *n_known) {
    list all = {NULL, 0, 0};
    int i, status = EXIT_OK;
    for (i = 0; i < p->o.words.n; i++) {
        size_t size = 0;
        char *text = NULL;
        lines l;
        if (strcmp(p->o.words.items[i], "-") != 0) { status |= add_images(p, p->o.words.items[i], 0, &all); continue; }
        text = read_text(p, "-", &size);
        for (l = lines_of("standard input", text, size); next_line(&l);) {
            if (strlen(l.line) != l.size || l.size > MAX_NAME) line_error(&l, "this is no file name");
            if (l.size) status |= add_images(p, l.line, 0, &all);
        }
    }
    if (all.n == 0) exit(fail("there are no images to index (in folders only files .png .jpg .jpeg .ppm .pgm .pnm count)"));
    qsort((void *)all.items, (size_t)all.n, sizeof *all.items, by_text);
    if (ix->names.n) qsort((void *)ix->names.items, (size_t)ix->names.n, sizeof *ix->names.items, by_text);
    for (i = 0; i < all.n; i++) {
        const char *name = all.items[i];
        if ((i && strcmp(name, all.items[i - 1]) == 0) ||
            (ix->names.n && bsearch(&name, (const void *)ix->names.items, (size_t)ix->names.n, sizeof name, by_text))) ++*n_known;
        else list_add(p, todo, name, strlen(name));
    }
    if (*n_known && !p->o.quiet) fprintf(stderr, "astrovl: %s: has %d of these %d images already\n", ix->path, *n_known, all.n);
    return status;
}

static int index_images(program *p, image_index *ix, const list *todo, int n_known) {
    char ok[MAX_BATCH];
    unsigned char *records = (unsigned char *)new_memory(p, (size_t)p->o.batch, 16 + 2 * (size_t)ix->n_dims + MAX_NAME);
    float *rows = new_rows(p, p->o.batch);
    size_t size;
    double start = astrovl_seconds(), rate = 0;
    int i, k, some, added = 0;
    for (i = 0; i < todo->n && !p->stop; i += some) {
        some = todo->n - i < p->o.batch ? todo->n - i : p->o.batch;
        draw_bar(p, "images", i, todo->n, rate);
        added += embed_batch(p, todo->items + i, some, rows, ok);
        for (k = 0, size = 0; k < some; k++)
            if (ok[k]) size += make_record(ix, todo->items[i + k], row_of(p, rows, k), records + size);
        if (size) append_to_index(ix, records, size);
        rate = added / (astrovl_seconds() - start + 1e-9);
    }
    clear_bar(p);
    if (p->o.json) put_json("{index:%s added:%d known:%d unreadable:%d rows:%d images_per_second:%f}\n", ix->path, added, n_known,
                            todo->n - added, ix->names.n + added, rate);
    else printf("%s: %d images added (%.1f/s), %d already there, %d unreadable; %d in all\n", ix->path, added, rate, n_known,
                todo->n - added, ix->names.n + added);
    return added < todo->n ? EXIT_FAILED : EXIT_OK;
}

static int run_index(program *p) {
    list todo = {NULL, 0, 0};
    image_index *ix;
    int status, n_known = 0;
    if (!p->o.out) return usage_error(p->cmd, "into which index? -o FILE");
    open_towers(p, IMAGE_TOWER);
    ix = new_index(p, p->o.out);
    open_index(p, ix);
    status = collect_images(p, ix, &todo, &n_known);
    status |= index_images(p, ix, &todo, n_known);
    fclose(ix->file);
    return status;
}

static int search_index(program *p, image_index *ix, const char *query) {
    int i, k = p->o.best ? p->o.best : 10, n = 0;
    const astrovl_rows rows = {ix->rows, ix->names.n, ix->n_dims};
    float *row = new_rows(p, 1);
    astrovl_hit *hits;
    char ok;
    if (k > ix->names.n) k = ix->names.n;
    hits = (astrovl_hit *)new_memory(p, (size_t)k, sizeof *hits);
    if (!p->o.image) embed_texts(p, &query, 1, row);
    else if (!embed_batch(p, &query, 1, row, &ok)) return EXIT_FAILED;
    if (k) n = astrovl_search(&rows, row, k, p->o.threads, hits, &p->err);
    if (n < 0) return failed(p);
    if (p->o.json) put_json("{%k %s rows:%d hits:[", p->o.image ? "image" : "text", query, ix->names.n);
    for (i = 0; i < n; i++) {
        const char *name = ix->names.items[hits[i].row];
        if (p->o.json) put_json("{score:%f file:%s}", hits[i].score, name);
        else printf("%7.4f  ", hits[i].score), print_safe(stdout, name), putchar('\n');
    }
    if (p->o.json) put_json("]}\n");
    return EXIT_OK;
}

static int run_search(program *p) {
    int n = p->o.words.n, status;
    image_index *ix;
    if ((n == 1) != (p->o.image != NULL)) return usage_error(p->cmd, "%s", p->cmd->wanted);
    open_towers(p, p->o.image ? IMAGE_TOWER : TEXT_TOWER);
    ix = new_index(p, p->o.words.items[0]);
    ix->keep_rows = 1;
    if (!(ix->file = fopen(ix->path, "rb"))) return cannot_open(ix->path);
    if (read_index_header(ix) < INDEX_HEADER) return fail("%s: its header is incomplete; `astrovl index` makes it anew", ix->path);
    read_records(p, ix);
    fclose(ix->file);
    if (ix->torn && !p->o.quiet) fail("%s: passing over an incomplete record at the end; `astrovl index` goes on there", ix->path);
    status = search_index(p, ix, n == 2 ? p->o.words.items[1] : p->o.image);
    free(ix->rows);
    return status;
}

// ==== evaluate =======================================================================================================
// One line of a .jsonl file.
typedef struct sample {
    const char *path, *image;              // the image as seen from here, and as the file names it
    const char *label, *reference;         // caption or class; description, or NULL
    list        features;
    char       *text;                      // what the model says about it; freed with astrovl_free
    int         truth, named, n_found;     // classes (named -1: none); feature words found
    double      semantic;                  // cosine of text and reference; NaN if there is none
} sample;

// The strings of one member of a line's object; anything but `least` to `most` of them is an error.
static list read_member(program *p, const lines *l, const char *key, int least, int most) {
    list strings = {NULL, 0, 0};
    char what[128];
    int i, n = 0;
    char **texts = astrovl_json_strings(l->line, l->size, key, &n, &p->err);
    if (!texts) line_error(l, p->err.message);
    snprintf(what, sizeof what, n ? "\"%s\" is to be one text" : "\"%s\" is missing; a line is {\"image\": FILE, ...}", key);
    if (n < least || n > most) line_error(l, what);
    for (i = 0; i < n; i++) list_add(p, &strings, texts[i], strlen(texts[i]));
    astrovl_free(texts);
    return strings;
}

// Reads a whole set before the long work begins, so that a broken line is said at once.
static sample *read_samples(program *p, const char *path, int vqa, int *n) {
    const char *slash = strrchr(path, '/');
    size_t size = 0, i, n_lines = 1, folder = slash ? (size_t)(slash - path) + 1 : 0;
    char *text = read_text(p, path, &size);
    lines l = lines_of(path, text, size);
    sample *samples, *x;
    for (i = 0; i < size; i++) n_lines += text[i] == '\n';
    samples = (sample *)new_memory(p, n_lines, sizeof *samples);
    for (*n = 0; next_line(&l);) {
        list reference;
        if (strspn(l.line, " \t") == l.size) continue;
        x = &samples[(*n)++];
        x->image = read_member(p, &l, "image", 1, 1).items[0];
        x->label = read_member(p, &l, vqa ? "class" : "caption", 1, 1).items[0];
        if (!*x->image || !*x->label) line_error(&l, "an empty name or text");
        x->path = join_path(p, path, *x->image == '/' ? 0 : folder, x->image);
        if (!vqa) continue;
        reference = read_member(p, &l, "description", 0, 1);
        if (reference.n) x->reference = reference.items[0];
        x->features = read_member(p, &l, "features", 0, 1000000);
    }
    if (*n < 2) exit(fail("%s: two lines at least are wanted", path));
    return samples;
}

// ---- retrieval

typedef struct retrieval {
    int               n;
    astrovl_retrieval of;
    float            *cosines[2];          // [pairs, wrong pairs][n], ascending
} retrieval;

static void print_retrieval(const program *p, const retrieval *r) {
    int i, k, best, n = r->n, width = snprintf(NULL, 0, "floor(k/100 * %d)", n), as_json = p->o.json;
    if (as_json) put_json("{pairs:%d logit_scale:%f contrastive_loss:%f accuracy:[", n, p->info.logit_scale, r->of.loss);
    else printf("%d pairs, logit scale %.4g\ncontrastive loss %.4f (the set as one batch; knowing nothing: ln %d = %.4f)\n\nhow often "
                "is the partner among the best k %%?\n    k  floor(k/100 * %d)  image -> text  text -> image  by chance\n", n,
                p->info.logit_scale, r->of.loss, n, log(n), n);
    for (k = 1; k <= 100; k++) {
        double there = r->of.share[0][k], back = r->of.share[1][k];
        best = (int)((int64_t)k * n / 100);
        if (as_json) put_json("{k_percent:%d best:%d image_to_text:%f text_to_image:%f}", k, best, there, back);
        else if (k == 1 || k == 5 || k == 10 || k == 20 || k == 50)
            printf("%3d %%  %*d  %11.1f %%  %11.1f %%  %7.1f %%%s\n", k, width, best, there * 100, back * 100, 100.0 * best / n,
                   best ? "" : "  (no rank counts: too few pairs)");
    }
    if (as_json) put_json("]");
    else printf("\ncosines          mean   median\n");
    for (i = 0; i < 2; i++) {
        double mean = r->of.mean[i], median = r->of.median[i];
        if (as_json) put_json("%k {mean:%f median:%f sorted:[", i ? "cosines_shuffled" : "cosines_matched", mean, median);
        else printf("%-13s %7.4f  %7.4f\n", i ? "wrong pairs" : "pairs", mean, median);
        for (k = 0; k < n && as_json; k++) put_json("%f", r->cosines[i][k]);
        if (as_json) put_json("]}");
    }
    if (as_json) put_json("}\n");
}

// ---- its plot: two panels of 360 x 270 points (SVG counts y downwards)

typedef struct panel { double left, x0, x1, x_step, y1, y_step; } panel;   // values at the edges; the bottom is 0

static double plot_x(const panel *a, double x) { return a->left + 360 * (x - a->x0) / (a->x1 - a->x0); }
static double plot_y(const panel *a, double y) { return 340 - 270 * y / a->y1; }

static void svg_axes(FILE *f, const panel *a, const char *title, const char *x_label, const char *y_label) {
    double v;
    int i;
    fprintf(f, "<g text-anchor=\"middle\">\n<text x=\"%g\" y=\"52\" font-weight=\"bold\">%s</text>\n<text x=\"%g\" y=\"384\">%s"
            "</text>\n<text transform=\"translate(%g 205) rotate(-90)\">%s</text>\n", a->left + 180, title, a->left + 180, x_label,
            a->left - 46, y_label);
    for (i = 0; (v = a->x0 + i * a->x_step) < a->x1 + a->x_step / 2; i++)
        fprintf(f, "<text x=\"%.1f\" y=\"360\">%.4g</text>\n", plot_x(a, v), fabs(v) < 1e-9 ? 0.0 : v);
    for (i = 0; (v = i * a->y_step) < a->y1 + a->y_step / 2; i++)
        fprintf(f, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">%.4g</text>\n<path d=\"M%g %.1fh360\" stroke=\"%s\"/>\n",
                a->left - 8, plot_y(a, v) + 4, v, a->left, plot_y(a, v), i ? "#ddd" : "#222");
    fprintf(f, "<path d=\"M%g 70V340\" stroke=\"#222\"/>\n</g>\n", a->left);
}

static void svg_legend(FILE *f, double x, double y, const char *style, const char *text) {
    fprintf(f, "<path d=\"M%g %gh26\" %s/>\n<text x=\"%g\" y=\"%g\">%s</text>\n", x, y - 4, style, x + 32, y, text);
}

// The smallest of 1, 2, 5 times a power of ten that cuts a range into at most seven steps.
static double tick_step(double range) {
    double step = 1e-9;
    int i;
    for (i = 0; step * 7 < range && i < 60; i++) step *= i % 3 == 1 ? 2.5 : 2;
    return step;
}

// The right panel: shares of the cosines, in percent.
#define BINS 40
static panel count_cosines(const retrieval *r, double bins[2][BINS]) {
    panel b = {560, 0, 0, 0, 0, 0};
    double low = fmin(r->cosines[0][0], r->cosines[1][0]), high = fmax(r->cosines[0][r->n - 1], r->cosines[1][r->n - 1]), *bin;
    int i;
    b.x_step = tick_step(high - low + 1e-3);
    b.x0 = floor(low / b.x_step) * b.x_step;
    b.x1 = ceil((high + 1e-6) / b.x_step) * b.x_step;
    for (i = 0; i < 2 * r->n; i++) {
        bin = &bins[i % 2][(int)fmin((r->cosines[i % 2][i / 2] - b.x0) / (b.x1 - b.x0) * BINS, BINS - 1)];
        b.y1 = fmax(b.y1, *bin += 100.0 / r->n);
    }
    b.y_step = tick_step(b.y1);
    b.y1 = ceil(b.y1 * 1.25 / b.y_step) * b.y_step;        // room for the legend
    return b;
}

static int save_plot(const char *path, const retrieval *r) {
    static const char *const style[] = {"stroke=\"#1f6fb4\" fill=\"#1f6fb4\"", "stroke=\"#888\" fill=\"#888\"",
        "stroke=\"#c4451c\" fill=\"none\" stroke-dasharray=\"7 3\"", "stroke=\"#888\" fill=\"none\" stroke-dasharray=\"2 4\""};
    double bins[2][BINS] = {{0}};
    const panel a = {70, 0, 100, 20, 100, 20}, b = count_cosines(r, bins);
    int i, k;
    char text[64];
    FILE *f = fopen(path, "wb");
    if (!f) return write_error(path);
    fprintf(f, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"950\" height=\"400\" viewBox=\"0 0 950 400\" fill=\"#222\" "
            "font-size=\"13\" font-family=\"sans-serif\">\n<path d=\"M0 0H950V400H0\" fill=\"#fff\"/>\n<text x=\"475\" y=\"24\" "
            "font-size=\"16\" text-anchor=\"middle\">Retrieval among %d pairs of image and text; contrastive loss %.3f</text>\n",
            r->n, r->of.loss);
    svg_axes(f, &a, "Partner found among the best k %", "k (% of the set)", "accuracy (%)");
    fprintf(f, "<path d=\"M70 340L430 70\" %s/>\n", style[3]);
    svg_legend(f, 270, 325, style[3], "chance");
    svg_axes(f, &b, "Cosines of image and text", "cosine", "pairs (%)");
    for (k = 1; k >= 0; k--) {
        fprintf(f, "<g %s stroke-width=\"2\"><path fill=\"none\" d=\"M", style[2 * k]);
        for (i = 1; i <= 100; i++) fprintf(f, "%s%.1f %.1f", i > 1 ? "L" : "", plot_x(&a, i), plot_y(&a, r->of.share[k][i] * 100));
        fprintf(f, "\"/></g>\n<path %s fill-opacity=\"0.3\" stroke-width=\"1.5\" d=\"M560 340", style[k]);
        for (i = 0; i < BINS; i++) fprintf(f, "V%.1fh9", plot_y(&b, bins[k][i]));
        fputs("V340\"/>\n", f);
        svg_legend(f, 270, 285 + 20 * k, style[2 * k], k ? "image for a text" : "text for an image");
        snprintf(text, sizeof text, "%s (mean %.3f)", k ? "wrong pairs" : "pairs", r->of.mean[k]);
        svg_legend(f, 570, 84 + 20 * k, style[k], text);
    }
    fputs("</svg>\n", f);
    return ferror(f) || fclose(f) != 0 ? write_error(path) : EXIT_OK;
}

static int evaluate_retrieval(program *p, sample *samples, int n) {
    const char **names = (const char **)new_memory(p, (size_t)n, sizeof *names);
    float *images, *texts;
    retrieval r;
    int i;
    open_towers(p, IMAGE_TOWER | TEXT_TOWER);
    images = new_rows(p, n), texts = new_rows(p, n);
    for (i = 0; i < n; i++) names[i] = samples[i].path;
    if (embed_images(p, names, n, images, 0) != EXIT_OK) return fail("nothing is measured, since images are missing");
    for (i = 0; i < n; i++) names[i] = samples[i].label;
    embed_texts(p, names, n, texts);
    r.n = n;
    r.cosines[0] = (float *)new_memory(p, (size_t)n, 2 * sizeof(float));
    r.cosines[1] = r.cosines[0] + n;
    if (astrovl_measure_retrieval(images, texts, n, p->info.n_embd_joint, p->info.logit_scale, r.cosines[0], &r.of, &p->err))
        return failed(p);
    print_retrieval(p, &r);
    return p->o.svg ? save_plot(p->o.svg, &r) : EXIT_OK;
}

// ---- questions about images (AstroLLaVA's benchmark on Galaxy10, arXiv 2504.08583): the model describes each image; what it
// says is held against the image's class, words that should occur, and a reference description

// A set and the sums over it.
typedef struct vqa {
    list    classes;
    sample *samples;
    int     n, right, none, found, features, n_semantic, *confusion;       // [classes][classes + 2]: last none named, and all
    double  semantic;
} vqa;

static void score_sample(program *p, vqa *t, sample *x) {
    const char *texts[2] = {x->text, x->reference};
    float *rows, cosine;
    int i, *named = t->confusion + x->truth * (t->classes.n + 2);
    x->named = astrovl_first_named(x->text, t->classes.items, t->classes.n);
    for (i = 0; i < x->features.n; i++) x->n_found += astrovl_first_named(x->text, &x->features.items[i], 1) == 0;
    x->semantic = strtod("nan", NULL);
    t->right += x->truth == x->named;
    t->none += x->named < 0;
    t->found += x->n_found;
    t->features += x->features.n;
    named[x->named < 0 ? t->classes.n : x->named]++;
    named[t->classes.n + 1]++;
    if (!x->reference || !p->info.has_joint_text) return;
    rows = new_rows(p, 2);
    embed_texts(p, texts, 2, rows);
    astrovl_linear(&cosine, rows, row_of(p, rows, 1), NULL, 1, p->info.n_embd_joint, 1);
    t->semantic += x->semantic = cosine;
    t->n_semantic++;
}

static void print_vqa(int as_json, const vqa *t) {
    int c, i, m = t->classes.n;
    double right = (double)t->right / t->n, found = (double)t->found / t->features, semantic = t->semantic / t->n_semantic;
    if (as_json) {
        put_json("{images:%d accuracy:%f none_named:%d features_found:%f semantic_score:%f classes:[", t->n, right, t->none, found,
                 semantic);
    } else {
        printf("%d images of %d classes\nclass named right   %5.1f %% (%d of %d; %d named none)\n", t->n, m, 100 * right,
               t->right, t->n, t->none);
        if (t->features) printf("feature words found %5.1f %% (%d of %d)\n", 100 * found, t->found, t->features);
        if (t->n_semantic) printf("semantic score      %6.3f (mean of %d)\n", semantic, t->n_semantic);
        printf("\nrow: what it is; column: what the model named, by number\n%29s   right", "");
        for (c = 0; c < m; c++) printf("%5d", c + 1);
        puts(" none");
    }
    for (c = 0; c < m; c++) {
        const int *named = t->confusion + c * (m + 2);
        const char *name = t->classes.items[c];
        double share = (double)named[c] / named[m + 1];
        if (as_json) put_json("{class:%s images:%d accuracy:%f named:[", name, named[m + 1], share);
        else printf("%3d  ", c + 1), print_padded(name, strlen(name), 24), printf("  %5.1f%%", 100 * share);
        for (i = 0; i <= m; i++) as_json ? put_json("%d", named[i]) : (void)printf(named[i] ? "%5d" : "    .", named[i]);
        as_json ? put_json("]}") : (void)putchar('\n');
    }
    if (!as_json) return;
    put_json("] answers:[");
    for (i = 0; i < t->n; i++) {
        const sample *x = &t->samples[i];
        put_json("{image:%s class:%s named:%s features_found:%d semantic_score:%f text:%s}", x->image, x->label,
                 x->named >= 0 && x->named < m ? t->classes.items[x->named] : "none", x->n_found, x->semantic, x->text);
    }
    put_json("]}\n");
}

static int evaluate_vqa(program *p, sample *samples, int n) {
    vqa t = {{NULL, 0, 0}, samples, n, 0, 0, 0, 0, 0, NULL, 0};
    astrovl_image image;
    sample *x;
    open_towers(p, 0);
    for (x = samples; x < samples + n; x++) {
        for (x->truth = 0; x->truth < t.classes.n && strcmp(t.classes.items[x->truth], x->label) != 0; x->truth++) {}
        if (x->truth == t.classes.n) list_add(p, &t.classes, x->label, strlen(x->label));
    }
    t.confusion = (int *)new_memory(p, (size_t)t.classes.n, ((size_t)t.classes.n + 2) * sizeof(int));
    for (x = samples; x < samples + n; x++) {
        draw_bar(p, "images", (int)(x - samples), n, 0);
        astrovl_session_reset(p->session);
        if (load_image(x->path, &image, &p->err) != ASTROVL_OK) exit(failed(p));
        x->text = say(p, &image, 1, ASTROVL_CAPTION_PROMPT);
        astrovl_image_free(&image);
        if (!x->text || g_interrupted) exit(g_interrupted ? EXIT_FAILED : failed(p));
        score_sample(p, &t, x);
    }
    clear_bar(p);
    print_vqa(p->o.json, &t);
    while (n > 0) astrovl_free(samples[--n].text);
    return EXIT_OK;
}

static int run_evaluate(program *p) {
    int n, is_vqa = strcmp(p->o.words.items[0], "vqa") == 0;
    sample *samples;
    if (!is_vqa && strcmp(p->o.words.items[0], "retrieval") != 0) return usage_error(p->cmd, "%s", p->cmd->wanted);
    if (is_vqa && p->o.svg) return usage_error(p->cmd, "--svg belongs to retrieval");
    samples = read_samples(p, p->o.words.items[1], is_vqa, &n);
    return (is_vqa ? evaluate_vqa : evaluate_retrieval)(p, samples, n);
}

// ==== summarize: a language model reads an abstract, and its answer keeps to a form (PAPERCLIP, section 2.3) =========
#define SOME "{\"type\":\"array\",\"minItems\":1,\"maxItems\":5,\"items\":{\"type\":\"string\",\"minLength\":1,\"maxLength\":80}}"
static const char summary_schema[] = "{\"type\": \"object\", \"properties\": {\"objects_and_phenomena\": " SOME ", "
    "\"science_use_cases\": " SOME "}, \"required\": [\"objects_and_phenomena\", \"science_use_cases\"]}";

static const char summary_prompt[] =
    "What follows is the abstract of a proposal to observe with a telescope. Think of the images that it will give. Answer in "
    "JSON with two lists of one to five short entries each. \"objects_and_phenomena\": what the images would show, such as "
    "\"spiral galaxy\" or \"gravitational lens\". \"science_use_cases\": what they would be good for, such as \"measure the "
    "distance to supernovae\". Take from the abstract what is specific; leave out the telescope, its instruments and the proposal.";
static const char relevance_prompt[] =
    "What follows is the abstract of a proposal to observe with a telescope, and a query that names an object or a concept. Would "
    "the observations show what the query names? What is merely related to it does not count. Answer true or false.";
static const char plain_prompt[] =
    "Read this abstract of a proposal to observe with a telescope, and answer in the form that is asked for.";

static int summarize_file(program *p, const char *path) {
    const char *prompt = p->o.prompt ? p->o.prompt : p->o.boolean ? relevance_prompt : p->o.schema || p->o.regex ? plain_prompt :
                         summary_prompt, *query = p->o.query ? p->o.query : "";
    size_t size = 0, room;
    char *abstract = read_text(p, path, &size), *request, *answer;
    if (strlen(abstract) != size) return fail("%s: is no text: it holds zero bytes", path);
    while (size && isspace((unsigned char)abstract[size - 1])) abstract[--size] = 0;
    if (!size) return fail("%s: is empty; an abstract is wanted", path);
    room = strlen(prompt) + size + strlen(query) + 64;
    request = (char *)new_memory(p, room, 1);
    snprintf(request, room, "%s\n\nAbstract: %s%s%s", prompt, abstract, *query ? "\n\nQuery: " : "", query);
    astrovl_session_reset(p->session);
    answer = say(p, NULL, 0, request);
    if (!answer) return fail("%s: %s", path, p->err.message);
    finish_answer(p, p->session, path, p->o.words.n > 1 ? path : NULL, request, answer);
    astrovl_free(answer);
    return g_interrupted ? EXIT_FAILED : EXIT_OK;
}

static int run_summarize(program *p) {
    const char *path = p->o.schema, *schema = p->o.boolean ? "{\"type\": \"boolean\"}" : summary_schema;
    size_t size = strlen(schema);
    int i, status = EXIT_OK;
    astrovl_guide *guide;
    if ((path != NULL) + (p->o.regex != NULL) + p->o.boolean > 1) return usage_error(p->cmd, "one of --schema, --regex, --bool");
    if (p->o.boolean && !p->o.query && !p->o.prompt) return usage_error(p->cmd, "relevant to what? --query TEXT");
    if (p->o.how.max_tokens == 0) p->o.how.max_tokens = 512;
    if (p->o.how.repetition_penalty <= 0) p->o.how.repetition_penalty = 1.1f;        // lists tempt small models to say one thing again
    open_model_and_session(p);
    if (path) schema = read_text(p, path, &size);
    guide = p->o.regex ? astrovl_guide_regex(p->model, p->o.regex, &p->err) : astrovl_guide_schema(p->model, schema, size, &p->err);
    if (!guide) return fail("%s: %s", path ? path : p->o.regex ? "--regex" : "schema", p->err.message);
    p->o.how.guide = guide;
    for (i = 0; i < p->o.words.n && status == EXIT_OK && !p->stop; i++) status = summarize_file(p, p->o.words.items[i]);
    astrovl_guide_free(guide);
    return status;
}

// ==== bench: what is measured, and the machine's own limit for it, in turns, since machines change their speed ========
static int bench_search(program *p) {
    const int n = p->o.rows ? p->o.rows : 1000000, d = p->o.dims ? p->o.dims : 512, rounds = p->o.rounds ? p->o.rounds : 9;
    double seconds[2], ratio, gigabytes = (double)n * d * 2e-9;
    if (astrovl_measure_search(n, d, rounds, p->o.threads, seconds, &p->err)) return failed(p);
    ratio = seconds[0] / seconds[1];
    if (p->o.json) put_json("{rows:%d dims:%d search_seconds:%f read_seconds:%f ratio:%f}\n", n, d, seconds[0], seconds[1], ratio);
    else printf("%d rows of %d float16, medians of %d rounds\n  search, the best 10  %9.2f ms  %6.2f GB/s\n  reading them once    "
                "%9.2f ms  %6.2f GB/s\n  ratio                %9.2f\n", n, d, rounds, seconds[0] * 1e3, gigabytes / seconds[0],
                seconds[1] * 1e3, gigabytes / seconds[1], ratio);
    return EXIT_OK;
}

static void print_pace(int as_json, const char *key, const char *what, int is_bytes, const astrovl_pace *x) {
    const char *type = astrovl_type_name(x->type);
    if (x->n && as_json)
        put_json("%k {n:%d seconds:%f per_second:%f %k %f limit_per_second:%f reached:%f type:%s}", key, x->n, x->seconds,
                 x->n / x->seconds, is_bytes ? "bytes" : "operations", x->work, x->limit, x->reached, type);
    else if (x->n)
        printf("  %-18s %5d %9.3f s %9.1f /s  %8.1f of %6.1f %s %4.0f %%  %s\n", what, x->n, x->seconds, x->n / x->seconds,
               x->work / x->seconds * 1e-9, x->limit * 1e-9, is_bytes ? "GB/s " : "GOP/s", 100 * x->reached, type);
}

static void print_speed(const program *p, const astrovl_speed *x, const astrovl_batch_speed *b, int rounds) {
    const int as_json = p->o.json;
    double together = (double)b->n * b->n_answer / b->seconds, alone = b->n_answer / b->one_seconds;
    if (as_json) put_json("{name:%s rounds:%d", p->info.name, rounds);
    else print_safe(stdout, p->info.name), printf(", medians of %d rounds; at the right: of what the machine allows\n", rounds);
    print_pace(as_json, "image", "one image", 0, &x->image);
    print_pace(as_json, "prompt", "prompt, positions", 0, &x->prompt);
    print_pace(as_json, "answer", "answer, tokens", 1, &x->answer);
    if (x->first_token_seconds > 0) as_json ? put_json("first_token_seconds:%f", x->first_token_seconds) :
                                    (void)printf("  image and question %15.3f s to the first token\n", x->first_token_seconds);
    if (b->n && as_json) put_json("batch:{n:%d prompt:%d tokens:%d per_second:%f alone_per_second:%f ratio:%f kv_caches:%l}", b->n,
                                  b->n_prompt, b->n_answer, together, alone, b->gain, (long long)b->cache_bytes);
    else if (b->n) printf("  %d answers together %15.1f /s, %.2f times the %.1f /s of one alone (%d tokens after %d positions each; "
                          "KV caches %s)\n", b->n, together, b->gain, alone, b->n_answer, b->n_prompt, human_bytes(b->cache_bytes));
    if (as_json) put_json("memory:{peak:%l files:%l kv_cache:%l}}\n", (long long)x->peak_bytes, (long long)x->file_bytes,
                          (long long)x->cache_bytes);
    else printf("  memory%s: at most %s; files %s, KV cache %s\n", b->n ? " for one" : "",
                x->peak_bytes ? human_bytes(x->peak_bytes) : "?", human_bytes(x->file_bytes), human_bytes(x->cache_bytes));
}

// One of the two files, written if it is not there yet. It takes its name when it is whole, so one that opens is.
static void need_synthetic(program *p, const char *folder, int type, int tied, const astrovl_info *sizes) {
    char name[96], *path;
    astrovl_info there;
    astrovl_model *model;
    snprintf(name, sizeof name, "astrovl-%s-%s%s.gguf", sizes->name, sizes->has_vision ? "mmproj-" : "", astrovl_type_name(type));
    path = join_path(p, folder, strlen(folder), name);
    model = astrovl_open(path, NULL, &p->err);
    if (model) astrovl_get_info(model, &there);
    if (!model || strcmp(there.name, sizes->name) != 0) {
        p->started = time(NULL);
        catch_interrupts(1);               // nothing is left behind
        if (astrovl_write_random(path, sizes, (astrovl_type)type, tied, on_progress, p, &p->err)) exit(failed(p));
        catch_interrupts(0);
        clear_bar(p);
    }
    astrovl_close(model);
    fprintf(stderr, "%s: a model of random weights, kept for the next time\n", path);
    list_add(p, &p->o.models, path, strlen(path));
}

// --synthetic NAME[:TYPE]: its files become the model. EXIT_USAGE when there is no such name or type.
static int use_synthetic(program *p) {
    const char *colon = strchr(p->o.synthetic, ':'), *wanted = colon ? colon + 1 : "q4_0", *known;
    const char *folder = p->o.dir ? p->o.dir : getenv("TMPDIR");
    char name[32];
    astrovl_info sizes;
    int type, has_vision, tied;
    snprintf(name, sizeof name, "%.*s", (int)strcspn(p->o.synthetic, ":"), p->o.synthetic);
    for (type = 0; type < N_TYPES; type++)
        if ((known = astrovl_type_name(type)) && strlen(known) == strlen(wanted) && !astrovl_first_named(wanted, &known, 1)) break;
    if (type == N_TYPES || !astrovl_known_sizes(name, &sizes, &tied))
        return usage_error(p->cmd, "--synthetic wants llava-1.5-7b, smollm2-135m or nano, and perhaps :q8_0 or so, not \"%s\"",
                           p->o.synthetic);
    folder = folder && *folder ? folder : "/tmp";
    has_vision = sizes.has_vision, sizes.has_vision = 0;
    need_synthetic(p, folder, type, tied, &sizes);
    sizes.has_vision = has_vision, sizes.has_text = 0;
    if (has_vision) need_synthetic(p, folder, ASTROVL_TYPE_F16, 0, &sizes);
    return EXIT_OK;
}

static int bench_model(program *p) {
    int n_prompt = p->o.n_prompt ? p->o.n_prompt : 620, n_tokens = p->o.n_tokens ? p->o.n_tokens : 32;
    int rounds = p->o.rounds ? p->o.rounds : 3, n = n_prompt + n_tokens;
    astrovl_speed speed;
    astrovl_batch_speed batch = {0, 0, 0, 0, 0, 0, 0};
    astrovl_status status;
    if (n > ASTROVL_DEFAULT_CONTEXT) p->o.ctx = n < p->info.n_ctx_train ? n : p->info.n_ctx_train;
    p->session = new_session(p, ASTROVL_FAST, NULL, NULL);
    p->started = time(NULL);
    p->counting = 1;                       // rounds: drawing a bar for each layer would take time
    status = astrovl_measure_model(p->session, n_prompt, n_tokens, rounds, on_progress, p, &speed, &p->err);
    if (!status && p->info.has_text && p->o.n_batch)       // last, since its memory is not the model's
        status = astrovl_measure_batch(p->session, n_prompt, n_tokens, p->o.n_batch, rounds, on_progress, p, &batch, &p->err);
    if (status) return failed(p);
    clear_bar(p);
    print_speed(p, &speed, &batch, rounds);
    return EXIT_OK;
}

// Fast mode's logits, held against exact mode's.
static int bench_accuracy(program *p, const char *path) {
    size_t size = 0;
    char *text = read_text(p, path, &size);
    int i, n, most = p->o.n_tokens ? p->o.n_tokens : 512;
    int32_t *tokens = encode_text(p, text, size, ASTROVL_ADD_SPECIAL, &n);
    astrovl_accuracy a;
    if (p->info.has_text && most > p->info.n_ctx_train) most = p->info.n_ctx_train;
    if (n > most) n = most;
    if (n < 2) return fail("%s: two tokens at least are wanted", path);
    p->o.ctx = n;
    p->session = new_session(p, ASTROVL_FAST, NULL, NULL);
    p->more[1] = new_session(p, ASTROVL_EXACT, NULL, NULL);
    p->started = time(NULL);
    if (astrovl_measure_accuracy(p->session, p->more[1], tokens, n, &a, &p->err)) return failed(p);
    clear_bar(p);
    if (p->o.json) put_json("{name:%s tokens:%d exact_perplexity:%f", p->info.name, n, a.reference_perplexity);
    else print_safe(stdout, p->info.name),
         printf(", %d tokens: fast mode's logits against exact mode's, whose perplexity is %.5g\n%36s %9s %12s %12s %12s %9s\n", n,
                a.reference_perplexity, "cosine, mean", "least", "difference", "same token", "perplexity", "ratio");
    for (i = 0; i < 2; i++) {
        const astrovl_likeness *x = i ? &a.steps : &a.prompt;
        if (p->o.json) put_json("%k {mean_cosine:%f least_cosine:%f largest_difference:%f same_token:%f perplexity:%f "
                                "perplexity_ratio:%f}", i ? "steps" : "prompt", x->cosine, x->least_cosine, x->difference, x->same,
                                x->perplexity, x->ratio);
        else printf("  %-25s %9.6f %9.6f %12.4g %10.2f %% %12.5g %9.5f\n", i ? "one by one, as answers" : "read together, as prompts",
                    x->cosine, x->least_cosine, x->difference, 100 * x->same, x->perplexity, x->ratio);
    }
    if (p->o.json) put_json("}\n");
    return EXIT_OK;
}

static int run_bench(program *p) {
    const options *o = &p->o;
    const char *kind = o->words.n ? o->words.items[0] : "";
    int is_search = strcmp(kind, "search") == 0, is_accuracy = strcmp(kind, "accuracy") == 0;
    if (o->words.n != is_search + 2 * is_accuracy) return usage_error(p->cmd, "%s", p->cmd->wanted);
    if (is_search && (o->models.n || o->synthetic || o->dir || o->n_prompt || o->n_tokens))
        return usage_error(p->cmd, "bench search takes --rows, --dims and --rounds, no model");
    if (!is_search && (o->rows || o->dims)) return usage_error(p->cmd, "--rows and --dims are for: bench search");
    if (is_search) return bench_search(p);
    if (o->synthetic && o->models.n) return usage_error(p->cmd, "one of --model and --synthetic");
    if (o->synthetic && use_synthetic(p) != EXIT_OK) return EXIT_USAGE;
    open_model(p);
    return is_accuracy ? bench_accuracy(p, o->words.items[1]) : bench_model(p);
}

// ==== version, the list of commands, main ============================================================================
#if defined(__clang__)
#define COMPILER __VERSION__
#elif defined(__VERSION__)
#define COMPILER "gcc " __VERSION__
#else
#define COMPILER "a compiler that does not say which"
#endif
static int run_version(program *p) {
    printf("astrovl %s\ncompiled with %s, %d-bit\nshipped model: %s\n", ASTROVL_VERSION, COMPILER, (int)sizeof(void *) * 8,
           p->shipped[0] ? p->shipped : "not found");
    return EXIT_OK;
}

static const command commands[] = {
    {"caption", CAPTION, run_caption, 1, MANY, "which image?", "caption [OPTIONS] IMAGE...", "describe images",
     "Describes what each image shows, in a sentence or two. Images are PNG, JPEG or PNM files. With several, each line\n"
     "begins with the file's name; one that cannot be read is reported, and the others are still described. --batch N\n"
     "reads the model's weights once for N images instead of N times: the same answers, sooner where a model is large.",
     "  astrovl caption galaxy.png\n  astrovl caption --json *.jpg > captions.jsonl\n"
     "  astrovl caption -m llava-q4_0.gguf -m mmproj.gguf --temperature 0.7 --seed 3 nebula.jpg\n"},
    {"ask", ASK, run_ask, 2, MANY, "an image and a question are wanted", "ask [OPTIONS] IMAGE... \"QUESTION\"",
     "ask a question about an image",
     "Answers a question about an image. With several images the question is put about each in turn, or about all of\n"
     "them at once with --together.",
     "  astrovl ask galaxy.png \"Is there a bar?\"\n  astrovl ask *.png \"What kind of object is this?\"\n"
     "  astrovl ask --together before.png after.png \"What has changed?\"\n"},
    {"chat", CHAT, run_chat, 0, 1, "one image at most; /image shows others later", "chat [OPTIONS] [IMAGE]", "talk about an image",
     "A dialogue: type a question, read the answer, ask on; the model remembers what was said. Lines that begin with a\n"
     "slash are commands: /image FILE, /reset, /help, /quit. Ctrl-C stops an answer. Questions may also come from a\n"
     "pipe, one a line; standard output then has the answers alone. It works with a language model alone, too.",
     "  astrovl chat galaxy.png\n  printf 'What is this?\\nWhich colour is it?\\n' | astrovl chat --quiet galaxy.png\n"
     "  astrovl chat -m smollm2.gguf --prompt \"Why is the sky dark at night?\"\n"},
    {"tokens", TOKENS, run_tokens, 0, 1, "one text is wanted; put it in quotes", "tokens [OPTIONS] [\"TEXT\" | -]",
     "show how a text is cut into tokens",
     "Shows the tokens of a text: id, the piece as the vocabulary spells it, and the bytes it stands for. Without a text (or\n"
     "with -) it is read from standard input, a last newline included. A file with a vocabulary and no weights is enough.",
     "  astrovl tokens \"a barred spiral galaxy\"\n  printf 'M31' | astrovl tokens --ids -m llama-2.gguf\n"
     "  astrovl tokens --ids \"M31\" | astrovl tokens --decode\n"},
    {"inspect", INSPECT, run_inspect, 0, MANY, "", "inspect [OPTIONS] [MODEL...]", "show what is in model files",
     "Lists the metadata and the tensors of GGUF files with their types, shapes and sizes, and says what the files make\n"
     "up together. Without a file: the shipped model. Shapes are written as numpy does, the slowest dimension first.\n"
     "--check says instead which commands can be used with the files together, or what they lack (exit status 1).",
     "  astrovl inspect model.gguf mmproj.gguf\n  astrovl inspect --json model.gguf | python3 -m json.tool\n"
     "  astrovl inspect --check model.gguf mmproj.gguf\n"},
    {"quantize", QUANTIZE, run_quantize, 3, 3, "wanted: a GGUF file, the one to be written, and a type such as q4_k_m",
     "quantize [OPTIONS] IN OUT TYPE", "make a model file smaller",
     "Writes a copy of a GGUF file with its weight matrices in another type, which is one of\n"
     "  f32 f16 bf16 q8_0 q6_k q5_k q5_1 q5_0 q4_k q4_1 q4_0 q3_k q2_k   all matrices alike, in 32 to 2.6 bits a weight\n"
     "  q5_k_m q5_k_s q4_k_m q4_k_s q3_k_l q3_k_m q3_k_s                 llama.cpp's mixes: more bits where they count\n"
     "Mixes keep the output matrix in Q6_K, and give attn_v, ffn_down (q3_k: attn_output) in some or all blocks a larger type.\n"
     "Vectors, norms, position and patch embeddings stay as they are. Rows that are no multiple of 256 (32) take a type of\n"
     "smaller blocks, or F16. Start from F16 or F32: what is quantised already loses again. OUT may be IN. CLIP and mmproj\n"
     "files can be quantised as well. q8_0 is hardly told from the original; q4_k_m suits large language models.",
     "  astrovl quantize llava-f16.gguf llava-q4_k_m.gguf q4_k_m\n  astrovl quantize mmproj-f16.gguf mmproj-q8_0.gguf q8_0\n"},
    {"trace", TRACE, run_trace, 1, 2, "an image and a prompt are wanted (or a prompt alone)",
     "trace [OPTIONS] [IMAGE] \"PROMPT\" -o DIR | --hash", "save all that is computed for an answer",
     "Runs one question in exact arithmetic and saves every intermediate tensor of the vision tower, the projector and the\n"
     "language model as a .npy file, named as transformers names the module; the next time (once a token) as NAME.call2.npy\n"
     "and so on. DIR/index.tsv lists the files in the order of computation. With --hash nothing is saved: each line has a\n"
     "tensor's FNV-1a hash, name and shape, the last two a hash over them all and the answer: the same on every machine.",
     "  astrovl trace galaxy.png \"Is there a bar?\" -o /tmp/trace\n"
     "  python3 -c 'import numpy; print(numpy.load(\"/tmp/trace/model.norm.npy\").shape)'\n"
     "  astrovl trace galaxy.png \"Is there a bar?\" --hash --max-tokens 8 | tail -2\n"},
    {"score", SCORE, run_score, 1, MANY, "which image?", "score [OPTIONS] IMAGE... --text T [--text T...]",
     "say how well texts fit images",
     "Embeds images and texts with the model's two towers (CLIP, PAPERCLIP) and prints for each pair the cosine, and for each\n"
     "image the probability of each text among those given: softmax(logit_scale * cosine).",
     "  astrovl score galaxy.png --text \"a spiral galaxy\" --text \"a globular cluster\"\n"
     "  astrovl score --json *.png --text \"a comet\" --text \"no comet\" > scores.jsonl\n"},
    {"describe", DESCRIBE, run_describe, 1, MANY, "which image?", "describe [OPTIONS] IMAGE...",
     "find the texts of a list that fit an image best",
     "Prints the descriptions that come closest to each image, with cosine and probability. The list built in has three groups:\n"
     "classes of objects, phenomena, and what images are used for in science; each is ranked by itself.",
     "  astrovl describe galaxy.png\n  astrovl describe --labels classes.txt -k 1 *.png\n"},
    {"index", INDEX, run_index, 1, MANY, "which images? folders, files, or - for names on standard input",
     "index [OPTIONS] DIR|FILE|-... -o INDEX", "embed folders of images, to search them",
     "Embeds images and writes their rows to an index file. Folders are walked to the bottom, sorted by name; an image there is\n"
     "told by its ending (.png .jpg .jpeg .ppm .pgm .pnm), and links to folders are not followed. With - file names are read\n"
     "from standard input, one a line. Images that are in the index by name are passed over: a run that was stopped or killed\n"
     "goes on where it ended (at most the images of the pass in flight are lost), and new images can be added later. Images\n"
     "that cannot be read are reported and left out; the exit status is then 1. An index belongs to the model that made it.",
     "  astrovl index previews/ -o previews.avl\n  find /data -name '*_drz.jpg' | astrovl index - -o previews.avl --batch 8\n"},
    {"search", SEARCH, run_search, 1, 2, "an index and a query are wanted: a text in quotes, or --image FILE",
     "search [OPTIONS] INDEX \"QUERY\" | --image FILE", "find the images that fit a text",
     "Prints the images of an index that fit a text best, or resemble an image most: cosine and name. All are compared.",
     "  astrovl search previews.avl \"strong lensing arcs\"\n  astrovl search previews.avl --image m51.jpg -k 20 --json\n"},
    {"embed", EMBED, run_embed, 0, MANY, "", "embed [OPTIONS] IMAGE... | --text T...", "print embeddings for other programs",
     "Prints {\"image\": ..., \"embedding\": [...]} (or \"text\"), a line each, divided by their length (see --raw), with digits\n"
     "enough to read back the same float32. With -o the rows go to a .npy file for numpy, FAISS and others: float32, [n][d], in\n"
     "the order of the arguments; it is written only if all of them could be embedded.",
     "  astrovl embed *.png > rows.jsonl\n  astrovl embed *.png -o rows.npy\n"
     "  astrovl embed --text \"a planetary nebula\" -o query.npy\n"},
    {"evaluate", EVALUATE, run_evaluate, 2, 2, "wanted: retrieval PAIRS.jsonl, or vqa SET.jsonl",
     "evaluate [OPTIONS] retrieval PAIRS.jsonl | vqa SET.jsonl", "measure a model on data of yours",
     "retrieval: each line is {\"image\": FILE, \"caption\": TEXT}. Prints contrastive loss, how often an image's caption (a\n"
     "caption's image) is among the best k percent, and the cosines of pairs and of wrong pairs, as PAPERCLIP defines them.\n"
     "vqa: each line is {\"image\": FILE, \"class\": NAME, \"description\": TEXT, \"features\": [WORD, ...]}, the last two\n"
     "optional. The model describes each image; counted are the class it names, the feature words it uses, and how close its\n"
     "text tower sees text and reference (AstroLLaVA's benchmark). Files are named as seen from the .jsonl file's folder.",
     "  astrovl evaluate retrieval pairs.jsonl --svg retrieval.svg\n  astrovl evaluate vqa galaxies.jsonl --json > result.json\n"},
    {"summarize", SUMMARIZE, run_summarize, 1, MANY, "which abstract? a text file, or - for standard input",
     "summarize [OPTIONS] FILE|-...", "turn an abstract into JSON",
     "A language model reads a text and answers in a form that it cannot leave: by default the schema that PAPERCLIP trains on,\n"
     "{\"objects_and_phenomena\": [1 to 5 texts], \"science_use_cases\": [1 to 5 texts]}. --schema takes another JSON schema,\n"
     "--regex a pattern; --bool makes it judge whether the observations would show what --query names. What the model is told\n"
     "to do can be replaced with --prompt. The shipped model is too small for sensible content; take a larger one with -m.",
     "  astrovl summarize -m instruct-model.gguf abstract.txt\n  astrovl summarize --bool --query \"strong lensing\" abstract.txt\n"
     "  astrovl summarize --regex '(galaxy|star|planet)' --prompt \"What is it about?\" - < abstract.txt\n"},
    {"bench", BENCH, run_bench, 0, 2, "wanted: bench, bench search, or bench accuracy TEXTFILE", "bench [OPTIONS] [search | accuracy TEXTFILE]", "measure how fast a model is here",
     "Measures a model, and what this machine could do at most, in turns: encoding one image, reading a prompt, writing after it.\n"
     "The first two are bound by arithmetic. Their operations (two for each product in matrices and attention) a second are held\n"
     "against what the processor does in registers alone with the instruction in use. Writing is bound by memory: the weights that\n"
     "each token needs, and the keys and values before it, are held against merely reading weights, done after each token, since a\n"
     "shared machine's memory may be twice as fast a second later. Tokens are fixed, so answers do not matter: --synthetic makes\n"
     "files of random weights in the shapes of known models. The KV cache is part of the peak memory, files as far as they were\n"
     "read. ASTROVL_ISA=avx2 (portable, avx_vnni, avx512; neon) in the environment measures simpler kernels.\n"
     "Last, --batch answers are written together, as caption --batch does, and one alone, token by token in turns, each after\n"
     "--prompt positions that are made up: the ratio is that of the tokens a second.\n"
     "search: finds the best 10 of random rows in memory, and reads the same memory once, in turns; prints medians and ratio.\n"
     "accuracy: reads a text's first tokens in exact and in fast mode, in that together and one by one, and compares the logits at\n"
     "each: their cosine (mean, least), the largest difference, how often the likeliest token is the same, and the perplexity.",
     "  astrovl bench\n  astrovl bench -m llava-q4_k_m.gguf -m mmproj.gguf --rounds 5\n"
     "  astrovl bench --synthetic llava-1.5-7b:q8_0 --dir /data --json\n  astrovl bench search --rows 200000 --dims 768\n"
     "  astrovl bench accuracy -m smollm2-q8_0.gguf README.md --tokens 1024\n"},
    {"version", VERSION, run_version, 0, 0, "no arguments are wanted", "version", "print the version",
     "Prints the version, the compiler it was built with, and where the shipped model lies.", "  astrovl version\n"},
};
enum { N_COMMANDS = (int)(sizeof commands / sizeof *commands) };

static void print_overview(FILE *out) {
    int i;
    fprintf(out, "astrovl %s: looks at astronomical images and says what it sees.\n\n"
            "Usage: astrovl COMMAND [OPTIONS] ...\n\nCommands:\n", ASTROVL_VERSION);
    for (i = 0; i < N_COMMANDS; i++) fprintf(out, "  %-9s %s\n", commands[i].name, commands[i].summary);
    fprintf(out, "\nastrovl COMMAND --help describes a command and its options. For a start:\n  astrovl caption test/images/*\n");
}

static const command *find_command(const char *name) {
    int i;
    for (i = 0; i < N_COMMANDS; i++)
        if (strcmp(commands[i].name, name) == 0) return &commands[i];
    return NULL;
}

// A program started without standard streams would get its files numbered 0 to 2, and print into them.
static void occupy_standard_streams(void) {
#if !defined(_WIN32)
    int fd;
    while ((fd = open("/dev/null", O_RDONLY)) >= 0 && fd <= 2) {}
    if (fd > 2) close(fd);
#endif
}

// Runs a command with room for every argument in each list.
static int run_command(program *p, const command *c, int argc, char **argv) {
    list *lists[4] = {&p->o.models, &p->o.stop, &p->o.words, &p->o.texts};
    int i, status;
    p->cmd = c;
    p->o.n_batch = 8;
    p->o.how.on_text = on_text;
    p->o.how.user = p;
    for (i = 0; i < 4; i++) lists[i]->items = (const char **)new_memory(p, (size_t)argc + 1, sizeof(const char *));
    status = parse_options(c, &p->o, argc, argv);
    p->o.how.stop = p->o.stop.items;
    p->o.how.n_stop = p->o.stop.n;
    p->show_progress = !p->o.quiet && is_terminal(2);
    if (status == EXIT_OK && p->o.help) print_command_help(c);
    else if (status == EXIT_OK && (p->o.words.n < c->least || p->o.words.n > c->most)) status = usage_error(c, "%s", c->wanted);
    else if (status == EXIT_OK) status = c->run(p);
    for (i = 1; i < MAX_TURNS; i++) astrovl_session_free(p->more[i]);
    astrovl_session_free(p->session);
    astrovl_close(p->model);
    return status;
}

int main(int argc, char **argv) {
    static program p;        // static: it starts as zeros, and is large for a small stack
    const char *name = argc > 1 ? argv[1] : "";
    int is_help = strcmp(name, "help") == 0 || strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0, status = EXIT_OK;
    const command *c = find_command(is_help && argc > 2 ? (name = argv[2]) : name);
    occupy_standard_streams();
#if defined(SIGPIPE)
    signal(SIGPIPE, SIG_IGN);              // a reader that leaves is a failed write, handled where it happens
#endif
    p.safe_output = is_terminal(1);
    find_shipped_model(&p, argv[0]);
    if (c && is_help) print_command_help(c);
    else if (c) status = run_command(&p, c, argc - 2, argv + 2);
    else if (strcmp(name, "--version") == 0) printf("astrovl %s\n", ASTROVL_VERSION);
    else if (argc == 2 && is_help) print_overview(stdout);
    else if (argc < 2) print_overview(stderr), status = EXIT_USAGE;
    else status = usage_error(NULL, "there is no command \"%s\"", name);
    flush_output(&p);
    return p.stop && status == EXIT_OK ? EXIT_FAILED : status;
}
