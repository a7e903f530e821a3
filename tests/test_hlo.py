"""The collective operations that tools/hlo.py finds in a compiled program."""

from tools.hlo import collectives

PROGRAM = """
HloModule step
%body (p: f32[2]) -> f32[2] {
  %g = f32[8,4]{1,0} all-gather(%p), replica_groups={{0,1},{2,3}}, dimensions={0}
  %r = (f32[4]{0}, bf16[2]{0}) reduce-scatter(%a, %b), replica_groups=[2,2]<=[4], to_apply=%add
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %w = f32[2]{0} while(%p), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %s = ((f32[2]{0}), (f32[8]{0})) all-gather-start(%w), replica_groups={{0,1,2,3}}, dimensions={0}
  %m = f32[2]{0} all-reduce(%w), replica_groups=mesh['data'=2,'fsdp'=2] {'fsdp'}, to_apply=%add
  %n = f32[2]{0} all-reduce(%w), replica_groups=mesh['a'=4] {'a':(1)2}, to_apply=%add
  ROOT %a = f32[2]{0} all-reduce(%w), replica_groups={}, to_apply=%add
}
"""


def test_collectives_are_counted_in_a_programs_text():
    # (operation, bytes, devices, times, in a loop)
    assert collectives(PROGRAM, 4) == [
        ('all-gather', 128, 2, 3, True), ('reduce-scatter', 2 * (16 + 4), 2, 3, True),
        ('all-gather', 32, 4, 1, False), ('all-reduce', 8, 2, 1, False),
        ('all-reduce', 8, 2, 1, False), ('all-reduce', 8, 4, 1, False)]
