# The instruction sets that there are kernels for, the best of a machine first. This is the only list: CMake compiles from
# it, isa/isa.cpp gets its table from it, and Python (compiler/instruction_sets.py) reads it for device files, the probe
# and the tests. docs/kernels.md says how to add one.
#   PROCESSOR  x86_64, aarch64, or any
#   NEEDS      what the processor must have, in the words of isa/cpu.cpp
#   ATTENTION  the set whose attention/attention_<set>.cpp serves attention, norms and RoPE; left out: its own
#   FLAGS      the compiler's, for isa/kernels_<name>.cpp and attention/attention_<name>.cpp
# g++ 12 takes its own _mm512_undefined_ps() for a use before initialisation: hence the two -Wno-.
moec_instruction_set(avx512vnni PROCESSOR x86_64 NEEDS avx2 avx512 avx512vnni
  FLAGS -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512
        -Wno-uninitialized -Wno-maybe-uninitialized)
moec_instruction_set(avxvnni PROCESSOR x86_64 NEEDS avx2 avxvnni ATTENTION avx2 FLAGS -mavx2 -mfma -mf16c -mavxvnni)
moec_instruction_set(avx2 PROCESSOR x86_64 NEEDS avx2 FLAGS -mavx2 -mfma -mf16c)
moec_instruction_set(i8mm PROCESSOR aarch64 NEEDS dotprod i8mm ATTENTION neon FLAGS -march=armv8.2-a+fp16+dotprod+i8mm)
moec_instruction_set(neon PROCESSOR aarch64 NEEDS dotprod FLAGS -march=armv8.2-a+fp16+dotprod)
moec_instruction_set(scalar PROCESSOR any)
