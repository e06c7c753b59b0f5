"""Every command of every README.md, from top to bottom, in a copy of the project with a small model and photographs."""

import base64
import concurrent.futures
import glob
import hashlib
import json
import pathlib
import re
import sys
import types
import urllib.error
import urllib.request

import pytest
from helpers import COLOURS, ROOT, created, get_set, write_mobilenet, write_photographs
from PIL import Image
from reader import CI, IMAGE, Reader, read_blocks, shell, train

import retrain_serving
import tf_retrain


def test_the_first_commands_are_those_of_ci():
    first, second = (text for _, text in read_blocks('README.md') if text.endswith(CI))
    assert second == first.replace('pipenv install', 'pipenv install --dev').replace(
        'run quickstart', 'run test'
    )
    ci = (ROOT / '.ci/run').read_text()
    assert (
        'for name in quickstart test; do\n  command=$(grep -m 1 "pipenv run $name\\$" README.md)'
        in ci
    )


@pytest.mark.slow
def test_main(clone):
    with Reader(clone).follow('README.md') as reader:
        for output in reader.find('--image_dir'):
            assert 'Final test accuracy = ' in output
        assert '=== SUSPECT IMAGES ===' in reader.outputs[-1][1]
        one, folder = reader.find('tf_test.py')
        assert re.fullmatch(r'dog \(score = 0\.\d+\)\ncat \(score = 0\.\d+\)\n', one)
        assert len(folder.splitlines()) == 80
        assert len(list((clone / 'sorted').glob('*/*.jpg'))) == 80
        assert (clone / 'trained_model_serving/1/saved_model.pb').exists()
        with urllib.request.urlopen(
            f'http://localhost:{reader.ports["6006"]}/data/environment', timeout=60
        ) as answer:
            assert json.load(answer)['data_location'] == '/tmp/retrain_logs'


def test_data(tmp_path, monkeypatch):
    """Photographs that are all in one folder, and lie on their side."""
    monkeypatch.chdir(tmp_path)
    write_photographs(tmp_path / 'data', 'train', 30, COLOURS[0])
    for i, path in enumerate(sorted((tmp_path / 'data/train').iterdir())):
        path.rename(path.with_name(f'{"cat" if i % 2 else "dog"}.{i}.jpg'))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new('RGB', (40, 30), 'red')
    picture.save('data/train/cat.99.jpg', exif=exif)
    before = {
        path.name: hashlib.sha1(path.read_bytes()).digest()
        for path in (tmp_path / 'data/train').iterdir()
    }
    names = {'name': 'data/cat/cat.0.jpg', 'validation_percentage': 10, 'testing_percentage': 10}
    reader = Reader(tmp_path, **names).follow('data/README.md')
    paths = sorted((tmp_path / 'data').rglob('*.jpg'))
    assert [path.parent.name for path in paths] == [path.name[:3] for path in paths]
    changed = [
        path.name for path in paths if hashlib.sha1(path.read_bytes()).digest() != before[path.name]
    ]
    assert changed == ['cat.99.jpg']
    with Image.open('data/cat/cat.99.jpg') as image:
        assert image.size == (30, 40)
        assert 0x0112 not in image.getexif()
    assert reader.names['p'] == pytest.approx(15.7, abs=0.05)
    (rule,) = (text for language, text in read_blocks('data/README.md') if 'sha1' in text)
    for path in paths:
        names['name'] = str(path.relative_to(tmp_path))
        exec(rule, names)
        assert names['result'] == get_set(tmp_path, path)


@pytest.mark.slow
def test_inception(clone, monkeypatch):
    import keras

    create = keras.applications.EfficientNetV2B0
    untrained = lambda **options: create(**{**options, 'weights': None})  # noqa: E731
    monkeypatch.setattr(keras.applications, 'EfficientNetV2B0', untrained)
    asked = []
    hub = types.SimpleNamespace(model_download=lambda handle: asked.append(handle) or 'folder')
    monkeypatch.setitem(sys.modules, 'kagglehub', hub)
    write_mobilenet(clone / 'inception', '1.0_224')
    reader = Reader(clone).follow('inception/README.md')
    mobilenet, efficientnet = reader.find('--image_dir')
    assert 'Final test accuracy = ' in mobilenet and 'Final test accuracy = ' in efficientnet
    assert 'network inception/efficientnet' in efficientnet
    assert len(asked) == 1
    (label,) = (text for _, text in read_blocks('README.md') if 'tf_test.py <path' in text)
    assert len(reader.type(label).splitlines()) == 2


@pytest.mark.slow
def test_bottlenecks(clone):
    with Reader(clone).follow('bottlenecks/README.md') as reader:
        (devices,) = reader.find('list_physical_devices')
        assert re.search(r'^\[.*\]$', devices, re.MULTILINE)
        (train,) = (
            text
            for _, text in read_blocks('README.md')
            if 'tf_retrain.py' in text and 'suspects' not in text
        )
        out = reader.type(f'{train} --data_service grpc://localhost:{reader.ports["5000"]}')
        assert len(created(out)) == 80
        assert 'WARNING: grpc' not in out


@pytest.mark.slow
def test_trained_model(clone):
    train('tf_retrain.py')
    graph = clone / 'trained_model/unoptimized_model.pb'
    first = graph.read_bytes()
    with tf_retrain.tf.Graph().as_default():
        scores = (
            Reader(clone, path=IMAGE).follow('trained_model/README.md', 'Tensors').names['scores']
        )
    assert json.loads(
        shell(f'python3 tf_test.py --json "{IMAGE}" {graph} trained_model/labels.txt', clone)
    )['scores'] == (pytest.approx(sorted(scores[0], reverse=True), abs=1e-5))
    graph.unlink()
    Reader(clone).follow('trained_model/README.md', 'The record of a run')
    assert graph.read_bytes() == first
    Reader(clone).follow('trained_model/README.md', 'Which pixels mattered')
    with Image.open(clone / 'trained_model/heatmap.png') as heatmap:
        assert heatmap.height > 24


def ask(url, body):
    """Returns the status and the JSON of the answer to a POST request."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def check_server(url, model):
    """200 requests by 8 threads, every fourth one wrong, get what `predict_rows` of the model gives."""
    paths = sorted(pathlib.Path('data').glob('*/*.jpg'))[:10]
    contents = [path.read_bytes() for path in paths]
    expected = [model.signatures['predict_rows'](image=[content]) for content in contents]

    def check(i):
        if i % 4 == 3:
            wrong = [
                b'',
                b'{}',
                b'[1]',
                b'{"instances": [{"image": {"b64": "eA=="}}]}',
                b'{"instances": [{"b64": 1}]}',
            ]
            status, answer = ask(url, wrong[i // 4 % len(wrong)])
            assert (status, list(answer)) == (400, ['error']) and answer['error']
            return
        pair = [i % 10, (i + 1) % 10]
        instances = [{'image': {'b64': base64.b64encode(contents[j]).decode()}} for j in pair]
        status, answer = ask(
            url, json.dumps({'signature_name': 'predict_rows', 'instances': instances}).encode()
        )
        assert status == 200
        for j, row in zip(pair, answer['predictions'], strict=True):
            assert row['label'].encode() == expected[j]['label'][0]
            assert row['score'] == pytest.approx(float(expected[j]['score'][0]), abs=1e-5)
            assert [label.encode() for label in row['labels']] == expected[j]['labels'][
                0
            ].numpy().tolist()
            assert row['scores'] == pytest.approx(
                expected[j]['scores'][0].numpy().tolist(), abs=1e-5
            )

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(check, range(200)))) == 200


@pytest.mark.slow
def test_serving(clone):
    train('retrain_serving.py', '--saved_model_dir=trained_model_serving/1')
    with Reader(clone, path=IMAGE).follow('trained_model_serving/README.md') as reader:
        (shown,) = reader.find('saved_model_cli')
        assert "inputs['image']" in shown
        assert reader.names['answer']['label'].numpy() == [b'dog']
        check_server(
            f'http://localhost:{reader.ports["8501"]}/v1/models/retrained:predict',
            reader.names['model'],
        )


@pytest.mark.slow
def test_tests():
    tests, benchmark = (output for _, output in Reader(ROOT).follow('tests/README.md').outputs)
    assert re.search(r'\d+ passed', tests)
    assert re.search(r'^\| reading the cache of 1,000 images \|', benchmark, re.MULTILINE)


def test_every_flag_is_explained():
    readme = (ROOT / 'README.md').read_text()
    trainers = retrain_serving.create_serving_parser().parse_args(['--image_dir=x'])
    labeling = re.findall(r"add_argument\('--(\w+)'", (ROOT / 'tf_test.py').read_text())
    for flag in [*vars(trainers), *labeling]:
        assert f'| `--{flag}' in readme


def test_readmes_are_found():
    """Each folder of the layout has one, which the main one names; and the main one stays short."""
    folders = (
        'data',
        'inception',
        'bottlenecks',
        'trained_model',
        'trained_model_serving',
        'tests',
    )
    main = (ROOT / 'README.md').read_text()
    for folder in folders:
        assert (ROOT / folder / 'README.md').exists()
        assert f'({folder}/README.md)' in main
    assert len(main.splitlines()) <= 400


@pytest.mark.parametrize(
    'readme', ['README.md', *glob.glob('*/README.md', root_dir=ROOT)]
)  # none of a hidden folder
def test_links_lead_somewhere(readme):
    folder, text = (
        (ROOT / readme).parent,
        re.sub(r'^```.*?^```', '', (ROOT / readme).read_text(), flags=re.M | re.S),
    )
    for target in re.findall(r'\]\(([^)]+)\)', text):
        path, _, anchor = target.partition('#')
        if not path.startswith('http'):
            page = folder / path if path else ROOT / readme
            assert page.exists(), target
            headings = re.findall(r'^#+ (.+)$', page.read_text(), re.MULTILINE) if anchor else []
            anchors = [
                re.sub(r'[^a-z0-9 -]', '', heading.lower()).replace(' ', '-')
                for heading in headings
            ]
            assert not anchor or anchor in anchors, target
