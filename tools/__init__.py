"""Tools that neither training nor sampling needs. Run them from the repository's root, as in:
$ python -m tools.plot out-a out-b
"""


def print_table(head, rows, markdown=False):
    """Print a table, plain or as Markdown, with all columns but the first right-aligned."""
    table = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    if markdown:
        table.insert(1, ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])])
    for first, *others in table:
        cells = [first.ljust(widths[0]), *(c.rjust(width) for c, width in zip(others, widths[1:]))]
        print('| ' + ' | '.join(cells) + ' |' if markdown else '  '.join(cells).rstrip())
