"""Checks how flow2api.py reads: its size, its chapters and what each uses, and some tidiness.

    python .ci/house.py [FILE]

Prints every figure beside its bound, then a sentence for each violation; exits 1 if there is one.
"""

import ast
import bisect
import io
import itertools
import re
import sys
import tokenize
from pathlib import Path

BOUNDS = {
    "nodes": 48850,  # syntax nodes of the file; the design wants 40,000
    "density": 10.0,  # syntax nodes per line of code
    "lines": 7075,  # the design wants 4,900
    "function_lines": 45,  # of the longest function
    "function_nodes": 250,  # of the largest function
    "over90": 60,  # lines wider than 90 columns
    "widest": 100,  # columns
}
COUNTS = {"a vague name": 12, "`a, b = x, y`": 45, "`|=`": 12}  # in the whole file
VAGUE = {"known", "given", "found", "shown", "words", "wanted", "made"}
SILENT = {"pass", "continue", "..."}  # what an except may not only do
PYTHON_FILES = {"flow2api.py", "test_flow2api.py", "bench_flow2api.py"}
TEST_LINES = 7690  # the design wants 5,000

# What a chapter may use beside itself and what stands above the first banner. Beyond section 3 of
# the design go: 1 in 3, 9, 10 and 11 (settings); 2 in 4 and 11 (errors); 3 in 4 (a job holds its
# plan) and 11 (the ids of models); 4 in 10 and 11 (records); 5 and 6 in 11 (Gateway joins the
# parts; files pass through).
CHAPTERS = {
    1: ("Settings", set()),
    2: ("Errors", set()),
    3: ("Catalogue", {1, 2}),
    4: ("Records and store", {1, 2, 3}),
    5: ("Network", {1, 2}),
    6: ("Upstream", {1, 2, 3, 4, 5}),
    7: ("Pool", {1, 2, 3, 4, 6}),
    8: ("Media", {1, 2, 5}),
    9: ("Jobs", {1, 2, 3, 4, 5, 6, 7, 8}),
    10: ("Reading requests", {1, 2, 3, 4, 5, 8}),
    11: ("Client API", {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}),
    12: ("Admin API", {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}),
    13: ("Simulated Flow", {4}),
    14: ("Main", {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13}),
}
BANNER = re.compile(r"# ---- (\d+)\. (\S.*?) -{3,}")  # "# ---- 4. Records and store ------"
RULE = re.compile(r"\s*#\s*(---|===|###|\*\*\*)")  # a comment that could be taken for a banner
CONTENTS = re.compile(r" +(\d+)  (\S.*?) {2,}\S.*")  # "     4  Records and store    what it owns"

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def span(node):
    return range(node.lineno, node.end_lineno + 1)


def measure(text, tree):
    """The figures of a file, and its functions as (lines, nodes, line, name)."""
    rows = text.splitlines()
    nodes = list(ast.walk(tree))
    code = set()  # lines with a token that is neither comment nor docstring
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT and token.type != tokenize.ENDMARKER:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in nodes:
        documented = isinstance(node, ast.Module | ast.ClassDef | FUNCTIONS)
        if documented and ast.get_docstring(node, clean=False) is not None:
            code.difference_update(span(node.body[0]))
    functions = [node for node in nodes if isinstance(node, FUNCTIONS)]
    functions = [(len(span(f)), len(list(ast.walk(f))), f.lineno, f.name) for f in functions]
    heights = sorted(lines for lines, *_ in functions) or [0]
    figures = {
        "lines": len(rows),
        "code": len(code),
        "nodes": len(nodes),
        "density": round(len(nodes) / max(1, len(code)), 2),
        "functions": len(functions),
        "median": heights[len(heights) // 2],
        "function_lines": heights[-1],
        "function_nodes": max((nodes for _, nodes, *_ in functions), default=0),
        "over90": sum(len(row) > 90 for row in rows),
        "widest": max(map(len, rows), default=0),
    }
    return figures, functions


def check_bounds(text, tree):
    figures, functions = measure(text, tree)
    for name, figure in figures.items():
        print(f"{name:15} {figure:>8}" + (f"  of {BOUNDS[name]:g}" if name in BOUNDS else ""))
        if figure > BOUNDS.get(name, figure) and not name.startswith("function_"):
            yield 1, f"{name} is {figure}, over {BOUNDS[name]:g}."
    for column, what in enumerate(("lines", "nodes")):
        longest = sorted(functions, key=lambda function: -function[column])
        most = BOUNDS[f"function_{what}"]
        print(f"most {what}:", ", ".join(f"{f[3]} {f[column]}" for f in longest[:5]))
        for function in longest:
            if function[column] > most:
                yield function[2], f"{function[3]} has {function[column]} {what}, over {most}."


def check_headings(place, headings):
    """Compares [(line, number, title)] with the table of chapters."""
    table = [(number, title) for number, (title, _) in CHAPTERS.items()]
    listed = [(number, title) for _, number, title in headings]
    for number, title in table:
        if (number, title) not in listed:
            yield 1, f"Chapter {number}, {title}, is missing in the {place}."
    for line, number, title in headings:
        if (number, title) not in table:
            yield line, f"{number}, {title}, of the {place} is no chapter of house.py."
    if listed != table and set(listed) == set(table):
        yield headings[0][0], f"The {place} has the chapters out of order, or one twice."


def binds(node):
    """The name that this one node binds, or None."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.ExceptHandler(name=name):
            return name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.MatchAs(name=name) | ast.MatchStar(name=name) | ast.MatchMapping(rest=name):
            return name
        case ast.alias():
            return (node.asname or node.name).split(".")[0]
    return None


def bound(nodes):
    """The names bound by these nodes in their own scope, not in a scope inside it."""
    names, todo = set(), list(nodes)
    while todo:
        node = todo.pop()
        names.add(binds(node))
        if isinstance(node, ast.comprehension):
            todo += [node.iter, *node.ifs]
        elif not isinstance(node, FUNCTIONS | ast.ClassDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return names - {None}


def local(node):
    """The names that hide those of the module inside a function or comprehension."""
    if isinstance(node, COMPREHENSIONS):
        return bound(part.target for part in node.generators)
    if isinstance(node, ast.Lambda):
        return bound([node.args, node.body])
    if isinstance(node, FUNCTIONS):
        declared = [part.names for part in ast.walk(node) if isinstance(part, ast.Global)]
        return bound([node.args, *node.body]).difference(*declared)
    return set()


def reads(node, hidden=frozenset()):
    """(line, name) of what this code reads from the module; annotations are never run."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in hidden:
        yield node.lineno, node.id
    inside = hidden | local(node)
    for field, value in ast.iter_fields(node):
        names = hidden if field in ("args", "decorator_list") else inside  # defaults run outside
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and field not in ("annotation", "returns"):
                yield from reads(child, names)


def check_uses(tree, banners):
    """A chapter reads no name of a chapter that it may not use."""
    starts = [line for line, _, _ in banners]
    numbers = [0] + [number for _, number, _ in banners]
    statements = [(numbers[bisect.bisect(starts, node.lineno)], node) for node in tree.body]
    homes = {}  # name: the chapters that define it
    for chapter, node in statements:
        for name in bound([node]):
            homes.setdefault(name, set()).add(chapter)
    for chapter, node in statements:
        _, allowed = CHAPTERS.get(chapter, ("", set()))
        place = f"Chapter {chapter}" if chapter else "What stands above the first banner"
        for line, name in sorted(set(reads(node))):
            if name in homes and not homes[name] & {0, chapter, *allowed}:
                yield line, f"{place} may not use {name}, of chapter {min(homes[name])}."


def read_headings(pattern, rows):
    """[(line, number, title)] of the rows that match."""
    matches = [(line, pattern.fullmatch(row)) for line, row in rows]
    return [(line, int(match[1]), match[2]) for line, match in matches if match]


def check_chapters(text, tree):
    rows = list(enumerate(text.splitlines(), 1))
    ruled = [(line, row) for line, row in rows if RULE.match(row)]
    for line, row in ruled:
        if not BANNER.fullmatch(row) or len(row) != len(ruled[0][1]):
            yield line, "This is not like the first banner or # ---- 4. Records and store ------"
    opening = rows[: tree.body[0].end_lineno] if ast.get_docstring(tree) else []
    contents = read_headings(CONTENTS, opening)
    banners = read_headings(BANNER, ruled)
    yield from check_headings("table of contents", contents)
    yield from check_headings("file's banners", banners)
    yield from check_uses(tree, banners)


def check_folder(path):
    for other in sorted(path.parent.glob("*.py")):
        if other.name not in PYTHON_FILES | {path.name}:
            yield 1, f"{other.name} is a second Python file of the product."
    tests = path.with_name("test_flow2api.py")
    lines = len(tests.read_text("utf-8").splitlines()) if tests.exists() else 0
    if lines > TEST_LINES:
        yield 1, f"{tests.name} has {lines} lines, over {TEST_LINES}."


def check_tidy(text, tree):
    counted = {what: [] for what in COUNTS}
    for line, row in enumerate(text.splitlines(), 1):
        if mark := re.search(r"\b(TODO|FIXME|XXX)\b", row):
            yield line, f"{mark[0]} is left."
    for node in ast.walk(tree):
        if binds(node) in VAGUE:
            counted["a vague name"].append(node.lineno)
        match node:
            case ast.ClassDef() if node in tree.body and not ast.get_docstring(node):
                yield node.lineno, f"Class {node.name} has no docstring."
            case ast.ExceptHandler() if {ast.unparse(part) for part in node.body} <= SILENT:
                yield node.lineno, "This except does nothing about the error."
            case ast.Assign(targets=[*_, ast.Tuple()], value=ast.Tuple()):
                counted["`a, b = x, y`"].append(node.lineno)
            case ast.AugAssign(op=ast.BitOr()):
                counted["`|=`"].append(node.lineno)
    for what, lines in counted.items():
        if len(lines) > COUNTS[what]:
            places = ", ".join(map(str, sorted(lines)))
            yield min(lines), f"{len(lines)} times {what}, over {COUNTS[what]}: lines {places}."


def main():
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "flow2api.py")
    text = path.read_text("utf-8")
    tree = ast.parse(text)
    checks = [check_bounds(text, tree), check_chapters(text, tree)]
    checks += [check_tidy(text, tree), check_folder(path)]
    violations = sorted(itertools.chain(*checks), key=lambda violation: violation[0])
    for line, sentence in violations:
        print(f"{path}:{line}: {sentence}")
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
