#!/bin/sh
# Builds bench/ring_bench.cu with the production sources for sm_90 into build/, about three minutes, and runs it with the
# arguments given here. BUILD_ONLY=1: for a machine without a GPU.
set -eu
cd "$(dirname "$0")/.."
objects=build/ring_bench.d
mkdir -p "$objects"
for source in bench/ring_bench.cu csrc/cuda/base/device.cu csrc/cuda/ops.cu csrc/cuda/policy/policy.cu csrc/cuda/rows/sm90/*.cu \
  csrc/cuda/rows/streaming_*.cu; do
  nvcc -std=c++17 -O3 --expt-relaxed-constexpr -arch=sm_90 -DGRPO_CUDA_RING -Icsrc \
    -c "$source" -o "$objects/$(basename "$source" .cu).o"
done
nvcc -arch=sm_90 "$objects"/*.o -o build/ring_bench
[ "${BUILD_ONLY:-}" ] || build/ring_bench "$@"
