"""The command line: defaults, wrong values, help, and how soon they are answered."""

import argparse
import re

import pytest
from helpers import parse, run_new

import retrain_serving
import tf_retrain
import tf_test

USAGE_ERRORS = [
    ('--testing_percentage=-1', 'from 0 to 100'),
    ('--validation_percentage=101', 'from 0 to 100'),
    ('--testing_percentage=0.1', "must be a whole number from 0 to 100, not '0.1'"),
    ('--learning_rate=0,05', "must be a small number above 0, such as 0.05, not '0,05'"),
    ('--architecture=mobilenet_0.5_224', 'mobilenet_0.50_224'),
    ('--testing_percentage=50 --validation_percentage=50', 'below 100'),
    ('--how_many_training_steps=-1', '0 or more'),
    ('--eval_step_interval=0', '1 or more'),
    ('--learning_rate=1e-46', 'a small number above 0'),
    ('--data_service=grpc://localhost:99999999999999999999', 'grpc://HOST:PORT'),
    ('--architecture=convnext_tiny', "there is no 'convnext_tiny'; did you mean ConvNeXtTiny?"),
    ('--tfhub_module=', 'a name in UTF-8'),
    ('--train_batch_size=0', 'a whole number from 1 to 100,000'),
    ('--train_batch_size=-1', 'a whole number from 1 to 100,000'),
    ('--train_batch_size=1000000000000', 'a whole number from 1 to 100,000'),
    ('--validation_batch_size=0', 'from 1 to 100,000, or -1 for all'),
    ('--validation_batch_size=1000000000000', 'from 1 to 100,000, or -1 for all'),
    ('--test_batch_size=-2', 'from 1 to 100,000, or -1 for all'),
    ('--test_batch_size=1000000000000', 'from 1 to 100,000, or -1 for all'),
    ('--learning_rate=0', 'above 0'),
    ('--learning_rate=nan', 'above 0'),
    ('--learning_rate=inf', 'above 0'),
    ('--random_crop=-1', 'from 0 to 100'),
    ('--random_seed=-1', '0 or more'),
    ('--find_suspects=-1', '0 or more'),
    ('--find_suspects=1 --how_many_training_steps=0', 'steps of 1 or more'),
    ('--precision=float64', 'bfloat16'),
    ('--final_tensor_name=', 'letters'),
    ('--final_tensor_name=a:0', 'letters'),
    ('--data_service=localhost:5000', 'grpc://HOST:PORT'),
    ('--no_such_flag=1', 'unrecognized arguments: --no_such_flag=1'),
    ('extra', 'unrecognized arguments: extra'),
    ('--architecture=inception_v4', 'did you mean inception_v3 or '),
    (
        '--architecture=mobilenet_1.0_224_quantized',
        "there is no 'mobilenet_1.0_224_quantized'; did you mean mobilenet_1.0_224 or ",
    ),
    ('--flip_left_right=maybe', "must be True or False, not 'maybe'"),
    ('--flip_left_right True True', 'unrecognized arguments: True'),
    (
        '--architecture=mobilenet_1.0_224 --tfhub_module=m',
        'not allowed with argument --architecture',
    ),
]


@pytest.mark.parametrize(('arguments', 'message'), USAGE_ERRORS)
def test_wrong_flags_are_usage_errors(capsys, arguments, message):
    with pytest.raises(SystemExit, match='^2$'):
        parse('--image_dir=data/', *arguments.split())
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ('words', 'expected'),
    [
        ('', False),
        ('--flip_left_right', True),
        ('--flip_left_right --random_crop 10', True),
        ('--flip_left_right True', True),
        ('--flip_left_right true --random_crop 10', True),
        ('--flip_left_right=True', True),
        ('--flip_left_right False', False),
        ('--flip_left_right=False', False),
    ],
)
def test_switches_as_tutorials_write_them(words, expected):
    for name in ('flip_left_right', 'strict', 'print_duplicates'):
        arguments = words.replace('flip_left_right', name).split()
        assert vars(parse(*arguments, '--image_dir=data/'))[name] is expected


@pytest.mark.parametrize('flag', ['output_graph', 'tfhub_module'])
def test_a_path_that_is_not_utf_8_names_its_flag(capsys, flag):
    with pytest.raises(SystemExit, match='^2$'):
        parse('--image_dir=data/', f'--{flag}=\udcff.pb')
    assert f'argument --{flag}: must be a name in UTF-8' in capsys.readouterr().err


def test_a_path_is_not_empty(capsys):
    """As of a shell variable that is not set."""
    with pytest.raises(SystemExit, match='^2$'):
        parse('--image_dir=data/', '--bottleneck_dir=')
    assert 'argument --bottleneck_dir: must be a name' in capsys.readouterr().err
    for flag in ('--sort_into', '--heatmap'):
        with pytest.raises(SystemExit, match='^2$'):
            tf_test.create_labeling_parser().parse_args(['x.jpg', 'g.pb', 'l.txt', f'{flag}='])
        assert f'argument {flag}: must be a name' in capsys.readouterr().err


def test_image_dir_is_required(capsys):
    with pytest.raises(SystemExit):
        parse()
    assert capsys.readouterr().err.splitlines()[-1].endswith('arguments are required: --image_dir')


def test_defaults_are_those_of_the_original():
    new = {'random_seed', 'strict', 'data_service', 'architecture', 'tfhub_module'}
    new |= {'optimized_graph', 'precision', 'print_duplicates', 'find_suspects', 'upright'}
    flags = vars(parse('--image_dir', 'data/'))
    assert new < set(flags)
    assert {name: value for name, value in flags.items() if name not in new} == {
        'image_dir': 'data/',
        'output_graph': '/tmp/output_graph.pb',
        'output_labels': '/tmp/output_labels.txt',
        'summaries_dir': '/tmp/retrain_logs',
        'how_many_training_steps': 4000,
        'learning_rate': 0.01,
        'testing_percentage': 10,
        'validation_percentage': 10,
        'eval_step_interval': 10,
        'train_batch_size': 100,
        'test_batch_size': -1,
        'validation_batch_size': 100,
        'print_misclassified_test_images': False,
        'model_dir': '/tmp/imagenet',
        'bottleneck_dir': '/tmp/bottleneck',
        'final_tensor_name': 'final_result',
        'flip_left_right': False,
        'random_crop': 0,
        'random_scale': 0,
        'random_brightness': 0,
    }
    assert flags['architecture'] == 'inception_v3'
    serving = retrain_serving.create_serving_parser().parse_args(['--image_dir=x'])
    assert serving.saved_model_dir == '/tmp/saved_models/1/'


@pytest.mark.parametrize(
    'create_parser', [tf_retrain.create_parser, retrain_serving.create_serving_parser]
)
def test_help_names_every_flag_and_default(monkeypatch, create_parser):
    monkeypatch.setenv('COLUMNS', '80')
    parser = create_parser()
    text = parser.format_help()
    words = ' '.join(text.split())
    for action in parser._actions:
        assert action.option_strings[-1] in words
        if str(action.default) not in ('None', 'False', argparse.SUPPRESS):
            assert f'(default: {action.default})' in words
    for name in ('ConvNeXtTiny', 'EfficientNetV2B0', 'MobileNetV3Large', 'ResNet50V2'):
        assert name in words
    assert 'the list is in inception/README.md' in words
    flags, _, _ = text.partition('the usual command')
    assert max(map(len, flags.splitlines())) <= 80
    assert len(text.splitlines()) <= 110


@pytest.mark.parametrize('script', ['tf_retrain.py', 'retrain_serving.py', 'tf_test.py'])
@pytest.mark.parametrize(('flag', 'code'), [('--help', 0), ('--no_such_flag', 2)])
def test_help_and_wrong_flags_do_not_wait_for_tensorflow(script, flag, code):
    process = run_new(script, flag, check=False, interpreter=['-X', 'importtime'])
    assert process.returncode == code
    imported = re.findall(r'^import time: .*\| +(\S+)$', process.stderr, re.MULTILINE)
    assert 'argparse' in imported
    assert {'tensorflow', 'numpy', 'PIL'}.isdisjoint(imported)
    if code:
        assert process.stderr.splitlines()[-1].startswith(f'{script}: error: ')
    else:
        assert process.stdout.startswith(f'usage: python3 {script} ')


@pytest.mark.parametrize('script', ['tf_retrain.py', 'retrain_serving.py', 'tf_test.py'])
def test_help_without_docstrings(script):
    process = run_new(script, '--help', interpreter=['-OO'])
    assert process.stdout.startswith(f'usage: python3 {script} ')


@pytest.mark.parametrize('script', ['tf_retrain.py', 'retrain_serving.py', 'tf_test.py'])
def test_without_the_environment(script):
    """The last line says how to activate it."""
    arguments = ['x.jpg', 'g.pb', 'l.txt'] if script == 'tf_test.py' else ['--image_dir=data']
    process = run_new(script, *arguments, interpreter=['-S'], check=False)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith('ERROR: No module named ')
    assert line.endswith('Run `. .venv/bin/activate` first, as README.md shows.')
