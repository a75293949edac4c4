#!/bin/bash
# The kernels' four-lane instance on processors that have no instance of their own, and what is left where compilers have no
# vectors. Each target: the fast tests that take seconds under an emulator, then the shipped model's caption in exact mode, whose
# hash is the same everywhere. A target is skipped when its compiler or emulator is missing; on Debian 12 all are in: clang-19 lld-19
# libclang-rt-19-dev-wasm32 wasi-libc nodejs qemu-user gcc-{powerpc64le,riscv64,aarch64}-linux-gnu libc6-dev-{ppc64el,riscv64,arm64}-cross
#     test/targets.sh [TARGET...]      sse2 ppc64le riscv64 riscv64-v wasm32 loongarch64
#     CLANG=clang-19                   the clang for riscv64-v (16 or later) and wasm32 (with lld of the same version)
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
clang=${CLANG:-}
for name in clang clang-16 clang-17 clang-18 clang-19 clang-20; do [ -n "${CLANG:-}" ] || ! command -v $name >/dev/null || clang=$name; done
tests=("fast: rows" "fast: norms" "fast: one query" "fast: nothing" "joint: search")
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
passed=0 failed=0

# Both count, and use $start of the function that calls them.
succeeded() {
    passed=$((passed + 1))
    echo "ok      $1 ($((SECONDS - start)) s)"
}
did_fail() {
    failed=$((failed + 1))
    echo "FAILED  $1 ($((SECONDS - start)) s)"
    tail -n 20 "$tmp/log" | cut -c 1-300 | sed 's/^/        /'
}

# target NAME EMULATOR COMPILER... : builds the tests and the program, and runs them; $libraries are linked
target() {
    local name=$1 emulator=$2 start=$SECONDS
    shift 2
    if ! command -v "$1" >/dev/null || ! command -v ${emulator%% *} >/dev/null; then echo "skipped $name: no $1 or no ${emulator%% *}"; return; fi
    if "$@" -O1 -w test/test.c -o "$tmp/test" $libraries >"$tmp/log" 2>&1 && $emulator "$tmp/test" "${tests[@]}" >>"$tmp/log" 2>&1 &&
        ! grep -q '^0 passed' "$tmp/log" && "$@" -O1 -w -DASTROVL_NO_SIMD demo.c -o "$tmp/astrovl" $libraries >>"$tmp/log" 2>&1 &&
        $emulator "$tmp/astrovl" trace -m test/astrovl-tiny.gguf test/images/spiral.png "What is this?" --hash --max-tokens 4 2>&1 |
            tee -a "$tmp/log" | grep -q 0720b38d2dc84cf1; then
        succeeded "$name: $(grep ' passed, ' "$tmp/log"), and exact mode's hash"
    else
        did_fail "$name"
    fi
}

# compiled NAME COMPILER: for want of a C library (Debian 12 has none, and its qemu no LSX) an object file must do
compiled() {
    local start=$SECONDS
    if ! command -v ${2%% *} >/dev/null; then echo "skipped $1: no ${2%% *}"; return; fi
    if $2 -O1 -w -c test/test.c -o "$tmp/test.o" >"$tmp/log" 2>&1; then
        succeeded "$1: compiled, not run"
    else
        did_fail "$1"
    fi
}

# clang with gcc's cross libraries; for LoongArch with AArch64's headers, which fit
lsx="$clang --target=loongarch64-linux-gnu -mlsx -I/usr/aarch64-linux-gnu/include"
riscv="$clang --target=riscv64-linux-gnu -march=rv64gcv -static -fuse-ld=lld -I/usr/riscv64-linux-gnu/include"
for folder in /usr/lib/gcc-cross/riscv64-linux-gnu/*; do riscv="$riscv -B$folder -L$folder"; done
riscv="$riscv -L/usr/riscv64-linux-gnu/lib"
wasm="$clang --target=wasm32-wasi --sysroot=/usr -isystem /usr/include/wasm32-wasi -L/usr/lib/wasm32-wasi -msimd128 -DASTROVL_NO_THREADS
    -DASTROVL_NO_MMAP -D_WASI_EMULATED_SIGNAL -D_WASI_EMULATED_PROCESS_CLOCKS -Wl,-z,stack-size=1048576"
for name in "${@:-sse2 ppc64le riscv64 riscv64-v wasm32 loongarch64}"; do for one in $name; do
    libraries="-lm -pthread"
    case $one in
    sse2) target $one "env --" gcc -DASTROVL_TEST_GENERIC ;;
    ppc64le) target $one qemu-ppc64le powerpc64le-linux-gnu-gcc -static ;;
    riscv64) target $one qemu-riscv64 riscv64-linux-gnu-gcc -static ;;
    riscv64-v) target $one "qemu-riscv64 -cpu rv64,v=true,vlen=128,vext_spec=v1.0" $riscv ;;
    wasm32) libraries="-lwasi-emulated-signal -lwasi-emulated-process-clocks -lm"
            target $one "node --no-warnings test/wasi.mjs" $wasm ;;
    loongarch64) compiled $one "$lsx" ;;
    *) echo "unknown target $one"; exit 2 ;;
    esac
done; done
echo "$passed passed, $failed failed"
[ $failed = 0 ] && [ $passed -gt 0 ]
