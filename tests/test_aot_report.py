"""Reading machine code, estimating occupancy and telling it in tables: by hand-written input, without a compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pinfer.kernels.compiled.instructions import Mix, amdgcn_mix, parse_amdgcn, parse_sass, sass_mix, wide_share
from pinfer.kernels.compiled.occupancy import LIMITS, occupancy
from pinfer.kernels.report.__main__ import main
from pinfer.kernels.report.tables import differences, markdown, text_table

# Two loops: 0x20-0x80 loads 16 + 8 + 1 bytes in 7 instructions, 0xd0-0xe0 loads 4 bytes.
SASS = """
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA 0xf0 ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!P4 LDG.E.64.CONSTANT R8, desc[UR4][R2.64+0x10] ;
        /*0040*/              @UP1 LDG.E.U8 R9, desc[UR4][R2.64+0x40] ;
        /*0050*/                   FFMA R10, R4, R5, R10 ;
        /*0060*/                   I2FP.F32.S32 R11, R9 ;
        /*0070*/                   HADD2.F32 R12, -RZ, R8.H0_H0 ;
        /*0080*/               @P1 BRA 0x20 ;
        /*0090*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3+0x4000], desc[UR4][R2.64] ;
        /*00a0*/                   LDG.E.LTC128B R14, desc[UR4][R2.64] ;
        /*00b0*/                   LDG.E.U16 R15, desc[UR4][R2.64] ;
        /*00c0*/                   LDGDEPBAR ;
        /*00d0*/                   LDG.E.S16.STRONG.GPU R15, desc[UR4][R2.64] ;
        /*00e0*/              @!P3 BRA 0xd0 ;
        /*00f0*/                   STL.64 [R1+0x8], R4 ;
        /*0100*/                   LDL R4, [R1+0x8] ;
        /*0110*/                   LDS.128 R4, [R3] ;
        /*0120*/                   STS [R3], R4 ;
        /*0130*/                   SHFL.BFLY PT, R3, R2, 0x10, 0x1f ;
        /*0140*/                   REDUX.SUM UR5, R3 ;
        /*0150*/                   REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R3 ;
        /*0160*/                   ATOMS.ADD R3, [R2], R4 ;
        /*0170*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;
        /*0180*/                   IMMA.16832.S8.S8 R4, R8.ROW, R10.COL, R4 ;
        /*0190*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*01a0*/                   POPC R3, R4 ;
        /*01b0*/                   IMAD.MOV.U32 R3, RZ, RZ, R4 ;
        /*01c0*/                   IMAD.SHL.U32 R3, R3, 0x4, RZ ;
        /*01d0*/                   SHF.R.U32.HI R3, RZ, 0x5, R3 ;
        /*01e0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*01f0*/                   FADD R3, R3, R4 ;
        /*0200*/                   FMUL R3, R3, R4 ;
        /*0210*/                   EXIT ;
.L_x_3:
        /*0220*/                   BRA 0x220;
        /*0230*/                   NOP ;
"""
AMDGCN = """
_kernel:                                ; @_kernel
	.loc	1 9 0 prologue_end
	s_load_dwordx4 s[0:3], s[0:1], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	global_load_dwordx4 v[0:3], v8, s[0:1]  ; 16-byte
	buffer_load_ubyte v4, v18, s[40:43], 0 offen
	global_load_short_d16_hi v5, v[6:7], off
	v_fmac_f32_e32 v0, v1, v2
	v_cvt_f32_f16_e32 v3, v4
	s_cbranch_scc1 .LBB0_1
; %bb.2:
	buffer_load_dwordx2 v[4:5], v18, s[40:43], 0 offen
	global_load_dwordx3 v[4:6], v8, s[0:1]
	global_load_lds_dword v[0:1], off
	flat_load_dword v1, v[2:3]
	scratch_store_dwordx4 off, v[0:3], off
	scratch_load_dword v0, off, off
	ds_read_b128 v[0:3], v4
	ds_write_b32 v4, v5
	ds_bpermute_b32 v1, v2, v3
	v_add_f32_dpp v1, v1, v1 row_shr:8
	ds_add_u32 v1, v2
	global_atomic_add_f32 v0, v1, s[0:1]
	v_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]
	v_pk_mul_f32 v[0:1], v[2:3], v[4:5]
	v_bcnt_u32_b32 v1, v2, 0
	v_lshlrev_b32_e32 v1, 2, v2
	s_barrier
	s_nop 0
	global_store_dword v0, v1, s[0:1]
	s_endpgm
	.section	.rodata,"a",@progbits
	.amdhsa_kernel _kernel
	global_load_dwordx4 v[0:3], v8, s[0:1]
"""


def test_sass_widths_families_and_loops() -> None:
    mix = sass_mix(parse_sass(SASS))
    assert mix.load_widths == {1: 1, 2: 2, 4: 1, 8: 1, 16: 2}
    assert wide_share(mix.load_widths) == pytest.approx(32 / (1 + 4 + 4 + 8 + 32))
    assert wide_share(mix.loop_widths) == pytest.approx(16 / (16 + 8 + 1)), "of the loop that loads most"
    assert mix.wide_share == pytest.approx(32 / 49), "the larger of the two"
    assert mix.loop == (7, 25)
    assert mix.per_byte == pytest.approx(7 / 25)
    assert (mix.total, mix.spills) == (35, 2)
    assert mix.families == {
        "add": 1, "async_copy": 1, "atomic": 2, "barrier": 1, "branch": 5, "conversion": 2, "fma": 1,
        "global_load": 6, "global_store": 1, "integer": 2, "local_load": 1, "local_store": 1, "move": 2,
        "mul": 1, "other": 1, "popc": 1, "shared_load": 1, "shared_store": 1, "shuffle": 2, "tensor": 2,
    }  # fmt: skip


def test_amd_widths_families_and_loops() -> None:
    mix = amdgcn_mix(parse_amdgcn(AMDGCN))
    assert mix.load_widths == {1: 1, 2: 1, 4: 2, 8: 1, 12: 1, 16: 1}
    assert wide_share(mix.load_widths) == pytest.approx(16 / (1 + 2 + 8 + 8 + 12 + 16))
    assert mix.wide_share == pytest.approx(16 / 19), "of the loop that loads most"
    assert mix.loop == (6, 19)
    assert (mix.total, mix.spills) == (26, 2)
    assert mix.families == {
        "async_copy": 1, "atomic": 2, "barrier": 1, "branch": 2, "conversion": 1, "fma": 1, "global_load": 6,
        "global_store": 1, "integer": 1, "local_load": 1, "local_store": 1, "move": 1, "mul": 1, "popc": 1,
        "shared_load": 1, "shared_store": 1, "shuffle": 2, "tensor": 1,
    }  # fmt: skip


def test_a_kernel_without_loads_has_no_share_and_without_loops_is_its_own() -> None:
    assert wide_share({}) is None
    assert sass_mix([]).per_byte is None
    straight = parse_sass(SASS)[2:8]
    assert sass_mix(straight).loop == (6, 25)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "ctas", "limited_by"),
    [
        ("sm_80", 32, 0, 8, 8, "warps"),  # 64 warps
        ("sm_80", 64, 0, 8, 4, "registers"),  # 2,048 a warp: 8 warps a partition
        ("sm_80", 65, 0, 8, 3, "registers"),  # given by 256: 2,304 a warp, 7 a partition
        ("sm_80", 255, 0, 8, 1, "registers"),
        ("sm_80", 16, 0, 1, 32, "slots"),
        ("sm_86", 16, 0, 1, 16, "slots"),
        ("sm_89", 16, 0, 1, 24, "slots"),
        ("sm_86", 32, 0, 4, 12, "warps"),
        ("sm_86", 32, 49 * 1024, 4, 2, "shared"),  # 1 KB of each is the system's
        ("sm_86", 32, 50 * 1024, 4, 1, "shared"),
        ("sm_86", 32, 99 * 1024, 4, 1, "shared"),
        ("sm_86", 32, 99 * 1024 + 1, 4, 0, "shared"),
        ("sm_90", 32, 227 * 1024, 4, 1, "shared"),
        ("sm_90", 128, 0, 4, 4, "registers"),
        ("gfx942", 64, 0, 4, 8, "warps"),
        ("gfx942", 65, 0, 4, 7, "registers"),  # given by 8: 72 of 512
        ("gfx942", 512, 0, 4, 1, "registers"),
        ("gfx942", 32, 64 * 1024, 4, 1, "shared"),
    ],
)
def test_occupancy(target: str, registers: int, shared: int, warps: int, ctas: int, limited_by: str) -> None:
    found = occupancy(target, registers, shared, warps)
    assert (found.ctas, found.limited_by) == (ctas, limited_by)
    assert found.share == pytest.approx(ctas * warps / LIMITS[target].warps, abs=1e-4)


def test_every_broken_rule_is_named() -> None:
    pytest.importorskip("triton")
    from pinfer.kernels.compiled.figures import Figures, Row

    def problems(promised: float | None, atomics: bool, figures: Figures | None) -> list[str]:
        return Row(
            "op", "label", "_kernel", "sm_86", 4, 1, promised, atomics, figures, "" if figures else "no"
        ).problems()

    fits, mix = occupancy("sm_86", 32, 0, 4), sass_mix(parse_sass(SASS))
    sound = Figures(32, 0, 0, 0, Mix(10, {"atomic": 1}, {16: 3, 4: 4}), fits)
    assert problems(0.75, True, sound) == []
    assert problems(0.76, False, sound) == [
        "op: label on sm_86: 1 atomic instructions",
        "op: label on sm_86: wide_share 0.750, promised 0.76 (loads: 3 of 16 B, 4 of 4 B)",
    ]
    assert problems(0.5, False, Figures(32, 0, 0, 0, Mix(1, {}), fits)) == [
        "op: label on sm_86: wide_share 0.000, promised 0.5 (loads: none)"
    ]
    assert problems(None, True, Figures(24, 16, 0, 0, mix, fits)) == [
        "op: label on sm_86: 2 spill instructions",
        "op: label on sm_86: 16 bytes of stack a thread",
    ]
    too_large = Figures(32, 0, 102_400, 0, Mix(1, {}), occupancy("sm_86", 32, 102_400, 4))
    assert problems(None, False, too_large) == [
        "op: label on sm_86: no CTA fits an SM (102400 shared bytes of 101376 at most)"
    ]
    assert problems(None, False, None) == ["op: label on sm_86: does not compile: no"]


def row(build: str, target: str, **changes: Any) -> dict[str, Any]:
    return {
        "op": "copy", "build": build, "kernel": "_copy_kernel", "target": target, "num_warps": 4, "registers": 40,
        "stack_bytes": 0, "spill_instructions": 0, "shared_bytes": 0, "wide_share": 1.0, "load_widths": {"16": 8},
        "instructions": {"total": 90, "fma": 3}, "loop_instructions_per_byte": 0.7, "occupancy_ctas": 12,
        "occupancy_share": 1.0, "occupancy_limited_by": "warps", "problems": [], **changes,
    }  # fmt: skip


def test_tables_show_spills_and_errors() -> None:
    spilled = {"spill_instructions": 12, "stack_bytes": 48, "problems": ["copy: b on sm_86: 12 spill instructions"]}
    failed = {k: v for k, v in row("c", "sm_90").items() if k in ("op", "build", "target", "num_warps")}
    failed |= {"error": "CompilationError: no", "problems": ["copy: c on sm_90: does not compile"]}
    rows = [row("a", "sm_86"), row("a", "sm_90"), row("b", "sm_86", **spilled), row("b", "sm_90"), failed]
    text = markdown({"triton": "9", "ptxas": "V1", "targets": ["sm_86", "sm_90"], "rows": rows})
    assert "3 builds for sm_86, sm_90" in text
    assert "- **copy: b on sm_86: 12 spill instructions**" in text
    assert "| copy | 3 | 12 | 40 (sm_86) |" in text
    assert "| a | 4 | 40r 12×4w 100% | 40r 12×4w 100% | 0 | 1.00 | 0.7 | 0/0/0/0/8 | 3 | 0 | 0 | 0 | 90 |" in text
    assert "| b | 4 | **12 spills** 40r 12×4w 100% | 40r" in text
    assert "| c | 4 |  | **does not compile** |" in text
    lines = text_table(rows).splitlines()
    assert len(lines) == 6
    assert "error: CompilationError: no" in lines[5]


def test_differences_are_told_by_figure() -> None:
    old = [row("a", "sm_80"), row("b", "sm_90"), row("gone", "sm_90"), row("same", "sm_90")]
    changed = row("b", "sm_90", registers=48, load_widths={"4": 32}, instructions={"total": 99})
    new = [changed, row("same", "sm_90"), row("added", "sm_90")]
    assert differences(old, new) == [
        "copy: added on sm_90: new",
        "copy: b on sm_90: registers 40 -> 48, 4-byte loads 0 -> 32, total 90 -> 99, 16-byte loads 8 -> 0, fma 3 -> 0",
        "copy: gone on sm_90: gone",
    ]
    assert differences(old, old) == []


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    line = [sys.executable, "-m", "pinfer.kernels.report", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment)


def test_the_command_writes_the_same_twice_and_tells_changes(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    chosen = ("--ops", "tally", "--targets", "sm_90,gfx942", "--workers", "1")
    first = command(*chosen, "-o", str(tmp_path / "first"))
    assert first.returncode == 0, first.stderr[-2000:]
    old = tmp_path / "first" / "report.json"
    report = json.loads(old.read_text())
    assert [name["target"] for name in report["rows"][:2]] == ["sm_90", "gfx942"]
    report["rows"][0]["registers"] += 1
    (tmp_path / "old.json").write_text(json.dumps(report))
    second = command(*chosen, "-o", str(tmp_path / "second"), "--diff", str(tmp_path / "old.json"))
    registers = report["rows"][0]["registers"]
    assert f"on sm_90: registers {registers} -> {registers - 1}\n" in second.stdout
    for name in ("report.json", "report.md"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_the_command_refuses_what_it_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    assert main(["--ops", "tally", "-o", str(tmp_path / "none")]) == 2  # the tests run in the interpreter
    said = capsys.readouterr()
    assert "TRITON_INTERPRET is set" in said.err
    assert said.out == ""
    for wrong in (["--targets", "sm_10"], ["--ops", "tally,talley"], ["--ops", ","]):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        assert stopped.value.code == 2
    assert "sm_10 is none of sm_80" in capsys.readouterr().err
    (tmp_path / "old.json").write_text("[]")
    monkeypatch.delenv("TRITON_INTERPRET")
    for path in ("old.json", "absent.json"):
        assert main(["--diff", str(tmp_path / path)]) == 2
        assert "is not a report.json" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
