"""The scripts share no module: what has the same name in two of them is the same in both."""

import ast
import itertools

import pytest
from helpers import ROOT

SCRIPTS = ('tf_retrain.py', 'retrain_serving.py', 'tf_test.py')


def list_names(node):
    """Returns the names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return []
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    inner = itertools.chain.from_iterable(map(ast.walk, targets))
    names = (node for node in inner if isinstance(node, ast.Name))
    return [name.id for name in names if isinstance(name.ctx, ast.Store)]


def definitions(source):
    """Returns {name: lines} of a script's functions, classes and constants.

    The lines have decorators and comments.
    """
    found, lines = {}, source.splitlines()
    for node in ast.parse(source).body:
        parts = node, *getattr(node, 'decorator_list', [])
        first = min(part.lineno for part in parts)
        for name in list_names(node):  # a second definition counts too
            found.setdefault(name, []).extend(lines[first - 1 : node.end_lineno])
    return found


def differing(first, second):
    """Returns the names that two scripts define in different ways."""
    first, second = definitions(first), definitions(second)
    return [name for name in first if second.get(name, first[name]) != first[name]]


SOURCE = '''A = 1  # one
B, C = 2, 3
D: int = 4

@cache
def f(x):
    """Doc."""
    # Why.
    return x
'''


@pytest.mark.parametrize(
    ('old', 'new', 'names'),
    [
        ('cache', 'other', ['f']),
        ('Why', 'Because', ['f']),
        ('Doc', 'Text', ['f']),
        ('A = 1', 'A = 2', ['A']),
        ('# one', '# a', ['A']),
        ('int = 4', 'int = 5', ['D']),
        ('2, 3', '2, 4', ['B', 'C']),
        ('@cache', 'E = 1\n\n@cache', []),
        ('@cache', 'A = 2\n\n@cache', ['A']),
    ],
)
def test_what_counts_as_different(old, new, names):
    assert list(definitions(SOURCE)) == ['A', 'B', 'C', 'D', 'f']
    assert differing(SOURCE, SOURCE) == []
    assert differing(SOURCE, SOURCE.replace(old, new)) == names


@pytest.mark.parametrize(('first', 'second'), list(itertools.combinations(SCRIPTS, 2)))
def test_what_has_the_same_name_is_the_same(first, second):
    assert differing((ROOT / first).read_text(), (ROOT / second).read_text()) == []


def test_retrain_serving_is_tf_retrain_and_one_section():
    """Its own are the docstring, flags, and the section at its end.

    The flags come before TensorFlow is imported.
    """
    first, second = ((ROOT / name).read_text().split('"""', 2)[2] for name in SCRIPTS[:2])
    before, flags_mark, rest = second.partition('def create_serving_parser()')
    _, process_mark, rest = rest.partition('# Process\n')
    rest, section_mark, section = rest.partition('# SavedModel\n')
    assert flags_mark and process_mark and section_mark
    own = {'create_serving_parser', *definitions(section)}
    assert own == set(definitions(second)) - set(definitions(first))
    rest = rest.replace('parse_flags(create_serving_parser())', 'parse_flags(create_parser())')
    end = "if __name__ == '__main__':\n    run(main, parsed_flags)\n"
    assert before + process_mark + rest + end == first
    assert section.endswith(end.replace('main, parsed', 'main_serving, parsed'))
