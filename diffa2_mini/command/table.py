"""Rows of text in columns, and long lists cut short: what several commands print. Both by hand: no
package that the library needs has them."""

N_LISTED = 10  # entries of a list that are printed


def columns(rows: list[tuple[str, ...]]) -> str:
    """Rows of text in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  " + "  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def listed(what: str, entries: list[str]) -> list[str]:
    """Lines with a count and the first N_LISTED of the entries."""
    more = [f"  and {len(entries) - N_LISTED} more"] if len(entries) > N_LISTED else []
    return [f"{what}: {len(entries)}", *(f"  {entry}" for entry in entries[:N_LISTED]), *more]
