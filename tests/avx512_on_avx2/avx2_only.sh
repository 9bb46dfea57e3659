#!/bin/sh
# avx2_only.sh PROGRAM: fails, and shows them, if it has instructions that a CPU with AVX2 alone lacks: those of ZMM,
# mask and tile registers, and of XMM and YMM registers from 16 on. YMM registers must occur: the listing was read.
objdump -d --no-show-raw-insn "$1" | awk '
/%ymm/ { avx2 = 1 }
/%zmm|%k[0-7]|%tmm|\t(ld|st)?tile|%[xy]mm(1[6-9]|2[0-9]|3[01])/ { if (++beyond <= 20) print }
END { print beyond + 0, "instructions beyond AVX2"; exit beyond > 0 || !avx2 }'
