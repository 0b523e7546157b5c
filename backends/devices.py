"""What each device multiplies natively, and which device this is.

Sources: PTX ISA 8.7, "Matrix multiply-accumulate" and "tcgen05" tables; AMD CDNA 3 ISA, section "Matrix
Arithmetic"; Intel 64 Software Developer's Manual, AVX512_VNNI, AVX-VNNI and AMX.
"""

import platform
from dataclasses import dataclass

import torch

MXFP4 = "fp4_e2m1/e8m0"
NVFP4 = "fp4_e2m1/fp8_e4m3"

_INT8 = ("int8",)
_FP8 = ("fp8_e4m3", "fp8_e5m2")
_FP8_FNUZ = ("fp8_e4m3fnuz", "fp8_e5m2fnuz")
_FP6 = ("fp6_e3m2", "fp6_e2m3")


@dataclass(frozen=True, kw_only=True)
class Device:
    """A kind of device.

    multiplies: the formats of which it multiplies two operands in hardware, beside float32; a block-scaled one is
        written format/scale.  floats: the 16-bit floats that it multiplies in hardware.
    """

    name: str
    title: str
    multiplies: tuple[str, ...] = ()
    floats: tuple[str, ...] = ("fp16", "bf16")


_TABLE = (
    Device(name="cpu", title="any CPU", floats=()),
    Device(name="cpu_avx2", title="x86 with AVX2", floats=()),
    # VPMADDUBSW and VPDPBUSD take unsigned x signed bytes: s8 x s8 costs a correction of the sum
    Device(name="cpu_avx512", title="x86 with AVX-512", floats=()),
    Device(name="cpu_avx_vnni", title="x86 with AVX-VNNI", multiplies=_INT8, floats=()),
    Device(name="cpu_vnni", title="x86 with AVX512-VNNI", multiplies=_INT8, floats=()),
    Device(name="cpu_vnni_bf16", title="x86 with AVX512-VNNI and AVX512-BF16", multiplies=_INT8, floats=("bf16",)),
    Device(name="cpu_amx", title="x86 with AMX", multiplies=_INT8, floats=("bf16",)),
    Device(name="cpu_neon", title="ARM with NEON", floats=()),
    Device(name="cpu_i8mm", title="ARM with I8MM", multiplies=_INT8, floats=("bf16",)),
    # Turing and Ampere also multiply int4; Hopper dropped it, so no kernel of ours relies on it
    Device(name="sm_75", title="NVIDIA Turing (T4, RTX 20)", multiplies=_INT8, floats=("fp16",)),
    Device(name="sm_80", title="NVIDIA Ampere (A100)", multiplies=_INT8),
    Device(name="sm_86", title="NVIDIA Ampere (A10, RTX 30)", multiplies=_INT8),
    Device(name="sm_89", title="NVIDIA Ada (L4, L40, RTX 40)", multiplies=_INT8 + _FP8),
    Device(name="sm_90", title="NVIDIA Hopper (H100, H200)", multiplies=_INT8 + _FP8),
    Device(
        name="sm_100",
        title="NVIDIA Blackwell (B100, B200)",
        multiplies=(*_INT8, *_FP8, *_FP6, "fp4_e2m1", MXFP4, NVFP4),
    ),
    Device(
        name="sm_120", title="NVIDIA Blackwell (RTX 50)", multiplies=(*_INT8, *_FP8, *_FP6, "fp4_e2m1", MXFP4, NVFP4)
    ),
    Device(name="gfx942", title="AMD MI300", multiplies=_INT8 + _FP8_FNUZ),
)
DEVICES: dict[str, Device] = {d.name: d for d in _TABLE}

# by decreasing ability: the first whose features are all there is this CPU
_CPU_FEATURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("cpu_amx", ("amx_int8", "amx_bf16")),
    ("cpu_vnni_bf16", ("avx512_vnni", "avx512_bf16")),
    ("cpu_vnni", ("avx512_vnni",)),
    ("cpu_avx_vnni", ("avx_vnni",)),
    ("cpu_avx512", ("avx512_f",)),
    ("cpu_avx2", ("avx2",)),
    ("cpu_i8mm", ("i8mm",)),
    ("cpu_neon", ("neon",)),
)


def this_device(device: torch.device | str) -> Device:
    """The kind of a torch device.

    A CUDA capability that the table lacks counts as the highest known one below it; device "cuda" without a GPU,
    as used to lower for another machine, counts as sm_80.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return DEVICES[_cpu_name(cpu_features())]
    if device.type == "cuda":
        return DEVICES[_gpu_name(device)]
    return Device(name=device.type, title=f"torch device {device.type!r}, unknown to qcompile", floats=())


def cpu_features() -> frozenset[str]:
    """Instruction sets of this CPU, by the names of `torch.cpu.get_capabilities`."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        return frozenset(name for name, value in capabilities().items() if value is True)
    # before torch 2.12 only these can be asked; a CPU with AVX-VNNI alone counts as one with AVX2 there
    asked = {"avx2": "avx2", "avx512_f": "avx512", "avx512_vnni": "vnni", "avx512_bf16": "avx512_bf16"}
    asked |= {"amx_int8": "amx_tile", "amx_bf16": "amx_tile"}
    found = {name for name, word in asked.items() if getattr(torch.cpu, f"_is_{word}_supported", bool)()}
    return frozenset(found | ({"neon"} if platform.machine() in ("aarch64", "arm64") else set()))


def _cpu_name(features: frozenset[str]) -> str:
    return next((name for name, needed in _CPU_FEATURES if features.issuperset(needed)), "cpu")


def _gpu_name(device: torch.device) -> str:
    if not torch.cuda.is_available():
        return "sm_80"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return nearest_below(10 * major + minor)


def nearest_below(capability: int) -> str:
    """The known NVIDIA device of the highest compute capability that is at most `capability` (90 for 9.0)."""
    known = sorted(int(name.removeprefix("sm_")) for name in DEVICES if name.startswith("sm_"))
    return f"sm_{max((c for c in known if c <= capability), default=known[0])}"
