"""What a compiled program sends between devices, and its cycles on a TPU, from its HLO as text."""

import math
import re
from collections import Counter

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4,
         's64': 8, 'u64': 8, 'f64': 8}
COLLECTIVE = re.compile(r'\s+(?:ROOT )?(%?[\w.-]+) = (.*?) (all-reduce|all-gather|reduce-scatter|'
                        r'all-to-all|collective-permute|collective-broadcast)(-start)?\(')


def collectives(hlo, n_devices):
    """[(operation, bytes, devices, count, in_loop)] for each collective operation of a program.

    hlo: the text of a program compiled for n_devices. bytes: size of the full array. devices: size
    of the group that exchanges it. count: how often it runs; a loop of unknown length counts once.
    """
    found, chains = [], set()
    for line, count, in_loop, fused in instructions(hlo):
        if not (op := COLLECTIVE.match(line)):
            continue
        # on a TPU an operation has a line in each of the fusions that run beside it
        if chain := re.search(r'chain_id="(\d+)"', line):
            if (op[3], chain[1]) in chains:
                continue
            chains.add((op[3], chain[1]))
        devices = group_size(line, n_devices)
        found.append((kind(op, hlo, fused), array_bytes(op, devices), devices, count, in_loop))
    return found


def sent_bytes(operation, n_bytes, devices):
    """Bytes that each device sends in a collective operation, by the ring algorithm."""
    return (2 if operation == 'all-reduce' else 1) * n_bytes * (devices - 1) / devices


def kind(op, hlo, fused):
    """The operation of a match of COLLECTIVE.

    A TPU fuses an all-reduce and the slice that the device keeps into a reduce-scatter.
    """
    is_part = fused and re.search(rf' dynamic-slice\({re.escape(op[1])}, ', hlo)
    return 'reduce-scatter' if op[3] == 'all-reduce' and is_part else op[3]


def estimated_cycles(hlo):
    """{op_name: clock cycles} of a program compiled for a TPU, as its compiler estimates them.

    op_name: JAX's name of the operation, with its named scopes; '' if it has none. Pallas kernels
    and copies that run beside other work do not count. A loop of unknown length counts once.
    """
    cycles = Counter()
    for line, count, _, fused in instructions(hlo):
        # a fusion has an estimate as a whole; a number of 64 bits means unknown
        if not fused and (estimate := re.search(r'"estimated_cycles":"(\d{1,17})"', line)):
            name = re.search(r'op_name="([^"]*)"', line)
            cycles[name[1] if name else ''] += count * int(estimate[1])
    return cycles


def cycles_by_part(hlo):
    """{part: estimated cycles}, largest first. The parts: named scopes of the model, and others."""
    parts = Counter()
    for name, cycles in estimated_cycles(hlo).items():
        scope = re.search(r'\b(attn|mlp|head|optimizer)\b', name)
        parts[scope[1] if scope else 'other' if name else 'without a name'] += cycles
    return dict(parts.most_common())


def custom_calls(hlo, target):
    """How often a program calls kernels other than XLA's. target: how their name begins."""
    return sum(count for line, count, _, _ in instructions(hlo)
               if f'custom_call_target="{target}' in line)


def instructions(hlo):
    """Yield (line, count, in_loop, fused) for each instruction that a program runs.

    count: how often it runs. fused: whether it is part of a fused operation.
    """
    computations = split_computations(hlo)

    def visit(name, count, in_loop, fused):
        for line in computations.get(name, ()):
            yield line, count, in_loop, fused
            if loop := re.search(r'\bbody=%?([\w.-]+)', line):
                yield from visit(loop[1], count * trip_count(line, computations), True, fused)
            is_fusion = re.search(r'[)}\]] fusion\(', line) is not None
            for called in re.findall(r'\b(?:calls|to_apply)=%?([\w.-]+)', line):
                yield from visit(called, count, in_loop, fused or is_fusion)

    yield from visit(re.search(r'^ENTRY %?([\w.-]+)', hlo, re.M)[1], 1, False, False)


def trip_count(line, computations):
    """How often a while instruction runs its body; 1 if unknown."""
    if trips := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(trips[1])
    # a TPU's compiler notes no count, but a scan counts from 0 to the condition's only constant
    condition = computations.get(re.search(r'condition=%?([\w.-]+)', line)[1], ())
    limits = re.findall(r' s32\[\]\S* constant\((\d+)\)', '\n'.join(condition))
    return int(limits[0]) if len(limits) == 1 and 'direction=LT' in ''.join(condition) else 1


def split_computations(hlo):
    """{name of a computation: its lines}."""
    computations, name = {}, None
    for line in hlo.splitlines():
        if line and not line[0].isspace() and line.endswith('{'):
            name = re.match(r'(?:ENTRY )?%?([\w.-]+)', line)[1]
            computations[name] = []
        elif name:
            computations[name].append(line)
    return computations


def group_size(line, n_devices):
    """Number of devices in each group of a collective operation; all if it names no groups."""
    # three notations: {{0,1},{2,3}}, [groups,size]<=..., and mesh['data'=2,'fsdp'=4] {'fsdp'}
    if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', line):
        return len(listed[1].split(','))
    if counted := re.search(r'replica_groups=\[\d+,(\d+)\]', line):
        return int(counted[1])
    if named := re.search(r'replica_groups=mesh\[(.*?)\] *\{(.*?)\}', line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])  # an axis, or a part of one
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return n_devices


def array_bytes(op, devices):
    """Size of the full array of a collective operation; op: a match of COLLECTIVE."""
    n_bytes = sum(BYTES[dtype] * math.prod(int(n) for n in shape.split(',') if n)
                  for dtype, shape in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', op[2])
                  if op[3] != 'collective-permute' or shape)  # its type has counters, too
    if op[4] and op[3] in ('all-gather', 'reduce-scatter'):  # its type has both shard and array
        return n_bytes * devices // (devices + 1)
    # these types list what is sent and what is received; a GPU's all-reduce as a tuple in a tuple
    if op[4] and (op[3] == 'collective-permute' or op[3] == 'all-reduce' and op[2][:2] == '(('):
        return n_bytes // 2
    return n_bytes * devices if op[3] == 'reduce-scatter' else n_bytes
