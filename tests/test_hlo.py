"""What tools/hlo.py finds in a compiled program: collective operations, cycles on a TPU."""

from tools.hlo import collectives, estimated_cycles

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


# shortened from a training step compiled for a v5e: a scan of three micro-steps, whose count only
# the condition has; a loop that ends where an argument says; a fusion with an estimate inside
TPU_PROGRAM = """
HloModule jit_train_step, is_scheduled=true
%fused_computation.1 (p: f32[8]) -> f32[8] {
  ROOT %m = f32[8]{0:T(128)} multiply(%p, %p), backend_config={"estimated_cycles":"999"}
}
%scan_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f.1 = bf16[8]{0:T(8)(2,1)S(1)} fusion(%x), kind=kLoop, calls=%fused_computation.1, \
metadata={op_name="jit(step)/while/body/mlp/mul" stack_frame_id=4}, \
backend_config={"window_config":{"estimated_cycles":"100","iteration_bounds":["1"]}}
  %f.2 = bf16[8]{0:T(8)(2,1)} fusion(%x), kind=kLoop, calls=%fused_computation.1, \
metadata={op_name="jit(step)/while/body/mlp/mul"}, backend_config={"estimated_cycles":"10"}
  %k = bf16[8]{0} custom-call(%f.2), custom_call_target="tpu_custom_call"
}
%scan_condition (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={op_name="jit(step)/lt"}
}
%loop_body (p: (s32[], s32[])) -> (s32[], s32[]) {
  %c = s32[]{:T(128)} copy(%i), backend_config={"estimated_cycles":"7"}
}
%loop_condition (p: (s32[], s32[])) -> pred[] {
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %stop), direction=LT
}
ENTRY %main.9 (p: f32[8]) -> f32[8] {
  %w = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%t), condition=%scan_condition, body=%scan_body
  %v = (s32[]{:T(128)}, s32[]) while(%u), condition=%loop_condition, body=%loop_body
  ROOT %a = f32[8]{0:T(128)} add(%w, %w), metadata={op_name="jit(step)/add"}, \
backend_config={"estimated_cycles":"1000"}
}
"""


def test_cycles_on_a_tpu_are_counted_by_name_and_as_often_as_they_run():
    assert estimated_cycles(TPU_PROGRAM) == {
        'jit(step)/while/body/mlp/mul': 3 * (100 + 10), '': 7, 'jit(step)/add': 1000}
    # a GPU's and a CPU's compiler writes the count beside the loop
    counted = TPU_PROGRAM.replace('body=%loop_body', 'body=%loop_body, backend_config='
                                  '{"known_trip_count":{"n":"5"}}')
    assert estimated_cycles(counted)[''] == 5 * 7
