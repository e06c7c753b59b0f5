"""tf_test.py from the command line."""

import re

import numpy as np
import pytest
from conftest import run, run_v1, write_photographs

GRAPH, LABELS = 'trained_model/unoptimized_model.pb', 'trained_model/labels.txt'


def test_every_class_with_its_score_the_best_first(trained):
    image = trained.test_image()
    process = run('tf_test.py', image, GRAPH, LABELS, cwd=trained.folder)
    assert process.stderr == ''
    lines = [re.fullmatch(r'(.+) \(score = (\d\.\d{5})\)', line) for line in process.stdout.splitlines()]
    scores = run_v1(trained.graph(), image.read_bytes(), 'final_result:0')[0]
    labels = ['red fox', 'cat', 'dog']
    assert [line[1] for line in lines] == [labels[i] for i in np.argsort(-scores)]
    np.testing.assert_allclose([float(line[2]) for line in lines], sorted(scores, reverse=True), atol=1e-5)


@pytest.mark.parametrize(
    ('image', 'graph', 'labels', 'message'),
    [
        ('absent.jpg', GRAPH, LABELS, r"The image 'absent\.jpg' cannot be read: .*"),
        ('data', GRAPH, LABELS, r"The image 'data' cannot be read: .*"),
        (LABELS, GRAPH, LABELS, rf"'{LABELS}' is not an image that the graph decodes\. Save it as JPEG, .*"),
        ('empty', GRAPH, LABELS, r"'empty' is not an image that the graph decodes\. .*"),
        ('cat.jpg', 'absent.pb', LABELS, r"The graph 'absent\.pb' cannot be read: .*"),
        ('cat.jpg', LABELS, LABELS, rf"'{LABELS}' is not a graph with an input DecodeJpeg/contents:0\. .*"),
        ('cat.jpg', 'empty', LABELS, r"'empty' is not a graph with an input DecodeJpeg/contents:0\. .*"),
        ('cat.jpg', GRAPH, 'absent.txt', r"The labels file 'absent\.txt' cannot be read: .*"),
        ('cat.jpg', GRAPH, GRAPH, rf"The labels file '{GRAPH}' is not text\. .*"),
        ('cat.jpg', GRAPH, 'empty', rf"'empty' has 0 labels, but '{GRAPH}' has 3 classes\. .*"),
    ],
)
def test_errors_are_one_line(trained, tmp_path, image, graph, labels, message):
    write_photographs(tmp_path, 'cat', 1, (200, 60, 60))
    (tmp_path / 'cat.jpg').hardlink_to(tmp_path / 'cat/cat 0.jpg')
    (tmp_path / 'empty').touch()
    (tmp_path / 'data').mkdir()
    (tmp_path / 'trained_model').symlink_to(trained.folder / 'trained_model')
    process = run('tf_test.py', image, graph, labels, cwd=tmp_path, check=False)
    assert process.returncode == 1
    assert process.stdout == ''
    assert re.fullmatch(f'ERROR: {message}\n', process.stderr), process.stderr


def test_the_old_model_itself_is_answered_clearly(trained):
    """The graph of --model_dir has a softmax of 10 classes of its own."""
    graph = 'inception/classify_image_graph_def.pb'
    process = run('tf_test.py', trained.test_image(), graph, LABELS, cwd=trained.folder, check=False)
    assert process.returncode == 1
    message = f"ERROR: '{LABELS}' has 3 labels, but '{graph}' has 10 classes. Name files of one training.\n"
    assert process.stderr == message


def test_wrong_arguments_are_usage_errors():
    assert run('tf_test.py', check=False).returncode == 2
    assert run('tf_test.py', 'a', 'b', 'c', '--top=3', check=False).returncode == 2
