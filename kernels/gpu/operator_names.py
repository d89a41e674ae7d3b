"""Names under which custom operators are registered."""

import re


def operator_namespace(prefix: str, module: str) -> str:
    """A namespace for the operators of one copy of a file, in plain ASCII, which is all that torch can read.

    The file may be loaded several times in a process (package, Hub folders, revisions): each copy registers under the
    name of its module. Letters beyond ASCII, as folders may have them, are spelt as their code points.

    Args:
        prefix: says whose operators these are.
        module: `__name__` of the file.
    """
    ascii_only = "".join(letter if letter.isascii() else f"u{ord(letter):x}_" for letter in module)
    return f"{prefix}_{re.sub(r'[^0-9A-Za-z_]', '_', ascii_only)}"


__all__ = ["operator_namespace"]
