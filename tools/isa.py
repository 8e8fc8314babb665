"""The instruction sets that kernels can be held to on this machine, below all that it has: for oneDNN, for ATen."""

from __future__ import annotations

import torch

LEVELS = (("AVX2", "avx2"), ("AVX512_CORE", "avx512"), ("AVX512_CORE_BF16", "avx512"))


def levels() -> list[tuple[str, str]]:
    """Pairs of ``ONEDNN_MAX_CPU_ISA`` and ``ATEN_CPU_CAPABILITY``."""
    wide = torch.cpu._is_avx512_supported()
    return [level for level in LEVELS if level[1] == "avx2" or wide]


if __name__ == "__main__":
    print(*(",".join(level) for level in levels()))
