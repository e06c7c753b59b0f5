"""The command line: defaults, wrong values, help, and how soon they are answered."""

import re

import pytest
from helpers import parse, run_new

import retrain_serving
import tf_retrain

USAGE_ERRORS = [
    ('--testing_percentage=-1', 'from 0 to 100'),
    ('--validation_percentage=101', 'from 0 to 100'),
    ('--testing_percentage=ten', 'invalid int value'),
    ('--testing_percentage=50 --validation_percentage=50', 'below 100'),
    ('--how_many_training_steps=-1', '0 or more'),
    ('--eval_step_interval=0', '1 or more'),
    ('--train_batch_size=0', '1 or more'),
    ('--train_batch_size=-1', '1 or more'),
    ('--validation_batch_size=0', '1 or more, or -1 for all'),
    ('--test_batch_size=-2', '1 or more, or -1 for all'),
    ('--learning_rate=0', 'above 0'),
    ('--learning_rate=nan', 'above 0'),
    ('--learning_rate=inf', 'above 0'),
    ('--random_crop=-1', 'from 0 to 100'),
    ('--random_seed=-1', '0 or more'),
    ('--find_suspects=-1', '0 or more'),
    ('--precision=float64', 'bfloat16'),
    ('--final_tensor_name=', 'letters'),
    ('--final_tensor_name=a:0', 'letters'),
    ('--data_service=localhost:5000', 'grpc://HOST:PORT'),
    ('--no_such_flag=1', 'unrecognized arguments: --no_such_flag=1'),
    ('extra', 'unrecognized arguments: extra'),
    ('--architecture=inception_v4', 'mobilenet_0.25_128'),
    (
        '--architecture=mobilenet_1.0_224 --tfhub_module=m',
        'not allowed with argument --architecture',
    ),
]


@pytest.mark.parametrize(('arguments', 'message'), USAGE_ERRORS)
def test_wrong_flags_are_usage_errors(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        parse('--image_dir=data/', *arguments.split())
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_image_dir_is_required(capsys):
    with pytest.raises(SystemExit):
        parse()
    assert capsys.readouterr().err.splitlines()[-1].endswith('arguments are required: --image_dir')


def test_defaults_are_those_of_the_original():
    new = {
        'random_seed',
        'strict',
        'data_service',
        'architecture',
        'tfhub_module',
        'optimized_graph',
        'precision',
    }
    new |= {'print_duplicates', 'find_suspects'}
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
    assert retrain_serving.parse_flags(
        retrain_serving.create_serving_parser(), ['--image_dir=x']
    ).saved_model_dir == ('/tmp/saved_models/1/')


@pytest.mark.parametrize('script', ['tf_retrain', 'retrain_serving'])
def test_help_names_every_flag_and_default(script):
    text = run_new(f'{script}.py', '--help').stdout
    module = {'tf_retrain': tf_retrain, 'retrain_serving': retrain_serving}[script]
    parser = (
        tf_retrain.create_parser() if script == 'tf_retrain' else module.create_serving_parser()
    )
    for flag, default in vars(parser.parse_args(['--image_dir=x'])).items():
        assert f'--{flag}' in text
        assert (
            default in ('x', None)
            or default is False
            or f'(default: {default})' in re.sub(r'\s+', ' ', text)
        )
    assert max(map(len, text.split('the usual command')[0].splitlines())) <= 80
    assert len(text.splitlines()) <= 110


def test_usage_errors_are_exit_code_2():
    process = run_new('tf_retrain.py', '--image_dir', 'data/', '--no_such_flag', '1', check=False)
    assert process.returncode == 2
    assert (
        process.stderr.splitlines()[-1]
        == 'tf_retrain.py: error: unrecognized arguments: --no_such_flag 1'
    )


@pytest.mark.parametrize('script', ['tf_retrain.py', 'retrain_serving.py', 'tf_test.py'])
@pytest.mark.parametrize('flag', ['--help', '--no_such_flag'])
def test_help_and_wrong_flags_do_not_wait_for_tensorflow(script, flag):
    process = run_new(script, flag, check=False, interpreter=['-X', 'importtime'])
    imported = re.findall(r'^import time: .*\| +(\S+)$', process.stderr, re.MULTILINE)
    assert 'argparse' in imported
    assert {'tensorflow', 'numpy', 'PIL'}.isdisjoint(imported)
