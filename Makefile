# make              the program, ./astrovl
# make run          a tour of it, within a minute
# make test         every test; the last line counts them
# make install      to PREFIX (default /usr/local), under DESTDIR if given
# make lint         warnings as errors with the compilers found here, and the checkers found here
# make test-sanitize   the tests with the address and undefined-behaviour sanitizers
# make test-targets    the kernels' four-lane instance on other processors, emulated (test/targets.sh says what it needs)
# make fuzz [SECONDS=20]   clang's libFuzzer on files, images, texts, schemas, patterns, JSON lines and index files (test/fuzz.c)
# make test-real PYTHON=VENV/bin/python [LLAMA_CPP_PYTHON=SOURCE] [LLAMA_CPP=BUILD]   the tests on real models, and against llama.cpp
#                   (test/real_common.py says what they need, and where to get it); the last line counts them and says what was not run
# make bench        how fast search, the shipped model and guided decoding are here, against the machine's own limits; for other
#                   models, and accuracy: test/bench (test/bench.c begins with its options)
# make bench LLAMA_CPP=DIR [MODEL=llava-1.5-7b] [TYPES="q4_0 q8_0 q4_k f16"] [ROUNDS=3] [IMAGES=9] [ISA=avx2]   against llama.cpp,
#                   too (DIR: its build folder; with ISA=avx2 one that was built for AVX2 only; test/bench_llama_cpp.py says more)
# make golden PYTHON=VENV/bin/python   writes test/golden/ anew (needs PyTorch, transformers and more: test/make_golden.py)

CC      = cc
CFLAGS ?= -O2
LDLIBS  = -lm -pthread
PYTHON  = python3
PREFIX  = /usr/local
DATA    = $(PREFIX)/share/astrovl

WARNINGS = -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion -Werror
SANITIZE = -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer

all: astrovl

astrovl: demo.c astrovl.h
	$(CC) $(CFLAGS) -DASTROVL_DATA_DIR='"$(DATA)"' -o $@ demo.c $(LDLIBS)

run: astrovl
	@echo; echo '--- 1. The shipped model (a small LLaVA, 6.8 MB) describes the example images'
	./astrovl caption --quiet test/images/*
	@echo; echo '--- 2. It answers questions about one of them, and says how long it took'
	@for question in 'What kind of object is this?' 'Is there a bar?' 'Which colour dominates?'; do \
	    echo "./astrovl ask $(IMAGE) \"$$question\""; ./astrovl ask $(IMAGE) "$$question" || exit 1; done
	@echo; echo '--- 3. A conversation remembers what was said; here its questions come through a pipe'
	printf 'What is this?\nIs anything odd about it?\n' | ./astrovl chat --quiet $(IMAGE)
	@echo; echo '--- 4. What the model reads: tokens of the vocabulary instead of letters'
	./astrovl tokens 'a barred spiral galaxy'
	@echo; echo '--- 5. The same answer on every machine: hashes over every number computed on the way to it'
	./astrovl trace $(IMAGE) 'What is this?' --hash --max-tokens 4 | tail -n 2
	@echo; echo '--- 6. Images and texts in one space: which text fits; what the picture may show and be good for'
	./astrovl score $(IMAGE) --text 'a spiral galaxy' --text 'a globular cluster' --text 'a comet'
	./astrovl describe -k 2 $(IMAGE)
	@echo; echo '--- 7. A folder is indexed once (here into a temporary file) and then searched with words'
	@index=$$(mktemp -d)/images.avl; ./astrovl index test/images -o $$index && \
	    echo './astrovl search images.avl "a planet with rings"' && ./astrovl search $$index 'a planet with rings' && \
	    rm -r $$(dirname $$index)
	@echo; echo '--- 8. How good is a model? Two measurements, on five images only: to show the form, not the figures'
	./astrovl evaluate retrieval test/pairs.jsonl
	./astrovl evaluate vqa test/vqa.jsonl
	@echo; echo '--- 9. An abstract becomes JSON that keeps to a schema; this model is too small to fill it with sense'
	echo 'We will image the arcs around Abell 370 and map its dark matter.' | ./astrovl summarize --quiet -
	@echo; echo 'Next: ./astrovl chat $(IMAGE)   or   ./astrovl --help'

IMAGE = test/images/spiral.png

test: astrovl test/test test/bench
	@rm -f test/test.log
	@{ ./test/test 2>&1; echo "(C tests: exit status $$?)"; } | tee test/test.log
	@{ $(PYTHON) test/test_convert.py 2>&1; echo "(command-line tests: exit status $$?)"; } | tee -a test/test.log
	@awk '/^[0-9]+ passed, [0-9]+ failed$$/ { passed += $$1; failed += $$3; programs++ } \
	      END { if (programs != 2) { print "a test program did not reach its end"; failed++ } \
	            printf "%d passed, %d failed\n", passed, failed; exit failed > 0 }' test/test.log

test/test: test/test.c astrovl.h
	$(CC) -O1 -g1 -o $@ test/test.c $(LDLIBS)

test-sanitize: test-sanitize-c test-sanitize-program

test-sanitize-c:
	$(CC) $(SANITIZE) -o test/test-sanitize test/test.c $(LDLIBS)
	./test/test-sanitize

test-sanitize-program:
	$(CC) $(SANITIZE) -o astrovl-sanitize demo.c $(LDLIBS)
	$(CC) $(SANITIZE) -o test/bench-sanitize test/bench.c $(LDLIBS)
	ASTROVL=./astrovl-sanitize BENCH=test/bench-sanitize $(PYTHON) test/test_convert.py

test-targets:
	test/targets.sh

fuzz: astrovl
	clang -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -DASTROVL_NO_SIMD -o test/fuzz test/fuzz.c -lm
	$(PYTHON) test/fuzz.py $(or $(SECONDS),20)

# Each of the five programs ends with a line of counts. (make hands LLAMA_CPP and LLAMA_CPP_PYTHON on in the environment.)
test-real: astrovl
	@rm -f test/test-real.log
	@for part in models tokens guided quants convert; do echo "--- test/real_$$part.py"; \
	    { PYTHONUNBUFFERED=1 $(PYTHON) test/real_$$part.py 2>&1; echo "(real_$$part.py: exit status $$?)"; } | tee -a test/test-real.log; done
	@awk '/^[0-9]+ passed, [0-9]+ failed/ { passed += $$1; failed += $$3; programs++; \
	          if (sub(/.*not run: /, "")) skipped = skipped ", " $$0 } \
	      END { if (programs != 5) { print 5 - programs " of 5 programs did not reach their end"; failed += 5 - programs } \
	            printf "%d passed, %d failed%s\n", passed, failed, skipped ? "; not run: " substr(skipped, 3) : ""; exit failed > 0 }' test/test-real.log

bench: test/bench
	./test/bench search
	./test/bench
	./test/bench guided
	$(if $(LLAMA_CPP),$(PYTHON) test/bench_llama_cpp.py $(LLAMA_CPP) --model $(or $(MODEL),llava-1.5-7b) --types "$(or $(TYPES),q4_0)" \
	    --rounds $(or $(ROUNDS),3) --images $(or $(IMAGES),0) $(if $(ISA),--isa $(ISA)))

test/bench: test/bench.c astrovl.h
	$(CC) $(CFLAGS) -o $@ test/bench.c $(LDLIBS)

golden:
	$(PYTHON) test/make_golden.py

# -O1: optimising finds more to warn of
lint: lint-gcc lint-clang lint-cppcheck lint-tidy

lint-gcc lint-clang:
	@cc=$(@:lint-%=%); command -v $$cc >/dev/null || exit 0; for file in demo.c test/test.c test/bench.c; do \
	    echo "$$cc $$file: C99, C++11"; \
	    $$cc -x c -std=c99 $(WARNINGS) -O1 -c $$file -o /dev/null || exit 1; \
	    $$cc -x c++ -std=c++11 $(WARNINGS) -fsyntax-only $$file || exit 1; done

lint-cppcheck:
	@if command -v cppcheck >/dev/null; then echo cppcheck; \
	    cppcheck --quiet --std=c99 --enable=warning,portability --inline-suppr --error-exitcode=1 $(CPPCHECK) demo.c; fi

lint-tidy:
	@if command -v clang-tidy >/dev/null; then echo clang-tidy; \
	    clang-tidy --quiet --warnings-as-errors='*' --header-filter=astrovl.h --checks='$(TIDY)' demo.c -- -std=c99; fi

# What the checkers get wrong is left to the sanitizers and valgrind, or marked NOLINT with the reason: clang-analyzer does not look
# into functions with variable arguments (avl__fail), so it does not see that a failure sticks.
CPPCHECK = --suppress=toomanyconfigs --suppress=normalCheckLevelMaxBranches --suppress=negativeIndex --suppress=uninitvar
TIDY     = -*,clang-analyzer-core.NullDereference,clang-analyzer-core.StackAddressEscape,clang-analyzer-unix.Malloc,clang-analyzer-unix.MallocSizeof,clang-analyzer-deadcode.*,bugprone-macro-parentheses,bugprone-suspicious-*

install: astrovl
	mkdir -p $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(DATA)
	cp astrovl $(DESTDIR)$(PREFIX)/bin/
	cp astrovl.h $(DESTDIR)$(PREFIX)/include/
	cp test/astrovl-tiny.gguf test/labels.txt $(DESTDIR)$(DATA)/

clean:
	rm -f astrovl astrovl-sanitize test/test test/test-sanitize test/bench test/bench-sanitize test/fuzz test/test.log test/test-real.log

.PHONY: all run test test-sanitize test-sanitize-c test-sanitize-program test-targets fuzz test-real bench golden install clean \
    lint lint-gcc lint-clang lint-cppcheck lint-tidy
