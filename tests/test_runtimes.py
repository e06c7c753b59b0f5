"""Other runtimes: the recipes of trained_model/README.md give the scores of tf_test.py."""

import json
import pathlib
import shutil

import cv2
import forks
import numpy as np
import onnxruntime
import openvino
import pytest
from ai_edge_litert.interpreter import Interpreter
from conftest import make_clone
from helpers import ROOT
from PIL import Image
from reader import Reader, read_blocks
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from tf_retrain import tf

RECIPES = 'trained_model/README.md', 'Other runtimes'
LABEL = 'python3 tf_test.py --json {} trained_model/unoptimized_model.pb trained_model/labels.txt'
LOSSES = {'dynamic_range': 0.05, 'int8': 0.2}  # of a score, at most


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
            if 'scores' in text or 'video' in text or 'localhost' in text or 'npm' in text:
                reader.recipes.append(text)
            elif language == 'sh':
                reader.type(text)
            else:
                exec(text, reader.names)
        yield reader


def label(reader, photographs):
    """Returns the scores of tf_test.py, [photographs, labels], in the order of the labels."""
    names = pathlib.Path('trained_model/labels.txt').read_text().splitlines()
    lines = reader.type(LABEL.format(' '.join(f'"{path}"' for path in photographs))).splitlines()
    answers = [json.loads(line) for line in lines]
    return np.array(
        [[answer['scores'][answer['labels'].index(name)] for name in names] for answer in answers]
    )


@pytest.mark.slow
def test_twenty_photographs(recipes):
    photographs = sorted(map(str, pathlib.Path('data').glob('*/*.jpg')))[::4]
    expected = label(recipes, photographs)
    assert np.ptp(expected, axis=0).min() > 0.1
    runs = {text.splitlines()[0]: text for text in recipes.recipes if 'scores' in text}
    assert len(runs) == 4
    litert = runs['from ai_edge_litert.interpreter import Interpreter']
    for name, text in {
        **runs,
        **{name: litert.replace('float.tflite', f'{name}.tflite') for name in LOSSES},
    }.items():
        found = []
        for path in photographs:
            recipes.names['image'] = recipes.names['load'](path)
            exec(text, recipes.names)
            found.append(np.ravel(recipes.names.pop('scores')))
        np.testing.assert_allclose(found, expected, atol=LOSSES.get(name, 1e-5), err_msg=name)
    sizes = [
        pathlib.Path(f'trained_model/{name}.tflite').stat().st_size for name in ('float', *LOSSES)
    ]
    assert max(sizes[1:]) < sizes[0] / 2


@pytest.mark.slow
def test_batches_in_onnx_runtime(recipes):
    images = np.concatenate([recipes.names['load'](f'data/cat/cat {i}.jpg') for i in range(5)])
    (recipe,) = (text for text in recipes.recipes if text.startswith('import onnxruntime'))
    one_by_one = []
    for recipes.names['image'] in (*images[:, np.newaxis], images):
        exec(recipe, recipes.names)
        one_by_one.append(recipes.names['scores'])
    np.testing.assert_allclose(one_by_one.pop(), np.concatenate(one_by_one), atol=1e-5)


@pytest.mark.slow
def test_a_video(recipes, monkeypatch):
    """The webcam is a film of four photographs; what OpenCV would show is looked at."""
    photographs = [f'data/{name}/{name} {i}.jpg' for i in range(2) for name in ('cat', 'dog')]
    frames = [cv2.imread(path) for path in photographs]
    film = cv2.VideoWriter('film.avi', cv2.VideoWriter.fourcc(*'MJPG'), 10, frames[0].shape[1::-1])
    for frame in frames:
        film.write(frame)
    film.release()
    capture, shown, words = cv2.VideoCapture, [], []
    monkeypatch.setattr(cv2, 'VideoCapture', lambda number: capture('film.avi'))
    monkeypatch.setattr(cv2, 'waitKey', lambda milliseconds: -1)  # these two need a screen
    monkeypatch.setattr(cv2, 'imshow', lambda title, frame: shown.append(frame.copy()))
    monkeypatch.setattr(cv2, 'putText', lambda frame, text, *rest: words.append(text.split()))
    (recipe,) = (text for text in recipes.recipes if 'VideoCapture' in text)
    exec(recipe, recipes.names)
    assert len(shown) == 4
    expected = label(recipes, photographs)
    assert [name for name, _ in words] == [('cat', 'dog')[scores.argmax()] for scores in expected]
    np.testing.assert_allclose([float(score) for _, score in words], expected.max(axis=1), atol=0.1)


@pytest.fixture
def browser():
    if not (shutil.which('chromium') and shutil.which('chromedriver')):
        pytest.skip('there is no Chromium here')
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which('chromium')
    quiet = ('gpu', 'quic', 'background-networking', 'component-update', 'sync', 'dev-shm-usage')
    for argument in (
        'headless',
        'no-sandbox',
        'no-first-run',
        *(f'disable-{name}' for name in quiet),
    ):
        options.add_argument(f'--{argument}')
    # The webcam.
    for argument in ('use-fake-device-for-media-stream', 'use-fake-ui-for-media-stream'):
        options.add_argument(f'--{argument}')
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which('chromedriver')))
    yield driver
    driver.quit()


def wait_for_status(browser, *starts):
    """Returns the line that tells how the page is, as soon as it starts in one of these ways."""

    def find(driver):
        return driver.find_element(By.ID, 'status').text.startswith(starts)

    WebDriverWait(browser, 60).until(find)
    return browser.find_element(By.ID, 'status').text


@pytest.mark.slow
def test_the_page(recipes, browser):
    """Photographs as they come from cameras: a JPEG, one that its camera stored sideways, a PNG;
    and the webcam.
    """
    shutil.copy(ROOT / 'trained_model/index.html', 'trained_model')
    if not shutil.which('npm'):
        pytest.skip('there is no npm here')
    for text in recipes.recipes:
        if 'npm' in text or 'localhost' in text:
            recipes.type(text)
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open('data/cat/cat 1.jpg') as photograph:
        photograph.crop((0, 0, 31, 20)).save('turned.jpg', exif=exif)
        photograph.save('lossless.png')
    photographs = ['data/cat/cat 0.jpg', 'data/dog/dog 0.jpg', 'turned.jpg', 'lossless.png']
    browser.get(f'http://localhost:{recipes.ports["8000"]}')
    assert wait_for_status(browser, 'Ready', 'ERROR') == 'Ready.'
    for path, scores in zip(photographs, label(recipes, photographs), strict=True):
        browser.execute_script('document.getElementById("status").textContent = ""')
        browser.find_element(By.ID, 'file').send_keys(str(recipes.folder / path))
        found = wait_for_status(browser, 'cat (', 'dog (', 'ERROR')
        assert found.startswith(('cat', 'dog')[scores.argmax()])
        assert float(found.split()[-1].rstrip(')')) == pytest.approx(scores.max(), abs=1e-2)
    rows = browser.find_elements(By.CSS_SELECTOR, '#scores tr')
    assert sorted(row.text.split()[0] for row in rows) == ['cat', 'dog']
    browser.execute_script('document.getElementById("status").textContent = ""')
    browser.find_element(By.ID, 'webcam').click()
    wait_for_status(browser, 'cat (', 'dog (')
    (recipes.folder / 'text.jpg').write_text('no photograph')
    browser.find_element(By.ID, 'file').send_keys(str(recipes.folder / 'text.jpg'))
    assert wait_for_status(browser, 'ERROR').startswith('ERROR: ')


def test_familiarity_in_other_runtimes(recipes, tmp_path):
    """The graph with both outputs, in three runtimes and as tf_test.py says it."""
    for _, text in read_blocks('trained_model/README.md', 'Familiarity'):
        exec(text, recipes.names)
    path = 'trained_model/optimized_with_familiarity.pb'
    outputs = ['final_result', 'familiarity']
    converter = tf.compat.v1.lite.TFLiteConverter.from_frozen_graph(path, ['Mul'], outputs)
    interpreter = Interpreter(model_content=converter.convert())
    interpreter.allocate_tensors()
    onnx = f'{tmp_path}/both.onnx'
    convert = '-m tf2onnx.convert --opset 17 --inputs Mul:0 --outputs final_result:0,familiarity:0'
    forks.run([*convert.split(), '--graphdef', path, '--output', onnx], recipes.folder)
    session = onnxruntime.InferenceSession(onnx)
    network = openvino.Core().compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    photographs = sorted(map(str, pathlib.Path('data').glob('*/*.jpg')))[::9]
    lines = recipes.type(LABEL.format(' '.join(f'"{path}"' for path in photographs))).splitlines()
    expected = [json.loads(line)['familiarity'] for line in lines]
    assert np.ptp(expected) > 0.3
    found = []
    for photograph in photographs:
        image = recipes.names['load'](photograph)
        interpreter.set_tensor(interpreter.get_input_details()[0]['index'], image)
        interpreter.invoke()
        by_lite = [interpreter.get_tensor(d['index']) for d in interpreter.get_output_details()]
        by_onnx = session.run(['familiarity:0'], {'Mul:0': image})[0][0]
        # The order of the outputs is that of the runtime: the familiarity has one dimension.
        pairs = by_lite, network(image).values()
        others = [next(values[0] for values in pair if values.ndim == 1) for pair in pairs]
        found.append([by_onnx, *others])
    np.testing.assert_allclose(found, np.transpose([expected] * 3), atol=2.01 / 80)
