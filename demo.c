// demo.c: the `astrovl` program. It captions images, answers questions about them, talks about them, and shows what
// happens inside the model: tokens, tensors, every intermediate result. It scores images against texts, searches
// folders of them, turns abstracts into JSON and quantizes models. It uses the public API of astrovl.h only.
//
//     cc -O2 -o astrovl demo.c -lm -pthread
//     ./astrovl --help
//
// From top to bottom: printing, options, running the model, one function per command, main.

#if (defined(__linux__) || defined(__wasi__)) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE 1        // readlink, also when compiled with -std=c99
#endif
#define _FILE_OFFSET_BITS 64     // index files above 2 GB, on 32-bit machines too

#define ASTROVL_IMPLEMENTATION
#include "astrovl.h"

#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(_WIN32)
#include <direct.h>
#include <io.h>
#include <share.h>
#include <signal.h>
#define SLASHES               "/\\"
#define make_folder(path)     _mkdir(path)
#define is_terminal(fd)       _isatty(fd)
#define open_to_append(path)  _fsopen(path, "ab+", _SH_DENYWR)
#define lock_file(f)          0                            // _SH_DENYWR has done it
#define write_file(f, p, n)   _write(_fileno(f), p, (unsigned)(n))
#define cut_file(f, size)     _chsize_s(_fileno(f), (long long)(size))
#define sync_file(f)          _commit(_fileno(f))
#define strcasecmp            _stricmp
#define strncasecmp           _strnicmp
#define CREATE_MODE           "wb"
#else
#include <dirent.h>
#include <fcntl.h>
#include <strings.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#define SLASHES               "/"
#define make_folder(path)     mkdir(path, 0777)
#define is_terminal(fd)       isatty(fd)
#define open_to_append(path)  fopen(path, "ab+")
#ifdef __wasi__                            // has neither locks nor signals
#define lock_file(f)          0
#define catch_interrupts(on)  (void)(on)
typedef int sig_atomic_t;
#else
#include <signal.h>
#define lock_file(f)          flock(fileno(f), LOCK_EX | LOCK_NB)
#endif
#define write_file(f, p, n)   write(fileno(f), p, n)
#define cut_file(f, size)     ftruncate(fileno(f), (off_t)(size))
#define sync_file(f)          fsync(fileno(f))
#define CREATE_MODE           "wbx"                        // x: fails if the file exists
#if !defined(ASTROVL_NO_THREADS) && !defined(__wasi__)
#include <pthread.h>
#define HAS_THREADS           1
#endif
#endif

#ifndef ASTROVL_DATA_DIR
#define ASTROVL_DATA_DIR "/usr/local/share/astrovl"   // where `make install` puts the shipped model; the Makefile says
#endif
#define SHIPPED_MODEL "astrovl-tiny.gguf"
#define LABELS        "labels.txt"

enum { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_USAGE = 2 };
// ==== Printing =======================================================================================================
#define NO_UTF8 0x110000u        // what utf8_next calls a byte that begins no character

// Reads one character of UTF-8 from at least one byte. Returns its length, 1 for NO_UTF8.
static size_t utf8_next(const char *text, size_t size, unsigned *code) {
    static const unsigned smallest[5] = {0, 0, 0x80, 0x800, 0x10000};   // longer spellings than needed are not UTF-8
    const unsigned char *s = (const unsigned char *)text;
    const size_t n = s[0] < 0x80 ? 1 : s[0] < 0xC0 ? 0 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : s[0] < 0xF8 ? 4 : 0;
    size_t i = 1;
    for (*code = n > 1 ? s[0] & 0x7Fu >> n : s[0]; i < n && i < size && (s[i] & 0xC0) == 0x80; i++)
        *code = *code << 6 | (s[i] & 0x3Fu);
    if (i == n && *code >= smallest[n] && (*code < 0xD800 || *code >= 0xE000) && *code < NO_UTF8) return n;
    *code = NO_UTF8;
    return 1;
}

static int is_control(unsigned code) { return code < 0x20 || (code >= 0x7F && code < 0xA0); }

// Text with nothing in it that drives a terminal. quoted: as a JSON string, control codes escaped; otherwise they are
// dropped, except newline and tab.
static void print_string(FILE *out, const char *text, size_t size, int quoted) {
    unsigned code;
    if (quoted) fputc('"', out);
    for (size_t n; size; text += n, size -= n) {
        n = utf8_next(text, size, &code);
        if (code == NO_UTF8) fputs("\xEF\xBF\xBD", out);               // U+FFFD, the replacement character
        else if (quoted && (code == '"' || code == '\\')) fprintf(out, "\\%c", (char)code);
        else if (quoted && (code == '\n' || code == '\t')) fputs(code == '\n' ? "\\n" : "\\t", out);
        else if (quoted && is_control(code)) fprintf(out, "\\u%04x", code);
        else if (!is_control(code) || code == '\n' || code == '\t') fwrite(text, 1, n, out);
    }
    if (quoted) fputc('"', out);
}
static void print_safe(FILE *out, const char *text) { print_string(out, text, strlen(text), 0); }

// Standard output gets either JSON or plain text. Commands write both: put_json prints nothing where plain text is
// wanted, and put_plain, put_padded and put_line print nothing where JSON is.
static int g_json;
#define put_plain(...) (g_json ? (void)0 : (void)printf(__VA_ARGS__))

// Plain text, with blanks up to a width (wide characters counted as one).
static void put_padded(const char *text, size_t size, int width) {
    unsigned code;
    if (g_json) return;
    print_string(stdout, text, size, 0);
    for (size_t at = 0; at < size; width--) at += utf8_next(text + at, size - at, &code);
    printf("%*s", width > 0 ? width : 0, "");
}
static void put_line(const char *text) { put_padded(text, strlen(text), 0), put_plain("\n"); }

static int begins(const char *text, const char *start) { return strncmp(text, start, strlen(start)) == 0; }

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
    if (!(value - value == 0)) { fputs("null", out); return; }
    for (int digits = 6; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, value);
        double back = strtod(text, NULL);
        if (is_float32 ? (float)back == (float)value : !(back < value || back > value)) break;
    }
    fputs(strcmp(text, "-0") == 0 ? "-0.0" : text, out);      // JSON readers take -0 for an integer
}

// "577 x 1024", slowest dimension first
static const char *shape_text(const int64_t *shape, int n_dims, const char *between) {
    static char text[128];
    int at = 0;
    text[0] = 0;
    for (int i = 0; i < n_dims && at < 100; i++)
        at += snprintf(text + at, 128 - (size_t)at, "%s%lld", i ? between : "", (long long)shape[i]);
    return text;
}

// JSON: brackets as they stand, "word:" a key, %k a key, %s a text, %S a text and its size, %d an int, %l a long long,
// %f a number in float32's digits, %b a flag, %- what the caller prints next. Commas and quotes are put in:
// put_json("{name:%s sizes:[%d %d]}\n", "x", 1, 2)      With ~ in front it is plain text: name "x", sizes [1, 2]
static void put_json(const char *f, ...) {
    static int comma;          // the next entry has one before it
    const int plain = *f == '~';
    va_list args;
    if (plain == g_json) return;
    va_start(args, f);
    for (f += plain; *f; f++) {
        if (*f == ' ') continue;
        if (comma && !strchr("}]\n", *f)) fputs(", ", stdout);
        comma = !strchr("{[\n", *f);
        if (strchr("{[}]\n", *f)) {
            putchar(*f);
        } else if (*f != '%') {
            const size_t size = strcspn(f, ":");
            print_string(stdout, f, size, !plain);
            f += size;
            fputs(plain ? " " : ": ", stdout);
            comma = 0;
        } else if (strchr("ksS", *++f)) {
            const char *text = va_arg(args, const char *);
            print_string(stdout, text, *f == 'S' ? va_arg(args, size_t) : strlen(text), 1);
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
       INDEX = 512, SEARCH = 1024, EMBED = 2048, EVALUATE = 4096, SUMMARIZE = 8192, QUANTIZE = 16384,
       SPEAK = CAPTION | ASK | CHAT | SUMMARIZE, GENERATE = SPEAK | TRACE, ALL = 32767,
       FAST = ALL & ~(TOKENS | INSPECT | VERSION),           // those that compute
       MAX_TURNS = 64 };                                     // of caption --batch
typedef struct list { const char **items; int n, capacity; } list;
typedef struct options {
    list        models, stop, texts, words;              // words: the arguments that are no options
    int         threads, exact, ctx, together, json, quiet, help;
    int         ids, special, clip, decode, full, hash, best, batch, raw, boolean, check;
    astrovl_generation how;                              // the answers'
    const char *prompt, *out, *labels, *image, *svg, *schema, *regex, *query;
    int         chat_template;
} options;
typedef enum option_kind { FLAG, INTEGER, SEED, NUMBER, TEXT, TEXTS, TEMPLATE } option_kind;
typedef struct option_spec {
    const char *name;
    char        letter;
    option_kind kind;
    size_t      field;                                   // where in `options`
    double      low, high;
    unsigned    commands;                                // that have it
    const char *value, *help;
} option_spec;

// Options of each kind: name, letter, field, (least and largest value,) commands, (name of the value,) help
#define STRING(name, letter, kind, field, commands, value, help) \
    {name, letter, kind, offsetof(options, field), 0, 0, commands, value, help}
#define ON(name, letter, field, commands, help) STRING(name, letter, FLAG, field, commands, NULL, help)
#define WHOLE(name, letter, field, low, high, commands, help) \
    {name, letter, INTEGER, offsetof(options, field), low, high, commands, "N", help}
#define REAL(name, letter, field, high, help) \
    {name, letter, NUMBER, offsetof(options, field), 0, high, GENERATE, "X", help}
static const option_spec option_table[] = {
    STRING("model", 'm', TEXTS, models, ALL & ~(VERSION | QUANTIZE), "FILE", "a GGUF file; again for more parts"),
    STRING("out", 'o', TEXT, out, TRACE, "DIR", "the folder that the .npy files go to (made if missing)"),
    STRING("out", 'o', TEXT, out, INDEX, "FILE", "the index; one that exists is continued"),
    STRING("out", 'o', TEXT, out, EMBED, "FILE", "write the rows to a .npy file instead of printing them as JSON"),
    STRING("text", 0, TEXTS, texts, SCORE | EMBED, "TEXT", "a text; may be given several times"),
    STRING("labels", 'l', TEXT, labels, DESCRIBE, "FILE", "texts to choose from, one a line; '#' begins a comment"),
    STRING("image", 'i', TEXT, image, SEARCH, "FILE", "search for what resembles this image instead of a text"),
    WHOLE("best", 'k', best, 1, 1000000000, DESCRIBE | SEARCH, "print the N best (default: 5 of each group, 10 hits)"),
    WHOLE("batch", 'b', batch, 1, 256, INDEX | EMBED | EVALUATE, "images in one pass (default 4)"),
    WHOLE("batch", 'b', batch, 1, MAX_TURNS, CAPTION, "describe N images together, which is faster (default 1)"),
    ON("raw", 0, raw, EMBED, "rows as the towers give them, not divided by their length"),
    STRING("svg", 0, TEXT, svg, EVALUATE, "FILE", "retrieval: plot accuracy and cosines into this file"),
    STRING("schema", 0, TEXT, schema, SUMMARIZE, "FILE", "the answer is JSON of this schema, not the paper's"),
    STRING("regex", 0, TEXT, regex, SUMMARIZE, "PATTERN", "the answer matches this regular expression"),
    ON("bool", 0, boolean, SUMMARIZE, "judge: the answer is true or false; see --query"),
    STRING("query", 0, TEXT, query, SUMMARIZE, "TEXT", "--bool: would they show this object or concept?"),
    STRING("prompt", 'p', TEXT, prompt, SUMMARIZE, "TEXT", "the instruction before the abstract (default: our own)"),
    ON("hash", 0, hash, TRACE, "write no files; print a hash of each tensor and one of all"),
    ON("together", 0, together, ASK, "ask once about all the images instead of once about each"),
    STRING("prompt", 'p', TEXT, prompt, CHAT, "TEXT", "say this, print the answer and leave"),
    ON("ids", 0, ids, TOKENS, "print the ids alone, on one line"),
    ON("special", 0, special, TOKENS, "add the tokens that begin (and end) a text; take \"<s>\" as the token"),
    ON("clip", 0, clip, TOKENS, "print the ids by the vocabulary of CLIP's text tower (with its --special)"),
    ON("decode", 0, decode, TOKENS, "the other way: the text is ids, print what they spell"),
    ON("full", 0, full, INSPECT, "print long arrays and strings whole"),
    ON("check", 0, check, INSPECT, "say whether the files together can be run, or what they lack"),
    WHOLE("max-tokens", 'n', how.max_tokens, 1, 1000000, GENERATE, "at most N tokens (256; trace 1, summarize 512)"),
    REAL("temperature", 't', how.temperature, 100, "0: the likeliest token (default); 1: by the model's odds"),
    WHOLE("top-k", 0, how.top_k, 0, 1000000000, GENERATE, "draw from the N likeliest tokens (default 0: all)"),
    REAL("top-p", 0, how.top_p, 1, "draw from the likeliest with probability X together (default 1: all; 0: one)"),
    REAL("min-p", 0, how.min_p, 1, "drop tokens less likely than X times the likeliest (default 0)"),
    REAL("repetition-penalty", 0, how.repetition_penalty, 100, "above 1: avoid recent tokens (else 1 or 1.1)"),
    STRING("seed", 's', SEED, how.seed, GENERATE, "N", "the draws' seed: the same gives the same text (default 0)"),
    STRING("stop", 0, TEXTS, stop, GENERATE, "TEXT", "end the answer before this text; may be given several times"),
    STRING("system", 0, TEXT, how.system, GENERATE, "TEXT", "the system prompt (default: the template's; \"\": none)"),
    STRING("template", 0, TEMPLATE, chat_template, GENERATE, "NAME", "the prompt's form (default: as the file says)"),
    WHOLE("ctx", 'c', ctx, 1, 16777216, GENERATE, "tokens a conversation may hold (default: the model's, to 4096)"),
    WHOLE("threads", 'j', threads, 1, ASTROVL_MAX_THREADS, FAST, "processors to use (default: all)"),
    ON("exact", 0, exact, FAST & ~(TRACE | QUANTIZE), "arithmetic with the same bits on every machine; slower"),
    ON("json", 0, json, ALL & ~(TRACE | VERSION), "print JSON, an object a line for each answer or failure"),
    ON("quiet", 'q', quiet, FAST, "no timings and no progress on standard error"),
    ON("help", 'h', help, ALL, "this page"),
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
// Says what is wrong with the command line and where to read on. Its value is EXIT_USAGE.
#define usage_error(c, ...) \
    (print_around("astrovl", c, ": "), fprintf(stderr, __VA_ARGS__), print_around("\nTry: astrovl", c, " --help\n"))

// Stores one option's value; `text` is NULL for a flag.
static int set_option(const command *c, options *o, const option_spec *spec, const char *text) {
    const char *digits = spec->kind == NUMBER ? "0123456789." : "0123456789";
    void *field = (char *)o + spec->field;
    switch (spec->kind) {
    case FLAG: *(int *)field = 1; return EXIT_OK;
    case TEXT: *(const char **)field = text; return EXIT_OK;
    case TEXTS: ((list *)field)->items[((list *)field)->n++] = text; return EXIT_OK;
    case TEMPLATE:
        if ((*(int *)field = astrovl_template_from_name(text)) >= 0) return EXIT_OK;
        usage_error(c, "no template is called \"%s\"", text);
        fputs("Templates: auto, " ASTROVL_TEMPLATE_NAMES "\n", stderr);
        return EXIT_USAGE;
    default: break;
    }
    errno = 0;
    const uint64_t whole = spec->kind == NUMBER ? 0 : strtoull(text, NULL, 10);
    char *end;
    const double x = strtod(text, &end);   // the program never calls setlocale, so a point is a point in any language
    const int is_number = *text && !text[strspn(text, digits)] && !*end && !errno;
    if (!is_number && spec->kind == SEED)
        return usage_error(c, "--%s wants a whole number below 2^64, not \"%s\"", spec->name, text);
    if (!is_number || !(x >= spec->low) || (x > spec->high && spec->kind != SEED))
        return usage_error(c, "--%s wants a %s from %.10g to %.10g, not \"%s\"", spec->name,
                           spec->kind == INTEGER ? "whole number" : "number", spec->low, spec->high, text);
    if (spec->kind == SEED) *(uint64_t *)field = whole;
    else if (spec->kind == INTEGER) *(int *)field = (int)whole;
    else *(float *)field = field == &o->how.top_p && x <= 0 ? FLT_MIN : (float)x;   // the header takes 0 for all
    return EXIT_OK;
}

// The option that an argument ("--seed", "--seed=7", "-s", "-s7") names for this command, or NULL. *value: "7" or NULL
static const option_spec *find_option(const command *c, const char *argument, const char **value) {
    const int is_long = argument[1] == '-';
    const char *name = argument + 1 + is_long;
    size_t length = is_long ? strcspn(name, "=") : 1;
    *value = name[length] ? name + length + is_long : NULL;
    for (int i = 0; i < N_OPTIONS; i++) {
        const option_spec *spec = &option_table[i];
        if (!(spec->commands & c->bit)) continue;
        if (is_long && strlen(spec->name) == length && memcmp(spec->name, name, length) == 0) return spec;
        if (!is_long && spec->letter == *name) return spec;
    }
    return NULL;
}

// Sorts the arguments behind the command's name into options and words. "--" ends the options, "-" is a word.
static int parse_options(const command *c, options *o, int argc, char **argv) {
    int only_words = 0, status = EXIT_OK;
    for (int i = 0; i < argc && status == EXIT_OK; i++) {
        const char *value;
        if (only_words || argv[i][0] != '-' || !argv[i][1]) { o->words.items[o->words.n++] = argv[i]; continue; }
        if ((only_words = strcmp(argv[i], "--") == 0) != 0) continue;
        const option_spec *spec = find_option(c, argv[i], &value);
        if (!spec) return usage_error(c, "there is no option %s", argv[i]);
        if (spec->kind == FLAG && value) return usage_error(c, "--%s takes no value", spec->name);
        if (spec->kind != FLAG && !value && !(value = argv[++i]))        // behind the last argument stands NULL
            return usage_error(c, "--%s wants a value: --%s %s", spec->name, spec->name, spec->value);
        status = set_option(c, o, spec, value);
    }
    return status;
}

static void print_command_help(const command *c) {
    printf("Usage: astrovl %s%s%s\n\n%s\n\nOptions:\n", c->name, *c->usage ? " [OPTIONS] " : "", c->usage, c->about);
    for (int i = 0; i < N_OPTIONS; i++) {
        const option_spec *spec = &option_table[i];
        const char letter[] = {'-', spec->letter, ',', 0};
        if (!(spec->commands & c->bit)) continue;
        printf("  %-3s --%s %-*s %s\n", spec->letter ? letter : "", spec->name, 20 - (int)strlen(spec->name),
               spec->value ? spec->value : "", spec->help);
        if (spec->kind == TEMPLATE) printf("  auto, %s\n", ASTROVL_TEMPLATE_NAMES);
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
    char               labels[4096];       // and that of the labels that `describe` chooses from
    int                safe_output;        // standard output is a terminal: strip control codes
    int                show_progress;      // standard error is one, and nobody asked for quiet
    int                bar_drawn;
    int                counting;           // the bar counts images, not the layers of each; answers are not printed
    int                stop;               // output cannot be written: end the work
    time_t             started;            // the turn in progress
    union block       *memory;             // a chain of what new_memory gave
};

// Set by Ctrl-C while an answer is computed: a signal handler has no other way to say something.
static volatile sig_atomic_t g_interrupted;

static double seconds(void) {              // wall clock, from any moment
#if defined(_WIN32)
    return (double)clock() / CLOCKS_PER_SEC;
#else
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
#endif
}

#ifndef catch_interrupts
static void on_interrupt(int signal_number) { g_interrupted = signal_number != 0; }

// From here on Ctrl-C ends the work (on: 1) or the program (0); neither, if it is ignored (in a script's background).
static void catch_interrupts(int on) {
    if (signal(SIGINT, on ? on_interrupt : SIG_DFL) == SIG_IGN) signal(SIGINT, SIG_IGN);
}
#endif

static int end_note(int printed) { return (void)printed, fputc('\n', stderr), EXIT_OK; }
// Says something on standard error, as printf, with a literal for its format.
#define note(...) end_note(fprintf(stderr, "astrovl: " __VA_ARGS__))

// What went wrong goes to standard error and, with --json, to standard output as an object as well.
static char g_failure[1 << 18];         // holds the longest argument and the reason
static int end_failure(int printed, const char *file, const char *status) {
    (void)printed;
    note("%s", g_failure);
    put_json("{version:%s error:%s", ASTROVL_VERSION, g_failure);
    if (status) put_json("status:%s", status);
    if (file) put_json("file:%s", file);
    put_json("}\n");
    return EXIT_FAILED;
}
#define say_failure(file, status, ...) \
    end_failure(snprintf(g_failure, sizeof g_failure, __VA_ARGS__), file, status)
// Says what went wrong, as note. Its value is EXIT_FAILED.
#define fail(...) say_failure(NULL, NULL, __VA_ARGS__)
#define fail_on(file, ...) say_failure(file, NULL, __VA_ARGS__)

static void clear_bar(program *p) {
    if (p->bar_drawn) fputs("\r\033[K", stderr);
    p->bar_drawn = 0;
}

// Says the error in p->err. file: the one it is about, or NULL
static int failed_on(program *p, const char *file) {
    clear_bar(p);
    return say_failure(file, astrovl_status_name(p->err.status), "%s", p->err.message);
}
static int failed(program *p) { return failed_on(p, NULL); }

// Begins an object of --json: the version, the model if one is open, and what put_json makes of the rest.
static void json_head(const program *p) {
    put_json("{version:%s", ASTROVL_VERSION);
    if (p->model) put_json("model:%s", p->info.name);
}
#define begin_json(p, ...) (json_head(p), put_json(__VA_ARGS__))

// Writes out what is buffered. If that fails, says so (but not of a reader that left: `astrovl ... | head`) and stops.
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

// n items of zeros, never freed. Ends the program if there is no memory for them.
static void *new_memory(program *p, size_t n, size_t size) {
    block *b = n < SIZE_MAX / 2 / (size + 1) ? (block *)calloc(1, sizeof *b + n * size) : NULL;
    if (!b) exit(fail("out of memory"));
    b->next = p->memory;
    p->memory = b;
    return b + 1;
}

static int is_file(const char *path) {
    FILE *f = fopen(path, "rb");
    return f && fclose(f) == 0;
}

// The shipped files lie in test/ beside the program in the source tree, in ../share/astrovl or in the data folder once
// installed. path: out, [4096], empty if the file is in none of them.
static void find_shipped(const char *argv0, const char *name, char *path) {
    static const char *const places[] = {"test", "../share/astrovl", ASTROVL_DATA_DIR};
    char folder[2048];
    long n = 0;
#if defined(__linux__)
    n = (long)readlink("/proc/self/exe", folder, sizeof folder - 1);             // follows links and $PATH
#endif
    if (n <= 0) n = snprintf(folder, sizeof folder, "%s", argv0 ? argv0 : "");
    while (n && (n >= (long)sizeof folder || !strchr(SLASHES, folder[n - 1]))) n--;
    for (int i = 0; i < 3; i++) {
        snprintf(path, 4096, "%.*s%s/%s", i < 2 ? (int)n : 0, folder, places[i], name);
        if ((i != 1 || n) && is_file(path)) return;
    }
    path[0] = 0;
}

#define NO_TEMPLATE "the files' tokenizer.chat_template is none of the known ones; choose one with --template: " \
                    ASTROVL_TEMPLATE_NAMES
// The tensors (the first eight) that no part of the model reads, and what that means. "": all are read
static const char *unused_tensors(const astrovl_model *model) {
    static char text[800];
    for (int f = 0, n = 0, at = 0; f < astrovl_n_files(model); f++)
        for (int i = 0; i < astrovl_gguf_n_tensors(astrovl_file(model, f)); i++) {
            const astrovl_tensor *t = astrovl_gguf_tensor(astrovl_file(model, f), i);
            if (!t->is_used && ++n < 10)
                at += snprintf(text + at, 128, n == 1 ? "unused, so answers may be wrong: %.64s" :
                               n < 9 ? ", %.64s" : ", ...", t->name);
        }
    return text;
}

// Opens the files of -m, or the shipped model. Like other functions below it ends the program where nothing can go on.
static void open_model(program *p) {
    astrovl_open_options how = {0, (astrovl_template)p->o.chat_template};
    if (p->o.models.n == 0 && !p->shipped[0])
        exit(fail("the shipped model " SHIPPED_MODEL " is neither beside the program nor in " ASTROVL_DATA_DIR
                  "; name one with -m"));
    if (p->o.models.n == 0) p->o.models.items[p->o.models.n++] = p->shipped;
    p->model = astrovl_open_files(p->o.models.items, p->o.models.n, &how, &p->err);
    if (!p->model) exit(failed_on(p, p->o.models.n == 1 ? p->o.models.items[0] : NULL));
    const char *unused = unused_tensors(p->model);
    if (*unused) fputs("astrovl: ", stderr), print_safe(stderr, unused), fputc('\n', stderr);
    astrovl_get_info(p->model, &p->info);
    if (p->info.note && !p->o.quiet) fprintf(stderr, "%s: note: %s\n", p->o.models.items[0], p->info.note);
    if (p->cmd->bit & GENERATE && p->info.has_text && !p->info.chat_template) exit(fail(NO_TEMPLATE));
}

// Draws "image [########------------] 9/23" once the work has taken more than a second. per_second 0: do not say
static void draw_bar(program *p, const char *stage, int done, int total, double per_second) {
    static const char full[] = "##############################", empty[] = "------------------------------";
    const int filled = total > 0 ? (int)((int64_t)done * 30 / total) : 0;
    if (!p->show_progress || time(NULL) - p->started < 2) return;
    fprintf(stderr, "\r%-6s [%.*s%.*s] %d/%d", stage, filled, full, 30 - filled, empty, done, total);
    if (per_second > 0) fprintf(stderr, ", %.1f/s", per_second);
    fputs("\033[K", stderr);
    fflush(stderr);
    p->bar_drawn = 1;
}

static int on_progress(void *user, const char *stage, int done, int total) {
    program *p = (program *)user;
    if (!p->counting) draw_bar(p, stage, done, total, 0);
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
static astrovl_session *new_session(program *p, astrovl_mode mode, astrovl_tap tap, void *user) {
    astrovl_session_options how = {mode, p->o.threads, p->o.ctx, tap, user, on_progress, p, getenv("ASTROVL_ISA")};
    astrovl_session *session = astrovl_session_new(p->model, &how, &p->err);
    if (!session) exit(failed(p));
    return session;
}

static void open_model_and_session(program *p) {
    open_model(p);
    p->session = new_session(p, p->o.exact ? ASTROVL_EXACT : ASTROVL_FAST, NULL, NULL);
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

// Says, too, what is to be said of an image that could be read.
static int load_image(program *p, const char *path, astrovl_image *image, astrovl_error *err) {
    const int good = astrovl_image_load(path, NULL, image, err) == ASTROVL_OK;
    if (good && *err->message) clear_bar(p), note("warning: %s", err->message);
    return good;
}

static void print_label(FILE *out, const char *label) { if (label) print_safe(out, label), fputs(": ", out); }

// Prints one answer's end: the JSON object, or the newline and the timings. label: may be NULL
static void finish_answer(program *p, const astrovl_session *s, const char *const *files, int n_files,
                          const char *label, const char *prompt, const char *answer) {
    astrovl_stats t;
    int n = 0;
    const int32_t *ids = astrovl_answer_tokens(s, &n);
    astrovl_get_stats(s, &t);
    begin_json(p, n_files > 1 ? "files:[" : n_files ? "file:" : "");
    for (int i = 0; i < n_files; i++) put_json("%s", files[i]);
    put_json(n_files > 1 ? "] prompt:%s text:%s" : "prompt:%s text:%s", prompt, answer);
    put_json("tokens:{prompt:%d answer:%d ids:[", t.n_prompt_tokens, t.n_answer_tokens);
    for (int i = 0; i < n; i++) put_json("%d", (int)ids[i]);
    put_json("]} complete:%b seconds:{image:%f prompt:%f answer:%f}}\n", !t.stopped_by_limit, t.encode_seconds,
             t.prompt_seconds, t.decode_seconds);
    put_plain("\n");
    flush_output(p);
    if (p->o.json || p->o.quiet) return;
    print_label(stderr, label);
    if (t.encode_seconds > 0) fprintf(stderr, "image %.2f s, ", t.encode_seconds);
    fprintf(stderr, "prompt %d tokens %.2f s, answer %d tokens %.2f s", t.n_prompt_tokens, t.prompt_seconds,
            t.n_answer_tokens, t.decode_seconds);
    if (t.decode_seconds > 0) fprintf(stderr, " (%.1f tokens/s)", t.n_answer_tokens / t.decode_seconds);
    fprintf(stderr, "%s\n", t.stopped_by_limit ? ", cut short by the token limit" : "");
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

static int cannot_open(const char *path) { return fail_on(path, "%s: cannot be opened: %s", path, strerror(errno)); }
static int write_error(const char *path) { return fail_on(path, "%s: cannot be written: %s", path, strerror(errno)); }

// Is there something of this name that is no regular file: a folder, a pipe, /dev/stdout?
static int is_special(const char *path) {
#if defined(_WIN32)
    return (void)path, 0;
#else
    struct stat s;
    return stat(path, &s) == 0 && !S_ISREG(s.st_mode);
#endif
}

// A file is written under the name PATH.part and gets its name when it is complete: a full disk costs no earlier file.
// Special files are written to as they are.
static char part_path[4200];

static FILE *begin_file(const char *path) {
    const int special = is_special(path);
    const int size = snprintf(part_path, sizeof part_path, special ? "%s" : "%s.part", path);
    if (size >= (int)sizeof part_path) exit(fail_on(path, "%s: the name is too long", path));
    FILE *f = fopen(part_path, special ? "wb" : CREATE_MODE);
    if (!f && errno == EEXIST)
        exit(fail("%s: exists: another program is writing it, or was killed (then delete it)", part_path));
    if (!f) exit(fail("%s: cannot be created: %s", part_path, strerror(errno)));
    return f;
}

// Gives the file its name; with `keep` 0, or if it could not be written, removes it. An exit status.
static int end_file(FILE *f, const char *path, int keep) {
    int good = fflush(f) == 0 && !ferror(f);
    const int is_part = strcmp(part_path, path) != 0;
    good = fclose(f) == 0 && good;
    if (keep && !good) fail_on(path, "%s: cannot be written (is the disk full?)", path);
    if (good && keep) {
#if defined(_WIN32)
        remove(path);                                      // there, rename does not replace a file
#endif
        if (!is_part || rename(part_path, path) == 0) return EXIT_OK;
        fail_on(path, "%s: cannot be given this name (is it a folder, or in use?)", path);
    }
    if (is_part) remove(part_path);
    return EXIT_FAILED;
}

// Reads a whole file, or standard input for "-".
static char *read_text(program *p, const char *path, size_t *size) {
    const size_t limit = (size_t)256 << 20;                // more is a mistake: nobody writes so much by hand
    FILE *in = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    size_t capacity = 65536;
    char *text = (char *)new_memory(p, capacity + 1, 1);   // zeros: one ends the text
    if (!in) exit(cannot_open(path));
    *size = 0;
    for (; (*size += fread(text + *size, 1, capacity - *size, in)) == capacity && *size <= limit; capacity *= 2)
        text = (char *)memcpy(new_memory(p, capacity * 2 + 1, 1), text, capacity);
    if (ferror(in)) exit(fail_on(path, "%s: cannot be read: %s", path, strerror(errno)));
    if (*size > limit) exit(fail_on(path, "%s: is larger than 256 MiB; cut it into parts", path));
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

static lines read_lines(program *p, const char *path) {
    size_t size = 0;
    char *text = read_text(p, path, &size);
    lines l = {path, text, text + size, text, 0, 0};
    if (begins(text, "\xEF\xBB\xBF")) l.at += 3;           // a byte order mark
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

#define line_error(l, what) exit(fail_on((l)->path, "%s:%d: %s", (l)->path, (l)->number, what))

// "folder/name"; size: of the folder's name
static char *join_path(program *p, const char *folder, size_t size, const char *name) {
    const size_t room = size + strlen(name) + 2;
    char *path = (char *)new_memory(p, room, 1);
    snprintf(path, room, "%.*s%s%s", (int)size, folder, size && folder[size - 1] != '/' ? "/" : "", name);
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
    for (size_t i = 0; i < size; i++) h = (h ^ bytes[i]) * 1099511628211ULL;
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

// Writes numpy's format, version 1.0: magic, version, length, a Python dictionary padded to 64 bytes, the values.
// Source: numpy.lib.format's documentation (NEP 1). Returns the values' hash.
static uint64_t save_npy(const char *path, const int64_t *shape, int n_dims, const float *values) {
    char text[256];
    int used = snprintf(text, sizeof text, "{'descr': '<f4', 'fortran_order': False, 'shape': (%s%s), }",
                        shape_text(shape, n_dims, ", "), n_dims == 1 ? "," : "");
    int size = (10 + used + 1 + 63) / 64 * 64 - 10;
    FILE *f = begin_file(path);
    fprintf(f, "\x93NUMPY%c%c%c%c%-*s\n", 1, 0, size & 0xFF, size >> 8, size - 1, text);
    uint64_t hash = put_values(f, values, count_values(shape, n_dims));
    if (end_file(f, path, 1) != EXIT_OK) exit(EXIT_FAILED);
    return hash;
}

// ==== caption, ask ===================================================================================================
// Asks about images in n fresh conversations, about `each` of them in a turn; the turns are taken together.
static int answer_images(program *p, const char *const *paths, int n, int each, int with_labels, const char *prompt) {
    astrovl_image *images = (astrovl_image *)new_memory(p, (size_t)n * (size_t)each, sizeof *images);
    astrovl_turn turns[MAX_TURNS], *of[MAX_TURNS];     // of[i] is about paths[i * each]; those without image come last
    int i, good = 0, status = EXIT_OK;
    for (i = 0; i < n; i++) {
        astrovl_turn t = {i ? p->more[i] : p->session, images + i * each, 0, prompt, &p->o.how, NULL, {ASTROVL_OK, ""}};
        astrovl_session_reset(t.session);
        for (int k = i * each; t.n_images < each; k++, t.n_images++)
            if (!load_image(p, paths[k], &images[k], &t.err)) break;
        of[i] = t.n_images == each ? &turns[good++] : &turns[n - 1 - (i - good)];
        *of[i] = t;
    }
    if (good && !p->counting) print_label(stdout, with_labels ? paths[0] : NULL);
    if (good) say_together(p, turns, good);
    clear_bar(p);
    for (i = 0; i < n; i++) {
        const char *label = with_labels ? paths[i] : NULL;
        const int loaded = of[i]->n_images == each;
        if (loaded && p->counting) print_label(stdout, label);
        if (of[i]->answer) {
            if (p->counting && !p->o.json) print_text(p, of[i]->answer, strlen(of[i]->answer));
            finish_answer(p, of[i]->session, paths + i * each, each, label, prompt, of[i]->answer);
            astrovl_free(of[i]->answer);
            if (g_interrupted) status = EXIT_FAILED;
            continue;
        }
        if (loaded && label) putchar('\n');
        p->err = of[i]->err;
        status = failed_on(p, paths[i * each + (loaded ? 0 : of[i]->n_images)]);
        flush_output(p);
    }
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
        status |= answer_images(p, paths + i, n_images - i < batch ? n_images - i : batch, 1,
                                n_images > 1 && !p->o.json, prompt);
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

static const char chat_help[] =
    "  /image FILE  begin a new conversation, about this image; /image alone: about none\n"
    "  /add FILE    show another image with the next question (LLaVA-1.5 was trained with one a conversation)\n"
    "  /reset       forget the conversation; the image is shown again with the next question\n"
    "  /help        this list\n  /quit        leave (so does the end of input); Ctrl-C stops an answer\n";

static void chat_image(program *p, chat_state *c, const char *path, int anew) {
    astrovl_image image = {0, 0, NULL, 0};
    if (*path && (!p->info.has_vision || !p->info.has_projector)) {
        c->n_failed += fail_on(path, "%s: this model cannot see: it has no vision tower with a projector", path);
        return;
    }
    if (*path && !load_image(p, path, &image, &p->err)) { c->n_failed += failed_on(p, path); return; }
    astrovl_image_free(&c->image);
    c->image = image;
    c->pending = *path != 0;
    if (anew) astrovl_session_reset(p->session);
    if (c->interactive && *path) fprintf(stderr, "(%d x %d pixels", image.width, image.height);
    if (c->interactive) fputs(*path ? anew ? "; a new conversation)\n" : ")\n" : "(a new conversation)\n", stderr);
}

static void chat_turn(program *p, chat_state *c, const char *text) {
    char *answer = say(p, &c->image, c->pending ? 1 : 0, text);
    int stopped = answer ? g_interrupted : p->err.status == ASTROVL_CANCELLED && c->interactive;
    if (answer) c->pending = 0, finish_answer(p, p->session, NULL, 0, NULL, text, answer);
    if (stopped && c->interactive) fprintf(stderr, "(stopped)\n");
    if (!answer && !stopped) {
        c->n_failed += failed(p);
        if (p->err.status == ASTROVL_ERROR_LIMIT) note("/reset begins a new conversation");
    }
    astrovl_free(answer);
}

// A line that begins with a slash. Returns 0 to leave.
static int chat_command(program *p, chat_state *c, const char *line) {
    if (strcmp(line, "/quit") == 0 || strcmp(line, "/exit") == 0) return 0;
    if (strcmp(line, "/reset") == 0) {
        astrovl_session_reset(p->session);
        c->pending = c->image.rgb != NULL;
    } else if (begins(line, "/image") && (!line[6] || line[6] == ' ')) {
        chat_image(p, c, line + 6 + strspn(line + 6, " "), 1);
    } else if (begins(line, "/add ") && line[5 + strspn(line + 5, " ")]) {
        chat_image(p, c, line + 5 + strspn(line + 5, " "), 0);
    } else {
        if (strcmp(line, "/help") != 0)
            fprintf(stderr, "astrovl: there is no command %s; there are:\n", line), c->n_failed++;
        fputs(chat_help, stderr);
    }
    return 1;
}

static int run_chat(program *p) {
    chat_state c = {{0, 0, NULL, 0}, 0, 0, 0};
    int go_on = !p->o.prompt;
    open_model_and_session(p);
    if (p->o.words.n == 1 && *p->o.words.items[0]) chat_image(p, &c, p->o.words.items[0], 1);
    else if (p->o.words.n == 1) c.n_failed += fail("the image's name is empty");
    if (c.n_failed) return EXIT_FAILED;                    // no image: do not talk about nothing
    c.interactive = go_on && is_terminal(0);
    if (p->o.prompt) chat_turn(p, &c, p->o.prompt);
    if (c.interactive) fprintf(stderr, "Ask something, or:\n%s", chat_help);
    while (go_on && !p->stop) {
        if (c.interactive) fputs("> ", stderr), fflush(stderr);
        const char *line = read_line(p, stdin);
        if (!line && c.interactive) fputc('\n', stderr);
        if (!line) break;
        if (line[0] == '/') go_on = chat_command(p, &c, line);
        else if (line[strspn(line, " \t")]) chat_turn(p, &c, line);
    }
    astrovl_image_free(&c.image);
    return c.n_failed && !c.interactive ? EXIT_FAILED : EXIT_OK;
}

// ==== tokens =========================================================================================================
static int print_tokens(program *p, const char *word, size_t word_size) {
    const int flags = p->o.special ? ASTROVL_ADD_SPECIAL | ASTROVL_PARSE_SPECIAL : 0;
    int n, room = 0;
    int32_t *tokens;
    do {
        tokens = (int32_t *)new_memory(p, (size_t)room, sizeof *tokens);
        n = p->o.clip ? astrovl_clip_tokenize(p->model, word, word_size, tokens, room, &p->err) :
                        astrovl_tokenize(p->model, word, word_size, flags, tokens, room, &p->err);
        if (n < 0) return failed(p);
    } while (n > room && (room = n));
    if (p->o.ids || p->o.clip) {   // the pieces are those of the language model's vocabulary
        for (int i = 0; i < n; i++) printf("%s%ld", i ? " " : "", (long)tokens[i]);
        putchar('\n');
        return EXIT_OK;
    }
    begin_json(p, "tokens:[");
    for (int i = 0; i < n; i++) {
        const astrovl_string piece = astrovl_token_piece(p->model, tokens[i]);
        const int size = astrovl_token_text(p->model, tokens[i], NULL, 0);
        char *text = (char *)new_memory(p, (size_t)size + 1, 1);
        astrovl_token_text(p->model, tokens[i], text, size);
        put_json("{id:%d piece:%S text:%S}", (int)tokens[i], piece.data, piece.size, text, (size_t)size);
        put_plain("%8ld  ", (long)tokens[i]);
        put_padded(piece.data, piece.size, 16);
        put_json("~%S\n", text, (size_t)size);
    }
    put_json("]}\n");
    return EXIT_OK;
}

// Prints what ids, separated by blanks or commas, spell.
static int decode_ids(program *p, const char *text, size_t size) {
    static const char separators[] = " ,\t\r\n";
    int32_t *ids = (int32_t *)new_memory(p, size / 2 + 1, sizeof *ids);
    int n = 0;
    char *end;
    for (text += strspn(text, separators); *text; text = end + strspn(end, separators)) {
        unsigned long long value = strtoull(text, &end, 10);
        if (!isdigit((unsigned char)*text) || !strchr(separators, *end) || value > INT32_MAX ||
            astrovl_token_piece(p->model, (int32_t)value).size == 0)
            return fail("\"%.*s\" is no token of this vocabulary", (int)strcspn(text, separators), text);
        ids[n++] = (int32_t)value;
    }
    char *decoded = astrovl_detokenize(p->model, ids, n, &p->err);
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
    const astrovl_string s = astrovl_gguf_string(file, index, i);
    const int64_t integer = astrovl_gguf_int(file, index, i);
    const astrovl_kv *kv = astrovl_gguf_kv(file, index);
    switch (kv->item_type) {
    case ASTROVL_VALUE_STRING:
        print_string(stdout, s.data, long_strings || s.size <= 100 ? s.size : 96, 1);
        if (!long_strings && s.size > 100) printf(" ... (%llu bytes)", (unsigned long long)s.size);
        break;
    case ASTROVL_VALUE_F32: print_number(stdout, astrovl_gguf_float(file, index, i), 1); break;
    case ASTROVL_VALUE_F64: print_number(stdout, astrovl_gguf_float(file, index, i), 0); break;
    case ASTROVL_VALUE_BOOL: printf("%s", integer ? "true" : "false"); break;
    case ASTROVL_VALUE_U64:                                      // an int64_t ends at 2^63 - 1
        printf("%llu", (unsigned long long)get_le((const unsigned char *)kv->data + 8 * i, 8));
        break;
    default: printf("%lld", (long long)integer); break;
    }
}

// One metadata entry; of a long array its first items, unless --full is given. JSON: "key": value, or [values], or
// {"type": ..., "count": ..., "first": [values]}
static void print_kv(const program *p, const astrovl_gguf *file, int index) {
    const astrovl_kv *kv = astrovl_gguf_kv(file, index);
    const char *item = value_types[kv->item_type];
    const int is_array = kv->type == ASTROVL_VALUE_ARRAY;
    const uint64_t most = g_json ? 16 : 5, shown = p->o.full || kv->count <= most ? kv->count : most;
    char type[64];
    snprintf(type, sizeof type, is_array ? "%s[%lld]" : "%s", item, (long long)kv->count);
    put_json("%k", kv->key);
    if (shown < kv->count) put_json("{type:%s count:%l first:", item, (long long)kv->count);
    if (is_array) put_json("[");
    put_plain("  ");
    put_padded(kv->key, strlen(kv->key), 40);
    put_plain("  %-14s ", type);
    for (uint64_t i = 0; i < shown; i++) {
        put_json("%-");
        if (i) put_plain(", ");
        print_value(file, index, i, g_json || p->o.full);
    }
    if (is_array) put_json(shown < kv->count ? "]}" : "]");
    put_plain("%s\n", shown < kv->count ? ", ..." : "");
}

enum { N_TYPES = ASTROVL_TYPE_BF16 + 1 };
// Tensors, values and bytes of each type, and at the end of all.
typedef struct totals { uint64_t of[N_TYPES + 2][3]; } totals;   // behind it those of types that are not known

static totals add_up(const astrovl_gguf *file) {
    totals sums = {{{0}}};
    for (int i = 0; i < astrovl_gguf_n_tensors(file); i++) {
        const astrovl_tensor *t = astrovl_gguf_tensor(file, i);
        const uint64_t more[3] = {1, count_values(t->ne, 4), t->n_bytes};
        uint64_t *sum = sums.of[astrovl_type_name(t->type) ? t->type : N_TYPES + 1];
        for (int k = 0; k < 3; k++) sum[k] += more[k], sums.of[N_TYPES][k] += more[k];
    }
    return sums;
}

static void print_totals(const totals *sums) {
    for (int k = 0; k <= N_TYPES; k++)
        if (sums->of[k][0])
            put_plain("  %-5s %6d tensors %14lld values  %s\n", k < N_TYPES ? astrovl_type_name(k) : "all",
                      (int)sums->of[k][0], (long long)sums->of[k][1], human_bytes(sums->of[k][2]));
}

static void print_file(const program *p, const astrovl_gguf *file) {
    const int n_kv = astrovl_gguf_n_kv(file), n_tensors = astrovl_gguf_n_tensors(file);
    const totals sums = add_up(file);
    put_json("{file:%s version:%d bytes:%l metadata:{", astrovl_gguf_name(file), astrovl_gguf_version(file),
             (long long)astrovl_gguf_size(file));
    put_padded(astrovl_gguf_name(file), strlen(astrovl_gguf_name(file)), 0);
    put_plain(": GGUF version %d, %s, %d metadata entries, %d tensors\n%s", astrovl_gguf_version(file),
              human_bytes(astrovl_gguf_size(file)), n_kv, n_tensors, n_kv ? "\nmetadata\n" : "");
    for (int i = 0; i < n_kv; i++) print_kv(p, file, i);
    put_json("} tensors:[");
    if (n_tensors) put_plain("\ntensors: name, type, shape (slowest dimension first), bytes\n");
    for (int i = 0; i < n_tensors; i++) {
        const astrovl_tensor *t = astrovl_gguf_tensor(file, i);
        char number[16];
        snprintf(number, sizeof number, "#%d", t->type);
        const char *type = astrovl_type_name(t->type) ? astrovl_type_name(t->type) : number;
        int64_t shape[4];
        put_json("{name:%s type:%s shape:[", t->name, type);
        for (int k = 0; k < t->n_dims; k++) {
            shape[k] = t->ne[t->n_dims - 1 - k];
            put_json("%l", (long long)shape[k]);
        }
        put_json("] offset:%l bytes:%l}", (long long)t->offset, (long long)t->n_bytes);
        put_plain("  ");
        put_padded(t->name, strlen(t->name), 28);
        put_plain("  %-5s %-18s %12lld\n", type, shape_text(shape, t->n_dims, " x "), (long long)t->n_bytes);
    }
    put_json("]}");
    if (n_tensors) put_plain("\ntotals\n");
    print_totals(&sums);
    put_plain("\n");
}

// Begins a part of the model: "name {", or null (text: "name", none) if the files lack it. Returns `present`.
static int begin_part(const char *part, int present) {
    put_json(present ? "%k {" : "%k %-", part);
    put_plain("  %-16s", part);
    if (!present) fputs(g_json ? "null" : "none\n", stdout);
    return present;
}

// Ends it with its sizes, format as of put_json; the text is "layers 2, width 32".
#define end_part(format, ...) (put_json(format "}", __VA_ARGS__), put_json("~" format "\n", __VA_ARGS__))

// What the files are together; that they are no model this program can run is an answer, not a failure.
static void print_model(const program *p) {
    const astrovl_info *m = &p->info;
    if (!p->model) {
        put_json("parts:{error:%s}", p->err.message);
        put_plain("no model that astrovl can run: %s\n", p->err.message);
        return;
    }
    const char *form = m->chat_template ? astrovl_template_name(m->chat_template) : "not recognized";
    put_json("parts:{name:%s parameters:%l weight_bytes:%l template:%s", m->name, (long long)m->n_params,
             (long long)m->n_weight_bytes, form);
    put_plain("what this makes up: %llu parameters in %s\n  name            ", (unsigned long long)m->n_params,
              human_bytes(m->n_weight_bytes));
    put_json("~%s\n", m->name);
    if (begin_part("vocabulary", m->has_vocab))
        end_part("tokens:%d bos:%d eos:%d", m->n_vocab, m->bos_token, m->eos_token);
    if (begin_part("language_model", m->has_text))
        end_part("layers:%d width:%d heads:%d kv_heads:%d head_dim:%d feed_forward:%d context:%d", m->n_layer,
                 m->n_embd, m->n_head, m->n_head_kv, m->head_dim, m->n_ff, m->n_ctx_train);
    if (begin_part("vision_tower", m->has_vision))
        end_part("layers:%d feature_layer:%d width:%d heads:%d feed_forward:%d image_size:%d patch_size:%d patches:%d",
                 m->vision_n_layer, m->vision_feature_layer, m->vision_n_embd, m->vision_n_head, m->vision_n_ff,
                 m->image_size, m->patch_size, m->n_patches);
    if (begin_part("projector", m->has_projector)) end_part("image_tokens:%d", m->n_image_tokens);
    if (begin_part("text_tower", m->clip_text_n_layer > 0))
        end_part("layers:%d width:%d heads:%d feed_forward:%d context:%d tokens:%d", m->clip_text_n_layer,
                 m->clip_text_n_embd, m->clip_text_n_head, m->clip_text_n_ff, m->clip_text_n_ctx, m->clip_text_n_vocab);
    if (begin_part("contrastive", m->has_joint_image || m->has_joint_text))
        end_part("images:%d texts:%d dims:%d logit_scale:%f", m->has_joint_image, m->has_joint_text, m->n_embd_joint,
                 m->logit_scale);
    put_json("}");
    put_plain("  template        %s\n", form);
}

// What whole files lack to be of use together; NULL: nothing.
static const char *lacking(const astrovl_info *m) {
    const int images = m->has_joint_image;
    if (m->has_text && !m->has_vocab)
        return "the language model has no tokenizer (tokenizer.ggml.*): convert it again with tokenizer.model or "
               "tokenizer.json next to its weights";
    if (m->has_text && !m->chat_template) return NO_TEMPLATE;
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
static int check_model(program *p) {
    const astrovl_info *m = &p->info;
    const char *problem = p->model ? lacking(m) : p->err.message, *unused = unused_tensors(p->model);
    const int chats = m->has_text && m->has_vocab, sees = chats && m->has_vision && m->has_projector;
    const int embeds = m->has_joint_image, compares = embeds && m->has_joint_text;
    const struct { const char *command; int usable; } rows[] = {
        {"caption", sees}, {"ask", sees}, {"chat", chats}, {"trace", chats}, {"summarize", chats}, {"score", compares},
        {"describe", compares}, {"search", compares}, {"index", embeds}, {"embed", embeds}, {"tokens", m->has_vocab}};
    begin_json(p, "runnable:%b commands:[", !problem);
    put_plain(problem ? "these files make up no model that astrovl can run:\n- " : "these files can be used with");
    for (int i = 0; i < (int)(sizeof rows / sizeof *rows); i++)
        if (!problem && rows[i].usable) put_json("%s", rows[i].command), put_plain(" %s", rows[i].command);
    put_json("] problems:[");
    if (problem) put_json("%s", problem), put_line(problem);
    else put_plain(chats && !sees ? "; for images, give the mmproj file as well: -m FILE\n" : "\n");
    if (*unused) put_json("%s", unused), put_plain("- "), put_line(unused);
    put_json("]}\n");
    return problem || *unused ? EXIT_FAILED : EXIT_OK;
}

static int run_inspect(program *p) {
    list *paths = p->o.words.n ? &p->o.words : &p->o.models;
    if (p->o.words.n && p->o.models.n) return usage_error(p->cmd, "name the files as arguments or with -m, not both");
    if (paths->n == 0 && p->shipped[0]) paths->items[paths->n++] = p->shipped;
    if (paths->n == 0) return usage_error(p->cmd, "which file? (the shipped model was not found)");
    // All are opened before anything is printed: half a JSON text is none.
    astrovl_gguf **files = (astrovl_gguf **)new_memory(p, (size_t)paths->n, sizeof *files);
    for (int i = 0; i < paths->n && !p->o.check; i++)
        if (!(files[i] = astrovl_gguf_open(paths->items[i], 0, &p->err))) exit(failed_on(p, paths->items[i]));
    if (!p->o.check) begin_json(p, "files:[");
    for (int i = 0; i < paths->n && !p->o.check; i++) print_file(p, files[i]), astrovl_gguf_close(files[i]);
    p->model = astrovl_open_files(paths->items, paths->n, NULL, &p->err);
    astrovl_get_info(p->model, &p->info);
    if (p->info.note) fprintf(stderr, "%s: note: %s\n", paths->items[0], p->info.note);
    if (p->o.check) return check_model(p);
    put_json("]");
    print_model(p);
    put_json("}\n");
    return EXIT_OK;
}

// ==== quantize: float32 to the block formats =========================================================================
// Each function makes one block, in the layout that section [3] of the header describes, of values that are finite and
// at most QUANTIZE_MAX; quantize_row sees to that. The bytes are the same on every machine.
//   Q4_0 to Q8_0: the rules, and the bits, of ggml and of the `gguf` Python package.
//   Q2_K to Q6_K: the format leaves the choice of scales to the writer. Here they minimize the sum of squared errors,
//   every value counting the same; test/real_quants.py compares with llama.cpp, which gives larger values more weight.

// Products and sums are rounded one by one: no fused multiply-add.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#if FLT_EVAL_METHOD == 1
#pragma GCC optimize("excess-precision=fast")
#endif
#endif

#define QUANTIZE_MAX 1e9f                // more than any block holds (65504 * 128 * 32); its square does not overflow
#define QUANTIZE_MIN 1e-12f              // a K block stores it as 0: its smallest step is the smallest half, 6e-8
#define F16_LIMIT    65519.99609375f     // the largest float that becomes a finite half (65504)
#define ROUNDER      12582912.0f         // 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 to an integer

static float clamp(float x, float low, float high) {   // two steps: compilers make them two instructions
    float y = x < low ? low : x;
    return y > high ? high : y;
}

// To the nearest integer of low..high, ties to even
static float round_between(float x, float low, float high) { return (clamp(x, low, high) + ROUNDER) - ROUNDER; }

// The value of largest magnitude (the first of equals), with its sign
static float extreme_of(const float *x, int n) {
    float extreme = x[0];
    for (int i = 1; i < n; i++)
        if (fabsf(x[i]) > fabsf(extreme)) extreme = x[i];
    return extreme;
}

static void find_range(const float *x, int n, float *least, float *largest) {
    *least = *largest = x[0];
    for (int i = 1; i < n; i++) {
        if (x[i] < *least) *least = x[i];
        if (x[i] > *largest) *largest = x[i];
    }
}

// Stores d as a finite half. Returns what was stored.
static float put_half(unsigned char *p, float d) {
    uint16_t half = astrovl_f32_to_f16(clamp(d, -F16_LIMIT, F16_LIMIT));
    put_le(p, half, 2);
    return astrovl_f16_to_f32(half);
}

// 1 / d; 0 where that is not a finite float: d is then stored as 0
static float reciprocal(float d) {
    float r = d == 0 ? 0 : 1 / d;
    return fabsf(r) <= FLT_MAX ? r : 0;
}

// Packs bits shift..shift+bits-1 of each code, as all formats do: the first `stride` codes go to the lowest bits of
// `stride` bytes, the next `stride` codes to the bits above, until the bytes are full; then come the next bytes.
static void pack(unsigned char *out, const unsigned char *codes, int n, int shift, int bits, int stride) {
    int mask = (1 << bits) - 1, at, j;
    memset(out, 0, (size_t)(n * bits / 8));
    for (; n > 0; n -= stride * 8 / bits, out += stride)
        for (at = 0; at < 8; at += bits, codes += stride)
            for (j = 0; j < stride; j++) out[j] = (unsigned char)(out[j] | (codes[j] >> shift & mask) << at);
}

// Q4_0, Q4_1, Q5_0, Q5_1: d f16 | m f16 (Q4_1, Q5_1) | fifth bits u32 (Q5) | nibbles
//   Q4_0, Q5_0   d = -x / 2^(bits - 1), x the value of largest magnitude       q = floor(x / d + 2^(bits - 1) + 1/2)
//   Q4_1, Q5_1   d = (largest - m) / (2^bits - 1), m the least value           q = floor((x - m) / d + 1/2)
static void quantize_simple(const float *x, unsigned char *b, int bits, int has_minimum) {
    int top = (1 << bits) - 1, middle = 1 << (bits - 1), j;
    float least, largest, offset = has_minimum ? 0.5f : (float)middle + 0.5f;
    unsigned char codes[32];
    find_range(x, 32, &least, &largest);
    const float m = has_minimum ? clamp(least, -F16_LIMIT, F16_LIMIT) : 0;
    const float exact = has_minimum ? (largest - m) / (float)top : extreme_of(x, 32) / (float)-middle;
    const float d = clamp(exact, -F16_LIMIT, F16_LIMIT), inverse = reciprocal(d);
    for (j = 0; j < 32; j++) codes[j] = (unsigned char)clamp((x[j] - m) * inverse + offset, 0, (float)top);
    put_half(b, d);
    if (has_minimum) put_half(b + 2, m);
    b += has_minimum ? 4 : 2;
    if (bits == 5) pack(b, codes, 32, 4, 1, 1);
    pack(bits == 5 ? b + 4 : b, codes, 32, 0, 4, 16);
}
// Q8_0:   d = largest magnitude / 127     q = x / d, rounded to nearest, ties away from zero
static void quantize_q8_0(const float *x, unsigned char *b) {
    float d = clamp(fabsf(extreme_of(x, 32)) / 127, 0, F16_LIMIT), inverse = reciprocal(d);
    put_half(b, d);
    for (int j = 0; j < 32; j++) {
        float q = clamp(fabsf(x[j] * inverse), 0, 127);
        int whole = (int)q;
        whole += q - (float)whole >= 0.5f;
        b[2 + j] = (unsigned char)(x[j] < 0 ? -whole : whole);
    }
}

// The K formats. For given integers q of a group, least squares gives its scale in closed form; for a given scale, the
// best q is x / scale, rounded. So several scales are tried: q is rounded by each, a scale fitted to these q, and the
// fit with the least error kept. The tries put the end of the group's range up to 0.9 steps inside or outside the end
// of q's range: clipping the extreme value can pay, since all others then have finer steps.
#define GUESSES    3
#define GUESS_STEP 0.3f

// y = d q, low <= q <= high.   E = sum (x - d q)^2 is least for
//   d = sum x q / sum q^2       and then E = sum x^2 - (sum x q)^2 / sum q^2
// Returns that d. It is negative where the value of largest magnitude has the sign that q has one integer less of.
static float fit_scale(const float *x, int n, int low, int high) {
    float extreme = extreme_of(x, n), end = (float)(-low > high ? low : high), gain = 0, scale = 0;
    if (fabsf(extreme) < QUANTIZE_MIN) return 0;
    for (int guess = -GUESSES; guess <= GUESSES; guess++) {
        float inverse = (end + GUESS_STEP * (float)guess) / extreme, sum_xq = 0, sum_qq = 0;
        for (int i = 0; i < n; i++) {
            float q = round_between(x[i] * inverse, (float)low, (float)high);
            sum_xq += x[i] * q;
            sum_qq += q * q;
        }
        if (sum_xq * sum_xq > gain * sum_qq) {
            gain = sum_xq * sum_xq / sum_qq;
            scale = sum_xq / sum_qq;
        }
    }
    return scale;
}

// y = d q - m, 0 <= q <= high, m >= 0.   With low the least of x and 0, u = x - low and r = m + low, which avoids
// cancellation, E = sum (x - d q + m)^2 = sum (u - d q + r)^2 is least for
//   d = (n sum u q - sum u sum q) / (n sum q^2 - (sum q)^2)     r = (d sum q - sum u) / n
// or, where that would make m negative, for r = low and d = sum (u + low) q / sum q^2.
// Returns that m; d comes from fit_scale, once the minima have been rounded. n is 16 or 32.
static float fit_minimum(const float *x, int n, int high) {
    float low, top, u[32], sum_u = 0;
    double least = 0;
    find_range(x, n, &low, &top);
    if (low > 0) low = 0;
    float minimum = -low;
    if (top - low < QUANTIZE_MIN) return minimum;
    for (int i = 0; i < n; i++) {
        u[i] = x[i] - low;
        sum_u += u[i];
    }
    for (int guess = -GUESSES; guess <= GUESSES; guess++) {
        float inverse = ((float)high + GUESS_STEP * (float)guess) / (top - low), sum_q = 0, sum_qq = 0, sum_uq = 0;
        for (int i = 0; i < n; i++) {
            float q = round_between(u[i] * inverse, 0, (float)high);
            sum_q += q;
            sum_qq += q * q;
            sum_uq += u[i] * q;
        }
        const double determinant = n * (double)sum_qq - (double)sum_q * (double)sum_q;   // 0: all x are equal, m is 0
        double d = determinant > 0 ? (n * (double)sum_uq - (double)sum_u * (double)sum_q) / determinant : 0;
        double r = (d * (double)sum_q - (double)sum_u) / n;
        if (r < (double)low) {
            r = (double)low;
            d = ((double)sum_uq + r * (double)sum_q) / (double)sum_qq;
        }
        const double error =               // E less sum u^2, which all tries share
            d * (d * (double)sum_qq - 2 * (double)sum_uq) + r * (n * r + 2 * ((double)sum_u - d * (double)sum_q));
        if (error < least) {
            least = error;
            minimum = (float)(r - (double)low);
        }
    }
    return minimum;
}

// The codes q - low of y = step q - minimum, low <= q <= high.
static void encode(const float *x, int n, float step, float minimum, int low, int high, unsigned char *codes) {
    for (int i = 0; i < n; i++) {
        float q = step == 0 ? 0 : (x[i] + minimum) / step;
        codes[i] = (unsigned char)((int)round_between(q, (float)low, (float)high) - low);
    }
}

// The groups' scales (or minima) s become integers the same way: s = d code. Stores d at p; returns what was stored.
static float encode_scales(const float *s, int n, int low, int high, unsigned char *p, unsigned char *codes) {
    float d = put_half(p, fit_scale(s, n, low, high));
    encode(s, n, d, 0, low, high, codes);
    return d;
}

// Q3_K, Q6_K:   y = (d scale[g]) q with 16 groups.   out: scales[16] = scale + half_scales, codes[256] = q + half
static void encode_symmetric(const float *x, int half, int half_scales, unsigned char *d_at, unsigned char *scales,
                             unsigned char *codes) {
    float s[16], d;
    for (int g = 0; g < 16; g++) s[g] = fit_scale(x + 16 * g, 16, -half, half - 1);
    d = encode_scales(s, 16, -half_scales, half_scales - 1, d_at, scales);
    for (int g = 0; g < 16; g++)
        encode(x + 16 * g, 16, d * (float)(scales[g] - half_scales), 0, -half, half - 1, codes + 16 * g);
}

// Q2_K, Q4_K, Q5_K:   y = (d scale[g]) q - dmin minimum[g]; dmin is stored behind d.
// out: scales, [2][n_groups], the minima behind the scales; codes, [256]
static void encode_affine(const float *x, int n_groups, int high, int high_scale, unsigned char *d_at,
                          unsigned char *scales, unsigned char *codes) {
    float m[16] = {0}, s[16] = {0}, u[32] = {0}, d, dmin;
    unsigned char *minima = scales + n_groups;
    int n = 256 / n_groups, g, i;
    for (g = 0; g < n_groups; g++) m[g] = fit_minimum(x + n * g, n, high);
    dmin = encode_scales(m, n_groups, 0, high_scale, d_at + 2, minima);
    for (g = 0; g < n_groups; g++) {
        for (i = 0; i < n; i++) u[i] = x[n * g + i] + dmin * (float)minima[g];
        s[g] = clamp(fit_scale(u, n, 0, high), 0, QUANTIZE_MAX);   // below 0 only where all u are next to 0
    }
    d = encode_scales(s, n_groups, 0, high_scale, d_at, scales);
    for (g = 0; g < n_groups; g++)
        encode(x + n * g, n, d * (float)scales[g], dmin * (float)minima[g], 0, high, codes + n * g);
}

// Eight scales and eight minima of 6 bits in 12 bytes. scales: [2][8]
static void pack_scales(const unsigned char *scales, unsigned char *s) {
    const unsigned char *minima = scales + 8;
    for (int g = 0; g < 4; g++) {
        s[g] = (unsigned char)(scales[g] | scales[g + 4] >> 4 << 6);
        s[g + 4] = (unsigned char)(minima[g] | minima[g + 4] >> 4 << 6);
        s[g + 8] = (unsigned char)((scales[g + 4] & 15) | (minima[g + 4] & 15) << 4);
    }
}

static int block_values(int type) {
    return astrovl_type_row_bytes(type, 1) ? 1 : astrovl_type_row_bytes(type, 32) ? 32 : 256;
}

static void quantize_block(int type, const float *x, unsigned char *b) {
    unsigned char scales[32], codes[256];
    uint32_t bits;
    switch (type) {
    case ASTROVL_TYPE_F16: put_le(b, astrovl_f32_to_f16(*x), 2); break;
    case ASTROVL_TYPE_BF16: put_le(b, astrovl_f32_to_bf16(*x), 2); break;
    case ASTROVL_TYPE_Q4_0: quantize_simple(x, b, 4, 0); break;
    case ASTROVL_TYPE_Q4_1: quantize_simple(x, b, 4, 1); break;
    case ASTROVL_TYPE_Q5_0: quantize_simple(x, b, 5, 0); break;
    case ASTROVL_TYPE_Q5_1: quantize_simple(x, b, 5, 1); break;
    case ASTROVL_TYPE_Q8_0: quantize_q8_0(x, b); break;
    case ASTROVL_TYPE_Q2_K:
        encode_affine(x, 16, 3, 15, b + 80, scales, codes);
        pack(b, scales, 32, 0, 4, 16);
        pack(b + 16, codes, 256, 0, 2, 32);
        break;
    case ASTROVL_TYPE_Q3_K:
        encode_symmetric(x, 4, 32, b + 108, scales, codes);
        pack(b, codes, 256, 2, 1, 32);
        pack(b + 32, codes, 256, 0, 2, 32);
        pack(b + 96, scales, 16, 0, 4, 8);
        pack(b + 104, scales, 16, 4, 2, 4);
        break;
    case ASTROVL_TYPE_Q4_K:
        encode_affine(x, 8, 15, 63, b, scales, codes);
        pack_scales(scales, b + 4);
        pack(b + 16, codes, 256, 0, 4, 32);
        break;
    case ASTROVL_TYPE_Q5_K:
        encode_affine(x, 8, 31, 63, b, scales, codes);
        pack_scales(scales, b + 4);
        pack(b + 16, codes, 256, 4, 1, 32);
        pack(b + 48, codes, 256, 0, 4, 32);
        break;
    case ASTROVL_TYPE_Q6_K:
        encode_symmetric(x, 32, 128, b + 208, scales, codes);
        pack(b, codes, 256, 0, 4, 64);
        pack(b + 128, codes, 256, 4, 2, 32);
        for (int g = 0; g < 16; g++) b[192 + g] = (unsigned char)(scales[g] - 128);
        break;
    default:
        memcpy(&bits, x, 4);
        put_le(b, bits, 4);
    }
}

// n: whole blocks. Blocks hold no NaN, which counts as 0, and no infinity, which becomes the largest value they hold.
static void quantize_row(int type, const float *values, unsigned char *blocks, int64_t n) {
    const int n_values = block_values(type);
    const size_t block_bytes = astrovl_type_row_bytes(type, n_values);
    float x[256];
    for (; n > 0; n -= n_values, values += n_values, blocks += block_bytes) {
        for (int i = 0; i < n_values && n_values > 1; i++)
            x[i] = values[i] == values[i] ? clamp(values[i], -QUANTIZE_MAX, QUANTIZE_MAX) : 0;
        quantize_block(type, n_values > 1 ? x : values, blocks);
    }
}

// A chunk of a tensor, which becomes another type. The threads take pieces of 4096 values, whole blocks of every type.
typedef struct chunk {
    const astrovl_tensor *t;
    int                   type;            // that it becomes
    int64_t               first, n;        // values
    unsigned char        *blocks;          // out
    int                   thread, n_threads;
    int64_t               n_lost;          // out: values that are no numbers, or too large for the type
} chunk;

static void *quantize_pieces(void *context) {
    chunk *c = (chunk *)context;
    const float most = c->type == ASTROVL_TYPE_F16 ? 65519.0f : block_values(c->type) > 1 ? QUANTIZE_MAX : FLT_MAX;
    float x[4096];
    for (int64_t at = c->thread * 4096; at < c->n; at += c->n_threads * 4096) {
        const char *from = (const char *)c->t->data + astrovl_type_row_bytes(c->t->type, c->first + at);
        const int64_t n = c->n - at < 4096 ? c->n - at : 4096;
        astrovl_dequantize(c->t->type, from, x, n);
        for (int64_t i = 0; i < n; i++) c->n_lost += !(fabsf(x[i]) <= most);
        quantize_row(c->type, x, c->blocks + astrovl_type_row_bytes(c->type, at), n);
    }
    return NULL;
}

static int64_t quantize_chunk(chunk c) {
    chunk parts[ASTROVL_MAX_THREADS];
    int i, n_started = 1;
    for (; c.thread < c.n_threads; c.thread++) parts[c.thread] = c;
#if defined(HAS_THREADS)
    pthread_t threads[ASTROVL_MAX_THREADS];
    while (n_started < c.n_threads &&
           pthread_create(&threads[n_started], NULL, quantize_pieces, &parts[n_started]) == 0) n_started++;
#endif
    quantize_pieces(&parts[0]);
    for (i = n_started; i < c.n_threads; i++) quantize_pieces(&parts[i]);     // those for which there is no thread
#if defined(HAS_THREADS)
    for (i = 1; i < n_started; i++) pthread_join(threads[i], NULL);
#endif
    for (i = 0; i < c.n_threads; i++) c.n_lost += parts[i].n_lost;
    return c.n_lost;
}

// ---- which type each tensor gets: the rules of llama.cpp's llama-quant.cpp, found there by measuring perplexities

enum { NO_BLOCK, FIRST_2, FIRST_4, FIRST_16TH, FIRST_8TH, ENDS_AND_THIRDS };   // some of n blocks, by their number

typedef struct recipe {
    const char *name;
    int         file_type;                               // general.file_type, llama.cpp's number
    int         type;                                    // of every matrix but these:
    struct { int blocks, type, rest; } v, down;          // attn_v, ffn_down: in some of the blocks, and in the rest
    int         attention_output, output;                // output.weight, or token_embd.weight if it serves as both
} recipe;

#define TYPE(T) ASTROVL_TYPE_##T
#define PLAIN(name, number, T) {name, number, TYPE(T), {0, 0, TYPE(T)}, {0, 0, TYPE(T)}, TYPE(T), TYPE(T)}
#define MIX(name, number, T, v_blocks, V, V_rest, down_blocks, DOWN, DOWN_rest, OUT) \
    {name, number, TYPE(T), {v_blocks, TYPE(V), TYPE(V_rest)}, {down_blocks, TYPE(DOWN), TYPE(DOWN_rest)}, TYPE(OUT), \
     TYPE(Q6_K)}
static const recipe recipes[] = {
    PLAIN("f32", 0, F32),    PLAIN("f16", 1, F16),    PLAIN("bf16", 32, BF16), PLAIN("q4_0", 2, Q4_0),
    PLAIN("q4_1", 3, Q4_1),  PLAIN("q5_0", 8, Q5_0),  PLAIN("q5_1", 9, Q5_1),  PLAIN("q8_0", 7, Q8_0),
    PLAIN("q2_k", 10, Q2_K), PLAIN("q3_k", 11, Q3_K), PLAIN("q4_k", 14, Q4_K), PLAIN("q5_k", 16, Q5_K),
    PLAIN("q6_k", 18, Q6_K),
    //                 base  attn_v: these blocks, the rest   ffn_down                      attn_output
    MIX("q3_k_s", 11, Q3_K, NO_BLOCK, Q3_K, Q3_K,            NO_BLOCK, Q3_K, Q3_K,         Q3_K),
    MIX("q3_k_m", 12, Q3_K, FIRST_2, Q5_K, Q4_K,             FIRST_16TH, Q5_K, Q4_K,       Q4_K),
    MIX("q3_k_l", 13, Q3_K, NO_BLOCK, Q5_K, Q5_K,            NO_BLOCK, Q5_K, Q5_K,         Q5_K),
    MIX("q4_k_s", 14, Q4_K, FIRST_4, Q5_K, Q4_K,             FIRST_8TH, Q5_K, Q4_K,        Q4_K),
    MIX("q4_k_m", 15, Q4_K, ENDS_AND_THIRDS, Q6_K, Q4_K,     ENDS_AND_THIRDS, Q6_K, Q4_K,  Q4_K),
    MIX("q5_k_s", 16, Q5_K, NO_BLOCK, Q5_K, Q5_K,            NO_BLOCK, Q5_K, Q5_K,         Q5_K),
    MIX("q5_k_m", 17, Q5_K, ENDS_AND_THIRDS, Q6_K, Q5_K,     ENDS_AND_THIRDS, Q6_K, Q5_K,  Q5_K)};
enum { N_RECIPES = (int)(sizeof recipes / sizeof *recipes) };

static int block_is_among(int blocks, int i, int n) {
    const int first[] = {0, 2, 4, n / 16, n / 8, n / 8};
    return i < first[blocks] || (blocks == ENDS_AND_THIRDS && (i >= 7 * n / 8 || (i - n / 8) % 3 == 2));
}

// "v.blk.12.attn_v.weight": block 12 of tower 1, *rest "attn_v.weight"; -1 for a tensor outside the blocks. Towers: 0
// language model, 1 vision, 2 text.
static int block_of(const char *name, int *tower, const char **rest) {
    int number = 0;
    *tower = begins(name, "v.") ? 1 : begins(name, "t.") ? 2 : 0;
    if (*tower) name += 2;
    if (!begins(name, "blk.")) return -1;
    for (name += 4; *name >= '0' && *name <= '9' && number < 100000; name++) number = number * 10 + (*name - '0');
    *rest = name + 1;
    return *name == '.' ? number : -1;
}

// Is it a weight matrix, which may be stored with fewer bits?
static int is_quantizable(const astrovl_tensor *t) {
    size_t n = strlen(t->name);
    return t->ne[1] * t->ne[2] * t->ne[3] > 1 && n > 7 && strcmp(t->name + n - 7, ".weight") == 0 &&
           !strstr(t->name, "_norm.") && !strstr(t->name, "position_embd") && !strstr(t->name, "patch_embd") &&
           !strstr(t->name, "ffn_gate_inp");
}

// What a recipe asks for. n_blocks: [3], of each tower
static int recipe_type(const recipe *r, const astrovl_gguf *in, const int *n_blocks, const astrovl_tensor *t) {
    const char *rest = "";
    int tower, number = block_of(t->name, &tower, &rest), n = number < 0 ? 0 : n_blocks[tower];
    if (strcmp(t->name, "output.weight") == 0) return r->output;
    if (strcmp(t->name, "token_embd.weight") == 0)
        return astrovl_gguf_find_tensor(in, "output.weight") ? r->type : r->output;
    if (number < 0) return r->type;
    if (begins(rest, "ffn_down")) return block_is_among(r->down.blocks, number, n) ? r->down.type : r->down.rest;
    if (begins(rest, "attn_out")) return r->attention_output;
    if (!begins(rest, "attn_v.")) return r->type;
    const int type = block_is_among(r->v.blocks, number, n) ? r->v.type : r->v.rest;
    if (r->output == r->type || type == ASTROVL_TYPE_Q6_K || tower != 0 || n != 80) return type;
    const int heads = astrovl_gguf_find_kv(in, "llama.attention.head_count");   // a mix, of a model of 80 blocks: 70B
    const int shared = astrovl_gguf_find_kv(in, "llama.attention.head_count_kv");
    if (shared < 0 || astrovl_gguf_int(in, shared, 0) == astrovl_gguf_int(in, heads, 0)) return type;
    return ASTROVL_TYPE_Q5_K;   // heads share keys and values: attn_v is small, and worth it
}

// The type itself, or one as good whose blocks fit into rows of n values.
static int type_for_rows(int type, int64_t n) {
    if (n % block_values(type) == 0) return type;
    if (n % 32 != 0) return ASTROVL_TYPE_F16;
    return type == ASTROVL_TYPE_Q4_K ? ASTROVL_TYPE_Q5_0 : type == ASTROVL_TYPE_Q5_K ? ASTROVL_TYPE_Q5_1 :
           type == ASTROVL_TYPE_Q6_K ? ASTROVL_TYPE_Q8_0 : ASTROVL_TYPE_Q4_0;
}

// ---- the file: GGUF version 3, little-endian, alignment 32. It may replace the one that is read: see begin_file.

static void put_number(FILE *out, uint64_t value, int n) {
    unsigned char bytes[8];
    put_le(bytes, value, n);
    fwrite(bytes, 1, (size_t)n, out);
}

static void put_string(FILE *out, const char *text) {
    put_number(out, strlen(text), 8);
    fputs(text, out);
}

static void pad_to_32(FILE *out, uint64_t size) { for (; size % 32; size++) fputc(0, out); }

// All that stands before the tensors' data. types: [n_tensors]
static void put_header(FILE *out, const astrovl_gguf *in, int file_type, const int *types) {
    static const char *const ours[] = {"general.alignment", "general.file_type", "general.quantization_version"};
    int i, k, n = astrovl_gguf_n_tensors(in), n_kv = astrovl_gguf_n_kv(in), n_old = n_kv;
    uint64_t offset = 0;
    for (k = 0; k < 3; k++) n_old -= astrovl_gguf_find_kv(in, ours[k]) >= 0;
    fwrite("GGUF\3\0\0", 1, 8, out);
    put_number(out, (uint64_t)n, 8);
    put_number(out, (uint64_t)n_old + 2, 8);
    for (i = 0; i < n_kv; i++) {
        const astrovl_kv *kv = astrovl_gguf_kv(in, i);
        for (k = 0; k < 3 && strcmp(kv->key, ours[k]) != 0; k++) {}
        if (k < 3) continue;
        put_string(out, kv->key);
        put_number(out, kv->type, 4);
        if (kv->type == ASTROVL_VALUE_ARRAY) {
            put_number(out, kv->item_type, 4);
            put_number(out, kv->count, 8);
        }
        if (kv->n_bytes) fwrite(kv->data, 1, (size_t)kv->n_bytes, out);
    }
    for (k = 1; k < 3; k++) {
        put_string(out, ours[k]);
        put_number(out, ASTROVL_VALUE_U32, 4);
        put_number(out, k == 1 ? (uint64_t)file_type : 2, 4);
    }
    for (i = 0; i < n; i++) {
        const astrovl_tensor *t = astrovl_gguf_tensor(in, i);
        put_string(out, t->name);
        put_number(out, (uint64_t)t->n_dims, 4);
        for (k = 0; k < t->n_dims; k++) put_number(out, (uint64_t)t->ne[k], 8);
        put_number(out, (uint64_t)types[i], 4);
        put_number(out, offset, 8);
        offset += (astrovl_type_row_bytes(types[i], count_values(t->ne, 4)) + 31) / 32 * 32;
    }
    pad_to_32(out, (uint64_t)ftell(out));
}

#define CHUNK_VALUES (1 << 22)

// Nothing is left behind of a file that could not be completed.
static int write_quantized(program *p, const astrovl_gguf *in, const char *path, int file_type, const int *types) {
    unsigned char *blocks = (unsigned char *)new_memory(p, CHUNK_VALUES, sizeof(float));
    int n = astrovl_gguf_n_tensors(in), n_threads = p->o.threads ? p->o.threads : 1;
#if !defined(_WIN32)
    const long n_processors = sysconf(_SC_NPROCESSORS_ONLN);
    if (!p->o.threads && n_processors > 1)
        n_threads = n_processors < ASTROVL_MAX_THREADS ? (int)n_processors : ASTROVL_MAX_THREADS;
#endif
    if (is_special(path)) return fail_on(path, "%s: is a folder or a device; name a file", path);
    FILE *out = begin_file(path);
    put_header(out, in, file_type, types);
    for (int i = 0; i < n && !g_interrupted && !ferror(out); i++) {
        const astrovl_tensor *t = astrovl_gguf_tensor(in, i);
        const int64_t total = count_values(t->ne, 4);
        chunk c = {t, types[i], 0, 0, blocks, 0, n_threads, 0};
        int64_t n_lost = 0;
        draw_bar(p, "tensors", i, n, 0);
        if (types[i] == (int)t->type) fwrite(t->data, 1, (size_t)t->n_bytes, out);
        else for (; c.first < total && !g_interrupted; c.first += c.n) {
            c.n = total - c.first < CHUNK_VALUES ? total - c.first : CHUNK_VALUES;
            n_lost += quantize_chunk(c);
            fwrite(blocks, 1, astrovl_type_row_bytes(types[i], c.n), out);
        }
        pad_to_32(out, astrovl_type_row_bytes(types[i], total));
        if (n_lost) clear_bar(p), note("warning: %s: %lld values are infinite, no numbers or too large for %s", t->name,
                                       (long long)n_lost, astrovl_type_name(types[i]));
    }
    clear_bar(p);
    if (g_interrupted) fail_on(path, "%s: quantizing was cancelled", path);
    else if (fflush(out) == 0) sync_file(out);
    return end_file(out, path, !g_interrupted);
}

static int run_quantize(program *p) {
    const char *const *words = p->o.words.items, *rest;
    int n_changed = 0, n_fallbacks = 0, n_requantized = 0, n_blocks[3] = {0, 0, 0}, i, tower;
    const double start = seconds();
    const recipe *r = recipes;
    while (r < recipes + N_RECIPES && strcasecmp(words[2], r->name) != 0) r++;
    if (r == recipes + N_RECIPES) {
        char names[256] = "";
        for (i = 0; i < N_RECIPES; i++) strcat(strcat(names, " "), recipes[i].name);
        return usage_error(p->cmd, "no quantization is called \"%s\"; there are:%s", words[2], names);
    }
    astrovl_gguf *in = astrovl_gguf_open(words[0], 0, &p->err);
    if (!in) return failed_on(p, words[0]);
    const int n = astrovl_gguf_n_tensors(in);
    int *types = (int *)new_memory(p, (size_t)n, sizeof *types);
    for (i = 0; i < n; i++) {
        const astrovl_tensor *t = astrovl_gguf_tensor(in, i);
        int number = block_of(t->name, &tower, &rest);
        if (!astrovl_type_name(t->type))
            return fail_on(*words, "%s: the type of %s is number %d, which cannot be read", *words, t->name, t->type);
        if (number >= 0 && n_blocks[tower] <= number) n_blocks[tower] = number + 1;
    }
    for (i = 0; i < n; i++) {
        const astrovl_tensor *t = astrovl_gguf_tensor(in, i);
        const int wanted = is_quantizable(t) ? recipe_type(r, in, n_blocks, t) : (int)t->type;
        types[i] = type_for_rows(wanted, t->ne[0]);
        const int changed = types[i] != (int)t->type;
        n_changed += changed;
        n_fallbacks += types[i] != wanted;
        n_requantized += changed && block_values(t->type) > 1 && block_values(types[i]) > 1;
    }
    p->started = time(NULL);
    catch_interrupts(1);                   // from here on Ctrl-C leaves no unfinished file
    if (write_quantized(p, in, words[1], r->file_type, types) != EXIT_OK) return EXIT_FAILED;
    astrovl_gguf *out = astrovl_gguf_open(words[1], 0, &p->err);
    if (!out) return failed(p);
    const totals sums = add_up(out);
    const double bits = (double)sums.of[N_TYPES][2] * 8 / (double)sums.of[N_TYPES][1];
    begin_json(p, "file:%s bytes_before:%l bytes:%l bits_per_weight:%f seconds:%f ", astrovl_gguf_name(out),
               (long long)astrovl_gguf_size(in), (long long)astrovl_gguf_size(out), bits, seconds() - start);
    put_json("tensors:%d changed:%d fallbacks:%d requantized:%d types:{", n, n_changed, n_fallbacks, n_requantized);
    for (i = 0; i < N_TYPES; i++)
        if (sums.of[i][0]) put_json("%k %d", astrovl_type_name(i), (int)sums.of[i][0]);
    put_json("}}\n");
    if (!p->o.quiet) {
        put_plain("%s, now %s, %.2f bits a weight; %d of %d tensors changed in %.1f s\n",
                  human_bytes(astrovl_gguf_size(in)), human_bytes(astrovl_gguf_size(out)), bits, n_changed, n,
                  seconds() - start);
        print_totals(&sums);
        if (n_fallbacks) note("note: %d tensors got another type, since their rows do not fit its blocks", n_fallbacks);
        if (n_requantized)
            note("warning: %d tensors were quantized before and lose again; F16 is better", n_requantized);
    }
    astrovl_gguf_close(in);
    astrovl_gguf_close(out);
    return EXIT_OK;
}

// ==== trace ==========================================================================================================
enum { MAX_TRACED = 65536 };

typedef struct trace_state {
    program     *p;
    const char  *folder;                   // NULL: hashes only
    list         index, names;             // the lines of folder/index.tsv, what came when
    int          calls[MAX_TRACED];        // how often each name has come
    uint64_t     n_tensors, n_bytes, total;
} trace_state;

// A tensor becomes a file ("model.norm" -> "model.norm.npy", the third time "model.norm.call3.npy") or a line.
static void on_tensor(void *user, const char *name, int layer, const int64_t *shape, int n_dims, const float *data) {
    trace_state *t = (trace_state *)user;
    const uint64_t n = count_values(shape, n_dims);
    char line[1024], file[256], path[4096];
    int i = 0;
    if (t->folder) {
        while (i < t->names.n && strcmp(t->names.items[i], name) != 0) i++;
        if (i == t->names.n) list_add(t->p, &t->names, name, strlen(name));
        const int call = ++t->calls[i < MAX_TRACED ? i : MAX_TRACED - 1];
        snprintf(file, sizeof file, call == 1 ? "%.180s.npy" : "%.180s.call%d.npy", name, call);
        for (char *c = file; *c; c++)
            if (!isalnum((unsigned char)*c) && !strchr("._-", *c)) *c = '_';
        snprintf(path, sizeof path, "%s/%s", t->folder, file);
        const unsigned long long hash = save_npy(path, shape, n_dims, data);
        i = snprintf(line, sizeof line, "%s\t%.300s\t%d\t%d\t%s\t%016llx\n", file, name, layer, call,
                     shape_text(shape, n_dims, "x"), hash);
        list_add(t->p, &t->index, line, (size_t)i);
    } else {
        i = snprintf(line, sizeof line, "%016llx %.300s %s\n", (unsigned long long)put_values(NULL, data, n), name,
                     shape_text(shape, n_dims, "x"));
        t->total = fnv1a64(t->total, line, (size_t)i);
        fputs(line, stdout);
    }
    flush_output(t->p);
    t->n_tensors++;
    t->n_bytes += n * 4;
}

static int run_trace(program *p) {
    trace_state *t = (trace_state *)new_memory(p, 1, sizeof *t);
    int n_images = p->o.words.n - 1;
    astrovl_image image = {0, 0, NULL, 0};
    t->p = p;
    t->folder = p->o.out;
    t->total = FNV_START;
    if (p->o.hash == (t->folder != NULL)) return usage_error(p->cmd, "where to: -o DIR, or --hash?");
    if (n_images == 0 && is_file(p->o.words.items[0]))
        return usage_error(p->cmd, "%s is a file; the prompt is missing", p->o.words.items[0]);
    if (p->o.how.max_tokens == 0) p->o.how.max_tokens = 1;
    open_model(p);
    p->session = new_session(p, ASTROVL_EXACT, on_tensor, t);
    if (t->folder && make_folder(t->folder) != 0 && errno != EEXIST) exit(write_error(t->folder));
    if (n_images && !load_image(p, p->o.words.items[0], &image, &p->err)) return failed(p);
    char *answer = say(p, &image, n_images, p->o.words.items[n_images]);
    astrovl_image_free(&image);
    if (p->stop || !answer) exit(p->stop ? EXIT_FAILED : failed(p));
    if (t->folder) {
        const char *path = join_path(p, t->folder, strlen(t->folder), "index.tsv");
        FILE *f = begin_file(path);
        fputs("file\tname\tlayer\tcall\tshape\tfnv1a64\n", f);
        for (int i = 0; i < t->index.n; i++) fputs(t->index.items[i], f);
        if (end_file(f, path, 1) != EXIT_OK) return EXIT_FAILED;
    } else {
        printf("total %016llx of %lld tensors\nanswer ", (unsigned long long)t->total, (long long)t->n_tensors);
        print_string(stdout, answer, strlen(answer), 1);
    }
    if (t->folder && !p->o.quiet)
        fprintf(stderr, "%llu tensors, %s, in %s; index.tsv lists them in the order they were computed\n",
                (unsigned long long)t->n_tensors, human_bytes(t->n_bytes), t->folder);
    putchar('\n');
    astrovl_free(answer);
    return EXIT_OK;
}

// ==== score, describe, embed: images and texts in one space ==========================================================
enum { IMAGE_TOWER = 1, TEXT_TOWER = 2, MAX_BATCH = 256, MAX_GROUPS = 64 };

// Opens the model and a session, and says which of the towers that the command needs is missing.
static void open_towers(program *p, int towers) {
    open_model_and_session(p);
    const char *model = p->o.models.items[0];
    if (p->o.batch == 0) p->o.batch = 4;
    p->started = time(NULL);
    p->counting = 1;
    if ((towers & IMAGE_TOWER) && !p->info.has_joint_image)
        exit(fail("%s: cannot embed images: no CLIP vision tower with a projection; name one with -m", model));
    if ((towers & TEXT_TOWER) && !p->info.has_joint_text)
        exit(fail("%s: cannot embed texts: no CLIP text tower; name a file that has one with -m", model));
}

static float *new_rows(program *p, int n) {
    return (float *)new_memory(p, (size_t)n, (size_t)p->info.n_embd_joint * 4);
}
static float *row_of(const program *p, float *rows, int i) { return rows + (size_t)i * (size_t)p->info.n_embd_joint; }

// Embeds up to MAX_BATCH images in one pass, or each alone if that fails. rows: out, [n][n_embd_joint]. An image that
// cannot be read or embedded is reported; its ok is 0 and its row unspecified. Returns how many are good.
static int embed_batch(program *p, const char *const *paths, int n, float *rows, char *ok) {
    astrovl_image images[MAX_BATCH];
    int i, good = 0, next;
    for (i = 0; i < n; i++) {
        if (!(ok[i] = (char)load_image(p, paths[i], &images[good], &p->err))) failed_on(p, paths[i]);
        good += ok[i];
    }
    const int done = !good || astrovl_embed_images(p->session, images, good, !p->o.raw, rows, &p->err) == ASTROVL_OK;
    for (i = 0; i < good; i++) astrovl_image_free(&images[i]);
    if (!done && n == 1) return *ok = 0, failed_on(p, *paths), 0;
    for (i = n - 1, next = good; i >= 0; i--)              // from the rows of the good ones to those of all
        if (ok[i] && done) memmove(row_of(p, rows, i), row_of(p, rows, --next), (size_t)p->info.n_embd_joint * 4);
        else if (ok[i]) good += embed_batch(p, paths + i, 1, row_of(p, rows, i), ok + i) - 1;
    return good;
}

// {..., "file": path, "embedding": [...]}, with and without --json; every number reads back as the same float32
static void print_embedding(const program *p, const char *key, const char *name, const float *row) {
    g_json = 1;
    begin_json(p, "%k %s embedding:[", key, name);
    for (int k = 0; k < p->info.n_embd_joint; k++) put_json("%f", row[k]);
    put_json("]}\n");
    g_json = p->o.json;
}

// Embeds any number of images, pass by pass. print: the rows as JSON lines. EXIT_FAILED if one cannot be read.
static int embed_images(program *p, const char *const *paths, int n, float *rows, int print) {
    char ok[MAX_BATCH];
    int some, status = EXIT_OK;
    for (int i = 0; i < n && !p->stop; i += some) {
        some = n - i < p->o.batch ? n - i : p->o.batch;
        draw_bar(p, "images", i, n, 0);
        if (embed_batch(p, paths + i, some, row_of(p, rows, i), ok) < some) status = EXIT_FAILED;
        for (int k = 0; k < some && print; k++)
            if (ok[k]) clear_bar(p), print_embedding(p, "file", paths[i + k], row_of(p, rows, i + k));
        flush_output(p);
    }
    clear_bar(p);
    return status;
}

static void embed_texts(program *p, const char *const *texts, int n, float *rows) {
    for (int i = 0, some; i < n; i += some) {
        some = n - i < 32 ? n - i : 32;
        draw_bar(p, "texts", i, n, 0);
        if (astrovl_embed_texts(p->session, texts + i, some, !p->o.raw, row_of(p, rows, i), &p->err)) exit(failed(p));
    }
    clear_bar(p);
}

static int run_embed(program *p) {
    list *images = &p->o.words, *texts = &p->o.texts;
    int n = images->n + texts->n, status = EXIT_OK;
    if ((images->n == 0) == (texts->n == 0)) return usage_error(p->cmd, "images are wanted, or --text TEXT (not both)");
    open_towers(p, images->n ? IMAGE_TOWER : TEXT_TOWER);
    float *rows = new_rows(p, n);
    if (images->n) status = embed_images(p, images->items, n, rows, !p->o.out);
    else embed_texts(p, texts->items, n, rows);
    const int64_t shape[2] = {n, p->info.n_embd_joint};
    if (p->o.out && status != EXIT_OK) return fail_on(p->o.out, "%s: not written, since rows are missing", p->o.out);
    if (p->o.out) return save_npy(p->o.out, shape, 2, rows), EXIT_OK;
    for (int i = 0; i < texts->n; i++) print_embedding(p, "text", texts->items[i], row_of(p, rows, i));
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

// Cosines, and probabilities = softmax(logit_scale * cosine) over the group. best: print so many, best first; 0: all
static void print_fits(program *p, const group *g, const float *image, int best) {
    int i, n = g->texts.n;
    astrovl_linear(g->odds, image, g->rows, NULL, 1, p->info.n_embd_joint, n);
    for (i = 0; i < n; i++) g->fits[i].row = i, g->fits[i].score = g->odds[i], g->odds[i] *= p->info.logit_scale;
    astrovl_softmax(g->odds, n);
    if (best) qsort(g->fits, (size_t)n, sizeof *g->fits, by_score);
    if (g->title) put_plain("  %s\n", g->title);
    for (i = 0; i < (best && best < n ? best : n); i++) {
        const char *text = g->texts.items[g->fits[i].row];
        const float cosine = g->fits[i].score, probability = g->odds[g->fits[i].row];
        put_json("{text:%s cosine:%f probability:%f", text, cosine, probability);
        put_json(g->title ? "group:%s}" : "}", g->title);
        put_plain("  %7.4f  %5.1f %%  ", cosine, probability * 100);
        put_line(text);
    }
}

static int match_images(program *p, group *groups, int n_groups, int best) {
    int i, status = EXIT_OK;
    open_towers(p, IMAGE_TOWER | TEXT_TOWER);
    float *row = new_rows(p, 1);
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
        begin_json(p, "file:%s matches:[", path);
        put_line(path);
        for (int k = 0; k < n_groups; k++) print_fits(p, &groups[k], row, best);
        put_json("]}\n");
        flush_output(p);
    }
    return status;
}

static int run_score(program *p) {
    group g = {NULL, p->o.texts, NULL, NULL, NULL};
    if (p->o.texts.n < 1) return usage_error(p->cmd, "against which texts? --text TEXT");
    return match_images(p, &g, 1, 0);
}

// Texts, one a line. Blank lines and those that begin with '#' are skipped; [TITLE] begins a group. Returns the groups.
static int read_labels(program *p, const char *path, group groups[MAX_GROUPS]) {
    lines l = read_lines(p, path);
    size_t n_labels = 0;
    int n = 1;
    unsigned code;
    while (next_line(&l)) {
        for (; *l.line == ' ' || *l.line == '\t'; l.size--) l.line++;
        while (l.size && (l.line[l.size - 1] == ' ' || l.line[l.size - 1] == '\t')) l.line[--l.size] = 0;
        if (!l.size || *l.line == '#') continue;
        for (size_t at = 0; at < l.size;) {
            at += utf8_next(l.line + at, l.size - at, &code);
            if (code == NO_UTF8 || (is_control(code) && code != '\t'))
                line_error(&l, "this is not UTF-8 text, or holds control characters");
        }
        if (l.size > 1000) line_error(&l, "a label of more than 1000 bytes");
        if (*l.line == '[' && l.line[l.size - 1] == ']') {
            if (groups[n - 1].texts.n && n++ == MAX_GROUPS) line_error(&l, "more than 64 groups");
            l.line[l.size - 1] = 0;
            groups[n - 1].title = l.line + 1;
            continue;
        }
        if (n_labels++ == 100000) line_error(&l, "more than 100000 labels");
        list_add(p, &groups[n - 1].texts, l.line, l.size);
    }
    if (!groups[n - 1].texts.n) exit(fail_on(path, "%s: no label is in it, or in its last group: one a line", path));
    return n;
}

static int run_describe(program *p) {
    group *groups = (group *)new_memory(p, MAX_GROUPS, sizeof *groups);
    const char *path = p->o.labels ? p->o.labels : p->labels;
    if (!*path)
        exit(fail("the list of labels, " LABELS ", is neither beside the program nor in " ASTROVL_DATA_DIR
                  "; name one with --labels"));
    return match_images(p, groups, read_labels(p, path, groups), p->o.best ? p->o.best : 5);
}

// ==== index, search ==================================================================================================
//
// An index file, all numbers little-endian (README: The index file):
//   header   "AVLINDEX" | version u32 (1) | n_dims u32 | model_fingerprint u64 | FNV-1a u64 of the 24 bytes before
//   records, without gaps, one for each image:
//     n u32, bytes of the name | ~n u32 | row, n_dims float16, L2-normalized | name, n bytes | FNV-1a u64 of all before
// Those of one pass are appended in one write, then synced: a program that is killed leaves at worst an incomplete
// record at the end, which readers skip and `astrovl index` cuts off.

enum { INDEX_HEADER = 32, MAX_NAME = 65535 };

typedef struct image_index {
    const char    *path;
    FILE          *file;
    int            n_dims, keep_rows, torn, n_known, n_others;   // images: there already, of formats that are not read
    unsigned char  header[INDEX_HEADER];   // what the model in use would write
    list           names;
    unsigned char *rows;                   // [names.n][n_dims] float16, if keep_rows
    size_t         capacity;               // of rows, in bytes
    uint64_t       end;                    // where the last whole record ends; behind it lies a torn one, if anything
} image_index;

// Differs between models whose embeddings differ: the sum of a hash for each tensor but those of the language model and
// the projector. It covers name, type, shape, and all bytes if there are up to 64 KiB, otherwise 16 pieces of 4 KiB.
static uint64_t model_fingerprint(const astrovl_model *model) {
    static const char *const others[] = {"blk.", "token_embd", "output", "rope_freqs", "mm.", "model.image_newline"};
    uint64_t sum = 0, h, k;
    char text[128];
    int o;
    for (int f = 0; f < astrovl_n_files(model); f++) {
        const astrovl_gguf *file = astrovl_file(model, f);
        for (int i = 0; i < astrovl_gguf_n_tensors(file); i++) {
            const astrovl_tensor *t = astrovl_gguf_tensor(file, i);
            uint64_t pieces = t->n_bytes <= 65536 ? 1 : 16, piece = pieces == 1 ? t->n_bytes : 4096;
            for (o = 0; o < 6 && !begins(t->name, others[o]); o++) {}
            if (o < 6) continue;
            h = fnv1a64(FNV_START, t->name, strlen(t->name));
            snprintf(text, sizeof text, "%d %lld %lld %lld %lld", (int)t->type, (long long)t->ne[0],
                     (long long)t->ne[1], (long long)t->ne[2], (long long)t->ne[3]);
            h = fnv1a64(h, text, strlen(text));
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
    if (ferror(ix->file)) exit(fail_on(ix->path, "%s: cannot be read: %s", ix->path, strerror(errno)));
    if (memcmp(h, "AVLINDEX", size < 8 ? size : 8) != 0) exit(fail_on(ix->path, "%s: is no index file", ix->path));
    ix->end = size;
    if (size < INDEX_HEADER || memcmp(h, ix->header, INDEX_HEADER) == 0) return size;
    if (get_le(h + 24, 8) != fnv1a64(FNV_START, h, 24))
        exit(fail_on(ix->path, "%s: its header is damaged; make the index anew", ix->path));
    if (get_le(h + 8, 4) != 1) exit(fail_on(ix->path, "%s: is of another version of the format", ix->path));
    exit(fail_on(ix->path, "%s: was made with another model (%016llx, %u numbers a row; this one is %016llx, %d): "
                 "name that model with -m, or begin another index", ix->path, (unsigned long long)get_le(h + 16, 8),
                 (unsigned)get_le(h + 12, 4), (unsigned long long)get_le(ix->header + 16, 8), ix->n_dims));
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
        if (got == 8 && get_le(record, 8) == 0) {          // a machine that lost power may leave zeros, up to the end
            int c;
            while ((c = getc(ix->file)) == 0) {}
            if (c != EOF) damage = "zeros";
        } else if (got == 8 && (get_le(record + 4, 4) != (~n & 0xFFFFFFFFu) || n < 1 || n > MAX_NAME)) {
            damage = "its size is impossible";
        } else if (got == 8 && fread(record + 8, 1, size, ix->file) == size) {
            ix->torn = get_le(record + size, 8) != fnv1a64(FNV_START, record, size);
            if (ix->torn && getc(ix->file) != EOF) damage = "its checksum is wrong";
            if (ix->torn) continue;
            list_add(p, &ix->names, (const char *)record + 8 + row_size, n);
            if (ix->keep_rows) {
                const size_t used = (size_t)(ix->names.n - 1) * row_size;
                if (used + row_size > ix->capacity) {
                    ix->capacity = used * 2 + 64 * row_size;
                    ix->rows = (unsigned char *)realloc(ix->rows, ix->capacity);
                    if (!ix->rows || ix->capacity < used) exit(fail_on(ix->path, "%s: out of memory", ix->path));
                }
                memcpy(ix->rows + used, record + 8, row_size);
            }
            ix->end += size + 8;
        }
    }
    if (ferror(ix->file)) exit(fail_on(ix->path, "%s: cannot be read: %s", ix->path, strerror(errno)));
    if (damage)
        exit(fail_on(ix->path, "%s: the record at byte %llu is damaged (%s) and is not the last: make the index anew",
                     ix->path, (unsigned long long)ix->end, damage));
}

// Appends bytes and has them on the disk; on failure takes back what was written.
static void append_to_index(image_index *ix, const unsigned char *bytes, size_t size) {
    size_t done = 0;
    for (long long n = 1; done < size && (n > 0 || (n < 0 && errno == EINTR)); done += n > 0 ? (size_t)n : 0)
        n = (long long)write_file(ix->file, bytes + done, size - done);
    if (done < size || (sync_file(ix->file) != 0 && errno != EINVAL)) {      // EINVAL: a file that needs no syncing
        write_error(ix->path);
        if (cut_file(ix->file, ix->end) != 0) write_error(ix->path);
        exit(EXIT_FAILED);
    }
    ix->end += size;
}

// Opens the index to append to: makes it, or reads the one there is and cuts a torn record off. Only one program may.
static void open_index(program *p, image_index *ix) {
    if (is_special(ix->path)) exit(fail_on(ix->path, "%s: is a folder, a pipe or a device; name a file", ix->path));
    ix->file = open_to_append(ix->path);
    if (!ix->file) exit(write_error(ix->path));
    if (lock_file(ix->file) != 0)
        exit(fail_on(ix->path, "%s: another astrovl is writing to this index; wait until it is done", ix->path));
    rewind(ix->file);
    size_t size = read_index_header(ix);
    if (size < INDEX_HEADER) ix->end = 0;                  // a new file, or one whose making was cut short
    else read_records(p, ix);
    if (ix->torn) note("%s: cutting off an incomplete record at the end (a run was stopped)", ix->path);
    if ((ix->torn || !ix->end) && size && cut_file(ix->file, ix->end) != 0) exit(write_error(ix->path));
    if (!ix->end) append_to_index(ix, ix->header, INDEX_HEADER);
}

static int by_text(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

// One spelling for each path: without "." and empty parts.
static void tidy_path(char *path) {
    char *to = path;
    for (const char *from = path; *from; from++) {
        const int at_start = to == path || to[-1] == '/';
        if (at_start && from[0] == '.' && from[1] == '/') from++;
        if (from == path || !at_start || *from != '/') *to++ = *from;
    }
    *to = 0;
}

// A file as it is named, or the images (by their endings) in a folder and below it. is_found: it was met in a folder;
// links to folders are then not followed, since they could lead in circles. *n_others counts images of formats that
// are not read. (On Windows folders are not walked; give their files with -.)
static int add_images(program *p, const char *path, int is_found, list *names, int *n_others) {
#if !defined(_WIN32)
    static const char *const endings[] = {
        ".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".pnm",
        ".fits", ".fit", ".fts", ".fz", ".tif", ".tiff", ".gif", ".bmp", ".webp", ".jp2", ".jxl", ".avif",
        ".heic", ".heif", ".jfif", ".jpe", ".j2k", ".gz", ".dng", ".psd", ".pbm", ".pam"};
    enum { N_READ = 6, N_ENDINGS = (int)(sizeof endings / sizeof *endings) };
    const char *dot = strrchr(path, '.');
    struct stat s, target;
    int i = 0, status = EXIT_OK, found = (is_found ? lstat(path, &s) : stat(path, &s)) == 0;
    if (!found && is_found) return cannot_open(path);      // a path that is too long, ...
    if (found && S_ISDIR(s.st_mode)) {
        DIR *folder = opendir(path);
        if (!folder) return cannot_open(path);
        for (const struct dirent *entry; (entry = readdir(folder)) != NULL;)
            if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
                status |= add_images(p, join_path(p, path, strlen(path), entry->d_name), 1, names, n_others);
        closedir(folder);
        return status;
    }
    while (dot && i < N_ENDINGS && strcasecmp(dot, endings[i]) != 0) i++;
    if (is_found && (!dot || i == N_ENDINGS)) return EXIT_OK;
    if (is_found && stat(path, &target) != 0) return cannot_open(path);
    if (is_found && !S_ISREG(target.st_mode)) return EXIT_OK;
    if (is_found && i >= N_READ) return ++*n_others, EXIT_OK;
#else
    (void)is_found, (void)n_others;
#endif
    list_add(p, names, path, strlen(path));
    tidy_path((char *)names->items[names->n - 1]);
    return EXIT_OK;
}

// What the arguments name ("-": the lines of standard input), sorted, without what the index holds, which is counted.
static int collect_images(program *p, image_index *ix, list *todo) {
    list all = {NULL, 0, 0};
    int i, status = EXIT_OK;
    for (i = 0; i < p->o.words.n; i++) {
        const char *word = p->o.words.items[i];
        if (strcmp(word, "-") != 0) { status |= add_images(p, word, 0, &all, &ix->n_others); continue; }
        lines l = read_lines(p, word);
        for (l.path = "standard input"; next_line(&l);) {
            if (strlen(l.line) != l.size || l.size > MAX_NAME) line_error(&l, "this is no file name");
            if (l.size) status |= add_images(p, l.line, 0, &all, &ix->n_others);
        }
    }
    if (ix->n_others && !p->o.quiet)
        note("%d images of other formats (.fits, .tif, ...) are passed over; convert them to PNG or JPEG",
             ix->n_others);
    if (!all.n) exit(fail("there are no images to index (in folders: files .png .jpg .jpeg .ppm .pgm .pnm)"));
    qsort((void *)all.items, (size_t)all.n, sizeof *all.items, by_text);
    if (ix->names.n) qsort((void *)ix->names.items, (size_t)ix->names.n, sizeof *ix->names.items, by_text);
    for (i = 0; i < all.n; i++) {
        const char *name = all.items[i];
        if ((i && strcmp(name, all.items[i - 1]) == 0) || (ix->names.n &&
            bsearch(&name, (const void *)ix->names.items, (size_t)ix->names.n, sizeof name, by_text))) ix->n_known++;
        else list_add(p, todo, name, strlen(name));
    }
    if (ix->n_known && !p->o.quiet) note("%s: has %d of these %d images already", ix->path, ix->n_known, all.n);
    return status;
}

static int run_index(program *p) {
    list todo = {NULL, 0, 0};
    int some, added = 0;
    double rate = 0;
    char ok[MAX_BATCH];
    if (!p->o.out) return usage_error(p->cmd, "into which index? -o FILE");
    open_towers(p, IMAGE_TOWER);
    image_index *ix = new_index(p, p->o.out);
    open_index(p, ix);
    const int status = collect_images(p, ix, &todo);
    unsigned char *records = (unsigned char *)new_memory(p, (size_t)p->o.batch, 16 + 2 * (size_t)ix->n_dims + MAX_NAME);
    float *rows = new_rows(p, p->o.batch);
    const double start = seconds();
    for (int i = 0; i < todo.n && !p->stop; i += some) {
        unsigned char *r = records;
        some = todo.n - i < p->o.batch ? todo.n - i : p->o.batch;
        draw_bar(p, "images", i, todo.n, rate);
        added += embed_batch(p, todo.items + i, some, rows, ok);
        for (int k = 0; k < some; k++) {
            const char *name = todo.items[i + k];
            const size_t n = strlen(name), n_before = 8 + 2 * (size_t)ix->n_dims + n;      // the checksum
            if (!ok[k]) continue;
            put_le(r, n, 4);
            put_le(r + 4, ~(uint64_t)n, 4);
            for (int d = 0; d < ix->n_dims; d++) put_le(r + 8 + 2 * d, astrovl_f32_to_f16(row_of(p, rows, k)[d]), 2);
            memcpy(r + n_before - n, name, n);
            put_le(r + n_before, fnv1a64(FNV_START, r, n_before), 8);
            r += n_before + 8;
        }
        if (r > records) append_to_index(ix, records, (size_t)(r - records));
        rate = added / (seconds() - start + 1e-9);
    }
    clear_bar(p);
    begin_json(p, "index:%s added:%d known:%d unreadable:%d passed_over:%d rows:%d images_per_second:%f}\n", ix->path,
               added, ix->n_known, todo.n - added, ix->n_others, ix->names.n + added, rate);
    put_plain("%s: %d images added (%.1f/s), %d already there, %d unreadable; %d in all\n", ix->path, added, rate,
              ix->n_known, todo.n - added, ix->names.n + added);
    fclose(ix->file);
    return added < todo.n ? EXIT_FAILED : status;
}

static int run_search(program *p) {
    const char *query = p->o.image ? p->o.image : p->o.words.items[1];
    int k = p->o.best ? p->o.best : 10, n = 0;
    char ok;
    if ((p->o.words.n == 1) != (p->o.image != NULL)) return usage_error(p->cmd, "%s", p->cmd->wanted);
    open_towers(p, p->o.image ? IMAGE_TOWER : TEXT_TOWER);
    image_index *ix = new_index(p, p->o.words.items[0]);
    ix->keep_rows = 1;
    if (!(ix->file = fopen(ix->path, "rb"))) return cannot_open(ix->path);
    if (read_index_header(ix) < INDEX_HEADER)
        return fail_on(ix->path, "%s: its header is incomplete; `astrovl index` makes it anew", ix->path);
    read_records(p, ix);
    fclose(ix->file);
    if (ix->torn && !p->o.quiet)
        note("%s: skipping an incomplete record at the end; `astrovl index` continues there", ix->path);
    float *row = new_rows(p, 1);
    if (!p->o.image) embed_texts(p, &query, 1, row);
    else if (!embed_batch(p, &query, 1, row, &ok)) return EXIT_FAILED;
    const astrovl_rows rows = {ix->rows, ix->names.n, ix->n_dims};
    if (k > ix->names.n) k = ix->names.n;
    astrovl_hit *hits = (astrovl_hit *)new_memory(p, (size_t)k, sizeof *hits);
    if (k) n = astrovl_search(&rows, row, k, p->o.threads, hits, &p->err);
    if (n < 0) return failed(p);
    begin_json(p, "%k %s rows:%d hits:[", p->o.image ? "file" : "text", query, ix->names.n);
    for (int i = 0; i < n; i++) {
        const char *name = ix->names.items[hits[i].row];
        put_json("{cosine:%f file:%s}", hits[i].score, name);
        put_plain("%7.4f  ", hits[i].score);
        put_line(name);
    }
    put_json("]}\n");
    free(ix->rows);
    return EXIT_OK;
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
    snprintf(what, sizeof what, n ? "\"%s\" must be one text" : "\"%s\" is missing; a line is {\"image\": ...}", key);
    if (n < least || n > most) line_error(l, what);
    for (i = 0; i < n; i++) list_add(p, &strings, texts[i], strlen(texts[i]));
    astrovl_free(texts);
    return strings;
}

// Reads a whole set before the long work begins, so that a broken line is said at once.
static sample *read_samples(program *p, const char *path, int vqa, int *n) {
    const char *slash = strrchr(path, '/');
    const size_t folder = slash ? (size_t)(slash - path) + 1 : 0;
    lines l = read_lines(p, path);
    size_t n_lines = 1;
    for (const char *c = l.at; c < l.end; c++) n_lines += *c == '\n';
    sample *samples = (sample *)new_memory(p, n_lines, sizeof *samples);
    for (*n = 0; next_line(&l);) {
        if (strspn(l.line, " \t") == l.size) continue;
        sample *x = &samples[(*n)++];
        x->image = read_member(p, &l, "image", 1, 1).items[0];
        x->label = read_member(p, &l, vqa ? "class" : "caption", 1, 1).items[0];
        if (!*x->image || !*x->label) line_error(&l, "an empty name or text");
        x->path = join_path(p, path, *x->image == '/' ? 0 : folder, x->image);
        if (!vqa) continue;
        const list reference = read_member(p, &l, "description", 0, 1);
        if (reference.n) x->reference = reference.items[0];
        x->features = read_member(p, &l, "features", 0, 1000000);
    }
    if (*n < 2) exit(fail_on(path, "%s: two lines at least are wanted", path));
    return samples;
}

// ---- retrieval

typedef struct retrieval {
    int    n;
    double loss;                           // CLIP's, the whole set as one batch
    double share[2][101];                  // [image -> text, text -> image][k]: partner among the best k percent
    double mean[2], median[2];             // cosines of [pairs, wrong pairs]
    float *cosines[2];                     // [pairs, wrong pairs][n], ascending
} retrieval;

// Row i of queries belongs to row i of items; both [n][n_embd_joint], normalized. shares[k]: of queries whose partner
// is among the best floor(k/100 n) items; of equal items the earlier is better.
// Returns the mean of -log softmax(logit_scale * cosines)[i][i].
static double rank_partners(program *p, const float *queries, const float *items, int n, double *shares) {
    const int n_dims = p->info.n_embd_joint;
    const double scale = p->info.logit_scale;
    float *cosines = (float *)new_memory(p, (size_t)n, sizeof *cosines);
    double loss = 0;
    for (int i = 0; i < n; i++) {
        double sum = 0;
        int rank = 0;
        astrovl_linear(cosines, queries + (size_t)i * n_dims, items, NULL, 1, n_dims, n);
        for (int j = 0; j < n; j++) {
            sum += exp(scale * cosines[j] - scale * cosines[i]);
            rank += cosines[j] > cosines[i] || (j < i && !(cosines[j] < cosines[i]));
        }
        loss += log(sum) / n;          // cppcheck-suppress invalidFunctionArg ; sum >= 1, by j = i
        for (int k = 1; k <= 100; k++) shares[k] += rank < (int)((int64_t)k * n / 100) ? 1.0 / n : 0;
    }
    return loss;
}

static int by_value(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void print_retrieval(const program *p, const retrieval *r) {
    const int n = r->n, width = snprintf(NULL, 0, "floor(k/100 * %d)", n);
    begin_json(p, "pairs:%d logit_scale:%f contrastive_loss:%f accuracy:[", n, p->info.logit_scale, r->loss);
    put_plain("%d pairs, logit scale %.4g\n"
              "contrastive loss %.4f (the set as one batch; knowing nothing: ln %d = %.4f)\n\n"
              "how often is the partner among the best k %%?\n"
              "    k  floor(k/100 * %d)  image -> text  text -> image  by chance\n",
              n, p->info.logit_scale, r->loss, n, log(n), n);
    for (int k = 1; k <= 100; k++) {
        const int best = (int)((int64_t)k * n / 100);
        const double there = r->share[0][k], back = r->share[1][k];
        put_json("{k_percent:%d best:%d image_to_text:%f text_to_image:%f}", k, best, there, back);
        if (k == 1 || k == 5 || k == 10 || k == 20 || k == 50)
            put_plain("%3d %%  %*d  %11.1f %%  %11.1f %%  %7.1f %%%s\n", k, width, best, there * 100, back * 100,
                      100.0 * best / n, best ? "" : "  (no rank counts: too few pairs)");
    }
    put_json("]");
    put_plain("\ncosines          mean   median\n");
    for (int i = 0; i < 2; i++) {
        const double mean = r->mean[i], median = r->median[i];
        put_json("%k {mean:%f median:%f sorted:[", i ? "cosines_shuffled" : "cosines_matched", mean, median);
        for (int k = 0; k < n; k++) put_json("%f", r->cosines[i][k]);
        put_json("]}");
        put_plain("%-13s %7.4f  %7.4f\n", i ? "wrong pairs" : "pairs", mean, median);
    }
    put_json("}\n");
}

// ---- its plot: two panels of 360 x 270 points (SVG counts y downwards)

typedef struct panel { double left, x0, x1, y1; } panel;   // its left edge; the values at its edges; the bottom is 0

static double plot_x(const panel *a, double x) { return a->left + 360 * (x - a->x0) / (a->x1 - a->x0); }
static double plot_y(const panel *a, double y) { return 340 - 270 * y / a->y1; }

static void svg_axes(FILE *f, const panel *a, const char *title, const char *x_label, const char *y_label) {
    fprintf(f, "<g text-anchor=\"middle\">\n<text x=\"%g\" y=\"52\">%s</text>\n", a->left + 180, title);
    fprintf(f, "<text x=\"%g\" y=\"384\">%s</text>\n<text transform=\"translate(%g 205) rotate(-90)\">%s</text>\n",
            a->left + 180, x_label, a->left - 46, y_label);
    for (int i = 0; i <= 5; i++) {
        double x = a->x0 + (a->x1 - a->x0) * i / 5, y = a->y1 * i / 5;
        fprintf(f, "<text x=\"%.1f\" y=\"360\">%.3g</text>\n", plot_x(a, x), fabs(x) < 1e-9 ? 0 : x);
        fprintf(f, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">%.3g</text>\n", a->left - 8, plot_y(a, y) + 4, y);
        fprintf(f, "<path d=\"M%g %.1fh360\" stroke=\"%s\"/>\n", a->left, plot_y(a, y), i ? "#ddd" : "#222");
    }
    fprintf(f, "<path d=\"M%g 70V340\" stroke=\"#222\"/>\n</g>\n", a->left);
}

static void svg_legend(FILE *f, double x, double y, const char *style, const char *text) {
    fprintf(f, "<path d=\"M%g %gh26\" %s/>\n<text x=\"%g\" y=\"%g\">%s</text>\n", x, y - 4, style, x + 32, y, text);
}

#define BINS 40
static int save_plot(const char *path, const retrieval *r) {
    static const char *const style[] = {
        "stroke=\"#1f6fb4\" fill=\"#1f6fb4\"", "stroke=\"#888\" fill=\"#888\"",
        "stroke=\"#c4451c\" fill=\"none\" stroke-dasharray=\"7 3\"",
        "stroke=\"#888\" fill=\"none\" stroke-dasharray=\"2 4\""};
    const double low = fmin(r->cosines[0][0], r->cosines[1][0]);
    const double high = fmax(r->cosines[0][r->n - 1], r->cosines[1][r->n - 1]);
    const panel a = {70, 0, 100, 100};                     // shares of queries
    panel b = {560, floor(10 * low) / 10, ceil(10 * high + 1e-6) / 10, 0};         // shares of the cosines, in percent
    double bins[2][BINS] = {{0}};
    char text[64];
    FILE *f = begin_file(path);
    for (int k = 0; k < 2; k++)
        for (int i = 0; i < r->n; i++) {
            double *bin = &bins[k][(int)fmin((r->cosines[k][i] - b.x0) / (b.x1 - b.x0) * BINS, BINS - 1)];
            *bin += 100.0 / r->n;
            b.y1 = fmax(b.y1, 5 * ceil(*bin / 4));         // room for the legend
        }
    fputs("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"950\" height=\"400\" viewBox=\"0 0 950 400\"\n"
          " fill=\"#222\" font-size=\"13\" font-family=\"sans-serif\">\n<path d=\"M0 0H950V400H0\" fill=\"#fff\"/>", f);
    fprintf(f, "<text x=\"475\" y=\"24\" font-size=\"16\" text-anchor=\"middle\">Retrieval among %d pairs of image and "
            "text; contrastive loss %.3f</text>\n", r->n, r->loss);
    svg_axes(f, &a, "Partner found among the best k %", "k (% of the set)", "accuracy (%)");
    fprintf(f, "<path d=\"M70 340L430 70\" %s/>\n", style[3]);
    svg_legend(f, 270, 325, style[3], "chance");
    svg_axes(f, &b, "Cosines of image and text", "cosine", "pairs (%)");
    for (int k = 1; k >= 0; k--) {
        fprintf(f, "<g %s stroke-width=\"2\"><path fill=\"none\" d=\"M", style[2 * k]);
        for (int i = 1; i <= 100; i++)
            fprintf(f, "%s%.1f %.1f", i > 1 ? "L" : "", plot_x(&a, i), plot_y(&a, r->share[k][i] * 100));
        fprintf(f, "\"/></g>\n<path %s fill-opacity=\"0.3\" stroke-width=\"1.5\" d=\"M560 340", style[k]);
        for (int i = 0; i < BINS; i++) fprintf(f, "V%.1fh9", plot_y(&b, bins[k][i]));
        fputs("V340\"/>\n", f);
        svg_legend(f, 270, 285 + 20 * k, style[2 * k], k ? "image for a text" : "text for an image");
        snprintf(text, sizeof text, "%s (mean %.3f)", k ? "wrong pairs" : "pairs", r->mean[k]);
        svg_legend(f, 570, 84 + 20 * k, style[k], text);
    }
    fputs("</svg>\n", f);
    return end_file(f, path, 1);
}

// PAPERCLIP's measurements (arXiv 2403.08851, sections 3.3 and 4.1). Wrong pairs, one of each image and each text, are
// drawn by a fixed sequence: a permutation of one cycle, so that no image keeps its text (Sattolo 1986).
static int evaluate_retrieval(program *p, sample *samples, int n) {
    const char **names = (const char **)new_memory(p, (size_t)n, sizeof *names);
    int *text_of = (int *)new_memory(p, (size_t)n, sizeof *text_of), i, k;
    uint64_t state = 1;
    retrieval r;
    open_towers(p, IMAGE_TOWER | TEXT_TOWER);
    float *images = new_rows(p, n);
    float *texts = new_rows(p, n);
    for (i = 0; i < n; i++) names[i] = samples[i].path;
    if (embed_images(p, names, n, images, 0) != EXIT_OK) return fail("nothing is measured, since images are missing");
    for (i = 0; i < n; i++) names[i] = samples[i].label;
    embed_texts(p, names, n, texts);
    memset(&r, 0, sizeof r);
    r.n = n;
    r.loss = (rank_partners(p, images, texts, n, r.share[0]) + rank_partners(p, texts, images, n, r.share[1])) / 2;
    for (i = 0; i < n; i++) text_of[i] = i;
    for (k = 0; k < 2; k++) {
        float *cosines = r.cosines[k] = (float *)new_memory(p, (size_t)n, sizeof *cosines);
        for (i = 0; i < n; i++) {
            const float *image = row_of(p, images, i), *text = row_of(p, texts, text_of[i]);
            astrovl_linear(&cosines[i], image, text, NULL, 1, p->info.n_embd_joint, 1);
            r.mean[k] += cosines[i] / (double)n;
        }
        qsort(cosines, (size_t)n, sizeof *cosines, by_value);
        r.median[k] = (cosines[(n - 1) / 2] + cosines[n / 2]) / 2.0;
        for (i = n - 1; i > 0; i--) {
            state = state * 6364136223846793005u + 1442695040888963407u;         // Knuth's MMIX
            int other = (int)((state >> 33) % (uint64_t)i), text = text_of[i];
            text_of[i] = text_of[other];
            text_of[other] = text;
        }
    }
    print_retrieval(p, &r);
    return p->o.svg ? save_plot(p->o.svg, &r) : EXIT_OK;
}

// ---- questions about images (AstroLLaVA's benchmark on Galaxy10, arXiv 2504.08583): the model describes each image;
// its text is compared with the image's class, words that should occur, and a reference description

// A set and the sums over it.
typedef struct vqa {
    list    classes;
    sample *samples;
    int     n, right, none, found, features, n_semantic;
    int    *confusion;                     // [classes][classes + 2]: the last two are none named, and all
    double  semantic;
} vqa;

static int is_letter(char c) { return isalnum((unsigned char)c); }       // or digit; in the C locale, of ASCII

// The bytes of `word` if it stands at text[at] as whole words, in any case; otherwise 0.
static size_t word_at(const char *text, size_t at, const char *word) {
    size_t n = strlen(word);
    if (strncasecmp(text + at, word, n) != 0 || !n) return 0;
    if (at > 0 && is_letter(text[at - 1]) && is_letter(word[0])) return 0;
    return is_letter(text[at + n]) && is_letter(word[n - 1]) ? 0 : n;
}

// Which of n words (or terms of several words) a text names first; of those that begin there the longest. -1: none
static int first_named(const char *text, const char *const *words, int n) {
    size_t at, size, most = 0;
    int i, best = -1;
    for (at = 0; text[at] && best < 0; at++)
        for (i = 0; i < n; i++)
            if ((size = word_at(text, at, words[i])) > most) {
                most = size;
                best = i;
            }
    return best;
}

static void print_vqa(const program *p, const vqa *t) {
    const int m = t->classes.n;
    const double right = (double)t->right / t->n, found = (double)t->found / t->features;
    const double semantic = t->semantic / t->n_semantic;
    begin_json(p, "images:%d accuracy:%f none_named:%d features_found:%f semantic_score:%f classes:[", t->n, right,
               t->none, found, semantic);
    put_plain("%d images of %d classes\nclass named right   %5.1f %% (%d of %d; %d named none)\n", t->n, m,
              100 * right, t->right, t->n, t->none);
    if (t->features) put_plain("feature words found %5.1f %% (%d of %d)\n", 100 * found, t->found, t->features);
    if (t->n_semantic) put_plain("semantic score      %6.3f (mean of %d)\n", semantic, t->n_semantic);
    put_plain("\nrow: what it is; column: what the model named, by number\n%29s   right", "");
    for (int c = 0; c < m; c++) put_plain("%5d", c + 1);
    put_plain(" none\n");
    for (int c = 0; c < m; c++) {
        const int *named = t->confusion + c * (m + 2);
        const char *name = t->classes.items[c];
        const double share = (double)named[c] / named[m + 1];
        put_json("{class:%s images:%d accuracy:%f named:[", name, named[m + 1], share);
        put_plain("%3d  ", c + 1);
        put_padded(name, strlen(name), 24);
        put_plain("  %5.1f%%", 100 * share);
        for (int i = 0; i <= m; i++) put_json("%d", named[i]), put_plain(named[i] ? "%5d" : "    .", named[i]);
        put_json("]}");
        put_plain("\n");
    }
    put_json("] answers:[");
    for (int i = 0; i < t->n; i++) {
        const sample *x = &t->samples[i];
        put_json("{file:%s class:%s named:%s features_found:%d semantic_score:%f text:%s}", x->image, x->label,
                 x->named >= 0 && x->named < m ? t->classes.items[x->named] : "none", x->n_found, x->semantic, x->text);
    }
    put_json("]}\n");
}

static int evaluate_vqa(program *p, sample *samples, int n) {
    vqa t = {{NULL, 0, 0}, samples, n, 0, 0, 0, 0, 0, NULL, 0};
    astrovl_image image;
    float cosine;
    open_towers(p, 0);
    float *rows = new_rows(p, 2);
    for (sample *x = samples; x < samples + n; x++) {
        for (x->truth = 0; x->truth < t.classes.n && strcmp(t.classes.items[x->truth], x->label) != 0; x->truth++) {}
        if (x->truth == t.classes.n) list_add(p, &t.classes, x->label, strlen(x->label));
    }
    t.confusion = (int *)new_memory(p, (size_t)t.classes.n, ((size_t)t.classes.n + 2) * sizeof(int));
    for (sample *x = samples; x < samples + n; x++) {
        draw_bar(p, "images", (int)(x - samples), n, 0);
        astrovl_session_reset(p->session);
        if (!load_image(p, x->path, &image, &p->err)) exit(failed_on(p, x->path));
        x->text = say(p, &image, 1, ASTROVL_CAPTION_PROMPT);
        astrovl_image_free(&image);
        if (!x->text || g_interrupted) exit(g_interrupted ? EXIT_FAILED : failed(p));
        x->named = first_named(x->text, t.classes.items, t.classes.n);
        for (int i = 0; i < x->features.n; i++) x->n_found += first_named(x->text, &x->features.items[i], 1) == 0;
        t.right += x->truth == x->named;
        t.none += x->named < 0;
        t.found += x->n_found;
        t.features += x->features.n;
        int *named = t.confusion + x->truth * (t.classes.n + 2);
        named[x->named < 0 ? t.classes.n : x->named]++;
        named[t.classes.n + 1]++;
        x->semantic = strtod("nan", NULL);
        if (!x->reference || !p->info.has_joint_text) continue;
        const char *const texts[] = {x->text, x->reference};
        embed_texts(p, texts, 2, rows);
        astrovl_linear(&cosine, rows, row_of(p, rows, 1), NULL, 1, p->info.n_embd_joint, 1);
        t.semantic += x->semantic = cosine;
        t.n_semantic++;
    }
    clear_bar(p);
    print_vqa(p, &t);
    while (n > 0) astrovl_free(samples[--n].text);
    return EXIT_OK;
}

static int run_evaluate(program *p) {
    int n, is_vqa = strcmp(p->o.words.items[0], "vqa") == 0;
    if (!is_vqa && strcmp(p->o.words.items[0], "retrieval") != 0) return usage_error(p->cmd, "%s", p->cmd->wanted);
    if (is_vqa && p->o.svg) return usage_error(p->cmd, "--svg belongs to retrieval");
    sample *samples = read_samples(p, p->o.words.items[1], is_vqa, &n);
    return (is_vqa ? evaluate_vqa : evaluate_retrieval)(p, samples, n);
}

// ==== summarize: a language model reads an abstract, and its answer keeps to a form (PAPERCLIP, section 2.3) =========
#define SOME "{\"type\":\"array\",\"minItems\":1,\"maxItems\":5," \
             "\"items\":{\"type\":\"string\",\"minLength\":1,\"maxLength\":80}}"
static const char summary_schema[] = "{\"type\": \"object\", \"properties\": {\"objects_and_phenomena\": " SOME ", "
    "\"science_use_cases\": " SOME "}, \"required\": [\"objects_and_phenomena\", \"science_use_cases\"]}";

static const char summary_prompt[] =
    "What follows is the abstract of a proposal to observe with a telescope. Think of the images that it will give. "
    "Answer in JSON with two lists of one to five short entries each. \"objects_and_phenomena\": what the images would "
    "show, such as \"spiral galaxy\" or \"gravitational lens\". \"science_use_cases\": what they would be good for, "
    "such as \"measure the distance to supernovae\". Take from the abstract what is specific; leave out the telescope, "
    "its instruments and the proposal.";
static const char relevance_prompt[] =
    "What follows is the abstract of a proposal to observe with a telescope, and a query that names an object or a "
    "concept. Would the observations show what the query names? What is merely related to it does not count. Answer "
    "true or false.";
static const char plain_prompt[] =
    "Read this abstract of a proposal to observe with a telescope, and answer in the form that is asked for.";

static int summarize_file(program *p, const char *path) {
    const char *prompt = p->o.prompt ? p->o.prompt : p->o.boolean ? relevance_prompt :
                         p->o.schema || p->o.regex ? plain_prompt : summary_prompt;
    const char *query = p->o.query ? p->o.query : "";
    size_t size = 0;
    char *abstract = read_text(p, path, &size);
    if (strlen(abstract) != size) return fail_on(path, "%s: is no text: it holds zero bytes", path);
    while (size && isspace((unsigned char)abstract[size - 1])) abstract[--size] = 0;
    if (!size) return fail_on(path, "%s: is empty; an abstract is wanted", path);
    const size_t room = strlen(prompt) + size + strlen(query) + 64;
    char *request = (char *)new_memory(p, room, 1);
    snprintf(request, room, "%s\n\nAbstract: %s%s%s", prompt, abstract, *query ? "\n\nQuery: " : "", query);
    astrovl_session_reset(p->session);
    char *answer = say(p, NULL, 0, request);
    if (!answer) return say_failure(path, astrovl_status_name(p->err.status), "%s: %s", path, p->err.message);
    finish_answer(p, p->session, &path, 1, p->o.words.n > 1 ? path : NULL, request, answer);
    astrovl_free(answer);
    return g_interrupted ? EXIT_FAILED : EXIT_OK;
}

static int run_summarize(program *p) {
    const char *path = p->o.schema, *schema = p->o.boolean ? "{\"type\": \"boolean\"}" : summary_schema;
    size_t size = strlen(schema);
    int status = EXIT_OK;
    if ((path != NULL) + (p->o.regex != NULL) + p->o.boolean > 1)
        return usage_error(p->cmd, "one of --schema, --regex, --bool");
    if (p->o.boolean && !p->o.query && !p->o.prompt) return usage_error(p->cmd, "relevant to what? --query TEXT");
    if (p->o.how.max_tokens == 0) p->o.how.max_tokens = 512;
    if (p->o.how.repetition_penalty <= 0) p->o.how.repetition_penalty = 1.1f;     // small models repeat items of a list
    open_model_and_session(p);
    if (path) schema = read_text(p, path, &size);
    astrovl_guide *guide = p->o.regex ? astrovl_guide_regex(p->model, p->o.regex, &p->err) :
                           astrovl_guide_schema(p->model, schema, size, &p->err);
    if (!guide) return say_failure(path, astrovl_status_name(p->err.status), "%s: %s",
                                   path ? path : p->o.regex ? "--regex" : "schema", p->err.message);
    p->o.how.guide = guide;
    for (int i = 0; i < p->o.words.n && status == EXIT_OK && !p->stop; i++)
        status = summarize_file(p, p->o.words.items[i]);
    astrovl_guide_free(guide);
    return status;
}

// ==== version, the list of commands, main ============================================================================
static int run_version(program *p) {
    printf("astrovl %s\ncompiled with ", ASTROVL_VERSION);
#if defined(__clang__)
    printf("%s, ", __VERSION__);
#elif defined(__VERSION__)
    printf("gcc %s, ", __VERSION__);
#endif
    printf("%d-bit\nshipped model: %s\n", (int)sizeof(void *) * 8, p->shipped[0] ? p->shipped : "not found");
    return EXIT_OK;
}

static const command commands[] = {
    {"caption", CAPTION, run_caption, 1, MANY, "which image?", "IMAGE...", "describe images",
     "Describes each image (PNG, JPEG or PNM) in a sentence or two. With several, each line begins with the file's\n"
     "name. --batch N reads the weights once for N images: the same answers, sooner where a model is large.",
     "  astrovl caption galaxy.png\n  astrovl caption --json *.jpg > captions.jsonl\n"
     "  astrovl caption -m llava-q4_0.gguf -m mmproj.gguf --temperature 0.7 --seed 3 nebula.jpg\n"},
    {"ask", ASK, run_ask, 2, MANY, "an image and a question are wanted", "IMAGE... \"QUESTION\"",
     "ask a question about an image",
     "Answers a question about each image in turn, or about all of them at once with --together.",
     "  astrovl ask galaxy.png \"Is there a bar?\"\n  astrovl ask *.png \"What kind of object is this?\"\n"
     "  astrovl ask --together before.png after.png \"What has changed?\"\n"},
    {"chat", CHAT, run_chat, 0, 1, "one image at most; /image shows others later", "[IMAGE]", "talk about an image",
     "A dialogue: the model remembers what was said. Lines that begin with a slash are commands: /image FILE,\n"
     "/add FILE, /reset, /help, /quit. Ctrl-C stops an answer. Questions may also come from a pipe, one a line;\n"
     "standard output then has the answers alone. It works with a language model alone, too.",
     "  astrovl chat galaxy.png\n  printf 'What is this?\\nIs there a bar?\\n' | astrovl chat --quiet galaxy.png\n"
     "  astrovl chat -m smollm2.gguf --prompt \"Why is the sky dark at night?\"\n"},
    {"tokens", TOKENS, run_tokens, 0, 1, "one text is wanted; put it in quotes", "[\"TEXT\" | -]",
     "show how a text is cut into tokens",
     "Shows the tokens of a text: id, the piece as the vocabulary spells it, and the bytes it stands for. Without a\n"
     "text (or with -) it is read from standard input. A file with a vocabulary and no weights is enough.",
     "  astrovl tokens \"a barred spiral galaxy\"\n  printf 'M31' | astrovl tokens --ids -m llama-2.gguf\n"
     "  astrovl tokens --ids \"M31\" | astrovl tokens --decode\n"},
    {"inspect", INSPECT, run_inspect, 0, MANY, "", "[MODEL...]", "show what is in model files",
     "Lists the metadata and the tensors of GGUF files with their types, shapes (slowest dimension first) and sizes,\n"
     "and the model that the files make up together. Without a file: the shipped model. --check says instead which\n"
     "commands can be used with the files together, or what they lack (exit status 1).",
     "  astrovl inspect model.gguf mmproj.gguf\n  astrovl inspect --json model.gguf | python3 -m json.tool\n"
     "  astrovl inspect --check model.gguf mmproj.gguf\n"},
    {"quantize", QUANTIZE, run_quantize, 3, 3, "wanted: a GGUF file, the one to be written, and a type such as q4_k_m",
     "IN OUT TYPE", "make a model file smaller",
     "Writes a copy of a GGUF file (language model, mmproj or CLIP) with its weight matrices in another type:\n"
     "  f32 f16 bf16 q8_0 q6_k q5_k q5_1 q5_0 q4_k q4_1 q4_0 q3_k q2_k  all matrices alike, 32 to 2.6 bits a weight\n"
     "  q5_k_m q5_k_s q4_k_m q4_k_s q3_k_l q3_k_m q3_k_s                llama.cpp's mixes: more bits where it pays\n"
     "Mixes keep the output matrix in Q6_K, and give attn_v and ffn_down (q3_k: attn_output) in some or all blocks a\n"
     "larger type. Vectors, norms, position and patch embeddings stay as they are. Rows that are no multiple of 256\n"
     "(32) take a type of smaller blocks, or F16. Start from F16 or F32: quantizing twice loses twice. OUT may be\n"
     "IN. q8_0 is almost as good as the original; q4_k_m suits large language models.",
     "  astrovl quantize llava-f16.gguf llava-q4_k_m.gguf q4_k_m\n"
     "  astrovl quantize mmproj-f16.gguf mmproj-q8_0.gguf q8_0\n"},
    {"trace", TRACE, run_trace, 1, 2, "an image and a prompt are wanted (or a prompt alone)",
     "[IMAGE] \"PROMPT\" -o DIR | --hash", "save all that is computed for an answer",
     "Runs one question in exact arithmetic and saves every intermediate tensor as a .npy file, named as\n"
     "transformers names the module; the next time (once a token) as NAME.call2.npy and so on. DIR/index.tsv lists\n"
     "the files in the order of computation. With --hash nothing is saved: each line has a tensor's FNV-1a hash,\n"
     "name and shape, the last two a hash of all lines and the answer: the same on every machine.",
     "  astrovl trace galaxy.png \"Is there a bar?\" -o /tmp/trace\n"
     "  python3 -c 'import numpy; print(numpy.load(\"/tmp/trace/model.norm.npy\").shape)'\n"
     "  astrovl trace galaxy.png \"Is there a bar?\" --hash --max-tokens 8 | tail -2\n"},
    {"score", SCORE, run_score, 1, MANY, "which image?", "IMAGE... --text T [--text T...]",
     "say how well texts fit images",
     "Embeds images and texts with the model's two towers (CLIP, PAPERCLIP). Prints the cosine of each pair, and for\n"
     "each image the probability of each text among those given: softmax(logit_scale * cosine).",
     "  astrovl score galaxy.png --text \"a spiral galaxy\" --text \"a globular cluster\"\n"
     "  astrovl score --json *.png --text \"a comet\" --text \"no comet\" > scores.jsonl\n"},
    {"describe", DESCRIBE, run_describe, 1, MANY, "which image?", "IMAGE...",
     "find the texts of a list that fit an image best",
     "Prints the texts of a list that come closest to each image, with cosine and probability. The shipped list has\n"
     "three groups, each ranked by itself: classes of objects, phenomena, and uses in science.",
     "  astrovl describe galaxy.png\n  astrovl describe --labels classes.txt -k 1 *.png\n"},
    {"index", INDEX, run_index, 1, MANY, "which images? folders, files, or - for names on standard input",
     "DIR|FILE|-... -o INDEX", "embed folders of images, to search them",
     "Embeds images and writes their rows to an index file. In folders and below, files that end in .png .jpg .jpeg\n"
     ".ppm .pgm .pnm are taken; links to folders are not followed. With - file names are read from standard input,\n"
     "one a line. Names that are in the index already are skipped, so a run that was stopped can be continued.\n"
     "Images that cannot be read are left out; the exit status is then 1. An index belongs to the model that made it.",
     "  astrovl index previews/ -o previews.avl\n"
     "  find /data -name '*_drz.jpg' | astrovl index - -o previews.avl --batch 8\n"},
    {"search", SEARCH, run_search, 1, 2, "an index and a query are wanted: a text in quotes, or --image FILE",
     "INDEX \"QUERY\" | --image FILE", "find the images that fit a text",
     "Prints the images of an index that fit a text best, or resemble an image most: cosine and name.",
     "  astrovl search previews.avl \"strong lensing arcs\"\n"
     "  astrovl search previews.avl --image m51.jpg -k 20 --json\n"},
    {"embed", EMBED, run_embed, 0, MANY, "", "IMAGE... | --text T...", "print embeddings for other programs",
     "Prints {\"file\": ..., \"embedding\": [...]} (or \"text\"), a line each, divided by its length (see --raw);\n"
     "the digits read back as the same float32. With -o the rows go to a .npy file, float32 [n][d], in the order of\n"
     "the arguments; it is written only if all of them could be embedded.",
     "  astrovl embed *.png > rows.jsonl\n  astrovl embed *.png -o rows.npy\n"
     "  astrovl embed --text \"a planetary nebula\" -o query.npy\n"},
    {"evaluate", EVALUATE, run_evaluate, 2, 2, "wanted: retrieval PAIRS.jsonl, or vqa SET.jsonl",
     "retrieval PAIRS.jsonl | vqa SET.jsonl", "measure a model on data of yours",
     "retrieval: each line is {\"image\": FILE, \"caption\": TEXT}. Prints contrastive loss, how often an image's\n"
     "caption (a caption's image) is among the best k percent, and the cosines of pairs and wrong pairs, as\n"
     "PAPERCLIP defines them.\n"
     "vqa: each line is {\"image\": FILE, \"class\": NAME, \"description\": TEXT, \"features\": [WORD, ...]}, the\n"
     "last two optional. The model describes each image; counted are the class it names, the feature words it uses,\n"
     "and the cosine of text and reference (AstroLLaVA's benchmark). Names of files are relative to the .jsonl file.",
     "  astrovl evaluate retrieval pairs.jsonl --svg retrieval.svg\n"
     "  astrovl evaluate vqa galaxies.jsonl --json > result.json\n"},
    {"summarize", SUMMARIZE, run_summarize, 1, MANY, "which abstract? a text file, or - for standard input",
     "FILE|-...", "turn an abstract into JSON",
     "A language model reads a text; its answer is always of a given form: by default the schema that PAPERCLIP\n"
     "uses, {\"objects_and_phenomena\": [1 to 5 texts], \"science_use_cases\": [1 to 5 texts]}. --schema takes\n"
     "another JSON schema, --regex a pattern; --bool asks whether the observations would show what --query names.\n"
     "--prompt replaces the instruction. The shipped model is too small for sensible content: name one with -m.",
     "  astrovl summarize -m instruct-model.gguf abstract.txt\n"
     "  astrovl summarize --bool --query \"strong lensing\" abstract.txt\n"
     "  astrovl summarize --regex '(galaxy|star|planet)' --prompt \"What is it about?\" - < abstract.txt\n"},
    {"version", VERSION, run_version, 0, 0, "no arguments are wanted", "", "print the version",
     "Prints the version, the compiler it was built with, and where the shipped model lies.", "  astrovl version\n"},
};
enum { N_COMMANDS = (int)(sizeof commands / sizeof *commands) };

static void print_overview(FILE *out) {
    fprintf(out, "astrovl %s: looks at astronomical images and says what it sees.\n\n"
            "Usage: astrovl COMMAND [OPTIONS] ...\n\nCommands:\n", ASTROVL_VERSION);
    for (int i = 0; i < N_COMMANDS; i++) fprintf(out, "  %-9s %s\n", commands[i].name, commands[i].summary);
    fputs("\nastrovl COMMAND --help describes a command and its options. For a start:\n"
          "  astrovl caption test/images/*\n", out);
}

// Runs a command with room for every argument in each list.
static int run_command(program *p, const command *c, int argc, char **argv) {
    list *lists[4] = {&p->o.models, &p->o.stop, &p->o.words, &p->o.texts};
    p->cmd = c;
    p->o.how.on_text = on_text;
    p->o.how.user = p;
    for (int i = 0; i < 4; i++) lists[i]->items = (const char **)new_memory(p, (size_t)argc + 1, sizeof(const char *));
    int status = parse_options(c, &p->o, argc, argv);
    p->o.how.stop = p->o.stop.items;
    p->o.how.n_stop = p->o.stop.n;
    p->show_progress = !p->o.quiet && is_terminal(2);
    g_json = p->o.json;
    if (status == EXIT_OK && p->o.help) print_command_help(c);
    else if (status == EXIT_OK && p->o.words.n >= c->least && p->o.words.n <= c->most) status = c->run(p);
    else if (status == EXIT_OK) status = usage_error(c, "%s", c->wanted);
    for (int i = 1; i < MAX_TURNS; i++) astrovl_session_free(p->more[i]);
    astrovl_session_free(p->session);
    astrovl_close(p->model);
    return status;
}

int main(int argc, char **argv) {
    static program p;        // static: it starts as zeros, and is large for a small stack
    const char *name = argc > 1 ? argv[1] : "";
    int is_help = strcmp(name, "help") == 0 || strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0, status = EXIT_OK;
    const command *c = commands;
#if !defined(_WIN32)
    int fd;                  // a program started without standard streams would get its files numbered 0 to 2
    while ((fd = open("/dev/null", O_RDONLY)) >= 0 && fd <= 2) {}
    if (fd > 2) close(fd);
#endif
#if defined(SIGPIPE)
    signal(SIGPIPE, SIG_IGN);              // a reader that leaves is a failed write, handled where it happens
#endif
    if (is_help && argc > 2) name = argv[2];
    while (c < commands + N_COMMANDS && strcmp(c->name, name) != 0) c++;
    if (c == commands + N_COMMANDS) c = NULL;
    p.safe_output = is_terminal(1);
    find_shipped(argv[0], SHIPPED_MODEL, p.shipped);
    find_shipped(argv[0], LABELS, p.labels);
    if (c && is_help) print_command_help(c);
    else if (c) status = run_command(&p, c, argc - 2, argv + 2);
    else if (strcmp(name, "--version") == 0) printf("astrovl %s\n", ASTROVL_VERSION);
    else if (argc == 2 && is_help) print_overview(stdout);
    else if (argc < 2) print_overview(stderr), status = EXIT_USAGE;
    else status = usage_error(NULL, "there is no command \"%s\"", name);
    flush_output(&p);
    return p.stop && status == EXIT_OK ? EXIT_FAILED : status;
}
