// demo.c: the `astrovl` program. It captions images, answers questions about them, talks about them, and shows what
// happens inside the model while it does: tokens, tensors, every intermediate result. It is also the longest usage
// example of astrovl.h: it uses the public API only.
//
//     cc -O2 -o astrovl demo.c -lm -pthread
//     ./astrovl --help
//
// From top to bottom: printing, options, running the model, one function per command, main.

#if defined(__linux__) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE 1        // readlink, also when compiled with -std=c99
#endif

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
#define make_folder(path) _mkdir(path)
#define is_terminal(fd)   _isatty(fd)
#else
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>
#define make_folder(path) mkdir(path, 0777)
#define is_terminal(fd)   isatty(fd)
#endif

#ifndef ASTROVL_DATA_DIR
#define ASTROVL_DATA_DIR "/usr/local/share/astrovl"   // where `make install` puts the shipped model; the Makefile says
#endif
#define SHIPPED_MODEL "astrovl-tiny.gguf"

enum { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_USAGE = 2 };

// ====================================================================================================================
// Printing
// ====================================================================================================================

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

static const char replacement[] = "\xEF\xBF\xBD";   // U+FFFD, stands for bytes that are no UTF-8

static int is_control(unsigned code) { return code < 0x20 || (code >= 0x7F && code < 0xA0); }

// Text as a JSON string. Terminal control codes come out escaped, so it is also the way to print what a file holds.
static void print_json_string(FILE *out, const char *text, size_t size) {
    unsigned code;
    int valid;
    size_t n;
    fputc('"', out);
    for (; size; text += n, size -= n) {
        n = utf8_next(text, size, &code, &valid);
        if (!valid) fputs(replacement, out);
        else if (code == '"' || code == '\\') fprintf(out, "\\%c", (char)code);
        else if (code == '\n') fputs("\\n", out);
        else if (code == '\t') fputs("\\t", out);
        else if (is_control(code)) fprintf(out, "\\u%04x", code);
        else fwrite(text, 1, n, out);
    }
    fputc('"', out);
}

// Text for a terminal, which must not be driven by what a model says: control codes but newline and tab are dropped.
static void print_safe(FILE *out, const char *text, size_t size) {
    unsigned code;
    int valid;
    size_t n;
    for (; size; text += n, size -= n) {
        n = utf8_next(text, size, &code, &valid);
        if (!valid) fputs(replacement, out);
        else if (!is_control(code) || code == '\n' || code == '\t') fwrite(text, 1, n, out);
    }
}

// Characters a string takes on the screen (wide ones counted as one).
static int text_width(const char *text, size_t size) {
    unsigned code;
    int valid, width = 0;
    size_t n;
    for (; size; text += n, size -= n, width++) n = utf8_next(text, size, &code, &valid);
    return width;
}

static void print_spaces(FILE *out, int n) {
    for (; n > 0; n--) fputc(' ', out);
}

// 7340032 -> "7.3 MB"
static const char *human_bytes(char text[32], uint64_t bytes) {
    static const char *const units[] = {"bytes", "kB", "MB", "GB", "TB"};
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
    if (!(value - value == 0)) {
        fputs("null", out);
        return;
    }
    for (digits = 6; digits <= 17; digits++) {
        double back;
        snprintf(text, sizeof text, "%.*g", digits, value);
        back = strtod(text, NULL);
        if (is_float32 ? (float)back == (float)value : !(back < value || back > value)) break;
    }
    fputs(strcmp(text, "-0") == 0 ? "-0.0" : text, out);      // JSON readers take -0 for an integer
}

// "577 x 1024", slowest dimension first
static const char *shape_text(char text[128], const int64_t *shape, int n_dims, const char *between) {
    int i, at = 0;
    text[0] = 0;
    for (i = 0; i < n_dims && at < 100; i++)
        at += snprintf(text + at, 128 - (size_t)at, "%s%lld", i ? between : "", (long long)shape[i]);
    return text;
}

// JSON on standard output. Keys are NULL inside an array.
typedef struct json {
    int comma;                 // the next entry has one before it
} json;

static void json_key(json *j, const char *key) {
    if (j->comma) fputs(", ", stdout);
    if (key) print_json_string(stdout, key, strlen(key)), fputs(": ", stdout);
    j->comma = 1;
}

static void json_open(json *j, const char *key, char bracket) {
    json_key(j, key);
    putchar(bracket);
    j->comma = 0;
}

static void json_close(json *j, char bracket) {
    putchar(bracket);
    j->comma = 1;
}

static void json_string(json *j, const char *key, const char *text, size_t size) {
    json_key(j, key);
    print_json_string(stdout, text, size);
}

static void json_text(json *j, const char *key, const char *text) { json_string(j, key, text, strlen(text)); }

static void json_int(json *j, const char *key, int64_t value) {
    json_key(j, key);
    printf("%lld", (long long)value);
}

static void json_number(json *j, const char *key, double value) {
    json_key(j, key);
    print_number(stdout, value, 1);
}

// ====================================================================================================================
// Options
// A table describes every option once: the parser, the checks and the help pages are made from it.
// ====================================================================================================================

enum { CAPTION = 1, ASK = 2, CHAT = 4, TOKENS = 8, INSPECT = 16, TRACE = 32, VERSION = 64,
       SPEAK = CAPTION | ASK | CHAT, GENERATE = SPEAK | TRACE, ALL = 127 };

typedef struct list {
    const char **items;
    int          n;
} list;

typedef struct options {
    list        models, stop, words;                     // words: the arguments that are no options
    int         threads, exact, ctx, max_tokens, top_k, together, json, quiet, help;
    int         ids, special, decode, full, hash;
    double      temperature, top_p, min_p, repetition_penalty;
    uint64_t    seed;
    const char *system, *prompt, *folder;
    int         chat_template;
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

#define FIELD(name) offsetof(options, name)

static const option_spec option_table[] = {
    {"model", 'm', TEXTS, FIELD(models), 0, 0, ALL & ~VERSION, "FILE",
     "a GGUF file; again for a second part, such as the vision tower (default: the shipped model)"},
    {"out", 'o', TEXT, FIELD(folder), 0, 0, TRACE, "DIR", "the folder that the .npy files go to (made if missing)"},
    {"hash", 0, FLAG, FIELD(hash), 0, 0, TRACE, NULL, "write no files; print a hash of each tensor and one of all"},
    {"together", 0, FLAG, FIELD(together), 0, 0, ASK, NULL, "ask once about all the images instead of once about each"},
    {"prompt", 'p', TEXT, FIELD(prompt), 0, 0, CHAT, "TEXT", "say this, print the answer and leave"},
    {"ids", 0, FLAG, FIELD(ids), 0, 0, TOKENS, NULL, "print the ids alone, on one line"},
    {"special", 0, FLAG, FIELD(special), 0, 0, TOKENS, NULL,
     "add the tokens that begin (and end) a text, and take \"<s>\" in it as the token"},
    {"decode", 0, FLAG, FIELD(decode), 0, 0, TOKENS, NULL, "the other way: the text is ids, print what they spell"},
    {"full", 0, FLAG, FIELD(full), 0, 0, INSPECT, NULL, "print long arrays and strings whole"},
    {"max-tokens", 'n', INTEGER, FIELD(max_tokens), 1, 1000000, GENERATE, "N",
     "end an answer after N tokens (default 256; trace: 1)"},
    {"temperature", 't', NUMBER, FIELD(temperature), 0, 100, GENERATE, "X",
     "0: always the likeliest token (default); 1: by the model's odds"},
    {"top-k", 0, INTEGER, FIELD(top_k), 0, 1000000000, GENERATE, "N",
     "draw from the N likeliest tokens (default 0: all)"},
    {"top-p", 0, NUMBER, FIELD(top_p), 0, 1, GENERATE, "X",
     "draw from the likeliest that together have probability X (default 1: all)"},
    {"min-p", 0, NUMBER, FIELD(min_p), 0, 1, GENERATE, "X",
     "drop tokens less likely than X times the likeliest (default 0)"},
    {"repetition-penalty", 0, NUMBER, FIELD(repetition_penalty), 0, 100, GENERATE, "X",
     "above 1: avoid recent tokens (default 1)"},
    {"seed", 's', SEED, FIELD(seed), 0, 0, GENERATE, "N",
     "the draws' seed: the same gives the same text everywhere (default 0)"},
    {"stop", 0, TEXTS, FIELD(stop), 0, 0, GENERATE, "TEXT",
     "end the answer before this text; may be given several times"},
    {"system", 0, TEXT, FIELD(system), 0, 0, GENERATE, "TEXT",
     "the system prompt (default: the template's own; \"\": none)"},
    {"template", 0, TEMPLATE, FIELD(chat_template), 0, 0, GENERATE, "NAME",
     "the prompt's form (default: as the file says)"},
    {"ctx", 'c', INTEGER, FIELD(ctx), 1, 16777216, GENERATE, "N",
     "tokens that a conversation may hold (default: the model's, at most 4096)"},
    {"threads", 'j', INTEGER, FIELD(threads), 1, ASTROVL_MAX_THREADS, GENERATE, "N",
     "processors to use (default: all); the text does not depend on it"},
    {"exact", 0, FLAG, FIELD(exact), 0, 0, SPEAK, NULL,
     "the arithmetic that gives the same bits on every machine; slower"},
    {"json", 0, FLAG, FIELD(json), 0, 0, SPEAK | TOKENS | INSPECT, NULL,
     "print JSON: one object a line for each answer"},
    {"quiet", 'q', FLAG, FIELD(quiet), 0, 0, GENERATE, NULL, "no timings and no progress on standard error"},
    {"help", 'h', FLAG, FIELD(help), 0, 0, ALL, NULL, "this page"},
};
enum { N_OPTIONS = (int)(sizeof option_table / sizeof *option_table) };

typedef struct program program;

typedef struct command {
    const char *name;
    unsigned    bit;
    int       (*run)(program *p);
    const char *usage, *summary, *about, *examples;
} command;

// Says what is wrong with the command line and where to read on. Returns EXIT_USAGE.
static int usage_error(const command *c, const char *format, ...) {
    va_list args;
    fprintf(stderr, "astrovl%s%s: ", c ? " " : "", c ? c->name : "");
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "\nTry: astrovl%s%s --help\n", c ? " " : "", c ? c->name : "");
    return EXIT_USAGE;
}

// Decimal digits only, and nothing that overflows. Returns 0 when the text is something else.
static int parse_unsigned(const char *text, uint64_t high, uint64_t *value) {
    *value = 0;
    if (!*text) return 0;
    for (; *text; text++) {
        unsigned digit = (unsigned)(*text - '0');
        if (digit > 9 || *value > (high - digit) / 10) return 0;
        *value = *value * 10 + digit;
    }
    return *value <= high;
}

// Digits with at most one point; no signs, exponents, names or blanks. The program never calls setlocale, so strtod
// takes a point whatever the user's language.
static int parse_decimal(const char *text, double low, double high, double *value) {
    size_t digits = strspn(text, "0123456789"), length = strlen(text);
    if (text[digits] == '.') digits += 1 + strspn(text + digits + 1, "0123456789");
    if (digits != length || length == 0 || length > 40 || strcmp(text, ".") == 0) return 0;
    *value = strtod(text, NULL);
    return *value >= low && *value <= high;
}

static int template_error(const command *c, const char *text) {
    int t;
    fprintf(stderr, "astrovl %s: no template is called \"%s\"; there are", c->name, text);
    for (t = ASTROVL_TEMPLATE_AUTO; t <= ASTROVL_TEMPLATE_PLAIN; t++)
        fprintf(stderr, "%s %s", t ? "," : "", astrovl_template_name((astrovl_template)t));
    fprintf(stderr, "\nTry: astrovl %s --help\n", c->name);
    return EXIT_USAGE;
}

// Stores one option's value; `text` is NULL for a flag.
static int set_option(const command *c, options *o, const option_spec *spec, const char *text) {
    char *field = (char *)o + spec->field;
    uint64_t integer;
    switch (spec->kind) {
    case FLAG: *(int *)(void *)field = 1; break;
    case TEXT: *(const char **)(void *)field = text; break;
    case TEXTS: ((list *)(void *)field)->items[((list *)(void *)field)->n++] = text; break;
    case SEED:
        if (!parse_unsigned(text, UINT64_MAX, (uint64_t *)(void *)field))
            return usage_error(c, "--%s wants a whole number below 2^64, not \"%s\"", spec->name, text);
        break;
    case INTEGER:
        if (!parse_unsigned(text, (uint64_t)spec->high, &integer) || integer < (uint64_t)spec->low)
            return usage_error(c, "--%s wants a whole number from %.0f to %.0f, not \"%s\"", spec->name, spec->low,
                               spec->high, text);
        *(int *)(void *)field = (int)integer;
        break;
    case NUMBER:
        if (!parse_decimal(text, spec->low, spec->high, (double *)(void *)field))
            return usage_error(c, "--%s wants a number from %g to %g, not \"%s\"", spec->name, spec->low,
                               spec->high, text);
        break;
    case TEMPLATE:
        if (astrovl_template_from_name(text) < 0) return template_error(c, text);
        *(int *)(void *)field = astrovl_template_from_name(text);
        break;
    }
    return EXIT_OK;
}

// The option that an argument ("--seed", "--seed=7", "-s", "-s7") names for this command, or NULL. *value: "7" or NULL
static const option_spec *find_option(const command *c, const char *argument, const char **value) {
    int i;
    *value = NULL;
    for (i = 0; i < N_OPTIONS; i++) {
        const option_spec *spec = &option_table[i];
        size_t length = strlen(spec->name);
        if (!(spec->commands & c->bit)) continue;
        if (argument[1] != '-') {
            if (!spec->letter || argument[1] != spec->letter) continue;
            if (argument[2]) *value = argument + 2;
            return spec;
        }
        if (strncmp(argument + 2, spec->name, length) != 0) continue;
        if (argument[2 + length] == '=') *value = argument + 3 + length;
        else if (argument[2 + length]) continue;
        return spec;
    }
    return NULL;
}

// Sorts the arguments behind the command's name into options and words. "--" ends the options, "-" is a word.
static int parse_options(const command *c, options *o, int argc, char **argv) {
    int i, status = EXIT_OK;
    for (i = 0; i < argc && status == EXIT_OK; i++) {
        const option_spec *spec;
        const char *value;
        if (argv[i][0] != '-' || !argv[i][1]) {
            o->words.items[o->words.n++] = argv[i];
            continue;
        }
        if (strcmp(argv[i], "--") == 0) {
            while (++i < argc) o->words.items[o->words.n++] = argv[i];
            break;
        }
        spec = find_option(c, argv[i], &value);
        if (!spec) return usage_error(c, "there is no option %s", argv[i]);
        if (spec->kind == FLAG && value) return usage_error(c, "--%s takes no value", spec->name);
        if (spec->kind != FLAG && !value) {
            if (i + 1 >= argc)
                return usage_error(c, "--%s wants a value: --%s %s", spec->name, spec->name, spec->value);
            value = argv[++i];
        }
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
        snprintf(left, sizeof left, "%c%c%c --%s %s", spec->letter ? '-' : ' ', spec->letter ? spec->letter : ' ',
                 spec->letter ? ',' : ' ', spec->name, spec->value ? spec->value : "");
        printf("  %-27s %s\n", left, spec->help);
        if (spec->kind == TEMPLATE) {
            int t;
            printf("%30s", "");
            for (t = ASTROVL_TEMPLATE_AUTO; t <= ASTROVL_TEMPLATE_PLAIN; t++)
                printf("%s%s", t ? ", " : "", astrovl_template_name((astrovl_template)t));
            printf("\n");
        }
    }
    printf("\nExamples:\n%s", c->examples);
}

// ====================================================================================================================
// Running the model
// ====================================================================================================================

struct program {
    const command     *cmd;                // the command that runs
    options            o;
    astrovl_model     *model;
    astrovl_session   *session;
    astrovl_generation generation;
    char               shipped[4096];      // the shipped model's path
    int                safe_output;        // standard output is a terminal: strip control codes
    int                show_progress;      // standard error is one, and nobody asked for quiet
    int                bar_drawn;
    int                stop;               // output cannot be written: end the work
    time_t             started;            // the turn in progress
};

// Set by Ctrl-C while an answer is computed. (The one global: a signal handler has no other way to say something.)
static volatile sig_atomic_t g_interrupted;

static void on_interrupt(int signal_number) {
    (void)signal_number;
    g_interrupted = 1;
}

// Reports a failure on standard error. Returns EXIT_FAILED.
static int failed(const astrovl_error *err) {
    fprintf(stderr, "astrovl: %s\n", err->message);
    return EXIT_FAILED;
}

// Writes out what is buffered. When that fails, says so (but not of a reader that left: `astrovl ... | head`) and stops.
static void flush_output(program *p) {
    if ((fflush(stdout) == 0 && !ferror(stdout)) || p->stop) return;
    if (errno != EPIPE) fprintf(stderr, "astrovl: standard output cannot be written: %s\n", strerror(errno));
    p->stop = 1;
}

static int out_of_memory(void) {
    fprintf(stderr, "astrovl: out of memory\n");
    return EXIT_FAILED;
}

static int file_exists(const char *path) {
    FILE *f = fopen(path, "rb");
    if (f) fclose(f);
    return f != NULL;
}

// The folder that the running program lies in, with a slash at its end; "" when it cannot be told.
static void program_folder(const char *argv0, char *folder, size_t size) {
    char *slash;
    snprintf(folder, size, "%s", argv0 ? argv0 : "");
#if defined(__linux__)
    {
        ssize_t n = readlink("/proc/self/exe", folder, size - 1);   // follows links and $PATH
        if (n >= 0) folder[n] = 0;
        else snprintf(folder, size, "%s", argv0 ? argv0 : "");
    }
#endif
    slash = strrchr(folder, '/');
#if defined(_WIN32)
    if (strrchr(folder, '\\') > slash) slash = strrchr(folder, '\\');
#endif
    if (slash) slash[1] = 0;
    else folder[0] = 0;
}

// The shipped model lies beside the program in the source tree, or in the data folder once installed.
static void find_shipped_model(program *p, const char *argv0) {
    char folder[2048];
    program_folder(argv0, folder, sizeof folder);
    snprintf(p->shipped, sizeof p->shipped, "%stest/%s", folder, SHIPPED_MODEL);
    if (file_exists(p->shipped)) return;
    snprintf(p->shipped, sizeof p->shipped, "%s../share/astrovl/%s", folder, SHIPPED_MODEL);
    if (folder[0] && file_exists(p->shipped)) return;
    snprintf(p->shipped, sizeof p->shipped, "%s/%s", ASTROVL_DATA_DIR, SHIPPED_MODEL);
    if (!file_exists(p->shipped)) p->shipped[0] = 0;
}

// Opens the files of -m, or the shipped model.
static int open_model(program *p) {
    astrovl_open_options open_options;
    astrovl_error err;
    memset(&open_options, 0, sizeof open_options);
    open_options.chat_template = (astrovl_template)p->o.chat_template;
    if (p->o.models.n == 0) {
        if (!p->shipped[0]) {
            fprintf(stderr, "astrovl: the shipped model %s is neither beside the program nor in %s; name one with "
                    "-m FILE\n", SHIPPED_MODEL, ASTROVL_DATA_DIR);
            return EXIT_FAILED;
        }
        p->o.models.items[p->o.models.n++] = p->shipped;
    }
    p->model = astrovl_open_files(p->o.models.items, p->o.models.n, &open_options, &err);
    return p->model ? EXIT_OK : failed(&err);
}

static void clear_bar(program *p) {
    if (p->bar_drawn) fputs("\r\033[K", stderr);
    p->bar_drawn = 0;
}

// Draws "image [########------------] 9/23" once the work has taken more than a second.
static int on_progress(void *user, const char *stage, int done, int total) {
    program *p = (program *)user;
    int i, filled = total > 0 ? (int)((int64_t)done * 30 / total) : 0;
    if (g_interrupted || p->stop) return 1;
    if (!p->show_progress || time(NULL) - p->started < 2) return 0;
    fprintf(stderr, "\r%-6s [", stage);
    for (i = 0; i < 30; i++) fputc(i < filled ? '#' : '-', stderr);
    fprintf(stderr, "] %d/%d\033[K", done, total);
    fflush(stderr);
    p->bar_drawn = 1;
    return 0;
}

// Gets the answer piece by piece.
static int on_text(void *user, const char *text, size_t size) {
    program *p = (program *)user;
    clear_bar(p);
    if (p->o.json || p->o.hash) return g_interrupted != 0;
    if (p->safe_output) print_safe(stdout, text, size);
    else fwrite(text, 1, size, stdout);
    flush_output(p);
    return g_interrupted || p->stop;
}

static int open_session(program *p, astrovl_mode mode, astrovl_tap tap, void *tap_user) {
    astrovl_session_options session_options;
    astrovl_error err;
    astrovl_generation *g = &p->generation;
    memset(&session_options, 0, sizeof session_options);
    session_options.mode = mode;
    session_options.n_threads = p->o.threads;
    session_options.n_ctx = p->o.ctx;
    session_options.tap = tap;
    session_options.tap_user = tap_user;
    session_options.progress = on_progress;
    session_options.progress_user = p;
    p->session = astrovl_session_new(p->model, &session_options, &err);
    if (!p->session) return failed(&err);
    memset(g, 0, sizeof *g);
    g->max_tokens = p->o.max_tokens;
    g->temperature = (float)p->o.temperature;
    g->top_k = p->o.top_k;
    g->top_p = (float)p->o.top_p;
    g->min_p = (float)p->o.min_p;
    g->repetition_penalty = (float)p->o.repetition_penalty;
    g->seed = p->o.seed;
    g->stop = p->o.stop.items;
    g->n_stop = p->o.stop.n;
    g->system = p->o.system;
    g->on_text = on_text;
    g->user = p;
    return EXIT_OK;
}

static int open_model_and_session(program *p) {
    int status = open_model(p);
    return status == EXIT_OK ? open_session(p, p->o.exact ? ASTROVL_EXACT : ASTROVL_FAST, NULL, NULL) : status;
}

// Loads an image the right way up.
static astrovl_status load_image(const char *path, astrovl_image *image, astrovl_error *err) {
    astrovl_status status;
    memset(image, 0, sizeof *image);
    status = astrovl_image_load(path, 0, image, err);
    if (status == ASTROVL_OK) status = astrovl_image_upright(image, err);
    if (status != ASTROVL_OK) {
        astrovl_image_free(image);
        memset(image, 0, sizeof *image);
    }
    return status;
}

// One turn. Ctrl-C ends it and not the program.
static char *say(program *p, const astrovl_image *images, int n_images, const char *text, astrovl_error *err) {
    char *answer;
    void (*before)(int) = signal(SIGINT, on_interrupt);
    if (before == SIG_IGN) signal(SIGINT, SIG_IGN);   // started so (in the background of a script): leave it
    g_interrupted = 0;
    p->started = time(NULL);
    answer = astrovl_chat(p->session, images, n_images, text, &p->generation, err);
    clear_bar(p);
    signal(SIGINT, before == SIG_ERR ? SIG_DFL : before);
    return answer;
}

static void print_timings(program *p, const char *label) {
    astrovl_stats t;
    if (p->o.quiet || p->o.json) return;
    astrovl_get_stats(p->session, &t);
    if (label) {
        print_safe(stderr, label, strlen(label));
        fputs(": ", stderr);
    }
    if (t.encode_seconds > 0) fprintf(stderr, "image %.2f s, ", t.encode_seconds);
    fprintf(stderr, "prompt %d tokens %.2f s, answer %d tokens %.2f s", t.n_prompt_tokens, t.prompt_seconds,
            t.n_answer_tokens, t.decode_seconds);
    if (t.decode_seconds > 0) fprintf(stderr, " (%.1f tokens/s)", t.n_answer_tokens / t.decode_seconds);
    fprintf(stderr, "%s\n", t.stopped_by_limit ? ", cut short by the token limit" : "");
}

// {"file": ..., "prompt": ..., "text": ..., "tokens": {...}, "complete": ..., "seconds": {...}}. file may be NULL.
static void print_answer_json(program *p, const char *file, const char *prompt, const char *answer) {
    astrovl_stats t;
    json j = {0};
    int i, n = 0;
    const int32_t *ids = astrovl_answer_tokens(p->session, &n);
    astrovl_get_stats(p->session, &t);
    json_open(&j, NULL, '{');
    if (file) json_text(&j, "file", file);
    json_text(&j, "prompt", prompt);
    json_text(&j, "text", answer);
    json_open(&j, "tokens", '{');
    json_int(&j, "prompt", t.n_prompt_tokens);
    json_int(&j, "answer", t.n_answer_tokens);
    json_open(&j, "ids", '[');
    for (i = 0; i < n; i++) json_int(&j, NULL, ids[i]);
    json_close(&j, ']');
    json_close(&j, '}');
    json_key(&j, "complete");
    fputs(t.stopped_by_limit ? "false" : "true", stdout);
    json_open(&j, "seconds", '{');
    json_number(&j, "image", t.encode_seconds);
    json_number(&j, "prompt", t.prompt_seconds);
    json_number(&j, "answer", t.decode_seconds);
    fputs("}}\n", stdout);
}

static void print_error_json(const char *file, const astrovl_error *err) {
    json j = {0};
    json_open(&j, NULL, '{');
    json_text(&j, "file", file);
    json_text(&j, "error", err->message);
    json_text(&j, "status", astrovl_status_name(err->status));
    fputs("}\n", stdout);
}

// Reads a whole stream, which may hold any bytes. NULL when memory is out.
static char *read_all(FILE *in, size_t *size) {
    size_t capacity = 65536;
    char *data = (char *)malloc(capacity + 1), *grown;
    *size = 0;
    while (data) {
        *size += fread(data + *size, 1, capacity - *size, in);
        data[*size] = 0;
        if (*size < capacity) return data;
        grown = capacity < SIZE_MAX / 4 ? (char *)realloc(data, capacity * 2 + 1) : NULL;
        if (!grown) free(data);
        data = grown;
        capacity *= 2;
    }
    return NULL;
}

// Reads a line of any length without its end. NULL at the end of the stream. Release with free.
static char *read_line(FILE *in) {
    size_t size = 0, capacity = 256;
    char *line = (char *)malloc(capacity), *grown;
    int c;
    while (line && (c = fgetc(in)) != EOF && c != '\n') {
        line[size++] = (char)c;
        if (size < capacity) continue;
        grown = (char *)realloc(line, capacity *= 2);
        if (!grown) free(line);
        line = grown;
    }
    if (line && size == 0 && feof(in)) {
        free(line);
        return NULL;
    }
    if (line && size > 0 && line[size - 1] == '\r') size--;
    if (line) line[size] = 0;
    return line;
}

// ====================================================================================================================
// caption, ask
// ====================================================================================================================

// Prints one answer's end: the JSON object, or the newline and the timings.
static void finish_answer(program *p, const char *file, const char *label, const char *prompt, const char *answer) {
    if (p->o.json) print_answer_json(p, file, prompt, answer);
    else putchar('\n');
    flush_output(p);
    print_timings(p, label);
}

// Asks about one image in a fresh conversation.
static int answer_image(program *p, const char *path, const char *prompt) {
    int several = p->o.words.n > (p->cmd->bit == ASK ? 2 : 1);
    astrovl_image image;
    astrovl_error err;
    char *answer = NULL;
    astrovl_session_reset(p->session);
    if (load_image(path, &image, &err) == ASTROVL_OK) {
        if (several && !p->o.json) {
            print_safe(stdout, path, strlen(path));
            fputs(": ", stdout);
        }
        answer = say(p, &image, 1, prompt, &err);
        astrovl_image_free(&image);
        if (!answer && several && !p->o.json) putchar('\n');
    }
    if (!answer) {
        if (p->o.json) print_error_json(path, &err);
        flush_output(p);
        return failed(&err);
    }
    finish_answer(p, path, several ? path : NULL, prompt, answer);
    astrovl_free(answer);
    return g_interrupted ? EXIT_FAILED : EXIT_OK;
}

// Goes on after an image that fails, and remembers it.
static int answer_each(program *p, int n_images, const char *prompt) {
    int i, status = open_model_and_session(p);
    if (status != EXIT_OK) return status;
    g_interrupted = 0;
    for (i = 0; i < n_images && !p->stop && !g_interrupted; i++)
        if (answer_image(p, p->o.words.items[i], prompt) != EXIT_OK) status = EXIT_FAILED;
    return status;
}

static int run_caption(program *p) {
    if (p->o.words.n < 1) return usage_error(p->cmd, "which image?");
    return answer_each(p, p->o.words.n, ASTROVL_CAPTION_PROMPT);
}

// One question about all images at once.
static int ask_together(program *p, int n_images, const char *question) {
    astrovl_image *images = (astrovl_image *)calloc((size_t)n_images, sizeof *images);
    astrovl_error err;
    char *answer = NULL;
    int i, status = images ? open_model_and_session(p) : out_of_memory();
    for (i = 0; i < n_images && status == EXIT_OK; i++)
        if (load_image(p->o.words.items[i], &images[i], &err) != ASTROVL_OK) status = failed(&err);
    if (status == EXIT_OK) {
        answer = say(p, images, n_images, question, &err);
        if (answer) finish_answer(p, NULL, NULL, question, answer);
        else status = failed(&err);
    }
    astrovl_free(answer);
    for (i = 0; images && i < n_images; i++) astrovl_image_free(&images[i]);
    free(images);
    return status;
}

static int run_ask(program *p) {
    int n_images = p->o.words.n - 1;
    const char *question;
    if (n_images < 1) return usage_error(p->cmd, "an image and a question are wanted");
    question = p->o.words.items[n_images];
    return p->o.together ? ask_together(p, n_images, question) : answer_each(p, n_images, question);
}

// ====================================================================================================================
// chat
// ====================================================================================================================

typedef struct chat_state {
    astrovl_image image;
    int           has_image, pending;      // pending: the next question carries the image
    int           interactive;             // a person types: show a prompt
    int           n_failed;
} chat_state;

static const char chat_help[] =
    "  /image FILE  look at another image (shown with the next question); /image alone: none\n"
    "  /reset       forget the conversation; the image is shown again with the next question\n"
    "  /help        this list\n"
    "  /quit        leave (so does the end of input); Ctrl-C stops an answer\n";

static void chat_image(chat_state *c, const char *path) {
    astrovl_image image;
    astrovl_error err;
    memset(&image, 0, sizeof image);
    if (*path && load_image(path, &image, &err) != ASTROVL_OK) {
        c->n_failed++;
        failed(&err);
        return;
    }
    astrovl_image_free(&c->image);
    c->image = image;
    c->has_image = c->pending = *path != 0;
    if (c->interactive && *path) fprintf(stderr, "(%d x %d pixels)\n", image.width, image.height);
}

static void chat_turn(program *p, chat_state *c, const char *text) {
    astrovl_error err;
    char *answer = say(p, &c->image, c->pending ? 1 : 0, text, &err);
    if (answer) {
        c->pending = 0;
        finish_answer(p, NULL, NULL, text, answer);
        if (g_interrupted && c->interactive) fprintf(stderr, "(stopped)\n");
    } else if (err.status == ASTROVL_CANCELLED && c->interactive) {
        fprintf(stderr, "(stopped)\n");
    } else {
        c->n_failed++;
        failed(&err);
        if (err.status == ASTROVL_ERROR_LIMIT) fprintf(stderr, "astrovl: /reset begins a new conversation\n");
    }
    astrovl_free(answer);
}

// A line that begins with a slash. Returns 0 to leave.
static int chat_command(program *p, chat_state *c, const char *line) {
    if (strcmp(line, "/quit") == 0 || strcmp(line, "/exit") == 0) return 0;
    if (strcmp(line, "/reset") == 0) {
        astrovl_session_reset(p->session);
        c->pending = c->has_image;
    } else if (strcmp(line, "/image") == 0) {
        chat_image(c, "");
    } else if (strncmp(line, "/image ", 7) == 0) {
        chat_image(c, line + 7 + strspn(line + 7, " "));
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
        line = read_line(stdin);
        if (!line) {
            if (c->interactive) fputc('\n', stderr);
            break;
        }
        if (line[0] == '/') go_on = chat_command(p, c, line);
        else if (line[strspn(line, " \t")]) chat_turn(p, c, line);
        free(line);
    }
}

static int run_chat(program *p) {
    chat_state c;
    int status;
    memset(&c, 0, sizeof c);
    if (p->o.words.n > 1) return usage_error(p->cmd, "one image at most; /image shows others later");
    status = open_model_and_session(p);
    if (status != EXIT_OK) return status;
    if (p->o.words.n == 1) chat_image(&c, p->o.words.items[0]);
    c.interactive = !p->o.prompt && is_terminal(0);
    if (c.n_failed) status = EXIT_FAILED;            // the image is none: do not talk about nothing
    else if (p->o.prompt) chat_turn(p, &c, p->o.prompt);
    else chat_loop(p, &c);
    astrovl_image_free(&c.image);
    return c.n_failed && !c.interactive ? EXIT_FAILED : status;
}

// ====================================================================================================================
// tokens
// ====================================================================================================================

// A token's text; NULL when memory is out.
static char *token_text(const program *p, int32_t token, int *size) {
    char *text;
    *size = astrovl_token_text(p->model, token, NULL, 0);
    if (*size < 0) *size = 0;
    text = (char *)calloc((size_t)*size + 1, 1);
    if (text) *size = astrovl_token_text(p->model, token, text, *size);
    return text;
}

static void print_token_row(int32_t id, astrovl_string piece, int width, const char *text, int size) {
    printf("%8ld  ", (long)id);
    print_safe(stdout, piece.data, piece.size);
    print_spaces(stdout, width - text_width(piece.data, piece.size) + 2);
    print_json_string(stdout, text, (size_t)size);
    putchar('\n');
}

static void print_token_json(json *j, int32_t id, astrovl_string piece, const char *text, int size) {
    json_open(j, NULL, '{');
    json_int(j, "id", id);
    json_string(j, "piece", piece.data, piece.size);
    json_string(j, "text", text, (size_t)size);
    json_close(j, '}');
}

static int print_tokens(const program *p, const int32_t *tokens, int n) {
    int i, size, width = 0;
    json j = {0};
    if (p->o.ids) {
        for (i = 0; i < n; i++) printf("%s%ld", i ? " " : "", (long)tokens[i]);
        putchar('\n');
        return EXIT_OK;
    }
    for (i = 0; i < n; i++) {
        astrovl_string piece = astrovl_token_piece(p->model, tokens[i]);
        int w = text_width(piece.data, piece.size);
        if (w > width) width = w < 32 ? w : 32;
    }
    if (p->o.json) json_open(&j, NULL, '{'), json_open(&j, "tokens", '[');
    for (i = 0; i < n; i++) {
        astrovl_string piece = astrovl_token_piece(p->model, tokens[i]);
        char *text = token_text(p, tokens[i], &size);
        if (!text) return out_of_memory();
        if (p->o.json) print_token_json(&j, tokens[i], piece, text, size);
        else print_token_row(tokens[i], piece, width, text, size);
        free(text);
    }
    if (p->o.json) printf("]}\n");
    return EXIT_OK;
}

static int encode_text(const program *p, const char *text, size_t size) {
    int flags = p->o.special ? ASTROVL_ADD_SPECIAL | ASTROVL_PARSE_SPECIAL : 0, n, status;
    int32_t *tokens = NULL;
    astrovl_error err;
    n = astrovl_tokenize(p->model, text, size, flags, NULL, 0, &err);
    if (n < 0) return failed(&err);
    tokens = (int32_t *)malloc(((size_t)n + 1) * sizeof *tokens);
    if (!tokens) return out_of_memory();
    n = astrovl_tokenize(p->model, text, size, flags, tokens, n, &err);
    status = n < 0 ? failed(&err) : print_tokens(p, tokens, n);
    free(tokens);
    return status;
}

// Reads ids separated by blanks or commas. Returns how many, or -1 at something else (said on standard error).
static int parse_ids(const program *p, const char *text, int32_t *ids) {
    int n = 0;
    char word[16];
    for (;;) {
        size_t length;
        uint64_t value;
        text += strspn(text, " ,\t\r\n");
        if (!*text) return n;
        length = strcspn(text, " ,\t\r\n");
        snprintf(word, sizeof word, "%.*s", (int)(length < 15 ? length : 15), text);
        if (!parse_unsigned(word, INT32_MAX, &value) || astrovl_token_piece(p->model, (int32_t)value).size == 0) {
            fprintf(stderr, "astrovl: \"%s\" is no token of this vocabulary\n", word);
            return -1;
        }
        ids[n++] = (int32_t)value;
        text += length;
    }
}

static int decode_ids(const program *p, const char *text, size_t size) {
    int32_t *ids = (int32_t *)malloc((size / 2 + 1) * sizeof *ids);
    astrovl_error err;
    char *decoded;
    int n = ids ? parse_ids(p, text, ids) : -1;
    if (n < 0) {
        if (!ids) out_of_memory();
        free(ids);
        return EXIT_FAILED;
    }
    decoded = astrovl_detokenize(p->model, ids, n, &err);
    free(ids);
    if (!decoded) return failed(&err);
    if (p->safe_output) print_safe(stdout, decoded, strlen(decoded));
    else fputs(decoded, stdout);
    if (p->safe_output) putchar('\n');       // a terminal's next line; a pipe gets the bytes as they are
    astrovl_free(decoded);
    return EXIT_OK;
}

static int run_tokens(program *p) {
    const char *word = p->o.words.n ? p->o.words.items[0] : "-";
    char *text = NULL;
    size_t size = 0;
    int status;
    if (p->o.words.n > 1) return usage_error(p->cmd, "one text is wanted; put it in quotes");
    if (p->o.ids && p->o.json) return usage_error(p->cmd, "--ids or --json, not both");
    status = open_model(p);
    if (status != EXIT_OK) return status;
    if (strcmp(word, "-") == 0) {
        text = read_all(stdin, &size);
        if (!text) return out_of_memory();
        word = text;
    } else {
        size = strlen(word);
    }
    status = p->o.decode ? decode_ids(p, word, size) : encode_text(p, word, size);
    free(text);
    return status;
}

// ====================================================================================================================
// inspect
// ====================================================================================================================

static const char *value_type_name(astrovl_value_type type) {
    static const char *const names[] = {"u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array",
                                        "u64", "i64", "f64"};
    return (unsigned)type < sizeof names / sizeof *names ? names[type] : "?";
}

// One value of a metadata entry, as JSON. long_strings: 0 cuts strings for the screen.
static void print_value(const astrovl_gguf *file, int index, uint64_t i, int long_strings) {
    astrovl_string s;
    int64_t integer = astrovl_gguf_int(file, index, i);
    switch (astrovl_gguf_kv(file, index)->item_type) {
    case ASTROVL_VALUE_STRING:
        s = astrovl_gguf_string(file, index, i);
        print_json_string(stdout, s.data, long_strings || s.size <= 100 ? s.size : 96);
        if (!long_strings && s.size > 100) printf(" ... (%llu bytes)", (unsigned long long)s.size);
        break;
    case ASTROVL_VALUE_F32: print_number(stdout, astrovl_gguf_float(file, index, i), 1); break;
    case ASTROVL_VALUE_F64: print_number(stdout, astrovl_gguf_float(file, index, i), 0); break;
    case ASTROVL_VALUE_BOOL: printf("%s", integer ? "true" : "false"); break;
    case ASTROVL_VALUE_U64: printf("%llu", (unsigned long long)integer); break;
    default: printf("%lld", (long long)integer); break;
    }
}

#define MAX_ITEMS_TEXT 5u       // of an array, unless --full is given
#define MAX_ITEMS_JSON 16u

static void print_kv_text(const program *p, const astrovl_gguf *file, int index, int key_width) {
    const astrovl_kv *kv = astrovl_gguf_kv(file, index);
    char type[64];
    uint64_t i, shown = p->o.full || kv->count < MAX_ITEMS_TEXT ? kv->count : MAX_ITEMS_TEXT;
    int is_array = kv->type == ASTROVL_VALUE_ARRAY;
    if (is_array)
        snprintf(type, sizeof type, "%s[%llu]", value_type_name(kv->item_type), (unsigned long long)kv->count);
    else snprintf(type, sizeof type, "%s", value_type_name(kv->type));
    printf("  ");
    print_safe(stdout, kv->key, strlen(kv->key));
    print_spaces(stdout, key_width - text_width(kv->key, strlen(kv->key)));
    printf("  %-14s ", type);
    for (i = 0; i < shown; i++) {
        if (i) printf(", ");
        print_value(file, index, i, p->o.full);
    }
    printf("%s\n", shown < kv->count ? ", ..." : "");
}

// "key": value, or [values], or for a long array {"type": ..., "count": ..., "first": [values]}
static void print_kv_json(const program *p, json *j, const astrovl_gguf *file, int index) {
    const astrovl_kv *kv = astrovl_gguf_kv(file, index);
    uint64_t i, shown = p->o.full || kv->count <= MAX_ITEMS_JSON ? kv->count : MAX_ITEMS_JSON;
    if (kv->type != ASTROVL_VALUE_ARRAY) {
        json_key(j, kv->key);
        print_value(file, index, 0, 1);
        return;
    }
    if (shown < kv->count) {
        json_open(j, kv->key, '{');
        json_text(j, "type", value_type_name(kv->item_type));
        json_int(j, "count", (int64_t)kv->count);
    }
    json_open(j, shown < kv->count ? "first" : kv->key, '[');
    for (i = 0; i < shown; i++) {
        json_key(j, NULL);
        print_value(file, index, i, 1);
    }
    json_close(j, ']');
    if (shown < kv->count) json_close(j, '}');
}

// A tensor's shape with the slowest dimension first, as the header's comments and numpy write it.
static int tensor_shape(const astrovl_tensor *t, int64_t shape[4]) {
    int i;
    for (i = 0; i < t->n_dims; i++) shape[i] = t->ne[t->n_dims - 1 - i];
    return t->n_dims;
}

static void print_tensor_text(const astrovl_tensor *t, int name_width) {
    int64_t shape[4];
    char text[128];
    int n = tensor_shape(t, shape);
    printf("  ");
    print_safe(stdout, t->name, strlen(t->name));
    print_spaces(stdout, name_width - text_width(t->name, strlen(t->name)));
    printf("  %-5s %-18s %12llu\n", astrovl_type_name(t->type), shape_text(text, shape, n, " x "),
           (unsigned long long)t->n_bytes);
}

static void print_tensor_json(json *j, const astrovl_tensor *t) {
    int64_t shape[4];
    int i, n = tensor_shape(t, shape);
    json_open(j, NULL, '{');
    json_text(j, "name", t->name);
    json_text(j, "type", astrovl_type_name(t->type));
    json_open(j, "shape", '[');
    for (i = 0; i < n; i++) json_int(j, NULL, shape[i]);
    json_close(j, ']');
    json_int(j, "offset", (int64_t)t->offset);
    json_int(j, "bytes", (int64_t)t->n_bytes);
    json_close(j, '}');
}

// Tensors and bytes of each type, and of all.
static void print_totals(const astrovl_gguf *file) {
    int n = astrovl_gguf_n_tensors(file), type, i, count;
    uint64_t bytes, values, all_bytes = 0, all_values = 0;
    char text[32];
    printf("\ntotals\n");
    for (type = 0; type <= ASTROVL_TYPE_BF16; type++) {
        count = 0, bytes = 0, values = 0;
        for (i = 0; i < n; i++) {
            const astrovl_tensor *t = astrovl_gguf_tensor(file, i);
            if ((int)t->type != type) continue;
            count++;
            bytes += t->n_bytes;
            values += (uint64_t)(t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3]);
        }
        all_bytes += bytes, all_values += values;
        if (count)
            printf("  %-5s %6d tensors %14llu values  %s\n", astrovl_type_name(type), count, (unsigned long long)values,
                   human_bytes(text, bytes));
    }
    printf("  all   %6d tensors %14llu values  %s\n", n, (unsigned long long)all_values, human_bytes(text, all_bytes));
}

static int at_least(int width, const char *text) {
    int w = text_width(text, strlen(text));
    return w > width && w <= 48 ? w : width;
}

static void print_file_text(const program *p, const astrovl_gguf *file) {
    int i, key_width = 8, name_width = 8, n_kv = astrovl_gguf_n_kv(file), n_tensors = astrovl_gguf_n_tensors(file);
    char text[32];
    print_safe(stdout, astrovl_gguf_name(file), strlen(astrovl_gguf_name(file)));
    printf(": GGUF version %d, %s-endian, %s, %d metadata entries, %d tensors\n", astrovl_gguf_version(file),
           astrovl_gguf_big_endian(file) ? "big" : "little", human_bytes(text, astrovl_gguf_size(file)), n_kv,
           n_tensors);
    for (i = 0; i < n_kv; i++) key_width = at_least(key_width, astrovl_gguf_kv(file, i)->key);
    for (i = 0; i < n_tensors; i++) name_width = at_least(name_width, astrovl_gguf_tensor(file, i)->name);
    if (n_kv) printf("\nmetadata\n");
    for (i = 0; i < n_kv; i++) print_kv_text(p, file, i, key_width);
    if (n_tensors) {
        printf("\ntensors: name, type, shape (slowest dimension first), bytes\n");
        for (i = 0; i < n_tensors; i++) print_tensor_text(astrovl_gguf_tensor(file, i), name_width);
        print_totals(file);
    }
    printf("\n");
}

static void print_file_json(const program *p, json *j, const astrovl_gguf *file) {
    int i, n_kv = astrovl_gguf_n_kv(file), n_tensors = astrovl_gguf_n_tensors(file);
    json_open(j, NULL, '{');
    json_text(j, "file", astrovl_gguf_name(file));
    json_int(j, "version", astrovl_gguf_version(file));
    json_text(j, "byte_order", astrovl_gguf_big_endian(file) ? "big" : "little");
    json_int(j, "bytes", (int64_t)astrovl_gguf_size(file));
    json_open(j, "metadata", '{');
    for (i = 0; i < n_kv; i++) print_kv_json(p, j, file, i);
    json_close(j, '}');
    json_open(j, "tensors", '[');
    for (i = 0; i < n_tensors; i++) print_tensor_json(j, astrovl_gguf_tensor(file, i));
    json_close(j, ']');
    json_close(j, '}');
}

// A part of the model with its sizes, or null (text: none) when the files lack it. fields end with a NULL name.
typedef struct named_int { const char *name; int value; } named_int;
static void print_part(json *j, int as_json, const char *key, int present, const named_int *fields) {
    if (!as_json) {
        printf("  %-15s%s", key, present ? "" : " none");
        for (; present && fields->name; fields++)
            printf(" %s %d%s", fields->name, fields->value, fields[1].name ? "," : "");
        printf("\n");
    } else if (present) {
        json_open(j, key, '{');
        for (; fields->name; fields++) json_int(j, fields->name, fields->value);
        json_close(j, '}');
    } else {
        json_key(j, key);
        fputs("null", stdout);
    }
}

static void print_parts(json *j, int as_json, const astrovl_info *m) {
    const named_int vocabulary[] = {{"tokens", m->n_vocab}, {"bos", m->bos_token}, {"eos", m->eos_token}, {NULL, 0}};
    const named_int text[] = {{"layers", m->n_layer}, {"width", m->n_embd}, {"heads", m->n_head},
        {"kv_heads", m->n_head_kv}, {"head_dim", m->head_dim}, {"feed_forward", m->n_ff}, {"context", m->n_ctx_train},
        {NULL, 0}};
    const named_int vision[] = {{"layers", m->vision_n_layer}, {"feature_layer", m->vision_feature_layer},
        {"width", m->vision_n_embd}, {"heads", m->vision_n_head}, {"feed_forward", m->vision_n_ff},
        {"image_size", m->image_size}, {"patch_size", m->patch_size}, {"patches", m->n_patches}, {NULL, 0}};
    const named_int projector[] = {{"image_tokens", m->n_image_tokens}, {NULL, 0}};
    print_part(j, as_json, "vocabulary", m->has_vocab, vocabulary);
    print_part(j, as_json, "language_model", m->has_text, text);
    print_part(j, as_json, "vision_tower", m->has_vision, vision);
    print_part(j, as_json, "projector", m->has_projector, projector);
}

static void print_model_text(const astrovl_info *m) {
    char text[32];
    printf("what this makes up\n  name            ");
    print_json_string(stdout, m->name, strlen(m->name));
    printf("\n");
    print_parts(NULL, 0, m);
    printf("  template        %s\n", astrovl_template_name(m->chat_template));
    printf("  weights         %llu parameters in %s\n", (unsigned long long)m->n_params,
           human_bytes(text, m->n_weight_bytes));
}

static void print_model_json(json *j, const astrovl_info *m) {
    json_text(j, "name", m->name);
    json_int(j, "parameters", (int64_t)m->n_params);
    json_int(j, "weight_bytes", (int64_t)m->n_weight_bytes);
    json_text(j, "template", astrovl_template_name(m->chat_template));
    print_parts(j, 1, m);
}

// What the files are together; that they are no model this program can run is an answer, not a failure.
static void print_model(const program *p, json *j, const list *paths) {
    astrovl_error err;
    astrovl_info info;
    astrovl_model *model = astrovl_open_files(paths->items, paths->n, NULL, &err);
    if (model) astrovl_get_info(model, &info);
    if (p->o.json) {
        json_open(j, "model", '{');
        if (model) print_model_json(j, &info);
        else json_text(j, "error", err.message);
        json_close(j, '}');
    } else if (model) {
        print_model_text(&info);
    } else {
        printf("no model that astrovl can run: %s\n", err.message);
    }
    astrovl_close(model);
}

static int run_inspect(program *p) {
    list *paths = p->o.words.n ? &p->o.words : &p->o.models;
    astrovl_error err;
    json j = {0};
    int i;
    if (p->o.words.n && p->o.models.n) return usage_error(p->cmd, "name the files as arguments or with -m, not both");
    if (paths->n == 0 && p->shipped[0]) paths->items[paths->n++] = p->shipped;
    if (paths->n == 0) return usage_error(p->cmd, "which file? (the shipped model was not found)");
    for (i = 0; i < paths->n; i++) {                       // all, before anything is printed: half a JSON text is none
        astrovl_gguf *file = astrovl_gguf_open(paths->items[i], 0, &err);
        if (!file) return failed(&err);
        astrovl_gguf_close(file);
    }
    if (p->o.json) json_open(&j, NULL, '{'), json_open(&j, "files", '[');
    for (i = 0; i < paths->n; i++) {
        astrovl_gguf *file = astrovl_gguf_open(paths->items[i], 0, &err);
        if (!file) return failed(&err);
        if (p->o.json) print_file_json(p, &j, file);
        else print_file_text(p, file);
        astrovl_gguf_close(file);
    }
    if (p->o.json) json_close(&j, ']');
    print_model(p, &j, paths);
    if (p->o.json) printf("}\n");
    return EXIT_OK;
}

// ====================================================================================================================
// trace
// ====================================================================================================================

typedef struct traced_name {
    char *name;
    int   calls;
} traced_name;

typedef struct trace_state {
    program     *p;
    const char  *folder;                   // NULL: hashes only
    FILE        *index;                    // folder/index.tsv: what came when
    traced_name *names;
    int          n_names, capacity;
    uint64_t     n_tensors, n_bytes, total;
    int          failed;                   // a file could not be written; said already
} trace_state;

// FNV-1a, 64 bits (Fowler, Noll, Vo): h = (h xor byte) * prime. Start with FNV_START.
#define FNV_START 14695981039346656037ULL
static uint64_t fnv1a64(uint64_t h, const void *data, size_t size) {
    const unsigned char *bytes = (const unsigned char *)data;
    size_t i;
    for (i = 0; i < size; i++) h = (h ^ bytes[i]) * 1099511628211ULL;
    return h;
}

// Floats as little-endian bytes, whatever the machine's order.
static void floats_to_bytes(unsigned char *bytes, const float *values, size_t n) {
    size_t i;
    for (i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &values[i], 4);
        bytes[4 * i] = (unsigned char)bits;
        bytes[4 * i + 1] = (unsigned char)(bits >> 8);
        bytes[4 * i + 2] = (unsigned char)(bits >> 16);
        bytes[4 * i + 3] = (unsigned char)(bits >> 24);
    }
}

// Hashes the values' bytes and, with a file, writes them.
static uint64_t put_values(FILE *f, const float *values, uint64_t n) {
    unsigned char bytes[4096];
    uint64_t hash = FNV_START;
    while (n) {
        size_t count = n < sizeof bytes / 4 ? (size_t)n : sizeof bytes / 4;
        floats_to_bytes(bytes, values, count);
        hash = fnv1a64(hash, bytes, count * 4);
        if (f) fwrite(bytes, 4, count, f);
        values += count;
        n -= count;
    }
    return hash;
}

// The header of numpy's file format, version 1.0: magic, version, length, a Python dictionary padded to 64 bytes.
// Source: numpy.lib.format's documentation (NEP 1).
static void put_npy_header(FILE *f, const int64_t *shape, int n_dims) {
    char dims[128], text[256];
    unsigned char start[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, 0, 0};
    int used = snprintf(text, sizeof text, "{'descr': '<f4', 'fortran_order': False, 'shape': (%s%s), }",
                        shape_text(dims, shape, n_dims, ", "), n_dims == 1 ? "," : "");
    int size = (10 + used + 1 + 63) / 64 * 64 - 10;
    start[8] = (unsigned char)size;
    start[9] = (unsigned char)(size >> 8);
    fwrite(start, 1, sizeof start, f);
    fprintf(f, "%s", text);
    print_spaces(f, size - used - 1);
    fputc('\n', f);
}

// How often this name has come, this time included; 0 when memory is out.
static int count_call(trace_state *t, const char *name) {
    int i;
    for (i = 0; i < t->n_names; i++)
        if (strcmp(t->names[i].name, name) == 0) return ++t->names[i].calls;
    if (t->n_names == t->capacity) {
        int capacity = t->capacity ? t->capacity * 2 : 256;
        traced_name *grown = (traced_name *)realloc(t->names, (size_t)capacity * sizeof *grown);
        if (!grown) return 0;
        t->names = grown;
        t->capacity = capacity;
    }
    t->names[t->n_names].name = (char *)malloc(strlen(name) + 1);
    if (!t->names[t->n_names].name) return 0;
    strcpy(t->names[t->n_names].name, name);
    return t->names[t->n_names++].calls = 1;
}

static void cannot_write(trace_state *t, const char *path) {
    if (!t->failed) fprintf(stderr, "astrovl: %s: cannot be written: %s\n", path, strerror(errno));
    t->failed = 1;
}

// "model.norm" -> "model.norm.npy", the third time "model.norm.call3.npy"
static void tensor_file_name(char *file, size_t size, const char *name, int call) {
    char *c;
    if (call == 1) snprintf(file, size, "%.180s.npy", name);
    else snprintf(file, size, "%.180s.call%d.npy", name, call);
    for (c = file; *c; c++)
        if (!isalnum((unsigned char)*c) && !strchr("._-", *c)) *c = '_';
}

static void save_tensor(trace_state *t, const char *name, int layer, const int64_t *shape, int n_dims, uint64_t n,
                        const float *data) {
    char file[256], dims[128], path[4096];
    int call = count_call(t, name), ok;
    uint64_t hash;
    FILE *f;
    if (!call) {
        t->failed = 1;
        out_of_memory();
        return;
    }
    tensor_file_name(file, sizeof file, name, call);
    snprintf(path, sizeof path, "%s/%s", t->folder, file);
    f = fopen(path, "wb");
    if (!f) {
        cannot_write(t, path);
        return;
    }
    put_npy_header(f, shape, n_dims);
    hash = put_values(f, data, n);
    ok = !ferror(f);
    if (fclose(f) != 0 || !ok) cannot_write(t, path);
    fprintf(t->index, "%s\t%s\t%d\t%d\t%s\t%016llx\n", file, name, layer, call, shape_text(dims, shape, n_dims, "x"),
            (unsigned long long)hash);
}

static void hash_tensor(trace_state *t, const char *name, const int64_t *shape, int n_dims, uint64_t n,
                        const float *data) {
    char dims[128], line[512];
    uint64_t hash = put_values(NULL, data, n);
    int size = snprintf(line, sizeof line, "%016llx %.300s %s\n", (unsigned long long)hash, name,
                        shape_text(dims, shape, n_dims, "x"));
    t->total = fnv1a64(t->total, line, (size_t)size);
    fputs(line, stdout);
}

static void on_tensor(void *user, const char *name, int layer, const int64_t *shape, int n_dims, const float *data) {
    trace_state *t = (trace_state *)user;
    uint64_t n = 1;
    int i;
    if (t->failed) return;
    for (i = 0; i < n_dims; i++) n *= (uint64_t)shape[i];
    if (t->folder) save_tensor(t, name, layer, shape, n_dims, n, data);
    else hash_tensor(t, name, shape, n_dims, n, data);
    flush_output(t->p);
    if (t->failed) t->p->stop = 1;                         // on_progress and on_text then end the work
    t->n_tensors++;
    t->n_bytes += n * 4;
}

// Makes the folder and its index before the long work, so that a folder that cannot be written is said at once.
static int open_trace_folder(trace_state *t) {
    char path[4096];
    if (make_folder(t->folder) != 0 && errno != EEXIST) {
        cannot_write(t, t->folder);
        return EXIT_FAILED;
    }
    snprintf(path, sizeof path, "%s/index.tsv", t->folder);
    t->index = fopen(path, "w");
    if (!t->index) {
        cannot_write(t, path);
        return EXIT_FAILED;
    }
    fprintf(t->index, "file\tname\tlayer\tcall\tshape\tfnv1a64\n");
    return EXIT_OK;
}

static int trace_turn(program *p, trace_state *t) {
    int n_images = p->o.words.n - 1;
    astrovl_image image;
    astrovl_error err;
    char *answer, size[32];
    memset(&image, 0, sizeof image);
    if (n_images && load_image(p->o.words.items[0], &image, &err) != ASTROVL_OK) return failed(&err);
    answer = say(p, &image, n_images, p->o.words.items[n_images], &err);
    astrovl_image_free(&image);
    if (p->stop) {
        astrovl_free(answer);
        return EXIT_FAILED;
    }
    if (!answer) return failed(&err);
    if (t->folder) {
        putchar('\n');
        if (!p->o.quiet)
            fprintf(stderr, "%llu tensors, %s, in %s; index.tsv lists them in the order they were computed\n",
                    (unsigned long long)t->n_tensors, human_bytes(size, t->n_bytes), t->folder);
    } else {
        printf("total %016llx of %llu tensors\nanswer ", (unsigned long long)t->total,
               (unsigned long long)t->n_tensors);
        print_json_string(stdout, answer, strlen(answer));
        putchar('\n');
    }
    astrovl_free(answer);
    return EXIT_OK;
}

static int run_trace(program *p) {
    trace_state t;
    int status;
    memset(&t, 0, sizeof t);
    t.p = p;
    t.folder = p->o.folder;
    t.total = FNV_START;
    if (p->o.words.n < 1 || p->o.words.n > 2)
        return usage_error(p->cmd, "an image and a prompt are wanted (or a prompt alone)");
    if (p->o.hash == (t.folder != NULL)) return usage_error(p->cmd, "where to: -o DIR, or --hash?");
    if (p->o.max_tokens == 0) p->o.max_tokens = 1;
    status = open_model(p);
    if (status == EXIT_OK) status = open_session(p, ASTROVL_EXACT, on_tensor, &t);
    if (status == EXIT_OK && t.folder) status = open_trace_folder(&t);
    if (status == EXIT_OK) status = trace_turn(p, &t);
    if (t.index) {
        int broken = ferror(t.index);
        if (fclose(t.index) != 0 || broken) cannot_write(&t, "index.tsv");
        if (t.failed) status = EXIT_FAILED;
    }
    while (t.n_names) free(t.names[--t.n_names].name);
    free(t.names);
    return status;
}

// ====================================================================================================================
// version, the list of commands, main
// ====================================================================================================================

static int run_version(program *p) {
    if (p->o.words.n) return usage_error(p->cmd, "no arguments are wanted");
    printf("astrovl %s\n", ASTROVL_VERSION);
#if defined(__VERSION__)
    printf("compiled with %s%s, %d-bit\n",
#if defined(__clang__)
           "", __VERSION__,
#else
           "gcc ", __VERSION__,
#endif
           (int)sizeof(void *) * 8);
#endif
    printf("shipped model: %s\n", p->shipped[0] ? p->shipped : "not found");
    return EXIT_OK;
}

static const command commands[] = {
    {"caption", CAPTION, run_caption, "caption [OPTIONS] IMAGE...", "describe images",
     "Describes what each image shows, in a sentence or two. Images are PNG, JPEG or PNM files. With several, each line\n"
     "begins with the file's name; one that cannot be read is reported, and the others are still described.",
     "  astrovl caption galaxy.png\n"
     "  astrovl caption --json *.jpg > captions.jsonl\n"
     "  astrovl caption -m llava-q4_0.gguf -m mmproj.gguf --temperature 0.7 --seed 3 nebula.jpg\n"},
    {"ask", ASK, run_ask, "ask [OPTIONS] IMAGE... \"QUESTION\"", "ask a question about an image",
     "Answers a question about an image. With several images the question is put about each in turn, or about all of\n"
     "them at once with --together.",
     "  astrovl ask galaxy.png \"Is there a bar?\"\n"
     "  astrovl ask *.png \"What kind of object is this?\"\n"
     "  astrovl ask --together before.png after.png \"What has changed?\"\n"},
    {"chat", CHAT, run_chat, "chat [OPTIONS] [IMAGE]", "talk about an image",
     "A dialogue: type a question, read the answer, ask on; the model remembers what was said. Lines that begin with a\n"
     "slash are commands: /image FILE, /reset, /help, /quit. Ctrl-C stops an answer. Questions may also come from a\n"
     "pipe, one a line; standard output then has the answers alone. It works with a language model alone, too.",
     "  astrovl chat galaxy.png\n"
     "  printf 'What is this?\\nWhich colour is it?\\n' | astrovl chat --quiet galaxy.png\n"
     "  astrovl chat -m smollm2.gguf --prompt \"Why is the sky dark at night?\"\n"},
    {"tokens", TOKENS, run_tokens, "tokens [OPTIONS] [\"TEXT\" | -]", "show how a text is cut into tokens",
     "Shows the tokens of a text: id, the piece as the vocabulary spells it, and the bytes it stands for. Without a text\n"
     "(or with -) it is read from standard input, every byte of it, a last newline included. A file that holds a\n"
     "vocabulary and no weights is enough.",
     "  astrovl tokens \"a barred spiral galaxy\"\n"
     "  printf 'M31' | astrovl tokens --ids -m llama-2.gguf\n"
     "  astrovl tokens --ids \"M31\" | astrovl tokens --decode\n"},
    {"inspect", INSPECT, run_inspect, "inspect [OPTIONS] [MODEL...]", "show what is in model files",
     "Lists the metadata and the tensors of GGUF files with their types, shapes and sizes, and says what the files make\n"
     "up together. Without a file: the shipped model. Shapes are written as numpy does, the slowest dimension first.",
     "  astrovl inspect model.gguf mmproj.gguf\n"
     "  astrovl inspect --json model.gguf | python3 -m json.tool\n"},
    {"trace", TRACE, run_trace, "trace [OPTIONS] [IMAGE] \"PROMPT\" -o DIR | --hash", "save all that is computed for an answer",
     "Runs one question in exact arithmetic and saves every intermediate tensor of the vision tower, the projector and\n"
     "the language model as a .npy file, named as transformers names the module. A tensor that is computed again (once\n"
     "a token with --max-tokens 2 and more) is saved as NAME.call2.npy and so on. DIR/index.tsv lists the files in the\n"
     "order of computation. With --hash nothing is saved: each line has a tensor's FNV-1a hash, name and shape, and the\n"
     "last two a hash over all those lines and the answer. They are the same on every machine.",
     "  astrovl trace galaxy.png \"Is there a bar?\" -o /tmp/trace\n"
     "  python3 -c 'import numpy; print(numpy.load(\"/tmp/trace/model.norm.npy\").shape)'\n"
     "  astrovl trace galaxy.png \"Is there a bar?\" --hash --max-tokens 8 | tail -2\n"},
    {"version", VERSION, run_version, "version", "print the version",
     "Prints the version, the compiler it was built with, and where the shipped model lies.", "  astrovl version\n"},
};
enum { N_COMMANDS = (int)(sizeof commands / sizeof *commands) };

static void print_overview(FILE *out) {
    int i;
    fprintf(out, "astrovl %s: looks at astronomical images and says what it sees.\n\n"
            "Usage: astrovl COMMAND [OPTIONS] ...\n\nCommands:\n", ASTROVL_VERSION);
    for (i = 0; i < N_COMMANDS; i++) fprintf(out, "  %-9s %s\n", commands[i].name, commands[i].summary);
    fprintf(out, "\nastrovl COMMAND --help describes a command and its options. For a start:\n"
            "  astrovl caption test/images/*\n");
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
    list *lists[3];
    int i, status = EXIT_OK;
    p->cmd = c;
    lists[0] = &p->o.models, lists[1] = &p->o.stop, lists[2] = &p->o.words;
    for (i = 0; i < 3; i++) {
        lists[i]->items = (const char **)calloc((size_t)argc + 1, sizeof(const char *));
        if (!lists[i]->items) status = out_of_memory();
    }
    if (status == EXIT_OK) status = parse_options(c, &p->o, argc, argv);
    p->show_progress = !p->o.quiet && is_terminal(2);
    if (status == EXIT_OK && p->o.help) print_command_help(c);
    else if (status == EXIT_OK) status = c->run(p);
    astrovl_session_free(p->session);
    astrovl_close(p->model);
    for (i = 0; i < 3; i++) free(lists[i]->items);
    return status;
}

int main(int argc, char **argv) {
    static program p;        // static: it starts as zeros, and is large for a small stack
    const char *name = argc > 1 ? argv[1] : "";
    const command *c = find_command(name);
    int status = EXIT_OK;
    occupy_standard_streams();
#if defined(SIGPIPE)
    signal(SIGPIPE, SIG_IGN);              // a reader that leaves is a failed write, handled where it happens
#endif
    p.safe_output = is_terminal(1);
    find_shipped_model(&p, argv[0]);
    if (strcmp(name, "help") == 0 && argc > 2) {
        c = find_command(argv[2]);
        if (c) print_command_help(c);
        else status = usage_error(NULL, "there is no command \"%s\"", argv[2]);
    } else if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0) {
        print_overview(stdout);
    } else if (strcmp(name, "--version") == 0) {
        printf("astrovl %s\n", ASTROVL_VERSION);
    } else if (c) {
        status = run_command(&p, c, argc - 2, argv + 2);
    } else if (argc < 2) {
        print_overview(stderr);
        status = EXIT_USAGE;
    } else {
        status = usage_error(NULL, "there is no command \"%s\"", name);
    }
    flush_output(&p);
    return p.stop && status == EXIT_OK ? EXIT_FAILED : status;
}
