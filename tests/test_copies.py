"""The scripts share nothing but conventions: what stands in more than one of them is the same in each."""

import ast
import itertools

import pytest
from helpers import ROOT

SCRIPTS = ('tf_retrain.py', 'retrain_serving.py', 'tf_test.py')


def definitions(source):
    """Returns {name: source text} of a script's functions, classes and constants, with decorators and comments."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            inner = itertools.chain.from_iterable(map(ast.walk, targets))
            names = [
                name.id
                for name in inner
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
            ]
        else:
            continue
        first = min(
            [node.lineno, *(decorator.lineno for decorator in getattr(node, 'decorator_list', []))]
        )
        text = '\n'.join(source.splitlines()[first - 1 : node.end_lineno])
        for name in names:
            found[name] = found.get(name, '') + text  # a second definition counts too
    return found


def differing(first, second):
    """Returns the names that two scripts define in different ways."""
    first, second = definitions(first), definitions(second)
    return [name for name in first if name in second and first[name] != second[name]]


def test_what_counts_as_different():
    source = 'A = 1  # one\nB, C = 2, 3\nD: int = 4\n\n@cache\ndef f(x):\n    """Doc."""\n    # Why.\n    return x\n'
    assert list(definitions(source)) == ['A', 'B', 'C', 'D', 'f']
    assert differing(source, source) == []
    for old, new, name in (
        ('cache', 'other', 'f'),
        ('Why', 'Because', 'f'),
        ('Doc', 'Text', 'f'),
        ('A = 1', 'A = 2', 'A'),
        ('# one', '# a', 'A'),
        ('int = 4', 'int = 5', 'D'),
    ):
        assert differing(source, source.replace(old, new)) == [name]
    assert differing(source, source.replace('2, 3', '2, 4')) == ['B', 'C']
    assert differing(source, source + 'E = 1\n') == []
    assert differing(source, source + 'A = 2\n') == ['A']


@pytest.mark.parametrize(('first', 'second'), list(itertools.combinations(SCRIPTS, 2)))
def test_what_bears_the_same_name_is_the_same(first, second):
    assert differing((ROOT / first).read_text(), (ROOT / second).read_text()) == []


def test_tf_test_has_something_in_common_with_the_others():
    names = [set(definitions((ROOT / script).read_text())) for script in SCRIPTS]
    assert {'UserError', 'JPEG_DATA_NODE'} <= set.intersection(*names)


def without_docstring(script):
    source = (ROOT / script).read_text()
    return source.split('"""', 2)[2]


def test_retrain_serving_is_tf_retrain_and_one_section():
    """Its own are the docstring, a flag before TensorFlow is imported, and the section at the end."""
    first, second = map(without_docstring, SCRIPTS[:2])
    before, mark, rest = second.partition('def create_serving_parser()')
    flag, main, rest = rest.partition("if __name__ == '__main__':\n")
    rest, section, own = rest.partition('# SavedModel\n')
    assert mark and main and section
    assert set(definitions(own)) | {'create_serving_parser'} == set(definitions(second)) - set(
        definitions(first)
    )
    common = (
        before
        + main
        + rest.replace('parse_flags(create_serving_parser())', 'parse_flags(create_parser())')
    )
    assert common + main + '    run(main, parsed_flags)\n' == first
    assert len(definitions(first)) > 80
    assert own.endswith(main + '    run(main_serving, parsed_flags)\n')
