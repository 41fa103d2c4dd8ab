"""The report on the GPU kernels: occupancy, parsers and model against known values."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_report import page, tables
from gpu_report.cuda_extension import dtype_of, parse_bounds, parse_usage
from gpu_report.hardware import DEVICES, LATENCY
from gpu_report.objects import Loop, hip_loops, parse_loops
from gpu_report.occupancy import occupancy
from gpu_report.roofline import Work, model, work_per_logit


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared_bytes", "blocks", "limited_by"),
    [
        # NVIDIA's occupancy calculator.
        ("sm_80", 8, 32, 0, 8, "warps"),
        ("sm_80", 8, 33, 0, 6, "registers"),
        ("sm_80", 8, 64, 0, 4, "registers"),
        ("sm_80", 8, 65, 0, 3, "registers"),
        ("sm_80", 8, 128, 0, 2, "registers"),
        ("sm_80", 8, 255, 0, 1, "registers"),
        ("sm_80", 16, 128, 0, 1, "registers"),
        ("sm_80", 16, 129, 0, 0, "registers"),
        ("sm_80", 1, 32, 0, 32, "blocks"),
        ("sm_80", 4, 16, 48 << 10, 3, "shared memory"),
        ("sm_86", 8, 32, 0, 6, "warps"),
        ("sm_86", 1, 32, 0, 16, "blocks"),
        ("sm_86", 4, 16, 48 << 10, 2, "shared memory"),
        ("sm_89", 1, 32, 0, 24, "blocks"),
        ("sm_90", 4, 16, 227 << 10, 1, "shared memory"),
        ("sm_90", 4, 16, 228 << 10, 0, "shared memory"),
        ("sm_100", 8, 40, 0, 6, "registers"),
        # Waves by vector registers on CDNA 2 and 3: 8 up to 64, 7 up to 72, 6 up to 80, 5 up to 96, 4 up to 128, 2 up to 256.
        ("gfx942", 4, 64, 0, 8, "warps"),
        ("gfx942", 4, 65, 0, 7, "registers"),
        ("gfx942", 4, 73, 0, 6, "registers"),
        ("gfx942", 4, 96, 0, 5, "registers"),
        ("gfx942", 4, 128, 0, 4, "registers"),
        ("gfx942", 4, 256, 0, 2, "registers"),
        ("gfx942", 4, 512, 0, 1, "registers"),
        ("gfx942", 4, 32, 16 << 10, 4, "shared memory"),
    ],
)
def test_occupancy(target: str, warps: int, registers: int, shared_bytes: int, blocks: int, limited_by: str) -> None:
    found = occupancy(target, warps, registers, shared_bytes)
    assert (found.blocks, found.limited_by) == (blocks, limited_by)
    most = {"sm_86": 48, "sm_89": 48, "gfx942": 32}.get(target, 64)
    assert found.share == pytest.approx(blocks * warps / most)


def test_devices_have_the_flops_of_their_data_sheets() -> None:
    teraflops = {name: device.flops / 1e12 for name, device in DEVICES.items()}
    sheets = {"A100 80GB SXM": 19.5, "H100 SXM": 66.9, "B200": 75.0, "MI300X": 81.7}
    assert teraflops == pytest.approx(sheets, rel=2e-3)


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.64 R2, desc[UR4][R8.64] ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10] ;
        /*0040*/                   FFMA R4, R4, R5, R6 ;
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/              @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/                   FADD R1, R1, R2 ;
.L_x_3:
        /*0080*/              @!P1 LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0090*/                   NOP;
        /*00a0*/              @P0 BRA `(.L_x_3) ;
        /*00b0*/              @P2 BRA `(.L_x_2) ;
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
"""


def test_loops_of_machine_code() -> None:
    whole = Loop(instructions=5, arithmetic=1, special=1, loaded_bytes=32, masked=False)
    rest = Loop(instructions=2, arithmetic=0, special=0, loaded_bytes=2, masked=True)
    assert parse_loops(SASS) == [whole, rest]
    work = work_per_logit([whole, rest], itemsize=2, streams=2)
    assert work == Work(instructions=5 / 8, arithmetic=1 / 8, special=1 / 8, bytes_under_way=32)


AMD = """
kernel:
	s_load_dwordx2 s[0:1], s[2:3], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[0:3], v4, s[4:7], 0 offen
	global_load_ushort v9, v[5:6], off
	v_pk_fma_f32 v[0:1], v[0:1], v[2:3], v[0:1]
	v_exp_f32_e32 v0, v0
	s_add_i32 s0, s0, 1
	s_cbranch_scc0 .LBB0_1
	s_endpgm
"""


def test_loops_of_amd_assembly() -> None:
    assert hip_loops(AMD) == [Loop(instructions=2, arithmetic=1, special=1, loaded_bytes=18, masked=False)]


USAGE = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Z5scaleIfEvPT_fi:
  REG:10 STACK:0 SHARED:256 LOCAL:0 CONSTANT[0]:368 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Z5scaleIfEvPT_fi:
  REG:12 STACK:16 SHARED:1280 LOCAL:8 CONSTANT[0]:544 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_usage_of_a_fat_binary() -> None:
    found = [(kernel.target, kernel.symbol, kernel.resources) for kernel in parse_usage(USAGE)]
    assert [each[:2] for each in found] == [("sm_80", "_Z5scaleIfEvPT_fi"), ("sm_90", "_Z5scaleIfEvPT_fi")]
    figures = [(each[2].registers, each[2].spilled_bytes, each[2].shared_bytes) for each in found]
    assert figures == [(10, 0, 256), (12, 24, 256)]


ELF = """
Fatbin elf code:
================
arch = sm_90
code version = [1,8]

.nv.info
\t<0x1>
\tAttribute:\tEIATTR_REGCOUNT
\tFormat:\tEIFMT_SVAL
\tValue:\tfunction: _Z5scaleIfEvPT_fi(0x5)\tregister count: 12
.nv.info._Z5scaleIfEvPT_fi
\t<0x1>
\tAttribute:\tEIATTR_CUDA_API_VERSION
\tFormat:\tEIFMT_SVAL
\tValue:\t0x81
\t<0x2>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x80 0x2 0x1
.nv.constant0._Z5scaleIfEvPT_fi
"""


def test_launch_bounds_of_a_fat_binary() -> None:
    assert parse_bounds(ELF) == {("sm_90", "_Z5scaleIfEvPT_fi"): 256}
    assert parse_bounds(ELF.replace("MAX_THREADS", "REGCOUNT")) == {}


def test_dtypes_of_cuda_kernels() -> None:
    names = [
        "void kd::(anonymous namespace)::forward_kernel<double, 3>(Problem)",
        "_Z14forward_kernelIdLi3EEv7Problem",
        "forward_kernel<float, 3>(Problem)",
    ]
    assert [dtype_of(name) for name in [*names, "rest_kernel(Problem)"]] == ["fp64", "fp64", "fp32", ""]


def test_model_takes_the_slowest() -> None:
    device = DEVICES["H100 SXM"]
    work = Work(instructions=10, arithmetic=5, special=1, bytes_under_way=64)
    found = model(device, 8.0, 4.0, work, 1024)
    assert (found.bound, found.time) == ("memory", pytest.approx(12 / 3.35e12))
    found = model(device, 8.0, 4.0, Work(10, 5, 100, 64), 1024)
    assert (found.bound, found.time) == ("special", pytest.approx(100 / (16 * 132 * 1.98e9)))
    found = model(device, 8.0, 4.0, Work(10, 5, 1, 4), 32)
    assert (found.bound, found.time) == ("latency", pytest.approx(8 * LATENCY / (132 * 32 * 4)))


def test_measured_figures_have_a_place(tmp_path: Path) -> None:
    file = tmp_path / "measured.csv"
    assert page.measured(file) == {}
    file.write_text("device,call,dtype,picoseconds\nH100 SXM,divergence JSD,bf16,4.5\n", encoding="utf-8")
    found = page.measured(file)
    row = tables.ModelRow("H100 SXM", "divergence JSD", "bf16", 14.0, 4.18, 4.18, 1.0, "memory")
    assert "| H100 SXM | divergence JSD | bf16 | 4.18 | 4.18 | 1.00 | memory | 4.50 |" in "\n".join(
        page.times([row], found)
    )


def test_tables_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [tables.TrafficRow("divergence JSD", "divergence_forward", "bf16", "logit", 8.0, 0.0024, 30.5, 5.1, 0.0)]
    tables.write(tmp_path / "traffic.csv", rows)
    assert tables.read(tmp_path / "traffic.csv", tables.TrafficRow) == rows
    assert tables.read(tmp_path / "absent.csv", tables.TrafficRow) == []
