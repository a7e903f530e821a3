"""What tests look for in the text of a compiled program, beside what tools/hlo.py finds."""

import re

from tools.hlo import split_computations


def matmul_types(hlo):
    """{(type of the left operand, of the right one): number of matmuls} of a program."""
    types = dict(re.findall(r'^\s+(?:ROOT )?(%[\w.-]+) = \(?([a-z]+\d*)\[', hlo, re.M))
    matmul = re.compile(r' (?:dot|convolution|custom-call)\((%[\w.-]+), (%[\w.-]+)')
    found = {}
    for line in hlo.splitlines():
        operands = matmul.search(line)
        if operands and (' custom-call(' not in line or '__cublas' in line):
            pair = types.get(operands[1]), types.get(operands[2])
            found[pair] = found.get(pair, 0) + 1
    return found


def stored_shapes(hlo):
    """The shapes, such as bf16[12,1024,768], that a program stores: all results except inside fused
    computations."""
    fused = set(re.findall(r'(?:calls|to_apply)=%([\w.-]+)', hlo))
    results = re.compile(r'\s+(?:ROOT )?%[\w.-]+ = (\(.*?\)|\S+) [\w-]+\(')
    return [shape for name, lines in split_computations(hlo).items() if name not in fused
            for line in lines if (result := results.match(line))
            for shape in re.findall(r'\w+\[[\d,]*\]', result[1])]
