"""The scripts share nothing but conventions: what stands in more than one of them is the same in each."""

import ast
import itertools

import pytest
from conftest import ROOT

SCRIPTS = ('tf_retrain.py', 'retrain_serving.py', 'tf_test.py')


def definitions(source):
    """Returns {name: source text} of the functions, classes and constants of a script, decorators included."""
    found = {}
    for node in ast.parse(source).body:
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, 'decorator_list', []))])
        for name in names:
            found[name] = '\n'.join(source.splitlines()[first - 1 : node.end_lineno])
    return found


def differing(first, second):
    """Returns the names that two scripts define in different ways."""
    first, second = definitions(first), definitions(second)
    return [name for name in first if name in second and first[name] != second[name]]


def test_what_counts_as_different():
    source = 'A = 1\n\n@cache\ndef f(x):\n    """Doc."""\n    return x  # why\n'
    assert list(definitions(source)) == ['A', 'f']
    assert differing(source, source.replace('cache', 'other')) == ['f']
    assert differing(source, source.replace('why', 'because')) == ['f']
    assert differing(source, source.replace('A = 1', 'A = 2')) == ['A']
    assert differing(source, source + 'B = 1\n') == []


@pytest.mark.parametrize(('first', 'second'), list(itertools.combinations(SCRIPTS, 2)))
def test_what_bears_the_same_name_is_the_same(first, second):
    assert differing((ROOT / first).read_text(), (ROOT / second).read_text()) == []


def test_retrain_serving_has_all_of_tf_retrain():
    first, second = (definitions((ROOT / script).read_text()) for script in SCRIPTS[:2])
    assert set(first) - set(second) == set()
    assert len(first) > 80
