"""Rows of text in columns, and long lists cut short: what several commands print."""

N_LISTED = 10  # entries of a list that are printed


def columns(rows: list[tuple[str, ...]]) -> str:
    """Rows of text in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [[first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
             for first, *others in rows]
    return "\n".join("  " + "  ".join(line) for line in lines)


def listed(what: str, entries: list[str]) -> list[str]:
    """Lines with a count and the first N_LISTED of the entries."""
    more = [f"  and {len(entries) - N_LISTED} more"] if len(entries) > N_LISTED else []
    return [f"{what}: {len(entries)}", *(f"  {entry}" for entry in entries[:N_LISTED]), *more]
