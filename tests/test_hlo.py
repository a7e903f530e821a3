"""What tools/hlo.py finds in a compiled program: collective operations, cycles on a TPU."""

from tools.hlo import collectives, cycles_by_part, estimated_cycles

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


# shortened from a training step for a v5e: a scan of three micro-steps, with its count in the
# condition; a loop that ends where an argument says; a fusion with an estimate inside
TPU_PROGRAM = """
HloModule jit_train_step, is_scheduled=true
%fused_computation.1 (p: f32[8]) -> f32[8] {
  ROOT %m = f32[8]{0:T(128)} multiply(%p, %p), backend_config={"estimated_cycles":"999"}
}
%scan_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f.1 = bf16[8]{0:T(8)(2,1)S(1)} fusion(%x), kind=kLoop, calls=%fused_computation.1, \
metadata={op_name="jit(step)/while/body/transpose(jvp(mlp))/mul" stack_frame_id=4}, \
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
  %b = f32[8]{0:T(128)} add(%w, %w), metadata={op_name="jit(step)/attn/copy"}, \
backend_config={"estimated_cycles":"18446744073709551615"}
  ROOT %a = f32[8]{0:T(128)} add(%w, %w), metadata={op_name="jit(step)/add"}, \
backend_config={"estimated_cycles":"1000"}
}
"""


def test_cycles_on_a_tpu_are_counted_by_name_and_part_and_as_often_as_they_run():
    assert estimated_cycles(TPU_PROGRAM) == {
        'jit(step)/while/body/transpose(jvp(mlp))/mul': 3 * 100,
        'jit(step)/while/body/mlp/mul': 3 * 10, '': 7, 'jit(step)/add': 1000}
    assert [*cycles_by_part(TPU_PROGRAM).items()] == [
        ('other', 1000), ('mlp', 330), ('without a name', 7)]
    # a GPU's and a CPU's compiler writes the count beside the loop
    counted = TPU_PROGRAM.replace('body=%loop_body', 'body=%loop_body, backend_config='
                                  '{"known_trip_count":{"n":"5"}}')
    assert estimated_cycles(counted)[''] == 5 * 7


# shortened from a step for eight v5e: a gather that runs beside two fusions and has a line in each,
# a reduce-scatter fused from an all-reduce and a slice, a permute with its counters
TPU_COLLECTIVES = """
HloModule jit_train_step, is_scheduled=true
%start (p: bf16[32,256]) -> bf16[256,256] {
  %all-gather.1 = bf16[256,256]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, \
replica_groups=mesh['data'=1,'fsdp'=8] {'fsdp'}, frontend_attributes={chain_id="0"}
}
%beside (p: bf16[32,256]) -> bf16[256,256] {
  %all-gather.2 = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=1, \
replica_groups=mesh['data'=1,'fsdp'=8] {'fsdp'}, frontend_attributes={chain_id="0"}
}
%other (p: bf16[32,256]) -> bf16[256,256] {
  %all-gather.3 = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=1, \
replica_groups=mesh['data'=1,'fsdp'=8] {'fsdp'}, frontend_attributes={chain_id="1"}
}
%all-reduce-scatter (input: f32[64,16]) -> f32[8,16] {
  %all-reduce.18 = f32[64,16]{1,0:T(8,128)} all-reduce(%pad.1), channel_id=23, \
replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add, backend_config={"flag_configs":[]}
  ROOT %dynamic-slice.1 = f32[8,16]{1,0:T(8,128)S(1)} dynamic-slice(%all-reduce.18, %m, %zero)
}
ENTRY %main.9 (p: f32[8]) -> f32[8] {
  %s = bf16[256,256]{1,0} fusion(%p), kind=kCustom, calls=%start
  %b = bf16[256,256]{1,0} fusion(%p), kind=kOutput, calls=%beside
  %o = bf16[256,256]{1,0} fusion(%p), kind=kOutput, calls=%other
  %fusion = f32[8,16]{1,0:T(8,128)S(1)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter
  %c = (f32[4,8]{1,0:T(8,128)S(1)}, f32[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%slice.123), channel_id=1, source_target_pairs={{0,1},{1,2}}
  %all-reduce.20 = f32[64,16]{1,0:T(8,128)} all-reduce(%p), replica_groups={}, to_apply=%add
  ROOT %sliced = f32[8,16]{1,0} dynamic-slice(%all-reduce.20, %m, %zero)
}
"""


def test_a_tpus_collectives_are_counted_once_and_by_what_they_send():
    assert collectives(TPU_COLLECTIVES, 8) == [
        ('all-gather', 2 * 256 * 256, 8, 1, False), ('all-gather', 2 * 256 * 256, 8, 1, False),
        ('reduce-scatter', 4 * 64 * 16, 8, 1, False), ('collective-permute', 4 * 32, 8, 1, False),
        ('all-reduce', 4 * 64 * 16, 8, 1, False)]  # not fused with its slice


def test_the_input_of_a_gpus_all_reduce_is_not_counted():
    program = """
ENTRY %main.9 (p: f32[8]) -> f32[8] {
  %all-reduce-start = ((f32[64]{0}, f32[8]{0}), f32[64]{0}, f32[8]{0}) all-reduce-start(%p, %q), \
channel_id=1, replica_groups=mesh['data'=8,'fsdp'=1] {'data'}, to_apply=%add
  %other = (f32[64]{0}, f32[8]{0}) all-reduce-start(%p, %q), replica_groups={}, to_apply=%add
}
"""
    assert collectives(program, 8) == 2 * [('all-reduce', 4 * 72, 8, 1, False)]
