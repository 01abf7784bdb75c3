"""Lines and density of the library, room by room: python tools/measure_code.py [ROOT]

A code line is a physical line on which a token starts that is neither a comment nor part of a docstring. Density is
Python tokens over code lines; a string, f-strings included, is one token. Dense lines are hard to read: keep a room
below 10.5 (kernels and recipes, which are formulas and data, aside).
"""
import argparse
import ast
import io
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

LIMIT, EXEMPT = 10.5, ("kernels", "minixmd/recipes")
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def docstring_lines(tree):
    """Line numbers of every docstring of a module, class or function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            found.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def count(source):
    """(lines, code lines, tokens) of a file's text."""
    inside_docstring = docstring_lines(ast.parse(source))
    code_lines, tokens, open_fstrings = set(), 0, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_START":  # Python 3.12 and later cut an f-string into parts
            tokens += open_fstrings == 0
            open_fstrings += 1
            code_lines.add(token.start[0])
        elif kind == "FSTRING_END":
            open_fstrings -= 1
        elif not open_fstrings and token.type not in SKIPPED and token.start[0] not in inside_docstring:
            tokens += 1
            code_lines.add(token.start[0])
    return len(source.splitlines()), len(code_lines), tokens


def room_of(path):
    """The package that a file of the library belongs to; files beside them are rooms of their own."""
    parts = path.parts
    return "/".join(parts[:2]) if parts[0] == "minixmd" else parts[0]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    root = parser.parse_args(argv).root
    rooms = defaultdict(lambda: [0, 0, 0])
    for folder in ("minixmd", "kernels"):
        for path in sorted((root / folder).rglob("*.py")):
            for i, n in enumerate(count(path.read_text(encoding="utf-8"))):
                rooms[room_of(path.relative_to(root))][i] += n
    print(f"{'room':26}{'lines':>8}{'code':>8}{'tokens':>8}{'tokens a code line':>20}")
    too_dense = []
    for room, (lines, code, tokens) in sorted(rooms.items()):
        print(f"{room:26}{lines:8}{code:8}{tokens:8}{tokens / max(code, 1):20.2f}")
        if tokens > LIMIT * code and room not in EXEMPT:
            too_dense.append(room)
    lines, code, tokens = (sum(column) for column in zip(*rooms.values(), strict=True))
    print(f"{'all':26}{lines:8}{code:8}{tokens:8}{tokens / code:20.2f}")
    if too_dense:
        print(f"denser than {LIMIT}: {', '.join(too_dense)}")
    return int(bool(too_dense))


if __name__ == "__main__":
    sys.exit(main())
