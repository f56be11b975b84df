"""Collectives of a compiled program: counted once per run, by the bytes a chip receives; the generated tables."""

import json
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import hlo
import scale_table

# Six layers, each with a ring of two permutes in 8/2 iterations, an all-gather overlapped with it, and a
# reduce-scatter.
_PROGRAM = """HloModule step

%ring_cond (a: (u32[], f32[4])) -> pred[] {
  %bound = u32[] constant(8)
  %a = (u32[], f32[4]) parameter(0)
  %i = u32[] get-tuple-element(%a), index=0
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%piece (p: f32[4]) -> f32[16] {
  %gather.2 = f32[16]{0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=4] {'a'}, dimensions={0}
  ROOT %done = f32[16] custom-call(%gather.2), custom_call_target="AsyncCollectiveDone"
}

%ring (b: (u32[], f32[4])) -> (u32[], f32[4]) {
  %b = (u32[], f32[4]) parameter(0)
  %one = u32[] constant(1)
  %i = u32[] get-tuple-element(%b), index=0
  %x = f32[4] get-tuple-element(%b), index=1
  %p1 = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1}}
  %p2 = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=2, source_target_pairs={{1,0}}
  %f = f32[16] fusion(%x), kind=kCustom, calls=%piece
  %next = u32[] add(%i, %one)
  %after = u32[] add(%next, %one), sharding={replicated
}, metadata={op_name="a brace at the beginning of a line"}
  ROOT %t = (u32[], f32[4]) tuple(%after, %x)
}

%start (p: f32[4]) -> f32[16] {
  %gather.1 = f32[16]{0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=4] {'a'}, dimensions={0}
  ROOT %started = f32[16] custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%all-reduce-scatter (p: f32[16]) -> f32[4] {
  %sum = f32[16]{0} all-reduce(%p), channel_id=8, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %slice = f32[4] dynamic-slice(%sum), dynamic_slice_sizes={4}
}

%layer_cond (c: (s32[])) -> pred[] {
  %layers = s32[] constant(6)
  %c = (s32[]) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%j, %layers), direction=LT
}

%layer (d: (s32[])) -> (s32[]) {
  %d = (s32[]) parameter(0)
  %j = s32[] get-tuple-element(%d), index=0
  %s = f32[16] fusion(%d), kind=kCustom, calls=%start
  %w = (u32[], f32[4]) while(%s), condition=%ring_cond, body=%ring
  %r = f32[4] fusion(%w), kind=kCustom, calls=%all-reduce-scatter
  %one = s32[] constant(1)
  %k = s32[] add(%j, %one)
  ROOT %t = (s32[]) tuple(%k)
}

ENTRY %main (e: (s32[])) -> (s32[]) {
  %e = (s32[]) parameter(0)
  %norm = f32[]{:T(128)} all-reduce(%e), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %w = (s32[]) while(%e), condition=%layer_cond, body=%layer
}
"""


def test_collectives_are_multiplied_by_trip_counts():
    assert hlo.collectives(_PROGRAM) == {
        "all-gather": {"count": 6, "bytes": 6 * 64 * 3 / 4},
        "collective-permute": {"count": 6 * 4 * 2, "bytes": 6 * 4 * 2 * 16},
        "reduce-scatter": {"count": 6, "bytes": 6 * 64 * 3 / 4},
        "all-reduce": {"count": 1, "bytes": 2 * 4 * 3 / 4},
    }


def test_collectives_that_share_a_channel_are_counted_separately():
    program = """HloModule step

ENTRY %main (e: bf16[8,4]) -> f32[8,2] {
  %e = bf16[8,4]{1,0} parameter(0)
  %whole = bf16[8,8]{1,0} all-gather(%e), channel_id=1, replica_groups={{0,1}}, dimensions={1}
  %part = f32[8,2]{1,0} reduce-scatter(%whole), channel_id=1, replica_groups={{0,1}}, dimensions={1}, to_apply=%add
  ROOT %sum = f32[8,2]{1,0} all-reduce(%part), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}
"""
    counts = {kind: v["count"] for kind, v in hlo.collectives(program).items()}
    assert counts == {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 1}


def test_collectives_of_equal_type_and_channel_are_counted_separately():
    """`shard_map` gives all its collectives one channel: here two kernels of one shape, each there and back."""
    line = "  %a{} = bf16[16,4]{{1,0}} all-to-all(%a{}), channel_id=1, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}"
    lines = [line.format(i + 1, i) for i in range(4)]
    program = "\n".join(["ENTRY %main (a0: bf16[16,4]) -> bf16[16,4] {", *lines, "}"])
    assert hlo.collectives(program) == {"all-to-all": {"count": 4, "bytes": 4 * 2 * 16 * 4 * 3 / 4}}


def test_an_asynchronous_all_to_all_counts_its_results_alone():
    program = """ENTRY %main (x: bf16[16,4]) -> bf16[16,4] {
  %x = bf16[16,4]{1,0} parameter(0)
  %start = ((bf16[16,4]{1,0}), bf16[16,4]{1,0}) all-to-all-start(%x), channel_id=1, replica_groups={{0,1,2,3}}
  ROOT %done = bf16[16,4]{1,0} all-to-all-done(%start)
}"""
    assert hlo.collectives(program) == {"all-to-all": {"count": 1, "bytes": 2 * 16 * 4 * 3 / 4}}


def test_the_tables_in_the_docs_match_the_results(tmp_path, monkeypatch):
    copy = tmp_path / "scale.md"
    copy.write_text((ROOT / "docs" / "scale.md").read_text())
    monkeypatch.setattr(scale_table, "DOC", str(copy))
    scale_table.main(["--rows=0"])
    assert copy.read_text() == (ROOT / "docs" / "scale.md").read_text()
    for row in json.loads((ROOT / "scripts" / "bench" / "results" / "scale.json").read_text()):
        assert row["mesh"]["data"] * row["mesh"]["fsdp"] * row["mesh"]["tensor"] == row["chips"]
