"""Other runtimes: the recipes of trained_model/README.md give the scores of tf_test.py."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from unittest import mock

import cv2
import forks
import numpy as np
import onnxruntime
import pytest
from ai_edge_litert.interpreter import Interpreter
from conftest import make_clone
from helpers import GRAPH, LABELS, ROOT, check_familiarity, label_images, run, run_openvino
from PIL import Image
from reader import Reader, read_blocks
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from tf_retrain import tf

RECIPES = 'trained_model/README.md', 'Other runtimes'
# What is in the recipes that have a test each. The others are followed before.
WITH_TESTS = (
    'scores',
    'video',
    'localhost',
    'npm',
    'import coremltools',
    'from tflite_support',
)


@pytest.fixture(scope='module')
def recipes(tmp_path_factory, model):
    """Who has followed the recipes that write files; .recipes are the texts of the other ones.

    The copy of the project is the working directory.
    """
    folder = make_clone(tmp_path_factory.mktemp('clone'), model)
    reader = Reader(folder)
    reader.recipes = []
    with pytest.MonkeyPatch.context() as patch, reader:
        patch.chdir(folder)
        for language, text in read_blocks(*RECIPES):
            if any(word in text for word in WITH_TESTS):
                reader.recipes.append(text)
            elif language == 'sh':
                reader.type(text)
            else:
                exec(text, reader.names)
        assert len(reader.recipes) == 9
        yield reader


def find(recipes, word):
    (text,) = (text for text in recipes.recipes if word in text)
    return text


def score(recipes, text, images):
    """Returns the scores that a recipe gives to decoded images."""
    recipes.names['image'] = images
    exec(text, recipes.names)
    return recipes.names.pop('scores')


def check_words(text, scores, tolerance):
    """A text begins with the best label, and has its score."""
    assert text.startswith(('cat', 'dog')[scores.argmax()])
    number = re.search(r'[\d.]+', text)[0]
    assert float(number) == pytest.approx(scores.max(), abs=tolerance)


@pytest.fixture(scope='module')
def photographs(recipes):
    """Twenty photographs, decoded, and their scores by tf_test.py."""
    paths = sorted(map(str, pathlib.Path('data').glob('*/*.jpg')))[::4]
    expected = label_images(recipes.folder, paths)
    assert np.ptp(expected, axis=0).min() > 0.1
    return [recipes.names['load'](path) for path in paths], expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ('word', 'file', 'atol'),
    [
        ('InferenceSession', 'float', 1e-5),
        ('net.setInput(image', 'float', 1e-5),
        ('Interpreter(', 'float', 1e-5),
        ('Interpreter(', 'dynamic_range', 0.05),
        ('Interpreter(', 'int8', 0.2),
    ],
)
def test_twenty_photographs(recipes, photographs, word, file, atol):
    images, expected = photographs
    text = find(recipes, word).replace('float.tflite', f'{file}.tflite')
    found = [np.ravel(score(recipes, text, image)) for image in images]
    np.testing.assert_allclose(found, expected, atol=atol)


@pytest.mark.slow
def test_twenty_photographs_in_openvino(recipes, photographs):
    images, expected = photographs
    found = run_openvino(recipes.folder, find(recipes, 'openvino.Core'), images)
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-5)


@pytest.fixture
def tflite_support(tmp_path):
    """The environment variables with which this Python has tflite-support, if it runs with -S."""
    if sys.version_info >= (3, 12):
        pytest.skip('tflite-support is for older versions of Python')
    pip = '-m pip install --quiet --disable-pip-version-check --no-compile --target'.split()
    packages = 'tflite-support==0.4.4', 'libusb-package'
    if subprocess.run([sys.executable, *pip, tmp_path, *packages], capture_output=True).returncode:
        pytest.skip('tflite-support cannot be installed here')
    return {**os.environ, 'PYTHONPATH': str(tmp_path)}


@pytest.mark.slow
def test_labels_in_the_file(recipes, tflite_support):
    """The file has all that a client with nothing but the photographs needs."""
    paths = [f'data/{name}/{name} {i}.jpg' for i in range(4) for name in ('cat', 'dog')]
    program = ROOT / 'tests/programs/classify_by_metadata.py'
    recipe = find(recipes, 'from tflite_support')
    # -S leaves out TensorFlow, which tflite-support would import, with a protobuf too old for it.
    command = [sys.executable, '-S', program, recipe, 'trained_model/with_metadata.tflite', *paths]
    out = subprocess.run(command, env=tflite_support, check=True, capture_output=True).stdout
    expected = label_images(recipes.folder, paths)
    for text, scores in zip(out.decode().splitlines(), expected, strict=True):
        check_words(text, scores, 0.1)


@pytest.mark.slow
def test_core_ml(recipes):
    """What the converted model says of itself: only macOS runs it."""
    pytest.importorskip('coremltools')
    exec(find(recipes, 'import coremltools'), recipes.names)
    assert pathlib.Path('trained_model/retrained.mlpackage/Manifest.json').exists()
    spec = recipes.names['converted'].get_spec()
    (image,) = spec.description.input
    size = image.type.imageType
    assert (image.name, size.width, size.height) == ('image', 299, 299)
    assert [each.name for each in spec.description.output] == ['classLabel', 'classLabel_probs']
    (block,) = spec.mlProgram.functions['main'].block_specializations.values()
    scale, multiply, bias, add = block.operations[:4]
    assert [multiply.type, add.type] == ['mul', 'add']
    numbers = [
        list(op.attributes['val'].immediateValue.tensor.floats.values) for op in (scale, bias)
    ]
    assert numbers == [[1 / 128], 3 * [-1]]
    classify = block.operations[-1]
    assert classify.type == 'classify'
    words = classify.inputs['classes'].arguments[0].value.immediateValue.list.values
    assert [word.immediateValue.tensor.strings.values[0] for word in words] == ['cat', 'dog']


@pytest.mark.slow
def test_the_small_models_have_less_than_half_the_size(recipes):
    models = ('float', 'dynamic_range', 'int8')
    size, *smaller = (os.path.getsize(f'trained_model/{name}.tflite') for name in models)
    assert max(smaller) < size / 2


@pytest.mark.slow
def test_batches_in_onnx_runtime(recipes, photographs):
    images, expected = photographs
    found = score(recipes, find(recipes, 'InferenceSession'), np.concatenate(images))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_a_video(recipes):
    """The webcam is a film of four photographs; what OpenCV would show is looked at."""
    paths = [f'data/{name}/{name} {i}.jpg' for i in range(2) for name in ('cat', 'dog')]
    film = cv2.VideoWriter('film.avi', cv2.VideoWriter.fourcc(*'MJPG'), 10, (40, 30))
    for path in paths:
        film.write(cv2.imread(path))
    film.release()
    webcam = cv2.VideoCapture('film.avi')
    # The last two need a screen.
    doubles = {'VideoCapture': lambda number: webcam, 'waitKey': lambda milliseconds: -1}
    with mock.patch.multiple(cv2, **doubles, imshow=mock.DEFAULT, putText=mock.DEFAULT) as calls:
        exec(find(recipes, 'VideoCapture'), recipes.names)
    assert calls['imshow'].call_count == 4
    words = [call.args[1] for call in calls['putText'].mock_calls]
    for text, scores in zip(words, label_images(recipes.folder, paths), strict=True):
        check_words(text, scores, 0.1)


BROWSER_FLAGS = [
    'headless',
    'no-sandbox',
    'no-first-run',
    'disable-gpu',
    'disable-quic',
    'disable-background-networking',
    'disable-component-update',
    'disable-sync',
    'disable-dev-shm-usage',
    'use-fake-device-for-media-stream',  # the webcam
    'use-fake-ui-for-media-stream',
]


@pytest.fixture
def browser():
    if not (shutil.which('chromium') and shutil.which('chromedriver')):
        pytest.skip('there is no Chromium here')
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which('chromium')
    for name in BROWSER_FLAGS:
        options.add_argument(f'--{name}')
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which('chromedriver')))
    yield driver
    driver.quit()


def wait_for_status(browser, *starts):
    """Returns the line that tells how the page is, as soon as it starts in one of these ways."""
    status = browser.find_element(By.ID, 'status')
    WebDriverWait(browser, 60).until(lambda _: status.text.startswith(starts))
    return status.text


SIDEWAYS = ['sideways.jpg', 'sideways.png', 'sideways.webp']
SIZE = 'const canvas = document.querySelector("canvas"); return [canvas.width, canvas.height]'


def check_upright(browser, recipes):
    """After a training with --upright, photographs are turned."""
    path = pathlib.Path(f'{GRAPH}.json')
    before = path.read_text()
    record = json.loads(before)
    record['flags']['upright'] = True
    path.write_text(json.dumps(record))
    try:
        browser.get(f'http://localhost:{recipes.ports["8000"]}')
        wait_for_status(browser, 'Ready')
        for name in SIDEWAYS[:2]:  # Chromium turns no WebP
            browser.execute_script('document.getElementById("status").textContent = ""')
            browser.find_element(By.ID, 'file').send_keys(os.path.abspath(name))
            wait_for_status(browser, 'cat (', 'dog (')
            assert browser.execute_script(SIZE) == [20, 31]
    finally:
        path.write_text(before)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('npm'), reason='there is no npm here')
def test_the_page(recipes, browser):
    """Photographs as they come from cameras, some of them stored sideways; and the webcam."""
    shutil.copy(ROOT / 'trained_model/index.html', 'trained_model')
    for word in ('npm', 'localhost'):
        recipes.type(find(recipes, word))
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open('data/cat/cat 1.jpg') as photograph:
        for name in SIDEWAYS:
            photograph.crop((0, 0, 31, 20)).save(name, exif=exif)
        photograph.save('lossless.png')
        photograph.resize([70_000, 8]).save('wide.png')
    pathlib.Path('text.jpg').write_text('no photograph')
    paths = ['data/cat/cat 0.jpg', 'data/dog/dog 0.jpg', 'wide.png', 'lossless.png', *SIDEWAYS]
    photographs = dict(zip(paths, label_images(recipes.folder, paths), strict=True))
    browser.get(f'http://localhost:{recipes.ports["8000"]}')
    assert wait_for_status(browser, 'Ready', 'ERROR') == 'Ready.'
    clear = 'document.getElementById("status").textContent = ""'
    chooser = browser.find_element(By.ID, 'file')
    for path, scores in photographs.items():
        browser.execute_script(clear)
        chooser.send_keys(os.path.abspath(path))
        found = wait_for_status(browser, 'cat (', 'dog (', 'ERROR')
        if path == 'wide.png':
            assert found == 'ERROR: the image is too large for this browser: 70000 x 8 pixels.'
            continue
        check_words(found, scores, 0.01)
        if path in SIDEWAYS:
            assert browser.execute_script(SIZE) == [31, 20]
    rows = browser.find_elements(By.CSS_SELECTOR, '#scores tr')
    assert sorted(row.text.split()[0] for row in rows) == ['cat', 'dog']
    browser.execute_script(clear)
    browser.find_element(By.ID, 'webcam').click()
    wait_for_status(browser, 'cat (', 'dog (')
    chooser.send_keys(os.path.abspath('text.jpg'))
    assert wait_for_status(browser, 'ERROR').startswith('ERROR: ')
    check_slow_webcam(browser, chooser)
    check_upright(browser, recipes)


SLOW_WEBCAM = """
const devices = navigator.mediaDevices, ask = devices.getUserMedia.bind(devices);
window.streams = [];
window.question = new Promise(resolve => { window.allow = resolve; });
devices.getUserMedia = async wishes => {
  await window.question;
  const stream = await ask(wishes);
  window.streams.push(stream);
  return stream;
};
"""
TRACKS = (
    'return window.streams.flatMap(stream => stream.getTracks()).map(track => track.readyState)'
)


def check_slow_webcam(browser, chooser):
    """A photograph is chosen while the browser asks whether the page may use the webcam."""
    webcam = browser.find_element(By.ID, 'webcam')
    browser.execute_script(SLOW_WEBCAM)
    for _ in range(3):  # on, off, on
        webcam.click()
    chooser.send_keys(os.path.abspath('data/cat/cat 0.jpg'))
    browser.execute_script('window.allow()')
    wait_for_status(browser, 'cat (', 'dog (')
    assert set(browser.execute_script(TRACKS)) <= {'ended'}
    browser.execute_script('document.getElementById("status").textContent = ""')
    webcam.click()
    wait_for_status(browser, 'cat (', 'dog (')
    browser.execute_script('window.streams.at(-1).getTracks()[0].stop()')  # it was unplugged
    wait_for_status(browser, 'The webcam has stopped.')


BOTH = 'trained_model/optimized_with_familiarity.pb'


@pytest.fixture(scope='module')
def onnx(recipes, tmp_path_factory):
    """The path of a model for ONNX Runtime with both outputs."""
    for _, text in read_blocks('trained_model/README.md', 'Familiarity'):
        exec(text, recipes.names)
    path = str(tmp_path_factory.mktemp('onnx') / 'both.onnx')
    convert = '-m tf2onnx.convert --opset 17 --inputs Mul:0 --outputs final_result:0,familiarity:0'
    forks.run([*convert.split(), '--graphdef', BOTH, '--output', path], recipes.folder)
    return path


def test_the_page_says_that_an_image_is_foreign(recipes, onnx, browser):
    """Its model has the familiarity, too."""
    shutil.copy(ROOT / 'trained_model/index.html', 'trained_model')
    for word in ('npm', 'localhost'):
        recipes.type(find(recipes, word))
    shutil.copy(onnx, 'trained_model/model.onnx')
    noise = np.random.default_rng(0).integers(0, 255, [64, 64, 3], np.uint8)
    Image.fromarray(noise).save('foreign.png')
    browser.get(f'http://localhost:{recipes.ports["8000"]}')
    wait_for_status(browser, 'Ready')
    chooser = browser.find_element(By.ID, 'file')
    for path, is_foreign in (('data/cat/cat 0.jpg', False), ('foreign.png', True)):
        browser.execute_script('document.getElementById("status").textContent = ""')
        chooser.send_keys(os.path.abspath(path))
        found = wait_for_status(browser, 'cat (', 'dog (', 'ERROR')
        assert found.endswith('so the scores mean little.') == is_foreign


def test_the_page_notices_labels_of_another_training(recipes, onnx, browser):
    """A class was added, and the model not converted again."""
    labels = pathlib.Path('trained_model/labels.txt')
    before = labels.read_text()
    labels.write_text(f'bird\n{before}')
    try:
        browser.get(f'http://localhost:{recipes.ports["8000"]}')
        wait_for_status(browser, 'Ready')
        browser.find_element(By.ID, 'file').send_keys(os.path.abspath('data/cat/cat 0.jpg'))
        found = wait_for_status(browser, 'cat (', 'dog (', 'bird (', 'ERROR')
    finally:
        labels.write_text(before)
    assert found == 'ERROR: model.onnx has 2 classes, and labels.txt 3: make model.onnx again.'


def take_familiarity(outputs):
    """Their order is that of the runtime: the familiarity has one dimension."""
    (found,) = (values[0] for values in outputs if values.ndim == 1)
    return found


def test_familiarity_in_other_runtimes(recipes, onnx):
    """The graph with both outputs, in three runtimes and as tf_test.py says it."""
    outputs = ['final_result', 'familiarity']
    converter = tf.compat.v1.lite.TFLiteConverter.from_frozen_graph(BOTH, ['Mul'], outputs)
    interpreter = Interpreter(model_content=converter.convert())
    interpreter.allocate_tensors()
    session = onnxruntime.InferenceSession(onnx)

    def run_litert(image):
        interpreter.set_tensor(interpreter.get_input_details()[0]['index'], image)
        interpreter.invoke()
        details = interpreter.get_output_details()
        return take_familiarity([interpreter.get_tensor(each['index']) for each in details])

    paths = sorted(recipes.folder.glob('data/*/*.jpg'))[::9]
    printed = run('tf_test.py', '--json', *paths, GRAPH, LABELS, cwd=recipes.folder).stdout
    printed = [json.loads(line)['familiarity'] for line in printed.splitlines()]
    assert np.ptp(printed) > 0.3
    images = [recipes.names['load'](str(path)) for path in paths]
    text = find(recipes, 'openvino.Core').replace('trained_model/optimized_model.pb', BOTH)
    text = text.replace('final_result:0', 'familiarity:0')
    by_openvino = np.concatenate(run_openvino(recipes.folder, text, images))
    by_onnx = [take_familiarity(session.run(None, {'Mul:0': image})) for image in images]
    by_litert = [run_litert(image) for image in images]
    graph_def = tf.compat.v1.GraphDef.FromString(pathlib.Path(GRAPH).read_bytes())
    for found in (printed, by_openvino, by_onnx, by_litert):
        check_familiarity(found, graph_def, [path.read_bytes() for path in paths])
